"""tests/gpu_check.py without a GPU: its commands run on the CPU in its place, and its judges tell good from bad."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import benchmark_fused  # noqa: E402
import benchmark_step  # noqa: E402
import evaluate  # noqa: E402
import gpu_check  # noqa: E402
import train  # noqa: E402

NAMED = {part.name: part for part in gpu_check.PARTS}


@pytest.fixture(scope="module")
def dreamlip(tmp_path_factory):
    """-> the row of a training beside itself, the folder with both."""
    part = gpu_check.training("--method dreamlip", device="cpu", size="nano")
    out = tmp_path_factory.mktemp("a check")
    return gpu_check.run_part(part, out), out / "parts/losses-method-dreamlip"


def test_a_training_is_as_far_from_itself_as_nothing(dreamlip):
    row, _ = dreamlip
    assert (row["result"], row["measured"]) == ("pass", "0.0e+00, at the end 0.0e+00; 30 finite")


@pytest.mark.parametrize("step, change, passed", [
    (3, 1.002, False), (3, 1.0005, True), (9, 1.2, True), (9, None, False)])
def test_early_losses_must_be_near_and_all_finite(step, change, passed, dreamlip, tmp_path):
    shutil.copytree(dreamlip[1], tmp_path, dirs_exist_ok=True)
    losses = gpu_check.losses(tmp_path / "device").tolist()
    losses[step] = change and change * losses[step]
    lines = [json.dumps({"loss": loss}) for loss in losses]
    (tmp_path / "device/metrics.jsonl").write_text("\n".join(lines))
    assert gpu_check.judge_losses("", tmp_path)[1] is passed


def test_an_evaluation_is_held_against_the_floors(dreamlip, tmp_path):
    evaluate.evaluate_run(dreamlip[1] / "device", n=40, figures=False, device="cpu", out=tmp_path)
    measured, passed = NAMED["evaluation"].judge("", tmp_path)
    assert passed and measured.startswith("40 images, zero-shot top-1 ")
    assert not NAMED["default run"].judge("", tmp_path)[1]


@pytest.mark.slow
def test_a_killed_run_that_was_resumed_has_the_same_weights(tmp_path):
    row = gpu_check.run_part(gpu_check.resume(device="cpu", size="nano"), tmp_path)
    assert (row["result"], row["measured"]) == ("pass", "0.0e+00, undisturbed 0.0e+00, resumed at step 16")


def test_weights_further_apart_than_undisturbed_ones_fail(tmp_path):
    def judge(again, killed, step):
        for name, value in (("undisturbed", 1.0), ("again", again), ("killed", killed)):
            (tmp_path / name).mkdir(exist_ok=True)
            torch.save({"model": {"weight": torch.full((2, 2), value)}}, tmp_path / name / "checkpoint.pt")
        return gpu_check.judge_resume(f"resuming at step {step} of 30", tmp_path)[1]

    assert judge(1.0, 1.0, 16) and judge(1.001, 1.002, 16)
    assert not judge(1.001, 1.01, 16) and not judge(1.0, 1.0, 8)


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


def test_packed_texts_are_held_against_buckets(capsys):
    train.profile(dict(size="nano", batch=8, device="cpu", workers=0, eval_images=0), steps=2, warm=1)
    buckets = capsys.readouterr().out
    text = buckets.replace("buckets", "packed") + buckets
    measured, passed = gpu_check.judge_profiles(0, text, None)
    assert passed and measured.count("(MFU)") == 2 and measured.endswith("; 1.00 times")
    assert not gpu_check.judge_profiles(1.15, text, None)[1]
    assert not gpu_check.judge_profiles(0, buckets + buckets, None)[1]  # packing was not possible


@pytest.mark.parametrize("name, text, passed", [
    ("build", "building ...\n/a/similarity_0.so\n", True),
    ("tests", "...\n31 passed, 400 deselected in 9.00s\n", True),
    ("tests", "...\n31 passed, 1 skipped, 400 deselected in 9.00s\n", False),
    ("sanitizer", "not installed\n", True),
    ("sanitizer", "2 passed\n========= ERROR SUMMARY: 10 errors\n", False),
])
def test_text_is_judged(name, text, passed):
    assert NAMED[name].judge(text, None)[1] is passed


@pytest.mark.parametrize("limit, command, measured", [
    (1, "echo begun; sleep 60 & sleep 60", "not done in 1 s; last line: begun"),
    (60, "echo first; echo ValueError: last; exit 3", "exit code 3; last line: ValueError: last"),
    (60, "echo no run", "FileNotFoundError.*metrics.jsonl.*; last line: no run"),
])
def test_a_part_that_hangs_fails_or_leaves_nothing_is_a_failed_row(limit, command, measured, tmp_path):
    row = gpu_check.run_part(gpu_check.Part("bad", "", command, limit, gpu_check.judge_losses), tmp_path)
    assert row["result"] == "FAIL"
    assert re.fullmatch(measured, row["measured"])


def test_the_table_keeps_the_parts_that_do_not_run_again(tmp_path, monkeypatch):
    judge = NAMED["build"].judge
    parts = [gpu_check.Part(name, "a library", f"echo {name}.so", 60, judge) for name in ("one", "two")]
    gpu_check.write_table({"one": gpu_check.run_part(parts[0], tmp_path)}, tmp_path)
    for part in parts:
        part.command = "false"
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--only", "wo"])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == 1
    assert (tmp_path / "results.md").read_text().splitlines()[2:] == [
        "| one | a library | one.so | pass | echo one.so |",
        "| two | a library | exit code 1; last line: | FAIL | false |",
    ]


def test_without_a_gpu_it_says_so_in_one_sentence():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "tests/gpu_check.py"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "no CUDA GPU here: run this on a machine with one\n"
