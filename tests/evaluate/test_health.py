"""Embeddings that tell images apart, teachers that follow, and what a run says where they don't."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import compose
from small_methods import make, overrides
from torch import Tensor

from ssl_bench.errors import Collapsed
from ssl_bench.evaluate.health import LIDAR_IMAGES, Following, Watch, health, lidar, variety
from ssl_bench.launch.process import launch
from ssl_bench.methods.byol import BYOL
from ssl_bench.runs.checkpoint import complete


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


def line(std: float, rank: float, loss: float = 3.0) -> dict[str, float]:
    return {"embedding_std": std, "effective_rank": rank, "loss": loss}


def test_a_collapse_is_told_by_what_a_run_has_lost() -> None:
    watch = Watch()
    for std, rank in ((0.83, 26), (0.4, 19), (0.3, 8)):  # what healthy ones lose
        assert not watch(line(std, rank), 0.1)
    assert not watch(line(0.24, 26), 0.2)  # while the loss doesn't fall
    assert watch(line(0.24, 26, loss=2.0), 0.2) == {
        "is collapsing": "embeddings of different images become alike: their spread has fallen "
        "from 0.83 to 0.24"
    }
    assert not watch(line(0.8, 2.6), 0.2)
    assert watch(line(0.8, 2.4), 0.2) == {
        "is collapsing": "embeddings come to lie in few directions: their effective rank has "
        "fallen from 26 to 2.4"
    }
    assert watch(line(0.16, 26, loss=4.0), 0.2).keys() == {"is collapsing"}
    assert watch(line(0.05, 12), 0.3).keys() == {"has collapsed"}


def test_little_variety_at_the_start_is_no_collapse_yet() -> None:
    watch = Watch()
    assert not watch(line(0.09, 1.4), 0.1)
    assert watch(line(0.09, 1.4), 1.0).keys() == {"has collapsed"}
    again = Watch()  # after a stop: what was logged before is known
    again.see(line(0.9, 20))
    assert again(line(0.17, 20), 0.1)
    assert not Watch()(line(0.17, 20), 0.1)
    classifier = Watch(loses=True)
    assert not classifier(line(0.9, 40), 0.1)
    assert not classifier(line(0.3, 5), 0.1)
    assert classifier(line(0.05, 1.0), 0.1).keys() == {"has collapsed"}


def test_the_cause_of_a_collapse() -> None:
    def trained(change: float, momentum: float | None) -> str:
        method = make("byol").train()
        following, watch = Following(method), Watch()
        watch(line(0.9, 20, loss=5.0), 0)
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.requires_grad:
                    parameter += change
        if momentum is not None:
            method.momentum = momentum
            method.update(0.0)
        return watch.cause(line(0.1, 20, loss=2.0), following)

    assert trained(0.01, None).startswith("the momentum teacher stands still")
    assert trained(0.01, 0.0).startswith("the momentum teacher equals its student")
    assert "the learning rate is too high" in trained(3.0, 0.9)
    assert trained(0.01, 0.9).startswith("the loss falls with it, from 5 to 2")


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


COLLAPSING = ["data.image_size=8", "augmentation.small_size=4", "batch_size=64", "log_every=500"]
COLLAPSING += ["eval_every=0", "epochs=3", "optimizer=sgd", "optimizer.base_lr=0.05"]
COLLAPSING += ["method.std_coeff=0", "method.cov_coeff=0"]


@pytest.mark.slow
def test_a_collapse_is_announced_and_may_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the 20th step, though lines come at every 500th, by VICReg's own spread; its state is
    saved, and it may go on.
    """
    caplog.set_level(logging.WARNING, "ssl_bench")
    words = overrides("vicreg", *COLLAPSING, f"dir={tmp_path}")
    with pytest.raises(
        Collapsed,
        match=r"^stopped at step 20, whose state is saved: the run has collapsed: all images .*"
        r"; the loss falls with it, .*on_collapse=warn goes on",
    ):
        launch(compose(*words, "on_collapse=stop"))
    assert "step 20: the run has collapsed: all images have nearly the same" in caplog.text
    assert "the loss falls with it" in caplog.text
    assert complete(tmp_path)[0].name == "step0000000020.pt"
    assert not (tmp_path / "summary.json").exists()
    launch(compose(*words))
    assert (tmp_path / "summary.json").exists()


def test_what_is_looked_at_between_lines_is_what_lines_have() -> None:
    given = embeddings(2, 300, 12)
    whole = health(given[:, :LIDAR_IMAGES])
    assert variety(given) == {key: whole[key] for key in ("embedding_std", "effective_rank")}
