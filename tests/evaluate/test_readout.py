"""Which tokens are a transformer's features, each choice by hand from the tokens of its blocks."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_bench.backbones.resnet import resnet18
from ssl_bench.backbones.vit import ViT
from ssl_bench.errors import UserError
from ssl_bench.evaluate.readout import read_out_
from ssl_bench.methods.probe import AttentivePool, LinearProbe, restored

CHOICES = [None, "cls", "mean", "last_1", "last_3", "attentive"]


def vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return ViT(16, 4, 24, 3, depth=3, **options).double().eval()


def timms() -> nn.Module:
    pytest.importorskip("timm")
    from ssl_bench.backbones.timm import timm

    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
    return timm("vit_tiny_patch16_224", options | {"reg_tokens": 2}).double().eval()


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)


def outputs_of_blocks(network: nn.Module, shown: Tensor) -> list[Tensor]:
    """What each block gave, as hooks see it, after the network's last norm."""
    ours = isinstance(network, ViT)
    blocks = network.encoder.layers if ours else network.blocks
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: seen.append(args[2])) for block in blocks]
    network(shown)
    for hook in hooks:
        hook.remove()
    return [(network.encoder.ln if ours else network.norm)(tokens) for tokens in seen]


def by_hand(blocks: list[Tensor], prefix: int, has_class: bool, choice: str | None) -> Tensor:
    last = blocks[-1]
    mean = last[:, prefix:].mean(1)
    if choice == "attentive":
        return last[:, prefix:]
    if choice == "mean" or (choice is None and not has_class):
        return mean
    if choice in (None, "cls"):
        return last[:, 0]
    number = int(choice[5:])
    if not has_class:
        return torch.cat([tokens[:, prefix:].mean(1) for tokens in blocks[-number:]], dim=1)
    return torch.cat([*(tokens[:, 0] for tokens in blocks[-number:]), mean], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("make", "prefix", "has_class"),
    [(vit, 1, True), (lambda: vit(class_token=False, register_tokens=2), 2, False),
     (timms, 3, True)],
    ids=["ours", "without a class token", "timm"],
)  # fmt: skip
def test_features_are_those_of_the_tokens(
    make: object, prefix: int, has_class: bool, choice: str | None
) -> None:
    network = make()
    if choice == "cls" and not has_class:
        with pytest.raises(UserError, match=r"no class token: type stage\.features_of=mean"):
            read_out_(network, choice)
        return
    expected = by_hand(outputs_of_blocks(network, images()), prefix, has_class, choice)
    state = copy.deepcopy(network.state_dict())
    read_out_(network, choice)
    found = network(images())
    assert found.shape == expected.shape
    assert network.dim == expected.shape[-1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert network.state_dict().keys() == state.keys()
    torch.testing.assert_close(copy.deepcopy(network)(images()), expected)  # of its own weights


def test_a_network_without_such_tokens_is_told() -> None:
    with pytest.raises(UserError, match=r"features_of=mean is for a vision transformer"):
        read_out_(resnet18(width=8), "mean")
    with pytest.raises(UserError, match=r"has 3 blocks: choose at most stage\.features_of=last_3"):
        read_out_(vit(), "last_4")


def test_a_learnt_query_attends_to_patches_as_by_hand() -> None:
    """One block of cross-attention and MLP, in numpy."""
    torch.manual_seed(0)
    pool, patches = AttentivePool(128).double(), torch.randn(3, 5, 128, dtype=torch.float64)
    for parameter in pool.parameters():  # biases, too
        nn.init.normal_(parameter, std=0.2)
    w = {key: value.detach().numpy() for key, value in pool.state_dict().items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = norm(patches.numpy(), "norm")
    parts = zip(np.split(w["attention.in_proj_weight"], 3),
                np.split(w["attention.in_proj_bias"], 3), strict=True)  # fmt: skip
    (qw, qb), (kw, kb), (vw, vb) = parts
    query = w["query"][0, 0]
    q, k, v = query @ qw.T + qb, x @ kw.T + kb, x @ vw.T + vb
    heads = []
    for head in (slice(0, 64), slice(64, 128)):
        scores = np.exp(k[..., head] @ q[head] / 8)
        shares = scores / scores.sum(1, keepdims=True)
        heads.append((shares[..., None] * v[..., head]).sum(1))
    attended = np.concatenate(heads, 1) @ w["attention.out_proj.weight"].T
    y = query + attended + w["attention.out_proj.bias"]
    hidden = torch.from_numpy(norm(y, "norm_mlp") @ w["mlp.0.weight"].T + w["mlp.0.bias"])
    expected = y + nn.functional.gelu(hidden).numpy() @ w["mlp.2.weight"].T + w["mlp.2.bias"]
    np.testing.assert_allclose(pool(patches).detach().numpy(), expected, rtol=1e-9)


def test_an_attentive_probe_learns_and_is_restored() -> None:
    torch.manual_seed(0)
    backbone = vit().float()
    read_out_(backbone, "attentive")
    probe = LinearProbe(backbone, 4, attentive=True).train()
    loss = probe([images().float()], torch.tensor([0, 1]))["loss"]
    loss.backward()
    trained = [name for name, p in probe.named_parameters() if p.grad is not None and p.grad.any()]
    assert {"pool.query", "pool.attention.in_proj_weight", "fc.weight"} <= {*trained}
    assert not any(name.startswith("backbone.") for name in trained)
    again = restored(backbone, probe.state_dict())
    torch.testing.assert_close(
        again.logits(images().float()), probe.eval().logits(images().float())
    )
