"""Times our training step beside the usual one, in one run, alternating: DreamLIP with K sub-captions of real captions'
lengths.

    python tests/benchmark_step.py --batch 64 --rounds 5 --precision fp32     size tiny on the CPU
    python tests/benchmark_step.py --size base-16 --device cuda --compile

Rows:   ours       train.py's step: texts without padding, fused losses
        padded     ours, but every text padded to the context, attention and losses by stored matrices
        open_clip  the same architecture in open_clip (pip install open_clip_torch), under autocast too, its attention
                   by PyTorch's SDPA, K texts padded to the context, its loss slot by slot, as DreamLIP's release does
        compiled   ours block by block, as --compile does; open_clip's two towers
The grouping loss is left out of all, open_clip having none; "ours + grouping" shows what it costs. Where a step's time
goes, train.py --profile says.
"""
import argparse
import dataclasses
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from csrc import fused  # noqa: E402
from data import Batch, normalize  # noqa: E402
from model import CLIP, config_from  # noqa: E402


def sentence_lengths(shape, context, generator):
    """Tokens of real long captions' sentences, both ends counted: log-normal, median 24, mean 26, 95th percentile 46."""
    drawn = 24 * (0.395 * torch.randn(shape, generator=generator)).exp()
    return drawn.round().long().clamp(4, context)


def batch_of(s, seed):
    """Random pictures and texts on the device, as train.py's loader gives them, but for the padding to the context."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (s.batch, 3, s.image_size, s.image_size), generator=generator, dtype=torch.uint8)
    lengths = sentence_lengths((s.batch, s.sub_captions), s.context, generator)
    end = s.vocab - 1  # the end-of-text token is the greatest
    tokens = torch.randint(1, end, (*lengths.shape, s.context), generator=generator)
    behind = torch.arange(s.context) - (lengths[..., None] - 1)
    tokens[behind == 0] = end
    tokens[behind > 0] = 0
    return train.to_device(Batch(images, tokens, lengths.numpy()), s)


def half(s):
    return torch.autocast(s.device.split(":")[0], torch.bfloat16, enabled=s.precision == "bf16")


def our_step(s, **changes):
    """-> the step as a function of a batch, and its model."""
    s = dataclasses.replace(s, **changes)
    state, network = train.prepare(CLIP(config_from(s)), s)

    def step(batch):
        train.backward(network, batch, s)
        train.update(state, 1e-5, s)
    return step, state.model


def padded(step, model):
    def encode_texts(tokens, with_tokens=False, lengths=None):
        return model.encode_text(tokens)

    def padded_step(batch):
        with mock.patch.object(model, "encode_texts", encode_texts):
            step(batch)
    return padded_step


@sdpa_kernel(SDPBackend.MATH)
def stored(step, batch):
    """The step with attention and similarities by stored matrices."""
    fused.set_mode("off")
    step(batch)
    fused.set_mode("auto")


def their_step(s, compiled=False):
    vision = dict(
        image_size=s.image_size,
        patch_size=s.patch,
        width=s.vision_width,
        layers=s.vision_depth,
        head_width=s.vision_width // s.vision_heads,
    )
    text = dict(
        context_length=s.context,
        vocab_size=s.vocab,
        width=s.text_width,
        layers=s.text_depth,
        heads=s.text_heads,
    )
    model = open_clip.model.CLIP(s.embed, vision, text).to(s.device)
    if compiled:
        model.visual.compile()
        model.transformer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    loss = ClipLoss()

    def step(batch):
        with half(s):
            image = model.encode_image(normalize(batch.images), normalize=True)
            texts = model.encode_text(batch.tokens.flatten(0, 1), normalize=True)
            scale = model.logit_scale.exp()
            total = 0
            for text in texts.unflatten(0, batch.tokens.shape[:2]).unbind(1):
                total = total + loss(image, text, scale)
        (total / s.sub_captions).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)
    return step


def text_tower(s, model):
    """The text tower of our model alone, forward and backward."""
    def step(batch):
        with half(s):
            summaries, _ = model.encode_texts(batch.tokens.flatten(0, 1), False, batch.lengths.flatten())
        summaries.sum().backward()
        model.zero_grad()
    return step


def timed(step, batch, device):
    """-> seconds, to the end of what a GPU has been given to do."""
    start = time.perf_counter()
    step(batch)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(steps, s, rounds, warm):
    """Runs the steps in turn, always on the same batch -> {name: seconds of each turn}."""
    times = {name: [] for name in steps}
    for turn in range(-warm, rounds):
        batch = batch_of(s, turn)
        for name in list(times):
            try:
                seconds = timed(steps[name], batch, s.device)
            except torch.OutOfMemoryError:
                print(f"{name:20} runs out of memory")
                torch.cuda.empty_cache()  # what the row held in pieces may not fit the next one
                del times[name]
                continue
            if turn >= 0:
                times[name].append(seconds)
    return times


COMPARED = [
    ("text tower, padded", "text tower"),
    ("padded", "ours"),
    ("open_clip", "ours"),
    ("open_clip", "ours + grouping"),
    ("open_clip, compiled", "ours, compiled"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=256, help="256 of base-16 fit a GPU of 80 GB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", action="store_true", help="add ours and open_clip compiled")
    options = parser.parse_args()
    chosen = {name: getattr(options, name) for name in ("size", "batch", "device", "precision")}
    plain = dict(raw_caption=False, grouping="none", stem="patch", pool="class", optimizer="adamw")
    s = train.resolve(dict(chosen, **plain, sub_captions=8, context=77, vocab=49408))
    train.set_machine(s)
    ours, model = our_step(s)
    tower = text_tower(s, model)
    steps = {
        "ours": ours,
        "ours + grouping": our_step(s, grouping="sub-caption")[0],
        "padded": partial(stored, padded(ours, model)),
        "open_clip": their_step(s),
        "text tower": tower,
        "text tower, padded": padded(tower, model),
    }
    if options.compile:
        steps["ours, compiled"] = our_step(s, compile=True)[0]
        steps["open_clip, compiled"] = their_step(s, compiled=True)
    print(f"{s.size}, K = {s.sub_captions}, batch {s.batch}, {s.device}, {s.precision}, texts {model.layout}, "
          f"torch {torch.__version__}")
    times = alternate(steps, s, options.rounds, warm=5 if options.compile else 2)
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:20} {1000 * middle:9.1f} ms {s.batch / middle:8.0f} images/s")
    for slower, faster in COMPARED:
        if slower in times and faster in times:  # turn by turn: noise hits both
            ratio = statistics.median(x / y for x, y in zip(times[slower], times[faster]))
            print(f"{slower} / {faster}: {ratio:.2f}")


if __name__ == "__main__":
    main()
