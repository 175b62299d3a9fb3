"""Embeddings that tell images apart, teachers that follow, and what a run says where they don't."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import compose
from small_methods import make, overrides
from torch import Tensor

from ssl_bench.evaluate.health import LIDAR_IMAGES, Following, collapsing, health, lidar
from ssl_bench.launch.process import launch
from ssl_bench.methods.byol import BYOL


def embeddings(views: int, images: int, dim: int) -> Tensor:
    """Views of an image share most of it; some directions are noise of the views alone."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(images, dim, generator=generator, dtype=torch.float64)
    scales = torch.linspace(0.1, 2, dim)
    noise = torch.randn(views, images, dim, generator=generator, dtype=torch.float64)
    return shared * scales.flip(0) + 0.3 * noise * scales


@pytest.mark.parametrize(("views", "images", "dim"), [(2, 30, 12), (5, 8, 12), (2, 6, 40)])
def test_lidar_is_the_papers_formula(views: int, images: int, dim: int) -> None:
    """Wide and narrow: covariances, their inverse root and eigenvalues as they are written."""
    given = embeddings(views, images, dim)
    x, delta = given.numpy(), 1e-4
    means = x.mean(0)
    mean = means.mean(0)
    between = sum(np.outer(m - mean, m - mean) for m in means) / images
    deviations = [x[q, i] - means[i] for q in range(views) for i in range(images)]
    within = sum(np.outer(d, d) for d in deviations) / (views * images) + delta * np.eye(dim)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(0)
    shares = eigenvalues / eigenvalues.sum()
    expected = np.exp(-sum(p * np.log(p) for p in shares if p > 1e-15))
    assert lidar(given).item() == pytest.approx(expected, rel=1e-6)


def test_lidar_ignores_what_views_of_an_image_differ_in() -> None:
    """Unlike the effective rank: 3 of 20 directions belong to images."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 400, 20, generator=generator)
    noise[:, :, :3] = 20 * torch.randn(400, 3, generator=generator) + 0.1 * noise[:, :, :3]
    assert lidar(noise).item() == pytest.approx(3, abs=0.2)
    values = health(noise)
    assert values["lidar"] == pytest.approx(lidar(noise[:, :LIDAR_IMAGES]).item())
    assert "lidar" not in health(noise[:1])


def test_a_loss_that_falls_with_the_variety() -> None:
    first = {"loss": 5.0, "embedding_std": 0.9, "effective_rank": 40.0}
    fallen = {"loss": 2.0, "embedding_std": 0.8, "effective_rank": 6.0}
    assert collapsing(first, fallen) == (
        "the loss falls, from 5 to 2, and effective rank from 40 to 6 with it"
    )
    assert collapsing(first, {**fallen, "loss": 5.5}) is None
    assert collapsing(first, {**fallen, "effective_rank": 20.0}) is None


@pytest.mark.parametrize("name", ["byol", "dino", "ijepa"])
def test_a_teacher_that_follows_is_told_from_one_that_does_not(name: str) -> None:
    def trained(method: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
        return method

    method = make(name).train()
    following = Following(method)
    assert not following.stand_still()  # nothing has been learnt
    trained(method)
    assert following.stand_still()
    method.update(0.1)
    assert not following.stand_still()
    assert not Following(trained(make("simclr"))).stand_still()  # which has none


def test_a_run_warns_of_a_teacher_that_stands_still(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "ssl_bench")
    words = ["eval_every=0", "epochs=2", "data.image_size=8", "augmentation.small_size=4"]
    launch(compose(*overrides("byol", *words, f"dir={tmp_path}/moves")))
    assert "stands still" not in caplog.text
    launch(compose(*overrides("byol", *words, "method.momentum=1", f"dir={tmp_path}/still")))
    assert "step 5: the momentum teacher stands still: no weight of it has moved" in caplog.text
    assert caplog.text.count("stands still") == 1
    caplog.clear()
    monkeypatch.setattr(BYOL, "update", lambda self, progress: None)  # an EMA that was forgotten
    launch(compose(*overrides("byol", *words, f"dir={tmp_path}/forgotten")))
    assert "stands still" in caplog.text
