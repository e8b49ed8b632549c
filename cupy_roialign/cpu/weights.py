"""Boxes as weights on pixels: what a call on the CPU is about, and its weights along each axis.

On one axis a box is a sparse matrix, of bins by pixels. A call's boxes are worked on in groups, whose matrices are
held together as compressed rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from cupy_roialign import arrays, geometry
from cupy_roialign.rule import Rule, terms

WORKSPACE = 32 * 2**20
"""Bytes that a copy of a part of the features may take, and about as many the weights of the boxes at work."""

SAMPLES = 2**14
"""Samples that NumPy works out at a time."""

_ENTRY = 48  # bytes of an entry of `Rows`, and of what it is made from


class Rows(NamedTuple):
    """The weights of K boxes along both axes, as compressed rows.

    First come those of y, of which row k*bins_y + p is bin p of box k, then those of x. A pixel occurs once in a row.
    """

    begin: np.ndarray  # (K*bins_y + K*bins_x + 1,) int64: the entries of row r are begin[r] to begin[r + 1]
    extent: np.ndarray  # (2, 2, K) int64 along y, x: a box's first pixel, and the one behind its last; of none size, 0
    pixel: np.ndarray  # (E,) int64
    values: np.ndarray  # (1 or 3, E): the weight; its derivatives with respect to the box's start, and to its step
    most: tuple[int, int]  # entries of a box along y, and along x

    @property
    def entries(self) -> int:
        return int(self.begin[-1])

    def row(self, axis: int, k: int, bins: tuple[int, int]) -> int:
        """The first row of box k."""
        return k * bins[0] if axis == 0 else self.extent.shape[2] * bins[0] + k * bins[1]


Build = Callable[["Job", slice, bool, int], Rows]
"""Rows of some boxes of a job, with or without slopes; at most so many entries."""

Term = tuple[np.ndarray, np.ndarray]
"""What to take along y, and along x, in place of `Rows.values`: (E,) each."""


@dataclasses.dataclass
class Job:
    """A call but for its features and gradients."""

    shape: tuple[int, ...]  # of the features
    dtype: np.dtype  # to compute in
    boxes: np.ndarray  # (K, 4 or 5), in the precision of positions
    images: np.ndarray  # (K,) int64, in range
    rule: Rule
    directions: Sequence[np.ndarray]  # changes of the boxes, each like the boxes

    @classmethod
    def of(
        cls, features: Any, boxes: np.ndarray, images: np.ndarray, rule: Rule, directions: Sequence[np.ndarray]
    ) -> Job:
        name = arrays.dtype_name(features)
        real = geometry.precision(rule.frame, name, arrays.dtype_name(boxes))
        dtype = np.dtype(arrays.compute_name(name))
        return cls(tuple(features.shape), dtype, boxes.astype(real, copy=False), images, rule, directions)

    @functools.cached_property
    def broken(self) -> np.ndarray | None:
        """(K,) bool: some coordinate is not finite; None: of no box."""
        if math.isfinite(np.add.reduce(self.boxes, axis=None)):
            return None
        return ~np.isfinite(self.boxes[:, self.rule.columns]).all(axis=1)

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """(2, 2, K): where boxes begin along y and x, and where they end; NaN for broken boxes."""
        edges = _edges(self.rule, self.boxes)
        if self.broken is not None:
            edges[:, self.broken] = np.nan
        return edges.reshape(2, 2, -1)

    def axes(self, some: slice = slice(None)) -> Iterator[tuple[np.ndarray, np.ndarray, int, int]]:
        """Along y and x: low and high of some boxes, bins and pixels."""
        low, high = self.edges[:, :, some]
        return zip(low, high, self.rule.bins, self.shape[2:], strict=True)

    def free_axes(self) -> list[list[int]]:
        """For each term of `weights` the axes that follow no direction: only these change with the boxes once more."""
        return [[axis for axis in (0, 1) if term[axis] is None] for term in terms(len(self.directions))]

    def sampled(self) -> list[np.ndarray]:
        """(K, bins) bool along y and x: whether a bin has a sample inside; of operators with one sample per bin."""
        result, real = [], self.boxes.dtype.type
        for low, high, bins, size in self.axes():
            start, step, _ = geometry.affine(self.rule, low[:, None], high[:, None], bins, size, real)
            position = geometry.origin(start, step, np.arange(bins), real)
            result.append(geometry.inside(self.rule, position, size))
        return result

    def weights(self, build: Build, slopes: bool = False) -> Iterator[tuple[slice, Rows, list[Term]]]:
        """For groups of boxes: which, their rows, and the terms of the derivative along the directions.

        With `slopes` the rows tell how weights follow the boxes.
        """
        for some, most in self._groups():
            rows = build(self, some, slopes or bool(self.directions), most)
            if not self.directions:
                yield some, rows, [(rows.values[0], rows.values[0])]
                continue
            changed = [self._along(rows, direction, some) for direction in self.directions]
            term = [tuple(rows.values[0] if d is None else changed[d] for d in t) for t in terms(len(self.directions))]
            yield some, rows, cast(list[Term], term)

    def _along(self, rows: Rows, direction: np.ndarray, some: slice) -> np.ndarray:
        """(E,): the derivative of the weights along a direction."""
        starts, steps, edges = [], [], _edges(self.rule, direction[some].astype(np.float64))
        for low, high, bins, slopes in zip(edges[:2], edges[2:], self.rule.bins, self.slopes(some), strict=True):
            starts.append(np.repeat(low * slopes[0] + high * slopes[1], bins))
            steps.append(np.repeat((high - low) * slopes[2], bins))
        counts, entries = np.diff(rows.begin), rows.entries
        start, step = (np.repeat(np.concatenate(each), counts) for each in (starts, steps))
        return (rows.values[1, :entries] * start + rows.values[2, :entries] * step).astype(self.dtype)

    def slopes(self, some: slice) -> list[tuple[Any, Any, Any]]:
        """`geometry.edge_slopes` along y and x."""
        real = self.boxes.dtype.type
        return [geometry.edge_slopes(self.rule, *axis, real) for axis in self.axes(some)]

    def most_entries(self) -> tuple[Any, Any]:
        """How many entries a box has at most along y and along x: two ints for all boxes, or (K,) each."""
        ratio, real = self.rule.sampling_ratio, self.boxes.dtype.type
        (bins_y, bins_x), (height, width) = self.rule.bins, self.shape[2:]
        if ratio:
            return bins_y * min(2 * ratio, height), bins_x * min(2 * ratio, width)
        y, x = (geometry.affine(self.rule, *axis, real)[2] for axis in self.axes())  # samples per bin
        return bins_y * np.minimum(2 * y, height), bins_x * np.minimum(2 * x, width)

    def _groups(self) -> Iterator[tuple[slice, int]]:
        """Boxes whose rows fit into the workspace, or a single one where they do not; and at most how many entries."""
        count, most, each = len(self.boxes), WORKSPACE // _ENTRY, sum(self.most_entries())
        if isinstance(each, int) and each * count <= most:
            yield slice(0, count), each * count
            return
        start, ends = 0, np.cumsum(np.broadcast_to(each, count))
        while start < count:
            limit = most + (ends[start - 1] if start else 0)
            stop = max(start + 1, int(np.searchsorted(ends, limit, "right")))
            yield slice(start, stop), int(ends[stop - 1] - (ends[start - 1] if start else 0))
            start = stop


def _edges(rule: Rule, boxes: np.ndarray) -> np.ndarray:
    """(4, K): y1, x1, y2, x2 of boxes (K, 4 or 5), or of changes of them."""
    return boxes.T.take(rule.columns, axis=0)


def rows(job: Job, some: slice, slopes: bool, _most: int) -> Rows:
    """`Rows` by NumPy."""
    along = [_rows(job.rule, *axis, slopes) for axis in job.axes(some)]
    ends, extents, pixels, values = zip(*along, strict=True)
    begin = np.concatenate([[0], *ends])
    y, x = (int(np.diff(end[bins - 1 :: bins], prepend=0).max()) for end, bins in zip(ends, job.rule.bins, strict=True))
    begin[1 + len(ends[0]) :] += ends[0][-1]
    value = np.concatenate([each.astype(job.dtype) for each in values], axis=1)
    return Rows(begin, np.stack(extents), np.concatenate(pixels), value, (y, x))


def _rows(
    rule: Rule, low: np.ndarray, high: np.ndarray, bins: int, size: int, slopes: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Along one axis: where rows end, the extent, and pixels and values of the entries."""
    real = low.dtype.type
    start, step, samples = geometry.affine(rule, low, high, bins, size, real)
    start, step, samples = (np.repeat(np.broadcast_to(a, low.shape), bins) for a in (start, step, samples))
    p = np.tile(np.arange(bins), len(low))
    origin = geometry.origin(start, step, p, real)
    first, stop = geometry.candidates(start, step, samples, origin, size, real)
    row, ends = 0, np.cumsum(stop - first)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    while row < len(p) or not parts:
        end = max(row + 1, int(np.searchsorted(ends, SAMPLES + (ends[row - 1] if row else 0), "right")))
        some = slice(row, end)
        tried = (stop - first)[some]
        of = np.repeat(np.arange(row, end), tried)
        number = np.arange(len(of)) - np.repeat(np.cumsum(tried) - tried - first[some], tried)
        position = geometry.position(rule, origin[of], step[of], samples[of], number, real)
        inside = geometry.inside(rule, position, size)
        of, number, taps = of[inside], number[inside], geometry.taps(rule, position[inside], size, real)
        lever, share = geometry.lever(rule, p[of], samples[of], number), 1.0 / samples[of]
        of *= size
        parts.append(_merged(of, taps, share, lever, slopes))
        row = end
    key, values = (np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))
    ends, pixel = np.searchsorted(key, np.arange(1, len(p) + 1) * size), key % size
    box, extent = key // size // bins, np.repeat(np.array([[size], [0]]), len(low), axis=1)
    np.minimum.at(extent[0], box, pixel)
    np.maximum.at(extent[1], box, pixel + 1)
    return ends, extent, pixel, values


def _merged(
    row: np.ndarray, taps: tuple[Any, Any, Any], share: np.ndarray, lever: np.ndarray, slopes: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of some rows as entries: `row` + pixel, in order, and their values; summed in the order of samples."""
    low, high, fraction = taps
    key, place = np.unique(np.stack([row + low, row + high], axis=1), return_inverse=True)
    fraction, change = fraction.astype(np.float64), np.where(high > low, share, 0.0)
    place = place.ravel()

    def total(of_low: np.ndarray, of_high: np.ndarray) -> np.ndarray:
        return np.bincount(place, np.stack([of_low, of_high], axis=1).ravel(), len(key))

    columns = [total((1 - fraction) * share, fraction * share)]
    if slopes:
        columns += [total(-slope, slope) for slope in (change, change * lever)]
    kept = np.any([column != 0 for column in columns], axis=0)
    return key[kept], np.stack([column[kept] for column in columns])
