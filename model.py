"""The model: an image tower and a text tower from scratch, with the parts that the papers add.

    CLIP (2103.00020)    pre-LN ViT with a class token, causal text transformer read at the end-of-text token
    corner tokens        more summary tokens of a text, blind to one another: `text_mask` (LoTLIP, 2410.05249, 3.2)
    branches             H mutually blind class tokens (`class_token_mask`), or H parallel MLPs in the last layers
                         (`Block`; Holistic CLIP, 2412.00440, 3.2)
    patch embeddings     the final patch tokens through the class token's LayerNorm and projection (DreamLIP, SPARC)

With --stem patch, --pool class, one branch and no corner tokens it is CLIP, weight for weight. Behind the model come
checkpoints, ours and released ones. Attention masks are boolean, True where a query may look at a key.

First reading: skip `Packing`, `best_fit`, `pack` and everything about `places`; think of one text a row.
"""

import os
import re
import zipfile
from bisect import bisect_left, insort
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import UserError, read_json, write_json


@dataclass
class CLIPConfig:
    # the model
    image_size: int = 224  # side of the square image, in pixels
    patch: int = 16  # side of a patch, in pixels
    vision_width: int = 768  # width W of the image tower
    vision_depth: int = 12  # its layers
    vision_heads: int = 12  # its attention heads
    text_width: int = 512  # width of the text tower
    text_depth: int = 12  # its layers
    text_heads: int = 8  # its attention heads
    context: int = 77  # longest text in tokens, start and end token counted
    vocab: int = 49408  # tokens in the vocabulary (training takes the tokenizer's)
    embed: int = 512  # width D of the shared embedding space
    stem: str = "patch"  # a linear layer a "patch" (ViT), or "conv", 3x3 convolutions of stride 2 (2106.14881)
    vision_style: str = "clip"  # or "timm", LoTLIP's: no LayerNorm before the first block
    activation: str = "gelu"  # or "quickgelu", for OpenAI's weights
    pool: str = "class"  # image embedding: the "class" token's (papers) or the patches' "average" (small sizes)
    branches: int = 1  # H image embeddings (Holistic CLIP)
    branch_type: str = "class"  # H "class" tokens, or H parallel "mlp"s in the last `branch_layers` layers
    branch_layers: int = 3  # layers with parallel mlps
    branch_mask: bool = True  # False: class tokens see one another, with 1 added to the logit (Holistic CLIP's code)
    text_style: str = "clip"  # or "bert", LoTLIP's: LayerNorm after each sum and on the input, a pooling layer
    text_attention: str = "causal"  # CLIP's, or "bidirectional" with the first token as [CLS] (LoTLIP's)
    corner_tokens: int = 0  # C (LoTLIP)
    corner_mask: bool = True  # False: summary tokens see one another, causal ones the earlier (LoTLIP's ablation)


ACTIVATIONS = {"gelu": F.gelu, "quickgelu": lambda x: x * torch.sigmoid(1.702 * x)}
NORM_EPS = {"clip": 1e-5, "timm": 1e-6, "bert": 1e-12}  # eps of the LayerNorms of each style
CHOICES = dict(
    stem=("patch", "conv"), vision_style=("clip", "timm"), activation=tuple(ACTIVATIONS), pool=("class", "average"),
    branch_type=("class", "mlp"), text_style=("clip", "bert"), text_attention=("causal", "bidirectional"))


def check_config(c: CLIPConfig):
    """Raises UserError, one sentence, where settings cannot go together."""
    if c.image_size % c.patch:
        raise UserError(f"image size {c.image_size} is not a multiple of the patch size {c.patch}: choose another "
                        "--image-size")
    if c.stem == "conv" and (c.patch < 2 or c.patch & (c.patch - 1)):
        raise UserError(f"convolutions of stride 2 make no patches of {c.patch} pixels: use --stem patch")
    if c.pool == "average" and c.branch_type == "class" and c.branches > 1:
        raise UserError("class-token branches would all have the same average of the patches: use --pool class or "
                        "--branch-type mlp")
    for tower, width, heads in (("vision", c.vision_width, c.vision_heads), ("text", c.text_width, c.text_heads)):
        if width % heads:
            raise UserError(f"{tower} width {width} does not divide into {heads} heads: change --{tower}-heads")
    if c.text_style == "bert" and c.text_attention == "causal":
        raise UserError("BERT's text encoder sees both ways: add --text-attention bidirectional")


# ---- attention and blocks --------------------------------------------------------------------------------------------

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None, places=None):
        """x [B,N,W] -> [B,N,W]; with places [B,K] only these are queries -> [B,K,W]. The mask is boolean, or floats
        that are added to the logits."""
        # each [B, heads, N, W/heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if places is not None:
            places = places[:, None, :, None]  # [B, 1, K, 1]
            q = q.take_along_dim(places, 2)
            mask = mask.take_along_dim(places, 2)
        if q.is_cpu and q.dtype == torch.bfloat16:  # where attention is several times slower than in float32
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):
            x = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-LN transformer block whose MLP may end in H parallel layers, one a branch (Holistic CLIP's MLPs).

    x [S,B,N,W] -> [H,B,N,W]: one stream (S = 1) until the first branching block, then H; without branches S = H = 1.
    With places [B,K], x [1,B,N,W] -> [1,B,K,W]: only these places are queries, all places are keys and values.
    """

    def __init__(self, width, heads, activation, branches, eps):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.fc = nn.Linear(width, 4 * width)
        self.act = ACTIVATIONS[activation]
        self.proj = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(branches))

    def attend(self, x, seen, mask, places):
        """x + attention(seen); `seen` is ln_1(x) in a pre-LN block, x itself in BERT's."""
        if places is not None:
            x = x.take_along_dim(places[None, ..., None], 2)
        return x + self.attn(seen.flatten(0, 1), mask, places).view_as(x)

    def forward(self, x, mask=None, places=None):
        x = self.attend(x, self.ln_1(x), mask, places)
        hidden = self.act(self.fc(self.ln_2(x)))
        if len(self.proj) == 1:
            return x + self.proj[0](hidden)
        if len(x) == 1:  # the first branching block splits the stream
            x = [x[0]] * len(self.proj)
            hidden = [hidden[0]] * len(self.proj)
        streams = [stream + proj(inner) for stream, proj, inner in zip(x, self.proj, hidden)]
        return torch.stack(streams)


class PostNormBlock(Block):
    """BERT's block (1810.04805): a LayerNorm after each sum instead of before each layer. x [1,B,N,W] -> the same."""

    def forward(self, x, mask=None, places=None):
        x = self.ln_1(self.attend(x, x, mask, places))
        return self.ln_2(x + self.proj[0](self.act(self.fc(x))))


class Blocks(nn.ModuleList):
    """A tower's blocks, the last `branch_layers` of them with parallel MLPs."""

    def __init__(self, width, depth, heads, activation, style, branches=1, branch_layers=0):
        super().__init__()
        kind = PostNormBlock if style == "bert" else Block
        for i in range(depth):
            forks = branches if i >= depth - branch_layers else 1
            self.append(kind(width, heads, activation, forks, NORM_EPS[style]))

    def forward(self, x, mask=None, places=None):
        """x [B,N,W] -> [H,B,N,W]; with places [B,K] and a mask [B,1,N,N] the last block computes these places alone
        -> [1,B,K,W]. Under autocast x is cast to its dtype, as in open_clip's image tower: sums and norms move half as
        many bytes."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        x = x[None]
        *first, last = self
        for block in first:
            x = block(x, mask)
        return last(x, mask, places)


def normalized(x):
    return F.normalize(x.float(), dim=-1)


# ---- image tower -----------------------------------------------------------------------------------------------------

class VisionTransformer(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        W, eps = c.vision_width, NORM_EPS[c.vision_style]
        scale = W ** -0.5
        P = (c.image_size // c.patch) ** 2
        # H branches come from as many class tokens, or from the forks of one.
        tokens, forks = (c.branches, 1) if c.branch_type == "class" else (1, c.branches)
        self.pool = c.pool
        if c.stem == "conv":
            self.patch_embedding = conv_stem(W, c.patch)
        else:
            self.patch_embedding = nn.Conv2d(3, W, c.patch, c.patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(tokens, W))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + P, W))  # row 0: all class tokens
        self.ln_pre = nn.LayerNorm(W, eps) if c.vision_style == "clip" else nn.Identity()
        self.blocks = Blocks(W, c.vision_depth, c.vision_heads, c.activation, c.vision_style, forks, c.branch_layers)
        self.ln_post = nn.LayerNorm(W, eps)
        self.proj = nn.Parameter(scale * torch.randn(W, c.embed))
        mask = class_token_mask(tokens, P, c.branch_mask) if tokens > 1 else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images):
        """images [B,3,S,S] (normalised) -> branches [B,H,D], patches [B,P,D], unit-norm float32."""
        x = self.patch_embedding(images).flatten(2).mT  # [B, P, W]
        x = x + self.positional_embedding[1:].to(x)
        classes = (self.class_embedding + self.positional_embedding[:1]).to(x)
        x = torch.cat([classes.expand(len(x), -1, -1), x], 1)  # [B, C+P, W], C class tokens
        x = self.blocks(self.ln_pre(x), self.mask)  # [1 or H, B, C+P, W]
        x = self.ln_post(x) @ self.proj  # [1 or H, B, C+P, D]
        summary, patches = x.tensor_split([len(self.class_embedding)], 2)
        if self.pool == "average":
            summary = patches.mean(2, keepdim=True)
        # Either H streams of one summary token or one stream of H; the patches are the streams' mean.
        return normalized(summary.transpose(0, 1).flatten(1, 2)), normalized(patches.mean(0))


def conv_stem(width: int, patch: int) -> nn.Sequential:
    """3x3 convolutions of stride 2, one for each halving of the resolution. Each doubles the channels; the last gives
    the width. Small models learn shapes from them in a fraction of the images that linear patches need (2106.14881)."""
    layers, channels = [], 3
    halvings = patch.bit_length() - 1
    for remaining in reversed(range(halvings)):
        wider = max(8, width * 3 // 4 // 2 ** remaining) if remaining else width
        layers += [nn.Conv2d(channels, wider, 3, 2, 1), nn.ReLU()]
        channels = wider
    return nn.Sequential(*layers[:-1])


def class_token_mask(tokens: int, patches: int, blind: bool) -> Tensor:
    """A class token attends to itself and the patches, not to other class tokens; a patch to everything -> bool,
    [query, key] with the class tokens first.

    Holistic CLIP's code converts this mask to float before PyTorch uses it, so 1 is added to those logits instead of
    -inf, and its released weights were trained like that (`blind=False`: the float mask).
    """
    mask = torch.ones(tokens + patches, tokens + patches, dtype=torch.bool)
    mask[:tokens, :tokens] = torch.eye(tokens, dtype=torch.bool)
    return mask if blind else (~mask).float()


# ---- text tower ------------------------------------------------------------------------------------------------------

class TextTransformer(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        W, eps = c.text_width, NORM_EPS[c.text_style]
        bert = c.text_style == "bert"
        self.causal = c.text_attention == "causal"
        self.corners = c.corner_tokens
        self.corner_mask = c.corner_mask
        self.token_embedding = nn.Embedding(c.vocab, W)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.context, W))
        self.corner_embedding = nn.Parameter(0.02 * torch.randn(c.corner_tokens, W)) if c.corner_tokens else None
        self.ln_pre = nn.LayerNorm(W, eps) if bert else nn.Identity()
        self.blocks = Blocks(W, c.text_depth, c.text_heads, c.activation, c.text_style)
        self.ln_final = nn.Identity() if bert else nn.LayerNorm(W, eps)
        self.pooler = nn.Sequential(nn.Linear(W, W), nn.Tanh()) if bert else nn.Identity()
        self.proj = nn.Parameter(W ** -0.5 * torch.randn(W, c.embed))

    def forward(self, tokens, lengths=None, with_tokens=True):
        """tokens [N,L], L up to the context -> summaries [N,1+C,D] (end-of-text or [CLS], then the corners), token
        embeddings [N,L,D] (undefined behind a text's end), unit-norm float32. Without `with_tokens` the last block
        computes the summaries alone, and the token embeddings are None.

        Sequence packing: `pack` puts several texts into one row and the mask keeps them apart, so there is little
        padding. `lengths` [N] (NumPy): the texts' lengths; passing them avoids a wait for the device.
        """
        end = tokens.argmax(-1)  # the end-of-text token has the greatest id
        if lengths is None:
            lengths = end.cpu().numpy() + 1
        rows = pack(lengths.reshape(-1), self.corners, self.causal, tokens.device)
        end = end[rows.text]  # [B, R]
        mask = text_mask(rows, end, self.corners, self.causal, self.corner_mask)[:, None]
        x = self.ln_pre(self.embed_tokens(tokens, rows, end))  # [B, R, W]
        x = self.blocks(x, mask, None if with_tokens else rows.summaries)[0]  # [B, R or K, W]
        x = self.pooler(self.ln_final(x)) @ self.proj
        token_embeddings = None
        if with_tokens:
            places = rows.start[:, None] + torch.arange(tokens.shape[1], device=x.device)
            token_embeddings = normalized(F.embedding(places.clamp(max=end.numel() - 1), x.flatten(0, 1)))
            x = x.take_along_dim(rows.summaries[..., None], 1)  # [B, K, D]
        return normalized(F.embedding(rows.summary_index, x.flatten(0, 1))), token_embeddings

    def embed_tokens(self, tokens, rows, end):
        """tokens [N,L], end [B,R] -> [B,R,W]: the embedding of each place's token or corner, plus its position's."""
        x = self.token_embedding(tokens[rows.text, rows.place.clamp(max=tokens.shape[1] - 1)])
        if not self.corners:
            return x + F.embedding(rows.place, self.positional_embedding)
        corner = rows.place > end
        context = len(self.positional_embedding)
        own = torch.where(corner, context + rows.place - end - 1, rows.place)
        embeddings = torch.cat([self.positional_embedding, self.corner_embedding])
        return x.masked_fill(corner[..., None], 0) + F.embedding(own, embeddings)


ROW = 64  # places in a row of texts, unless one text is longer


class Packing(NamedTuple):
    """Where N texts, each followed by its C corners, lie in B rows of R places."""

    text: Tensor  # [B,R], the text that a place belongs to; -1: none, and no text attends to it
    place: Tensor  # [B,R], the place within that text, from 0 on; behind its end come the corners
    start: Tensor  # [N], a text's first place among all B·R
    summaries: Tensor  # [B,K], the places of a row's summary tokens, padded with 0
    summary_index: Tensor  # [N,1+C], a text's summary tokens among these B·K


def best_fit(sizes: list[int], R: int):
    """Best-fit-decreasing bin packing of texts of these sizes into rows of R places -> row, first, nth [N]: each text's
    row, its first place there, its number there; and how many texts are in each row."""
    result = [None] * len(sizes)
    rooms = []  # (places left, row), sorted
    counts = []
    for text in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[text]
        i = bisect_left(rooms, (size, 0))
        if i < len(rooms):
            room, row = rooms.pop(i)
        else:
            room, row = R, len(counts)
            counts.append(0)
        result[text] = row, R - room, counts[row]
        counts[row] += 1
        insort(rooms, (room - size, row))
    row, first, nth = np.array(result).T
    return row, first, nth, counts


def pack(lengths: np.ndarray, C: int, causal: bool, device: torch.device) -> Packing:
    """Lays texts of these lengths [N], each with C corners, into rows."""
    sizes = lengths + C
    longest = max(ROW, sizes.max())
    R = -(-longest // 8) * 8  # a GPU's attention wants a mask of a multiple of 8
    row, first, nth, counts = best_fit(sizes.tolist(), R)

    text = np.full((len(counts), R), -1)
    for number, size in enumerate(sizes):
        text[row[number], first[number]:first[number] + size] = number
    place = np.where(text < 0, 0, np.arange(R) - first[text])

    # A text's summary tokens: the last before the corners (causal) or the first, and the corners.
    tokens = lengths[:, None] - 1 + np.arange(1 + C)
    if not causal:
        tokens[:, 0] = 0
    K = max(counts) * (1 + C)
    summary_index = (row * K + nth * (1 + C))[:, None] + np.arange(1 + C)
    summaries = np.zeros(len(counts) * K, int)
    summaries[summary_index] = first[:, None] + tokens

    arrays = text, place, row * R + first, summaries.reshape(-1, K), summary_index
    tensors = map(torch.from_numpy, arrays)
    if device.type == "cuda":
        tensors = map(Tensor.pin_memory, tensors)  # so that the host does not wait for the copies
    return Packing(*[tensor.to(device, non_blocking=device.type == "cuda") for tensor in tensors])


def text_mask(rows: Packing, end: Tensor, C: int, causal: bool, blind: bool) -> Tensor:
    """Which place attends to which: packed texts, end [B,R] the end of each place's text -> bool [B,R,R], [query, key].

    `pack` stores a text as: tokens, end token, corners. The causal mask orders them differently: tokens, corners, end
    token; a place attends to itself and to earlier places of its own text. Summary tokens are the end token (causal) or
    the first token, [CLS] (bidirectional), and the corners. `blind` (LoTLIP, section 3.2): no summary token attends to
    another one, and no ordinary token attends to a corner.
    """
    text, place = rows.text, rows.place
    corner = place > end
    mask = text[:, None, :] == text[:, :, None]
    if causal:
        # The causal order: the text's tokens, then its corners, then its end token.
        order = torch.where(corner, place - 1, torch.where(place == end, place + C, place))
        mask = mask & (order[:, None, :] <= order[:, :, None])
    if blind:
        summary = corner | (place == (end if causal else 0))
        query, key = summary[:, :, None], summary[:, None, :]
        mask = mask & ~(query & key) & (query | ~corner[:, None, :])
    return mask | torch.eye(text.shape[1], dtype=torch.bool, device=text.device)  # itself always: no empty row


# ---- CLIP ------------------------------------------------------------------------------------------------------------

class CLIP(nn.Module):
    def __init__(self, config: CLIPConfig):
        """With random weights. Raises UserError if the settings do not go together."""
        super().__init__()
        check_config(config)
        self.config = config
        self.visual = VisionTransformer(config)
        self.text = TextTransformer(config)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.initialize()

    def initialize(self):
        """CLIP's of its text blocks, for both towers: N(0, σ²), σ falling with width, and with depth where a layer
        writes into the residual stream; biases 0."""
        def draw(layer, std):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

        nn.init.normal_(self.text.token_embedding.weight, std=0.02)
        conv = self.config.stem == "conv"
        if conv:
            for layer in self.visual.patch_embedding[::2]:  # the convolutions; ReLUs stand between them
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        for tower in (self.visual, self.text):
            width, depth = len(tower.proj), len(tower.blocks)
            for block in tower.blocks:
                draw(block.attn.qkv, width ** -0.5)
                draw(block.fc, (2 * width) ** -0.5)
                # Two layers of a block write into the residual stream. With --stem conv they begin at 0 in both towers,
                # so every block is the identity at first. Parallel MLPs begin at random: branches that are equal would
                # tie, and free matching would send every text to the first.
                std = width ** -0.5 * (2 * depth) ** -0.5
                draw(block.attn.out, 0 if conv else std)
                for layer in block.proj:
                    draw(layer, 0 if conv and len(block.proj) == 1 else std)

    def encode_image(self, images):
        """images [B,3,S,S] (normalised) -> branches [B,H,D], patches [B,P,D], unit-norm float32."""
        return self.visual(images)

    def encode_text(self, tokens, lengths=None, with_tokens=True):
        """tokens [N,L] -> summaries [N,1+C,D], token_embeddings [N,L,D] or None: see TextTransformer.forward."""
        return self.text(tokens, lengths, with_tokens)

    def forward(self, images, tokens, with_tokens=False, lengths=None):
        """images [B,3,S,S], tokens [B,T,L] -> every embedding that a loss may need, and the multiplier s; one call, as
        DDP wants it. `lengths` [B,T] (NumPy): see TextTransformer.forward."""
        branches, patches = self.encode_image(images)
        texts = tokens.flatten(0, 1)  # [B·T, L]
        summaries, embeddings = self.encode_text(texts, lengths, with_tokens)
        return {
            "branches": branches,  # [B, H, D]
            "patches": patches,  # [B, P, D]
            "summaries": summaries.unflatten(0, tokens.shape[:2]),  # [B, T, 1+C, D]
            "token_embeddings": embeddings,  # [B·T, L, D] or None
            "ends": texts.argmax(-1),  # [B·T], place of the end-of-text token
            "logit_scale": self.logit_scale.exp(),
        }


# ---- checkpoints: ours -----------------------------------------------------------------------------------------------

def checkpoints(folder: Path) -> list[Path]:
    """checkpoint.pt, the newest, and checkpoint-1.pt, the one before, as far as they exist."""
    return [path for path in (folder / "checkpoint.pt", folder / "checkpoint-1.pt") if path.is_file()]


def save_atomically(path: Path, content: dict, keep: int) -> bool:
    """torch.save that leaves either the old file or the whole new one, even if the power fails in between; with keep=2
    the old file stays as NAME-1. If the disk fails, prints so and returns False."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if keep > 1 and path.exists():
            path.replace(path.with_stem(path.stem + "-1"))
        temporary.replace(path)
        return True
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
        with suppress(OSError):
            temporary.unlink()  # it may be what fills the disk
        print(f"{path} could not be written ({error.__context__ or error}); older ones are unchanged, and it "
              "will be tried again", flush=True)
        return False


TROUBLES = {  # what an error says -> the end of a sentence that begins with the file's name
    "No module named": "cannot be read yet: pip install safetensors",
    "Permission denied": "cannot be read: change its permissions",
    "No such file": "does not exist: name a run's folder or a file of weights",
    "TorchScript": "is a TorchScript archive, as OpenAI's downloads are: if you trust it, save its "
                   "torch.jit.load(FILE).state_dict() with torch.save and name that file",
    "Unsupported global": "is refused: it is not only tensors, and reading such a pickle can run any code; take a file "
                          "that torch.load(..., weights_only=True) reads"}


def read_checkpoint(path: Path) -> dict:
    """The content of a file of weights: a state dict, or, of our own runs, "settings", "model" and more. Raises
    UserError, also for a pickle that could run code."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch.load itself compares no checksums
                    raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds on a damaged or foreign file
        trouble = f"is not a whole checkpoint ({type(error).__name__}): take another one"
        for sign, known in TROUBLES.items():
            if sign in str(error):
                trouble = known
        raise UserError(f"{path} {trouble}") from None
    if isinstance(content, dict):
        content = content.get("state_dict", content)
        if "model" in content or all(isinstance(value, Tensor) for value in content.values()):
            return content
    raise UserError(f"{path} holds no state dict: name a run's folder, its checkpoint.pt, or a released checkpoint")


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in the folder that is whole; None if there is none. Raises UserError if all are damaged."""
    paths = checkpoints(folder)
    for path in paths:
        try:
            if "settings" in read_checkpoint(path):
                return path
            raise UserError(f"{path} is not a checkpoint of train.py: name a run's folder")
        except UserError as error:
            if path == paths[-1]:
                raise
            print(f"{error}; the checkpoint before it is used", flush=True)
            path.replace(folder / "damaged.pt")  # or the next save would keep it and drop the whole one
    return None


def load_model(path: Path, activation: str | None = None) -> tuple[CLIP, dict]:
    """A run's folder, its checkpoint.pt or best.pt, or somebody else's file -> the model, its settings: the run's, or
    what the shapes of the file's tensors tell. `activation` is for somebody else's file alone. Raises UserError."""
    if path.is_dir():
        path = next(iter(checkpoints(path)), path / "checkpoint.pt")
    content = read_checkpoint(path)
    try:
        if "settings" in content:
            if activation:
                raise UserError("a run of train.py knows its activation: drop --activation")
            settings = content["settings"]  # train.Settings; one that is missing gets its default
            known = {name: settings[name] for name in CLIPConfig.__dataclass_fields__ if name in settings}
            return with_weights(CLIPConfig(**known), content["model"]), settings
        told = config_beside(path)
        if activation:
            told["activation"] = activation
        model = from_state_dict(content, **told)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    print(f"{path.name}: activation {model.config.activation} (OpenAI's and MetaCLIP's want --activation quickgelu)")
    tokenizer = str(path.with_name("vocab.txt")) if model.config.text_style == "bert" else "clip"
    return model, asdict(model.config) | dict(tokenizer=tokenizer, kinds=24, caption_fields="")


def with_weights(config: CLIPConfig, state) -> CLIP:
    """The model with the weights of a state dict in our names. Raises UserError if they do not fit."""
    model = CLIP(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # it lists all tensors that are missing, unknown or of another shape
        first = str(error).splitlines()[1].strip()[:200]
        raise UserError(f"half a checkpoint, or another architecture: {first}") from None
    return model


def resized(model: CLIP, image_size: int) -> CLIP:
    """The model for images of another size: the grid of position embeddings is interpolated (bicubic, antialiased: as
    in open_clip). Raises UserError if the size is no multiple of the patch."""
    other = CLIP(replace(model.config, image_size=image_size))
    other.load_state_dict(grown(model.state_dict(), other))
    return other


# ---- checkpoints: released ones --------------------------------------------------------------------------------------

# The parts of a tensor's name that are replaced, in this order: ours by theirs in OPEN_CLIP and TRANSFORMERS, theirs by
# ours in TIMM and BERT.
OPEN_CLIP = {
    ".blocks.": ".transformer.resblocks.", ".attn.qkv.": ".attn.in_proj_", ".attn.out.": ".attn.out_proj.",
    ".fc.": ".mlp.c_fc.", ".proj.0.": ".mlp.c_proj.", ".proj.": ".c_proj.",  # the last: Holistic CLIP's MLPs
    "visual.patch_embedding": "visual.conv1", "text.proj": "text.text_projection"}
TIMM = {
    "visual.trunk.": "visual.", ".attn.proj.": ".attn.out.", ".norm1.": ".ln_1.", ".norm2.": ".ln_2.",
    ".mlp.fc1.": ".fc.", ".mlp.fc2.": ".proj.0.", ".norm.": ".ln_post.", ".cls_token": ".class_embedding",
    ".patch_embed.proj.": ".patch_embedding.", ".pos_embed": ".positional_embedding"}
BERT = {
    ".transformer.encoder.layer.": ".blocks.", ".attention.output.dense.": ".attn.out.",
    ".attention.output.LayerNorm.": ".ln_1.", ".attention.self.": ".attn.", ".intermediate.dense.": ".fc.",
    ".output.dense.": ".proj.0.", ".output.LayerNorm.": ".ln_2.", ".transformer.pooler.dense.": ".pooler.0.",
    ".transformer.embeddings.LayerNorm.": ".ln_pre.", ".gamma": ".weight", ".beta": ".bias"}  # the last: older files'
TRANSFORMERS = {
    "visual.proj": "visual_projection.weight", "text.proj": "text_projection.weight",
    "visual.": "vision_model.", "text.": "text_model.", ".blocks.": ".encoder.layers.", ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.", ".attn.": ".self_attn.", ".out.": ".out_proj.", ".fc.": ".mlp.fc1.",
    ".proj.0.": ".mlp.fc2.", ".ln_pre.": ".pre_layrnorm.", ".ln_post.": ".post_layernorm.",
    ".ln_final.": ".final_layer_norm.", ".class_embedding": ".embeddings.class_embedding",
    ".patch_embedding.": ".embeddings.patch_embedding.", ".token_embedding.": ".embeddings.token_embedding.",
    ".positional_embedding": ".embeddings.position_embedding.weight"}
NOT_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size",
               "text.transformer.embeddings.position_ids")
HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}  # ViT-H, g and bigG; 64 elsewhere


def renamed(state, table: dict[str, str]):
    """The state dict with the parts of its names replaced, in float32."""
    result = {}
    for name, value in state.items():
        for old, new in table.items():
            name = name.replace(old, new)
        result[name] = value.float()
    return result


def count(state, pattern):
    """How many different numbers the names hold where the pattern has its group."""
    return len(set(re.findall(pattern, " ".join(state))))


def config_beside(path: Path) -> dict:
    """What the shapes do not tell, from open_clip's JSON beside a released file: NAME.json, open_clip_config.json."""
    told = {}
    for beside in (path.with_name("open_clip_config.json"), path.with_suffix(".json")):
        if beside.is_file():
            config = read_json(beside)
            config = config.get("model_cfg", config)
            if "vision_cfg" not in config:  # another library's file
                continue
            vision, text = config["vision_cfg"], config["text_cfg"]
            told = dict(activation="quickgelu" if config.get("quick_gelu") else "gelu",
                        pool="average" if vision.get("pool_type") == "avg" else "class")
            if "width" in vision and "heads" in text:  # not for timm's and transformers' towers
                told |= dict(vision_heads=vision["width"] // vision.get("head_width", 64), text_heads=text["heads"])
    return told


def from_state_dict(state, **overrides) -> CLIP:
    """A CLIP with the weights of a released state dict: open_clip's or OpenAI's ViTs, DreamLIP's (open_clip's layout),
    Holistic CLIP's (several class tokens, or parallel MLPs) or LoTLIP's (timm ViT and BERT).

    Sizes are read off the shapes; `overrides` are CLIPConfig's fields that shapes do not tell, above all
    activation="quickgelu" (weights trained on from OpenAI's) and the numbers of heads. Raises UserError if it is none
    of these layouts.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    told = dict(activation="quickgelu") if "input_resolution" in state else {}  # OpenAI's files hold such numbers
    for name in NOT_WEIGHTS:
        state.pop(name, None)
    try:
        if "visual.conv1.weight" in state:
            settings, state = read_open_clip(state)
        elif "visual.trunk.cls_token" in state:
            settings, state = read_timm(state)
            told_of_text, state = read_bert(state, corners=2, places=128)
            settings |= told_of_text
            state["text.proj"] = state.pop("text.proj.weight").mT
        else:
            raise UserError("not the state dict of an open_clip ViT with its own text transformer, nor LoTLIP's")
    except KeyError as error:
        raise UserError(f"half a checkpoint, or another architecture: there is no {error}") from None
    return with_weights(CLIPConfig(**{**settings, **told, **overrides}), state)


def image_settings(state, **more) -> dict:
    """The settings of the image tower: from the shapes of its tensors, the rest as usual."""
    patch = state["visual.patch_embedding.weight"].shape[-1]
    places, width = state["visual.positional_embedding"].shape
    side = round((places - 1) ** 0.5)  # one place is the class token's
    return dict(
        image_size=patch * side, patch=patch, stem="patch", pool="class", embed=state["visual.proj"].shape[1],
        vision_width=width, vision_depth=count(state, r"visual\.blocks\.(\d+)\."),
        vision_heads=width // HEAD_WIDTH.get(width, 64), **more)


def text_settings(state, **more) -> dict:
    """The settings of the text tower: from the shapes of its tensors, the rest as usual."""
    context, width = state["text.positional_embedding"].shape
    return dict(
        text_width=width, text_depth=count(state, r"text\.blocks\.(\d+)\."), text_heads=width // 64,
        context=context, vocab=len(state["text.token_embedding.weight"]), **more)


def read_open_clip(state):
    """State dict in open_clip's names -> settings, state dict in ours."""
    # the text tower's tensors stand at the top, or under "text."
    theirs = {re.sub(r"^(?!visual\.|text\.|logit_scale)", "text.", name): value for name, value in state.items()}
    ours = renamed(theirs, {their: our for our, their in OPEN_CLIP.items()})
    positions = ours["visual.positional_embedding"]
    tokens = ours["visual.class_embedding"].view(-1, positions.shape[1])
    H = len(tokens)
    if H > 1:  # Holistic CLIP's class tokens have a position each; ours share row 0
        tokens = tokens + positions[:H]
        ours["visual.positional_embedding"] = torch.cat([0 * positions[:1], positions[H:]])
    ours["visual.class_embedding"] = tokens
    mlps = count(ours, r"visual\.blocks\.\d+\.proj\.(\d+)\.")
    branching = dict(branches=H, branch_mask=H == 1)
    if mlps > 1:
        layers = count(ours, r"visual\.blocks\.(\d+)\.proj\.1\.")
        branching = dict(branches=mlps, branch_type="mlp", branch_layers=layers)
    return {**image_settings(ours), **text_settings(ours), **branching}, ours


def read_timm(state):
    """LoTLIP's image tower, which is timm's ViT -> settings, the state dict with our names for this tower."""
    ours = renamed(state, TIMM)
    # timm's ViT has a bias on its patches, which joins their positions, and no projection: ours is an identity.
    positions = ours["visual.positional_embedding"][0]  # [1+P, W]
    patches = positions[1:] + ours.pop("visual.patch_embedding.bias")
    ours["visual.positional_embedding"] = torch.cat([positions[:1], patches])
    ours["visual.class_embedding"] = ours["visual.class_embedding"][0]
    ours["visual.proj"] = torch.eye(positions.shape[1])
    return image_settings(ours, vision_style="timm"), ours


def read_bert(state, corners=0, places=None):
    """LoTLIP's text tower, which is BERT -> settings, the state dict with our names for this tower. It reads texts of
    up to `places` tokens, corners counted."""
    ours = renamed(state, BERT)
    # BERT reads [CLS], the corners, the text, all of token type 0: type and position join our corners and positions.
    # Corners are the vocabulary's last words. Ours knows a text's end by the greatest id, so the vocabulary gets [SEP],
    # row 102, once more, as its last row (data.py's WordPieces end so).
    words, positions, types = [ours.pop(f"text.transformer.embeddings.{kind}_embeddings.weight")
                               for kind in ("word", "position", "token_type")]
    positions = positions + types[:1]
    V = len(words) - corners
    ours["text.token_embedding.weight"] = torch.cat([words[:V], words[102:103]])
    if corners:
        ours["text.corner_embedding"] = words[V:] + positions[1:1 + corners]
    ours["text.positional_embedding"] = torch.cat([positions[:1], positions[1 + corners:places]])
    for query in [name for name in ours if ".attn.query." in name]:
        parts = [ours.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        ours[query.replace("query", "qkv")] = torch.cat(parts)
    return text_settings(ours, text_style="bert", text_attention="bidirectional", corner_tokens=corners), ours


def translated(model: CLIP, library: str, table: dict[str, str]):
    """The state dict in a library's names. Raises UserError if the model has parts that the library's CLIP lacks."""
    c = model.config
    if (c.stem, c.vision_style, c.branches, c.corner_tokens, c.text_attention) != ("patch", "clip", 1, 0, "causal"):
        raise UserError(f"{library}'s CLIP has linear patches (--stem patch), one branch, no corner tokens and causal "
                        "text: this model has no place there")
    state = model.state_dict()
    state["visual.class_embedding"] = state["visual.class_embedding"][0]
    return renamed(state, table)


def to_open_clip(model: CLIP):
    """State dict in open_clip's names, open_clip's config of the model. Raises UserError if it has no place there."""
    c = model.config
    state = translated(model, "open_clip", OPEN_CLIP)
    state = {name.removeprefix("text."): value for name, value in state.items()}
    vision = dict(image_size=c.image_size, patch_size=c.patch, width=c.vision_width, layers=c.vision_depth,
                  head_width=c.vision_width // c.vision_heads, pool_type="avg" if c.pool == "average" else "tok")
    text = dict(context_length=c.context, vocab_size=c.vocab, width=c.text_width, heads=c.text_heads,
                layers=c.text_depth)
    return state, dict(embed_dim=c.embed, quick_gelu=c.activation == "quickgelu", vision_cfg=vision, text_cfg=text)


def export_transformers(model: CLIP, folder: Path):
    """Writes what transformers.CLIPModel.from_pretrained and CLIPImageProcessor.from_pretrained read of a folder. The
    model is CLIP in its parts (else UserError)."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("--export transformers writes safetensors: pip install safetensors") from None
    c = model.config
    weights = translated(model, "transformers", TRANSFORMERS)
    if c.pool == "average":
        raise UserError("transformers' CLIP has no average of the patches (--pool average): this model has no place "
                        "there")
    state = {}
    for name, value in weights.items():
        if ".qkv." in name:
            for part, rows in zip("qkv", value.chunk(3)):
                state[name.replace("qkv", part + "_proj")] = rows.contiguous()
        else:
            state[name] = value.mT.contiguous() if "_projection." in name else value
    act = "quick_gelu" if c.activation == "quickgelu" else "gelu"
    vision = dict(hidden_size=c.vision_width, intermediate_size=4 * c.vision_width, num_hidden_layers=c.vision_depth,
                  num_attention_heads=c.vision_heads, hidden_act=act, image_size=c.image_size, patch_size=c.patch)
    # transformers reads a text at its first eos_token_id. (Old configs have 2, which means the greatest id.)
    text = dict(hidden_size=c.text_width, intermediate_size=4 * c.text_width, num_hidden_layers=c.text_depth,
                num_attention_heads=c.text_heads, hidden_act=act, vocab_size=c.vocab,
                max_position_embeddings=c.context, bos_token_id=c.vocab - 2, eos_token_id=c.vocab - 1)
    config = dict(model_type="clip", projection_dim=c.embed, text_config=text, vision_config=vision)
    # Bicubic resizing, CLIP's mean and deviation are what the processor does unless told otherwise.
    pictures = dict(image_processor_type="CLIPImageProcessor", size=dict(shortest_edge=c.image_size),
                    crop_size=c.image_size)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata=dict(format="pt"))
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", pictures)


# ---- checkpoints: where training starts ------------------------------------------------------------------------------

# The settings that a run may choose although its first weights come from a file: `grown` makes the weights fit, the
# size of the tokenizer's vocabulary is compared later, and the shapes do not tell the last four.
FREE = ("image_size", "context", "branches", "branch_type", "branch_layers", "branch_mask", "corner_tokens",
        "corner_mask", "tokenizer", "vision_heads", "text_heads", "activation", "pool")


def read_initial_weights(path: Path, part: str, flags: dict):
    """A file -> the settings that it fixes for a run, and its state dict in our names.

    part: "init", all that `load_model` reads; "init_image", timm's ViT; or "init_text", Hugging Face's BERT. Raises
    UserError, also where one of the user's flags contradicts the file.
    """
    try:
        if part == "init":
            model, known = load_model(path, flags.get("activation"))
            settings, weights = asdict(model.config) | dict(tokenizer=known["tokenizer"]), model.state_dict()
        elif part == "init_image":
            settings, weights = read_timm(read_tower(path, "visual.trunk."))
        else:
            settings, weights = read_bert(read_tower(path, "text.transformer."))
            settings["tokenizer"] = str(path.with_name("vocab.txt"))
    except KeyError as error:
        raise UserError(f"{path} is no file for --{part.replace('_', '-')}: it has no {error}") from None
    for name, value in settings.items():
        if name not in FREE and flags.get(name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {flags[name]} contradicts {path}, whose weights have {value}: drop the flag")
    return settings, weights


def read_tower(path: Path, prefix: str):
    """The state dict of a file of one tower, with the names that the tower has in LoTLIP's. A projection may be missing
    (it stays random), and there may be more (such as a head, which is ignored)."""
    state = read_checkpoint(path)
    state = state.get("model", state)
    return {prefix + name.removeprefix("bert."): value for name, value in state.items()}


def grown(state, model: CLIP):
    """The state dict of a similar model, or of one tower, made to fit the model.

    Positions are interpolated. More class tokens, MLPs or corner tokens begin as copies of those there are, the first
    corner tokens as copies of the end-of-text token's embedding. A missing tower or projection keeps the model's random
    weights. Raises UserError if half a tower is missing.
    """
    towers = {name.split(".")[0] for name in state}
    if "text.token_embedding.weight" in state:
        state = {"text.corner_embedding": state["text.token_embedding.weight"][-1:]} | state
    full = model.state_dict()
    for name, drawn in full.items():
        first = re.sub(r"\.proj\.\d+\.", ".proj.0.", name)  # of a block's parallel MLPs
        if name in state:
            fits = state[name].shape == drawn.shape
            full[name] = state[name] if fits else FITTED[name](state[name], len(drawn))
        elif first in state:
            full[name] = nudged(state[first])
        elif name.split(".")[0] in towers and not name.endswith(".proj"):
            raise UserError(f"the weights to start from are not whole: they have no {name}")
    return full


def nudged(x: Tensor) -> Tensor:
    """x with noise of 1% of its standard deviation, so that copies of it can diverge in training."""
    return x + 0.01 * x.std() * torch.randn_like(x)


def copies(rows: Tensor, number: int) -> Tensor:
    """[n,W] -> [number,W]: the first rows; if there are too few, nudged copies of the last follow."""
    more = [nudged(rows[-1]) for _ in range(number - len(rows))]
    return torch.stack([*rows[:number], *more])


def regridded(positions: Tensor, places: int) -> Tensor:
    """Positions of the class token and a square of patches, for another square: [1+P,W] -> [places,W]. Interpolated
    bicubic and antialiased, as in open_clip."""
    first, grid = positions.tensor_split([1])
    side, wanted = round(len(grid) ** 0.5), round((places - 1) ** 0.5)
    grid = grid.mT.unflatten(1, (side, side))[None]  # [1, W, side, side]
    grid = F.interpolate(grid, size=wanted, mode="bicubic", antialias=True)
    return torch.cat([first, grid[0].flatten(1).mT])


def stretched(positions: Tensor, context: int) -> Tensor:
    """Positions for texts of another length: [L,W] -> [context,W]. A shorter context takes the first ones. For a longer
    one the first 20 stay; the rest is interpolated linearly, extrapolated at the end (Long-CLIP, 2403.15378)."""
    L = len(positions)
    kept = min(20, L - 2)
    place = torch.arange(context, dtype=torch.float)  # in the old positions
    place[kept:] = kept + (place[kept:] - kept) * (L - kept) / (max(L, context) - kept)
    before = place.long().clamp(max=L - 2)
    return positions[before].lerp(positions[before + 1], (place - before)[:, None])


FITTED = {"visual.class_embedding": copies, "text.corner_embedding": copies,
          "visual.positional_embedding": regridded, "text.positional_embedding": stretched}


# ---- devices ---------------------------------------------------------------------------------------------------------

def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str):
    """Raises UserError if PyTorch has no such device here."""
    kind, _, index = device.partition(":")
    available = dict(cpu=True, cuda=int(index or 0) < torch.cuda.device_count(), mps=torch.backends.mps.is_available())
    if not available.get(kind):
        raise UserError(f"--device {device}: PyTorch has no such device here; drop --device or use cpu")
