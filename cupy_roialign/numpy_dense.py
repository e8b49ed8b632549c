"""Boxes one by one, by small dense matrices: a box's window of the features is resampled along one axis and then along
the other, for all channels at once.

Features are read where they lie if BLAS can; otherwise the part that boxes touch is copied into a layout that it can
read, as many channels at a time as the workspace holds.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_roialign import geometry, numpy_job, threads
from cupy_roialign.numpy_job import Job, fill_outside
from cupy_roialign.numpy_weights import BLOCK, AxisWeights, Block, Pixels, Taps, count_of, some_of

PIXELS_AT_ONCE = 256
"""Pixels on their way to planes that lie in a small buffer."""

FEW_CHANNELS = 16
"""Below, an image is worked on as planes, (C, H, W); from here on as pixels, (H, W, C)."""

WORTH_SHARING = 2_000_000
"""Multiplications of a box from which on boxes are shared out among threads."""

Product = Callable[..., np.ndarray]


def forward(job: Job, numbers: np.ndarray, features: np.ndarray, output: np.ndarray) -> None:
    """Writes the crops of some boxes."""
    layout, total = _Layout.of(job.shape[1]), None
    for chunk in _Plan(job, numbers).chunks():
        target = chunk.of(output)
        if chunk.is_first:
            target[chunk.empty] = 0
        if chunk.is_part and chunk.is_first:
            total = np.zeros(target.shape[1:], job.dtype)
        so_far = total if chunk.is_part else None  # of the parts of a box
        for piece in chunk.pieces:
            source = _Source(features, layout, piece, job.dtype)

            def take(
                box: _Box, piece: _Piece = piece, source: _Source = source, target: Any = target, so_far: Any = so_far
            ) -> None:
                window = source.level_window(box) if job.directions else source.window(box)
                place = layout.view(target[box.number, piece.channels])
                at_once = so_far is None and place.dtype == job.dtype and _blas_reads(place)
                crop = _crop(window, job.dtype, box.terms, layout.axes, place if at_once else None)
                if so_far is not None:
                    sums = layout.view(so_far[piece.channels])
                    sums += crop
                    crop = sums
                if crop is not place:
                    _write(place, crop)

            threads.run(take, piece.boxes, piece.multiplications(job.rule.bins))
        if job.rule.extrapolation_value != 0 and not job.directions:
            fill_outside(target, chunk.boxes, *chunk.inside(), job.rule.extrapolation_value)


def feature_gradient(
    job: Job, numbers: np.ndarray, grad_output: np.ndarray, total: np.ndarray, begun: set[int]
) -> None:
    """Adds the gradients of the crops of some boxes. `begun`: the images where `total` may not be 0 any more."""
    layout = _Layout.of(job.shape[1])
    for chunk in _Plan(job, numbers).chunks():
        grads = chunk.of(grad_output)

        def add(piece: _Piece, grads: np.ndarray = grads) -> None:
            target = layout.view(total[piece.image, piece.channels])[piece.window]
            part = target if _blas_reads(target) else np.zeros(target.shape, total.dtype)
            for box in piece.boxes:
                grad = layout.view(grads[box.number, piece.channels]).astype(total.dtype, copy=False)
                product = _product if _is_finite(grad) else _exact_product
                for blocks in box.terms:
                    _add_spread(part, grad, box.pixels, blocks, layout, product)
            if part is not target:
                if piece.image in begun:
                    part += target
                _write(target, part)

        work = sum(piece.multiplications(job.rule.bins) for piece in chunk.pieces)
        threads.run(add, chunk.pieces, work)
        begun.update(piece.image for piece in chunk.pieces)


def box_gradient(
    job: Job, numbers: np.ndarray, grad_output: np.ndarray, features: np.ndarray, gradient: np.ndarray
) -> None:
    """Adds the gradients to some boxes."""
    layout = _Layout.of(job.shape[1])
    for chunk in _Plan(job, numbers).chunks():
        flats = [np.zeros_like(weights.flat) for weights in chunk.weights]
        slopes = [weights.blocks(flat) for weights, flat in zip(chunk.weights, flats, strict=True)]
        for piece in chunk.pieces:
            source = _Source(features, layout, piece, job.dtype)

            def take(
                box: _Box, chunk: _Chunk = chunk, piece: _Piece = piece, source: _Source = source, to: Any = slopes
            ) -> None:
                window = source.level_window(box)
                grad = chunk.of(grad_output)[box.number, piece.channels]
                if not _is_finite(grad):  # bins without a sample stay as they are, whatever the gradient there
                    inside_y, inside_x = chunk.inside()
                    grad = np.where(inside_y[box.place][:, None] & inside_x[box.place], grad, 0)
                grad = layout.view(grad).astype(job.dtype, copy=False)
                for axis, others in box.partners(job.directions):
                    _add_weight_gradient(to[axis][box.place], axis, grad, window, others, layout.axes)

            threads.run(take, piece.boxes, 2 * piece.multiplications(job.rule.bins))
        for axis in (0, 1):
            weights, flat = chunk.weights[axis], flats[axis]
            of_position = weights.taps.position_gradient(flat[weights.low], flat[weights.high])
            low, high = chunk.axes[axis].edge_gradient(*of_position)
            gradient[chunk.boxes, job.rule.columns[axis]] += low
            gradient[chunk.boxes, job.rule.columns[axis + 2]] += high


# ---- memory ----


def _blas_reads(view: np.ndarray) -> bool:
    """Whether matrix products take the last two axes of `view` as they lie."""
    rows, columns = view.strides[-2:]
    native = view.flags.aligned and view.dtype.isnative
    return native and columns == view.itemsize and rows >= view.shape[-1] * view.itemsize


def _is_finite(values: np.ndarray) -> bool:
    """Whether all is finite. False for some huge finite values too, which then only take the slower way."""
    flat = values.ravel(order="K")
    return math.isfinite(flat.dot(flat))


def _write(target: np.ndarray, values: np.ndarray) -> None:
    """target[...] = values, for (h, w, C) whose pixels may lie as planes in `target`.

    From pixels to planes a plain copy reads with a stride, and where that is a multiple of a large power of two, all
    it reads falls on one place in the cache. So pixels go through a small buffer with another stride.
    """
    channels = values.shape[-1]
    if target.strides[-1] == target.itemsize or channels < FEW_CHANNELS:
        target[...] = values
        return
    if target.strides[0] == target.strides[1] * target.shape[1]:  # rows follow each other, as in a crop
        target, values = (a.reshape(1, -1, channels) for a in (target, values))
    rows, columns = target.shape[:2]
    buffer = np.empty((min(columns, PIXELS_AT_ONCE), channels + 16), values.dtype)
    for row in range(rows):
        for start in range(0, columns, PIXELS_AT_ONCE):
            pixels = values[row, start : start + PIXELS_AT_ONCE]
            passed = buffer[: len(pixels), :channels]
            passed[...] = pixels
            target[row, start : start + PIXELS_AT_ONCE] = passed


class _Layout(NamedTuple):
    """How an image, (C, H, W), is worked on: its order of axes, and where y and x are in that."""

    order: tuple[int, int, int]
    axes: tuple[int, int]

    @staticmethod
    def of(channels: int) -> _Layout:
        return _Layout((0, 1, 2), (1, 2)) if channels < FEW_CHANNELS else _Layout((1, 2, 0), (0, 1))

    def view(self, image: np.ndarray) -> np.ndarray:
        return image.transpose(self.order)

    def take(self, view: np.ndarray, pixels: Sequence[Pixels]) -> np.ndarray:
        """Some rows and columns of a view; one axis after the other, which is faster than both at once."""
        slices = [p if isinstance(p, slice) else slice(p[0], p[-1] + 1) for p in pixels]
        view = view[self.at(slices)]
        for axis, along, between in zip(self.axes, pixels, slices, strict=True):
            if not isinstance(along, slice):
                view = view[(slice(None),) * axis + (along - between.start,)]
        return view

    def at(self, pixels: Sequence[Pixels]) -> tuple[Any, ...]:
        """An index of a view, for some rows and columns."""
        y, x = pixels
        if isinstance(y, np.ndarray) and isinstance(x, np.ndarray):
            y = y[:, None]
        return (*(slice(None),) * self.axes[0], y, x)


class _Source:
    """Windows of some channels of one image, as matrix products take them."""

    def __init__(self, features: np.ndarray, layout: _Layout, piece: _Piece, dtype: np.dtype):
        view = layout.view(features[piece.image, piece.channels])
        self.layout = layout
        self.dtype = dtype
        self.base = view[piece.window]
        self.ready = view.dtype == self.dtype and _blas_reads(view)
        if piece.crowded and not self.ready and self.base.size * self.dtype.itemsize <= numpy_job.WORKSPACE:
            self.base = np.ascontiguousarray(self.base, self.dtype)
            self.ready = True

    def window(self, box: _Box) -> np.ndarray:
        """The pixels of a box; as they are where they would not fit the workspace."""
        window = self.layout.take(self.base, box.pixels)
        if self.ready or window.size * self.dtype.itemsize > numpy_job.WORKSPACE:
            return window
        return np.ascontiguousarray(window, self.dtype)

    def level_window(self, box: _Box) -> np.ndarray:
        """The same, less one pixel of it: slopes are the same, and small against less of an offset."""
        window = self.window(box)
        if window.dtype != self.dtype:
            return window
        pixel = window[self.layout.at((slice(0, 1), slice(0, 1)))]
        return window - np.where(np.isfinite(pixel), pixel, 0)


# ---- the plan ----


Blocks = tuple[list[Block], list[Block]]
"""A box's weights along y and x, or their changes."""


class _Box(NamedTuple):
    """A box at work."""

    number: int  # in the caller's boxes
    place: int  # in the chunk
    pixels: tuple[Pixels, Pixels]  # its rows and columns in the piece's window
    terms: list[Blocks]  # what is to be added up; without directions only its weights

    def partners(self, directions: Sequence[np.ndarray]) -> Iterator[tuple[int, list[Block]]]:
        """The axes, along which weights have yet to change, and the weights along the other axis."""
        for taken, blocks in zip(geometry.terms(len(directions)), self.terms, strict=True):
            for axis in (0, 1):
                if taken[axis] is None:
                    yield axis, blocks[1 - axis]


class _Piece(NamedTuple):
    """The boxes of a chunk that lie in one image, and some of the channels."""

    image: int
    channels: slice
    window: tuple[slice, ...]  # the part of the image that they touch, as an index
    pixels: int  # that they touch, each on its own
    crowded: bool  # more of them than that part has
    boxes: list[_Box]

    def multiplications(self, bins: tuple[int, int]) -> int:
        """About how many there are, for as many as a block of bins has at a pixel; 0 if boxes are too small to share.

        What there is to do besides the products of a box keeps all other threads waiting.
        """
        channels = self.channels.stop - self.channels.start
        number = min(BLOCK, max(bins)) * channels * (self.pixels + len(self.boxes) * math.prod(bins))
        return number if number >= WORTH_SHARING * len(self.boxes) else 0


class _Chunk(NamedTuple):
    """Boxes whose weights are in memory together, sorted by image; or a part of one that is too large for that."""

    boxes: np.ndarray
    axes: list[geometry.Axis]
    weights: list[AxisWeights]
    pieces: list[_Piece]
    empty: np.ndarray  # those boxes that touch no pixel
    is_part: bool = False
    is_first: bool = True  # part of these bins

    def of(self, crops: np.ndarray) -> np.ndarray:
        """(K, C, bins_y, bins_x) those bins of all crops that are at work."""
        y, x = (slice(weights.taps.bins.start, weights.taps.bins.stop) for weights in self.weights)
        return crops[:, :, y, x]

    def inside(self) -> tuple[np.ndarray, np.ndarray]:
        """(k, bins_y) and (k, bins_x) bool: the bin has a sample inside the image."""
        y, x = (weights.taps.inside() for weights in self.weights)
        return y, x


class _Plan(NamedTuple):
    """All that is to be done."""

    job: Job
    numbers: np.ndarray  # the boxes

    def chunks(self) -> Iterator[_Chunk]:
        """All boxes, as many at a time as the workspace holds the weights of."""
        job, rule, sizes = self.job, self.job.rule, self.job.shape[2:]
        order = self.numbers[np.argsort(job.batch_indices[self.numbers], kind="stable")]
        axes = [axis.of(order) for axis in job.axes]
        whole = [geometry.Part(range(bins)) for bins in rule.bins]
        each = [AxisWeights.estimate_bytes(rule, axes[a], rule.bins[a], sizes[a]) for a in (0, 1)]
        copies = 2 + len(job.directions)  # the gradient to weights is as large as they are
        cost = (each[0] + each[1]) * (copies / numpy_job.WORKSPACE)
        if job.shape[1] * math.prod(rule.bins) * job.dtype.itemsize > numpy_job.WORKSPACE:
            cost[:] = math.inf
        for some in numpy_job.runs(cost):
            chosen, part = order[some], [axis.of(some) for axis in axes]
            if cost[some.start] <= 1:
                yield self._chunk(chosen, part, [self._weights(part, axis, whole[axis]) for axis in (0, 1)])
            else:
                yield from self._cut(chosen, part)

    def _weights(self, axes: list[geometry.Axis], axis: int, part: geometry.Part) -> AxisWeights:
        taps = Taps(self.job.rule, axes[axis], part, self.job.shape[2 + axis])
        return AxisWeights(taps, self.job.dtype, 0.5 if self.job.shape[1] < FEW_CHANNELS else 0.75)

    def _cut(self, chosen: np.ndarray, axes: list[geometry.Axis]) -> Iterator[_Chunk]:
        """One box, in parts that the workspace holds; the parts of the same bins one after another."""
        job, bins, limit = self.job, self.job.rule.bins, numpy_job.WORKSPACE / 2 / (2 + len(self.job.directions))
        numbers_at_once = max(1, numpy_job.WORKSPACE // (job.shape[1] * job.dtype.itemsize))  # of each channel
        rows = max(1, min(bins[0], numbers_at_once // bins[1]))
        at_most = (rows, max(1, numbers_at_once // rows))

        def parts(axis: int) -> Iterator[list[geometry.Part]]:
            return AxisWeights.cut(job.rule, axes[axis], bins[axis], job.shape[2 + axis], at_most[axis], limit)

        for parts_y in parts(0):
            for parts_x in parts(1):
                is_first = True
                for y in parts_y:
                    along_y = self._weights(axes, 0, y)
                    for x in parts_x:
                        chunk = self._chunk(chosen, axes, [along_y, self._weights(axes, 1, x)])
                        yield chunk._replace(is_part=True, is_first=is_first)
                        is_first = False

    def _chunk(self, chosen: np.ndarray, axes: list[geometry.Axis], weights: list[AxisWeights]) -> _Chunk:
        channels, itemsize = self.job.shape[1], self.job.dtype.itemsize
        layout, images = _Layout.of(channels), self.job.batch_indices[chosen]
        terms = self._terms(chosen, axes, weights)
        numbers, images = chosen.tolist(), images.tolist()
        counts, first, stop = ([getattr(w, name).tolist() for w in weights] for name in ("counts", "first", "stop"))
        active = [place for place in range(len(numbers)) if counts[0][place] and counts[1][place]]
        pieces = []
        for image, same in itertools.groupby(active, images.__getitem__):
            places = list(same)
            low = [min(along[place] for place in places) for along in first]
            high = [max(along[place] for place in places) for along in stop]
            window = layout.at([slice(a, b) for a, b in zip(low, high, strict=True)])
            area = (high[0] - low[0]) * (high[1] - low[1])
            members = [
                _Box(
                    numbers[place],
                    place,
                    (weights[0].pixels(place, low[0]), weights[1].pixels(place, low[1])),
                    [(along_y[place], along_x[place]) for along_y, along_x in terms],
                )
                for place in places
            ]
            pixels = sum(counts[0][place] * counts[1][place] for place in places)
            at_once = max(1, numpy_job.WORKSPACE // (area * itemsize))
            for start in range(0, channels, at_once):
                some = slice(start, min(start + at_once, channels))
                pieces.append(_Piece(image, some, window, pixels, pixels >= area, members))
        return _Chunk(chosen, axes, weights, pieces, chosen[(weights[0].counts == 0) | (weights[1].counts == 0)])

    def _terms(
        self, chosen: np.ndarray, axes: list[geometry.Axis], weights: list[AxisWeights]
    ) -> list[tuple[list[list[Block]], list[list[Block]]]]:
        """For each term the matrices of all boxes along y and x."""

        @functools.cache
        def blocks(axis: int, direction: int | None) -> list[list[Block]]:
            flat = weights[axis].flat
            if direction is not None:
                of_position = axes[axis].change(*self.job.edges(direction, axis, chosen))
                flat = weights[axis].scatter(*weights[axis].taps.changes(*of_position))
            return weights[axis].blocks(flat)

        return [(blocks(0, y), blocks(1, x)) for y, x in geometry.terms(len(self.job.directions))]


# ---- the arithmetic ----


def _product(values: np.ndarray, axis: int, matrix: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """`matrix` (m, n) times `values` (..., n, ...) along `axis`, which gets m entries. The first of three axes too."""
    product: np.ndarray
    if axis == 2:
        product = np.matmul(values, matrix.T, out=out)
        return product
    if axis == 1:
        product = np.matmul(matrix, values, out=out)
        return product
    rows, columns = values.shape[1:]
    flat = np.matmul(matrix, values.reshape(len(values), rows * columns))
    product = flat.reshape(len(matrix), rows, columns)
    return product if out is None else _copy(out, product)


def _exact_product(values: np.ndarray, axis: int, matrix: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The same for values that hold NaN or infinities: these reach only where their weight is not 0.

    A plain product would spread them over all that it computes, since 0 * NaN is NaN.
    """
    total = _product(np.where(np.isfinite(values), values, 0), axis, matrix)

    def reached(where: np.ndarray, weights: np.ndarray) -> np.ndarray:
        found: np.ndarray = _product(where.astype(matrix.dtype), axis, weights.astype(matrix.dtype)) > 0
        return found

    up, down = np.isposinf(values), np.isneginf(values)
    total[reached(up, matrix > 0) | reached(down, matrix < 0)] += np.inf
    total[reached(up, matrix < 0) | reached(down, matrix > 0)] -= np.inf
    total[reached(np.isnan(values), matrix != 0)] = np.nan
    return total if out is None else _copy(out, total)


def _copy(out: np.ndarray, values: np.ndarray) -> np.ndarray:
    out[...] = values
    return out


def _crop(
    window: np.ndarray, dtype: np.dtype, terms: list[Blocks], axes: tuple[int, int], out: np.ndarray | None
) -> np.ndarray:
    """The crop of a window: Wy X Wx^T, or a sum of such."""
    for product in (_product, _exact_product):
        crops = []
        for blocks in terms:
            first, second = _order(window.shape, blocks, axes)
            lines = _resample_window(window, dtype, first, blocks[first], axes, product)
            crops.append(_resample_axis(lines, axes[second], blocks[second], product, out if len(terms) == 1 else None))
        crop = sum(crops[1:], crops[0])
        if _is_finite(crop):
            break
    return crop


def _resample_window(
    window: np.ndarray, dtype: np.dtype, axis: int, blocks: list[Block], axes: tuple[int, int], product: Product
) -> np.ndarray:
    """A window resampled along y (0) or x (1); in strips, if it is one that is still to be converted."""
    if window.dtype == dtype and _blas_reads(window):
        return _resample_axis(window, axes[axis], blocks, product)
    across = axes[1 - axis]
    parts = [
        _resample_axis(np.ascontiguousarray(window[_at(across, strip)], dtype), axes[axis], blocks, product)
        for strip in _strips(window.shape[across], window.size * dtype.itemsize)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, across)


def _strips(width: int, nbytes: int) -> Iterator[slice]:
    """Cuts a width, over which so many bytes lie, into parts that the workspace holds."""
    step = max(1, numpy_job.WORKSPACE * width // max(nbytes, 1))
    for start in range(0, width, step):
        yield slice(start, min(start + step, width))


def _order(shape: tuple[int, ...], blocks: Blocks, axes: tuple[int, int]) -> tuple[int, int]:
    """Which of y (0) and x (1) to resample first: the one whose result is the smaller.

    If in doubt, the one in the middle of the layout: its products read whole rows as they lie. What lies between
    the two products is thus never much larger than both the window and the crop.
    """
    bins = [along[-1].bins.stop for along in blocks]
    between = [bins[axis] * shape[axes[1 - axis]] for axis in (0, 1)]
    first = axes.index(1)
    if between[first] > 2 * between[1 - first]:
        first = 1 - first
    return (first, 1 - first)


def _resample_axis(
    values: np.ndarray, axis: int, blocks: list[Block], product: Product, out: np.ndarray | None = None
) -> np.ndarray:
    if out is None:
        shape = list(values.shape)
        shape[axis] = blocks[-1].bins.stop
        out = np.empty(shape, values.dtype)
    for block in blocks:
        product(values[_at(axis, block.pixels)], axis, block.matrix, out[_at(axis, block.bins)])
    return out


def _add_spread(
    target: np.ndarray,
    grad: np.ndarray,
    box: tuple[Pixels, Pixels],
    blocks: Blocks,
    layout: _Layout,
    product: Product,
) -> None:
    """Adds the gradient to a box's pixels from that to its crop, Wy^T G Wx; in strips, if it is a large one."""
    axes = layout.axes
    shape = [count_of(pixels) for pixels in box]
    window = list(grad.shape)
    window[axes[0]], window[axes[1]] = shape
    second, first = _order(tuple(window), blocks, axes)
    lines = _spread_axis(grad, axes[first], shape[first], blocks[first], product)
    pixels = list(box)
    for strip in _strips(shape[first], math.prod(window) * grad.itemsize):
        pixels[first] = some_of(box[first], strip)
        part = _spread_axis(lines[_at(axes[first], strip)], axes[second], shape[second], blocks[second], product)
        target[layout.at(pixels)] += part


def _spread_axis(values: np.ndarray, axis: int, length: int, blocks: list[Block], product: Product) -> np.ndarray:
    """The transpose of `_resample_axis`."""
    if len(blocks) == 1:
        return product(values, axis, blocks[0].matrix.T)
    shape = list(values.shape)
    shape[axis] = length
    total = np.zeros(shape, values.dtype)
    written = range(0)  # neighbouring blocks share hardly a pixel: all others are written once and not added up
    for block in blocks:
        pixels = range(block.pixels.start, block.pixels.stop)
        shared = slice(max(pixels.start, written.start), min(pixels.stop, written.stop))
        before = total[_at(axis, shared)].copy() if shared.start < shared.stop else None
        product(values[_at(axis, block.bins)], axis, block.matrix.T, total[_at(axis, block.pixels)])
        if before is not None:
            total[_at(axis, shared)] += before
        written = range(min(pixels.start, written.start), max(pixels.stop, written.stop)) if written else pixels
    return total


def _add_weight_gradient(
    slopes: list[Block], axis: int, grad: np.ndarray, window: np.ndarray, others: list[Block], axes: tuple[int, int]
) -> None:
    """Adds the gradient to a box's weights along `axis`: the crop's, against the window resampled along the other."""
    other = 1 - axis
    for product in (_product, _exact_product):
        lines = _resample_window(window, grad.dtype, other, others, axes, product)
        parts = [_contract(grad[_at(axes[axis], s.bins)], lines[_at(axes[axis], s.pixels)], axes[axis]) for s in slopes]
        if all(_is_finite(part) for part in parts):
            break
    for slope, part in zip(slopes, parts, strict=True):
        slope.matrix[...] += part


def _contract(left: np.ndarray, right: np.ndarray, axis: int) -> np.ndarray:
    """The sum of left * right over all axes but `axis`, of which all pairs are taken: (m, n)."""
    lead, trail = math.prod(left.shape[:axis]), math.prod(left.shape[axis + 1 :])
    if trail == 1:
        return left.reshape(lead, left.shape[axis]).T @ right.reshape(lead, right.shape[axis])
    left = left.reshape(lead, left.shape[axis], trail)
    right = right.reshape(lead, right.shape[axis], trail)
    return (left @ right.transpose(0, 2, 1)).sum(axis=0)


def _at(axis: int, part: slice) -> tuple[slice, ...]:
    return (slice(None),) * axis + (part,)
