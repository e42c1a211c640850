"""The model: a vision transformer and a text transformer from scratch, with the parts the three papers add.

    CLIP                 pre-LN ViT, class token, causal text transformer read at the end-of-text token (2103.00020)
    corner tokens        more summary tokens at the text's end, blind to one another (LoTLIP, 2410.05249, section 3.2)
    branches             H mutually blind class tokens, or H parallel MLPs in the last layers (Holistic CLIP, 2412.00440, section 3.2)
    patch embeddings     the final patch tokens through the class token's LayerNorm and projection (DreamLIP, SPARC)

With one branch and no corner tokens it is CLIP, weight for weight: load_open_clip and to_open_clip translate state dicts.
Attention masks are boolean, True where a query may look at a key.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


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
    stem: str = "patch"  # patch embedding: one linear layer a "patch" (ViT), or "conv", 3x3 convolutions of stride 2 (2106.14881)
    activation: str = "gelu"  # or "quickgelu", for OpenAI's weights
    pool: str = "class"  # image embedding from the "class" token (the papers) or as the "average" of the patches
    branches: int = 1  # H image embeddings (Holistic CLIP)
    branch_type: str = "class"  # H "class" tokens, or H parallel "mlp"s in the last `branch_layers` layers
    branch_layers: int = 3  # layers with parallel mlps
    text_attention: str = "causal"  # CLIP's, or "bidirectional" with the first token as [CLS] (LoTLIP's)
    corner_tokens: int = 0  # C (LoTLIP)
    corner_mask: bool = True  # False: summary tokens see one another (LoTLIP's ablation)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quickgelu": QuickGELU}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        B, N, W = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # each [B, heads, N, W/heads]
        if x.device.type == "cpu":  # where PyTorch's attention is several times slower in bfloat16 than in float32
            with torch.autocast("cpu", enabled=False):
                x = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(x.transpose(1, 2).reshape(B, N, W))


class Block(nn.Module):
    """A pre-LN transformer block whose MLP may end in several parallel layers, one a branch (Holistic CLIP's MLP variant).

    x [S,B,N,W] -> [H,B,N,W], where S is 1 before the first branching block and H after it; H = 1 in an ordinary block.
    """

    def __init__(self, width: int, heads: int, activation: str, branches: int = 1):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2, self.fc = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.act = ACTIVATIONS[activation]()
        self.proj = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(branches))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        x = x + self.attn(self.ln_1(x).flatten(0, 1), mask, causal).view_as(x)
        hidden = self.act(self.fc(self.ln_2(x)))
        if len(self.proj) == 1:
            return x + self.proj[0](hidden)
        streams = range(len(self.proj)) if len(x) > 1 else [0] * len(self.proj)
        return torch.stack([x[s] + proj(hidden[s]) for s, proj in zip(streams, self.proj)])


def blocks(width, depth, heads, activation, branches=1, branch_layers=0):
    return nn.ModuleList(Block(width, heads, activation, branches if i >= depth - branch_layers else 1) for i in range(depth))


class VisionTransformer(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        W, scale = c.vision_width, c.vision_width ** -0.5
        tokens = c.branches if c.branch_type == "class" else 1
        forks = c.branches if c.branch_type == "mlp" else 1
        self.pool, self.patch, self.heads = c.pool, c.patch, c.vision_heads
        self.patch_embedding = nn.Conv2d(3, W, c.patch, c.patch, bias=False) if c.stem == "patch" else conv_stem(W, c.patch)
        self.class_embedding = nn.Parameter(scale * torch.randn(tokens, W))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + (c.image_size // c.patch) ** 2, W))  # row 0: class tokens
        self.ln_pre = nn.LayerNorm(W)
        self.blocks = blocks(W, c.vision_depth, c.vision_heads, c.activation, forks, min(c.branch_layers, c.vision_depth))
        self.ln_post = nn.LayerNorm(W)
        self.proj = nn.Parameter(scale * torch.randn(W, c.embed))
        self.register_buffer("mask", class_token_mask(tokens, len(self.positional_embedding) - 1) if tokens > 1 else None, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,S,S] -> branches [B,H,D], patches [B,P,D], not yet of unit norm."""
        T = len(self.class_embedding)
        x = self.patch_embedding(images).flatten(2).mT  # [B, P, W]
        x = torch.cat([(self.class_embedding + self.positional_embedding[:1]).to(x).expand(len(x), -1, -1),
                       x + self.positional_embedding[1:].to(x)], 1)  # [B, T+P, W]
        x = self.ln_pre(x)[None]  # [1, B, T+P, W]
        for block in self.blocks:
            x = block(x, self.mask)  # [1 or H, B, T+P, W]
        x = self.ln_post(x) @ self.proj  # [1 or H, B, T+P, D]
        summary, patches = x[:, :, :T], x[:, :, T:]
        if self.pool == "average":
            summary = patches.mean(2, keepdim=True)
        return summary.permute(1, 0, 2, 3).flatten(1, 2), patches.mean(0)


def conv_stem(width: int, patch: int) -> nn.Sequential:
    """3x3 convolutions: one of stride 2 for each halving of the resolution, doubling the channels, and from the second on one of stride 1
    behind it; then a 1x1 to the width. Small models learn shapes from it in a fraction of the images that linear patches need (2106.14881)."""
    halvings = patch.bit_length() - 1
    channels = [3] + [max(8, width * 3 // 4 // 2 ** (halvings - 1 - i)) for i in range(halvings)]
    layers = []
    for i, (a, b) in enumerate(zip(channels, channels[1:])):
        layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GELU()] + ([nn.Conv2d(b, b, 3, 1, 1), nn.GELU()] if i else [])
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], width, 1))


def class_token_mask(tokens: int, patches: int) -> Tensor:
    """Class tokens do not look at one another: each at itself and the patches, patches at everything. [T+P, T+P]"""
    mask = torch.ones(tokens + patches, tokens + patches, dtype=torch.bool)
    mask[:tokens, :tokens] = torch.eye(tokens, dtype=torch.bool)
    return mask


class TextTransformer(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        W = c.text_width
        self.causal, self.corner_mask = c.text_attention == "causal", c.corner_mask
        self.token_embedding = nn.Embedding(c.vocab, W)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.context, W))
        self.corner_embedding = nn.Parameter(0.02 * torch.randn(c.corner_tokens, W)) if c.corner_tokens else None
        self.blocks = blocks(W, c.text_depth, c.text_heads, c.activation)
        self.ln_final = nn.LayerNorm(W)
        self.proj = nn.Parameter(W ** -0.5 * torch.randn(W, c.embed))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [N,L] -> summaries [N,1+C,D] (end-of-text or [CLS], then the corners), token embeddings [N,L,D], not yet of unit norm.

        Corner tokens stand in the last C places of the sequence; who sees whom is the mask's affair, not the order's."""
        N, L = tokens.shape
        end = tokens.argmax(-1)  # the end-of-text token has the greatest id
        x = self.token_embedding(tokens) + self.positional_embedding[:L]
        C = 0
        if self.corner_embedding is not None:
            C = len(self.corner_embedding)
            x = torch.cat([x, self.corner_embedding.expand(N, -1, -1)], 1)  # [N, L+C, W]
        plain_causal = self.causal and C == 0  # padding stands behind every text, so the causal mask hides it too
        mask = None if plain_causal else text_mask(end, L, C, self.causal, self.corner_mask)[:, None]
        x = x[None]
        for block in self.blocks:
            x = block(x, mask, plain_causal)
        x = self.ln_final(x[0]) @ self.proj  # [N, L+C, D]
        summary = x[torch.arange(N, device=x.device), end] if self.causal else x[:, 0]
        return torch.cat([summary[:, None], x[:, L:]], 1), x[:, :L]


def text_mask(end: Tensor, L: int, C: int, causal: bool, blind: bool) -> Tensor:
    """Who sees whom among L text places and C corner places: [N, L+C, L+C], True where row may look at column.

    Summary tokens are the end-of-text token (causal) or the first one, [CLS] (bidirectional), and the corners. In a causal encoder the
    corners come between the text and its end. `blind` (LoTLIP, section 3.2): no summary token sees another, no ordinary token sees a corner.
    """
    place = torch.arange(L + C, device=end.device)
    end, corner = end[:, None], place >= L
    if causal:
        order = torch.where(corner, end + place - L, torch.where(place < end, place, place + C))  # [N, L+C]: text, corners, end, padding
        mask = order[:, None, :] <= order[:, :, None]
    else:
        mask = (corner | (place <= end))[:, None, :].expand(-1, L + C, -1)  # everything but padding
    if blind:
        summary = corner | (place == (end if causal else 0))  # [N, L+C] or [L+C]
        mask = mask & ~(summary[..., :, None] & summary[..., None, :]) & ~(~summary[..., :, None] & corner)
    return mask | torch.eye(L + C, dtype=torch.bool, device=end.device)  # each sees itself, padding too: no empty row


class CLIP(nn.Module):
    bucketed = True  # texts of like length go through the text tower together; else all at once, in a single call

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
        return F.normalize(branches.float(), dim=-1), F.normalize(patches.float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [N,L] -> summaries [N,1+C,D], token_embeddings [N,L,D], unit-norm float32. L may be less than the context."""
        summaries, token_embeddings = self.text(tokens)
        return F.normalize(summaries.float(), dim=-1), F.normalize(token_embeddings.float(), dim=-1)

    def encode_texts(self, tokens: Tensor, with_tokens: bool = False) -> tuple[Tensor, Tensor | None]:
        """encode_text for texts of mixed length: those of up to 16, 32, 64 ... tokens together, cut to the longest of their bucket, so that
        little padding is computed.

        tokens [N,L] -> summaries [N,1+C,D], token_embeddings [N,L,D] (zeros behind a bucket's longest text) if asked for.
        """
        if not self.bucketed:
            return self.encode_text(tokens)
        length, order = (tokens.argmax(-1) + 1).sort()
        edges = [2 ** i for i in range(4, (tokens.shape[1] - 1).bit_length())]
        ends = torch.searchsorted(length, torch.tensor(edges, device=length.device), right=True).tolist() + [len(length)]
        summaries, embeddings = [], []
        for start, end in zip([0, *ends], ends):
            if end > start:
                s, t = self.encode_text(tokens[order[start:end], :int(length[end - 1])])
                summaries.append(s)
                embeddings.append(F.pad(t, (0, 0, 0, tokens.shape[1] - t.shape[1])) if with_tokens else None)
        back = order.argsort()
        return torch.cat(summaries)[back], torch.cat(embeddings)[back] if with_tokens else None

    def forward(self, images: Tensor, tokens: Tensor, with_tokens: bool = False) -> dict[str, Tensor]:
        """images [B,3,S,S], tokens [B,T,L] -> every embedding a loss may want, and the multiplier s (for DDP, one call a step)."""
        branches, patches = self.encode_image(images)
        summaries, embeddings = self.encode_texts(tokens.flatten(0, 1), with_tokens=with_tokens)
        return {
            "branches": branches,  # [B, H, D]
            "patches": patches,  # [B, P, D]
            "summaries": summaries.unflatten(0, tokens.shape[:2]),  # [B, T, 1+C, D]
            "token_embeddings": embeddings,  # [B·T, L, D] or None
            "ends": tokens.flatten(0, 1).argmax(-1),  # [B·T], place of the end-of-text token
            "logit_scale": self.logit_scale.exp(),
        }


def check(c: CLIPConfig):
    """Raises ValueError with one sentence where settings cannot go together."""
    for name in ("image_size", "patch", "vision_width", "vision_depth", "vision_heads", "text_width", "text_depth", "text_heads", "context", "embed", "branches"):
        if getattr(c, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(c, name)}")
    if c.image_size % c.patch:
        raise ValueError(f"image size {c.image_size} is not a multiple of the patch size {c.patch}: choose another --image-size")
    if c.stem == "conv" and c.patch & (c.patch - 1):
        raise ValueError(f"the convolutional stem halves the resolution, so the patch size must be a power of two, not {c.patch}: use --stem patch")
    if c.pool == "average" and c.branch_type == "class" and c.branches > 1:
        raise ValueError(f"{c.branches} class-token branches would all have the same average of the patches: use --pool class or --branch-type mlp")
    for width, heads, tower in ((c.vision_width, c.vision_heads, "vision"), (c.text_width, c.text_heads, "text")):
        if width % heads:
            raise ValueError(f"the {tower} width {width} does not divide into {heads} heads: change --{tower}-width or --{tower}-heads")
    for name, choices in (("stem", ("patch", "conv")), ("pool", ("class", "average")), ("branch_type", ("class", "mlp")), ("text_attention", ("causal", "bidirectional")),
                          ("activation", tuple(ACTIVATIONS))):
        if getattr(c, name) not in choices:
            raise ValueError(f"no {name} {getattr(c, name)!r}: choose from {', '.join(choices)}")
    if c.branches > 1 and c.branch_type == "mlp" and c.branch_layers == 0:
        raise ValueError("parallel MLPs need layers to stand in: --branch-layers must be at least 1")
    if c.corner_tokens < 0 or c.branch_layers < 0:
        raise ValueError("--corner-tokens and --branch-layers cannot be negative")


# open_clip's names (and OpenAI's) beside ours. Everything else has the same name in both.

def _open_clip_name(name: str) -> str:
    vision = name.startswith("visual.")
    name = name.removeprefix("text.") if not vision else name
    for ours, theirs in ((".blocks.", ".transformer.resblocks."), ("blocks.", "transformer.resblocks."), (".attn.qkv.", ".attn.in_proj_"),
                         (".attn.out.", ".attn.out_proj."), (".fc.", ".mlp.c_fc."), (".proj.0.", ".mlp.c_proj."), ("patch_embedding", "conv1")):
        if ours in name and theirs not in name:
            name = name.replace(ours, theirs, 1)
    return "text_projection" if name == "proj" else name


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """State dict in open_clip's names, for a model with one branch and no corner tokens (else ValueError)."""
    c = model.config
    if c.branches > 1 or c.corner_tokens or c.text_attention != "causal" or c.stem != "patch":
        raise ValueError("open_clip's CLIP has linear patches, one branch, no corner tokens and causal text: this model has no place there")
    state = {_open_clip_name(name): value.detach().clone() for name, value in model.state_dict().items()}
    state["visual.class_embedding"] = state["visual.class_embedding"][0]
    return state


def load_open_clip(state: dict[str, Tensor], **overrides) -> CLIP:
    """A CLIP with the weights of an open_clip (or OpenAI, then pass activation="quickgelu") ViT state dict; sizes are read off the shapes."""
    state = {name.removeprefix("module."): value.float() for name, value in state.items()}
    if "visual.conv1.weight" not in state or "text_projection" not in state:
        raise ValueError("this is not the state dict of an open_clip ViT with its own text transformer")
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    context, text_width = state["positional_embedding"].shape

    def depth(prefix):
        return 1 + max(int(name[len(prefix):].split(".")[0]) for name in state if name.startswith(prefix))

    settings = dict(
        image_size=patch * round((len(state["visual.positional_embedding"]) - 1) ** 0.5), patch=patch,
        vision_width=vision_width, vision_depth=depth("visual.transformer.resblocks."), vision_heads=vision_width // 64,
        text_width=text_width, text_depth=depth("transformer.resblocks."), text_heads=text_width // 64,
        context=context, vocab=len(state["token_embedding.weight"]), embed=state["text_projection"].shape[1])
    model = CLIP(CLIPConfig(**(settings | overrides)))
    renamed = {name: state[_open_clip_name(name)] for name in model.state_dict()}
    renamed["visual.class_embedding"] = renamed["visual.class_embedding"].reshape(1, -1)
    model.load_state_dict(renamed)
    return model


def config_from(settings) -> CLIPConfig:
    """The model's part of a larger settings object."""
    return CLIPConfig(**{f.name: getattr(settings, f.name) for f in fields(CLIPConfig)})
