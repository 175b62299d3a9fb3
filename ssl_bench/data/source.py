"""Batches from packed images in host memory or on disk. The order is a pure function of (seed, epoch)."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ssl_bench.errors import UserError
from ssl_bench.seeding import fold

AHEAD = 2  # batches prepared before they are asked for

Batch = tuple[Tensor, Tensor, Tensor]


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of n images in an epoch: int64 (n,), the same on every machine."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(fold("order", seed, epoch)))


class HostSource:
    """Batches of `images`, gathered by one background thread, one process's share of each.

    images uint8 (N, H, W, 3), may be memory-mapped; labels, indices int64 (N,). `batch_size` is global: of each batch
    of the run, rank r gets part r of world_size equal parts. `subset`: int64 rows to use instead of all N.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        indices: np.ndarray,
        batch_size: int,
        seed: int,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        subset: np.ndarray | None = None,
    ):
        if batch_size % world_size:
            lower = batch_size - batch_size % world_size
            raise UserError(
                f"batch_size={batch_size} cannot be split evenly over {world_size} processes; "
                f"use a multiple of {world_size}, like {lower + world_size}"
            )
        self.images, self.labels, self.indices = images, labels, indices
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.rows = np.arange(len(images)) if subset is None else np.asarray(subset)
        self.wait_seconds = 0.0  # time that the consumer waited for batches so far

    @property
    def num_images(self) -> int:
        return len(self.rows)

    @property
    def steps_per_epoch(self) -> int:
        """The images that don't fill a last batch are left out of an epoch. UserError when they fill none."""
        if self.batch_size > self.num_images:
            raise UserError(
                f"batch_size={self.batch_size} is more than the {self.num_images} images; "
                f"use at most {self.num_images - self.num_images % self.world_size}"
            )
        return self.num_images // self.batch_size

    def stream(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield (step, images uint8 (b, 3, H, W) in channels_last, labels (b,), image indices (b,)) on the device."""
        local = self.batch_size // self.world_size
        first = self.rank * local

        steps_per_epoch = self.steps_per_epoch

        @lru_cache(maxsize=1)
        def order(epoch: int) -> np.ndarray:
            return self.rows[permutation(self.seed, epoch, self.num_images).numpy()]

        def rows(step: int) -> np.ndarray:
            epoch, batch = divmod(step, steps_per_epoch)
            at = batch * self.batch_size + first
            return order(epoch)[at : at + local]

        for step, batch in self._prefetch(range(start, stop), rows):
            yield step, *batch

    def epoch_pass(self) -> Iterator[Batch]:
        """Yield every image of this rank's share once, in order, as (images, labels, image indices); the last batch may
        be smaller. Rank r has every world_size-th image from the r-th.
        """
        share, local = self.rows[self.rank :: self.world_size], self.batch_size // self.world_size
        for _, batch in self._prefetch(range(0, len(share), local), lambda at: share[at : at + local]):
            yield batch

    def _prefetch(self, keys: Iterable[int], rows: Callable[[int], np.ndarray]) -> Iterator[tuple[int, Batch]]:
        ready = deque()
        keys = iter(keys)
        thread = ThreadPoolExecutor(1, thread_name_prefix="source")

        def ask() -> None:
            if (key := next(keys, None)) is not None:
                ready.append((key, thread.submit(lambda: self._gather(rows(key)))))

        try:
            for _ in range(AHEAD):
                ask()
            while ready:
                key, future = ready.popleft()
                began = time.perf_counter()
                batch = future.result()
                self.wait_seconds += time.perf_counter() - began
                ask()
                # copied here and not in the thread: on the stream that will use it
                yield key, tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
        finally:
            thread.shutdown(wait=True, cancel_futures=True)

    def _gather(self, rows: np.ndarray) -> Batch:
        pin = self.device.type == "cuda"
        images = torch.empty((len(rows), *self.images.shape[1:]), dtype=torch.uint8, pin_memory=pin)
        np.take(self.images, rows, axis=0, out=images.numpy(), mode="clip")  # "raise" would copy once more
        labels, indices = torch.from_numpy(self.labels[rows]), torch.from_numpy(self.indices[rows])
        if pin:
            labels, indices = labels.pin_memory(), indices.pin_memory()
        return images.permute(0, 3, 1, 2), labels, indices
