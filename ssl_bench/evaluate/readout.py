"""Which of a transformer's tokens are its features.

A network that can be asked has `last_tokens(images, num_blocks)`, `num_prefix` and
`has_class_token`, as `vit.ViT` describes them.
"""

from types import MethodType

import torch
from torch import Tensor, nn

from ssl_bench.errors import UserError


def read_out_(backbone: nn.Module, features_of: str | None) -> None:
    """Have `forward` of the backbone give other features, in place, and set `dim` to their width.

    None: those that it gives by itself. Of the last block's normalised tokens, "cls" is the class
    token and "mean" the mean of the patches, both (N, dim). "last_4" joins the class tokens of the
    last 4 blocks, each normalised as the last is, and the mean of the last one's patches, (N, 5 *
    dim): DINOv2's protocol (dinov2/eval/linear.py, create_linear_input). Without a class token it
    joins the means of the patches of the last 4 blocks, (N, 4 * dim): I-JEPA's (arXiv:2301.08243,
    appendix A). "attentive" gives the patches themselves, (N, L, dim), for a `probe.AttentivePool`.
    UserError for a network that has no such tokens.
    """
    if features_of is None:
        return
    if not hasattr(backbone, "last_tokens"):
        raise UserError(
            f"stage.features_of={features_of} is for a vision transformer, and this backbone has "
            "no tokens: leave it out"
        )
    kind, _, number = features_of.partition("_")
    num_blocks = int(number or 1)
    if kind == "cls" and not backbone.has_class_token:
        raise UserError(
            "stage.features_of=cls: this backbone has no class token: type stage.features_of=mean"
        )
    if num_blocks > backbone.num_blocks:
        raise UserError(
            f"stage.features_of={features_of}: the backbone has {backbone.num_blocks} blocks: "
            f"choose at most stage.features_of=last_{backbone.num_blocks}"
        )

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        blocks = self.last_tokens(images, num_blocks)
        patches = [tokens[:, self.num_prefix :] for tokens in blocks]
        if kind == "attentive":
            return patches[-1]
        means = [tokens.mean(dim=1) for tokens in patches]
        if kind == "mean":
            return means[-1]
        if not self.has_class_token:
            return torch.cat(means, dim=1)
        joined = [tokens[:, 0] for tokens in blocks] + means[-1:] * (kind == "last")
        return torch.cat(joined, dim=1)

    if kind == "last":
        backbone.dim *= num_blocks + backbone.has_class_token
    backbone.forward = MethodType(forward, backbone)
