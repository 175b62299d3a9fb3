"""A batch that comes in parts (`accumulate`): their losses, and their gradients, add up."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ssl_bench.methods.base import Output

EMBEDDINGS = "embeddings"  # of an Output: (V, N, D)


def parts(
    views: Sequence[Tensor], labels: Tensor, drawn: Sequence[Tensor], count: int
) -> Iterator[tuple]:
    """The arguments of a method's `forward` for each of `count` equal parts of a batch.

    views, labels, drawn: (N, ...) each; N is a multiple of `count`.
    """
    if count == 1:
        yield views, labels, *drawn
        return
    for number in range(count):
        mine = [[x.chunk(count)[number] for x in some] for some in (views, [labels], drawn)]
        yield mine[0], *mine[1], *mine[2]


def joined(outputs: Sequence[Output]) -> Output:
    """What `forward` would have said of the whole batch: means of its scalars, all embeddings."""
    if len(outputs) == 1:
        return outputs[0]
    whole = {}
    for name in outputs[0]:
        each = [output[name].detach() for output in outputs]
        whole[name] = torch.cat(each, 1) if name == EMBEDDINGS else torch.stack(each).mean(0)
    return whole
