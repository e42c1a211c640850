"""Times our training step beside the usual one, in one run, alternating: DreamLIP with K sub-captions of real captions' lengths.

    python tests/benchmark_step.py                                  size tiny on the CPU
    python tests/benchmark_step.py --size base-16 --batch 512       on a GPU; --compile compiles all of them

Rows:   ours       train.py's step: texts without padding, fused losses
        padded     ours, but every text padded to the context, attention and losses by stored matrices
        open_clip  the same architecture in open_clip (pip install open_clip_torch), K texts padded to the context, its loss slot
                   by slot, as DreamLIP's release does it
The grouping loss is left out of all three, open_clip having none; "ours + grouping" shows what it costs.
"""
import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from csrc import fused  # noqa: E402
from data import normalize  # noqa: E402
from model import CLIP, config_from  # noqa: E402


def lengths(n: int, context: int, generator) -> torch.Tensor:
    """Tokens in n sentences of real long captions, both ends counted: log-normal, median 24, mean 26, 95th percentile 46."""
    drawn = 24 * (0.395 * torch.randn(n, generator=generator)).exp()
    return drawn.round().long().clamp(4, context)


def batch_of(s, vocab: int, seed: int):
    """images uint8 [B,3,S,S], tokens [B,K,context] with the end-of-text token, the greatest id, behind the words."""
    g = torch.Generator().manual_seed(seed)
    texts = s.batch * s.sub_captions
    images = torch.randint(0, 256, (s.batch, 3, s.image_size, s.image_size), generator=g, dtype=torch.uint8)
    tokens, n = torch.randint(1, vocab - 2, (texts, s.context), generator=g), lengths(texts, s.context, g)
    place = torch.arange(s.context)
    tokens = torch.where(place < n[:, None] - 1, tokens, torch.where(place == n[:, None] - 1, vocab - 1, 0))
    return images.to(s.device), tokens.view(s.batch, s.sub_captions, -1).to(s.device)


def open_clip_model(s):
    vision = dict(image_size=s.image_size, patch_size=s.patch, width=s.vision_width, layers=s.vision_depth, head_width=s.vision_width // s.vision_heads)
    text = dict(context_length=s.context, vocab_size=s.vocab, width=s.text_width, layers=s.text_depth, heads=s.text_heads)
    return open_clip.model.CLIP(s.embed, vision, text).to(s.device)


def with_optimizer(model, s, gradients):
    """A whole step: gradients by `gradients(images, tokens)`, clipping, AdamW, the clamp of logit_scale."""
    optimizer = train.make_optimizer(model, s) if isinstance(model, CLIP) else torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(images, tokens):
        gradients(images, tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)
    return step


def timed(step, batch, device) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(*batch)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=train.SIZES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    s = train.resolve(dict(size=options.size, method="dreamlip", batch=options.batch, sub_captions=options.k, raw_caption=False, stem="patch",
                           pool="class", grouping="none", context=77, vocab=49408, precision=options.precision))
    compiled = torch.compile if options.compile else lambda model: model
    autocast = (lambda: torch.autocast(s.device, torch.bfloat16)) if s.precision == "bf16" else nullcontext
    torch.manual_seed(0)
    ours, theirs, loss = CLIP(config_from(s)).to(s.device), open_clip_model(s), ClipLoss()
    network, their_network = compiled(ours), compiled(theirs)

    def our_step(images, tokens):
        train.backward(network, images, tokens, s)

    def grouping_step(images, tokens):
        s.grouping = "sub-caption"
        train.backward(network, images, tokens, s)
        s.grouping = "none"

    def padded_step(images, tokens):
        padded = lambda self, tokens, with_tokens=False: self.encode_text(tokens)  # noqa: E731
        with mock.patch.object(CLIP, "encode_texts", padded), sdpa_kernel(SDPBackend.MATH):
            fused.set_mode("off")
            train.backward(ours, images, tokens, s)
            fused.set_mode("auto")

    def their_step(images, tokens):
        with autocast():
            features = their_network.encode_image(normalize(images), normalize=True)
            texts = their_network.encode_text(tokens.flatten(0, 1), normalize=True).unflatten(0, tokens.shape[:2])
            total = sum(loss(features, texts[:, k], theirs.logit_scale.exp()) for k in range(options.k)) / options.k
        total.backward()

    def text_tower(encode):
        def step(images, tokens):
            with autocast():
                out = encode(tokens.flatten(0, 1))[0]
            out.sum().backward()
            ours.zero_grad(set_to_none=True)
        return step

    steps = {"ours": with_optimizer(ours, s, our_step), "ours + grouping": with_optimizer(ours, s, grouping_step),
             "padded": with_optimizer(ours, s, padded_step), "open_clip": with_optimizer(theirs, s, their_step),
             "text tower": text_tower(ours.encode_texts), "text tower, padded": text_tower(ours.encode_text)}
    times = {name: [] for name in steps}
    for turn in range(-2, options.rounds):
        batch = batch_of(s, s.vocab, turn)
        for name, step in steps.items():
            seconds = timed(step, batch, s.device)
            if turn >= 0:  # two turns to warm up
                times[name].append(seconds)
    used = (batch[1].argmax(-1) + 1).float().mean().item()
    print(f"{s.size}, K = {options.k}, batch {s.batch}, {s.device}, {s.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"{used:.1f} of {s.context} tokens in use")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:20} {1000 * middle:9.1f} ms  (from {1000 * min(seconds):.1f} to {1000 * max(seconds):.1f})  {s.batch / middle:8.0f} images/s")
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b]))  # noqa: E731  turn by turn: noise hits both
    print(f"text tower, padded / ours {ratio('text tower, padded', 'text tower'):.2f};  step: padded / ours {ratio('padded', 'ours'):.2f}, "
          f"open_clip / ours {ratio('open_clip', 'ours'):.2f}, open_clip / ours + grouping {ratio('open_clip', 'ours + grouping'):.2f}")


if __name__ == "__main__":
    main()
