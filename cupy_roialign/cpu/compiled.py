"""The compiled way: loops that Numba makes machine code of, for float32 and float64.

Features that lie as such numbers, side by side, are worked on where they are: pixels with their channels, or planes of
few channels. Of all others the part that boxes touch is brought over first, some channels at a time: 16-bit floats,
integers, other strides and, since single channels of a pixel are slow, planes of many channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from cupy_roialign import geometry
from cupy_roialign import rule as rules
from cupy_roialign.cpu import loops, threads, weights
from cupy_roialign.cpu.weights import Job, Rows
from cupy_roialign.rule import Rule

BLOCK = loops.GROUP
"""Channels that are brought over at a time, so that a pixel of them is a cache line of float32."""

BATCH = 2**18
"""Bytes of crops that are worked on at a time before they are brought back; they stay in the cache."""


_config: Any = numba.config


class _Spec(NamedTuple):
    """As much of a rule as geometry.py asks for, of types that Numba knows."""

    frame: int
    taps: int
    border: int
    spatial_scale: float
    sampling_ratio: int
    aligned: bool


# ---- machine code ----


def _signature(name: str, dtype: str) -> tuple[Any, ...]:
    """The types of a loop's arguments, whose features are of `dtype`; or positions, for rows."""
    f, i, array = numba.from_dtype(np.dtype(dtype)), numba.int64, numba.types.Array
    indices, edges = array(i, 1, "C", readonly=True), array(f, 1, "C", readonly=True)
    if name == "rows":
        spec, found = numba.typeof(_Spec(0, 0, 0, 1.0, 1, True)), array(numba.float64, 1, "C")
        return spec, edges, edges, i, i, array(i, 1, "C"), array(i, 2, "C"), array(i, 1, "C"), found, found, found
    read, written = array(f, 3, "C", readonly=True), array(f, 3, "C")
    along = numba.types.Tuple((indices, array(i, 2, "C", readonly=True), indices, edges))
    at = (*[i] * 6, indices, indices, along, i, along, i, array(numba.uint32, 2, "C"), array(f, 2, "C"))
    if name == "crops":
        return read, *at, i, array(f, 2, "C"), numba.boolean, written
    if name == "spread":
        return written, *at, read
    sums = array(numba.float64, 1, "C"), i, array(numba.float64, 2, "C")
    return read, read, i, i, indices, indices, i, indices, i, *sums  # products


NAMES = ("rows", "crops", "spread", "products")

_lock = threading.RLock()


def _loop(name: str, dtype: str) -> Any:
    """A loop as machine code. The dtype is f or d."""
    return _made.get((name, dtype)) or _make(name, dtype)


_made: dict[tuple[str, str], Any] = {}


def _make(name: str, dtype: str) -> Any:
    """Compiles a loop, or loads it from the cache on disk; once, whichever thread asks first."""
    source = getattr(loops, name)
    options = {key: source.targetoptions[key] for key in ("nogil", "error_model")}
    signature = _signature(name, dtype)
    with _lock, _cache_folder(dtype) as folder:
        if (name, dtype) not in _made:
            try:  # Numba would take another folder, that knows of changes to loops.py alone
                os.makedirs(folder, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                _made[name, dtype] = numba.njit(signature, cache=True, **options)(source.py_func)
            except (OSError, RuntimeError):  # one that cannot be written to
                _made[name, dtype] = numba.njit(signature, **options)(source.py_func)
        return _made[name, dtype]


@contextlib.contextmanager
def _cache_folder(dtype: str) -> Iterator[str]:
    """Numba's cache, in a folder of these very sources.

    By itself Numba looks whether the file of a function has changed, but not those of functions that it calls. And two
    processes that compile one function for two dtypes at the same time would spoil each other's entries.
    """
    digest = hashlib.sha256()
    for module in (geometry, rules, loops):
        digest.update(Path(str(module.__file__)).read_bytes())
    before = _config.CACHE_DIR
    base = before or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cupy_roialign")
    _config.CACHE_DIR = os.path.join(base, digest.hexdigest()[:16], dtype)
    try:
        yield _config.CACHE_DIR
    finally:
        _config.CACHE_DIR = before


def compile_all() -> None:
    for name, dtype in itertools.product(NAMES, "fd"):
        _loop(name, dtype)


# ---- rows ----


def rows(rule: Rule, low: np.ndarray, high: np.ndarray, bins: int, size: int, slopes: bool, dtype: np.dtype) -> Rows:
    """`Rows`, the same as those of weights.py."""
    each = weights.entries(rule, low, high, bins, size)
    capacity = each * len(low) if isinstance(each, int) else int(each.sum())
    begin, extent, pixel = (
        np.empty(len(low) * bins + 1, np.int64),
        np.empty((2, len(low)), np.int64),
        np.empty(capacity, np.int64),
    )
    columns = [np.empty(capacity), *(np.empty((2, capacity)) if slopes else (_NONE, _NONE))]
    end = _loop("rows", low.dtype.char)(_spec(rule), low, high, bins, size, begin, extent, pixel, *columns)
    return Rows(begin, extent, pixel[:end], *(column[:end].astype(dtype) for column in columns))


_NONE = np.empty(0)


def _spec(rule: Rule) -> _Spec:
    frame, taps, border = int(rule.frame), int(rule.taps), int(rule.border)
    return _Spec(frame, taps, border, rule.spatial_scale, rule.sampling_ratio, rule.aligned)


# ---- the three functions ----


def crops(job: Job, features: np.ndarray, output: np.ndarray) -> None:
    """Writes the crops; 0 in bins without a sample."""
    for some, terms in job.weights(rows):
        parts = _parts(job, some, terms, features, output)

        def work(part: _Part, terms: Any = terms) -> None:
            for strip, boxes in part.strips(features):
                if strip.top == part.rows.start:
                    made = part.lines_of(output, boxes, write=True)
                    levels = np.zeros((len(made), strip.channels), job.dtype)
                for i, (y, x) in enumerate(terms):
                    again = i > 0 or strip.top > part.rows.start
                    part.crop(strip, boxes, y, x, (2 if again else 1) if job.directions else 0, levels, again, made)
                if not part.in_place and strip.bottom == part.rows.stop:
                    pixels = made.reshape(len(made), *job.rule.bins, strip.channels)
                    output[part.start + boxes, part.channels] = pixels.transpose(0, 3, 1, 2)

        threads.run(work, parts, _cost(job, terms))


def to_features(job: Job, grad: np.ndarray, total: np.ndarray) -> None:
    """Adds the feature gradient, box after box."""
    for some, terms in job.weights(rows):
        owned: dict[Any, list[_Part]] = {}  # by the part of the features that they add to
        for part in _parts(job, some, terms, total, bands=True):
            owned.setdefault((part.image, part.channels.start, part.in_place and part.rows.start), []).append(part)

        def work(own: list[_Part], terms: Any = terms) -> None:
            for part in own:
                for strip, boxes in part.strips(total, add=True):
                    grads = part.lines_of(grad, boxes)
                    for y, x in terms:
                        _loop("spread", job.dtype.char)(*part.arguments(strip, boxes, y, x, 3), grads)

        threads.run(work, owned.values(), _cost(job, terms))


def to_boxes(job: Job, grad: np.ndarray, features: np.ndarray, sums: np.ndarray) -> None:
    """Adds to `sums`, (K, 4), the gradients with respect to y's start and step, and x's.

    Each is the sum over crops by weights that change so, times the gradient of each crop.
    """
    for some, terms in job.weights(rows, slopes=True):
        for (y, x), axes in zip(terms, job.free_axes(), strict=True):
            changes = {2 * axis + s: job.changed((y, x), axis, s) for axis in axes for s in (0, 1)}
            parts = _parts(job, some, [(y, x)], features, alike=True)
            found = [np.zeros((len(part.boxes), 4)) for part in parts]

            def work(item: tuple[_Part, np.ndarray], y: Rows = y, x: Rows = x, changes: Any = changes) -> None:
                part, each = item
                for strip, boxes in part.strips(features, cut=True):
                    first = strip.top == part.rows.start
                    grads = part.lines_of(grad, boxes)
                    if first:
                        levels = np.zeros((len(grads), strip.channels), job.dtype)
                    crop, total = np.empty_like(grads), np.empty(strip.channels)
                    to = each[np.searchsorted(part.boxes, boxes[0]) :]
                    for column, (of_y, of_x) in changes.items():
                        part.crop(strip, boxes, of_y, of_x, 1 if first else 2, levels, False, crop)
                        at = (strip.planes, strip.channels, boxes, y.begin, job.rule.bins[0], x.begin, job.rule.bins[1])
                        _loop("products", job.dtype.char)(crop, grads, *at, total, column, to)

            threads.run(work, zip(parts, found, strict=True), 4 * _cost(job, [(y, x)]))
            for part, each in zip(parts, found, strict=True):
                sums[part.start + part.boxes] += each


# ---- what they are given ----


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


class _Strip(NamedTuple):
    """Lines to work on; the arguments that loops begin with."""

    lines: np.ndarray
    planes: int
    channels: int
    y0: int  # the image's pixel at which they begin
    x0: int
    top: int  # only these rows of the image
    bottom: int


class _Part(NamedTuple):
    """Boxes to work on: in place, or in a window of an image that is brought over, for some channels."""

    job: Job
    in_place: _Lines | None  # the features, or their gradient
    start: int  # of the group of boxes
    boxes: np.ndarray  # numbers within the group
    image: int
    rows: range  # from the first to the last, in steps that the workspace holds
    columns: slice
    channels: slice

    def strips(self, array: np.ndarray, add: bool = False, cut: bool = False) -> Iterator[tuple[_Strip, np.ndarray]]:
        """Lines, and boxes to work on with them: some boxes after others, or a single one several times.

        `add`: lines that are brought over begin with 0, and are added to the array in the end. `cut`: only some boxes
        at a time in place, too.
        """
        count = self.channels.stop - self.channels.start
        each = max(1, BATCH // (math.prod(self.job.rule.bins) * count * self.job.dtype.itemsize))
        if self.in_place:
            strip = _Strip(*self.in_place, 0, 0, self.rows.start, self.rows.stop)
            yield from ((strip, boxes) for boxes in _cut(self.boxes, each if cut else len(self.boxes)))
            return
        for top in self.rows:
            bottom = min(top + self.rows.step, self.rows.stop)
            window = array[self.image, self.channels, top:bottom, self.columns]
            pixels = np.zeros((*window.shape[1:], count), self.job.dtype)
            if not add:
                np.copyto(pixels.transpose(2, 0, 1), window, casting="unsafe")
            strip = _Strip(pixels.reshape(1, bottom - top, -1), 1, count, top, self.columns.start, top, bottom)
            yield from ((strip, boxes) for boxes in _cut(self.boxes, each))
            if add:
                window += pixels.transpose(2, 0, 1)

    def lines_of(self, array: np.ndarray, boxes: np.ndarray, write: bool = False) -> np.ndarray:
        """Crops of some of the boxes, or gradients of them, as lines; `write`: to be written, and brought back."""
        dtype, bins, first = self.job.dtype, self.job.rule.bins, self.start + int(boxes[0])
        taken: Any = slice(first, first + len(boxes)) if self.in_place else self.start + boxes
        if self.in_place:
            planes, lines = self.in_place.planes, _Lines.of(array, dtype)
            if lines and lines.planes == planes:
                return lines.lines[first * planes : (first + len(boxes)) * planes]
            if planes > 1:
                return np.require(array[taken], dtype, ["C", "A"]).reshape(-1, *bins)
        pixels = np.empty((len(boxes), *bins, self.channels.stop - self.channels.start), dtype)
        if not write:
            np.copyto(pixels.transpose(0, 3, 1, 2), array[taken, self.channels], casting="unsafe")
        return pixels.reshape(*pixels.shape[:2], -1)

    def arguments(self, strip: _Strip, boxes: np.ndarray, y: Rows, x: Rows, lines: int) -> tuple[Any, ...]:
        """What a loop begins with; memory for so many lines is the last of it."""
        bins, channels = self.job.rule.bins, strip.channels
        most = int((x.begin[bins[1] :: bins[1]] - x.begin[: -bins[1] : bins[1]]).max()) + bins[1]
        places = np.empty((4, most * min(channels, loops.LANES)), np.uint32)
        scratch = np.empty((lines, max(strip.lines.shape[2], most * channels) + 1), self.job.dtype)
        images = self.job.images[self.start + boxes] if self.in_place else np.zeros(len(boxes), np.int64)
        return *strip, boxes, images, y[:4], bins[0], x[:4], bins[1], places, scratch

    def crop(self, strip: _Strip, boxes: np.ndarray, y: Rows, x: Rows, *rest: Any) -> None:
        _loop("crops", self.job.dtype.char)(*self.arguments(strip, boxes, y, x, 4), *rest)


def _cut(boxes: np.ndarray, length: int) -> list[np.ndarray]:
    return [boxes[first : first + length] for first in range(0, len(boxes), length)]


def _parts(
    job: Job,
    some: slice,
    terms: list[tuple[Rows, Rows]],
    array: np.ndarray,
    output: np.ndarray | None = None,
    bands: bool = False,
    alike: bool = False,
) -> list[_Part]:
    """How to work on a group of boxes.

    In place boxes are shared out among threads or, with `bands`, rows of the image. Where lines are brought over, it is
    for the boxes of an image either the part that they all lie in, or a window for each: whichever is less to read.
    `output` gets zeros where there is nothing to work on.
    """
    _, channels, height, width = job.shape
    count, size = some.stop - some.start, job.dtype.itemsize
    lines, out = _Lines.of(array, job.dtype), None if output is None else _Lines.of(output, job.dtype)
    matches = output is None or (lines is not None and out is not None and out.planes == lines.planes)
    if lines and matches and _in_place(job, lines, terms, alike):
        everything = slice(0, width), slice(0, channels)
        cut = threads.parts(height if bands else count, _cost(job, terms))
        if bands:
            rows = [range(band.start, band.stop, height) for band in cut]
            return [_Part(job, lines, some.start, np.arange(count), 0, band, *everything) for band in rows]
        each = [np.arange(part.start, part.stop) for part in cut]
        return [_Part(job, lines, some.start, boxes, 0, range(0, height, height), *everything) for boxes in each]

    first, stop = np.stack([along.extent for along in terms[0]], axis=1)  # (2, K) each
    images, touching = job.images[some], (stop > first).all(axis=0)
    if output is not None:
        output[some][~touching] = 0
    parts = []

    def add(image: int, boxes: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        (y0, x0), (y1, x1) = low.tolist(), high.tolist()
        block = min(BLOCK, channels)
        if not bands:  # parts that add to the same pixels must agree on the channels
            block = max(1, min(block, weights.WORKSPACE // ((y1 - y0) * (x1 - x0) * size)))
        step = max(1, weights.WORKSPACE // ((x1 - x0) * block * size))
        for c in range(0, channels, block):
            where = range(y0, y1, step), slice(x0, x1), slice(c, min(c + block, channels))
            parts.append(_Part(job, None, some.start, boxes, image, *where))

    for image in np.unique(images[touching]).tolist():
        boxes = np.flatnonzero((images == image) & touching)
        low, high = first[:, boxes].min(axis=1), stop[:, boxes].max(axis=1)
        # Each row costs about one cache line more than it has pixels.
        each_read = ((stop - first)[:, boxes] + np.array([[0], [BLOCK]])).prod(axis=0).sum()
        pixels = int((high - low).prod())
        if pixels <= each_read and pixels * min(BLOCK, channels) * size <= weights.WORKSPACE:
            add(image, boxes, low, high)
        else:
            for box in boxes.tolist():
                add(image, np.array([box]), first[:, box], stop[:, box])
    return parts


def _in_place(job: Job, lines: _Lines, terms: list[tuple[Rows, Rows]], alike: bool) -> bool:
    """Whether lines are worked on as they are.

    Of planes each entry along x of each row of bins is a single number: these are compared with the pixels to bring
    over, in accesses to memory. Few channels would leave a processor's lanes empty either way.

    Sums over channels come out alike either way only where BLOCK of them can be brought over: `alike` asks for that.
    """
    plane = job.shape[2] * job.shape[3] * job.dtype.itemsize
    if lines.channels > 1 or lines.planes < loops.LANES or plane * (BLOCK if alike else 1) > weights.WORKSPACE:
        return True
    (y, x), bins = terms[0], job.rule.bins
    touched = min(len(y.pixel) * len(x.pixel) * bins[0] // len(y.begin), job.shape[0] * job.shape[2] * job.shape[3])
    return 2 * len(x.pixel) * bins[0] <= touched


def _cost(job: Job, terms: list[tuple[Rows, Rows]]) -> int:
    """About how many multiplications a group takes."""
    y, x = terms[0]
    return len(terms) * len(y.pixel) * len(x.pixel) * job.rule.bins[0] // len(y.begin) * job.shape[1]
