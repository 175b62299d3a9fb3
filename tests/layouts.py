"""Files of weights as other programs write them, tiny: the names are those of their code."""

import argparse
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ssl_bench.backbones import resnet, vit

State = dict[str, Tensor]
DIM = 24  # of `small_vit`


def fill(name: str, like: Tensor) -> Tensor:
    """Numbers that follow from a name: the same wherever a file of these names is made."""
    if not like.is_floating_point():
        return torch.full_like(like, 3)
    draw = np.random.RandomState(zlib.crc32(name.encode()))
    value = torch.from_numpy(draw.standard_normal(tuple(like.shape)).astype("float32"))
    if name.endswith("running_var"):
        return 1 + value.abs()
    return (1 + value / 4) if name.endswith("weight") and like.ndim == 1 else value / 4


def filled(network: nn.Module, salt: str = "") -> nn.Module:
    """A network whose every tensor is its own; with another salt, another one."""
    state = network.state_dict()
    network.load_state_dict({key: fill(salt + key, value) for key, value in state.items()})
    return network.eval()


def small_resnet() -> nn.Module:
    return resnet.resnet18(stem="small", width=8)


def small_vit(image_size: int = 32) -> nn.Module:
    """As narrow as no ViT is: most of a file of vit_tiny would be read for nothing."""
    return vit.ViT(image_size, 16, DIM, 3)


def below(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def head(prefix: str, dim: int = 64) -> State:
    return {f"{prefix}.weight": torch.ones(8, dim), f"{prefix}.bias": torch.ones(8)}


def mlp(prefix: str) -> State:
    """A projection: two linear layers and a batch norm."""
    norm = below(f"{prefix}.1.", nn.BatchNorm1d(8).state_dict())
    return head(f"{prefix}.0") | norm | head(f"{prefix}.3", 8)


def timm_names(state: State) -> State:
    """Our ViT's tensors by timm's names, which DINO's, DINOv2's and MoCo v3's authors use."""
    found = {}
    for key, value in state.items():
        for ours, theirs in (
            ("class_token", "cls_token"),
            ("encoder.pos_embedding", "pos_embed"),
            ("conv_proj.", "patch_embed.proj."),
            ("encoder.layers.encoder_layer_", "blocks."),
            (".ln_", ".norm"),
            (".self_attention.in_proj_", ".attn.qkv."),
            (".self_attention.out_proj.", ".attn.proj."),
            (".mlp.0.", ".mlp.fc1."),
            (".mlp.3.", ".mlp.fc2."),
            ("encoder.ln.", "norm."),
        ):
            key = key.replace(ours, theirs)
        found[key] = value
    return found


def mmpretrain_names(state: State) -> State:
    found = {}
    for key, value in timm_names(state).items():
        key = key.replace("patch_embed.proj.", "patch_embed.projection.")
        key = re.sub(r"^norm\.", "ln1.", key)
        key = re.sub(r"^blocks\.(\d+)\.norm", r"layers.\1.ln", key).replace("blocks.", "layers.")
        key = key.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        found[key] = value
    return found


def numbered(state: State, numbers: dict[str, int]) -> State:
    """nn.Sequential(*network.children()): numbers in place of the children's names."""
    parts = ((key.partition("."), value) for key, value in state.items())
    return {f"{numbers[child]}.{rest}": value for (child, _, rest), value in parts}


LIGHTLY = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
SIMCLR = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6}  # no pooling


def without_counters(state: State) -> State:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


class Layout(NamedTuple):
    """A kind of file."""

    backbone: Callable[[], nn.Module]  # ours, to be filled
    content: Callable[[State, State], Any]  # of the state of the network meant, and of another
    prefix: str  # where in the file the network meant is
    chosen: str = ""  # which of its networks that is, where there are several


def both(first: str, second: str, beside: Callable[[str], State] = lambda _: {}) -> Callable:
    """A state dict of two networks, the one that is meant first."""

    def content(state: State, other: State) -> State:
        one, two = below(first, state), below(second, other)
        return one | beside(first) | two | beside(second)

    return content


def in_state_dict(made: Callable[[State, State], State]) -> Callable:
    return lambda state, other: {"epoch": 3, "state_dict": made(state, other), "optimizer": {}}


def resnet_layout(content: Callable, prefix: str, chosen: str = "") -> Layout:
    return Layout(small_resnet, content, prefix, chosen)


def vit_layout(content: Callable, prefix: str, chosen: str = "") -> Layout:
    def renamed(state: State, other: State) -> Any:
        return content(timm_names(state), timm_names(other))

    return Layout(small_vit, renamed, prefix, chosen)


LAYOUTS = {
    "MoCo v1": resnet_layout(
        in_state_dict(
            both("module.encoder_q.", "module.encoder_k.", lambda prefix: head(f"{prefix}fc"))
        ),
        "state_dict.module.encoder_q",
        "query",
    ),
    "MoCo v2": resnet_layout(
        in_state_dict(
            lambda state, other: (
                both(
                    "module.encoder_q.",
                    "module.encoder_k.",
                    lambda prefix: head(f"{prefix}fc.0") | head(f"{prefix}fc.2", 8),
                )(state, other)
                | {"module.queue": torch.ones(8, 16), "module.queue_ptr": torch.zeros(1)}
            )
        ),
        "state_dict.module.encoder_q",
        "query",
    ),
    "MoCo v3, ResNet": resnet_layout(
        in_state_dict(
            lambda state, other: (
                both(
                    "module.base_encoder.",
                    "module.momentum_encoder.",
                    lambda prefix: mlp(f"{prefix}fc"),
                )(state, other)
                | mlp("module.predictor")
            )
        ),
        "state_dict.module.base_encoder",
        "base encoder",
    ),
    "MoCo v3, ViT": vit_layout(
        in_state_dict(
            lambda state, other: (
                both(
                    "module.base_encoder.",
                    "module.momentum_encoder.",
                    lambda prefix: mlp(f"{prefix}head"),
                )(state, other)
                | mlp("module.predictor")
            )
        ),
        "state_dict.module.base_encoder",
        "base encoder",
    ),
    "DINO, full checkpoint": vit_layout(
        lambda state, other: {
            "student": below("module.backbone.", other) | mlp("module.head.mlp"),
            "teacher": below("backbone.", state) | mlp("head.mlp"),
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_small", lr=0.1),
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
        "teacher.backbone",
        "teacher",
    ),
    "DINO, backbone only": vit_layout(lambda state, _: state, ""),
    "iBOT": vit_layout(
        lambda state, other: {
            "student": below("module.backbone.", other)
            | {"module.backbone.masked_embed": torch.zeros(1, DIM)},
            "teacher": below("backbone.", state),
            "args": argparse.Namespace(),
        },
        "teacher.backbone",
        "teacher",
    ),
    "DINOv2, training": vit_layout(
        lambda state, _: {
            "teacher": below(
                "backbone.",
                {
                    re.sub(
                        r"^blocks\.(\d+)", lambda i: f"blocks.{int(i[1]) // 3}.{i[1]}", key
                    ): value
                    for key, value in state.items()
                }
                | {"mask_token": torch.zeros(1, DIM)},
            )
            | mlp("dino_head.mlp")
        },
        "teacher.backbone",
    ),
    "DINOv2, backbone only": vit_layout(
        lambda state, _: state | {"mask_token": torch.zeros(1, DIM)}, ""
    ),
    "SwAV": resnet_layout(
        lambda state, _: (
            below("module.", without_counters(state))
            | mlp("module.projection_head")
            | {"module.prototypes.weight": torch.ones(5, 8)}
        ),
        "module",
    ),
    "SimSiam": resnet_layout(
        in_state_dict(
            lambda state, _: (
                below("module.encoder.", state) | mlp("module.encoder.fc") | mlp("module.predictor")
            )
        ),
        "state_dict.module.encoder",
    ),
    "Barlow Twins, full checkpoint": resnet_layout(
        lambda state, _: {
            "epoch": 3,
            "model": below("module.backbone.", state) | mlp("module.projector"),
            "optimizer": {"state": {0: {"mu": torch.ones(2)}}},
        },
        "model.module.backbone",
    ),
    "Barlow Twins, VICReg: resnet50.pth": resnet_layout(lambda state, _: state, ""),
    "VICReg, full checkpoint": resnet_layout(
        lambda state, _: {
            "model": below("module.backbone.", state) | mlp("module.projector"),
            "optimizer": {},
        },
        "model.module.backbone",
    ),
    "byol-pytorch (lucidrains)": resnet_layout(
        lambda state, other: (
            below("net.", state)
            | below("online_encoder.net.", state)
            | mlp("online_encoder.projector")
            | below("target_encoder.net.", other)
        ),
        "net",
        "online network",
    ),
    "I-JEPA": vit_layout(
        lambda state, other: {
            "encoder": below("module.", other),
            "target_encoder": below("module.", state),
            "predictor": below("module.predictor_blocks.0.", mlp("mlp")),
            "opt": {"state": {}},
            "scaler": None,
            "epoch": 3,
        },
        "target_encoder.module",
        "target encoder",
    ),
    "MSN": vit_layout(
        lambda state, other: {
            "encoder": below("module.", other | mlp("fc")),
            "target_encoder": below("module.", state | mlp("fc")),
            "prototypes": torch.ones(8, 8),
            "opt": {},
        },
        "target_encoder.module",
        "target encoder",
    ),
    "MAE, full checkpoint": vit_layout(
        lambda state, _: {
            "model": state
            | {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
            | head("decoder_embed", DIM)
            | head("decoder_blocks.0.mlp.fc1", 8)
            | head("decoder_norm", 8)
            | head("decoder_pred", 8),
            "optimizer": {},
            "args": argparse.Namespace(),
        },
        "model",
    ),
    "SimMIM, full checkpoint": vit_layout(
        lambda state, _: {
            "model": below("encoder.", state)
            | {"encoder.mask_token": torch.zeros(1, 1, DIM)}
            | head("decoder.0", DIM)
        },
        "model.encoder",
    ),
    "VISSL": resnet_layout(
        lambda state, _: {
            "classy_state_dict": {
                "base_model": {
                    "model": {"trunk": below("_feature_blocks.", state), "heads": mlp("0.clf")},
                    "meta": {},
                }
            }
        },
        "classy_state_dict.base_model.model.trunk._feature_blocks",
    ),
    "mmselfsup, mmpretrain: MoCo, ResNet": resnet_layout(
        lambda state, other: {
            "meta": {"epoch": 3},
            "state_dict": below("backbone.", state)
            | mlp("neck.mlp")
            | below("encoder_k.module.0.", other)
            | {"queue": torch.ones(8, 4), "queue_ptr": torch.zeros(1)},
        },
        "state_dict.backbone",
        "trained network",
    ),
    "mmpretrain, ViT": Layout(
        small_vit,
        lambda state, other: {
            "state_dict": below("backbone.", mmpretrain_names(state))
            | below("momentum_encoder.module.0.", mmpretrain_names(other))
        },
        "state_dict.backbone",
        "trained network",
    ),
    "solo-learn": resnet_layout(
        lambda state, other: {
            "pytorch-lightning_version": "2.1",
            "state_dict": both("backbone.", "momentum_backbone.")(state, other)
            | mlp("projector")
            | head("classifier"),
            "hyper_parameters": {"args": argparse.Namespace(), "lr": np.float64(0.3)},
        },
        "state_dict.backbone",
        "trained network",
    ),
    "lightly: numbered nn.Sequential": resnet_layout(
        in_state_dict(
            lambda state, other: (
                below("backbone.", numbered(state, LIGHTLY))
                | mlp("projection_head.layers")
                | below("backbone_momentum.", numbered(other, LIGHTLY))
            )
        ),
        "state_dict.backbone",
        "trained network",
    ),
    "SimCLR ports: f.0, f.1, f.3": resnet_layout(
        lambda state, _: below("f.", numbered(state, SIMCLR)) | mlp("g"), "f"
    ),
    "pytorch-cifar (kuangliu)": resnet_layout(
        lambda state, _: {
            "net": {
                "module." + key.replace("downsample", "shortcut"): value
                for key, value in state.items()
            }
            | head("module.linear"),
            "acc": 93.0,
        },
        "net.module",
    ),
    "timm, ViT": vit_layout(lambda state, _: state | head("head", DIM), ""),
    "timm, ResNet, with its moving average": resnet_layout(
        lambda state, other: {
            "arch": "resnet18",
            "state_dict": other | head("fc"),
            "state_dict_ema": state | head("fc"),
            "args": argparse.Namespace(),
        },
        "state_dict_ema",
        "moving average",
    ),
    "torchvision, ResNet": resnet_layout(lambda state, _: state | head("fc"), ""),
    "torchvision, ViT": Layout(small_vit, lambda state, _: state | head("heads.head", DIM), ""),
    "torch.compile": resnet_layout(
        lambda state, _: {"model": below("_orig_mod.", state) | head("_orig_mod.fc")}, "model"
    ),
    "DDP": resnet_layout(lambda state, _: below("module.", state) | head("module.fc"), "module"),
    "a plain dictionary: model_state_dict": resnet_layout(
        lambda state, _: {"model_state_dict": state, "epoch": 3, "loss": 0.5}, "model_state_dict"
    ),
    "a mean teacher": resnet_layout(
        lambda state, other: {"student": other, "teacher": state}, "teacher", "teacher"
    ),
}
BY_ANOTHER_TEST = "Hugging Face: ResNet, ViT, DINOv2"


def table() -> str:
    """The table of these in docs/how-to/load.md."""
    head = "| file of | names of the backbone's tensors | network taken, if it holds several |"
    head = "| file of | names of the backbone's tensors | network taken, if it holds several |"
    rows = [head, "|---|---|---|"]
    for name, layout in LAYOUTS.items():
        place = f"`{layout.prefix}.*`" if layout.prefix else ""
        rows.append(f"| {name} | {place} | {layout.chosen} |")
    return "\n".join([*rows, f"| {BY_ANOTHER_TEST} | `vit.*`, `resnet.*` or none | |"]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
