"""Fine-tuning: which parameters learn, how fast, from which labels, and what the val split may
decide.
"""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_lincls import state
from commands import compose
from compared import assert_identical, final
from conftest import Command
from hypothesis import given
from hypothesis import strategies as st
from processes import on_ranks
from torch import nn
from torchvision.models import VisionTransformer, resnet18, resnet50

from ssl_bench.backbones import pixels, resnet
from ssl_bench.data.synthetic import write_dl21
from ssl_bench.errors import UserError
from ssl_bench.evaluate.labels import few_labels
from ssl_bench.launch.process import launch
from ssl_bench.methods.finetune import FineTune, blocks, parameters
from ssl_bench.stages.finetune import rates

SMALL = ["data.image_size=16", "backbone.width=8", "backbone.stem=small", "log_every=1"]
DIGITS = [
    "stage=finetune",
    "data=digits",
    *SMALL,
    "augmentation.flip_p=0",
    "batch_size=50",
    "epochs=2",
]
DIGITS += ["stage.labels_per_class=20"]


def tiny(**options) -> FineTune:
    torch.manual_seed(0)
    return FineTune(resnet.resnet18(stem="small", width=8), 4, **options).double()


# --- parts of a network ---------------------------------------------------------------------------

VIT = VisionTransformer(
    image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16
)
VIT.heads = nn.Identity()


@pytest.mark.parametrize(
    ("network", "stem", "count"),
    [
        (resnet18(), {"conv1.weight", "bn1.weight"}, 8),
        (resnet50(), {"conv1.weight", "bn1.weight"}, 16),
        (VIT, {"class_token", "encoder.pos_embedding", "conv_proj.weight"}, 3),
        (pixels.Pixels(8), set(), 0),
    ],
    ids=["resnet18", "resnet50", "vit", "pixels"],
)
def test_every_parameter_is_in_one_block(network: nn.Module, stem: set[str], count: int) -> None:
    parts = [parameters(part) for part in blocks(network)]
    assert len(parts) == count + 1
    assert Counter(map(id, chain(*parts))) == Counter(map(id, network.parameters()))
    names = {id(value): name for name, value in network.named_parameters()}
    assert stem <= {names[id(value)] for value in parts[0]}
    for part in parts[1:-1]:  # a block's own: layer1.0, encoder.layers.encoder_layer_0
        depth = 2 if network is not VIT else 3
        assert len({tuple(names[id(value)].split(".")[:depth]) for value in part}) == 1


@pytest.mark.parametrize("trained", [1, 3, None])
def test_only_the_last_blocks_learn(trained: int | None) -> None:
    model = tiny(trained_blocks=trained)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    images, labels = torch.randn(8, 3, 16, 16).double(), torch.arange(8) % 4
    for _ in range(2):  # the new layer is zero in its bias only: both steps move what is below it
        model([images], labels)["loss"].backward()
        optimizer.step()
    moved = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    first = {None: "", 1: "backbone.layer4.1", 3: "backbone.layer3.1"}[trained]
    names = list(before)
    start = next(i for i, name in enumerate(names) if name.startswith(first))
    assert moved == set(names[start:])  # statistics of batch norm among them


def test_rates_fall_towards_the_input() -> None:
    cfg = compose("stage=finetune", "batch_size=512", "optimizer.base_lr=0.01")
    model = tiny()
    groups = rates(cfg, model, head_lr=0.5, layer_decay=0.5)
    assert [group["lr"] for group in groups] == [*(0.02 * 0.5**depth for depth in range(9)), 1.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["params"][0] is model.backbone.layer4[1].conv1.weight
    assert groups[8]["params"][0] is model.backbone.conv1.weight
    assert len(rates(cfg, tiny(trained_blocks=2), 0.5, 0.5)) == 3


def test_mixup_is_its_definition() -> None:
    """The loss of mixed images against both labels; the same for the same generator."""
    model = tiny(mixup=0.4).eval()
    images, labels = torch.randn(6, 3, 16, 16).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.manual_seed(3)
    output = model([images], labels)
    torch.manual_seed(3)
    share = torch.distributions.Beta(0.4, 0.4).sample().double()
    targets = share * nn.functional.one_hot(labels, 4) + (1 - share) * nn.functional.one_hot(
        labels.flip(0), 4
    )
    logits = model.logits(share * images + (1 - share) * images.flip(0))
    torch.testing.assert_close(
        output["loss"], -(targets * logits.log_softmax(1)).sum(1).mean(), rtol=1e-6, atol=1e-6
    )
    assert 0 < share < 1


def test_too_many_blocks() -> None:
    with pytest.raises(UserError, match=r"stage.trained_blocks=9: the backbone has 8 blocks"):
        tiny(trained_blocks=9)


# --- labels ---------------------------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=6),
    fraction=st.floats(0.3, 1),
    seed=st.integers(0, 3),
)
def test_a_fraction_is_of_each_class(counts: list[int], fraction: float, seed: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    try:
        chosen = few_labels(labels, None, fraction, seed)
    except UserError:  # of many small classes
        assert sum(max(1, round(fraction * count)) for count in counts) > 1.5 * fraction * len(
            labels
        )
        return
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, few_labels(labels, None, fraction, seed))
    for label, count in enumerate(counts):
        assert (labels[chosen] == label).sum() == max(1, round(fraction * count))


def test_all_labels_and_so_many_of_each_class() -> None:
    labels = np.repeat(np.arange(3), 10)
    assert few_labels(labels, None, None, 0) is None
    chosen = few_labels(labels, 4, None, 0)
    assert np.bincount(labels[chosen]).tolist() == [4, 4, 4]
    assert not np.array_equal(chosen, few_labels(labels, 4, None, 1))


# --- the stage ------------------------------------------------------------------------------------


def test_it_starts_from_the_pretrained_weights_and_helps(tmp_path: Path) -> None:
    few = [*DIGITS, "stage.label_fraction=0.1", "stage.labels_per_class=null", "epochs=1"]
    whole = launch(
        compose(
            *DIGITS,
            "stage.labels_per_class=100",
            "optimizer.base_lr=1",
            "epochs=4",
            f"dir={tmp_path}/a",
        )
    )
    assert whole["val_top1"] > 60
    on = launch(
        compose(*few, f"pretrained={tmp_path}/a", "optimizer.base_lr=0.001", f"dir={tmp_path}/on")
    )
    scratch = launch(compose(*few, "optimizer.base_lr=0.001", f"dir={tmp_path}/scratch"))
    assert on["val_top1"] > scratch["val_top1"] + 20
    frozen = launch(
        compose(
            *few, f"pretrained={tmp_path}/a", "stage.trained_blocks=1", f"dir={tmp_path}/frozen"
        )
    )
    one, other = state(tmp_path / "a"), state(tmp_path / "frozen")
    same = {key for key in one if torch.equal(one[key], other[key])}
    assert {
        key
        for key in one
        if key.startswith(("backbone.conv1", "backbone.layer1", "backbone.layer4.0"))
    } <= same
    assert not any(key.startswith(("backbone.layer4.1", "fc")) for key in same)
    assert frozen["val_top1"] > 10


def test_val_labels_choose_nothing(tmp_path: Path) -> None:
    write_dl21(tmp_path / "data", 1, 60, 40, num_classes=4, image_size=16, workers=1)
    command = [
        "stage=finetune",
        "data=dl21",
        f"data.root={tmp_path}/data",
        "data.workers=1",
        *SMALL,
        "eval_every=1",
    ]
    command += ["batch_size=20", "epochs=3"]
    true = launch(compose(*command, f"dir={tmp_path}/true"))
    path = tmp_path / "data" / "val_label_tensor.pt"
    torch.save((torch.load(path, weights_only=True) + 1) % 4, path)
    poisoned = launch(compose(*command, f"dir={tmp_path}/poisoned"))
    assert true["val_loss"] != poisoned["val_loss"]
    assert_identical(state(tmp_path / "true"), state(tmp_path / "poisoned"))


def test_the_labels_that_were_asked_for_are_learnt_too(tmp_path: Path) -> None:
    write_dl21(
        tmp_path / "data", 30, 20, 20, num_classes=4, image_size=16, num_request=20, workers=1
    )
    command = [
        "stage=finetune",
        "data=dl21",
        f"data.root={tmp_path}/data",
        "data.workers=1",
        *SMALL,
        "epochs=1",
    ]
    command += ["data.extra_labels=[request_00.csv,label_00.pt]", "batch_size=40"]
    assert launch(compose(*command, f"dir={tmp_path}/run"))["images_seen"] == 40


@pytest.mark.slow
def test_a_stopped_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        *DIGITS,
        "stage.mixup=0.2",
        "stage.layer_decay=0.7",
        "stage.trained_blocks=6",
        "save_every=1",
    ]
    launch(compose(*command, f"dir={tmp_path}/whole"))
    forward, calls = FineTune.forward, []

    def failing(self: FineTune, *args) -> dict:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FineTune, "forward", failing)
        with pytest.raises(KeyboardInterrupt):
            launch(compose(*command, f"dir={tmp_path}/stopped"))
    assert not (tmp_path / "stopped" / "summary.json").exists()
    launch(compose(*command, f"dir={tmp_path}/stopped"))
    (one, ours), (other, theirs) = final(tmp_path / "whole"), final(tmp_path / "stopped")
    assert_identical(one, other)
    assert ours == theirs


@pytest.mark.slow
def test_two_processes(ssl_bench: Command, tmp_path: Path) -> None:
    """They see one batch together, batch norm too."""
    command = [*DIGITS, "stage.trained_blocks=6"]
    ssl_bench(*command, "dir=one", check=True)
    on_ranks([*command, "devices=2", "dir=two"], tmp_path)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)
