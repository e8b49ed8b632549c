"""The package against plain loops, over random shapes, dtypes, memory orders and boxes, ordinary and broken."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cupy_roialign as cr
from tests import oracle, tolerance
from tests.backends import bfloat16

OPERATORS = ["crop_and_resize", "crop_and_resize_nearest", "roi_crop_centers", "roi_crop_corners", "roi_align"]
FLOATS = ["float32", "float64", "float16", *(["bfloat16"] if bfloat16 else [])]
FEATURE_DTYPES = [*FLOATS, "uint8", "int16", "int64", "bool"]


def lay_out(features, order):
    """The same (N, C, H, W) values in another memory order."""
    if order == "channels-last":
        return np.ascontiguousarray(features.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if order == "transposed":
        return np.ascontiguousarray(features.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0)
    if order == "negative":
        return features[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1]
    if order == "sliced":
        wide = np.zeros([2 * n + 1 for n in features.shape], features.dtype)
        wide[1::2, 1::2, 1::2, 1::2] = features
        return wide[1::2, 1::2, 1::2, 1::2]
    if order == "swapped":
        return features if features.dtype.name == "bfloat16" else features.astype(features.dtype.newbyteorder("S"))
    if order == "unaligned":
        raw = np.empty(features.nbytes + 1, np.uint8)
        view = raw[1:].view(features.dtype).reshape(features.shape)
        view[...] = features
        return view
    if order == "read-only":
        features.flags.writeable = False
    return features


ORDERS = ["contiguous", "channels-last", "transposed", "negative", "sliced", "swapped", "unaligned", "read-only"]


@st.composite
def coordinates(draw, size):
    """A coordinate in pixels of an axis: ordinary, on a pixel or on an edge, outside, or broken."""
    return draw(
        st.one_of(
            st.floats(-2, size + 2, width=32),
            st.integers(-2, size + 2).map(float),
            st.integers(-4, 2 * size + 4).map(lambda v: v / 2),
            st.sampled_from([-1e30, 1e30, -3e38, 3e38, 1e-40, float("nan"), float("inf"), -float("inf")]),
            st.floats(-4 * size, 5 * size, width=32),
        )
    )


@st.composite
def calls(draw, dtypes=FEATURE_DTYPES):
    """Everything that one call of an operator takes, as a dict; boxes are y1, x1, y2, x2 in pixels."""
    shape = draw(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 17]), st.integers(1, 9), st.integers(1, 9)))
    count = draw(st.integers(0, 4))
    real = draw(st.sampled_from([np.float32, np.float64]))
    rows = [[draw(coordinates(shape[2 + i % 2])) for i in range(4)] for _ in range(count)]
    operator = draw(st.sampled_from(OPERATORS))
    call = {
        "operator": operator.removesuffix("_nearest"),
        "shape": shape,
        "dtype": draw(st.sampled_from(dtypes)),
        "order": draw(st.sampled_from(ORDERS)),
        "boxes": np.array(rows, real).reshape(count, 4),
        "batch_indices": np.array([draw(st.integers(0, shape[0] - 1)) for _ in range(count)], np.int32),
        "bins": draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1), (7, 5), (2, 19)])),
        "seed": draw(st.integers(0, 2**16)),
        "options": {},
    }
    if operator == "roi_align":
        call["options"]["aligned"] = draw(st.booleans())
        call["options"]["sampling_ratio"] = draw(st.sampled_from([0, 1, 2, 3]))
        call["options"]["spatial_scale"] = draw(st.sampled_from([1.0, 0.5, 0.3, 2.0]))
        if call["options"]["sampling_ratio"] == 0:  # the oracle takes each sample of a huge box
            call["boxes"] = np.clip(call["boxes"], -60, 60)  # NaN stays; infinities are met by the other operators
    else:
        call["options"]["extrapolation_value"] = draw(st.sampled_from([0.0, -2.5]))
        if operator == "crop_and_resize_nearest":
            call["options"]["nearest"] = True
    return call


def arguments(call):
    """Features, boxes in the operator's own terms, the operator and what else it takes."""
    rng = np.random.default_rng(call["seed"])
    values = rng.uniform(-1, 1, call["shape"])
    if call["dtype"] in FLOATS:
        features = values.astype(bfloat16 if call["dtype"] == "bfloat16" else call["dtype"])
    else:
        features = (np.abs(values) * (1 if call["dtype"] == "bool" else 200)).round().astype(call["dtype"])
    features = lay_out(features, call["order"])
    options = dict(call["options"])
    if call["operator"] == "roi_align":
        args = (call["boxes"][:, [1, 0, 3, 2]], call["bins"])
        return cr.roi_align, features, args, {**options, "batch_indices": call["batch_indices"]}
    value = options["extrapolation_value"]
    if call["operator"] == "crop_and_resize":
        args = (
            call["boxes"],
            call["batch_indices"],
            call["bins"],
            "nearest" if "nearest" in options else "bilinear",
            value,
        )
        return cr.crop_and_resize, features, args, {}
    args = (call["boxes"][:, [1, 0, 3, 2]], call["batch_indices"], call["bins"], value)
    return cr.roi_crop, features, args, {"transform_fpcoor": call["operator"] == "roi_crop_centers"}


def normalise(call):
    """For crop_and_resize pixels become units of the side less one pixel."""
    if call["operator"] == "crop_and_resize":
        sides = np.array([max(n - 1, 1) for n in call["shape"][2:]] * 2)
        call["boxes"] = (call["boxes"] / sides).astype(call["boxes"].dtype)
    return call


@given(call=calls().map(normalise))
def test_agrees(call, backend):
    operator, features, args, kwargs = arguments(call)
    rng = np.random.default_rng(call["seed"] + 1)
    shape = (len(call["boxes"]), call["shape"][1], *call["bins"])
    output_dtype = call["dtype"] if "float" in call["dtype"] else "float32"
    cotangent = rng.uniform(-1, 1, shape).astype(np.float64 if output_dtype == "float64" else np.float32)
    output, grad_features, grad_boxes = backend.vjp(operator, features, *args, **kwargs, cotangent=cotangent)

    wide = call["dtype"] == "float64" and call["operator"] != "crop_and_resize"
    real = np.float64 if wide or call["boxes"].dtype == np.float64 else np.float32
    if backend.name.startswith("torch"):  # autograd rounds the cotangent to the output's dtype
        cotangent = cotangent.astype(output.dtype)
    expected, expected_features, expected_boxes = oracle.run(
        call["operator"],
        features,
        call["boxes"],
        call["batch_indices"],
        call["bins"],
        cotangent,
        real,
        **call["options"],
    )
    magnitude = max(1.0, float(np.abs(np.asarray(features, np.float64)).max()))
    assert output.dtype.name == output_dtype
    tolerance.assert_close(output, expected, tolerance.OUTPUT[output_dtype])
    if grad_features is not None:
        assert grad_features.dtype.name == output_dtype
        tolerance.assert_close(grad_features, expected_features, tolerance.GRADIENT[output_dtype])
    order = [0, 1, 2, 3] if call["operator"] == "crop_and_resize" else [1, 0, 3, 2]
    narrow = "float64" if output_dtype == "float64" and call["boxes"].dtype == np.float64 else "float32"
    scale = magnitude * max(call["shape"][2:])
    tolerance.assert_close(grad_boxes / scale, expected_boxes[:, order] / scale, tolerance.GRADIENT[narrow])


def test_the_oracle_can_disagree():
    """A crop moved by a hundredth of a pixel is told from the right one."""
    rng = np.random.default_rng(5)
    features = rng.uniform(-1, 1, (1, 2, 6, 7))
    boxes = np.array([[0.5, 0.5, 4.0, 5.0]])
    output = cr.roi_align(features, boxes[:, [1, 0, 3, 2]], 3, 1.0, 2, True, batch_indices=np.array([0]))
    moved, _, _ = oracle.run(
        "roi_align", features, boxes + 0.01, [0], (3, 3), None, np.float64, sampling_ratio=2, aligned=True
    )
    with pytest.raises(AssertionError, match="off by"):
        tolerance.assert_close(output, moved, tolerance.OUTPUT["float64"])
