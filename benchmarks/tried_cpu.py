"""What was tried to bring ResNet-50 on a CPU nearer to its floor.

    python benchmarks/tried_cpu.py    two cores: a quarter of an hour

MoCo v2's step at 96 pixels in bfloat16, as the program makes it, with one change at a time. They
take turns, each in a process of its own. The floor: a step's operations at the rate of a large
matrix product, measured in the same process. Writes tried_cpu.json and .md to --out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from common import machine, publish
from hydra import compose, initialize_config_module
from parts import Unmarked, Window, matrix_rate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ssl_bench.command  # noqa: F401 - registers the resolvers of the configuration
from ssl_bench.methods import layers
from ssl_bench.report.tables import markdown
from ssl_bench.runtime import memory
from ssl_bench.runtime.precision import AUTOCAST, prepare
from ssl_bench.stages.pretrain import pretrain

WORDS = ("data=synthetic", "data.num_unlabeled=2048", "backbone=resnet50", "precision=bf16")
WORDS += ("device=cpu", "dir=none", "eval_every=0", "method.queue_size=2048")


def _joined_by_cat() -> None:
    layers._InOneTensor.apply = layers._normalised_and_joined


def _pointwise_as_products() -> None:
    """1x1 convolutions become F.linear of the channels, which lie together in memory."""
    convolve = nn.Conv2d.forward

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        if self.kernel_size != (1, 1) or self.stride != (1, 1):
            return convolve(self, x)
        products = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return products.permute(0, 3, 1, 2)

    nn.Conv2d.forward = forward


# what is typed, and what is changed in the program
CHANGES: dict[str, tuple[tuple[str, ...], Callable[[], None]]] = {
    "as it is": ((), lambda: None),
    "parts of batch norm joined by torch.cat": ((), _joined_by_cat),
    "batch norm of the whole batch, method.bn_splits=1": (("method.bn_splits=1",), lambda: None),
    "1x1 convolutions as matrix products": ((), _pointwise_as_products),
    "batch_size=128": (("batch_size=128",), lambda: None),
    "compile=true": (("compile=true",), lambda: None),
}


def measure(name: str, warmup: int, steps: int, cache: str) -> dict[str, float]:
    """{"images_per_second", "of_floor"} in this process."""
    more, change = CHANGES[name]
    change()
    with initialize_config_module("ssl_bench.conf", version_base="1.3"):
        cfg = compose("config", [*WORDS, "batch_size=64", f"data.cache={cache}", *more])
    device = torch.device("cpu")
    prepare(cfg.precision, device)
    memory.keep_freed()
    times: list[float] = []

    class Timed(Unmarked):
        def mark(self, part: str) -> None:
            times.append(time.perf_counter())

    pretrain(cfg, Timed(device, warmup, steps, warm=times.clear))
    # after the warm-up; a step has two marks, of its data and of the rest
    seconds = median(after - before for before, after in zip(times, times[2:], strict=False))
    cfg.compile = False
    with FlopCounterMode(display=False) as counter:
        pretrain(cfg, Window(device, 0, 1))
    rate = matrix_rate(device, AUTOCAST.get(cfg.precision, torch.float32), lambda: None)
    floor = counter.get_total_flops() / rate
    return {"images_per_second": cfg.batch_size / seconds, "of_floor": floor / seconds}


def table(result: dict) -> str:
    lines = []
    for name, turns in result["turns"].items():
        rate, share = (median(turn[key] for turn in turns) for key in turns[0])
        lines.append([name, f"{rate:.1f}", f"{100 * share:.0f}"])
    return markdown(["", "images/s", "share of the floor, %"], lines, right=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=[*CHANGES])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cache", help=argparse.SUPPRESS)  # the process of one turn
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.cache:
        print(json.dumps(measure(args.only[0], args.warmup, args.steps, args.cache)))
        return
    result: dict = {**machine(), "turns": {name: [] for name in args.only}}
    with tempfile.TemporaryDirectory(prefix="ssl_bench_tried_") as cache:
        for _ in range(args.repeats):
            for name in args.only:
                command = [sys.executable, __file__, "--only", name, "--cache", cache]
                command += ["--warmup", str(args.warmup), "--steps", str(args.steps)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                result["turns"][name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, result["turns"][name][-1], flush=True)
    file = args.out / "tried_cpu.json"
    publish(result, table(result), file)
    print(f"\n{table(result)}\nwritten: {file}")


if __name__ == "__main__":
    main()
