"""Stage finetune: train a pretrained backbone with labels."""

from omegaconf import DictConfig
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import nn

from ssl_bench.config import build
from ssl_bench.config.fields import Resize, Share
from ssl_bench.evaluate.labels import labelled, log_share
from ssl_bench.evaluate.passes import evaluate
from ssl_bench.methods import layers
from ssl_bench.methods.base import digest
from ssl_bench.methods.finetune import FineTune
from ssl_bench.runs.run import Run
from ssl_bench.runtime import distributed
from ssl_bench.stages import PRETRAINED, TRAINING, _images, _labels
from ssl_bench.stages._pretrained import load_pretrained
from ssl_bench.stages._training import (
    check_batch,
    check_norm,
    check_optimizer,
    check_sizes,
    make_test_view,
    make_views,
    on_device,
    open_source,
    train,
)
from ssl_bench.training.optim import scaled_lr

READS = (*TRAINING, *PRETRAINED, "sync_batch_norm")
IDLE = {"pretrained=null": ("pretrained_prefix",)}


def finetune(
    cfg: DictConfig,
    run: Run,
    labels_per_class: PositiveInt | None = None,
    label_fraction: Share | None = None,
    trained_blocks: PositiveInt | None = None,
    head_lr: PositiveFloat = 0.1,
    layer_decay: Share = 1.0,
    mixup: NonNegativeFloat = 0.0,
    test_resize: Resize = 256 / 224,
) -> dict[str, float]:
    """Returns top-1, top-5, calibration error (%) and cross-entropy on val after the last epoch.

    Nothing is chosen by them. The last block has the optimizer's learning rate, each earlier block
    `layer_decay` times that of the next one (as in BEiT, arXiv:2106.08254, and MAE,
    arXiv:2111.06377, A.2), the new layer `head_lr`, scaled like the optimizer's. For trained_blocks
    and mixup see FineTune. pretrained=null trains from scratch.
    """
    check_optimizer(cfg, "lr")
    data = build.construct(cfg.data)
    split, subset = labelled(data, labels_per_class, label_fraction, cfg.seed)
    log_share(subset, split.labels)
    check_batch(cfg, split.length if subset is None else len(subset))
    backbone = load_pretrained(cfg)
    check_sizes(cfg, backbone)
    if cfg.sync_batch_norm and distributed.world_size() > 1:
        layers.sync_batch_norm_(backbone, run.device, cfg.compile)
    model = FineTune(backbone, data.num_classes, trained_blocks, mixup)
    check_norm(cfg, model, cfg.sync_batch_norm)
    on_device(model, run)
    before = _labels.seen_by(cfg.pretrained)
    before._replace(seen=(*before.seen, _labels.data_set(cfg, split))).record(run)
    views = make_views(cfg, run, model)
    test_view = make_test_view(cfg, run, test_resize)
    source = open_source(cfg, run, data, "train", views, subset)
    test = open_source(cfg, run, data, "val", test_view)

    frozen = digest(*model.frozen)
    groups = rates(cfg, model, head_lr, layer_decay)

    def measure(network: nn.Module) -> dict[str, float]:
        return evaluate(network, test.epoch_pass(), test_view)

    shown = ("val_top1", "val_top5")
    result = train(cfg, run, model, source, views, measure, groups, measures=shown)
    assert digest(*model.frozen) == frozen, "the frozen blocks changed"
    return result


_images.counted(finetune)  # no decorator: the signature is read from the source


def rates(cfg: DictConfig, model: FineTune, head_lr: float, layer_decay: float) -> list[dict]:
    """Parameter groups with their rates, the last block first: the log shows the first one's."""
    scaling = cfg.optimizer.scaling
    base = scaled_lr(cfg.optimizer.base_lr, cfg.batch_size, scaling)
    head = scaled_lr(head_lr, cfg.batch_size, scaling)
    groups = []
    for depth, params in enumerate(reversed(model.trained)):
        if params:
            groups.append({"params": params, "lr": base * layer_decay**depth})
    return [*groups, {"params": list(model.fc.parameters()), "lr": head}]
