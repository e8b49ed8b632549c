"""The two ways to the gradient to boxes, by lines and by bands: the same numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupy_roialign import numpy_backend, numpy_dense, numpy_job, numpy_slopes
from cupy_roialign.geometry import Dialect, Rule
from tests import tolerance
from tests.test_cost import MIB, peak
from tests.test_directions import RULES
from tests.test_oracle import ORDERS, lay_out

X1_Y1_X2_Y2 = (1, 0, 3, 2)


def by(way, *arguments, strip=numpy_slopes.STRIP):
    """The gradient to boxes; each box as pixels, whatever the number of channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_dense, "FEW_CHANNELS", 1)
        patch.setattr(numpy_dense, "_by_bands", lambda piece, bins: way == "bands")
        patch.setattr(numpy_slopes, "STRIP", strip)
        return numpy_backend.box_gradient(*arguments)


@given(
    rule=st.sampled_from(list(RULES.values())),
    channels=st.sampled_from([1, 3, 40]),
    dtype=st.sampled_from(["float32", "float64", "float16", "uint8"]),
    order=st.sampled_from(ORDERS),
    gradient_order=st.sampled_from([*ORDERS, "the same everywhere"]),
    odd=st.sampled_from([None, np.nan, np.inf, -np.inf]),
    directions=st.integers(0, 2),
    strip=st.sampled_from([1, 1000, numpy_slopes.STRIP]),
    seed=st.integers(0, 2**16),
)
def test_lines_and_bands_agree(rule, channels, dtype, order, gradient_order, odd, directions, strip, seed):
    rng = np.random.default_rng(seed)
    features = (rng.uniform(0, 9, (2, channels, 17, 19)) + 4).astype(dtype)
    gradient_dtype = "float64" if dtype == "float64" else "float32"
    grad = rng.standard_normal((6, channels, *rule.bins)).astype(gradient_dtype)
    if odd is not None and dtype != "uint8":
        features[0, 0, rng.integers(0, 17), rng.integers(0, 19)] = odd
    if odd is not None and not directions:
        grad[0, 0, rng.integers(0, rule.bins[0]), rng.integers(0, rule.bins[1])] = odd
    boxes = rng.uniform(-4, 24, (6, 5 if max(rule.columns) == 4 else 4))
    boxes = np.round(boxes) if seed % 3 == 0 else boxes  # samples on centres of pixels: weights of 0
    boxes = boxes / 18 if rule.dialect is Dialect.CROP_AND_RESIZE else boxes / rule.spatial_scale
    indices = rng.integers(0, 2, 6)
    along = list(rng.standard_normal((directions, *boxes.shape)))
    features = lay_out(features, order)
    grad = (
        np.broadcast_to(grad[0, 0, 0, 0], grad.shape)
        if gradient_order == "the same everywhere"
        else lay_out(grad, gradient_order)
    )
    arguments = (grad, features, boxes.astype(gradient_dtype), indices, rule, along)
    before = features.copy()
    bands, lines = by("bands", *arguments, strip=strip), by("lines", *arguments)
    np.testing.assert_array_equal(features, before)
    if odd is not None:  # infinite times a pixel that is 0 less its level is NaN, times one that is not 0 infinite
        bands, lines = (np.where(np.isfinite(gradient), gradient, np.nan) for gradient in (bands, lines))
    scale = 100 * 17
    tolerance.assert_close(bands / scale, lines / scale, tolerance.GRADIENT[gradient_dtype])


@pytest.mark.parametrize(("too_few", "bins", "expected"), [(1, 3, 0), (0, 3, 2), (0, 60, 0)])
def test_many_channels_go_by_bands(too_few, bins, expected, monkeypatch):
    """But not where there are far more bins than pixels."""
    calls = []
    original = numpy_slopes.add
    monkeypatch.setattr(numpy_slopes, "add", lambda *arguments: calls.append(1) or original(*arguments))
    rng = np.random.default_rng(0)
    rule = Rule(Dialect.ROI_ALIGN, (bins, bins), X1_Y1_X2_Y2, 1.0, 2, True)
    channels = numpy_dense.MANY_CHANNELS - too_few
    features = rng.standard_normal((1, channels, 20, 20), dtype=np.float32)
    boxes = np.array([[1, 1, 9, 9], [2, 5, 12, 19]], np.float32)
    grad = rng.standard_normal((2, channels, bins, bins), dtype=np.float32)
    numpy_backend.box_gradient(grad, features, boxes, np.zeros(2, np.int64), rule)
    assert len(calls) == expected


def test_channels_that_go_by_bands_and_others_that_go_by_lines_add_up(monkeypatch):
    """The workspace holds the window of MANY_CHANNELS; the rest of the channels are few."""
    rng = np.random.default_rng(0)
    count = numpy_dense.MANY_CHANNELS + 20
    features = rng.standard_normal((1, count, 50, 50), dtype=np.float32)
    boxes = np.array([[0, 0, 50, 50], [3, 4, 15, 12]], np.float32)
    grad = rng.standard_normal((2, count, 3, 3), dtype=np.float32)
    arguments = grad, features, boxes, np.zeros(2, np.int64), Rule(Dialect.ROI_ALIGN, (3, 3), X1_Y1_X2_Y2, 1.0, 0, True)
    whole = numpy_backend.box_gradient(*arguments)
    monkeypatch.setattr(numpy_job, "WORKSPACE", numpy_dense.MANY_CHANNELS * 50 * 50 * 4)
    tolerance.assert_close(numpy_backend.box_gradient(*arguments), whole, tolerance.GRADIENT["float32"])


def test_memory_of_a_large_box():
    """It is worked on in strips: no copy of its 30 MB."""
    features = np.ones((1, 200, 200, 192), np.float32).transpose(0, 3, 1, 2)
    box, grad = np.array([[1, 1, 199, 199]], np.float32), np.ones((1, 192, 7, 7), np.float32)
    rule = Rule(Dialect.ROI_ALIGN, (7, 7), X1_Y1_X2_Y2, 1.0, 0, True)
    assert peak(lambda: numpy_backend.box_gradient(grad, features, box, np.zeros(1, np.int64), rule)) < 3 * MIB
