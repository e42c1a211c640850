"""The fused loss beside what it replaces: time ratios from one run, and on a GPU the peak extra memory.

    python tests/benchmark_fused.py                        # CPU: N = 4096, D = 512, float32 and bfloat16
    python tests/benchmark_fused.py --n 2048 --repeats 5   # a minute
    python tests/benchmark_fused.py --device cuda --n 32768

Everything timed does one forward and backward pass of the symmetric contrastive loss. The ways take
turns, so that a machine shared with others disturbs them alike; a time is the best of the turns. `gemms`
is the ceiling: the four matrix products (L, L again, ∂I, ∂T), nothing else. Extra memory is the
high-water mark of a pass above where the memory stood before it, the gradients included.
"""
import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from csrc import fused  # noqa: E402

D = 512


def plain(image, text, scale):
    """A stored matrix in the embeddings' dtype, and its log-sum-exps in float32."""
    logits = (scale * (image @ text.mT)).float()
    return logits.logsumexp(-1), logits.logsumexp(-2)


def contrastive(log_sum_exps, image, text, scale):
    """Forward and backward pass of the symmetric loss from a way to the two log-sum-exps, as in losses.py."""
    per_image, per_text = log_sum_exps(image, text, scale)
    positive = scale * (image * text).sum(-1)
    loss = (per_image + per_text - 2 * positive).mean() / 2
    torch.autograd.grad(loss, (image, text, scale))


@torch.no_grad()
def gemms(image, text, scale):
    logits = image @ text.mT
    torch.mm(image, text.mT, out=logits)
    return logits @ text, logits.mT @ image


WAYS = {
    "fused": partial(contrastive, fused.similarity_logsumexp),
    "chunked": partial(contrastive, fused.chunked),
    "plain": partial(contrastive, plain),
    "gemms": gemms,
}


def best_times(inputs, repeats):
    """Seconds of each way, the best of the turns, of which the first one warms up."""
    best = dict.fromkeys(WAYS, math.inf)
    for _ in range(repeats + 1):
        for way, run in WAYS.items():
            start = timer()  # it waits until a GPU has done all that it was given to do
            run(*inputs)
            best[way] = min(best[way], timer() - start)
    return best


def extra_memory(run, inputs):
    """Bytes of a GPU's memory at the height of a pass above what stood there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*inputs)
    return torch.cuda.max_memory_allocated() - before


def report(n, dtype, device, repeats):
    scale = torch.tensor(100.0, device=device, requires_grad=True)
    image, text = F.normalize(torch.randn(2, n, D, device=device), dim=-1).to(dtype)
    inputs = image.requires_grad_(), text.requires_grad_(), scale
    seconds = best_times(inputs, repeats)
    print(f"\nN = M = {n}, D = {D}, {dtype}")
    for way, run in WAYS.items():
        line = f"{way:8}{seconds[way]:9.4f} s"
        for other in ("plain", "gemms"):
            line += f", {seconds[way] / seconds[other]:.2f} of {other}"
        if device == "cuda":
            line += f", {extra_memory(run, inputs):,} bytes"
        print(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    fused.mode = "on"
    for dtype in (torch.float32, torch.bfloat16):
        report(args.n, dtype, args.device, args.repeats)
