"""Killed, starved of disk, fed NaN: a run goes on and ends as if nothing had been, or says in one sentence why not.

    python -m pytest tests/test_resume.py -m slow -s                     the soak with 20 kills, and torch.compile
    torchrun --nproc_per_node=2 tests/test_resume.py --out runs/x ...    train.py, logging which samples each step saw
"""
import errno
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
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train  # noqa: E402
from data import UserError, training_loader  # noqa: E402
from test_train import LONG, RUN, at_call, batch_of, command_line, fit, fresh, read_lines  # noqa: E402

STEPS = 12  # of a LONG run


def load(path):
    return torch.load(path, weights_only=True)


def differing(a, b):
    """Names of the parts of two checkpoints that are not the same bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [""]
    if isinstance(a, (dict, list, tuple)):
        pairs = a.items() if isinstance(a, dict) else enumerate(a)
        return [f"{key}.{name}" for key, value in pairs for name in differing(value, b[key])]
    return [] if a == b else [""]


def same_state(a, b):
    parts = "model", "optimizer", "step"
    names = differing({k: a[k] for k in parts}, {k: b[k] for k in parts})
    print(f"{len(names)} parts differ: {', '.join(names[:8])}" if names else "all parts are the same")
    return not names


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("undisturbed") / "run", **LONG)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def test_the_newest_checkpoint_and_the_one_before_are_kept(tmp_path):
    fit(tmp_path / "run", **LONG, save_steps=5)
    steps = {path.name: load(path)["step"] for path in (tmp_path / "run").glob("*.pt")}
    assert steps == {"checkpoint.pt": 12, "checkpoint-1.pt": 10}


def full_disk():
    """No file may grow beyond 1,200 bytes: neither a checkpoint can be written, nor, before long, a line of metrics."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read_only():
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "replace", refuse)
    return patch.undo


@pytest.mark.parametrize("fault", [full_disk, read_only])
def test_a_disk_that_fails_costs_the_run_nothing_but_the_checkpoints_of_that_time(
        fault, tmp_path, monkeypatch, capsys, undisturbed):
    folder, mend = tmp_path / "run", []

    def break_disk():
        mend.append(fault())

    def mend_disk():
        mend.pop()()
        assert load(folder / "checkpoint.pt")["step"] == 4 and load(folder / "checkpoint-1.pt")["step"] == 2
        assert not list(folder.glob("*.tmp"))

    for call, action in ((5, break_disk), (9, mend_disk)):  # so the saves of steps 6 and 8 fail
        monkeypatch.setattr(train, "backward", at_call(call, action))
    try:
        checkpoint, lines = fit(folder, **LONG, save_steps=2)
    finally:
        for undo in mend:
            undo()
    said = [line for line in capsys.readouterr().out.splitlines() if "checkpoint.pt could not be written" in line]
    assert len(said) == 2 and same_state(checkpoint, undisturbed[0])
    assert {line["step"] for line in lines} >= {*range(1, 5), *range(9, 13)}


def test_weights_that_cannot_be_written_at_the_end_are_an_error_and_not_a_finished_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_whole", lambda *_, **__: False)
    with pytest.raises(UserError, match="make room in .* and --resume"):
        train.train({**RUN, "method": "clip", "images": 16, "out": str(tmp_path / "run")})
    assert not (tmp_path / "run/finished").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_byte])
def test_of_a_damaged_checkpoint_the_one_before_is_used_and_said(damage, tmp_path, capsys, monkeypatch, undisturbed):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", at_call(9, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit):
            fit(folder, **LONG, save_steps=4)
    damage(folder / "checkpoint.pt")
    (folder / "checkpoint.pt.tmp").write_bytes(b"what a killed run leaves behind")
    checkpoint, lines = fit(folder, **LONG, save_steps=4, resume="auto")
    out = capsys.readouterr().out
    assert "checkpoint.pt is not a whole checkpoint" in out and "checkpoint-1.pt at step 8" in out
    assert same_state(checkpoint, undisturbed[0]) and not list(folder.glob("*.tmp"))
    assert [(line["step"], line["loss"]) for line in lines] == [(a["step"], a["loss"]) for a in undisturbed[1]]


def test_the_best_weights_are_those_of_the_least_held_out_loss(tmp_path, monkeypatch):
    losses = [3.0, 2.0, 5.0, 1.5, 4.0, 6.0]
    remaining = list(losses)
    monkeypatch.setattr("evaluate.evaluate_run", lambda folder: None)
    monkeypatch.setattr(train, "held_out_loss", lambda run: remaining.pop(0))
    checkpoint, lines = fit(tmp_path / "run", method="clip", images=96, eval_steps=1, eval_images=16)
    assert [line["held_out_loss"] for line in lines] == losses and checkpoint["best"] == 1.5
    assert load(tmp_path / "run/best.pt")["step"] == 4


def test_the_held_out_loss_is_the_loss_of_the_held_out_images(tmp_path, monkeypatch):
    flags = dict(method="clip", images=32, eval_steps=2, eval_images=16, precision="fp32")
    monkeypatch.setattr("evaluate.evaluate_run", lambda folder: None)
    checkpoint, lines = fit(tmp_path / "run", **flags)
    s = train.resolve({**RUN, **flags})
    tokenizer, _, held_out = train.open_data(s, flags)
    network = fresh(s)
    network.load_state_dict(checkpoint["model"])
    batch, = training_loader(held_out, tokenizer, s, 0, 1)
    out = train.embed(network, batch.images, batch.tokens, batch.lengths, s)
    assert lines[-1]["held_out_loss"] == pytest.approx(train.method_loss(out, s)[0].item(), rel=1e-4)


@pytest.mark.parametrize("method", train.METHODS)
def test_no_random_generator_has_a_part_in_a_step_so_none_is_in_a_checkpoint(method, tmp_path, monkeypatch):
    flags, backward = dict(method=method, images=48, workers=0), train.backward
    expected, _ = fit(tmp_path / "one", **flags)

    def reseeded(*arguments):
        torch.manual_seed(time.time_ns())
        random.seed()
        return backward(*arguments)
    monkeypatch.setattr(train, "backward", reseeded)
    assert same_state(fit(tmp_path / "two", **flags)[0], expected)


def test_bad_samples_are_counted_over_the_whole_of_a_run_that_was_resumed(tmp_path, monkeypatch, capsys):
    (tmp_path / "set").mkdir()
    for i in range(24):
        Image.new("RGB", (32, 32), (10 * i, 0, 99)).save(tmp_path / f"set/{i}.png")
        (tmp_path / f"set/{i}.txt").write_text(f"picture {i}")
    for i in (5, 10, 15):
        (tmp_path / f"set/{i}.png").write_bytes(b"no picture")
    flags = {**RUN, "method": "clip", "data": str(tmp_path / "set"), "tokenizer": "scenes", "images": 96}
    _, whole = fit(tmp_path / "whole", **flags)
    replaced = re.findall("replaced by other samples: .*", capsys.readouterr().out)
    with monkeypatch.context() as patch:
        patch.setattr(train, "backward", at_call(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit):
            fit(tmp_path / "run", **flags)
    _, lines = fit(tmp_path / "run", **flags, resume="auto")
    assert [line["bad"] for line in lines] == [line["bad"] for line in whole] and whole[-1]["bad"] > whole[3]["bad"] > 3
    assert re.findall("replaced by other samples: .*", capsys.readouterr().out) == replaced and len(replaced) == 1


# ---- steps without a finite gradient ---------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ["NaN in the loss", "infinite gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(what, accumulate, monkeypatch):
    s = train.resolve({**RUN, "method": "dreamlip", "batch": 8, "accumulate": accumulate})
    state, network = train.prepare(fresh(s), s)
    batch = batch_of(s, 8)
    method_loss, counts = train.method_loss, []
    for broken in (False, True, True, False):
        before = [x.clone() for x in (*state.model.state_dict().values(), *moments(state))]
        with monkeypatch.context() as patch:
            if broken and what == "NaN in the loss":
                patch.setattr(train, "method_loss", lambda *x: poison(*method_loss(*x)))
            train.backward(network, batch, s, state.scaler)
        if broken and what == "infinite gradient":
            state.model.visual.proj.grad[0, 0] = math.inf
        norm = train.update(state, 0.01, s)
        after = [*state.model.state_dict().values(), *moments(state)]
        assert norm.isfinite() == (not broken)
        assert all(map(torch.equal, before, after)) == broken
        counts.append(state.skipped.tolist())
    assert counts == [[0, 0], [1, 1], [2, 2], [2, 0]] and state.step == 4


def moments(state):
    return [x for of_one in state.optimizer.state_dict()["state"].values() for x in of_one.values()]


def test_many_such_steps_in_a_row_stop_the_run_and_keep_the_last_good_weights(tmp_path, monkeypatch):
    method_loss, calls = train.method_loss, []

    def from_step_4(out, s, allowed):
        loss, parts = method_loss(out, s, allowed)
        calls.append(1)
        return loss * (math.nan if len(calls) > 3 else 1), parts
    monkeypatch.setattr(train, "method_loss", from_step_4)
    monkeypatch.setattr(train, "MAX_SKIPPED", 5)
    with pytest.raises(UserError, match="5 steps in a row, up to 8, .*: try a lower --lr"):
        fit(tmp_path / "run", **LONG)
    skipped = [(line["step"], line["skipped"], line["loss"]) for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert skipped[3:] == [(step, step - 3, None) for step in range(4, 9)] and skipped[2][1] == 0
    checkpoint = load(tmp_path / "run/checkpoint.pt")
    assert checkpoint["step"] == 8 and all(x.isfinite().all() for x in checkpoint["model"].values())
    assert not (tmp_path / "run/finished").exists()


# ---- two processes ---------------------------------------------------------------------------------------------------

def log_what_steps_see(folder):
    """train.backward and train.update, which write a line {step: checksums of its samples} when the step is done."""
    backward, update, seen = train.backward, train.update, []

    def watched_backward(network, batch, *rest):
        pairs = zip(batch.images, batch.tokens)
        seen[:] = [zlib.crc32(i.numpy().tobytes() + t[t > 0].numpy().tobytes()) for i, t in pairs]
        return backward(network, batch, *rest)

    def watched_update(state, lr, s):
        norm = update(state, lr, s)
        with open(folder / f"seen-{os.environ['RANK']}.jsonl", "a") as file:
            file.write(json.dumps({"step": state.step, "seen": seen, "pid": os.getpid()}) + "\n")
        return norm
    train.backward, train.update = watched_backward, watched_update


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "raise": lambda: json.loads("a mistake in the code"),
}


def process(rank, port, flags, log, faults):
    """One of two processes of a run. faults: {step: name in FAULTS}, which strikes in that step."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sys.argv[1:] = command_line(flags)
    folder = Path(flags["out"])
    folder.mkdir(exist_ok=True)
    for step, name in faults.items():
        if name == "nan":
            poison_step(step)
        elif name == "no data":
            loader = train.training_loader
            train.training_loader = lambda *x: ends_with_error(loader(*x), step)
        else:
            train.backward = at_call(step, FAULTS[name])
    log_what_steps_see(folder)
    train.main()


def poison_step(step):
    method_loss, calls = train.method_loss, []

    def poisoned(*arguments):
        loss, parts = method_loss(*arguments)
        calls.append(1)
        return poison(loss, parts) if len(calls) == step else (loss, parts)
    train.method_loss = poisoned


def poison(loss, parts):
    return loss * math.nan, parts


def ends_with_error(batches, step):
    for i, batch in enumerate(batches, 1):
        if i == step:
            raise UserError("this process finds no data")
        yield batch


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """two(out, faults of rank 0, faults of rank 1, **flags) runs two processes -> exit codes, what each printed.

    They are forked from a server that has imported everything, which takes most of a second process's time.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    logs = tmp_path_factory.mktemp("logs")

    def run(out, *faults, **flags):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        flags = {**RUN, **LONG, **flags, "out": str(out)}
        faults = faults or ({}, {})
        both = [context.Process(target=process, args=(rank, port, flags, str(logs / str(rank)), faults[rank]))
                for rank in range(2)]
        for p in both:
            p.start()
        for p in both:
            p.join(300)
            assert not p.is_alive(), "it hangs"
        return [p.exitcode for p in both], [(logs / str(rank)).read_text() for rank in range(2)]
    return run


@pytest.fixture(scope="module")
def undisturbed_two(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    codes, printed = two(folder)
    assert codes == [0, 0], printed
    seen = what_steps_saw(folder)
    assert len(seen) == STEPS and len({key for keys in seen.values() for key in keys}) == LONG["images"]
    return load(folder / "checkpoint.pt"), read_lines(folder / "metrics.jsonl"), seen


def what_steps_saw(folder):
    """{step: checksums of the samples it trained on, by rank}; a step done again must see the very same."""
    seen = defaultdict(dict)
    for path in sorted(folder.glob("seen-*.jsonl")):
        for line in path.read_text().splitlines():
            line = json.loads(line)
            assert seen[line["step"]].setdefault(path.name, line["seen"]) == line["seen"]
    return {step: [key for name in sorted(ranks) for key in ranks[name]] for step, ranks in sorted(seen.items())}


def as_undisturbed(folder, undisturbed_two):
    """Weights, moments and losses are those of the undisturbed run bit for bit; no sample is skipped or doubled."""
    checkpoint, lines, seen = undisturbed_two
    assert what_steps_saw(folder) == seen
    found = read_lines(folder / "metrics.jsonl")
    assert [(a["step"], a["loss"]) for a in found] == [(b["step"], b["loss"]) for b in lines]
    assert same_state(load(folder / "checkpoint.pt"), checkpoint)
    names = {path.name for path in folder.iterdir()} - {"seen-0.jsonl", "seen-1.jsonl"}
    assert names <= {"settings.json", "metrics.jsonl", "finished", "checkpoint.pt", "checkpoint-1.pt"}


def test_a_signal_to_one_of_two_stops_both_at_the_next_step_and_resumed_it_is_as_if_it_had_not_been(
        two, tmp_path, undisturbed_two):
    folder = tmp_path / "run"
    codes, printed = two(folder, {}, {5: "stop"}, log_every=1000)
    assert codes == [130, 130] and "stopped at step 5" in printed[0]
    assert load(folder / "checkpoint.pt")["step"] == 5
    codes, printed = two(folder, resume="auto")
    assert codes == [0, 0], printed
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(6, STEPS + 1))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in undisturbed_two[1][:5] + lines))
    as_undisturbed(folder, undisturbed_two)


@pytest.mark.parametrize("step", [2, 8])
def test_two_processes_killed_at_any_step_and_resumed_are_as_if_they_had_not_been(step, two, tmp_path, undisturbed_two):
    codes, _ = two(tmp_path / "run", {step: "kill"}, {step: "kill"}, save_steps=3)
    assert codes == [-signal.SIGKILL] * 2
    codes, printed = two(tmp_path / "run", save_steps=3, resume="auto")
    assert codes == [0, 0], printed
    as_undisturbed(tmp_path / "run", undisturbed_two)


def test_another_number_of_processes_and_workers_goes_on_at_the_same_sample(
        two, tmp_path, monkeypatch, undisturbed_two):
    codes, _ = two(tmp_path / "run", {7: "kill"}, {7: "kill"}, save_steps=3)
    assert codes == [-signal.SIGKILL] * 2
    for path in tmp_path.glob("run/seen-*"):
        path.unlink()
    for name in ("backward", "update"):
        monkeypatch.setattr(train, name, getattr(train, name))  # to be put back
    monkeypatch.setenv("RANK", "0")
    log_what_steps_see(tmp_path / "run")
    checkpoint, lines = fit(tmp_path / "run", **LONG, workers=1, resume="auto")
    assert what_steps_saw(tmp_path / "run") == {step: undisturbed_two[2][step] for step in range(7, STEPS + 1)}
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in undisturbed_two[1]], abs=2e-3)


@pytest.mark.parametrize("fault, says", [("kill", None), ("raise", "JSONDecodeError"),
                                         ("no data", "error: this process finds no data")])
def test_when_one_of_two_fails_the_other_ends_too_with_one_sentence(fault, says, two, tmp_path):
    codes, printed = two(tmp_path / "run", {}, {4: fault})
    assert 0 not in codes
    errors = [line for text in printed for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in printed[0], printed
    if fault == "no data":
        assert errors == [says]
    else:
        assert "process 0 lost another one" in errors[0] and (says is None or says in printed[1])


def test_nan_on_one_of_two_skips_the_step_on_both(two, tmp_path):
    codes, printed = two(tmp_path / "run", {}, {3: "nan"})
    assert codes == [0, 0] and "1 steps were skipped" in printed[0], printed
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * 10 and lines[2]["loss"] is None
    assert all(math.isfinite(line["loss"]) for line in lines if line["step"] != 3)


# ---- soak ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kills, images", [(2, 640), pytest.param(20, 5_120, marks=pytest.mark.slow)])
def test_a_run_whose_processes_are_killed_at_random_moments_ends_as_the_undisturbed_one(kills, images, two, tmp_path):
    """torchrun starts both processes again after each kill -9 of one of them, and they go on by themselves."""
    flags = {**RUN, **LONG, "images": images, "save_steps": 5}
    codes, printed = two(tmp_path / "whole", **flags)
    assert codes == [0, 0], printed
    folder, rng, log = tmp_path / "run", random.Random(kills), tmp_path / "log"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={kills}"]
    with open(log, "w") as file:
        run = subprocess.Popen([sys.executable, *launcher, __file__, *command_line({**flags, "out": folder})],
                               stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})  # as in `two`
    def steps_done():
        return len((folder / "seen-0.jsonl").read_text().splitlines()) if (folder / "seen-0.jsonl").exists() else 0

    killed = 0
    try:
        while killed < kills and run.poll() is None:
            goal = steps_done() + rng.randrange(images // 16 // kills - 5)  # 0: while they start
            while steps_done() < goal and run.poll() is None:
                time.sleep(0.05)
            time.sleep(rng.random())
            processes = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            if processes:
                os.kill(int(rng.choice(processes)), signal.SIGKILL)
                killed += 1
        assert run.wait(300) == 0 and killed == kills, log.read_text()[-3000:]
    finally:
        run.terminate()
    whole = load(tmp_path / "whole/checkpoint.pt"), read_lines(tmp_path / "whole/metrics.jsonl")
    as_undisturbed(folder, (*whole, what_steps_saw(tmp_path / "whole")))
    attempts = {json.loads(line)["pid"] for line in (folder / "seen-0.jsonl").read_text().splitlines()}
    print(f"{kills} kills, {len(attempts)} attempts that did a step, {len(whole[1])} steps")


if __name__ == "__main__":
    out = Path(train.parse_flags()["out"])
    out.mkdir(exist_ok=True)
    log_what_steps_see(out)
    train.main()
