"""Boxes one by one: weights in blocks, and images of few channels in either memory order."""

import unittest.mock

import numpy as np
import pytest

from cupy_roialign import geometry, numpy_backend, numpy_dense, numpy_job
from cupy_roialign.geometry import Dialect, Part, Rule
from cupy_roialign.numpy_weights import AxisWeights, Taps
from tests import tolerance
from tests.test_cost import MIB, X1_Y1_X2_Y2, peak
from tests.test_oracle import lay_out


def whole(weights, place, bins, spread):
    """The blocks of a box as one matrix of bins and pixels, and how many of them there are at each number of it."""
    matrix, seen = (np.zeros((bins, weights.lines[place].number)) for _ in range(2))
    for block in weights.blocks(weights.flat)[place]:
        bins_of, pixels = (block.of, block.to) if spread else (block.to, block.of)
        matrix[bins_of, pixels] += block.matrix.T if spread else block.matrix
        seen[bins_of, pixels] += 1
    return matrix, seen


# From few pixels to many; from right to left; beyond the image; and samples at one place but for rounding.
EDGES = [(3, 9), (10, 390), (390, 10), (-300, 700), (100, 104), (399.0, 399.0001), (200.99999, 201.00001), (500, 600)]


@pytest.mark.parametrize("options", [{"sampling_ratio": 1}, {"sampling_ratio": 0}])
@pytest.mark.parametrize("bins", [5, 16, 17, 100])
@pytest.mark.parametrize("numbers", [1, 100, 100_000])
def test_blocks_of_pixels_hold_what_blocks_of_bins_do(numbers, bins, options):
    boxes = np.array([[low, 0, high, 50] for low, high in EDGES], np.float32)
    rule = Rule(Dialect.ROI_ALIGN, (bins, bins), X1_Y1_X2_Y2, 1.0, aligned=True, **options)
    with np.errstate(all="ignore"):
        taps = Taps(rule, geometry.resolve(rule, boxes, (60, 400)).along(1), Part((range(bins),)))
    forward, transposed = (
        AxisWeights(taps, np.dtype(np.float32), 0.5, numbers * bins, spread) for spread in (False, True)
    )
    for place in range(len(EDGES)):
        expected, _ = whole(forward, place, bins, False)
        matrix, seen = whole(transposed, place, bins, True)
        np.testing.assert_array_equal(matrix, expected)
        assert matrix.any() == taps.inside()[0][place].any()
        assert seen.max(initial=0) <= 1
        pixels = [block.to for block in transposed.blocks(transposed.flat)[place]]
        ends = [0, *(part.stop for part in pixels)]
        assert [part.start for part in pixels] == ends[:-1]  # each pixel is in one block
        assert ends[-1] == forward.lines[place].number


def wide_and_high(order):
    """Boxes that are resampled along x first, and along y first, of 3 channels."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, 3, 90, 250), dtype=np.float32)
    boxes = np.array([[2, 30, 240, 60], [60, 3, 85, 88], [240, 80, 10, 5], [10, 10, 31, 32]], np.float32)
    grad = rng.standard_normal((4, 3, 40, 50), dtype=np.float32)
    rule = Rule(Dialect.ROI_ALIGN, (40, 50), X1_Y1_X2_Y2, 1.0, 0, True)
    return lay_out(features, order), boxes, np.array([0, 1, 1, 0]), lay_out(grad, order), rule


@pytest.mark.parametrize("value", [None, np.nan, -np.inf])
def test_few_channels_in_either_order_are_the_same(value, monkeypatch):
    monkeypatch.setattr(numpy_backend, "SPARSE", False)
    results, narrow = [], []

    def is_narrow(values, axis, original=numpy_dense._is_narrow):
        narrow.append(original(values, axis))
        return narrow[-1]

    for order in ("contiguous", "channels-last"):
        features, boxes, indices, grad, rule = wide_and_high(order)
        if value is not None:
            features[:, 1, 40, 70] = value
            grad[:, 2, 20, 25] = value
        with unittest.mock.patch.object(numpy_dense, "_is_narrow", is_narrow):
            results.append(
                (
                    numpy_backend.forward(features, boxes, indices, rule),
                    numpy_backend.feature_gradient(grad, features, boxes, indices, rule),
                )
            )
        assert any(narrow) == (order == "channels-last")
    for name, planes, pixels in zip(("OUTPUT", "GRADIENT"), *results, strict=True):
        assert np.isfinite(planes).mean() > 0.9
        tolerance.assert_close(pixels, planes, getattr(tolerance, name)["float32"])


def test_memory_of_a_large_window_of_pixels(monkeypatch):
    """Its rows go by planes some at a time: the window is 26 MB, and read where it lies."""
    monkeypatch.setattr(numpy_job, "WORKSPACE", 4 * MIB)
    features = lay_out(np.zeros((1, 3, 1500, 1500), np.float32), "channels-last")
    box, rule = (
        np.array([[0, 0, 1500, 1500]], np.float32),
        Rule(Dialect.ROI_ALIGN, (20, 7), X1_Y1_X2_Y2, sampling_ratio=0),
    )
    assert peak(lambda: numpy_backend.forward(features, box, np.zeros(1, np.int64), rule)) < 12 * MIB
