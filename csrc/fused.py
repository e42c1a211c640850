"""Row and column log-sum-exp of a similarity matrix that is never stored.

    per_image, per_text = similarity_logsumexp(image, text, logit_scale)

    per_image_i = log Σ_j exp(s·I_i·T_j)        per_text_j = log Σ_i exp(s·I_i·T_j)

A contrastive loss is these minus the positives' logits, which are O(N·D) to compute. Three ways to
the same numbers, from the plainest to the fastest:

    reference   the matrix, stored: two lines, any dtype, what the others are tested against
    chunked     PyTorch only, a block of rows at a time, computed again in the backward pass
    extension   similarity_logsumexp.cpp (CPU) and .cu (CUDA), whose heads explain the tiling

The extension is compiled at first use, not at import, and kept in PyTorch's extension cache under a hash
of everything that went into it (`python csrc/fused.py` compiles it ahead, with `--cuda` for a GPU, too).
Then it has to give the numbers of `reference` once, on the device at hand. `mode` chooses: "auto" falls
back to `chunked` with one loud line where either fails, "on" raises instead, "off" never builds.
"""
import fcntl
import hashlib
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

FOLDER = Path(__file__).parent

# Vectors as wide as the ones that PyTorch itself chose on this machine. -fopenmp only when compiling:
# linking it too could bring in a second OpenMP runtime beside PyTorch's.
VECTORS = {
    "AVX512": "-DCPU_CAPABILITY_AVX512 -DCPU_CAPABILITY=AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
    "AVX2": "-DCPU_CAPABILITY_AVX2 -DCPU_CAPABILITY=AVX2 -mavx2 -mfma -mf16c",
}
CUDA_FLAGS = "-O3 --threads=2"
CHUNK = 1 << 22  # logits that `chunked` has in memory at a time
# A matrix with more entries is not stored (with "on" none is): this saves memory, on CPUs also time. The similarities
# stay float32 (TF32 in bf16 runs), where the papers' code multiplies in half precision: at s = 100 the 8 bits of
# bfloat16 round a logit by up to 0.2, and the product is less than a hundredth of a step's work.
MAX_STORED = 1 << 22
mode = "auto"  # "auto", "on" or "off", as `--fused` takes it. A build that failed is not tried again


def similarity_logsumexp(image, text, logit_scale, rows=True, cols=True):
    """image [(G,) N, D], text [(G,) M, D], logit_scale [] -> per_image [(G,) N], per_text [(G,) M].

    Either side may lack G while the other has it: its block is then shared by all groups, not
    copied, and its gradient is the sum over them. An output not asked for (`rows`, `cols`) is None
    and costs nothing. float32 outputs and sums (float64 for float64), whatever the inputs, where the
    matrix is not stored.
    """
    if mode != "on" and groups(image, text) * image.shape[-2] * text.shape[-2] <= MAX_STORED:
        return reference(image, text, logit_scale, rows, cols)
    if image.dtype == torch.float64 or not _use_extension(image.device.type):
        return chunked(image, text, logit_scale, rows, cols)
    logit_scale = torch.as_tensor(logit_scale, dtype=torch.float32, device=image.device)
    per_image, per_text = torch.ops.similarity.logsumexp(image, text, logit_scale, rows, cols)
    return per_image if rows else None, per_text if cols else None


def groups(image, text):
    """G, or 1."""
    return torch.broadcast_shapes(image.shape[:-2], text.shape[:-2]).numel()


def reference(image, text, logit_scale, rows=True, cols=True):
    """The same from the stored matrix, in the inputs' own precision."""
    logits = logit_scale * (image @ text.mT)  # [(G,) N, M]
    return logits.logsumexp(-1) if rows else None, logits.logsumexp(-2) if cols else None


def chunked(image, text, logit_scale, rows=True, cols=True):
    """The same with PyTorch's own operations in O((N + M)·D) memory, on any device.

    The columns' log-sum-exp is that of the blocks' log-sum-exps: log Σ_i = log Σ_b exp(log Σ_{i in b}).
    """
    dtype = torch.promote_types(image.dtype, torch.float32)
    image = image.to(dtype)
    text = text.to(dtype)
    step = 1 + CHUNK // (1 + groups(image, text) * text.shape[-2])  # rows of a block
    parts = []
    for block in image.split(step, dim=-2):
        # Nothing but the block's outputs is kept; the backward pass computes its logits again.
        parts.append(checkpoint(reference, block, text, logit_scale, rows, cols, use_reentrant=False))
    per_image, per_text = zip(*parts)
    per_image = torch.cat(per_image, -1) if rows else None
    per_text = torch.stack(per_text).logsumexp(0) if cols else None
    return per_image, per_text


def _use_extension(device):
    if mode == "off":
        return False
    trouble = _trouble(device)
    if trouble and mode == "on":
        raise RuntimeError("--fused on, but " + trouble)
    return not trouble


@cache
def _trouble(device):
    """Why the extension cannot be used: the compiler's first complaint, or the exception. Says so once in mode auto."""
    try:
        _load()
        _try(device)
    except Exception as error:
        complaint = re.search(r"error: .*|nvcc fatal.*", str(error))
        reason = complaint.group() if complaint else repr(error)
        trouble = "the fused similarity op cannot be used here: " + reason
        if mode == "auto" and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"WARNING: {trouble}; using the slower chunked PyTorch path", flush=True)
        return trouble


@cache
def _load():
    """The extension, with its derivative."""
    torch.ops.load_library(build(cuda=torch.cuda.is_available()))

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.set_materialize_grads(False)  # an output that the loss does not use costs nothing

    def backward(ctx, d_per_image, d_per_text):
        gradients = torch.ops.similarity.logsumexp_backward(
            d_per_image, d_per_text, *ctx.saved_tensors, *ctx.needs_input_grad[:2])
        return *gradients, None, None

    torch.library.register_autograd("similarity::logsumexp", backward, setup_context=setup_context)


@torch.inference_mode(False)
@torch.enable_grad()
def _try(device):
    """Raises RuntimeError unless the extension gives `reference`'s gradients, which depend on its outputs, too: a
    processor or GPU that it does not suit shows here, and not in the losses of a run. Draws no random numbers."""
    wave = torch.arange(8 * 261, device=device).sin().view(261, 8)
    inputs = wave, wave[:131], wave[0, 1] * 3
    found = _gradients(torch.ops.similarity.logsumexp, inputs)
    wanted = _gradients(reference, [x.double() for x in inputs])
    for f, w in zip(found, wanted):
        if not (f - w).norm() < 0.03 * w.norm():  # TF32 is allowed, a NaN is not
            raise RuntimeError(f"it gives wrong numbers on {device}")


def _gradients(function, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = sum(output.square().mean() for output in function(*leaves))
    return torch.autograd.grad(loss, leaves)


def build(cuda):
    """Compiles what is not compiled yet, once however many processes ask; returns the library.

    The lock is the kernel's (flock), so it goes with its process: cpp_extension's own lock file, left
    behind by a killed build, would make every later build wait for ever.
    """
    from torch.utils import cpp_extension

    sources = sorted(FOLDER.glob("*.c*" if cuda else "*.cpp"))
    flags = "-O3 -fopenmp " + VECTORS.get(torch.backends.cpu.get_cpu_capability(), "")
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # read by cpp_extension
    ingredients = torch.__version__ + flags + CUDA_FLAGS + architectures
    for path in [*sources, *FOLDER.glob("*.h")]:
        ingredients += path.read_text()
    name = "similarity_" + hashlib.md5(ingredients.encode()).hexdigest()
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    done = folder / "done"  # a library alone may be half linked, where the building process was killed
    with open(folder / "flock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            (folder / "lock").unlink(missing_ok=True)
            print(f"building the fused similarity op, once, in {folder}", flush=True)
            cpp_extension.load(
                name, sources, [flags], [CUDA_FLAGS],
                extra_include_paths=_cuda_includes(cpp_extension) if cuda else [],
                build_directory=folder, is_python_module=False)
            done.touch()
    return folder / f"{name}.so"


def _cuda_includes(cpp_extension):
    """Points cpp_extension at the toolkit that nvcc really runs from (an nvcc on the PATH may be a
    wrapper script), and returns the include folders of the libraries the toolkit comes without.
    Raises RuntimeError where the toolkit is missing or does not go with PyTorch."""
    if not cpp_extension.CUDA_HOME:
        raise RuntimeError("no CUDA toolkit (nvcc) is on the PATH or in CUDA_HOME")
    nvcc = f"{cpp_extension.CUDA_HOME}/bin/nvcc"
    major = f"release {torch.version.cuda}".split(".")[0]
    if major not in subprocess.check_output([nvcc, "--version"], text=True):  # the two do not compile together
        raise RuntimeError(f"{nvcc} is of another CUDA than this PyTorch's {torch.version.cuda}: install a toolkit of "
                           "the same major version and set CUDA_HOME to its folder")
    dry = subprocess.check_output([nvcc, "--dryrun", "-x", "cu", "/dev/null"], stderr=subprocess.STDOUT, text=True)
    home = Path(re.search(r"TOP=(.*)", dry).group(1)).resolve()
    cpp_extension.CUDA_HOME = str(home)
    return list(map(str, Path(torch.__file__).parent.parent.glob("nvidia/*/include")))


if __name__ == "__main__":
    try:
        library = build("--cuda" in sys.argv)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    torch.ops.load_library(library)  # so all that it is linked to is there
    print(library)
