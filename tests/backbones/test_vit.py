"""Our ViT: torchvision's network by its own names, and what later papers added."""

import pytest
import torch
from torch import Tensor
from torchvision.models import VisionTransformer

from ssl_bench.backbones.vit import Block, ViT, sincos, taken
from ssl_bench.errors import UserError
from ssl_bench.runs import names


def small(**options: object) -> ViT:
    torch.manual_seed(0)
    return ViT(16, 4, 24, 3, depth=2, **options).double().eval()


def images(size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, size, size, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_it_is_torchvisions() -> None:
    ours = small()
    theirs = VisionTransformer(16, 4, 2, 3, 24, 96).double().eval()
    theirs.heads = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-12, atol=1e-12)


def test_added_parts_have_timms_names() -> None:
    """So that its weights are read, and ours exported."""
    found = names.vocabulary(small(register_tokens=4, layer_scale=1e-5).state_dict())
    assert {"cls_token", "pos_embed", "reg_token", "blocks.0.ls1.gamma", "blocks.1.ls2.gamma"} <= {
        *found
    }
    timm = pytest.importorskip("timm")
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    network = timm.models.vision_transformer.VisionTransformer(
        **options, num_classes=0, reg_tokens=4, no_embed_class=False, init_values=1e-5
    )
    assert set(network.state_dict()) == set(found)


@torch.no_grad()
def test_tokens_of_some_patches_are_those_of_an_image_without_the_others() -> None:
    """A patch that isn't kept has no influence; the order of those kept is only an order."""
    network, batch = small(register_tokens=2), images()
    keep = torch.tensor([[3, 9, 4], [15, 0, 7]])
    tokens = network.tokens(batch, keep)
    assert tokens.shape == (2, 3 + 3, 24)
    torch.testing.assert_close(
        network.tokens(batch, keep.flip(1))[:, [0, 1, 2, 5, 4, 3]], tokens, rtol=1e-9, atol=1e-9
    )
    gone = torch.ones(2, 16, dtype=torch.bool).scatter(1, keep, False)
    other = batch.clone()
    patches = other.unfold(2, 4, 4).unfold(3, 4, 4)  # (N, 3, rows, columns, 4, 4), a view
    patches.permute(0, 2, 3, 1, 4, 5)[gone.view(2, 4, 4)] = 7.0
    torch.testing.assert_close(network.tokens(other, keep), tokens, rtol=0, atol=0)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(network.tokens(batch, everything), network.tokens(batch))


@torch.no_grad()
def test_masked_patches_are_seen_by_their_positions_alone() -> None:
    network, batch = small(), images()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 5:9] = True
    other = batch.clone()
    other[:, :, 4:8, 4:] = other[:, :, 8:12, :4] = 3.0  # patches 5, 6, 7 and 8
    token = torch.randn(24, dtype=torch.float64)
    found = [network.tokens(x, mask=mask, mask_token=token) for x in (batch, other)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert not torch.allclose(found[0], network.tokens(batch))
    assert not torch.allclose(found[0][:, 6], found[0][:, 7])


@torch.no_grad()
def test_without_a_class_token_features_are_the_mean_of_the_patches() -> None:
    network = small(class_token=False, register_tokens=1)
    assert "class_token" not in network.state_dict()
    assert network.encoder.pos_embedding.shape == (1, 16, 24)
    for size in (16, 24):  # positions are interpolated
        tokens = network.tokens(images(size))
        assert tokens.shape == (2, 1 + (size // 4) ** 2, 24)
        torch.testing.assert_close(network(images(size)), tokens[:, 1:].mean(1))


def test_drop_path_leaves_parts_out_in_training_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    network = ViT(16, 4, 24, 3, depth=3, drop_path=0.4)
    assert [block.drop_path for block in network.encoder.layers] == pytest.approx([0, 0.2, 0.4])
    block, x = Block(24, 3, drop_path=0.4), torch.randn(2000, 1, 24)
    changed = block.train()(x) - x
    kept = (changed.abs().sum((1, 2)) > 0).float().mean().item()
    assert kept == pytest.approx(1 - 0.4**2, abs=0.03)  # either part, independently
    assert torch.equal(block.eval()(x), block(x))


def test_layer_scale_begins_near_the_identity() -> None:
    block, x = Block(24, 3, layer_scale=1e-5), torch.randn(2, 4, 24)
    torch.testing.assert_close(block(x), x, rtol=0, atol=1e-3)
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize("init", ["torchvision", "moco_v3", "mae", "dino", "ijepa"])
def test_initial_weights(init: str) -> None:
    """A standard deviation of 0.02, or Xavier's of the layer."""
    torch.manual_seed(0)
    network = ViT(32, 8, 96, 3, depth=2, init=init)
    block = network.encoder.layers[1]
    qkv, out, first, last = (
        block.self_attention.in_proj_weight,
        block.self_attention.out_proj.weight,
        block.mlp[0].weight,
        block.mlp[3].weight,
    )
    xavier = {"qkv": (2 / (4 * 96)) ** 0.5, "out": (1 / 96) ** 0.5, "mlp": (2 / (5 * 96)) ** 0.5}
    expected = {
        "torchvision": [xavier["qkv"], (1 / (3 * 96)) ** 0.5, xavier["mlp"], xavier["mlp"]],
        "moco_v3": [xavier["out"], xavier["out"], xavier["mlp"], xavier["mlp"]],
        "mae": [xavier["qkv"], xavier["out"], xavier["mlp"], xavier["mlp"]],
        "dino": [0.02] * 4,
        "ijepa": [0.02, 0.01, 0.02, 0.01],  # divided by sqrt(2 * 2)
    }[init]
    for weight, std in zip((qkv, out, first, last), expected, strict=True):
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_positions() -> None:
    """The row changes the first half, the column the second, or the other way round."""
    for columns_first in (False, True):
        table = sincos(4, 16, columns_first).view(4, 4, 16)
        by_row, by_column = (
            (table[1, 0] != table[0, 0]).nonzero().flatten(),
            (table[0, 1] != table[0, 0]).nonzero().flatten(),
        )
        low, high = list(range(8)), list(range(8, 16))
        assert by_row.tolist() == (high if columns_first else low)
        assert by_column.tolist() == (low if columns_first else high)
    fixed = small(positions="sincos_columns", class_token=False)
    assert not fixed.encoder.pos_embedding.requires_grad
    torch.testing.assert_close(fixed.encoder.pos_embedding[0], sincos(4, 24, True))


def test_what_does_not_divide_is_told() -> None:
    with pytest.raises(UserError, match=r"backbone\.patch_size=5 does not divide"):
        ViT(16, 5, 24, 3)
    with pytest.raises(UserError, match=r"backbone\.num_heads=5 does not divide the width, 24"):
        ViT(16, 4, 24, 5)
    assert small().refuses(18) == "is no multiple of backbone.patch_size=4"
    indices = torch.tensor([[2, 0]])
    assert taken(torch.arange(6.0).view(1, 3, 2), indices).tolist() == [[[4, 5], [0, 1]]]
