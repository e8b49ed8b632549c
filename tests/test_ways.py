"""The two ways of the CPU, plain and compiled: which is taken, the same numbers, and what must not spread."""

import itertools
import os
import subprocess
import sys
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cupy_roialign as cr
from cupy_roialign import arrays, geometry, rule
from cupy_roialign.cpu import backend, threads, weights
from tests import backends, tolerance
from tests.positions import RULES, adversarial_boxes, expected_positions
from tests.test_oracle import ORDERS, lay_out

numba = pytest.importorskip("numba", reason="the compiled way needs Numba")
from numba.extending import register_jitable  # noqa: E402

from cupy_roialign.cpu import compiled, compiled_rows, loops, machine_code  # noqa: E402

ROOT = Path(__file__).parents[1]


def crowd(channels=32):
    """Boxes that share a part of the image, of which the first alone touches its first pixel."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, channels, 100, 100)).astype(np.float32)
    low = rng.uniform(5, 70, (40, 2))
    boxes = np.concatenate([low, low + 25], axis=1).astype(np.float32)
    boxes[0] = -1, -1, 30, 30
    grad = rng.standard_normal((40, channels, 7, 7)).astype(np.float32)
    return features, boxes, np.zeros(40, np.int64), grad, rule.roi_align((7, 7), 1.0, 2, True)


CASES = {
    "roi_align": rule.roi_align((4, 5), 0.5, 2, True),
    "roi_align, adaptive": rule.roi_align((2, 3), 1.0, 0, False),
    "roi_align, many bins": rule.roi_align((40, 33), 1.0, 1, True),
    "roi_align, many samples": rule.roi_align((2, 1), 1.0, 40, True),
    "roi_crop": rule.roi_crop((4, 5), True, 3.0),
    "roi_crop, corners": rule.roi_crop((1, 5), False),
    "crop_and_resize": rule.crop_and_resize((4, 1), False, 3.0),
    "nearest": rule.crop_and_resize((4, 3), True, 1.5),
}


@settings(max_examples=60)
@given(
    name=st.sampled_from(list(CASES)),
    channels=st.sampled_from([1, 3, 7, 8, 20, 40]),
    dtype=st.sampled_from(["float32", "float64", "float16", "uint8", "int16"]),
    order=st.sampled_from(ORDERS),
    grad_order=st.sampled_from([*ORDERS, "the same everywhere"]),
    odd=st.sampled_from([None, None, np.nan, np.inf]),
    directions=st.integers(0, 2),
    workspace=st.sampled_from([weights.WORKSPACE, 20_000, 2_000]),
    seed=st.integers(0, 2**16),
)
def test_the_same_numbers(name, channels, dtype, order, grad_order, odd, directions, workspace, seed):
    """Whatever the order in memory, and however little memory the parts may take."""
    rng, case = np.random.default_rng(seed), CASES[name]
    features = (rng.standard_normal((2, channels, 23, 31)) * 3 + 100 * (seed % 2)).astype(dtype)
    grad = rng.standard_normal((6, channels, *case.bins)).astype("float64" if dtype == "float64" else "float32")
    for array in (features, grad):
        if odd is not None and array.dtype.kind == "f":
            array[tuple(rng.integers(0, n) for n in array.shape)] = odd
    boxes = rng.uniform(-5, 35, (6, 4))
    boxes = np.round(boxes) if seed % 3 == 0 else boxes  # samples on pixel centers
    boxes[0] = rng.choice([1e30, -1e30, np.nan, 1e5, 3], 4)
    boxes /= 25 if case.frame == rule.Frame.NORMALIZED else 1
    indices, along = rng.integers(0, 2, 6), list(rng.standard_normal((directions, 6, 4)))
    features = lay_out(features, order)
    grad = np.broadcast_to(grad[0, 0, 0, 0], grad.shape) if grad_order not in ORDERS else lay_out(grad, grad_order)
    at = (boxes, indices, case, along)
    results = []
    with unittest.mock.patch.object(weights, "WORKSPACE", workspace):
        for way in ("plain", "compiled"):
            with backends.way(way):
                results.append(
                    [
                        backend.forward(features, *at),
                        backend.feature_gradient(grad, features, *at),
                        backend.box_gradient(grad, features, *at),
                    ]
                )
    wide = "float64" if dtype == "float64" else "float32"
    names = (results[0][0].dtype.name, results[0][1].dtype.name, wide)
    for kind, precision, a, b in zip(("OUTPUT", "GRADIENT", "GRADIENT"), names, *results, strict=True):
        assert a.dtype == b.dtype
        if odd is not None:  # what infinity becomes on its way, another infinity or NaN, follows the order of sums
            a, b = (np.where(np.isfinite(array), array, np.nan) for array in (a, b))
        scale = max(1.0, float(np.nanmax(np.abs(a.astype(np.float64)), initial=0)), 100.0 * (seed % 2))
        limit = getattr(tolerance, kind)[precision]
        tolerance.assert_close(a / scale, b / scale, 30 * limit if directions or a.shape == boxes.shape else 3 * limit)


register_jitable(geometry.edge_slopes)


@numba.njit(**compiled_rows.OPTIONS)
def twin(spec, low, high, bins, size, found):
    """What `positions.expected_positions` gives of one axis, box by box."""
    real = compiled_rows.type_of(low)
    for k in range(len(low)):
        start, step, samples = geometry.affine(spec, low[k], high[k], bins, size, real)
        origin = geometry.origin(start, step, k % bins, real)
        found[k, 0], found[k, 1], found[k, 2] = start, step, samples
        if samples > geometry.EVERY_SAMPLE:
            found[k, 3], found[k, 4] = geometry.candidates(start, step, samples, origin, size, real)
        if samples > 0:
            found[k, 5] = position = geometry.position(spec, origin, step, samples, k % samples, real)
            found[k, 6] = geometry.inside(spec, position, size)
            if found[k, 6]:
                found[k, 7], found[k, 8], found[k, 9] = geometry.taps(spec, position, size, real)
        found[k, 10], found[k, 11], found[k, 12] = geometry.edge_slopes(spec, low[k], high[k], bins, size, real)


@pytest.mark.parametrize("size", [(33, 41), (1, 2)])
@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_positions_are_the_same_to_the_bit(real, size):
    """geometry.py compiled for numbers against geometry.py on arrays: a million boxes and more, over all rules."""
    for case in RULES:
        boxes = adversarial_boxes(case, 20_000, real, size)
        boxes = boxes[np.isfinite(boxes).all(axis=1)]
        expected = expected_positions(case, boxes, size)
        for axis in range(2):
            low, high = (np.ascontiguousarray(boxes[:, case.columns[axis + end]]) for end in (0, 2))
            found = np.zeros_like(expected[:, axis])
            twin(machine_code.Spec.of(case), low, high, case.bins[axis], size[axis], found)
            np.testing.assert_array_equal(found, expected[:, axis])


def test_rows_are_the_same_to_the_bit():
    rng = np.random.default_rng(3)
    low = rng.uniform(-20, 60, (500, 2))
    high = low + rng.choice([-1, 1], low.shape) * np.exp(rng.uniform(-3, 12, low.shape))
    boxes = np.concatenate([low, high], axis=1)
    boxes[7, 2] = np.nan
    for case, real in itertools.product(CASES.values(), (np.float32, np.float64)):
        some = (boxes / (40 if case.frame == rule.Frame.NORMALIZED else 1)).astype(real)
        features = arrays.ArraySpec((1, 1, 41, 23), (1, 1, 1, 1), "float64" if real == np.float64 else "float32")
        job = weights.Job.of(features, some, np.zeros(500, np.int64), case, ())
        for slopes in (False, True):
            with np.errstate(all="ignore"):
                expected, actual = (
                    build(job, slice(3, 500), slopes, 500 * 41 * sum(case.bins))
                    for build in (weights.rows, compiled._rows)
                )
            np.testing.assert_array_equal(actual.begin, expected.begin)
            np.testing.assert_array_equal(actual.extent, expected.extent)
            assert actual.most == expected.most
            row, pixel = np.repeat(np.arange(len(expected.begin) - 1), np.diff(expected.begin)), actual.pixel
            order = np.argsort(row * 41 + pixel[: len(row)])  # within a bin in the order in which the box goes
            np.testing.assert_array_equal(pixel[order], expected.pixel)
            np.testing.assert_array_equal(actual.values[:, order], expected.values)


# ---- what a box's result depends on ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of machine code, and nothing in memory."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine_code, "_made", {})
    return tmp_path


@pytest.mark.parametrize("order", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("channels", [3, 40])
def test_bits_do_not_depend_on_the_company(channels, order, way):
    """A box alone, beside itself, and among others: the same crop and the same box gradient, to the bit."""
    features, boxes, indices, grad, case = crowd(channels)
    features = lay_out(features, order)
    whole = backend.forward(features, boxes, indices, case)
    gradient = backend.box_gradient(grad, features, boxes, indices, case)
    for some in (slice(0, 1), slice(7, 8), slice(3, 20)):
        at = (boxes[some], indices[some], case)
        np.testing.assert_array_equal(backend.forward(features, *at), whole[some])
        np.testing.assert_array_equal(backend.box_gradient(grad[some], features, *at), gradient[some])
    for count in (1, 32, 64):
        q, at = boxes[7:8].repeat(count, 0), np.zeros(count, np.int64)
        np.testing.assert_array_equal(backend.forward(features, q, at, case)[0], whole[7])


@pytest.mark.parametrize("order", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("channels", [3, 40])
def test_bits_do_not_depend_on_the_number_of_threads(channels, order, way, monkeypatch):
    monkeypatch.setattr(threads, "WORTH_IT", 0)
    features, boxes, indices, grad, case = crowd(channels)
    features, along = lay_out(features, order), [np.random.default_rng(1).standard_normal(boxes.shape)]
    at = (boxes, indices, case)
    calls = [
        lambda: backend.forward(features, *at),
        lambda: backend.forward(features, *at, along),
        lambda: backend.feature_gradient(grad, features, *at),
        lambda: backend.box_gradient(grad, features, *at),
    ]
    try:
        for call in calls:
            cr.set_num_threads(1)
            expected = call()
            for count in (2, 7):
                cr.set_num_threads(count)
                np.testing.assert_array_equal(call(), expected)
    finally:
        cr.set_num_threads(None)


def test_threads_do_not_add_to_the_same_pixels(monkeypatch):
    """Boxes whose windows are brought over with other numbers of channels, on one image."""
    monkeypatch.setattr(threads, "WORTH_IT", 0)
    monkeypatch.setattr(weights, "WORKSPACE", 60 * 60 * 4 * 12)
    rng = np.random.default_rng(0)
    boxes = np.array([[j % 9, j % 9, 20 + j % 9, 20 + j % 9] for j in range(30)], np.float32)
    boxes[::6] = 0, 0, 119, 119
    grad, features = rng.standard_normal((30, 16, 60, 60), dtype=np.float32), np.zeros((1, 16, 120, 120), np.float32)
    arguments = (grad, features, boxes, np.zeros(30, np.int64), rule.roi_align((60, 60), 1.0, 0, True))
    try:
        with backends.way("compiled"):
            cr.set_num_threads(1)
            expected = backend.feature_gradient(*arguments)
            cr.set_num_threads(4)
            for _ in range(5):
                np.testing.assert_array_equal(backend.feature_gradient(*arguments), expected)
    finally:
        cr.set_num_threads(None)


def test_a_pixel_that_only_a_slope_reads_spreads_along_no_other_axis(way):
    """Its weight is 0, and 0 times NaN is NaN."""
    features = np.array([[[[1, 2, np.nan], [3, 5, np.nan]]]], np.float32)
    box, at, case = np.array([[1, 0.25, 1, 0.25]], np.float32), np.zeros(1, np.int64), rule.roi_crop((1, 1), False)
    gradient = backend.box_gradient(np.ones((1, 1, 1, 1), np.float32), features, box, at, case)
    np.testing.assert_array_equal(gradient, [[np.nan, 1.5, np.nan, 1.5]])
    along_y = np.array([[0.0, 1, 0, 1]])
    assert backend.forward(features, box, at, case, [along_y]).item() == 3


@pytest.mark.parametrize("value", [1e4, -1e9, 3e38, np.nan])
def test_a_pixel_leaves_the_gradients_of_boxes_alone_that_do_not_touch_it(value, way):
    features, boxes, indices, grad, case = crowd()
    expected = backend.box_gradient(grad, features, boxes, indices, case)[1:]
    features[:, :, 0, 0] = value
    actual = backend.box_gradient(grad, features, boxes, indices, case)[1:]
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("value", [1e4, -1e9, 3e38, np.nan])
def test_a_pixel_leaves_the_derivatives_of_crops_alone_that_do_not_touch_it(value, way):
    features, boxes, indices, _, case = crowd()
    along = [np.random.default_rng(1).standard_normal(boxes.shape)]
    expected = backend.forward(features, boxes, indices, case, along)[1:]
    features[:, :, 0, 0] = value
    np.testing.assert_array_equal(backend.forward(features, boxes, indices, case, along)[1:], expected)


def test_an_offset_of_the_features_costs_no_precision(way):
    features, boxes, indices, grad, case = crowd()
    along = [np.random.default_rng(1).standard_normal(boxes.shape)]
    high = features + np.float32(1e6)
    exact = (high.astype(np.float64) - 1e6).astype(np.float32)
    for function in (
        lambda values: backend.box_gradient(grad, values, boxes, indices, case),
        lambda values: backend.forward(values, boxes, indices, case, along),
        lambda values: backend.forward(lay_out(values, "channels-last"), boxes, indices, case, along),
    ):
        tolerance.assert_close(function(high), function(exact), tolerance.GRADIENT["float32"])


@pytest.mark.parametrize(("side", "bins"), [(60, 1), (200, 1), (200, 7), (390, 2)])
def test_the_mean_of_ones_is_one(side, bins, way):
    features = np.ones((1, 16, 400, 400), np.float32)
    box = np.array([[0, 1.25, 2.75, 1.25 + side, 2.75 + side]], np.float32)
    crops = cr.roi_align(features, box, bins, aligned=True)
    tolerance.assert_close(crops, np.ones_like(crops), 3 * tolerance.OUTPUT["float32"])


def test_the_gradient_of_a_bin_without_a_sample_counts_for_nothing(way):
    """A NaN there, as of a loss that divides by the crop's mean, says nothing about the box or the features."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((1, 20, 30, 30)).astype(np.float32)
    boxes = np.array([[10, 10, 50, 20]], np.float32)  # half of it is outside
    grad = rng.standard_normal((1, 20, 3, 6)).astype(np.float32)
    case, at = rule.roi_align((3, 6), 1.0, 2, True), np.zeros(1, np.int64)
    clean = grad.copy()
    clean[..., 4:] = 0
    grad[..., 4:] = np.nan
    a, b = (backend.box_gradient(g, features, boxes, at, case) for g in (grad, clean))
    np.testing.assert_array_equal(a, b)
    a, b = (backend.feature_gradient(g, features, boxes, at, case) for g in (grad, clean))
    tolerance.assert_close(a, b, tolerance.GRADIENT["float32"])


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pixel_of_weight_zero_is_not_reached(value, channels, way):
    """Samples on pixel centers: the next pixel has weight 0."""
    features = np.zeros((1, channels, 9, 9), np.float32)
    features[..., 5] = value
    box, at = np.array([[2.0, 2.0, 4.0, 4.0]], np.float32), np.zeros(1, np.int64)
    case = rule.roi_crop((3, 3), False)
    assert not backend.forward(features, box, at, case).any()
    grad = np.full((1, channels, 3, 3), value, np.float32)
    total = backend.feature_gradient(grad, features, box, at, case)
    assert not total[..., 5].any()
    assert not np.isfinite(total[..., 2:5, 2:5]).any()


@pytest.mark.parametrize("order", ["contiguous", "channels-last"])
@pytest.mark.parametrize("channels", [3, 20])
def test_a_line_is_read_whole_or_pixel_by_pixel(channels, order):
    """Samples far apart and side by side."""
    rng = np.random.default_rng(0)
    features = lay_out(rng.standard_normal((1, channels, 40, 900), dtype=np.float32), order)
    boxes = np.array([[3, 3, 890, 30], [3, 3, 40, 30], [880, 30, 4, 2]], np.float32)
    case, at = rule.roi_align((5, 6), 1.0, 1, True), np.zeros(3, np.int64)
    ((_, rows, _),) = weights.Job.of(features, boxes, at, case, ()).weights(weights.rows)
    pixels = rows.extent[1, 1] - rows.extent[1, 0]
    assert (pixels > loops.FAR * rows.most[1]).tolist() == [True, False, True]
    grad = rng.standard_normal((3, channels, 5, 6), dtype=np.float32)
    results = []
    for way in ("plain", "compiled"):
        with backends.way(way):
            results.append([backend.forward(features, boxes, at, case)])
            results[-1] += [
                f(grad, features, boxes, at, case) for f in (backend.feature_gradient, backend.box_gradient)
            ]
    for kind, a, b in zip(("OUTPUT", "GRADIENT", "GRADIENT"), *results, strict=True):
        tolerance.assert_close(a / np.abs(b).max(), b / np.abs(b).max(), getattr(tolerance, kind)["float32"])


# ---- which way, and what it needs ----


def run(code, **environment):
    """Of a process of its own: what it prints."""
    variables = {**os.environ, "CUPY_ROIALIGN_COMPILED": "1", **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHY = "import sys; from cupy_roialign.cpu import backend; print(backend.not_compiled(), 'numba' in sys.modules)"


def test_a_variable_turns_the_compiled_way_off():
    assert run(WHY) == "True"
    assert run(WHY, CUPY_ROIALIGN_COMPILED="0") == "the environment variable CUPY_ROIALIGN_COMPILED is 0 False"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ModuleNotFoundError('no numba', name='numba')", "Numba is not installed"),
        ("ImportError('Numba needs NumPy 2.4 or less')", "Numba cannot be imported (Numba needs NumPy 2.4 or less)"),
        ("RuntimeError('odd')", "Numba cannot be imported (odd)"),
    ],
)
def test_without_numba_all_goes_the_plain_way(error, reason):
    refuse = (
        "import sys, importlib.abc\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == 'numba': raise {error}\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import numpy as np, cupy_roialign as cr\n"
        "print(cr.roi_align(np.ones((1, 1, 9, 9)), [[0, 1, 1, 5, 5]], 1).item(), end=' ')\n"
    )
    assert run(refuse + WHY.replace("'numba' in sys.modules", "''")) == f"1.0 {reason}"


def test_the_plain_way_needs_numpy_alone_and_starts_no_threads_of_blas():
    """Time of the whole process against that of the calling thread: another thread would add to the first."""
    code = (
        "import sys, time, numpy as np, cupy_roialign as cr\n"
        "rng = np.random.default_rng(0)\n"
        "cr.set_num_threads(1)\n"
        "for shape, size in (((1, 256, 100, 100), 7), ((1, 3, 400, 400), 224), ((1, 64, 100, 100), (1, 5)),\n"
        "                    ((1, 64, 100, 100), (5, 1)), ((1, 2, 600, 600), 1)):\n"
        "    for order in (0, 1):\n"
        "        x = rng.standard_normal(shape, dtype=np.float32)\n"
        "        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if order else x\n"
        "        low = rng.uniform(0, shape[2] / 3, (8, 2))\n"
        "        boxes = np.concatenate([low, low + shape[2] / 2], axis=1).astype(np.float32)\n"
        "        output, pullback = cr.vjp(cr.roi_align, x, boxes, size, 1.0, 0, True, batch_indices=0)\n"
        "        whole, mine = time.process_time(), time.thread_time()\n"
        "        cr.roi_align(x, boxes, size, 1.0, 0, True, batch_indices=0)\n"
        "        pullback(np.ones_like(output))\n"
        "        whole, mine = time.process_time() - whole, time.thread_time() - mine\n"
        "        assert whole < 1.1 * mine + 0.01, (shape, size, order, whole, mine)\n"
        "print({'scipy', 'numba', 'torch'} & set(sys.modules))\n"
    )
    assert run(code, CUPY_ROIALIGN_COMPILED="0", OPENBLAS_NUM_THREADS="4") == "set()"


@pytest.mark.parametrize("ratio", [0, 2])
def test_a_box_is_the_same_in_place_and_brought_over(ratio, monkeypatch):
    """Planes of many channels are worked on where that is less work: which depends on the other boxes of a call."""
    rng = np.random.default_rng(5)
    features = rng.standard_normal((2, 40, 30, 35), dtype=np.float32)
    boxes = rng.uniform(-5, 38, (60, 4)).astype(np.float32)
    boxes[7] = np.nan
    at = boxes, rng.integers(0, 2, 60), rule.roi_align((5, 4), 1.0, ratio, True)
    grad, along = rng.standard_normal((60, 40, 5, 4), dtype=np.float32), [rng.standard_normal((60, 4))]
    asked, found = [], []
    for in_place in (True, False):
        monkeypatch.setattr(
            compiled, "_is_less_in_place", lambda job, add, is_less=in_place: asked.append(is_less) or is_less
        )
        with backends.way("compiled"):
            gradients = [backend.box_gradient(grad, features, *at, directions) for directions in ((), along)]
            found.append([backend.forward(features, *at), *gradients])
    assert asked == 3 * [True] + 3 * [False]
    for in_place, brought_over in zip(*found, strict=True):
        np.testing.assert_array_equal(in_place, brought_over)


@pytest.mark.parametrize(("count", "side", "expected"), [(1, 20, False), (1, 180, True), (30, 180, False)])
def test_what_is_less_work(count, side, expected):
    """A small box is brought over; of a large one the few pixels that are wanted are read; of 30 the whole image is."""
    boxes = np.tile(np.array([[3, 3, 3 + side, 3 + side]], np.float32), (count, 1))
    features = arrays.ArraySpec((1, 256, 200, 200), (1, 1, 1, 1), "float32")
    what = rule.roi_align((7, 7), 1.0, 2, True)
    job = weights.Job.of(features, boxes, np.zeros(count, np.int64), what, ())
    assert compiled._is_less_in_place(job, False) == expected


ROWS = ("rows", "f", "f", False)


def test_machine_code_is_kept_and_follows_its_sources(cache, monkeypatch):
    machine_code.make(machine_code.Key(*ROWS))
    (first,) = cache.iterdir()
    kept = sorted(path.name for path in first.rglob("*.nbc"))
    assert kept
    machine_code._made.clear()
    again = machine_code.make(machine_code.Key(*ROWS))
    assert again.stats.cache_hits == {again.signatures[0]: 1}
    monkeypatch.setattr(geometry, "__file__", rule.__file__)  # as if geometry.py were another
    machine_code._made.clear()
    other = machine_code.make(machine_code.Key(*ROWS))
    assert len(list(cache.iterdir())) == 2
    assert not other.stats.cache_hits
    assert str(cache) == numba.config.CACHE_DIR


def test_boxes_of_another_precision_compile_no_second_loop_over_pixels(cache, monkeypatch):
    monkeypatch.setattr(machine_code, "_made", {})
    features, boxes = np.ones((1, 1, 9, 9), np.float32), np.array([[1, 1, 5, 6]])
    for real in (np.float32, np.float64):
        with backends.way("compiled"):
            backend.forward(features, boxes.astype(real), np.zeros(1, np.int64), rule.roi_align((2, 3)))
    assert [key.real for key in machine_code._made if key.name == "crops"] == ["f"]
    assert sorted(key.real for key in machine_code._made if key.name == "forward") == ["d", "f"]


def test_a_folder_that_cannot_be_written_to_is_done_without(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(cache / "file" / "below"))
    loop = machine_code.make(machine_code.Key(*ROWS))
    assert loop.signatures
    assert not loop.stats.cache_path  # nor in a folder of Numba's own, which does not follow geometry.py


def test_no_index_is_out_of_bounds(tmp_path):
    """The loops compiled with Numba's checks of each index, which are off otherwise."""
    code = (
        "import itertools, numpy as np\n"
        "from cupy_roialign import rule\n"
        "from cupy_roialign.cpu import backend\n"
        "from tests.test_ways import CASES, lay_out\n"
        "rng = np.random.default_rng(0)\n"
        "orders, sizes = ('contiguous', 'channels-last'), ((23, 31), (3, 4))\n"
        "for channels, order, size, case in itertools.product((3, 20), orders, sizes, CASES.values()):\n"
        "    features = lay_out(rng.standard_normal((2, channels, *size), dtype=np.float32), order)\n"
        "    grad = rng.standard_normal((40, channels, *case.bins), dtype=np.float32)\n"
        "    boxes = rng.uniform(-5, 35, (40, 4)).astype(np.float32)\n"
        "    boxes[::7] = rng.choice([1e30, -1e30, np.nan, np.inf, 1e5, 3, -1], (6, 4))\n"
        "    boxes /= 25 if case.frame == rule.Frame.NORMALIZED else 1\n"
        "    at = (boxes, rng.integers(0, 2, 40), case)\n"
        "    for directions in ([], [rng.standard_normal((40, 4))]):\n"
        "        backend.forward(features, *at, directions)\n"
        "        backend.feature_gradient(grad, features, *at, directions)\n"
        "        backend.box_gradient(grad, features, *at, directions)\n"
    )
    run(code, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))


def test_compile_ahead():
    assert run("from cupy_roialign.cpu import backend; print(backend.compile_ahead() > 0)") == "True"


def test_a_second_process_loads_what_the_first_has_compiled(tmp_path):
    code = (
        "import time, numpy as np, numba, cupy_roialign as cr\n"
        "np.ones(3) @ np.ones(3)\n"
        "x, b = np.ones((1, 8, 30, 30), np.float32), np.ones((1, 5), np.float32) * [[0, 1, 1, 9, 9]]\n"
        "start = time.process_time()\n"
        "cr.roi_align(x, b.astype(np.float32), 7)\n"
        "print(time.process_time() - start)\n"
    )
    first, second = (float(run(code, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2))
    assert second < first / 3
