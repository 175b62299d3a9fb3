"""MoCo's parts, one by one."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_bench.backbones import pixels, resnet, vit
from ssl_bench.errors import UserError
from ssl_bench.methods import layers, splits
from ssl_bench.methods.base import momentum_copy
from ssl_bench.methods.layers import (
    Queue,
    SplitBatchNorm,
    SyncBatchNorm,
    split_batch_norm_,
    sync_batch_norm_,
)
from ssl_bench.methods.moco import MoCo
from ssl_bench.methods.moco_v3 import MoCoV3
from ssl_bench.methods.probe import LinearProbe
from ssl_bench.training.schedule import Constant, Cosine, Schedule, Step


def tiny(**kwargs) -> MoCo:
    torch.manual_seed(0)
    return MoCo(resnet.resnet18(stem="small", width=8), **{"dim": 16, "queue_size": 12} | kwargs)


def images(num: int, seed: int) -> torch.Tensor:
    return torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@given(size=st.integers(1, 20), batches=st.lists(st.integers(0, 45), max_size=6))
@settings(max_examples=60)
def test_queue_is_a_ring_of_the_newest(size: int, batches: list[int]) -> None:
    queue, ring, written = Queue(1, size), [None] * size, 0
    start = queue.keys.clone()
    for num in batches:
        queue.enqueue(torch.arange(written, written + num, dtype=torch.float32)[:, None])
        for key in range(written, written + num):
            ring[key % size] = key
        written += num
    expected = [start[0, i].item() if key is None else float(key) for i, key in enumerate(ring)]
    assert queue.keys[0].tolist() == expected
    assert queue.pointer.item() == written % size


def test_a_batch_does_not_meet_its_own_keys() -> None:
    """Same network, same images: the positive has similarity 1, and a copy in the queue would tie
    it.
    """
    method = tiny(temperature=1.0, bn_splits=1).eval()  # eval: no enqueueing, no EMA
    batch = images(4, 0)
    before = method.queue.keys.clone()
    assert method([batch, batch])["accuracy"] == 1
    assert torch.equal(method.queue.keys, before)
    method.train()
    method([batch, batch])
    assert torch.equal(method.queue.keys, before)  # backward is to find it so
    keys = method.newest
    method.update(1.0)
    assert torch.equal(method.queue.keys, torch.cat([keys.T, before[:, 4:]], dim=1))
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(4))


def test_only_the_query_learns_and_the_key_follows() -> None:
    method = tiny(momentum=0.5, bn_splits=1)
    method([images(4, 0), images(4, 1)])["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.key_backbone.parameters())
    assert all(
        p.grad is not None for p in [*method.backbone.parameters(), *method.head.parameters()]
    )
    with torch.no_grad():
        method.backbone.conv1.weight.add_(1)
    key, query = method.key_backbone.conv1.weight.clone(), method.backbone.conv1.weight.clone()
    method([images(4, 0), images(4, 1)])
    torch.testing.assert_close(method.key_backbone.conv1.weight, (key + query) / 2)


DROPS = {
    "vit_tiny_patch16_224": {
        "img_size": 32,
        "drop_path_rate": 0.3,
        "proj_drop_rate": 0.2,
        "attn_drop_rate": 0.2,
    },
    "efficientnet_b0": {"drop_rate": 0.5, "drop_path_rate": 0.3},
    "resnet10t": {"drop_rate": 0.5, "drop_path_rate": 0.3, "drop_block_rate": 0.3},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "drop_rate": 0.2,
        "drop_path_rate": 0.3,
    },
}


def dropping(name: str) -> nn.Module:
    if name != "ours":
        return pytest.importorskip("timm").create_model(name, num_classes=0, **DROPS[name])
    network = vit.vit_tiny(32, patch_size=8)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.3
    return network


@pytest.mark.parametrize("name", ["ours", *DROPS])
def test_a_momentum_network_is_not_random(name: str) -> None:
    torch.manual_seed(0)
    network, batch = dropping(name).train(), torch.rand(4, 3, 32, 32)
    slow = momentum_copy(network)
    for mode in (True, False, True):
        slow.train(mode)
        with torch.no_grad():
            assert torch.equal(slow(batch), slow(batch))
            assert not torch.equal(network(batch), network(batch))  # the other is, as before


def test_batch_norm_of_a_momentum_network_is_the_batchs() -> None:
    network = resnet.resnet18(stem="small", width=8).train()
    slow, batch = momentum_copy(network), images(6, 0)
    assert torch.equal(slow(batch), network(batch))
    assert not torch.equal(slow.bn1.running_mean, torch.zeros(8))
    assert not slow.bn1.weight.requires_grad
    before = slow.eval().bn1.running_mean.clone()
    slow(batch)
    assert torch.equal(slow.bn1.running_mean, before)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_batch_norm_is_batch_norm_of_each_part(
    layout: torch.memory_format, dtype: torch.dtype, affine: bool
) -> None:
    whole = nn.Sequential(nn.BatchNorm2d(3, affine=affine))
    parts = [nn.BatchNorm2d(3, affine=affine) for _ in range(4)]
    for norm in (whole[0], *parts):
        for parameter, values in zip(
            norm.parameters(), ([0.5, 1.0, 2.0], [1.0, 0.0, -1.0]), strict=False
        ):
            parameter.data = torch.tensor(values)
    split_batch_norm_(whole, 4)
    x, gradient = torch.randn(2, 8, 3, 5, 5).to(dtype).unbind()
    x, of_whole, of_parts = (x.to(memory_format=layout, copy=True) for _ in range(3))
    actual = whole(of_whole.requires_grad_())
    pairs = zip(parts, of_parts.requires_grad_().chunk(4), strict=True)
    expected = torch.cat([norm(part) for norm, part in pairs])
    assert actual.stride() == x.stride()
    assert torch.equal(actual, expected)
    actual.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(of_whole.grad, of_parts.grad)
    for name, parameter in whole[0].named_parameters():
        summed = sum(getattr(norm, name).grad for norm in parts)
        torch.testing.assert_close(parameter.grad, summed)
    for name in ("running_mean", "running_var"):
        each = torch.stack([getattr(norm, name) for norm in parts])
        torch.testing.assert_close(getattr(whole[0], name), each.mean(0))
    x = x.float()
    whole.eval()
    running = whole[0].running_mean, whole[0].running_var, whole[0].weight, whole[0].bias
    torch.testing.assert_close(whole(x), F.batch_norm(x, *running))
    assert whole.state_dict().keys() == nn.Sequential(parts[0]).state_dict().keys()


def test_split_batch_norm_refuses_a_single_value_as_torch_does() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3))
    split_batch_norm_(network, 4)
    network(torch.randn(8, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.randn(4, 3))


def test_split_batch_norm_is_the_same_by_either_way() -> None:
    """On a CPU each part is written in place; compiled, and on a GPU, torch.cat joins them."""
    found = []
    for normalise in (layers._InOneTensor.apply, layers._normalised_and_joined):
        means, variances = torch.zeros(4, 3), torch.ones(4, 3)
        weight, bias = torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.0, -1.0]]).requires_grad_().unbind()
        torch.manual_seed(0)
        x = torch.randn(8, 3, 5, 5, requires_grad=True)
        y = normalise(x, weight, bias, means, variances, 0.1, 1e-5)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, weight, bias])])
        found[-1] += [means, variances]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("processes", "batch_size", "parts"),
    [
        (1, 256, 8),
        (2, 256, 4),
        (4, 256, 2),
        (16, 256, 1),
        (3, 96, 2),
        (1, None, 8),
        (1, 8, 4),
        (1, 20, 5),
        (1, 7, 1),
    ],
)
def test_parts_that_make_up_the_authors_gpus(
    processes: int, batch_size: int | None, parts: int
) -> None:
    assert splits.resolve(None, processes, batch_size) == parts
    assert splits.resolve(3, processes, batch_size) == 3  # typed: as it is


@given(processes=st.integers(1, 16), share=st.integers(1, 300))
def test_parts_divide_the_batch(processes: int, share: int) -> None:
    parts = splits.resolve(None, processes, share * processes)
    assert share % parts == 0
    assert share // parts > 1 or parts == 1
    assert parts * processes <= max(8, processes)


def test_batch_norm_is_shuffled_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    """The default is the authors' setting, bit for bit, and what differs from it is said."""
    caplog.set_level("INFO", "ssl_bench")
    losses = []
    for typed in ({"bn_splits": 8}, {}, {"batch_size": 16}, {"bn_splits": 1}):
        method = tiny(**typed)
        torch.manual_seed(1)
        losses.append(method([images(16, 0), images(16, 1)])["loss"])
    assert losses[0] == losses[1] == losses[2] != losses[3]
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (
            "WARNING",
            "BatchNorm2d sees a batch whole, not shuffled: its statistics may give the positive "
            "away (method.bn_splits=1)",
        ),
    ]
    caplog.clear()
    assert tiny(batch_size=20).bn_splits == 5
    assert "WARNING" in caplog.text
    assert "in 5 shuffled parts; the authors had 8" in caplog.text


def test_backbones_whose_batch_norm_is_no_plain_one(caplog: pytest.LogCaptureFixture) -> None:
    assert MoCo(vit.vit_tiny(16), 16, 12).bn_splits == 1
    assert not caplog.records  # nothing to shuffle
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8))
    flat.dim = 8
    method = MoCo(flat, 16, 12)
    assert (method.bn_splits, type(method.key_backbone[2])) == (8, SplitBatchNorm)
    network = pytest.importorskip("timm").create_model("efficientnet_b0", num_classes=0)
    network.dim = network.num_features
    assert MoCo(network, 16, 12).bn_splits == 1
    assert "BatchNormAct2d sees a batch whole, not shuffled" in caplog.text
    with pytest.raises(UserError, match="BatchNormAct2d"):
        MoCo(network, 16, 12, bn_splits=8)


def test_shuffled_keys_come_back_in_order() -> None:
    """With batch norm in eval mode the shuffle must change nothing."""
    plain, split = tiny(bn_splits=1), tiny(bn_splits=4)
    for method in (plain, split):
        method.key_backbone.eval()
    torch.testing.assert_close(split.encode_keys(images(8, 0)), plain.encode_keys(images(8, 0)))


def test_backbones_are_torchvisions() -> None:
    from torchvision import models

    torch.manual_seed(0)
    ours = resnet.resnet18().state_dict()
    torch.manual_seed(0)
    theirs = models.resnet18().state_dict()
    assert list(ours) == [key for key in theirs if not key.startswith("fc.")]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for make, dim in ((resnet.resnet18, 512), (resnet.resnet50, 2048)):
        assert make().dim == dim
        narrow = make(stem="small", width=16)
        assert narrow(torch.zeros(2, 3, 32, 32)).shape == (2, narrow.dim) == (2, dim // 4)


@pytest.mark.parametrize("patch_size", [16, 8])
def test_vit_of_moco_v3(patch_size: int) -> None:
    """facebookresearch/moco-v3, vits.py: positions, initialisation, what is frozen."""
    torch.manual_seed(0)
    network = vit.vit_tiny(32, patch_size, positions="sincos", frozen_patches=True, init="moco_v3")
    side, quarter, positions = 32 // patch_size, 192 // 4, network.encoder.pos_embedding[0]
    assert positions[0].eq(0).all()
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                wave = 10000 ** (i / quarter)
                expected = [
                    wavy(place / wave) for place in (row, column) for wavy in (math.sin, math.cos)
                ]
                assert positions[1 + row * side + column, i::quarter].tolist() == pytest.approx(
                    expected, abs=1e-6
                )
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"}
    block = network.encoder.layers[0]
    bounds = {
        block.self_attention.in_proj_weight: 6 / (192 + 192),  # query, key and value each
        block.self_attention.out_proj.weight: 6 / (192 + 192),
        block.mlp[0].weight: 6 / (192 + 768),
        network.conv_proj.weight: 6 / (3 * patch_size**2 + 192),
    }
    for weight, square in bounds.items():
        assert 0.98 * square**0.5 < weight.abs().max() <= square**0.5
        assert weight.std().item() == pytest.approx((square / 3) ** 0.5, rel=0.02)
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith("bias"))
    assert network(torch.rand(2, 3, 48, 48)).shape == (2, 192)  # of another size, too
    # as an evaluation has it
    assert vit.vit_tiny(32, patch_size).load_state_dict(network.state_dict())


def test_heads_of_moco_v3_with_a_vit() -> None:
    """facebookresearch/moco-v3, moco/builder.py 36-52, 112-122: no biases, the last batch norm
    without weights.
    """
    backbone = nn.Flatten()
    backbone.dim = 12
    method = MoCoV3(backbone, dim=8, hidden_dim=16, projector_layers=3, predictor_norm=True)
    names = [f"projector.{i}" for i in (0, 1, 1, 3, 4, 4, 6)] + [
        f"predictor.{i}" for i in (0, 1, 1, 3)
    ]
    shapes = [
        (16, 12),
        (16,),
        (16,),
        (16, 16),
        (16,),
        (16,),
        (8, 16),
        (16, 8),
        (16,),
        (16,),
        (8, 16),
    ]
    trained = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    assert [(name.rpartition(".")[0], tuple(p.shape)) for name, p in trained] == list(
        zip(names, shapes, strict=True)
    )
    assert type(method.projector[-1]) is type(method.predictor[-1]) is nn.BatchNorm1d
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 3
    assert [type(layer) for layer in method.projector] == kinds[:-1]


def test_moco_v3_says_where_it_is_the_recipe_for_resnets(caplog: pytest.LogCaptureFixture) -> None:
    MoCoV3(resnet.resnet18(width=8), 8, 8)
    MoCoV3(vit.vit_tiny(16), 8, 8, projector_layers=3)
    assert not caplog.records
    network = pytest.importorskip("timm").create_model("test_vit", num_classes=0)
    network.dim = network.num_features
    MoCoV3(network, 8, 8)
    assert "for ViTs they have method=moco_v3_vit" in caplog.text


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_blocks_that_start_as_the_identity(name: str) -> None:
    for zero in (True, False):
        network = getattr(resnet, name)(width=8, zero_init_residual=zero)
        last = [(block.bn3 if name == "resnet50" else block.bn2).weight for block in network.layer2]
        assert all((weight == (0 if zero else 1)).all() for weight in last)


def test_a_batch_norm_that_does_more_is_refused() -> None:
    """timm's with the activation in it: as a plain one it would lose that, and not split it would
    leak.
    """
    network = pytest.importorskip("timm").create_model("efficientnet_b0", num_classes=0)
    for device in ("cpu", "cuda"):
        with pytest.raises(UserError, match="BatchNormAct2d: type sync_batch_norm=false"):
            sync_batch_norm_(network, torch.device(device), compiled=False)
    with pytest.raises(UserError, match=r"BatchNormAct2d: type method\.bn_splits=1"):
        split_batch_norm_(network, 2)


@pytest.mark.parametrize(("device", "compiled"), [("cpu", False), ("cuda", False), ("cuda", True)])
def test_batch_norm_over_ranks_leaves_split_ones(device: str, compiled: bool) -> None:
    network = resnet.resnet18(width=8)
    split_batch_norm_(network.layer1, 2)
    before = network.state_dict()
    sync_batch_norm_(network, torch.device(device), compiled)
    assert type(network.layer1[0].bn1) is SplitBatchNorm
    assert type(network.bn1) is (
        nn.SyncBatchNorm if device == "cuda" and not compiled else SyncBatchNorm
    )
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


def test_probe_leaves_the_backbone_alone() -> None:
    probe = LinearProbe(resnet.resnet18(stem="small", width=8), 10).train()
    before = {key: value.clone() for key, value in probe.backbone.state_dict().items()}
    probe([images(6, 0)], torch.arange(6))["loss"].backward()
    torch.optim.SGD([p for p in probe.parameters() if p.requires_grad], lr=1.0).step()
    assert all(
        torch.equal(before[key], value) for key, value in probe.backbone.state_dict().items()
    )
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == [
        "fc.weight",
        "fc.bias",
    ]
    assert 0.008 < LinearProbe(pixels.Pixels(32), 100).fc.weight.std() < 0.012


@given(
    epochs=st.integers(1, 300),
    warmup=st.floats(0, 20),
    at=st.floats(0, 1, exclude_max=True),
    coarse=st.booleans(),
)
def test_schedules_stay_in_range(epochs: int, warmup: float, at: float, coarse: bool) -> None:
    for schedule in (Cosine(warmup, coarse), Step(warmup, coarse), Constant(warmup, coarse)):
        assert 0 <= schedule(at * epochs, epochs) <= 1


@pytest.mark.parametrize(
    ("schedule", "epoch", "factor"),
    [
        (Cosine(), 50, 0.5),
        (Cosine(per_epoch=True), 50.9, 0.5),
        (Cosine(warmup_epochs=10), 5, 0.5),
        (Cosine(warmup_epochs=10), 10, 1.0),
        (Cosine(warmup_epochs=10), 55, 0.5),
        (Cosine(final=0.2), 100, 0.2),
        (Step(), 59.99, 1.0),
        (Step(), 60, 0.1),
        (Step(gamma=0.5, milestones=(0.1, 0.2, 0.3)), 99, 0.125),
        (Constant(warmup_epochs=4), 1, 0.25),
    ],
)
def test_schedule_values(schedule: Schedule, epoch: float, factor: float) -> None:
    assert math.isclose(schedule(epoch, 100), factor, abs_tol=1e-12)
