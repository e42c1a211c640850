"""Scenes depend on split and number alone, and their captions, masks and boxes tell the truth about them."""
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

from data import Pictures, Records, SceneImages
from scenes import BACKGROUNDS, COLOURS, KINDS, SPLITS, TEMPLATES, Scenes, glyph, held_out, rgb

ALL = Scenes("test", size=128, kinds=83)
TRAIN = [Scenes(kinds=83).scene(i) for i in range(600)]
TEST = [ALL.scene(i) for i in range(600)]
SENTENCES = []  # of the long captions: (objects, text, the index of the object that it is about)
for some in TRAIN + TEST:
    for told, number in zip(some.captions["long"], some.about):
        SENTENCES.append((some.objects, told.lower(), number))
NAMES = sorted(dict(KINDS), key=len, reverse=True)
THING = re.compile(rf"(?:\b({'|'.join(COLOURS)}) )?\b({'|'.join(NAMES)})\b")


def things(text):
    """The (colour or "", kind) pairs that a text names."""
    return THING.findall(text.lower())


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_depends_on_nothing_but_split_and_number(split):
    one = Scenes(split, n=9)
    other = Scenes(split, n=99)
    one.scene(7)
    scene = one.scene(42)
    assert scene == other.scene(42)
    assert np.array_equal(one.draw(scene)[0], other.draw(scene)[0])


def test_splits_and_numbers_share_no_scene():
    facts = {repr(Scenes(split).scene(i).objects) for split in SPLITS for i in range(300)}
    assert len(facts) == 900


def test_a_scene_has_two_to_six_kinds_of_object_and_its_first_is_large():
    for s in TEST:
        kinds = {o.kind for o in s.objects}
        assert 2 <= len(kinds) == len(s.objects) <= 6
        assert [o for o in s.objects if o.size == "large"] == s.objects[:1]


def test_a_place_is_a_third_of_the_picture():
    for s in TEST:
        for o in s.objects:
            assert ("left" in o.place) == (o.x < 1 / 3)
            assert o.place.startswith(("top", "upper")) == (o.y < 1 / 3)


def test_a_tenth_of_the_pairs_of_colour_and_kind_is_only_met_in_testing():
    met = []
    for scenes in (TRAIN, TEST):
        met.append([held_out(o.kind, o.colour) for s in scenes for o in s.objects])
    assert not any(met[0])
    assert 0.07 < np.mean(met[1]) < 0.13


def test_no_two_pictographs_are_alike():
    assert len({glyph(kind, 24).tobytes() for kind in range(83)}) == len(KINDS) == 83


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
            if k < 0:
                assert box is None
                continue
            places = np.argwhere(mask.T == k + 1)  # (x, y)
            first, last = np.reshape(box, (2, 2)) * size
            assert (first <= places).all() and (places < last).all()
            assert max(last - first) <= scene.objects[k].side * size + 2


def test_a_long_caption_has_six_to_twelve_sentences_that_name_every_object():
    assert {len(s.about) for s in TEST} == set(range(6, 13))
    for s in TEST:
        assert set(s.about) == {*range(len(s.objects)), -1}


def test_a_sentence_about_one_object_names_it_alone_and_tells_the_truth():
    checked = set()
    for objects, text, k in SENTENCES:
        named = [name for _, name in things(text)]
        if k < 0:
            assert len(named) in (0, 2), text
            continue
        o = objects[k]
        assert named == [o.name], text
        facts = {*o.place.split(), *TEMPLATES[o.size]}
        words = re.findall(r"\b(left|right|top|bottom|upper|lower|centre|small|tiny|huge|big)\b", THING.sub("", text))
        assert facts.issuperset(words), text
        checked.update(words)
    assert len(checked) == 11


def test_relations_are_true():
    checked = set()
    for objects, text, k in SENTENCES:
        named = [o for _, name in things(text) for o in objects if o.name == name]
        if len(named) == 2:
            word = re.search("left of|right of|above|higher|below|lower", text)[0]
            a, b = named if text.startswith("the ") else reversed(named)  # "above the sun is the red star."
            before = a.x < b.x if "of" in word else a.y < b.y
            assert before == (word in ("left of", "above", "higher")), text
            checked.add(word)
    assert len(checked) == 6


def test_whatever_a_caption_other_than_the_raw_one_tells_is_true():
    for s in TRAIN + TEST:
        c = s.captions
        there = {(colour, o.name) for o in s.objects for colour in ("", o.colour_name)}
        for text in (*c["long"], *(c[field] for field in ("short", "details", "main_object", "few_words"))):
            assert there.issuperset(things(text)), text
        assert things(c["main_object"])[0][1] == s.objects[0].name
        assert {name for name in BACKGROUNDS if name in c["background"].lower()} == set(s.ground)
        assert c["style"].lower() in TEMPLATES[s.style]


def command(*flags):
    subprocess.run([sys.executable, *flags], cwd=ROOT, check=True)


def test_written_scenes_come_back_with_the_same_pictures_and_captions(tmp_path):
    command("scenes.py", "--write", tmp_path, "--split", "test", "--n", "20")
    drawn = SceneImages("test", 20, 64, 24)
    read = Pictures(Records(tmp_path / "captions.jsonl"), 64)
    assert len(read) == 20
    for i in range(20):
        assert torch.equal(drawn[i][0], read[i][0])
        assert drawn[i][1] == read[i][1]
