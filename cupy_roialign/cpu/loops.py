"""The loops of the compiled way. compiled.py says which arrays they get.

Features, crops and their gradients are flat: planes of height x width pixels, each of some channels side by side. The
loops go by lines: those that a row of bins touches are summed first, from the first pixel to the last at once, and the
bins along x are taken out of the sum. So it is whole lines that are read and added, whatever the number of channels.

Offsets are unsigned: Numba asks of each signed one whether it counts from the end.
"""

# mypy: ignore-errors

from __future__ import annotations

import numpy as np

from cupy_roialign.cpu.compiled_rows import part, rows

LANES = 8
"""Numbers that a processor multiplies at once. Of fewer channels bins are taken number by number: see `pair_up`."""

GROUP = 16
"""Channels that are summed together, and brought over together: a cache line of float32."""

FAR = 4
"""Up to this many pixels for each that is touched a line is read whole: pixels side by side are read together."""

u64 = np.uint64


# ---- what a box reads ----


@part
def set_line(begin, extent, pixel, k, row, bins, channels, x0, slots, starts):
    """The line of box `k`: how many pieces of `lines` it has, and the length of one.

    `starts`: where pieces begin. `slots`: where in the line the pixels of the entries are.

    The line is one piece, from the first pixel to the last, or, where those that the box touches are far apart, one for
    each entry.
    """
    base, stop, first = begin[row], begin[row + bins], extent[1, 0, k]
    length = max(extent[1, 1, k] - first, 0)
    whole = length <= FAR * (stop - base)
    for entry in range(base, stop):
        slots[entry - base] = (pixel[entry] - first if whole else entry - base) * channels
        starts[entry - base] = (pixel[entry] - x0) * channels
    if whole:
        starts[0] = (first - x0) * channels
        return u64(1), u64(length * channels)
    return u64(stop - base), u64(channels)


@part
def set_bins(begin, value, row, bins, slots, ends, places, weights):
    """The entries along x that have a weight: those of bin q end before ends[q + 1]."""
    n = ends[0] = 0
    for q in range(bins):
        for entry in range(begin[row + q], begin[row + q + 1]):
            if value[entry] != 0:  # 0 times a pixel that is NaN is NaN
                places[n], weights[n] = slots[entry - begin[row]], value[entry]
                n += 1
        ends[q + 1] = n


@part
def pair_up(bins, channels, length, ends, places, weights, pairs, factors):
    """The entries along x of few channels by twos: number in the row of the crop, and two numbers in the line.

    Where there is none, it is the number behind the line, which is 0. First come the first two of all bins, in the
    order of the crop; then what further ones there are. Returns how many.
    """
    count, first, more = 0, 0, True
    while more:
        more = False
        for q in range(bins):
            entry, end = ends[q] + first, ends[q + 1]
            if first > 0 and entry >= end:
                continue
            more = more or entry + 2 < end
            for c in range(channels):
                pairs[0, count], pairs[1, count], pairs[2, count] = q * channels + c, length, length
                factors[0, count] = factors[1, count] = 0
                if entry < end:
                    pairs[1, count], factors[0, count] = places[entry] + c, weights[entry]
                if entry + 1 < end:
                    pairs[2, count], factors[1, count] = places[entry + 1] + c, weights[entry + 1]
                count += 1
        first += 2
    return u64(count)


@part
def set_lines(begin, pixel, value, row, top, bottom, y0, width, offsets, weights):
    """Where the lines from `top` to `bottom` begin that a bin along y reads, and their weights. Returns how many."""
    n = 0
    for entry in range(begin[row], begin[row + 1]):
        if value[entry] != 0 and top <= pixel[entry] < bottom:
            offsets[n], weights[n] = (pixel[entry] - y0) * width, value[entry]
            n += 1
    return n


@part
def sum_lines(lines, at, n, offsets, weights, starts, pieces, piece, total):
    """The weighted sum of `n` lines, at least one."""
    odd = n % 2
    for s in range(pieces):
        of, to, y, a = at + starts[s], s * piece, offsets[0], weights[0]
        for i in range(piece if odd == 1 else u64(0)):
            total[to + i] = a * lines[of + y + i]
        z, b = offsets[1], weights[1]
        for i in range(u64(0) if odd == 1 else piece):
            total[to + i] = a * lines[of + y + i] + b * lines[of + z + i]
        for e in range(2 - odd, n, 2):
            y, z, a, b = offsets[e], offsets[e + 1], weights[e], weights[e + 1]
            for i in range(piece):
                total[to + i] += a * lines[of + y + i] + b * lines[of + z + i]


@part
def take_bins(total, bins, channels, ends, places, weights, crop, at):
    """Adds the bins of a line to a row of a crop."""
    size = u64(channels)
    for q in range(bins):
        out, entry, end = at + u64(q) * size, ends[q], ends[q + 1]
        while entry + 1 < end:
            a, b, v, w = u64(places[entry]), u64(places[entry + 1]), weights[entry], weights[entry + 1]
            for c in range(size):
                crop[out + c] += v * total[a + c] + w * total[b + c]
            entry += 2
        if entry < end:
            a, v = u64(places[entry]), weights[entry]
            for c in range(size):
                crop[out + c] += v * total[a + c]


@part
def take_pairs(total, size, count, pairs, factors, crop, at):
    """The same of few channels, in the same order."""
    for i in range(size):
        crop[at + i] += factors[0, i] * total[pairs[1, i]] + factors[1, i] * total[pairs[2, i]]
    for i in range(size, count):
        crop[at + pairs[0, i]] += factors[0, i] * total[pairs[1, i]] + factors[1, i] * total[pairs[2, i]]


@part
def give_bins(grads, at, bins, channels, ends, places, weights, line):
    """Adds a row of bins to a line."""
    size = u64(channels)
    for q in range(bins):
        of = at + u64(q) * size
        for entry in range(ends[q], ends[q + 1]):
            to, a = u64(places[entry]), weights[entry]
            for c in range(size):
                line[to + c] += a * grads[of + c]


@part
def give_pairs(grads, at, count, pairs, factors, line):
    for i in range(count):
        grad = grads[at + pairs[0, i]]
        line[pairs[1, i]] += factors[0, i] * grad
        line[pairs[2, i]] += factors[1, i] * grad


@part
def add_lines(lines, at, n, offsets, weights, starts, pieces, piece, line):
    """Adds a line to the `n` that a bin touches."""
    for e in range(n):
        a = weights[e]
        for s in range(pieces):
            to, of = at + offsets[e] + starts[s], s * piece
            for i in range(piece):
                lines[to + i] += a * line[of + i]


@part
def add_line(lines, at, starts, pieces, piece, level, a, b, c, total):
    """Adds a line less its level to three sums; 0 times a number that is NaN is left out."""
    for s in range(pieces):
        of, to = at + starts[s], s * piece
        if a != 0 and b != 0 and c != 0:
            for i in range(piece):
                number = lines[of + i] - level[to + i]
                total[0, to + i] += a * number
                total[1, to + i] += b * number
                total[2, to + i] += c * number
            continue
        for v in range(3):
            weight = a if v == 0 else b if v == 1 else c
            for i in range(piece if weight != 0 else u64(0)):
                total[v, to + i] += weight * (lines[of + i] - level[to + i])


@part
def dot_bins(total, bins, channels, ends, places, weights, grad, products):
    """Adds bins of a line times their gradients to products."""
    size = u64(channels)
    for q in range(bins):
        out, entry, end = u64(q) * size, ends[q], ends[q + 1]
        for c in range(size if entry == end else u64(0)):
            products[out + c] += np.float64(grad[out + c] * 0)  # a gradient that is NaN stays one
        while entry < end:
            a, v = u64(places[entry]), weights[entry]
            if entry + 1 < end:
                b, w = u64(places[entry + 1]), weights[entry + 1]
                for c in range(size):
                    products[out + c] += np.float64(grad[out + c] * (v * total[a + c] + w * total[b + c]))
            else:
                for c in range(size):
                    products[out + c] += np.float64(grad[out + c] * (v * total[a + c]))
            entry += 2


@part
def dot_pairs(total, size, count, pairs, factors, grad, products):
    """The same of few channels, in the same order."""
    for i in range(count):
        out = u64(i) if i < size else u64(pairs[0, i])
        number = factors[0, i] * total[pairs[1, i]] + factors[1, i] * total[pairs[2, i]]
        products[out] += np.float64(grad[out] * number)


# ---- the three functions ----
#
# `lines` and `where`: see compiled._Lines. `numbers`: the boxes to work on, of those that the rows `begin`, `extent`
# and `pixel` are about; `images` has the image of each of these. `value_y`, `value_x`: values of the entries.
# `indices`, `offsets`, `scratch`: memory for what is held of a box. `few`: True where there are less than LANES
# channels, otherwise None; Numba compiles each of the two by itself.


def crops(
    lines, where, numbers, images, begin, extent, pixel, value_y, value_x, bins, indices, offsets, scratch, few, again,
    out,
):  # fmt: skip
    """Crops of boxes. `again`: they are added to `out`."""
    planes, channels, height, width, y0, x0, top, bottom = where
    slots, ends, places, pairs, starts, of = indices[0], indices[1], indices[2], indices[3:], offsets[0], offsets[1]
    weights_y, total, weights, factors = scratch[0], scratch[1], scratch[2], scratch[3:]
    size, first_x = u64(bins[1] * channels), extent.shape[2] * bins[0]
    for j in range(len(numbers)):
        k = numbers[j]
        row = first_x + k * bins[1]
        pieces, piece = set_line(begin, extent, pixel, k, row, bins[1], channels, x0, slots, starts)
        set_bins(begin, value_x, row, bins[1], slots, ends, places, weights)
        if few is not None:
            count = pair_up(bins[1], channels, pieces * piece, ends, places, weights, pairs, factors)
            total[pieces * piece] = 0
        for plane in range(planes):
            at = u64((images[k] * planes + plane) * height * width)
            for p in range(bins[0]):
                to = u64((j * planes + plane) * bins[0] + p) * size
                for i in range(u64(0) if again else size):
                    out[to + i] = 0
                n = set_lines(begin, pixel, value_y, k * bins[0] + p, top, bottom, y0, width, of, weights_y)
                if n == 0 or ends[bins[1]] == 0:
                    continue
                sum_lines(lines, at, n, of, weights_y, starts, pieces, piece, total)
                if few is not None:
                    take_pairs(total, size, count, pairs, factors, out, to)
                else:
                    take_bins(total, bins[1], channels, ends, places, weights, out, to)


def forward(
    rule, boxes, columns, sizes, bins, images, begin, extent, pixel, values, sums, lines, where, numbers, indices,
    offsets, scratch, few, out,
):  # fmt: skip
    """Crops of boxes, one after another, each with rows of its own. For features that lie in `lines` as a whole."""
    size = where[0] * where[1] * bins[0] * bins[1]
    for k in range(len(boxes)):
        rows(rule, boxes[k : k + 1], columns, sizes, bins, begin, extent, pixel, values, sums)
        of = numbers, images[k : k + 1], begin, extent, pixel, values[0], values[0], bins, indices, offsets, scratch
        crops(lines, where, *of, few, False, out[k * size : (k + 1) * size])


def spread(
    lines, where, numbers, images, begin, extent, pixel, value_y, value_x, bins, indices, offsets, scratch, few, grads
):
    """Adds the feature gradient of boxes to lines from `top` to `bottom`, box after box."""
    planes, channels, height, width, y0, x0, top, bottom = where
    slots, ends, places, pairs, starts, of = indices[0], indices[1], indices[2], indices[3:], offsets[0], offsets[1]
    weights_y, line, weights, factors = scratch[0], scratch[1], scratch[2], scratch[3:]
    size, first_x = u64(bins[1] * channels), extent.shape[2] * bins[0]
    for j in range(len(numbers)):
        k = numbers[j]
        row = first_x + k * bins[1]
        pieces, piece = set_line(begin, extent, pixel, k, row, bins[1], channels, x0, slots, starts)
        set_bins(begin, value_x, row, bins[1], slots, ends, places, weights)
        if few is not None:
            count = pair_up(bins[1], channels, pieces * piece, ends, places, weights, pairs, factors)
        for plane in range(planes):
            at = u64((images[k] * planes + plane) * height * width)
            for p in range(bins[0]):
                n = set_lines(begin, pixel, value_y, k * bins[0] + p, top, bottom, y0, width, of, weights_y)
                if n == 0 or ends[bins[1]] == 0:
                    continue
                for i in range(pieces * piece):
                    line[i] = 0
                grad = u64((j * planes + plane) * bins[0] + p) * size
                if few is not None:
                    give_pairs(grads, grad, count, pairs, factors, line)
                else:
                    give_bins(grads, grad, bins[1], channels, ends, places, weights, line)
                add_lines(lines, at, n, of, weights_y, starts, pieces, piece, line)


def slopes(
    lines, where, numbers, images, begin, extent, pixel, value_y, value_x, bins, indices, offsets, scratch, few,
    values, levels, grads, sums, found,
):  # fmt: skip
    """Adds the gradients of boxes with respect to start and step along y, and along x, to `found`, (K, 4).

    Each is the sum over crops by weights that follow the box so, times the gradient of each crop. Changes of weights
    sum to 0: so a level of the features changes nothing but what rounding leaves of a slope, and is taken off.
    """
    planes, channels, height, width, y0, x0, top, bottom = where
    slots, ends, places, starts = indices[0], indices[1:4], indices[4:7], offsets[0]
    level, grad, total, weights = scratch[0], scratch[1], scratch[2:5], scratch[5:8]
    every, first_x = u64(bins[1] * channels), extent.shape[2] * bins[0]
    products, group = sums[:4], sums[4]
    group[:4] = 0
    for j in range(len(numbers)):
        k = numbers[j]
        row = first_x + k * bins[1]
        if begin[row] == begin[row + bins[1]]:
            continue
        pieces, piece = set_line(begin, extent, pixel, k, row, bins[1], channels, x0, slots, starts)
        length = pieces * piece
        for v in range(3):
            set_bins(begin, value_x if v == 0 else values[v], row, bins[1], slots, ends[v], places[v], weights[v])
            if few is not None:
                pairs, factors = indices[7 + 3 * v :], scratch[8 + 2 * v :]
                offsets[1, v] = pair_up(bins[1], channels, length, ends[v], places[v], weights[v], pairs, factors)
                total[v, length] = 0
        for plane in range(planes):
            at = u64((images[k] * planes + plane) * height * width)
            products[:] = 0
            for s in range(length // u64(channels)):
                for c in range(u64(channels)):
                    level[s * u64(channels) + c] = levels[j, u64(plane) + c]
            for p in range(bins[0]):
                first, stop = begin[k * bins[0] + p], begin[k * bins[0] + p + 1]
                if first == stop:
                    continue
                for v in range(3):
                    for i in range(length):
                        total[v, i] = 0
                for entry in range(first, stop):
                    if top <= pixel[entry] < bottom:
                        of = at + u64((pixel[entry] - y0) * width)
                        of_slopes = values[1, entry], values[2, entry]
                        add_line(lines, of, starts, pieces, piece, level, value_y[entry], *of_slopes, total)
                of = u64((j * planes + plane) * bins[0] + p) * every
                for q in range(bins[1]):
                    sampled = begin[row + q] < begin[row + q + 1]  # what another bin has does not count
                    for c in range(u64(q * channels), u64((q + 1) * channels)):
                        grad[c] = grads[of + c] if sampled else 0
                for column in range(4):
                    y, x = (column + 1, 0) if column < 2 else (0, column - 1)
                    if few is not None:
                        pairs, factors = indices[7 + 3 * x :], scratch[8 + 2 * x :]
                        dot_pairs(total[y], every, offsets[1, x], pairs, factors, grad, products[column])
                    else:
                        dot_bins(total[y], bins[1], channels, ends[x], places[x], weights[x], grad, products[column])
            # By channels, and groups of these: so it is the same sum whether they come one by one or together.
            for c in range(channels):
                for column in range(4):
                    for q in range(bins[1]):
                        group[column] += products[column, q * channels + c]
                    if (plane + c) % GROUP == GROUP - 1 or plane + c == planes * channels - 1:
                        found[k, column] += group[column]
                        group[column] = 0
