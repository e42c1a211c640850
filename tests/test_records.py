"""Every published format is read alike, whatever is broken is counted, named and replaced and costs nothing else, the
index is kept whole or not at all, and the order of samples depends on nothing but the seed."""
import gzip
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import train
from data import (BadCount, BadSample, Records, TrainingSamples, UserError, add_member, collate,
                  load_tokenizer, open_dataset, read_captions, training_loader)
from test_data import decoded, encoded, settings

TOKENIZER = load_tokenizer("scenes")


# ---- files of samples ------------------------------------------------------------------------------------------------

PICTURES = []
for number in range(64):
    PICTURES.append(encoded(Image.new("RGB", (24, 20), (4 * number, 99, 255 - 4 * number)), "JPEG"))


def sample(i):
    """The members of a sample in a tar, as img2dataset writes them."""
    text = f"picture {i}"
    row = json.dumps({"caption": text, "url": f"https://a.b/{i}/x.jpg"})
    return {"jpg": PICTURES[i % 64], "json": row.encode(), "txt": text.encode()}


def shard(path, samples, format=tarfile.GNU_FORMAT):
    """Writes a tar of (key, {extension: bytes}) pairs."""
    with tarfile.open(path, "w", format=format) as tar:
        for key, members in samples:
            for extension, content in members.items():
                add_member(tar, f"{key}.{extension}", content)
    return path


def shards(folder, counts=(20, 20, 20)):
    """00000.tar ... with so many samples, numbered through: picture 0, picture 1 ..."""
    folder.mkdir()
    first = 0
    for n, count in enumerate(counts):
        shard(folder / f"{n:05}.tar", [(f"{i:04}", sample(i)) for i in range(first, first + count)])
        first += count
    return folder


def write(folder, rows, name="rows.jsonl"):
    """Writes JSON lines, or the lines as they are where they are texts already."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def row(i, caption=None):
    return {"image": f"{i}.jpg", "caption": caption or f"picture {i}"}


def rows(n):
    return [row(i) for i in range(n)]


def pictures(folder, n):
    """0.jpg, 1.jpg ..."""
    folder.mkdir(exist_ok=True)
    for i in range(n):
        (folder / f"{i}.jpg").write_bytes(PICTURES[i % 64])
    return folder


def keys(records):
    return [record.key for record in records]


def command(monkeypatch, *flags):
    """Runs data.py with these flags."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, flags), "--tokenizer", "scenes"])
    runpy.run_path(str(ROOT / "data.py"), run_name="__main__")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where the indices are kept."""
    monkeypatch.setenv("MINILIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- formats ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern", [
    "", "/{00000..00002}.tar", "/*.tar", "/0000[0-2].tar", "/000{0..0}{0..2}.tar"])
def test_shards_are_named_by_folder_braces_or_glob_and_read_in_order(tmp_path, pattern):
    records = Records(str(shards(tmp_path / "cc3m")) + pattern)
    assert len(records) == 60
    assert not records.bad
    for i, record in enumerate(records):
        assert (record.file.name, record.key, record.image) == (f"{i // 20:05}.tar", f"{i:04}", PICTURES[i])
        assert record.row["caption"] == f"picture {i}"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_any_kind_with_long_names_folders_and_odd_members_is_read(tmp_path, format):
    names = ["./000", "folder/001", "größer als hundert" * 20 + "/002"]
    path = shard(tmp_path / "a.tar", [(name, sample(i)) for i, name in enumerate(names)], format)
    with tarfile.open(path, "a", format=format) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        add_member(tar, ".DS_Store", b"")
        add_member(tar, "003.JPG", PICTURES[3])
        add_member(tar, "003.seg.png", b"a mask")
        add_member(tar, "003.txt", b"text")
    records = Records(path)
    assert keys(records) == ["000", *names[1:], "003"]
    assert [record.image for record in records] == PICTURES[:4]
    assert records[3].row == {"caption": "text"}
    assert not records.bad


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_dreamlips_csv_is_read_with_quotes_and_line_breaks_in_its_captions(tmp_path, newline):
    lines = ["Image Path,raw_caption,longSV_captions", '3.jpg,"raw, ""quoted""","SV ""one"".\nSV two."', ""]
    (tmp_path / "cc3m.csv").write_bytes(newline.join(lines).encode("utf-8-sig"))
    records = Records(tmp_path / "cc3m.csv", "images")
    captions = read_captions(records[0].row)
    assert not records.bad
    assert captions.raw == 'raw, "quoted"'
    assert [sentence.text for sentence in captions.long] == ['SV "one".', "SV two."]
    assert records[0].image == Path("images/3.jpg")


@pytest.mark.parametrize("name, content", [
    ("lotlip.csv", "url,caption\nhttps://a.b/c/7.jpg?x=1,A dog. It runs.\n"),
    ("tabs.tsv", "caption\tfilepath\nA dog. It runs.\t7.jpg\n"),
    ("bom.jsonl", '\ufeff{"image": "7.jpg", "caption": ["A dog.", "It runs."]}\n'),
    ("docci.jsonlines", '{"image_file": "7.jpg", "description": "A dog. It runs."}'),
    ("iiw.jsonl", '{"image/key": "7", "IIW": "A dog. It runs."}'),
    ("share.json", '[\n{"image": "7.jpg", "conversations": [{"from": "gpt", "value": "A dog. It runs."}]}]'),
    ("holistic.json", '{"image": "7.jpg", "caption": ["A dog.", "It runs."]}\n'),
    ("new.captions.jsonl", '{"key": "seven", "image": "7.jpg", "captions": {"long": "A dog. It runs."}}')])
def test_rows_name_their_image_by_url_or_path_under_any_of_the_usual_names(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    record, = Records(tmp_path / name)
    assert record.key in content
    assert record.image == tmp_path / "7.jpg"
    assert read_captions(record.row).long[-1].text == "It runs."


def test_a_folder_of_images_has_its_texts_beside_them(tmp_path):
    folder = pictures(tmp_path / "set", 1)
    pictures(folder / "sub", 2)
    (folder / "a.v2.JPEG").write_bytes(PICTURES[1])
    (folder / "a.v2.txt").write_text("text a")
    (folder / "sub/0.json").write_text('{"caption": ["c", "One. Two."]}')
    records = Records(folder)
    assert keys(records) == ["0", "a.v2", "sub/0", "sub/1"]
    assert [record.row.get("caption") for record in records] == [None, "text a", ["c", "One. Two."], None]
    assert records[1].image == folder / "a.v2.JPEG"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_caption_may_hold_any_character(tmp_path, name):
    captions = ["line\u2028separator", "next\x85line", "form\ffeed", "nul\0", "é 日本語 👍"]
    write(tmp_path, [row(0, caption) for caption in captions], "a.jsonl")
    write(tmp_path, ["image,caption", *[f'0.jpg,"{caption}"' for caption in captions]], "a.csv")
    records = Records(tmp_path / name)
    assert [record.row["caption"] for record in records] == captions
    assert not records.bad


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl"])
def test_a_folder_of_pictures_is_read_by_its_table(tmp_path, name):
    write(pictures(tmp_path, 2), [{"file_name": "1.jpg", "text": "one"}], name)
    record, = Records(tmp_path)
    assert record.image.read_bytes() == PICTURES[1]
    assert read_captions(record.row).raw == "one"


def test_an_array_is_read_up_to_where_it_is_damaged_and_that_is_counted(tmp_path):
    text = json.dumps(rows(200))
    (tmp_path / "torn.json").write_text(text.replace('"100.jpg"', '"100.jpg'))
    records = Records(tmp_path / "torn.json")
    assert [record.row for record in records] == rows(100)
    assert records.bad.counts == {"JSON does not parse": 1}


def test_compressed_lines_are_read_and_it_is_counted_where_they_are_cut_off(tmp_path):
    path = tmp_path / "llava.jsonl.gz"
    content = gzip.compress(b'{"key": "0007", "caption_llava": "One."}\n{"key": "0008"}\n{torn\n')
    path.write_bytes(content)
    records = Records(path, "images")
    assert [record.image for record in records] == [Path("images/0007.jpg"), Path("images/0008.jpg")]
    assert records.bad.counts == {"JSON does not parse": 1}
    path.write_bytes(content[:-20])
    with pytest.raises(UserError, match="1 × file cut off"):
        Records(path)


def parquet(path, rows):
    pytest.importorskip("pyarrow")
    from pyarrow import Table
    from pyarrow.parquet import write_table
    write_table(Table.from_pylist(rows), path)
    return path


def test_parquet_is_read_as_a_table(tmp_path):
    recap = {"url": "https://a.b/2.jpg", "re_caption": "One. Two.", "org_caption": "raw"}
    record, = Records(parquet(tmp_path / "recap.parquet", [recap]))
    assert record.row == recap
    assert record.image == tmp_path / "2.jpg"


def test_parquet_with_pictures_becomes_shards(tmp_path, monkeypatch):
    rows = [{"image": {"bytes": picture, "path": None}, "caption": [f"raw {i}", "One."]}
            for i, picture in enumerate(PICTURES)]
    path = parquet(tmp_path / "llava.parquet", rows)
    with pytest.raises(UserError, match="llava.parquet FOLDER"):
        Records(path)
    command(monkeypatch, "--shards", path, tmp_path / "shards")
    with pytest.raises(SystemExit, match="shards is not empty"):
        command(monkeypatch, "--shards", path, tmp_path / "shards")
    records = Records(tmp_path / "shards")
    assert [record.image for record in records] == PICTURES
    assert records[63].row == {"caption": ["raw 63", "One."]}


def test_without_pyarrow_parquet_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="a.parquet is Parquet.*pip install pyarrow$"):
        Records(write(tmp_path, [], "a.parquet"))


# ---- captions of other files -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"key": "0004", "url": "https://a.b/5/x.jpg", "long": "five"}'),
    ("a.csv", "Image Path,caption,longSV_captions\nhttps://a.b/5/x.jpg,alt,five"),
    ("lotlip.csv", "url,caption\nhttps://a.b/5/x.jpg,five"),
    ("a.json", '[{"key": "0005", "long": "five", "seen": "https://a.b"}, {"key": "0009", "long": "nine"}]'),
    ("a.tsv", "path\tlong\na/0005.png\tfive\na/0001.png\tone\nb/0001.png\tone")])
def test_captions_are_joined_by_url_or_else_by_key_or_by_a_file_name_that_comes_once(
        tmp_path, monkeypatch, capsys, name, content):
    cc3m = shards(tmp_path / "cc3m", (4, 4))
    (tmp_path / name).write_text(content)
    flags = "--join", tmp_path / name, cc3m, "--caption-fields", "long=caption" if name == "lotlip.csv" else ""
    command(monkeypatch, *flags)
    assert "1 of 8 samples" in capsys.readouterr().out
    captions = [read_captions(record.row) for record in Records(cc3m)]
    expected = [[f"picture {i}"] for i in range(8)]
    assert [[c.raw] for c in captions] == expected
    expected[5] = ["five"]
    assert [[sentence.text for sentence in c.long] for c in captions] == expected
    with pytest.raises(SystemExit, match="00001.captions.jsonl exists: move it away"):
        command(monkeypatch, *flags)


@pytest.mark.parametrize("flags, content, named", [
    ("--join gone.csv cc3m", "", "no file gone.csv"),
    ("--join a.csv cc3m", "link,long\n0,One.", r"no images .*1 × no image named: a.csv.* under one of image, "),
    ("--join a.csv cc3m", "url,caption\nhttps://a.b/6/x.jpg,One.", "check --caption-fields"),
    ("--join a.csv cc3m", "url,key,long\nhttps://a.b/9/x.jpg,0005,One.", "none of 1 rows in a.csv"),
    ("--look scenes", "", "python scenes.py --write"),
    ("--look cc3m --sheet gone/a.html", "", "a folder that exists")])
def test_a_mistake_is_refused_in_one_sentence(tmp_path, monkeypatch, flags, content, named):
    shards(tmp_path / "cc3m", (8,))
    (tmp_path / "a.csv").write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: .*{named}") as caught:
        command(monkeypatch, *flags.split())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cc3m/*.jsonl"))


# ---- sidecars of new captions ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("data, sidecar", [
    ("shards/00000.tar", "shards/00000.captions.jsonl"),
    ("rows.jsonl", "rows.captions.jsonl"),
    ("*.jsonl", "rows.captions.jsonl"),
    ("v1.5", "v1.5.captions.jsonl")])
def test_new_captions_in_a_sidecar_are_joined_by_key(tmp_path, data, sidecar):
    shards(tmp_path / "shards", (3,))
    write(tmp_path, rows(3))
    pictures(tmp_path / "v1.5", 3)
    one, two, _ = keys(Records(tmp_path / data))
    write(tmp_path, [
        {"key": two, "captions": {"short": "s", "long": "L."}},
        {"key": one, "captions": {"short": "s"}},
        {"key": "of no sample", "captions": {"short": "x"}},
        {"key": two, "captions": {"short": "later"}},
        {"key": two, "captions": 5},
        '{"key": "torn'], sidecar)
    records = Records(tmp_path / data)
    found = [record.row.get("captions", {}) for record in records]
    assert found == [{"short": "s"}, {"short": "later", "long": "L."}, {}]
    assert records.bad.report() == f"1 × JSON does not parse: {Path(sidecar).name} line 6"


# ---- mistakes of the user --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data, named", [
    ("gone.tar", "gone.tar"),
    ("f/{00001..00009}.tar", "00003.tar"),
    ("f/*.csv", r"\*.csv"),
    ("f/x.xyz", "x.xyz"),
    ("f/0000[01].tar f/x.xyz", "x.xyz"),
    ("f/{00000.tar,a.jsonl}", "one format"),
    ("empty", "empty"),
    ("f/a.jsonl", "no image named: a.jsonl line 1"),
    ("f/gone.csv", "image missing: gone.csv: gone.jpg")])
def test_data_that_is_not_there_or_not_known_ends_in_one_sentence(tmp_path, monkeypatch, data, named):
    folder = shards(tmp_path / "f")
    write(folder, [], "x.xyz")
    write(folder, ["{}"], "a.jsonl")
    write(folder, ["image,caption", *["gone.jpg,x"] * 99], "gone.csv")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named) as caught:
        open_dataset(data.split(), "train", 0, 16, 0)
    assert "--data" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_that_no_sample_has_is_named_beside_those_there_are(tmp_path):
    path = write(pictures(tmp_path, 9), rows(9))
    with pytest.raises(UserError, match="none of 200 samples has a field gpt_captio; they have caption, image"):
        open_dataset(path, "train", 0, 16, 0, caption_fields="long=gpt_captio")


# ---- bad data --------------------------------------------------------------------------------------------------------

FAULTS = [
    ("image will not decode", {"jpg": PICTURES[0][:-300], "txt": b"x"}),
    ("image too large", {"png": encoded(Image.new("1", (20_000, 20_000)), "PNG"), "txt": b"x"}),
    ("no image", {"txt": b"x"}),
    ("no caption", {"jpg": PICTURES[0]}),
    ("no caption", {"jpg": PICTURES[0], "txt": b" \n"}),
    ("JSON does not parse", {"jpg": PICTURES[0], "json": b'{"caption": ', "txt": b"x"})]


def test_every_fault_in_a_tar_costs_its_own_sample_and_is_counted_by_reason_and_named(tmp_path):
    samples = [("latin", {"jpg": PICTURES[1], "txt": "Straße".encode("latin-1")})]
    for i, (_, members) in enumerate(FAULTS):
        samples += [(f"good{i}", sample(i)), (f"bad{i}", members)]
    dataset = open_dataset(str(shard(tmp_path / "a.tar", samples)), "all", 0, 16, 0)
    captions = []
    for i in range(len(dataset)):
        try:
            captions.append(dataset[i][1].raw)
        except BadSample as problem:
            dataset.bad.add(problem)
            assert "a.tar" in problem.detail and "bad" in problem.detail
    assert dataset.bad.counts == Counter(reason for reason, _ in FAULTS)
    assert captions == ["Stra\ufffde", *(f"picture {i}" for i in range(len(FAULTS)))]


@pytest.mark.parametrize("line", [
    "{not json", '"text"', "[1]", "7", "null", '{"caption": "no image"}', '{"image": null, "caption": "x"}',
    '{"image": 5, "caption": "x"}', '{"image": ["0.jpg"], "caption": "x"}', '{"image": " ", "caption": "x"}',
    "[" * 9999])
def test_a_line_that_cannot_be_used_is_left_out_counted_and_named(tmp_path, line):
    records = Records(write(tmp_path, [line, *rows(3)]))
    assert keys(records) == ["0.jpg", "1.jpg", "2.jpg"]
    assert (records.bad.total, records.bad.seen) == (1, 4)
    assert "rows.jsonl line 1" in records.bad.report()


@pytest.mark.parametrize("image", [
    "gone.jpg", "https://a.b/c/gone.jpg?d=e", "a\0b.jpg", "../", "x" * 5000, "\ud800.jpg"], ids=ascii)
def test_a_picture_that_cannot_be_read_is_a_bad_sample_that_is_named(tmp_path, image):
    line = json.dumps({"image": image, "caption": "x"})
    path = write(pictures(tmp_path, 1), [row(0), line])
    dataset = open_dataset(path, "all", 0, 16, 0)
    with pytest.raises(BadSample, match="rows.jsonl") as caught:
        dataset[1]
    assert image[:9] in caught.value.detail
    assert caught.value.reason == ("image missing" if "gone" in image else "image will not decode")


def test_a_csv_row_with_a_quote_that_never_closes_costs_the_rows_up_to_the_next_quote(tmp_path):
    lines = [f'{i}.jpg,"a caption, of {i}"' for i in range(2000)]
    lines[5] = '5.jpg,"a caption, of 5'
    lines[700] = "700.jpg,one,too many"
    lines[900] = f'900.jpg,"{"x" * 200_000}"'
    records = Records(write(tmp_path, ["image,caption", *lines], "a.csv"))
    assert keys(records) == [f"{i}.jpg" for i in range(2000) if i not in (5, 6, 700, 900)]
    assert records.bad.report() == "3 × row does not parse: a.csv line 6"


def test_pictures_of_one_name_keep_their_captions_apart(tmp_path):
    folder = pictures(tmp_path / "set", 3)
    shutil.copy(folder / "0.jpg", folder / "1.png")
    assert keys(Records(folder)) == ["0", "1.jpg", "1.png", "2"]


def test_a_linked_folder_of_pictures_is_looked_into(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/cats").symlink_to(pictures(tmp_path / "real", 1))
    (tmp_path / "real/back").symlink_to(tmp_path / "real")
    assert keys(Records(tmp_path / "set")) == ["cats/0"]


def test_a_file_that_changes_under_way_gives_no_sample_anothers_caption(tmp_path):
    path = Path(write(tmp_path, rows(20)))
    records = Records(path)
    records[3]
    content = path.read_text().splitlines(keepends=True)
    path.write_text("".join(content[9::-1] + content[10:]))
    with pytest.raises(BadSample, match="file has changed"):
        records[3]


def damaged(content, n):
    """n damaged copies of a file's content: (copy, where the damage begins, where it ends: at infinity if what follows
    moves or is gone)."""
    pick = random.Random(0)
    for _ in range(n):
        start = pick.randrange(len(content))
        stop = start + pick.choice((1, 3, 30, 512, 700))
        yield content[:start] + pick.randbytes(stop - start) + content[stop:], start, stop
        yield content[:start] + content[stop:], start, math.inf
        yield content[:start], start, math.inf


def test_a_damaged_tar_is_read_where_it_is_whole_and_counted_where_it_is_not(tmp_path):
    path = shard(tmp_path / "a.tar", [(f"{i:04}", sample(i)) for i in range(8)])
    with tarfile.open(path) as tar:
        firsts = [member.offset for member in tar if member.name.endswith("jpg")]
        lasts = [*firsts[1:], tar.offset]
    counted = Counter()
    for content, start, stop in damaged(path.read_bytes(), 80):
        path.write_bytes(content)
        try:
            records = Records(path)
        except UserError:  # not one is left
            assert start < lasts[0]
            continue
        readable = {}
        for i in range(len(records)):
            with suppress(BadSample):
                readable[records[i].key] = records[i].image
        for i, (first, last) in enumerate(zip(firsts, lasts)):
            if last <= start or first >= stop:
                assert readable.get(f"{i:04}") == PICTURES[i], (start, stop)
        assert records.bad or len(records) >= 8
        counted.update(records.bad.counts)
    assert len(counted) == 3


# ---- the index -------------------------------------------------------------------------------------------------------

def made(cache):
    """When it was made."""
    return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


def test_an_index_is_made_once_and_anew_when_its_file_has_changed(tmp_path, cache):
    folder = shards(tmp_path / "a")
    os.truncate(folder / "00002.tar", 20_000)
    bad = Records(folder).bad
    before = made(cache)
    assert bad.total == 1
    assert Records(folder).bad.report() == bad.report()
    assert made(cache) == before
    shard(folder / "00003.tar", [("new", sample(3))])
    assert keys(Records(folder))[-1] == "new"
    assert before.items() < made(cache).items()  # only the new file was read
    shard(folder / "00003.tar", [("changed", sample(5))])
    *_, last = Records(folder)
    assert (last.key, last.image) == ("changed", PICTURES[5])


def test_of_several_processes_one_looks_through_a_file(tmp_path, cache, monkeypatch):
    scan = data.scan

    def counted(file, source):
        with open(tmp_path / "scanned", "a") as scanned:
            scanned.write(f"{file.name}\n")
        time.sleep(0.2)
        return scan(file, source)

    monkeypatch.setattr(data, "scan", counted)
    folder = shards(tmp_path / "a")
    ranks = [multiprocessing.get_context("fork").Process(target=Records, args=(folder,)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert (tmp_path / "scanned").read_text().splitlines() == [file.name for file in sorted(folder.glob("*.tar"))]


@pytest.mark.parametrize("length", [0, 100, 1000])
def test_an_index_that_is_not_whole_is_made_anew(tmp_path, cache, length):
    folder = shards(tmp_path / "a", (5,))
    Records(folder)
    for path in cache.iterdir():
        os.truncate(path, length)
    assert keys(Records(folder)) == [f"{i:04}" for i in range(5)]


def test_an_index_is_kept_whole_or_not_at_all_and_none_is_no_error_but_for_a_table(tmp_path, cache, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    folder = shards(tmp_path / "a")
    monkeypatch.setattr(os, "replace", fail)
    assert len(Records(folder)) == 60
    assert not list(cache.glob("*.pt*"))
    with pytest.raises(UserError, match="rows.csv cannot be copied as JSON lines.*set MINILIP_CACHE"):
        Records(write(tmp_path, [], "rows.csv"))
    monkeypatch.setenv("MINILIP_CACHE", str(folder / "00000.tar"))
    assert len(Records(folder)) == 60


# ---- training and validation, order ----------------------------------------------------------------------------------

def texts(dataset):
    return [dataset[i][1].raw for i in range(len(dataset))]


def test_training_and_validation_share_no_picture_and_lose_none_in_any_order_of_the_file(tmp_path):
    path = write(pictures(tmp_path, 60), rows(60))
    backwards = write(tmp_path, rows(60)[::-1], "backwards.jsonl")
    training = texts(open_dataset(path, "train", 0, 16, 0))
    held_out = texts(open_dataset(backwards, "test", 0, 16, 0))
    assert 0 < len(held_out) < 20
    assert sorted(training + held_out) == sorted(row["caption"] for row in rows(60))


def stream(dataset, batch=8, last=12, first=0, rank=0, world=1, **flags):
    """The numbers of the pictures in each step's local batch."""
    s = settings("clip", batch=batch, workers=0, **flags)
    steps = []
    for found in training_loader(dataset, TOKENIZER, s, first, last, rank, world):
        captions = [decoded(TOKENIZER, row[0]) for row in found.tokens]
        steps.append([int(caption.replace(" ", "").removeprefix("picture")) for caption in captions])
    return steps


def epoch(dataset, number=0, **flags):
    """The numbers of the pictures in an epoch."""
    n = len(dataset)
    return sum(stream(dataset, 1, (number + 1) * n, number * n, **flags), [])


@pytest.fixture(params=["rows", "shards", "several sets"])
def dataset(request, tmp_path):
    """About 54 pictures for training, of 60."""
    folder = shards(tmp_path / "a")
    data = {"rows": write(pictures(tmp_path, 60), rows(60)), "shards": str(folder),
            "several sets": [f"{folder}/0000[01].tar", f"{folder}/00002.tar"]}
    return open_dataset(data[request.param], "train", 0, 16, 0)


def test_every_picture_comes_once_an_epoch_and_epochs_and_seeds_are_shuffled_anew(dataset):
    orders = [epoch(dataset), epoch(dataset, 1), epoch(dataset, seed=1), epoch(dataset, 1, seed=1)]
    for order in orders:
        assert len(set(order)) == len(dataset)
        assert sorted(order) == sorted(orders[0])
        assert orders.count(order) == 1
    assert epoch(dataset) == orders[0]


@pytest.mark.parametrize("batch, world", [(8, 2), (12, 4), (64, 2)])
def test_ranks_share_out_the_global_order_and_any_start_is_its_tail(dataset, batch, world):
    order = stream(dataset, batch, 8)
    ranks = [stream(dataset, batch, 8, rank=rank, world=world) for rank in range(world)]
    for step, *parts in zip(order, *ranks, strict=True):
        assert step == sum(parts, [])
    for first in (1, 7):
        assert stream(dataset, batch, 8, first) == order[first:]
        assert stream(dataset, batch, 8, first, 1, world) == ranks[1][first:]


def test_several_sets_are_mixed_evenly(tmp_path):
    shards(tmp_path / "a", (60, 61, 50))
    dataset = open_dataset([f"{tmp_path}/a/0000[01].tar", f"{tmp_path}/a/00002.tar"], "train", 0, 16, 0)
    order = np.array(epoch(dataset))
    places = np.flatnonzero(order >= 121) / len(order)  # those of the second set
    even = np.linspace(0, 1, len(places))
    assert np.abs(places - even).max() < 0.1


def test_shards_are_read_few_at_a_time_so_that_what_is_read_before_long_lies_together(tmp_path):
    dataset = open_dataset(str(shards(tmp_path / "a", (20,) * 30)), "train", 0, 16, 0)
    files = np.array(epoch(dataset, shuffle_buffer=40)) // 20
    for start in range(0, len(files), 40):
        assert 1 < len(np.unique(files[start:start + 40])) <= 16


# ---- batches ---------------------------------------------------------------------------------------------------------

def test_batches_are_identical_whatever_the_number_of_workers(tmp_path):
    folder = shards(tmp_path / "shards")
    shard(folder / "00003.tar", [(f"bad{i}", {"jpg": b"", "txt": b"x"}) for i in range(8)])
    dataset = open_dataset([str(folder), "scenes"], "train", 40, 32, 12)
    runs = []
    for workers in (0, 2):
        s = settings(batch=8, shuffle_buffer=16, workers=workers)
        runs.append(list(training_loader(dataset, TOKENIZER, s, 2, 14)))
    for expected, batch in zip(*runs, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.tokens, expected.tokens)
        assert len(batch.bad) == len(expected.bad)
    assert any(batch.bad for batch in runs[0])


def test_a_batch_is_cut_to_its_longest_text_and_knows_the_length_of_each():
    samples = TrainingSamples(open_dataset("scenes", "train", 40, 32, 12), TOKENIZER, settings())
    batch = collate([samples[0, i] for i in range(8)])
    ends = (batch.tokens == TOKENIZER.eot).nonzero()[:, 2]
    assert (ends + 1).tolist() == batch.lengths.flatten().tolist()
    assert batch.tokens.shape == (8, 3, batch.lengths.max())


def test_a_bad_sample_is_counted_and_replaced_by_one_drawn_from_seed_epoch_and_index(tmp_path):
    lines = rows(60) + [row(i, "bad") for i in range(60, 120)]
    dataset = open_dataset(write(pictures(tmp_path, 60), lines), "train", 0, 16, 0)
    captions = []
    for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1)):
        samples = TrainingSamples(dataset, TOKENIZER, settings("clip", seed=seed))
        drawn = [samples[epoch, i] for i in range(len(dataset))]
        captions.append([decoded(TOKENIZER, tokens[0]) for _, tokens, _, _ in drawn])
        bad = [found for *_, found in drawn]
        assert {problem.reason for problem in sum(bad, [])} == {"image missing"}
    replaced = np.array(list(map(bool, bad)))  # the same each time
    first, again, *others = np.array(captions)
    assert 30 < replaced.sum() < 90
    assert "bad" not in first
    assert (first == again).all()
    for other in others:
        assert (first == other)[~replaced].all()
        assert (first == other)[replaced].mean() < 0.2


def test_where_all_files_shrink_or_vanish_under_way_the_run_ends_in_one_sentence(tmp_path):
    folder = shards(tmp_path / "a", (200, 200))
    dataset = open_dataset(str(folder), "train", 0, 64, 0)
    os.truncate(folder / "00000.tar", 0)
    os.truncate(folder / "00001.tar", 0)
    with pytest.raises(UserError, match="bad.*(file cut off|file cannot be read)") as caught:
        stream(dataset, last=100)
    assert "\n" not in str(caught.value)


def test_over_the_limit_of_bad_samples_the_run_is_told_to_stop_in_one_sentence():
    bad = BadCount({"image missing": "1.jpg"}, {"image missing": 30})
    bad.seen = 199  # too few to judge by
    bad.check(0.05)
    bad.seen = 600  # 5% exactly
    bad.check(0.05)
    bad.seen = 599
    with pytest.raises(UserError, match="^30 of 599 samples are bad, over --max-bad.*30 × image missing: 1.jpg"):
        bad.check(0.05)


def test_the_death_of_a_worker_ends_in_one_sentence():
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does for want of memory

    dataset = open_dataset("scenes", "train", 40, 32, 12)
    with pytest.raises(UserError, match="a data-loading process died") as caught:
        list(training_loader(dataset, die, settings("clip", batch=4, workers=2), 0, 20))
    assert "\n" not in str(caught.value)


def test_a_worker_leaves_sigterm_to_the_main_process():
    """torchrun sends it to the whole group; the main process then still wants its batch, and saves."""
    texts = open_dataset("scenes", "train", 40, 32, 12)
    batches = training_loader(texts, TOKENIZER, settings("clip", batch=4, workers=1), 0, 20)
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
    assert len(list(batches)) == 19


def test_no_worker_outlives_a_killed_main_process():
    """It would keep the lock of the run's folder, connections, and memory."""
    code = """if True:
        import multiprocessing, os, time, data
        def work():
            data.begin_worker(0)
            print("ready", flush=True)
            time.sleep(5)
            print("alive", flush=True)
        multiprocessing.get_context("fork").Process(target=work).start()
        time.sleep(60)"""
    main = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert main.stdout.readline() == b"ready\n"
    main.kill()
    assert main.stdout.read() == b""


# ---- from the command line -------------------------------------------------------------------------------------------

def test_a_set_that_is_bad_by_its_index_alone_is_refused_before_training(tmp_path):
    path = write(pictures(tmp_path, 300), [*rows(300), *["{torn"] * 20])
    with pytest.raises(UserError, match="20 of 320 samples are bad, over --max-bad 0.05"):
        train.train({"size": "nano", "method": "clip", "tokenizer": "scenes", "device": "cpu", "data": path,
                     "out": str(tmp_path / "run")})


@pytest.mark.parametrize("flags, images", [({}, 100 * 16), ({"images": 50_000}, 50_000)])
def test_no_picture_of_ones_own_is_seen_over_100_times_unless_images_is_given(tmp_path, flags, images):
    path = write(pictures(tmp_path, 20), rows(20))  # 4 are held out by their hash
    s = train.resolve({"size": "nano", "batch": 16, "device": "cpu", "data": path, **flags})
    train.open_data(s, flags)
    assert s.images == images
    assert s.tokenizer in ("clip", "scenes")  # what "auto" has come to: the run keeps it


def test_a_look_prints_counts_bad_samples_and_lengths_and_writes_a_page(tmp_path, monkeypatch, capsys):
    folder = shards(tmp_path / "a", (10,))
    shard(folder / "00001.tar", [
        ("x", {"jpg": b"", "txt": b"x"}),
        ("y", {"txt": b"y"}),
        ("z", {"jpg": PICTURES[0], "txt": b"z", "json": rb'{"long": "<1> \ud800 & 2. Three."}'})])
    (folder / "00001_stats.json").write_text('{"count": 3}')  # img2dataset leaves it beside a shard
    command(monkeypatch, "--look", folder, "--sheet", tmp_path / "sheet.html")
    printed = capsys.readouterr().out
    for line in (
            "files 2, samples 12; left out: 1 × no image: 00001.tar y with",
            "12 looked at, 1 bad: 1 × image will not decode",
            "raw: 11, tokens: median",
            "long: 12,",
            "fields: {'caption': 12, 'url': 10, 'long': 1}\n"):
        assert line in printed
    page = (tmp_path / "sheet.html").read_text("utf-8")
    assert page.count("<img") == 11
    assert "long: &lt;1&gt; ? &amp; 2. | Three." in page
