"""Photographs of 500 x 375: decoding and cropping on one core, training from files, many files.

    python benchmarks/photographs.py                       all of it, on an idle machine
    python benchmarks/photographs.py --only core --out .   a few minutes

The photographs are scikit-learn's two, in other parts and sizes, as JPEGs of quality 90. `core`:
decoders, and two views of 224 an image, ours and what a user would otherwise run: the authors' loop
(contenders.plain_transform) and torchvision's v2 transforms of tensors. All in one process, in
turns. `files`: ResNet-18 on views of 224, from the files, against contenders.py. `count`: from the
start of the command to its first steps, and memory, with as many links to a few files; the index
behind them is that of the few, repeated.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torchvision
from common import machine
from contenders import MEAN, STD, plain_transform
from memory import private_bytes
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from ssl_bench.augment.draws import keys
from ssl_bench.augment.views import Views
from ssl_bench.data import encoded
from ssl_bench.data.cutting import CutSource
from ssl_bench.data.encoded import place
from ssl_bench.data.formats.folder import Folder
from ssl_bench.data.store import digest_of, digest_of_file
from ssl_bench.runtime.memory import keep_freed

HERE = Path(__file__).parent
SIZE, VIEW = (500, 375), 224
COMMAND = ["stage=pretrain", "data=folder", f"augmentation.image_size={VIEW}", "eval_every=0"]


def write(folder: Path, count: int) -> list[Path]:
    """Parts of two photographs as JPEGs of 500 x 375 or 375 x 500."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    paths = []
    for number in range(count):
        image = photographs[number % 2]
        share = rng.uniform(0.6, 1)
        width, height = (int(side * share) for side in image.size)
        left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
        size = SIZE if number % 4 else SIZE[::-1]
        part = image.crop((left, top, left + width, top + height)).resize(size)
        paths.append(folder / f"{number:04}.jpg")
        part.save(paths[-1], quality=90)
    return paths


def dali(folder: Path, count: int) -> Callable[[], object] | None:
    """NVIDIA DALI's decoder and two of its random crops on one core; None: it isn't installed."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError:
        return None
    box = {"random_area": [0.2, 1.0], "random_aspect_ratio": [3 / 4, 4 / 3], "antialias": True}

    at_once = {"exec_async": False, "exec_pipelined": False, "prefetch_queue_depth": 1}

    @pipeline_def(batch_size=count, num_threads=1, device_id=None, **at_once)
    def pipeline() -> tuple:
        data, _ = fn.readers.file(file_root=str(folder))
        images = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        return tuple(fn.random_resized_crop(images, size=(VIEW, VIEW), **box) for _ in range(2))

    made = pipeline()
    made.build()
    return made.run


def core(work: Path, repeats: int, count: int = 64) -> dict:
    """Images a CPU second: the median of `repeats` turns of each, whatever else runs here."""
    torch.set_num_threads(1)
    keep_freed()  # as the program does
    paths = write(work / "core" / "images", count)
    files = [path.read_bytes() for path in paths]
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    authors = plain_transform(VIEW)
    tensor = v2.Compose(
        [
            v2.RandomResizedCrop(VIEW, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    views = Views(VIEW)
    data = Folder(str(work / "core"), cache=str(work / "cache"), workers=1)
    store = data.open_encoded("pretrain", packed=True)

    source = CutSource(store, views, count, 0, workers=1)

    def cut() -> list[torch.Tensor]:
        return next(source.epoch_pass())[0]

    def ours() -> None:
        views(cut(), keys(0, 0, torch.arange(count)))

    def by_pil(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def by_torchvision(data: torch.Tensor) -> torch.Tensor:
        return torchvision.io.decode_jpeg(data)

    work_of: dict[str, Callable[[], object]] = {
        "decoded by PIL": lambda: [by_pil(data) for data in files],
        "decoded by torchvision.io": lambda: [by_torchvision(data) for data in tensors],
        "decoded by simplejpeg": lambda: [simplejpeg.decode_jpeg(data) for data in files],
        "two views, the authors' loop": lambda: [
            (authors(image), authors(image)) for image in map(by_pil, files)
        ],
        "two views, torchvision v2 of tensors": lambda: [
            (tensor(image), tensor(image)) for image in map(by_torchvision, tensors)
        ],
        "two views, ours, cut on the host": cut,
        "two views, ours, with colours and blur on the same core": ours,
    }
    if crops := dali(work / "core", count):
        work_of["two crops, DALI"] = crops
    rates: dict[str, list[float]] = {name: [] for name in work_of}
    for turn in range(repeats + 1):
        for name, function in work_of.items():
            began = time.process_time()
            function()
            if turn:  # the first is to warm up
                rates[name].append(count / (time.process_time() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{value:8.0f} images/s  {name}", flush=True)
    return {"images_per_second": medians, "repeats": rates}


def files(work: Path, repeats: int, batch: int = 64) -> dict:
    """Images a second of training, from the files: the median of the turns of each."""
    write(work / "files" / "class", 512)
    cores = os.cpu_count() or 1
    rates: dict[str, list[float]] = {"plain": [], "lightly": [], "ours": []}
    options = ["--image-size", str(VIEW), "--batch", str(batch), "--queue", "512"]
    options += ["--warmup", "1", "--steps", "4", "--workers", str(cores)]
    for turn in range(repeats):
        for name in ("plain", "lightly"):
            command = [sys.executable, str(HERE / "contenders.py"), name, str(work / "files")]
            done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True)
            if done.returncode:  # lightly isn't installed
                continue
            (seconds,) = json.loads(done.stdout.splitlines()[-1])["seconds"].values()
            rates[name].append(4 * batch / seconds)
        run = work / f"run{turn}"
        command = [sys.executable, "-m", "ssl_bench", *COMMAND, f"data.root={work / 'files'}"]
        command += [f"data.cache={work / 'cache'}", f"dir={run}", f"batch_size={batch}"]
        command += ["method.queue_size=512", "log_every=1", "epochs=1", "device=cpu"]
        command += ["precision=bf16"]
        subprocess.run(command, check=True, capture_output=True)
        lines = (run / "metrics.jsonl").read_text().splitlines()[3:]
        inside = [json.loads(line)["images_per_second"] for line in lines]
        rates["ours"].append(statistics.median(inside))
        print({name: [round(rate, 1) for rate in values] for name, values in rates.items()})
    medians = {name: statistics.median(values) for name, values in rates.items() if values}
    return {"batch": batch, "images_per_second": medians, "repeats": rates}


def count(work: Path, counts: list[int], few: int = 200) -> list[dict]:
    """From the command to its steps, with so many files."""
    paths = write(work / "few", few)
    rows = []
    for number in counts:
        root, cache, run = (work / f"{kind}{number}" for kind in ("root", "cache", "run"))
        for index in range(number):
            folder = root / f"train/{index % 1000:04}"
            if index < 1000:
                folder.mkdir(parents=True)
            os.link(paths[index % few], folder / f"{index:07}.jpg")
        began = time.perf_counter()
        data = Folder(str(root / "train"), cache=str(cache))
        split = data.split("pretrain")
        listing = time.perf_counter() - began
        repeat_index(work, split, number, few, place(split, False, cache))
        command = [sys.executable, "-m", "ssl_bench", *COMMAND, "source=streamed"]
        command += [f"data.root={root / 'train'}", f"data.cache={cache}", f"dir={run}"]
        command += ["backbone.width=16", "batch_size=64", "method.queue_size=1024", "log_every=1"]
        rows.append({"images": number, "listing_seconds": listing} | first_steps(command, run))
        print(rows[-1], flush=True)
    return rows


def repeat_index(work: Path, split, number: int, few: int, directory: Path) -> None:
    """The index of `number` links, whose names are sorted by folder: entries of the few files."""
    known = Folder(str(work / "few"), cache=str(work / "cache")).open_encoded("pretrain", False)
    order = [int(Path(split.where(index)).stem) % few for index in range(number)]
    directory.mkdir(parents=True)
    arrays = {encoded.ENTRIES: known.entries[order], encoded.INDICES: np.arange(number)}
    for name, array in arrays.items():
        np.save(directory / name, array)
    digests = {name: digest_of_file(directory / name) for name in arrays}
    facts = {"split": "pretrain", "packed": False, "skipped": {}, "noticed": {}}
    meta = facts | {"digests": digests}
    text = json.dumps(meta | {"digest": digest_of(meta)})
    (directory / encoded.META).write_text(text)


def first_steps(command: list[str], run: Path, steps: int = 20) -> dict:
    """Seconds until the first step is logged, and the most private memory within some more."""
    metrics, private, first = run / "metrics.jsonl", 0, None
    began = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while True:
            lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            private = max(private, private_bytes(process.pid))
            if first is None and lines:
                first = time.perf_counter() - began
            if lines >= steps:
                break
            if process.poll() is not None:
                sys.exit(process.stderr.read())
            time.sleep(0.05)
        process.kill()
    return {"first_step_seconds": first, "private_bytes": private}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=["core", "files", "count"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_280_000])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    path = args.out / "photographs.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result |= {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="ssl_bench_photographs_") as folder:
        work = Path(folder)
        parts = {
            "core": lambda: core(work, args.repeats),
            "files": lambda: files(work, args.repeats),
            "count": lambda: count(work, args.counts),
        }
        for name in args.only or parts:
            result[name] = parts[name]()
            path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
