"""Positions to the bit: the order of operations decides on which side of an edge a sample falls."""

import numpy as np
import pytest

from cupy_roialign import arrays, geometry, rule
from tests import oracle

SIZE, BINS = 60, 5


def integer_edges(real):
    """Whole pixels, which a scale that is no power of two rounds."""
    rng = np.random.default_rng(0)
    low = rng.integers(0, 200, 300)
    return low.astype(real), (low + rng.integers(1, 200, 300)).astype(real)


def samples_inside(case, low, high):
    """{(box, bin, number of a sample): (pixel, fraction)}, of all samples inside of an axis."""
    real = low.dtype.type
    start, step, samples = geometry.affine(case, low, high, BINS, SIZE, real)
    samples = np.broadcast_to(samples, low.shape)
    numbers = np.arange(samples.max())
    k, p, i = (
        a.ravel() for a in np.broadcast_arrays(*np.ix_(np.arange(len(low)), np.arange(BINS), numbers.astype(np.int64)))
    )
    there = i < samples[k]
    k, p, i = k[there], p[there], i[there]
    origin = geometry.origin(start[k], step[k], p, real)
    position = geometry.position(case, origin, step[k], samples[k], i, real)
    inside = geometry.inside(case, position, SIZE)
    pixel, _, fraction = geometry.taps(case, position[inside], SIZE, real)
    at = zip(k[inside].tolist(), p[inside].tolist(), i[inside].tolist(), strict=True)
    return dict(zip(at, zip(pixel.tolist(), fraction.tolist(), strict=True), strict=True))


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 3])
@pytest.mark.parametrize("scale", [0.1, 0.3, 1 / 3])
def test_roi_align(scale, sampling_ratio, aligned, real):
    low, high = integer_edges(real)
    actual = samples_inside(rule.roi_align((BINS, BINS), scale, sampling_ratio, aligned), low, high)
    expected = {}
    for k in range(len(low)):
        table = oracle.positions("roi_align", low[k], high[k], SIZE, BINS, real, sampling_ratio, scale, aligned)
        for p, samples in enumerate(table):
            for i, (position, _, _) in enumerate(samples):
                if -1 <= position <= SIZE:
                    clamped = real(min(max(position, 0), SIZE - 1))
                    expected[k, p, i] = (int(clamped), float(clamped - real(int(clamped))))
    assert actual == expected
    assert len(actual) > 1000


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("op", ["crop_and_resize", "roi_crop_centers", "roi_crop_corners"])
def test_crops(op, real):
    low, high = integer_edges(real)
    bins = (BINS, BINS)
    if op == "crop_and_resize":
        low, high, case = low / real(150), high / real(150), rule.crop_and_resize(bins)
    else:
        case = rule.roi_crop(bins, op == "roi_crop_centers")
    actual = samples_inside(case, low, high)
    expected = {}
    for k in range(len(low)):
        for p, ((position, _, _),) in enumerate(oracle.positions(op, low[k], high[k], SIZE, BINS, real)):
            if 0 <= position <= SIZE - 1:
                pixel = int(position) if op == "crop_and_resize" else min(int(position), SIZE - 2)
                expected[k, p, 0] = (pixel, float(position - real(pixel)))
    assert actual == expected
    assert len(actual) > 100


def test_nearest_rounds_the_position_itself():
    """0.49999997 + 0.5 is 1 in float32."""
    case = rule.crop_and_resize((1, 1), nearest=True)
    below = np.nextafter(np.float32(0.5), np.float32(0))
    for position, pixel in ((below, 0), (np.float32(0.5), 1), (np.float32(1.5), 2), (np.float32(2.5), 3)):
        low, high, fraction = geometry.taps(case, np.array([position]), 9, np.float32)
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
