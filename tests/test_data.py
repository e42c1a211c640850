"""Scenes show what their captions say, every method draws its own texts, captions are read from files, bad samples keep
their slot, and the order of samples depends on nothing but the seed."""
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image

import train
from data import (BadCount, BadSample, Captions, Order, Pictures, Records, SceneImages, TrainingTexts, UserError,
                  collate, crop_box, draw_texts, load_tokenizer, local_batches, open_dataset, read_captions,
                  read_fields, text_slots, training_loader)
from scenes import BACKGROUNDS, COLOURS, KINDS, NUMBERS, PERSPECTIVES, Scenes, glyph, held_out

NAMES = [name for name, _ in KINDS]
TRAIN, TEST = ([Scenes(split, kinds=len(KINDS)).scene(i) for i in range(600)] for split in ("train", "test"))
SCENES = TRAIN + TEST


# ---- scenes ----------------------------------------------------------------------------------------------------------

def test_a_scene_depends_on_nothing_but_split_and_index():
    for split in ("train", "validation", "test"):
        one, other = Scenes(split, n=100), Scenes(split, n=5000)
        later = other.scene(42)
        one.scene(7)
        assert one.scene(42) == later
        assert all(np.array_equal(a, b) for a, b in zip(one.draw(one.scene(42)), other.draw(later)))


def test_splits_and_indices_share_no_scene():
    facts = [repr(Scenes(split).scene(i).objects) for split in ("train", "validation", "test") for i in range(300)]
    assert len(set(facts)) == len(facts)


def test_a_scene_has_two_to_six_objects_of_different_kinds_and_exactly_one_is_large_and_first():
    assert {len(s.objects) for s in SCENES} == {2, 3, 4, 5, 6}
    for s in SCENES:
        assert len({o.kind for o in s.objects}) == len(s.objects)
        assert [o.size for o in s.objects].count("large") == 1 and s.objects[0].size == "large"
        assert max(s.objects, key=lambda o: o.side) is s.objects[0]


def test_a_long_caption_has_six_to_twelve_different_sentences_and_names_every_object():
    assert {len(s.captions["long"]) for s in SCENES} == set(range(6, 13))
    for s in SCENES:
        assert len(set(s.captions["long"])) == len(s.captions["long"]) == len(s.about)
        assert set(range(len(s.objects))) <= set(s.about)


def test_sentences_are_shuffled_and_every_field_has_a_caption():
    assert len({s.about.index(0) for s in SCENES}) > 5
    assert all(set(s.captions) >= {*PERSPECTIVES, "short", "long"} for s in SCENES)


def test_held_out_pairs_are_a_tenth_and_are_met_in_testing_but_never_in_training():
    assert sum(held_out(k, c) for k in range(len(KINDS)) for c in range(len(COLOURS))) == len(KINDS)
    assert not any(held_out(o.kind, o.colour) for s in TRAIN for o in s.objects)
    share = np.mean([held_out(o.kind, o.colour) for s in TEST for o in s.objects])
    assert 0.07 < share < 0.13


@pytest.mark.parametrize("kinds", [6, 24])
def test_a_run_with_k_kinds_shows_and_names_the_first_k(kinds):
    scenes = [Scenes("train", kinds=kinds).scene(i) for i in range(200)]
    assert {o.kind for s in scenes for o in s.objects} == set(range(kinds))
    assert {name for s in scenes for t in texts_of(s) for _, name in things(t)} == set(NAMES[:kinds])


# ---- glyphs and pixels -----------------------------------------------------------------------------------------------

def test_every_pictograph_is_in_dejavu_sans_and_no_two_are_alike():
    font = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"))
    assert len(KINDS) == len(set(NAMES)) >= 60 and all(ord(sign) in font.get_charmap() for _, sign in KINDS)
    drawn = []
    for kind in range(len(KINDS)):
        ink = glyph(kind, 24)
        assert max(ink.shape) == 24 and 0 <= ink.min() and ink.max() > 0.9
        drawn.append(np.pad(ink, [((24 - n) // 2, (25 - n) // 2) for n in ink.shape]))
    differences = [(np.abs(a - b).mean() / max(a.mean(), b.mean()), NAMES[i], NAMES[j])
                   for (i, a), (j, b) in itertools.combinations(enumerate(drawn), 2)]
    assert min(differences)[0] > 0.1, min(differences)


def test_the_mask_covers_the_pixels_of_each_objects_colour_and_nothing_else():
    scenes, seen = Scenes("test", size=128, kinds=len(KINDS)), Counter()
    for scene in TEST[:60]:
        image, mask = scenes.draw(dataclasses.replace(scene, style="clean"))
        assert image.shape == (128, 128, 3) and image.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) == set(range(len(scene.objects) + 1))
        grounds = np.array([BACKGROUNDS[g] for g in scene.ground], float)
        # no background, nor a blend of its colours
        outside = ((image < grounds.min(0) - 2) | (image > grounds.max(0) + 2)).any(-1)
        for k, o in enumerate(scene.objects, 1):
            colour, pixels = np.array(COLOURS[o.colour_name], float), image[mask == k].astype(float)
            to_colour, to_ground = np.abs(pixels - colour).max(-1), np.abs(pixels[:, None] - grounds).max(-1).min(-1)
            half = np.abs(colour - grounds).max() / 2  # in the mask, the object covers more than half of a pixel
            assert np.mean(to_colour <= half + 1) > 0.97 and np.median(to_colour - to_ground) < -40
            y, x = np.nonzero(mask == k)
            reach = o.side * 64 + 1.5
            assert np.abs(y + 0.5 - o.y * 128).max() <= reach and np.abs(x + 0.5 - o.x * 128).max() <= reach
            seen[o.size] += 1
        near = np.zeros_like(outside)  # glyph edges blend into the ground under half opacity
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            near |= np.roll(mask > 0, (dy, dx), (0, 1))
        assert (outside & ~near).mean() < 0.01
    assert min(seen.values()) > 10


@pytest.mark.parametrize("size", [32, 64, 96])
def test_a_sentence_about_one_object_has_a_box_that_just_holds_the_object_and_moves_with_the_picture(size):
    scenes, dataset, reach = Scenes("train", 40, size, 24), SceneImages("train", 40, size, 24), size // 32
    for i in range(40):
        scene = scenes.scene(i)
        _, mask = scenes.draw(scene)
        image, captions = dataset[i]
        assert captions.long == scene.captions["long"]
        for k, box in zip(scene.about, captions.boxes, strict=True):
            assert (box is None) == (k < 0)
            if box:
                (y, x), (x0, y0, x1, y1) = np.nonzero(mask == k + 1), np.array(box) * size
                assert x0 <= x.min() and x.max() + 1 <= x1 and y0 <= y.min() and y.max() + 1 <= y1
                assert max(x1 - x0, y1 - y0) <= scene.objects[k].side * size + 2
        other, shifted = dataset.__getitem__(i, random.Random(i))
        inner = slice(reach, size - reach)
        (dx, dy), = ((dx, dy) for dx, dy in itertools.product(range(-reach, reach + 1), repeat=2)
                     if torch.equal(other.roll((-dy, -dx), (1, 2))[:, inner, inner], image[:, inner, inner]))
        moved = [box and (np.array(box) + np.array([dx, dy, dx, dy]) / size).clip(0, 1) for box in captions.boxes]
        assert shifted.long == captions.long
        assert all(a is b if b is None else np.allclose(a, b) for a, b in zip(shifted.boxes, moved, strict=True))


def test_styles_darken_fade_or_roughen_the_picture_and_leave_the_mask():
    scenes = Scenes("test", size=64, kinds=len(KINDS))
    for scene in TEST[:20]:
        images, masks = zip(*(scenes.draw(dataclasses.replace(scene, style=style))
                              for style in ("clean", "dim", "faded", "grainy")))
        clean, dim, faded, grainy = (image.astype(float) for image in images)
        assert all(np.array_equal(mask, masks[0]) for mask in masks)
        assert (dim <= clean).all() and dim.mean() < clean.mean() - 30
        assert (faded >= clean).all() and faded.std() < 0.9 * clean.std()
        assert abs(grainy - clean).mean() > 3 and abs((grainy - clean).mean()) < 8


# ---- captions against the facts --------------------------------------------------------------------------------------

LONGEST_FIRST = "|".join(sorted(map(re.escape, NAMES), key=len, reverse=True))
THING = re.compile(rf"(?:\b({'|'.join(COLOURS)}) )?\b({LONGEST_FIRST})\b", re.I)
TRUE_FIELDS = ("short", "details", "main_object", "few_words")


def things(text):
    """The (colour or "", kind) pairs that a text names."""
    return [(colour.lower(), name.lower()) for colour, name in THING.findall(text)]


def texts_of(scene):
    return [t for text in scene.captions.values() for t in (text if isinstance(text, list) else [text])]


def holds(scene, thing):
    colour, name = thing
    return any(o.name == name and colour in ("", o.colour_name) for o in scene.objects)


def test_whatever_a_caption_other_than_the_raw_one_names_is_in_the_scene_in_that_colour():
    for s in SCENES:
        for text in [*s.captions["long"], *(s.captions[f] for f in TRUE_FIELDS)]:
            assert all(holds(s, thing) for thing in things(text)), text
        assert len(things(s.captions["short"])) == 2
        assert sorted(n for _, n in things(s.captions["few_words"])) == sorted(o.name for o in s.objects)
        assert things(s.captions["main_object"]) == [(s.objects[0].colour_name, s.objects[0].name)]
        assert not things(s.captions["background"]) and not things(s.captions["style"])


def test_a_sentence_about_one_object_names_that_object_and_no_other():
    for s in SCENES:
        for text, about in zip(s.captions["long"], s.about):
            named = [n for _, n in things(text)]
            assert named == [s.objects[about].name] if about >= 0 else len(named) in (0, 2), text


def test_sizes_and_places_in_sentences_are_true():
    sizes = {"small": "small", "little": "small", "tiny": "small", "medium-sized": "medium",
             "large": "large", "big": "large", "huge": "large"}
    checked = Counter()
    for s in SCENES:
        for text, about in zip(s.captions["long"], s.about):
            if about < 0 or re.search(r"main object|takes up|dominates|largest thing|picture is about", text):
                assert about <= 0
                continue
            o, text = s.objects[about], THING.sub("THING", text)
            for word in re.findall(r"\b(" + "|".join(sizes) + r")\b", text):
                assert sizes[word] == o.size
                checked["size"] += 1
            x, y = o.x, o.y  # thirds of the picture
            for words, true in (("left|on the left", x < 1 / 3), ("right", x >= 2 / 3),
                                ("top|upper", y < 1 / 3), ("bottom|lower", y >= 2 / 3),
                                ("centre|middle", 1 / 3 <= x < 2 / 3 and 1 / 3 <= y < 2 / 3)):
                if re.search(rf"\b({words})\b", text, re.I):
                    assert true, (text, o)
                    checked[words] += 1
    assert len(checked) == 6 and min(checked.values()) > 50


def test_relations_are_true():
    relations = {"left of": lambda a, b: a.x < b.x, "right of": lambda a, b: a.x > b.x,
                 "above": lambda a, b: a.y < b.y, "higher than": lambda a, b: a.y < b.y,
                 "below": lambda a, b: a.y > b.y, "lower than": lambda a, b: a.y > b.y}
    checked = Counter()
    for s in SCENES:
        by_name = {o.name: o for o in s.objects}
        for text in s.captions["long"]:
            if len(things(text)) == 2:
                a, b = (by_name[name] for _, name in things(text))
                word, = [r for r in relations if r in THING.sub("", text).lower()]
                if not text.startswith("The "):  # "Above the sun is the red star."
                    a, b = b, a
                assert relations[word](a, b), text
                checked[word] += 1
    assert set(checked) == set(relations)


def test_counts_background_and_style_are_true():
    words = {"clean": "clean and bright|clear and even|crisp and fresh", "grainy": "grainy|noise|noisy",
             "dim": "dim|dark|gloomy", "faded": "faded|pale|haze"}
    patterns = {"plain": "plain|wall", "graded": "fades|turns slowly|gradient",
                "striped": "stripe", "checkered": "checker|squares"}
    numbered, any_number = 0, "|".join(NUMBERS)
    for s in SCENES:
        colours = Counter(o.colour_name for o in s.objects)
        for text in [*s.captions["long"], s.captions["background"], s.captions["style"]]:
            lower = text.lower()
            if match := re.fullmatch(rf"({any_number}) of the objects are (\w+)\.", lower):
                assert colours[match[2]] == NUMBERS.index(match[1])
                numbered += 1
            elif match := re.search("there are (N) objects|(N) things|has (N) objects".replace("N", any_number), lower):
                assert NUMBERS.index(next(filter(None, match.groups()))) == len(s.objects)
                numbered += 1
        grounds, style = (
            [t for t in (*s.captions["long"], s.captions[f]) if not things(t) and re.search(rule, t.lower())]
            for f, rule in (("background", "background|backdrop|wall|behind|squares tile"),
                            ("style", "|".join(words.values()))))
        assert len(grounds) == 2 == len(style)
        for text in grounds:
            assert re.search(patterns[s.pattern], text.lower()), text
            assert {b for b in BACKGROUNDS if re.search(rf"\b{b}\b", text.lower())} == set(s.ground), text
        assert all(re.search(words[s.style], text.lower()) for text in style)
    assert numbered > 100


def test_about_one_raw_caption_in_twenty_names_what_is_not_there():
    wrong = np.mean([not all(holds(s, ("", name)) for _, name in things(s.captions["raw"])) for s in SCENES])
    assert 0.02 < wrong < 0.08 and all(things(s.captions["raw"]) for s in SCENES)
    coloured = np.mean([any(colour for colour, _ in things(s.captions["raw"])) for s in SCENES])
    assert 0.3 < coloured < 0.9  # often without the colour


@pytest.mark.parametrize("make", [
    lambda: Scenes("night"), lambda: Scenes(kinds=5), lambda: Scenes(kinds=len(KINDS) + 1)])
def test_a_split_or_number_of_kinds_that_is_not_there_is_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("flags, says", [(["--kinds", "5"], "6 to 83, not 5"), (["--sheet", "/gone/a.png"], "/gone/a"),
                                         (["--sheet", "a.xyz"], "xyz")], ids=str)
def test_a_mistake_on_the_command_line_of_the_scenes_ends_in_one_sentence(monkeypatch, flags, says):
    monkeypatch.setattr(sys, "argv", ["scenes.py", *flags])
    with pytest.raises(SystemExit, match=f"^error: .*{says}") as caught:
        runpy.run_path(str(Path(__file__).parent.parent / "scenes.py"), run_name="__main__")
    assert "\n" not in str(caught.value)


# ---- the texts each method draws -------------------------------------------------------------------------------------

CAPTIONS = Captions("raw", ["short"], [f"s{i}." for i in range(8)], ["raw", "p1", "p2", "p3", "p4", "p5"])
SENTENCES, POOL = set(CAPTIONS.long), {*CAPTIONS.long, "short"}


def settings(method="dreamlip", **flags):
    return train.resolve({"method": method, "size": "nano", "whole_caption": 0.0, **flags})


def drawn(s, captions=CAPTIONS, n=200):
    return [[text for text, _ in draw_texts(captions, s, random.Random(i))] for i in range(n)]


@pytest.mark.parametrize("method, slots", [
    ("clip", ["raw"]), ("dreamlip", ["raw"] + ["sub"] * 3), ("lotlip", ["raw", "long"]),
    ("holistic", ["perspective"] * 5), ("sparc", ["raw"])])
def test_each_method_draws_its_kinds_of_text(method, slots):
    s = settings(method)
    assert text_slots(s) == slots
    for texts in drawn(s):
        assert len(texts) == len(slots)
        for kind, text in zip(slots, texts):
            assert {"raw": text == "raw", "sub": text in POOL, "long": text == " ".join(CAPTIONS.long),
                    "perspective": text in CAPTIONS.perspectives}[kind]


def test_holistic_puts_perspective_m_in_slot_m():
    assert all(texts == CAPTIONS.perspectives[:5] for texts in drawn(settings("holistic")))


def test_dreamlip_keeps_raw_in_slot_0_and_draws_the_rest_without_replacement_uniformly():
    texts = drawn(settings(sub_captions=4), n=3000)
    assert all(t[0] == "raw" and len(set(t[1:])) == 4 for t in texts)
    counts = Counter(t for row in texts for t in row[1:])
    assert set(counts) == POOL and max(counts.values()) / min(counts.values()) < 1.2  # 1333 each, deviation 27
    assert len({row[2] for row in texts}) == 9


def test_sub_captions_come_with_replacement_only_when_there_are_too_few():
    few = Captions("raw", ["short"], ["s0.", "s1."], ["raw"])
    for row in drawn(settings(sub_captions=7), few):
        counts = Counter(row[1:])
        assert set(counts) == {"short", "s0.", "s1."} and sum(counts.values()) == 7
    assert len({tuple(row) for row in drawn(settings(sub_captions=7), few)}) > 10
    assert {tuple(sorted(row[1:])) for row in drawn(settings(sub_captions=3), few)} == {("s0.", "s1.", "short")}


@pytest.mark.parametrize("flags, pool", [
    (dict(short_caption=False), SENTENCES), (dict(raw_caption=False), POOL | {"raw"}),
    (dict(raw_caption=False, short_caption=False), SENTENCES | {"raw"}),
    (dict(whole_caption=1.0), POOL | {" ".join(CAPTIONS.long)})])
def test_the_pool_holds_the_raw_caption_unless_it_has_a_slot_and_the_short_and_the_whole_one_as_told(flags, pool):
    s = settings(sub_captions=2, **flags)
    assert {t for row in drawn(s) for t in row[len(row) - 2:]} == pool and len(text_slots(s)) == 2 + s.raw_caption


def test_the_whole_caption_is_in_the_pool_of_the_given_share_of_the_images():
    whole = " ".join(CAPTIONS.long)
    rows = drawn(settings(sub_captions=len(POOL) + 1, whole_caption=0.25))  # the whole pool, and one more
    assert 0.15 < sum(whole in row for row in rows) / len(rows) < 0.35


def test_sampling_first_takes_the_same_k_every_time_and_whole_the_long_caption_as_one_text():
    assert {tuple(row) for row in drawn(settings(sub_captions=3, sampling="first"))} == {("raw", "s0.", "s1.", "s2.")}
    whole = settings(sub_captions=3, sampling="whole", negatives="batch")
    assert text_slots(whole) == ["raw", "long"]
    assert {tuple(row) for row in drawn(whole)} == {("raw", " ".join(CAPTIONS.long))}


def test_a_long_text_joins_consecutive_sentences():
    rows = {row[1] for row in drawn(settings("lotlip", long_sentences=3))}
    assert rows == {" ".join(CAPTIONS.long[i:i + 3]) for i in range(6)}
    assert {row[2] for row in drawn(settings("lotlip", long_texts=2, long_sentences=20))} == {" ".join(CAPTIONS.long)}


def test_perspectives_that_an_image_lacks_are_drawn_from_its_other_texts():
    for row in drawn(settings("holistic"), Captions("raw", [], ["s0.", "s1."], ["raw", "p1"])):
        assert row[:2] == ["raw", "p1"] and set(row[2:]) == {"s0.", "s1.", "raw"}


# ---- captions read from files ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("row, expected", [
    ({"caption": "A dog. It runs."}, Captions("A dog. It runs.", [], ["A dog.", "It runs."], ["A dog. It runs."])),
    ({"caption": ["raw", "One. Two.", "three"]},
     Captions("raw", [], ["One.", "Two.", "three"], ["raw", "One. Two.", "three"])),
    ({"caption": ["only"]}, Captions("only", [], ["only"], ["only"])),
    ({"caption": ["raw", "", None, " b "]}, Captions("raw", [], ["b"], ["raw", "b"])),
    ({"raw": "r", "short": "s", "long": "One. Two."}, Captions("r", ["s"], ["One.", "Two."], ["r"])),
    ({"raw": "r", "long": ["One.", "Two. Three."], "details": "d", "style": "y"},
     Captions("r", [], ["One.", "Two.", "Three."], ["r", "d", "y"])),
    ({"caption": "c", "short": "s"}, Captions("c", ["s"], ["c"], ["c"])),
    ({"short": "s"}, Captions("s", ["s"], ["s"], ["s"])),
    ({"key": "000", "captions": {"raw": "r", "short": "s", "long": "One. Two.", "main_object": "m", "background": "b"}},
     Captions("r", ["s"], ["One.", "Two."], ["r", "m", "b"])),
], ids=lambda x: ",".join(x) if isinstance(x, dict) else "")
def test_captions_are_read_from_plain_lists_named_fields_and_re_captioning_records(row, expected):
    assert read_captions(row) == expected


@pytest.mark.parametrize("row", [
    {}, {"caption": ""}, {"caption": "  \n"}, {"caption": []}, {"caption": [None, ""]}, {"caption": 7},
    {"raw": "", "captions": {}}, {"captions": None}, {"captions": ["a list", "no names"]}, {"captions": "text"}],
    ids=str)
def test_a_row_without_any_text_is_a_bad_sample(row):
    with pytest.raises(BadSample) as caught:
        read_captions({"image": "a.png", **row})
    assert caught.value.reason == "no caption" and "a.png" in caught.value.detail


# ---- JSON lines ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """60 small pictures of noise, so that a crop shows where it was cut."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(60):
        Image.effect_noise((20, 24), 90).convert("RGB").save(folder / f"{i}.png")
    return folder


def write(folder, lines, name="captions.jsonl"):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def good(n=60):
    return [{"image": f"{i}.png", "caption": f"picture {i}"} for i in range(n)]


def keys(dataset):
    return [dataset.records[i].key for i in dataset.rows.tolist()]


def test_training_and_validation_share_no_picture_and_lose_none(pictures):
    path = write(pictures, good())
    parts = {part: keys(Pictures(Records(path), 16, part)) for part in ("train", "validation", "all")}
    assert sorted(parts["train"] + parts["validation"]) == sorted(parts["all"]) == sorted(f"{i}.png" for i in range(60))
    assert 0 < len(parts["validation"]) < 20 and not set(parts["train"]) & set(parts["validation"])
    reordered = Pictures(Records(write(pictures, good()[::-1], "reversed.jsonl")), 16, "validation")
    assert set(keys(reordered)) == set(parts["validation"]) == set(keys(open_dataset(path, "test", 0, 16, 0)))


def test_lines_that_cannot_be_used_are_left_out_counted_and_named(pictures):
    bad = ["{not json", '"text"', "[1]", "7", "null", '{"caption": "no image"}', {"image": None, "caption": "x"},
           {"image": 5, "caption": "x"}, {"image": ["0.png"], "caption": "x"}, {"image": " ", "caption": "x"},
           "[" * 9999, ""]
    for line in bad:  # one by one, so that each is seen to be survived
        records = Records(write(pictures, [line, *good(3)]))
        assert len(records) == 3 and records.bad.total == (line != "") and records.bad.seen == 3 + (line != ""), line
        assert [records[i].key for i in range(3)] == ["0.png", "1.png", "2.png"]
    report = Records(write(pictures, [*bad[:2], bad[6], *good(3)])).bad.report()
    assert "2 × JSON does not parse: captions.jsonl line 1, captions.jsonl line 2" in report
    assert "1 × no image named: captions.jsonl line 3" in report


@pytest.mark.parametrize("line, reason", [
    ({"image": "gone.png", "caption": "x"}, "image missing"),
    ({"image": "https://a.b/c/gone.png?d=e", "caption": "x"}, "image missing"),
    ({"image": "a\0b.png", "caption": "x"}, "image will not decode"),
    ({"image": "../", "caption": "x"}, "image will not decode"),
    ({"image": "x" * 5000, "caption": "x"}, "image will not decode"),
    ({"image": "\ud800.png", "caption": "x"}, "image will not decode"),
    ({"image": "1.png"}, "no caption"), ({"image": "1.png", "caption": ""}, "no caption"),
    ({"image": "1.png", "captions": ["x"]}, "no caption")], ids=str)
def test_what_only_shows_when_a_sample_is_read_is_a_bad_sample_that_is_named(pictures, line, reason):
    data = Pictures(Records(write(pictures, [*good(1), line])), 16)
    assert data[0][0].shape == (3, 16, 16)
    with pytest.raises(BadSample) as caught:
        data[1]
    assert caught.value.reason == reason
    assert "captions.jsonl" in caught.value.detail and line["image"][:9] in caught.value.detail


def test_the_picture_of_a_url_is_found_by_its_last_part(pictures):
    data = Pictures(Records(write(pictures, [{"image": "https://a.b/c/3.png?width=300", "caption": "x"}])), 16)
    assert torch.equal(data[0][0], Pictures(Records(write(pictures, good()[3:4])), 16)[0][0])


@pytest.mark.parametrize("text", ["line\u2028separator", "next\x85line", "form\ffeed", "é 日本語 👍"])
def test_a_caption_may_hold_any_character(pictures, text):
    records = Records(write(pictures, [json.dumps({"image": "0.png", "caption": text}, ensure_ascii=False)]))
    assert [read_captions(record.row).raw for record in records] == [text] and not records.bad


def test_a_file_may_begin_with_a_byte_order_mark(pictures):
    path = Path(write(pictures, good(2), "bom.jsonl"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [record.key for record in Records(str(path))] == ["0.png", "1.png"]


def test_a_picture_may_have_several_lines_but_the_same_line_or_key_counts_once(pictures):
    lines = [{"image": "0.png", "caption": "a"}, {"image": "0.png", "caption": "b"}, {"image": "0.png", "caption": "a"},
             {"image": "1.png", "caption": "c", "key": "one"}, {"image": "2.png", "caption": "d", "key": "one"}]
    records = Records(write(pictures, lines))
    assert [record.row["caption"] for record in records] == ["a", "b", "c"] and records.bad.counts == {"duplicate": 2}
    assert "0.png" in records.bad.report() and "one" in records.bad.report()


def test_a_set_of_nothing_but_broken_pictures_ends_in_one_sentence(pictures):
    (pictures / "broken.png").write_bytes(b"broken")
    path = write(pictures, [{"image": "broken.png", "caption": f"b {i}"} for i in range(30)])
    with pytest.raises(UserError, match="8 × image will not decode.*broken.png"):
        Pictures(Records(path), 16)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{}\n", b"\xff\xfe\x00binary"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tar"])
def test_a_file_without_a_usable_sample_is_a_mistake_of_the_user(tmp_path, content, suffix):
    (tmp_path / f"odd.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=f"odd.{suffix}"):
        open_dataset(str(tmp_path / f"odd.{suffix}"), "train", 0, 16, 0)
    with pytest.raises(UserError, match="no file .*gone"):
        open_dataset(str(tmp_path / f"gone.{suffix}"), "train", 0, 16, 0)


def test_evaluation_takes_the_middle_of_a_picture_and_training_a_crop_that_its_seed_alone_decides(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    records = Records(write(tmp_path, good(1)))
    middle = Pictures(records, 40)[0][0].permute(1, 2, 0).numpy()
    assert np.array_equal(middle, pixels[:, 10:50])
    train = Pictures(records, 16, "all")
    train.train = True  # this one key might be held out
    crops = [train.__getitem__(0, random.Random(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])


@pytest.mark.parametrize("width, height", [(100, 80), (80, 100), (500, 10)])
def test_a_random_crop_lies_in_the_picture_and_keeps_the_share_and_aspect_asked_for(width, height):
    rng, boxes = random.Random(0), set()
    for _ in range(300):
        left, top, right, bottom = crop_box(width, height, 0.5, rng)
        assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9
        assert 0.8 - 1e-9 <= (right - left) / (bottom - top) <= 1.25 + 1e-9
        if width < 500:
            assert 0.5 - 1e-9 <= (right - left) * (bottom - top) / (width * height)
        else:
            assert (top, bottom) == (0, height)  # a strip: as much of it as may be
        boxes.add((left, top, right, bottom))
    assert len(boxes) == 300
    side = min(width, height)
    assert crop_box(width, height) == ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)


# ---- the order of samples --------------------------------------------------------------------------------------------

def order_of(n, seed=3):
    return Order(SceneImages("train", n, 32, 12), seed, 100)


@pytest.mark.parametrize("n, batch, world", [(50, 8, 1), (50, 8, 2), (23, 12, 4), (7, 16, 2), (64, 16, 2)])
def test_ranks_share_out_the_global_order_and_any_start_is_its_tail(n, batch, world):
    order = list(local_batches(order_of(n), batch, 0, 20))
    assert [len(step) for step in order] == [batch] * 20
    ranks = [list(local_batches(order_of(n), batch, 0, 20, rank, world)) for rank in range(world)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks)] == order
    for first, rank in itertools.product((1, 7, 19), range(world)):
        assert list(local_batches(order_of(n), batch, first, 20, rank, world)) == ranks[rank][first:]


def test_every_index_comes_once_an_epoch_and_epochs_and_seeds_are_shuffled_anew():
    flat = list(itertools.chain(*local_batches(order_of(30, 0), 8, 0, 15)))  # 120 samples: four epochs
    epochs = [[i for e, i in flat if e == epoch] for epoch in range(4)]
    assert [e for e, _ in flat] == sorted(e for e, _ in flat)
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    other_seed = [i for _, i in itertools.chain(*local_batches(order_of(30, 1), 8, 0, 15))][:30]
    assert len({tuple(e) for e in epochs}) == 4 and epochs[0] != other_seed


def test_batches_are_identical_whatever_the_number_of_workers(pictures):
    tokenizer = load_tokenizer("scenes")
    (pictures / "broken.png").write_bytes(b"broken")
    path = write(pictures, [*good(), {"image": "broken.png", "caption": "x"}])
    for dataset in (SceneImages("train", 40, 32, 12), Pictures(Records(path), 16)):
        runs = [list(training_loader(dataset, tokenizer, settings(batch=8, workers=n), 2, 9)) for n in (0, 1, 2)]
        for batches in zip(*runs, strict=True):
            assert all(torch.equal(batches[0][part], other[part]) for other in batches[1:] for part in (0, 1, 2))
            assert len({str(batch[3]) for batch in batches}) == 1


def test_a_batch_is_cut_to_its_longest_text_and_a_sample_depends_on_seed_epoch_and_index_alone():
    tokenizer, s = load_tokenizer("scenes"), settings(batch=8)
    samples = TrainingTexts(SceneImages("train", 40, 32, 12), tokenizer, s)
    rows = [samples[0, i] for i in range(8)]
    images, tokens, good, bad, _ = collate(rows)
    longest = max((int((t == tokenizer.eot).nonzero().max()) + 1 for _, text, *_ in rows for t in text))
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.uint8 and tokens.shape == (8, 4, longest)
    assert good.tolist() == [True] * 8 and bad == []
    assert torch.equal(tokens, torch.stack([t for _, t, *_ in rows])[..., :longest])
    assert torch.equal(samples[0, 3][1], rows[3][1]) and not torch.equal(samples[1, 3][1], rows[3][1])
    other = TrainingTexts(samples.dataset, tokenizer, settings(batch=8, seed=1))
    assert not torch.equal(other[0, 3][1], rows[3][1])


# ---- bad samples in a batch ------------------------------------------------------------------------------------------

def test_a_bad_sample_keeps_its_slot_with_a_black_image_and_empty_texts(pictures):
    named = ("0.png", "a"), ("gone.png", "b"), ("2.png", "c")
    lines = [{"image": image, "caption": caption} for image, caption in named]
    tokenizer, s = load_tokenizer("scenes"), settings(batch=3)
    data = Pictures(Records(write(pictures, lines)), 32)
    images, tokens, good, bad, _ = collate([TrainingTexts(data, tokenizer, s)[0, i] for i in range(3)])
    assert good.tolist() == [True, False, True] and [b.reason for b in bad] == ["image missing"]
    assert not images[1].any() and images[0].any() and images[2].any()
    assert [tokenizer.decode(t) for t in tokens[1]] == [""] * 4 and tokenizer.decode(tokens[2, 0]) == "c"


def reference_loss(images, texts, scale, good):
    """InfoNCE over the good pairs, in float64, a bad one being a negative of similarity 0; mean over all the batch."""
    total, bad = scale * 0, int((~good).sum())
    for own, others in ((images, texts), (texts, images)):
        for i in good.nonzero().flatten():
            sims = torch.stack([own[i] @ others[j] for j in good.nonzero().flatten()] + [own[i].new_zeros(())] * bad)
            total = total + torch.logsumexp(scale * sims, 0) - scale * own[i] @ others[i]
    return total / (2 * len(good)) + math.log(len(good)) * bad / len(good)


@pytest.mark.parametrize("method", ["clip", "dreamlip", "lotlip", "holistic", "sparc"])
@pytest.mark.parametrize("marks", ["TTFTF", "FFFFF"])
def test_bad_samples_have_no_gradient_and_are_negatives_of_similarity_0(method, marks):
    s, good = settings(method), torch.tensor([mark == "T" for mark in marks])
    texts = len(text_slots(s))
    shapes = dict(branches=(5, s.branches, 8), patches=(5, 6, 8), summaries=(5, texts, 1 + s.corner_tokens, 8),
                  token_embeddings=(5 * texts, 7, 8))
    torch.manual_seed(0)
    out = {name: torch.nn.functional.normalize(torch.randn(shape, dtype=torch.float64), dim=-1).requires_grad_()
           for name, shape in shapes.items()}
    ends = torch.where(good, 5, 1).repeat_interleave(texts)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    loss, parts = train.method_loss({**out, "logit_scale": scale, "ends": ends}, s, good)
    leaves = [*out.values(), scale]
    gradients = functools.partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)
    grads = gradients(loss, leaves)
    assert all(torch.isfinite(grad).all() for grad in (loss, *grads))
    for grad in grads[:-1]:
        assert not grad[~good.repeat_interleave(len(grad) // 5)].any()
    assert marks == "FFFFF" or grads[0][good].any() and grads[2][good].any()

    if method == "clip":
        expected = reference_loss(out["branches"][:, 0], out["summaries"][:, 0, 0], scale, good)
        assert torch.allclose(loss, expected)
        if good.any():
            for grad, wanted in zip(grads, gradients(expected, leaves)):
                assert torch.allclose(grad, wanted, atol=1e-12)


def test_over_the_limit_of_bad_samples_the_run_is_told_to_stop_in_one_sentence():
    bad = BadCount()
    for i in range(30):
        bad.add(BadSample("image missing" if i % 3 else "no caption", f"{i}.png"))
    bad.seen = 199
    bad.check(0.05)  # too few to judge by
    bad.seen = 600
    bad.check(0.05)  # 5% exactly
    bad.seen = 599
    with pytest.raises(UserError, match="^30 of 599 samples are bad, over --max-bad.*20 × image missing: 1") as caught:
        bad.check(0.05)
    assert "\n" not in str(caught.value) and max(map(len, bad.values())) == 5
    assert bad.over(0.1, total=100, seen=900) and not bad.over(0.2, total=100, seen=900)  # those of all ranks
