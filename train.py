"""Train a language-image model with one of five methods, or a mixture of them.

    python train.py --method dreamlip                                embedded scenes, minutes on a laptop or one GPU
    python train.py --method lotlip --data pictures/captions.jsonl   your own pictures
    torchrun --nproc_per_node=8 --max-restarts=3 train.py --method dreamlip --size base-16 --data x.jsonl --out runs/a

A method is a row of METHODS and a size a row of SIZES; every setting in them is also a flag, which overrides it.
`--help` lists all, each with the value that it has where no row sets another; `--profile` says where the time of a step
goes. A run that ends early continues with `--resume auto`; under torchrun's `--max-restarts` it does so by itself.

First reading: METHODS, `backward`, `update`, `train_steps`. The rest is processes, folders, resuming.
"""

import argparse
import functools
import gc
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import model as models
from csrc import fused
from data import (BadCount, Batch, Parser, UserError, check_boxes, load_tokenizer, lock, normalize, open_dataset,
                  text_slots, training_loader, write_json)
from losses import distributed, method_loss
from model import (CLIP, CLIPConfig, best_device, check_device, checkpoints, grown, newest_whole, read_checkpoint,
                   read_initial_weights, save_atomically)

MOMENTUM = 0.9  # Muon's
EPOCHS = 100  # at most, unless --images is given: Holistic CLIP's, the most of all the papers
MAX_SKIPPED = 10  # steps in a row without a finite gradient, each skipped, that stop the run


@dataclass
class Settings(CLIPConfig):
    # what to train on
    method: str = "dreamlip"  # clip, dreamlip, lotlip, holistic or sparc: a row of METHODS
    size: str = "auto"  # nano, tiny, small, base-32, base-16, large-14: a row of SIZES; auto: small on a GPU, else tiny
    data: tuple[str, ...] = ("scenes",)  # "scenes", .tar shards ({000..331}.tar), .jsonl, .csv, a folder; or several
    image_root: str = ""  # where the image paths in .csv and .jsonl begin; default: the folder of the file
    caption_fields: str = ""  # "raw=title,long=a+b": names of the fields that hold each kind of text
    max_bad: float = 0.05  # share of bad samples over which the run stops
    shuffle_buffer: int = 10_000  # samples of shards are shuffled within windows of so many
    kinds: int = 24  # kinds of object in the scenes
    tokenizer: str = "auto"  # auto, clip, scenes, or a vocabulary file
    augment: str = "crop"  # of pictures: a random "crop" (the papers), or "strong", in DreamLIP's code
    crop: float = 0.9  # least share of a picture that the crop keeps; strong: 0.2
    # the weights to start from, which fix the model's sizes; default: random ones
    init: str = ""  # both towers: a run's folder, or a released file as evaluate.py reads it
    init_image: str = ""  # the image tower: a file of timm's ViT
    init_text: str = ""  # the text tower: a file of Hugging Face's BERT, with its vocab.txt beside it
    lock_image: bool = False  # the image tower stays as it is in the file (2111.07991)
    # the texts drawn for an image at every step: one slot each
    raw_caption: bool = True  # a slot for the raw caption
    sub_captions: int = 0  # slots for sub-captions; the paper's K counts the raw caption's slot, too
    sampling: str = "random"  # sub-captions: "random" anew each time, or the "first" K always
    short_caption: bool = True  # the short caption is among those sub-captions are drawn from
    whole_caption: float = 0.0  # share of the draws in which the whole long caption, as one text, is among them, too
    long_texts: int = 0  # J slots for long texts
    long_sentences: int = 0  # consecutive sentences in a long text; 0: the whole caption
    perspectives: int = 0  # M slots for Holistic CLIP's perspectives, the raw caption first
    # the loss
    grouping: str = "none"  # patches grouped by "sub-caption" (DreamLIP), by "token" (SPARC), or "none"
    negatives: str = "image"  # of sub-captions: "image" (paper), "batch" (DreamLIP's code), "slot", "regrouped" (FLAIR)
    threshold: float | None = None  # of the grouping weights; default 1/P
    region_grouping: bool = False  # a sentence with a known place groups only the patches there (recaption.py --dense)
    contrastive_weight: float = 1.0  # weight of the global contrastive loss
    grouping_weight: float = 1.0  # lambda, weight of the grouping loss
    branch_diversity: float = 0.0  # weight of a loss on branches that are alike (Holistic CLIP's code: 1)
    matching: str = "image"  # branch of a free text: each "image" chooses, or the "text"'s own (Holistic CLIP's code)
    # optimisation
    images: int = 0  # images to see in the whole run; default: the size's own, but none over 100 times
    batch: int = 64  # images a step, over all processes
    accumulate: int = 1  # chunks a batch is embedded in; negatives stay those of the whole batch
    optimizer: str = "adamw"  # "adamw" (the papers), or "muon" for the matrices of blocks and stem, AdamW for the rest
    lr: float = 1e-3  # AdamW's greatest learning rate
    muon_lr: float = 2e-3  # Muon's
    warmup: float = 0.08  # share of the steps
    schedule: str = "cosine"  # how the rates fall to 0: "cosine" (the papers), or "linear"
    weight_decay: float = 0.1  # none on gains, biases and logit_scale
    decay_embeddings: bool = False  # weight decay on token and position embeddings, too (the papers' code)
    beta2: float = 0.98  # AdamW's
    eps: float = 1e-8  # AdamW's
    clip_grad: float = 1.0  # greatest gradient norm; 0: no clipping
    seed: int = 0  # of the weights, the order and the texts drawn
    # the machine
    device: str = "auto"  # cuda, mps or cpu
    precision: str = "auto"  # fp32 or bf16 (autocast); auto: bf16 where the device multiplies in it
    compile: bool = False  # torch.compile, block by block; on a GPU the default from base-32 on
    fused: str = "auto"  # the fused similarity op: "auto" for large matrices, "on" for all, "off" (plain PyTorch)
    grad_checkpointing: bool = False  # keep only the inputs of the blocks, compute the rest again backwards
    workers: int = -1  # data-loading processes; -1: by the machine
    timeout_minutes: float = 30.0  # a process that waits longer for the others ends the run
    # the run
    out: str = "auto"  # the run's folder; auto: runs/METHOD-SIZE, numbered
    resume: str = "no"  # "auto": the newest unfinished run of this name; or a run's folder
    save_minutes: float = 10.0  # between checkpoints
    save_steps: int = 0  # between checkpoints, beside those by the clock; 0: by the clock alone
    eval_steps: int = 1000  # between held-out losses; the weights of the least are kept as best.pt; 0: none
    eval_images: int = 1000  # held-out images for these and for the evaluation at the end; 0: neither
    log_every: int = 20  # steps between lines of metrics.jsonl


# Each method's row: the texts drawn for an image, the parts added to the model, the losses.
METHODS = {
    "clip": dict(),
    "dreamlip": dict(sub_captions=2, grouping="sub-caption"),
    "lotlip": dict(long_texts=1, corner_tokens=2),
    "holistic": dict(raw_caption=False, perspectives=5, branches=5),
    "sparc": dict(grouping="token", contrastive_weight=0.5, grouping_weight=1.0),
}

# What the small sizes, made for scenes, change of the papers' settings (README, "Sizes").
SCENES = dict(stem="conv", negatives="regrouped", grouping_weight=0.5, whole_caption=0.5, optimizer="muon",
              schedule="linear")

# For real pictures: CLIP's ViT-B with DreamLIP's recipe.
BASE = dict(image_size=224, vision_width=768, vision_depth=12, vision_heads=12,
            text_width=512, text_depth=12, text_heads=8, context=77, embed=512,
            images=90_000_000, batch=1024, lr=5e-4, warmup=0.023, weight_decay=0.5, decay_embeddings=True,
            clip_grad=0.0, kinds=83)

# Where a paper or its code gives other settings for these sizes: DreamLIP's K = 8, the raw caption counted; Holistic
# CLIP's training script, 100 epochs of CC3M; SPARC's appendix D.4, 200,000 steps, 2,500 of them warm-up. What they do
# not give is DreamLIP's.
RECIPES = {
    "dreamlip": dict(sub_captions=7),
    "holistic": dict(images=290_000_000, batch=2048, warmup=0.014, weight_decay=0.2, eps=1e-6),
    "sparc": dict(images=3_200_000_000, batch=16_384, warmup=0.013, lr=9e-4, weight_decay=0.2),
}

# Each size's row: both towers, and a recipe that fits them. The last three are CLIP's ViT-B/32, B/16 and L/14.
SIZES = {
    "nano": dict(**SCENES, image_size=32, patch=8, vision_width=64, vision_depth=1, vision_heads=2,
                 text_width=64, text_depth=1, text_heads=2, context=128, embed=64,
                 images=8_000, batch=32, lr=2e-3, kinds=12),
    "tiny": dict(**SCENES, image_size=64, patch=8, vision_width=128, vision_depth=2, vision_heads=4,
                 text_width=128, text_depth=2, text_heads=4, context=128, embed=128,
                 images=64_000, batch=64, lr=1.5e-3, muon_lr=4e-3, kinds=24),
    "small": dict(**SCENES, image_size=96, patch=8, vision_width=384, vision_depth=6, vision_heads=6,
                  text_width=256, text_depth=4, text_heads=4, context=128, embed=256,
                  images=3_000_000, batch=256, lr=1e-3, kinds=64),
    "base-32": dict(**BASE, patch=32),
    "base-16": dict(**BASE, patch=16),
    "large-14": dict(**{**BASE, "vision_width": 1024, "vision_depth": 24, "vision_heads": 16, "text_width": 768,
                        "text_heads": 12, "embed": 768, "lr": 4e-4, "weight_decay": 0.2}, patch=14),
}
CHOICES = models.CHOICES | dict(
    method=METHODS, size=("auto", *SIZES), sampling=("random", "first"),
    grouping=("none", "sub-caption", "token"), negatives=("image", "batch", "slot", "regrouped"),
    augment=("crop", "strong"), matching=("image", "text"), optimizer=("adamw", "muon"), schedule=("cosine", "linear"),
    fused=("auto", "on", "off"), precision=("auto", "fp32", "bf16"), pool=("auto", "class", "average"))


# ---- settings --------------------------------------------------------------------------------------------------------

def parse_flags(argv=None) -> dict:
    """The flags the user gave, one for every field of Settings; the comment behind a field is its help text, and the
    comment above a group of fields is the group's title. `--tokenizer auto` counts as not given, so it does not
    contradict the choice of a run that is resumed."""
    parser = Parser(description=__doc__, argument_default=argparse.SUPPRESS, usage="train.py [flags]")
    parser.add_argument("--profile", action="store_true",
                        help="print where the time of a step goes and the hours the run would take; no training")
    source = inspect.getsource(CLIPConfig) + inspect.getsource(Settings)
    for title, name, text in re.findall(r"^    (?:# (.+)|(\w+): .+?  # (.+))", source, re.M):
        if title:
            group = parser.add_argument_group(title)
        elif name != "vocab":  # the tokenizer has it
            field = Settings.__dataclass_fields__[name]
            options = dict(help=f"{text} [{field.default}]".replace("%", "%%"))
            if field.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif name == "data":
                options["nargs"] = "+"
            else:
                options["type"] = float if field.default is None else field.type
                options["choices"] = CHOICES.get(name)
            group.add_argument("--" + name.replace("_", "-"), **options)
    flags = vars(parser.parse_args(argv))
    if flags.get("tokenizer") == "auto":
        del flags["tokenizer"]
    return flags


def resolve(flags: dict, world: int = 1, started=None, checks: bool = True) -> Settings:
    """Each overrides those before it: defaults, the size's row, `started` (what the initial weights fix), the method's
    row, its RECIPES (large sizes), the flags. "auto" is chosen from the machine. Raises UserError; without `checks` the
    settings are not checked against one another."""
    s = Settings(**flags)
    if s.device == "auto":
        s.device = best_device()
    if s.size == "auto":
        s.size = "small" if s.device.startswith("cuda") else "tiny"
    small = s.size in ("nano", "tiny", "small")
    rows = {"pool": "auto", **SIZES[s.size], **(started or {}), **METHODS[s.method]}
    if not small:
        rows |= RECIPES.get(s.method, {})
        rows["compile"] = s.device.startswith("cuda")
    s = Settings(**{**rows, **flags, "device": s.device, "size": s.size})
    s.data = (s.data,) if isinstance(s.data, str) else tuple(s.data)
    if s.pool == "auto":  # the papers' class token; small models localise far better with the average of their patches
        s.pool = "average" if small and (s.branches == 1 or s.branch_type == "mlp") else "class"
    if s.augment == "strong" and "crop" not in flags:
        s.crop = 0.2
    if s.precision == "auto":
        s.precision = "bf16" if multiplies_bfloat16(s.device) else "fp32"
    if s.workers < 0:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # processes of this machine
        s.workers = 1 if s.device == "cpu" else min(16, os.cpu_count() // local)
    if s.tokenizer == "auto" and s.data == ("scenes",):
        s.tokenizer = "scenes"
    if s.tokenizer == "auto" and not small:  # no long training with the scenes' small vocabulary by accident
        s.tokenizer = "clip"
    check_device(s.device)
    if checks:
        check_settings(s, world)
    branches = s.branches, s.branch_type
    if s.lock_image and started and branches != (started.get("branches", 1), started.get("branch_type", "class")):
        raise UserError("--lock-image keeps the image tower as it is in the file, so leave --branches and "
                        "--branch-type alone, or drop --lock-image")
    return s


def multiplies_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


ABOVE_0 = (
    "image_size", "patch", "vision_width", "vision_depth", "vision_heads", "text_width", "text_depth", "text_heads",
    "context", "embed", "branches", "branch_layers", "batch", "images", "accumulate", "log_every", "lr", "save_minutes",
    "timeout_minutes", "shuffle_buffer", "crop")
SHARES = ("warmup", "max_bad", "whole_caption", "crop", "beta2", "threshold")


def check_settings(s: Settings, world: int):
    """Raises UserError with one sentence where the settings cannot go together."""
    if s.context < 3:
        raise UserError(f"--context {s.context} leaves no room for a word between start and end token: give at least 3")
    for name, value in vars(s).items():
        if isinstance(value, (int, float)):
            most = 1 if name in SHARES else 2 ** 62
            if not 0 <= value <= most or name in ABOVE_0 and value == 0 or name == "beta2" and value == 1:
                raise UserError(f"--{name.replace('_', '-')} cannot be {value}")
    if s.init and (s.init_image or s.init_text):
        raise UserError("--init brings both towers: drop --init-image and --init-text, or --init")
    if s.lock_image and not (s.init or s.init_image):
        raise UserError("--lock-image keeps an image tower as it is in a file: add --init or --init-image")
    slots = text_slots(s)
    if not slots:
        raise UserError("no text is left to train on: give --raw-caption, --sub-captions, --long-texts or "
                        "--perspectives")
    if s.corner_tokens and set(slots) == {"raw"}:
        raise UserError("corner tokens are trained on long texts and sub-captions, and there are none: add "
                        "--long-texts 1 or --sub-captions 3")
    if s.grouping == "sub-caption" and s.negatives == "image" and len(slots) == 1:
        raise UserError("grouping by sub-caption contrasts the texts of one image, and there is only one: add "
                        "--sub-captions 3 or use --negatives batch")
    if s.branches == 1 and s.branch_diversity:
        raise UserError("--branch-diversity is about several branches: add --branches 5, or leave it")
    if s.region_grouping and (s.grouping == "none" or "sub" not in slots):
        raise UserError("--region-grouping is for the patches that sub-captions group: add --grouping sub-caption "
                        "--sub-captions 3, or leave it")
    if s.batch % (world * s.accumulate):
        raise UserError(f"--batch {s.batch} does not divide among {world} processes and {s.accumulate} chunks: choose "
                        f"a multiple of {world * s.accumulate}")


# ---- the processes ---------------------------------------------------------------------------------------------------

def set_machine(s: Settings):
    """Settings of PyTorch and of the fused op that hold for the whole process."""
    if s.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(s.device).index or 0)  # our own streams and kernels run on this GPU
        # cuDNN's attention plans anew, in tens of milliseconds, for every new shape, and the texts' rows have many.
        torch.backends.cuda.enable_cudnn_sdp(False)
    fused.mode = s.fused
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each worker keeps up to 512 shards open
    # in bf16 runs what stays float32, above all the similarities, goes through a GPU's tensor cores, too
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = s.precision == "bf16"


def join_group(s: Settings):
    """Joins torchrun's other processes: NCCL between GPUs, gloo for everything that is on the hosts.

    A process that dies closes its connections, so the others notice at the next step.
    """
    backend = "gloo"
    if s.device.startswith("cuda"):
        s.device = f"cuda:{os.environ['LOCAL_RANK']}"
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(minutes=s.timeout_minutes)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store outlives a restart, and would tell where the dead could be reached (pytorch issue 135712)
        store = dist.PrefixStore(f"attempt {restarts()}", store)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and max_restarts():
        raise UserError("on several machines torchrun --max-restarts needs --rdzv-backend c10d, and "
                        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 exported on each, or no restart finds the others")
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def restarts() -> int:
    """How often torchrun has restarted this machine's processes because one of them had died (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def max_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)


def is_master() -> bool:
    """Whether this is rank 0, the process that writes and prints."""
    return rank_and_world()[0] == 0


def say(text: str):
    if is_master():
        print(text, flush=True)


def sum_over_processes(*values: float) -> list[float]:
    """All-reduces the values between the hosts, so no GPU is waited for."""
    total = torch.tensor(values, dtype=torch.float64)
    if distributed():
        dist.all_reduce(total)
    return total.tolist()


def gather_objects(x) -> list:
    """x of every process, by rank."""
    if not distributed():
        return [x]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, x)
    return everyones


@contextmanager
def raise_together():
    """If any process raises a UserError in this block, all end: the lowest such rank raises it, the others exit."""
    caught = None
    try:
        yield
    except UserError as error:
        caught = error
    errors = gather_objects(caught)
    if caught and not any(errors[:rank_and_world()[0]]):
        raise caught
    if any(errors):
        raise SystemExit(1)


@contextmanager
def signals_caught():
    """-> a list: SIGTERM and Ctrl-C are appended to it instead of ending the process."""
    caught = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: caught.append(number)) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


# ---- a step: the batch on the device, its embeddings, its loss, the gradients ----------------------------------------

def to_device(batch: Batch, s: Settings) -> Batch:
    """The batch with its tensors on the device, the texts' lengths on the host, which waits for no copy to a GPU."""
    moved = {}
    for name, value in batch._asdict().items():
        if isinstance(value, torch.Tensor):
            moved[name] = value.to(s.device, non_blocking=s.device.startswith("cuda"))
    return batch._replace(**moved)


def embed_batch(network, batch: Batch, s: Settings) -> dict:
    """Everything that CLIP.forward returns, in the run's precision."""
    with torch.autocast(s.device.split(":")[0], torch.bfloat16, enabled=s.precision == "bf16"):
        return network(normalize(batch.images), batch.tokens, s.grouping == "token", batch.lengths)


def split(batch: Batch, n: int) -> list[Batch]:
    """The batch in at most n chunks of equal size, except that the last one may be smaller."""
    lengths = [part.numpy() for part in torch.from_numpy(batch.lengths).chunk(n)]
    return list(map(Batch, batch.images.chunk(n), batch.tokens.chunk(n), lengths))


@torch.no_grad()
def embed_in_chunks(network, batch: Batch, s: Settings) -> dict:
    """What `embed_batch` returns, chunk by chunk, without a graph; None is left out."""
    embedded = [embed_batch(network, chunk, s) for chunk in split(batch, s.accumulate)]
    joined = {}
    for name, first in embedded[0].items():
        if first is not None:
            joined[name] = torch.cat([out[name] for out in embedded]) if first.dim() else first  # logit_scale: a number
    return joined


def backward(network, batch: Batch, s: Settings):
    """Gradients of the batch's loss, in `accumulate` chunks if more than 1 -> the detached loss, its terms by name."""
    if s.accumulate > 1:
        return backward_gradcache(network, batch, s)
    out = embed_batch(network, batch, s)
    loss, terms = method_loss(out, s, batch.allowed)
    loss.backward()
    return loss.detach(), terms


def backward_gradcache(network, batch: Batch, s: Settings):
    """GradCache (2101.06983). 1: embeds all chunks without a graph. 2: the loss of the whole batch gives each
    embedding's gradient. 3: embeds each chunk again and backpropagates those gradients. The result is the whole batch's
    gradient, with the memory of one chunk."""
    whole = embed_in_chunks(network, batch, s)
    for x in whole.values():
        x.requires_grad_(x.is_floating_point())
    loss, terms = method_loss(whole, s, batch.allowed)
    loss.backward()
    n = s.accumulate
    for i, chunk in enumerate(split(batch, n)):
        last = i == n - 1  # DDP sums over the processes once, with the last chunk
        with nullcontext() if last or not distributed() else network.no_sync():
            out = embed_batch(network, chunk, s)
            surrogate = 0  # the sum of embedding · its gradient: by the chain rule, its backward is the loss's
            for name, x in whole.items():
                if x.grad is not None:
                    grad = x.grad.chunk(n)[i] if x.dim() else x.grad / n
                    surrogate = surrogate + (out[name] * grad).sum()
            surrogate.backward()
    return loss.detach(), terms


def backward_or_split(network, batch: Batch, s: Settings):
    """`backward`; if a single GPU runs out of memory, with twice as many chunks from then on."""
    while True:
        try:
            return backward(network, batch, s)
        except torch.OutOfMemoryError:
            chunks = 2 * s.accumulate
            if distributed() or s.batch % chunks:
                raise UserError(f"a step of {s.batch} images does not fit the memory of {s.device}: add --accumulate "
                                f"{chunks}, which keeps the batch, or --grad-checkpointing") from None
        network.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        s.accumulate = chunks
        say(f"a step does not fit the memory of {s.device}: from here on the batch is embedded in {chunks} chunks "
            f"(--accumulate {chunks})")


# ---- the state, and how a step changes it ----------------------------------------------------------------------------

@dataclass
class State:
    """Everything that a step changes, so everything that a checkpoint needs. There is no random generator: samples are
    drawn from (seed, epoch, index)."""

    model: CLIP
    optimizer: "MuonAdamW"
    skipped: torch.Tensor  # [2], on the device: steps skipped, in all and in a row up to here
    step: int = 0  # steps done; step * batch is the place in the data
    best: float = math.inf  # least held-out loss
    bad: BadCount = field(default_factory=BadCount)  # of the samples that this process has met


@dataclass
class Run:
    """Everything that a training run works with."""

    s: Settings
    folder: Path | None  # None: a profile, which writes nothing
    state: State
    network: torch.nn.Module  # state.model, wrapped for several processes
    tokenizer: object
    dataset: object
    held_out: object  # None: no evaluation
    steps: int  # of the whole run
    saved: float  # when the last checkpoint was written, by time.monotonic
    metrics: object = None  # metrics.jsonl, on rank 0 alone


def load_initial_weights(s: Settings, flags: dict):
    """-> the settings that the files of --init, --init-image, --init-text fix, and their weights. Raises UserError."""
    started, weights = {}, {}
    for part in ("init", "init_image", "init_text"):
        path = getattr(s, part)
        if path:
            told, tensors = read_initial_weights(Path(path), part, flags)
            started |= told
            weights |= tensors
    row = SIZES[s.size]
    others = [name for name in ("vision_width", "text_width") if started.get(name, row[name]) != row[name]]
    if others and "size" not in flags:
        raise UserError(f"the weights to start from are not those of --size {s.size}, whose recipe would train them: "
                        "give --size base-16, or the one that fits them best")
    return started, weights


def build(s: Settings, weights=None) -> CLIP:
    """The model with a run's first weights: `load_initial_weights`'s where there are, else random. Raises UserError."""
    torch.manual_seed(s.seed)
    model = CLIP(s)
    if weights:
        model.load_state_dict(grown(weights, model))
    return model


def prepare(model: CLIP, s: Settings):
    """-> the State a run begins with, and the model as a step calls it, wrapped for several processes."""
    network = model.to(s.device, memory_format=torch.channels_last)  # makes the patch convolutions faster
    model.visual.requires_grad_(not s.lock_image)
    compiles = s.compile and can_compile(s.device)
    if compiles:
        torch._dynamo.config.cache_size_limit = 64  # recompilations of a function: all blocks share `Block.forward`
        torch._dynamo.config.optimize_ddp = False  # it would cut the blocks, which are small, into pieces
    for tower in (model.visual, model.text):
        for block in tower.blocks:  # wrapping forward keeps the names in the state dict
            if compiles:  # the number of words changes from step to step, that of patches does not
                block.forward = torch.compile(block.forward, dynamic=tower is model.text)
            if s.grad_checkpointing:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                                  preserve_rng_state=False)
    if distributed():
        network = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    return State(model, make_optimizer(model, s), torch.zeros(2, device=s.device)), network


def can_compile(device: str) -> bool:
    """Whether torch.compile works here, tried on one product; prints a warning if not."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
        return True
    except Exception as error:  # many kinds: no compiler, no Triton, an old device
        say(f"WARNING: not compiled, which is slower: {type(error).__name__}: {error}".splitlines()[0])
        return False


class MuonAdamW(torch.optim.AdamW):
    """Fused AdamW; parameter groups with muon=True take Muon's step instead: the matrix's momentum, orthogonalised and
    scaled to the size of AdamW's steps, 0.2 · sqrt(longer side) (kellerjordan.github.io/posts/muon, 2502.16982).
    A convolution counts as a matrix, output channels × all that each of them reads, and so does qkv as a whole.

    `broken` is a tensor on the device, 1.0 to skip the step, so the host never waits (except on mps).
    """

    @torch.no_grad()
    def step(self, broken: torch.Tensor):
        if broken.device.type == "mps" and broken:  # where fused AdamW overlooks found_inf
            return
        self.found_inf = broken  # fused AdamW skips its step where this is 1.0; usually a GradScaler sets it
        for group in self.param_groups:
            if group.get("muon"):
                for shape in {p.shape for p in group["params"]}:
                    self.step_matrices([p for p in group["params"] if p.shape == shape], group)
        super().step()  # skips the matrices, which have no gradient any more

    def step_matrices(self, matrices: list, group: dict):
        """Steps matrices of one shape together and takes their gradients away."""
        ahead = []
        for p in matrices:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))  # AdamW expects a "step"
            momentum = self.state[p]["exp_avg"]
            gradient = torch.where(self.found_inf > 0, momentum, p.grad)  # leaves the momentum as it is
            momentum.lerp_(gradient, 1 - MOMENTUM)
            ahead.append(gradient.lerp(momentum, MOMENTUM))  # Nesterov's
            p.grad = None
        rate = group["lr"] * (1 - self.found_inf)
        steps = orthogonal(torch.stack(ahead).flatten(2))
        size = 0.2 * max(steps.shape[1:]) ** 0.5
        for p, step in zip(matrices, steps):
            p.mul_(1 - rate * group["weight_decay"])
            p.sub_(rate * size * step.view_as(p))


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """x [n,a,b] -> the matrices with x's singular vectors and singular values near 1: five Newton-Schulz steps, in
    float32, since bfloat16 is very slow on processors that emulate it."""
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.mT if tall else x


def make_optimizer(model: CLIP, s: Settings) -> MuonAdamW:
    """No decay on gains, biases, class tokens (Holistic CLIP's code decays them) and logit_scale, nor on other
    embeddings unless `decay_embeddings`."""
    matrices, decay, no_decay = [], [], []
    for name, p in model.named_parameters():
        is_embedding = "embedding" in name and "patch" not in name
        if name == "logit_scale" or not p.requires_grad:
            continue
        in_block_or_stem = ".blocks." in name or "patch_embedding" in name
        if s.optimizer == "muon" and in_block_or_stem and p.ndim > 1:
            matrices.append(p)
        elif p.ndim < 2 or "class" in name or is_embedding and not s.decay_embeddings:
            no_decay.append(p)
        else:
            decay.append(p)
    groups = [
        dict(params=decay, weight_decay=s.weight_decay),
        dict(params=no_decay),
        dict(params=[model.logit_scale]),
    ]
    if matrices:
        groups.append(dict(params=matrices, weight_decay=s.weight_decay, muon=True))
    return MuonAdamW(groups, lr=s.lr, betas=(0.9, s.beta2), eps=s.eps, weight_decay=0.0, fused=True)


def lr_factor(step: int, steps: int, s: Settings) -> float:
    """The learning rate as a fraction of its peak: linear warm-up over the share `warmup` of the steps, then cosine or
    linear decay to 0."""
    warm = max(1, round(s.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    if s.schedule == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update(state: State, factor: float, s: Settings) -> torch.Tensor:
    """Clips the gradients and steps the optimizer at `factor` times its peak learning rate -> the gradients' norm.

    If a gradient is NaN or infinite, as it then is on all processes, weights and moments stay as they are.
    """
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), s.clip_grad or math.inf)
    for group in state.optimizer.param_groups:
        group["lr"] = factor * (s.muon_lr if group.get("muon") else s.lr)
    broken = (~norm.isfinite()).float()
    state.optimizer.step(broken)
    state.optimizer.zero_grad(set_to_none=True)
    state.model.logit_scale.clamp_(max=math.log(100))
    state.skipped += broken
    state.skipped[1] *= broken  # a good step ends those in a row
    state.step += 1
    return norm


# ---- the run's folder and its checkpoints ----------------------------------------------------------------------------

def run_folder(s: Settings) -> Path:
    """Where this run writes: a new folder, or, with --resume or after a restart by torchrun, the one it continues in.
    Raises UserError."""
    if s.resume not in ("no", "auto"):
        if not checkpoints(Path(s.resume)):
            raise UserError(f"--resume {s.resume}: there is no checkpoint.pt in that folder")
        return Path(s.resume)
    goes_on = s.resume == "auto" or restarts() > 0
    if s.out != "auto":
        if checkpoints(Path(s.out)) and not goes_on:
            raise UserError(f"{s.out} holds a run already: choose another --out, or --resume {s.out}")
        return Path(s.out)
    if max_restarts():
        raise UserError("torchrun --max-restarts continues in this run's folder: name it with --out, or another run's "
                        "could be taken for it")
    base = folder = Path("runs") / f"{s.method}-{s.size}"
    begun = None  # the newest unfinished run of this name
    number = 1
    while (folder / "settings.json").exists():
        if goes_on and not (folder / "finished").exists():
            begun = folder
        number += 1
        folder = Path(f"{base}-{number}")
    return begun or folder


MAY_CHANGE = (  # when a run is resumed
    "device", "precision", "compile", "fused", "grad_checkpointing", "workers", "accumulate", "timeout_minutes",
    "max_bad", "out", "resume", "save_minutes", "save_steps", "eval_steps", "eval_images", "log_every", "image_root")


def check_resumed(folder: Path, before: dict, s: Settings, flags: dict) -> dict:
    """The settings `before`, of the folder's checkpoint, as far as Settings still has them. Raises UserError if a flag
    differs that may not."""
    now = vars(s)
    before = {name: before[name] for name in now if name in before}
    different = []
    for name in flags:
        if name not in MAY_CHANGE and now[name] != before.get(name, now[name]):
            different.append(f"{name} ({before[name]} there, {now[name]} here)")
    if different:
        raise UserError(f"{folder} was started with other settings: {', '.join(different)}; drop these flags, or start "
                        "anew without --resume")
    return before


def open_metrics(folder: Path, s: Settings, step: int) -> TextIO:
    """The folder's metrics.jsonl, opened to append. Lines of later steps are cut off: those steps are done again. A
    lock on it, which ends with the process, keeps other runs out of the folder. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        metrics = open(folder / "metrics.jsonl", "a+")
        if not lock(metrics):
            raise UserError(f"another process trains in {folder}: choose another --out")
        write_json(folder / "settings.json", asdict(s))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): choose another --out") from None
    metrics.seek(0)
    done = [line for line in metrics if line.endswith("\n") and json.loads(line)["step"] <= step]
    metrics.truncate(sum(map(len, done)))
    return metrics


def write_line(metrics: TextIO, row: dict):
    """Adds a line of JSON, with null for NaN. If the disk is full it says so; the line is written with the next one."""
    rounded = {}
    for name, value in row.items():
        if isinstance(value, float):
            value = float(f"{value:.6g}") if math.isfinite(value) else None
        rounded[name] = value
    try:
        metrics.write(json.dumps(rounded) + "\n")
        metrics.flush()
    except OSError as error:
        say(f"{metrics.name} could not be written ({error}); it will be tried again with the next line")


def save(run: Run, best: bool = False) -> bool:
    """Rank 0 writes checkpoint.pt, or the weights alone as best.pt; all processes must call this -> False if the disk
    fails."""
    state = run.state
    content = dict(model=state.model.state_dict(), step=state.step, settings=asdict(run.s))
    if not best:
        bad = list(vars(bad_of_all(state)).values())
        content |= dict(optimizer=state.optimizer.state_dict(), skipped=state.skipped, best=state.best, bad=bad)
    path = run.folder / ("best.pt" if best else "checkpoint.pt")
    return not is_master() or save_atomically(path, content, keep=1 if best else 2)


def restore(state: State, content: dict):
    """Sets the state to that of a checkpoint's content."""
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.skipped.copy_(content["skipped"])
    state.step = content["step"]
    state.best = content["best"]
    if is_master():
        state.bad = BadCount(*content["bad"])


def bad_of_all(state: State) -> BadCount:
    """The bad samples that all processes have met."""
    total = BadCount()
    for part in gather_objects(state.bad):
        total.merge(part)
    return total


# ---- training --------------------------------------------------------------------------------------------------------

def open_data(s: Settings, flags: dict):
    """-> tokenizer, training set, held-out set (None: no evaluation); sets those settings that depend on the data."""
    tokenizer = load_tokenizer(s.tokenizer)
    if (s.init or s.init_text) and s.vocab != tokenizer.vocab_size:
        raise UserError(f"--tokenizer {s.tokenizer} is not that of the weights to start from, which have {s.vocab} "
                        "tokens: name theirs")
    s.vocab = tokenizer.vocab_size
    if s.tokenizer == "auto":
        s.tokenizer = tokenizer.name  # a resumed run keeps it, whatever is installed by then
    options = s.image_size, s.kinds, s.crop, s.image_root, s.caption_fields, s.region_grouping, s.augment
    dataset = open_dataset(s.data, "train", s.images, *options)
    if dataset.bad:
        say(f"left out of {' '.join(s.data)}: {dataset.bad.report()}")
    dataset.bad.check(s.max_bad)
    # opened before the training, so that a set without held-out images ends the run early
    held_out = open_dataset(s.data, "validation", s.eval_images, *options) if s.eval_images else None
    if s.region_grouping:
        check_boxes(dataset)
    if s.data != ("scenes",):
        if "images" not in flags:
            s.images = min(s.images, EPOCHS * len(dataset))
        if len(dataset) < s.batch:
            raise UserError(f"{' '.join(s.data)} has {len(dataset)} training images, fewer than a batch of {s.batch}: "
                            "choose a smaller --batch")
    return tokenizer, dataset, held_out


def open_run(flags: dict, writes: bool = True) -> Run:
    """Everything before the first step: settings, processes, folder, data, model, and the checkpoint to resume."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    s = resolve(flags, world, checks=False)  # a checkpoint or a file to start from may bring other settings
    if world > 1:
        join_group(s)
    folder = newest = None
    with raise_together():
        if writes and is_master():
            folder = run_folder(s)
            newest = newest_whole(folder)
    folder, newest = gather_objects((folder, newest))[0]
    before = started = weights = {}
    with raise_together():
        if newest:
            content = read_checkpoint(newest)
            before = check_resumed(folder, content["settings"], s, flags)
        else:
            started, weights = load_initial_weights(s, flags)
        s = resolve({**before, **flags, "device": s.device}, world, started)
        set_machine(s)
        tokenizer, dataset, held_out = open_data(s, flags)
        model = build(s, weights)
    with raise_together():
        sizes = gather_objects(len(dataset))
        if min(sizes) < max(sizes):
            raise UserError(f"the processes find {min(sizes)} to {max(sizes)} training images: give all machines the "
                            "same files")
    state, network = prepare(model, s)
    steps = max(1, s.images // s.batch)
    if newest:
        restore(state, content)
        say(f"resuming {newest} at step {state.step} of {steps}")
    run = Run(s, folder, state, network, tokenizer, dataset, held_out, steps, time.monotonic())
    with raise_together():
        if writes and is_master():
            run.metrics = open_metrics(folder, s, state.step)
    return run


def train(flags: dict) -> Path:
    """Trains as the flags say and returns the run's folder."""
    run = open_run(flags)
    s, state = run.s, run.state
    parameters = sum(p.numel() for p in state.model.parameters())
    say(f"{s.method} on {' '.join(s.data)}: {len(run.dataset)} images, {run.steps} steps of {s.batch}; {parameters:,} "
        f"parameters, {s.device}, {s.precision}; run folder {run.folder}")
    try:
        with signals_caught() as caught:
            train_steps(run, caught)
        if state.step < run.steps:
            say(f"stopped at step {state.step} of {run.steps}; continue with: --resume {run.folder}")
            leave_group(run)
            raise SystemExit(130)
        finish(run)
    finally:
        if run.metrics:
            with suppress(OSError):
                run.metrics.close()
    return run.folder


def train_steps(run: Run, caught: list):
    """All steps from the run's first to its last, or until a signal is in `caught`; a checkpoint. Raises UserError."""
    s, state = run.s, run.state
    batches = training_loader(run.dataset, run.tokenizer, s, state.step, run.steps, *rank_and_world())
    bar = tqdm(batches, total=run.steps, initial=state.step, disable=not is_master(), unit="step", mininterval=1,
               dynamic_ncols=True)
    marked = (state.step, time.monotonic())  # at the last line of metrics, for images per second
    for batch in bar:
        count_samples(state, batch)
        batch = to_device(batch, s)
        loss, terms = backward_or_split(run.network, batch, s)
        factor = lr_factor(state.step, run.steps, s)
        norm = update(state, factor, s)

        last = state.step == run.steps
        evaluates = run.held_out and s.eval_steps and (last or state.step % s.eval_steps == 0)
        if evaluates or last or state.step % s.log_every == 0:
            speed = (state.step - marked[0]) * s.batch / (time.monotonic() - marked[1])
            row = measure(state, loss, terms, norm, s) | dict(lr=factor * s.lr, images_per_s=speed)
            if evaluates:
                row["held_out_loss"] = held_out_loss(run)
            marked = (state.step, time.monotonic())
            report(run, row, terms, bar)
        if not last and save_if_due(run, caught):
            break
    with raise_together():
        if not save(run):
            raise UserError(f"the trained weights could not be written: make room in {run.folder}; --resume "
                            f"{run.folder} continues from its last checkpoint, if there is one")


def save_if_due(run: Run, caught: list) -> bool:
    """Between two steps: saves when it is time -> whether to stop, since a process has caught a signal. All processes
    agree."""
    s = run.s
    late = time.monotonic() - run.saved > 60 * s.save_minutes
    stop, late = sum_over_processes(bool(caught), late)
    if not stop and (late or s.save_steps and run.state.step % s.save_steps == 0):
        save(run)
        run.saved = time.monotonic()
    return stop > 0


def count_samples(state: State, batch: Batch):
    """Counts the batch's samples, including the bad ones."""
    state.bad.seen += len(batch.images) + len(batch.bad)
    for sample in batch.bad:
        state.bad.add(sample)


def measure(state: State, loss, terms: dict, norm, s: Settings) -> dict:
    """The numbers of a line of metrics.jsonl, fetched from the device; losses are means over the processes."""
    world = rank_and_world()[1]
    losses = torch.stack([loss, *terms.values()]) / world
    *losses, bad = sum_over_processes(*losses.tolist(), state.bad.total)
    skipped, in_a_row = state.skipped.int().tolist()
    return dict(
        step=state.step, images=state.step * s.batch, **dict(zip(("loss", *terms), losses)), grad_norm=norm.item(),
        skipped=skipped, skipped_in_a_row=in_a_row, logit_scale=state.model.logit_scale.exp().item(), bad=int(bad))


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """The mean of the method's loss over as many held-out images as fill whole batches, the same every time; the
    weights with the least one are kept as best.pt."""
    rank, world = rank_and_world()
    n = min(len(run.held_out), run.s.eval_images)
    batch = min(run.s.batch, max(1, n // world) * world)
    steps = max(1, n // batch)
    s = replace(run.s, batch=batch, workers=min(run.s.workers, steps))
    total = 0.0
    for batch in training_loader(run.held_out, run.tokenizer, s, 0, steps, rank, world):
        batch = to_device(batch, s)
        out = embed_in_chunks(run.network, batch, s)
        total += method_loss(out, s, batch.allowed)[0]
    loss = sum_over_processes(total.item())[0] / world / steps
    if loss < run.state.best and save(run, best=True):
        run.state.best = loss
    return loss


def report(run: Run, row: dict, terms: dict, bar):
    """Writes a line of metrics.jsonl. Raises UserError if the run only skips steps, or if too many samples are bad."""
    if is_master():
        write_line(run.metrics, row)
        bar.set_postfix({name: row[name] for name in (*terms, "skipped", "images_per_s")}, refresh=False)
    bad = bad_of_all(run.state)
    if row["skipped_in_a_row"] >= MAX_SKIPPED or bad.over(run.s.max_bad):
        save(run)
        with raise_together():
            bad.check(run.s.max_bad)
            raise UserError(f"{row['skipped_in_a_row']} steps in a row, up to {row['step']}, were skipped because the "
                            "gradient was NaN or infinite: try a lower --lr, more --warmup, or --precision fp32; the "
                            f"last good weights are in {run.folder}")


def finish(run: Run):
    """Reports the bad samples, and evaluates."""
    bad = bad_of_all(run.state)
    if bad:
        say(f"replaced by other samples: {bad.report()}")
    leave_group(run)
    if run.metrics:  # rank 0
        if run.s.eval_images:
            from evaluate import evaluate_run  # here, because matplotlib takes a second to import
            try:
                evaluate_run(run.folder)
            except OSError as error:
                raise UserError(f"the weights are in {run.folder}, but their evaluation could not be written ({error})"
                                f": make room, then python evaluate.py {run.folder}") from None
        (run.folder / "finished").touch()


def leave_group(run: Run):
    if distributed():
        run.network = None  # otherwise DDP holds the group last, and waits for threads that want its lock
        gc.collect()
        time.sleep(0.5)  # gloo's threads may still want Python's lock, which destroying holds (seen with PyTorch 2.6)
        dist.destroy_process_group()


# ---- where a step's time goes ----------------------------------------------------------------------------------------

def profile(flags: dict, steps: int = 30, warm: int = 10):
    """Trains for some steps of the run that the flags describe and prints where the time goes; writes no folder."""
    from torch.utils.benchmark import Timer, timer  # here, because it looks for a compiler
    run = open_run(flags, writes=False)
    s, state = run.s, run.state
    marks = [timer()]  # `timer` waits until a GPU has finished its work
    for batch in training_loader(run.dataset, run.tokenizer, s, 0, warm + steps, *rank_and_world()):
        batch = to_device(batch, s)
        marks.append(timer())
        backward_or_split(run.network, batch, s)
        marks.append(timer())
        update(state, 0.0, s)
        marks.append(timer())
    times = np.diff(marks[3 * warm:]).reshape(steps, 3).mean(0)
    seconds = times.sum()
    data, gradients, optimizer = 1000 * times

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        embed_in_chunks(state.model, batch, s)
    operations = 3 * counter.get_total_flops()  # backward costs twice the forward; recomputation does not count
    n = 8192 if s.device.startswith("cuda") else 1024
    matrix = torch.randn(n, n, device=s.device, dtype=torch.bfloat16 if s.precision == "bf16" else torch.float32)
    product = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads()).timeit(10)
    usage = operations / seconds / (2 * n ** 3 / product.mean)
    say(f"""{s.method} {s.size}, batch {s.batch}, {s.device}, {s.precision}: \
{s.batch / seconds:.0f} images/s
    waiting for data      {data:10.2f} ms
    forward and backward  {gradients:10.2f} ms
    optimizer             {optimizer:10.2f} ms
{usage:.1%} (MFU) of the operations a second that its matrix products reach, a CPU's attention not counted
GPU memory: {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB at most
the run's {s.images:,} images would take {s.images / s.batch * seconds / 3600:.2f} hours""")
    leave_group(run)


def main():
    try:
        flags = parse_flags()
        if flags.pop("profile", False):
            profile(flags)
        else:
            train(flags)
    except UserError as error:  # before the group exists every process raises it; one on each machine prints it
        sys.exit(f"error: {error}" if distributed() or os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    except KeyboardInterrupt:  # before or after the steps, which end with a checkpoint
        sys.exit(130)
    except RuntimeError as error:
        if str(error).startswith("--fused on"):
            sys.exit(f"error: {error}")
        gone = re.search("closed by peer|reset by peer|broken pipe|timed out|refused", str(error), re.I)
        if not gone or "RANK" not in os.environ:
            raise
        sys.exit(f"error: process {os.environ['RANK']} lost another one of the group, which died or fell silent: see "
                 "what that one printed; torchrun --max-restarts=3 continues from the last checkpoint by itself")


if __name__ == "__main__":
    main()
