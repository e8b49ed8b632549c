"""Box rules: from a box to sample positions, and their derivatives. The one place of every dialect's arithmetic.

An axis-aligned RoI operator treats each axis alone. On one axis a box becomes a run of sample positions,
in units of pixels, pixel 0 having its centre at 0:

    position(p, i) = start + p*bin + (i + offset)*bin/samples        p = 0..bins-1, i = 0..samples-1

The ``samples`` of a bin are averaged. A border rule says what a position outside of the image means, and
an interpolation rule which two pixels (*taps*) a position inside it lies between.

Every operation here is done in one precision (see `precision`), in the order in which the peers do it, and
without fused multiply-add: a sample that sits exactly on an edge must fall on the same side everywhere.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

EVERY_SAMPLE = 16
"""Up to so many samples a bin, all are tried; beyond, first the range that can lie inside is computed."""


FEW = 1000
"""So many samples too many are tried, rather than left out by some operations more."""


class Dialect(enum.IntEnum):
    """How a box is read. README shows each by an example."""

    CROP_AND_RESIZE = 0  # normalised corners, corner to corner
    ROI_CROP_CENTERS = 1  # pixel corners, bin centres
    ROI_CROP_CORNERS = 2  # pixel corners, corner to corner
    ROI_ALIGN = 3  # pixel corners, several samples a bin


@dataclass(frozen=True)
class Rule:
    """An operator with its options: all that a backend must know of it besides the arrays."""

    dialect: Dialect
    bins: tuple[int, int]  # (bins_y, bins_x), the output's height and width
    columns: tuple[int, int, int, int]  # where y1, x1, y2, x2 stand in a row of `boxes`
    spatial_scale: float = 1.0
    sampling_ratio: int = 1  # samples a bin and axis; 0: adaptive
    aligned: bool = False
    nearest: bool = False
    extrapolation_value: float = 0.0

    @property
    def clamps(self) -> bool:
        """Whether a band of one pixel around the image takes the border pixel's value."""
        return self.dialect is Dialect.ROI_ALIGN

    @property
    def offset(self) -> float:
        return 0.5 if self.dialect is Dialect.ROI_ALIGN else 0.0


class Axis(NamedTuple):
    """K boxes on one axis. `start` and `bin` are affine in the box's two edges (lo, hi), piece by piece."""

    start: np.ndarray  # (K,)
    bin: np.ndarray  # (K,)
    samples: np.ndarray  # (K,) int64; 0 where the box takes no sample
    start_slope: tuple[float, float]  # d start / d (lo, hi)
    bin_slope: tuple[np.ndarray, np.ndarray]  # d bin / d (lo, hi), each (K,)

    def of(self, boxes: slice | np.ndarray) -> Axis:
        """Some of the boxes."""
        bin_slope = (self.bin_slope[0][boxes], self.bin_slope[1][boxes])
        return Axis(self.start[boxes], self.bin[boxes], self.samples[boxes], self.start_slope, bin_slope)

    def edge_gradient(self, of_start: np.ndarray, of_bin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gradients to (lo, hi) from those to `start` and `bin`."""
        low, high = (of_start * s + of_bin * b for s, b in zip(self.start_slope, self.bin_slope, strict=True))
        return low, high

    def change(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How `start` and `bin` change where (lo, hi) change by so much."""
        of_start, of_bin = (low * slopes[0] + high * slopes[1] for slopes in (self.start_slope, self.bin_slope))
        return of_start, of_bin


class Part(NamedTuple):
    """Some of a box's samples on one axis."""

    bins: range
    first: int = 0  # in each bin the samples from here
    stop: int = np.iinfo(np.int64).max  # up to here


class Samples(NamedTuple):
    """The samples of K boxes that lie inside the image on one axis, in the order of (k, p, i)."""

    box: np.ndarray  # (S,) int64, k
    bin: np.ndarray  # (S,) int64, p
    number: np.ndarray  # (S,) int64, i
    low: np.ndarray  # (S,) int64, the tap at or below the position
    high: np.ndarray  # (S,) int64, the next tap
    fraction: np.ndarray  # (S,) weight of `high` before averaging; that of `low` is 1 - fraction


def terms(directions: int) -> tuple[tuple[int | None, int | None], ...]:
    """What the derivative of crops along so many changes of the boxes is the sum of: which change y takes, and which x.

    A weight is the product of one of y and one of x, each of them linear in its position between two pixels. So
    every axis takes one change or, None, stays as it is, and there is no derivative beyond the second.
    """
    return _TERMS[directions] if directions < len(_TERMS) else ()


_TERMS: tuple[tuple[tuple[int | None, int | None], ...], ...] = (
    ((None, None),),
    ((0, None), (None, 0)),
    ((0, 1), (1, 0)),
)


def precision(rule: Rule, features: str, boxes: str) -> str:
    """The dtype of positions, for features and boxes of the dtypes of these names.

    That of the wider of the two; TensorFlow takes float32 boxes with float64 images, and computes in float32.
    """
    decisive = (boxes,) if rule.dialect is Dialect.CROP_AND_RESIZE else (boxes, features)
    return "float64" if "float64" in decisive else "float32"


def finite_boxes(rule: Rule, boxes: np.ndarray) -> np.ndarray:
    """(K,) bool: all four coordinates are finite."""
    return np.isfinite(boxes[:, list(rule.columns)]).all(axis=1)


def resolve(rule: Rule, boxes: np.ndarray, axis: int, size: int) -> Axis:
    """The rule on one axis (0: y, 1: x) of an image with `size` pixels there. `boxes`: (K, 4 or 5), float32 or 64.

    A box with a coordinate that is not finite takes no sample.
    """
    real = boxes.dtype.type
    low, high = boxes[:, rule.columns[axis]], boxes[:, rule.columns[axis + 2]]
    bins = rule.bins[axis]
    last = real(size - 1)
    with np.errstate(all="ignore"):
        if rule.dialect is Dialect.ROI_ALIGN:
            scale = real(rule.spatial_scale)
            offset = real(0.5 if rule.aligned else 0.0)
            start = low * scale - offset
            extent = (high * scale - offset) - start
            grows = np.ones(len(boxes))
            if not rule.aligned:
                grows = (extent >= 1).astype(np.float64)
                extent = np.maximum(extent, real(1))
            step = extent / real(bins)
            if rule.sampling_ratio > 0:
                samples = np.full(len(boxes), rule.sampling_ratio, np.int64)
            else:
                # More pixels a bin than numbers i + 0.5 are exact are sampled more thinly, still evenly: so the
                # cost of a box as wide as floats go stays that of the image.
                wanted = np.minimum(np.ceil(step), real(2.0 ** np.finfo(real).nmant))
                samples = np.where(wanted > 0, wanted, 0).astype(np.int64)
            start_slope, growth = (float(scale), 0.0), float(scale) * grows / bins
        else:
            samples = np.ones(len(boxes), np.int64)
            if rule.dialect is Dialect.CROP_AND_RESIZE:
                unit = float(last)  # pixels in a unit of the box's coordinates
            else:
                unit = 1.0
                # In an image of one pixel the peer divides 0 by 0. Pixels stay pixels there instead.
                last = max(last, real(1))
                if rule.dialect is Dialect.ROI_CROP_CENTERS:
                    spacing = (high - low) / real(bins)
                    low = (low + spacing / real(2) - real(0.5)) / last
                    high = low + spacing * real(bins - 1) / last
                else:
                    low, high = low / last, high / last
            if bins > 1:
                start = low * last
                step = ((high - low) * last) / real(bins - 1)
            else:
                start = (real(0.5) * (low + high)) * last
                step = np.zeros_like(start)
            if rule.dialect is Dialect.ROI_CROP_CENTERS:
                half = 0.5 / bins
                start_slope, growth = (1.0 - half, half), np.full(len(boxes), 1.0 / bins)
            elif bins > 1:
                start_slope, growth = (unit, 0.0), np.full(len(boxes), unit / (bins - 1))
            else:
                start_slope, growth = (0.5 * unit, 0.5 * unit), np.zeros(len(boxes))
    if not np.isfinite(boxes).all():
        samples[~finite_boxes(rule, boxes)] = 0
    return Axis(start, step, samples, start_slope, (-growth, growth))


def inside_samples(rule: Rule, axis: Axis, part: Part, size: int) -> Samples:
    """Those samples of `part` that lie inside an image of `size` pixels, with their taps.

    At most about 2*size + 2*bins a box, however many its bins hold, unless `sampling_ratio` asks for more.
    """
    with np.errstate(all="ignore"):
        origin = _origins(axis, part.bins)
        most = int(axis.samples.max(initial=0))
        whole = part.first == 0 and part.stop >= most
        if whole and most <= EVERY_SAMPLE and most * len(axis.start) <= 2 * axis.samples.sum() + FEW:
            # a grid, of which boxes with fewer samples than others use a part
            index = np.arange(most)
            position = _positions(rule, origin[..., None], index, axis.bin[:, None, None], axis.samples[:, None, None])
            inside = _inside(rule, position, size)
            if not (axis.samples == most).all():
                inside &= index < axis.samples[:, None, None]
            box, bin_, number = np.nonzero(inside)
            position = position[inside]
        else:
            first, stop = _candidates(rule, axis, origin, size)
            first = np.maximum(first, part.first)
            stop = np.clip(stop, first, part.stop)
            count = (stop - first).ravel()
            row = np.repeat(np.arange(count.size), count)
            before = np.cumsum(count) - count
            number = np.arange(row.size) - (before - first.ravel())[row]
            box = row // len(part.bins)
            position = _positions(rule, origin.ravel()[row], number, axis.bin[box], axis.samples[box])
            inside = _inside(rule, position, size)
            row, number, position = row[inside], number[inside], position[inside]
            box, bin_ = np.divmod(row, len(part.bins))
    return Samples(box, bin_ + part.bins.start, number, *_taps(rule, position, size))


def _positions(rule: Rule, origin: np.ndarray, number: np.ndarray, bin: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Where the samples of these numbers lie in bins that begin at `origin`."""
    real = origin.dtype.type
    positions: np.ndarray = origin + ((number.astype(real) + real(rule.offset)) * bin) / samples.astype(real)
    return positions


def _inside(rule: Rule, position: np.ndarray, size: int) -> np.ndarray:
    """Whether positions lie inside the image; those that are NaN do not."""
    low, high = (-1, size) if rule.clamps else (0, size - 1)
    inside: np.ndarray = (position >= low) & (position <= high)
    return inside


def most_samples(rule: Rule, axis: Axis, bins: int, size: int) -> np.ndarray:
    """(K,) float64: about how many samples of a box `inside_samples` tries at most."""
    samples = bins * axis.samples.astype(np.float64)
    if rule.sampling_ratio == 0:  # at most about two samples a pixel lie inside
        samples = np.minimum(samples, 2 * size + bins * EVERY_SAMPLE)
    return samples


def sample_range(rule: Rule, axis: Axis, bin: int, size: int) -> range:
    """Of one box and bin: the samples outside of which none lies inside the image."""
    with np.errstate(all="ignore"):
        first, stop = _candidates(rule, axis, _origins(axis, range(bin, bin + 1)), size)
    return range(first.item(), stop.item())


def _origins(axis: Axis, bins: range) -> np.ndarray:
    """(K, bins) where each bin begins."""
    numbers = np.arange(bins.start, bins.stop).astype(axis.start.dtype)
    origins: np.ndarray = axis.start[:, None] + numbers * axis.bin[:, None]
    return origins


def _candidates(rule: Rule, axis: Axis, origin: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(K, bins) ranges [first, stop) of sample indices, outside of which no sample lies inside the image."""
    stop = np.broadcast_to(axis.samples[:, None], origin.shape)
    first = np.zeros_like(stop)
    if axis.samples.max(initial=0) <= EVERY_SAMPLE:
        return first, stop
    start, step = origin.astype(np.float64), axis.bin.astype(np.float64)[:, None]
    pitch = step / axis.samples[:, None]
    # Positions are rounded, at each of a few operations, relative to the largest number that takes part.
    rounding = 8 * float(np.finfo(axis.start.dtype).eps)
    slack = (
        rounding * np.abs(axis.start.astype(np.float64))[:, None] + rounding * np.abs(start) + rounding * np.abs(step)
    )
    ends = np.stack([((-1 - slack) - start) / pitch, ((size + slack) - start) / pitch]) - 0.5
    lower = np.clip(np.floor(ends.min(axis=0)), 0, stop)
    upper = np.clip(np.ceil(ends.max(axis=0)) + 1, lower, stop)
    narrow = (stop > EVERY_SAMPLE) & (pitch != 0)
    first = np.where(narrow, lower, first)
    stop = np.where(narrow, upper, stop)
    stop = np.where(np.isfinite(start) & np.isfinite(step), stop, 0)  # overflowed: no position is a number
    return np.where(stop > 0, first, 0).astype(np.int64), stop.astype(np.int64)


def _taps(rule: Rule, position: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two pixels that each position lies between, and the weight of the second.

    The difference of the two is the slope to the position, so at a pixel's centre, where interpolation has a
    kink, the choice of taps chooses the slope. TensorFlow takes floor and ceil, which are one pixel there: slope
    0. The other operators take the next pixel with weight 0: the slope toward larger positions; at the last pixel,
    which has no next one, toward smaller. Where positions are clamped the slope is 0.
    """
    if rule.nearest:
        low = np.floor(position)
        # not floor(position + 0.5): that sum is rounded, and 0.49999997 would go up
        low = (low + (position - low >= 0.5)).astype(np.int64)
        return low, low, np.zeros_like(position)
    if rule.clamps:
        inner = (position >= 0).astype(np.int64)
        position = np.clip(position, 0, size - 1)
        low = position.astype(np.int64)
        high = np.minimum(low + inner, size - 1)
    elif rule.dialect is Dialect.CROP_AND_RESIZE:
        low = position.astype(np.int64)
        high = np.ceil(position).astype(np.int64)
    else:
        low = np.minimum(position.astype(np.int64), max(size - 2, 0))
        high = np.minimum(low + 1, size - 1)
    return low, high, position - low.astype(position.dtype)
