"""The frozen network that method=distill learns from."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig
from torch import nn

from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.runs import weights
from ssl_bench.runs.identity import TIMM
from ssl_bench.stages._pretrained import compare_look, tell
from ssl_bench.stages._training import check_size

log = logging.getLogger(__name__)


def load_teacher(cfg: DictConfig) -> nn.Module:
    """The network that `method.teacher` means, filled, in eval mode. UserError.

    Its architecture is that of the run or export, or the one of ours that a file fits.
    """
    teacher = cfg.method.teacher
    if teacher.startswith(TIMM):
        model = teacher.removeprefix(TIMM)
        node = {"_target_": "ssl_bench.backbones.timm.timm", "model": model}
        with _told(teacher):
            network = build.construct(node | {"pretrained": True})
    else:
        with _told(teacher):
            path = weights.find(teacher)
            if (weights.recipe(path) or {}).get("backbone"):
                node = build.found(weights.recipe(path) or {}, "backbone", cfg, path)
            else:
                node = weights.node_for(teacher, path)
            network = build.construct(weights.unfilled(node))
            tell(weights.load_backbone(network, str(path)))
            compare_look(cfg, path)
    name = node.get("name", teacher)
    check_size("augmentation.image_size", cfg.augmentation.image_size, network, name)
    log.info("the teacher, a %s, gives %s features", name, network.dim)
    return network.eval()


@contextmanager
def _told(teacher: str) -> Iterator[None]:
    """What is said of `pretrained` is said of the teacher."""
    try:
        yield
    except UserError as error:
        said = str(error).replace("pretrained=", "method.teacher=", 1)
        if not said.startswith("method.teacher="):
            said = f"method.teacher={teacher}: {said}"
        raise UserError(said) from None
