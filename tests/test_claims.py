"""Rows are flags that train, claims compare rows in measures that there are, intervals are Student's; what is done is
kept and passed over; a signal or a failure ends the command in a sentence and leaves no process."""
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import claims
import train
from data import UserError

NANO = "--size nano --batch 16 --workers 0 --device cpu"


def test_every_row_trains_and_every_claim_compares_rows_that_there_are(tmp_path):
    folders = set()
    for row, runs in claims.list_runs(tmp_path, list(claims.ROWS), 2, 1000).items():
        for seed, run in enumerate(runs):
            s = train.resolve(train.parse_flags(["--device", "cpu", *run.flags]))
            assert (s.seed, s.images) == (seed, 1000 * claims.TIMES.get(row, 1))
            folders.add(run.folder)
        train.build(s)
    assert len(folders) == 2 * len(claims.ROWS)

    compared = set()
    for claim in claims.CLAIMS:
        assert claim.measure in claims.MEASURES
        compared |= {claim.better, claim.than}
    assert compared == claims.ROWS.keys()


def test_intervals_are_students_over_the_paired_differences():
    stats = pytest.importorskip("scipy.stats")
    for n in range(2, 11):
        differences = np.arange(n) ** 2
        expected = stats.t.ppf(0.975, n - 1) * stats.sem(differences)
        assert claims.interval(differences) == pytest.approx(expected, rel=1e-3)
    assert claims.interval(np.ones(1)) == np.inf


def test_runs_are_trained_measured_and_when_done_passed_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "COMMON", NANO)
    command = [str(tmp_path), "--rows", "raw (CLIP)", "M2M, 5 MLPs", "--seeds", "1", "--jobs", "2", "--train-images"]
    claims.main([*command, "64"])
    written = (tmp_path / "claims.md").read_text()
    assert "| M2M, 5 MLPs |" in written and "| long alone |" not in written
    assert written in capsys.readouterr().out
    assert not (tmp_path / "claims.png").exists()  # there are no two rows to compare

    # an evaluation that was cut short is no evaluation
    (tmp_path / "raw-CLIP-0" / "evaluation.json").write_text('{"metrics": ')
    claims.main([*command, "64"])
    assert (tmp_path / "claims.md").read_text() == written

    # again: nothing is started; and what was trained with other flags is not taken for the same
    monkeypatch.setattr(subprocess, "Popen", None)
    claims.main([*command, "64"])
    assert (tmp_path / "claims.md").read_text() == written
    with pytest.raises(UserError, match="trained with other flags"):
        claims.main([*command, "128"])


def pretend(run):
    """A result in which the second seed is 2 above the first, and the short texts of `long alone` are 50 below all."""
    value = 60.0 + 2 * int(run.folder[-1])
    metrics = {name: dict(value=value, chance=7.0) for names in claims.MEASURES.values() for name in names}
    if run.row == "long alone":
        metrics["short T2I R@1"] = metrics["short I2T R@1"] = dict(value=value - 50, chance=7.0)
    return dict(metrics=metrics, settings=dict(precision=run.folder[-1]))


def test_tables_and_figures_show_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims.Run, "result", pretend)
    for seeds in (1, 2):  # of a single seed the intervals have no end
        claims.main([str(tmp_path), "--seeds", str(seeds)])
        assert (tmp_path / "claims.png").is_file()
    assert capsys.readouterr().out.count("of one precision only") == 1
    written = (tmp_path / "claims.md").read_text()
    assert "21 rows × 2 seeds, 2562 minutes" in written
    assert "| raw (CLIP) | 61.0 ± 1.4 | 61.0 ± 1.4 |" in written
    assert "| long alone | 11.0 ± 1.4 | 61.0 ± 1.4 |" in written
    assert "| chance | 7.0 ± 0.0 |" in written
    assert "*raw (CLIP)* over *long alone* | short R@1 | +50.0 | 0.0 | **holds** | 1.00 × |" in written


def test_a_verdict_is_of_the_whole_interval():
    claim = claims.Claim("paper", "better", "a", "b", "zero-shot")

    def verdict(*differences):
        better = {"zero-shot": np.array(differences)}
        than = {"zero-shot": np.zeros(len(differences))}
        return claims.judge(claim, {"a": better, "b": than})[2]

    assert verdict(5.0, 6.0, 7.0) == "holds"
    assert verdict(-5.0, -6.0, -7.0) == "does not hold"
    assert verdict(-1.0, 3.0, 4.0) == verdict(9.0) == "not told apart"


def test_a_row_that_fails_ends_in_a_sentence_with_the_last_words_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "COMMON", NANO + " --accumulate 5")
    with pytest.raises(UserError, match="raw-CLIP-0 ended with code 1 .*--batch 16.*run the same command again"):
        claims.main([str(tmp_path), "--rows", "raw (CLIP)", "--seeds", "1"])


def test_runs_are_dealt_over_the_gpus_that_are_visible(tmp_path, monkeypatch):
    started = []

    def popen(command, env, **_):
        gpu = env["CUDA_VISIBLE_DEVICES"]
        started.append((command[command.index("--run") + 1], gpu))
        # the first run lasts until all have been started
        return SimpleNamespace(poll=lambda: 0 if gpu == "5" or len(started) == 3 else None)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(claims.Run, "result", lambda run: {} if run.process else None)
    runs = claims.list_runs(tmp_path, ["O2O", "O2M", "long alone"], 1, 1000)
    claims.train_runs([run for run, in runs.values()], 2)
    assert started == [("O2O", "3"), ("O2M", "5"), ("long alone", "5")]


def wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it does not come true")


@pytest.mark.skipif(not shutil.which("pgrep"), reason="no pgrep here")
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT], [signal.SIGKILL]])
def test_a_signal_ends_the_command_saves_the_runs_and_leaves_no_process(signals, tmp_path):
    metrics = tmp_path / "raw-CLIP-0/metrics.jsonl"
    command = [sys.executable, claims.__file__, str(tmp_path), "--rows", "raw (CLIP)", "raw, whole long", "--jobs", "2",
               "--seeds", "1", "--train-images", "10_000_000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: metrics.exists() and metrics.read_text())  # it has done some steps
    for number in signals:
        os.kill(process.pid, number)
    printed = process.communicate(timeout=60)[0]
    wait_until(lambda: subprocess.run(["pgrep", "-f", str(tmp_path)]).returncode == 1)  # it finds none
    assert list(tmp_path.glob("raw-CLIP-0/checkpoint*"))
    if signals != [signal.SIGKILL]:
        assert process.returncode == 130
        assert printed.splitlines() == ["stopped: what is done is kept; to resume, run the same command"]
