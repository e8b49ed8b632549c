"""The plain way: NumPy alone. Box by box, as products of small dense matrices.

A box's crops are `Wy @ window @ Wx.T` for each channel, with the weights of its bins on the pixels that they touch;
the feature gradient of a box is the same with the matrices transposed. Boxes are cut into parts so small that BLAS
computes each product on the calling thread. OpenBLAS starts its own for products of more than 2**18 multiplications,
and for those of a matrix and a vector from 9216 on; they spin while another process needs the core.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cupy_roialign import arrays
from cupy_roialign.cpu.weights import Job, Rows, rows

PRODUCT, VECTOR = 2**18, 2**13
"""Multiplications of a product of matrices, and of a matrix and a vector."""

BINS, PIXELS = 32, 90
"""Of a part along each axis, at most. BINS * PIXELS**2 is just below PRODUCT."""

Index = slice | np.ndarray


class _Matrix(NamedTuple):
    """Some bins of a box along one axis, and some of the pixels that they touch."""

    bins: slice
    pixels: Index
    weights: np.ndarray  # (1, or 3 with the derivatives to start and step; bins, pixels)


def crops(job: Job, features: np.ndarray, output: np.ndarray) -> None:
    """Writes the crops; 0 in bins without a sample."""
    for some, terms in job.weights(rows):
        for j, k in enumerate(range(some.start, some.stop)):
            image = features[job.images[k]]
            crop = output[k] if output.dtype == job.dtype else np.empty(output.shape[1:], job.dtype)
            crop[...] = 0
            for of_y, of_x in terms:
                level = _level(job, image, of_y, of_x, j) if job.directions else None
                for y, x, channels in _parts(job, of_y, of_x, j, len(image)):
                    window = _window(image, y, x, channels, job.dtype, level)
                    crop[channels, y.bins, x.bins] += _between(y.weights[0], window, x.weights[0])
            if not np.isfinite(crop).all():  # a pixel that is not must reach none but the bins that sample it
                crop[...] = 0
                for of_y, of_x in terms:
                    _add_crop(job, image, of_y, of_x, j, crop)
            output[k] = crop


def to_features(job: Job, grad: np.ndarray, total: np.ndarray) -> None:
    """Adds the feature gradient, box after box."""
    for some, terms in job.weights(rows):
        for j, k in enumerate(range(some.start, some.stop)):
            image, crop = total[job.images[k]], grad[k].astype(job.dtype, order="K", copy=False)
            sound = bool(np.isfinite(crop).all())
            for of_y, of_x in terms:
                if not sound:
                    _add_gradient(job, crop, of_y, of_x, j, image)
                    continue
                for y, x, channels in _parts(job, of_y, of_x, j, len(image)):
                    window = _between(y.weights[0].T, crop[channels, y.bins, x.bins], x.weights[0].T)
                    if isinstance(y.pixels, slice) and isinstance(x.pixels, slice):
                        image[channels, y.pixels, x.pixels] += window
                    else:
                        image[(channels, *_grid(y.pixels, x.pixels))] += window


def to_boxes(job: Job, grad: np.ndarray, features: np.ndarray, sums: np.ndarray) -> None:
    """Adds to `sums`, (K, 4), the gradients with respect to y's start and step, and x's."""
    for some, terms in job.weights(rows, slopes=True):
        for (of_y, of_x), axes in zip(terms, job.free_axes(), strict=True):
            for j, k in enumerate(range(some.start, some.stop)):
                image, crop = features[job.images[k]], grad[k].astype(job.dtype, copy=False)
                level = _level(job, image, of_y, of_x, j)
                for y, x, channels in _parts(job, of_y, of_x, j, len(image)):
                    window = _window(image, y, x, channels, job.dtype, level)
                    touched = y.weights.any(axis=(0, 2))[:, None] & x.weights.any(axis=(0, 2))
                    bins = np.where(touched, crop[channels, y.bins, x.bins], 0)
                    along = [(y.weights[1], x.weights[0]), (y.weights[2], x.weights[0])]
                    along += [(y.weights[0], x.weights[1]), (y.weights[0], x.weights[2])]
                    for axis in axes:
                        for s in (2 * axis, 2 * axis + 1):
                            products = bins * _between(along[s][0], window, along[s][1])
                            sums[k, s] += products.sum(dtype=np.float64)


def _parts(job: Job, of_y: Rows, of_x: Rows, j: int, channels: int) -> Iterator[tuple[_Matrix, _Matrix, slice]]:
    """A box in parts: along y, along x, and channels."""
    along_x = list(_matrices(of_x, j, job.rule.bins[1]))
    for y, x in itertools.product(_matrices(of_y, j, job.rule.bins[0]), along_x):
        (_, p, h), (_, q, w) = y.weights.shape, x.weights.shape
        step = VECTOR // (max(h, p) * max(w, q)) if 1 in (p, q) else PRODUCT // (max(h, p) * max(w, q) * max(p, q))
        step = max(step, 1)
        for first in range(0, channels, step):
            yield y, x, slice(first, min(first + step, channels))


def _matrices(of: Rows, j: int, bins: int) -> Iterator[_Matrix]:
    """Of box `j` of a group."""
    columns = [of.value, of.to_start, of.to_step] if of.to_start.size else [of.value]
    for first in range(0, bins, BINS):
        begin = of.begin[j * bins + first : j * bins + min(first + BINS, bins) + 1]
        entries, count = slice(begin[0], begin[-1]), len(begin) - 1
        touched, place = np.unique(of.pixel[entries], return_inverse=True)
        bin_ = np.repeat(np.arange(count), np.diff(begin))
        for start in range(0, len(touched), PIXELS):
            pixels: Index = touched[start : start + PIXELS]
            weights = np.zeros((len(columns), count, len(pixels)), of.value.dtype)
            here = slice(None) if len(touched) <= PIXELS else (place >= start) & (place < start + PIXELS)
            for column, matrix in zip(columns, weights, strict=True):
                matrix[bin_[here], place[here] - start] = column[entries][here]
            if pixels[-1] - pixels[0] + 1 == len(pixels):
                pixels = slice(pixels[0], pixels[-1] + 1)
            yield _Matrix(slice(first, first + count), pixels, weights)


def _between(left: np.ndarray, planes: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`left @ plane @ right.T` for each of (c, h, w) planes, in their memory order."""
    c, h, w = planes.shape
    if arrays.is_channels_last((1, *planes.shape), (1, *planes.strides)):
        pixels = (left @ planes.transpose(1, 2, 0).reshape(h, w * c)).reshape(-1, w, c)
        return (right @ pixels).transpose(2, 0, 1)
    return left @ (planes.reshape(c * h, w) @ right.T).reshape(c, h, -1)


def _window(
    image: np.ndarray, y: _Matrix, x: _Matrix, channels: slice, dtype: np.dtype, level: np.ndarray | None
) -> np.ndarray:
    window = image[channels]
    if isinstance(y.pixels, slice) and isinstance(x.pixels, slice):
        window = window[:, y.pixels, x.pixels]
    else:
        window = window[(slice(None), *_grid(y.pixels, x.pixels))]
    window = window.astype(dtype, order="K", copy=False)
    return window if level is None else window - level[channels]


def _grid(y: Index, x: Index) -> tuple[np.ndarray, np.ndarray]:
    y, x = (np.arange(a.start, a.stop) if isinstance(a, slice) else a for a in (y, x))
    return y[:, None], x


def _level(job: Job, image: np.ndarray, of_y: Rows, of_x: Rows, j: int) -> np.ndarray | None:
    """(C, 1, 1): the first pixel that the box touches, where that is finite.

    Changes of weights sum to 0: so a level of the features changes nothing but what rounding leaves of a slope.
    """
    ends = [
        (of.begin[j * bins], of.begin[(j + 1) * bins]) for of, bins in zip((of_y, of_x), job.rule.bins, strict=True)
    ]
    if any(first == end for first, end in ends):
        return None
    y, x = (of.pixel[first:end].min() for of, (first, end) in zip((of_y, of_x), ends, strict=True))
    pixel = image[:, y, x].astype(job.dtype)[:, None, None]
    return np.where(np.isfinite(pixel), pixel, 0)


def _entries(of: Rows, j: int, bins: int) -> Iterator[tuple[int, int, float]]:
    """(bin, pixel, weight) of box `j` of a group."""
    begin = of.begin[j * bins : (j + 1) * bins + 1]
    entries = slice(begin[0], begin[-1])
    bin_ = np.repeat(np.arange(bins), np.diff(begin))
    return zip(bin_.tolist(), of.pixel[entries].tolist(), of.value[entries], strict=True)


def _add_crop(job: Job, image: np.ndarray, of_y: Rows, of_x: Rows, j: int, crop: np.ndarray) -> None:
    """The same by single weights, which spread no NaN. Slow, and seldom needed."""
    lines = np.zeros((*crop.shape[:2], image.shape[2]), job.dtype)
    for p, y, weight in _entries(of_y, j, job.rule.bins[0]):
        lines[:, p] += weight * image[:, y].astype(job.dtype, copy=False)
    for q, x, weight in _entries(of_x, j, job.rule.bins[1]):
        crop[:, :, q] += weight * lines[:, :, x]


def _add_gradient(job: Job, crop: np.ndarray, of_y: Rows, of_x: Rows, j: int, image: np.ndarray) -> None:
    lines = np.zeros((*crop.shape[:2], image.shape[2]), job.dtype)
    for q, x, weight in _entries(of_x, j, job.rule.bins[1]):
        lines[:, :, x] += weight * crop[:, :, q]
    for p, y, weight in _entries(of_y, j, job.rule.bins[0]):
        image[:, y] += weight * lines[:, p]
