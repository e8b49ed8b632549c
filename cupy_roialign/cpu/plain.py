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

from cupy_roialign.cpu.weights import Job, Rows, rows

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
    for j, k, terms in _boxes(job):
        image = features[job.images[k]]
        crop = output[k] if output.dtype == job.dtype else np.empty(output.shape[1:], job.dtype)
        crop[...] = 0
        for rows_of in terms:
            _add_crop(job, image, rows_of, j, crop)
        if not np.isfinite(crop).all():  # 0 * NaN is NaN: but such a pixel must reach none but the bins that sample it
            crop[...] = 0
            for of_y, of_x in terms:
                lines = np.zeros((*crop.shape[:2], image.shape[2]), job.dtype)
                for p, y, weight in _entries(job, of_y, j, 0):
                    lines[:, p] += weight * image[:, y].astype(job.dtype, copy=False)
                for q, x, weight in _entries(job, of_x, j, 1):
                    crop[:, :, q] += weight * lines[:, :, x]
        output[k] = crop


def _add_crop(
    job: Job, image: np.ndarray, of: tuple[Rows, Rows], j: int, crop: np.ndarray, leveled: bool = False
) -> None:
    """Of box `j` of a group; less a level where weights are changes of weights."""
    level = _level(job, image, *of, j) if leveled or job.directions else None
    for y, x, at in _parts(job, *of, j):
        window = image[at].astype(job.dtype, order="K", copy=False)
        crop[:, y.bins, x.bins] += _between(y.weights, window if level is None else window - level, x.weights)


def to_features(job: Job, grad: np.ndarray, total: np.ndarray) -> None:
    """Adds the feature gradient, box after box."""
    for j, k, terms in _boxes(job):
        image, crop = total[job.images[k]], grad[k].astype(job.dtype, order="K", copy=False)
        sound = np.isfinite(crop).all()
        for of_y, of_x in terms:
            if sound:
                for y, x, at in _parts(job, of_y, of_x, j):
                    image[at] += _between(y.weights.T, crop[:, y.bins, x.bins], x.weights.T)
                continue
            lines = np.zeros((*crop.shape[:2], image.shape[2]), job.dtype)
            for q, column, weight in _entries(job, of_x, j, 1):
                lines[:, :, column] += weight * crop[:, :, q]
            for p, row, weight in _entries(job, of_y, j, 0):
                image[:, row] += weight * lines[:, p]


def to_boxes(job: Job, grad: np.ndarray, features: np.ndarray, sums: np.ndarray) -> None:
    """Adds to `sums`, (K, 4), the gradients with respect to y's start and step, and x's.

    Each is the sum over crops by weights that change so, times the gradient of each crop.
    """
    for j, k, terms in _boxes(job, slopes=True):
        image, crop = features[job.images[k]], np.empty(grad.shape[1:], job.dtype)
        for of, axes in zip(terms, job.free_axes(), strict=True):
            touched = np.outer(
                *(np.diff(a.begin[j * n : (j + 1) * n + 1]) > 0 for a, n in zip(of, job.rule.bins, strict=True))
            )
            grads = np.where(touched, grad[k], 0).astype(job.dtype, copy=False)
            for axis, s in itertools.product(axes, (0, 1)):
                crop[...] = 0
                _add_crop(job, image, job.changed(of, axis, s), j, crop, leveled=True)
                sums[k, 2 * axis + s] += np.sum(grads * crop, dtype=np.float64)


def _boxes(job: Job, slopes: bool = False) -> Iterator[tuple[int, int, list[tuple[Rows, Rows]]]]:
    """Boxes one by one: number within a group, number, and the rows of the group."""
    for some, terms in job.weights(rows, slopes):
        for j, k in enumerate(range(some.start, some.stop)):
            yield j, k, terms


def _parts(job: Job, of_y: Rows, of_x: Rows, j: int) -> Iterator[tuple[_Matrix, _Matrix, Any]]:
    """A box in parts: along y, along x, and where its pixels are in an image."""
    along_x = list(_matrices(of_x, j, job.rule.bins[1]))
    for y, x in itertools.product(_matrices(of_y, j, job.rule.bins[0]), along_x):
        at = (slice(None), y.pixels, x.pixels)
        if not (isinstance(y.pixels, slice) and isinstance(x.pixels, slice)):
            at = (slice(None), np.r_[y.pixels][:, None], np.r_[x.pixels])
        yield y, x, at


def _matrices(of: Rows, j: int, bins: int) -> Iterator[_Matrix]:
    """Of box `j` of a group."""
    for first in range(0, bins, BINS):
        begin = of.begin[j * bins + first : j * bins + min(first + BINS, bins) + 1]
        entries, count = slice(begin[0], begin[-1]), len(begin) - 1
        order = np.argsort(of.pixel[entries], kind="stable")
        pixel, value = of.pixel[entries][order], of.value[entries][order]
        bin_ = np.repeat(np.arange(count), np.diff(begin))[order]
        place = np.cumsum(np.diff(pixel, prepend=pixel[:1]) != 0)  # of each entry among the pixels that are touched
        ends: Any = np.searchsorted(place, np.arange(0, place[-1] + 1 + PIXELS, PIXELS)) if len(place) else []
        for some in itertools.starmap(slice, itertools.pairwise(ends)):
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


def _level(job: Job, image: np.ndarray, of_y: Rows, of_x: Rows, j: int) -> Any:
    """(C, 1, 1): the first pixel that the box touches, where that is finite.

    Changes of weights sum to 0: so a level of the features changes nothing but what rounding leaves of a slope.
    """
    y, x = of_y.extent[0, j], of_x.extent[0, j]
    if y >= job.shape[2] or x >= job.shape[3]:  # it touches none
        return 0
    pixel = image[:, y, x].astype(job.dtype)[:, None, None]
    return np.where(np.isfinite(pixel), pixel, 0)


def _entries(job: Job, of: Rows, j: int, axis: int) -> Iterator[tuple[int, int, float]]:
    """(bin, pixel, weight) of box `j` of a group, one by one: slow, and seldom needed."""
    bins = job.rule.bins[axis]
    begin = of.begin[j * bins : (j + 1) * bins + 1]
    entries, bin_ = slice(begin[0], begin[-1]), np.repeat(np.arange(bins), np.diff(begin))
    return zip(bin_.tolist(), of.pixel[entries].tolist(), of.value[entries], strict=True)
