"""Pictures of what a vision transformer has learnt, for stage=pretrain."""

from collections.abc import Callable

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ssl_bench.augment.draws import keys
from ssl_bench.data.source import Source
from ssl_bench.evaluate.tokens import brightness, principal_colours
from ssl_bench.methods.base import Method
from ssl_bench.report import sheet
from ssl_bench.runs import layout
from ssl_bench.runs.run import Run
from ssl_bench.stages._training import make_test_view

NUM_IMAGES = 8
HEADS = 3  # of attention, shown beside their mean


def painter(
    cfg: DictConfig, run: Run, source: Source, model: Method
) -> Callable[[nn.Module], None] | None:
    """A function that draws what a network makes of the first images, in eval mode.

    It writes attention.png (of the class token to the patches, in the last block), patches.png
    (principal components of the patches as colours) and, for a method that paints what is hidden,
    reconstruction.png. None: the backbone has no patches.
    """
    if not hasattr(model.backbone, "last_tokens"):
        return None
    view = make_test_view(cfg, run, 1.0)
    images, _, indices = next(source.shown_as(view).epoch_pass())
    seen, indices = view(images)[:NUM_IMAGES], indices[:NUM_IMAGES]
    shown = pixels(view.denormalize(seen))

    @torch.no_grad()
    def draw(network: nn.Module) -> None:
        backbone = network.backbone.eval()
        (tokens,) = backbone.last_tokens(seen, 1)
        patches = tokens[:, backbone.num_prefix :]
        side = round(patches.shape[1] ** 0.5)
        colours = principal_colours(patches).unflatten(1, (side, side))
        pictures = {"patches": {"image": shown, "patches": to_bytes(colours)}}
        if backbone.has_class_token and hasattr(backbone, "attention"):
            heads = backbone.attention(seen).float().cpu()  # (N, heads, L)
            each = {f"head {i + 1}": heads[:, i] for i in range(min(HEADS, heads.shape[1]))}
            maps = {"all heads": heads.mean(dim=1)} | each
            grids = {k: brightness(x).unflatten(1, (side, side)) for k, x in maps.items()}
            rows = {name: to_bytes(grid) for name, grid in grids.items()}
            pictures["attention"] = {"image": shown, **rows}
        if hasattr(model, "paint"):
            image_keys = keys(source.seed, 0, indices)
            masked, painted = model.eval().paint(seen, image_keys, indices)
            rows = {"masked": masked, "painted": painted}
            rows = {name: pixels(view.denormalize(row)) for name, row in rows.items()}
            pictures["reconstruction"] = {"image": shown, **rows}
        for name, rows in pictures.items():
            path = run.directory / layout.LEARNT[name]
            sheet.write(path, rows)
            run.log_image(run.step, name, path)

    return draw


def pixels(images: Tensor) -> np.ndarray:
    """uint8 (N, 3, H, W) -> (N, H, W, 3)."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


def to_bytes(shares: Tensor) -> np.ndarray:
    """Between 0 and 1 -> uint8."""
    return (255 * shares).round().to(torch.uint8).numpy()
