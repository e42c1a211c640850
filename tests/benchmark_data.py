"""How many samples a second the loader hands over, for a comparison before and after a change on the same machine.

    python tests/benchmark_data.py                             scenes with noise, JPEGs of about 20 kB in shards
    python tests/benchmark_data.py --data cc3m --workers 8     data of your own

Each turn goes through --images samples, decoded, cropped to 224 pixels and tokenised, for one text and for DreamLIP's
four, and counts them from the tenth batch on: the first ones wait for the workers to start.
"""
import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from scenes import Scenes  # noqa: E402

BATCH, WARM = 100, 10


def write_shard(path, numbers):
    scenes = Scenes("train", size=256, kinds=83)
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            scene = scenes.scene(i)
            noise = np.random.default_rng(i).normal(0, 9, (256, 256, 1))
            pixels = (scenes.draw(scene)[0] + noise).clip(0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=87)
            text = " ".join(scene.captions["long"]).encode()
            for extension, content in (("jpg", file.getvalue()), ("txt", text)):
                member = tarfile.TarInfo(f"{i:06}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def speed(dataset, method, images, workers):
    """Samples a second."""
    s = train.resolve(dict(size="base-16", method=method, batch=BATCH, workers=workers, tokenizer="clip"))
    tokenizer = data.load_tokenizer("clip")
    for n, _ in enumerate(data.training_loader(dataset, tokenizer, s, 0, images // BATCH), 1):
        if n == WARM:
            start = time.perf_counter()
    return (n - WARM) * BATCH / (time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            for n in (0, 500, 1000):
                write_shard(Path(folder, f"{n}.tar"), range(n, n + 500))
        dataset = data.open_dataset(options.data or folder, "train", 0, 224, 0, crop=0.9)
        for method in ("clip", "dreamlip"):
            found = [speed(dataset, method, options.images, options.workers) for _ in range(3)]
            print(f"{method:10} {statistics.median(found):6.0f} samples/s, of", *(f"{each:.0f}" for each in found))
