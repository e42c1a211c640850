"""Proves the GPU path on the first GPU at hand: one command, one table.

    python tests/gpu_check.py                  about 20 minutes on an H100
    python tests/gpu_check.py --quick          the heart of it, about 5 minutes
    python tests/gpu_check.py --only losses    the parts with one of these words in their names

Each part is a command with a time limit; one that fails or hangs is a row, too, and the next begins. --out
(runs/gpu-check) gets results.md and results.jsonl, to which every part adds its row, and what each command printed and
wrote.
"""
import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
FIRST, TOLERANCE = 5, 1e-3  # steps whose loss may be so far from the CPU's, relative
STEPS, SAVED, KILLED = 30, 8, 20  # of the run that is killed: all, between checkpoints, before the kill
FLOORS = {"zero-shot top-1": 95, "long T2I R@1": 90, "long I2T R@1": 90, "short T2I R@1": 65, "short I2T R@1": 65,
          "pointing by sentence": 55}
TRAININGS = (
    "--method clip", "--method dreamlip", "--method lotlip", "--method holistic", "--method sparc",
    "--compile", "--fused on",  # --quick ends here
    "--accumulate 2", "--grad-checkpointing",
    "--negatives image", "--negatives batch", "--negatives regrouped",
    "--region-grouping", "--grouping token --negatives image", "--branch-type mlp --branches 5",
    "--text-attention bidirectional --corner-tokens 2",
)
# train.py with one thing changed, for python -c. Signal 0 does nothing, signal 9 kills.
LONGER_ROWS = "import model, train; model.ROW = 128; train.profile(train.parse_flags())"
KILLED_RUN = ("import os, train; update = train.update; train.update = lambda state, *rest: os.kill(os.getpid(), "
              f"9 * (state.step == {KILLED})) or update(state, *rest); train.train(train.parse_flags())")


@dataclasses.dataclass
class Part:
    name: str
    target: str
    command: str  # for bash, in the repository's root; OUT is the part's folder
    limit: int  # seconds
    judge: Callable  # what the command printed, the part's folder -> what was measured, whether the target is met
    quick: bool = False  # --quick runs it, too


# ---- judges ----------------------------------------------------------------------------------------------------------

def judge_text(pattern, text, folder):
    """Whether the pattern is in the text."""
    found = re.search(pattern, text, re.M)
    return found.group() if found else "not to be seen in the output", bool(found)


def judge_ratios(pattern, least, most, text, folder):
    """Whether the pattern finds two numbers in the text, and both lie in these bounds."""
    ratios = re.findall(pattern, text, re.M)
    return " and ".join(ratios), len(ratios) == 2 and all(least <= float(ratio) <= most for ratio in ratios)


def losses(folder):
    """The loss of every step of a run; NaN where it was not finite."""
    with open(folder / "metrics.jsonl") as lines:
        return np.array([json.loads(line)["loss"] for line in lines], dtype=float)


def judge_losses(text, folder):
    """By the metrics of the same training on the device and on the CPU."""
    device, cpu = losses(folder / "device"), losses(folder / "cpu")
    apart = np.abs(device / cpu - 1)
    worst = apart[:FIRST].max()
    finite = np.isfinite(apart).sum()
    return f"{worst:.1e}, at the end {apart[-1]:.1e}; {finite} finite", bool(worst < TOLERANCE and finite == STEPS)


def judge_profiles(text, folder):
    """By the profile as it is and the one with rows of texts of 128 places behind it. What a step takes on the device is
    compared: rows of texts do not change the waiting for data."""
    found = re.findall(r"^    (?:forward and backward|optimizer) +([\d.]+) ms$", text, re.M)
    milliseconds = np.array(found, dtype=float)
    times = milliseconds[2:].sum() / milliseconds[:2].sum()
    words = re.findall(r"\d+ images/s|[\d.]+% \(MFU\)", text)
    return f"{', '.join(words)}; {times:.2f} times without the waiting for data", bool(times >= 0.97)


def judge_evaluation(floors, text, folder):
    """By evaluation.json: all metrics are finite, and these are not below their floors."""
    report = json.loads(next(folder.rglob("evaluation.json")).read_text())
    measured = f"{report['images']} images"
    passed = all(math.isfinite(metric["value"]) for metric in report["metrics"].values())
    for name in FLOORS:
        value = report["metrics"][name]["value"]
        measured += f", {name} {value:.1f}"
        passed = passed and value >= floors.get(name, 0)
    return measured, passed


def weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")["model"]
    return torch.cat([value.double().flatten() for value in state.values()])


def judge_resume(text, folder):
    """By relative distances of weights. What two undisturbed runs are apart, is from sums in an order left open."""
    wanted = weights(folder / "undisturbed")
    noise = (weights(folder / "again") - wanted).norm() / wanted.norm()
    apart = (weights(folder / "killed") - wanted).norm() / wanted.norm()
    found = re.search(r"at step (\d+) of", text)[1]
    measured = f"{apart:.1e}, undisturbed {noise:.1e}, resumed at step {found}"
    return measured, bool(apart <= 3 * noise) and int(found) == KILLED // SAVED * SAVED


# ---- the parts -------------------------------------------------------------------------------------------------------

def train_command(name, flags, size, program="train.py"):
    return (f"python {program} --size {size} --images {STEPS * 32} --batch 32 --log-every 1 --eval-images 0 "
            f'--precision fp32 {flags} --out "$OUT/{name}"')


def training(flags, device="cuda", size="tiny"):
    """A training on the device and on the CPU, side by side; --compile is for the device alone."""
    command = train_command("device", f"--device {device} {flags}", size) + " & "
    command += train_command("cpu", "--device cpu " + flags.replace("--compile", ""), size) + "; wait $!"
    target = f"the first {FIRST} within {TOLERANCE} of the CPU's"
    return Part(f"losses {flags}", target, command, 240, judge_losses, flags in TRAININGS[:7])


def profiles(name):
    flags = f"--size {name} --device cuda --precision bf16 --eval-images 0"
    command = f'python train.py --profile {flags} && python -c "{LONGER_ROWS}" {flags}'
    return Part(f"profile {name}", "rows of 128 places take at least 0.97 of the time", command, 400, judge_profiles)


def resume(device="cuda", size="tiny"):
    """Two runs left alone, and one that SIGKILL ends between two checkpoints, to be taken up again."""
    flags = f"--device {device} --save-steps {SAVED}"
    commands = [
        train_command("undisturbed", flags, size), train_command("again", flags, size),
        train_command("killed", flags, size, f'-c "{KILLED_RUN}"'),
        f'python train.py --resume "$OUT/killed" --device {device}',
    ]
    return Part("resume", "as near as two undisturbed runs", "; ".join(commands), 240, judge_resume, True)


PYTEST = "python -m pytest -q -p no:cacheprovider -m gpu"
SANITIZE = ("PATH=$PATH:/usr/local/cuda/bin; if ! command -v compute-sanitizer; then echo not installed; else "
            f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 {PYTEST} tests/test_fused.py "
            "-k 'one_side_alone and extension'; fi")
PARTS = [
    Part("build", "a library", 'rm -rf "$TORCH_EXTENSIONS_DIR"; python csrc/fused.py --cuda', 400,
         partial(judge_text, r"\w+\.so$"), True),
    Part("tests", "all pass", PYTEST, 400, partial(judge_text, r"^\d+ passed, \d+ deselected.*"), True),
    Part("sanitizer", "0 errors", SANITIZE, 300, partial(judge_text, "ERROR SUMMARY: 0 errors|not installed")),
    Part("fused loss", "at most 1.6 times four bare matrix products, float32 and bfloat16",
         "python tests/benchmark_fused.py --device cuda --n 32768", 200,
         partial(judge_ratios, r"^fused .*, ([\d.]+) of gemms", 0, 1.6), True),
    *map(training, TRAININGS),
    profiles("small"),
    profiles("small --compile"),
    profiles("base-16 --batch 512 --no-compile"),
    profiles("base-16 --batch 512 --compile"),
    Part("step", "open_clip / ours >= 1", "python tests/benchmark_step.py --size base-16 --device cuda --compile", 500,
         partial(judge_ratios, r"^open_clip(?:, compiled)? / ours(?:, compiled)?: ([\d.]+)", 1, math.inf)),
    Part("evaluation", "all finite", 'python evaluate.py "$OUT/../losses-method-dreamlip/device" --images 4000 '
         '--device cuda --out "$OUT"', 200, partial(judge_evaluation, {}), True),
    Part("default run", f"at least {FLOORS}", "python train.py --size small --images 1000000 --device cuda "
         '--out "$OUT/run"', 590, partial(judge_evaluation, FLOORS)),
    resume(),
]


def run_part(part, out):
    """Runs a part, in a new folder of its own -> what was measured, whether the target is met."""
    folder = out / "parts" / re.sub(r"\W+", "-", part.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | dict(PATH=path, OUT=str(folder), TORCH_EXTENSIONS_DIR=f"{out}/extensions")
    command = ["timeout", "-k", "10", str(part.limit), "bash", "-c", part.command]
    with open(folder / "output.txt", "w") as output:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode
    text = (folder / "output.txt").read_text(errors="replace")
    passed = False
    measured = f"exit code {code} (124 and 137: not done in {part.limit} s)"
    if code == 0:
        try:
            measured, passed = part.judge(text, folder)
        except Exception as error:  # the output or a file is not what the judge knows
            measured = f"{type(error).__name__}, {error}"
    if not passed:
        measured += "; last line: " + re.split(r"[\r\n]+", text.strip())[-1]
    return measured, passed


def add_row(out, **row):
    """Adds a row to both files of results; the table of markdown begins with its head."""
    with open(out / "results.jsonl", "a") as lines:
        lines.write(json.dumps(row) + "\n")
    with open(out / "results.md", "a") as table:
        if table.tell() == 0:
            table.write(f"| {' | '.join(row)} |\n{'|---' * len(row)}|\n")
        for cell in row.values():
            words = " ".join(cell.split()).replace("|", "\\|")
            table.write(f"| {words} ")
        table.write("|\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-check")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: run this on a machine with one")
    out = options.out.resolve()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, into {out}")
    failed = False
    for part in PARTS:
        named = any(word in part.name for word in options.only)
        if not named or options.quick and not part.quick:
            continue
        measured, passed = run_part(part, out)
        result = "pass" if passed else "FAIL"
        failed |= not passed
        print(f"{result} {part.name}: {measured}", flush=True)
        add_row(out, part=part.name, target=part.target, result=result, measured=measured, command=part.command)
    sys.exit(failed)


if __name__ == "__main__":
    main()
