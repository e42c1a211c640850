"""Evaluate models: zero-shot classification, retrieval by short and long captions, pointing, segmentation.

    python evaluate.py runs/dreamlip-tiny                 a run on its own held-out data, with figures in its folder
    python evaluate.py runs/*                             methods as rows, mean and spread over seeds, against clip
    python evaluate.py RUN --branch max --out FOLDER      branches become one similarity by mean, max, or a number
    python evaluate.py RUN --benchmark cifar10:data imagefolder:pets urban1k:Urban1k coco:coco/dataset_coco.json
    python evaluate.py open_clip_pytorch_model.bin --benchmark ...           somebody else's checkpoint
    python evaluate.py RUN --picture dog.jpg --texts "a brown dog" "a red sofa"       how similar, and where
    python evaluate.py RUN --search FOLDER "a dog on a sofa"                         a folder's most similar pictures
    python evaluate.py RUN --export open_clip model.pt    for open_clip and CLIP_benchmark
    python evaluate.py RUN --export transformers FOLDER   for transformers.CLIPModel.from_pretrained(FOLDER)

All numbers are in percent, and each stands beside its chance level. A tie counts against the model. A run's
standard evaluation is written into its folder, as evaluation.json. Any other (--images, --data, --branch, best.pt ...)
is written into a folder of its own in there, or into --out.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image
from torchvision import datasets
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2
from tqdm import tqdm

from data import (BadCount, BadSample, Captions, Parser, Records, UserError, check_target, clean_field, contact_sheet,
                  image_field, load_image, load_tokenizer, normalize, one_sentence, open_dataset, read_captions,
                  read_json, spread, write_clip_tokenizer)
from losses import group_patches
from model import best_device, check_device, checkpoints, export_open_clip, export_transformers, load_model, resized
from scenes import BACKGROUNDS, COLOURS, KINDS, PERSPECTIVES, article, held_out

# ---- models and embeddings -------------------------------------------------------------------------------------------

class Model:
    """A run of this project (its folder, checkpoint.pt or best.pt) or somebody else's checkpoint, with its tokenizer.

    name; settings: a run's own, else those of the shapes; folder: the run's, None for somebody else's checkpoint.
    branch: "mean", "max" or a number. Raises UserError.
    """

    def __init__(self, path, device=None, branch="mean", image_size=None, activation=None, tokenizer=None, batch=256):
        path = Path(path).absolute()
        clip, self.settings = load_model(path, activation)
        clip = resized(clip, image_size or clip.config.image_size)
        self.device = device or best_device()
        cuda = self.device.startswith("cuda")
        self.autocast = torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=cuda)
        self.workers = min(8, os.cpu_count()) if cuda else 0
        self.clip = clip.to(self.device).eval()
        self.config = clip.config
        self.side = clip.config.image_size // clip.config.patch
        self.batch = batch

        folder = path if path.is_dir() else path.parent
        self.folder = folder if "seed" in self.settings else None
        self.name = folder.name if path.is_dir() else f"{folder.name}-{path.stem}"
        self.branch = branch
        branches = [str(h) for h in range(clip.config.branches)]
        if branch not in ("mean", "max", *branches):
            raise UserError(f"--branch {branch}: take mean, max, or one of this model's: {', '.join(branches)}")
        self.tokenizer = load_tokenizer(tokenizer or self.settings["tokenizer"])
        if self.tokenizer.vocab_size != clip.config.vocab:
            raise UserError(f"{path} was not trained with tokenizer {self.tokenizer.name!r}, whose vocabulary is another: "
                            "name its own with --tokenizer")

    @torch.no_grad()
    def batches(self, items, load=tuple):
        """load(item) -> (image uint8 [3,S,S], anything ...), in workers where there is a GPU. Yields batch by batch
        branches [b,H,D], patches [b,P,D], and a list of everything else."""
        def collate(items):
            images, *rest = zip(*map(load, items))
            return torch.stack(images), *map(list, rest)

        # Other ways to start workers than by fork would have to pickle `load`.
        start = "fork" if self.workers else None
        loader = torch.utils.data.DataLoader(items, self.batch, num_workers=self.workers, collate_fn=collate,
                                             multiprocessing_context=start)
        try:
            for images, *rest in tqdm(loader, "images", leave=False, disable=None):
                images = normalize(images.to(self.device))
                with self.autocast:
                    branches, patches = self.clip.encode_image(images)
                if not branches.isfinite().all():
                    raise UserError(f"{self.name} embeds images as NaN or infinity: take another checkpoint")
                yield branches, patches, *rest
        except UserError as error:
            raise one_sentence(error) from None

    def images(self, items, load=tuple):
        """As `batches`, all at once: branches [N,H,D], and a list of everything else."""
        parts = []
        for branches, _, *rest in self.batches(items, load):
            parts.append((branches, *rest))
        branches, *rest = zip(*parts)
        return torch.cat(branches), *(sum(lists, []) for lists in rest)

    @torch.no_grad()
    def texts(self, texts, batch=1024):
        """N texts -> [N,D], by their end-of-text (or [CLS]) token alone."""
        parts = []
        for start in range(0, len(texts), batch):
            tokens = self.tokenizer(texts[start:start + batch], self.config.context)
            with self.autocast:
                summaries, _ = self.clip.encode_texts(tokens.to(self.device))
            parts.append(summaries[:, 0])
        return torch.cat(parts)

    def embed(self, pictures):
        """N pictures, paths or PIL images -> [N,D], unit-norm; beside `texts`, for use from Python."""
        prepare = preparation(self.config.image_size)
        branches, = self.images(pictures, lambda picture: (prepare(picture),))
        return F.normalize(self.merge(branches)[:, 0], dim=-1)

    def merge(self, branches):
        """[N,H,D] -> [N,1,D]: the branches' mean (its similarities are the mean ones) or one of them; all for max."""
        if self.branch == "max":
            return branches
        if self.branch == "mean":
            return branches.mean(1, keepdim=True)
        return branches[:, [int(self.branch)]]


# ---- metrics ---------------------------------------------------------------------------------------------------------

# A metric is a pair (value, chance). Functions that count several return {name: (value, chance)}.

BLOCK = 1 << 24  # similarities held at once


def ranks(queries, candidates, query_of, candidate_of):
    """How many wrong candidates are at least as similar as a query's best right one: 0 is best, ties count against it.

    queries [Q,H,D], candidates [C,K,D]: the similarity is the greatest over H and K; a candidate is right if its group
    is the query's: query_of [Q], candidate_of [C] (int). Takes a block of queries at a time, so that
    100,000 × 500,000 similarities fit.
    """
    C = len(candidates)
    block = max(1, BLOCK // C)
    found = []
    for some, groups in zip(queries.split(block), query_of.split(block)):
        scores = torch.einsum("qhd,ckd->qchk", some, candidates).amax((2, 3))
        right = (groups[:, None] == candidate_of).to(scores.device)
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        # Right candidates count as worse, so that only wrong ones stand in front. Nothing is worse than a NaN.
        worse = scores.masked_fill(right, -torch.inf) < best
        found.append(C - worse.sum(1))
    return torch.cat(found).clamp(max=C - 1).cpu()


def percent(hits):
    return 100 * hits.double().mean().item()


def recall(queries, candidates, query_of, candidate_of):
    """R@1, R@5 and R@10; arguments as in `ranks`."""
    rank = ranks(queries, candidates, query_of, candidate_of)
    C = len(candidate_of)
    sizes = torch.bincount(candidate_of, minlength=int(query_of.max()) + 1)  # of the groups
    right = sizes[query_of]
    rows = {}
    for k in (1, 5, 10):
        rows[f"R@{k}"] = percent(rank < k), chance_recall(right, C, k)
    return rows


def retrieval(images, texts, image_of, text_of):
    """Recall both ways. images [N,H,D], texts [M,D]; a pair is right if its groups image_of [N] and text_of [M] are
    equal. A query counts if one of its right answers is among the k best, as in all CLIP papers and CLIP_benchmark."""
    texts = texts[:, None]
    to_image = prefixed("T2I", recall(texts, images, text_of, image_of))
    return to_image | prefixed("I2T", recall(images, texts, image_of, text_of))


def caption_retrieval(images, captions, embedded):
    """Retrieval where image i belongs to captions[i], embedded as embedded[i]; equal captions are one group."""
    numbers = {}
    groups = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions])
    return retrieval(images, embedded, groups, groups)


def chance_recall(right, C, k):
    """Recall at k of a random order of C candidates, in percent; right [Q]: how many of them are right for a query.
    None of m is among k with the chance (C-m choose k) / (C choose k), the product of (C-k-i) / (C-i) over i < m."""
    i = np.arange(int(right.max()))
    wrong = (C - min(k, C) - i) / (C - i)
    missed = np.cumprod([1, *wrong])
    return 100 - percent(torch.from_numpy(missed)[right])


def classification(images, classes, target):
    """images [N,H,D], classes [C,D], target [N] -> top-1, top-5 and the mean over classes of top-1."""
    C = len(classes)
    rank = ranks(images, classes[:, None], target, torch.arange(C))
    rows = {}
    for k in (1, 5):
        if k <= C:
            rows[f"top-{k}"] = percent(rank < k), 100 * k / C
    by_class = [percent(rank[target == c] < 1) for c in target.unique()]
    return rows | {"mean per class": (float(np.mean(by_class)), 100 / C)}


class Confusion:
    """Pixels by true and guessed class, and the mean intersection over union of the classes that occur."""

    def __init__(self, classes):
        self.counts = torch.zeros(classes, classes, dtype=torch.float64)

    def add(self, truth, guess):
        """truth, guess: int tensors of one shape; a truth outside 0..C-1 is left out."""
        C = len(self.counts)
        known = (truth >= 0) & (truth < C)
        pairs = truth[known] * C + guess[known]
        self.counts += pairs.bincount(minlength=C * C).view(C, C)

    def miou(self):
        """(value, chance); chance is that of a uniform guess at every pixel."""
        occurs = self.counts.sum(1) > 0
        truth = self.counts.sum(1)[occurs]
        guessed = self.counts.sum(0)[occurs]
        hit = self.counts.diag()[occurs]
        by_chance = truth / (len(self.counts) * truth + truth.sum() - truth)
        return percent(hit / (truth + guessed - hit)), percent(by_chance)


def pixel_scores(patches, classes, size):
    """patches [P,D] of one image, classes [C,D] -> similarities upsampled to [C,*size]."""
    side = math.isqrt(len(patches))
    maps = (patches @ classes.T).T.unflatten(1, (side, side))
    return F.interpolate(maps[None], size=size, mode="bilinear")[0]


def prefixed(prefix, rows):
    return {f"{prefix} {name}": row for name, row in rows.items()}


def class_embeddings(model, names, templates):
    """C names -> [C,D]: the mean over templates ({0}: the name, {1}: with its article), of unit norm again."""
    prompts = []
    for name in names:
        prompts += [template.format(name, article(name)) for template in templates]
    embedded = model.texts(prompts).unflatten(0, (len(names), -1))
    return F.normalize(embedded.mean(1), dim=-1)


# ---- a run's own held-out data ---------------------------------------------------------------------------------------

SCENE_PROMPTS = (
    "the main object is {1}.",
    "the largest thing here is {1}.",
    "a picture of {1}.",
    "{0}",
    "{0} clipart",
)


def held_out_metrics(model, dataset, n):
    """Retrieval among the first n samples of a dataset and, if it draws scenes, all metrics of scenes -> metrics, the
    images' branches [N,H,D], their captions {number: data.Captions}."""
    scenes = getattr(dataset, "scenes", None)

    def load(i):
        try:
            return dataset[i][:2]
        except BadSample as bad:
            return torch.zeros(3, dataset.size, dataset.size, dtype=torch.uint8), bad

    parts, patches, loaded = [], [], []
    for branches, cells, some in model.batches(range(min(n, len(dataset))), load):
        parts.append(branches)
        loaded += some
        if scenes:
            patches.append(cells.float().cpu())
    captions, bad = {}, BadCount()
    for number, caption in enumerate(loaded):
        if isinstance(caption, BadSample):
            bad.add(caption)
        else:
            captions[number] = caption
    if bad:
        print(f"passed over: {bad.report()}")
    branches = torch.cat(parts)[list(captions)]

    images = model.merge(branches)
    short = [c.short[0] if scenes else c.raw for c in captions.values()]
    long = [" ".join(c.long) for c in captions.values()]
    rows = prefixed("short", caption_retrieval(images, short, model.texts(short)))
    if long != short:
        rows |= prefixed("long", caption_retrieval(images, long, model.texts(long)))
    if scenes:
        sentences = model.texts(sum((c.long for c in captions.values()), []))
        sentences = sentences.split([len(c.long) for c in captions.values()])  # of each scene [K,D]
        means = torch.stack([F.normalize(texts.mean(0), dim=0) for texts in sentences])
        rows |= prefixed("long by sentence", caption_retrieval(images, long, means))
        rows |= scene_classification(model, images, scenes)
        rows |= place_metrics(model, scenes, sentences, patches)
    return rows, branches, captions


def scene_classification(model, images, scenes):
    """Zero-shot kinds of the main object, and pairs of kind and colour: seen in training, and kept out of it."""
    names = [name for name, _ in KINDS[:scenes.kinds]]
    pairs = [f"{colour} {name}" for name, colour in itertools.product(names, COLOURS)]
    main = [scenes.scene(i).objects[0] for i in range(len(scenes))]
    target = torch.tensor([o.kind * len(COLOURS) + o.colour for o in main])
    unseen = torch.tensor([held_out(o.kind, o.colour) for o in main])
    classes = class_embeddings(model, names, SCENE_PROMPTS)
    rows = prefixed("zero-shot", classification(images, classes, target // len(COLOURS)))
    classes = class_embeddings(model, pairs, SCENE_PROMPTS[:1])
    for name, chosen in (("seen", ~unseen), ("unseen", unseen)):
        if chosen.any():
            rows[f"{name} colour and object"] = classification(images[chosen], classes, target[chosen])["top-1"]
    return rows


def place_metrics(model, scenes, sentences, patches):
    """Where in a scene patch-text similarity points. sentences: of each scene [K,D]; patches: batches [b,P,D] of them.

    pointing: is the patch most similar to a sentence about one object (or to the object's name) on the object, that is,
    does the object's mask cover at least 1/16 of it? patches grouped: the share of patches whose grouping weight
    (DreamLIP, section 3.3) is not 0 (100: the weights are dense). group finds its sentence: is what a sentence groups
    more similar to it than to the caption's other sentences; wrong image: the same with the patches of another scene,
    of which the caption is not true. mIoU: every pixel gets the class, kind or background, whose name its upsampled
    patches resemble most.
    """
    grounds = model.texts([f"the background is plain {ground}." for ground in BACKGROUNDS])
    kinds = model.texts([article(name) for name, _ in KINDS[:scenes.kinds]])
    classes = torch.stack([F.normalize(grounds.mean(0), dim=0), *kinds]).cpu()  # [1 + kinds, D]
    confusion = Confusion(len(classes))
    pairs = []  # of each scene, its patches and those of another one
    for batch in patches:
        pairs += zip(batch, batch.roll(1, 0))
    found = defaultdict(list)  # metric: shares (value, chance) of scenes or sentences
    for i, (cells, wrong) in enumerate(pairs):
        scene, texts = scenes.scene(i), sentences[i].cpu()
        mask = torch.from_numpy(scenes.draw(scene)[1]).long()
        numbers = torch.tensor([0] + [o.kind + 1 for o in scene.objects])  # of the classes in the mask
        confusion.add(numbers[mask], pixel_scores(cells, classes, mask.shape).argmax(0))
        right, grouped = group_shares(cells, texts, model.settings.get("threshold"))
        found["patches grouped"].append((grouped, 1))
        found["group finds its sentence"].append((right, 1 / len(texts)))
        right, _ = group_shares(wrong, texts, model.settings.get("threshold"))
        found["group finds its sentence, wrong image"].append((right, 1 / len(texts)))
        for about, text in zip(scene.about, texts):
            if about >= 0:  # about a single object
                covered = F.avg_pool2d((mask == about + 1).double()[None], len(mask) // model.side).flatten()
                on = covered >= 1 / 16  # [P]
                name = classes[numbers[about + 1]]
                found["pointing by sentence"].append((on[(cells @ text).argmax()], on.double().mean()))
                found["pointing by name"].append((on[(cells @ name).argmax()], on.double().mean()))
    rows = {}
    for name, shares in found.items():
        value, chance = 100 * torch.tensor(shares, dtype=torch.float64).mean(0)
        rows[name] = value.item(), chance.item()
    return rows | {"mIoU": confusion.miou()}


def group_shares(cells, texts, threshold):
    """Patches [P,D], texts [K,D] -> the share of texts that find what they group, and of weights that are not 0."""
    grouped, weights = group_patches(cells[None], texts[None], threshold)
    finds = (grouped[0] @ texts.T).argmax(1) == torch.arange(len(texts))
    return finds.double().mean(), (weights > 0).double().mean()


# ---- probes ----------------------------------------------------------------------------------------------------------

def reading(model, images, captions, n=500):
    """How far into a long caption does the model read? images [N,h,D], captions: data.Captions -> length:
    [sentences, R@1 to image, to text, chance], where only the first sentences are given."""
    images, captions = images[:n], captions[:n]
    longest = max(len(c.long) for c in captions)
    length = []
    for sentences in sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, longest}):
        if sentences <= longest:
            texts = [" ".join(c.long[:sentences]) for c in captions]
            rows = caption_retrieval(images, texts, model.texts(texts))
            (to_image, chance), (to_text, _) = rows["T2I R@1"], rows["I2T R@1"]
            length.append([sentences, to_image, to_text, chance])
    return dict(length=length)


def specialisation(model, branches, captions):
    """How much more similar branch h is to perspective m of its own picture than to that of other pictures: matrix
    [H][M], and the names of the perspectives. branches [N,H,D], captions: data.Captions."""
    names = PERSPECTIVES[:min(len(c.perspectives) for c in captions)]
    columns = []
    for m in range(len(names)):
        texts = model.texts([c.perspectives[m] for c in captions])
        sims = torch.einsum("nhd,md->hnm", branches, texts)
        columns.append(sims.diagonal(dim1=1, dim2=2).mean(1) - sims.mean((1, 2)))
    return dict(matrix=torch.stack(columns, 1).tolist(), perspectives=names)


# ---- benchmarks ------------------------------------------------------------------------------------------------------

TEMPLATES = (  # CLIP's 80 for ImageNet, from notebooks/Prompt_Engineering_for_ImageNet.ipynb in its repository
    "a bad photo of a {}.", "a photo of many {}.", "a sculpture of a {}.", "a photo of the hard to see {}.",
    "a low resolution photo of the {}.", "a rendering of a {}.", "graffiti of a {}.", "a bad photo of the {}.",
    "a cropped photo of the {}.", "a tattoo of a {}.", "the embroidered {}.", "a photo of a hard to see {}.",
    "a bright photo of a {}.", "a photo of a clean {}.", "a photo of a dirty {}.", "a dark photo of the {}.",
    "a drawing of a {}.", "a photo of my {}.", "the plastic {}.", "a photo of the cool {}.",
    "a close-up photo of a {}.", "a black and white photo of the {}.", "a painting of the {}.", "a painting of a {}.",
    "a pixelated photo of the {}.", "a sculpture of the {}.", "a bright photo of the {}.", "a cropped photo of a {}.",
    "a plastic {}.", "a photo of the dirty {}.", "a jpeg corrupted photo of a {}.", "a blurry photo of the {}.",
    "a photo of the {}.", "a good photo of the {}.", "a rendering of the {}.", "a {} in a video game.",
    "a photo of one {}.", "a doodle of a {}.", "a close-up photo of the {}.", "a photo of a {}.", "the origami {}.",
    "the {} in a video game.", "a sketch of a {}.", "a doodle of the {}.", "a origami {}.",
    "a low resolution photo of a {}.", "the toy {}.", "a rendition of the {}.", "a photo of the clean {}.",
    "a photo of a large {}.", "a rendition of a {}.", "a photo of a nice {}.", "a photo of a weird {}.",
    "a blurry photo of a {}.", "a cartoon {}.", "art of a {}.", "a sketch of the {}.", "a embroidered {}.",
    "a pixelated photo of a {}.", "itap of the {}.", "a jpeg corrupted photo of the {}.", "a good photo of a {}.",
    "a plushie {}.", "a photo of the nice {}.", "a photo of the small {}.", "a photo of the weird {}.",
    "the cartoon {}.", "art of the {}.", "a drawing of the {}.", "a photo of the large {}.",
    "a black and white photo of a {}.", "the plushie {}.", "a dark photo of a {}.", "itap of a {}.",
    "graffiti of the {}.", "a toy {}.", "itap of my {}.", "a photo of a cool {}.", "a photo of a small {}.",
    "a tattoo of the {}.",
)
A_OR_THE = ("a photo of a {}.", "a photo of the {}.")
CIFAR = (
    "a photo of a {}.", "a blurry photo of a {}.", "a black and white photo of a {}.", "a low contrast photo of a {}.",
    "a high contrast photo of a {}.", "a bad photo of a {}.", "a good photo of a {}.", "a photo of a small {}.",
    "a photo of a big {}.", "a photo of the {}.", "a blurry photo of the {}.", "a black and white photo of the {}.",
    "a low contrast photo of the {}.", "a high contrast photo of the {}.", "a bad photo of the {}.",
    "a good photo of the {}.", "a photo of the small {}.", "a photo of the big {}.",
)
SET_TEMPLATES = {  # CLIP's for other sets, from its data/prompts.md; a set that is not here takes ImageNet's
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "stl10": A_OR_THE,
    "food101": ("a photo of {}, a type of food.",),
    "pets": ("a photo of a {}, a type of pet.",),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "dtd": (
        "a photo of a {} texture.", "a photo of a {} pattern.", "a photo of a {} thing.", "a photo of a {} object.",
        "a photo of the {} texture.", "a photo of the {} pattern.", "a photo of the {} thing.",
        "a photo of the {} object.",
    ),
    "aircraft": ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "cars": (
        "a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!", "a photo of my dirty {}.",
        "a photo of my clean {}.", "a photo of my new {}.", "a photo of my old {}.",
    ),
    "caltech101": (
        "a photo of a {}.", "a painting of a {}.", "a plastic {}.", "a sculpture of a {}.", "a sketch of a {}.",
        "a tattoo of a {}.", "a toy {}.", "a rendition of a {}.", "a embroidered {}.", "a cartoon {}.",
        "a {} in a video game.", "a plushie {}.", "a origami {}.", "art of a {}.", "graffiti of a {}.",
        "a drawing of a {}.", "a doodle of a {}.", "a photo of the {}.", "a painting of the {}.", "the plastic {}.",
        "a sculpture of the {}.", "a sketch of the {}.", "a tattoo of the {}.", "the toy {}.",
        "a rendition of the {}.", "the embroidered {}.", "the cartoon {}.", "the {} in a video game.",
        "the plushie {}.", "the origami {}.", "art of the {}.", "graffiti of the {}.", "a drawing of the {}.",
        "a doodle of the {}.",
    ),
    "sun397": A_OR_THE,
}
VOC = (
    "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, motorbike, person, "
    "potted plant, sheep, sofa, train, television monitor"
).split(", ")
STUFF = "sky, wall, floor, ground, grass, road, water, tree, building, ceiling, mountain, fence".split(", ")
TEST = {"split": "test"}
TORCHVISION = {  # name: class in torchvision.datasets, its test part (as far as torchvision knows one)
    "cifar10": ("CIFAR10", {"train": False}),
    "cifar100": ("CIFAR100", {"train": False}),
    "stl10": ("STL10", TEST),
    "food101": ("Food101", TEST),
    "pets": ("OxfordIIITPet", TEST),
    "flowers102": ("Flowers102", TEST),
    "dtd": ("DTD", TEST),
    "aircraft": ("FGVCAircraft", TEST),
    "cars": ("StanfordCars", TEST),
    "caltech101": ("Caltech101", {}),
    "sun397": ("SUN397", {}),
}


def torchvision_data(kind, path, **options):
    try:
        return getattr(datasets, kind)(path, download=False, **options)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} does not hold what torchvision.datasets.{kind} reads ({str(error).split('. ')[0]}); "
                        "nothing is downloaded here") from None


def preparation(size):
    """CLIP's: the shorter side to `size` (bicubic), the centre cut out. Returns a function: path or PIL image -> uint8
    [3,S,S]. A pair as `size` squeezes the whole picture into height and width."""
    steps = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])

    def prepare(picture):
        if not isinstance(picture, Image.Image):
            try:
                picture = load_image(picture)
            except BadSample as bad:
                raise UserError(f"{bad}: mend it, for no picture is left out here") from None
        return steps(picture.convert("RGB"))
    return prepare


def find_picture(root, picture):
    """root/picture, or, by its bare name, in any folder of the root."""
    file = root / picture
    if not file.is_file():
        file = next(root.glob(f"*/{file.name}"), None)
    if not file:
        raise UserError(f"no picture {picture} in {root} or a folder in it")
    return file


# ---- layouts ---------------------------------------------------------------------------------------------------------

# A layout is a generator: path -> (picture's path, captions) again and again, as the data set was published.


def karpathy(path):  # COCO and Flickr30k: dataset_coco.json beside val2014/, dataset_flickr30k.json
    for row in read_json(path)["images"]:
        if row["split"] == "test":
            yield Path(row.get("filepath", ""), row["filename"]), [s["raw"] for s in row["sentences"]][:5]


def urban1k(path):  # image/N.jpg, caption/N.txt
    for file in sorted(path.glob("caption/*.txt")):
        yield f"image/{file.stem}.jpg", file.read_text().splitlines()[:1]


def dci(path):  # splits.json, annotations/, photos/. All splits, texts as LoTLIP joins them
    for names in read_json(path / "splits.json").values():
        for name in names:
            row = read_json(path / "annotations" / name)
            yield f"photos/{row['image']}", [row["short_caption"] + "\n" + row["extra_caption"]]


def iiw(path):  # IIW-400/data.jsonl, DCI_Test/, DOCCI_Test/; pictures anywhere in a folder of `path`
    for file in sorted(path.glob("*/*.jsonl")):
        for row in read_json(file):
            image = row.get("image") or row["image/key"]
            yield Path(image).with_suffix(".jpg"), [row["IIW"]]


def docci(path):  # docci_descriptions.jsonlines beside images/; the test split
    for row in read_json(path):
        if row["split"] == "test":
            yield row["image_file"], [row["description"]]


def share4v(first, path):  # {"image", "conversations": question and answer, or "caption"}
    for row in read_json(path)[:first]:
        yield row["image"], [row["conversations"][1]["value"] if "conversations" in row else row["caption"]]


def json_lines(path):  # as for --data; all texts of a list "caption" count, and lines of one image belong together
    for row in read_json(path):
        yield image_field(row), clean_field(row.get("caption")) or [read_captions(row).raw]


LAYOUTS = {
    "coco": karpathy,
    "flickr30k": karpathy,
    "urban1k": urban1k,
    "dci": dci,
    "iiw": iiw,
    "docci": docci,
    "share4v-1k": partial(share4v, 1000),
    "share4v-10k": partial(share4v, 10_000),
    "jsonl": json_lines,
}


# A benchmark is a function (model, path) -> {metric: (value, chance)}; BENCHMARKS below names them all.


def zero_shot(model, dataset, path, names=None, templates=TEMPLATES):
    """dataset[i]: (PIL image or its path, class) -> `classification`.

    Names come from classnames.txt in `path`, a line a class in the order of their numbers, if it is there, else from
    `names`, else from the dataset. CLIP's own curated names are in its repository, data/prompts.md and
    notebooks/Prompt_Engineering_for_ImageNet.ipynb. A class is the mean of its name in all templates.
    """
    classes = getattr(dataset, "classes", None) or dataset.categories
    names = names or [re.sub("[_/]", " ", name) for name in classes]
    file = path / "classnames.txt"
    if file.is_file():
        names = file.read_text().splitlines()
    if len(names) != len(classes):
        raise UserError(f"{path} has pictures of {len(classes)} classes, but there are {len(names)} names: give a line for "
                        f"each class in {file}")
    prepare = preparation(model.config.image_size)
    branches, target = model.images(dataset, lambda sample: (prepare(sample[0]), sample[1]))
    embedded = class_embeddings(model, names, templates)
    return classification(model.merge(branches), embedded, torch.tensor(target))


class ClassFolders(ImageFolder):
    """Class folders in the order of their names, or of their numbers where all are numbers, as in ImageNet-V2."""

    def find_classes(self, directory):
        classes, _ = super().find_classes(directory)
        if all(map(str.isdecimal, classes)):
            classes.sort(key=int)
        return classes, {name: number for number, name in enumerate(classes)}


def image_folder(model, path, names=None):
    try:
        dataset = ClassFolders(path, loader=Path)  # paths: `zero_shot` opens them
    except FileNotFoundError as error:
        raise UserError(f"{path} is no folder of class folders with pictures: {str(error).splitlines()[0]}") from None
    return zero_shot(model, dataset, path, names)


def synset_folder(model, path):
    """ImageNet-R and ImageNet-A: folders of 200 of ImageNet's synsets, which the ids of synsets do not name."""
    file = path / "classnames.txt"
    if not file.is_file():
        raise UserError(f"the class folders of {path} are ids of synsets, not names: write {file}, a line with a name "
                        "for each folder, in the order of the ids")
    return image_folder(model, path)


def torchvision_set(name, model, path):
    dataset, split = TORCHVISION[name]
    templates = SET_TEMPLATES.get(name, TEMPLATES)
    return zero_shot(model, torchvision_data(dataset, path, **split), path, templates=templates)


def cut_caption(text):
    """A long caption as LoTLIP's benchmarks give it to BERT's tokenizer: its sentences, joined by ". "."""
    parts = [part.strip() for part in re.split(r"\n|</s>|[.]", text)]
    return ". ".join(filter(None, parts))


def retrieval_set(name, model, path):
    """Retrieval on a published data set; a caption's right answer is its own picture alone. LoTLIP's text tower gets
    captions of the sets of long ones cut as LoTLIP cuts them."""
    cut = model.config.text_style == "bert" and name not in ("coco", "flickr30k", "jsonl")
    root = path.parent if path.is_file() else path
    captions = defaultdict(list)  # of each picture
    try:
        for picture, texts in LAYOUTS[name](path):
            texts = map(cut_caption, texts) if cut else texts
            captions[find_picture(root, picture)] += filter(str.strip, texts)
    except (KeyError, TypeError, IndexError, AttributeError, BadSample) as error:
        raise UserError(f"{path} is not laid out as {name} was published ({type(error).__name__}: {error})") from None
    if not captions or not all(captions.values()):
        raise UserError(f"{path} is not laid out as {name} was published: pictures without captions")
    owners = []
    for number, texts in enumerate(captions.values()):
        owners += [number] * len(texts)
    prepare = preparation(model.config.image_size)
    branches, = model.images(list(captions), lambda file: (prepare(file),))
    texts = model.texts(sum(captions.values(), []))
    return retrieval(model.merge(branches), texts, torch.arange(len(captions)), torch.tensor(owners))


def voc(model, path):
    """Pascal VOC 2012's validation part (VOCdevkit/VOC2012 in `path`). The whole picture is squeezed into the model's
    square; patch-text similarities are upsampled to the mask's size. mIoU: 20 classes and background, which is whatever
    resembles a name of STUFF more; mIoU of objects: among the 20, on their pixels alone."""
    dataset = torchvision_data("VOCSegmentation", path, image_set="val")
    classes = class_embeddings(model, VOC + STUFF, TEMPLATES).cpu()
    prepare = preparation((model.config.image_size, model.config.image_size))
    everything, objects = Confusion(21), Confusion(20)

    def load(sample):
        image, mask = sample
        return prepare(image), np.array(mask)  # an array, for a tensor would keep a file open

    for _, patches, masks in model.batches(dataset, load):
        for cells, mask in zip(patches.float().cpu(), masks):
            mask = torch.from_numpy(mask).long()
            scores = pixel_scores(cells, classes, mask.shape)  # [32, height, width]
            guess = scores.argmax(0)
            everything.add(mask, torch.where(guess < 20, guess + 1, 0))
            objects.add(mask - 1, scores[:20].argmax(0))
    return {"mIoU": everything.miou(), "mIoU of objects": objects.miou()}


IMAGENET = ResNet50_Weights.DEFAULT.meta["categories"]  # of the 1,000 synsets in their sorted order
BENCHMARKS = {
    "imagefolder": image_folder,
    "imagenet": partial(image_folder, names=IMAGENET),
    "imagenet-v2": partial(image_folder, names=IMAGENET),
    "imagenet-r": synset_folder,
    "imagenet-a": synset_folder,
    "voc": voc,
}
for name in TORCHVISION:
    BENCHMARKS[name] = partial(torchvision_set, name)
for name in LAYOUTS:
    BENCHMARKS[name] = partial(retrieval_set, name)


def check_benchmark(item):
    """"NAME:PATH" -> (name, path). Raises UserError."""
    name, _, path = item.partition(":")
    if name not in BENCHMARKS or not path:
        raise UserError(f"--benchmark {item}: write NAME:PATH with one of {', '.join(BENCHMARKS)}")
    if not Path(path).exists():
        raise UserError(f"--benchmark {name}: there is no {path}")
    return name, Path(path)


def run_benchmarks(model, wanted):
    """["coco:/data/coco.json"] -> {"coco T2I R@1": (value, chance), ...}; a name that comes twice keeps its path."""
    rows = {}
    found = [check_benchmark(item) for item in wanted]
    times = Counter(name for name, _ in found)
    for item, (name, path) in zip(wanted, found):
        rows |= prefixed(item if times[name] > 1 else name, BENCHMARKS[name](model, path))
    return rows


# ---- figures ---------------------------------------------------------------------------------------------------------

PALETTE = "#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00 #000000 #999999".split()  # Okabe and Ito's
STYLE = {"font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
         "figure.dpi": 120, "legend.frameon": False, "grid.alpha": 0.25}


def new_figure(width, height, layout="constrained"):
    """A figure of so many inches. It is not pyplot's: it needs no screen and no closing."""
    matplotlib.rcParams.update(STYLE)
    return Figure((width, height), layout=layout)


def save(figure, title, path):
    figure.suptitle(title)
    figure.savefig(path)


def draw_image(axis, image, heat):
    """image uint8 [3,S,S] in grey, under a heat map [side,side] from 0 to its greatest."""
    axis.axis("off")
    S = image.shape[-1]
    axis.imshow(image.float().mean(0).numpy(), cmap="gray", vmin=0, vmax=255)
    axis.imshow(heat.numpy(), alpha=0.7, vmin=0, extent=(-0.5, S - 0.5, S - 0.5, -0.5))


def draw_groups(model, dataset, captions, path, pictures=4, sentences=5):
    """Held-out pictures, and over each the weights of the patches that each of its sentences groups.
    captions: {number in the dataset: data.Captions}."""
    numbers = [list(captions)[place] for place in spread(len(captions), pictures)]
    figure = new_figure(2.2 * (1 + sentences), 2.7 * len(numbers))
    axes = figure.subplots(len(numbers), 1 + sentences, squeeze=False)
    for row, number in zip(axes, numbers):
        for axis in row:
            axis.axis("off")
        image = dataset[number][0]
        row[0].imshow(image.permute(1, 2, 0).numpy())
        texts = [*captions[number].long, captions[number].raw][:sentences]
        _, patches = next(model.batches([(image,)]))
        _, weights = group_patches(patches, model.texts(texts)[None], model.settings.get("threshold"))
        for axis, text, weight in zip(row[1:], texts, weights[0].cpu()):
            draw_image(axis, image, weight.view(model.side, -1))
            axis.set_title(textwrap.fill(text, 26, max_lines=4, placeholder=" …"), fontsize=9.5)
    label = "share of the greatest weight"
    figure.colorbar(ScalarMappable(), ax=axes, shrink=0.6, label=label)
    save(figure, f"{model.name}: the patches that each sentence groups", path)


def draw_branches(matrices, path):
    """{title: what `specialisation` found} -> a matrix each, side by side."""
    figure = new_figure(8 * len(matrices), 5)
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, (title, found) in zip(axes, matrices.items()):
        matrix = np.array(found["matrix"])
        axis.imshow(matrix, cmap="Blues", vmax=2 * matrix.max(), aspect="auto")
        axis.set(title=title, ylabel="branch", yticks=range(len(matrix)))
        axis.set_xticks(range(matrix.shape[1]), found["perspectives"], rotation=35, ha="right")
        for (y, x), value in np.ndenumerate(matrix):
            axis.text(x, y, f"{value:.2f}", ha="center", va="center")
    save(figure, "similarity to the own picture's text,\nabove the mean over pictures", path)


def draw_curves(model, path):
    """Every loss against images seen, and the learned multiplier."""
    lines = read_json(model.folder / "metrics.jsonl")
    known = set().union(*lines)
    names = [name for name in ("contrastive", "grouping", "held_out_loss", "logit_scale") if name in known]
    figure = new_figure(4 * len(names), 3)
    for axis, name in zip(figure.subplots(1, len(names)), names):
        shown = [line for line in lines if name in line]
        axis.plot([line["images"] for line in shown], [line[name] for line in shown], ".-")
        axis.set(title=name.replace("_", " "), xlabel="images seen")
        axis.grid()
    save(figure, model.name, path)


def draw_reading(curves, path):
    """{model: what `reading` found} -> R@1 against the sentences given."""
    figure = new_figure(9, 4.2)
    axis = figure.subplots()
    for i, (name, found) in enumerate(curves.items()):
        colour = PALETTE[i] if i < len(PALETTE) else matplotlib.colormaps["turbo"](i / len(curves))
        sentences, to_image, to_text, chance = np.transpose(found["length"])
        axis.plot(sentences, to_image, "o-", color=colour, label=name)
        axis.plot(sentences, to_text, "s--", color=colour)
    axis.plot(sentences, chance, ":", color="grey", label="chance")
    axis.set(ylabel="R@1, %", xlabel="sentences of the long caption given")
    figure.legend(loc="outside right center")
    save(figure, "Does more text help? (to image: ―  to text: ‒ ‒)", path)


def draw_run(model, dataset, captions, report, folder):
    """Every figure that a run has something to show in. captions: {number in the dataset: data.Captions}."""
    draw_groups(model, dataset, captions, folder / "patches.png")
    if model.folder and (model.folder / "metrics.jsonl").exists():
        draw_curves(model, folder / "curves.png")
    if "specialisation" in report:
        draw_branches({model.name: report["specialisation"]}, folder / "branches.png")
    if "reading" in report:
        draw_reading({model.name: report["reading"]}, folder / "reading.png")


# ---- pictures of one's own -------------------------------------------------------------------------------------------

def show_picture(model, file, texts, folder):
    """Prints how similar each text is to a picture, and draws the patches that each groups into picture.png."""
    image = preparation(model.config.image_size)(file)
    branches, = model.images([(image,)])
    cosines = (model.merge(branches)[0] @ model.texts(texts).T).amax(0)
    shares = 100 * (cosines * model.clip.logit_scale.exp()).softmax(0)
    print("cosine  softmax  text")
    for text, cosine, share in zip(texts, cosines.tolist(), shares.tolist()):
        print(f"{cosine:6.3f} {share:7.1f}%  {text}")
    captions = {0: Captions(texts[0], [], texts, [])}
    draw_groups(model, {0: (image,)}, captions, folder / "picture.png", 1, len(texts))


def search(model, pictures, text, folder):
    """Ranks pictures, in a folder or what else data.Records reads, by their similarity to a text: prints the best ten
    and draws the best 24 into search.png. Raises UserError."""
    records = Records(pictures)
    prepare = preparation(model.config.image_size)

    def load(number):
        try:
            record = records[number]
            picture = load_image(record.image, name=record.key)
        except BadSample as bad:
            return prepare(Image.new("RGB", (1, 1))), bad
        return prepare(picture), record.key

    if not len(records):
        raise UserError(f"--search {pictures}: there is no picture in it")
    branches, found = model.images(range(len(records)), load)
    cosines = (model.merge(branches) @ model.texts([text])[0]).amax(1)
    shown = []
    for number in cosines.argsort(descending=True).tolist():
        name = found[number]
        if isinstance(name, BadSample):
            records.bad.add(name)
        elif len(shown) < 24:
            picture = load_image(records[number].image)
            picture.thumbnail((256, 256))
            shown.append((picture, [f"{cosines[number]:.3f}", name]))
    for _, texts in shown[:10]:
        print(*texts)
    print(f"passed over: {records.bad.report() or 'none'}")
    if shown:
        contact_sheet(folder / "search.png", shown)


def show(model, picture, texts, wanted, out):
    """--picture or --search (wanted: folder and text), with what is drawn in --out or the run's folder."""
    folder = Path(out) if out else model.folder
    if not folder:
        raise UserError(f"{model.name} has no run's folder to draw into: add --out FOLDER")
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if picture:
            show_picture(model, picture, texts, folder)
        else:
            search(model, *wanted, folder)


# ---- tables ----------------------------------------------------------------------------------------------------------

# A table of several runs shows the metrics whose names end in these.
HEADLINE = ("R@1", "top-1", "unseen colour and object", "pointing by sentence", "mIoU")


def run_table(report):
    """A report's metrics as markdown, a line each."""
    lines = [[f"{report['name']}, %", "", "chance"]]
    for name, metric in report["metrics"].items():
        lines.append([name, f"{metric['value']:.1f}", f"{metric['chance']:.1f}"])
    return markdown(lines)


def markdown(lines):
    """Lists of cells, the head first -> a table."""
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def summarise(results):
    """Results of evaluate_run -> groups of the runs that differ in their seed alone: dicts of name, runs, metrics
    {name: mean, sd, values, chance, difference from the first group of method clip on the same data}."""
    groups = defaultdict(list)
    times = Counter()
    for result in results:
        settings = dict(result["settings"], out="", resume="")
        seed = settings.pop("seed", None)
        alike = json.dumps(settings, sort_keys=True)
        times[alike, seed] += 1  # a copy of a run is no other seed
        groups[alike, times[alike, seed]].append(result)
    summary = []
    for runs in groups.values():
        metrics = {}
        for name, metric in runs[0]["metrics"].items():
            values = [run["metrics"][name]["value"] for run in runs]
            mean = float(np.mean(values))
            metrics[name] = dict(mean=mean, sd=deviation(values), values=values, chance=metric["chance"])
        names = [run["name"] for run in runs]
        name = names[0] + other_settings(runs[0], results)
        summary.append(runs[0] | dict(name=name, runs=names, metrics=metrics))
    baseline = next((group for group in summary if group["settings"]["method"] == "clip"), None)
    for group in summary:
        if baseline and group is not baseline and group["on"] == baseline["on"]:
            for name in group["metrics"].keys() & baseline["metrics"].keys():
                metric = group["metrics"][name]
                metric["difference"] = metric["mean"] - baseline["metrics"][name]["mean"]
    return summary


TOLD = ("negatives", "grouping", "grouping_weight", "sub_captions", "whole_caption", "corner_tokens", "branches",
        "branch_type", "images", "lr", "batch")  # settings that a row of the table shows where they differ


def other_settings(run, others):
    """" (lr=0.01)": what of a run's settings others of its method do not share."""
    settings = [other["settings"] for other in others if other["settings"]["method"] == run["settings"]["method"]]
    told = []
    for name in TOLD:
        if len({s.get(name) for s in settings}) > 1:
            told.append(f"{name}={run['settings'].get(name)}")
    return f" ({', '.join(told)})" if told else ""


def deviation(values):
    """The standard deviation over seeds, 0 of a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(groups):
    """Markdown: a row a run, its headline metrics as mean ± sd over seeds (difference from clip), chance last."""
    chances = {}
    for group in groups:
        for name, metric in group["metrics"].items():
            if name.endswith(HEADLINE):
                chances[name] = f"{metric['chance']:.1f}"
    lines = [["%, ± over seeds (beside clip)", *chances]]
    for group in groups:
        seeds = len(group["runs"])
        cells = [f"{group['name']}, {seeds} seeds" if seeds > 1 else group["name"]]
        for name in chances:
            cells.append(metric_cell(group["metrics"][name], seeds) if name in group["metrics"] else "")
        lines.append(cells)
    lines.append(["chance", *chances.values()])
    return markdown(lines)


def metric_cell(metric, seeds):
    cell = f"{metric['mean']:.1f}"
    if seeds > 1:
        cell += f" ± {metric['sd']:.1f}"
    if "difference" in metric:
        cell += f" ({metric['difference']:+.1f})"
    return cell


# ---- reports ---------------------------------------------------------------------------------------------------------

def evaluate_run(path, n=None, branch="mean", data=None, figures=True, device=None, benchmarks=(), out=None, **options):
    """Evaluates one model on its held-out data, or on benchmarks instead, prints its table and writes evaluation.json
    (benchmarks.json) and figures -> what it writes: a dict of name, settings, metrics {name: {value, chance}}, on (what
    data) and probes.

    What is not the standard evaluation of a run's folder goes to a folder in it, named after what is different; `out`
    takes the place of the run's folder. `options`: Model's. Raises UserError.
    """
    path = Path(path)
    model = Model(path, device, branch, **options)
    s = model.settings
    weights = path.stem if path.is_file() else None  # such as "best"
    size = model.config.image_size
    report = dict(name=model.name, branch=branch, image_size=size, settings=s | dict(weights=weights))
    if benchmarks:
        rows = run_benchmarks(model, benchmarks)
        report["on"] = " ".join(benchmarks)
    elif data or model.folder:
        count = n or s.get("eval_images") or 1000
        names = data or s["data"]
        fields = {} if data else dict(image_root=s["image_root"], caption_fields=s["caption_fields"])
        dataset = open_dataset(names, "test", count, size, s["kinds"], **fields)
        rows, branches, numbered = held_out_metrics(model, dataset, count)
        captions = list(numbered.values())
        report["images"] = len(captions)
        names = names if isinstance(names, str) else " ".join(names)
        report["on"] = f"{len(captions)} images of {names}, {s['kinds']} kinds of object"
        if max(len(c.long) for c in captions) > 1:
            report["reading"] = reading(model, model.merge(branches), captions)
        if model.config.branches > 1:
            report["specialisation"] = specialisation(model, branches, captions)
    else:
        raise UserError(f"{path} has no held-out data of its own: score it with --benchmark or --data")
    report["metrics"] = {name: dict(value=value, chance=chance) for name, (value, chance) in rows.items()}
    print(run_table(report))
    print(f"{model.name} on {report['on']}")

    asked = [weights, n, data, branch if branch != "mean" else None, options.get("image_size")]
    folder = report_folder(model, out, asked)
    if folder:
        with saving(folder):
            os.makedirs(folder, exist_ok=True)
            file = folder / ("benchmarks.json" if benchmarks else "evaluation.json")
            file.write_text(json.dumps(report, indent=1))
            if figures and not benchmarks:
                draw_run(model, dataset, numbered, report, folder)
    return report


def report_folder(model, out, asked):
    """The run's own folder, or one in it that is named after what was asked for; `out` goes before."""
    if out:
        return Path(out) / model.name
    words = re.findall(r"\w+", " ".join(str(value) for value in asked if value))
    if model.folder and words:
        return model.folder / "-".join(["evaluation", *words])
    return model.folder


@contextmanager
def saving(folder):
    """Says what could not be written instead of ending: numbers are printed before, and other runs wait."""
    try:
        yield
        print(f"written to {folder}")
    except OSError as error:
        print(f"{folder} cannot be written ({error}): take another folder")


def find_runs(paths):
    """What of the paths can be evaluated, each once; runs/* has figures and folders that are no runs, too."""
    runs = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is no {path}: name folders of runs, or files of weights")
        if not checkpoints(path) and path.suffix not in (".pt", ".pth", ".bin", ".safetensors"):
            print(f"passed over, no run: {path}")
        else:
            runs.append(path.parent if path.name == "checkpoint.pt" else path)
    if not runs:
        raise UserError(f"no run among {' '.join(paths)}: name folders with a checkpoint.pt, or files of weights")
    return list(dict.fromkeys(runs))


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def parse(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", help="folders of runs, or files of weights, ours or released ones")
    add("--benchmark", dest="benchmarks", nargs="+", default=[], metavar="NAME:PATH",
        help=f"of {', '.join(BENCHMARKS)}")
    add("--data", nargs="+", help="evaluate on this instead of the run's own data (as in train.py)")
    add("--images", dest="n", type=positive, help="held-out images to use")
    add("--branch", default="mean", help="mean, max, or the number of a branch")
    add("--image-size", type=positive, help="another resolution: position embeddings are interpolated")
    add("--activation", choices=("gelu", "quickgelu"), help="of a released checkpoint")
    add("--tokenizer", help="instead of the model's own")
    add("--device", help="cpu, cuda or mps; the fastest there is")
    add("--out", metavar="FOLDER", help="write there, not into the runs' folders")
    add("--picture", metavar="FILE", help="say how similar --texts are to a picture, and draw the patches of each")
    add("--texts", nargs="+", help="of --picture")
    add("--search", nargs=2, metavar=("FOLDER", "TEXT"), help="the pictures of a folder most similar to a text")
    add("--json", metavar="FILE", help="write all metrics of all runs")
    add("--no-figures", dest="figures", action="store_false")
    add("--export", nargs=2, metavar=("FORMAT", "FILE"), default=(None, None),
        help="write the weights instead: open_clip FILE, or transformers FOLDER")
    return vars(parser.parse_args(argv))


def export(model, kind, file):
    """--export: the weights as open_clip (a file) or transformers (a folder) reads them. Raises UserError."""
    name = model.tokenizer.name
    if kind == "open_clip":
        export_open_clip(model.clip, file)
    elif kind == "transformers":
        export_transformers(model.clip, file)
        if name == "clip":
            write_clip_tokenizer(file, model.config.context)
    else:
        raise UserError(f"--export {kind}: take open_clip or transformers")
    print(f"wrote {file}; its texts are tokens of the tokenizer {name!r}, which {kind} has if it is 'clip'")


def main(argv=None):
    options = parse(argv)
    check_device(options["device"] or "cpu")
    for item in options["benchmarks"]:
        check_benchmark(item)
    runs = find_runs(options.pop("runs"))
    file = options.pop("json")
    kind, weights = options.pop("export")
    for target in filter(None, (file, weights, options["out"])):
        check_target(target)
    picture, texts, wanted = map(options.pop, ("picture", "texts", "search"))
    if bool(picture) != bool(texts):
        raise UserError("--picture FILE and --texts TEXT TEXT ... go together: give both")
    sizes = {name: options[name] for name in ("image_size", "activation", "tokenizer")}
    if kind:
        return export(Model(runs[0], "cpu", **sizes), kind, Path(weights))
    if picture or wanted:
        model = Model(runs[0], options["device"], options["branch"], **sizes)
        return show(model, picture, texts, wanted, options["out"])
    results, failed = [], []
    for run in runs:
        try:
            results.append(evaluate_run(run, **options))
        except UserError as error:
            failed.append(f"{run}: {error}")
    groups = summarise(results)
    if len(results) > 1:
        print("\n" + table(groups))
    if len({group["on"] for group in groups}) > 1:
        print("the runs are evaluated on different data, so their numbers do not compare: give all the same --data")
    if file:
        file = Path(file)
        with saving(file.parent):
            file.write_text(json.dumps(groups, indent=1))
    curves = {group["name"]: group["reading"] for group in groups if "reading" in group}
    if len(groups) > 1 and curves and options["figures"]:
        folder = Path(options["out"] or runs[0].absolute().parent)
        with saving(folder):
            draw_reading(curves, folder / "reading.png")
    if failed:
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
