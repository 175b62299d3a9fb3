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


class DINOLoss(nn.Module):
    """Cross-entropy of the student's crops with the teacher's first two (algorithm 1).

    The teacher's are centred and sharpened. Its temperature rises with each epoch from
    `warmup_teacher_temperature` to `teacher_temperature`, which it has from epoch `warmup_epochs` -
    1 on.
    """

    def __init__(
        self,
        out_dim: int,
        warmup_teacher_temperature: float = 0.04,
        teacher_temperature: float = 0.07,
        warmup_epochs: int = 30,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.warm_up = (warmup_teacher_temperature, teacher_temperature, warmup_epochs)
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        # a tensor: torch.compile would compile a number anew for each value
        temperature = torch.tensor(warmup_teacher_temperature)
        self.register_buffer("temperature", temperature, persistent=False)

    def begin(self, epoch: int) -> None:
        start, end, epochs = self.warm_up
        share = 1.0 if epoch >= epochs - 1 else epoch / (epochs - 1)
        self.temperature.fill_(start + (end - start) * share)

    @layers.full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Student (V * N, K), teacher (2 * N, K), crop after crop -> mean over unequal crops."""
        teacher = teacher.detach()
        num_crops = 2 * len(student) // len(teacher)
        predictions = F.log_softmax(student / self.student_temperature, dim=1).chunk(num_crops)
        targets = F.softmax((teacher - self.center) / self.temperature, dim=1).chunk(2)
        pairs = [
            -(target * prediction).sum(dim=1).mean()
            for i, target in enumerate(targets)
            for j, prediction in enumerate(predictions)
            if i != j
        ]
        if self.training:
            batch_center = distributed.mean(teacher.mean(dim=0, keepdim=True))
            self.center.lerp_(batch_center, 1 - self.center_momentum)
        return torch.stack(pairs).mean()


class DINOHead(nn.Module):
    """Three layers with GELU to a normalised bottleneck, then weights of norm 1 (appendix C)."""

    def __init__(self, width: int, out_dim: int, hidden_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        widths = (width, hidden_dim, hidden_dim, bottleneck_dim)
        linear = [nn.Linear(*pair) for pair in pairwise(widths)]
        for layer in linear:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(linear[0], nn.GELU(), linear[1], nn.GELU(), linear[2])
        self.last = nn.Linear(bottleneck_dim, out_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.logits(self.mlp(features))

    # In bfloat16 a cosine is off by up to 0.002, which the teacher's temperature turns into 5 %.
    @layers.full_precision
    def logits(self, bottleneck: Tensor) -> Tensor:
        return F.linear(F.normalize(bottleneck, dim=1), F.normalize(self.last.weight, dim=1))


class DINO(Method):
    """A student learns its slow copy's, the teacher's, soft assignments of the larger crops.

    Pretraining exports the teacher, the better of the two (section 5.2). momentum: the teacher's;
    it rises to 1 along a cosine. frozen_epochs: for so long the last layer doesn't move.
    """

    takes_small_views = True

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
        super().__init__(momentum_copy(backbone))
        self.momentum, self.frozen_epochs = momentum, frozen_epochs
        self.student_backbone = backbone
        self.student_head = DINOHead(backbone.dim, out_dim, hidden_dim, bottleneck_dim)
        self.head = momentum_copy(self.student_head)
        self.criterion = DINOLoss(
            out_dim,
            warmup_teacher_temperature,
            teacher_temperature,
            warmup_teacher_temperature_epochs,
            student_temperature,
            center_momentum,
        )

    def param_groups(self) -> list[dict]:
        last = list(self.student_head.last.parameters())
        others = [*self.student_backbone.parameters(), *self.student_head.mlp.parameters()]
        return [{"params": others}, {"params": last, "frozen_epochs": self.frozen_epochs}]

    def begin(self, epoch: float, epochs: int) -> None:
        self.criterion.begin(int(epoch))

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Output:
        features = by_size(self.student_backbone, views)  # (V * N, width)
        with torch.no_grad():
            teacher = self.head(by_size(self.backbone, views[: self.num_views]))
        loss = self.criterion(self.student_head(features), teacher)
        full_size = features.chunk(len(views))[: self.num_views]
        return {"loss": loss, "embeddings": health_of(*full_size)}

    def update(self, progress: float) -> None:
        momentum = rising(self.momentum, progress)
        ema_([self.backbone, self.head], [self.student_backbone, self.student_head], momentum)
