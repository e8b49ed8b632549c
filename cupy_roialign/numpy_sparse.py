"""All boxes as one sparse matrix, with SciPy: crops = M @ pixels, and the gradient to pixels = M.T @ gradient to crops.

A row of M is a bin, and a column a pixel. The matrices beside it have a row for each bin or pixel, of its channels.
Where channels are last in memory, features are such a matrix. Otherwise the part of them that boxes touch is brought
into that order, a few channels at a time, so that it stays in the cache meanwhile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cupy_roialign import arrays, geometry, numpy_job, threads
from cupy_roialign.numpy_job import Job, fill_outside
from cupy_roialign.numpy_weights import BLOCK, AxisRows, Pixels, Taps, count_of, some_of, span

ENTRY_BYTES, SAMPLE_BYTES, PIXEL_BYTES = 128, 512, 256
"""Of an entry of the matrix, a sample along an axis, and a pixel or bin of a block of channels: what there is of each
at once is to be far less than the workspace, which they all share."""

BLOCK_BYTES = 128
"""Channels that are brought into order at once, as bytes of a pixel."""

STRIP_BYTES = 2**20
"""What a product makes at once. It stays in the cache and, mostly, in memory that need not be got anew."""

TILE = 256
"""Boxes with their centres in a part of an image of about this side are worked on together."""

WINDOW = 256
"""Pixels that a window of its own is taken to cost besides those that it has."""

LINE = 64
"""Bytes of a line of the cache."""

SAME_PLACE = 4096
"""Memory so many bytes apart falls on one place in the cache."""

MOST_ENTRIES = 64
"""Entries of a bin, at most: they are added up one by one, so that of more of them rounding would show."""

# Nanoseconds, fitted so that the way that is chosen is seldom the slower one, for some hundred shapes: what a box gains
# that goes this way, and a product and a pixel of it; and what a matrix takes, an entry of it, and its products.
BESIDES_NS, BOX_NS, PRODUCT_NS, PIXEL_NS, ENTRY_NS, ENTRY_PRODUCT_NS = 300_000, 12_000, 0.01, 0.3, 13, 0.07


def suited(job: Job, forced: bool) -> np.ndarray | None:
    """(K,) bool: the boxes to work on this way, because it is faster or `forced`; None if there are none."""
    count, channels, bins = len(job.boxes), job.shape[1], math.prod(job.rule.bins)

    def dense_ns(pixels: Any) -> Any:
        products = PRODUCT_NS * min(BLOCK, max(job.rule.bins)) * (pixels + bins)
        return BOX_NS + channels * np.maximum(products, PIXEL_NS * pixels)

    if not forced and count * dense_ns(math.prod(job.shape[2:])) < BESIDES_NS:
        return None  # which is known without a look at the boxes
    along, size = geometry.column(job.axes.bins), geometry.column(job.axes.sizes)
    pitch = np.abs(job.axes.bin)
    between = pitch * (1 - 1 / np.maximum(job.axes.samples, 1))  # the first and the last sample of a bin
    entries = np.fmin(2 * job.samples, along * (between + 2)).prod(axis=0)
    pixels = np.fmin(size, along * pitch + 3).prod(axis=0)
    costs = np.maximum(entries * ENTRY_BYTES, pixels * PIXEL_BYTES)
    costs = np.maximum(costs, (job.samples[0] + job.samples[1]) * SAMPLE_BYTES)
    fits = np.maximum(costs, bins * PIXEL_BYTES) <= numpy_job.WORKSPACE
    fits &= entries <= MOST_ENTRIES * bins
    if forced:
        return fits if fits.any() else None
    # All that fit or none: each way brings pixels into order, and the second would do so once more.
    gains = dense_ns(np.minimum(entries, pixels)) - entries * (ENTRY_NS + ENTRY_PRODUCT_NS * channels)
    return fits if gains[fits].sum() > BESIDES_NS else None


def is_installed() -> bool:
    """Whether SciPy is, for this NumPy. It takes longer to import than NumPy, so only where there is use for it."""
    return _csr_array() is not None


@functools.cache
def _csr_array() -> Any:
    try:
        from scipy.sparse import csr_array
    except (ImportError, AttributeError, ValueError):  # not there, too old, or built for another NumPy
        return None
    return csr_array


def forward(job: Job, numbers: np.ndarray, features: np.ndarray, output: np.ndarray) -> None:
    """Writes the crops of some boxes. Not their derivatives: see `box_gradient` of numpy_backend.py."""
    whole = _matrix_of(features, job.dtype)
    blocks = _blocks(features, job.dtype, whole is not None)
    for chunk in _chunks(job, numbers, whole is not None):
        parts = chunk.parts(chunk.matrix(), blocks[0].stop)

        def take(task: tuple[list[_Part], slice], chunk: _Chunk = chunk) -> None:
            parts, channels = task
            pixels = chunk.pixels_of(features, channels) if whole is None else whole
            for part in parts:
                output[chunk.select(part.boxes), channels] = chunk.as_crops(part.matrix @ pixels)
            if whole is None:
                chunk.spare(pixels)

        threads.run(take, _tasks(parts, blocks, whole is not None), chunk.multiplications, chunk.threads(blocks))
        if job.rule.extrapolation_value != 0:
            fill_outside(output, chunk.numbers, *chunk.inside(), job.rule.extrapolation_value)


def feature_gradient(
    job: Job, numbers: np.ndarray, grad_output: np.ndarray, total: np.ndarray, begun: set[int]
) -> None:
    """Adds the gradients of the crops of some boxes. `begun`: the images where `total` may not be 0 any more."""
    # A transposed matrix takes memory for each column: pixels of all images only if there are not far more than bins.
    few_pixels = total[:, 0].size <= 4 * len(numbers) * math.prod(job.rule.bins)
    whole = _matrix_of(grad_output, job.dtype) if few_pixels and _matrix_of(total, job.dtype) is not None else None
    blocks = _blocks(total, job.dtype, whole is not None)
    for chunk in _chunks(job, numbers, whole is not None):
        strips = chunk.strips(chunk.transpose(whole is not None), blocks[0].stop, begun)

        def add(task: tuple[list[_Strip], slice], chunk: _Chunk = chunk) -> None:
            strips, channels = task
            crops = chunk.crops_of(grad_output, channels) if whole is None else whole
            for strip in strips:
                strip.add(strip.matrix @ crops, total[:, channels])
            if whole is None:
                chunk.spare(crops)

        threads.run(add, _tasks(strips, blocks, whole is not None), chunk.multiplications, chunk.threads(blocks))
        begun.update(chunk.images)


# ---- the matrix ----


class _Window(NamedTuple):
    """A part of an image whose pixels, row by row, are columns of a matrix."""

    image: int
    y: Pixels
    x: Pixels
    columns: slice

    def of(self, images: np.ndarray) -> np.ndarray:
        """(h, w, C) of (N, C, H, W): a view, or a copy where pixels between the first and the last are left out."""
        if isinstance(self.y, slice) and isinstance(self.x, slice):
            return images[self.image, :, self.y, self.x].transpose(1, 2, 0)
        y, x = np.r_[self.y], np.r_[self.x]
        # One axis after the other, which is faster than both at once.
        rows = images[self.image][:, y, x[0] : x[-1] + 1]
        return rows.take(x - x[0], 2).transpose(1, 2, 0)

    def write(self, images: np.ndarray, values: np.ndarray) -> None:
        """(h, w, C) into (N, C, H, W)."""
        if isinstance(self.y, slice) and isinstance(self.x, slice):
            self.of(images)[...] = values
        else:
            y, x = np.r_[self.y], np.r_[self.x]
            images[self.image][:, y[:, None], x] = values.transpose(2, 0, 1)

    def counted_from(self, column: int) -> _Window:
        return self._replace(columns=slice(self.columns.start - column, self.columns.stop - column))


class _Part(NamedTuple):
    """Some boxes of a chunk, and their rows of its matrix."""

    boxes: slice
    matrix: Any


class _Strip(NamedTuple):
    """Some columns of a chunk's matrix, as rows of its transpose, and the windows that they are."""

    matrix: Any
    windows: list[tuple[_Window, bool]]  # columns counted from the first; whether there may be a gradient already

    def add(self, values: np.ndarray, total: np.ndarray) -> None:
        """Adds (pixels, channels) to (N, channels, H, W)."""
        for window, begun in self.windows:
            part = values[window.columns].reshape(count_of(window.y), count_of(window.x), -1)
            window.write(total, part + window.of(total) if begun else part)


class _Boxes:
    """Boxes whose samples are in memory together."""

    def __init__(self, job: Job, numbers: np.ndarray):
        self.job, self.numbers = job, numbers
        taps = Taps(job.rule, job.axes.of(numbers), geometry.whole(job.rule))
        self.taps = [taps.along(axis) for axis in (0, 1)]
        self.rows = [AxisRows(along) for along in self.taps]
        spans = span(taps.line, taps.low, taps.high, taps.shape[0])
        self.first, self.stop = (each.reshape(2, len(numbers)) for each in spans)
        each = [np.diff(rows.begin[::bins]) for rows, bins in zip(self.rows, job.rule.bins, strict=True)]
        self.along = np.stack(each)  # (2, K) entries along y and x
        self.entries = self.along[0] * self.along[1]  # (K,)
        self._values: dict[Any, np.ndarray] = {}

    def values(self, axis: int, direction: int | None) -> np.ndarray:
        """The entries along an axis: its weights or, where it takes a direction, how they change."""
        if (axis, direction) not in self._values:
            taps = self.taps[axis].weights
            if direction is not None:
                changes = self.job.changes(direction, self.numbers)
                taps = self.taps[axis].changes(*(each[axis] for each in changes))
            self._values[axis, direction] = self.rows[axis].values(*taps)
        return self._values[axis, direction]

    def touched(self, some: slice) -> tuple[np.ndarray, np.ndarray]:
        """The rows and columns of pixels that some boxes touch, by whose places there they go by from here on."""
        found = []
        for rows, bins in zip(self.rows, self.job.rule.bins, strict=True):
            entries = slice(rows.begin[some.start * bins], rows.begin[some.stop * bins])
            pixels, rows.pixel[entries] = np.unique(rows.pixel[entries], return_inverse=True)
            found.append(pixels)
        return found[0], found[1]


class _Chunk:
    """Some of those boxes, one after another, whose matrix is in memory."""

    def __init__(self, boxes: _Boxes, some: slice, windows: list[_Window], owner: np.ndarray):
        """`owner` (k,): the window of each box."""
        self.numbers = boxes.numbers[some]
        self.images = {window.image for window in windows}
        self._boxes, self._some, self._windows = boxes, some, windows
        self._shape = shape = (len(self.numbers), *boxes.job.rule.bins)

        # The entries of each bin along y and x. A row of the matrix has a line for each along y, of those along x.
        begins = [r.begin[some.start * n : some.stop * n + 1] for r, n in zip(boxes.rows, shape[1:], strict=True)]
        along_y, along_x = (np.stack([begin[:-1], np.diff(begin)]) for begin in begins)  # first, count
        first_y, lines = (np.repeat(a, shape[2]) for a in along_y)
        first_x, length = (np.tile(a.reshape(shape[0], -1), shape[1]).ravel() for a in along_x)
        self._begin = np.concatenate([[0], np.cumsum(lines * length)])  # (bins + 1,) of each row
        self._line = _ranges(first_y, lines)  # (lines,) an entry along y
        self._length = np.repeat(length, lines)  # (lines,)
        self._entry = _ranges(np.repeat(first_x, lines), self._length)  # (entries,) an entry along x

        pixel_y, pixel_x = (rows.pixel for rows in boxes.rows)
        widths = [count_of(w.x) for w in windows]
        firsts = [[p.start if isinstance(p, slice) else 0 for p in (w.y, w.x)] for w in windows]
        corners = [w.columns.start - y * n - x for w, n, (y, x) in zip(windows, widths, firsts, strict=True)]
        box = np.repeat(np.arange(shape[0]), np.diff(begins[0][:: shape[1]]))
        line = pixel_y[begins[0][0] : begins[0][-1]] * np.array(widths)[owner][box] + np.array(corners)[owner][box]
        column = np.repeat(line[self._line - begins[0][0]], self._length) + pixel_x[self._entry]
        self._column = column.astype(np.int32)  # (entries,)
        self._spare: list[np.ndarray] = []

    def matrix(self) -> Any:
        """(bins, pixels): the weights or, with directions, how they change."""
        job, total = self._boxes.job, np.zeros(len(self._column))
        for taken in geometry.terms(len(job.directions)):
            along_y, along_x = (self._boxes.values(axis, taken[axis]) for axis in (0, 1))
            total += np.repeat(along_y[self._line], self._length) * along_x[self._entry]
        values = total.astype(job.dtype)
        # NaN and infinities reach only where their weight is not 0: there must be no entries that are.
        kept = values != 0
        column, begin = self._column, self._begin
        if not kept.all():
            values, column, begin = values[kept], column[kept], np.concatenate([[0], np.cumsum(kept)])[begin]
        shape = (len(begin) - 1, self._windows[-1].columns.stop)
        return _csr_array()((values, column, begin.astype(np.int32)), shape=shape)

    def transpose(self, whole: bool) -> Any:
        """(pixels, bins); `whole`: the bins of all boxes of the job, not only of those at work."""
        transpose = self.matrix().T.tocsr()
        if whole:
            bins = self._shape[1] * self._shape[2]
            rows = (self.numbers[:, None] * bins + np.arange(bins)).ravel().astype(np.int32)
            shape = (transpose.shape[0], len(self._boxes.job.boxes) * bins)
            return _csr_array()((transpose.data, rows[transpose.indices], transpose.indptr), shape=shape)
        return transpose

    def inside(self) -> tuple[np.ndarray, np.ndarray]:
        """(k, bins_y) and (k, bins_x) bool: the bin has a sample inside the image."""
        y, x = (taps.inside()[0][self._some] for taps in self._boxes.taps)
        return y, x

    @property
    def multiplications(self) -> int:
        """Of a product with all channels."""
        return len(self._column) * self._boxes.job.shape[1]

    def threads(self, blocks: list[slice]) -> int:
        """The most at work at once, so that what they bring into order stays within the workspace."""
        channels = 0 if len(blocks) == 1 else blocks[0].stop
        pixels = self._windows[-1].columns.stop + math.prod(self._shape)
        return max(1, numpy_job.WORKSPACE // max(1, pixels * channels * self._boxes.job.dtype.itemsize))

    def parts(self, matrix: Any, channels: int) -> list[_Part]:
        """The matrix cut into boxes whose crops, of so many channels, stay in the cache."""
        bins = self._shape[1] * self._shape[2]
        step = max(1, self._at_once(channels) // bins)
        starts = range(0, len(self.numbers), step)
        parts = [slice(start, min(start + step, len(self.numbers))) for start in starts]
        return [_Part(part, _rows(matrix, part.start * bins, part.stop * bins)) for part in parts]

    def strips(self, transpose: Any, channels: int, begun: set[int]) -> list[_Strip]:
        """The matrix cut into pixels that, of so many channels, stay in the cache. Those that no box touches are left.

        `begun`: the images with a gradient already.
        """
        begun = set(begun)
        limit = self._at_once(channels)
        groups: list[list[tuple[_Window, bool]]] = []
        for window in self._windows:
            height, width = count_of(window.y), count_of(window.x)
            step = max(1, limit // max(1, width))
            for y in range(0, height, step) if width else ():
                rows = slice(y, min(y + step, height))
                start, stop = (window.columns.start + n * width for n in (rows.start, rows.stop))
                if not groups or stop - groups[-1][0][0].columns.start > limit:
                    groups.append([])
                part = window._replace(y=some_of(window.y, rows), columns=slice(start, stop))
                groups[-1].append((part, window.image in begun))
            begun.add(window.image)
        strips = []
        for group in groups:
            start, stop = group[0][0].columns.start, group[-1][0].columns.stop
            if transpose.indptr[start] < transpose.indptr[stop]:
                windows = [(window.counted_from(start), had) for window, had in group]
                strips.append(_Strip(_rows(transpose, start, stop), windows))
        return strips

    def _at_once(self, channels: int) -> int:
        return max(1, STRIP_BYTES // (channels * self._boxes.job.dtype.itemsize))

    def select(self, boxes: slice = slice(None)) -> slice | np.ndarray:
        """The index of some boxes of the chunk among the caller's; a slice if one will do, which makes no copy."""
        numbers = self.numbers[boxes]
        if (np.diff(numbers) == 1).all():
            return slice(int(numbers[0]), int(numbers[-1]) + 1)
        return numbers

    def pixels_of(self, features: np.ndarray, channels: slice) -> np.ndarray:
        """(pixels, channels), as columns of the matrix."""
        copy = np.copyto if arrays.is_channels_last(features.shape, features.strides) else _to_pixels
        pixels = self._memory(self._windows[-1].columns.stop, len(range(features.shape[1])[channels]))
        for window in self._windows:
            source = window.of(features[:, channels])
            copy(pixels[window.columns].reshape(source.shape), source)
        return pixels

    def _memory(self, *shape: int) -> np.ndarray:
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = np.empty(0)
        return memory if memory.shape == shape else np.empty(shape, self._boxes.job.dtype)

    def spare(self, memory: np.ndarray) -> None:
        """Takes back what `pixels_of` or `crops_of` gave: new memory would take time to get."""
        self._spare.append(memory)

    def crops_of(self, crops: np.ndarray, channels: slice) -> np.ndarray:
        """(bins, channels), as rows of the matrix, from all (K, C, bins_y, bins_x)."""
        taken = crops[self.select(), channels]
        rows = self._memory(math.prod(self._shape), taken.shape[1])
        # Not a copy, whose innermost loop would be over the channels: this one's is over bins, which are more.
        np.multiply(taken, 1, out=self.as_crops(rows), dtype=rows.dtype)
        return rows

    def as_crops(self, values: np.ndarray) -> np.ndarray:
        """(k, channels, bins_y, bins_x) from (bins, channels)."""
        return values.reshape(-1, *self._shape[1:], values.shape[1]).transpose(0, 3, 1, 2)


def _ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Ranges of `count` numbers from `first` on, one after another."""
    stop = np.cumsum(count)
    return np.arange(int(stop[-1]) if stop.size else 0) + np.repeat(first - (stop - count), count)


# ---- the plan ----


def _chunks(job: Job, numbers: np.ndarray, whole: bool) -> Iterator[_Chunk]:
    """All of these boxes. `whole`: the columns of the matrix are all pixels of all images."""
    places = np.zeros((3, len(job.boxes)), np.int64)
    places[0] = job.batch_indices
    if not whole:
        places[1:] = _tiles(job.axes)
        numbers = numbers[np.lexsort(places[::-1, numbers])]
    samples = (job.samples[0] + job.samples[1])[numbers]
    all_pixels = _all_pixels(job.shape) if whole else []
    for some in numpy_job.runs(samples * (SAMPLE_BYTES / numpy_job.WORKSPACE)):
        boxes = _Boxes(job, numbers[some])
        cost = np.maximum(boxes.entries * ENTRY_BYTES, math.prod(job.rule.bins) * PIXEL_BYTES) / numpy_job.WORKSPACE
        if whole:
            for run in numpy_job.runs(cost):
                yield _Chunk(boxes, run, all_pixels, places[0, boxes.numbers[run]])
        else:
            yield from _chunks_in_windows(boxes, places[:, boxes.numbers], cost)


def _chunks_in_windows(boxes: _Boxes, places: np.ndarray, cost: np.ndarray) -> Iterator[_Chunk]:
    """Boxes of one place share a window, unless there are fewer pixels in windows of their own."""
    most = numpy_job.WORKSPACE // PIXEL_BYTES
    changes = _changes(places)
    starts, place = np.flatnonzero(changes), np.cumsum(changes) - 1
    extent = boxes.stop - boxes.first
    pixels = extent[0] * extent[1]
    first = np.minimum.reduceat(np.where(pixels > 0, boxes.first, np.iinfo(np.int64).max), starts, axis=1)
    stop = np.maximum.reduceat(boxes.stop, starts, axis=1)
    extent = stop - np.minimum(first, stop)
    shared = extent[0] * extent[1]
    shares = (shared > 0) & (shared <= np.minimum(most, np.add.reduceat(pixels + WINDOW, starts)))
    first = np.where(shares[place], first[:, place], boxes.first)
    stop = np.where(shares[place], stop[:, place], boxes.stop)

    bounds = np.concatenate([places[:1], first, stop])
    begins = _changes(bounds)
    extent = stop - first
    pixels = extent[0] * extent[1]
    for run in numpy_job.runs(cost + begins * pixels / most):
        opens = begins[run].copy()
        opens[0] = True
        starts, corners = np.flatnonzero(opens), bounds[:, run][:, opens]
        ends = [*starts.tolist(), len(opens)]
        # An entry is of one row or column of pixels, so that there are no more of these.
        most_touched = np.minimum(corners[3:] - corners[1:3], np.add.reduceat(boxes.along[:, run], starts, axis=1))
        touched = most_touched[0] * most_touched[1]
        thin = (touched > 0) & (2 * touched <= pixels[run][opens])
        windows: list[_Window] = []
        column = 0
        for number, (image, y0, x0, y1, x1) in enumerate(corners.T.tolist()):
            y: Pixels = slice(y0, y1)
            x: Pixels = slice(x0, x1)
            if thin[number]:
                y, x = boxes.touched(slice(run.start + ends[number], run.start + ends[number + 1]))
            stop_ = column + count_of(y) * count_of(x)
            windows.append(_Window(image, y, x, slice(column, stop_)))
            column = stop_
        yield _Chunk(boxes, run, windows, np.cumsum(opens) - 1)


def _changes(rows: np.ndarray) -> np.ndarray:
    """(n,) bool: which of the columns of (m, n) is another one than that before; the first is."""
    changes = np.ones(rows.shape[1], bool)
    np.any(rows[:, 1:] != rows[:, :-1], axis=0, out=changes[1:])
    return changes


def _tiles(axes: geometry.Axes) -> np.ndarray:
    """(2, K) the part of the image, along each axis, that a box has its centre in."""
    bins, size = geometry.column(axes.bins), geometry.column(axes.sizes)
    tiles = np.maximum(1, size // TILE)
    middle = axes.start.astype(np.float64) + axes.bin * (bins / 2)
    return np.clip(np.nan_to_num(middle * (tiles / size)), 0, tiles - 1).astype(np.int64)


# ---- memory ----


def _all_pixels(shape: tuple[int, ...]) -> list[_Window]:
    count, _, height, width = shape
    area = height * width
    return [
        _Window(image, slice(0, height), slice(0, width), slice(image * area, (image + 1) * area))
        for image in range(count)
    ]


def _matrix_of(array: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """(N, C, H, W) as (N*H*W, C), if that is how it lies in memory."""
    last = array.transpose(0, 2, 3, 1)
    ready = array.dtype == dtype and last.flags.c_contiguous and last.flags.aligned
    return last.reshape(-1, array.shape[1]) if ready and array[:, 0].size < 2**31 else None


def _blocks(array: np.ndarray, dtype: np.dtype, whole: bool) -> list[slice]:
    """The channels that are worked on at once; more of them where they lie beside each other."""
    beside = 2 if arrays.is_channels_last(array.shape, array.strides) else 1
    step = array.shape[1] if whole else beside * BLOCK_BYTES // dtype.itemsize
    return [slice(start, start + step) for start in range(0, array.shape[1], step)]


def _tasks(items: list[Any], blocks: list[slice], whole: bool) -> list[tuple[list[Any], slice]]:
    """What threads share out: blocks of channels or, where there is but one, the items."""
    return [([item], blocks[0]) for item in items] if whole else [(items, block) for block in blocks]


def _rows(matrix: Any, start: int, stop: int) -> Any:
    """Some rows of a sparse matrix, without a copy."""
    begin = matrix.indptr[start : stop + 1]
    entries = slice(begin[0], begin[-1])
    shape = (stop - start, matrix.shape[1])
    return _csr_array()((matrix.data[entries], matrix.indices[entries], begin - begin[0]), shape=shape)


def _to_pixels(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, both (h, w, C); source may lie as planes.

    So many planes at a time as make up a cache line of each pixel; fewer, where planes are so far apart that all of
    them fall on one place in the cache.
    """
    step = max(1, LINE // target.itemsize)
    if source.strides[2] % SAME_PLACE == 0:
        step = max(1, step // 2)
    for start in range(0, source.shape[2], step):
        target[:, :, start : start + step] = source[:, :, start : start + step]
