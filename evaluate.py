"""Evaluate models: zero-shot classification, retrieval by short and long captions, pointing, segmentation.

    python evaluate.py runs/dreamlip-tiny                 a run on its own held-out data, with figures in its folder
    python evaluate.py runs/*                             a table with a row a run
    python evaluate.py RUN --branch 2 --out FOLDER        by one of its branches instead of their mean
    python evaluate.py RUN --benchmark cifar10:data imagefolder:pets urban1k:Urban1k coco:coco/dataset_coco.json
    python evaluate.py RUN --picture dog.jpg "a brown dog" "a red sofa"              how similar, and where
    python evaluate.py RUN --search FOLDER "a dog on a sofa"                         a folder's most similar pictures
    python evaluate.py RUN --export open_clip model.pt    or transformers FOLDER, for CLIPModel.from_pretrained

RUN may be somebody else's checkpoint. Numbers are in percent, beside their chance level; ties count against the model.
A run's standard evaluation is written into its folder; any other (--images, --data, best.pt ...) only into --out.
"""

import math
import os
import re
import textwrap
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torchvision import datasets
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize
from tqdm import tqdm

from data import (BadSample, Parser, Records, SceneImages, UserError, at_least, check_target, clean_field,
                  contact_sheet, image_field, load_image, load_tokenizer, normalize, open_dataset, read_captions,
                  read_json, run_script, spread, write_clip_tokenizer, write_json)
from losses import group_patches
from model import best_device, check_device, checkpoints, export_transformers, load_model, resized, to_open_clip
from scenes import BACKGROUNDS, COLOURS, KINDS, article, is_unseen

# ---- models and embeddings -------------------------------------------------------------------------------------------

class Model:
    """A run of this project (its folder, checkpoint.pt or best.pt) or somebody else's checkpoint, with its tokenizer.
    settings: the run's, else what the shapes tell; folder: the run's, else None; branch: "mean" or a number.
    Raises UserError."""

    batch = 256  # images embedded at once

    def __init__(self, path, device=None, branch="mean", image_size=None, activation=None, tokenizer=None):
        path = Path(path).absolute()
        clip, self.settings = load_model(path, activation)
        if image_size:
            clip = resized(clip, image_size)
        self.config = clip.config
        self.device = device or best_device()
        self.clip = clip.to(self.device).eval()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # exact, whatever trained
        folder = path if path.is_dir() else path.parent
        self.name = folder.name if path.is_dir() else f"{folder.name}-{path.stem}"
        self.folder = folder if "seed" in self.settings else None
        choices = ["mean", *map(str, range(self.config.branches))]
        if branch not in choices:
            raise UserError(f"--branch {branch}: take one of this model's: {', '.join(choices)}")
        self.branch = branch
        self.tokenizer = load_tokenizer(tokenizer or self.settings["tokenizer"])
        if self.tokenizer.vocab_size != self.config.vocab:
            raise UserError(f"{path} was not trained with tokenizer {self.tokenizer.name!r}, whose vocabulary is "
                            "another: name its own with --tokenizer")

    @torch.no_grad()
    def encode(self, images):
        """b images uint8 [3,S,S] -> branches [b,H,D], patches [b,P,D]. Raises UserError."""
        pixels = normalize(torch.stack(images).to(self.device))
        branches, patches = self.clip.encode_image(pixels)
        if not branches.isfinite().all():
            raise UserError(f"{self.name} embeds images as NaN or infinity: take another checkpoint")
        return branches, patches

    def batches(self, items, load):
        """load(item) -> (image uint8 [3,S,S], a label of any kind). Yields batch by batch branches [b,H,D],
        patches [b,P,D] and a tuple of b labels. Items for which `load` raises BadSample are skipped and reported.
        Raises UserError if all are bad."""
        bad = []

        def try_load(number):
            try:
                return load(items[number])
            except BadSample as error:
                bad.append(error)

        numbers = torch.arange(len(items))
        with ThreadPoolExecutor() as pool:
            for some in tqdm(numbers.split(self.batch), "batches of images", leave=False, disable=None):
                samples = list(filter(None, pool.map(try_load, some.tolist())))
                if samples:
                    images, labels = zip(*samples)
                    yield *self.encode(images), labels
        if len(bad) == len(items):
            raise UserError("no picture can be read")
        if bad:
            print(f"skipped: {len(bad)}, the first: {bad[0]}")

    def images(self, items, load):
        """As `batches`, all at once: images [N,D], as from `merge`, and a list of N labels."""
        parts = []
        labels = []
        for branches, _, some in self.batches(items, load):
            parts.append(self.merge(branches))
            labels += some
        return torch.cat(parts), labels

    @torch.no_grad()
    def texts(self, texts):
        """N texts -> [N,D], by their end-of-text (or [CLS]) token alone."""
        tokens = self.tokenizer(texts, self.config.context).to(self.device)
        parts = [self.clip.encode_text(some, with_tokens=False)[0][:, 0] for some in tokens.split(1024)]
        return torch.cat(parts)

    def embed(self, pictures):
        """N pictures, paths or PIL images -> [N,D]; like `texts`, for use from Python. Raises UserError."""
        images, _ = self.images(pictures, lambda picture: (self.prepare(picture), None))
        return images

    def prepare(self, picture):
        """A picture, path or PIL image -> uint8 [3,S,S], as CLIP does it: the shorter side is resized to S (bicubic),
        then the centre cropped. Raises UserError."""
        if not isinstance(picture, Image.Image):
            try:
                picture = load_image(picture)
            except BadSample as bad:
                raise UserError(f"{bad}: mend it, because no picture is left out here") from None
        S = self.config.image_size
        picture = resize(picture.convert("RGB"), S, Image.Resampling.BICUBIC)
        return pil_to_tensor(center_crop(picture, S))

    def merge(self, branches):
        """[N,H,D] -> [N,D]: one branch, of unit norm, or the branches' mean, whose similarities are their mean."""
        if self.branch == "mean":
            return branches.mean(1)
        return branches[:, int(self.branch)]


def class_embeddings(model, names, templates):
    """C names -> [C,D]: the mean over templates ({0}: the name, {1}: with its article), normalised again."""
    prompts = []
    for name in names:
        prompts += [template.format(name, article(name)) for template in templates]
    embedded = model.texts(prompts).unflatten(0, (len(names), -1))
    return F.normalize(embedded.mean(1), dim=-1)


# ---- metrics ---------------------------------------------------------------------------------------------------------

# A metric is a pair (value, chance). Functions that count several return {name: (value, chance)}.
BLOCK = 100  # queries compared at once


def ranks(queries, candidates, query_of, candidate_of):
    """How many wrong candidates are at least as similar as a query's best right one: 0 is best, ties count against it.
    queries [Q,D], candidates [C,D]: a candidate is right if its group is the query's: query_of [Q], candidate_of [C]
    (int). BLOCK queries at a time, so 100,000 × 500,000 fit."""
    found = []
    for some, groups in zip(queries.split(BLOCK), query_of.split(BLOCK)):
        scores = some @ candidates.T
        right = (groups[:, None] == candidate_of).to(scores.device)
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ahead = ~right & ~(scores < best)  # so a NaN counts against the model, too
        found.append(ahead.sum(1).cpu())
    return torch.cat(found)


def percent(hits):
    return 100 * hits.double().mean().item()


def recall(queries, candidates, query_of, candidate_of):
    """R@1, R@5 and R@10; arguments as in `ranks`."""
    rank = ranks(queries, candidates, query_of, candidate_of)
    C = len(candidate_of)
    right = candidate_of.bincount()[query_of].tolist()  # how many candidates are right for each query
    rows = {}
    for k in (1, 5, 10):
        # In a random order none of m candidates is among the first k with probability (C-m choose k) / (C choose k).
        first = min(k, C)
        orders = math.comb(C, first)
        missed = [math.comb(C - m, first) / orders for m in right]
        rows[f"R@{k}"] = percent(rank < k), 100 - 100 * np.mean(missed)
    return rows


def retrieval(images, texts, image_of, text_of):
    """Recall both ways. images [N,D], texts [M,D]; a pair is right if its groups image_of [N] and text_of [M] are
    equal. A query is a hit if one of its right answers is among the k best, as in CLIP's paper and CLIP_benchmark."""
    to_image = prefixed("T2I", recall(texts, images, text_of, image_of))
    return to_image | prefixed("I2T", recall(images, texts, image_of, text_of))


def caption_retrieval(images, captions, embedded):
    """Retrieval where image i belongs to captions[i], embedded as embedded[i]; equal captions are one group."""
    _, groups = np.unique(captions, return_inverse=True)
    groups = torch.from_numpy(groups)
    return retrieval(images, embedded, groups, groups)


def classification(images, classes, target):
    """images [N,D], classes [C,D], target [N] -> top-1, top-5 and the mean over classes of top-1."""
    C = len(classes)
    rank = ranks(images, classes, target, torch.arange(C))
    rows = {}
    for k in (1, 5):
        if k <= C:
            rows[f"top-{k}"] = percent(rank < k), 100 * k / C
    by_class = []
    for c in target.unique():
        by_class.append(percent(rank[target == c] < 1))
    rows["mean per class"] = np.mean(by_class), 100 / C
    return rows


def confusion(truth, guess, C):
    """Pixels by true and guessed class [C,C]; int tensors of one shape. A truth outside 0..C-1 is ignored."""
    known = (truth >= 0) & (truth < C)
    pairs = truth[known] * C + guess[known]
    return pairs.bincount(minlength=C * C).view(C, C).double()


def miou(counts):
    """`confusion` -> mean intersection over union of the classes that occur, and that of a uniform guess."""
    truth = counts.sum(1)
    guessed = counts.sum(0)
    hit = counts.diag()
    overlap = hit / (truth + guessed - hit)
    by_chance = truth / (len(counts) * truth + truth.sum() - truth)
    occurs = truth > 0
    return percent(overlap[occurs]), percent(by_chance[occurs])


def square(x):
    """[..., P] of an image's patches -> [..., side, side]."""
    side = math.isqrt(x.shape[-1])
    return x.unflatten(-1, (side, side))


def pixel_scores(patches, classes, size):
    """patches [P,D] of one image, classes [C,D] -> similarities upsampled to [C,*size]."""
    maps = square(classes @ patches.T)
    return F.interpolate(maps[None], size=size, mode="bilinear")[0]


def prefixed(prefix, rows):
    return {f"{prefix} {name}": row for name, row in rows.items()}


# ---- a run's own held-out data ---------------------------------------------------------------------------------------

SCENE_PROMPTS = (
    "the main object is {1}.",
    "the largest thing here is {1}.",
    "a picture of {1}.",
    "{0}",
    "{0} clipart",
)


def held_out_metrics(model, dataset, n):
    """Retrieval among n samples, spread over a dataset, by the kinds of text that all of them have (scenes: short and
    long), and, for scenes, all their metrics -> metrics, captions {number in the dataset: data.Captions}."""
    def load(number):
        image, captions = dataset[number]
        return image, (number, captions)

    scenes = dataset if isinstance(dataset, SceneImages) else None
    branches = []
    captions = {}
    patches = []  # of each scene [P,D]
    others = []  # those of another scene in its batch
    for embedded, cells, numbered in model.batches(spread(len(dataset), n), load):
        branches.append(embedded)
        captions.update(numbered)
        if scenes:
            cells = cells.cpu()
            patches.extend(cells)
            others.extend(cells.roll(1, 0))
    branches = torch.cat(branches)
    images = model.merge(branches)
    sentences = [[sentence.text for sentence in c.long] for c in captions.values()]
    long = [" ".join(said) for said in sentences]
    kinds = {
        "raw": [c.raw for c in captions.values()],
        "short": ["".join(c.short[:1]) for c in captions.values()],
        "long": long,
    }
    if scenes:
        del kinds["raw"]
    rows = {}
    for kind, texts in kinds.items():
        if all(texts) and (kind == "raw" or texts != kinds.get("raw")):
            rows |= prefixed(kind, caption_retrieval(images, texts, model.texts(texts)))
    if scenes:
        facts = [scenes.scene(number) for number in captions]
        texts = model.texts(sum(sentences, [])).cpu()
        texts = texts.split([len(said) for said in sentences])  # of each scene [K,D]
        averages = F.normalize(torch.stack([said.mean(0) for said in texts]), dim=1)
        rows |= prefixed("long by sentence", caption_retrieval(images.cpu(), long, averages))
        rows |= prefixed("perspectives", perspective_retrieval(model, branches, captions.values()))
        rows |= scene_classification(model, images, scenes.kinds, facts)
        rows |= patch_metrics(model, scenes, facts, patches, others, texts)
    return rows, captions


def perspective_retrieval(model, branches, captions):
    """Retrieval by the texts of each of Holistic CLIP's perspectives, the mean over them. If every perspective has
    trained its own branch (M2M), that branch represents the images; else `merge` of branches [N,H,D]."""
    trained = model.settings.get("perspectives")
    M = trained or 5  # the paper's number
    found = defaultdict(list)
    for m, texts in enumerate(zip(*[c.perspectives[:M] for c in captions])):
        images = branches[:, m] if trained == model.config.branches else model.merge(branches)
        for name, row in caption_retrieval(images, texts, model.texts(texts)).items():
            found[name].append(row)
    return {name: np.mean(rows, 0).tolist() for name, rows in found.items()}


def scene_classification(model, images, kinds, facts):
    """Zero-shot kinds of the main object, and pairs of kind and colour: seen in training, and held out of it."""
    names = [name for name, _ in KINDS[:kinds]]
    pairs = [f"{colour} {name}" for name, colour in product(names, COLOURS)]
    main = [scene.objects[0] for scene in facts]
    target = torch.tensor([o.kind * len(COLOURS) + o.colour for o in main])
    unseen = torch.tensor([is_unseen(o.kind, o.colour) for o in main])
    classes = class_embeddings(model, names, SCENE_PROMPTS)
    rows = prefixed("zero-shot", classification(images, classes, target // len(COLOURS)))
    classes = class_embeddings(model, pairs, SCENE_PROMPTS[:1])
    for name, chosen in (("seen", ~unseen), ("unseen", unseen)):
        if chosen.any():
            rows[f"{name} colour and object"] = classification(images[chosen], classes, target[chosen])["top-1"]
    return rows


def ground_and_kinds(model, kinds):
    """[1 + kinds, D]: any background, and the kinds of object by name."""
    grounds = model.texts([f"the background is plain {ground}." for ground in BACKGROUNDS])
    objects = model.texts([article(name) for name, _ in KINDS[:kinds]])
    return torch.stack([F.normalize(grounds.mean(0), dim=0), *objects]).cpu()


def patch_metrics(model, scenes, facts, patches, others, sentences):
    """Metrics of patches, from each scene's facts, its patches [P,D], those of another scene in its batch, and its
    sentences [K,D].

    patches grouped, group finds its sentence: see `group_metrics`; wrong image: with the patches of the other scene,
    which the sentences do not describe. Pointing: is the patch most similar to a sentence about one object (or to the
    object's name) on the object? mIoU: every pixel gets the class whose name is most similar to its upsampled
    patches."""
    found = defaultdict(list)  # metric: (value, chance) as shares, of every scene or of every sentence
    counts = 0
    classes = ground_and_kinds(model, scenes.kinds)
    threshold = model.settings.get("threshold")
    for scene, cells, wrong, texts in zip(facts, patches, others, sentences):
        grouped, finds = group_metrics(cells, texts, threshold)
        _, finds_wrong = group_metrics(wrong, texts, threshold)
        chance = 1 / len(texts)
        found["patches grouped"].append((grouped, 1))
        found["group finds its sentence"].append((finds, chance))
        found["group finds its sentence, wrong image"].append((finds_wrong, chance))
        mask = torch.from_numpy(scenes.draw(scene)[1]).long()  # [S,S]: 0 or 1 + object
        numbers = torch.tensor([0] + [1 + o.kind for o in scene.objects])  # of the classes in the mask
        for about, text in zip(scene.about, texts):
            if about >= 0:  # -1: not about a single object
                on = patches_on(mask == about + 1, len(cells))
                name = classes[numbers[about + 1]]
                chance = on.double().mean()
                found["pointing by sentence"].append((on[(cells @ text).argmax()], chance))
                found["pointing by name"].append((on[(cells @ name).argmax()], chance))
        guess = pixel_scores(cells, classes, mask.shape).argmax(0)
        counts += confusion(numbers[mask], guess, len(classes))
    rows = {}
    for name, shares in found.items():
        value, chance = torch.tensor(shares, dtype=torch.float64).mean(0).tolist()
        rows[name] = 100 * value, 100 * chance
    rows["mIoU"] = miou(counts)
    return rows


def group_metrics(patches, texts, threshold):
    """patches [P,D] and sentences [K,D] of an image -> the share of patches with a grouping weight (DreamLIP, section
    3.3) above 0 (1: dense weights), and the share of sentences whose group is more similar to them than to the
    caption's other sentences."""
    groups, weights = group_patches(patches[None], texts[None], threshold)
    finds = (groups[0] @ texts.T).argmax(1) == torch.arange(len(texts))
    return (weights > 0).double().mean(), finds.double().mean()


def patches_on(pixels, P):
    """Which of P patches an object is on [P]: its pixels [S,S] cover at least 1/16 of them."""
    covered = F.adaptive_avg_pool2d(pixels[None].double(), math.isqrt(P))
    return covered.flatten() >= 1 / 16


# ---- benchmarks ------------------------------------------------------------------------------------------------------

# CLIP's templates, from its repository: 80 for ImageNet, from notebooks/Prompt_Engineering_for_ImageNet.ipynb, those of
# other sets from data/prompts.md. "voc": VOC's 20 classes, and 12 names of our own for the background.
TEMPLATES = read_json(Path(__file__).parent / "assets" / "templates.json")
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


class ClassFolders(datasets.ImageFolder):
    """Class folders in the order of their names, or of their numbers where all are numbers, as in ImageNet-V2."""
    def find_classes(self, directory):
        classes, _ = super().find_classes(directory)
        if all(map(str.isdecimal, classes)):
            classes.sort(key=int)
        return classes, {name: number for number, name in enumerate(classes)}


def open_set(kind, path, **options):
    """A data set of torchvision's, or ClassFolders. Raises UserError."""
    try:
        return kind(path, **options)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} does not hold what torchvision's {kind.__name__} reads ({str(error).split('. ')[0]}); "
                        "nothing is downloaded here") from None


def imagenet_names():
    """CLIP's names of ImageNet's 1,000 classes, which open_clip has. (Two of them are two classes' name: such ties
    count against the model.) Raises UserError."""
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ImportError:
        raise UserError("ImageNet's classes are scored by CLIP's names for them, which open_clip has: pip install "
                        "open_clip_torch, or write classnames.txt") from None
    return IMAGENET_CLASSNAMES


def zero_shot(model, path, kind, known=None, templates="imagenet", **options):
    """`classification` of a set of (PIL image or its path, class). The names come from classnames.txt in `path`, if it
    is there, a line for each class in the order of their numbers, else from `known()`, else from the set."""
    dataset = open_set(kind, path, **options)
    classes = getattr(dataset, "classes", None) or dataset.categories
    file = path / "classnames.txt"
    if file.is_file():
        names = file.read_text().splitlines()
    elif known:
        names = known()
    else:
        names = [re.sub("[_/]", " ", name) for name in classes]
    if re.fullmatch(r"n\d{8}", names[0]):
        raise UserError(f"the class folders of {path} are ids of synsets, not names: write {file}, a line with a name "
                        "for each folder, in the order of the ids")
    if len(names) != len(classes):
        raise UserError(f"{path} has pictures of {len(classes)} classes, but there are {len(names)} names: give a line "
                        f"for each class in {file}")

    def load(sample):
        picture, number = sample
        return model.prepare(picture), number

    images, target = model.images(dataset, load)
    embedded = class_embeddings(model, names, TEMPLATES[templates])
    return classification(images, embedded, torch.tensor(target))


def voc(model, path):
    """Pascal VOC 2012's validation part, pictures squeezed into the model's square. mIoU: 20 classes and background,
    which is where one of the other names is more similar; mIoU of objects: among the 20, on their pixels alone."""
    dataset = open_set(datasets.VOCSegmentation, path, image_set="val")
    classes = class_embeddings(model, TEMPLATES["voc"], TEMPLATES["imagenet"]).cpu()
    S = model.config.image_size

    def load(sample):
        image, mask = sample
        squeezed = image.resize((S, S), Image.Resampling.BICUBIC)
        return model.prepare(squeezed), pil_to_tensor(mask)[0].long()

    everything = 0
    objects = 0
    for _, patches, masks in model.batches(dataset, load):
        for cells, mask in zip(patches.cpu(), masks):
            scores = pixel_scores(cells, classes, mask.shape)  # [32, height, width]
            guess = scores.argmax(0)
            everything += confusion(mask, torch.where(guess < 20, guess + 1, 0), 21)
            objects += confusion(mask - 1, scores[:20].argmax(0), 20)
    return {"mIoU": miou(everything), "mIoU of objects": miou(objects)}


# A layout is a generator, path -> (picture's path, captions) of each picture, for a data set as it was published.

def karpathy(path):  # COCO and Flickr30k: dataset_coco.json beside val2014/, dataset_flickr30k.json
    for row in read_json(path)["images"]:
        if row["split"] == "test":
            captions = [sentence["raw"] for sentence in row["sentences"]]
            yield Path(row.get("filepath", ""), row["filename"]), captions[:5]


def urban1k(path):  # image/N.jpg, caption/N.txt
    for file in sorted(path.glob("caption/*.txt")):
        lines = file.read_text().splitlines()
        yield f"image/{file.stem}.jpg", lines[:1]


def dci(path):  # splits.json, annotations/, photos/. All splits, texts as LoTLIP joins them
    for names in read_json(path / "splits.json").values():
        for name in names:
            row = read_json(path / "annotations" / name)
            yield f"photos/{row['image']}", [f"{row['short_caption']}\n{row['extra_caption']}"]


def json_rows(path, field="caption", split=None, first=None):
    """JSON or JSON lines, one or several rows a picture; the texts are all those in the field, else as for --data."""
    for row in read_json(path)[:first]:
        if split in (None, row.get("split")):
            captions = clean_field(row.get(field)) or [read_captions(row).raw]
            yield image_field(row), captions


def iiw(path):  # IIW-400/data.jsonl, DCI_Test/, DOCCI_Test/; pictures anywhere in a folder of `path`
    for file in sorted(path.glob("*/*.jsonl")):
        for picture, texts in json_rows(file, "IIW"):
            yield Path(picture).with_suffix(".jpg"), texts


LAYOUTS = {
    "coco": karpathy,
    "flickr30k": karpathy,
    "urban1k": urban1k,
    "dci": dci,
    "iiw": iiw,
    "docci": partial(json_rows, field="description", split="test"),
    "share4v-1k": partial(json_rows, field="conversations", first=1000),
    "share4v-10k": partial(json_rows, field="conversations", first=10_000),
    "jsonl": json_rows,
}
LOTLIPS = ("dci", "iiw", "share4v-1k", "share4v-10k")  # (of Urban1k Long-CLIP's protocol is the usual one)


@cache
def files_in(root):
    """{bare name: file} of all files in the root and its folders."""
    return {file.name: file for file in root.rglob("*")}


def find_picture(root, picture):
    """root/picture, or, by its bare name, in any folder of the root."""
    file = root / picture
    if not file.is_file():
        file = files_in(root).get(file.name)
    if not file:
        raise UserError(f"no picture {picture} in {root} or its folders")
    return file


def cut_caption(text):
    """A long caption as LoTLIP's benchmarks give it to BERT's tokenizer: its sentences, joined by ". "."""
    parts = [part.strip() for part in re.split(r"\n|</s>|[.]", text)]
    return ". ".join(filter(None, parts))


def retrieval_set(name, model, path):
    """Retrieval on a published data set. Long captions are cut where LoTLIP's benchmarks cut them: for every model in
    LOTLIPS, for LoTLIP's text tower in all."""
    root = path.parent if path.is_file() else path
    numbers = {}  # of the pictures
    captions = []  # of all pictures
    owners = []  # the number of each one's picture
    try:
        for picture, texts in LAYOUTS[name](path):
            number = numbers.setdefault(find_picture(root, picture), len(numbers))
            captions += texts
            owners += [number] * len(texts)
        if not numbers or len(set(owners)) < len(numbers):
            raise LookupError("pictures or captions are missing")
    except (LookupError, TypeError, AttributeError, BadSample) as error:
        raise UserError(f"{path} is not laid out as {name} was published ({type(error).__name__}: {error})") from None
    bert = model.config.text_style == "bert"
    if name in LOTLIPS or bert and name not in ("coco", "flickr30k", "jsonl"):
        captions = [cut_caption(text) for text in captions]
    images, _ = model.images(list(numbers), lambda file: (model.prepare(file), None))
    return retrieval(images, model.texts(captions), torch.arange(len(numbers)), torch.tensor(owners))


# A benchmark is a function (model, path) -> {metric: (value, chance)}.
class_folders = partial(zero_shot, kind=ClassFolders, loader=Path)  # paths: Model.prepare opens them
BENCHMARKS = {
    "imagefolder": class_folders,
    "imagenet": partial(class_folders, known=imagenet_names),
    "imagenet-v2": partial(class_folders, known=imagenet_names),
    "voc": voc,
}
for name, (kind, options) in TORCHVISION.items():
    BENCHMARKS[name] = partial(zero_shot, kind=getattr(datasets, kind), templates=name, **options)
for name in LAYOUTS:
    BENCHMARKS[name] = partial(retrieval_set, name)


def run_benchmarks(model, wanted):
    """["coco:/data/coco.json"] -> {"coco T2I R@1": (value, chance), ...}; a name that comes again keeps its path."""
    jobs = {}
    for item in wanted:
        name, _, path = item.partition(":")
        if name not in BENCHMARKS or not os.path.exists(path):
            raise UserError(f"--benchmark {item}: write NAME:PATH with a path that exists and one of "
                            f"{', '.join(BENCHMARKS)}")
        title = item if name in jobs else name
        jobs[title] = partial(BENCHMARKS[name], model, Path(path))
    rows = {}
    for title, score in jobs.items():
        rows |= prefixed(title, score())
    return rows


# ---- figures ---------------------------------------------------------------------------------------------------------

matplotlib.rcParams.update({
    "font.size": 11,
    "figure.dpi": 120,
    "axes.spines.top": False,
    "axes.spines.right": False,
})


def new_figure(width, height):
    """A figure of so many inches. It is not pyplot's, so it needs no screen and no closing."""
    return Figure((width, height), layout="constrained")


def draw_groups(model, pictures, path):
    """pictures: pairs of an image uint8 [3,S,S] and texts. Draws a row for each: the image, then for every text the
    patches that it groups, as a heat map over the grey image."""
    columns = 1 + max(len(texts) for _, texts in pictures)
    figure = new_figure(2.2 * columns, 2.7 * len(pictures))
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for (first, *others), (image, texts) in zip(axes, pictures):
        first.imshow(image.permute(1, 2, 0).numpy())
        grey = image.float().mean(0).numpy()
        _, patches = model.encode([image])
        _, weights = group_patches(patches, model.texts(texts)[None], model.settings.get("threshold"))
        for axis, text, heat in zip(others, texts, square(weights[0]).cpu().numpy()):
            axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, 1, 0, 1))
            axis.imshow(heat, alpha=0.7, vmin=0, extent=(0, 1, 0, 1))
            axis.set_title(textwrap.fill(text, 26, max_lines=4), fontsize=9.5)
    figure.suptitle(f"{model.name}: the patches that each sentence groups, yellow those of the greatest weight")
    figure.savefig(path)


def draw_curves(model, path):
    """Draws every loss and the logit scale against images seen."""
    curves = defaultdict(list)
    for line in read_json(model.folder / "metrics.jsonl"):
        for name in ("contrastive", "grouping", "held_out_loss", "logit_scale"):
            if name in line:
                curves[name].append((line["images"], line[name]))
    if not curves:  # the run was stopped before its first line
        return
    figure = new_figure(4 * len(curves), 3)
    for axis, (name, points) in zip(figure.subplots(1, len(curves)), curves.items()):
        axis.plot(*zip(*points), ".-")
        axis.set(title=name, xlabel="images seen")
    figure.suptitle(model.name)
    figure.savefig(path)


def draw_run(model, dataset, captions, folder):
    """Draws all figures of a run. captions: {number in the dataset: data.Captions}."""
    pictures = []
    for number in list(captions)[:4]:
        image, c = dataset[number]
        texts = [sentence.text for sentence in c.long] + [c.raw]
        pictures.append((image, texts[:5]))
    draw_groups(model, pictures, folder / "patches.png")
    if model.folder and (model.folder / "metrics.jsonl").exists():
        draw_curves(model, folder / "curves.png")


# ---- the command line ------------------------------------------------------------------------------------------------

def evaluate_run(path, n=None, data={}, figures=True, benchmarks=(), out=None, **options):
    """Evaluates a model on its held-out data, or on benchmarks instead, prints and writes the report -> a dict of name,
    settings, metrics {name: {value, chance}} and on (what data). A run's standard evaluation is written into its
    folder, anything else only into `out`. data: settings of train.py about the data that replace the run's; options:
    Model's. Raises UserError."""
    path = Path(path)
    model = Model(path, **options)
    s = model.settings
    size = model.config.image_size
    report = dict(name=model.name, branch=model.branch, image_size=size, settings=s)
    file = "evaluation.json"
    if benchmarks:
        rows = run_benchmarks(model, benchmarks)
        report["on"] = " ".join(benchmarks)
        sets = [item.partition(":")[0] for item in benchmarks]
        file = f"benchmark-{'-'.join(sets)}.json"
    elif model.folder or "data" in data:
        count = n or s.get("eval_images") or 1000
        part = "test"
        own = list(s.get("data", ()))
        if list(data.get("data", own)) != own:
            s = s | dict(image_root=None)
            part = "all"
        s = s | data
        dataset = open_dataset(s["data"], part, count, size, s["kinds"], image_root=s["image_root"],
                               caption_fields=s["caption_fields"])
        rows, captions = held_out_metrics(model, dataset, count)
        report["images"] = len(captions)
        names = " ".join(np.atleast_1d(s["data"]))
        report["on"] = f"{len(captions)} images of {names}"
    else:
        raise UserError(f"{path} has no held-out data of its own: score it with --benchmark or --data")
    report["metrics"] = {}
    print("      %  chance  metric")
    for name, (value, chance) in rows.items():
        report["metrics"][name] = dict(value=value, chance=chance)
        print(f"{value:7.1f} {chance:7.1f}  {name}")
    print(f"{model.name} on {report['on']}")

    standard = model.folder == path.absolute() and model.branch == "mean"
    if out:
        folder = Path(out) / model.name
    elif standard and not (n or data or options.get("image_size")):
        folder = model.folder
    else:
        print("not written, because it is not a run's standard evaluation: add --out FOLDER")
        return report
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / file, report)
    if figures and not benchmarks:
        draw_run(model, dataset, captions, folder)
    print(f"written to {folder}")
    return report


HEADLINE = ("R@1", "top-1", "unseen colour and object", "pointing by sentence", "mIoU")  # ends of the names in a table


def table(reports):
    """Markdown: a row for each run with the headline metrics that the first one has; the last row is its chance."""
    first = reports[0]["metrics"]
    names = [name for name in first if name.endswith(HEADLINE)]
    chances = [f"{first[name]['chance']:.1f}" for name in names]
    lines = [["%", *names]]
    for report in reports:
        cells = [report["name"]]
        if report["on"] != reports[0]["on"]:  # its chance is not the last row's
            cells = [f"{report['name']}, {report['on']}"]
        for name in names:
            metric = report["metrics"].get(name)
            cells.append(f"{metric['value']:.1f}" if metric else "")
        lines.append(cells)
    return markdown([*lines, ["chance", *chances]])


def markdown(lines):
    """Lists of cells, the head first -> a Markdown table."""
    numbers = len(lines[0]) - 1
    lines.insert(1, ["---"] + ["---:"] * numbers)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show_picture(model, folder, file, *texts):
    """Prints how similar each text is to a picture, and draws the patches that each groups into picture.png."""
    image = model.prepare(file)
    branches, _ = model.encode([image])
    images = model.merge(branches)
    cosines = images[0] @ model.texts(texts).T
    for text, cosine in zip(texts, cosines.tolist()):
        print(f"{cosine:.3f} {text}")
    draw_groups(model, [(image, texts)], folder / "picture.png")


def search(model, pictures, text, folder, image_root):
    """Prints the 24 pictures, of those that data.Records reads, most similar to a text, and writes search.html."""
    records = Records(pictures, image_root)
    def load(number):
        record = records[number]
        return model.prepare(load_image(record.image, name=record.key)), number
    images, numbers = model.images(range(len(records)), load)
    cosines = images @ model.texts([text])[0]
    shown = []
    for place in cosines.argsort(descending=True)[:24].tolist():
        record = records[numbers[place]]
        texts = [f"{cosines[place]:.3f}", record.key]
        shown.append((load_image(record.image), texts))
        print(*texts)
    contact_sheet(folder / "search.html", shown)


def export(model, kind, file):
    """Writes the weights as open_clip (a file) or transformers (a folder) reads them. Raises UserError."""
    name = model.tokenizer.name
    if kind == "open_clip":
        state, config = to_open_clip(model.clip)
        torch.save(state, file)
        write_json(file.with_suffix(".json"), config)
    elif kind == "transformers":
        export_transformers(model.clip, file)
        if name == "clip":
            write_clip_tokenizer(file, model.config.context)
    else:
        raise UserError(f"--export {kind}: take open_clip or transformers")
    print(f"wrote {file}, for texts as the tokenizer {name!r} splits them")


WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")  # files of weights


def parse(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders of runs, or files of weights, ours or released ones")
    task = parser.add_mutually_exclusive_group().add_argument
    task("--benchmark", nargs="+", metavar="NAME:PATH", help=f"of {', '.join(BENCHMARKS)}")
    task("--data", nargs="+", help="evaluate on this instead of the run's own data (as in train.py)")
    add("--image-root", help="of --data, as in train.py")
    add("--caption-fields", help="of --data, as in train.py; the run's own")
    add("--images", type=at_least(1), help="images to use of the data [1000]")
    add("--branch", default="mean", help="mean, or the number of a branch")
    add("--image-size", type=at_least(1), help="another resolution: position embeddings are interpolated")
    add("--activation", choices=("gelu", "quickgelu"), help="of a released checkpoint")
    add("--tokenizer", help="instead of the model's own")
    add("--device", help="cpu, cuda or mps; the fastest there is")
    add("--out", metavar="FOLDER", help="write there, not into the runs' folders")
    task("--picture", nargs="+", metavar=("FILE", "TEXT"),
         help="say how similar texts are to a picture, and draw the patches of each")
    task("--search", nargs=2, metavar=("FOLDER", "TEXT"), help="the pictures of a folder most similar to a text")
    add("--json", metavar="FILE", help="write all metrics of all runs")
    task("--export", nargs=2, metavar=("FORMAT", "FILE"), default=(None, None),
         help="write the weights instead: open_clip FILE, or transformers FOLDER")
    return parser.parse_args(argv)


def main(argv=None):
    flags = parse(argv)
    check_device(flags.device or "cpu")
    runs = []
    for path in flags.runs:
        if not path.exists():
            raise UserError(f"there is no {path}: name folders of runs, or files of weights")
        if checkpoints(path) or path.suffix in WEIGHTS:  # of all in runs/*
            runs.append(path)
    if not runs:
        raise UserError("none of these is a run: name folders with a checkpoint.pt, or files of weights")
    kind, weights = flags.export
    for target, is_folder in (flags.json, False), (weights, kind == "transformers"), (flags.out, True):
        if target:
            check_target(target, is_folder)
    if flags.picture and len(flags.picture) == 1:
        raise UserError("--picture FILE needs texts to compare it with: add some")
    if len(runs) > 1 and (kind or flags.picture or flags.search):
        raise UserError("--export, --picture and --search take one run: name one")
    data = {name: getattr(flags, name) for name in ("data", "image_root", "caption_fields")}
    data = {name: value for name, value in data.items() if value is not None}
    options = {name: getattr(flags, name) for name in ("device", "branch", "image_size", "activation", "tokenizer")}
    if kind:
        export(Model(runs[0], **options | {"device": "cpu"}), kind, Path(weights))
    elif flags.picture or flags.search:
        model = Model(runs[0], **options)
        folder = Path(flags.out or model.folder or ".")
        folder.mkdir(parents=True, exist_ok=True)
        if flags.picture:
            show_picture(model, folder, *flags.picture)
        else:
            search(model, *flags.search, folder, flags.image_root)
        print(f"written to {folder}")
    else:
        reports = []
        failed = []
        for run in runs:
            try:
                report = evaluate_run(run, flags.images, data, benchmarks=flags.benchmark, out=flags.out, **options)
                reports.append(report)
            except (UserError, OSError) as error:
                failed.append(f"{run}: {error}")
        if len(reports) > 1:
            print(table(reports))
        if flags.json:
            write_json(Path(flags.json), reports)
        if failed:
            raise UserError("; ".join(failed))


if __name__ == "__main__":
    run_script(main)
