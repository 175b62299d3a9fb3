"""Annotated types for constructors. A constructor's signature is the schema of its YAML node (see `build.check`)."""

from typing import Annotated, Literal

from pydantic import Field

Fraction = Annotated[float, Field(ge=0, le=1)]  # a probability, a ratio, a momentum
Interval = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]  # (low, high), bounds included
Share = Annotated[float, Field(gt=0, le=1)]  # a part of something
Interpolation = Literal["bilinear", "bicubic"]
Resize = Annotated[float, Field(ge=1)]  # of a test view, times its size, before the centre is cut out
