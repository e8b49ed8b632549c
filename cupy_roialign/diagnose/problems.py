"""Problems of an installation and their remedies, as errors and `python -m cupy_roialign` word them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from cupy_roialign.diagnose import driver

Version = tuple[int, int]


class Problem(NamedTuple):
    """What is wrong, and what to do about it."""

    code: str  # for programs that read the JSON report
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.what}; {self.do}"


class Extra(NamedTuple):
    """An extra of this package, which installs CuPy together with CUDA's compiler and headers."""

    cuda: int  # the major version, which the driver must run
    driver: int  # the oldest driver that runs it
    capability: Version  # the oldest GPU that the compiler supports


EXTRAS = {"cuda13": Extra(13, 580, (7, 5)), "cuda12": Extra(12, 525, (5, 0))}
"""The extras by name, the newest first.

https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
"""

NEWEST = EXTRAS["cuda13"]

OLDEST_CUPY = 13
"""The oldest major version of CuPy that works. CuPy 11 and older change torch's current device."""

_NO_TOOLKIT = re.compile(r"CUDA_PATH|libnvrtc|nvrtc64|nvrtc-builtins|open source file", re.IGNORECASE)
"""Words of the errors of CuPy 13 and 14 without a compiler or headers, and of no other failed compilation."""


class Machine(NamedTuple):
    """What decides which CuPy is the right one, and whether it can find a GPU."""

    cuda: Version | None  # the newest that the driver runs; None if there is no driver
    capabilities: Sequence[Version]  # the compute capabilities of the GPUs, as far as they are known
    cupys: Sequence[str]  # the installed distributions, such as cupy-cuda13x
    visible: str | None  # CUDA_VISIBLE_DEVICES

    def install(self) -> str:
        """How to install the right CuPy in place of the present one."""
        removal = f"pip uninstall -y {' '.join(self.cupys)} && " if self.cupys else ""
        command = removal + "pip install 'cupy_roialign[{}]'"
        if self.cuda is None:
            if len(self.cupys) == 1 and self.extra:
                return command.format(self.extra)
            return f"{command.format('cuda13')}, or [cuda12] for a driver older than {NEWEST.driver}"
        oldest = min(self.capabilities, default=NEWEST.capability)
        fit = {name: extra for name, extra in EXTRAS.items() if oldest >= extra.capability} or EXTRAS
        for name, extra in fit.items():
            if self.cuda[0] >= extra.cuda:
                return command.format(name)
        name, extra = next(iter(fit.items()))
        return f"update the NVIDIA driver to {extra.driver} or newer, then {command.format(name)}"

    @property
    def extra(self) -> str | None:
        """The extra of the installed CuPy."""
        return next((name for name in EXTRAS if f"cupy-{name}x" in self.cupys), None)


def machine() -> Machine:
    """This machine without its GPUs, which take a while to query."""
    return Machine(driver.cuda_version(), (), cupy_distributions(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def cupy_distributions() -> list[str]:
    """The installed distributions that contain a `cupy`. There should be one."""
    plain = set()
    for distribution in importlib.metadata.distributions():
        with contextlib.suppress(Exception):  # a partly removed one
            plain.add(re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower())
    return sorted(name for name in plain if re.fullmatch(r"(amd-)?cupy(-(cuda|rocm)[-\w]*)?", name))


def cupy_built_for() -> Version | None:
    """The CUDA that the imported CuPy is built for."""
    import cupy

    try:
        number = cupy.cuda.runtime.runtimeGetVersion()
    except Exception:
        return None
    return number // 1000, number % 1000 // 10


def cupy_gpus() -> tuple[int, str | None]:
    """How many GPUs CuPy finds, and the error if it fails to look."""
    import cupy

    try:
        return cupy.cuda.runtime.getDeviceCount(), None
    except Exception as error:
        return 0, brief(error)


def is_old_cupy(version: str) -> bool:
    """Whether a version of CuPy is too old to work; not one that is unknown."""
    major = version.partition(".")[0]
    return major.isdecimal() and int(major) < OLDEST_CUPY


def finds_gpu(cupy: Any) -> bool:
    """Whether CuPy finds a GPU."""
    try:
        return cupy.cuda.is_available()
    except Exception:  # CuPy 13 raises where its CUDA is too new for the driver, or there is none
        return False


def no_gpu_here() -> Problem:
    """Why CuPy finds no GPU on this machine."""
    return no_gpu(cupy_gpus()[1], cupy_built_for(), machine())


def brief(error: BaseException) -> str:
    """An error in one line. CuPy wraps the original one in advice."""
    text = " ".join(str(error).split())
    _, framed, original = text.partition("Original error: ")
    text = original.strip(" =") if framed else f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else f"{text[:300]}..."


def dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


# ---- the problems ----


def no_cupy(error: str | None, on: Machine) -> Problem:
    """CuPy is not installed or, with an `error`, cannot be imported."""
    state = f"cannot be imported ({error})" if error else "is not installed"
    what = f"kernels for the GPU are compiled by CuPy, which {state}"
    return Problem("cupy_broken" if error else "cupy_missing", what, on.install())


def cupy_import_failed(error: Exception) -> Problem:
    """The same for this machine and the error itself."""
    absent = isinstance(error, ModuleNotFoundError) and error.name == "cupy"
    return no_cupy(None if absent else brief(error), machine())


def several_cupys(on: Machine) -> Problem:
    what = f"{len(on.cupys)} distributions of CuPy are installed, over each other's files ({', '.join(on.cupys)})"
    return Problem("cupy_twice", what, on.install())


def rocm(on: Machine) -> Problem:
    return Problem("cupy_rocm", "this CuPy is built for ROCm, and the kernels are written for CUDA", on.install())


def old_cupy(version: str, on: Machine) -> Problem:
    return Problem("cupy_old", f"CuPy {version} is too old: {OLDEST_CUPY} or newer is needed", on.install())


def old_gpu(built_for: Version, on: Machine) -> Problem:
    oldest = dotted(min(on.capabilities))
    what = f"CuPy is built for CUDA {dotted(built_for)}, whose compiler does not support compute capability {oldest}"
    return Problem("gpu_old", what, on.install())


def no_gpu(error: str | None, built_for: Version | None, on: Machine) -> Problem:
    """CuPy, built for some CUDA, finds no GPU."""
    if on.cuda is None:
        return Problem(
            "driver_missing",
            "CuPy finds no GPU, and there is no NVIDIA driver",
            "where there is a GPU, install the driver; a container takes docker run --gpus all",
        )
    if built_for and on.cuda[0] < built_for[0]:
        what = f"CuPy is built for CUDA {dotted(built_for)}, and the NVIDIA driver runs CUDA {dotted(on.cuda)} at most"
        newer = [f"update the NVIDIA driver to {e.driver} or newer" for e in EXTRAS.values() if e.cuda == built_for[0]]
        other = [on.install()] if any(on.cuda[0] >= extra.cuda for extra in EXTRAS.values()) else []
        return Problem("driver_old", what, ", or ".join(other + newer))
    if on.visible is not None:
        what = f"CuPy finds no GPU, and CUDA_VISIBLE_DEVICES is {on.visible!r}, which hides all others"
        return Problem("gpu_hidden", what, "unset it, or list a GPU that nvidia-smi -L lists")
    what = f"CuPy finds no GPU ({error or 'the NVIDIA driver shows none'})"
    return Problem("gpu_missing", what, "see whether nvidia-smi -L lists one; a container takes docker run --gpus all")


def driver_fails(error: str) -> Problem:
    what = f"the NVIDIA driver does not start ({error})"
    return Problem("driver_fails", what, "see what nvidia-smi says; where the driver was updated, restart the machine")


def no_toolkit(error: str, on: Machine) -> Problem:
    command = f"pip install 'cupy_roialign[{on.extra}]'" if on.extra else on._replace(cupys=()).install()
    return Problem(
        "toolkit_missing",
        f"CuPy does not find CUDA's compiler (NVRTC) or headers ({error})",
        f"{command}, which brings them, or set CUDA_PATH to the folder of a CUDA toolkit; CuPy 13 looks for the "
        "compiler in LD_LIBRARY_PATH",
    )


def lacks_toolkit(error: BaseException | str) -> bool:
    """Whether a kernel failed to compile because CuPy finds no compiler or headers."""
    return bool(_NO_TOOLKIT.search(str(error)))


def no_torch(error: str) -> Problem:
    return Problem("torch_broken", f"PyTorch cannot be imported ({error})", "install it again: https://pytorch.org")


def threads(error: str) -> Problem:
    return Problem("threads", error, "set it to the number of threads that a call on the CPU may use, or unset it")


def self_test(kinds: str, error: str) -> Problem:
    what = f"the self-test on {kinds} fails ({error})"
    return Problem("self_test", what, "report it, with the output of python -m cupy_roialign --json")
