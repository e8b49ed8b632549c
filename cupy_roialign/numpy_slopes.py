"""The gradient to the weights of a box of many channels, by products of the gradient to its crop with its pixels.

With e[p, q, r, c], the sum over channels of the gradient to bin (p, q) times pixel (r, c), that to the weight of row r
in bin p of y is the sum of Wx[q, c] e[p, q, r, c] over q and c; along x it is that of Wy[p, r] e[p, q, r, c] over p
and r. A bin touches few rows, and e is computed for these alone: one product of matrices for each p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from cupy_roialign.numpy_weights import AxisWeights, Block, span

STRIP = 2**20
"""Bytes of pixels at a time, and some times that of products: few enough to stay in the cache."""

Row = tuple[int, int, int]
"""A bin of y, and its first row of pixels and that behind its last."""


class Bands:
    """The rows of pixels that each bin of K boxes touches along y, the first axis of `weights`; bin after bin.

    `places`: where their weights stand in a flat array of matrices; `rows`: for each box and bin the first, among those
    that the box touches, and the one behind the last.
    """

    def __init__(self, weights: AxisWeights):
        taps = weights.taps.along(0)
        boxes, bins = taps.shape
        row, some = taps.line * bins + taps.bin, slice(len(taps.line))
        low, high = weights.places
        first, stop = span(row, low[some], high[some], boxes * bins)
        begin = np.cumsum(stop - first) - (stop - first)
        in_flat, _ = span(row, weights.low[some], weights.high[some], boxes * bins)
        self.places = np.repeat(in_flat - begin, stop - first) + np.arange((stop - first).sum())
        self.rows = np.stack([first, stop], axis=1).reshape(boxes, bins, 2).tolist()
        self.begin = [*begin[::bins].tolist(), len(self.places)]

    def entries(self, box: int) -> slice:
        """Those of a box among all."""
        return slice(self.begin[box], self.begin[box + 1])


def add(
    along_y: np.ndarray,
    along_x: list[Block],
    weights_y: list[np.ndarray],
    weights_x: list[list[Block]],
    bands: list[list[int]],
    grad: np.ndarray,
    pixels: Callable[[slice, slice], np.ndarray],
) -> None:
    """Adds the gradients to the weights of a box, to `along_y` (rows of all bands) and `along_x`.

    Those along x are for each of `weights_y`, like `along_y`; those along y for each of `weights_x`. `grad` (bins_y, C,
    bins_x); `pixels(rows, columns)`: some of those that the box touches, (rows, columns * C).
    """
    channels = grad.shape[1]
    for number, block in enumerate(along_x):
        width, bins = block.of.stop - block.of.start, block.to.stop - block.to.start
        if width == 0:
            continue
        most = max(1, STRIP // (width * max(channels, bins) * grad.itemsize))
        stop = 0
        for rows, first, last in _strips(bands, most):
            strip = pixels(slice(first, last), block.of).reshape(-1, channels)
            start, stop = stop, stop + sum(below - top for _, top, below in rows)
            products = np.empty(((stop - start) * width, bins), grad.dtype)
            done = 0
            for p, top, below in rows:
                some = strip[(top - first) * width : (below - first) * width]
                np.matmul(some, grad[p][:, block.to], out=products[done : done + len(some)])
                done += len(some)
            products = products.reshape(stop - start, width * bins)
            for weights in weights_y:
                block.matrix[...] += _combine(weights[start:stop], products).reshape(width, bins).T
            for blocks in weights_x:
                along_y[start:stop] += _combine(blocks[number].matrix.T.ravel(), products.T)


def _strips(bands: list[list[int]], most: int) -> Iterator[tuple[list[Row], int, int]]:
    """The bands' rows in runs that lie within `most` rows of pixels and count four times as many, with the first and
    the last of these."""
    run: list[Row] = []
    low = high = count = 0
    for p, (first, stop) in enumerate(bands):
        for top in range(first, stop, most):
            below = min(top + most, stop)
            count += below - top
            if run and (count > 4 * most or max(high, below) - min(low, top) > most):
                yield run, low, high
                run, count = [], below - top
            low, high = (min(low, top), max(high, below)) if run else (top, below)
            run.append((p, top, below))
    if run:
        yield run, low, high


def _combine(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The product, where NaN and infinities reach only as far as weights are not 0."""
    total: np.ndarray = weights @ values
    if not math.isfinite(total.dot(total)):
        total = weights @ np.where(weights[:, None] != 0, values, 0)
    return total
