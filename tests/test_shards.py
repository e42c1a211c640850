"""Real data: every published format is read alike, whatever is broken is counted and costs nothing else, the order is a
function of the seed, and the index is small, shared, and made once."""
import csv
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from data import (BadSample, Order, Pictures, Records, UserError, captions_path, expand, load_tokenizer, local_batches,
                  open_dataset, read_captions, read_fields, shard_order, training_loader)

ROOT = Path(__file__).resolve().parent.parent


def jpeg(i=0, size=(24, 20), **options):
    file = io.BytesIO()
    colour = [int(x) for x in np.random.default_rng(i).integers(0, 256, 3)]
    Image.new("RGB", size, tuple(colour)).save(file, "JPEG", **options)
    return file.getvalue()


PICTURE = [jpeg(i) for i in range(64)]


def shard(path, samples, format=tarfile.GNU_FORMAT):
    """Writes a tar of {key: {extension: bytes}}."""
    with tarfile.open(path, "w", format=format) as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def sample(i):
    return {"jpg": PICTURE[i % 64], "json": json.dumps({"caption": f"picture {i}", "width": 24}).encode(),
            "txt": f"picture {i}".encode()}


def shards(folder, counts=(20, 20, 20)):
    """00000.tar ... with so many samples, as img2dataset names them."""
    folder.mkdir(exist_ok=True)
    for n, count in enumerate(counts):
        shard(folder / f"{n:05}.tar", {f"{n:05}{i:04}": sample(100 * n + i) for i in range(count)})
    return folder


def read_all(records):
    """-> {key: Record} of what can be read, and the BadSamples."""
    good, bad = {}, []
    for i in range(len(records)):
        try:
            good[records[i].key] = records[i]
        except BadSample as error:
            bad.append(error)
    return good, bad


# ---- formats ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern", ["", "/{00000..00002}.tar", "/*.tar", "/{00000,00001,00002}.tar", "/0000[0-2].tar"])
def test_shards_are_named_by_folder_braces_or_glob_and_read_in_order(tmp_path, pattern):
    records = Records(str(shards(tmp_path / "cc3m")) + pattern)
    assert [file.name for file in records.files] == ["00000.tar", "00001.tar", "00002.tar"] and len(records) == 60
    assert [record.key for record in records] == [f"{n:05}{i:04}" for n in range(3) for i in range(20)]
    assert [records.file_of(i) for i in (0, 19, 20, 59)] == [0, 0, 1, 2] and not records.bad
    assert all(record.image == PICTURE[(100 * (i // 20) + i % 20) % 64] for i, record in enumerate(records))
    assert read_captions(records[41].row).raw == "picture 201"


def test_braces_expand_as_a_shell_expands_them():
    for pattern in ("{000..012}", "a{8..11}b{x,y}", "{00000..00003}.tar", "plain", "{7..7}"):
        shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True).stdout.split()
        assert expand(pattern) == shell


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_any_kind_of_tar_with_long_names_folders_and_odd_members_is_read(tmp_path, format):
    words, times = ("a long folder name", 8) if format == tarfile.USTAR_FORMAT else ("größer als hundert", 20)
    long = "/".join([words] * times)
    keys = ["000", "./001", "folder/002", f"{long}/003", "folder/004", "005"]
    path = shard(tmp_path / "a.tar", {key: sample(i) for i, key in enumerate(keys)}, format)
    with tarfile.open(path, "a", format=format) as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), (".DS_Store", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "000.jpg"
            tar.addfile(member)
        for name in ("006.JPG", "006.seg.png", "006.cls", "006.txt"):
            content = PICTURE[6] if name == "006.JPG" else b"text"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    records = Records(str(path))
    assert [record.key for record in records] == ["000", "001", "folder/002", f"{long}/003", "folder/004", "005", "006"]
    assert [record.image for record in records] == PICTURE[:7] and not records.bad
    assert records[6].row == {"caption": "text"}


DREAMLIP = ["Image Path", "raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions", "longSV_captions",
            "shortLLA_captions", "longLLA_captions"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_dreamlips_csv_gives_the_short_captions_and_sentences_of_all_its_models(tmp_path, newline):
    (tmp_path / "images").mkdir()
    rows = [[f"{i}.jpg", f'raw, "quoted" {i}', "IB short.", "IB one. IB two.", "SV short.",
             'SV "one".\nSV two.', "", "é."]
            for i in range(5)]
    with open(tmp_path / "cc3m.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, lineterminator=newline).writerows([DREAMLIP, *rows])
    for i in range(5):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(PICTURE[i])
    records = Records(str(tmp_path / "cc3m.csv"), str(tmp_path / "images"))
    assert [record.key for record in records] == [row[0] for row in rows] and not records.bad
    captions = read_captions(records[3].row)
    assert captions.raw == 'raw, "quoted" 3' and captions.short == ["SV short.", "IB short."]
    assert captions.long == ['SV "one".', "SV two.", "IB one.", "IB two.", "é."]
    assert Pictures(records, 16)[3][0].shape == (3, 16, 16)
    beside = Records(str(tmp_path / "cc3m.csv"))  # without a root the images are looked for beside the file
    assert beside[0].image == tmp_path / "0.jpg"


def test_a_csv_of_urls_and_long_captions_names_the_file_of_the_url(tmp_path):
    (tmp_path / "lotlip.csv").write_text("url,caption\nhttps://a.b/c/7.jpg?x=1,A dog. It runs.\n")
    record, = Records(str(tmp_path / "lotlip.csv"))
    assert record.image == tmp_path / "7.jpg" and record.key == "https://a.b/c/7.jpg?x=1"
    assert read_captions(record.row).long == ["A dog.", "It runs."]
    (tmp_path / "tabs.tsv").write_text('caption\tfilepath\nA dog, "here".\t7.jpg\n')
    record, = Records(str(tmp_path / "tabs.tsv"))
    assert (record.key, record.row["caption"]) == ("7.jpg", 'A dog, "here".')


def test_holistic_clips_lines_give_its_m_texts(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a/b.jpg", "caption": ["raw", "in detail", "a few words"]}))
    record, = Records(str(tmp_path / "a.jsonl"))
    assert record.image == tmp_path / "a/b.jpg"
    assert read_captions(record.row).perspectives == ["raw", "in detail", "a few words"]


def test_a_folder_of_images_has_its_texts_beside_them(tmp_path):
    (tmp_path / "set" / "sub").mkdir(parents=True)
    for i, name in enumerate(("b.jpg", "a.v2.JPEG", "sub/c.png", "sub/none.jpg")):
        (tmp_path / "set" / name).write_bytes(PICTURE[i])
    (tmp_path / "set/b.txt").write_text("text b")
    (tmp_path / "set/a.v2.txt").write_text("text a")
    (tmp_path / "set/sub/c.json").write_text('{"caption": ["c", "One. Two."]}')
    records = Records(str(tmp_path / "set"))
    assert [record.key for record in records] == ["a.v2", "b", "sub/c", "sub/none"]
    assert [read_captions(records[i].row).raw for i in range(3)] == ["text a", "text b", "c"] and records[3].row == {}
    assert records.files == [tmp_path / "set"] and records[1].image == tmp_path / "set/b.jpg"


def test_the_fields_of_img2dataset_may_be_a_string_or_a_list_and_are_named_by_a_flag(tmp_path, capsys):
    row = {"caption": "alt text", "title": "title", "longSV_captions": ["One.", "Two. Three."], "extra": "Extra one.",
           "shortIB_captions": ["Short", "caption."]}
    shard(tmp_path / "a.tar", {"0": {"jpg": PICTURE[0], "json": json.dumps(row).encode()}})
    record, = Records(str(tmp_path / "a.tar"))
    captions = read_captions(record.row)
    assert (captions.raw, captions.short, captions.long) == ("alt text", ["Short caption."], ["One.", "Two.", "Three."])
    captions = read_captions(record.row, read_fields("raw=title,long=extra+longSV_captions,details=extra"))
    assert (captions.raw, captions.long[0], captions.perspectives) == ("title", "Extra one.", ["title", "Extra one."])
    Pictures(Records(str(tmp_path / "a.tar")), 16, "train", fields=read_fields("raw=title,long=extra+gone,short=lost"))
    assert capsys.readouterr().out.endswith("a.tar has gone or lost\n")  # mistyped, most likely: said, once
    for wrong in ("rwa=title", "raw=", "raw"):
        with pytest.raises(UserError, match="--caption-fields"):
            read_fields(wrong)


@pytest.mark.parametrize("kind", ["tar", "csv", "jsonl", "folder"])
def test_new_captions_in_a_sidecar_are_joined_by_key_over_the_files_own(tmp_path, kind):
    if kind == "tar":
        keys = [f"{i:04}" for i in range(4)]
        path = shard(tmp_path / "00000.tar", {key: sample(i) for i, key in enumerate(keys)})
        assert captions_path(path) == tmp_path / "00000.captions.jsonl"
    elif kind == "folder":
        path, keys = tmp_path / "v1.5", [str(i) for i in range(4)]
        path.mkdir()
        for key in keys:
            (path / f"{key}.jpg").write_bytes(PICTURE[0])
            (path / f"{key}.txt").write_text(f"picture {key}")
        assert captions_path(path) == tmp_path / "v1.5.captions.jsonl"
    else:
        path, keys = tmp_path / f"a.{kind}", [f"{i}.jpg" for i in range(4)]
        lines = [f"{key},picture {i}" for i, key in enumerate(keys)] if kind == "csv" else [
            json.dumps({"image": key, "caption": f"picture {i}"}) for i, key in enumerate(keys)]
        path.write_text("\n".join(["image,caption"] * (kind == "csv") + lines))
        assert captions_path(path) == tmp_path / "a.captions.jsonl"
    new = [{"key": keys[i], "image": [24, 20], "captions": {"short": f"new {i}", "long": "One. Two."}}
           for i in (3, 0, 1)]
    new += [{"key": "of no sample", "captions": {"short": "x"}}, {"key": keys[0], "captions": {"style": "later"}},
            {"key": keys[1], "captions": {"short": "later"}}, {"key": keys[1], "captions": 5}]
    captions_path(path).write_text("".join(json.dumps(line) + "\n" for line in new) + '{"key": "%s", "capt' % keys[2])
    records = Records(str(path))
    captions = [read_captions(record.row) for record in records]
    assert [c.short for c in captions] == [["new 0"], ["later"], [], ["new 3"]] and captions[0].long == ["One.", "Two."]
    assert [c.raw for c in captions] == [f"picture {i}" for i in range(4)]
    assert captions[0].perspectives == ["picture 0", "later"] and captions[1].long == ["One.", "Two."]
    assert records.bad.counts == {"last line torn": 1} and records.bad.seen == 4


def test_a_file_of_new_captions_that_name_images_is_also_data_by_itself(tmp_path):
    lines = [{"key": f"k{i}", "image": f"{9 - i}.jpg", "captions": {"raw": f"r{i}", "short": f"s{i}"}}
             for i in range(3)]
    (tmp_path / "a.captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {record.key: record for record in Records(str(tmp_path / "a.captions.jsonl"))}
    assert sorted(found) == ["k0", "k1", "k2"] and found["k1"].image == tmp_path / "8.jpg"
    assert read_captions(found["k2"].row).short == ["s2"]


@pytest.mark.parametrize("make, named", [
    (lambda f: "gone.tar", "gone.tar"), (lambda f: f"{f}/{{00001..00009}}.tar", r"00003.tar \(nor 6 more\)"),
    (lambda f: f"{f}/*.csv", r"\*.csv"), (lambda f: f"{f}/0000[01].tar {f}/x.parquet", "x.parquet"),
    (lambda f: f"{f}/x.parquet", "x.parquet"), (lambda f: f"{f}/{{00000.tar,a.jsonl}}", "one format"),
    (lambda f: f"{f}/empty", "empty is empty"),
    (lambda f: f"{f}/dots.tar", r"no image: dots.tar/a with .b.jpg .b.json .b.txt")])
def test_what_is_not_there_or_not_known_ends_in_one_sentence(tmp_path, make, named):
    folder = shards(tmp_path / "f")
    (folder / "x.parquet").write_bytes(b"PAR1")
    (folder / "a.jsonl").write_text("{}")
    (folder / "empty").mkdir()
    shard(folder / "dots.tar", {"a.b": sample(0)})
    with pytest.raises(UserError, match=named) as caught:
        open_dataset(make(folder).split(), "train", 0, 16, 0)
    assert "\n" not in str(caught.value) and "--data" in str(caught.value)


# ---- several sets ----------------------------------------------------------------------------------------------------

def sets(tmp_path, weights=(), window=10, seed=0):
    paths = str(shards(tmp_path / "a", (30, 30, 31))), str(shards(tmp_path / "b", (25,)))
    dataset = open_dataset(paths, "train", 0, 16, 12)
    return dataset, Order(dataset, seed, window, weights)


def test_without_weights_an_epoch_has_every_sample_of_every_set_once_and_mixes_them_evenly(tmp_path):
    dataset, order = sets(tmp_path)
    n, first = len(dataset), len(dataset.parts[0])
    for epoch in range(3):
        found = [order(epoch * n + place) for place in range(n)]
        assert [e for e, _ in found] == [epoch] * n and sorted(i for _, i in found) == list(range(n))
        of_b = [place for place, (_, i) in enumerate(found) if i >= first]
        assert np.abs(np.array(of_b) / n - (np.arange(len(of_b)) + 0.5) / len(of_b)).max() < 0.1


def test_weights_hold_in_every_block_and_each_set_goes_through_epochs_of_its_own(tmp_path):
    dataset, order = sets(tmp_path, (3, 1))
    first, seen = len(dataset.parts[0]), {0: [], 1: []}
    stream = [order(position) for position in range(3000)]
    for block in range(3):
        assert sum(i < first for _, i in stream[1000 * block:1000 * (block + 1)]) == 750
    for epoch, i in stream:
        seen[int(i >= first)].append((epoch, i))
    for part, size in ((0, first), (1, len(dataset) - first)):
        for epoch in range(len(seen[part]) // size):
            chunk = seen[part][epoch * size:(epoch + 1) * size]
            assert {e for e, _ in chunk} == {epoch} and len(set(chunk)) == size
    again = sets(tmp_path, (3, 1))[1]
    assert [again(position) for position in (2999, 5, 1777)] == [stream[position] for position in (2999, 5, 1777)]
    for wrong in ((1,), (1, 2, 3), (1, 0), (1, -1)):
        with pytest.raises(UserError, match="--data-weights"):
            sets(tmp_path, wrong)


def test_a_set_of_little_weight_is_drawn_all_the_same(tmp_path):
    _, order = sets(tmp_path, (1e6, 1))
    assert order.quotas.tolist() == [1000, 1]


# ---- order -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("counts, window", [
    ((40,) * 20, 100), ((100, 1, 0, 57, 3), 30), ((5,) * 9, 10_000), ((7, 7), 1)])
def test_shards_are_read_some_at_a_time_and_every_sample_once(counts, window):
    order, first = shard_order(counts, np.random.default_rng(0), window), np.cumsum([0, *counts])
    assert sorted(order.tolist()) == list(range(sum(counts)))
    other = shard_order(counts, np.random.default_rng(1), window)
    assert window == 1 or not np.array_equal(order, other)
    file = np.searchsorted(first, order, "right") - 1
    for start in range(0, len(order), window):  # a window has samples of few shards, from one stretch of each
        some = order[start:start + window]
        files = np.unique(file[start:start + window])
        assert len(files) <= 2 * data.TOGETHER
        if len(files) <= data.TOGETHER and all(counts[f] == counts[0] for f in files):
            assert max(np.ptp(some[file[start:start + window] == f]) for f in files) <= 2 * window / len(files) + 2


def test_shards_order_is_deterministic_and_the_same_for_any_ranks_and_workers(tmp_path):
    dataset = Pictures(Records(str(shards(tmp_path / "a", (30, 30, 31)))), 16, "train")
    order, again, other = (list(local_batches(Order(dataset, seed, 20), 12, 0, 30)) for seed in (5, 5, 6))
    assert order == again != other
    for world in (2, 3, 4):
        ranks = [list(local_batches(Order(dataset, 5, 20), 12, 7, 30, rank, world)) for rank in range(world)]
        assert [list(itertools.chain(*parts)) for parts in zip(*ranks)] == order[7:]


def test_batches_from_shards_are_identical_whatever_the_number_of_workers(tmp_path):
    folder = shards(tmp_path / "a")
    with open(folder / "00001.tar", "r+b") as file:
        file.truncate(30_000)
    dataset, tokenizer = open_dataset(str(folder), "train", 0, 16, 12), load_tokenizer("scenes")
    s = train.resolve(dict(size="nano", method="clip", batch=8, shuffle_buffer=16))
    runs = []
    for s.workers in (0, 1, 2):
        runs.append(list(training_loader(dataset, tokenizer, s, 3, 12)))
    for batches in zip(*runs, strict=True):
        assert all(torch.equal(batches[0][part], other[part]) for other in batches[1:] for part in (0, 1, 2))


def test_training_asks_for_shards_in_pieces_each_once_and_a_look_at_single_samples_does_not(tmp_path, monkeypatch):
    asked, folder = [], shards(tmp_path / "a")
    monkeypatch.setattr(data, "AHEAD", 8192)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *piece: asked.append((os.fstat(file).st_ino, *piece)))
    train_set = Pictures(Records(str(folder)), 16, "train")
    for i in train_set.order(np.random.default_rng(0), 30):
        train_set[i]
    starts = {(path.stat().st_ino, int(span["start"]) // 8192 * 8192, 8192, os.POSIX_FADV_WILLNEED)
              for path, spans in zip(train_set.records.files, train_set.records.spans) for span in spans}
    assert len(asked) == len(set(asked)) and set(asked) <= starts and len(asked) > 0.8 * len(starts) > 12
    for others in (Pictures(Records(f"{folder}/00000.tar"), 16, "train"), Pictures(Records(str(folder)), 16, "all")):
        asked.clear()
        others[3]
        assert not asked


# ---- the index -------------------------------------------------------------------------------------------------------

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scans(monkeypatch):
    """The names of the files scanned from here on."""
    found, scan = [], data.READERS[".tar"]
    monkeypatch.setitem(data.READERS, ".tar", (lambda path: found.append(path.name) or scan[0](path), scan[1]))
    return found


def test_a_file_is_scanned_once_and_again_when_it_has_changed(tmp_path, cache, monkeypatch):
    folder, found = shards(tmp_path / "a"), scans(monkeypatch)
    assert len(Records(str(folder))) == 60 and found == ["00000.tar", "00001.tar", "00002.tar"]
    first, = Records(f"{folder}/00000.tar").spans
    assert isinstance(first, np.memmap) and found == ["00000.tar", "00001.tar", "00002.tar"]
    shard(folder / "00003.tar", {f"new{i}": sample(i) for i in range(7)})
    assert len(Records(str(folder))) == 67 and found[3:] == ["00003.tar"]
    shard(folder / "00001.tar", {f"new{i}": sample(i) for i in range(9)})
    records = Records(str(folder))
    assert len(records) == 56 and found[4:] == ["00001.tar"] and records[20].image == PICTURE[0]
    assert len(list(cache.iterdir())) == 4  # the old index of the changed file is gone


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]\n", b'[3, {}, {}, 3]\nshort', b"\xff\xfe\n" * 99, b"7\n"])
def test_a_damaged_index_is_made_anew(tmp_path, cache, damage):
    folder = shards(tmp_path / "a", (5,))
    Records(str(folder))
    kept, = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage)
    assert [record.key for record in Records(str(folder))] == [f"00000{i:04}" for i in range(5)]
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINILIP_CACHE", str(tmp_path / "file/cache"))
    assert len(Records(str(shards(tmp_path / "a")))) == 60
    monkeypatch.setenv("MINILIP_CACHE", "/proc/cache")
    monkeypatch.setattr(data, "LARGE", 0)  # scanned in other processes
    assert len(Records(str(tmp_path / "a"))) == 60


def test_counts_of_bad_samples_are_kept_with_the_index(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg"}\n{broken\n7\n')
    first, second = Records(str(tmp_path / "a.jsonl")).bad, Records(str(tmp_path / "a.jsonl")).bad
    assert first == second and first.counts == second.counts == {"JSON does not parse": 2} and second.seen == 3


def test_processes_that_index_the_same_files_at_once_agree_and_leave_nothing_behind(tmp_path, cache):
    folder = shards(tmp_path / "a", (10,) * 12)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import data; data.LARGE = 0; "
            "print(len(data.Records(sys.argv[2])))")
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(folder)], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"})
             for rank in range(2)]
    assert [rank.communicate()[0].strip() for rank in ranks] == ["120", "120"]
    assert len(list(cache.iterdir())) == 12


def test_the_index_takes_20_bytes_a_sample(tmp_path, cache):
    records = Records(str(shards(tmp_path / "a")))
    assert sum(spans.nbytes for spans in records.spans) == 20 * len(records)
    assert sum(file.stat().st_size for file in cache.iterdir()) < 20 * len(records) + 3 * 40


# ---- faults ----------------------------------------------------------------------------------------------------------

def giant():
    """A PNG of a few hundred bytes that says it has a gigapixel."""
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "PNG")
    content, head = file.getvalue(), b"IHDR" + (32_000).to_bytes(4, "big") * 2 + b"\x01\0\0\0\0"
    return content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:]


def test_every_fault_costs_its_own_sample_and_is_counted_by_reason_and_named(tmp_path):
    faults = [
        ("image truncated", {"jpg": PICTURE[0][:-300], "txt": b"x"}),
        ("image will not decode", {"jpg": b"", "txt": b"x"}),
        ("image too large", {"png": giant(), "txt": b"x"}),
        ("no image", {"txt": b"x"}),
        ("no caption", {"jpg": PICTURE[0]}),
        ("no caption", {"jpg": PICTURE[0], "json": b'{"caption": 7}'}),
        ("no caption", {"jpg": PICTURE[0], "txt": b" \n"}),
        ("JSON does not parse", {"jpg": PICTURE[0], "json": b'{"caption": ', "txt": b"x"}),
        ("JSON does not parse", {"jpg": PICTURE[0], "json": b"[" * 99_999})]
    good = {f"good{i}": sample(i) for i in range(8)} | {
        "latin": {"jpg": PICTURE[1], "txt": "Straße".encode("latin-1")}, "nul": {"jpg": PICTURE[2], "txt": b"a\0b"}}
    bad = {f"bad{i}": members for i, (_, members) in enumerate(faults)}
    mixed = [pair for pairs in itertools.zip_longest(good.items(), bad.items()) for pair in pairs if pair]
    records = Records(str(shard(tmp_path / "a.tar", dict(mixed))))
    dataset, reasons, read = Pictures(records, 16), Counter(records.bad.counts), {}
    for i in range(len(dataset)):
        try:
            image, read[records[i].key] = dataset[i]
            assert image.shape == (3, 16, 16)
        except BadSample as error:
            reasons[error.reason] += 1
            assert "a.tar: bad" in error.detail or "a.tar/bad" in error.detail
    assert list(read) == list(good) and reasons == Counter(reason for reason, _ in faults)
    assert "a.tar/bad3" in records.bad.report()
    assert read["latin"].raw == "Stra\ufffde" and read["good3"].raw == "picture 3"


@pytest.mark.parametrize("keys", ["aba", "aab", "abab"])
def test_of_samples_with_the_same_key_the_first_stays(tmp_path, keys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, key in enumerate(keys):
            for extension, content in sample(i).items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    records = Records(str(tmp_path / "a.tar"))
    assert {record.key: record.image for record in records} == {key: PICTURE[keys.index(key)] for key in "ab"}
    assert records.bad.counts == {"duplicate": len(keys) - 2} and "a.tar: a" in records.bad.report()
    assert [read_captions(record.row).raw for record in records] == [f"picture {keys.index(key)}" for key in "ab"]


def test_a_file_that_grows_while_it_is_scanned_is_scanned_anew_the_next_time(tmp_path, cache, monkeypatch):
    folder, (scan, parse) = shards(tmp_path / "a", (5,)), data.READERS[".tar"]

    def slow(path):
        found = list(scan(path))
        shard(path, {f"00000{i:04}": sample(i) for i in range(9)})
        return found

    monkeypatch.setitem(data.READERS, ".tar", (slow, parse))
    assert len(Records(str(folder))) == 5
    monkeypatch.setitem(data.READERS, ".tar", (scan, parse))
    assert len(Records(str(folder))) == 9


@pytest.mark.parametrize("share", np.linspace(0.02, 0.98, 13))
def test_of_a_half_written_tar_the_whole_samples_are_read_and_the_rest_is_counted(tmp_path, share):
    whole = shard(tmp_path / "whole.tar", {f"{i:04}": sample(i) for i in range(12)})
    spans = [(int(s["start"]), int(s["start"] + s["length"])) for s in Records(str(whole)).spans[0]]
    cut = int(spans[-1][1] * share)
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:cut])
    records = Records(str(tmp_path / "cut.tar"))
    good, _ = read_all(records)
    assert set(good) >= {f"{i:04}" for i, (_, stop) in enumerate(spans) if stop <= cut} and len(good) <= cut // 512
    assert records.bad.total >= 1 and all("cut.tar" in detail for details in records.bad.values() for detail in details)


def test_a_file_that_shrinks_or_vanishes_after_it_was_indexed_gives_bad_samples(tmp_path):
    folder = shards(tmp_path / "a", (5, 5))
    records = Records(str(folder))
    os.truncate(folder / "00000.tar", 2000)
    (folder / "00001.tar").unlink()
    assert Counter(bad.reason for bad in read_all(records)[1]) == {"file cut off": 5, "file cannot be read": 5}


def test_a_csv_row_with_a_quote_that_never_closes_costs_that_row_alone(tmp_path):
    rows = [f'{i}.jpg,"a caption, of {i}"' for i in range(2000)]
    rows[5] = '5.jpg,"a caption, of 5'
    rows[700] = '700.jpg,one,too many'
    rows[1999] = '1999.jpg,"never closed'
    (tmp_path / "a.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    records = Records(str(tmp_path / "a.csv"))
    assert [record.key for record in records] == [f"{i}.jpg" for i in range(2000) if i not in (5, 700, 1999)]
    assert records.bad.counts == {"row does not parse": 3}
    assert records.bad["row does not parse"] == [f"a.csv line {n}" for n in (7, 702, 2001)]


# ---- fuzz ------------------------------------------------------------------------------------------------------------

def mutations(content, n, seed, alphabet=None):
    """n damaged copies -> (bytes, where the damage begins and ends in the original, how far the rest has moved): bytes
    changed, left out, put in, a stretch repeated, the end cut off."""
    rng = random.Random(seed)
    for _ in range(n):
        start, length = rng.randrange(len(content)), rng.choice((1, 1, 3, 30, 512, 700))
        kind = rng.choice(("change", "leave out", "put in", "repeat", "cut off"))
        stop = min(start + length, len(content))
        noise = bytes(rng.choices(alphabet, k=stop - start)) if alphabet else rng.randbytes(stop - start)
        end = {"change": stop, "leave out": stop, "cut off": len(content)}.get(kind, start)
        new = {"change": noise, "put in": noise, "repeat": content[start:stop]}.get(kind, b"")
        yield content[:start] + new + content[end:], start, end, len(new) - (end - start)


def test_hundreds_of_damaged_tars_are_read_where_they_are_whole_and_counted_where_they_are_not(tmp_path):
    whole = shard(tmp_path / "whole.tar", {f"{i:04}": sample(i) for i in range(8)}, tarfile.PAX_FORMAT)
    content, counted, path = whole.read_bytes(), Counter(), tmp_path / "damaged.tar"
    spans = [(int(s["start"]), int(s["start"] + s["length"])) for s in Records(str(whole)).spans[0]]
    original, _ = read_all(Records(str(whole)))
    for damaged, start, end, moved in mutations(content, 500, 0):
        path.write_bytes(damaged)
        records = Records(str(path))
        good, bad = read_all(records)
        # Behind damage that moves the rest there is no tar, unless by blocks of 512; and the header that moved into the
        # place of content is lost with its sample.
        behind = end if not moved else end + 4000 if moved % 512 == 0 else len(content)
        for i, (first, last) in enumerate(spans):
            if last <= start or first >= behind:
                assert good.get(f"{i:04}") == original[f"{i:04}"], (start, end, moved, i)
        counted.update(records.bad.counts)
        counted.update(b.reason for b in bad)
        assert len(good) >= 8 or records.bad or bad
        for record in good.values():
            try:
                data.load_image(record.image, max_pixels=10**6), read_captions(record.row)
            except BadSample as b:
                counted[b.reason] += 1
        path.unlink()
    assert {"tar damaged", "tar cut off", "image will not decode", "JSON does not parse"} <= set(counted)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_hundreds_of_damaged_text_files_cost_the_rows_that_are_damaged(tmp_path, kind):
    if kind == "csv":
        rows = [f'{i}.jpg,"a caption, with ""quotes""\nand a second line {i}",plain {i}' if i % 3 else
                f"{i}.jpg,c{i},d{i}" for i in range(40)]
    else:
        rows = [json.dumps({"image": f"{i}.jpg", "caption": f"{i}"}) for i in range(40)]
    lines = [(row + "\n").encode() for row in ["image,raw_caption,short"] * (kind == "csv") + rows]
    head = len(lines) - 40
    content, ends = b"".join(lines), np.cumsum([len(line) for line in lines])
    whole, path, counted = tmp_path / f"whole.{kind}", tmp_path / f"damaged.{kind}", Counter()
    whole.write_bytes(content)
    original = {record.key: record.row for record in Records(str(whole))}
    assert len(original) == 40
    for damaged, start, end, _ in mutations(content, 400, 1, b'"",\n\\{}:x\xff\x00 '):
        if start < ends[0] and head:
            continue  # the header
        path.write_bytes(damaged)
        records = Records(str(path))
        rows = [record.row for record in records]
        for i, (first, last) in enumerate(zip([0, *ends], ends)):
            if i >= head and (last <= start or first > end):
                assert original[f"{i - head}.jpg"] in rows, (start, end, i)
        counted.update(records.bad.counts)
        for record in records:
            try:
                read_captions(record.row), data.load_image(record.image)
            except BadSample as b:
                counted[b.reason] += 1
    assert {"JSON does not parse" if kind == "jsonl" else "row does not parse", "image missing"} <= set(counted)


# ---- processes -------------------------------------------------------------------------------------------------------

class Deadly(data.SceneImages):
    def __getitem__(self, i, rng=None):
        if i == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i, rng)


def test_when_a_worker_dies_the_error_names_the_samples_at_hand():
    s = train.resolve(dict(size="nano", method="clip", batch=4, workers=2))
    with pytest.raises(UserError, match="a data-loading process died .*scene-train-13") as caught:
        for _ in training_loader(Deadly("train", 40, 32, 12), load_tokenizer("scenes"), s, 0, 10):
            pass
    assert "\n" not in str(caught.value)


MEMORY = """
import gc, os, sys, time, numpy as np
sys.path.insert(0, sys.argv[1])
import data

def pss(pid):
    return sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:")) * 1024

def read(seed):
    for i in np.random.default_rng(seed).integers(0, len(records), min(30_000, len(records) // 10)):
        records[int(i)]
    gc.collect()

records, pipes, workers = data.Records(sys.argv[2]), [], []
read(0)
alone = pss(os.getpid())
for worker in range(8):
    end, begin = os.pipe()
    if not (pid := os.fork()):
        data.begin_worker(worker)
        read(worker)
        os.write(begin, b"x")
        time.sleep(1000)
    pipes, workers = [*pipes, end], [*workers, pid]
for end in pipes:
    os.read(end, 1)
together = pss(os.getpid()) + sum(map(pss, workers))
for pid in workers:
    os.kill(pid, 9)
print(len(records), alone, together, sum(spans.nbytes for spans in records.spans))
"""


@pytest.mark.parametrize("rows", [60_000, pytest.param(3_000_000, marks=pytest.mark.slow)])
def test_8_workers_and_their_parent_take_less_than_1_3_times_the_memory_of_one(tmp_path, rows, cache):
    with open(tmp_path / "rows.csv", "w") as file:
        file.write("image,raw_caption,longSV_captions\n")
        file.writelines(f"{i}.jpg,picture {i},The first sentence of {i}. The second one.\n" for i in range(rows))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(ROOT), str(tmp_path / "rows.csv")],
                          capture_output=True, text=True)
    n, alone, together, index = map(int, done.stdout.split())
    print(f"{n} rows: {alone / 1e6:.0f} MB alone, {together / 1e6:.0f} MB with 8 workers, index {index / 1e6:.0f} MB")
    assert n == rows and index == 20 * rows and together < 1.3 * alone


# ---- from the command line -------------------------------------------------------------------------------------------

RUN = dict(size="nano", method="clip", images=64, batch=16, eval_images=0, device="cpu", workers=0, log_every=1,
           tokenizer="scenes", precision="fp32")


def test_a_run_trains_on_weighted_sets_of_shards_and_rows_and_names_what_was_bad(tmp_path, capsys):
    folder = shards(tmp_path / "a")
    with open(folder / "00002.tar", "r+b") as file:
        file.truncate(40_000)
    (tmp_path / "b.csv").write_text("file,title\n" + "".join(f"{i}.jpg,title {i}\n" for i in range(30)))
    for i in range(29):
        (tmp_path / f"{i}.jpg").write_bytes(PICTURE[i])
    flags = ["--data", f"{folder}/{{00000..00002}}.tar", str(tmp_path / "b.csv"), "--data-weights", "1", "3",
             "--caption-fields", "raw=title", "--max-bad", "0.5", "--out", str(tmp_path / "run")]
    train.train({**RUN, **train.parse_flags(flags)})
    printed = capsys.readouterr().out
    assert "1 × tar cut off: 00002.tar in" in printed and "image missing: b.csv: 29.jpg" in printed
    assert [json.loads(line)["step"] for line in open(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]


def test_a_set_that_is_bad_by_its_index_alone_is_refused_before_training(tmp_path):
    lines = [json.dumps({"image": f"{i}.jpg", "caption": "x"}) for i in range(300)] + ["{torn"] * 20
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for i in range(300):
        (tmp_path / f"{i}.jpg").write_bytes(PICTURE[0])
    with pytest.raises(UserError, match="20 of 320 samples are bad, over --max-bad 0.05"):
        train.train({**RUN, "data": str(tmp_path / "a.jsonl"), "out": str(tmp_path / "run")})


def test_a_look_prints_counts_bad_samples_and_lengths_and_draws_a_sheet(tmp_path):
    folder = shards(tmp_path / "a", (30,))
    shard(folder / "00001.tar", {"x": {"jpg": b"", "txt": b"x"}, "y": {"txt": b"y"}, "z": {
        "jpg": PICTURE[0], "txt": b"costs $5 and $6", "json": json.dumps({"long": "One two. Three."}).encode()}})
    (folder / "00001.parquet").write_bytes(b"PAR1")  # img2dataset leaves these two beside a shard
    (folder / "00001_stats.json").write_text('{"count": 3}')
    command = [sys.executable, str(ROOT / "data.py"), "--look", str(folder), "--tokenizer", "scenes", "--sheet"]
    done = subprocess.run([*command, str(tmp_path / "sheet.png")], capture_output=True, text=True)
    assert "2 files, 32 samples; left out: 1 × no image: 00001.tar/y with .txt" in done.stdout and not done.stderr
    for line in ("32 looked at, 1 bad: 1 × image will not decode", "raw caption: 31, tokens: mean",
                 "sentence of long: 32,", "fields: caption 32, width 30, long 1\n"):
        assert line in done.stdout, done.stdout
    assert np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).std() > 5
    gone = subprocess.run([*command[:2], "--look", "gone.tar"], capture_output=True, text=True)
    assert gone.returncode == 1 and gone.stderr.startswith("error: no file gone.tar") and gone.stderr.count("\n") == 1


def test_a_sheet_that_cannot_be_written_and_scenes_which_are_no_file_are_one_sentence(tmp_path, capsys):
    folder = shards(tmp_path / "a", (3,))
    for path, sheet, named in ((folder, "/nowhere/a.png", "--sheet /nowhere/a.png"), (folder, "a.xyz", "--sheet a.xyz"),
                               ("scenes", None, "python scenes.py --sheet")):
        with pytest.raises(UserError, match=named):
            data.look(str(path), None, data.FIELDS, load_tokenizer("scenes"), 3, sheet)
