"""Pictogram scenes: the embedded data. Images, captions of every kind, masks and boxes, all drawn from an index.

    python scenes.py --write FOLDER --n 1000     pictures and captions.jsonl, for train.py --data FOLDER
    python data.py --look FOLDER --sheet scenes.html   shows some of them

A scene holds 2 to 6 objects. An object is a pictograph of matplotlib's DejaVu Sans with a colour, a size and a place.
Exactly one object is large: the main one. The background is plain, graded, striped or checkered, and the picture has a
style (clean, grainy, dim or faded). The same facts give the texts that the papers use:

    raw                a web caption: short, noisy, often without the colour, sometimes wrong (CLIP's training text)
    short              one sentence that names the main object and one other with their colours (DreamLIP)
    long               6 to 12 shuffled sentences, each about a part of the picture (DreamLIP, LoTLIP)
    details, few_words, background, main_object, style       the perspectives of Holistic CLIP, in its release's order

Scene (split, index) is always the same scene, and no two splits share a scene. A tenth of the pairs of colour and
kind (one colour of every kind) is never drawn in training, so that composition can be tested (`is_unseen`).
"""

import argparse
import functools
import json
import os
import random
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageFont


class UserError(Exception):
    """A mistake that the user can correct: one sentence that names it and the remedy. Scripts print it and exit 1."""


def read_table(text):
    """"name value, name value" -> [(name, value)]. A name may be of several words."""
    return [tuple(entry.strip().rsplit(" ", 1)) for entry in text.split(",")]


# The kinds, most distinct silhouettes first: a run with k kinds uses the first k.
KINDS = read_table("""
    umbrella ☂, anchor ⚓, skull ☠, cloud ☁, star ★, heart ♥, telephone ☎, airplane ✈, envelope ✉, chess knight ♞,
    sun ☀, gear ⚙, flag ⚑, clover ☘, music note ♫, cross ✚, pickaxe ⚒, yin yang ☯, check mark ✔, arrow ➤,
    triangle ▲, pointing hand ☛, chess rook ♜, crescent ☪, pair of scissors ✂, moon ☽, balance ⚖, snowflake ❄,
    house ⌂, spade ♠, diamond ♦, snowman ☃, smiley ☺, radiation sign ☢, biohazard sign ☣, peace sign ☮,
    ship wheel ☸, lightning bolt ⚡, atom ⚛, lily ⚜, pair of swords ⚔, wheelchair ♿, recycling sign ♻,
    warning sign ⚠, pen ✒, writing hand ✍, trident ♆, ankh ☥, chess king ♚, chess queen ♛, chess bishop ♝,
    chess pawn ♟, club ♣, daisy ✿, pentagon ⬟, hexagon ⬢, disc ●, square ■, ring ◎, keyboard ⌨, hot spring ♨,
    comet ☄, cup ☕, mouse face 🐭, cow face 🐮, cat face 🐱, monkey face 🐵, frowning face ☹, maltese cross ✠,
    star of david ✡, asterisk ✱, sharp sign ♯, dice ⚄, playing card 🂡, victory hand ✌, caduceus ☤, alembic ⚗,
    coffin ⚰, urn ⚱, pencil ✎, floral heart ❦, command sign ⌘, eject sign ⏏
""")
COLOURS = dict(read_table("""
    red #dc1e23, orange #f57d14, yellow #e1b900, green #1e9132, teal #00a0a5,
    blue #2846dc, purple #8228aa, pink #f05aaf, brown #78461e, black #191919
"""))
BACKGROUNDS = dict(read_table("""
    white #fafafa, cream #faf0d2, sky #c8e1fa, mint #cdf0d7,
    lavender #e1d7f5, peach #fadcc8, silver #cdd0d4, rose #f8d2dc
"""))
PATTERNS = "plain graded striped checkered".split()
STYLES = "clean grainy dim faded".split()
SIDES = {"small": (0.22, 0.27), "medium": (0.29, 0.35), "large": (0.46, 0.54)}  # glyph side as a share of the image's
# Row by row, thirds of the picture.
PLACES = ("upper left", "top", "upper right", "left", "centre", "right", "lower left", "bottom", "lower right")
PERSPECTIVES = ("raw", "details", "few_words", "background", "main_object", "style")  # in Holistic CLIP's order
SPLITS = ("train", "validation", "test")


def is_unseen(kind, colour):
    """Whether the training split never shows this colour of this kind of object: one colour in ten, of every kind."""
    return colour == (kind * 3 + kind // 10) % len(COLOURS)


@dataclass
class Object:
    kind: int  # index into KINDS
    colour: int  # index into COLOURS
    size: str
    side: float  # of the glyph's box, as a share of the image
    x: float  # centre, as a share of the image
    y: float

    @property
    def name(self):
        return KINDS[self.kind][0]

    @property
    def colour_name(self):
        return list(COLOURS)[self.colour]

    @property
    def place(self):
        return PLACES[3 * int(self.y * 3) + int(self.x * 3)]


@dataclass
class Scene:
    objects: list  # of Object; the first is the main (large) one
    pattern: str
    ground: tuple  # one or two names of BACKGROUNDS
    style: str
    seed: int  # for what only the pixels need
    captions: dict  # field -> str, or list of sentences ("long")
    about: list  # for every sentence of the long caption, the index of the one object it describes, or -1


@dataclass
class Scenes:
    """`n` scenes of one split, numbered 0..n-1, at `size` pixels with the first `kinds` kinds of object.

    `scene(i)` gives the facts and the captions, `draw(scene)` the image uint8 [S, S, 3] and the mask uint8 [S, S],
    which is 0 for background and 1 + the object's index elsewhere, `boxes(scene)` the places of the long caption's
    sentences. Raises ValueError."""

    split: str = "train"
    n: int = 40_000
    size: int = 64
    kinds: int = 24

    def __post_init__(self):
        if not 6 <= self.kinds <= len(KINDS):
            raise UserError(f"--kinds must be 6 to {len(KINDS)}, not {self.kinds}")

    def __len__(self):
        return self.n

    def scene(self, i):
        # The splits take turns in one sequence of seeds, so no two of them share a scene.
        rng = random.Random(i * len(SPLITS) + SPLITS.index(self.split))
        objects = []
        while len(objects) < 2:  # a main object may leave no room for a second one: then all are drawn again
            objects = self._objects(rng)
        pattern = rng.choices(PATTERNS, (49, 17, 17, 17))[0]
        ground = tuple(rng.sample(list(BACKGROUNDS), 1 if pattern == "plain" else 2))
        style = rng.choices(STYLES, (61, 13, 13, 13))[0]
        captions, about = describe(rng, objects, pattern, ground, style, self.kinds)
        return Scene(objects, pattern, ground, style, rng.getrandbits(32), captions, about)

    def _objects(self, rng):
        """1 to 6 objects of different kinds: as many of 2 to 6 as find room."""
        count = rng.choices(range(2, 7), (34, 34, 18, 9, 5))[0]
        objects = []
        for kind in rng.sample(range(self.kinds), count):
            colour = rng.randrange(len(COLOURS))
            while self.split == "train" and is_unseen(kind, colour):
                colour = rng.randrange(len(COLOURS))
            size = rng.choice(("small", "medium")) if objects else "large"
            side = rng.uniform(*SIDES[size])
            for _ in range(60):  # tries to find a place that hardly overlaps the other objects
                x = rng.uniform(side / 2, 1 - side / 2)
                y = rng.uniform(side / 2, 1 - side / 2)
                if all(max(abs(x - o.x), abs(y - o.y)) > 0.46 * (side + o.side) for o in objects):
                    objects.append(Object(kind, colour, size, side, x, y))
                    break
        return objects

    def draw(self, scene):
        size = self.size
        # background() is cached, so a copy is drawn on.
        image = background(scene.pattern, scene.ground, size, scene.seed % 4).copy()
        mask = np.zeros((size, size), np.uint8)
        for number, o in enumerate(scene.objects, 1):
            opacity = glyph(o.kind, round(o.side * size))
            height, width = opacity.shape
            top = round(o.y * size - height / 2)
            left = round(o.x * size - width / 2)
            # A glyph's place is at least half its side from the edges, so its area lies within the image.
            area = slice(top, top + height), slice(left, left + width)
            image[area] += opacity[..., None] * (rgb(COLOURS[o.colour_name]) - image[area])
            mask[area][opacity > 0.5] = number
        if scene.style == "dim":
            image *= 0.7
        elif scene.style == "faded":
            image = 255 - 0.65 * (255 - image)
        elif scene.style == "grainy":
            noise = np.random.default_rng(scene.seed).normal(0, 12, (size, size, 1))
            image += noise.astype(np.float32)
        return image.clip(0, 255).astype(np.uint8), mask

    def boxes(self, scene):
        """For every sentence of the long caption the box (x0, y0, x1, y1), as shares of the image, of the one object
        that it describes, or None."""
        boxes = []
        for o in scene.objects:
            reach = (round(o.side * self.size) + 1) / 2 / self.size  # draw() rounds the place by up to half a pixel
            box = np.clip([o.x - reach, o.y - reach, o.x + reach, o.y + reach], 0, 1)
            boxes.append(tuple(box.tolist()))
        boxes.append(None)  # at -1: for sentences that are not about a single object
        return [boxes[k] for k in scene.about]


FONT = ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", 160)


def rgb(colour):
    return np.float32(ImageColor.getrgb(colour))


@functools.cache
def glyph(kind, side):
    """The pictograph's opacity, float32 in 0..1, cropped to its ink and scaled to `side` pixels on its longer side."""
    sign = FONT.getmask(KINDS[kind][1])
    ink = Image.frombytes("L", sign.size, bytes(sign))
    ink = ink.crop(ink.getbbox())
    scale = side / max(ink.size)
    ink = ink.resize([round(edge * scale) for edge in ink.size], Image.BOX)
    return np.asarray(ink, np.float32) / 255


@functools.cache
def background(pattern, ground, size, variant):
    """float32 [S, S, 3] in 0..255. `variant`, 0 to 3: the direction of a gradient or of stripes, the size of checks."""
    grid = np.indices((size, size), np.float32) / size
    y, x = grid
    share = (y, x, x + y, x + 1 - y)[variant]  # of the second colour; a plain background has but one
    if pattern == "graded" and variant >= 2:
        share /= 2
    elif pattern == "striped":
        share = share * 4 % 1 < 0.5
    elif pattern == "checkered":
        share = np.floor(grid * (3 + variant)).sum(0) % 2
    first = rgb(BACKGROUNDS[ground[0]])
    second = rgb(BACKGROUNDS[ground[-1]])
    return first + share[..., None] * (second - first)


# Texts. Every sentence about an object names it; colour, size and place come and go, so that a sentence tells a part of
# the truth. TEMPLATES: a name, then the wordings from which one is drawn.

NUMBERS = "zero one two three four five six".split()
SIDE_PLACES = {"top": "near the top", "bottom": "near the bottom", "left": "on the left", "right": "on the right"}
TEMPLATE_TABLE = """\
small
small
little
tiny

medium
medium-sized

large
large
big
huge

centre
in the centre
in the middle of the picture
near the centre

corner
in the {0} corner
at the {0}
in the {0} of the picture

object with place
{0} is {1}.
there is {0} {1}.
{1} there is {0}.
{1} we see {0}.
one can see {0} {1}.
{0} can be seen {1}.
{0} sits {1}.
the picture shows {0} {1}.

object
there is {0}.
the picture also has {0}.
we notice {0}.

dominant
the main object is {0}.
{0} takes up most of the picture.
{0} dominates the scene.
the largest thing here is {0}.
the picture is about {0}.

left
to the left of
left of

right
to the right of
right of

above
above
higher than

below
below
lower than

relation
the {1} is {0} the {2}.
{0} the {2} is the {1}.
the {1} can be found {0} the {2}.

plain
the background is plain {0}.
everything stands on a plain {0} background.
behind it all is a {0} wall.

graded
the background fades from {0} to {1}.
behind the objects {0} turns slowly into {1}.
there is a gradient of {0} and {1} in the background.

striped
the background has stripes of {0} and {1}.
the wall is striped in {0} and {1}.
{0} and {1} stripes fill the background.

checkered
the background is checkered in {0} and {1}.
{0} and {1} squares tile the background.
the backdrop is a checkerboard of {0} and {1}.

clean
the picture is clean and bright.
the light is clear and even.
everything looks crisp and fresh.

grainy
the picture is grainy.
there is a lot of noise in the picture.
it looks like an old noisy photo.

dim
the light is dim.
the scene is dark, as in the evening.
it is a gloomy, shadowy picture.

faded
the colours are faded.
the picture looks pale and washed out.
a white haze lies over everything.

count
there are {0} objects in total.
{0} things can be counted.
the picture has {0} objects.

raw
{subject}
{subject} clipart
{subject} and {other}
img_{number} {subject}
{subject} | free download
buy {subject} online
{subject} wallpaper hd
best {subject} ever!!
{subject} stock photo {number}
my {subject} #{other}

short
{0} and {1}.
{0} with {1}.
{1} beside {0}.
{0} next to {1}.
a picture of {0} and {1}.

main object
{0}.
the main object is {0}.
this is {0}.
"""
TEMPLATES = {}
for paragraph in TEMPLATE_TABLE.split("\n\n"):
    template_name, *wordings = paragraph.splitlines()
    TEMPLATES[template_name] = wordings


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def draw_template(rng, name):
    return rng.choice(TEMPLATES[name])


def capital(text):
    return text[0].upper() + text[1:]


def sentence(rng, name, *values):
    return capital(draw_template(rng, name).format(*values))


def coloured(rng, o, chance):
    return f"{o.colour_name} {o.name}" if rng.random() < chance else o.name


def phrase(rng, o, colour=0.8, size=0.4):
    """A noun phrase such as "a small red umbrella", with the colour and the size each present with its probability."""
    words = coloured(rng, o, colour)
    if rng.random() < size:
        words = f"{draw_template(rng, o.size)} {words}"
    return article(words)


def where(rng, o):
    place = o.place
    if place in SIDE_PLACES:
        return SIDE_PLACES[place]
    name = "centre" if place == "centre" else "corner"
    return draw_template(rng, name).format(place)


def object_sentence(rng, o):
    thing = phrase(rng, o)
    place = where(rng, o)
    name = "object with place" if rng.random() < 0.85 else "object"
    return sentence(rng, name, thing, place)


def main_sentence(rng, name, o, **chances):
    template = draw_template(rng, name)
    return capital(template.format(phrase(rng, o, **chances)))


def relation_sentence(rng, objects):
    first, second = rng.sample(objects, 2)
    dx = second.x - first.x
    dy = second.y - first.y
    if abs(dx) > abs(dy):
        name = "left" if dx > 0 else "right"
    else:
        name = "above" if dy > 0 else "below"
    return sentence(rng, "relation", draw_template(rng, name), coloured(rng, first, 0.4), coloured(rng, second, 0.4))


def background_sentence(rng, pattern, ground):
    template = draw_template(rng, pattern)
    if pattern != "graded":  # a gradient goes from the first colour to the second; else the order is free
        ground = rng.sample(ground, len(ground))
    return capital(template.format(*ground))


def count_sentence(rng, objects):
    colours = [o.colour_name for o in objects]
    repeated = [c for c in colours if colours.count(c) > 1]
    if repeated and rng.random() < 0.6:
        return capital(f"{NUMBERS[colours.count(repeated[0])]} of the objects are {repeated[0]}.")
    return sentence(rng, "count", NUMBERS[len(objects)])


def long_caption(rng, objects, pattern, ground, style):
    """6 to 12 different sentences in any order -> {sentence: the object that it alone describes, or -1}."""
    about = {}  # a dict keeps the order and drops a sentence drawn twice
    for k, o in enumerate(objects):
        about[object_sentence(rng, o)] = k
    about[main_sentence(rng, "dominant", objects[0], size=0.6)] = 0
    about[background_sentence(rng, pattern, ground)] = -1
    about[sentence(rng, style)] = -1
    wanted = rng.randint(6, 12)
    if len(about) < wanted:
        about[count_sentence(rng, objects)] = -1
    while len(about) < min(wanted, 5 + 2 * len(objects)):
        about[relation_sentence(rng, objects)] = -1
    shuffled = list(about.items())
    rng.shuffle(shuffled)
    return dict(shuffled)


def raw_caption(rng, main, other, kinds):
    """What the web says of the picture. In one of twenty captions, it may name another kind of object."""
    if rng.random() < 0.05:
        main = replace(main, kind=rng.randrange(kinds))
    subject = coloured(rng, main, 0.6)
    template = draw_template(rng, "raw")
    return template.format(subject=subject, other=other.name, number=rng.randint(100, 9999))


def describe(rng, objects, pattern, ground, style, kinds):
    """All captions of a scene, {field: text or sentences}, and for every sentence of the long one the object that it
    alone describes (-1: none). The fields are made in the order written: each draws from `rng`."""
    main = objects[0]
    other = rng.choice(objects[1:])
    about = long_caption(rng, objects, pattern, ground, style)
    captions = {
        "raw": raw_caption(rng, main, other, kinds),
        "short": sentence(rng, "short", phrase(rng, main, 1, 0.3), phrase(rng, other, 1, 0.2)),
        "long": list(about),
        "details": " ".join(object_sentence(rng, o) for o in rng.sample(objects, min(3, len(objects)))),
        "main_object": main_sentence(rng, "main object", main, colour=1, size=0.5),
        "background": background_sentence(rng, pattern, ground),
        "style": sentence(rng, style),
        "few_words": ", ".join(o.name for o in rng.sample(objects, len(objects))),
    }
    return captions, list(about.values())


def write(folder, scenes):
    """Writes pictures and captions.jsonl. A line is a record as data.read_captions reads it: {"image": file name,
    "captions": {field: text}}, with {"text", "box"} for the sentences of the long caption that have a place."""
    os.makedirs(f"{folder}/images", exist_ok=True)
    with open(f"{folder}/captions.jsonl", "w") as file:
        for i in range(scenes.n):
            scene = scenes.scene(i)
            name = f"images/{i:06}.png"
            Image.fromarray(scenes.draw(scene)[0]).save(f"{folder}/{name}")
            long = scene.captions["long"]
            for k, box in enumerate(scenes.boxes(scene)):
                if box:
                    long[k] = {"text": long[k], "box": box}
            print(json.dumps({"image": name, "captions": scene.captions}), file=file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="FOLDER", required=True)
    parser.add_argument("--split", choices=SPLITS, default="train")
    for flag, default in (("--n", 1000), ("--size", 64), ("--kinds", 24)):
        parser.add_argument(flag, type=int, default=default)
    options = vars(parser.parse_args())
    try:
        write(options.pop("write"), Scenes(**options))
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
