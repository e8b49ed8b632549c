"""The weights of many boxes on one axis: taps in; out a sparse matrix for all, or a few small dense ones a box."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cupy_roialign import geometry

BLOCK = 16
"""Bins in one matrix. Neighbouring bins touch neighbouring pixels: more bins are more products with zero, fewer more
matrices."""

FEW_BOXES, NARROW = 16, 64
"""Of so few boxes, so few pixels from the first to the last are all taken, without a look at which they touch."""

Pixels = slice | np.ndarray
"""Rows or columns of an image, in increasing order."""


def count_of(pixels: Pixels) -> int:
    return pixels.stop - pixels.start if isinstance(pixels, slice) else len(pixels)


def some_of(pixels: Pixels, part: slice) -> Pixels:
    if isinstance(pixels, slice):
        return slice(pixels.start + part.start, pixels.start + part.stop)
    return pixels[part]


class Block(NamedTuple):
    """Some bins of a box and the pixels that they touch."""

    bins: slice  # among the box's bins
    pixels: slice  # among the box's pixels, AxisWeights.pixels
    matrix: np.ndarray  # (bins, pixels)


class Taps:
    """One axis of K boxes: their samples inside the image, each between two pixels that it takes a weight of."""

    def __init__(self, rule: geometry.Rule, axis: geometry.Axis, part: geometry.Part, size: int):
        samples = geometry.inside_samples(rule, axis, part, size)
        self.shape = (len(axis.start), len(part.bins))
        self.bins = part.bins
        self.box, self.bin = samples.box, samples.bin - part.bins.start  # (S,)
        self.low, self.high = samples.low, samples.high  # (S,)
        self.share = 1.0 / axis.samples[self.box]  # (S,) the part that a sample has in its bin
        self.lever = samples.bin + (samples.number + rule.offset) * self.share  # (S,) d position / d bin
        fraction = samples.fraction.astype(np.float64)
        self.weights = ((1 - fraction) * self.share, fraction * self.share)  # of `low` and `high`

    def inside(self) -> np.ndarray:
        """(K, bins) bool: the bin has a sample inside the image."""
        seen = np.zeros(self.shape, bool)
        seen[self.box, self.bin] = True
        return seen

    def changes(self, of_start: np.ndarray, of_bin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How the weights change, where each box's `start` and `bin` change by so much."""
        slope = (of_start[self.box] + self.lever * of_bin[self.box]) * self.share
        return -slope, slope

    def position_gradient(self, at_low: np.ndarray, at_high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(K,) and (K,): the gradients to `start` and `bin` from those to the weights."""
        slope = (at_high.astype(np.float64) - at_low) * self.share
        count = self.shape[0]
        return np.bincount(self.box, slope, count), np.bincount(self.box, slope * self.lever, count)


class AxisRows:
    """The weights of K boxes on one axis as a sparse matrix: a row for each bin, in it the pixels that it touches."""

    def __init__(self, taps: Taps):
        boxes, bins = taps.shape
        row = taps.box * bins + taps.bin
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
    """One axis of K boxes: the pixels that each box touches, and its weights on them.

    A matrix has columns for touched pixels only, so a box costs no more than its pixels, no more than its
    samples, and no more than the image.
    """

    def __init__(self, taps: Taps, dtype: np.dtype, dense: float):
        """`dense`: the share of the pixels between first and last from which on all of them are taken, as a slice."""
        count, bins = taps.shape
        self.taps = taps
        self.dtype = dtype

        # The pixels of each box, and each tap's place among them: all between first and last, or the touched ones.
        self.first, self.stop = span(taps.box, taps.low, taps.high, count)
        extent = self.stop - self.first
        self.counts = extent  # (K,) pixels a box
        self._touched: list[np.ndarray | None] = [None] * count
        low, high = taps.low - self.first[taps.box], taps.high - self.first[taps.box]
        if count > FEW_BOXES or extent.max(initial=0) > NARROW:
            origin = np.cumsum(extent) - extent
            shift = origin[taps.box]
            touched = np.zeros(int(extent.sum()), bool)
            touched[low + shift] = touched[high + shift] = True
            rank = np.concatenate([[0], np.cumsum(touched)])
            sparse = rank[origin + extent] - rank[origin] < dense * extent
            touched |= np.repeat(~sparse, extent)
            rank = np.concatenate([[0], np.cumsum(touched)])
            begin = rank[origin]
            self.counts = rank[origin + extent] - begin
            low, high = rank[low + shift] - begin[taps.box], rank[high + shift] - begin[taps.box]
            for box in np.flatnonzero(sparse).tolist():
                part = touched[origin[box] : origin[box] + extent[box]]
                self._touched[box] = np.flatnonzero(part) + self.first[box]

        # The matrices of all boxes, one after another in one flat array, and each tap's place in it.
        per_box = -(-bins // BLOCK)
        if per_box == 1:
            left, right, block = np.zeros_like(self.counts), self.counts, taps.box
        else:
            block = taps.box * per_box + taps.bin // BLOCK
            left, right = span(block, low, high, count * per_box)
        width = right - left
        heights = np.minimum(BLOCK, bins - BLOCK * np.arange(per_box))
        area = width * np.tile(heights, count)
        base = np.cumsum(area) - area
        row = base[block] + (taps.bin % BLOCK) * width[block] - left[block]
        self.low, self.high, self._size = row + low, row + high, int(area.sum())
        self._spans = [a.reshape(count, per_box).tolist() for a in (left, right, base, base + area)]
        self._bins = [slice(b, min(b + BLOCK, bins)) for b in range(0, bins, BLOCK)]
        self.flat = self.scatter(*taps.weights)

    @staticmethod
    def estimate_bytes(rule: geometry.Rule, axis: geometry.Axis, bins: int, size: int) -> np.ndarray:
        """(K,) about how much memory the weights of each box take while they are made."""
        samples = geometry.most_samples(rule, axis, bins, size)
        pitch = np.abs(axis.bin.astype(np.float64))
        width, extent = (np.fmin(size, pitch * count + 3) for count in (min(BLOCK, bins), bins))
        return 150 * samples + 24 * bins * width + 20 * extent + 2000

    @staticmethod
    def cut(
        rule: geometry.Rule, axis: geometry.Axis, bins: int, size: int, at_most: int, limit: float
    ) -> Iterator[list[geometry.Part]]:
        """Of one box: parts of at most so many bins, whose weights take about `limit` bytes.

        If those of a single bin take more, its samples are cut too; parts of the same bins come as one list.
        """
        whole = AxisWeights.estimate_bytes(rule, axis, bins, size).item()
        at_once = max(1, min(at_most, int(bins * limit / whole)))
        for start in range(0, bins, at_once):
            group = range(start, min(start + at_once, bins))
            if len(group) > 1:
                yield [geometry.Part(group)]
                continue
            samples = geometry.sample_range(rule, axis, start, size)
            step = max(1, int(len(samples) * limit / AxisWeights.estimate_bytes(rule, axis, 1, size).item()))
            firsts = range(samples.start, max(samples.stop, samples.start + 1), step)
            yield [geometry.Part(group, first, first + step) for first in firsts]

    def pixels(self, box: int, origin: int) -> Pixels:
        """The pixels that a box touches, counted from `origin`."""
        touched = self._touched[box]
        if touched is None:
            return slice(int(self.first[box]) - origin, int(self.stop[box]) - origin)
        return touched - origin

    def scatter(self, at_low: np.ndarray, at_high: np.ndarray) -> np.ndarray:
        """All matrices as one flat array, from a value for each tap; summed in the order of the samples, in float64."""
        places = np.concatenate([self.low, self.high])
        return np.bincount(places, np.concatenate([at_low, at_high]), self._size).astype(self.dtype, copy=False)

    def blocks(self, flat: np.ndarray) -> list[list[Block]]:
        """For each box its matrices, as views of `flat`."""
        return [
            [
                Block(bins, slice(a, b), flat[c:d].reshape(bins.stop - bins.start, b - a))
                for bins, a, b, c, d in zip(self._bins, *spans, strict=True)
            ]
            for spans in zip(*self._spans, strict=True)
        ]


def span(group: np.ndarray, low: np.ndarray, high: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Least `low` and greatest `high` + 1 of each group; 0, 0 for one without members. `group` does not decrease."""
    first, stop = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    if group.size:
        starts = np.concatenate([[0], np.flatnonzero(group[1:] != group[:-1]) + 1])
        first[group[starts]] = np.minimum.reduceat(low, starts)
        stop[group[starts]] = np.maximum.reduceat(high, starts) + 1
    return first, stop
