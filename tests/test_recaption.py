"""Captions come out clean, each image's exactly once, whatever the server, the disk, kill -9 and the user do."""
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import recaption
from data import BadSample, Records, UserError, read_captions
from faulty_endpoint import caption
from recaption import PROMPTS, Lines, clean, crops, pictures, retry_after
from scenes import Scenes

LONG = PROMPTS["long"][0]
HERE = Path(__file__).parent


# ---- cleaning --------------------------------------------------------------------------------------------------------

GOOD = [  # what a model said -> the caption
    ("A dog lies on a sofa. Behind it hangs a picture.", "A dog lies on a sofa. Behind it hangs a picture."),
    # stock openers
    ("The image shows a dog. The image also features a cat.", "A dog. A cat."),
    ("In this image, we can see a small red boat.", "A small red boat."),
    ("In the image, there are two dogs: a white one and a black one.", "There are two dogs: a white one and a black one."),
    ("This is an image of a market. We can see fruit.", "A market. Fruit."),
    ("The picture captures that the man is late.", "The man is late."),
    ("Caption: A bus in the rain.", "A bus in the rain."),
    ("The image is a black and white photograph of Dr. Smith.", "The image is a black and white photograph of Dr. Smith."),
    ("The image on the wall shows a ship.", "The image on the wall shows a ship."),
    # small talk
    ("Sure! Here is a description of the image:\n\nA dog runs.\n\nLet me know if you need more details!", "A dog runs."),
    ("Certainly. Here's a caption: Two cats sleep. I hope this helps!", "Two cats sleep."),
    ("A sure-footed goat climbs.", "A sure-footed goat climbs."),
    # markdown: headings, lists, labels, emphasis, links, code, tables, quotes
    ("## Overview\n\nA red car stands in a street.\n\n### Details\n- The car is *old*\n- Its doors are **open**",
     "A red car stands in a street. The car is old. Its doors are open."),
    ("1. **Main object:** A red car, approx. 3.5 m long.\n2. **Background**: The U.S. flag hangs on a wall\n(c) A man waits",
     "A red car, approx. 3.5 m long. The U.S. flag hangs on a wall. A man waits."),
    ("**A dog on a sofa.**", "A dog on a sofa."),
    ("# A dog on a sofa", "A dog on a sofa"),
    ("Key elements:\n• a lamp;\n• a desk,\n• a chair", "a lamp. a desk. a chair."),
    ("A sign from [the shop](https://example.com/a) and `code`.", "A sign from the shop and code."),
    ("> A quoted dog.\n> A second line.", "A quoted dog. A second line."),
    ("| object | colour |\n|---|---|\n| a car | is red |", "object colour. a car is red."),
    ('"A dog on a sofa."', "A dog on a sofa."),
    ("“A dog”", "A dog"),
    ('A sign says "STOP". Another says "GO".', 'A sign says "STOP". Another says "GO".'),
    ("```\nA dog.\n```", "A dog."),
    ("---\nA dog.\n***\nA cat.", "A dog. A cat."),
    # decimals, abbreviations, initials, times, names of files, arithmetic
    ("The tower is 3.5 times as high, e.g. 120.75 m. At 5 p.m. Mr. J. R. Hill waits at St. Mary's.",
     "The tower is 3.5 times as high, e.g. 120.75 m. At 5 p.m. Mr. J. R. Hill waits at St. Mary's."),
    ("The file man_with_hat.png hangs beside 5 * 3 * 2 = 30 tiles.", "The file man_with_hat.png hangs beside 5 * 3 * 2 = 30 tiles."),
    ("A cat... or a dog? Hard to say!", "A cat... or a dog? Hard to say!"),
    # a model that breaks its lines, one that thinks aloud, chat markers, turns of a talk
    ("A paragraph that goes on\nover the next line, as some do.\nThen a new one.", "A paragraph that goes on over the next line, as some do. Then a new one."),
    ("<think>The user wants a caption. A dog?</think>\nA dog runs.", "A dog runs."),
    ("<|im_start|>A dog runs.<|im_end|></s>", "A dog runs."),
    (f"USER: <image>\n{LONG} ASSISTANT: A dog runs. USER: Thanks! ASSISTANT: You're welcome.", "A dog runs."),
    (f"{LONG} A dog runs over the grass.", "A dog runs over the grass."),
    # repeated sentences, refusals in passing
    ("A dog runs. The grass is green. A dog runs!", "A dog runs. The grass is green."),
    ("A woman smiles. I cannot identify the person in the picture. She wears a hat.", "A woman smiles. She wears a hat."),
    ("A man who cannot see the road walks on. He is unable to see.", "A man who cannot see the road walks on. He is unable to see."),
    # other languages
    ("这张图片显示了一只狗。它在沙发上。它在沙发上。", "这张图片显示了一只狗。它在沙发上。"),
    ("Ein Hund läuft über die Straße. Es regnet.", "Ein Hund läuft über die Straße. Es regnet."),
]
BAD = [
    ("", "empty"), (None, "empty"), ("  \n ", "empty"), ("<image>", "empty"), (["A dog."], "empty"), ("</s>", "empty"),
    ("12 34 56 78", "not text"), ('{"caption": "A dog runs"}', "not text"), ("https://example.com/dog.jpg", "not text"),
    ("<!DOCTYPE html><html><body>Bad gateway</body></html>", "not text"), ("iVBORw0KGgo" * 20, "not text"),
    ("........", "not text"), ("\ufffd\ufffd\ufffd dog \ufffd", "not text"), ("", "empty"),
    ("I'm sorry, but I can't assist with that.", "refusal"), ("I am unable to view images.", "refusal"),
    ("As an AI language model, I do not see pictures.", "refusal"), ("I cannot see the image you mention.", "refusal"),
    ("Sorry, I can’t help with identifying people in this image.", "refusal"), ("Please upload the image you would like me to describe.", "refusal"),
    ("It seems that no image was provided.", "refusal"), ("I apologize, but this is not something I do.", "refusal"),
    (LONG, "prompt echo"), (f"USER: {LONG} ASSISTANT:", "prompt echo"),
    ("There is a chair. " * 10, "repetition"), ("a dog and " * 12, "repetition"), ("very " * 9, "repetition"),
    ("A street with a red car, a bus, a red car, a bus, a red car, a bus, a red car, a bus.", "repetition"),
    ("1. dog 2. dog 3. dog 4. dog 5. dog 6. dog 7. dog", "repetition"), ("一只狗" * 8, "repetition"),
]


@pytest.mark.parametrize("said, wanted", GOOD)
def test_a_good_answer_is_freed_of_what_is_not_caption(said, wanted):
    assert clean(said, "long", LONG) == (wanted, None)
    assert clean(wanted, "long", LONG) == (wanted, None), "clean captions stay as they are"


@pytest.mark.parametrize("said, reason", BAD)
def test_an_answer_without_a_caption_is_bad_for_a_reason(said, reason):
    assert clean(said, "long", LONG)[1] == reason


def test_of_a_cut_off_answer_the_last_sentence_goes_unless_it_is_whole():
    assert clean("A dog runs. The grass is", "long", LONG, "length") == ("A dog runs.", None)
    assert clean("A dog runs. The grass is green.", "long", LONG, "length") == ("A dog runs. The grass is green.", None)
    assert clean("A dog runs. It is 3.", "long", LONG, "length") == ("A dog runs.", None)
    assert clean("- a dog\n- the grass\n- a hou", "long", LONG, "length") == ("a dog. the grass.", None)
    assert clean("A dog that", "short", "", "length") == ("", "cut off")
    assert clean("<think>Let me see, there is", "long", LONG, "length")[1] == "empty"
    assert clean("A dog runs", "short", "") == ("A dog runs", None)


def test_few_words_become_one_list_without_repeats():
    for said in ("dog, sofa, window", "- dog\n- sofa\n- dog\n- window", "dog; sofa; dog; window.", '"dog, sofa, window, dog"'):
        assert clean(said, "few_words", PROMPTS["few_words"][0]) == ("dog, sofa, window", None)
    assert clean("dog, sofa, wind", "few_words", "", "length") == ("dog, sofa", None)


@given(st.one_of(st.text(), st.lists(st.sampled_from(" \n.*#_-|\"'“”`<>[]()1a。dog The image shows USER: I can't".split(" ") + [" ", "\n"]),
                                     max_size=60).map("".join)), st.sampled_from([*PROMPTS, "other"]), st.sampled_from(["stop", "length", None]))
def test_no_answer_breaks_the_cleaning_and_none_comes_out_empty(said, field, finish):
    caption, reason = clean(said, field, LONG, finish)
    assert reason or caption.strip() and any(c.isalpha() for c in caption)


def test_true_captions_of_scenes_are_never_bad():
    for i in range(300):
        for field, text in Scenes("train").scene(i).captions.items():
            cleaned, reason = clean(" ".join(text) if isinstance(text, list) else text, field, LONG)
            assert reason is None and len(cleaned.split()) >= 1


# ---- the files -------------------------------------------------------------------------------------------------------

def row(key, **captions):
    return {"key": key, "captions": captions}


def test_lines_are_appended_once_mended_and_shared_by_writers(tmp_path):
    path = tmp_path / "x.captions.jsonl"
    first, second = Lines(path), Lines(path)
    assert first.append(row("a", short="A.")) and second.append(row("b", short="B."))
    assert not first.append(row("b", short="another B.")), "what another writer has done is not written again"
    assert first.append(row("b", long="B B.")), "another caption of the same image is"
    path.write_bytes(path.read_bytes() + b"not JSON\n[]\n" + b'{"key": "c", "captions": {"sho')  # torn by kill -9
    assert second.append(row("d", short="D.")) and second.append(row("c", short="C."))
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b"" and [json.loads(line)["key"] for line in lines if line.startswith(b"{")] == ["a", "b", "b", "d", "c"]
    assert len(lines) == 7 and Lines(path).done == second.done == (first.append(None), first.done)[1]


@pytest.mark.parametrize("name", ["grün ☂", os.fsdecode(b"caf\xe9"), 'quote "and" \\ back'])
def test_keys_of_any_name_are_known_again(tmp_path, name):
    assert Lines(tmp_path / "x").append(row(name, short="Ein Hund, 狗."))
    assert not Lines(tmp_path / "x").append(row(name, short="Ein Hund, 狗."))


def jpeg(number, side=48, **save):
    """A JPEG unlike every other: its colours are its number's."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (3, 4, 3), np.uint8)).resize((side, side // 2), 0).save(buffer, "JPEG", **save)
    return buffer.getvalue()


def url(data):
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def shards(folder, n, each=20):
    folder.mkdir(exist_ok=True)
    for start in range(0, n, each):
        with tarfile.open(folder / f"{start // each:05}.tar", "w") as tar:
            for i in range(start, min(n, start + each)):
                for suffix, content in (("jpg", jpeg(i)), ("txt", f"raw {i}".encode())):
                    info = tarfile.TarInfo(f"{i:04}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder)


def captioned(folder) -> list[dict]:
    """All rows below a folder; a line that is not whole fails here."""
    texts = [path.read_text() for path in sorted(Path(folder).glob("**/*.captions.jsonl"))]
    assert all(text.endswith("\n") or not text for text in texts)
    return [json.loads(line) for text in texts for line in text.splitlines()]


# ---- what is sent ----------------------------------------------------------------------------------------------------

def test_a_small_upright_jpeg_goes_out_as_it_is_and_all_else_is_made_one(tmp_path):
    data = jpeg(1)
    assert pictures(data, 64, [None], True) == ((48, 24), [url(data)])
    turned = Image.new("RGB", (40, 20)).getexif()
    turned[0x0112] = 6
    for source, side, size in ((data, 24, (48, 24)), (jpeg(1, exif=turned), 64, (24, 48)), (data[:-2] + b"\xff\xd9junk", 64, (48, 24))):
        found, (sent,) = pictures(source, side, [None], True)
        image = Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2])))
        assert found == size and image.format == "JPEG" and max(image.size) == min(side, 48) and (image.width > image.height) == (size[0] > size[1])
    with pytest.raises(BadSample, match="truncated"):
        pictures(data[:-40], 64, [None], True)
    with pytest.raises(BadSample, match="missing"):
        pictures(tmp_path / "none.jpg", 64, [None], True)


def test_the_crops_of_a_grid_cover_the_image_once():
    image = np.arange(30 * 50, dtype=np.uint16).reshape(30, 50) % 251
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "PNG")
    size, parts = pictures(buffer.getvalue(), 100, crops(3), False)
    assert size == (50, 30) and len(parts) == 9
    rows = [np.concatenate([np.asarray(p)[..., 0] for p in parts[r:r + 3]], 1) for r in (0, 3, 6)]
    assert np.array_equal(np.concatenate(rows), image)


# ---- the endpoint ----------------------------------------------------------------------------------------------------

@pytest.fixture
def serve(tmp_path):
    """serve(*flags) starts faulty_endpoint.py and gives its address."""
    started = []

    def start(*flags):
        started.append(subprocess.Popen([sys.executable, HERE / "faulty_endpoint.py", *map(str, flags)], stdout=subprocess.PIPE, text=True))
        return f"http://127.0.0.1:{int(started[-1].stdout.readline())}"
    yield start
    for process in started:
        process.kill()
        process.communicate()


def stats(address):
    return json.load(urllib.request.urlopen(address + "/stats", timeout=10))


def run(*flags):
    return recaption.main([str(flag) for flag in flags])


def answer(number, field="short"):
    return caption(url(jpeg(number)), PROMPTS[field][0])


def test_every_format_is_captioned_beside_itself_and_read_with_its_captions(tmp_path, serve):
    address = serve()
    pictures_ = tmp_path / "folder" / "deep"
    pictures_.mkdir(parents=True)
    for i in range(3):
        (pictures_ / f"{i}.jpg").write_bytes(jpeg(i))
    (pictures_ / "0.txt").write_text("raw 0")
    names = [f"folder/deep/{i}.jpg" for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"image": n, "caption": ["raw", "old long."]}) + "\n" for n in names))
    (tmp_path / "b.csv").write_text("Image Path,raw_caption,longSV_captions\n" + "".join(f"{n},raw,Old. Long.\n" for n in names))
    shards(tmp_path / "tars", 3, each=2)
    for data in ("folder", "a.jsonl", "b.csv", "tars"):
        assert run(tmp_path / data, "--endpoint", address, "--fields", "short,long,background") == 0
        records = Records(str(tmp_path / data))
        assert len(records) == 3
        for i in range(3):
            texts = read_captions(records[i].row)
            assert answer(i) in texts.short and texts.long[0] == answer(i, "long") and answer(i, "background") in texts.perspectives
            assert data == "folder" and i or texts.raw.startswith("raw")
    beside = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("**/*.captions.jsonl"))
    assert beside == ["a.captions.jsonl", "b.captions.jsonl", "folder.captions.jsonl", "tars/00000.captions.jsonl", "tars/00001.captions.jsonl"]
    assert captioned(tmp_path / "tars")[0] == {
        "key": "0000", "size": [48, 24], "model": "tiny", "prompts": recaption.VERSION,
        "captions": {"raw": "raw 0"} | {field: answer(0, field) for field in ("short", "long", "background")}}


@pytest.mark.parametrize("endpoints", [1, 3])
def test_of_faulty_endpoints_every_image_is_captioned_once_or_reported_once(tmp_path, serve, endpoints, monkeypatch):
    monkeypatch.setattr(recaption, "backoff", lambda failures: random.uniform(0, 0.02))
    addresses = [serve("--faults", 0.2, "--delay", 0.002) for _ in range(endpoints)]
    data = shards(tmp_path / "tars", 200)
    assert run(data, "--endpoint", ",".join(addresses), "--in-flight", 8, "--timeout", 0.5, "--fields", "short,background", "--tries", 2) == 0
    rows, report = captioned(data), json.loads((tmp_path / "tars" / "recaption.json").read_text())
    failed = [json.loads(line) for path in Path(data).glob("*.failed.jsonl") for line in path.read_text().splitlines()]
    keys = [r["key"] for r in rows] + [r["key"] for r in failed]
    assert sorted(keys) == [f"{i:04}" for i in range(200)] and len(failed) == report["given up on"] and len(rows) == report["captioned"]
    assert all(r["captions"][field] == answer(int(r["key"]), field) for r in rows for field in ("short", "background"))
    assert all(set(r["bad"].values()) <= {"refusal", "empty"} or "timeout" in str(r) or "drop" in str(r) for r in failed)
    seen = [stats(address) for address in addresses]
    assert {"status 429", "status 500", "timeout", "dropped connection", "not an answer", "not HTTP"} <= report["retries, by cause"].keys()
    assert all(s["requests"] > 400 / endpoints / 2 and s["most_at_once"] <= 8 + s.get("silence", 0) for s in seen), "spread, within the limit"
    assert run(data, "--endpoint", serve(), "--fields", "short,background") == 0, "what was given up on is asked for again"
    assert len(captioned(data)) == 200 and not any(path.read_text() for path in Path(data).glob("*.failed.jsonl"))


def requests(log, rows=range(10_000)):
    return [json.loads(line) for line in log.read_text().splitlines()]


def killed_and_resumed(tmp_path, serve, kills, images):
    log, data = tmp_path / "log", shards(tmp_path / "tars", images)
    address = serve("--delay", 0.02, "--log", log)
    flags = [data, "--endpoint", address, "--in-flight", "4"]
    for _ in range(kills):
        finished = {r["key"] for r in captioned_so_far(data)}
        asked = len(requests(log)) if log.exists() else 0
        process = get_context("fork").Process(target=quiet, args=(flags,))
        process.start()
        time.sleep(random.uniform(0.1, 0.8))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        time.sleep(0.1)  # the last requests reach the log
        again = {line["text"] for line in requests(log)[asked:]}
        assert not again & {answer(int(key), field) for key in finished for field in ("short", "long")}
    finished = {r["key"] for r in captioned_so_far(data)}
    assert run(*flags) == 0
    rows = captioned(data)
    assert sorted(r["key"] for r in rows) == [f"{i:04}" for i in range(images)]
    assert all(r["captions"] == {"raw": f"raw {int(r['key'])}", "short": answer(int(r["key"])), "long": answer(int(r["key"]), "long")} for r in rows)
    return len(finished)


def captioned_so_far(data):
    texts = [path.read_bytes() for path in Path(data).glob("*.captions.jsonl")]
    return [json.loads(line) for text in texts for line in text.split(b"\n")[:-1]]


def quiet(flags):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    os._exit(recaption.main(flags))


def test_killed_at_any_moment_and_resumed_all_are_captioned_once_and_none_is_asked_for_again(tmp_path, serve):
    killed_and_resumed(tmp_path, serve, kills=3, images=120)


@pytest.mark.slow
def test_the_same_of_20_kills(tmp_path, serve):
    killed_and_resumed(tmp_path, serve, kills=20, images=1500)
