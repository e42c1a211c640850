"""Pictogram scenes: the embedded data. Images, captions of every kind, and masks, drawn from nothing but an index.

    python scenes.py --sheet scenes.png          a contact sheet with captions and masks
    python scenes.py --speed                     scenes drawn per second on one core

A scene holds 2 to 6 objects, each a pictograph of matplotlib's DejaVu Sans with a colour, a size and a place, on a
plain, graded, striped or checkered background, in a global style (clean, grainy, dim or faded). Exactly one object is
large: the main one. From the same facts come the texts the papers use:

    raw                a web caption: short, noisy, often without the colour, now and then wrong (CLIP's training text)
    short              one sentence naming the main object and one other with their colours (DreamLIP's short caption)
    long               6 to 12 shuffled sentences, each describing a part (DreamLIP's and LoTLIP's long caption)
    details, main_object, background, style, few_words       the perspectives of Holistic CLIP

Scene (split, index) is always the same scene; the splits share no index and no random stream. A tenth of the
colour-object pairs (one colour of every kind) is never drawn in training, so that composition can be tested
(`held_out`).
"""

import argparse
import functools
import os
import random
import sys
import time
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageFont

# The kinds, most distinct silhouettes first: a run with k kinds uses the first k.
KINDS = [
    ("umbrella", "☂"), ("anchor", "⚓"), ("skull", "☠"), ("cloud", "☁"), ("star", "★"), ("heart", "♥"),
    ("telephone", "☎"), ("airplane", "✈"), ("envelope", "✉"), ("chess knight", "♞"), ("sun", "☀"), ("gear", "⚙"),
    ("flag", "⚑"), ("clover", "☘"), ("music note", "♫"), ("cross", "✚"), ("pickaxe", "⚒"),
    ("yin yang", "☯"), ("check mark", "✔"), ("arrow", "➤"), ("triangle", "▲"), ("pointing hand", "☛"),
    ("chess rook", "♜"), ("crescent", "☪"), ("pair of scissors", "✂"), ("moon", "☽"), ("balance", "⚖"),
    ("snowflake", "❄"), ("house", "⌂"), ("spade", "♠"), ("diamond", "♦"), ("snowman", "☃"), ("smiley", "☺"),
    ("radiation sign", "☢"), ("biohazard sign", "☣"), ("peace sign", "☮"), ("ship wheel", "☸"),
    ("lightning bolt", "⚡"), ("atom", "⚛"), ("lily", "⚜"), ("pair of swords", "⚔"), ("wheelchair", "♿"),
    ("recycling sign", "♻"), ("warning sign", "⚠"), ("pen", "✒"), ("writing hand", "✍"), ("trident", "♆"),
    ("ankh", "☥"), ("chess king", "♚"), ("chess queen", "♛"), ("chess bishop", "♝"), ("chess pawn", "♟"),
    ("club", "♣"), ("daisy", "✿"), ("pentagon", "⬟"), ("hexagon", "⬢"), ("disc", "●"), ("square", "■"), ("ring", "◎"),
    ("keyboard", "⌨"), ("hot spring", "♨"), ("comet", "☄"), ("cup", "☕"), ("mouse face", "🐭"), ("cow face", "🐮"),
    ("cat face", "🐱"), ("monkey face", "🐵"), ("frowning face", "☹"), ("maltese cross", "✠"), ("star of david", "✡"),
    ("asterisk", "✱"), ("sharp sign", "♯"), ("dice", "⚄"), ("playing card", "🂡"), ("victory hand", "✌"),
    ("caduceus", "☤"), ("alembic", "⚗"), ("coffin", "⚰"), ("urn", "⚱"), ("pencil", "✎"), ("floral heart", "❦"),
    ("command sign", "⌘"), ("eject sign", "⏏"),
]
COLOURS = {
    "red": (220, 30, 35), "orange": (245, 125, 20), "yellow": (225, 185, 0), "green": (30, 145, 50),
    "teal": (0, 160, 165), "blue": (40, 70, 220), "purple": (130, 40, 170), "pink": (240, 90, 175),
    "brown": (120, 70, 30), "black": (25, 25, 25),
}
BACKGROUNDS = {
    "white": (250, 250, 250), "cream": (250, 240, 210), "sky": (200, 225, 250), "mint": (205, 240, 215),
    "lavender": (225, 215, 245), "peach": (250, 220, 200), "silver": (205, 208, 212), "rose": (248, 210, 220),
}
PATTERNS, STYLES = ("plain", "graded", "striped", "checkered"), ("clean", "grainy", "dim", "faded")
SIDES = {"small": (0.22, 0.27), "medium": (0.29, 0.35), "large": (0.46, 0.54)}  # glyph side as a share of the image's
PLACES = [["upper left", "top", "upper right"], ["left", "centre", "right"], ["lower left", "bottom", "lower right"]]
PERSPECTIVES = ("raw", "details", "main_object", "background", "style", "few_words")
SPLITS = ("train", "validation", "test")


def held_out(kind: int, colour: int) -> bool:
    """Whether this colour of this kind of object is kept out of the training split: one in ten, of every kind."""
    return colour == (kind * 3 + kind // 10) % len(COLOURS)


@dataclass
class Object:
    kind: int  # index into KINDS
    colour: int  # index into COLOURS
    size: str
    side: float  # of the glyph's box, as a share of the image
    x: float  # centre, as a share of the image
    y: float

    name = property(lambda self: KINDS[self.kind][0])
    colour_name = property(lambda self: list(COLOURS)[self.colour])
    place = property(lambda self: PLACES[min(int(self.y * 3), 2)][min(int(self.x * 3), 2)])


@dataclass
class Scene:
    objects: list  # of Object; the first is the main (large) one
    pattern: str
    ground: tuple  # one or two names of BACKGROUNDS
    style: str
    seed: int
    captions: dict  # field -> str, or list of sentences ("long")
    about: list  # for every sentence of the long caption, the index of the one object it describes, or -1


class Scenes:
    """`n` scenes of one split, numbered 0..n-1, at `size` pixels with the first `kinds` kinds of object.

    `scene(i)` gives the facts and the captions, `draw(scene)` the image uint8 [S, S, 3] and the mask uint8 [S, S],
    whose value is 0 for background and 1 + the object's index elsewhere, `boxes(scene)` the places of the long
    caption's sentences."""

    def __init__(self, split: str = "train", n: int = 40_000, size: int = 64, kinds: int = 24):
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: choose from {', '.join(SPLITS)}")
        if not 6 <= kinds <= len(KINDS):
            raise ValueError(f"kinds of object must be 6 to {len(KINDS)}, not {kinds}")
        self.split, self.n, self.size, self.kinds = split, n, size, kinds

    def __len__(self):
        return self.n

    def scene(self, i: int) -> Scene:
        rng = random.Random(i * len(SPLITS) + SPLITS.index(self.split))
        objects = []
        while len(objects) < 2:  # a main object that leaves no room for a second one is drawn again
            objects = self._layout(rng, rng.choices((2, 3, 4, 5, 6), (34, 34, 18, 9, 5))[0])
        pattern = rng.choices(PATTERNS, (49, 17, 17, 17))[0]
        ground = tuple(rng.sample(list(BACKGROUNDS), 1 if pattern == "plain" else 2))
        style = rng.choices(STYLES, (61, 13, 13, 13))[0]
        captions, about = describe(rng, objects, pattern, ground, style, self.kinds)
        return Scene(objects, pattern, ground, style, rng.getrandbits(32), captions, about)

    def _layout(self, rng, count):
        objects = []
        for k, kind in enumerate(rng.sample(range(self.kinds), count)):
            colour = rng.randrange(len(COLOURS))
            while self.split == "train" and held_out(kind, colour):
                colour = rng.randrange(len(COLOURS))
            size = "large" if k == 0 else rng.choice(("small", "medium"))
            placed = self._place(rng, objects, rng.uniform(*SIDES[size]))
            if placed is not None:
                objects.append(Object(kind, colour, size, *placed))
        return objects

    @staticmethod
    def _place(rng, objects, side):
        """A centre at which a box of this side hardly overlaps the boxes placed before, or None after many tries."""
        for _ in range(60):
            x, y = rng.uniform(side / 2, 1 - side / 2), rng.uniform(side / 2, 1 - side / 2)
            if all(max(abs(x - o.x), abs(y - o.y)) > 0.46 * (side + o.side) for o in objects):
                return side, x, y
        return None

    def draw(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        size, mask = self.size, np.zeros((self.size, self.size), np.uint8)
        image = background(scene.pattern, scene.ground, size, scene.seed % 4).copy()
        for k, o in enumerate(scene.objects):
            alpha = glyph(o.kind, self._pixels(o))
            h, w = alpha.shape
            top, left = round(o.y * size - h / 2), round(o.x * size - w / 2)
            t, l, b, r = max(top, 0), max(left, 0), min(top + h, size), min(left + w, size)
            alpha = alpha[t - top:b - top, l - left:r - left]
            patch = image[t:b, l:r]
            patch += alpha[..., None] * (np.float32(COLOURS[o.colour_name]) - patch)
            mask[t:b, l:r][alpha > 0.5] = k + 1
        if scene.style == "dim":
            image *= 0.7
        elif scene.style == "faded":
            image = 255 - 0.65 * (255 - image)
        elif scene.style == "grainy":
            image += np.random.default_rng(scene.seed).normal(0, 12, image.shape[:2]).astype(np.float32)[..., None]
        return image.clip(0, 255).astype(np.uint8), mask

    def _pixels(self, o):
        return max(6, round(o.side * self.size))

    def boxes(self, scene: Scene) -> list:
        """For every sentence of the long caption the box (x0, y0, x1, y1), as shares of the image, of the one object it
        describes, or None."""
        boxes = []
        for o in scene.objects:
            reach = (self._pixels(o) + 1) / 2 / self.size  # drawing rounds the place by up to half a pixel
            boxes.append((max(o.x - reach, 0), max(o.y - reach, 0), min(o.x + reach, 1), min(o.y + reach, 1)))
        boxes.append(None)  # for -1
        return [boxes[k] for k in scene.about]


@functools.cache
def font():
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 160)


@functools.lru_cache(maxsize=20_000)
def glyph(kind: int, side: int) -> np.ndarray:
    """The pictograph's opacity, float32 in 0..1, cropped to its ink and scaled to `side` pixels on its longer side."""
    mask = font().getmask(KINDS[kind][1])
    ink = Image.frombytes("L", mask.size, bytes(mask))
    ink = ink.crop(ink.getbbox())
    scale = side / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BOX)
    return np.asarray(ink, np.float32) / 255


@functools.lru_cache(maxsize=2_000)
def background(pattern: str, ground: tuple, size: int, variant: int) -> np.ndarray:
    """float32 [S, S, 3] in 0..255. `variant`, 0 to 3: the direction of a gradient or of stripes, the size of checks."""
    first, second = np.float32(BACKGROUNDS[ground[0]]), np.float32(BACKGROUNDS[ground[-1]])
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    if pattern == "graded":
        share = (y, x, (x + y) / 2, (x + 1 - y) / 2)[variant]
    elif pattern == "striped":
        share = (y, x, x + y, x + 1 - y)[variant] * 4 % 1 < 0.5
    elif pattern == "checkered":
        share = ((x * (3 + variant)).astype(int) + (y * (3 + variant)).astype(int)) % 2
    else:
        share = np.zeros_like(x)
    return first + share[..., None].astype(np.float32) * (second - first)


# Texts. Every template names its object; colour, size and place come and go, so that a sentence describes its part
# partially.

def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(rng, o, colour=0.8, size=0.4):
    """A noun phrase such as "a small red umbrella", with the colour and the size each present with its probability."""
    words = [o.name]
    if rng.random() < colour:
        words.insert(0, o.colour_name)
    if rng.random() < size:
        words.insert(0, rng.choice({"small": ("small", "little", "tiny"), "medium": ("medium-sized",),
                                    "large": ("large", "big", "huge")}[o.size]))
    return article(" ".join(words))


def where(rng, o):
    place = o.place
    if place == "centre":
        return rng.choice(("in the centre", "in the middle of the picture", "near the centre"))
    if " " in place:
        return rng.choice((f"in the {place} corner", f"at the {place}", f"in the {place} of the picture"))
    return {"top": "near the top", "bottom": "near the bottom", "left": "on the left", "right": "on the right"}[place]


def object_sentence(rng, o):
    thing, place = phrase(rng, o), where(rng, o)
    text = rng.choice((
        "{thing} is {place}.", "there is {thing} {place}.", "{place} there is {thing}.", "{place} we see {thing}.",
        "one can see {thing} {place}.", "{thing} can be seen {place}.", "{thing} sits {place}.",
        "the picture shows {thing} {place}.",
    )) if rng.random() < 0.85 else rng.choice((
        "there is {thing}.", "the picture also has {thing}.", "we notice {thing}."))
    return capital(text.format(thing=thing, place=place))


def main_sentence(rng, o):
    return capital(rng.choice((
        "the main object is {thing}.", "{thing} takes up most of the picture.", "{thing} dominates the scene.",
        "the largest thing here is {thing}.", "the picture is about {thing}.",
    )).format(thing=phrase(rng, o, size=0.6)))


def relation_sentence(rng, objects):
    a, b = rng.sample(objects, 2)
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) > abs(dy):
        relation = rng.choice(("to the left of", "left of")) if dx > 0 else rng.choice(("to the right of", "right of"))
    else:
        relation = rng.choice(("above", "higher than")) if dy > 0 else rng.choice(("below", "lower than"))
    first, second = (f"the {o.colour_name + ' ' if rng.random() < 0.4 else ''}{o.name}" for o in (a, b))
    return capital(rng.choice((f"{first} is {relation} {second}.", f"{relation} {second} is {first}.",
                               f"{first} can be found {relation} {second}.")))


def background_sentence(rng, pattern, ground):
    text = rng.choice({
        "plain": ("the background is plain {0}.", "everything stands on a plain {0} background.",
                  "behind it all is a {0} wall."),
        "graded": ("the background fades from {0} to {1}.", "behind the objects {0} turns slowly into {1}.",
                   "there is a gradient of {0} and {1} in the background."),
        "striped": ("the background has stripes of {0} and {1}.", "the wall is striped in {0} and {1}.",
                    "{0} and {1} stripes fill the background."),
        "checkered": ("the background is checkered in {0} and {1}.", "{0} and {1} squares tile the background.",
                      "the backdrop is a checkerboard of {0} and {1}."),
    }[pattern])
    names = ground if pattern == "graded" else rng.sample(ground, len(ground))  # a gradient goes from one to the other
    return capital(text.format(*names))


def style_sentence(rng, style):
    return capital(rng.choice({
        "clean": ("the picture is clean and bright.", "the light is clear and even.",
                  "everything looks crisp and fresh."),
        "grainy": ("the picture is grainy.", "there is a lot of noise in the picture.",
                   "it looks like an old noisy photo."),
        "dim": ("the light is dim.", "the scene is dark, as in the evening.", "it is a gloomy, shadowy picture."),
        "faded": ("the colours are faded.", "the picture looks pale and washed out.",
                  "a white haze lies over everything."),
    }[style]))


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


def count_sentence(rng, objects):
    colours = [o.colour_name for o in objects]
    repeated = [c for c in colours if colours.count(c) > 1]
    if repeated and rng.random() < 0.6:
        return f"{capital(NUMBERS[colours.count(repeated[0])])} of the objects are {repeated[0]}."
    n = NUMBERS[len(objects)]
    return capital(rng.choice((f"there are {n} objects in total.", f"{n} things can be counted.",
                               f"the picture has {n} objects.")))


def capital(text):
    return text[0].upper() + text[1:]


def describe(rng, objects, pattern, ground, style, kinds) -> tuple[dict, list]:
    """All captions of a scene, and for every sentence of the long one the object that it alone describes (-1: none)."""
    main, other = objects[0], rng.choice(objects[1:])
    long = [(object_sentence(rng, o), k) for k, o in enumerate(objects)]
    long += [(main_sentence(rng, main), 0), (background_sentence(rng, pattern, ground), -1),
             (style_sentence(rng, style), -1)]
    wanted = rng.randint(6, 12)
    if len(long) < wanted:
        long.append((count_sentence(rng, objects), -1))
    long = dict(long)  # sentence -> object: two relation sentences may agree to the word
    while len(long) < min(wanted, 5 + 2 * len(objects)):
        long.setdefault(relation_sentence(rng, objects), -1)
    long = list(long.items())
    rng.shuffle(long)

    shown = rng.randrange(kinds) if rng.random() < 0.05 else main.kind  # now and then the web is wrong
    name = KINDS[shown][0]
    subject = f"{main.colour_name} {name}" if rng.random() < 0.6 else name
    raw = rng.choice((
        "{subject}", "{subject} clipart", "{subject} and {other}", "img_{number} {subject}",
        "{subject} | free download", "buy {subject} online", "{subject} wallpaper hd", "best {subject} ever!!",
        "{subject} stock photo {number}", "my {subject} #{other}",
    )).format(subject=subject, other=other.name, number=rng.randint(100, 9999))

    a, b = phrase(rng, main, colour=1, size=0.3), phrase(rng, other, colour=1, size=0.2)
    short = capital(rng.choice((f"{a} and {b}.", f"{a} with {b}.", f"{b} beside {a}.", f"{a} next to {b}.",
                                f"a picture of {a} and {b}.")))
    captions = {
        "raw": raw,
        "short": short,
        "long": [sentence for sentence, _ in long],
        "details": " ".join(object_sentence(rng, o) for o in rng.sample(objects, min(3, len(objects)))),
        "main_object": capital(rng.choice(("{0}.", "the main object is {0}.", "this is {0}."))
                               .format(phrase(rng, main, colour=1, size=0.5))),
        "background": background_sentence(rng, pattern, ground),
        "style": style_sentence(rng, style),
        "few_words": ", ".join(o.name for o in rng.sample(objects, len(objects))),
    }
    return captions, [k for _, k in long]


def contact_sheet(path: str, scenes: Scenes):
    """Draws the first eight scenes with their masks and captions into a picture file."""
    import textwrap
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(4, 6, figsize=(17, 8.4), width_ratios=(1, 1, 2.4) * 2)
    for i, (left, middle, right) in enumerate(axes.reshape(8, 3)):
        scene = scenes.scene(i)
        image, mask = scenes.draw(scene)
        left.imshow(image)
        middle.imshow(mask, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
        c = scene.captions
        texts = f"RAW {c['raw']}", f"SHORT {c['short']}", "LONG " + " ".join(c["long"])
        text = "\n".join(textwrap.fill(t, 66) for t in texts)
        right.text(0, 1, text, va="top", fontsize=8, transform=right.transAxes)
        for axis in (left, middle, right):
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheet", metavar="FILE", help="write a contact sheet")
    parser.add_argument("--speed", action="store_true", help="measure drawing on one core")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--kinds", type=int, default=24)
    parser.add_argument("--split", choices=SPLITS, default="test")
    options = parser.parse_args()
    try:
        scenes = Scenes(options.split, size=options.size, kinds=options.kinds)
        if options.sheet:
            contact_sheet(options.sheet, scenes)
            print(f"wrote {options.sheet}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if options.speed or not options.sheet:
        for i in range(500):
            scenes.draw(scenes.scene(i))
        start = time.perf_counter()
        for i in range(3000):
            scenes.draw(scenes.scene(i))
        rate = 3000 / (time.perf_counter() - start)
        print(f"{rate:.0f} scenes/s on one core at {options.size} px with captions and masks")
