"""`python -m cupy_roialign`: how it finds facts, what it makes of them, and the errors that use the same words."""

import configparser
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign import __main__
from cupy_roialign.cpu import backend as cpu_backend
from cupy_roialign.diagnose import doctor, driver, problems
from cupy_roialign.gpu import kernels
from tests import conftest, oracle
from tests.backends import EmulatedTorchBackend
from tests.emulate import device

ROOT = Path(__file__).parents[1]
KERNEL = kernels.kernel  # the one that asks CuPy

# ---- from facts to problems ----


def facts(cuda=None, gpus=(), error=None, cupy=None, torch=None, **environment):
    """Those of a machine that has nothing, but for what is said. `gpus`: their compute capabilities."""
    devices = [{"name": "A GPU", "compute_capability": list(gpu), "memory_bytes": 2**34} for gpu in gpus]
    no_cupy = {"version": None, "error": None, "distributions": [], "built_for": None, "rocm": False}
    no_cupy |= {"nvrtc": None, "gpus": 0, "gpu_error": None}
    return {
        "cupy_roialign": "0.1.0",
        "python": "3.12.0",
        "platform": "Linux",
        "numpy": "2.0.0",
        "compiled": {"numba": None, "error": None, "why_not": "Numba is not installed", "folder": None},
        "threads": {"count": 2, "error": None},
        "driver": {"cuda": cuda, "release": cuda and "550.54.15", "devices": devices, "error": error},
        "cupy": no_cupy | (cupy or {}),
        "torch": {"version": None, "error": None, "cuda": None, "gpus": 0} | (torch or {}),
        "kernel_cache": {"folder": "/cache", "files": 3, "bytes": 2**20, "in_memory": False},
        "environment": environment,
    }


CUPY_12 = {"version": "14.2.0", "distributions": ["cupy-cuda12x"], "built_for": (12, 9), "nvrtc": (12, 9), "gpus": 1}
CUPY_13 = CUPY_12 | {"distributions": ["cupy-cuda13x"], "built_for": (13, 2), "nvrtc": (13, 5)}
BLIND = CUPY_13 | {"gpus": 0, "gpu_error": "cudaErrorInsufficientDriver"}
BROKEN = {"error": "ImportError: libcudart.so.13: cannot open", "distributions": ["cupy-cuda13x"]}
TORCH = {"version": "2.13.0", "cuda": "12.6", "gpus": 1}
HOPPER, VOLTA = (9, 0), (7, 0)
# As CuPy says it: 14.2 without headers and without a compiler; 13 without either; a header that the compiler misses.
NO_HEADERS = (
    "Failed to find CUDA headers. Please install CUDA toolkit headers (e.g., pip install cupy-cuda12x[ctk]) or specify "
    "CUDA_PATH environment variable."
)
NO_COMPILER = 'Failure finding "libnvrtc.so"'
NO_CUDA_ROOT = "Failed to auto-detect CUDA root directory. Please specify `CUDA_PATH` environment variable"
NO_LIBRARY = "CuPy failed to load libnvrtc.so.13: OSError: libnvrtc.so.13: cannot open shared object file"
NO_FILE = 'catastrophic error: cannot open source file "vector_types.h"'

# name: (facts, what failed in the self-test, {code: what it stops}, words of what to do)
SITUATIONS = {
    "nothing": (facts(), {}, {}, ()),
    "a wrong number of threads": (
        facts() | {"threads": {"count": None, "error": "NUM_THREADS must be a whole number"}},
        {},
        {"threads": ["numpy", "torch_cpu"]},
        ("unset it",),
    ),
    "a GPU, and all is well": (facts((13, 0), [HOPPER], cupy=CUPY_13, torch=TORCH), {}, {}, ()),
    "CuPy and no driver": (facts(cupy=BLIND), {}, {"driver_missing": []}, ("docker run --gpus all",)),
    "CuPy is broken, and no driver": (
        facts(cupy=BROKEN | {"distributions": ["cupy-cuda12x"]}),
        {},
        {"cupy_broken": []},
        ("pip uninstall -y cupy-cuda12x && pip install 'cupy_roialign[cuda12]'",),
    ),
    "a driver and no GPU": (facts((13, 0)), {}, {}, ()),
    "a driver, no GPU, and CuPy": (facts((13, 0), cupy=BLIND), {}, {"gpu_missing": []}, ("nvidia-smi -L",)),
    "no CuPy": (facts((13, 0), [HOPPER]), {}, {"cupy_missing": ["cupy"]}, ("pip install 'cupy_roialign[cuda13]'",)),
    "no CuPy, and an older driver": (facts((12, 4), [HOPPER]), {}, {"cupy_missing": ["cupy"]}, ("[cuda12]'",)),
    "no CuPy, and an old GPU": (facts((13, 0), [HOPPER, VOLTA]), {}, {"cupy_missing": ["cupy"]}, ("[cuda12]'",)),
    "no CuPy, and a driver too old for any": (
        facts((11, 4), [HOPPER]),
        {},
        {"cupy_missing": ["cupy"]},
        ("update the NVIDIA driver to 580 or newer, then pip install 'cupy_roialign[cuda13]'",),
    ),
    "no CuPy, and a driver and a GPU too old": (
        facts((11, 4), [VOLTA]),
        {},
        {"cupy_missing": ["cupy"]},
        ("update the NVIDIA driver to 525 or newer, then pip install 'cupy_roialign[cuda12]'",),
    ),
    "torch with CUDA, and no CuPy": (
        facts((12, 4), [HOPPER], torch=TORCH),
        {},
        {"cupy_missing": ["cupy", "torch_cuda"]},
        ("[cuda12]'",),
    ),
    "torch alone shows the GPU": (
        facts(torch=TORCH),
        {},
        {"cupy_missing": ["cupy", "torch_cuda"]},
        ("older than 580",),
    ),
    "CuPy is broken": (
        facts((13, 0), [HOPPER], cupy=BROKEN),
        {},
        {"cupy_broken": ["cupy"]},
        ("pip uninstall -y cupy-cuda13x && pip install 'cupy_roialign[cuda13]'",),
    ),
    "the driver is too old for CuPy": (
        facts((12, 4), [HOPPER], cupy=BLIND, torch=TORCH),
        {},
        {"driver_old": ["cupy", "torch_cuda"]},
        (
            "pip uninstall -y cupy-cuda13x && pip install 'cupy_roialign[cuda12]'",
            ", or update the NVIDIA driver to 580 or newer",
        ),
    ),
    "the driver is too old for any CuPy": (
        facts((11, 4), [HOPPER], cupy=BLIND | {"distributions": ["cupy-cuda12x"], "built_for": (12, 9)}),
        {},
        {"driver_old": ["cupy"]},
        ("update the NVIDIA driver to 525 or newer",),
    ),
    "the GPU is too old for CuPy": (
        facts((13, 0), [VOLTA], cupy=CUPY_13),
        {"cupy": "CompileException: nvrtc: error: invalid value for --gpu-architecture (-arch)"},
        {"gpu_old": ["cupy"]},
        ("pip uninstall -y cupy-cuda13x && pip install 'cupy_roialign[cuda12]'",),
    ),
    "CuPy finds no GPU": (facts((13, 0), [HOPPER], cupy=BLIND), {}, {"gpu_missing": ["cupy"]}, ("nvidia-smi -L",)),
    "GPUs are hidden": (
        facts((13, 0), cupy=BLIND, CUDA_VISIBLE_DEVICES=""),
        {},
        {"gpu_hidden": []},
        ("unset", "nvidia-smi -L"),
    ),
    "CuPy is too old": (
        facts((13, 0), [HOPPER], cupy=CUPY_13 | {"version": "12.3.0"}, torch=TORCH),
        {},
        {"cupy_old": ["cupy", "torch_cuda"]},
        ("pip uninstall -y cupy-cuda13x && pip install 'cupy_roialign[cuda13]'",),
    ),
    "two CuPys, which work": (
        facts((12, 4), [HOPPER], cupy=CUPY_12 | {"distributions": ["cupy-cuda12x", "cupy-cuda13x"]}),
        {},
        {"cupy_twice": []},
        ("pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install 'cupy_roialign[cuda12]'",),
    ),
    "CuPy for ROCm": (
        facts((13, 0), [HOPPER], cupy=CUPY_13 | {"rocm": True, "distributions": ["cupy-rocm-7-0"]}),
        {},
        {"cupy_rocm": ["cupy"]},
        ("pip uninstall -y cupy-rocm-7-0 && pip install 'cupy_roialign[cuda13]'",),
    ),
    "no headers": (
        facts((13, 0), [HOPPER], cupy=CUPY_12, torch=TORCH),
        {"cupy": NO_HEADERS, "torch_cuda": NO_HEADERS},
        {"toolkit_missing": ["cupy", "torch_cuda"]},
        ("pip install 'cupy_roialign[cuda12]', which brings them, or set CUDA_PATH",),
    ),
    "the driver does not start": (
        facts((13, 0), error="CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", cupy=BLIND, torch=TORCH),
        {},
        {"driver_fails": ["cupy", "torch_cuda"]},
        ("nvidia-smi", "restart"),
    ),
    "torch is broken": (
        facts(torch={"error": "OSError: libgomp"}),
        {},
        {"torch_broken": ["torch_cpu"]},
        ("pytorch.org",),
    ),
    "wrong numbers": (
        facts((13, 0), [HOPPER], cupy=CUPY_13),
        {"numpy": "output is off by 1", "cupy": None},
        {"self_test": ["numpy"]},
        ("--json",),
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_diagnosis(name):
    found, tests, codes, words = SITUATIONS[name]
    diagnosis = doctor.diagnose(found, tests)
    assert {problem["code"]: problem["stops"] for problem in diagnosis} == codes
    assert all(word in diagnosis[0]["do"] for word in words)
    places = doctor.backends(found)
    for place in places.values():
        place["self_test"] = "passed" if place["backend"] else None
    text = doctor.report({**found, "backends": places, "problems": diagnosis, "exit_status": 0})
    assert all(problem["do"] in text for problem in diagnosis)
    assert ("Problem" in text) == any(codes.values())
    assert ("No problems." in text) == (not codes)
    assert ("none: no GPU is used" in text) == (found["driver"]["cuda"] is None)


@pytest.mark.parametrize(
    ("found", "on_gpu", "words"),
    [
        (facts(), [], ("CuPy is not installed", "PyTorch is not installed", "PyTorch is not installed")),
        (
            facts(cupy=BROKEN, torch=TORCH | {"cuda": None, "gpus": 0}),
            [],
            ("CuPy cannot be imported", None, "this PyTorch is built without CUDA"),
        ),
        (facts(cupy=BLIND, torch=TORCH), [], ("CuPy finds no GPU", None, "CuPy finds no GPU")),
        (facts((13, 0), [HOPPER], cupy=CUPY_13, torch=TORCH), ["cupy", "torch_cuda"], (None, None, None)),
        (
            facts((13, 0), [HOPPER], cupy=CUPY_13, torch=TORCH | {"gpus": 0}),
            ["cupy"],
            (None, None, "PyTorch finds no GPU"),
        ),
        (facts(torch={"error": "OSError"}), [], ("CuPy is not installed", *["PyTorch cannot be imported"] * 2)),
        (
            facts((13, 0), [HOPPER], cupy=CUPY_13 | {"version": "11.6.0"}),
            [],
            ("CuPy 11.6.0 is too old", *["PyTorch is not installed"] * 2),
        ),
    ],
)
def test_which_backend_and_why(found, on_gpu, words):
    places = doctor.backends(found)
    assert [kind for kind, place in places.items() if place["backend"] == "GPU"] == on_gpu
    assert places["numpy"] == {"backend": "CPU", "why_not": None}
    assert tuple(places[kind]["why_not"] for kind in ("cupy", "torch_cpu", "torch_cuda")) == words


def test_the_extras_are_those_of_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for name in problems.EXTRAS:
        assert f"cupy-{name}x[ctk]" in config["options.extras_require"][name]


# ---- the reference case ----


def test_the_reference_is_the_oracles():
    boxes = np.array(doctor.REFERENCE["boxes"], np.float32)
    options = dict(doctor.REFERENCE["options"])
    size = options.pop("output_size")
    output, grad_features, grad_boxes = oracle.run(
        "roi_align",
        np.array(doctor.REFERENCE["features"], np.float32),
        boxes[:, [2, 1, 4, 3]],
        boxes[:, 0].astype(int),
        (size, size),
        np.array(doctor.REFERENCE["grad_output"]),
        **options,
    )
    np.testing.assert_array_equal(doctor.REFERENCE["output"], output)
    np.testing.assert_array_equal(doctor.REFERENCE["grad_features"], grad_features)
    np.testing.assert_array_equal(np.array(doctor.REFERENCE["grad_boxes"])[:, [2, 1, 4, 3]], grad_boxes)


@pytest.mark.parametrize("kind", ["numpy", "torch_cpu"])
def test_self_test(kind, monkeypatch):
    if kind == "torch_cpu":
        pytest.importorskip("torch")
    assert doctor.self_test(kind) is None
    monkeypatch.setitem(doctor.REFERENCE, "grad_boxes", np.array(doctor.REFERENCE["grad_boxes"]) + 0.5)
    assert doctor.self_test(kind) == "grad_boxes is off by 0.5"


def test_self_test_of_cupy(cupy, monkeypatch):
    assert doctor.self_test("cupy") is None
    monkeypatch.setattr(cupy, "asnumpy", lambda array: array.get() * np.nan)
    assert doctor.self_test("cupy") == "output is off by nan"


@pytest.mark.gpu
def test_self_test_of_cuda_tensors(cuda_torch):
    assert doctor.self_test("torch_cuda") is None


# ---- how facts are found ----

FAKE_DRIVER = """
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
extern "C" {
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuInit(unsigned) {
    const char* how = getenv("FAKE_DRIVER");
    if (how && !strcmp(how, "hangs")) sleep(60);
    if (how && !strcmp(how, "crashes")) abort();
    return how ? atoi(how) : 0;
}
int cuGetErrorName(int error, const char** name) {
    *name = error == 803 ? "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" : NULL;
    return *name ? 0 : 1;
}
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int number) { *device = 70 + number; return 0; }
int cuDeviceGetName(char* name, int, int device) { strcpy(name, device == 70 ? "GPU A" : "GPU B"); return 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = (size_t)device << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? device - 70 : -1;
    return 0;
}
}
"""


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    if not device.compiler_found():
        pytest.skip("no g++, which compiles a stand-in for the driver")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = [device.COMPILER, "-x", "c++", "-", "-shared", "-fPIC", "-o", path]
    subprocess.run(command, input=FAKE_DRIVER, text=True, timeout=60, check=True)
    return path


def test_a_driver(fake_driver, monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", str(fake_driver))
    assert driver.cuda_version() == (12, 4)
    devices = [
        {"name": "GPU A", "compute_capability": [9, 0], "memory_bytes": 70 * 2**30},
        {"name": "GPU B", "compute_capability": [9, 1], "memory_bytes": 71 * 2**30},
    ]
    assert driver.gpus() == {"devices": devices, "error": None}


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("100", None),
        ("803", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
        ("7", "CUDA error 7"),
        ("crashes", "asking it ended a process with status -6"),
        ("hangs", "no answer in 0.5 seconds"),
    ],
)
def test_a_driver_with_a_fault(how, error, fake_driver, monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", str(fake_driver))
    monkeypatch.setattr(driver, "PATIENCE", 0.5 if how == "hangs" else 30.0)
    monkeypatch.setenv("FAKE_DRIVER", how)
    assert driver.gpus() == {"devices": [], "error": error}


@pytest.mark.parametrize("module", ["Open Kernel Module for x86_64  580.65.06  Release Build", "Module  535.183  Sun"])
def test_the_drivers_number(module, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "RELEASE", tmp_path / "version")
    assert driver.release() is None
    driver.RELEASE.write_text(f"NVRM version: NVIDIA UNIX {module}\nGCC version:  gcc version 12.3.0\n")
    assert driver.release() in module
    assert len(driver.release()) > 6


def test_no_driver(monkeypatch):
    monkeypatch.setattr(driver, "LIBRARY", "libthere_is_none.so")
    assert driver.cuda_version() is None


def test_distributions_of_cupy(tmp_path, monkeypatch):
    for name in ("cupy-cuda12x", "CuPy_cuda13x", "cupy_roialign", "cupy-xarray", "numpy"):
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (tmp_path / "broken-1.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert problems.cupy_distributions() == ["cupy-cuda12x", "cupy-cuda13x"]


def test_kernel_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "none"))
    assert doctor.kernel_cache() == {"folder": str(tmp_path / "none"), "files": 0, "bytes": 0, "in_memory": False}
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    (tmp_path / "a.cubin").write_bytes(bytes(100))
    assert doctor.kernel_cache() == {"folder": str(tmp_path), "files": 1, "bytes": 100, "in_memory": False}


def test_what_cupy_frames_is_shown_alone():
    error = ImportError("\n=====\nFailed to import CuPy.\n\nOriginal error:\n  ImportError: libnvrtc.so\n=====\n")
    assert problems.brief(error) == "ImportError: libnvrtc.so"
    assert problems.brief(ValueError("one\n two")) == "ValueError: one two"
    assert len(problems.brief(ValueError("x" * 1000))) < 320


@pytest.mark.parametrize(("error", "seen"), [(None, "RuntimeError: cudaErrorInsufficientDriver"), ("no answer", None)])
def test_a_driver_that_hangs_is_not_asked_again(error, seen, monkeypatch):
    of_cuda((12, 4), monkeypatch)
    monkeypatch.setattr(driver, "gpus", lambda: {"devices": [], "error": error})
    monkeypatch.setitem(sys.modules, "cupy", Blind)
    found = doctor.gather()["cupy"]
    assert (found["built_for"], found["gpus"], found["gpu_error"]) == ((13, 2), 0, seen)


def test_folders_that_pass_for_modules(monkeypatch):
    for name in ("cupy", "torch", "numba"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    found = doctor.gather()
    assert {found["cupy"]["version"], found["torch"]["version"], found["compiled"]["numba"]} == {"unknown"}
    assert not found["cupy"]["gpus"]
    assert doctor.self_test("torch_cpu").startswith("AttributeError: ")


@pytest.mark.parametrize(
    ("why_not", "numba", "error", "environment", "words"),
    [
        ("", "0.68.1", None, {}, "compiled by Numba 0.68.1, kept in /cache/loops"),
        (
            "Numba is not installed.",
            None,
            None,
            {},
            "NumPy alone, because Numba is not installed; pip install 'cupy_roialign[cpu]' makes the CPU faster",
        ),
        (
            "CUPY_ROIALIGN_COMPILED is 0",
            "0.68.1",
            None,
            {"CUPY_ROIALIGN_COMPILED": "0"},
            "NumPy alone, because CUPY_ROIALIGN_COMPILED is 0; unset CUPY_ROIALIGN_COMPILED to make the CPU faster",
        ),
        (
            "Numba cannot be imported (it needs NumPy 2.4 or older)",
            None,
            "ImportError: Numba needs NumPy 2.4 or less",
            {},
            "NumPy alone, because Numba cannot be imported (it needs NumPy 2.4 or older); "
            "pip install --upgrade 'cupy_roialign[cpu]' makes the CPU faster",
        ),
    ],
)
def test_compiled_loops(why_not, numba, error, environment, words, monkeypatch):
    """Without them the CPU works, only slower: no problem."""
    monkeypatch.delenv("CUPY_ROIALIGN_COMPILED", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu_backend, "not_compiled", lambda: why_not)
    monkeypatch.setattr(cpu_backend, "machine_code_folder", lambda: None if why_not else "/cache/loops")
    module = types.SimpleNamespace(__version__=numba) if numba else None
    imported = doctor._imported
    monkeypatch.setattr(doctor, "_imported", lambda name: (module, error) if name == "numba" else imported(name))
    found = doctor.examine()
    assert f"CPU loops       {words}\n" in doctor.report(found)
    assert found["compiled"]["why_not"] == (why_not.rstrip(".") or None)
    assert not [problem for problem in found["problems"] if "umba" in problem["what"]]


# ---- the program ----


def run(*arguments, **environment):
    command = [sys.executable, "-m", "cupy_roialign", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_program():
    done = run()
    assert not done.stderr
    assert f"cupy_roialign {cr.__version__}\n" in done.stdout
    assert "NumPy arrays  on the CPU, self-test passed\n" in done.stdout
    assert (done.returncode == 1) == ("Problem" in done.stdout)
    if driver.cuda_version() is None:
        assert done.returncode == 0


def test_the_program_where_all_is_broken(fake_driver, tmp_path):
    """A driver with two GPUs, two CuPys, of which neither can be imported, and a PyTorch that cannot either."""
    (tmp_path / "cupy.py").write_text("raise AttributeError('no such symbol')\n")
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open')\n")
    for name in ("cupy_cuda12x", "cupy_cuda13x"):
        (tmp_path / f"{name}-14.2.0.dist-info").mkdir()
        (tmp_path / f"{name}-14.2.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 14.2.0\n")
    paths = {"LD_LIBRARY_PATH": str(fake_driver.parent), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = run("--json", **paths, CUPY_CACHE_DIR="/cache", CUPY_ROIALIGN_CHECK="1")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["exit_status"] == 1
    assert found["driver"]["cuda"] == [12, 4]
    assert [gpu["name"] for gpu in found["driver"]["devices"]] == ["GPU A", "GPU B"]
    assert {"CUPY_CACHE_DIR": "/cache", "CUPY_ROIALIGN_CHECK": "1"}.items() <= found["environment"].items()
    assert found["backends"]["numpy"] == {"backend": "CPU", "why_not": None, "self_test": "passed"}
    assert {problem["code"] for problem in found["problems"]} == {"cupy_broken", "cupy_twice", "torch_broken"}
    assert "AttributeError: no such symbol" in found["problems"][0]["what"]
    assert found["problems"][0]["do"].startswith("pip uninstall -y cupy-cuda12x cupy-cuda13x && ")


def test_exit_status_and_output(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda: facts((13, 0), [HOPPER]))
    assert __main__.main([]) == 1
    assert "Problem with CuPy arrays:" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "gather", lambda: facts())
    assert __main__.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_a_reader_that_closes_the_pipe(tmp_path):
    """As `head` does."""
    (tmp_path / "torch.py").write_text("raise OSError('which takes seconds')\n")
    command = [sys.executable, "-m", "cupy_roialign", "--json"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    status = process.wait(timeout=120)
    process.stderr.close()
    assert error == ""
    assert status in (0, 1)


# ---- errors ----


def cuda_tensors():
    """As much of them as there can be without a GPU."""
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        features, boxes, indices = (torch.zeros(shape, device="cuda") for shape in ((1, 2, 3, 4), (5, 4), (5,)))
    return features, boxes, indices.long()


def of_cuda(version, monkeypatch):
    monkeypatch.setattr(driver, "cuda_version", lambda: version)
    monkeypatch.setattr(problems, "cupy_distributions", lambda: ["cupy-cuda13x"])


def test_a_cuda_tensor_and_no_cupy(monkeypatch):
    tensors = cuda_tensors()
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(driver, "cuda_version", lambda: (12, 4))
    with pytest.raises(ImportError, match=r"features is a torch.* on cuda:0, and .*CuPy.*; pip .*\[cuda12\]'$"):
        cr.roi_crop(*tensors, 3)


def test_a_cuda_tensor_and_a_broken_cupy(monkeypatch, tmp_path):
    tensors = cuda_tensors()
    (tmp_path / "cupy.py").write_text("raise RuntimeError('a fault')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    of_cuda((13, 0), monkeypatch)
    with pytest.raises(ImportError, match=r"\(RuntimeError: a fault\); pip uninstall -y cupy-cuda13x && pip install"):
        cr.roi_crop(*tensors, 3)


class Blind:
    """A CuPy that finds no GPU."""

    class cuda:
        raises = False

        @classmethod
        def is_available(cls):
            if cls.raises:  # as CuPy 13 does
                raise RuntimeError("cudaErrorInsufficientDriver")
            return False

        class runtime:
            @staticmethod
            def getDeviceCount():
                raise RuntimeError("cudaErrorInsufficientDriver")

            @staticmethod
            def runtimeGetVersion():
                return 13020


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        ((12, 4), r"built for CUDA 13.2, .* driver runs CUDA 12.4 at most; pip uninstall .*\[cuda12\]', or update"),
        ((13, 0), r"CuPy finds no GPU \(RuntimeError: cudaErrorInsufficientDriver\); .*nvidia-smi"),
        (None, r"there is no NVIDIA driver; "),
    ],
)
def test_a_cuda_tensor_and_cupy_without_a_gpu(cuda, message, raises, emulated, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(Blind.cuda, "raises", raises)
    monkeypatch.setattr(emulated.cuda, "is_available", Blind.cuda.is_available)
    monkeypatch.setattr(emulated.cuda, "runtime", Blind.cuda.runtime, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    of_cuda(cuda, monkeypatch)
    tensors = torch.zeros(1, 2, 3, 4), torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64)
    with EmulatedTorchBackend().device(), pytest.raises(RuntimeError, match=rf"tensors are on .*, and .*{message}"):
        cr.roi_crop(*tensors, 3)


@pytest.mark.parametrize("raises", [False, True])
def test_tests_of_a_gpu_are_skipped_where_cupy_finds_none(raises, monkeypatch):
    """And fail where they have to run."""
    monkeypatch.setitem(sys.modules, "cupy", Blind)
    monkeypatch.setattr(Blind.cuda, "raises", raises)
    for required, outcome in (("0", pytest.skip.Exception), ("1", pytest.fail.Exception)):
        monkeypatch.setenv("CUPY_ROIALIGN_REQUIRE_GPU", required)
        with pytest.raises(outcome, match="CuPy finds no GPU"):
            conftest._need_gpu()


@pytest.fixture
def failing(emulated, monkeypatch):
    """A function to which one says what CuPy raises when it compiles a kernel."""
    of_cuda((13, 0), monkeypatch)

    class RawKernel:
        def __init__(self, code, name, options):
            pass

        def compile(self):
            raise RuntimeError(self.message)

    monkeypatch.setattr(kernels, "kernel", KERNEL)
    monkeypatch.setattr(emulated, "RawKernel", RawKernel)
    return lambda message: monkeypatch.setattr(RawKernel, "message", message, raising=False)


@pytest.mark.parametrize("message", [NO_HEADERS, NO_COMPILER, NO_CUDA_ROOT, NO_LIBRARY, NO_FILE])
def test_cupy_without_a_toolkit(message, failing, emulated):
    failing(message)
    with pytest.raises(RuntimeError) as caught:
        cr.roi_align(emulated.zeros((1, 1, 4, 4), np.float32), emulated.zeros((1, 5), np.float32), 2)
    assert str(caught.value) == (
        f"CuPy does not find CUDA's compiler (NVRTC) or headers (RuntimeError: {message}); pip install "
        f"'cupy_roialign[cuda13]', which brings them, or set CUDA_PATH to the folder of a CUDA toolkit; CuPy 13 looks "
        f"for the compiler in LD_LIBRARY_PATH"
    )
    tests = {"cupy": doctor.self_test("cupy")}
    assert tests["cupy"] == f"RuntimeError: {message}"
    (problem,) = doctor.diagnose(facts((13, 0), [HOPPER], cupy=CUPY_13), tests)
    assert f"{problem['what']}; {problem['do']}" == str(caught.value)


def test_an_old_cupy_is_refused_before_it_compiles(failing, emulated, monkeypatch):
    monkeypatch.setattr(emulated, "__version__", "12.3.0", raising=False)
    with pytest.raises(RuntimeError, match=r"^CuPy 12.3.0 is too old: 13 or newer is needed; pip uninstall -y"):
        cr.roi_align(emulated.zeros((1, 1, 4, 4), np.float32), emulated.zeros((1, 5), np.float32), 2)


def test_another_failure_to_compile_stays_as_it_is(failing, emulated):
    failing("out of memory")
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        cr.roi_align(emulated.zeros((1, 1, 4, 4), np.float32), emulated.zeros((1, 5), np.float32), 2)
