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
from data import UserError, open_dataset
from evaluate import Model, evaluate_run, held_out_metrics, retrieval
from losses import group_patches
from scenes import BACKGROUNDS, COLOURS, KINDS, PERSPECTIVES, article
from test_benchmarks import class_folders, write
from test_train import fit

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
    "one each": torch.arange(40).flip(0),
    "some often": torch.tensor([0] * 12 + [*range(28)]),
}


@pytest.mark.parametrize("block", [100, 7])
@pytest.mark.parametrize("levels", [1000, 3, 1])  # with few levels many similarities are tied
@pytest.mark.parametrize("name", GROUPS)
def test_ranks_are_brute_forces(name, levels, block, monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK", block)
    of = GROUPS[name]
    similar = (scores(40, 40) * levels).round()
    found = evaluate.ranks(similar, torch.eye(40), of, of)
    for rank, row, group in zip(found, similar.tolist(), of):
        right = (of == group).tolist()
        assert rank == brute_rank(row, right)


def test_embeddings_that_are_nan_find_nothing():
    numbers = torch.arange(20)
    nothing = torch.full((20, 4), math.nan)
    assert (evaluate.ranks(nothing, nothing, numbers, numbers) == 19).all()


@pytest.mark.parametrize("name", GROUPS)
def test_the_chance_of_retrieval_is_what_random_similarities_reach(name):
    of = GROUPS[name]
    found = []
    for seed in range(300):
        images = scores(40, 40, seed=seed)
        found.append(retrieval(images, torch.eye(40), of, of))
    for metric, (_, chance) in found[0].items():
        values = [rows[metric][0] for rows in found]
        assert np.mean(values) == pytest.approx(chance, abs=1)


@pytest.mark.parametrize("C", [3, 5, 12])
def test_classification_is_clip_benchmarks(C):
    target = torch.arange(200) % (C - 1)  # one class does not occur
    classes = unit(C, 16)
    images = classes[target] + 0.5 * scores(200, 16, seed=2)
    similar = images @ classes.T
    mean_per_class = zeroshot_classification.balanced_accuracy_score(target, similar.argmax(1))
    found = evaluate.classification(images, classes, target)
    assert found["mean per class"][0] == pytest.approx(100 * mean_per_class)
    for k in (1, 5):
        if k <= C:
            share, = zeroshot_classification.accuracy(similar, target, [k])
            assert found[f"top-{k}"][0] == pytest.approx(100 * share)
    assert 20 < found["top-1"][0] < 95


# ---- models that know everything, or nothing -------------------------------------------------------------------------

N, SIZE, KIND_COUNT = 24, 32, 12
DATASET = open_dataset("scenes", "test", N, SIZE, KIND_COUNT)
SCENES = DATASET
FACTS = [SCENES.scene(i) for i in range(N)]
MASKS = [torch.from_numpy(SCENES.draw(scene)[1]).long() for scene in FACTS]
NAMES = [name for name, _ in KINDS[:KIND_COUNT]]

OWNERS = defaultdict(list)  # of a caption: the numbers of its scenes
for i, scene in enumerate(FACTS):
    long = scene.captions["long"]
    perspectives = [scene.captions[name] for name in PERSPECTIVES]
    for text in (*long, " ".join(long), scene.captions["short"], *perspectives):
        OWNERS[text].append(i)

MEANINGS = {}  # of a prompt: the kind, the kind and colour, or the background that it names
for ground in BACKGROUNDS:
    MEANINGS[f"the background is plain {ground}."] = "background"
for kind, name in enumerate(NAMES):
    for template in ("{1}", *evaluate.SCENE_PROMPTS):
        MEANINGS[template.format(name, article(name))] = name
    for c, colour in enumerate(COLOURS):
        MEANINGS[f"the main object is {article(f'{colour} {name}')}."] = (kind, c)


class Oracle:
    """Embeds by looking the answer up, in dimensions of names. A patch is a pixel, so localisation can be perfect. A branch
    knows the texts of one perspective."""

    settings = dict(threshold=0.99, perspectives=6)
    config = SimpleNamespace(branches=6)
    merge = staticmethod(lambda branches: branches.mean(1))

    def __init__(self):
        self.known = {}  # name of a dimension: its number

    def vector(self, *names):
        x = torch.zeros(2000)
        for name in names:
            x[self.known.setdefault(name, len(self.known))] = 1
        return F.normalize(x, dim=0)

    def image(self, number):
        """The number of a scene -> its branches [H,D], its pixels' [P,D]."""
        scene = FACTS[number]
        cells = [self.vector("background")]
        for k, o in enumerate(scene.objects):
            about = [text for text, a in zip(scene.captions["long"], scene.about) if a == k]
            cells.append(self.vector(NAMES[o.kind], *about))
        main = scene.objects[0]
        branches = []
        for name in PERSPECTIVES:
            branches.append(self.vector(number, NAMES[main.kind], (main.kind, main.colour), scene.captions[name]))
        mask = MASKS[number].flatten()
        return torch.stack(branches), torch.stack(cells)[mask]

    def batches(self, items, load):
        for start in range(0, len(items), 10):
            numbers = items[start:start + 10]
            images, patches = zip(*map(self.image, numbers))
            numbered = [load(number)[1] for number in numbers]
            yield torch.stack(images), torch.stack(patches), numbered

    def texts(self, texts):
        rows = []
        for text in texts:
            owners = OWNERS.get(text, [])
            rows.append(self.vector(text, MEANINGS.get(text, text), *owners))
        return torch.stack(rows)


def test_a_perfect_embedding_scores_100_everywhere():
    rows, captions = held_out_metrics(Oracle(), DATASET, N)
    assert len(rows) == 35
    assert len(captions) == N
    _, fewer = held_out_metrics(Oracle(), DATASET, 8)
    assert max(fewer) == N - 1  # they are spread over all, which may be several sets
    del rows["patches grouped"]  # these describe, and have no best value
    right = rows.pop("group finds its sentence")
    wrong = rows.pop("group finds its sentence, wrong image")
    assert wrong < right
    for name, (value, chance) in rows.items():
        assert value == pytest.approx(100, abs=1e-3), name
        assert 0 < chance < 100, name


def test_branches_that_no_perspective_trained_are_merged():
    oracle = Oracle()
    oracle.settings = dict(perspectives=0)
    oracle.config = SimpleNamespace(branches=5)
    captions = [DATASET[i][1] for i in range(N)]
    branches = unit(N, 5, 2000)
    merged = oracle.merge(branches)[:, None].expand(-1, 5, -1)
    expected = evaluate.perspective_retrieval(oracle, merged, captions)
    assert evaluate.perspective_retrieval(oracle, branches, captions) == expected


def test_the_chance_of_segmentation_is_what_guessing_reaches():
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (200, 200), generator=rng)
    truth = truth ** 2 - 1  # not all classes, and unknown ones
    guess = torch.randint(0, 12, (200, 200), generator=rng)
    value, chance = evaluate.miou(evaluate.confusion(truth, guess, 12))
    assert value == pytest.approx(chance, rel=0.03)


CLASSES = unit(1 + KIND_COUNT, 64)
SENTENCES = [unit(len(scene.about), 64, seed=1 + i) for i, scene in enumerate(FACTS)]


def random_patches(side):
    return unit(N, side * side, 64, seed=99)


def brute_covered(mask, k, patch):
    covered = []
    for y in range(0, SIZE, patch):
        for x in range(0, SIZE, patch):
            cell = mask[y:y + patch, x:x + patch].flatten().tolist()
            covered.append(cell.count(k + 1) * 16 >= patch * patch)
    return covered


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(evaluate, "ground_and_kinds", lambda *_: CLASSES)
    model = SimpleNamespace(settings=dict(threshold=0.99))
    return lambda patches: evaluate.patch_metrics(model, SCENES, FACTS, patches, patches, SENTENCES)


@pytest.mark.parametrize("patch", [1, 8])
def test_pointing_is_what_loops_over_patches_and_pixels_count(patch, measured):
    patches = random_patches(SIZE // patch)
    rows = measured(patches)
    expected = defaultdict(list)
    for cells, texts, scene, mask in zip(patches, SENTENCES, FACTS, MASKS):
        for about, text in zip(scene.about, texts):
            if about >= 0:
                covered = brute_covered(mask, about, patch)
                expected["chance"].append(np.mean(covered))
                nearest = (cells @ text).argmax()
                expected["pointing by sentence"].append(covered[nearest])
                name = CLASSES[1 + scene.objects[about].kind]
                nearest = (cells @ name).argmax()
                expected["pointing by name"].append(covered[nearest])
    chance = 100 * np.mean(expected.pop("chance"))
    for name, hits in expected.items():
        assert rows[name] == pytest.approx((100 * np.mean(hits), chance))


@pytest.mark.parametrize("side", [4, 32])
def test_miou_is_what_loops_over_scenes_and_classes_count(side, measured):
    patches = random_patches(side)
    meet, union = np.zeros((2, 1 + KIND_COUNT))
    for cells, scene, mask in zip(patches, FACTS, MASKS):
        maps = (CLASSES @ cells.T).reshape(1, -1, side, side)
        pixels = F.interpolate(maps, size=(SIZE, SIZE), mode="bilinear")
        guess = pixels[0].argmax(0)
        kinds = [0] + [o.kind + 1 for o in scene.objects]
        truth = torch.tensor(kinds)[mask]
        for c in range(1 + KIND_COUNT):
            guessed = guess == c
            true = truth == c
            meet[c] += (guessed & true).sum()
            union[c] += (guessed | true).sum()
    value, _ = measured(patches)["mIoU"]
    assert value == pytest.approx(100 * np.mean(meet / union))


def test_a_group_finds_its_sentence_where_no_other_is_more_similar(measured):
    patches = random_patches(4)
    finds, grouped = [], []
    for cells, texts in zip(patches, SENTENCES):
        groups, weights = group_patches(cells[None], texts[None], 0.99)
        hits = []
        for k, similar in enumerate((groups[0] @ texts.T).tolist()):
            hits.append(similar[k] == max(similar))
        finds.append(np.mean(hits))
        grouped.append(np.mean(weights.numpy() > 0))
    rows = measured(patches)
    assert rows["group finds its sentence"][0] == pytest.approx(100 * np.mean(finds))
    assert rows["patches grouped"][0] == pytest.approx(100 * np.mean(grouped))


# ---- whole runs ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rows = []
    for i in range(60):
        image = Image.effect_noise((40, 48), 20 + i)
        image.convert("RGB").save(folder / f"{i}.png")
        rows.append(dict(image=f"{i}.png", caption=[f"text {i}", f"{i} again"]))
    captions = folder / "captions.jsonl"
    write(captions, rows)
    fit(folder / "scenes", method="holistic")
    fit(folder / "pictures", method="holistic", tokenizer="scenes", data=str(captions))
    fit(folder / "clip", method="clip")
    return folder


@pytest.fixture
def fresh(runs, tmp_path):
    """Copies a run, to write into."""
    def copy(name):
        shutil.copytree(runs / name, tmp_path / name)
        return str(tmp_path / name)
    return copy


def run_quickly(*argv):
    evaluate.main([*argv, "--device", "cpu"])


@pytest.mark.parametrize("name", ["scenes", "pictures"])
def test_a_run_gets_its_table_its_json_and_its_figures(name, runs, capsys, tmp_path):
    found = evaluate_run(runs / name, n=12, device="cpu", out=tmp_path)
    written = json.loads((tmp_path / name / "evaluation.json").read_text())
    said = capsys.readouterr().out
    assert written["metrics"] == found["metrics"]
    for metric, pair in found["metrics"].items():
        value, chance = pair.values()
        assert 0 <= value <= 100
        assert 0 < chance <= 100
        assert f"{value:7.1f} {chance:7.1f}  {metric}\n" in said
    for figure in ("curves", "patches"):
        drawn = Image.open(tmp_path / name / f"{figure}.png").convert("L")
        assert np.asarray(drawn).std() > 5


def test_pictures_that_will_not_decode_are_passed_over_and_counted(runs, tmp_path, capsys):
    shutil.copytree(runs, tmp_path / "data")
    for i in range(0, 60, 2):
        write(tmp_path / f"data/{i}.png", "x")
    own = evaluate_run(runs / "pictures", device="cpu")
    other = evaluate_run(runs / "pictures", data=dict(data=[str(tmp_path / "data/captions.jsonl")]), device="cpu")
    assert own["images"] < 30  # the held-out ones
    assert other["images"] == 30  # all that are left
    assert "skipped: 30, " in capsys.readouterr().out


def test_branches_become_their_mean_or_one(runs):
    branches = unit(2, 5, 8)
    for branch, expected in (("mean", branches.mean(1)), ("4", branches[:, 4])):
        assert torch.equal(Model(runs / "scenes", "cpu", branch).merge(branches), expected)


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
    path = fresh("clip")
    content = torch.load(f"{path}/checkpoint.pt", weights_only=True)
    content["settings"]["eval_images"] = 12
    torch.save(content, f"{path}/checkpoint.pt")
    for other in ("{} --images 9", "{}/checkpoint.pt", "{} --image-size 64", "{} --branch 0"):
        run_quickly(*other.format(path).split())
        assert "add --out FOLDER" in capsys.readouterr().out
    run_quickly(path, "--images", "9", "--out", f"{tmp_path}/out")
    assert list(tmp_path.rglob("evaluation.json")) == [tmp_path / "out/clip/evaluation.json"]
    run_quickly(path)
    assert (tmp_path / "clip/evaluation.json").is_file()


@pytest.mark.parametrize("flag, target", [
    ("--out", "file"), ("--json", "file/all.json"), ("--json", "clip"), ("--export open_clip", "clip")])
def test_what_cannot_be_written_is_refused_before_the_work(flag, target, fresh, tmp_path):
    path = fresh("clip")
    write(tmp_path / "file", "in the way")
    with pytest.raises(UserError, match=f"{target} cannot be written"):
        run_quickly(path, *flag.split(), f"{tmp_path}/{target}")


def test_several_runs_are_rows_of_one_table_and_what_is_no_run_is_passed_over(fresh, tmp_path, capsys):
    paths = [fresh(name) for name in ("clip", "scenes", "pictures")]
    write(tmp_path / "comparison.png", "x")
    run_quickly(f"{tmp_path}/comparison.png", *paths, "--images", "12", "--json", f"{tmp_path}/all.json")
    reports = json.loads((tmp_path / "all.json").read_text())
    *_, head, _, clip, scenes, pictures, chance = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"\| % \| short T2I R@1 \|.*\| mIoU \|", head)
    for row, report in zip((clip, scenes), reports):
        miou = report["metrics"]["mIoU"]["value"]
        assert re.fullmatch(rf"\| {report['name']} \|.*\| {miou:.1f} \|", row)
    assert re.fullmatch(r"\| pictures, 9 images of .* \| .*\|  \|", pictures)
    assert chance.startswith("| chance |")


def test_a_run_is_scored_on_benchmarks_by_name(fresh, tmp_path):
    path = fresh("pictures")
    class_folders(tmp_path / "one", 3)
    class_folders(tmp_path / "two", 4)
    one = f"imagefolder:{tmp_path}/one"
    two = f"imagefolder:{tmp_path}/two"
    run_quickly(path, "--benchmark", one, two)
    metrics = json.loads((tmp_path / "pictures/benchmark-imagefolder-imagefolder.json").read_text())["metrics"]
    assert metrics["imagefolder top-1"]["chance"] == pytest.approx(100 / 3)
    assert metrics[f"{two} top-1"]["chance"] == pytest.approx(100 / 4)


@pytest.mark.parametrize("flags, words", [
    ("--benchmark coco:/gone", "--benchmark coco:/gone: write NAME:PATH with a path that exists and one of"),
    ("--image-size 0", "--image-size: must be at least 1"),
    ("--activation gelu", "knows its activation"),
])
def test_a_mistake_ends_in_one_sentence(flags, words, runs):
    with pytest.raises(UserError, match=words):
        run_quickly(str(runs / "clip"), *flags.split())
