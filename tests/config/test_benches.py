"""The experiments that compare all methods."""

import re

import pytest
import torch
from commands import CONF, compose

from ssl_bench.config import build

# those of the command at its head
(SWEPT,) = re.findall(r"method=(\S+)", (CONF / "experiment" / "bench_vit.yaml").read_text())[:1]


@pytest.mark.parametrize("name", SWEPT.split(","))
def test_a_member_of_bench_vit(name: str) -> None:
    """It can be built, of the same network as the others, and takes the views that are cut."""
    cfg = compose("experiment=bench_vit", f"method={name}", "seed=1")
    build.check(cfg)
    assert cfg.backbone == compose("experiment=bench_vit", "method=random").backbone
    assert cfg.optimizer.name == "adamw"
    given = {"num_classes": 10} if build.takes(cfg.method, "num_classes") else {}
    method = build.construct(cfg.method, backbone=build.construct(cfg.backbone), **given)
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    views = build.construct(cfg.augmentation)
    assert method.image_size in (None, views.image_size)
    assert len(views(images, torch.arange(4))) == max(method.num_views, cfg.augmentation.num_views)


def test_every_setting_is_of_a_member_of_bench_vit() -> None:
    files = {path.stem for path in (CONF / "settings" / "bench_vit").glob("*.yaml")}
    assert {*SWEPT.split(",")} == files | {"random", "supervised"}
