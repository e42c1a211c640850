"""Every method trains, alone, over two processes, in parts and after an interruption; mistakes end in one sentence."""
import argparse
import dataclasses
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
import train
from data import SceneImages, TrainingTexts, collate, load_tokenizer, mean_and_deviation, normalize, text_slots
from model import CLIP, CLIPConfig
from test_losses import grouping, infonce, unit
from test_model import varlen_reference

ROOT = Path(__file__).resolve().parent.parent
RUN = dict(size="nano", images=64, batch=16, eval_images=0, device="cpu", workers=0, log_every=1, save_minutes=60.0)


def fit(out, **flags):
    """Trains in this process -> (checkpoint, lines of metrics)."""
    folder = train.train({**RUN, "out": str(out), **flags})
    return torch.load(folder / "checkpoint.pt", weights_only=True), read_lines(folder / "metrics.jsonl")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def torchrun(script, flags, *options):
    """Runs a script as two processes -> what subprocess.run gives."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    return subprocess.run([sys.executable, *launcher, str(script), *command_line(flags)],
                          capture_output=True, text=True, timeout=240)


def command_line(flags):
    return [text for name, value in flags.items() for text in (
        [f"--{'' if value else 'no-'}{name.replace('_', '-')}"] if isinstance(value, bool)
        else [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])])]


def fresh(s):
    """The model that a run with these settings begins with."""
    s.vocab = load_tokenizer("scenes").vocab_size
    torch.manual_seed(s.seed)
    return CLIP(train.config_from(s))


def batch_of(s, n):
    """The first n training scenes and the texts drawn for them."""
    samples = TrainingTexts(SceneImages("train", n, s.image_size, s.kinds), load_tokenizer("scenes"), s)
    return collate([samples[0, i] for i in range(n)])


def no_scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


# ---- every method, every ablation ------------------------------------------------------------------------------------

ABLATIONS = [
    *(dict(method=m) for m in train.METHODS),
    # DreamLIP: sampling, the short caption, grouping, its negatives and threshold
    *(dict(method="dreamlip", **flags) for flags in (
        dict(sampling="first"), dict(sampling="whole", grouping="none"), dict(short_caption=False),
        dict(raw_caption=False), dict(sub_captions=8), dict(grouping="none"), dict(grouping="token"),
        dict(negatives="image"), dict(negatives="batch"), dict(negatives="slot"), dict(threshold=0.5),
        dict(grouping_weight=0.1, contrastive_weight=0.0))),
    # LoTLIP: corners, their mask, the encoder, more and shorter long texts
    *(dict(method="lotlip", **flags) for flags in (
        dict(corner_tokens=0), dict(corner_mask=False), dict(text_attention="bidirectional"),
        dict(text_attention="bidirectional", corner_mask=False),
        dict(long_texts=2, long_sentences=3), dict(raw_caption=False))),
    # Holistic CLIP: one to one, one to many, many to many (class tokens, MLPs), more and fewer branches than texts
    *(dict(method="holistic", **flags) for flags in (
        dict(branches=1, perspectives=1), dict(branches=1), dict(branch_type="mlp"),
        dict(branch_type="mlp", branch_layers=1, vision_depth=2, pool="class"),
        dict(branches=3), dict(branches=7))),
    dict(method="sparc", grouping="sub-caption", sub_captions=2),
    # mixtures, and the machine's settings
    dict(method="dreamlip", corner_tokens=2, branches=5),
    dict(method="sparc", corner_tokens=1, sub_captions=2, branches=3, branch_type="mlp", accumulate=2),
    dict(method="clip", stem="patch", pool="class", activation="quickgelu"),
    dict(method="dreamlip", clip_grad=0.0), dict(method="lotlip", precision="bf16"),
    dict(method="lotlip", grad_checkpointing=True),
]


@pytest.mark.parametrize("flags", ABLATIONS, ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()))
def test_every_method_and_ablation_trains_all_its_parameters(flags, tmp_path):
    checkpoint, lines = fit(tmp_path / "run", weight_decay=0.0, **flags)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and (tmp_path / "run/finished").exists()
    assert all(math.isfinite(value) for line in lines for value in line.values())
    grouping = flags.get("grouping", train.METHODS[flags["method"]].get("grouping", "none"))
    assert ("grouping" in lines[0]) == (grouping != "none")
    s = train.resolve({**RUN, **flags})
    assert not [name for name, p in fresh(s).named_parameters() if torch.equal(p, checkpoint["model"][name])]
    expected = s.contrastive_weight * lines[0]["contrastive"] + s.grouping_weight * lines[0].get("grouping", 0)
    assert lines[0]["loss"] == pytest.approx(expected, rel=1e-4)
    weights = checkpoint["settings"]
    assert all(weights[name] == value for name, value in flags.items())


@pytest.mark.parametrize("method", train.METHODS)
def test_each_methods_loss_is_the_sum_that_its_paper_writes(method):
    s = train.resolve({**RUN, "method": method, "negatives": "image", "grouping_weight": 0.7})
    B, T, C, L, ends = 4, len(text_slots(s)), s.corner_tokens, 6, [2, 5, 4, 3]
    v, t = unit(B, s.branches, 6), unit(B, T, 1 + C, 6, seed=1)
    patches, tokens = unit(B, 9, 6, seed=2), unit(B * T, L, 6, seed=3)
    out = dict(branches=v, patches=patches, summaries=t, token_embeddings=tokens,
               ends=torch.tensor(ends).repeat_interleave(T), logit_scale=torch.tensor(7.25))
    loss, _ = train.method_loss(out, s)
    v, t = v.transpose(0, 1).tolist(), t.permute(1, 2, 0, 3).tolist()  # by branch, and by slot and summary token
    words = [[0 < place < end for place in range(L)] for end in ends]  # neither the two end tokens nor the padding
    mean = lambda terms: sum(terms) / len(terms)
    expected = {
        "clip": lambda: infonce(v[0], t[0][0]),
        "dreamlip": lambda: mean([infonce(v[0], t[k][0]) for k in range(4)]) + 0.7 * grouping(
            patches.tolist(), out["summaries"][:, :, 0].tolist()),
        "lotlip": lambda: mean([  # the raw caption by its summary alone
            infonce(v[0], t[0][0]), *(infonce(v[0], t[1][c]) for c in range(3))]),
        "holistic": lambda: mean([infonce(v[m], t[m][0]) for m in range(5)]),
        "sparc": lambda: 0.5 * infonce(v[0], t[0][0]) + 0.7 * grouping(patches.tolist(), tokens.tolist(), mask=words),
    }[method]()
    assert loss.item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("flags, named", [
    (dict(method="clip", raw_caption=False), "--raw-caption"), (dict(method="clip", corner_tokens=2), "--long-texts"),
    (dict(method="clip", contrastive_weight=0.0), "--grouping"),
    (dict(method="clip", grouping="sub-caption", negatives="image"), "--sub-captions"),
    (dict(method="holistic", pool="average"), "--branch-type mlp"), (dict(method="clip", accumulate=3), "--batch 16"),
    (dict(method="clip", image_size=30), "--image-size"), (dict(method="clip", vision_heads=5), "--vision-heads"),
    (dict(method="sparc", negatives="slot"), "--negatives slot")])
def test_an_impossible_combination_gets_one_sentence_naming_a_remedy(flags, named, tmp_path):
    with pytest.raises(train.UserError) as caught:
        fit(tmp_path / "run", **flags)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [
    dict(method="clip"), dict(method="dreamlip", negatives="batch"), dict(method="lotlip"), dict(method="holistic"),
    dict(method="sparc")], ids=lambda flags: flags["method"])
def test_a_tiny_overfit_reaches_its_floor(flags):
    """The floor of a slot's InfoNCE is the mean of log n over its texts, where n images of the batch have that text."""
    s = train.resolve({**RUN, **flags, "lr": 3e-3, "weight_decay": 0.0, "precision": "fp32"})
    model, batch = fresh(s), batch_of(s, 8)
    optimizer = train.make_optimizer(model, s)
    slots, terms = text_slots(s), []
    for t, slot in enumerate(slots):
        rows = [tuple(row) for row in batch.tokens[:, t].tolist()]
        counts = Counter(rows)
        terms += [sum(math.log(counts[row]) for row in rows) / len(rows)] * (1 + (slot != "raw") * s.corner_tokens)
    floor, first = sum(terms) / len(terms), None
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, 150, s)
        _, parts = train.backward(model, batch, s, no_scaler())
        first = first or parts
        optimizer.step()
        optimizer.zero_grad()
    assert floor - 1e-3 < parts["contrastive"] < floor + 0.05
    if "grouping" in parts:
        assert parts["grouping"] < 0.5 * first["grouping"]


# ---- one optimiser step ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    dict(method="dreamlip", negatives="image"), dict(method="dreamlip", negatives="batch"),
    dict(method="dreamlip", negatives="slot", corner_tokens=2, branches=3), dict(method="lotlip"),
    dict(method="holistic"), dict(method="holistic", branch_type="mlp", branches=3), dict(method="sparc")], ids=str)
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(flags, parts):
    gradients = []
    for accumulate in (1, parts):
        s = train.resolve({**RUN, **flags, "batch": 8, "accumulate": accumulate, "precision": "fp32"})
        model = fresh(s)
        loss, named = train.backward(model, batch_of(s, 8), s, no_scaler())
        gradients.append([loss, *named.values(), *(p.grad for p in model.parameters())])
    for whole, split in zip(*gradients, strict=True):
        assert torch.allclose(whole, split, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("flags", [
    dict(method="dreamlip"), dict(method="lotlip", text_attention="bidirectional"), dict(method="sparc")], ids=str)
def test_three_steps_without_padding_end_at_the_weights_of_three_padded_steps(flags, monkeypatch):
    monkeypatch.setattr(model_module, "varlen_attention", varlen_reference)
    s, ends = train.resolve({**RUN, **flags, "batch": 8, "precision": "fp32", "eps": 1e-3}), []
    for layout in ("padded", "buckets", "packed"):
        monkeypatch.setattr(train, "text_layout", lambda *_: layout)
        state, network = train.prepare(fresh(s), s)
        batch = batch_of(s, 8)
        for _ in range(3):
            train.backward(network, batch, s, state.scaler)
            train.update(state, 1e-3, s)
        ends.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in fresh(s).parameters()])
    assert (ends[0] - start).abs().max() > 1e-3
    assert max((end - ends[0]).abs().max() for end in ends[1:]) < 2e-6


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU's numbers go to the host or the host's to a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        places = [{x.device.type for x in tree_leaves(leaves) if isinstance(x, torch.Tensor) and (x.dim() or sent)}
                  for leaves, sent in (((args, kwargs), False), (out, True))]  # numbers go along with a kernel's call
        assert len(set.union(*places)) < 2 and "nonzero" not in str(function), (function, places)
        return out


@pytest.mark.parametrize("flags", [
    *(dict(method=method) for method in train.METHODS), dict(method="dreamlip", corner_tokens=2)], ids=str)
def test_on_a_gpu_the_host_waits_for_nothing_until_the_loss_is_there(flags):
    """On tensors of a device that is not there: what needs their numbers on the host raises by itself."""
    s = train.resolve({**RUN, **flags})
    s.vocab, s.device, T = 100, "cuda", len(text_slots(s))
    lengths = torch.full((16, T), 9).numpy()
    mean_and_deviation.cache_clear()
    with FakeTensorMode():
        with torch.device("cuda"):
            model = train.build(s)
            images = torch.zeros(16, 3, s.image_size, s.image_size, dtype=torch.uint8)
            tokens = torch.zeros(16, T, 20, dtype=torch.long)
        model.layout = "packed"
        with pytest.raises(AssertionError), NoWaiting():
            normalize(images)  # the first time it sends its constants
        normalize(images)
        with NoWaiting():
            out = model(normalize(images), tokens, s.grouping == "token", lengths)
            loss, _ = train.method_loss(out, s)
    mean_and_deviation.cache_clear()
    assert loss.device.type == "cuda" and out["summaries"].shape == (16, T, 1 + s.corner_tokens, s.embed)


def test_texts_are_packed_on_a_gpu_in_half_precision_where_that_works_else_a_line_says_so(monkeypatch, capsys):
    s = train.resolve({**RUN, "method": "clip", "precision": "bf16"})
    assert train.text_layout(fresh(s), s) == "buckets"
    s.device = "cuda"
    for trouble, layout in (("no kernel", "buckets"), ("", "packed")):
        monkeypatch.setattr(train, "packing_trouble", lambda model, device: trouble)
        assert train.text_layout(fresh(s), s) == layout
        assert ("WARNING: texts are not packed, which is slower: no k" in capsys.readouterr().out) == bool(trouble)
    s.precision = "fp32"
    assert train.text_layout(fresh(s), s) == "buckets"


def test_gains_biases_embeddings_and_logit_scale_do_not_decay_and_all_else_does():
    s = train.resolve({**RUN, "method": "dreamlip", "corner_tokens": 2, "branches": 2, "branch_type": "mlp"})
    for stem in ("patch", "conv"):
        s.stem = stem
        model = fresh(s)
        names = {id(p): name for name, p in model.named_parameters()}
        groups = train.make_optimizer(model, s).param_groups
        free, decayed = ({names[id(p)] for g in groups if (g["weight_decay"] == 0) == none for p in g["params"]}
                         for none in (True, False))
        assert free | decayed == set(names.values()) and not free & decayed
        matrix = re.compile(r".*\.(qkv|out|fc|proj\.\d)\.weight|visual\.patch_embedding.*weight|(visual|text)\.proj")
        assert decayed == {name for name in names.values() if matrix.fullmatch(name)}
        assert {g["weight_decay"] for g in groups} == {0.0, s.weight_decay}


def test_the_learning_rate_warms_up_linearly_and_falls_along_half_a_cosine():
    s = train.resolve({**RUN, "lr": 2.0, "warmup": 0.1})
    rates = [train.learning_rate(step, 100, s) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[55] == pytest.approx(1.0) and rates[10:] == sorted(rates[10:], reverse=True)


def test_logit_scale_never_exceeds_100(monkeypatch, tmp_path):
    def hot(config):
        model = CLIP(config)
        model.logit_scale.data.fill_(6.0)
        return model
    monkeypatch.setattr(train, "CLIP", hot)
    checkpoint, lines = fit(tmp_path / "run", method="clip")
    assert lines[0]["logit_scale"] == pytest.approx(100) and checkpoint["model"]["logit_scale"].exp() < 100.001


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tmp_path):
    a, b, c = (fit(tmp_path / str(i), method="dreamlip", images=32, seed=seed)[0]["model"]
               for i, seed in enumerate((0, 0, 1)))
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["visual.proj"], c["visual.proj"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_profile_says_where_the_time_of_a_step_goes_and_leaves_nothing(accumulate, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.profile({**RUN, "method": "dreamlip", "images": 3200, "accumulate": accumulate}, steps=3, warm=1)
    printed = capsys.readouterr().out
    shares = {part: float(share) for part, share in re.findall(r"^    (\D+?) +[\d.]+ ms +([\d.]+)%", printed, re.M)}
    assert set(shares) == {"waiting for data", "to the device", "image tower", "text tower", "losses", "backward",
                           "optimiser"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.4) and min(shares.values()) >= 0
    assert "(MFU)" in printed and "the run's 3,200 images would take" in printed
    assert list(tmp_path.iterdir()) == []


# ---- two processes ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    dict(method="dreamlip", negatives="batch"),
    dict(method="dreamlip", corner_tokens=2, branches=3, accumulate=2, grad_checkpointing=True),
    dict(method="holistic", branch_type="mlp", branch_layers=1, perspectives=3), dict(method="sparc")], ids=str)
def test_two_processes_give_the_weights_of_one_with_the_same_global_batch(flags, tmp_path):
    # A large eps and no clipping: Adam would else hide a wrong factor, and blow rounding up where gradients vanish.
    flags = {**RUN, "images": 48, "lr": 0.1, "eps": 0.1, "clip_grad": 0.0, "weight_decay": 0.0, "precision": "fp32",
             **flags}
    done = torchrun(ROOT / "train.py", {**flags, "out": tmp_path / "two"})
    assert done.returncode == 0, done.stderr[-3000:]
    one, lines = fit(tmp_path / "one", **flags)
    two = torch.load(tmp_path / "two/checkpoint.pt", weights_only=True)
    others = read_lines(tmp_path / "two/metrics.jsonl")
    assert len(others) == 3
    assert [line["loss"] for line in others] == pytest.approx([line["loss"] for line in lines], abs=2e-5)
    assert max((one["model"][name] - two["model"][name]).abs().max() for name in one["model"]) < 1e-5
    start = fresh(train.resolve(flags))
    assert (start.visual.proj - one["model"]["visual.proj"]).abs().max() > 1e-3  # they did move

# ---- interruption and resumption -------------------------------------------------------------------------------------

LONG = dict(method="dreamlip", images=192)  # 12 steps


def at_call(n, action):
    """train.backward, doing `action` when it is called for the n-th time."""
    calls, backward = [], train.backward

    def wrapped(*arguments):
        calls.append(1)
        if len(calls) == n:
            action()
        return backward(*arguments)
    return wrapped


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("whole") / "run", **LONG)


def same_run(folder, uninterrupted):
    checkpoint, lines = torch.load(folder / "checkpoint.pt", weights_only=True), read_lines(folder / "metrics.jsonl")
    whole, all_lines = uninterrupted
    assert all(torch.equal(whole["model"][name], checkpoint["model"][name]) for name in whole["model"])
    losses = {line["step"]: line["loss"] for line in lines}
    assert losses == {line["step"]: line["loss"] for line in all_lines} and len(losses) == 12
    return lines


@pytest.mark.parametrize("sent, workers", [(signal.SIGTERM, 0), (signal.SIGINT, 1)])
def test_a_run_stopped_by_a_signal_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
        sent, workers, tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", at_call(5, lambda: os.kill(os.getpid(), sent)))
        with pytest.raises(SystemExit) as caught:
            fit(tmp_path / "run", **LONG, workers=workers)
    assert caught.value.code not in (0, None) and not (tmp_path / "run/finished").exists()
    assert signal.getsignal(sent) in (signal.SIG_DFL, signal.default_int_handler)
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 5
    fit(tmp_path / "run", **LONG, workers=workers, resume=str(tmp_path / "run"))
    assert len(same_run(tmp_path / "run", uninterrupted)) == 12


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint_and_lists_every_step_once(tmp_path, uninterrupted):
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import conftest, train, test_train
saved, save = [], train.save
train.save = lambda *a: saved.append(1) or len(saved) > 4 or save(*a)  # one after each of the first four steps
train.backward = test_train.at_call(8, lambda: os.kill(os.getpid(), signal.SIGKILL))
test_train.fit({str(tmp_path / 'run')!r}, **{{**test_train.LONG, 'save_minutes': 1e-9}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 4
    fit(tmp_path / "run", **LONG, resume="auto")
    lines = same_run(tmp_path / "run", uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 13))


def test_a_folder_alone_is_enough_to_go_on_with_the_settings_of_its_run(tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", at_call(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit):
            fit(tmp_path / "run", **LONG)
    with pytest.raises(train.UserError, match=r"other settings: lr \(0.002 there, 0.5 here\)"):
        train.train(dict(resume=str(tmp_path / "run"), lr=0.5))
    train.train(dict(resume=str(tmp_path / "run"), workers=1))
    same_run(tmp_path / "run", uninterrupted)


def test_two_runs_in_one_folder_are_one_too_many(tmp_path, monkeypatch):
    claimed = train.claim_folder(tmp_path / "run", train.resolve(RUN), 0)
    with pytest.raises(train.UserError, match="another process trains in"):
        fit(tmp_path / "run", method="clip")
    claimed.close()
    fit(tmp_path / "run", method="clip", images=16)


def test_runs_are_numbered_and_never_overwrite_one_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.train({**RUN, "method": "clip", "images": 16})
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["clip-nano", "clip-nano-2"]


# ---- flags -----------------------------------------------------------------------------------------------------------

FIELDS = {field.name: field for field in dataclasses.fields(train.Settings) if field.name != "vocab"}  # the tokenizer's


def test_every_setting_is_a_flag_with_a_help_text(monkeypatch):
    parsers = []
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args",
                      lambda self, *_: parsers.append(self) or argparse.Namespace())
        train.parse_flags([])
    actions = {action.dest: action for action in parsers[0]._actions}
    assert [name for name in FIELDS if "--" + name.replace("_", "-") not in actions[name].option_strings] == []
    assert [name for name in FIELDS if len(actions[name].help or "") < 5] == []


def test_flags_come_back_typed_and_only_those_given():
    assert train.parse_flags([]) == {}
    given = dict(method="sparc", lr=0.5, batch=7, raw_caption=False, corner_mask=True, threshold=0.25,
                 data=["x.jsonl", "scenes"])
    assert train.parse_flags(command_line(given)) == given


def test_rows_of_methods_and_sizes_name_only_settings_of_the_right_type_and_flags_win_over_them():
    for row in (*train.METHODS.values(), *train.SIZES.values()):
        assert set(row) <= set(FIELDS) and all(type(value) is type(FIELDS[name].default) for name, value in row.items())
    for table, fixed in ((train.METHODS, dict(size="nano")), (train.SIZES, dict(method="clip"))):
        for key, row in table.items():
            s = train.resolve({"method" if table is train.METHODS else "size": key, "device": "cpu", **fixed})
            assert {name: getattr(s, name) for name in row} == row
    assert train.resolve({"method": "dreamlip", "size": "nano", "sub_captions": 7, "embed": 32}).sub_captions == 7


def test_a_setting_that_there_is_not_is_not_taken_in_silence():
    with pytest.raises(TypeError, match="grouping_wieght"):
        train.resolve({"grouping_wieght": 0.5})


def test_a_float32_run_after_one_in_bf16_does_not_inherit_its_tf32():
    for precision in ("bf16", "fp32"):
        train.set_machine(train.resolve(dict(size="nano", device="cpu", precision=precision)))
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "bf16")


def test_the_model_s_settings_are_settings_of_the_run():
    assert {f.name for f in dataclasses.fields(CLIPConfig)} <= {*FIELDS, "vocab"}


# ---- mistakes --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data files good and bad, two runs of different size, and things that look like them."""
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    (folder / "empty.jsonl").write_text("")
    for name, image, caption in (("good", "red.png", "red"), ("undecodable", "broken.png", "red"),
                                 ("no_captions", "red.png", " "), ("no_images", "gone.png", "red")):
        (folder / f"{name}.jsonl").write_text(json.dumps({"image": image, "caption": caption}) + "\n")
    lines = [json.dumps({"image": "./" * i + "broken.png", "caption": "x"}) for i in [0] * 40 + list(range(1, 41))]
    (folder / "all_broken.jsonl").write_text("\n".join(lines))
    fit(folder / "clip", method="clip", images=16)
    (folder / "damaged").mkdir()
    (folder / "damaged/checkpoint.pt").write_bytes((folder / "clip/checkpoint.pt").read_bytes()[:5000])
    (folder / "foreign").mkdir()
    torch.save({"weight": torch.zeros(2)}, folder / "foreign/checkpoint.pt")
    (folder / "nothing").mkdir()
    return folder


def command(script, arguments, monkeypatch, capsys):
    """Runs a script as from the command line -> (exit code, what it printed on stderr)."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    code, message = 0, ""
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:  # as the interpreter does it: a text is printed and the code is 1
        code, message = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
    return code, capsys.readouterr().err + message


BASE = command_line({**RUN, "images": 16})
MISTAKES = [
    ("train.py", "--data {f}/gone.jsonl", "gone.jsonl"), ("train.py", "--data {f}", "--data"),
    ("train.py", "--data {f}/empty.jsonl", "empty.jsonl"), ("train.py", "--data {f}/no_captions.jsonl", "no caption"),
    ("train.py", "--data {f}/no_images.jsonl", "gone.png"), ("train.py", "--data {f}/red.png", "red.png"),
    ("train.py", "--data {f}/good.jsonl", "--batch"), ("train.py", "--data {f}/all_broken.jsonl", "will not decode"),
    ("train.py", "--data {f}/all_broken.jsonl --workers 1", "will not decode"),
    ("train.py", "--unknown 3", "--unknown"), ("train.py", "--method best", "dreamlip"),
    ("train.py", "--batch many", "many"), ("train.py", "--size huge", "nano"), ("train.py", "--batch 0", "--batch"),
    ("train.py", "--vocab 9", "--vocab"),
    ("train.py", "--accumulate 0", "--accumulate"), ("train.py", "--images -1", "--images"),
    ("train.py", "--sub-captions -1", "--sub-captions"), ("train.py", "--kinds 5", "kinds"),
    ("train.py", "--device toaster", "toaster"), ("train.py", "--seed -1", "--seed"),
    ("train.py", "--beta2 2", "--beta2"), ("train.py", "--lr nan", "--lr"), ("train.py", "--threshold 2", "--threshold"),
    ("train.py", "--clip-grad inf", "--clip-grad"), ("train.py", "--seed 99999999999999999999", "--seed"),
    ("train.py", "--eps -1", "--eps"), ("train.py", "--patch 0", "--patch"),
    ("train.py", "--vision-heads 0", "--vision-heads"), ("train.py", "--context 0", "--context"),
    ("train.py", "--tokenizer gone", "gone"), ("train.py", "--tokenizer {f}/gone.tiktoken", "gone.tiktoken"),
    ("train.py", "--tokenizer {f}/red.png", "red.png"), ("train.py", "--resume {f}/gone", "gone"),
    ("train.py", "--resume {f}/nothing", "nothing"), ("train.py", "--resume {f}/damaged", "damaged"),
    ("train.py", "--resume {f}/foreign", "foreign"),
    ("train.py", "--resume {f}/clip --method clip --size tiny", "size (nano there, tiny here)"),
    ("train.py", "--resume {f}/clip --method clip --lr 1", "lr (0.002 there, 1.0 here)"),
    ("train.py", "--out {f}/clip", "holds a run already"), ("evaluate.py", "{f}/gone", "gone"),
    ("evaluate.py", "{f}/nothing", "nothing"), ("evaluate.py", "{f}/damaged", "damaged"),
    ("evaluate.py", "{f}/foreign", "foreign"), ("evaluate.py", "{f}/clip --branch 1", "--branch 1"),
    ("evaluate.py", "{f}/clip --branch best", "--branch best"),
    ("evaluate.py", "{f}/clip --data {f}/gone.jsonl", "gone.jsonl"), ("evaluate.py", "{f}/clip --unknown", "--unknown"),
    ("evaluate.py", "{f}/clip --images -1", "--images"), ("evaluate.py", "{f}/clip --device toaster", "toaster"),
]


@pytest.mark.parametrize("script, arguments, named", MISTAKES, ids=[" ".join(mistake[:2]) for mistake in MISTAKES])
def test_a_mistake_ends_in_one_line_that_names_it(script, arguments, named, files, tmp_path, monkeypatch, capsys):
    arguments = arguments.format(f=files).split()
    base = BASE + (["--out", str(tmp_path / "run")] if "--out" not in arguments else []) if script == "train.py" else []
    code, printed = command(script, [*base, *arguments], monkeypatch, capsys)
    errors = [line for line in re.split(r"[\r\n]+", printed) if line.startswith("error:")]
    assert code != 0 and len(errors) == 1 and named in errors[0], printed[-1500:]
    assert "Traceback" not in printed and "usage:" not in printed
    assert printed.rstrip().endswith(errors[0])


def test_pictures_that_will_not_decode_are_passed_over_counted_and_listed(files, tmp_path, capsys):
    lines = [{"image": "red.png", "caption": f"red {i}"} for i in range(20)] + [{"image": "broken.png", "caption": "x"}]
    (files / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _, metrics = fit(tmp_path / "run", method="clip", data=str(files / "mixed.jsonl"), tokenizer="scenes", images=64)
    assert len(metrics) == 4 and re.search(r"replaced by other samples: 3 × image will not decode: .*broken\.png", capsys.readouterr().out)


def test_a_real_command_line_prints_its_one_line_and_no_more(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--data", "gone.jsonl"],
                          capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode != 0 and re.fullmatch(r"error: .*gone\.jsonl.*\n", done.stderr) and not done.stdout
