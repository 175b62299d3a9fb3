"""Stage pretrain: train a backbone without labels."""

import torch
from omegaconf import DictConfig

from ssl_bench import build
from ssl_bench.augment.draws import keys
from ssl_bench.augment.views import Views
from ssl_bench.data.source import Source
from ssl_bench.errors import UserError
from ssl_bench.run import Run
from ssl_bench.stages.training import check_batch, make_views, on_device, open_source, seed_init, train


def pretrain(cfg: DictConfig, run: Run) -> dict[str, float]:
    """Returns what the last step logged."""
    data = build.construct(cfg.data)
    check_fit(cfg, data.split("pretrain").length)
    seed_init(cfg)
    model = on_device(build.construct(cfg.method, backbone=build.construct(cfg.backbone)), run)
    views = make_views(cfg, run, model.num_views)
    source = open_source(cfg, run, data, "pretrain")
    if run.is_main:
        show_views(cfg, run, source, views)
    return train(cfg, run, model, source, views)


def check_fit(cfg: DictConfig, num_images: int) -> None:
    """UserError for combinations that can't work, before any image is read."""
    local_batch = check_batch(cfg, num_images)
    queue_size = cfg.method.get("queue_size", 0)
    if queue_size > num_images:
        raise UserError(
            f"method.queue_size={queue_size} is larger than the dataset ({num_images:,} images), so that every image "
            f"would meet its own old key as a negative: choose at most method.queue_size={num_images}"
        )
    if local_batch % (splits := cfg.method.get("bn_splits", 1)):
        raise UserError(
            f"method.bn_splits={splits} does not divide the {local_batch} images of a process: change one of "
            "method.bn_splits, batch_size, devices"
        )


@torch.no_grad()
def show_views(cfg: DictConfig, run: Run, source: Source, views: Views, num_images: int = 8) -> None:
    """views.png: what the network sees of the first images; a column an image, the original on top."""
    from torchvision.transforms.v2.functional import resize
    from torchvision.utils import make_grid, save_image

    images, _, indices = next(source.epoch_pass())
    images, indices = images[:num_images], indices[:num_images]
    shown = [views.denormalize(view) for view in views(images, keys(cfg.seed, 0, indices))]
    originals = resize(images, [views.image_size, views.image_size])  # the views may be of another size
    grid = make_grid(torch.cat([originals, *shown]).float() / 255, nrow=num_images)
    save_image(grid, run.directory / "views.png")
    run.log_image(0, "views", run.directory / "views.png")
