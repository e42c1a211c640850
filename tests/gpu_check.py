"""Proves the GPU path on the first GPU at hand: one command, one table.

    python tests/gpu_check.py                     about 20 minutes on an H100
    python tests/gpu_check.py --quick             the heart of it, about 5 minutes
    python tests/gpu_check.py --only losses       the parts with this word in their names; earlier rows stay

Each part is a command of its own, with a time limit; what fails or hangs is a row of the table, and the next part begins.
--out (runs/gpu-check) gets the table, results.md and results.json after every part, and a folder for each part with all
that its command printed, output.txt.
"""
import argparse
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable

import torch

ROOT = Path(__file__).resolve().parent.parent
MINUTES = {False: 20, True: 5}  # expected on an H100, without and with --quick
MOST_GEMMS = 1.6  # times four bare matrix products that the fused loss may take
LEAST_GAIN = 1.15  # times the images/s of buckets that packed texts must reach
FIRST_STEPS, TOLERANCE = 5, 1e-3  # of a GPU's losses beside the CPU's, relative
STEPS, SAVED, KILLED = 30, 8, 20  # of the run that is killed: all, between checkpoints, before the kill
FLOORS = {
    "zero-shot top-1": 95,
    "long T2I R@1": 90,
    "long I2T R@1": 90,
    "short T2I R@1": 65,
    "short I2T R@1": 65,
    "pointing by sentence": 55,
}
TRAININGS = {
    "clip": "--method clip",
    "dreamlip": "--method dreamlip",
    "lotlip": "--method lotlip",
    "holistic": "--method holistic",
    "sparc": "--method sparc",
    "compile": "--compile",
    "fused": "--fused on",
    "accumulate": "--accumulate 2",
    "checkpointing": "--grad-checkpointing",
    "image negatives": "--negatives image",
    "batch negatives": "--negatives batch",
    "regrouped negatives": "--negatives regrouped",
    "region grouping": "--region-grouping",
    "token grouping": "--grouping token --negatives image",
    "mlp branches": "--branch-type mlp --branches 5",
    "bidirectional": "--text-attention bidirectional --corner-tokens 2",
}
QUICK_TRAININGS = ("clip", "dreamlip", "lotlip", "holistic", "sparc", "compile", "fused")
# python -c programs: train.py with one thing changed
IN_BUCKETS = "import train; train.text_layout = lambda *_: 'buckets'; train.profile(train.parse_flags())"
KILLED_RUN = f"""import os, signal, train
update = train.update
def killed(state, *rest):
    if state.step == {KILLED}:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(state, *rest)
train.update = killed
train.train(train.parse_flags())"""


@dataclasses.dataclass
class Part:
    name: str
    target: str
    command: str  # for the shell, in the repository's root
    limit: int  # seconds
    judge: Callable  # text printed, the part's folder -> what was measured, passed (None: there is nothing to judge)
    quick: bool = False  # whether --quick runs it, too


# ---- judges: what a command printed and wrote -> (measured, passed) --------------------------------------------------

def judge_build(text, folder):
    library = text.split()[-1]
    return Path(library).name, library.endswith(".so")


def judge_tests(text, folder):
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text.splitlines()[-1])}
    return ", ".join(f"{n} {word}" for word, n in counts.items()), set(counts) == {"passed"}


def judge_sanitizer(text, folder):
    if "not installed" in text:
        return "not installed", None
    errors = re.search(r"ERROR SUMMARY: (\d+) error", text)[1]
    return f"{errors} errors", errors == "0" and " passed" in text


def judge_gemms(text, folder):
    ratios = re.findall(r"N = M = 32768.*?torch\.(\w+)\nfused .*?([\d.]+) of gemms", text)
    measured = ", ".join(f"{dtype} {ratio}" for dtype, ratio in ratios)
    return measured, len(ratios) == 2 and all(float(ratio) <= MOST_GEMMS for _, ratio in ratios)


def losses(folder):
    """The loss of every step of a run; NaN where it was not finite."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [math.nan if json.loads(line)["loss"] is None else json.loads(line)["loss"] for line in lines]


def judge_losses(text, folder):
    device, cpu = losses(folder / "device"), losses(folder / "cpu")
    apart = [abs(a - b) / abs(b) for a, b in zip(device, cpu)]
    finite = all(map(math.isfinite, device + cpu)) and len(device) == len(cpu) >= FIRST_STEPS
    worst = max(apart[:FIRST_STEPS])
    measured = f"{worst:.1e} apart, at the end {apart[-1]:.1e}; {len(device)} steps, {'' if finite else 'not '}all finite"
    return measured, finite and worst < TOLERANCE


def rate_of(text):
    """From what train.py --profile prints: images/s, images/s without the waiting for data, MFU in percent."""
    rate, step = map(float, re.search(r"(\d+) images/s, ([\d.]+) ms a step", text).groups())
    waiting = float(re.search(r"waiting for data +([\d.]+) ms", text)[1])
    return rate, rate * step / (step - waiting), float(re.search(r"([\d.]+)% \(MFU\)", text)[1])


def judge_profile(gains, text, folder):
    """Packed texts beside buckets; where it is to gain, without the waiting for data, which both share."""
    packed, buckets = re.split(r"\n(?=\S+ \S+, batch .*texts buckets)", text)
    found = [rate_of(packed), rate_of(buckets)]
    cells = [f"{name} {rate:.0f} images/s ({free:.0f} but for the data), MFU {mfu:.1f}%"
             for name, (rate, free, mfu) in zip(("packed", "buckets"), found)]
    gain = found[0][1] / found[1][1]
    return f"{', '.join(cells)}: {gain:.2f} times", "texts packed" in packed and (gain >= LEAST_GAIN or not gains)


def judge_step(text, folder):
    ratios = re.findall(r"^(open_clip.*? / ours.*): ([\d.]+)$", text, re.M)
    starved = re.findall(r"^(.*\S) +runs out of memory", text, re.M)
    cells = [f"{name} {ratio}" for name, ratio in ratios] + [f"{name} out of memory" for name in starved]
    ours = [float(ratio) for name, ratio in ratios if "grouping" not in name]
    return ", ".join(cells), len(ours) == 2 and min(ours) >= 1


def metrics_of(path):
    return {name: m["value"] for name, m in json.loads(path.read_text())["metrics"].items()}


def judge_evaluation(text, folder):
    file = next(folder.glob("*/evaluation.json"))
    images = json.loads(file.read_text())["images"]
    values = metrics_of(file)
    finite = all(map(math.isfinite, values.values()))
    return f"{images} images, zero-shot {values['zero-shot top-1']:.1f}", images == 4000 and finite


def judge_floors(text, folder):
    values = metrics_of(folder / "run/evaluation.json")
    measured = ", ".join(f"{name} {values[name]:.1f}" for name in FLOORS)
    return measured, all(values[name] >= floor for name, floor in FLOORS.items())


def judge_resume(text, folder):
    """Distances of weights, relative: two undisturbed runs show what the GPU itself leaves open."""
    weights = []
    for name in ("undisturbed", "again", "killed"):
        state = torch.load(folder / name / "checkpoint.pt", weights_only=True, map_location="cpu")
        weights.append(torch.cat([w.double().flatten() for w in state["model"].values()]))
    first, again, resumed = weights
    noise, apart = ((first - other).norm() / first.norm() for other in (again, resumed))
    resumes = text.count(f"at step {KILLED // SAVED * SAVED} of {STEPS}")
    return f"{apart:.1e} apart, two undisturbed {noise:.1e}; {resumes} resumed", resumes == 1 and bool(apart <= 3 * noise)


# ---- the parts -------------------------------------------------------------------------------------------------------

def train_command(out, flags, size="tiny", program="train.py"):
    return (f"python {program} --size {size} --images {STEPS * 32} --batch 32 --log-every 1 --eval-images 0 "
            f"--precision fp32 {flags} --out {shlex.quote(str(out))}")


def training(name, flags, out, device="cuda", size="tiny"):
    """The same training on the device and on the CPU, at the same time; --compile is for the device alone."""
    folder = out / name_of_folder(f"losses: {name}")
    cpu = train_command(folder / "cpu", "--device cpu " + flags.replace("--compile", ""), size)
    command = f"{train_command(folder / 'device', f'--device {device} {flags}', size)} & {cpu} && wait $!"
    target = f"first {FIRST_STEPS} losses within {TOLERANCE} of the CPU's, all finite"
    return Part(f"losses: {name}", target, command, 240, judge_losses, name in QUICK_TRAININGS)


def profiles(size, batch, compiled, gains):
    flags = f"--size {size} --batch {batch} --device cuda --precision bf16 --eval-images 0{' --compile' * compiled}"
    command = f"python train.py --profile {flags} && python -c {shlex.quote(IN_BUCKETS)} {flags}"
    target = f"packed at least {LEAST_GAIN} times buckets" if gains else "runs, texts packed"
    name = f"profile: {size}{', compiled' * compiled}"
    return Part(name, target, command, 400, partial(judge_profile, gains), quick=size == "small" and not compiled)


def resume(out, device="cuda", size="tiny"):
    """Two runs left alone, one killed by SIGKILL between two checkpoints and taken up again."""
    flags = f"--device {device} --save-steps {SAVED}"
    folder = out / "resume"
    killed = folder / "killed"
    command = "; ".join([
        train_command(folder / "undisturbed", flags, size),
        train_command(folder / "again", flags, size),
        train_command(killed, flags, size, program=f"-c {shlex.quote(KILLED_RUN)}"),
        f"python train.py --resume {shlex.quote(str(killed))} --device {device}",
    ])
    return Part("resume", "as near as two undisturbed runs", command, 240, judge_resume, True)


def parts(out):
    """All parts, in their order."""
    sanitizer = "echo not installed"
    path = os.environ["PATH"] + ":/usr/local/cuda/bin"
    if program := shutil.which("compute-sanitizer", path=path):
        sanitizer = (f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 {program} python -m pytest -q -p no:cacheprovider "
                     "tests/test_fused.py -k 'one_side_alone and cuda and extension'")
    run = out / "losses-dreamlip/device"
    evaluation = out / "evaluation"
    small = shlex.quote(str(out / "default-run/run"))
    return [
        Part("build", "a library", "python csrc/fused.py --cuda", 400, judge_build, True),
        Part("tests", "all pass", "python -m pytest -q -p no:cacheprovider -m gpu", 400, judge_tests, True),
        Part("sanitizer", "0 errors", sanitizer, 300, judge_sanitizer),
        Part("fused loss", f"at most {MOST_GEMMS} times four GEMMs", "python csrc/benchmark.py --device cuda --n 32768",
             200, judge_gemms, True),
        *[training(name, flags, out) for name, flags in TRAININGS.items()],
        profiles("small", 256, False, False),
        profiles("small", 256, True, False),
        profiles("base-16", 512, False, True),
        profiles("base-16", 512, True, True),
        Part("step", "at least as fast as open_clip", "python tests/benchmark_step.py --size base-16 --device cuda --compile",
             500, judge_step),
        Part("evaluation", "finite on 4000 images", f"python evaluate.py {shlex.quote(str(run))} --images 4000 --device cuda "
             f"--out {shlex.quote(str(evaluation))}", 200, judge_evaluation, True),
        Part("default run", ", ".join(f"{name} >= {floor}" for name, floor in FLOORS.items()),
             f"python train.py --size small --images 1000000 --device cuda --out {small}", 590, judge_floors),
        resume(out),
    ]


# ---- running them ----------------------------------------------------------------------------------------------------

def name_of_folder(name):
    return re.sub(r"\W+", "-", name)


def run_part(part, out):
    """Runs a part in a new folder of its own -> its row."""
    folder = out / name_of_folder(part.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    text, trouble = run_command(part.command, folder / "output.txt", part.limit)
    measured, passed = trouble, False
    if not trouble:
        try:
            measured, passed = part.judge(text, folder)
        except Exception as error:  # the output or a file is not what the judge knows
            trouble = f"cannot be judged, {error!r}"
    if trouble:
        lines = text.replace("\r", "\n").split("\n")
        last = [line.strip() for line in lines if line.strip()][-1:]
        measured = ": ".join([trouble, *last])[:300]
    result = {True: "pass", False: "FAIL", None: "-"}[passed]
    return dict(part=part.name, target=part.target, measured=measured, result=result, command=part.command,
                seconds=round(time.monotonic() - began))


def run_command(command, file, limit):
    """-> what a command printed, which the file holds, too, and its trouble: "", an exit code or the time limit."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open(file, "w") as output:
        process = subprocess.Popen(command, shell=True, cwd=ROOT, env=environment, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            trouble = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            trouble = f"not done in {limit} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # with all that the command started
            except ProcessLookupError:
                pass
            process.wait()
    return file.read_text(errors="replace"), trouble


def write_table(rows, out):
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    columns = ("part", "target", "measured", "result", "command")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [re.sub(r"\s+", " ", row[name]).replace("|", "\\|") for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    (out / "results.md").write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-check")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here: run this on a machine with one")
    out = options.out.resolve()
    chosen = [part for part in parts(out) if part.quick or not options.quick]
    rows = {}
    if options.only:
        chosen = [part for part in chosen if any(word in part.name for word in options.only)]
        if (out / "results.json").exists():
            rows = {row["part"]: row for row in json.loads((out / "results.json").read_text())}
    os.environ["TORCH_EXTENSIONS_DIR"] = str(out / "extensions")
    if any(part.name == "build" for part in chosen):
        shutil.rmtree(out / "extensions", ignore_errors=True)  # so it is built, not found
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}. {len(chosen)} parts, all of them about "
          f"{MINUTES[options.quick]} minutes on an H100: {', '.join(part.name for part in chosen)}. Table: {out}/results.md")
    for part in chosen:
        row = rows[part.name] = run_part(part, out)
        print(f"{row['result']:5}{part.name}, {row['seconds']} s: {row['measured']}", flush=True)
        write_table(list(rows.values()), out)
    print((out / "results.md").read_text())
    sys.exit(any(row["result"] == "FAIL" for row in rows.values()))


if __name__ == "__main__":
    main()
