"""The towers are open_clip's CLIP where they should be, and the parts that the papers add see, share and branch as they
define."""

import copy
import itertools
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP as OpenCLIP

import model as model_module
import train
from data import UserError, text_slots
from model import (
    CLIP,
    CLIPConfig,
    class_token_mask,
    from_state_dict,
    packing_trouble,
    text_mask,
    to_open_clip,
)

SMALL = dict(
    image_size=16,
    patch=4,
    vision_width=16,
    vision_depth=2,
    vision_heads=2,
    text_width=16,
    text_depth=2,
    text_heads=2,
    context=12,
    vocab=40,
    embed=8,
)


def small(**settings):
    """A small model none of whose gains, biases or embeddings are at their initial value."""
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(**{**SMALL, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def texts(*lengths, vocab=40, width=12):
    """Rows of start, words, end, zeros, of the given lengths (both ends counted; a text of one is its end)."""
    g = torch.Generator().manual_seed(0)
    rows = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in zip(rows, lengths):
        row[:n] = torch.randint(1, vocab - 2, (n,), generator=g)
        row[0] = vocab - 2
        row[n - 1] = vocab - 1
    return rows


def pictures(n=3, size=16):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def same(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=0)


@torch.no_grad()
def first_layer(tower, inputs):
    """Output of the tower's first block, [N, places, W]."""
    caught = []
    hook = tower.blocks[0].register_forward_hook(lambda _, __, output: caught.append(output[0]))
    tower(inputs)
    hook.remove()
    return caught[0]


# ---- CLIP, weight for weight -----------------------------------------------------------------------------------------

SHAPES = [
    dict(image=16, patch=4, vision=(32, 2, 16), text=(32, 3, 2), context=12, vocab=40, embed=24),
    dict(image=28, patch=14, vision=(128, 1, 64), text=(64, 2, 1), context=77, vocab=1000, embed=64),
]


def reference(shape, quick=False):
    """open_clip's model with random weights, and the settings that its shapes do not tell."""
    torch.manual_seed(0)
    width, layers, head = shape["vision"]
    text_width, text_layers, heads = shape["text"]
    vision = dict(
        image_size=shape["image"], patch_size=shape["patch"], width=width, layers=layers, head_width=head
    )
    text = dict(
        context_length=shape["context"],
        vocab_size=shape["vocab"],
        width=text_width,
        layers=text_layers,
        heads=heads,
    )
    theirs = OpenCLIP(shape["embed"], vision, text, quick_gelu=quick).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    activation = "quickgelu" if quick else "gelu"
    return theirs, dict(vision_heads=width // head, text_heads=heads, activation=activation)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['image']}px")
@torch.no_grad()
def test_features_are_open_clips_on_random_weights_whose_names_go_there_and_back(shape, quick):
    theirs, overrides = reference(shape, quick)
    ours = from_state_dict(theirs.state_dict(), **overrides).eval()
    images = pictures(4, shape["image"])
    tokens = texts(3, shape["context"], 7, 5, vocab=shape["vocab"], width=shape["context"])
    assert same(ours.encode_image(images)[0][:, 0], theirs.encode_image(images, normalize=True))
    assert same(ours.encode_text(tokens)[0][:, 0], theirs.encode_text(tokens, normalize=True))
    state, _ = to_open_clip(ours)
    expected = theirs.state_dict()
    expected.pop("attn_mask", None)
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize(
    "size, name", [("base-32", "ViT-B-32"), ("base-16", "ViT-B-16"), ("large-14", "ViT-L-14")]
)
def test_the_last_three_sizes_are_clips(size, name):
    s = train.resolve({"size": size, "method": "clip"})
    s.vocab = 49408
    with torch.device("meta"):
        theirs = OpenCLIP(**open_clip.get_model_config(name))
        ours = CLIP(train.config_from(s))
    shapes = {name: value.shape for name, value in theirs.state_dict().items() if name != "attn_mask"}
    assert {name: value.shape for name, value in to_open_clip(ours)[0].items()} == shapes
    assert ours.visual.blocks[0].attn.heads == theirs.visual.transformer.resblocks[0].attn.num_heads
    assert ours.text.blocks[0].attn.heads == theirs.transformer.resblocks[0].attn.num_heads


# ---- who sees whom ---------------------------------------------------------------------------------------------------


def test_a_class_token_sees_every_patch_and_itself_and_patches_see_everything():
    mask = class_token_mask(3, 4)
    for q, k in itertools.product(range(7), range(7)):
        assert mask[q, k] == (q >= 3 or k >= 3 or q == k)


def may_see(q, k, end, L, C, causal, blind):
    """LoTLIP's mask sentence by sentence, for places 0..L-1 of the text (its end token at `end`) and L..L+C-1 the
    corners. None where nothing is said: padding as the one that looks."""

    def is_corner(place):
        return place >= L

    def is_padding(place):
        return end < place < L

    summaries = [end if causal else 0, *range(L, L + C)]
    if q == k:
        return True
    if is_padding(q):
        return None
    if is_padding(k):
        return False  # "Padding is invisible."
    if blind and q in summaries and k in summaries:
        return False  # "[CLS] and the corners do not see one another"
    if causal:  # "the summary tokens stand at the END (after the text, corners then end-of-text)"
        line = [*range(end), *range(L, L + C), end]
        return line.index(k) < line.index(q)
    if blind and is_corner(k):
        return False  # "the columns of every corner token are visible only to themselves"
    return True  # "[CLS] and the corners see all ordinary text tokens"; ordinary ones see [CLS], too


@pytest.mark.parametrize("blind", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("C", [0, 1, 2, 3])
def test_the_text_mask_is_the_one_the_sentences_say(C, causal, blind):
    L, ends = 7, [1, 4, 6]
    mask = text_mask(torch.tensor(ends), L, C, causal, blind)
    assert mask.shape == (3, L + C, L + C) and mask.any(-1).all()
    for n, end in enumerate(ends):
        for q, k in itertools.product(range(L + C), range(L + C)):
            assert may_see(q, k, end, L, C, causal, blind) in (None, bool(mask[n, q, k])), (end, q, k)


@pytest.mark.parametrize("C, blind", [(0, True), (2, True), (2, False)])
@pytest.mark.parametrize("causal", [True, False])
def test_in_the_text_tower_a_place_changes_those_that_may_see_it_and_no_other(C, blind, causal):
    L, end = 12, 8
    text = small(
        corner_tokens=C, corner_mask=blind, text_attention="causal" if causal else "bidirectional"
    ).text
    tokens = texts(end + 1)
    before = first_layer(text, tokens)[0]
    for k in [*range(end), *range(L, L + C)]:
        changed, others = copy.deepcopy(text), tokens.clone()
        if k < L:
            others[0, k] = others[0, k] % 37 + 1
        else:
            changed.corner_embedding.data[k - L] += torch.randn(16)
        moved = (before != first_layer(changed, others)[0]).any(-1)
        for q in range(L + C):
            assert may_see(q, k, end, L, C, causal, blind) in (None, bool(moved[q])), (q, k)


# ---- padding and batches ---------------------------------------------------------------------------------------------

CLS = dict(text_attention="bidirectional")
KINDS_OF_TEXT = [
    dict(),
    dict(corner_tokens=2),
    CLS,
    CLS | dict(corner_tokens=2, text_style="bert"),
    dict(corner_tokens=2, corner_mask=False),
    CLS | dict(corner_tokens=2, corner_mask=False),
]
PACKED = KINDS_OF_TEXT[:4]
MIXED = (33, 3, 64, 16, 70, 17, 32, 65, 15, 31, 63, 2)


@pytest.mark.parametrize("settings", KINDS_OF_TEXT, ids=str)
@torch.no_grad()
def test_a_texts_embeddings_change_with_neither_padding_nor_batch_mates(settings):
    model, tokens = small(**settings), texts(6, 12, 3)
    summaries, embeddings = model.encode_text(tokens)
    for i, length in enumerate((6, 12, 3)):
        for cut in {length, min(length + 2, 12), 12}:
            alone, words = model.encode_text(tokens[i : i + 1, :cut])
            assert same(alone[0], summaries[i]) and same(words[0, :length], embeddings[i, :length])


@pytest.mark.parametrize("settings", KINDS_OF_TEXT, ids=str)
@pytest.mark.parametrize(
    "width, lengths", [(70, MIXED), (70, (9, 70, 9)), (70, (5, 3)), (1, (1,)), (40, (40, 16))]
)
@torch.no_grad()
def test_texts_in_buckets_are_embedded_as_without(width, lengths, settings):
    model, tokens = small(context=70, **settings), texts(*lengths, width=width)
    summaries, embeddings = model.encode_text(tokens)
    found, words = model.encode_texts(tokens, with_tokens=True)
    assert same(found, summaries) and words.shape == embeddings.shape
    for i, n in enumerate(lengths):
        assert same(words[i, :n], embeddings[i, :n])
    found, words = model.encode_texts(tokens, lengths=np.array(lengths))
    assert same(found, summaries) and words is None


def varlen_reference(q, k, v, q_starts, k_starts, q_longest, k_longest, causal=False):
    """model.varlen_attention, sequence by sequence; what lies outside of all is NaN, as on a GPU it may be anything."""
    out = torch.full_like(q, torch.nan)
    assert q.shape[1:] == k.shape[1:] == v.shape[1:] and q_starts.dtype == k_starts.dtype == torch.int32
    queries, keys = (itertools.pairwise(starts.tolist()) for starts in (q_starts, k_starts))
    for (a, b), (c, d) in zip(queries, keys):
        assert 0 < b - a <= q_longest and 0 < d - c <= k_longest and (b - a == d - c or not causal)
        heads = [x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d])]
        out[a:b] = F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(0, 1)
    return out


@pytest.mark.parametrize("settings", PACKED, ids=str)
@pytest.mark.parametrize("width, lengths", [(70, MIXED), (12, (12, 3)), (1, (1,)), (9, (5,) * 9)])
def test_packed_texts_have_the_embeddings_and_gradients_of_padded_ones(width, lengths, settings, monkeypatch):
    monkeypatch.setattr(model_module, "varlen_attention", varlen_reference)
    model, tokens = small(context=70, **settings), texts(*lengths, width=width)
    results = []
    for model.layout, known in (("padded", None), ("packed", None), ("packed", np.array(lengths))):
        summaries, words = model.encode_texts(tokens, True, known)
        assert same(model.encode_texts(tokens, False, known)[0], summaries)
        words = torch.cat([row[:n] for row, n in zip(words, lengths)])
        g, loss = torch.Generator().manual_seed(0), 0
        for x in (summaries, words):
            loss = loss + (x * torch.randn(x.shape, generator=g)).sum()
        results.append([summaries, words, *torch.autograd.grad(loss, [*model.text.parameters()])])
    padded, *packed = results
    for result in packed:
        for a, b in zip(result, padded, strict=True):
            assert same(a, b, 1e-5 + 1e-5 * float(b.detach().abs().max()))


def test_more_texts_than_can_be_packed_go_into_buckets(monkeypatch):
    monkeypatch.setattr(model_module, "MOST_PACKED", 2)
    monkeypatch.setattr(model_module, "varlen_attention", None)
    model, tokens = small(context=70), texts(9, 70, 9, width=70)
    model.layout = "packed"
    assert same(model.encode_texts(tokens)[0], model.encode_text(tokens)[0])
    with pytest.raises(TypeError, match="not callable"):  # two are packed
        model.encode_texts(tokens[:2])


def first_key(q, k, v, q_starts, k_starts, *_):
    """A kernel that is wrong: every query sees the first key of its sequence alone."""
    return v[k_starts[:-1].long()].repeat_interleave(q_starts.diff(), 0)


@pytest.mark.parametrize("settings", PACKED, ids=str)
def test_packing_is_tried_before_it_is_used(settings, monkeypatch):
    model = small(context=70, **settings)
    assert packing_trouble(model, "cpu")  # there is no such kernel
    monkeypatch.setattr(model_module, "varlen_attention", varlen_reference)
    assert packing_trouble(model, "cpu") == ""
    monkeypatch.setattr(model_module, "varlen_attention", first_key)
    assert "differ" in packing_trouble(model, "cpu")


def test_corners_that_see_one_another_are_not_packed():
    assert packing_trouble(small(corner_tokens=2, corner_mask=False), "cpu") == (
        "corner tokens that see one another are not packed"
    )


# ---- branches and pooling: the whole image tower once more, in float64, stream by stream -----------------------------


def attend(x, attn, sees):
    """Attention of one image's x [N,W], head by head; sees [N,N], bool."""
    q, k, v = attn.qkv(x).chunk(3, -1)
    heads = []
    for part in torch.arange(x.shape[1]).chunk(attn.heads):
        weights = (q[:, part] @ k[:, part].T / math.sqrt(len(part))).exp() * sees
        heads.append(weights @ v[:, part] / weights.sum(-1, keepdim=True))
    return attn.out(torch.cat(heads, -1))


def vision(model, image):
    """One image [3,S,S] -> branches [H,D], patches [P,D], not yet of unit norm."""
    v, c = model.visual, model.config
    patches = v.patch_embedding(image[None])[0].flatten(1).T + v.positional_embedding[1:]
    classes = v.class_embedding + v.positional_embedding[0]
    T = len(classes)
    sees = torch.ones(T + len(patches), T + len(patches))
    sees[:T, :T] = torch.eye(T)
    streams = [v.ln_pre(torch.cat([classes, patches]))]
    for depth, block in enumerate(v.blocks):
        branching = c.branch_type == "mlp" and depth >= c.vision_depth - c.branch_layers
        streams = [x + attend(block.ln_1(x), block.attn, sees) for x in streams]
        if branching and len(streams) == 1:
            # "at the first of these layers, after the shared attention, the stream splits in H"
            streams = streams * c.branches
        for h, x in enumerate(streams):
            hidden = F.gelu(block.fc(block.ln_2(x)))  # "the MLP's first linear layer stays shared"
            streams[h] = x + block.proj[h if branching else 0](hidden)
    streams = [v.ln_post(x) @ v.proj for x in streams]
    summaries = [x[T:].mean(0, keepdim=True) if c.pool == "average" else x[:T] for x in streams]
    return torch.cat(summaries), sum(x[T:] for x in streams) / len(streams)


MLPS = dict(branch_type="mlp", branches=2, branch_layers=2)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(pool="average", stem="conv"),
        dict(branches=3),
        MLPS,
        MLPS | dict(pool="average"),
        MLPS | dict(branches=3, branch_layers=9),
    ],
    ids=str,
)
@torch.no_grad()
def test_class_branches_mlp_branches_and_pooling_are_what_stream_by_stream_gives(settings):
    model, images = small(vision_depth=3, **settings).double(), pictures(2).double()
    branches, patches = model.encode_image(images)
    for i, image in enumerate(images):
        expected, cells = vision(model, image)
        assert same(branches[i].double(), F.normalize(expected, dim=-1), 2e-6)
        assert same(patches[i].double(), F.normalize(cells, dim=-1), 2e-6)


def test_mlp_branches_share_all_but_the_second_linear_layer_of_the_last_layers():
    one, three = (small(branches=H, branch_type="mlp", branch_layers=1).state_dict() for H in (1, 3))
    assert three.keys() - one.keys() == {
        f"visual.blocks.1.proj.{h}.{what}" for h in (1, 2) for what in ("weight", "bias")
    }


@pytest.mark.parametrize(
    "settings", [dict(), dict(branches=3, corner_tokens=2), MLPS | dict(pool="average")], ids=str
)
@torch.no_grad()
def test_all_embeddings_are_of_unit_norm_and_of_the_promised_shapes(settings):
    model, H, C = small(**settings), settings.get("branches", 1), settings.get("corner_tokens", 0)
    embeddings = [*model.encode_image(pictures(3)), *model.encode_text(texts(6, 12, 3, 4))]
    assert [tuple(x.shape) for x in embeddings] == [(3, H, 8), (3, 16, 8), (4, 1 + C, 8), (4, 12, 8)]
    for x in embeddings:
        assert x.dtype == torch.float32 and same(x.norm(dim=-1), torch.ones(x.shape[:-1]))


# ---- settings and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(image_size=18), "--image-size"),
        (dict(pool="average", branches=2), "--branch-type mlp"),
        (dict(vision_heads=3), "--vision-heads"),
        (dict(text_heads=3), "--text-heads"),
        (dict(branches=0), "--branches"),
        (dict(corner_tokens=-1), "--corner-tokens"),
        (dict(text_attention="full"), "causal, bidirectional"),
        (dict(text_style="bert"), "--text-attention bidirectional"),
    ],
    ids=str,
)
def test_settings_that_cannot_go_together_get_one_sentence_naming_the_flag(settings, named):
    with pytest.raises(UserError, match=named) as caught:
        CLIP(CLIPConfig(**{**SMALL, **settings}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method, settings",
    [
        *((method, {}) for method in train.METHODS),
        ("holistic", dict(branch_type="mlp", branch_layers=2, vision_depth=3)),
        ("holistic", dict(branches=3, perspectives=2)),
        ("lotlip", dict(vision_style="timm", text_style="bert", **CLS)),
    ],
)
def test_every_parameter_gets_a_gradient_with_every_method(method, settings):
    s = train.resolve({"method": method, "size": "nano", **settings})
    s.vocab = 40
    model, T = small(**vars(train.config_from(s))), len(text_slots(s))
    tokens = texts(*([12, 5, 9, 4] * T)).view(4, T, 12)
    loss, _ = train.method_loss(model(pictures(4, 32), tokens, s.grouping == "token"), s)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_under_bfloat16_on_the_cpu_attention_is_computed_in_float32(monkeypatch):
    dtypes, attention = [], F.scaled_dot_product_attention

    def spy(q, *rest, **options):
        dtypes.append(q.dtype)
        return attention(q, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = small()
    exact, _ = model.encode_image(pictures())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = model.encode_image(pictures())
    assert set(dtypes) == {torch.float32} and not torch.equal(exact, rounded)
    assert (exact * rounded).sum(-1).min() > 0.99
