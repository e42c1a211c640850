"""Killed, starved of disk, fed NaN: a run goes on and ends as if nothing had been, or says in one sentence why not.

    torchrun --nproc_per_node=2 --max-restarts=2 tests/test_resume.py --out runs/x ...    train.py, killed twice
"""
import copy
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
from signal import SIGKILL

import pytest
import torch
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.utils._pytree import tree_leaves

from conftest import ROOT  # first: it puts the repository on the path
import train
from data import UserError
from test_train import RUN, batch_of, command_line, fit, fresh, load, read_lines, settings

STEPS = 12
LONG = dict(method="dreamlip", images=16 * STEPS)


def assert_same(a, b):
    """Two checkpoints have the same weights, moments and step, bit for bit."""
    for part in ("model", "optimizer", "step"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def losses_by_step(lines):
    return [(line["step"], line["loss"]) for line in lines]


def at_call(n, action, *what):
    """train.backward, doing action(*what) when it is called for the n-th time."""
    backward = train.backward
    calls = itertools.count(1)

    def wrapped(*arguments):
        if next(calls) == n:
            action(*what)
        return backward(*arguments)
    return wrapped


def stopped(step, folder, monkeypatch, **flags):
    """Trains in this process until a signal comes in this step."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", at_call(step, signal.raise_signal, signal.SIGINT))
        with pytest.raises(SystemExit) as end:
            fit(folder, **flags)
    assert end.value.code == 130
    assert load(folder / "checkpoint.pt")["step"] == step


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("undisturbed") / "run", **LONG)


# ---- one process -----------------------------------------------------------------------------------------------------

def test_a_full_disk_costs_the_checkpoints_of_that_time_and_at_the_end_is_an_error(
        tmp_path, monkeypatch, capsys, undisturbed):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = (1200, limits[1])  # no file grows beyond this: soon no checkpoint and no line of metrics is written
    for step, size in ((5, full), (9, limits), (11, full)):  # so the saves of steps 6, 8 and 12 fail
        monkeypatch.setattr(train, "backward", at_call(step, resource.setrlimit, resource.RLIMIT_FSIZE, size))
    try:
        with pytest.raises(UserError, match="make room in .* --resume"):
            fit(tmp_path, **LONG, save_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "finished").exists()
    assert capsys.readouterr().out.count("checkpoint.pt could not be written") == 3
    assert load(tmp_path / "checkpoint.pt")["step"] == 10
    assert load(tmp_path / "checkpoint-1.pt")["step"] == 4
    checkpoint, lines = fit(tmp_path, **LONG, resume=str(tmp_path))
    assert_same(checkpoint, undisturbed[0])
    assert {line["step"] for line in lines} >= {1, 2, 3, 4, 9, 10, 11, 12}


def test_an_evaluation_that_cannot_be_written_costs_no_weights(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("no space left on device")

    monkeypatch.setattr("evaluate.evaluate_run", fail)
    with pytest.raises(UserError, match="weights are in .*no space left.*python evaluate.py"):
        fit(tmp_path, **LONG, eval_images=16)
    assert load(tmp_path / "checkpoint.pt")["step"] == STEPS
    assert not (tmp_path / "finished").exists()


def test_of_a_damaged_checkpoint_the_one_before_is_used_and_said(tmp_path, capsys, monkeypatch, undisturbed):
    newest = tmp_path / "checkpoint.pt"
    stopped(9, tmp_path, monkeypatch, **LONG, save_steps=4)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (tmp_path / "checkpoint.pt.tmp").touch()  # what a killed run leaves behind
    train.train(dict(resume=str(tmp_path)))  # what else there was to say, the folder knows
    checkpoint, lines = load(newest), read_lines(tmp_path / "metrics.jsonl")
    printed = capsys.readouterr().out
    assert "checkpoint.pt is not a whole checkpoint" in printed
    assert "checkpoint-1.pt at step 8" in printed
    assert (tmp_path / "damaged.pt").exists()
    assert_same(checkpoint, undisturbed[0])
    assert losses_by_step(lines) == losses_by_step(undisturbed[1])
    assert not list(tmp_path.glob("*.tmp"))


def test_the_best_weights_are_those_of_the_least_held_out_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.evaluate_run", lambda folder: None)
    # The learning rate is too high, so that the loss does not fall to the end.
    flags = dict(method="clip", images=96, lr=0.1, schedule="cosine", eval_steps=1, eval_images=15, accumulate=2)
    checkpoint, lines = fit(tmp_path, **flags)
    losses = [line["held_out_loss"] for line in lines]
    best = load(tmp_path / "best.pt")
    assert losses[best["step"] - 1] == min(losses) < losses[-1]
    assert checkpoint["best"] == pytest.approx(min(losses))
    run = train.open_run({**RUN, **flags}, writes=False)
    run.state.model.load_state_dict(best["model"])
    run.state.best = 0.0  # nothing is saved
    sizes = []
    run.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    assert train.held_out_loss(run) == pytest.approx(min(losses))
    assert sizes == [8, 7]


def test_a_resumed_run_is_checked_with_its_folders_settings(tmp_path):
    fit(tmp_path, images=12, batch=12)
    train.train(dict(resume=str(tmp_path), accumulate=3))  # of 12 images, not of the default's 64


def test_a_checkpoint_may_have_old_settings_and_lack_new_ones():
    s = settings("")
    assert train.check_resumed("run", {"old": 1, "lr": s.lr}, s, ["lr", "batch"]) == {"lr": s.lr}


def test_bad_samples_are_counted_over_the_whole_of_a_run_that_was_resumed(tmp_path, monkeypatch, capsys):
    names = [f"{i}.png" for i in range(24)]
    for name in names[3:]:  # the first three pictures are missing
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    lines = [json.dumps({"image": name, "caption": "a picture"}) for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    flags = dict(method="clip", data=str(tmp_path / "captions.jsonl"), tokenizer="scenes", images=96)
    _, whole = fit(tmp_path / "whole", **flags)
    counts = [line["bad"] for line in whole]
    stopped(4, tmp_path / "run", monkeypatch, **flags)
    _, lines = fit(tmp_path / "run", **flags, resume="auto")
    assert f"replaced by other samples: {counts[-1]} × " in capsys.readouterr().out
    assert [line["bad"] for line in lines] == counts
    assert counts[5] > counts[3] > 3
    with pytest.raises(UserError, match="over --max-bad"):
        fit(tmp_path / "longer", **flags | {"images": 400})
    assert 0 < load(tmp_path / "longer" / "checkpoint.pt")["step"] < 25


# ---- steps without a finite gradient ---------------------------------------------------------------------------------

def poisoned(first, last, factor=math.nan):
    """train.method_loss, whose loss is multiplied by the factor from the first of these calls to the last."""
    method_loss = train.method_loss
    calls = itertools.count(1)

    def wrapped(*arguments):
        loss, parts = method_loss(*arguments)
        if first <= next(calls) <= last:
            loss = loss * factor
        return loss, parts
    return wrapped


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(factor, accumulate, monkeypatch):
    monkeypatch.setattr(train, "method_loss", poisoned(2, 3, factor))
    s = settings("--method dreamlip", batch=8, accumulate=accumulate)
    state, network = train.prepare(fresh(s), s)
    batch = batch_of(s, 8)
    train.backward(network, batch, s)
    train.update(state, 0.01, s)
    weights_and_moments = tree_leaves([state.model.state_dict(), state.optimizer.state_dict()["state"]])
    for broken, skipped in ((True, [1, 1]), (True, [2, 2]), (False, [2, 0])):
        before = copy.deepcopy(weights_and_moments)
        train.backward(network, batch, s)
        train.update(state, 0.01, s)
        unchanged = all(map(torch.equal, before, weights_and_moments))
        assert unchanged == broken
        assert state.skipped.tolist() == skipped
    assert state.step == 4


def test_many_such_steps_stop_the_run_and_keep_the_last_good_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "method_loss", poisoned(4, STEPS))
    monkeypatch.setattr(train, "MAX_SKIPPED", 5)
    with pytest.raises(UserError, match="5 steps in a row, up to 8, .*: try a lower --lr"):
        fit(tmp_path, **LONG)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines[3:]] == [None] * 5
    checkpoint = load(tmp_path / "checkpoint.pt")
    for weights in checkpoint["model"].values():
        assert weights.isfinite().all()


# ---- processes of their own ------------------------------------------------------------------------------------------

def fail():
    raise UserError("this process finds no data")


def process(rank, environment, flags, log, fault, step):
    """One process of a run, which in this step suffers this fault."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv[1:] = command_line(flags)
    if fault == "nan":
        train.method_loss = poisoned(step, step)
    elif fault == "error":
        train.backward = at_call(step, fail)
    elif fault:
        train.backward = at_call(step, signal.raise_signal, fault)
    train.main()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(folder, [fault of each process, "": none], step, **flags) -> exit codes, what each printed. Without a fault
    all must end well.

    The processes are forked from a server that has imported everything, which takes most of a process's time.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    logs = tmp_path_factory.mktemp("logs")

    def run(out, faults, step=0, **flags):
        environment = dict(WORLD_SIZE=str(len(faults)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(get_free_port()))
        flags = {**RUN, **LONG, **flags, "out": str(out)}
        processes = []
        for rank, fault in enumerate(faults):
            arguments = rank, environment, flags, logs / str(rank), fault, step
            processes.append(context.Process(target=process, args=arguments))
            processes[rank].start()
        for p in processes:
            p.join(300)
            assert not p.is_alive(), "it hangs"
        printed = [(logs / str(rank)).read_text() for rank in range(len(faults))]
        codes = [p.exitcode for p in processes]
        assert any(faults) or not any(codes), printed
        return codes, printed
    return run


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def whole(request, start, tmp_path_factory):
    """An undisturbed run: its folder and the number of processes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder, [""] * request.param)
    return folder, request.param


def assert_as_undisturbed(folder, whole):
    """Weights, moments and the loss of every step are the same bit for bit; so were the samples."""
    lines = read_lines(folder / "metrics.jsonl")
    assert losses_by_step(lines) == losses_by_step(read_lines(whole / "metrics.jsonl"))
    assert_same(load(folder / "checkpoint.pt"), load(whole / "checkpoint.pt"))
    left = {path.name for path in folder.iterdir()}
    assert left == {"settings.json", "metrics.jsonl", "finished", "checkpoint.pt", "checkpoint-1.pt"}


@pytest.mark.parametrize("fault, step, code", [
    (SIGKILL, 2, -SIGKILL),
    (SIGKILL, 8, -SIGKILL),
    (signal.SIGTERM, 5, 130),
])
def test_killed_or_stopped_and_resumed_a_run_is_as_if_it_had_not_been(fault, step, code, start, whole, tmp_path):
    """The fault strikes one process; no other may go on without it."""
    folder, processes = whole
    codes, printed = start(tmp_path / "run", ["", fault][-processes:], step, save_steps=3)
    assert codes[-1] == code and 0 not in codes, printed
    start(tmp_path / "run", [""] * processes, save_steps=3, resume="auto")
    assert_as_undisturbed(tmp_path / "run", folder)


def test_another_number_of_processes_goes_on_at_the_same_sample(start, whole, tmp_path):
    folder, processes = whole
    start(tmp_path / "run", [SIGKILL] * processes, 7, save_steps=3)
    start(tmp_path / "run", [""] * (3 - processes), resume="auto", workers=1)
    losses = dict(losses_by_step(read_lines(tmp_path / "run/metrics.jsonl")))
    assert losses == pytest.approx(dict(losses_by_step(read_lines(folder / "metrics.jsonl"))), abs=2e-3)


@pytest.mark.parametrize("fault, cause", [
    (SIGKILL, ""),
    ("error", "error: this process finds no data"),
])
def test_when_one_of_two_fails_the_other_ends_too_with_one_sentence(fault, cause, start, tmp_path):
    codes, printed = start(tmp_path / "run", ["", fault], 4)
    assert 0 not in codes
    assert re.findall("^error: process 0 lost another one", printed[0], re.M)
    assert cause in printed[1]
    assert "Traceback" not in printed[0]


def test_nan_on_one_of_two_skips_the_step_on_both(start, tmp_path):
    codes, printed = start(tmp_path / "run", ["", "nan"], 3, eval_steps=6, eval_images=8)
    assert codes == [0, 0], printed
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * 10
    assert [line["step"] for line in lines if line["loss"] is None] == [3]
    assert "held_out_loss" in lines[-1]


def test_under_torchrun_a_run_outlives_kills_by_itself(start, tmp_path):
    """This file, run by torchrun, kills one process and then the other: see its end."""
    flags = {**RUN, "images": 16 * 20, "save_steps": 5}
    start(tmp_path / "whole", ["", ""], **flags)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    arguments = command_line({**flags, "out": tmp_path / "run"})
    done = subprocess.run([*launcher, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    assert re.findall(r"resuming .* at step (\d+) of 20", done.stdout) == ["5", "10"]
    assert_as_undisturbed(tmp_path / "run", tmp_path / "whole")


def test_restarts_on_several_machines_want_a_store_of_their_own(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(None, 0, 16)]))
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        train.join_group(settings("--method clip"))


def test_a_run_that_may_be_restarted_wants_a_folder_of_its_own(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(train.UserError, match="name it with --out"):
        train.train(dict(size="nano"))


if __name__ == "__main__":
    if int(os.environ["RANK"]) == train.restarts():
        train.backward = at_call(7, signal.raise_signal, SIGKILL)
    train.main()
