"""Caption pictures anew with a multimodal model: short, long, perspectives, dense crops, of whatever train.py takes as --data.

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --data-parallel-size 8      the engine: any OpenAI-compatible server will do
    python recaption.py /data/cc3m --endpoint http://localhost:8000 --limit 16 --preview preview.png      look first
    python recaption.py /data/cc3m --endpoint http://localhost:8000    then all of it; the same command goes on after a stop
    torchrun --nproc_per_node=8 recaption.py pictures --model llava-hf/llava-onevision-qwen2-7b-ov-hf     without a server
    python recaption.py scenes --engine scenes --out scenes            embedded scenes with their true captions

Beside every x.tar, x.csv, x.jsonl or folder x grows x.captions.jsonl, one line an image, never changed once written:
    {"key", "size": [w, h], "captions": {"raw", "short", "long", ...}, "model", "prompts": their version}
train.py reads it from there. What was given up on stands in x.failed.jsonl with the reason and what was good of it; the next
run asks for the rest.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import (FIELDS, BadSample, Parser, Records, UserError, captions_path, clean_field, hashed, load_image,
                  split_sentences)
from scenes import Scenes

VERSION = "1"
PROMPTS = {  # field: (prompt, most tokens of an answer). --prompts FILE.json replaces and adds
    "short": ("Describe the image in one sentence.", 80),  # short and long: DreamLIP (2403.17007)
    "long": ("Describe the image in detail, part by part, in eight to ten plain sentences.", 400),
    "details": ("Describe all details of the image in a few plain sentences.", 250),  # these five: Holistic CLIP (2412.00440)
    "main_object": ("Describe only the main object of the image, in one sentence, and nothing else.", 80),
    "background": ("Describe only the background of the image, in one sentence, without the main object.", 80),
    "style": ("Describe only the style of the image or the feeling it gives, in one sentence.", 80),
    "few_words": ("Name what the image shows in a few words, separated by commas.", 40),
    "dense": ("This is one part of a larger image. Describe what it shows in one or two plain sentences.", 100),  # DCI (2312.08578)
}


# ---- cleaning --------------------------------------------------------------------------------------------------------

THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.S | re.I)
MARKERS = re.compile(r"</?[a-z_]\w{0,24}/?>|<\|\w{1,24}\|>|\[/?INST\]|```\w*", re.I)
TURN = re.compile(r"\b(?:USER|ASSISTANT|Human|User|Assistant)\s*:\s*")
LINK = re.compile(r"!?\[([^\]\n]*)\]\([^)\s]*\)")
LABEL = re.compile(r"(?:\*\*|__)[^*_\n]{1,40}(?::\s*(?:\*\*|__)|(?:\*\*|__)\s*:)\s*")  # **Background:** or **Background**:
EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)")
LIST_ITEM = re.compile(r"\s*(?:>\s*)*(?:[-*•·▪‣+–—|]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+")
HEADING = re.compile(r"#{1,6}\s.*[^.!?]|(?:\*\*|__)[^.!?]+(?:\*\*|__)|[^.!?]{1,80}:")
OPENER = re.compile(r"""(?:(?:(?:short|long|detailed|brief|image)\s)*(?:caption|description|answer|response|keywords)\s?:\s
    | here(?:'s|’s|\sis|\sare)\s[^:.]{0,80}:\s?
    | (?:in|within)\s(?:the|this)\s(?:\w+\s)?(?:image|picture|photo|photograph)\s?,\s(?:(?:we|you|one)\scan\s(?:see|observe)\s)?
    | (?:the|this)\s(?:given\s|provided\s)?(?:image|picture|photo|photograph)\s(?:\w+ly\s|also\s)?(?:shows|depicts|features|
        displays|captures|presents|portrays|illustrates|showcases|contains|includes|consists\sof|is\sof)\s(?:that\s)?
    | (?:(?:this|it)\sis\s)?(?:an|the)\simage\s(?:of|showing|depicting|featuring)\s
    | (?:we|you|one)\scan\s(?:see|observe)\s)""", re.I | re.X)
CHATTER = re.compile(r"""(?:sure|certainly|of\scourse|absolutely|okay)[!,.]|(?:please\s)?(?:let\sme\sknow|feel\sfree)\b
    |i\shope\s(?:this|that|it)\b|would\syou\slike\b|is\sthere\sanything\b|if\syou\s(?:need|have|would|want|'d)\b""", re.I | re.X)
REFUSAL = re.compile(r"""i(?:'|’)?m\s(?:\w+\s)?sorry\b|(?:i\s)?apologi[sz]e\b|as\san\s(?:ai|artificial)\b
    |\b(?:i\s(?:can(?:no|'|’)?t|do\snot|don(?:'|’)t|could\snot)|i(?:\sam|'m|’m)\s(?:unable|not\sable|not\scapable))\s(?:\w+\s)?
        (?:to\s)?(?:see|view|assist|help|describe|provide|identify|determine|access|process|analy[sz]e|comply|fulfil|fulfill|have)\b
    |\bi\scan\sonly\sprocess\b|no\simage\s(?:was|is|has|were)\b|(?:upload|provide|share|attach)\s(?:the|an|your)\simage\b
    |i\sneed\s(?:the|an)\simage\b""", re.I | re.X)


def clean(answer, field="long", prompt="", finish="stop") -> tuple[str, str | None]:
    """A model's answer -> (caption, None), or (what is left of it, why it is bad).

    Bad is what holds nothing to train on: "empty", "not text", "refusal", "prompt echo", "cut off", "repetition". Stock
    openers, small talk, markdown, repeated sentences and a cut-off last one only go. `finish`: the server's finish_reason.
    """
    if not isinstance(answer, str) or not answer.strip():
        return "", "empty"
    text = MARKERS.sub(" ", THOUGHT.sub("", answer.replace("\r", "\n"))).replace("`", "")
    echoed = sentences_of(prompt) | {""}
    if TURN.search(text):
        text = next((part for part in TURN.split(text) if sentences_of(part) - echoed), TURN.sub(" ", text))
    if not is_text(text):
        return text.strip(), "not text" if text.strip() else "empty"
    kept = [open_well(sentence) for sentence in split_sentences("\n".join(bare_lines(text)))]
    if field == "few_words":
        kept = [item.strip(" .\"'“”") for sentence in kept for item in re.split(r"[,;]\s", sentence)]
    if kept and REFUSAL.search(kept[0]):
        return " ".join(kept), "refusal"
    kept = [s for s in kept if plain(s) and not CHATTER.match(s) and not REFUSAL.search(s)]
    if kept and all(plain(s) in echoed for s in kept):
        return " ".join(kept), "prompt echo"
    kept = [s for s in kept if plain(s) not in echoed]
    once = {}
    for sentence in kept:
        once.setdefault(plain(sentence), sentence)
    once = list(once.values())
    if loops(" ".join(once)) or len(kept) >= 4 and len(once) <= len(kept) / 2 and field != "few_words":
        return " ".join(kept), "repetition"
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
    letters, other = len(re.findall(r"[^\W\d_]", text)), len(re.findall(r"[^\w\s*#|>-]|\d", text))
    astray = text.count("\ufffd") > 2 or re.search(r"[A-Za-z0-9+/=_-]{80}", text) or re.fullmatch(r"\s*\w+://\S+\s*", text)
    return letters > max(1, other) and not astray and not text.lstrip().startswith(("{", "[{", '["', "<!"))


def bare_lines(text):
    """The lines without headings, list marks and other markdown; a sentence that goes over a line's end is one line again."""
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
    """Whether up to 24 words come four times in a row (one word: six times). Words of letters alone, so counting up is no way
    out; a Chinese or Japanese character is a word."""
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+", text.lower())
    for period in range(1, min(24, len(words) // 4) + 1):
        run = 0
        for a, b in zip(words, words[period:]):
            run = run + 1 if a == b else 0
            if run >= max(3 * period, 5):
                return True
    return False


# ---- the file of captions --------------------------------------------------------------------------------------------

class Lines:
    """An append-only file of JSON lines {"key", "captions": {field: ...}, ...}, which several processes may write to.

    `done`: hash of a key -> its fields. A line is appended under a lock and in one write; whoever holds the lock first reads
    what others have appended, and cuts off a last line that a killed process left torn. Raises UserError.
    """

    def __init__(self, path: Path):
        self.path, self.done, self.end, self.sets, self.synced = path, {}, 0, {}, time.monotonic()
        try:
            self.file = open(path, "a+b", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): captions need a folder you may write to, so link or copy "
                            "the data into one") from None
        self.append(None)

    def has(self, key: int, fields) -> bool:
        return key in self.done and fields <= self.done[key]

    def append(self, row: dict | None) -> bool:
        """Whether the row brought anything new, and so was written. None only reads and mends."""
        fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            self._catch_up()
            if row is None or self.has(hashed(row["key"]), row["captions"].keys()):
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
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}); what is in it stays, and the same command goes on "
                            "there") from None
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
        fcntl.flock(self.file, fcntl.LOCK_EX)
        lines = [line for line in self.lines() if wanted(parsed(line))]
        os.ftruncate(self.file.fileno(), 0)
        self.file.write(b"".join(lines))
        fcntl.flock(self.file, fcntl.LOCK_UN)


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
    error: str = ""  # why there is none: asking again is no use


def crops(grid: int) -> list[tuple]:
    return [(x / grid, y / grid, (x + 1) / grid, (y + 1) / grid) for y in range(grid) for x in range(grid)]


def pictures(source, side, boxes, as_url) -> tuple:
    """The bytes or path of an image -> its upright (width, height), and for each box (None: all of it) a PIL image whose longer
    side is at most `side`, or its JPEG as a data URL. Raises BadSample."""
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if as_url and boxes == [None] and (size := fit_to_send(data, side)):
            return size, ["data:image/jpeg;base64," + base64.b64encode(data).decode()]
    except OSError as error:
        raise BadSample("image missing", f"{source}, {error.strerror}") from None
    image, found = load_image(data), []
    for box in boxes:
        x0, y0, x1, y1 = box or (0, 0, 1, 1)
        w, h = image.size
        part = image.crop((int(x0 * w), int(y0 * h), max(int(x1 * w), int(x0 * w) + 1), max(int(y1 * h), int(y0 * h) + 1)))
        part.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2)
        found.append(jpeg_url(part) if as_url else part)
    return image.size, found


def fit_to_send(data: bytes, side: int):
    """The size of a JPEG that can go out as it is: upright, grey or RGB, small enough, whole. None for every other one."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            upright = image.getexif().get(0x0112, 1) == 1
            whole = data.rstrip(b"\0").endswith(b"\xff\xd9")
            return image.size if upright and whole and image.mode in ("L", "RGB") and max(image.size) <= side else None
    except Exception:  # whatever is wrong with it, load_image finds a name for
        return None


def jpeg_url(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- engines: what answers. Each has a name, a width (images worth having in work at once), and `ask` ------------------

LARGEST = 1 << 26  # bytes of a response that are read at most


class Fault(Exception):
    """A request that came to nothing and is made again. `wait`: seconds, if the server named them. `blame`: it may lie with the
    image, so that only so many are allowed; a server that is away or busy is waited for."""

    def __init__(self, cause, detail="", wait=None, blame=True):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause, self.wait, self.blame = cause, wait, blame


class Slot:
    """One of the requests that an endpoint takes at a time, over a connection of its own that is kept open."""

    def __init__(self, endpoint):
        self.endpoint, self.reader, self.writer, self.failures = endpoint, None, None, 0

    async def request(self, method, path, body=b"") -> tuple[int, dict, bytes]:
        """-> (status, headers in lower case, body). Raises Fault."""
        e = self.endpoint
        try:
            if self.reader is None or self.reader.at_eof():
                self.close()
                self.reader, self.writer = await asyncio.open_connection(e.host, e.port, ssl=e.tls)
        except OSError as error:
            raise Fault("no connection", error.strerror or str(error), blame=False) from None
        try:
            self.writer.write(f"{method} {e.path}{path} HTTP/1.1\r\n{e.headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await self.writer.drain()
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            version, status = lines[0].split(" ", 2)[:2]
            headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            body = await self._body(headers)
            if version == "HTTP/1.0" or headers.get("connection", "").lower() == "close":
                self.close()
            return int(status), headers, body
        except (OSError, EOFError) as error:
            self.close()
            raise Fault("dropped connection", str(error)) from None
        except (ValueError, asyncio.LimitOverrunError) as error:
            self.close()
            raise Fault("not HTTP", str(error)) from None
        except BaseException:  # cancelled, by a timeout or by the end of the run: what comes later is no answer to the next
            self.close()
            raise

    async def _body(self, headers) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(min(int(headers["content-length"]), LARGEST))
        if headers.get("transfer-encoding", "").lower() != "chunked":
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
            raise UserError("--endpoint must be like http://localhost:8000, with the key, if there is one, in the environment")
        self.path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        self.url, self.rest_until = f"{parts.scheme}://{parts.netloc}{self.path}", 0.0
        self.headers = (f"Host: {parts.netloc}\r\nContent-Type: application/json\r\nAccept: application/json\r\n"
                        + (f"Authorization: Bearer {key}\r\n" if key else ""))


class Endpoints:
    """OpenAI-compatible servers, `in_flight` requests at each. An image keeps its slot for all its questions, with the picture
    before the prompt, so that a server that caches prefixes (vLLM, SGLang) reads the picture once.

    A slot whose request failed rests, longer each time (exponential backoff with jitter), and its image goes on with
    another; an endpoint that names a time (Retry-After) rests as a whole.
    """

    as_url = True

    def __init__(self, s, key):
        self.endpoints = [Endpoint(url, key) for url in s.endpoint.split(",")]
        self.name, self.s, self.key, self.retries = s.model, s, key, Counter()
        self.in_flight = s.in_flight * len(self.endpoints)
        self.width = self.in_flight + max(16, self.in_flight // 4)  # so that a picture is ready whenever a slot is free

    async def start(self):
        """Asks every endpoint once without and once with a picture. Raises UserError."""
        self.slots, self.answered = asyncio.Queue(), time.monotonic()
        slots = [Slot(endpoint) for _ in range(self.s.in_flight) for endpoint in self.endpoints]
        self.name = self.name or await self._served_model(slots[0])
        picture = jpeg_url(Image.new("RGB", (224, 224), "red"))
        for slot in slots[:len(self.endpoints)]:
            blind, seeing = [await self._try(slot, Question("", "", "What colour is this?", 8, 0.0, p)) for p in (None, picture)]
            where = f"{slot.endpoint.url} with model {self.name!r}"
            if seeing.error:
                raise UserError(f"{where} takes no pictures ({seeing.error}): serve a vision-language model, or see --body")
            if 0 < seeing.prompt_tokens <= blind.prompt_tokens:
                raise UserError(f"{where} leaves pictures out (no more prompt tokens with one than without): serve a vision-language model")
        for slot in slots:
            self.slots.put_nowait(slot)

    async def _served_model(self, slot):
        url = slot.endpoint.url
        try:
            status, _, content = await asyncio.wait_for(slot.request("GET", "/models"), self.s.timeout)
            names = [row["id"] for row in json.loads(content)["data"]] if status == 200 else []
        except (Fault, asyncio.TimeoutError) as error:
            raise UserError(f"{url} does not answer ({error}): start the server, or check --endpoint") from None
        except (ValueError, LookupError, TypeError):
            names = []
        if len(names) != 1:
            raise UserError(f"{url} serves {', '.join(map(str, names[:9])) or 'no model that it lists'}: name one with --model")
        return names[0]

    async def _try(self, slot, question):
        for attempt in range(self.s.retries + 1):
            try:
                return await self._answer(slot, question)
            except Fault as fault:
                self.retries[fault.cause] += 1
                if fault.cause in ("no connection", "status 404") or attempt == self.s.retries:
                    raise UserError(f"{slot.endpoint.url} does not answer as it should ({fault}): check --endpoint, --model and "
                                    "the server") from None
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
            raise UserError(f"no endpoint has answered for {self.s.patience:.0f} s (the last: {slot.endpoint.url}, {fault}); what is "
                            "written stays, and the same command goes on there")
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
        """One request. Raises Fault where another may do better, and UserError where none will."""
        try:
            request = slot.request("POST", "/chat/completions", json.dumps(self.body(question)).encode())
            status, headers, content = await asyncio.wait_for(request, self.s.timeout)
        except asyncio.TimeoutError:
            raise Fault("timeout", f"no answer in {self.s.timeout:.0f} s") from None
        if status == 200:
            try:
                reply = json.loads(content)
                choice, usage = reply["choices"][0], reply.get("usage") or {}
                return Answer(said(choice["message"]), choice.get("finish_reason"), int(usage.get("completion_tokens") or 0),
                              int(usage.get("prompt_tokens") or 0))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                raise Fault("not an answer", repr(content[:80])) from None
        message = " ".join(content[:300].decode(errors="replace").split())
        message = re.sub(re.escape(self.key), "***", message, flags=re.I) if self.key else message
        if status in (401, 403):
            raise UserError(f"{slot.endpoint.url} refuses the key (status {status}): put the right one into {self.s.key_env}")
        if status >= 500 or status in (404, 408, 409, 425, 429):
            raise Fault(f"status {status}", message, retry_after(headers), blame=status not in (429, 502, 503))
        return Answer(None, error=f"status {status}: {message}")

    def close(self):
        pass  # a connection ends with the process


def said(message):
    content = message.get("content") or message.get("refusal")
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else content


def backoff(failures) -> float:
    return min(60, 0.2 * 2 ** failures) * random.uniform(0.5, 1)


def retry_after(headers) -> float | None:
    """Seconds, from a number of them or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value) if value[:1].isdigit() else email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


class LocalModel:
    """A model of Hugging Face transformers on this process's device, in batches of questions of one field, for their answers
    are about as long."""

    as_url = False

    def __init__(self, s):
        try:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria
        except ImportError as error:
            raise UserError(f"--model needs transformers ({error}): pip install 'transformers>=5'") from None
        gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
        self.dtype, self.torch = torch.bfloat16 if gpu else torch.float32, torch
        try:
            self.processor = AutoProcessor.from_pretrained(s.model)
            self.processor.tokenizer.padding_side = "left"  # so that all answers of a batch start at the same place
            self.model = AutoModelForImageTextToText.from_pretrained(s.model, dtype=self.dtype).to(self.device).eval()
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"--model {s.model} is no vision-language model that transformers can load: "
                            f"{' '.join(str(error).split())[:200]}") from None
        self.name, self.batch, self.width, self.retries = s.model, s.batch, 2 * s.batch, Counter()
        self.waiting, self.stopping = {}, False  # (field, temperature) -> list of (question, future)

        class Stop(StoppingCriteria):  # Ctrl-C ends a long answer at its next token
            def __call__(_, ids, scores, **kwargs):
                return torch.full((len(ids),), self.stopping, device=ids.device)
        self.stop = [Stop()]

    async def start(self):
        self.arrived, self.worker = asyncio.Event(), asyncio.create_task(self._work())

    async def ask(self, questions):
        futures = [asyncio.get_running_loop().create_future() for _ in questions]
        for question, future in zip(questions, futures):
            self.waiting.setdefault((question.field, question.temperature), []).append((question, future))
        self.arrived.set()
        return await asyncio.gather(*futures)

    async def _work(self):
        while True:
            await self.arrived.wait()
            kind = max(self.waiting, key=lambda kind: len(self.waiting[kind]))
            batch, self.waiting[kind] = self.waiting[kind][:self.batch], self.waiting[kind][self.batch:]
            if not any(self.waiting.values()):
                self.arrived.clear()
            try:
                answers = await asyncio.to_thread(self.generate, [question for question, _ in batch])
            except Exception as error:
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers):
                if not future.done():
                    future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)

    def generate(self, questions: list[Question]) -> list[Answer]:
        talks = [[{"role": "user", "content": [{"type": "image", "image": q.picture}, {"type": "text", "text": q.prompt}]}]
                 for q in questions]
        warm = questions[0].temperature
        sampling = {"do_sample": True, "temperature": warm} if warm else {"do_sample": False}
        try:
            inputs = self.processor.apply_chat_template(
                talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                processor_kwargs={"padding": True})
            inputs = inputs.to(self.device, self.dtype)
            with self.torch.inference_mode():
                ids = self.model.generate(**inputs, max_new_tokens=max(q.tokens for q in questions),
                                          stopping_criteria=self.stop, **sampling)
        except self.torch.OutOfMemoryError:
            raise UserError(f"--batch {self.batch} does not fit into the memory of {self.device}: halve it") from None
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        answers = []
        for row in ids[:, inputs["input_ids"].shape[1]:].tolist():
            n = next((i for i, token in enumerate(row) if token in ends), len(row))
            answers.append(Answer(self.processor.decode(row[:n], skip_special_tokens=True), "stop" if n < len(row) else "length", n,
                                  inputs["input_ids"].shape[1]))
        return answers

    def close(self):
        self.stopping = True


class SceneAnswers:
    """The true captions of the embedded scenes; of a crop, what is said about the objects whose middle lies in it."""

    as_url, name, width = False, "scenes", 16

    def __init__(self, scenes):
        self.scene, self.retries = functools.lru_cache(64)(scenes.scene), Counter()

    async def start(self):
        pass

    async def ask(self, questions):
        return [Answer(self._truth(question)) for question in questions]

    def _truth(self, question):
        scene = self.scene(int(Path(question.key).stem))
        if question.box is None:
            text = scene.captions.get(question.field)
            return " ".join(text) if isinstance(text, list) else text
        x0, y0, x1, y1 = question.box
        inside = [k for k, o in enumerate(scene.objects) if x0 <= o.x < x1 and y0 <= o.y < y1]
        return " ".join(s for s, k in zip(scene.captions["long"], scene.about) if k in inside) or scene.captions["background"]

    def close(self):
        pass


def write_scenes(folder: Path, n: int) -> tuple[list[str], Scenes]:
    """n training scenes as folder/images/*.png and folder/captions.jsonl with their raw captions, unless they are there."""
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
    output: Output
    key: str = ""
    image: object = None  # bytes or a path
    raw: str | None = None
    fields: list = ()  # those to ask for: names of PROMPTS
    found: dict = field(default_factory=dict)  # what an earlier run found
    bad: BadSample | None = None  # why there is no image


class Tally:
    """Counts for the progress bar and the report."""

    def __init__(self):
        self.images = self.there = self.tokens = self.prompt_tokens = self.requests = 0
        self.captions, self.words, self.sentences = Counter(), Counter(), Counter()  # by field
        self.bad, self.lost = Counter(), Counter()  # answers by (field, reason); images by reason
        self.began = time.monotonic()

    def add(self, field, text):
        self.captions[field] += 1
        self.words[field] += len(text.split())
        self.sentences[field] += len(split_sentences(text))

    def report(self, engine, s, share) -> dict:
        seconds = time.monotonic() - self.began
        lost, done = sum(self.lost.values()), self.images + sum(self.lost.values())
        left = max(0, share - self.there - done)
        bad = {}
        for (field, reason), n in self.bad.items():
            bad.setdefault(reason, {})[field] = n
        return {
            "model": engine.name, "prompts": s.version, "captioned": self.images, "captioned before": self.there,
            "given up on": lost, "given up on, by reason": dict(self.lost), "left": left,
            "captions": dict(self.captions), "bad answers, by reason": bad, "retries, by cause": dict(engine.retries),
            "sentences in a caption": {f: round(self.sentences[f] / n, 2) for f, n in self.captions.items()},
            "words in a caption": {f: round(self.words[f] / n, 1) for f, n in self.captions.items()},
            "seconds": round(seconds, 1), "seconds an image": round(seconds / max(done, 1), 4),
            "images a second": round(done / seconds, 2), "requests a second": round(self.requests / seconds, 1),
            "tokens written a second": round(self.tokens / seconds, 1), "tokens read a second": round(self.prompt_tokens / seconds, 1),
            "hours for what is left": round(left * seconds / max(done, 1) / 3600, 2),
        }


def column(field, name) -> str:
    """The name of a caption: "long", or of the model called SV "longSV_captions", as in DreamLIP's files."""
    return f"{field}{name}_captions" if name else field


def jobs(sets, tally, s, rank, world):
    """Every image that lacks a field, in the order of the files; of `world` processes, this one's share."""
    wanted, left = [*s.fields, *["dense"] * bool(s.dense)], s.limit or sys.maxsize
    for records in sets:
        for file, first, spans in zip(records.files, records.first.tolist(), records.spans):
            keys = spans["key"]
            places = np.sort(np.unique(keys, return_index=True)[1])[:left]  # an image may be in several rows
            left -= len(places)
            output = Output(file)
            for place in places[rank::world].tolist():
                fields = [f for f in wanted if not output.captions.has(int(keys[place]), {column(f, s.name)})]
                if not fields:
                    tally.there += 1
                    continue
                job = Job(output, fields=fields)
                try:
                    record = records[first + place]
                    job.key, job.image, job.raw = record.key, record.image, raw_caption(record.row)
                    found = output.found.get(job.key, {})
                    job.found = {column(f, s.name): found[column(f, s.name)] for f in fields if column(f, s.name) in found}
                    job.fields = [f for f in fields if column(f, s.name) not in job.found]
                except BadSample as bad:
                    job.key, job.bad = f"sample {place}", bad
                yield job
            if not left:
                return


def raw_caption(row) -> str | None:
    """The caption found with the image, under the names that published files use."""
    inner = row.get("captions")
    row = {**row, **inner} if isinstance(inner, dict) else row
    texts = [clean_field(row.get(name)) for name in FIELDS["raw"] + FIELDS["caption"]]
    return next((found[0] for found in texts if found), None)


def questions(job, prompts, s, as_url) -> tuple:
    """-> (width, height) of the image, and what is asked about it. Raises BadSample."""
    if job.bad:
        raise job.bad
    parts = crops(s.dense)
    asked = [(field, box) for field in job.fields for box in (parts if field == "dense" else [None])]
    boxes = list(dict.fromkeys(box for _, box in asked))  # the whole image is made ready once, for all its questions
    size, found = pictures(job.image, s.side, boxes, as_url)
    found = dict(zip(boxes, found))
    return size, [Question(job.key, field, *prompts[field], s.temperature, found[box], box) for field, box in asked]


async def caption(asked, engine, prompts, tally, s) -> tuple[dict, dict]:
    """-> what was found, {field: text, or list of {"box", "text"}}, and why the other fields were not, {field: reason}."""
    good, reasons = {}, {}
    for attempt in range(s.tries):
        answers, again = await engine.ask(asked), []
        tally.requests += len(answers)
        for question, answer in zip(asked, answers):
            tally.tokens += answer.tokens
            tally.prompt_tokens += answer.prompt_tokens
            text, reason = ("", answer.error) if answer.error else clean(
                answer.text, question.field, prompts[question.field][0], answer.finish)
            if reason is None:
                good[question.field, question.box] = text
                continue
            tally.bad[question.field, reason.split(":")[0]] += 1
            reasons[question.field, question.box] = reason
            if not answer.error:  # a warmer answer is another one
                again.append(replace(question, temperature=round(min(1.0, question.temperature + 0.4), 2)))
        if not again:
            break
        asked = again
    found = {field: text for (field, box), text in good.items() if box is None}
    dense = [(box, sentence) for box in crops(s.dense) for sentence in split_sentences(good.get(("dense", box), ""))]
    if dense:
        found["dense"] = [{"box": [round(x, 4) for x in box], "text": sentence} for box, sentence in dense]
    for field, text in found.items():
        tally.add(field, " ".join(sentence for _, sentence in dense) if field == "dense" else text)
    return found, {field: reason for (field, _), reason in reasons.items() if field not in found}


async def recaption(sets, engine, prompts, s, rank=0, world=1) -> tuple[Tally, bool]:
    """Captions all that lacks captions. -> the counts, and whether it came to the end (and not to Ctrl-C)."""
    share = len(range(rank, min(s.limit or sys.maxsize, sum(map(len, sets))), world))
    tally, loop, failing, stop = Tally(), asyncio.get_running_loop(), set(), asyncio.Event()
    todo, reading, threads = jobs(sets, tally, s, rank, world), threading.Lock(), ThreadPoolExecutor(os.cpu_count())
    bar = tqdm(total=share, disable=rank > 0, unit="image", smoothing=0.02, mininterval=0.5, dynamic_ncols=True)

    def prepare():
        with reading:  # files are read in order, pictures decoded side by side
            job = next(todo, None)
        try:
            return job and (job, *questions(job, prompts, s, engine.as_url))
        except BadSample as bad:
            return job, bad, []

    async def work():
        while ready := await loop.run_in_executor(threads, prepare):
            job, size, asked = ready
            if isinstance(size, BadSample):
                found, reasons = {}, dict.fromkeys(job.fields, str(size))
            else:
                found, reasons = await caption(asked, engine, prompts, tally, s)
            found = job.found | {column(name, s.name): text for name, text in found.items()}
            if reasons:
                job.output.fail(job.key, found, {column(name, s.name): reason for name, reason in reasons.items()})
                tally.lost[next(iter(reasons.values())).split(":")[0]] += 1
            else:
                captions = ({"raw": job.raw} if job.raw else {}) | found
                row = {"key": job.key, "size": list(size), "captions": captions, "model": engine.name, "prompts": s.version}
                tally.images += job.output.captions.append(row)
            if job.output.failed:
                failing.add(job.output.file)
            bar.initial = tally.there  # so that the rate is that of this run
            bar.set_postfix_str(f"failed {tally.lost.total()}, retries {engine.retries.total()}", refresh=False)
            bar.update(tally.there + tally.images + tally.lost.total() - bar.n)

    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stop.set)
    tasks = [asyncio.create_task(coroutine) for coroutine in (stop.wait(), *(work() for _ in range(engine.width)))]
    finished = asyncio.gather(*tasks[1:])
    try:
        await asyncio.wait([tasks[0], finished], return_when=asyncio.FIRST_COMPLETED)
        if finished.done():
            finished.result()  # raises what a worker raised
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


# ---- the command -----------------------------------------------------------------------------------------------------

def first_records(sets, n):
    """The first n records that can be read."""
    for records, i in itertools.islice(((records, i) for records in sets for i in range(len(records))), n):
        try:
            yield records[i]
        except BadSample as bad:
            print(bad)


def dry_run(sets, engine, prompts, s):
    """Prints what would be sent for the first picture, or the first --limit. Writes and sends nothing."""
    for record in first_records(sets, s.limit or 1):
        job = Job(None, record.key, record.image, fields=[*s.fields, *["dense"] * bool(s.dense)])
        for question in questions(job, prompts, s, engine.as_url)[1]:
            print(f"\n{record.key}: {question.field}" + (f", the part {question.box}" if question.box else ""))
            if isinstance(engine, Endpoints):
                endpoint = engine.endpoints[0]
                headers = endpoint.headers.replace(engine.key or "\0", f"${s.key_env}")
                question.picture = f"data:image/jpeg;base64,<{len(question.picture) - 23} characters>"
                print(f"POST {endpoint.url}/chat/completions\n{headers}{json.dumps(engine.body(question), indent=1)}")
            else:
                print(f"{question.prompt!r}, at most {question.tokens} tokens, of {question.picture}")


def preview(path, s):
    """Draws the first pictures beside all their captions, with the boxes of the dense ones."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = []
    for record in first_records([Records(data, s.image_root) for data in s.data], min(s.limit or 16, 16)):  # with the new captions
        try:
            shown.append((load_image(record.image), record.row.get("captions") or {}))
        except BadSample as bad:
            print(bad)
    texts = [[line for field, value in captions.items() for line in textwrap.wrap(f"{field.upper()}: {told(value)}", 88)]
             for _, captions in shown]
    heights = [max(8, *map(len, texts[i:i + 2]), 0) for i in range(0, len(texts), 2)]
    figure, axes = plt.subplots(len(heights), 4, figsize=(18, 0.18 * sum(heights) + 0.3), width_ratios=(1, 2.6) * 2,
                                height_ratios=heights, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for (image, captions), lines, (left, right) in zip(shown, texts, axes.reshape(-1, 2)):
        left.imshow(image)
        w, h = image.size
        for x0, y0, x1, y1 in {tuple(part["box"]) for part in captions.get(column("dense", s.name), ())}:
            left.add_patch(plt.Rectangle((x0 * w, y0 * h), (x1 - x0) * w, (y1 - y0) * h, fill=False, edgecolor="red"))
        right.text(0, 1, "\n".join(lines), va="top", fontsize=9, transform=right.transAxes, parse_math=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    print(f"wrote {path}")


def told(caption) -> str:
    parts = caption if isinstance(caption, list) else [caption]
    return " ".join(f"[{part['text']}]" if isinstance(part, dict) else str(part) for part in parts)


def read_prompts(path) -> tuple[dict, str]:
    """PROMPTS with what a JSON file {"version": ..., field: prompt or [prompt, most tokens]} puts in their place."""
    if not path:
        return PROMPTS, VERSION
    try:
        table = json.loads(Path(path).read_text())
        version = str(table.pop("version"))
        found = {field: (value, PROMPTS.get(field, ("", 250))[1]) if isinstance(value, str) else (str(value[0]), int(value[1]))
                 for field, value in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f'--prompts {path} must be like {{"version": "mine-1", "long": "Describe ...", "colours": ["Which colours '
                        f'...?", 60]}} ({error!r})') from None
    return PROMPTS | found, version


def parse_flags(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data", nargs="+", help="folders, .tar shards, .jsonl, .csv, as for train.py --data; or scenes")
    p.add_argument("--endpoint", metavar="URL[,URL...]", help="OpenAI-compatible servers to ask")
    p.add_argument("--model", help="the endpoint's name for the model (if it serves several); without --endpoint, what transformers loads")
    p.add_argument("--engine", choices=["scenes"], help="the scenes' own true captions")
    p.add_argument("--out", metavar="DIR", help="where the pictures of scenes are put")
    p.add_argument("--fields", default="short,long", help="which captions: %(default)s; or all; of " + ", ".join(PROMPTS))
    p.add_argument("--dense", type=int, default=0, metavar="GRID", help="caption GRID x GRID crops too, each sentence with its box")
    p.add_argument("--prompts", metavar="FILE.json", help="other prompts, or prompts for more fields")
    p.add_argument("--name", default="", help="this model's name in the captions' (longNAME_captions), beside other models'")
    p.add_argument("--limit", type=int, default=0, help="only the first so many images")
    p.add_argument("--preview", metavar="FILE.png", help="draw the first (up to 16) pictures with their captions")
    p.add_argument("--dry-run", action="store_true", help="print the requests for the first --limit images (1), and send none")
    p.add_argument("--report", metavar="FILE.json", help="where the report goes (default: recaption.json beside the captions)")
    p.add_argument("--image-root", help="where the images of CSV and JSON lines lie")
    p.add_argument("--side", type=int, default=768, help="longer side of the pictures sent, in pixels (%(default)s)")
    p.add_argument("--temperature", type=float, default=0.2, help="of the first try (%(default)s); the next ones are warmer")
    p.add_argument("--tries", type=int, default=3, help="times a bad answer is asked for (%(default)s)")
    p.add_argument("--in-flight", type=int, default=64, help="requests at a time at each endpoint (%(default)s)")
    p.add_argument("--timeout", type=float, default=120, help="seconds for one answer (%(default)s)")
    p.add_argument("--retries", type=int, default=6, help="failed requests that one image may cost (%(default)s)")
    p.add_argument("--patience", type=float, default=600, help="seconds without any answer before the run ends (%(default)s)")
    p.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable with the endpoint's key (%(default)s)")
    p.add_argument("--body", default="{}", metavar="JSON", help="more for the body of each request; null takes a name out")
    p.add_argument("--batch", type=int, default=8, help="questions at a time, with --model alone (%(default)s)")
    s = p.parse_args(argv)
    s.prompts, s.version = read_prompts(s.prompts)
    s.fields = [f for f in s.prompts if f != "dense"] if s.fields == "all" else s.fields.split(",")
    unknown = [f for f in s.fields if f not in s.prompts or f == "dense"]
    if unknown:
        raise UserError(f"--fields: no prompt for {unknown[0]!r}; there are {', '.join(f for f in s.prompts if f != 'dense')} "
                        "(and --dense GRID for the crops)")
    low = [flag for flag in ("in_flight", "tries", "batch", "side", "timeout") if getattr(s, flag) <= 0]
    low += [flag for flag in ("retries", "limit", "dense", "temperature", "patience") if getattr(s, flag) < 0]
    if low:
        raise UserError(f"--{low[0].replace('_', '-')} {getattr(s, low[0])} is too small")
    try:
        s.body = dict(json.loads(s.body))
    except (ValueError, TypeError):
        raise UserError("--body must be a JSON object, such as '{\"chat_template_kwargs\": {\"enable_thinking\": false}}'") from None
    return s


def choose_engine(s, scenes):
    if s.engine == "scenes":
        if not scenes:
            raise UserError("--engine scenes knows the captions of scenes only: python recaption.py scenes --engine scenes --out DIR")
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
    if not any(map(len, sets)):
        raise UserError(f"{' '.join(s.data)}: no images there ({sets[0].bad.report() or 'none of a format that Pillow reads here'})")
    engine = choose_engine(s, scenes)
    if s.dry_run:
        dry_run(sets, engine, s.prompts, s)
        return 0

    async def run():
        await engine.start()
        return await recaption(sets, engine, s.prompts, s, rank, world)

    tally, whole = asyncio.run(run())
    share = len(range(rank, sum(map(len, sets)), world))
    report = tally.report(engine, s, share) | {"left out of the index": {r: n for records in sets for r, n in records.bad.counts.items()}}
    place = captions_path(sets[0].files[0]).with_name("recaption.json" if rank == 0 else f"recaption.{rank}.json")
    Path(s.report or place).write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(f"{name}: {value}" for name, value in report.items() if value not in ({}, "")))
    print(f"report: {s.report or place}" + ("" if whole else "\nstopped; the same command goes on from here"))
    if s.preview and rank == 0 and whole:
        preview(s.preview, s)
    return 0 if whole else 130


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
