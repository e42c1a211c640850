"""Every metric is what brute force and CLIP_benchmark count, chance is what guessing gives, a perfect embedding scores
100, and every mistake ends in one sentence."""

import json
import math
import re
import shutil
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification
from PIL import Image

import evaluate
import train
from data import Captions, UserError, open_dataset
from evaluate import Model, evaluate_run, held_out_metrics, retrieval
from losses import group_patches
from scenes import BACKGROUNDS, COLOURS, KINDS, PERSPECTIVES, article
from test_benchmarks import class_folders, lay_out, write

# CLIP_benchmark 1.6.2 calls float() on arrays of one number, which numpy 2.4 no longer takes
zeroshot_classification.float = lambda x: x.item() if hasattr(x, "item") else float(x)


def scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(scores(*shape, seed=seed), dim=-1)


# ---- metrics against brute force and against CLIP_benchmark ----------------------------------------------------------

def brute_rank(row, right):
    """Places in front of the first right candidate when, among equals, the right ones stand last."""
    order = sorted(range(len(row)), key=lambda c: (-row[c], right[c]))
    return next(place for place, c in enumerate(order) if right[c])


GROUPS = {
    "one each": torch.randperm(40, generator=torch.Generator().manual_seed(5)),
    "some often": torch.tensor([0] * 12 + list(range(28))),
}


@pytest.mark.parametrize("block", [100, 7])
@pytest.mark.parametrize("levels", [1000, 3, 1])  # with few levels many similarities are tied
@pytest.mark.parametrize("name", GROUPS)
def test_ranks_are_brute_forces(name, levels, block, monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK", block)
    sim, of = (scores(40, 40) * levels).round(), GROUPS[name]
    found = evaluate.ranks(sim[:, None], torch.eye(40)[:, None], of, of)
    right = of[:, None] == of
    assert found.tolist() == [brute_rank(*pair) for pair in zip(sim.tolist(), right.tolist())]


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_model_that_says_the_same_of_everything_finds_nothing(value):
    numbers = torch.arange(20)
    same = torch.full((20, 4), value)
    rows = retrieval(same[:, None], same, numbers, numbers)
    assert rows["T2I R@10"][0] == rows["I2T R@10"][0] == 0


@pytest.mark.parametrize("name", GROUPS)
def test_the_chance_of_retrieval_is_what_random_similarities_reach(name):
    of = GROUPS[name]
    found = [retrieval(scores(40, 1, 40, seed=seed), torch.eye(40), of, of) for seed in range(300)]
    for metric, (_, chance) in found[0].items():
        values = [rows[metric][0] for rows in found]
        assert np.mean(values) == pytest.approx(chance, abs=1)


@pytest.mark.parametrize("C", [3, 5, 12])
def test_classification_is_clip_benchmarks(C):
    n = 200
    target = torch.arange(n) % (C - 1)  # one class does not occur
    prompts = unit(C, 3, 16, seed=1)
    noise = 0.5 * scores(n, 16, seed=2)
    images = F.normalize(prompts[target].mean(1) + noise, dim=-1)

    class Loader(list):
        dataset = SimpleNamespace(classes=range(C))

    def tokenizer(texts):
        return torch.tensor([[int(word) for word in text.split()] for text in texts])

    loader = Loader([(torch.arange(n), target)])
    templates = ["0 {c}", "1 {c}", "2 {c}"]
    given = SimpleNamespace(encode_image=lambda i: images[i], encode_text=lambda t: prompts[t[:, 1], t[:, 0]])
    names = [str(c) for c in range(C)]
    theirs = zeroshot_classification.evaluate(given, loader, tokenizer, names, templates, "cpu", False)
    classes = F.normalize(prompts.mean(1), dim=-1)
    ours = evaluate.classification(images[:, None], classes, target)
    others = {"top-1": "acc1", "top-5": "acc5", "mean per class": "mean_per_class_recall"}
    for name, (value, _) in ours.items():
        assert value == pytest.approx(100 * theirs[others[name]], abs=1e-4)
    assert ("top-5" in ours) == (C >= 5) and 20 < ours["top-1"][0] < 95


# ---- models that know everything, or nothing -------------------------------------------------------------------------

N, SIZE, KIND_COUNT = 24, 32, 12
DATASET = open_dataset("scenes", "test", N, SIZE, KIND_COUNT)
SCENES = DATASET.scenes
FACTS = [SCENES.scene(i) for i in range(N)]
NAMES = [name for name, _ in KINDS[:KIND_COUNT]]
GROUNDS = [f"the background is plain {ground}." for ground in BACKGROUNDS]


class Oracle:
    """Embeds by looking the answer up, in dimensions of names. A patch is a pixel, so localisation can be perfect. A branch
    knows the texts of one perspective."""

    settings = dict(threshold=0.99, perspectives=6)
    config = SimpleNamespace(branches=6)
    merge = staticmethod(lambda branches: branches.mean(1, keepdim=True))

    def __init__(self):
        self.known = {}  # name of a dimension: its number

    def vector(self, *names):
        x = torch.zeros(1500)
        for name in names:
            x[self.known.setdefault(name, len(self.known))] = 1
        return F.normalize(x, dim=0)

    def image(self, number):
        """The number of a scene -> its branches [H,D], its pixels' [P,D]."""
        scene = FACTS[number]
        main = scene.objects[0]
        cells = [self.vector("background")]
        for k, o in enumerate(scene.objects):
            about = [text for text, a in zip(scene.captions["long"], scene.about) if a == k]
            cells.append(self.vector(NAMES[o.kind], *about))
        mask = torch.from_numpy(SCENES.draw(scene)[1]).flatten().long()
        branches = []
        for name in PERSPECTIVES:
            branches.append(self.vector(number, NAMES[main.kind], (main.kind, main.colour), (name, scene.captions[name])))
        return torch.stack(branches), torch.stack(cells)[mask]

    def batches(self, items, load):
        for start in range(0, len(items), 10):
            some = items[start:start + 10]
            _, numbered = zip(*map(load, some))
            images, patches = zip(*map(self.image, some))
            yield torch.stack(images), torch.stack(patches), numbered

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
            for name in PERSPECTIVES:
                text = scene.captions[name]
                meanings[text] = [*meanings.get(text, []), i, (name, text)]
        return torch.stack([self.vector(*meanings[text]) for text in texts])


def test_a_perfect_embedding_scores_100_everywhere():
    rows, images, captions = held_out_metrics(Oracle(), DATASET, N)
    assert len(rows) == 8 * 3 + 5 + 6 and len(images) == len(captions) == N
    for name in ("patches grouped", "group finds its sentence", "group finds its sentence, wrong image"):
        del rows[name]  # they describe, and have no best value
    for name, (value, chance) in rows.items():
        assert value == pytest.approx(100, abs=1e-3) and 0 < chance < 100, name


def test_the_chance_of_segmentation_is_what_guessing_reaches():
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (200, 200), generator=rng) ** 2 - 1  # not all classes, unequally often, and unknown ones
    guess = torch.randint(0, 12, (200, 200), generator=rng)
    value, chance = evaluate.miou(evaluate.confusion(truth, guess, 12))
    assert value == pytest.approx(chance, rel=0.03)


def brute_covered(mask, k, patch):
    covered = []
    for y in range(0, SIZE, patch):
        for x in range(0, SIZE, patch):
            cell = mask[y:y + patch, x:x + patch].flatten().tolist()
            covered.append(cell.count(k + 1) * 16 >= patch * patch)
    return covered


def brute_finds(cells, texts):
    """The share of texts whose group is more similar to them than to the others, and that of weights that are not 0."""
    groups, weights = group_patches(cells[None], torch.stack(texts)[None], 0.99)
    hits = []
    for k, group in enumerate(groups[0]):
        similar = [(group @ text).item() for text in texts]
        hits.append(similar.index(max(similar)) == k)
    return np.mean(hits), np.mean(weights.numpy() > 0)


@pytest.mark.parametrize("patch", [1, 8])
def test_places_are_what_loops_over_patches_and_pixels_count(patch):
    side = SIZE // patch
    patches = unit(N, side**2, 64, seed=999)
    known = {}
    model = Oracle()
    model.texts = lambda texts: torch.stack([known.setdefault(t, unit(64, seed=len(known))) for t in texts])
    model.image = lambda number: (unit(64), patches[number])
    rows, *_ = held_out_metrics(model, DATASET, N)
    ground = F.normalize(sum(known[text] for text in GROUNDS), dim=0)
    classes = torch.stack([ground, *(known[article(name)] for name in NAMES)])
    found = defaultdict(list)
    meet, union = np.zeros((2, KIND_COUNT + 1))
    for i, scene in enumerate(FACTS):
        cells, mask = patches[i], SCENES.draw(scene)[1]
        wrong = patches[{0: 9, 10: 19, 20: N - 1}.get(i, i - 1)]  # the one before, in its batch
        texts = [known[text] for text in scene.captions["long"]]
        finds, grouped = brute_finds(cells, texts)
        found["group finds its sentence"].append(finds)
        found["group finds its sentence, wrong image"].append(brute_finds(wrong, texts)[0])
        found["patches grouped"].append(grouped)
        for about, text in zip(scene.about, texts):
            if about >= 0:
                covered = brute_covered(mask, about, patch)
                name = classes[1 + scene.objects[about].kind]
                found["pointing by sentence"].append(covered[(cells @ text).argmax()])
                found["pointing by name"].append(covered[(cells @ name).argmax()])
                found["chance"].append(np.mean(covered))
        maps = (cells @ classes.T).T.reshape(1, -1, side, side)
        guess = F.interpolate(maps, size=(SIZE, SIZE), mode="bilinear")[0].argmax(0).numpy()
        truth = np.array([0] + [o.kind + 1 for o in scene.objects])[mask]
        for c in range(KIND_COUNT + 1):
            meet[c] += ((guess == c) & (truth == c)).sum()
            union[c] += ((guess == c) | (truth == c)).sum()
    assert rows["pointing by name"][1] == pytest.approx(100 * np.mean(found.pop("chance")))
    for name, values in found.items():
        assert rows[name][0] == pytest.approx(100 * np.mean(values), abs=1e-3), name
    assert rows["mIoU"][0] == pytest.approx(100 * np.mean(meet / union))


def test_reading_gives_a_model_only_the_first_sentences():
    """Pictures come in pairs that differ from the third sentence on."""
    captions = []
    for i in range(12):
        sentences = [f"{i // 2} a", "b", f"{i} c", "d", "e"]
        captions.append(Captions("", [], sentences, []))
    known = {}

    class Reader:
        def texts(self, texts):
            return torch.eye(50)[[known.setdefault(text, len(known)) for text in texts]]

    images = torch.zeros(12, 1, 50)
    for k in range(5):
        texts = [" ".join(c.long[:k + 1]) for c in captions]
        images += Reader().texts(texts)[:, None]
    found = evaluate.reading(Reader(), images, captions)
    for k, (*given, chance) in enumerate(found["length"], 1):
        assert given == [k, 100, 100]
        assert chance == pytest.approx(200 / 12 if k < 3 else 100 / 12)


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUN = dict(size="nano", images=32, batch=16, eval_images=0, device="cpu", workers=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rows = []
    for i in range(60):
        image = Image.effect_noise((40, 48), 20 + i)
        image.convert("RGB").save(folder / f"{i}.png")
        captions = [f"text {i}", f"{i} again", f"once more {i}"]
        rows.append(dict(image=f"{i}.png", caption=captions[:1 + i % 3]))
    write(folder / "captions.jsonl", rows)
    methods = {
        "scenes": dict(method="holistic"),
        "lotlip": dict(method="lotlip"),
        "pictures": dict(method="holistic", tokenizer="scenes", data=str(folder / "captions.jsonl")),
        "clip-0": dict(method="clip"),
        "clip-1": dict(method="clip", seed=1),
    }
    for name, flags in methods.items():
        train.train({**RUN, **flags, "out": str(folder / name)})
    return folder


@pytest.fixture
def fresh(runs, tmp_path):
    """Copies runs, to write into."""
    def copy(*names):
        for name in names:
            shutil.copytree(runs / name, tmp_path / name)
        return [str(tmp_path / name) for name in names]
    return copy


def run_quickly(*argv):
    evaluate.main([*argv, "--device", "cpu", "--no-figures"])


@pytest.mark.parametrize("name, n", [("scenes", 12), ("lotlip", 12), ("pictures", None)])
def test_a_run_gets_its_table_its_json_and_its_figures(name, n, runs, capsys, tmp_path):
    found = evaluate_run(runs / name, n=n, device="cpu", out=tmp_path)
    written = json.loads((tmp_path / name / "evaluation.json").read_text())
    said = capsys.readouterr().out
    assert written["metrics"] == found["metrics"]
    for metric, pair in found["metrics"].items():
        value, chance = pair.values()
        assert 0 <= value <= 100 and 0 < chance <= 100
        assert f"{value:7.1f} {chance:7.1f}  {metric}\n" in said
    assert written["branch"] == "mean"
    assert len(list((tmp_path / name).glob("*.png"))) == 3
    for figure in ("curves", "patches", "reading"):
        drawn = Image.open(tmp_path / name / f"{figure}.png").convert("L")
        assert np.asarray(drawn).std() > 5


def test_pictures_that_will_not_decode_are_passed_over_and_counted(runs, tmp_path, capsys):
    shutil.copy(runs / "captions.jsonl", tmp_path)
    for i in range(60):
        write(tmp_path / f"{i}.png", "x")
        if i % 2:
            shutil.copy(runs / f"{i}.png", tmp_path)
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
    model = Model(runs / "scenes", "cpu", "max")
    branches, captions = model.images(range(24), lambda i: DATASET[i])
    short = [c.short[0] for c in captions]
    each = torch.einsum("nhd,md->hnm", branches, model.texts(short))
    sim = {"mean": each.mean(0), "max": each.amax(0)}.get(branch, each[-1])
    hits = []
    for row, caption in zip(sim.tolist(), short):
        right = [other == caption for other in short]
        hits.append(brute_rank(row, right) < 10)
    assert found["metrics"]["short I2T R@10"]["value"] == pytest.approx(100 * np.mean(hits))


def test_a_branch_or_a_resolution_that_is_not_there_is_refused(runs):
    for branch in ("5", "-1", "best"):
        with pytest.raises(UserError, match=f"--branch {branch}: take .* mean, max, 0, 1, 2, 3, 4"):
            Model(runs / "scenes", "cpu", branch)
    with pytest.raises(UserError, match="--image-size|image size"):
        Model(runs / "clip-0", "cpu", image_size=60)


def test_pictures_are_embedded_from_python_beside_texts(runs, tmp_path):
    model = Model(runs / "scenes", "cpu")
    picture = Image.new("RGB", (40, 30), "red")
    picture.save(tmp_path / "red.png")
    images = model.embed([picture, tmp_path / "red.png"])
    assert torch.equal(images[0], images[1])
    model.clip.visual.proj.data *= math.nan
    with pytest.raises(UserError, match="scenes embeds images as NaN or infinity"):
        model.embed([picture])


# ---- what is written where -------------------------------------------------------------------------------------------

def test_only_the_standard_evaluation_is_written_into_a_runs_folder(fresh, tmp_path, capsys):
    path, = fresh("clip-0")
    content = torch.load(f"{path}/checkpoint.pt", weights_only=True)
    content["settings"]["eval_images"] = 12
    for name in ("checkpoint", "best"):
        torch.save(content, f"{path}/{name}.pt")
    run_quickly(path)
    for other in ("{} --images 9", "{}/best.pt", "{} --image-size 64", "{} --branch 0"):
        run_quickly(*other.format(path).split())
        assert "add --out FOLDER" in capsys.readouterr().out
    run_quickly(path, "--images", "9", "--out", f"{tmp_path}/out")
    found = {}
    for file in tmp_path.rglob("evaluation.json"):
        found[file.parent] = json.loads(file.read_text())["images"]
    assert found == {tmp_path / "clip-0": 12, tmp_path / "out/clip-0": 9}


def test_a_folder_that_cannot_be_written_costs_no_table(fresh, tmp_path, capsys):
    path, = fresh("clip-0")
    write(tmp_path / "file", "in the way")
    with pytest.raises(OSError, match="file"):
        run_quickly(path, "--images", "9", "--out", f"{tmp_path}/file")
    assert "  mIoU\n" in capsys.readouterr().out
    for flags in (["--json", f"{tmp_path}/file/all.json"], ["--export", "open_clip", f"{tmp_path}/file/model.pt"]):
        with pytest.raises(UserError, match="file/.* cannot be written"):
            run_quickly(path, *flags)


def test_several_runs_are_rows_of_one_table_and_what_is_no_run_is_passed_over(fresh, tmp_path, capsys):
    paths = fresh("clip-0", "clip-1", "pictures")
    for name in ("comparison.png", "claims/row-0/checkpoint.pt"):
        write(tmp_path / name, "x")
    others = [f"{tmp_path}/comparison.png", f"{tmp_path}/claims"]
    run_quickly(*others, *paths, "--images", "12", "--json", f"{tmp_path}/all.json")
    reports = json.loads((tmp_path / "all.json").read_text())
    assert [report["name"] for report in reports] == ["clip-0", "clip-1", "pictures"]
    head, _, *rows, chance = capsys.readouterr().out.strip().splitlines()[-6:]
    assert head.startswith("| % | short T2I R@1 |") and head.endswith("| mIoU |")
    for row, report in zip(rows[:2], reports):
        miou = report["metrics"]["mIoU"]["value"]
        assert row.startswith(f"| {report['name']} |") and row.endswith(f"| {miou:.1f} |")
    assert rows[2].startswith("| pictures |") and rows[2].endswith("|  |")
    assert chance.startswith("| chance |")
    with pytest.raises(UserError, match="no run among"):
        run_quickly(*others)
    with pytest.raises(UserError, match="there is no .*/clip-7"):
        run_quickly(f"{tmp_path}/clip-7", *paths)


def test_a_run_that_cannot_be_read_costs_the_others_nothing(fresh, tmp_path, capsys):
    good, = fresh("clip-0")
    write(tmp_path / "torn/checkpoint.pt", "x")
    with pytest.raises(UserError, match="torn/checkpoint.pt"):
        run_quickly(f"{tmp_path}/torn", good)
    assert (tmp_path / "clip-0/evaluation.json").is_file()
    assert "  mIoU\n" in capsys.readouterr().out


def test_a_run_is_scored_on_benchmarks_by_name(fresh, tmp_path):
    path, = fresh("pictures")
    for k, name in enumerate(("one", "two")):
        class_folders(tmp_path / name, 3 + k)
    pairs = lay_out("jsonl", tmp_path / "jsonl")
    items = [f"imagefolder:{tmp_path}/one", f"imagefolder:{tmp_path}/two", f"jsonl:{pairs}"]
    run_quickly(path, "--benchmark", *items)
    written = json.loads((tmp_path / "pictures/benchmarks.json").read_text())
    metrics = written["metrics"]
    assert metrics["imagefolder top-1"]["chance"] == pytest.approx(100 / 3)
    assert metrics[f"{items[1]} top-1"]["chance"] == pytest.approx(100 / 4)
    assert "jsonl T2I R@1" in metrics and written["on"] == " ".join(items)


@pytest.mark.parametrize("wrong", ["cifar:data", "coco", "coco:/gone"])
def test_a_benchmark_that_is_none_is_refused(wrong, runs):
    with pytest.raises(UserError, match=f"--benchmark {wrong}: write NAME:PATH with a path that exists and one of"):
        run_quickly(str(runs / "clip-0"), "--benchmark", wrong)
