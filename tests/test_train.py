"""Every method trains, in one process, in two and in parts; a mistake ends in one sentence."""
import json
import math
import re
import runpy
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from conftest import ROOT
from data import TrainingSamples, UserError, collate, normalize, text_slots
from losses import multi_to_multi_loss
from test_losses import grouping, infonce, mean, unit

# Float32, so that the numbers are the same on a processor with bfloat16 as on one without.
RUN = dict(
    size="nano",
    images=64,
    batch=16,
    eval_images=0,
    device="cpu",
    precision="fp32",
    workers=0,
    log_every=1,
    save_minutes=60.0,
)


def fit(out, **flags):
    """Trains in this process -> (checkpoint, lines of metrics)."""
    folder = train.train({**RUN, "out": str(out), **flags})
    return load(folder / "checkpoint.pt"), read_lines(folder / "metrics.jsonl")


def load(path):
    return torch.load(path, weights_only=True)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def command_line(flags):
    words = []
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def settings(words, **flags):
    """The settings of a run whose command line has these words."""
    return train.resolve({**RUN, **flags, **train.parse_flags(words.split())})


def fresh(s):
    """The model that a run with these settings begins with; s gets the size of the vocabulary."""
    train.open_data(s, {})
    return train.build(s)


def batch_of(s, n):
    """The first n training scenes and the texts drawn for them."""
    tokenizer, dataset, _ = train.open_data(s, {})
    samples = TrainingSamples(dataset, tokenizer, s)
    return collate([samples[0, i] for i in range(n)])


# ---- every method, every ablation ------------------------------------------------------------------------------------

ABLATIONS = [
    "--method clip",
    "--method clip --stem patch --pool class --activation quickgelu",
    # DreamLIP: sampling, grouping, its negatives, threshold and places
    "--method dreamlip",
    "--method dreamlip --sampling first",
    "--method dreamlip --no-short-caption --no-raw-caption",
    "--method dreamlip --grouping none --clip-grad 0",
    "--method dreamlip --grouping token",
    "--method dreamlip --negatives image",
    "--method dreamlip --negatives batch --sub-captions 8",
    "--method dreamlip --negatives regrouped --region-grouping",
    "--method dreamlip --threshold 0.5 --grouping-weight 0.1 --contrastive-weight 0",
    # LoTLIP: corners, their mask, the encoder, more and shorter long texts
    "--method lotlip",
    "--method lotlip --corner-tokens 0 --precision bf16",
    "--method lotlip --no-corner-mask",
    "--method lotlip --text-attention bidirectional",
    "--method lotlip --text-attention bidirectional --no-corner-mask",
    "--method lotlip --text-attention bidirectional --text-style bert --vision-style timm --stem patch",
    "--method lotlip --long-texts 2 --long-sentences 3",
    "--method lotlip --no-raw-caption --grad-checkpointing",
    # Holistic CLIP: one to one, one to many, many to many, more and fewer branches than texts
    "--method holistic",
    "--method holistic --branches 1 --perspectives 1",
    "--method holistic --branches 1",
    "--method holistic --branches 3",
    "--method holistic --branches 7",
    "--method holistic --no-branch-mask",
    "--method holistic --branch-type mlp",
    "--method holistic --branch-type mlp --branch-layers 1 --vision-depth 2 --pool class",
    # SPARC, and mixtures
    "--method sparc",
    "--method sparc --grouping sub-caption --sub-captions 2",
    "--method dreamlip --corner-tokens 2 --branches 5",
    "--method sparc --corner-tokens 1 --sub-captions 2 --branches 3 --branch-type mlp --accumulate 2",
]


@pytest.mark.parametrize("words", ABLATIONS)
def test_every_method_and_ablation_trains_all_its_parameters(words, tmp_path):
    flags = train.parse_flags(words.split())
    checkpoint, lines = fit(tmp_path / "run", weight_decay=0.0, **flags)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert all(map(math.isfinite, line.values()))
    for name, p in fresh(settings(words)).named_parameters():
        assert not torch.equal(p, checkpoint["model"][name]), name


def paper_loss(method, v, t, patches, tokens, words):
    """v [branch][image], t [slot][summary token][image], patches [image], tokens and words [text]; lambda is 0.7."""
    if method == "dreamlip":
        texts = [of_slot[0] for of_slot in t]
        contrastive = mean([infonce(v[0], text) for text in texts])
        return contrastive + 0.7 * grouping(patches, list(zip(*texts)))
    if method == "lotlip":  # the raw caption by its summary alone
        return mean([infonce(v[0], text) for text in [t[0][0], *t[1]]])
    if method == "holistic":
        return mean([infonce(v[m], t[m][0]) for m in range(5)])
    contrastive = infonce(v[0], t[0][0])
    if method == "sparc":
        return 0.5 * contrastive + 0.7 * grouping(patches, tokens, words=words)
    return contrastive


@pytest.mark.parametrize("method", train.METHODS)
def test_each_methods_loss_is_the_sum_that_its_paper_writes(method):
    s = settings("--negatives image --grouping-weight 0.7", method=method)
    T = len(text_slots(s))
    v = unit(4, s.branches, 6)
    t = unit(4, T, 1 + s.corner_tokens, 6, seed=1)
    patches = unit(4, 9, 6, seed=2)
    tokens = unit(4 * T, 6, 6, seed=3)
    ends = torch.tensor([2, 5, 4, 3]).repeat_interleave(T)
    out = dict(
        branches=v,
        patches=patches,
        summaries=t,
        token_embeddings=tokens,
        ends=ends,
        logit_scale=torch.tensor(7.25),
    )
    loss, _ = train.method_loss(out, s)
    place = torch.arange(6)
    words = (place > 0) & (place < ends[:, None])  # neither the two end tokens nor the padding
    by_slot = t.permute(1, 2, 0, 3)
    inputs = [v.transpose(0, 1), by_slot, patches, tokens, words]
    expected = paper_loss(method, *[x.tolist() for x in inputs])
    assert loss.item() == pytest.approx(expected, abs=2e-5)


def test_only_perspectives_have_a_branch_of_their_own():
    s = settings("--raw-caption --sub-captions 1 --corner-tokens 1", method="holistic")
    branches = unit(4, 5, 6)
    texts = unit(4, 7, 2, 6, seed=1)
    scale = torch.tensor(7.25)
    loss, _ = train.method_loss(dict(branches=branches, summaries=texts, logit_scale=scale), s)
    free = torch.cat([texts[:, :2, 0], texts[:, 1:, 1]], 1)  # raw and sub-caption, and all corners but raw's
    own = multi_to_multi_loss(branches, texts[:, 2:, 0], scale, 5)
    expected = (5 * own + 8 * multi_to_multi_loss(branches, free, scale, 0)) / 13
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("words", [
    "--method clip",
    "--method dreamlip --negatives batch",
    "--method lotlip",
    "--method holistic --perspectives 3 --branches 3",
    "--method sparc",
])
def test_eight_scenes_whose_texts_all_differ_are_told_apart(words):
    s = settings(words, lr=3e-3, weight_decay=0.0, clip_grad=0.0)
    state, network = train.prepare(fresh(s), s)
    batch = batch_of(s, 8)
    _, first = train.backward(network, batch, s)
    for step in range(150):
        train.update(state, train.lr_factor(step, 150, s), s)
        _, parts = train.backward(network, batch, s)
    assert parts["contrastive"] < 0.05
    if "grouping" in parts:
        assert parts["grouping"] < 0.5 * first["grouping"]


# ---- one optimiser step ----------------------------------------------------------------------------------------------

def loss_and_gradients(s):
    model = fresh(s)
    loss, parts = train.backward(model, batch_of(s, 8), s)
    return [loss, *parts.values(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("words", [
    "--method dreamlip --negatives image",
    "--method dreamlip --negatives batch --region-grouping",
    "--method dreamlip --negatives slot --corner-tokens 2 --branches 3",
    "--method lotlip",
    "--method holistic --branch-type mlp --branches 3",
    "--method sparc",
])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(words):
    whole = loss_and_gradients(settings(words, batch=8))
    in_parts = loss_and_gradients(settings(words, batch=8, accumulate=4))
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-5)  # the largest are above 1


FAKE = FakeTensorMode()  # one for all tests, since `normalize` keeps its constants


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU's numbers go to the host, or the host waits for its own to go to a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        places = set()
        for x in tree_leaves([args, kwargs, out]):
            if isinstance(x, torch.Tensor) and (x.dim() or x.is_cuda or x is out):  # other numbers go along with a call
                places.add(x.device.type)
        assert len(places) < 2 or out.is_cuda and kwargs.get("non_blocking"), (function, places)
        return out


@pytest.mark.parametrize("words", [
    "--method dreamlip",
    "--method dreamlip --corner-tokens 2 --negatives regrouped",
    "--method lotlip",
    "--method holistic",
    "--method sparc",
])
def test_on_a_gpu_the_host_waits_for_nothing_until_the_loss_is_there(words, monkeypatch):
    """On tensors of a device that is not there: what needs their numbers on the host raises by itself."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)  # such tensors have none
    s = settings(words)
    s.vocab = 100
    T = len(text_slots(s))
    lengths = torch.full((16, T), 9).numpy()
    with FAKE:
        with torch.device("cuda:7"):  # nobody else's
            model = train.build(s)
            images = torch.zeros(16, 3, s.image_size, s.image_size, dtype=torch.uint8)
            tokens = torch.zeros(16, T, 20, dtype=torch.long)
        normalize(images)  # the first time it sends its constants
        with NoWaiting():
            out = model(normalize(images), tokens, s.grouping == "token", lengths)
            loss, _ = train.method_loss(out, s)
        with pytest.raises(AssertionError), NoWaiting():
            loss.cpu()
    assert loss.device.type == "cuda"


@pytest.mark.parametrize("device, number", [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_made_the_current_one(device, number, monkeypatch):
    made = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", made.append, raising=False)
    train.set_machine(train.Settings(device=device))
    assert made == [number]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_gains_biases_and_logit_scale_do_not_decay_and_embeddings_if_wished(stem, everywhere):
    words = "--method dreamlip --corner-tokens 2 --branches 2 --branch-type mlp"
    s = settings(words, stem=stem, decay_embeddings=everywhere)
    model = fresh(s)
    names = {id(p): name for name, p in model.named_parameters()}
    matrix = re.compile(r".*\.(qkv|out|fc|proj\.\d)\.weight|visual\.patch_embedding.*weight|(visual|text)\.proj")
    embedding = re.compile("(token_embedding.weight|positional_embedding|corner_embedding)$")
    for group in train.make_optimizer(model, s).param_groups:
        for p in group["params"]:
            name = names.pop(id(p))
            decays = p.ndim > 1 and (matrix.fullmatch(name) or everywhere and embedding.search(name))
            assert group["weight_decay"] == (s.weight_decay if decays else 0), name
    assert not names  # every parameter is in one group


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_muon_makes_singular_values_about_1_and_keeps_their_vectors(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64)
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    values = left.mT @ train.orthogonal(x) @ right.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert 0.6 < diagonal.min() and diagonal.max() < 1.3
    assert (values - diagonal.diag_embed()).abs().max() < 1e-9


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon from 2.9 on")
def test_muon_steps_matrices_and_convolutions_as_pytorchs_own_does(monkeypatch):
    def orthogonal(gradient, *_):  # PyTorch's rounds to bfloat16
        return train.orthogonal(gradient[None])[0]

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", orthogonal)
    s = settings("--method dreamlip --optimizer muon --muon-lr 0.02", clip_grad=0.0)
    state, _ = train.prepare(fresh(s), s)
    pairs = []  # of ours and theirs; PyTorch's takes matrices alone
    for name, p in state.model.named_parameters():
        if p.ndim > 1 and (".blocks." in name or "patch_embedding" in name):
            pairs.append((p, torch.nn.Parameter(p.detach().flatten(1).clone())))
    options = dict(lr=0.02, weight_decay=s.weight_decay, momentum=train.MOMENTUM, adjust_lr_fn="match_rms_adamw")
    muon = torch.optim.Muon([theirs for _, theirs in pairs], **options)
    for _ in range(3):
        for p in state.model.parameters():
            p.grad = torch.randn_like(p)
        for ours, theirs in pairs:
            theirs.grad = ours.grad.flatten(1)
        train.update(state, 1.0, s)
        muon.step()
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.flatten(1), theirs, rtol=1e-5, atol=1e-6)


def test_large_sizes_compile_on_a_gpu_where_a_compiler_is(monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no compiler\nat all")

    assert not train.resolve(dict(size="base-32", device="cpu")).compile
    monkeypatch.setattr(train, "check_device", lambda _: None)
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda _: True)
    assert train.resolve(dict(size="base-32", device="cuda")).compile
    assert not train.resolve(dict(size="base-32", device="cuda", compile=False)).compile
    assert not train.resolve(dict(size="small", device="cuda")).compile
    monkeypatch.setattr(torch, "compile", no_compiler)
    s = settings("--compile")
    train.prepare(fresh(s), s)
    assert "not compiled, which is slower: RuntimeError: no compiler" in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    train.prepare(fresh(s), s)  # with a config that this PyTorch knows


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_warms_up_and_falls_to_0(schedule):
    s = settings(f"--warmup 0.1 --schedule {schedule}")
    steps = (0, 4, 9, 10, 40, 55, 70, 100)
    rates = [train.lr_factor(step, 100, s) for step in steps]
    falls = dict(cosine=[1, 0.75, 0.5, 0.25, 0], linear=[1, 2 / 3, 0.5, 1 / 3, 0])
    assert rates == pytest.approx([0.1, 0.5, 1, *falls[schedule]])


def test_logit_scale_never_exceeds_100():
    s = settings("--method clip --optimizer adamw")
    state, _ = train.prepare(fresh(s), s)
    state.model.logit_scale.data.fill_(6.0)
    train.update(state, 1.0, s)
    assert state.model.logit_scale.exp().item() == pytest.approx(100)


def test_a_step_that_does_not_fit_goes_on_in_parts_or_names_the_remedy(tmp_path, monkeypatch, capsys):
    backward = train.backward

    def starved(network, batch, s, *rest):
        if s.accumulate < 4:
            raise torch.OutOfMemoryError
        return backward(network, batch, s, *rest)

    wanted, _ = fit(tmp_path / "parts", images=48, accumulate=4)
    monkeypatch.setattr(train, "backward", starved)
    found, _ = fit(tmp_path / "run", images=48)
    torch.testing.assert_close(found["model"], wanted["model"], rtol=0, atol=0)
    assert "embedded in 4 chunks (--accumulate 4)" in capsys.readouterr().out
    with pytest.raises(UserError, match="add --accumulate 2.* or --grad-checkpointing"):
        fit(tmp_path / "odd", batch=9, images=18)


def test_a_profile_says_where_the_time_of_a_step_goes_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.profile({**RUN, "images": 3200, "accumulate": 2}, steps=3, warm=1)
    printed = capsys.readouterr().out
    parts = re.findall(r"^    (\D+?) +[\d.]+ ms$", printed, re.M)
    assert parts == ["waiting for data", "forward and backward", "optimizer"]
    assert "the run's 3,200 images would take" in printed
    assert list(tmp_path.iterdir()) == []


# ---- two processes ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [
    "--method dreamlip --negatives batch",
    "--method dreamlip --corner-tokens 2 --branches 3 --accumulate 2 --grad-checkpointing",
    "--method holistic --branch-type mlp --branch-layers 1 --perspectives 3",
    "--method sparc",
])
def test_two_processes_give_the_weights_of_one_with_the_same_global_batch(words, tmp_path):
    # A large eps and no clipping: Adam would else hide a wrong factor, and blow rounding up where gradients vanish.
    flags = dict(images=48, lr=0.1, eps=0.1, clip_grad=0.0, weight_decay=0.0)
    one, _ = fit(tmp_path / "one", **flags, **train.parse_flags(words.split()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = command_line({**RUN, **flags, "out": tmp_path / "two"}) + words.split()
    subprocess.run([*launcher, ROOT / "train.py", *arguments], check=True, timeout=240)
    two = load(tmp_path / "two/checkpoint.pt")
    torch.testing.assert_close(two["model"], one["model"], rtol=0, atol=1e-5)
    start = fresh(settings(words)).visual.proj
    assert not torch.allclose(one["model"]["visual.proj"], start, atol=1e-3)  # they did move


# ---- flags -----------------------------------------------------------------------------------------------------------

def test_every_setting_is_a_flag_that_help_lists(capsys):
    with pytest.raises(SystemExit):
        train.parse_flags(["--help"])
    listed = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.M))
    expected = {name.replace("_", "-") for name in vars(train.Settings())}
    assert listed == expected - {"vocab"} | {"profile"}  # the tokenizer has the vocabulary


def test_flags_are_those_given_and_tokenizer_auto_is_not():
    assert train.parse_flags("--lr 0.5 --tokenizer auto --resume auto".split()) == {"lr": 0.5, "resume": "auto"}


# ---- the folder ------------------------------------------------------------------------------------------------------

def test_runs_are_numbered_and_no_two_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {**RUN, "method": "clip", "images": 16}
    names = [train.train(flags).name for _ in range(2)]
    assert names == ["clip-nano", "clip-nano-2"]
    (tmp_path / "runs/clip-nano/finished").unlink()
    assert train.run_folder(settings("--method clip --resume auto")).name == "clip-nano"
    with train.open_metrics(tmp_path / "mine", train.resolve(flags), 0):
        with pytest.raises(train.UserError, match="another process trains in"):
            fit(tmp_path / "mine", **flags)


# ---- mistakes --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data good and bad, a run, and things that look like one."""
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    (folder / "few.jsonl").write_text('{"image": "red.png", "caption": "red"}')
    (folder / "broken.jsonl").write_text('{"image": "broken.png", "caption": "red"}\n' * 80)
    fit(folder / "clip", method="clip", images=16)
    checkpoint = (folder / "clip/checkpoint.pt").read_bytes()
    for name in ("nothing", "damaged", "foreign"):
        (folder / name).mkdir()
    (folder / "damaged/checkpoint.pt").write_bytes(checkpoint[:5000])
    torch.save({"weight": torch.zeros(2)}, folder / "foreign/checkpoint.pt")
    return folder


MISTAKES = [
    # data
    ("train.py --data {f}/gone.jsonl", "gone.jsonl"),
    ("train.py --data {f}/few.jsonl", "--batch"),
    ("train.py --data {f}/broken.jsonl", "will not decode"),
    ("train.py --tokenizer {f}/red.png", "red.png"),
    # flags
    ("train.py --batch 0", "--batch"),
    ("train.py --lr nan", "--lr"),
    ("train.py --beta2 1", "--beta2"),
    ("train.py --patch 1", "--stem patch"),
    ("train.py --device toaster", "toaster"),
    # settings that cannot go together
    ("train.py --method clip --no-raw-caption", "--raw-caption"),
    ("train.py --method clip --corner-tokens 2", "--long-texts"),
    ("train.py --method clip --grouping sub-caption --negatives image", "--sub-captions"),
    ("train.py --method clip --region-grouping", "--region-grouping"),
    # folders
    ("train.py --out {f}/clip", "holds a run already"),
    ("train.py --resume {f}/nothing", "nothing"),
    ("train.py --resume {f}/damaged", "damaged"),
    ("train.py --resume {f}/foreign", "foreign"),
    ("train.py --resume {f}/clip --method clip --size tiny", "size (nano there, tiny here)"),
    ("train.py --resume {f}/clip --method clip --lr 1", "lr (0.002 there, 1.0 here)"),
    ("evaluate.py {f}/gone", "gone"),
    ("evaluate.py {f}/nothing", "checkpoint.pt"),
    ("scenes.py --write {f}/scenes --kinds 5", "kinds"),
]


@pytest.mark.parametrize("line, named", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_it(line, named, files, tmp_path, monkeypatch, capsys):
    script, *arguments = line.format(f=files).split()
    if script == "train.py":
        arguments = command_line({**RUN, "images": 16, "out": tmp_path / "run"}) + arguments
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    message = end.value.code
    assert message.startswith("error: ") and named in message and "\n" not in message
    assert "usage:" not in capsys.readouterr().err
