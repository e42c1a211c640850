"""Caption pictures anew with a multimodal model: short, long, perspectives, dense crops, of whatever train.py takes.

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --data-parallel-size 8   the engine: any OpenAI-compatible server will do
    python recaption.py /data/cc3m --endpoint http://localhost:8000 --limit 16 --preview preview.png      look first
    python recaption.py /data/cc3m --endpoint http://localhost:8000     all of it; after a stop, the same again goes on
    python recaption.py /data/cc3m --endpoint http://localhost:8000 --dense 2   crops: for train.py --region-grouping
    torchrun --nproc_per_node=8 recaption.py pictures --model llava-hf/llava-onevision-qwen2-7b-ov-hf   without a server
    python recaption.py scenes --engine scenes --out scenes             embedded scenes with their true captions

Beside every x.tar, x.csv, x.jsonl or folder x grows x.captions.jsonl, a line an image, never changed once written:
    {"key", "size": [w, h], "captions": {"raw", "short", "long", ...}, "model", "prompts": their version}
train.py reads it from there. What was given up on stands in x.failed.jsonl, with the reason and what was good of it,
and the next run asks for the rest.
"""

import argparse
import asyncio
import base64
import email.utils
import fcntl
import functools
import io
import itertools
import json
import math
import os
import random
import re
import signal
import ssl
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import (FIELDS, BadSample, Parser, Records, UserError, all_fields, captions_path, clean_field, hashed,
                  load_image, split_sentences)
from scenes import Scenes

VERSION = "1"
PROMPTS = {  # field: (prompt, most tokens of an answer). --prompts FILE.json replaces and adds
    # these two: DreamLIP (2403.17007)
    "short": ("Describe the image in one sentence.", 80),
    "long": ("Describe the image in detail, part by part, in eight to ten plain sentences.", 400),
    # these five: Holistic CLIP (2412.00440)
    "details": ("Describe all details of the image in a few plain sentences.", 250),
    "main_object": ("Describe only the main object of the image, in one sentence, and nothing else.", 80),
    "background": ("Describe only the background of the image, in one sentence, without the main object.", 80),
    "style": ("Describe only the style of the image or the feeling it gives, in one sentence.", 80),
    "few_words": ("Name what the image shows in a few words, separated by commas.", 40),
    # of every crop of --dense, the idea of DCI (2312.08578)
    "dense": ("This is one part of a larger image. Describe what it shows in one or two plain sentences.", 100),
}


# ---- cleaning --------------------------------------------------------------------------------------------------------

THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.S | re.I)
MARKERS = re.compile(r"</?[a-z_]\w{0,24}/?>|<\|\w{1,24}\|>|\[/?INST\]|```\w*", re.I)
TURN = re.compile(r"\b(?:USER|ASSISTANT|Human|User|Assistant)\s*:\s*")
LINK = re.compile(r"!?\[([^\]\n]*)\]\([^)\s]*\)")
LABEL = re.compile(r"(?:\*\*|__)[^*_\n]{1,40}(?::\s*(?:\*\*|__)|(?:\*\*|__)\s*:)\s*")  # **Style:** or **Style**:
EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)")
LIST_ITEM = re.compile(r"\s*(?:>\s*)*(?:[-*•·▪‣+–—|]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+")
HEADING = re.compile(r"#{1,6}\s.*[^.!?]|(?:\*\*|__)[^.!?]+(?:\*\*|__)|[^.!?]{1,80}:")
OPENER = re.compile(r"""
    (?:(?:short|long|detailed|brief|image)\s)*(?:caption|description|answer|response|keywords)\s?:\s
    | here(?:'s|’s|\sis|\sare)\s[^:.]{0,80}:\s?
    | (?:in|within)\s(?:the|this)\s(?:\w+\s)?(?:image|picture|photo|photograph)\s?,\s
    | (?:the|this)\s(?:given\s|provided\s)?(?:image|picture|photo|photograph)\s(?:\w+ly\s|also\s)?
        (?:shows|depicts|features|displays|captures|presents|portrays|illustrates|showcases|contains|includes|
        consists\sof|is\sof)\s(?:that\s)?
    | (?:(?:this|it)\sis\s)?(?:an|the)\simage\s(?:of|showing|depicting|featuring)\s
    | (?:we|you|one)\scan\s(?:see|observe)\s""", re.I | re.X)
CHATTER = re.compile(r"""
    (?:sure|certainly|of\scourse|absolutely|okay)[!,.] | (?:please\s)?(?:let\sme\sknow|feel\sfree)\b
    | i\shope\s(?:this|that|it)\b | would\syou\slike\b | is\sthere\sanything\b
    | if\syou\s(?:need|have|would|want|'d)\b""", re.I | re.X)
REFUSAL = re.compile(r"""
    i(?:'|’)?m\s(?:\w+\s)?sorry\b | (?:i\s)?apologi[sz]e\b | as\san\s(?:ai|artificial)\b
    | \bi(?:\s(?:can(?:no|'|’)?t|do\snot|don(?:'|’)t|could\snot)|(?:\sam|'m|’m)\s(?:unable|not\sable|not\scapable))\s
        (?:\w+\s)?(?:to\s)?(?:see|view|assist|help|describe|provide|identify|determine|access|process|analy[sz]e|comply|
        fulfill?|have)\b
    | \bi\scan\sonly\sprocess\b | no\simage\s(?:was|is|has|were)\b | \bi\sneed\s(?:the|an)\simage\b
    | (?:upload|provide|share|attach)\s(?:the|an|your)\simage\b""", re.I | re.X)
LONGEST = 20_000  # letters: more is no caption


def clean(answer, field="long", prompt="", finish="stop") -> tuple[str, str | None]:
    """A model's answer -> (caption, None), or ("", why it is bad).

    Bad is what holds nothing to train on: "empty", "not text", "refusal", "prompt echo", "cut off", "repetition". Stock
    openers, small talk, markdown, repeated sentences and a cut-off last one only go. `finish`: the finish_reason.
    """
    if not isinstance(answer, str) or not answer.strip():
        return "", "empty"
    text = MARKERS.sub(" ", THOUGHT.sub("", answer.replace("\r", "\n"))).replace("`", "")
    echoed = sentences_of(prompt) | {""}
    if TURN.search(text):
        text = next((part for part in TURN.split(text) if sentences_of(part) - echoed), TURN.sub(" ", text))
    if len(text) > LONGEST or not is_text(text):
        return "", "not text" if text.strip() else "empty"
    kept = [open_well(sentence) for sentence in split_sentences("\n".join(bare_lines(text)))]
    if field == "few_words":
        kept = [item.strip(" .\"'“”") for sentence in kept for item in re.split(r"[,;]\s", sentence)]
    if kept and REFUSAL.search(kept[0]):
        return "", "refusal"
    kept = [(plain(s), s) for s in kept if not CHATTER.match(s) and not REFUSAL.search(s)]
    told, once = [pair for pair in kept if pair[0] not in echoed], {}
    if not told and any(words for words, _ in kept):
        return "", "prompt echo"
    for words, sentence in told:
        once.setdefault(words, sentence)
    once = list(once.values())
    if loops(" ".join(once)) or len(told) >= 4 and len(once) <= len(told) / 2 and field != "few_words":
        return "", "repetition"
    ends = bool(once) and re.search(r"[^\W\d][\"'”’»)]*[.!?。！？][\"'”’»)]*$", once[-1])
    if finish == "length" and not ends:
        once = once[:-1]
    if not once:
        return "", "cut off" if finish == "length" else "empty"
    if field == "few_words":
        return ", ".join(once), None
    if len(once) > 1:  # a list's items, side by side, need their stops
        once = [s if re.search(r"[.!?。！？…][\"'”’»)]*$", s) else s.rstrip(",;: ") + "." for s in once]
    return unquoted(re.sub(r"(?<=[。！？]) ", "", " ".join(once))), None


@functools.lru_cache(maxsize=64)
def sentences_of(text) -> set:
    return {plain(sentence) for sentence in split_sentences(text)}


def plain(text):
    """Words alone, in lower case: what two sentences are compared by."""
    return " ".join(re.findall(r"\w+", text.lower()))


def is_text(text):
    """Not a picture of nothing, a lone address, JSON, HTML, or bytes that went astray."""
    letters, other = sum(map(str.isalpha, text)), len(re.findall(r"[^\w\s*#|>-]|\d", text))
    astray = text.count("\ufffd") > 2 or re.search(r"[A-Za-z0-9+/=_-]{80}|\A\s*(?:\w+://\S+\s*\Z|\{|\[[{\"]|<!)", text)
    return letters > max(1, other) and not astray


def bare_lines(text):
    """The lines without headings, list marks and other markdown, with what was one sentence on one line again."""
    lines = [line.strip() for line in LINK.sub(r"\1", text).split("\n")]
    lines = [line for line in lines if re.search(r"\w", line)]
    kept = [line for line in lines if not HEADING.fullmatch(line)] or lines
    bare = []
    for line in kept:
        item = LIST_ITEM.match(line)
        line = LABEL.sub("", line[item.end():] if item else line.lstrip("#> "), count=1)
        line = EMPHASIS.sub(r"\2", EMPHASIS.sub(r"\2", line)).replace("|", " ").strip()
        if bare and not item and line[:1].islower():
            bare[-1] += " " + line
        elif line:
            bare.append(line)
    return bare


def open_well(sentence):
    """Without the stock opener: "In this image, we can see a dog." -> "A dog." """
    rest = sentence
    while match := OPENER.match(rest):
        rest = rest[match.end():]
    return rest[:1].upper() + rest[1:] if rest != sentence else sentence


def unquoted(text):
    pair = (text[0], text[-1])
    return text[1:-1].strip() if pair in (('"', '"'), ("“", "”"), ("'", "'")) and text[0] not in text[1:-1] else text


def loops(text) -> bool:
    """Whether up to 24 words come four times in a row (one word: six times). Words are letters alone, so counting up is
    no way out; a Chinese or Japanese character is a word."""
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+", text.lower())
    counts = Counter(words)  # each word of a loop comes four times: so most texts have no place for one
    stretches = itertools.groupby(words, lambda word: counts[word] > 3)
    longest = max((len(list(stretch)) for often, stretch in stretches if often), default=0)
    for period in range(1, min(24, longest // 4) + 1):
        run = 0
        for a, b in zip(words, words[period:]):
            run = run + 1 if a == b else 0
            if run >= max(3 * period, 5):
                return True
    return False


# ---- the files of captions -------------------------------------------------------------------------------------------

class Lines:
    """An append-only file of JSON lines {"key", "captions": {field: ...}, ...}, which several processes may write to.

    `done`: hash of a key -> its fields. A line is appended under a lock and in one write; whoever holds the lock first
    reads what others have appended, and cuts off a last line that a killed process left torn. Raises UserError.
    """

    def __init__(self, path: Path):
        self.path, self.done, self.end, self.sets, self.synced = path, {}, 0, {}, time.monotonic()
        try:
            self.file = open(path, "a+b", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): captions need a folder you may write to, so link "
                            "or copy the data into one") from None
        with self.locked():
            pass

    def has(self, key: int, fields) -> bool:
        return key in self.done and fields <= self.done[key]

    def append(self, row: dict) -> bool:
        """Whether the row brought anything new, and so was written."""
        with self.locked():
            if self.has(hashed(row["key"]), row["captions"].keys()):
                return False
            line = json_line(row)
            if self.file.write(line) < len(line):
                os.ftruncate(self.file.fileno(), self.end)
                raise OSError(None, "the disk is full")
            self._note(line)
            if time.monotonic() - self.synced > 30:
                os.fsync(self.file.fileno())
                self.synced = time.monotonic()
            return True

    @contextmanager
    def locked(self):
        fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            self._catch_up()
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); what is in it stays, and the same command "
                            "goes on there") from None
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def _catch_up(self):
        size = os.fstat(self.file.fileno()).st_size
        if size < self.end:  # somebody has taken lines away
            self.done, self.end = {}, 0
        for line in self.lines(self.end) if size > self.end else ():
            if not line.endswith(b"\n"):
                os.ftruncate(self.file.fileno(), self.end)
            else:
                self._note(line)

    def _note(self, line):
        self.end += len(line)
        row = parsed(line)
        key = hashed(row["key"])
        fields = frozenset(row["captions"]) | self.done.get(key, frozenset())
        self.done[key] = self.sets.setdefault(fields, fields)  # millions of keys share a few sets

    def lines(self, start=0):
        with open(self.path, "rb") as file:
            file.seek(start)
            yield from file

    def keep(self, wanted):
        """Takes away the lines whose row is not wanted."""
        with self.locked():
            lines = [line for line in self.lines() if wanted(parsed(line))]
            os.ftruncate(self.file.fileno(), 0)
            self.file.write(b"".join(lines))


def json_line(row: dict) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a file name that is no Unicode: its stray bytes survive as escapes
        return json.dumps(row).encode() + b"\n"


def parsed(line: bytes) -> dict:
    """A line's row, or, if it is none, one without key and captions."""
    try:
        row = json.loads(line)
        if isinstance(row["key"], str) and isinstance(row["captions"], dict):
            return row
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return {"key": "", "captions": {}}


class Output:
    """What becomes of one input file: x.captions.jsonl, and x.failed.jsonl from the first image given up on."""

    def __init__(self, file: Path):
        path, self.file = captions_path(file), file
        self.captions, self.failed_path = Lines(path), path.with_name(path.name.replace(".captions.", ".failed."))
        self.failed = Lines(self.failed_path) if self.failed_path.exists() else None
        rows = map(parsed, self.failed.lines() if self.failed else ())
        self.found = {row["key"]: row["captions"] for row in rows}  # what was good then is not asked for again

    def fail(self, key, captions, reasons):
        self.failed = self.failed or Lines(self.failed_path)
        self.failed.append({"key": key, "captions": captions, "bad": reasons})

    def settle(self):
        """An image that failed once and is captioned leaves the list of failures."""
        if self.failed:
            self.failed.keep(lambda row: not self.captions.has(hashed(row["key"]), row.get("bad", {}).keys()))


# ---- what is asked ---------------------------------------------------------------------------------------------------

@dataclass
class Question:
    key: str
    field: str  # a row of PROMPTS
    prompt: str
    tokens: int  # most tokens of the answer
    temperature: float
    picture: object  # as the engine sends it: a data URL, or a PIL image
    box: tuple | None = None  # x0, y0, x1, y1 as shares of the image; None: all of it


@dataclass
class Answer:
    text: object  # a string, if all is well
    finish: str | None = "stop"  # "length": cut off at the most tokens
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""  # why there is none, and asking again is no use


def crops(grid: int) -> list[tuple]:
    return [(x / grid, y / grid, (x + 1) / grid, (y + 1) / grid) for y in range(grid) for x in range(grid)]


def pictures(source, side, boxes, as_url) -> tuple:
    """The bytes or path of an image -> its upright (width, height), and for each box (None: all of it) a PIL image with
    a longer side of at most `side`, or its JPEG as a data URL. Raises BadSample."""
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise BadSample("image missing", f"{source}, {error.strerror}") from None
    if as_url and boxes == [None] and (size := fit_to_send(data, side)):
        return size, [data_url(data)]
    boxes = [box or (0, 0, 1, 1) for box in boxes]
    narrowest = min(x1 - x0 for x0, _, x1, _ in boxes)
    image, found = load_image(data, math.ceil(side / narrowest)), []  # of a camera's picture decodes what is needed
    w, h = image.size
    for x0, y0, x1, y1 in boxes:
        left, top = int(x0 * w), int(y0 * h)
        part = image.crop((left, top, max(int(x1 * w), left + 1), max(int(y1 * h), top + 1)))
        part.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2)
        found.append(data_url(jpeg(part)) if as_url else part)
    return upright_size(data), found


def upright_size(data: bytes) -> tuple:
    with Image.open(io.BytesIO(data)) as image, suppress(Exception):  # a broken EXIF block turns nothing
        return image.size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else image.size
    return image.size


def fit_to_send(data: bytes, side: int):
    """The size of a JPEG that can go out as it is: upright, grey or RGB, small enough, whole. None for every other."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            upright = image.getexif().get(0x0112, 1) == 1
            whole = data.rstrip(b"\0").endswith(b"\xff\xd9")
            return image.size if upright and whole and image.mode in ("L", "RGB") and max(image.size) <= side else None
    except Exception:  # whatever is wrong with it, load_image finds a name for
        return None


def jpeg(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def data_url(jpeg_bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg_bytes).decode()


# ---- engine: chat endpoints over HTTP --------------------------------------------------------------------------------

# An engine has a name, a width (images worth having in work at once), `as_url` (how it takes pictures), `retries` (by
# cause), and `start`, `ask` (the questions about one image -> their answers) and `close`. This one speaks asyncio and
# plain HTTP/1.1, since requests are many, small and all alike: one process keeps hundreds of them in flight at under 1
# ms of processor time each.

LARGEST = 1 << 26  # bytes of a response that are read at most


class Fault(Exception):
    """A request that came to nothing and is made again. `wait`: seconds, if the server named them. `blame`: it may lie
    with the image, which may cost only so many; a server that is away or busy is waited for."""

    def __init__(self, cause, detail="", wait=None, blame=True):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause, self.wait, self.blame = cause, wait, blame


class Endpoint:
    """Where a server is. `rest_until`: no request before this time (of time.monotonic)."""

    def __init__(self, url, key):
        try:
            parts = urlsplit(url if "://" in url else "http://" + url)
            self.host, self.tls = parts.hostname, ssl.create_default_context() if parts.scheme == "https" else None
            self.port = parts.port or (443 if self.tls else 80)
        except ValueError:
            raise UserError(f"--endpoint {url!r} is no address: it must be like http://localhost:8000") from None
        if parts.scheme not in ("http", "https") or not self.host or parts.username or parts.query:
            raise UserError("--endpoint must be like http://localhost:8000, with the key, if it needs one, in the "
                            "environment")
        self.path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        self.url, self.rest_until = f"{parts.scheme}://{parts.netloc}{self.path}", 0.0
        self.headers = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self.headers += f"Authorization: Bearer {key}\r\n" if key else ""


class Slot:
    """One of the requests that an endpoint takes at a time, over a connection of its own that is kept open."""

    def __init__(self, endpoint):
        self.endpoint, self.reader, self.writer, self.failures = endpoint, None, None, 0

    async def request(self, method, path, body=b"") -> tuple[int, dict, bytes]:
        """-> (status, headers in lower case, body). Raises Fault."""
        at = self.endpoint
        try:
            if self.reader is None or self.reader.at_eof():
                self.close()
                self.reader, self.writer = await asyncio.open_connection(at.host, at.port, ssl=at.tls)
        except OSError as error:
            raise Fault("no connection", error.strerror or str(error), blame=False) from None
        keep = False
        try:
            head = f"{method} {at.path}{path} HTTP/1.1\r\n{at.headers}Content-Length: {len(body)}\r\n\r\n"
            self.writer.write(head.encode() + body)
            await self.writer.drain()
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            version, status = lines[0].split(" ", 2)[:2]
            pairs = (line.partition(":") for line in lines[1:])
            headers = {name.strip().lower(): text.strip() for name, _, text in pairs}
            body = await self._body(headers)
            keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
            return int(status), headers, body
        except (OSError, EOFError) as error:
            raise Fault("dropped connection", str(error)) from None
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise Fault("not HTTP", str(error)) from None
        finally:
            if not keep:  # after a timeout as well: what comes late is no answer to the next question
                self.close()

    async def _body(self, headers) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(min(int(headers["content-length"]), LARGEST))
        if headers.get("transfer-encoding", "").lower() != "chunked":
            headers["connection"] = "close"
            try:
                return await self.reader.readexactly(LARGEST)
            except asyncio.IncompleteReadError as ended:
                return ended.partial
        parts = []
        while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
            parts.append(await self.reader.readexactly(min(size, LARGEST)))
            await self.reader.readexactly(2)
        while await self.reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailing headers
        return b"".join(parts)

    def close(self):
        if self.writer:
            self.writer.close()
        self.reader = self.writer = None


class Endpoints:
    """OpenAI-compatible servers, `in_flight` requests at each. An image keeps its slot for all its questions, with the
    picture before the prompt, so that a server that caches prefixes (vLLM, SGLang) reads the picture once.

    A slot whose request failed rests, longer each time (exponential backoff with jitter), and its image goes on with
    another; an endpoint that names a time (Retry-After) rests as a whole.
    """

    as_url = True

    def __init__(self, s, key):
        self.endpoints = [Endpoint(url, key) for url in s.endpoint.split(",")]
        self.name, self.s, self.key, self.retries = s.model, s, key, Counter()
        in_flight = s.in_flight * len(self.endpoints)
        self.width = in_flight + max(16, in_flight // 4)  # so that a picture is ready whenever a slot is free

    async def start(self):
        """Asks every endpoint once without and once with a picture. Raises UserError."""
        self.slots, self.answered = asyncio.Queue(), time.monotonic()
        slots = [Slot(endpoint) for _ in range(self.s.in_flight) for endpoint in self.endpoints]
        if not self.name:
            reply = await self._at_last(self._fetch, slots[0], "GET", "/models")
            names = [str(row.get("id")) for row in reply.get("data") or ()] if isinstance(reply, dict) else []
            if len(names) != 1:
                raise UserError(f"{slots[0].endpoint.url} serves {', '.join(names[:9]) or 'no model that it lists'}: "
                                "name one with --model")
            self.name = names[0]
        red = data_url(jpeg(Image.new("RGB", (224, 224), "red")))
        for slot in slots[:len(self.endpoints)]:
            questions = [Question("", "", "What colour is this?", 8, 0.0, picture) for picture in ("", red)]
            blind, seeing = [await self._at_last(self._answer, slot, question) for question in questions]
            where = f"{slot.endpoint.url} with model {self.name!r}"
            if seeing.error:
                raise UserError(f"{where} takes no pictures ({seeing.error}): serve a vision-language model, or see "
                                "--body")
            if 0 < seeing.prompt_tokens <= blind.prompt_tokens:
                raise UserError(f"{where} leaves pictures out (no more prompt tokens with one than without): serve a "
                                "vision-language model")
        for slot in slots:
            self.slots.put_nowait(slot)

    async def _at_last(self, call, slot, *arguments):
        for attempt in range(self.s.retries + 1):
            try:
                return await call(slot, *arguments)
            except Fault as fault:
                self.retries[fault.cause] += 1
                if fault.cause in ("no connection", "status 404") or attempt == self.s.retries:
                    raise UserError(f"{slot.endpoint.url} does not answer as it should ({fault}): check --endpoint, "
                                    "--model and the server") from None
                await asyncio.sleep(fault.wait or backoff(attempt))

    async def ask(self, questions: list[Question]) -> list[Answer]:
        answers, blamed = [], 0
        while len(answers) < len(questions):
            slot, rest = await self._free_slot(), 0.0
            try:
                while len(answers) < len(questions):
                    answers.append(await self._answer(slot, questions[len(answers)]))
                    blamed, slot.failures, self.answered = 0, 0, time.monotonic()
            except Fault as fault:
                rest, blamed = self._rest(slot, fault), blamed + fault.blame
                if blamed > self.s.retries:
                    answers.append(Answer(None, error=str(fault)))
                    blamed = 0
            finally:
                self._return(slot, rest)
        return answers

    async def _free_slot(self):
        while True:
            slot = await self.slots.get()
            rest = slot.endpoint.rest_until - time.monotonic()
            if rest <= 0:
                return slot
            self._return(slot, rest * random.uniform(1, 1.1))

    def _return(self, slot, rest):
        if rest:
            asyncio.get_running_loop().call_later(rest, self.slots.put_nowait, slot)
        else:
            self.slots.put_nowait(slot)

    def _rest(self, slot, fault) -> float:
        """Seconds for which the slot is not used. Raises UserError when no endpoint has answered for too long."""
        now = time.monotonic()
        self.retries[fault.cause] += 1
        if now - self.answered > self.s.patience:
            raise UserError(f"no endpoint has answered for {self.s.patience:.0f} s (the last: {slot.endpoint.url}, "
                            f"{fault}); what is written stays, and the same command goes on there")
        slot.failures += 1
        if fault.wait is not None:
            slot.endpoint.rest_until = max(slot.endpoint.rest_until, now + fault.wait)
        return max(fault.wait or 0, backoff(slot.failures))

    def body(self, question) -> dict:
        picture = [{"type": "image_url", "image_url": {"url": question.picture}}] if question.picture else []
        content = [*picture, {"type": "text", "text": question.prompt}]
        body = {"model": self.name, "messages": [{"role": "user", "content": content}], "max_tokens": question.tokens,
                "temperature": question.temperature} | self.s.body
        return {name: value for name, value in body.items() if value is not None}

    async def _answer(self, slot, question) -> Answer:
        # the picture goes in afterwards: nothing in it needs an escape, and json.dumps would search it for long
        text = json.dumps(self.body(replace(question, picture=question.picture and "\0")))
        body = text.replace("\\u0000", question.picture, 1).encode()
        reply = await self._fetch(slot, "POST", "/chat/completions", body)
        if isinstance(reply, str):
            return Answer(None, error=reply)
        try:
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            said = choice["message"].get("content") or choice["message"].get("refusal")
            if isinstance(said, list):
                said = "".join(part.get("text", "") for part in said)
            return Answer(said, choice.get("finish_reason"), int(usage.get("completion_tokens") or 0),
                          int(usage.get("prompt_tokens") or 0))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Fault("not an answer", str(reply)[:80]) from None

    async def _fetch(self, slot, method, path, body=b""):
        """The JSON of one response, or why the request was refused. Raises Fault where another may do better, and
        UserError where none will."""
        try:
            status, headers, content = await asyncio.wait_for(slot.request(method, path, body), self.s.timeout)
        except asyncio.TimeoutError:
            raise Fault("timeout", f"no answer in {self.s.timeout:g} s") from None
        if status == 200:
            try:
                return json.loads(content)
            except (ValueError, RecursionError):
                raise Fault("not an answer", repr(content[:80])) from None
        message = " ".join(content[:300].decode(errors="replace").split())
        message = re.sub(re.escape(self.key), "***", message, flags=re.I) if self.key else message
        if status in (401, 403):
            raise UserError(f"{slot.endpoint.url} refuses the key (status {status}): put the right one into the "
                            f"environment as {self.s.key_env}")
        if status >= 500 or status in (404, 408, 409, 425, 429):
            raise Fault(f"status {status}", message, retry_after(headers), blame=status not in (429, 502, 503))
        return f"status {status}: {message}"

    def close(self):
        pass  # a connection ends with the process


def backoff(failures) -> float:
    return min(60, 0.2 * 2 ** failures) * random.uniform(0.5, 1)


def retry_after(headers) -> float | None:
    """Seconds, from a number of them or a date."""
    text = headers.get("retry-after", "")
    try:
        if text[:1].isdigit():
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


# ---- engine: a model of Hugging Face transformers --------------------------------------------------------------------

class LocalModel:
    """A vision-language model on this process's device, asked in batches of one field: answers of about one length."""

    as_url = False

    def __init__(self, s):
        try:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise UserError(f"--model needs transformers ({error}): pip install 'transformers>=5'") from None
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
        self.dtype, self.torch = torch.bfloat16 if gpu else torch.float32, torch
        try:
            self.processor = AutoProcessor.from_pretrained(s.model)
            self.processor.tokenizer.padding_side = "left"  # so that all answers of a batch start at the same place
            model = AutoModelForImageTextToText.from_pretrained(s.model, dtype=self.dtype)
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"--model {s.model} is no vision-language model that transformers can load: "
                            f"{' '.join(str(error).split())[:200]}") from None
        self.model = model.to(self.device).eval()
        self.name, self.batch, self.width, self.retries = s.model, s.batch, 2 * s.batch, Counter()
        self.waiting, self.stopping = {}, False  # (field, temperature) -> list of (question, future)

    async def start(self):
        self.arrived, self.worker = asyncio.Event(), asyncio.create_task(self._work())

    async def ask(self, questions: list[Question]) -> list[Answer]:
        futures = [asyncio.get_running_loop().create_future() for _ in questions]
        for question, future in zip(questions, futures):
            self.waiting.setdefault((question.field, question.temperature), []).append((question, future))
        self.arrived.set()
        return await asyncio.gather(*futures)

    async def _work(self):
        while await self.arrived.wait():
            kind = max(self.waiting, key=lambda kind: len(self.waiting[kind]))
            batch, self.waiting[kind] = self.waiting[kind][:self.batch], self.waiting[kind][self.batch:]
            if not any(self.waiting.values()):
                self.arrived.clear()
            try:
                answers = await asyncio.to_thread(self.generate, [question for question, _ in batch])
            except Exception as error:  # it ends the run, in the task that waits for the answer
                for _, future in batch:
                    future.done() or future.set_exception(error)
                return
            for (_, future), answer in zip(batch, answers):
                future.done() or future.set_result(answer)

    def generate(self, questions: list[Question]) -> list[Answer]:
        talks = [[{"role": "user", "content": [{"type": "image", "image": question.picture},
                                               {"type": "text", "text": question.prompt}]}] for question in questions]
        temperature = questions[0].temperature
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}

        def stop(ids, scores, **_):  # Ctrl-C ends a long answer at its next token
            return self.torch.full((len(ids),), self.stopping, device=ids.device)

        try:
            inputs = self.processor.apply_chat_template(
                talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                processor_kwargs={"padding": True}).to(self.device, self.dtype)
            with self.torch.inference_mode():
                ids = self.model.generate(**inputs, **sampling, max_new_tokens=questions[0].tokens,
                                          stopping_criteria=[stop])
        except self.torch.OutOfMemoryError:
            raise UserError(f"--batch {self.batch} does not fit into the memory of {self.device}: halve it") from None
        ends, n = self.model.generation_config.eos_token_id, inputs["input_ids"].shape[1]
        ends, answers = set(ends if isinstance(ends, list) else [ends]), []
        for row in ids[:, n:].tolist():
            length = next((i for i, token in enumerate(row) if token in ends), len(row))
            text = self.processor.decode(row[:length], skip_special_tokens=True)
            answers.append(Answer(text, "stop" if length < len(row) else "length", length, n))
        return answers

    def close(self):
        self.stopping = True


# ---- engine: the truth about embedded scenes -------------------------------------------------------------------------

class SceneAnswers:
    """The true captions of scenes; of a crop, what the long one says about the objects whose middle lies in it."""

    as_url, name, width = False, "scenes", 16

    def __init__(self, scenes):
        self.scene, self.retries = functools.lru_cache(64)(scenes.scene), Counter()

    async def start(self):
        pass

    async def ask(self, questions: list[Question]) -> list[Answer]:
        return [Answer(self._truth(question)) for question in questions]

    def _truth(self, question):
        scene = self.scene(int(Path(question.key).stem))
        if question.box is None:
            text = scene.captions.get(question.field)
            return " ".join(text) if isinstance(text, list) else text
        x0, y0, x1, y1 = question.box
        inside = [k for k, o in enumerate(scene.objects) if x0 <= o.x < x1 and y0 <= o.y < y1]
        told = [sentence for sentence, k in zip(scene.captions["long"], scene.about) if k in inside]
        return " ".join(told) or scene.captions["background"]

    def close(self):
        pass


def write_scenes(folder: Path, n: int) -> tuple[list[str], Scenes]:
    """n training scenes as folder/images/*.png and folder/captions.jsonl with their raw captions, if not there yet."""
    scenes, listing = Scenes("train", n), folder / "captions.jsonl"
    rows = [{"image": f"images/{i:06}.png", "caption": scenes.scene(i).captions["raw"]} for i in range(n)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        if not listing.exists() or not listing.read_text().startswith(text):
            (folder / "images").mkdir(parents=True, exist_ok=True)
            for i, row in enumerate(rows):
                Image.fromarray(scenes.draw(scenes.scene(i))[0]).save(folder / row["image"])
            listing.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write into --out {folder} ({error.strerror}): name a folder you own") from None
    return [str(listing)], scenes


# ---- the run ---------------------------------------------------------------------------------------------------------

@dataclass
class Job:
    """An image, and what is wanted of it."""

    output: Output | None
    key: str
    fields: list  # those to ask for: names of PROMPTS
    image: object = None  # bytes or a path
    raw: str | None = None
    found: dict = field(default_factory=dict)  # what an earlier run found
    bad: BadSample | None = None  # why there is no image


def jobs(sets, tally, s, rank, world):
    """Every image that lacks a field, in the order of the files; of `world` processes, this one's share."""
    before, limit = 0, s.limit or sys.maxsize
    for records in sets:
        for file, first, spans in zip(records.files, records.first.tolist(), records.spans):
            keys = spans["key"]
            places = np.sort(np.unique(keys, return_index=True)[1])[:limit - before]  # an image may be in several rows
            output, mine = Output(file), places[(rank - before) % world::world]
            before += len(places)
            for place in mine.tolist():
                key = int(keys[place])
                missing = [name for name in s.fields if not output.captions.has(key, {s.columns[name]})]
                if not missing:
                    tally["there"] += 1
                    continue
                try:
                    record = records[first + place]
                except BadSample as bad:
                    yield Job(output, f"sample {place}", missing, bad=bad)
                    continue
                found = output.found.get(record.key, {})
                found = {s.columns[name]: found[s.columns[name]] for name in missing if s.columns[name] in found}
                missing = [name for name in missing if s.columns[name] not in found]
                yield Job(output, record.key, missing, record.image, raw_caption(record.row), found)
            if before == limit:
                return


def raw_caption(row) -> str | None:
    """The caption found with the image, under the names that published files use."""
    row = all_fields(row)
    texts = [clean_field(row.get(name)) for name in FIELDS["raw"] + FIELDS["caption"]]
    return next((found[0] for found in texts if found), None)


def questions_about(job, s, as_url) -> tuple:
    """-> (width, height) of the image, and what is asked about it. Raises BadSample."""
    if job.bad:
        raise job.bad
    wanted = [(name, box) for name in job.fields for box in (crops(s.dense) if name == "dense" else [None])]
    boxes = list(dict.fromkeys(box for _, box in wanted))  # the whole image is made ready once, for all its questions
    size, found = pictures(job.image, s.side, boxes, as_url)
    found = dict(zip(boxes, found))
    return size, [Question(job.key, name, *s.prompts[name], s.temperature, found[box], box) for name, box in wanted]


async def caption(asked, engine, tally, s) -> tuple[dict, dict]:
    """-> what was found, {field: text, or list of {"box", "text"}}, and why the rest was not, {field: reason}."""
    good, bad = {}, {}  # by (field, box)
    for _ in range(s.tries):
        answers, again = await engine.ask(asked), []
        await asyncio.sleep(0)  # whoever waits for the slot sends first
        for question, answer in zip(asked, answers):
            which = question.field, question.box
            tally.update({"requests": 1, "tokens": answer.tokens, "prompt tokens": answer.prompt_tokens})
            text, reason = "", answer.error
            if not reason:
                text, reason = clean(answer.text, question.field, question.prompt, answer.finish)
            if reason is None:
                good[which] = text
                continue
            bad[which] = reason
            tally["bad", reason.split(":")[0], question.field] += 1
            if not answer.error:  # a warmer answer is another one
                again.append(replace(question, temperature=round(min(1.0, question.temperature + 0.4), 2)))
        if not again:
            break
        asked = again
    found = {name: text for (name, box), text in good.items() if box is None}
    dense = [{"box": [round(x, 4) for x in box], "text": sentence} for box in crops(s.dense)
             for sentence in split_sentences(good.get(("dense", box), ""))]
    found |= {"dense": dense} if dense else {}
    tally["crops without a caption"] += sum(name == "dense" and (name, box) not in good for name, box in bad)
    for name, value in found.items():
        texts = [part["text"] for part in dense] if name == "dense" else split_sentences(value)
        tally.update({("captions", name): 1, ("sentences", name): len(texts),
                      ("words", name): sum(len(text.split()) for text in texts)})
    return found, {name: reason for (name, _), reason in bad.items() if name not in found}


async def recaption(sets, engine, s, rank, world) -> tuple[Counter, bool]:
    """Captions all that lacks captions. -> counts for the report, and whether it came to the end, not to Ctrl-C."""
    await engine.start()
    began = time.monotonic()
    total = sum(len(np.unique(spans["key"])) for records in sets for spans in records.spans)
    share, wanted = (len(range(rank, n, world)) for n in (total, min(s.limit or total, total)))
    tally, loop, failing, stop = Counter(share=share), asyncio.get_running_loop(), set(), asyncio.Event()
    todo, reading, threads = jobs(sets, tally, s, rank, world), threading.Lock(), ThreadPoolExecutor(os.cpu_count())
    bar = tqdm(total=wanted, disable=rank > 0, unit="image", smoothing=0.02, mininterval=0.5, dynamic_ncols=True)

    def prepare():
        with reading:  # files are read in order, pictures decoded side by side
            job = next(todo, None)
        try:
            return job and (job, *questions_about(job, s, engine.as_url))
        except BadSample as bad:
            return job, bad, []

    async def work():
        while ready := await loop.run_in_executor(threads, prepare):
            job, size, asked = ready
            if isinstance(size, BadSample):
                found, bad = {}, dict.fromkeys(job.fields, str(size))
            else:
                found, bad = await caption(asked, engine, tally, s)
            found = job.found | {s.columns[name]: text for name, text in found.items()}
            if bad:
                job.output.fail(job.key, found, {s.columns[name]: reason for name, reason in bad.items()})
                tally["lost", next(iter(bad.values())).split(":")[0]] += 1
                tally["failed"] += 1
            else:
                captions = ({"raw": job.raw} if job.raw else {}) | found
                row = {"key": job.key, "size": size, "captions": captions, "model": engine.name, "prompts": s.version}
                tally["images"] += job.output.captions.append(row)
            if job.output.failed:
                failing.add(job.output.file)
            bar.initial = tally["there"]  # so that the rate is that of this run
            bar.set_postfix_str(f"failed {tally['failed']}, retries {sum(engine.retries.values())}", refresh=False)
            bar.update(tally["there"] + tally["images"] + tally["failed"] - bar.n)

    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stop.set)
    tasks = [asyncio.create_task(task) for task in (stop.wait(), *(work() for _ in range(engine.width)))]
    finished = asyncio.gather(*tasks[1:])
    try:
        await asyncio.wait([tasks[0], finished], return_when=asyncio.FIRST_COMPLETED)
        if finished.done():
            finished.result()  # raises what a worker raised
        tally["seconds"] = time.monotonic() - began
        return tally, finished.done()
    finally:
        engine.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        threads.shutdown(cancel_futures=True)
        bar.close()
        for file in failing:
            Output(file).settle()


def report(tally, engine, s) -> dict:
    def by(kind):
        return {key[1]: n for key, n in tally.items() if key[0] == kind and n}

    done, seconds, bad = tally["images"] + tally["failed"], tally["seconds"], {}
    left, done = tally["share"] - tally["there"] - done, max(1, done)
    for (_, reason, name), n in ((key, n) for key, n in tally.items() if key[0] == "bad"):
        bad.setdefault(reason, {})[name] = n
    return {
        "model": engine.name, "prompts": s.version, "captioned": tally["images"], "captioned before": tally["there"],
        "given up on": tally["failed"], "given up on, by reason": by("lost"), "left": left, "captions": by("captions"),
        "crops without a caption": tally["crops without a caption"], "bad answers, by reason": bad,
        "retries, by cause": dict(engine.retries),
        "sentences in a caption": {name: round(tally["sentences", name] / n, 2) for name, n in by("captions").items()},
        "words in a caption": {name: round(tally["words", name] / n, 1) for name, n in by("captions").items()},
        "seconds": round(seconds, 1), "seconds an image": round(seconds / done, 4),
        "images a second": round(done / seconds, 2), "requests a second": round(tally["requests"] / seconds, 1),
        "tokens written a second": round(tally["tokens"] / seconds, 1),
        "tokens read a second": round(tally["prompt tokens"] / seconds, 1),
        "hours for what is left": round(left * seconds / done / 3600, 2),
    }


# ---- the command -----------------------------------------------------------------------------------------------------

def first_records(sets, n):
    """The first n records, less those that cannot be read."""
    for records, i in itertools.islice(((records, i) for records in sets for i in range(len(records))), n):
        try:
            yield records[i]
        except BadSample as bad:
            print(bad)


def dry_run(sets, engine, s):
    """Prints what would be sent for the first picture, or the first --limit. Writes and sends nothing."""
    for record in first_records(sets, s.limit or 1):
        for question in questions_about(Job(None, record.key, s.fields, record.image), s, engine.as_url)[1]:
            print(f"\n{record.key}: {question.field}" + (f", the part {question.box}" if question.box else ""))
            if isinstance(engine, Endpoints):
                at = engine.endpoints[0]
                question.picture = f"data:image/jpeg;base64,<{len(question.picture) - 23} characters>"
                headers = at.headers.replace(engine.key or "\0", f"${s.key_env}")
                print(f"POST {at.url}/chat/completions\n{headers}{json.dumps(engine.body(question), indent=1)}")
            else:
                print(f"{question.prompt!r}, at most {question.tokens} tokens, of {question.picture}")


def preview(path, s):
    """Draws the first pictures beside all their captions, with the boxes of the dense ones."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = []  # pictures, captions, and these as lines
    for record in first_records([Records(data, s.image_root) for data in s.data], min(s.limit or 16, 16)):
        captions = record.row.get("captions") or {}
        texts = [textwrap.wrap(f"{name.upper()}: {told(value)}", 84) for name, value in captions.items()]
        try:
            shown.append((load_image(record.image), captions, sum(texts, [])))
        except BadSample as bad:
            print(bad)
    if not shown:
        print(f"there is no picture to draw, so {path} is not written")
        return
    heights = [1 + max(10, *(len(lines) for *_, lines in shown[i:i + 2])) for i in range(0, len(shown), 2)]
    figure, axes = plt.subplots(len(heights), 4, figsize=(18, 0.17 * sum(heights) + 0.2), width_ratios=(1, 2.6) * 2,
                                height_ratios=heights, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for (image, captions, lines), (left, right) in zip(shown, axes.reshape(-1, 2)):
        left.imshow(image)
        left.set_anchor("NE")
        w, h = image.size
        for x0, y0, x1, y1 in {tuple(part["box"]) for part in captions.get(s.columns["dense"], ())}:
            left.add_patch(plt.Rectangle((x0 * w, y0 * h), (x1 - x0) * w, (y1 - y0) * h, fill=False, edgecolor="red"))
        right.text(0, 1, "\n".join(lines), va="top", fontsize=9.5, transform=right.transAxes, parse_math=False)
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")


def told(value) -> str:
    parts = value if isinstance(value, list) else [value]
    return " ".join(f"[{part['text']}]" if isinstance(part, dict) else str(part) for part in parts)


def read_prompts(path) -> tuple[dict, str]:
    """PROMPTS with what a JSON file {"version": ..., field: prompt or [prompt, most tokens]} puts in their place."""
    if not path:
        return PROMPTS, VERSION
    try:
        table = json.loads(Path(path).read_text())
        version = str(table.pop("version"))
        pairs = {name: [value, PROMPTS.get(name, ("", 250))[1]] if isinstance(value, str) else value
                 for name, value in table.items()}
        return PROMPTS | {name: (str(prompt), int(tokens)) for name, (prompt, tokens) in pairs.items()}, version
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'--prompts {path} must be like {{"version": "mine-1", "long": "Describe ...", "colours": '
                        f'["Which colours ...?", 60]}} ({error!r})') from None


def parse_flags(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("data", nargs="+", help="folders, .tar shards, .jsonl, .csv, as for train.py --data; or scenes")
    add("--endpoint", metavar="URL[,URL...]", help="OpenAI-compatible servers to ask")
    add("--model", help="its name at the endpoint, if that serves several; without --endpoint, what transformers loads")
    add("--engine", choices=["scenes"], help="the scenes' own true captions")
    add("--out", metavar="DIR", help="where the pictures of scenes are put")
    add("--fields", default="short,long", help="captions to make: %(default)s; all; or of " + ", ".join(PROMPTS))
    add("--dense", type=int, default=0, metavar="GRID", help="caption GRID x GRID crops, too: sentences with a box")
    add("--prompts", metavar="FILE.json", help="other prompts, or prompts for more fields")
    add("--name", default="", help="the model's name in those of its captions: longNAME_captions, beside others'")
    add("--limit", type=int, default=0, help="only the first so many images")
    add("--preview", metavar="FILE.png", help="draw the first (up to 16) pictures with their captions")
    add("--dry-run", action="store_true", help="print the requests for the first --limit images (1), and send none")
    add("--report", metavar="FILE.json", help="where the report goes (default: recaption.json beside the captions)")
    add("--image-root", help="where the images of CSV and JSON lines lie")
    add("--side", type=int, default=768, help="longer side of the pictures sent, in pixels (%(default)s)")
    add("--temperature", type=float, default=0.2, help="of the first try (%(default)s); the next ones are warmer")
    add("--tries", type=int, default=3, help="times a bad answer is asked for (%(default)s)")
    add("--in-flight", type=int, default=64, help="requests at a time at each endpoint (%(default)s)")
    add("--timeout", type=float, default=120, help="seconds for one answer (%(default)s)")
    add("--retries", type=int, default=6, help="failed requests that a question may cost (%(default)s)")
    add("--patience", type=float, default=600, help="seconds without any answer before the run ends (%(default)s)")
    add("--key-env", default="OPENAI_API_KEY", help="environment variable with the endpoint's key (%(default)s)")
    add("--body", default="{}", metavar="JSON", help="more for the body of each request; null takes a name out")
    add("--batch", type=int, default=8, help="questions at a time, with --model alone (%(default)s)")
    s = p.parse_args(argv)
    s.prompts, s.version = read_prompts(s.prompts)
    names = [name for name in s.prompts if name != "dense"]
    s.fields = names if s.fields == "all" else s.fields.split(",")
    unknown = [name for name in s.fields if name not in names]
    if unknown:
        raise UserError(f"--fields: no prompt for {unknown[0]!r}; there are {', '.join(names)}, and --dense GRID for "
                        "crops")
    s.fields += ["dense"] * bool(s.dense)
    # by field, the name of its captions: as in DreamLIP's files, where "long" of the model SV is "longSV_captions"
    s.columns = {name: f"{name}{s.name}_captions" if s.name else name for name in s.prompts}
    low = [flag for flag in ("in_flight", "tries", "batch", "side", "timeout") if getattr(s, flag) <= 0]
    low += [flag for flag in ("retries", "limit", "dense", "temperature", "patience") if getattr(s, flag) < 0]
    if low:
        raise UserError(f"--{low[0].replace('_', '-')} {getattr(s, low[0])} is too small")
    try:
        s.body = dict(json.loads(s.body))
    except (ValueError, TypeError):
        raise UserError("--body must be a JSON object, such as "
                        "'{\"chat_template_kwargs\": {\"enable_thinking\": false}}'") from None
    return s


def choose_engine(s, scenes):
    if s.engine == "scenes":
        if not scenes:
            raise UserError("--engine scenes knows the captions of scenes only: recaption.py scenes --engine scenes")
        return SceneAnswers(scenes)
    if s.endpoint:
        key = os.environ.get(s.key_env, "").strip()
        if s.key_env != "OPENAI_API_KEY" and not key:
            raise UserError(f"the environment has no {s.key_env}: export the endpoint's key under this name")
        return Endpoints(s, key)
    if s.model:
        return LocalModel(s)
    raise UserError("what shall answer? --endpoint URL, --model NAME_OR_PATH or --engine scenes")


def main(argv=None) -> int:
    s, scenes = parse_flags(argv), None
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "scenes" in s.data:
        if s.data != ["scenes"] or not s.out or world > 1:
            raise UserError("scenes are captioned alone, by one process, with --out DIR for their pictures")
        s.limit = s.limit or 2000
        s.data, scenes = write_scenes(Path(s.out), s.limit)
    sets = [Records(data, s.image_root) for data in s.data]
    left_out = sum((records.bad.counts for records in sets), Counter())
    if not any(map(len, sets)):
        raise UserError(f"{' '.join(s.data)}: no images there" + (f" ({dict(left_out)})" if left_out else "") +
                        "; it takes folders of pictures, .tar shards, .jsonl and .csv")
    engine = choose_engine(s, scenes)
    if s.dry_run:
        dry_run(sets, engine, s)
        return 0
    tally, whole = asyncio.run(recaption(sets, engine, s, rank, world))
    table = report(tally, engine, s) | {"left out": dict(left_out)}
    place = captions_path(sets[0].files[0]).with_name(f"recaption.{rank}.json" if rank else "recaption.json")
    place = Path(s.report or place)
    place.write_text(json.dumps(table, indent=1) + "\n")
    print(*(f"{name}: {value}" for name, value in table.items() if value != {}), f"report: {place}", sep="\n")
    if not whole:
        print("stopped; the same command goes on from here")
        return 130
    if s.preview and rank == 0:
        preview(s.preview, s)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before there is anything to stop
        sys.exit(130)
