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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from cupy_roialign import geometry
from cupy_roialign import rule as rules
from cupy_roialign.cpu import loops, threads, weights
from cupy_roialign.cpu.weights import Job, Rows, Term
from cupy_roialign.rule import Rule

BLOCK = 16
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


def _signature(name: str, dtype: str, few: bool) -> tuple[Any, ...]:
    """The types of a loop's arguments, whose features are of `dtype`; or positions, for rows."""
    f, i, array = numba.from_dtype(np.dtype(dtype)), numba.int64, numba.types.Array
    pair, out = numba.types.UniTuple(i, 2), array(f, 1, "C")
    integers, numbers, planes = (array(t, n, "C", readonly=True) for t, n in ((i, 1), (f, 1), (f, 2)))
    if name == "rows":
        edges, found = array(f, 2, "A", readonly=True), array(numba.float64, 2, "C")
        rule = numba.typeof(_Spec(0, 0, 0, 1.0, 1, True))
        return rule, edges, edges, pair, pair, array(i, 1, "C"), array(i, 3, "C"), array(i, 1, "C"), found, found
    of = integers, array(i, 3, "C", readonly=True), integers, numbers, numbers, pair
    scratch = array(numba.uint32, 2, "C"), array(numba.uint64, 2, "C"), array(f, 2, "C")
    common = numba.types.UniTuple(i, 8), integers, integers, *of, *scratch, numba.boolean if few else numba.none
    if name == "crops":
        return numbers, *common, numba.boolean, out
    if name == "spread":
        return out, *common, numbers
    return numbers, *common, planes, planes, numbers, *[array(numba.float64, 2, "C")] * 2  # slopes


NAMES = (("rows", False), *itertools.product(("crops", "spread", "slopes"), (False, True)))

_lock = threading.RLock()


def _loop(name: str, dtype: str, few: bool = False) -> Any:
    """A loop as machine code. The dtype is f or d. `few`: for few channels, that is less than loops.LANES."""
    return _made.get((name, dtype, few)) or _make(name, dtype, few)


_made: dict[tuple[str, str, bool], Any] = {}


def _make(name: str, dtype: str, few: bool) -> Any:
    """Compiles a loop, or loads it from the cache on disk; once, whichever thread asks first."""
    source = getattr(loops, name)
    options = {key: source.targetoptions[key] for key in ("nogil", "error_model")}
    signature = _signature(name, dtype, few)
    with _lock, _cache_folder(dtype) as folder:
        if (name, dtype, few) not in _made:
            try:  # Numba would take another folder, that knows of changes to loops.py alone
                os.makedirs(folder, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                _made[name, dtype, few] = numba.njit(signature, cache=True, **options)(source.py_func)
            except (OSError, RuntimeError):  # one that cannot be written to
                _made[name, dtype, few] = numba.njit(signature, **options)(source.py_func)
        return _made[name, dtype, few]


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
    for (name, few), dtype in itertools.product(NAMES, "fd"):
        _loop(name, dtype, few)


# ---- rows ----


def rows(
    rule: Rule, low: np.ndarray, high: np.ndarray, sizes: Sequence[int], slopes: bool, dtype: np.dtype
) -> Rows:
    """`Rows`, the same as those of weights.py; there may be room behind the entries."""
    (y, x), count, bins = weights.most_entries(rule, low, high, sizes), low.shape[1], rule.bins
    room, most = (
        (count * (bins[0] * y + bins[1] * x), max(y, x))
        if rule.sampling_ratio
        else (int((bins[0] * y + bins[1] * x).sum()), int(max(y.max(), x.max())))
    )
    found = (
        np.empty(count * (bins[0] + bins[1]) + 1, np.int64),
        np.empty((2, 2, count), np.int64),
        np.empty(room, np.int64),
        np.empty((3 if slopes else 1, room)),
    )
    most = _loop("rows", low.dtype.char)(_spec(rule), low, high, sizes, bins, *found, np.empty((3, most)))
    return Rows(*found[:3], found[3].astype(dtype, copy=False), most)


def _spec(rule: Rule) -> _Spec:
    frame, taps, border = int(rule.frame), int(rule.taps), int(rule.border)
    return _Spec(frame, taps, border, rule.spatial_scale, rule.sampling_ratio, rule.aligned)


# ---- the three functions ----


def crops(job: Job, features: np.ndarray, output: np.ndarray) -> None:
    """Writes the crops; 0 in bins without a sample."""
    for some, of, terms in job.weights(rows):
        cost, leveled = _pixels(job, of) * job.shape[1] * len(terms), bool(job.directions)
        parts = _parts(job, some, of, features, cost, each_box=leveled)
        if not any(part.in_place for part in parts):
            output[some][~_touching(of)] = 0

        def work(part: _Part, of: Rows = of, terms: list[Term] = terms) -> None:
            strips = part.strips(features, of if leveled else None)
            for numbers in part.batches(cut=not part.in_place):
                made = part.crops_of(output, numbers, write=True)
                for strip in strips:
                    for term in terms:
                        _call("crops", part, of, term, strip, numbers, not part.in_place, made)
                if not part.in_place:
                    pixels = made.reshape(len(numbers), *job.rule.bins, -1)
                    output[part.start + numbers, part.channels] = pixels.transpose(0, 3, 1, 2)

        threads.run(work, parts, cost)


def to_features(job: Job, grad: np.ndarray, total: np.ndarray) -> None:
    """Adds the feature gradient, box after box."""
    for some, of, terms in job.weights(rows):
        cost = _pixels(job, of) * job.shape[1] * len(terms)
        owned: dict[Any, list[_Part]] = {}  # by the part of the features that they add to
        for part in _parts(job, some, of, total, cost, bands=True):
            owned.setdefault((part.image, part.channels.start, part.in_place and part.rows.start), []).append(part)

        def work(own: list[_Part], of: Rows = of, terms: list[Term] = terms) -> None:
            for part in own:
                for strip in part.strips(total, add=True):
                    for numbers in part.batches():
                        grads = part.crops_of(grad, numbers)
                        for term in terms:
                            _call("spread", part, of, term, strip, numbers, grads)

        threads.run(work, owned.values(), cost)


def to_boxes(job: Job, grad: np.ndarray, features: np.ndarray, sums: np.ndarray) -> None:
    """Adds to `sums`, (K, 4), the gradients with respect to y's start and step, and x's."""
    for some, of, terms in job.weights(rows, slopes=True):
        cost = 4 * _pixels(job, of) * job.shape[1] * len(terms)
        parts = _parts(job, some, of, features, cost, alike=True)
        found = [np.zeros((len(terms), len(part.boxes), 4)) for part in parts]

        def work(item: tuple[_Part, np.ndarray], of: Rows = of, terms: list[Term] = terms) -> None:
            part, found_of = item
            strips, first = part.strips(features), 0
            for numbers in part.batches():
                grads, levels = part.crops_of(grad, numbers), part.levels(of, features, numbers)
                last = first + len(numbers)
                for strip in strips:
                    products = np.empty((4, job.rule.bins[1] * strip.where[1]))
                    for term, to in zip(terms, found_of, strict=True):
                        rest = of.values, levels, grads, products, to[first:last]
                        _call("slopes", part, of, term, strip, numbers, *rest)
                first = last

        threads.run(work, zip(parts, found, strict=True), cost)
        for part, found_of in zip(parts, found, strict=True):
            for axes, to in zip(job.free_axes(), found_of, strict=True):
                for axis in axes:
                    sums[part.start + part.boxes, 2 * axis : 2 * axis + 2] += to[:, 2 * axis : 2 * axis + 2]


def _call(name: str, part: _Part, of: Rows, term: Term, strip: _Strip, numbers: np.ndarray, *rest: Any) -> None:
    """Runs a loop, with memory for what it holds of a box."""
    (_, channels, _, width, *_), bins, (most_y, most_x) = strip.where, part.job.rule.bins, of.most
    few, dtype = channels < loops.LANES, part.job.dtype
    indices, lines = _SCRATCH[name, few]
    pixels = max(min(loops.FAR * most_x, width // channels), most_x) + bins[1] + 2
    scratch = (
        np.empty((indices, (most_x + bins[1] + 2) * (channels if few else 1)), np.uint32),
        np.empty((2, max(most_y, most_x) + 3), np.uint64),
        np.empty((lines, max(pixels * channels, most_y)), dtype),
    )
    loop, images = _loop(name, dtype.char, few), part.images(numbers)
    loop(*strip, numbers, images, *of[:3], *term, bins, *scratch, few or None, *rest)


_SCRATCH = {
    ("crops", False): (3, 3),
    ("crops", True): (6, 5),
    ("spread", False): (3, 3),
    ("spread", True): (6, 5),
    ("slopes", False): (7, 10),
    ("slopes", True): (16, 16),
}
"""Rows of indices and of lines that a loop needs, for few channels or not."""


# ---- what they are given ----


class _Strip(NamedTuple):
    """Lines to work on, as the loops take them."""

    lines: np.ndarray  # flat
    where: tuple[int, ...]
    """Planes of an image, channels of a pixel, height of a plane and numbers in a line; the image's row and column at
    which planes begin; the image's rows to work on, from and to."""


class _Part(NamedTuple):
    """Boxes to work on: in place, or in a window of an image that is brought over, for some channels."""

    job: Job
    in_place: tuple[np.ndarray, int, int] | None  # what `_flat` says of the features, or of their gradient
    start: int  # of the group of boxes
    boxes: np.ndarray  # numbers within the group
    image: int
    rows: range  # from the first to the last, in steps that the workspace holds
    columns: slice
    channels: slice

    def strips(self, array: np.ndarray, leveled: Rows | None = None, add: bool = False) -> Iterable[_Strip]:
        """Where the boxes lie in (N, C, H, W); more than one for a single box only.

        `leveled`: less the level of the box. `add`: what is brought over begins with 0, and is added in the end.
        """
        if self.in_place:
            (flat, planes, channels), (_, _, height, width) = self.in_place, array.shape
            where = planes, channels, height, width * channels, 0, 0, self.rows.start, self.rows.stop
            return [_Strip(flat, where)]
        strips = self._brought_over(array, leveled, add)
        return strips if add or len(self.rows) > 1 else list(strips)

    def _brought_over(self, array: np.ndarray, leveled: Rows | None, add: bool) -> Iterator[_Strip]:
        for top in self.rows:
            bottom = min(top + self.rows.step, self.rows.stop)
            window = array[self.image, self.channels, top:bottom, self.columns]
            channels, height, width = window.shape
            pixels = np.zeros((height, width, channels), self.job.dtype)
            if not add:
                np.copyto(pixels.transpose(2, 0, 1), window, casting="unsafe")
            if leveled:
                pixels -= self.levels(leveled, array, self.boxes)
            where = 1, channels, height, width * channels, top, self.columns.start, top, bottom
            yield _Strip(pixels.reshape(-1), where)
            if add:
                window += pixels.transpose(2, 0, 1)

    def levels(self, of: Rows, array: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(boxes, C): the first pixel that each box touches, where that is finite."""
        y, x = (np.minimum(of.extent[axis, 0, numbers], array.shape[2 + axis] - 1) for axis in (0, 1))
        levels = array[self.job.images[self.start + numbers], self.channels, y, x].astype(self.job.dtype)
        levels[~np.isfinite(levels)] = 0
        return levels

    def batches(self, cut: bool = True) -> list[np.ndarray]:
        """The boxes, so many at a time that their crops stay in the cache."""
        size = math.prod(self.job.rule.bins) * (self.channels.stop - self.channels.start) * self.job.dtype.itemsize
        each = max(1, BATCH // size) if cut else len(self.boxes)
        return [self.boxes[first : first + each] for first in range(0, len(self.boxes), each)]

    def images(self, numbers: np.ndarray) -> np.ndarray:
        """Those that the boxes lie in, counted from the strip's first."""
        return self.job.images[self.start + numbers] if self.in_place else np.zeros(len(numbers), np.int64)

    def crops_of(self, array: np.ndarray, numbers: np.ndarray, write: bool = False) -> np.ndarray:
        """Crops, or gradients of them, flat and in the order of the lines; to `write`, in place or from 0 on."""
        if self.in_place:
            first = self.start + int(numbers[0])
            pixels = array[first : first + len(numbers)]
            pixels = pixels.transpose(0, 2, 3, 1) if self.in_place[2] > 1 else pixels
        elif write:
            count = len(numbers) * math.prod(self.job.rule.bins) * (self.channels.stop - self.channels.start)
            return np.zeros(count, self.job.dtype)
        else:
            pixels = array[self.start + numbers, self.channels].transpose(0, 2, 3, 1)
        return (pixels if write else np.require(pixels, self.job.dtype, ["C", "A"])).reshape(-1)


def _flat(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int, int] | None:
    """An (N, C, H, W) array's memory, planes of an image, and channels of a pixel.

    None where elements are of another dtype, or neither planes nor pixels with their channels.
    """
    if array.dtype != dtype or not array.flags.aligned:
        return None
    if array.flags.c_contiguous:
        return array.reshape(-1), array.shape[1], 1
    pixels = array.transpose(0, 2, 3, 1)
    return (pixels.reshape(-1), 1, array.shape[1]) if pixels.flags.c_contiguous else None


def _pixels(job: Job, of: Rows) -> int:
    """About how many pixels the boxes of a group touch, counted for each box."""
    boxes = of.extent.shape[2]
    along_y = int(of.begin[boxes * job.rule.bins[0]])
    return along_y * (of.entries - along_y) // boxes


def _touching(of: Rows) -> np.ndarray:
    return (of.extent[:, 1] > of.extent[:, 0]).all(axis=0)


def _in_place(job: Job, of: Rows, array: np.ndarray, alike: bool) -> tuple[np.ndarray, int, int] | None:
    """What `_flat` says of the features, if they are worked on as they are.

    Of planes each entry along x of each row of bins is a single number: these are compared with the pixels to bring
    over, in accesses to memory. Few channels would leave a processor's lanes empty either way.

    Sums over channels come out alike only by the same way, whatever boxes there are: `alike` asks for that.
    """
    lines, plane = _flat(array, job.dtype), job.shape[2] * job.shape[3]
    if not lines or lines[2] > 1 or lines[1] < loops.LANES:
        return lines
    if plane * job.dtype.itemsize * (BLOCK if alike else 1) > weights.WORKSPACE:
        return lines
    numbers = (of.entries - int(of.begin[of.extent.shape[2] * job.rule.bins[0]])) * job.rule.bins[0]
    return lines if not alike and 2 * numbers <= min(_pixels(job, of), job.shape[0] * plane) else None


def _parts(
    job: Job,
    some: slice,
    of: Rows,
    array: np.ndarray,
    cost: int,
    bands: bool = False,
    alike: bool = False,
    each_box: bool = False,
) -> list[_Part]:
    """How to work on a group of boxes.

    In place boxes are shared out among threads or, with `bands`, rows of the image. Where lines are brought over, it is
    for the boxes of an image either the part that they all lie in, or a window for each: whichever is less to read;
    for `each_box` it is always its own.
    """
    _, channels, height, width = job.shape
    lines = None if each_box else _in_place(job, of, array, alike)
    if lines:
        every, columns = slice(0, channels), slice(0, width)
        cut = threads.parts(height if bands else some.stop - some.start, cost)
        boxes = [slice(0, some.stop - some.start)] if bands else cut
        rows = [range(band.start, band.stop, height) for band in cut] if bands else [range(0, height, height)]
        return [
            _Part(job, lines, some.start, np.arange(own.start, own.stop), 0, of_rows, columns, every)
            for own, of_rows in itertools.product(boxes, rows)
        ]

    first, stop, size = of.extent[:, 0], of.extent[:, 1], job.dtype.itemsize
    images, touching, parts = job.images[some], _touching(of), []

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
        if not each_box and pixels <= each_read and pixels * min(BLOCK, channels) * size <= weights.WORKSPACE:
            add(image, boxes, low, high)
        else:
            for box in boxes.tolist():
                add(image, np.array([box]), first[:, box], stop[:, box])
    return parts
