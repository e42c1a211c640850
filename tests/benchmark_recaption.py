"""How many images a second recaption.py asks about, of an endpoint that takes 50 ms a request, 64 at a time.

    python tests/benchmark_recaption.py --images 10000

The endpoint, in a process of its own, could do 64 / 0.05 = 1,280 a second. Each image is a JPEG of about 70 KB. The
processor time is the client's: what it would reach on a core of its own.
"""
import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import recaption  # noqa: E402  from the folder above


def make_images(folder, n):
    """50 JPEGs, and a list that names them n times under keys of their own."""
    for i in range(50):
        noise = np.random.default_rng(i).integers(0, 255, (192, 256, 3), np.uint8)
        Image.fromarray(noise).resize((512, 384)).save(folder / f"{i}.jpg", quality=60)
    with open(folder / "images.jsonl", "w") as file:
        for i in range(n):
            print(json.dumps({"key": f"{i:06}", "image": f"{i % 50}.jpg"}), file=file)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--images", type=int, default=10_000)
    p.add_argument("--delay", type=float, default=0.05, help="seconds a request")
    p.add_argument("--in-flight", type=int, default=64)
    s = p.parse_args()
    command = [sys.executable, HERE / "faulty_endpoint.py", "--delay", str(s.delay)]
    endpoint = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder), s.images)
        address = f"http://127.0.0.1:{endpoint.stdout.readline().strip()}"
        flags = [f"{folder}/images.jsonl", "--endpoint", address, "--fields", "short", "--in-flight", str(s.in_flight)]
        began, cpu = time.monotonic(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            recaption.main(flags)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        captions = Path(folder, "images.captions.jsonl").read_text().count("\n")
    endpoint.kill()
    assert captions == s.images
    rate, limit = s.images / seconds, s.in_flight / s.delay
    print(f"{rate:.0f} images a second, {100 * rate / limit:.0f}% of the endpoint's {limit:.0f}; "
          f"{1000 * cpu / s.images:.2f} ms of processor time each")


if __name__ == "__main__":
    main()
