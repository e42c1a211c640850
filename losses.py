"""The papers' losses: pure functions of unit-norm embeddings, most of them made of one sum, InfoNCE.

Symbols: B images, T texts of an image, each in a fixed slot, K texts that a loss takes (in `method_loss` all T), P
patches, H branches, M texts for the branches, D embedding width. `logit_scale` is the multiplier s itself, exp of the
learned parameter.

Under torchrun every rank calls them with its own images and texts. They gather the embeddings of the other ranks, so
the mean over ranks is the loss of the global batch, with its gradients (diversity_loss apart: each rank has its own).
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from csrc.fused import similarity_logsumexp
from data import text_slots

EPS = 1e-6
REGROUPED_IMAGES = 8  # images in which a text groups patches with --negatives regrouped


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor, across_ranks: bool = True) -> Tensor:
    """InfoNCE, CLIP's loss (2103.00020, figure 3): mean over i of ½·[CE(s·v_i·tᵀ, i) + CE(s·t_i·vᵀ, i)]. Plainly:

        logits = s * image @ text.mT
        ((logits.logsumexp(-1) + logits.logsumexp(-2)) / 2 - logits.diagonal()).mean()

    image [(G,)N,D], text [(G,)N,D] -> scalar. With groups, the mean of G separate losses: negatives stay within their
    group. An operand without the dimension G is shared by all groups. `across_ranks`: negatives come from all ranks.
    """
    positive = logit_scale * (image * text).sum(-1)  # [(G,) N]
    if across_ranks and distributed():  # this rank's rows over the columns of all ranks, its columns over all rows
        per_image, _ = similarity_logsumexp(image, Gather.apply(text), logit_scale, cols=False)
        _, per_text = similarity_logsumexp(Gather.apply(image), text, logit_scale, rows=False)
    else:
        per_image, per_text = similarity_logsumexp(image, text, logit_scale)  # [(G,) N] each
    return ((per_image + per_text) / 2 - positive).mean()


def multi_positive_loss(image: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """DreamLIP's L_MPCL (2403.17007, section 3.2), LoTLIP's loss over summary tokens (2410.05249), and Holistic CLIP's
    one-to-many.

    image [B,D], texts [B,K,D] -> scalar (1/K)·Σ_k InfoNCE(v, t_k): the negatives of slot k are the slot-k texts of the
    other images.
    """
    return contrastive_loss(image, texts.transpose(0, 1), logit_scale)


def multi_to_multi_loss(
    branches: Tensor, texts: Tensor, logit_scale: Tensor, views: int, matching: str = "image"
) -> Tensor:
    """Holistic CLIP's M2M loss (2412.00440, section 3.3): (1/M)·Σ_m InfoNCE(v_m, t_m).

    branches [B,H,D], texts [B,M,D] -> scalar. The first `views` texts are perspectives, the same for every image. If
    there is one for each branch, text m belongs to branch m, for m < H. All other texts go to the branch of their image
    that is most similar to them ("free matching").
    matching: which branch represents the other images in such a text's softmax. "image": each image's own choice, made
    for its own text; "text": the choice of the text's own image, for all images (the released code).
    """
    H = branches.shape[1]
    M = texts.shape[1]
    if H == 1:
        return multi_positive_loss(branches[:, 0], texts, logit_scale)
    similarity = torch.einsum("bmd,bhd->bmh", texts, branches)
    match = similarity.argmax(-1)  # [B, M], the branch of image b for its text m
    if views >= H:
        match[:, :H] = torch.arange(H, device=match.device)
    chosen = branches.take_along_dim(match[..., None], 1)  # [B, M, D]
    if matching == "text" and (M > H or views < H):  # some are free
        return text_matching_loss(branches, texts, chosen, match, logit_scale)
    return contrastive_loss(chosen.transpose(0, 1), texts.transpose(0, 1), logit_scale)


def text_matching_loss(branches: Tensor, texts: Tensor, chosen: Tensor, match: Tensor, logit_scale: Tensor) -> Tensor:
    """Free matching as in Holistic CLIP's released code: from image to text, an image uses the branch that it chose for
    its own text; from text to image, all images use the branch that the text's own image chose.

    branches [B,H,D], texts [B,M,D], match [B,M]: the branch that an image chose for its text m, chosen [B,M,D]: this
    branch's embedding -> scalar.
    """
    positive = logit_scale * (chosen * texts).sum(-1)  # [B, M]
    candidates = texts.transpose(0, 1)  # [M, N, D], N = B or the batch of all ranks
    images = branches.transpose(0, 1)  # [H, N, D]
    if distributed():
        candidates = Gather.apply(candidates)
        images = Gather.apply(images)
    per_image, _ = similarity_logsumexp(chosen.transpose(0, 1), candidates, logit_scale, cols=False)  # [M, B]
    logits = logit_scale * torch.einsum("hnd,bmd->bmhn", images, texts)
    of_match = logits.take_along_dim(match[..., None, None], 2).squeeze(2)  # [B, M, N]
    per_text = of_match.logsumexp(-1)  # [B, M]
    return ((per_image.mT + per_text) / 2 - positive).mean()


def diversity_loss(branches: Tensor) -> Tensor:
    """A loss in Holistic CLIP's released code, not in its paper: max(c - 0.7, 0), where c is the mean cosine between
    two different branches of an image, over the images of this rank. branches [B,H,D] -> scalar."""
    B, H, _ = branches.shape
    cosines = branches @ branches.mT  # [B, H, H]
    pairs = B * H * (H - 1)
    different = (cosines.sum() - B * H) / pairs  # the diagonal, a branch with itself, is 1 each
    return (different - 0.7).clamp_min(0)


def group_patches(patches: Tensor, texts: Tensor, threshold: float | None = None, allowed: Tensor | None = None):
    """Groups the patches of an image by their similarity to each of its texts (SPARC 2401.09865, equations 2 to 5;
    DreamLIP, section 3.3).

    patches [B,P,D], texts [B,K,D] -> (grouped [B,K,D] unit-norm, weights [B,K,P] summing to 1). w_p = <t_k, patch_p>,
    min-max normalised over p, set to 0 below the threshold (None: 1/P), divided by the sum. `allowed` [B,K or 1,P]
    (bool, at least one True for a text): the result is as if the image had no other patches.
    """
    w = texts @ patches.mT  # [B, K, P]
    low, high, P = w, w, patches.shape[1]
    if allowed is not None:
        low = w.masked_fill(~allowed, math.inf)
        high = w.masked_fill(~allowed, -math.inf)
        P = allowed.sum(-1, keepdim=True)
    low = low.amin(-1, keepdim=True)
    high = high.amax(-1, keepdim=True)
    w = (w - low + EPS) / (high - low + EPS)  # EPS makes equal patches weigh the same, instead of 0/0
    w = w * (w >= (1 / P if threshold is None else threshold))
    if allowed is not None:
        w = w * allowed
    w = w / w.sum(-1, keepdim=True).clamp_min(EPS)
    return F.normalize(w @ patches, dim=-1, eps=EPS), w


def grouping_loss(
    patches: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    threshold: float | None = None,
    negatives: str = "image",
    allowed: Tensor | None = None,
) -> Tensor:
    """DreamLIP's subcaption-specific grouping loss (2403.17007, section 3.3): contrasts every sub-caption with the
    patches that it groups.

    patches [B,P,D], texts [B,K,D] -> scalar. `allowed`: see group_patches.
    negatives: "image" the other texts of the same image (the paper); "batch" all B·K pairs (DreamLIP's released code);
    "slot" the same slot of the other images (as in multi_positive_loss); "regrouped": see regrouping_loss.
    """
    if negatives == "regrouped":
        return regrouping_loss(patches, texts, logit_scale, threshold, allowed)
    grouped, _ = group_patches(patches, texts, threshold, allowed)  # [B, K, D]
    if negatives == "slot":
        return contrastive_loss(grouped.transpose(0, 1), texts.transpose(0, 1), logit_scale)
    if negatives == "batch":
        return contrastive_loss(grouped.flatten(0, 1), texts.flatten(0, 1), logit_scale)
    return contrastive_loss(grouped, texts, logit_scale, across_ranks=False)


def token_grouping_loss(
    patches: Tensor,
    tokens: Tensor,
    is_word: Tensor,
    logit_scale: Tensor,
    threshold: float | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """SPARC's fine-grained loss (2401.09865, equation 6): every token of a caption groups the patches, and is
    contrasted with its group among the tokens of the same caption.

    patches [N,P,D], tokens [N,L,D], is_word [N,L] (bool, False: start token, end token, padding) -> scalar, the mean
    over captions of the mean over their words.
    """
    grouped, _ = group_patches(patches, tokens, threshold, allowed)  # [N, L, D]
    positive = logit_scale * (grouped * tokens).sum(-1)  # [N, L]
    logits = logit_scale * (grouped @ tokens.mT)  # [N, L, L]
    hidden = ~(is_word[:, :, None] & is_word[:, None, :])
    logits = logits.masked_fill(hidden, -1e4)  # not -inf: a row of nothing but padding would give NaN
    per_group = logits.logsumexp(-1)
    per_token = logits.logsumexp(-2)
    losses = (per_group + per_token) / 2 - positive
    losses = torch.where(is_word, losses, 0.0)
    count = is_word.sum(-1).clamp_min(1)
    return (losses.sum(-1) / count).mean()


def regrouping_loss(
    patches: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    threshold: float | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """The grouping loss with FLAIR's negatives (2412.03561): what a text groups in its own image, against what the same
    text groups in others, the next REGROUPED_IMAGES - 1 images of the global batch (all, if there are fewer).

    patches [B,P,D], texts [B,K,D], allowed [B,K,P] (bool, the same place in all images) -> scalar, the mean over texts
    t_ik of CE(s·<g_j(t_ik), t_ik> over images j, i).

    With the other negatives each group is made by one text and compared with other texts, so copying the text into the
    group wins, whatever the image shows. Here the same text makes all groups, so only the images can differ. (FLAIR
    itself pools by attention and has a sigmoid loss over the whole batch.)
    """
    B = len(texts)
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    n = min(REGROUPED_IMAGES, world * B)
    heads = patches[:n - 1]  # the first images of every rank
    following = (rank + 1) * len(heads)  # the place of the next rank's
    if distributed():
        heads = Gather.apply(heads.flatten(1)).unflatten(1, patches.shape[1:])
    ring = torch.cat([patches, heads.roll(-following, 0)[:n - 1]])  # this rank's images and the next n - 1
    logits = []
    for shift in range(n):
        grouped, _ = group_patches(ring[shift:shift + B], texts, threshold, allowed)  # [B, K, D]
        logits.append(logit_scale * (grouped * texts).sum(-1))
    logits = torch.stack(logits)  # [images, B, K], the text's own image first
    return (logits.logsumexp(0) - logits[0]).mean()


def method_loss(out: dict, s, allowed: Tensor | None = None) -> tuple[Tensor, dict]:
    """The weighted sum of a method's losses, and its terms by name, detached.

    out: what CLIP.forward returns; s: train.Settings; allowed [B,T,P] (bool; None: all): the patches that each text may
    group.
    """
    slots = text_slots(s)
    scale = out["logit_scale"]
    branches = out["branches"]
    texts = out["summaries"][:, :, 0]  # [B, T, D]: every text by its own summary token (end-of-text or [CLS]) ...
    corners = out["summaries"][:, slots.count("raw"):, 1:]
    corners = corners.flatten(1, 2)  # ... and those behind the raw slot by their corners, too
    M = slots.count("perspective")  # the last slots
    others, perspectives = texts.split([len(slots) - M, M], 1)
    positives = torch.cat([perspectives, others, corners], 1)
    weights = {"contrastive": s.contrastive_weight, "diversity": s.branch_diversity, "grouping": s.grouping_weight}
    terms = {"contrastive": multi_to_multi_loss(branches, positives, scale, M, s.matching)}
    if s.branch_diversity:
        terms["diversity"] = diversity_loss(branches)
    if s.grouping == "sub-caption":
        terms["grouping"] = grouping_loss(out["patches"], texts, scale, s.threshold, s.negatives, allowed)
    if s.grouping == "token":
        tokens = out["token_embeddings"]  # [B·T, L, D]
        place = torch.arange(tokens.shape[1], device=tokens.device)
        is_word = (place > 0) & (place < out["ends"][:, None])  # not the start token, the end token or padding
        patches = out["patches"].repeat_interleave(len(slots), 0)  # [B·T, P, D]
        if allowed is not None:
            allowed = allowed.flatten(0, 1)[:, None]  # [B·T, 1, P]: a caption's tokens share its box
        terms["grouping"] = token_grouping_loss(patches, tokens, is_word, scale, s.threshold, allowed)
    loss = sum(weights[name] * term for name, term in terms.items())
    return loss, {name: term.detach() for name, term in terms.items()}


# ---- many ranks ------------------------------------------------------------------------------------------------------

def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()  # train.py makes no group of one


class Gather(torch.autograd.Function):
    """x [(G,)N,D] of every rank, joined to [(G,)world·N,D]. The gradient of a rank's part is the sum over all ranks."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, -2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), -2)[dist.get_rank()]
