"""Every method trains, in one process, in two and in parts; a mistake ends in one sentence."""
import dataclasses
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from data import TrainingTexts, UserError, collate, normalize, text_slots
from test_losses import grouping, infonce, mean, unit

ROOT = Path(__file__).resolve().parent.parent
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
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
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
    samples = TrainingTexts(dataset, tokenizer, s)
    return collate([samples[0, i] for i in range(n)])


# ---- every method, every ablation ------------------------------------------------------------------------------------

ABLATIONS = [
    "--method clip",
    "--method clip --stem patch --pool class --activation quickgelu",
    # DreamLIP: sampling, grouping, its negatives, threshold and places
    "--method dreamlip",
    "--method dreamlip --sampling first",
    "--method dreamlip --sampling whole --grouping none",
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
    s = settings(words)
    expected = s.contrastive_weight * lines[0]["contrastive"]
    assert ("grouping" in lines[0]) == (s.grouping != "none")
    if "grouping" in lines[0]:
        expected += s.grouping_weight * lines[0]["grouping"]
    assert lines[0]["loss"] == pytest.approx(expected, rel=1e-4)
    for name, p in fresh(s).named_parameters():
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


@pytest.mark.parametrize("words", [
    "--method clip",
    "--method dreamlip --negatives batch",
    "--method lotlip",
    "--method holistic",
    "--method sparc",
])
def test_a_few_scenes_are_learned_down_to_the_floor_of_the_loss(words):
    """The floor of a slot's InfoNCE is the mean of log n over its texts, where n images of the batch have that text."""
    s = settings(words, lr=3e-3, weight_decay=0.0, clip_grad=0.0)
    state, network = train.prepare(fresh(s), s)
    batch = batch_of(s, 8)
    floors = []
    for slot, tokens in zip(text_slots(s), batch.tokens.unbind(1)):
        texts = tokens.tolist()
        floor = mean([math.log(texts.count(text)) for text in texts])
        embeddings = 1 if slot == "raw" else 1 + s.corner_tokens
        floors += [floor] * embeddings
    history = []
    for step in range(150):
        _, parts = train.backward(network, batch, s)
        train.update(state, train.learning_rate(step, 150, s), s)
        history.append(parts)
    assert mean(floors) - 1e-3 < parts["contrastive"] < mean(floors) + 0.05
    if "grouping" in parts:
        assert parts["grouping"] < 0.5 * history[0]["grouping"]


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
    """Raises where a GPU's numbers go to the host or the host's to a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        places = {x.device.type for x in tensors if x.dim() or x.is_cuda}  # numbers go along with a call
        places |= {x.device.type for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        assert len(places) < 2, (function, places)
        return out


@pytest.mark.parametrize("words", [
    "--method dreamlip",
    "--method dreamlip --corner-tokens 2 --negatives regrouped",
    "--method lotlip",
    "--method holistic",
    "--method sparc",
])
def test_on_a_gpu_the_host_waits_for_nothing_until_the_loss_is_there(words):
    """On tensors of a device that is not there: what needs their numbers on the host raises by itself."""
    s = settings(words)
    s.vocab = 100
    T = len(text_slots(s))
    lengths = torch.full((16, T), 9).numpy()
    with FAKE:
        with torch.device("cuda:7"):  # nobody else's
            model = train.build(s)
            images = torch.zeros(16, 3, s.image_size, s.image_size, dtype=torch.uint8)
            tokens = torch.zeros(16, T, 20, dtype=torch.long)
        model.layout = "packed"
        normalize(images)  # the first time it sends its constants
        with NoWaiting():
            out = model(normalize(images), tokens, s.grouping == "token", lengths)
            loss, _ = train.method_loss(out, s)
        with pytest.raises(AssertionError), NoWaiting():
            loss.cpu()
    assert loss.device.type == "cuda"
    assert out["summaries"].shape == (16, T, 1 + s.corner_tokens, s.embed)


@pytest.mark.parametrize("device, precision, trouble, layout", [
    ("cpu", "bf16", "", "buckets"),
    ("cuda", "fp32", "", "buckets"),
    ("cuda", "bf16", "", "packed"),
    ("cuda", "bf16", "no kernel", "buckets"),
])
def test_texts_are_packed_on_a_gpu_in_half_precision_where_that_works(
        device, precision, trouble, layout, monkeypatch, capsys):
    monkeypatch.setattr(train, "packing_trouble", lambda model: trouble)
    s = settings("--method clip", precision=precision)
    s.device = device
    assert train.text_layout(None, s) == layout
    warned = "WARNING: texts are not packed, which is slower: no kernel" in capsys.readouterr().out
    assert warned == bool(trouble)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_gains_biases_and_logit_scale_do_not_decay_and_embeddings_if_wished(stem, everywhere):
    words = "--method dreamlip --corner-tokens 2 --branches 2 --branch-type mlp"
    s = settings(words, stem=stem, decay_embeddings=everywhere)
    model = fresh(s)
    names = {id(p): name for name, p in model.named_parameters()}
    matrix = re.compile(r".*\.(qkv|out|fc|proj\.\d)\.weight|visual\.patch_embedding.*weight|(visual|text)\.proj")
    seen = []
    for group in train.make_optimizer(model, s).param_groups:
        for p in group["params"]:
            name = names[id(p)]
            is_embedding = name.endswith(("token_embedding.weight", "positional_embedding", "corner_embedding"))
            decays = p.ndim > 1 and (matrix.fullmatch(name) or everywhere and is_embedding)
            assert group["weight_decay"] == (s.weight_decay if decays else 0), name
            seen.append(name)
    assert sorted(seen) == sorted(names.values())


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
    s = settings("--method dreamlip --optimizer muon --muon-lr 0.02", batch=8, clip_grad=0.0)
    state, network = train.prepare(fresh(s), s)
    flat = {}  # PyTorch's takes matrices alone
    for name, p in state.model.named_parameters():
        if p.ndim > 1 and (".blocks." in name or "patch_embedding" in name):
            flat[name] = torch.nn.Parameter(p.detach().flatten(1).clone())
    assert sum("patch_embedding" in name for name in flat) == 3
    options = dict(lr=0.02, weight_decay=s.weight_decay, momentum=train.MOMENTUM, adjust_lr_fn="match_rms_adamw")
    muon = torch.optim.Muon(flat.values(), **options)
    for _ in range(3):
        train.backward(network, batch_of(s, 8), s)
        for name, p in flat.items():
            p.grad = state.model.get_parameter(name).grad.flatten(1).clone()
        train.update(state, 1.0, s)
        muon.step()
    for name, p in flat.items():
        torch.testing.assert_close(state.model.get_parameter(name).flatten(1), p, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_warms_up_linearly_and_falls_along_half_a_cosine():
    s = settings("--warmup 0.1")
    rates = [train.learning_rate(step, 100, s) for step in range(101)]
    for step in range(10):
        assert rates[step] == pytest.approx(0.1 * (step + 1))
    for step in range(10, 101):
        angle = math.pi * (step - 10) / 90
        assert rates[step] == pytest.approx((1 + math.cos(angle)) / 2)


def test_logit_scale_never_exceeds_100():
    s = settings("--method clip")
    state, network = train.prepare(fresh(s), s)
    state.model.logit_scale.data.fill_(6.0)
    train.backward(network, batch_of(s, 8), s)
    train.update(state, 1.0, s)
    assert state.model.logit_scale.exp().item() == pytest.approx(100)


def test_a_step_that_does_not_fit_names_the_remedy(tmp_path, monkeypatch):
    def starved(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train, "backward", starved)
    monkeypatch.setattr(sys, "argv", ["train.py", *command_line({**RUN, "out": tmp_path})])
    with pytest.raises(SystemExit, match="error: .*double --accumulate.*, or add --grad-checkpointing"):
        train.main()


def test_a_float32_run_after_one_in_bf16_does_not_inherit_its_tf32():
    for precision in ("bf16", "fp32"):
        train.set_machine(settings("", precision=precision))
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "bf16")
        assert torch.backends.cudnn.allow_tf32 == (precision == "bf16")


def test_a_profile_says_where_the_time_of_a_step_goes_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.profile({**RUN, "images": 3200, "accumulate": 2}, steps=3, warm=1)
    printed = capsys.readouterr().out
    rate = int(re.search(r"(\d+) images/s", printed)[1])
    parts = dict(re.findall(r"^    (\D+?) +([\d.]+) ms$", printed, re.M))
    assert set(parts) == {"waiting for data", "forward and backward", "optimizer"}
    assert 16 / rate == pytest.approx(sum(map(float, parts.values())) / 1000, rel=0.05)
    assert "(MFU)" in printed
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
    flags = {**RUN, "images": 48, "lr": 0.1, "eps": 0.1, "clip_grad": 0.0, "weight_decay": 0.0}
    flags |= train.parse_flags(words.split())
    one, lines = fit(tmp_path / "one", **flags)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = command_line({**flags, "out": tmp_path / "two"})
    subprocess.run([*launcher, ROOT / "train.py", *arguments], check=True, timeout=240)
    two = load(tmp_path / "two/checkpoint.pt")
    losses = [line["loss"] for line in read_lines(tmp_path / "two/metrics.jsonl")]
    assert losses == pytest.approx([line["loss"] for line in lines], abs=2e-5)
    torch.testing.assert_close(two["model"], one["model"], rtol=0, atol=1e-5)
    start = fresh(train.resolve(flags))
    assert (start.visual.proj - one["model"]["visual.proj"]).abs().max() > 1e-3  # they did move


# ---- flags -----------------------------------------------------------------------------------------------------------

FIELDS = {field.name: field for field in dataclasses.fields(train.Settings)}


def test_every_setting_is_a_flag_that_help_lists(capsys):
    with pytest.raises(SystemExit):
        train.parse_flags(["--help"])
    listed = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.M))
    expected = {name.replace("_", "-") for name in FIELDS}
    assert listed == expected - {"vocab"} | {"profile"}  # the tokenizer has the vocabulary


def test_flags_come_back_typed_and_only_those_given():
    assert train.parse_flags([]) == {}
    words = "--method sparc --lr 0.5 --batch 7 --no-raw-caption --corner-mask --threshold 0.25 --data x.jsonl scenes"
    assert train.parse_flags(words.split()) == dict(
        method="sparc",
        lr=0.5,
        batch=7,
        raw_caption=False,
        corner_mask=True,
        threshold=0.25,
        data=["x.jsonl", "scenes"],
    )


@pytest.mark.parametrize("method", train.METHODS)
@pytest.mark.parametrize("size", train.SIZES)
def test_rows_of_methods_and_sizes_are_settings_of_the_right_type(method, size):
    s = train.resolve(dict(method=method, size=size, device="cpu"))
    row = train.SIZES[size] | train.METHODS[method]
    if size.startswith(("base", "large")):
        row |= train.RECIPES.get(method, {})
    for name, value in row.items():
        assert getattr(s, name) == value
        assert type(value) is type(FIELDS[name].default)


def test_flags_win_over_the_rows_of_methods_and_sizes():
    s = settings("--method dreamlip --size nano --sub-captions 7 --embed 32")
    assert (s.sub_captions, s.embed) == (7, 32)


# ---- the folder ------------------------------------------------------------------------------------------------------

def test_runs_are_numbered_and_no_two_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {**RUN, "method": "clip", "images": 16}
    first = train.train(flags)
    second = train.train(flags)
    assert (first.name, second.name) == ("clip-nano", "clip-nano-2")
    with train.open_metrics(tmp_path / "mine", train.resolve(flags), 0):
        with pytest.raises(train.UserError, match="another process trains in"):
            fit(tmp_path / "mine", **flags)


# ---- mistakes --------------------------------------------------------------------------------------------------------

def captions(path, *images):
    lines = [json.dumps({"image": image, "caption": "red"}) for image in images]
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data good and bad, a run, and things that look like one."""
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    captions(folder / "few.jsonl", "red.png")
    captions(folder / "broken.jsonl", *["./" * i + "broken.png" for i in range(80)])
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
    ("train.py --data {f}/broken.jsonl --workers 1", "will not decode"),
    ("train.py --tokenizer {f}/red.png", "red.png"),
    # flags
    ("train.py --unknown 3", "--unknown"),
    ("train.py --vocab 9", "--vocab"),
    ("train.py --method best", "dreamlip"),
    ("train.py --size huge", "nano"),
    ("train.py --batch 0", "--batch"),
    ("train.py --branches 0", "--branches"),
    ("train.py --text-attention full", "bidirectional"),
    ("train.py --beta2 2", "--beta2"),
    ("train.py --lr nan", "--lr"),
    ("train.py --seed 99999999999999999999", "--seed"),
    ("train.py --kinds 5", "kinds"),
    ("train.py --device toaster", "toaster"),
    # settings that cannot go together
    ("train.py --accumulate 3", "--batch 16"),
    ("train.py --method clip --no-raw-caption", "--raw-caption"),
    ("train.py --method clip --corner-tokens 2", "--long-texts"),
    ("train.py --method clip --grouping sub-caption --negatives image", "--sub-captions"),
    ("train.py --method clip --region-grouping", "--region-grouping"),
    ("train.py --method holistic --pool average", "--branch-type mlp"),
    ("train.py --image-size 30", "--image-size"),
    ("train.py --vision-heads 5", "--vision-heads"),
    # folders
    ("train.py --out {f}/clip", "holds a run already"),
    ("train.py --resume {f}/nothing", "nothing"),
    ("train.py --resume {f}/damaged", "damaged"),
    ("train.py --resume {f}/foreign", "foreign"),
    ("train.py --resume {f}/clip --method clip --size tiny", "size (nano there, tiny here)"),
    ("train.py --resume {f}/clip --method clip --lr 1", "lr (0.002 there, 1.0 here)"),
    ("evaluate.py {f}/gone", "gone"),
    ("evaluate.py {f}/nothing", "nothing"),
    ("evaluate.py {f}/damaged", "damaged"),
    ("evaluate.py {f}/foreign", "foreign"),
    ("evaluate.py {f}/clip --branch 1", "--branch 1"),
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


def test_a_command_line_with_a_mistake_prints_its_one_line_and_no_more(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--data", "gone.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*gone\.jsonl.*\n", done.stderr)
    assert not done.stdout
