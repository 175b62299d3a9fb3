"""Do chosen labels teach more than random ones, and what does it cost to choose among 512,000 images?

    python benchmarks/selection.py                 data, a backbone, 50 choices with their classifiers: minutes on a core
    python benchmarks/selection.py --folder DIR    keeps all that, and goes on with what is there
    python benchmarks/selection.py --scale         the strategies on simulated features of 512,000 images, 3 GB of disk

Images are shapes. The backbone has learnt ten of them, with labels; the other ten are to be told apart by a linear
classifier of its features. Some are labelled, and more are to be chosen from a pool. In both the most frequent class has
100 times the images of the rarest, as in the long-tailed CIFAR (Cui et al., arXiv:1901.05555); test images are as many
of each. Every seed has images, labels and a pool of its own.

Each choice and each classifier is the program's own stage. --scale runs what stage=select does once features are there,
in a process of its own for each strategy.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import hydra
import numpy as np
import torch
from common import folder_for, machine
from memory import private_bytes
from PIL import Image

from ssl_bench import selection
from ssl_bench.data.synthetic import SHAPES, render
from ssl_bench.launch import launch, set_up_logging
from ssl_bench.report import markdown, mean_std

RESULTS = Path(__file__).parent / "results"
SIZE, CLASSES, RATIO = 64, 10, 100  # pixels; the most frequent class has RATIO times the images of the rarest
COUNTS = {"backbone": 8000, "train": 100, "pool": 4000, "val": 1000}
BUDGETS = (100, 400)
STRATEGIES = ("random", "kmeans_plusplus", "k_center", "typiclust", "margin")
COMMON = ("data=dl21", f"data.image_size={SIZE}", "data.workers=1", "backbone.width=16", "log_every=1000")
BACKBONE = ("stage=pretrain", "method=supervised", "epochs=8", "batch_size=64", "precision=bf16", "eval_every=0")
BACKBONE += ("optimizer.base_lr=0.4", "augmentation.crop_scale=[0.7,1.0]", "augmentation.flip_p=0")
# as conf/experiment/quickstart.yaml, whose labels are as few
PROBE = ("stage=lincls", "stage.normalize=true", "stage.test_resize=1.0", "augmentation=none", "optimizer.base_lr=0.03")
PROBE += ("optimizer.scaling=none", "batch_size=50", "epochs=50", "eval_every=0")

SCALE = {"images": 512_000, "dim": 2048, "labelled": 25_600, "budget": 12_800}  # of dl21 and a ResNet-50
SAMPLE_SECONDS = 0.2


# -- what chosen labels are worth --------------------------------------------------------------------------------------


def write(folder: Path, seed: int, first: int, **splits: np.ndarray) -> None:
    """The dl21 layout, of the shapes from the `first`-th on; labels (n,) of each of unlabeled, train, val."""
    for name, labels in splits.items():
        (folder / name).mkdir(parents=True)
        seen = np.zeros(CLASSES, dtype=int)
        for number, label in enumerate(labels):
            index = len(SHAPES) * seen[label] + first + label  # of the next image of this class
            image, _ = render(seed, {"unlabeled": "pretrain"}.get(name, name), int(index), SIZE, len(SHAPES))
            Image.fromarray(image).save(folder / name / f"{number}.png", compress_level=1)
            seen[label] += 1
        torch.save(torch.from_numpy(labels), folder / f"{name}_label_tensor.pt")


def run(directory: Path, *overrides: str) -> dict[str, float]:
    """The program's stage, in this process; at once where it has run before."""
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        return launch(hydra.compose("config", [*COMMON, *overrides, f"dir={directory}"]))


def backbone(folder: Path) -> Path:
    if not (folder / "others").exists():
        balanced = np.arange(COUNTS["backbone"]) % CLASSES
        write(folder / "others.partial", 0, CLASSES, unlabeled=balanced[:1], train=balanced, val=balanced[:CLASSES])
        (folder / "others.partial").rename(folder / "others")
    run(folder / "backbone", *BACKBONE, f"data.root={folder / 'others'}")
    return folder / "backbone"


def pool(folder: Path, seed: int) -> Path:
    path = folder / f"pool{seed}"
    if not path.exists():
        share = RATIO ** np.linspace(0, 1, CLASSES)
        labels = np.random.default_rng(seed).choice(CLASSES, COUNTS["pool"] + COUNTS["train"], p=share / share.sum())
        train, rest = np.split(labels, [COUNTS["train"]])
        val = np.arange(COUNTS["val"]) % CLASSES
        write(path.with_suffix(".partial"), 1 + seed, 0, unlabeled=rest, train=train, val=val)
        path.with_suffix(".partial").rename(path)
    return path


def measure(folder: Path, weights: Path, seed: int, strategy: str, budget: int) -> dict[str, float]:
    """Top-1 (percent) of the classifier that has the labels of the chosen, and how many classes these are of."""
    data = pool(folder, seed)
    own = (f"data.root={data}", f"seed={seed}")
    if strategy == "margin":
        run(folder / f"first{seed}", *PROBE, *own, f"pretrained={weights}")
    chosen = folder / f"{strategy}-{budget}-seed{seed}"
    choice = ("stage=select", f"stage.strategy={strategy}", f"stage.budget={budget}", "stage.test_resize=1.0")
    source = f"pretrained={folder / f'first{seed}' if strategy == 'margin' else weights}"
    run(chosen, *choice, *own, source, f"stage.features={folder / 'features'}", "augmentation=none")
    request = chosen / "request_00.csv"
    labels = torch.load(data / "unlabeled_label_tensor.pt", weights_only=True)  # what the annotator knows
    labels = labels[torch.tensor([int(line) for line in request.read_text().split()])]
    torch.save(labels, chosen / "label_00.pt")
    extra = f"data.extra_labels=[{request},{chosen / 'label_00.pt'}]"
    top1 = run(chosen / "probe", *PROBE, *own, f"pretrained={weights}", extra)["val_top1"]
    counts = labels.bincount(minlength=CLASSES)
    return {"top1": top1, "classes": int((counts > 0).sum()), "rare": int(counts[: CLASSES // 2].sum())}


def compare(folder: Path, seeds: list[int], out: Path) -> None:
    weights = backbone(folder)
    found = {
        budget: {
            strategy: [measure(folder, weights, seed, strategy, budget) for seed in seeds] for strategy in STRATEGIES
        }
        for budget in BUDGETS
    }
    rows, lines = [], []
    for budget, results in found.items():
        control = [result["top1"] for result in results["random"]]
        for strategy, values in results.items():
            top1 = [value["top1"] for value in values]
            gains = [value - base for value, base in zip(top1, control, strict=True)]
            (mean, std), (gain, spread) = mean_std(top1), mean_std(gains)
            rows.append({"budget": budget, "strategy": strategy, "seeds": values, "mean": mean, "std": std})
            rows[-1] |= {"gain": gain, "gain_std": spread, "wins": sum(value > 0 for value in gains)}
            rare = mean_std([value["rare"] for value in values])[0]
            beside = f"{gain:+.1f} ± {spread:.1f}, {rows[-1]['wins']} of {len(seeds)}" if strategy != "random" else ""
            lines.append([f"{budget}", strategy, f"{mean:.1f} ± {std:.1f}", beside, f"{rare:.0f}"])
    header = ["labels", "strategy", "top-1 (%)", "gain over random, seeds that gain", "of the five rarest classes"]
    table = markdown(header, lines, right=3)
    settings = {"data": COUNTS, "ratio": RATIO, "common": COMMON, "backbone": BACKBONE, "probe": PROBE, "seeds": seeds}
    finish(out, table, {**settings, **machine(), "rows": rows})


# -- what it costs -----------------------------------------------------------------------------------------------------


def simulate(path: Path, images: int, dim: int, seed: int, classes: int = 800, latent: int = 64) -> None:
    """float16 (images, dim): of overlapping classes, in a space of few dimensions, with noise in all; not negative."""
    if path.exists():
        return
    rng = np.random.default_rng(0)  # the same classes in every file
    centres = rng.standard_normal((classes, latent), np.float32)
    mix = rng.standard_normal((latent, dim), np.float32) / latent**0.5
    rng = np.random.default_rng(seed)
    partial = path.with_suffix(".partial")
    stored = np.lib.format.open_memmap(partial, "w+", np.float16, (images, dim))
    for start in range(0, images, 8192):
        block = centres[rng.integers(classes, size=min(8192, images - start))]
        block = (block + 0.7 * rng.standard_normal(block.shape, np.float32)) @ mix
        block += 0.3 * rng.standard_normal(block.shape, np.float32)
        stored[start : start + len(block)] = np.maximum(block, 0)
    stored.flush()
    partial.rename(path)


def choose(folder: Path, strategy: str, budget: int) -> None:
    """What stage=select does with features; seconds of each part, a JSON line."""
    clock = [time.monotonic()]

    def passed() -> float:
        clock.append(time.monotonic())
        return clock[-1] - clock[-2]

    unlabelled, labelled = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("unlabelled", "labelled"))
    project = selection.Projection(unlabelled, 128, 0, torch.device("cpu"))
    points, covered = project(unlabelled), project(labelled)
    seconds = {"projection": passed()}
    generator = torch.Generator().manual_seed(0)
    more = {"budget": budget} if strategy == "typiclust" else {}
    chosen = list(islice(getattr(selection, strategy)(points, covered, generator, **more), budget))
    seconds["choice"] = passed()
    assert len(set(chosen)) == budget
    print(json.dumps({"seconds": seconds, "variance_kept": project.explained}))


def scale(folder: Path, out: Path) -> None:
    simulate(folder / "unlabelled.npy", SCALE["images"], SCALE["dim"], 1)
    simulate(folder / "labelled.npy", SCALE["labelled"], SCALE["dim"], 2)
    rows, lines = [], []
    for strategy in STRATEGIES[1:-1]:
        load, before, began, peak = os.getloadavg()[0], sum(os.times()[2:4]), time.monotonic(), 0
        words = [sys.executable, __file__, "--folder", str(folder), "--choose", strategy]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
            while child.poll() is None:
                peak = max(peak, private_bytes(child.pid))
                time.sleep(SAMPLE_SECONDS)
            found = json.loads(child.stdout.read())
        row = {"strategy": strategy, "wall_seconds": time.monotonic() - began, **found, "peak_private_bytes": peak}
        row |= {"cpu_seconds": sum(os.times()[2:4]) - before, "load_average_before": load}
        rows.append(row)
        cells = (row["wall_seconds"], row["cpu_seconds"], peak / 1e9)
        lines.append([strategy, *(f"{value:,.0f}" for value in cells[:2]), f"{cells[2]:.1f}"])
        print(markdown(["strategy", "seconds", "CPU seconds", "GB private"], lines[-1:], right=3), flush=True)
    table = markdown(["strategy", "seconds", "of the processor", "private memory (GB)"], lines, right=3)
    finish(out, table, {"scale": SCALE, **machine(), "rows": rows})


def finish(out: Path, table: str, document: dict) -> None:
    out.write_text(json.dumps(document, indent=2) + "\n")
    out.with_suffix(".md").write_text(table + "\n")
    print(f"\n{table}\n\nwritten: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="to keep data, runs and simulated features in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--scale", action="store_true", help="time and memory, of simulated features")
    parser.add_argument("--out", type=Path, help="a JSON file; a table is written beside it")
    parser.add_argument("--choose", choices=STRATEGIES, help=argparse.SUPPRESS)  # the child of --scale
    args = parser.parse_args()
    if args.choose:
        choose(args.folder, args.choose, SCALE["budget"])
        return
    out = args.out or RESULTS / ("selection_scale.json" if args.scale else "selection.json")
    with folder_for(args.folder) as folder:
        if args.scale:
            scale(folder, out)
        else:
            set_up_logging(quiet=True)
            compare(folder, args.seeds, out)


if __name__ == "__main__":
    main()
