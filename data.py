"""From files to batches: tokenizer, sentences, pictures, captions, the texts each method draws, records, order.

    tokenizer = load_tokenizer("clip")
    tokens = tokenizer(["a photo of a dog", "a cat"], 77)  # [2, 77]: start, ids, end, zeros
    split_sentences("A dog, approx. 3.5 ft. tall. It runs...")  # ["A dog, approx. 3.5 ft. tall.", "It runs..."]
    image = load_image("dog.png")  # PIL, RGB, upright, on white
    records = Records("cc3m/{00000..00331}.tar")  # or .jsonl, .csv, a folder: records[7].key, .image, .row

    python data.py --look DATA --sheet sheet.png         counts, bad samples, lengths of captions, pictures
    python data.py --train-bpe assets/scenes.tiktoken    how the small vocabulary of the scenes was made
"""

import argparse
import base64
import csv
import functools
import gc
import glob
import gzip
import hashlib
import html
import http.client
import importlib.util
import io
import json
import math
import os
import random
import re
import signal
import struct
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import warnings
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex  # tiktoken's own dependency: CLIP's word pattern needs \p{L}, which re lacks
import tiktoken
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from scenes import KINDS, PERSPECTIVES, Scenes


class UserError(Exception):
    """A mistake the user can mend: one sentence naming the thing and the remedy. Scripts print it and exit 1."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, without the list of all flags."""

    def error(self, message):
        raise UserError(f"{message} (--help lists what there is)")


class BadSample(Exception):
    """A sample to skip and count. `reason` is one of a few short strings to count by, `detail` says which and why."""

    def __init__(self, reason, detail=""):
        super().__init__(reason, detail)  # both, so that a pickled one is built again whole
        self.reason, self.detail = reason, detail

    def __str__(self):
        return f"{self.reason}: {self.detail}"


@functools.cache
def say_once(message):
    print(message, flush=True)


def read_json(path: Path):
    """A JSON file's content, or of JSON lines a list. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "jsonl" not in path.suffix:
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error})") from None


# ---- tokenizer -------------------------------------------------------------------------------------------------------

SCENES_VOCABULARY = Path(__file__).parent / "assets" / "scenes.tiktoken"
CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
CLIP_URL = f"https://github.com/openai/CLIP/raw/main/clip/{CLIP_VOCABULARY}"
CLIP_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CLIP_MERGES = 49152 - 256 - 2  # the file lists more; CLIP uses the first 48,894

SOT, EOT = "<start_of_text>", "<end_of_text>"  # open_clip reads these two as special inside a caption as well; so do we
WORDS = regex.compile(rf"{SOT}|{EOT}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE)


def clean_text(text, fix_text=None):
    """CLIP's cleaning: ftfy's repair if `fix_text` is given, HTML entities (twice), single spaces, lower case."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # most captions have nothing to repair
        text = fix_text(text) if fix_text else text
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def split_words(text):
    """Cleaned text -> CLIP's words, each closed by one space: "it's 10!" -> ["it ", "'s ", "1 ", "0 ", "! "]."""
    return [word + " " for word in WORDS.findall(text)]


class Tokenizer:
    """Byte-level BPE over CLIP's words: tokenizer(texts, context_length) -> LongTensor [N, context_length].

    CLIP marks the last symbol of a word with '</w>'. Here the mark is a space, which no cleaned word contains, so
    that tiktoken, which merges plain bytes, can see it: CLIP's 'dog</w>' is the token b"dog ". `ranks` maps each token
    to its rank, which is its id; the two ids above them are start and end of text, so the end is a row's greatest id.
    """

    def __init__(self, name, ranks, fix_text=None):
        self.name, self.ranks, self.fix_text = name, ranks, fix_text
        self.sot, self.eot, self.vocab_size = len(ranks), len(ranks) + 1, len(ranks) + 2
        self.encoding = tiktoken.Encoding(
            name, pat_str="[^ ]+ ", mergeable_ranks=ranks, special_tokens={SOT: self.sot, EOT: self.eot})
        self.row = functools.lru_cache(maxsize=1 << 15)(self._row)

    def __reduce__(self):  # a DataLoader worker gets the ranks and builds its own encoding and cache
        return Tokenizer, (self.name, self.ranks, self.fix_text)

    def encode(self, text):
        """Ids of a text, without start and end."""
        words = "".join(split_words(clean_text(text, self.fix_text)))
        return self.encoding.encode(words, allowed_special="all", disallowed_special=())

    def decode(self, ids):
        """The cleaned text, words apart by spaces; of a whole row, what stands between its start and its end."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.eot)] if self.eot in ids else ids
        return self.encoding.decode([i for i in ids if i != self.sot]).rstrip(" ")

    def _row(self, text):
        return np.array([self.sot, *self.encode(text), self.eot], dtype=np.int32)

    def __call__(self, texts, context_length):
        """One text or a list of N -> LongTensor [N, context_length]: start, ids, end, zeros; the end survives a cut."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = np.zeros((len(texts), context_length), dtype=np.int64)
        for i, text in enumerate(texts):
            row = self.row(text)[:context_length]
            tokens[i, :len(row)] = row
            tokens[i, len(row) - 1] = self.eot
        return torch.from_numpy(tokens)


def load_tokenizer(name_or_path="auto"):
    """"clip" (CLIP's ids, exactly), "scenes" (our own, small), "auto" (clip where it is to be had, else scenes, said
    aloud), or the path of a CLIP-style .txt.gz or of a .tiktoken file. Raises UserError."""
    name = str(name_or_path)
    if name == "auto":
        try:
            return load_tokenizer("clip")
        except UserError as error:
            say_once(f"TOKENIZER: scenes instead of clip, so real captions take more tokens, because {error}")
            return load_tokenizer("scenes")
    if name == "clip":
        return Tokenizer(name, read_clip_ranks(find_clip_vocabulary()), find_ftfy())
    if name.endswith("vocab.txt"):
        return WordPieces(name)
    if name.endswith(".txt.gz"):
        return Tokenizer(Path(name).name.removesuffix(".txt.gz"), read_clip_ranks(name), find_ftfy())
    if name == "scenes" or name.endswith(".tiktoken"):
        path = SCENES_VOCABULARY if name == "scenes" else Path(name)
        return Tokenizer(path.stem, read_tiktoken(path))
    raise UserError(f"no tokenizer {name!r}: take auto, clip, scenes, or the path of a .tiktoken or .txt.gz file")


class WordPieces:
    """BERT's tokenizer as LoTLIP uses it, from bert-base-uncased's vocab.txt: [CLS], sentences parted by [SEP], and at
    the end a [SEP] with an id of its own, the greatest (model._read_lotlip)."""

    def __init__(self, path):
        try:
            from tokenizers import BertWordPieceTokenizer
        except ImportError:
            raise UserError("LoTLIP reads texts in BERT's word pieces: pip install tokenizers") from None
        if not Path(path).is_file():
            raise UserError(f"no {path}: put bert-base-uncased's vocab.txt there or name it with --tokenizer")
        self.pieces, self.name = BertWordPieceTokenizer(str(path), lowercase=True), "vocab.txt"
        self.vocab_size = self.pieces.get_vocab_size() + 1

    def __call__(self, texts, context):
        tokens = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = self.pieces.encode("[SEP]".join(text.split(". "))).ids[:-1][:context - 1]
            row[:len(ids) + 1] = torch.tensor([*ids, self.vocab_size - 1])
        return tokens

    def decode(self, ids):
        return self.pieces.decode([int(i) for i in ids])


def find_ftfy():
    try:
        import ftfy
        return ftfy.fix_text
    except ImportError:
        say_once("ftfy is not installed: garbled Unicode is left as it is, where CLIP repairs it (pip install ftfy)")


def find_clip_vocabulary():
    """Path of CLIP's vocabulary: in an installed open_clip or clip (not imported), in the cache, or downloaded."""
    cached = Path.home() / ".cache" / "clip" / CLIP_VOCABULARY
    packages = [importlib.util.find_spec(package) for package in ("open_clip", "clip")]
    folders = [folder for spec in packages if spec for folder in spec.submodule_search_locations or []]
    for path in [*(Path(folder) / CLIP_VOCABULARY for folder in folders), cached]:
        if path.is_file():
            return path
    try:
        with urllib.request.urlopen(CLIP_URL, timeout=20) as response:
            content = response.read()
        if hashlib.sha256(content).hexdigest() != CLIP_SHA256:
            raise OSError("what came back is another file, by its SHA-256")
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, cached)  # whole or not at all, also when several processes download at once
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"CLIP's vocabulary cannot be downloaded ({error}): pip install open_clip_torch, or put "
                        f"{CLIP_URL} at {cached}, or choose --tokenizer scenes") from None
    return cached


def read_clip_ranks(path):
    """CLIP's merges file -> {token: rank}. Ids go: 256 bytes, the same 256 ending a word, then one per merge.

    The file writes bytes as printable characters (GPT-2's table), and that table's order is the order of the first ids.
    The bytes that end a word rank before every merge, so tiktoken joins a word's last byte and its space first of all,
    as CLIP's merging starts out.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def token(symbol):
        return bytes(byte_of[c] for c in symbol.removesuffix("</w>")) + b" " * symbol.endswith("</w>")

    try:
        lines = gzip.decompress(Path(path).read_bytes()).decode().split("\n")[1:1 + CLIP_MERGES]
        merges = [token(left) + token(right) for left, right in (line.split() for line in lines if line)]
        tokens = [bytes([byte]) for byte in byte_of.values()]
        tokens += [byte + b" " for byte in tokens] + merges
        if len(set(tokens)) < len(tokens):
            raise ValueError("a merge is listed twice")
    except FileNotFoundError:
        raise UserError(f"no tokenizer file {path}: check --tokenizer") from None
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a CLIP vocabulary ({error!r}): delete it or name another") from None
    return {token: rank for rank, token in enumerate(tokens)}


def read_tiktoken(path):
    """A .tiktoken file (a line: base64 token, space, rank) -> {token: rank}; all single bytes must be there."""
    try:
        pairs = [line.split() for line in Path(path).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except FileNotFoundError:
        raise UserError(f"no tokenizer file {path}: check --tokenizer, or make it with train_bpe") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a .tiktoken file ({error}): its lines are 'base64-token rank'") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path} is incomplete: it needs all 256 single bytes, and ranks from 0 without gaps")
    return ranks


def save_tiktoken(path, ranks):
    """Writes {token: rank} in tiktoken's file format, in the order of rank."""
    lines = [base64.b64encode(token) + b" %d\n" % ranks[token] for token in sorted(ranks, key=ranks.get)]
    Path(path).write_bytes(b"".join(lines))


def train_bpe(texts, vocab_size):
    """Byte-pair encoding learned from texts -> {token: rank}, of vocab_size - 2 tokens (start and end come on top), or
    fewer when every word has become one token. Deterministic: of equally frequent pairs, the least in byte order.

    A pair is known by the bytes it joins, as tiktoken knows it, so that no token can be learned twice (a|bc and ab|c).
    """
    if vocab_size < 258:
        raise UserError(f"a vocabulary of {vocab_size} is too small: 256 bytes, start and end make 258")
    counts = Counter(word for text in texts for word in split_words(clean_text(text)))
    counts = {word.encode(errors="replace"): count for word, count in counts.items()}
    parts = {word: [bytes([byte]) for byte in word] for word in counts}
    ranks = {bytes([byte]): byte for byte in range(256)}
    pairs = Counter()
    for word, count in counts.items():
        add_pairs(pairs, parts[word], count)

    while len(ranks) < vocab_size - 2:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None:
            break
        ranks[best] = len(ranks)
        for word in [word for word in counts if best in word]:
            add_pairs(pairs, parts[word], -counts[word])
            parts[word] = merge(parts[word], ranks)
            add_pairs(pairs, parts[word], counts[word])
        pairs = +pairs  # drops the pairs that are no more
    return ranks


def add_pairs(pairs, parts, count):
    for left, right in pairwise(parts):
        pairs[left + right] += count


def merge(parts, ranks):
    """Merges neighbours while the two together are a token: lowest rank first, leftmost first."""
    while True:
        ready = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not ready:
            return parts
        _, i = min(ready)
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2:]]


# ---- sentences -------------------------------------------------------------------------------------------------------

END_MARKERS = re.compile(r"</?s>|<(?:eos|bos|end_of_turn|end_of_utterance)>|<\|\w{1,20}\|>|\[(?:EOS|SEP|/INST)\]")
WIDE_STOP = re.compile(r"[。！？｡]+[」』”’）》】\"')]*")  # Chinese and Japanese: no space follows
LIST_MARK = re.compile(r"[-*•·▪‣–#]+|\(?\d{1,2}[.)]|\(?[a-zA-Z]\)")
OPENERS, CLOSERS = "\"'“‘«([*_", "\"'”’»)]*_"
NEVER_LAST = set("""dr mr mrs ms mx messrs prof rev hon gen sgt capt lt gov sen mt e.g i.e eg ie cf vs viz approx ca
    incl esp""".split())
BEFORE_NUMBER = set("no nos nr fig figs vol p pp ch sec eq jan feb mar apr jun jul aug sep sept oct nov dec".split())
MAYBE_LAST = set("""etc al inc ltd co corp jr sr st ave blvd rd ft lb lbs oz cm mm km kg mi hr hrs min sq dept ph.d a.m
    p.m""".split())  # last in the sentence only if a word that opens sentences comes next
INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # J, U.S, after the last stop is off
FIRST_WORDS = set("""A An The This That These Those There Here It Its He She His Her They Their We You In On At To From
    With Behind Below Beside Above Under Near Next Over Around Between Both Two Three Some Several Many One Another
    Each And But As While Overall""".split())


def split_sentences(text):
    """A caption -> its sentences, spaces tidied, none empty, no word lost (list marks and end markers go).

    Linear in the length of the text. A line break always ends a sentence; a stop does, unless what is before it is an
    abbreviation or what is after it goes on in lower case within a quotation or after an ellipsis.
    """
    text = WIDE_STOP.sub(r"\g<0>\n", END_MARKERS.sub("\n", text))
    sentences = []
    for line in text.splitlines():
        sentence = []
        for word, following in pairwise([*line.split(), ""]):
            if not sentence and following and LIST_MARK.fullmatch(word):
                continue
            sentence.append(word)
            if not following or is_last(word, following):
                sentences.append(" ".join(sentence))
                sentence = []
    return [sentence for sentence in sentences if sentence.strip("-–—*#_=.…•·▪‣| ")]


def is_last(word, following):
    """Whether a sentence ends with this word, given the one after it."""
    core, following = word.rstrip(CLOSERS), following.lstrip(OPENERS)
    if not core.endswith((".", "!", "?", "…")) or is_abbreviation(core.lstrip(OPENERS).removesuffix("."), following):
        return False
    pauses = core != word or core.endswith(("..", "…"))
    return not (pauses and following[:1].islower())


def is_abbreviation(name, following):
    lower = name.lower()
    if lower in MAYBE_LAST or INITIALS.fullmatch(name):
        return re.split(r"\W", following, maxsplit=1)[0] not in FIRST_WORDS
    return lower in NEVER_LAST or (lower in BEFORE_NUMBER and following[:1].isdigit())


# ---- pictures --------------------------------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no format for which Pillow starts another program, as it does for EPS
SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # load_image has its own, settable limit


def load_image(source, size=None, max_pixels=64_000_000, name=None):
    """A path, bytes or a binary file -> PIL image: RGB, turned upright by its EXIF tag, transparent parts on white.

    `size`: the shorter side wanted in the end; a JPEG is decoded at 1/2, 1/4 or 1/8, much faster, where that leaves it.
    Raises BadSample with the reason "image missing", "image too large" (over max_pixels: a small file can fill the
    memory), "image truncated" or "image will not decode", and `name` (else the file's) in its detail.
    """
    path = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "image in memory")
    name = name or path
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadSample("image too large", f"{name}, {width} x {height}")
            if size is not None:
                image.draft(None, (size, size))  # does nothing to other formats
            image.load()
            return to_rgb(upright(image))
    except BadSample:
        raise
    except FileNotFoundError:
        raise BadSample("image missing", str(name)) from None
    except Image.DecompressionBombError as error:
        raise BadSample("image too large", f"{name}, {error}") from None
    except Exception as error:  # decoders raise nearly anything on broken files: OSError, SyntaxError, struct.error ...
        reason = "image truncated" if "truncated" in str(error).lower() else "image will not decode"
        raise BadSample(reason, f"{name}, {error}") from None


def upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block is common on the web and no reason to lose the picture
        return image


def to_rgb(image):
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


ASPECT = 0.8  # a random crop is 0.8 to 1.25 times as wide as high


def crop_box(width, height, least=1.0, rng=None):
    """(left, top, right, bottom) of what to keep of a picture: the middle square; with `rng` a random rectangle of at
    least the share `least` of the area (the random resized crop of 1409.4842), or, in a picture too long for that, the
    greatest of that aspect at a random place."""
    if rng is None:
        side = min(width, height)
        return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
    for _ in range(10):
        area, aspect = width * height * rng.uniform(least, 1), math.exp(rng.uniform(-1, 1) * math.log(ASPECT))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            break
    else:
        w, h = min(width, height / ASPECT), min(height, width / ASPECT)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h


# ---- captions and the texts drawn from them --------------------------------------------------------------------------

# Where each kind of text is found, by the names that published files use: DreamLIP's columns (SV ShareGPT4V, IB
# InstructBLIP, LLA LLaVA-1.5), img2dataset's and Holistic CLIP's "caption", re-captioning's own. Of "raw" and "caption"
# the first name found counts; short and long captions are taken from all. `--caption-fields` names others.
FIELDS = {
    "caption": ("caption",),  # a string, or a list of M texts, the raw caption first
    "raw": ("raw", "raw_caption"),
    "short": ("short", "shortSV_captions", "shortIB_captions", "shortLLA_captions"),
    "long": ("long", "longSV_captions", "longIB_captions", "longLLA_captions", "long_caption"),
    **{name: (name,) for name in PERSPECTIVES if name != "raw"},
}
DENSE = ("dense", "denseSV_captions", "denseIB_captions", "denseLLA_captions")  # with --region-grouping, of "long", too


@dataclass
class Captions:
    """The texts of one image. A method never finds one missing: what the data lacks is made of what it has."""

    raw: str  # the caption found with the image
    short: list[str]  # one-sentence captions, one a model
    long: list[str]  # the sentences of the long captions
    perspectives: list[str]  # Holistic CLIP's M texts, the raw caption first
    boxes: list[tuple | None] = field(default_factory=list)  # of each sentence of `long`; None: no place; []: all None

    def within(self, crop: tuple) -> "Captions":
        """The captions of what a crop leaves of the image: their boxes as shares of it. A sentence whose box has its
        middle outside tells of what is hardly to be seen, and goes; all stay, without places, if none would be left.

        crop and boxes: (left, top, right, bottom) as shares of the image.
        """
        if not self.boxes:
            return self
        left, top, right, bottom = crop
        kept = []
        for sentence, box in zip(self.long, self.boxes):
            if box:
                x0, y0, x1, y1 = box
                if not (2 * left <= x0 + x1 <= 2 * right and 2 * top <= y0 + y1 <= 2 * bottom):
                    continue
                w, h = right - left, bottom - top
                box = (max((x0 - left) / w, 0), max((y0 - top) / h, 0),
                       min((x1 - left) / w, 1), min((y1 - top) / h, 1))
            kept.append((sentence, box))
        long, boxes = map(list, zip(*kept)) if kept else (self.long, [])
        return replace(self, long=long, boxes=boxes)


def read_fields(text: str, dense: bool = False) -> dict:
    """"raw=title,long=a+b" -> FIELDS with these names instead; `dense`: else the crops' sentences are among the long
    captions. Raises UserError."""
    fields = FIELDS | {"long": FIELDS["long"] + DENSE * dense}
    for part in filter(None, text.split(",")):
        kind, _, names = part.partition("=")
        if kind.strip() not in fields or not names.strip():
            raise UserError(f"--caption-fields: {part!r} is not like long=field or long=field+field, with one of "
                            + ", ".join(fields))
        fields[kind.strip()] = tuple(name.strip() for name in names.split("+"))
    return fields


def recaptioned(row: dict) -> dict:
    """What is under "captions", as in re-captioning's records."""
    captions = row.get("captions")
    return captions if isinstance(captions, dict) else {}


def all_fields(row: dict) -> dict:
    """With what is under "captions", which wins over the same names outside."""
    return row | recaptioned(row)


def read_captions(row: dict, fields: dict = FIELDS, name: str = "") -> Captions:
    """A row of a data file -> its texts, found by the names in `fields`. A text may be a string or a list of its
    sentences, and of a long caption a list of {"box": [x0, y0, x1, y1] as shares of the image, "text": sentences}.
    Raises BadSample, with `name` in its detail, if there is no text or a box is none."""
    row = all_fields(row)
    found = {kind: [texts for field in names if (texts := clean_field(row.get(field)))]
             for kind, names in fields.items()}
    listed = found["caption"][0] if found["caption"] else []
    anything = [*found["raw"], listed[:1], *found["short"], *(texts[:1] for kind in found.values() for texts in kind)]
    raw = " ".join(next(filter(None, anything), []))
    if not raw:
        raise BadSample("no caption", name or str(row.get("image", row.get("key", ""))))
    long = [part for field in fields["long"] for part in with_boxes(row.get(field), name)]
    long = long or [(text, None) for text in listed[1:] or listed or [raw]]
    long = [(sentence, box) for text, box in long for sentence in split_sentences(text)] or [(raw, None)]
    sentences, boxes = map(list, zip(*long))
    perspectives = [" ".join(found[kind][0]) for kind in PERSPECTIVES if kind != "raw" and found[kind]] or listed[1:]
    return Captions(raw, [" ".join(texts) for texts in found["short"]], sentences, [raw, *perspectives],
                    boxes if any(boxes) else [])


LONGEST_TEXT = 100_000  # characters; a longer one is no caption but a damaged file


def clean_field(value) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    texts = [part.get("text") if isinstance(part, dict) and "box" in part else part for part in texts]
    return [t.strip()[:LONGEST_TEXT] for t in texts if isinstance(t, str) and t.strip()]


def with_boxes(value, name) -> list[tuple[str, tuple | None]]:
    """clean_field, each text with its box, or None. Raises BadSample."""
    found = []
    for part in value if isinstance(value, list) else [value]:
        box = part.get("box") if isinstance(part, dict) else None
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)
        if box is not None and not (numbers and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise BadSample("not a box", f"{name}, {str(box)[:60]} is not [x0, y0, x1, y1] from 0 to 1")
        found += [(text, box and tuple(box)) for text in clean_field([part])]
    return found


def text_slots(s) -> list[str]:
    """The kind of text in each of the T slots, from the settings: "raw", "sub" (sub-caption), "long", "perspective"."""
    sub = ["sub"] * s.sub_captions if s.sampling != "whole" else ["long"] * min(s.sub_captions, 1)
    return ["raw"] * s.raw_caption + sub + ["long"] * s.long_texts + ["perspective"] * s.perspectives


def draw_texts(c: Captions, s, rng: random.Random) -> list[tuple[str, tuple | None]]:
    """The T texts of one image for one step, in the order of text_slots, each with its box, if it has one.

    Sub-captions (DreamLIP, section 3.2) are drawn from the sentences, the short captions, the raw one unless it has a
    slot of its own, and, in the share `whole_caption` of the draws, all sentences as one text: without replacement
    while they last. Long texts (LoTLIP, section 3.1) join `long_sentences` consecutive sentences (0: all).
    """
    def anywhere(texts):
        return [(text, None) for text in texts]

    pool = [*zip(c.long, c.boxes)] if c.boxes else anywhere(c.long)
    pool += anywhere(c.short * s.short_caption + [c.raw] * (not s.raw_caption))
    if rng.random() < s.whole_caption:
        pool += anywhere([" ".join(c.long)])

    def sub(k):
        if s.sampling == "first":  # the ablation: the same K texts every time
            return [pool[i % len(pool)] for i in range(k)]
        return rng.sample(pool, min(k, len(pool))) + rng.choices(pool, k=max(0, k - len(pool)))

    def long():
        n = s.long_sentences or len(c.long)
        start = rng.randrange(max(len(c.long) - n, 0) + 1)
        return " ".join(c.long[start:start + n])

    slots = text_slots(s)
    texts = anywhere([c.raw] * slots.count("raw")) + sub(slots.count("sub"))
    texts += anywhere(long() for _ in range(slots.count("long")))
    perspectives = c.perspectives[:slots.count("perspective")]
    return texts + anywhere(perspectives) + sub(slots.count("perspective") - len(perspectives))


def patches_of(boxes, side: int) -> torch.Tensor:
    """Which of side · side patches, row by row, each box overlaps; of None all: T boxes -> bool [T, side²]."""
    edges = torch.tensor([box or (0, 0, 1, 1) for box in boxes], dtype=torch.float64)[:, None] * side  # [T, 1, 4]
    first, behind, place = edges[..., :2].floor(), edges[..., 2:].ceil(), torch.arange(side)
    x, y = ((first[..., k] <= place) & (place < behind[..., k]) for k in (0, 1))  # [T, side]
    return (y[:, :, None] & x[:, None]).flatten(1)


# ---- records: where the samples are in the files ---------------------------------------------------------------------

# A sample is a span of bytes in a file: of a tar the members with its key, of a CSV its row, of JSON lines its line.
# All that stays in memory is one SPAN a sample, in files under ~/.cache that are mapped, so that the workers and the
# ranks of a machine share one copy; the span is read and parsed when the sample is wanted. So any sample is reached at
# once: the order is free, the same for any number of workers, and a run goes on where it was. (webdataset streams a tar
# from its start; its order depends on the number of workers, and it cannot go on in mid-epoch.)
SPAN = np.dtype([("start", "<u8"), ("length", "<u4"), ("key", "<u8")])  # `key`: hash of the sample's key
INDEX_VERSION = 2  # of the indices kept: raise it when a scan_ function changes
LARGE = 1 << 24  # bytes of files that are scanned in several processes
LONGEST = 1 << 27  # bytes of one sample: no picture is larger, and a damaged file shall not fill the memory


@dataclass
class Record:
    key: str
    image: bytes | Path
    row: dict  # its texts, as read_captions takes them


class BadCount(dict):
    """{reason: the first few details} of bad samples; `counts` has the numbers, `seen` that of all samples met."""

    def __init__(self, details=(), counts=(), seen=0):
        super().__init__(details)
        self.counts, self.seen = Counter(counts), seen

    def add(self, bad: BadSample):
        self.counts[bad.reason] += 1
        details = self.setdefault(bad.reason, [])
        if len(details) < 5 and bad.detail not in details:
            details.append(bad.detail)

    def plain(self) -> tuple[dict, dict, int]:
        """For a file; BadCount(*plain) is the same again."""
        return dict(self), dict(self.counts), self.seen

    def merge(self, other: "BadCount"):
        self.counts.update(other.counts)
        self.seen += other.seen
        for reason, details in other.items():
            self[reason] = (self.get(reason, []) + details)[:5]

    @property
    def total(self) -> int:
        return self.counts.total()

    def report(self) -> str:
        return "; ".join(f"{n} × {reason}: {', '.join(self[reason][:3])}{' ...' if n > 3 else ''}"
                         for reason, n in self.counts.most_common())

    def over(self, share: float, total: int | None = None, seen: int | None = None) -> bool:
        """Whether more than this share is bad, of at least 200 seen; `total` and `seen` may be those of all ranks."""
        total, seen = self.total if total is None else total, self.seen if seen is None else seen
        return seen >= 200 and total > share * seen

    def check(self, share: float):
        """Raises UserError where that is so."""
        if self.over(share):
            raise UserError(f"{self.total} of {self.seen} samples are bad, over --max-bad {share:g}: mend the data or "
                            f"raise the limit ({self.report()})")


def hashed(key: str | bytes) -> int:
    key = key if isinstance(key, bytes) else key.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def parse_json(content: bytes, name: str) -> dict:
    try:
        row = json.loads(content.decode("utf-8-sig", errors="replace"))
        if isinstance(row, dict):
            return row
    except (ValueError, RecursionError):
        pass
    raise BadSample("JSON does not parse", name)


IMAGE_FIELDS = ("image", "image_path", "image path", "filepath", "file_name", "path", "url", "image_url")


def image_field(row: dict, otherwise: str | None = None) -> str:
    """The path or URL of a row's image: under the first of the usual names, else under `otherwise`."""
    by_name = {name.lower(): value for name, value in reversed(row.items())}
    image = next((by_name[name] for name in IMAGE_FIELDS if name in by_name), row.get(otherwise))
    if not isinstance(image, str) or not image.strip():
        raise BadSample("no image named", str(row.get("key", ""))[:80])
    return image.strip()


def row_key(row: dict, otherwise: str | None = None) -> str:
    key = row.get("key")
    return key if isinstance(key, str) and key else image_field(row, otherwise)


# Each format has a scan_ function, file -> (start, length, key, identity) of every sample, or BadSample (of samples
# with the same identity the first stays); and a parse_ function, (bytes of a span, Records, number of file) -> Record.

Member = namedtuple("Member", "key extension start data size")  # bytes: where its headers and its content begin


def tar_members(read, end):
    """A Member for every file in a tar of `end` bytes.

    `read(offset, n)` gives bytes. Headers are parsed by the standard library's TarInfo, one by one, because its TarFile
    and webdataset both give up a shard at the first damaged header: here the key is None, the extension says what is
    wrong, and the next whole header is looked for. The key is the name, with its folder, up to the first dot.
    """
    at, start, name, last = 0, None, None, 0
    while at < end:
        block = read(at, 512)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if info.size < 0:
                raise tarfile.InvalidHeaderError
        except tarfile.HeaderError:
            following = next_header(read, at + 512, end)
            if following is None and block.count(0) == 512:  # the mark of the end
                return
            yield Member(None, "tar damaged", at, at, 0)
            if following is None:
                return
            at, start, name = following, None, None
            continue
        start, data = at if start is None else start, at + 512
        at = data + (info.size + 511) // 512 * 512 * (info.isreg() or info.type in b"LxgK")
        if info.type == tarfile.GNUTYPE_LONGNAME:
            name = read(data, min(info.size, 1 << 16)).rstrip(b"\0")
        elif info.type == tarfile.XHDTYPE:
            path = re.search(rb"(?:^|\n)\d+ path=(.*?)\n\d*", read(data, min(info.size, 1 << 16)), re.S)
            name = path[1] if path else name
        elif info.type not in b"gK":
            full = (os.fsdecode(name) if name else info.name).removeprefix("./")
            folder, slash, base = full.rpartition("/")
            stem, _, extension = base.partition(".")
            if info.isreg() and stem:  # a name that begins with a dot is a system's own
                yield Member(folder + slash + stem, extension.lower(), start, data, info.size)
            start, name, last = None, None, data + info.size
    if last <= end:
        yield Member(None, "tar cut off", at, at, 0)


def next_header(read, at, end):
    """The next offset, in steps of 512 bytes, that holds a tar header, or None."""
    while at < end:
        piece = read(at, 1 << 20)
        for place in range(0, len(piece), 512) if b"ustar" in piece else ():
            if piece[place + 257:place + 262] == b"ustar":
                try:
                    tarfile.TarInfo.frombuf(piece[place:place + 512], "utf-8", "surrogateescape")
                    return at + place
                except tarfile.HeaderError:
                    pass
        at += 1 << 20
    return None


def scan_tar(path):
    def sample():
        key, start, stop = group[0].key, group[0].start, group[-1].data + group[-1].size
        if key is None:
            return BadSample(group[0].extension, f"{path.name} at byte {start}")
        if stop > end:
            return BadSample("tar cut off", f"{path.name} in {key}")
        if not any(member.extension in SUFFIXES for member in group):
            there = " .".join(member.extension for member in group[:3])
            return BadSample("no image", f"{path.name}/{key} with .{there}")  # of a.b.jpg the key is a
        return start, stop - start, key, key

    with open(path, "rb") as file:
        descriptor, end, group = file.fileno(), os.fstat(file.fileno()).st_size, []
        for member in tar_members(lambda offset, n: os.pread(descriptor, n, offset), end):
            if group and (member.key != group[0].key or any(member.extension == other.extension for other in group)):
                yield sample()
                group = []
            group.append(member)
        if group:
            yield sample()


def parse_tar(content, records, n):
    file = records.files[n]
    key, image, text, row = "", None, {}, {}
    for key_found, extension, _, data, size in tar_members(lambda offset, n: content[offset:offset + n], len(content)):
        if extension in SUFFIXES and image is None:
            key, image = key_found, content[data:data + size]
        elif extension == "txt":
            text = {"caption": content[data:data + size].decode("utf-8-sig", errors="replace")}
        elif extension == "json":
            row = parse_json(content[data:data + size], f"{file.name}/{key_found}.json")
    if image is None:
        raise BadSample("no image", f"{file.name}/{key}")
    return Record(key, image, text | {name: value for name, value in row.items() if value})


def scan_lines(path):
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            if line.strip():
                where = f"{path.name} line {number}"
                try:
                    row = parse_json(line, where)
                    key = row_key(row)
                    yield start, len(line), key, key if row.get("key") == key else line  # a picture may have several
                except BadSample as bad:
                    torn = bad.reason == "JSON does not parse" and not line.endswith(b"\n")
                    yield BadSample("last line torn" if torn else bad.reason, where)
            start += len(line)


def parse_lines(content, records, n):
    row = parse_json(content, records.files[n].name)
    return Record(row_key(row), records.locate(n, image_field(row)), row)


def csv_row(file, path):
    """The next row of a CSV open in binary mode -> its cells (None if it does not parse), and the lines it takes."""
    taken = []

    def lines():
        while line := file.readline(LONGEST):
            taken.append(line)
            yield line.decode(errors="replace")

    return csv_cells(lines(), path, strict=True), taken


def csv_cells(lines, path, strict=False):
    try:
        return next(csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=strict), [])
    except csv.Error:
        return None


@functools.cache
def csv_names(path, _stamp):
    with open(path, "rb") as file:
        return [name.strip(" \ufeff") for name in csv_row(file, path)[0] or [""]]


def scan_csv(path):
    """The csv module finds where a row ends, since a quoted cell may hold line breaks. A quote that is never closed
    swallows the rows below it, until something is not strictly CSV: then only the first line is given up."""
    names = csv_names(path, stamp(path))
    with open(path, "rb") as file:
        lines = csv_row(file, path)[1]  # the header
        start, number = sum(map(len, lines)), len(lines) + 1
        while (found := csv_row(file, path))[1]:
            cells, lines = found
            if cells is None or len(cells) != len(names) and len(lines) > 1:
                lines = lines[:1]
                file.seek(start + len(lines[0]))
                even = lines[0].count(b'"') % 2 == 0  # quotes within quotes, as some write them
                cells = even and csv_cells([lines[0].decode(errors="replace")], path)
            content, where = b"".join(lines), f"{path.name} line {number}"
            if content.strip():
                try:
                    if not cells or len(cells) != len(names):
                        raise BadSample("row does not parse", where)
                    key = row_key(dict(zip(names, cells)), names[0])
                    yield start, len(content), key, key if "key" in names else content
                except BadSample as bad:
                    yield BadSample(bad.reason, where)
            start, number = start + len(content), number + len(lines)


def parse_csv(content, records, n):
    names = csv_names(records.files[n], records.stamps[n])
    lines = io.StringIO(content.decode(errors="replace"), newline="")
    row = dict(zip(names, csv_cells(lines, records.files[n]) or []))
    return Record(row_key(row, names[0]), records.locate(n, image_field(row, names[0])), row)


def scan_folder(folder):
    """The pictures below a folder; start and length are those of the path in the list of all paths (`list_folder`)."""
    start = 0
    for name in list_folder(folder):
        key = os.fsdecode(name).rpartition(".")[0]
        yield start, len(name), key, key
        start += len(name)


def list_folder(folder):
    names = (os.path.relpath(os.path.join(at, name), folder) for at, _, files in os.walk(folder) for name in files
             if name.rpartition(".")[2].lower() in SUFFIXES and not name.startswith("."))
    return sorted(map(os.fsencode, names))


def parse_folder(content, records, n):
    path, row = records.files[n] / os.fsdecode(content), {}
    with suppress(FileNotFoundError):
        row = {"caption": path.with_suffix(".txt").read_bytes().decode("utf-8-sig", errors="replace")}
    with suppress(FileNotFoundError):
        row |= parse_json(path.with_suffix(".json").read_bytes(), str(path.with_suffix(".json")))
    return Record(os.fsdecode(content).rpartition(".")[0], path, row)


READERS = {".tar": (scan_tar, parse_tar), ".jsonl": (scan_lines, parse_lines), ".csv": (scan_csv, parse_csv),
           ".tsv": (scan_csv, parse_csv), "": (scan_folder, parse_folder)}


def captions_path(file: Path) -> Path:
    """Where the new captions of a file or folder lie: 00000.tar -> 00000.captions.jsonl, set -> set.captions.jsonl."""
    return Path(f"{file.resolve()}.captions.jsonl") if file.is_dir() else file.with_suffix(".captions.jsonl")


def expand(pattern: str) -> list[str]:
    """{00000..00331} and {a,b}, as a shell expands them."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    first, _, last = braces[1].partition("..")
    counted = first.isdigit() and last.isdigit()
    inside = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)] if counted else braces[1].split(",")
    return [text for part in inside for text in expand(pattern[:braces.start()] + part + pattern[braces.end():])]


def find_files(pattern: str) -> list[Path]:
    """The files, all of one format, that one path of --data stands for. Raises UserError."""
    if os.path.isdir(pattern):
        return sorted(Path(pattern).glob("*.tar")) or [Path(pattern)]
    names = [pattern] if os.path.exists(pattern) else expand(pattern)
    files = [Path(name) for text in names for name in (sorted(glob.glob(text)) if glob.has_magic(text) else [text])]
    gone = [file for file in files if not file.is_file()]
    if gone or not files:
        raise UserError(f"no file {gone[0] if gone else pattern}" + f" (nor {len(gone) - 1} more)" * (len(gone) > 1) +
                        ": --data takes 'scenes', .tar shards, .jsonl, .csv or a folder")
    other = [file for file in files if file.suffix not in READERS or file.suffix != files[0].suffix]
    if other:
        raise UserError(f"--data {other[0]}: it takes 'scenes', .tar shards, .jsonl, .csv or a folder, and one pattern "
                        "stands for files of one format")
    return files


def stamp(file: Path) -> tuple[int, int]:
    """What tells whether a file has changed."""
    return file.stat().st_size, file.stat().st_mtime_ns


def index_path(file: Path) -> Path:
    """Where the index of a file is kept; another once the file has changed."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = "-".join(f"{x:x}" for x in (hashed(str(file.resolve())), *stamp(file), INDEX_VERSION))
    return Path(os.environ.get("MINILIP_CACHE") or Path(cache, "minilip"), name)


def load_index(file: Path):
    """-> (spans, BadCount), the spans mapped; None if no whole index is kept."""
    try:
        path = index_path(file)
        with open(path, "rb") as kept:
            head = kept.readline()
        n, *bad = json.loads(head)
        if path.stat().st_size == len(head) + n * SPAN.itemsize:
            return (np.memmap(path, SPAN, "r", len(head), (n,)) if n else np.zeros(0, SPAN)), BadCount(*bad)
    except (OSError, ValueError, TypeError):
        return None


def make_index(file: Path):
    """Scans a file and keeps its index. -> None, or (spans, BadCount) where it cannot be kept or the file goes on
    changing."""
    if load_index(file):
        return None  # another process was faster
    path, spans, bad, known = index_path(file), bytearray(), BadCount(), set()
    sidecar = file.name.endswith(".captions.jsonl")  # a key has a line for each model, or each time, that captioned it
    try:
        for found in READERS[file.suffix if file.is_file() else ""][0](file):
            bad.seen += 1
            if isinstance(found, BadSample):
                bad.add(found)
                continue
            start, length, key, identity = found
            if length > LONGEST:
                bad.add(BadSample("sample too large", f"{file.name} at byte {start}"))
            elif (identity := hashed(identity)) in known and not sidecar:
                bad.add(BadSample("duplicate", f"{file.name}: {key[:80]}"))
            else:
                known.add(identity)
                spans += struct.pack("<QIQ", start, length, hashed(key))  # a SPAN
    except OSError as error:
        bad.add(BadSample("file cannot be read", f"{file}: {error.strerror}"))
    spans = np.frombuffer(spans, SPAN)
    if sidecar:
        spans.sort(order="key", kind="stable")  # its lines are looked up by key
    if file.is_file():  # the time of a folder does not tell whether what is below it has changed
        keep_index(path, json.dumps([len(spans), *bad.plain()]).encode() + b"\n" + spans.tobytes())
    return None if load_index(file) else (spans, bad)


def keep_index(path: Path, content: bytes):
    """Whole or not at all, in place of older ones of the same file; where it cannot be written, it is not kept."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for old in path.parent.glob(path.name.partition("-")[0] + "-*"):
            if old != path:
                old.unlink(missing_ok=True)


def read_indices(files: list[Path]) -> list:
    """(spans, BadCount) of every file; those not known yet are scanned, in parallel where that takes long."""
    new = [file for file in files if not load_index(file)]
    start = len(new) * int(os.environ.get("LOCAL_RANK", 0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    new = new[start:] + new[:start]  # the ranks of a machine begin at different files, and meet what others have done
    progress = functools.partial(tqdm, desc="indexing", total=len(new), unit="file", delay=2, leave=False)
    if sum(file.stat().st_size for file in new) <= LARGE:
        made = dict(zip(new, map(make_index, progress(new))))
    else:  # in other processes even if it is one file, so that what scanning takes of memory is given back
        processes = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        with ProcessPoolExecutor(min(processes, len(new))) as pool:
            made = dict(zip(new, progress(pool.map(make_index, new))))
    return [made.get(file) or index_of(file) for file in files]


def index_of(file):
    """The index of a file that another process may be writing to: what is kept may be outdated before it is read."""
    return load_index(file) or make_index(file) or index_of(file)


@functools.lru_cache(maxsize=512)
def opened(file, _stamp):
    return open(file, "rb", buffering=0)


def read_span(file: Path, stamp: tuple, start: int, length: int) -> bytes:
    """By pread, which moves no position: so processes forked from this one may share an open file."""
    content = os.pread(opened(file, stamp).fileno(), length, start)
    if len(content) < length:
        raise BadSample("file cut off", f"{file} at byte {start}")
    return content


AHEAD = 1 << 22  # bytes of a shard that are asked for at once


@functools.lru_cache(maxsize=1024)
def ask_for(file, stamp, piece):
    """Has the system read a piece of a file in one go, whose samples will be wanted one by one before long: from disk
    they come two to three times as fast."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with suppress(OSError):
            os.posix_fadvise(opened(file, stamp).fileno(), piece * AHEAD, AHEAD, os.POSIX_FADV_WILLNEED)


class Records:
    """All samples of one path of --data: a file, {00000..00331}.tar, *.tar, a folder of shards or of pictures.

    records[i] -> Record, read from its file and joined with the sidecar of new captions, where there is one; raises
    BadSample. `bad`: what the index had to leave out. `image_root`: where the images of CSV and JSON lines lie, else
    beside the file.
    """

    def __init__(self, path: str, image_root: str | None = None):
        self.path, self.root = str(path), Path(image_root) if image_root else None
        self.files, self.bad = find_files(self.path), BadCount()
        _, self.parse = READERS[self.files[0].suffix if self.files[0].is_file() else ""]
        self.stamps, self.spans = [stamp(file) for file in self.files], []
        for spans, bad in read_indices(self.files):
            self.spans.append(spans)
            self.bad.merge(bad)
        self.first = np.cumsum([0, *map(len, self.spans)])  # the number of each file's first sample, and that of all
        self.listing = b"".join(list_folder(self.files[0])) if self.parse is parse_folder else None
        there = {n: path for n, path in enumerate(map(captions_path, self.files)) if path.is_file()}
        self.sidecars = {}  # number of a file -> path, stamp and spans of its new captions
        for (n, sidecar), (spans, bad) in zip(there.items(), read_indices(list(there.values()))):
            self.sidecars[n] = sidecar, stamp(sidecar), spans
            bad.seen = 0  # no samples, but what is said of them
            self.bad.merge(bad)

    def __len__(self):
        return int(self.first[-1])

    def file_of(self, i: int) -> int:
        return int(np.searchsorted(self.first, i, "right")) - 1

    def _span(self, i: int) -> tuple[int, int, int, int]:
        """Of sample i: the number of its file, where in it the sample starts, its length, the hash of its key."""
        n = self.file_of(i)
        return n, *self.spans[n][i - self.first[n]].tolist()

    def ask_around(self, i: int):
        """Asks for the piece of the file that sample i lies in."""
        n, start, *_ = self._span(i)
        ask_for(self.files[n], self.stamps[n], start // AHEAD)

    def locate(self, n: int, image: str) -> Path:
        """The image that a row of file n names: below the root; of a URL the last part counts."""
        name = urllib.parse.urlsplit(image).path.rpartition("/")[2] if "://" in image else image
        return (self.root or self.files[n].parent) / name

    def name(self, i: int) -> str:
        """Of a sample, for a message, whatever is wrong with it."""
        n, start, *_ = self._span(i)
        try:
            return f"{self.files[n].name}: {self[i].key}"
        except BadSample:
            return f"{self.files[n].name} at byte {start}"

    def keys(self) -> np.ndarray:
        """The hash of every sample's key: uint64 [N]."""
        return np.concatenate([spans["key"] for spans in self.spans])

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(i)
        n, start, length, key = self._span(i)
        file = self.files[n]
        try:
            content = (read_span(file, self.stamps[n], start, length) if self.listing is None
                       else self.listing[start:start + length])
            record = self.parse(content, self, n)
            if n in self.sidecars:
                record.row["captions"] = recaptioned(record.row) | self._new_captions(n, key)
        except OSError as error:
            raise BadSample("file cannot be read", f"{file}: {error.strerror}") from None
        return record

    def _new_captions(self, n: int, key: int) -> dict:
        """What the lines of file n's sidecar say of a key, given by its hash; of two that name a field the later."""
        path, stamp, spans = self.sidecars[n]
        first, last = (np.searchsorted(spans["key"], np.uint64(key), side) for side in ("left", "right"))
        found = {}
        for start, length, _ in spans[first:last].tolist():
            found |= recaptioned(parse_json(read_span(path, stamp, start, length), path.name))
        return found


# ---- datasets --------------------------------------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B,3,S,S] -> float32, with CLIP's mean and deviation; on the device, so that bytes are what travels."""
    mean, std = mean_and_deviation(images.device)
    return images.float().sub_(mean).div_(std)


@functools.cache  # to bring numbers to a GPU anew at every step would be to wait for it
def mean_and_deviation(device):
    return [255 * torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD)]


# A dataset: len; name(i), for messages; dataset[i], or augmented dataset.__getitem__(i, rng), -> (image uint8
# [3,S,S], Captions), or BadSample raised; `bad`, what it left out; `size`, S; order(rng, window) -> all its indices.

class SceneImages:
    """Embedded scenes. Training shifts the image by up to 1/32 of its side; it never flips: "left" is in the texts."""

    def __init__(self, split: str, n: int, size: int, kinds: int):
        self.scenes, self.train, self.size, self.bad = Scenes(split, n, size, kinds), split == "train", size, BadCount()

    def __len__(self):
        return len(self.scenes)

    def name(self, i):
        return f"scene-{self.scenes.split}-{i}"

    def __getitem__(self, i, rng=None):
        scene = self.scenes.scene(i)
        image, _ = self.scenes.draw(scene)
        c = scene.captions
        perspectives = [c[name] for name in PERSPECTIVES]
        captions = Captions(c["raw"], [c["short"]], c["long"], perspectives, self.scenes.boxes(scene))
        if self.train and rng:
            size, reach = self.size, max(1, self.size // 32)
            pad = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
            top, left = rng.randint(0, 2 * reach), rng.randint(0, 2 * reach)
            image = pad[top:top + size, left:left + size]
            x, y = (left - reach) / size, (top - reach) / size
            captions = captions.within((x, y, x + 1, y + 1))
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), captions

    def order(self, rng, window):
        return rng.permutation(len(self))


CACHE = 512 << 20  # bytes of decoded pictures that a data-loading process may keep
HELD_OUT = 5000  # samples held out for validation, or a tenth where that is less


def spread(n: int, k: int) -> list[int]:
    """k of the numbers below n, evenly spread; all, if they are fewer."""
    return np.linspace(0, n - 1, min(n, k)).astype(int).tolist()


class Pictures:
    """Records with their pictures decoded. `part`: "train", "validation" (by the hash of the key), or "all"."""

    def __init__(self, records: Records, size: int, part: str = "all", crop: float = 0.8, fields: dict = FIELDS):
        self.records, self.size, self.train, self.fields, self.crop = records, size, part == "train", fields, crop
        self.bad, self.by_shard = records.bad, records.parse is parse_tar and len(records.files) > 1
        held_out = records.keys() < np.uint64(min(0.1, HELD_OUT / max(1, len(records))) * 2**64)
        wanted = {"train": ~held_out, "validation": held_out, "all": np.ones(len(records), bool)}[part]
        self.rows = np.flatnonzero(wanted).astype(np.int32 if len(records) < 2**31 else np.int64)
        self.cache = {} if len(self) * 3 * (2 * size) ** 2 < CACHE else None  # a small set is decoded once
        self._try_a_few(part)
        if self.train:
            self._name_missing_fields()

    def _name_missing_fields(self):
        """A mistyped name in --caption-fields would otherwise cost its texts without a word."""
        named = {name for kind, names in self.fields.items() for name in names
                 if names not in (FIELDS[kind], FIELDS[kind] + DENSE)}
        for i in spread(len(self), 8) if named else ():
            with suppress(BadSample):
                named.difference_update(all_fields(self.records[int(self.rows[i])].row))
        if named and os.environ.get("RANK", "0") == "0":
            print(f"--caption-fields: none of the samples looked at in {self.records.path} has "
                  f"{' or '.join(sorted(named))}", flush=True)

    def _try_a_few(self, part):
        """A wrong image root or name of a field shows at once: not one of some samples can be used."""
        if not len(self.records) and not self.bad:
            raise UserError(f"--data {self.records.path} is empty: it takes 'scenes', .tar shards, .jsonl, .csv with a "
                            "header, or a folder that holds shards or pictures")
        if len(self.records) and not len(self):
            raise UserError(f"--data {self.records.path}: none of its {len(self.records)} samples falls to {part}: "
                            "take more data, or --eval-images 0")
        failed = BadCount()
        for i in spread(len(self), 8):
            try:
                self[i]
                return
            except BadSample as bad:
                failed.add(bad)
        tried = f", none of {failed.total} tried ({failed.report()})" if failed else ""
        left_out = f" (left out: {self.bad.report()})" if self.bad else ""
        raise UserError(f"--data {self.records.path} has no usable sample for {part}{tried}{left_out}: check "
                        "--image-root and --caption-fields, or look at it with python data.py --look")

    def __len__(self):
        return len(self.rows)

    def name(self, i):
        return self.records.name(int(self.rows[i]))

    def __getitem__(self, i, rng=None):
        number = int(self.rows[i])
        if self.train and self.by_shard:
            self.records.ask_around(number)
        record = self.records[number]
        name = f"{self.records.files[self.records.file_of(number)].name}: {record.key}"
        captions = read_captions(record.row, self.fields, name)
        picture = self._picture(i, record.image, name)
        (w, h), box = picture.size, crop_box(*picture.size, *((self.crop, rng) if self.train else ()))
        picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
        captions = captions.within((box[0] / w, box[1] / h, box[2] / w, box[3] / h))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1), captions

    def _picture(self, i, source, name):
        enough = math.ceil(self.size / math.sqrt(self.crop * ASPECT)) if self.train else self.size  # for the least crop
        if self.cache is None:
            return load_image(source, enough, name=name)
        if i not in self.cache:
            picture = load_image(source, 2 * self.size, name=name)
            shrink = max(1, min(picture.size) / (2 * self.size))
            size = [max(1, round(x / shrink)) for x in picture.size]
            self.cache[i] = picture if shrink == 1 else picture.resize(size, Image.Resampling.BICUBIC)
        return self.cache[i]

    def order(self, rng, window):
        """Single samples in any order, where each is a file of its own or all are in one; shards so that what is read
        before long lies together."""
        if not self.by_shard:
            return rng.permutation(len(self))
        return shard_order(np.diff(np.searchsorted(self.rows, self.records.first)), rng, window)


class Sets:
    """Several datasets as one."""

    def __init__(self, parts: list):
        self.parts, self.size, self.bad = parts, parts[0].size, BadCount()
        self.first = np.cumsum([0, *map(len, parts)])
        for part in parts:
            self.bad.merge(part.bad)

    def __len__(self):
        return int(self.first[-1])

    def _find(self, i):
        part = int(np.searchsorted(self.first, i, "right")) - 1
        return self.parts[part], i - int(self.first[part])

    def name(self, i):
        part, i = self._find(i)
        return part.name(i)

    def __getitem__(self, i, rng=None):
        part, i = self._find(i)
        return part.__getitem__(i, rng)


def open_dataset(data, part: str, n: int, size: int, kinds: int, crop: float = 0.8, image_root: str | None = None,
                 caption_fields: str = "", dense: bool = False):
    """--data, one path or several -> dataset. part: train, validation or test; n: how many scenes; dense: the crops'
    sentences are among the long captions. Raises UserError."""
    fields = read_fields(caption_fields, dense)

    def open_one(path):
        if path != "scenes":
            records = Records(path, image_root)
            return Pictures(records, size, "validation" if part == "test" else part, crop, fields)
        try:
            return SceneImages(part, n, size, kinds)
        except ValueError as error:
            raise UserError(f"--kinds: {error}") from None

    parts = [open_one(path) for path in ([data] if isinstance(data, str) else data)]
    return parts[0] if len(parts) == 1 else Sets(parts)


def check_boxes(dataset, n: int = 64):
    """Raises UserError if of n samples of each set, spread over it, not one has a sentence with a place."""
    for part in getattr(dataset, "parts", [dataset]):
        for i in spread(len(part), n):
            with suppress(BadSample):
                if part[i][1].boxes:
                    return
    raise UserError(f"--region-grouping: none of {n} samples looked at has a sentence with a place; caption crops with "
                    "recaption.py --dense 2, or name their field, as in --caption-fields long=long+denseX_captions")


# ---- the order of samples, and batches -------------------------------------------------------------------------------

TOGETHER = 8  # shards read at a time


def shard_order(counts, rng, window: int) -> np.ndarray:
    """Numbers of the samples of shards with these counts, in the order they are read: shards in random order, some of
    them together and in turn, then all shuffled within windows of so many samples."""
    first, order = np.cumsum([0, *counts]), []
    files = rng.permutation(len(counts))
    for some in np.split(files, range(TOGETHER, len(files), TOGETHER)):
        numbers = np.concatenate([np.arange(first[file], first[file + 1]) for file in some])
        turns = np.concatenate([(np.arange(counts[file]) + rng.random()) / max(1, counts[file]) for file in some])
        order.append(numbers[np.argsort(turns)])
    order = np.concatenate(order)
    for start in range(0, len(order), window):
        rng.shuffle(order[start:start + window])
    return order


class Order:
    """The endless stream of samples: order(position) -> (epoch, index), a function of the seed alone. An epoch has every
    sample of every set once, the sets mixed evenly."""

    def __init__(self, dataset, seed: int, window: int):
        self.parts, self.seed, self.window = getattr(dataset, "parts", [dataset]), seed, window
        self.first = np.cumsum([0, *map(len, self.parts)]).tolist()
        self.epoch = functools.lru_cache(1)(self._epoch)  # positions come in order, or nearly

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.first[-1])
        return epoch, int(self.epoch(epoch)[place])

    def _epoch(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        orders = [part.order(rng, self.window) + first for part, first in zip(self.parts, self.first)]
        if len(orders) == 1:
            return orders[0]
        when = np.concatenate([(np.arange(len(order)) + rng.random(len(order))) / len(order) for order in orders])
        return np.concatenate(orders)[np.argsort(when)]


def local_batches(order, batch: int, first: int, last: int, rank: int = 0, world: int = 1):
    """The (epoch, index) pairs of each step's local batch: the stream cut into global batches, of which this rank takes
    its share. Starts at any step without walking there."""
    local = batch // world
    for step in range(first, last):
        start = step * batch + rank * local
        yield [order(position) for position in range(start, start + local)]


@dataclass
class Batch:
    images: torch.Tensor  # uint8 [B,3,S,S]
    tokens: torch.Tensor  # int64 [B,T,L], cut to the batch's longest text
    lengths: np.ndarray  # int64 [B,T]: tokens of each text, both end tokens counted; on the host, so no device is asked
    allowed: torch.Tensor | None = None  # bool [B,T,P], with --region-grouping: the patches in each text's box
    bad: list[BadSample] = field(default_factory=list)  # met on the way to these samples

    def pin_memory(self):
        allowed = None if self.allowed is None else self.allowed.pin_memory()
        return replace(self, images=self.images.pin_memory(), tokens=self.tokens.pin_memory(), allowed=allowed)


ATTEMPTS = 100  # samples tried in the place of a bad one


class TrainingTexts(torch.utils.data.Dataset):
    """dataset[(epoch, index)] -> image uint8 [3,S,S], tokens [T,L], with --region-grouping the patches in each text's
    box [T,P] (bool), else None, and the BadSamples met: in the place of a bad sample stands another, at random.

    All randomness comes from (seed, epoch, index), so a sample is the same whichever worker or rank draws it, and after
    a restart. `at` [workers, 2], shared by the processes, holds what each worker is reading.
    """

    def __init__(self, dataset, tokenizer, settings):
        self.dataset, self.tokenizer, self.settings = dataset, tokenizer, settings
        self.at = torch.full((max(1, settings.workers), 2), -1).share_memory_()

    def __getitem__(self, where):
        epoch, index = where
        worker = torch.utils.data.get_worker_info()
        self.at[worker.id if worker else 0] = torch.tensor(where)
        s, bad = self.settings, []
        for attempt in range(ATTEMPTS):
            rng = random.Random(f"{s.seed} {epoch} {index} {attempt}" if attempt else f"{s.seed} {epoch} {index}")
            try:
                image, captions = self.dataset.__getitem__(rng.randrange(len(self.dataset)) if attempt else index, rng)
                break
            except BadSample as problem:
                bad.append(problem)
        else:
            raise UserError(f"{ATTEMPTS} samples in a row are bad, the last one: {bad[-1]}")
        texts, boxes = zip(*draw_texts(captions, s, rng))
        allowed = patches_of(boxes, s.image_size // s.patch) if s.region_grouping else None
        return image, self.tokenizer(texts, s.context), allowed, bad


def collate(samples) -> Batch:
    images, tokens, allowed, bad = zip(*samples)
    tokens = torch.stack(tokens)
    lengths = tokens.argmax(-1) + 1  # the end-of-text token has the greatest id
    tokens = tokens[..., :int(lengths.max())].contiguous()
    allowed = None if allowed[0] is None else torch.stack(allowed)
    return Batch(torch.stack(images), tokens, lengths.numpy(), allowed, [problem for some in bad for problem in some])


def begin_worker(_number):
    """Ctrl-C is for the main process, which saves and ends; a worker dies of SIGTERM as usual, though its parent does
    not. Its garbage collector leaves alone what was there before the fork, or it would copy all that memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()


def training_loader(dataset, tokenizer, settings, first: int, last: int, rank: int = 0, world: int = 1):
    """The batches of steps first..last, as `collate` makes them. Raises UserError when a worker dies."""
    order = Order(dataset, settings.seed, settings.shuffle_buffer)
    samples = TrainingTexts(dataset, tokenizer, settings)
    loader = torch.utils.data.DataLoader(
        samples, batch_sampler=local_batches(order, settings.batch, first, last, rank, world), collate_fn=collate,
        num_workers=settings.workers, prefetch_factor=4 if settings.workers else None, worker_init_fn=begin_worker,
        pin_memory=torch.cuda.is_available())
    return watched(loader, samples)


def watched(loader, samples):
    """The loader's batches; a worker's death becomes one sentence that names the samples at hand."""
    batches = iter(loader)
    if samples.settings.workers:  # else PyTorch raises from a signal handler, anywhere in the main program
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:  # the last two: a dead worker was about to hand over a batch
        if "DataLoader worker (pid" not in str(error) and (isinstance(error, RuntimeError) or "Caught" in str(error)):
            raise
        at = [samples.dataset.name(index) for _, index in samples.at.tolist() if index >= 0]
        raise UserError(f"a data-loading process died ({str(error).splitlines()[0]}) while they were reading "
                        f"{', '.join(at)}: if memory ran out, lower --workers; else look at these samples") from None


# ---- a look at data --------------------------------------------------------------------------------------------------

def look(path, image_root, fields, tokenizer, n, sheet):
    """Prints what one path of --data holds and what n samples, drawn at random, are like; draws some into a file."""
    if path == "scenes":
        raise UserError("scenes are drawn, not read: look at them with python scenes.py --sheet scenes.png")
    records, bad, shown, names = Records(path, image_root), BadCount(), [], Counter()
    print(f"{path}: {len(records.files)} file{'s' * (len(records.files) > 1)}, {len(records):,} samples"
          + (f"; left out: {records.bad.report()}" if records.bad else ""))
    sizes, lengths = [], {"raw caption": [], "short caption": [], "sentence of long": [], "whole long": []}
    for i in tqdm(np.random.default_rng(0).permutation(len(records))[:n].tolist(), "reading", delay=2, leave=False):
        try:
            record = records[i]
            names.update(name for name, value in all_fields(record.row).items() if value)
            c, picture = read_captions(record.row, fields, record.key), load_image(record.image, name=record.key)
        except BadSample as error:
            bad.add(error)
            continue
        sizes.append(picture.size)
        for found, texts in zip(lengths.values(), ([c.raw], c.short, c.long, [" ".join(c.long)])):
            found += [len(tokenizer.encode(text)) + 2 for text in texts]  # with start and end
        if len(shown) < 24:
            picture.thumbnail((256, 256))
            shown.append((record.key, picture, c))
    print(f"{len(sizes) + bad.total:,} looked at, {bad.total} bad" + (f": {bad.report()}" if bad else ""))
    if names:
        print("fields: " + ", ".join(f"{name} {count:,}" for name, count in names.most_common()))
    if sizes:
        print("median picture {:.0f} x {:.0f} pixels".format(*np.median(sizes, 0)))
    for kind, found in lengths.items():
        if found:
            histogram(kind, np.array(found))
    if sheet and shown:
        try:
            contact_sheet(sheet, shown)
        except (OSError, ValueError) as error:
            raise UserError(f"--sheet {sheet} cannot be written: {error}") from None
        print(f"\nwrote {sheet}")


def histogram(kind, lengths):
    print(f"\n{kind}: {len(lengths):,}, tokens: mean {lengths.mean():.0f}, median {np.median(lengths):.0f}, "
          f"99% up to {np.quantile(lengths, 0.99):.0f}, over 77: {100 * (lengths > 77).mean():.1f}%")
    width = lengths.max() // 12 + 1
    counts = np.bincount(lengths // width)
    for i in range(lengths.min() // width, len(counts)):
        bar = "█" * math.ceil(50 * counts[i] / counts.max())
        print(f"{i * width:6} - {(i + 1) * width - 1:4} {bar:50} {counts[i]}")


def contact_sheet(path, shown):
    """Draws (key, picture, Captions) triples into a picture file, three in a row."""
    import textwrap
    import matplotlib.pyplot as plt
    rows = math.ceil(len(shown) / 3)
    figure, axes = plt.subplots(rows, 6, figsize=(19, 2.5 * rows), width_ratios=(1, 1.6) * 3, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for (key, picture, c), left, right in zip(shown, axes[:, ::2].flat, axes[:, 1::2].flat):
        left.imshow(picture)
        texts = [key[-44:], f"RAW {c.raw}", *(f"SHORT {text}" for text in c.short), "LONG " + " | ".join(c.long)]
        lines = [line for text in texts for line in textwrap.wrap(text, 46)]
        text = "\n".join(lines[:12] + ["..."] * (len(lines) > 12))
        right.text(0, 1, text, va="top", fontsize=9.5, transform=right.transAxes, parse_math=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def learn_vocabulary(path, size):
    scenes = Scenes("train", n=20_000, kinds=len(KINDS))
    captions = [scenes.scene(i).captions for i in range(len(scenes))]
    ranks = train_bpe((t for c in captions for text in c.values() for t in clean_field(text)), size)
    Path(path).parent.mkdir(exist_ok=True)
    save_tiktoken(path, ranks)
    print(f"{len(ranks)} tokens in {path}")


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--look", metavar="DATA", help="print counts, bad samples and lengths of captions")
    task.add_argument("--train-bpe", metavar="FILE", help="learn the scenes' vocabulary, in tiktoken's format")
    parser.add_argument("--look-images", type=int, default=1000, metavar="N", help="samples to read (default 1000)")
    parser.add_argument("--sheet", metavar="FILE", help="write a contact sheet with captions")
    parser.add_argument("--image-root", help="where the image paths in .csv and .jsonl begin")
    parser.add_argument("--caption-fields", default="", help='names of fields, like "raw=title,long=a+b"')
    parser.add_argument("--tokenizer", default="auto", help="to count tokens with")
    parser.add_argument("--vocab", type=int, default=1024, help="size of the vocabulary to learn")
    try:
        options = parser.parse_args()
        if options.train_bpe:
            learn_vocabulary(options.train_bpe, options.vocab)
        else:
            look(options.look, options.image_root, read_fields(options.caption_fields),
                 load_tokenizer(options.tokenizer), options.look_images, options.sheet)
    except UserError as error:
        sys.exit(f"error: {error}")
