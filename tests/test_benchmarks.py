"""Every published layout pairs the right pictures and texts, classes get their names, VOC is counted as loops count it,
and a data set that is not as it was published ends in one sentence."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import MEAN, STD, UserError
from evaluate import BENCHMARKS, IMAGENET, LAYOUTS, TEMPLATES, TORCHVISION, Model

# ---- published layouts -----------------------------------------------------------------------------------------------

class Grey:
    """A model of pictures in one grey each and texts with one number each: picture 10·k and text "... k ..." agree."""

    config, settings, branch = SimpleNamespace(image_size=16, text_style="clip"), {}, "mean"
    batches, encode, images = Model.batches, Model.encode, Model.images
    merge, prepare = Model.merge, Model.prepare
    batch, device = 7, "cpu"
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
    folder, path = "images", root
    if name in ("coco", "flickr30k"):
        folder, path = "val2014", root / "dataset_coco.json"
        rows = [dict(split="train")]
        for k in range(n):
            sentences = [dict(raw=text) for text in [f"this is {k}"] * 5 + ["39"]]
            rows.append(dict(filepath=folder, filename=f"{k}.png", split="test", sentences=sentences))
        write(path, dict(images=rows))
    elif name == "urban1k":
        for k in range(n):
            picture(root / f"image/{k}.jpg", k)
            write(root / f"caption/{k}.txt", f"a street, {k}\nmore 39")
    elif name == "dci":
        folder = "photos"
        names = [f"{k}.json" for k in range(n)]
        write(root / "splits.json", dict(train=names[:3], test=names[3:]))
        for k in range(n):
            row = dict(image=f"{k}.png", short_caption=f"number {k}", extra_caption="and more")
            write(root / f"annotations/{k}.json", row)
    elif name == "iiw":
        for k in range(n):
            picture(root / f"folder_{k % 3}/p{k}.jpg", k)
        write(root / "DCI_Test/data.jsonl", [dict(image="p0.jpg", IIW="long 0")])
        rows = [{"image/key": f"p{k}", "IIW": f"long {k}"} for k in range(1, n)]
        write(root / "IIW-400/data.jsonl", rows)
    elif name == "docci":
        path = root / "docci_descriptions.jsonlines"
        rows = [dict(split="test", image_file=f"{k}.png", description=f"it has {k}") for k in range(n)]
        write(path, [*rows, dict(split="train", image_file="x.png", description="it has 39")])
    elif name.startswith("share4v"):
        path = root / "share4v_sam_10k.json"
        rows = []
        for k in range(n):
            talk = [{"from": "human", "value": "what is 39?"}, {"from": "gpt", "value": f"it is {k}"}]
            rows.append(dict(image=f"images/{k}.png", conversations=talk))
        write(path, rows)
    else:
        path = root / "captions.jsonl"
        rows = [dict(image=f"images/{k}.png", caption=[f"{k}", f"again {k}"]) for k in range(n)]
        write(path, [*rows, dict(image="images/1.png", caption="once more 1")])
    for k in range(n):
        picture(root / folder / f"{k}.png", k)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_published_layout_pairs_the_right_pictures_and_texts(name, tmp_path):
    model = Grey()
    rows = BENCHMARKS[name](model, lay_out(name, tmp_path))
    assert rows["T2I R@1"] == (100, pytest.approx(100 / 12)) and rows["I2T R@1"][0] == 100
    assert not any("39" in text for text in model.said)
    assert len(model.said) == {"coco": 60, "flickr30k": 60, "jsonl": 25}.get(name, 12)


@pytest.mark.parametrize("name, file, content, words", [
    ("coco", "dataset_coco.json", "[1]", "not laid out as coco"),
    ("coco", "dataset_coco.json", "{", "cannot read .*dataset_coco.json"),
    ("coco", "val2014/3.png", None, "no picture .*3.png"),
    ("coco", "val2014/3.png", "x", "3.png.*no picture is left out"),
    ("urban1k", "caption/3.txt", "", "pictures without captions"),
    ("dci", "annotations/3.json", None, "cannot read .*3.json"),
    ("docci", "docci_descriptions.jsonlines", '{"split": "test"}', "not laid out as docci"),
    ("jsonl", "captions.jsonl", '{"image": "images/1.png", "caption": 3}', "not laid out as jsonl")])
def test_a_layout_that_is_wrong_ends_in_a_sentence(name, file, content, words, tmp_path):
    path = lay_out(name, tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        write(tmp_path / file, content)
    with pytest.raises(UserError, match=words) as caught:
        BENCHMARKS[name](Grey(), path)
    assert "\n" not in str(caught.value)


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
    assert "a photo of a class 3." in model.said and len(model.said) == 6 * len(TEMPLATES["imagenet"])
    names = tmp_path / "classnames.txt"
    names.write_text("\n".join(f"thing {k}" for k in (0, 1, 2, 3, 5, 4)))
    rows = score(model, tmp_path)  # the names of the last two classes are changed over: 2 + 3 of 12
    assert rows["top-1"][0] == pytest.approx(100 * 7 / 12)
    assert rows["mean per class"][0] == pytest.approx(100 * 4 / 6)
    names.write_text("one\ntwo")
    with pytest.raises(UserError, match="pictures of 6 classes, but there are 2 names"):
        score(model, tmp_path)
    with pytest.raises(UserError, match="class_1 does not hold what .* reads"):
        score(model, tmp_path / "class_1")


def test_torchvisions_sets_are_read_as_torchvision_lays_them_out(tmp_path):
    names = [f"dish_{k}" for k in range(6)]
    write(tmp_path / "food-101/meta/test.json", {name: [f"{name}/1"] for name in names})
    for k, name in enumerate(names):
        picture(tmp_path / f"food-101/images/{name}/1.jpg", k)
    model = Grey()
    assert BENCHMARKS["food101"](model, tmp_path)["top-1"][0] == 100
    assert "a photo of dish 3, a type of food." in model.said


@pytest.mark.parametrize("name", [*TORCHVISION, "voc", "imagenet"])
def test_a_set_that_is_not_there_is_not_downloaded_but_named(name, tmp_path):
    with pytest.raises(UserError, match="nothing is downloaded here") as caught:
        BENCHMARKS[name](Grey(), tmp_path)
    assert "\n" not in str(caught.value)


def test_imagenet_has_torchvisions_1000_names():
    assert IMAGENET[1] == "goldfish" and len(IMAGENET) == 1000


def test_voc_is_counted_as_loops_over_its_pixels_do(tmp_path):
    """A picture of 2 × 2 fields in greys that are class numbers; the model's four patches know the greys."""
    root, fields = tmp_path / "VOCdevkit/VOC2012", np.array([[3, 7], [12, 25]])  # 25: stuff
    write(root / "ImageSets/Segmentation/val.txt", "a")
    big = np.kron(fields, np.ones((8, 8), int))
    mask = np.where(big == 25, 0, big).astype(np.uint8)  # 0: background
    mask[:3, :3] = 255  # not counted
    mask[4:6, 4:6] = 5  # a class that the model does not see
    grey = Image.fromarray((10 * big).astype(np.uint8)).convert("RGB")
    for folder, file, image in (("JPEGImages", "a.jpg", grey), ("SegmentationClass", "a.png", Image.fromarray(mask))):
        (root / folder).mkdir()
        image.save(root / folder / file, quality=100)

    names = TEMPLATES["voc"][:20]

    class Seer(Grey):
        def texts(self, texts):
            found = [max((name for name in names if name in text), key=len, default="") for text in texts]
            return torch.eye(40)[[names.index(name) + 1 if name else 25 for name in found]]

    fields_of = [fields == c for c in (*range(1, 21), 25)]  # stuff last: it loses ties
    maps = torch.tensor(np.array(fields_of)).float()
    guess = F.interpolate(maps[None], size=mask.shape, mode="bilinear")[0].argmax(0).numpy()
    guess = np.where(guess < 20, guess + 1, 0)
    ious = []
    for c in (0, 3, 5, 7, 12):
        meet = ((guess == c) & (mask == c)).sum()
        ious.append(meet / (((guess == c) | (mask == c)) & (mask != 255)).sum())
    rows = BENCHMARKS["voc"](Seer(), tmp_path)
    assert rows["mIoU"][0] == pytest.approx(100 * np.mean(ious)) and 50 < rows["mIoU"][0] < 100
    assert 50 < rows["mIoU of objects"][0] < 100
