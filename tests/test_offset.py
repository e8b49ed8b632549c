"""Slopes are differences of pixels: an offset of the features, however large, costs none of their digits."""

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import rule as rules
from cupy_roialign.cpu import backend as cpu_backend
from tests import tolerance

OFFSET = np.float32(2.0**20)


def problem(order=(0, 1, 2, 3), channels=5):
    """Features of multiples of an eighth, which are exact in float32 with OFFSET added too; boxes; batch indices."""
    rng = np.random.default_rng(2)
    features = rng.integers(-64, 64, (2, channels, 19, 22)).astype(np.float32) / 8
    features = np.ascontiguousarray(features.transpose(order)).transpose(np.argsort(order))
    return features, rng.uniform(0, 20, (6, 4)).astype(np.float32), rng.integers(0, 2, 6)


CALLS = {
    "crop_and_resize": (cr.crop_and_resize, 20, {"crop_size": (5, 9)}),
    "crop_and_resize, one bin": (cr.crop_and_resize, 20, {"crop_size": 1}),
    "roi_crop": (cr.roi_crop, 1, {"crop_size": (5, 9)}),
    "roi_align": (cr.roi_align, 1, {"output_size": (5, 9), "sampling_ratio": 2}),
    "roi_align, adaptive": (cr.roi_align, 1, {"output_size": (1, 2), "aligned": True}),
    "roi_align, many samples": (cr.roi_align, 1, {"output_size": (1, 2), "sampling_ratio": 90}),
}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize("name", CALLS)
def test_the_gradient_of_the_boxes(name, order, backend):
    operator, unit, options = CALLS[name]
    features, boxes, indices = problem(order)
    options = {**options, "batch_indices" if operator is cr.roi_align else "box_indices": indices}
    shape = output_shape(options, features, boxes)
    cotangent = np.random.default_rng(3).integers(-8, 8, shape).astype(np.float32)
    expected, found = (
        backend.vjp(operator, values, boxes / unit, cotangent=cotangent, **options)[2]
        for values in (features, features + OFFSET)
    )
    assert np.abs(expected).max() > 1
    tolerance.assert_close(found, expected, tolerance.GRADIENT["float32"])


def output_shape(options, features, boxes):
    size = options.get("crop_size") or options.get("output_size")
    return len(boxes), features.shape[1], *((size, size) if isinstance(size, int) else size)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("where", ["cpu", "emulated"])
def test_derivatives_along_directions(where, count, request):
    """With a direction weights change, and their changes add up to 0."""
    features, boxes, indices = problem()
    asarray = backend = None
    if where == "cpu":
        asarray, backend = np.asarray, cpu_backend
    else:
        asarray = request.getfixturevalue("emulated").asarray
        from cupy_roialign.gpu import cupy_arrays as backend
    directions = np.random.default_rng(3).uniform(-1, 1, (2, 6, 4)).astype(np.float32)[:count]
    rule = rules.roi_align((5, 9), 1.0, 2)
    expected, found = (
        backend.forward(*map(asarray, (values, boxes, indices)), rule, [asarray(along) for along in directions])
        for values in (features, features + OFFSET)
    )
    if where != "cpu":
        expected, found = expected.get(), found.get()
    assert np.abs(expected).max() > 1
    tolerance.assert_close(found, expected, tolerance.GRADIENT["float32"])
