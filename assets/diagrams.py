"""Draw the README's method diagrams from the code itself: real scenes, draws, masks and grouping weights.

    python assets/diagrams.py [FOLDER]                   method-*.png into assets/, or into FOLDER
"""

import io
import random
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.patches import Rectangle
from PIL import Image

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from data import Captions, draw_texts, load_tokenizer  # noqa: E402  after sys.path
from evaluate import PALETTE, draw_image, new_figure  # noqa: E402
from losses import group_patches  # noqa: E402
from model import class_token_mask, text_mask  # noqa: E402
from scenes import PERSPECTIVES, Scenes  # noqa: E402
from train import METHODS, resolve  # noqa: E402

BLUE, ORANGE, GREEN, PINK, SKY, AMBER, BLACK, GREY = PALETTE
WIDTH = 8.3  # inches: at 100 dpi GitHub's 830 pixels, so that 10 pt is 14 pixels there
SIDE, GRID = 128, 8  # of the scenes drawn here, in pixels and in patches
SCENES = Scenes("test", 100, SIDE)


def canvas(axis):
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.axis("off")
    return axis


def box(axis, x, y, width, height, text, colour, fontsize=9.5):
    axis.add_patch(Rectangle((x, y), width, height, fc=to_rgba(colour, 0.14), ec=colour))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=fontsize)


def arrow(axis, start, end, colour=GREY, **style):
    axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=colour, shrinkA=0, shrinkB=0, **style))


def cells(axis, kinds, colours, rows, columns, title, turn=90):
    """A matrix of kinds 0, 1, 2 ..., each in its colour, with names beside it."""
    axis.imshow(kinds, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1)
    axis.set(xticks=range(len(columns)), yticks=range(len(rows)), yticklabels=rows)
    axis.set_xticklabels(columns)
    axis.set_title(title, fontsize=10)
    axis.set_xticks(np.arange(0.5, len(columns)), minor=True)
    axis.set_yticks(np.arange(0.5, len(rows)), minor=True)
    axis.grid(which="minor", color="white", lw=1.5)
    axis.tick_params(which="both", length=0, labelsize=9)
    axis.tick_params(axis="x", rotation=turn)
    axis.spines[:].set_visible(False)


def legend(figure, entries):
    handles = [Rectangle((0, 0), 1, 1, fc=colour) for colour in entries]
    figure.legend(handles, entries.values(), loc="outside lower center", ncols=len(entries), fontsize=9.5,
                  handlelength=1, handleheight=1)


def patches_of(scene):
    """Patches that know what they show: how much of each is background and each object, unit-norm [1, P, 1+objects]."""
    mask = F.one_hot(torch.from_numpy(SCENES.draw(scene)[1]).long(), 1 + len(scene.objects))
    shares = F.avg_pool2d(mask.permute(2, 0, 1).float(), SIDE // GRID)
    return F.normalize(shares.flatten(1).mT, dim=-1)[None]


def picture(axis, scene, grid=False):
    axis.imshow(SCENES.draw(scene)[0])
    for line in range(SIDE // GRID, SIDE * grid, SIDE // GRID):
        axis.axhline(line - 0.5, color="white", lw=0.6)
        axis.axvline(line - 0.5, color="white", lw=0.6)
    axis.axis("off")


def overview():
    """Data's way through the files, and where each method steps in."""
    figure = new_figure(WIDTH, 5.3, layout=None)
    axis = canvas(figure.add_axes((0.01, 0.01, 0.98, 0.98)))
    axis.set(xlim=(-0.003, 1.003))
    rows = [  # file, what it does, what it hands on, who steps in here
        ("data.py", "draws the texts of an image", "images [B, 3, S, S]   tokens [B, T, L]",
         (("DreamLIP", "sub-captions", GREEN), ("LoTLIP", "long texts", ORANGE), ("Holistic", "perspectives", PINK))),
        ("model.py", "embeds images and texts",
         "branches [B, H, D]   patches [B, P, D]   summaries [B, T, 1+C, D]",
         (("LoTLIP", "corner tokens", ORANGE), ("Holistic", "branches", PINK))),
        ("losses.py", "compares them", "loss",
         (("DreamLIP", "many positives, grouping", GREEN), ("SPARC", "grouping by token", SKY),
          ("Holistic", "many to many", PINK))),
        ("train.py", "METHODS: a row each; the loop", "checkpoint.pt   metrics.jsonl", ()),
        ("evaluate.py", "retrieval, classes, patches", "", ()),
    ]
    box(axis, 0, 0.885, 0.215, 0.1, "scenes.py\nembedded data", GREY)
    box(axis, 0.245, 0.885, 0.215, 0.1, "your pictures, with\ntexts by recaption.py", GREY)
    arrow(axis, (0.11, 0.885), (0.11, 0.805))
    arrow(axis, (0.35, 0.885), (0.35, 0.805))
    for i, (file, does, hands, methods) in enumerate(rows):
        y = 0.7 - 0.172 * i
        box(axis, 0, y, 0.46, 0.1, "", BLUE)
        axis.text(0.02, y + 0.05, file, va="center", weight="bold", fontsize=10.5)
        axis.text(0.17, y + 0.05, does, va="center", fontsize=9.5)
        if hands:
            arrow(axis, (0.11, y), (0.11, y - 0.068))
            axis.text(0.135, y - 0.036, hands, va="center", fontsize=9, color="#444444", family="monospace")
        for j, (name, what, colour) in enumerate(methods):
            box(axis, 0.48 + 0.173 * j, y, 0.165, 0.1, f"{name}\n" + textwrap.fill(what, 16), colour, fontsize=9)
    return figure


def clip():
    """InfoNCE: every image against every text of the batch."""
    figure = new_figure(WIDTH, 3.7, layout=None)
    axis = canvas(figure.add_axes((0, 0, 1, 1)))
    chosen = [SCENES.scene(i) for i in (4, 9, 13, 15)]
    left, top, wide, high = 0.9, 0.52, 1.4, 0.7
    for i, scene in enumerate(chosen):
        axis.imshow(SCENES.draw(scene)[0], extent=(left - 0.8, left - 0.16, top + high * i + 0.64, top + high * i))
        axis.text(left + wide * (i + 0.5) - 0.05, top - 0.07, textwrap.fill(scene.captions["raw"], 19), ha="center",
                  va="bottom", fontsize=9.5)
        for j in range(len(chosen)):
            colour = GREEN if i == j else GREY
            axis.add_patch(Rectangle((left + wide * j, top + high * i), wide - 0.08, high - 0.08, lw=0,
                                     fc=to_rgba(colour, 0.75 if i == j else 0.2)))
            axis.text(left + wide * (j + 0.47), top + high * (i + 0.45), f"$s\\cdot v_{i + 1}\\cdot t_{j + 1}$",
                      ha="center", va="center", fontsize=11, color="white" if i == j else BLACK)
    axis.set(xlim=(0, WIDTH), ylim=(3.7, 0), aspect="auto")
    axis.text(left + 2 * wide, 3.5, "green: the positive of its row and of its column; grey: their negatives",
              ha="center", fontsize=9.5)
    axis.text(left + 4 * wide + 0.1, top + 2 * high, "softmax of each row:\nwhich text belongs\nto the image?\n\n"
              "softmax of each\ncolumn: which image\nbelongs to the text?", va="center", fontsize=9.5)
    return figure


def sparc():
    """The weights of a group step by step, and the three choices of negatives."""
    scene = SCENES.scene(16)
    figure = new_figure(WIDTH, 5.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    main = F.one_hot(torch.tensor([[1]]), 1 + len(scene.objects)).float()  # [1, 1, 1+objects]: the first object's name
    noise = 0.2 * torch.randn(1, 64, main.shape[-1], generator=torch.Generator().manual_seed(0))
    patches = F.normalize(patches_of(scene) + noise, dim=-1)
    similar = (main @ patches.mT)[0, 0]
    scaled = (similar - similar.min()) / (similar.max() - similar.min())
    paper, high = (group_patches(patches, main, threshold)[1] for threshold in (None, 0.5))
    steps = [("similarity\n$\\langle t,\\, patch_p \\rangle$", similar / 2 + 0.5),  # from -1 .. 1, for the colours
             ("min-max\nover the patches", scaled)]
    steps += [(f"$\\sigma = {name}$: {int((w[0, 0] > 0).sum())} of {w.shape[-1]}\npatches stay", w[0, 0] / w.max())
              for name, w in (("1/P", paper), ("0.5", high))]
    first, *axes = upper.subplots(1, 1 + len(steps))
    picture(first, scene, grid=True)
    first.set_title(f"t: \u201c{scene.objects[0].name}\u201d\n", fontsize=10)
    for axis, (title, values) in zip(axes, steps):
        axis.imshow(values.view(GRID, GRID), cmap="Blues", vmin=0, vmax=1.1)
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    B, K = 3, 3
    image, slot = np.divmod(np.arange(B * K), K)
    allowed = {"--negatives image\nother texts of the image (papers)": image[:, None] == image,
               "--negatives slot\nsame slot of other images": slot[:, None] == slot,
               "--negatives batch\nall (DreamLIP's code)": np.full((B * K, B * K), True)}
    names = [f"$t_{{{i + 1}{k + 1}}}$" for i, k in zip(image, slot)]
    for axis, (title, where) in zip(lower.subplots(1, 3), allowed.items()):
        cells(axis, where + np.eye(B * K), ("#f0f0f0", SKY, GREEN), names, names, title, turn=0)
        axis.set_yticklabels([name.replace("t", "g") for name in names])
    legend(figure, {GREEN: "positive", SKY: "negative", "#f0f0f0": "takes no part"})
    return figure


def dreamlip():
    """Texts drawn anew at every step; each a positive, each with the patches it groups."""
    scene, s = SCENES.scene(16), resolve(dict(method="dreamlip", size="base-16", device="cpu"))
    c = scene.captions
    captions = Captions(c["raw"], [c["short"]], c["long"], [])
    draws = [[text for text, _ in draw_texts(captions, s, random.Random(seed))] for seed in (10, 2)]
    figure = new_figure(WIDTH, 5.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.05, 1))
    left, right = upper.subplots(1, 2, width_ratios=(1, 2.9))
    picture(left, scene)
    canvas(right)
    pool = [("raw", c["raw"]), ("short", c["short"]), *(("long", sentence) for sentence in c["long"])]
    for i, (kind, text) in enumerate(pool):
        y = 0.9 - 0.092 * i
        right.text(0.09, y, kind, fontsize=9.5, color="#666666", va="center", ha="right")
        right.text(0.11, y, text, fontsize=9.5, va="center")
        for column, drawn in enumerate(draws):
            slot = drawn.index(text) + 1 if text in drawn else 0
            right.text(0.86 + 0.1 * column, y, f"$t_{slot}$" if slot else "·", ha="center", va="center",
                       fontsize=11, color=GREEN if slot else GREY)
    for column in range(2):
        right.text(0.86 + 0.1 * column, 0.99, f"step {column + 1}", ha="center", fontsize=9.5, va="center")
    image = torch.from_numpy(SCENES.draw(scene)[0]).permute(2, 0, 1)
    named = [[not any(o.name in text for o in scene.objects), *(o.name in text for o in scene.objects)]
             for text in draws[0]]
    _, weights = group_patches(patches_of(scene), F.normalize(torch.tensor(named).float(), dim=-1)[None])
    for slot, (axis, text, weight) in enumerate(zip(lower.subplots(1, len(named)), draws[0], weights[0]), 1):
        draw_image(axis, image, weight.view(GRID, GRID))
        axis.set_title(f"$g_{slot}$: patches of $t_{slot}$\n" + textwrap.fill(text, 24), fontsize=9.5)
    return figure


def lotlip():
    """Who sees whom: the text mask with two corner tokens, in a causal and in a bidirectional encoder."""
    tokenizer, C = load_tokenizer("scenes"), 2
    ids = tokenizer(["a red star"], 77)[0]
    end = int(ids.argmax())
    ids, L = ids[:end + 2], end + 2  # one place of padding
    words = [tokenizer.decode([int(i)]).strip() for i in ids[1:end]]
    figure = new_figure(WIDTH, 4.7)
    for axis, causal in zip(figure.subplots(1, 2), (True, False)):
        blind, seeing = (text_mask(torch.tensor([end]), L, C, causal, b)[0] for b in (True, False))
        names = ["start" if causal else "[CLS]", *words, "end", "padding", *(f"corner {i + 1}" for i in range(C))]
        order = [*range(end), *range(L, L + C), end, L - 1] if causal else [0, *range(L, L + C), *range(1, L)]
        kinds = (blind.int() + 2 * (seeing & ~blind))[order][:, order]
        names = [names[i] for i in order]
        cells(axis, kinds, ("#f0f0f0", BLUE, ORANGE), names, names,
              "causal (CLIP's, the default)" if causal else "bidirectional (the paper's)")
        axis.set(xlabel="is looked at", ylabel="looks")
    legend(figure, {BLUE: "may look", ORANGE: "barred by LoTLIP's mask", "#f0f0f0": "not visible anyway"})
    return figure


def holistic():
    """Blind class tokens, and the text that each branch answers."""
    T, P = METHODS["holistic"]["branches"], 4
    scene = SCENES.scene(0)
    figure = new_figure(WIDTH, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    names = [f"class {h + 1}" for h in range(T)] + [f"patch {p + 1}" for p in range(P)]
    cells(left, class_token_mask(T, P).int(), (ORANGE, BLUE), names, names, "attention of the image tower")
    left.set(xlabel="is looked at", ylabel="looks")
    canvas(right)
    right.set_title("branch m answers text m", fontsize=10)
    inset = right.inset_axes((-0.02, 0.28, 0.34, 0.44))
    picture(inset, scene)
    for m, name in enumerate(PERSPECTIVES[:T]):
        y, colour = 0.9 - 0.2 * m, PALETTE[m]
        arrow(right, (0.32, 0.5), (0.39, y), lw=1)
        box(right, 0.4, y - 0.045, 0.08, 0.09, f"$v_{m + 1}$", colour, fontsize=10.5)
        arrow(right, (0.485, y), (0.54, y), colour, lw=1.5)
        right.text(0.55, y, f"{name.replace('_', ' ')}\n" + textwrap.fill(scene.captions[name], 34, max_lines=3),
                   va="center", fontsize=9.5)
    legend(figure, {BLUE: "may look", ORANGE: "barred by Holistic CLIP's mask"})
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS
    for draw in (overview, clip, sparc, dreamlip, lotlip, holistic):
        drawn = io.BytesIO()
        draw().savefig(drawn, dpi=150)
        file = folder / f"method-{draw.__name__}.png"
        Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
