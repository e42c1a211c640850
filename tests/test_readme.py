"""The README tells the truth: its commands parse, what it names exists, and its worked example works."""
import argparse
import ast
import functools
import itertools
import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.run
import torch.nn.functional as F

import train
from model import check, config_from

ROOT = Path(__file__).resolve().parent.parent
README = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(), flags=re.S)
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.M | re.S)
PROSE = BLOCK.sub("", README)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def blocks(language, text=README):
    return [content for found, content in BLOCK.findall(text) if found == language]


def sections():
    """The text under each heading, code blocks whole (a # in them is a comment)."""
    kept = BLOCK.sub(lambda block: block[0].replace("\n#", "\n #"), README)
    return re.split(r"^#+ ", kept, flags=re.M)[1:]


def commands(text=README):
    """Every command of the bash blocks, as words."""
    for block in blocks("bash", text):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words


def split(words):
    """Words of a command -> torchrun's options, script (None: somebody else's program), the script's arguments."""
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None or words[0] not in ("python", "torchrun"):
        return [], None, words
    return words[1:at], words[at], words[at + 1:]


@functools.cache
def parser_of(script) -> argparse.ArgumentParser:
    """The parser that a script builds when it is run."""
    class Built(Exception):
        pass

    def stop(self, *_):
        raise Built(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), mock.patch.object(sys, "argv", [script]):
        with pytest.raises(Built) as built:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return built.value.args[0]


def options(script):
    return set(parser_of(script)._option_string_actions)


def scripts(text):
    """The scripts named in a text, of those that take arguments."""
    return {word for word in re.findall(r"[\w/]+\.py", text)
            if (ROOT / word).is_file() and re.search(r"Parser\(description", (ROOT / word).read_text())}


def torchruns():
    return torch.distributed.run.get_args_parser()


def resolve(arguments, world):
    """A training command up to where the data are opened: settings that go together, of a model that can be built."""
    settings = train.resolve(vars(parser_of("train.py").parse_args(arguments)), world)
    check(config_from(settings))
    return settings


OURS = [words for words in commands() if split(words)[1]]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_command_is_one_that_its_script_takes(words):
    launch, script, arguments = split(words)
    world = 1
    if words[0] == "torchrun":
        launched = torchruns().parse_args([*launch, script])
        world = int(launched.nproc_per_node) * int(launched.nnodes.split(":")[0])
    parser_of(script).parse_args(arguments)  # raises UserError or SystemExit
    if script == "train.py":
        resolve(arguments, world)


def table(head):
    """The rows of the table that begins with these column names."""
    start = README.index(head)
    lines = itertools.takewhile(lambda line: line.startswith("|"), README[start:].splitlines())
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


DATA, METHODS = table("| data | flags |"), table("| method | flags |")


@pytest.mark.parametrize("data, method", list(itertools.product(DATA, METHODS)), ids=lambda row: row[0])
def test_every_recipe_is_a_run_that_can_start(data, method):
    settings = resolve(shlex.split(f"{method[1]} {data[1]}".replace("`", "")), world=8)
    warm = settings.warmup * settings.images / settings.batch
    assert warm == pytest.approx(2000, rel=0.03)  # DreamLIP's 2,000 steps


def test_every_method_has_a_recipe():
    assert {resolve(shlex.split(row[1].strip("`")), 1).method for row in METHODS} == set(train.METHODS)


def test_every_flag_named_is_one_of_the_script_it_is_shown_with():
    wrong, seen = [], 0
    for section in sections():
        known = set().union(*map(options, scripts(section) | {"train.py"}))
        known |= {flag for words in commands(section) if not split(words)[1] for flag in words}  # other programs'
        if "torchrun" in section:
            known |= set(torchruns()._option_string_actions)
        for diff in blocks("diff", section):  # the flags of settings that it adds
            known |= {"--" + name.replace("_", "-") for name in re.findall(r"^\+    (\w+): .+ = ", diff, re.M)}
        for span in re.findall(r"`([^`\n]+)`", BLOCK.sub("", section)):
            for script in scripts(span):
                wrong += [flag for flag in FLAG.findall(span[span.index(script):]) if flag not in options(script)]
            wrong += [flag for flag in FLAG.findall(span) if flag not in known]
            seen += len(FLAG.findall(span))
    assert seen > 100 and not wrong


def names(tree):
    """What a module or class defines: functions, classes, variables, fields -> their nodes."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = node
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                found[target.id] = node
    return found


@functools.cache
def tree(file):
    return ast.parse((ROOT / file).read_text())


def test_every_function_named_is_there():
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", PROSE)
    assert len(named) > 40
    for file, dotted in named:
        node = tree(file)
        for name in dotted.split("."):
            assert name in names(node), f"{file}:{dotted}"
            node = names(node)[name]


def test_every_file_named_is_there():
    files = re.findall(r"(?<![\w/.-])((?:csrc|tests|assets)/[\w.]+\.\w+|\w+\.py)\b", README)
    assert len(set(files)) > 15 and [file for file in files if not (ROOT / file).is_file()] == []


def test_every_link_leads_somewhere():
    headings = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.+)$", PROSE, re.M)}
    targets = re.findall(r"\]\(([^)]+)\)", PROSE)
    assert len(targets) > 20
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file()


def test_the_diagrams_shown_are_those_that_are_drawn(tmp_path):
    subprocess.run([sys.executable, "assets/diagrams.py", str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert drawn.keys() == set(re.findall(r"assets/(method-[\w-]+\.png)", README))
    assert max(drawn.values()) < 150_000


# ---- a sixth method in 20 lines ---------------------------------------------------------------------------------------

SIGLIP = dict(B=4, T=3, D=8, scale=10.0, bias=-10.0)
LOSS = """
import torch, train
drawn = torch.load("drawn.pt")
for method in ("siglip", "dreamlip"):
    s = train.resolve(dict(method=method, size="nano", device="cpu", sigmoid=True, sub_captions=2, grouping="none"))
    print(train.method_loss(drawn, s)[0].item())
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the README's diff applied."""
    folder = tmp_path_factory.mktemp("siglip") / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", ".venv*", "__pycache__", "build"))
    diff, = blocks("diff")
    added = [line for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len([line for line in added if line != "+"]) <= 20
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=folder, check=True)
    return folder


def python(folder, *arguments):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=240,
                          check=True).stdout


def test_the_sixth_method_is_siglips_formula(copy):
    B, T, D, s, b = SIGLIP.values()
    torch.manual_seed(0)
    v, t = (F.normalize(torch.randn(B, n, D, dtype=torch.float64), dim=-1) for n in (1, T))
    torch.save(dict(branches=v, summaries=t[:, :, None], logit_scale=torch.tensor(s), logit_bias=torch.tensor(b)),
               copy / "drawn.pt")

    def pair(i, j, k):
        z = 1 if i == j else -1
        return math.log1p(math.exp(-z * (s * (v[i, 0] @ t[j, k]).item() + b)))  # -log sigmoid

    expected = sum(pair(i, j, k) for i in range(B) for j in range(B) for k in range(T)) / (B * T)
    for loss in python(copy, "-c", LOSS).split():
        assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_the_sixth_method_trains_in_parts_as_in_one(copy):
    lines = []
    for accumulate in ("1", "2"):
        python(copy, *"train.py --method siglip --size nano --batch 16 --images 576 --precision fp32 --workers 0 "
               "--device cpu --eval-images 0 --log-every 1 --out".split(), accumulate, "--accumulate", accumulate)
        lines.append([json.loads(line) for line in (copy / accumulate / "metrics.jsonl").read_text().splitlines()])
    losses = [line["loss"] for line in lines[0]]
    assert len(losses) == 36 and losses[-1] < losses[0] / 2
    assert lines[0][0]["logit_scale"] == pytest.approx(10, rel=0.01)
    assert [line["loss"] for line in lines[1]][:5] == pytest.approx(losses[:5], rel=1e-4)
