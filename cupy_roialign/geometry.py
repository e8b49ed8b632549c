"""Box rules: from a box to sample positions, and their derivatives. The one place of every dialect's arithmetic.

An axis-aligned RoI operator treats each axis alone. On one axis a box becomes a run of sample positions,
in units of pixels, pixel 0 having its centre at 0:

    position(p, i) = start + p*bin + (i + offset)*bin/samples        p = 0..bins-1, i = 0..samples-1

The ``samples`` of a bin are averaged. A border rule says what a position outside of the image means, and
an interpolation rule which two pixels (*taps*) a position inside it lies between.

Every operation here is done in one precision (see `precision`), in the order in which the peers do it, and
without fused multiply-add: a sample that sits exactly on an edge must fall on the same side everywhere.

Broken and huge boxes make NumPy warn of what it does with them, which is for the caller to silence.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    def fixed_samples(self) -> int:
        """Samples that every bin takes along an axis; 0 where that follows the box."""
        return self.sampling_ratio if self.dialect is Dialect.ROI_ALIGN else 1

    @property
    def offset(self) -> float:
        return 0.5 if self.dialect is Dialect.ROI_ALIGN else 0.0


class Axes(NamedTuple):
    """K boxes along A axes: y and x, or one of them. `start` and `bin` are affine in a box's edges, piece by piece."""

    start: np.ndarray  # (A, K)
    bin: np.ndarray  # (A, K)
    samples: np.ndarray  # (A, K) int64, of a bin; 0 where the box takes none
    bins: tuple[int, ...]  # (A,) of a box
    sizes: tuple[int, ...]  # (A,) pixels of the image

    def of(self, boxes: slice | np.ndarray) -> Axes:
        """Some of the boxes."""
        return Axes(self.start[:, boxes], self.bin[:, boxes], self.samples[:, boxes], self.bins, self.sizes)

    def along(self, axis: int) -> Axes:
        """One of the axes."""
        some = slice(axis, axis + 1)
        return Axes(self.start[some], self.bin[some], self.samples[some], self.bins[some], self.sizes[some])


class EdgeSlopes(NamedTuple):
    """How `start` and `bin` of K boxes follow their edges (lo, hi) along y and x; each of these is (2, K)."""

    start: tuple[Any, Any]  # d start / d (lo, hi)
    bin: tuple[Any, Any]  # d bin / d (lo, hi)

    def gradient(self, of_start: np.ndarray, of_bin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gradients to (lo, hi) from those to `start` and `bin`."""
        low, high = (of_start * s + of_bin * b for s, b in zip(self.start, self.bin, strict=True))
        return low, high

    def change(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How `start` and `bin` change where (lo, hi) change by so much."""
        of_start, of_bin = (low * slopes[0] + high * slopes[1] for slopes in (self.start, self.bin))
        return of_start, of_bin


class Part(NamedTuple):
    """Some of the samples of boxes."""

    bins: tuple[range, ...]  # (A,) along each axis
    first: int = 0  # in each bin the samples from here
    stop: int = np.iinfo(np.int64).max  # up to here


def whole(rule: Rule) -> Part:
    """All samples of boxes along y and x."""
    return Part(tuple(map(range, rule.bins)))


class Samples(NamedTuple):
    """The samples of K boxes that lie inside the image along one of A axes, in the order of (axis, k, p, i).

    A box along one axis is a *line*: first come the K lines of the first axis, then those of the second.
    """

    line: np.ndarray  # (S,) int64, axis * K + k
    bin: np.ndarray  # (S,) int64, p, counted from the first bin of the part
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


def finite(rule: Rule, boxes: np.ndarray) -> np.ndarray | None:
    """(K,) bool: all four coordinates of a box are; None: those of all boxes."""
    if math.isfinite(boxes.sum()):
        return None
    sound: np.ndarray = np.isfinite(boxes.take(rule.columns, axis=1)).all(axis=1)
    return None if sound.all() else sound


def edges(rule: Rule, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(2, K) and (2, K): where boxes (K, 4 or 5) begin and end, along y and x."""
    both = boxes.T.take(rule.columns, axis=0)
    return both[:2], both[2:]


def resolve(rule: Rule, boxes: np.ndarray, sizes: tuple[int, ...]) -> Axes:
    """The rule on boxes, (K, 4 or 5) of float32 or float64, in images of these (height, width).

    A box with a coordinate that is not finite has positions that are not numbers, and so no sample inside the image.
    """
    real = boxes.dtype.type
    low, high = edges(rule, boxes)
    bins = column(rule.bins, boxes.dtype)
    if rule.dialect is Dialect.ROI_ALIGN:
        start, extent = _extent(rule, low, high)
        step = (extent if rule.aligned else np.maximum(extent, real(1))) / bins
    else:
        last = column(tuple(size - 1 for size in sizes), boxes.dtype)
        if rule.dialect is not Dialect.CROP_AND_RESIZE:
            # In an image of one pixel the peer divides 0 by 0. Pixels stay pixels there instead.
            last = np.maximum(last, real(1))
            if rule.dialect is Dialect.ROI_CROP_CENTERS:
                spacing = (high - low) / bins
                low = (low + spacing / real(2) - real(0.5)) / last
                high = low + spacing * (bins - real(1)) / last
            else:
                low, high = low / last, high / last
        start = low * last
        step = ((high - low) * last) / (bins - real(1))
        if 1 in rule.bins:
            start = np.where(bins > 1, start, (real(0.5) * (low + high)) * last)
            step = np.where(bins > 1, step, real(0))
    if rule.fixed_samples:
        samples = np.full(step.shape, rule.fixed_samples, np.int64)
    else:
        # More pixels a bin than numbers i + 0.5 are exact are sampled more thinly, still evenly: so the
        # cost of a box as wide as floats go stays that of the image.
        wanted = np.minimum(np.ceil(step), real(2.0 ** np.finfo(real).nmant))
        samples = np.where(wanted > 0, wanted, 0).astype(np.int64)
    sound = finite(rule, boxes)
    if sound is not None:
        start, step = np.where(sound, start, real(np.nan)), np.where(sound, step, real(0))
        samples = np.where(sound, samples, 0)
    return Axes(start, step, samples, rule.bins, sizes)


def edge_slopes(rule: Rule, boxes: np.ndarray, sizes: tuple[int, ...]) -> EdgeSlopes:
    """The derivatives of what `resolve` gives."""
    bins = column(rule.bins)
    several = bins > 1
    if rule.dialect is Dialect.ROI_ALIGN:
        scale = float(np.float32(rule.spatial_scale) if boxes.dtype == np.float32 else rule.spatial_scale)
        grows = True if rule.aligned else _extent(rule, *edges(rule, boxes))[1] >= 1
        start: tuple[Any, Any] = (scale, 0.0)
        growth = scale * grows / bins
    elif rule.dialect is Dialect.ROI_CROP_CENTERS:
        half = 0.5 / bins
        start, growth = (1.0 - half, half), 1.0 / bins
    else:
        unit: Any = 1.0  # pixels in a unit of the box's coordinates
        if rule.dialect is Dialect.CROP_AND_RESIZE:
            unit = column(sizes) - 1
        start = (np.where(several, unit, 0.5 * unit), np.where(several, 0.0, 0.5 * unit))
        growth = np.where(several, unit / np.maximum(bins - 1, 1), 0.0)
    return EdgeSlopes(start, (-growth, growth))


def _extent(rule: Rule, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where boxes of ROI_ALIGN begin, and how far they reach before they are widened."""
    real = low.dtype.type
    scale, offset = real(rule.spatial_scale), real(0.5 if rule.aligned else 0.0)
    start = low * scale - offset
    return start, (high * scale - offset) - start


@functools.lru_cache(maxsize=256)
def column(values: tuple[int, ...], dtype: np.dtype | str = "float64") -> np.ndarray:
    """(A, 1) numbers, one for each axis."""
    column = np.array(values, dtype)[:, None]
    column.flags.writeable = False
    return column


def inside_samples(rule: Rule, axes: Axes, part: Part) -> Samples:
    """Those samples of `part` that lie inside the image, with their taps.

    At most about 2*size + 2*bins a line, however many its bins hold, unless `sampling_ratio` asks for more.
    """
    origin = _origins(axes, part.bins)
    count, widest = origin.shape[1:]
    low, high = _bounds(rule.clamps, axes.sizes, origin.dtype)
    most = rule.fixed_samples or int(axes.samples.max(initial=1))
    whole = part.first == 0 and part.stop >= most
    few = rule.fixed_samples or most * axes.samples.size <= 2 * axes.samples.sum() + FEW
    if whole and most <= EVERY_SAMPLE and few:
        # a grid, of which boxes with fewer samples than others use a part
        index, samples = np.arange(most), axes.samples[..., None, None]
        position = _positions(rule, origin[..., None], index, axes.bin[..., None, None], samples)
        inside = (position >= low) & (position <= high[:, None, None, None])
        if not rule.fixed_samples:
            inside &= index < samples
        line, bin_, number = inside.reshape(-1, widest, most).nonzero()
        position = position[inside]
        axis = (line >= count).astype(np.intp)
    else:
        first, stop = _candidates(rule, axes, origin)
        first = np.maximum(first, part.first)
        stop = np.clip(stop, first, part.stop)
        tried = (stop - first).ravel()
        row = np.repeat(np.arange(tried.size), tried)
        before = np.cumsum(tried) - tried
        number = np.arange(row.size) - (before - first.ravel())[row]
        line = row // widest
        position = _positions(rule, origin.ravel()[row], number, axes.bin.ravel()[line], axes.samples.ravel()[line])
        axis = (line >= count).astype(np.intp)
        inside = (position >= low) & (position <= high[axis])
        row, number, position, axis = (a[inside] for a in (row, number, position, axis))
        line, bin_ = np.divmod(row, widest)
    return Samples(line, bin_, number, *_taps(rule, position, np.array(axes.sizes)[axis]))


def _positions(rule: Rule, origin: np.ndarray, number: np.ndarray, bin: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Where the samples of these numbers lie in bins that begin at `origin`."""
    real = origin.dtype.type
    positions: np.ndarray = origin + ((number.astype(real) + real(rule.offset)) * bin) / samples.astype(real)
    return positions


@functools.lru_cache(maxsize=256)
def _bounds(clamps: bool, sizes: tuple[int, ...], dtype: np.dtype) -> tuple[int, np.ndarray]:
    """The least and, (A,), the greatest positions inside images of these sizes."""
    exact = np.array(sizes, np.float64) - (0 if clamps else 1)
    high = exact.astype(dtype)
    # Down, where it has been rounded: what lies beyond must not be taken for inside.
    high = np.where(high > exact, np.nextafter(high, dtype.type(0)), high)
    high.flags.writeable = False
    return (-1 if clamps else 0), high


def most_samples(rule: Rule, axes: Axes) -> np.ndarray:
    """(A, K) float64: about how many samples of a line `inside_samples` tries at most."""
    bins = column(axes.bins)
    samples = bins * axes.samples
    if not rule.fixed_samples:  # at most about two samples a pixel lie inside
        samples = np.minimum(samples, 2 * column(axes.sizes) + bins * EVERY_SAMPLE)
    return samples


def sample_range(rule: Rule, axes: Axes, bin: int) -> range:
    """Of one box along one axis, and one bin: the samples outside of which none lies inside the image."""
    first, stop = _candidates(rule, axes, _origins(axes, (range(bin, bin + 1),)))
    return range(first.item(), stop.item())


def _origins(axes: Axes, bins: tuple[range, ...]) -> np.ndarray:
    """(A, K, most bins) where each bin begins; NaN where one axis has fewer of them than the other."""
    widest = max(bins, key=len)
    numbers = np.arange(widest.start, widest.stop).astype(axes.start.dtype)
    if bins.count(widest) < len(bins):
        numbers = np.full((len(bins), 1, len(widest)), np.nan, axes.start.dtype)
        for axis, along in enumerate(bins):
            numbers[axis, 0, : len(along)] = along
    origins: np.ndarray = axes.start[..., None] + numbers * axes.bin[..., None]
    return origins


def _candidates(rule: Rule, axes: Axes, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(A, K, bins) ranges [first, stop) of sample indices, outside of which no sample lies inside the image."""
    stop = np.broadcast_to(axes.samples[..., None], origin.shape)
    first = np.zeros_like(stop)
    if axes.samples.max(initial=0) <= EVERY_SAMPLE:
        return first, stop
    start, step = origin.astype(np.float64), axes.bin.astype(np.float64)[..., None]
    pitch = step / axes.samples[..., None]
    # Positions are rounded, at each of a few operations, relative to the largest number that takes part.
    rounding = 8 * float(np.finfo(axes.start.dtype).eps)
    slack = (
        rounding * np.abs(axes.start.astype(np.float64))[..., None] + rounding * np.abs(start) + rounding * np.abs(step)
    )
    size = column(axes.sizes)[..., None]
    ends = np.stack([((-1 - slack) - start) / pitch, ((size + slack) - start) / pitch]) - 0.5
    lower = np.clip(np.floor(ends.min(axis=0)), 0, stop)
    upper = np.clip(np.ceil(ends.max(axis=0)) + 1, lower, stop)
    narrow = (stop > EVERY_SAMPLE) & (pitch != 0)
    first = np.where(narrow, lower, first)
    stop = np.where(narrow, upper, stop)
    stop = np.where(np.isfinite(start) & np.isfinite(step), stop, 0)  # no position is a number
    return np.where(stop > 0, first, 0).astype(np.int64), stop.astype(np.int64)


def _taps(rule: Rule, position: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two pixels that each position lies between, and the weight of the second. `size`: of the image, for each.

    The difference of the two is the slope to the position, so at a pixel's centre, where interpolation has a
    kink, the choice of taps chooses the slope. TensorFlow takes floor and ceil, which are one pixel there: slope
    0. The other operators take the next pixel with weight 0: the slope toward larger positions; at the last pixel,
    which has no next one, toward smaller. Where positions are clamped the slope is 0.
    """
    real = position.dtype
    if rule.nearest:
        floor = np.floor(position)
        # not floor(position + 0.5): that sum is rounded, and 0.49999997 would go up
        low = (floor + (position - floor >= 0.5)).astype(np.int64)
        return low, low, np.zeros_like(position)
    last = size - 1
    if rule.clamps:
        inner = position >= 0
        position = np.minimum(np.maximum(position, 0), last.astype(real))
        low = np.minimum(position.astype(np.int64), last)  # `last` may have been rounded up
        high = np.minimum(low + inner, last)
    elif rule.dialect is Dialect.CROP_AND_RESIZE:
        low = position.astype(np.int64)
        high = np.ceil(position).astype(np.int64)
    else:
        low = np.minimum(position.astype(np.int64), np.maximum(last - 1, 0))
        high = np.minimum(low + 1, last)
    return low, high, position - low.astype(real)
