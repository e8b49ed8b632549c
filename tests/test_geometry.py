"""Positions to the bit: the order of operations decides on which side of an edge a sample falls."""

import numpy as np
import pytest

from cupy_roialign import arrays, geometry
from cupy_roialign.geometry import Dialect, Part, Rule
from tests import oracle

SIZE, BINS = 60, 5
X1_Y1_X2_Y2 = (1, 0, 3, 2)


def integer_edges(real):
    """Whole pixels, which a scale that is no power of two rounds."""
    rng = np.random.default_rng(0)
    low = rng.integers(0, 200, 300)
    return low.astype(real), (low + rng.integers(1, 200, 300)).astype(real)


def along_x(rule, low, high):
    boxes = np.stack([low, 0 * low, high, 0 * low + 9], axis=1)
    return geometry.inside_samples(rule, geometry.resolve(rule, boxes, (9, SIZE)).along(1), Part((range(BINS),)))


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 3])
@pytest.mark.parametrize("scale", [0.1, 0.3, 1 / 3])
def test_roi_align(scale, sampling_ratio, aligned, real):
    low, high = integer_edges(real)
    rule = Rule(Dialect.ROI_ALIGN, (BINS, BINS), X1_Y1_X2_Y2, scale, sampling_ratio, aligned)
    found = along_x(rule, low, high)
    taps = zip(found.line * BINS + found.bin, found.number, found.low, found.fraction, strict=True)
    actual = {(int(row), int(number)): (int(pixel), float(fraction)) for row, number, pixel, fraction in taps}
    expected = {}
    for k in range(len(low)):
        table = oracle.positions("roi_align", low[k], high[k], SIZE, BINS, real, sampling_ratio, scale, aligned)
        for p, samples in enumerate(table):
            for i, (position, _, _) in enumerate(samples):
                if -1 <= position <= SIZE:
                    clamped = real(min(max(position, 0), SIZE - 1))
                    expected[k * BINS + p, i] = (int(clamped), float(clamped - real(int(clamped))))
    assert actual == expected


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("op", ["crop_and_resize", "roi_crop_centers", "roi_crop_corners"])
def test_crops(op, real):
    low, high = integer_edges(real)
    if op == "crop_and_resize":
        low, high = low / real(150), high / real(150)
    rule = Rule(Dialect[op.upper()], (BINS, BINS), X1_Y1_X2_Y2)
    found = along_x(rule, low, high)
    actual = dict(
        zip((found.line * BINS + found.bin).tolist(), (found.low.astype(real) + found.fraction).tolist(), strict=True)
    )
    expected = {}
    for k in range(len(low)):
        for p, ((position, _, _),) in enumerate(oracle.positions(op, low[k], high[k], SIZE, BINS, real)):
            if 0 <= position <= SIZE - 1:
                base = real(min(int(position), SIZE - 2) if op != "crop_and_resize" else int(position))
                expected[k * BINS + p] = float(base + (position - base))
    assert actual == expected


def test_nearest_rounds_the_position_itself():
    """0.49999997 + 0.5 is 1 in float32."""
    rule = Rule(Dialect.CROP_AND_RESIZE, (1, 1), (0, 1, 2, 3), nearest=True)
    below = np.nextafter(np.float32(0.5), np.float32(0))
    for position, pixel in ((below, 0), (np.float32(0.5), 1), (np.float32(1.5), 2), (np.float32(2.5), 3)):
        low, high, fraction = geometry._taps(rule, np.array([position]), np.array([9]))
        assert (low.item(), high.item(), fraction.item()) == (pixel, pixel, 0)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 3, 4, 5), (60, 20, 5, 1), False),
        ((2, 3, 4, 5), (60, 1, 15, 3), True),
        ((2, 3, 4, 5), (60, -1, 15, 3), True),
        ((2, 3, 4, 5), (60, 1, -15, -3), True),
        ((2, 3, 4, 5), (20, 0, 5, 1), False),  # one plane shown three times
        ((2, 1, 4, 5), (20, 1, 5, 1), False),  # one channel is both
        ((2, 3, 1, 1), (3, 1, 1, 1), False),  # and so is one pixel
        ((2, 3, 4, 1), (12, 1, 3, 1), True),  # the stride of an axis of one says nothing
        ((2, 3, 1, 5), (15, 1, 1, 3), True),
    ],
)
def test_channels_last(shape, strides, expected):
    assert arrays.is_channels_last(shape, strides) is expected
