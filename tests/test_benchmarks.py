"""Every published layout pairs the right pictures and texts, classes get their names, VOC's pixels are counted,
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
from evaluate import BENCHMARKS, LAYOUTS, TEMPLATES, TORCHVISION, Model

# ---- published layouts -----------------------------------------------------------------------------------------------

class Grey:
    """A model of pictures in one grey each and texts with one number each: picture 10·k and text "... k ..." agree."""

    config, settings, branch = SimpleNamespace(image_size=16, text_style="clip"), {}, "mean"
    batches, encode, images = Model.batches, Model.encode, Model.images
    merge, prepare = Model.merge, Model.prepare
    batch, device = 7, "cpu"

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
    """Writes a text, or a list as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_text(content)


# {file: its content, "" if it is a picture}, as published. A file or a line with a # comes once for each picture, with its
# number for the #. Whatever is not part of the benchmark says 39.
SHARE4V = """[
{"image": "images/#.png", "conversations": [{"from": "human", "value": "39?"}, {"from": "gpt", "value": "it is #"}]},
{"image": "images/0.png", "conversations": [{"from": "gpt", "value": "once more 0"}]}]"""
FIVE = '{"raw": "this is #"}, ' * 5
PUBLISHED = {
    "coco": {
        "val2014/#.png": "",
        "dataset_coco.json": f"""{{"images": [
{{"split": "test", "filepath": "val2014", "filename": "#.png", "sentences": [{FIVE} {{"raw": "39"}}]}},
{{"split": "train"}}]}}""",
    },
    "flickr30k": {
        "flickr30k-images/#.png": "",
        "dataset_flickr30k.json": f"""{{"images": [
{{"split": "test", "filename": "#.png", "sentences": [{FIVE} {{"raw": "39"}}]}},
{{"split": "train"}}]}}""",
    },
    "urban1k": {
        "image/#.jpg": "",
        "caption/#.txt": "a street, #\nmore 39",
    },
    "dci": {
        "photos/#.png": "",
        "annotations/#.json": '{"image": "#.png", "short_caption": "number #", "extra_caption": "and more"}',
        "splits.json": '{\n"split #": ["#.json"],\n"empty": []}',
    },
    "iiw": {
        "folder/p#.jpg": "",
        "DCI_Test/data.jsonl": '{"image": "p0.jpg", "IIW": "once more 0"}',
        "IIW-400/data.jsonl": '{"image/key": "p#", "IIW": "long #"}',
    },
    "docci": {
        "images/#.png": "",
        "docci_descriptions.jsonlines": """{"split": "test", "image_file": "#.png", "description": "it has #"}
{"split": "train", "image_file": "x.png", "description": "it has 39"}""",
    },
    "share4v-1k": {"images/#.png": "", "share4v_sam_10k.json": SHARE4V},
    "share4v-10k": {"images/#.png": "", "share4v_sam_10k.json": SHARE4V},
    "jsonl": {
        "images/#.png": "",
        "captions.jsonl": """{"image": "images/#.png", "caption": ["#", "again #"]}
{"image": "images/1.png", "caption": "once more 1"}""",
    },
}
TEXTS = {"coco": 60, "flickr30k": 60, "urban1k": 12, "dci": 12, "docci": 12, "jsonl": 25}  # of 12 pictures; others: 13


def lay_out(name, root, n=12):
    """The data set as it was published, with n pictures -> what its benchmark gets as its path."""
    for file, content in PUBLISHED[name].items():
        path = root / file
        if "#" not in file:
            lines = []
            for line in content.split("\n"):
                copies = n if "#" in line else 1
                lines += [line.replace("#", str(k)) for k in range(copies)]
            write(path, "\n".join(lines))
            continue
        for k in range(n):
            numbered = root / file.replace("#", str(k))
            if content:
                write(numbered, content.replace("#", str(k)))
            else:
                picture(numbered, k)
    return root if name in ("urban1k", "dci", "iiw") else path


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_published_layout_pairs_the_right_pictures_and_texts(name, tmp_path):
    model = Grey()
    rows = BENCHMARKS[name](model, lay_out(name, tmp_path))
    assert rows["T2I R@1"] == (100, pytest.approx(100 / 12)) and rows["I2T R@1"][0] == 100
    assert not any("39" in text for text in model.said)
    assert len(model.said) == TEXTS.get(name, 13)


@pytest.mark.parametrize("name, file, content, words", [
    ("coco", "dataset_coco.json", "[1]", "not laid out as coco"),
    ("coco", "dataset_coco.json", "{", "cannot read .*dataset_coco.json"),
    ("coco", "val2014/3.png", None, "no picture .*3.png"),
    ("coco", "val2014/3.png", "x", "3.png.*no picture is left out"),
    ("urban1k", "caption/3.txt", "", "captions are missing"),
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
    (tmp_path / "classnames.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match="pictures of 6 classes, but there are 2 names"):
        score(model, tmp_path)
    with pytest.raises(UserError, match="class_1 does not hold what .* reads"):
        score(model, tmp_path / "class_1")


def test_torchvisions_sets_are_read_as_torchvision_lays_them_out(tmp_path):
    listed = {}
    for k in range(6):
        listed[f"dish_{k}"] = [f"dish_{k}/1"]
        picture(tmp_path / f"food-101/images/dish_{k}/1.jpg", k)
    write(tmp_path / "food-101/meta/test.json", json.dumps(listed))
    model = Grey()
    assert BENCHMARKS["food101"](model, tmp_path)["top-1"][0] == 100
    assert "a photo of dish 3, a type of food." in model.said


@pytest.mark.parametrize("name", [*TORCHVISION, "voc", "imagenet"])
def test_a_set_that_is_not_there_is_not_downloaded_but_named(name, tmp_path):
    with pytest.raises(UserError, match="nothing is downloaded here") as caught:
        BENCHMARKS[name](Grey(), tmp_path)
    assert "\n" not in str(caught.value)


def test_voc_counts_the_pixels_of_classes_and_background(tmp_path, monkeypatch):
    """A picture of 2 × 2 fields in greys that are numbers of classes; the model's four patches know the greys."""
    classes = [*range(1, 21), *[25] * 12]  # grey 25: what is none of the 20 classes
    monkeypatch.setattr("evaluate.class_embeddings", lambda *_: torch.eye(40)[classes])
    fields = np.array([[3, 7], [12, 25]], dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    mask = np.where(fields == 25, 0, fields)  # 0: background
    mask[:3, :3] = 255  # not counted
    mask[4:6, 4:6] = 5  # a class that the model does not see
    root = tmp_path / "VOCdevkit/VOC2012"
    write(root / "ImageSets/Segmentation/val.txt", "a")
    for folder, suffix, image in (("JPEGImages", "jpg", 10 * fields), ("SegmentationClass", "png", mask)):
        (root / folder).mkdir()
        Image.fromarray(image).save(root / folder / f"a.{suffix}", quality=100)
    rows = BENCHMARKS["voc"](Grey(), tmp_path)
    ious = [51 / 55, 0, 1, 1]  # of classes 3, 5, 7, 12: of 64 pixels in the first field 9 are not counted, 4 are of class 5
    assert rows["mIoU of objects"][0] == pytest.approx(100 * np.mean(ious))
    assert rows["mIoU"][0] == pytest.approx(100 * np.mean([*ious, 1]))  # and background
