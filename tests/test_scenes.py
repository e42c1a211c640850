"""Scenes depend on split and number alone, and their captions, masks and boxes tell the truth about them."""
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

from data import SceneImages, open_dataset
from scenes import BACKGROUNDS, COLOURS, KINDS, SPLITS, TEMPLATES, Scenes, is_unseen, rgb

ALL = Scenes("test", size=128, kinds=83)
TRAIN = [Scenes(kinds=83).scene(i) for i in range(600)]
TEST = [ALL.scene(i) for i in range(600)]
PLACE_OR_SIZE = r"\b(left|right|top|bottom|upper|lower|centre|small|tiny|huge|big)\b"
NAMES = sorted(dict(KINDS), key=len, reverse=True)
THING = re.compile(rf"(?:\b({'|'.join(COLOURS)}) )?\b({'|'.join(NAMES)})\b")


def things(text):
    """The (colour or "", kind) pairs that a text names."""
    return THING.findall(text.lower())


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_depends_on_nothing_but_split_and_number(split):
    scenes = Scenes(split, n=9)
    scenes.scene(7)
    assert scenes.scene(42) == Scenes(split, n=99).scene(42)


def test_splits_and_numbers_share_no_scene():
    facts = set()
    for split in SPLITS:
        scenes = Scenes(split)
        for i in range(300):
            facts.add(repr(scenes.scene(i).objects))
    assert len(facts) == 900


def test_a_scene_has_two_to_six_kinds_of_object_and_its_first_is_large():
    for s in TEST:
        kinds = {o.kind for o in s.objects}
        assert 2 <= len(kinds) == len(s.objects) <= 6
        for o in s.objects:
            assert (o.size == "large") == (o is s.objects[0])
            assert ("left" in o.place) == (o.x < 1 / 3)
            assert o.place.startswith(("top", "upper")) == (o.y < 1 / 3)


def test_a_tenth_of_the_pairs_of_colour_and_kind_is_only_met_in_testing():
    for scenes, least, most in ((TRAIN, 0, 0), (TEST, 0.07, 0.13)):
        share = np.mean([is_unseen(o.kind, o.colour) for s in scenes for o in s.objects])
        assert least <= share <= most


def test_the_mask_covers_the_pixels_that_each_object_paints_in_its_colour():
    for scene in TEST[:60]:
        scene = replace(scene, style="clean")
        image, mask = ALL.draw(scene)
        empty = ALL.draw(replace(scene, objects=[]))[0]
        painted = (image != empty).any(-1)
        assert painted[mask > 0].all()
        assert painted[mask == 0].mean() < 0.1  # edges, less than half covered
        for k, o in enumerate(scene.objects, 1):
            colour = rgb(COLOURS[o.colour_name])
            nearer = np.abs(image - colour) <= np.abs(empty - colour) + 1
            assert nearer[mask == k].mean() > 0.97  # objects may touch


@pytest.mark.parametrize("size", [32, 64, 96])
def test_a_sentence_about_one_object_has_a_box_that_just_holds_the_object(size):
    scenes = Scenes(size=size)
    for i in range(40):
        scene = scenes.scene(i)
        mask = scenes.draw(scene)[1]
        for k, box in zip(scene.about, scenes.boxes(scene)):
            if k >= 0:
                places = np.argwhere(mask.T == k + 1)  # (x, y)
                first, last = np.reshape(box, (2, 2)) * size
                assert (first <= places).all() and (places < last).all()
                assert max(last - first) <= scene.objects[k].side * size + 2


def check_relation(text, named):
    """Checks what a sentence tells of the places of the two objects that it names -> the words that tell it."""
    word = re.search("left of|right of|above|higher|below|lower than", text.lower())[0]
    a, b = named if text.startswith("The ") else reversed(named)  # "Above the sun is the red star."
    before = a.x < b.x if "of" in word else a.y < b.y
    said = word in ("left of", "above", "higher")
    assert before == said, text
    return word


def test_a_sentence_of_a_long_caption_names_what_it_is_about_and_tells_the_truth():
    checked = set()
    for s in TRAIN + TEST:
        by_name = {o.name: o for o in s.objects}
        for text, k in zip(s.captions["long"], s.about):
            named = [by_name[name] for _, name in things(text)]
            if k >= 0:
                o = s.objects[k]
                assert named == [o], text
                words = re.findall(PLACE_OR_SIZE, THING.sub("", text.lower()))
                facts = {*o.place.split(), *TEMPLATES[o.size]}
                assert facts.issuperset(words), text
                checked.update(words)
            elif named:
                checked.add(check_relation(text, named))
    assert len(checked) == 11 + 6


def test_whatever_a_caption_other_than_the_raw_one_tells_is_true():
    for s in TRAIN + TEST:
        assert set(s.about) == set(range(-1, len(s.objects)))  # the long caption names every object
        c = s.captions
        colours = {o.name: o.colour_name for o in s.objects}
        for text in (*c["long"], c["short"], c["details"], c["main_object"], c["few_words"]):
            for colour, name in things(text):
                assert colour in ("", colours[name]), text
        assert s.objects[0].name in c["main_object"]
        for name in BACKGROUNDS:
            assert (name in c["background"].lower()) == (name in s.ground)
        assert c["style"].lower() in TEMPLATES[s.style]


def test_written_scenes_come_back_with_the_same_pictures_and_captions(tmp_path):
    words = [sys.executable, "scenes.py", "--write", tmp_path, "--split", "test", "--n", "20"]
    subprocess.run(words, cwd=ROOT, check=True)
    drawn = SceneImages("test", 20, 64, 24)
    read = open_dataset(str(tmp_path / "captions.jsonl"), "all", 0, 64, 0)
    assert len(read) == 20
    for i in range(20):
        assert torch.equal(drawn[i][0], read[i][0])
        assert drawn[i][1] == read[i][1]
