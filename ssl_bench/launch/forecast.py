"""What a sweep will cost: its disk before it starts, its time from the first member's rate."""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_bench.console import duration
from ssl_bench.errors import UserError
from ssl_bench.runs.sweep import Member

log = logging.getLogger(__name__)

DISTINCT = 16  # networks of so many members are looked at; the others are like these
SECONDS = 10  # between two looks at what members have logged


def tell_disk(members: Sequence[Member], folder: Path) -> None:
    """Log the disk that the states of the members take, before any starts.

    Nothing where it can't be told: of networks that aren't ours, or that aren't made without data.
    """
    known: dict[str, tuple[int, int]] = {}
    members = _pretraining(members)
    for member in members:
        config = member.config
        keys = ("method", "backbone", "optimizer", "ema", "keep", "save_best", "patience", "stage")
        key = json.dumps([config.get(name) for name in keys], default=str)
        if key not in known and len(known) < DISTINCT and (found := state_bytes(config)):
            known[key] = found
    if not known:
        return
    running, left = (
        len(members) * sum(sizes) / len(known) for sizes in zip(*known.values(), strict=True)
    )
    free = shutil.disk_usage(folder).free
    told = f"{len(members)} members leave about {_gb(left)} of states (keep={_keeps(members)})"
    log.info("%s; %s is free", told, _gb(free))
    if running > free:
        log.warning(
            "%s, and at most %s while they run: more than the %s that is free: type keep=backbone, "
            "or keep=last",
            *(told, _gb(running), _gb(free)),
        )


def _pretraining(members: Sequence[Member]) -> list[Member]:
    """Without pipelines whose pretraining is a member of its own: theirs are evaluations."""
    return [one for one in members if one.first is None]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _keeps(members: Sequence[Member]) -> str:
    return ", ".join(dict.fromkeys(str(member.config.get("keep", 2)) for member in members))


def state_bytes(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(bytes of the states of a pretraining while it runs, of those that stay); None: not known."""
    import torch

    from ssl_bench.config import build
    from ssl_bench.runs import weights

    keep = config.get("keep", 2)
    if config["stage"]["name"] not in ("pretrain", "pipeline") or keep == "all":
        return None
    try:
        with weights.on_paper():
            backbone = build.construct(weights.unfilled(config["backbone"]))
            given = build.wanted(config["method"], batch_size=lambda: config["batch_size"])
            model = build.construct(config["method"], backbone=backbone, **given)
        one = torch.nn.Parameter(torch.zeros(64, 64))
        groups = [{"params": [one]}]
        optimizer = build.construct(config["optimizer"], params=groups, batch_size=256)
        one.grad = torch.ones_like(one)
        optimizer.step()
    # whatever it is: a network of another's making may need its data, and this is a courtesy
    except Exception as error:
        log.debug("the disk of the states isn't known: %s", error)
        return None
    slots = [
        value for state in optimizer.state_dict()["state"].values() for value in state.values()
    ]
    per_weight = sum(getattr(slot, "numel", int)() for slot in slots) / one.numel()
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    spine, whole = _bytes(model.backbone), _bytes(model)
    average = spine if config.get("ema") else 0
    state = whole + average + round(per_weight * trained)
    best = config.get("save_best") is not None or config.get("patience") is not None
    running = (keep if isinstance(keep, int) else 2) + best
    if keep == "backbone":
        return running * state, (1 + best) * (spine + average)
    stays = keep + best if isinstance(keep, int) else 1 + (best and keep == "last")
    return running * state, stays * state


def _bytes(module: Any) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


class Clock:
    """Tells once how long a sweep takes, when the first of its members has logged its rate.

    Evaluations that run apart from their pretrainings aren't counted.
    places: members at once. at_most: may members end before their last epoch?
    """

    def __init__(self, members: Sequence[Member], places: int, at_most: bool) -> None:
        self.members, self.places, self.at_most = _pretraining(members), places, at_most
        self.told, self.looked = len(self.members) < 2, 0.0

    def look(self, members: Sequence[Member], gpus: Sequence[str], now: bool = False) -> None:
        """Look at what these members have logged, on GPUs if there are any.

        now: even if the last look was a moment ago.
        """
        if self.told or (not now and time.monotonic() < self.looked + SECONDS):
            return
        self.looked = time.monotonic()
        for member in members:
            seconds = None
            with suppress(UserError):  # of damaged lines: this is a courtesy
                seconds = epoch_seconds(member)
            if seconds is None:
                continue
            self.told = True
            each = [seconds * one.config["epochs"] for one in self.members]
            wall = sum(each) / min(self.places, len(each))
            devices = max(one.config["devices"] for one in self.members)
            hours = f"; {sum(each) * devices / 3600:,.1f} GPU hours" if gpus else ""
            log.info(
                "at the rate of %s: %s a member, %s%s for all %s, %s at once%s",
                *(member.name, duration(seconds * member.config["epochs"])),
                *("at most " if self.at_most else "", duration(wall), len(each)),
                *(min(self.places, len(each)), hours),
            )
            return


def epoch_seconds(member: Member) -> float | None:
    """How long an epoch of a member takes, by its newest lines; None: it has logged too few."""
    needed = ("images_per_second", "epoch", "images_seen")
    lines = [line for line in member.lines if all(line.get(key) for key in needed)]
    if not lines:
        return None
    rates = sorted(line["images_per_second"] for line in lines[-5:])
    return lines[-1]["images_seen"] / lines[-1]["epoch"] / rates[len(rates) // 2]
