"""dtypes, memory orders, empty arrays, views: what goes in, what comes out, and what is left alone."""

import numpy as np
import pytest

import cupy_roialign as cr
from tests import tolerance
from tests.backends import bfloat16
from tests.test_gradients import CALLS, PIXEL_BOXES
from tests.test_oracle import lay_out

INDICES = np.array([0, 1, 1, 0])


def values(channels=3, dtype=np.float32):
    return np.random.default_rng(11).uniform(-1, 1, (2, channels, 8, 11)).astype(dtype)


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("name", CALLS)
def test_every_memory_order_gives_the_same(name, channels, backend):
    operator, boxes, args, kwargs = CALLS[name]
    features = values(channels)
    boxes = boxes.astype(np.float32)
    cotangent = np.random.default_rng(1).uniform(-1, 1, backend(operator, features, boxes, *args, **kwargs).shape)
    cotangent = cotangent.astype(np.float32)
    expected = backend.vjp(operator, features, boxes, *args, **kwargs, cotangent=cotangent)
    limits = [tolerance.OUTPUT, tolerance.GRADIENT, tolerance.GRADIENT]
    for order in backend.orders:
        laid_out = lay_out(features.copy(), order)
        actual = backend.vjp(operator, laid_out, boxes, *args, **kwargs, cotangent=lay_out(cotangent.copy(), order))
        for a, b, allowed in zip(actual, expected, limits, strict=True):
            assert a.dtype == b.dtype
            tolerance.assert_close(a, b, allowed["float32"])


def memory_order(array):
    return tuple(np.argsort([-s for s in array.strides], kind="stable"))


@pytest.mark.parametrize("channels", [3, 20])
def test_channels_last_in_channels_last_out(channels, backend):
    features = lay_out(values(channels), "channels-last")
    cotangent = np.ones((4, channels, 3, 4), np.float32)
    output, gradient, _ = backend.vjp(cr.roi_crop, features, PIXEL_BOXES, INDICES, (3, 4), cotangent=cotangent)
    assert memory_order(output) == memory_order(gradient) == (0, 2, 3, 1)
    assert gradient.strides == features.strides
    output, gradient, _ = backend.vjp(cr.roi_crop, values(channels), PIXEL_BOXES, INDICES, (3, 4), cotangent=cotangent)
    assert memory_order(output) == memory_order(gradient) == (0, 1, 2, 3)


def test_nhwc_users_need_no_copy():
    photo = np.random.default_rng(0).uniform(0, 255, (2, 30, 40, 3)).astype(np.float32)
    crops = cr.crop_and_resize(photo.transpose(0, 3, 1, 2), np.array([[0.1, 0.2, 0.5, 0.6]]), np.array([1]), 7)
    assert crops.transpose(0, 2, 3, 1).flags.c_contiguous


FLOATS = [np.float16, np.float32, np.float64]
BFLOAT16 = pytest.param(bfloat16, marks=pytest.mark.skipif(bfloat16 is None, reason="no ml_dtypes"), id="bfloat16")
INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.bool_]


@pytest.mark.parametrize("dtype", [*FLOATS, BFLOAT16])
@pytest.mark.parametrize("channels", [3, 20])
def test_floating_features_keep_their_dtype(dtype, channels):
    features = values(channels).astype(dtype)
    output, pullback = cr.vjp(cr.roi_crop, features, PIXEL_BOXES, INDICES, 3)
    cotangent = np.random.default_rng(2).uniform(-1, 1, output.shape).astype(np.float32)
    gradient, grad_boxes = pullback(cotangent)
    assert output.dtype == gradient.dtype == dtype
    assert grad_boxes.dtype == PIXEL_BOXES.dtype
    exact, exact_pullback = cr.vjp(cr.roi_crop, features.astype(np.float64), PIXEL_BOXES, INDICES, 3)
    exact_gradient, exact_boxes = exact_pullback(cotangent)
    name = np.dtype(dtype).name
    tolerance.assert_close(output, exact, tolerance.OUTPUT[name])
    tolerance.assert_close(gradient, exact_gradient, tolerance.GRADIENT[name])
    tolerance.assert_close(grad_boxes, exact_boxes, tolerance.GRADIENT["float64" if dtype == np.float64 else "float32"])


def test_half_precision_is_summed_in_float32():
    """A thousand boxes add up on one pixel; in float16 the sum would stop growing at 2048."""
    features = np.zeros((1, 1, 2, 2), np.float16)
    boxes = np.zeros((6000, 4), np.float32)
    output, pullback = cr.vjp(cr.crop_and_resize, features, boxes, np.zeros(6000, int), 1)
    assert pullback(np.ones_like(output))[0][0, 0, 0, 0] == 6000


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("channels", [3, 20])
def test_integers_and_booleans_give_float32(dtype, channels, backend):
    features = np.random.default_rng(3).integers(0, 2 if dtype == np.bool_ else 100, (2, channels, 8, 11)).astype(dtype)
    output = backend(cr.roi_crop, features, PIXEL_BOXES, INDICES, 3)
    assert output.dtype == np.float32
    tolerance.assert_close(
        output, cr.roi_crop(features.astype(np.float64), PIXEL_BOXES, INDICES, 3), tolerance.OUTPUT["float32"]
    )


def test_the_gradient_to_integer_features_is_float32():
    output, pullback = cr.vjp(cr.roi_crop, np.ones((2, 3, 8, 11), np.uint8), PIXEL_BOXES, INDICES, 3)
    assert pullback(np.ones_like(output))[0].dtype == np.float32


def test_positions_are_computed_in_the_wider_precision():
    """A sample beyond the last pixel by 1e-9 of a pixel, which float32 does not tell from that pixel."""
    features = np.ones((1, 1, 4, 4), np.float32)
    box = np.array([[0.5, 0.5, 3.5 + 1e-9, 3.5]])
    one = np.array([0])
    assert cr.roi_crop(features, box.astype(np.float32), one, (1, 1), transform_fpcoor=False).item() == 1
    corners = {"extrapolation_value": 9.0, "transform_fpcoor": False}
    edge = np.array([[3 + 1e-9, 3.0, 3 + 1e-9, 3.0]])
    assert cr.roi_crop(features, edge, one, 1, **corners).item() == 9
    assert cr.roi_crop(features, edge.astype(np.float32), one, 1, **corners).item() == 1
    low = np.nextafter(np.float32(0.1), np.float32(0))  # 3 * low is 0.3 in float32, a little less in float64
    box = np.array([[0.0, low * 10, 0.0, low * 10]], np.float32)
    wide = cr.roi_align(features.astype(np.float64), box, 1, batch_indices=one)
    np.testing.assert_array_equal(
        wide, cr.roi_align(features.astype(np.float64), box.astype(np.float64), 1, batch_indices=one)
    )


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, ">f2", ">f4", ">f8"])
def test_boxes_of_other_dtypes(dtype):
    boxes = np.array([[1, 0.5, 8, 6], [2, 2, 4.25, 7]]).astype(dtype)
    real = np.float64 if np.dtype(dtype).itemsize == 8 else np.float32
    output, pullback = cr.vjp(cr.roi_crop, values(), boxes, INDICES[:2], 3)
    np.testing.assert_array_equal(output, cr.roi_crop(values(), boxes.astype(real), INDICES[:2], 3))
    assert pullback(np.ones_like(output))[1].dtype == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">i4"]
)
def test_indices_of_any_integer_dtype(dtype):
    expected = cr.roi_crop(values(), PIXEL_BOXES, INDICES, 3)
    np.testing.assert_array_equal(cr.roi_crop(values(), PIXEL_BOXES, INDICES.astype(dtype), 3), expected)


def test_box_formats_agree(backend):
    features = values()
    boxes = PIXEL_BOXES[[0, 3, 1, 2]].astype(np.float32)
    indices = np.array([0, 0, 1, 1])
    rows = np.concatenate([indices[:, None].astype(np.float32), boxes], axis=1)
    expected = backend(cr.roi_align, features, rows, (3, 2), 0.5, 2, True)
    listed = backend(cr.roi_align, features, [boxes[:2], boxes[2:]], (3, 2), 0.5, 2, True)
    np.testing.assert_array_equal(listed, expected)
    beside = backend(cr.roi_align, features, boxes, (3, 2), 0.5, 2, True, batch_indices=indices)
    np.testing.assert_array_equal(beside, expected)
    uneven = backend(cr.roi_align, features, [boxes[:0], boxes], (3, 2), 0.5, 2, True)
    np.testing.assert_array_equal(uneven[2:], expected[2:])


@pytest.mark.parametrize("size", [7, (7, 7), [7, 7], np.array([7, 7]), np.int64(7), np.array(7)])
def test_sizes(size):
    assert cr.roi_crop(values(), PIXEL_BOXES, INDICES, size).shape == (4, 3, 7, 7)


def test_zero_and_minus_one_samples_are_both_adaptive():
    rows = np.concatenate([INDICES[:, None], PIXEL_BOXES], axis=1)
    np.testing.assert_array_equal(cr.roi_align(values(), rows, 2), cr.roi_align(values(), rows, 2, sampling_ratio=0))


@pytest.mark.parametrize("order", ["contiguous", "channels-last"])
@pytest.mark.parametrize(("images", "channels", "count"), [(2, 3, 0), (0, 3, 0), (2, 0, 2), (0, 0, 0), (2, 20, 0)])
def test_nothing_in_nothing_out(images, channels, count, order, backend):
    features = lay_out(np.zeros((images, channels, 4, 5), np.float32), order)
    boxes, indices = np.zeros((count, 4), np.float32), np.zeros(count, np.int64)
    cotangent = np.ones((count, channels, 2, 3), np.float32)
    for operator in (cr.crop_and_resize, cr.roi_crop):
        output, grad_features, grad_boxes = backend.vjp(operator, features, boxes, indices, (2, 3), cotangent=cotangent)
        assert output.shape == cotangent.shape
        assert grad_features.shape == features.shape
        np.testing.assert_array_equal(grad_boxes, boxes)
        assert not grad_features.any()
    rows = np.zeros((count, 5), np.float32)
    assert backend(cr.roi_align, features, rows, (2, 3)).shape == cotangent.shape
    if count == 0:
        assert backend(cr.roi_align, features, [boxes] * images, (2, 3)).shape == cotangent.shape


def test_inputs_are_not_written_to(backend):
    rows = np.concatenate([INDICES[:, None], PIXEL_BOXES], axis=1).astype(np.float32)
    rows[1, 2] = np.nan
    features, before = values(20), (values(20), rows.copy())
    cotangent = np.ones((4, 20, 3, 3), np.float32)
    backend.vjp(cr.roi_align, features, rows, 3, cotangent=cotangent)
    np.testing.assert_array_equal(features, before[0])
    np.testing.assert_array_equal(rows, before[1])
    assert (cotangent == 1).all()


def test_read_only_everything():
    arrays = [values(), PIXEL_BOXES.copy(), INDICES.copy(), np.ones((4, 3, 3, 3), np.float32)]
    for array in arrays:
        array.flags.writeable = False
    output, pullback = cr.vjp(cr.roi_crop, *arrays[:3], 3)
    assert output.flags.writeable
    assert all(g.flags.writeable for g in pullback(arrays[3]))


def test_broadcast_features_are_not_made_whole():
    """One plane shown as many channels, by a stride of 0."""
    plane = values(1)
    output = cr.roi_crop(np.broadcast_to(plane, (2, 40, 8, 11)), PIXEL_BOXES, INDICES, 3)
    tolerance.assert_close(output, np.repeat(cr.roi_crop(plane, PIXEL_BOXES, INDICES, 3), 40, axis=1), 1e-6)


def test_extrapolation_values():
    outside = np.array([[-5.0, -5.0, -3.0, -3.0]])
    for value in (0, 2.5, -1e30, np.float32(3), np.nan, np.inf, 10**20):
        crop = cr.roi_crop(values(), outside, INDICES[:1], 2, value)
        np.testing.assert_array_equal(crop, np.float32(value))
    assert (cr.roi_crop(values(dtype=np.float16), outside, INDICES[:1], 2, 1e9) == np.inf).all()


class Foreign:
    """An array of another library: DLPack and a namespace, nothing more."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __len__(self):
        return len(self.array)

    def __getitem__(self, key):
        return Foreign(self.array[key])

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __array_namespace__(self):
        return Foreign

    @staticmethod
    def from_dlpack(array):
        return Foreign(np.from_dlpack(array))


def test_an_array_of_another_library_comes_back_as_its_own_kind():
    rows = np.concatenate([INDICES[:, None], PIXEL_BOXES], axis=1)
    output, pullback = cr.vjp(cr.roi_align, Foreign(values()), Foreign(rows), 3)
    expected, expected_pullback = cr.vjp(cr.roi_align, values(), rows, 3)
    assert isinstance(output, Foreign)
    np.testing.assert_array_equal(output.array, expected)
    for a, b in zip(pullback(Foreign(np.ones_like(expected))), expected_pullback(np.ones_like(expected)), strict=True):
        assert isinstance(a, Foreign)
        np.testing.assert_array_equal(a.array, b)
    listed = cr.roi_align(Foreign(values()), [Foreign(rows[:2, 1:]), Foreign(rows[2:, 1:])], 3)
    np.testing.assert_array_equal(listed.array, cr.roi_align(values(), [rows[:2, 1:], rows[2:, 1:]], 3))


class Strict(Foreign):
    """Takes an index for each axis, and has no length, as the array API has it."""

    __len__ = None

    def __getitem__(self, key):
        if not isinstance(key, tuple) or len(key) != len(self.shape):
            raise IndexError(f"{key} is no index of {len(self.shape)} axes")
        return Strict(self.array[key])

    def __array_namespace__(self):
        return Strict

    @staticmethod
    def from_dlpack(array):
        return Strict(np.from_dlpack(array))


def test_vjp_of_arrays_that_take_an_index_for_each_axis():
    boxes = [PIXEL_BOXES[:1], PIXEL_BOXES[1:]]
    output, pullback = cr.vjp(cr.roi_align, Strict(values()), [*map(Strict, boxes)], 3)
    expected, expected_pullback = cr.vjp(cr.roi_align, values(), boxes, 3)
    np.testing.assert_array_equal(output.array, expected)
    grad, parts = pullback(Strict(np.ones_like(expected)))
    expected_grad, expected_parts = expected_pullback(np.ones_like(expected))
    for a, b in zip([grad, *parts], [expected_grad, *expected_parts], strict=True):
        np.testing.assert_array_equal(a.array, b)


def test_an_array_that_cannot_be_made_again():
    class Mute(Foreign):
        __array_namespace__ = None

    with pytest.raises(TypeError, match=r"numpy.from_dlpack\(features\)"):
        cr.roi_crop(Mute(values()), Mute(PIXEL_BOXES), Mute(INDICES), 3)


def test_an_array_that_numpy_cannot_take():
    class Odd(Foreign):
        def __dlpack__(self, **kwargs):
            raise BufferError("no float4")

    message = r"features must be .* over DLPack; got .*Odd on the CPU of dtype float32 \(no float4\)"
    with pytest.raises(TypeError, match=message):
        cr.roi_crop(Odd(values()), Odd(PIXEL_BOXES), Odd(INDICES), 3)
    output, pullback = cr.vjp(cr.roi_crop, Foreign(values()), Foreign(PIXEL_BOXES), Foreign(INDICES), 3)
    with pytest.raises(TypeError, match="grad_output must be"):
        pullback(Odd(output.array))


def test_subclasses_of_cupy_arrays(cupy):
    derived = type("Derived", (cupy.ndarray,), {"__module__": "elsewhere"})
    given = [cupy.asarray(array) for array in (values(), PIXEL_BOXES, INDICES)]
    own = [derived(a.shape, a.dtype, a.data, a.strides) for a in given]
    output = cr.roi_crop(*own, 3)
    assert type(output) is cupy.ndarray
    np.testing.assert_array_equal(output.get(), cr.roi_crop(*given, 3).get())
    np.testing.assert_array_equal(cr.roi_crop(own[0], *given[1:], 3).get(), output.get())


# ---- numbers in place of arrays ----


def tuples(numbers):
    return tuple(map(tuples, numbers)) if isinstance(numbers, list) else numbers


def numpy_numbers(numbers):
    return [numpy_numbers(part) if isinstance(part, list) else np.float32(part) for part in numbers]


@pytest.mark.parametrize("make", [lambda numbers: numbers, tuples, numpy_numbers])
def test_lists_of_numbers_are_boxes(make, backend):
    boxes = PIXEL_BOXES.astype(np.float32)
    rows = np.concatenate([INDICES[:, None].astype(np.float32), boxes], axis=1)
    features = values()
    for operator in (cr.roi_crop, cr.crop_and_resize):
        expected = backend(operator, features, boxes, INDICES, 3)
        np.testing.assert_array_equal(backend(operator, features, make(boxes.tolist()), INDICES, 3), expected)
    expected = backend(cr.roi_align, features, rows, 3)
    np.testing.assert_array_equal(backend(cr.roi_align, features, make(rows.tolist()), 3), expected)
    actual = backend(cr.roi_align, features, make(boxes.tolist()), 3, batch_indices=INDICES)
    np.testing.assert_array_equal(actual, expected)
    by_image = [boxes[np.equal(INDICES, i)] for i in (0, 1)]
    expected = backend(cr.roi_align, features, by_image, 3)
    listed = [part.tolist() for part in by_image]
    np.testing.assert_array_equal(backend(cr.roi_align, features, make(listed), 3), expected)


def test_lists_of_ints_are_indices(backend):
    features, boxes = values(), PIXEL_BOXES.astype(np.float32)
    expected = backend(cr.roi_crop, features, boxes, INDICES, 3)
    for indices in (INDICES.tolist(), tuple(INDICES.tolist()), list(INDICES.astype(np.uint8))):
        np.testing.assert_array_equal(backend(cr.roi_crop, features, boxes, indices, 3), expected)
        actual = backend(cr.crop_and_resize, features, boxes / 10, indices, 3)
        np.testing.assert_array_equal(actual, backend(cr.crop_and_resize, features, boxes / 10, INDICES, 3))
        actual = backend(cr.roi_align, features, boxes, 3, batch_indices=indices)
        np.testing.assert_array_equal(actual, backend(cr.roi_align, features, boxes, 3, batch_indices=INDICES))


@pytest.mark.parametrize("index", [1, np.int64(1), np.uint8(1)])
def test_an_int_puts_all_boxes_on_one_image(index, backend):
    features, boxes, all_of_it = values(), PIXEL_BOXES.astype(np.float32), np.ones(4, np.int64)
    expected = backend(cr.roi_crop, features, boxes, all_of_it, 3)
    np.testing.assert_array_equal(backend(cr.roi_crop, features, boxes, index, 3), expected)
    expected = backend(cr.roi_align, features, boxes, 3, batch_indices=all_of_it)
    np.testing.assert_array_equal(backend(cr.roi_align, features, boxes, 3, batch_indices=index), expected)
    assert backend(cr.roi_crop, features, boxes[:0], index, 3).shape == (0, 3, 3, 3)


@pytest.mark.parametrize("index", [2, -1])
def test_numbers_are_checked_on_every_device(index, backend):
    """Without `checked`: there is nothing to wait for."""
    for indices in (index, [0, 0, index, 0]):
        with pytest.raises(IndexError, match=f"is {index}; expected a whole number in"):
            backend(cr.roi_crop, values(), PIXEL_BOXES.astype(np.float32), indices, 3)


def test_how_deep_lists_are(backend):
    """Rows of numbers are one array; all else has an entry for each image."""
    features, (a, b, *_) = values(), PIXEL_BOXES.astype(np.float32).tolist()
    expected = [backend(cr.roi_crop, features, [a, b], [0, 1], 3), backend(cr.roi_align, features, [[a], [b]], 3)]
    np.testing.assert_array_equal(backend(cr.roi_align, features, [[0, *a], [1, *b]], 3), expected[1])
    if backend.name in ("plain", "compiled"):
        mixed = [np.array([a], np.float32), [b]]
        np.testing.assert_array_equal(backend(cr.roi_align, features, mixed, 3), expected[1])
    np.testing.assert_array_equal(
        backend(cr.roi_align, features, [[], [a, b]], 3)[0], backend(cr.roi_align, features, [a], 3, batch_indices=1)[0]
    )
    for boxes, options in (([[], []], {}), ([], {"batch_indices": []}), ([], {"batch_indices": 0})):
        assert backend(cr.roi_align, features, boxes, 3, **options).shape == (0, 3, 3, 3)
    assert backend(cr.roi_align, features[:0], [], 3).shape == (0, 3, 3, 3)
    assert backend(cr.roi_crop, features, [], [], 3).shape == (0, 3, 3, 3)
    assert np.isnan(backend(cr.roi_crop, features, [[1e300, 0, 1, 1], [np.nan, 0, 1, 1]], [0, 1], 3)).all()
    assert np.isfinite(backend(cr.roi_crop, features.astype(np.float64), [[1e300, 0, 1, 1]], [0], 3)).all()


@pytest.mark.parametrize("real", [np.float32, np.float64, np.float16, np.uint8])
@pytest.mark.parametrize("make", [np.asarray, Foreign, "torch", "emulated"])
def test_gradients_of_boxes_that_were_numbers(make, real, request):
    features = values(dtype=real)
    if make == "torch":
        make = pytest.importorskip("torch").from_numpy
    elif make == "emulated":
        make = request.getfixturevalue("emulated").asarray
    wide = np.float64 if real == np.float64 else np.float32
    (one, other), ones = PIXEL_BOXES[:2].tolist(), np.ones((2, 3, 3, 3), np.float32)
    _, expected = cr.vjp(cr.roi_align, features, [np.array([b], wide) for b in (one, other)], 3)
    for boxes, options in (([[one], [other]], {}), ([one, other], {"batch_indices": [0, 1]})):
        output, pullback = cr.vjp(cr.roi_align, make(features), boxes, 3, **options)
        grad_features, grad_boxes = pullback(make(ones))
        parts = grad_boxes if isinstance(grad_boxes, list) else [grad_boxes]
        assert isinstance(grad_boxes, list) == (not options)
        assert all(type(part) is type(grad_features) is type(output) for part in parts)
        assert all(str(np.dtype(wide)) in str(part.dtype) for part in parts)
        if isinstance(output, np.ndarray):
            np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(expected(ones)[1]))
