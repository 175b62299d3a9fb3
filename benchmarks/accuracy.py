"""Does speed cost accuracy? bfloat16 and batched augmentation beside float32 and torchvision's,
over seeds.

    python benchmarks/accuracy.py               an hour on 2 cores
    python benchmarks/accuracy.py --folder DIR  keeps data and runs, and goes on with what is there

Both pretrain by `experiment=synthetic_dl21` (fewer images), the same but for the seed, and are
measured by its linear classifier in float32. The images of torchvision are made one by one by
`torchvision.transforms.v2`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from common import machine, workplace
from torch import Tensor, nn
from torchvision.transforms import v2

from ssl_bench.augment.ops import ColorJitter, GaussianBlur, RandomGrayscale
from ssl_bench.augment.views import Views
from ssl_bench.report.figure import table
from ssl_bench.runs.identity import slug
from ssl_bench.runs.units import mean_std

COUNTS = {"num_unlabeled": 8000, "num_train": 2000, "num_val": 2000}
COMMON = ("experiment=synthetic_dl21", "epochs=20", "stage.seeds=[0]")
ROWS = {
    "bfloat16, batched augmentation": (),
    "float32, torchvision's augmentation": (
        "precision=fp32",
        "augmentation._target_=accuracy.TorchvisionViews",
    ),
}


class TorchvisionViews(Views):
    """The same distribution of views by torchvision, image by image, from torch's generator, which
    the loop seeds.
    """

    @torch.no_grad()
    def forward(self, images: Tensor, keys: Tensor) -> list[Tensor]:
        transform = self.transforms()
        views = [torch.stack([transform(image) for image in images]) for _ in range(self.num_views)]
        return [view.contiguous(memory_format=torch.channels_last) for view in views]

    def transforms(self) -> nn.Module:
        crop = self.views[0].crop
        steps = [
            v2.RandomResizedCrop(
                crop.size, crop.scale, crop.ratio, v2.InterpolationMode(crop.interpolation)
            ),
            v2.ToDtype(torch.float32, scale=True),
        ]
        for op in self.views[0].ops:
            match op:
                case ColorJitter(strengths=strengths, hue=hue, p=p):
                    steps.append(v2.RandomApply([v2.ColorJitter(*strengths, hue)], p))
                case RandomGrayscale(p=p):
                    steps.append(v2.RandomGrayscale(p))
                case GaussianBlur(half=half, sigma=sigma, p=p):
                    steps.append(v2.RandomApply([v2.GaussianBlur(2 * half + 1, sigma)], p))
                case _:
                    raise NotImplementedError(op)
        mean, std = (
            value.flatten().tolist() for value in (self.normalize.mean, self.normalize.std)
        )
        return v2.Compose([*steps, v2.RandomHorizontalFlip(crop.flip_p), v2.Normalize(mean, std)])


def pretrain(folder: Path, row: str, seed: int) -> dict[str, float]:
    """Top-1 (percent) of the classifiers after one pretraining, and of the untrained network."""
    run = folder / f"{slug(row)}-seed{seed}"
    where = [
        f"data.root={folder / 'data'}",
        f"data.cache={folder / 'cache'}",
        f"dir={run}",
        f"seed={seed}",
    ]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "ssl_bench", *COMMON, *where, *ROWS[row]]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    return json.loads((run / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="to keep the data and the runs in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "accuracy.json"
    )
    args = parser.parse_args()
    with workplace(args.folder, **COUNTS) as folder:
        results = {row: [pretrain(folder, row, seed) for seed in args.seeds] for row in ROWS}
    rows = {}
    for row, runs in results.items():
        for kind in ("pretrained", "random init"):
            top1 = [run[f"{kind} top-1"] for run in runs]
            mean, std = mean_std(top1)
            rows[row if kind == "pretrained" else kind] = {"top1": top1, "mean": mean, "std": std}
    settings = {
        "command": ["ssl-bench", *COMMON],
        "overrides": ROWS,
        "data": COUNTS,
        "seeds": args.seeds,
    }
    args.out.write_text(json.dumps({**settings, **machine(), "rows": rows}, indent=2) + "\n")
    print(table({row: values["top1"] for row, values in rows.items()}, "top-1"))


if __name__ == "__main__":
    main()
