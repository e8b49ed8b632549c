"""The plain way: NumPy alone. Box by box, as products of small dense matrices.

A box's crops are `Wy @ window @ Wx.T` for each channel, with the weights of its bins on the pixels that they touch;
the feature gradient of a box is the same with the matrices transposed. Boxes are cut into parts so small that BLAS
computes each product on the calling thread. OpenBLAS starts its own for products of more than 2**18 multiplications,
and for those of a matrix and a vector from 9216 on; they spin while another process needs the core.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cupy_roialign.cpu.weights import Job, Rows, Term, rows

PRODUCT, VECTOR = 2**18, 2**13
"""Multiplications of a product of matrices, and of a matrix and a vector."""

BINS, PIXELS = 32, 90
"""Of a part along each axis, at most. BINS * PIXELS**2 is just below PRODUCT."""


class _Matrix(NamedTuple):
    """Some bins of a box along one axis, and some of the pixels that they touch."""

    bins: slice
    pixels: Any  # a slice, or an array of numbers
    weights: np.ndarray  # (bins, pixels)


def crops(job: Job, features: np.ndarray, output: np.ndarray) -> None:
    """Writes the crops; 0 in bins without a sample."""
    for k, box, terms in _boxes(job):
        image = features[job.images[k]]
        level = _level(job, image, box) if job.directions else None
        crop = output[k] if output.dtype == job.dtype else np.empty(output.shape[1:], job.dtype)
        crop[...] = 0
        for term in terms:
            _add_crop(job, image, box, term, level, crop)
        if not np.isfinite(crop).all():  # 0 * NaN is NaN: but such a pixel must reach none but the bins that sample it
            crop[...] = 0
            for term in terms:
                lines = np.zeros((*crop.shape[:2], image.shape[2]), job.dtype)
                for p, y, weight in box.entries(0, term[0]):
                    lines[:, p] += weight * image[:, y].astype(job.dtype, copy=False)
                for q, x, weight in box.entries(1, term[1]):
                    crop[:, :, q] += weight * lines[:, :, x]
        output[k] = crop


def _add_crop(job: Job, image: np.ndarray, box: _Box, term: Term, level: Any, crop: np.ndarray) -> None:
    for y, x, at in box.parts(term):
        window = image[at].astype(job.dtype, order="K", copy=False)
        crop[:, y.bins, x.bins] += _between(y.weights, window if level is None else window - level, x.weights)


def to_features(job: Job, grad: np.ndarray, total: np.ndarray) -> None:
    """Adds the feature gradient, box after box."""
    for k, box, terms in _boxes(job):
        image, crop = total[job.images[k]], grad[k].astype(job.dtype, order="K", copy=False)
        sound = np.isfinite(crop).all()
        for term in terms:
            if sound:
                for y, x, at in box.parts(term):
                    image[at] += _between(y.weights.T, crop[:, y.bins, x.bins], x.weights.T)
                continue
            lines = np.zeros((*crop.shape[:2], image.shape[2]), job.dtype)
            for q, column, weight in box.entries(1, term[1]):
                lines[:, :, column] += weight * crop[:, :, q]
            for p, row, weight in box.entries(0, term[0]):
                image[:, row] += weight * lines[:, p]


def to_boxes(job: Job, grad: np.ndarray, features: np.ndarray, sums: np.ndarray) -> None:
    """Adds to `sums`, (K, 4), the gradients with respect to y's start and step, and x's.

    Each is the sum over crops by weights that follow the box so, times the gradient of each crop.
    """
    for k, box, terms in _boxes(job, slopes=True):
        image, crop = features[job.images[k]], np.empty(grad.shape[1:], job.dtype)
        level, (y, x) = _level(job, image, box), (np.diff(begin) > 0 for begin in box.begin)
        grads = np.where(np.outer(y, x), grad[k], 0).astype(job.dtype, copy=False)
        for term, axes in zip(terms, job.free_axes(), strict=True):
            for axis, s in itertools.product(axes, (0, 1)):
                slope = box.rows.values[1 + s]
                crop[...] = 0
                _add_crop(job, image, box, (slope, term[1]) if axis == 0 else (term[0], slope), level, crop)
                sums[k, 2 * axis + s] += np.sum(grads * crop, dtype=np.float64)


class _Box(NamedTuple):
    """A box of a group."""

    rows: Rows
    begin: tuple[np.ndarray, np.ndarray]  # of its bins along y and x
    first: tuple[int, int]  # pixel that it touches; behind the last, if it touches none

    def parts(self, term: Term) -> Iterator[tuple[_Matrix, _Matrix, Any]]:
        """Along y, along x, and where the pixels are in an image."""
        along_x = list(_matrices(self.begin[1], self.rows.pixel, term[1]))
        for y, x in itertools.product(_matrices(self.begin[0], self.rows.pixel, term[0]), along_x):
            at = (slice(None), y.pixels, x.pixels)
            if not (isinstance(y.pixels, slice) and isinstance(x.pixels, slice)):
                at = (slice(None), np.r_[y.pixels][:, None], np.r_[x.pixels])
            yield y, x, at

    def entries(self, axis: int, value: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """(bin, pixel, weight) one by one: slow, and seldom needed."""
        for p, (first, stop) in enumerate(itertools.pairwise(self.begin[axis])):
            for entry in range(first, stop):
                if value[entry] != 0:
                    yield p, self.rows.pixel[entry], value[entry]


def _boxes(job: Job, slopes: bool = False) -> Iterator[tuple[int, _Box, list[Term]]]:
    """Boxes one by one, with their numbers."""
    for some, rows_of, terms in job.weights(rows, slopes):
        for j, k in enumerate(range(some.start, some.stop)):
            first = [rows_of.row(axis, j, job.rule.bins) for axis in (0, 1)]
            y, x = (rows_of.begin[row : row + bins + 1] for row, bins in zip(first, job.rule.bins, strict=True))
            yield k, _Box(rows_of, (y, x), (rows_of.extent[0, 0, j], rows_of.extent[1, 0, j])), terms


def _matrices(begin: np.ndarray, pixels_of: np.ndarray, values: np.ndarray) -> Iterator[_Matrix]:
    """Of the bins whose entries begin there."""
    for first in range(0, len(begin) - 1, BINS):
        ends = begin[first : first + BINS + 1]
        count, entries = len(ends) - 1, slice(ends[0], ends[-1])
        kept = values[entries] != 0
        order = np.argsort(pixels_of[entries][kept], kind="stable")
        pixel, value = (column[entries][kept][order] for column in (pixels_of, values))
        bin_ = np.repeat(np.arange(count), np.diff(ends))[kept][order]
        place = np.cumsum(np.diff(pixel, prepend=pixel[:1]) != 0)  # of each entry among the pixels that are touched
        cuts: Any = np.searchsorted(place, np.arange(0, place[-1] + 1 + PIXELS, PIXELS)) if len(place) else []
        for some in itertools.starmap(slice, itertools.pairwise(cuts)):
            columns = place[some] - place[some][0]
            pixels: Any = np.empty(columns[-1] + 1, np.int64)
            pixels[columns] = pixel[some]
            weights = np.zeros((count, len(pixels)), value.dtype)
            weights[bin_[some], columns] = value[some]
            if pixels[-1] - pixels[0] + 1 == len(pixels):
                pixels = slice(pixels[0], pixels[-1] + 1)
            yield _Matrix(slice(first, first + count), pixels, weights)


def _between(left: np.ndarray, planes: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`left @ plane @ right.T` for each of (C, h, w) planes, in their memory order; some at a time."""
    (p, h), (q, w), channels = left.shape, right.shape, len(planes)
    step = max(1, VECTOR // (max(h, p) * w) if 1 in (p, q) else PRODUCT // (max(h, q) * p * w))
    last = abs(planes.strides[0]) < abs(planes.strides[2])  # pixels with their channels
    result = (
        np.empty((p, q, channels), planes.dtype).transpose(2, 0, 1)
        if last
        else np.empty((channels, p, q), planes.dtype)
    )
    for some in (slice(c, c + step) for c in range(0, channels, step)):
        if last:
            pixels = (left @ planes[some].transpose(1, 2, 0).reshape(h, -1)).reshape(p, w, -1)
            result[some] = (right @ pixels).transpose(2, 0, 1)
        else:
            lines = (left @ planes[some].transpose(1, 0, 2).reshape(h, -1)).reshape(-1, w)
            result[some] = (lines @ right.T).reshape(p, -1, q).transpose(1, 0, 2)
    return result


def _level(job: Job, image: np.ndarray, box: _Box) -> Any:
    """(C, 1, 1): the first pixel that the box touches, where that is finite.

    Changes of weights sum to 0: so a level of the features changes nothing but what rounding leaves of a slope.
    """
    y, x = box.first
    if y >= job.shape[2] or x >= job.shape[3]:  # it touches none
        return 0
    pixel = image[:, y, x].astype(job.dtype)[:, None, None]
    return np.where(np.isfinite(pixel), pixel, 0)
