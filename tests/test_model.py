"""The towers are open_clip's CLIP where they should be, and the parts that the papers add see, share and branch as they
define."""

import copy

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from open_clip.model import CLIP as OpenCLIP

import train
from data import UserError
from model import CLIP, CLIPConfig, from_state_dict, pack, to_open_clip
from test_data import examples

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


@torch.no_grad()
def shaken(module, by=0.05):
    """The module with every weight moved away from its initial value, also those that start at 0 or 1."""
    for p in module.parameters():
        p.add_(by * torch.randn_like(p))
    return module.eval()


def small(**settings):
    """A small model none of whose gains, biases or embeddings are at their initial value."""
    torch.manual_seed(0)
    return shaken(CLIP(CLIPConfig(**{**SMALL, **settings})), 0.1)


def a_run(folder, tokenizer="scenes", **settings):
    """The folder of a run of ours with random weights, and its model."""
    model = small(**settings)
    known = vars(model.config) | dict(method="clip", tokenizer=tokenizer, seed=0)
    torch.save(dict(settings=known, model=model.state_dict(), step=1), folder / "checkpoint.pt")
    return str(folder), model


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


# ---- CLIP, weight for weight -----------------------------------------------------------------------------------------

def reference(quick=False, image=32, context=20, vocab=300):
    """open_clip's model with random weights."""
    torch.manual_seed(0)
    vision = dict(image_size=image, patch_size=8, width=128, layers=3, head_width=64)
    text = dict(context_length=context, vocab_size=vocab, width=128, layers=2, heads=2)
    return shaken(OpenCLIP(48, vision, text, quick_gelu=quick))


@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_features_are_open_clips_whose_weights_go_there_and_back(quick):
    theirs = reference(quick)
    expected = theirs.state_dict()
    ours = from_state_dict(expected, activation="quickgelu" if quick else "gelu").eval()
    images = pictures(4, 32)
    tokens = texts(3, 20, 7, 5, vocab=300, width=20)
    assert same(ours.encode_image(images)[0][:, 0], theirs.encode_image(images, normalize=True))
    assert same(ours.encode_text(tokens)[0][:, 0], theirs.encode_text(tokens, normalize=True))
    state, _ = to_open_clip(ours)
    expected.pop("attn_mask", None)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size, name", [("base-32", "ViT-B-32"), ("base-16", "ViT-B-16"), ("large-14", "ViT-L-14")])
def test_the_last_three_sizes_are_clips(size, name):
    s = train.resolve({"size": size, "method": "clip"})
    s.vocab = 49408
    with torch.device("meta"):
        theirs = OpenCLIP(**open_clip.get_model_config(name))
        ours = CLIP(s)
    theirs.load_state_dict(to_open_clip(ours)[0], assign=True)  # strict in names and shapes
    assert ours.visual.blocks[0].attn.heads == theirs.visual.transformer.resblocks[0].attn.num_heads
    assert ours.text.blocks[0].attn.heads == theirs.transformer.resblocks[0].attn.num_heads


# ---- who sees whom ---------------------------------------------------------------------------------------------------


def may_see(q, k, end, L, C, causal, blind):
    """LoTLIP's mask sentence by sentence, for places 0..L-1 of the text (its end token at `end`) and L..L+C-1 the
    corners. None where nothing is said: padding as the one that looks."""

    corners, padding = range(L, L + C), range(end + 1, L)
    summaries = [end if causal else 0, *corners]
    if q in padding:
        return None
    if q == k:
        return True
    if k in padding:
        return False  # "Padding is invisible."
    if blind and q in summaries and k in summaries:
        return False  # "[CLS] and the corners do not see one another"
    if causal:  # "the summary tokens stand at the END (after the text, corners then end-of-text)"
        line = [*range(end), *corners, end]
        return line.index(k) < line.index(q)
    if blind and k in corners:
        return False  # "the columns of every corner token are visible only to themselves"
    return True  # "[CLS] and the corners see all ordinary text tokens"; ordinary ones see [CLS], too


@pytest.mark.parametrize("C, blind", [(0, True), (2, True), (2, False)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_place_of_a_text_changes_those_that_may_see_it_and_no_other(C, blind, causal):
    L, end = 12, 8
    attention = "causal" if causal else "bidirectional"
    model, tokens = small(corner_tokens=C, corner_mask=blind, text_attention=attention, text_depth=1), texts(end + 1)

    def places(model, tokens):
        summaries, embeddings = model.encode_text(tokens)
        return torch.cat([embeddings[0], summaries[0, 1:]])  # [L+C, D]

    before = places(model, tokens)
    for k in range(L + C):
        changed, others = copy.deepcopy(model), tokens.clone()
        if k >= L:
            changed.text.corner_embedding.data[k - L] += torch.randn(16)
        elif k != end:
            others[0, k] = others[0, k] % 37 + 1
        moved = (before != places(changed, others)).any(-1)
        for q in range(L + C):
            seen = may_see(q, k, end, L, C, causal, blind) and k != end
            assert seen in (None, bool(moved[q])), (q, k)


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
MIXED = (33, 3, 64, 16, 70, 17, 32, 65, 15, 31, 63, 2)


def loss_of(summaries, words):
    """Anything that depends on every number of summaries [N,1+C,D] and words [total,D]."""
    generator = torch.Generator().manual_seed(0)
    loss = 0
    for x in (summaries, words):
        loss = loss + (x * torch.randn(x.shape, generator=generator)).sum()
    return loss


@pytest.mark.parametrize("settings", KINDS_OF_TEXT, ids=str)
@pytest.mark.parametrize("width, lengths", [(70, MIXED), (12, (9, 3)), (1, (1,))])
def test_a_text_is_embedded_as_alone_whatever_lies_in_its_row(width, lengths, settings):
    model = small(context=70, **settings)
    tokens = texts(*lengths, width=width)
    weights = list(model.text.parameters())

    alone = [model.encode_text(row[None, :n]) for row, n in zip(tokens, lengths)]
    summaries, words = zip(*alone)
    expected = [torch.cat(summaries), torch.cat(words, 1)[0]]
    assert same(expected[1].norm(dim=-1), torch.ones(sum(lengths)))
    gradients = torch.autograd.grad(loss_of(*expected), weights)

    for known in (None, np.array(lengths)):
        summaries, words = model.encode_text(tokens, known)
        assert same(model.encode_text(tokens, known, with_tokens=False)[0], summaries)
        found = [summaries, torch.cat([row[:n] for row, n in zip(words, lengths)])]
        assert all(map(same, found, expected))
        for gradient, wanted in zip(torch.autograd.grad(loss_of(*found), weights), gradients):
            assert same(gradient, wanted, 1e-5 + 1e-5 * wanted.abs().max())


@examples(60)
@given(lengths=st.lists(st.integers(1, 130), min_size=1, max_size=60), corners=st.integers(0, 3), causal=st.booleans())
def test_texts_are_laid_side_by_side_into_rows(lengths, corners, causal):
    rows = pack(np.array(lengths), corners, causal, torch.device("cpu"))
    texts_in, places = rows.text.flatten(), rows.place.flatten()
    summary = rows.summaries + rows.text.shape[1] * torch.arange(len(rows.text))[:, None]
    taken = 0
    for text, n in enumerate(lengths):
        n_places = n + corners
        own = slice(rows.start[text], rows.start[text] + n_places)
        assert (texts_in[own] == text).all() and places[own].tolist() == list(range(n_places))
        assert len(rows.text[(rows.text == text).any(1)]) == 1  # in one row
        wanted = [n - 1 if causal else 0, *range(n, n_places)]
        assert places[summary.flatten()[rows.summary_index[text]]].tolist() == wanted
        taken += n_places
    assert (texts_in >= 0).sum() == taken


def test_under_autocast_embeddings_are_float32_and_nearly_the_same():
    model = small()
    images, tokens = pictures(2), texts(9, 5, width=9)
    expected = model(images, tokens[:, None])
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images, tokens[:, None])
    for name in ("branches", "patches", "summaries"):
        assert found[name].dtype == torch.float32
        assert F.cosine_similarity(found[name], expected[name], dim=-1).min() > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("settings", KINDS_OF_TEXT, ids=str)
def test_on_a_gpu_texts_have_the_gradients_that_they_have_on_the_cpu(settings):
    model = small(context=70, **settings)
    tokens = texts(*MIXED, width=70)
    gradients = []
    for device in ("cpu", "cuda"):
        model.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            summaries, words = model.encode_text(tokens.to(device))
        weight = model.text.blocks[0].attn.qkv.weight  # its gradient depends on all of the tower
        gradients.append(torch.autograd.grad(summaries.sum(), weight)[0].cpu())
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()


# ---- settings --------------------------------------------------------------------------------------------------------


def test_a_text_tower_that_is_berts_sees_both_ways():
    with pytest.raises(UserError, match="add --text-attention bidirectional"):
        small(text_style="bert")
