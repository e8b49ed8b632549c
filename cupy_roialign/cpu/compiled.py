"""The compiled way: loops that Numba makes machine code of, for float32 and float64.

Features that lie as such numbers, side by side, are worked on where they are: pixels with their channels, or planes of
few channels. Of all others the part that boxes touch is brought over first, some channels at a time: 16-bit floats,
integers, other strides and, where that is less work, planes of many channels.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_roialign import arrays, geometry
from cupy_roialign.cpu import loops, machine_code, threads, weights
from cupy_roialign.cpu.weights import Job, Rows, Term

BATCH = 2**18
"""Bytes of crops that are worked on at a time before they are brought back; they stay in the cache."""

STEP = 2**16
"""Numbers that are brought over in about the time that Python takes for a window: 50 us on an AMD EPYC."""

ONE_BOX = np.zeros(1, np.int64)
"""`numbers` of a single box."""

MANY = 8 * loops.GROUP
"""Channels that are brought over together where NumPy would else make many short copies: of each pixel's channels in
channels-last features, and of each bin's in the crops of the box gradient."""


def _rows(job: Job, some: slice, slopes: bool, room: int) -> Rows:
    """`Rows`, the same as those of weights.py; there may be room behind the entries."""
    boxes, rule = job.boxes[some], job.rule
    begin, extent, pixel, values, _ = memory = _memory_of_rows(job, len(boxes), slopes, room)
    loop = machine_code.loop("rows", job.dtype.char, boxes.dtype.char, False)
    most = loop(machine_code.Spec.of(rule), boxes, rule.columns, job.shape[2:], rule.bins, *memory)
    return Rows(begin, extent, pixel, values, most)


def _memory_of_rows(job: Job, count: int, slopes: bool, room: int) -> tuple[np.ndarray, ...]:
    """For the rows of so many boxes, with room for entries: what `Rows` has of arrays, and what is summed up."""
    (y, x), sizes, ratio = job.rule.bins, job.shape[2:], job.rule.sampling_ratio
    begin, extent = np.empty(count * (y + x) + 1, np.int64), np.empty((2, 2, count), np.int64)
    pixel, values = np.empty(room, np.int64), np.empty((3 if slopes else 1, room), job.dtype)
    return begin, extent, pixel, values, np.empty((3, min(2 * ratio or max(sizes), max(sizes))))


def _memory_of_box(job: Job, lines: _Lines, most: tuple[int, int], kinds: int = 1) -> tuple[np.ndarray, ...]:
    """For what loops hold of a box, of at most so many entries along y and x: `indices`, `offsets` and `scratch`.

    `kinds`: of values along x.
    """
    (y, x), bins, channels = most, job.rule.bins[1], lines.where[1]
    pixels = max(min(loops.FAR * x, lines.where[3] // channels), x) + bins + 2
    return (
        np.empty((1 + 5 * kinds, (x + bins + 2) * (channels if lines.few else 1)), np.uint32),
        np.empty((2, max(y, x) + 3), np.uint64),
        np.empty((2 + 4 * kinds, max(pixels * channels, y)), job.dtype),
    )


# ---- the three functions ----


def crops(job: Job, features: np.ndarray, output: np.ndarray) -> None:
    """Writes the crops; 0 in bins without a sample."""
    lines, cost, rule = None if job.directions else _in_place(job, features), _cost(job), job.rule
    if not lines or not _is_plain(lines.ordered(output), job.dtype):
        for group in _groups(job):
            group.crops(features, output[group.some], cost)
        return
    y, x = (most if isinstance(most, int) else int(most.max()) for most in job.most_entries())
    loop = machine_code.loop("forward", job.dtype.char, job.boxes.dtype.char, lines.few)

    def work(part: slice) -> None:
        boxes = job.boxes[part], rule.columns, job.shape[2:], rule.bins, job.images[part]
        memory = *_memory_of_rows(job, 1, False, y + x), *lines, ONE_BOX, *_memory_of_box(job, lines, (y, x))
        crops = lines.ordered(output[part]).reshape(-1)
        loop(machine_code.Spec.of(rule), *boxes, *memory, lines.few or None, crops)

    threads.run(work, threads.parts(len(output), cost), cost)


def to_features(job: Job, grad: np.ndarray, total: np.ndarray) -> None:
    """Adds the feature gradient, box after box."""
    lines, cost = _in_place(job, total, add=True), _cost(job)
    for group in _groups(job):
        group.to_features(grad[group.some], total, lines, cost)


def to_boxes(job: Job, grad: np.ndarray, features: np.ndarray, sums: np.ndarray) -> None:
    """Adds to `sums`, (K, 4), the gradients with respect to y's start and step, and x's."""
    lines, cost = _in_place(job, features, whole=True), 4 * _cost(job)
    for group in _groups(job, slopes=True):
        found = group.to_boxes(grad[group.some], features, lines, cost)
        for axes, of_term in zip(job.free_axes(), found, strict=True):
            for axis in axes:
                sums[group.some, 2 * axis : 2 * axis + 2] += of_term[:, 2 * axis : 2 * axis + 2]


class _Group(NamedTuple):
    """Boxes of a job that are worked on together, with their rows. Gradients in place, as far as there are `lines`."""

    job: Job
    some: slice
    of: Rows
    terms: list[Term]
    images: np.ndarray  # (K,)

    def crops(self, features: np.ndarray, out: np.ndarray, cost: int) -> None:
        def work(window: _Window) -> None:
            strips, dtype = window.strips(features), self.job.dtype
            to = out[:, window.channels].transpose(0, 2, 3, 1)
            for numbers in window.batches(out):
                at, again = _slice(numbers), False
                plain = isinstance(at, slice) and _is_plain(to[at], dtype)
                made = to[at] if plain else np.empty((len(numbers), *to.shape[1:]), dtype)
                for strip in strips:
                    for term in self.terms:
                        self.call("crops", strip, numbers, window.images, term, again, made.reshape(-1))
                        again = True
                if not plain:
                    to[at] = made

        out[~self.touching()] = 0
        threads.run(work, self.windows(features, leveled=bool(self.job.directions)), cost)

    def to_features(self, grads: np.ndarray, total: np.ndarray, lines: _Lines | None, cost: int) -> None:
        def work(shares: Sequence[_Share]) -> None:
            for share in shares:
                for strip in share.strips(total, add=True):
                    for numbers in share.batches(grads):
                        crops = strip.flat(grads[_slice(numbers), share.channels], self.job.dtype)
                        for term in self.terms:
                            self.call("spread", strip, numbers, share.images, term, crops)

        if lines:
            rows, every = threads.parts(total.shape[2], cost), slice(0, len(grads))
            threads.run(work, [[_InPlace(self, every, lines.between(some))] for some in rows], cost)
        else:  # each thread adds to a part of the features of its own
            windows = self.windows(total, bands=True)
            threads.run(work, _grouped(windows, lambda window: (window.image, window.channels.start)), cost)

    def to_boxes(self, grads: np.ndarray, features: np.ndarray, lines: _Lines | None, cost: int) -> np.ndarray:
        """(terms, K, 4)."""
        found = np.zeros((len(self.terms), len(grads), 4))

        def work(shares: Sequence[_Share]) -> None:
            for share in shares:
                strips = share.strips(features)
                for numbers in share.batches(grads):
                    levels = self.levels(features[:, share.channels], numbers)
                    for strip in strips:
                        crops = strip.flat(grads[_slice(numbers), share.channels], self.job.dtype)
                        sums = np.empty((5, max(4, self.job.rule.bins[1] * strip.where[1])))
                        for term, to in zip(self.terms, found, strict=True):
                            rest = self.of.values, levels, crops, sums, to
                            self.call("slopes", strip, numbers, share.images, term, *rest)

        if lines:
            threads.run(work, [[_InPlace(self, part, lines)] for part in threads.parts(len(grads), cost)], cost)
        else:  # each thread adds to the sums of boxes of its own
            windows = self.windows(features, slopes=True)
            threads.run(work, _grouped(windows, lambda window: (window.image, window.boxes[0])), cost)
        return found

    def call(self, name: str, strip: _Lines, numbers: np.ndarray, images: np.ndarray, term: Term, *rest: Any) -> None:
        """Runs a loop, with memory for what it holds of a box."""
        (begin, extent, pixel, _, most), few, job = self.of, strip.few or None, self.job
        memory = _memory_of_box(job, strip, most, 3 if name == "slopes" else 1)
        loop = machine_code.loop(name, job.dtype.char, job.dtype.char, strip.few)
        loop(*strip, numbers, images, begin, extent, pixel, *term, job.rule.bins, *memory, few, *rest)

    def levels(self, features: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(boxes, C): the first pixel that each box touches, where that is finite."""
        y, x = (np.minimum(self.of.extent[axis, 0, numbers], features.shape[2 + axis] - 1) for axis in (0, 1))
        levels = features[self.images[numbers], :, y, x].astype(self.job.dtype)
        levels[~np.isfinite(levels)] = 0
        return levels

    def touching(self) -> np.ndarray:
        """(K,) bool: whether boxes touch any pixel."""
        first, stop = self.of.extent.swapaxes(0, 1)
        return np.logical_and(*(stop > first))

    def windows(
        self, array: np.ndarray, bands: bool = False, leveled: bool = False, slopes: bool = False
    ) -> list[_Window]:
        """For the boxes of an image the part of `array` that they all lie in, or a window for each, if that is less.

        `leveled`: always one for each, less the level of the box. `bands`: windows may lie over each other.
        """
        channels, (first, stop), size = self.job.shape[1], self.of.extent.swapaxes(0, 1), self.job.dtype.itemsize
        touching, zeros = self.touching(), np.zeros_like(self.images)
        many = slopes or arrays.is_channels_last(array.shape, array.strides)
        least = min(MANY if many else loops.GROUP, channels)
        found: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []  # image, boxes, first pixel and stop
        for image in np.unique(self.images[touching]).tolist():
            boxes = np.flatnonzero((self.images == image) & touching)
            low, high = first[:, boxes].min(axis=1), stop[:, boxes].max(axis=1)
            # Each row costs about one cache line more than it has pixels.
            each_read = ((stop - first)[:, boxes] + np.array([[0], [loops.GROUP]])).prod(axis=0).sum()
            pixels = int((high - low).prod())
            fits = pixels * least * size <= weights.WORKSPACE
            if pixels <= each_read and fits and not leveled:
                found.append((image, boxes, low, high))
            else:
                found += [(image, np.array([box]), first[:, box], stop[:, box]) for box in boxes.tolist()]

        def block_of(pixels: int) -> int:
            """How many channels are brought over together: of small windows more, for the sake of fewer steps."""
            return min(max(least, BATCH // (pixels * size) // loops.GROUP * loops.GROUP), channels)

        areas = [int((high - low).prod()) for _, _, low, high in found]
        of_all, windows = block_of(max(areas, default=1)), []
        for (image, boxes, low, high), pixels in zip(found, areas, strict=True):
            (y0, x0), (y1, x1) = low.tolist(), high.tolist()
            block = of_all  # windows that add to the same pixels must agree on the channels
            if not bands:
                block = max(1, min(block_of(pixels), weights.WORKSPACE // (pixels * size)))
            step = max(1, weights.WORKSPACE // ((x1 - x0) * block * size))
            for c in range(0, channels, block):
                where = range(y0, y1, step), slice(x0, x1), slice(c, min(c + block, channels))
                windows.append(_Window(self, boxes, image, *where, zeros, leveled))
        return windows


def _groups(job: Job, slopes: bool = False) -> Iterator[_Group]:
    return (_Group(job, some, of, terms, job.images[some]) for some, of, terms in job.weights(_rows, slopes))


def _cost(job: Job) -> int:
    """About how many multiplications a call takes."""
    (height, width), ratio = job.shape[2:], job.rule.sampling_ratio
    if ratio:
        pixels = len(job.boxes) * min(math.prod(job.rule.bins) * (2 * ratio) ** 2, height * width)
    else:
        sides = np.abs(job.edges[1] - job.edges[0]) * job.rule.spatial_scale + 1
        pixels = int(np.nansum(np.minimum(sides, [[height], [width]]).prod(axis=0)))
    return pixels * job.shape[1]


def _slice(numbers: np.ndarray) -> Any:
    """Numbers as a slice, if they follow each other: for that NumPy makes no copy."""
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers


def _grouped(windows: list[_Window], key: Callable[[_Window], Any]) -> list[list[_Window]]:
    groups = collections.defaultdict(list)
    for window in windows:
        groups[key(window)].append(window)
    return list(groups.values())


def _is_plain(array: np.ndarray, dtype: np.dtype) -> bool:
    """Whether the loops take an array as it is."""
    return array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned


def _each(job: Job, channels: int) -> int:
    """So many boxes that their crops stay in the cache."""
    return max(1, BATCH // (math.prod(job.rule.bins) * channels * job.dtype.itemsize))


# ---- features as they lie in memory ----


class _Lines(NamedTuple):
    """Features, or their gradient, as the loops take them."""

    lines: np.ndarray  # flat
    where: tuple[int, ...]
    """Planes of an image, channels of a pixel, height of a plane and numbers in a line; the image's row and column at
    which planes begin; the image's rows to work on, from and to."""

    @property
    def few(self) -> bool:
        """Whether the loops for few channels take them."""
        return self.where[1] < loops.LANES

    def between(self, rows: slice) -> _Lines:
        return self._replace(where=(*self.where[:6], rows.start, rows.stop))

    def ordered(self, crops: np.ndarray) -> np.ndarray:
        return crops.transpose(0, 2, 3, 1) if self.where[1] > 1 else crops

    def flat(self, crops: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Crops in the order of the lines; a copy where they are in another, or of another dtype."""
        return np.require(self.ordered(crops), dtype, ["C", "A"]).reshape(-1)


def _in_place(job: Job, array: np.ndarray, add: bool = False, whole: bool = False) -> _Lines | None:
    """Features that are worked on as they are: pixels with their channels, or planes.

    `whole`: a box must not be worked on in strips, which would change sums over it. So what is too large to be brought
    over in one is worked on in place.
    """
    flags = array.flags
    if array.dtype != job.dtype or not flags.aligned:
        return None
    _, channels, height, width = array.shape
    if not flags.c_contiguous:
        pixels = array.transpose(0, 2, 3, 1)
        if not pixels.flags.c_contiguous:
            return None
        return _Lines(pixels.reshape(-1), (1, channels, height, width * channels, 0, 0, 0, height))
    large = whole and height * width * job.dtype.itemsize * loops.GROUP > weights.WORKSPACE
    if channels >= loops.LANES and not large and not _is_less_in_place(job, add):
        return None
    return _Lines(array.reshape(-1), (channels, 1, height, width, 0, 0, 0, height))


def _is_less_in_place(job: Job, add: bool) -> bool:
    """Whether planes of many channels are less work where they are than brought over as pixels.

    In a plane each number is taken out of a line by itself, of pixels LANES of them at a time. But all pixels of a box
    are brought over, in windows of boxes or of images; those that are added to are brought back as well.
    """
    (count, channels, height, width), (y, x), ratio = job.shape, job.rule.bins, job.rule.sampling_ratio
    taken = len(job.boxes) * y * min(2 * ratio * x if ratio else width + x, width + x) * channels * loops.LANES
    if taken <= STEP:
        return True
    areas: Any = 1.0
    for low, high, bins, size in job.axes():
        _, step, _ = geometry.affine(job.rule, low, high, bins, size, job.boxes.dtype.type)
        areas = areas * np.fmin(np.abs(step) * bins + 2, size)  # NaN of a broken box counts as all
    of_boxes, of_images = areas.sum() * channels + STEP * len(job.boxes), (height * width * channels + STEP) * count
    return bool(taken <= min(of_boxes, of_images) * (2 if add else 1))


class _InPlace(NamedTuple):
    """Boxes that are worked on where their features are."""

    group: _Group
    part: slice  # their numbers
    lines: _Lines
    channels: slice = slice(None)

    @property
    def images(self) -> np.ndarray:
        return self.group.images

    def strips(self, array: np.ndarray, add: bool = False) -> Iterable[_Lines]:
        return [self.lines]

    def batches(self, crops: np.ndarray) -> Iterable[np.ndarray]:
        """Numbers of all boxes at once or, where their crops must be copied, of some at a time."""
        job, start, stop = self.group.job, self.part.start, self.part.stop
        each = stop - start if _is_plain(self.lines.ordered(crops), job.dtype) else _each(job, job.shape[1])
        return (np.arange(first, min(first + each, stop)) for first in range(start, stop, each))


class _Window(NamedTuple):
    """Boxes that lie in a part of an image, which is brought over for some channels."""

    group: _Group
    boxes: np.ndarray  # their numbers
    image: int
    rows: range  # from the first to the last, in steps that the workspace holds
    columns: slice
    channels: slice
    images: np.ndarray  # 0 for all boxes: the loops see one image alone
    leveled: bool  # the level of a single box is taken off

    def strips(self, array: np.ndarray, add: bool = False) -> Iterable[_Lines]:
        """Rows of the window of an (N, C, H, W) array as pixels; more than one strip for a single box only.

        `add`: they begin with 0, and are added to the array in the end.
        """
        strips = self._strips(array, add)
        return strips if add or len(self.rows) > 1 else list(strips)

    def _strips(self, array: np.ndarray, add: bool) -> Iterator[_Lines]:
        for top in self.rows:
            bottom = min(top + self.rows.step, self.rows.stop)
            window = array[self.image, self.channels, top:bottom, self.columns]
            channels, height, width = window.shape
            pixels = np.zeros((height, width, channels), self.group.job.dtype)
            if not add:
                np.copyto(pixels.transpose(2, 0, 1), window, casting="unsafe")
            if self.leveled:
                pixels -= self.group.levels(array[:, self.channels], self.boxes)
            where = 1, channels, height, width * channels, top, self.columns.start, top, bottom
            yield _Lines(pixels.reshape(-1), where)
            if add:
                window += pixels.transpose(2, 0, 1)

    def batches(self, crops: np.ndarray) -> Iterable[np.ndarray]:
        each = _each(self.group.job, self.channels.stop - self.channels.start)
        return (self.boxes[first : first + each] for first in range(0, len(self.boxes), each))


_Share = _InPlace | _Window
"""What a thread works on at a time."""
