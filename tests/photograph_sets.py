"""The same photographs as ImageNet's tree, as tar shards, as `datasets` saves them, as parquet."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from photographs import jpeg, photographs

WNIDS = ("n01440764", "n01443537", "n01484850", "n02007558")
Sample = tuple[str, bytes, int]  # name without extension, JPEG, class number


def samples(split: str, per_class: int) -> list[Sample]:
    """Parts of four photographs, one class each, in the order of a sorted tree."""
    rng = np.random.default_rng(len(split))
    found = []
    for label, (wnid, image) in enumerate(zip(WNIDS, photographs().values(), strict=False)):
        for number in range(per_class):
            low, high = rng.uniform(0, 0.3, 2), rng.uniform(0.7, 1, 2)
            part = image.crop(tuple(int(x) for x in (*low * image.size, *high * image.size)))
            found.append((f"{wnid}_{number}", jpeg(part), label))
    return found


def write_tree(folder: Path, some: Iterable[Sample]) -> None:
    """folder/WNID/NAME.JPEG"""
    for name, data, label in some:
        path = folder / WNIDS[label] / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, split: str, some: list[Sample], shards: int = 3) -> list[Path]:
    """split-000.tar ..., labels as .cls in those of even number, as .json in the others."""
    paths = []
    for number, part in enumerate(np.array_split(np.arange(len(some)), shards)):
        files = []
        for name, data, label in (some[i] for i in part):
            beside = (".json", json.dumps({"label": label})) if number % 2 else (".cls", label)
            files += [(f"{name}.jpg", data), (name + beside[0], str(beside[1]).encode())]
        paths.append(write_tar(folder / f"{split}-{number:03}.tar", files))
    return paths


def rows_of(some: list[Sample]) -> dict[str, list]:
    images = [{"bytes": data, "path": f"{name}.jpg"} for name, data, _ in some]
    return {"image": images, "label": [label for *_, label in some]}
