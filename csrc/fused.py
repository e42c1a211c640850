"""Row and column log-sum-exp of a similarity matrix that is never stored.

    per_image, per_text = similarity_logsumexp(image, text, logit_scale)

    per_image_i = log Σ_j exp(s·I_i·T_j)        per_text_j = log Σ_i exp(s·I_i·T_j)

A contrastive loss is these minus the positives' logits, which are O(N·D) to compute. Three ways to
the same numbers, from the plainest to the fastest:

    reference   the matrix, stored: two lines, any dtype, what the others are tested against
    chunked     PyTorch only, a block of rows at a time, computed again in the backward pass
    extension   similarity_logsumexp.cpp (CPU) and .cu (CUDA), whose heads explain the tiling

The extension is compiled at first use (torch.utils.cpp_extension, ninja), not at import, and kept in
PyTorch's extension cache under a hash of everything that went into it. Then it has to give the numbers of
`reference` once, on the device at hand. `set_mode` chooses: "auto" falls back to `chunked` with one loud
line where either fails, "on" raises instead, "off" never builds.
"""
import functools
import hashlib
import os
import re
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
CPU_SOURCES = ["similarity_logsumexp.cpp"]
CUDA_SOURCES = ["similarity_logsumexp.cu"]
HEADERS = ["similarity_logsumexp.h"]

# Vectors as wide as the ones PyTorch itself chose on this machine. -fopenmp only when compiling:
# linking it too could bring in a second OpenMP runtime beside PyTorch's.
VECTORS = {
    "AVX512": "-DCPU_CAPABILITY_AVX512 -DCPU_CAPABILITY=AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
    "AVX2": "-DCPU_CAPABILITY_AVX2 -DCPU_CAPABILITY=AVX2 -mavx2 -mfma -mf16c",
}
CUDA_FLAGS = ("-O3 --threads=2 -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 "
              "-gencode=arch=compute_90,code=compute_90")

_mode = "auto"
_usable = {}  # device -> True, or why not; of those that have been tried


def similarity_logsumexp(image: Tensor, text: Tensor, logit_scale: Tensor | float, *, rows: bool = True,
                         cols: bool = True):
    """image [(G,) N, D], text [(G,) M, D], logit_scale [] -> per_image [(G,) N], per_text [(G,) M].

    Either side may lack G while the other has it: its block is then shared by all groups, not
    copied, and its gradient is the sum over them. An output not asked for (`rows`, `cols`) is None
    and costs nothing. float32 outputs (float64 for float64), whatever the inputs. Under autocast the
    embeddings are cast to its dtype; sums are float32.
    """
    device = image.device.type
    if torch.is_autocast_enabled(device) and image.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        image, text = image.to(dtype), text.to(dtype)
    if not isinstance(logit_scale, Tensor):
        logit_scale = torch.full((), logit_scale, dtype=torch.float32, device=image.device)
    if image.dtype != torch.float64 and device in ("cpu", "cuda") and _use_extension(device):
        per_image, per_text = torch.ops.similarity.logsumexp(image, text, logit_scale.float(), rows, cols)
        return per_image if rows else None, per_text if cols else None
    return chunked(image, text, logit_scale, rows=rows, cols=cols)


def reference(image: Tensor, text: Tensor, logit_scale: Tensor | float, *, rows: bool = True, cols: bool = True):
    """The same from the stored matrix, in the inputs' own precision."""
    logits = logit_scale * (image @ text.mT)  # [(G,) N, M]
    return logits.logsumexp(-1) if rows else None, logits.logsumexp(-2) if cols else None


def chunked(image: Tensor, text: Tensor, logit_scale: Tensor | float, *, rows: bool = True, cols: bool = True):
    """The same with PyTorch's own operations in O((N + M)·D) memory, on any device."""
    dims = image.dim(), text.dim()
    fit = set(dims) <= {2, 3} and image.shape[-1] == text.shape[-1] and image.dtype == text.dtype
    if not fit or dims == (3, 3) and len(image) != len(text):
        raise RuntimeError("similarity_logsumexp: image and text do not fit each other: image "
                           f"{list(image.shape)} {image.dtype}, text {list(text.shape)} {text.dtype}")
    logit_scale = torch.as_tensor(logit_scale, device=image.device)
    per_image, per_text = _Chunked.apply(image, text, logit_scale, rows, cols)
    return per_image if rows else None, per_text if cols else None


class _Chunked(torch.autograd.Function):
    ELEMENTS = 1 << 22  # of the logits at a time

    @staticmethod
    def blocks(image, text):
        """The groups' operands in the accumulating dtype, and the row ranges of a block."""
        dtype = torch.promote_types(image.dtype, torch.float32)
        images, texts = (x.to(dtype) if x.dim() == 3 else x.to(dtype)[None] for x in (image, text))
        groups = range(max(len(images), len(texts)) if min(len(images), len(texts)) else 0)
        step = max(1, _Chunked.ELEMENTS // max(1, text.shape[-2]))
        return images, texts, groups, [slice(i, i + step) for i in range(0, image.shape[-2], step)]

    @staticmethod
    def forward(ctx, image, text, logit_scale, rows, cols):
        images, texts, groups, blocks = _Chunked.blocks(image, text)
        grouped, dtype, scale = image.dim() == 3 or text.dim() == 3, images.dtype, logit_scale.to(images.dtype)
        per_image = images.new_empty(len(groups), images.shape[1] if rows else 0)
        per_text = images.new_full((len(groups), texts.shape[1] if cols else 0), -torch.inf)
        for g in groups:
            I, T = images[g % len(images)], texts[g % len(texts)]
            for b in blocks:
                logits = scale * (I[b] @ T.mT)
                if rows:
                    per_image[g, b] = logits.logsumexp(1)
                if cols:
                    per_text[g] = torch.logaddexp(per_text[g], logits.logsumexp(0))
        if not grouped:
            per_image, per_text = per_image[0], per_text[0]
        ctx.save_for_backward(image, text, logit_scale, per_image, per_text)
        ctx.rows, ctx.cols = rows, cols
        return per_image, per_text

    @staticmethod
    def backward(ctx, d_per_image, d_per_text):
        image, text, logit_scale, per_image, per_text = ctx.saved_tensors
        images, texts, groups, blocks = _Chunked.blocks(image, text)
        scale = logit_scale.to(images.dtype)
        d_images, d_texts, d_scale = torch.zeros_like(images), torch.zeros_like(texts), torch.zeros_like(scale)
        r, c, dr, dc = (x.reshape(len(groups), x.shape[-1]) for x in (per_image, per_text, d_per_image, d_per_text))
        for g in groups:
            I, T = images[g % len(images)], texts[g % len(texts)]
            for b in blocks:
                products = I[b] @ T.mT
                P = torch.zeros_like(products)
                if ctx.rows:
                    P += (scale * products - r[g, b, None]).exp() * dr[g, b, None]
                if ctx.cols:
                    P += (scale * products - c[g]).exp() * dc[g]
                d_scale += (P * products).sum()
                P *= scale
                d_images[g % len(images), b] += P @ T
                d_texts[g % len(texts)] += P.mT @ I[b]
        d_image, d_text = d_images.view_as(image).to(image.dtype), d_texts.view_as(text).to(text.dtype)
        return d_image, d_text, d_scale.to(logit_scale.dtype), None, None


def set_mode(mode: str) -> None:
    """"auto", "on" or "off", as `--fused` takes it. A build that failed is not tried again."""
    global _mode
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"--fused is auto, on or off, not {mode!r}")
    _mode = mode


def mode() -> str:
    return _mode


@torch.compiler.assume_constant_result
def _use_extension(device: str) -> bool:
    if _mode == "off":
        return False
    if device not in _usable:
        try:
            _load()
            _try(device)
            _usable[device] = True
        except Exception as error:
            _usable[device] = _reason(error)
            if _mode == "auto" and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"WARNING: the fused similarity op cannot be used here ({_usable[device]}); using the slower "
                      "chunked PyTorch path", flush=True)
    if _mode == "on" and _usable[device] is not True:
        raise RuntimeError(f"--fused on, but the fused similarity op cannot be used here: {_usable[device]}")
    return _usable[device] is True


@functools.cache
def _load() -> None:
    torch.ops.load_library(build(cuda=torch.cuda.is_available()))
    _register()


@torch.inference_mode(False)
@torch.enable_grad()
def _try(device: str) -> None:
    """Raises RuntimeError unless the extension gives `reference`'s numbers: a processor or GPU that it does not suit
    shows here, at the first call, and not in the losses of a run. Draws no random numbers."""
    tf32 = torch.backends.cuda.matmul.allow_tf32 and device.startswith("cuda")
    for dtype, tolerance in ((torch.float32, 1e-2 if tf32 else 1e-4), (torch.bfloat16, 3e-2)):
        x = [torch.arange(8 * n, device=device).sin().view(n, 8).to(dtype).requires_grad_() for n in (261, 131)]
        x.append(torch.tensor(3.0, device=device, requires_grad=True))
        exact = [t.detach().double().requires_grad_() for t in x]
        found, wanted = torch.ops.similarity.logsumexp(*x, True, True), reference(*exact)
        found, wanted = ([*out, *torch.autograd.grad(sum(o.square().mean() for o in out), leaves)]
                         for out, leaves in ((found, x), (wanted, exact)))
        if not all((f.double() - w).norm() < tolerance * w.norm() for f, w in zip(found, wanted)):  # a NaN neither
            raise RuntimeError(f"it gives wrong numbers for {dtype} on {device}")


def _reason(error: Exception) -> str:
    """The compiler's first complaint, or the exception's first line."""
    text = str(error) or repr(error)
    complaint = re.search(r"error: .*|nvcc fatal.*", text)
    return (complaint.group() if complaint else text.splitlines()[0])[:300]


def build(cuda: bool) -> Path:
    """Compiles what is not compiled yet, once however many processes ask; returns the library.

    The lock is the kernel's (flock), so it goes with its process: cpp_extension's own lock file, left
    behind by a killed build, would make every later build wait for ever.
    """
    import fcntl

    from torch.utils import cpp_extension

    sources = CPU_SOURCES + (CUDA_SOURCES if cuda else [])
    flags = "-O3 -fopenmp " + VECTORS.get(torch.backends.cpu.get_cpu_capability(), "")
    includes = _cuda_includes(cpp_extension) if cuda else []
    key = hashlib.sha256(repr((torch.__version__, torch.version.cuda, flags, CUDA_FLAGS, sources)).encode())
    for name in sources + HEADERS:
        key.update((FOLDER / name).read_bytes())
    name = f"similarity_{key.hexdigest()[:16]}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    done = folder / "done"
    with open(folder / "flock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            (folder / "lock").unlink(missing_ok=True)
            print(f"building the fused similarity op ({' and '.join(sources)}), once, in {folder}", flush=True)
            start = time.time()
            cpp_extension.load(
                name, [str(FOLDER / s) for s in sources], flags.split(), CUDA_FLAGS.split(),
                extra_include_paths=includes, build_directory=str(folder), with_cuda=cuda, is_python_module=False)
            done.touch()
            print(f"built the fused similarity op in {time.time() - start:.0f} s", flush=True)
    return folder / f"{name}.so"


def _cuda_includes(cpp_extension) -> list[str]:
    """Points cpp_extension at the toolkit that nvcc really runs from (an nvcc on the PATH may be a
    wrapper script), and returns the include folders of the libraries the toolkit comes without."""
    if cpp_extension.CUDA_HOME is None:
        raise RuntimeError("CUDA is available but nvcc is not: set CUDA_HOME to the CUDA toolkit")
    command = [f"{cpp_extension.CUDA_HOME}/bin/nvcc", "--dryrun", "-x", "cu", "/dev/null"]
    dry = subprocess.run(command, capture_output=True, text=True)
    home = Path(re.search(r"TOP=(.*)", dry.stderr).group(1)).resolve()
    cpp_extension.CUDA_HOME = str(home)
    if all((home / "include" / header).exists() for header in ("cublas_v2.h", "cusparse.h", "cusolverDn.h")):
        return []
    return [str(folder) for folder in Path(torch.__file__).parent.parent.glob("nvidia/*/include")]


def _register() -> None:
    """Shapes for torch.compile, and the derivative."""

    @torch.library.register_fake("similarity::logsumexp")
    def _(image, text, logit_scale, rows, cols):
        groups = image.shape[:-2] or text.shape[:-2]
        per_image = image.new_empty((*groups, image.shape[-2]) if rows else 0, dtype=torch.float32)
        return per_image, image.new_empty((*groups, text.shape[-2]) if cols else 0, dtype=torch.float32)

    @torch.library.register_fake("similarity::logsumexp_backward")
    def _(d_per_image, d_per_text, image, text, logit_scale, per_image, per_text, needs_image, needs_text):
        d_image = image.new_empty(image.shape if needs_image else 0)
        d_text = text.new_empty(text.shape if needs_text else 0)
        return d_image, d_text, torch.empty_like(logit_scale)

    def setup_context(ctx, inputs, output):
        image, text, logit_scale, ctx.rows, ctx.cols = inputs
        ctx.save_for_backward(image, text, logit_scale, *output)
        ctx.set_materialize_grads(False)

    def backward(ctx, d_per_image, d_per_text):
        needs_image, needs_text = ctx.needs_input_grad[:2]
        d_image, d_text, d_scale = torch.ops.similarity.logsumexp_backward(
            d_per_image if ctx.rows else None, d_per_text if ctx.cols else None, *ctx.saved_tensors,
            needs_image, needs_text)
        return d_image if needs_image else None, d_text if needs_text else None, d_scale, None, None

    torch.library.register_autograd("similarity::logsumexp", backward, setup_context=setup_context)


if __name__ == "__main__":
    import sys

    library = build(cuda="--cuda" in sys.argv)  # --cuda: compile the CUDA sources too, with or without a GPU
    torch.ops.load_library(library)  # so all that it is linked to is there
    print(library)
