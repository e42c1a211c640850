"""Times our training step beside the usual one, in one run, alternating: DreamLIP with K sub-captions of real captions' lengths.

    python tests/benchmark_step.py                                  size tiny on the CPU
    python tests/benchmark_step.py --size base-16 --batch 512       on a GPU; --compile compiles all of them
    python tests/benchmark_step.py --anatomy                        where the time of a real step on scenes goes

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
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from csrc import fused  # noqa: E402
from data import load_tokenizer, normalize, open_dataset, training_loader  # noqa: E402
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


def anatomy(s, steps: int = 30):
    """Prints where the time of training steps on scenes goes: each part waits for the one before, so nothing overlaps."""
    spent, started = Counter(), {}

    def now():
        if s.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed_call(name, function):
        def call(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            spent[name] += now() - start
            return result
        return call

    tokenizer = load_tokenizer("scenes")
    s.vocab = tokenizer.vocab_size
    dataset = open_dataset("scenes", "train", 100_000, s.image_size, s.kinds)
    state, network = train.prepare(train.build(s), s)
    for name, tower in (("image tower", state.model.visual), ("text tower", state.model.text)):
        tower.register_forward_pre_hook(lambda *_, name=name: started.update({name: now()}))
        tower.register_forward_hook(lambda *_, name=name: spent.update({name: now() - started[name]}))
    used = padded = flops = 0
    batches = iter(training_loader(dataset, tokenizer, s, 0, steps + 5))
    with mock.patch.object(train, "method_loss", timed_call("losses", train.method_loss)), \
            mock.patch.object(torch.Tensor, "backward", timed_call("backward", torch.Tensor.backward)):
        for step in range(-5, steps):
            if step == 0:  # warm
                spent.clear()
                whole = now()
            batch = timed_call("data", next)(batches)
            images, tokens, *which = timed_call("copies", train.to_device)(batch, s)
            with FlopCounterMode(display=False) if step == -1 else nullcontext() as counter:
                train.backward(network, images, tokens, s, *which)
            flops = counter.get_total_flops() if step == -1 else flops
            timed_call("optimiser", train.update)(state, 0.0, s)
            used, padded = used + (tokens.argmax(-1) + 1).sum().item(), padded + tokens.shape[0] * tokens.shape[1] * s.context
    whole = now() - whole
    spent["the rest (buckets, normalising, Python)"] = whole - sum(spent.values())
    a = torch.randn(2048, 2048, device=s.device, dtype=torch.bfloat16 if s.precision == "bf16" else torch.float32)
    ceiling = max(2 * 2048 ** 3 / (timed(lambda: a @ a, (), s.device)) for _ in range(20))
    print(f"{s.method} {s.size}, batch {s.batch}, {s.device}, {s.precision}, {torch.get_num_threads()} threads: "
          f"{s.batch * steps / whole:.0f} images/s, {1000 * whole / steps:.1f} ms a step")
    for name, seconds in spent.most_common():
        print(f"    {name:40} {1000 * seconds / steps:8.2f} ms {100 * seconds / whole:5.1f}%")
    print(f"    texts take {100 * used / padded:.0f}% of the tokens they would take padded to {s.context}; {flops / 1e9:.1f} GFLOP a step, "
          f"{100 * flops * steps / whole / ceiling:.0f}% of this device's matrix products ({ceiling / 1e9:.0f} GFLOP/s measured)")
    if s.device.startswith("cuda"):
        print(f"    peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=train.SIZES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--anatomy", action="store_true")
    parser.add_argument("--method", default="dreamlip", choices=train.METHODS, help="for --anatomy")
    options = parser.parse_args()
    if options.anatomy:
        return anatomy(train.resolve(dict(size=options.size, method=options.method, batch=options.batch, precision=options.precision)))
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
