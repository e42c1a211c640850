"""Evaluate models: zero-shot classification, retrieval by short and long captions, segmentation, probes that explain.

    python evaluate.py runs/dreamlip-tiny                 a run on its own held-out data, with figures in its folder
    python evaluate.py runs/*                             methods as rows, mean and spread over seeds, against clip
    python evaluate.py RUN --branch max                   branches become one similarity by mean, max, or a number
    python evaluate.py RUN --benchmark cifar10:data imagefolder:pets coco:coco urban1k:Urban1k voc:data
    python evaluate.py open_clip_pytorch_model.bin --benchmark ...           somebody else's checkpoint
    python evaluate.py RUN --export open_clip model.pt    for open_clip and CLIP_benchmark

Every number is in percent (ranks apart) and stands beside its chance level. A tie counts against the model. --help
lists the benchmarks.
"""

import argparse
import functools
import json
import os
import re
import sys
import textwrap
from bisect import bisect_left
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision import datasets as torchvision_datasets
from torchvision.models import ResNet50_Weights
from torchvision.transforms import v2
from tqdm import tqdm

from data import (BadCount, BadSample, Parser, UserError, load_image, load_tokenizer, normalize, open_dataset, read_json,
                  spread)
from losses import group_patches
from model import check_device, checkpoints, load_checkpoint, read_checkpoint, released, resized, to_open_clip, trained
from scenes import BACKGROUNDS, COLOURS, KINDS, PERSPECTIVES, Scenes, article, held_out

# ---- models and embeddings -------------------------------------------------------------------------------------------


class Model:
    """A run of this project (a folder, or its checkpoint file) or somebody else's checkpoint, with its tokenizer.

    name, settings (a run's own, else those of the shapes); images and texts become embeddings, a batch at a time.
    """

    def __init__(self, path, device=None, branch="mean", image_size=None, activation=None, tokenizer=None, batch=256):
        path = Path(path)
        file = path if path.is_file() else next(iter(checkpoints(path)), path / "checkpoint.pt")  # the newest there
        content = read_checkpoint(path) if path.is_file() else load_checkpoint(file)
        if "settings" in content:
            self.folder, self.name = file.parent, file.parent.name
            clip, self.settings = trained(file, content), content["settings"]
        else:
            self.folder, self.name = None, file.stem
            clip = released(file, content, activation)
            tokenizer = tokenizer or (str(file.with_name("vocab.txt")) if clip.config.text_style == "bert" else "clip")
            self.settings = asdict(clip.config) | dict(method=self.name, tokenizer=tokenizer, kinds=24)
        try:
            clip = resized(clip, image_size or clip.config.image_size)
        except ValueError as error:
            raise UserError(str(error)) from None
        H = clip.config.branches
        if branch not in ("mean", "max") and not (branch.isdigit() and int(branch) < H):
            raise UserError(f"--branch {branch}: this model has {H} branch{'es' * (H > 1)}; take mean, max or a number "
                            f"below {H}")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.clip, self.config, self.branch, self.batch = clip.to(self.device).eval(), clip.config, branch, batch
        self.side, self.on_gpu = self.config.image_size // self.config.patch, self.device.startswith("cuda")
        self.workers = min(8, os.cpu_count() or 1) if self.on_gpu else 0
        name = tokenizer or self.settings["tokenizer"]
        self.tokenizer = load_tokenizer(name)
        if self.tokenizer.vocab_size != self.config.vocab:
            raise UserError(f"{path} was trained with a vocabulary of {self.config.vocab}, but tokenizer "
                            f"{self.tokenizer.name!r} has {self.tokenizer.vocab_size}: name its own with --tokenizer")

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.on_gpu)

    @torch.no_grad()
    def batches(self, samples):
        """Samples (image uint8 [3,S,S], anything ...) -> batch by batch: branches [b,H,D], patches [b,P,D], and of
        everything else a list."""
        loader = torch.utils.data.DataLoader(samples, self.batch, num_workers=self.workers, collate_fn=collate)
        try:
            for images, *rest in tqdm(loader, "images", leave=False, disable=len(samples) <= self.batch):
                with self.autocast():
                    branches, patches = self.clip.encode_image(normalize(images.to(self.device)))
                yield branches, patches, *rest
        except UserError as error:  # from a worker it arrives with a page of traceback, whose last line it is
            raise UserError(str(error).strip().splitlines()[-1].removeprefix("data.UserError: ")) from None

    def images(self, samples):
        """Samples -> branches [N,H,D], and of everything else in them a list."""
        parts = [(branches, *rest) for branches, _, *rest in self.batches(samples)]
        branches, *rest = zip(*parts)
        return torch.cat(branches), *([x for part in column for x in part] for column in rest)

    @torch.no_grad()
    def texts(self, texts: list[str], batch: int = 1024) -> Tensor:
        """N texts -> [N,D], by their end-of-text (or [CLS]) token alone."""
        parts = []
        for start in tqdm(range(0, len(texts), batch), "texts", leave=False, disable=len(texts) <= 4 * batch):
            tokens = self.tokenizer(texts[start:start + batch], self.config.context)
            with self.autocast():
                parts.append(self.clip.encode_texts(tokens.to(self.device))[0][:, 0])
        return torch.cat(parts)

    def merge(self, branches: Tensor) -> Tensor:
        """[N,H,D] -> [N,1,D]: the branches' mean (its similarities are the mean ones) or one of them; all for max."""
        if self.branch == "max":
            return branches
        return branches.mean(1, keepdim=True) if self.branch == "mean" else branches[:, [int(self.branch)]]


class Samples(torch.utils.data.Dataset):
    """n samples, each made by make(i) when it is asked for."""

    def __init__(self, n, make):
        self.n, self.make = n, make

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)


def collate(samples):
    images, *rest = zip(*samples)
    return torch.stack(images), *map(list, rest)


def open_picture(path):
    try:
        return load_image(path)
    except BadSample as bad:
        raise UserError(f"{bad}: a benchmark needs all its pictures") from None


@functools.cache
def preparation(size: int):
    """CLIP's: the shorter side to `size` (bicubic), the centre cut out; PIL -> uint8 [3,S,S]."""
    return v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])


# ---- metrics ---------------------------------------------------------------------------------------------------------

BLOCK = 1 << 25  # similarities held at once


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """a [N,(H,)D], b [M,(K,)D] -> [N,M]: the greatest over H and K."""
    a, b = (x[:, None] if x.dim() == 2 else x for x in (a, b))
    return functools.reduce(torch.maximum, (x @ y.T for x in a.unbind(1) for y in b.unbind(1)))


def ranks(queries: Tensor, candidates: Tensor, query_of: Tensor, candidate_of: Tensor) -> Tensor:
    """How many wrong candidates are at least as similar as a query's best right one: 0 is best, ties count against it.

    queries [Q,(H,)D], candidates [C,(K,)D]; a candidate is right if its group is the query's: query_of [Q],
    candidate_of [C] (int). A block of queries at a time, so that 100,000 × 500,000 similarities need 400 MB.
    """
    query_of, candidate_of = query_of.to(queries.device), candidate_of.to(queries.device)
    found, step = [], max(1, BLOCK // len(candidates))
    for start in tqdm(range(0, len(queries), step), "ranks", leave=False, disable=len(queries) <= 8 * step):
        scores = similarity(queries[start:start + step], candidates)
        right = query_of[start:start + step, None] == candidate_of
        best = torch.where(right, scores, -torch.inf).amax(1, keepdim=True)
        worse = scores.masked_fill_(right, -torch.inf) < best  # the right ones, too; nothing is worse than a NaN
        found.append(len(candidates) - worse.sum(1, dtype=torch.int32))
    return torch.cat(found).clamp(max=len(candidates) - 1).cpu()


def retrieval(images: Tensor, texts: Tensor, image_of: Tensor, text_of: Tensor) -> dict:
    """R@1/5/10 and median rank, both ways -> {metric: (value, chance)}. images [N,(H,)D], texts [M,D]; a pair is right
    if its groups image_of [N] and text_of [M] are equal. A query counts if one of its right answers is among the k
    best, as all CLIP papers and CLIP_benchmark count."""
    rows, G = {}, int(max(image_of.max(), text_of.max())) + 1
    for direction, queries, candidates, query_of, candidate_of in (
            ("T2I", texts, images, text_of, image_of), ("I2T", images, texts, image_of, text_of)):
        rank = ranks(queries, candidates, query_of, candidate_of)
        right, C = torch.bincount(candidate_of, minlength=G)[query_of], len(candidate_of)
        for k in (1, 5, 10):
            rows[f"{direction} R@{k}"] = (100 * (rank < k).double().mean().item(), chance_recall(right, C, k))
        rows[f"{direction} median rank"] = (1 + float(np.median(rank)), chance_median(right, C))
    return rows


def chance_recall(right: Tensor, C: int, k: int) -> float:
    """Recall at k of a random order of C candidates, in percent; right [Q]: how many of them are right for a query.
    None of m is among k with the chance (C-m choose k) / (C choose k)."""
    m, count = right.double().unique(return_counts=True)
    n, k, log = torch.tensor(C + 1.0, dtype=torch.float64), min(k, C), torch.lgamma  # log(i + 1) is that of i!
    missed = (log(n - m) + log(n - k) - log((n - m - k).clamp_min(1)) - log(n)).exp() * (m <= C - k)
    return (100 * (1 - missed) * count).sum().item() / len(right)


def chance_median(right: Tensor, C: int) -> float:
    """The median rank of a random order: the least k at which half the queries have found a right answer."""
    return 1.0 + bisect_left(range(1, C), True, key=lambda k: chance_recall(right, C, k) >= 50)


def classification(images: Tensor, classes: Tensor, target: Tensor) -> dict:
    """images [N,(H,)D], classes [C,D], target [N] -> top-1, top-5 and the mean over classes of top-1, with chance."""
    C = len(classes)
    rank = ranks(images, classes, target, torch.arange(C))
    rows = {f"top-{k}": (100 * (rank < k).double().mean().item(), 100 * k / C) for k in (1, 5) if k <= C}
    right, count = (torch.bincount(target, weights, C) for weights in ((rank < 1).double(), torch.ones(len(rank))))
    return rows | {"mean per class": (100 * (right / count)[count > 0].mean().item(), 100 / C)}


class Confusion:
    """Pixels by true and guessed class, and the mean intersection over union of the classes that occur."""

    def __init__(self, classes: int):
        self.C, self.counts = classes, torch.zeros(classes, classes, dtype=torch.long)

    def add(self, truth: Tensor, guess: Tensor):
        """truth, guess: int tensors of one shape; a truth outside 0..C-1 is left out."""
        known = (truth >= 0) & (truth < self.C)
        pairs = truth[known].long() * self.C + guess[known].long()
        self.counts += torch.bincount(pairs, minlength=self.C ** 2).view(self.C, self.C).cpu()

    def miou(self) -> tuple[float, float]:
        """(value, chance); chance is that of a uniform guess at every pixel."""
        truth, guess, total = self.counts.sum(1).double(), self.counts.sum(0).double(), self.counts.sum()
        iou = self.counts.diag() / (truth + guess - self.counts.diag()).clamp_min(1)
        by_chance = (truth / self.C) / (truth + total / self.C - truth / self.C)
        return 100 * iou[truth > 0].mean().item(), 100 * by_chance[truth > 0].mean().item()


def same_text(texts: list[str]) -> Tensor:
    """The number of every text among the different ones: what shares a text is right for both."""
    numbers = {}
    return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts])


def prefixed(prefix: str, rows: dict) -> dict:
    return {f"{prefix} {name}": row for name, row in rows.items()}


# ---- a run's own held-out data ---------------------------------------------------------------------------------------

SCENE_PROMPTS = ("the main object is {0}.", "the largest thing here is {0}.", "a picture of {0}.", "{1}", "{1} clipart")


def scene_metrics(model: Model, scenes: Scenes) -> tuple[dict, dict]:
    """All metrics on scenes -> {metric: (value, chance)}, and what the probes and figures need."""
    facts = [scenes.scene(i) for i in range(len(scenes))]
    captions = [scene.captions for scene in facts]
    long = [" ".join(c["long"]) for c in captions]
    names = [name for name, _ in KINDS[:scenes.kinds]]
    sentences = model.texts([t for c in captions for t in c["long"]]).split([len(c["long"]) for c in captions])

    def draw(i):
        image, mask = scenes.draw(facts[i])
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask), i

    place, branches = Places(model, names, torch.cat(sentences).mean(0)), []
    for part, patches, masks, numbers in model.batches(Samples(len(facts), draw)):
        branches.append(part)
        place.add(patches, torch.stack(masks), [facts[i] for i in numbers], [sentences[i] for i in numbers])
    branches = torch.cat(branches)
    images, short, rows = model.merge(branches), [c["short"] for c in captions], {}

    means = torch.stack([F.normalize(e.mean(0), dim=0) for e in sentences])
    for name, texts, embedded in (("short", short, model.texts(short)), ("long", long, model.texts(long)),
                                  ("long by sentence", long, means)):
        rows |= prefixed(name, retrieval(images, embedded, same_text(texts), same_text(texts)))
    main = [scene.objects[0] for scene in facts]
    prompts = [[t.format(article(name), name) for t in SCENE_PROMPTS] for name in names]
    kinds = torch.tensor([o.kind for o in main])
    rows |= prefixed("zero-shot", classification(images, class_embeddings(model, prompts), kinds))
    pairs = model.texts([f"the main object is {article(f'{colour} {name}')}." for name in names for colour in COLOURS])
    target = torch.tensor([o.kind * len(COLOURS) + o.colour for o in main])
    unseen = torch.tensor([held_out(o.kind, o.colour) for o in main])
    for name, which in (("seen", ~unseen), ("unseen", unseen)):
        if which.any():
            rows[f"{name} colour and object"] = classification(images[which], pairs, target[which])["top-1"]
    rows |= place.rows()
    return rows, dict(branches=branches, captions=captions, picture=lambda i: draw(i)[0])


class Places:
    """Where in a scene patch-text similarity points; `rows` has the metrics.

    pointing: is the patch most similar to a sentence about one object (or to the object's name) on the object, that is,
    does the object's mask cover at least 1/16 of it? centred: less the similarity to the mean of all sentences (names),
    as CLIP Surgery (2304.05653) takes away what all classes share. grouped by sentence: the share of a sentence's
    grouping weights (DreamLIP, section 3.3) on such patches; patches grouped: the share of patches whose weight is not
    0 (100: the weights are dense). patches alike: 100 times the mean cosine between the patches of an image. group
    finds its sentence: is what a sentence groups more similar to it than to the caption's other sentences; wrong image:
    the same with the patches of another scene, of which the caption is not true.
    mIoU: every pixel gets the class, kind or background, whose name its upsampled patches resemble most.
    """

    ROWS = ("pointing by sentence", "pointing by sentence, centred", "pointing by name", "pointing by name, centred",
            "grouped by sentence")

    def __init__(self, model: Model, names: list[str], centre: Tensor):
        """names of the kinds; centre [D]: the mean of all sentences' embeddings."""
        self.side, self.threshold, self.centre = model.side, model.settings.get("threshold"), centre
        self.named = model.texts([article(name) for name in names])
        ground = model.texts([f"the background is plain {ground}." for ground in BACKGROUNDS]).mean(0, keepdim=True)
        self.classes = torch.cat([F.normalize(ground, dim=-1), self.named])
        self.confusion, self.found = Confusion(len(self.classes)), []
        self.described = []  # of every scene, as a share: groups that find their sentence, in its own picture and in
        # a wrong one, chance, patches grouped, patches alike

    def add(self, patches: Tensor, masks: Tensor, facts: list, sentences: list):
        """patches [b,P,D], masks [b,S,S] of 1 + the object's index, the scenes, their sentences' embeddings [K,D]."""
        side, P = self.side, patches.shape[1]
        alike = ((patches @ patches.mT).mean((1, 2)) * P - 1) / max(P - 1, 1)
        for cells, wrong, mask, scene, texts, same in zip(patches, patches.roll(1, 0), masks, facts, sentences, alike):
            grouped, weights = group_patches(torch.stack([cells, wrong]), texts.expand(2, -1, -1), self.threshold)
            right = (grouped @ texts.T).argmax(-1) == torch.arange(len(texts), device=texts.device)  # [2, K]
            weights = weights[0].cpu()  # [K, P]
            self.described.append((*right.float().mean(1).tolist(), 1 / len(texts),
                                   (weights > 0).float().mean().item(), same.item()))
            queries = (texts, texts - self.centre, self.named, self.named - self.named.mean(0))
            peaks = [(cells @ x.T).argmax(0).tolist() for x in queries]
            covers = [on_object(mask, k, side) for k in range(len(scene.objects))]
            for k, about in enumerate(scene.about):
                if about >= 0:
                    on, kind = covers[about], scene.objects[about].kind
                    hits = [on[peak[which]] for peak, which in zip(peaks, (k, k, kind, kind))]
                    self.found.append((*hits, weights[k, on].sum(), on.float().mean()))
        maps = (patches @ self.classes.T).mT.unflatten(-1, (side, side))  # [b, C, side, side]
        guess = F.interpolate(maps, size=masks.shape[-2:], mode="bilinear").argmax(1).cpu()
        kinds = [torch.tensor([0] + [o.kind + 1 for o in scene.objects]) for scene in facts]
        self.confusion.add(torch.stack([kind[mask.long()] for kind, mask in zip(kinds, masks)]), guess)

    def rows(self) -> dict:
        *values, chance = (100 * torch.tensor(self.found, dtype=torch.float64).mean(0)).tolist()
        right, wrong, one, dense, alike = (100 * np.mean(self.described, 0)).tolist()
        return {name: (value, chance) for name, value in zip(self.ROWS, values)} | {
            "mIoU": self.confusion.miou(), "patches grouped": (dense, 100.0), "patches alike": (alike, 0.0),
            "group finds its sentence": (right, one), "group finds its sentence, wrong image": (wrong, one)}


def on_object(mask: Tensor, k: int, side: int) -> Tensor:
    """[P] (bool): which patches of a scene lie on object k, that is, are covered by its mask to 1/16 at least."""
    step = mask.shape[-1] // side
    return (mask == k + 1).float().view(side, step, side, step).mean((1, 3)).flatten() >= 1 / 16


def locality(model: Model, scenes: Scenes, n: int = 300) -> tuple[float, float]:
    """Does a patch embedding tell of its own place? A scene's smaller object is taken away: what share of the squared
    change of all patch embeddings lies on the patches where it was, in percent? -> (value, chance: a change that is
    equal everywhere). Near 100: patches are local; at chance every patch knows of the whole picture."""
    n, shares = min(n, len(scenes)), []
    facts = [scenes.scene(i) for i in range(n)]
    without = [replace(scene, objects=scene.objects[:-1]) for scene in facts]
    samples = Samples(2 * n, lambda i: (torch.from_numpy(scenes.draw((facts + without)[i])[0]).permute(2, 0, 1),))
    full, less = torch.cat([patches.cpu() for _, patches in model.batches(samples)]).float().split(n)  # [n, P, D]
    for scene, change in zip(facts, (full - less).square().sum(-1)):
        on = on_object(torch.from_numpy(scenes.draw(scene)[1]), len(scene.objects) - 1, model.side)
        if on.any():
            shares.append((change[on].sum() / change.sum(), on.float().mean()))
    return tuple((100 * torch.tensor(shares).mean(0)).tolist())


def pair_metrics(model: Model, dataset, n: int) -> tuple[dict, dict]:
    """Retrieval on held-out pictures with captions of their own -> {metric: (value, chance)}, and what figures need."""
    def sample(i):
        try:
            return dataset[i][:2]
        except BadSample as bad:
            return torch.zeros(3, model.config.image_size, model.config.image_size, dtype=torch.uint8), bad

    branches, captions = model.images(Samples(min(n, len(dataset)), sample))
    good, bad = [], BadCount()
    for i, found in enumerate(captions):
        bad.add(found) if isinstance(found, BadSample) else good.append(i)
    if bad:
        print(f"passed over: {bad.report()}")
    branches, captions = branches[good], [captions[i] for i in good]
    images, raw, long = model.merge(branches), [c.raw for c in captions], [" ".join(c.long) for c in captions]
    rows = prefixed("short", retrieval(images, model.texts(raw), same_text(raw), same_text(raw)))
    if long != raw:
        rows |= prefixed("long", retrieval(images, model.texts(long), same_text(long), same_text(long)))
    named = [dict(zip(PERSPECTIVES, c.perspectives), raw=c.raw, long=c.long) for c in captions]
    return rows, dict(branches=branches, captions=named, picture=lambda i: dataset[good[i]][0])


# ---- benchmarks: zero-shot classification ----------------------------------------------------------------------------

# A benchmark is a function (model, path) -> {metric: (value, chance)}; BENCHMARKS below names them all.

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a good photo of a {}.", "a blurry photo of a {}.",
             "a close-up photo of the {}.", "a cropped photo of a {}.", "a bright photo of the {}.",
             "a dark photo of a {}.", "a photo of one {}.", "a small {} in a photo.", "a large {} in a photo.",
             "a picture showing the {}.", "a drawing of a {}.")


def prompts(kind: str) -> tuple:
    """TEMPLATES with a word on what kind of thing it is, which CLIP (2103.00020, section 3.1.4) found to help."""
    return tuple(template.replace("{}", "{}" + kind) for template in TEMPLATES)


TORCHVISION = {  # name: class in torchvision.datasets, arguments for its test part, prompts
    "cifar10": ("CIFAR10", dict(train=False), TEMPLATES),
    "cifar100": ("CIFAR100", dict(train=False), TEMPLATES),
    "food101": ("Food101", dict(split="test"), prompts(", a type of food")),
    "pets": ("OxfordIIITPet", dict(split="test"), prompts(", a type of pet")),
    "flowers102": ("Flowers102", dict(split="test"), prompts(", a type of flower")),
    "dtd": ("DTD", dict(split="test"), prompts(" texture")),
    "caltech101": ("Caltech101", {}, TEMPLATES),  # all of it: torchvision knows no split, and no background class
    "aircraft": ("FGVCAircraft", dict(split="test"), prompts(", a type of aircraft")),
    "cars": ("StanfordCars", dict(split="test"), prompts(", a type of car")),
    "sun397": ("SUN397", {}, TEMPLATES),  # all of it, likewise
    "stl10": ("STL10", dict(split="test"), TEMPLATES),
    "country211": ("Country211", dict(split="test"), ("a photo taken in {}.", "a photo I took in {}.", "{}.")),
}


def class_embeddings(model: Model, prompts: list[list[str]]) -> Tensor:
    """C classes of T prompts each -> [C,D]: the mean of each class's prompts, of unit norm again."""
    embedded = model.texts([text for texts in prompts for text in texts])
    return F.normalize(embedded.unflatten(0, (len(prompts), -1)).mean(1), dim=-1)


def zero_shot(model: Model, dataset, path: Path, known: list[str] | None, templates=TEMPLATES) -> dict:
    """dataset[i] -> (PIL image, class). Names come from classnames.txt in `path`, a line a class in the order of their
    numbers, if it is there, else from `known`, else from `dataset.classes`. CLIP's own curated names are in its
    repository, data/prompts.md and notebooks/Prompt_Engineering_for_ImageNet.ipynb."""
    file, folders = path / "classnames.txt", getattr(dataset, "classes", None) or dataset.categories
    names = file.read_text().splitlines() if file.is_file() else known or [re.sub("[_/]", " ", f) for f in folders]
    if len(names) != len(folders):
        raise UserError(f"{file if file.is_file() else path} names {len(names)} classes, but the pictures have "
                        f"{len(folders)}: a line for each, in the order of {', '.join(map(str, folders[:3]))} ...")
    classes = class_embeddings(model, [[t.format(name) for t in templates] for name in names])

    def sample(i):
        image, target = dataset[i]
        return preparation(model.config.image_size)(image.convert("RGB")), target

    branches, target = model.images(Samples(len(dataset), sample))
    return classification(model.merge(branches), classes, torch.tensor(target))


def image_folder(model: Model, path: Path, known=None) -> dict:
    try:
        return zero_shot(model, torchvision_datasets.ImageFolder(path, loader=open_picture), path, known)
    except FileNotFoundError as error:
        raise UserError(f"{path} is no folder of class folders with pictures: {str(error).splitlines()[0]}") from None


def imagenet(model: Model, path: Path) -> dict:
    """The validation pictures in a folder for each of the 1,000 synsets, sorted; torchvision's class names."""
    folder = path / "val" if (path / "val").is_dir() else path
    return image_folder(model, folder, ResNet50_Weights.DEFAULT.meta["categories"])


def torchvision_set(name: str, model: Model, path: Path) -> dict:
    kind, arguments, templates = TORCHVISION[name]
    try:
        dataset = getattr(torchvision_datasets, kind)(path, download=False, **arguments)
    except (RuntimeError, OSError) as error:
        raise UserError(f"no {name} in {path}, laid out as torchvision.datasets.{kind} does "
                        f"({str(error).split('. ')[0]}); nothing is downloaded here") from None
    if name == "country211" and not (path / "classnames.txt").is_file():
        raise UserError(f"country211 knows its classes by codes such as AD: put 211 names into {path}/classnames.txt")
    return zero_shot(model, dataset, path, None, templates)


# ---- benchmarks: retrieval -------------------------------------------------------------------------------------------

# A layout is a generator: path -> (picture's path, captions) again and again, as the data set was published.

def the_file(path: Path, pattern: str) -> Path:
    """`path` itself if it is a file, else the one in it that the pattern fits."""
    found = [path] if path.is_file() else sorted(path.glob(pattern))
    if len(found) != 1:
        raise UserError(f"{path} has {len(found) or 'no'} {pattern}: name the file itself")
    return found[0]


def karpathy(path):  # COCO and Flickr30k: dataset_coco.json, val2014/; dataset_flickr30k.json, flickr30k-images/
    for row in read_json(the_file(path, "dataset_*.json"))["images"]:
        if row["split"] == "test":
            yield Path(row.get("filepath", ""), row["filename"]), [s["raw"] for s in row["sentences"]][:5]


def urban1k(path):  # image/N.jpg, caption/N.txt
    for file in sorted((path / "caption").glob("*.txt")):
        yield f"image/{file.stem}.jpg", file.read_text().splitlines()[:1]


def dci(path):  # densely_captioned_images/: splits.json, annotations/, photos/. All splits, texts as LoTLIP joins them
    root = path / "densely_captioned_images" if (path / "densely_captioned_images").is_dir() else path
    for name in (name for split in read_json(root / "splits.json").values() for name in split):
        row = read_json(root / "annotations" / name)
        yield root / "photos" / row["image"], [f"{row['short_caption']}\n{row['extra_caption']}"]


def iiw(path):  # IIW-400/data.jsonl, DCI_Test/, DOCCI_Test/; pictures anywhere in a folder of `path`
    for file in sorted(path.glob("*/*.jsonl")):
        for row in read_json(file):
            yield Path(row["image"] if "image" in row else row["image/key"]).with_suffix(".jpg"), [row["IIW"]]


def docci(path):  # docci_descriptions.jsonlines, images/; the test split
    for row in read_json(the_file(path, "*descriptions.jsonlines")):
        if row["split"] == "test":
            yield row["image_file"], [row["description"]]


def share4v(first, path):  # the first 1k or 10k of {"image", "conversations": question and answer, or "caption"}
    for row in read_json(the_file(path, "*.json"))[:first]:
        yield row["image"], [row["conversations"][1]["value"] if "conversations" in row else row["caption"]]


def json_lines(path):  # {"image", "caption": a text or a list}; lines of one image belong together
    for row in read_json(the_file(path, "*.jsonl")):
        yield row["image"], [row["caption"]] if isinstance(row["caption"], str) else row["caption"]


LAYOUTS = {"coco": karpathy, "flickr30k": karpathy, "urban1k": urban1k, "dci": dci, "iiw": iiw, "docci": docci,
           "share4v-1k": functools.partial(share4v, 1000), "share4v-10k": functools.partial(share4v, 10_000),
           "jsonl": json_lines}


def retrieval_set(name: str, model: Model, path: Path) -> dict:
    """Retrieval on a published data set; a caption's right answer is its own picture alone."""
    root, captions = path.parent if path.is_file() else path, {}
    try:
        for picture, texts in LAYOUTS[name](path):
            captions.setdefault(str(picture), []).extend(texts)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is not laid out as {name} was published ({type(error).__name__}: {error})") from None
    if not captions:
        raise UserError(f"{path} is not laid out as {name} was published: it has no captions")
    for picture, texts in captions.items():
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{path}: {picture} has an empty caption or none")
    files = [find_picture(root, picture) for picture in captions]
    prepare = preparation(model.config.image_size)
    branches, = model.images(Samples(len(files), lambda i: (prepare(open_picture(files[i])),)))
    texts = model.texts([text for texts in captions.values() for text in texts])
    owner = torch.repeat_interleave(torch.arange(len(files)), torch.tensor([len(t) for t in captions.values()]))
    return retrieval(model.merge(branches), texts, torch.arange(len(files)), owner)


def find_picture(root: Path, picture: str) -> Path:
    """root/picture, or, by its bare name, in any folder of the root."""
    found = root / picture
    if not found.is_file():
        found = next(root.glob(f"*/{found.name}"), None)
    if not found:
        raise UserError(f"no picture {picture} in {root} or a folder in it")
    return found


# ---- benchmarks: segmentation ----------------------------------------------------------------------------------------

VOC = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
       "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "television monitor")
STUFF = ("sky", "wall", "floor", "ground", "grass", "road", "water", "tree", "building", "ceiling", "mountain", "fence")


def voc(model: Model, path: Path) -> dict:
    """Pascal VOC 2012's validation part (VOCdevkit/VOC2012 in `path`). The whole picture is squeezed into the model's
    square; patch-text similarities are upsampled to the mask's size. mIoU: 20 classes and background, which is whatever
    resembles a name of STUFF more; mIoU of objects: among the 20, on their pixels alone. pointing: the pixel most
    similar to a class that the picture has is one of that class."""
    try:
        dataset = torchvision_datasets.VOCSegmentation(path, image_set="val", download=False)
    except (RuntimeError, OSError) as error:
        raise UserError(f"no VOCdevkit/VOC2012 in {path} ({str(error).split('. ')[0]}); nothing is downloaded "
                        "here") from None
    names = [[t.format(name) for t in TEMPLATES] for name in (*VOC, *STUFF)]
    classes, size = class_embeddings(model, names), (model.config.image_size,) * 2
    everything, objects, points = Confusion(21), Confusion(20), []

    def sample(i):
        image, mask = dataset[i]
        image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        return v2.functional.pil_to_tensor(image), torch.from_numpy(np.array(mask)).long()

    for _, patches, masks in model.batches(Samples(len(dataset), sample)):
        maps = (patches @ classes.T).mT.unflatten(-1, (model.side, model.side))  # [b, 32, side, side]
        for scores, mask in zip(maps, masks):
            scores = F.interpolate(scores[None], size=mask.shape, mode="bilinear")[0].cpu()
            guess = scores.argmax(0)
            everything.add(mask, torch.where(guess < 20, guess + 1, 0))
            objects.add(mask - 1, scores[:20].argmax(0))
            known = mask < 255
            for c in set(mask[known].tolist()) - {0}:
                on = (mask == c)[known]
                points.append((on[scores[c - 1][known].argmax()].item(), on.double().mean().item()))
    pointing, chance = 100 * np.mean(points, 0)
    return {"mIoU": everything.miou(), "mIoU of objects": objects.miou(), "pointing": (pointing, chance)}


BENCHMARKS = {"imagefolder": image_folder, "imagenet": imagenet, "voc": voc,
              **{name: functools.partial(torchvision_set, name) for name in TORCHVISION},
              **{name: functools.partial(retrieval_set, name) for name in LAYOUTS}}


def run_benchmarks(model: Model, wanted: list[str]) -> dict:
    """["coco:/data/coco", ...] -> {"coco T2I R@1": (value, chance), ...}. Raises UserError."""
    rows = {}
    for name, path in (item.partition(":")[::2] for item in wanted):
        if name not in BENCHMARKS or not path:
            raise UserError(f"--benchmark {name}:{path}: write NAME:PATH with one of {', '.join(BENCHMARKS)}")
        if not Path(path).exists():
            raise UserError(f"--benchmark {name}: there is no {path}")
        rows |= prefixed(name, BENCHMARKS[name](model, Path(path)))
    return rows


# ---- probes ----------------------------------------------------------------------------------------------------------

def reading(model: Model, images: Tensor, captions: list[dict], n: int = 500) -> dict:
    """Which part of a long caption does the model read? images [N,h,D]; captions with "long", a list of sentences.

    length: R@1 both ways when the first 1, 2, 3, ... sentences are given. place: two captions are the same sentences
    but for one telling sentence at place p, which is right in one and another picture's in the other; how often is the
    right caption the more similar one (chance 50; captions alike to the model, as behind its context, count half)?
    """
    images, captions = images[:n], captions[:n]
    counts = [len(c["long"]) for c in captions]
    length, place = [], []
    for sentences in sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, max(counts)}):
        if sentences <= max(counts):
            texts = [" ".join(c["long"][:sentences]) for c in captions]
            rows = retrieval(images, model.texts(texts), same_text(texts), same_text(texts))
            length.append([sentences, rows["T2I R@1"][0], rows["I2T R@1"][0], rows["T2I R@1"][1]])

    places = min(8, int(np.median(counts)))
    usable = [i for i, count in enumerate(counts) if count >= places]
    images, captions = images[usable], [captions[i] for i in usable]
    telling = [c.get("main_object") or c["long"][0] for c in captions]
    if places < 2 or len(set(telling)) < 2:
        return dict(length=length, place=place)
    rest = [[s for s in c["long"] if s != own][:places - 1] for c, own in zip(captions, telling)]
    others = [next(t for t in telling[i + 1:] + telling[:i] if t != own) for i, own in enumerate(telling)]

    def similar(told, p):  # each image to its caption with the sentence that is told of it at place p
        texts = model.texts([" ".join([*r[:p], t, *r[p:]]) for r, t in zip(rest, told)])
        return torch.einsum("nhd,nd->nh", images, texts).amax(1).cpu()

    for p in range(places):
        right, wrong = similar(telling, p), similar(others, p)
        place.append([p + 1, 100 * ((right > wrong).double() + 0.5 * (right == wrong)).mean().item()])
    return dict(length=length, place=place)


def specialisation(model: Model, found: dict) -> dict:
    """How much more similar branch h is to perspective m of its own picture than to that of other pictures: matrix
    [H][M], and the names of the perspectives."""
    names, matrix = [name for name in PERSPECTIVES if all(name in c for c in found["captions"])], []
    for name in names:
        texts = model.texts([c[name] for c in found["captions"]])
        sims = [branch @ texts.T for branch in found["branches"].unbind(1)]
        matrix.append([(sim.diag().mean() - sim.mean()).item() for sim in sims])
    return dict(matrix=np.transpose(matrix).tolist(), perspectives=names)


@contextmanager
def last_attention(tower):
    """Collects the attention of the tower's last block, averaged over heads, of all that is embedded in the `with`."""
    caught = []
    with tower.blocks[-1].attn.register_forward_hook(
            lambda attn, inputs, _: caught.append(attn.weights(*inputs).mean(1).float().cpu())):
        yield caught


# ---- figures ---------------------------------------------------------------------------------------------------------

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")  # Okabe and Ito's
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "figure.dpi": 120,
         "legend.frameon": False}


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """A figure of so many inches. It is not pyplot's: it needs no screen and no closing."""
    matplotlib.rcParams.update(STYLE)
    return Figure((width, height), layout=layout)


def draw_image(axis, image: Tensor, heat: Tensor | None = None):
    """image uint8 [3,S,S], under a veil of white that is thin where heat [side,side] is great."""
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.axis("off")
    if heat is not None:
        heat = heat / heat.max().clamp_min(1e-9)
        step = image.shape[-1] // len(heat)
        axis.imshow(np.ones(image.shape[1:]), cmap="gray", vmin=0, vmax=1,
                    alpha=0.92 * (1 - np.kron(heat.numpy() ** 2, np.ones((step, step)))))


def draw_curves(model: Model, path: Path):
    """Every loss against images seen, and the learned multiplier."""
    lines = read_json(model.folder / "metrics.jsonl")
    titles = dict(contrastive="contrastive loss", grouping="grouping loss", held_out_loss="loss on held-out images",
                  logit_scale="multiplier s")
    shown = {name: [(line["images"] / 1000, line[name]) for line in lines if name in line] for name in titles}
    shown = {name: points for name, points in shown.items() if points}
    figure = new_figure(4 * len(shown), 3)
    for axis, (name, points) in zip(figure.subplots(1, len(shown)), shown.items()):
        axis.plot(*zip(*points), color=PALETTE[0], lw=1.4, marker="o" if len(points) < 10 else None, ms=4)
        axis.set(title=titles[name], xlabel="thousand images seen")
        axis.grid(alpha=0.25)
    figure.suptitle(model.name)
    figure.savefig(path)


def draw_groups(model: Model, found: dict, path: Path, pictures: int = 4, sentences: int = 5):
    """Held-out pictures, and over each the weights of the patches that each of its sentences groups."""
    chosen = spread(len(found["captions"]), pictures)
    shown = [list(dict.fromkeys([*c["long"], c["raw"]]))[:sentences] for c in (found["captions"][i] for i in chosen)]
    images = torch.stack([found["picture"](i) for i in chosen])
    (_, patches), = model.batches([(image,) for image in images])
    columns = 1 + max(map(len, shown))
    figure = new_figure(2.3 * columns, 2.9 * len(chosen))
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, image, cells, texts in zip(axes, images, patches, shown):
        _, weights = group_patches(cells[None], model.texts(texts)[None], model.settings.get("threshold"))
        draw_image(row[0], image)
        for axis, text, weight in zip(row[1:], texts, weights[0].cpu()):
            draw_image(axis, image, weight.view(model.side, model.side))
            axis.set_title("\n".join(textwrap.wrap(text, 26, max_lines=4, placeholder=" …")), fontsize=9.5)
    figure.suptitle(f"{model.name}: the patches that each sentence groups (bright: much weight)")
    figure.savefig(path)


def draw_matrix(axis, matrix, rows, columns, form):
    axis.imshow(matrix, cmap="viridis", aspect="auto")
    axis.set(xticks=range(len(columns)), yticks=range(len(rows)), yticklabels=rows)
    axis.set_xticklabels(columns, rotation=35, ha="right", rotation_mode="anchor")
    for (y, x), value in np.ndenumerate(matrix):
        colour = "white" if value < (matrix.min() + matrix.max()) / 2 else "black"
        axis.text(x, y, form.format(value), ha="center", va="center", color=colour, fontsize=9.5)


def draw_branches(matrices: dict, path: Path):
    """{title: what `specialisation` found} -> a matrix each, side by side."""
    H, M = (max(len(found[key]) for found in matrices.values()) for key in ("matrix", "perspectives"))
    figure = new_figure((M + 1.8) * len(matrices), 0.6 * H + 2)
    for axis, (title, found) in zip(figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items()):
        matrix = np.round(found["matrix"], 2) + 0.0  # no "-0.00"
        draw_matrix(axis, matrix, [f"branch {h}" for h in range(len(matrix))],
                    [name.replace("_", " ") for name in found["perspectives"]], "{:.2f}")
        axis.set_title(title)
    figure.suptitle("similarity to the own picture's text,\nabove the mean over pictures")
    figure.savefig(path)


@torch.no_grad()
def draw_attention(model: Model, found: dict, path: Path, pictures: int = 3, words: int = 22):
    """Last layers: where a text's summary tokens look among its words, and each class token among the patches."""
    clip, C, by_class = model.clip, model.config.corner_tokens, model.config.pool == "class"
    text = " ".join(found["captions"][0]["long"])
    tokens = model.tokenizer([text], min(words + 2, model.config.context)).to(model.device)
    with last_attention(clip.text) as caught:
        clip.encode_text(tokens)
    end, L = int(tokens.argmax()), tokens.shape[1]
    summary = [end if clip.text.causal else 0, *range(L, L + C)]
    look = caught[0][0][summary][:, 1:end].numpy()
    images = torch.stack([found["picture"](i) for i in range(min(pictures, len(found["captions"])))])
    heights = [1.8 + 0.35 * len(summary)] + [2.1 * len(images)] * by_class
    figure = new_figure(13, 2.2 + 0.35 * len(summary) + 2.1 * len(images) * by_class)
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axis, names = upper.subplots(), ["end" if clip.text.causal else "[CLS]", *(f"corner {c + 1}" for c in range(C))]
    draw_matrix(axis, 100 * look, names, [model.tokenizer.decode([i]) for i in tokens[0, 1:end]], "{:.0f}")
    axis.set_title("attention of the summary tokens to words, % (last layer, mean over heads)")
    if by_class:
        with last_attention(clip.visual) as caught:
            clip.encode_image(normalize(images.to(model.device)))
        T = len(clip.visual.class_embedding)
        heat = caught[0].unflatten(0, (-1, len(images)))[:, :, :T, T:].permute(1, 0, 2, 3).flatten(1, 2)  # [n, H, P]
        axes = lower[0].subplots(len(images), 1 + heat.shape[1], squeeze=False)
        for row, image, heats in zip(axes, images, heat):
            draw_image(row[0], image)
            for h, (axis, weight) in enumerate(zip(row[1:], heats)):
                draw_image(axis, image, weight.view(model.side, model.side))
                axis.set_title(f"branch {h}" if heat.shape[1] > 1 else "class token")
    figure.suptitle(model.name)
    figure.savefig(path)


def draw_reading(curves: dict, path: Path):
    """{model: what `reading` found} -> R@1 against the sentences given, accuracy against the telling one's place."""
    figure = new_figure(12.5, 4.2)
    left, right = figure.subplots(1, 2)
    for colour, (name, found) in zip(PALETTE * len(curves), curves.items()):
        sentences, t2i, i2t, chance = zip(*found["length"])
        left.plot(sentences, t2i, "o-", color=colour, ms=5, label=name)
        left.plot(sentences, i2t, "s--", color=colour, ms=4, alpha=0.7)
        if found["place"]:
            right.plot(*zip(*found["place"]), "o-", color=colour, ms=5)
    figure.get_layout_engine().set(w_pad=0.12)
    left.plot(sentences, chance, ":", color="grey", label="chance")
    right.axhline(50, ls=":", color="grey")
    left.set(xlabel="sentences of the long caption given", ylabel="R@1, %", ylim=(0, None),
             title="Does more text help? (to image: ―  to text: ‒ ‒)")
    right.set(xlabel="place of the one sentence that differs", ylabel="right caption preferred, %",
              title="Is a sentence read wherever it stands?")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.legend(loc="outside right center")
    figure.savefig(path)


def draw_comparison(groups: list[dict], path: Path):
    """Every headline metric: a dot for each method, whiskers of one standard deviation over seeds, chance dotted."""
    names = headline(groups)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(3.1 * columns, (0.38 * len(groups) + 1.2) * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis, name in zip(axes.flat, names):
        for y, (group, colour) in enumerate(zip(groups, PALETTE * len(groups))):
            if m := group["metrics"].get(name):
                axis.errorbar(m["mean"], y, xerr=m["sd"], fmt="o", color=colour, capsize=3)
                axis.axvline(m["chance"], ls=":", color="grey")
        axis.set(title=textwrap.fill(name, 28), yticks=range(len(groups)), yticklabels=[g["name"] for g in groups],
                 ylim=(len(groups) - 0.5, -0.5))
        axis.margins(x=0.15)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    figure.suptitle("%; whiskers: one standard deviation over seeds; dotted: chance")
    figure.savefig(path)


# ---- reports ---------------------------------------------------------------------------------------------------------

# A table of several runs shows the metrics whose names end in these.
HEADLINE = ("R@1", "top-1", "unseen colour and object", "pointing by sentence", "pointing", "mIoU")


def evaluate_run(path, n: int | None = None, branch: str = "mean", data=None, figures: bool = True, device=None,
                 benchmarks=(), probe: bool = True, **options) -> dict:
    """Evaluates one model on its held-out data, or on benchmarks instead, prints its table and, for a run of ours,
    writes evaluation.json (benchmarks.json) and figures into its folder -> dict of name, settings, metrics {name:
    (value, chance)}, reading (None without `probe`). `options`: Model's."""
    model = Model(path, device, branch, **options)
    s, reads, special = model.settings, None, None
    if benchmarks:
        rows, about = run_benchmarks(model, benchmarks), {}
    else:
        where = {} if data else {name: s[name] for name in ("image_root", "caption_fields") if name in s}
        data, n = data or s.get("data"), n or s.get("eval_images") or 1000
        if not data:
            raise UserError(f"{path} has no held-out data of its own: score it with --benchmark or --data")
        dataset = open_dataset(data, "test", n, model.config.image_size, s["kinds"], **where)
        scenes = getattr(dataset, "scenes", None)
        rows, found = scene_metrics(model, scenes) if scenes else pair_metrics(model, dataset, n)
        if scenes:
            rows["locality of patches"] = locality(model, scenes)
        about = {"data": data if isinstance(data, str) else " ".join(data), "images": len(found["captions"])}
        if probe and any(len(c["long"]) > 1 for c in found["captions"]):
            reads = reading(model, model.merge(found["branches"]), found["captions"])
        if model.config.branches > 1:
            special = specialisation(model, found)
    report = about | dict(branch=branch, image_size=model.config.image_size, reading=reads, specialisation=special,
                          metrics={name: {"value": value, "chance": chance} for name, (value, chance) in rows.items()})
    if model.folder:
        file = model.folder / ("benchmarks.json" if benchmarks else "evaluation.json")
        file.write_text(json.dumps(report, indent=1))
    print(run_table(model.name, rows))
    if not benchmarks:
        drawn = draw_run(model, found, reads, special) if figures and model.folder else []
        print(f"{about['images']} held-out images of {about['data']}"
              + (f"; figures in {model.folder}: {', '.join(drawn)}" if drawn else ""))
    return dict(name=model.name, settings=s, metrics=rows, reading=reads)


def draw_run(model: Model, found: dict, reads: dict | None, special: dict | None) -> list[str]:
    """Every figure that this run has something to show in, into its folder -> their names."""
    figures = {"patches": (draw_groups, model, found), "attention": (draw_attention, model, found)}
    if (model.folder / "metrics.jsonl").exists():
        figures["curves"] = draw_curves, model
    if special:
        figures["branches"] = draw_branches, {model.name: special}
    if reads:
        figures["reading"] = draw_reading, {model.name: reads}
    for name, (draw, *shown) in figures.items():
        draw(*shown, model.folder / f"{name}.png")
    return [f"{name}.png" for name in sorted(figures)]


def run_table(name: str, rows: dict) -> str:
    """One model's metrics as markdown: retrieval with both directions in a row, then all the rest."""
    columns = [f"{way} {what}" for way in ("T2I", "I2T") for what in ("R@1", "R@5", "R@10", "median rank")]
    sets = [key.removesuffix(" T2I R@1") for key in rows if key.endswith(" T2I R@1")]
    lines, rest = [], dict(rows)
    if sets:
        lines = [f"| {name}: retrieval, % | " + " | ".join(columns) + " | chance R@1, R@10, rank |",
                 "|---|" + "---:|" * 9]
    for which in sets:
        values, chances = zip(*(rest.pop(f"{which} {column}") for column in columns))
        chance = ", ".join(f"{chances[k]:.3g}" for k in (0, 2, 3))
        lines.append(f"| {which} | " + " | ".join(f"{value:.1f}" for value in values) + f" | {chance} |")
    if rest:
        lines += [""] * bool(lines) + [f"| {name}: other, % | | chance |", "|---|---:|---:|"]
        lines += [f"| {key} | {value:.1f} | {chance:.1f} |" for key, (value, chance) in rest.items()]
    return "\n".join(lines)


def summarise(results: list[dict]) -> list[dict]:
    """Results of evaluate_run -> a group for all runs that differ in their seed alone: name, runs, metrics {name: mean,
    sd, values, chance, difference from the first group of method clip}."""
    groups, summary = {}, []
    for result in results:
        alike = {k: v for k, v in result["settings"].items() if k not in ("seed", "out", "resume")}
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(result)
    methods = [group[0]["settings"]["method"] for group in groups.values()]
    for method, group in zip(methods, groups.values()):
        metrics = {}
        for name, (_, chance) in group[0]["metrics"].items():
            values = [run["metrics"][name][0] for run in group if name in run["metrics"]]
            metrics[name] = dict(mean=float(np.mean(values)), sd=deviation(values), values=values, chance=chance)
        summary.append(dict(name=method if methods.count(method) == 1 else group[0]["name"], method=method,
                            runs=[run["name"] for run in group], metrics=metrics, reading=group[0]["reading"]))
    baseline = next((group for group in summary if group["method"] == "clip"), None)
    for group in summary:
        for name, metric in group["metrics"].items():
            if baseline and group is not baseline and name in baseline["metrics"]:
                metric["difference"] = metric["mean"] - baseline["metrics"][name]["mean"]
    return summary


def deviation(values) -> float:
    """The standard deviation over seeds, 0 of a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0


def headline(groups: list[dict]) -> list[str]:
    names = dict.fromkeys(name for group in groups for name in group["metrics"])
    return [name for name in names if name.endswith(HEADLINE)]


def table(groups: list[dict]) -> str:
    """Markdown: a row a method, its headline metrics as mean ± sd over seeds (difference from clip), chance last."""
    names, chances = headline(groups), {}
    lines = ["| %, ± over seeds (beside clip) | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for group in groups:
        cells, n = [], len(group["runs"])
        for name in names:
            if m := group["metrics"].get(name):
                chances[name] = f"{m['chance']:.1f}"
                cells.append(f"{m['mean']:.1f}" + (f" ± {m['sd']:.1f}" if len(m["values"]) > 1 else "")
                             + (f" ({m['difference']:+.1f})" if "difference" in m else ""))
            else:
                cells.append("")
        lines.append(f"| {group['name']}" + (f", {n} seeds" if n > 1 else "") + " | " + " | ".join(cells) + " |")
    return "\n".join(lines + ["| chance | " + " | ".join(chances[name] for name in names) + " |"])


def export(model: Model, kind: str, file: Path):
    """Writes the weights for another project, and the model's config beside them."""
    if kind != "open_clip":
        raise UserError(f"--export {kind}: the one format there is, is open_clip")
    try:
        state, config = to_open_clip(model.clip)
    except ValueError as error:
        raise UserError(f"{model.name}: {error}") from None
    beside = file.with_suffix(".json")
    torch.save(state, file)
    beside.write_text(json.dumps(config, indent=1))
    print(f"wrote {file} and {beside}: open_clip.add_model_config({str(beside)!r}); "
          f"open_clip.create_model({file.stem!r}, pretrained={str(file)!r})")
    if model.tokenizer.name != "clip":
        print(f"its texts are tokens of our tokenizer {model.tokenizer.name!r}, which open_clip has not: only models "
              "trained with --tokenizer clip can be scored there")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or checkpoint files, ours or released ones")
    parser.add_argument("--benchmark", nargs="+", metavar="NAME:PATH", default=[], help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--data", nargs="+", help="evaluate on this instead of the run's own data (as in train.py)")
    parser.add_argument("--images", type=int, help="held-out images to use")
    parser.add_argument("--branch", default="mean", help="mean, max, or the number of a branch")
    parser.add_argument("--image-size", type=int, help="another resolution: position embeddings are interpolated")
    parser.add_argument("--activation", choices=("gelu", "quickgelu"), help="of a released checkpoint")
    parser.add_argument("--tokenizer", help="instead of the model's own")
    parser.add_argument("--device")
    parser.add_argument("--json", metavar="FILE", help="write all metrics of all runs")
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--export", nargs=2, metavar=("open_clip", "FILE"), help="write the weights instead")
    options = parser.parse_args(argv)
    if options.images is not None and options.images < 1:
        raise UserError(f"--images must be at least 1, not {options.images}")
    check_device(options.device or "cpu")
    model = dict(image_size=options.image_size, activation=options.activation, tokenizer=options.tokenizer)
    if options.export:
        return export(Model(options.runs[0], "cpu", **model), options.export[0], Path(options.export[1]))
    results = [evaluate_run(run, options.images, options.branch, options.data, not options.no_figures, options.device,
                            options.benchmark, **model) for run in options.runs]
    groups = summarise(results)
    if len(results) > 1:
        print("\n" + table(groups))
    if len(groups) > 1 and not options.no_figures:
        folder = Path(options.runs[0]).resolve().parent
        draw_comparison(groups, folder / "comparison.png")
        curves = {group["name"]: group["reading"] for group in groups if group["reading"]}
        if curves:
            draw_reading(curves, folder / "reading.png")
        print(f"figures in {folder}: comparison.png" + ", reading.png" * bool(curves))
    if options.json:
        Path(options.json).write_text(json.dumps(groups, indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
