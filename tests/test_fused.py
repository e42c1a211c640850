"""The fused similarity op: the extension, the chunked path and the stored matrix say the same."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from csrc import fused  # noqa: E402
from losses import grouping_loss, multi_positive_loss, multi_to_multi_loss  # noqa: E402

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
devices = pytest.mark.parametrize("device", ["cpu", GPU])
paths = pytest.mark.parametrize("path", [fused.similarity_logsumexp, fused.chunked], ids=["extension", "chunked"])
SHAPES = [  # image, text
    ((1, 1), (1, 1)), ((1, 3), (131, 3)), ((131, 3), (1, 3)), ((7, 1), (11, 1)), ((257, 13), (2053, 13)),
    ((521, 1000), (67, 1000)), ((256, 512), (64, 512)), ((3, 37, 5), (3, 41, 5)), ((37, 5), (4, 41, 5)),
    ((4, 37, 5), (41, 5)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def extension():
    fused.set_mode("on")
    yield
    fused.set_mode("auto")


def embeddings(image, text, dtype=torch.float32, device="cpu", scale=100.0):
    torch.manual_seed(0)
    I, T = (F.normalize(torch.randn(shape), dim=-1).to(device, dtype) for shape in (image, text))
    return I.requires_grad_(), T.requires_grad_(), torch.tensor(scale, device=device, requires_grad=True)


def results(path, x, rows=True, cols=True):
    """Outputs and gradients, for incoming gradients of both signs and unequal size."""
    out = [o for o in path(*x, rows=rows, cols=cols) if o is not None]
    gradient = [torch.linspace(-0.5, 1, o.numel(), dtype=o.dtype, device=o.device).view_as(o) for o in out]
    return out + list(torch.autograd.grad(out, x, gradient))


def exact(x, rows=True, cols=True):
    return results(fused.reference, [t.detach().double().requires_grad_() for t in x], rows, cols)


def assert_close(found, wanted, tolerance):
    for i, (f, w) in enumerate(zip(found, wanted, strict=True)):
        assert f.shape == w.shape
        error = (f.double() - w.double()).norm() / w.double().norm().clamp(min=1e-6)
        assert error < tolerance, f"result {i}: relative error {error:.1e}"


@devices
@paths
@pytest.mark.parametrize("image,text", SHAPES)
def test_any_shape_equals_the_stored_matrix(image, text, path, device):
    x = embeddings(image, text, device=device, scale=10.0)
    assert_close(results(path, x), exact(x), 1e-5)


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("image,text", SHAPES)
def test_any_shape_in_low_precision(image, text, dtype, device):
    x = embeddings(image, text, dtype, device, scale=10.0)
    assert_close(results(fused.similarity_logsumexp, x), exact(x), 1e-2)


@devices
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_accuracy_of_outputs_and_every_gradient_at_scale_100(dtype, tolerance, device):
    """Matched pairs as a trained model has them, so the softmax is far from uniform."""
    image, text, scale = embeddings((1100, 512), (1100, 512), device=device)
    text = F.normalize(image + 1.5 * text, dim=-1)
    x = [t.detach().to(dtype).requires_grad_() for t in (image, text)] + [scale]
    assert_close(results(fused.similarity_logsumexp, x), exact(x), tolerance)


@devices
@paths
@pytest.mark.parametrize("rows,cols", [(True, False), (False, True)])
def test_one_side_alone(rows, cols, path, device):
    x = embeddings((37, 5), (3, 41, 5), device=device)
    assert path(*x, rows=rows, cols=cols)[rows] is None
    assert_close(results(path, x, rows, cols), exact(x, rows, cols), 1e-5)


def test_gradient_when_the_loss_uses_one_of_two_outputs():
    x = embeddings((37, 5), (41, 5))
    for side in (0, 1):
        found = torch.autograd.grad(fused.similarity_logsumexp(*x)[side].sum(), x)
        assert_close(found, torch.autograd.grad(fused.reference(*x)[side].sum(), x), 1e-5)


def test_frozen_tower_gets_no_gradient_and_the_other_the_same():
    image, text, scale = embeddings((37, 5), (41, 5))
    wanted = results(fused.similarity_logsumexp, (image, text, scale))
    for frozen in (0, 1):
        x = [image, text, scale]
        x[frozen] = x[frozen].detach()
        per_image, per_text = fused.similarity_logsumexp(*x)
        (per_image @ torch.linspace(-0.5, 1, 37) + per_text @ torch.linspace(-0.5, 1, 41)).backward()
        assert x[frozen].grad is None
        assert torch.equal(x[1 - frozen].grad, wanted[3 - frozen])
        x[1 - frozen].grad = None


@devices
def test_inputs_that_are_not_contiguous(device):
    image, text, scale = embeddings((24, 70), (60, 24), device=device)
    x = image.detach().T.requires_grad_(), text.detach()[::2].requires_grad_(), scale  # [70, 24], [30, 24]
    assert_close(results(fused.similarity_logsumexp, x), exact(x), 1e-5)


@devices
@paths
@pytest.mark.parametrize("image,text", [
    ((0, 5), (3, 5)), ((3, 5), (0, 5)), ((0, 5), (0, 5)), ((2, 0, 5), (3, 5)), ((0, 2, 5), (3, 5))])
def test_empty_sums_are_minus_infinity_as_in_torch(image, text, path, device):
    x = embeddings(image, text, device=device)
    out, wanted = path(*x), fused.reference(*x)
    assert all(torch.equal(o, w) for o, w in zip(out, wanted))
    gradients = torch.autograd.grad(out, x, [torch.zeros_like(o) for o in out])
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, x))


@devices
@paths
def test_rows_whose_best_logit_is_far_from_zero_stay_finite(path, device):
    torch.manual_seed(0)
    text = F.normalize(torch.rand(300, 8) + 0.5, dim=-1)
    image = torch.stack([-text[0] * 0.7, text[0] * 10, -text[0] * 10, text[0] * 0])  # best: near -50, 1000, -700, 0
    x = [t.to(device).requires_grad_() for t in (image, text, torch.tensor(100.0))]
    found = results(path, x)
    assert found[0][0] < -40 and found[0][1] > 900 and found[0][2] < -600 and all(f.isfinite().all() for f in found)
    assert_close(found, exact(x), 1e-4)


@devices
@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_is_never_silent(dtype, path, device):
    x = embeddings((70, 16), (90, 16), dtype, device)
    with torch.no_grad():
        x[0][5, 3] = torch.nan
    per_image, per_text, d_image, d_text, d_scale = results(path, x)
    assert per_image.isnan().nonzero().flatten().tolist() == [5]
    assert per_text.isnan().all() and d_image[5].isnan().all() and d_text.isnan().all() and d_scale.isnan()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_cpu_without_onednn_kernels_computes_the_same(dtype, tolerance):
    x = embeddings((300, 33), (2, 131, 33), dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_close(results(fused.similarity_logsumexp, x), exact(x), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_again_and_for_any_number_of_threads(dtype):
    x = embeddings((700, 64), (2, 2500, 64), dtype)
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 1, 2, 3, 5):
            torch.set_num_threads(n)
            runs.append(results(fused.similarity_logsumexp, x))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("image,text", [((4, 3), (5, 3)), ((4, 3), (2, 5, 3)), ((2, 4, 3), (5, 3))])
@pytest.mark.parametrize("rows,cols", [(True, True), (True, False), (False, True)])
def test_gradcheck_in_float64(image, text, rows, cols):
    x = [t.detach().double().requires_grad_() for t in embeddings(image, text, scale=5.0)]

    def outputs(*x):
        return [o for o in fused.similarity_logsumexp(*x, rows=rows, cols=cols) if o is not None]

    assert torch.autograd.gradcheck(outputs, x)


@devices
@pytest.mark.parametrize("image,text", [((7, 5), (9, 5)), ((7, 5), (3, 9, 5))])
@pytest.mark.parametrize("rows,cols", [(True, True), (True, False), (False, True)])
def test_opcheck(image, text, rows, cols, device):
    x = embeddings(image, text, device=device)
    out = fused.similarity_logsumexp(*x, rows=rows, cols=cols)
    out = [o.detach() if o is not None else torch.empty(0, device=device) for o in out]
    torch.library.opcheck(torch.ops.similarity.logsumexp.default, (*x, rows, cols))
    gradients = [o if used else None for o, used in zip(out, (rows, cols))]
    detached = [t.detach() for t in x]
    arguments = (*gradients, *detached, *out, True, cols)
    torch.library.opcheck(torch.ops.similarity.logsumexp_backward.default, arguments)


@devices
def test_compiles_into_one_graph_under_autocast_too(device):
    x = embeddings((37, 6), (3, 41, 6), device=device)
    loss = lambda *x: sum(o.square().mean() for o in fused.similarity_logsumexp(*x))  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True)
    assert_close(torch.autograd.grad(compiled(*x), x), torch.autograd.grad(loss(*x), x), 1e-6)
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")  # no code is generated: quicker
    with torch.autocast(device, torch.bfloat16):
        assert_close(torch.autograd.grad(traced(*x), x), torch.autograd.grad(loss(*x), x), 1e-6)


@devices
@paths
def test_autocast_rounds_the_embeddings_and_nothing_else(path, device):
    x = embeddings((37, 6), (41, 6), device=device)
    rounded = [t.detach().bfloat16().requires_grad_() for t in x[:2]] + [x[2]]
    with torch.autocast(device, torch.bfloat16):
        found = results(fused.similarity_logsumexp, x)
    assert {f.dtype for f in found} == {torch.float32}
    assert_close(found, results(path, rounded), 1e-2)
    assert_close(found[:2], exact(rounded)[:2], 1e-5)


def test_number_for_a_scale():
    image, text, _ = embeddings((5, 3), (4, 3))
    by_number, by_tensor = (fused.similarity_logsumexp(image, text, s)[0] for s in (7.0, torch.tensor(7.0)))
    assert torch.equal(by_number, by_tensor)


@paths
@pytest.mark.parametrize("image,text,named", [
    ((4, 3), (5, 2), r"\[4, 3\].*\[5, 2\]"), ((2, 4, 3), (3, 5, 3), r"\[2, 4, 3\].*\[3, 5, 3\]"),
    ((3,), (5, 3), r"\[3\].*\[5, 3\]")])
def test_shapes_that_do_not_fit_are_both_named(image, text, named, path):
    with pytest.raises(RuntimeError, match=named):
        path(torch.randn(image), torch.randn(text), 1.0)


@paths
def test_dtypes_that_do_not_fit_are_both_named(path):
    with pytest.raises(RuntimeError, match="(?i)float.*bfloat16"):
        path(torch.randn(4, 3), torch.randn(5, 3).bfloat16(), 1.0)


def test_a_scale_that_is_no_number_is_named():
    with pytest.raises(RuntimeError, match=r"logit_scale.*\[2\]"):
        fused.similarity_logsumexp(torch.randn(4, 3), torch.randn(5, 3), torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_devices_that_do_not_fit_are_both_named():
    with pytest.raises(RuntimeError, match=r"cuda.*cpu"):
        fused.similarity_logsumexp(torch.randn(4, 3, device="cuda"), torch.randn(5, 3), 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_tiles_streams_and_graphs():
    """More than one tile each way, on a side stream, captured: a hidden synchronisation would fail the capture."""
    x = embeddings((4500, 64), (2300, 64), torch.bfloat16, "cuda")
    wanted = exact(x)
    results(fused.similarity_logsumexp, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(fused.similarity_logsumexp, x)
    graph.replay()
    torch.cuda.synchronize()
    assert_close(found, wanted, 1e-2)


# ---- the CUDA sources on a CPU ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA op on the CPU (tests/cuda_on_cpu.h), with tiles so small that little data takes several each way."""
    from torch.utils import cpp_extension

    source = (fused.FOLDER / fused.CUDA_SOURCES[0]).read_text()
    for pattern, by, times in (
            (r"#include <(ATen|c10)/cuda/.*\n", "", 4),
            (r"(\w+(?:<T>)?)<<<(.+?), 0, stream>>>\(", r"launch(\2, \1, ", 4),
            ("ROWS = 4096, COLS = 2048", "ROWS = 256, COLS = 384", 1),
            (r"TORCH_LIBRARY_IMPL\(similarity, CUDA", "TORCH_LIBRARY(emulated", 1), (r"m\.impl", "m.def", 2)):
        source, found = re.subn(pattern, by, source)
        assert found == times, pattern
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "emulated.cpp").write_text('#include "cuda_on_cpu.h"\n' + source)
    cpp_extension.load("emulated", [str(folder / "emulated.cpp")], ["-O1"], build_directory=str(folder),
                       extra_include_paths=[str(fused.FOLDER), str(ROOT / "tests")], is_python_module=False)

    def both(x, rows, cols):
        """-> outputs and gradients, as `results` gives them."""
        x = [t.detach() for t in x]
        out = torch.ops.emulated.logsumexp(*x, rows, cols)
        gradients = [torch.linspace(-0.5, 1, o.numel()).view_as(o) if used else None
                     for o, used in zip(out, (rows, cols))]
        backward = torch.ops.emulated.logsumexp_backward(*gradients, *x, *out, True, True)
        return [o for o, used in zip(out, (rows, cols)) if used] + list(backward)
    return both


@pytest.mark.parametrize("image,text,dtype,rows,cols", [
    ((1, 1), (1, 1), torch.float32, True, True), ((131, 3), (7, 3), torch.float16, True, True),
    ((600, 9), (900, 9), torch.bfloat16, True, True), ((3, 300, 5), (3, 41, 5), torch.float32, True, True),
    ((300, 5), (3, 500, 5), torch.float32, True, True), ((2, 300, 5), (400, 5), torch.float16, True, True),
    ((37, 5), (41, 5), torch.float32, True, False), ((37, 5), (41, 5), torch.float32, False, True)])
def test_the_cuda_sources_compute_the_same_when_threads_of_a_cpu_run_them(image, text, dtype, rows, cols, emulated):
    x = embeddings(image, text, dtype, scale=10.0)
    assert_close(emulated(x, rows, cols), exact(x, rows, cols), 1e-5 if dtype == torch.float32 else 1e-2)


def test_a_nan_is_not_silent_in_the_cuda_sources(emulated):
    x = embeddings((70, 6), (90, 6))
    with torch.no_grad():
        x[0][5, 3] = torch.nan
    per_image, per_text, d_image, d_text, d_scale = emulated(x, True, True)
    assert per_image.isnan().nonzero().flatten().tolist() == [5]
    assert per_text.isnan().all() and d_image[5].isnan().all() and d_text.isnan().all() and d_scale.isnan()


# ---- building --------------------------------------------------------------------------------------------------------

CALL = "fused.similarity_logsumexp(torch.ones(1, 1), torch.ones(1, 1), 3.0)[0].item()"


def python(code, **environment):
    command = [sys.executable, "-c", "import torch; from csrc import fused\n" + code]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def test_processes_starting_together_build_once_past_a_dead_build(tmp_path):
    """Each finds the extension; one line says that it was built. A lock file that a killed build left is no obstacle.
    The first call may be one that torch.compile traces."""
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    name = python("from unittest import mock\nwith mock.patch('torch.utils.cpp_extension.load'): "
                  "print(fused.build(cuda=False).parent)", **environment).communicate()[0].split()[-1]
    (Path(name) / "done").unlink()
    (Path(name) / "lock").touch()
    calls = [f"fused.set_mode('on')\nprint({call})" for call in (
        CALL, CALL, f"torch.compile(lambda: {CALL[:-7]}, backend='eager', fullgraph=True)().item()")]
    outputs = [p.communicate(timeout=300)[0] for p in [python(call, **environment) for call in calls]]
    assert all(o.split()[-1] == "3.0" for o in outputs), outputs
    assert "".join(outputs).count("built the fused similarity op") == 1


def test_without_a_compiler_auto_says_so_once_and_on_raises(tmp_path):
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/nowhere/c++"}
    auto, on = python(f"print({CALL}, {CALL})", **environment), python(f"fused.set_mode('on'); {CALL}", **environment)
    out = auto.communicate()[0]
    assert out.split()[-2:] == ["3.0", "3.0"]
    assert out.count("WARNING: the fused similarity op cannot be used here") == 1
    assert "RuntimeError: --fused on, but the fused similarity op cannot be used here" in on.communicate()[0]


def test_an_extension_that_gives_other_numbers_than_the_stored_matrix_is_not_used(monkeypatch, capsys):
    """So it is, too, where a GPU refuses the kernels: the first call fails, and the run goes on."""
    x, reference = embeddings((3, 4), (5, 4)), fused.reference
    monkeypatch.setattr(fused, "_usable", {})
    monkeypatch.setattr(fused, "reference", lambda *x: [1.1 * o for o in reference(*x)])
    with pytest.raises(RuntimeError, match="--fused on, but .*: it gives wrong numbers for torch.float32 on cpu"):
        fused.similarity_logsumexp(*x)
    monkeypatch.setattr(fused, "_usable", {})
    fused.set_mode("auto")
    wanted = fused.chunked(*x)
    for _ in range(2):
        assert all(map(torch.equal, fused.similarity_logsumexp(*x), wanted))
    assert capsys.readouterr().out.count("WARNING: the fused similarity op cannot be used here (it gives wrong") == 1


def test_off_builds_nothing(tmp_path):
    out = python(f"fused.set_mode('off'); print({CALL})", TORCH_EXTENSIONS_DIR=str(tmp_path)).communicate()[0]
    assert out.split()[-1] == "3.0" and not any(tmp_path.iterdir())


@pytest.mark.skipif(not (shutil.which("nvcc") and torch.version.cuda), reason="no nvcc, or a PyTorch without CUDA")
def test_cuda_sources_compile_and_link_for_sm80_sm90_and_later():
    command = [sys.executable, "csrc/fused.py", "--cuda"]
    code = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert code.returncode == 0, code.stdout + code.stderr
    library = Path(code.stdout.split()[-1]).read_bytes()
    for target in (b"sm_80", b"sm_90"):
        assert target in library


# ---- two processes, each with its rows and columns -------------------------------------------------------------------

LOSSES = {
    "multi-positive": lambda i, p, t, s: multi_positive_loss(i, t, s),
    "many-to-many, free": lambda i, p, t, s: multi_to_multi_loss(p[:, :2], t, s),
    **{f"grouping, {n}": lambda i, p, t, s, n=n: grouping_loss(p, t, s, negatives=n)
       for n in ("image", "batch", "slot")},
}


def global_batch(dtype):
    return [embeddings(shape, shape, scale=20.0)[0].detach().to(dtype) for shape in ((8, 24), (8, 9, 24), (8, 3, 24))]


def loss_and_gradients(loss, batch):
    leaves = [x.clone().requires_grad_() for x in (*batch, torch.tensor(20.0, dtype=batch[0].dtype))]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)]


def one_rank(rank, folder):
    torch.set_num_threads(1)
    fused.set_mode("on")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = [x[4 * rank:4 * rank + 4] for x in global_batch(torch.float32)]
    with torch.profiler.profile() as profile:
        found = {name: loss_and_gradients(loss, part) for name, loss in LOSSES.items()}
    calls = sum(e.count for e in profile.key_averages() if e.key == "similarity::logsumexp")
    torch.save((calls, found), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_driving_the_extension_equal_one_with_stored_matrices(tmp_path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    (calls, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert calls >= 2 * len(LOSSES) - 1  # rows and columns apart, but for the one loss that needs no other rank
    fused.set_mode("off")  # small float64 matrices are stored
    for name, loss in LOSSES.items():
        value, *grads, scale = loss_and_gradients(loss, global_batch(torch.float64))
        means = [(first[name][i] + second[name][i]) / 2 for i in (0, -1)]
        assert_close(means, [value, scale], 1e-5)
        assert_close([torch.cat(parts) / 2 for parts in zip(first[name][1:-1], second[name][1:-1])], grads, 1e-5)
