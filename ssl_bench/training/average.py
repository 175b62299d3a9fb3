"""An exponential moving average of a network's weights, kept beside them (`ema`)."""

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssl_bench.methods.base import Method

COUNT = "n_averaged"  # the number of steps that are in the average


class Average:
    """The average of what evaluations look at: of a method's backbone, or of a classifier.

    average <- decay * average + (1 - decay) * weights after each step, on the device; after the
    first step it is these weights. Running statistics of batch norm are averaged, too, since they
    belong to the weights, as by timm's ModelEmaV3. Nothing flows back to the training.
    """

    def __init__(self, model: Method, decay: float) -> None:
        self._source = model.measured()
        rule = get_ema_multi_avg_fn(decay)
        # its counter stays on the host, which therefore needn't wait for the device at each step
        self._average = AveragedModel(self._source, multi_avg_fn=rule, use_buffers=True)
        self._average.requires_grad_(False)

    @property
    def network(self) -> nn.Module:
        """A copy of what evaluations look at, with the averaged weights."""
        return self._average.module

    def update(self) -> None:
        self._average.update_parameters(self._source)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors by the names that they have in the method."""
        return self.network.state_dict() | {COUNT: self._average.n_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict({key: state[key] for key in state if key != COUNT})
        self._average.n_averaged.copy_(state[COUNT])
