"""Shared by all tests: the repository on the path, one thread (small tensors gain nothing from more), the `gpu` marker."""
import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, too
os.environ.setdefault("MPLBACKEND", "Agg")
CACHE = tempfile.TemporaryDirectory()  # kept to the end of the tests, then removed
os.environ["MINILIP_CACHE"] = CACHE.name

import torch  # noqa: E402  after OMP_NUM_THREADS

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU, and is skipped where there is none")
    config.addinivalue_line("markers", "slow: takes minutes, and runs only with -m slow")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    if item.get_closest_marker("slow") and "slow" not in (item.config.getoption("-m") or ""):
        pytest.skip("slow: run it with -m slow")
