"""Boxes that are hard on the arithmetic of positions, and the numbers that all implementations must give."""

import itertools

import numpy as np

from cupy_roialign import geometry, rule
from cupy_roialign.rule import X1_Y1_X2_Y2, Border, Frame, Rule, Taps

OPERATORS = [
    rule.crop_and_resize((7, 5)),
    rule.crop_and_resize((1, 1)),
    rule.crop_and_resize((7, 5), nearest=True),
    rule.roi_crop((7, 5)),
    rule.roi_crop((7, 1), centers=False),
    rule.roi_align((7, 5), 0.3, 2, True),
    rule.roi_align((7, 5), 1 / 16, 3, False),
    rule.roi_align((7, 5), 0.7, 0, True),
    rule.roi_align((7, 5), 1.0, 0, False),
    rule.roi_align((7, 5), 0.5, 90, False),
]
"""Rules of operators."""

COMBINATIONS = [
    Rule(frame, taps, border, (3, 4), X1_Y1_X2_Y2, 0.9, 2 if frame == Frame.SCALED else 1)
    for frame, taps, border in itertools.product(Frame, Taps, Border)
]
"""A rule of every frame, taps and border, most of which no operator has."""

RULES = OPERATORS + COMBINATIONS

COLUMNS = ("start", "step", "samples", "first", "stop", "position", "inside", "low", "high", "fraction")
SLOPES = ("start by low", "start by high", "step by high")
"""What `expected_positions` gives for each box and axis: these, in this order."""


def adversarial_boxes(rule, count, real, size):
    """Ordinary, on pixels and on edges, a unit in the last place beside them, subnormal, huge, of any bits at all."""
    rng = np.random.default_rng(17)
    unit = np.array([size[0] - 1, size[1] - 1] * 2) if rule.frame == Frame.NORMALIZED else np.ones(4)
    unit = np.maximum(unit, 1) * rule.spatial_scale
    ordinary = rng.uniform(-5, max(size) + 5, (count, 4))
    halves = rng.integers(-8, 2 * max(size) + 8, (count, 4)) / 2
    boxes = np.where(rng.random((count, 4)) < 0.5, ordinary, halves) / unit
    boxes = boxes.astype(real)
    beside = rng.random((count, 4)) < 0.1
    boxes[beside] = np.nextafter(boxes[beside], rng.choice([-np.inf, np.inf], beside.sum()).astype(real))
    tiny = rng.random((count, 4)) < 0.03
    boxes[tiny] = (
        rng.choice([-1, 1], tiny.sum()) * np.finfo(real).smallest_subnormal * rng.integers(0, 5, tiny.sum())
    ).astype(real)
    bits = rng.integers(0, 2**32 if real == np.float32 else 2**63, (count, 4), dtype=np.uint64)
    raw = bits.astype(np.uint32).view(np.float32) if real == np.float32 else bits.view(np.float64)
    wild = rng.random(count) < 0.1
    boxes[wild] = raw[wild]
    return boxes


def expected_positions(rule, boxes, size):
    """(K, 2, 13) numbers of geometry.py for (K, 4) boxes, along y and x: COLUMNS and SLOPES.

    Of box k those of one sample, in bin k % bins the one of number k % samples. Zero: position and what follows from it
    where there are no samples, taps where the position is not inside, and candidates where all samples are tried. Rows
    of boxes with a non-finite coordinate mean nothing.
    """
    real = boxes.dtype.type
    k = np.arange(len(boxes))
    expected = np.zeros((len(boxes), 2, len(COLUMNS) + len(SLOPES)), real)
    with np.errstate(all="ignore"):
        for axis in range(2):
            low, high = boxes[:, rule.columns[axis]], boxes[:, rule.columns[axis + 2]]
            bins = rule.bins[axis]
            start, step, samples = geometry.affine(rule, low, high, bins, size[axis], real)
            samples = np.broadcast_to(samples, k.shape)
            any_sample, some = samples > 0, np.maximum(samples, 1)
            origin = geometry.origin(start, step, k % bins, real)
            position = geometry.position(rule, origin, step, some, k % some, real)
            inside = geometry.inside(rule, position, size[axis]) & any_sample
            many = samples > geometry.EVERY_SAMPLE
            first, stop = geometry.candidates(start, step, samples, origin, size[axis], real)
            columns = [start, step, samples, first * many, stop * many, np.where(any_sample, position, 0), inside]
            for column, values in enumerate(columns):
                expected[:, axis, column] = values
            for column, values in enumerate(geometry.taps(rule, position[inside], size[axis], real), start=7):
                expected[inside, axis, column] = values
            for column, values in enumerate(geometry.edge_slopes(rule, low, high, bins, size[axis], real), start=10):
                expected[:, axis, column] = values
    return expected
