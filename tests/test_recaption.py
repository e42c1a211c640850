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
import threading
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
import train
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
    ("In the image, there are two dogs: a white one and a black one.",
     "There are two dogs: a white one and a black one."),
    ("This is an image of a market. We can see fruit.", "A market. Fruit."),
    ("The picture captures that the man is late.", "The man is late."),
    ("Caption: A bus in the rain.", "A bus in the rain."),
    ("The image is a black and white photograph of Dr. Smith.",
     "The image is a black and white photograph of Dr. Smith."),
    ("The image on the wall shows a ship.", "The image on the wall shows a ship."),
    # small talk
    ("Sure! Here is a description of the image:\n\nA dog runs.\n\nLet me know if you need more details!",
     "A dog runs."),
    ("Certainly. Here's a caption: Two cats sleep. I hope this helps!", "Two cats sleep."),
    ("A sure-footed goat climbs.", "A sure-footed goat climbs."),
    # markdown: headings, lists, labels, emphasis, links, code, tables, quotes
    ("## Overview\n\nA red car stands in a street.\n\n### Details\n- The car is *old*\n- Its doors are **open**",
     "A red car stands in a street. The car is old. Its doors are open."),
    ("1. **Main object:** A red car, approx. 3.5 m long.\n2. **Background**: The U.S. flag hangs on a wall\n"
     "(c) A man waits",
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
    ("The file man_with_hat.png hangs beside 5 * 3 * 2 = 30 tiles.",
     "The file man_with_hat.png hangs beside 5 * 3 * 2 = 30 tiles."),
    ("A cat... or a dog? Hard to say!", "A cat... or a dog? Hard to say!"),
    # a model that breaks its lines, one that thinks aloud, chat markers, turns of a talk
    ("A paragraph that goes on\nover the next line, as some do.\nThen a new one.",
     "A paragraph that goes on over the next line, as some do. Then a new one."),
    ("<think>The user wants a caption. A dog?</think>\nA dog runs.", "A dog runs."),
    ("<|im_start|>A dog runs.<|im_end|></s>", "A dog runs."),
    (f"USER: <image>\n{LONG} ASSISTANT: A dog runs. USER: Thanks! ASSISTANT: You're welcome.", "A dog runs."),
    (f"{LONG} A dog runs over the grass.", "A dog runs over the grass."),
    # repeated sentences, refusals in passing
    ("A dog runs. The grass is green. A dog runs!", "A dog runs. The grass is green."),
    ("A woman smiles. I cannot identify the person in the picture. She wears a hat.",
     "A woman smiles. She wears a hat."),
    ("A man who cannot see the road walks on. He is unable to see.",
     "A man who cannot see the road walks on. He is unable to see."),
    # other languages
    ("这张图片显示了一只狗。它在沙发上。它在沙发上。", "这张图片显示了一只狗。它在沙发上。"),
    ("Ein Hund läuft über die Straße. Es regnet.", "Ein Hund läuft über die Straße. Es regnet."),
]
BAD = [
    ("", "empty"), (None, "empty"), ("  \n ", "empty"), ("<image>", "empty"), (["A dog."], "empty"), ("</s>", "empty"),
    ("12 34 56 78", "not text"), ('{"caption": "A dog runs"}', "not text"), ("https://example.com/dog.jpg", "not text"),
    ("<!DOCTYPE html><html><body>Bad gateway</body></html>", "not text"), ("iVBORw0KGgo" * 20, "not text"),
    ("........", "not text"), ("\ufffd\ufffd\ufffd dog \ufffd", "not text"),
    ("I'm sorry, but I can't assist with that.", "refusal"), ("I am unable to view images.", "refusal"),
    ("As an AI language model, I do not see pictures.", "refusal"), ("I cannot see the image you mention.", "refusal"),
    ("Sorry, I can’t help with identifying people in this image.", "refusal"),
    ("Please upload the image you would like me to describe.", "refusal"),
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
    for said in ("dog, sofa, window", "- dog\n- sofa\n- dog\n- window", "dog; sofa; dog; window.",
                 '"dog, sofa, window, dog"'):
        assert clean(said, "few_words", PROMPTS["few_words"][0]) == ("dog, sofa, window", None)
    assert clean("dog, sofa, wind", "few_words", "", "length") == ("dog, sofa", None)


SCRAPS = st.sampled_from([*" \n.*#_-|\"'“”`<>[]()1a。dog The image shows USER: I can't".split(" "), " ", "\n"])


@given(st.text() | st.lists(SCRAPS, max_size=60).map("".join), st.sampled_from([*PROMPTS, "other"]),
       st.sampled_from(["stop", "length", None]))
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
    keys = [json.loads(line)["key"] for line in lines if line.startswith(b"{")]
    assert lines.pop() == b"" and keys == ["a", "b", "b", "d", "c"]
    with first.locked():
        pass  # reads what the other has written
    assert len(lines) == 7 and Lines(path).done == second.done == first.done


@pytest.mark.parametrize("name", ["grün ☂", os.fsdecode(b"caf\xe9"), 'quote "and" \\ back'])
def test_keys_of_any_name_are_known_again(tmp_path, name):
    assert Lines(tmp_path / "x").append(row(name, short="Ein Hund, 狗."))
    assert not Lines(tmp_path / "x").append(row(name, short="Ein Hund, 狗."))


def jpeg(number, side=48, **save):
    """A JPEG unlike every other: its colours are its number's."""
    buffer = io.BytesIO()
    colours = np.random.default_rng(number).integers(0, 255, (3, 4, 3), np.uint8)
    Image.fromarray(colours).resize((side, side // 2), 0).save(buffer, "JPEG", **save)
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
    for source, side, size in ((data, 24, (48, 24)), (jpeg(1, exif=turned), 64, (24, 48)),
                               (data[:-2] + b"\xff\xd9junk", 64, (48, 24))):
        found, (sent,) = pictures(source, side, [None], True)
        image = Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2])))
        assert found == size and image.format == "JPEG" and max(image.size) == min(side, 48)
        assert (image.width > image.height) == (size[0] > size[1])
    for exif in (turned, b"Exif\0\0broken"):  # decoded at a quarter; the size is that of the whole
        found, parts = pictures(jpeg(1, 1600, exif=exif), 100, [None, *crops(2)], False)
        assert found == ((800, 1600) if exif is turned else (1600, 800))
        assert [part.size for part in parts] == [(50, 100) if exif is turned else (100, 50)] * 5
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
        command = [sys.executable, HERE / "faulty_endpoint.py", *map(str, flags)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
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
    rows = [{"image": name, "caption": ["raw", "old long."]} for name in names]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    lines = ["Image Path,raw_caption,longSV_captions", *(f"{name},raw,Old. Long." for name in names)]
    (tmp_path / "b.csv").write_text("\n".join(lines) + "\n")
    shards(tmp_path / "tars", 3, each=2)
    for data in ("folder", "a.jsonl", "b.csv", "tars"):
        assert run(tmp_path / data, "--endpoint", address, "--fields", "short,long,background") == 0
        records = Records(str(tmp_path / data))
        assert len(records) == 3
        for i in range(3):
            texts = read_captions(records[i].row)
            assert answer(i) in texts.short and texts.long[0] == answer(i, "long")
            assert answer(i, "background") in texts.perspectives
            assert data == "folder" and i or texts.raw.startswith("raw")
    beside = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("**/*.captions.jsonl"))
    assert beside == ["a.captions.jsonl", "b.captions.jsonl", "folder.captions.jsonl",
                      "tars/00000.captions.jsonl", "tars/00001.captions.jsonl"]
    assert captioned(tmp_path / "tars")[0] == {
        "key": "0000", "size": [48, 24], "model": "tiny", "prompts": recaption.VERSION,
        "captions": {"raw": "raw 0"} | {field: answer(0, field) for field in ("short", "long", "background")}}


@pytest.mark.parametrize("endpoints", [1, 3])
def test_of_faulty_endpoints_every_image_is_captioned_once_or_reported_once(tmp_path, serve, endpoints, monkeypatch):
    monkeypatch.setattr(recaption, "backoff", lambda failures: random.uniform(0, 0.02))
    addresses = [serve("--faults", 0.2, "--delay", 0.002) for _ in range(endpoints)]
    data = shards(tmp_path / "tars", 200)
    assert run(data, "--endpoint", ",".join(addresses), "--in-flight", 8, "--timeout", 0.5,
               "--fields", "short,background", "--tries", 2) == 0
    rows, report = captioned(data), json.loads((tmp_path / "tars" / "recaption.json").read_text())
    failed = [json.loads(line) for path in Path(data).glob("*.failed.jsonl") for line in path.read_text().splitlines()]
    keys = [r["key"] for r in rows] + [r["key"] for r in failed]
    assert sorted(keys) == [f"{i:04}" for i in range(200)]
    assert len(failed) == report["given up on"] and len(rows) == report["captioned"]
    assert all(r["captions"][field] == answer(int(r["key"]), field) for r in rows for field in ("short", "background"))
    assert all(set(r["bad"].values()) <= {"refusal", "empty"} or "timeout" in str(r) or "drop" in str(r)
               for r in failed)
    seen = [stats(address) for address in addresses]
    causes = {"status 429", "status 500", "timeout", "dropped connection", "not an answer", "not HTTP"}
    assert causes <= report["retries, by cause"].keys()
    assert all(s["requests"] > 400 / endpoints / 2 for s in seen), "they are spread ..."
    assert all(s["most_at_once"] <= 8 + s.get("silence", 0) for s in seen), "... within the limit"
    assert run(data, "--endpoint", serve(), "--fields", "short,background") == 0, "what failed is asked for again"
    assert len(captioned(data)) == 200 and not any(path.read_text() for path in Path(data).glob("*.failed.jsonl"))


def requests(log):
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
    for r in rows:
        number = int(r["key"])
        assert r["captions"] == {"raw": f"raw {number}", "short": answer(number), "long": answer(number, "long")}
    return len(finished)


def captioned_so_far(data):
    texts = [path.read_bytes() for path in Path(data).glob("*.captions.jsonl")]
    return [json.loads(line) for text in texts for line in text.split(b"\n")[:-1]]


def quiet(flags):
    # tqdm's lock is shared with forked processes: one killed while it draws its bar would stop all the others for good
    recaption.tqdm.set_lock(threading.RLock())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    os._exit(recaption.main(flags))


def test_killed_at_any_moment_and_resumed_all_are_captioned_once_and_none_is_asked_for_again(tmp_path, serve):
    killed_and_resumed(tmp_path, serve, kills=3, images=120)


@pytest.mark.slow
def test_the_same_of_20_kills(tmp_path, serve):
    killed_and_resumed(tmp_path, serve, kills=20, images=1500)


def test_an_endpoint_that_names_a_time_is_left_alone_until_then(tmp_path, serve):
    log = tmp_path / "log"
    data = shards(tmp_path / "tars", 12)
    assert run(data, "--endpoint", serve("--busy", 0.7, "--log", log), "--fields", "short", "--in-flight", 4) == 0
    times = [line["time"] for line in requests(log) if line["text"] != caption("", "What colour is this?")]
    assert len(captioned(data)) == 12
    waits = [later - earlier for earlier, later in zip(times, times[1:])]
    assert max(waits) >= 0.6 and waits.index(max(waits)) < 6, "the first requests were told to wait, and did"


def test_retry_after_is_read_as_seconds_or_as_a_date():
    assert retry_after({"retry-after": "7"}) == 7 and retry_after({"retry-after": "0.5"}) == 0.5
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 50 < retry_after({"retry-after": date}) <= 60
    assert retry_after({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}) == 0
    read = [retry_after({"retry-after": odd}) for odd in ("soon", "", "-1", "9" * 400 + "e9")]
    assert read.count(None) >= 3 and retry_after({}) is None


def test_bodies_in_chunks_and_bodies_that_end_with_the_connection_are_read():
    async def served(response):
        async def talk(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response)
            writer.close()
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        slot = recaption.Slot(recaption.Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", ""))
        async with server:
            return await slot.request("GET", "/models")

    head = b"HTTP/1.1 200 OK\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n4;x=y\r\nWiki\r\n6\r\npedia \r\n0\r\nTrailer: x\r\n\r\n"
    assert asyncio.run(served(chunked))[::2] == (200, b"Wikipedia ")
    assert asyncio.run(served(b"HTTP/1.0 404 Not Found\r\nX: a: b\r\n\r\nno"))[::2] == (404, b"no")
    for broken in (b"", head + b"Content-Length: 5\r\n\r\nab", head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
                   b"HTTP/1.1\r\n\r\n", b"SSH-2.0-OpenSSH\r\n\r\n", chunked[:-30]):
        with pytest.raises(recaption.Fault):
            asyncio.run(served(broken))


def command(flags, expect, **more):
    """Runs the command in a process of its own -> its output; it must end with this code, and a mistake in one line."""
    ran = subprocess.run([sys.executable, HERE.parent / "recaption.py", *map(str, flags)], capture_output=True,
                         text=True, timeout=120, **more)
    assert ran.returncode == expect, ran.stderr
    return ran.stdout + ran.stderr


def test_the_key_comes_from_the_environment_and_is_never_printed(tmp_path, serve, monkeypatch, capfd):
    data, key = shards(tmp_path / "tars", 2), "sk-Very.Secret/1"
    address = serve("--key", key)
    monkeypatch.setenv("MY_KEY", key)
    assert run(data, "--endpoint", address, "--key-env", "MY_KEY") == 0 and len(captioned(data)) == 2
    run(data, "--endpoint", address, "--key-env", "MY_KEY", "--dry-run", "--model", "tiny")
    for status in ("400 Bad Request", "500 Broken"):  # the server's message has the key in it
        with pytest.raises(UserError) as error:
            run(data, "--endpoint", serve("--status", status), "--key-env", "MY_KEY", "--retries", 1)
        assert "told to say" in str(error.value) and key.lower() not in str(error.value).lower()
    out = "".join(capfd.readouterr()) + "".join(path.read_text() for path in Path(data).glob("*.json*"))
    assert "$MY_KEY" in out and key not in out
    for wrong in ("sk-other", None):
        monkeypatch.setenv("MY_KEY", wrong) if wrong else monkeypatch.delenv("MY_KEY")
        with pytest.raises(UserError, match="MY_KEY"):
            run(data, "--endpoint", address, "--key-env", "MY_KEY")


@pytest.mark.parametrize("server, flags, named", [
    (None, ["--endpoint", "http://127.0.0.1:9"], "127.0.0.1:9"),
    (None, ["--endpoint", "http://127.0.0.1:9", "--model", "m"], "127.0.0.1:9"),
    (None, ["--endpoint", "ftp://host"], "http://"), (None, ["--endpoint", "http://me:pw@host"], "environment"),
    (None, ["--endpoint", "http://host:none"], "address"), (None, [], "--endpoint"),
    (None, ["--engine", "scenes"], "scenes"),
    (["--blind"], [], "vision"), (["--status", "404 Not Found"], [], "--model"),
    (["--status", "401 No"], [], "OPENAI_API_KEY"),
    (["--status", "400 No pictures"], [], "vision"), (["--models", "a,b"], [], "a, b"),
    (["--status", "500 mmproj missing"], ["--retries", "0"], "told to say 500"),
    ([], ["--fields", "short,colour"], "colour"), ([], ["--fields", "dense"], "--dense"),
    ([], ["--prompts", "none.json"], "none.json"),
    ([], ["--tries", "0"], "--tries"), ([], ["--body", "[1]"], "--body"), ([], ["--limit", "-1"], "--limit"),
    (None, ["--model", "/no/such/model"], "/no/such/model"),
])
def test_a_mistake_ends_in_one_sentence_and_writes_nothing(tmp_path, serve, server, flags, named):
    data = shards(tmp_path / "tars", 1)
    address = ["--endpoint", serve(*server)] if server is not None else []
    with pytest.raises(UserError) as error:
        run(data, *address, *flags)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not captioned(data) and not list(Path(data).glob("*.failed.jsonl"))


def test_no_images_a_broken_image_and_a_folder_that_is_read_only(tmp_path, serve):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no images|no usable|picture"):
        run(tmp_path / "none", "--endpoint", serve())
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "3.jpg").write_bytes(b"")
    (folder / "4.png").write_bytes(jpeg(4)[:-30])
    assert run(folder, "--endpoint", serve(), "--fields", "short") == 0
    assert sorted(r["key"] for r in captioned(tmp_path)) == ["0", "1", "2"]
    failed = [json.loads(line) for line in (tmp_path / "pictures.failed.jsonl").read_text().splitlines()]
    reasons = {r["key"]: r["bad"]["short"].split(":")[0] for r in failed}
    assert reasons == {"3": "image will not decode", "4": "image truncated"}
    for i in range(3):
        (folder / f"{i}.jpg").unlink()
    run(folder, "--endpoint", serve(), "--fields", "short", "--preview", tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()  # no picture is left to draw
    (tmp_path / "pictures.captions.jsonl").unlink()
    (tmp_path / "pictures.captions.jsonl").symlink_to("/nowhere/at/all")
    with pytest.raises(UserError, match="cannot write .*pictures.captions.jsonl"):
        run(folder, "--endpoint", serve(), "--fields", "short")


def test_ctrl_c_ends_at_once_and_the_same_command_goes_on(tmp_path, serve):
    data = shards(tmp_path / "tars", 60)
    flags = [data, "--endpoint", serve("--delay", 0.1), "--fields", "short", "--in-flight", "4"]
    process = get_context("fork").Process(target=quiet, args=(flags,))
    process.start()
    while len(captioned_so_far(data)) < 8:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    rows = captioned(data)
    assert process.exitcode == 130 and 8 <= len(rows) < 60 and (tmp_path / "tars" / "recaption.json").exists()
    assert run(data, "--endpoint", serve(), "--fields", "short") == 0
    assert sorted(r["key"] for r in captioned(data)) == [f"{i:04}" for i in range(60)]


def test_a_server_that_goes_away_ends_the_run_in_one_sentence_with_all_it_said_kept(tmp_path, serve):
    data = shards(tmp_path / "tars", 30)
    with pytest.raises(UserError, match="no endpoint has answered .* goes on"):
        run(data, "--endpoint", serve("--dies-after", 12), "--fields", "short", "--in-flight", 2, "--patience", 0.5)
    assert 0 < len(captioned(data)) <= 12 and not list(Path(data).glob("*.failed.jsonl"))


# ---- prompts, names, processes ---------------------------------------------------------------------------------------

def test_prompts_of_a_file_names_of_models_and_later_fields_stand_side_by_side(tmp_path, serve):
    data, address = shards(tmp_path / "tars", 5), serve()
    prompts = {"version": "mine-2", "short": "What is it?", "colours": ["Which colours are there?", 30]}
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    assert run(data, "--endpoint", address, "--fields", "short") == 0
    assert run(data, "--endpoint", address, "--fields", "long,short,colours", "--prompts", tmp_path / "p.json") == 0
    assert run(data, "--endpoint", address, "--fields", "short,long", "--name", "SV", "--dense", 2) == 0
    assert run(data, "--endpoint", address, "--fields", "short,long,colours", "--prompts", tmp_path / "p.json") == 0
    assert len(captioned(data)) == 15, "nothing was left to ask"
    rows = [r for r in captioned(data) if r["key"] == "0003"]
    assert [r["prompts"] for r in rows] == [recaption.VERSION, "mine-2", recaption.VERSION]
    assert rows[0]["captions"] == {"raw": "raw 3", "short": answer(3)}
    assert rows[1]["captions"] == {"raw": "raw 3", "long": answer(3, "long"),
                                   "colours": caption(url(jpeg(3)), "Which colours are there?")}
    assert rows[2]["captions"].keys() == {"raw", "shortSV_captions", "longSV_captions", "denseSV_captions"}
    texts = read_captions(Records(data)[3].row)
    assert len(texts.short) == 2 and len(texts.long) == 2, "training reads them all"
    dense = rows[2]["captions"]["denseSV_captions"]
    assert [part["box"] for part in dense] == [[0, 0, .5, .5], [.5, 0, 1, .5], [0, .5, .5, 1], [.5, .5, 1, 1]]
    assert len({part["text"] for part in dense}) == 4


def test_processes_share_the_work_and_a_second_run_beside_adds_nothing_twice(tmp_path, serve, monkeypatch):
    data, address = shards(tmp_path / "tars", 60), serve("--delay", 0.01)
    flags = [data, "--endpoint", address, "--fields", "short", "--in-flight", "4"]
    processes = []
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", str(world))
        processes.append(get_context("fork").Process(target=quiet, args=(flags,)))
        processes[-1].start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(r["key"] for r in captioned(data)) == [f"{i:04}" for i in range(60)]


def test_what_is_left_is_counted_in_images_by_process(tmp_path, serve, monkeypatch):
    data, address, reports = shards(tmp_path / "tars", 9, each=3), serve(), []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(data, "--endpoint", address, "--fields", "short") == 0
        reports.append(json.loads((tmp_path / "tars" / ("recaption.1.json" if rank else "recaption.json")).read_text()))
    assert [(report["captioned"], report["left"]) for report in reports] == [(5, 0), (4, 0)]
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    lines = [{"image": "0.jpg", "caption": text} for text in ("one image", "in two rows")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(tmp_path / "a.jsonl", "--endpoint", address, "--fields", "short") == 0
    report = json.loads((tmp_path / "recaption.json").read_text())
    assert (report["captioned"], report["left"]) == (1, 0)


def test_looking_first_a_dry_run_sends_and_writes_nothing_and_a_preview_is_a_picture(tmp_path, serve, capsys):
    data, address = shards(tmp_path / "tars", 6), serve()
    run(data, "--endpoint", address, "--dry-run", "--limit", 2, "--model", "tiny", "--dense", 2,
        "--body", '{"top_p": 0.5, "temperature": null}')
    out = capsys.readouterr().out
    bodies = [json.loads(body) for body in re.findall(r"^\{.*?^\}", out, re.M | re.S)]
    assert len(bodies) == 2 * (2 + 4) and {(b["model"], b["top_p"]) for b in bodies} == {("tiny", 0.5)}
    assert not any("temperature" in b for b in bodies)
    assert "characters>" in out and len(out) < 10_000 and not captioned(data) and stats(address).get("requests", 0) == 0
    assert run(data, "--endpoint", address, "--limit", 4, "--dense", 2, "--preview", tmp_path / "p.png") == 0
    assert len(captioned(data)) == 4 and min(Image.open(tmp_path / "p.png").size) > 200
    report = json.loads((tmp_path / "tars" / "recaption.json").read_text())
    assert (report["captioned"], report["left"]) == (4, 2)
    assert report["captions"] == {"short": 4, "long": 4, "dense": 4} and report["crops without a caption"] == 0
    assert report["words in a caption"]["short"] == 9 and report["sentences in a caption"]["dense"] == 4
    assert report["tokens written a second"] > 0 and report["seconds an image"] > 0


def test_scenes_go_from_pictures_to_captions_to_a_trained_model(tmp_path):
    assert run("scenes", "--engine", "scenes", "--out", tmp_path / "s", "--limit", 60, "--fields", "all",
               "--dense", 2) == 0
    rows = {r["key"]: r["captions"] for r in captioned(tmp_path)}
    scene = Scenes("train").scene(7)
    mine = rows["images/000007.png"]
    assert len(rows) == 60 and all(mine[name] == scene.captions[name] for name in ("raw", "background"))
    for part in mine["dense"]:
        x0, y0, x1, y1 = part["box"]
        inside = [o.name for o in scene.objects if x0 <= o.x < x1 and y0 <= o.y < y1]
        assert any(name in part["text"] for name in inside) or not inside
    flags = {"method": "dreamlip", "size": "nano", "data": str(tmp_path / "s" / "captions.jsonl"), "images": 64,
             "batch": 16, "workers": 0, "tokenizer": "scenes", "device": "cpu"}
    folder = train.train({**flags, "region_grouping": True, "out": str(tmp_path / "run")})
    assert (folder / "evaluation.json").exists()
    with pytest.raises(UserError, match="none of 64 samples .* recaption.py --dense 2"):
        train.train({**flags, "region_grouping": True, "out": str(tmp_path / "none"), "caption_fields": "long=long"})


def paced(tmp_path, serve, n):
    """n images of 60 KB, one question each, of an endpoint that answers in 50 ms and takes 64 at a time -> the report,
    and the client's memory in MB, second by second."""
    for i in range(50):
        noise = np.random.default_rng(i).integers(0, 255, (192, 256, 3), np.uint8)
        Image.fromarray(noise).resize((512, 384)).save(tmp_path / f"{i}.jpg", quality=60)
    lines = [{"key": f"{i:06}", "image": f"{i % 50}.jpg", "caption": "raw"} for i in range(n)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, HERE.parent / "recaption.py", tmp_path / "a.jsonl", "--fields", "short"]
    process = subprocess.Popen([*command, "--endpoint", serve("--delay", 0.05), "--in-flight", "64"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory = []
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        memory += [int(kb) / 1024 for kb in re.findall(r"RssAnon:\s+(\d+)", status)]
        time.sleep(1)
    assert process.returncode == 0 and len(captioned(tmp_path)) == n
    return json.loads((tmp_path / "recaption.json").read_text()), memory


@pytest.mark.slow
def test_100_000_images_are_asked_about_at_the_endpoints_pace_and_in_flat_memory(tmp_path, serve):
    report, memory = paced(tmp_path, serve, 100_000)
    rate, early = report["requests a second"], memory[len(memory) // 5]
    print(f"\n{rate} requests a second, {100 * rate / (64 / 0.05):.0f}% of what the endpoint can; "
          f"memory {early:.0f} MB after a fifth, {memory[-1]:.0f} MB at the end")
    assert report["captioned"] == 100_000 and memory[-1] - early < 64  # a key that is done takes 100 to 200 bytes


# ---- real servers and models -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("transformers")
    from tiny_vlm import make
    folder = tmp_path_factory.mktemp("tiny-vlm")
    make(folder)
    return str(folder)


def test_against_transformers_serve_over_http(tmp_path, model):
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--host", "127.0.0.1"]
    server = subprocess.Popen([*command, "--port", str(port)], env=os.environ | {"HF_HUB_OFFLINE": "1"},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(3000):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        data = shards(tmp_path / "tars", 8)
        assert run(data, "--endpoint", f"http://127.0.0.1:{port}", "--model", model, "--temperature", 1,
                   "--in-flight", 4, "--tries", 5) == 0
    finally:
        server.kill()
        server.wait()
    rows, report = captioned(data), json.loads((tmp_path / "tars" / "recaption.json").read_text())
    assert len(rows) == 8 and report["given up on"] == 0 and report["tokens written a second"] > 0
    assert all(r["model"] == model and len(r["captions"]["long"].split()) >= 3 for r in rows)


def test_a_local_model_captions_in_batches_on_every_process(tmp_path, model, monkeypatch):
    data = shards(tmp_path / "tars", 9)
    flags = (data, "--model", model, "--temperature", 1, "--batch", 4, "--tries", 5, "--fields", "short,style")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(*flags) == 0
    rows = captioned(data)
    assert sorted(r["key"] for r in rows) == [f"{i:04}" for i in range(9)]
    assert all(len(r["captions"]) == 3 for r in rows)
    report = json.loads((tmp_path / "tars" / "recaption.1.json").read_text())
    assert report["captioned"] == 4 and report["tokens read a second"] > 0
