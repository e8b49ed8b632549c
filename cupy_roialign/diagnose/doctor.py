"""`python -m cupy_roialign`: what is installed, where each kind of array is computed and why, and whether that works.

`gather` and `self_test` find facts and raise nothing; `backends`, `diagnose` and `report` use these facts alone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import cupy_roialign as cr
from cupy_roialign.cpu import backend as cpu_backend
from cupy_roialign.diagnose import driver, problems
from cupy_roialign.diagnose.problems import Machine, Problem, brief, dotted

Facts = dict[str, Any]

KINDS = {"numpy": "NumPy arrays", "cupy": "CuPy arrays", "torch_cpu": "CPU tensors", "torch_cuda": "CUDA tensors"}

COMPILED = "CUPY_ROIALIGN_COMPILED"
"""The environment variable that, set to 0, turns compiled loops off."""

VARIABLES = re.compile(r"CUPY_\w+|CUDA_(PATH|HOME|VISIBLE_DEVICES)|(OMP|OPENBLAS|MKL)_NUM_THREADS|NUMBA_\w+")
"""Environment variables to report: this package's, CuPy's, and those that CUDA and BLAS libraries read."""

REFERENCE: dict[str, Any] = {
    # two boxes that overlap, the second of which leaves the image
    "features": [[[[3, -1, 4, 1], [-5, 9, 2, -6], [5, 3, -5, 8]]]],
    "boxes": [[0, 0.5, 0.5, 2.5, 2.5], [0, 1.25, -0.75, 4.25, 1.25]],
    "options": {"output_size": 2, "sampling_ratio": 2, "aligned": True},
    "grad_output": [[[[1, 2], [-1, 3]]], [[[4, -2], [1, 1]]]],
    "output": [[[[1.5, 3.5], [3, 2.25]]], [[[1.5, 1.5625], [2.5, 0.046875]]]],
    "grad_features": [
        [[[0.25, 3.125, 2.640625, -1.015625], [0, 1.375, 1.421875, 0.203125], [-0.25, 0.5, 0.75, 0]]],
    ],
    "grad_boxes": [[0, -6.875, 1.375, -18.625, -13.875], [0, 16.828125, -0.515625, 6.046875, -1.546875]],
}
"""A call of `roi_align` and its results, which are exact in float32 too."""

TOLERANCE = 1e-5
"""The largest error of the self-test's results."""


# ---- facts ----


def gather() -> Facts:
    """All facts but the self-test's."""
    cuda = driver.cuda_version()
    gpus = driver.gpus() if cuda else {"devices": [], "error": None}
    answers = gpus["error"] is None  # to query a driver that hangs again would hang this process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "cupy_roialign": cr.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "numpy": np.__version__,
            "compiled": _compiled(),
            "threads": _threads(),
            "driver": {"cuda": cuda, "release": driver.release() if cuda else None, **gpus},
            "cupy": _cupy(answers),
            "torch": _torch(answers),
            "kernel_cache": kernel_cache(),
            "environment": {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)},
        }


def _imported(name: str) -> tuple[Any, str | None]:
    """A module, or the error of importing it; neither if it is not installed."""
    try:
        return importlib.import_module(name), None
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        return None, None if missing else brief(error)


def _compiled() -> Facts:
    """Whether the loops for the CPU are compiled and where they are kept, or why they are not."""
    numba, error = _imported("numba")
    folder = None
    try:
        why_not = cpu_backend.not_compiled()
        folder = cpu_backend.machine_code_folder()
    except Exception as failure:
        why_not = brief(failure)
    return {"numba": _version(numba), "error": error, "why_not": why_not.rstrip(" .") or None, "folder": folder}


def _threads() -> Facts:
    try:
        return {"count": cr.get_num_threads(), "error": None}
    except ValueError as error:
        return {"count": None, "error": str(error)}


def _version(module: Any) -> str | None:
    """A module's version; a folder of its name in the current directory passes for a module, and has none."""
    return None if module is None else str(getattr(module, "__version__", "unknown"))


def _cupy(answers: bool) -> Facts:
    cupy, error = _imported("cupy")
    found: Facts = {
        "version": _version(cupy),
        "error": error,
        "distributions": problems.cupy_distributions(),
        "built_for": None,
        "rocm": False,
        "nvrtc": None,
        "gpus": 0,
        "gpu_error": None,
    }
    if cupy is not None:
        found["built_for"] = problems.cupy_built_for()
        with contextlib.suppress(Exception):
            found["rocm"] = bool(cupy.cuda.runtime.is_hip)
        with contextlib.suppress(Exception):
            found["nvrtc"] = tuple(cupy.cuda.nvrtc.getVersion())
        if answers:
            found["gpus"], found["gpu_error"] = problems.cupy_gpus()
    return found


def _torch(answers: bool) -> Facts:
    torch, error = _imported("torch")
    found: Facts = {"version": _version(torch), "error": error, "cuda": None, "gpus": 0}
    if torch is not None:
        with contextlib.suppress(Exception):
            found["cuda"] = torch.version.cuda
            if answers and torch.version.cuda and torch.cuda.is_available():
                found["gpus"] = torch.cuda.device_count()
    return found


def kernel_cache() -> Facts:
    """CuPy's cache, which keeps the kernels of all programs."""
    folder = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    sizes = []
    with contextlib.suppress(OSError):
        sizes = [entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()]
    in_memory = os.environ.get("CUPY_CACHE_IN_MEMORY", "0") == "1"
    return {"folder": folder, "files": len(sizes), "bytes": sum(sizes), "in_memory": in_memory}


# ---- the self-test ----


def self_test(kind: str) -> str | None:
    """What is wrong with the results of the reference case on arrays of a kind; None if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = _RUNS[kind]()
        for name, result in zip(("output", "grad_features", "grad_boxes"), results, strict=True):
            expected = np.array(REFERENCE[name])
            if result.shape != expected.shape:
                return f"{name} has shape {result.shape}, and should have {expected.shape}"
            worst = np.abs(result - expected).max()
            if not worst <= TOLERANCE:
                return f"{name} is off by {worst:.3g}"
    except Exception as error:
        return brief(error.__cause__ or error)
    return None


def _inputs(asarray: Callable[[np.ndarray], Any]) -> list[Any]:
    return [asarray(np.array(REFERENCE[name], np.float32)) for name in ("features", "boxes", "grad_output")]


def _run(asarray: Callable[[np.ndarray], Any]) -> list[Any]:
    features, boxes, grad_output = _inputs(asarray)
    output, pullback = cr.vjp(cr.roi_align, features, boxes, **REFERENCE["options"])
    return [output, *pullback(grad_output)]


def _run_cupy() -> list[np.ndarray]:
    import cupy

    return [cupy.asnumpy(result) for result in _run(cupy.asarray)]


def _run_torch(device: str) -> list[np.ndarray]:
    import torch

    features, boxes, grad_output = _inputs(lambda array: torch.from_numpy(array).to(device))
    output = cr.roi_align(features.requires_grad_(), boxes.requires_grad_(), **REFERENCE["options"])
    gradients = torch.autograd.grad(output, (features, boxes), grad_output)
    return [result.detach().cpu().numpy() for result in (output, *gradients)]


_RUNS: dict[str, Callable[[], list[np.ndarray]]] = {
    "numpy": lambda: _run(np.asarray),
    "cupy": _run_cupy,
    "torch_cpu": lambda: _run_torch("cpu"),
    "torch_cuda": lambda: _run_torch("cuda"),
}


# ---- what follows from the facts ----


def backends(facts: Facts) -> dict[str, Facts]:
    """For arrays of each kind the `backend`, CPU or GPU; or None, and `why_not`."""
    cupy, torch = facts["cupy"], facts["torch"]
    no_kernels = no_tensors = None
    if cupy["version"] is None:
        no_kernels = "CuPy cannot be imported" if cupy["error"] else "CuPy is not installed"
    elif cupy["rocm"]:
        no_kernels = "this CuPy is built for ROCm"
    elif problems.is_old_cupy(cupy["version"]):
        no_kernels = f"CuPy {cupy['version']} is too old"
    elif not cupy["gpus"]:
        no_kernels = "CuPy finds no GPU"
    if torch["version"] is None:
        no_tensors = "PyTorch cannot be imported" if torch["error"] else "PyTorch is not installed"
    no_cuda = no_tensors
    if no_cuda is None and not torch["cuda"]:
        no_cuda = "this PyTorch is built without CUDA"
    elif no_cuda is None and not torch["gpus"]:
        no_cuda = "PyTorch finds no GPU"
    why_not = {"numpy": None, "cupy": no_kernels, "torch_cpu": no_tensors, "torch_cuda": no_cuda or no_kernels}
    places = {"numpy": "CPU", "cupy": "GPU", "torch_cpu": "CPU", "torch_cuda": "GPU"}
    return {kind: {"backend": None if why_not[kind] else places[kind], "why_not": why_not[kind]} for kind in KINDS}


def diagnose(facts: Facts, tests: dict[str, str | None]) -> list[Facts]:
    """The problems: `code`, `what`, `do`, and which of KINDS each `stops` that should work.

    On the CPU all should work, and on the GPU if the NVIDIA driver, CuPy or PyTorch shows one.
    """
    cupy, torch, of_driver = facts["cupy"], facts["torch"], facts["driver"]
    capabilities = [tuple(device["compute_capability"]) for device in of_driver["devices"]]
    cuda = of_driver["cuda"] and tuple(of_driver["cuda"])
    on = Machine(cuda, capabilities, cupy["distributions"], facts["environment"].get("CUDA_VISIBLE_DEVICES"))
    shown = bool(of_driver["devices"] or cupy["gpus"] or torch["gpus"])
    of_gpu = ["cupy", *(["torch_cuda"] if torch["cuda"] else [])]
    found: dict[Problem, list[str]] = {}

    if of_driver["error"]:
        found[problems.driver_fails(of_driver["error"])] = of_gpu
    elif cupy["version"] is None:
        if shown or cupy["error"]:
            found[problems.no_cupy(cupy["error"], on)] = of_gpu if shown else []
    elif cupy["rocm"]:
        found[problems.rocm(on)] = of_gpu if shown else []
    elif problems.is_old_cupy(cupy["version"]):
        found[problems.old_cupy(cupy["version"], on)] = of_gpu if shown else []
    elif not cupy["gpus"]:
        found[problems.no_gpu(cupy["gpu_error"], cupy["built_for"], on)] = of_gpu if shown else []
    elif capabilities and cupy["built_for"]:
        extra = problems.EXTRAS.get(f"cuda{cupy['built_for'][0]}")
        if extra and min(capabilities) < extra.capability:
            found[problems.old_gpu(cupy["built_for"], on)] = of_gpu
    if facts["threads"]["error"]:
        found[problems.threads(facts["threads"]["error"])] = ["numpy", "torch_cpu"]
    if torch["error"]:
        found[problems.no_torch(torch["error"])] = ["torch_cpu"]
    if len(cupy["distributions"]) > 1:
        found[problems.several_cupys(on)] = []

    stopped = {kind for kinds in found.values() for kind in kinds}
    for kind, error in tests.items():
        if error and kind not in stopped:
            missing = kind in of_gpu and problems.lacks_toolkit(error)
            problem = problems.no_toolkit(error, on) if missing else problems.self_test(KINDS[kind], error)
            found.setdefault(problem, []).append(kind)
    return [{**problem._asdict(), "stops": kinds} for problem, kinds in found.items()]


def examine() -> Facts:
    """All facts and conclusions: what `--json` prints."""
    facts = gather()
    places = backends(facts)
    tests = {kind: self_test(kind) for kind, place in places.items() if place["backend"]}
    for kind, place in places.items():
        place["self_test"] = ("failed" if tests[kind] else "passed") if kind in tests else None
    found = diagnose(facts, tests)
    return {**facts, "backends": places, "problems": found, "exit_status": int(any(p["stops"] for p in found))}


# ---- the report ----


def _loops(compiled: Facts, environment: dict[str, str]) -> str:
    """Whether the loops for the CPU are compiled or, if not, why and what to do."""
    if compiled["why_not"] is None:
        return f"compiled by Numba {compiled['numba']}, kept in {compiled['folder']}"
    if compiled["numba"] is None and compiled["error"] is None:
        remedy = "pip install 'cupy_roialign[cpu]' makes the CPU faster"
    elif environment.get(COMPILED) == "0":
        remedy = f"unset {COMPILED} to make the CPU faster"
    else:
        remedy = "pip install --upgrade 'cupy_roialign[cpu]' makes the CPU faster"
    return f"NumPy alone, because {compiled['why_not']}; {remedy}"


def report(facts: Facts) -> str:
    """The facts and conclusions as text."""
    return "\n".join(_lines(facts))


def _lines(facts: Facts) -> Iterator[str]:
    cupy, torch, of_driver, cache = facts["cupy"], facts["torch"], facts["driver"], facts["kernel_cache"]

    def line(title: str, text: str) -> str:
        return f"{title:16}{text}"

    def library(found: Facts, detail: str = "") -> str:
        return f"{found['version']}{detail}" if found["version"] else found["error"] or "not installed"

    yield f"cupy_roialign {facts['cupy_roialign']}"
    yield ""
    yield line("Python", f"{facts['python']} on {facts['platform']}")
    yield line("NumPy", facts["numpy"])
    yield line("CPU loops", _loops(facts["compiled"], facts["environment"]))
    yield line("Threads", f"{facts['threads']['count'] or facts['threads']['error']}")
    yield line("PyTorch", library(torch, f", for CUDA {torch['cuda']}" if torch["cuda"] else ", without CUDA"))
    built_for = dotted(cupy["built_for"]) if cupy["built_for"] else "unknown"
    yield line("CuPy", library(cupy, f", for CUDA {built_for}: {', '.join(cupy['distributions']) or 'from source'}"))
    if cupy["version"]:
        yield line("NVRTC", dotted(cupy["nvrtc"]) if cupy["nvrtc"] else "not found")
    if of_driver["cuda"]:
        release = f"{of_driver['release']}, " if of_driver["release"] else ""
        yield line("NVIDIA driver", f"{release}for CUDA up to {dotted(of_driver['cuda'])}")
    else:
        yield line("NVIDIA driver", "none: no GPU is used")
    for number, device in enumerate(of_driver["devices"]):
        memory, capability = device["memory_bytes"] / 2**30, dotted(device["compute_capability"])
        yield line(f"GPU {number}", f"{device['name']}, compute capability {capability}, {memory:.1f} GiB")
    if of_driver["cuda"] and not of_driver["devices"]:
        yield line("GPU", of_driver["error"] or "the driver shows none")
    size = "in memory" if cache["in_memory"] else f"{cache['files']} files, {cache['bytes'] / 2**20:.1f} MiB"
    yield line("Kernel cache", f"{cache['folder']}, {size}")
    for name, value in facts["environment"].items():
        yield line("Environment", f"{name}={value}")
    yield ""
    yield "Where each kind of array is computed:"
    for kind, place in facts["backends"].items():
        where = f"on the {place['backend']}, self-test {place['self_test']}" if place["backend"] else "not at all"
        yield line(f"  {KINDS[kind]}", f"{where}: {place['why_not']}" if place["why_not"] else where)
    yield ""
    for problem in facts["problems"]:
        stopped = " and ".join(KINDS[kind] for kind in problem["stops"])
        yield f"Problem with {stopped}:" if stopped else "Note:"
        yield f"  {problem['what']}"
        yield f"  what to do: {problem['do']}"
    if not facts["problems"]:
        yield "No problems."
