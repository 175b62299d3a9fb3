"""The parts of our training step, each against its floor; and the work on images, for one core.

    python benchmarks/parts.py --steps 5 data=dl21 data.root=/data dir=none batch_size=128
    precision=bf16

The step is that of the program: `pretrain` and its loop run as they are, with a stand-in for the
run that leaves nothing behind, and hooks on the network and the optimizer that note the time.
Operations are counted by torch's FlopCounterMode; beside them stand the measured rates of a large
matrix product in the same precision and of memory. Prints a line of JSON; `--profile FILE` saves
torch.profiler's table of the step, which may be compiled: what is apart here never is.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from contenders import plain_transform
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import ssl_bench.command  # noqa: F401 - registers the resolvers of the configuration
from ssl_bench.augment.draws import keys
from ssl_bench.augment.views import Views
from ssl_bench.config import build
from ssl_bench.data.pictures import decode
from ssl_bench.runtime import memory
from ssl_bench.runtime.device import pick_device
from ssl_bench.runtime.precision import AUTOCAST, prepare
from ssl_bench.stages._training import open_source
from ssl_bench.stages.pretrain import pretrain

# In the order of a step. What a mark ends is named after it.
WAIT, AUGMENT, QUERY, EMA, KEY, QUEUE, BACKWARD, SGD, REST = PARTS = (
    "wait for data",
    "augment two views",
    "forward, query",
    "EMA of the key encoder",
    "forward, key",
    "logits, loss, queue",
    "backward",
    "SGD",
    "rest",
)


class Window:
    """Stands in for a Run: the loop makes `warmup + steps` steps, and `clock` is read where one
    part ends.

    clock: () -> what to add up. totals: {part: what passed in it} over the `steps`. warm: called
    when they begin.
    """

    is_main, directory, watches = False, None, False  # no files, no pictures, no best state
    rate_before = None  # it goes on from no other run
    ends_at_once = nullcontext

    def __init__(
        self,
        device: torch.device,
        warmup: int,
        steps: int,
        clock: Callable[[], float] = lambda: 0.0,
        warm: Callable[[], object] = lambda: None,
    ) -> None:
        self.device, self.warmup, self.steps, self.clock, self.warm = (
            device,
            warmup,
            steps,
            clock,
            warm,
        )
        self.totals: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = {}

    def mark(self, part: str) -> None:
        now = self.clock()
        self.totals[part] += now - self.last
        self.last = now

    def carry_over(self, per_epoch: int, **state: object) -> int:
        return 0

    def end_of(self, per_epoch: int, epochs: int) -> int:
        return per_epoch * epochs

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        def ends(part: str) -> Callable[..., None]:
            return lambda *_: self.mark(part)

        model.register_forward_pre_hook(ends(AUGMENT))
        model.backbone.register_forward_pre_hook(ends(REST))
        model.head.register_forward_hook(ends(QUERY))
        model.key_backbone.register_forward_pre_hook(ends(EMA))
        model.key_head.register_forward_hook(ends(KEY))
        model.register_forward_hook(ends(QUEUE))
        optimizer.register_step_pre_hook(ends(BACKWARD))
        optimizer.register_step_post_hook(ends(SGD))
        update = model.update
        model.update = lambda progress: (update(progress), self.mark(QUEUE))
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self.bytes |= {EMA: 3 * trained, SGD: 5 * trained}  # reads and writes
        queue = model.queue.keys
        self.queue_bytes, self.queue_size = queue.numel() * queue.element_size(), queue.shape[1]
        return 0

    def progress(self, steps: Iterable, start: int, total: int) -> Iterator:
        self.last = self.clock()
        for number, step in enumerate(islice(steps, self.warmup + self.steps)):
            self.mark(WAIT)
            if number == self.warmup:
                self.totals.clear()
                self.warm()
            yield step
            self.mark(REST)

    def every(self, what: str, step: int, most: int | None = None) -> bool:
        return False

    def stopping(self, step: int) -> bool:
        return False

    def last_line(self) -> dict[str, float]:
        return {}

    def uses(self, split: str, now: dict) -> None:
        pass


def best(work: Callable[[], object], wait: Callable[[], None], repeats: int = 10) -> float:
    """Seconds of the fastest of several."""
    seconds = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def bandwidth(device: torch.device, wait: Callable[[], None]) -> float:
    """Bytes a second: of a large addition in place, since a copy also reads on a CPU what it is to
    overwrite.
    """
    total, other = torch.zeros(2**26, device=device), torch.zeros(2**26, device=device)
    return 3 * other.nbytes / best(lambda: total.add_(other), wait)


def matrix_rate(device: torch.device, dtype: torch.dtype, wait: Callable[[], None]) -> float:
    """Operations of a second of multiplying large square matrices."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: a @ b, wait)


def step_parts(
    cfg: DictConfig, device: torch.device, warmup: int, steps: int, wait: Callable[[], None]
) -> dict:
    """{"seconds": of a step, by part; "flops"; "bytes": the least that must move}"""

    def clock() -> float:
        wait()
        return time.perf_counter()

    timed = Window(device, warmup, steps, clock)
    pretrain(cfg, timed)
    with FlopCounterMode(display=False) as counter:
        counted = Window(device, 0, 1, counter.get_total_flops)
        pretrain(cfg, counted)
    views = 2 * cfg.batch_size * 3
    # uint8 read, float32 written
    pixels = views * cfg.data.image_size**2 + 4 * views * cfg.augmentation.image_size**2
    logits = 4 * cfg.batch_size * (timed.queue_size + 1)
    return {
        "seconds": {part: timed.totals[part] / steps for part in PARTS},
        "flops": {part: counted.totals[part] for part in PARTS},
        "bytes": {AUGMENT: pixels, QUEUE: timed.queue_bytes + logits, **timed.bytes},
    }


def gather(
    cfg: DictConfig, device: torch.device, wait: Callable[[], None], batches: int = 50
) -> dict:
    """A batch from the packed images, when nobody makes it wait."""
    views = build.construct(cfg.augmentation)
    data = build.construct(cfg.data)
    source = open_source(cfg, Window(device, 0, 0), data, "pretrain", views)
    stream = source.stream(0, batches)
    next(stream)
    wait()
    began = time.perf_counter()
    for _ in stream:
        pass
    wait()
    return {
        "seconds": (time.perf_counter() - began) / (batches - 1),
        "bytes": 2 * cfg.batch_size * 3 * cfg.data.image_size**2,
    }


def one_core(cfg: DictConfig, paths: list[Path], images: Tensor, memory: float) -> dict:
    """Images or views a second on one core: ours, what the peers do, and the floor of `memory`
    bytes a second.
    """

    def no_wait() -> None:
        pass

    views = build.construct(cfg.augmentation)
    peer = plain_transform(cfg.augmentation.image_size)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    drawn = keys(0, 0, torch.arange(len(images)))
    size = cfg.data.image_size
    work = {
        "files read": lambda: [path.read_bytes() for path in paths],
        "files decoded": lambda: [decode(path, size) for path in paths],
        "views by PIL, files decoded": lambda: [
            (peer(p), peer(p)) for p in (Image.open(f).convert("RGB") for f in paths)
        ],
        "views by PIL": lambda: [(peer(picture), peer(picture)) for picture in pictures],
        "views by ours": lambda: views(images, drawn),
    }
    rates = {}
    for name, function in work.items():
        count = len(images) if name == "views by ours" else len(paths)
        rates[name] = count * (2 if "views" in name else 1) / best(function, no_wait, repeats=3)
    return rates | {
        "views at the rate of memory": memory / (3 * (size**2 + 4 * cfg.augmentation.image_size**2))
    }


class Unmarked(Window):
    """Without hooks: compiled code would stop at each."""

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        return 0


def save_profile(cfg: DictConfig, device: torch.device, path: Path, steps: int = 5) -> dict:
    """{"busy", "augmenting"}: seconds of a step in kernels, on a GPU; {} elsewhere. And the table
    in a file.
    """
    on_gpu = device.type == "cuda"
    profiler = profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu, acc_events=True
    )
    forward = Views.forward
    Views.forward = record_function(AUGMENT)(forward)
    pretrain(cfg, Unmarked(device, warmup=5, steps=steps, warm=profiler.start))
    Views.forward = forward
    profiler.stop()
    events = profiler.key_averages()
    path.write_text(
        events.table(
            sort_by=f"self_{device.type}_time_total", row_limit=40, max_name_column_width=60
        )
    )
    if not on_gpu:
        return {}
    kernels = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    (launcher,) = (
        event for event in events if event.key == AUGMENT and event.device_type == DeviceType.CPU
    )
    microseconds = {"busy": sum(event.self_device_time_total for event in kernels)}
    microseconds["augmenting"] = launcher.device_time_total
    return {name: value / 1e6 / steps for name, value in microseconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="+", help="of ssl-bench stage=pretrain")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--images", type=int, default=500, help="files for what is measured on one core"
    )
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args()

    with initialize_config_module("ssl_bench.conf", version_base="1.3"):
        cfg = compose("config", args.overrides)
    build.check(cfg)
    apart = OmegaConf.merge(cfg, {"compile": False})
    device = pick_device(cfg.device, 0)
    prepare(cfg.precision, device)  # as the program does
    if device.type == "cpu":
        memory.keep_freed()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    dtype = AUTOCAST.get(cfg.precision, torch.float32)
    rates = {"bytes": bandwidth(device, wait), "flops": matrix_rate(device, dtype, wait)}
    result = {"rates": rates, **step_parts(apart, device, args.warmup, args.steps, wait)}
    store = build.construct(cfg.data).open("pretrain")
    result["gather"] = gather(cfg, device, wait)
    if args.profile:
        result["profile"] = save_profile(cfg, device, args.profile)
    torch.set_num_threads(1)
    files = [Path(cfg.data.root, "unlabeled", f"{index}.png") for index in range(args.images)]
    images = torch.from_numpy(store.images[: cfg.batch_size].copy()).permute(0, 3, 1, 2)
    result["one_core"] = one_core(cfg, files, images, bandwidth(torch.device("cpu"), lambda: None))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
