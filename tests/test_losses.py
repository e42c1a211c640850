"""The losses are the papers' formulas, written here once more as float64 loops, and stay so over several processes."""
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from losses import (contrastive_loss, group_patches, grouping_loss, multi_positive_loss, multi_to_multi_loss,
                    similarity_logsumexp, token_grouping_loss)

S = 7.25  # the same in float32 and float64
SCALE = torch.tensor(S)


def unit(*shape, seed=0, dtype=torch.float64):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1).to(dtype)


# ---- the formulas, in loops ------------------------------------------------------------------------------------------

def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b))


def logsumexp(values):
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def infonce(images, texts, s=S):
    """½ · mean of the cross entropies of rows and of columns, for lists of vectors."""
    L = [[s * dot(v, t) for t in texts] for v in images]
    N = range(len(L))
    return sum(logsumexp(L[i]) + logsumexp([L[j][i] for j in N]) - 2 * L[i][i] for i in N) / (2 * len(L))


def group(patches, text, threshold=None, allowed=None):
    """methods.md, DreamLIP 3: the grouped, unit-norm embedding of one text over one image's patches."""
    patches = [p for p, here in zip(patches, allowed or [True] * len(patches)) if here]
    P = len(patches)
    w = [dot(text, p) for p in patches]
    w = [(x - min(w)) / (max(w) - min(w)) for x in w]
    least = 1 / P if threshold is None else threshold
    w = [x if x >= least else 0 for x in w]
    g = [sum(w[p] / sum(w) * patches[p][d] for p in range(P)) for d in range(len(text))]
    return [x / math.sqrt(dot(g, g)) for x in g]


def grouping(patches, texts, s=S, threshold=None, mask=None, negatives="image", allowed=None):
    """Every text beside what it groups, contrasted within its image, within its slot, or within the batch."""
    contrasts = {}
    for i, of_image in enumerate(texts):
        for k, text in enumerate(of_image):
            if mask is None or mask[i][k]:
                place = allowed[i][k] if allowed else None
                pair = group(patches[i], text, threshold, place), text
                key = {"image": i, "slot": k, "batch": 0}[negatives]
                contrasts.setdefault(key, []).append(pair)
    return sum(infonce(*zip(*pairs), s) for pairs in contrasts.values()) / len(contrasts)


def regrouping(patches, texts, s=S, threshold=None, allowed=None):
    """FLAIR's negatives (2412.03561): every text picks its image by what it groups in each."""
    terms = []
    for i, of_image in enumerate(texts):
        for k, text in enumerate(of_image):
            place = allowed[i][k] if allowed else None
            logits = [s * dot(group(p, text, threshold, place), text) for p in patches]
            terms.append(logsumexp(logits) - logits[i])
    return sum(terms) / len(terms)


def lists(options):
    return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def close(value, expected, tolerance=1e-9):
    value = value.item() if isinstance(value, torch.Tensor) else value
    return abs(value - expected) < tolerance * max(1, abs(expected))


# ---- similarity_logsumexp --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("image, text", [
    ((2, 5), (7, 5)), ((6, 4), (1, 4)), ((3, 2, 5), (3, 4, 5)), ((4, 5), (3, 2, 5)), ((3, 4, 5), (2, 5))])
def test_row_and_column_logsumexp_are_those_of_the_scaled_similarities(image, text):
    x, y = unit(*image), unit(*text, seed=1)
    rows, cols = similarity_logsumexp(x, y, SCALE)
    groups = max(len(x) if x.dim() == 3 else 1, len(y) if y.dim() == 3 else 1)
    for g in range(groups):
        a = (x[g] if x.dim() == 3 else x).tolist()
        b = (y[g] if y.dim() == 3 else y).tolist()
        by_row, by_column = rows.view(groups, -1)[g], cols.view(groups, -1)[g]
        assert len(by_row) == len(a) and len(by_column) == len(b)
        for i, v in enumerate(a):
            assert close(by_row[i], logsumexp([S * dot(v, t) for t in b]))
        for j, t in enumerate(b):
            assert close(by_column[j], logsumexp([S * dot(v, t) for v in a]))


# ---- contrastive losses ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("N", [1, 2, 6])
def test_the_contrastive_loss_is_the_mean_of_both_cross_entropies(N):
    image, text = unit(N, 5), unit(N, 5, seed=1)
    assert close(contrastive_loss(image, text, SCALE), infonce(image.tolist(), text.tolist()))


@pytest.mark.parametrize("K", [1, 3])
def test_the_multi_positive_loss_is_the_mean_over_the_slots(K):
    image, texts = unit(5, 4), unit(5, K, 4, seed=1)
    expected = sum(infonce(image.tolist(), texts[:, k].tolist()) for k in range(K)) / K
    assert close(multi_positive_loss(image, texts, SCALE), expected)


def test_the_negatives_of_a_slot_come_from_that_slot_alone():
    image, patches, texts = unit(4, 6), unit(4, 9, 6, seed=2), unit(4, 3, 6, seed=1)
    after = texts.clone()
    after[2, 1] = unit(6, seed=99)  # slot 1 of one image: the terms of slots 0 and 2 stay as they were
    change = multi_positive_loss(image, after, SCALE) - multi_positive_loss(image, texts, SCALE)
    expected = infonce(image.tolist(), after[:, 1].tolist()) - infonce(image.tolist(), texts[:, 1].tolist())
    assert abs(expected) > 1e-3 and close(3 * change, expected, 1e-5)
    change = grouping_loss(patches, after, SCALE, None, "slot") - grouping_loss(patches, texts, SCALE, None, "slot")
    terms = [grouping(patches.tolist(), t[:, 1:2].tolist(), negatives="slot") for t in (after, texts)]
    assert close(3 * change, terms[0] - terms[1], 1e-5)


def test_another_sub_caption_of_the_same_image_is_no_negative():
    image, texts = unit(4, 6), unit(4, 2, 6, seed=1)
    twin = texts.clone()
    twin[:, 1] = texts[:, 0]  # the same text in both slots of each image: no worse than once
    assert close(multi_positive_loss(image, twin, SCALE), infonce(image.tolist(), texts[:, 0].tolist()))


@pytest.mark.parametrize("H, M", [(3, 3), (1, 4), (2, 5), (4, 2), (5, 1)])
def test_text_m_belongs_to_branch_m_and_a_free_text_to_the_branch_most_like_it(H, M):
    branches, texts = unit(4, H, 6), unit(4, M, 6, seed=1)
    total = 0
    for m in range(M):
        chosen = []
        for i in range(4):
            likest = max(range(H), key=lambda h: dot(branches[i, h].tolist(), texts[i, m].tolist()))
            chosen.append(branches[i, m if M >= H and m < H else likest].tolist())
        total += infonce(chosen, texts[:, m].tolist()) / M
    assert close(multi_to_multi_loss(branches, texts, SCALE), total)


def test_one_branch_makes_many_to_many_one_to_many():
    image, texts = unit(4, 1, 6), unit(4, 3, 6, seed=1)
    s = torch.tensor(S)
    assert multi_to_multi_loss(image, texts, s) == multi_positive_loss(image[:, 0], texts, s)


# ---- grouping --------------------------------------------------------------------------------------------------------

WORDS = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
ALLOWED = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(3)) < 0.6
PATCHES, TEXTS = unit(3, 9, 6, seed=2), unit(3, 4, 6, seed=3)
OPTIONS = [{}, {"threshold": 0.0}, {"threshold": 0.6}, {"allowed": ALLOWED}, {"allowed": ALLOWED, "threshold": 0.3}]


@pytest.mark.parametrize("negatives", ["image", "batch", "slot"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_the_grouping_loss_is_the_formula(negatives, options):
    loss = grouping_loss(PATCHES, TEXTS, SCALE, negatives=negatives, **options)
    expected = grouping(PATCHES.tolist(), TEXTS.tolist(), negatives=negatives, **lists(options))
    assert close(loss, expected, 2e-5)  # EPS in the min-max


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_regrouped_negatives_are_what_the_same_text_groups_in_other_images(options):
    loss = grouping_loss(PATCHES, TEXTS, SCALE, negatives="regrouped", **options)
    assert close(loss, regrouping(PATCHES.tolist(), TEXTS.tolist(), **lists(options)), 2e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_sparcs_loss_contrasts_the_words_of_a_caption_and_no_padding(options):
    loss = token_grouping_loss(PATCHES, TEXTS, WORDS, SCALE, **options)
    expected = grouping(PATCHES.tolist(), TEXTS.tolist(), mask=WORDS.tolist(), **lists(options))
    assert close(loss, expected, 2e-5)


def test_only_regrouped_negatives_tell_an_image_that_shows_nothing_of_the_text():
    patches, texts = torch.eye(6, dtype=torch.float64).expand(3, 6, 6), unit(3, 4, 6, seed=3).abs()  # span everything
    by_text, by_image = (grouping_loss(patches, texts, torch.tensor(50.0), 0.0, negatives=n).item()
                         for n in ("image", "regrouped"))
    assert by_text < 0.1 and by_image == pytest.approx(math.log(3))  # all images are alike: the text gave it away


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5])
def test_a_text_with_a_place_weighs_no_patch_outside_it_and_groups_as_if_there_were_none(threshold):
    inside = [1, 3, 4, 8]
    allowed = torch.isin(torch.arange(9), torch.tensor(inside)).expand(3, 4, 9)
    patches = PATCHES.clone().requires_grad_()
    grouped, weights = group_patches(patches, TEXTS, threshold, allowed)
    alone, own = group_patches(PATCHES[:, inside], TEXTS, threshold)
    assert not weights[~allowed].any() and torch.allclose(weights[..., inside], own)
    assert torch.allclose(grouped, alone) and torch.allclose(weights.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    grouping_loss(patches, TEXTS, SCALE, threshold, allowed=allowed).backward()
    touched = patches.grad.any(-1).any(0)
    assert touched[inside].all() and touched.sum() == 4
    assert torch.allclose(group_patches(PATCHES, TEXTS, threshold, allowed[:, :1])[1], weights)  # one for all texts


@pytest.mark.parametrize("P", [4, 9])
def test_the_default_threshold_is_one_over_the_number_of_patches(P):
    patches = unit(3, P, 6, seed=2)
    default, *others = (grouping_loss(patches, TEXTS, SCALE, threshold=t) for t in (None, 1 / P, 0.0, 0.9))
    assert default == others[0] and abs(default - others[2]) > 1e-3


def test_the_kinds_of_negatives_differ():
    kinds = ("image", "batch", "slot", "regrouped")
    losses = [float(grouping_loss(PATCHES, TEXTS, SCALE, negatives=kind)) for kind in kinds]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-3


def test_with_negatives_of_the_image_the_images_do_not_meet():
    whole = grouping_loss(PATCHES, TEXTS, SCALE)
    alone = [grouping_loss(PATCHES[i:i + 1], TEXTS[i:i + 1], SCALE).item() for i in range(3)]
    assert close(whole, sum(alone) / 3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_padding_is_as_if_it_were_not_there(dtype, tolerance):
    patches, tokens = PATCHES.to(dtype).requires_grad_(), TEXTS.to(dtype).requires_grad_()
    words = torch.tensor([True, True, False, False]).expand(3, 4)
    scale = torch.tensor(S, dtype=dtype)
    masked = token_grouping_loss(patches, tokens, words, scale)
    dropped = token_grouping_loss(patches, tokens[:, :2], words[:, :2], scale)
    assert close(masked, dropped.item(), tolerance)
    gradients = [torch.autograd.grad(loss, (patches, tokens)) for loss in (masked, dropped)]
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=tolerance) and not a.isnan().any()


# ---- gradients -------------------------------------------------------------------------------------------------------

GRADIENTS = {
    "contrastive": lambda i, p, t, s: contrastive_loss(i, t[:, 0], s),
    "multi-positive": lambda i, p, t, s: multi_positive_loss(i, t, s),
    "many-to-many": lambda i, p, t, s: multi_to_multi_loss(p[:, :2], t, s),
    "tokens": lambda i, p, t, s: token_grouping_loss(p, t, WORDS[:2, :3], s),
    "image": lambda i, p, t, s: grouping_loss(p, t, s, negatives="image"),
    "batch": lambda i, p, t, s: grouping_loss(p, t, s, negatives="batch"),
    "slot": lambda i, p, t, s: grouping_loss(p, t, s, negatives="slot"),
    "regrouped": lambda i, p, t, s: grouping_loss(p, t, s, negatives="regrouped"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_finite_differences(name):
    inputs = unit(2, 4), unit(2, 5, 4, seed=2), unit(2, 3, 4, seed=1), torch.tensor(S, dtype=torch.float64)
    assert torch.autograd.gradcheck(GRADIENTS[name], [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
@pytest.mark.parametrize("what", [
    "one sentence", "equal patches", "one patch", "no word in a text", "no word at all", "batch of 1", "all the same",
    "opposite"])
def test_degenerate_input_has_a_finite_loss_and_finite_gradients(what, scale):
    B = 1 if what == "batch of 1" else 3
    K = 1 if what == "one sentence" else 4
    P = 1 if what == "one patch" else 9
    patches, texts = unit(B, P, 6, seed=2, dtype=torch.float32), unit(B, K, 6, dtype=torch.float32)
    words = torch.ones(B, K, dtype=torch.bool)
    if what == "equal patches":
        patches = patches[:, :1].repeat(1, P, 1)
    if what == "no word in a text":
        words[0] = False
    if what == "no word at all":
        words[:] = False
    if what in ("all the same", "opposite"):
        one = texts[:1, :1]
        patches = one.repeat(B, P, 1) * (1 if what == "all the same" else -1)
        texts = one.repeat(B, K, 1)
    patches, texts, s = patches.requires_grad_(), texts.requires_grad_(), torch.tensor(scale, requires_grad=True)
    losses = [grouping_loss(patches, texts, s, negatives=n) for n in ("image", "batch", "slot", "regrouped")]
    losses += [token_grouping_loss(patches, texts, words, s), multi_positive_loss(patches[:, 0], texts, s),
               multi_to_multi_loss(patches[:, :2], texts, s)]
    for loss in losses:
        assert loss.isfinite() and loss > -1e-4
        for grad in torch.autograd.grad(loss, (patches, texts, s), allow_unused=True, retain_graph=True):
            assert grad is None or grad.isfinite().all() and grad.abs().max() < 1e3


# ---- two processes ---------------------------------------------------------------------------------------------------

def in_places(p, t):
    return p[:, None, :, 0] >= t[:, :, :1].clamp(max=p[:, :, 0].max(1)[0].min().item())


GATHERING = GRADIENTS | {
    "many-to-many, one to one": lambda i, p, t, s: multi_to_multi_loss(p[:, :3], t, s),
    "batch, in places": lambda i, p, t, s: grouping_loss(p, t, s, negatives="batch", allowed=in_places(p, t)),
    "regrouped, in places": lambda i, p, t, s: grouping_loss(p, t, s, negatives="regrouped", allowed=in_places(p, t)),
}
del GATHERING["tokens"]  # does not gather


def loss_and_gradients(loss, *inputs):
    leaves = [x.clone().requires_grad_() for x in (*inputs, torch.tensor(S, dtype=torch.float64))]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def global_batch():
    return unit(4, 6), unit(4, 9, 6, seed=2), unit(4, 3, 6, seed=1)


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = [x[2 * rank:2 * rank + 2] for x in global_batch()]
    results = {name: loss_and_gradients(loss, *part) for name, loss in GATHERING.items()}
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(one_rank, (folder,), nprocs=2)
    return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(2)]


@pytest.mark.parametrize("name", GATHERING)
def test_two_processes_equal_one_in_loss_and_gradients(name, two_ranks):
    value, *grads, scale = loss_and_gradients(GATHERING[name], *global_batch())
    first, second = (ranks[name] for ranks in two_ranks)
    assert close((first[0] + second[0]) / 2, value.item()) and close((first[-1] + second[-1]) / 2, scale.item())
    for whole, *parts in zip(grads, first[1:-1], second[1:-1]):  # DDP takes the mean of the ranks' gradients
        assert torch.allclose(torch.cat(parts) / 2, whole, atol=1e-10)
