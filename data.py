"""From files to batches: tokenizer, sentences, pictures, captions, the texts each method draws, records, order.

    tokenizer = load_tokenizer("clip")
    tokens = tokenizer(["a photo of a dog", "a cat"], 77)  # [2, 77]: start, ids, end, zeros
    split_sentences("A dog, approx. 3.5 ft. tall. It runs...")  # ["A dog, approx. 3.5 ft. tall.", "It runs..."]
    image = load_image("dog.png")  # PIL, RGB, upright, on white
    records = Records("cc3m/{00000..00331}.tar")  # or .jsonl, .csv, a folder: records[7].key, .image, .row

    python data.py --look DATA --sheet sheet.png         counts, bad samples, lengths of captions, pictures
    python data.py --join captions.csv 'cc3m/*.tar'      captions of a table -> NAME.captions.jsonl beside shards
    python data.py --shards 'recap/*.parquet' FOLDER     Parquet with the pictures inside -> tar shards
"""

import argparse
import csv
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
import textwrap
import urllib.parse
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import regex  # tiktoken's own dependency: CLIP's word pattern needs \p{L}, which re lacks
import tiktoken
import torch
from PIL import Image, ImageOps
from tiktoken.load import load_tiktoken_bpe
from tqdm import tqdm

from scenes import PERSPECTIVES, Scenes


class UserError(Exception):
    """A mistake the user can mend: one sentence naming the thing and the remedy. Scripts print it and exit 1."""

    def __init__(self, message: str):
        if len(message) > 1500:  # somebody's path of 5,000 letters
            message = f"{message[:700]} ... {message[-700:]}"
        super().__init__(message)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors: one line, without the list of all flags."""

    def error(self, message):
        raise UserError(f"{message} (--help lists what there is)")


class BadSample(Exception):
    """A sample to skip and count. `reason` is one of a few short strings to count by, `detail` says which and why."""

    def __init__(self, reason, detail=""):
        super().__init__(reason, detail)  # both, so that a pickled one is built again whole
        self.reason = reason
        self.detail = detail

    def __str__(self):
        return f"{self.reason}: {self.detail}"


@functools.cache
def say_once(message):
    print(message, flush=True)


def check_target(path):
    """Finds out before the work what could not be written after it. Raises UserError."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"{path} cannot be written: name a place in a folder that exists and can be written")


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
        self.name = name
        self.ranks = ranks
        self.fix_text = fix_text
        self.sot = len(ranks)
        self.eot = self.sot + 1
        self.vocab_size = self.eot + 1
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
        kept = []
        for i in map(int, ids):
            if i == self.eot:
                break
            if i != self.sot:
                kept.append(i)
        return self.encoding.decode(kept).rstrip(" ")

    def _row(self, text):
        ids = [self.sot, *self.encode(text), self.eot]
        return np.array(ids, dtype=np.int32)

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
    the end a [SEP] with an id of its own, the greatest (model.read_lotlip)."""

    def __init__(self, path):
        try:
            from tokenizers import BertWordPieceTokenizer
        except ImportError:
            raise UserError("LoTLIP reads texts in BERT's word pieces: pip install tokenizers") from None
        if not Path(path).is_file():
            raise UserError(f"no {path}: put bert-base-uncased's vocab.txt there or name it with --tokenizer")
        self.pieces = BertWordPieceTokenizer(str(path), lowercase=True)
        self.name = "vocab.txt"
        self.vocab_size = self.pieces.get_vocab_size() + 1

    def __call__(self, texts, context):
        tokens = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in zip(tokens, texts):
            sentences = "[SEP]".join(text.split(". "))
            ids = self.pieces.encode(sentences).ids[:-1]
            ids = [*ids[:context - 1], self.vocab_size - 1]
            row[:len(ids)] = torch.tensor(ids)
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
    """Path of CLIP's vocabulary: in an installed open_clip or clip (not imported), or in the cache. Raises UserError."""
    cached = Path.home() / ".cache" / "clip" / CLIP_VOCABULARY
    paths = [cached]
    for package in ("open_clip", "clip"):
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            paths.append(Path(spec.submodule_search_locations[0]) / CLIP_VOCABULARY)
    for path in paths:
        if path.is_file():
            return path
    raise UserError(f"CLIP's vocabulary is not here: pip install open_clip_torch, or put {CLIP_VOCABULARY} of OpenAI's CLIP "
                    f"at {cached}, or choose --tokenizer scenes")


def printable_bytes() -> dict[str, int]:
    """GPT-2's table {printable character: the byte that it stands for}; its order is the order of the first ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        byte_of[chr(256 + i)] = byte
    return byte_of


def read_merges(path) -> list[str]:
    """CLIP's merges in their order, each two symbols with a space between."""
    lines = gzip.decompress(Path(path).read_bytes()).decode().split("\n")
    return list(filter(None, lines[1:1 + CLIP_MERGES]))


def read_clip_ranks(path):
    """CLIP's merges file -> {token: rank}. Ids go: 256 bytes, the same 256 ending a word, then one per merge.

    The file writes bytes as printable characters. The bytes that end a word rank before every merge, so tiktoken joins
    a word's last byte and its space first of all, as CLIP's merging starts out.
    """
    byte_of = printable_bytes()

    def token(symbol):
        content = bytes(byte_of[character] for character in symbol.removesuffix("</w>"))
        return content + b" " if symbol.endswith("</w>") else content

    tokens = [bytes([byte]) for byte in byte_of.values()]
    tokens += [byte + b" " for byte in tokens]
    try:
        for line in read_merges(path):
            left, right = line.split()
            tokens.append(token(left) + token(right))
        if len(set(tokens)) < len(tokens):
            raise ValueError("a merge is listed twice")
    except FileNotFoundError:
        raise UserError(f"no tokenizer file {path}: check --tokenizer") from None
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a CLIP vocabulary ({error!r}): delete it or name another") from None
    return {token: rank for rank, token in enumerate(tokens)}


def write_clip_tokenizer(folder: Path, context: int):
    """CLIP's tokenizer as transformers.CLIPTokenizer reads it from a folder. Raises UserError."""
    merges = read_merges(find_clip_vocabulary())
    symbols = list(printable_bytes())
    symbols += [symbol + "</w>" for symbol in symbols]
    symbols += [merge.replace(" ", "") for merge in merges]
    symbols += [SOT, EOT]
    special = dict(bos_token=SOT, eos_token=EOT, unk_token=EOT, pad_token=EOT)
    config = dict(tokenizer_class="CLIPTokenizer", do_lower_case=True, model_max_length=context) | special
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def read_tiktoken(path):
    """A .tiktoken file (a line: base64 token, space, rank) -> {token: rank}."""
    try:
        ranks = load_tiktoken_bpe(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a .tiktoken file ({error}): check --tokenizer") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    gaps = sorted(ranks.values()) != list(range(len(ranks)))
    if missing or gaps:
        raise UserError(f"{path} is incomplete: it needs all 256 single bytes, and ranks from 0 without gaps")
    return ranks


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
    if path is source and os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise BadSample("image will not decode", f"{name}, no file")
    try:
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        with Image.open(source, formats=FORMATS) as image:
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
        detail = re.sub(r" <_io.*", "", str(error))  # the address of bytes in memory is another in every process
        raise BadSample(reason, f"{name}, {detail}") from None


def upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block is common on the web and no reason to lose the picture
        return image


def to_rgb(image):
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        grey = grey.round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


ASPECTS = (3 / 4, 4 / 3)  # least and greatest width of a random crop, by its height


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
    """The rest of DreamLIP's strong recipe (its transform.py): jitter, grey and blur. Its flips and RandAugment are left
    out: they move what boxes and words like "left" tell of. uint8 [3,S,S] -> the same."""
    from torchvision.transforms import v2
    change = v2.Compose([
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], 0.5),
    ])
    return change(image)


@contextmanager
def torch_seeded(rng: random.Random | None):
    """torchvision draws from PyTorch's generator: here it begins anew from `rng`, and is as before afterwards."""
    with torch.random.fork_rng(devices=()):
        if rng:
            torch.manual_seed(rng.getrandbits(63))
        yield


# ---- captions and the texts drawn from them --------------------------------------------------------------------------

# Where each kind of text is found, by the names that published files use: DreamLIP's columns (SV ShareGPT4V, IB
# InstructBLIP, LLA LLaVA-1.5), img2dataset's and Holistic CLIP's "caption", re-captioning's own; Hugging Face's "text",
# Recap-DataComp (org_, re_caption), PixelProse (original_, vlm_caption), CaptionEmporium (caption_llava), DOCCI
# ("description"), DCI (short_, extra_caption), IIW, and "conversations", whose answer is a long caption (ShareGPT4V,
# LLaVA-ReCap). Of "raw" and "caption" the first name found counts; short and long captions are taken from all.
# `--caption-fields` names others.
FIELDS = {
    "caption": ("caption",),  # a string, or a list of M texts, the raw caption first
    "raw": ("raw", "raw_caption", "text", "org_caption", "original_caption"),
    "short": ("short", "shortSV_captions", "shortIB_captions", "shortLLA_captions", "caption_llava_short",
              "short_caption"),
    "long": ("long", "longSV_captions", "longIB_captions", "longLLA_captions", "long_caption", "description",
             "re_caption", "vlm_caption", "caption_llava", "extra_caption", "IIW", "conversations"),
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
    models: list[str] = field(default_factory=list)  # whose caption each sentence of `long` is of; []: all of one

    def long_captions(self) -> list[list[str]]:
        """The sentences of each model's long caption."""
        captions = {}
        for sentence, model in zip(self.long, self.models or [""] * len(self.long)):
            captions.setdefault(model, []).append(sentence)
        return list(captions.values())

    def within(self, crop: tuple) -> "Captions":
        """The captions of what a crop leaves of the image: their boxes as shares of it. A sentence whose box has its
        middle outside tells of what is hardly to be seen, and goes; all stay, without places, if none would be left.

        crop and boxes: (left, top, right, bottom) as shares of the image.
        """
        if not self.boxes:
            return self
        left, top, right, bottom = crop
        long, boxes, models = [], [], []
        for n, (sentence, box) in enumerate(zip(self.long, self.boxes)):
            if box:
                corners = np.reshape(box, (2, 2))
                x, y = corners.mean(0)
                if not (left <= x <= right and top <= y <= bottom):
                    continue
                shares = (corners - (left, top)) / (right - left, bottom - top)
                box = tuple(shares.clip(0, 1).flatten().tolist())
            long.append(sentence)
            boxes.append(box)
            models += self.models[n:n + 1]
        if not long:
            return replace(self, boxes=[])
        return replace(self, long=long, boxes=boxes, models=models)


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


LONGEST_TEXT = 100_000  # characters; a longer one is no caption but a damaged file


def read_captions(row: dict, fields: dict = FIELDS, name: str = "") -> Captions:
    """A row of a data file -> its texts, found by the names in `fields`. A text may be a string or a list of its
    sentences, and of a long caption a list of {"box": [x0, y0, x1, y1] as shares of the image, "text": sentences}.
    Raises BadSample, with `name` in its detail, if there is no text or a box is none."""
    row = all_fields(row)
    found = {}  # kind: the texts of each field that has some
    for kind, names in fields.items():
        texts = [clean_field(row.get(field)) for field in names]
        found[kind] = [of_field for of_field in texts if of_field]
    listed = found["caption"][0] if found["caption"] else []
    raw = find_raw(found, listed)
    if not raw:
        raise BadSample("no caption", name)

    placed = []
    for name_of_field in fields["long"]:
        model = name_of_field.removeprefix("long").removeprefix("dense")  # longSV and denseSV are of one
        for text, box in with_boxes(row.get(name_of_field), name):
            placed.append((text, box, model))
    if not placed:
        placed = [(text, None, "") for text in listed[1:] or listed or [raw]]
    long, boxes, models = [], [], []
    for text, box, model in placed:
        for sentence in split_sentences(text):
            long.append(sentence)
            boxes.append(box)
            models.append(model)
    if not long:
        long, boxes = [raw], [None]

    perspectives = []
    for kind in PERSPECTIVES:
        if kind != "raw" and found[kind]:
            perspectives.append(" ".join(found[kind][0]))
    short = [" ".join(texts) for texts in found["short"]]
    if not any(boxes):
        boxes = []
    if len(set(models)) == 1:
        models = []
    return Captions(raw, short, long, [raw, *(perspectives or listed[1:])], boxes, models)


def find_raw(found: dict, listed: list[str]) -> str:
    """The raw caption, or what comes nearest to it: the first of a list, a short one, the first of anything."""
    candidates = [*found["raw"], listed[:1], *found["short"]]
    for kind in found.values():
        candidates += [texts[:1] for texts in kind]
    for texts in candidates:
        if texts:
            return " ".join(texts)
    return ""


def clean_field(value) -> list[str]:
    """The texts of a field, a string or a list, stripped; what is no text goes."""
    texts = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, dict) and "box" in part:
            part = part.get("text")
        elif isinstance(part, dict) and part.get("from") == "gpt":  # the answer in a conversation
            part = part.get("value")
        if isinstance(part, str) and part.strip():
            texts.append(part.strip()[:LONGEST_TEXT])
    return texts


def with_boxes(value, name) -> list[tuple[str, tuple | None]]:
    """clean_field, each text with its box, or None. Raises BadSample."""
    placed = []
    for part in value if isinstance(value, list) else [value]:
        box = part.get("box") if isinstance(part, dict) else None
        if box is not None:
            try:
                left, top, right, bottom = box = tuple(map(float, box))
            except (TypeError, ValueError):
                left = math.nan
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise BadSample("not a box", f"{name}, {str(box)[:60]} is not [x0, y0, x1, y1] from 0 to 1")
        placed += [(text, box) for text in clean_field([part])]
    return placed


def text_slots(s) -> list[str]:
    """The kind of text in each of the T slots, from the settings: "raw", "sub" (sub-caption), "long", "perspective"."""
    slots = ["raw"] if s.raw_caption else []
    if s.sampling == "whole":
        slots += ["long"] * min(s.sub_captions, 1)
    else:
        slots += ["sub"] * s.sub_captions
    return slots + ["long"] * s.long_texts + ["perspective"] * s.perspectives


def draw_texts(c: Captions, s, rng: random.Random) -> list[tuple[str, tuple | None]]:
    """The T texts of one image for one step, in the order of text_slots, each with its box, if it has one.

    Sub-captions (DreamLIP, section 3.2) are drawn from the sentences, the short captions, the raw one unless it has a
    slot of its own, and, in the share `whole_caption` of the draws, a whole long caption as one text: without
    replacement while they last. Long texts (LoTLIP, section 3.1) join `long_sentences` consecutive sentences (0: all)
    of one model's caption, each text of another model's while they last.
    """
    slots = text_slots(s)
    captions = c.long_captions()
    rng.shuffle(captions)  # of one caption this draws no random number
    pool = list(zip(c.long, c.boxes or [None] * len(c.long)))
    if s.short_caption:
        pool += [(text, None) for text in c.short]
    if not s.raw_caption:
        pool.append((c.raw, None))
    if rng.random() < s.whole_caption:
        pool.append((" ".join(captions[0]), None))

    texts = [(c.raw, None)] * slots.count("raw")
    texts += draw_sub_captions(pool, slots.count("sub"), s.sampling, rng)
    for j in range(slots.count("long")):
        sentences = captions[j % len(captions)]
        n = s.long_sentences or len(sentences)
        start = rng.randrange(max(len(sentences) - n, 0) + 1)
        texts.append((" ".join(sentences[start:start + n]), None))
    M = slots.count("perspective")
    texts += [(text, None) for text in c.perspectives[:M]]
    lacking = max(0, M - len(c.perspectives))
    return texts + draw_sub_captions(pool, lacking, s.sampling, rng)


def draw_sub_captions(pool: list, k: int, sampling: str, rng: random.Random) -> list:
    if sampling == "first":  # the ablation: the same k texts every time
        return [pool[i % len(pool)] for i in range(k)]
    drawn = rng.sample(pool, min(k, len(pool)))
    return drawn + rng.choices(pool, k=max(0, k - len(pool)))


def patches_of(boxes, side: int) -> torch.Tensor:
    """Which of side · side patches, row by row, each box overlaps; of None all: T boxes -> bool [T, side²]."""
    whole = [box or (0, 0, 1, 1) for box in boxes]
    left, top, right, bottom = side * torch.tensor(whole, dtype=torch.float64).T[..., None]  # each [T, 1]
    place = torch.arange(side)
    x = (left.floor() <= place) & (place < right.ceil())  # [T, side]
    y = (top.floor() <= place) & (place < bottom.ceil())
    return (y[:, :, None] & x[:, None]).flatten(1)


# ---- records: where the samples are in the files ---------------------------------------------------------------------

# A sample is a span of bytes in a file: of a tar the members with its key, of JSON lines its line. All that stays in
# memory is one SPAN a sample, mapped from an index under ~/.cache, so that the workers and the ranks of a machine share
# one copy. The span is read and parsed when the sample is wanted, so any sample is reached at once. A table (CSV,
# Parquet, a JSON array, compressed JSON lines) is copied as JSON lines beside its index, and read from there.
SPAN = np.dtype([("start", "<u8"), ("length", "<u4"), ("key", "<u8")])  # `key`: hash of the sample's key
INDEX_VERSION = 5  # of the indices kept: raise it when a scan_ function changes
PIECE = 1 << 20  # characters of a JSON file that are read at a time
LONGEST = 1 << 27  # bytes of one sample: no picture is larger, and a damaged file shall not fill the memory


class BadCount(dict):
    """{reason: the first few details} of bad samples; `counts` has the numbers, `seen` that of all samples met."""

    def __init__(self, details=(), counts=(), seen=0):
        super().__init__(details)
        self.counts = Counter(counts)
        self.seen = seen

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
        parts = []
        for reason, n in self.counts.most_common():
            more = " ..." if n > 3 else ""
            parts.append(f"{n} × {reason}: {', '.join(self[reason][:3])}{more}")
        return "; ".join(parts)

    def over(self, share: float, total: int, seen: int) -> bool:
        """Whether more than this share is bad, of at least 200 seen; total and seen may be those of all ranks."""
        return seen >= 200 and total > share * seen

    def check(self, share: float):
        """Raises UserError where that is so."""
        if self.over(share, self.total, self.seen):
            raise UserError(f"{self.total} of {self.seen} samples are bad, over --max-bad {share:g}: mend the data or "
                            f"raise the limit ({self.report()})")


@dataclass
class Record:
    key: str
    image: bytes | Path | str  # content, path, or what a row calls its path or URL
    row: dict  # its texts, as read_captions takes them


def hashed(key: str | bytes) -> int:
    if isinstance(key, str):
        key = key.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def parse_json(content: bytes, name: str) -> dict:
    try:
        row = json.loads(content.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise BadSample("JSON does not parse", name)
    return row


IMAGE_FIELDS = ("image", "image_path", "image path", "filepath", "file_name", "image_file", "path", "url",
                "image_url", "image/key", "key")


def image_field(row: dict, part: str = "") -> str:
    """The path or URL of a row's image, under the first of the usual names whose text has this part. Raises BadSample."""
    for wanted in IMAGE_FIELDS:
        for name, image in row.items():
            if name.lower() == wanted and isinstance(image, str) and image.strip() and part in image:
                return image.strip()
    raise BadSample("no image named", str(row.get("key", ""))[:80])


def last_part(location: str) -> str:
    """The file's name in a path or URL."""
    if "://" in location:
        location = urllib.parse.urlsplit(location).path
    return location.rpartition("/")[2]


def row_key(row: dict) -> str:
    key = row.get("key")
    return key if isinstance(key, str) and key else image_field(row)


# Each format has a scan_ function, file -> (start, length, key, identity) of every sample, or BadSample (of samples
# with the same identity the first stays); and a parse_ function, (bytes of a span, file) -> Record.

def tar_members(file):
    """(key, extension, TarInfo, where its header should begin) of every file in a tar. The key of "a/b.seg.JSON" is
    "a/b": it ends at the first dot of the file's name. `ignore_zeros` goes on behind a damaged header."""
    expected = 0
    with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, errors="surrogateescape") as tar:
        for member in tar:
            folder, slash, base = member.name.removeprefix("./").rpartition("/")
            stem, _, extension = base.partition(".")
            if member.isreg() and stem:  # no stem: a system's own file, like .DS_Store
                yield folder + slash + stem, extension.lower(), member, expected
            expected = padded(member.offset_data + member.size * member.isreg())


def padded(size: int) -> int:
    return (size + 511) // 512 * 512


def scan_tar(path):
    """A sample is a run of members with one key, from the header of the first to the end of the last."""
    runs = []  # [key, start, stop, extensions]
    with open(path, "rb") as file:
        with suppress(tarfile.TarError, OSError, ValueError):  # raised where a tar is cut off
            for key, extension, member, expected in tar_members(file):
                damaged = member.offset > expected
                if damaged:
                    yield BadSample("tar damaged", f"{path.name} at byte {expected}")
                if damaged or not runs or runs[-1][0] != key or extension in runs[-1][3]:
                    runs.append([key, member.offset, 0, []])
                runs[-1][2] = member.offset_data + member.size
                runs[-1][3].append(extension)
        end = padded(runs[-1][2]) if runs else 0
        file.seek(end)
        rest = file.read(1 << 20)
        if any(rest) or not rest:  # a whole tar ends in zeros
            yield BadSample("tar cut off", f"{path.name} at byte {end}")
        if runs and runs[-1][2] > file.seek(0, os.SEEK_END):
            runs.pop()
    for key, start, stop, extensions in runs:
        if any(extension in SUFFIXES for extension in extensions):
            yield start, stop - start, key, key
        else:
            yield BadSample("no image", f"{path.name}/{key} with .{' .'.join(extensions[:3])}")


def parse_tar(content, path):
    name = ""
    image = None
    text = {}
    row = {}
    for key, extension, member, _ in tar_members(io.BytesIO(content + bytes(1024))):
        part = content[member.offset_data:member.offset_data + member.size]
        if extension in SUFFIXES and image is None:
            name, image = key, part
        elif extension == "txt":
            text = {"caption": part.decode("utf-8-sig", errors="replace")}
        elif extension == "json":
            row = parse_json(part, f"{path.name}/{key}.json")
    if image is None:
        raise BadSample("no image", f"{path.name}/{name}")
    named = {field: value for field, value in row.items() if value}
    return Record(name, image, text | named)


def scan_lines(path):
    start = 0
    with open(path, "rb") as file:
        lines = iter(lambda: file.readline(LONGEST), b"")
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path.name} line {number}"
                try:
                    row = parse_json(line, where)
                    key = row_key(row)
                    identity = key if row.get("key") == key else line  # a picture may have several lines
                    yield start, len(line), key, identity
                except BadSample as bad:
                    torn = bad.reason == "JSON does not parse" and not line.endswith(b"\n")
                    yield BadSample("last line torn" if torn else bad.reason, where)
            start += len(line)


def parse_lines(content, path):
    row = parse_json(content, path.name)
    return Record(row_key(row), image_field(row), row)


def scan_folder(folder):
    """The pictures below a folder; start and length are those of the path in the list of all paths (`list_folder`)."""
    start = 0
    for name in list_folder(folder):
        key = os.fsdecode(name).rpartition(".")[0]
        yield start, len(name), key, key
        start += len(name)


def list_folder(folder) -> list[bytes]:
    names = []
    for at, _, files in os.walk(folder):
        for name in files:
            suffix = name.rpartition(".")[2].lower()
            if suffix in SUFFIXES and not name.startswith("."):
                path = os.path.join(at, name)
                names.append(os.fsencode(os.path.relpath(path, folder)))
    return sorted(names)


def parse_folder(content, folder):
    path = folder / os.fsdecode(content)
    row = {}
    text = path.with_suffix(".txt")
    data = path.with_suffix(".json")
    if text.exists():
        row = {"caption": text.read_bytes().decode("utf-8-sig", errors="replace")}
    if data.exists():
        row |= parse_json(data.read_bytes(), str(data))
    return Record(os.fsdecode(content).rpartition(".")[0], path, row)


def csv_rows(path):
    """The rows of a CSV or TSV, with a BadSample for each that does not parse. Where a quote is never closed, that row
    and those up to the next quote are one bad row."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        names = next(reader, None)
        while names:
            where = f"{path.name} line {reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:  # a cell longer than any caption
                cells = [""]
            if len(cells) == len(names):
                yield dict(zip(map(str.strip, names), cells))
            elif cells:
                yield BadSample("row does not parse", where)


def json_rows(path):
    """The objects of a JSON file, in an array or one after another, read piece by piece, for the file may be larger
    than the memory. Where one does not parse, it and what follows in the same piece are one bad row."""
    decoder = json.JSONDecoder()
    open_text = gzip.open if path.suffix == ".gz" else open
    bad = BadSample("JSON does not parse", path.name)
    rest = ""
    try:
        with open_text(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            while piece := file.read(PIECE):
                rest += piece
                end = 0
                with suppress(ValueError, RecursionError):  # raised where an object ends in a later piece
                    while True:
                        row, end = decoder.raw_decode(rest, rest.index("{", end))
                        yield row
                rest = rest[end:]
                if len(rest) > 2 * PIECE:
                    yield bad
                    rest = ""
    except (OSError, EOFError, zlib.error):  # a compressed file that is cut off or damaged
        rest = "cut off"
    if rest.strip(" \t\r\n,[]"):
        yield bad


def parquet_batches(path):
    """The rows of a Parquet file as they are, in lists of up to 1,000. Raises UserError."""
    try:
        from pyarrow.parquet import ParquetFile  # here, because no other format needs it
    except ImportError:
        raise UserError(f"{path} is Parquet, which pyarrow reads: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                yield batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def parquet_rows(path):
    """The rows of a Parquet file of captions. Raises UserError where the pictures are in it, too."""
    for row in chain.from_iterable(parquet_batches(path)):
        if isinstance(row.get("image"), dict):
            raise UserError(f"{path} has its pictures inside: python data.py --shards {path} FOLDER writes tar shards")
        yield row


TABLES = {".csv": csv_rows, ".tsv": csv_rows, ".gz": json_rows, ".json": json_rows, ".parquet": parquet_rows}


def copy_table(path, copy):
    """Writes a table as JSON lines. Yields a BadSample for each row that cannot be read. Raises UserError."""
    try:
        with written_whole(copy) as temporary, open(temporary, "w") as file:
            for row in TABLES[path.suffix](path):
                if isinstance(row, BadSample):
                    yield row
                else:
                    file.write(json.dumps(row, default=str) + "\n")  # str: of Parquet's dates and decimals
    except OSError as error:
        raise UserError(f"{copy.parent}, for a copy of {path} as JSON lines, cannot be written ({error.strerror}): set "
                        "MINILIP_CACHE to a folder with room") from None


@contextmanager
def written_whole(path: Path):
    """-> another path, which takes this one's place once its file is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


READERS = {".tar": (scan_tar, parse_tar), "": (scan_folder, parse_folder),
           **dict.fromkeys((".jsonl", ".jsonlines", *TABLES), (scan_lines, parse_lines))}


def captions_path(file: Path) -> Path:
    """Where the new captions of a file or folder lie: 00000.tar -> 00000.captions.jsonl, set -> set.captions.jsonl."""
    return Path(f"{file.resolve()}.captions.jsonl") if file.is_dir() else file.with_suffix(".captions.jsonl")


def expand(pattern: str) -> list[str]:
    """shard-{00000..00331}.tar -> the 332 names, as a shell expands it."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not braces:
        return [pattern]
    texts = []
    for number in range(int(braces[1]), int(braces[2]) + 1):
        padded_number = str(number).zfill(len(braces[1]))
        texts += expand(pattern[:braces.start()] + padded_number + pattern[braces.end():])
    return texts


def find_files(pattern: str) -> list[Path]:
    """The files, all of one format, that one path of --data stands for. Raises UserError."""
    if os.path.isdir(pattern):
        folder = Path(pattern)
        return sorted(folder.glob("*.tar")) or sorted(folder.glob("metadata.jsonl")) or [folder]
    files = []
    for text in expand(pattern):
        files += map(Path, sorted(glob.glob(text)) or [text])
    for file in files:
        if not file.is_file() or file.suffix not in READERS or file.suffix != files[0].suffix:
            trouble = f"--data {file} cannot be read" if file.is_file() else f"no file {file}"
            raise UserError(f"{trouble}: --data takes 'scenes', .tar shards, .jsonl, .jsonl.gz, .json, .csv, .parquet "
                            "or a folder, and one pattern stands for files of one format")
    return files


@dataclass
class Index:
    """Where the samples of a file are."""

    source: Path  # the file itself, or a table's copy
    spans: np.ndarray  # [N] of SPAN
    bad: BadCount  # what had to be left out

    def read(self, start: int, length: int) -> bytes:
        """Reads with pread, which moves no position, so processes forked from this one may share an open file."""
        content = os.pread(opened(self.source).fileno(), length, start)
        if len(content) < length:
            raise BadSample("file cut off", f"{self.source} at byte {start}")
        return content


@functools.lru_cache(maxsize=512)
def opened(file):
    return open(file, "rb", buffering=0)


def index_of(file: Path) -> Index:
    """The index kept under ~/.cache, which has another name once the file has changed, or a new one. A folder's is not
    kept, for its time does not tell what has changed below it."""
    if not file.is_file():
        return scan(file, file)
    cache = Path(os.environ.get("MINILIP_CACHE") or Path.home() / ".cache" / "minilip")
    stat = file.stat()
    name = f"{hashed(str(file.resolve())):x}"
    path = cache / f"{name}-{stat.st_size:x}-{stat.st_mtime_ns:x}-{INDEX_VERSION}"
    source = path.with_suffix(".jsonl") if file.suffix in TABLES else file
    try:
        with open(path, "rb") as kept:
            head = kept.readline()
        n, *bad = json.loads(head)
        spans = np.memmap(path, SPAN, "r", len(head), (n,)) if n else np.zeros(0, SPAN)
        if source.is_file():
            return Index(source, spans, BadCount(*bad))
    except (OSError, ValueError, TypeError):
        pass
    index = scan(file, source)
    head = json.dumps([len(index.spans), *index.bad.plain()]).encode()
    with suppress(OSError):  # where it cannot be written, it is not kept
        with written_whole(path) as temporary:
            temporary.write_bytes(head + b"\n" + index.spans.tobytes())
        for old in cache.glob(f"{name}-*"):
            if old not in (path, source):
                old.unlink(missing_ok=True)
    return index


def scan(file: Path, source: Path) -> Index:
    """Looks through a file, of a table through the copy made here. A sidecar's spans are sorted by key."""
    spans = []
    bad = BadCount()
    known = set()
    sidecar = file.name.endswith(".captions.jsonl")  # a key has a line for each model, or each time, that captioned it
    scan_format, _ = READERS[file.suffix if file.is_file() else ""]
    try:
        if source != file:
            for problem in copy_table(file, source):
                bad.seen += 1
                bad.add(problem)
        for found in scan_format(source):
            bad.seen += 1
            if isinstance(found, BadSample):
                bad.add(found)
                continue
            start, length, key, identity = found
            identity = hashed(identity)
            if length > LONGEST:
                bad.add(BadSample("sample too large", f"{file.name} at byte {start}"))
            elif identity in known and not sidecar:
                bad.add(BadSample("duplicate", f"{file.name}: {key[:80]}"))
            else:
                known.add(identity)
                spans.append((start, length, hashed(key)))
    except OSError as error:
        bad.add(BadSample("file cannot be read", f"{file}: {error.strerror}"))
    spans = np.array(spans, SPAN)
    if sidecar:
        spans.sort(order="key", kind="stable")
    return Index(source, spans, bad)


def read_indices(files: list[Path]) -> list[Index]:
    """index_of every file, in parallel where that takes long."""
    if sum(file.stat().st_size for file in files) < 1 << 24:
        return [index_of(file) for file in files]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # In other processes, so that what scanning takes of memory is given back.
    with ProcessPoolExecutor(max(1, os.cpu_count() // ranks)) as pool:
        indices = pool.map(index_of, files)
        return list(tqdm(indices, "indexing", len(files), unit="file", delay=2, leave=False))


class Records:
    """All samples of one path of --data: a file, {00000..00331}.tar, *.tar, a folder of shards or of pictures.

    records[i] -> Record, read from its file and joined with the sidecar of new captions, where there is one; raises
    BadSample. `bad`: what the index had to leave out. `image_root`: where the images of CSV and JSON lines lie, else
    beside the file.
    """

    def __init__(self, path: str, image_root: str | None = None):
        self.path = str(path)
        self.root = Path(image_root) if image_root else None
        self.files = find_files(self.path)
        self.is_folder = self.files[0].is_dir()
        self.listing = b"".join(list_folder(self.files[0])) if self.is_folder else None
        _, self.parse = READERS["" if self.is_folder else self.files[0].suffix]
        self.indices = read_indices(self.files)
        counts = [len(index.spans) for index in self.indices]
        self.first = np.cumsum([0, *counts])  # the number of each file's first sample, and that of all
        self.bad = BadCount()
        self.sidecars = {}  # number of a file -> index of its new captions
        for n, file in enumerate(self.files):
            self.bad.merge(self.indices[n].bad)
            if captions_path(file).is_file():
                sidecar = index_of(captions_path(file))
                sidecar.bad.seen = 0  # no samples, but what is said of them
                self.bad.merge(sidecar.bad)
                self.sidecars[n] = sidecar

    def __len__(self):
        return int(self.first[-1])

    def file_of(self, i: int) -> int:
        return int(np.searchsorted(self.first, i, "right")) - 1

    def locate(self, n: int, image: str) -> Path:
        """The image that a row of file n names: below the root; of a URL the last part counts."""
        if "://" in image:
            image = last_part(image)
        elif "." not in image:  # a key, as IIW's
            image += ".jpg"
        return (self.root or self.files[n].parent) / image

    def keys(self) -> np.ndarray:
        """The hash of every sample's key: uint64 [N]."""
        return np.concatenate([index.spans["key"] for index in self.indices])

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(i)
        n = self.file_of(i)
        index = self.indices[n]
        start, length, key = index.spans[i - self.first[n]].tolist()
        try:
            content = self.listing[start:start + length] if self.is_folder else index.read(start, length)
            record = self.parse(content, self.files[n])
            if n in self.sidecars:
                record.row["captions"] = recaptioned(record.row) | new_captions(self.sidecars[n], key)
        except OSError as error:
            raise BadSample("file cannot be read", f"{self.files[n]}: {error.strerror}") from None
        if isinstance(record.image, str):
            record.image = self.locate(n, record.image)
        return record


def equal(hashes: np.ndarray, wanted) -> slice:
    """Where a hash stands among sorted ones."""
    wanted = np.uint64(wanted)
    return slice(np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, "right"))


def new_captions(sidecar: Index, key: int) -> dict:
    """What the lines of a sidecar say of a key, given by its hash; of two that name a field the later."""
    found = {}
    for start, length, _ in sidecar.spans[equal(sidecar.spans["key"], key)].tolist():
        found |= recaptioned(parse_json(sidecar.read(start, length), sidecar.source.name))
    return found


# ---- captions joined to shards, and shards made of Parquet -----------------------------------------------------------

def identities(record: Record) -> list[str]:
    """What a picture is known by: the URL in its row, if there is one, then its key's last part up to the first dot."""
    found = []
    with suppress(BadSample):  # raised where there is none
        found.append(image_field(record.row, "://"))
    name, _, _ = last_part(record.key).partition(".")
    return [*found, name]


def texts_to_join(row: dict, fields: dict) -> dict:
    """{field: text} for a sidecar. A field "caption" would hide the picture's own: it goes under the kind that
    --caption-fields gives it, or stays behind."""
    row = all_fields(row)
    texts = {}
    for kind, names in fields.items():
        for name in names:
            if kind != "caption" and clean_field(row.get(name)):
                texts[kind if name == "caption" else name] = row[name]
    return texts


def join(captions: str, pattern: str, fields: dict):
    """Writes the texts of a table's rows into a sidecar beside each file of samples. Raises UserError.

    A row is known by its URL. Only if it has none, its key counts, or else its file's name: img2dataset numbers keys
    anew in each download. In memory are hashes of these alone.
    """
    samples = Records(pattern)
    for sidecar in map(captions_path, samples.files):
        if sidecar.exists() and not all("joined" in row for row in read_json(sidecar)):
            raise UserError(f"{sidecar} has captions that --join has not written: move it away")
    table = Records(captions)
    hashes = np.zeros(len(table), np.uint64)
    for i in tqdm(range(len(table)), "reading captions", leave=False):
        with suppress(BadSample):
            hashes[i] = hashed(identities(table[i])[0])
    order = hashes.argsort(kind="stable")
    hashes = hashes[order]

    matched = Counter()
    for n, file in enumerate(tqdm(samples.files, "joining", leave=False)):
        lines = []
        for i in range(*samples.first[n:n + 2]):
            with suppress(BadSample):
                sample = samples[i]
                texts = {}
                for known_by in identities(sample):
                    rows = order[equal(hashes, hashed(known_by))]
                    is_url = "://" in known_by
                    if len(rows) == 1 or (len(rows) and is_url):  # files in several folders may have the same name
                        texts = texts_to_join(table[int(rows[0])].row, fields)
                        break
                if texts:
                    matched[is_url] += 1
                    lines.append(json.dumps({"key": sample.key, "joined": captions, "captions": texts}) + "\n")
        if lines:
            with written_whole(captions_path(file)) as temporary:
                temporary.write_text("".join(lines))
    if not matched:
        raise UserError(f"--join: none of {len(table):,} rows in {captions} has captions of a sample in {pattern}, by "
                        f"URL, key or file name (left out: {table.bad.report() or 'none'}): check --caption-fields, and "
                        f"that the pictures are named by a column {', '.join(IMAGE_FIELDS)}")
    print(f"{matched.total():,} of {len(samples):,} samples have captions of {len(table):,} rows now: {matched[True]:,} "
          f"by URL, {matched[False]:,} by key or name")


def write_shards(pattern: str, folder: str):
    """Parquet files with the pictures inside -> tars of up to 1,000 samples: KEY.jpg as its bytes are, KEY.json the
    other columns. Raises UserError."""
    if os.path.exists(folder):
        raise UserError(f"--shards {folder} exists: name a new folder")
    batches = chain.from_iterable(map(parquet_batches, find_files(pattern)))
    for shard, rows in enumerate(batches):
        with written_whole(Path(folder, f"{shard:05}.tar")) as temporary, tarfile.open(temporary, "w") as tar:
            for number, row in enumerate(rows):
                picture = row.pop("image", None)
                if not isinstance(picture, dict):
                    raise UserError(f"--shards {pattern} has no pictures: a column image with bytes is wanted")
                contents = {"jpg": picture["bytes"] or b"", "json": json.dumps(row, default=str).encode()}
                for extension, content in contents.items():
                    member = tarfile.TarInfo(f"{shard:05}{number:04}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


# ---- datasets --------------------------------------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B,3,S,S] -> float32, with CLIP's mean and deviation; on the device, so that bytes are what travels."""
    mean, std = mean_and_deviation(images.device)
    return images.float().sub_(mean).div_(std)


@functools.cache  # to bring numbers to a GPU anew at every step would be to wait for it
def mean_and_deviation(device):
    mean = torch.tensor(MEAN, device=device)
    std = torch.tensor(STD, device=device)
    return 255 * mean[:, None, None], 255 * std[:, None, None]


# A dataset: len; dataset[i], or augmented dataset.__getitem__(i, rng), -> (image uint8
# [3,S,S], Captions), or BadSample raised; `bad`, what it left out; `size`, S; order(rng, window) -> all its indices.

class SceneImages:
    """Embedded scenes. Training shifts the image by up to 1/32 of its side; it never flips: "left" is in the texts."""

    def __init__(self, split: str, n: int, size: int, kinds: int):
        self.scenes = Scenes(split, n, size, kinds)
        self.train = split == "train"
        self.size = size
        self.bad = BadCount()

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i, rng=None):
        scene = self.scenes.scene(i)
        image, _ = self.scenes.draw(scene)
        c = scene.captions
        perspectives = [c[name] for name in PERSPECTIVES]
        captions = Captions(c["raw"], [c["short"]], c["long"], perspectives, self.scenes.boxes(scene))
        if self.train and rng:
            reach = max(1, self.size // 32)
            down = rng.randint(-reach, reach)
            across = rng.randint(-reach, reach)
            place = np.arange(self.size)
            rows = (place + down).clip(0, self.size - 1)
            columns = (place + across).clip(0, self.size - 1)
            image = image[rows][:, columns]
            x = across / self.size
            y = down / self.size
            captions = captions.within((x, y, x + 1, y + 1))
        return torch.from_numpy(image).permute(2, 0, 1), captions

    def order(self, rng, window):
        return rng.permutation(len(self))


HELD_OUT = 5000  # samples held out for validation, or a tenth where that is less


def spread(n: int, k: int) -> list[int]:
    """k of the numbers below n, evenly spread; all, if they are fewer."""
    return np.linspace(0, n - 1, min(n, k)).astype(int).tolist()


class Pictures:
    """Records with their pictures decoded. `part`: "train", "validation" (by the hash of the key), or "all"."""

    def __init__(self, records: Records, size: int, part: str = "all", crop: float = 0.9, fields: dict = FIELDS,
                 augment: str = "crop"):
        self.records = records
        self.size = size
        self.crop = crop
        self.fields = fields
        self.augment = augment
        self.train = part == "train"
        self.bad = records.bad
        self.by_shard = records.parse is parse_tar and len(records.files) > 1
        share = min(0.1, HELD_OUT / max(1, len(records)))
        wanted = np.ones(len(records), bool)
        if part != "all":
            held_out = records.keys() < np.uint64(share * 2**64)
            wanted = held_out if part == "validation" else ~held_out
        self.rows = np.flatnonzero(wanted).astype(np.uint32)
        self.try_a_few(part)

    def try_a_few(self, part):
        """Raises UserError where none of a few samples can be used: the image root or a field's name is wrong."""
        failed = BadCount()
        for i in spread(len(self), 8):
            try:
                self[i]
                return
            except BadSample as bad:
                failed.add(bad)
        self.bad.merge(failed)
        raise UserError(f"--data {self.records.path} has no usable sample for {part} ({self.bad.report() or 'it is empty'}):"
                        " check --image-root and --caption-fields, or look at it with python data.py --look")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i, rng=None):
        number = int(self.rows[i])
        record = self.records[number]
        file = self.records.files[self.records.file_of(number)]
        name = f"{file.name}: {record.key}"
        captions = read_captions(record.row, self.fields, name)
        enough = self.size
        if self.train:  # decoded just large enough for the least crop
            enough = math.ceil(self.size / math.sqrt(self.crop * ASPECTS[0]))
        picture = load_image(record.image, enough, name=name)
        width, height = picture.size
        augmented = self.train and rng is not None
        with torch_seeded(rng):
            box = crop_box(picture, self.crop if augmented else None)
            picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            if augmented and self.augment == "strong":
                image = change_colours(image)
        return image, captions.within(np.divide(box, (width, height, width, height)))

    def order(self, rng, window):
        """Single samples in any order, where each is a file of its own or all are in one; shards so that what is read
        before long lies together."""
        if not self.by_shard:
            return rng.permutation(len(self))
        return shard_order(np.diff(np.searchsorted(self.rows, self.records.first)), rng, window)


class Sets:
    """Several datasets as one."""

    def __init__(self, parts: list):
        self.parts = parts
        self.size = parts[0].size
        self.bad = BadCount()
        self.first = np.cumsum([0, *map(len, parts)])
        for part in parts:
            self.bad.merge(part.bad)

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, i, rng=None):
        part = int(np.searchsorted(self.first, i, "right")) - 1
        return self.parts[part].__getitem__(i - int(self.first[part]), rng)


def open_dataset(data, part: str, n: int, size: int, kinds: int, crop: float = 0.9, image_root: str | None = None,
                 caption_fields: str = "", dense: bool = False, augment: str = "crop"):
    """--data, one path or several -> dataset. part: train, validation or test; n: how many scenes; dense: the crops'
    sentences are among the long captions. Raises UserError."""
    fields = read_fields(caption_fields, dense)

    def open_one(path):
        if path != "scenes":
            records = Records(path, image_root)
            return Pictures(records, size, "validation" if part == "test" else part, crop, fields, augment)
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
    first = np.cumsum([0, *counts])
    order = []
    files = rng.permutation(len(counts))
    for some in np.split(files, range(TOGETHER, len(files), TOGETHER)):
        numbers = [np.arange(first[file], first[file + 1]) for file in some]
        order.append(in_turn(numbers, rng.random(len(some))))
    order = np.concatenate(order)
    for start in range(0, len(order), window):
        rng.shuffle(order[start:start + window])
    return order


def in_turn(parts: list, shifts) -> np.ndarray:
    """The numbers of all parts, each part spread evenly; a part's shift, from 0 to 1, moves it by less than a place."""
    turns = []
    for numbers, shift in zip(parts, shifts):
        turns.append((np.arange(len(numbers)) + shift) / max(1, len(numbers)))
    return np.concatenate(parts)[np.argsort(np.concatenate(turns))]


class Order:
    """The endless stream of samples: order(position) -> (epoch, index), a function of the seed alone. An epoch has every
    sample of every set once, the sets mixed evenly."""

    def __init__(self, dataset, seed: int, window: int):
        self.parts = getattr(dataset, "parts", [dataset])
        self.seed = seed
        self.window = window
        self.first = np.cumsum([0, *map(len, self.parts)]).tolist()
        self.epoch = functools.lru_cache(1)(self._epoch)  # positions come in order, or nearly

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.first[-1])
        return epoch, int(self.epoch(epoch)[place])

    def _epoch(self, epoch):
        rng = np.random.default_rng((self.seed, epoch))
        orders = []
        for part, first in zip(self.parts, self.first):
            orders.append(part.order(rng, self.window) + first)
        if len(orders) == 1:
            return orders[0]
        return in_turn(orders, rng.random(len(orders)))


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
    a restart.
    """

    def __init__(self, dataset, tokenizer, settings):
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.settings = settings

    def __getitem__(self, where):
        s = self.settings
        bad = []
        epoch, index = where
        rng = random.Random(f"{s.seed} {epoch} {index}")
        while True:
            try:
                image, captions = self.dataset.__getitem__(index, rng)
                break
            except BadSample as problem:
                bad.append(problem)
                if len(bad) == ATTEMPTS:
                    raise UserError(f"{ATTEMPTS} samples in a row are bad, the last one: {problem}") from None
                rng.seed(f"{s.seed} {epoch} {where[1]} {len(bad)}")
                index = rng.randrange(len(self.dataset))
        texts, boxes = zip(*draw_texts(captions, s, rng))
        allowed = patches_of(boxes, s.image_size // s.patch) if s.region_grouping else None
        return image, self.tokenizer(texts, s.context), allowed, bad


def collate(samples) -> Batch:
    images, tokens, allowed, bad = zip(*samples)
    tokens = torch.stack(tokens)
    lengths = tokens.argmax(-1) + 1  # the end-of-text token has the greatest id
    tokens = tokens[..., :int(lengths.max())].contiguous()
    allowed = None if allowed[0] is None else torch.stack(allowed)
    return Batch(torch.stack(images), tokens, lengths.numpy(), allowed, sum(bad, []))


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
    # Forked workers share the mapped indices; to those started otherwise, as from Python 3.14 on, all would be sent.
    forks = settings.workers > 0 and sys.platform == "linux"
    loader = torch.utils.data.DataLoader(
        samples, batch_sampler=local_batches(order, settings.batch, first, last, rank, world), collate_fn=collate,
        num_workers=settings.workers, prefetch_factor=4 if settings.workers else None, worker_init_fn=begin_worker,
        pin_memory=torch.cuda.is_available(), multiprocessing_context="fork" if forks else None)
    return watched(loader)


def watched(loader):
    """The loader's batches; what goes wrong in a worker, even its death, becomes one sentence."""
    batches = iter(loader)
    if loader.num_workers:  # else PyTorch raises from a signal handler, anywhere in the main program
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except UserError as error:
        raise one_sentence(error) from None
    except (RuntimeError, OSError, EOFError) as error:  # the last two: a dead worker was about to hand over a batch
        if "DataLoader worker (pid" not in str(error) and (isinstance(error, RuntimeError) or "Caught" in str(error)):
            raise
        raise UserError(f"a data-loading process died ({str(error).splitlines()[0]}): if memory ran out, lower --workers; "
                        "else look at the data with python data.py --look") from None


def one_sentence(error: UserError) -> UserError:
    """From a worker an error arrives with a page of traceback, whose last line it is."""
    return UserError(str(error).strip().splitlines()[-1].removeprefix("data.UserError: "))


# ---- a look at data --------------------------------------------------------------------------------------------------

def look(path, image_root, fields, tokenizer, n, sheet):
    """Prints what one path of --data holds and what n samples, drawn at random, are like; draws some into a file."""
    if path == "scenes":
        raise UserError("scenes are drawn, not read: write some with python scenes.py --write FOLDER, and look there")
    records = Records(path, image_root)
    print(f"{path}: files {len(records.files)}, samples {len(records):,}; left out: {records.bad.report() or 'none'}")
    bad = BadCount()
    names = Counter()
    shown = []
    lengths = {"raw caption": [], "short caption": [], "sentence of long": [], "whole long": []}
    chosen = np.random.default_rng(0).permutation(len(records))[:n].tolist()
    for i in tqdm(chosen, "reading", delay=2, leave=False):
        try:
            record = records[i]
            names.update(name for name, value in all_fields(record.row).items() if value)
            c = read_captions(record.row, fields, record.key)
            picture = load_image(record.image, name=record.key)
        except BadSample as error:
            bad.add(error)
            continue
        texts_of = [c.raw], c.short, c.long, [" ".join(sentences) for sentences in c.long_captions()]
        for kind, texts in zip(lengths, texts_of):
            lengths[kind] += [len(tokenizer.encode(text)) + 2 for text in texts]  # with start and end
        if len(shown) < 24:
            picture.thumbnail((256, 256))
            texts = [record.key[-44:], f"RAW {c.raw}"]
            texts += [f"SHORT {text}" for text in c.short]
            texts.append("LONG " + " | ".join(c.long))
            shown.append((picture, texts))
    print(f"{len(chosen):,} looked at, {bad.total} bad: {bad.report() or 'none'}")
    counts = [f"{name} {count:,}" for name, count in names.most_common()]
    print(f"fields: {', '.join(counts)}")
    for kind, found in lengths.items():
        if found:
            middle, most = np.quantile(found, (0.5, 0.99))
            over = 100 * np.mean(np.array(found) > 77)
            print(f"{kind}: {len(found):,}, tokens: median {middle:.0f}, 99% up to {most:.0f}, over 77: {over:.1f}%")
    if sheet and shown:
        contact_sheet(sheet, shown)
        print(f"wrote {sheet}")


def contact_sheet(path, shown: list[tuple]):
    """Draws (picture, texts) pairs into a picture file, three in a row. Raises UserError."""
    from matplotlib.figure import Figure  # here, because it takes a second to import
    rows = math.ceil(len(shown) / 3)
    figure = Figure((19, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 6, width_ratios=(1, 1.6) * 3, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for (picture, texts), left, right in zip(shown, axes[::2], axes[1::2]):
        left.imshow(picture)
        text = "\n".join(textwrap.fill(text, 46, max_lines=6) for text in texts)
        right.text(0, 1, text, va="top", fontsize=9.5, transform=right.transAxes, parse_math=False)
    try:
        figure.savefig(path, dpi=80)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--look", metavar="DATA", help="print counts, bad samples, lengths of captions")
    command.add_argument("--join", nargs=2, metavar=("CAPTIONS", "SHARDS"),
                         help="write captions beside shards, found by the picture's URL, key or file name")
    command.add_argument("--shards", nargs=2, metavar=("PARQUET", "FOLDER"), help="write pictures as tar shards")
    parser.add_argument("--look-images", type=int, default=1000, metavar="N", help="samples to read (default 1000)")
    parser.add_argument("--sheet", metavar="FILE", help="write a contact sheet with captions")
    parser.add_argument("--image-root", help="where the image paths in tables and JSON lines begin")
    parser.add_argument("--caption-fields", default="", help='names of fields, like "raw=title,long=a+b"')
    parser.add_argument("--tokenizer", default="auto", help="to count tokens with")
    options = parser.parse_args()
    if options.look_images < 1:
        raise UserError(f"--look-images must be at least 1, not {options.look_images}")
    if options.sheet:
        check_target(options.sheet)
    fields = read_fields(options.caption_fields)
    if options.join:
        join(*options.join, fields)
    elif options.shards:
        write_shards(*options.shards)
    else:
        look(options.look, options.image_root, fields, load_tokenizer(options.tokenizer), options.look_images,
             options.sheet)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
