"""Train a language-image model with one of five methods, or a mixture of them.

    python train.py --method dreamlip                                        embedded scenes, minutes on a laptop or one GPU
    python train.py --method lotlip --data pictures/captions.jsonl           your own pictures
    torchrun --nproc_per_node=8 train.py --method dreamlip --size base-16 --data captions.jsonl

A method is a row of METHODS and a size a row of SIZES; every setting in them is also a flag, which wins. `--help` lists all.
"""

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import typing
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from csrc import fused
from data import Parser, UserError, load_tokenizer, normalize, open_dataset, text_slots, training_loader
from losses import grouping_loss, multi_to_multi_loss
from model import CLIP, CLIPConfig, config_from


@dataclasses.dataclass
class Settings(CLIPConfig):
    # what to train on
    method: str = "dreamlip"  # clip, dreamlip, lotlip, holistic or sparc: a row of METHODS
    size: str = "auto"  # nano, tiny, small, base-32, base-16, large-14: a row of SIZES; auto: tiny on a CPU, small on a GPU
    data: str = "scenes"  # "scenes", or a JSON-lines file of {"image": path, "caption": text or list, ...}
    kinds: int = 24  # kinds of object in the scenes
    tokenizer: str = "auto"  # auto, clip, scenes, or a vocabulary file
    crop: float = 0.8  # least share of a picture that a random crop keeps (not for scenes)
    # the texts drawn for an image at every step: one slot each
    raw_caption: bool = True  # a slot for the raw caption
    sub_captions: int = 0  # K slots for sub-captions
    sampling: str = "random"  # sub-captions: "random" anew each time, "first" K always, "whole" long caption as one text
    short_caption: bool = True  # the short caption is among those sub-captions are drawn from
    whole_caption: bool = False  # the whole long caption, as one text, is among them too
    long_texts: int = 0  # J slots for long texts
    long_sentences: int = 0  # consecutive sentences in a long text; 0: the whole caption
    perspectives: int = 0  # M slots for Holistic CLIP's perspectives, the raw caption first
    # the loss
    grouping: str = "none"  # patches grouped by "sub-caption" (DreamLIP), by "token" (SPARC), or "none"
    negatives: str = "image"  # of the grouping loss: the same "image" (papers), the whole "batch" (DreamLIP's code), the same "slot"
    threshold: float | None = None  # of the grouping weights; default 1/P
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
    ema: float = 0.0  # decay of an average of the weights that is evaluated instead of them; 0: none
    seed: int = 0  # of the weights, the order and the texts drawn
    # the machine
    device: str = "auto"  # cuda, mps or cpu
    precision: str = "auto"  # fp32 or bf16 (autocast)
    compile: bool = False  # torch.compile
    fused: str = "auto"  # the fused similarity op: "auto" for large matrices, "on" for all, "off" (the same in plain PyTorch)
    workers: int = -1  # data-loading processes; -1: by the machine
    # the run
    out: str = "auto"  # the run's folder; auto: runs/METHOD-SIZE, numbered
    resume: str = "no"  # "auto": the newest unfinished run of this name; or a run's folder
    save_minutes: float = 5.0  # between checkpoints
    log_every: int = 20  # steps between lines of metrics.jsonl
    eval_images: int = 1000  # held-out images to evaluate on; 0: no evaluation


# Each method's row: the texts an image brings, the parts the model gets, the losses.
METHODS = {
    "clip": dict(),
    "dreamlip": dict(sub_captions=3, grouping="sub-caption"),
    "lotlip": dict(long_texts=1, corner_tokens=2),
    "holistic": dict(raw_caption=False, perspectives=5, branches=5),
    "sparc": dict(grouping="token", contrastive_weight=0.5, grouping_weight=1.0),
}

# What the small sizes, made for scenes, change of DreamLIP's grouping and drawing (README, "What the small sizes change"): the defaults are the paper's.
SCENES = dict(stem="conv", negatives="slot", grouping_weight=0.3, whole_caption=True)

# Each size's row: both towers, and a recipe that fits them. The last three are CLIP's ViT-B/32, B/16 and L/14.
SIZES = {
    "nano": dict(**SCENES, image_size=32, patch=8, vision_width=64, vision_depth=1, vision_heads=2, text_width=64, text_depth=1, text_heads=2, context=128,
                 embed=64, images=8_000, batch=32, lr=2e-3, kinds=12),
    "tiny": dict(**SCENES, image_size=64, patch=8, vision_width=128, vision_depth=2, vision_heads=4, text_width=128, text_depth=2, text_heads=4, context=128,
                 embed=128, images=100_000, batch=32, lr=1e-3, kinds=24),
    "small": dict(**SCENES, image_size=96, patch=8, vision_width=384, vision_depth=6, vision_heads=6, text_width=256, text_depth=4, text_heads=4, context=128,
                  embed=256, images=3_000_000, batch=256, lr=1e-3, kinds=64),
    "base-32": dict(image_size=224, patch=32, vision_width=768, vision_depth=12, vision_heads=12, text_width=512, text_depth=12, text_heads=8, context=77,
                    embed=512, images=96_000_000, batch=1024, lr=5e-4, warmup=0.02, weight_decay=0.5, kinds=83),
    "base-16": dict(image_size=224, patch=16, vision_width=768, vision_depth=12, vision_heads=12, text_width=512, text_depth=12, text_heads=8, context=77,
                    embed=512, images=96_000_000, batch=1024, lr=5e-4, warmup=0.02, weight_decay=0.5, kinds=83),
    "large-14": dict(image_size=224, patch=14, vision_width=1024, vision_depth=24, vision_heads=16, text_width=768, text_depth=12, text_heads=12, context=77,
                     embed=768, images=96_000_000, batch=1024, lr=4e-4, warmup=0.02, weight_decay=0.2, kinds=83),
}
CHOICES = dict(method=METHODS, size=("auto", *SIZES), sampling=("random", "first", "whole"), grouping=("none", "sub-caption", "token"),
               negatives=("image", "batch", "slot"), fused=("auto", "on", "off"), precision=("auto", "fp32", "bf16"), pool=("auto", "class", "average"), branch_type=("class", "mlp"), stem=("patch", "conv"),
               text_attention=("causal", "bidirectional"), activation=("gelu", "quickgelu"))


# ---- settings --------------------------------------------------------------------------------------------------------

def parse_flags(argv=None) -> dict:
    """The flags the user gave, one for every field of Settings; the comment behind a field is its help text."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(CLIPConfig) + inspect.getsource(Settings), re.M))
    hints = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        name, help = "--" + field.name.replace("_", "-"), comments.get(field.name, "").replace("%", "%%")
        if hints[field.name] is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=help)
        else:
            kind = next(t for t in (*typing.get_args(hints[field.name]), hints[field.name]) if t in (int, float, str))
            choices = CHOICES.get(field.name)
            parser.add_argument(name, type=kind, choices=list(choices) if choices else None, help=help)
    return vars(parser.parse_args(argv))


def resolve(flags: dict, world: int = 1) -> Settings:
    """Defaults < the size's row < the method's row < the flags; what is left on "auto" is chosen from the machine. Raises UserError."""
    s = Settings(pool="auto")
    device = flags.get("device", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    size = flags.get("size", "auto")
    if size == "auto":
        size = "tiny" if device == "cpu" else "small"
    method = flags.get("method", s.method)
    for row in (SIZES[size], METHODS[method], flags, dict(device=device, size=size)):
        for name, value in row.items():
            setattr(s, name, value)
    if s.pool == "auto":  # the papers' class token; small models localise far better with the average of their patches
        s.pool = "average" if size in ("nano", "tiny", "small") and (s.branches == 1 or s.branch_type == "mlp") else "class"
    if s.grouping == "token" and "negatives" not in flags:
        s.negatives = "image"  # a token's rivals are the other tokens of its caption (SPARC)
    if s.precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.startswith("cuda") else device == "cpu" and torch.cpu._is_avx512_bf16_supported()
        s.precision = "bf16" if fast else "fp32"
    if s.workers < 0:
        s.workers = min(8, (os.cpu_count() or 2) // world) if device != "cpu" else 1
    if s.tokenizer == "auto" and s.data == "scenes":
        s.tokenizer = "scenes"
    check(s, world)
    return s


def check(s: Settings, world: int = 1):
    """Raises UserError with one sentence where the settings cannot go together."""
    positive = ("batch", "images", "accumulate", "log_every", "lr", "save_minutes")
    for name in positive:
        if getattr(s, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(s, name)}")
    check_device(s.device)
    slots = text_slots(s)
    if not slots:
        raise UserError("no text is left to train on: give --raw-caption, --sub-captions, --long-texts or --perspectives")
    if s.corner_tokens and set(slots) == {"raw"}:
        raise UserError("corner tokens are trained on long texts and sub-captions, and there are none: add --long-texts 1 or --sub-captions 3")
    if s.grouping == "none" and s.contrastive_weight == 0:
        raise UserError("both losses are off: give --grouping or a --contrastive-weight above 0")
    if s.grouping == "sub-caption" and s.negatives == "image" and len(slots) == 1:
        raise UserError("grouping by sub-caption contrasts the texts of one image, and there is only one: add --sub-captions 3 or use --negatives batch")
    if s.batch % (world * s.accumulate):
        raise UserError(f"--batch {s.batch} does not divide among {world} processes and {s.accumulate} parts: choose a multiple of {world * s.accumulate}")
    for name in ("sub_captions", "long_texts", "long_sentences", "perspectives", "warmup", "weight_decay", "ema", "clip_grad", "eval_images", "seed", "eps"):
        if getattr(s, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} cannot be negative")
    if not 0 <= s.ema < 1 or not 0 <= s.warmup <= 1 or not 0 < s.crop <= 1 or not 0 <= s.beta2 < 1:
        raise UserError("--ema and --beta2 must be from 0 to below 1, --warmup and --crop from 0 to 1")


def check_device(device: str):
    """Raises UserError if the device is none that PyTorch has here."""
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"no --device {device!r}: take cpu, cuda or mps")
    if kind == "cuda" and not torch.cuda.is_available() or kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {device}: PyTorch sees none here; leave --device away or use cpu")


# ---- the loss of a step ----------------------------------------------------------------------------------------------

def method_loss(out: dict, s: Settings) -> tuple[torch.Tensor, dict]:
    """The weighted sum of the method's losses, and its parts. `out` is what CLIP.forward returns."""
    slots, summaries, scale = text_slots(s), out["summaries"], out["logit_scale"]  # summaries [B, T, 1+C, D]
    texts = summaries[:, :, 0]  # [B, T, D]: every text by its end-of-text token ...
    long = [t for t, slot in enumerate(slots) if slot != "raw"]
    corners = summaries[:, long, 1:].flatten(1, 2)  # ... and all but the raw caption by their corners too (LoTLIP)
    parts = {"contrastive": multi_to_multi_loss(out["branches"], torch.cat([texts, corners], 1), scale)}
    loss = s.contrastive_weight * parts["contrastive"]
    if s.grouping != "none":
        if s.grouping == "sub-caption":
            parts["grouping"] = grouping_loss(out["patches"], texts, scale, s.threshold, negatives=s.negatives)
        else:
            tokens = out["token_embeddings"]  # [B·T, L, D]; the two end tokens and the padding are no words
            place, end = torch.arange(tokens.shape[1], device=tokens.device), out["ends"][:, None]
            patches = out["patches"].repeat_interleave(len(slots), 0)  # [B·T, P, D]
            parts["grouping"] = grouping_loss(patches, tokens, scale, s.threshold, (place > 0) & (place < end), s.negatives)
        loss = loss + s.grouping_weight * parts["grouping"]
    return loss, parts


def backward(model, images, tokens, s: Settings, autocast):
    """Gradients of the batch's loss, in `accumulate` parts if wished -> detached loss and parts.

    In parts (GradCache, 2101.06983): embed all without a graph, take the loss over the whole batch for the embeddings' gradients, embed
    part by part again and send those gradients through. The result is the big batch's gradient; memory is one part's.
    """
    with_tokens = s.grouping == "token"

    def embed(images, tokens):
        with autocast():
            return model(normalize(images), tokens, with_tokens)

    if s.accumulate == 1:
        loss, parts = method_loss(embed(images, tokens), s)
        loss.backward()
    else:
        chunks = list(zip(images.chunk(s.accumulate), tokens.chunk(s.accumulate)))
        with torch.no_grad():
            embedded = [embed(*chunk) for chunk in chunks]
        names = [name for name, value in embedded[0].items() if value is not None and name not in ("logit_scale", "ends")]
        leaves = {name: torch.cat([e[name] for e in embedded]).requires_grad_() for name in names}
        leaves["logit_scale"] = embedded[0]["logit_scale"].detach().requires_grad_()
        loss, parts = method_loss({"ends": torch.cat([e["ends"] for e in embedded]), **leaves}, s)
        loss.backward()
        grads = {name: leaf.grad.chunk(s.accumulate) for name, leaf in leaves.items() if name != "logit_scale" and leaf.grad is not None}
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                out = embed(*chunk)
                surrogate = sum((out[name] * grad[i]).sum() for name, grad in grads.items()) + out["logit_scale"] * leaves["logit_scale"].grad * last
                surrogate.backward()
    return loss.detach(), {name: part.detach() for name, part in parts.items()}


# ---- optimisation ----------------------------------------------------------------------------------------------------

def make_optimizer(model: CLIP, s: Settings) -> torch.optim.AdamW:
    """AdamW; no decay on gains, biases, embeddings and logit_scale."""
    decay, free = [], []
    for name, p in model.named_parameters():
        (free if p.ndim < 2 or "embedding" in name and "patch" not in name else decay).append(p)
    groups = [dict(params=decay, weight_decay=s.weight_decay), dict(params=free, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, s.beta2), eps=s.eps, fused=s.device != "mps")


def learning_rate(step: int, steps: int, s: Settings) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine to 0."""
    warm = max(1, round(s.warmup * steps))
    if step < warm:
        return s.lr * (step + 1) / warm
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


# ---- the run's folder ------------------------------------------------------------------------------------------------

def run_folder(s: Settings) -> Path:
    base = Path("runs") / f"{s.method}-{s.size}" if s.out == "auto" else Path(s.out)
    taken = [p for p in base.parent.glob(base.name + "*") if re.fullmatch(re.escape(base.name) + r"(-\d+)?", p.name)]
    if s.resume not in ("no", "auto"):
        if not (Path(s.resume) / "checkpoint.pt").is_file():
            raise UserError(f"--resume {s.resume}: there is no checkpoint.pt in that folder")
        return Path(s.resume)
    if s.resume == "auto":
        started = [p for p in taken if (p / "checkpoint.pt").is_file() and not (p / "finished").exists()]
        if started:
            return max(started, key=lambda p: (p / "checkpoint.pt").stat().st_mtime)
    if not taken:
        return base
    if s.out != "auto" and s.resume == "no" and (base / "checkpoint.pt").exists():
        raise UserError(f"{base} holds a run already: choose another --out, or --resume {base}")
    numbers = [int(p.name[len(base.name) + 1:] or 1) for p in taken]
    return base.with_name(f"{base.name}-{max(numbers) + 1}") if s.out == "auto" else base


def save(path: Path, content: dict):
    """torch.save that leaves either the old file or the whole new one, whatever happens in between."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint written by this script. Raises UserError if it is missing, cut off or something else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["settings"], content["model"]
        return content
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: name a run's folder or its checkpoint.pt") from None
    except Exception as error:  # torch.load raises many kinds on a damaged or foreign file
        raise UserError(f"{path} is not a whole checkpoint of this project ({type(error).__name__}): take another one") from None


SAME_ON_RESUME = [f.name for f in dataclasses.fields(Settings) if f.name not in (
    "size", "device", "precision", "compile", "fused", "workers", "out", "resume", "save_minutes", "log_every", "eval_images", "accumulate")]


# ---- training --------------------------------------------------------------------------------------------------------

def train(flags: dict) -> Path:
    """Trains as the flags say and returns the run's folder."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    s = resolve(flags, world)
    if world > 1:
        if s.device.startswith("cuda"):
            s.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(s.device)
        dist.init_process_group("nccl" if s.device.startswith("cuda") else "gloo")
    chief, say = rank == 0, print if rank == 0 else lambda *_: None
    folder = [run_folder(s) if chief else None]
    if world > 1:
        dist.broadcast_object_list(folder)
    folder = folder[0]

    fused.set_mode(s.fused)
    torch.manual_seed(s.seed)
    tokenizer = load_tokenizer(s.tokenizer)
    s.vocab = tokenizer.vocab_size
    dataset = open_dataset(s.data, "train", s.images, s.image_size, s.kinds)
    if getattr(dataset, "bad", None):
        say(f"left out of {s.data}: {dataset.report()}")
    if s.eval_images:  # no held-out picture is found out now, not after the training
        open_dataset(s.data, "test", s.eval_images, s.image_size, s.kinds)
    if s.data != "scenes" and "images" not in flags:
        s.images = min(s.images, 30 * len(dataset))
    if len(dataset) < s.batch and s.data != "scenes":
        raise UserError(f"{s.data} has {len(dataset)} training images, fewer than a batch of {s.batch}: choose a smaller --batch")
    try:
        model = CLIP(config_from(s)).to(s.device, memory_format=torch.channels_last)  # the patch convolutions are faster so
    except ValueError as error:
        raise UserError(str(error)) from None
    steps = max(1, s.images // s.batch)
    optimizer = make_optimizer(model, s)
    average = [p.detach().clone() for p in model.parameters()] if s.ema else None

    first = 0
    if s.resume != "no" and (folder / "checkpoint.pt").is_file():
        checkpoint = load_checkpoint(folder / "checkpoint.pt")
        different = [f"{n} ({checkpoint['settings'].get(n)} there, {getattr(s, n)} here)" for n in SAME_ON_RESUME if checkpoint["settings"].get(n) != getattr(s, n)]
        if different:
            raise UserError(f"{folder} was started with other settings: {', '.join(different)}; give the same flags, or start anew without --resume")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["step"]
        if average:
            average = [a.to(s.device) for a in checkpoint["average"]]
        if chief and (folder / "metrics.jsonl").exists():  # what came after the checkpoint will be done, and written, again
            lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            (folder / "metrics.jsonl").write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first))
        say(f"resuming {folder} at step {first} of {steps}")

    network = model
    if s.compile:
        network = torch.compile(network)
    if world > 1:
        network = torch.nn.parallel.DistributedDataParallel(network, device_ids=[s.device] if s.device.startswith("cuda") else None)
    device_type = s.device.split(":")[0]
    autocast = (lambda: torch.autocast(device_type, torch.bfloat16)) if s.precision == "bf16" else nullcontext
    if chief:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(s), indent=1))
    changed = {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if getattr(s, f.name) != f.default}
    say(f"{s.method} on {s.data}: {len(dataset)} images, {steps} steps of {s.batch}; {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{s.device}, {s.precision}, {world} process{'es' * (world > 1)}, {s.workers} workers; run folder {folder}")
    say("  " + ", ".join(f"{k}={v}" for k, v in changed.items()))

    def snapshot(step):
        return dict(model=model.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step, settings=dataclasses.asdict(s), tokenizer=s.tokenizer)

    stop = []  # the signal that asked us to stop, if one did
    handlers = {sig: signal.signal(sig, lambda number, _: stop.append(number)) for sig in (signal.SIGTERM, signal.SIGINT)}
    loader = training_loader(dataset, tokenizer, s, first, steps, rank, world)
    metrics = open(folder / "metrics.jsonl", "a") if chief else None
    bad, saved, mark = {}, time.monotonic(), (first, time.monotonic())
    with tqdm(total=steps, initial=first, disable=not chief, unit="step", mininterval=1, dynamic_ncols=True) as bar:
        for step, batch in enumerate(loader, first):
            if isinstance(batch, UserError):
                raise batch
            images, tokens, found_bad = batch
            if world > 1 and s.grouping == "token" and s.negatives != "image":  # gathered, they must be of one length on all ranks
                tokens = torch.nn.functional.pad(tokens, (0, s.context - tokens.shape[-1]))
            images, tokens = (x.to(s.device, non_blocking=True) for x in (images, tokens))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, s)
            loss, parts = backward(network, images, tokens, s, autocast)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip_grad or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
                if average:
                    torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - s.ema)
            for b in found_bad:
                bad.setdefault(b.reason, set()).add(b.detail)
            done = step + 1
            if done % s.log_every == 0 or done == steps:
                values = torch.stack([loss, *parts.values()])
                if world > 1:
                    dist.all_reduce(values)
                loss, *values = (values / world).tolist()
                if not math.isfinite(loss):
                    raise UserError(f"the loss is {loss} at step {done}: try a lower --lr, more --warmup, or --precision fp32; the last good weights are in {folder}")
                if chief:
                    now = time.monotonic()
                    rate = (done - mark[0]) * s.batch / (now - mark[1])
                    mark = (done, now)
                    row = dict(step=done, images=done * s.batch, loss=loss, **dict(zip(parts, values)), lr=learning_rate(step, steps, s), grad_norm=norm.item(),
                               logit_scale=model.logit_scale.exp().item(), images_per_s=rate)
                    metrics.write(json.dumps({k: float(f"{v:.6g}") for k, v in row.items()}) + "\n")
                    metrics.flush()
                    bar.set_postfix_str(", ".join(f"{k} {v:.3f}" for k, v in zip(parts, values)) + f", {rate:.0f} images/s")
            bar.update()
            stopping = bool(stop)
            if world > 1 and done % s.log_every == 0:  # all ranks leave at the same step
                flag = torch.tensor(float(stopping), device=s.device)
                dist.all_reduce(flag)
                stopping = flag.item() > 0
            elif world > 1:
                stopping = False
            if chief and (stopping or done == steps or time.monotonic() - saved > 60 * s.save_minutes):
                save(folder / "checkpoint.pt", snapshot(done))
                saved = time.monotonic()
            if stopping and done < steps:
                say(f"stopped at step {done} of {steps}; go on with: --resume {folder}")
                raise SystemExit(130)
    for sig, handler in handlers.items():
        signal.signal(sig, handler)
    if bad:
        say("pictures passed over: " + "; ".join(f"{len(what)} × {reason}: {', '.join(sorted(what)[:3])}" for reason, what in bad.items()))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if chief:
        metrics.close()
        (folder / "finished").touch()
        if s.eval_images:
            from evaluate import evaluate_run
            evaluate_run(folder)
    return folder


if __name__ == "__main__":
    try:
        train(parse_flags())
    except UserError as error:
        sys.exit(f"error: {error}")
