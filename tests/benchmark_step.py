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
goes, train.py --profile says. The flags are --rounds and train.py's.
"""
import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from csrc import fused  # noqa: E402
from data import Batch, normalize  # noqa: E402
from model import CLIP, to_open_clip  # noqa: E402


def batch_of(s, seed):
    """Random pictures and texts on the device, as train.py's loader gives them, but for the padding to the context. The
    texts' lengths are those of real long captions' sentences: log-normal, median 24, mean 26, 95th percentile 46."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (s.batch, 3, s.image_size, s.image_size), generator=generator, dtype=torch.uint8)
    drawn = 24 * (0.395 * torch.randn(s.batch, s.sub_captions, generator=generator)).exp()
    lengths = drawn.round().long().clamp(4, s.context)  # both ends counted
    end = s.vocab - 1  # the end-of-text token is the greatest
    words = torch.randint(1, end, (*lengths.shape, s.context), generator=generator)
    place = torch.arange(s.context)
    last = lengths[..., None] - 1
    tokens = words * (place < last) + end * (place == last)
    return train.to_device(Batch(images, tokens, lengths.numpy()), s)


def half(s):
    return torch.autocast(s.device.split(":")[0], torch.bfloat16, enabled=s.precision == "bf16")


def our_step(s):
    """-> the step as a function of a batch, and its model."""
    state, network = train.prepare(CLIP(s), s)

    def step(batch):
        train.backward(network, batch, s)
        train.update(state, 1e-5, s)
    return step, state.model


def padded(step, model):
    """The step with every text as long as the context, and so in a row of its own."""
    encode = model.encode_text

    def encode_padded(tokens, lengths, with_tokens):
        return encode(tokens, np.full_like(lengths, tokens.shape[-1]), with_tokens)

    def padded_step(batch):
        with mock.patch.object(model, "encode_text", encode_padded):
            step(batch)
    return padded_step


@sdpa_kernel(SDPBackend.MATH)
def stored(step, batch):
    """The step with attention and similarities by stored matrices."""
    fused.mode = "off"
    step(batch)
    fused.mode = "auto"


def their_step(s):
    _, config = to_open_clip(CLIP(s))
    model = open_clip.model.CLIP(**config).to(s.device)
    if s.compile:
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


def alternate(steps, s, rounds, warm):
    """Runs the steps in turn, always on the same batch -> {name: seconds of each turn}."""
    times = {name: [] for name in steps}
    for turn in range(-warm, rounds):
        batch = batch_of(s, turn)
        for name in list(times):
            start = timer()  # it waits until a GPU has done all that it was given to do
            try:
                steps[name](batch)
            except torch.OutOfMemoryError:
                print(f"{name:20} runs out of memory")
                torch.cuda.empty_cache()  # what the row held in pieces may not fit the next one
                del times[name]
                continue
            if turn >= 0:
                times[name].append(timer() - start)
    return times


# As open_clip's architecture; the batch of base-16 fits a GPU of 80 GB.
DEFAULTS = dict(size="tiny", batch=256, context=77, vocab=49408, stem="patch", pool="class", optimizer="adamw",
                raw_caption=False, sub_captions=8, grouping="none")
COMPARED = [
    ("padded", "ours"),
    ("open_clip", "ours"),
    ("open_clip", "ours + grouping"),
    ("open_clip, compiled", "ours, compiled"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options, flags = parser.parse_known_args()
    s = train.resolve(DEFAULTS | train.parse_flags(flags))
    train.set_machine(s)
    plain = replace(s, compile=False)
    ours, model = our_step(plain)
    steps = {
        "ours": ours,
        "ours + grouping": our_step(replace(plain, grouping="sub-caption"))[0],
        "padded": partial(stored, padded(ours, model)),
        "open_clip": their_step(plain),
    }
    if s.compile:
        steps["ours, compiled"] = our_step(s)[0]
        steps["open_clip, compiled"] = their_step(s)
    print(f"{s.size}, K = {s.sub_captions}, batch {s.batch}, {s.device}, {s.precision}, torch {torch.__version__}")
    times = alternate(steps, s, options.rounds, warm=5 if s.compile else 2)
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:20} {1000 * middle:9.1f} ms {s.batch / middle:8.0f} images/s")
    for slower, faster in COMPARED:
        if slower in times and faster in times:  # turn by turn: noise hits both
            ratio = statistics.median(x / y for x, y in zip(times[slower], times[faster]))
            print(f"{slower} / {faster}: {ratio:.2f}")


if __name__ == "__main__":
    main()
