"""The papers' claims put to the test: rows of settings, each trained with several seeds, and the differences claimed.

    python claims.py                     all rows into runs/claims, over an hour on two cores; interrupted, it goes on
    python claims.py --seeds 1 --train-images 2000 --jobs 1 FOLDER
"""

import argparse
import multiprocessing
import os
import re
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch

from data import Parser, UserError, normalize, read_json
from evaluate import PALETTE, Model, deviation, draw_branches, draw_image, draw_reading, evaluate_run, new_figure
from scenes import Scenes
from train import train

# Every row is trained with the same seeds on the same scenes and sees equally many images (but for `times`); CLAIMS
# compares rows, seed by seed. A row is flags of train.py, those of all rows are CLAIMS_SIZE's.
CLAIMS_SIZE = {"cpu": dict(size="tiny", kinds=12, images=16_000), "cuda": dict(size="tiny", kinds=24, images=200_000)}
SUBS = dict(method="dreamlip", whole_caption=0.0)  # DreamLIP's paper draws no whole caption
SLOT = SUBS | dict(grouping_weight=1.0)  # the papers' weight of the grouping loss
ROWS = {
    "raw (CLIP)": dict(method="clip"),
    "raw, twice the images": dict(method="clip", times=2),
    "raw, whole long": dict(method="lotlip", corner_tokens=0),
    "raw, sub-captions": SUBS | dict(grouping="none", short_caption=False),
    "raw, sub-captions, short": SUBS | dict(grouping="none"),
    "+ token grouping (SPARC)": SLOT | dict(grouping="token", negatives="image"),
    "+ grouping (DreamLIP)": SLOT | dict(negatives="image"),
    "+ slot negatives": SLOT,
    "+ slot negatives, λ = 0.2": SUBS,
    "+ slot negatives, σ = 0.7": SLOT | dict(threshold=0.7),
    "+ slot negatives, in boxes": SLOT | dict(region_grouping=True),
    "+ regrouped negatives": SLOT | dict(negatives="regrouped"),
    "our dreamlip row": dict(method="dreamlip"),
    "long alone": dict(method="lotlip", corner_tokens=0, raw_caption=False),
    "raw, long, 1 corner": dict(method="lotlip", corner_tokens=1),
    "raw, long, 2 corners (LoTLIP)": dict(method="lotlip"),
    "raw, long, 4 corners": dict(method="lotlip", corner_tokens=4),
    "raw, long, 4 corners, unmasked": dict(method="lotlip", corner_tokens=4, corner_mask=False),
    "O2O": dict(method="clip", pool="class"),
    "O2M": dict(method="holistic", branches=1, pool="class"),
    **{f"M2M, {m} class tokens": dict(method="holistic", perspectives=m, branches=m) for m in (2, 3, 4, 5)},
    "M2M, 5 MLPs": dict(method="holistic", branch_type="mlp", pool="class"),
    "our dreamlip, 2 corners": dict(method="dreamlip", corner_tokens=2),
    "our dreamlip, 5 MLPs": dict(method="dreamlip", branches=5, branch_type="mlp"),
    "our dreamlip, 2 corners, 5 MLPs": dict(method="dreamlip", corner_tokens=2, branches=5, branch_type="mlp"),
}
MEASURES = {  # a name for the tables: the metrics that it is the mean of
    "short R@1": ("short T2I R@1", "short I2T R@1"), "long R@1": ("long T2I R@1", "long I2T R@1"),
    "by sentence R@1": ("long by sentence T2I R@1", "long by sentence I2T R@1"), "zero-shot": ("zero-shot top-1",),
    "unseen pairs": ("unseen colour and object",), "pointing": ("pointing by sentence",), "mIoU": ("mIoU",),
    "centred": ("pointing by sentence, centred",), "by name": ("pointing by name",),
    "by name, centred": ("pointing by name, centred",), "weight on object": ("grouped by sentence",),
    "patches grouped": ("patches grouped",), "patches alike": ("patches alike",), "locality": ("locality of patches",),
    "group finds its text": ("group finds its sentence",),
    "in a wrong image": ("group finds its sentence, wrong image",),
}
USUAL = tuple(MEASURES)[:7]


def span(first: str, last: str) -> list[str]:
    """The names in ROWS from the first to the last."""
    names = list(ROWS)
    return names[names.index(first):names.index(last) + 1]


CLAIMS = {  # paper: the rows and the measures of its table, and its claims: what is said, of which row, beside which
    "DreamLIP": ([*span("raw (CLIP)", "+ grouping (DreamLIP)"), "our dreamlip row"], USUAL, (
        ("a long caption beside the raw one helps", "raw, whole long", "raw (CLIP)"),
        ("its sentences one by one help more", "raw, sub-captions", "raw, whole long"),
        ("the short caption among them helps, too", "raw, sub-captions, short", "raw, sub-captions"),
        ("grouping the patches helps, too", "+ grouping (DreamLIP)", "raw, sub-captions, short"),
        ("better by sub-caption than by token", "+ grouping (DreamLIP)", "+ token grouping (SPARC)"),
        ("all better than CLIP with the same time", "+ grouping (DreamLIP)", "raw, twice the images"),
        ("and so is our row of settings", "our dreamlip row", "raw, twice the images"))),
    "Localisation": (span("raw, sub-captions, short", "+ regrouped negatives"),
                     ("zero-shot", *tuple(MEASURES)[5:]), (
        ("grouping helps: slot negatives", "+ slot negatives", "raw, sub-captions, short"),
        ("less of it localises better", "+ slot negatives, λ = 0.2", "+ slot negatives"),
        ("so do sparser weights", "+ slot negatives, σ = 0.7", "+ slot negatives"),
        ("so does grouping within boxes", "+ slot negatives, in boxes", "+ slot negatives"),
        ("so do negatives grouped by the same text", "+ regrouped negatives", "+ slot negatives"))),
    "LoTLIP": (["raw (CLIP)", "raw, whole long", *span("long alone", "raw, long, 4 corners, unmasked")], USUAL, (
        ("short texts suffer from long ones alone", "long alone", "raw (CLIP)"),
        ("raw texts beside them mend that", "raw, whole long", "long alone"),
        ("corners lift long, keep short texts", "raw, long, 2 corners (LoTLIP)", "raw, whole long"),
        ("four do more than one", "raw, long, 4 corners", "raw, long, 1 corner"),
        ("the mask between them helps", "raw, long, 4 corners", "raw, long, 4 corners, unmasked"))),
    "Holistic CLIP": (span("O2O", "M2M, 5 MLPs"), USUAL, (
        ("several texts are better than one", "O2M", "O2O"),
        ("a class token for each is better still", "M2M, 5 class tokens", "O2M"),
        ("so are parallel MLPs", "M2M, 5 MLPs", "O2M"),
        ("more branches are better", "M2M, 5 class tokens", "M2M, 2 class tokens"))),
    "Together": (["raw (CLIP)", "our dreamlip row", *span("our dreamlip, 2 corners", list(ROWS)[-1])], USUAL, (
        ("corners add to our dreamlip row", "our dreamlip, 2 corners", "our dreamlip row"),
        ("branches add to it", "our dreamlip, 5 MLPs", "our dreamlip row"),
        ("both add to it", "our dreamlip, 2 corners, 5 MLPs", "our dreamlip row"))),
}
READERS = ("raw (CLIP)", "long alone", "raw, whole long", "raw, long, 2 corners (LoTLIP)", "raw, sub-captions, short",
           "our dreamlip row")  # rows that reading.png shows
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # t, two-sided 95%, 1 to 9 degrees


def run_of(folder: Path, row: str, seed: int) -> Path:
    return folder / f"{re.sub('[^a-zA-Z0-9.]+', '-', row).strip('-')}-{seed}"


def train_row(out: Path, threads: int, probe: bool, times: int = 1, **flags) -> dict:
    """Trains a run and evaluates it, as far as that is not done yet -> its evaluation, with the seconds an image took
    in training. It is called in a process of its own; what it prints is in a .log beside the run."""
    torch.set_num_threads(threads)
    flags |= dict(out=str(out), resume="auto", eval_images=0, images=times * flags["images"])
    with open(f"{out}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        train(flags)  # of a run that is done already it only checks that it was the same
        if not (out / "evaluation.json").exists():
            evaluate_run(out, n=1000, figures=False, probe=probe)
    rates = [line["images_per_s"] for line in read_json(out / "metrics.jsonl")]
    return read_json(out / "evaluation.json") | dict(seconds=1 / np.median(rates))


def train_rows(rows: dict, folder: Path, seeds: int, jobs: int | None, flags: dict) -> tuple[dict, float]:
    """Trains and evaluates all rows with all seeds, `jobs` at a time -> {row: [evaluations]}, minutes."""
    gpus = torch.cuda.device_count()
    jobs = jobs or 3 * gpus or os.cpu_count() or 1
    threads = max(1, (os.cpu_count() or 1) // jobs)
    folder.mkdir(parents=True, exist_ok=True)
    started, found, futures = time.monotonic(), {}, {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for i, (seed, row) in enumerate((seed, row) for seed in range(seeds) for row in rows):
            settings = flags | rows[row] | dict(seed=seed) | (dict(device=f"cuda:{i % gpus}") if gpus else {})
            futures[pool.submit(train_row, run_of(folder, row, seed), threads, row in READERS, **settings)] = row, seed
        for future in as_completed(futures):
            row, seed = futures[future]
            try:
                found[row, seed] = future.result()
            except (UserError, SystemExit) as error:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"the row {row!r}, seed {seed}: {error}") from None
            except BrokenProcessPool:
                raise UserError("a process died, perhaps for want of memory: the same command goes on where it was, with "
                                "less memory by --jobs 1") from None
            minutes, done = (time.monotonic() - started) / 60, len(found)
            print(f"[{done}/{len(futures)}] {row}, seed {seed}; {minutes:.0f} min, about "
                  f"{minutes / done * (len(futures) - done):.0f} more", flush=True)
    return {row: [found[row, seed] for seed in range(seeds)] for row in rows}, minutes


def run_claims(folder: Path, seeds: int, jobs: int | None, flags: dict):
    """Trains what is not trained yet of ROWS and writes claims.md and figures into the folder."""
    size = CLAIMS_SIZE["cuda" if torch.cuda.is_available() else "cpu"]
    found, minutes = train_rows(ROWS, folder, seeds, jobs, size | flags)
    (folder / "claims.md").write_text(text := claims_text(found, minutes))
    print("\n" + text)
    draw_claims(found, folder / "claims.png")
    draw_localisation(found, folder, folder / "localisation.png")
    draw_reading({row: mean_of(found[row], "reading", "length", "place") for row in READERS}, folder / "reading.png")
    draw_branches({row: mean_of(found[row], "specialisation", "matrix") for row in
                   ("M2M, 5 class tokens", "M2M, 5 MLPs")}, folder / "branches.png")
    print(f"{folder}: claims.md, claims.png, localisation.png, reading.png, branches.png")


def mean_of(runs: list[dict], what: str, *keys: str) -> dict:
    """What the probe `what` found in several runs, its `keys` averaged."""
    return runs[0][what] | {key: np.mean([run[what][key] for run in runs], 0).tolist() for key in keys}


def measured(runs: list[dict], measure: str) -> np.ndarray:
    """A measure of a row's runs, in the order of their seeds."""
    return np.array([np.mean([run["metrics"][name]["value"] for name in MEASURES[measure]]) for run in runs])


def interval(better: np.ndarray, than: np.ndarray) -> tuple[float, float]:
    """Values of two rows, seed by seed -> the mean of their differences and half of its 95% confidence interval, by
    Student's t (infinite for a single seed)."""
    d = better - than
    half = STUDENT[min(len(d) - 2, 8)] * d.std(ddof=1) / len(d) ** 0.5 if len(d) > 1 else np.inf
    return float(d.mean()), float(half)


def claims_text(rows: dict, minutes: float) -> str:
    """Markdown: for each paper the table of its rows, mean ± sd over seeds, and the differences that it claims."""
    seeds, cost = len(rows["raw (CLIP)"]), np.median([run["seconds"] for run in rows["raw (CLIP)"]])
    lines = [f"{len(rows)} rows × {seeds} seeds, {minutes:.0f} minutes. Rows: mean ± one standard deviation over "
             "seeds; time: of the whole training, beside raw. Claims: the differences paired by seed, ± half of the "
             "95% confidence interval, in bold where it leaves out 0. R@1: mean of both directions."]
    for paper, (names, measures, claims) in CLAIMS.items():
        columns = " | ".join(measures)
        lines += ["", f"### {paper}", "", f"| % | {columns} | time |", "|---|" + "---:|" * (len(measures) + 1)]
        for row in names:
            values = [measured(rows[row], m) for m in measures]
            cells = [f"{v.mean():.1f} ± {deviation(v):.1f}" for v in values]
            seconds = np.median([run["seconds"] for run in rows[row]]) * ROWS[row].get("times", 1)
            lines.append(f"| {row} | " + " | ".join(cells) + f" | {seconds / cost:.1f} |")
        first = rows[names[0]][0]["metrics"]
        chance = [np.mean([first[name]["chance"] for name in MEASURES[m]]) for m in measures]
        lines += ["| chance | " + " | ".join(f"{c:.1f}" for c in chance) + " | |", "",
                  f"| claim | {columns} |", "|---|" + "---:|" * len(measures)]
        for claim, better, than in claims:
            cells = [interval(measured(rows[better], m), measured(rows[than], m)) for m in measures]
            cells = [f"{'**' * (abs(d) > half)}{d:+.1f}{'**' * (abs(d) > half)} ± {half:.1f}" for d, half in cells]
            lines.append(f"| {claim}: *{better}* less *{than}* | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_claims(rows: dict, path: Path):
    """Every claim against every usual measure: the paired difference and its confidence interval, in colour where the
    interval leaves out 0."""
    lines = [(paper, *claim) for paper, (_, _, claims) in CLAIMS.items() for claim in claims]
    places = [i + list(CLAIMS).index(line[0]) for i, line in enumerate(lines)]  # a free line between two papers
    figure = new_figure(14, 0.31 * places[-1] + 1.7)
    axes = figure.subplots(1, len(USUAL), sharey=True)
    for axis, measure in zip(axes, USUAL):
        found = [interval(measured(rows[better], measure), measured(rows[than], measure)) for *_, better, than in lines]
        for y, (d, half) in zip(places, found):
            colour = PALETTE[7] if abs(d) <= half else PALETTE[2] if d > 0 else PALETTE[1]
            axis.errorbar(d, y, xerr=min(half, 1e3), fmt="o", color=colour, ms=5.5, capsize=2.5, lw=1.5)
        reach = max(8, *(1.15 * (abs(d) + (half if half < np.inf else 0)) for d, half in found))
        axis.axvline(0, color="black", lw=0.8)
        axis.set(xlim=(-reach, reach), ylim=(places[-1] + 0.7, -1.4), title=measure, yticks=places,
                 yticklabels=[claim for _, claim, _, _ in lines])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.25)
        for spine in ("left", "top"):
            axis.spines[spine].set_visible(False)
    for paper in CLAIMS:
        y = places[[line[0] for line in lines].index(paper)] - 0.95
        axes[0].text(-0.03, y, paper, transform=axes[0].get_yaxis_transform(), ha="right", va="center",
                     fontweight="bold", fontsize=12)
    figure.supxlabel("difference in percentage points and its 95% confidence interval over seeds; "
                     "green: better, orange: worse, grey: not told apart", fontsize=11)
    figure.savefig(path)


@torch.no_grad()
def draw_localisation(rows: dict, folder: Path, path: Path, objects: int = 4):
    """Where do sentences point, and why? Bars for every row of the table; and for some rows' first seeds the similarity
    of a held-out scene's patches to a sentence about each of its objects, the most similar patch marked."""
    figure, names = new_figure(13, 13), CLAIMS["Localisation"][0]
    upper, lower = figure.subfigures(2, 1, height_ratios=(0.3, 1))
    panels = {"pointing": "sentence's best patch\non its object", "centred": "the same, less the\nmean sentence",
              "zero-shot": "zero-shot class", "patches grouped": "patches with a\nweight above 0",
              "locality": "object's effect on\nits own patches", "group finds its text": "group finds its text;\n"
              "dot: in a wrong image"}
    axes = upper.subplots(1, len(panels), sharey=True)
    for axis, (measure, title) in zip(axes, panels.items()):
        values = [measured(rows[row], measure) for row in names]
        axis.barh(range(len(names)), [v.mean() for v in values], 0.62, color=PALETTE[4],
                  xerr=list(map(deviation, values)), error_kw=dict(lw=1))
        if measure == "group finds its text":
            axis.plot([measured(rows[row], "in a wrong image").mean() for row in names], range(len(names)), "o",
                      color=PALETTE[1])
        axis.set(yticks=range(len(names)), yticklabels=names, title=title, xlabel="%")
        axis.grid(axis="x", alpha=0.25)
    axes[0].invert_yaxis()
    shown = [names[0], *names[2:4], *names[6:]]
    for line, row in zip(lower.subplots(len(shown), 1 + objects), shown):
        model = Model(run_of(folder, row, 0))
        scenes = Scenes("test", 1000, model.config.image_size, model.settings["kinds"])
        facts = next(f for f in map(scenes.scene, range(1000)) if len(f.objects) == objects)
        told = {about: text for text, about in zip(facts.captions["long"], facts.about) if about >= 0}
        texts = [told[about] for about in range(objects)]
        image = torch.from_numpy(scenes.draw(facts)[0]).permute(2, 0, 1)
        patches = model.clip.encode_image(normalize(image[None].to(model.device)))[1][0]
        draw_image(line[0], image)
        line[0].set_title("\n".join(textwrap.wrap(row, 22)), fontsize=11, fontweight="bold")
        for axis, text, sims in zip(line[1:], texts, (patches @ model.texts(texts).T).T.cpu()):
            draw_image(axis, image, ((sims - sims.min()) / (sims.max() - sims.min())).view(model.side, model.side))
            y, x = divmod(int(sims.argmax()), model.side)
            x, y = ((c + 0.5) * model.config.patch - 0.5 for c in (x, y))
            axis.plot(x, y, "o", mfc="none", mec="red", ms=15, mew=2.5)
            axis.set_title("\n".join(textwrap.wrap(text, 28, max_lines=2)) if row == shown[0] else "", fontsize=10)
    figure.savefig(path)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/claims", help="of the runs, tables and figures")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--jobs", type=int, help="runs at once: one a core, or three a GPU")
    parser.add_argument("--train-images", type=int, help="images that each run sees")
    options = parser.parse_args(argv)
    for name in ("seeds", "jobs", "train_images"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    images = dict(images=options.train_images) if options.train_images else {}
    run_claims(Path(options.folder), options.seeds, options.jobs, images)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
