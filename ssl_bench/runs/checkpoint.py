"""Checkpoints `{run, step, model, optimizer}` and, with fp16, `scaler`, with ema, `ema`.

They are written atomically, hold no code, and are loaded strictly.
"""

import errno
import logging
import os
import re
import shutil
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from ssl_bench import files
from ssl_bench.errors import UserError
from ssl_bench.runs import layout
from ssl_bench.runs.layout import complete, step_of

log = logging.getLogger(__name__)

SMALL = ".small"  # suffix of a state that will take the place of a larger one
# torch's words for the operation with which pickles begin since protocol 4
FRAME = re.compile(r"Unsupported operand 149\b")
ZIP, FOLDER = b"PK\x03\x04", 0x10
# Settings and counters of these classes lie beside the tensors in files of other programs. They are
# allowed by name, and an empty object or a dictionary takes the place of each: none of these
# classes is ever made, whether it is installed here or not.
SETTINGS: tuple[str, ...] = ("argparse.Namespace", "typing.Any", "types.SimpleNamespace")
SETTINGS += tuple(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str"))
SETTINGS += tuple(
    f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")
)
SETTINGS += ("pathlib._local.PosixPath", "pathlib._local.WindowsPath")
SETTINGS += ("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig")
SETTINGS += ("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata")
SETTINGS += tuple(
    f"omegaconf.nodes.{kind}Node"
    for kind in ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")
)
SETTINGS += ("numpy.dtype", "numpy.ndarray", "mmengine.logging.history_buffer.HistoryBuffer")
SETTINGS += tuple(
    f"numpy.{core}.multiarray.{name}"
    for core in ("core", "_core")
    for name in ("scalar", "_reconstruct")
)
DICTIONARIES = ("collections.defaultdict", "lightning_fabric.utilities.data.AttributeDict")
DICTIONARIES += ("lightning.fabric.utilities.data.AttributeDict",)
DICTIONARIES += ("pytorch_lightning.utilities.parsing.AttributeDict",)


class _Setting:
    """What stands in the place of an object of another program: it keeps nothing."""

    def __new__(cls, *args: object) -> "_Setting":
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Dictionary:
    """What stands in the place of a dictionary of a class of its own: torch fills no other kind."""

    def __new__(cls, *args: object) -> OrderedDict:
        return OrderedDict()


STAND_INS = [*((_Setting, name) for name in SETTINGS), *((_Dictionary, n) for n in DICTIONARIES)]


def verify(path: Path) -> None:
    """UserError for a file of torch.save whose bytes aren't those that were written.

    torch writes a CRC-32 of each record but doesn't check it when it reads: a tensor with a flipped
    bit is read as it is. Files from before torch 1.6 have none, nor have those written under
    torch.serialization.set_crc32_options(False).
    """
    with open(path, "rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return  # torch doesn't read it as a zip file either
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                if all(record.CRC == 0 for record in records):
                    return
                # torch reads no record that is marked as a folder; the tensor would be whatever
                # was in memory
                folders = [record.filename for record in records if record.external_attr & FOLDER]
                damaged = next(iter(folders), None) or archive.testzip()
        except Exception:  # zipfile raises errors of many classes for a damaged directory
            damaged = "its directory"
    if damaged:
        what = damaged.partition("/")[2] or damaged
        raise UserError(f"{path}: damaged or truncated: {what} isn't what was written (CRC-32)")


def read(path: Path) -> object:
    """The content of a file of torch.save, tensors and plain data. No code in it is run.

    Settings of other programs are left out (STAND_INS). UserError for a file that is damaged or
    holds anything else.
    """
    verify(path)
    try:
        # the warnings are about the pickle protocol of files that are refused anyway
        with (
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals(STAND_INS),
        ):
            return torch.load(path, map_location="cpu", weights_only=True)
    # torch raises errors of many classes for a file that is damaged or not torch's
    except Exception as error:
        if FRAME.search(str(error)):
            raise UserError(
                f"{path}: written with pickle protocol 4 or newer, which isn't read as plain data: "
                "write it again by torch.save(CONTENT, FILE), without pickle_protocol="
            ) from None
        found = re.search(r"GLOBAL (\S+)", str(error))
        kind = "TorchScript" if "TorchScript archive" in str(error) else found and found[1]
        if kind and zipfile.is_zipfile(path):  # and so whole, as its digests say
            raise UserError(f"{path}: {_to_be_run(path, kind)}") from None
        reason = f"it holds a {kind}" if kind else type(error).__name__
        raise UserError(
            f"{path}: truncated, or not a PyTorch file of tensors and plain data ({reason})"
        ) from None


def _to_be_run(path: Path, kind: str) -> str:
    """What is wrong with a file that holds an object of this kind, and what to save instead."""
    names = [] if kind == "TorchScript" else get_unsafe_globals_in_checkpoint(path)
    run = "which would have to be run to be read"
    if kind == "TorchScript" or any(name.startswith("torch.nn.modules.") for name in names):
        return f"holds a whole model ({kind}), {run}: save model.state_dict() instead"
    return f"holds a {kind}, {run}: save tensors and plain data alone"


def carry_over(path: Path, typed: str, **state: Any) -> int:
    """Load the state of another run into the objects, in place; returns its step.

    An optimizer keeps its own settings, such as the rate, and takes the rest of its state. A scaler
    or an average that the other run didn't have begins anew. UserError where a state doesn't fit;
    typed: the override that names it.
    """
    content = read(path)
    if not isinstance(content, dict) or not {"model", "step"} <= content.keys():
        raise UserError(f"{typed}: {path} holds no state of a training")
    check_whole(path, content, typed)
    if content["step"] != step_of(path):
        raise UserError(f"{path}: holds step {content['step']}, not the one of its name")
    for key, value in state.items():
        if key in ("scaler", "ema") and key not in content:
            continue
        saved = content.get(key)
        try:
            if key == "optimizer":
                own = value.state_dict()["param_groups"]
                if [group["params"] for group in own] != [
                    g["params"] for g in saved["param_groups"]
                ]:
                    raise ValueError("its parameters are in other groups")
                saved = {"state": saved["state"], "param_groups": own}
            value.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"{typed}: the state of its {key} doesn't fit ({why}): type pretrained= to begin "
                "with its backbone alone"
            ) from None
    return content["step"]


def check_fits(path: Path, typed: str, model: nn.Module) -> None:
    """UserError unless the model in a checkpoint has the tensors of this one."""
    try:
        content = read(path)
    except UserError as error:
        before = [file for file in complete(path.parents[1]) if file.name < path.name]
        if not before:
            raise
        raise UserError(f"{error}; the state before it is continue_from={before[0]}") from None
    check_whole(path, content, typed)
    saved = content.get("model") if isinstance(content, dict) else None
    wanted = model.state_dict()
    saved = saved if isinstance(saved, dict) else {}
    shapes = {key: getattr(value, "shape", None) for key, value in saved.items()}
    wrong = [key for key in wanted if shapes.pop(key, None) != wanted[key].shape]
    wrong += shapes
    if wrong:
        names = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(
            f"{typed}: its state isn't this method's: {len(wrong)} tensors are missing, unexpected "
            f"or of another shape ({names}): leave method, backbone and their sizes as they were, "
            "or type pretrained= to begin with its backbone alone"
        )


def _backbone_of(content: Any) -> dict[str, Any]:
    """What `pretrained` reads of the content of a checkpoint: its backbone, and the average's."""
    kept = {key: content[key] for key in ("run", "step")} | {"kept": "backbone"}
    for key in ("model", "ema"):
        if key in content:
            tensors = content[key].items()
            kept[key] = {name: value for name, value in tensors if name.startswith("backbone.")}
    return kept


def check_whole(path: Path, content: object, typed: str) -> None:
    """UserError for a state of which the run has kept the backbone alone."""
    if isinstance(content, dict) and content.get("kept"):
        raise UserError(
            f"{typed}: {path} is a backbone alone (its run had keep={content['kept']}): type "
            "pretrained= to begin with it"
        )


def name_of(step: int) -> str:
    """The name of the file with the state of a step."""
    return f"step{step:010d}.pt"


class Checkpoint:
    """The newest `keep` states of one run, which `identity` names: files of others are refused.

    keep: a number; or "all"; or what stays of a finished run (`settle`), of which there are two as
    long as it runs: "last", "best" (by a metric), "backbone" (of either).
    """

    def __init__(self, directory: Path, identity: str, keep: int | str = 2) -> None:
        self.directory, self.identity, self.keep = directory, identity, keep

    def save(self, step: int, **state: object) -> Path:
        """Write a checkpoint and delete the oldest; its path. Rank 0 alone calls this.

        state: objects with a `state_dict()`.
        """
        content = {"run": self.identity, "step": step}
        content |= {key: value.state_dict() for key, value in state.items()}
        path = self.directory / layout.CHECKPOINTS / name_of(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            with files.replacing(path, partial, "wb") as file:
                torch.save(content, file)
        except RuntimeError as error:
            if "inline_container" in str(error):  # torch's words for a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial)) from error
            raise
        if self.keep != "all":
            for old in complete(self.directory)[self.keep if isinstance(self.keep, int) else 2 :]:
                old.unlink()
        return path

    def keep_as_best(self, step: int) -> None:
        """Keep the checkpoint of this step as the best, and delete the one that was it before.

        It is a link, as long as the state is among the newest, and takes no room of its own.
        """
        folder = self.directory / layout.BEST
        folder.mkdir(exist_ok=True)
        path = folder / name_of(step)
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        try:
            os.link(self.directory / layout.CHECKPOINTS / path.name, partial)
        except OSError:  # not every file system has hard links
            shutil.copyfile(self.directory / layout.CHECKPOINTS / path.name, partial)
        partial.replace(path)
        for old in layout.best(self.directory):
            if old != path:
                old.unlink()

    def final(self) -> dict[Path, Path]:
        """{a state that stays of a finished run, last or best: the file that it will be}.

        That file is the state itself, or lies beside it until `settle` moves it.
        """
        last, best = complete(self.directory)[:1], layout.best(self.directory)
        if self.keep == "best" and best:
            last = []
        made = {}
        for path in (*last, *best):
            made[path] = path
            if self.keep == "backbone":
                made[path] = path.with_suffix(SMALL)
                content = _backbone_of(read(path))
                with files.replacing(made[path], path.with_suffix(".partial"), "wb") as file:
                    torch.save(content, file)
        return made

    def settle(self) -> None:
        """Delete what a finished run doesn't keep; again, where a kill came in between."""
        for folder in (layout.CHECKPOINTS, layout.BEST):
            for path in (self.directory / folder).glob(f"*{SMALL}"):
                path.replace(path.with_suffix(".pt"))
        if self.keep in ("last", "best", "backbone"):
            gone = self.keep == "best" and layout.best(self.directory)
            for old in complete(self.directory)[0 if gone else 1 :]:
                old.unlink()

    def restore(self, **state: object) -> int:
        """Load the newest usable state into the objects, in place; its step, or 0: there is none.

        UserError where there are files and none of them can be used.
        """
        paths = complete(self.directory)
        for path in paths:
            try:
                content = self._read(path)
            except UserError as error:
                log.warning("%s; trying the one before", error)
                continue
            for key, value in state.items():
                value.load_state_dict(content[key])
            return content["step"]
        if paths:
            raise UserError(
                f"{paths[0].parent}: none of its {len(paths)} checkpoints can be used; "
                "delete this folder to start anew"
            )
        return 0

    def _read(self, path: Path) -> dict:
        content = read(path)
        if not isinstance(content, dict) or not self._is_mine(content.get("run")):
            raise UserError(f"{path}: a checkpoint of another run")
        if content["step"] != step_of(path):
            raise UserError(f"{path}: holds step {content['step']}, not the one of its name")
        return content

    def _is_mine(self, run: object) -> bool:
        """Does a checkpoint of this run's directory belong to this run?

        Earlier versions named a run by a decimal number, a hash in which paths took part. It can't
        be compared: the check of config.yaml must do.
        """
        return run == self.identity or (isinstance(run, str) and run.isdecimal())
