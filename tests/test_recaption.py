"""Captions come out clean, each image's exactly once, whatever the server, the disk, kill -9 and the user do."""
import asyncio
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY
from urllib.request import urlopen

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import recaption
from data import UserError, add_member, data_url, load_image
from faulty_endpoint import caption
from recaption import PROMPTS, WHOLE, Output, clean, crops, pictures

LONG = PROMPTS["long"][0]


# ---- cleaning --------------------------------------------------------------------------------------------------------

GOOD = {  # what a model said -> the caption
    "A dog lies on a sofa. Behind it hangs a picture.": "A dog lies on a sofa. Behind it hangs a picture.",
    # stock openers
    "The image shows a dog. The image also features a cat.": "A dog. A cat.",
    "In this image, we can see a small red boat.": "A small red boat.",
    "In the image, there are two dogs: a white one and a black one.":
        "There are two dogs: a white one and a black one.",
    "This is an image of a market. We can see fruit.": "A market. Fruit.",
    "Caption: A bus in the rain.": "A bus in the rain.",
    "The image is a black and white photograph of Dr. Smith.":
        "The image is a black and white photograph of Dr. Smith.",
    "The image on the wall shows a ship.": "The image on the wall shows a ship.",
    # small talk
    "Sure! Here is a description of the image:\n\nA dog runs.\n\nLet me know if you need more details!":
        "A dog runs.",
    "Certainly. Here's a caption: Two cats sleep. I hope this helps!": "Two cats sleep.",
    # markdown: headings, lists, labels, emphasis, links, code, tables, quotes
    "## Overview\n\nA red car stands in a street.\n\n### Details\n- The car is *old*\n- Its doors are **open**":
        "A red car stands in a street. The car is old. Its doors are open.",
    "1. **Main object:** A red car, approx. 3.5 m long.\n2. **Background**: The U.S. flag hangs on a wall\n"
     "(c) A man waits":
        "A red car, approx. 3.5 m long. The U.S. flag hangs on a wall. A man waits.",
    "Key elements:\n• a lamp;\n• a desk,\n• a chair": "a lamp. a desk. a chair.",
    "A sign from [the shop](https://example.com/a) and `code`.": "A sign from the shop and code.",
    "> A quoted dog.\n> A second line.": "A quoted dog. A second line.",
    "| object | colour |\n|---|---|\n| a car | is red |": "object colour. a car is red.",
    '"A dog on a sofa."': "A dog on a sofa.",
    'A sign says "STOP". Another says "GO".': 'A sign says "STOP". Another says "GO".',
    "---\nA dog.\n***\nA cat.": "A dog. A cat.",
    # decimals, abbreviations, initials, times, names of files, arithmetic
    "The tower is 3.5 times as high, e.g. 120.75 m. At 5 p.m. Mr. J. R. Hill waits at St. Mary's.":
        "The tower is 3.5 times as high, e.g. 120.75 m. At 5 p.m. Mr. J. R. Hill waits at St. Mary's.",
    "The file man_with_hat.png hangs beside 5 * 3 * 2 = 30 tiles.":
        "The file man_with_hat.png hangs beside 5 * 3 * 2 = 30 tiles.",
    "A cat... or a dog? Hard to say!": "A cat... or a dog? Hard to say!",
    # a model that breaks its lines, one that thinks aloud, chat markers, an echo of the prompt
    "A paragraph that goes on\nover the next line, as some do.\nThen a new one.":
        "A paragraph that goes on over the next line, as some do. Then a new one.",
    "<think>The user wants a caption. A dog?</think>\nA dog runs.": "A dog runs.",
    "<|im_start|>A dog runs.<|im_end|></s>": "A dog runs.",
    f"{LONG} A dog runs over the grass.": "A dog runs over the grass.",
    "Sure, here is a short caption: A dog runs. A cat sleeps.": "A dog runs. A cat sleeps.",
    "Certainly, the image shows a dog.": "A dog.",
    # repeated sentences, refusals in passing
    "A screenshot of a page where users upload an image.": "A screenshot of a page where users upload an image.",
    "A dog runs. The grass is green. A dog runs!": "A dog runs. The grass is green.",
    "A woman smiles. I cannot identify the person in the picture. She wears a hat.":
        "A woman smiles. She wears a hat.",
    "A man who cannot see the road walks on. He is unable to see.":
        "A man who cannot see the road walks on. He is unable to see.",
    # other languages
    "这张图片显示了一只狗。它在沙发上。它在沙发上。":
        "这张图片显示了一只狗。它在沙发上。",
    "Ein Hund läuft über die Straße. Es regnet.": "Ein Hund läuft über die Straße. Es regnet.",
}
BAD = {
    "empty": ["", None, "  \n ", "<image>", "</s>"],
    "not text": ["12 34 56 78", '{"caption": "A dog runs"}', "https://example.com/dog.jpg", "iVBORw0KGgo" * 20,
                 "........", "<!DOCTYPE html><html><body>Bad gateway</body></html>", "\ufffd\ufffd\ufffd dog \ufffd"],
    "refusal": ["I'm sorry, but I can't assist with that.", "I am unable to view images.",
                "As an AI language model, I do not see pictures.", "I cannot see the image you mention.",
                "Sorry, I can’t help with identifying people in this image.", "It seems that no image was provided.",
                "Please upload the image you would like me to describe.",
                "I apologize, but this is not something I do.", "No image provided.", "N/A"],
    "prompt echo": [LONG, f"<image>\n{LONG}"],
    "repetition": ["There is a chair. " * 10, "a dog and " * 12, "very " * 9, "一只狗" * 8,
                   "A street with a red car, a bus, a red car, a bus, a red car, a bus, a red car, a bus.",
                   "1. dog 2. dog 3. dog 4. dog 5. dog 6. dog 7. dog"],
}


@pytest.mark.parametrize("said, wanted", GOOD.items())
def test_a_good_answer_is_freed_of_what_is_not_caption(said, wanted):
    assert clean(said, LONG) == (wanted, None)
    assert clean(wanted, LONG) == (wanted, None), "clean captions stay as they are"


@pytest.mark.parametrize("reason", BAD)
def test_an_answer_without_a_caption_is_bad_for_a_reason(reason):
    for said in BAD[reason]:
        assert clean(said, LONG) == ("", reason)


@pytest.mark.parametrize("said, wanted", [
    ("A dog runs. The grass is", "A dog runs."), ("A dog runs. It is 3.", "A dog runs."), ("A dog that", ""),
    ("A dog runs. The grass is green.", "A dog runs. The grass is green."), ("<think>Let me see, there is", ""),
    ("- a dog\n- the grass\n- a hou", "a dog. the grass."),
])
def test_of_a_cut_off_answer_the_last_sentence_goes_unless_it_is_whole(said, wanted):
    assert clean(said, LONG, "length")[0] == wanted


SCRAPS = st.sampled_from([*" \n.*#_-|\"'“”`<>[]()1a。dog The image shows USER: I can't".split(" "), " ", "\n"])


@given(st.text() | st.lists(SCRAPS, max_size=60).map("".join), st.sampled_from(["stop", "length", None]))
def test_no_answer_breaks_the_cleaning_and_none_comes_out_empty(said, finish):
    caption, reason = clean(said, LONG, finish)
    assert reason or caption.strip() and any(c.isalpha() for c in caption)


# ---- the files -------------------------------------------------------------------------------------------------------

def lacking(path, key):
    return Output(path).claim(recaption.hashed(key), ["short", "long"])


def test_a_torn_last_line_is_cut_off_and_all_others_are_known_again(tmp_path):
    path, key = tmp_path / "x.captions.jsonl", os.fsdecode(b'caf\xe9 \xe2\x98\x82 "and" \\')  # no Unicode
    Output(path).append({"key": key, "captions": {"short": "Ein Hund, 狗."}})
    complete = path.read_bytes() + b"not JSON\n[]\n"
    path.write_bytes(complete)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(complete) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="disk is full"):
            Output(path).append({"key": "c", "captions": {"short": "A cat."}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lacking(path, key) == ["long"] and lacking(path, "c") == ["short", "long"]
    assert path.read_bytes() == complete
    path.write_bytes(complete + b'{"key": "d", "captions": {"short": "By hand."}}')
    assert lacking(path, "d") == ["long"]


def test_a_second_process_on_the_same_file_is_refused(tmp_path):
    held = Output(tmp_path / "x")
    with pytest.raises(UserError, match="another process writes to"):
        Output(held.path)


def jpeg(number):
    """A JPEG unlike every other: its colours are its number's."""
    file = io.BytesIO()
    colours = np.random.default_rng(number).integers(0, 255, (3, 4, 3), np.uint8)
    Image.fromarray(colours).resize((48, 24), 0).save(file, "JPEG")
    return file.getvalue()


def url(number):
    return data_url(load_image(jpeg(number)))


def shards(folder, n):
    """Tars of twenty pictures each, n in all."""
    folder.mkdir()
    for i in range(n):
        with tarfile.open(folder / f"{i // 20:05}.tar", "a") as tar:
            add_member(tar, f"{i:04}.jpg", jpeg(i))
    return folder


def captioned(folder):
    """All rows below a folder, but for a last line that a killed process has torn."""
    rows = []
    for path in sorted(Path(folder).glob("**/*.captions.jsonl")):
        rows += [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return rows


def report(folder):
    return json.loads(Path(folder, "recaption.json").read_text())


def assert_each_once(folder, n, *fields):
    """Every image has a caption of each of these fields, sorted by name, and none is twice there."""
    found = []
    for r in captioned(folder):
        for field, text in r["captions"].items():
            found.append((r["key"], field, text))
    assert sorted(found) == [(f"{i:04}", field, answer(i, field)) for i in range(n) for field in fields]


# ---- what is sent ----------------------------------------------------------------------------------------------------

def test_what_is_sent_of_a_grid_covers_the_image_and_is_no_larger_than_allowed(tmp_path):
    Image.new("RGB", (60, 30)).save(tmp_path / "x.png")
    size, urls = pictures(tmp_path / "x.png", [WHOLE, *crops(3)], 40, "x")
    assert size == (60, 30)
    assert [Image.open(urlopen(sent)).size for sent in urls.values()] == [(40, 20)] + [(20, 10)] * 9
    assert crops(2) == [(0, 0, .5, .5), (.5, 0, 1, .5), (0, .5, .5, 1), (.5, .5, 1, 1)]


# ---- the endpoint ----------------------------------------------------------------------------------------------------

@pytest.fixture
def serve():
    """serve(*flags) starts faulty_endpoint.py and gives its address."""
    started = []

    def start(*flags):
        command = [sys.executable, ROOT / "tests" / "faulty_endpoint.py", *map(str, flags)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return f"http://127.0.0.1:{int(started[-1].stdout.readline())}"
    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def run(*flags):
    return recaption.main([str(flag) for flag in flags])


def answer(number, field="short"):
    return caption(url(number), PROMPTS[field][0])


def test_every_format_is_captioned_beside_itself(tmp_path, serve):
    address = serve()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/0000.jpg").write_bytes(jpeg(0))
    (tmp_path / "a.jsonl").write_text('{"image": "folder/0000.jpg"}')
    shards(tmp_path / "tars", 1)
    captions = {field: answer(0, field) for field in ("short", "long")}
    line = {"key": ANY, "size": [48, 24], "captions": captions, "model": "tiny", "prompts": "1"}
    for data, beside in (("folder", "folder"), ("a.jsonl", "a"), ("tars", "tars/00000")):
        assert run(tmp_path / data, "--endpoint", address) == 0
        assert json.loads((tmp_path / f"{beside}.captions.jsonl").read_text()) == line


def test_of_faulty_endpoints_every_image_is_captioned_once_or_reported(tmp_path, serve):
    addresses = [serve("--faults", 0.2, "--delay", 0.002) for _ in range(2)]
    data, fields = shards(tmp_path / "tars", 80), ["--fields", "short,background"]
    assert run(data, "--endpoint", ",".join(addresses), "--in-flight", 8, *fields) == 0
    rows, told = captioned(data), report(data)
    assert len({r["key"] for r in rows}) == len(rows) == told["captioned"]
    assert 80 - sum(len(r["captions"]) == 2 for r in rows) == sum(told["failed"].values())
    assert set(told["failed"]) <= {"refusal", "empty", "not an answer"}
    assert run(data, "--endpoint", serve(), *fields) == 0, "what failed is asked for again"
    assert_each_once(data, 80, "background", "short")


def test_killed_and_resumed_each_is_captioned_and_asked_for_once(tmp_path, serve):
    log, data = tmp_path / "log", shards(tmp_path / "tars", 100)
    log.touch()
    flags = [data, "--endpoint", serve("--delay", 0.03, "--log", log), "--in-flight", 2]
    for stop, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        finished, asked = captioned(data), len(log.read_text())
        process = subprocess.Popen([sys.executable, ROOT / "recaption.py", *map(str, flags)])
        while len(captioned(data)) < len(finished) + 10:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(stop)
        assert process.wait(20) == code
        again = log.read_text()[asked:]
        assert not any(text in again for r in finished for text in r["captions"].values())
    assert report(data), "Ctrl-C leaves one"
    Path(data, "00004.captions.jsonl").write_bytes(b'{"key": "0080", "capt')
    assert run(*flags) == 0
    assert_each_once(data, 100, "long", "short")


def test_the_key_comes_from_the_environment_and_is_never_printed(tmp_path, serve, monkeypatch):
    data, key = shards(tmp_path / "tars", 2), "sk-very.secret/1"
    address = serve("--key", key)
    with pytest.raises(UserError, match="401.*OPENAI_API_KEY"):
        run(data, "--endpoint", address)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert run(data, "--endpoint", address) == 0 and len(captioned(data)) == 2
    with pytest.raises(UserError, match="told to say 400") as error:  # the server's message has the key in it
        run(data, "--endpoint", serve("--status", 400))
    assert key not in str(error.value)


@pytest.mark.parametrize("server, flags, named", [
    ("", "--endpoint http://127.0.0.1:9", "127.0.0.1:9"),
    ("--status 404", "", "--model"),
    ("--models a,b", "", "'a', 'b'"),
    ("", "--fields short,colour", "colour"),
    ("", "--prompts none.json", "none.json"),
    ("", "--prompts {words}", 'is not like {"version"'),
    ("", "--in-flight 0", "--in-flight"),
    ("", "--preview gone/p.html", "gone/p.html cannot be written"),
])
def test_a_mistake_ends_in_one_sentence_and_writes_nothing(tmp_path, serve, server, flags, named):
    data = shards(tmp_path / "tars", 1)
    words = tmp_path / "words.json"
    words.write_text('{"long": "Describe it."}')
    with pytest.raises(UserError, match=named) as error:
        run(data, "--endpoint", serve(*server.split()), *flags.format(words=words).split())
    assert "\n" not in str(error.value)
    assert os.listdir(data) == ["00000.tar"]


def test_broken_images_are_passed_over_and_reported(tmp_path, serve):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in (("0000.jpg", jpeg(0)), ("1.jpg", b""), ("2.png", jpeg(2)[:-30])):
        (folder / name).write_bytes(content)
    assert run(folder, "--endpoint", serve(), "--fields", "short") == 0
    assert_each_once(tmp_path, 1, "short")
    assert report(tmp_path)["failed"] == {"image will not decode": 2}
    assert run(folder, "--endpoint", serve(), "--fields", "short") == 0
    (folder / "0000.jpg").unlink()
    (tmp_path / "pictures.captions.jsonl").unlink()
    with pytest.raises(UserError, match="no image was captioned.*will not decode"):
        run(folder, "--endpoint", serve(), "--fields", "short")


def test_a_server_that_goes_away_ends_the_run_with_all_its_answers_kept(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(recaption, "RETRIES", 1)
    monkeypatch.setattr(recaption, "PATIENCE", 0.1)
    data = shards(tmp_path / "tars", 30)
    with pytest.raises(UserError, match="does not answer"):
        run(data, "--endpoint", serve("--dies-after", 12), "--fields", "short", "--in-flight", 2)
    assert 0 < len(captioned(data)) <= 12


def test_of_an_image_that_is_cancelled_the_captions_there_are_kept(monkeypatch):
    async def ask(server, name, *_):
        if name != "short":
            raise asyncio.CancelledError
        return "A dog."

    monkeypatch.setattr(recaption, "ask", ask)
    lines = []
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(recaption.caption(SimpleNamespace(append=lines.append), {"captions": {}}, ["short", "long"],
                                      {recaption.WHOLE: ""}, None, recaption.Progress(), None))
    assert lines == [{"captions": {"short": "A dog."}}]


def test_prompts_of_a_file_crops_and_later_fields_stand_side_by_side(tmp_path, serve):
    data, address = shards(tmp_path / "tars", 1), serve()
    prompts = {"version": "mine-2", "short": ["What is it?", 50], "colours": ["Which colours are there?", 30]}
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    own = ["--prompts", tmp_path / "p.json", "--fields", "short,colours"]
    for flags in (["--fields", "short"], own, ["--fields", "short", "--dense", 2]):
        assert run(data, "--endpoint", address, *flags) == 0
    first, second, third = captioned(data)
    assert [r["prompts"] for r in (first, second, third)] == ["1", "mine-2", "1"]
    assert first["captions"] == {"short": answer(0)}
    assert second["captions"] == {"colours": caption(url(0), "Which colours are there?")}
    dense = third["captions"]["dense"]
    assert [tuple(part["box"]) for part in dense] == crops(2) and len({part["text"] for part in dense}) == 4


def test_limit_takes_the_first_images_and_the_preview_shows_them(tmp_path, serve):
    data = shards(tmp_path / "tars", 6)
    flags = [data, "--endpoint", serve(), "--fields", "short", "--limit", 4, "--preview", tmp_path / "p.html"]
    assert run(*flags) == 0 and run(*flags) == 0
    assert_each_once(data, 4, "short")
    page = (tmp_path / "p.html").read_text()
    assert page.count("<img") == 4 and answer(3) in page
