"""What only the emulated device can show of the CUDA path, and that the emulation is strict."""

import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import kernels, numpy_backend
from cupy_roialign.geometry import Dialect, Rule
from tests import tolerance
from tests.backends import EmulatedTorchBackend
from tests.test_kernels import problem, run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cupy(emulated):
    return emulated


def test_the_backends_mirror_each_other(cupy):
    from cupy_roialign import cupy_backend, tensors

    def public(module):
        functions = inspect.getmembers(module, inspect.isroutine)
        own = {name: f for name, f in functions if name[0] != "_" and f.__module__.startswith("cupy_roialign")}
        return {name: list(inspect.signature(f).parameters) for name, f in own.items()}

    assert public(cupy_backend) == public(numpy_backend)
    assert public(tensors) == {name: found for name, found in public(numpy_backend).items() if name != "join"}
    assert len(public(numpy_backend)) == 4


def test_every_instantiation_that_is_asked_for_is_listed(cupy, monkeypatch):
    from cupy_roialign.cupy_backend import CupyBackend

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
        features = cupy.zeros((2, 3, 4, 5), dtype)
        if order == "NHWC":
            features = cupy.zeros((2, 4, 5, 3), dtype).transpose(0, 3, 1, 2)
        boxes = cupy.zeros((2, 4), box_dtype)
        for dialect in Dialect:
            rule = Rule(dialect, (2, 3), (0, 1, 2, 3))
            backend.forward(features, boxes, indices, rule)
            for grad_dtype in ("float16", "float32", "float64"):
                arguments = (cupy.zeros((2, 3, 2, 3), grad_dtype), features, boxes, indices, rule)
                backend.feature_gradient(*arguments)
                backend.box_gradient(*arguments)
    known = {(kernels.KERNELS[name], types) for name, types in kernels.instantiations()}
    assert len(known) == len(kernels.instantiations())
    assert {(file, types) for file, types in known if types.features != "bfloat16" and not types.large} == asked


def test_the_same_bits_whatever_the_order_of_threads_and_blocks(cupy):
    arguments = problem()
    first = run(cupy, *arguments)
    for seed in range(1, 6):
        cupy.seed = seed
        for a, b in zip(first, run(cupy, *arguments), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("guard", ["back", "front"])
@pytest.mark.parametrize("channels", [1, 5, 70])
def test_nothing_is_read_or_written_out_of_bounds(guard, channels, cupy):
    cupy.guard = guard
    arguments = problem(channels)
    for sampling_ratio in (0, 2, 20):
        expected, pullback = cr.vjp(
            cr.roi_align, *arguments[:2], (5, 9), 1.0, sampling_ratio, True, batch_indices=arguments[2]
        )
        wanted = [expected, *pullback(arguments[3])]
        for a, b in zip(run(cupy, *arguments, sampling_ratio), wanted, strict=True):
            tolerance.assert_close(a, b, 1e-5)


def test_the_reach_of_a_view_decides_and_not_its_size(cupy):
    from cupy_roialign.cupy_backend import CupyBackend

    wide = cupy.ndarray._of(np.broadcast_to(np.zeros(1, np.float32), (3, 2, 2**16, 2**15)), 0)
    assert CupyBackend().view(wide).reach == 0
    far = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2, 1, 1, 1), (4 * 2**31, 4, 4, 4))
    assert CupyBackend().view(cupy.ndarray._of(far, 0)).reach == 2**31


def test_device_and_stream_are_the_callers(cupy):
    features, boxes, indices, cotangent = problem()
    with cupy.cuda.Device(1):
        device = [cupy.asarray(array) for array in (features, boxes, indices, cotangent)]
    with cupy.cuda.Stream() as stream:  # the current device is 0, the arrays are on 1
        output, pullback = cr.vjp(cr.roi_crop, *device[:3], (5, 9))
        gradients = pullback(device[3])
    assert [array.device.id for array in (output, *gradients)] == [1, 1, 1]
    assert [(launch["device"], launch["stream"]) for launch in cupy.launches] == [(1, stream.ptr)] * 4


def test_tensors_go_to_torchs_stream(cupy):
    """In backward too, whatever CuPy's current stream is."""
    torch = pytest.importorskip("torch")
    features, boxes, indices, cotangent = map(torch.from_numpy, problem())
    features.requires_grad_()
    boxes.requires_grad_()
    with EmulatedTorchBackend().device(stream=77), cupy.cuda.Stream():
        output = cr.roi_crop(features, boxes, indices, (5, 9))
        output.backward(cotangent)
    assert [(launch["kernel"], launch["stream"]) for launch in cupy.launches] == [
        ("forward", 77),
        ("reach", 77),
        ("feature_gradient", 77),
        ("box_gradient", 77),
    ]


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


def spoiled(cupy, name, before, after, types=("float32", "float32", "float32", "float32", False, False)):
    """A kernel with a fault put in."""
    code = kernels.source(name, kernels.Types(*types))
    assert before in code
    return cupy.RawKernel(code.replace(before, after), name)


FILL = "along_y.fill(a.rule, axes[0], change_y, p + thread, thread, a.size[0], start[0]);\n"
BARRIERS = {
    "feature_gradient": (FILL + 20 * " " + "__syncthreads();", FILL),
    "box_gradient": ("        __syncthreads();\n        if (thread < half)", "        if (thread < half)"),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_found(name, cupy, monkeypatch):
    arguments = problem(40)
    right = run(cupy, *arguments)
    original, bad = kernels.kernel, spoiled(cupy, name, *BARRIERS[name])
    monkeypatch.setattr(kernels, "kernel", lambda asked, types: bad if asked == name else original(asked, types))
    differs = []
    for seed in range(5):
        cupy.seed = seed
        differs += [not np.array_equal(a, b) for a, b in zip(right, run(cupy, *arguments), strict=True)]
    assert any(differs)


def test_threads_that_part_are_found(cupy):
    """A barrier that only some of a block's threads reach hangs a GPU."""
    before = "    for (int term = 0;"
    bad = spoiled(cupy, "forward", before, "    if (threadIdx.x == 3) return;\n" + before)
    device = [cupy.asarray(array) for array in problem()[:3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "kernel", lambda name, types: bad)
        with pytest.raises(RuntimeError, match="255 of 256 threads wait at a barrier that the others never reach"):
            cr.roi_align(*device[:2], (5, 9), batch_indices=device[2])


OUT_OF_BOUNDS = """
import numpy as np
from tests.emulate import installed
import cupy_roialign as cr
from cupy_roialign import kernels
with installed() as cupy:
    cupy.guard = {guard!r}
    original = kernels.source
    channel = "(Offset)(first_channel + c) * (Offset)a.output_strides[1]"
    if {spoil}:
        kernels.source = lambda *args: original(*args).replace(channel, channel.replace("+ c", "+ c {shift}"))
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


def test_an_element_that_is_not_written_shows(cupy, monkeypatch):
    bad = spoiled(
        cupy,
        "forward",
        "    for (int m = 0; m < OUTPUTS; ++m) {\n        const int place",
        "    for (int m = 1; m < OUTPUTS; ++m) {\n        const int place",
    )
    monkeypatch.setattr(kernels, "kernel", lambda name, types: bad)
    features, boxes, indices, _ = problem()
    output = cr.roi_align(cupy.asarray(features), cupy.asarray(boxes), (5, 9), batch_indices=cupy.asarray(indices))
    assert np.isnan(output.get()).any()


def test_wrong_launches_raise(cupy):
    kernel = kernels.kernel("forward", kernels.every_types()[0])
    arguments = np.zeros((), kernels.ARGUMENTS)
    for grid, block, args, error in [
        ((0,), (256,), (arguments,), ValueError),
        ((2**31,), (256,), (arguments,), ValueError),
        ((1,), (1025,), (arguments,), ValueError),
        ((1,), (256,), (3,), TypeError),
        ((1,), (256,), (arguments["rule"],), TypeError),
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
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_the_sanitizers_script_runs_with_it(emulated):
    command = [sys.executable, "-m", "tests.emulate", "-m", "tests.sanitize"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "72 kernels ran\n", done.stderr


def test_it_leaves_no_trace(emulated):
    program = (
        "import sys\nfrom tests.emulate import installed\n"
        "with installed() as cupy:\n    import cupy as found\n    assert found is cupy\n"
        "assert 'cupy' not in sys.modules and 'cupy_roialign.cupy_backend' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
