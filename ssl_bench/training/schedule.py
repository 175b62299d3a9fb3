"""Learning-rate schedules: pure functions of how far training is.

The rate is `initial_lr` times the factor that they return.
"""

import math

from pydantic import NonNegativeFloat

from ssl_bench.config.fields import Epochs, Fraction


class Schedule:
    """The factor rises linearly from 0 for `warmup_epochs`, step by step, and then decays.

    per_epoch: after the warm-up it changes only between epochs. start_epoch: the epoch at which the
    schedule begins, as if the training did, for one that goes on from another.
    """

    def __init__(
        self,
        warmup_epochs: Epochs = 0.0,
        per_epoch: bool = False,
        start_epoch: NonNegativeFloat = 0.0,
    ) -> None:
        self.warmup_epochs, self.per_epoch = warmup_epochs, per_epoch
        self.start_epoch = start_epoch

    def __call__(self, epoch: float, epochs: float) -> float:
        """Factor at `epoch` (a fraction inside an epoch) of `epochs`."""
        epoch, epochs = max(epoch - self.start_epoch, 0), epochs - self.start_epoch
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        epoch = math.floor(epoch) if self.per_epoch else epoch
        decaying = max(epochs - self.warmup_epochs, 1e-9)
        progress = max(epoch - self.warmup_epochs, 0) / decaying
        return self.decay(progress, epoch / epochs)

    def decay(self, progress: float, elapsed: float) -> float:
        """The factor. progress: share done of what follows the warm-up; elapsed: of everything."""
        raise NotImplementedError


class Constant(Schedule):
    def decay(self, progress: float, elapsed: float) -> float:
        return 1.0


class Cosine(Schedule):
    """Half a cosine from 1 to `final`."""

    def __init__(
        self,
        warmup_epochs: Epochs = 0.0,
        per_epoch: bool = False,
        final: NonNegativeFloat = 0.0,
        start_epoch: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(warmup_epochs, per_epoch, start_epoch)
        self.final = final

    def decay(self, progress: float, elapsed: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class Step(Schedule):
    """Multiplied by `gamma` at each milestone.

    Milestones are shares of the whole training: (0.6, 0.8) are epochs 120 and 160 of 200.
    """

    def __init__(
        self,
        warmup_epochs: Epochs = 0.0,
        per_epoch: bool = False,
        milestones: tuple[Fraction, ...] = (0.6, 0.8),
        gamma: Fraction = 0.1,
        start_epoch: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(warmup_epochs, per_epoch, start_epoch)
        self.milestones, self.gamma = milestones, gamma

    def decay(self, progress: float, elapsed: float) -> float:
        return self.gamma ** sum(elapsed >= milestone - 1e-9 for milestone in self.milestones)
