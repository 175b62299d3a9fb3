"""What stays of a finished run (`keep`), and that its users can read it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compose
from compared import features, same, tiny

from ssl_bench import files
from ssl_bench.config import build
from ssl_bench.errors import UserError
from ssl_bench.runs import checkpoint, layout, weights
from ssl_bench.runs.checkpoint import Checkpoint
from ssl_bench.runs.record import Ran
from ssl_bench.runs.run import Run
from ssl_bench.runs.tracking import NoTracker

LAST, BEST = "checkpoints/step0000000004.pt", "best/step0000000002.pt"


def opened(folder: Path, keep: Any, **keys: Any) -> Run:
    config = {"dir": str(folder), "seed": 0, "keep": keep, "stage": {"name": "pretrain"}}
    config |= {"device": "cpu", "epochs": 4, "batch_size": 2, "eval_every": 1}
    return Run(config | keys, torch.device("cpu"), NoTracker)


def finished(folder: Path, keep: Any, best: bool = False) -> Path:
    """A run of four steps, each of which is saved; the second is the best."""
    with opened(folder, keep, save_best="knn_top1" if best else None) as run:
        for step, value in enumerate((1.0, 3.0, 2.0, 2.0), start=1):
            model = tiny(seed=step)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            run.metrics.log(step, {"epoch": float(step), "knn_top1": value})
            run.save(step, model=model, optimizer=optimizer)
            run.keep_best(step)
        run.finish({"knn_top1": 2.0})
    return folder


def left(folder: Path) -> list[str]:
    found = [path for name in ("checkpoints", "best") for path in (folder / name).glob("*")]
    return sorted(path.relative_to(folder).as_posix() for path in found)


@pytest.mark.parametrize(
    ("keep", "best", "stays"),
    [
        (1, False, [LAST]),
        ("all", False, [LAST.replace("4", str(step)) for step in (1, 2, 3, 4)]),
        ("last", True, [BEST, LAST]),
        ("last", False, [LAST]),
        ("best", True, [BEST]),
        ("best", False, [LAST]),  # whatever the metric was, no number
        ("backbone", True, [BEST, LAST]),
    ],
)
def test_what_stays(tmp_path: Path, keep: Any, best: bool, stays: list[str]) -> None:
    """It has its digests, and the newest, or the best where it is alone, is what the run means."""
    run = finished(tmp_path / "run", keep, best)
    assert left(run) == stays
    for name in {LAST, BEST} & {*stays}:
        assert files.check(run / name) == run / files.SUMS
    newest = LAST if LAST in stays else BEST
    assert layout.weights_of(run) == Ran.read(run).weights == run / newest
    assert not [name for name in files.listed(run) if not (run / name).is_file()]


def test_a_backbone_alone_is_all_that_its_users_need(tmp_path: Path) -> None:
    """And not enough to go on from."""
    run, whole = (finished(tmp_path / str(keep), keep) for keep in ("backbone", 1))
    networks = [tiny(seed=9).backbone for _ in range(2)]
    for network, source in zip(networks, (run, whole), strict=True):
        weights.load_backbone(network, str(source))
    assert same(*networks)
    assert torch.equal(features(networks[0]), features(networks[1]))
    sizes = [(source / LAST).stat().st_size for source in (run, whole)]
    assert sizes[0] < 0.4 * sizes[1]
    for use in (checkpoint.check_fits, checkpoint.carry_over):
        arguments = {"model": tiny()}
        with pytest.raises(UserError, match=r"is a backbone alone .*keep=backbone.*pretrained="):
            use(run / LAST, "continue_from=RUN", **arguments)


@pytest.mark.parametrize("keep", ["last", "best", "backbone"])
def test_a_kill_before_it_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    """The next command, which finds the run finished, does the rest."""
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "settle", lambda _: None)
        run = finished(tmp_path / "run", keep, best=True)
    before = left(run)
    with opened(run, keep, save_best="knn_top1") as again:
        assert again.summary == {"knn_top1": 2.0}
    assert left(run) != before
    for name in left(run):
        assert files.check(run / name)
    assert left(run) == left(finished(tmp_path / "whole", keep, best=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=pretrain", "keep=best"], "keep=best needs a metric .* add save_best=knn_top1"),
        (["stage=lincls", "pretrained=.", "keep=backbone"], "keep=backbone is for pretrainings"),
        (["stage=pretrain", "keep=first"], "keep"),
    ],
)
def test_what_cannot_be_kept(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build.check(compose(*words, "dir=/x"))
