"""Several seeds of one configuration in one process: stacked weights beside one after the other.

    python benchmarks/stacked.py                 one CPU core: some minutes
    python benchmarks/stacked.py --device cuda   one GPU: minutes

A training step of SimCLR's loss and SGD, on batches already in memory: torch.func.vmap over the
seeds' weights, gradients and images, against a loop over the same seeds. It is the step alone,
without augmentation, running statistics or logging. One thread, as a member of a sweep has that
shares two cores with another.
Writes stacked_DEVICE.json and .md to --out.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from statistics import median

import torch
from common import machine, publish
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssl_bench.backbones.resnet import resnet18
from ssl_bench.backbones.vit import vit_tiny
from ssl_bench.methods.simclr import nt_xent
from ssl_bench.report.tables import markdown

SIZE = 16  # pixels
LR = 0.01


def quickstart() -> nn.Module:
    return resnet18(width=16, stem="small")


def bench_vit() -> nn.Module:
    return vit_tiny(image_size=SIZE, patch_size=4, dim=64, num_heads=2, depth=4, class_token=False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18, width 16": quickstart,
    "ViT, 4 blocks of width 64": bench_vit,
}
WAYS = {"one after the other": "one_by_one", "stacked": "stacked"}


class Seeds:
    """A step of all of them: `one_by_one` and `stacked` train weights of their own, the same at
    first. Images: (seeds, N, 3, SIZE, SIZE) of either view.
    """

    def __init__(self, network: Callable[[], nn.Module], count: int, device: torch.device) -> None:
        self.device = device
        self.skeleton = network().to(device).train()
        for part in self.skeleton.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.track_running_stats = False
                part.running_mean = part.running_var = part.num_batches_tracked = None
        self.models = [deepcopy(self.skeleton) for _ in range(count)]
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for model in self.models]
        self.weights = stack_module_state(self.models)[0]

    def one_by_one(self, first: Tensor, second: Tensor) -> None:
        for model, optimizer, *views in zip(
            self.models, self.optimizers, first, second, strict=True
        ):
            self.loss(dict(model.named_parameters()), *views).backward()
            optimizer.step()
            optimizer.zero_grad()

    def stacked(self, first: Tensor, second: Tensor) -> None:
        # flash attention on a CPU can't be stacked (torch 2.14)
        on_cpu = self.device.type == "cpu"
        with sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
            gradients = vmap(grad(self.loss))(self.weights, first, second)
        with torch.no_grad():
            for name, gradient in gradients.items():
                self.weights[name].sub_(gradient, alpha=LR)

    def loss(self, weights: dict[str, Tensor], first: Tensor, second: Tensor) -> Tensor:
        features = functional_call(self.skeleton, weights, (torch.cat([first, second]),))
        return nt_xent(*features.chunk(2), temperature=0.2)


def rates(
    network: Callable[[], nn.Module], seeds: int, batch: int, steps: int, device: torch.device
) -> dict[str, float]:
    """{way: images a second of all seeds}."""
    found = {}
    views = torch.rand(2, seeds, batch, 3, SIZE, SIZE, device=device)
    for way, name in WAYS.items():
        step, times = getattr(Seeds(network, seeds, device), name), []
        for _ in range(steps + 2):  # two to warm up
            began = time.perf_counter()
            step(*views)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        found[way] = seeds * batch / median(times[2:])
    return found


def table(result: dict) -> str:
    counts = result["seeds"]
    lines = []
    for name, found in result["networks"].items():
        for way in WAYS:
            cells = [f"{median(turn[way] for turn in found[str(count)]):,.0f}" for count in counts]
            lines.append([f"{name}, {way}", *cells])
    header = ["images/s of all seeds", *map(str, counts)]
    return markdown(header, lines, right=len(counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result: dict = {
        **{key: getattr(args, key) for key in ("seeds", "batch", "threads", "steps")},
        **machine(),
        "networks": {name: {str(count): [] for count in args.seeds} for name in NETWORKS},
    }
    for _ in range(args.repeats):
        for name, network in NETWORKS.items():
            for count in args.seeds:
                found = rates(network, count, args.batch, args.steps, torch.device(args.device))
                result["networks"][name][str(count)].append(found)
                print(f"{name}, {count}: {found}", flush=True)
    file = args.out / f"stacked_{args.device}.json"
    publish(result, table(result), file)
    print(f"\n{table(result)}\nwritten: {file}")


if __name__ == "__main__":
    main()
