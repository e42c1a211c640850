"""Killed, starved of disk, fed NaN: a run goes on and ends as if nothing had been, or says in one sentence why not.

    torchrun --nproc_per_node=2 tests/test_resume.py --out runs/x ...    train.py, logging which samples each step saw
"""
import copy
import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train  # noqa: E402
from data import UserError, training_loader  # noqa: E402
from test_train import RUN, batch_of, command_line, fit, fresh, load, read_lines, settings  # noqa: E402

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
    assert not (folder / "finished").exists()
    assert load(folder / "checkpoint.pt")["step"] == step


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("undisturbed") / "run", **LONG)


# ---- one process -----------------------------------------------------------------------------------------------------

def test_a_full_disk_costs_nothing_but_the_checkpoints_of_that_time(tmp_path, monkeypatch, capsys, undisturbed):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def room(size):
        """No file grows beyond this: soon no checkpoint and no line of metrics is written."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        if size == limits[0]:
            assert load(tmp_path / "checkpoint.pt")["step"] == 4
            assert load(tmp_path / "checkpoint-1.pt")["step"] == 2

    monkeypatch.setattr(train, "backward", at_call(5, room, 1200))  # so the saves of steps 6 and 8 fail
    monkeypatch.setattr(train, "backward", at_call(9, room, limits[0]))
    try:
        checkpoint, lines = fit(tmp_path, **LONG, save_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().out.count("checkpoint.pt could not be written") == 2
    assert_same(checkpoint, undisturbed[0])
    assert {line["step"] for line in lines} >= {1, 2, 3, 4, 9, 10, 11, 12}


def test_weights_that_cannot_be_written_at_the_end_are_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="make room in .* and --resume"):
        fit(tmp_path, method="clip", images=16)
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
    assert_same(checkpoint, undisturbed[0])
    assert losses_by_step(lines) == losses_by_step(undisturbed[1])
    assert not list(tmp_path.glob("*.tmp"))


def test_the_best_weights_are_those_of_the_least_held_out_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.evaluate_run", lambda folder: None)
    # The learning rate is too high, so that the loss does not fall to the end.
    checkpoint, lines = fit(tmp_path, method="clip", images=96, lr=0.1, eval_steps=1, eval_images=16)
    losses = [line["held_out_loss"] for line in lines]
    best = load(tmp_path / "best.pt")
    assert losses[best["step"] - 1] == min(losses) < losses[-1]
    s = settings("--method clip --eval-images 16")
    tokenizer, _, held_out = train.open_data(s, {})
    network = train.build(s)
    network.load_state_dict(best["model"])
    batch, = training_loader(held_out, tokenizer, s, 0, 1)
    loss, _ = train.backward(network, batch, s)
    assert loss.item() == pytest.approx(min(losses), rel=1e-4)
    assert checkpoint["best"] == pytest.approx(min(losses), rel=1e-4)


def test_bad_samples_are_counted_over_the_whole_of_a_run_that_was_resumed(tmp_path, monkeypatch, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(24):
        (pictures / f"{i}.txt").write_text(f"picture {i}")
        Image.new("RGB", (32, 32)).save(pictures / f"{i}.png")
    for i in (5, 10, 15):
        (pictures / f"{i}.png").write_bytes(b"no picture")
    flags = dict(method="clip", data=str(pictures), tokenizer="scenes", images=96)
    _, whole = fit(tmp_path / "whole", **flags)
    counts = [line["bad"] for line in whole]
    stopped(4, tmp_path / "run", monkeypatch, **flags)
    _, lines = fit(tmp_path / "run", **flags, resume="auto")
    assert f"replaced by other samples: {counts[-1]} × " in capsys.readouterr().out
    assert [line["bad"] for line in lines] == counts
    assert counts[5] > counts[3] > 3


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

    def weights_and_moments():
        return tree_leaves([state.model.state_dict(), state.optimizer.state_dict()["state"]])

    counts = []
    for broken in (False, True, True, False):
        before = copy.deepcopy(weights_and_moments())
        train.backward(network, batch, s)
        train.update(state, 0.01, s)
        unchanged = all(map(torch.equal, before, weights_and_moments()))
        assert unchanged == broken
        counts.append(state.skipped.tolist())
    assert counts == [[0, 0], [1, 1], [2, 2], [2, 0]]
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

def log_what_steps_see(folder, fails_at=0):
    """Every batch that train.py takes adds a line with its step and a checksum to seen-RANK.jsonl. The data end in an
    error where a step fails."""
    loader = train.training_loader

    def watched(dataset, tokenizer, s, first, last, rank, world):
        batches = loader(dataset, tokenizer, s, first, last, rank, world)
        for step, batch in enumerate(batches, first + 1):
            if step == fails_at:
                raise UserError("this process finds no data")
            content = batch.images.numpy().tobytes() + batch.tokens.numpy().tobytes()
            with open(folder / f"seen-{rank}.jsonl", "a") as file:
                print(json.dumps({"step": step, "seen": zlib.crc32(content)}), file=file)
            yield batch

    train.training_loader = watched


def process(rank, environment, flags, log, fault, step):
    """One process of a run, which in this step suffers this fault."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv[1:] = command_line(flags)
    folder = Path(flags["out"])
    folder.mkdir(exist_ok=True)
    if isinstance(fault, signal.Signals):
        train.backward = at_call(step, signal.raise_signal, fault)
    if fault == "raise":
        train.backward = at_call(step, json.loads, "a mistake in the code")
    if fault == "nan":
        train.method_loss = poisoned(step, step)
    log_what_steps_see(folder, step if fault == "no data" else 0)
    train.main()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(folder, [fault of each process, "": none], step, **flags) -> exit codes, what each printed.

    The processes are forked from a server that has imported everything, which takes most of a process's time.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    logs = tmp_path_factory.mktemp("logs")

    def run(out, faults, step=0, **flags):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        environment = dict(WORLD_SIZE=str(len(faults)), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
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
        return [p.exitcode for p in processes], printed
    return run


NONE = {1: [""], 2: ["", ""]}  # no fault, by the number of processes


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def whole(request, start, tmp_path_factory):
    """An undisturbed run: its folder and the number of processes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    codes, printed = start(folder, NONE[request.param])
    assert set(codes) == {0}, printed
    return folder, request.param


def samples_seen(folder):
    """{(file of the process, step): checksum of what it trained on}; a step done again must see the very same."""
    seen = {}
    for path in folder.glob("seen-*.jsonl"):
        for line in read_lines(path):
            assert seen.setdefault((path.name, line["step"]), line["seen"]) == line["seen"]
    return seen


def assert_as_undisturbed(folder, whole):
    """Weights, moments and losses are the same bit for bit, and no sample is skipped or doubled."""
    assert samples_seen(folder) == samples_seen(whole)
    lines = read_lines(folder / "metrics.jsonl")
    assert losses_by_step(lines) == losses_by_step(read_lines(whole / "metrics.jsonl"))
    assert_same(load(folder / "checkpoint.pt"), load(whole / "checkpoint.pt"))
    left = {path.name for path in folder.iterdir() if "seen" not in path.name}
    assert left <= {"settings.json", "metrics.jsonl", "finished", "checkpoint.pt", "checkpoint-1.pt"}


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
    codes, printed = start(tmp_path / "run", NONE[processes], save_steps=3, resume="auto")
    assert set(codes) == {0}, printed
    assert_as_undisturbed(tmp_path / "run", folder)


def test_another_number_of_processes_goes_on_at_the_same_sample(start, whole, tmp_path):
    folder, processes = whole
    start(tmp_path / "run", [SIGKILL] * processes, 7, save_steps=3)
    codes, printed = start(tmp_path / "run", NONE[3 - processes], resume="auto", workers=1)
    assert set(codes) == {0}, printed
    losses = dict(losses_by_step(read_lines(tmp_path / "run/metrics.jsonl")))
    assert losses == pytest.approx(dict(losses_by_step(read_lines(folder / "metrics.jsonl"))), abs=2e-3)


@pytest.mark.parametrize("fault, cause", [
    (SIGKILL, ""),
    ("raise", "JSONDecodeError"),
    ("no data", "error: this process finds no data"),
])
def test_when_one_of_two_fails_the_other_ends_too_with_one_sentence(fault, cause, start, tmp_path):
    codes, printed = start(tmp_path / "run", ["", fault], 4)
    assert 0 not in codes
    assert re.findall("^error: process 0 lost another one", printed[0], re.M)
    assert cause in printed[1]
    assert "Traceback" not in printed[0]


def test_nan_on_one_of_two_skips_the_step_on_both(start, tmp_path):
    codes, printed = start(tmp_path / "run", ["", "nan"], 3)
    assert codes == [0, 0], printed
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * 10
    assert [line["step"] for line in lines if line["loss"] is None] == [3]


def kill_one(run, folder):
    """Kills one of torchrun's processes after five more steps."""
    log = folder / "seen-0.jsonl"
    log.touch()
    goal = len(read_lines(log)) + 5
    while len(read_lines(log)) < goal:
        assert run.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(random.choice(children)), SIGKILL)


def test_under_torchrun_a_run_outlives_kills_by_itself(start, tmp_path):
    flags = {**RUN, "images": 16 * 40, "save_steps": 5}
    codes, printed = start(tmp_path / "whole", NONE[2], **flags)
    assert codes == [0, 0], printed
    folder = tmp_path / "run"
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    command = [sys.executable, *launcher, __file__, *command_line({**flags, "out": folder})]
    run = subprocess.Popen(command)
    try:
        kill_one(run, folder)
        kill_one(run, folder)
        assert run.wait(300) == 0
    finally:
        run.terminate()
    assert_as_undisturbed(folder, tmp_path / "whole")


if __name__ == "__main__":
    log_what_steps_see(Path(train.parse_flags()["out"]))
    train.main()
