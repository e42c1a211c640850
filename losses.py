"""The papers' losses, pure functions of unit-norm embeddings. All but regrouping_loss rest on similarity_logsumexp.

Symbols: B images, K texts (slots) an image, P patches, H branches, M texts for the branches, D embedding width.
`logit_scale` is the multiplier s itself, exp of the learned parameter. Under torchrun every rank calls them with its
own images and texts: the functions gather what the other ranks hold, so that the mean over ranks is the loss of the
global batch, with its gradients.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from csrc import fused
from data import text_slots

EPS = 1e-6
STORED = 1 << 22  # entries of a similarity matrix that is stored rather than streamed


def similarity_logsumexp(image: Tensor, text: Tensor, logit_scale: Tensor, rows: bool = True, cols: bool = True):
    """Row and column log-sum-exp of L = s · image · textᵀ.

    image [(G,)N,D], text [(G,)M,D] -> (per_image [(G,)N], per_text [(G,)M]); an operand without the group dimension G
    is shared by all groups. An output that is not asked for is None. A matrix of up to 4 M entries is simply stored; a
    larger one never is: that is the fused op's work (csrc/fused.py), which `--fused on` uses for all.
    """
    groups = max(x.shape[0] if x.dim() == 3 else 1 for x in (image, text))
    small = groups * image.shape[-2] * text.shape[-2] <= STORED and fused.mode() != "on"
    return (fused.reference if small else fused.similarity_logsumexp)(image, text, logit_scale, rows=rows, cols=cols)


class _Gather(torch.autograd.Function):
    """Concatenates each of the tensors [(G,)N,D] over the ranks, all in one collective, to [(G,)world·N,D]; the
    gradient of a rank's part is the sum over all ranks."""

    @staticmethod
    def forward(ctx, *tensors):
        mine = torch.cat([x.flatten() for x in tensors])
        everyone = mine.new_empty(dist.get_world_size() * len(mine))
        dist.all_gather_into_tensor(everyone, mine)
        parts = everyone.view(-1, len(mine)).split([x.numel() for x in tensors], 1)  # each [world, numel]
        return tuple(part.unflatten(1, x.shape).movedim(0, -3).flatten(-3, -2) for part, x in zip(parts, tensors))

    @staticmethod
    def backward(ctx, *grads):
        total = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(total)
        sums = total.split([grad.numel() for grad in grads])
        return tuple(part.view_as(grad).chunk(dist.get_world_size(), -2)[dist.get_rank()]
                     for part, grad in zip(sums, grads))


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def global_logsumexp(image: Tensor, text: Tensor, logit_scale: Tensor, everywhere: bool = True):
    """similarity_logsumexp of this rank's rows and columns; `everywhere`: against the columns and rows of all ranks."""
    if not (everywhere and distributed()):
        return similarity_logsumexp(image, text, logit_scale)
    all_image, all_text = _Gather.apply(image, text)
    per_image, _ = similarity_logsumexp(image, all_text, logit_scale, cols=False)
    _, per_text = similarity_logsumexp(all_image, text, logit_scale, rows=False)
    return per_image, per_text


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor, everywhere: bool = True) -> Tensor:
    """InfoNCE, CLIP's loss (2103.00020, figure 3): mean over i of ½·[CE(s·v_i·tᵀ, i) + CE(s·t_i·vᵀ, i)].

    image [(G,)N,D], text [(G,)N,D] -> scalar. With groups, the mean of G separate losses: negatives stay within their
    group. `everywhere=False` keeps the negatives within this rank.
    """
    positive = logit_scale * (image * text).sum(-1)
    per_image, per_text = global_logsumexp(image, text, logit_scale, everywhere)
    return ((per_image + per_text) / 2 - positive).mean()


def multi_positive_loss(image: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """DreamLIP's L_MPCL (2403.17007, section 3.2), LoTLIP's loss over summary tokens (2410.05249), and Holistic CLIP's
    one-to-many.

    image [B,D], texts [B,K,D] -> scalar (1/K)·Σ_k InfoNCE(v, t_k): the negatives of slot k are the slot-k texts of the
    other images.
    """
    return contrastive_loss(image, texts.transpose(0, 1), logit_scale)


def multi_to_multi_loss(branches: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Holistic CLIP's M2M loss (2412.00440, section 3.3): (1/M)·Σ_m InfoNCE(v_m, t_m).

    branches [B,H,D], texts [B,M,D] -> scalar. Text m belongs to branch m; texts beyond the branches, or all of them
    when there are more branches than texts, go to the branch most similar to them, image by image ("free matching").
    """
    H, M = branches.shape[1], texts.shape[1]
    if H == 1:
        return multi_positive_loss(branches[:, 0], texts, logit_scale)
    fixed = H if M >= H else 0
    free = texts[:, fixed:]
    match = torch.einsum("bmd,bhd->bmh", free, branches).argmax(-1)  # [B, M - fixed]
    chosen = branches.gather(1, match[..., None].expand_as(free))
    image = torch.cat([branches[:, :fixed], chosen], 1)  # [B, M, D]
    return contrastive_loss(image.transpose(0, 1), texts.transpose(0, 1), logit_scale)


def group_patches(patches: Tensor, texts: Tensor, threshold: float | None = None, allowed: Tensor | None = None):
    """Groups the patches of an image by their similarity to each of its texts (SPARC 2401.09865, section 3.2; DreamLIP,
    section 3.3).

    patches [B,P,D], texts [B,K,D] -> (grouped [B,K,D] unit-norm, weights [B,K,P] summing to 1). w_p = <t_k, patch_p>,
    min-max normalised over p, set to 0 under the threshold (None: 1/P), divided by the sum. `allowed` [B,K or 1,P]
    (bool, at least one True a text): the result is as if a text's image had no other patches.
    """
    w = texts @ patches.mT  # [B, K, P]
    low, high, P = w, w, patches.shape[1]
    if allowed is not None:
        low, high = w.masked_fill(~allowed, math.inf), w.masked_fill(~allowed, -math.inf)
        P = allowed.sum(-1, keepdim=True)
    low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    w = (w - low + EPS) / (high - low + EPS)  # EPS makes equal patches weigh the same, instead of 0/0
    w = w * (w >= (1 / P if threshold is None else threshold))
    if allowed is not None:
        w = w * allowed
    w = w / w.sum(-1, keepdim=True).clamp_min(EPS)
    return F.normalize(w @ patches, dim=-1, eps=EPS), w


def grouping_loss(patches: Tensor, texts: Tensor, logit_scale: Tensor, threshold: float | None = None,
                  mask: Tensor | None = None, negatives: str = "image", allowed: Tensor | None = None) -> Tensor:
    """Contrasts every text with the patches it grouped: DreamLIP's subcaption-specific grouping loss (2403.17007,
    section 3.3) when the texts are sub-captions, SPARC's fine-grained loss (2401.09865, equation 5) when they are the
    tokens of one caption.

    patches [B,P,D], texts [B,K,D], mask [B,K] (bool, True: a text; False: padding) -> scalar. `allowed`: see
    group_patches.
    negatives: "image" the other texts of the same image (both papers); "batch" all B·K pairs (DreamLIP's released
    code); "slot" the same slot of the other images (as in multi_positive_loss); "regrouped": see regrouping_loss.
    """
    if negatives == "regrouped" and mask is None:
        return regrouping_loss(patches, texts, logit_scale, threshold, allowed)
    grouped, _ = group_patches(patches, texts, threshold, allowed)  # [B, K, D]
    if negatives == "slot":
        grouped, texts = grouped.transpose(0, 1), texts.transpose(0, 1)
        mask = mask.T if mask is not None else None
    elif negatives == "batch":
        grouped, texts = grouped.flatten(0, 1)[None], texts.flatten(0, 1)[None]
        mask = mask.flatten()[None] if mask is not None else None
    elif negatives != "image":
        raise ValueError(f"negatives must be image, batch, slot or, without a mask, regrouped, not {negatives!r}")
    everywhere = negatives != "image"
    if mask is None:
        return contrastive_loss(grouped, texts, logit_scale, everywhere)
    return masked_contrastive_loss(grouped, texts, logit_scale, mask, everywhere)


def regrouping_loss(patches: Tensor, texts: Tensor, logit_scale: Tensor, threshold: float | None = None,
                    allowed: Tensor | None = None) -> Tensor:
    """The grouping loss with FLAIR's negatives (2412.03561): what a text groups in its own image, against what the same
    text groups in the others. patches [B,P,D], texts [B,K,D], allowed [B,K,P] (bool) -> scalar, the mean over texts
    t_ik of CE(s·<g_j(t_ik), t_ik> over images j, i).

    With the other negatives a group is made by one text and compared with others, so that a group that only repeats the
    text that made it wins whatever the image shows. Here all groups are made by one text, and only the images differ.
    A slot's B · B groups are computed again in the backward pass: the memory is one slot's.
    """
    images = patches  # of all ranks, [N, P, D]
    if distributed():
        images = _Gather.apply(patches.flatten(1))[0].unflatten(1, patches.shape[1:])
    first = dist.get_rank() * len(texts) if distributed() else 0
    own = torch.arange(first, first + len(texts), device=texts.device)

    def slot(text, allowed):
        grouped, _ = group_patches(images, text.expand(len(images), -1, -1), threshold, allowed)  # [N, B, D]
        return F.cross_entropy(logit_scale * (grouped * text).sum(-1).mT, own)

    K = texts.shape[1]
    which = [None] * K if allowed is None else allowed.unbind(1)
    return sum(recompute(slot, *pair, use_reentrant=False) for pair in zip(texts.unbind(1), which)) / K


def masked_contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor, mask: Tensor,
                            everywhere: bool = False) -> Tensor:
    """contrastive_loss over the pairs where mask [G,N] is True; image, text [G,N,D].

    Padding takes no part as a negative either: two more features, [x, 1, b] · [y, b, 1], add b to every logit of a
    padding row or column, with b·s = -10,000. The loss is the mean over the groups of each group's mean over its pairs.
    """
    positive = logit_scale * (image * text).sum(-1)
    b = torch.where(mask, 0.0, -1e4 / torch.as_tensor(logit_scale).detach())[..., None].to(image.dtype)
    one = torch.ones_like(b)
    image, text = torch.cat([image, one, b], -1), torch.cat([text, b, one], -1)
    per_image, per_text = global_logsumexp(image, text, logit_scale, everywhere)
    losses = torch.where(mask, (per_image + per_text) / 2 - positive, 0.0)
    count = mask.sum(-1).float()
    if everywhere and distributed():  # the mean over the pairs of all ranks, though some hold more than others
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return (losses.sum(-1) / count.clamp_min(1 / 1024)).mean()


def method_loss(out: dict, s, allowed: Tensor | None = None) -> tuple[Tensor, dict]:
    """The weighted sum of the method's losses, and its parts. `out` is what CLIP.forward returns.

    `allowed` [B,T,P] (bool; None: all are): the patches that each text may group.
    """
    slots, summaries, scale = text_slots(s), out["summaries"], out["logit_scale"]  # summaries [B, T, 1+C, D]
    texts = summaries[:, :, 0]  # [B, T, D]: every text by its end-of-text token ...
    # ... and all but the raw caption, which comes first, by their corners too (LoTLIP)
    corners = summaries[:, slots.count("raw"):, 1:].flatten(1, 2)
    parts = {"contrastive": multi_to_multi_loss(out["branches"], torch.cat([texts, corners], 1), scale)}
    loss = s.contrastive_weight * parts["contrastive"]
    if s.grouping != "none":
        if s.grouping == "sub-caption":
            parts["grouping"] = grouping_loss(out["patches"], texts, scale, s.threshold, None, s.negatives, allowed)
        else:
            tokens = out["token_embeddings"]  # [B·T, L, D]; the two end tokens and the padding are no words
            place, end = torch.arange(tokens.shape[1], device=tokens.device), out["ends"][:, None]
            words = (place > 0) & (place < end)  # [B·T, L]
            patches = out["patches"].repeat_interleave(len(slots), 0)  # [B·T, P, D]
            if allowed is not None:
                allowed = allowed.flatten(0, 1)[:, None]  # [B·T, 1, P]: a caption's tokens share its place
            parts["grouping"] = grouping_loss(patches, tokens, scale, s.threshold, words, s.negatives, allowed)
        loss = loss + s.grouping_weight * parts["grouping"]
    return loss, parts
