"""The weights of many boxes along their axes: taps in; out a sparse matrix for all, or a few small dense ones each."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cupy_roialign import geometry

BLOCK = 16
"""Bins in one matrix, at most. Neighbouring bins touch neighbouring pixels: more bins are more products with zero,
fewer more matrices."""

PER_PRODUCT = 6e-6
"""What a multiplication takes, over what a matrix product takes besides, as fitted. n products of 1/n of the pixels and
bins each take least together where n * n is this times the multiplications of a single one for all."""

VECTOR = 8
"""Numbers that a processor multiplies at once: a block of more has a multiple of it."""

FEW_LINES, NARROW = 32, 64
"""Of so few lines, so few pixels from the first to the last are all taken, without a look at which they touch."""

Pixels = slice | np.ndarray
"""Rows or columns of an image, in increasing order."""


def count_of(pixels: Pixels) -> int:
    return pixels.stop - pixels.start if isinstance(pixels, slice) else len(pixels)


def first_of(pixels: Pixels) -> int:
    return pixels.start if isinstance(pixels, slice) else int(pixels[0])


def some_of(pixels: Pixels, part: slice) -> Pixels:
    if isinstance(pixels, slice):
        return slice(pixels.start + part.start, pixels.start + part.stop)
    return pixels[part]


class Line(NamedTuple):
    """The pixels that a box touches along an axis."""

    first: int
    stop: int
    number: int  # of pixels
    touched: np.ndarray | None  # None: all from first to stop

    def pixels(self, origin: int) -> Pixels:
        """Counted from `origin`."""
        return slice(self.first - origin, self.stop - origin) if self.touched is None else self.touched - origin


class Block(NamedTuple):
    """Some bins of a line and the pixels that they touch; or, to spread crops, some pixels and the bins that do.

    Counted among the line's bins and among its pixels.
    """

    to: slice
    of: slice
    matrix: np.ndarray  # (to, of)


class Taps:
    """K boxes along some axes: their samples inside the image, each between two pixels that it takes a weight of.

    A *line* is a box along an axis; those of the first axis come first.
    """

    def __init__(self, rule: geometry.Rule, axes: geometry.Axes, part: geometry.Part):
        samples = geometry.inside_samples(rule, axes, part)
        self.bins = part.bins  # (A,)
        self.boxes = axes.start.shape[1]  # K
        self.line, self.bin, self.number = samples.line, samples.bin, samples.number  # (S,)
        self.low, self.high = samples.low, samples.high  # (S,)
        # the part that a sample has in its bin
        self.share: Any = 1 / rule.fixed_samples if rule.fixed_samples else (1.0 / axes.samples.ravel())[samples.line]
        self.offset = rule.offset
        fraction = samples.fraction.astype(np.float64)
        self.weights = ((1 - fraction) * self.share, fraction * self.share)  # of `low` and `high`

    def along(self, axis: int) -> Taps:
        """Of all axes one."""
        some = slice(*self.line.searchsorted([axis * self.boxes, (axis + 1) * self.boxes]).tolist())
        taps = copy.copy(self)
        taps.bins = self.bins[axis : axis + 1]
        taps.line = self.line[some] - axis * self.boxes
        taps.bin, taps.number, taps.low, taps.high = (a[some] for a in (self.bin, self.number, self.low, self.high))
        taps.share = self.share if isinstance(self.share, float) else self.share[some]
        taps.weights = (self.weights[0][some], self.weights[1][some])
        return taps

    @property
    def shape(self) -> tuple[int, int]:
        """How many lines there are, and bins of a line that has the most."""
        return len(self.bins) * self.boxes, max(map(len, self.bins))

    @functools.cached_property
    def lever(self) -> np.ndarray:
        """(S,) d position / d bin."""
        first = np.array([along.start for along in self.bins])[self.line // self.boxes]
        lever: np.ndarray = first + self.bin + (self.number + self.offset) * self.share
        return lever

    def inside(self) -> list[np.ndarray]:
        """For each axis (K, bins) bool: the bin has a sample inside the image."""
        seen = np.zeros(self.shape, bool)
        seen[self.line, self.bin] = True
        lines = seen.reshape(len(self.bins), self.boxes, -1)
        return [some[:, : len(along)] for some, along in zip(lines, self.bins, strict=True)]

    def changes(self, of_start: np.ndarray, of_bin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How the weights change, where `start` and `bin`, (A, K), change by so much."""
        slope = (of_start.ravel()[self.line] + self.lever * of_bin.ravel()[self.line]) * self.share
        slope[self.low == self.high] = 0  # the sums of many that cancel are not 0
        return -slope, slope

    def position_gradient(self, at_low: np.ndarray, at_high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(A, K) and (A, K): the gradients to `start` and `bin` from those to the weights."""
        slope = (at_high.astype(np.float64) - at_low) * self.share
        of_start, of_bin = (
            np.bincount(self.line, values, self.shape[0]).reshape(len(self.bins), self.boxes)
            for values in (slope, slope * self.lever)
        )
        return of_start, of_bin


class AxisRows:
    """The weights of K boxes along an axis as a sparse matrix: a row for each bin, in it the pixels that it touches."""

    def __init__(self, taps: Taps):
        boxes, bins = taps.shape
        row = taps.line * bins + taps.bin
        left, right = span(row, taps.low, taps.high, boxes * bins)
        width = right - left
        begin = np.cumsum(width) - width
        low, high = begin[row] + taps.low - left[row], begin[row] + taps.high - left[row]
        touched = np.zeros(int(width.sum()), bool)
        touched[low] = touched[high] = True
        rank = np.concatenate([[0], np.cumsum(touched)])
        self.low, self.high = rank[low], rank[high]  # (S,) places of the taps among the entries
        self.begin = rank[np.concatenate([begin, [len(touched)]])]  # (K*bins + 1,) of each row among the entries
        place = np.flatnonzero(touched)
        self.pixel = place - np.repeat(begin - left, np.diff(self.begin))  # (entries,)

    def values(self, at_low: np.ndarray, at_high: np.ndarray) -> np.ndarray:
        """(entries,) float64, from a value for each tap; summed in the order of the samples."""
        places = np.concatenate([self.low, self.high])
        return np.bincount(places, np.concatenate([at_low, at_high]), len(self.pixel))


class AxisWeights:
    """K boxes along some axes: the pixels that each line touches, and its weights on them.

    A matrix has columns for touched pixels only, so a line costs no more than its pixels, no more than its
    samples, and no more than the image.
    """

    def __init__(self, taps: Taps, dtype: np.dtype, dense: float, crop: int = 1, spread: bool = False):
        """`dense`: the share of the pixels between first and last from which on all of them are taken, as a slice.

        `crop`: the numbers that one has. `spread`: blocks are to spread crops. Then each is of some pixels, otherwise
        of some bins: each number that is made is one block's.
        """
        count, line, low, high = taps.shape[0], taps.line, taps.low, taps.high
        self.taps = taps
        self.dtype = dtype

        # The pixels of each line: all between first and last, or the touched ones, by whose places there the taps
        # go from here on.
        start, stop = span(line, low, high, count)
        origin, numbers = start, stop - start
        touched_pixels: dict[int, np.ndarray] = {}
        if count > FEW_LINES or numbers.max(initial=0) > NARROW:
            extent = numbers
            first = np.cumsum(extent) - extent
            shift = (first - start)[line]
            low, high = low + shift, high + shift
            touched = np.zeros(int(extent.sum()), bool)
            touched[low] = touched[high] = True
            rank = np.concatenate([[0], np.cumsum(touched)])
            sparse = rank[first + extent] - rank[first] < dense * extent
            touched |= np.repeat(~sparse, extent)
            rank = np.concatenate([[0], np.cumsum(touched)])
            low, high, origin = rank[low], rank[high], rank[first]
            numbers = rank[first + extent] - origin
            for one in np.flatnonzero(sparse).tolist():
                part = touched[first[one] : first[one] + extent[one]]
                touched_pixels[one] = np.flatnonzero(part) + start[one]
        self.lines = [
            Line(*spans, touched_pixels.get(number))
            for number, spans in enumerate(zip(start.tolist(), stop.tolist(), numbers.tolist(), strict=True))
        ]
        self._ranks = low, high, origin

        # The matrices of all lines, one after another in one flat array, and each tap's place in it. They are cut along
        # the bins or along the pixels, and each part reaches over all of the other that it touches.
        bins = np.repeat([len(along) for along in taps.bins], taps.boxes)
        if taps.shape[1] <= BLOCK and PER_PRODUCT * crop * numbers.max(initial=0) < 4:
            of_low = of_high = line
            self._ends = range(count + 1)
            first, stop, left, right = np.zeros_like(bins), bins, origin, origin + numbers
        else:
            lengths = numbers if spread else bins
            parts = np.maximum(-(-bins // BLOCK), np.floor(np.sqrt(PER_PRODUCT * crop * numbers)))
            step = np.maximum(np.ceil(lengths / parts), 1).astype(np.int64)
            step = np.where(step > VECTOR, -(-step // VECTOR) * VECTOR, step)
            blocks = -(-lengths // step)
            ends = np.concatenate([[0], np.cumsum(blocks)])
            owner = np.repeat(np.arange(count), blocks)
            first = step[owner] * (np.arange(len(owner)) - ends[owner])
            stop = np.minimum(first + step[owner], lengths[owner])
            begin, each = ends[line], step[line]
            if spread:
                left, right = first + origin[owner], stop + origin[owner]
                of_low, of_high = (begin + (pixel - origin[line]) // each for pixel in (low, high))
                both, twice = np.concatenate([of_low, of_high]), np.concatenate([taps.bin, taps.bin])
                order = np.argsort(both, kind="stable")
                first, stop = span(both[order], twice[order], twice[order], len(owner))
            else:
                of_low = of_high = begin + taps.bin // each
                left, right = span(of_low, low, high, len(owner))
            origin = origin[owner]
            self._ends = ends.tolist()
        width = right - left
        end = ((stop - first) * width).cumsum()
        base = np.concatenate([[0], end])
        place = base[:-1] - first * width - left
        at_low = at_high = place[of_low] + taps.bin * width[of_low]
        if of_high is not of_low:
            at_high = place[of_high] + taps.bin * width[of_high]
        self.low, self.high = at_low + low, at_high + high
        self._spans = [a.tolist() for a in (first, stop, left - origin, width, base[:-1], end)]
        self._size, self._spread = int(base[-1]), spread
        self.flat = self.scatter(*taps.weights)

    @staticmethod
    def estimate_bytes(rule: geometry.Rule, axes: geometry.Axes) -> np.ndarray:
        """(A, K) about how much memory the weights of each line take while they are made."""
        bins, size = geometry.column(axes.bins), geometry.column(axes.sizes)
        pitch = np.abs(axes.bin.astype(np.float64))
        extent = np.fmin(size, pitch * bins + 3)
        width = np.fmin(extent, pitch * (BLOCK + 1) + VECTOR + 6)
        bytes_: np.ndarray = 150 * geometry.most_samples(rule, axes) + 24 * bins * width + 20 * extent + 2000
        return bytes_

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def most_bytes(rule: geometry.Rule, sizes: tuple[int, ...]) -> float:
        """At most how much those of a box take, wherever it lies in images of these sizes."""
        shape = (len(sizes), 1)
        samples = np.full(shape, rule.fixed_samples or np.iinfo(np.int64).max)
        widest = geometry.Axes(np.zeros(shape), np.full(shape, np.inf), samples, rule.bins, sizes)
        return float(AxisWeights.estimate_bytes(rule, widest).sum())

    @staticmethod
    def cut(rule: geometry.Rule, axes: geometry.Axes, at_most: int, limit: float) -> Iterator[list[geometry.Part]]:
        """Of one line: parts of at most so many bins, whose weights take about `limit` bytes.

        If those of a single bin take more, its samples are cut too; parts of the same bins come as one list.
        """
        (bins,) = axes.bins
        whole = AxisWeights.estimate_bytes(rule, axes).item()
        one = AxisWeights.estimate_bytes(rule, axes._replace(bins=(1,))).item()
        at_once = max(1, min(at_most, int(bins * limit / whole)))
        for start in range(0, bins, at_once):
            group = range(start, min(start + at_once, bins))
            if len(group) > 1:
                yield [geometry.Part((group,))]
                continue
            samples = geometry.sample_range(rule, axes, start)
            step = max(1, int(len(samples) * limit / one))
            firsts = range(samples.start, max(samples.stop, samples.start + 1), step)
            yield [geometry.Part((group,), first, first + step) for first in firsts]

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(S,) and (S,): of each tap among the pixels of its line."""
        low, high, origin = self._ranks
        first = origin[self.taps.line]
        return low - first, high - first

    def scatter(self, at_low: np.ndarray, at_high: np.ndarray) -> np.ndarray:
        """All matrices as one flat array, from a value for each tap; summed in the order of the samples, in float64."""
        places = np.concatenate([self.low, self.high])
        return np.bincount(places, np.concatenate([at_low, at_high]), self._size).astype(self.dtype, copy=False)

    def blocks(self, flat: np.ndarray) -> list[list[Block]]:
        """For each line its matrices, as views of `flat`."""
        blocks = []
        for first, stop, left, width, begin, end in zip(*self._spans, strict=True):
            bins, pixels = slice(first, stop), slice(left, left + width)
            matrix = flat[begin:end].reshape(stop - first, width)
            blocks.append(Block(pixels, bins, matrix.T) if self._spread else Block(bins, pixels, matrix))
        return [blocks[begin:end] for begin, end in itertools.pairwise(self._ends)]


def span(group: np.ndarray, low: np.ndarray, high: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Least `low` and greatest `high` + 1 of each group; 0, 0 for one without members. `group` does not decrease."""
    first, stop = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    if group.size:
        starts = np.concatenate([[0], np.flatnonzero(group[1:] != group[:-1]) + 1])
        first[group[starts]] = np.minimum.reduceat(low, starts)
        stop[group[starts]] = np.maximum.reduceat(high, starts) + 1
    return first, stop
