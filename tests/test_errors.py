"""Bad arguments: each error names the argument, what came and what was expected. Broken boxes: a defined answer."""

import fractions
import sys
import types

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import dispatch
from tests import tolerance

FEATURES = np.arange(2 * 3 * 8 * 9, dtype=np.float32).reshape(2, 3, 8, 9)
NORMALIZED = np.array([[0.1, 0.2, 0.8, 0.9], [0.0, 0.0, 1.0, 1.0]], np.float32)
PIXELS = np.array([[1, 1, 5, 6], [0, 2, 7, 4]], np.float32)
INDICES = np.array([0, 1])
ROWS = np.concatenate([INDICES[:, None].astype(np.float32), PIXELS], axis=1)

CROP_AND_RESIZE = {"image": FEATURES, "boxes": NORMALIZED, "box_indices": INDICES, "crop_size": (2, 3)}
ROI_CROP = {"features": FEATURES, "boxes": PIXELS, "box_indices": INDICES, "crop_size": (2, 3)}
ROI_ALIGN = {"features": FEATURES, "boxes": ROWS, "output_size": (2, 3)}
PER_BOX = {"features": FEATURES, "boxes": PIXELS, "output_size": (2, 3), "batch_indices": INDICES}
LISTED = {"features": FEATURES, "boxes": [PIXELS, PIXELS], "output_size": (2, 3)}

CALLS = {
    "crop_and_resize": (cr.crop_and_resize, CROP_AND_RESIZE),
    "roi_crop": (cr.roi_crop, ROI_CROP),
    "roi_align": (cr.roi_align, ROI_ALIGN),
    "roi_align, batch_indices": (cr.roi_align, PER_BOX),
    "roi_align, list": (cr.roi_align, LISTED),
}


class Long(int):
    """An int of more digits than Python writes out."""

    def __str__(self):
        return "1 followed by many zeros"


LONG = Long(10**5000)

# (call, argument, value, error, what the message says)
BAD = []


def bad(calls, argument, value, error, *words):
    for call in calls:
        name = argument
        if argument == "features" and call == "crop_and_resize":
            name = "image"
        if argument == "output_size" and not call.startswith("roi_align"):
            name = "crop_size"
        if argument == "batch_indices" and call != "roi_align, batch_indices":
            name = "box_indices"
        BAD.append((call, name, value, error, (name, *words)))


EVERY = list(CALLS)
ONE_ARRAY = ["crop_and_resize", "roi_crop", "roi_align, batch_indices"]
ALIGN = ["roi_align", "roi_align, batch_indices", "roi_align, list"]
CROPS = ["crop_and_resize", "roi_crop"]

bad(EVERY, "features", None, TypeError, "NoneType", "must be an array", "numpy.asarray")
bad(EVERY, "features", [[[[1.0]]]], TypeError, "list", "numpy.asarray")
bad(EVERY, "features", "photo.png", TypeError, "str")
bad(EVERY, "features", FEATURES[0], ValueError, "(N, C, H, W)", "(3, 8, 9)", "[None]")
bad(EVERY, "features", FEATURES[0, 0], ValueError, "(N, C, H, W)", "(8, 9)", "[None, None]")
bad(
    EVERY, "features", np.zeros((30, 40, 3), np.uint8), ValueError, "(30, 40, 3)", "np.transpose(", ", (2, 0, 1))[None]"
)
bad(
    EVERY,
    "features",
    np.zeros((3, 40, 3)),
    ValueError,
    "[None] if it is (C, H, W)",
    "(2, 0, 1))[None] if it is (H, W, C)",
)
bad(EVERY, "features", FEATURES[:, :, None], ValueError, "(2, 3, 1, 8, 9)", "3-D", ".reshape(N, C * D, H, W)")
bad(EVERY, "features", FEATURES[:, :, :0], ValueError, "(2, 3, 0, 9)", "H >= 1")
bad(EVERY, "features", FEATURES[:, :, :, :0], ValueError, "(2, 3, 8, 0)", "W >= 1")
bad(EVERY, "features", FEATURES.astype(complex), TypeError, "complex128", "float32")
bad(EVERY, "features", FEATURES.astype(object), TypeError, "object")
bad(EVERY, "features", FEATURES.astype("datetime64[s]"), TypeError, "datetime64")
bad(EVERY, "features", FEATURES.astype(np.longdouble), TypeError, "float32")
bad(ONE_ARRAY, "boxes", None, TypeError, "NoneType")
bad(ONE_ARRAY, "boxes", 3.0, TypeError, "float")
bad(ONE_ARRAY, "boxes", 3, TypeError, "int", "numpy.asarray")
bad(CROPS, "boxes", [0.0, 0.0, 1.0, 1.0], TypeError, "entry 0 is 0.0", "[boxes]")
bad(ALIGN[:2], "boxes", [0.0, 0.0, 1.0, 1.0], TypeError, "entry 0 is 0.0", "[boxes]")
bad(ONE_ARRAY, "boxes", [[0.0, 0.0, 1.0]], ValueError, "(K, 4)", "3 entries in row 0")
bad(ONE_ARRAY, "boxes", [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], ValueError, "(K, 4)", "3 entries in row 1")
bad(["roi_align"], "boxes", [[0.0, 0, 0, 1, 1], [0.0, 0, 1, 1]], ValueError, "(K, 4) or (K, 5)", "4 entries in row 1")
bad(CROPS, "boxes", [[0.0, 0.0, 0.0, 1.0, 1.0]], ValueError, "(K, 4)", "5 entries in row 0", "boxes[:, 1:]", "angle")
bad(CROPS, "boxes", [PIXELS, PIXELS], TypeError, "rows of numbers", "entry 0 is array(")
bad(CROPS, "boxes", [[[0.0, 0.0, 1.0, 1.0]]], ValueError, "(K, 4)", "1 entries in row 0")
for _entry in ("0", None, True, 1j, np.array(0.0)):
    bad(ONE_ARRAY, "boxes", [[0.0, 0.0, 1.0, _entry]], TypeError, "rows of numbers", repr(_entry), "row 0")
bad(ONE_ARRAY, "boxes", [[0, 0, 1, 10**400]], ValueError, "that a float can hold")
bad(CROPS, "boxes", ROWS, ValueError, "(2, 5)", "boxes[:, 1:]", "rotated boxes")
bad(["roi_align"], "boxes", np.zeros((2, 6)), ValueError, "(2, 6)", "rotated boxes", "not supported")
bad(ONE_ARRAY, "boxes", np.zeros(0), ValueError, "(0,)", "zeros((0, 4))")
bad(ONE_ARRAY, "boxes", PIXELS[0], ValueError, "(K, 4)", "(4,)", "[None]")
bad(ONE_ARRAY, "boxes", PIXELS[:, :3], ValueError, "(K, 4)", "(2, 3)")
bad(CROPS, "boxes", ROWS, ValueError, "(K, 4)", "(2, 5)")
bad(ONE_ARRAY, "boxes", PIXELS[None], ValueError, "(1, 2, 4)")
bad(ONE_ARRAY, "boxes", PIXELS.astype(np.int64), TypeError, "int64", "float32")
bad(ONE_ARRAY, "boxes", PIXELS.astype(bool), TypeError, "bool")
bad(ONE_ARRAY, "boxes", PIXELS.astype(complex), TypeError, "complex128")
bad(["roi_align"], "boxes", ROWS.astype(np.int32), TypeError, "int32")
bad(["roi_align"], "boxes", ROWS[:, 1:], ValueError, "batch_indices", "(2, 4)")
bad(ONE_ARRAY, "batch_indices", INDICES[:1], ValueError, "K = 2", "like boxes", "(1,)")
bad(ONE_ARRAY, "batch_indices", INDICES[:, None], ValueError, "K = 2", "(2, 1)")
bad(ONE_ARRAY, "batch_indices", np.array(0), ValueError, "K = 2", "()")
for _index in (-1, 2, np.int64(2), 2**70):
    bad(ONE_ARRAY, "batch_indices", _index, IndexError, f"is {_index}; expected a whole number in [0, 2)")
    bad(ONE_ARRAY, "batch_indices", [0, _index], IndexError, f"[1] is {_index}; expected a whole number in [0, 2)")
for _index in (True, np.True_, 0.0, "0"):
    bad(ONE_ARRAY, "batch_indices", _index, TypeError)
    bad(ONE_ARRAY, "batch_indices", [0, _index], TypeError, "list of ints", repr(_index))
bad(ONE_ARRAY, "batch_indices", [0], ValueError, "2 boxes", "got 1")
bad(ONE_ARRAY, "batch_indices", [[0, 1]], ValueError, "2 boxes", "got 1")
bad(ONE_ARRAY, "batch_indices", [[0], [1]], TypeError, "list of ints", "[0]")
bad(ONE_ARRAY, "batch_indices", INDICES.astype(np.float32), TypeError, "float32", "integers")
bad(ONE_ARRAY, "batch_indices", INDICES.astype(bool), TypeError, "bool", "integers")
bad(EVERY, "output_size", 0, ValueError, "at least 1", "0")
bad(EVERY, "output_size", -3, ValueError, "at least 1", "-3")
bad(EVERY, "output_size", (3, 0), ValueError, "(3, 0)")
bad(EVERY, "output_size", (3,), ValueError, "pair", "(3,)")
bad(EVERY, "output_size", (3, 3, 3), ValueError, "(3, 3, 3)")
bad(EVERY, "output_size", 2.0, TypeError, "2.0", "int")
bad(EVERY, "output_size", (2, 2.5), TypeError, "2.5")
bad(EVERY, "output_size", "7", TypeError, "'7'")
bad(EVERY, "output_size", None, TypeError, "None")
bad(EVERY, "output_size", True, TypeError, "True")
BAD.append(("roi_crop", "crop_size", LONG, ValueError, ("crop_size", "of type Long")))
bad(["crop_and_resize"], "method", "bicubic", ValueError, "'bilinear'", "'nearest'", "'bicubic'", "resize crops")
bad(["crop_and_resize"], "method", "linear", ValueError, "'linear'")
bad(["crop_and_resize"], "method", np.array(["bilinear"]), ValueError, "array(")
bad(["crop_and_resize"], "method", None, ValueError, "None")
bad(CROPS, "extrapolation_value", "0", TypeError, "'0'", "number")
bad(CROPS, "extrapolation_value", None, TypeError, "None")
bad(CROPS, "extrapolation_value", True, TypeError, "True")
bad(CROPS, "extrapolation_value", 1j, TypeError, "1j")
for _value in (10**400, fractions.Fraction(10**400)):
    bad(CROPS, "extrapolation_value", _value, ValueError, "that a float can hold")
bad(["roi_crop"], "transform_fpcoor", None, TypeError, "True or False", "None")
bad(["roi_crop"], "transform_fpcoor", 1, TypeError, "True or False", "1")
bad(ALIGN, "spatial_scale", 0, ValueError, "positive")
bad(ALIGN, "spatial_scale", -0.25, ValueError, "-0.25")
bad(ALIGN, "spatial_scale", float("nan"), ValueError, "nan")
bad(ALIGN, "spatial_scale", float("inf"), ValueError, "inf")
bad(ALIGN, "spatial_scale", "1/16", TypeError, "'1/16'")
bad(ALIGN, "spatial_scale", None, TypeError, "None")
bad(ALIGN, "spatial_scale", 10**400, ValueError, "that a float can hold")
bad(ALIGN, "sampling_ratio", 2.0, TypeError, "2.0", "int")
bad(ALIGN, "sampling_ratio", None, TypeError, "None")
bad(ALIGN, "sampling_ratio", 10**9, ValueError, "4096", str(10**9))

bad(ALIGN, "aligned", "yes", TypeError, "True or False", "'yes'")
bad(ALIGN, "aligned", 1, TypeError, "True or False", "1")
bad(["roi_align"], "batch_indices", INDICES, ValueError)
BAD[-1] = ("roi_align", "batch_indices", INDICES, ValueError, ("batch_indices", "(K, 5)", "first column"))
BAD.append(("roi_align, list", "batch_indices", INDICES, ValueError, ("batch_indices", "list")))
BAD.append(("roi_align, list", "boxes", [PIXELS], ValueError, ("boxes", "N = 2", "got 1")))
BAD.append(("roi_align, list", "boxes", [], ValueError, ("boxes", "N = 2", "got 0")))
BAD.append(("roi_align, list", "boxes", [PIXELS, ROWS], ValueError, ("boxes[1]", "(K, 4)", "(2, 5)")))
BAD.append(("roi_align, list", "boxes", [PIXELS, None], TypeError, ("boxes[1]", "NoneType", "numpy.asarray")))
BAD.append(("roi_align, list", "boxes", [PIXELS, PIXELS[0].tolist()], TypeError, ("boxes[1]", "[boxes[1]]")))
BAD.append(("roi_align, list", "boxes", [PIXELS, ROWS.tolist()], ValueError, ("boxes[1]", "5 entries in row 0")))
BAD.append(("roi_align, list", "boxes", [PIXELS, np.zeros(0, np.float32)], ValueError, ("boxes[1]", "zeros((0, 4))")))
BAD.append(("roi_align, list", "boxes", [[[0, 0, 1, 1]], [[0, 0, 1]]], ValueError, ("boxes[1]", "3 entries in row 0")))
BAD.append(("roi_align, list", "boxes", [[[0, 0, 1, 1]]], ValueError, ("boxes", "N = 2", "got 1")))
BAD.append(("roi_align, list", "boxes", [PIXELS, PIXELS.astype(int)], TypeError, ("boxes[1]", "int64")))
BAD.append(("roi_align", "boxes", ROWS[:, :3], ValueError, ("boxes", "(K, 4) or (K, 5)", "(2, 3)")))


@pytest.mark.parametrize(("call", "argument", "value", "error", "words"), BAD)
def test_message(call, argument, value, error, words):
    operator, arguments = CALLS[call]
    with pytest.raises(error) as caught:
        operator(**{**arguments, argument: value})
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(error):
        cr.vjp(operator, **{**arguments, argument: value})


@pytest.mark.parametrize("call", CALLS)
def test_what_is_missing_is_named(call):
    operator, arguments = CALLS[call]
    for argument in arguments:
        if (call, argument) == ("roi_align, batch_indices", "batch_indices"):
            continue
        with pytest.raises(TypeError, match=argument):
            operator(**{name: value for name, value in arguments.items() if name != argument})


@pytest.mark.parametrize("index", [-1, 2, 2**31, -(2**63)])
def test_batch_index_out_of_range(index, backend):
    indices = np.array([0, index])
    for operator, boxes in ((cr.crop_and_resize, NORMALIZED), (cr.roi_crop, PIXELS)):
        with cr.checked(), pytest.raises(IndexError, match=rf"box 1 is {index};.*\[0, 2\)"):
            backend(operator, FEATURES, boxes, indices, 2)
    with cr.checked(), pytest.raises(IndexError, match=f"box 1 is {index};"):
        backend(cr.roi_align, FEATURES, PIXELS, 2, batch_indices=indices)


@pytest.mark.parametrize("index", [-1, 2, 1e30, -1e30, np.nan, np.inf, 0.5, 1.25])
def test_batch_index_in_a_column(index, backend):
    rows = ROWS.copy()
    rows[1, 0] = index
    with cr.checked(), pytest.raises(IndexError, match=r"box 1 is .*whole number in"):
        backend(cr.roi_align, FEATURES, rows, 2)


def test_the_first_bad_row_is_named():
    with pytest.raises(IndexError, match="box 1 "):
        cr.roi_crop(FEATURES, np.zeros((4, 4), np.float32), np.array([0, 9, 0, -9]), 2)


def test_index_noise_in_a_column_does_not_move_a_box_to_another_image():
    rows = ROWS.astype(np.float64)
    exact = cr.roi_align(FEATURES, rows, 2)
    rows[:, 0] -= 1e-6
    np.testing.assert_array_equal(cr.roi_align(FEATURES, rows, 2), exact)


@pytest.mark.parametrize("noise", [1e-6, 0.015])
def test_how_much_noise_an_index_may_have(noise):
    rows = ROWS.astype(np.float64)
    rows[1, 0] += noise
    np.testing.assert_array_equal(cr.roi_align(FEATURES, rows, 2), cr.roi_align(FEATURES, ROWS.astype(np.float64), 2))
    rows[1, 0] = 1 + 0.016
    with pytest.raises(IndexError):
        cr.roi_align(FEATURES, rows, 2)


def test_the_last_image_of_a_narrow_column():
    """2049 images, which is no float16; 2048, the index of the last, is."""
    images = np.broadcast_to(np.float32(1), (2049, 1, 2, 2))
    assert cr.roi_align(images, np.array([[2048, 0, 0, 1, 1]], np.float16), 1).item() == 1


def test_most_samples():
    assert np.isfinite(cr.roi_align(FEATURES, ROWS, 1, sampling_ratio=4096)).all()


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_masked_arrays_and_matrices():
    with pytest.raises(TypeError, match="features is a masked array"):
        cr.roi_crop(np.ma.masked_array(FEATURES), PIXELS, INDICES, 2)
    np.testing.assert_array_equal(cr.roi_align(FEATURES, np.matrix(ROWS), 2), cr.roi_align(FEATURES, ROWS, 2))


def test_no_images_but_boxes():
    with pytest.raises(IndexError, match="box 0 is 0; there are no images"):
        cr.roi_crop(FEATURES[:0], PIXELS, np.array([0, 0]), 2)


def test_a_bad_index_is_found_even_where_there_is_nothing_to_compute():
    with pytest.raises(IndexError):
        cr.roi_crop(FEATURES[:, :0], PIXELS, np.array([0, 7]), 2)


@pytest.mark.parametrize(("dtype", "exact"), [(np.float16, 2048), (np.float32, 2**24)])
def test_a_column_too_narrow_for_the_batch_index(dtype, exact):
    images = np.broadcast_to(np.float32(1), (exact + 2, 1, 2, 2))
    with pytest.raises(ValueError, match=f"boxes of dtype {np.dtype(dtype)} cannot hold a batch index above {exact}"):
        cr.roi_align(images, np.zeros((1, 5), dtype), 1)
    assert cr.roi_align(images[: exact + 1], np.zeros((1, 5), dtype), 1).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("grad", "error", "words"),
    [
        (np.ones((2, 3, 2, 2), np.float32), ValueError, ("grad_output", "(2, 3, 2, 3)", "(2, 3, 2, 2)")),
        (np.ones((2, 3, 2, 3), int), TypeError, ("grad_output", "int64")),
        (None, TypeError, ("grad_output", "NoneType")),
    ],
)
def test_pullback(grad, error, words):
    _, pullback = cr.vjp(cr.roi_crop, **ROI_CROP)
    with pytest.raises(error) as caught:
        pullback(grad)
    for word in words:
        assert word in str(caught.value)


class Unhashable:
    __hash__ = None

    def __call__(self):
        return None


@pytest.mark.parametrize("operator", [None, "roi_align", np.add, lambda *args: None, Unhashable(), [cr.roi_align]])
def test_vjp_of_another_function(operator):
    with pytest.raises(TypeError, match="operator must be one of crop_and_resize, roi_crop, roi_align"):
        cr.vjp(operator, FEATURES, PIXELS, INDICES, 2)


def test_two_libraries():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"features and boxes .*numpy.ndarray on the CPU and torch.Tensor on the CPU"):
        cr.roi_crop(FEATURES, torch.from_numpy(PIXELS), INDICES, 2)
    with pytest.raises(TypeError, match=r"features and boxes\[1\]"):
        cr.roi_align(FEATURES, [PIXELS, torch.from_numpy(PIXELS)], 2)


class OnGpu:
    """As much as a GPU array says of itself."""

    shape, ndim, dtype = (1, 1, 4, 4), 4, np.dtype(np.float32)

    def __init__(self, number):
        self.number = number

    def __dlpack_device__(self):
        return (2, self.number)


def test_arrays_on_a_gpu():
    with pytest.raises(
        TypeError,
        match=r"features must be in the CPU's memory, a CuPy array or a CUDA tensor; got .*OnGpu on GPU 1; copy it",
    ):
        cr.roi_crop(OnGpu(1), OnGpu(1), OnGpu(1), 2)
    with pytest.raises(TypeError, match=r"OnGpu on GPU 0 and .*OnGpu on GPU 1"):
        cr.roi_crop(OnGpu(0), OnGpu(1), OnGpu(0), 2)


class OnRocm(OnGpu):
    __module__ = "cupy"

    def __dlpack_device__(self):
        return (10, self.number)


def test_arrays_of_a_cupy_for_rocm(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=OnRocm))
    for kind in (OnRocm, type("Derived", (OnRocm,), {"__module__": "elsewhere"})):
        with pytest.raises(TypeError, match=r"features must be .* on GPU 1 \(ROCm\).*built for ROCm, and the kernels"):
            cr.roi_crop(kind(1), kind(1), kind(1), 2)


def test_tensors_of_a_torch_for_rocm(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(dispatch, "_kind", lambda array: ("torch", "cuda:0"))
    with pytest.raises(TypeError, match=r"features must be .*torch.Tensor on cuda:0; this PyTorch is built for ROCm"):
        cr.roi_crop(*map(torch.from_numpy, (FEATURES, PIXELS, INDICES)), 2)


class Foundling:
    """An array whose library is imported in part only, or shadowed by a folder of its name."""

    def __init__(self, array):
        self.shape, self.dtype, self.array = array.shape, array.dtype, array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=np.from_dlpack)


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_a_library_that_is_imported_in_part(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    expected = cr.roi_crop(FEATURES, PIXELS, INDICES, 2)
    np.testing.assert_array_equal(cr.roi_crop(*map(Foundling, (FEATURES, PIXELS, INDICES)), 2), expected)
    with pytest.raises(TypeError, match="boxes must be an array"):
        cr.roi_crop(FEATURES, None, INDICES, 2)


# ---- names ----


def test_errors_name_arguments_as_the_caller_knows_them():
    torch = pytest.importorskip("torch")
    import cupy_roialign.torch as crt
    import cupy_roialign.torchvision as ops

    features, boxes, indices = map(torch.from_numpy, (FEATURES, PIXELS, INDICES))
    for operator in (ops.roi_align, crt.roi_align):
        for bad_features, words in ((features[0], r"input\[None\]"), (FEATURES, "input and boxes"), (None, "NoneType")):
            with pytest.raises((TypeError, ValueError), match=f"^input .*{words}|^{words}"):
                operator(bad_features, torch.from_numpy(ROWS), 2)
        with pytest.raises(ValueError, match="one for each image of input"):
            operator(features, [boxes] * 3, 2)
    for make, name in ((crt.RoIAlign, "featuremap"), (crt.CropAndResize, "image")):
        with pytest.raises(ValueError, match=f"^{name} must have 4 axes"):
            make(2, 2)(features[0], boxes, indices)
        with pytest.raises(ValueError, match=r"^box_ind must have shape"):
            make(2, 2)(features, boxes, indices[:1])
    with pytest.raises(ValueError, match=r"^box_ind must have shape"):
        crt.CropAndResizeFunction.apply(features, boxes, indices[:1], 2, 2)


# ---- broken boxes ----

VALUES = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("call", ["crop_and_resize", "roi_crop", "roi_align", "roi_align, batch_indices"])
@pytest.mark.parametrize("value", VALUES)
def test_not_finite_boxes_give_nan_and_leave_the_others_alone(call, value, backend):
    operator, arguments = CALLS[call]
    arguments = dict(arguments)
    boxes = arguments.pop("boxes")
    first = arguments.pop("image" if operator is cr.crop_and_resize else "features")
    shape = (2, 3, 2, 3)
    cotangent = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    alone = cotangent.copy()
    alone[0] = 0
    expected, expected_features, expected_boxes = backend.vjp(operator, first, boxes, **arguments, cotangent=alone)
    for column in range(boxes.shape[1] - 4, boxes.shape[1]):
        broken = boxes.copy()
        broken[0, column] = value
        output, grad_features, grad_boxes = backend.vjp(operator, first, broken, **arguments, cotangent=cotangent)
        assert np.isnan(output[0]).all()
        np.testing.assert_array_equal(output[1], expected[1])
        np.testing.assert_array_equal(grad_features, expected_features)
        assert np.isnan(grad_boxes[0, -4:]).all()
        np.testing.assert_array_equal(grad_boxes[0, :-4], 0)
        np.testing.assert_array_equal(grad_boxes[1], expected_boxes[1])


@pytest.mark.parametrize("sampling_ratio", [-1, 2])
def test_a_box_without_an_end_is_not_widened(sampling_ratio, backend):
    features = np.ones((1, 2, 6, 6), np.float32)
    cotangent = np.ones((2, 2, 2, 2), np.float32)
    for broken in ([0, 1, 1, -np.inf, 4], [0, 1, 1, 4, -np.inf]):
        boxes = np.array([broken, [0, 2, 2, 5, 5]], np.float32)
        output, grad_features, grad_boxes = backend.vjp(
            cr.roi_align, features, boxes, 2, sampling_ratio=sampling_ratio, aligned=False, cotangent=cotangent
        )
        assert np.isnan(output[0]).all()
        assert np.isnan(grad_boxes[0, 1:]).all()
        np.testing.assert_array_equal(output[1], 1)
        np.testing.assert_array_equal(grad_features[..., 1, 1], 0)
        np.testing.assert_allclose(grad_features.sum(), 8, rtol=1e-6)


HUGE = [
    [-1e30, -1e30, 1e30, 1e30],
    [1e30, 1e30, 2e30, 2e30],
    [0, 0, 3e38, 3e38],
    [-3e38, -3e38, 3e38, 3e38],
    [3e38, 3e38, -3e38, -3e38],
    [1e-45, 1e-45, 1e-44, 1e-44],
]


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("call", ["crop_and_resize", "roi_crop", "roi_align, batch_indices"])
def test_huge_and_tiny_boxes(call, real, backend):
    operator, arguments = CALLS[call]
    arguments = {**arguments, "boxes": np.array(HUGE, real)}
    for name in ("box_indices", "batch_indices"):
        if name in arguments:
            arguments[name] = np.zeros(len(HUGE), int)
    boxes = arguments.pop("boxes")
    first = arguments.pop("image" if operator is cr.crop_and_resize else "features")
    for options in ({}, {"sampling_ratio": 2}, {"aligned": True}) if operator is cr.roi_align else ({},):
        cotangent = np.ones((len(HUGE), 3, 2, 3), np.float32)
        output, grad_features, grad_boxes = backend.vjp(
            operator, first, boxes, **arguments, **options, cotangent=cotangent
        )
        assert np.isfinite(output).all()
        assert np.isfinite(grad_features).all()
        assert np.isfinite(grad_boxes).all()
        assert np.abs(output[:5]).max() <= np.abs(FEATURES).max()


WIDTH = 2**24 + 4  # of which float32 rounds the last pixel's number, WIDTH - 1, up to WIDTH


@pytest.mark.parametrize(
    ("operator", "box", "expected"),
    [
        (cr.roi_align, [WIDTH, 0, WIDTH + 2, 1], 7.0),  # clamped to the last pixel
        (cr.roi_crop, [WIDTH - 2, 0, WIDTH - 2, 0], 5.0),
        (cr.roi_crop, [WIDTH, 0, WIDTH, 0], 0.0),
        (cr.crop_and_resize, [0, 1, 0, 1], 0.0),  # its position comes out as WIDTH, outside
    ],
)
def test_an_image_too_wide_for_positions_to_be_exact(operator, box, expected, backend):
    image = np.zeros((1, 1, 1, WIDTH), np.float32)
    image[..., -2:] = 5, 7
    boxes = np.array([box], np.float32)
    options = {"sampling_ratio": 1} if operator is cr.roi_align else {}
    if operator is cr.roi_crop:
        options["transform_fpcoor"] = False
    if operator is cr.roi_align:
        output = backend(operator, image, boxes, 1, batch_indices=np.array([0]), **options)
    else:
        output = backend(operator, image, boxes, np.array([0]), 1, **options)
    assert output.item() == expected


def test_inverted_and_empty_boxes():
    image = np.arange(36, dtype=np.float64).reshape(1, 1, 6, 6)
    one = np.array([0])
    forward = cr.crop_and_resize(image, np.array([[0.1, 0.2, 0.9, 0.7]]), one, 4)
    np.testing.assert_allclose(
        cr.crop_and_resize(image, np.array([[0.9, 0.7, 0.1, 0.2]]), one, 4), forward[:, :, ::-1, ::-1], rtol=1e-12
    )
    point = cr.roi_crop(image, np.array([[2.5, 3.5, 2.5, 3.5]]), one, 2)
    np.testing.assert_array_equal(point, np.full((1, 1, 2, 2), image[0, 0, 3, 2]))
    flipped = np.array([[0, 4.5, 4.5, 1.5, 1.5]])
    assert (cr.roi_align(image, flipped, 2, aligned=True) == 0).all()  # no sample: an adaptive grid of none
    mirrored = cr.roi_align(image, flipped, 2, sampling_ratio=2, aligned=True)
    upright = cr.roi_align(image, np.array([[0, 1.5, 1.5, 4.5, 4.5]]), 2, sampling_ratio=2, aligned=True)
    np.testing.assert_allclose(mirrored, upright[:, :, ::-1, ::-1], rtol=1e-12)
    one_pixel = cr.roi_align(image, np.array([[0, 4.5, 4.5, 5.5, 5.5]]), 2)
    np.testing.assert_array_equal(cr.roi_align(image, flipped, 2), one_pixel)


# ---- values that are not finite in features and gradients ----


@pytest.mark.parametrize("channels", [2, 20])
@pytest.mark.parametrize("value", VALUES)
def test_a_bad_pixel_reaches_only_the_bins_that_touch_it(channels, value, backend):
    rng = np.random.default_rng(0)
    features = rng.uniform(-1, 1, (1, channels, 20, 20)).astype(np.float32)
    boxes, indices = np.array([[1.3, 1.2, 18.4, 17.7], [2, 2, 9, 9]], np.float32), np.array([0, 0])
    clean, _, _ = backend.vjp(cr.roi_crop, features, boxes, indices, (5, 30))
    touched, _, _ = backend.vjp(
        cr.roi_crop, (np.arange(400).reshape(1, 1, 20, 20) == 7 * 20 + 5).astype(np.float32), boxes, indices, (5, 30)
    )
    features[0, 1, 7, 5] = value
    output, _, _ = backend.vjp(cr.roi_crop, features, boxes, indices, (5, 30))
    expected = clean.copy()
    expected[:, 1][touched[:, 0] > 0] = value
    assert (touched > 0).any()
    tolerance.assert_close(output, expected, tolerance.OUTPUT["float32"])


@pytest.mark.parametrize("channels", [2, 20])
@pytest.mark.parametrize("value", VALUES)
def test_a_bad_gradient_reaches_only_the_pixels_that_made_its_bin(channels, value, backend):
    features = np.ones((1, channels, 20, 20), np.float32)
    boxes, indices = np.array([[1.3, 1.2, 18.4, 17.7]], np.float32), np.array([0])
    cotangent = np.random.default_rng(0).uniform(0.5, 1, (1, channels, 5, 30)).astype(np.float32)
    _, clean, _ = backend.vjp(cr.roi_crop, features, boxes, indices, (5, 30), cotangent=cotangent)
    only = np.zeros_like(cotangent)
    only[0, 1, 2, 9] = 1
    _, touched, _ = backend.vjp(cr.roi_crop, features, boxes, indices, (5, 30), cotangent=only)
    cotangent[0, 1, 2, 9] = value
    _, gradient, _ = backend.vjp(cr.roi_crop, features, boxes, indices, (5, 30), cotangent=cotangent)
    expected = clean.copy()
    expected[touched > 0] = value
    assert 1 <= (touched > 0).sum() <= 4
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("channels", [2, 20])
def test_a_bad_pixel_that_no_sample_touches_leaves_the_gradient_to_the_boxes_alone(channels, backend):
    rng = np.random.default_rng(0)
    features = rng.uniform(-1, 1, (1, channels, 20, 20)).astype(np.float32)
    boxes, indices = np.array([[1.3, 1.2, 18.4, 17.7]], np.float32), np.array([0])
    cotangent = rng.uniform(-1, 1, (1, channels, 7, 7)).astype(np.float32)
    touched, _, _ = backend.vjp(
        cr.roi_crop, (np.arange(400).reshape(1, 1, 20, 20) == 209).astype(np.float32), boxes, indices, 7
    )
    assert not touched.any()
    _, _, clean = backend.vjp(cr.roi_crop, features, boxes, indices, 7, cotangent=cotangent)
    features[0, 1, 10, 9] = np.inf
    _, _, gradient = backend.vjp(cr.roi_crop, features, boxes, indices, 7, cotangent=cotangent)
    np.testing.assert_allclose(gradient, clean, rtol=1e-4, atol=1e-4)


def test_both_infinities_in_one_bin():
    features = np.zeros((1, 1, 4, 4), np.float32)
    features[0, 0, 1, 1], features[0, 0, 1, 2], features[0, 0, 3, 3] = np.inf, -np.inf, np.inf
    output = cr.roi_align(features, np.array([[0, 0, 0, 4, 4]], np.float32), 2, 1.0, 1, True)
    np.testing.assert_array_equal(output[0, 0], np.array([[np.inf, -np.inf], [0, np.inf]]))
    assert np.isnan(cr.roi_align(features, np.array([[0, 0, 0, 4, 4]], np.float32), 1, 1.0, 2, True)).all()
