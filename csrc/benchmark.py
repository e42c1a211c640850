"""The fused loss beside what it replaces: time ratios and peak extra memory, from one run.

    python csrc/benchmark.py                        # CPU: N = 4096, D = 512, float32 and bfloat16
    python csrc/benchmark.py --n 2048 --repeats 5   # a minute
    python csrc/benchmark.py --device cuda --n 32768

Everything timed does one forward and backward pass of the symmetric contrastive loss. The ways take
turns, so that a machine shared with others disturbs them alike; a time is the best of the turns. `gemms`
is the ceiling: the four matrix products (L, L again, ∂I, ∂T), nothing else. Extra memory is the
high-water mark of a pass above where the memory stood before it, the gradients included; on the CPU
it is the process's own, each way in a fresh process.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from csrc import fused  # noqa: E402

WAYS = ["fused", "chunked", "plain", "gemms"]
D = 512


def contrastive(way, image, text, scale):
    """The symmetric loss from a way to the two log-sum-exps, as in losses.py."""
    per_image, per_text = way(image, text, scale)
    positive = scale * (image * text).sum(-1)
    return (per_image + per_text - 2 * positive).mean() / 2


def plain(image, text, scale):
    """A matrix product in the embeddings' dtype and two float32 cross-entropies."""
    logits = (scale * (image @ text.mT)).float()
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2


def embeddings(n, dtype, device):
    return F.normalize(torch.randn(n, D, device=device)).to(dtype).requires_grad_()


def make_pass(way, n, dtype, device):
    """A function that does one forward and backward pass."""
    image = embeddings(n, dtype, device)
    text = embeddings(n, dtype, device)
    scale = torch.tensor(100.0, device=device, requires_grad=True)
    inputs = image, text, scale

    @torch.no_grad()
    def gemms():
        logits = image @ text.mT
        torch.mm(image, text.mT, out=logits)
        return logits @ text, logits.mT @ image

    if way == "gemms":
        return gemms
    if way == "plain":
        return lambda: torch.autograd.grad(plain(*inputs), inputs)
    logsumexp = fused.chunked if way == "chunked" else fused.similarity_logsumexp
    return lambda: torch.autograd.grad(contrastive(logsumexp, *inputs), inputs)


def best_times(passes, repeats, device):
    """Seconds of each, the best of the turns after a first one to warm up."""
    best = {}
    for turn in range(repeats + 1):
        for way, run in passes.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn > 0:
                seconds = time.perf_counter() - start
                best[way] = min(seconds, best.get(way, seconds))
    return best


def peak_resident():
    """Bytes of memory that this process had at its height since the last clear_refs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def extra_memory(way, n, dtype, device):
    """Bytes at the height of a pass above what stood there before."""
    make_pass(way, 256, dtype, device)()  # the libraries' own
    run = make_pass(way, n, dtype, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the height is now where the memory stands
    before = peak_resident()
    run()
    return peak_resident() - before


def report(n, dtype, device, repeats):
    passes = {way: make_pass(way, n, dtype, device) for way in WAYS}
    seconds = best_times(passes, repeats, device)
    print(f"\nN = M = {n}, D = {D}, {dtype}")
    for way in WAYS:
        with torch.multiprocessing.get_context("spawn").Pool(1) as fresh_process:
            memory = fresh_process.apply(extra_memory, (way, n, dtype, device))
        print(f"{way:8}{seconds[way]:9.4f} s, {seconds[way] / seconds['plain']:.2f} of plain, "
              f"{seconds[way] / seconds['gemms']:.2f} of gemms, {memory:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    fused.set_mode("on")
    for dtype in (torch.float32, torch.bfloat16):
        report(args.n, dtype, args.device, args.repeats)
