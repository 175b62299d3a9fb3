"""The command from Python: `train` does what it does, `load` gives what it has trained."""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ssl_bench import command, console
from ssl_bench.config import build, messages, typed
from ssl_bench.errors import Interrupted, UserError
from ssl_bench.launch.process import set_up_logging
from ssl_bench.shell import quote

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from ssl_bench.augment.views import EvalView
    from ssl_bench.data.pictures import Values


READS = ("backbone", "pretrained_prefix")  # keys that `load` takes
_alone = threading.Lock()  # a command's words, folder and Hydra's state are the process's


def train(overrides: Sequence[str] = ()) -> command.Result:
    """Do what `ssl-bench OVERRIDES` does, in this process, and return what it leaves.

    overrides: ["stage=pretrain", "method=simclr"], as they are typed, but without a shell's
    quotes; --config-dir=DIR, too. Paths are relative to the current folder, and the same call
    continues or returns what is there. UserError for a mistake, with the line that the command
    prints. Ctrl-C, or a notebook's stop button, saves and raises KeyboardInterrupt.
    """
    _check_list("ssl_bench.train", overrides)
    words = [str(word) for word in overrides]
    for word in words:
        if word.startswith("-") and not word.startswith("--config-dir="):
            raise UserError(
                f"{word}: ssl_bench.train does one run, and takes KEY=VALUE and --config-dir=DIR; "
                "sweeps and other options are for the command line: ssl-bench --help"
            )
        if typed.key_of(word) in ("launcher", "hydra.mode"):
            raise UserError(
                f"{word}: ssl_bench.train runs in this process; launchers are for the command line"
            )
    with _as_before():
        sys.argv[:] = ["ssl-bench"]
        try:
            # whatever an experiment says: one run
            result = command.execute([*words, "hydra.mode=RUN"] if words else words)
        except command.Mistake as mistake:
            raise UserError(mistake.line) from None
        except Interrupted as stop:
            if stop.signum == signal.SIGINT:
                raise KeyboardInterrupt(f"{stop}; the same call continues") from None
            raise SystemExit(128 + stop.signum) from None
    assert result is not None
    return result


def load(run: str | os.PathLike, overrides: Sequence[str] = ()) -> tuple["nn.Module", "Transform"]:
    """The backbone of a run, in eval mode on the CPU, and how its images are to be shown to it.

    run: what `pretrained=` takes: what `train` returned, a run directory, a file, a zoo name.
    overrides: what these weights don't say of themselves, as ["backbone=resnet50"], and
    --config-dir=DIR for a constructor of your own. The backbone takes what the transform returns
    and gives features (N, D). UserError.
    """
    if not isinstance(run, str | os.PathLike):
        raise UserError(f"{run!r}: ssl_bench.load takes a path, or what ssl_bench.train returned")
    _check_list("ssl_bench.load", overrides)
    with _as_before(), hydra.initialize_config_module("ssl_bench.conf", version_base="1.3"):
        command.see_own_modules()
        words = ["stage=predict", "stage.images=.", f"pretrained={quote(os.fspath(run))}"]
        for word in overrides:
            folder = word.removeprefix("--config-dir=")
            added = f"hydra.searchpath=[{quote(f'file://{os.path.abspath(folder)}')}]"
            words.append(word if folder == word else added)
        _check_read([word for word in overrides if not word.startswith("--config-dir=")])
        try:
            cfg = hydra.compose("config", words)
            build.check(cfg)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(messages.message(error)) from None
        from ssl_bench.data.formats.base import values_of
        from ssl_bench.stages._pretrained import open_pretrained

        pretrained = open_pretrained(build.at_home(cfg))
        packed, view = pretrained.view(None, None)
        known = pretrained.config.get("data") or {}
        values = values_of(known.get("bit_depth"), known.get("value_range"))
    max_side = pretrained.max_side if packed is None else None
    return pretrained.backbone, Transform(packed, view, values, max_side)


def _check_list(name: str, overrides: Any) -> None:
    """UserError unless the overrides are a list of texts."""
    if isinstance(overrides, str):
        raise UserError(f"{overrides!r} is one text: {name} takes a list, [{overrides!r}]")
    if not isinstance(overrides, Sequence) or not all(isinstance(one, str) for one in overrides):
        raise UserError(f"{overrides!r}: {name} takes a list of texts, like ['batch_size=64']")


def _check_read(overrides: Sequence[str]) -> None:
    """UserError for the first override of a key that `load` doesn't read."""
    known = {*build.Root.model_fields, *build.SUPPLIED, *typed.ALWAYS}
    for word in overrides:
        key = typed.key_of(word)
        ours = re.split("[./]", key)[0] in known and not typed.covers(READS, key)
        if word.startswith("-") or (ours and not word.endswith("=null")):
            raise UserError(
                f"{word} would be ignored: ssl_bench.load reads backbone=, its keys, "
                "pretrained_prefix= and --config-dir=DIR; leave it out"
            )


class Transform:
    """Pictures as the run showed its test images to the backbone.

    packed: the pixels of the square that a picture becomes first; None: it stays whole. view: what
    makes normalised float32 (N, 3, S, S) of these; values: how more than 8 bits are read. max_side:
    of a whole picture; a larger one is made smaller, as data.max_side= does.
    """

    def __init__(
        self,
        packed: int | None,
        view: "EvalView",
        values: "Values",
        max_side: int | None = None,
    ) -> None:
        self.packed, self.view, self.values, self.max_side = packed, view, values, max_side

    def __repr__(self) -> str:
        side = f", max_side={self.max_side}" if self.max_side else ""
        return f"Transform(packed={self.packed}, view={self.view}, values={self.values}{side})"

    def __call__(self, images: Any) -> "Tensor":
        """Float32 (3, S, S) of one image, (N, 3, S, S) of a sequence or a tensor (N, 3, H, W).

        An image: a path, read as stage=predict reads it, a picture of PIL's, or uint8, a tensor
        (3, H, W) or an array (H, W, 3). UserError for anything else.
        """
        import numpy as np
        import torch

        if isinstance(images, torch.Tensor):
            one = images.ndim != 4
        else:
            one = not isinstance(images, Sequence) or isinstance(images, str)
        if not one and not len(images):
            raise UserError("no images: give one or more")
        pixels = [self._pixels(image) for image in ([images] if one else images)]
        if self.packed is None:
            view = self.view([torch.stack([self._cut(whole) for whole in pixels])])
        else:
            squares = torch.from_numpy(np.stack(pixels))
            view = self.view(squares.permute(0, 3, 1, 2))
        return view[0] if one else view

    def _cut(self, pixels: "np.ndarray") -> "Tensor":
        """The test view of a whole picture, before it is normalised: uint8 (3, S, S)."""
        import simplejpeg
        import torch

        from ssl_bench.data.cutting import cut
        from ssl_bench.data.encoded import smaller

        if self.max_side is not None and max(pixels.shape) > self.max_side:
            pixels = simplejpeg.decode_jpeg(smaller(pixels, self.max_side))
        size = pixels.shape[:2]
        (windows,) = self.view.windows(torch.tensor([size]), 0, 0, torch.zeros(1).long())
        return cut(pixels, windows.each()[0], windows.size, windows.interpolation)

    def _pixels(self, image: Any) -> "np.ndarray":
        """uint8 (packed, packed, 3), or (H, W, 3)."""
        import numpy as np

        from ssl_bench.data import pictures
        from ssl_bench.data.formats.own import as_picture

        if isinstance(image, str | os.PathLike):
            try:
                return pictures.decode(os.fspath(image), self.packed, self.values)
            except Exception as error:  # PIL raises errors of many classes
                raise UserError(f"{image}: can't be decoded ({error})") from None
        try:
            picture = as_picture(image)
            if self.packed is None:
                return np.array(pictures.whole(picture, self.values, []))
            return pictures.squared(picture, self.packed, self.values)
        except ValueError as error:
            raise UserError(f"{error}; or a path") from None


@contextmanager
def _as_before() -> Iterator[None]:
    """What a command sets for its process is put back: arguments, environment, Hydra's and torch's
    state. What the program has set of torch's doesn't reach the command, as in a shell.

    Its log goes to stderr, unless the program has its own handler of the logger "ssl_bench".
    """
    if not _alone.acquire(blocking=False):
        raise UserError(
            "ssl_bench is at work in another thread of this process: one call at a time; "
            "start processes for more"
        )
    log = logging.getLogger("ssl_bench")
    if all(isinstance(handler, console.Handler) for handler in log.handlers):
        set_up_logging(quiet=os.environ.get("RANK", "0") != "0")
    argv, environment = sys.argv[:], os.environ.get("HYDRA_FULL_ERROR")
    composed, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    there = "torch" in sys.modules
    try:
        with _torchs_switches().as_at_start() if there else nullcontext():
            yield
    finally:
        sys.argv[:] = argv
        if environment is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = environment
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = composed, config
        if not there and "torch" in sys.modules:
            _torchs_switches().reset()
        _alone.release()


def _torchs_switches() -> ModuleType:
    from ssl_bench.runtime import switches  # imports torch

    return switches
