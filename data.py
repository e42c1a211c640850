"""From files to batches: tokenizer, sentences, pictures, captions, the texts each method draws, records, order.

    tokenizer = load_tokenizer("clip")
    tokens = tokenizer(["a photo of a dog", "a cat"], 77)  # [2, 77]: start, ids, end, zeros
    split_sentences("A dog, approx. 3.5 ft. tall. It runs...")  # ["A dog, approx. 3.5 ft. tall.", "It runs..."]
    image = load_image("dog.png")  # PIL, RGB, upright, on white
    records = Records("cc3m/{00000..00331}.tar")  # or .jsonl, .csv, a folder: records[7].key, .image, .row

    python data.py --look DATA --sheet sheet.html        counts, bad samples, lengths of captions, pictures
    python data.py --join captions.csv 'cc3m/*.tar'      captions of a table -> NAME.captions.jsonl beside shards
    python data.py --shards 'recap/*.parquet' FOLDER     Parquet with the pictures inside -> tar shards

First reading: `Captions`, `text_slots`, `draw_texts`, `Batch`, `TrainingSamples`. The rest reads tokens and files.
"""

import argparse
import base64
import csv
import ctypes
import fcntl
import functools
import gc
import glob
import gzip
import hashlib
import html
import importlib.util
import io
import json
import math
import os
import random
import re
import signal
import sys
import tarfile
import warnings
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # tiktoken's own dependency: CLIP's word pattern needs \p{L}, which re lacks
import tiktoken
import torch
from PIL import Image, ImageOps
from tiktoken.load import load_tiktoken_bpe
from tqdm import tqdm

from scenes import PERSPECTIVES, Scenes, UserError


class Parser(argparse.ArgumentParser):
    """argparse that keeps the lines of a description; its errors are UserErrors, without the list of all flags."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise UserError(f"{message} (--help lists what there is)")


@dataclass
class BadSample(Exception):
    """A sample to skip and count."""

    reason: str  # one of a few short ones, by which bad samples are counted
    detail: str = ""  # which sample, and why

    def __str__(self):
        return f"{self.reason}: {self.detail}"


@functools.cache
def say_once(message):
    print(message, flush=True)


def check_target(path, is_folder=False):
    """Raises UserError if the file or folder cannot be written: called before the work, not after it."""
    path = Path(path)
    there = path if path.exists() else path.parent
    fits = path.is_dir() == is_folder if path.exists() else there.is_dir()
    if not (fits and os.access(there, os.W_OK)):
        raise UserError(f"{path} cannot be written: name a {'folder' if is_folder else 'file'} in a folder that exists "
                        "and can be written")


def read_json(path: Path):
    """The content of a JSON file, for JSON lines a list. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "jsonl" not in path.suffix:
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error})") from None


def write_json(path: Path, content):
    path.write_text(json.dumps(content, indent=1))


def run_script(main):
    """Runs a script's main function, whose result is the exit status; an error that the user can mend is one line."""
    try:
        status = main()
    except (UserError, OSError) as error:
        status = f"error: {error}"
    except KeyboardInterrupt:
        status = 130
    if status:
        sys.exit(status)


def lock(file) -> bool:
    """Locks an open file until it is closed -> False if another process has it locked. Where the file system has no
    locks, nothing is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def at_least(least: int):
    """A type for argparse: a whole number that is not below `least`."""
    def number(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    return number


# ---- tokenizer -------------------------------------------------------------------------------------------------------

SCENES_VOCABULARY = Path(__file__).parent / "assets" / "scenes.tiktoken"
CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
CLIP_MERGES = 49152 - 256 - 2  # the file lists more; CLIP uses the first 48,894

SOT, EOT = "<start_of_text>", "<end_of_text>"  # open_clip reads these two as special inside a caption as well; so do we
WORDS = regex.compile(rf"{SOT}|{EOT}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE)


def clean_text(text, fix_text):
    """CLIP's cleaning: ftfy's repair if `fix_text` is given, HTML entities (twice), single spaces, lower case."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # most captions have nothing to repair
        text = fix_text(text) if fix_text else text
        text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


class Tokenizer:
    """Byte-level BPE over CLIP's words: tokenizer(texts, context_length) -> LongTensor [N, context_length].

    CLIP marks the last symbol of a word with '</w>'. Here the mark is a space, which no cleaned word contains, so
    that tiktoken, which merges plain bytes, can see it: CLIP's 'dog</w>' is the token b"dog ". `ranks` maps each token
    to its rank, which is its id; the two ids above them are start and end of text, so the end is a row's greatest id.
    """

    def __init__(self, name, ranks, fix_text=None):
        self.name = name
        self.fix_text = fix_text
        self.sot = len(ranks)
        self.eot = self.sot + 1
        self.vocab_size = self.eot + 1
        self.encoding = tiktoken.Encoding(
            name, pat_str="[^ ]+ ", mergeable_ranks=ranks, special_tokens={SOT: self.sot, EOT: self.eot})

    def encode(self, text):
        """Ids of a text, without start and end."""
        words = WORDS.findall(clean_text(text, self.fix_text))  # "it's 10!" -> it, 's, 1, 0, !
        closed = "".join(word + " " for word in words)
        return self.encoding.encode(closed, allowed_special="all", disallowed_special=())

    def __call__(self, texts, context_length):
        """N texts -> LongTensor [N, context_length]: start, ids, end, zeros; the end survives a cut."""
        return padded([[self.sot, *self.encode(text)] for text in texts], self.eot, context_length)


def padded(rows, end, length):
    """N lists of ids -> LongTensor [N, length]: of each row what fits, then the id `end`, then zeros."""
    tokens = np.zeros((len(rows), length), dtype=np.int64)
    for row, ids in zip(tokens, rows):
        ids = ids[:length - 1] + [end]
        row[:len(ids)] = ids
    return torch.from_numpy(tokens)


def load_tokenizer(name_or_path):
    """"clip" (CLIP's ids, exactly), "scenes" (our own, small), "auto" (clip if its vocabulary is found, else scenes,
    and a line says so), or the path of a CLIP-style .txt.gz or of a .tiktoken file. Raises UserError."""
    name = str(name_or_path)
    if name == "auto":
        try:
            return load_tokenizer("clip")
        except UserError as error:
            say_once(f"TOKENIZER: scenes instead of clip, so real captions take more tokens, because {error}")
            name = "scenes"
    if name.endswith("vocab.txt"):
        return WordPieces(name)
    path = name
    if name == "clip":
        path = str(find_clip_vocabulary())
    if name == "scenes":
        path = str(SCENES_VOCABULARY)
    try:
        if path.endswith(".txt.gz"):
            return Tokenizer(name, read_clip_ranks(path), find_ftfy())
        if path.endswith(".tiktoken"):
            return Tokenizer(name, load_tiktoken_bpe(path))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} is not a vocabulary ({error}): check --tokenizer") from None
    raise UserError(f"no tokenizer {name!r}: take auto, clip, scenes, or the path of a .tiktoken or .txt.gz file")


class WordPieces:
    """BERT's tokenizer as LoTLIP uses it, from bert-base-uncased's vocab.txt: [CLS], sentences separated by [SEP], and
    at the end a [SEP] with an id of its own, the greatest."""

    name = "vocab.txt"

    def __init__(self, path):
        try:
            from tokenizers import BertWordPieceTokenizer
        except ImportError:
            raise UserError("LoTLIP reads texts in BERT's word pieces: pip install tokenizers") from None
        if not Path(path).is_file():
            raise UserError(f"no {path}: put bert-base-uncased's vocab.txt there or name it with --tokenizer")
        self.pieces = BertWordPieceTokenizer(str(path), lowercase=True)
        self.vocab_size = self.pieces.get_vocab_size() + 1

    def __call__(self, texts, context_length):
        rows = [self.pieces.encode(text.replace(". ", "[SEP]")).ids[:-1] for text in texts]
        return padded(rows, self.vocab_size - 1, context_length)


def find_ftfy():
    try:
        import ftfy
        return ftfy.fix_text
    except ImportError:
        say_once("ftfy is not installed: garbled Unicode is left as it is, where CLIP repairs it (pip install ftfy)")


def find_clip_vocabulary():
    """Path of CLIP's vocabulary: in the cache, or in an installed open_clip (not imported). Raises UserError."""
    path = cached = Path.home() / ".cache" / "clip" / CLIP_VOCABULARY
    package = importlib.util.find_spec("open_clip")
    if package and not cached.is_file():
        path = Path(package.origin).with_name(CLIP_VOCABULARY)
    if not path.is_file():
        raise UserError(f"CLIP's vocabulary is not here: pip install open_clip_torch, or put {CLIP_VOCABULARY} of "
                        f"OpenAI's CLIP at {cached}, or choose --tokenizer scenes")
    return path


def printable_bytes() -> dict[str, int]:
    """GPT-2's table {printable character: the byte that it stands for}, in the order of the first ids."""
    printable = [byte for byte in range(33, 256) if chr(byte).isprintable()]
    others = [byte for byte in range(256) if byte not in printable]
    characters = map(chr, [*printable, *range(256, 256 + len(others))])
    return dict(zip(characters, printable + others))


def read_vocabulary(path) -> tuple[list[str], list[str]]:
    """CLIP's merges, each two symbols with a space between, and its symbols in the order of the ids: 256 bytes, the
    same 256 at the end of a word, and one for each merge. Raises UserError."""
    lines = gzip.decompress(Path(path).read_bytes()).decode().splitlines()
    merges = lines[1:1 + CLIP_MERGES]
    symbols = list(printable_bytes())
    symbols += [symbol + "</w>" for symbol in symbols]
    symbols += [merge.replace(" ", "") for merge in merges]
    return merges, symbols


def read_clip_ranks(path):
    """CLIP's merges file -> {token: rank}. Raises UserError.

    The file writes bytes as printable characters. Bytes at the end of a word rank before every merge, so tiktoken first
    joins a word's last byte and its space, which is how CLIP's merging starts.
    """
    byte_of = printable_bytes() | {" ": 32}  # a space takes the place of CLIP's mark
    _, symbols = read_vocabulary(path)
    ranks = {}
    for rank, symbol in enumerate(symbols):
        characters = symbol.replace("</w>", " ")
        ranks[bytes(byte_of[character] for character in characters)] = rank
    return ranks


def write_clip_tokenizer(folder: Path, context: int):
    """CLIP's tokenizer as transformers.CLIPTokenizer reads it from a folder. Raises UserError."""
    merges, symbols = read_vocabulary(find_clip_vocabulary())
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, SOT, EOT])}
    config = dict(tokenizer_class="CLIPTokenizer", do_lower_case=True, model_max_length=context,
                  bos_token=SOT, eos_token=EOT, unk_token=EOT, pad_token=EOT)
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    write_json(folder / "tokenizer_config.json", config)


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
INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")  # J, U.S, without the last stop
FIRST_WORDS = set("""A An The This That These Those There Here It Its He She His Her They Their We You In On At To From
    With Behind Below Beside Above Under Near Next Over Around Between Both Two Three Some Several Many One Another
    Each And But As While Overall""".split())


def split_sentences(text):
    """A caption -> its sentences with single spaces, none empty, no word lost (list marks and end markers are dropped).

    Linear in the length of the text. A line break always ends a sentence. A stop does, unless it belongs to an
    abbreviation, or the text continues in lower case after a quotation or an ellipsis.
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
    core = word.rstrip(CLOSERS)
    following = following.lstrip(OPENERS)
    name = core.lstrip(OPENERS).removesuffix(".")
    if not core.endswith((".", "!", "?", "…")) or is_abbreviation(name, following):
        return False
    pauses = core != word or core.endswith(("..", "…"))
    return not (pauses and following[:1].islower())


def is_abbreviation(name, following):
    lower = name.lower()
    if lower in MAYBE_LAST or INITIALS.fullmatch(name):
        return re.split(r"\W", following, maxsplit=1)[0] not in FIRST_WORDS
    return lower in NEVER_LAST or (lower in BEFORE_NUMBER and following[:1].isdigit())


# ---- pictures --------------------------------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # none for which Pillow starts another program, such as EPS
SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
Image.MAX_IMAGE_PIXELS = 32_000_000  # Pillow refuses twice as many: a small file could fill the memory
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # and would warn from 32 million on


def load_image(source, size=None, name=None):
    """A path, bytes or a binary file -> PIL image: RGB, turned upright by its EXIF tag, transparent parts on white.

    `size`: the shorter side that is needed; a JPEG is decoded at 1/2, 1/4 or 1/8, much faster, if that is large enough.
    Raises BadSample with the reason "image missing", "image too large" or "image will not decode", and `name` (else the
    path) in its detail.
    """
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    name = name or source
    try:
        with Image.open(source, formats=FORMATS) as image:
            if size:
                image.draft(None, (size, size))  # does nothing to other formats
            image.load()
            return to_rgb(upright(image))
    except Exception as error:  # decoders raise nearly anything on broken files: OSError, SyntaxError, struct.error ...
        known = {FileNotFoundError: "image missing", Image.DecompressionBombError: "image too large"}
        reason = known.get(type(error), "image will not decode")
        detail = re.sub(r" <_io.*", "", str(error))  # an address in memory, different in every process
        raise BadSample(reason, f"{name}, {detail}") from None


def upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block is common on the web, and the picture is still good
        return image


def to_rgb(image):
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion clips at 255
        grey = np.asarray(image) / 257  # 65535 -> 255
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


ASPECTS = (3 / 4, 4 / 3)  # least and greatest width / height of a random crop


def crop_box(picture, least: float | None):
    """(left, top, right, bottom) of what to keep of a PIL picture: the middle square (None), or torchvision's random
    resized crop (1409.4842) of at least the share `least` of its area."""
    width, height = picture.size
    if least is None:
        side = min(width, height)
        left = (width - side) / 2
        top = (height - side) / 2
        return left, top, left + side, top + side
    from torchvision.transforms import RandomResizedCrop  # here, because it takes a second to import
    top, left, height, width = RandomResizedCrop.get_params(picture, [least, 1], ASPECTS)
    return left, top, left + width, top + height


def change_colours(image: torch.Tensor) -> torch.Tensor:
    """The rest of the strong recipe in DreamLIP's transform.py: jitter, grey and blur. Its flips and RandAugment are
    missing: they move things away from their boxes, and from words like "left". uint8 [3,S,S] -> the same."""
    from torchvision.transforms import v2
    change = v2.Compose([
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.5),
    ])
    return change(image)


# ---- captions and the texts drawn from them --------------------------------------------------------------------------

# The fields that hold each kind of text, by the names that published files use: DreamLIP's columns (SV ShareGPT4V, IB
# InstructBLIP, LLA LLaVA-1.5), img2dataset's and Holistic CLIP's "caption", re-captioning's own; Hugging Face's "text",
# Recap-DataComp (org_, re_caption), PixelProse (original_, vlm_caption), CaptionEmporium (caption_llava), DOCCI
# ("description"), DCI (short_, extra_caption), IIW, and "conversations", whose answer is a long caption (ShareGPT4V,
# LLaVA-ReCap). For "raw" and "caption" the first field found counts; short and long captions come from all of them.
# `--caption-fields` names others.
FIELDS = {
    "caption": ("caption",),  # a string, or a list of M texts, the raw caption first
    "raw": ("raw", "raw_caption", "text", "org_caption", "original_caption"),
    "short": ("short", "shortSV_captions", "shortIB_captions", "shortLLA_captions", "caption_llava_short",
              "short_caption"),
    "long": ("long", "longSV_captions", "longIB_captions", "longLLA_captions", "long_caption", "description",
             "re_caption", "vlm_caption", "caption_llava", "extra_caption", "IIW", "conversations"),
    **{name: (name,) for name in PERSPECTIVES[1:]},
}
DENSE = ("dense", "denseSV_captions", "denseIB_captions", "denseLLA_captions")  # "long", too, with --region-grouping


class Sentence(NamedTuple):
    """A sentence of a long caption."""

    text: str
    box: tuple | None = None  # of what it describes: (left, top, right, bottom) as shares of the image; None: not known
    model: str = ""  # that wrote the caption


@dataclass
class Captions:
    """The texts of one image. No kind is ever missing: what the data lacks is filled in from what it has."""

    raw: str  # the caption found with the image
    short: list[str]  # one-sentence captions, one of each captioning model
    long: list[Sentence]  # of the long captions
    perspectives: list[str]  # Holistic CLIP's M texts, the raw caption first

    def long_captions(self) -> list[list[str]]:
        """The sentences of each model's long caption."""
        captions = {}
        for sentence in self.long:
            captions.setdefault(sentence.model, []).append(sentence.text)
        return list(captions.values())

    def within(self, crop: tuple) -> "Captions":
        """The captions of a crop of the image: their boxes become shares of the crop. A sentence is dropped if the
        centre of its box is outside; if none would be left, all stay, without boxes.

        crop and boxes: (left, top, right, bottom) as shares of the image.
        """
        first, last = np.reshape(crop, (2, 2))
        kept = []
        for sentence in self.long:
            if sentence.box:
                corners = np.reshape(sentence.box, (2, 2))
                middle = corners.mean(0)
                if (middle < first).any() or (middle > last).any():
                    continue
                shares = (corners - first) / (last - first)
                sentence = sentence._replace(box=tuple(shares.clip(0, 1).flatten().tolist()))
            kept.append(sentence)
        return replace(self, long=kept or [sentence._replace(box=None) for sentence in self.long])


def read_fields(text: str, dense: bool = False) -> dict:
    """"raw=title,long=a+b" -> FIELDS with these names instead; `dense`: the default "long" includes the crops'
    captions. Raises UserError."""
    fields = FIELDS | {"long": FIELDS["long"] + DENSE * dense}
    for part in filter(None, text.split(",")):
        kind, _, names = part.strip().partition("=")
        if kind not in fields or not names:
            raise UserError(f"--caption-fields: {part!r} is not like long=field or long=field+field, with one of "
                            + ", ".join(fields))
        fields[kind] = names.split("+")
    return fields


def recaptioned(row: dict) -> dict:
    """The object under "captions", where re-captioning puts its texts."""
    captions = row.get("captions")
    return captions if isinstance(captions, dict) else {}


def all_fields(row: dict) -> dict:
    """The row's fields with those under "captions", which override fields of the same name."""
    return row | recaptioned(row)


LONGEST_TEXT = 100_000  # characters; a longer one is no caption but a damaged file


def read_captions(row: dict, fields: dict = FIELDS, name: str = "") -> Captions:
    """A row of a data file -> its texts, found by the names in `fields`. A text may be a string or a list of its
    sentences; a long caption also a list of {"box": [x0, y0, x1, y1] as shares of the image, "text": sentences}. Raises
    BadSample, with `name` in its detail, if there is no text or a box is not valid."""
    row = all_fields(row)
    found = {}  # kind: the texts of all its fields
    for kind, names in fields.items():
        texts = [" ".join(clean_field(row.get(column), name)) for column in names]
        found[kind] = list(filter(None, texts))
    caption_list = []
    for column in fields["caption"]:
        caption_list = caption_list or clean_field(row.get(column), name)
    perspectives = ["".join(found[kind][:1]) for kind in PERSPECTIVES[1:]]  # "" where one is missing; without "raw"
    # raw: the first text there is
    candidates = [*found["raw"], *caption_list[:1], *found["short"], *found["long"], *perspectives]
    raw = next(filter(None, candidates), None)
    if not raw:
        raise BadSample("no caption", name)

    # long: the sentences of the long captions, else of the rest of "caption", else of raw
    long = []
    for column in fields["long"]:
        model = column.removeprefix("long").removeprefix("dense")  # longSV and denseSV are one model's
        for text, box in placed_texts(row.get(column), name):
            long += [Sentence(sentence, box, model) for sentence in split_sentences(text)]
    if not long:
        rest = "\n".join(caption_list[1:] or [raw])
        long = list(map(Sentence, split_sentences(rest)))
    # perspectives: from fields with their names, else the rest of "caption"
    if not any(perspectives):
        perspectives = caption_list[1:]
    return Captions(raw, found["short"], long or [Sentence(raw)], [raw, *perspectives])


def clean_field(value, name="") -> list[str]:
    """The texts of a field, without their boxes."""
    return [text for text, _ in placed_texts(value, name)]


def placed_texts(value, name) -> list[tuple[str, tuple | None]]:
    """The texts of a field, a string or a list, stripped, each with its box or None; anything else is dropped. Raises
    BadSample."""
    placed = []
    for part in value if isinstance(value, list) else [value]:
        box = None
        if isinstance(part, dict):
            box = part.get("box")
            part = part.get("value" if part.get("from") == "gpt" else "text")  # "value": an answer in a conversation
        if box is not None:
            box = read_box(box, name)
        if isinstance(part, str) and part.strip():
            placed.append((part.strip()[:LONGEST_TEXT], box))
    return placed


def read_box(box, name) -> tuple[float, ...]:
    with suppress(TypeError, ValueError, OverflowError):  # raised if it is not four numbers
        left, top, right, bottom = map(float, box)
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
            return left, top, right, bottom
    raise BadSample("not a box", f"{name}, {str(box)[:60]} is not [x0, y0, x1, y1] from 0 to 1")


def text_slots(s) -> list[str]:
    """The kind of text in each of the T slots, from the settings: "raw", "sub" (sub-caption), "long", "perspective"."""
    slots = ["raw"] * s.raw_caption + ["sub"] * s.sub_captions
    return slots + ["long"] * s.long_texts + ["perspective"] * s.perspectives


def draw_texts(c: Captions, s, rng: random.Random) -> list[tuple[str, tuple | None]]:
    """The T texts of one image for one step, in the order of text_slots, each with its box or None.

    Sub-captions (DreamLIP, section 3.2) are drawn, without replacement while they last, from a pool: the sentences, the
    short captions, the raw one unless it has a slot of its own, and, with probability `whole_caption`, a whole long
    caption as one text. Long texts (LoTLIP, section 3.1) join `long_sentences` consecutive sentences (0: all) of one
    model's caption; each comes from another model while they last. A perspective that is missing is drawn like a
    sub-caption.
    """
    captions = c.long_captions()
    rng.shuffle(captions)  # a single caption uses up no random number
    pool = [(sentence.text, sentence.box) for sentence in c.long]
    if s.short_caption:
        pool += [(text, None) for text in c.short]
    if not s.raw_caption:
        pool.append((c.raw, None))
    if rng.random() < s.whole_caption:
        pool.append((" ".join(captions[0]), None))

    texts = [(c.raw, None)] * s.raw_caption
    texts += draw_sub_captions(pool, s.sub_captions, s.sampling, rng)
    for j in range(s.long_texts):
        sentences = captions[j % len(captions)]
        n = s.long_sentences or len(sentences)
        start = rng.randrange(max(len(sentences) - n, 0) + 1)
        texts.append((" ".join(sentences[start:start + n]), None))
    M = s.perspectives
    perspectives = (c.perspectives + [""] * M)[:M]
    spare = iter(draw_sub_captions(pool, perspectives.count(""), s.sampling, rng))
    return texts + [(text, None) if text else next(spare) for text in perspectives]


def draw_sub_captions(pool: list, k: int, sampling: str, rng: random.Random) -> list:
    if sampling == "first":  # the ablation: the same k texts every time
        return [pool[i % len(pool)] for i in range(k)]
    drawn = rng.sample(pool, min(k, len(pool)))
    return drawn + rng.choices(pool, k=k - len(drawn))


def boxes_to_patches(boxes, side: int) -> torch.Tensor:
    """Which of side · side patches, row by row, each box overlaps; None: all. T boxes -> bool [T, side²]."""
    overlaps = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for of_box, box in zip(overlaps, boxes):
        left, top, right, bottom = (side * edge for edge in box or (0, 0, 1, 1))
        of_box[math.floor(top):math.ceil(bottom), math.floor(left):math.ceil(right)] = True
    return overlaps.flatten(1)


# ---- records: where the samples are in the files ---------------------------------------------------------------------

# A sample is a span of bytes in a file: in a tar the members with its key, in JSON lines its line. An index under
# ~/.cache has three numbers for each sample; it is mapped, so the workers and ranks of a machine share one copy.
# (Beside it a process keeps each sample's row number and its place in the order.) A span is read and parsed when the
# sample is wanted, so any sample is reached at once. A table (CSV, Parquet, a JSON array, compressed JSON lines) is
# copied as JSON lines beside its index and read from there, and so is the list of a folder's pictures.
INDEX_VERSION = 7  # of the indices kept: raise it when a scan_ function changes


class BadCount:
    """Bad samples by reason: the detail of the first one, and how many; `seen` counts all samples, good and bad."""

    def __init__(self, details=(), counts=(), seen=0):
        self.details = dict(details)
        self.counts = Counter(counts)
        self.seen = seen

    def __bool__(self):
        return bool(self.counts)

    def add(self, bad: BadSample):
        self.counts[bad.reason] += 1
        self.details.setdefault(bad.reason, bad.detail)

    def merge(self, other: "BadCount"):
        self.counts += other.counts
        self.details = other.details | self.details
        self.seen += other.seen

    @property
    def total(self) -> int:
        return self.counts.total()

    def report(self) -> str:
        """"2 × image missing: a.jpg", and so on for each reason."""
        parts = [f"{n} × {reason}: {self.details[reason]}" for reason, n in self.counts.items()]
        return "; ".join(parts).encode(errors="backslashreplace").decode() or "none"  # a file's name may be no Unicode

    def over(self, share: float) -> bool:
        """Whether more than this share is bad, of at least 200 seen."""
        return self.seen >= 200 and self.total > share * self.seen

    def check(self, share: float):
        """Raises UserError if too many are bad."""
        if self.over(share):
            raise UserError(f"{self.total} of {self.seen} samples are bad, over --max-bad {share:g}: mend the data or "
                            f"raise the limit ({self.report()})")


class Concatenated:
    """Several parts as one: their samples are numbered consecutively, their bad samples counted together."""

    def __init__(self, parts: list):
        self.parts = parts
        self.first = np.cumsum([0, *map(len, parts)])  # each part's first number; last: the length
        self.bad = BadCount()
        for part in parts:
            self.bad.merge(part.bad)

    def __len__(self):
        return self.first[-1]

    def part_of(self, i: int) -> tuple[int, int]:
        """The number of a sample's part, and the sample's number in it."""
        part = int(np.searchsorted(self.first, i, "right")) - 1
        return part, i - int(self.first[part])


@dataclass
class Record:
    key: str
    image: bytes | Path | str  # content, path, or the path or URL that a row names
    row: dict  # its texts, as read_captions takes them
    file: Path | None = None  # the file that holds it


def hashed(key: str) -> int:
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def parse_json(content: bytes, name: str) -> dict:
    with suppress(ValueError, RecursionError):
        row = json.loads(content.decode("utf-8-sig", errors="replace"))
        if isinstance(row, dict):
            return row
    raise BadSample("JSON does not parse", name)


IMAGE_FIELDS = ("image", "image_path", "image path", "filepath", "file_name", "filename", "image_file", "path", "url",
                "image_url", "image/key", "key")


def image_field(row: dict, part: str = "") -> str:
    """The path or URL of a row's image: of the usual fields, the first that contains `part`. Raises BadSample."""
    for wanted in IMAGE_FIELDS:
        for name, image in row.items():
            if name.lower() == wanted and isinstance(image, str) and image.strip() and part in image:
                return image.strip()
    raise BadSample("no image named")


def last_part(location: str) -> str:
    """The file's name in a path or URL."""
    if "://" in location:
        location = re.split("[?#]", location)[0]
    return location.rpartition("/")[2]


def row_key(row: dict) -> str:
    key = row.get("key")
    return key if isinstance(key, str) and key else image_field(row)


# Each format has a scan_ function, file -> (start, length, key) of every sample, or BadSample; and a parse_ function,
# (bytes of a span, file) -> Record.

def tar_members(file):
    """(key, extension, TarInfo, whether its header is not where it should begin) of every file in a tar. The key of
    "a/b.seg.JSON" is "a/b": it ends at the first dot of the file's name. `ignore_zeros` reads on after a damaged
    header."""
    expected = 0
    with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
        for member in tar:
            tar.members = []  # tarfile would keep them all
            folder, slash, base = member.name.removeprefix("./").rpartition("/")
            stem, _, extension = base.partition(".")
            if member.isreg() and stem:  # no stem: a system's own file, like .DS_Store
                yield folder + slash + stem, extension.lower(), member, member.offset > expected
            expected = member.offset_data + (member.size * member.isreg() + 511) // 512 * 512


def scan_tar(path):
    """A sample is a run of members with one key, from the header of the first to the end of the last."""
    end = 0
    with open(path, "rb") as file:
        with suppress(tarfile.TarError, ValueError):  # raised where a tar is cut off
            for key, members in groupby(tar_members(file), itemgetter(0)):
                _, extensions, infos, damaged = zip(*members)
                start, end = infos[0].offset, infos[-1].offset_data + infos[-1].size
                if any(damaged):
                    yield BadSample("tar damaged", f"before {key}")
                if set(SUFFIXES).intersection(extensions):
                    yield start, end - start, key
                else:
                    yield BadSample("no image", f"{key} with {extensions} (must be neighbours: tar --sort=name)")
        file.seek(end)
        rest = file.read(1 << 20)
    if any(rest) or not rest:  # a whole tar ends in zeros
        yield BadSample("tar cut off", f"at byte {end}")


def parse_tar(content, path):
    files = {}  # extension: bytes
    for key, extension, member, _ in tar_members(io.BytesIO(content + bytes(1024))):
        files.setdefault(extension, content[member.offset_data:member.offset_data + member.size])
    for extension in SUFFIXES:
        if extension in files:
            return Record(key, files[extension], texts_beside(files, f"{path.name}/{key}"))
    raise BadSample("no image", path.name)


def texts_beside(files: dict[str, bytes], name: str) -> dict:
    """The row of a picture: its .txt as "caption", and the fields of its .json."""
    row = {}
    if "txt" in files:
        row["caption"] = files["txt"].decode("utf-8-sig", errors="replace")
    if "json" in files:
        for field, value in parse_json(files["json"], f"{name}.json").items():
            if value:
                row[field] = value
    return row


def scan_lines(path):
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield start, len(line), row_key(parse_json(line, ""))
                except BadSample as bad:
                    yield BadSample(bad.reason, f"line {number}")
            start += len(line)


def parse_lines(content, path):
    row = parse_json(content, path.name)
    return Record(row_key(row), image_field(row), row)


def folder_rows(folder):
    """A row for every picture below a folder."""
    names = []
    visited = set()
    for inner, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(inner)
        if real in visited:  # a link leads back here
            folders.clear()
            continue
        visited.add(real)
        for name in files:
            stem, _, suffix = name.rpartition(".")
            if stem and suffix.lower() in SUFFIXES and not name.startswith("."):
                names.append(os.path.relpath(os.path.join(inner, name), folder))
    stems = [name.rpartition(".")[0] for name in names]
    often = Counter(stems)
    for name, stem in sorted(zip(names, stems), key=lambda pair: os.fsencode(pair[0])):
        key = stem if often[stem] == 1 else name  # 1.jpg and 1.png are two samples
        yield {"key": key, "image": os.path.abspath(folder / name)}


def parse_folder(content, folder):
    """A row of `folder_rows`, with the texts from the .txt and .json beside its picture."""
    record = parse_lines(content, folder)
    files = {}
    for extension in ("txt", "json"):
        beside = Path(record.image).with_suffix(f".{extension}")
        if beside.exists():
            files[extension] = beside.read_bytes()
    record.row = texts_beside(files, record.image)
    return record


def csv_rows(path):
    """The rows of a CSV or TSV, with a BadSample for each that does not parse. If a quote is never closed, that row and
    those up to the next quote are one bad row."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:  # a cell longer than any caption, or text after a closing quote
                row = {None: None}
            if None in row or None in row.values():  # too many cells, or too few
                yield BadSample("row does not parse", f"line {rows.line_num}")
            else:
                yield {name.strip(): cell for name, cell in row.items()}


def json_rows(path):
    """The objects of a JSON file, in an array or one after another, with a BadSample where one does not parse: nothing
    after it is read."""
    text = path.read_text("utf-8-sig", errors="replace")
    decoder = json.JSONDecoder()
    end = 0
    with suppress(ValueError, RecursionError):  # also raised after the last one
        while True:
            row, end = decoder.raw_decode(text, text.index("{", end))
            yield row
    if text[end:].strip(" \t\r\n,[]"):
        yield BadSample("JSON does not parse", f"from character {end} on")


def gzip_rows(path):
    """The lines of a compressed JSON lines file, as bytes."""
    try:
        with gzip.open(path) as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield BadSample("file cut off", str(error))


def parquet_batches(path):
    """The rows of a Parquet file, in lists of up to 1,000. Raises UserError."""
    try:
        from pyarrow.parquet import ParquetFile  # here, because no other format needs it
    except ImportError:
        raise UserError(f"{path} is Parquet, which pyarrow reads: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                yield batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def parquet_rows(path):
    """The rows of a Parquet file of captions. Raises UserError if it has pictures inside."""
    for row in chain.from_iterable(parquet_batches(path)):
        if isinstance(row.get("image"), dict):
            raise UserError(f"{path} has its pictures inside: python data.py --shards {path} FOLDER writes tar shards")
        yield row


TABLES = {".csv": csv_rows, ".tsv": csv_rows, ".gz": gzip_rows, ".json": json_rows, ".parquet": parquet_rows,
          "": folder_rows}


def copy_table(path, copy):
    """Writes a table as JSON lines. Yields a BadSample for each row that cannot be read. Raises UserError."""
    try:
        with atomic_path(copy) as temporary, open(temporary, "wb") as file:
            for row in TABLES[suffix_of(path)](path):
                if isinstance(row, BadSample):
                    yield row
                elif isinstance(row, bytes):
                    file.write(row)
                else:
                    file.write(json.dumps(row, default=str).encode() + b"\n")  # str: of Parquet's dates and decimals
    except OSError as error:
        raise UserError(f"{path} cannot be copied as JSON lines into {copy.parent} ({error.strerror}: {error.filename})"
                        ": set MINILIP_CACHE to a folder with room, or make it readable") from None


@contextmanager
def atomic_path(path: Path):
    """-> a temporary path, which replaces this one when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


READERS = {**dict.fromkeys((".jsonl", ".jsonlines", *TABLES), (scan_lines, parse_lines)),
           ".tar": (scan_tar, parse_tar), "": (scan_lines, parse_folder)}


def captions_path(file: Path) -> Path:
    """The sidecar with new captions: of 00000.tar 00000.captions.jsonl, of the folder set set.captions.jsonl."""
    return Path(f"{file.resolve()}.captions.jsonl") if file.is_dir() else file.with_suffix(".captions.jsonl")


def expand(pattern: str) -> list[str]:
    """shard-{00000..00331}.tar -> the 332 names, as a shell expands it."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not braces:
        return [pattern]
    first, last = braces.groups()
    texts = []
    for number in range(int(first), int(last) + 1):
        texts += expand(pattern.replace(braces[0], str(number).zfill(len(first)), 1))
    return texts


def find_files(pattern: str) -> list[Path]:
    """The files, all of one format, that one path of --data means. Raises UserError."""
    if os.path.isdir(pattern):
        folder = Path(pattern)
        for inside in ("*.tar", "metadata.jsonl", "captions.jsonl"):
            files = sorted(folder.glob(inside))
            if files:
                return files
        return [folder]
    files = []
    for text in expand(pattern):
        names = glob.glob(text, recursive=True)
        names = [name for name in names if not name.endswith(".captions.jsonl")]  # those are joined by key
        files += map(Path, sorted(names) or [text])
    for file in files:
        known = file.is_file() and file.suffix in READERS and not file.name.endswith(".tar.gz")
        if not known or file.suffix != files[0].suffix:
            raise UserError(f"no file {file} that can be read: --data takes .tar shards, .jsonl, .jsonl.gz, .json, "
                            ".csv, .parquet or a folder, one pattern for files of one format, and train.py takes "
                            "'scenes', too, which python scenes.py --write FOLDER writes")
    return files


def suffix_of(file: Path) -> str:
    """The key of READERS: a file's suffix, "" for a folder."""
    return file.suffix if file.is_file() else ""


@dataclass
class Index:
    """Where the samples of a file are."""

    source: Path  # the file itself, or a table's copy
    spans: np.ndarray  # uint64 [N, 3]: a sample's first byte, its length, the hash of its key
    bad: BadCount  # what was left out

    def __post_init__(self):
        self.made = self.source.stat().st_mtime_ns  # another run may write a new copy of a table

    def __len__(self):
        return len(self.spans)

    def read(self, start: int, length: int) -> bytes:
        """Reads with pread, which moves no position, so processes forked from this one may share an open file."""
        file = open_cached(self.source, self.made)  # the reference keeps it open, even if the cache drops it
        content = os.pread(file.fileno(), length, start)
        if len(content) < length:
            raise BadSample("file cut off", f"{self.source} at byte {start}")
        return content


@functools.lru_cache(maxsize=512)
def open_cached(file, made):
    return open(file, "rb", buffering=0)


def index_of(file: Path) -> Index:
    """The index kept under ~/.cache, or a new one if the file has changed. A folder's is always new, because its time
    does not tell whether something below it has changed."""
    cache = Path(os.environ.get("MINILIP_CACHE") or Path.home() / ".cache" / "minilip")
    name = f"{hashed(str(file.resolve())):x}"
    kept = cache / f"{name}.pt"
    source = cache / f"{name}.jsonl" if suffix_of(file) in TABLES else file
    stamp = [INDEX_VERSION, file.stat().st_size, file.stat().st_mtime_ns]
    with locked(cache / f"{name}.lock"):
        with suppress(Exception):  # if there is none, or a damaged one, a new one is made
            found, spans, bad = torch.load(kept, mmap=True)
            if found == stamp and file.is_file() and source.is_file():
                return Index(source, spans.numpy(), BadCount(**bad))
        index = scan(file, source)
        if "file cannot be read" in index.bad.counts:  # perhaps it can next time
            return index
        with suppress(OSError, RuntimeError), atomic_path(kept) as temporary:  # if that fails, it is not kept
            torch.save([stamp, torch.from_numpy(index.spans), vars(index.bad)], temporary)
        return index


def locked(path: Path):
    """-> an open file that one process at a time can have, so one of a machine's ranks scans a file and the others read
    its index (a folder's they make themselves). If no lock can be had, each rank scans."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
        fcntl.flock(file, fcntl.LOCK_EX)  # to the closing of the file
        return file
    return open(os.devnull)


def scan(file: Path, source: Path) -> Index:
    """Scans a file; a table is copied first, and the copy scanned. A sidecar's spans are sorted by key."""
    spans = array("Q")
    bad = BadCount()
    scan_format, _ = READERS[suffix_of(file)]
    copying = copy_table(file, source) if source != file else []
    try:
        for found in chain(copying, scan_format(source)):
            bad.seen += 1
            if isinstance(found, BadSample):
                bad.add(BadSample(found.reason, f"{file.name} {found.detail}"))
            else:
                start, length, key = found
                spans.extend((start, length, hashed(key)))
    except OSError as error:
        bad.add(BadSample("file cannot be read", f"{file}: {error.strerror}"))
    spans = np.array(spans, np.uint64).reshape(-1, 3)
    if file.name.endswith(".captions.jsonl"):
        spans = spans[spans[:, 2].argsort(kind="stable")]
    return Index(source, spans, bad)


def read_indices(files: list[Path]) -> list[Index]:
    """index_of every file. Many files are scanned in parallel, by processes that give back the memory that it takes."""
    if len(files) > 8:
        with ProcessPoolExecutor(8) as pool:
            mixed = random.Random(os.getpid()).sample(files, len(files))  # several ranks begin with different ones
            for _ in tqdm(pool.map(make_index, mixed), "indexing", len(files), delay=2):
                pass
    return [index_of(file) for file in files]


def make_index(file: Path):
    """index_of without its result, which would have to be sent to the main process."""
    index_of(file)


class Records(Concatenated):
    """All samples of one path of --data: a file, {00000..00331}.tar, *.tar, a folder of shards or of pictures.

    records[i] -> Record, read from its file and joined with the sidecar of new captions, if there is one; raises
    BadSample. `bad`: what the index left out. `image_root`: the folder of the images of CSV and JSON lines; default:
    the file's.
    """

    def __init__(self, path: str, image_root: str | None = None):
        self.path = str(path)
        self.root = image_root
        self.files = find_files(self.path)
        _, self.parse = READERS[suffix_of(self.files[0])]
        super().__init__(read_indices(self.files))
        for index in self.parts:
            if index.source not in self.files:
                open_cached(index.source, index.made)  # forked workers read this copy, even if another run replaces it
        captioned = [file for file in self.files if captions_path(file).is_file()]
        sidecars = read_indices(list(map(captions_path, captioned)))
        for sidecar in sidecars:
            sidecar.bad.seen = 0  # its lines are not samples
            self.bad.merge(sidecar.bad)
        self.sidecars = dict(zip(captioned, sidecars))  # file: the index of its new captions
        if not len(self):
            raise UserError(f"--data {self.path}: no images (left out: {self.bad.report()}); tables and JSON lines "
                            "name them under one of " + ", ".join(IMAGE_FIELDS))

    def keys(self) -> np.ndarray:
        """The hash of every sample's key: uint64 [N]."""
        return np.concatenate([index.spans[:, 2] for index in self.parts])

    def __getitem__(self, i: int) -> Record:
        part, number = self.part_of(i)
        file, index = self.files[part], self.parts[part]
        start, length, key = index.spans[number].tolist()
        try:
            record = self.parse(index.read(start, length), file)
            if hashed(record.key) != key:
                raise BadSample("file has changed", f"{file}: start again, so that it is scanned again")
            new = new_captions(self.sidecars[file], key) if file in self.sidecars else {}
            if new:
                record.row["captions"] = recaptioned(record.row) | new
        except OSError as error:
            raise BadSample("file cannot be read", f"{file}: {error.strerror}") from None
        if isinstance(record.image, str):
            record.image = Path(self.root or file.parent, file_named(record.image))
        record.file = file
        return record


def file_named(image: str) -> str:
    """The file that a row names: by a path, a URL (its last part), or a key, as IIW does."""
    if "://" in image:
        return last_part(image)
    return image if "." in image else f"{image}.jpg"


def equal_range(hashes: np.ndarray, wanted) -> slice:
    """The slice of sorted hashes that are equal to one."""
    wanted = np.uint64(wanted)
    return slice(np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, "right"))


def new_captions(sidecar: Index, key: int) -> dict:
    """The captions in a sidecar's lines for a key, given by its hash; later lines override earlier ones."""
    found = {}
    for start, length, _ in sidecar.spans[equal_range(sidecar.spans[:, 2], key)].tolist():
        found |= recaptioned(parse_json(sidecar.read(start, length), sidecar.source.name))
    return found


# ---- captions joined to shards, and shards made of Parquet -----------------------------------------------------------

def identity(record: Record, by_url: bool) -> str:
    """What identifies a picture: the URL in its row, or the last part of its key. Raises BadSample."""
    if by_url:
        return image_field(record.row, "://")
    return os.path.splitext(last_part(record.key))[0]


def texts_to_join(row: dict, fields: dict) -> dict:
    """{field: text} for a sidecar. A field "caption" would hide the picture's own: it gets the name of the kind that
    --caption-fields gives it, or is dropped."""
    row = all_fields(row)
    texts = {}
    for kind, names in fields.items():
        for name in names:
            if kind != "caption" and clean_field(row.get(name)):
                texts[kind if name == "caption" else name] = row[name]
    return texts


def join(captions: str, pattern: str, fields: dict):
    """Writes the texts of a table's rows into a sidecar beside each file of samples. Raises UserError.

    A row is identified by its URL, or, if the first row has none, by its key or else its file's name, since img2dataset
    numbers keys differently in each download. Only hashes of these are in memory.
    """
    samples = Records(pattern)
    for sidecar in map(captions_path, samples.files):
        if sidecar.exists():
            raise UserError(f"{sidecar} exists: move it away, because --join writes a new one")
    table = Records(captions)
    by_url = False
    with suppress(BadSample):
        by_url = bool(image_field(table[0].row, "://"))
    hashes = np.zeros(len(table), np.uint64)
    for i in tqdm(range(len(table)), "reading captions"):
        with suppress(BadSample):
            hashes[i] = hashed(identity(table[i], by_url))
    hashes, rows, counts = np.unique(hashes, return_index=True, return_counts=True)
    if not by_url:  # files in several folders may have the same name
        hashes, rows = hashes[counts == 1], rows[counts == 1]

    matched = 0
    for n, file in enumerate(tqdm(samples.files, "joining")):
        lines = []
        for i in range(*samples.first[n:n + 2]):
            with suppress(BadSample):
                sample = samples[i]
                for row in rows[equal_range(hashes, hashed(identity(sample, by_url)))]:
                    texts = texts_to_join(table[row].row, fields)
                    if texts:
                        lines.append(json.dumps({"key": sample.key, "captions": texts}) + "\n")
        matched += len(lines)
        if lines:
            with atomic_path(captions_path(file)) as temporary:
                temporary.write_text("".join(lines))
    if not matched:
        raise UserError(f"--join: none of {len(table):,} rows in {captions} has captions of a sample in {pattern}, by "
                        f"URL, key or file name (left out: {table.bad.report()}): check --caption-fields")
    print(f"{matched:,} of {len(samples):,} samples have captions of {len(table):,} rows now")


def write_shards(pattern: str, folder: str):
    """Parquet files with the pictures inside -> tars of up to 1,000 samples: KEY.jpg has the picture's bytes, KEY.json
    the other columns. Raises UserError."""
    if any(Path(folder).glob("*")):
        raise UserError(f"--shards {folder} is not empty: name a new folder")
    files = find_files(pattern)
    if files[0].suffix != ".parquet":
        raise UserError(f"--shards {pattern} is not Parquet: --data reads tables and folders as they are")
    batches = chain.from_iterable(map(parquet_batches, files))
    for shard, rows in enumerate(batches):
        with atomic_path(Path(folder, f"{shard:05}.tar")) as temporary, tarfile.open(temporary, "w") as tar:
            for number, row in enumerate(rows):
                picture = row.pop("image", None)
                if not isinstance(picture, dict) or "bytes" not in picture:
                    raise UserError(f"--shards {pattern} has no pictures: it needs a column image with bytes")
                add_member(tar, f"{shard:05}{number:04}.jpg", picture["bytes"] or b"")
                add_member(tar, f"{shard:05}{number:04}.json", json.dumps(row, default=str).encode())


def add_member(tar, name: str, content: bytes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# ---- datasets --------------------------------------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B,3,S,S] -> float32 with CLIP's mean and deviation; on the device, so that bytes are copied to it."""
    return images.float().sub_(per_channel(MEAN, images.device)).div_(per_channel(STD, images.device))


@functools.cache  # copying them to a GPU at every step would wait for it
def per_channel(numbers, device):
    return 255 * torch.tensor(numbers, device=device)[:, None, None]


# A dataset has len; dataset[i], or augmented dataset.__getitem__(i, rng), -> (image uint8 [3,S,S], Captions), raises
# BadSample; `bad`, what it left out; order(rng, window) -> all its indices.

class SceneImages(Scenes):
    """Embedded scenes. Training shifts the image by up to 1/32 of its side; it never flips: "left" is in the texts."""

    bad = BadCount()  # of no scene

    def __getitem__(self, i, rng=None):
        scene = self.scene(i)
        image, _ = self.draw(scene)
        c = scene.captions
        perspectives = [c[name] for name in PERSPECTIVES]
        captions = Captions(c["raw"], [c["short"]], list(map(Sentence, c["long"], self.boxes(scene))), perspectives)
        if rng and self.split == "train":
            reach = max(1, self.size // 32)
            down = rng.randint(-reach, reach)
            across = rng.randint(-reach, reach)
            place = np.arange(self.size)
            image = image.take(place + down, 0, mode="clip").take(place + across, 1, mode="clip")
            x, y = across / self.size, down / self.size
            captions = captions.within((x, y, x + 1, y + 1))
        return torch.from_numpy(image).permute(2, 0, 1), captions

    def order(self, rng, window):
        return rng.permutation(len(self))


HELD_OUT = 5000  # samples held out for validation, or a tenth if that is less


def spread(n: int, k: int) -> list[int]:
    """k of the numbers below n, evenly spread; all, if they are fewer."""
    return np.linspace(0, n - 1, min(n, k)).astype(int).tolist()


@dataclass
class Pictures:
    """Records with their pictures decoded. `part`: "train", "validation" (chosen by the hash of the key), or "all"."""

    records: Records
    size: int
    part: str
    crop: float
    fields: dict
    augment: str

    def __post_init__(self):
        self.bad = self.records.bad
        share = min(0.1, HELD_OUT / len(self.records))
        held_out = self.records.keys() < np.uint64(share * 2**64)
        wanted = (held_out == (self.part == "validation")) | (self.part == "all")
        self.rows = np.flatnonzero(wanted).astype(np.uint32)
        self.try_a_few()

    def try_a_few(self):
        """Raises UserError if none of a few samples can be used: the image root or a field's name is wrong."""
        failed = BadCount()
        for i in spread(len(self), 8):
            try:
                self[i]
                return
            except BadSample as bad:
                failed.add(bad)
        failed.merge(self.bad)
        remedy = "check --image-root and --caption-fields, or look at it with python data.py --look"
        if not len(self):
            remedy = "take more samples, or --eval-images 0, for validation holds out a tenth by chance"
        raise UserError(f"--data {self.records.path} has no usable sample for {self.part} (bad: {failed.report()}): "
                        + remedy)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i, rng=None):
        record = self.records[int(self.rows[i])]
        name = f"{record.file.name}: {record.key}"
        captions = read_captions(record.row, self.fields, name)
        augmented = rng and self.part == "train"
        enough = self.size
        if augmented:  # decoded just large enough for the least crop
            enough = math.ceil(self.size / math.sqrt(self.crop * ASPECTS[0]))
        picture = load_image(record.image, enough, name=name)
        with torch.random.fork_rng(devices=()):  # torchvision uses PyTorch's generator, which is restored
            if rng:
                torch.default_generator.manual_seed(rng.getrandbits(63))  # torch.manual_seed takes half a millisecond
            box = crop_box(picture, self.crop if augmented else None)
            cropped = picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
            image = torch.from_numpy(np.array(cropped)).permute(2, 0, 1)
            if augmented and self.augment == "strong":
                image = change_colours(image)
        return image, captions.within(np.divide(box, 2 * picture.size))

    def order(self, rng, window):
        """Any order if each sample is a file of its own or all are in one file; in shards, an order that reads nearby
        samples soon after one another."""
        if len(self.records.files) == 1 or self.records.parse is not parse_tar:
            return rng.permutation(len(self))
        return shard_order(np.diff(np.searchsorted(self.rows, self.records.first)), rng, window)


class ConcatenatedSets(Concatenated):
    """Several datasets as one."""

    def __getitem__(self, i, rng=None):
        part, number = self.part_of(i)
        return self.parts[part].__getitem__(number, rng)

    def order(self, rng, window):
        """The sets mixed evenly."""
        orders = []
        for part, first in zip(self.parts, self.first):
            orders.append(part.order(rng, window) + first)
        return interleave(orders, rng)


@functools.cache
def shared_records(path: str, image_root: str | None) -> Records:
    """Records, opened once for all the parts of a set: a process may have 65,530 maps."""
    return Records(path, image_root)


def open_dataset(data, part: str, n: int, size: int, kinds: int, crop: float = 0.9, image_root: str | None = None,
                 caption_fields: str = "", dense: bool = False, augment: str = "crop"):
    """--data, one path or several -> dataset. part: train, validation, test (for pictures the same as validation) or
    all (for scenes the same as test); n: how many scenes; dense: crops' captions count as long ones. Raises
    UserError."""
    fields = read_fields(caption_fields, dense)
    sets = []
    for path in [data] if isinstance(data, str) else data:
        if path != "scenes":
            records = shared_records(path, image_root)
            sets.append(Pictures(records, size, part.replace("test", "validation"), crop, fields, augment))
        else:
            sets.append(SceneImages(part.replace("all", "test"), n, size, kinds))
    check_fields([part.records for part in sets if isinstance(part, Pictures)], fields)
    return sets[0] if len(sets) == 1 else ConcatenatedSets(sets)


def check_fields(sets: list[Records], fields: dict, n: int = 200):
    """Raises UserError if a field that only the user has named is in none of n samples of each set, spread over it."""
    missing = set(chain.from_iterable(fields.values())).difference(DENSE, *FIELDS.values())
    there = set()
    for records in sets:
        for i in spread(len(records), n if missing else 0):
            with suppress(BadSample):
                there.update(all_fields(records[i].row))
    missing -= there
    if missing and sets:  # scenes have no such fields
        raise UserError(f"--caption-fields: none of {n} samples has a field {' or '.join(sorted(missing))}; they have "
                        + ", ".join(sorted(there)))


def check_boxes(dataset, n: int = 200):
    """Raises UserError if none of n samples, spread over the data, has a sentence with a box."""
    for i in spread(len(dataset), n):
        with suppress(BadSample):
            _, captions = dataset[i]
            if any(sentence.box for sentence in captions.long):
                return
    raise UserError(f"--region-grouping: none of {n} samples looked at has a sentence with a box; caption crops with "
                    "recaption.py --dense 2, or name their field, as in --caption-fields long=long+denseX_captions")


# ---- the order of samples, and batches -------------------------------------------------------------------------------

TOGETHER = 8  # shards read at a time


def shard_order(counts, rng, window: int) -> np.ndarray:
    """The order in which the samples of shards with these counts are read: shards in random order, TOGETHER of them
    interleaved, then all samples shuffled within windows of so many."""
    numbers = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])  # of each shard
    files = rng.permutation(len(counts))
    order = []
    for some in np.split(files, range(TOGETHER, len(files), TOGETHER)):
        order.append(interleave([numbers[file] for file in some], rng))
    order = np.concatenate(order)
    for start in range(0, len(order), window):
        rng.shuffle(order[start:start + window])
    return order


def interleave(parts: list, rng) -> np.ndarray:
    """The numbers of all parts, each part spread evenly and moved by less than a place."""
    turns = []
    for numbers in parts:
        turns.append((np.arange(len(numbers)) + rng.random()) / len(numbers))
    return np.concatenate(parts)[np.argsort(np.concatenate(turns))]


def local_batches(dataset, s, first: int, last: int, rank: int, world: int):
    """The (epoch, index) pairs of each step's local batch. The stream of epochs, each with every sample once in an
    order that the seed determines, is cut into global batches, and this rank takes its share. Starts at any step."""
    local = s.batch // world
    known = None
    for step in range(first, last):
        pairs = []
        for position in range(local):
            epoch, place = divmod(step * s.batch + rank * local + position, len(dataset))
            if epoch != known:
                rng = np.random.default_rng((s.seed, epoch))
                order = dataset.order(rng, s.shuffle_buffer)
                known = epoch
            pairs.append((epoch, int(order[place])))
        yield pairs


class Batch(NamedTuple):  # the loader pins the tensors of a tuple by itself
    images: torch.Tensor  # uint8 [B,3,S,S]
    tokens: torch.Tensor  # int64 [B,T,L], cut to the batch's longest text
    lengths: np.ndarray  # int64 [B,T]: tokens of each text, start and end counted; stays on the host
    allowed: torch.Tensor | None = None  # bool [B,T,P], with --region-grouping: the patches in each text's box
    bad: Sequence[BadSample] = ()  # those that these samples replaced


ATTEMPTS = 100  # samples tried in the place of a bad one


@dataclass
class TrainingSamples:
    """dataset[(epoch, index)] -> image uint8 [3,S,S], tokens [T,L], with --region-grouping the patches in each text's
    box [T,P] (bool), else None, and the BadSamples: a bad sample is replaced by another one, chosen at random.

    All randomness comes from (seed, epoch, index), so a sample is the same in every worker and rank, and after a
    restart.
    """

    dataset: object
    tokenizer: object
    settings: object

    def __getitem__(self, where):
        s = self.settings
        epoch, index = where
        rng = random.Random(f"{s.seed} {epoch} {index}")
        bad = []
        while len(bad) < ATTEMPTS:
            try:
                image, captions = self.dataset.__getitem__(index, rng)
                texts, boxes = zip(*draw_texts(captions, s, rng))
                allowed = boxes_to_patches(boxes, s.image_size // s.patch) if s.region_grouping else None
                return image, self.tokenizer(texts, s.context), allowed, bad
            except BadSample as problem:
                bad.append(problem)
                index = rng.randrange(len(self.dataset))
        raise UserError(f"{ATTEMPTS} samples in a row are bad, the last one: {bad[-1]}")


def collate(samples) -> Batch:
    images, tokens, allowed, bad = zip(*samples)
    tokens = torch.stack(tokens)
    lengths = tokens.argmax(-1) + 1  # the end-of-text token has the greatest id
    tokens = tokens[..., :int(lengths.max())].contiguous()
    allowed = None if allowed[0] is None else torch.stack(allowed)
    return Batch(torch.stack(images), tokens, lengths.numpy(), allowed, sum(bad, []))


def begin_worker(_number):
    """Ignores Ctrl-C and SIGTERM, which torchrun sends to the whole group: the main process handles them and ends its
    workers. Exempts all objects from before the fork from garbage collection, which would copy their memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: dies with the main process, whose lock and sockets it would keep
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    gc.freeze()


def training_loader(dataset, tokenizer, settings, first: int, last: int, rank: int = 0, world: int = 1):
    """Yields the batches of steps first..last, as `collate` makes them. An error in a worker, even its death, becomes
    one sentence: a UserError."""
    samples = TrainingSamples(dataset, tokenizer, settings)
    # Forked workers share the mapped indices; other workers, the default from Python 3.14 on, would get copies.
    context = "fork" if settings.workers and sys.platform == "linux" else None
    loader = torch.utils.data.DataLoader(
        samples, batch_sampler=local_batches(dataset, settings, first, last, rank, world), collate_fn=collate,
        num_workers=settings.workers, worker_init_fn=begin_worker, pin_memory=torch.cuda.is_available(),
        multiprocessing_context=context)
    batches = iter(loader)
    if settings.workers:  # PyTorch's handler would raise anywhere in the main program
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except UserError as error:  # a worker's is the last line of a traceback
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("scenes.UserError: ")) from None
    except (RuntimeError, OSError, EOFError) as error:  # the last two: a worker died while it sent a batch
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(f"a data-loading process died ({str(error).splitlines()[0]}): if memory ran out, lower "
                        "--workers; else look at the data with python data.py --look") from None


# ---- a look at data --------------------------------------------------------------------------------------------------

def look(path, image_root, fields, tokenizer, n, sheet):
    """Prints what one path of --data holds and statistics of n random samples; writes a page with some of them."""
    records = Records(path, image_root)
    print(f"{path}: files {len(records.files)}, samples {len(records):,}; left out: {records.bad.report()}")
    bad = BadCount()
    names = Counter()
    tokens = {"raw": [], "short": [], "long": []}  # of each text, start and end included; of long ones each sentence
    shown = []
    for i in tqdm(np.random.default_rng(0).permutation(len(records))[:n], leave=False):
        try:
            record = records[i]
            names.update(list(all_fields(record.row)))
            captions = read_captions(record.row, fields, record.key)
            picture = load_image(record.image, 256, name=record.key)
        except BadSample as error:
            bad.add(error)
            continue
        lines = [record.key]
        long = [sentence.text for sentence in captions.long]
        for kind, texts in zip(tokens, ([captions.raw], captions.short, long)):
            tokens[kind] += (tokenizer(texts, 4096).argmax(-1) + 1).tolist()  # the end has the greatest id
            lines.append(f"{kind}: {' | '.join(texts)}")
        if len(shown) < 24:
            shown.append((picture, lines))
    print(f"{min(n, len(records)):,} looked at, {bad.total} bad: {bad.report()}")
    print("fields:", dict(names))
    for kind, lengths in tokens.items():
        middle, most = np.quantile(lengths or [0], (0.5, 0.99))
        print(f"{kind}: {len(lengths):,}, tokens: median {middle:.0f}, 99% up to {most:.0f}")
    if sheet:
        contact_sheet(sheet, shown)


def data_url(picture: Image.Image) -> str:
    """A PIL picture as a JPEG in a data URL."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def contact_sheet(path, shown: list[tuple]):
    """Writes (picture, texts) pairs as a page of HTML with the pictures inside."""
    page = '<!DOCTYPE html>\n<meta charset="utf-8">\n<table>\n'
    for picture, texts in shown:
        picture.thumbnail((256, 256))
        lines = "<br>".join(map(html.escape, texts))
        page += f'<tr><td><img src="{data_url(picture)}"></td><td>{lines}</td></tr>\n'
    Path(path).write_text(f"{page}</table>\n", "utf-8", errors="replace")


def main():
    parser = Parser(description=__doc__)
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--look", metavar="DATA", help="print counts, bad samples, lengths of captions")
    command.add_argument("--join", nargs=2, metavar=("CAPTIONS", "SHARDS"),
                         help="write captions beside shards, found by the picture's URL, key or file name")
    command.add_argument("--shards", nargs=2, metavar=("PARQUET", "FOLDER"), help="write pictures as tar shards")
    parser.add_argument("--look-images", type=at_least(1), default=1000, metavar="N",
                        help="samples to read (default 1000)")
    parser.add_argument("--sheet", metavar="FILE.html", help="write a page of pictures with their captions")
    parser.add_argument("--image-root", help="where the image paths in tables and JSON lines begin")
    parser.add_argument("--caption-fields", default="", help='names of fields, like "raw=title,long=a+b"')
    parser.add_argument("--tokenizer", default="auto", help="to count tokens with")
    s = parser.parse_args()
    fields = read_fields(s.caption_fields)
    if s.sheet:
        check_target(s.sheet)
    if s.join:
        join(*s.join, fields)
    elif s.shards:
        write_shards(*s.shards)
    else:
        look(s.look, s.image_root, fields, load_tokenizer(s.tokenizer), s.look_images, s.sheet)


if __name__ == "__main__":
    run_script(main)
