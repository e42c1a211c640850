"""The fused loss beside what it replaces: time ratios and peak extra memory, from one run.

    python csrc/benchmark.py                        # CPU: N = 4096 and 16384, D = 512, float32 and bfloat16
    python csrc/benchmark.py --n 2048 --repeats 5   # a minute
    python csrc/benchmark.py --device cuda          # GPU: N = 32768, and 262144 which eager cannot hold

Everything timed does one forward and backward pass of the symmetric contrastive loss. The ways take
turns, so that a machine shared with others disturbs them alike; a time is the median over the turns. `gemms`
is the floor: the four matrix products (L, L again, ∂I, ∂T) by torch.mm on stored matrices, nothing
else. Peak extra memory is the high-water mark of a pass above where the memory stood before it, less the
gradients that every way returns; on the CPU it is the process's own, each way in a fresh process. Where
Inf-CL's loss is installed (pip install inf-cl) it is timed beside them on the GPU; it wants a multiple of 256 for D.
"""
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from csrc import fused  # noqa: E402


def contrastive(way, image, text, scale):
    """-mean log softmax of the positives, both directions, from the two log-sum-exps, as in losses.py."""
    per_image, per_text = way(image, text, scale)
    positive = scale * (image * text).sum(-1)
    return (per_image - positive).mean() / 2 + (per_text - positive).mean() / 2


def eager(image, text, scale):
    """A matrix product in the embeddings' dtype and two float32 cross-entropies."""
    logits = (scale * (image @ text.mT)).float()
    labels = torch.arange(logits.shape[-1], device=image.device).expand(logits.shape[:-1])
    return sum(F.cross_entropy(x.flatten(0, -2), labels.flatten()) / 2 for x in (logits, logits.mT))


def inf_cl(image, text, scale):
    """The Triton loss of Inf-CL (arXiv 2410.17243; inf-cl 1.2.1) on one GPU; N = M only. It returns a loss for every
    row, goes one way at a time, and computes in float32 (TF32 products) whatever it is given."""
    from inf_cl import cal_flash_loss

    return sum(cal_flash_loss(*pair, scale=scale).mean() / 2 for pair in ((image, text), (text, image)))


WAYS = {
    "fused": lambda *x: contrastive(fused.similarity_logsumexp, *x),
    "chunked": lambda *x: contrastive(fused.chunked, *x),
    "eager": eager,
    "compiled": torch.compile(eager),
    "inf_cl": inf_cl,
}


def inputs(n, d, dtype, device, slots=None):
    torch.manual_seed(0)
    shapes = (n, d), (slots, n, d) if slots else (n, d)
    image, text = (F.normalize(torch.randn(shape), dim=-1).to(device, dtype) for shape in shapes)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(100.0, device=device, requires_grad=True)


def step(way, x):
    """One forward and backward pass."""
    return lambda: torch.autograd.grad(WAYS[way](*x), x)


def gemms(n, d, dtype, device):
    image, text, _ = (x.detach() for x in inputs(n, d, dtype, device))
    logits, out = torch.zeros(n, n, dtype=dtype, device=device), torch.empty_like(image)

    def run():
        torch.mm(image, text.T, out=logits)
        torch.mm(image, text.T, out=logits)
        torch.mm(logits, text, out=out)
        torch.mm(logits.T, image, out=out)

    return run


def times(runs, repeats, device):
    """Median seconds of each, taking turns after a warm-up each."""
    seconds = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def gradients(x):
    """MiB of the inputs, and so of their gradients."""
    return sum(t.nbytes for t in x) / 2**20


def resident(field):
    """VmRSS or VmHWM of this process, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def peak_memory(way, n, d, dtype, device):
    if device == "cuda":
        x = inputs(n, d, dtype, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(way, x)()
        return (torch.cuda.max_memory_allocated() - before) / 2**20 - gradients(x)
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, __file__, "--memory", way, "--n", str(n), "--d", str(d), "--dtype", name]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def measure_memory(way, n, d, dtype):
    """In a process of its own: the libraries warmed up on a small pass, the high-water mark reset, then the pass."""
    step(way, inputs(256, d, dtype, "cpu"))()
    x = inputs(n, d, dtype, "cpu")
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(way, x)()
    return resident("VmHWM") - before - gradients(x)


def report(title, seconds, memory, flops):
    heads = f"{'way':<10}{'ms':>10}{'TFLOP/s':>9}{'/ eager':>9}{'/ gemms':>9}{'extra MiB':>11}{'eager /':>9}"
    print(f"\n{title}\n  {heads}")
    for name, s in seconds.items():
        ratio = "".join(f"{s / seconds[base]:9.2f}" if base in seconds else " " * 9 for base in ("eager", "gemms"))
        extra = f"{memory[name]:11.0f}" if name in memory else ""
        extra += f"{memory['eager'] / memory[name]:9.1f}" if extra and "eager" in memory else ""
        print(f"  {name:<10}{s * 1e3:10.1f}{flops / s / 1e12:9.3f}{ratio}{extra}", flush=True)


def cpu(args):
    for n in args.n or [4096, 16384]:
        total = {}
        for dtype in (torch.float32, torch.bfloat16):
            x, ways = inputs(n, args.d, dtype, "cpu"), ("fused", "chunked", "eager")
            runs = {way: step(way, x) for way in ways} | {"gemms": gemms(n, args.d, dtype, "cpu")}
            seconds = times(runs, args.repeats, "cpu")
            del runs
            memory = {way: peak_memory(way, n, args.d, dtype, "cpu") for way in ways}
            report(f"N = M = {n}, D = {args.d}, {dtype}", seconds, memory, 8 * n * n * args.d)
            total[dtype] = seconds["fused"]
        print(f"  fused: float32 / bfloat16 = {total[torch.float32] / total[torch.bfloat16]:.2f}")
    n = (args.n or [4096])[0] // 4
    x = inputs(n, args.d, torch.float32, "cpu", slots=args.slots)
    seconds = times({way: step(way, x) for way in ("fused", "eager")}, args.repeats, "cpu")
    title = f"{args.slots} slots sharing the images, N = M = {n}, D = {args.d}, float32"
    report(title, seconds, {}, 8 * args.slots * n * n * args.d)


def cuda(args):
    dtype, square = torch.bfloat16, torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    ceiling = 2 * 8192**3 / times({"mm": lambda: square @ square}, 20, "cuda")["mm"] / 1e12
    print(f"{torch.cuda.get_device_name()}; a bfloat16 matrix product of 8192 reaches {ceiling:.0f} TFLOP/s")
    n = (args.n or [32768])[0]
    ways = ["fused", "eager", "compiled"]
    try:
        import inf_cl  # noqa: F401

        ways.append("inf_cl")
    except ImportError:
        print("inf_cl is not installed: not compared")
    x = inputs(n, args.d, dtype, "cuda")
    runs = {way: step(way, x) for way in ways} | {"gemms": gemms(n, args.d, dtype, "cuda")}
    seconds, flops = times(runs, args.repeats, "cuda"), 8 * n * n * args.d
    memory = {way: peak_memory(way, n, args.d, dtype, "cuda") for way in ways}
    report(f"N = M = {n}, D = {args.d}, {dtype}", seconds, memory, flops)
    print(f"  fused: {flops / seconds['fused'] / 1e12 / ceiling:.0%} of the measured ceiling")
    del x, runs
    n = 262144
    seconds = times({"fused": step("fused", inputs(n, args.d, dtype, "cuda"))}, 3, "cuda")
    memory = {"fused": peak_memory("fused", n, args.d, dtype, "cuda")}
    title = f"N = M = {n}, D = {args.d}, {dtype}: eager would need {4 * n * n / 2**30:.0f} GiB for the logits alone"
    report(title, seconds, memory, 8 * n * n * args.d)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--n", type=int, nargs="*")
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", choices=WAYS, help="only measure this way's memory, in this process")
    args = parser.parse_args()
    fused.set_mode("on")
    if args.memory:
        print(measure_memory(args.memory, args.n[0], args.d, getattr(torch, args.dtype)))
    elif args.device == "cuda":
        cuda(args)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}")
        cpu(args)
