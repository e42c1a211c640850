"""README.md and RESULTS.md tell the truth: their commands parse, and what they name exists."""
import argparse
import functools
import importlib
import operator
import re
import runpy
import shlex
from unittest import mock

import pytest
import torch
import torch.distributed.run
from conftest import ROOT

import train
from model import CLIP

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "RESULTS.md").read_text()
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.M | re.S)
SPANS = re.findall(r"`([^`\n]+)`", BLOCK.sub("", README + RESULTS))
LAUNCH = torch.distributed.run.get_args_parser()
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


BASH = "".join(block for language, block in BLOCK.findall(README + RESULTS) if language == "bash")
LINES = BASH.replace("\\\n", " ").replace("&&", "\n")
# Of the commands that run a script of ours: what launches it, the script, its arguments.
COMMANDS = re.findall(r"^ *(?:[A-Z_]+=\S+ )*(python|torchrun .*?) (\S+\.py)(.*)$", LINES, re.M)


@functools.cache
def parser_of(script):
    """The parser that a script has built when it comes to parse its arguments, where it is stopped."""
    stopped = mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=SystemExit)
    with stopped as parse_args, pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return parse_args.call_args.args[0]


def can_start(arguments, world=1):
    """The settings of a training command, of which a model can be built."""
    flags = vars(parser_of("train.py").parse_args(arguments))
    s = train.resolve(flags, world)
    s.vocab = 49408
    with torch.device("meta"):
        CLIP(s)
    return s


@pytest.mark.parametrize("launcher,script,arguments", COMMANDS, ids=map(" ".join, COMMANDS))
def test_every_command_is_one_that_its_script_takes(launcher, script, arguments):
    words = shlex.split(arguments, comments=True)
    world = 1
    if launcher != "python":
        launch = LAUNCH.parse_args([*launcher.split()[1:], script])
        world = int(launch.nproc_per_node) * int(launch.nnodes.split(":")[0])
    if script == "train.py":
        can_start(words, world)
    else:
        parser_of(script).parse_args(words)


def test_every_recipe_is_a_run_that_can_start_with_its_papers_warm_up():
    table = README.split("| method | flags |")[1].split("\n\n")[0]
    methods = set()
    for flags in re.findall(r"`([^`]+)`", table):
        s = can_start(shlex.split(f"--size base-16 --data cc3m.tar {flags}"), world=8)
        steps = 2500 if s.method == "sparc" else 2000
        assert s.warmup * s.images / s.batch == pytest.approx(steps, rel=0.03), flags
        if s.method != "sparc" and "cc12m" not in flags:  # those two are for other data than CC3M
            assert s.images <= train.EPOCHS * 2.9e6
        methods.add(s.method)
    assert methods == set(train.METHODS)


def options(script):
    return set(parser_of(script)._option_string_actions)


def test_every_flag_named_is_one_of_its_script():
    known = {*LAUNCH._option_string_actions, *FLAG.findall(LINES)}  # other programs' flags, too
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/benchmark*.py")):
        if "add_argument" in path.read_text():
            known |= options(path)
    flags = FLAG.findall(" ".join(SPANS))
    assert len(flags) > 50
    assert set(flags) <= known
    for script, rest in re.findall(r"^(?:python )?(\w+\.py) (.+)$", "\n".join(SPANS), re.M):
        assert options(script).issuperset(FLAG.findall(rest)), script + rest


def test_every_file_named_is_there_and_defines_the_name_behind_its_colon():
    named = re.findall(r"(?<![\w/.-])((?:csrc|tests|assets)/[\w.]+\.\w+|\w+\.py)\b(?::([\w.]+))?", README + RESULTS)
    assert len(named) > 50
    for file, name in named:
        assert (ROOT / file).is_file(), file
        if name:
            module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            operator.attrgetter(name)(module)  # raises AttributeError


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md"])
def test_every_link_leads_somewhere(page):
    text = BLOCK.sub("", (ROOT / page).read_text())
    targets = re.findall(r"\]\((?!https://)([^)]+)\)", text)
    assert targets
    for target in targets:
        file, _, anchor = target.partition("#")
        linked = ROOT / (file or page)
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_readme_is_short():
    assert len(README.encode()) <= 25_600
    assert README.count("\n") <= 450
