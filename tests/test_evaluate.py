"""Every metric is what brute force and CLIP_benchmark count, chance is what guessing gives, a perfect embedding scores
100, every layout pairs the right pictures and texts, and every mistake ends in one sentence."""
import json
import math
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image

import evaluate
import report
import train
from data import MEAN, STD, Captions, UserError, open_dataset
from evaluate import BENCHMARKS, LAYOUTS, TORCHVISION, Model, evaluate_run, held_out_metrics, retrieval
from model import text_mask
from scenes import BACKGROUNDS, COLOURS, KINDS, article

# CLIP_benchmark 1.6.2 calls float() on arrays of one number, which numpy 2.4 no longer takes
zeroshot_classification.float = lambda x: x.item() if hasattr(x, "item") else float(x)


def scores(*shape, seed=0, levels=None):
    """Random numbers; with `levels`, so few different values that many are tied."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x if levels is None else (x * levels).round() / levels


def unit(*shape, seed=0):
    return F.normalize(scores(*shape, seed=seed).float(), dim=-1)


# ---- metrics against brute force -------------------------------------------------------------------------------------

def brute_rank(row, right):
    """Places in front of the first right candidate when, among equals, the right ones stand last."""
    order = sorted(range(len(row)), key=lambda c: (-row[c], right[c]))
    return next(place for place, c in enumerate(order) if right[c])


GROUPS = {
    "one each": torch.randperm(40, generator=torch.Generator().manual_seed(5)),
    "fives": torch.arange(40) // 5,
    "some often": torch.tensor([0] * 12 + list(range(28))),
}


@pytest.mark.parametrize("block", [1 << 25, 90, 1])
@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("name", GROUPS)
def test_ranks_are_brute_forces_in_blocks_of_any_size(name, levels, block, monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK", block)
    sim, of = scores(40, 40, levels=levels), GROUPS[name]
    eye = torch.eye(40, dtype=torch.float64)  # against the unit vectors, sim are the similarities
    found = evaluate.ranks(sim[:, None], eye[:, None], of, of)
    right = of[:, None] == of
    assert found.tolist() == [brute_rank(*pair) for pair in zip(sim.tolist(), right.tolist())]


def test_a_model_that_says_the_same_of_everything_or_nothing_at_all_finds_nothing():
    numbers = torch.arange(20)
    for value in (0.0, 1.0, float("nan")):
        rows = retrieval(torch.full((20, 1, 4), value), torch.full((20, 4), value), numbers, numbers)
        for way in ("T2I", "I2T"):
            assert rows[f"{way} R@10"][0] == 0 and rows[f"{way} median rank"][0] == 20


@pytest.mark.parametrize("name", GROUPS)
def test_the_chance_of_retrieval_is_what_random_similarities_reach(name):
    eye, of = torch.eye(40, dtype=torch.float64), GROUPS[name]
    found = [retrieval(scores(40, 1, 40, seed=seed), eye, of, of) for seed in range(300)]
    for metric, (_, chance) in found[0].items():
        values = [rows[metric][0] for rows in found]
        slack = 1.5 if "rank" in metric else 0.25
        assert abs(np.mean(values) - chance) < slack + 4 * np.std(values) / math.sqrt(len(values))


@pytest.mark.parametrize("C, m, k", [(30, 1, 5), (30, 4, 5), (7, 3, 5), (5, 5, 1), (1000, 5, 10)])
def test_the_chance_of_recall_is_the_count_of_draws(C, m, k):
    expected = 100 * (1 - math.comb(C - m, k) / math.comb(C, k))
    assert evaluate.chance_recall(torch.tensor([m, m]), C, k) == pytest.approx(expected)


@pytest.mark.parametrize("branch", ["mean", "max", "2"])
def test_branches_become_one_similarity_as_mean_max_or_one_of_them(branch):
    branches, texts = unit(40, 3, 6), unit(40, 6, seed=1)
    merged = Model.merge(SimpleNamespace(branch=branch), branches)
    of = torch.arange(40)
    found = evaluate.ranks(merged, texts[:, None], of, of)
    for n in range(40):
        rows = [[sum(a * b for a, b in zip(image, text)) for image in branches[n].tolist()] for text in texts.tolist()]
        best = {"mean": np.mean, "max": max, "2": lambda each: each[2]}[branch]
        assert found[n] == brute_rank([best(each) for each in rows], [m == n for m in range(40)])


# ---- metrics against CLIP_benchmark ----------------------------------------------------------------------------------

@pytest.mark.parametrize("per_image", [1, 5, None], ids=["one caption", "five captions", "1 to 6 captions"])
def test_retrieval_is_clip_benchmarks(per_image):
    rng, n = random.Random(0), 60
    counts = [per_image or rng.randint(1, 6) for _ in range(n)]
    owner = torch.arange(n).repeat_interleave(torch.tensor(counts))
    images = unit(n, 16)
    texts = F.normalize(images[owner] + 0.4 * scores(len(owner), 16, seed=1).float(), dim=-1)
    captions = [(owner == i).nonzero().flatten().tolist() for i in range(n)]
    loader = [(torch.arange(n)[i:i + 20], captions[i:i + 20]) for i in range(0, n, 20)]
    given = SimpleNamespace(encode_image=lambda i: images[i], encode_text=lambda i: texts[i])
    theirs = zeroshot_retrieval.evaluate(given, loader, torch.tensor, "cpu", False, [1, 5, 10])
    ours = retrieval(images[:, None], texts, torch.arange(n), owner)
    for k in (1, 5, 10):
        for way, name in (("T2I", "image"), ("I2T", "text")):
            expected = 100 * theirs[f"{name}_retrieval_recall@{k}"]
            assert ours[f"{way} R@{k}"][0] == pytest.approx(expected, abs=1e-4)
    assert 5 < ours["T2I R@1"][0] < 95


@pytest.mark.parametrize("C", [3, 5, 12])
def test_classification_is_clip_benchmarks(C):
    n = 200
    target = torch.randint(0, C - 1, (n,), generator=torch.Generator().manual_seed(0))  # one class does not occur
    prompts = unit(C, 3, 16, seed=1)
    images = F.normalize(prompts[target].mean(1) + 0.5 * scores(n, 16, seed=2).float(), dim=-1)

    class Loader(list):
        dataset = SimpleNamespace(classes=range(C))

    def tokenizer(texts):
        return torch.tensor([[int(word) for word in text.split()] for text in texts])

    loader = Loader((torch.arange(n)[i:i + 50], target[i:i + 50]) for i in range(0, n, 50))
    names, templates = list(map(str, range(C))), ["0 {c}", "1 {c}", "2 {c}"]
    given = SimpleNamespace(encode_image=lambda i: images[i], encode_text=lambda t: prompts[t[:, 1], t[:, 0]])
    theirs = zeroshot_classification.evaluate(given, loader, tokenizer, names, templates, "cpu", False)
    ours = evaluate.classification(images[:, None], F.normalize(prompts.mean(1), dim=-1), target)
    for name, other in (("top-1", "acc1"), ("top-5", "acc5"), ("mean per class", "mean_per_class_recall")):
        if name in ours:
            assert ours[name][0] == pytest.approx(100 * theirs[other], abs=1e-4)
    assert ("top-5" in ours) == (C >= 5) and 20 < ours["top-1"][0] < 95


# ---- models that know everything, or nothing -------------------------------------------------------------------------

N, SIZE, KIND_COUNT = 24, 32, 12
DATASET = open_dataset("scenes", "test", N, SIZE, KIND_COUNT)
SCENES = DATASET.scenes
FACTS = [SCENES.scene(i) for i in range(N)]
NAMES = [name for name, _ in KINDS[:KIND_COUNT]]
GROUNDS = [f"the background is plain {ground}." for ground in BACKGROUNDS]


class Oracle:
    """Embeds by looking the answer up, in dimensions of names. A patch is a pixel, so localisation can be perfect."""

    settings, side, branch, merge = dict(threshold=0.99), SIZE, "mean", Model.merge

    def __init__(self):
        self.known = {}  # name of a dimension: its number

    def vector(self, *names):
        x = torch.zeros(600)
        for name in names:
            x[self.known.setdefault(name, len(self.known))] = 1
        return F.normalize(x, dim=0)

    def image(self, scene):
        """The scene -> its branch [D], its pixels [P,D]."""
        main = scene.objects[0]
        number = FACTS.index(scene) if scene in FACTS else None
        branch = self.vector(number, NAMES[main.kind], (main.kind, main.colour))
        cells = [self.vector("background")]
        for k, o in enumerate(scene.objects):
            about = [text for text, a in zip(scene.captions["long"], scene.about) if a == k]
            cells.append(self.vector(NAMES[o.kind], *about))
        mask = torch.from_numpy(SCENES.draw(scene)[1]).flatten().long()
        return branch, torch.stack(cells)[mask]

    def batches(self, items, load):
        for start in range(0, len(items), 10):
            some = items[start:start + 10]
            _, *rest = zip(*map(load, some))
            branches, patches = zip(*(self.image(FACTS[i] if isinstance(i, int) else i) for i in some))
            yield torch.stack(branches)[:, None], torch.stack(patches), *map(list, rest)

    def texts(self, texts):
        meanings = {text: ["background"] for text in GROUNDS}
        for kind, name in enumerate(NAMES):
            for template in ("{1}", *evaluate.SCENE_PROMPTS):
                meanings[template.format(name, article(name))] = [name]
            for c, colour in enumerate(COLOURS):
                meanings[f"the main object is {article(f'{colour} {name}')}."] = [(kind, c)]
        for i, scene in enumerate(FACTS):
            for text, about in zip(scene.captions["long"], scene.about):
                meanings.setdefault(text, [text] if about >= 0 else []).append(i)
            for text in (scene.captions["short"], " ".join(scene.captions["long"])):
                meanings.setdefault(text, []).append(i)
        return torch.stack([self.vector(*meanings[text]) for text in texts])


class Guesser(Oracle):
    """Embeds images and patches at random, and every text apart from every other (backgrounds are one class)."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def image(self, scene):
        return torch.randn(300, generator=self.generator), torch.rand(self.side ** 2, 300, generator=self.generator)

    def texts(self, texts):
        known = {text: i for i, text in enumerate(dict.fromkeys(texts), 1)} | dict.fromkeys(GROUNDS, 0)
        return torch.eye(300)[[known[text] for text in texts]]


def test_a_perfect_embedding_scores_100_everywhere():
    rows, branches, captions = held_out_metrics(Oracle(), DATASET, N)
    for name in ("patches grouped", "patches alike", "group finds its sentence, wrong image"):
        del rows[name]  # they describe, and have no best value
    for name, (value, chance) in rows.items():
        assert value == pytest.approx(1 if "rank" in name else 100, abs=1e-3) or "finds" in name, name
        assert 0 < chance < 100
    assert len(rows) == 8 * 3 + 5 + 8 and len(branches) == len(captions) == N


def test_an_embedding_wrong_about_one_image_is_wrong_about_that_one_alone():
    other = next(scene for scene in FACTS if scene.objects[0].kind != FACTS[0].objects[0].kind)

    class OneWrong(Oracle):
        def image(self, scene):
            branch, patches = super().image(scene)
            return super().image(other)[0] if scene == FACTS[0] else branch, patches

    rows, *_ = held_out_metrics(OneWrong(), DATASET, N)
    for name in ("long I2T R@1", "zero-shot top-1"):
        assert rows[name][0] == pytest.approx(100 * (N - 1) / N)


def test_chance_is_what_guessing_reaches():
    results = [held_out_metrics(Guesser(seed), DATASET, N)[0] for seed in range(8)]
    for name in ("mIoU", "pointing by sentence", "pointing by name", "grouped by sentence", "locality of patches"):
        values = [rows[name][0] for rows in results]
        chance = np.mean([rows[name][1] for rows in results])
        assert abs(np.mean(values) - chance) < 5 * np.std(values) / math.sqrt(8) + 0.05 * chance, name
    rows = results[0]
    assert rows["zero-shot top-1"][1] == pytest.approx(100 / KIND_COUNT)
    assert rows["zero-shot top-5"][1] == pytest.approx(500 / KIND_COUNT)
    assert rows["seen colour and object"][1] == pytest.approx(100 / (KIND_COUNT * len(COLOURS)))


def brute_weights(cells, text):
    """methods.md, DreamLIP 3: similarities, min-max normalised, 0 under the threshold."""
    near = [(cell @ text).item() for cell in cells]
    low, high = min(near), max(near)
    weights = [(x - low) / (high - low) for x in near]
    return [w if w >= 0.99 else 0 for w in weights]


def brute_covered(mask, k, patch):
    covered = []
    for y in range(0, SIZE, patch):
        for x in range(0, SIZE, patch):
            cell = mask[y:y + patch, x:x + patch].flatten().tolist()
            covered.append(cell.count(k + 1) * 16 >= patch * patch)
    return covered


@pytest.mark.parametrize("patch", [1, 8])
def test_pointing_and_groups_are_what_loops_over_patches_count(patch):
    model = Guesser(0)
    model.side = SIZE // patch
    known = {}
    model.texts = lambda texts: torch.stack([known.setdefault(t, unit(64, seed=len(known))) for t in texts])
    patches = unit(N, model.side ** 2, 64, seed=999)
    places = evaluate.Places(model, SCENES)
    for part in patches.split(10):
        places.add(part)
    found = {name: [] for name in places.rows() if name != "mIoU"}
    every = torch.stack([known[text] for scene in FACTS for text in scene.captions["long"]]).mean(0)
    named = torch.stack([known[article(name)] for name in NAMES])
    for i, scene in enumerate(FACTS):
        cells, mask = patches[i], SCENES.draw(scene)[1]
        wrong = patches[{0: 9, 10: 19, 20: N - 1}.get(i, i - 1)]  # the one before, in its batch
        texts = [known[text] for text in scene.captions["long"]]
        for name, some in (("", cells), (", wrong image", wrong)):
            groups = [torch.tensor(brute_weights(some, text)) @ some for text in texts]
            hits = [max(range(len(texts)), key=lambda m: group @ texts[m]) == k for k, group in enumerate(groups)]
            found["group finds its sentence" + name].append(np.mean(hits))
        found["patches grouped"].append(np.mean([w > 0 for text in texts for w in brute_weights(cells, text)]))
        others = ~torch.eye(len(cells), dtype=torch.bool)
        found["patches alike"].append((cells @ cells.T)[others].mean().item())
        for text, about in zip(texts, scene.about):
            if about >= 0:
                covered = brute_covered(mask, about, patch)
                name = named[scene.objects[about].kind]
                queries = {"by sentence": text, "by sentence, centred": text - every,
                           "by name": name, "by name, centred": name - named.mean(0)}
                for which, query in queries.items():
                    near = [(cell @ query).item() for cell in cells]
                    found[f"pointing {which}"].append(covered[near.index(max(near))])
                weights = brute_weights(cells, text)
                found["grouped by sentence"].append(np.average(covered, weights=weights))
    rows = places.rows()
    for name, values in found.items():
        assert rows[name][0] == pytest.approx(100 * np.mean(values), abs=1e-3), name


@pytest.mark.parametrize("patch", [1, 8])
def test_miou_is_what_loops_over_pixels_count(patch):
    model = Guesser(0)
    model.side = SIZE // patch
    patches = unit(N, model.side ** 2, 300, seed=4)
    places = evaluate.Places(model, SCENES)
    places.add(patches)
    classes = torch.cat([model.texts(GROUNDS[:1]), model.texts([article(name) for name in NAMES])])
    meet, union = np.zeros((2, KIND_COUNT + 1))
    for cells, scene in zip(patches, FACTS):
        maps = (cells @ classes.T).T.reshape(1, -1, model.side, model.side)
        guess = F.interpolate(maps, size=(SIZE, SIZE), mode="bilinear")[0].argmax(0).numpy()
        truth = np.array([0] + [o.kind + 1 for o in scene.objects])[SCENES.draw(scene)[1]]
        for c in range(KIND_COUNT + 1):
            meet[c] += ((guess == c) & (truth == c)).sum()
            union[c] += ((guess == c) | (truth == c)).sum()
    assert places.rows()["mIoU"][0] == pytest.approx(100 * np.mean(meet / union))


def test_locality_is_near_100_of_local_patches_and_chance_of_patches_that_all_know_everything():
    def locality(local):
        def batches(items, load):  # each patch embeds its own pixels, or all of the picture's
            images, masks = zip(*map(load, items))
            cells = torch.stack([F.unfold(image.float(), 8, stride=8).T for image in images])
            yield None, cells if local else cells.mean(1, keepdim=True).expand_as(cells), masks
        return evaluate.locality(SimpleNamespace(side=SIZE // 8, batches=batches), SCENES)

    local, everywhere = locality(True), locality(False)
    assert local[0] > 90 and 3 < local[1] < 30  # patches that an object covers to less than 1/16 are not its
    assert everywhere[0] == pytest.approx(everywhere[1], rel=1e-4)


class Reader:
    """Embeds a caption as the mean of the sentences it reads: the first `span`, or all. Sentences are orthogonal."""

    def __init__(self, known, span=99):
        self.known, self.span = known, span

    def texts(self, texts):
        rows = []
        for text in texts:
            sentences = re.findall(r"\d+ \d+", text)[:self.span]
            numbers = [self.known.setdefault(sentence, len(self.known)) for sentence in sentences]
            rows.append(F.normalize(torch.eye(400)[numbers].mean(0), dim=0))
        return torch.stack(rows)


@pytest.mark.parametrize("span", [3, 99])
def test_the_reading_probe_sees_how_far_into_a_caption_a_model_reads(span):
    captions = [Captions("", [], [f"{i} {k}" for k in range(6)], [""]) for i in range(12)]
    known = {}
    images = Reader(known).texts([" ".join(c.long) for c in captions])[:, None]
    found = evaluate.reading(Reader(known, span), images, captions)
    assert [place for place, _ in found["place"]] == [1, 2, 3, 4, 5, 6]
    for place, accuracy in found["place"]:
        assert accuracy == (100 if place <= span else 50)  # captions that are alike to it are a coin's toss
    assert [row[0] for row in found["length"]] == [1, 2, 3, 4, 6]
    assert all(row[1] == 100 for row in found["length"])


# ---- published layouts -----------------------------------------------------------------------------------------------

class Grey:
    """A model of pictures in one grey each and texts with one number each: picture 10·k and text "... k ..." agree."""

    config, settings, branch = SimpleNamespace(image_size=16), {}, "mean"
    batches, images, merge = Model.batches, Model.images, Model.merge
    batch, workers, device = 7, 0, "cpu"
    autocast = torch.autocast("cpu", enabled=False)

    def __init__(self):
        self.said = []
        self.clip = self

    def encode_image(self, images):
        values = (images[:, :1] * STD[0] + MEAN[0]) * 25.5
        cells = F.adaptive_avg_pool2d(values, 2).flatten(1).round().long().clamp(0, 39)
        return torch.eye(40)[cells[:, :1]], torch.eye(40)[cells]

    def texts(self, texts):
        self.said += texts
        return torch.eye(40)[[int(re.search(r"\d+", text)[0]) for text in texts]]


def picture(path, k, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10 * k,) * 3).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list) and "jsonl" in path.suffix:
        content = "\n".join(map(json.dumps, content))
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lay_out(name, root, n=12):
    """The data set's published layout with n pictures; whatever is not part of the benchmark says 39 -> its path."""
    if name in ("coco", "flickr30k"):
        folder = {"coco": "val2014", "flickr30k": "flickr30k-images"}[name]
        rows = []
        for k in range(n + 2):
            texts = [f"this is {k if j < 5 and k < n else 39}" for j in range(6)]
            row = dict(filename=f"{k}.png", split="test" if k < n else "train", sentences=[dict(raw=t) for t in texts])
            rows.append(row | (dict(filepath=folder) if name == "coco" else {}))
        path = root / f"dataset_{name}.json"
        write(path, dict(images=rows))
    elif name == "urban1k":
        folder, path = "image", root
        for k in range(n):
            picture(root / f"image/{k}.jpg", k)
            write(root / f"caption/{k}.txt", f"a street, {k}\nmore 39")
    elif name == "dci":
        folder, path = "photos", root
        write(root / "splits.json", dict(train=[f"{k}.json" for k in range(3)], test=[f"{k}.json" for k in range(3, n)]))
        for k in range(n):
            row = dict(image=f"{k}.png", short_caption=f"number {k}", extra_caption="and more")
            write(root / f"annotations/{k}.json", row)
    elif name == "iiw":
        folder, path = "docci", root
        for k in range(n):
            picture(root / ("dci", "docci", "docci_aar")[k % 3] / f"p{k}.jpg", k)
        write(root / "DCI_Test/data.jsonl", [dict(image=f"p{k}.jpg", IIW=f"long {k}") for k in range(0, n, 2)])
        write(root / "IIW-400/data.jsonl", [{"image/key": f"p{k}", "IIW": f"long {k}"} for k in range(1, n, 2)])
    elif name == "docci":
        folder, path = "images", root / "docci_descriptions.jsonlines"
        rows = [dict(split="test", image_file=f"{k}.png", description=f"it has {k}") for k in range(n)]
        write(path, [*rows, dict(split="train", image_file="x.png", description="it has 39")])
    elif name.startswith("share4v"):
        folder, path = "sam/images", root / "share4v_sam_10k.json"
        talks = [[dict(value="what is 39?"), dict(value=f"it is {k}")] for k in range(n)]
        write(path, [dict(image=f"sam/images/{k}.png", conversations=talk) for k, talk in enumerate(talks)])
    else:
        folder, path = "pictures", root / "captions.jsonl"
        rows = [dict(image=f"pictures/{k}.png", caption=[f"{k}", f"again {k}"] if k % 2 else f"{k}") for k in range(n)]
        write(path, [*rows, dict(image="pictures/1.png", caption="once more 1")])
    for k in range(n):
        picture(root / folder / f"{k}.png", k)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_published_layout_pairs_the_right_pictures_and_texts(name, tmp_path):
    model = Grey()
    rows = BENCHMARKS[name](model, lay_out(name, tmp_path))
    assert rows["T2I R@1"] == (100, pytest.approx(100 / 12)) and rows["I2T R@1"][0] == 100
    assert not any("39" in text for text in model.said)
    assert len(model.said) == {"coco": 60, "flickr30k": 60, "jsonl": 19}.get(name, 12)


@pytest.mark.parametrize("name, file, content, words", [
    ("coco", "dataset_coco.json", "[1]", "not laid out as coco"),
    ("coco", "dataset_coco.json", "{", "cannot read .*dataset_coco.json"),
    ("coco", "val2014/3.png", None, "no picture .*3.png"),
    ("coco", "val2014/3.png", "x", "3.png.*needs all its pictures"),
    ("urban1k", "caption/3.txt", "", "pictures without captions"),
    ("dci", "annotations/3.json", None, "cannot read .*3.json"),
    ("docci", "docci_descriptions.jsonlines", '{"split": "test"}', "not laid out as docci"),
    ("jsonl", "captions.jsonl", '{"image": "pictures/1.png", "caption": 3}', "not laid out as jsonl"),
])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_layout_that_is_wrong_ends_in_a_sentence(name, file, content, words, workers, tmp_path):
    path = lay_out(name, tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    model = Grey()
    model.workers = workers
    with pytest.raises(UserError, match=words) as caught:
        BENCHMARKS[name](model, path)
    assert "\n" not in str(caught.value) and "Error:" not in str(caught.value).split("(")[0]


# ---- zero-shot classification and segmentation -----------------------------------------------------------------------

def class_folders(root, n=6):
    for k in range(n):
        for i in range(k % 3 + 1):
            picture(root / f"class_{k}" / f"{i}.png", k)


def test_any_folder_of_class_folders_is_classified_by_its_class_names(tmp_path):
    class_folders(tmp_path)
    model, score = Grey(), BENCHMARKS["imagefolder"]
    rows = score(model, tmp_path)
    assert rows["top-1"] == (100, pytest.approx(100 / 6)) and rows["mean per class"][0] == 100
    assert "a photo of a class 3." in model.said and len(model.said) == 6 * len(evaluate.TEMPLATES)
    names = tmp_path / "classnames.txt"
    names.write_text("\n".join(f"thing {k}" for k in (0, 1, 2, 3, 5, 4)))
    rows = score(model, tmp_path)  # the names of the last two classes are changed over: 2 + 3 of 12
    assert rows["top-1"][0] == pytest.approx(100 * 7 / 12) and rows["mean per class"][0] == pytest.approx(100 * 4 / 6)
    names.write_text("one\ntwo")
    with pytest.raises(UserError, match="pictures of 6 classes, but there are 2 names"):
        score(model, tmp_path)
    with pytest.raises(UserError, match="no folder of class folders"):
        score(model, tmp_path / "class_1")


def test_torchvisions_sets_are_read_as_torchvision_lays_them_out(tmp_path):
    names = [f"dish_{k}" for k in range(6)]
    for split in ("train", "test"):
        write(tmp_path / f"food-101/meta/{split}.json", {name: [f"{name}/{split}"] for name in names})
        for k, name in enumerate(names):
            picture(tmp_path / f"food-101/images/{name}/{split}.jpg", k if split == "test" else 39)
    model = Grey()
    assert BENCHMARKS["food101"](model, tmp_path)["top-1"][0] == 100
    assert "a photo of a dish 3, a type of food." in model.said


@pytest.mark.parametrize("name", [*TORCHVISION, "voc", "imagenet"])
def test_a_set_that_is_not_there_is_not_downloaded_but_named(name, tmp_path):
    with pytest.raises(UserError, match="nothing is downloaded here|no folder of class folders") as caught:
        BENCHMARKS[name](Grey(), tmp_path)
    assert "\n" not in str(caught.value)


def test_imagenet_has_torchvisions_1000_names(tmp_path):
    assert evaluate.IMAGENET[1] == "goldfish" and len(evaluate.IMAGENET) == 1000
    class_folders(tmp_path)
    with pytest.raises(UserError, match="pictures of 6 classes, but there are 1000 names"):
        BENCHMARKS["imagenet"](Grey(), tmp_path)


def test_voc_is_counted_as_loops_over_its_pixels_do(tmp_path):
    """Two pictures of 2 × 2 fields in greys that are class numbers; the model's four patches know the greys."""
    root, greys = tmp_path / "VOCdevkit/VOC2012", {"a": [[3, 3], [3, 25]], "b": [[7, 25], [12, 12]]}  # 25: stuff
    write(root / "ImageSets/Segmentation/val.txt", "a\nb")
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir()
    meet, union = np.zeros((2, 21))
    for name, fields in greys.items():
        big = np.kron(np.array(fields), np.ones((8, 8), int))
        grey = Image.fromarray((10 * big).clip(0, 255).astype(np.uint8))
        grey.convert("RGB").save(root / f"JPEGImages/{name}.jpg", quality=100)
        mask = np.where(big == 25, 0, big).astype(np.uint8)  # 0: background
        mask[:3, :3] = 255  # not counted
        mask[4, 4] = 5  # a class that the model does not see
        Image.fromarray(mask).save(root / f"SegmentationClass/{name}.png")
        cells = torch.tensor(fields)
        maps = torch.stack([(cells == c).float() for c in (*range(1, 21), 25)])  # stuff last: it loses ties
        guess = F.interpolate(maps[None], size=mask.shape, mode="bilinear")[0].argmax(0).numpy()
        guess = np.where(guess < 20, guess + 1, 0)
        for c in range(21):
            meet[c] += ((guess == c) & (mask == c)).sum()
            union[c] += (((guess == c) | (mask == c)) & (mask != 255)).sum()

    class Seer(Grey):
        def texts(self, texts):
            numbers = {name: k + 1 for k, name in enumerate(evaluate.VOC)} | dict.fromkeys(evaluate.STUFF, 25)
            found = [max((n for n in numbers if n in text), key=len) for text in texts]
            return torch.eye(40)[[numbers[name] for name in found]]

    rows = BENCHMARKS["voc"](Seer(), tmp_path)
    shown = [0, 3, 5, 7, 12]
    assert rows["mIoU"][0] == pytest.approx(100 * np.mean(meet[shown] / union[shown]))
    assert 50 < rows["mIoU"][0] < 100 and rows["mIoU of objects"][0] > 30


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUN = dict(size="nano", images=32, batch=16, eval_images=0, device="cpu", workers=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rows = []
    for i in range(60):
        Image.effect_noise((40, 48), 20 + i).convert("RGB").save(folder / f"{i}.png")
        rows.append(dict(image=f"{i}.png", caption=[f"text {i} of {m}" for m in range((1, 3, 5)[i % 3])]))
    write(folder / "captions.jsonl", rows)
    pictures = dict(tokenizer="scenes", data=str(folder / "captions.jsonl"))
    rows = {
        "scenes": dict(method="holistic"),
        "lotlip": dict(method="lotlip"),
        "pictures": dict(method="holistic", **pictures),
        "clip-0": dict(method="clip"),
        "clip-1": dict(method="clip", seed=1),
    }
    for name, flags in rows.items():
        train.train({**RUN, **flags, "out": str(folder / name)})
    return folder


def fresh(runs, tmp_path, *names):
    """Copies of runs, to write into."""
    for name in names:
        shutil.copytree(runs / name, tmp_path / name)
    return [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("name, n, figures", [
    ("scenes", 12, {"attention", "branches", "curves", "patches", "reading"}),
    ("lotlip", 12, {"attention", "curves", "patches", "reading"}),
    ("pictures", None, {"attention", "branches", "curves", "patches", "reading"}),
])
def test_a_run_gets_its_table_its_json_and_its_figures(name, n, figures, runs, capsys, tmp_path):
    found = evaluate_run(runs / name, n=n, device="cpu", out=tmp_path)
    written = json.loads((tmp_path / name / "evaluation.json").read_text())
    said = capsys.readouterr().out
    for metric, (value, chance) in found["metrics"].items():
        assert written["metrics"][metric] == dict(value=value, chance=chance)
        assert (0 <= value <= 100 and 0 < chance <= 100) or "alike" in metric
        assert f"| {metric} | {value:.1f} | {chance:.1f} |" in said
    assert written["branch"] == "mean" and (written["images"] == n or n is None)
    assert {path.stem for path in (tmp_path / name).glob("*.png")} == figures
    for path in (tmp_path / name).glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5


def test_heat_maps_lay_colour_over_a_grey_picture_and_the_most_weight_is_the_brightest(tmp_path):
    figure = report.new_figure(2, 2)
    axis = figure.subplots()
    report.draw_image(axis, torch.full((3, 8, 8), 255, dtype=torch.uint8), torch.tensor([[0.0, 1.0], [2.0, 4.0]]))
    figure.savefig(tmp_path / "heat.png")
    picture = np.asarray(Image.open(tmp_path / "heat.png").convert("L"), float)
    middle = picture.shape[0] // 2
    none, little, half, most = (picture[y, x] for y in (middle - 20, middle + 20) for x in (middle - 20, middle + 20))
    assert none < little < half < most


def test_evaluation_is_deterministic_and_leaves_no_figures_if_told(runs, tmp_path):
    path, = fresh(runs, tmp_path, "clip-0")
    first, second = (evaluate_run(path, n=12, figures=False, device="cpu") for _ in range(2))
    assert first == second and not list(tmp_path.rglob("*.png"))


def test_pictures_that_will_not_decode_are_passed_over_counted_and_said(runs, tmp_path, capsys):
    (tmp_path / "captions.jsonl").write_text((runs / "captions.jsonl").read_text())
    for i in range(60):
        (tmp_path / f"{i}.png").write_bytes((runs / f"{i}.png").read_bytes() if i % 2 else b"x")
    images = []
    for folder in (runs, tmp_path):
        data = [str(folder / "captions.jsonl")]
        found = evaluate_run(runs / "pictures", data=data, figures=False, device="cpu", out=tmp_path)
        images.append(found["images"])
    bad = re.search(r"passed over: (\d+)", capsys.readouterr().out)
    assert 0 < int(bad[1]) == images[0] - images[1] and found["metrics"]


@pytest.mark.parametrize("branch", ["mean", "max", "4"])
def test_a_branch_or_their_mean_or_max_can_be_evaluated(branch, runs, tmp_path):
    found = evaluate_run(runs / "scenes", n=24, branch=branch, figures=False, device="cpu", out=tmp_path)
    model = Model(runs / "scenes", "cpu")
    branches, captions = model.images(range(24), lambda i: DATASET[i][:2])
    short = [c.short[0] for c in captions]
    each = torch.einsum("nhd,md->hnm", branches, model.texts(short))
    sim = {"mean": each.mean(0), "max": each.amax(0)}.get(branch, each[-1])
    ranks = [brute_rank(row, [b == a for b in short]) for row, a in zip(sim.tolist(), short)]
    assert found["metrics"]["short I2T R@10"][0] == pytest.approx(100 * np.mean(np.array(ranks) < 10))


def test_a_branch_or_a_resolution_that_is_not_there_is_refused(runs):
    for branch in ("5", "-1", "best"):
        with pytest.raises(UserError, match=f"--branch {branch}: take mean, max, or .* 0, 1, 2, 3, 4"):
            Model(runs / "scenes", "cpu", branch)
    model = Model(runs / "clip-0", "cpu", image_size=64)
    (_, patches), = model.batches([(torch.zeros(3, 64, 64, dtype=torch.uint8),)])
    assert patches.shape[1] == 64 and model.side == 8
    with pytest.raises(UserError, match="--image-size|image size"):
        Model(runs / "clip-0", "cpu", image_size=60)


def test_attention_of_the_last_layer_is_what_the_layer_multiplies_with(runs):
    model = Model(runs / "lotlip", "cpu")
    text, caught = model.clip.text, []
    attn = text.blocks[-1].attn
    hook = attn.register_forward_hook(lambda attn, inputs, out: caught.append((inputs[0], out)))
    tokens = model.tokenizer(["a red heart is near the top."], 20)
    with torch.no_grad(), report.last_attention(text) as weights:
        model.clip.encode_text(tokens)
    hook.remove()
    (x, out), = caught
    mask = text_mask(tokens.argmax(-1), 20, len(text.corner_embedding), text.causal, text.corner_mask)[:, None]
    heads = attn.weights(x, mask)  # [1, heads, 22, 22]
    assert torch.allclose(attn.out((heads @ attn.split(x)[2]).transpose(1, 2).flatten(2)), out, atol=1e-5)
    assert torch.allclose(heads.mean(1), weights[0]) and heads.shape == (1, attn.heads, 22, 22)
    assert not heads[~mask.expand_as(heads)].any()


def test_embedding_in_batches_is_embedding_one_by_one(runs):
    model = Model(runs / "scenes", "cpu", batch=5)
    images = torch.randint(0, 256, (12, 3, SIZE, SIZE), dtype=torch.uint8)
    branches, numbers = model.images(list(zip(images, range(12))))
    alone = torch.cat([model.images([(image,)])[0] for image in images])
    assert numbers == list(range(12)) and torch.allclose(branches, alone, atol=1e-5)
    said = [f"a red heart and {i} more" for i in range(9)]
    alone = torch.cat([model.texts([text]) for text in said])
    assert torch.allclose(model.texts(said, batch=2), alone, atol=1e-5)


def test_a_model_of_nan_ends_in_a_sentence(runs, tmp_path):
    path, = fresh(runs, tmp_path, "clip-0")
    content = torch.load(f"{path}/checkpoint.pt", weights_only=True)
    content["model"]["visual.proj"] *= math.nan
    torch.save(content, f"{path}/checkpoint.pt")
    with pytest.raises(UserError, match="clip-0 embeds images as NaN or infinity"):
        evaluate_run(path, n=4, device="cpu")


# ---- what is written where -------------------------------------------------------------------------------------------

def test_only_the_standard_evaluation_of_a_run_writes_evaluation_json(runs, tmp_path):
    path, = fresh(runs, tmp_path, "clip-0")
    shutil.copy(f"{path}/checkpoint.pt", f"{path}/best.pt")
    for argv in ([path], [path, "--images", "9"], [f"{path}/best.pt", "--images", "9"],
                 [path, "--images", "9", "--image-size", "64"], [path, "--images", "9", "--branch", "0"],
                 [path, "--data", f"{runs}/captions.jsonl"]):
        evaluate.main([*argv, "--device", "cpu", "--no-figures"])
    found = {str(file.parent.relative_to(path)): json.loads(file.read_text())["images"]
             for file in tmp_path.rglob("evaluation.json")}
    data = re.sub(r"\W+", "-", f"{runs}/captions.jsonl").strip("-")
    images = found.pop(f"evaluation-{data}")
    assert 0 < images < 60
    assert found == {".": 1000, "evaluation-9": 9, "evaluation-best-9": 9, "evaluation-9-64": 9, "evaluation-9-0": 9}


def test_a_folder_that_cannot_be_written_costs_no_table(runs, tmp_path, capsys):
    path, = fresh(runs, tmp_path, "clip-0")
    (tmp_path / "clip-0/evaluation-9").write_text("a file in the way")
    evaluate.main([path, "--images", "9", "--device", "cpu", "--no-figures"])
    said = capsys.readouterr().out
    assert "| mIoU |" in said and "cannot be written" in said and "--out" in said


def test_targets_that_cannot_be_written_are_found_before_the_work(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "Model", None)
    for argv in (["--json", "gone/x.json"], ["--out", "gone/x"], ["--export", "open_clip", "gone/x.pt"]):
        with pytest.raises(UserError, match="gone/x.* cannot be written"):
            evaluate.main([str(runs / "clip-0"), *argv])


def test_what_is_no_run_is_passed_over_and_a_broken_run_costs_only_itself(runs, tmp_path, capsys):
    paths = fresh(runs, tmp_path, "clip-0", "lotlip")
    for name in ("comparison.png", "claims/row-0/checkpoint.pt", "broken/checkpoint.pt"):
        write(tmp_path / name, "x")
    paths += [paths[0], f"{paths[0]}/checkpoint.pt", *(str(tmp_path / name) for name in ("comparison.png", "claims"))]
    options = ["--images", "9", "--device", "cpu", "--no-figures", "--json", str(tmp_path / "all.json")]
    with pytest.raises(UserError, match="broken"):
        evaluate.main([str(tmp_path / "broken"), *paths, *options])
    groups = json.loads((tmp_path / "all.json").read_text())
    assert [group["runs"] for group in groups] == [["clip-0"], ["lotlip"]]
    said = capsys.readouterr().out
    assert f"passed over, no run: {tmp_path}/comparison.png" in said and f"no run: {tmp_path}/claims\n" in said
    with pytest.raises(UserError, match="there is no .*gone"):
        evaluate.main([*paths, str(tmp_path / "gone")])


# ---- several runs in one table ---------------------------------------------------------------------------------------

def result(name, method, seed, on="scenes", lr=0.1, **metrics):
    settings = dict(method=method, seed=seed, out=name, lr=lr)
    return dict(name=name, settings=settings, reading=None, on=on, metrics=metrics)


def test_runs_that_differ_in_their_seed_are_one_row_with_mean_spread_and_difference():
    groups = evaluate.summarise([
        result("a", "clip", 0, mIoU=(10, 1)), result("b", "dreamlip", 0, mIoU=(20, 1)),
        result("c", "dreamlip", 1, mIoU=(26, 1)), result("d", "clip", 1, mIoU=(12, 1)), result("e", "sparc", 0)])
    assert [group["runs"] for group in groups] == [["a", "d"], ["b", "c"], ["e"]]
    m = groups[1]["metrics"]["mIoU"]
    assert m == dict(mean=23, sd=pytest.approx(math.sqrt(18)), values=[20, 26], chance=1, difference=12)
    assert "difference" not in groups[0]["metrics"]["mIoU"]
    assert evaluate.table(groups).splitlines()[2:] == [
        "| a, 2 seeds | 11.0 ± 1.4 |", "| b, 2 seeds | 23.0 ± 4.2 (+12.0) |", "| e |  |", "| chance | 1.0 |"]


def test_copies_other_settings_and_other_data_are_no_seeds_and_other_data_is_not_compared():
    groups = evaluate.summarise([
        result("a", "clip", 0, mIoU=(10, 1)), result("copy", "clip", 0, mIoU=(10, 1)),
        result("b", "clip", 1, lr=0.2, mIoU=(10, 1)), result("c", "sparc", 0, on="pictures", mIoU=(10, 1))])
    assert [group["runs"] for group in groups] == [["a"], ["copy"], ["b"], ["c"]]
    assert ["difference" in group["metrics"]["mIoU"] for group in groups] == [False, True, True, False]


def test_the_command_writes_one_table_one_json_and_the_comparison(runs, tmp_path, capsys):
    paths = fresh(runs, tmp_path, "clip-0", "clip-1", "lotlip", "pictures")
    evaluate.main([*paths, "--images", "12", "--device", "cpu", "--json", str(tmp_path / "all.json")])
    said = capsys.readouterr().out
    groups = json.loads((tmp_path / "all.json").read_text())
    assert [group["runs"] for group in groups] == [["clip-0", "clip-1"], ["lotlip"], ["pictures"]]
    assert len(groups[0]["metrics"]["mIoU"]["values"]) == 2
    assert "| clip-0, 2 seeds |" in said and "| lotlip |" in said and "evaluated on different data" in said
    for name in ("comparison.png", "reading.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 5


def test_a_run_is_scored_on_benchmarks_by_name(runs, tmp_path, capsys):
    path, = fresh(runs, tmp_path, "pictures")
    items = [f"imagefolder:{tmp_path / name}" for name in ("one", "two")]
    items.append(f"jsonl:{lay_out('jsonl', tmp_path / 'jsonl')}")
    for k, name in enumerate(("one", "two")):
        class_folders(tmp_path / name, 3 + k)
    evaluate.main([path, "--device", "cpu", "--benchmark", *items])
    written = json.loads((tmp_path / "pictures/benchmarks.json").read_text())
    chances = [written["metrics"][f"{item} top-1"]["chance"] for item in items[:2]]
    assert chances == pytest.approx([100 / 3, 100 / 4])
    assert written["on"] == " ".join(items) and written["image_size"] == 32
    assert {"jsonl T2I R@1", "jsonl I2T median rank"} <= set(written["metrics"])
    for wrong, words in (("cifar:data", "NAME:PATH with one of imagefolder"), ("coco", "NAME:PATH"),
                         ("coco:/gone", "there is no /gone")):
        with pytest.raises(UserError, match=words):
            evaluate.main([path, "--device", "cpu", "--benchmark", wrong])
