"""The towers are open_clip's CLIP where they should be, and the parts the papers add see, share and branch as they
define."""
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
from model import CLIP, CLIPConfig, class_token_mask, from_state_dict, text_mask, to_open_clip

SMALL = dict(image_size=16, patch=4, vision_width=16, vision_depth=2, vision_heads=2, text_width=16, text_depth=2,
             text_heads=2, context=12, vocab=40, embed=8)


def small(seed=0, **settings):
    """A small model none of whose gains, biases or embeddings are at their initial value."""
    torch.manual_seed(seed)
    model = CLIP(CLIPConfig(**{**SMALL, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def texts(*lengths, vocab=40, width=12, seed=0):
    """Rows of start, words, end, zeros, of the given lengths (both ends counted)."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in zip(rows, lengths):
        row[:n] = torch.tensor([vocab - 2, *torch.randint(1, vocab - 2, (n - 2,), generator=g), vocab - 1])
    return rows


def pictures(n=3, size=16, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=0)


@torch.no_grad()
def first_layer(model, tower, inputs):
    """Output of the tower's first block, [N, places, W]."""
    caught = []
    hook = getattr(model, tower).blocks[0].register_forward_hook(lambda _, __, output: caught.append(output[0]))
    (model.encode_image if tower == "visual" else model.encode_text)(inputs)
    hook.remove()
    return caught[0]


def moved(before, after):
    """Which places [places] of [N, places, W] are not exactly what they were, in any of the N."""
    return (before != after).any(-1).any(0)


# ---- CLIP, weight for weight -----------------------------------------------------------------------------------------

SHAPES = [
    dict(image=16, patch=4, vision=(32, 2, 16), text=(32, 3, 2), context=12, vocab=40, embed=24),
    dict(image=32, patch=16, vision=(64, 3, 32), text=(48, 1, 4), context=20, vocab=300, embed=16),
    dict(image=28, patch=14, vision=(128, 1, 64), text=(64, 2, 1), context=77, vocab=1000, embed=64),
]


def reference(shape, quick, seed=0):
    torch.manual_seed(seed)
    width, layers, head = shape["vision"]
    vision = dict(image_size=shape["image"], patch_size=shape["patch"], width=width, layers=layers, head_width=head)
    text = dict(context_length=shape["context"], vocab_size=shape["vocab"], width=shape["text"][0],
                layers=shape["text"][1], heads=shape["text"][2])
    theirs = OpenCLIP(shape["embed"], vision, text, quick_gelu=quick).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return theirs, dict(vision_heads=width // head, text_heads=shape["text"][2],
                        activation="quickgelu" if quick else "gelu")


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quickgelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['image']}px")
@torch.no_grad()
def test_features_are_open_clips_on_random_weights(shape, quick):
    theirs, overrides = reference(shape, quick)
    ours = from_state_dict(theirs.state_dict(), **overrides).eval()
    images = pictures(4, shape["image"])
    tokens = texts(3, shape["context"], 7, 5, vocab=shape["vocab"], width=shape["context"])
    branches, patches = ours.encode_image(images)
    summaries, embeddings = ours.encode_text(tokens)
    patch_count = (shape["image"] // shape["patch"]) ** 2
    assert branches.shape == (4, 1, shape["embed"]) and patches.shape == (4, patch_count, shape["embed"])
    assert summaries.shape == (4, 1, shape["embed"]) and embeddings.shape == (4, shape["context"], shape["embed"])
    assert same(branches[:, 0], theirs.encode_image(images, normalize=True))
    assert same(summaries[:, 0], theirs.encode_text(tokens, normalize=True))
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['image']}px")
def test_a_state_dict_goes_to_open_clips_names_and_back_with_nothing_lost(shape):
    theirs, overrides = reference(shape, False)
    ours = from_state_dict(theirs.state_dict(), **overrides)
    assert ours.config == CLIPConfig(
        image_size=shape["image"], patch=shape["patch"], vision_width=shape["vision"][0],
        vision_depth=shape["vision"][1], text_width=shape["text"][0], text_depth=shape["text"][1],
        context=shape["context"], vocab=shape["vocab"],
        embed=shape["embed"], **overrides)
    state, _ = to_open_clip(ours)
    missing = {name for name in theirs.state_dict() if name not in state}
    assert missing <= {"attn_mask"}
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in state.items())
    other, _ = reference(shape, False, seed=1)
    other.load_state_dict(state, strict=True)
    assert same(other.encode_image(pictures(2, shape["image"])), theirs.encode_image(pictures(2, shape["image"])), 0)
    back = from_state_dict(state, **overrides)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values(), strict=True))


@pytest.mark.parametrize("settings", [dict(branches=2), dict(corner_tokens=1), dict(text_attention="bidirectional"),
                                      dict(stem="conv")])
def test_what_clip_does_not_have_is_not_written_in_its_names(settings):
    with pytest.raises(UserError, match="open_clip.s CLIP has .*one branch, no corner tokens and causal text: this"):
        to_open_clip(CLIP(CLIPConfig(**SMALL, **settings)))


def test_a_foreign_state_dict_is_refused():
    with pytest.raises(UserError, match="not the state dict of an open_clip ViT"):
        from_state_dict({"conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize("size, name", [("base-32", "ViT-B-32"), ("base-16", "ViT-B-16"), ("large-14", "ViT-L-14")])
def test_the_last_three_sizes_are_clips(size, name):
    with torch.device("meta"):
        theirs = OpenCLIP(**open_clip.get_model_config(name))
        s = train.resolve({"size": size, "method": "clip"})
        s.vocab = 49408
        ours = CLIP(train.config_from(s))
    shapes = {k: v.shape for k, v in theirs.state_dict().items() if k != "attn_mask"}
    assert {k: v.shape for k, v in to_open_clip(ours)[0].items()} == shapes
    assert [b.attn.heads for b in (ours.visual.blocks[0], ours.text.blocks[0])] == [
        t.resblocks[0].attn.num_heads for t in (theirs.visual.transformer, theirs.transformer)]
    assert ours.config.pool == "class"


# ---- who sees whom ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("H", [2, 5])
def test_class_tokens_are_blind_to_one_another_but_patches_see_them(H):
    model = small(branches=H)
    before = first_layer(model, "visual", pictures())
    for h in range(H):
        changed = small(branches=H)
        with torch.no_grad():
            changed.visual.class_embedding[h] += torch.randn(16)
        which = moved(before, first_layer(changed, "visual", pictures()))
        assert which[:H].nonzero().flatten().tolist() == [h] and which[H:].all()


def test_a_class_token_sees_every_patch_and_itself_and_patches_see_everything():
    table = class_token_mask(3, 4)
    for q in range(7):
        for k in range(7):
            assert table[q, k] == (q >= 3 or k >= 3 or q == k)


def may_see(q, k, end, L, C, causal, blind):
    """methods.md, LoTLIP 1, sentence by sentence, for places 0..L-1 of the text (its end token at `end`) and
    L..L+C-1 the corners.
    None where nothing is said (padding as the one that looks)."""
    corner, pad = (lambda p: p >= L), (lambda p: end < p < L)
    summary = lambda p: corner(p) or p == (end if causal else 0)
    if q == k:
        return True
    if pad(q):
        return None
    if pad(k):
        return False  # "Padding is invisible."
    if causal:  # "the summary tokens stand at the END (after the text, corners then end-of-text) under the same mutual
        # blindness"
        line = [*range(end), *range(L, L + C), end]
        return line.index(k) < line.index(q) and not (blind and summary(q) and summary(k))
    if not blind:
        return True
    if corner(k):
        return False  # "the columns of ... every corner token are visible only to themselves"; "ordinary tokens
        # see ... no corner"
    if k == 0:
        return not corner(q)  # "[CLS] also to the ordinary text tokens"; "[CLS] and the corners do not see one another"
    return True  # "[CLS] and the corners see all ordinary text tokens"


@pytest.mark.parametrize("blind", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("C", [0, 1, 2, 3])
def test_the_text_mask_is_the_one_the_sentences_say(C, causal, blind):
    L, ends = 7, [1, 4, 6]
    mask = text_mask(torch.tensor(ends), L, C, causal, blind)
    assert mask.shape == (3, L + C, L + C)
    wrong = [(end, q, k) for n, end in enumerate(ends) for q in range(L + C) for k in range(L + C)
             if may_see(q, k, end, L, C, causal, blind) not in (None, bool(mask[n, q, k]))]
    assert not wrong and mask.any(-1).all()


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_corners_are_blind_to_one_another_and_to_the_summary_and_unseen_by_the_text(attention):
    tokens, C, L = texts(6, 12, 9), 3, 12
    before = first_layer(small(corner_tokens=C, text_attention=attention), "text", tokens)
    for c in range(C):
        changed = small(corner_tokens=C, text_attention=attention)
        with torch.no_grad():
            changed.text.corner_embedding[c] += torch.randn(16)
        after = first_layer(changed, "text", tokens)
        for n, length in enumerate((6, 12, 9)):  # what stands behind the end is padding
            which = (before[n] != after[n]).any(-1)
            assert which[L:].nonzero().flatten().tolist() == [c] and not which[:length].any()


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_corners_see_every_word(attention):
    model = small(corner_tokens=2, text_attention=attention)
    tokens = texts(8, width=12)
    before = first_layer(model, "text", tokens)
    for place in range(1, 7):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 5) % 37 + 1
        assert moved(before, first_layer(model, "text", other))[[12, 13, 7 if attention == "causal" else 0]].all()


@pytest.mark.parametrize("attention, seers", [("causal", [[1, 2], [2]]), ("bidirectional", [[0, 1, 2]] * 2)])
def test_without_the_corner_mask_summary_tokens_see_one_another(attention, seers):
    tokens, settings = texts(12), dict(corner_tokens=2, text_attention=attention, corner_mask=False)
    before = first_layer(small(**settings), "text", tokens)
    summary = [12, 13, 11 if attention == "causal" else 0]  # corner 0, corner 1, end or [CLS]
    for c, who in enumerate(seers):
        changed = small(**settings)
        with torch.no_grad():
            changed.text.corner_embedding[c] += torch.randn(16)
        which = moved(before, first_layer(changed, "text", tokens))[summary]
        assert which.nonzero().flatten().tolist() == sorted({c, *who})


@pytest.mark.parametrize("corners", [0, 2])
@torch.no_grad()
def test_causal_text_does_not_see_the_future(corners):
    model, tokens = small(corner_tokens=corners), texts(12)
    _, before = model.encode_text(tokens)
    for place in range(2, 11):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 5) % 37 + 1
        _, after = model.encode_text(other)
        assert torch.equal(before[:, :place], after[:, :place]) and not same(before[:, place], after[:, place], 1e-3)


# ---- padding and batches ---------------------------------------------------------------------------------------------

KINDS_OF_TEXT = [dict(), dict(corner_tokens=2), dict(corner_tokens=2, corner_mask=False),
                 dict(text_attention="bidirectional"), dict(text_attention="bidirectional", corner_tokens=2),
                 dict(text_attention="bidirectional", corner_tokens=2, corner_mask=False),
                 dict(text_attention="bidirectional", corner_tokens=2, text_style="bert")]


@pytest.mark.parametrize("settings", KINDS_OF_TEXT, ids=str)
@torch.no_grad()
def test_a_texts_embeddings_change_with_neither_padding_nor_batch_mates(settings):
    model, tokens = small(**settings), texts(6, 12, 3)
    summaries, embeddings = model.encode_text(tokens)
    for i, length in enumerate((6, 12, 3)):
        for cut in {length, min(length + 2, 12), 12}:
            alone, words = model.encode_text(tokens[i:i + 1, :cut])
            assert same(alone[0], summaries[i]) and same(words[0, :length], embeddings[i, :length])


@pytest.mark.parametrize("settings", KINDS_OF_TEXT[::2], ids=str)
@pytest.mark.parametrize("width, lengths", [
    (70, (33, 3, 64, 16, 70, 17, 32, 65, 15, 31, 63)), (70, (9, 70, 9)), (70, (5, 3)), (12, (12, 3)), (1, (1,)),
    (40, (40, 39, 17, 16))])
@torch.no_grad()
def test_texts_in_buckets_are_embedded_as_without(width, lengths, settings):
    model = small(context=70, **settings)
    tokens = texts(*lengths, width=width) if width > 1 else torch.tensor([[39]])
    summaries, embeddings = model.encode_text(tokens)
    for with_tokens in (True, False):
        quick, words = model.encode_texts(tokens, with_tokens=with_tokens)
        assert same(quick, summaries)
        if with_tokens:
            assert words.shape == embeddings.shape
            assert all(same(words[i, :n], embeddings[i, :n]) for i, n in enumerate(lengths))
        else:
            assert words is None


def varlen_reference(q, k, v, q_starts, k_starts, q_longest, k_longest, causal=False):
    """model.varlen_attention, sequence by sequence; what lies outside of all is NaN, as on a GPU it may be anything."""
    out = torch.full_like(q, torch.nan)
    assert q.shape[1:] == k.shape[1:] == v.shape[1:] and q_starts.dtype == k_starts.dtype == torch.int32
    for (a, b), (c, d) in zip(*(itertools.pairwise(starts.tolist()) for starts in (q_starts, k_starts))):
        assert 0 < b - a <= q_longest and 0 < d - c <= k_longest and (b - a == d - c or not causal)
        parts = (q[a:b], k[c:d], v[c:d])
        out[a:b] = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in parts), is_causal=causal).transpose(0, 1)
    return out


PACKED = [settings for settings in KINDS_OF_TEXT if settings.get("corner_mask", True)]


@pytest.mark.parametrize("settings", PACKED, ids=str)
@pytest.mark.parametrize("width, lengths", [
    (70, (33, 3, 64, 16, 70, 17, 32, 65, 15, 31, 63, 2)), (12, (12, 3)), (1, (1,)), (9, (5,) * 9)])
def test_packed_texts_have_the_embeddings_and_gradients_of_padded_ones(width, lengths, settings, monkeypatch):
    monkeypatch.setattr(model_module, "varlen_attention", varlen_reference)
    model = small(context=70, **settings)
    tokens = texts(*lengths, width=width) if width > 1 else torch.tensor([[39]])
    results = []
    for model.layout, known in (("padded", None), ("packed", None), ("packed", np.array(lengths))):
        summaries, words = model.encode_texts(tokens, True, known)
        words = torch.cat([row[:n] for row, n in zip(words, lengths)])
        assert same(model.encode_texts(tokens, False, known)[0], summaries)
        loss = sum((x * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).sum()
                   for x in (summaries, words))
        grads = torch.autograd.grad(loss, [*model.text.parameters()])
        results.append([summaries, words, *grads])
    for packed in results[1:]:
        assert all(same(a, b, 1e-5 + 1e-5 * float(b.abs().max())) for a, b in zip(packed, results[0], strict=True))


@pytest.mark.parametrize("settings", [*PACKED, dict(corner_tokens=1, corner_mask=False)], ids=str)
def test_packing_is_tried_before_it_is_used(settings, monkeypatch):
    model = small(context=70, **settings)
    assert model_module.packing_trouble(model, "cpu")  # there is no such kernel
    monkeypatch.setattr(model_module, "varlen_attention", varlen_reference)
    assert bool(model_module.packing_trouble(model, "cpu")) == ("corner_mask" in settings)
    unmasked = lambda *a: varlen_reference(*a[:7], causal=len(a) == 7 or not a[7])  # noqa: E731  wrong in every kind
    monkeypatch.setattr(model_module, "varlen_attention", unmasked)
    assert model_module.packing_trouble(model, "cpu")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("settings", [dict(), dict(pool="average"), dict(branches=3),
                                      dict(branches=3, branch_type="mlp", branch_layers=1)], ids=str)
@torch.no_grad()
def test_an_image_is_embedded_alike_alone_and_in_a_batch(settings):
    model = small(**settings)
    for a, b in zip(model.encode_image(pictures(4)), model.encode_image(pictures(4)[2:3])):
        assert same(a[2:3], b)


@pytest.mark.parametrize("settings", [dict(), dict(pool="average"), dict(branches=3, corner_tokens=2),
                                      dict(branches=2, branch_type="mlp", pool="average")], ids=str)
@torch.no_grad()
def test_all_embeddings_are_of_unit_norm_and_of_the_promised_shapes(settings):
    model, H, C = small(**settings), settings.get("branches", 1), settings.get("corner_tokens", 0)
    everything = [*model.encode_image(pictures(3)), *model.encode_text(texts(6, 12, 3, 4)[:, :12])]
    assert [tuple(x.shape) for x in everything] == [(3, H, 8), (3, 16, 8), (4, 1 + C, 8), (4, 12, 8)]
    assert all(x.dtype == torch.float32 and same(x.norm(dim=-1), torch.ones(x.shape[:-1])) for x in everything)


# ---- branches and pooling: the whole vision tower once more, in float64 loops over heads and tokens ------------------

def layer_norm(x, ln):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + ln.eps).sqrt() * ln.weight + ln.bias


def attend(x, attn, sees):
    """x [N,W] of one image and one stream; sees(q, k) -> bool."""
    W, d = x.shape[1], x.shape[1] // attn.heads
    q, k, v = ((x @ attn.qkv.weight[i * W:(i + 1) * W].T + attn.qkv.bias[i * W:(i + 1) * W]) for i in range(3))
    out = torch.zeros_like(x)
    for head in range(attn.heads):
        part = slice(head * d, (head + 1) * d)
        for i in range(len(x)):
            keys = [j for j in range(len(x)) if sees(i, j)]
            scores = torch.stack([q[i, part] @ k[j, part] / math.sqrt(d) for j in keys])
            weights = scores.exp() / scores.exp().sum()
            out[i, part] = sum(w * v[j, part] for w, j in zip(weights, keys))
    return out @ attn.out.weight.T + attn.out.bias


def unfolded(image, c):
    places = range(0, c.image_size, c.patch)
    return torch.stack([image[:, r:r + c.patch, l:l + c.patch].flatten() for r in places for l in places])


@torch.no_grad()
def vision(model, image):
    """One image [3,S,S] -> branches [H,D], patches [P,D], before the projection's normalisation."""
    v, c = model.visual, model.config
    if c.stem == "conv":  # 3x3 convolutions, each followed by GELU, one of stride 2 for each halving; then a 1x1
        *layers, last = [layer for layer in v.patch_embedding if hasattr(layer, "weight")]
        for layer in layers:
            image = F.conv2d(image[None], layer.weight, layer.bias, stride=layer.stride, padding=1)[0]
            image = image * 0.5 * (1 + torch.erf(image / math.sqrt(2)))
        assert [layer.stride for layer in layers].count((2, 2)) == math.log2(c.patch)
        assert image.shape[1] == c.image_size // c.patch
        patches = image.flatten(1).T @ last.weight.flatten(1).T + last.bias
    else:
        patches = unfolded(image, c) @ v.patch_embedding.weight.flatten(1).T
    patches = patches + v.positional_embedding[1:]
    classes = v.class_embedding + v.positional_embedding[0]
    T = len(classes)
    streams = [layer_norm(torch.cat([classes, patches]), v.ln_pre)]
    for depth, block in enumerate(v.blocks):
        sees = lambda q, k: q >= T or k >= T or q == k  # noqa: E731
        streams = [x + attend(layer_norm(x, block.ln_1), block.attn, sees) for x in streams]
        forks = c.branches if c.branch_type == "mlp" and depth >= c.vision_depth - c.branch_layers else 1
        if forks > len(streams):  # "at the first of these layers, after the shared attention, the stream splits in H"
            streams = streams * forks
        hidden = [layer_norm(x, block.ln_2) @ block.fc.weight.T + block.fc.bias for x in streams]
        # "the MLP's first linear layer stays shared"
        hidden = [h * 0.5 * (1 + torch.erf(h / math.sqrt(2))) for h in hidden]
        second = [block.proj[i % forks] for i in range(len(streams))]
        streams = [x + h @ proj.weight.T + proj.bias for x, h, proj in zip(streams, hidden, second)]
    streams = [layer_norm(x, v.ln_post) @ v.proj for x in streams]
    summaries = [x[T:].mean(0, keepdim=True) if c.pool == "average" else x[:T] for x in streams]
    return torch.cat(summaries), sum(x[T:] for x in streams) / len(streams)


@pytest.mark.parametrize("settings", [
    dict(), dict(pool="average", stem="conv"), dict(branches=3), dict(branches=3, branch_type="mlp", branch_layers=1),
    dict(branches=2, branch_type="mlp", branch_layers=2),
    dict(branches=2, branch_type="mlp", branch_layers=2, pool="average"),
    dict(branches=3, branch_type="mlp", branch_layers=9)], ids=str)
@torch.no_grad()
def test_class_branches_mlp_branches_and_average_pooling_are_what_the_loops_say(settings):
    model = small(vision_depth=3, **settings).double()
    images = pictures(2).double()
    branches, patches = model.encode_image(images)
    for i, image in enumerate(images):
        summary, cells = vision(model, image)
        assert same(branches[i].double(), F.normalize(summary, dim=-1), 2e-6)
        assert same(patches[i].double(), F.normalize(cells, dim=-1), 2e-6)


@pytest.mark.parametrize("kind", ["class", "mlp"])
@torch.no_grad()
def test_branches_of_equal_weights_give_equal_embeddings_and_otherwise_differ(kind):
    model = small(branches=3, branch_type=kind, branch_layers=1)
    apart, _ = model.encode_image(pictures())
    assert not same(apart[:, 0], apart[:, 1], 1e-2) and not same(apart[:, 1], apart[:, 2], 1e-2)
    if kind == "class":
        model.visual.class_embedding[:] = model.visual.class_embedding[:1].clone()
    for layer in model.visual.blocks[-1].proj:
        layer.load_state_dict(model.visual.blocks[-1].proj[0].state_dict())
    alike, _ = model.encode_image(pictures())
    assert same(alike, alike[:, :1].expand_as(alike), 1e-6)


def test_mlp_branches_share_all_but_the_second_linear_layer_of_the_last_layers():
    one, three = (small(branches=H, branch_type="mlp", branch_layers=1).state_dict() for H in (1, 3))
    own = {f"visual.blocks.1.proj.{h}.{what}" for h in (1, 2) for what in ("weight", "bias")}
    assert {name for name in three if name not in one} == own


# ---- settings and gradients ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, named", [
    (dict(image_size=18), "--image-size"), (dict(pool="average", branches=2), "--branch-type mlp"),
    (dict(vision_heads=3), "--vision-heads"), (dict(text_heads=3), "--text-heads"),
    (dict(pool="max"), "class, average"), (dict(branch_type="head"), "class, mlp"),
    (dict(text_attention="full"), "causal, bidirectional"), (dict(activation="relu"), "gelu, quickgelu"),
    (dict(branches=0), "--branches"), (dict(corner_tokens=-1), "--corner-tokens"),
    (dict(branch_layers=-1), "--branch-layers"), (dict(vision_heads=0), "--vision-heads"),
    (dict(context=0), "--context"), (dict(embed=0), "--embed"), (dict(vision_depth=0), "--vision-depth"),
    (dict(patch=0), "--patch"), (dict(stem="conv", patch=6, image_size=18), "--stem patch"),
    (dict(stem="pool"), "patch, conv"),
    (dict(text_style="bert"), "--text-attention bidirectional"), (dict(vision_style="resnet"), "clip, timm"),
    (dict(text_style="gpt"), "clip, bert"),
    (dict(text_heads=0), "--text-heads"),
    (dict(branches=3, branch_type="mlp", branch_layers=0), "--branch-layers")], ids=str)
def test_settings_that_cannot_go_together_get_one_sentence_naming_the_flag(settings, named):
    with pytest.raises(UserError) as caught:
        CLIP(CLIPConfig(**{**SMALL, **settings}))
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [*train.METHODS, "holistic mlp", "holistic M < H", "lotlip bert"])
def test_every_parameter_gets_a_gradient_with_every_method(method):
    name, *variant = method.split()
    extra = {"mlp": dict(branch_type="mlp", branch_layers=2, vision_depth=3), "M": dict(branches=3, perspectives=2),
             "bert": dict(text_style="bert", vision_style="timm", text_attention="bidirectional", text_depth=2)}
    extra = extra.get(variant[0] if variant else "", {})
    s = train.resolve({"method": name, "size": "nano", **extra})
    s.vocab = 40
    torch.manual_seed(0)
    model, T = CLIP(train.config_from(s)), len(text_slots(s))
    tokens = texts(*([12, 5, 9, 4] * T)[:8 * T], width=12)
    assert len(tokens) == 4 * T
    loss, _ = train.method_loss(model(pictures(4, 32), tokens.view(4, T, 12), s.grouping == "token"), s)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_under_bfloat16_on_the_cpu_attention_is_computed_in_float32(monkeypatch):
    seen, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, *a, **k: seen.append(q.dtype) or attention(q, *a, **k))
    model, images = CLIP(CLIPConfig(image_size=16, patch=4, vision_width=32, vision_heads=2)), torch.randn(4, 3, 16, 16)
    exact = model.encode_image(images)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.encode_image(images)[0]
    assert set(seen) == {torch.float32} and not torch.equal(exact, rounded)
    assert (exact * rounded).sum(-1).min() > 0.999
