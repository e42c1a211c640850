"""Times our training step beside the usual one, in one run, alternating: DreamLIP with K sub-captions of real captions'
lengths.

    python tests/benchmark_step.py                                                   size tiny on the CPU
    python tests/benchmark_step.py --size base-16 --batch 512 --device cuda --compile
    python tests/benchmark_step.py --size base-16 --batch 512 --device cuda --drift 500

Rows:   ours       train.py's step: texts without padding, fused losses
        padded     ours, but every text padded to the context, attention and losses by stored matrices
        open_clip  the same architecture in open_clip (pip install open_clip_torch), under autocast too, its attention
                   by PyTorch's SDPA, K texts padded to the context, its loss slot by slot, as DreamLIP's release does
        compiled   ours block by block, as --compile does; open_clip as a whole, as its --torchcompile does
The grouping loss is left out of all, open_clip having none; "ours + grouping" shows what it costs. "losses" is our loss
alone, forward and backward. Where a real step's time goes, train.py --profile says.
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
from open_clip.loss import ClipLoss
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from csrc import fused  # noqa: E402
from data import normalize  # noqa: E402
from model import CLIP, config_from  # noqa: E402


def lengths(n: int, context: int, generator) -> torch.Tensor:
    """Tokens in n sentences of real long captions, both ends counted: log-normal, median 24, mean 26, 95th percentile
    46."""
    drawn = 24 * (0.395 * torch.randn(n, generator=generator)).exp()
    return drawn.round().long().clamp(4, context)


def batch_of(s, seed: int):
    """images uint8 [B,3,S,S], tokens [B,K,context] with the end-of-text token, the greatest id, behind the words, and
    the lengths [B,K], on the host, as the loader knows them."""
    g = torch.Generator().manual_seed(seed)
    texts = s.batch * s.sub_captions
    images = torch.randint(0, 256, (s.batch, 3, s.image_size, s.image_size), generator=g, dtype=torch.uint8)
    tokens, n = torch.randint(1, s.vocab - 2, (texts, s.context), generator=g), lengths(texts, s.context, g)
    place = torch.arange(s.context)
    tokens = torch.where(place < n[:, None] - 1, tokens, torch.where(place == n[:, None] - 1, s.vocab - 1, 0))
    return images.to(s.device), tokens.view(s.batch, s.sub_captions, -1).to(s.device), n.view(s.batch, -1)


def open_clip_model(s):
    vision = dict(image_size=s.image_size, patch_size=s.patch, width=s.vision_width, layers=s.vision_depth,
                  head_width=s.vision_width // s.vision_heads)
    text = dict(context_length=s.context, vocab_size=s.vocab, width=s.text_width, layers=s.text_depth,
                heads=s.text_heads)
    return open_clip.model.CLIP(s.embed, vision, text).to(s.device)


def our_step(s, **changes):
    """train.py's step under these settings -> function of a batch, and the model."""
    s = train.dataclasses.replace(s, **changes)
    state, network = train.prepare(CLIP(config_from(s)), s)

    def step(images, tokens, n):
        train.backward(network, images, tokens, s, more=(n, None))
        train.update(state, 1e-5, s)
    return step, state.model


def padded_step(step, model):
    def padded(*batch):
        with mock.patch.object(model, "layout", "padded"), sdpa_kernel(SDPBackend.MATH):
            fused.set_mode("off")
            step(*batch)
            fused.set_mode("auto")
    return padded


def their_step(s, model, network, autocast):
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), ClipLoss()

    def step(images, tokens, _):
        with autocast():
            features = network.encode_image(normalize(images), normalize=True)
            texts = network.encode_text(tokens.flatten(0, 1), normalize=True).unflatten(0, tokens.shape[:2])
            total = sum(loss(features, texts[:, k], model.logit_scale.exp()) for k in range(tokens.shape[1]))
        (total / tokens.shape[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)
    return step


def text_tower(model, autocast, layout):
    def step(images, tokens, n):
        with autocast(), mock.patch.object(model, "layout", layout):
            out = model.encode_texts(tokens.flatten(0, 1), False, n.flatten().numpy())[0]
        out.sum().backward()
        model.zero_grad(set_to_none=True)
    return step


def losses(s, model):
    def step(images, tokens, n):
        unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, device=s.device), dim=-1)  # noqa: E731
        out = dict(branches=unit(s.batch, 1, s.embed), summaries=unit(s.batch, s.sub_captions, 1, s.embed))
        out = {name: x.requires_grad_() for name, x in out.items()}
        train.method_loss({**out, "logit_scale": model.logit_scale.exp()}, s)[0].backward()
        model.zero_grad(set_to_none=True)
    return step


def timed(step, batch, device) -> tuple[float, float]:
    """-> seconds, and GiB taken beyond what was there before (on a GPU, else 0)."""
    before = memory = 0
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    step(*batch)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated()
    return time.perf_counter() - start, (memory - before) / 2 ** 30


def drift(s, step, steps):
    """Prints how the time of a step changes over many, each with a batch of its own."""
    took = [timed(step, batch_of(s, i), s.device)[0] for i in range(-10, steps)][10:]
    tenth = max(1, steps // 10)
    first, last = statistics.median(took[:tenth]), statistics.median(took[-tenth:])
    print(f"{steps} steps: {1000 * first:.1f} ms in the first tenth, {1000 * last:.1f} in the last ({last / first:.3f} "
          f"times as long); the longest {1000 * max(took):.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=train.SIZES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="add ours and open_clip compiled")
    parser.add_argument("--drift", type=int, default=0, metavar="STEPS", help="time so many steps of ours alone")
    options = parser.parse_args()
    s = train.resolve(dict(size=options.size, method="dreamlip", batch=options.batch, sub_captions=options.k,
                           raw_caption=False, stem="patch", pool="class", grouping="none", context=77, vocab=49408,
                           precision=options.precision, device=options.device))
    half = s.precision == "bf16"
    autocast = (lambda: torch.autocast(s.device.split(":")[0], torch.bfloat16)) if half else nullcontext
    torch.manual_seed(0)
    ours, model = our_step(s)
    if options.drift:
        return drift(s, ours, options.drift)
    theirs = open_clip_model(s)
    steps = {"ours": ours, "ours + grouping": our_step(s, grouping="sub-caption")[0],
             "padded": padded_step(ours, model), "open_clip": their_step(s, theirs, theirs, autocast)}
    if options.compile:
        copy = open_clip_model(s)
        steps |= {"ours, compiled": our_step(s, compile=True)[0],
                  "open_clip, compiled": their_step(s, copy, torch.compile(copy), autocast)}
    steps |= {"text tower": text_tower(model, autocast, model.layout),
              "text tower, padded": text_tower(model, autocast, "padded"), "losses": losses(s, model)}
    times, memory = {name: [] for name in steps}, dict.fromkeys(steps, 0.0)
    warm = 5 if options.compile else 2
    for turn in range(-warm, options.rounds):
        batch = batch_of(s, turn)
        for name, step in steps.items():
            seconds, extra = timed(step, batch, s.device)
            if turn >= 0:
                times[name].append(seconds)
                memory[name] = max(memory[name], extra)
    print(f"{s.size}, K = {options.k}, batch {s.batch}, {s.device}, {s.precision}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, texts {model.layout}; {batch[2].float().mean():.1f} of {s.context} tokens used")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        more = f"  {memory[name]:6.2f} GiB beside weights and moments" if memory[name] else ""
        print(f"{name:20} {1000 * middle:9.1f} ms  (from {1000 * min(seconds):.1f} to {1000 * max(seconds):.1f})  "
              f"{s.batch / middle:8.0f} images/s{more}")
    for slower, faster in (("text tower, padded", "text tower"), ("padded", "ours"), ("open_clip", "ours"),
                           ("open_clip", "ours + grouping"), ("open_clip, compiled", "ours, compiled")):
        if slower in times:  # turn by turn: noise hits both
            ratio = statistics.median(x / y for x, y in zip(times[slower], times[faster]))
            print(f"{slower} / {faster}: {ratio:.2f}")
    share = statistics.median(x / y for x, y in zip(times["losses"], times["ours"]))
    print(f"losses / ours: {100 * share:.1f}%")


if __name__ == "__main__":
    main()
