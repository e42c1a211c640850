"""The papers' claims put to the test: rows of settings, each trained with several seeds, and the differences claimed.

    python claims.py                           all rows into runs/claims: over an hour on two cores
    python claims.py --quick                   one seed and 2,000 images a run, into runs/claims-quick: minutes
    python claims.py FOLDER --rows O2O O2M     two of the rows, and the claims about them

Every run is a process of its own, with a .log beside its folder. After Ctrl-C, SIGTERM or a failure the same command
goes on: runs that are done are passed over, the others resume. The folder gets claims.md and figures.
"""

import argparse
import json
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

from data import Parser, UserError
from evaluate import PALETTE, deviation, draw_branches, draw_reading, evaluate_run, new_figure
from train import parse_flags, train

# ---- the rows, the measures, the claims ------------------------------------------------------------------------------

# All rows train on the same scenes, with the same seeds, and see equally many images, those of TIMES apart.
COMMON, IMAGES = "--size tiny --kinds 12", 16_000
if torch.cuda.is_available():
    COMMON, IMAGES = "--size tiny --kinds 24", 200_000
TIMES = {"raw, twice the images": 2}

# DreamLIP's paper draws no whole caption and weights the grouping loss with 1; our small sizes do otherwise.
SUBS = "--method dreamlip --whole-caption 0"
SLOT = SUBS + " --grouping-weight 1"
ROWS = {  # a row is flags of train.py
    "raw (CLIP)": "--method clip",
    "raw, twice the images": "--method clip",
    "raw, whole long": "--method lotlip --corner-tokens 0",
    "raw, sub-captions": SUBS + " --grouping none --no-short-caption",
    "raw, sub-captions, short": SUBS + " --grouping none",
    "+ token grouping (SPARC)": SLOT + " --grouping token --negatives image",
    "+ grouping (DreamLIP)": SLOT + " --negatives image",
    "+ slot negatives": SLOT,
    "+ slot negatives, λ = 0.2": SUBS,
    "+ slot negatives, σ = 0.7": SLOT + " --threshold 0.7",
    "+ slot negatives, in boxes": SLOT + " --region-grouping",
    "+ regrouped negatives": SLOT + " --negatives regrouped",
    "our dreamlip row": "--method dreamlip",
    "long alone": "--method lotlip --corner-tokens 0 --no-raw-caption",
    "raw, long, 1 corner": "--method lotlip --corner-tokens 1",
    "raw, long, 2 corners (LoTLIP)": "--method lotlip",
    "raw, long, 4 corners": "--method lotlip --corner-tokens 4",
    "raw, long, 4 corners, unmasked": "--method lotlip --corner-tokens 4 --no-corner-mask",
    "O2O": "--method clip --pool class",
    "O2M": "--method holistic --branches 1 --pool class",
    "M2M, 2 class tokens": "--method holistic --perspectives 2 --branches 2",
    "M2M, 3 class tokens": "--method holistic --perspectives 3 --branches 3",
    "M2M, 4 class tokens": "--method holistic --perspectives 4 --branches 4",
    "M2M, 5 class tokens": "--method holistic --perspectives 5 --branches 5",
    "M2M, 5 MLPs": "--method holistic --branch-type mlp --pool class",
    "our dreamlip, 2 corners": "--method dreamlip --corner-tokens 2",
    "our dreamlip, 5 MLPs": "--method dreamlip --branches 5 --branch-type mlp",
    "our dreamlip, 2 corners, 5 MLPs": "--method dreamlip --corner-tokens 2 --branches 5 --branch-type mlp",
}
MEASURES = {  # a name for the tables: the metrics that it is the mean of
    "short R@1": ("short T2I R@1", "short I2T R@1"),
    "long R@1": ("long T2I R@1", "long I2T R@1"),
    "by sentence R@1": ("long by sentence T2I R@1", "long by sentence I2T R@1"),
    "zero-shot": ("zero-shot top-1",),
    "unseen pairs": ("unseen colour and object",),
    "pointing": ("pointing by sentence",),
    "mIoU": ("mIoU",),
    "by name": ("pointing by name",),
    "patches grouped": ("patches grouped",),
    "group finds its text": ("group finds its sentence",),
    "in a wrong image": ("group finds its sentence, wrong image",),
    "minutes": ("minutes of training",),
}
USUAL = ("short R@1", "long R@1", "by sentence R@1", "zero-shot", "unseen pairs", "pointing", "mIoU", "minutes")
LOCAL = ("zero-shot", "pointing", "mIoU", "by name", "patches grouped", "group finds its text", "in a wrong image")
CLAIMS = {  # paper: the rows and measures of its table, and its claims: what is said, of which row, beside which
    "DreamLIP": (
        ["raw (CLIP)", "raw, twice the images", "raw, whole long", "raw, sub-captions", "raw, sub-captions, short",
         "+ token grouping (SPARC)", "+ grouping (DreamLIP)", "our dreamlip row"], USUAL, [
            ("a long caption beside the raw one helps", "raw, whole long", "raw (CLIP)"),
            ("its sentences one by one help more", "raw, sub-captions", "raw, whole long"),
            ("the short caption among them helps, too", "raw, sub-captions, short", "raw, sub-captions"),
            ("grouping the patches helps, too", "+ grouping (DreamLIP)", "raw, sub-captions, short"),
            ("better by sub-caption than by token", "+ grouping (DreamLIP)", "+ token grouping (SPARC)"),
            ("all better than CLIP with the same time", "+ grouping (DreamLIP)", "raw, twice the images"),
            ("and so is our row of settings", "our dreamlip row", "raw, twice the images")]),
    "Localisation": (
        ["raw, sub-captions, short", "+ token grouping (SPARC)", "+ grouping (DreamLIP)", "+ slot negatives",
         "+ slot negatives, λ = 0.2", "+ slot negatives, σ = 0.7", "+ slot negatives, in boxes",
         "+ regrouped negatives"], LOCAL, [
            ("grouping helps: slot negatives", "+ slot negatives", "raw, sub-captions, short"),
            ("less of it localises better", "+ slot negatives, λ = 0.2", "+ slot negatives"),
            ("so do sparser weights", "+ slot negatives, σ = 0.7", "+ slot negatives"),
            ("so does grouping within boxes", "+ slot negatives, in boxes", "+ slot negatives"),
            ("so do negatives grouped by the same text", "+ regrouped negatives", "+ slot negatives")]),
    "LoTLIP": (
        ["raw (CLIP)", "raw, whole long", "long alone", "raw, long, 1 corner", "raw, long, 2 corners (LoTLIP)",
         "raw, long, 4 corners", "raw, long, 4 corners, unmasked"], USUAL, [
            ("short texts suffer from long ones alone", "long alone", "raw (CLIP)"),
            ("raw texts beside them mend that", "raw, whole long", "long alone"),
            ("corners lift long, keep short texts", "raw, long, 2 corners (LoTLIP)", "raw, whole long"),
            ("four do more than one", "raw, long, 4 corners", "raw, long, 1 corner"),
            ("the mask between them helps", "raw, long, 4 corners", "raw, long, 4 corners, unmasked")]),
    "Holistic CLIP": (
        ["O2O", "O2M", "M2M, 2 class tokens", "M2M, 3 class tokens", "M2M, 4 class tokens", "M2M, 5 class tokens",
         "M2M, 5 MLPs"], USUAL, [
            ("several texts are better than one", "O2M", "O2O"),
            ("a class token for each is better still", "M2M, 5 class tokens", "O2M"),
            ("so are parallel MLPs", "M2M, 5 MLPs", "O2M"),
            ("more branches are better", "M2M, 5 class tokens", "M2M, 2 class tokens")]),
    "Together": (
        ["raw (CLIP)", "our dreamlip row", "our dreamlip, 2 corners", "our dreamlip, 5 MLPs",
         "our dreamlip, 2 corners, 5 MLPs"], USUAL, [
            ("corners add to our dreamlip row", "our dreamlip, 2 corners", "our dreamlip row"),
            ("branches add to it", "our dreamlip, 5 MLPs", "our dreamlip row"),
            ("both add to it", "our dreamlip, 2 corners, 5 MLPs", "our dreamlip row")]),
}
READERS = ("raw (CLIP)", "long alone", "raw, whole long", "raw, long, 2 corners (LoTLIP)", "raw, sub-captions, short",
           "our dreamlip row")  # rows that reading.png shows
BRANCHED = ("M2M, 5 class tokens", "M2M, 5 MLPs")  # rows that branches.png shows


# ---- training the rows -----------------------------------------------------------------------------------------------

@dataclass
class Run:
    """A row with a seed. Its process writes into the folder; what it prints goes into FOLDER.log."""

    row: str
    folder: str
    flags: list[str]  # of train.py
    gpu: str = ""
    process: subprocess.Popen | None = None

    def start(self, threads: int):
        """Starts a process that trains and evaluates the run; it stops when its standard input ends."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": self.gpu}
        command = [sys.executable, __file__, "--row", self.row, "--out", self.folder, *self.flags]
        with open(self.folder + ".log", "a") as log:
            # in a session of its own: Ctrl-C in the terminal reaches the parent alone, which stops its children
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment,
                                            start_new_session=True)

    def result(self) -> dict | None:
        """The content of the run's evaluation.json, with the minutes of its training; None if the run is not done.

        Raises UserError if it was trained with other flags.
        """
        folder = Path(self.folder)
        try:
            result = json.loads((folder / "evaluation.json").read_text())
        except (OSError, ValueError):  # not there yet, or cut short by a kill
            return None
        settings = json.loads((folder / "settings.json").read_text())
        if settings != settings | parse_flags(self.flags):
            raise UserError(f"{folder} was trained with other flags than {' '.join(self.flags)}: choose another folder")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        speed = np.median([json.loads(line)["images_per_s"] for line in lines])
        result["metrics"]["minutes of training"] = {"value": settings["images"] / speed / 60, "chance": 0.0}
        return result


def list_runs(folder: Path, rows: list[str], seeds: int, images: int) -> dict[str, list[Run]]:
    """{row: a run for each seed}."""
    runs = {}
    for row in rows:
        name = re.sub("[^a-zA-Z0-9.]+", "-", row).strip("-")
        flags = f"{COMMON} {ROWS[row]} --images {images * TIMES.get(row, 1)} --seed"
        runs[row] = [Run(row, f"{folder / name}-{seed}", [*flags.split(), str(seed)]) for seed in range(seeds)]
    return runs


def train_row(row: str, flags: list[str]):
    """What the process of a run does: it trains, or goes on with the training, and evaluates."""
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
                                    "kept, and the same command goes on")
                running.remove(run)
                left = len(waiting) + len(running)
                print(f"{time.strftime('%H:%M')} {run.folder} is done: {left} runs are left", flush=True)
    finally:  # however it ends, no process is left
        for run in running:
            run.process.stdin.close()
        for run in running:
            try:
                run.process.wait(10)  # it saves a checkpoint
            except subprocess.TimeoutExpired:
                run.process.kill()


def run_claims(folder: Path, rows: list[str], seeds: int, jobs: int, images: int):
    """Trains what is not trained yet of the rows and writes claims.md and figures into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = list_runs(folder, rows, seeds, images)
    train_runs([run for of_row in runs.values() for run in of_row], jobs)
    results, values, minutes = {}, {}, 0.0
    for row, of_row in runs.items():
        results[row] = [run.result() for run in of_row]
        values[row] = values_of(results[row], "value")
        values["chance"] = values_of(results[row][:1], "chance")
        minutes += values[row]["minutes"].sum()
    text = f"{len(runs)} rows × {seeds} seeds, {minutes:.0f} minutes of training in all. {LEGEND}{claims_text(values)}"
    (folder / "claims.md").write_text(text)
    print(text)
    draw_claims(values, list(CLAIMS), USUAL[:-1], folder / "claims.png")
    draw_claims(values, ["Localisation"], LOCAL, folder / "localisation.png")
    draw_probe(draw_reading, results, READERS, "reading", ("length",), folder / "reading.png")
    draw_probe(draw_branches, results, BRANCHED, "specialisation", ("matrix",), folder / "branches.png")


# ---- the tables ------------------------------------------------------------------------------------------------------

LEGEND = ("Rows: mean ± one standard deviation over seeds. Claims: the differences paired by seed, ± half of the 95% "
          "confidence interval, in bold where it leaves out 0. R@1: mean of both directions; all but minutes in %.\n")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t, two-sided 95%, 1 to 9 degrees


def values_of(runs: list[dict], what: str) -> dict[str, np.ndarray]:
    """{measure: its values in a row's runs}, in the order of seeds; or its chance levels."""
    values = {}
    for measure, names in MEASURES.items():
        metrics = [[run["metrics"][name][what] for run in runs] for name in names]
        values[measure] = np.mean(metrics, 0)
    return values


def differences_of(values: dict, paper: str) -> dict[str, dict[str, np.ndarray]]:
    """{claim: {measure: differences of its two rows, seed by seed}}, of a paper's claims about rows that there are."""
    differences = {}
    for claim, better, than in CLAIMS[paper][2]:
        if better in values and than in values:
            title = f"{claim}: *{better}* less *{than}*"
            differences[title] = {measure: values[better][measure] - values[than][measure] for measure in MEASURES}
    return differences


def interval(differences: np.ndarray) -> float:
    """Half of the 95% confidence interval of the differences' mean, by Student's t; infinite for a single one."""
    n = len(differences)
    if n == 1:
        return np.inf
    return STUDENT[min(n, 10) - 2] * deviation(differences) / n ** 0.5


def row_cell(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {deviation(values):.1f}"


def claim_cell(differences: np.ndarray) -> str:
    mean, half = differences.mean(), interval(differences)
    bold = "**" if abs(mean) > half else ""
    return f"{bold}{mean:+.1f}{bold} ± {half:.1f}"


def table(lines: dict[str, dict], measures: tuple[str, ...], cell) -> str:
    """{name: {measure: values}} -> markdown; `cell` makes text of values."""
    text = "\n| | " + " | ".join(measures) + " |\n|---|" + "---:|" * len(measures)
    for name, values in lines.items():
        cells = [cell(values[measure]) for measure in measures]
        text += f"\n| {name} | {' | '.join(cells)} |"
    return text + "\n"


def claims_text(values: dict) -> str:
    """Markdown: for each paper the table of its rows and that of its claims."""
    text = ""
    for paper, (rows, measures, _) in CLAIMS.items():
        lines = {row: values[row] for row in [*rows, "chance"] if row in values}
        differences = differences_of(values, paper)
        if len(lines) > 1:
            text += f"\n### {paper}\n" + table(lines, measures, row_cell)
        if differences:
            text += table(differences, measures, claim_cell)
    return text


# ---- the figures -----------------------------------------------------------------------------------------------------

def draw_claims(values: dict, papers: list[str], measures: tuple[str, ...], path: Path):
    """The papers' claims in each measure: the difference and its confidence interval, in colour where that leaves out
    0. Draws nothing without claims."""
    differences = {}
    for paper in papers:
        for claim, of_claim in differences_of(values, paper).items():
            differences[f"{paper}: {claim.split(': *')[0]}"] = of_claim
    if not differences:
        return
    figure = new_figure(5 + 1.4 * len(measures), 1.5 + 0.3 * len(differences))
    for axis, measure in zip(figure.subplots(1, len(measures), sharey=True), measures):
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(measure)
        for claim, of_claim in differences.items():
            mean, half = of_claim[measure].mean(), interval(of_claim[measure])
            colour = PALETTE[7]
            if abs(mean) > half:
                colour = PALETTE[2] if mean > 0 else PALETTE[1]
            axis.errorbar(mean, claim, xerr=half, fmt="o", color=colour, capsize=2.5)
    axis.invert_yaxis()  # of all, for they share it
    figure.supxlabel("difference in percentage points and its 95% confidence interval over seeds; "
                     "green: more, orange: less, grey: not told apart")
    figure.savefig(path)


def draw_probe(draw, results: dict, rows: tuple[str, ...], probe: str, keys: tuple[str, ...], path: Path):
    """Draws what a probe has found in those of the rows that there are, its `keys` averaged over seeds."""
    found = {}
    for row in rows:
        if row in results:
            found[row] = dict(results[row][0][probe])
            for key in keys:
                found[row][key] = np.mean([run[probe][key] for run in results[row]], 0).tolist()
    if found:
        draw(found, path)


# ---- the command line ------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/claims", help="of the runs, tables and figures")
    parser.add_argument("--quick", action="store_true", help="other defaults: a small effort in runs/claims-quick")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="NAME", default=list(ROWS),
                        help="rows to train, and to compare where claims are about them; all if left away")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--jobs", type=int, default=3 * torch.cuda.device_count() or os.cpu_count(),
                        help="runs at once; one a core, or three a GPU")
    parser.add_argument("--train-images", type=int, default=IMAGES, help="images that each run sees")
    options = parser.parse_args(argv)
    if options.quick:
        parser.set_defaults(folder="runs/claims-quick", seeds=1, train_images=2_000)
        options = parser.parse_args(argv)
    if min(options.seeds, options.jobs, options.train_images) < 1:
        raise UserError("--seeds, --jobs and --train-images must be at least 1")
    if min(options.seeds, options.jobs, options.train_images) < 1:
        raise UserError("--seeds, --jobs and --train-images must be at least 1")
    run_claims(Path(options.folder), options.rows, options.seeds, options.jobs, options.train_images)


signals = []


def interrupt(number: int, _):
    """Ctrl-C and SIGTERM end the command; a second signal does not disturb its ending."""
    signals.append(number)
    if len(signals) == 1:
        raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--row"]:
            train_row(sys.argv[2], sys.argv[3:])
        else:
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, interrupt)
            main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: what is done is kept, and the same command goes on")
        sys.exit(130)
