"""The loops: what a step is a function of, what a measurement counts."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import in_processes
from torch import Tensor, nn

from ssl_bench.augment.draws import keys
from ssl_bench.data.source import HostSource
from ssl_bench.errors import Interrupted, UserError
from ssl_bench.evaluate.neighbours import knn_and_ridge
from ssl_bench.evaluate.passes import evaluate
from ssl_bench.methods.base import Method
from ssl_bench.runs.run import Run
from ssl_bench.runs.tracking import NoTracker
from ssl_bench.training.engine import fit
from ssl_bench.training.schedule import Cosine

EPOCHS, IMAGES, BATCH = 3, 13, 4  # three steps an epoch; an image is left out


class Noted(Method):
    """One weight, whose gradient is the mean of the view; it notes what the loop tells it, and what
    it draws.
    """

    num_views = 1

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.weight = nn.Parameter(torch.zeros(()))
        self.begun, self.updated, self.drawn, self.modes = [], [], [], []
        self.masked: list[Tensor] = []

    def begin(self, epoch: float, epochs: int) -> None:
        self.begun.append((epoch, epochs))

    def draw(self, keys: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        self.masked.append(keys)
        return ()

    def forward(self, views: list[Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        self.drawn.append(torch.rand(()).item())
        self.modes.append(self.training)
        return {"loss": self.weight * views[0].mean()}

    def update(self, progress: float) -> None:
        self.updated.append(progress)


def train(
    folder: Path,
    seed: int = 0,
    rank: int = 0,
    size: int = 1,
    view: Callable[..., Tensor] | None = None,
    method: Noted | None = None,
    longest: float | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Noted, list[tuple[Tensor, Tensor]]]:
    """Image i is filled with i. Returns the method and what the augmentation was given: (pixels,
    keys) a step.
    """
    config = {"dir": str(folder), "seed": seed, "log_every": 1, "save_every": 100, "eval_every": 1}
    config |= {"epochs": EPOCHS} | (settings or {})
    values, given = np.arange(IMAGES), []
    images = np.broadcast_to(values.astype(np.uint8)[:, None, None, None], (IMAGES, 2, 2, 3)).copy()
    source = HostSource(images, values, values, BATCH, seed, "cpu", rank, size)

    def views(images: Tensor, image_keys: Tensor) -> list[Tensor]:
        given.append((images[:, 0, 0, 0].clone(), image_keys))
        return [(view or Tensor.float)(images)]

    method = method or Noted()
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.5)
    if longest is not None:
        optimizer.param_groups[0]["clip_grad_norm"] = longest
    schedule = Cosine(warmup_epochs=1)
    with Run(config | {"stage": {"name": "noted"}}, torch.device("cpu"), NoTracker) as run:
        fit(
            *(method, optimizer, schedule, source, views, run),
            epochs=config["epochs"],
            seed=seed,
            **options,
        )
    return method, given


@pytest.mark.parametrize(
    ("epochs", "every", "logged"),
    [(3, 1000, [1, 2, 3]), (25, 1000, [*range(2, 25, 2), 25]), (3, 2, [2 / 3, 4 / 3, 2, 8 / 3, 3])],
)
def test_a_short_training_logs_ten_lines_or_each_epoch(
    tmp_path: Path, epochs: int, every: int, logged: list[int]
) -> None:
    train(tmp_path, settings={"epochs": epochs, "log_every": every, "eval_every": 0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == logged


def test_stopped_while_no_images_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the last whole step is saved, and it goes on from there as if nothing was."""
    whole, _ = train(tmp_path / "whole")
    stream = HostSource.stream

    def ends(
        self: HostSource, start: int, stop: int
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        for batch in stream(self, start, stop):
            if batch[0] == 4:
                raise Interrupted(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(HostSource, "stream", ends)
        for _ in range(2):  # the second time before its first step
            with pytest.raises(Interrupted, match="stopped by SIGTERM after step 4"):
                train(tmp_path / "run")
    rest, _ = train(tmp_path / "run")
    assert torch.equal(rest.weight, whole.weight)
    assert rest.drawn == whole.drawn[4:]
    lines = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "run")
    ]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0] == losses[1]


class Looking(Noted):
    """It looks at all images before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(IMAGES))

    def prepare(self, batches: Iterator[tuple[list[Tensor], Tensor]]) -> None:
        for (view,), indices in batches:
            assert torch.equal(view[:, 0, 0, 0], indices.float())
            self.seen[indices] += 1


def test_a_method_may_look_at_all_images_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: not when it goes on, and anew when it was stopped before a state was saved."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stopping", lambda run, step: True)
        with pytest.raises(Interrupted, match=r"^stopped by SIGTERM$"):
            train(tmp_path / "run", method=(stopped := Looking()))
    assert stopped.seen.sum() == BATCH
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stopping", lambda run, step: step == 4)
        with pytest.raises(Interrupted, match="after step 4"):
            train(tmp_path / "run", method=(looking := Looking()))
    assert looking.seen.sum() == 12  # three batches: of each image one view
    assert looking.seen.max() == 1
    again, given = train(tmp_path / "run", method=Looking())
    assert torch.equal(again.seen, looking.seen)  # from the checkpoint
    assert len(given) == 5  # the steps that were left, and nothing else
    whole, given = train(tmp_path / "whole", method=Looking())
    assert torch.equal(again.weight, whole.weight)
    for (_, first), (_, prepared) in zip(given[3:6], given[:3], strict=True):
        assert torch.equal(first, prepared)  # the views of the first epoch


def test_a_step_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    method, given = train(tmp_path / "run")
    steps = IMAGES // BATCH * EPOCHS
    assert method.begun == [(step / 3, EPOCHS) for step in range(steps)]
    assert method.updated == [(step + 1) / steps for step in range(steps)]
    assert len(set(method.drawn)) == steps  # dropout isn't the same in every step
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    rates = [0.5 * Cosine(warmup_epochs=1)(step / 3, EPOCHS) for step in range(steps)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    means = [images.double().mean().item() for images, _ in given]
    assert [line["grad_norm"] for line in lines] == pytest.approx(means)  # of this step alone
    assert method.weight.item() == pytest.approx(
        -sum(lr * mean for lr, mean in zip(rates, means, strict=True))
    )
    again, seen = train(tmp_path / "again")
    assert (again.drawn, again.weight) == (method.drawn, method.weight)
    assert all(map(torch.equal, (k for _, k in given), (k for _, k in seen)))
    assert not set(train(tmp_path / "other", seed=1)[0].drawn) & set(method.drawn)


def test_an_image_is_seen_in_another_order_and_by_other_draws_in_each_epoch(tmp_path: Path) -> None:
    """Its keys are those of (seed, epoch, image), whichever batch it comes in."""
    method, given = train(tmp_path / "run", seed=5)
    for step, (images, image_keys) in enumerate(given):
        assert torch.equal(image_keys, keys(5, step // 3, images.long()))
        assert torch.equal(method.masked[step], image_keys)  # masks are draws like all others
    orders = [torch.cat([images for images, _ in given[at : at + 3]]).tolist() for at in (0, 3, 6)]
    assert all(len(set(order)) == 12 for order in orders)
    assert len(set(map(tuple, orders))) == EPOCHS


def test_a_measurement_interrupts_the_training_mode_only(tmp_path: Path) -> None:
    method, calls = Noted(), []

    def measure(network: Method) -> dict[str, float]:
        network.eval()
        calls.append(len(method.modes))
        return {"measured": 1.0}

    train(tmp_path / "run", method=method, evaluate=measure)
    assert calls == [3, 6, 9]
    assert all(method.modes)


def test_gradients_are_shortened_whatever_the_scale_of_the_loss(tmp_path: Path) -> None:
    """In float16 the loss is scaled: their lengths are those without the scale."""
    plain, given = train(tmp_path / "plain", longest=2.0)
    scaled, _ = train(tmp_path / "scaled", longest=2.0, precision="fp16")
    rates = [0.5 * Cosine(warmup_epochs=1)(step / 3, EPOCHS) for step in range(9)]
    lengths = [min(2.0, images.double().mean().item()) for images, _ in given]
    expected = -sum(lr * length for lr, length in zip(rates, lengths, strict=True))
    assert plain.weight.item() == pytest.approx(expected, rel=1e-5)
    assert scaled.weight.item() == pytest.approx(expected, rel=1e-3)


def draws(rank: int, size: int) -> dict[str, Tensor]:
    method, given = train(Path("run"), rank=rank, size=size)
    drawn, images = torch.tensor(method.drawn), torch.cat([images for images, _ in given])
    return {"drawn": drawn, "images": images, "weight": method.weight.detach()}


def test_ranks_draw_and_see_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And learn together, at the rate of one process."""
    one, _ = train(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    first, second = in_processes(draws, tmp_path)
    assert not set(first["drawn"].tolist()) & set(second["drawn"].tolist())
    pairs = zip(first["images"].split(2), second["images"].split(2), strict=True)
    assert not [1 for mine, yours in pairs if set(mine.tolist()) & set(yours.tolist())]
    torch.testing.assert_close(first["weight"], one.weight.detach())
    assert torch.equal(first["weight"], second["weight"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, value: float) -> None:
    """With the step it came at, and no state saved from then on."""
    calls = []

    def view(images: Tensor) -> Tensor:
        calls.append(1)
        return images.float() + (value if len(calls) == 5 else 0.0)

    with pytest.raises(UserError, match="diverged at step 5: loss or weights are not finite"):
        train(tmp_path / "run", view=view)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


class Spoilt(Noted):
    """Its loss is finite, and what it is to save isn't."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("statistics", torch.full((), torch.nan))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="loss or weights are not finite"):
        train(tmp_path / "run", method=Spoilt())
    assert not list((tmp_path / "run").glob("checkpoints/*"))


class Answers(nn.Module):
    """Its logits are its input, as long as it is in eval mode."""

    def logits(self, images: Tensor) -> Tensor:
        assert not self.training
        return images.flatten(1)


@pytest.mark.parametrize("classes", [3, 7])
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_each_image_counts_once(classes: int, batch: int) -> None:
    """Top-1, top-5, loss and calibration error are of all images, however they are cut into
    batches; the last is smaller.
    """
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(classes))
    labels = torch.arange(40) % classes
    parts = zip(
        logits[..., None, None].split(batch), labels.split(batch), labels.split(batch), strict=True
    )
    found = evaluate(Answers().train(), parts, lambda images: images)
    ranks = [int((row > row[label]).sum()) for row, label in zip(logits, labels, strict=True)]
    expected = {f"val_top{k}": 100 * sum(rank < k for rank in ranks) / 40 for k in (1, 5)}
    expected["val_loss"] = F.cross_entropy(logits, labels).item()
    confidence, answers = logits.softmax(dim=1).double().max(dim=1)
    expected["val_ece"] = 0.0
    for i in range(15):  # Guo et al., equation 3
        mine = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if mine.any():
            gap = confidence[mine].mean() - (answers == labels)[mine].double().mean()
            expected["val_ece"] += 100 * mine.double().mean().item() * gap.abs().item()
    assert found == pytest.approx(expected)


def test_judges_know_only_what_the_others_teach() -> None:
    """The others teach a rule that fails for all who are asked: half of these in the bank, and some
    would be right.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (600,), generator=generator)
    features = F.one_hot(labels).float() + 0.1 * torch.randn(600, 4, generator=generator)
    asked = torch.rand(600, generator=generator) < 0.5
    assert all(value > 99 for value in knn_and_ridge(features, labels, asked).values())
    assert knn_and_ridge(features, (labels + asked) % 4, asked) == {"knn_top1": 0, "probe_top1": 0}


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ({}, "the keys "),
        ({"accuracy": torch.ones(())}, "the keys accuracy"),
        (torch.ones(()), "Tensor"),
    ],
)
def test_a_method_without_a_loss(tmp_path: Path, output: Any, said: str) -> None:
    class Silent(Noted):
        def forward(self, views: list[Tensor], labels: Tensor | None = None) -> Any:
            return output

    with pytest.raises(UserError, match=rf"^Silent\.forward returns {said}: it must return a"):
        train(tmp_path, method=Silent())
