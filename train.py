"""Train a language-image model with one of five methods, or a mixture of them.

    python train.py --method dreamlip                                embedded scenes, minutes on a laptop or one GPU
    python train.py --method lotlip --data pictures/captions.jsonl   your own pictures
    torchrun --nproc_per_node=8 --max-restarts=3 train.py --method dreamlip --size base-16 --data captions.jsonl

A method is a row of METHODS and a size a row of SIZES; every setting in them is also a flag, which wins. `--help` lists
all, `--profile` says where the time of a step goes. A run that ends before its time goes on with `--resume auto`; under
torchrun's `--max-restarts` it does so itself.
"""

import argparse
import dataclasses
import functools
import gc
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import typing
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from csrc import fused
from data import (BadCount, Batch, Parser, UserError, check_boxes, load_tokenizer, normalize, open_dataset, text_slots,
                  training_loader)
from losses import distributed, method_loss
from model import CHOICES as model_choices
from model import (CLIP, CLIPConfig, check_device, checkpoints, config_from, load_checkpoint, newest_whole, packing_trouble,
                   write_whole)


@dataclasses.dataclass
class Settings(CLIPConfig):
    # what to train on
    method: str = "dreamlip"  # clip, dreamlip, lotlip, holistic or sparc: a row of METHODS
    size: str = "auto"  # nano, tiny, small, base-32, base-16, large-14: a row of SIZES; auto: tiny on a CPU, else small
    data: tuple[str, ...] = ("scenes",)  # "scenes", .tar shards ({000..331}.tar), .jsonl, .csv, a folder; or several
    image_root: str = ""  # where the image paths in .csv and .jsonl begin; left away: the folder of the file
    caption_fields: str = ""  # "raw=title,long=a+b": names of the fields that hold each kind of text
    max_bad: float = 0.05  # share of bad samples over which the run stops
    shuffle_buffer: int = 10_000  # samples of shards are shuffled within windows of so many
    kinds: int = 24  # kinds of object in the scenes
    tokenizer: str = "auto"  # auto, clip, scenes, or a vocabulary file
    crop: float = 0.8  # least share of a picture that a random crop keeps (not for scenes)
    # the texts drawn for an image at every step: one slot each
    raw_caption: bool = True  # a slot for the raw caption
    sub_captions: int = 0  # K slots for sub-captions
    sampling: str = "random"  # sub-captions: "random" anew each time, "first" K always, "whole": all as one text
    short_caption: bool = True  # the short caption is among those sub-captions are drawn from
    whole_caption: float = 0.0  # share of the draws in which the whole long caption, as one text, is among them, too
    long_texts: int = 0  # J slots for long texts
    long_sentences: int = 0  # consecutive sentences in a long text; 0: the whole caption
    perspectives: int = 0  # M slots for Holistic CLIP's perspectives, the raw caption first
    # the loss
    grouping: str = "none"  # patches grouped by "sub-caption" (DreamLIP), by "token" (SPARC), or "none"
    negatives: str = "image"  # grouping's: "image" (papers), "batch" (DreamLIP's code), "slot", "regrouped" (FLAIR's)
    threshold: float | None = None  # of the grouping weights; default 1/P
    region_grouping: bool = False  # a sentence with a known place groups only the patches there (recaption.py --dense)
    contrastive_weight: float = 1.0  # of the global contrastive loss
    grouping_weight: float = 1.0  # lambda, of the grouping loss
    # optimisation
    images: int = 0  # images to see in the whole run; left away: the size's own
    batch: int = 64  # images a step, over all processes
    accumulate: int = 1  # parts a batch is embedded in; negatives stay those of the whole batch
    lr: float = 1e-3  # greatest learning rate
    warmup: float = 0.08  # share of the steps
    weight_decay: float = 0.1  # AdamW's; none on gains, biases, embeddings, logit_scale
    beta2: float = 0.98  # AdamW's
    eps: float = 1e-8  # AdamW's
    clip_grad: float = 1.0  # greatest gradient norm; 0: no clipping
    max_skipped: int = 10  # steps in a row without a finite gradient, each skipped, that stop the run
    seed: int = 0  # of the weights, the order and the texts drawn
    # the machine
    device: str = "auto"  # cuda, mps or cpu
    precision: str = "auto"  # fp32 or bf16 (autocast)
    compile: bool = False  # torch.compile, block by block
    fused: str = "auto"  # the fused similarity op: "auto" for large matrices, "on" for all, "off" (plain PyTorch)
    grad_checkpointing: bool = False  # keep only the inputs of the blocks, compute the rest again backwards
    workers: int = -1  # data-loading processes; -1: by the machine
    timeout_minutes: float = 10.0  # a process that waits longer for the others ends the run
    # the run
    out: str = "auto"  # the run's folder; auto: runs/METHOD-SIZE, numbered
    resume: str = "no"  # "auto": the newest unfinished run of this name; or a run's folder
    save_minutes: float = 5.0  # between checkpoints
    save_steps: int = 0  # between checkpoints, beside those by the clock; 0: by the clock alone
    eval_steps: int = 1000  # between held-out losses; the weights of the least are kept as best.pt; 0: none
    eval_images: int = 1000  # held-out images for these and for the evaluation at the end; 0: neither
    log_every: int = 20  # steps between lines of metrics.jsonl


# Each method's row: the texts an image brings, the parts the model gets, the losses.
METHODS = {
    "clip": dict(),
    "dreamlip": dict(sub_captions=3, grouping="sub-caption"),
    "lotlip": dict(long_texts=1, corner_tokens=2),
    "holistic": dict(raw_caption=False, perspectives=5, branches=5),
    "sparc": dict(grouping="token", contrastive_weight=0.5, grouping_weight=1.0),
}

# What the small sizes, made for scenes, change of DreamLIP's grouping and drawing (README, "What the small sizes
# change"): the defaults are the paper's.
SCENES = dict(stem="conv", negatives="slot", grouping_weight=0.2, whole_caption=0.5)

# Each size's row: both towers, and a recipe that fits them. The last three are CLIP's ViT-B/32, B/16 and L/14.
SIZES = {
    "nano": dict(**SCENES, image_size=32, patch=8, vision_width=64, vision_depth=1, vision_heads=2,
                 text_width=64, text_depth=1, text_heads=2, context=128, embed=64,
                 images=8_000, batch=32, lr=2e-3, kinds=12),
    "tiny": dict(**SCENES, image_size=64, patch=8, vision_width=128, vision_depth=2, vision_heads=4,
                 text_width=128, text_depth=2, text_heads=4, context=128, embed=128,
                 images=120_000, batch=32, lr=1e-3, kinds=24),
    "small": dict(**SCENES, image_size=96, patch=8, vision_width=384, vision_depth=6, vision_heads=6,
                  text_width=256, text_depth=4, text_heads=4, context=128, embed=256,
                  images=3_000_000, batch=256, lr=1e-3, kinds=64),
    "base-32": dict(image_size=224, patch=32, vision_width=768, vision_depth=12, vision_heads=12,
                    text_width=512, text_depth=12, text_heads=8, context=77, embed=512,
                    images=96_000_000, batch=1024, lr=5e-4, warmup=0.02, weight_decay=0.5, kinds=83),
    "base-16": dict(image_size=224, patch=16, vision_width=768, vision_depth=12, vision_heads=12,
                    text_width=512, text_depth=12, text_heads=8, context=77, embed=512,
                    images=96_000_000, batch=1024, lr=5e-4, warmup=0.02, weight_decay=0.5, kinds=83),
    "large-14": dict(image_size=224, patch=14, vision_width=1024, vision_depth=24, vision_heads=16,
                     text_width=768, text_depth=12, text_heads=12, context=77, embed=768,
                     images=96_000_000, batch=1024, lr=4e-4, warmup=0.02, weight_decay=0.2, kinds=83),
}
CHOICES = model_choices | dict(
    method=METHODS, size=("auto", *SIZES), sampling=("random", "first", "whole"),
    grouping=("none", "sub-caption", "token"), negatives=("image", "batch", "slot", "regrouped"),
    fused=("auto", "on", "off"), precision=("auto", "fp32", "bf16"), pool=("auto", "class", "average"))


# ---- settings --------------------------------------------------------------------------------------------------------

def parse_flags(argv=None) -> dict:
    """The flags the user gave, one for every field of Settings; the comment behind a field is its help text."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    source = inspect.getsource(CLIPConfig) + inspect.getsource(Settings)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.M))
    for name, hint in typing.get_type_hints(Settings).items():
        if name == "vocab":  # the tokenizer's
            continue
        flag, help = "--" + name.replace("_", "-"), comments.get(name, "").replace("%", "%%")
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        else:
            kind = next(t for t in (hint, *typing.get_args(hint)) if t in (int, float, str))
            parser.add_argument(flag, type=kind, nargs="+" if typing.get_origin(hint) is tuple else None,
                                choices=CHOICES.get(name), help=help)
    parser.add_argument("--profile", action="store_true", default=argparse.SUPPRESS,
                        help="print where the time of the run's steps goes, and the hours it would take; no training")
    return vars(parser.parse_args(argv))


def resolve(flags: dict, world: int = 1) -> Settings:
    """Defaults < the size's row < the method's row < the flags; "auto" is chosen from the machine. Raises UserError."""
    device = flags.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    size = flags.get("size", "auto")
    if size == "auto":
        size = "tiny" if device == "cpu" else "small"
    method = METHODS[flags.get("method", Settings.method)]
    s = Settings(**{"pool": "auto", **SIZES[size], **method, **flags, "device": device, "size": size})
    s.data = tuple([s.data] if isinstance(s.data, str) else s.data)
    if s.pool == "auto":  # the papers' class token; small models localise far better with the average of their patches
        small = size in ("nano", "tiny", "small") and (s.branches == 1 or s.branch_type == "mlp")
        s.pool = "average" if small else "class"
    if s.grouping == "token" and "negatives" not in flags:
        s.negatives = "image"  # a token's rivals are the other tokens of its caption (SPARC)
    native = {"cuda": torch.cuda.is_bf16_supported, "cpu": torch.cpu._is_avx512_bf16_supported}
    fast = native.get(device.split(":")[0], bool)()  # whether the device multiplies bfloat16 by itself
    if s.precision == "auto":
        s.precision = "bf16" if fast else "fp32"
    if s.workers < 0:
        s.workers = min(8, (os.cpu_count() or 2) // world) if device != "cpu" else 1
    if s.tokenizer == "auto" and s.data == ("scenes",):
        s.tokenizer = "scenes"
    check(s, world)
    return s


def check(s: Settings, world: int = 1):
    """Raises UserError with one sentence where the settings cannot go together."""
    for name in ("batch", "images", "accumulate", "log_every", "lr", "save_minutes", "timeout_minutes",
                 "max_skipped", "shuffle_buffer"):
        if getattr(s, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(s, name)}")
    for name in ("sub_captions", "long_texts", "long_sentences", "perspectives", "warmup", "weight_decay",
                 "clip_grad", "eval_images", "eval_steps", "save_steps", "seed", "eps"):
        if getattr(s, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} cannot be negative")
    below_1 = 0 <= s.beta2 < 1
    up_to_1 = all(0 <= share <= 1 for share in (s.warmup, s.max_bad, s.whole_caption)) and 0 < s.crop <= 1
    if not (below_1 and up_to_1):
        raise UserError("--beta2 must be from 0 to below 1, --warmup, --crop, --max-bad and --whole-caption from 0 to 1")
    check_device(s.device)
    slots = text_slots(s)
    if not slots:
        raise UserError("no text is left to train on: give --raw-caption, --sub-captions, --long-texts or "
                        "--perspectives")
    if s.corner_tokens and set(slots) == {"raw"}:
        raise UserError("corner tokens are trained on long texts and sub-captions, and there are none: add "
                        "--long-texts 1 or --sub-captions 3")
    if s.grouping == "none" and s.contrastive_weight == 0:
        raise UserError("both losses are off: give --grouping or a --contrastive-weight above 0")
    if s.grouping == "sub-caption" and s.negatives == "image" and len(slots) == 1:
        raise UserError("grouping by sub-caption contrasts the texts of one image, and there is only one: add "
                        "--sub-captions 3 or use --negatives batch")
    if s.grouping == "token" and s.negatives == "regrouped":
        raise UserError("--negatives regrouped is for sub-captions: add --grouping sub-caption, or choose --negatives "
                        "image")
    if s.region_grouping and (s.grouping == "none" or "sub" not in slots):
        raise UserError("--region-grouping is for the patches that sub-captions group: add --grouping sub-caption "
                        "--sub-captions 3, or leave it")
    if s.batch % (world * s.accumulate):
        raise UserError(f"--batch {s.batch} does not divide among {world} processes and {s.accumulate} parts: choose "
                        f"a multiple of {world * s.accumulate}")


# ---- the processes ---------------------------------------------------------------------------------------------------

def join_group(s: Settings, rank: int, world: int):
    """Joins torchrun's other processes: NCCL between GPUs, gloo between hosts, which talk of what is no tensor of the
    model's. A process that dies closes its connections, and so is noticed by the others at the next step."""
    backend, store = "gloo", None
    if s.device.startswith("cuda"):
        s.device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(s.device)
    timeout = timedelta(minutes=s.timeout_minutes)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["GROUP_WORLD_SIZE"] == "1":
        # torchrun's store outlives a restart, and would tell where the dead could be reached (pytorch issue 135712)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)
        store = dist.PrefixStore(f"attempt {restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def restarts() -> int:
    """How often torchrun has started this machine's processes again, because one of them had died (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def is_chief() -> bool:
    """Whether this is the process that writes and prints: the first."""
    return not distributed() or dist.get_rank() == 0


def agree(*values: float) -> list[float]:
    """The sums of the values over all processes. The hosts alone take part: a GPU is not waited for."""
    total = torch.tensor(values, dtype=torch.float64)
    if distributed():
        dist.all_reduce(total)
    return total.tolist()


def of_each(x) -> list:
    """x of every process, by rank."""
    everyones = [x]
    if distributed():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, x)
    return everyones


@contextmanager
def together():
    """A UserError that any process raises in this block ends all of them: one raises it, the others leave silently."""
    mine = None
    try:
        yield
    except UserError as error:
        mine = error
    first = next((rank for rank, error in enumerate(of_each(mine)) if error), None)
    if first is not None:
        raise mine if not distributed() or first == dist.get_rank() else SystemExit(1)


@contextmanager
def signals_caught():
    """-> a list to which SIGTERM and Ctrl-C add themselves, instead of ending the process."""
    caught = []
    handlers = {number: signal.signal(number, lambda number, _: caught.append(number))
                for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- a step: the batch on the device, its embeddings, its loss, the gradients ----------------------------------------

@functools.cache
def copy_stream(device: str):
    return torch.cuda.Stream(device)


def send(x: torch.Tensor, device: str) -> torch.Tensor:
    """x on the device; to a GPU it is copied from pinned memory while the step before is still computed."""
    if not device.startswith("cuda"):
        return x.to(device)
    with torch.cuda.stream(copy_stream(device)):
        sent = x.to(device, non_blocking=True)
    now = torch.cuda.current_stream()
    now.wait_stream(copy_stream(device))
    sent.record_stream(now)  # its memory is not given away before `now` is done with it
    return sent


def to_device(batch: Batch, s: Settings) -> Batch:
    """A loader's batch with its tensors on the device; the texts' lengths stay on the host."""
    tokens, allowed = send(batch.tokens, s.device), batch.allowed
    if distributed() and s.grouping == "token" and s.negatives != "image":  # gathered, they must be of one length
        tokens = torch.nn.functional.pad(tokens, (0, s.context - tokens.shape[-1]))
    return Batch(send(batch.images, s.device), tokens, batch.lengths, None if allowed is None else send(allowed, s.device))


def embed(network, images, tokens, lengths, s: Settings) -> dict:
    with torch.autocast(s.device.split(":")[0], torch.bfloat16, enabled=s.precision == "bf16"):
        return network(normalize(images), tokens, s.grouping == "token", lengths)


def backward(network, batch: Batch, s: Settings, mark=lambda part: None):
    """Gradients of the batch's loss, in `accumulate` parts if wished -> detached loss and parts. `mark` is told when a
    part of the step is done.

    In parts (GradCache, 2101.06983): embed all without a graph, take the loss over the whole batch for the embeddings'
    gradients, embed part by part again and send those gradients through. The result is the big batch's gradient;
    memory is one part's.
    """
    if s.accumulate == 1:
        loss, parts = method_loss(embed(network, batch.images, batch.tokens, batch.lengths, s), s, batch.allowed)
        mark("losses")
        loss.backward()
        mark("backward")
    else:
        chunks = list(zip(batch.images.chunk(s.accumulate), batch.tokens.chunk(s.accumulate),
                          np.split(batch.lengths, s.accumulate)))
        with torch.no_grad():
            embedded = [embed(network, *chunk, s) for chunk in chunks]
        leaves = {name: torch.cat([e[name] for e in embedded]) if value.dim() else value  # a number: one for all
                  for name, value in embedded[0].items() if value is not None}
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point())
        loss, parts = method_loss(leaves, s, batch.allowed)
        loss.backward()
        mark("losses")
        grads = {name: leaf.grad.chunk(s.accumulate) if leaf.dim() else [leaf.grad / s.accumulate] * s.accumulate
                 for name, leaf in leaves.items() if leaf.grad is not None}
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1  # DDP sums over the processes once
            with nullcontext() if last or not distributed() else network.no_sync():
                out = embed(network, *chunk, s)
                sum((out[name] * grad[i]).sum() for name, grad in grads.items()).backward()
                mark("backward")
    return loss.detach(), {name: part.detach() for name, part in parts.items()}


# ---- the state, and how a step changes it ----------------------------------------------------------------------------

@dataclasses.dataclass
class State:
    """All that a step changes, and so all that a checkpoint holds. No random generator is among it: a sample is drawn
    from (seed, epoch, index)."""

    model: CLIP
    optimizer: torch.optim.AdamW
    skipped: torch.Tensor  # [2], on the device: steps skipped, in all and in a row up to here
    step: int = 0  # steps done; times the batch, the place in the data
    best: float = math.inf  # least held-out loss
    bad: BadCount = dataclasses.field(default_factory=BadCount)  # of the samples that this process has met


def build(s: Settings) -> CLIP:
    """The model with the weights a run begins with. Raises UserError."""
    torch.manual_seed(s.seed)
    try:
        return CLIP(config_from(s))
    except ValueError as error:
        raise UserError(str(error)) from None


def prepare(model: CLIP, s: Settings) -> tuple[State, torch.nn.Module]:
    """The state a run begins with, and the model as a step calls it, wrapped for several processes."""
    model.layout = text_layout(model, s)
    if s.compile:
        torch._dynamo.config.recompile_limit = 64  # of a function: all blocks together are one, `Block.forward`
    blocks = [*model.visual.blocks, *model.text.blocks]
    for i, block in enumerate(blocks):  # by their forward alone, so that no name in a checkpoint changes
        if s.compile:  # the number of words changes from step to step, that of patches does not
            block.forward = torch.compile(block.forward, dynamic=i >= len(model.visual.blocks))
        if s.grad_checkpointing:
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
    network = model.to(s.device, memory_format=torch.channels_last)  # the patch convolutions are faster so
    if distributed():
        network = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    return State(model, make_optimizer(model, s), torch.zeros(2, device=s.device)), network


def text_layout(model: CLIP, s: Settings) -> str:
    """How the texts are embedded: packed where the device can, which is tried out, else in buckets."""
    if s.device.startswith("cuda") and s.precision == "bf16":
        trouble = packing_trouble(model, s.device)
        if not trouble:
            return "packed"
        if is_chief():
            print(f"WARNING: texts are not packed, which is slower: {trouble}", flush=True)
    return "buckets"


def make_optimizer(model: CLIP, s: Settings) -> torch.optim.AdamW:
    """AdamW; no decay on gains, biases, embeddings and logit_scale (which is apart because FSDP does not shard it)."""
    decay, free = [], []
    for name, p in model.named_parameters():
        if name != "logit_scale":
            (free if p.ndim < 2 or "embedding" in name and "patch" not in name else decay).append(p)
    groups = [dict(params=decay, weight_decay=s.weight_decay), dict(params=free, weight_decay=0.0),
              dict(params=[model.logit_scale], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, s.beta2), eps=s.eps, fused=True)


def learning_rate(step: int, steps: int, s: Settings) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine to 0."""
    warm = max(1, round(s.warmup * steps))
    if step < warm:
        return s.lr * (step + 1) / warm
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def update(state: State, lr: float, s: Settings) -> torch.Tensor:
    """Clips the gradients and steps AdamW -> the gradients' norm.

    Where that norm, the same on all processes, is NaN or infinite, weights and moments stay as they are: the fused
    AdamW sees to it on the device by `found_inf` (as for a GradScaler), so the host need not wait for the norm.
    """
    parameters, scale = list(state.model.parameters()), state.model.logit_scale
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if s.clip_grad:
        torch._foreach_mul_(grads, (s.clip_grad / (norm + 1e-6)).clamp(max=1))
    broken = (~norm.isfinite()).float()
    state.optimizer.grad_scale, state.optimizer.found_inf = None, broken
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    scale.clamp_(max=math.log(100))
    state.skipped += broken
    state.skipped[1] *= broken
    state.step += 1
    return norm


def measure(state: State, loss, parts: dict, norm) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl that are on the device; losses are means over the processes."""
    values = torch.stack([loss, *parts.values()])
    if distributed():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    skipped, in_a_row = state.skipped.int().tolist()
    return dict(zip(("loss", *parts), values.tolist()), grad_norm=norm.item(), skipped=skipped,
                skipped_in_a_row=in_a_row, logit_scale=state.model.logit_scale.exp().item())


@torch.no_grad()
def held_out_loss(network, dataset, tokenizer, s: Settings) -> float:
    """The mean of the method's loss over always the same held-out images."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    n = max(world, min(len(dataset), s.eval_images))  # fewer images than processes: some are seen twice
    s = dataclasses.replace(s, batch=min(s.batch, n // world * world))
    total = torch.zeros((), device=s.device)
    for batch in training_loader(dataset, tokenizer, s, 0, n // s.batch, rank, world):
        batch = to_device(batch, s)
        total += method_loss(embed(network, batch.images, batch.tokens, batch.lengths, s), s, batch.allowed)[0]
    return agree(total.item())[0] / world / (n // s.batch)


# ---- the run's folder and its checkpoints ----------------------------------------------------------------------------

def run_folder(s: Settings, again: bool = False) -> Path:
    """Where this run writes: a new folder, or with --resume, and when torchrun starts it `again`, the one it goes on
    in. Raises UserError."""
    if s.resume not in ("no", "auto"):
        if not checkpoints(Path(s.resume)):
            raise UserError(f"--resume {s.resume}: there is no checkpoint.pt in that folder")
        return Path(s.resume)
    base = Path("runs") / f"{s.method}-{s.size}" if s.out == "auto" else Path(s.out)
    numbered = re.compile(re.escape(base.name) + r"(-\d+)?")
    taken = [p for p in base.parent.glob(base.name + "*") if numbered.fullmatch(p.name)]
    started = [p for p in taken if (p / "settings.json").is_file() and (again or not (p / "finished").exists())]
    if started and (again or s.resume == "auto"):
        return max(started, key=lambda p: (p / "settings.json").stat().st_mtime)
    if s.out != "auto":
        if s.resume == "no" and checkpoints(base):
            raise UserError(f"{base} holds a run already: choose another --out, or --resume {base}")
        return base
    numbers = [int(p.name[len(base.name) + 1:] or 1) for p in taken]
    return base.with_name(f"{base.name}-{max(numbers) + 1}") if taken else base


def save(folder: Path, state: State, s: Settings, best: bool = False) -> bool:
    """Writes checkpoint.pt, or the weights alone as best.pt; all processes must call it. False if the disk failed."""
    content = dict(model=state.model.state_dict(), step=state.step, settings=dataclasses.asdict(s), tokenizer=s.tokenizer)
    if not best:
        content |= dict(optimizer=state.optimizer.state_dict(), skipped=state.skipped, best=state.best,
                        bad=of_all_processes(state.bad).plain())
    path, keep = (folder / "best.pt", 1) if best else (folder / "checkpoint.pt", 2)
    return agree(is_chief() and write_whole(path, content, keep))[0] > 0


@torch.no_grad()
def restore(state: State, content: dict):
    """Makes the state that of a checkpoint's contents."""
    state.model.load_state_dict(content["model"])
    ordered = [p for group in state.optimizer.param_groups for p in group["params"]]
    # of the parameters' strides: the fused AdamW goes by places in memory
    moments = {i: {k: x if k == "step" else torch.empty_like(ordered[i]).copy_(x) for k, x in of_one.items()}
               for i, of_one in content["optimizer"]["state"].items()}
    state.optimizer.load_state_dict({**content["optimizer"], "state": moments})
    state.skipped.copy_(content["skipped"])
    state.step, state.best = content["step"], content["best"]
    if is_chief() and "bad" in content:  # older checkpoints count none
        state.bad = BadCount(*content["bad"])


MAY_CHANGE = (  # on resuming; `size` because the settings it stands for are compared
    "size", "device", "precision", "compile", "fused", "grad_checkpointing", "workers", "accumulate",
    "timeout_minutes", "max_skipped", "max_bad", "out", "resume", "save_minutes", "save_steps", "eval_steps",
    "eval_images", "log_every", "image_root")


def compare_settings(s: Settings, before: dict, folder: Path):
    """Raises UserError if the settings are not those that the run was started with."""
    before = {f.name: f.default for f in dataclasses.fields(s)} | before  # a run may be older than a setting
    different = [f"{f.name} ({before[f.name]} there, {getattr(s, f.name)} here)" for f in dataclasses.fields(s)
                 if f.name not in MAY_CHANGE and before[f.name] != getattr(s, f.name)]
    if different:
        raise UserError(f"{folder} was started with other settings: {', '.join(different)}; give the same flags, or "
                        "start anew without --resume")


def open_folder(folder: Path, s: Settings, step: int):
    """Leaves in the folder what belongs to a run that has done `step` steps; later ones will be written again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(s), indent=1))
    for left_over in folder.glob("*.tmp"):
        left_over.unlink()
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    metrics.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


def append(path: Path, row: dict):
    """Adds a line of JSON. Where the disk fails: says so, and the file stays as it was."""
    rounded = {k: v if isinstance(v, int) else float(f"{v:.6g}") if math.isfinite(v) else None for k, v in row.items()}
    size = path.stat().st_size
    try:
        with open(path, "a") as file:
            file.write(json.dumps(rounded) + "\n")
    except OSError as error:
        os.truncate(path, size)
        print(f"{path} could not be written ({error}): step {row['step']} is not in it", flush=True)


# ---- training --------------------------------------------------------------------------------------------------------

def open_data(s: Settings, flags: dict):
    """-> tokenizer, training set, held-out set (None: no evaluation); and sets what the settings leave to the data."""
    tokenizer = load_tokenizer(s.tokenizer)
    s.vocab = tokenizer.vocab_size
    options = s.image_size, s.kinds, s.crop, s.image_root, s.caption_fields, s.region_grouping
    dataset, scenes = open_dataset(s.data, "train", s.images, *options), s.data == ("scenes",)
    if dataset.bad and is_chief():
        print(f"left out of {' '.join(s.data)}: {dataset.bad.report()}")
    dataset.bad.check(s.max_bad)
    # opened here, so that a set without held-out images ends the run before the training
    held_out = open_dataset(s.data, "validation", s.eval_images, *options) if s.eval_images else None
    if not scenes and "images" not in flags:
        s.images = min(s.images, 30 * len(dataset))
    if s.region_grouping:
        check_boxes(dataset)
    if not scenes and len(dataset) < s.batch:
        raise UserError(f"{' '.join(s.data)} has {len(dataset)} training images, fewer than a batch of {s.batch}: "
                        "choose a smaller --batch")
    return tokenizer, dataset, held_out


def of_all_processes(bad: BadCount) -> BadCount:
    total = BadCount()
    for part in of_each(bad):
        total.merge(part)
    return total


def until_error(batches):
    """The batches; a UserError that ends them comes as the last, for all processes to hear of."""
    try:
        yield from batches
    except UserError as error:
        yield error


def begin(flags: dict) -> tuple[int, int, Settings]:
    """-> this process's rank, the number of processes, who have met, and the settings."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    s = resolve(flags, world)
    if world > 1:
        join_group(s, rank, world)
    fused.set_mode(s.fused)
    # in bf16 runs what stays float32, above all the similarities, goes through a GPU's tensor cores, too
    torch.backends.cuda.matmul.allow_tf32 = s.precision == "bf16"
    return rank, world, s


def train(flags: dict) -> Path:
    """Trains as the flags say and returns the run's folder."""
    rank, world, s = begin(flags)
    chief, say = rank == 0, functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    again = agree(restarts())[0] > 0
    with together():
        tokenizer, dataset, held_out = open_data(s, flags)
        model = build(s)
        place = (folder := run_folder(s, again), newest_whole(folder)) if chief else None
    folder, newest = of_each(place)[0]
    steps = max(1, s.images // s.batch)
    state, network = prepare(model, s)
    if newest:
        with together():
            content = load_checkpoint(newest)
            compare_settings(s, content["settings"], folder)
        restore(state, content)
        say(f"resuming {newest} at step {state.step} of {steps}")
    if chief:
        open_folder(folder, s, state.step)
    say(f"{s.method} on {' '.join(s.data)}: {len(dataset)} images, {steps} steps of {s.batch}; "
        f"{sum(p.numel() for p in state.model.parameters()) / 1e6:.2f} M parameters, {s.device}, {s.precision}, "
        f"{world} process{'es' * (world > 1)}, {s.workers} workers; run folder {folder}")
    say("  " + ", ".join(f"{f.name}={getattr(s, f.name)}" for f in dataclasses.fields(s)
                         if getattr(s, f.name) != f.default))

    first = state.step
    loader = until_error(training_loader(dataset, tokenizer, s, first, steps, rank, world))
    saved, mark = time.monotonic(), (first, time.monotonic())
    with signals_caught() as caught, tqdm(total=steps, initial=first, disable=not chief, unit="step", mininterval=1,
                                          dynamic_ncols=True) as bar:
        for batch in loader:
            failed, bad = isinstance(batch, UserError), state.bad  # of the steps before
            late = chief and time.monotonic() - saved > 60 * s.save_minutes
            stop, late, failed, n_bad, n_seen = agree(bool(caught), late, failed, bad.total, bad.seen)
            due = late or s.save_steps and state.step % s.save_steps == 0
            if stop or due and state.step > first:
                save(folder, state, s)
                saved = time.monotonic()
            if stop:
                say(f"stopped at step {state.step} of {steps}; go on with: --resume {folder}")
                raise SystemExit(130)
            if failed or bad.over(s.max_bad, n_bad, n_seen):
                bad = of_all_processes(bad)
                with together():
                    if isinstance(batch, UserError):
                        raise batch
                    bad.check(s.max_bad)
            bad.seen += len(batch.images) + len(batch.bad)
            for sample in batch.bad:
                bad.add(sample)

            loss, parts = backward(network, to_device(batch, s), s)
            lr = learning_rate(state.step, steps, s)
            norm = update(state, lr, s)

            last = state.step == steps
            evaluating = held_out is not None and s.eval_steps and (last or state.step % s.eval_steps == 0)
            if evaluating or last or state.step % s.log_every == 0:
                rate = (state.step - mark[0]) * s.batch / (time.monotonic() - mark[1])
                row = dict(step=state.step, images=state.step * s.batch, **measure(state, loss, parts, norm), lr=lr,
                           bad=int(agree(bad.total)[0]), images_per_s=rate)
                if evaluating:
                    row["held_out_loss"] = held_out_loss(network, held_out, tokenizer, s)
                    if row["held_out_loss"] < state.best and save(folder, state, s, best=True):
                        state.best = row["held_out_loss"]
                mark = (state.step, time.monotonic())
                if chief:
                    append(folder / "metrics.jsonl", row)
                    bar.set_postfix_str(", ".join(f"{k} {row[k]:.3f}" for k in parts) + f", {rate:.0f} images/s")
                if row["skipped_in_a_row"] >= s.max_skipped:
                    save(folder, state, s)
                    with together():
                        raise UserError(f"{row['skipped_in_a_row']} steps in a row, up to {state.step}, were skipped, "
                                        "for their loss or gradient was NaN or infinite: try a lower --lr, more "
                                        f"--warmup, or --precision fp32; the last good weights are in {folder}")
            bar.update()

    if state.step > first and not save(folder, state, s):
        with together():
            raise UserError(f"the trained weights could not be written: make room in {folder} and --resume {folder}")
    if state.skipped[0]:
        say(f"{int(state.skipped[0])} steps were skipped: their loss or gradient was NaN or infinite")
    bad = of_all_processes(state.bad)
    if bad:
        say(f"passed over: {bad.report()}")
    if world > 1:
        del network  # or DDP is the last to let go of the group, and waits for its threads with the lock they want
        gc.collect()
        dist.destroy_process_group()
    if chief:
        (folder / "finished").touch()
        if s.eval_images:
            from evaluate import evaluate_run  # here, for it draws: matplotlib takes a second
            evaluate_run(folder)
    return folder


# ---- where a step's time goes ----------------------------------------------------------------------------------------

class Clock:
    """Marks on the device's own time line: what lies between two was spent on the later one. A GPU is not waited for,
    so the parts of a step overlap with the host as ever, and add up to the whole."""

    def __init__(self, device: str):
        self.marks, self.cuda = [], device.startswith("cuda")

    def __call__(self, part: str):
        now = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            now.record()
        self.marks.append((part, now))

    def spent(self) -> Counter:
        """Seconds a part."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = Counter()
        for (_, start), (part, end) in itertools.pairwise(self.marks):
            seconds[part] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        return seconds


def matmul_ceiling(s: Settings) -> float:
    """FLOP/s of this process in large matrix products of the run's precision: the best of twenty."""
    clock, n = Clock(s.device), 8192 if s.device.startswith("cuda") else 1024
    a = torch.randn(n, n, device=s.device, dtype=torch.bfloat16 if s.precision == "bf16" else torch.float32)
    best = math.inf
    for _ in range(20):
        clock.marks.clear()
        clock("start")
        a @ a
        clock("product")
        best = min(best, clock.spent()["product"])
    return 2 * n ** 3 / best


def profile(flags: dict, steps: int = 30, warm: int = 10, traced: int = 5):
    """Trains for some steps of the run that the flags describe and prints where their time goes; leaves no folder."""
    import resource  # here, for Windows has none
    rank, world, s = begin(flags)
    with together():
        tokenizer, dataset, _ = open_data(s, flags)
        model = build(s)
    state, network = prepare(model, s)
    clock, used, computed = Clock(s.device), [], []
    model.visual.register_forward_hook(lambda *_: clock("image tower"))
    model.register_forward_hook(lambda *_: clock("text tower"))
    model.text.blocks[0].register_forward_pre_hook(lambda _, x: computed.append(x[0][..., 0].numel()))
    batches = iter(training_loader(dataset, tokenizer, s, 0, warm + steps + traced, rank, world))

    def step():
        batch = next(batches)
        clock("waiting for data")
        used.append(torch.from_numpy(batch.lengths))
        batch = to_device(batch, s)
        clock("to the device")
        backward(network, batch, s, clock)
        update(state, 0.0, s)
        clock("optimiser")

    for _ in range(warm):
        step()
    for marks in (clock.marks, used, computed):
        marks.clear()
    clock("start")
    for _ in range(steps):
        step()
    spent, lengths = clock.spent(), torch.cat(used)  # [images, T]
    padding = 1 - (1 + (s.accumulate > 1)) * (lengths + s.corner_tokens).sum().item() / sum(computed)
    talk = busy = 0
    if world > 1 or clock.cuda:
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CUDA if clock.cuda else activity.CPU]
        with torch.profiler.profile(activities=activities, acc_events=True) as trace:
            for _ in range(traced):  # apart from the others, for tracing slows the host
                step()
            clock.spent()
        for e in trace.key_averages():
            seconds = (e.self_device_time_total if clock.cuda else e.cpu_time_total) / 1e6 / traced
            busy += seconds * (not e.is_user_annotation)
            talk += seconds * e.key.startswith(("ncclDevKernel", "gloo:"))  # NCCL's kernels, spans of gloo's threads
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if clock.cuda:
        memory = torch.cuda.max_memory_allocated()
    took, ceiling = sum(spent.values()) / steps, matmul_ceiling(s)  # seconds a step
    rate, flops = s.batch / took, 3 * model.flops(lengths)  # backward takes twice what forward does
    speed, hours, device = flops * rate / world, s.images / rate / 3600, "GPU" if clock.cuda else "process"
    if rank == 0:
        print(f"{s.method} {s.size}, batch {s.batch}, {s.device}, {s.precision}, {world} process{'es' * (world > 1)}, "
              f"texts {model.layout}: {rate:.0f} images/s, {1000 * took:.1f} ms a step")
        for part, seconds in spent.most_common():
            print(f"    {part:20}{1000 * seconds / steps:10.2f} ms {100 * seconds / steps / took:5.1f}%")
        if world > 1:
            print(f"    communication       {1000 * talk:10.2f} ms, within these parts or beside them")
        if clock.cuda:
            print(f"    kernels             {1000 * busy:10.2f} ms {100 * busy / took:5.1f}%: the GPU is busy")
        print(f"texts: {lengths.sum() / len(lengths):.1f} tokens an image, "
              f"{100 * lengths.float().mean() / s.context:.0f}% of those padded to {s.context}; "
              f"{100 * padding:.1f}% of what is computed is padding\n"
              f"model: {flops / 1e9:.2f} GFLOP an image, forward and backward; {speed / 1e12:.3f} TFLOP/s a {device}, "
              f"{100 * speed / ceiling:.1f}% (MFU) of the {ceiling / 1e12:.3f} of its matrix products\n"
              f"memory: {memory / 2 ** 30:.2f} GiB a {device} at most\n"
              f"the run's {s.images:,} images would take {hours:.2f} hours, {hours * world:.2f} {device}-hours")
    if world > 1:
        del network
        gc.collect()
        dist.destroy_process_group()


def main():
    try:
        flags = parse_flags()
        profile(flags) if flags.pop("profile", False) else train(flags)
    except UserError as error:  # before the group is there all processes raise it, and one of each machine says it
        sys.exit(f"error: {error}" if distributed() or os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    except RuntimeError as error:
        gone = re.search("closed by peer|reset by peer|broken pipe|timed out|refused", str(error), re.I)
        if not gone or os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        sys.exit(f"error: process {os.environ['RANK']} lost another one of the group, which died or fell silent: see "
                 "what that one printed; torchrun --max-restarts=3 goes on from the last checkpoint by itself")


if __name__ == "__main__":
    main()
