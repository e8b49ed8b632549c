"""The loops of the compiled way. compiled.py says which arrays they get.

Features, crops and their gradients come as lines, (M, H, W*channels): M counts images, or planes of single channels,
and the channels of a pixel lie side by side. `y0` and `x0` are the image's pixel at which they begin. The loops go by
rows: the lines that a row of bins touches are summed first, from the first pixel to the last at once, and the bins
along x are taken out of the sum. So it is whole lines that are read and added, whatever the number of channels.

Offsets within a line are unsigned: Numba asks of each signed one whether it counts from the end.
"""

# mypy: ignore-errors
# ruff: noqa: E501

from __future__ import annotations

import numba
import numpy as np
from numba.extending import overload, register_jitable

from cupy_roialign import geometry

LANES = 8
"""Numbers that a processor multiplies at once. Fewer channels are worked on as single numbers."""

FAR = 4
"""Up to this many pixels for each that is touched a line is read whole: pixels side by side are read together."""

GROUP = 16
"""Channels whose gradients with respect to a box are summed together."""

u64 = np.uint64

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
    register_jitable(_function)


@overload(geometry.select)
def _select(condition, a, b):
    return lambda condition, a, b: a if condition else b


def type_of(number):
    """numpy.float32 or numpy.float64."""


@overload(type_of)
def _type_of(number):
    real = np.float32 if number == numba.float32 else np.float64
    return lambda number: real


loop = numba.njit(nogil=True, error_model="numpy")
"""Each operation is rounded as it is written: so results are the same whichever loop, and whichever processor."""

part = numba.njit(inline="always")
"""A part of each loop that calls it, compiled along with that: faster than on its own."""


@loop
def rows(rule, low, high, bins, size, begin, extent, pixel, value, to_start, to_step):
    """Fills `Rows` of boxes along one axis; returns the number of entries. Empty slopes are not asked for."""
    real, slopes = type_of(low[0]), len(to_start) > 0
    end = 0
    for k in range(len(low)):
        start, step, samples = geometry.affine(rule, low[k], high[k], bins, size, real)
        share = 1.0 / samples
        extent[0, k], extent[1, k] = size, 0
        for p in range(bins):
            row = end
            begin[k * bins + p] = row
            origin = geometry.origin(start, step, p, real)
            first, stop = np.int64(0), np.int64(samples)
            if samples > geometry.EVERY_SAMPLE:
                first, stop = geometry.candidates(start, step, samples, origin, size, real)
            for i in range(first, stop):
                position = geometry.position(rule, origin, step, samples, i, real)
                if not geometry.inside(rule, position, size):
                    continue
                under, over, fraction = geometry.taps(rule, position, size, real)
                slope = share if over > under else 0.0
                for tap in range(2):  # in the order in which the box goes, so that pixels are in order
                    at, weight, sign = under, (1.0 - np.float64(fraction)) * share, -1.0
                    if (tap == 1) != (step < 0):
                        at, weight, sign = over, np.float64(fraction) * share, 1.0
                    if weight == 0 and (slope == 0 or not slopes):
                        continue
                    # Positions go one way, so a pixel that was met before is one of the last two.
                    entry = end - 1
                    while entry >= row and entry >= end - 2 and pixel[entry] != at:
                        entry -= 1
                    if entry < row or entry < end - 2:
                        entry = end
                        end += 1
                        pixel[entry] = at
                        value[entry] = 0
                        if slopes:
                            to_start[entry] = to_step[entry] = 0
                    value[entry] += weight
                    if slopes:
                        to_start[entry] += sign * slope
                        to_step[entry] += sign * slope * geometry.lever(rule, p, samples, i)
            kept = row
            for entry in range(row, end):
                # The slopes of neighbours may have cancelled out.
                if value[entry] != 0 or (slopes and (to_start[entry] != 0 or to_step[entry] != 0)):
                    pixel[kept], value[kept] = pixel[entry], value[entry]
                    if slopes:
                        to_start[kept], to_step[kept] = to_start[entry], to_step[entry]
                    if pixel[kept] < extent[0, k]:
                        extent[0, k] = pixel[kept]
                    if pixel[kept] >= extent[1, k]:
                        extent[1, k] = pixel[kept] + 1
                    kept += 1
            end = kept
    begin[len(low) * bins] = end
    return end


# ---- one box along x, and its lines ----


@part
def place(begin, extent, pixel, k, bins, channels, slots):
    """The line that box `k` reads: its length in numbers, and whether it is all pixels from the first to the last.

    Where the pixels that the box touches are far apart, the line is only these, one for each entry. `slots`: the pixel
    of an entry within the line.
    """
    row, end, first = begin[k * bins], begin[(k + 1) * bins], extent[0, k]
    dense = extent[1, k] - first <= FAR * (end - row)
    for entry in range(row, end):
        slots[entry - row] = pixel[entry] - first if dense else entry - row
    return u64((extent[1, k] - first if dense else end - row) * channels if end > row else 0), dense


@part
def within(pixel, first, stop, top, bottom):
    """The entries of a bin, whose pixels are in order, from `top` on and above `bottom`."""
    while first < stop and not top <= pixel[first] < bottom:
        first += 1
    while first < stop and not top <= pixel[stop - 1] < bottom:
        stop -= 1
    return first, stop


@part
def set_level(lines, m, y, at, length, channels, known, stored, level):
    """Fills a line with the pixel there, where that is finite, or with the one that was stored before.

    Changes of weights sum to 0: so a level of the features changes nothing but what rounding leaves of a slope.
    """
    for c in range(u64(channels)):
        if not known:
            number = lines[m, y, at + c]
            stored[c] = number if number - number == 0 else 0
    for i in range(length):
        level[i] = stored[i % u64(channels)]


@part
def sum_lines(lines, m, y0, at, length, dense, channels, x0, pixel_x, row, level, pixel, value, first, stop, total):
    """The weighted sum of the lines that a bin touches, less their level. `row`: the box's first entry along x."""
    entry, size = first, u64(channels)
    for i in range(length):
        total[i] = 0
    while dense and entry + 1 < stop:  # by twos
        y, z, a, b = u64(pixel[entry] - y0), u64(pixel[entry + 1] - y0), value[entry], value[entry + 1]
        for i in range(length):
            total[i] += a * (lines[m, y, at + i] - level[i]) + b * (lines[m, z, at + i] - level[i])
        entry += 2
    while dense and entry < stop:
        y, a = u64(pixel[entry] - y0), value[entry]
        for i in range(length):
            total[i] += a * (lines[m, y, at + i] - level[i])
        entry += 1
    while entry < stop:
        y, a = u64(pixel[entry] - y0), value[entry]
        for e in range(length // size):
            of, to = u64((pixel_x[u64(row) + e] - x0) * channels), e * size
            for c in range(size):
                total[to + c] += a * (lines[m, y, of + c] - level[to + c])
        entry += 1


@part
def pair_up(begin, value, row, bins, channels, slots, length, pairs, weights):
    """The entries of a box along x, of few channels, by twos: number in the crop, and two numbers in the line.

    Where there is none, it is the number behind the line, which is 0. First come the first two of all bins, in the order
    of the crop; then what further ones there are. Returns how many.
    """
    base, count, first, more = begin[row], 0, 0, channels < LANES
    while more:
        more = False
        for q in range(bins):
            entry, end = begin[row + q] + first, begin[row + q + 1]
            if first > 0 and entry >= end:
                continue
            more = more or entry < end
            for c in range(channels):
                pairs[0, count], pairs[1, count], pairs[2, count] = q * channels + c, length, length
                weights[0, count] = weights[1, count] = 0
                if entry < end:
                    pairs[1, count], weights[0, count] = slots[entry - base] * channels + c, value[entry]
                if entry + 1 < end:
                    pairs[2, count], weights[1, count] = slots[entry + 1 - base] * channels + c, value[entry + 1]
                count += 1
        first += 2
    return u64(count)


@part
def take_bins(total, begin, value, row, bins, channels, slots, pairs, weights, count, crop):
    """Adds bins of a line to a row of them, in the same order for few and for many channels.

    `row`: the first of the bins, among those of all boxes.
    """
    size, base = u64(channels), begin[row]
    if channels < LANES:
        every = u64(bins * channels)
        for i in range(every):
            crop[i] += weights[0, i] * total[pairs[1, i]] + weights[1, i] * total[pairs[2, i]]
        for i in range(every, count):
            crop[pairs[0, i]] += weights[0, i] * total[pairs[1, i]] + weights[1, i] * total[pairs[2, i]]
    for q in range(bins if channels >= LANES else 0):
        out, entry, end = u64(q) * size, begin[row + q], begin[row + q + 1]
        while entry + 1 < end:
            a, b = u64(slots[entry - base]) * size, u64(slots[entry + 1 - base]) * size
            u, v = value[entry], value[entry + 1]
            for c in range(size):
                crop[out + c] += u * total[a + c] + v * total[b + c]
            entry += 2
        if entry < end:
            a, u = u64(slots[entry - base]) * size, value[entry]
            for c in range(size):
                crop[out + c] += u * total[a + c]


@part
def give_bins(crop, begin, value, row, bins, channels, slots, pairs, weights, count, line):
    """Adds a row of bins to a line."""
    size, base = u64(channels), begin[row]
    if channels < LANES:
        for i in range(count):
            grad = crop[pairs[0, i]]
            line[pairs[1, i]] += weights[0, i] * grad
            line[pairs[2, i]] += weights[1, i] * grad
    for q in range(bins if channels >= LANES else 0):
        out = u64(q) * size
        for entry in range(begin[row + q], begin[row + q + 1]):
            to, u = u64(slots[entry - base]) * size, value[entry]
            for c in range(size):
                line[to + c] += u * crop[out + c]


# ---- the three functions ----


@loop
def crops(
    lines, planes, channels, y0, x0, top, bottom, numbers, images, of_y, bins_y, of_x, bins_x, places, scratch,
    leveled, levels, again, out,
):  # fmt: skip
    """Crops of the boxes `numbers`, which lie in `images`, each of so many planes of so many channels.

    `again`: they are added to `out`, as those of other terms or other lines. `leveled`: 1, of features less the level
    of each box, which is left in `levels`; 2, less the one that is there.
    """
    begin_y, extent_y, pixel_y, value_y = of_y
    begin_x, extent_x, pixel_x, value_x = of_x
    slots, pairs = places[0], places[1:]
    width, total, level = u64(out.shape[2]), scratch[0], scratch[1]
    weights = scratch[2:4]
    for i in range(len(level)):
        level[i] = 0
    for j in range(len(numbers)):
        k = numbers[j]
        row, at = begin_x[k * bins_x], u64((extent_x[0, k] - x0) * channels)
        length, dense = place(begin_x, extent_x, pixel_x, k, bins_x, channels, slots)
        count = pair_up(begin_x, value_x, k * bins_x, bins_x, channels, slots, length, pairs, weights)
        total[length] = 0
        for plane in range(planes):
            m, v = u64(images[j] * planes + plane), j * planes + plane
            if leveled > 0 and length > 0 and extent_y[1, k] > 0:
                y = u64(0 if leveled == 2 else extent_y[0, k] - y0)
                set_level(lines, m, y, at, length, channels, leveled == 2, levels[v], level)
            for p in range(bins_y):
                crop = out[v, p]
                if not again:
                    for i in range(width):
                        crop[i] = 0
                first, stop = begin_y[k * bins_y + p], begin_y[k * bins_y + p + 1]
                first, stop = within(pixel_y, first, stop, top, bottom)
                if first == stop or length == 0:
                    continue
                sum_lines(
                    lines, m, y0, at, length, dense, channels, x0, pixel_x, row, level,
                    pixel_y, value_y, first, stop, total,
                )  # fmt: skip
                take_bins(total, begin_x, value_x, k * bins_x, bins_x, channels, slots, pairs, weights, count, crop)


@loop
def spread(
    lines, planes, channels, y0, x0, top, bottom, numbers, images, of_y, bins_y, of_x, bins_x, places, scratch, grads,
):  # fmt: skip
    """Adds the feature gradient of boxes to lines from `top` to `bottom`, box after box."""
    begin_y, _, pixel_y, value_y = of_y
    begin_x, extent_x, pixel_x, value_x = of_x
    slots, pairs, group, line, weights = places[0], places[1:], u64(channels), scratch[0], scratch[1:3]
    for j in range(len(numbers)):
        k = numbers[j]
        row, at = begin_x[k * bins_x], u64((extent_x[0, k] - x0) * channels)
        length, dense = place(begin_x, extent_x, pixel_x, k, bins_x, channels, slots)
        count = pair_up(begin_x, value_x, k * bins_x, bins_x, channels, slots, length, pairs, weights)
        for plane in range(planes):
            m, v = u64(images[j] * planes + plane), j * planes + plane
            for p in range(bins_y):
                first, stop = begin_y[k * bins_y + p], begin_y[k * bins_y + p + 1]
                first, stop = within(pixel_y, first, stop, top, bottom)
                if first == stop or length == 0:
                    continue
                for i in range(length):
                    line[i] = 0
                give_bins(
                    grads[v, p], begin_x, value_x, k * bins_x, bins_x, channels, slots, pairs, weights, count, line
                )
                for entry in range(first, stop):
                    y, weight = u64(pixel_y[entry] - y0), value_y[entry]
                    if dense:
                        for i in range(length):
                            lines[m, y, at + i] += weight * line[i]
                    else:
                        for e in range(length // group):
                            to, of = u64((pixel_x[u64(row) + e] - x0) * channels), e * group
                            for c in range(group):
                                lines[m, y, to + c] += weight * line[of + c]


@loop
def products(crops, grads, planes, channels, numbers, begin_y, bins_y, begin_x, bins_x, total, column, found):
    """Adds the products of crops and gradients of each box; what a bin without a sample has does not count.

    They are summed for each channel first, then over channels by groups of GROUP: so the sum is the same whether channels
    come one by one or together.
    """
    size = u64(channels)
    for j in range(len(numbers)):
        group = 0.0
        for plane in range(planes):
            v = j * planes + plane
            for c in range(size):
                total[c] = 0
            for p in range(numbers[j] * bins_y, (numbers[j] + 1) * bins_y):
                row = p - numbers[j] * bins_y
                if begin_y[p] == begin_y[p + 1]:
                    continue
                for c in range(size if channels < LANES else u64(0)):
                    number = total[c]
                    for q in range(bins_x):
                        if begin_x[numbers[j] * bins_x + q] < begin_x[numbers[j] * bins_x + q + 1]:
                            number += grads[v, row, u64(q) * size + c] * crops[v, row, u64(q) * size + c]
                    total[c] = number
                for q in range(0 if channels < LANES else bins_x):
                    if begin_x[numbers[j] * bins_x + q] < begin_x[numbers[j] * bins_x + q + 1]:
                        for c in range(size):
                            total[c] += grads[v, row, u64(q) * size + c] * crops[v, row, u64(q) * size + c]
            for c in range(channels):
                group += total[c]
                if (plane + c) % GROUP == GROUP - 1 or plane + c == planes * channels - 1:
                    found[j, column] += group
                    group = 0.0
