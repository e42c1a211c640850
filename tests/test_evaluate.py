"""Every metric is what brute force and CLIP_benchmark count, chance is what guessing gives, a perfect embedding scores
100, every layout pairs the right pictures and texts, and every mistake ends in one sentence."""
import json
import math
import os
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image

import evaluate
import train
from data import MEAN, STD, UserError
from evaluate import BENCHMARKS, LAYOUTS, TORCHVISION, Model, evaluate_run, ranks, retrieval, scene_metrics, similarity
from model import text_mask
from scenes import BACKGROUNDS, COLOURS, KINDS, Scenes, article

# CLIP_benchmark 1.6.2 calls float() on arrays of one number, which numpy 2.4 no longer takes
zeroshot_classification.float = lambda x: x.item() if hasattr(x, "item") else float(x)


def scores(*shape, seed=0, levels=None):
    """Random similarities; with `levels`, so few different values that many are tied."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x if levels is None else (x * levels).round() / levels


# ---- metrics against brute force -------------------------------------------------------------------------------------

def brute_rank(row, right):
    """Places in front of the first right candidate when, among equals, the right ones stand last."""
    order = sorted(range(len(row)), key=lambda c: (-row[c], right[c]))
    return next(place for place, c in enumerate(order) if right[c])


GROUPS = {"one each": torch.randperm(40, generator=torch.Generator().manual_seed(5)), "fives": torch.arange(40) // 5,
          "some often": torch.tensor([0] * 12 + list(range(28)))}


@pytest.mark.parametrize("block", [1 << 25, 90, 1])
@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("name", GROUPS)
def test_ranks_are_brute_forces_in_blocks_of_any_size(name, levels, block, monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK", block)
    sim, of = scores(40, 40, levels=levels), GROUPS[name]
    found = ranks(sim, torch.eye(40, dtype=torch.float64), of, of)  # against the unit vectors, sim are the similarities
    right = (of[:, None] == of[None]).tolist()
    assert found.tolist() == [brute_rank(row, r) for row, r in zip(sim.tolist(), right)]


def test_a_model_that_says_the_same_of_everything_or_nothing_at_all_finds_nothing():
    for value in (0.0, 1.0, float("nan")):
        rows = retrieval(torch.full((20, 4), value), torch.full((20, 4), value), torch.arange(20), torch.arange(20))
        assert all(rows[f"{way} R@10"][0] == 0 and rows[f"{way} median rank"][0] == 20 for way in ("T2I", "I2T"))


@pytest.mark.parametrize("of", [torch.arange(30), torch.arange(30) // 3, torch.tensor([0] * 12 + list(range(1, 19)))],
                         ids=["all differ", "threes", "one often"])
def test_the_chance_of_retrieval_is_what_random_similarities_reach(of):
    eye = torch.eye(30, dtype=torch.float64)
    found = [retrieval(scores(30, 30, seed=seed), eye, of, of) for seed in range(400)]
    for name, (_, chance) in found[0].items():
        values = [rows[name][0] for rows in found]
        slack = 1 if "rank" in name else 0.25
        assert abs(np.mean(values) - chance) < slack + 4 * np.std(values) / math.sqrt(len(values)), (name, chance)


@pytest.mark.parametrize("C, m, k", [(30, 1, 5), (30, 4, 5), (7, 3, 5), (5, 5, 1), (1000, 5, 10)])
def test_the_chance_of_recall_is_the_count_of_draws(C, m, k):
    expected = 100 * (1 - math.comb(C - m, k) / math.comb(C, k))
    assert evaluate.chance_recall(torch.tensor([m, m]), C, k) == pytest.approx(expected)


@pytest.mark.parametrize("branch", ["mean", "max", "0", "2"])
def test_branches_become_one_similarity_as_mean_max_or_one_of_them(branch):
    branches, texts = (F.normalize(scores(*shape, seed=i), dim=-1) for i, shape in enumerate([(4, 3, 6), (5, 6)]))
    found = similarity(Model.merge(SimpleNamespace(branch=branch), branches), texts)
    for n in range(4):
        for m in range(5):
            each = [sum(a * b for a, b in zip(branches[n, h].tolist(), texts[m].tolist())) for h in range(3)]
            expected = {"mean": sum(each) / 3, "max": max(each), "0": each[0], "2": each[2]}[branch]
            assert found[n, m].item() == pytest.approx(expected)


# ---- metrics against CLIP_benchmark ----------------------------------------------------------------------------------

class Given:
    """A model for CLIP_benchmark that embeds pictures and texts by looking them up."""

    def __init__(self, images, texts):
        self.encode_image, self.encode_text = (lambda i: images[i]), (lambda i: texts[i])


@pytest.mark.parametrize("per_image", [1, 5, None], ids=["one caption", "five captions", "1 to 6 captions"])
def test_retrieval_is_clip_benchmarks(per_image):
    rng, n = random.Random(0), 60
    owner = torch.tensor([i for i in range(n) for _ in range(per_image or rng.randint(1, 6))])
    images = F.normalize(scores(n, 16).float(), dim=-1)
    texts = F.normalize(images[owner] + 0.4 * scores(len(owner), 16, seed=1).float(), dim=-1)
    captions = [(owner == i).nonzero().flatten().tolist() for i in range(n)]
    loader = [(torch.arange(n)[i:i + 20], captions[i:i + 20]) for i in range(0, n, 20)]
    theirs = zeroshot_retrieval.evaluate(Given(images, texts), loader, torch.tensor, "cpu", False, [1, 5, 10])
    ours = retrieval(images, texts, torch.arange(n), owner)
    for k in (1, 5, 10):
        for way, name in (("T2I", "image"), ("I2T", "text")):
            assert ours[f"{way} R@{k}"][0] / 100 == pytest.approx(theirs[f"{name}_retrieval_recall@{k}"], abs=1e-6)
    assert 5 < ours["T2I R@1"][0] < 95


@pytest.mark.parametrize("C", [3, 5, 12])
def test_classification_is_clip_benchmarks(C):
    n, T = 200, 3
    target = torch.randint(0, C, (n,), generator=torch.Generator().manual_seed(0)) % (C - 1)  # one class does not occur
    prompts = F.normalize(scores(C, T, 16, seed=1).float(), dim=-1)
    images = F.normalize(prompts[target].mean(1) + 0.5 * scores(n, 16, seed=2).float(), dim=-1)

    class Loader(list):
        dataset = SimpleNamespace(classes=range(C))

    loader = Loader((torch.arange(n)[i:i + 50], target[i:i + 50]) for i in range(0, n, 50))
    names, templates = [str(c) for c in range(C)], [f"{t} {{c}}" for t in range(T)]
    tokenizer = lambda texts: torch.tensor([[int(word) for word in text.split()] for text in texts])  # noqa: E731
    model = Given(images, None)
    model.encode_text = lambda tokens: prompts[tokens[:, 1], tokens[:, 0]]
    theirs = zeroshot_classification.evaluate(model, loader, tokenizer, names, templates, "cpu", False)
    ours = evaluate.classification(images, F.normalize(prompts.mean(1), dim=-1), target)
    for mine, name in (("top-1", "acc1"), ("top-5", "acc5"), ("mean per class", "mean_per_class_recall")):
        if mine in ours:
            assert ours[mine][0] / 100 == pytest.approx(theirs[name], abs=1e-6)
    assert ("top-5" in ours) == (C >= 5) and 20 < ours["top-1"][0] < 95


# ---- models that know everything, or nothing -------------------------------------------------------------------------

N, SIZE, KIND_COUNT = 24, 32, 12
SCENES = Scenes("test", N, SIZE, KIND_COUNT)
FACTS = [SCENES.scene(i) for i in range(N)]
NAMES = [name for name, _ in KINDS[:KIND_COUNT]]


class Oracle:
    """Embeds by looking the answer up. Dimensions: images, kinds, kind-colour pairs, the sentences about one object,
    the background. A patch is a pixel, so localisation can be perfect."""

    settings, side, branch, merge = dict(threshold=0.99), SIZE, "mean", Model.merge

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

    def image(self, i):
        main = FACTS[i].objects[0]
        branch = self.vector((0, i), (1, main.kind), (2, main.kind * len(COLOURS) + main.colour))
        cells = [self.vector((4, 0))]
        for k, o in enumerate(FACTS[i].objects):
            about = [t for t, a in zip(FACTS[i].captions["long"], FACTS[i].about) if a == k]
            cells.append(self.vector((1, o.kind), *((3, self.about[t]) for t in about)))
        mask = torch.from_numpy(SCENES.draw(FACTS[i])[1]).flatten().long()
        return F.normalize(branch, dim=-1), torch.stack(cells)[mask]

    def batches(self, samples):
        for start in range(0, len(samples), 10):
            _, *rest = zip(*(samples[i] for i in range(start, min(start + 10, len(samples)))))
            branches, patches = zip(*(self.image(i) for i in rest[-1]))
            yield torch.stack(branches)[:, None], torch.stack(patches), *map(list, rest)

    def texts(self, texts):
        rows = []
        grounds = {f"the background is plain {g}." for g in BACKGROUNDS}
        for text in texts:
            shown = [(0, i) for i, s in enumerate(FACTS)
                     if text in (s.captions["short"], " ".join(s.captions["long"]), *s.captions["long"])]
            named = [(1, k) for k, name in enumerate(NAMES)
                     if text in {article(name), *(t.format(article(name), name) for t in evaluate.SCENE_PROMPTS)}]
            pair = [(2, k * len(COLOURS) + c) for k, name in enumerate(NAMES) for c, colour in enumerate(COLOURS)
                    if text == f"the main object is {article(f'{colour} {name}')}."]
            sentence = [(3, self.about[text])] if text in self.about else []
            rows.append(self.vector(*shown, *named, *pair, *([(4, 0)] if text in grounds else []), *sentence))
        return F.normalize(torch.stack(rows), dim=-1)


class Guesser(Oracle):
    """Embeds nothing but chance: images and patches at random, and every text apart from every other (backgrounds are
    one class)."""

    def __init__(self, seed, width):
        self.generator, self.width = torch.Generator().manual_seed(seed), width

    def image(self, i):
        return (torch.randn(self.width, generator=self.generator),
                torch.rand(self.side ** 2, self.width, generator=self.generator))

    def texts(self, texts):
        grounds = {f"the background is plain {g}.": 0 for g in BACKGROUNDS}
        known = {text: i for i, text in enumerate(dict.fromkeys(texts), 1)} | grounds
        return torch.eye(self.width)[[known[text] for text in texts]]


def test_a_perfect_embedding_scores_100_everywhere():
    rows, found = scene_metrics(Oracle(), SCENES)
    assert {"short T2I R@1", "long I2T R@1", "long by sentence T2I R@1", "zero-shot top-1", "seen colour and object",
            "pointing by sentence", "pointing by name", "grouped by sentence", "mIoU"} <= set(rows)
    for name in ("patches grouped", "patches alike", "group finds its sentence",
                 "group finds its sentence, wrong image"):  # they describe, and have no best value
        del rows[name]
    perfect = {name: 1 if "rank" in name else 100 for name in rows}
    assert {name: value for name, (value, _) in rows.items() if abs(value - perfect[name]) > 1e-4} == {}
    assert all(0 < chance < 100 for _, chance in rows.values()) and len(found["captions"]) == N


def test_an_embedding_wrong_about_one_image_is_wrong_about_that_one_alone():
    other = next(i for i, scene in enumerate(FACTS) if scene.objects[0].kind != FACTS[0].objects[0].kind)

    class OneWrong(Oracle):
        def image(self, i):
            return super().image(other)[0] if i == 0 else super().image(i)[0], super().image(i)[1]

    rows, _ = scene_metrics(OneWrong(), SCENES)
    for name in ("long I2T R@1", "zero-shot top-1"):
        assert rows[name][0] == pytest.approx(100 * (N - 1) / N)


def test_chance_is_what_guessing_reaches():
    results = [scene_metrics(Guesser(seed, 300), SCENES)[0] for seed in range(8)]
    for name in ("mIoU", "pointing by sentence", "pointing by name", "grouped by sentence"):
        values, chance = [rows[name][0] for rows in results], np.mean([rows[name][1] for rows in results])
        assert abs(np.mean(values) - chance) < 5 * np.std(values) / math.sqrt(len(values)) + 0.05 * chance, name
    rows = results[0]
    assert rows["zero-shot top-1"][1] == pytest.approx(100 / KIND_COUNT)
    assert rows["zero-shot top-5"][1] == pytest.approx(500 / KIND_COUNT)
    for name in ("seen colour and object", "unseen colour and object"):
        assert name not in rows or rows[name][1] == pytest.approx(100 / (KIND_COUNT * len(COLOURS)))


@pytest.mark.parametrize("patch", [1, 8])
def test_pointing_and_miou_are_what_loops_over_patches_and_pixels_count(patch):
    side, model = SIZE // patch, Guesser(3, 300)
    model.side = side
    patches = F.normalize(torch.rand(N, side * side, 300, generator=torch.Generator().manual_seed(4)), dim=-1)
    masks = torch.stack([torch.from_numpy(SCENES.draw(s)[1]) for s in FACTS])
    embedded = [F.normalize(scores(len(s.captions["long"]), 300, seed=i).float(), dim=-1) for i, s in enumerate(FACTS)]
    centre = scores(300, seed=99).float()
    place = evaluate.Places(model, NAMES, centre)
    for part in (slice(0, 10), slice(10, N)):
        place.add(patches[part], masks[part], FACTS[part], embedded[part])
    rows = place.rows()
    named = model.texts([article(n) for n in NAMES])
    grounds = F.normalize(model.texts([f"the background is plain {g}." for g in BACKGROUNDS]).mean(0), dim=0)
    hits, names, centred, grouped, dense, chance, finds, finds_wrong = ([] for _ in range(8))
    for i, scene in enumerate(FACTS):
        sims = (patches[i] @ embedded[i].T).double()
        sims = (sims - sims.amin(0)) / (sims.amax(0) - sims.amin(0))
        dense.append((sims >= 0.99).double().mean())
        wrong = patches[i - 1 if i not in (0, 10) else 9 if i == 0 else N - 1]  # the one before, in its part
        for cells, found in ((patches[i], finds), (wrong, finds_wrong)):
            sims = (cells @ embedded[i].T).double()
            sims = (sims - sims.amin(0)) / (sims.amax(0) - sims.amin(0))
            groups = F.normalize((sims * (sims >= 0.99)).T @ cells.double(), dim=-1)
            near = groups @ embedded[i].double().T
            found.append(np.mean([int(near[k].argmax()) == k for k in range(len(near))]))
        for k, about in enumerate(scene.about):
            if about >= 0:
                covered = []
                for p in range(side * side):
                    r, c = divmod(p, side)
                    cell = masks[i, r * patch:(r + 1) * patch, c * patch:(c + 1) * patch]
                    covered.append(sum(v == about + 1 for v in cell.flatten().tolist()) * 16 >= patch * patch)
                near = (patches[i] @ embedded[i][k]).tolist()
                name = (patches[i] @ named[scene.objects[about].kind]).tolist()
                less = [(cell @ embedded[i][k] - cell @ centre).item() for cell in patches[i]]
                centred.append(covered[less.index(max(less))])
                hits.append(covered[near.index(max(near))])
                names.append(covered[name.index(max(name))])
                low, high = min(near), max(near)  # methods.md, DreamLIP 3
                weights = [(x - low) / (high - low) for x in near]
                weights = [w if w >= 0.99 else 0 for w in weights]
                grouped.append(sum(w for w, on in zip(weights, covered) if on) / sum(weights))
                chance.append(np.mean(covered))
    assert rows["pointing by sentence"] == pytest.approx((100 * np.mean(hits), 100 * np.mean(chance)))
    assert rows["pointing by name"][0] == pytest.approx(100 * np.mean(names))
    assert rows["pointing by sentence, centred"][0] == pytest.approx(100 * np.mean(centred), abs=100 / len(hits))
    assert rows["grouped by sentence"][0] == pytest.approx(100 * np.mean(grouped), abs=1e-3)
    assert rows["patches grouped"][0] == pytest.approx(100 * np.mean(dense), abs=1e-3)
    one = 100 * np.mean([1 / len(sentences) for sentences in embedded])
    assert rows["group finds its sentence"] == pytest.approx((100 * np.mean(finds), one))
    assert rows["group finds its sentence, wrong image"] == pytest.approx((100 * np.mean(finds_wrong), one))
    others = ~torch.eye(side ** 2, dtype=torch.bool)
    alike = [(x @ x.T)[others].mean().item() for x in patches]
    assert rows["patches alike"][0] == pytest.approx(100 * np.mean(alike), rel=1e-4)

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


class Reader:
    """Embeds a caption as the mean of the sentences it reads: the first `span`, or all. Sentences are orthogonal."""

    def __init__(self, span=99):
        self.span, self.known = span, {}

    def vector(self, sentences):
        numbers = [self.known.setdefault(s, len(self.known)) for s in sentences[:self.span]]
        return F.normalize(torch.eye(400)[numbers].mean(0), dim=0)

    def texts(self, texts):
        return torch.stack([self.vector(re.findall(r"\d+ \d+", text)) for text in texts])


@pytest.mark.parametrize("span", [3, 99])
def test_the_reading_probe_sees_how_far_into_a_caption_a_model_reads(span):
    captions = [{"long": [f"{i} {k}" for k in range(6)]} for i in range(12)]
    whole, model = Reader(), Reader(span)
    model.known = whole.known
    images = torch.stack([whole.vector(c["long"]) for c in captions])[:, None]
    found = evaluate.reading(model, images, captions)
    assert [place for place, _ in found["place"]] == [1, 2, 3, 4, 5, 6]
    for place, accuracy in found["place"]:
        assert accuracy == (100 if place <= span else 50)  # captions that are alike to it are a coin's toss
    assert [row[0] for row in found["length"]] == [1, 2, 3, 4, 6] and all(row[1] == 100 for row in found["length"])


# ---- published layouts -----------------------------------------------------------------------------------------------

class Grey:
    """A model of pictures in one grey each and texts with one number each: picture 10·k and text "... k ..." agree."""

    config, side, settings, branch, merge = SimpleNamespace(image_size=16), 2, {}, "mean", Model.merge
    batches = Model.batches

    def __init__(self):
        self.batch, self.workers, self.device, self.on_gpu, self.said = 7, 0, "cpu", False, []

    autocast = Model.autocast

    class clip:
        @staticmethod
        def encode_image(images):
            values = (images[:, :1] * STD[0] + MEAN[0]) * 25.5
            cells = F.adaptive_avg_pool2d(values, 2).flatten(1).round().long().clamp(0, 39)
            return torch.eye(40)[cells[:, :1]], torch.eye(40)[cells]

    images = Model.images

    def texts(self, texts):
        self.said += texts
        return torch.eye(40)[[int(re.search(r"\d+", text)[0]) for text in texts]]


def picture(path, k, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10 * k,) * 3).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = isinstance(content, list) and "jsonl" in path.suffix
    path.write_text("\n".join(map(json.dumps, content)) if lines else content if isinstance(content, str) else
                    json.dumps(content))


def lay_out(name, root, n=12):
    """The data set's published layout with n pictures; whatever is not part of the benchmark says 39."""
    if name in ("coco", "flickr30k"):
        folder = {"coco": "val2014", "flickr30k": "flickr30k-images"}[name]
        where = dict(filepath=folder) if name == "coco" else {}
        images = [dict(filename=f"{k}.png", split="test" if k < n else "train", **where,
                       sentences=[dict(raw=f"this is {k if j < 5 and k < n else 39}") for j in range(6)])
                  for k in range(n + 2)]
        write(root / f"dataset_{name}.json", dict(images=images))
    elif name == "urban1k":
        folder = "image"
        for k in range(n):
            picture(root / f"image/{k}.jpg", k)
            write(root / f"caption/{k}.txt", f"a street, {k}\nmore 39")
        return
    elif name == "dci":
        folder = "densely_captioned_images/photos"
        write(root / "densely_captioned_images/splits.json", dict(train=[f"{k}.json" for k in range(3)],
                                                                  test=[f"{k}.json" for k in range(3, n)]))
        for k in range(n):
            write(root / f"densely_captioned_images/annotations/{k}.json",
                  dict(image=f"{k}.png", short_caption=f"number {k}", extra_caption="and more"))
    elif name == "iiw":
        for k in range(n):
            folder = ("dci", "docci", "docci_aar")[k % 3]
            picture(root / folder / f"p{k}.jpg", k)
        for i, sub in enumerate(("DCI_Test", "DOCCI_Test", "IIW-400")):
            key = "image" if i < 2 else "image/key"
            write(root / sub / "data.jsonl", [{key: f"p{k}" + ".jpg" * (i < 1), "IIW": f"long {k}"}
                                              for k in range(i, n, 3)])
        return
    elif name == "docci":
        folder = "images"
        write(root / "docci_descriptions.jsonlines", [dict(split="test" if k < n else "train", image_file=f"{k}.png",
              description=f"it has {k if k < n else 39}") for k in range(n + 2)])
    elif name.startswith("share4v"):
        folder = "sam/images"
        write(root / "share4v_sam_10k.json", [dict(image=f"sam/images/{k}.png", conversations=[
            dict(value="what is 39?"), dict(value=f"it is {k}")]) for k in range(n)])
    else:
        folder = "pictures"
        rows = [dict(image=f"pictures/{k}.png", caption=[f"{k}", f"again {k}"] if k % 2 else f"{k}") for k in range(n)]
        write(root / "captions.jsonl", [*rows, dict(image="pictures/1.png", caption="once more 1")])
    for k in range(n):
        picture(root / folder / f"{k}.png", k)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_published_layout_pairs_the_right_pictures_and_texts(name, tmp_path):
    lay_out(name, tmp_path)
    model = Grey()
    rows = BENCHMARKS[name](model, tmp_path)
    assert rows["T2I R@1"][0] == rows["I2T R@1"][0] == 100 and not any("39" in text for text in model.said)
    assert len(model.said) == {"coco": 60, "flickr30k": 60, "jsonl": 19}.get(name, 12)
    assert rows["T2I R@1"][1] == pytest.approx(100 / 12)


@pytest.mark.parametrize("name, spoil, words", [
    ("coco", lambda root: (root / "dataset_coco.json").unlink(), "no dataset_"),
    ("coco", lambda root: write(root / "dataset_coco.json", [1]), "not laid out as coco"),
    ("coco", lambda root: (root / "dataset_coco.json").write_text("{"), "cannot read .*dataset_coco.json"),
    ("coco", lambda root: (root / "val2014/3.png").unlink(), "no picture .*3.png"),
    ("coco", lambda root: (root / "val2014/3.png").write_text("x"), "3.png.*needs all its pictures"),
    ("urban1k", lambda root: (root / "caption/3.txt").write_text(""), "image/3.jpg has an empty caption or none"),
    ("urban1k", lambda root: (root / "caption").rename(root / "captions"), "has no captions"),
    ("dci", lambda root: (root / "densely_captioned_images/annotations/3.json").unlink(), "cannot read .*3.json"),
    ("docci", lambda root: write(root / "docci_descriptions.jsonlines", [dict(split="test")]), "not laid out as docci"),
    ("jsonl", lambda root: write(root / "captions.jsonl", [dict(image="a.png", caption=3)]), "not laid out as jsonl"),
])
def test_a_layout_that_is_wrong_ends_in_a_sentence(name, spoil, words, tmp_path):
    lay_out(name, tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        BENCHMARKS[name](Grey(), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_picture_that_a_worker_finds_ends_in_the_same_sentence(tmp_path):
    lay_out("coco", tmp_path)
    (tmp_path / "val2014/3.png").write_text("x")
    model = Grey()
    model.workers = 1
    with pytest.raises(UserError, match="^image will not decode: .*3.png.*needs all its pictures$") as caught:
        BENCHMARKS["coco"](model, tmp_path)
    assert "\n" not in str(caught.value)


# ---- zero-shot classification on folders and torchvision's sets ------------------------------------------------------

def class_folders(root, n=6):
    for k in range(n):
        for i in range(k % 3 + 1):
            picture(root / f"class_{k}" / f"{i}.png", k)


def test_any_folder_of_class_folders_is_classified_by_its_class_names(tmp_path):
    class_folders(tmp_path)
    model = Grey()
    rows = BENCHMARKS["imagefolder"](model, tmp_path)
    assert rows["top-1"] == (100, pytest.approx(100 / 6)) and rows["mean per class"][0] == 100
    assert "a photo of a class 3." in model.said and len(model.said) == 6 * len(evaluate.TEMPLATES)
    (tmp_path / "classnames.txt").write_text("\n".join(f"thing {k}" for k in (0, 1, 2, 3, 5, 4)))
    rows = BENCHMARKS["imagefolder"](model, tmp_path)  # the names of the last two classes are changed over: 2 + 3 of 12
    assert rows["top-1"][0] == pytest.approx(100 * 7 / 12) and rows["mean per class"][0] == pytest.approx(100 * 4 / 6)
    (tmp_path / "classnames.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match="names 2 classes, but the pictures have 6"):
        BENCHMARKS["imagefolder"](model, tmp_path)
    with pytest.raises(UserError, match="no folder of class folders"):
        BENCHMARKS["imagefolder"](model, tmp_path / "class_1")


def test_torchvisions_sets_are_read_as_torchvision_lays_them_out(tmp_path):
    names = [f"dish_{k}" for k in range(6)]
    for split, i in (("train", 0), ("test", 1)):
        write(tmp_path / f"food-101/meta/{split}.json", {name: [f"{name}/{i}"] for name in names})
        for k, name in enumerate(names):
            picture(tmp_path / f"food-101/images/{name}/{i}.jpg", k if split == "test" else 39)
    model = Grey()
    assert BENCHMARKS["food101"](model, tmp_path)["top-1"][0] == 100
    assert "a photo of a dish 3, a type of food." in model.said
    for k in range(6):
        picture(tmp_path / f"country211/test/A{k}/0.png", k)
    with pytest.raises(UserError, match="country211 knows its classes by codes"):
        BENCHMARKS["country211"](model, tmp_path)
    (tmp_path / "classnames.txt").write_text("\n".join(f"land {k}" for k in range(6)))
    assert BENCHMARKS["country211"](model, tmp_path)["top-1"][0] == 100


@pytest.mark.parametrize("name", [*TORCHVISION, "voc", "imagenet"])
def test_a_set_that_is_not_there_is_not_downloaded_but_named(name, tmp_path):
    with pytest.raises(UserError, match="nothing is downloaded here|no folder of class folders") as caught:
        BENCHMARKS[name](Grey(), tmp_path)
    assert "\n" not in str(caught.value)


def test_imagenet_has_torchvisions_1000_names(tmp_path):
    for k in range(1000):
        (tmp_path / f"val/n{k:08d}").mkdir(parents=True)
        if k in (1, 999):
            picture(tmp_path / f"val/n{k:08d}/0.png", 0, (2, 2))
    with pytest.raises(UserError, match="998|n00000000"):  # torchvision wants a picture in every class
        BENCHMARKS["imagenet"](Grey(), tmp_path)
    assert evaluate.ResNet50_Weights.DEFAULT.meta["categories"][1] == "goldfish"


# ---- segmentation ----------------------------------------------------------------------------------------------------

def test_voc_is_counted_as_loops_over_its_pixels_do(tmp_path):
    """Two pictures of 2 × 2 fields in greys that are class numbers; the model's four patches know the greys."""
    root, greys = tmp_path / "VOCdevkit/VOC2012", ([[3, 3], [3, 25]], [[7, 25], [12, 12]])  # 25: stuff
    write(root / "ImageSets/Segmentation/val.txt", "a\nb")
    masks = []
    for name, fields in zip("ab", greys):
        big = np.kron(np.array(fields), np.ones((8, 8), int))
        (root / "JPEGImages").mkdir(exist_ok=True)
        (root / "SegmentationClass").mkdir(exist_ok=True)
        grey = Image.fromarray((10 * big).clip(0, 255).astype(np.uint8))
        grey.convert("RGB").save(root / f"JPEGImages/{name}.jpg", quality=100)
        mask = np.where(big == 25, 0, big).astype(np.uint8)  # 0: background
        mask[:3, :3] = 255  # not counted
        mask[4, 4] = 5  # a class that the model does not see
        masks.append(mask)
        Image.fromarray(mask).save(root / f"SegmentationClass/{name}.png")

    class Seer(Grey):
        def texts(self, texts):
            numbers = {name: k + 1 for k, name in enumerate(evaluate.VOC)} | dict.fromkeys(evaluate.STUFF, 25)
            found = [max((n for n in numbers if n in text.split(",")[0]), key=len) for text in texts]
            return torch.eye(40)[[numbers[name] for name in found]]

    rows = BENCHMARKS["voc"](Seer(), tmp_path)
    meet, union = np.zeros(21), np.zeros(21)
    for mask, fields in zip(masks, greys):
        cells = torch.tensor(fields)
        maps = torch.stack([(cells == c).float() for c in (*range(1, 21), 25)])  # stuff last: it loses ties
        guess = F.interpolate(maps[None], size=mask.shape, mode="bilinear")[0].argmax(0).numpy()
        guess = np.where(guess < 20, guess + 1, 0)
        for c in range(21):
            known = mask != 255
            meet[c] += ((guess == c) & (mask == c) & known).sum()
            union[c] += (((guess == c) | (mask == c)) & known).sum()
    shown = [0, 3, 5, 7, 12]
    assert rows["mIoU"][0] == pytest.approx(100 * np.mean(meet[shown] / union[shown]))
    assert 50 < rows["mIoU"][0] < 100 and rows["mIoU of objects"][0] > rows["mIoU"][0] - 30
    assert rows["pointing"][0] == pytest.approx(100 * 3 / 5)  # 3, 7 and 12 are found, 5 twice is not


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUN = dict(size="nano", images=32, batch=16, eval_images=0, device="cpu", workers=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rng = random.Random(0)
    with open(folder / "captions.jsonl", "w") as file:
        for i in range(60):
            Image.effect_noise((40, 48), 20 + i).convert("RGB").save(folder / f"{i}.png")
            caption = [f"text {i} of {m}" for m in range(rng.choice((1, 3, 5)))]  # some have fewer perspectives
            file.write(json.dumps({"image": f"{i}.png", "caption": caption}) + "\n")
    data = dict(tokenizer="scenes", data=str(folder / "captions.jsonl"))
    train.train({**RUN, "method": "holistic", "out": str(folder / "scenes")})
    train.train({**RUN, **data, "method": "dreamlip", "out": str(folder / "pictures")})
    train.train({**RUN, **data, "method": "holistic", "out": str(folder / "branched")})
    train.train({**RUN, "method": "lotlip", "out": str(folder / "lotlip")})
    for seed in (0, 1):
        train.train({**RUN, "method": "clip", "seed": seed, "out": str(folder / f"clip-{seed}")})
    return folder


@pytest.mark.parametrize("name, n, figures", [
    ("scenes", 12, {"attention", "branches", "curves", "patches", "reading"}),
    ("lotlip", 12, {"attention", "curves", "patches", "reading"}),
    ("pictures", 100, {"attention", "curves", "patches", "reading"}),
    ("branched", 100, {"attention", "branches", "curves", "patches", "reading"})])
def test_a_run_gets_its_table_its_json_and_its_figures(name, n, figures, runs, capsys):
    result = evaluate_run(runs / name, n=n, device="cpu")
    written = json.loads((runs / name / "evaluation.json").read_text())
    rows = result["metrics"]
    assert {k: (v["value"], v["chance"]) for k, v in written["metrics"].items()} == rows and written["branch"] == "mean"
    assert written["images"] == n if name in ("scenes", "lotlip") else 0 < written["images"] < 30  # the validation part
    assert all(0 <= value <= 100 and 0 < chance <= 100 for key, (value, chance) in rows.items() if "alike" not in key)
    assert {p.stem for p in (runs / name).glob("*.png")} == figures
    for path in (runs / name).glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5
    table = capsys.readouterr().out
    assert all(f" {value:.1f} |" in table for value, _ in rows.values())
    assert "| short | " + " | ".join(f"{rows[f'short {d} {what}'][0]:.1f}" for d in ("T2I", "I2T") for what in (
        "R@1", "R@5", "R@10", "median rank")) in table
    assert all(len(line) < 200 for line in table.splitlines())


def test_evaluation_is_deterministic_and_leaves_no_figures_if_told(runs, tmp_path):
    train.train({**RUN, "method": "clip", "out": str(tmp_path / "run")})
    first, second = (evaluate_run(tmp_path / "run", n=12, figures=False, device="cpu") for _ in range(2))
    assert first == second and not list((tmp_path / "run").glob("*.png"))


def test_a_save_that_was_killed_between_its_renames_leaves_a_run_to_evaluate(runs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1.pt").write_bytes((runs / "clip-0" / "checkpoint.pt").read_bytes())
    found, whole = (Model(folder, "cpu").clip.state_dict() for folder in (tmp_path / "run", runs / "clip-0"))
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    (tmp_path / "run" / "checkpoint-1.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint"):
        Model(tmp_path / "run", "cpu")


def test_the_averaged_weights_are_the_ones_evaluated(tmp_path):
    train.train({**RUN, "method": "clip", "ema": 0.5, "out": str(tmp_path / "run")})
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    clip = Model(tmp_path / "run", "cpu").clip
    assert all(torch.equal(p, a) for p, a in zip(clip.parameters(), checkpoint["average"], strict=True))
    assert not all(torch.equal(p, checkpoint["model"][name]) for name, p in clip.named_parameters())


def test_a_run_whose_weights_are_not_those_of_its_settings_ends_in_a_sentence(runs, tmp_path):
    content = torch.load(runs / "clip-0/checkpoint.pt", weights_only=True)
    del content["model"]["text.proj"]
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="weights and settings do not fit") as caught:
        Model(tmp_path, "cpu")
    assert "\n" not in str(caught.value)


def test_pictures_that_will_not_decode_are_passed_over_counted_and_said(runs, tmp_path, capsys):
    content = (runs / "captions.jsonl").read_text()
    (tmp_path / "captions.jsonl").write_text(content)
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes((runs / f"{i}.png").read_bytes() if i % 2 else b"x")
    score = dict(n=99, figures=False, device="cpu")
    whole, _ = (evaluate_run(runs / "pictures", data=[str(folder / "captions.jsonl")], **score)
                for folder in (runs, tmp_path))
    said = capsys.readouterr().out
    bad, images = re.search(r"passed over: (\d+)", said), re.findall(r"(\d+) held-out images", said)
    assert int(bad[1]) > 0 and int(images[0]) == int(images[1]) + int(bad[1]) and whole["metrics"]


@pytest.mark.parametrize("branch", ["mean", "max", "0", "4"])
def test_a_branch_or_their_mean_or_max_can_be_evaluated(branch, runs):
    rows = evaluate_run(runs / "scenes", n=40, branch=branch, figures=False, device="cpu")["metrics"]
    model, scenes = Model(runs / "scenes", "cpu"), Scenes("test", 40, SIZE, KIND_COUNT)
    drawn = [torch.from_numpy(scenes.draw(scenes.scene(i))[0]).permute(2, 0, 1) for i in range(40)]
    short = [scenes.scene(i).captions["short"] for i in range(40)]
    branches, = model.images([(image,) for image in drawn])
    each = torch.stack([branches[:, h] @ model.texts(short).T for h in range(5)])
    sim = {"mean": each.mean(0), "max": each.amax(0)}.get(branch)
    sim = (each[int(branch)] if sim is None else sim).tolist()
    found = [brute_rank(row, [b == a for b in short]) < 10 for row, a in zip(sim, short)]
    assert rows["short I2T R@10"][0] == pytest.approx(100 * np.mean(found))


def test_a_branch_that_is_not_there_is_refused(runs):
    for branch in ("5", "-1", "best"):
        with pytest.raises(UserError, match=f"--branch {branch}: this model has 5 branches"):
            evaluate_run(runs / "scenes", n=4, branch=branch, device="cpu")


def test_another_resolution_gives_more_patches_and_a_wrong_one_is_refused(runs):
    model = Model(runs / "clip-0", "cpu", image_size=64)
    (_, patches), = model.batches([(torch.zeros(3, 64, 64, dtype=torch.uint8),)])
    assert patches.shape[1] == 64 and model.side == 8
    assert evaluate_run(runs / "clip-0", n=8, figures=False, device="cpu", image_size=64)["metrics"]
    with pytest.raises(UserError, match="--image-size"):
        Model(runs / "clip-0", "cpu", image_size=60)


def test_attention_of_the_last_layer_is_what_the_layer_multiplies_with(runs):
    model = Model(runs / "lotlip", "cpu")
    attn, caught = model.clip.text.blocks[-1].attn, []
    hook = attn.register_forward_hook(lambda attn, inputs, out: caught.append((inputs[0], out)))
    tokens = model.tokenizer(["a red heart is near the top."], 20)
    with torch.no_grad(), evaluate.last_attention(model.clip.text) as weights:
        model.clip.encode_text(tokens)
    hook.remove()
    (x, out), text = caught[0], model.clip.text
    mask = text_mask(tokens.argmax(-1), 20, len(text.corner_embedding), text.causal, text.corner_mask)[:, None]
    heads = attn.weights(x, mask)  # [1, heads, 22, 22]
    assert torch.allclose(attn.out((heads @ attn.split(x)[2]).transpose(1, 2).flatten(2)), out, atol=1e-5)
    assert torch.allclose(heads.mean(1), weights[0]) and heads.shape == (1, attn.heads, 22, 22)
    assert not heads[~mask.expand_as(heads)].any()


# ---- several runs in one table ---------------------------------------------------------------------------------------

def result(name, method, seed, **metrics):
    return dict(name=name, settings=dict(method=method, seed=seed, out=name, lr=0.1), reading=None,
                metrics={k.replace("_", " "): v for k, v in metrics.items()})


def test_runs_that_differ_in_their_seed_are_one_row_with_mean_spread_and_difference():
    groups = evaluate.summarise([
        result("a", "clip", 0, mIoU=(10, 1)), result("b", "dreamlip", 0, mIoU=(20, 1)),
        result("c", "dreamlip", 1, mIoU=(26, 1)), result("d", "clip", 1, mIoU=(12, 1)), result("e", "sparc", 0)])
    assert [(g["name"], *g["runs"]) for g in groups] == [("clip", "a", "d"), ("dreamlip", "b", "c"), ("sparc", "e")]
    m = groups[1]["metrics"]["mIoU"]
    assert m == dict(mean=23, sd=pytest.approx(math.sqrt(18)), values=[20, 26], chance=1, difference=12)
    assert "difference" not in groups[0]["metrics"]["mIoU"]
    assert evaluate.table(groups).splitlines()[2:] == [
        "| clip, 2 seeds | 11.0 ± 1.4 |", "| dreamlip, 2 seeds | 23.0 ± 4.2 (+12.0) |", "| sparc |  |",
        "| chance | 1.0 |"]


def test_runs_of_one_method_with_other_settings_keep_their_names():
    other = result("mine", "clip", 0, mIoU=(10, 1))
    other["settings"]["lr"] = 0.2
    groups = evaluate.summarise([result("first", "clip", 0, mIoU=(10, 1)), other])
    assert [g["name"] for g in groups] == ["first", "mine"]


def test_the_command_writes_one_table_one_json_and_the_comparison(runs, capsys):
    evaluate.main([str(runs / name) for name in ("clip-0", "clip-1", "lotlip")] + [
        "--images", "12", "--device", "cpu", "--json", str(runs / "all.json")])
    said = capsys.readouterr().out
    groups = json.loads((runs / "all.json").read_text())
    assert [g["name"] for g in groups] == ["clip", "lotlip"] and len(groups[0]["metrics"]["mIoU"]["values"]) == 2
    assert "| clip, 2 seeds |" in said and "| lotlip |" in said and "| chance |" in said
    for name in ("comparison.png", "reading.png"):
        assert np.asarray(Image.open(runs / name).convert("L")).std() > 5


def test_a_run_is_scored_on_benchmarks_by_name(runs, capsys):
    class_folders(runs / "folders")
    lay_out("urban1k", runs / "urban")
    evaluate.main([str(runs / "pictures"), "--device", "cpu", "--benchmark", f"imagefolder:{runs / 'folders'}",
                   f"urban1k:{runs / 'urban'}"])
    rows = json.loads((runs / "pictures/benchmarks.json").read_text())["metrics"]
    assert {"imagefolder top-1", "urban1k T2I R@1", "urban1k I2T median rank"} <= set(rows)
    assert "| urban1k | " in capsys.readouterr().out
    for wrong, words in (("cifar:data", "NAME:PATH with one of imagefolder"), ("coco", "NAME:PATH"),
                         ("coco:/gone", "there is no /gone")):
        with pytest.raises(UserError, match=words):
            evaluate.main([str(runs / "pictures"), "--device", "cpu", "--benchmark", wrong])


def test_embedding_in_batches_is_embedding_one_by_one(runs):
    model = Model(runs / "scenes", "cpu", batch=5)
    images = torch.randint(0, 256, (12, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    branches, numbers = model.images([(image, i) for i, image in enumerate(images)])
    alone = torch.cat([model.images([(image,)])[0] for image in images])
    assert numbers == list(range(12)) and torch.allclose(branches, alone, atol=1e-5)
    said = [f"a red heart and {i} more" for i in range(9)]
    assert torch.allclose(model.texts(said, batch=2), torch.cat([model.texts([text]) for text in said]), atol=1e-5)


# ---- the claims of the papers ----------------------------------------------------------------------------------------

def test_every_row_of_the_claims_trains_and_every_claim_compares_rows_in_metrics_that_there_are():
    for device, size in evaluate.CLAIMS_SIZE.items():
        for row, flags in evaluate.ROWS.items():
            flags = {name: value for name, value in flags.items() if name != "times"}
            assert {*flags, *size} <= train.Settings.__dataclass_fields__.keys(), row
            train.build(train.resolve(dict(device="cpu") | size | flags))
    metrics = scene_metrics(Guesser(0, 300), SCENES)[0]
    assert {name for names in evaluate.MEASURES.values() for name in names} <= {*metrics, "locality of patches"}
    for names, measures, claims in evaluate.CLAIMS.values():
        assert {*names} | {row for _, *rows in claims for row in rows} <= evaluate.ROWS.keys()
        assert {*measures} <= evaluate.MEASURES.keys()
    assert {*evaluate.ROWS} == {row for names, _, _ in evaluate.CLAIMS.values() for row in names}  # none for nothing


def test_intervals_are_students_over_the_paired_differences():
    from scipy import stats  # comes with the test requirements
    values = np.random.default_rng(0).normal(size=(2, 7)) + [[1], [0]]
    for n in range(2, 8):
        pairs = values[0, :n] - values[1, :n]
        low, high = stats.t.interval(0.95, n - 1, pairs.mean(), stats.sem(pairs))
        assert evaluate.interval(*values[:, :n]) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=1e-3)
    assert evaluate.interval(values[0, :1], values[1, :1])[1] == math.inf


def test_locality_is_near_100_of_local_patches_and_chance_of_patches_that_all_know_everything():
    def locality(local):
        def batches(samples):  # each patch embeds its own pixels, or all of the picture's
            cells = torch.stack([F.unfold(samples[i][0].float(), 8, stride=8).T for i in range(len(samples))])
            yield None, cells if local else cells.mean(1, keepdim=True).expand_as(cells)
        return evaluate.locality(SimpleNamespace(side=SIZE // 8, batches=batches), SCENES)

    local, everywhere = locality(True), locality(False)
    assert local[0] > 90 and 3 < local[1] < 30  # patches that an object covers to less than 1/16 are not counted as its
    assert everywhere[0] == pytest.approx(everywhere[1], rel=1e-4)


def test_claims_train_what_is_missing_and_report_what_was_measured(tmp_path, monkeypatch, capsys):
    rows = {row: evaluate.ROWS[row] for row in ("raw (CLIP)", "M2M, 5 MLPs")}
    flags = dict(size="nano", images=64, batch=16, workers=0)
    found, _ = evaluate.train_rows(rows, tmp_path / "claims", 2, 2, flags)
    assert {row: len(runs) for row, runs in found.items()} == dict.fromkeys(rows, 2)
    before = {path: path.read_bytes() for path in (tmp_path / "claims").glob("*/evaluation.json")}
    assert len(before) == 4
    assert evaluate.train_rows(rows, tmp_path / "claims", 2, 2, flags)[0].keys() == found.keys()
    assert before == {path: path.read_bytes() for path in before}
    with pytest.raises(UserError, match="images"):
        evaluate.train_rows(rows, tmp_path / "claims", 2, 1, flags | dict(images=128))

    # the report of all rows, made of these two
    def pretend(rows, folder, *_):
        for row in rows:
            for seed in range(2):
                path, real = (evaluate.run_of(folder, name, seed) for name in (row, list(found)["MLP" in row]))
                if not path.exists():
                    path.symlink_to(real, target_is_directory=True)
        return {row: found[list(found)[rows[row].get("branches", 1) > 1 or "M2M" in row]] for row in rows}, 1

    monkeypatch.setattr(evaluate, "train_rows", pretend)
    evaluate.main(["--claims", str(tmp_path / "claims"), "--seeds", "2"])
    text = (tmp_path / "claims" / "claims.md").read_text()
    assert text in capsys.readouterr().out
    clip = [run["metrics"]["zero-shot top-1"]["value"] for run in found["raw (CLIP)"]]
    line = next(line for line in text.splitlines() if line.startswith("| raw (CLIP)"))
    assert f" {np.mean(clip):.1f} ± {np.std(clip, ddof=1):.1f} " in line
    for figure in ("claims", "localisation", "reading", "branches"):
        assert Image.open(tmp_path / "claims" / f"{figure}.png").size[0] > 800


def test_claims_of_a_single_seed_are_drawn_at_the_scale_of_their_differences(monkeypatch):
    drawn, names = [], [name for names in evaluate.MEASURES.values() for name in names]
    monkeypatch.setattr(evaluate.Figure, "savefig", lambda figure, path: drawn.append(figure))
    rows = {row: [dict(metrics=dict.fromkeys(names, dict(value=i)))] for i, row in enumerate(evaluate.ROWS)}
    evaluate.draw_claims(rows, None)
    assert all(8 <= axis.get_xlim()[1] < 40 for axis in drawn[0].axes)  # 28 rows; the intervals have no end


def die(*_, **__):
    os._exit(9)


def test_claims_end_in_a_sentence_when_a_process_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "train_row", die)
    with pytest.raises(UserError, match="a process died"):
        evaluate.train_rows({"raw (CLIP)": {}}, tmp_path, 1, 1, {})


def test_claims_refuse_what_makes_no_sense():
    for argv in (["--claims", "x", "--seeds", "0"], []):
        with pytest.raises(UserError):
            evaluate.main(argv)
