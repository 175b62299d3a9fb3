"""Any architecture of the timm package."""

import difflib
import logging
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ssl_bench.errors import UserError

log = logging.getLogger(__name__)

IDLE = {"backbone.pretrained=True": ("pretrained", "pretrained_prefix")}  # see `typed`


def timm(
    model: str, options: dict[str, Any] | None = None, pretrained: bool | None = None
) -> nn.Module:
    """Any model of the timm package by its name, as initialised there.

    options: arguments of its constructor. pretrained: with timm's weights of this model, which timm
    downloads from its hub or finds where it keeps them; the name of the model may say which, as in
    vit_small_patch16_224.dino. UserError: timm isn't installed, or has no such model or weights.
    """
    try:
        from timm import create_model, list_models, list_pretrained
    except ImportError:
        raise UserError(
            "backbone=timm needs the timm package: pip install 'ssl_bench[timm]'"
        ) from None
    known = list_models()
    if pretrained:
        known += list_pretrained()
    if model not in known:
        close = difflib.get_close_matches(model, known, n=3)
        raise UserError(
            f"backbone.model={model}: timm has no such model; did you mean "
            f"{', '.join(close) or 'another'}?"
        )
    options = options or {}
    if "num_classes" in options:
        raise UserError(
            f"backbone.options has num_classes={options['num_classes']}: leave it out; "
            "a backbone has none"
        )

    @cache  # several sizes are asked about
    def plan(**changed: Any) -> nn.Module:
        """The network without weights: quick to make; its forward pass computes only shapes."""
        with torch.device("meta"):
            return create_model(model, **{"num_classes": 0} | options | changed).eval()

    def why_not(size: int, **changed: Any) -> str | None:
        try:
            with torch.no_grad():
                plan(**changed)(torch.empty(1, 3, size, size, device="meta"))
        except Exception as error:  # of any type: each family refuses in its own way
            return (str(error).strip() or f"{type(error).__name__}").splitlines()[0].rstrip(".")
        return None

    def refuses(size: int) -> str | None:
        reason = why_not(size)
        return None if reason is None else f"fails in {model} ({reason})"

    def instead(key: str, size: int) -> str:
        helpful = [option for option in ANY_SIZE if why_not(size, **option) is None]
        words = [f"add backbone.options={{{_typed(options | one)}}}" for one in helpful[:1]]
        own = network.pretrained_cfg["input_size"][-1]
        if key == "augmentation.image_size" and why_not(own) is None:
            words.append(f"type {key}={own}")
        return ", or ".join(words)

    def classifier_keys() -> tuple[str, ...]:
        whole, ours = plan(num_classes=1000).state_dict(), network.state_dict()
        return tuple(key for key in whole if key not in ours)

    if pretrained:
        _check_weights(model)
    try:
        network = (
            _fetched(model, options)
            if pretrained
            else create_model(model, num_classes=0, **options)
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if not options:
            raise
        raise UserError(
            f"backbone.options={{{_typed(options)}}}: not for timm's {model} "
            f"({str(error).partition(chr(10))[0]})"
        ) from None
    # not num_features, the width before the layers that some heads begin with
    network.dim = network.head_hidden_size
    network.refuses, network.instead = refuses, instead
    network.classifier_keys = classifier_keys
    if hasattr(network, "get_intermediate_layers") and hasattr(network, "num_prefix_tokens"):
        network.last_tokens = MethodType(_last_tokens, network)
        network.num_prefix, network.num_blocks = network.num_prefix_tokens, len(network.blocks)
        network.has_class_token = getattr(network, "cls_token", None) is not None
    return network


def _last_tokens(network: nn.Module, images: Tensor, num_blocks: int) -> list[Tensor]:
    """As `vit.ViT.last_tokens`."""
    layers = network.get_intermediate_layers(
        images, num_blocks, return_prefix_tokens=True, norm=True
    )
    return [torch.cat([prefix, patches], dim=1) for patches, prefix in layers]


def _check_weights(model: str) -> None:
    from timm import list_pretrained

    tagged = list_pretrained(model if "." in model else f"{model}.*")
    if not tagged:
        raise UserError(
            f"backbone.pretrained=true: timm has no weights of {model}; leave it out, or choose "
            "another backbone.model="
        )


def _fetched(model: str, options: dict[str, Any]) -> nn.Module:
    """The model with timm's weights. UserError where they can't be fetched."""
    from timm import create_model

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt
    try:
        network = create_model(model, pretrained=True, num_classes=0, **options)
    except OSError as error:  # those of huggingface_hub are, too
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise UserError(
            f"backbone.pretrained=true: timm's weights of {model} can't be fetched "
            f"({reason}); fetch them where there is a network "
            "(HF_HOME says where they are kept), or type pretrained=FILE"
        ) from None
    chosen = network.pretrained_cfg
    log.info(
        "timm's weights %s.%s: trained with mean %s, std %s",
        *(chosen["architecture"], chosen["tag"], chosen["mean"], chosen["std"]),
    )
    return network


# options of timm's constructors with which a network takes images of any size
ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False})


def _typed(options: dict[str, Any]) -> str:
    """Options as one types them between braces."""
    words = {k: str(v).lower() if isinstance(v, bool) else v for k, v in options.items()}
    return ",".join(f"{key}:{word}" for key, word in words.items())
