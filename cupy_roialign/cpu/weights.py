"""Boxes as weights on pixels: what a call on the CPU is about, and its weights along each axis.

On one axis a box is a sparse matrix, of bins by pixels. A call's boxes are worked on in groups, whose matrices are
held together as compressed rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_roialign import arrays, geometry
from cupy_roialign.rule import Rule, terms

WORKSPACE = 32 * 2**20
"""Bytes that a copy of a part of the features may take, and about as many the weights of the boxes at work."""

SAMPLES = 2**14
"""Samples that NumPy works out at a time."""

_ENTRY = 48  # bytes of an entry of `Rows`, and of what it is made from


class Rows(NamedTuple):
    """The weights of K boxes along one axis, as compressed rows: row k*bins + p is bin p of box k.

    A pixel occurs once in a row, and none has only zeros.
    """

    begin: np.ndarray  # (K*bins + 1,) int64: the entries of row r are begin[r] to begin[r + 1]
    extent: np.ndarray  # (2, K) int64: the first pixel of a box, and the one behind the last; size, 0 of none
    pixel: np.ndarray  # (E,) int64
    value: np.ndarray  # (E,) weight
    to_start: np.ndarray  # (E,) derivative of the weight with respect to the box's start; empty if not asked for
    to_step: np.ndarray  # (E,) and to its step

    def along(self, bins: int, start: np.ndarray, step: np.ndarray) -> Rows:
        """The derivative of the weights where the starts and steps of the boxes, (K,), change by so much."""
        box = np.repeat(np.arange(len(start)), np.diff(self.begin[::bins]))
        value = self.to_start * start[box] + self.to_step * step[box]
        kept = value != 0
        begin = np.concatenate([[0], np.cumsum(kept)])[self.begin]
        value = value[kept].astype(self.value.dtype)
        return Rows(begin, self.extent, self.pixel[kept], value, np.zeros_like(value), np.zeros_like(value))

    def weighty(self) -> Rows:
        """Without the entries that only the slopes have: 0 times a pixel that is NaN is NaN."""
        if self.value.all():
            return self
        kept = self.value != 0
        begin = np.concatenate([[0], np.cumsum(kept)])[self.begin]
        slopes = (column[kept] if len(column) else column for column in self[4:])
        return Rows(begin, self.extent, self.pixel[kept], self.value[kept], *slopes)


Build = Callable[[Rule, np.ndarray, np.ndarray, int, int, bool, np.dtype], Rows]
"""Rows of boxes along one axis: rule, low and high (K,), bins, pixels, with slopes?, dtype of the weights."""


class Job(NamedTuple):
    """A call but for its features and gradients."""

    shape: tuple[int, ...]  # of the features
    dtype: np.dtype  # to compute in
    low: np.ndarray  # (2, K) where boxes begin along y and x, in the precision of positions; NaN for broken boxes
    high: np.ndarray  # (2, K) and where they end
    images: np.ndarray  # (K,) int64, in range
    broken: np.ndarray | None  # (K,) bool: some coordinate is not finite; None: of no box
    rule: Rule
    directions: Sequence[np.ndarray]  # changes of the boxes, each like the boxes

    @classmethod
    def of(
        cls, features: Any, boxes: np.ndarray, images: np.ndarray, rule: Rule, directions: Sequence[np.ndarray]
    ) -> Job:
        name = arrays.dtype_name(features)
        real = geometry.precision(rule, name, arrays.dtype_name(boxes))
        edges = _edges(rule, boxes).astype(real)
        broken = None
        if not math.isfinite(edges.sum()):
            broken = ~np.isfinite(edges).all(axis=0)
            edges[:, broken] = np.nan
        dtype = np.dtype(arrays.compute_name(name))
        return cls(tuple(features.shape), dtype, edges[:2], edges[2:], images, broken, rule, directions)

    @property
    def boxes(self) -> int:
        """K."""
        return self.low.shape[1]

    def free_axes(self) -> list[list[int]]:
        """For each term of `weights` the axes that follow no direction: only these change with the boxes once more."""
        return [[axis for axis in (0, 1) if term[axis] is None] for term in terms(len(self.directions))]

    def changed(self, of: tuple[Rows, Rows], axis: int, slope: int) -> tuple[Rows, Rows]:
        """Rows of y and x where those of an axis follow the box's start (0) or step (1)."""
        rows = of[axis]._replace(value=of[axis][4 + slope]).weighty()
        return (rows, of[1].weighty()) if axis == 0 else (of[0].weighty(), rows)

    def sampled(self) -> list[np.ndarray]:
        """(K, bins) bool along y and x: whether a bin has a sample inside; of operators with one sample per bin."""
        result = []
        for low, high, bins, size in zip(self.low, self.high, self.rule.bins, self.shape[2:], strict=True):
            real = low.dtype.type
            start, step, _ = geometry.affine(self.rule, low[:, None], high[:, None], bins, size, real)
            position = geometry.origin(start, step, np.arange(bins), real)
            result.append(geometry.inside(self.rule, position, size))
        return result

    def weights(self, build: Build, slopes: bool = False) -> Iterator[tuple[slice, list[tuple[Rows, Rows]]]]:
        """For groups of boxes: which, and for each term of the derivative along the directions the rows of y and x.

        With `slopes` the rows tell how weights follow the boxes.
        """
        for some in self._groups():
            plain = [
                build(self.rule, low[some], high[some], bins, size, slopes or bool(self.directions), self.dtype)
                for low, high, bins, size in zip(self.low, self.high, self.rule.bins, self.shape[2:], strict=True)
            ]
            changed = [self._along(plain, direction, some) for direction in self.directions]
            fixed = plain if slopes else [along.weighty() for along in plain]
            taken = terms(len(self.directions))
            y = [fixed[0] if of_y is None else changed[of_y][0] for of_y, _ in taken]
            x = [fixed[1] if of_x is None else changed[of_x][1] for _, of_x in taken]
            yield some, list(zip(y, x, strict=True))

    def _along(self, rows: list[Rows], direction: np.ndarray, some: slice) -> list[Rows]:
        edges = _edges(self.rule, direction[some].astype(np.float64))
        return [
            rows[axis].along(self.rule.bins[axis], low * slopes[0] + high * slopes[1], (high - low) * slopes[2])
            for axis, (low, high, slopes) in enumerate(zip(edges[:2], edges[2:], self.slopes(some), strict=True))
        ]

    def slopes(self, some: slice) -> list[tuple[Any, Any, Any]]:
        """`geometry.edge_slopes` along y and x."""
        real = self.low.dtype.type
        return [
            geometry.edge_slopes(self.rule, low[some], high[some], bins, size, real)
            for low, high, bins, size in zip(self.low, self.high, self.rule.bins, self.shape[2:], strict=True)
        ]

    def _groups(self) -> Iterator[slice]:
        """Boxes whose rows fit into the workspace; a single one where they do not."""
        along = zip(self.low, self.high, self.rule.bins, self.shape[2:], strict=True)
        each, most, start = sum(entries(self.rule, *axis) for axis in along), WORKSPACE // _ENTRY, 0
        if isinstance(each, int) and each * self.boxes <= most:
            yield slice(0, self.boxes)
            return
        ends = np.cumsum(np.broadcast_to(each, self.boxes))
        while start < self.boxes:
            limit = most + (ends[start - 1] if start else 0)
            stop = max(start + 1, int(np.searchsorted(ends, limit, "right")))
            yield slice(start, stop)
            start = stop


def entries(rule: Rule, low: np.ndarray, high: np.ndarray, bins: int, size: int) -> Any:
    """At most how many entries boxes have along an axis: (K,), or one number for all."""
    samples = rule.sampling_ratio or geometry.affine(rule, low, high, bins, size, low.dtype.type)[2]
    return bins * (min(2 * samples, size) if isinstance(samples, int) else np.minimum(2 * samples, size))


def _edges(rule: Rule, boxes: np.ndarray) -> np.ndarray:
    """(4, K): y1, x1, y2, x2 of boxes (K, 4 or 5), or of changes of them."""
    return boxes.T.take(rule.columns, axis=0)


def rows(rule: Rule, low: np.ndarray, high: np.ndarray, bins: int, size: int, slopes: bool, dtype: np.dtype) -> Rows:
    """`Rows` by NumPy."""
    real = low.dtype.type
    start, step, samples = geometry.affine(rule, low, high, bins, size, real)
    start, step, samples = (np.repeat(np.broadcast_to(a, low.shape), bins) for a in (start, step, samples))
    p = np.tile(np.arange(bins), len(low))
    origin = geometry.origin(start, step, p, real)
    first, stop = geometry.candidates(start, step, samples, origin, size, real)
    parts: list[tuple[np.ndarray, ...]] = []
    ends = np.cumsum(stop - first)
    row = 0
    while row < len(p) or not parts:
        end = max(row + 1, int(np.searchsorted(ends, SAMPLES + (ends[row - 1] if row else 0), "right")))
        some = slice(row, end)
        tried = (stop - first)[some]
        of = np.repeat(np.arange(row, end), tried)
        number = np.arange(len(of)) - np.repeat(np.cumsum(tried) - tried - first[some], tried)
        position = geometry.position(rule, origin[of], step[of], samples[of], number, real)
        inside = geometry.inside(rule, position, size)
        of, number, position = of[inside], number[inside], position[inside]
        parts.append(_merged(rule, of, p, samples, number, position, size, slopes, real))
        row = end
    key, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    begin, pixel = np.searchsorted(key, np.arange(len(p) + 1) * size), key % size
    extent = np.repeat(np.array([[size], [0]]), len(low), axis=1)
    box = np.repeat(np.arange(len(low)), np.diff(begin[::bins]))
    np.minimum.at(extent[0], box, pixel)
    np.maximum.at(extent[1], box, pixel + 1)
    return Rows(begin, extent, pixel, *(column.astype(dtype) for column in columns))


def _merged(
    rule: Rule,
    row: np.ndarray,
    p: np.ndarray,
    samples: np.ndarray,
    number: np.ndarray,
    position: np.ndarray,
    size: int,
    slopes: bool,
    real: Any,
) -> tuple[np.ndarray, ...]:
    """Samples of some rows as entries: row*size + pixel, in order, and what each weighs; summed in sample order."""
    low, high, fraction = geometry.taps(rule, position, size, real)
    key, place = np.unique(np.stack([row * size + low, row * size + high], axis=1), return_inverse=True)
    share, fraction = 1.0 / samples[row], fraction.astype(np.float64)

    def total(of_low: np.ndarray, of_high: np.ndarray) -> np.ndarray:
        return np.bincount(place.ravel(), np.stack([of_low, of_high], axis=1).ravel(), len(key))

    columns = [total((1 - fraction) * share, fraction * share)]
    if slopes:
        change = np.where(high > low, share, 0.0)
        lever = geometry.lever(rule, p[row], samples[row], number)
        columns += [total(-slope, slope) for slope in (change, change * lever)]
    kept = functools.reduce(np.logical_or, [column != 0 for column in columns])
    empty: list[np.ndarray] = [np.zeros(0)] * (3 - len(columns))
    return key[kept], *(column[kept] for column in columns), *empty
