"""What a call costs, counted and not timed: no box costs more than the image, and memory is bounded."""

import tracemalloc

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import geometry, numpy_backend, numpy_dense, numpy_job
from cupy_roialign.geometry import Dialect, Part, Rule
from cupy_roialign.numpy_weights import AxisWeights, Taps
from tests.test_oracle import lay_out

SIZE, BINS = 50, 7
X1_Y1_X2_Y2 = (1, 0, 3, 2)

HUGE = [
    (-1e30, 1e30),
    (0.0, 1e30),
    (-1e30, 25.0),
    (-3e38, 3e38),
    (1e30, 3e30),
    (-1e7, 1e7),
    (-1e9, 1e9),
    (-123456.7, 234567.8),
    (1e30, -1e30),
    (-1e300, 1e300),
    (-1.7e308, 1.7e308),
]


def along_x(edges, dialect, real=np.float32, **options):
    """The rule, the boxes on the x axis, and their samples."""
    with np.errstate(over="ignore"):
        boxes = np.array([[low, 0.0, high, SIZE] for low, high in edges]).astype(real)
    rule = Rule(dialect, (BINS, BINS), X1_Y1_X2_Y2, **options)
    with np.errstate(all="ignore"):
        return rule, geometry.resolve(rule, boxes, (SIZE, SIZE)).along(1)


DIALECTS = [
    (Dialect.ROI_ALIGN, {"sampling_ratio": 0, "aligned": True}),
    (Dialect.ROI_ALIGN, {"sampling_ratio": 0, "aligned": False}),
    (Dialect.ROI_ALIGN, {"sampling_ratio": 3, "aligned": True}),
    (Dialect.ROI_CROP_CENTERS, {}),
    (Dialect.ROI_CROP_CORNERS, {}),
    (Dialect.CROP_AND_RESIZE, {}),
]


@pytest.mark.parametrize(("dialect", "options"), DIALECTS)
@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("edges", HUGE)
def test_samples_tried_for_a_huge_box(edges, real, dialect, options):
    rule, axis = along_x([edges], dialect, real, **options)
    with np.errstate(all="ignore"):
        first, stop = geometry._candidates(rule, axis, geometry._origins(axis, (range(BINS),)))
        weights = AxisWeights(Taps(rule, axis, Part((range(BINS),))), np.dtype(np.float32), 0.75)
    tried = int((stop - first).sum())
    assert tried <= 2 * SIZE + BINS * (geometry.EVERY_SAMPLE + 16)
    assert weights.flat.size <= BINS * SIZE
    assert weights.lines[0].number <= SIZE


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_no_sample_inside_is_passed_over(real):
    """The range of samples that are tried holds all that lie inside, as trying every one shows."""
    rng = np.random.default_rng(0)
    low = rng.uniform(-3000, 50, 400)
    edges = np.stack([low, low + np.exp(rng.uniform(0, 9, 400))], axis=1)
    for options in (
        {"sampling_ratio": 0},
        {"sampling_ratio": 0, "aligned": True},
        {"sampling_ratio": 40, "aligned": True},
    ):
        rule, axis = along_x(edges, Dialect.ROI_ALIGN, real, **options)
        quick = geometry.inside_samples(rule, axis, Part((range(BINS),)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(geometry, "EVERY_SAMPLE", 2**40)
            every = geometry.inside_samples(rule, axis, Part((range(BINS),)))
        for a, b in zip(quick, every, strict=True):
            np.testing.assert_array_equal(a, b)
        assert (axis.samples > geometry.EVERY_SAMPLE).sum() > 100


def test_a_huge_box_averages_what_lies_in_the_image():
    """Ones inside, zeros outside: the mean over a bin is the share of it that the image covers."""
    features = np.ones((1, 1, SIZE, SIZE))
    for half in (1e3, 1e5, 1e7, 1e9, 1e12):
        box = np.array([[25.0 - half, 0.0, 25.0 + half, SIZE]])
        mean = cr.roi_align(features, box, (1, 1), aligned=True, batch_indices=np.array([0])).item()
        assert mean == pytest.approx((SIZE + 1) / (2 * half), rel=0.05)


def peak(function):
    """Bytes that were taken at most while it ran, beside what it returns."""
    function()
    tracemalloc.start()
    try:
        result = function()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return most - result.nbytes


MIB = 2**20

LAYOUTS = {
    "planes": (3, np.float32, "contiguous"),
    "few channels last": (3, np.uint8, "channels-last"),
    "half, few": (2, np.float16, "contiguous"),
    "pixels": (48, np.float32, "contiguous"),
    "pixels in place": (48, np.float32, "channels-last"),
    "half": (48, np.float16, "contiguous"),
    "many channels": (160, np.float32, "contiguous"),
    "many channels in place": (160, np.float32, "channels-last"),
    "many halves": (160, np.float16, "contiguous"),
    "integers": (48, np.uint8, "contiguous"),
    "one plane of bytes": (1, np.uint8, "contiguous"),
    "double, sliced": (20, np.float64, "sliced"),
}


@pytest.mark.parametrize("boxes", ["one of the whole image", "many", "huge", "tiny"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_memory(name, boxes, monkeypatch):
    """At most twice the features and a constant, which the workspace sets; here it is 256 KiB."""
    monkeypatch.setattr(numpy_job, "WORKSPACE", MIB // 4)
    channels, dtype, order = LAYOUTS[name]
    side = int((2 * MIB / channels / np.dtype(dtype).itemsize) ** 0.5)
    features = lay_out(np.ones((1, channels, side, side), dtype), order)
    rng = np.random.default_rng(0)
    count = {"one of the whole image": 1, "huge": 10}.get(boxes, 100)
    if boxes.startswith("one"):
        corners = np.array([[0, 0, side, side]])
    elif boxes == "huge":
        corners = np.tile([-1e30, -1e30, 1e30, 1e30], (count, 1))
    else:
        corners = np.sort(rng.uniform(0, side, (count, 2, 2)), axis=1).reshape(count, 4)
        if boxes == "tiny":
            corners[:, 2:] = corners[:, :2] + 3
    corners = corners.astype(np.float32)
    indices = np.zeros(count, np.int64)
    output, _pullback = cr.vjp(cr.roi_align, features, corners, 3, sampling_ratio=0, batch_indices=indices)
    grad = np.ones_like(output)
    bound = 2 * features.nbytes + 2 * MIB
    assert peak(lambda: cr.roi_align(features, corners, 3, sampling_ratio=0, batch_indices=indices)) <= bound
    rule = Rule(Dialect.ROI_ALIGN, (3, 3), X1_Y1_X2_Y2, sampling_ratio=0)
    assert peak(lambda: numpy_backend.feature_gradient(grad, features, corners, indices, rule)) <= bound
    assert peak(lambda: numpy_backend.box_gradient(grad, features, corners, indices, rule)) <= bound
    if channels >= numpy_dense.FEW_CHANNELS:
        monkeypatch.setattr(numpy_dense, "MANY_CHANNELS", 1)  # a piece may have few
        assert peak(lambda: numpy_backend.box_gradient(grad, features, corners, indices, rule)) <= bound


def test_memory_follows_the_box_and_not_the_image():
    features = np.zeros((1, 32, 1000, 1000), np.float32)  # 128 MB
    box = np.array([[500, 500, 540, 540]], np.float32)
    assert peak(lambda: cr.roi_align(features, box, 7, 1.0, 2, batch_indices=np.array([0]))) < MIB


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_memory_follows_the_samples_of_a_large_box(sparse, monkeypatch):
    """14 x 14 samples touch 28 rows of a box of 900 x 900 pixels, of 20 channels 2 MB; the box is 65 MB."""
    monkeypatch.setattr(numpy_backend, "SPARSE", sparse)
    features = np.zeros((1, 20, 1000, 1000), np.float32)
    box, indices = np.array([[50, 50, 950, 950]], np.float32), np.array([0])
    rule = Rule(Dialect.ROI_ALIGN, (7, 7), X1_Y1_X2_Y2, sampling_ratio=2)
    grad = np.ones((1, 20, 7, 7), np.float32)
    assert peak(lambda: numpy_backend.forward(features, box, indices, rule)) < 4 * MIB
    assert peak(lambda: numpy_backend.box_gradient(grad, features, box, indices, rule)) < 4 * MIB


def test_memory_of_many_samples_a_bin(monkeypatch):
    """What `sampling_ratio` asks for is worked off a few boxes at a time."""
    monkeypatch.setattr(numpy_job, "WORKSPACE", MIB)
    features = np.ones((1, 1, 4, 4), np.float32)
    boxes = np.tile(np.array([[0.5, 0.5, 3.5, 3.5]], np.float32), (10, 1))
    indices = np.zeros(10, np.int64)
    assert peak(lambda: cr.roi_align(features, boxes, 7, 1.0, 2048, batch_indices=indices)) < 12 * MIB


LARGE = {
    # features' shape, box, output size, options
    "a row of pixels": ((1, 1, 1, 500_000), (0, 0, 500_000, 1), 3, {}),
    "a row of pixels, one bin": ((1, 2, 1, 250_000), (-7e5, 0, 1e6, 1), 1, {}),
    "a column of pixels": ((1, 1, 500_000, 1), (0, 0, 1, 500_000), 3, {}),
    "a column of halves": ((1, 20, 60_000, 1), (0, 0, 1, 60_000), 2, {}),
    "a column of many channels": ((1, 160, 5_000, 1), (0, 0, 1, 5_000), 2, {}),
    "many channels, many bins a row": ((1, 160, 4, 400), (0, 0, 400, 4), (90, 4), {}),
    "few samples far apart": ((1, 1, 1, 500_000), (0, 0, 500_000, 1), (1, 300), {"sampling_ratio": 1}),
    "many samples a bin": ((1, 1, 200, 200), (20, 20, 150, 150), (3, 9), {"sampling_ratio": 4096}),
    "many bins": ((1, 3, 100, 100), (5, 5, 70, 90), (90, 1100), {"sampling_ratio": 2}),
}


@pytest.mark.parametrize("name", LARGE)
def test_one_box_that_the_workspace_does_not_hold(name, monkeypatch):
    """It is worked off in parts: the same numbers, and memory that is bounded."""
    shape, box, size, options = LARGE[name]
    rng = np.random.default_rng(0)
    dtype = np.float16 if "halves" in name else np.float32
    features = rng.random(shape).astype(dtype)
    boxes, indices = np.array([box, box], np.float32), np.zeros(2, np.int64)
    rule = Rule(
        Dialect.ROI_ALIGN, tuple(np.broadcast_to(size, 2).tolist()), X1_Y1_X2_Y2, **{"sampling_ratio": 0, **options}
    )
    grad = rng.random((2, shape[1], *rule.bins)).astype(dtype)
    calls = [
        lambda: numpy_backend.forward(features, boxes, indices, rule),
        lambda: numpy_backend.feature_gradient(grad, features, boxes, indices, rule),
        lambda: numpy_backend.box_gradient(grad, features, boxes, indices, rule),
    ]
    whole = [call() for call in calls]
    monkeypatch.setattr(numpy_job, "WORKSPACE", MIB)
    for call, expected in zip(calls, whole, strict=True):
        actual = call()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-3 if dtype == np.float16 else 2e-6)
        assert peak(call) <= 2 * features.nbytes + 4 * MIB
