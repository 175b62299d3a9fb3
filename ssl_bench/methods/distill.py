"""A frozen teacher's features, learnt by a network of another family."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Place
from ssl_bench.errors import UserError
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, digest, health_of
from ssl_bench.runtime import distributed


@layers.full_precision
def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Features (N, D) of both -> 1 - the mean cosine (AM-RADIO, arXiv:2312.06709, section 3.4)."""
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=1).mean()


@layers.full_precision
def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Features (N, D) and (N, E) -> the mean squared difference of their similarity matrices.

    Each is the matrix of products of the batch's images, every row of it normalised (Tung and Mori,
    arXiv:1907.09682, equations 2 to 4).
    """
    own, wanted = (F.normalize(x @ x.T, dim=1) for x in (student, teacher.detach()))
    return (wanted - own).square().mean()


class Distill(Method):
    """The student's features become the teacher's, of the same view, up to a projection.

    loss: "cosine", of an MLP's output with the teacher's features, or "gram", of similarities
    between images, which need no projection. hidden_dim: the MLP's. gram_weight: of that loss, the
    paper's gamma. teacher_network: gives features (N, D); it is in eval mode, has no gradient, and
    is in no checkpoint, which holds its digest instead: a state that was learnt from another
    teacher is refused. teacher, teacher_sha256: which it is (`stages._teacher`).
    """

    num_views = 1

    def __init__(
        self,
        backbone: nn.Module,
        teacher_network: nn.Module,
        teacher: Place,
        teacher_sha256: str | None = None,
        loss: Literal["cosine", "gram"] = "cosine",
        hidden_dim: PositiveInt = 2048,
        gram_weight: PositiveFloat = 3000.0,
    ) -> None:
        super().__init__(backbone)
        # in a list, so that it is no part of this module: neither of its parameters nor its state
        self._frozen = [teacher_network.requires_grad_(False).eval()]
        known = digest(teacher_network, size=32)
        self.register_buffer("teacher_digest", torch.tensor(list(known), dtype=torch.uint8))
        self.gram_weight = gram_weight if loss == "gram" else 0.0
        self.whole_batch = "its Gram matrices are of the whole batch" if loss == "gram" else None
        self.projector: nn.Module = nn.Identity()
        if loss == "cosine":
            widths = (backbone.dim, hidden_dim, teacher_network.dim)
            self.projector = layers.mlp(*widths, norm=True)

    @property
    def teacher(self) -> nn.Module:
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distill":
        """To another device or precision the teacher comes along."""
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        saved = state.get(f"{prefix}teacher_digest")
        if saved is not None and not torch.equal(saved.cpu(), self.teacher_digest.cpu()):
            raise UserError(
                "this state was learnt from another teacher: name that one by method.teacher=, "
                "or choose another dir="
            )
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        with torch.no_grad():
            wanted = self.teacher(views[0])  # (N, D)
        projected = self.projector(self.backbone(views[0]))
        if self.gram_weight:
            both = distributed.gather(projected), distributed.gather(wanted)
            loss = self.gram_weight * gram_loss(*both)
        else:
            loss = cosine_loss(projected, wanted)
        return {"loss": loss, "embeddings": health_of(projected)}
