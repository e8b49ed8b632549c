"""The CUDA kernels, on the emulated device and on a GPU."""

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import geometry, gpu_backend, kernels
from cupy_roialign.geometry import Dialect, Rule
from tests import tolerance


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
    edges_of(a, k, edges);
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
        "a.first_block", "a.channels", "a.size[1]", "a.index_kind", "a.box_columns", "a.tile[1]",
        "a.channels_at_once", "a.blocks_per_item", "a.packed_features", "a.packed_crops",
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
    types = kernels.Types("float32", "float32", "float32", "float32", False, False)
    packed = kernels.arguments(at_work, directions, rule, types, kernels.Tiling((12, 13), 11, 14), 105, 77)
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
        "index_kind": 2, "box_columns": 5, "tile": [12, 13], "channels_at_once": 11, "blocks_per_item": 14,
        "packed_features": 0, "packed_crops": 0,
    }  # fmt: skip


@pytest.fixture
def launched(monkeypatch):
    """Each launch's kernel and number of blocks."""
    found = []
    compiled = kernels.kernel

    def kernel(name, types):
        def launch(grid, block, arguments):
            found.append((name, grid[0]))
            compiled(name, types)(grid, block, arguments)

        return launch

    monkeypatch.setattr(kernels, "kernel", kernel)
    return found


def test_offsets_of_64_bits_give_the_same(cupy, launched, monkeypatch):
    arguments = problem()
    narrow = run(cupy, *arguments)
    assert {name for name, _ in launched} == set(kernels.KERNELS)
    monkeypatch.setattr(kernels, "LARGE", 1)
    from cupy_roialign.cupy_backend import CupyBackend

    features, boxes = (CupyBackend().view(cupy.asarray(array)) for array in arguments[:2])
    assert gpu_backend.types_of(features, features, boxes, RULES[-1]).large
    for a, b in zip(narrow, run(cupy, *arguments), strict=True):
        np.testing.assert_array_equal(a, b)


# first channel and how many, of 24 that lie side by side
@pytest.mark.parametrize(("first", "channels"), [(0, 24), (8, 16), (8, 13), (1, 16), (4, 3)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8])
def test_channels_that_are_read_together_and_those_that_are_not(first, channels, dtype, cupy):
    from cupy_roialign.cupy_backend import CupyBackend

    _, boxes, indices, cotangent = problem(24)
    values = np.random.default_rng(5).uniform(0, 99, (2, 19, 22, 24)).astype(dtype)
    of_them = slice(first, first + channels)
    last = values.transpose(0, 3, 1, 2)[:, of_them]
    grads = np.ascontiguousarray(cotangent[:, of_them].transpose(0, 2, 3, 1))
    on_gpu = cupy.asarray(values).transpose(0, 3, 1, 2)[:, of_them]
    view = CupyBackend().view(on_gpu)
    lanes = gpu_backend.types_of(view, view, CupyBackend().view(cupy.asarray(boxes)), RULES[5]).lanes
    assert view.is_packed(lanes) == (first % lanes == 0)
    options = {"output_size": (5, 9), "sampling_ratio": 2, "batch_indices": indices}
    expected, pullback = cr.vjp(cr.roi_align, last, boxes, **options)
    options["batch_indices"] = cupy.asarray(indices)
    output, pullback_on_gpu = cr.vjp(cr.roi_align, on_gpu, cupy.asarray(boxes), **options)
    wanted = pullback(grads.transpose(0, 3, 1, 2))
    found = pullback_on_gpu(cupy.asarray(grads).transpose(0, 3, 1, 2))
    precision = 2e-3 if dtype == np.float16 else 1e-5
    for a, b in zip((output, *found), (expected, *wanted), strict=True):
        tolerance.assert_close(a.get(), b, precision)


@pytest.mark.parametrize("channels", [3, 70])
def test_many_bins_on_few_pixels_and_few_on_many(channels, cupy):
    """Several parts of a box's bins touch a tile of pixels, or more pixels touch a bin than are held at a time."""
    rng = np.random.default_rng(8)
    features = rng.uniform(-1, 1, (2, channels, 40, 45)).astype(np.float32)
    boxes = np.array([[3, 4, 8, 7], [0, 0, 45, 40], [-9, 12, 30, 13], [20, 20, 20, 20], [30, 39, 2, 1]], np.float32)
    indices = np.array([1, 0, 1, 0, 1])
    for size, sampling_ratio in (((40, 35), 2), ((1, 2), -1), ((1, 1), 90)):
        arguments = (size, 1.0, sampling_ratio, True)
        grad = rng.uniform(-1, 1, (5, channels, *size)).astype(np.float32)
        expected, pullback = cr.vjp(cr.roi_align, features, boxes, *arguments, batch_indices=indices)
        output, pullback_on_gpu = cr.vjp(
            cr.roi_align, *map(cupy.asarray, (features, boxes)), *arguments, batch_indices=cupy.asarray(indices)
        )
        found = (output, *pullback_on_gpu(cupy.asarray(grad)))
        for a, b in zip(found, (expected, *pullback(grad)), strict=True):
            tolerance.assert_close(a.get(), b, 1e-5)


@pytest.mark.parametrize("sampling_ratio", [2, 90])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_many_channels_in_rounds(order, sampling_ratio, cupy, launched, monkeypatch):
    """A box's taps are held from round to round or, too many to be held, read again."""
    from cupy_roialign.cupy_backend import CupyBackend

    features, boxes, indices, cotangent = problem(150)
    boxes[3], boxes[5] = [np.nan, 0, 1, 1], [-30, -30, 160, 120]  # and bins of 20 pixels
    features = np.ascontiguousarray(features.transpose(order)).transpose(np.argsort(order))
    found = []
    for blocks in (10**6, 1):
        monkeypatch.setattr(kernels, "MANY_BLOCKS", blocks)
        kernels.Tiling.of.cache_clear()
        launched.clear()
        found.append(run(cupy, features, boxes, indices, cotangent, sampling_ratio))
        assert (dict(launched)["forward"] == 2 * len(boxes)) == (blocks == 1)
        given = [cupy.asarray(array) for array in (features, boxes, indices)]
        found[-1].append(CupyBackend().forward(*given, RULES[5], [cupy.asarray(boxes + 1)]).get())
    kernels.Tiling.of.cache_clear()
    for i, precision in enumerate((0, 0, 1e-5, 0)):
        tolerance.assert_close(found[1][i], found[0][i], precision)
    assert np.isnan(found[1][0][3]).all()


def test_a_view_is_packed_where_one_access_reaches_its_channels():
    def view(pointer=64, strides=(1000, 1, 80, 8), shape=(2, 8, 5, 10), dtype="float32"):
        return kernels.View(pointer, strides, shape, dtype)

    assert view().is_packed(4)
    assert not view(pointer=72).is_packed(4)
    assert view(pointer=72).is_packed(2)
    assert not view(strides=(1000, 1, 81, 8)).is_packed(4)
    assert view(strides=(1000, 1, 81, 8), shape=(2, 8, 1, 10)).is_packed(4)
    assert not view(strides=(1000, 50, 10, 1)).is_packed(4)
    assert not view(strides=(0, 0, 0, 0)).is_packed(4)
    assert view(pointer=48, dtype="float64").is_packed(8)  # 16 bytes are the most that one access reads


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("features", list(kernels.CTYPES))
def test_tilings_cover_everything_once(features, channels_last):
    types = kernels.Types(features, "float32", "float32", "float32", False, channels_last)
    assert types.lanes * types.spots == types.outputs
    for size in ((1, 1), (7, 7), (14, 14), (9, 300), (224, 224), (1, 1000), (0, 5)):
        for channels in (0, 1, 3, 20, 256, 1024):
            for items in (None, 1, 100, 10**6):
                tiling = kernels.Tiling.of(size, channels, types, items)
                assert max(tiling.tile) <= kernels.MOST_TILE
                assert tiling.channels % types.lanes == 0 < tiling.channels
                tiles = [-(-n // max(1, side)) for n, side in zip(size, tiling.tile, strict=True)]
                if 0 not in size and channels:
                    assert tiling.blocks == np.prod(tiles) * -(-channels // tiling.channels)
                spots = np.prod(tiling.tile) * tiling.channels // types.lanes
                assert items is not None or spots <= kernels.THREADS * types.spots


def test_launches_in_parts(cupy, launched, monkeypatch):
    arguments = problem()
    whole = run(cupy, *arguments)
    monkeypatch.setattr(gpu_backend, "MOST_BLOCKS", 7)
    launched.clear()
    for a, b in zip(whole, run(cupy, *arguments), strict=True):
        np.testing.assert_array_equal(a, b)
    assert max(blocks for _, blocks in launched) == 7


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
