"""`ema`: the average of the weights that evaluations look at."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, TINY_PRETRAIN
from torch import Tensor, nn

import ssl_bench
from ssl_bench.backbones.resnet import resnet18
from ssl_bench.data.formats.digits import Digits
from ssl_bench.data.source import HostSource
from ssl_bench.errors import UserError
from ssl_bench.evaluate.features import extract_all
from ssl_bench.methods.base import Method
from ssl_bench.methods.baselines import Supervised
from ssl_bench.methods.finetune import FineTune
from ssl_bench.methods.moco import MoCo
from ssl_bench.methods.probe import LinearProbe
from ssl_bench.runs import checkpoint, weights
from ssl_bench.runs.checkpoint import complete
from ssl_bench.training.average import COUNT, Average

WORDS = [*TINY_PRETRAIN, "device=cpu", "eval_every=1"]
DECAY = 0.8


def small() -> nn.Module:
    return resnet18(width=4, stem="small")


@pytest.mark.parametrize(
    "make",
    [
        lambda: MoCo(small(), queue_size=8),
        lambda: Supervised(small(), 3),
        lambda: FineTune(small(), 3),
        lambda: LinearProbe(small(), 3, normalize=True),
    ],
)
def test_it_is_the_average_by_hand(make: Callable[[], Method]) -> None:
    torch.manual_seed(0)
    model = make()
    average, expected = Average(model, DECAY), {}
    for step in range(6):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor) * 0.1)
        average.update()
        for key, now in model.state_dict().items():
            before = expected.get(key, now)
            expected[key] = now.clone() if step == 0 else DECAY * before + (1 - DECAY) * now
    names = {key for key in model.state_dict() if key.startswith(("backbone.", "fc.", "norm."))}
    state = average.state_dict()
    assert state.pop(COUNT) == 6
    if isinstance(model, MoCo):
        names = {key for key in names if key.startswith("backbone.")}
    assert state.keys() == names
    for key, value in state.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key])
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    other = Average(make(), DECAY)
    other.load_state_dict(average.state_dict())
    both = average.state_dict(), other.state_dict()
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_a_frozen_backbone_is_its_own_average() -> None:
    model = LinearProbe(small(), 3)
    average = Average(model, 0.999)
    for _ in range(5):
        average.update()
    mine, theirs = average.network.backbone.state_dict(), model.backbone.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pretrainings that differ in `ema` alone."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in {"plain": [], "averaged": [f"ema={DECAY}"]}.items():
        ssl_bench.train([*WORDS, *words, f"dir={folder}/{name}"])
    return {name: folder / name for name in ("plain", "averaged")}


def content(run: Path) -> dict:
    return checkpoint.read(complete(run)[0])


def test_the_training_is_the_same_without_it(runs: dict[str, Path]) -> None:
    plain, averaged = (content(runs[name]) for name in ("plain", "averaged"))
    assert "ema" not in plain
    for key, tensor in plain["model"].items():
        assert torch.equal(tensor, averaged["model"][key]), key
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs.values()
    ]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert lines[0][-1]["probe_top1"] != lines[1][-1]["probe_top1"]


def test_a_run_that_was_stopped_ends_with_the_same_average(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = HostSource.stream

    def ends(self: HostSource, start: int, stop: int) -> Iterator:
        for batch in stream(self, start, stop):
            if batch[0] == 7:  # the last state saved is that of step 4
                raise MemoryError
            yield batch

    words = [*WORDS, f"ema={DECAY}", f"dir={tmp_path}/run"]
    with monkeypatch.context() as patch:
        patch.setattr(HostSource, "stream", ends)
        with pytest.raises(MemoryError):
            ssl_bench.train(words)
    assert content(tmp_path / "run")["step"] == 4
    ssl_bench.train(words)
    whole, rest = content(runs["averaged"]), content(tmp_path / "run")
    for part in ("model", "ema"):
        for key, tensor in whole[part].items():
            assert torch.equal(tensor, rest[part][key]), (part, key)
    assert whole["ema"][COUNT] == 20


def test_it_is_what_is_loaded_and_the_weights_can_be_asked_for(
    runs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    saved = content(runs["averaged"])
    for prefix, part, said in (
        (None, "ema", "the averaged weights are taken (ema)"),
        ("ema.backbone", "ema", "the averaged weights are taken"),
        ("model.backbone", "model", ""),
    ):
        backbone = resnet18(width=8, stem="small")
        loaded = weights.load_backbone(backbone, str(runs["averaged"]), prefix)
        for key, tensor in backbone.state_dict().items():
            assert torch.equal(tensor, saved[part][f"backbone.{key}"])
        assert said in " ".join(loaded.remarks)
        assert bool(said) == bool("average" in " ".join(loaded.remarks))
    logging.getLogger("ssl_bench").addHandler(caplog.handler)
    with caplog.at_level("INFO"):
        backbone, _ = ssl_bench.load(runs["averaged"])
    assert "ema" in caplog.text
    first = next(iter(backbone.state_dict()))
    assert torch.equal(backbone.state_dict()[first], saved["ema"][f"backbone.{first}"])


def test_what_is_measured_while_it_trains_is_the_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []

    def noted(precision: str, run: object, backbone: nn.Module, *rest: object) -> Tensor:
        seen.append({key: tensor.clone() for key, tensor in backbone.state_dict().items()})
        return extract_all(precision, run, backbone, *rest)

    monkeypatch.setattr("ssl_bench.stages.pretrain.extract_all", noted)
    ssl_bench.train([*WORDS, f"dir={tmp_path}/run", f"ema={DECAY}"])
    saved = content(tmp_path / "run")["ema"]
    assert len(seen) == 2
    assert all(torch.equal(seen[-1][key], saved[f"backbone.{key}"]) for key in seen[-1])


@pytest.mark.parametrize("stage", ["lincls", "finetune"])
def test_a_classifier_is_averaged_as_well(
    stage: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    words = [*TINY, f"stage={stage}", f"pretrained={runs['plain']}", "epochs=1", "device=cpu"]
    words += ["schedule=constant", f"dir={tmp_path}/run"]
    ran = ssl_bench.train([*words, "ema=0.9"])
    saved = content(tmp_path / "run")
    assert {"fc.weight", "fc.bias"} <= saved["ema"].keys()
    assert not torch.equal(saved["ema"]["fc.weight"], saved["model"]["fc.weight"])
    backbone = resnet18(width=8, stem="small")
    loaded = weights.load_backbone(backbone, str(tmp_path / "run"))
    assert torch.equal(loaded.classifier.weight.float(), saved["ema"]["fc.weight"])
    store = Digits(16).open("val")
    _, transform = ssl_bench.load(tmp_path / "run")
    views = transform.view(torch.from_numpy(store.images.copy()).permute(0, 3, 1, 2))
    with torch.no_grad():
        features = backbone.eval()(views)
    logits = F.linear(features, saved["ema"]["fc.weight"], saved["ema"]["fc.bias"])
    right = (logits.argmax(dim=1) == torch.from_numpy(store.labels)).double().mean()
    assert 100 * right.item() == pytest.approx(ran.metrics["val_top1"], abs=0.21)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("method=random ema=0.9", "ema=0.9 would be ignored: stage=pretrain with method=random"),
        ("stage=knn ema=0.9 pretrained=x", "stage=knn doesn't read ema; it is for stage=finetune"),
        ("ema=1", "ema=1: input should be less than 1"),
        ("ema=0", "ema=0: input should be greater than 0"),
        ("stage=lincls stage.features=cached ema=0.9", "ema=0.9 is for one classifier"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        ssl_bench.train(words.split())


def test_another_average_is_another_run(runs: dict[str, Path]) -> None:
    for words in ([], ["ema=0.99"]):
        with pytest.raises(UserError, match=r"ema was 0.8, is (None|0.99)"):
            ssl_bench.train([*WORDS, *words, f"dir={runs['averaged']}"])
    with pytest.raises(UserError, match=r"ema was None, is 0.8"):
        ssl_bench.train([*WORDS, f"ema={DECAY}", f"dir={runs['plain']}"])


def test_a_training_that_goes_on_takes_its_average_along(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    for name, count in (("averaged", 30), ("plain", 10)):
        words = [f"continue_from={runs[name]}", "epochs=3", f"dir={tmp_path}/{name}"]
        ssl_bench.train([*words, f"ema={DECAY}"])
        assert content(tmp_path / name)["ema"][COUNT] == count


def test_it_waits_for_no_device() -> None:
    """The counter is on the host, or each step would wait until the device has counted."""
    average = Average(LinearProbe(small(), 3).to("meta"), 0.9)
    assert average._average.n_averaged.device.type == "cpu"
