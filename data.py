"""From files to batches: tokenizer, sentences, pictures, captions, the texts each method draws, datasets, the order of samples.

    tokenizer = load_tokenizer("clip")
    tokens = tokenizer(["a photo of a dog", "a cat"], 77)  # [2, 77]: start, ids, end, zeros
    split_sentences("A dog, approx. 3.5 ft. tall. It runs...")  # ["A dog, approx. 3.5 ft. tall.", "It runs..."]
    image = load_image("dog.png")  # PIL, RGB, upright, on white

    python data.py --train-bpe assets/scenes.tiktoken    how the small vocabulary of the scenes was made
"""

import argparse
import base64
import functools
import gzip
import hashlib
import html
import http.client
import importlib.util
import io
import json
import os
import random
import re
import signal
import tempfile
import urllib.request
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex  # tiktoken's own dependency: CLIP's word pattern needs \p{L}, which re lacks
import tiktoken
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from scenes import KINDS, PERSPECTIVES, Scenes


class UserError(Exception):
    """A mistake the user can mend: one sentence naming the thing and the remedy. train.py prints it and exits 2."""


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

    def lengths(self, tokens):
        """Tokens in use, both ends counted: [N, L] -> [N]."""
        return tokens.argmax(dim=1) + 1


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
    if name.endswith(".txt.gz"):
        return Tokenizer(Path(name).name.removesuffix(".txt.gz"), read_clip_ranks(name), find_ftfy())
    if name == "scenes" or name.endswith(".tiktoken"):
        path = SCENES_VOCABULARY if name == "scenes" else Path(name)
        return Tokenizer(path.stem, read_tiktoken(path))
    raise UserError(f"no tokenizer {name!r}: take auto, clip, scenes, or the path of a .tiktoken or .txt.gz file")


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
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # load_image has its own, settable limit


def load_image(source, size=None, max_pixels=64_000_000):
    """A path, bytes or a binary file -> PIL image: RGB, turned upright by its EXIF tag, transparent parts on white.

    `size`: the shorter side wanted in the end; a JPEG is decoded at 1/2, 1/4 or 1/8, much faster, where that leaves it.
    Raises BadSample with the reason "image missing", "image too large" (over max_pixels: a small file can fill the
    memory), "image truncated" or "image will not decode".
    """
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "image in memory")
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


# ---- captions and the texts drawn from them --------------------------------------------------------------------------

@dataclass
class Captions:
    """The texts of one image. A method never finds one missing: what the data lacks is made of what it has."""

    raw: str  # the caption found with the image
    short: str | None  # a model's one-sentence caption
    long: list[str]  # the sentences of a long caption
    perspectives: list[str]  # Holistic CLIP's M texts, the raw caption first


def read_captions(row: dict) -> Captions:
    """From {"raw", "short", "long", "details", ...} (re-captioning's names; "long" a string or a list of sentences), or
    {"caption": a string, or a list of M texts} (Holistic CLIP's files), or both. Raises BadSample if there is no text."""
    inner = row.get("captions")
    named = {k: clean_field(v) for k, v in {**row, **(inner if isinstance(inner, dict) else {})}.items()
             if k in (*PERSPECTIVES, "short", "long") and clean_field(v)}
    listed = clean_field(row.get("caption")) or []
    raw = " ".join(named.get("raw", listed[:1]) or named.get("short", []) or next(iter(named.values()), [])[:1])
    if not raw:
        raise BadSample("no caption", str(row.get("image", row.get("key", ""))))
    long = named.get("long") or listed[1:] or listed or [raw]
    long = [sentence for text in long for sentence in split_sentences(text)] or [raw]
    perspectives = [" ".join(named[name]) for name in PERSPECTIVES if name in named and name != "raw"] or listed[1:]
    return Captions(raw, " ".join(named["short"]) if "short" in named else None, long, [raw, *perspectives])


def clean_field(value) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    return [t.strip() for t in texts if isinstance(t, str) and t.strip()]


def text_slots(s) -> list[str]:
    """The kind of text in each of the T slots, from the settings: "raw", "sub" (sub-caption), "long", "perspective"."""
    sub = ["sub"] * s.sub_captions if s.sampling != "whole" else ["long"] * min(s.sub_captions, 1)
    return ["raw"] * s.raw_caption + sub + ["long"] * s.long_texts + ["perspective"] * s.perspectives


def draw_texts(c: Captions, s, rng: random.Random) -> list[str]:
    """The T texts of one image for one step, in the order of text_slots.

    Sub-captions (DreamLIP, section 3.2) are drawn from the sentences, the short caption, the raw one unless it has a slot of its own, and
    with `whole_caption` all sentences as one text: without replacement while they last. Long texts (LoTLIP, section 3.1) join `long_sentences` consecutive sentences (0: all).
    """
    pool = c.long + [c.short] * bool(s.short_caption and c.short) + [c.raw] * (not s.raw_caption) + [" ".join(c.long)] * s.whole_caption

    def sub(k):
        if s.sampling == "first":  # the ablation: the same K texts every time
            return [pool[i % len(pool)] for i in range(k)]
        return rng.sample(pool, k) if k <= len(pool) else rng.sample(pool, len(pool)) + rng.choices(pool, k=k - len(pool))

    def long():
        n = s.long_sentences or len(c.long)
        start = rng.randrange(max(len(c.long) - n, 0) + 1)
        return " ".join(c.long[start:start + n])

    slots = text_slots(s)
    texts = [c.raw] * slots.count("raw") + sub(slots.count("sub")) + [long() for _ in range(slots.count("long"))]
    perspectives = c.perspectives[:slots.count("perspective")]
    return texts + perspectives + sub(slots.count("perspective") - len(perspectives))


# ---- datasets --------------------------------------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B,3,S,S] -> float32, with CLIP's mean and deviation; on the device, so that bytes are what travels."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std


class SceneImages:
    """Scenes as (image uint8 [3,S,S], captions, samples found bad: none here). Training shifts the image by up to 1/32 of its side; it never flips: "left" is in the texts."""

    def __init__(self, split: str, n: int, size: int, kinds: int):
        self.scenes, self.train = Scenes(split, n, size, kinds), split == "train"

    def __len__(self):
        return len(self.scenes)

    def key(self, i):
        return f"scene-{self.scenes.split}-{i}"

    def __getitem__(self, i, rng=None):
        scene = self.scenes.scene(i)
        image, _ = self.scenes.draw(scene)
        if self.train and rng:
            reach = max(1, self.scenes.size // 32)
            pad = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
            top, left = rng.randint(0, 2 * reach), rng.randint(0, 2 * reach)
            image = pad[top:top + image.shape[0], left:left + image.shape[1]]
        c = scene.captions
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), Captions(
            c["raw"], c["short"], c["long"], [c[name] for name in PERSPECTIVES]), []


CACHE = 512 << 20  # bytes of decoded pictures that a data-loading process may keep


class JsonLines:
    """Pictures beside a JSON-lines file of {"image": path relative to the file, "caption": text or list, named captions ...}.

    A line that cannot be used is left out and counted in `bad` (reason -> list of what); a picture that turns out broken only when
    it is decoded is replaced by the next one. `part`: "train", "validation" (every tenth by the hash of the path), or "all".
    """

    def __init__(self, path: str, size: int, part: str = "all", crop: float = 0.8):
        self.path, self.root, self.rows, self.bad, self.train = Path(path), Path(path).parent, [], {}, part == "train"
        try:
            lines = self.path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: a caption may hold U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path} ({error}): --data takes 'scenes' or a JSON-lines file") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    self._add(line, number, part)
                except BadSample as bad:
                    self.count(bad)
        if not self.rows:
            raise UserError(f"{path} has no usable line for {part}" + (f" ({self.report()})" if self.bad else "") +
                            ': each line must be like {"image": "dog.jpg", "caption": "a dog"}')
        resize = [v2.RandomResizedCrop(size, scale=(crop, 1), ratio=(0.8, 1.25), interpolation=v2.InterpolationMode.BICUBIC)] if self.train else [
            v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
        self.transform, self.size = v2.Compose([*resize, v2.PILToTensor()]), size
        self.cache = {} if len(self.rows) * 3 * (2 * size) ** 2 < CACHE else None  # a small set is decoded once

    def _add(self, line, number, part):
        try:
            row = json.loads(line)
            image = row["image"]
            if not isinstance(image, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadSample("line does not parse", f"line {number}") from None
        validation = zlib.crc32(image.encode()) % 10 == 0
        if part == "all" or validation == (part == "validation"):
            captions = read_captions(row)
            if not (self.root / image).is_file():
                raise BadSample("image missing", image)
            self.rows.append((image, captions))

    def count(self, bad: BadSample):
        self.bad.setdefault(bad.reason, []).append(bad.detail)

    def report(self) -> str:
        return "; ".join(f"{len(what)} × {reason}: {', '.join(what[:3])}{' ...' if len(what) > 3 else ''}" for reason, what in self.bad.items())

    def __len__(self):
        return len(self.rows)

    def key(self, i):
        return self.rows[i][0]

    def _picture(self, image):
        if self.cache is None:
            return load_image(self.root / image, self.size)
        if image not in self.cache:
            picture = load_image(self.root / image, 2 * self.size)
            shrink = min(picture.size) / (2 * self.size)
            self.cache[image] = picture if shrink <= 1 else picture.resize([round(x / shrink) for x in picture.size], Image.Resampling.BICUBIC)
        return self.cache[image]

    def __getitem__(self, i, rng=None):
        found_bad = []
        for step in range(min(len(self), 100)):
            image, captions = self.rows[(i + step) % len(self)]
            try:
                picture = self._picture(image)
            except BadSample as bad:
                found_bad.append(bad)
                continue
            with torch.random.fork_rng(devices=[]):  # torchvision draws its crop from torch's generator
                torch.manual_seed(rng.getrandbits(63) if rng else 0)
                return self.transform(picture), captions, found_bad
        raise UserError(f"{len(found_bad)} pictures of {self.path} in a row will not decode, the first {found_bad[0]}")


def open_dataset(data: str, part: str, n: int, size: int, kinds: int):
    """"scenes" (part: train, validation or test; n of them) or the path of a JSON-lines file (n is ignored)."""
    if data == "scenes":
        try:
            return SceneImages(part, n, size, kinds)
        except ValueError as error:
            raise UserError(f"--kinds: {error}") from None
    if not Path(data).is_file():
        raise UserError(f"no file {data}: --data takes 'scenes' or a JSON-lines file")
    return JsonLines(data, size, "validation" if part == "test" else part)


# ---- the order of samples, and batches -------------------------------------------------------------------------------

class TrainingTexts(torch.utils.data.Dataset):
    """dataset[(epoch, index)] -> image uint8 [3,S,S], tokens [T,L], samples found bad. All randomness comes from (seed, epoch, index), so a sample is
    the same whichever worker or rank draws it, and after a restart."""

    def __init__(self, dataset, tokenizer, settings):
        self.dataset, self.tokenizer, self.settings = dataset, tokenizer, settings

    def __getitem__(self, where):
        epoch, index = where
        rng = random.Random(f"{self.settings.seed} {epoch} {index}")
        try:
            image, captions, bad = self.dataset.__getitem__(index, rng)
        except UserError as error:  # raised in a worker it would arrive as a page of traceback, so it travels as a sample
            return error
        return image, self.tokenizer(draw_texts(captions, self.settings, rng), self.settings.context), bad


def collate(samples):
    """-> images uint8 [B,3,S,S], tokens [B,T,L] cut to the longest text of the batch, list of BadSample."""
    for error in samples:
        if isinstance(error, UserError):
            return error
    images, tokens, bad = zip(*samples)
    tokens = torch.stack(tokens)
    return torch.stack(images), tokens[..., :int(tokens.argmax(-1).max()) + 1].contiguous(), [b for found in bad for b in found]


class Steps(torch.utils.data.Sampler):
    """Which (epoch, index) make up each step's local batch: permutations of the data set, one an epoch, cut into global batches, of
    which this rank takes its share. Starts at any step without walking there."""

    def __init__(self, n: int, batch: int, first: int, last: int, seed: int, rank: int = 0, world: int = 1):
        self.n, self.batch, self.first, self.last, self.seed, self.rank, self.world = n, batch, first, last, seed, rank, world

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        local, known = self.batch // self.world, None
        for step in range(self.first, self.last):
            start = step * self.batch + self.rank * local
            where = []
            for position in range(start, start + local):
                epoch, place = divmod(position, self.n)
                if known != epoch:
                    known, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n)
                where.append((epoch, int(order[place])))
            yield where


def leave_signals(_worker):
    """Ctrl-C is for the main process, which saves and ends; a worker dies of SIGTERM as usual, though its parent does not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def training_loader(dataset, tokenizer, settings, first: int, last: int, rank: int = 0, world: int = 1):
    steps = Steps(len(dataset), settings.batch, first, last, settings.seed, rank, world)
    workers = dict(num_workers=settings.workers, prefetch_factor=4, worker_init_fn=leave_signals) if settings.workers else {}
    return torch.utils.data.DataLoader(TrainingTexts(dataset, tokenizer, settings), batch_sampler=steps, collate_fn=collate,
                                       pin_memory=torch.cuda.is_available(), **workers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-bpe", metavar="FILE", required=True, help="learn the scenes' vocabulary and write it in tiktoken's format")
    parser.add_argument("--vocab", type=int, default=1024)
    options = parser.parse_args()
    scenes = Scenes("train", n=20_000, kinds=len(KINDS))
    captions = [scenes.scene(i).captions for i in range(len(scenes))]
    ranks = train_bpe((t for c in captions for text in c.values() for t in clean_field(text)), options.vocab)
    Path(options.train_bpe).parent.mkdir(exist_ok=True)
    save_tiktoken(options.train_bpe, ranks)
    print(f"{len(ranks)} tokens in {options.train_bpe}")
