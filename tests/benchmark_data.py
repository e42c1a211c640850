"""How fast training pictures come from shards: ours beside open_clip's webdataset pipeline, on the same shards in the
same run, taking turns; and where our time goes.

    python tests/benchmark_data.py                          10,000 pictures of 256 px, 2 workers, three turns each

Needs: pip install open_clip_torch webdataset
Both read shards, decode, crop at random to 224 px, tokenise one caption with CLIP's tokenizer at 77 tokens, and end in
batches of normalised float32 tensors: open_clip's workers normalise; ours hand over bytes, `normalize` does the rest.
The shards are made once, under --folder: scenes with noise, as JPEGs of about 20 kB, the size of photographs at 256 px.
"""

import argparse
import functools
import io
import json
import logging
import statistics
import sys
import tarfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from scenes import Scenes  # noqa: E402

PER_SHARD, BATCH = 1000, 100


def make_shard(folder, n):
    path, scenes = folder / f"{n:05}.tar", Scenes("train", size=256, kinds=83)
    if path.exists():
        return
    with tarfile.open(path.with_suffix(".part"), "w") as tar:
        for i in range(n * PER_SHARD, (n + 1) * PER_SHARD):
            scene, file = scenes.scene(i), io.BytesIO()
            noise = np.random.default_rng(i).normal(0, 9, (256, 256, 1))
            picture = (scenes.draw(scene)[0] + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(file, "JPEG", quality=87)
            c = scene.captions
            row = dict(caption=c["raw"], shortSV_captions=c["short"], longSV_captions=" ".join(c["long"]))
            for extension, content in (("jpg", file.getvalue()), ("txt", c["raw"].encode()),
                                       ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{i:09}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    path.with_suffix(".part").rename(path)


def ours(folder, workers, images, method):
    s = train.resolve(dict(size="base-16", method=method, batch=BATCH, workers=workers, crop=0.9, tokenizer="clip"))
    dataset = data.open_dataset(str(folder), "train", 0, 224, 0, crop=0.9)
    for pictures, tokens, good, *_ in data.training_loader(dataset, data.load_tokenizer("clip"), s, 0, images // BATCH):
        assert good.all()
        yield data.normalize(pictures), tokens


def open_clips(folder, workers, images):
    sys.modules.setdefault("pandas", types.ModuleType("pandas"))  # only for its CSV sets
    import open_clip
    import open_clip_train.data
    pipeline = open_clip_train.data  # newer webdatasets mark a shard's end by an empty sample, which it does not know
    pipeline.tar_file_expander = functools.partial(pipeline.tar_file_expander, eof_value=None)
    logging.getLogger().setLevel(logging.ERROR)
    shards = len(list(folder.glob("*.tar")))
    args = types.SimpleNamespace(
        train_data=f"{folder}/{{00000..{shards - 1:05}}}.tar", train_num_samples=images, seed=0, world_size=1,
        train_data_upsampling_factors=None, batch_size=BATCH, workers=workers)
    transform = open_clip.image_transform(224, is_train=True)  # a random resized crop of 0.9 to 1, bicubic
    yield from pipeline.get_wds_dataset(args, transform, True, tokenizer=open_clip.get_tokenizer("ViT-B-16")).dataloader


def speed(batches, images):
    """Images a second, the first ten batches left out: they wait for the workers to start."""
    for n, (pictures, tokens) in enumerate(batches, 1):
        assert pictures.shape == (BATCH, 3, 224, 224) and pictures.dtype == torch.float32 and tokens.shape[-1] <= 77
        if n == 10:
            start = time.perf_counter()
    return (n - 10) * BATCH / (time.perf_counter() - start)


def where_the_time_goes(folder, n=1000):
    """Milliseconds an image of each step, in one process."""
    records, tokenizer = data.Records(str(folder)), data.load_tokenizer("clip")
    spent, rng = {}, data.random.Random(0)

    def timed(name, function, *arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        spent[name] = spent.get(name, 0) + time.perf_counter() - start
        return result

    samples = []
    for i in range(n):
        record = timed("read and parse the span", records.__getitem__, i)
        captions = timed("sort out captions", data.read_captions, record.row)
        picture = timed("decode", data.load_image, record.image, 265)
        box = data.crop_box(*picture.size, 0.9, rng)
        picture = timed("crop and resize", picture.resize, (224, 224), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
        image = timed("to a tensor", lambda: torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        samples.append((image, timed("tokenise", tokenizer, [captions.raw], 77), None))
    for start in range(0, n, BATCH):
        pictures, _, _, _ = timed("stack the batch", data.collate, samples[start:start + BATCH])
        timed("normalise (main process)", data.normalize, pictures)
    total = sum(spent.values())
    for name, seconds in spent.items():
        print(f"  {name:26} {1000 * seconds / n:6.3f} ms {100 * seconds / total:5.1f}%")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/minilip-shards"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder / str(options.images)
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(make_shard, [folder] * (options.images // PER_SHARD), range(options.images // PER_SHARD)))
    size = sum(path.stat().st_size for path in folder.glob("*.tar")) / options.images
    print(f"{options.images} pictures of 256 px, {size / 1000:.1f} kB a sample, {options.workers} workers")
    work = options.workers, options.images
    makers = {"ours": lambda: ours(folder, *work, "clip"), "open_clip": lambda: open_clips(folder, *work),
              "ours, DreamLIP's 4 texts": lambda: ours(folder, *work, "dreamlip")}
    found = {name: [] for name in makers}
    for turn in range(options.turns):
        for name in list(makers)[::-1 if turn % 2 else 1]:
            found[name].append(speed(makers[name](), options.images))
    for name, speeds in found.items():
        print(f"{name:26} {statistics.median(speeds):6.0f} images/s  (" + ", ".join(f"{x:.0f}" for x in speeds) + ")")
    ratios = [a / b for a, b in zip(found["ours"], found["open_clip"])]
    print(f"ours / open_clip: {statistics.median(ratios):.2f}  (" + ", ".join(f"{x:.2f}" for x in ratios) + ")")
    print("one image in one process:")
    where_the_time_goes(folder)
