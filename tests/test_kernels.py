"""The CUDA kernels, on the emulated device and on a GPU."""

import itertools
import math

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import rule as rules
from cupy_roialign.cpu import backend as cpu_backend
from cupy_roialign.gpu import arguments, backend, kernels, tiling
from cupy_roialign.gpu.tiling import Tiling, Zones
from cupy_roialign.rule import BATCH_X1_Y1_X2_Y2, Border, Frame, Rule, Taps
from tests import positions, tolerance
from tests.backends import view


def problem(channels=13, dtype=np.float32, count=9):
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
    // of each axis of a box what tests/positions.py computes
    const long long k = (a.first_block + blockIdx.x) * 64 + threadIdx.x;
    if (k >= a.count) return;
    Real edges[4];
    edges_of(a, k, edges);
    for (int axis = 0; axis < 2; ++axis) {
        const int bins = a.rule.bins[axis], size = a.size[axis];
        Real* to = (Real*)a.result + (k * 2 + axis) * 13;
        for (int i = 0; i < 13; ++i) to[i] = 0;
        if (!finite_box(edges)) continue;
        const Axis found = affine(a.rule, edges[axis], edges[axis + 2], bins, size);
        const Real origin = origin_of(found, (int)(k % bins));
        long long first, stop;
        candidates(found, origin, -1, size, first, stop);
        to[0] = found.start;
        to[1] = found.step;
        to[2] = (Real)found.samples;
        if (found.samples > EVERY_SAMPLE) to[3] = (Real)first, to[4] = (Real)stop;
        if (found.samples > 0) {
            const Real position = position_of(a.rule, found, origin, k % found.samples);
            to[5] = position;
            if (is_inside(a.rule, position, size)) {
                const Taps taps = taps_of(a.rule, position, size);
                to[6] = 1;
                to[7] = (Real)taps.low;
                to[8] = (Real)taps.high;
                to[9] = taps.fraction;
            }
        }
        const EdgeSlopes slopes = edge_slopes(a.rule, edges[axis], edges[axis + 2], bins, size);
        to[10] = (Real)slopes.start[0];
        to[11] = (Real)slopes.start[1];
        to[12] = (Real)slopes.step;
    }
}
"""


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_positions_are_the_same_to_the_bit(real, cupy):
    """A million boxes over all rules, of which 10 are operators', and two sizes: geometry.cuh against geometry.py."""
    name = np.dtype(real).name
    types = kernels.Types("float32", "float32", name, name, False, False, lanes=8)
    code = kernels.source("forward", types).replace(kernels.read("forward.cu"), TWIN)
    kernel = cupy.RawKernel(code, "twin")
    checked = 0
    for rule, size in itertools.product(positions.RULES, [(33, 41), (1, 2)]):
        count = 35_000 if rule in positions.OPERATORS else 7_500
        boxes = positions.adversarial_boxes(rule, count, real, size)
        expected = positions.expected_positions(rule, boxes, size)
        device, result = cupy.asarray(boxes), cupy.empty(expected.shape, real)
        given = np.zeros((), arguments.ARGUMENTS)
        given["boxes"], given["result"], given["count"] = device.data.ptr, result.data.ptr, count
        given["box_strides"], given["size"] = (4, 1), size
        given["rule"] = np.frombuffer(arguments.rule_bytes(rule), arguments.RULE)[0]
        kernel((-(-count // 64),), (64,), (given,))
        sound = np.isfinite(boxes).all(1)
        found = result.get()[sound]
        np.testing.assert_array_equal(found, expected[sound])
        assert (found[..., 6] == 1).any()
        assert (found[..., 7:9] >= 0).all()  # whatever the rule, taps are pixels of the image
        assert (found[..., 7:9] < np.array(size)[:, None]).all()
        assert (~sound).any()
        checked += len(boxes)
    assert checked > 1_000_000


def test_the_structure_of_arguments_is_that_of_the_kernels(cupy):
    """Sizes are compared at each launch; here each field, by a kernel that reads it."""
    types = kernels.Types("float32", "float32", "float32", "float32", False, False, lanes=8)
    fields = [
        "a.feature_strides[3]", "a.output_strides[0]", "a.box_strides[1]", "a.index_stride", "a.direction_strides[3]",
        "a.direction_count", "a.images", "a.count",
        "a.first_block", "a.channels", "a.size[1]", "a.index_kind", "a.box_columns", "a.tile[1]",
        "a.channels_at_once", "a.blocks_per_item", "a.zones[2]", "a.zone_pixels[1]", "a.packed_features",
        "a.packed_crops", "a.rule.spatial_scale", "a.rule.extrapolation_value", "a.rule.frame", "a.rule.taps",
        "a.rule.border", "a.rule.bins[1]", "a.rule.columns[3]", "a.rule.sampling_ratio", "a.rule.aligned",
    ]  # fmt: skip
    lines = "".join(f"    to[{i}] = (double){field};\n" for i, field in enumerate(fields))
    body = (
        'extern "C" __global__ void fields(const Arguments a) {\n    double* to = (double*)a.result;\n' + lines + "}\n"
    )
    code = kernels.source("forward", types).replace(kernels.read("forward.cu"), body)
    result = cupy.empty(len(fields), np.float64)
    given = np.zeros((), arguments.ARGUMENTS)
    given["result"] = result.data.ptr
    for i, field in enumerate(fields):
        name, _, index = field.removeprefix("a.").partition("[")
        target = given
        *outer, name = name.split(".")
        for structure in outer:
            target = target[structure]
        if index:
            target[name][int(index[:-1])] = i + 1
        else:
            target[name] = i + 1
    cupy.RawKernel(code, "fields")((1,), (1,), (given,))
    assert result.get().tolist() == [i + 1 for i in range(len(fields))]


def test_arguments_are_packed_in_the_order_of_their_names():
    shapes = ((2, 3, 4, 5), (7, 3, 8, 9), (7, 5), (7,), (7, 3, 8, 9))
    views = [
        arguments.View(100 + i, tuple(range(10 * i, 10 * i + len(shape))), shape, "int16" if i == 3 else "float32")
        for i, shape in enumerate(shapes)
    ]
    rule = Rule(Frame.CORNERS, Taps.NEAREST, Border.CLAMP, (8, 9), BATCH_X1_Y1_X2_Y2, 0.25, 6, True, -1.5)
    directions = [arguments.View(200, (91, 92), (7, 5), "float32")]
    types = kernels.Types("float32", "float32", "float32", "float32", False, False, lanes=8)
    zones = Zones((15, 16, 17), (18, 19))
    template = arguments.template(views[:4], directions, types, Tiling((12, 13), 11, 14, 64), zones)
    packed = arguments.fill(template, (100, 101, 102, 103, 104, 105, 200), rule, 77).view(arguments.ARGUMENTS)
    fields = {name: packed[name].tolist() for name in arguments.ARGUMENTS.names if name != "rule"}
    assert {name: packed["rule"][name].tolist() for name in arguments.RULE.names} == {
        "spatial_scale": 0.25, "extrapolation_value": -1.5, "frame": 2, "taps": 2, "border": 1, "bins": [8, 9],
        "columns": [2, 1, 4, 3], "sampling_ratio": 6, "aligned": 1,
    }  # fmt: skip
    assert fields == {
        "features": 100, "grad_output": 101, "boxes": 102, "batch_indices": 103, "result": 104, "workspace": 105,
        "directions": [200, 0],
        "feature_strides": [0, 1, 2, 3], "output_strides": [10, 11, 12, 13], "box_strides": [20, 21],
        "index_stride": 30, "direction_strides": [91, 92, 0, 0], "direction_count": 1,
        "images": 2, "count": 7, "first_block": 77, "channels": 3, "size": [4, 5],
        "index_kind": 2, "box_columns": 5, "tile": [12, 13], "channels_at_once": 11, "blocks_per_item": 14,
        "zones": [15, 16, 17], "zone_pixels": [18, 19], "packed_features": 0, "packed_crops": 0,
    }  # fmt: skip


def test_zeros_of_both_signs_are_told_apart(cupy):
    """They are equal, so a cache would take one for the other."""
    features = cupy.zeros((1, 1, 4, 4), np.float32)
    boxes, indices = cupy.asarray(np.full((1, 4), 9, np.float32)), cupy.zeros(1, np.int64)
    for value in (0.0, -0.0, 0.0):
        crops = cr.crop_and_resize(features, boxes, indices, 1, extrapolation_value=value).get()
        assert np.signbit(crops).all() == np.signbit(value)


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
    given = problem()
    narrow = run(cupy, *given)
    assert {name for name, _ in launched} == set(kernels.KERNELS) - {"forward_along"}
    monkeypatch.setattr(backend, "LARGE", 1)
    backend.plan.cache_clear()
    kernel, large = kernels.kernel, []
    monkeypatch.setattr(kernels, "kernel", lambda name, types: large.append(types.large) or kernel(name, types))
    for a, b in zip(narrow, run(cupy, *given), strict=True):
        np.testing.assert_array_equal(a, b)
    backend.plan.cache_clear()
    assert len(large) == 5
    assert all(large)


# first channel and how many, of 24 that lie side by side
@pytest.mark.parametrize(("first", "channels"), [(0, 24), (8, 16), (8, 13), (1, 16), (4, 3)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8])
def test_channels_that_are_read_together_and_those_that_are_not(first, channels, dtype, cupy):
    _, boxes, indices, cotangent = problem(24)
    values = np.random.default_rng(5).uniform(0, 99, (2, 19, 22, 24)).astype(dtype)
    of_them = slice(first, first + channels)
    last = values.transpose(0, 3, 1, 2)[:, of_them]
    grads = np.ascontiguousarray(cotangent[:, of_them].transpose(0, 2, 3, 1))
    on_gpu = cupy.asarray(values).transpose(0, 3, 1, 2)[:, of_them]
    planes = view(cupy, on_gpu)
    lanes = backend.types_of(planes, planes, view(cupy, boxes), Frame.SCALED, (5, 9)).lanes
    assert lanes == min(channels, 4 if dtype == np.float64 else 8)
    itemsize = np.dtype(dtype).itemsize
    step = math.gcd(16, lanes * itemsize)
    assert planes.is_packed(lanes) == (first * itemsize % step == 0 == 24 * itemsize % step)
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
    """Several chunks of a box's bins touch a tile of pixels, or more pixels touch a bin than are held at a time."""
    rng = np.random.default_rng(8)
    features = rng.uniform(-1, 1, (2, channels, 40, 45)).astype(np.float32)
    boxes = np.array([[3, 4, 8, 7], [0, 0, 45, 40], [-9, 12, 30, 13], [20, 20, 20, 20], [30, 39, 2, 1]], np.float32)
    indices = np.array([1, 0, 1, 0, 1])
    for size, sampling_ratio in (((40, 35), 2), ((1, 2), -1), ((1, 1), 90)):
        options = (size, 1.0, sampling_ratio, True)
        grad = rng.uniform(-1, 1, (5, channels, *size)).astype(np.float32)
        expected, pullback = cr.vjp(cr.roi_align, features, boxes, *options, batch_indices=indices)
        output, pullback_on_gpu = cr.vjp(
            cr.roi_align, *map(cupy.asarray, (features, boxes)), *options, batch_indices=cupy.asarray(indices)
        )
        found = (output, *pullback_on_gpu(cupy.asarray(grad)))
        for a, b in zip(found, (expected, *pullback(grad)), strict=True):
            tolerance.assert_close(a.get(), b, 1e-5)


@pytest.mark.parametrize("sampling_ratio", [2, 90])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_many_channels_in_rounds(order, sampling_ratio, cupy, launched, monkeypatch):
    """A box's taps are held from round to round or, too many to be held, read again."""
    from cupy_roialign.gpu.cupy_arrays import CupyBackend

    features, boxes, indices, cotangent = problem(150)
    rule = rules.roi_align((7, 5), 0.3, 2, True)
    boxes[3], boxes[5] = [np.nan, 0, 1, 1], [-30, -30, 160, 120]  # and bins of 20 pixels
    features = np.ascontiguousarray(features.transpose(order)).transpose(np.argsort(order))
    found = []
    for blocks in (10**6, 1):
        monkeypatch.setattr(tiling, "MANY_BLOCKS", blocks)
        backend.plan.cache_clear()
        launched.clear()
        found.append(run(cupy, features, boxes, indices, cotangent, sampling_ratio))
        assert (dict(launched)["forward"] == 2 * len(boxes)) == (blocks == 1)
        given = [cupy.asarray(array) for array in (features, boxes, indices)]
        found[-1].append(CupyBackend().forward(*given, rule, [cupy.asarray(boxes + 1)]).get())
    backend.plan.cache_clear()
    for i, precision in enumerate((0, 0, 1e-5, 0)):
        tolerance.assert_close(found[1][i], found[0][i], precision)
    assert np.isnan(found[1][0][3]).all()


def test_a_view_is_packed_where_one_access_reaches_its_channels():
    def of(pointer=64, strides=(1000, 1, 80, 8), shape=(2, 8, 5, 10), dtype="float32"):
        return arguments.View(pointer, strides, shape, dtype)

    assert of().is_packed(4)
    assert not of(pointer=72).is_packed(4)
    assert of(pointer=72).is_packed(2)
    assert not of(strides=(1000, 1, 81, 8)).is_packed(4)
    assert of(strides=(1000, 1, 81, 8), shape=(2, 8, 1, 10)).is_packed(4)
    assert not of(strides=(1000, 50, 10, 1)).is_packed(4)
    assert not of(strides=(0, 0, 0, 0)).is_packed(4)
    assert of(pointer=48, dtype="float64").is_packed(8)  # 16 bytes are the most that one access reads
    assert of(pointer=4, strides=(300, 1, 30, 3)).is_packed(3)  # 12 bytes, read by 4


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("features", list(kernels.CTYPES))
def test_tilings_cover_everything_once(features, channels_last):
    lanes_of_many = kernels.lanes_of(features, 256)
    for size in ((1, 1), (7, 7), (14, 14), (9, 300), (224, 224), (1, 1000), (0, 5)):
        for channels in (0, 1, 3, 20, 256, 1024):
            lanes = kernels.lanes_of(features, channels)
            most_bins = kernels.most_bins_of(lanes, features, size)
            assert (most_bins == 32) == (channels < lanes_of_many and max(size) > 16)
            types = kernels.Types(features, "float32", "float32", "float32", False, channels_last, lanes, most_bins)
            for items, most in itertools.product((1, 100, 10**6), (types.most_bins, kernels.MOST_PIXELS)):
                cut = Tiling.of(size, channels, types, items, most)
                assert max(cut.tile) <= most
                assert cut.channels % types.lanes == 0 < cut.channels
                tiles = [-(-n // max(1, side)) for n, side in zip(size, cut.tile, strict=True)]
                if 0 not in size and channels:
                    assert cut.blocks == np.prod(tiles) * -(-channels // cut.channels)
                spots = np.prod(cut.tile) * cut.channels // types.lanes
                assert cut.threads in (64, 128, 256)
                assert cut.threads >= min(spots, kernels.THREADS)
                assert cut.threads < 2 * max(spots, 33)


def test_several_launches_for_many_blocks(cupy, launched, monkeypatch):
    given = problem(channels=1, count=520)
    whole = run(cupy, *given)
    monkeypatch.setattr(backend, "MOST_BLOCKS", 2)
    launched.clear()
    for a, b in zip(whole, run(cupy, *given), strict=True):
        np.testing.assert_array_equal(a, b)
    assert max(blocks for _, blocks in launched) == 2
    assert [blocks for name, blocks in launched if name == "resolve_boxes"] == [2] * 8 + [1]


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


@pytest.mark.parametrize(
    ("shape", "count", "sort"),
    [
        ((70, 1, 30, 20), 400, False),
        ((70, 1, 30, 20), 400, True),
        ((1, 1, 1500, 20), 300, False),
        ((1, 1, 20, 1100), 8400, False),
        ((3, 40, 50, 60), 100, True),
    ],
)
def test_boxes_are_found_by_image_and_by_tile(shape, count, sort, cupy):
    """More images, rows or columns of tiles than zones, and more boxes than a block looks for at a time."""
    from cupy_roialign.gpu.cupy_arrays import CupyBackend

    rng = np.random.default_rng(9)
    centers = rng.uniform(-5, 1, (count, 2)) * -np.array(shape[:1:-1]) / 5
    half = rng.uniform(-1, 4, (count, 2))
    boxes = np.concatenate([centers - half, centers + half], 1).astype(np.float32)
    boxes[3], boxes[5] = np.nan, [-1e30, -1e30, 1e30, 1e30]
    indices = rng.integers(0, shape[0], count)
    indices = np.sort(indices) if sort else indices
    grad = rng.uniform(-1, 1, (count, shape[1], 2, 2)).astype(np.float32)
    given, rule = (grad, np.zeros(shape, np.float32), boxes, indices), rules.roi_align((2, 2), 1.0, 1)
    found = CupyBackend().feature_gradient(*map(cupy.asarray, given), rule)
    tolerance.assert_close(found.get(), cpu_backend.feature_gradient(*given, rule), 1e-5)


@pytest.mark.parametrize("tile", [(16, 16), (8, 8), (3, 16)])
def test_zones_cover_every_tile_and_are_few(tile):
    for size in ((1, 1), (16, 17), (100, 3000), (70_000, 1), (2**31 - 1, 5)):
        for images in (0, 1, 64, 1000):
            zones = Zones.of(images, size, tile)
            assert zones.counts[2] == min(images, tiling.MOST_ZONES)
            for count, pixels, side, n in zip(zones.counts, zones.pixels, tile, size, strict=False):
                assert pixels % side == 0
                assert (count - 1) * pixels < n <= count * pixels
                assert count <= tiling.MOST_ZONES
            assert zones.bytes(64) == 8 * sum(zones.counts)


# ---- a level is subtracted from the features ----

OFFSET = 2.0**20


def offset_problem(channels, order, boxes_of):
    """Features that are exact in float32 with OFFSET added too: multiples of an eighth."""
    rng = np.random.default_rng(2)
    features = rng.integers(-64, 64, (2, channels, 19, 22)).astype(np.float32) / 8
    features = np.ascontiguousarray(features.transpose(order)).transpose(np.argsort(order))
    boxes = (rng.uniform(0, 20, (6, 4)) / (20 if boxes_of == Frame.NORMALIZED else 1)).astype(np.float32)
    return features, boxes, rng.integers(0, 2, 6)


LEVELED = [
    rules.crop_and_resize((5, 9)),
    rules.roi_crop((5, 9)),
    rules.roi_crop((5, 9), centers=False),
    rules.roi_align((5, 9), 1.0, 2, True),
    rules.roi_align((1, 2), 1.0, 90),  # more taps than are held at a time
]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("rule", LEVELED)
def test_an_offset_of_the_features_costs_no_digits_of_slopes(rule, channels, order, cupy):
    """The gradient of the boxes, and derivatives along directions, with which weights change but not their sum."""
    from cupy_roialign.gpu.cupy_arrays import CupyBackend

    features, boxes, indices = offset_problem(channels, order, rule.frame)
    rng = np.random.default_rng(3)
    grad = rng.integers(-8, 8, (6, channels, *rule.bins)).astype(np.float32)
    directions = [cupy.asarray(rng.uniform(-1, 1, boxes.shape).astype(np.float32)) for _ in range(2)]
    results = []
    for values in (features, features + np.float32(OFFSET)):
        on_gpu = [cupy.asarray(array) for array in (values, boxes, indices)]
        grad_on_gpu = cupy.asarray(grad)
        results.append(
            [CupyBackend().forward(*on_gpu, rule, directions[:count]).get() for count in (1, 2)]
            + [CupyBackend().box_gradient(grad_on_gpu, *on_gpu, rule, directions[:count]).get() for count in (0, 1)]
        )
    for expected, found in zip(*results, strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_level_that_is_not_finite_stays_where_it_is(value, cupy):
    """The first pixel of a bin is its level; a non-finite one affects only the boxes that sample it."""
    features, boxes, indices = offset_problem(9, (0, 1, 2, 3), Frame.SCALED)
    grad = np.ones((6, 9, 5, 9), np.float32)
    options = {"output_size": (5, 9), "sampling_ratio": 2, "batch_indices": indices}
    sound = cr.vjp(cr.roi_align, features, boxes, **options)[1](grad)[1]
    y, x = int(boxes[0, 1]), int(boxes[0, 0])
    features[indices[0], 4, y : y + 2, x : x + 2] = value
    expected = cr.vjp(cr.roi_align, features, boxes, **options)[1](grad)[1]
    options["batch_indices"] = cupy.asarray(indices)
    found = cr.vjp(cr.roi_align, cupy.asarray(features), cupy.asarray(boxes), **options)[1](cupy.asarray(grad))[1].get()
    assert not np.isfinite(found[0]).any()
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
    tolerance.assert_close(found[np.isfinite(found)], sound[np.isfinite(found)], 1e-5)
