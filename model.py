"""The model: a vision transformer and a text transformer from scratch, with the parts the three papers add.

    CLIP                 pre-LN ViT, class token, causal text transformer read at the end-of-text token (2103.00020)
    corner tokens        more summary tokens at the text's end, blind to one another (LoTLIP, 2410.05249, section 3.2)
    branches             H mutually blind class tokens, or H parallel MLPs in the last layers (Holistic CLIP,
                         2412.00440, section 3.2)
    patch embeddings     the final patch tokens through the class token's LayerNorm and projection (DreamLIP, SPARC)

With one branch and no corner tokens it is CLIP, weight for weight. `from_state_dict` reads what others released
(open_clip, OpenAI, DreamLIP, Holistic CLIP, LoTLIP), `to_open_clip` writes what open_clip reads, `resized` changes the
resolution.
Attention masks are boolean, True where a query may look at a key.
"""

import copy
import json
import os
import pickle
import re
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import MEAN, UserError, read_json


@dataclass
class CLIPConfig:
    image_size: int = 224  # side of the square image, in pixels
    patch: int = 16  # side of a patch, in pixels
    vision_width: int = 768  # width W of the image tower
    vision_depth: int = 12  # its layers
    vision_heads: int = 12  # its attention heads
    text_width: int = 512  # width of the text tower
    text_depth: int = 12  # its layers
    text_heads: int = 8  # its attention heads
    context: int = 77  # longest text in tokens, both end tokens counted
    vocab: int = 49408  # tokens in the vocabulary (training takes the tokenizer's)
    embed: int = 512  # width D of the shared embedding space
    stem: str = "patch"  # a linear layer a "patch" (ViT), or "conv", 3x3 convolutions of stride 2 (2106.14881)
    vision_style: str = "clip"  # or "timm", LoTLIP's: no LayerNorm before the first block
    activation: str = "gelu"  # or "quickgelu", for OpenAI's weights
    pool: str = "class"  # image embedding from the "class" token (the papers) or as the "average" of the patches
    branches: int = 1  # H image embeddings (Holistic CLIP)
    branch_type: str = "class"  # H "class" tokens, or H parallel "mlp"s in the last `branch_layers` layers
    branch_layers: int = 3  # layers with parallel mlps
    branch_mask: bool = True  # False: class tokens see one another, by 1 in the logit more (Holistic CLIP's code)
    text_style: str = "clip"  # or "bert", LoTLIP's: LayerNorm after each sum and on the input, a pooling layer
    text_attention: str = "causal"  # CLIP's, or "bidirectional" with the first token as [CLS] (LoTLIP's)
    corner_tokens: int = 0  # C (LoTLIP)
    corner_mask: bool = True  # False: summary tokens see one another (LoTLIP's ablation)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quickgelu": QuickGELU}
NORM_EPS = {"clip": 1e-5, "timm": 1e-6, "bert": 1e-12}  # what each adds to the variance in its LayerNorms


class Packing(NamedTuple):
    """What stands in a mask's place where N texts lie one behind the other, without padding, as one row of T tokens;
    behind them their C·N corners: the first of every text, then the second of every text, and so on."""

    starts: Tensor  # [N+1] int32: text n is the tokens starts[n] to starts[n+1] - 1
    summary: Tensor  # [N], the place of each text's end-of-text token (causal) or [CLS]
    longest: int  # no text is longer
    corners: int  # C
    causal: bool


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, q_longest: int,
                     k_longest: int, causal: bool = False) -> Tensor:
    """Attention of sequences that lie one behind the other: q [R,heads,d], k and v [T,heads,d] -> [R,heads,d]. The
    queries q_starts[n] to q_starts[n+1] - 1 look at the keys k_starts[n] to k_starts[n+1] - 1. It is flash attention,
    which a GPU has, in half precision."""
    from torch.nn.attention.varlen import varlen_attn
    return varlen_attn(q, k, v, q_starts, k_starts, q_longest, k_longest, window_size=(-1, 0 if causal else -1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """x [B,N,W] -> queries, keys, values [3, B, heads, N, W/heads]."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, mask: Tensor | Packing | None = None, causal: bool = False) -> Tensor:
        if isinstance(mask, Packing):
            return self.packed(x[0], mask)[None]
        B, N, W = x.shape
        q, k, v = self.split(x)
        if q.dtype == torch.bfloat16 and q.is_cpu:  # PyTorch's attention is several times slower there than in float32
            with torch.autocast("cpu", enabled=False):
                x = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(x.transpose(1, 2).reshape(B, N, W))

    def packed(self, x: Tensor, p: Packing) -> Tensor:
        """x [T+C·N,W] -> the same. A corner looks at its text as the summary token does, with itself in that token's
        place; no other token looks at a corner (LoTLIP's mask, `text_mask`)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # each [T+C·N, heads, W/heads]
        N = len(p.summary)
        T = len(x) - p.corners * N
        parts = [varlen_attention(q[:T], k[:T], v[:T], p.starts, p.starts, p.longest, p.longest, p.causal)]
        each = torch.arange(N + 1, dtype=torch.int32, device=x.device)
        for c in range(p.corners):  # a range to T would tie torch.compile's graph to this T
            own = slice(T + c * N, T + (c + 1) * N)
            keys, values = (y[:T].index_copy(0, p.summary, y[own]) for y in (k, v))
            parts.append(varlen_attention(q[own], keys, values, each, p.starts, 1, p.longest))
        return self.out(torch.cat(parts).flatten(1))

    def weights(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Who looks how much at whom, [B, heads, N, N], rows summing to 1: for figures, forward never stores them."""
        q, k, _ = self.split(x)
        if causal:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1)


class Block(nn.Module):
    """A pre-LN transformer block whose MLP may end in several parallel layers, one a branch (Holistic CLIP's MLPs).

    x [S,B,N,W] -> [H,B,N,W], where S is 1 before the first branching block and H after it; H = 1 in an ordinary block.
    """

    def __init__(self, width: int, heads: int, activation: str, branches: int = 1, eps: float = 1e-5):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width, eps), Attention(width, heads)
        self.ln_2, self.fc = nn.LayerNorm(width, eps), nn.Linear(width, 4 * width)
        self.act = ACTIVATIONS[activation]()
        self.proj = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(branches))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = x + self.attn(self.ln_1(x).flatten(0, 1), mask, causal).view_as(x)
        hidden = self.act(self.fc(self.ln_2(x)))
        if len(self.proj) == 1:
            return x + self.proj[0](hidden)
        streams = range(len(self.proj)) if len(x) > 1 else [0] * len(self.proj)
        return torch.stack([x[s] + proj(hidden[s]) for s, proj in zip(streams, self.proj)])


class PostNormBlock(Block):
    """BERT's block (1810.04805): a LayerNorm after each sum instead of before each layer. x [1,B,N,W] -> the same."""

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = self.ln_1(x + self.attn(x.flatten(0, 1), mask, causal).view_as(x))
        return self.ln_2(x + self.proj[0](self.act(self.fc(x))))


def blocks(width, depth, heads, activation, style, branches=1, branch_layers=0):
    kind = PostNormBlock if style == "bert" else Block
    return nn.ModuleList(kind(width, heads, activation, branches if i >= depth - branch_layers else 1, NORM_EPS[style])
                         for i in range(depth))


class VisionTransformer(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        W, scale, eps = c.vision_width, c.vision_width ** -0.5, NORM_EPS[c.vision_style]
        tokens = c.branches if c.branch_type == "class" else 1
        forks = c.branches if c.branch_type == "mlp" else 1
        P = (c.image_size // c.patch) ** 2
        self.pool = c.pool
        self.patch_embedding = (nn.Conv2d(3, W, c.patch, c.patch, bias=False) if c.stem == "patch" else
                                conv_stem(W, c.patch))
        self.class_embedding = nn.Parameter(scale * torch.randn(tokens, W))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + P, W))  # row 0: class tokens
        self.ln_pre = nn.LayerNorm(W, eps) if c.vision_style == "clip" else nn.Identity()
        self.blocks = blocks(W, c.vision_depth, c.vision_heads, c.activation, c.vision_style, forks, c.branch_layers)
        self.ln_post = nn.LayerNorm(W, eps)
        self.proj = nn.Parameter(scale * torch.randn(W, c.embed))
        mask = class_token_mask(tokens, P, c.branch_mask) if tokens > 1 else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,S,S] -> branches [B,H,D], patches [B,P,D], not yet of unit norm."""
        T = len(self.class_embedding)
        x = self.patch_embedding(images).flatten(2).mT  # [B, P, W]
        x = x + self.positional_embedding[1:].to(x)
        x = torch.cat([(self.class_embedding + self.positional_embedding[:1]).to(x).expand(len(x), -1, -1), x], 1)
        x = self.ln_pre(x)[None]  # [1, B, T+P, W]
        for block in self.blocks:
            x = block(x, self.mask)  # [1 or H, B, T+P, W]
        x = self.ln_post(x) @ self.proj  # [1 or H, B, T+P, D]
        summary, patches = x[:, :, :T], x[:, :, T:]
        if self.pool == "average":
            summary = patches.mean(2, keepdim=True)
        return summary.permute(1, 0, 2, 3).flatten(1, 2), patches.mean(0)


def conv_stem(width: int, patch: int) -> nn.Sequential:
    """3x3 convolutions: one of stride 2 for each halving of the resolution, doubling the channels, and from the second
    on one of stride 1 behind it; then a 1x1 to the width. Small models learn shapes from it in a fraction of the images
    that linear patches need (2106.14881)."""
    halvings = patch.bit_length() - 1
    channels = [3] + [max(8, width * 3 // 4 // 2 ** (halvings - 1 - i)) for i in range(halvings)]
    layers = []
    for i, (a, b) in enumerate(zip(channels, channels[1:])):
        layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GELU()] + ([nn.Conv2d(b, b, 3, 1, 1), nn.GELU()] if i else [])
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], width, 1))


def class_token_mask(tokens: int, patches: int, blind: bool = True) -> Tensor:
    """Class tokens do not look at one another: each at itself and the patches, patches at everything. [T+P, T+P], bool.

    Holistic CLIP's code makes this mask a float before PyTorch sees it, so that instead of -inf a 1 is added to those
    logits, and its released weights have learned with that (`blind=False`: what is added, float).
    """
    mask = torch.ones(tokens + patches, tokens + patches, dtype=torch.bool)
    mask[:tokens, :tokens] = torch.eye(tokens, dtype=torch.bool)
    return mask if blind else (~mask).float()


class TextTransformer(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        W = c.text_width
        eps, bert = NORM_EPS[c.text_style], c.text_style == "bert"
        self.causal, self.corners, self.corner_mask = c.text_attention == "causal", c.corner_tokens, c.corner_mask
        self.token_embedding = nn.Embedding(c.vocab, W)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.context, W))
        self.corner_embedding = nn.Parameter(0.02 * torch.randn(c.corner_tokens, W)) if c.corner_tokens else None
        self.ln_pre = nn.LayerNorm(W, eps) if bert else nn.Identity()
        self.blocks = blocks(W, c.text_depth, c.text_heads, c.activation, c.text_style)
        self.ln_final = nn.Identity() if bert else nn.LayerNorm(W, eps)
        self.pooler = nn.Sequential(nn.Linear(W, W), nn.Tanh()) if bert else nn.Identity()
        self.proj = nn.Parameter(W ** -0.5 * torch.randn(W, c.embed))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [N,L] -> summaries [N,1+C,D] (end-of-text or [CLS], then the corners), token embeddings [N,L,D], not
        yet of unit norm.

        Corner tokens stand in the last C places; who sees whom is the mask's affair, not the order's."""
        (N, L), C = tokens.shape, self.corners
        end = tokens.argmax(-1)  # the end-of-text token has the greatest id
        x = self.token_embedding(tokens) + self.positional_embedding[:L]
        if C:
            x = torch.cat([x, self.corner_embedding.expand(N, -1, -1)], 1)  # [N, L+C, W]
        plain_causal = self.causal and C == 0  # padding stands behind every text, so the causal mask hides it too
        mask = None if plain_causal else text_mask(end, L, C, self.causal, self.corner_mask)[:, None]
        x = self.ln_pre(x)[None]
        for block in self.blocks:
            x = block(x, mask, plain_causal)
        x = self.project(x[0])  # [N, L+C, D]
        summary = x[torch.arange(N, device=x.device), end] if self.causal else x[:, 0]
        return torch.cat([summary[:, None], x[:, L:]], 1), x[:, :L]

    def project(self, x: Tensor) -> Tensor:
        return self.pooler(self.ln_final(x)) @ self.proj

    def packed(self, tokens: Tensor, total: int, with_tokens: bool = False) -> tuple[Tensor, Tensor | None]:
        """forward without padding: all texts one behind the other. `total` is the number of their tokens, which the
        host must know, as it cannot ask the device without waiting for it. Token embeddings (zeros behind each text)
        only if asked for."""
        N, L = tokens.shape
        C = self.corners
        length = tokens.argmax(-1) + 1
        starts = F.pad(length.cumsum(0), (1, 0))  # [N+1]
        text = torch.arange(N, device=tokens.device).repeat_interleave(length, output_size=total)  # [T], each token's text
        place = torch.arange(total, device=tokens.device) - starts[text]  # ... and its place there
        x = self.token_embedding(tokens[text, place]) + F.embedding(place, self.positional_embedding)
        if C:
            x = torch.cat([x, self.corner_embedding.repeat_interleave(N, 0)])  # [T + C·N, W]
        summary = starts[1:] - 1 if self.causal else starts[:-1]
        packing = Packing(starts.int(), summary, len(self.positional_embedding), C, self.causal)
        x = self.ln_pre(x)[None, None]
        for block in self.blocks:
            x = block(x, packing)
        x, corners = x[0, 0].split([total, C * N])
        summaries = torch.cat([x.index_select(0, summary)[None], corners.unflatten(0, (C, N))])  # [1+C, N, W]
        summaries = self.project(summaries.transpose(0, 1))  # [N, 1+C, D]
        if not with_tokens:
            return summaries, None
        words = self.project(x)
        return summaries, words.new_zeros(N, L, words.shape[1]).index_put((text, place), words)


def text_mask(end: Tensor, L: int, C: int, causal: bool, blind: bool) -> Tensor:
    """Who sees whom among L text places and C corner places: [N, L+C, L+C], True where row may look at column.

    Summary tokens are the end-of-text token (causal) or the first one, [CLS] (bidirectional), and the corners. In a
    causal encoder the corners come between the text and its end. `blind` (LoTLIP, section 3.2): no summary token sees
    another, no ordinary token sees a corner.
    """
    place = torch.arange(L + C, device=end.device)
    end, corner = end[:, None], place >= L
    if causal:
        # [N, L+C], each place's turn: text, corners, end, padding
        order = torch.where(corner, end + place - L, torch.where(place < end, place, place + C))
        mask = order[:, None, :] <= order[:, :, None]
    else:
        mask = (corner | (place <= end))[:, None, :].expand(-1, L + C, -1)  # everything but padding
    if blind:
        summary = corner | (place == (end if causal else 0))  # [N, L+C] or [L+C]
        mask = mask & ~(summary[..., :, None] & summary[..., None, :]) & ~(~summary[..., :, None] & corner)
    return mask | torch.eye(L + C, dtype=torch.bool, device=end.device)  # each sees itself, padding too: no empty row


class CLIP(nn.Module):
    # How encode_texts computes: "packed" without padding (on GPUs, see `packing_trouble`), in "buckets" of like length
    # with little of it, or "padded", which like "packed" is a single call of the text tower.
    layout = "buckets"

    def __init__(self, config: CLIPConfig):
        super().__init__()
        check(config)
        self.config = config
        self.visual, self.text = VisionTransformer(config), TextTransformer(config)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.initialize()

    def initialize(self):
        """CLIP's: N(0, σ²) with σ falling with width, and with depth where a layer writes into the residual stream."""
        nn.init.normal_(self.text.token_embedding.weight, std=0.02)
        if isinstance(self.visual.patch_embedding, nn.Sequential):
            for layer in self.visual.patch_embedding[::2]:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        for tower in (self.visual, self.text):
            width, depth = tower.proj.shape[0], len(tower.blocks)
            for block in tower.blocks:
                nn.init.normal_(block.attn.qkv.weight, std=width ** -0.5)
                nn.init.normal_(block.fc.weight, std=(2 * width) ** -0.5)
                for layer in (block.attn.out, *block.proj):
                    nn.init.normal_(layer.weight, std=width ** -0.5 * (2 * depth) ** -0.5)
                for layer in (block.attn.qkv, block.fc, block.attn.out, *block.proj):
                    nn.init.zeros_(layer.bias)

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,S,S] (normalised) -> branches [B,H,D], patches [B,P,D], unit-norm float32."""
        branches, patches = self.visual(images)
        return normalized(branches), normalized(patches)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [N,L], L up to the context -> summaries [N,1+C,D], token_embeddings [N,L,D], unit-norm float32."""
        summaries, token_embeddings = self.text(tokens)
        return normalized(summaries), normalized(token_embeddings)

    def encode_texts(self, tokens: Tensor, with_tokens: bool = False, lengths=None) -> tuple[Tensor, Tensor | None]:
        """encode_text for texts of mixed length, computed without most of the padding (`layout`).

        tokens [N,L] -> summaries [N,1+C,D], and if asked for token_embeddings [N,L,D] (behind a text's end they are
        zeros or those of padding). `lengths` [N], a NumPy array, are the texts' lengths: given, the device need not be
        asked for them. Buckets hold the texts of up to 16, 32, 64 ... tokens, cut to the longest of the bucket.
        """
        if self.layout == "padded":
            return self.encode_text(tokens)
        lengths = (tokens.argmax(-1) + 1).cpu().numpy() if lengths is None else lengths
        if self.layout == "packed":
            summaries, embeddings = self.text.packed(tokens, int(lengths.sum()), with_tokens)
            return normalized(summaries), normalized(embeddings) if with_tokens else None
        order = lengths.argsort(kind="stable")
        ascending, order = lengths[order], torch.from_numpy(order).to(tokens.device)
        edges = [2 ** i for i in range(4, (tokens.shape[1] - 1).bit_length())]
        ends = [*ascending.searchsorted(edges, "right").tolist(), len(ascending)]
        summaries, embeddings = [], []
        for start, end in zip([0, *ends], ends):
            if end > start:
                s, t = self.encode_text(tokens[order[start:end], :int(ascending[end - 1])])
                summaries.append(s)
                embeddings.append(F.pad(t, (0, 0, 0, tokens.shape[1] - t.shape[1])) if with_tokens else None)
        back = order.argsort()
        return torch.cat(summaries)[back], torch.cat(embeddings)[back] if with_tokens else None

    def forward(self, images: Tensor, tokens: Tensor, with_tokens: bool = False, lengths=None) -> dict[str, Tensor]:
        """images [B,3,S,S], tokens [B,T,L] -> every embedding a loss may want, and the multiplier s (one call a step,
        for DDP). `lengths` [B,T], a NumPy array: the texts' lengths, if the host knows them."""
        branches, patches = self.encode_image(images)
        lengths = lengths.reshape(-1) if lengths is not None else None
        summaries, embeddings = self.encode_texts(tokens.flatten(0, 1), with_tokens, lengths)
        return {
            "branches": branches,  # [B, H, D]
            "patches": patches,  # [B, P, D]
            "summaries": summaries.unflatten(0, tokens.shape[:2]),  # [B, T, 1+C, D]
            "token_embeddings": embeddings,  # [B·T, L, D] or None
            "ends": tokens.flatten(0, 1).argmax(-1),  # [B·T], place of the end-of-text token
            "logit_scale": self.logit_scale.exp(),
        }


def normalized(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


def packing_trouble(model: CLIP, device: str) -> str:
    """Embeds a few texts packed and padded on the device, in bfloat16: what keeps the model from packing, or "" if the
    embeddings and gradients agree."""
    if model.config.corner_tokens and not model.config.corner_mask:
        return "corner tokens that see one another are not packed"
    text = copy.deepcopy(model.text).to(device)
    end = model.config.vocab - 1
    place = torch.arange(model.config.context)
    length = torch.arange(1, 10)[:, None].clamp(max=len(place))
    tokens = torch.where(place < length - 1, place % end, 0)
    tokens = tokens.masked_fill(place == length - 1, end).to(device)
    results = []
    for encode in (lambda: text(tokens), lambda: text.packed(tokens, int(length.sum()))):
        try:
            with torch.autocast(device.split(":")[0], torch.bfloat16):
                summaries = normalized(encode()[0])
            weights = torch.linspace(-1, 1, summaries.numel(), device=device).view_as(summaries)
            grads = torch.autograd.grad((summaries * weights).sum(), [*text.blocks.parameters()])
        except Exception as error:  # no such kernel for this device, PyTorch or width: of many kinds
            return f"{type(error).__name__}: {error}".splitlines()[0]
        results.append([summaries.detach().flatten(), torch.cat([grad.flatten() for grad in grads])])
    far = max(float((packed - padded).norm() / padded.norm()) for padded, packed in zip(*results))
    return "" if far < 0.1 else f"packed and padded texts differ by {far:.2g} of their norm"


CHOICES = dict(stem=("patch", "conv"), pool=("class", "average"), branch_type=("class", "mlp"),
               text_attention=("causal", "bidirectional"), activation=tuple(ACTIVATIONS), vision_style=("clip", "timm"),
               text_style=("clip", "bert"))


def check(c: CLIPConfig):
    """Raises UserError with one sentence where settings cannot go together."""
    for name, value in vars(c).items():
        least = {"corner_tokens": 0, "branch_layers": 0, "context": 2}.get(name, 1)  # a text has its two ends
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if value not in CHOICES.get(name, (value,)):
            raise UserError(f"no {name} {value!r}: choose from {', '.join(CHOICES[name])}")
    if c.image_size % c.patch:
        raise UserError(f"image size {c.image_size} is not a multiple of the patch size {c.patch}: choose another "
                        "--image-size")
    if c.stem == "conv" and c.patch & (c.patch - 1):
        raise UserError("the convolutional stem halves the resolution, so the patch size must be a power of two, not "
                        f"{c.patch}: use --stem patch")
    if c.pool == "average" and c.branch_type == "class" and c.branches > 1:
        raise UserError(f"{c.branches} class-token branches would all have the same average of the patches: use "
                        "--pool class or --branch-type mlp")
    for tower, width, heads in (("vision", c.vision_width, c.vision_heads), ("text", c.text_width, c.text_heads)):
        if width % heads:
            raise UserError(f"the {tower} width {width} does not divide into {heads} heads: change --{tower}-width or "
                            f"--{tower}-heads")
    if c.branches > 1 and c.branch_type == "mlp" and c.branch_layers == 0:
        raise UserError("parallel MLPs need layers to stand in: --branch-layers must be at least 1")
    if c.text_style == "bert" and c.text_attention == "causal":
        raise UserError("BERT's text encoder sees both ways: add --text-attention bidirectional")


def config_from(settings) -> CLIPConfig:
    """The model's part of a larger settings object."""
    return CLIPConfig(**{f.name: getattr(settings, f.name) for f in fields(CLIPConfig)})


# ---- other people's checkpoints --------------------------------------------------------------------------------------

# Our names beside theirs: the parts of a tensor's name that differ. What is not listed is called the same.
OPEN_CLIP = ((".blocks.", ".transformer.resblocks."), (".attn.qkv.", ".attn.in_proj_"),
             (".attn.out.", ".attn.out_proj."), (".fc.", ".mlp.c_fc."), (".proj.0.", ".mlp.c_proj."),
             ("visual.patch_embedding", "visual.conv1"), ("text.proj", "text.text_projection"))
TIMM = (("visual.", "visual.trunk."), (".attn.out.", ".attn.proj."), (".ln_1.", ".norm1."), (".ln_2.", ".norm2."),
        (".fc.", ".mlp.fc1."), (".proj.0.", ".mlp.fc2."), (".ln_post.", ".norm."),
        (".patch_embedding.", ".patch_embed.proj."), (".class_embedding", ".cls_token"),
        (".positional_embedding", ".pos_embed"))
BERT = ((".blocks.", ".transformer.encoder.layer."), (".attn.out.", ".attention.output.dense."),
        (".ln_1.", ".attention.output.LayerNorm."), (".attn.", ".attention.self."), (".fc.", ".intermediate.dense."),
        (".proj.0.", ".output.dense."), (".ln_2.", ".output.LayerNorm."), (".pooler.0.", ".transformer.pooler.dense."),
        (".ln_pre.", ".transformer.embeddings.LayerNorm."))
NOT_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size",
               "text.transformer.embeddings.position_ids")
HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}  # ViT-H, g and bigG; 64 elsewhere


def from_state_dict(state: dict[str, Tensor], **overrides) -> CLIP:
    """A CLIP with the weights of a released state dict: open_clip's or OpenAI's ViTs, DreamLIP's (open_clip's layout),
    Holistic CLIP's (several class tokens, or parallel MLPs) or LoTLIP's (timm ViT and BERT).

    Sizes are read off the shapes; `overrides` are CLIPConfig's fields that shapes do not tell, above all
    activation="quickgelu" (OpenAI's weights and those trained on from them) and the numbers of heads. Raises UserError
    if it is none of these layouts.
    """
    state = {name.removeprefix("module."): value.float() for name, value in state.items()}
    openai = "input_resolution" in state  # OpenAI's files say it in numbers beside the weights
    state = {name: value for name, value in state.items() if name not in NOT_WEIGHTS}
    try:
        if "visual.conv1.weight" in state:
            settings, state = read_open_clip(state)
        elif "visual.trunk.cls_token" in state:
            settings, state = read_lotlip(state, overrides.get("corner_tokens", 2), overrides.get("context"))
        else:
            raise UserError("not the state dict of an open_clip ViT with its own text transformer, nor LoTLIP's")
        patch = state["visual.patch_embedding.weight"].shape[-1]
        vision_width = len(state["visual.ln_post.weight"])
        text_width, embed = state["text.proj"].shape
    except KeyError as error:
        raise UserError(f"{error} is missing: half a checkpoint, or another architecture") from None
    settings |= dict(
        image_size=patch * round((len(state["visual.positional_embedding"]) - 1) ** 0.5), patch=patch,
        vision_width=vision_width, vision_depth=count_of(state, r"visual\.blocks\.(\d+)\."),
        vision_heads=vision_width // HEAD_WIDTH.get(vision_width, 64) or 1, text_width=text_width,
        text_depth=count_of(state, r"text\.blocks\.(\d+)\."), text_heads=text_width // 64 or 1,
        context=len(state["text.positional_embedding"]), vocab=len(state["text.token_embedding.weight"]), embed=embed,
        activation="quickgelu" if openai else "gelu")
    model = CLIP(CLIPConfig(**(settings | overrides)))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # it lists all tensors that are missing, unknown or of another shape
        first = str(error).splitlines()[1].strip()[:200]
        raise UserError(f"half a checkpoint, or another architecture: {first}") from None
    return model


def count_of(state, pattern) -> int:
    return 1 + max((int(found[1]) for found in map(re.compile(pattern).match, state) if found), default=-1)


def read_open_clip(state):
    """State dict in open_clip's names -> settings, state dict in ours."""
    ours = {}
    for name, value in state.items():
        if name != "logit_scale":
            name = name if name.startswith("visual.") else "text." + name.removeprefix("text.")
            for mine, theirs in OPEN_CLIP:
                name = name.replace(theirs, mine)
        ours[re.sub(r"\.c_proj\.(\d+)\.", r".proj.\1.", name)] = value  # Holistic CLIP's parallel MLPs
    tokens = ours["visual.class_embedding"].view(-1, len(ours["visual.ln_post.weight"]))
    ours["visual.class_embedding"] = tokens
    if len(tokens) > 1:  # Holistic CLIP's class tokens have a position each; ours share row 0
        positions = ours["visual.positional_embedding"]
        ours["visual.class_embedding"] = tokens + positions[:len(tokens)]
        ours["visual.positional_embedding"] = torch.cat([0 * positions[:1], positions[len(tokens):]])
    forked = [name for name in ours if re.match(r"visual\.blocks\.\d+\.proj\.1\.weight", name)]
    if not forked:
        return dict(branches=len(tokens), branch_mask=len(tokens) == 1), ours
    return dict(branches=count_of(ours, r"visual\.blocks\.\d+\.proj\.(\d+)\."), branch_type="mlp",
                branch_layers=len(forked)), ours


def read_lotlip(state, corners: int, context: int | None):
    """State dict of LoTLIP's release -> settings, state dict in our names.

    timm's ViT has a bias on its patches and no projection: the bias joins the positions, the projection is an identity.
    BERT reads [CLS], the corners, the text, all of token type 0: type and position join the corners and our positions.
    Ours knows a text's end by the greatest id, so the vocabulary gets [SEP], row 102, once more, as its last row
    (evaluate.py's tokenizer ends so).
    """
    ours = {"logit_scale": state["logit_scale"]}
    for name, value in state.items():
        for mine, theirs in TIMM if name.startswith("visual.") else BERT if name.startswith("text.") else ():
            name = name.replace(theirs, mine)
        ours[name] = value
    take, pre = ours.pop, "text.transformer.embeddings."
    words, positions = take(pre + "word_embeddings.weight"), take(pre + "position_embeddings.weight")
    positions = positions + take(pre + "token_type_embeddings.weight")[:1]
    end = corners + (context or 128 - corners)  # the release reads 128 tokens, corners among them
    ours["text.token_embedding.weight"] = torch.cat([words[:len(words) - corners], words[102:103]])
    ours["text.positional_embedding"] = torch.cat([positions[:1], positions[1 + corners:end]])
    if corners:
        ours["text.corner_embedding"] = words[len(words) - corners:] + positions[1:1 + corners]
    for block in range(count_of(ours, r"text\.blocks\.(\d+)\.")):
        for what in ("weight", "bias"):
            parts = [take(f"text.blocks.{block}.attn.{part}.{what}") for part in ("query", "key", "value")]
            ours[f"text.blocks.{block}.attn.qkv.{what}"] = torch.cat(parts)
    ours["text.proj"] = take("text.proj.weight").mT
    ours["visual.proj"] = torch.eye(len(ours["visual.ln_post.weight"]))
    ours["visual.class_embedding"] = ours["visual.class_embedding"][0]
    first, grid = ours["visual.positional_embedding"][0].tensor_split([1])
    ours["visual.positional_embedding"] = torch.cat([first, grid + take("visual.patch_embedding.bias")])
    return dict(vision_style="timm", text_style="bert", text_attention="bidirectional", corner_tokens=corners), ours


def to_open_clip(model: CLIP) -> tuple[dict[str, Tensor], dict]:
    """State dict in open_clip's names and open_clip's model config, for a model with one branch and no corner tokens
    (else UserError). The average of the patches is open_clip's pool_type "avg"."""
    c = model.config
    if (c.stem, c.vision_style, c.branches, c.corner_tokens, c.text_attention) != ("patch", "clip", 1, 0, "causal"):
        raise UserError("open_clip's CLIP has linear patches (--stem patch), one branch, no corner tokens and causal "
                        "text: this model has no place there")
    state = {}
    for name, value in model.state_dict().items():
        for mine, theirs in OPEN_CLIP:
            name = name.replace(mine, theirs)
        state[name.removeprefix("text.")] = value.detach().clone()
    state["visual.class_embedding"] = state["visual.class_embedding"][0]
    config = dict(
        embed_dim=c.embed, quick_gelu=c.activation == "quickgelu",
        vision_cfg=dict(image_size=c.image_size, patch_size=c.patch, width=c.vision_width, layers=c.vision_depth,
                        head_width=c.vision_width // c.vision_heads, pool_type="avg" if c.pool == "average" else "tok"),
        text_cfg=dict(context_length=c.context, vocab_size=c.vocab, width=c.text_width, layers=c.text_depth,
                      heads=c.text_heads))
    return state, config


def export_open_clip(model: CLIP, file: Path):
    """Writes the weights in open_clip's names, and open_clip's config of the model beside them, as .json."""
    state, config = to_open_clip(model)
    torch.save(state, file)
    file.with_suffix(".json").write_text(json.dumps(config, indent=1))


def resized(model: CLIP, image_size: int) -> CLIP:
    """The model for images of another size: the grid of position embeddings is interpolated (bicubic, antialiased: as
    in open_clip). Raises UserError if the size is no multiple of the patch."""
    c = model.config
    if image_size == c.image_size:
        return model
    other = CLIP(replace(c, image_size=image_size))
    state = model.state_dict()
    first, grid = state["visual.positional_embedding"].tensor_split([1])
    side, new_side = c.image_size // c.patch, image_size // c.patch
    grid = grid.view(1, side, side, -1).permute(0, 3, 1, 2)  # [1, W, side, side]
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", antialias=True)
    state["visual.positional_embedding"] = torch.cat([first, grid[0].flatten(1).mT])
    other.load_state_dict(state)
    return other.train(model.training)


# ---- files of weights ------------------------------------------------------------------------------------------------

def checkpoints(folder: Path) -> list[Path]:
    """checkpoint.pt, the newest, and checkpoint-1.pt, the one before, as far as they exist."""
    return [path for path in (folder / "checkpoint.pt", folder / "checkpoint-1.pt") if path.is_file()]


def write_whole(path: Path, content: dict, keep: int = 1) -> bool:
    """torch.save that leaves either the old file or the whole new one, whatever happens in between, even to the power;
    with keep=2 the file before it stays as NAME-1. Where the disk fails: says so in a line and returns False."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if keep > 1 and path.exists():
            os.replace(path, path.with_stem(f"{path.stem}-1"))
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # a rename lasts once its folder is on the disk
        os.fsync(folder)
        os.close(folder)
        return True
    except (OSError, RuntimeError) as error:  # torch.save turns the former into the latter
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        with suppress(OSError):
            temporary.unlink()
        print(f"{path} could not be written ({cause}); older ones are as they were, and it is tried again", flush=True)
        return False


def read_checkpoint(path: Path) -> dict:
    """What a file of weights holds: a state dict, or of our own runs "settings", "model" and more. A pickle that could
    run code is refused. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load itself compares no checksums
                if archive.testzip():
                    raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError(f"to read {path}: pip install safetensors") from None
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: name a run's folder or a file of weights") from None
    except Exception as error:  # torch.load raises many kinds on a damaged or foreign file
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript archive, as OpenAI's downloads are: if you trust it, save its "
                            "torch.jit.load(FILE).state_dict() with torch.save and name that file") from None
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper():
            raise UserError(f"{path} is refused: it is not only tensors, and reading such a pickle can run any code; "
                            "take a file that torch.load(..., weights_only=True) reads") from None
        raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__}): take another one") from None
    if isinstance(content, dict):
        content = content.get("state_dict", content)
        if {"settings", "model"} <= content.keys() or content and all(isinstance(value, Tensor) for value in content.values()):
            return content
    raise UserError(f"{path} holds no state dict: name a run's folder, its checkpoint.pt, or a released checkpoint")


def load_checkpoint(path: Path) -> dict:
    """A checkpoint written by train.py. Raises UserError if it is missing, cut off or something else."""
    content = read_checkpoint(path)
    if "settings" not in content:
        raise UserError(f"{path} is not a checkpoint of train.py: name a run's folder")
    return content


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in the folder that is whole; None if there is none. Raises UserError if all are damaged."""
    found = checkpoints(folder)
    for i, path in enumerate(found):
        try:
            load_checkpoint(path)
        except UserError as error:
            if path == found[-1]:
                raise
            print(f"{error}; the checkpoint before it is used", flush=True)
        else:
            for damaged in found[:i]:  # out of the way, or it would outlive a whole one
                damaged.replace(folder / "damaged.pt")
            return path
    return None


def load_model(path: Path, activation: str | None = None) -> tuple[CLIP, dict]:
    """A run's folder, its checkpoint.pt or best.pt, or somebody else's file -> model, settings (a run's own, else those
    of the shapes). Raises UserError."""
    if path.is_dir():
        path = (checkpoints(path) or [path / "checkpoint.pt"])[0]
    content = read_checkpoint(path)
    if "settings" in content:
        return load_run(path, content), content["settings"]
    try:
        clip = load_released(path, content, activation)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tokenizer = str(path.with_name("vocab.txt")) if clip.config.text_style == "bert" else "clip"
    return clip, asdict(clip.config) | dict(method=path.stem, tokenizer=tokenizer, kinds=24)


def load_run(path: Path, content: dict) -> CLIP:
    """The model of a checkpoint of train.py."""
    known = CLIPConfig.__dataclass_fields__
    config = CLIPConfig(**{name: value for name, value in content["settings"].items() if name in known})
    clip = CLIP(config)
    try:
        clip.load_state_dict(content["model"])
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path}: weights and settings do not fit ({str(error).splitlines()[0]})") from None
    with torch.no_grad():
        for p, average in zip(clip.parameters(), content.get("average") or []):  # older runs could keep an average
            p.copy_(average)
    return clip


def load_released(path: Path, state: dict, activation: str | None) -> CLIP:
    """The model of somebody else's checkpoint. What its shapes do not tell stands in open_clip's JSON beside it, if at
    all: the file's own name with .json, or open_clip_config.json."""
    told, why = {}, "by its weights and what is usual; OpenAI's, MetaCLIP's and DFN's want --activation quickgelu"
    for beside in (path.with_name("open_clip_config.json"), path.with_suffix(".json")):
        if beside.is_file():
            told, why = told_by_json(read_json(beside)), f"by {beside.name}"
    if activation:
        told["activation"] = activation
        why = "by --activation"
    clip = from_state_dict(state, **told)
    print(f"{path.name}: activation {clip.config.activation} ({why})")
    return clip


def told_by_json(config: dict) -> dict:
    """Fields of CLIPConfig that open_clip's JSON tells."""
    mean = config.get("preprocess_cfg", {}).get("mean", MEAN)
    if not np.allclose(mean, MEAN, atol=1e-3):
        raise UserError("this model normalises pictures by other numbers than CLIP's")
    config = config.get("model_cfg", config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    told = dict(activation="quickgelu" if config.get("quick_gelu") else "gelu",
                pool="average" if vision.get("pool_type") == "avg" else "class")
    if "width" in vision and "width" in text:
        told |= dict(vision_heads=vision["width"] // vision.get("head_width", 64), text_heads=text["heads"])
    return told


def check_device(device: str):
    """Raises UserError if the device is none that PyTorch has here."""
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"no --device {device!r}: take cpu, cuda or mps")
    if kind == "cuda" and not torch.cuda.is_available() or kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {device}: PyTorch sees none here; leave --device away or use cpu")


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
