"""tests/gpu_check.py without a GPU: its commands run on the CPU in its place, and its judges tell good from bad."""
import math
import re
import sys

import pytest
import torch

import benchmark_fused
import benchmark_step
import evaluate
import gpu_check
import train

NAMED = {part.name: part for part in gpu_check.PARTS}


@pytest.fixture(scope="module")
def dreamlip(tmp_path_factory):
    """-> the judgement on a training beside itself, the folder with both."""
    part = gpu_check.training("--method dreamlip", device="cpu", size="nano")
    out = tmp_path_factory.mktemp("a check")
    return gpu_check.run_part(part, out), out / "parts/losses-method-dreamlip"


@pytest.mark.parametrize("step, factor, passed", [
    (3, 1.002, False),
    (3, 1.0005, True),
    (9, 1.2, True),
    (9, math.nan, False),
])
def test_early_losses_must_be_near_and_all_finite(step, factor, passed, dreamlip, monkeypatch):
    cpu = gpu_check.losses(dreamlip[1] / "cpu")
    device = cpu.copy()
    device[step] *= factor
    of_name = {"cpu": cpu, "device": device}
    monkeypatch.setattr(gpu_check, "losses", lambda folder: of_name[folder.name])
    assert gpu_check.judge_losses("", dreamlip[1])[1] is passed


def test_an_evaluation_is_held_against_the_floors(dreamlip, tmp_path):
    evaluate.evaluate_run(dreamlip[1] / "device", n=40, figures=False, device="cpu", out=tmp_path)
    measured, passed = NAMED["evaluation"].judge("", tmp_path)
    assert passed and measured.startswith("40 images, zero-shot top-1 ")
    assert not NAMED["default run"].judge("", tmp_path)[1]


@pytest.mark.slow
def test_a_killed_run_that_was_resumed_has_the_same_weights(tmp_path):
    judged = gpu_check.run_part(gpu_check.resume(device="cpu", size="nano"), tmp_path)
    assert judged == ("0.0e+00, undisturbed 0.0e+00, resumed at step 16", True)


@pytest.mark.parametrize("again, killed, step, passed", [
    (1.0, 1.0, 16, True),
    (1.001, 1.002, 16, True),
    (1.001, 1.01, 16, False),
    (1.0, 1.0, 8, False),
])
def test_weights_further_apart_than_undisturbed_ones_fail(again, killed, step, passed, tmp_path):
    for name, value in dict(undisturbed=1.0, again=again, killed=killed).items():
        (tmp_path / name).mkdir()
        torch.save({"model": {"weight": torch.full((2, 2), value)}}, tmp_path / name / "checkpoint.pt")
    assert gpu_check.judge_resume(f"resuming at step {step} of 30", tmp_path)[1] is passed


def test_what_the_benchmark_of_the_loss_prints_is_read(capsys):
    for dtype in (torch.float32, torch.bfloat16):
        benchmark_fused.report(64, dtype, "cpu", repeats=1)
    judge = NAMED["fused loss"].judge
    assert re.fullmatch(r"[\d.]+ and [\d.]+", judge(capsys.readouterr().out, None)[0])
    fused = "fused      0.0001 s, 0.50 of plain, {} of gemms, 9 bytes\n"
    assert judge(fused.format(1.2) + fused.format(1.6), None) == ("1.2 and 1.6", True)
    assert not judge(fused.format(1.2) + fused.format(1.61), None)[1]
    assert not judge(fused.format(1.2), None)[1]


def test_what_the_benchmark_of_the_step_prints_is_read():
    judge = NAMED["step"].judge
    text = "padded               runs out of memory\n"
    for slower, faster in benchmark_step.COMPARED:
        text += f"{slower} / {faster}: 1.20\n"
    assert judge(text, None) == ("1.20 and 1.20", True)
    assert not judge(text.replace("compiled: 1.20", "compiled: 0.99"), None)[1]


def test_rows_of_texts_are_held_against_longer_ones(capsys):
    train.profile(dict(size="nano", batch=8, device="cpu", workers=0, eval_images=0), steps=2, warm=1)
    text = capsys.readouterr().out
    measured, passed = gpu_check.judge_profiles(text + text, None)
    assert passed and measured.count("images/s") == measured.count("(MFU)") == 2
    assert measured.endswith("; 1.00 times without the waiting for data")
    slower = re.sub(r"(backward|optimizer) +[\d.]+ ms", r"\1 999999.00 ms", text)
    assert not gpu_check.judge_profiles(slower + text, None)[1]


@pytest.mark.parametrize("name, text, passed", [
    ("build", "building ...\n/a/similarity_0.so\n", True),
    ("tests", "...\n31 passed, 400 deselected in 9.00s\n", True),
    ("tests", "...\n31 passed, 1 skipped, 400 deselected in 9.00s\n", False),
    ("sanitizer", "2 passed\n========= ERROR SUMMARY: 10 errors\n", False),
])
def test_text_is_judged(name, text, passed):
    assert NAMED[name].judge(text, None)[1] is passed


@pytest.mark.parametrize("limit, command, measured", [
    (1, "echo begun; sleep 60 & sleep 60", "exit code 124 .*not done in 1 s.; last line: begun"),
    (60, "echo first; echo ValueError: last; exit 3", "exit code 3 .*; last line: ValueError: last"),
    (60, "echo no run", "FileNotFoundError.*metrics.jsonl.*; last line: no run"),
])
def test_a_part_that_hangs_fails_or_leaves_nothing_is_a_failed_row(limit, command, measured, tmp_path):
    judged = gpu_check.run_part(gpu_check.Part("bad", "", command, limit, gpu_check.judge_losses), tmp_path)
    assert not judged[1]
    assert re.fullmatch(measured, judged[0])


@pytest.mark.parametrize("word, code, row", [
    ("goo", 0, "| good.so | a library | pass | good.so | echo good.so |"),
    ("ba", 1, "| bad | a library | FAIL | not to be seen in the output; last line: bad | echo bad |"),
])
def test_every_part_that_is_chosen_adds_its_row(word, code, row, tmp_path, monkeypatch):
    judge = NAMED["build"].judge
    parts = [gpu_check.Part(name, "a library", f"echo {name}", 60, judge) for name in ("good.so", "bad")]
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--only", word])
    table = tmp_path / "results.md"
    table.write_text("an earlier row\n")
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == code
    assert table.read_text() == f"an earlier row\n{row}\n"
