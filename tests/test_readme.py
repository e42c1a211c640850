"""README.md and RESULTS.md tell the truth: their commands parse, and what they name exists."""
import argparse
import functools
import importlib
import operator
import re
import runpy
import shlex
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.run

import train
from model import CLIP, config_from

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "RESULTS.md").read_text()
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.M | re.S)
SPANS = re.findall(r"`([^`\n]+)`", BLOCK.sub("", README + RESULTS))
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def commands():
    """Every command of the bash blocks, as words."""
    found = []
    for language, block in BLOCK.findall(README + RESULTS):
        if language != "bash":
            continue
        lines = block.replace("\\\n", " ").replace("&&", "\n")
        for line in lines.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


def script_at(words):
    """The place of one of our scripts in a command; None: somebody else's program."""
    for i, word in enumerate(words):
        if words[0] in ("python", "torchrun") and word.endswith(".py"):
            return i
    return None


class Built(Exception):
    """Carries the parser that a script builds when it is run."""


@functools.cache
def parser_of(script):
    def stop(parser, *_):
        raise Built(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(Built) as built:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return built.value.args[0]


def can_start(arguments, world=1):
    """The settings of a training command, of which a model can be built."""
    flags = vars(parser_of("train.py").parse_args(arguments))
    s = train.resolve(flags, world)
    s.vocab = 49408
    with torch.device("meta"):
        CLIP(config_from(s))
    return s


OURS = [words for words in commands() if script_at(words) is not None]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_command_is_one_that_its_script_takes(words):
    at = script_at(words)
    world = 1
    if words[0] == "torchrun":
        launch = torch.distributed.run.get_args_parser().parse_args(words[1:at + 1])
        world = int(launch.nproc_per_node) * int(launch.nnodes.split(":")[0])
    if words[at] == "train.py":
        can_start(words[at + 1:], world)
    else:
        parser_of(words[at]).parse_args(words[at + 1:])


def recipes(head):
    """The flags in the last column of the table with this head."""
    table = README.split(head)[1].split("\n\n")[0]
    return re.findall(r"`([^`]+)`", table)


METHODS = recipes("| method | flags |")


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_is_a_run_that_can_start_with_its_papers_warm_up(method):
    s = can_start(shlex.split(f"--size base-16 --data cc3m.tar {method}"), world=8)
    steps = 2500 if s.method == "sparc" else 2000
    assert s.warmup * s.images / s.batch == pytest.approx(steps, rel=0.03)


def test_every_method_has_a_recipe():
    assert {can_start(words.split()).method for words in METHODS} == set(train.METHODS)


def test_every_flag_named_is_one_of_its_script():
    options = {}
    for pattern in ("*.py", "csrc/*.py", "tests/benchmark*.py"):
        for path in ROOT.glob(pattern):
            if "add_argument" in path.read_text():
                script = str(path.relative_to(ROOT))
                options[script] = set(parser_of(script)._option_string_actions)
    launcher = torch.distributed.run.get_args_parser()
    known = set(launcher._option_string_actions).union(*options.values(), *commands())  # other programs' flags, too
    seen = 0
    for span in SPANS:
        script = span.removeprefix("python ").split()[0]
        flags = FLAG.findall(span)
        assert set(flags) <= options.get(script, known), span
        seen += len(flags)
    assert seen > 50


def test_every_name_of_a_file_is_there():
    named = [re.fullmatch(r"([\w/]+)\.py:([\w.]+)", span) for span in SPANS]
    named = [match.groups() for match in named if match]
    assert len(named) > 20
    for file, name in named:
        module = importlib.import_module(file.replace("/", "."))
        operator.attrgetter(name)(module)  # raises AttributeError


def test_every_file_named_is_there():
    files = set(re.findall(r"(?<![\w/.-])(?:(?:csrc|tests|assets)/[\w.]+\.\w+|\w+\.py)\b", README + RESULTS))
    assert len(files) > 12
    for file in files:
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md"])
def test_every_link_leads_somewhere(page):
    text = BLOCK.sub("", (ROOT / page).read_text())
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = ROOT / (file or page)
        assert linked.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", linked.read_text()), re.M)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, target


def test_the_readme_is_short():
    assert len(README.encode()) <= 25_600
    assert README.count("\n") <= 450
