"""Box rules: from a box to sample positions, and their derivatives. The one Python text of every dialect's arithmetic.

An axis-aligned RoI operator treats each axis alone. On one axis a box becomes a run of sample positions,
in units of pixels, pixel 0 having its center at 0:

    position(p, i) = start + p*step + (i + offset)*step/samples        p = 0..bins-1, i = 0..samples-1

The samples of a bin are averaged. A border rule says what a position outside of the image means, and a taps rule
which pixels a position inside it reads.

The functions serve arrays, of many boxes, and numbers: NumPy runs them as they are (cpu/weights.py), Numba compiles
them for numbers (cpu/compiled_rows.py). So they take `real`, the type of positions (numpy.float32 or numpy.float64),
and make each constant of that type; they choose by `select`, and by `if` only where the rule alone decides.
cuda/geometry.cuh is their twin.

Every operation is done in one precision (see `precision`), in the order in which the peers do it, and without fused
multiply-add: a sample that sits exactly on an edge must fall on the same side everywhere. Broken and huge boxes make
NumPy warn of what it does with them, which is for the caller to silence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_roialign.rule import Border, Frame, Rule, Taps

EVERY_SAMPLE = 16
"""With up to this many samples per bin all are tried; with more, first the range that can lie inside is computed."""

# An array or a number. (Numba compiles for numbers only.)
Real = Any

# Plain ints, which Numba compares fastest.
_NORMALIZED, _CENTERS, _SCALED = int(Frame.NORMALIZED), int(Frame.CENTERS), int(Frame.SCALED)
_CLAMP, _NEAREST, _LINEAR_CEIL = int(Border.CLAMP), int(Taps.NEAREST), int(Taps.LINEAR_CEIL)


def select(condition: Any, a: Any, b: Any) -> Any:
    """`a` where the condition holds, else `b`. The compiled way has its own, for numbers."""
    return np.where(condition, a, b)


def is_finite(value: Real) -> Any:
    return value - value == 0


def extent(rule: Rule, low: Real, high: Real, real: Any) -> tuple[Real, Real]:
    """Where a SCALED box begins, and how far it reaches before it is widened."""
    scale, offset = real(rule.spatial_scale), real(0.5) if rule.aligned else real(0)
    start = low * scale - offset
    return start, (high * scale - offset) - start


def affine(rule: Rule, low: Real, high: Real, bins: int, size: int, real: Any) -> tuple[Real, Real, Any]:
    """`start`, `step` and `samples` (int64; one number where all boxes have as many) from `low` to `high`.

    They lie along an axis of `size` pixels. `start` and `step` are affine in a box's edges, piece by piece. Boxes with
    a non-finite coordinate are for the caller to leave out.
    """
    n = real(bins)
    if rule.frame == _SCALED:
        start, length = extent(rule, low, high, real)
        if not rule.aligned:
            length = np.maximum(length, real(1))
        step = length / n
        if rule.sampling_ratio > 0:
            return start, step, np.int64(rule.sampling_ratio)
        # More pixels per bin than numbers i + 0.5 are exact are sampled more thinly, still evenly: so the
        # cost of a box as wide as floats go stays that of the image.
        most = real(2.0**23) if real(1) + real(2.0**-30) == real(1) else real(2.0**52)
        wanted = np.minimum(np.ceil(step), most)
        return start, step, np.int64(select(wanted > real(0), wanted, real(0)))
    last = real(size - 1)
    if rule.frame != _NORMALIZED:
        # In an image of one pixel the peer divides 0 by 0. Pixels stay pixels there instead.
        last = np.maximum(last, real(1))
        if rule.frame == _CENTERS:
            spacing = (high - low) / n
            low = (low + spacing / real(2) - real(0.5)) / last
            high = low + spacing * (n - real(1)) / last
        else:
            low, high = low / last, high / last
    if bins > 1:
        start, step = low * last, ((high - low) * last) / (n - real(1))
    else:
        start, step = (real(0.5) * (low + high)) * last, (low - low) * real(0)
    return start, step, np.int64(1)


def edge_slopes(rule: Rule, low: Real, high: Real, bins: int, size: int, real: Any) -> tuple[Real, Real, Real]:
    """D start / d low, d start / d high, and d step / d high, of which d step / d low is the negative; in float64."""
    if rule.frame == _SCALED:
        scale = np.float64(real(rule.spatial_scale))
        if rule.aligned:
            return scale, 0.0, scale / bins
        return scale, 0.0, select(extent(rule, low, high, real)[1] >= real(1), scale / bins, 0.0)
    if rule.frame == _CENTERS:
        return 1.0 - 0.5 / bins, 0.5 / bins, 1.0 / bins
    unit = 1.0  # pixels in a unit of the box's coordinates
    if rule.frame == _NORMALIZED:
        unit = size - 1.0
    if bins > 1:
        return unit, 0.0, unit / (bins - 1)
    return 0.5 * unit, 0.5 * unit, 0.0


def origin(start: Real, step: Real, p: Any, real: Any) -> Real:
    """Where bin `p` begins."""
    return start + real(p) * step


def position(rule: Rule, origin: Real, step: Real, samples: Any, i: Any, real: Any) -> Real:
    """Where sample `i` lies in a bin that begins at `origin`."""
    offset = real(0.5) if rule.frame == _SCALED else real(0)
    return origin + ((real(i) + offset) * step) / real(samples)


def lever(rule: Rule, p: Any, samples: Any, i: Any) -> Any:
    """D position / d step, in float64."""
    offset = 0.5 if rule.frame == _SCALED else 0.0
    return p + (i + offset) / samples


def inside(rule: Rule, position: Real, size: int) -> Any:
    """Whether a sample counts. (In float64, because float32 may round an edge up.)"""
    exact = np.float64(position)
    if rule.border == _CLAMP:
        return (exact >= -1.0) & (exact <= np.float64(size))
    return (exact >= 0.0) & (exact <= np.float64(size - 1))


def taps(rule: Rule, position: Real, size: int, real: Any) -> tuple[Any, Any, Real]:
    """The two pixels that a position inside lies between, low and high, and the weight of the second.

    The difference of the two is the slope with respect to the position, so at a pixel's center, where interpolation
    has a kink, the choice of taps chooses the slope. LINEAR_CEIL takes floor and ceil, which are one pixel there:
    slope 0. LINEAR takes the next pixel with weight 0: the slope toward larger positions; at the last pixel, which has
    no next one, toward smaller. Where positions are clamped the slope is 0.
    """
    last = size - 1
    inner = np.int64(position >= real(0))
    position = np.minimum(np.maximum(position, real(0)), real(last))
    low = np.minimum(np.int64(position), last)  # real(last) may have been rounded up
    if rule.taps == _NEAREST:
        # not floor(position + 0.5): that sum is rounded, and 0.49999997 would go up
        low = np.minimum(low + np.int64(position - real(low) >= real(0.5)), last)
        return low, low, position - position
    if rule.border == _CLAMP:
        high = np.minimum(low + inner, last)
    elif rule.taps == _LINEAR_CEIL:
        high = np.minimum(np.int64(np.ceil(position)), last)
    else:
        low = np.minimum(low, np.maximum(last - 1, 0))
        high = np.minimum(low + 1, last)
    return low, high, position - real(low)


def candidates(start: Real, step: Real, samples: Any, origin: Real, size: int, real: Any) -> tuple[Any, Any]:
    """A range [first, stop) of sample numbers of a bin, outside of which no sample lies inside the image."""
    begin, length, count = np.float64(origin), np.float64(step), np.float64(samples)
    pitch = length / count
    # Positions are rounded, at each of a few operations, relative to the largest number that takes part.
    rounding = 2.0**-20 if real(1) + real(2.0**-30) == real(1) else 2.0**-49
    slack = rounding * abs(np.float64(start)) + rounding * abs(begin) + rounding * abs(length)
    a = ((-1.0 - slack) - begin) / pitch - 0.5
    b = ((np.float64(size) + slack) - begin) / pitch - 0.5
    first = np.minimum(np.maximum(np.floor(np.minimum(a, b)), 0.0), count)
    stop = np.minimum(np.maximum(np.ceil(np.maximum(a, b)) + 1.0, first), count)
    every = (pitch == 0) | (count <= np.float64(EVERY_SAMPLE))
    first, stop = select(every, 0.0, first), select(every, count, stop)
    none = (count <= 0) | ~(is_finite(begin) & is_finite(length))  # no position is a number
    return np.int64(select(none, 0.0, first)), np.int64(select(none, 0.0, stop))


def precision(frame: int, features: str, boxes: str) -> str:
    """The dtype of positions, for features and boxes of the dtypes of these names.

    That of the wider of the two; TensorFlow takes float32 boxes with float64 images, and computes in float32.
    """
    decisive = (boxes,) if frame == Frame.NORMALIZED else (boxes, features)
    return "float64" if "float64" in decisive else "float32"
