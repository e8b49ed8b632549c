"""The compiled way: loops that Numba makes machine code of, for float32 and float64.

Features that lie as such numbers, side by side, are worked on where they are: pixels with their channels, or planes of
few channels. Of all others the part that boxes touch is brought over first, some channels at a time: 16-bit floats,
integers, other strides and, since single channels of a pixel are slow, planes of many channels.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from cupy_roialign import geometry, rule as rules
from cupy_roialign.cpu import loops, threads, weights
from cupy_roialign.cpu.weights import Job, Rows
from cupy_roialign.rule import Rule

BLOCK = loops.GROUP
"""Channels that are brought over at a time, so that a pixel of them is a cache line of float32."""

CROPS = 2**18
"""Bytes of crops that are made at a time before they are brought back; they stay in the cache."""


class _Spec(NamedTuple):
    """As much of a rule as geometry.py asks for, of types that Numba knows."""

    frame: int
    taps: int
    border: int
    spatial_scale: float
    sampling_ratio: int
    aligned: bool


# ---- machine code ----

_I, _B = numba.int64, numba.boolean


def _in(kind: Any, axes: int = 1) -> Any:
    return numba.types.Array(kind, axes, "C", readonly=True)


def _out(kind: Any, axes: int) -> Any:
    return numba.types.Array(kind, axes, "C")


def _signature(name: str, dtype: str) -> tuple[Any, ...]:
    """The types of a loop's arguments, whose features are of `dtype`; or positions, for rows."""
    f, i, lines = numba.from_dtype(np.dtype(dtype)), _in(_I), _in(numba.from_dtype(np.dtype(dtype)), 3)
    weights = (numba.types.Tuple((i, _in(_I, 2), i, _in(f))), _I)
    sloped = (numba.types.Tuple((i, _in(_I, 2), i, _in(f), _in(f), _in(f))), _I)
    where, scratch = (_I, _I, _I, _I), (_out(numba.uint32, 2), _out(f, 2))
    if name == "rows":
        spec, found = numba.typeof(_Spec(0, 0, 0, 1.0, 1, True)), _out(numba.float64, 1)
        return spec, _in(f), _in(f), _I, _I, _out(_I, 1), _out(_I, 2), _out(_I, 1), found, found, found
    if name == "crops":
        return lines, *where, i, i, *weights, *weights, *scratch, _B, _out(f, 2), _B, _out(f, 3)
    if name == "spread":
        return _out(f, 3), *where, _I, _I, i, i, *weights, *weights, *scratch, lines
    if name == "slopes":
        return lines, *where, i, i, *sloped, *sloped, *scratch, _out(f, 2), _B, lines, _out(numba.float64, 2)
    if name == "gather":
        return _in(f, 4), i, _I, _I, _I, _out(f, 4)
    return _in(f, 4), i, _I, _I, _I, _B, _out(f, 4)  # scatter


NAMES = ("rows", "crops", "spread", "slopes", "gather", "scatter")

_lock = threading.Lock()


@functools.cache
def _loop(name: str, dtype: str) -> Any:
    """A loop as machine code, from the cache on disk if it is there. The dtype is f or d."""
    source = getattr(loops, name)
    options = {key: source.targetoptions[key] for key in ("nogil", "error_model")}
    signature = _signature(name, dtype)
    with _lock, _cache_folder() as folder:
        if folder is not None:
            with contextlib.suppress(OSError, RuntimeError):  # a folder that cannot be written to
                return numba.njit(signature, cache=True, **options)(source.py_func)
        return numba.njit(signature, **options)(source.py_func)


@contextlib.contextmanager
def _cache_folder() -> Iterator[str | None]:
    """Numba's cache, in a folder of these very sources.

    By itself Numba looks whether the file of a function has changed, but not those of functions that it calls.
    """
    digest = hashlib.sha256()
    for module in (geometry, rules, loops):
        digest.update(Path(str(module.__file__)).read_bytes())
    before = numba.config.CACHE_DIR
    base = before or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cupy_roialign")
    numba.config.CACHE_DIR = os.path.join(base, digest.hexdigest()[:16])
    try:
        yield numba.config.CACHE_DIR
    finally:
        numba.config.CACHE_DIR = before


def compile_all() -> None:
    for name, dtype in itertools.product(NAMES, "fd"):
        _loop(name, dtype)


# ---- rows ----


def rows(rule: Rule, low: np.ndarray, high: np.ndarray, bins: int, size: int, slopes: bool, dtype: np.dtype) -> Rows:
    """`Rows`, the same as those of weights.py."""
    capacity = int(weights.entries(rule, low, high, bins, size).sum())
    begin, extent, pixel = (np.empty(shape, np.int64) for shape in (len(low) * bins + 1, (2, len(low)), capacity))
    value, to_start, to_step = (np.empty(length) for length in (capacity, *[capacity * slopes] * 2))
    end = _loop("rows", low.dtype.char)(
        _spec(rule), low, high, bins, size, begin, extent, pixel, value, to_start, to_step
    )
    return Rows(begin, extent, pixel[:end], *(column[:end].astype(dtype) for column in (value, to_start, to_step)))


@functools.lru_cache(maxsize=256)
def _spec(rule: Rule) -> _Spec:
    return _Spec(
        int(rule.frame), int(rule.taps), int(rule.border), rule.spatial_scale, rule.sampling_ratio, rule.aligned
    )


# ---- the three functions ----


class _Lines(NamedTuple):
    """An (M, C, H, W) array as lines, without a copy."""

    lines: np.ndarray  # (M * planes, H, W * channels)
    planes: int  # of an image or a box
    channels: int  # of a pixel

    @classmethod
    def of(cls, array: np.ndarray, dtype: np.dtype) -> _Lines | None:
        """None where elements are of another dtype, or do not lie so."""
        count, channels, height, width = array.shape
        if array.dtype != dtype or not array.flags.aligned:
            return None
        if array.flags.c_contiguous:
            return cls(array.reshape(count * channels, height, width), channels, 1)
        if (pixels := array.transpose(0, 2, 3, 1)).flags.c_contiguous:
            return cls(pixels.reshape(count, height, width * channels), 1, channels)
        return None

    def some(self, boxes: slice) -> np.ndarray:
        return self.lines[boxes.start * self.planes : boxes.stop * self.planes]


class _Window(NamedTuple):
    """A part of an image, of some channels, that is brought over for some boxes."""

    image: int
    boxes: np.ndarray  # numbers within their group
    rows: range  # from y0 to y1, in steps that the workspace holds
    columns: slice
    channels: slice

    @property
    def strips(self) -> list[slice]:
        return [slice(y, min(y + self.rows.step, self.rows.stop)) for y in self.rows]

    def empty(self, strip: slice, dtype: np.dtype) -> np.ndarray:
        """(1, h, w, channels)"""
        shape = (strip.stop - strip.start, self.columns.stop - self.columns.start)
        return np.empty((1, *shape, self.channels.stop - self.channels.start), dtype)


def crops(job: Job, features: np.ndarray, output: np.ndarray) -> None:
    """Writes the crops; 0 in bins without a sample."""
    crop, leveled = _loop("crops", job.dtype.char), bool(job.directions)
    lines, out = _Lines.of(features, job.dtype), _Lines.of(output, job.dtype)
    for some, terms in job.weights(rows):
        if lines is not None and out is not None and lines.planes == out.planes and _in_place(job, lines, terms):

            def direct(part: slice, lines: _Lines = lines, some: slice = some, out: Any = out, terms: Any = terms) -> None:
                numbers, images = _numbers(job, some, part)
                levels = np.zeros((len(numbers) * lines.planes * leveled, lines.channels), job.dtype)
                of = out.some(slice(some.start + part.start, some.start + part.stop))
                for again, (y, x) in enumerate(terms):
                    crop(
                        *lines, 0, 0, numbers, images, y[:4], job.rule.bins[0], x[:4], job.rule.bins[1],
                        *_scratch(job, lines.lines, lines.channels, x, 6), leveled, levels, again > 0, of,
                    )  # fmt: skip

            threads.run(direct, threads.parts(some.stop - some.start, _cost(job, terms)), _cost(job, terms))
            continue

        def brought(window: _Window, some: slice = some, terms: Any = terms) -> None:
            loaded, pixels, channels = None, None, window.channels.stop - window.channels.start
            each = job.rule.bins[0] * job.rule.bins[1] * channels * job.dtype.itemsize
            for numbers in _cut(window.boxes, CROPS // each):
                made = np.empty((len(numbers), *job.rule.bins, channels), job.dtype)
                images = np.zeros(len(numbers), np.int64)
                levels = np.zeros((len(numbers), channels), job.dtype)
                for strip in window.strips:
                    if strip != loaded:
                        loaded, pixels = strip, window.empty(strip, job.dtype)
                        _bring(features, np.array([window.image]), window, strip, pixels)
                    for again, (y, x) in enumerate(terms):
                        crop(
                            _flat(pixels), 1, channels, strip.start, window.columns.start, numbers, images,
                            y[:4], job.rule.bins[0], x[:4], job.rule.bins[1],
                            *_scratch(job, _flat(pixels), channels, x, 6), leveled, levels, again > 0 or strip.start > window.rows.start, _flat(made),
                        )  # fmt: skip
                _return(made, some.start + numbers, window.channels, 0, 0, False, output)

        windows, empty = _windows(job, some, terms)
        output[some.start + empty] = 0
        threads.run(brought, windows, _cost(job, terms))


def to_features(job: Job, grad: np.ndarray, total: np.ndarray) -> None:
    """Adds the feature gradient, box after box."""
    spread = _loop("spread", job.dtype.char)
    lines = _Lines.of(total, job.dtype)
    for some, terms in job.weights(rows):
        bins = job.rule.bins
        if lines is not None and _in_place(job, lines, terms):
            grads = _as_lines(grad, some, lines.planes, job.dtype)
            numbers, images = _numbers(job, some, slice(0, some.stop - some.start))

            def direct(
                band: slice, lines: _Lines = lines, grads: Any = grads, at: Any = (numbers, images), terms: Any = terms
            ) -> None:
                for y, x in terms:
                    spread(*lines, 0, 0, band.start, band.stop, *at, y[:4], bins[0], x[:4], bins[1], *_scratch(job, lines.lines, lines.channels, x, 3), grads)

            # A thread owns a band of every image, and adds all boxes to it in their order.
            threads.run(direct, threads.parts(total.shape[2], _cost(job, terms)), _cost(job, terms))
            continue

        def brought(windows: list[_Window], some: slice = some, terms: Any = terms) -> None:
            for window, strip in ((window, strip) for window in windows for strip in window.strips):
                pixels = window.empty(strip, job.dtype)
                pixels[...] = 0
                each = bins[0] * bins[1] * pixels.shape[3] * job.dtype.itemsize
                for numbers in _cut(window.boxes, CROPS // each):
                    grads = np.empty((len(numbers), *bins, pixels.shape[3]), job.dtype)
                    _bring(grad, some.start + numbers, window, None, grads)
                    for y, x in terms:
                        spread(
                            _flat(pixels), 1, pixels.shape[3], strip.start, window.columns.start, strip.start, strip.stop,
                            numbers, np.zeros(len(numbers), np.int64), y[:4], bins[0], x[:4], bins[1],
                            *_scratch(job, _flat(pixels), pixels.shape[3], x, 3), _flat(grads),
                        )  # fmt: skip
                image = np.array([window.image])
                _return(pixels, image, window.channels, strip.start, window.columns.start, True, total)

        windows, _ = _windows(job, some, terms)
        by_target: dict[tuple[int, int], list[_Window]] = {}
        for window in windows:
            by_target.setdefault((window.image, window.channels.start), []).append(window)
        threads.run(brought, by_target.values(), _cost(job, terms))


def to_boxes(job: Job, grad: np.ndarray, features: np.ndarray, sums: np.ndarray) -> None:
    """Adds to `sums`, (K, 4), the gradients with respect to y's start and step, and x's."""
    slopes, bins = _loop("slopes", job.dtype.char), job.rule.bins
    lines = _Lines.of(features, job.dtype)
    for some, terms in job.weights(rows, slopes=True):
        cost = 4 * _cost(job, terms)
        for (y, x), axes in zip(terms, job.free_axes(), strict=True):
            found: list[tuple[np.ndarray, np.ndarray]] = []
            weights = (tuple(y), bins[0], tuple(x), bins[1])
            if lines is not None and _in_place(job, lines, terms, alike=True):
                grads = _as_lines(grad, some, lines.planes, job.dtype)
                found.append((np.arange(some.stop - some.start), np.zeros((some.stop - some.start, 4))))

                def direct(
                    part: slice, lines: _Lines = lines, some: slice = some, grads: Any = grads, w: Any = weights, to: Any = found[0][1]
                ) -> None:
                    numbers, images = _numbers(job, some, part)
                    levels = np.empty((len(numbers) * lines.planes, lines.channels), job.dtype)
                    of = grads[part.start * lines.planes : part.stop * lines.planes]
                    slopes(*lines, 0, 0, numbers, images, *w, *_scratch(job, lines.lines, lines.channels, x, 16), levels, False, of, to[part])

                threads.run(direct, threads.parts(some.stop - some.start, cost), cost)
            else:

                def brought(item: tuple[_Window, np.ndarray], some: slice = some, w: Any = weights) -> None:
                    window, to = item
                    loaded, pixels, channels = None, None, window.channels.stop - window.channels.start
                    done = 0
                    for numbers in _cut(window.boxes, CROPS // (bins[0] * bins[1] * channels * job.dtype.itemsize)):
                        grads = np.empty((len(numbers), *bins, channels), job.dtype)
                        _bring(grad, some.start + numbers, window, None, grads)
                        levels = np.empty((len(numbers), channels), job.dtype)
                        for strip in window.strips:
                            if strip != loaded:
                                loaded, pixels = strip, window.empty(strip, job.dtype)
                                _bring(features, np.array([window.image]), window, strip, pixels)
                            slopes(
                                _flat(pixels), 1, channels, strip.start, window.columns.start, numbers,
                                np.zeros(len(numbers), np.int64), *w, *_scratch(job, _flat(pixels), channels, x, 16),
                                levels, strip.start > window.rows.start,
                                _flat(grads), to[done : done + len(numbers)],
                            )  # fmt: skip
                        done += len(numbers)

                windows, _ = _windows(job, some, [(y, x)])
                found = [(window.boxes, np.zeros((len(window.boxes), 4))) for window in windows]
                threads.run(brought, zip(windows, (to for _, to in found), strict=True), cost)
            columns = [column for axis in axes for column in (2 * axis, 2 * axis + 1)]
            for numbers, each in found:
                sums[np.ix_(some.start + numbers, columns)] += each[:, columns]


# ---- what they are given ----


def _numbers(job: Job, some: slice, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of boxes within their group, and their images."""
    return np.arange(part.start, part.stop), job.images[some][part]


def _scratch(job: Job, lines: np.ndarray, channels: int, x: Rows, count: int) -> tuple[np.ndarray, np.ndarray]:
    """What a loop needs to work: places of the entries of a box, and so many lines."""
    most = int(np.diff(x.begin[:: job.rule.bins[1]]).max()) + job.rule.bins[1]
    length = max(lines.shape[2], most * channels) + 1
    return np.empty((4, most * min(channels, loops.LANES)), np.uint32), np.empty((count, length), job.dtype)


def _flat(pixels: np.ndarray) -> np.ndarray:
    """(n, h, w, B) pixels as lines."""
    return pixels.reshape(*pixels.shape[:2], -1)


def _cut(numbers: np.ndarray, length: int) -> list[np.ndarray]:
    length = max(1, length)
    return [numbers[i : i + length] for i in range(0, len(numbers), length)]


def _cost(job: Job, terms: list[tuple[Rows, Rows]]) -> int:
    """About how many multiplications a group takes."""
    y, x = terms[0]
    boxes = max(1, (len(y.begin) - 1) // job.rule.bins[0])
    return len(terms) * int(y.begin[-1]) * int(x.begin[-1]) // boxes * job.shape[1]


def _in_place(job: Job, lines: _Lines, terms: list[tuple[Rows, Rows]], alike: bool = False) -> bool:
    """Whether lines are worked on as they are.

    Of planes each entry along x of each row of bins is a single number: these are compared with the pixels to bring over,
    in accesses to memory. Few channels would leave a processor's lanes empty either way.

    Sums over channels come out alike either way only where BLOCK of them can be brought over: `alike` asks for that.
    """
    plane = job.shape[2] * job.shape[3] * job.dtype.itemsize
    if lines.channels > 1 or lines.planes < loops.LANES or plane * (BLOCK if alike else 1) > weights.WORKSPACE:
        return True
    y, x = (int(of.begin[-1]) for of in terms[0])
    boxes = max(1, (len(terms[0][0].begin) - 1) // job.rule.bins[0])
    touched = min(y * x // boxes, job.shape[0] * job.shape[2] * job.shape[3])
    return 2 * x * job.rule.bins[0] <= touched


def _windows(job: Job, some: slice, terms: list[tuple[Rows, Rows]]) -> tuple[list[_Window], np.ndarray]:
    """What to bring over for the boxes of a group, and the boxes that touch no pixel.

    For the boxes of an image either the part that they all lie in, or a window for each: whichever is less to read.
    """
    first, stop = np.stack([along.extent for along in terms[0]], axis=1)
    images, empty = job.images[some], ~(stop > first).all(axis=0)
    windows: list[_Window] = []

    def add(image: int, boxes: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        (y0, x0), (y1, x1) = low.tolist(), high.tolist()
        size = (y1 - y0) * (x1 - x0) * job.dtype.itemsize
        channels = max(1, min(BLOCK, job.shape[1], weights.WORKSPACE // size))
        step = max(1, weights.WORKSPACE // ((x1 - x0) * channels * job.dtype.itemsize))
        for c in range(0, job.shape[1], channels):
            block = slice(c, min(c + channels, job.shape[1]))
            windows.append(_Window(image, boxes, range(y0, y1, step), slice(x0, x1), block))

    for image in np.unique(images[~empty]).tolist():
        boxes = np.flatnonzero((images == image) & ~empty)
        low, high = first[:, boxes].min(axis=1), stop[:, boxes].max(axis=1)
        # Each row costs about one cache line more than it has pixels.
        extents = np.array([[0], [loops.PIECE]]) + (stop - first)[:, boxes]
        each = extents.prod(axis=0).sum()
        whole = (high - low).prod()
        if whole <= each and whole * min(BLOCK, job.shape[1]) * job.dtype.itemsize <= weights.WORKSPACE:
            add(image, boxes, low, high)
        else:
            for box in boxes.tolist():
                add(image, np.array([box]), first[:, box], stop[:, box])
    return windows, np.flatnonzero(empty)


def _as_lines(array: np.ndarray, some: slice, planes: int, dtype: np.dtype) -> np.ndarray:
    """Gradients of some boxes as lines of so many planes."""
    lines = _Lines.of(array, dtype)
    if lines is not None and lines.planes == planes:
        return lines.some(some)
    part = array[some]
    if planes > 1:
        return np.ascontiguousarray(part, dtype).reshape(-1, *part.shape[2:])
    pixels = np.empty((len(part), *part.shape[2:], part.shape[1]), dtype)
    _copy(array, np.arange(some.start, some.stop), 0, 0, 0, pixels)
    return _flat(pixels)


def _bring(array: np.ndarray, numbers: np.ndarray, window: _Window, strip: slice | None, pixels: np.ndarray) -> None:
    """Features of a strip of a window, or gradients (no strip), as pixels."""
    y, x = (0, 0) if strip is None else (strip.start, window.columns.start)
    _copy(array, numbers, window.channels.start, y, x, pixels)


def _copy(planes: np.ndarray, numbers: np.ndarray, c: int, y: int, x: int, pixels: np.ndarray) -> None:
    """Parts of planes of any dtype and order, from channel `c`, row `y` and column `x` on."""
    if planes.dtype == pixels.dtype and planes.flags.c_contiguous and planes.flags.aligned:
        _loop("gather", pixels.dtype.char)(planes, numbers, c, y, x, pixels)
        return
    _, height, width, channels = pixels.shape
    for number, part in zip(numbers.tolist(), pixels, strict=True):
        source = planes[number, c : c + channels, y : y + height, x : x + width]
        np.copyto(part.transpose(2, 0, 1), source, casting="unsafe")


def _return(
    pixels: np.ndarray, numbers: np.ndarray, block: slice, y: int, x: int, again: bool, planes: np.ndarray
) -> None:
    """The reverse; `again`: added."""
    if planes.dtype == pixels.dtype and planes.flags.c_contiguous:
        _loop("scatter", pixels.dtype.char)(pixels, numbers, block.start, y, x, again, planes)
        return
    _, height, width, _ = pixels.shape
    for number, part in zip(numbers.tolist(), pixels, strict=True):
        target = planes[number, block, y : y + height, x : x + width]
        if again:
            target += part.transpose(2, 0, 1)
        else:
            target[...] = part.transpose(2, 0, 1)
