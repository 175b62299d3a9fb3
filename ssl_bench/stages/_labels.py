"""Which labels the weights of a network have learnt from.

Holding some of these out measures nothing, so that nothing can be chosen by them. A run that leaves
a backbone writes labels.json: {"seen": [a data set, ...], "known": bool}, with its own data set and
those that the weights it began with had seen. stage=export passes it on. known is false if the run
began with a file that doesn't say, such as weights from elsewhere.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from ssl_bench import files
from ssl_bench.config import build
from ssl_bench.data.store import Split
from ssl_bench.errors import UserError
from ssl_bench.runs import identity, layout, weights
from ssl_bench.runs.run import Run

log = logging.getLogger(__name__)

FILE = "labels.json"


class Labels(NamedTuple):
    """The content of labels.json."""

    seen: tuple[dict[str, Any], ...] = ()  # see `data_set`
    known: bool = True

    def said(self) -> dict[str, Any]:
        """The content for an export, without paths of this machine."""
        return {"seen": [{**one, "root": None} for one in self.seen], "known": self.known}

    def record(self, run: Run) -> None:
        if run.is_main:
            files.write(run.directory / FILE, json.dumps(self._asdict(), indent=2) + "\n")


def data_set(cfg: DictConfig, split: Split) -> dict[str, Any]:
    """What identifies the labels of a split."""
    root = cfg.data.get("root")
    root = root and identity.real(root)
    extra = [str(name) for name in cfg.data.get("extra_labels") or ()]
    return {"data": cfg.data.name, "images": split.origin, "root": root, "extra": extra}


def seen_by(pretrained: str | None) -> Labels:
    """The labels that weights have learnt from; none if they are as initialised."""
    if pretrained is None:
        return Labels()
    path = weights.find(pretrained)
    place = (layout.run_of(path) or Path()) / FILE
    content: Any = None
    if place.is_file():
        content = files.parse(place, json.loads)
    else:
        content = (weights.recipe(path) or {}).get("labels")
    if content is None:
        return Labels(known=False)
    try:
        return Labels(tuple(dict(one) for one in content["seen"]), content["known"] is True)
    except (TypeError, ValueError, KeyError):
        raise UserError(
            f"{path}: it doesn't say in our words which labels it has learnt from; make it again"
        ) from None


def known_of(cfg: DictConfig) -> Labels:
    """The labels that a run's weights have learnt from as it begins, and its teacher's."""
    mine, teacher = seen_by(cfg.pretrained), (cfg.get("method") or {}).get("teacher")
    if teacher is None:
        return mine
    theirs = Labels(known=False) if teacher.startswith(identity.TIMM) else seen_by(teacher)
    return Labels((*mine.seen, *theirs.seen), mine.known and theirs.known)


def learns_labels(method: DictConfig) -> bool:
    """Does this method learn from labels, which the train split alone has?"""
    split = build.locate(method._target_, "method").split
    return split == "train" or build.takes(method, "num_classes")


def check_unseen(cfg: DictConfig, split: Split, chooser: str, instead: str) -> None:
    """UserError if the weights have learnt from the labels of the train split.

    chooser: the stage, which would choose by holding some of them out. instead: what to type.
    """
    if are_seen(cfg, split):
        raise UserError(refusal(cfg, chooser, instead))


def are_seen(cfg: DictConfig, split: Split) -> bool:
    """Have the weights that cfg begins with learnt from the labels of this train split?

    A line in the log where that isn't known.
    """
    labels, ours = known_of(cfg), data_set(cfg, split)
    if any(_same(one, ours) for one in labels.seen):
        return True
    if not labels.known:
        log.info(
            "%s doesn't say which labels it was trained on: "
            "if it saw those of data=%s, the held-out accuracy is too high",
            *(cfg.pretrained, cfg.data.name),
        )
    return False


def refusal(cfg: DictConfig, chooser: str, instead: str) -> str:
    return (
        f"pretrained={cfg.pretrained} has learnt from the labels of data={cfg.data.name}, "
        f"so that {chooser} can't choose by holding some out: type {instead}"
    )


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """May two data sets have labels in common?

    They have the same images, whatever their size, or are the same kind of data in the same folder
    or with other extra labels.
    """
    if one.get("images") == other["images"]:
        return True
    placed = one.get("root") is not None and one.get("root") == other["root"]
    return one.get("data") == other["data"] and (placed or one.get("extra") != other["extra"])
