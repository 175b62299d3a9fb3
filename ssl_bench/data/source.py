"""Batches of uint8 images on the device, in an order that follows from (seed, epoch).

The sources differ in where the images wait: in host memory, on the device, or undecoded on disk.
Pictures of any size come as views of them: see `cutting`.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ssl_bench.augment.windows import Look
from ssl_bench.data import pictures
from ssl_bench.data.pool import default_workers, run_in_order
from ssl_bench.data.store import DecodeRows, OnError, Split, cannot_decode
from ssl_bench.errors import UserError
from ssl_bench.runtime.seeding import fold

log = logging.getLogger(__name__)

PATIENCE = 600  # seconds without an image after which streaming gives up
AHEAD = 2  # batches prepared before they are asked for
BLOCK = 4096  # images sent to the device at once when all of them go there

# images, or a list of views cut from them; labels; indices in the split
Batch = tuple[Tensor | list[Tensor], Tensor, Tensor]


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of n images in an epoch: int64 (n,), the same on every machine."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(fold("order", seed, epoch)))


def fits(nbytes: int, device: torch.device) -> bool:
    """Would so many bytes leave most of a GPU's free memory to the training?"""
    if device.type != "cuda":
        return False
    # torch holds memory that it doesn't use
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return nbytes <= 0.4 * free


class Source(ABC):
    """Batches of labelled images, one process's share of each.

    labels, indices: int64 (N,). `batch_size` is that of all processes together: rank r gets part r
    of world_size equal parts of each batch. `subset`: those of `indices` to use, by default all;
    images that were skipped are never used.
    """

    def __init__(
        self,
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
        self.labels, self.indices = labels, indices
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.rows = np.arange(len(indices))
        if subset is not None:
            self.rows = np.flatnonzero(np.isin(indices, subset))
        self.wait_seconds = 0.0  # how long the consumer has waited for batches so far
        # called now and then while nothing comes, with the seconds waited
        self.waiting: Callable[[float], None] = lambda seconds: None

    @property
    def num_images(self) -> int:
        return len(self.rows)

    @property
    def steps_per_epoch(self) -> int:
        """The full batches in an epoch; images left over sit out. UserError if there is none."""
        if self.batch_size > self.num_images:
            raise UserError(
                f"batch_size={self.batch_size} is more than the {self.num_images} images; "
                f"use at most {self.num_images - self.num_images % self.world_size}"
            )
        return self.num_images // self.batch_size

    def shown_as(self, look: Look) -> "Source":
        """This source, whose batches are to be seen as `look` says: it cuts the views, if any."""
        return self

    def stream(
        self, start: int, stop: int
    ) -> Iterator[tuple[int, Tensor | list[Tensor], Tensor, Tensor]]:
        """Yield (step, images, labels, image indices) for steps `start` to `stop`, on the device.

        images: uint8 (b, 3, H, W) in channels_last, or a list of such; labels, indices: (b,).
        """
        batches = self._batches(self._wanted(start, stop))
        for step, batch in zip(range(start, stop), batches, strict=True):
            yield step, *batch

    def _wanted(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """The epoch of each step, and this rank's rows."""
        local, steps_per_epoch = self.batch_size // self.world_size, self.steps_per_epoch
        ordered = None  # the epoch whose order `order` is
        for step in range(start, stop):
            epoch, batch = divmod(step, steps_per_epoch)
            if epoch != ordered:
                order = self.rows[permutation(self.seed, epoch, self.num_images).numpy()]
                ordered = epoch
            at = batch * self.batch_size + self.rank * local
            yield epoch, order[at : at + local]

    def epoch_pass(self, epoch: int = 0) -> Iterator[Batch]:
        """Yield every image of this rank's share once, in order: (images, labels, image indices).

        The last batch may be smaller. Rank r has every world_size-th image from the r-th on. epoch:
        whose draws views are cut by.
        """
        share, local = self.rows[self.rank :: self.world_size], self.batch_size // self.world_size
        starts = range(0, len(share), local)
        yield from self._batches((epoch, share[at : at + local]) for at in starts)

    @abstractmethod
    def _batches(self, wanted: Iterable[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        """A batch for each of these (epoch, rows), on the device."""

    def _waited(self, get: Callable[[], Batch]) -> Batch:
        began = time.perf_counter()
        batch = get()
        self.wait_seconds += time.perf_counter() - began
        return batch


class HostSource(Source):
    """Packed images in host memory or on disk.

    A background thread gathers each batch and copies it to the device while the step before
    computes. images: uint8 (N, H, W, 3), may be memory-mapped.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray, *args, **kwargs
    ):
        super().__init__(labels, indices, *args, **kwargs)
        self.images = images
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _batches(self, wanted: Iterable[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        ready: deque = deque()
        wanted = iter(wanted)
        # a new thread would use GPU 0
        start = () if self._copying is None else (torch.cuda.set_device, (self._copying.device,))
        thread = ThreadPoolExecutor(1, "source", *start)

        def ask() -> None:
            for _, rows in islice(wanted, 1):
                ready.append(thread.submit(self._gather, rows))

        try:
            for _ in range(AHEAD):
                ask()
            while ready:
                batch = self._waited(ready.popleft().result)
                ask()
                if self._copying is not None:
                    # the next copy must not reuse its memory before the step is through
                    for tensor in batch:
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield batch
        finally:
            thread.shutdown(wait=True, cancel_futures=True)

    def _gather(self, rows: np.ndarray) -> Batch:
        shape, pin = (len(rows), *self.images.shape[1:]), self._copying is not None
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        # mode="raise" would copy once more
        np.take(self.images, rows, axis=0, out=images.numpy(), mode="clip")
        labels, indices = torch.from_numpy(self.labels[rows]), torch.from_numpy(self.indices[rows])
        batch = images.permute(0, 3, 1, 2), labels, indices
        if self._copying is None:
            return tuple(tensor.to(self.device) for tensor in batch)
        with torch.cuda.stream(self._copying):
            batch = tuple(sent(tensor, self.device) for tensor in batch)
        self._copying.synchronize()  # this thread waits, the step doesn't
        return batch


class ResidentSource(Source):
    """All packed images, uint8 (N, H, W, 3), on the device, where a batch costs one gather."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray, *args, **kwargs
    ):
        super().__init__(labels, indices, *args, **kwargs)
        self.images = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
        for start in range(0, len(images), BLOCK):
            block = slice(start, start + BLOCK)
            self.images[block] = torch.from_numpy(images[block].copy())
        self.device_labels = torch.from_numpy(labels).to(self.device)
        self.device_indices = torch.from_numpy(indices).to(self.device)

    def _batches(self, wanted: Iterable[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        for _, rows in wanted:
            at = sent(torch.from_numpy(np.ascontiguousarray(rows)), self.device)
            images = self.images[at].permute(0, 3, 1, 2)
            yield images, self.device_labels[at], self.device_indices[at]


class StreamedSource(Source):
    """Images that worker processes decode anew for each batch, for sets too large to be packed.

    `on_error`: "raise", or "skip" an image that can't be decoded: the next of the split that can be
    takes its place, and so comes twice. A training bears that, a measurement doesn't.
    """

    def __init__(
        self, split: Split, *args, workers: int | None = None, on_error: OnError = "raise", **kwargs
    ):
        indices = np.arange(split.length)
        super().__init__(split.labels_of(indices), indices, *args, **kwargs)
        self.split, self.workers, self.on_error = split, workers or default_workers(), on_error
        self._told: set[int] = set()
        self._noticed: pictures.Noticed = {}
        self._kinds: set[str] = set()

    def _batches(self, wanted: Iterable[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        task = DecodeRows(self.split.read, self.split.length, self.on_error)
        chunks = ((rows,) for _, rows in wanted)
        decoded = run_in_order(task, chunks, self.workers, self._nothing_came)
        with closing(decoded):
            while (found := self._waited(lambda: next(decoded, None))) is not None:
                images, rows, bad, noticed = found
                if images is None:
                    raise UserError(cannot_decode(self.split, bad))
                for index in bad.keys() - self._told:
                    log.warning(
                        "skipped for the next image: %s (%s)", self.split.where(index), bad[index]
                    )
                self._told |= bad.keys()
                pictures.merge(self._noticed, noticed)
                pictures.tell(self._noticed, self.split.name, self.split.where, self._kinds)
                arrays = (images, self.labels[rows], rows)
                batch = [sent(torch.from_numpy(array), self.device) for array in arrays]
                yield batch[0].permute(0, 3, 1, 2), batch[1], batch[2]

    def _nothing_came(self, seconds: float, chunk: tuple[np.ndarray]) -> None:
        self.waiting(seconds)
        if seconds > PATIENCE:
            raise UserError(
                f"no image was decoded for {seconds:.0f} s, in a batch with "
                f"{self.split.where(int(chunk[0][0]))}; is the disk, or its server, there?"
            )


class FeatureSource(Source):
    """Features that a frozen backbone has computed, in place of images.

    They are kept on the device where they fit, else in memory. copies: float32 (N, dim) each; epoch
    e sees copy e mod their number. labels: int64 (N, ...).
    """

    def __init__(self, copies: list[Tensor], labels: Tensor, *args, **kwargs):
        super().__init__(labels.numpy(), np.arange(len(labels)), *args, **kwargs)
        if fits(sum(copy.nbytes for copy in copies), self.device):
            copies = [copy.to(self.device) for copy in copies]
        self.copies = copies

    def _batches(self, wanted: Iterable[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        for epoch, rows in wanted:
            copy, at = self.copies[epoch % len(self.copies)], torch.from_numpy(rows)
            batch = copy[sent(at, copy.device)], torch.from_numpy(self.labels[rows]), at
            yield tuple(sent(tensor, self.device) for tensor in batch)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting.

    A copy from pageable memory would wait for the step before.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
