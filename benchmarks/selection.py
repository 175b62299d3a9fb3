"""Do chosen labels teach more than random ones, and what does it cost to choose among 512,000
images?

    python benchmarks/selection.py               two backbones, 100 choices with their classifiers:
                                                 minutes on a core
    python benchmarks/selection.py --folder DIR  keeps all that, and goes on with what is there
    python benchmarks/selection.py --scale       the strategies on simulated features of 512,000
                                                 images, 3 GB of disk

Labels are asked for of images among which one class is many times as frequent as another, as in the
long-tailed CIFAR (Cui et al., arXiv:1901.05555). A linear classifier that has these labels is
measured on as many test images of each.

digits: MoCo v2 has learnt them without labels. shapes: the network has learnt ten others, with
labels.

Every seed has images of its own, and another order of the classes. Each choice and each classifier
is the program's own stage. margin asks for half of its labels at random, and for the rest by the
classifier that has these. --scale runs what stage=select does once features are there, in a process
of its own for each strategy.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import torch
from common import folder_for, machine, publish
from memory import private_bytes
from PIL import Image
from torch import nn

from ssl_bench.data.formats.digits import Digits
from ssl_bench.data.synthetic import SHAPES, render
from ssl_bench.evaluate import selection
from ssl_bench.launch.process import launch, set_up_logging
from ssl_bench.report.tables import markdown
from ssl_bench.runs.units import mean_std
from ssl_bench.stages.select import margins

RESULTS = Path(__file__).parent / "results"
CLASSES = 10
STRATEGIES = ("random", "kmeans_plusplus", "k_center", "typiclust", "margin")
LOOK = ("augmentation=none", "stage.test_resize=1.0")
# as conf/experiment/quickstart.yaml, whose labels are as few
PROBE = (
    "stage=lincls",
    *LOOK,
    "stage.normalize=true",
    "optimizer.base_lr=0.03",
    "optimizer.scaling=none",
)
PROBE += ("batch_size=10", "epochs=50", "eval_every=0", "log_every=1000")

# of dl21 and a ResNet-50
SCALE = {"images": 512_000, "dim": 2048, "labelled": 25_600, "budget": 12_800}
SAMPLE_SECONDS = 0.2

Images = list[np.ndarray]  # uint8 (S, S, 3)


# -- what chosen labels are worth ------------------------------------------------------------------


def draw_shapes(seed: int, split: str, labels: np.ndarray, first: int = 0) -> Images:
    """An image for each label (n,), of the shapes from the `first`-th on."""
    # among those of its class
    numbers = [int((labels[:place] == label).sum()) for place, label in enumerate(labels)]
    indices = [
        len(SHAPES) * number + first + int(label)
        for number, label in zip(numbers, labels, strict=True)
    ]
    return [render(seed, split, index, 64, len(SHAPES))[0] for index in indices]


def draw_digits(seed: int, split: str, labels: np.ndarray) -> Images:
    # "pretrain" is train without labels
    found = Digits(image_size=16).split("val" if split == "val" else "train")
    rng = np.random.default_rng(seed)
    of_class = [
        iter(rng.permutation(np.flatnonzero(found.labels == label)).tolist())
        for label in range(CLASSES)
    ]
    return [found.read(next(of_class[label])) for label in labels]


class Subject(NamedTuple):
    """Images to choose from, and the backbone that sees them."""

    network: tuple[str, ...]
    pretrain: tuple[str, ...]
    draw: Callable[[int, str, np.ndarray], Images]  # seed, split, labels (n,)
    most: int  # images of the most frequent class
    ratio: int  # of these to those of the rarest
    num_val: int
    budgets: tuple[int, int]


# as conf/experiment/quickstart.yaml
DIGITS = (
    "data=digits",
    "augmentation=digits",
    "batch_size=128",
    "epochs=100",
    "method.queue_size=1024",
)
DIGITS += (
    "method.momentum=0.99",
    "method.dim=64",
    "augmentation.crop_scale=[0.65,1.0]",
    "optimizer.base_lr=0.12",
)
DIGITS += ("optimizer.weight_decay=5e-4", "schedule.warmup_epochs=5")
SMALL = ("data.image_size=16", "backbone.stem=small", "backbone.width=16")
OTHERS = (
    "data=dl21",
    "method=supervised",
    "epochs=8",
    "batch_size=64",
    "precision=bf16",
    "optimizer.base_lr=0.4",
)
OTHERS += ("augmentation.crop_scale=[0.7,1.0]", "augmentation.flip_p=0")
SUBJECTS = {
    "digits": Subject(
        SMALL, DIGITS, draw_digits, most=120, ratio=20, num_val=400, budgets=(20, 40)
    ),
    "shapes": Subject(
        ("data.image_size=64", "backbone.width=16"),
        OTHERS,
        draw_shapes,
        1200,
        50,
        num_val=1000,
        budgets=(50, 100),
    ),
}


def write(folder: Path, **splits: tuple[Images, np.ndarray]) -> None:
    """The dl21 layout, complete or not at all. unlabeled has a file of labels too: what the
    annotator knows.
    """
    partial = folder.with_suffix(".partial")
    for name, (images, labels) in splits.items():
        (partial / name).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(partial / name / f"{number}.png", compress_level=1)
        torch.save(torch.from_numpy(labels), partial / f"{name}_label_tensor.pt")
    partial.rename(folder)


def run(directory: Path, *overrides: str) -> dict[str, float]:
    """The program's stage, in this process; at once where it has run before."""
    with hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        return launch(hydra.compose("config", [*overrides, "data.workers=1", f"dir={directory}"]))


def pretrain(folder: Path, name: str) -> None:
    """folder/backbone."""
    subject, where = SUBJECTS[name], []
    if name == "shapes":
        where = [f"data.root={folder / 'others'}"]
        if not (folder / "others").exists():
            labels = np.arange(8000) % CLASSES
            images = draw_shapes(0, "train", labels, first=CLASSES)
            write(folder / "others", unlabeled=(images[:1], labels[:1]), train=(images, labels))
    recipe = (*subject.pretrain, *subject.network, *where, "eval_every=0", "log_every=1000")
    run(folder / "backbone", "stage=pretrain", *recipe)


def pool(folder: Path, subject: Subject, seed: int) -> Path:
    """Classes are numbered from the rarest on. One image, of the most frequent, has a label: the
    layout wants one.
    """
    path = folder / f"pool{seed}"
    if not path.exists():
        rng = np.random.default_rng(seed)
        counts = np.round(
            subject.most * float(subject.ratio) ** np.linspace(-1, 0, CLASSES)
        ).astype(int)
        labels = np.append(CLASSES - 1, rng.permutation(np.repeat(np.arange(CLASSES), counts)))
        val, named = np.arange(subject.num_val) % CLASSES, rng.permutation(CLASSES)
        images, tests = (
            subject.draw(1 + seed, "pretrain", named[labels]),
            subject.draw(1 + seed, "val", named[val]),
        )
        write(
            path,
            train=(images[:1], labels[:1]),
            unlabeled=(images[1:], labels[1:]),
            val=(tests, val),
        )
    return path


def measure(
    folder: Path, subject: Subject, seed: int, strategy: str, budget: int
) -> dict[str, float | list[int]]:
    """Top-1 (percent) of the classifier that has the labels of the chosen, and how many of each
    class these are.
    """
    data, place = pool(folder, subject, seed), folder / f"{strategy}-{budget}-seed{seed}"
    own = ("data=dl21", f"data.root={data}", f"seed={seed}", *subject.network)
    truth = torch.load(data / "unlabeled_label_tensor.pt", weights_only=True)

    def ask(directory: Path, how: str, count: int, weights: Path, known: list[int]) -> list[int]:
        options = (
            *LOOK,
            f"stage.strategy={how}",
            f"stage.budget={count}",
            f"stage.features={folder / 'features'}",
        )
        run(
            directory,
            "stage=select",
            *own,
            *options,
            f"pretrained={weights}",
            *answered(directory / "known", known),
        )
        return known + [int(line) for line in (directory / "request_00.csv").read_text().split()]

    def answered(directory: Path, chosen: list[int]) -> list[str]:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "request.csv").write_text("".join(f"{index}\n" for index in chosen))
        torch.save(truth[chosen], directory / "label.pt")
        return (
            [f"data.extra_labels=[{directory / 'request.csv'},{directory / 'label.pt'}]"]
            if chosen
            else []
        )

    def classify(directory: Path, chosen: list[int]) -> float:
        known = answered(directory.with_name(directory.name + "-labels"), chosen)
        return run(directory, *PROBE, *own, *known, f"pretrained={folder / 'backbone'}")["val_top1"]

    if strategy == "margin":
        half = ask(place / "half", "random", budget // 2, folder / "backbone", [])
        classify(place / "first", half)
        chosen = ask(place / "rest", "margin", budget - len(half), place / "first", half)
    else:
        chosen = ask(place / "choice", strategy, budget, folder / "backbone", [])
    counts = truth[chosen].bincount(minlength=CLASSES).tolist()
    return {"top1": classify(place / "probe", chosen), "labels_by_class": counts}


def compare(folder: Path, seeds: list[int], out: Path) -> None:
    rows, lines = [], []
    for name, subject in SUBJECTS.items():
        pretrain(folder / name, name)
        for budget in subject.budgets:
            found = {
                strategy: [
                    measure(folder / name, subject, seed, strategy, budget) for seed in seeds
                ]
                for strategy in STRATEGIES
            }
            control = [result["top1"] for result in found["random"]]
            for strategy, results in found.items():
                top1 = [result["top1"] for result in results]
                gains = [value - base for value, base in zip(top1, control, strict=True)]
                (mean, std), (gain, gain_std), wins = (
                    mean_std(top1),
                    mean_std(gains),
                    sum(x > 0 for x in gains),
                )
                row = {
                    "images": name,
                    "labels": budget,
                    "strategy": strategy,
                    "results": results,
                    "mean": mean,
                }
                rows.append({**row, "std": std, "gain": gain, "gain_std": gain_std, "wins": wins})
                beside = (
                    ["", ""]
                    if strategy == "random"
                    else [f"{gain:+.1f} ± {gain_std:.1f}", f"{wins} of {len(seeds)}"]
                )
                lines.append([name, f"{budget}", strategy, f"{mean:.1f} ± {std:.1f}", *beside])
    header = ["images", "labels", "chosen by", "top-1 (%)", "more than random", "in seeds"]
    subjects = {name: {**subject._asdict(), "draw": name} for name, subject in SUBJECTS.items()}
    document = {"seeds": seeds, "subjects": subjects, "probe": PROBE, **machine(), "rows": rows}
    finish(out, markdown(header, lines, right=3), document)


# -- what it costs ---------------------------------------------------------------------------------


def simulate(
    path: Path, images: int, dim: int, seed: int, classes: int = 800, latent: int = 64
) -> None:
    """float16 (images, dim): of overlapping classes, in a space of few dimensions, with noise in
    all; not negative.
    """
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

    unlabelled, labelled = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("unlabelled", "labelled")
    )
    project = selection.Projection(unlabelled, 128, 0, torch.device("cpu"))
    points, covered = project(unlabelled), project(labelled)
    seconds = {"projection": passed()}
    generator = torch.Generator().manual_seed(0)
    if strategy == "margin":
        backbone, classifier = (
            nn.Identity(),
            {"fc.weight": torch.randn(800, SCALE["dim"]), "fc.bias": torch.zeros(800)},
        )
        backbone.dim = SCALE["dim"]
        order = (
            margins(classifier, backbone, unlabelled, np.arange(len(unlabelled))).argsort().tolist()
        )
    else:
        more = {"budget": budget} if strategy == "typiclust" else {}
        order = getattr(selection, strategy)(points, covered, generator, **more)
    chosen = list(islice(order, budget))
    seconds["choice"] = passed()
    assert len(set(chosen)) == budget
    print(json.dumps({"seconds": seconds, "variance_kept": project.explained}))


def scale(folder: Path, out: Path) -> None:
    simulate(folder / "unlabelled.npy", SCALE["images"], SCALE["dim"], 1)
    simulate(folder / "labelled.npy", SCALE["labelled"], SCALE["dim"], 2)
    rows, lines = [], []
    for strategy in STRATEGIES[1:]:
        load, before, began, peak = os.getloadavg()[0], sum(os.times()[2:4]), time.monotonic(), 0
        words = [sys.executable, __file__, "--folder", str(folder), "--choose", strategy]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
            while child.poll() is None:
                peak = max(peak, private_bytes(child.pid))
                time.sleep(SAMPLE_SECONDS)
            found = (
                json.loads(child.stdout.read())
                if child.returncode == 0
                else sys.exit(f"{strategy} failed")
            )
        row = {
            "strategy": strategy,
            "wall_seconds": time.monotonic() - began,
            **found,
            "peak_private_bytes": peak,
        }
        row |= {"cpu_seconds": sum(os.times()[2:4]) - before, "load_average_before": load}
        rows.append(row)
        cells = (row["wall_seconds"], row["cpu_seconds"], peak / 1e9)
        lines.append([strategy, *(f"{value:,.0f}" for value in cells[:2]), f"{cells[2]:.1f}"])
        print(
            markdown(["strategy", "seconds", "CPU seconds", "GB private"], lines[-1:], right=3),
            flush=True,
        )
    table = markdown(
        ["strategy", "seconds", "of the processor", "private memory (GB)"], lines, right=3
    )
    finish(out, table, {"scale": SCALE, **machine(), "rows": rows})


def finish(out: Path, table: str, document: dict) -> None:
    publish(document, table, out)
    print(f"\n{table}\n\nwritten: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="to keep data, runs and simulated features in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--scale", action="store_true", help="time and memory, of simulated features"
    )
    parser.add_argument("--out", type=Path, help="a JSON file; a table is written beside it")
    # the child of --scale
    parser.add_argument("--choose", choices=STRATEGIES, help=argparse.SUPPRESS)
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
