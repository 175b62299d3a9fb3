"""iBOT (Zhou et al., arXiv:2111.07832)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.augment import masks as draws
from ssl_bench.config.fields import Epochs, Fraction, Interval, WholeEpochs
from ssl_bench.methods import layers
from ssl_bench.methods.base import Output, health_of, need_patches
from ssl_bench.methods.dino import CentredLoss, DINOHead, DINOLoss, SelfDistilled
from ssl_bench.runtime import distributed

HIDES_PATCHES = True  # see `build`: which backbones have them


@layers.full_precision
def patch_loss(
    student: Tensor,
    targets: Tensor,
    masks: Tensor,
    temperature: float,
    where: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of hidden patches: for each image their mean, then the mean over images.

    student: logits (M, K), targets: probabilities (M, K), of the M hidden patches of all images in
    their order, or (N * L, K) of all patches. masks: bool (N, L). An image without a hidden patch
    counts as 0. where: int64 (M,), which of the N * L are hidden; None: they are sought.
    """
    if where is None:
        where = masks.flatten().nonzero().squeeze(1)
    if len(student) == masks.numel():
        student, targets = student[where], targets[where]
    losses = -(targets * F.log_softmax(student / temperature, dim=-1)).sum(dim=-1)  # (M,)
    counts = masks.sum(dim=1).clamp(min=1)[where // masks.shape[1]]
    return (losses / counts).sum() / len(masks)


class PatchLoss(CentredLoss):
    """`patch_loss` with the teacher's targets of the same patches (section 3.1)."""

    ones = (1, 1)

    @layers.full_precision
    def forward(
        self, student: Tensor, teacher: Tensor, masks: Tensor, where: Tensor | None = None
    ) -> Tensor:
        """student (M, K) or (N * L, K), as in `patch_loss`; teacher (N, L, K), masks (N, L)."""
        teacher = teacher.detach()
        targets = self.targets(teacher).flatten(0, 1)
        if len(student) != len(targets):
            targets = targets[where]
        loss = patch_loss(student, targets, masks, self.student_temperature, where)
        self.follow(distributed.mean(teacher.mean(dim=(0, 1), keepdim=True)))
        return loss


class IBOT(SelfDistilled):
    """DINO on class tokens; the student learns the teacher's view of the patches it doesn't see.

    One head has both. norm_last: see DINOHead. mask_probability, mask_ratio: see
    `masks.random_blocks`; masks begin at `mask_start_epoch`. class_weight, patch_weight: of the two
    losses.
    """

    def __init__(
        self,
        backbone: nn.Module,
        out_dim: PositiveInt = 8192,
        hidden_dim: PositiveInt = 2048,
        bottleneck_dim: PositiveInt = 256,
        norm_last: bool = False,
        momentum: Fraction = 0.996,
        warmup_teacher_temperature: PositiveFloat = 0.04,
        teacher_temperature: PositiveFloat = 0.07,
        warmup_teacher_patch_temperature: PositiveFloat = 0.04,
        teacher_patch_temperature: PositiveFloat = 0.07,
        warmup_teacher_temperature_epochs: WholeEpochs = 30,
        student_temperature: PositiveFloat = 0.1,
        center_momentum: Fraction = 0.9,
        frozen_epochs: Epochs = 1,
        mask_probability: Fraction = 0.5,
        mask_ratio: Interval = (0.1, 0.5),
        mask_start_epochs: WholeEpochs = 0,
        class_weight: NonNegativeFloat = 1.0,
        patch_weight: NonNegativeFloat = 1.0,
    ) -> None:
        need_patches(backbone, "ibot")
        head = DINOHead(backbone.dim, out_dim, hidden_dim, bottleneck_dim, norm_last)
        super().__init__(backbone, head, momentum, frozen_epochs)
        self.image_size, self.side = backbone.image_size, backbone.image_size // backbone.patch_size
        self.mask_probability, self.mask_ratio = mask_probability, mask_ratio
        self.mask_start, self.masking = mask_start_epochs, True
        self.weights = (class_weight, patch_weight)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.dim))
        rest = (warmup_teacher_temperature_epochs, student_temperature, center_momentum)
        self.criterion = DINOLoss(out_dim, warmup_teacher_temperature, teacher_temperature, *rest)
        self.patch_criterion = PatchLoss(
            out_dim,
            warmup_teacher_patch_temperature,
            teacher_patch_temperature,
            *rest,
            start_epoch=mask_start_epochs,
        )

    def begin(self, epoch: float, epochs: int) -> None:
        self.masking = epoch >= self.mask_start
        for criterion in (self.criterion, self.patch_criterion):
            criterion.begin(int(epoch))

    def draw(self, keys: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """masks (N, 2, L) of the views of full size, and where they are: see `hidden`."""
        smallest = (self.side // 3) ** 2
        probability = self.mask_probability if self.masking else 0.0
        masks = draws.random_blocks(
            keys, self.num_views, self.side, probability, self.mask_ratio, smallest, whole=False
        )
        return masks.to(keys.device), hidden(masks).to(keys.device)

    def forward(
        self,
        views: Sequence[Tensor],
        labels: Tensor | None = None,
        masks: Tensor | None = None,
        where: Tensor | None = None,
    ) -> Output:
        assert masks is not None
        assert where is not None
        large, small = torch.cat(tuple(views[: self.num_views])), views[self.num_views :]
        masks = masks.transpose(0, 1).flatten(0, 1)  # (2 * N, L), view after view
        prefix = self.backbone.num_prefix
        with torch.no_grad():
            tokens = self.backbone.tokens(large)
            teacher = self.head(self.backbone.pooled(tokens))
            patches = tokens[:, prefix:]
            teacher_patches = self.head(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        tokens = self.student_backbone.tokens(large, mask=masks, mask_token=self.mask_token)
        features = [self.student_backbone.pooled(tokens)]
        if small:
            features.append(self.student_backbone(torch.cat(tuple(small))))
        student = self.student_head(torch.cat(features))
        student_patches = self.student_head(tokens[:, prefix:].flatten(0, 1)[where])
        class_loss = self.criterion(student, teacher)
        patches_loss = self.patch_criterion(student_patches, teacher_patches, masks, where)
        loss = self.weights[0] * class_loss + self.weights[1] * patches_loss
        return {
            "loss": loss,
            "class_loss": class_loss.detach(),
            "patch_loss": patches_loss.detach(),
            "embeddings": health_of(*features[0].chunk(self.num_views)),
        }


def hidden(masks: Tensor) -> Tensor:
    """masks (N, V, L) -> int64 (M,): which patches are hidden, of (V * N, L), view after view."""
    return masks.transpose(0, 1).flatten().nonzero().squeeze(1)
