"""The losses are the papers' formulas, written here once more as float64 loops, and stay so over several processes."""
import itertools
import math
from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from csrc import fused
from losses import (
    contrastive_loss,
    diversity_loss,
    grouping_loss,
    multi_to_multi_loss,
    token_grouping_loss,
)

S = 7.25  # the same in float32 and float64
SCALE = torch.tensor(S)
NEGATIVES = ("image", "batch", "slot", "regrouped")


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=-1).to(dtype)


# ---- the formulas, in loops ------------------------------------------------------------------------------------------

def mean(values):
    return math.fsum(values) / len(values)


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b))


def logsumexp(values):
    top = max(values)
    total = math.fsum(math.exp(v - top) for v in values)
    return top + math.log(total)


def infonce(images, texts):
    """The mean over i of ½ · [CE(s·v_i·tᵀ, i) + CE(s·t_i·vᵀ, i)], for lists of vectors."""
    terms = []
    for v, t in zip(images, texts):
        row = [S * dot(v, other) for other in texts]
        column = [S * dot(other, t) for other in images]
        both = logsumexp(row) + logsumexp(column)
        terms.append(both / 2 - S * dot(v, t))
    return mean(terms)


def group(patches, text, threshold=None, allowed=None):
    """DreamLIP (2403.17007, section 3.3): the unit-norm embedding of what one text groups of one image's patches."""
    if allowed:
        patches = [patch for patch, inside in zip(patches, allowed) if inside]
    w = [dot(text, patch) for patch in patches]
    low = min(w)
    high = max(w)
    w = [(x - low) / (high - low) for x in w]
    least = 1 / len(patches) if threshold is None else threshold
    w = [x if x >= least else 0 for x in w]
    w = [x / sum(w) for x in w]
    g = [dot(w, dimension) for dimension in zip(*patches)]
    norm = math.sqrt(dot(g, g))
    return [x / norm for x in g]


def grouping(patches, texts, threshold=None, words=None, negatives="image", allowed=None):
    """Every text beside what it groups, contrasted within its image, within its slot, or within the batch.

    "regrouped", FLAIR's negatives (2412.03561): every text picks its image by what it groups in each.
    """
    groups = defaultdict(list)
    members = defaultdict(list)
    picks = []
    for i, k in itertools.product(range(len(texts)), range(len(texts[0]))):
        if words and not words[i][k]:
            continue
        text = texts[i][k]
        place = allowed[i][k] if allowed else None
        of_images = [group(of_image, text, threshold, place) for of_image in patches]
        logits = [S * dot(g, text) for g in of_images]
        picks.append(logsumexp(logits) - logits[i])
        key = {"image": i, "slot": k}.get(negatives)
        groups[key].append(of_images[i])
        members[key].append(text)
    if negatives == "regrouped":
        return mean(picks)
    return mean([infonce(groups[key], members[key]) for key in groups])


# ---- contrastive losses ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stored", [fused.MAX_STORED, 0])
def test_the_contrastive_loss_is_the_mean_of_both_cross_entropies(stored, monkeypatch):
    monkeypatch.setattr(fused, "MAX_STORED", stored)  # 0: no similarity matrix is stored
    image = unit(6, 5)
    text = unit(6, 5, seed=1)
    loss = contrastive_loss(image, text, SCALE)
    expected = infonce(image.tolist(), text.tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("matching", ["image", "text"])
@pytest.mark.parametrize("H, M, views", [(3, 3, 3), (1, 4, 4), (2, 5, 5), (2, 5, 2), (4, 2, 2), (2, 5, 1), (2, 3, 0)])
def test_text_m_belongs_to_branch_m_and_a_free_text_to_the_likest_branch(H, M, views, matching):
    """Of the other images a text meets the branch that "image" each has chosen, or that the "text"'s own image has."""
    branches = unit(4, H, 6)
    texts = unit(4, M, 6, seed=1)
    images = branches.tolist()
    terms = []
    for m in range(M):
        texts_m = texts[:, m].tolist()
        chosen = []
        for of_image, text in zip(images, texts_m):
            similarities = [dot(branch, text) for branch in of_image]
            free = views < H or m >= H
            chosen.append(similarities.index(max(similarities)) if free else m)
        for i, h in enumerate(chosen):
            row = [S * dot(images[i][h], text) for text in texts_m]
            others = chosen if matching == "image" else [h] * len(images)
            column = [S * dot(image[k], texts_m[i]) for image, k in zip(images, others)]
            terms.append((logsumexp(row) + logsumexp(column)) / 2 - row[i])
    loss = multi_to_multi_loss(branches, texts, SCALE, views, matching)
    assert loss.item() == pytest.approx(mean(terms), rel=1e-9)


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_branches_more_alike_than_0_7_cost_the_difference(spread):
    branches = F.normalize(unit(4, 1, 6) + spread * unit(4, 3, 6, seed=1), dim=-1)
    cosines = []
    for of_image in branches.tolist():
        cosines += [dot(a, b) for a, b in itertools.permutations(of_image, 2)]
    loss = diversity_loss(branches)
    assert loss.item() == pytest.approx(max(mean(cosines) - 0.7, 0), abs=1e-9)
    assert (loss > 0) == (spread < 1)


# ---- grouping --------------------------------------------------------------------------------------------------------

PATCHES = unit(3, 9, 6, seed=2)
TEXTS = unit(3, 4, 6, seed=3)
WORDS = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
ALLOWED = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(3)) < 0.6
OPTIONS = [
    dict(threshold=None, allowed=None),
    dict(threshold=0.0, allowed=None),
    dict(threshold=0.6, allowed=None),
    dict(threshold=None, allowed=ALLOWED),
    dict(threshold=0.3, allowed=ALLOWED),
]


def in_loops(options, **more):
    allowed = options["allowed"]
    places = None if allowed is None else allowed.tolist()
    expected = grouping(PATCHES.tolist(), TEXTS.tolist(), options["threshold"], allowed=places, **more)
    return pytest.approx(expected, rel=2e-5)  # EPS in the min-max


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_grouping_loss_is_the_formula(negatives, options):
    loss = grouping_loss(PATCHES, TEXTS, SCALE, negatives=negatives, **options)
    assert loss.item() == in_loops(options, negatives=negatives)


@pytest.mark.parametrize("options", OPTIONS)
def test_sparcs_loss_contrasts_the_words_of_a_caption_and_no_padding(options):
    loss = token_grouping_loss(PATCHES, TEXTS, WORDS, SCALE, **options)
    assert loss.item() == in_loops(options, words=WORDS.tolist())


# ---- gradients -------------------------------------------------------------------------------------------------------

def all_losses(image, patches, texts, scale, words=None):
    if words is None:
        words = torch.ones(texts.shape[:2], dtype=torch.bool)
        words[:, -1] = False  # padding
    allowed = patches[:, None, :, 0] >= texts[:, :, :1]
    allowed[..., 0] = True
    K = texts.shape[1]
    of_name = {
        "contrastive": contrastive_loss(image, texts[:, 0], scale),
        "multi-positive": multi_to_multi_loss(image[:, None], texts, scale, K),
        "many-to-many": multi_to_multi_loss(patches[:, :2], texts, scale, K),
        "matched by the text": multi_to_multi_loss(patches[:, :2], texts, scale, K, "text"),
        "diversity": diversity_loss(F.normalize(torch.stack([image, image + 3 * texts[:, 0]], 1), dim=-1)),
        "tokens": token_grouping_loss(patches, texts, words, scale),
    }
    for negatives in NEGATIVES:
        of_name[negatives] = grouping_loss(patches, texts, scale, negatives=negatives)
        of_name[f"{negatives}, in places"] = grouping_loss(patches, texts, scale, None, negatives, allowed)
    return of_name


def losses_and_gradients(*inputs, words=None):
    """{name: [loss, its gradients by the inputs]}"""
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = {}
    for name, loss in all_losses(*leaves, words).items():
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        results[name] = [loss.detach(), *gradients]
    return results


def test_gradients_are_those_of_finite_differences():
    def stacked(*inputs):
        return torch.stack(list(all_losses(*inputs).values()))

    inputs = [unit(2, 4), unit(2, 5, 4, seed=2), unit(2, 3, 4, seed=1), SCALE.double()]
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(stacked, inputs)


ONE = PATCHES[:1, :1]  # a patch for all
ALL = ONE.expand(3, 9, 6)
DEGENERATE = {
    "one sentence": (PATCHES, TEXTS[:, :1]),
    "one image": (PATCHES[:1], TEXTS[:1]),
    "one patch": (PATCHES[:, :1], TEXTS),
    "equal patches": (ALL, TEXTS),
    "all the same": (ALL, ALL[:, :4]),
    "opposite": (-ALL, ALL[:, :4]),
}


@pytest.mark.parametrize("worded", [True, False])
@pytest.mark.parametrize("what", DEGENERATE)
def test_degenerate_input_has_a_finite_loss_and_finite_gradients(what, worded):
    patches, texts = DEGENERATE[what]
    words = torch.full(texts.shape[:2], worded)
    words[1:] = True  # so that of several texts only the first has no words
    inputs = patches[:, 0].float(), patches.float(), texts.float(), torch.tensor(100.0)
    results = losses_and_gradients(*inputs, words=words)
    for loss, *gradients in results.values():
        assert loss.isfinite() and loss > -1e-4
        for gradient in gradients:
            assert gradient.isfinite().all() and gradient.abs().max() < 1e3


# ---- two processes ---------------------------------------------------------------------------------------------------

def global_batch():
    return unit(4, 6), unit(4, 9, 6, seed=2), unit(4, 3, 6, seed=1)


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = [x.chunk(2)[rank] for x in global_batch()]
    torch.save(losses_and_gradients(*part, SCALE.double()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_in_loss_and_gradients(tmp_path):
    mp.spawn(one_rank, (tmp_path,), nprocs=2)
    first = torch.load(tmp_path / "0.pt")
    second = torch.load(tmp_path / "1.pt")
    expected = losses_and_gradients(*global_batch(), SCALE.double())
    for name, wanted in expected.items():
        found = []
        for whole, *parts in zip(wanted, first[name], second[name]):
            joined = torch.cat(parts) if whole.dim() else sum(parts)
            found.append(joined / 2)  # DDP takes the mean of the ranks' gradients
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10, msg=name)
