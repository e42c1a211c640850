"""Proves the GPU path on the first GPU at hand: one command, one table.

    python tests/gpu_check.py                  about 20 minutes on an H100
    python tests/gpu_check.py --quick          the heart of it, about 5 minutes
    python tests/gpu_check.py --only losses    the parts with one of these words in their names; earlier rows stay

Each part is a command of its own, with a time limit; one that fails or hangs is a row of the table, and the next begins.
--out (runs/gpu-check) gets results.md and results.json, anew after every part, and a folder for each part with all that
its command printed (output.txt) and wrote.
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
import time
from functools import partial
from pathlib import Path
from typing import Callable

import torch

ROOT = Path(__file__).resolve().parent.parent
MOST_GEMMS = 1.6  # times four bare matrix products that the fused loss may take
LEAST_GAIN = 1.15  # times the images/s of texts in buckets that packed ones must reach
FIRST, TOLERANCE = 5, 1e-3  # steps whose loss may be so far from the CPU's, relative
STEPS, SAVED, KILLED = 30, 8, 20  # of the run that is killed: all, between checkpoints, before the kill
FLOORS = {"zero-shot top-1": 95, "long T2I R@1": 90, "long I2T R@1": 90, "short T2I R@1": 65, "short I2T R@1": 65,
          "pointing by sentence": 55}
TRAININGS = (
    "--method clip", "--method dreamlip", "--method lotlip", "--method holistic", "--method sparc",
    "--compile",
    "--fused on",  # --quick ends here
    "--accumulate 2",
    "--grad-checkpointing",
    "--negatives image", "--negatives batch", "--negatives regrouped",
    "--region-grouping",
    "--grouping token --negatives image",
    "--branch-type mlp --branches 5",
    "--text-attention bidirectional --corner-tokens 2",
)
# train.py with one thing changed, for python -c. Signal 0 does nothing, signal 9 kills.
IN_BUCKETS = "import train; train.text_layout = lambda *_: 'buckets'; train.profile(train.parse_flags())"
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


def judge_gemms(text, folder):
    """By what csrc/benchmark.py prints, for both dtypes."""
    ratios = re.findall(r"^fused .*, ([\d.]+) of gemms", text, re.M)
    return " and ".join(ratios) + " times (float32, bfloat16)", len(ratios) == 2 and max(map(float, ratios)) <= MOST_GEMMS


def losses(folder):
    """The loss of every step of a run; NaN where it was not finite."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line)["loss"] for line in lines]
    return torch.tensor([math.nan if value is None else value for value in values])


def judge_losses(text, folder):
    """By the metrics of the same training on the device and on the CPU."""
    device, cpu = losses(folder / "device"), losses(folder / "cpu")
    apart = (device - cpu).abs() / cpu.abs()
    worst = apart[:FIRST].max().item()
    finite = int(apart.isfinite().sum())
    return f"{worst:.1e}, at the end {apart[-1]:.1e}; {finite} finite steps", worst < TOLERANCE and finite == STEPS


def rate_of(text):
    """train.py's profile -> images/s without the waiting for data, which no layout of texts changes; and in words."""
    rate, step = map(float, re.search(r"(\d+) images/s, ([\d.]+) ms a step", text).groups())
    waiting = float(re.search(r"waiting for data +([\d.]+) ms", text)[1])
    free = rate * step / (step - waiting)
    usage = re.search(r"[\d.]+% \(MFU\)", text)[0]
    return free, f"{rate:.0f} images/s ({free:.0f} but for the waiting for data), {usage}"


def judge_profiles(least, text, folder):
    """By the profile with packed texts and the one with buckets behind it."""
    begin = text.rindex("\n", 0, text.index("texts buckets"))
    packed, buckets = text[:begin], text[begin:]
    (fast, fast_words), (slow, slow_words) = rate_of(packed), rate_of(buckets)
    measured = f"packed {fast_words}; buckets {slow_words}; {fast / slow:.2f} times"
    return measured, "texts packed" in packed and fast >= least * slow


def judge_step(text, folder):
    """By what tests/benchmark_step.py prints; a row out of memory is no failure, as long as ours and open_clip's ran."""
    lines = re.findall(r"^open_clip.* / ours.*|^.* runs out of memory", text, re.M)
    ratios = re.findall(r"^open_clip(?:, compiled)? / ours(?:, compiled)?: ([\d.]+)", text, re.M)
    return "; ".join(lines), len(ratios) == 2 and min(map(float, ratios)) >= 1


def judge_evaluation(floors, text, folder):
    """By evaluation.json: all metrics are finite, and these are not below their floors."""
    report = json.loads(next(folder.rglob("evaluation.json")).read_text())
    values = {name: metric["value"] for name, metric in report["metrics"].items()}
    above = [values[name] >= floor for name, floor in floors.items()]
    shown = [f"{name} {values[name]:.1f}" for name in FLOORS]
    return f"{report['images']} images, " + ", ".join(shown), all(above) and all(map(math.isfinite, values.values()))


def weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")["model"]
    return torch.cat([value.double().flatten() for value in state.values()])


def judge_resume(text, folder):
    """By the weights' relative distances. What two undisturbed runs are apart is the GPU's own, from sums in no order."""
    wanted, again, resumed = [weights(folder / name) for name in ("undisturbed", "again", "killed")]
    noise = ((again - wanted).norm() / wanted.norm()).item()
    apart = ((resumed - wanted).norm() / wanted.norm()).item()
    found = re.search(r"at step (\d+) of", text)[1]
    measured = f"{apart:.1e}, undisturbed {noise:.1e}, resumed at step {found}"
    return measured, apart <= 3 * noise and int(found) == KILLED // SAVED * SAVED


# ---- the parts -------------------------------------------------------------------------------------------------------

def train_command(name, flags, size, program="train.py"):
    return (f"python {program} --size {size} --images {STEPS * 32} --batch 32 --log-every 1 --eval-images 0 "
            f'--precision fp32 {flags} --out "$OUT/{name}"')


def training(flags, device="cuda", size="tiny"):
    """A training on the device and on the CPU, side by side; --compile is for the device alone."""
    ours = train_command("device", f"--device {device} {flags}", size)
    cpu = train_command("cpu", "--device cpu " + flags.replace("--compile", ""), size)
    target = f"the first {FIRST} within {TOLERANCE} of the CPU's, {STEPS} finite"
    return Part(f"losses {flags}", target, f"{ours} & {cpu}; wait $!", 240, judge_losses, flags in TRAININGS[:7])


def profiles(flags, least):
    command = f"--size {flags} --device cuda --precision bf16 --eval-images 0"
    command = f'python train.py --profile {command} && python -c "{IN_BUCKETS}" {command}'
    target = f"packed at least {least} times buckets"
    return Part(f"profile {flags}", target, command, 400, partial(judge_profiles, least))


def resume(device="cuda", size="tiny"):
    """Two runs left alone, and one that SIGKILL ends between two checkpoints, to be taken up again."""
    flags = f"--device {device} --save-steps {SAVED}"
    commands = [
        train_command("undisturbed", flags, size),
        train_command("again", flags, size),
        train_command("killed", flags, size, f'-c "{KILLED_RUN}"'),
        f'python train.py --resume "$OUT/killed" --device {device}',
    ]
    return Part("resume", "as near as two undisturbed runs", "; ".join(commands), 240, judge_resume, True)


PYTEST = "python -m pytest -q -p no:cacheprovider -m gpu"
SANITIZE = ("PATH=$PATH:/usr/local/cuda/bin; if ! command -v compute-sanitizer; then echo not installed; else "
            f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 {PYTEST} tests/test_fused.py "
            "-k 'one_side_alone and extension'; fi")
PARTS = [
    Part("build", "a library", "python csrc/fused.py --cuda", 400, partial(judge_text, r"\w+\.so$"), True),
    Part("tests", "all pass", PYTEST, 400, partial(judge_text, r"^\d+ passed, \d+ deselected.*"), True),
    Part("sanitizer", "0 errors", SANITIZE, 300, partial(judge_text, "ERROR SUMMARY: 0 errors|not installed")),
    Part("fused loss", f"at most {MOST_GEMMS} times four bare matrix products, N = M = 32768",
         "python csrc/benchmark.py --device cuda --n 32768", 200, judge_gemms, True),
    *map(training, TRAININGS),
    profiles("small", 0),
    profiles("small --compile", 0),
    profiles("base-16 --batch 512", LEAST_GAIN),
    profiles("base-16 --batch 512 --compile", LEAST_GAIN),
    Part("step", "no slower than open_clip", "python tests/benchmark_step.py --size base-16 --device cuda --compile", 500,
         judge_step),
    Part("evaluation", "all finite", 'python evaluate.py "$OUT/../losses-method-dreamlip/device" --images 4000 '
         '--device cuda --out "$OUT"', 200, partial(judge_evaluation, {}), True),
    Part("default run", f"at least {FLOORS}", "python train.py --size small --images 1000000 --device cuda "
         '--out "$OUT/run"', 590, partial(judge_evaluation, FLOORS)),
    resume(),
]


# ---- running them ----------------------------------------------------------------------------------------------------

def run_part(part, out):
    """Runs a part, in a new folder of its own -> its row of the table."""
    folder = out / re.sub(r"\W+", "-", part.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["timeout", "-k", "10", str(part.limit), "bash", "-c", part.command]  # ends what the command started, too
    began = time.monotonic()
    with open(folder / "output.txt", "w") as output:
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path, "OUT": str(folder)}, stdout=output,
                              stderr=output).returncode
    text = (folder / "output.txt").read_text(errors="replace")
    measured, passed = f"exit code {code}", False
    if code in (124, 137):
        measured = f"not done in {part.limit} s"
    if code == 0:
        try:
            measured, passed = part.judge(text, folder)
        except Exception as error:  # the output or a file is not what the judge knows
            measured = repr(error)
    if not passed:
        measured += "; last line: " + re.split(r"[\r\n]+", text.strip())[-1]
    return dict(part=part.name, target=part.target, measured=measured, result="pass" if passed else "FAIL",
                command=part.command, seconds=round(time.monotonic() - began))


def write_table(rows, out):
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    columns = ("part", "target", "measured", "result", "command")
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append([re.sub(r"\s+", " ", row[name]).replace("|", "\\|") for name in columns])
    table = [f"| {' | '.join(cells)} |\n" for cells in lines]
    (out / "results.md").write_text("".join(table))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-check")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: run this on a machine with one")
    out = options.out.resolve()
    chosen = []
    for part in PARTS:
        if (part.quick or not options.quick) and any(word in part.name for word in options.only):
            chosen.append(part)
    rows = {}
    if options.only != [""] and (out / "results.json").exists():
        rows = {row["part"]: row for row in json.loads((out / "results.json").read_text())}
    os.environ["TORCH_EXTENSIONS_DIR"] = str(out / "extensions")
    if "build" in options.only or "" in options.only:
        shutil.rmtree(out / "extensions", ignore_errors=True)  # so it is built, not found
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {len(chosen)} parts, of which all take about 20 "
          f"minutes on an H100, and those of --quick 5: {'; '.join(part.name for part in chosen)}")
    for part in chosen:
        row = rows[part.name] = run_part(part, out)
        print(f"{row['result']} {part.name}, {row['seconds']} s: {row['measured']}", flush=True)
        write_table(list(rows.values()), out)
    print(f"the table is {out / 'results.md'}")
    sys.exit(any(row["result"] == "FAIL" for row in rows.values()))


if __name__ == "__main__":
    main()
