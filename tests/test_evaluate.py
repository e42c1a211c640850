"""Every metric is what brute force counts, chance is what guessing gives, and a perfect embedding scores 100."""
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import train
from data import SceneImages, UserError
from evaluate import evaluate_run, recall, retrieval, scene_metrics, similarity
from scenes import BACKGROUNDS, COLOURS, KINDS, article


def scores(*shape, seed=0, levels=None):
    """Random similarities; with `levels`, so few different values that many are tied."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x if levels is None else (x * levels).round() / levels


# ---- recall ----------------------------------------------------------------------------------------------------------

def brute_recall(scores, positive, k):
    """A query counts if, ties going against it, one of its positives is among the k best."""
    hits = 0
    for row, right in zip(scores.tolist(), positive.tolist()):
        order = sorted(range(len(row)), key=lambda c: (-row[c], right[c]))
        hits += any(right[c] for c in order[:k])
    return 100 * hits / len(scores)


def benchmark_recall(scores, positive, k):
    """As clip_benchmark counts it: topk, one-hot, any."""
    found = F.one_hot(scores.topk(k, 1).indices, scores.shape[1]) * positive.long()[:, None]
    return 100 * (found.sum((1, 2)) > 0).double().mean().item()


POSITIVES = {"one each": torch.eye(40, dtype=torch.bool)[torch.randperm(40, generator=torch.Generator().manual_seed(5))],
             "up to five": torch.arange(40)[:, None] // 5 == torch.arange(40)[None] // 5, "seldom": (scores(40, 40, seed=7) > 1.6) | torch.eye(40, dtype=torch.bool)}


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("name", POSITIVES)
def test_recall_is_brute_forces_and_clip_benchmarks_where_nothing_is_tied(name, levels):
    sim, positive = scores(40, 40, levels=levels), POSITIVES[name]
    for k, value in recall(sim, positive, (1, 2, 5, 10)).items():
        assert value == pytest.approx(brute_recall(sim, positive, k))
        assert value == pytest.approx(benchmark_recall(sim, positive, k)) if levels is None else True
    assert recall(torch.zeros(40, 40), positive)[1] == 0  # a model that says the same of everything finds nothing


def test_captions_that_two_images_share_are_right_for_both():
    texts = ["a", "b", "a", "c", "b", "a"]
    sim = scores(6, 6)
    rows = retrieval(sim, "short", texts)
    for direction, matrix in (("I2T", sim), ("T2I", sim.T)):
        right = torch.tensor([[a == b for b in texts] for a in texts])
        for k in (1, 5):
            assert rows[f"short {direction} R@{k}"][0] == pytest.approx(brute_recall(matrix, right, k))


@pytest.mark.parametrize("texts", [[str(i) for i in range(30)], [str(i // 3) for i in range(30)], ["same"] * 12 + [str(i) for i in range(18)]], ids=["all differ", "threes", "one often"])
def test_the_chance_of_retrieval_is_what_random_similarities_reach(texts):
    found = [retrieval(scores(30, 30, seed=seed), "x", texts) for seed in range(400)]
    for name, (_, chance) in found[0].items():
        values = [rows[name][0] for rows in found]
        assert abs(np.mean(values) - chance) < 0.25 + 4 * np.std(values) / math.sqrt(len(values)), (name, np.mean(values), chance)


@pytest.mark.parametrize("branch", ["mean", "max", "0", "2"])
def test_branches_become_one_similarity_as_mean_max_or_one_of_them(branch):
    branches, texts = (F.normalize(scores(*shape, seed=i), dim=-1) for i, shape in enumerate([(4, 3, 6), (5, 6)]))
    found = similarity(branches, texts, branch)
    for n in range(4):
        for m in range(5):
            each = [sum(a * b for a, b in zip(branches[n, h].tolist(), texts[m].tolist())) for h in range(3)]
            assert found[n, m].item() == pytest.approx({"mean": sum(each) / 3, "max": max(each), "0": each[0], "2": each[2]}[branch])


# ---- models that know everything, or nothing -------------------------------------------------------------------------

N, SIZE, KIND_COUNT = 24, 32, 12
DATA = SceneImages("test", N, SIZE, KIND_COUNT)
FACTS = [DATA.scenes.scene(i) for i in range(N)]
NAMES = [name for name, _ in KINDS[:KIND_COUNT]]


class Oracle:
    """Embeds by looking the answer up. Dimensions: images, kinds, kind-colour pairs, the sentences about one object, the background.
    patch = 1, so that a patch is a pixel and localisation can be perfect."""

    settings = dict(patch=1, image_size=SIZE, context=77)

    def __init__(self):
        self.about = {}  # sentence -> number
        for scene in FACTS:
            for text, about in zip(scene.captions["long"], scene.about):
                if about >= 0:
                    self.about.setdefault(text, len(self.about))
        self.starts = np.cumsum([0, N, KIND_COUNT, KIND_COUNT * len(COLOURS), len(self.about), 1])

    def vector(self, *hits):
        x = torch.zeros(int(self.starts[-1]))
        for block, number in hits:
            x[int(self.starts[block]) + number] = 1
        return x

    def images(self, images):
        branches = torch.stack([self.vector((0, i), (1, s.objects[0].kind), (2, s.objects[0].kind * len(COLOURS) + s.objects[0].colour)) for i, s in enumerate(FACTS)])
        patches = []
        for i, scene in enumerate(FACTS):
            _, mask = DATA.scenes.draw(scene)
            parts = [self.vector((4, 0))] + [self.vector((1, o.kind), *((3, self.about[t]) for t, a in zip(scene.captions["long"], scene.about) if a == k))
                                             for k, o in enumerate(scene.objects)]
            patches.append(torch.stack(parts)[torch.from_numpy(mask).flatten().long()])
        return F.normalize(branches, dim=-1)[:, None], torch.stack(patches)

    def texts(self, texts):
        rows = []
        for text in texts:
            shown = [(0, i) for i, s in enumerate(FACTS) if text in (s.captions["short"], " ".join(s.captions["long"]), *s.captions["long"])]
            named = [(1, k) for k, name in enumerate(NAMES) if text in {article(name), *(t.format(article(name), name) for t in evaluate.TEMPLATES)}]
            pair = [(2, k * len(COLOURS) + c) for k, name in enumerate(NAMES) for c, colour in enumerate(COLOURS) if text == f"the main object is {article(f'{colour} {name}')}."]
            ground = [(4, 0)] if text in {f"the background is plain {g}." for g in BACKGROUNDS} else []
            rows.append(self.vector(*shown, *named, *pair, *ground, *([(3, self.about[text])] if text in self.about else [])))
        return F.normalize(torch.stack(rows), dim=-1)


class Guesser(Oracle):
    """Embeds nothing but chance: images and patches at random, and every text apart from every other (backgrounds are one class)."""

    def __init__(self, seed, width):
        self.generator, self.width = torch.Generator().manual_seed(seed), width

    def images(self, images):
        return torch.randn(N, 1, self.width, generator=self.generator), torch.rand(N, SIZE * SIZE, self.width, generator=self.generator)

    def texts(self, texts):
        grounds = {f"the background is plain {g}.": 0 for g in BACKGROUNDS}
        known = {text: i for i, text in enumerate(dict.fromkeys(texts), 1)} | grounds
        return torch.eye(self.width)[[known[text] for text in texts]]


def test_a_perfect_embedding_scores_100_everywhere():
    rows, found = scene_metrics(Oracle(), DATA, "mean")
    assert {"short T2I R@1", "long I2T R@1", "long by sentence T2I R@1", "zero-shot top-1", "seen colour and object", "pointing by sentence", "pointing by name", "mIoU"} <= set(rows)
    assert {name: value for name, (value, _) in rows.items() if abs(value - 100) > 1e-9} == {}
    assert all(0 < chance < 100 for _, chance in rows.values()) and len(found["images"]) == N


def test_an_embedding_wrong_about_one_image_is_wrong_about_that_one_alone():
    class OneWrong(Oracle):
        def images(self, images):
            branches, patches = super().images(images)
            return torch.cat([branches[other:other + 1], branches[1:]]), patches
    other = next(i for i, scene in enumerate(FACTS) if scene.objects[0].kind != FACTS[0].objects[0].kind)
    rows, _ = scene_metrics(OneWrong(), DATA, "mean")
    for name in ("long I2T R@1", "zero-shot top-1"):
        assert rows[name][0] == pytest.approx(100 * (N - 1) / N)


def test_chance_is_what_guessing_reaches():
    results = []
    for seed in range(8):  # pairs of kind and colour are the most texts embedded at once: 120; sentences: under 300
        results.append(scene_metrics(Guesser(seed, 300), DATA, "mean")[0])
    for name in ("mIoU", "pointing by sentence", "pointing by name"):
        values, chance = [rows[name][0] for rows in results], np.mean([rows[name][1] for rows in results])
        assert abs(np.mean(values) - chance) < 5 * np.std(values) / math.sqrt(len(values)) + 0.05 * chance, (name, np.mean(values), chance)
    assert results[0]["zero-shot top-1"][1] == pytest.approx(100 / KIND_COUNT) and results[0]["zero-shot top-5"][1] == pytest.approx(500 / KIND_COUNT)
    for name in ("seen colour and object", "unseen colour and object"):
        assert name not in results[0] or results[0][name][1] == pytest.approx(100 / (KIND_COUNT * len(COLOURS)))


@pytest.mark.parametrize("patch", [1, 8])
def test_pointing_and_miou_are_what_loops_over_patches_and_pixels_count(patch):
    side, width = SIZE // patch, 300
    run = Guesser(3, width)
    run.settings = {**Oracle.settings, "patch": patch}
    patches = torch.rand(N, side * side, width, generator=torch.Generator().manual_seed(4))
    masks = torch.stack([torch.from_numpy(DATA.scenes.draw(s)[1]) for s in FACTS])
    embedded = [F.normalize(scores(len(s.captions["long"]), width, seed=i).float(), dim=-1) for i, s in enumerate(FACTS)]
    rows = evaluate.localisation(run, FACTS, masks, patches, embedded, NAMES)
    named, grounds = run.texts([article(n) for n in NAMES]), F.normalize(run.texts([f"the background is plain {g}." for g in BACKGROUNDS]).mean(0), dim=0)
    hits, names, chance = [], [], []
    for i, scene in enumerate(FACTS):
        for k, about in enumerate(scene.about):
            if about >= 0:
                covered = []
                for p in range(side * side):
                    r, c = divmod(p, side)
                    cell = masks[i, r * patch:(r + 1) * patch, c * patch:(c + 1) * patch]
                    covered.append(sum(v == about + 1 for v in cell.flatten().tolist()) * 16 >= patch * patch)
                hits.append(covered[max(range(len(covered)), key=lambda p: float(patches[i, p] @ embedded[i][k]))])
                names.append(covered[max(range(len(covered)), key=lambda p: float(patches[i, p] @ named[scene.objects[about].kind]))])
                chance.append(np.mean(covered))
    assert rows["pointing by sentence"] == pytest.approx((100 * np.mean(hits), 100 * np.mean(chance)))
    assert rows["pointing by name"][0] == pytest.approx(100 * np.mean(names))

    classes, meets, truths, guesses = torch.stack([grounds, *named]), *(np.zeros(KIND_COUNT + 1) for _ in range(3))
    for i, scene in enumerate(FACTS):
        maps = (patches[i] @ classes.T).T.reshape(-1, side, side)
        guess = F.interpolate(maps[None], size=(SIZE, SIZE), mode="bilinear")[0].argmax(0).numpy()
        truth = np.array([0] + [o.kind + 1 for o in scene.objects])[masks[i].numpy()]
        for c in range(KIND_COUNT + 1):
            meets[c] += ((guess == c) & (truth == c)).sum()
            truths[c] += (truth == c).sum()
            guesses[c] += (guess == c).sum()
    shown = truths > 0
    assert rows["mIoU"][0] == pytest.approx(100 * np.mean(meets[shown] / (truths + guesses - meets)[shown]))


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUN = dict(size="nano", images=32, batch=16, eval_images=0, device="cpu", workers=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rng = random.Random(0)
    with open(folder / "captions.jsonl", "w") as file:
        for i in range(60):
            Image.effect_noise((40, 48), 20 + i).convert("RGB").save(folder / f"{i}.png")
            caption = [f"text {i} of {m}" for m in range(rng.choice((1, 3, 5)))]  # some pictures have fewer perspectives than others
            file.write(json.dumps({"image": f"{i}.png", "caption": caption}) + "\n")
    train.train({**RUN, "method": "holistic", "out": str(folder / "scenes")})
    train.train({**RUN, "method": "dreamlip", "tokenizer": "scenes", "data": str(folder / "captions.jsonl"), "out": str(folder / "pictures")})
    train.train({**RUN, "method": "holistic", "tokenizer": "scenes", "data": str(folder / "captions.jsonl"), "out": str(folder / "branched")})
    return folder


@pytest.mark.parametrize("name, n, figures", [("scenes", 12, {"curves", "patches", "branches"}), ("pictures", 100, {"curves", "patches"}), ("branched", 100, {"curves", "patches", "branches"})])
def test_a_run_gets_its_table_its_json_and_its_figures(name, n, figures, runs, capsys):
    rows = evaluate_run(runs / name, n=n, device="cpu")
    written = json.loads((runs / name / "evaluation.json").read_text())
    assert {k: (v["value"], v["chance"]) for k, v in written["metrics"].items()} == rows and written["branch"] == "mean"
    assert written["images"] == n if name == "scenes" else 0 < written["images"] < 30  # the validation part alone
    assert all(0 <= value <= 100 and 0 < chance <= 100 for value, chance in rows.values())
    assert {p.stem for p in (runs / name).glob("*.png")} == figures
    for path in (runs / name).glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5
    table = capsys.readouterr().out
    assert all(f"| {metric} | {value:.1f} | {chance:.1f} |" in table for metric, (value, chance) in rows.items())


def test_evaluation_is_deterministic_and_leaves_no_figures_if_told(runs, tmp_path):
    train.train({**RUN, "method": "clip", "out": str(tmp_path / "run")})
    first, second = (evaluate_run(tmp_path / "run", n=12, figures=False, device="cpu") for _ in range(2))
    assert first == second and not list((tmp_path / "run").glob("*.png"))


def test_the_averaged_weights_are_the_ones_evaluated(tmp_path):
    train.train({**RUN, "method": "clip", "ema": 0.5, "out": str(tmp_path / "run")})
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    model = evaluate.Run(tmp_path / "run", "cpu").model
    assert all(torch.equal(p, a) for p, a in zip(model.parameters(), checkpoint["average"], strict=True))
    assert not all(torch.equal(p, checkpoint["model"][name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("branch", ["mean", "max", "0", "4"])
def test_a_branch_or_their_mean_or_max_can_be_evaluated(branch, runs):
    rows = evaluate_run(runs / "scenes", n=40, branch=branch, figures=False, device="cpu")
    run, data = evaluate.Run(runs / "scenes", "cpu"), SceneImages("test", 40, SIZE, KIND_COUNT)
    with torch.no_grad():
        branches, _ = run.images(torch.stack([data[i][0] for i in range(40)]))
        texts = run.texts([data[i][1].short[0] for i in range(40)])
    each = torch.stack([branches[:, h] @ texts.T for h in range(5)])
    sim = {"mean": each.mean(0), "max": each.amax(0)}.get(branch)
    positive = torch.tensor([[data[i][1].short == data[j][1].short for j in range(40)] for i in range(40)])
    assert rows["short I2T R@10"][0] == pytest.approx(brute_recall(each[int(branch)] if sim is None else sim, positive, 10))


def test_a_branch_that_is_not_there_is_refused(runs):
    for branch in ("5", "-1", "best"):
        with pytest.raises(UserError, match=f"--branch {branch}: this model has 5 branches"):
            evaluate_run(runs / "scenes", n=4, branch=branch, device="cpu")
