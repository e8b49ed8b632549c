"""What only the emulated device can show of the CUDA path, and that the emulation is strict."""

import concurrent.futures
import contextlib
import importlib
import inspect
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import rule as rules
from cupy_roialign.cpu import backend as cpu_backend
from cupy_roialign.gpu import arguments, kernels
from cupy_roialign.gpu import backend as gpu_backend
from tests import tolerance
from tests.backends import EmulatedTorchBackend, view
from tests.test_kernels import problem, run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cupy(emulated):
    return emulated


def test_the_backends_mirror_each_other(cupy):
    from cupy_roialign.gpu import cupy_arrays
    from cupy_roialign.torch import tensors

    def public(module):
        functions = inspect.getmembers(module, inspect.isroutine)
        own = {name: f for name, f in functions if name[0] != "_" and f.__module__.startswith("cupy_roialign")}
        return {name: list(inspect.signature(f).parameters) for name, f in own.items()}

    names = ("forward", "feature_gradient", "box_gradient")
    expected = {name: public(cpu_backend)[name] for name in names}
    for module in (cupy_arrays, tensors):
        assert {name: public(module).get(name) for name in names} == expected


def test_every_instantiation_that_is_asked_for_is_listed(cupy, monkeypatch):
    from cupy_roialign.gpu.cupy_arrays import CupyBackend

    asked = set()

    def kernel(name, types):
        asked.add((kernels.KERNELS[name], types))
        return lambda grid, block, args: None

    monkeypatch.setattr(kernels, "kernel", kernel)
    backend = CupyBackend()
    indices = cupy.zeros(2, np.int64)
    for dtype, box_dtype, order in itertools.product(
        [*kernels.CTYPES, "bool", "int64"], ("float16", "float32", "float64"), ("NCHW", "NHWC")
    ):
        if dtype == "bfloat16":
            continue  # NumPy has none without another package
        features = cupy.zeros((2, 9, 4, 5), dtype)
        if order == "NHWC":
            features = cupy.zeros((2, 4, 5, 9), dtype).transpose(0, 3, 1, 2)
        boxes = cupy.zeros((2, 4), box_dtype)
        for rule in (rules.crop_and_resize((2, 3)), rules.roi_crop((2, 3)), rules.roi_align((2, 3))):
            backend.forward(features, boxes, indices, rule)
            backend.forward(features, boxes, indices, rule, [boxes])
            for grad_dtype in ("float16", "float32", "float64"):
                given = (cupy.zeros((2, 9, 2, 3), grad_dtype), features, boxes, indices, rule)
                backend.feature_gradient(*given)
                backend.box_gradient(*given)
    known = {(kernels.KERNELS[name], types) for name, types in kernels.instantiations()}
    assert len(known) == len(kernels.instantiations())
    assert {(file, types) for file, types in known if types.features != "bfloat16" and not types.large} == asked


def test_the_same_bits_whatever_the_order_of_threads_and_blocks(cupy):
    given = problem()
    first = run(cupy, *given)
    for seed in range(1, 6):
        cupy.seed = seed
        for a, b in zip(first, run(cupy, *given), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("guard", ["back", "front"])
@pytest.mark.parametrize("channels", [1, 5, 70])
def test_nothing_is_read_or_written_out_of_bounds(guard, channels, cupy):
    cupy.guard = guard
    given = problem(channels)
    for sampling_ratio in (0, 2, 20):
        expected, pullback = cr.vjp(cr.roi_align, *given[:2], (5, 9), 1.0, sampling_ratio, True, batch_indices=given[2])
        wanted = [expected, *pullback(given[3])]
        for a, b in zip(run(cupy, *given, sampling_ratio), wanted, strict=True):
            tolerance.assert_close(a, b, 1e-5)


def test_the_last_offset_of_a_view_decides_and_not_its_size(cupy):
    wide = cupy.ndarray._of(np.broadcast_to(np.zeros(1, np.float32), (3, 2, 2**16, 2**15)), 0)
    assert view(cupy, wide).last_offset == 0
    far = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2, 1, 1, 1), (4 * 2**31, 4, 4, 4))
    assert view(cupy, cupy.ndarray._of(far, 0)).last_offset == 2**31


def test_device_and_stream_are_the_callers(cupy):
    features, boxes, indices, cotangent = problem()
    with cupy.cuda.Device(1):
        device = [cupy.asarray(array) for array in (features, boxes, indices, cotangent)]
        stream = cupy.cuda.Stream()
    for current in (stream, contextlib.nullcontext()):
        cupy.launches.clear()
        # the arrays are on device 1, and device 0 is current with a stream of its own
        with cupy.cuda.Device(1), current, cupy.cuda.Device(0), cupy.cuda.Stream():
            output, pullback = cr.vjp(cr.roi_crop, *device[:3], (5, 9))
            gradients = pullback(device[3])
        assert [array.device.id for array in (output, *gradients)] == [1, 1, 1]
        expected = stream.ptr if current is stream else 0
        assert [(launch["device"], launch["stream"]) for launch in cupy.launches] == [(1, expected)] * 5


def test_a_stream_belongs_to_its_device(cupy):
    """As in CuPy, where each device has a current stream."""
    with cupy.cuda.Stream() as stream:
        with cupy.cuda.Device(1):
            assert cupy.cuda.get_current_stream().ptr == 0
            with pytest.raises(RuntimeError, match="a stream of device 0 entered on device 1"), stream:
                pass
        assert cupy.cuda.get_current_stream().ptr == stream.ptr
    assert cupy.cuda.get_current_stream().ptr == 0


@pytest.mark.parametrize("version", [13, 14])
def test_tensors_go_to_torchs_stream(version, cupy, monkeypatch):
    """In backward too, which torch calls from a thread of its own; whatever CuPy's current stream is.

    CuPy 13 has one way to take it, and 14 warns of that.
    """
    torch = pytest.importorskip("torch")
    monkeypatch.delattr(*(cupy.cuda.Stream, "from_external") if version == 13 else (cupy.cuda, "ExternalStream"))
    features, boxes, indices, cotangent = map(torch.from_numpy, problem())
    features.requires_grad_()
    boxes.requires_grad_()
    streams = {threading.get_ident(): 77}
    with EmulatedTorchBackend().device(stream=lambda: streams.get(threading.get_ident(), 88)), cupy.cuda.Stream():
        output = cr.roi_crop(features, boxes, indices, (5, 9))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(output.backward, cotangent).result()
    assert [(launch["kernel"], launch["stream"]) for launch in cupy.launches] == [
        ("forward", 77),
        ("resolve_boxes", 88),
        ("feature_gradient", 88),
        ("box_gradient", 88),
        ("box_gradient_sum", 88),
    ]


def test_tensors_go_to_their_own_device(cupy, monkeypatch):
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    from cupy_roialign.torch import private, tensors

    backend, asked = tensors._CudaBackend(), []
    monkeypatch.setattr(private, "current_stream", lambda device: asked.append(device) or 77)
    with FakeTensorMode():
        tensor = torch.zeros(3, device="cuda:1")
        assert backend.empty((2,), "float32", tensor).device == tensor.device
    for current in (0, 1):
        with cupy.cuda.Device(current):
            with backend.on(tensor):
                assert (cupy.cuda.Device().id, cupy.cuda.get_current_stream().ptr) == (1, 77)
            assert (cupy.cuda.Device().id, cupy.cuda.get_current_stream().ptr) == (current, 0)
    assert asked == [tensor.device] * 2


@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_callers_in_many_threads(kind, cupy):
    """Each with its own stream, and the results that it has alone."""
    torch = pytest.importorskip("torch")
    streams, count = {}, 12

    def call(number):
        values = [np.roll(array, number) if array.dtype.kind == "f" else array for array in problem()]
        with cupy.cuda.Stream() as stream:
            streams[threading.get_ident()] = stream.ptr
            if kind == "arrays":
                results = run(cupy, *values)
            else:
                features, boxes, indices, cotangent = map(torch.from_numpy, values)
                inputs = (features.requires_grad_(), boxes.requires_grad_())
                output = cr.roi_align(*inputs, (5, 9), batch_indices=indices)
                results = [output.detach(), *torch.autograd.grad(output, inputs, cotangent)]
        return stream.ptr, [np.asarray(result) for result in results]

    with EmulatedTorchBackend().device(stream=lambda: streams[threading.get_ident()]):
        alone = [call(number)[1] for number in range(count)]
        cupy.launches.clear()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            used, together = zip(*pool.map(call, range(count)), strict=True)
    for expected, actual in zip(alone, together, strict=True):
        for a, b in zip(expected, actual, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(set(used)) == count
    assert sorted(launch["stream"] for launch in cupy.launches) == sorted(5 * used)


# A CUDA graph can record launches, and memory of the library's own allocator, but not that someone waits for the GPU or
# copies to the host. With a GPU graphs are recorded in test_gpu.py.

# of torch, all on one device: memory, views, fills, and in other dtypes
ON_DEVICE = {"empty", "full", "fill_", "detach", "select", "as_strided", "permute", "cat", "slice", "narrow"}
CASTS = {"to", "_to_copy", "empty_strided", "copy_"}


def calls_of(library, dtype="float32"):
    """Of each way to give boxes: forward, and both gradients; in (5, 9) bins as in `problem`."""
    features, boxes, indices, cotangent = problem()
    rows = np.concatenate([indices[:, None], boxes], 1)
    several = [boxes[indices == image] for image in range(len(features))]
    cast = lambda array: library.asarray(array.astype(dtype))  # noqa: E731
    given = {
        "indices": (cast(boxes), {"batch_indices": library.asarray(indices)}),
        "rows": (cast(rows), {}),
        "a list": ([cast(part) for part in several], {}),
    }
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        laid_out = np.ascontiguousarray(features.transpose(order)).transpose(np.argsort(order))
        for boxes, options in given.values():
            yield cast(laid_out), boxes, options, cast(cotangent)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_call_on_arrays_never_waits(dtype, cupy, monkeypatch):
    from cupy_roialign.gpu.cupy_arrays import CupyBackend

    def wait(*args, **kwargs):
        raise AssertionError("this waits for the GPU")

    made = list(calls_of(cupy, dtype))
    for owner, names in {
        cupy.ndarray: ("get", "item", "__bool__", "__float__", "__array__"),
        cupy.cuda.Stream: ("synchronize",),
        cupy.cuda.Device: ("synchronize",),
        cupy: ("asnumpy",),
        CupyBackend: ("host",),
    }.items():
        for name in names:
            monkeypatch.setattr(owner, name, wait)
    for features, boxes, options, cotangent in made:
        _, pullback = cr.vjp(cr.roi_align, features, boxes, (5, 9), **options)
        pullback(cotangent)
        with cr.checked(), pytest.raises(AssertionError, match="this waits"):  # that it would be seen
            cr.roi_align(features, boxes, (5, 9), **options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_call_on_tensors_never_waits(dtype, cupy, monkeypatch):
    """And takes memory from torch alone."""
    torch = pytest.importorskip("torch")
    made = list(calls_of(torch, dtype))
    monkeypatch.setattr(cupy, "empty", None)
    allowed = ON_DEVICE | CASTS if dtype == "float16" else ON_DEVICE | {"to"}  # which is nothing without another dtype

    def used(function):
        with torch.autograd.profiler.profile() as profile:
            result = function()
        return result, {event.name for event in profile.function_events if event.name.startswith("aten::")}

    with EmulatedTorchBackend().device():
        for features, boxes, options, cotangent in made:
            listed = isinstance(boxes, list)
            leaves = [leaf.requires_grad_() for leaf in (features, *(boxes if listed else [boxes]))]
            output, names = used(lambda: cr.roi_align(features, boxes, (5, 9), **options))  # noqa: B023
            gradients, more = used(lambda: torch.autograd.grad(output, leaves, cotangent, create_graph=True))  # noqa: B023
            steps = [names, more]
            if not listed:  # whose parts torch puts together in its own way
                steps.append(used(lambda: torch.autograd.grad(gradients[1], leaves, gradients[1]))[1])  # noqa: B023
            for names in steps:
                assert {name.removeprefix("aten::") for name in names} <= allowed
                assert "aten::empty" in names  # that they are seen


def test_cuda_tensors_without_cupy(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with FakeTensorMode():
        features, boxes, indices = (torch.zeros(shape, device="cuda") for shape in ((1, 2, 3, 4), (5, 4), (5,)))
    with pytest.raises(
        ImportError, match=r"features is a torch.* on cuda:0, .*CuPy.*pip install 'cupy_roialign\[cuda13\]'"
    ):
        cr.roi_crop(features, boxes, indices.long(), 3)


def test_arrays_on_two_devices(cupy):
    features, boxes, indices, _ = problem()
    with cupy.cuda.Device(1):
        elsewhere = cupy.asarray(boxes)
    with pytest.raises(TypeError, match=r"features and boxes .*cupy.ndarray on GPU 0 and cupy.ndarray on GPU 1"):
        cr.roi_crop(cupy.asarray(features), elsewhere, cupy.asarray(indices), 3)
    with pytest.raises(TypeError, match=r"features and boxes .*cupy.ndarray on GPU 0 and numpy.ndarray on the CPU"):
        cr.roi_crop(cupy.asarray(features), boxes, cupy.asarray(indices), 3)


def spoiled(cupy, name, before, after, types=("float32", "float32", "float32", "float32", False, False, 8)):
    """A kernel with a fault put in."""
    code = kernels.source(name, kernels.Types(*types))
    assert before in code
    return cupy.RawKernel(code.replace(before, after), name)


FIND = "for (int i = thread; i < count * 2 * MOST_PIXELS; i += THREADS)"
BARRIERS = {
    "feature_gradient": ("__syncthreads();\n    " + FIND, FIND),
    "box_gradient": ("__syncthreads();\n        if (thread % width < half)", "if (thread % width < half)"),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_found(name, cupy, monkeypatch):
    given = problem(40)
    right = run(cupy, *given)
    original, bad = kernels.kernel, spoiled(cupy, name, *BARRIERS[name])
    monkeypatch.setattr(kernels, "kernel", lambda asked, types: bad if asked == name else original(asked, types))
    differs = []
    for seed in range(5):
        cupy.seed = seed
        differs += [not np.array_equal(a, b) for a, b in zip(right, run(cupy, *given), strict=True)]
    assert any(differs)


def test_threads_that_part_are_found(cupy):
    """A barrier that only some of a block's threads reach hangs a GPU."""
    before = "    for (int term = 0;"
    bad = spoiled(cupy, "forward", before, "    if (threadIdx.x == 3) return;\n" + before)
    device = [cupy.asarray(array) for array in problem()[:3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "kernel", lambda name, types: bad)
        with pytest.raises(RuntimeError, match="127 of 128 threads wait at a barrier that the others never reach"):
            cr.roi_align(*device[:2], (5, 9), batch_indices=device[2])


OUT_OF_BOUNDS = """
import numpy as np
from tests.emulate import installed
import cupy_roialign as cr
from cupy_roialign.gpu import kernels
with installed() as cupy:
    cupy.guard = {guard!r}
    original = kernels.source
    channel = "(Offset)spot.channel * (Offset)a.output_strides[1]"
    if {spoil}:
        other = channel.replace("spot.channel", "(spot.channel {shift})")
        kernels.source = lambda *args: original(*args).replace(channel, other)
    features = cupy.asarray(np.ones((1, 3, 4, 4), np.float32))
    cr.roi_align(features, cupy.asarray(np.array([[0, 0, 0, 4, 4.]], np.float32)), 3)
print("alive")
"""


@pytest.mark.parametrize(("guard", "shift"), [("back", "+ 1"), ("front", "- 1")])
def test_an_access_out_of_bounds_ends_the_process(guard, shift, emulated):
    for spoil in (True, False):
        program = OUT_OF_BOUNDS.format(guard=guard, spoil=spoil, shift=shift)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode < 0) == spoil, done.stderr
        assert ("alive" in done.stdout) == (not spoil)


def test_a_tile_looks_at_few_boxes_beyond_those_that_touch_it(cupy, monkeypatch):
    """Of the many boxes of a call: they are marked for zones of tiles."""
    from cupy_roialign.gpu.cupy_arrays import CupyBackend

    rng = np.random.default_rng(4)
    count, side = 4000, 256
    corners = rng.uniform(0, side - 9, (count, 2))
    boxes = np.concatenate([corners, corners + 8], 1).astype(np.float32)
    indices = rng.integers(0, 2, count)
    look = "const Bounds bounds = bounds_of(a)[k];"
    counting = spoiled(cupy, "feature_gradient", look, look + " ++*(long long*)a.directions[0];")
    looks, original, blocks = cupy.zeros(1, np.int64), kernels.kernel, []

    def kernel(name, types):
        if name != "feature_gradient":
            return original(name, types)

        def launch(grid, block, args):
            args[0].view(arguments.ARGUMENTS)["directions"][0] = looks.data.ptr
            blocks.append(grid[0])
            counting(grid, block, args)

        return launch

    monkeypatch.setattr(kernels, "kernel", kernel)
    given = (np.zeros((count, 1, 2, 2), np.float32), np.zeros((2, 1, side, side), np.float32), boxes, indices)
    CupyBackend().feature_gradient(*map(cupy.asarray, given), rules.roi_align((2, 2), 1.0, 2, True))
    touching = blocks[0] * count / 2 * ((8 + 16 + 6) / side) ** 2  # each tile's, on average, with 3 pixels all around
    assert looks.item() < 1.5 * touching < 0.05 * blocks[0] * count


def test_an_element_that_is_not_written_shows(cupy, monkeypatch):
    bad = spoiled(cupy, "forward", "write_lanes(a.result,", "if (spot.y) write_lanes(a.result,")
    monkeypatch.setattr(kernels, "kernel", lambda name, types: bad)
    features, boxes, indices, _ = problem()
    output = cr.roi_align(cupy.asarray(features), cupy.asarray(boxes), (5, 9), batch_indices=cupy.asarray(indices))
    assert np.isnan(output.get()).any()


def test_a_misaligned_access_is_found(cupy, monkeypatch):
    """Of a pack, which is fine on a CPU, and an error on a GPU that ends the process's use of it."""
    features, boxes, indices, _ = map(cupy.asarray, problem(20))
    last = cupy.asarray(features.get().transpose(0, 2, 3, 1).copy()).transpose(0, 3, 1, 2)[:, 1:17]
    cr.roi_align(last, boxes, (5, 9), batch_indices=indices)
    monkeypatch.setattr(arguments.View, "is_packed", lambda view, lanes: True)
    monkeypatch.setattr(gpu_backend, "plan", gpu_backend.plan.__wrapped__)  # not one from the cache
    with pytest.raises(RuntimeError, match="forward: an access of 16 bytes to an address that is no multiple of it"):
        cr.roi_align(last, boxes, (5, 9), batch_indices=indices)


def test_wrong_launches_raise(cupy):
    kernel = kernels.kernel("forward", kernels.every_types()[0])
    given = np.zeros((), arguments.ARGUMENTS)
    for grid, block, args, error in [
        ((0,), (256,), (given,), ValueError),
        ((2**31,), (256,), (given,), ValueError),
        ((1,), (1025,), (given,), ValueError),
        ((1,), (256,), (3,), TypeError),
        ((1,), (256,), (given["rule"],), TypeError),
    ]:
        with pytest.raises(error):
            kernel(grid, block, args)


def test_a_script_runs_with_it(tmp_path, emulated):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, cupy, cupy_roialign as cr\n"
        "columns = cupy.asarray([[[[0, 1, 2, 3.0]] * 4]], cupy.float32)\n"
        "boxes = cupy.asarray([[0, 0, 0, 4, 4]], dtype=cupy.float32)\n"
        "crops = cr.roi_align(columns, boxes, 2, 1.0, 2, True) * 2 + 1\n"
        "print(sys.argv[1:], cupy.asnumpy(crops)[0, 0, 0])\n"
    )
    command = [sys.executable, "-m", "tests.emulate", script, "an", "argument"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "['an', 'argument'] [2. 6.]\n", done.stderr


def test_the_benchmark_of_the_gpu_runs_with_it(tmp_path, emulated):
    command = [sys.executable, "-m", "tests.emulate", "-m", "benchmarks.gpu", "--rehearse", "W1", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["gpu"] == "the emulated device"
    assert set(report["ms: median, least, most"]["W1 float16"]["forward"]) == {"NCHW", "channels-last"}
    assert report["the same bits in 100 runs"]
    assert set(report["kernels"]) == set(kernels.KERNELS)
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_the_sanitizers_script_runs_with_it(emulated):
    command = [sys.executable, "-m", "tests.emulate", "-m", "tests.sanitize"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "96 calls ran\n", done.stderr


def test_to_import_that_script_changes_nothing(emulated, monkeypatch):
    """Pytest does, where CuPy is there, and all other tests go on with its pool."""
    monkeypatch.setattr(emulated.cuda, "set_allocator", lambda allocator: pytest.fail("no pool"), raising=False)
    monkeypatch.delitem(sys.modules, "tests.sanitize", raising=False)
    importlib.import_module("tests.sanitize")


def test_it_leaves_no_trace(emulated):
    program = (
        "import sys\nfrom tests.emulate import installed\n"
        "with installed() as cupy:\n    import cupy as found\n    assert found is cupy\n"
        "assert 'cupy' not in sys.modules and 'cupy_roialign.gpu.cupy_arrays' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
