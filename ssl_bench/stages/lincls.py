"""Stage lincls: linear classification of frozen features."""

from typing import Annotated, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from ssl_bench.config import build
from ssl_bench.config.fields import ProbedFeatures, Resize, Share, WholeEpochs
from ssl_bench.errors import UserError
from ssl_bench.evaluate.labels import hold_out, labelled, log_share
from ssl_bench.evaluate.passes import evaluate
from ssl_bench.evaluate.readout import read_out_
from ssl_bench.methods import layers
from ssl_bench.methods.base import digest
from ssl_bench.methods.probe import LinearGrid, LinearProbe
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed
from ssl_bench.stages import PRETRAINED, TRAINING, _images, _labels
from ssl_bench.stages._lincls_grid import (
    GridOptions,
    check_holdout,
    check_options,
    check_unused,
    train_grid,
)
from ssl_bench.stages._pretrained import load_pretrained
from ssl_bench.stages._training import (
    check_batch,
    check_norm,
    check_sizes,
    make_test_view,
    make_views,
    on_device,
    open_source,
    train,
)

DEFAULT = GridOptions()
Decays = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
# for the error of an exam that can't be held: who chooses, and what to type instead
CHOICE = (
    "stage.features=cached",
    "stage.features=official, or leave nothing to choose: stage.lrs=[0.3] stage.weight_decays=[0]",
)


READS = (*TRAINING, *PRETRAINED)
IDLE = {"pretrained=null": ("pretrained_prefix",)}


def lincls(
    cfg: DictConfig,
    run: Run,
    labels_per_class: PositiveInt | None = None,
    label_fraction: Share | None = None,
    features_of: ProbedFeatures | None = None,
    normalize: bool = False,
    test_resize: Resize = 256 / 224,
    features: Literal["official", "cached"] = "official",
    copies: WholeEpochs = DEFAULT.copies,
    lrs: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = DEFAULT.lrs,
    weight_decays: Decays = DEFAULT.weight_decays,
    holdout: Annotated[float, Field(gt=0, lt=1)] = DEFAULT.holdout,
) -> dict[str, float]:
    """Returns top-1, top-5, calibration error (%) and cross-entropy on val after the last epoch.

    features_of: which tokens of a transformer are its features (`read_out_`). features: "official"
    is the protocol of main_lincls.py, in which the backbone sees freshly augmented images in every
    epoch (without those that don't fill its last batch). With "cached" it sees each image once, and
    a grid of classifiers learns from its features; see `_lincls_grid.train_grid`.
    """
    options = GridOptions(copies, lrs, weight_decays, holdout)
    exam = chooses(cfg.stage)
    if attentive := features_of == "attentive":
        check_attentive(cfg)
    if features == "cached":
        check_options(cfg, options)
        check_holdout(holdout, exam)
    else:
        check_unused(options)
    data = build.construct(cfg.data)
    split, subset = labelled(data, labels_per_class, label_fraction, cfg.seed)
    log_share(subset, split.labels)
    check_batch(cfg, split.length if subset is None else len(subset))
    if exam:  # errors come now, and not after the images are packed
        _labels.check_unseen(cfg, split, *CHOICE)
        hold_out(split.labels if subset is None else split.labels[subset], holdout, cfg.seed)
    _labels.seen_by(cfg.pretrained).record(run)  # the backbone learns from no more labels here
    backbone = load_pretrained(cfg)
    check_sizes(cfg, backbone)
    read_out_(backbone, features_of)
    if normalize and features == "official":
        check_norm(cfg, nn.BatchNorm1d(backbone.dim, affine=False), synced=True)
    views = make_views(cfg, run, LinearProbe)
    test_view = make_test_view(cfg, run, test_resize)
    source = open_source(cfg, run, data, "train", views, subset)
    test = open_source(cfg, run, data, "val", test_view)

    before = digest(backbone)
    if features == "cached":
        targets = source.labels[source.rows]
        held = torch.zeros(len(targets), dtype=torch.bool)
        if exam:
            held = torch.from_numpy(hold_out(targets, holdout, cfg.seed))
        kept = 1 - held.double().mean().item()
        grid = LinearGrid(backbone, data.num_classes, len(options.cells), kept, normalize)
        on_device(grid, run)
        result = train_grid(cfg, run, grid, options, held, source, test, views, test_view)
    else:
        probe = LinearProbe(backbone, data.num_classes, normalize, attentive)
        if distributed.world_size() > 1:
            layers.sync_batch_norm_(probe.norm, run.device, cfg.compile)
        on_device(probe, run)

        def measure(network: nn.Module) -> dict[str, float]:
            return evaluate(network, test.epoch_pass(), test_view)

        result = train(cfg, run, probe, source, views, measure, measures=("val_top1", "val_top5"))
    assert digest(backbone) == before, "the frozen backbone changed"
    return result


_images.counted(lincls)  # no decorator: the signature is read from the source


def check_attentive(cfg: DictConfig) -> None:
    """UserError for what a classifier that learns to pool can't have."""
    asked = f"stage={cfg.stage.name} stage.features_of=attentive"
    if cfg.stage.features == "cached":
        raise UserError(
            f"{asked} learns from all patches of an image, which stage.features=cached doesn't "
            "keep: type stage.features=official"
        )
    if cfg.stage.normalize:
        raise UserError(f"{asked} has a norm of its own: type stage.normalize=false")
    if cfg.optimizer.name == "lincls":
        raise UserError(
            f"{asked} trains a block of attention, and optimizer=lincls is for a linear layer: "
            "type optimizer=attentive schedule=cosine"
        )


def chooses(stage: DictConfig) -> bool:
    """Does this stage choose by held-out labels?"""
    return stage.features == "cached" and len(stage.lrs) * len(stage.weight_decays) > 1


lincls.chooses, lincls.choice = chooses, CHOICE
