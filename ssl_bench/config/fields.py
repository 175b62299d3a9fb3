"""Annotated types for constructors. A constructor's signature is the schema of its YAML node (see
`build.check`).
"""

from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt


class InEpochs(NamedTuple):
    """Marks a setting that is a time in epochs; `build.check` wants it within `epochs`."""

    or_at_the_end: bool = False


class IsPath(NamedTuple):
    """Marks a setting that is a path: ~ at its beginning is home (`build.at_home`)."""


def is_path(annotation: Any) -> bool:
    """Is it a path, or may it be one, or a list of them?"""
    return IsPath() in getattr(annotation, "__metadata__", ()) or any(
        map(is_path, get_args(annotation))
    )


Fraction = Annotated[float, Field(ge=0, le=1)]  # a probability, a ratio, a momentum
# (low, high), bounds included
Interval = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]
Share = Annotated[float, Field(gt=0, le=1)]  # a part of something
Interpolation = Literal["bilinear", "bicubic"]
# of a test view, times its size, before the centre is cut out
Resize = Annotated[float, Field(ge=1)]
# of a warm-up, of what stays frozen, of what begins later
Epochs = Annotated[NonNegativeFloat, InEpochs()]
WholeEpochs = Annotated[NonNegativeInt, InEpochs(or_at_the_end=True)]  # as many, counted
BitDepth = Annotated[int, Field(ge=8, le=16)]  # of values in files that hold 16
# what is black, and what is white
ValueRange = Annotated[list[float], Field(min_length=2, max_length=2)]
Place = Annotated[str, IsPath()]
