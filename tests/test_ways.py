"""The two ways to work on boxes on the CPU: the same numbers, each as exact, and within the same memory."""

import unittest.mock

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import numpy_backend, numpy_dense, numpy_job, numpy_sparse
from cupy_roialign.geometry import Dialect, Rule
from tests import tolerance
from tests.test_cost import MIB, X1_Y1_X2_Y2, peak
from tests.test_oracle import lay_out

pytest.importorskip("scipy")


def crowd():
    """Boxes that share a window, of which the first alone touches its first pixel."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, 32, 100, 100)).astype(np.float32)
    low = rng.uniform(5, 70, (40, 2))
    boxes = np.concatenate([low, low + 25], axis=1).astype(np.float32)
    boxes[0] = -1, -1, 30, 30
    grad = rng.standard_normal((40, 32, 7, 7)).astype(np.float32)
    return features, boxes, np.zeros(40, np.int64), grad, Rule(Dialect.ROI_ALIGN, (7, 7), X1_Y1_X2_Y2, 1.0, 2, True)


@pytest.fixture(params=["lines", "bands"])
def _slopes(request, monkeypatch):
    """Both ways to the gradient to boxes."""
    monkeypatch.setattr(numpy_dense, "MANY_CHANNELS", 1 if request.param == "bands" else 2**60)


def sparse_and_dense(function):
    results = []
    for sparse in (True, False):
        with unittest.mock.patch.object(numpy_backend, "SPARSE", sparse):
            results.append(function())
    return results


@pytest.mark.parametrize("value", [1e4, -1e9, 3e38, np.nan])
@pytest.mark.usefixtures("_slopes")
def test_a_pixel_leaves_the_gradients_of_boxes_alone_that_do_not_touch_it(value):
    features, boxes, indices, grad, rule = crowd()
    expected = numpy_backend.box_gradient(grad, features, boxes, indices, rule)[1:]
    features[:, :, 0, 0] = value
    actual = numpy_backend.box_gradient(grad, features, boxes, indices, rule)[1:]
    scale = np.abs(expected).max()
    tolerance.assert_close(actual / scale, expected / scale, tolerance.GRADIENT["float32"])


@pytest.mark.parametrize("value", [1e4, -1e9, 3e38, np.nan])
def test_a_pixel_leaves_the_derivatives_of_crops_alone_that_do_not_touch_it(value):
    features, boxes, indices, _, rule = crowd()
    along = [np.random.default_rng(1).standard_normal(boxes.shape)]
    expected = numpy_backend.forward(features, boxes, indices, rule, along)[1:]
    features[:, :, 0, 0] = value
    actual = numpy_backend.forward(features, boxes, indices, rule, along)[1:]
    tolerance.assert_close(actual, expected, tolerance.GRADIENT["float32"])


@pytest.mark.usefixtures("_slopes")
def test_an_offset_of_the_features_costs_no_precision():
    features, boxes, indices, grad, rule = crowd()
    along = [np.random.default_rng(1).standard_normal(boxes.shape)]
    high = features + np.float32(1e6)
    exact = (high.astype(np.float64) - 1e6).astype(np.float32)
    for function in (
        lambda values: numpy_backend.box_gradient(grad, values, boxes, indices, rule),
        lambda values: numpy_backend.forward(values, boxes, indices, rule, along),
        lambda values: numpy_backend.forward(lay_out(values, "channels-last"), boxes, indices, rule, along),
    ):
        for of_high, expected in zip(
            sparse_and_dense(lambda function=function: function(high)),
            sparse_and_dense(lambda function=function: function(exact)),
            strict=True,
        ):
            tolerance.assert_close(of_high, expected, tolerance.GRADIENT["float32"])


@pytest.mark.parametrize(("side", "bins"), [(60, 1), (200, 1), (200, 7), (390, 2)])
def test_the_mean_of_ones_is_one(side, bins):
    features = np.ones((1, 16, 400, 400), np.float32)
    box = np.array([[0, 1.25, 2.75, 1.25 + side, 2.75 + side]], np.float32)
    crops = cr.roi_align(features, box, bins, aligned=True)
    tolerance.assert_close(crops, np.ones_like(crops), 3 * tolerance.OUTPUT["float32"])


def test_memory_does_not_grow_with_threads(monkeypatch):
    monkeypatch.setattr(numpy_backend, "SPARSE", True)
    features = np.ones((1, 256, 300, 300), np.uint8)  # 22 MB
    box = np.array([[0, 1, 1, 290, 290]], np.float32)

    try:
        for count in (1, 8):
            cr.set_num_threads(count)
            assert peak(lambda: cr.roi_align(features, box, 60, 1.0, 2, True)) < 64 * MIB + features.nbytes
    finally:
        cr.set_num_threads(None)


def test_windows_of_one_image_overlap():
    """Boxes of several parts of the image, too far apart to share a window; each adds to the same pixels."""
    rng = np.random.default_rng(0)
    features = np.zeros((1, 20, 600, 600), np.float32)
    middle = 300 + rng.uniform(-30, 30, (12, 2))
    boxes = np.concatenate([middle - 20, middle + 20], axis=1).astype(np.float32)
    grad = rng.standard_normal((12, 20, 7, 7)).astype(np.float32)
    rule = Rule(Dialect.ROI_ALIGN, (7, 7), X1_Y1_X2_Y2, 1.0, 2, True)
    windows = []
    original = numpy_sparse._Chunk.__init__

    def init(self, boxes, some, found, owner):
        windows.extend(found)
        original(self, boxes, some, found, owner)

    with unittest.mock.patch.object(numpy_sparse._Chunk, "__init__", init):
        sparse, dense = sparse_and_dense(
            lambda: numpy_backend.feature_gradient(grad, features, boxes, np.zeros(12, np.int64), rule)
        )
    assert len(windows) > 1
    tolerance.assert_close(sparse, dense, tolerance.GRADIENT["float32"])


@pytest.mark.usefixtures("_slopes")
def test_the_gradient_of_a_bin_without_a_sample_counts_for_nothing():
    """A NaN there, as of a loss that divides by the crop's mean, says nothing about the box."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, 20, 30, 30)).astype(np.float32)
    boxes = np.array([[10, 10, 50, 20]], np.float32)  # half of it is outside
    grad = rng.standard_normal((1, 20, 3, 6)).astype(np.float32)
    rule = Rule(Dialect.ROI_ALIGN, (3, 6), X1_Y1_X2_Y2, 1.0, 2, True)
    clean = grad.copy()
    clean[..., 4:] = 0
    grad[..., 4:] = np.nan
    a, b = (numpy_backend.box_gradient(g, features, boxes, np.zeros(1, np.int64), rule) for g in (grad, clean))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("order", ["contiguous", "channels-last"])
def test_chunks_of_the_sparse_way_add_up(order, monkeypatch):
    rng = np.random.default_rng(6)
    features = lay_out(rng.standard_normal((2, 20, 40, 40), dtype=np.float32), order)
    boxes, indices = rng.uniform(-2, 42, (25, 4)).astype(np.float32), rng.integers(0, 2, 25)
    grad = lay_out(rng.standard_normal((25, 20, 7, 7), dtype=np.float32), order)
    rule = Rule(Dialect.ROI_ALIGN, (7, 7), X1_Y1_X2_Y2, 1.0, 2, True)

    def run():
        return (
            numpy_backend.forward(features, boxes, indices, rule),
            numpy_backend.feature_gradient(grad, features, boxes, indices, rule),
            numpy_backend.box_gradient(grad, features, boxes, indices, rule),
        )

    monkeypatch.setattr(numpy_backend, "SPARSE", True)
    whole = run()
    monkeypatch.setattr(numpy_job, "WORKSPACE", 600_000)
    assert numpy_sparse.suited(numpy_backend._job(features, boxes, indices, rule, ()), forced=True).all()
    for a, b in zip(run(), whole, strict=True):
        tolerance.assert_close(a, b, tolerance.GRADIENT["float32"])


def test_boxes_of_both_ways_by_turns():
    """Every other box has too many entries for the sparse way. The others' gradients are read where they lie."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 90, (100, 2))
    side = np.where(np.arange(100) % 2, 9, 300)[:, None]
    boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    features, grad = (
        lay_out(rng.standard_normal(shape, dtype=np.float32), "channels-last")
        for shape in ((1, 512, 100, 100), (100, 512, 14, 14))
    )
    rule, indices = Rule(Dialect.ROI_ALIGN, (14, 14), X1_Y1_X2_Y2, 1.0, 0, True), np.zeros(100, np.int64)
    job = numpy_backend._job(features, boxes, indices, rule, ())
    np.testing.assert_array_equal(numpy_sparse.suited(job, forced=True), side[:, 0] == 9)
    sparse, dense = sparse_and_dense(lambda: numpy_backend.feature_gradient(grad, features, boxes, indices, rule))
    tolerance.assert_close(sparse, dense, tolerance.GRADIENT["float32"])
    whole = np.arange(100)[side[:, 0] == 9]
    total = np.zeros_like(features)
    assert peak(lambda: numpy_sparse.feature_gradient(job, whole, grad, total, set()) or total[:0]) < grad.nbytes / 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pixel_of_weight_zero_is_not_reached(value):
    """Samples on pixel centres: the next pixel has weight 0."""
    features = np.zeros((1, 20, 9, 9), np.float32)
    features[..., 5] = value
    box = np.array([[2.0, 2.0, 4.0, 4.0]], np.float32)
    rule = Rule(Dialect.ROI_CROP_CORNERS, (3, 3), X1_Y1_X2_Y2)
    for crops in sparse_and_dense(lambda: numpy_backend.forward(features, box, np.zeros(1, np.int64), rule)):
        assert not crops.any()
    grad = np.full((1, 20, 3, 3), value, np.float32)
    for total in sparse_and_dense(
        lambda: numpy_backend.feature_gradient(grad, features, box, np.zeros(1, np.int64), rule)
    ):
        assert not total[..., 5].any()
        assert not np.isfinite(total[..., 2:5, 2:5]).any()
