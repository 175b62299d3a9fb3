"""DINOv2 (Oquab et al., arXiv:2304.07193): DINO, iBOT and KoLeo together."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ssl_bench.augment import masks as draws
from ssl_bench.config.fields import Epochs, Fraction, Interval, WholeEpochs
from ssl_bench.methods import layers
from ssl_bench.methods.base import Output, health_of, need_patches
from ssl_bench.methods.dino import Centring, DINOHead, SelfDistilled, crossed
from ssl_bench.methods.ibot import hidden, patch_loss
from ssl_bench.runtime import distributed

HIDES_PATCHES = True  # see `build`: which backbones have them


@torch.no_grad()
@layers.full_precision
def sinkhorn(teacher: Tensor, temperature: float | Tensor, num_iterations: int = 3) -> Tensor:
    """Logits (B, K) -> targets (B, K): each row sums to 1, and prototypes are used evenly.

    Over the rows of all ranks, which may have different numbers of them (section 4; SwAV).
    """
    codes = torch.exp(teacher / temperature)
    rows = distributed.total(codes.new_full((), len(codes)))
    codes = codes / distributed.total(codes.sum())
    for _ in range(num_iterations):
        codes = codes / distributed.total(codes.sum(dim=0, keepdim=True)) / codes.shape[1]
        codes = codes / codes.sum(dim=1, keepdim=True) / rows
    return codes * rows


@layers.full_precision
def koleo(x: Tensor) -> Tensor:
    """x (N, D), not normalised -> minus the mean log distance to the nearest other (section 4).

    Kozachenko and Leonenko's estimator of the entropy: it spreads the features of a batch. Both
    ends of a distance have a gradient.
    """
    x = F.normalize(x, dim=1, eps=1e-8)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
    distances = F.pairwise_distance(x, x[nearest], eps=1e-8)
    return -(distances + 1e-8).log().mean()


class DINOv2(SelfDistilled):
    """A teacher's soft assignments of large crops, and of their patches, are what a student learns.

    The student sees small crops, too, and large ones with hidden patches. centering: of the
    teacher's logits, by a running centre or by Sinkhorn and Knopp's algorithm. separate_heads:
    patches have a head of their own. teacher_temperature: rises linearly from the warm-up's.
    mask_probability, mask_ratio: see `masks.random_blocks`. koleo_weight, patch_weight: of the
    losses beside DINO's. layer_decay: the rate of a block as a share of the next one's; patch_rate:
    that of the patches' projection, as a share of its layer's.
    """

    def __init__(
        self,
        backbone: nn.Module,
        out_dim: PositiveInt = 65536,
        hidden_dim: PositiveInt = 2048,
        bottleneck_dim: PositiveInt = 256,
        separate_heads: bool = False,
        centering: Literal["centering", "sinkhorn_knopp"] = "centering",
        momentum: Fraction = 0.992,
        warmup_teacher_temperature: PositiveFloat = 0.04,
        teacher_temperature: PositiveFloat = 0.07,
        warmup_teacher_temperature_epochs: WholeEpochs = 30,
        student_temperature: PositiveFloat = 0.1,
        center_momentum: Fraction = 0.9,
        frozen_epochs: Epochs = 1,
        mask_probability: Fraction = 0.5,
        mask_ratio: Interval = (0.1, 0.5),
        koleo_weight: NonNegativeFloat = 0.1,
        patch_weight: NonNegativeFloat = 1.0,
        layer_decay: Fraction = 0.9,
        patch_rate: Fraction = 0.2,
    ) -> None:
        need_patches(backbone, "dinov2")
        widths = (backbone.dim, out_dim, hidden_dim, bottleneck_dim)
        names = ("classes", "patches") if separate_heads else ("classes",)
        heads = nn.ModuleDict({name: DINOHead(*widths, norm_last=False) for name in names})
        super().__init__(backbone, heads, momentum, frozen_epochs)
        self.image_size, self.side = backbone.image_size, backbone.image_size // backbone.patch_size
        self.centering, self.student_temperature = centering, student_temperature
        self.mask_probability, self.mask_ratio = mask_probability, mask_ratio
        self.koleo_weight, self.patch_weight = koleo_weight, patch_weight
        self.layer_decay, self.patch_rate = layer_decay, patch_rate
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.dim))
        warm_up = (warmup_teacher_temperature, teacher_temperature)
        rest = (warmup_teacher_temperature_epochs, center_momentum)
        self.class_center = Rising((1, out_dim), *warm_up, *rest)
        self.patch_center = Rising((1, out_dim), *warm_up, *rest)

    def param_groups(self) -> list[dict]:
        groups = layerwise(self.student_backbone, self.layer_decay, self.patch_rate)
        first = self.layer_decay ** (len(self.student_backbone.encoder.layers) + 1)
        groups.append({"params": [self.mask_token], "lr_scale": first})
        for head in self.student_head.values():
            groups.append({"params": list(head.mlp.parameters())})
            last = list(head.last.parameters())
            groups.append({"params": last, "frozen_epochs": self.frozen_epochs})
        return groups

    def begin(self, epoch: float, epochs: int) -> None:
        self.class_center.begin(epoch)
        self.patch_center.begin(epoch)

    def draw(self, keys: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        """masks (N, 2, L) of the views of full size, and where they are: see `ibot.hidden`."""
        smallest, largest = 4, 0.5 * self.side**2  # masking.py and train.py of the authors
        rules = (self.mask_probability, self.mask_ratio, smallest, largest)
        masks = draws.random_blocks(keys, self.num_views, self.side, *rules)
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
        with torch.no_grad():
            tokens = self.backbone.tokens(large)
            classes = self.head["classes"](self.backbone.pooled(tokens))  # (2 * N, K)
            patches = self.patch_head(self.head)(self.hidden_of(tokens, where))  # (M, K)
            targets = self.assigned(classes, self.class_center)
            patch_targets = self.assigned(patches, self.patch_center)
        tokens = self.student_backbone.tokens(large, mask=masks, mask_token=self.mask_token)
        features = [self.student_backbone.pooled(tokens)]
        if small:
            features.append(self.student_backbone(torch.cat(tuple(small))))
        student = self.student_head["classes"](torch.cat(features))
        student_patches = self.patch_head(self.student_head)(self.hidden_of(tokens, where))
        temperature = self.student_temperature
        class_loss = layers.full_precision(crossed)(student, targets, temperature).mean()
        patches_loss = patch_loss(student_patches, patch_targets, masks, temperature, where)
        each = features[0].chunk(self.num_views)  # not among views of one image
        spread = torch.stack([koleo(distributed.gather(view)) for view in each]).sum()
        loss = class_loss + self.patch_weight * patches_loss + self.koleo_weight * spread
        return {
            "loss": loss,
            "class_loss": class_loss.detach(),
            "patch_loss": patches_loss.detach(),
            "koleo": spread.detach(),
            "embeddings": health_of(*each),
        }

    def patch_head(self, heads: nn.ModuleDict) -> nn.Module:
        return heads["patches" if "patches" in heads else "classes"]

    def hidden_of(self, tokens: Tensor, where: Tensor) -> Tensor:
        """tokens (2 * N, P + L, dim) -> those of the hidden patches (M, dim)."""
        return tokens[:, self.backbone.num_prefix :].flatten(0, 1)[where]

    def assigned(self, logits: Tensor, center: "Rising") -> Tensor:
        """The teacher's logits (B, K) -> targets (B, K)."""
        if self.centering == "sinkhorn_knopp":
            return sinkhorn(logits, center.temperature)
        return center(logits)


class Rising(Centring):
    """The temperature rises step by step; the centre is the mean of all rows of all ranks."""

    def begin(self, epoch: float) -> None:
        start, end, epochs, _ = self.warm_up
        self.temperature.fill_(start + (end - start) * min(1.0, epoch / max(1, epochs)))

    @torch.no_grad()
    @layers.full_precision
    def forward(self, logits: Tensor) -> Tensor:
        """(B, K) -> targets; B may differ between ranks."""
        targets = self.targets(logits)
        rows = distributed.total(logits.new_full((), len(logits))).clamp(min=1)
        self.follow(distributed.total(logits.sum(dim=0, keepdim=True)) / rows)
        return targets


def layerwise(network: nn.Module, decay: float, patch_rate: float) -> list[dict]:
    """Parameter groups of a ViT: `lr_scale` is decay ** (the number of blocks above, and one).

    As in utils/param_groups.py of the authors.
    """
    blocks = list(network.encoder.layers)
    groups: list[dict] = []
    taken: set[int] = set()

    def add(parameters: Sequence[nn.Parameter], scale: float) -> None:
        chosen = [p for p in parameters if p.requires_grad and id(p) not in taken]
        taken.update(map(id, chosen))
        if chosen:
            groups.append({"params": chosen, "lr_scale": scale})

    for number, block in enumerate(blocks):
        add(list(block.parameters()), decay ** (len(blocks) - number))
    add(list(network.encoder.ln.parameters()), 1.0)
    add(list(network.conv_proj.parameters()), patch_rate * decay ** (len(blocks) + 1))
    add(list(network.parameters()), decay ** (len(blocks) + 1))  # class token, positions
    return groups
