"""Views cut from pictures of any size where they are decoded, each picture once for all its views.

What is cut is known before a picture is read (`augment.windows`), so that threads only decode and
resample. They share the memory of the process: torch and the decoders let go of Python's lock.
"""

import copy
import io
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from itertools import islice
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_bench.augment.windows import Look, Window
from ssl_bench.data import pictures
from ssl_bench.data.encoded import MIRRORED, UPSIDE_DOWN, Encoded, upright
from ssl_bench.data.pictures import Values
from ssl_bench.data.pool import default_workers
from ssl_bench.data.source import AHEAD, PATIENCE, Batch, Source, sent
from ssl_bench.errors import UserError
from ssl_bench.runtime import distributed
from ssl_bench.runtime.threads import lone_threads

PIECE = 16  # pictures that a thread takes at once
# A JPEG is decoded at a half, a quarter or an eighth of its sides (DCT scaling, PIL's `draft`)
# where that leaves this many times the pixels, to a side, that each view needs.
MARGIN = 2
EIGHTHS = (1, 2, 4)  # of the sides, for which libjpeg-turbo has fast code


class _Part(NamedTuple):
    """Some pictures of a batch, and what is cut from them."""

    rows: np.ndarray  # int64 (n,), of the index
    windows: list[tuple[Window, ...]]  # of each picture, one a view
    outputs: list[Tensor]  # of each view: uint8 (n, 3, S, S), to be filled
    interpolations: list[str]  # of each view


class CutSource(Source):
    """Pictures of any size, each batch of them a list of views, uint8 (b, 3, S, S).

    look: which views. draft: large JPEGs are decoded at a part of their size (MARGIN), which moves
    the pixels of a view by about a level of 255. workers: threads that decode, by default one a
    CPU of this machine, of which each of its processes has a share.
    """

    def __init__(
        self,
        store: Encoded,
        look: Look,
        *args,
        values: Values = pictures.AS_STORED,
        draft: bool = False,
        workers: int | None = None,
        **kwargs,
    ):
        super().__init__(store.labels, store.indices, *args, **kwargs)
        self.store, self.look, self.values, self.draft = store, look, values, draft
        world = distributed.launched()
        shared = world.local_size if world else 1  # processes on these cores
        self.workers = workers or max(1, default_workers() // shared)
        self.sizes = torch.from_numpy(store.sizes)

    def shown_as(self, look: Look) -> "CutSource":
        other = copy.copy(self)
        other.look = look
        return other

    def _batches(self, wanted: Iterable[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        wanted = iter(wanted)
        ready: deque[tuple[list[Future], list[Tensor], np.ndarray]] = deque()
        threads = lone_threads(self.workers, "cutting")

        def ask() -> None:
            for epoch, rows in islice(wanted, 1):
                parts, outputs = self._planned(epoch, rows)
                ready.append(([threads.submit(self._cut, part) for part in parts], outputs, rows))

        try:
            for _ in range(AHEAD):
                ask()
            while ready:
                done, outputs, rows = ready.popleft()
                began = time.perf_counter()
                self._finish(done, rows)
                self.wait_seconds += time.perf_counter() - began
                ask()
                views = [sent(output, self.device) for output in outputs]
                labels = torch.from_numpy(self.labels[rows])
                indices = torch.from_numpy(self.indices[rows])
                yield views, sent(labels, self.device), sent(indices, self.device)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)

    def _planned(self, epoch: int, rows: np.ndarray) -> tuple[list[_Part], list[Tensor]]:
        """The parts that threads do, and where they write the views of the batch."""
        indices = torch.from_numpy(self.indices[rows])
        views = self.look.windows(self.sizes[rows], self.seed, epoch, indices)
        outputs = [self._empty(len(rows), view.size) for view in views]
        windows = list(zip(*(view.each() for view in views), strict=True))
        interpolations = [view.interpolation for view in views]
        parts = []
        for at in range(0, len(rows), PIECE):
            piece = slice(at, at + PIECE)
            filled = [output[piece] for output in outputs]
            parts.append(_Part(rows[piece], windows[piece], filled, interpolations))
        return parts, outputs

    def _empty(self, count: int, size: int) -> Tensor:
        pinned = self.device.type == "cuda"
        shape = (count, size, size, 3)  # channels last
        with torch.inference_mode(False):  # threads write to it, which aren't in the caller's mode
            return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned).permute(0, 3, 1, 2)

    def _cut(self, part: _Part) -> None:
        for number, (row, windows) in enumerate(zip(part.rows.tolist(), part.windows, strict=True)):
            entry = self.store.entries[row]
            eighths = eighths_for(windows) if self.draft and entry["jpeg"] else 8
            pixels = self._decoded(row, entry, eighths)
            scale = Scale.of(pixels, entry, eighths)
            for window, output, kind in zip(
                windows, part.outputs, part.interpolations, strict=True
            ):
                output[number] = cut(pixels, window, output.shape[-1], kind, scale)

    def _decoded(self, row: int, entry: np.void, eighths: int) -> np.ndarray:
        data = self.store.read(row)
        try:
            return decode(data, entry, self.values, eighths)
        except Exception as error:  # PIL raises many kinds for a file that isn't whole
            name = self.store.split.where(int(self.store.indices[row]))
            raise UserError(f"cannot decode {name} ({error}), which could be indexed") from error

    def _finish(self, parts: Sequence[Future], rows: np.ndarray) -> None:
        """Wait for the parts of a batch. UserError if they take PATIENCE seconds."""
        began = time.monotonic()
        while True:
            done, others = futures.wait(parts, 1, return_when=futures.FIRST_EXCEPTION)
            for part in done:
                part.result()
            if not others:
                return
            self.waiting(seconds := time.monotonic() - began)
            if seconds > PATIENCE:
                name = self.store.split.where(int(self.store.indices[rows[0]]))
                raise UserError(
                    f"no batch was decoded for {seconds:.0f} s, one with {name}; is the disk, or "
                    "its server, there?"
                )


def decode(data: bytes | memoryview, entry: np.void, values: Values, eighths: int) -> np.ndarray:
    """The picture of an entry of the index, upright: uint8 (H, W, 3), of a JPEG at `eighths`."""
    if not entry["jpeg"]:
        return pictures.decode(io.BytesIO(data), None, values)
    height, width = int(entry["height"]), int(entry["width"])
    if entry["turn"] >= 5:
        height, width = width, height
    least = {}
    if eighths < 8:  # the decoder takes the smallest size with so many pixels
        least = {"min_height": -(-height * eighths // 8), "min_width": -(-width * eighths // 8)}
    pixels = simplejpeg.decode_jpeg(data, **least)
    return np.ascontiguousarray(upright(pixels, int(entry["turn"])))


def eighths_for(windows: Sequence[Window]) -> int:
    """At how many eighths of its sides a JPEG may be decoded for these windows."""
    needs = 0.0
    for window in windows:
        for box, wanted in zip((window.height, window.width), window.resized, strict=True):
            needs = max(needs, 8 * MARGIN * wanted / box)
    return next((eighths for eighths in EIGHTHS if eighths >= needs), 8)


class Scale(NamedTuple):
    """Where a whole picture lies in one that was decoded at a part of its sides.

    Row y of the whole one is at y * part + top. The decoder rounds sides up, and where a picture is
    turned, what it has added comes first.
    """

    part: float = 1.0
    top: float = 0.0
    left: float = 0.0

    @classmethod
    def of(cls, pixels: np.ndarray, entry: np.void, eighths: int) -> "Scale":
        """pixels: what `decode` gives for the entry."""
        part, turn = eighths / 8, int(entry["turn"])
        below = pixels.shape[0] - int(entry["height"]) * part
        beside = pixels.shape[1] - int(entry["width"]) * part
        top = below if turn in UPSIDE_DOWN else 0.0
        return cls(part, top, beside if turn in MIRRORED else 0.0)


WHOLE = Scale()


def cut(
    pixels: np.ndarray, window: Window, size: int, interpolation: str, scale: Scale = WHOLE
) -> Tensor:
    """One view uint8 (3, size, size) of a picture uint8 (H, W, 3).

    scale: that of the picture to the one that the window is of. A random crop is resampled by
    torch, in half of PIL's time; whatever isn't made of whole pixels by PIL: a test view, whose
    pixels are so those of torchvision's transforms on files, and crops of a picture that was
    decoded at a part of its size.
    """
    top, left = window.top, window.left
    if scale == WHOLE and window.resized == (size, size):
        box = torch.from_numpy(pixels)[top : top + window.height, left : left + window.width]
        # a batch of one before its axes are turned: so torch sees channels last, and keeps it
        view = box[None].permute(0, 3, 1, 2)
        if view.shape[2:] != (size, size):
            view = F.interpolate(view, (size, size), mode=interpolation, antialias=True)
        view = view[0]
    else:
        y, x = window.corner
        tall, wide = window.height / window.resized[0], window.width / window.resized[1]
        rows = (top + y * tall, top + (y + size) * tall)
        columns = (left + x * wide, left + (x + size) * wide)
        view = _resampled(pixels, rows, columns, size, interpolation, scale)
    return view.flip(2) if window.mirrored else view


def _resampled(
    pixels: np.ndarray,
    rows: tuple[float, float],
    columns: tuple[float, float],
    size: int,
    interpolation: str,
    scale: Scale,
) -> Tensor:
    """What lies between these rows and columns of the whole picture, as uint8 (3, size, size)."""
    from PIL import Image

    height, width = pixels.shape[:2]
    top, bottom = (row * scale.part + scale.top for row in rows)
    left, right = (column * scale.part + scale.left for column in columns)
    # sums may have been rounded up
    box = (left, top, min(right, width), min(bottom, height))
    kind = Image.Resampling[interpolation.upper()]
    image = Image.fromarray(pixels).resize((size, size), kind, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
