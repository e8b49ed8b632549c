"""Gradients: adjoint to the forward, equal to finite differences, and one-sided where interpolation has a kink."""

import numpy as np
import pytest

import cupy_roialign as cr
from tests import backends

# no sample sits on a pixel, an edge, or where the number of samples changes
PIXEL_BOXES = np.array(
    [
        [1.313, 0.717, 8.251, 6.179],
        [-1.437, 2.263, 4.391, 9.877],
        [9.171, 5.759, 2.683, 0.439],
        [3.371, 3.443, 3.397, 3.967],
    ]
)
INDICES = np.array([0, 1, 1, 0])
SHAPE = (2, 3, 8, 11)


def normalised(boxes):
    return boxes[:, [1, 0, 3, 2]] / np.array([SHAPE[2] - 1, SHAPE[3] - 1] * 2)


CALLS = {
    "crop_and_resize": (cr.crop_and_resize, normalised(PIXEL_BOXES), (INDICES, (3, 4), "bilinear", 1.5), {}),
    "crop_and_resize 1x1": (cr.crop_and_resize, normalised(PIXEL_BOXES), (INDICES, 1), {}),
    "crop_and_resize large": (cr.crop_and_resize, normalised(PIXEL_BOXES), (INDICES, (21, 35)), {}),
    "nearest": (cr.crop_and_resize, normalised(PIXEL_BOXES), (INDICES, (3, 4), "nearest", 1.5), {}),
    "roi_crop": (cr.roi_crop, PIXEL_BOXES, (INDICES, (3, 4), -0.5), {}),
    "roi_crop 1x1": (cr.roi_crop, PIXEL_BOXES, (INDICES, 1), {}),
    "roi_crop corners": (cr.roi_crop, PIXEL_BOXES, (INDICES, (3, 4)), {"transform_fpcoor": False}),
    "roi_crop corners 1x1": (cr.roi_crop, PIXEL_BOXES, (INDICES, 1), {"transform_fpcoor": False}),
    "roi_align": (cr.roi_align, PIXEL_BOXES, ((3, 4), 0.9, 2), {"batch_indices": INDICES}),
    "roi_align aligned": (cr.roi_align, PIXEL_BOXES, ((3, 4), 0.9, 2, True), {"batch_indices": INDICES}),
    "roi_align adaptive": (cr.roi_align, PIXEL_BOXES, ((3, 4), 1.1, 0, True), {"batch_indices": INDICES}),
    "roi_align large": (cr.roi_align, PIXEL_BOXES, ((19, 40), 0.9, 1), {"batch_indices": INDICES}),
}


@pytest.fixture(params=[1, 3, 20], ids=["1 channel", "3 channels", "20 channels"])
def features(request):
    """Few channels are worked on as planes, many as pixels."""
    return np.random.default_rng(7).uniform(-1, 1, (SHAPE[0], request.param, *SHAPE[2:]))


@pytest.mark.parametrize("name", CALLS)
def test_feature_gradient_is_the_adjoint(name, features, backend):
    operator, boxes, args, kwargs = CALLS[name]
    cotangent = np.random.default_rng(8).uniform(-1, 1, backend(operator, features, boxes, *args, **kwargs).shape)
    output, gradient, _ = backend.vjp(operator, features, boxes, *args, **kwargs, cotangent=cotangent)
    outside = backend(
        operator, np.zeros_like(features), boxes, *args, **kwargs
    )  # what is added there is no function of them
    left, right = np.vdot(output - outside, cotangent), np.vdot(features, gradient)
    assert abs(left - right) <= 1e-13 * np.abs(cotangent).sum()


@pytest.mark.parametrize("name", CALLS)
def test_box_gradient_against_finite_differences(name, features):
    """On the plain way alone: the oracle compares the gradients of every backend."""
    backend = backends.NumpyBackend("plain")
    operator, boxes, args, kwargs = CALLS[name]
    cotangent = np.random.default_rng(9).uniform(-1, 1, backend(operator, features, boxes, *args, **kwargs).shape)
    _, _, gradient = backend.vjp(operator, features, boxes, *args, **kwargs, cotangent=cotangent)
    assert gradient.dtype == np.float64
    numeric = np.zeros_like(boxes)
    step = 1e-6
    for k, c in np.ndindex(*boxes.shape):
        ahead, behind = boxes.copy(), boxes.copy()
        ahead[k, c] += step
        behind[k, c] -= step
        change = backend(operator, features, ahead, *args, **kwargs) - backend(
            operator, features, behind, *args, **kwargs
        )
        numeric[k, c] = np.vdot(change, cotangent) / (2 * step)
    if name == "nearest":
        np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_allclose(gradient, numeric, atol=2e-8 * np.abs(cotangent).sum() * max(SHAPE))
    if name != "nearest":
        assert np.abs(gradient).max() > 0.1


def ramp(slopes):
    """(1, 1, n, 2) features, rows of values that rise by `slopes`, constant along x."""
    return np.repeat(np.cumsum([0.0, *slopes])[None, None, :, None], 2, axis=3)


# One sample at y on rows with the slopes 1, 10, 100: which slope does it have?
KINKS = [(1.0, 10), (2.0, 100), (0.5, 1), (2.5, 100)]


def slope_at(operator, y):
    """D value / d y of a single sample at row y, pulling on both edges of a box of no height."""
    features = ramp([1, 10, 100])
    if operator == "roi_align":
        box = np.array([[0.5, y + 0.5, 1.5, y + 0.5]])
        _, pullback = cr.vjp(cr.roi_align, features, box, 1, 1.0, 1, True, batch_indices=np.array([0]))
    elif operator == "roi_crop":
        box = np.array([[0, y + 0.5, 1.0, y + 0.5]])
        _, pullback = cr.vjp(cr.roi_crop, features, box, np.array([0]), 1)
    else:
        box = np.array([[y / 3, 0.0, y / 3, 1.0]])
        _, pullback = cr.vjp(cr.crop_and_resize, features, box, np.array([0]), 1)
        _, gradient = pullback(np.ones((1, 1, 1, 1)))
        return (gradient[0, 0] + gradient[0, 2]) / 3
    _, gradient = pullback(np.ones((1, 1, 1, 1)))
    return gradient[0, 1] + gradient[0, 3]


@pytest.mark.parametrize(("y", "slope"), KINKS)
@pytest.mark.parametrize("operator", ["roi_align", "roi_crop"])
def test_at_a_kink_the_slope_is_the_one_toward_larger_coordinates(operator, y, slope, way):
    assert slope_at(operator, y) == pytest.approx(slope, rel=1e-12)


def test_at_the_first_pixel_and_the_last(way):
    assert slope_at("roi_crop", 0.0) == pytest.approx(1, rel=1e-12)
    assert slope_at("roi_crop", 3.0) == pytest.approx(100, rel=1e-12)  # there is none toward larger
    assert slope_at("roi_align", 0.0) == pytest.approx(1, rel=1e-12)
    assert slope_at("roi_align", 3.0) == 0  # beyond it the border pixel goes on
    assert slope_at("roi_align", -0.5) == 0


def test_crop_and_resize_has_no_slope_on_a_pixel_as_in_tensorflow(way):
    assert slope_at("crop_and_resize", 3.0) == 0
    assert slope_at("crop_and_resize", 0.0) == 0
    assert slope_at("crop_and_resize", 1.5) == pytest.approx(10, rel=1e-12)


def test_a_box_widened_to_one_pixel_has_no_slope_to_its_size(way):
    features = ramp([1, 10, 100])
    for height, moves in ((0.5, False), (1.0, True), (1.5, True)):
        box = np.array([[0.0, 0.2, 1.0, 0.2 + height]])
        _, pullback = cr.vjp(cr.roi_align, features, box, 1, 1.0, 2, False, batch_indices=np.array([0]))
        _, gradient = pullback(np.ones((1, 1, 1, 1)))
        assert (gradient[0, 3] != 0) == moves


def test_shapes_of_the_box_gradient(way):
    features = np.random.default_rng(1).uniform(-1, 1, SHAPE)
    boxes = PIXEL_BOXES
    listed = [boxes[INDICES == 0].astype(np.float32), boxes[INDICES == 1].astype(np.float32)]
    rows = np.concatenate([np.zeros((2, 1)), np.ones((2, 1))])
    joined = np.concatenate([rows, np.concatenate(listed)], axis=1)

    output, pullback = cr.vjp(cr.roi_align, features, joined, 3, 1.0, 2)
    grad_features, by_row = pullback(np.ones_like(output))
    assert by_row.shape == (4, 5)
    np.testing.assert_array_equal(by_row[:, 0], 0)
    assert (by_row[:, 1:] != 0).any(axis=1).all()

    output_listed, pullback = cr.vjp(cr.roi_align, features, listed, 3, 1.0, 2)
    grad_features_listed, by_image = pullback(np.ones_like(output))
    np.testing.assert_array_equal(output_listed, output)
    np.testing.assert_array_equal(grad_features_listed, grad_features)
    assert isinstance(by_image, list)
    assert [part.shape for part in by_image] == [(2, 4), (2, 4)]
    np.testing.assert_allclose(np.concatenate(by_image), by_row[:, 1:], rtol=1e-6)


@pytest.mark.parametrize("kind", [list, tuple])
def test_uneven_lists_of_boxes(kind):
    features = np.random.default_rng(1).uniform(-1, 1, (3, 2, 8, 11))
    parts = kind([PIXEL_BOXES[:0], PIXEL_BOXES[:1], PIXEL_BOXES[1:]])
    output, pullback = cr.vjp(cr.roi_align, features, parts, 3, 1.0, 2)
    _, by_image = pullback(np.ones_like(output))
    together, joined_pullback = cr.vjp(
        cr.roi_align, features, PIXEL_BOXES, 3, 1.0, 2, batch_indices=np.array([1, 2, 2, 2])
    )
    np.testing.assert_array_equal(output, together)
    assert [len(part) for part in by_image] == [0, 1, 3]
    np.testing.assert_array_equal(np.concatenate(by_image), joined_pullback(np.ones_like(output))[1])


def test_an_offset_of_the_features_does_not_blur_the_gradient_to_the_boxes(way):
    rng = np.random.default_rng(5)
    features = rng.integers(-8, 8, (2, 64, 20, 20)).astype(np.float32)
    boxes = PIXEL_BOXES.astype(np.float32)
    cotangent = rng.uniform(-1, 1, (4, 64, 5, 5)).astype(np.float32)
    plain, shifted = (
        cr.vjp(cr.roi_crop, features + np.float32(offset), boxes, INDICES, 5)[1](cotangent)[1] for offset in (0, 2**16)
    )
    np.testing.assert_allclose(shifted, plain, atol=1e-4 * np.abs(plain).max())


def test_box_gradient_has_the_dtype_of_the_boxes(way):
    features = np.ones(SHAPE, np.float64)
    for dtype in (np.float16, np.float32, np.float64):
        output, pullback = cr.vjp(cr.roi_crop, features, PIXEL_BOXES.astype(dtype), INDICES, 2)
        assert pullback(np.ones_like(output))[1].dtype == dtype


def test_a_pullback_can_be_called_again(way):
    features = np.random.default_rng(2).uniform(-1, 1, SHAPE)
    output, pullback = cr.vjp(cr.roi_crop, features, PIXEL_BOXES, INDICES, 3)
    once, twice = pullback(np.ones_like(output)), pullback(2 * np.ones_like(output))
    for a, b in zip(once, twice, strict=True):
        np.testing.assert_array_equal(2 * a, b)


def test_the_same_bits_each_time(way):
    rng = np.random.default_rng(3)
    features = rng.standard_normal((2, 40, 30, 30), dtype=np.float32)
    boxes = rng.uniform(0, 30, (200, 4)).astype(np.float32)
    indices = rng.integers(0, 2, 200)
    output, pullback = cr.vjp(cr.roi_align, features, boxes, 7, 1.0, 2, batch_indices=indices)
    cotangent = rng.standard_normal(output.shape, dtype=np.float32)
    first = pullback(cotangent)
    for _ in range(5):
        for a, b in zip(first, pullback(cotangent), strict=True):
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_the_order_of_boxes_of_other_images_does_not_matter(way):
    rng = np.random.default_rng(4)
    features = rng.standard_normal((3, 20, 12, 12), dtype=np.float32)
    boxes = rng.uniform(0, 12, (30, 4)).astype(np.float32)
    indices = rng.integers(0, 3, 30)
    order = np.argsort(indices, kind="stable")
    output, pullback = cr.vjp(cr.roi_crop, features, boxes, indices, 3)
    sorted_output, sorted_pullback = cr.vjp(cr.roi_crop, features, boxes[order], indices[order], 3)
    np.testing.assert_array_equal(output[order], sorted_output)
    cotangent = rng.standard_normal(output.shape, dtype=np.float32)
    np.testing.assert_array_equal(pullback(cotangent)[0], sorted_pullback(cotangent[order])[0])
