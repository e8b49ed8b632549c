"""What a call costs, counted and not timed: no box costs more than the image, and memory is bounded."""

import tracemalloc

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import arrays, geometry, rule
from cupy_roialign.cpu import backend, weights
from tests.test_oracle import lay_out

SIZE, BINS = 50, 7

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

CASES = [
    rule.roi_align((BINS, BINS), sampling_ratio=0, aligned=True),
    rule.roi_align((BINS, BINS), sampling_ratio=0, aligned=False),
    rule.roi_align((BINS, BINS), sampling_ratio=3, aligned=True),
    rule.roi_crop((BINS, BINS)),
    rule.roi_crop((BINS, BINS), centers=False),
    rule.crop_and_resize((BINS, BINS)),
]


@pytest.fixture(params=["plain", "compiled"])
def tried(request, monkeypatch):
    """Makes `Rows`, in one of the two ways, and tells how many positions were worked out for each axis."""
    if request.param == "compiled":
        pytest.importorskip("numba")
        from cupy_roialign.cpu import (  # before anything is patched, which they compile
            compiled,
            compiled_rows,
            machine_code,
        )
    position, counts = geometry.position, []

    def counting(*args):
        result = position(*args)
        counts.append(np.size(result))
        return result

    monkeypatch.setattr(geometry, "position", counting)
    if request.param == "plain":
        build = weights.rows
    else:
        # as Python, so that calls can be counted
        monkeypatch.setattr(compiled_rows, "type_of", lambda array: array.dtype.type)
        monkeypatch.setattr(compiled_rows, "edges", compiled_rows.edges.py_func)
        monkeypatch.setattr(machine_code, "loop", lambda *key: compiled_rows.rows)
        build = compiled._rows

    def run(case, low, high):
        counts.clear()
        boxes = np.stack([low, low, high, high], axis=1)
        features = arrays.ArraySpec((1, 1, SIZE, SIZE), (1, 1, 1, 1), low.dtype.name)
        job = weights.Job.of(features, boxes, np.zeros(1, np.int64), case, ())
        with np.errstate(all="ignore"):
            rows = build(job, slice(0, 1), True, 2 * BINS * SIZE)
        return rows, sum(counts) // 2

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.frame.name} {case.sampling_ratio} {case.aligned}")
@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_samples_tried_for_a_huge_box(real, case, tried):
    met = 0
    for edges in HUGE:
        with np.errstate(over="ignore"):
            low, high = np.array(edges).astype(real)[:, None]
        if np.isfinite([low, high]).all():
            rows, count = tried(case, low, high)
            assert count <= 2 * SIZE + BINS * (geometry.EVERY_SAMPLE + 16), edges
            met += rows.entries > 0
    if not case.sampling_ratio:
        assert met > 1  # some boxes have samples inside


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_no_sample_inside_is_passed_over(real):
    """The range of samples that are tried holds all that lie inside, as trying every one shows."""
    rng = np.random.default_rng(0)
    low = rng.uniform(-3000, 50, 400)
    high = (low + np.exp(rng.uniform(0, 9, 400))).astype(real)
    low = low.astype(real)
    for sampling_ratio, aligned in ((0, False), (0, True), (40, True)):
        case, shortened = rule.roi_align((BINS, BINS), 1.0, sampling_ratio, aligned), 0
        start, step, samples = geometry.affine(case, low, high, BINS, SIZE, real)
        samples = np.broadcast_to(samples, low.shape)
        for p in range(BINS):
            origin = geometry.origin(start, step, p, real)
            first, stop = geometry.candidates(start, step, samples, origin, SIZE, real)
            number = np.arange(samples.max())
            position = geometry.position(case, origin[:, None], step[:, None], samples[:, None], number, real)
            inside = geometry.inside(case, position, SIZE) & (number < samples[:, None])
            assert not (inside & ~((first[:, None] <= number) & (number < stop[:, None]))).any()
            shortened += (stop - first < samples).sum()
        assert (samples > geometry.EVERY_SAMPLE).sum() > 100
        assert shortened > 100


def test_a_huge_box_averages_what_lies_in_the_image(way):
    """Ones inside, zeros outside: the mean over a bin is the share of it that the image covers."""
    features = np.ones((1, 1, SIZE, SIZE))
    for half in (1e3, 1e5, 1e7, 1e9, 1e12):
        box = np.array([[25.0 - half, 0.0, 25.0 + half, SIZE]])
        mean = cr.roi_align(features, box, (1, 1), aligned=True, batch_indices=np.array([0])).item()
        assert mean == pytest.approx((SIZE + 1) / (2 * half), rel=0.05)


# ---- memory ----


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


def calls(features, boxes, case, grad):
    """An operator and its two gradients, of boxes of the first image."""
    at = boxes, np.zeros(len(boxes), np.int64), case
    return {
        "forward": lambda: backend.forward(features, *at),
        "feature gradient": lambda: backend.feature_gradient(grad, features, *at),
        "box gradient": lambda: backend.box_gradient(grad, features, *at),
    }


MIB = 2**20


@pytest.fixture(autouse=True)
def one_thread():
    """Each thread has a workspace."""
    cr.set_num_threads(1)
    yield
    cr.set_num_threads(None)


SHAPES = {
    # channels, dtype, order in memory, boxes
    "planes": (3, np.float32, "contiguous", "many"),
    "few channels last": (3, np.uint8, "channels-last", "huge"),
    "one plane of bytes": (1, np.uint8, "contiguous", "the whole image"),
    "half": (48, np.float16, "contiguous", "the whole image"),
    "pixels in place": (48, np.float32, "channels-last", "huge"),
    "many channels": (160, np.float32, "contiguous", "many"),
    "many halves": (160, np.float16, "channels-last", "tiny"),
    "double, sliced": (20, np.float64, "sliced", "many"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_memory(name, way, monkeypatch):
    """At most twice the features and a constant, which the workspace sets; here it is 256 KiB."""
    monkeypatch.setattr(weights, "WORKSPACE", MIB // 4)
    channels, dtype, order, boxes = SHAPES[name]
    side = int((2 * MIB / channels / np.dtype(dtype).itemsize) ** 0.5)
    features = lay_out(np.ones((1, channels, side, side), dtype), order)
    rng = np.random.default_rng(0)
    if boxes == "the whole image":
        corners = np.array([[0, 0, side, side]])
    elif boxes == "huge":
        corners = np.repeat([[-1e30, -1e30, 1e30, 1e30], [-1e5, -1e5, 2e5, 2e5]], 5, axis=0)
    else:
        corners = np.sort(rng.uniform(0, side, (100, 2, 2)), axis=1).reshape(-1, 4)
        if boxes == "tiny":
            corners[:, 2:] = corners[:, :2] + 3
    grad = np.ones((len(corners), channels, 3, 3), np.float64 if dtype == np.float64 else np.float32)
    for call, function in calls(features, corners.astype(np.float32), rule.roi_align((3, 3)), grad).items():
        assert peak(function) <= 2 * features.nbytes + 2 * MIB, call


@pytest.mark.parametrize("order", ["contiguous", "channels-last"])
def test_memory_follows_the_box_and_not_the_image(order, way):
    features = np.broadcast_to(np.float32(1), (1, 32, 1000, 1000))  # 128 MB, if it were not one number
    if order == "channels-last":
        features = np.zeros((1, 1000, 1000, 32), np.float32).transpose(0, 3, 1, 2)
    box, case = np.array([[500, 500, 540, 540]], np.float32), rule.roi_align((7, 7), 1.0, 2)
    functions = calls(features, box, case, np.ones((1, 32, 7, 7), np.float32))
    assert peak(functions["forward"]) < MIB
    assert peak(functions["box gradient"]) < MIB


def test_memory_follows_the_samples_of_a_large_box(way):
    """14 x 14 samples touch 28 rows of a box of 900 x 900 pixels, of 20 channels 2 MB; the box is 65 MB."""
    features = np.zeros((1, 20, 1000, 1000), np.float32)
    box, case = np.array([[50, 50, 950, 950]], np.float32), rule.roi_align((7, 7), 1.0, 2)
    functions = calls(features, box, case, np.ones((1, 20, 7, 7), np.float32))
    assert peak(functions["forward"]) < 4 * MIB
    assert peak(functions["box gradient"]) < 4 * MIB


def test_memory_of_many_boxes(way, monkeypatch):
    """The weights of all 200 boxes would be 6 MB."""
    monkeypatch.setattr(weights, "WORKSPACE", MIB // 4)
    features = np.ones((1, 1, 300, 300), np.uint8)
    boxes = np.tile(np.array([[0, 0, 300, 300]], np.float32), (200, 1))
    for call, function in calls(features, boxes, rule.roi_align((2, 2)), np.ones((200, 1, 2, 2), np.float32)).items():
        assert peak(function) < 2 * MIB, call


def test_memory_of_many_samples_a_bin(way, monkeypatch):
    """What `sampling_ratio` asks for is worked off a few boxes at a time."""
    monkeypatch.setattr(weights, "WORKSPACE", MIB)
    features = np.ones((1, 1, 4, 4), np.float32)
    boxes = np.tile(np.array([[0.5, 0.5, 3.5, 3.5]], np.float32), (10, 1))
    functions = calls(features, boxes, rule.roi_align((7, 7), 1.0, 2048), np.ones((10, 1, 7, 7), np.float32))
    for call, function in functions.items():
        assert peak(function) < 12 * MIB, call


LARGE = {
    # features' shape, box, bins, sampling ratio
    "a row of pixels": ((1, 1, 1, 30_000), (0, 0, 30_000, 1), (3, 3), 0),
    "a row of pixels, one bin": ((1, 2, 1, 30_000), (-1e5, 0, 1e5, 1), (1, 1), 0),
    "a column of pixels": ((1, 1, 30_000, 1), (0, 0, 1, 30_000), (3, 3), 0),
    "a column of halves": ((1, 20, 12_000, 1), (0, 0, 1, 12_000), (2, 2), 0),
    "a column of many channels": ((1, 160, 5_000, 1), (0, 0, 1, 5_000), (2, 2), 0),
    "many channels, many bins a row": ((1, 160, 4, 400), (0, 0, 400, 4), (90, 4), 0),
    "few samples far apart": ((1, 1, 1, 30_000), (0, 0, 30_000, 1), (1, 300), 1),
    "many samples a bin": ((1, 1, 200, 200), (20, 20, 150, 150), (3, 9), 4096),
    "many bins": ((1, 3, 100, 100), (5, 5, 70, 90), (90, 400), 2),
}


@pytest.mark.parametrize("name", LARGE)
def test_one_box_that_the_workspace_does_not_hold(name, way, monkeypatch):
    """It is worked off in parts: the same numbers, and memory that is bounded.

    Its weights are there all at once: up to 120 bytes for each row and column of the image.
    """
    shape, box, bins, sampling_ratio = LARGE[name]
    rng = np.random.default_rng(0)
    dtype = np.float16 if "halves" in name else np.float32
    features = rng.random(shape).astype(dtype)
    case = rule.roi_align(bins, sampling_ratio=sampling_ratio)
    grad = rng.random((2, shape[1], *bins)).astype(dtype)
    functions = calls(features, np.array([box, box], np.float32), case, grad)
    whole = {call: function() for call, function in functions.items()}
    monkeypatch.setattr(weights, "WORKSPACE", MIB // 4)
    monkeypatch.setattr(weights, "SAMPLES", 2**12)
    bound = 2 * features.nbytes + 2 * MIB + 120 * (shape[2] + shape[3])
    for call, function in functions.items():
        actual, scale = function(), np.abs(whole[call]).max()
        np.testing.assert_allclose(actual / scale, whole[call] / scale, atol=1e-3 if dtype == np.float16 else 2e-6)
        assert peak(function) <= bound, call
