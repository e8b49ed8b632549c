"""The CUDA kernels, on the emulated device and on a GPU."""

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import geometry, gpu_backend, kernels
from cupy_roialign.geometry import Dialect, Rule


def problem(channels=5, dtype=np.float32, count=9):
    rng = np.random.default_rng(3)
    features = rng.uniform(-1, 1, (2, channels, 19, 22)).astype(dtype)
    boxes = rng.uniform(-3, 23, (count, 4)).astype(np.float32)
    return features, boxes, rng.integers(0, 2, count), rng.uniform(-1, 1, (count, channels, 5, 9)).astype(np.float32)


def run(cupy, features, boxes, indices, cotangent, sampling_ratio=2):
    """Output and gradients of roi_align, as NumPy arrays."""
    device = [cupy.asarray(array) for array in (features, boxes, indices, cotangent)]
    output, pullback = cr.vjp(
        cr.roi_align, device[0], device[1], (5, 9), 1.0, sampling_ratio, True, batch_indices=device[2]
    )
    return [output.get(), *(gradient.get() for gradient in pullback(device[3]))]


TWIN = """
extern "C" __global__ void twin(const Arguments a) {
    // three numbers for each axis of a box, then position, inside, taps and fraction of one sample on each
    const long long k = (a.first_block + blockIdx.x) * 64 + threadIdx.x;
    if (k >= a.count) return;
    Real edges[4];
    for (int i = 0; i < 4; ++i) edges[i] = edge(a, k, a.rule.columns[i]);
    for (int axis = 0; axis < 2; ++axis) {
        Real* to = (Real*)a.result + (k * 2 + axis) * 8;
        const Axis found = resolve(a.rule, edges[axis], edges[axis + 2], axis, a.size[axis]);
        const int p = (int)(k % a.rule.bins[axis]);
        const long long i = found.samples > 0 ? k % found.samples : 0;
        const Real position = position_of(a.rule, found, origin_of(found, p), i);
        const Taps taps = taps_of(a.rule, position, a.size[axis]);
        to[0] = found.start;
        to[1] = found.bin;
        to[2] = finite_box(edges) ? (Real)found.samples : (Real)0;
        to[3] = found.samples > 0 ? position : (Real)0;
        to[4] = taps.inside && found.samples > 0;
        to[5] = to[4] != 0 ? (Real)taps.low : (Real)0;
        to[6] = to[4] != 0 ? (Real)taps.high : (Real)0;
        to[7] = to[4] != 0 ? taps.fraction : (Real)0;
    }
}
"""

RULES = [
    Rule(Dialect.CROP_AND_RESIZE, (7, 5), (0, 1, 2, 3)),
    Rule(Dialect.CROP_AND_RESIZE, (1, 1), (0, 1, 2, 3)),
    Rule(Dialect.CROP_AND_RESIZE, (7, 5), (0, 1, 2, 3), nearest=True),
    Rule(Dialect.ROI_CROP_CENTERS, (7, 5), (1, 0, 3, 2)),
    Rule(Dialect.ROI_CROP_CORNERS, (7, 1), (1, 0, 3, 2)),
    Rule(Dialect.ROI_ALIGN, (7, 5), (1, 0, 3, 2), 0.3, 2, True),
    Rule(Dialect.ROI_ALIGN, (7, 5), (1, 0, 3, 2), 1 / 16, 3, False),
    Rule(Dialect.ROI_ALIGN, (7, 5), (1, 0, 3, 2), 0.7, 0, True),
    Rule(Dialect.ROI_ALIGN, (7, 5), (1, 0, 3, 2), 1.0, 0, False),
]


def adversarial_boxes(rule, count, real, size):
    """Ordinary, on pixels and on edges, a unit in the last place beside them, subnormal, huge, of any bits at all."""
    rng = np.random.default_rng(17)
    unit = np.array([size[0] - 1, size[1] - 1] * 2) if rule.dialect is Dialect.CROP_AND_RESIZE else np.ones(4)
    unit = np.maximum(unit, 1) * rule.spatial_scale
    ordinary = rng.uniform(-5, max(size) + 5, (count, 4))
    halves = rng.integers(-8, 2 * max(size) + 8, (count, 4)) / 2
    boxes = np.where(rng.random((count, 4)) < 0.5, ordinary, halves) / unit
    boxes = boxes.astype(real)
    beside = rng.random((count, 4)) < 0.1
    boxes[beside] = np.nextafter(boxes[beside], rng.choice([-np.inf, np.inf], beside.sum()).astype(real))
    tiny = rng.random((count, 4)) < 0.03
    boxes[tiny] = (
        rng.choice([-1, 1], tiny.sum()) * np.finfo(real).smallest_subnormal * rng.integers(0, 5, tiny.sum())
    ).astype(real)
    bits = rng.integers(0, 2**32 if real == np.float32 else 2**63, (count, 4), dtype=np.uint64)
    raw = bits.astype(np.uint32).view(np.float32) if real == np.float32 else bits.view(np.float64)
    wild = rng.random(count) < 0.1
    boxes[wild] = raw[wild]
    return boxes


@pytest.mark.parametrize("size", [(33, 41), (1, 2)])
@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_positions_are_the_same_to_the_bit(real, size, cupy):
    """A million boxes and more, over all rules: geometry.cuh against geometry.py."""
    name = np.dtype(real).name
    types = kernels.Types("float32", "float32", name, name, False, False)
    code = kernels.source("forward", types).replace(kernels.read("forward.cu"), TWIN)
    kernel = cupy.RawKernel(code, "twin")
    count = 60_000
    for rule in RULES:
        boxes = adversarial_boxes(rule, count, real, size)
        device, result = cupy.asarray(boxes), cupy.empty((count, 2, 8), real)
        arguments = np.zeros((), kernels.ARGUMENTS)
        arguments["boxes"], arguments["result"], arguments["count"] = device.data.ptr, result.data.ptr, count
        arguments["box_strides"], arguments["size"] = (4, 1), size
        arguments["rule"] = np.frombuffer(kernels.rule_bytes(rule), kernels.RULE)[0]
        kernel((-(-count // 64),), (64,), (arguments,))
        expected = np.zeros((count, 2, 8), real)
        k = np.arange(count)
        with np.errstate(all="ignore"):
            axes = geometry.resolve(rule, boxes, size)
            for a, (start, step, samples) in enumerate(zip(axes.start, axes.bin, axes.samples, strict=True)):
                number = np.where(samples > 0, k % np.maximum(samples, 1), 0)
                origin = start + (k % rule.bins[a]).astype(real) * step
                within = ((number.astype(real) + real(rule.offset)) * step) / np.maximum(samples, 1).astype(real)
                position = origin + within
                low_edge, high_edge = (-1, size[a]) if rule.clamps else (0, size[a] - 1)
                inside = (position >= low_edge) & (position <= high_edge) & (samples > 0)
                low, high, fraction = geometry._taps(rule, position[inside], np.full(inside.sum(), size[a]))
                columns = [start, step, samples, np.where(samples > 0, position, 0), inside]
                expected[:, a, :5] = np.stack([c.astype(real) for c in columns], axis=1)
                expected[inside, a, 5:] = np.stack([low.astype(real), high.astype(real), fraction], axis=1)
        sound = np.isfinite(boxes).all(1)
        np.testing.assert_array_equal(result.get()[sound], expected[sound])
        assert (~sound).any()
        assert (expected[sound, :, 4] == 1).any()


def test_the_structure_of_arguments_is_that_of_the_kernels(cupy):
    """Sizes are compared at each launch; here each field, by a kernel that reads it."""
    types = kernels.Types("float32", "float32", "float32", "float32", False, False)
    fields = [
        "a.feature_strides[3]", "a.output_strides[0]", "a.box_strides[1]", "a.index_stride", "a.direction_strides[3]",
        "a.direction_count", "a.images", "a.count",
        "a.first_block", "a.channels", "a.size[1]", "a.index_kind", "a.channels_at_once", "a.box_columns",
        "a.rule.spatial_scale", "a.rule.extrapolation_value", "a.rule.dialect", "a.rule.bins[1]", "a.rule.columns[3]",
        "a.rule.sampling_ratio", "a.rule.aligned", "a.rule.nearest",
    ]  # fmt: skip
    lines = "".join(f"    to[{i}] = (double){field};\n" for i, field in enumerate(fields))
    body = (
        'extern "C" __global__ void fields(const Arguments a) {\n    double* to = (double*)a.result;\n' + lines + "}\n"
    )
    code = kernels.source("forward", types).replace(kernels.read("forward.cu"), body)
    result = cupy.empty(len(fields), np.float64)
    arguments = np.zeros((), kernels.ARGUMENTS)
    arguments["result"] = result.data.ptr
    for i, field in enumerate(fields):
        name, _, place = field.removeprefix("a.").partition("[")
        target = arguments
        *outer, name = name.split(".")
        for part in outer:
            target = target[part]
        if place:
            target[name][int(place[:-1])] = i + 1
        else:
            target[name] = i + 1
    cupy.RawKernel(code, "fields")((1,), (1,), (arguments,))
    assert result.get().tolist() == [i + 1 for i in range(len(fields))]


def test_arguments_are_packed_in_the_order_of_their_names():
    shapes = ((2, 3, 4, 5), (7, 3, 8, 9), (7, 5), (7,), (7, 3, 8, 9))
    at_work = [
        kernels.View(100 + i, tuple(range(10 * i, 10 * i + len(shape))), shape, "int16" if i == 3 else "float32")
        for i, shape in enumerate(shapes)
    ]
    rule = Rule(Dialect.ROI_CROP_CORNERS, (8, 9), (2, 1, 4, 3), 0.25, 6, True, True, -1.5)
    directions = [kernels.View(200, (91, 92), (7, 5), "float32")]
    packed = kernels.arguments(at_work, directions, rule, 77, 11, 105)
    fields = {name: packed[name].tolist() for name in kernels.ARGUMENTS.names if name != "rule"}
    assert {name: packed["rule"][name].tolist() for name in kernels.RULE.names} == {
        "spatial_scale": 0.25, "extrapolation_value": -1.5, "dialect": 2, "bins": [8, 9], "columns": [2, 1, 4, 3],
        "sampling_ratio": 6, "aligned": 1, "nearest": 1,
    }  # fmt: skip
    assert fields == {
        "features": 100, "grad_output": 101, "boxes": 102, "batch_indices": 103, "result": 104, "workspace": 105,
        "directions": [200, 0],
        "feature_strides": [0, 1, 2, 3], "output_strides": [10, 11, 12, 13], "box_strides": [20, 21],
        "index_stride": 30, "direction_strides": [91, 92, 0, 0], "direction_count": 1,
        "images": 2, "count": 7, "first_block": 77, "channels": 3, "size": [4, 5],
        "index_kind": 2, "channels_at_once": 11, "box_columns": 5,
    }  # fmt: skip


def test_offsets_of_64_bits_give_the_same(cupy, monkeypatch):
    arguments = problem()
    narrow = run(cupy, *arguments)
    kernels_before = {launch["kernel"] for launch in cupy.launches}
    monkeypatch.setattr(kernels, "LARGE", 1)
    from cupy_roialign.cupy_backend import CupyBackend

    features, boxes = (CupyBackend().view(cupy.asarray(array)) for array in arguments[:2])
    assert gpu_backend.types_of(features, features, boxes, RULES[-1]).large
    for a, b in zip(narrow, run(cupy, *arguments), strict=True):
        np.testing.assert_array_equal(a, b)
    assert kernels_before == set(kernels.KERNELS)


def test_launches_in_parts(cupy, monkeypatch):
    arguments = problem()
    whole = run(cupy, *arguments)
    monkeypatch.setattr(gpu_backend, "MOST_BLOCKS", 7)
    cupy.launches.clear()
    for a, b in zip(whole, run(cupy, *arguments), strict=True):
        np.testing.assert_array_equal(a, b)
    assert max(launch["blocks"] for launch in cupy.launches) == 7


@pytest.mark.parametrize("index", [-1, 2, 2**40])
def test_a_bad_index_is_a_broken_box_unless_it_is_looked_for(index, cupy, monkeypatch):
    features, boxes, indices, cotangent = problem()
    alone = cotangent.copy()
    alone[4] = 0
    good = run(cupy, features, boxes, indices, alone)
    indices[4] = index
    output, grad_features, grad_boxes = run(cupy, features, boxes, indices, cotangent)
    assert np.isnan(output[4]).all()
    assert np.isnan(grad_boxes[4]).all()
    others = np.arange(9) != 4
    np.testing.assert_array_equal(output[others], good[0][others])
    np.testing.assert_array_equal(grad_features, good[1])
    np.testing.assert_array_equal(grad_boxes[others], good[2][others])
    with cr.checked(), pytest.raises(IndexError, match="box 4"):
        run(cupy, features, boxes, indices, cotangent)
    monkeypatch.setenv("CUPY_ROIALIGN_CHECK", "1")
    with pytest.raises(IndexError, match="box 4"):
        run(cupy, features, boxes, indices, cotangent)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_indices_of_any_integer_dtype(dtype, cupy):
    features, boxes, indices, cotangent = problem()
    for a, b in zip(
        run(cupy, features, boxes, indices, cotangent),
        run(cupy, features, boxes, indices.astype(dtype), cotangent),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
