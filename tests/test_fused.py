"""The fused similarity op: the extension, the chunked path and the stored matrix say the same."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from csrc import fused

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
paths = pytest.mark.parametrize("path", [fused.similarity_logsumexp, fused.chunked], ids=["extension", "chunked"])
SHAPES = [  # image, text
    ((1, 1), (1, 1)),
    ((257, 13), (2053, 13)),
    ((521, 1000), (67, 1000)),
    ((3, 37, 5), (3, 41, 5)),
    ((37, 5), (4, 41, 5)),
    ((4, 37, 5), (41, 5)),
]
SIDES = [(True, True), (True, False), (False, True)]  # rows, cols
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def extension():
    fused.mode = "on"
    yield
    fused.mode = "auto"


def embeddings(image, text, dtype=torch.float32, device="cpu"):
    """Unit-norm embeddings of these two shapes, and a scale of 100."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(image), dim=-1).to(device, dtype)
    text = F.normalize(torch.randn(text), dim=-1).to(device, dtype)
    scale = torch.tensor(100.0, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return [x.requires_grad_() for x in (image, text, scale)]


def incoming(output):
    """A gradient of both signs and unequal size."""
    return torch.linspace(-0.5, 1, output.numel(), device=output.device).to(output).view_as(output)


def results(path, x, rows=True, cols=True):
    """Outputs and gradients."""
    out = [o for o in path(*x, rows=rows, cols=cols) if o is not None]
    leaves = [t for t in x if t.requires_grad]
    gradients = torch.autograd.grad(out, leaves, [incoming(o) for o in out])
    return [*out, *gradients]


def exact(x, rows=True, cols=True):
    x = [t.detach().double().requires_grad_() for t in x]
    return results(fused.reference, x, rows, cols)


def assert_close(found, wanted, tolerance):
    for f, w in zip(found, wanted, strict=True):
        assert f.shape == w.shape
        assert (f - w).norm() < tolerance * w.norm().clamp(min=1e-6)


@devices
@pytest.mark.parametrize("image,text", SHAPES)
def test_any_shape_equals_the_stored_matrix(image, text, device, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 10_000)  # so that there are several blocks
    for dtype, tolerance in TOLERANCES.items():
        x = embeddings(image, text, dtype, device)
        wanted = exact(x)
        assert_close(results(fused.similarity_logsumexp, x), wanted, tolerance)
        assert_close(results(fused.chunked, x), wanted, tolerance)
        with torch.backends.mkldnn.flags(enabled=False):  # on a CPU without oneDNN's kernels
            assert_close(results(fused.similarity_logsumexp, x), wanted, tolerance)


@devices
@paths
@pytest.mark.parametrize("side", [0, 1])
def test_one_side_alone(side, path, device):
    x = embeddings((37, 5), (3, 41, 5), device=device)
    asked = {"rows": side == 0, "cols": side == 1}
    wanted = exact(x, **asked)
    assert_close(results(path, x, **asked), wanted, 1e-5)
    used = path(*x)[side]  # of both that are asked for
    assert_close(torch.autograd.grad(used, x, incoming(used)), wanted[1:], 1e-5)


@devices
def test_inputs_that_are_not_contiguous_and_one_that_is_frozen(device):
    image, text, scale = embeddings((24, 70), (60, 24), device=device)
    x = image.detach().T.requires_grad_(), text.detach()[::2], scale  # [70, 24], [30, 24]
    wanted = exact(x)
    del wanted[3]  # the frozen one's gradient
    assert_close(results(fused.similarity_logsumexp, x), wanted, 1e-5)


@devices
@paths
def test_rows_whose_best_logit_is_far_from_zero_stay_finite(path, device):
    torch.manual_seed(0)
    text = F.normalize(torch.rand(300, 8) + 0.5, dim=-1)
    image = torch.tensor([[-0.7], [10], [-10], [0]]) * text[0]  # the best logits: near -50, 1000, -700, 0
    x = [t.to(device).requires_grad_() for t in (image, text, torch.tensor(100.0))]
    assert_close(results(path, x), exact(x), 1e-4)  # which an infinity or a NaN is not


def assert_nan_shows(compute, *options):
    x = embeddings((70, 16), (90, 16), *options)
    with torch.no_grad():
        x[0][5, 3] = torch.nan
    per_image, per_text, d_image, d_text, d_scale = compute(x)
    assert per_image.isnan().nonzero().flatten().tolist() == [5]
    for wrong in (per_text, d_image[5], d_text, d_scale):
        assert wrong.isnan().all()


@devices
@paths
@dtypes
def test_a_nan_is_never_silent(dtype, path, device):
    assert_nan_shows(lambda x: results(path, x), dtype, device)


@dtypes
def test_same_bits_again_and_for_any_number_of_threads(dtype):
    x = embeddings((700, 64), (2, 2500, 64), dtype)
    wanted = results(fused.similarity_logsumexp, x)
    for threads in (2, 3, 5, 1):  # back to one at the end, as conftest.py wants it
        torch.set_num_threads(threads)
        assert all(map(torch.equal, results(fused.similarity_logsumexp, x), wanted))


def test_chunked_stores_no_more_than_a_block_of_logits(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 1000)
    image, text, scale = embeddings((300, 8), (50, 8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        fused.chunked(image, text, scale)
    assert 0 < max(saved) <= image.numel()  # of 15000 logits


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(RuntimeError, match=r"\[2, 4, 3\].*\[3, 5, 3\]"):
        fused.similarity_logsumexp(torch.ones(2, 4, 3), torch.ones(3, 5, 3), 1.0)


# ---- the CUDA sources on a CPU ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA op on the CPU (tests/cuda_on_cpu.h), with tiles so small that little data takes several each way."""
    from torch.utils import cpp_extension

    source = (fused.FOLDER / "similarity_logsumexp.cu").read_text()
    changes = [
        (r"#include <(ATen|c10)/cuda/.*\n", ""),
        (r"(\w+(?:<T>)?)<<<(.+?), 0, stream>>>\(", r"launch(\2, \1, "),
        ("ROWS = 4096, COLS = 2048", "ROWS = 256, COLS = 384"),
        (r"TORCH_LIBRARY_IMPL\(similarity, CUDA", "TORCH_LIBRARY(emulated"),
        (r"m\.impl", "m.def"),
    ]
    for pattern, by in changes:
        source, found = re.subn(pattern, by, source)
        assert found, pattern
    folder = tmp_path_factory.mktemp("emulated")
    path = folder / "emulated.cpp"
    path.write_text('#include "cuda_on_cpu.h"\n' + source)
    cpp_extension.load("emulated", [path], ["-O1"], build_directory=folder, is_python_module=False,
                       extra_include_paths=[str(fused.FOLDER), str(ROOT / "tests")])

    def both(x, rows=True, cols=True):
        """-> outputs and gradients, as `results` gives them."""
        x = [t.detach() for t in x]
        out = torch.ops.emulated.logsumexp(*x, rows, cols)
        gradients = [incoming(o) if len(o) else None for o in out]
        backward = torch.ops.emulated.logsumexp_backward(*gradients, *x, *out, True, True)
        return [o for o in out if len(o)] + list(backward)
    return both


@pytest.mark.parametrize("image,text,dtype", [
    ((1, 1), (1, 1), torch.float32),
    ((600, 9), (900, 9), torch.bfloat16),
    ((3, 300, 5), (3, 41, 5), torch.float32),
    ((2, 300, 5), (400, 5), torch.float16),
    ((37, 5), (3, 41, 5), torch.float32),
])
def test_the_cuda_sources_compute_the_same_when_threads_of_a_cpu_run_them(image, text, dtype, emulated):
    x = embeddings(image, text, dtype)
    for sides in SIDES:
        assert_close(emulated(x, *sides), exact(x, *sides), TOLERANCES[dtype])


def test_a_nan_is_not_silent_in_the_cuda_sources(emulated):
    assert_nan_shows(emulated)


# ---- building --------------------------------------------------------------------------------------------------------

CALL = "fused.similarity_logsumexp(torch.ones(1, 1), torch.ones(1, 1), 3.0)[0]"
ANSWER = "tensor([3.])"


def start(*words):
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def python(code):
    return start("-c", "import torch; from csrc import fused\n" + code)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The folder in which the processes that a test starts build extensions: nothing is built yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def test_processes_starting_together_build_once_past_a_dead_build(empty_cache):
    """Each finds the extension; one line says that it was built. Neither a lock file nor half a library that a killed
    build left is an obstacle."""
    killed = "from unittest import mock\nwith mock.patch('torch.utils.cpp_extension.load'): fused.build(False)"
    python(killed).communicate()
    done = next(empty_cache.glob("*/done"))
    done.with_name(f"{done.parent.name}.so").write_bytes(b"half")
    done.rename(done.with_name("lock"))
    processes = [python(f"fused.mode = 'on'\nprint({CALL})") for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert all(o.endswith(ANSWER + "\n") for o in outputs), outputs
    assert "".join(outputs).count("building the fused similarity op") == 1


def test_without_a_compiler_auto_says_so_once_and_off_is_silent(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    auto = python(f"fused.MAX_STORED = 0; print({CALL}, {CALL})")
    off = python(f"fused.mode, fused.MAX_STORED = 'off', 0; print({CALL})")
    out = auto.communicate()[0]
    assert out.endswith(f"{ANSWER} {ANSWER}\n")
    assert out.count("WARNING: the fused similarity op cannot be used here") == 1
    assert off.communicate()[0] == ANSWER + "\n"  # a build would say that it begins


def test_an_extension_that_gives_other_numbers_is_not_used(monkeypatch):
    x = embeddings((3, 4), (5, 4))
    monkeypatch.setattr(fused, "_trouble", fused._trouble.__wrapped__)
    plain = fused.reference
    monkeypatch.setattr(fused, "reference", lambda *x: [1.1 * o for o in plain(*x)])
    with pytest.raises(RuntimeError, match="--fused on, but .*it gives wrong numbers on cpu"):
        fused.similarity_logsumexp(*x)


def test_a_toolkit_of_another_cuda_than_pytorchs_is_named_before_it_compiles(empty_cache, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(empty_cache))
    nvcc = empty_cache / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 7.5, V7.5.1")
    nvcc.chmod(0o755)
    process = start("csrc/fused.py", "--cuda")
    out = process.communicate()[0]
    assert process.returncode == 1
    assert re.search(r"^error: .*/bin/nvcc is of another CUDA than this PyTorch's ", out, re.M)


def test_cuda_sources_compile_and_link_for_sm80_sm90_and_later():
    needed = f"release {torch.version.cuda}".split(".")[0]
    if needed not in subprocess.getoutput("nvcc --version"):
        pytest.skip("no nvcc of the CUDA version that this PyTorch is for")
    out = start("csrc/fused.py", "--cuda").communicate()[0]
    library = Path(out.split()[-1]).read_bytes()
    assert b"sm_80" in library
    assert b"sm_90" in library
