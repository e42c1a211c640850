"""Caption pictures anew with a multimodal model: short, long, perspectives, dense crops, of whatever train.py takes.

    pip install 'openai[aiohttp]'                                   the client
    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --data-parallel-size 8   the model; any OpenAI-compatible server will do
    python recaption.py /data/cc3m --endpoint http://localhost:8000 --limit 16 --preview preview.html      look first
    python recaption.py /data/cc3m --endpoint http://localhost:8000     all of it; to resume, run it again
    python recaption.py /data/cc3m --endpoint http://localhost:8000 --dense 2   crops: for train.py --region-grouping

Beside every x.tar, x.csv, x.jsonl or folder x grows x.captions.jsonl, one line an image, never changed once written:
    {"key", "size": [width, height], "captions": {"short", "long", ...}, "model", "prompts": their version}
train.py joins it with the data by key. What failed is not written, so the next run asks for it again.
"""

import asyncio
import gc
import json
import math
import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import (BadCount, BadSample, Parser, Records, UserError, at_least, captions_path, check_target, contact_sheet,
                  data_url, hashed, load_image, lock, read_json, recaptioned, run_script, split_sentences)

try:
    import aiohttp  # noqa: F401  half the processor time of httpx, openai's usual way to the network
    import openai
except ImportError:
    openai = None

# ---- prompts ---------------------------------------------------------------------------------------------------------

MALFORMED = (ValueError, LookupError, TypeError, AttributeError)  # what JSON of an unexpected form raises
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


def read_prompts(path):
    """PROMPTS and VERSION with what a JSON file {"version", field: [prompt, most tokens], ...} replaces and adds."""
    table = read_json(Path(path))
    try:
        version = table.pop("version", path)
        for prompt, tokens in table.values():
            if (type(prompt), type(tokens)) != (str, int):
                raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{path} is not like {{\"version\": \"mine\", \"long\": [\"Describe ...\", 400]}}") from None
    return PROMPTS | table, version


# ---- cleaning --------------------------------------------------------------------------------------------------------

# <think>...</think>, <image>, </s>, <|im_end|>
MARKERS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|</?[a-z_]\w{0,24}/?>|<\|\w{1,24}\|>|\[/?INST\]|```\w*",
                     re.S | re.I)
# a wrong encoding, base64, an address, JSON, HTML, an answer without end
NO_TEXT = re.compile(
    r"(?:\ufffd[^\ufffd]*){3}|[A-Za-z0-9+/=_-]{80}|\A\s*(?:\w+://\S+\s*\Z|\{|\[[{\"]|<!)|.{20000}", re.S)
HEADING = re.compile(r"^[ \t]*(?:#+\s.*[^.!?\n]|(?:\*\*|__)[^.!?\n]+(?:\*\*|__)|[^.!?\n]{1,80}:)[ \t]*$", re.M)
MARKUP = re.compile(r"""
    !?\[(?=[^\]\n]*\]\() | \]\([^)\s]*\)                            # of [the shop](https://...) the address
    | (?:\*\*|__)[^*_\n]{1,40}(?::\s*(?:\*\*|__)|(?:\*\*|__)\s*:)\s*  # a label: **Style:** or **Style**:
    | ^[ \t>#+|—]+ | \|                                              # marks of quotations, headings, tables
    | (?<!\w)[*_`]{1,3}(?=\S) | (?<=\S)[*_`]{1,3}(?!\w)              # emphasis and code
    """, re.M | re.X)
OPENER = re.compile(r"""
    (?:(?:sure|certainly|of\scourse|absolutely|okay)[!,.]\s)?
    (?:(?:(?:short|long|detailed|brief|image)\s)*(?:caption|description|answer|response|keywords)\s?:\s
    | here(?:'s|’s|\sis|\sare)\s[^:.]{0,80}:\s?
    | (?:in|within)\s(?:the|this)\s(?:\w+\s)?(?:image|picture|photo|photograph)\s?,\s
    | (?:the|this)\s(?:given\s|provided\s)?(?:image|picture|photo|photograph)\s(?:\w+ly\s|also\s)?
        (?:shows|depicts|features|displays|captures|presents|portrays|illustrates|showcases|contains|includes|
        consists\sof|is\sof)\s(?:that\s)?
    | (?:(?:this|it)\sis\s)?(?:an|the)\simage\s(?:of|showing|depicting|featuring)\s
    | (?:we|you|one)\scan\s(?:see|observe)\s)+""", re.I | re.X)
CHATTER = re.compile(r"""
    (?:sure|certainly|of\scourse|absolutely|okay)[!,.] | (?:please\s)?(?:let\sme\sknow|feel\sfree)\b
    | i\shope\s(?:this|that|it)\b | would\syou\slike\b | is\sthere\sanything\b
    | if\syou\s(?:need|have|would|want|'d)\b""", re.I | re.X)
REFUSAL = re.compile(r"""
    i(?:'|’)?m\s(?:\w+\s)?sorry\b | (?:i\s)?apologi[sz]e\b | as\san\s(?:ai|artificial)\b
    | \bi(?:\s(?:can(?:no|'|’)?t|do\snot|don(?:'|’)t|could\snot)|(?:\sam|'m|’m)\s(?:unable|not\sable|not\scapable))\s
        (?:\w+\s)?(?:to\s)?(?:see|view|assist|help|describe|provide|identify|determine|access|process|analy[sz]e|comply|
        fulfill?|have)\b
    | \bi\scan\sonly\sprocess\b | no\simage\s(?:was|is|has|were|attached|provided|found)\b
    | \bi\sneed\s(?:the|an)\simage\b | \An/?a\.?\Z
    | \A(?:please|could\syou|can\syou)\b.{0,40}(?:upload|provide|share|attach)\s(?:the|an|your)\simage\b
    """, re.I | re.X)


def clean(answer, prompt="", finish="stop"):
    """A model's answer -> (caption, None), or ("", why it is bad).

    Bad is what holds nothing to train on: "empty", "cut off" (the most tokens leave no whole sentence), "not text",
    "refusal", "prompt echo", "repetition".
    Removed are stock openers, small talk, markdown, repeated sentences and a last one that is cut off.
    `finish`: the API's finish_reason.
    """
    text = MARKERS.sub(" ", answer or "")
    if not text.strip():
        return "", "empty"
    letters = sum(map(str.isalpha, text))
    if 3 * letters < len(text) or NO_TEXT.search(text):
        return "", "not text"
    sentences = sentences_said(text, prompt)
    if not sentences:
        return "", "prompt echo"
    if REFUSAL.search(sentences[0]):
        return "", "refusal"
    if loops(" ".join(sentences)):
        return "", "repetition"
    kept, known = [], {""}
    for sentence in sentences:
        if not (words(sentence) in known or CHATTER.match(sentence) or REFUSAL.search(sentence)):
            known.add(words(sentence))
            kept.append(sentence)
    # A last sentence that is complete ends with a letter and a stop, unlike "It is 3."
    if finish == "length" and kept and not re.search(r"[^\W\d][\"'”’»)]*[.!?。！？][\"'”’»)]*$", kept[-1]):
        kept.pop()
    if not kept:
        return "", "cut off" if finish == "length" else "empty"
    if len(kept) > 1:  # the items of a list, joined, need full stops
        kept = [re.sub(r"(?<![.!?。！？…])[,;: ]*$", ".", sentence, count=1) for sentence in kept]
    caption = re.sub(r"(?<=[。！？]) ", "", " ".join(kept))
    return re.sub(r"\A([\"'“])((?:(?!\1).)*)[\"'”]\Z", r"\2", caption), None


def sentences_said(text, prompt):
    """The sentences of an answer, without openers and echoes of the prompt."""
    echoes = {words(sentence) for sentence in split_sentences(prompt)}
    sentences = []
    for sentence in split_sentences(without_markdown(text)):
        if words(sentence) in echoes:
            continue
        opener = OPENER.match(sentence)
        if opener:
            rest = sentence[opener.end():]
            sentence = rest[:1].upper() + rest[1:]
        sentences.append(sentence)
    return sentences


def without_markdown(text):
    """List marks stay: split_sentences takes them away."""
    body = HEADING.sub("", text)
    if re.search(r"\w", body):
        text = body
    return re.sub(r"\n\s*(?=[a-zß-ÿ])(?![a-z]\))", " ", MARKUP.sub("", text))  # joins a sentence broken into lines


def words(text):
    """The words alone, in lower case: what sentences are compared by."""
    return " ".join(re.findall(r"\w+", text.lower()))


def loops(text):
    """Whether one word comes six times in a row, or up to 24 words four times. Digits are left out, so that counting is
    no way out; each Chinese or Japanese character is a word."""
    listed = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+", text.lower())
    return re.search(r"\b(\w+)(?: \1){5}\b|\b(\w+(?: \w+){1,23}?)(?: \2){3}\b", " ".join(listed))


# ---- the pictures to send --------------------------------------------------------------------------------------------

WHOLE = (0.0, 0.0, 1.0, 1.0)  # a box: x0, y0, x1, y1 as shares of the image


def crops(grid):
    """The boxes of a grid x grid division, row by row."""
    boxes = []
    for y in range(grid):
        for x in range(grid):
            boxes.append((x / grid, y / grid, (x + 1) / grid, (y + 1) / grid))
    return boxes


def pictures(source, boxes, side, name):
    """The bytes or path of an image -> its upright (width, height), and for each box a JPEG as a data URL, its longer
    side at most `side` pixels. Raises BadSample, with `name` in its detail."""
    image = load_image(source, name=name)
    urls = {}
    for box in boxes:
        left, top, right, bottom = np.multiply(box, 2 * image.size)  # in pixels
        part = image.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
        part.thumbnail((side, side))
        urls[box] = data_url(part)
    return image.size, urls


# ---- asking ----------------------------------------------------------------------------------------------------------

TEMPERATURES = 0.2, 0.6  # of the first question, and of the second where the answer was bad
TIMEOUT = 300  # seconds for one answer
RETRIES = 8  # of the client, for a failed request: 0.5 s to 8 s apart, or what Retry-After says
PATIENCE = 600  # seconds without any answer before the run ends


class Progress:
    """The numbers of the report."""

    def __init__(self):
        self.captioned = 0  # images
        self.known = 0  # images that lacked nothing
        self.failed = BadCount()  # images that miss a caption in the end, by reason
        self.answered = time.monotonic()  # when a server last answered


class Server:
    """One endpoint: its client, and a semaphore that admits as many images as it takes requests at a time."""

    def __init__(self, url, s):
        url = url.rstrip("/")
        if "://" not in url:
            url = f"http://{url}"
        self.url = url if url.count("/") > 2 else f"{url}/v1"
        self.client = openai.AsyncOpenAI(base_url=self.url, api_key=s.key, timeout=TIMEOUT, max_retries=RETRIES,
                                         http_client=openai.DefaultAioHttpClient())
        self.free = asyncio.Semaphore(s.in_flight)

    async def check(self, s):
        """Finds the model's name, and asks once about a picture. Raises UserError."""
        client = self.client.with_options(max_retries=2)
        try:
            if not s.model:
                models = await client.models.list()
                s.model, *others = [model.id for model in models.data]
                if others:
                    raise UserError(f"{self.url} serves the models {[s.model, *others]}: name one with --model")
            red = data_url(Image.new("RGB", (224, 224), "red"))
            await complete(client, "What colour is this?", 8, red, 0.0, s)
        except (openai.OpenAIError, *MALFORMED) as error:
            raise self.trouble(error, s) from None

    def trouble(self, error, s):
        message = " ".join(str(error.__cause__ or error).split()).replace(s.key, "***")[:200]
        return UserError(f"{self.url} does not answer questions about pictures ({message}): check --endpoint, --model, "
                         "the key in OPENAI_API_KEY, and that the server has a vision-language model")


async def complete(client, prompt, tokens, picture, temperature, s):
    """The reply to one request, as the API's JSON. Raises openai.OpenAIError and MALFORMED."""
    content = [  # the picture first, so that a server that caches prefixes reads it once for all questions
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": prompt},
    ]
    body = {"model": s.model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens,
            "temperature": temperature}
    # client.chat.completions.create would take longer: it copies the body and makes objects of the reply
    return await client.post("/chat/completions", body=body, cast_to=object)


async def ask(server, name, picture, progress, s):
    """-> a caption. A bad answer is asked for once more, at a higher temperature. Raises BadSample with the reason, and
    what the server says, if there is none."""
    prompt, tokens = s.prompts[name]
    for temperature in TEMPERATURES:
        try:
            reply = await complete(server.client, prompt, tokens, picture, temperature, s)
            choice = reply["choices"][0]
            text, reason = clean(choice["message"]["content"], prompt, choice.get("finish_reason"))
            progress.answered = time.monotonic()
        except MALFORMED:
            text, reason = "", "not an answer"
        except openai.OpenAIError as error:  # the client's own retries have not helped
            if time.monotonic() - progress.answered > PATIENCE:
                raise server.trouble(error, s) from None
            reason, _, said = str(error).partition(" - ")
            raise BadSample(reason, said.replace(s.key, "***")[:200]) from None
        if text:
            return text
    raise BadSample(reason)


# ---- the files of captions -------------------------------------------------------------------------------------------

class Output:
    """x.captions.jsonl of one input file, which one process at a time may append to. Raises OSError and UserError."""

    def __init__(self, path):
        self.path = path
        self.done = set()  # hash((hash of a key, field)) of what is written, or asked for in this run
        self.file = open(path, "a+b", buffering=0)
        if not lock(self.file):
            raise UserError(f"another process writes to {path}: let it finish, or stop it")
        end = 0
        for line in open(path, "rb"):
            ended = line.endswith(b"\n")
            try:
                row = json.loads(line)
                self.claim(hashed(row["key"]), row["captions"])
                if not ended:  # somebody else's last line
                    self.file.write(b"\n")
            except MALFORMED:  # somebody else's line, or one torn by a kill or a full disk
                if not ended:
                    self.file.truncate(end)
            end += len(line)

    def claim(self, key, fields):
        """Of these fields, those that this key (a hash) lacks; from now on it counts as having them."""
        missing = [name for name in fields if hash((key, name)) not in self.done]
        self.done.update(hash((key, name)) for name in missing)
        return missing

    def append(self, row):
        # The stray surrogates of a file name that is no Unicode become escapes, which JSON has, too.
        line = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        if self.file.write(line) < len(line):
            raise OSError(0, "the disk is full", self.path)  # the next run cuts the torn line off


# ---- the run ---------------------------------------------------------------------------------------------------------

def unfinished(records, progress, s):
    """Yields (Output, i, fields) for every image that lacks captions, in the order of the files."""
    current = None
    for i, key in enumerate(tqdm(records.keys()[:s.limit or None], unit="image")):
        number, _ = records.part_of(i)
        if number != current:
            current = number
            output = Output(captions_path(records.files[number]))  # the last one closes when its images are done
        fields = output.claim(int(key), s.fields)
        if fields:
            yield output, i, fields
        else:
            progress.known += 1


async def fill(captions, fields, urls, server, progress, s):
    """Asks for all fields of one image and puts the captions into the dict -> the reason and detail of the first one
    that is missing in the end, or None."""
    failure = None
    for name in fields:
        for box in crops(s.dense) if name == "dense" else [WHOLE]:
            try:
                text = await ask(server, name, urls[box], progress, s)
            except BadSample as bad:
                failure = failure or (bad.reason, bad.detail)  # not `bad` itself, which would keep the Output open
                continue
            if name == "dense":
                parts = captions.setdefault(name, [])
                parts += [{"box": box, "text": sentence} for sentence in split_sentences(text)]
            else:
                captions[name] = text
    return failure


async def caption(output, line, fields, urls, server, progress, s):
    """Asks all about one image and writes its line, also when the run ends early. Raises BadSample if a caption is
    missing in the end."""
    captions = line["captions"]

    def write():
        if captions:
            output.append(line)
            progress.captioned += 1

    try:
        failure = await fill(captions, fields, urls, server, progress, s)
    except BaseException:  # cancelled, or no server answers
        captions.pop("dense", None)  # crops may be missing
        with suppress(OSError):  # a full disk may be what ends the run
            write()
        raise
    write()
    if failure:
        reason, detail = failure
        raise BadSample(reason, f"{line['key']} {detail}".strip())


async def recaption(records, s, progress):
    """Captions all images that lack captions."""
    servers = [Server(url, s) for url in s.endpoint.split(",")]
    todo = unfinished(records, progress, s)
    turn = threading.Lock()

    def prepare_next():
        """The Output, the line to be, the fields to ask for, {box: picture}; None at the end. Raises BadSample."""
        with turn:  # Records is no reader for several threads; decoding and encoding are what they share
            found = next(todo, None)
            if found is None:
                return None
            output, i, fields = found
            record = records[i]
        size, urls = pictures(record.image, [WHOLE, *crops(s.dense)], s.max_side, record.key)
        line = {"key": record.key, "size": size, "captions": {}, "model": s.model, "prompts": s.version}
        return output, line, fields, urls

    async def work(server):
        while True:
            try:
                prepared = await asyncio.to_thread(prepare_next)
                if prepared is None:
                    return
                async with server.free:
                    await caption(*prepared, server, progress, s)
            except BadSample as bad:
                progress.failed.add(bad)

    try:
        for server in servers:
            await server.check(s)
        # some more than may ask at a time, so that a picture is ready whenever a server is free
        await asyncio.gather(*[work(server) for server in servers * (s.in_flight + 16)])
    finally:  # after an error or Ctrl-C, asyncio.run stops the workers
        for server in servers:
            await server.client.close()


def preview(path, s):
    """Writes a page of the first pictures with their captions."""
    records = Records(s.data, s.image_root)  # anew, with the captions just written
    shown = []
    for i in range(min(len(records), s.limit or 16)):
        with suppress(BadSample):
            record = records[i]
            texts = [f"{name}: {value}" for name, value in recaptioned(record.row).items()]
            shown.append((load_image(record.image), [record.key, *texts]))
    contact_sheet(path, shown)


# ---- the command -----------------------------------------------------------------------------------------------------

def parse_flags(argv=None):
    p = Parser(description=__doc__)
    add = p.add_argument
    add("data", help="a folder, .tar, .jsonl or .csv, or a quoted pattern of these, as for train.py --data")
    add("--endpoint", metavar="URL[,URL...]", required=True, help="OpenAI-compatible servers to ask")
    add("--model", help="its name at the endpoint, if that serves several")
    add("--fields", default="short,long", help="captions to make: %(default)s; all; or of " + ", ".join(PROMPTS))
    add("--dense", type=at_least(0), default=0, metavar="GRID",
        help="caption GRID x GRID crops, too: sentences with a box")
    add("--prompts", metavar="FILE.json", help="other prompts, or prompts for more fields")
    add("--limit", type=at_least(0), default=0, help="only the first so many images")
    add("--preview", metavar="FILE.html", help="write a page of the first pictures (16, or --limit) and captions")
    add("--image-root", help="where the images of CSV and JSON lines lie")
    add("--max-side", type=at_least(1), default=768, help="longer side of the pictures sent, in pixels (%(default)s)")
    add("--in-flight", type=at_least(1), default=64, help="requests at a time at each endpoint (%(default)s)")
    s = p.parse_args(argv)
    s.key = os.environ.get("OPENAI_API_KEY") or "none"
    s.prompts, s.version = read_prompts(s.prompts) if s.prompts else (PROMPTS, VERSION)
    names = [name for name in s.prompts if name != "dense"]
    s.fields = names if s.fields == "all" else s.fields.split(",")
    unknown = set(s.fields).difference(names)
    if unknown:
        raise UserError(f"--fields: no prompt for {', '.join(unknown)}; there are {', '.join(names)}, and --dense GRID "
                        "for crops")
    if s.dense:
        s.fields.append("dense")
    if s.preview:
        check_target(s.preview)
    return s


def main(argv=None):
    s = parse_flags(argv)
    if openai is None:
        raise UserError("recaption.py asks through the openai package: pip install 'openai[aiohttp]'")
    records = Records(s.data, s.image_root)
    progress = Progress()
    progress.failed.merge(records.bad)
    gc.freeze()  # else the collector looks through torch's objects again and again: a tenth of the processor time
    code = 0
    try:
        try:
            asyncio.run(recaption(records, s, progress))
        except KeyboardInterrupt:
            code = 130
            print("\nstopped; to resume, run the same command")
        failed = progress.failed
        report = json.dumps({"model": s.model, "prompts": s.version, "captioned": progress.captioned,
                             "failed": failed.counts, "examples": failed.details}, indent=1)
        print(report)
        captions_path(records.files[0]).with_name("recaption.json").write_text(report)
        if s.preview:
            preview(s.preview, s)
        if failed and not (code or progress.captioned or progress.known):
            raise UserError(f"no image was captioned ({failed.report()}): check --image-root and the server")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or 'the captions'} ({error.strerror}): what is written stays; "
                        "to resume, run the same command") from None
    return code


if __name__ == "__main__":
    run_script(main)
