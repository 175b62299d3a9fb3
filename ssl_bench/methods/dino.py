"""DINO (Caron et al., arXiv:2104.14294)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.config.fields import Epochs, Fraction, WholeEpochs
from ssl_bench.methods import layers
from ssl_bench.methods.base import Method, Output, by_size, ema_, health_of, momentum_copy, rising
from ssl_bench.runtime import distributed


class Centring(nn.Module):
    """Targets of a teacher: centred and sharpened (section 3.1).

    Its temperature rises with each epoch from `warmup_temperature`, which it has until epoch
    `start_epoch`, to `temperature`, which it has from epoch `start_epoch + warmup_epochs - 1` on.
    shape: of the centre, which broadcasts to the teacher's logits.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        warmup_temperature: float,
        temperature: float,
        warmup_epochs: int,
        center_momentum: float,
        start_epoch: int = 0,
    ) -> None:
        super().__init__()
        self.warm_up = (warmup_temperature, temperature, warmup_epochs, start_epoch)
        self.center_momentum = center_momentum
        self.newest: Tensor | None = None  # the centre of the last batch
        self.register_buffer("center", torch.zeros(shape))
        # a tensor: torch.compile would compile a number anew for each value
        self.register_buffer("temperature", torch.tensor(warmup_temperature), persistent=False)

    def begin(self, epoch: int) -> None:
        start, end, epochs, first = self.warm_up
        epoch = max(0, epoch - first)
        share = 1.0 if epoch >= epochs - 1 else epoch / (epochs - 1)
        self.temperature.fill_(start + (end - start) * share)

    def targets(self, teacher: Tensor) -> Tensor:
        """Logits (..., K) -> probabilities."""
        return F.softmax((teacher - self.center) / self.temperature, dim=-1)

    def follow(self, batch_center: Tensor) -> None:
        """Note the centre of a batch, towards which `move` moves."""
        if self.training:
            self.newest = batch_center

    def move(self) -> None:
        """After the backward pass, which, compiled, may compute targets once more."""
        if (batch_center := self.newest) is not None:
            self.center.lerp_(batch_center, 1 - self.center_momentum)


def crossed(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Logits (V * N, K), probabilities (T * N, K), crop after crop -> T * (V - 1) cross-entropies.

    Each target of the first T crops with each other crop's prediction.
    """
    num_crops = 2 * len(student) // len(targets)
    predictions = F.log_softmax(student / temperature, dim=1).chunk(num_crops)
    return torch.stack(
        [
            -(target * prediction).sum(dim=1).mean()
            for i, target in enumerate(targets.chunk(2))
            for j, prediction in enumerate(predictions)
            if i != j
        ]
    )


class CentredLoss(Centring):
    """A loss of a student's predictions and the centred targets of a teacher.

    ones: the dimensions of the teacher's logits before the last one, over which the centre is a
    mean.
    """

    ones: tuple[int, ...] = (1,)

    def __init__(
        self,
        out_dim: int,
        warmup_teacher_temperature: float = 0.04,
        teacher_temperature: float = 0.07,
        warmup_epochs: int = 30,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
        start_epoch: int = 0,
    ) -> None:
        warm_up = (warmup_teacher_temperature, teacher_temperature, warmup_epochs)
        super().__init__((*self.ones, out_dim), *warm_up, center_momentum, start_epoch)
        self.student_temperature = student_temperature


class DINOLoss(CentredLoss):
    """Cross-entropy of the student's crops with the teacher's first two (algorithm 1)."""

    @layers.full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Student (V * N, K), teacher (2 * N, K), crop after crop -> mean over unequal crops."""
        teacher = teacher.detach()
        pairs = crossed(student, self.targets(teacher), self.student_temperature)
        self.follow(distributed.mean(teacher.mean(dim=0, keepdim=True)))
        return pairs.mean()


class DINOHead(nn.Module):
    """Three layers with GELU to a normalised bottleneck, then weights of norm 1 (appendix C).

    norm_last: false: these weights have norms that are learnt, from 1 on.
    """

    def __init__(
        self,
        width: int,
        out_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        norm_last: bool = True,
    ) -> None:
        super().__init__()
        widths = (width, hidden_dim, hidden_dim, bottleneck_dim)
        linear = [nn.Linear(*pair) for pair in pairwise(widths)]
        for layer in linear:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(linear[0], nn.GELU(), linear[1], nn.GELU(), linear[2])
        self.last = nn.Linear(bottleneck_dim, out_dim, bias=False)
        if not norm_last:
            self.last.register_parameter("norm", nn.Parameter(torch.ones(out_dim, 1)))

    def forward(self, features: Tensor) -> Tensor:
        return self.logits(self.mlp(features))

    # In bfloat16 a cosine is off by up to 0.002, which the teacher's temperature turns into 5 %.
    @layers.full_precision
    def logits(self, bottleneck: Tensor) -> Tensor:
        weight = F.normalize(self.last.weight, dim=1)
        norm = self.last._parameters.get("norm")
        return F.linear(F.normalize(bottleneck, dim=1), weight if norm is None else weight * norm)


class SelfDistilled(Method):
    """A student and its slow copy, the teacher, which pretraining exports (section 5.2).

    Their heads follow likewise. momentum: the teacher's; it rises to 1 along a cosine.
    frozen_epochs: for so long the last layer of the head doesn't move.
    """

    whole_batch = "its centre follows the teacher's mean over the batch"
    takes_small_views = True

    def __init__(
        self, backbone: nn.Module, head: nn.Module, momentum: float, frozen_epochs: float
    ) -> None:
        super().__init__(momentum_copy(backbone))
        self.momentum, self.frozen_epochs = momentum, frozen_epochs
        self.student_backbone, self.student_head = backbone, head
        self.head = momentum_copy(head)

    def param_groups(self) -> list[dict]:
        last = list(self.student_head.last.parameters())
        others = [*self.student_backbone.parameters(), *self.student_head.mlp.parameters()]
        others += self.parameters(recurse=False)
        trained = [parameter for parameter in others if parameter.requires_grad]
        return [{"params": trained}, {"params": last, "frozen_epochs": self.frozen_epochs}]

    def update(self, progress: float) -> None:
        for child in self.children():
            if isinstance(child, Centring):
                child.move()
        momentum = rising(self.momentum, progress)
        ema_([self.backbone, self.head], [self.student_backbone, self.student_head], momentum)


class DINO(SelfDistilled):
    """A student learns its teacher's soft assignments of the larger crops."""

    def __init__(
        self,
        backbone: nn.Module,
        out_dim: PositiveInt = 65536,
        hidden_dim: PositiveInt = 2048,
        bottleneck_dim: PositiveInt = 256,
        momentum: Fraction = 0.996,
        warmup_teacher_temperature: PositiveFloat = 0.04,
        teacher_temperature: PositiveFloat = 0.07,
        warmup_teacher_temperature_epochs: WholeEpochs = 30,
        student_temperature: PositiveFloat = 0.1,
        center_momentum: Fraction = 0.9,
        frozen_epochs: Epochs = 1,
    ) -> None:
        head = DINOHead(backbone.dim, out_dim, hidden_dim, bottleneck_dim)
        super().__init__(backbone, head, momentum, frozen_epochs)
        self.criterion = DINOLoss(
            out_dim,
            warmup_teacher_temperature,
            teacher_temperature,
            warmup_teacher_temperature_epochs,
            student_temperature,
            center_momentum,
        )

    def begin(self, epoch: float, epochs: int) -> None:
        self.criterion.begin(int(epoch))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        features = by_size(self.student_backbone, views)  # (V * N, width)
        with torch.no_grad():
            teacher = self.head(by_size(self.backbone, views[: self.num_views]))
        loss = self.criterion(self.student_head(features), teacher)
        full_size = features.chunk(len(views))[: self.num_views]
        return {"loss": loss, "embeddings": health_of(*full_size)}
