"""The weights of many boxes on one axis: taps in, a few small dense matrices a box out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cupy_roialign import geometry

BLOCK = 16
"""Bins in one matrix. Neighbouring bins touch neighbouring pixels, so hardly a product is with zero."""

DENSE = 0.75
"""Share of the pixels between a box's first and last from which on all of them are taken, as one slice."""

Pixels = slice | np.ndarray


class Block(NamedTuple):
    """Some bins of a box and the pixels that they touch."""

    bins: slice  # among the box's bins
    pixels: slice  # among the box's pixels, AxisWeights.pixels
    matrix: np.ndarray  # (bins, pixels)


class AxisWeights:
    """One axis of K boxes: the pixels that each box touches, and its weights on them.

    A matrix has columns for touched pixels only, so a box costs no more than its pixels, no more than its
    samples, and no more than the image.
    """

    def __init__(self, rule: geometry.Rule, axis: geometry.Axis, part: geometry.Part, size: int, dtype: np.dtype):
        count, bins = len(axis.start), len(part.bins)
        self.bins = part.bins
        samples = geometry.inside_samples(rule, axis, part, size)
        self.box, self.bin = samples.box, samples.bin - part.bins.start
        self.share = 1.0 / axis.samples[self.box]  # (S,) the part that a sample has in its bin
        self.lever = samples.bin + (samples.number + rule.offset) * self.share  # (S,) d position / d bin

        # The pixels of each box, and each tap's place among them.
        self.first, self.stop = _span(self.box, samples.low, samples.high, count)
        extent = self.stop - self.first
        origin = np.cumsum(extent) - extent
        shift = (origin - self.first)[self.box]
        touched = np.zeros(int(extent.sum()), bool)
        touched[samples.low + shift] = touched[samples.high + shift] = True
        rank = np.concatenate([[0], np.cumsum(touched)])
        dense = rank[origin + extent] - rank[origin] >= DENSE * extent
        touched |= np.repeat(dense, extent)
        rank = np.concatenate([[0], np.cumsum(touched)])
        begin, end = rank[origin], rank[origin + extent]
        pixel = np.flatnonzero(touched) - np.repeat(origin - self.first, end - begin)
        self._pixel, self._dense, self._begin, self._end = pixel, dense.tolist(), begin.tolist(), end.tolist()
        self.counts = end - begin  # (K,) pixels a box
        low = rank[samples.low + shift] - begin[self.box]
        high = rank[samples.high + shift] - begin[self.box]

        # The matrices of all boxes, one after another in one flat array, and each tap's place in it.
        per_box = -(-bins // BLOCK)
        block = self.box * per_box + self.bin // BLOCK
        left, right = _span(block, low, high, count * per_box)
        width = right - left
        heights = np.minimum(BLOCK, bins - BLOCK * np.arange(per_box))
        area = width * np.tile(heights, count)
        base = np.cumsum(area) - area
        row = base[block] + (self.bin % BLOCK) * width[block] - left[block]
        self.low, self.high, self._size = row + low, row + high, int(area.sum())
        self._spans = [a.reshape(count, per_box).tolist() for a in (left, right, base, base + area)]
        self._bins = [slice(b, min(b + BLOCK, bins)) for b in range(0, bins, BLOCK)]
        fraction = samples.fraction.astype(np.float64)
        self.flat = self.scatter((1 - fraction) * self.share, fraction * self.share).astype(dtype, copy=False)

    @staticmethod
    def estimate_bytes(rule: geometry.Rule, axis: geometry.Axis, bins: int, size: int) -> np.ndarray:
        """(K,) about how much memory the weights of each box take while they are made."""
        samples = bins * axis.samples.astype(np.float64)
        if rule.sampling_ratio == 0:  # at most about two samples a pixel lie inside
            samples = np.minimum(samples, 2 * size + bins * geometry.EVERY_SAMPLE)
        pitch = np.abs(axis.bin.astype(np.float64))
        width, extent = (np.fmin(size, pitch * count + 3) for count in (min(BLOCK, bins), bins))
        return 150 * samples + 24 * bins * width + 20 * extent + 1000

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
        pixel = self._pixel[self._begin[box] : self._end[box]] - origin
        return slice(int(pixel[0]), int(pixel[-1]) + 1) if self._dense[box] else pixel

    def inside(self) -> np.ndarray:
        """(K, bins) bool: the bin has a sample inside the image."""
        seen = np.zeros((len(self.counts), self._bins[-1].stop), bool)
        seen[self.box, self.bin] = True
        return seen

    def position_gradient(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(K,) and (K,): the gradients to `start` and `bin` from those to the weights, laid out as `flat`."""
        slope = (flat[self.high].astype(np.float64) - flat[self.low]) * self.share
        count = len(self.counts)
        return np.bincount(self.box, slope, count), np.bincount(self.box, slope * self.lever, count)

    def change(self, of_start: np.ndarray, of_bin: np.ndarray) -> np.ndarray:
        """How the weights change, laid out as `flat`, where each box's `start` and `bin` change by so much."""
        slope = (of_start[self.box] + self.lever * of_bin[self.box]) * self.share
        return self.scatter(-slope, slope).astype(self.flat.dtype, copy=False)

    def scatter(self, at_low: np.ndarray, at_high: np.ndarray) -> np.ndarray:
        """All matrices as one flat array, from a value for each tap; float64, summed in the order of the samples."""
        places = np.concatenate([self.low, self.high])
        return np.bincount(places, np.concatenate([at_low, at_high]), self._size)

    def blocks(self, flat: np.ndarray) -> list[list[Block]]:
        """For each box its matrices, as views of `flat`."""
        return [
            [
                Block(bins, slice(a, b), flat[c:d].reshape(bins.stop - bins.start, b - a))
                for bins, a, b, c, d in zip(self._bins, *spans, strict=True)
            ]
            for spans in zip(*self._spans, strict=True)
        ]


def _span(group: np.ndarray, low: np.ndarray, high: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Least `low` and greatest `high` + 1 of each group; 0, 0 for one without members. `group` does not decrease."""
    first, stop = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    if group.size:
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        first[group[starts]] = np.minimum.reduceat(low, starts)
        stop[group[starts]] = np.maximum.reduceat(high, starts) + 1
    return first, stop
