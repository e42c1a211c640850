"""The papers' claims put to the test: rows of settings, each trained with several seeds, and a verdict on each claim.

    python claims.py                          all rows into runs/claims: 3 hours on two cores, 5 without bfloat16
    python claims.py --quick                  one seed and 8,000 images a run, into runs/claims-quick: half an hour
    python claims.py FOLDER --rows O2O O2M    two of the rows, and the claims about them

Every run is a process of its own, with a .log beside its folder. After Ctrl-C, SIGTERM or a failure run the same
command again: runs that are done are skipped, the others resume. The folder gets claims.md and figures.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import Parser, UserError, at_least, read_json
from evaluate import evaluate_run, markdown, new_figure
from train import parse_flags, train

# ---- the rows, the measures, the claims ------------------------------------------------------------------------------

# All rows train on the same scenes, with the same seeds, and see equally many images, except those of TIMES.
COMMON, IMAGES = "--size tiny --kinds 12", 30_000
if torch.cuda.is_available():
    COMMON, IMAGES = "--size tiny --kinds 24", 200_000
TIMES = {"raw, for as long as DreamLIP": 1.5}

# As in DreamLIP's paper: many sub-captions, no whole caption, weight 1 for the grouping loss. Our small sizes differ.
SUBS = "--method dreamlip --sub-captions 3 --whole-caption 0"
GROUPS = SUBS + " --grouping-weight 1 --negatives"
# Holistic CLIP forks a quarter of the blocks: here the last one of two.
MLPS = "--branches 5 --branch-type mlp --branch-layers 1"
ROWS = {  # a row is flags of train.py
    "raw (CLIP)": "--method clip",
    "raw, for as long as DreamLIP": "--method clip",
    "raw, whole long": "--method lotlip --corner-tokens 0",
    "raw, sub-captions": SUBS + " --grouping none --no-short-caption",
    "raw, sub-captions, short": SUBS + " --grouping none",
    "+ token grouping (SPARC)": GROUPS + " image --grouping token",
    "+ grouping (DreamLIP)": GROUPS + " image",
    "+ slot negatives": GROUPS + " slot",
    "+ slot negatives, in boxes": GROUPS + " slot --region-grouping",
    "+ regrouped negatives": GROUPS + " regrouped",
    "our dreamlip row": "--method dreamlip",
    "long alone": "--method lotlip --corner-tokens 0 --no-raw-caption",
    "raw, long, 2 corners (LoTLIP)": "--method lotlip",
    "raw, long, 2 corners, unmasked": "--method lotlip --no-corner-mask",
    "O2O": "--method clip --pool class",
    "O2M": "--method holistic --branches 1 --pool class",
    "M2M, 5 class tokens": "--method holistic",
    "M2M, 5 MLPs": "--method holistic --pool class " + MLPS,
    "our dreamlip, 2 corners": "--method dreamlip --corner-tokens 2",
    "our dreamlip, 5 MLPs": "--method dreamlip " + MLPS,
    "our dreamlip, 5 MLPs, by text": "--method dreamlip --matching text " + MLPS,
}
MEASURES = {  # name in the tables: the metrics whose mean it is
    "short R@1": ("short T2I R@1", "short I2T R@1"),
    "long R@1": ("long T2I R@1", "long I2T R@1"),
    "by sentence R@1": ("long by sentence T2I R@1", "long by sentence I2T R@1"),
    "perspectives R@1": ("perspectives T2I R@1", "perspectives I2T R@1"),
    "zero-shot": ("zero-shot top-1",),
    "unseen pairs": ("unseen colour and object",),
    "pointing": ("pointing by sentence",),
    "by name": ("pointing by name",),
    "mIoU": ("mIoU",),
    "group finds its text": ("group finds its sentence",),
    "in a wrong image": ("group finds its sentence, wrong image",),
    "minutes": ("minutes of training",),
}


@dataclass(frozen=True)
class Claim:
    """The row `better` is above the row `than` in a measure."""

    paper: str
    what: str
    better: str
    than: str
    measure: str


CLAIMS = [
    Claim("DreamLIP", "a long caption beside the raw one helps", "raw, whole long", "raw (CLIP)", "short R@1"),
    Claim("DreamLIP", "its sentences one by one help more", "raw, sub-captions", "raw, whole long", "short R@1"),
    Claim("DreamLIP", "the short caption among them helps, too", "raw, sub-captions, short", "raw, sub-captions",
          "short R@1"),
    Claim("DreamLIP", "grouping the patches helps, too", "+ grouping (DreamLIP)", "raw, sub-captions, short",
          "short R@1"),
    Claim("DreamLIP", "grouping by sub-caption beats that by token", "+ grouping (DreamLIP)",
          "+ token grouping (SPARC)", "short R@1"),
    Claim("DreamLIP", "it beats CLIP in the same time", "+ grouping (DreamLIP)", "raw, for as long as DreamLIP",
          "short R@1"),
    Claim("DreamLIP", "also in classes", "+ grouping (DreamLIP)", "raw, for as long as DreamLIP", "zero-shot"),
    Claim("Localisation", "the paper's grouping points better than none", "+ grouping (DreamLIP)",
          "raw, sub-captions, short", "pointing"),
    Claim("Localisation", "it segments better, as measured there", "+ grouping (DreamLIP)", "raw, sub-captions, short",
          "mIoU"),
    Claim("Localisation", "so does slot negatives'", "+ slot negatives", "raw, sub-captions, short", "pointing"),
    Claim("Localisation", "within boxes it points better", "+ slot negatives, in boxes", "+ slot negatives",
          "pointing"),
    Claim("Localisation", "negatives by the same text point better", "+ regrouped negatives", "+ slot negatives",
          "pointing"),
    Claim("LoTLIP", "short texts suffer from long ones alone", "raw (CLIP)", "long alone", "short R@1"),
    Claim("LoTLIP", "so do classes", "raw (CLIP)", "long alone", "zero-shot"),
    Claim("LoTLIP", "raw texts beside them mend that", "raw, whole long", "long alone", "short R@1"),
    Claim("LoTLIP", "corners lift long texts", "raw, long, 2 corners (LoTLIP)", "raw, whole long", "long R@1"),
    Claim("LoTLIP", "and keep short ones", "raw, long, 2 corners (LoTLIP)", "raw, whole long", "short R@1"),
    Claim("LoTLIP", "the mask between them helps", "raw, long, 2 corners (LoTLIP)", "raw, long, 2 corners, unmasked",
          "long R@1"),
    Claim("Holistic CLIP", "several texts are better than one", "O2M", "O2O", "short R@1"),
    Claim("Holistic CLIP", "a class token for each is better still", "M2M, 5 class tokens", "O2M", "short R@1"),
    Claim("Holistic CLIP", "most of all where each is asked for its own texts", "M2M, 5 class tokens", "O2M",
          "perspectives R@1"),
    Claim("Holistic CLIP", "parallel MLPs are better still", "M2M, 5 MLPs", "O2M", "short R@1"),
    Claim("Holistic CLIP", "most of all where each is asked for its own texts", "M2M, 5 MLPs", "O2M",
          "perspectives R@1"),
    Claim("Together", "corners add to our dreamlip row", "our dreamlip, 2 corners", "our dreamlip row", "long R@1"),
    Claim("Together", "branches add to it", "our dreamlip, 5 MLPs", "our dreamlip row", "short R@1"),
    Claim("Together", "matched by the text they add more", "our dreamlip, 5 MLPs, by text", "our dreamlip, 5 MLPs",
          "short R@1"),
]


# ---- training the rows -----------------------------------------------------------------------------------------------

@dataclass
class Run:
    """A row with a seed. Its process writes into the folder and prints into FOLDER.log."""

    row: str
    folder: str
    flags: list[str]  # of train.py
    gpu: str = ""
    process: subprocess.Popen | None = None

    def start(self, threads: int):
        """Starts a process that trains and evaluates the run; it stops when its standard input ends."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": self.gpu}
        command = [sys.executable, __file__, "--run", self.row, "--out", self.folder, *self.flags]
        with open(self.folder + ".log", "a") as log:
            # in a session of its own: Ctrl-C in the terminal reaches the parent alone, which stops its children
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
                                            start_new_session=True)

    def result(self) -> dict | None:
        """The content of the run's evaluation.json and the minutes of its training; None if the run is not done.

        Raises UserError if it was trained with other flags.
        """
        folder = Path(self.folder)
        try:
            result = read_json(folder / "evaluation.json")
        except UserError:  # not there yet, or cut short by a kill
            return None
        settings = read_json(folder / "settings.json")
        if settings != settings | parse_flags(self.flags):
            raise UserError(f"{folder} was trained with other flags than {' '.join(self.flags)}: choose another folder")
        speed = np.median([line["images_per_s"] for line in read_json(folder / "metrics.jsonl")])
        result["metrics"]["minutes of training"] = {"value": settings["images"] / speed / 60, "chance": 0.0}
        return result


def list_runs(folder: Path, rows: list[str], seeds: int, images: int) -> dict[str, list[Run]]:
    """{row: a run for each seed}."""
    runs = {}
    for row in rows:
        name = re.sub("[^a-zA-Z0-9.]+", "-", row).strip("-")
        flags = f"{COMMON} {ROWS[row]} --images {round(images * TIMES.get(row, 1))} --seed"
        runs[row] = [Run(row, f"{folder / name}-{seed}", [*flags.split(), str(seed)]) for seed in range(seeds)]
    return runs


def train_row(flags: list[str]):
    """The process of a run: trains, or resumes the training, and evaluates."""
    def stop_with_parent():
        os.read(0, 1)  # returns when the parent closes the pipe, or has died
        os.kill(os.getpid(), signal.SIGTERM)  # a run in training saves a checkpoint then

    threading.Thread(target=stop_with_parent, daemon=True).start()
    folder = train(parse_flags([*flags, "--resume", "auto", "--eval-images", "0"]))
    evaluate_run(folder, figures=False)


def train_runs(runs: list[Run], jobs: int):
    """Trains and evaluates what is not done yet, `jobs` runs at a time. Raises UserError if one fails."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[:torch.cuda.device_count()] or [""]
    waiting, running = [run for run in runs if run.result() is None], []
    try:
        while waiting or running:
            if waiting and len(running) < jobs:
                run = waiting.pop(0)
                run.gpu = min(gpus, key=[other.gpu for other in running].count)  # one with the fewest runs
                run.start(max(1, os.cpu_count() // jobs))
                running.append(run)
            time.sleep(0.1)
            for run in list(running):
                if run.process.poll() is None:
                    continue
                if run.result() is None:
                    words = Path(run.folder + ".log").read_text(errors="replace").splitlines()[-1:]
                    raise UserError(f"{run.folder} ended with code {run.process.returncode} (-9: perhaps for want of "
                                    f"memory, --jobs 1 needs less) and the words {words} in its .log. What is done is "
                                    "kept: run the same command again")
                running.remove(run)
                left = len(waiting) + len(running)
                print(f"{time.strftime('%H:%M')} {run.folder} is done: {left} runs are left", flush=True)
    finally:  # no process is left, however it ends
        for run in running:
            run.process.stdin.close()
        for run in running:
            try:
                run.process.wait(10)  # it saves a checkpoint
            except subprocess.TimeoutExpired:
                run.process.kill()


def run_claims(folder: Path, rows: list[str], seeds: int, jobs: int, images: int):
    """Trains the rows, as far as they are not trained yet, and writes claims.md and figures into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = list_runs(folder, rows, seeds, images)
    by_seed = sum(zip(*runs.values()), ())  # so that an interrupted run has whole seeds
    train_runs(list(by_seed), jobs)
    values = {}
    precisions = set()
    for row, of_row in runs.items():
        results = [run.result() for run in of_row]
        values[row] = values_of(results, "value")
        precisions.update(result["settings"]["precision"] for result in results)
    if len(precisions) > 1:
        print("WARNING: some runs were trained in bfloat16 and some in float32: compare rows of one precision only")
    minutes = sum(of_row["minutes"].sum() for of_row in values.values())
    values["chance"] = values_of(results[:1], "chance")
    judged = {}  # the claims whose rows are both there
    for claim in CLAIMS:
        if {claim.better, claim.than} <= values.keys():
            judged[claim] = judge(claim, values)
    text = claims_text(values, judged, seeds, minutes)
    (folder / "claims.md").write_text(text)
    print(text)
    if judged:
        draw_claims(judged, folder / "claims.png")


# ---- the tables ------------------------------------------------------------------------------------------------------

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t, two-sided 95%, 1 to 9 degrees


def values_of(runs: list[dict], what: str) -> dict[str, np.ndarray]:
    """{measure: its values in a row's runs}, in the order of seeds; or its chance levels."""
    values = {}
    for measure, names in MEASURES.items():
        metrics = [[run["metrics"][name][what] for run in runs] for name in names]
        values[measure] = np.mean(metrics, 0)
    return values


def deviation(values) -> float:
    """The standard deviation over seeds, 0 of a single one."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def interval(differences: np.ndarray) -> float:
    """Half of the 95% confidence interval of the differences' mean, by Student's t; infinite for a single one."""
    n = len(differences)
    if n == 1:
        return np.inf
    return STUDENT[min(n, 10) - 2] * deviation(differences) / n ** 0.5


def judge(claim: Claim, values: dict) -> tuple[float, float, str]:
    """The claim's difference, paired by seed, half of its interval, and the verdict."""
    differences = values[claim.better][claim.measure] - values[claim.than][claim.measure]
    mean = differences.mean()
    half = interval(differences)
    verdict = "not told apart"
    if mean > half:
        verdict = "holds"
    if mean < -half:
        verdict = "does not hold"
    return mean, half, verdict


def claims_text(values: dict, judged: dict, seeds: int, minutes: float) -> str:
    """Markdown: every row's measures, and every claim with its verdict."""
    lines = [["%, mean ± sd over seeds", *MEASURES]]
    for row, of_row in values.items():
        cells = [f"{of_row[measure].mean():.1f} ± {deviation(of_row[measure]):.1f}" for measure in MEASURES]
        lines.append([row, *cells])
    text = f"{len(values) - 1} rows × {seeds} seeds, {minutes:.0f} minutes of training in all.\n\n{markdown(lines)}\n\n"
    lines = [["paper", "claim", "judged by", "difference", "± 95%", "verdict", "time"]]
    for claim, (mean, half, verdict) in judged.items():
        time = values[claim.better]["minutes"].mean() / values[claim.than]["minutes"].mean()
        rows = f"{claim.what}: *{claim.better}* over *{claim.than}*"
        found = [f"{mean:+.1f}", f"{half:.1f}", f"**{verdict}**", f"{time:.2f} ×"]
        lines.append([claim.paper, rows, claim.measure, *found])
    return text + markdown(lines) + "\n"


# ---- the figures -----------------------------------------------------------------------------------------------------

def draw_claims(judged: dict, path: Path):
    """Every claim's difference and its confidence interval, in its verdict's colour."""
    colours = {"holds": "#009e73", "does not hold": "#d55e00", "not told apart": "#999999"}  # Okabe and Ito's
    figure = new_figure(15, 1.5 + 0.3 * len(judged))
    axis = figure.subplots()
    axis.axvline(0, color="black", lw=0.8)
    for claim, (mean, half, verdict) in judged.items():
        name = f"{claim.paper}: {claim.what} ({claim.better}, {claim.measure})"
        axis.errorbar(mean, name, xerr=half, fmt="o", color=colours[verdict], capsize=2.5)
    axis.invert_yaxis()
    figure.supxlabel("difference in percentage points, and its 95% confidence interval over seeds\n"
                     "green: holds, orange: does not hold, grey: not told apart")
    figure.savefig(path)


# ---- the command line ------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs/claims", help="of the runs, tables and figures")
    parser.add_argument("--quick", action="store_true", help="other defaults: a small effort in runs/claims-quick")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="NAME", default=list(ROWS),
                        help="rows to train, and to compare where claims are about them; default: all")
    parser.add_argument("--seeds", type=at_least(1), default=5, help="runs of each row")
    parser.add_argument("--jobs", type=at_least(1), default=3 * torch.cuda.device_count() or os.cpu_count(),
                        help="runs at once; one a core, or three a GPU")
    parser.add_argument("--train-images", type=at_least(1), default=IMAGES, help="images that each run sees")
    options = parser.parse_args(argv)
    if options.quick:
        parser.set_defaults(folder="runs/claims-quick", seeds=1, train_images=8_000)
        options = parser.parse_args(argv)
    run_claims(Path(options.folder), options.rows, options.seeds, options.jobs, options.train_images)


signals = []


def interrupt(number: int, _):
    """Ctrl-C and SIGTERM end the command; a second signal does not disturb its ending."""
    signals.append(number)
    if len(signals) == 1:
        raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--run"]:
            train_row(sys.argv[3:])  # behind the row's name, which is for who looks at the processes
        else:
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, interrupt)
            main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: what is done is kept; to resume, run the same command")
        sys.exit(130)
