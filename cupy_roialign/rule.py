"""What an operator is, as data: a `Rule`. And a checked call of one: a `Request`."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

Columns = tuple[int, int, int, int]

Y1_X1_Y2_X2: Columns = (0, 1, 2, 3)
X1_Y1_X2_Y2: Columns = (1, 0, 3, 2)
BATCH_X1_Y1_X2_Y2: Columns = (2, 1, 4, 3)
"""Where y1, x1, y2, x2 stand in a row of boxes."""


class Frame(enum.IntEnum):
    """The units of a box, and where its bins are sampled."""

    NORMALIZED = 0  # units of the image's side less one pixel, sampled from corner to corner
    CENTERS = 1  # pixels, the first from 0 to 1; bins are sampled at their centers
    CORNERS = 2  # pixels, the first at 0; sampled from corner to corner
    SCALED = 3  # pixels times `spatial_scale`, several samples per bin


class Taps(enum.IntEnum):
    """Which pixels a sample reads."""

    LINEAR = 0  # the two around it; exactly on a pixel's center that pixel and the next one
    LINEAR_CEIL = 1  # floor and ceil: exactly on a pixel's center that pixel alone
    NEAREST = 2  # the nearest; of a tie the one with the larger index


class Border(enum.IntEnum):
    """What a sample outside of the outermost pixel centers is."""

    CUT = 0  # nothing: a bin without any sample inside takes `extrapolation_value`
    CLAMP = 1  # the border's pixel up to one pixel outside; beyond that 0


class Reduce(enum.IntEnum):
    """What becomes of the samples of a bin."""

    MEAN = 0


class Channels(enum.IntEnum):
    """Which channels a bin reads."""

    PLAIN = 0  # all of them


class Rule(NamedTuple):
    """An operator with its options: all that a backend must know of it besides the arrays."""

    frame: Frame
    taps: Taps
    border: Border
    bins: tuple[int, int]  # the output's height and width
    columns: Columns  # where y1, x1, y2, x2 stand in a row of `boxes`
    spatial_scale: float = 1.0
    sampling_ratio: int = 1  # samples per bin along each axis; 0: as many as the bin has pixels, rounded up
    aligned: bool = False  # SCALED: shifted by half a pixel, and never widened to one pixel
    extrapolation_value: float = 0.0
    reduce: Reduce = Reduce.MEAN
    channels: Channels = Channels.PLAIN

    @property
    def offset(self) -> float:
        """Where in its share of a bin a sample lies."""
        return 0.5 if self.frame == Frame.SCALED else 0.0


def crop_and_resize(bins: tuple[int, int], nearest: bool = False, extrapolation_value: float = 0.0) -> Rule:
    """TensorFlow's operator, on boxes y1, x1, y2, x2."""
    taps = Taps.NEAREST if nearest else Taps.LINEAR_CEIL
    return Rule(Frame.NORMALIZED, taps, Border.CUT, bins, Y1_X1_Y2_X2, extrapolation_value=extrapolation_value)


def roi_crop(bins: tuple[int, int], centers: bool = True, extrapolation_value: float = 0.0) -> Rule:
    """RoIAlign.pytorch's operator, on boxes x1, y1, x2, y2."""
    frame = Frame.CENTERS if centers else Frame.CORNERS
    return Rule(frame, Taps.LINEAR, Border.CUT, bins, X1_Y1_X2_Y2, extrapolation_value=extrapolation_value)


def roi_align(
    bins: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = False,
    columns: Columns = X1_Y1_X2_Y2,
) -> Rule:
    """Torchvision's operator."""
    return Rule(Frame.SCALED, Taps.LINEAR, Border.CLAMP, bins, columns, spatial_scale, sampling_ratio, aligned)


class Request(NamedTuple):
    """A checked call of an operator, in terms that every backend understands; the order is that of their arguments."""

    features: Any  # (N, C, H, W)
    boxes: Any  # (K, 4 or 5)
    batch_indices: Any  # (K,), integers or the first column of (K, 5) boxes
    rule: Rule


def terms(directions: int) -> tuple[tuple[int | None, int | None], ...]:
    """The terms of the derivative of crops along so many directions: which of them y takes, and which x.

    A weight is the product of one along y and one along x, each of them linear in its position between two pixels. So
    every axis takes one direction or, None, stays as it is, and there is no derivative beyond the second.
    """
    return _TERMS[directions] if directions < len(_TERMS) else ()


_TERMS: tuple[tuple[tuple[int | None, int | None], ...], ...] = (
    ((None, None),),
    ((0, None), (None, 0)),
    ((0, 1), (1, 0)),
)
