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


def show(axis, picture, title=""):
    axis.imshow(picture, cmap="Blues")
    axis.set_title(title)
    axis.axis("off")


def cells(axis, kinds, names, title):
    """A matrix of kinds 0 (grey), 1 (blue) and 2 (orange), whose rows and columns have the same names."""
    axis.pcolormesh(kinds, cmap=KINDS, vmin=0, vmax=2,
                    edgecolors="white", lw=1.5)
    axis.set_title(title)
    axis.set_aspect("equal")
    axis.set_frame_on(False)
    ticks = np.arange(len(names)) + 0.5
    axis.set_xticks(ticks, names, rotation=90)
    axis.set_yticks(ticks, names)
    axis.tick_params(length=0)
    axis.invert_yaxis()


def sparc():
    """The weights of a group under two thresholds, and the three choices of negatives."""
    figure = new_figure(WIDTH, 7.2)
    upper, lower = figure.subplots(2, 3)
    show(upper[0], PIXELS, "t: “envelope”")
    torch.manual_seed(0)
    patches = PATCHES + 0.1 * torch.randn(1, 64, 3)
    token = torch.eye(3)[None, :1]  # [1, 1, 3]: the name of the first object
    for axis, parts in zip(upper[1:], (64, 2)):
        _, weights = group_patches(patches, token, 1 / parts)
        kept = (weights > 0).sum()
        show(axis, weights.view(8, 8), f"$\\sigma = 1/{parts}$: {kept} of 64 patches stay")
    image, slot = np.divmod(np.arange(9), 3)
    compared = {
        "--negatives image": np.equal.outer(image, image),
        "--negatives slot": np.equal.outer(slot, slot),
        "--negatives batch": True,
    }
    names = "1.1 1.2 1.3 2.1 2.2 2.3 3.1 3.2 3.3".split()
    for axis, title in zip(lower, compared):
        cells(axis, compared[title] + np.eye(9), names, title)
    figure.supxlabel("rows: groups, columns: texts, as image.slot; "
                     "orange: positive, blue: negative, grey: takes no part")
    return figure


def dreamlip():
    """Texts drawn anew at every step; each a positive, each with the patches it groups."""
    captions = read_captions(SCENE.captions)
    settings = resolve(dict(method="dreamlip", size="base-16"))
    steps = []
    for seed in (166, 2):
        texts = draw_texts(captions, settings, random.Random(seed))
        numbers = {text: f"t{k}" for k, (text, _) in enumerate(texts, 1)}
        steps.append(numbers)
    first, second = steps
    lines = ["step 1  step 2  captions: raw, short, sentences of the long one\n"]
    for text in (captions.raw, *captions.short, *captions.long):
        lines.append(f"{first.get(text, '·'):8}{second.get(text, '·'):8}{text}")
    figure = new_figure(WIDTH, 5.8)
    axes = figure.subplot_mosaic("PTTT\nabcd")
    show(axes["P"], PIXELS)
    table = axes["T"]
    table.text(0, 0.5, "\n".join(lines), va="center", family="monospace", fontsize=10)
    table.axis("off")
    image = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for text, name in zip(first, "abcd"):
        objects = [o.name in text for o in SCENE.objects]
        named = torch.tensor([[objects]]).float()
        _, weights = group_patches(PATCHES, named)
        draw_image(axes[name], image, weights.view(8, 8))
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
        kinds = kinds[order][:, order]
        cells(axis, kinds, names, title)
    figure.supxlabel("rows look at columns; "
                     "blue: may look, orange: barred by LoTLIP's mask, grey: not visible anyway")
    return figure


def holistic():
    """Blind class tokens, and the text that each branch answers."""
    figure = new_figure(WIDTH, 4.9)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.7, 1, 1.7))
    names = "class 1,class 2,class 3,class 4,class 5,patch 1,patch 2,patch 3".split(",")
    mask = class_token_mask(5, 3).int()
    cells(left, 2 - mask, names, "attention of the image tower")
    show(middle, PIXELS)
    right.axis("off")
    for m, name in enumerate(PERSPECTIVES[:5], 1):
        text = textwrap.fill(SCENE.captions[name], 34, max_lines=3)
        right.text(0, 1.17 - 0.22 * m, f"→ $v_{m}$, {name}\n{text}", va="center")
    figure.supxlabel("rows look at columns; blue: may look, orange: barred by Holistic CLIP's mask")
    return figure


if __name__ == "__main__":
    folder = Path(*sys.argv[1:] or [ASSETS])
    for draw in (sparc, dreamlip, lotlip, holistic):
        draw().savefig(folder / f"method-{draw.__name__}.png", dpi=120)
