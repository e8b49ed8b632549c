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

from cupy_roialign import geometry, numpy_job, numpy_slopes, threads
from cupy_roialign.numpy_job import Job, fill_outside
from cupy_roialign.numpy_weights import BLOCK, AxisWeights, Block, Pixels, Taps, count_of, first_of, some_of

PIXELS_AT_ONCE = 256
"""Pixels on their way to planes that lie in a small buffer."""

FEW_CHANNELS = 16
"""Below, an image is worked on as planes, (C, H, W), unless it lies as pixels, (H, W, C); from here on as pixels."""

MANY_CHANNELS = 128
"""From here on gradients to boxes are by products of a few rows of pixels; of fewer, these are not worth the calls."""

NEAR = 16
"""Rows of pixels; boxes that begin in the same are worked on from left to right."""

WORTH_SHARING = 2_000_000
"""Multiplications of a box from which on boxes are shared out among threads."""

Product = Callable[..., np.ndarray]


def forward(job: Job, numbers: np.ndarray, features: np.ndarray, output: np.ndarray) -> None:
    """Writes the crops of some boxes."""
    layout, total = _Layout.of(features), None
    for chunk in _Plan(job, numbers, layout).chunks():
        target = chunk.of(output)
        if chunk.is_first and chunk.empty:
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
    layout = _Layout.of(total)
    for chunk in _Plan(job, numbers, layout, spread=True).chunks():
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
    layout = _PLANES if job.shape[1] < FEW_CHANNELS else _PIXELS  # that contract a few channels best
    of_start, of_bin = np.zeros((2, 2, len(job.boxes)))
    for chunk in _Plan(job, numbers, layout).chunks():
        slopes = [np.zeros_like(weights.flat) for weights in chunk.weights]
        for add, many in ((_add_by_lines, False), (_add_by_bands, True)):
            pieces = [piece for piece in chunk.pieces if _by_bands(piece, job.rule.bins) == many]
            if pieces:
                add(job, layout, chunk, pieces, grad_output, features, slopes)
        for along, weights, slope in zip(_along(chunk.weights), chunk.weights, slopes, strict=True):
            to_start, to_bin = weights.taps.position_gradient(slope[weights.low], slope[weights.high])
            of_start[along, chunk.boxes] += to_start
            of_bin[along, chunk.boxes] += to_bin
    low, high = job.slopes.gradient(of_start, of_bin)
    gradient[:, job.rule.columns[:2]] += low.T
    gradient[:, job.rule.columns[2:]] += high.T


def _by_bands(piece: _Piece, bins: tuple[int, int]) -> bool:
    """Not where there are far more bins than pixels: each bin takes its rows of pixels anew."""
    return piece.channel_count >= MANY_CHANNELS and len(piece.boxes) * math.prod(bins) <= 2 * piece.pixels


def _add_by_lines(
    job: Job,
    layout: _Layout,
    chunk: _Chunk,
    pieces: list[_Piece],
    grad_output: np.ndarray,
    features: np.ndarray,
    slopes: list[np.ndarray],
) -> None:
    """Adds the gradients to the weights: windows resampled along one axis, then times the gradients to the crops."""
    partners, blocks = _partners(job), _matrices(chunk.weights, slopes)
    for piece in pieces:
        source = _Source(features, layout, piece, job.dtype)

        def take(box: _Box, piece: _Piece = piece, source: _Source = source) -> None:
            window = source.level_window(box)
            grad = chunk.of(grad_output)[box.number, piece.channels]
            if not _is_finite(grad):  # bins without a sample stay as they are, whatever the gradient there
                inside_y, inside_x = chunk.inside()
                grad = np.where(inside_y[box.place][:, None] & inside_x[box.place], grad, 0)
            grad = layout.view(grad).astype(job.dtype, copy=False)
            for term, axis in partners:
                others = box.terms[term][1 - axis]
                _add_weight_gradient(blocks[axis][box.place], axis, grad, window, others, layout.axes)

        threads.run(take, piece.boxes, 2 * piece.multiplications(job.rule.bins))


def _add_by_bands(
    job: Job,
    layout: _Layout,
    chunk: _Chunk,
    pieces: list[_Piece],
    grad_output: np.ndarray,
    features: np.ndarray,
    slopes: list[np.ndarray],
) -> None:
    """The same, the other way round: pixels times the gradients to the crops, and then weights."""
    partners, bands = _partners(job), numpy_slopes.Bands(chunk.weights[0])
    along_y, along_x = np.zeros(len(bands.places), job.dtype), _matrices(chunk.weights, slopes)[1]
    weights_y = [chunk.along_y[term][bands.places] for term, axis in partners if axis == 1]
    terms_x = [term for term, axis in partners if axis == 0]
    grads = chunk.of(grad_output).transpose(0, 2, 1, 3)
    for piece in pieces:
        source = _Source(features, layout, piece, job.dtype)
        # Boxes side by side one after another: what they share is in the cache. By one thread: a second would mostly
        # wait for Python, that so many small products are called by.
        for box in sorted(piece.boxes, key=lambda box: (first_of(box.pixels[0]) // NEAR, first_of(box.pixels[1]))):
            entries = bands.entries(box.place)
            numpy_slopes.add(
                along_y[entries],
                along_x[box.place],
                [weights[entries] for weights in weights_y],
                [box.terms[term][1] for term in terms_x],
                bands.rows[box.place],
                _readable(grads[box.number, :, piece.channels], job.dtype),
                functools.partial(source.level_rows, box, source.level(box)),
            )
    slopes[0][bands.places] += along_y


def _partners(job: Job) -> list[tuple[int, int]]:
    """The terms and axes along which weights have yet to change, those along the other being as they are there."""
    taken = geometry.terms(len(job.directions))
    return [(term, axis) for term, changes in enumerate(taken) for axis in (0, 1) if changes[axis] is None]


# ---- memory ----


def _blas_reads(view: np.ndarray) -> bool:
    """Whether matrix products take the last two axes of `view` as they lie."""
    rows, columns = view.strides[-2:]
    native = view.flags.aligned and view.dtype.isnative
    return native and columns == view.itemsize and rows >= view.shape[-1] * view.itemsize


def _readable(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`view` as matrix products take it, its last two axes in either order."""
    if view.dtype == dtype and (_blas_reads(view) or _blas_reads(view.swapaxes(-1, -2))):
        return view
    return np.ascontiguousarray(view, dtype)


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
    def of(features: np.ndarray) -> _Layout:
        channels = features.shape[1]
        beside = (features.strides[1], features.strides[3]) == (features.itemsize, channels * features.itemsize)
        return _PIXELS if channels >= FEW_CHANNELS or (channels > 1 and beside) else _PLANES

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


_PLANES, _PIXELS = _Layout((0, 1, 2), (1, 2)), _Layout((1, 2, 0), (0, 1))


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

    def level(self, box: _Box) -> np.ndarray:
        """(columns * C,) the first pixel of a box, for each column that it touches; 0 where that is not finite."""
        y, x = map(first_of, box.pixels)
        pixel = self.base[y, x].astype(self.dtype)
        if not _is_finite(pixel):
            pixel = np.where(np.isfinite(pixel), pixel, 0)
        return pixel[None].repeat(count_of(box.pixels[1]), axis=0).ravel()

    def level_rows(self, box: _Box, level: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """(rows, columns * C) some of the pixels of a box, less its level."""
        y, x = some_of(box.pixels[0], rows), some_of(box.pixels[1], columns)
        if isinstance(y, slice) and isinstance(x, slice):
            pixels, out = self.base[y, x], None
        else:  # both axes at once: one after the other is two copies, and leaves pixels in another order
            pixels = out = self.base[
                np.ix_(*(np.arange(p.start, p.stop) if isinstance(p, slice) else p for p in (y, x)))
            ]
        if not self.ready:
            pixels = out = np.array(pixels, self.dtype, order="C")
        flat = pixels.reshape(len(pixels), -1)  # long rows: to take a level from each pixel is half as fast
        return np.subtract(flat, level[: flat.shape[1]], out=None if out is None else flat)


# ---- the plan ----


Blocks = tuple[list[Block], list[Block]]
"""A box's weights along y and x, or their changes."""

Matrices = tuple[list[list[Block]], list[list[Block]]]
"""Those of all boxes along y, and those along x."""


class _Box(NamedTuple):
    """A box at work."""

    number: int  # in the caller's boxes
    place: int  # in the chunk
    pixels: tuple[Pixels, Pixels]  # its rows and columns in the piece's window
    terms: list[Blocks]  # what is to be added up; without directions only its weights


class _Piece(NamedTuple):
    """The boxes of a chunk that lie in one image, and some of the channels."""

    image: int
    channels: slice
    window: tuple[slice, ...]  # the part of the image that they touch, as an index
    pixels: int  # that they touch, each on its own
    crowded: bool  # more of them than that part has
    boxes: list[_Box]

    @property
    def channel_count(self) -> int:
        return self.channels.stop - self.channels.start

    def multiplications(self, bins: tuple[int, int]) -> int:
        """About how many there are, for as many as a block of bins has at a pixel; 0 if boxes are too small to share.

        What there is to do besides the products of a box keeps all other threads waiting.
        """
        number = min(BLOCK, max(bins)) * self.channel_count * (self.pixels + len(self.boxes) * math.prod(bins))
        return number if number >= WORTH_SHARING * len(self.boxes) else 0


class _Chunk(NamedTuple):
    """Boxes whose weights are in memory together, sorted by image; or a part of one that is too large for that."""

    boxes: np.ndarray
    weights: list[AxisWeights]  # one of both axes, or one of each
    along_y: list[np.ndarray]  # for each term the flat array with the matrices of y
    pieces: list[_Piece]
    empty: list[int]  # those boxes that touch no pixel
    is_part: bool = False
    is_first: bool = True  # part of these bins

    def of(self, crops: np.ndarray) -> np.ndarray:
        """(K, C, bins_y, bins_x) those bins of all crops that are at work."""
        y, x = (slice(bins.start, bins.stop) for weights in self.weights for bins in weights.taps.bins)
        return crops[:, :, y, x]

    def inside(self) -> tuple[np.ndarray, np.ndarray]:
        """(k, bins_y) and (k, bins_x) bool: the bin has a sample inside the image."""
        y, x = (inside for weights in self.weights for inside in weights.taps.inside())
        return y, x


class _Plan(NamedTuple):
    """All that is to be done."""

    job: Job
    numbers: np.ndarray  # the boxes
    layout: _Layout
    spread: bool = False  # crops to pixels

    def chunks(self) -> Iterator[_Chunk]:
        """All boxes, as many at a time as the workspace holds the weights of."""
        job, rule = self.job, self.job.rule
        order, axes = self.numbers, job.axes
        if job.shape[0] > 1 or len(order) < len(job.boxes):
            order = order[np.argsort(job.batch_indices[order], kind="stable")]
            axes = axes.of(order)
        share = (2 + len(job.directions)) / numpy_job.WORKSPACE  # the gradient to weights is as large as they are
        crop_fits = job.shape[1] * math.prod(rule.bins) * job.dtype.itemsize <= numpy_job.WORKSPACE
        if crop_fits and len(order) * AxisWeights.most_bytes(rule, job.shape[2:]) * share <= 1:
            yield self._chunk(order, [self._weights(axes, geometry.whole(rule))])
            return
        cost = AxisWeights.estimate_bytes(rule, axes).sum(axis=0) * share if crop_fits else np.full(len(order), np.inf)
        for some in numpy_job.runs(cost):
            if cost[some.start] <= 1:
                yield self._chunk(order[some], [self._weights(axes.of(some), geometry.whole(rule))])
            else:
                yield from self._cut(order[some], axes.of(some))

    def _weights(self, axes: geometry.Axes, part: geometry.Part) -> AxisWeights:
        job = self.job
        dense, crop = 0.5 if job.shape[1] < FEW_CHANNELS else 0.75, job.shape[1] * math.prod(job.rule.bins)
        return AxisWeights(Taps(job.rule, axes, part), job.dtype, dense, crop, self.spread)

    def _cut(self, chosen: np.ndarray, axes: geometry.Axes) -> Iterator[_Chunk]:
        """One box, in parts that the workspace holds; the parts of the same bins one after another."""
        job, bins, limit = self.job, self.job.rule.bins, numpy_job.WORKSPACE / 2 / (2 + len(self.job.directions))
        numbers_at_once = max(1, numpy_job.WORKSPACE // (job.shape[1] * job.dtype.itemsize))  # of each channel
        rows = max(1, min(bins[0], numbers_at_once // bins[1]))
        y, x = axes.along(0), axes.along(1)
        for parts_y in AxisWeights.cut(job.rule, y, rows, limit):
            for parts_x in AxisWeights.cut(job.rule, x, max(1, numbers_at_once // rows), limit):
                is_first = True
                for part_y in parts_y:
                    along_y = self._weights(y, part_y)
                    for part_x in parts_x:
                        chunk = self._chunk(chosen, [along_y, self._weights(x, part_x)])
                        yield chunk._replace(is_part=True, is_first=is_first)
                        is_first = False

    def _chunk(self, chosen: np.ndarray, weights: list[AxisWeights]) -> _Chunk:
        channels, itemsize, count = self.job.shape[1], self.job.dtype.itemsize, len(chosen)
        images, numbers = self.job.batch_indices[chosen].tolist(), chosen.tolist()
        taken = geometry.terms(len(self.job.directions))
        directions = {direction for term in taken for direction in term}
        flats = {direction: self._flats(chosen, weights, direction) for direction in directions}
        matrices = {direction: _matrices(weights, some) for direction, some in flats.items()}
        terms = [(matrices[y][0], matrices[x][1]) for y, x in taken]
        lines = [line for each in weights for line in each.lines]  # along y, then along x
        pairs = list(zip(lines[:count], lines[count:], strict=True))
        active = [place for place, (y, x) in enumerate(pairs) if y.number and x.number]
        pieces = []
        for image, same in itertools.groupby(active, images.__getitem__):
            places = list(same)
            low, high = [], []
            for axis in (0, 1):
                low.append(min(pairs[place][axis].first for place in places))
                high.append(max(pairs[place][axis].stop for place in places))
            window = self.layout.at([slice(a, b) for a, b in zip(low, high, strict=True)])
            area = (high[0] - low[0]) * (high[1] - low[1])
            members = [
                _Box(
                    numbers[place],
                    place,
                    (pairs[place][0].pixels(low[0]), pairs[place][1].pixels(low[1])),
                    [(along_y[place], along_x[place]) for along_y, along_x in terms],
                )
                for place in places
            ]
            pixels = sum(pairs[place][0].number * pairs[place][1].number for place in places)
            at_once = max(1, numpy_job.WORKSPACE // (area * itemsize))
            if self.layout is _PIXELS and channels < FEW_CHANNELS:
                at_once = channels  # they lie beside each other, and are read so
            for start in range(0, channels, at_once):
                some = slice(start, min(start + at_once, channels))
                pieces.append(_Piece(image, some, window, pixels, pixels >= area, members))
        empty = [] if len(active) == count else chosen[sorted(set(range(count)).difference(active))].tolist()
        return _Chunk(chosen, weights, [flats[y][0] for y, _ in taken], pieces, empty)

    def _flats(self, chosen: np.ndarray, weights: list[AxisWeights], direction: int | None) -> list[np.ndarray]:
        """The weights or, with a direction, how they change along it."""
        if direction is None:
            return [each.flat for each in weights]
        changes = self.job.changes(direction, chosen)
        return [
            each.scatter(*each.taps.changes(*(change[along] for change in changes)))
            for along, each in zip(_along(weights), weights, strict=True)
        ]


def _along(weights: list[AxisWeights]) -> list[slice]:
    """The axes that each is of."""
    return [slice(None)] if len(weights) == 1 else [slice(0, 1), slice(1, 2)]


def _matrices(weights: list[AxisWeights], flats: list[np.ndarray]) -> Matrices:
    """The matrices of all boxes as views of flat arrays, like those of the weights."""
    lines = [line for each, flat in zip(weights, flats, strict=True) for line in each.blocks(flat)]
    return lines[: len(lines) // 2], lines[len(lines) // 2 :]


# ---- the arithmetic ----


def _product(values: np.ndarray, axis: int, matrix: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """`matrix` (m, n) times `values` (..., n, ...) along `axis`, which gets m entries. The first of three axes too."""
    product: np.ndarray
    if axis == 2:
        product = np.matmul(values, np.ascontiguousarray(matrix.T), out=out)  # BLAS is faster than with matrix.T itself
        return product
    if axis == 1:
        product = np.matmul(matrix, values, out=out)
        return product
    rows, columns = values.shape[1:]
    values = values.reshape(len(values), rows * columns)
    if out is not None and out.flags.c_contiguous:
        np.matmul(matrix, values, out=out.reshape(len(matrix), rows * columns))
        return out
    product = np.matmul(matrix, values).reshape(len(matrix), rows, columns)
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
            # Planes are read as well along x as along y. But they are spread along x first: y writes whole rows.
            doubt = 1 if axes == _PLANES.axes else 2
            first, second = _order(window.shape, [along[-1].to.stop for along in blocks], axes, doubt)
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


def _order(shape: Sequence[int], bins: Sequence[int], axes: tuple[int, int], doubt: float = 2) -> tuple[int, int]:
    """Which of y (0) and x (1) to resample first: the one whose result is the smaller.

    If in doubt, `doubt` times smaller, the one whose products read whole rows as they lie. What lies between the two
    products is thus never much larger than both the window and the crop.
    """
    between = [bins[axis] * shape[axes[1 - axis]] for axis in (0, 1)]
    first = 1 if axes == _PIXELS.axes and shape[2] >= FEW_CHANNELS else 0
    if between[first] > doubt * between[1 - first]:
        first = 1 - first
    return (first, 1 - first)


def _is_narrow(values: np.ndarray, axis: int) -> bool:
    """Whether products along the axis are many small ones: x of pixels of few channels."""
    return axis == 1 and values.shape[2] < FEW_CHANNELS <= len(values)


def _resample_axis(
    values: np.ndarray, axis: int, blocks: list[Block], product: Product, out: np.ndarray | None = None
) -> np.ndarray:
    if out is None:
        if len(blocks) == 1 and not _is_narrow(values, axis):
            return product(values[_at(axis, blocks[0].of)], axis, blocks[0].matrix)
        shape = list(values.shape)
        shape[axis] = blocks[-1].to.stop
        out = np.empty(shape, values.dtype)
    if _is_narrow(values, axis):  # then by planes
        for rows in _strips(len(values), max(values.nbytes, out.nbytes)):
            planes = np.ascontiguousarray(values[rows].transpose(2, 0, 1))
            for channel, plane in enumerate(_resample_axis(planes, 2, blocks, product)):
                out[rows, :, channel] = plane  # all at once NumPy would take the few channels for its innermost loop
        return out
    for block in blocks:
        product(values[_at(axis, block.of)], axis, block.matrix, out[_at(axis, block.to)])
    return out


def _add_spread(
    target: np.ndarray,
    grad: np.ndarray,
    box: tuple[Pixels, Pixels],
    blocks: Blocks,
    layout: _Layout,
    product: Product,
) -> None:
    """Adds the gradient to a box's pixels from that to its crop, Wy^T G Wx.

    What the second product makes is added a block at a time where that can be, and in strips if it is a large one.
    """
    axes = layout.axes
    shape = [count_of(pixels) for pixels in box]
    window = list(grad.shape)
    window[axes[0]], window[axes[1]] = shape
    second, first = _order(window, [grad.shape[axis] for axis in axes], axes)
    lines = _resample_axis(grad, axes[first], blocks[first], product)
    groups = [blocks[second]]
    if axes[second] != 2 and not _is_narrow(lines, axes[second]):  # whole rows or pixels, while they are in the cache
        groups = [[block] for block in blocks[second]]
    longest = max(group[-1].to.stop - group[0].to.start for group in groups)
    pixels = list(box)
    for strip in _strips(shape[first], lines.size // grad.shape[axes[second]] * longest * grad.itemsize):
        some = lines[_at(axes[first], strip)]
        pixels[first] = some_of(box[first], strip)
        for group in groups:
            pixels[second] = some_of(box[second], slice(group[0].to.start, group[-1].to.stop))
            target[layout.at(pixels)] += _resample_axis(some, axes[second], group, product)


def _add_weight_gradient(
    slopes: list[Block], axis: int, grad: np.ndarray, window: np.ndarray, others: list[Block], axes: tuple[int, int]
) -> None:
    """Adds the gradient to a box's weights along `axis`: the crop's, against the window resampled along the other."""
    other = 1 - axis
    for product in (_product, _exact_product):
        lines = _resample_window(window, grad.dtype, other, others, axes, product)
        parts = [_contract(grad[_at(axes[axis], s.to)], lines[_at(axes[axis], s.of)], axes[axis]) for s in slopes]
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
