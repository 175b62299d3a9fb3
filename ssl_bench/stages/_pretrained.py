"""What the stages that measure a pretrained backbone, or train it further, have in common."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError
from torch import Tensor, nn

from ssl_bench.augment.views import EvalView
from ssl_bench.config import build
from ssl_bench.config.fields import TOKENS
from ssl_bench.errors import UserError
from ssl_bench.evaluate.readout import read_out_
from ssl_bench.methods.probe import AttentivePool
from ssl_bench.runs import identity, layout, published, record, weights
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed
from ssl_bench.shell import listed
from ssl_bench.stages._training import check_tracking, seed_init

log = logging.getLogger(__name__)


def load_pretrained(cfg: DictConfig) -> nn.Module:
    """The backbone of cfg, filled from `cfg.pretrained`; as initialised if that is null.

    Modules that are made after it draw the same random numbers in both cases.
    """
    seed_init(cfg)
    if cfg.pretrained is None:
        backbone = build.construct(cfg.backbone)
        goes_on = cfg.dir is not None and layout.has_state(Path(cfg.dir))
        if any(True for _ in backbone.parameters()) and not goes_on:  # backbone=pixels has none
            begins = "timm's weights" if cfg.backbone.get("pretrained") else "random weights"
            log.info("pretrained=null: the backbone begins with %s", begins)
        return backbone
    backbone = build.construct(weights.unfilled(cfg.backbone))
    loaded = weights.load_backbone(backbone, cfg.pretrained, cfg.get("pretrained_prefix"))
    tell(loaded)
    compare_look(cfg, loaded.source)
    return backbone


def compare_look(cfg: DictConfig, source: Path) -> None:
    """Log whether images look as they did when the weights in a file were trained."""
    made = weights.recipe(source) or {}
    if identity.node(made, "data").get("name") == cfg.data.name:
        sizes = {}
        for group in ("data", "augmentation"):
            then, now = identity.node(made, group).get("image_size"), cfg[group].get("image_size")
            if then != now:
                sizes[f"{group}.image_size"] = then, now
        if sizes:
            here = ", ".join(f"{key}={now or 'null'}" for key, (_, now) in sizes.items())
            there = " ".join(f"{key}={then or 'null'}" for key, (then, _) in sizes.items())
            log.warning(
                "%s, but it was trained with %s: type these to see images alike", here, there
            )
    before = weights.look(source)
    for key in ("mean", "std"):
        now, then = cfg.augmentation.get(key), before.get(key)
        if now and then and list(now) == list(then):
            log.info("augmentation.%s=%s, as it was trained with", key, listed(now))
        elif now and then:
            shown = listed(now), listed(then)
            log.warning("augmentation.%s=%s, but it was trained with %s", key, *shown)


def tell(loaded: weights.Loaded) -> None:
    """Log what was loaded, and warn of a run that isn't finished."""
    where = f" ({loaded.prefix}*)" if loaded.prefix else ""
    log.info(
        "loaded all %s tensors of the backbone from %s%s",
        *(loaded.num_tensors, loaded.source, where),
    )
    for remark in loaded.remarks:
        log.info("%s: %s", loaded.source.name, remark)
    if loaded.left_out:
        names = ", ".join(loaded.left_out[:4]) + (", ..." if len(loaded.left_out) > 4 else "")
        log.info("left out %s others: %s", len(loaded.left_out), names)
    if distributed.rank() == 0 and (reached := record.unfinished(loaded.source)):
        log.warning("%s is not finished: %s", layout.run_of(loaded.source), reached)


def log_result(run: Run, result: dict[str, float]) -> None:
    """Log the result of a stage that doesn't train, as the one line of its metrics.jsonl."""
    if run.is_main:
        run.metrics.truncate(0)  # an attempt that was killed may have left its line
    for _ in run.progress([1], 0, 1):
        run.log(1, {"epoch": 1.0, **result})


def check_directory(cfg: DictConfig) -> None:
    """UserError if the result couldn't be left in a directory, or shown by the tracker."""
    if cfg.dir is None:
        raise UserError(
            f"dir=null: stage={cfg.stage.name} writes its result there; "
            "type dir=... or leave it out"
        )
    check_tracking(cfg)


class Pretrained(NamedTuple):
    """A file of weights, and what it says about itself."""

    path: Path
    config: dict[str, Any]  # the configuration of the run that made it; empty if not known
    network: dict[str, Any]  # the node that the backbone was made from
    backbone: nn.Module
    classifier: nn.Linear | None
    classes: list[str]  # the names of its classes; empty if they have none

    @property
    def max_side(self) -> int | None:
        """In pixels: to so much its run made larger pictures smaller; None: it left them."""
        side = (self.config.get("data") or {}).get("max_side")
        return side if isinstance(side, int) and side > 0 else None

    def view(self, image_size: int | None, resize: float | None) -> tuple[int | None, EvalView]:
        """How its run showed test images: (the size of the squares they were first, the test view).

        None for squares: the view is of whole pictures. None for an argument: the value of the run
        or, if that isn't known, ImageNet's 224 pixels, mean and std.
        """
        view = view_of(self.config, self.path, image_size, resize)
        packed = (self.config.get("data") or {}).get("image_size") if image_size is None else None
        return packed if isinstance(packed, int) else None, view


def view_of(
    config: Mapping, place: Path, image_size: int | None = None, resize: float | None = None
) -> EvalView:
    """The test view of a configuration that was read from `place`.

    image_size (pixels), resize: in place of its own. What it leaves open is ImageNet's: 224 pixels,
    mean and std. UserError for impossible values.
    """
    augmentation, stage = config.get("augmentation") or {}, config.get("stage") or {}
    try:
        size = image_size or int(augmentation.get("image_size", 224))
        resize = resize or float(stage.get("test_resize", 256 / 224))
        given = [key for key in ("mean", "std") if augmentation.get(key)]
        look: dict[str, Any] = {key: tuple(float(x) for x in augmentation[key]) for key in given}
        return EvalView(size, resize, **look)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{place}: its configuration doesn't say how to show images ({error})"
        ) from None


def features_of(config: Mapping, place: Path) -> str | None:
    """Of which tokens the features were that a run's classifier learnt from; see `read_out_`.

    config: from `place`. UserError for an impossible value.
    """
    tokens = identity.node(config, "stage").get("features_of")
    if not (tokens is None or re.fullmatch(rf"{TOKENS}|attentive", str(tokens))):
        raise UserError(f"{place}: its configuration has stage.features_of={tokens}: mend it")
    return tokens


def as_measured(backbone: nn.Module, tokens: str | None, pool: Mapping[str, Tensor]) -> nn.Module:
    """The network whose features (N, dim) a classifier learnt from.

    tokens: see `features_of`. pool: the tensors of its AttentivePool, if that made the features.
    """
    read_out_(backbone, tokens)
    if tokens != "attentive":
        return backbone
    attended = nn.Sequential(backbone, AttentivePool(backbone.dim))
    attended[1].load_state_dict(pool)
    attended.dim = backbone.dim
    if hasattr(backbone, "refuses"):
        attended.refuses = backbone.refuses
    return attended


def open_pretrained(cfg: DictConfig) -> Pretrained:
    """The weights that `cfg.pretrained` names, in the backbone of their run or of the command.

    UserError for weights that are missing or don't fit.
    """
    if cfg.pretrained is None:
        raise UserError(
            f"stage={cfg.stage.name} needs weights: type pretrained=... "
            "(a run directory, a file, a zoo name)"
        )
    path = weights.find(cfg.pretrained)
    config = weights.recipe(path) or {}
    chosen = cfg.get("backbone")
    known = published.WEIGHTS.get(cfg.pretrained)
    advice = f"type backbone={known.backbone if known else '..., the one that it is of'}"
    if chosen is not None:
        node = OmegaConf.to_container(chosen, resolve=True)
    elif not config.get("backbone"):
        if known is None and (fitting := weights.fitting(weights.read(path))):
            advice = f"type {fitting}, which it fits"
        raise UserError(
            f"pretrained={cfg.pretrained}: doesn't say which of our networks it is of: {advice}"
        )
    else:
        node = build.found(config, "backbone", cfg, path)
    try:
        backbone = build.construct(weights.unfilled(node))
    except ValidationError:
        raise UserError(
            f"pretrained={cfg.pretrained}: its backbone is of another version: {advice}"
        ) from None
    loaded = weights.load_backbone(backbone, cfg.pretrained, cfg.get("pretrained_prefix"))
    tell(loaded)
    backbone = as_measured(backbone, features_of(config, path), loaded.pool)
    classifier = loaded.classifier
    if classifier is not None and classifier.in_features != backbone.dim:
        classifier = None  # an fc of these names that isn't on top of the backbone
    if classifier is not None:
        log.info("and its classifier of %d classes", classifier.out_features)
    names = weights.class_names(path)
    classes = names if classifier is not None and len(names) == classifier.out_features else []
    return Pretrained(path, config, node, backbone.eval(), classifier, classes)
