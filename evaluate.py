"""Evaluate runs: retrieval with short and long captions, zero-shot classification, localisation; every number with its chance level.

    python evaluate.py runs/dreamlip-tiny                         one run, and figures in its folder
    python evaluate.py runs/clip-tiny runs/dreamlip-tiny          several runs in one table
    python evaluate.py runs/holistic-tiny --branch max            how the branches' similarities become one: mean, max, or a branch's number

Image-text similarity of a model with H branches is the mean of the H similarities, as in Holistic CLIP's release.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from data import BadCount, BadSample, Parser, UserError, load_tokenizer, normalize, open_dataset
from losses import group_patches
from model import CLIP, CLIPConfig
from scenes import BACKGROUNDS, COLOURS, KINDS, PERSPECTIVES, article, held_out
from train import check_device, load_checkpoint

TEMPLATES = ("the main object is {0}.", "the largest thing here is {0}.", "a picture of {0}.", "{1}", "{1} clipart")


# ---- models and embeddings -------------------------------------------------------------------------------------------

class Run:
    """A trained model with its tokenizer and settings, from a run's folder or a checkpoint file."""

    def __init__(self, path, device=None):
        path = Path(path)
        checkpoint = load_checkpoint(path / "checkpoint.pt" if path.is_dir() or path.suffix != ".pt" else path)
        self.folder, self.settings = (path.parent if path.suffix == ".pt" else path), checkpoint["settings"]
        self.name, self.device = self.folder.name, device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = CLIP(CLIPConfig(**{k: self.settings[k] for k in CLIPConfig.__dataclass_fields__}))
        self.model.load_state_dict(checkpoint["model"])
        if checkpoint["average"]:
            with torch.no_grad():
                for p, a in zip(self.model.parameters(), checkpoint["average"]):
                    p.copy_(a)
        self.model.to(self.device).eval()
        self.tokenizer = load_tokenizer(self.settings["tokenizer"])
        if self.tokenizer.vocab_size != self.settings["vocab"]:
            raise UserError(f"{path} was trained with a vocabulary of {self.settings['vocab']}, but tokenizer {self.tokenizer.name!r} has {self.tokenizer.vocab_size}")

    @torch.no_grad()
    def images(self, images, batch: int = 250) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [N,3,S,S] -> branches [N,H,D], patches [N,P,D]."""
        parts = [self.model.encode_image(normalize(part.to(self.device))) for part in images.split(batch)]
        return torch.cat([b.cpu() for b, _ in parts]), torch.cat([p.cpu() for _, p in parts])

    @torch.no_grad()
    def texts(self, texts: list[str], batch: int = 1000) -> torch.Tensor:
        """N texts -> [N,D], by their end-of-text (or [CLS]) token alone."""
        tokens = self.tokenizer(texts, self.settings["context"])
        return torch.cat([self.model.encode_texts(part.to(self.device))[0][:, 0].cpu() for part in tokens.split(batch)])


def similarity(branches: torch.Tensor, texts: torch.Tensor, branch: str = "mean") -> torch.Tensor:
    """branches [N,H,D], texts [M,D] -> [N,M]: over the branches the mean, the max, or the one of that number."""
    if branch == "max":
        return torch.einsum("nhd,md->nhm", branches, texts).amax(1)
    return (branches.mean(1) if branch == "mean" else branches[:, int(branch)]) @ texts.T


# ---- metrics ---------------------------------------------------------------------------------------------------------

def recall(scores: torch.Tensor, positive: torch.Tensor, ks=(1, 5, 10)) -> dict[int, float]:
    """scores [Q,C], positive [Q,C] (bool) -> share of the queries with a positive among their k best, in percent.

    A tie counts against the model: the rank is that of the positive behind all equals."""
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    rank = ((scores >= best) & ~positive).sum(1)
    return {k: 100 * (rank < k).double().mean().item() for k in ks}


def retrieval(sim: torch.Tensor, name: str, texts: list[str]) -> dict:
    """sim [N,N], text i belongs to image i -> R@1/5/10 both ways with chance. Images with the very same text are all right answers."""
    same = {}
    owner = torch.tensor([same.setdefault(t, len(same)) for t in texts])
    positive = owner[:, None] == owner[None]
    rows = {}
    for direction, scores in (("T2I", sim.T), ("I2T", sim)):
        for k, value in recall(scores, positive).items():
            rows[f"{name} {direction} R@{k}"] = (value, chance_recall(positive, k))
    return rows


def chance_recall(positive: torch.Tensor, k: int) -> float:
    """Recall at k of a random order, in percent: 1 - the chance that none of a query's m positives is among k of C."""
    C, m = positive.shape[1], positive.sum(1).double()
    missed = torch.stack([((C - m - j) / max(C - j, 1)).clamp_min(0) for j in range(min(k, C))]).prod(0)
    return 100 * (1 - missed).mean().item()


def scene_metrics(run: Run, dataset, branch: str) -> tuple[dict, dict]:
    """All metrics on scenes -> {name: (value, chance)} in percent, and what the figures need."""
    scenes, kinds = dataset.scenes, dataset.scenes.kinds
    facts = [scenes.scene(i) for i in range(len(scenes))]
    drawn = [scenes.draw(scene) for scene in facts]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([mask for _, mask in drawn]))
    branches, patches = run.images(images)
    rows = {}

    captions = [scene.captions for scene in facts]
    rows |= retrieval(similarity(branches, run.texts([c["short"] for c in captions]), branch), "short", [c["short"] for c in captions])
    long = [" ".join(c["long"]) for c in captions]
    rows |= retrieval(similarity(branches, run.texts(long), branch), "long", long)
    sentences = run.texts([t for c in captions for t in c["long"]]).split([len(c["long"]) for c in captions])
    rows |= retrieval(similarity(branches, torch.stack([F.normalize(e.mean(0), dim=0) for e in sentences]), branch), "long by sentence", long)

    names = [name for name, _ in KINDS[:kinds]]
    prompts = run.texts([t.format(article(name), name) for name in names for t in TEMPLATES]).view(kinds, len(TEMPLATES), -1)
    classes = F.normalize(prompts.mean(1), dim=-1)
    main = torch.tensor([scene.objects[0].kind for scene in facts])
    zero_shot = recall(similarity(branches, classes, branch), F.one_hot(main, kinds).bool(), (1, 5))
    rows |= {f"zero-shot top-{k}": (value, 100 * k / kinds) for k, value in zero_shot.items()}

    pairs = run.texts([f"the main object is {article(colour + ' ' + name)}." for name in names for colour in COLOURS])
    target = torch.tensor([scene.objects[0].kind * len(COLOURS) + scene.objects[0].colour for scene in facts])
    unseen = torch.tensor([held_out(scene.objects[0].kind, scene.objects[0].colour) for scene in facts])
    right = similarity(branches, pairs, branch).argmax(1) == target
    for name, which in (("seen", ~unseen), ("unseen", unseen)):
        if which.any():
            rows[f"{name} colour and object"] = (100 * right[which].double().mean().item(), 100 / len(pairs))

    rows |= localisation(run, facts, masks, patches, sentences, names)
    return rows, dict(images=images, masks=masks, facts=facts, branches=branches, patches=patches, captions=captions)


def localisation(run, facts, masks, patches, sentences, names) -> dict:
    """Pointing: is the patch most similar to a sentence about one object (or to the object's name) on the object, that is, does the object's
    mask cover at least 1/16 of it? mIoU: every pixel gets the class whose name its (upsampled) patches resemble most, background included."""
    N, S, patch = len(facts), masks.shape[-1], run.settings["patch"]
    side = S // patch
    named = run.texts([article(name) for name in names])
    hits, chances = {"sentence": [], "name": []}, []
    for i, scene in enumerate(facts):
        for k, about in enumerate(scene.about):
            if about < 0:
                continue
            cover = (masks[i] == about + 1).float().view(side, patch, side, patch).mean((1, 3)).flatten() >= 1 / 16
            chances.append(cover.double().mean().item())
            for query, text in (("sentence", sentences[i][k]), ("name", named[scene.objects[about].kind])):
                hits[query].append(cover[(patches[i] @ text).argmax()].item())
    rows = {f"pointing by {query}": (100 * np.mean(hit), 100 * np.mean(chances)) for query, hit in hits.items()}

    grounds = F.normalize(run.texts([f"the background is plain {ground}." for ground in BACKGROUNDS]).mean(0, keepdim=True), dim=-1)
    classes, C = torch.cat([grounds, named]), len(named) + 1
    confusion = torch.zeros(C, C, dtype=torch.long)
    for i in range(0, N, 100):
        maps = (patches[i:i + 100] @ classes.T).mT.unflatten(-1, (side, side))  # [n, C, side, side]
        guess = F.interpolate(maps, size=(S, S), mode="bilinear").argmax(1)
        kind = torch.stack([torch.tensor([0] + [o.kind + 1 for o in scene.objects])[mask.long()] for scene, mask in zip(facts[i:i + 100], masks[i:i + 100])])
        confusion += torch.bincount((kind * C + guess).flatten(), minlength=C * C).view(C, C)
    truth, total = confusion.sum(1).double(), confusion.sum()
    iou = confusion.diag() / (truth + confusion.sum(0) - confusion.diag()).clamp_min(1)
    by_chance = (truth / C) / (truth + total / C - truth / C)
    rows["mIoU"] = (100 * iou[truth > 0].mean().item(), 100 * by_chance[truth > 0].mean().item())
    return rows


def pair_metrics(run: Run, dataset, n: int, branch: str) -> tuple[dict, dict]:
    """Retrieval on held-out pictures with captions of their own -> {name: (value, chance)}, and what the figures need."""
    samples, bad = [], BadCount()
    for i in range(min(n, len(dataset))):
        try:
            samples.append(dataset[i])
        except BadSample as error:
            bad.add(error)
    if bad:
        print(f"passed over: {bad.report()}")
    images, captions = torch.stack([image for image, _ in samples]), [c for _, c in samples]
    branches, patches = run.images(images)
    raw, long = [c.raw for c in captions], [" ".join(c.long) for c in captions]
    rows = retrieval(similarity(branches, run.texts(raw), branch), "short", raw)
    if long != raw:
        rows |= retrieval(similarity(branches, run.texts(long), branch), "long", long)
    named = [dict(zip(PERSPECTIVES, c.perspectives), long=c.long) for c in captions]
    return rows, dict(images=images, branches=branches, patches=patches, captions=named)


# ---- figures ---------------------------------------------------------------------------------------------------------

def plots():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110, "savefig.bbox": "tight"})
    return plt


def draw_curves(run: Run):
    """curves.png: every loss part against images seen, and the learned multiplier."""
    plt = plots()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    parts = [name for name in ("contrastive", "grouping") if name in lines[0]]
    figure, axes = plt.subplots(1, len(parts) + 1, figsize=(4 * (len(parts) + 1), 3))
    for axis, name in zip(axes, [*parts, "logit_scale"]):
        axis.plot([line["images"] / 1000 for line in lines], [line[name] for line in lines], color="#2c6fbb", lw=1.2)
        axis.set(title=name + (" loss" if name in parts else ""), xlabel="thousand images seen")
        axis.grid(alpha=0.25)
    figure.suptitle(run.name)
    figure.tight_layout()
    figure.savefig(run.folder / "curves.png")
    plt.close(figure)


def draw_groups(run: Run, found: dict, pictures: int = 4, sentences: int = 6):
    """patches.png: held-out pictures, and over each the weights of the patches that each of its sentences grouped."""
    plt = plots()
    import textwrap
    chosen = np.linspace(0, len(found["images"]) - 1, min(pictures, len(found["images"]))).astype(int)
    texts = [list(dict.fromkeys([*found["captions"][i]["long"], found["captions"][i]["raw"]]))[:sentences] for i in chosen]
    columns = 1 + max(map(len, texts))
    figure, axes = plt.subplots(len(chosen), columns, figsize=(1.75 * columns, 2.25 * len(chosen)), squeeze=False)
    for row, (i, shown) in enumerate(zip(chosen, texts)):
        picture = found["images"][i].permute(1, 2, 0).numpy()
        side = run.settings["image_size"] // run.settings["patch"]
        _, weights = group_patches(found["patches"][i:i + 1], run.texts(shown)[None], run.settings["threshold"])
        for axis in axes[row]:
            axis.axis("off")
        axes[row, 0].imshow(picture)
        for axis, text, weight in zip(axes[row, 1:], shown, weights[0]):
            heat = weight.view(side, side) / weight.max().clamp_min(1e-9)
            axis.imshow(picture)
            axis.imshow(np.ones_like(picture[..., 0]), cmap="gray", vmin=0, vmax=1,
                        alpha=0.9 * (1 - np.kron(heat.numpy() ** 2, np.ones((run.settings["patch"],) * 2))))
            axis.set_title(textwrap.fill(text, 24), fontsize=7.5)
    figure.suptitle(f"{run.name}: the patches each sentence groups (bright: much weight)", fontsize=11)
    figure.tight_layout()
    figure.savefig(run.folder / "patches.png", dpi=130)
    plt.close(figure)


def draw_branches(run: Run, found: dict):
    """branches.png: how much more similar branch h is to perspective m of its own picture than to that of other pictures."""
    plt = plots()
    names = [name for name in PERSPECTIVES if all(name in c for c in found["captions"])]
    matrix = np.zeros((found["branches"].shape[1], len(names)))
    for m, name in enumerate(names):
        texts = run.texts([c[name] for c in found["captions"]])
        for h in range(len(matrix)):
            sim = found["branches"][:, h] @ texts.T
            matrix[h, m] = (sim.diag().mean() - sim.mean()).item()
    figure, axis = plt.subplots(figsize=(1.3 * len(names) + 1.5, 0.6 * len(matrix) + 1.6))
    shown = axis.imshow(matrix, cmap="viridis", aspect="auto")
    axis.set(xticks=range(len(names)), xticklabels=names, yticks=range(len(matrix)), yticklabels=[f"branch {h}" for h in range(len(matrix))])
    for (h, m), value in np.ndenumerate(matrix):
        axis.text(m, h, f"{value:.2f}", ha="center", va="center", color="white" if value < (matrix.min() + matrix.max()) / 2 else "black")
    axis.set_title("similarity to the own picture's text above the mean", fontsize=10)
    figure.colorbar(shown)
    figure.savefig(run.folder / "branches.png")
    plt.close(figure)


# ---- reports ---------------------------------------------------------------------------------------------------------

def evaluate_run(path, n: int | None = None, branch: str = "mean", data: str | None = None, figures: bool = True, device=None) -> dict:
    """Evaluates one run on its held-out data, writes evaluation.json and figures into its folder -> {metric: (value, chance)}."""
    run = Run(path, device)
    s = run.settings
    H = s["branches"]
    if branch not in ("mean", "max") and not (branch.isdigit() and int(branch) < H):
        raise UserError(f"--branch {branch}: this model has {H} branch{'es' * (H > 1)}; take mean, max or a number below {H}")
    data, n = data or s["data"], n or s["eval_images"] or 1000
    name = data if isinstance(data, str) else " ".join(data)
    where = dict(image_root=s.get("image_root"), caption_fields=s.get("caption_fields", ""))
    dataset = open_dataset(data, "test", n, s["image_size"], s["kinds"], **where)
    if hasattr(dataset, "scenes"):
        rows, found = scene_metrics(run, dataset, branch)
    else:
        rows, found = pair_metrics(run, dataset, n, branch)
    (run.folder / "evaluation.json").write_text(json.dumps(
        {"data": name, "images": len(found["images"]), "branch": branch, "metrics": {k: {"value": v, "chance": c} for k, (v, c) in rows.items()}}, indent=1))
    written = []
    if figures:
        if (run.folder / "metrics.jsonl").exists():
            draw_curves(run)
        draw_groups(run, found)
        if run.model.config.branches > 1:
            draw_branches(run, found)
        written = sorted(p.name for p in run.folder.glob("*.png"))
    print(table({run.name: rows}))
    print(f"{len(found['images'])} held-out images of {name}; " + (f"figures in {run.folder}: {', '.join(written)}" if written else ""))
    return rows


def table(results: dict[str, dict]) -> str:
    """{run: {metric: (value, chance)}} -> markdown, a row a metric, a column a run, chance last."""
    names = list(dict.fromkeys(name for rows in results.values() for name in rows))
    lines = ["| metric, % | " + " | ".join(results) + " | chance |", "|---|" + "---:|" * (len(results) + 1)]
    for name in names:
        values = [f"{rows[name][0]:.1f}" if name in rows else "" for rows in results.values()]
        chance = next(rows[name][1] for rows in results.values() if name in rows)
        lines.append(f"| {name} | " + " | ".join(values) + f" | {chance:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or checkpoint files")
    parser.add_argument("--data", nargs="+", help="evaluate on this instead of the run's own data")
    parser.add_argument("--images", type=int, help="held-out images to use")
    parser.add_argument("--branch", default="mean", help="mean, max, or the number of a branch")
    parser.add_argument("--device")
    parser.add_argument("--no-figures", action="store_true")
    try:
        options = parser.parse_args()
        if options.images is not None and options.images < 1:
            raise UserError(f"--images must be at least 1, not {options.images}")
        check_device(options.device or "cpu")
        results = {Path(run).name: evaluate_run(run, options.images, options.branch, options.data, not options.no_figures, options.device) for run in options.runs}
        if len(results) > 1:
            print("\n" + table(results))
    except UserError as error:
        sys.exit(f"error: {error}")
