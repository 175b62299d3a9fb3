"""Annotated types for constructors.

A constructor's signature is the schema of its YAML node (see `build.check`).
"""

import re
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt


class InEpochs(NamedTuple):
    """Marks a setting that is a time in epochs; `build.check` wants it within `epochs`."""

    or_at_the_end: bool = False


class IsPath(NamedTuple):
    """Marks a setting that is a path: ~ at its beginning is home (`build.at_home`)."""


def is_path(annotation: Any) -> bool:
    """Does the annotation stand for a path, a list of paths, or a choice that has one of these?"""
    if IsPath() in getattr(annotation, "__metadata__", ()):
        return True
    return any(map(is_path, get_args(annotation)))


Fraction = Annotated[float, Field(ge=0, le=1)]  # a probability, a ratio, a momentum
# (low, high), bounds included
Interval = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]
Share = Annotated[float, Field(gt=0, le=1)]  # a part of something
OpenShare = Annotated[float, Field(gt=0, lt=1)]  # a part that isn't all
Interpolation = Literal["bilinear", "bicubic"]
# the size of a test image before its centre is cut out, in sizes of the view
Resize = Annotated[float, Field(ge=1)]
# the length of a warm-up, how long a layer stays frozen, when something begins
Epochs = Annotated[NonNegativeFloat, InEpochs()]
WholeEpochs = Annotated[NonNegativeInt, InEpochs(or_at_the_end=True)]  # a number of whole epochs
BitDepth = Annotated[int, Field(ge=8, le=16)]  # bits used of the 16 that a file has for a value
# [the value that is black, the value that is white]
ValueRange = Annotated[list[float], Field(min_length=2, max_length=2)]
Place = Annotated[str, IsPath()]


def _among(pattern: str, choices: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"choose {choices}")
        return text

    return AfterValidator(check)


# which of a transformer's tokens are its features: see `evaluate.readout`
TOKENS = r"cls|mean|last_[1-9]\d*"
FeaturesOf = Annotated[str, _among(TOKENS, "cls, mean or last_4 (or another number of blocks)")]
ProbedFeatures = Annotated[  # a classifier may learn to pool
    str,
    _among(f"{TOKENS}|attentive", "cls, mean, last_4 (or another number of blocks) or attentive"),
]
