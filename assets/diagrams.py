"""Draw the README's method diagrams from the code itself: real scenes, draws, masks and grouping weights.

    python assets/diagrams.py [FOLDER]                   method-*.png into assets/, or into FOLDER
"""

import random
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from data import draw_texts, read_captions  # noqa: E402  after sys.path
from evaluate import PALETTE, draw_image, new_figure  # noqa: E402
from losses import group_patches  # noqa: E402
from model import class_token_mask, text_mask  # noqa: E402
from scenes import PERSPECTIVES, Scenes  # noqa: E402
from train import resolve  # noqa: E402

KINDS = ListedColormap(["#eeeeee", *PALETTE[:2]])  # of kinds of cells: grey, blue, orange
WIDTH = 9.5  # inches: GitHub shows them in 830 pixels
SCENES = Scenes("test", size=128)
SCENE = SCENES.scene(16)  # it has three objects
PIXELS, MASK = SCENES.draw(SCENE)
# Patches that know what they show, [1, P, 3]: the share of each of 8 x 8 patches that each object covers.
SHOWN = torch.from_numpy(MASK) == torch.tensor([1, 2, 3])[:, None, None]
PATCHES = F.avg_pool2d(SHOWN.float(), 16).flatten(1).mT[None]
FILES = """\
scenes.py    embedded data          recaption.py   new captions for your pictures
↓   pictures with captions
data.py      draws the texts of an image
↓   images [B, 3, S, S]   tokens [B, T, L]
model.py     embeds images and texts
↓   branches [B, H, D]   patches [B, P, D]   summaries [B, T, 1+C, D]
losses.py    compares them
↓   loss
train.py     METHODS: a row each; the loop
↓   checkpoint.pt   metrics.jsonl
evaluate.py  retrieval, classes, patches
"""
STEPS = {  # number of the line -> what each method adds there
    1: ("DreamLIP", "SPARC", "LoTLIP", "Holistic CLIP"),
    2: ("sub-captions", "", "long texts", "perspectives"),
    4: ("", "", "corner tokens", "branches"),
    6: ("many positives,\ngrouping", "grouping\nby token", "", "many to many"),
}


def show(axis, picture, title=""):
    axis.imshow(picture, cmap="Blues")
    axis.set_title(title)
    axis.axis("off")


def cells(axis, kinds, names, title):
    """A matrix of kinds 0 (grey), 1 (blue) and 2 (orange), whose rows and columns have the same names."""
    axis.pcolormesh(kinds, cmap=KINDS, vmin=0, vmax=2, edgecolors="white", lw=1.5)
    axis.set(title=title, aspect="equal", frame_on=False)
    ticks = np.arange(len(names)) + 0.5
    axis.set_xticks(ticks, names, rotation=90)
    axis.set_yticks(ticks, names)
    axis.tick_params(length=0)
    axis.invert_yaxis()


def overview():
    """Data's way through the files, and where each method steps in."""
    figure = new_figure(WIDTH, 5.5)
    axis = figure.subplots()
    axis.set(ylim=(10.5, -0.5))
    axis.axis("off")
    for i, line in enumerate(FILES.splitlines()):
        weight = ("bold", "normal")[i % 2]  # a file, what it hands on, a file ...
        axis.text(0, i, line, va="center", family="monospace", weight=weight)
    for i, steps in STEPS.items():
        for k, step in enumerate(steps, 1):
            frame = dict(fc="white", ec=PALETTE[k], lw=2 * bool(step))
            axis.text(0.408 + 0.132 * k, i, step, va="center", ha="center", bbox=frame)
    return figure


def sparc():
    """The weights of a group under two thresholds, and the three choices of negatives."""
    figure = new_figure(WIDTH, 7.2)
    upper, lower = figure.subplots(2, 3)
    show(upper[0], PIXELS, "t: “envelope”")
    torch.manual_seed(0)
    patches = PATCHES + 0.1 * torch.randn(1, 64, 3)
    token = torch.eye(3)[None, :1]  # [1, 1, 3]: the name of the first object
    for axis, parts in zip(upper[1:], (64, 2)):
        weights = group_patches(patches, token, 1 / parts)[1].view(8, 8)
        show(axis, weights, f"$\\sigma = 1/{parts}$: {(weights > 0).sum()} of 64 patches stay")
    image, slot = np.divmod(np.arange(9), 3)
    compared = {
        "--negatives image": np.equal.outer(image, image),
        "--negatives slot": np.equal.outer(slot, slot),
        "--negatives batch": True,
    }
    names = "1.1 1.2 1.3 2.1 2.2 2.3 3.1 3.2 3.3".split()
    for axis, title in zip(lower, compared):
        cells(axis, compared[title] + np.eye(9), names, title)
    figure.supxlabel("rows: groups, columns: texts, as image.slot; orange: positive, blue: negative, grey: takes no part")
    return figure


def dreamlip():
    """Texts drawn anew at every step; each a positive, each with the patches it groups."""
    captions = read_captions(SCENE.captions)
    settings = resolve(dict(method="dreamlip", size="base-16"))
    steps = []
    for seed in (166, 2):
        texts = draw_texts(captions, settings, random.Random(seed))
        steps.append({text: f"t{k}" for k, (text, _) in enumerate(texts, 1)})
    first, second = steps
    lines = ["step 1  step 2  captions: raw, short, sentences of the long one\n"]
    for text in (captions.raw, *captions.short, *captions.long):
        lines.append(f"{first.get(text, '·'):8}{second.get(text, '·'):8}{text}")
    figure = new_figure(WIDTH, 5.8)
    axes = figure.subplot_mosaic("PTTT\nabcd")
    show(axes["P"], PIXELS)
    axes["T"].text(0, 0.5, "\n".join(lines), va="center", family="monospace", fontsize=10)
    axes["T"].axis("off")
    for text, name in zip(first, "abcd"):
        named = torch.tensor([[[o.name in text for o in SCENE.objects]]]).float()
        weights = group_patches(PATCHES, named)[1]
        draw_image(axes[name], torch.from_numpy(PIXELS).permute(2, 0, 1), weights.view(8, 8))
        axes[name].set_title(f"patches of {first[text]}\n" + textwrap.fill(text, 26))
    return figure


def lotlip():
    """Who sees whom: the text mask with two corner tokens, in a causal and in a bidirectional encoder."""
    names = "start,a,red,star,corner 1,corner 2,end,padding".split(",")
    order = [0, 1, 2, 3, 6, 7, 4, 5]  # in the model's mask the corner tokens stand last
    figure = new_figure(WIDTH, 5.3)
    for axis, title in zip(figure.subplots(1, 2), ("causal", "bidirectional")):
        shape = torch.tensor([4]), 6, 2, title == "causal"  # the end of the text, text places, corners
        seeing = text_mask(*shape, blind=False)[0].int()
        blind = text_mask(*shape, blind=True)[0].int()
        kinds = 2 * seeing - blind
        cells(axis, kinds[order][:, order], names, title)
    figure.supxlabel("rows look at columns; blue: may look, orange: barred by LoTLIP's mask, grey: not visible anyway")
    return figure


def holistic():
    """Blind class tokens, and the text that each branch answers."""
    figure = new_figure(WIDTH, 4.9)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.7, 1, 1.7))
    names = "class 1,class 2,class 3,class 4,class 5,patch 1,patch 2,patch 3".split(",")
    cells(left, 2 - class_token_mask(5, 3).int(), names, "attention of the image tower")
    show(middle, PIXELS)
    right.axis("off")
    for m, name in enumerate(PERSPECTIVES[:5], 1):
        text = textwrap.fill(SCENE.captions[name], 34, max_lines=3)
        right.text(0, 1.17 - 0.22 * m, f"→ $v_{m}$, {name}\n{text}", va="center")
    figure.supxlabel("rows look at columns; blue: may look, orange: barred by Holistic CLIP's mask")
    return figure


if __name__ == "__main__":
    folder = Path(*sys.argv[1:] or [ASSETS])
    for draw in (overview, sparc, dreamlip, lotlip, holistic):
        draw().savefig(folder / f"method-{draw.__name__}.png", dpi=120)
