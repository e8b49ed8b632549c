"""The weights of boxes as the compiled way works them out: geometry.py for Numba, and the rows of weights.py."""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload, register_jitable

from cupy_roialign import geometry

OPTIONS: Any = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
"""Each operation is rounded as it is written: so results are the same whichever loop, and whichever processor."""

part = numba.njit(**OPTIONS, no_cpython_wrapper=True)
"""A part of loops. The loops themselves are compiled by machine_code.py."""

INNER = {"no_cfunc_wrapper": True, "no_cpython_wrapper": True}
"""For what Python does not call. To be called by it takes as long to compile as the rest."""


for _function in (
    geometry.is_finite,
    geometry.extent,
    geometry.affine,
    geometry.origin,
    geometry.position,
    geometry.lever,
    geometry.inside,
    geometry.taps,
    geometry.candidates,
):
    register_jitable(**INNER)(_function)


@overload(geometry.select, jit_options=INNER)
def _select(condition, a, b):
    return lambda condition, a, b: a if condition else b


def type_of(array):
    """numpy.float32 or numpy.float64."""


@overload(type_of, jit_options=INNER)
def _type_of(array):
    real = np.float32 if array.dtype == numba.float32 else np.float64
    return lambda array: real


@part
def edges(boxes, columns, k, axis):
    """Where a box begins and ends along an axis; NaN, if any of its coordinates is not finite."""
    low, high, real = boxes[k, columns[axis]], boxes[k, columns[axis + 2]], type_of(boxes)
    for column in columns:
        if not geometry.is_finite(boxes[k, column]):
            low = high = real(np.nan)
    return low, high


def rows(rule, boxes, columns, sizes, bins, begin, extent, pixel, values, sums):
    """Fills `Rows` but for `most`, which it returns. One row of `values`: without slopes."""
    slopes, real = len(values) > 1, type_of(boxes)
    end = row = of_y = most = begin[0] = 0
    for axis in range(2):
        size, of_y, most = sizes[axis], most, 0
        for k in range(len(boxes)):
            low, high = edges(boxes, columns, k, axis)
            start, step, samples = geometry.affine(rule, low, high, bins[axis], size, real)
            share, base = 1.0 / samples, end
            extent[axis, 0, k], extent[axis, 1, k] = size, 0
            for p in range(bins[axis]):
                origin, head = geometry.origin(start, step, p, real), end
                first, stop = np.int64(0), np.int64(samples)
                if samples > geometry.EVERY_SAMPLE:
                    first, stop = geometry.candidates(start, step, samples, origin, size, real)
                met = 0
                for i in range(first, stop):
                    position = geometry.position(rule, origin, step, samples, i, real)
                    if not geometry.inside(rule, position, size):
                        continue
                    under, over, fraction = geometry.taps(rule, position, size, real)
                    slope, lever = share if over > under else 0.0, geometry.lever(rule, p, samples, i)
                    for tap in range(2):  # in the order in which the box goes, so that pixels are in order
                        at, weight, change = under, (1.0 - np.float64(fraction)) * share, -slope
                        if (tap == 1) != (step < 0):
                            at, weight, change = over, np.float64(fraction) * share, slope
                        # Positions go one way, so a pixel that was met before is one of the last two.
                        entry = met - 1
                        while entry >= 0 and entry >= met - 2 and pixel[head + entry] != at:
                            entry -= 1
                        if entry < 0 or entry < met - 2:
                            entry = met
                            met += 1
                            pixel[head + entry] = at
                            sums[0, entry] = sums[1, entry] = sums[2, entry] = 0
                        sums[0, entry] += weight
                        sums[1, entry] += change
                        sums[2, entry] += change * lever
                for entry in range(met):
                    at = pixel[head + entry]
                    # The slopes of neighbours may have cancelled out.
                    if sums[0, entry] != 0 or (slopes and (sums[1, entry] != 0 or sums[2, entry] != 0)):
                        pixel[end] = at
                        for v in range(len(values)):
                            values[v, end] = sums[v, entry]
                        extent[axis, 0, k] = min(extent[axis, 0, k], at)
                        extent[axis, 1, k] = max(extent[axis, 1, k], at + 1)
                        end += 1
                row += 1
                begin[row] = end
            most = max(most, end - base)
    return of_y, most
