"""What is common to all test files: the backends as fixtures, and what each needs."""

import contextlib
import os

import hypothesis
import pytest

from cupy_roialign.diagnose import problems
from tests import backends, emulate
from tests.emulate import device

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=int(os.environ.get("CUPY_ROIALIGN_EXAMPLES", 100))
)
hypothesis.settings.load_profile("default")


def _need_compiler():
    if not device.compiler_found():
        if os.environ.get("CI"):
            pytest.fail("g++ is needed to run the kernels on the emulated device")
        pytest.skip("no g++, which runs the kernels on the emulated device")


def _need_gpu():
    try:
        import cupy
    except Exception as error:
        reason = f"CuPy cannot be imported: {error}"
    else:
        reason = "" if problems.finds_gpu(cupy) else "CuPy finds no GPU"
    if reason:
        if os.environ.get("CUPY_ROIALIGN_REQUIRE_GPU", "0") not in ("", "0"):
            pytest.fail(f"CUPY_ROIALIGN_REQUIRE_GPU is set, and {reason}")
        pytest.skip(f"no GPU: {reason}")


def _need_cuda_torch():
    _need_gpu()
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        if os.environ.get("CUPY_ROIALIGN_REQUIRE_GPU", "0") not in ("", "0"):
            pytest.fail("CUPY_ROIALIGN_REQUIRE_GPU is set, and torch finds no GPU")
        pytest.skip("no GPU: torch finds none")


def on_gpu(name):
    return pytest.param(name, marks=pytest.mark.gpu)


@pytest.fixture(
    params=["plain", "compiled", "torch", "emulated", "emulated-torch", on_gpu("cupy"), on_gpu("cuda-torch")],
    scope="session",
)
def backend(request):
    """What one body of tests runs on."""
    if request.param.startswith("emulated"):
        _need_compiler()
        return backends.EmulatedBackend(device) if request.param == "emulated" else backends.EmulatedTorchBackend()
    if request.param == "cupy":
        _need_gpu()
        import cupy

        return backends.CupyBackend(cupy)
    if request.param == "cuda-torch":
        _need_cuda_torch()
        return backends.CudaTorchBackend()
    return backends.TorchBackend() if request.param == "torch" else backends.NumpyBackend(request.param)


@pytest.fixture(params=["plain", "compiled"])
def way(request):
    """The two ways of the CPU: all calls of the test take one of them."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    with backends.way(request.param):
        yield request.param


@pytest.fixture
def emulated():
    """CuPy's stand-in, in CuPy's place; see tests/emulate."""
    _need_compiler()
    with emulate.installed() as stand_in:
        stand_in.launches.clear()
        yield stand_in
        stand_in.seed, stand_in.guard = 0, "back"


@pytest.fixture(params=["cpu", "emulated"])
def place(request):
    """A context in which tensors are worked on: the CPU, and the kernels on the emulated device."""
    if request.param == "cpu":
        return contextlib.nullcontext
    request.getfixturevalue("emulated")
    return backends.EmulatedTorchBackend().device


@pytest.fixture
def gpu():
    """CuPy, where it has a GPU."""
    _need_gpu()
    import cupy

    return cupy


@pytest.fixture(params=["emulated", on_gpu("gpu")])
def cupy(request):
    """CuPy, and its stand-in."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def cuda_torch():
    """torch, where it has a GPU."""
    _need_cuda_torch()
    import torch

    return torch
