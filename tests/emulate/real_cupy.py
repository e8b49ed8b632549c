"""The CuPy that is installed, on a machine without a GPU: python -m tests.emulate.real_cupy -m MODULE [ARGS]

driver.c takes the place of NVIDIA's driver and of the CUDA runtime, which is linked into CuPy. All else is CuPy's own:
arrays, the memory pool, devices and streams, NVRTC and its options, the cache of kernels, how a kernel gets its
arguments. A launch of ours runs on the emulated device what NVRTC was given; of CuPy's own kernels those that copy are
NumPy's work, and others are errors. For Linux on x86-64.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import runpy
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cupy_roialign.gpu import arguments as gpu_arguments
from cupy_roialign.gpu import kernels
from tests.emulate import device

CAPABILITY = 90
CUDA = 13000  # the newest that the driver runs
INVALID_IMAGE, NOT_FOUND, LAUNCH_FAILED = 200, 500, 719

Place = ctypes.c_void_p
_texts: dict[bytes, str] = {}  # what NVRTC made of which source
_modules: dict[int, bytes] = {}
_functions: dict[int, tuple[bytes, str]] = {}


def install() -> None:
    """Before CuPy is imported for the first time."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit(f"the driver's stand-in is for Linux on x86-64; this is {platform.system()} on {platform.machine()}")
    library = _build(Path(__file__).with_name("driver.c"))
    library.set_up(CAPABILITY, CUDA, _load, _function, _launch)
    _load_nvrtc()
    import cupy_backends.cuda.api.runtime as runtime

    _replace(Path(runtime.__file__), library)
    from cupy.cuda import compiler

    compiled = compiler._NVRTCProgram.compile

    def compile_(program: Any, *args: Any) -> Any:
        code, mapping = compiled(program, *args)
        if isinstance(code, bytes):
            _texts[_key(code)] = program.src
        return code, mapping

    compiler._NVRTCProgram.compile = compile_


def _build(source: Path) -> ctypes.CDLL:
    """Under the name of NVIDIA's library, so that whoever opens that gets this."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "libcuda.so.1"
        subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", path, source], check=True)
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _load_nvrtc() -> None:
    """CuPy 13 does not look for it among the installed packages."""
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
        for folder in spec.submodule_search_locations or [] if spec else []:
            for path in sorted(Path(folder, "lib").glob("libnvrtc*.so.*[0-9]")):  # what the other needs comes first
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _replace(binary: Path, library: ctypes.CDLL) -> None:
    """Puts a jump to `library` where each function of the CUDA runtime in a loaded binary begins."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    base = min(int(line.partition("-")[0], 16) for line in maps if line.endswith(str(binary.resolve())))
    listed = subprocess.run(["nm", binary], check=True, capture_output=True, text=True).stdout
    page = os.sysconf("SC_PAGE_SIZE")
    for offset, name in re.findall(r"^([0-9a-f]+) [tT] (cuda\w+)$", listed, re.MULTILINE):
        if name == "cudaRuntimeGetVersion":
            continue
        known = hasattr(library, name)
        target = ctypes.cast(getattr(library, name if known else "missing"), Place).value
        code = b"\x48\xb8" + struct.pack("<Q", target) + b"\xff\xe0"  # mov rax, target; jmp rax
        if not known:
            _names.append(ctypes.create_string_buffer(name.encode()))
            code = b"\x48\xbf" + struct.pack("<Q", ctypes.addressof(_names[-1])) + code  # mov rdi, name
        start = base + int(offset, 16)
        first = start // page * page
        if ctypes.CDLL(None).mprotect(Place(first), ctypes.c_size_t(start + len(code) - first), 7) != 0:
            raise OSError(f"{binary} cannot be written to in memory")
        ctypes.memmove(start, code, len(code))


_names: list[Any] = []


# ---- what the driver is asked for ----


def _key(image: bytes) -> bytes:
    """Of an image by its text; CuPy 13 cuts off the last byte of some."""
    return hashlib.sha256(image[: _length(image) - 1]).digest()


def _length(image: bytes) -> int:
    """Of an ELF file, by its header."""
    segments, sections = struct.unpack_from("<QQ", image, 0x20)
    size, count, section_size, section_count = struct.unpack_from("<4H", image, 0x36)
    return max(segments + size * count, sections + section_size * section_count)


def _answered(status: int) -> Callable[[Any], Any]:
    """What raises is printed, and gives the driver's status."""

    def decorate(function: Callable[..., None]) -> Callable[..., int]:
        def answering(*args: Any) -> int:
            try:
                function(*args)
            except Exception:
                traceback.print_exc()
                return status
            return 0

        return answering

    return decorate


@ctypes.CFUNCTYPE(ctypes.c_int, Place, Place)
@_answered(INVALID_IMAGE)
def _load(module: int, image: int) -> None:
    if ctypes.string_at(image, 4) != b"\x7fELF":
        raise ValueError("the driver was given something else than a cubin")
    _modules[module] = ctypes.string_at(image, _length(ctypes.string_at(image, 64)))


@ctypes.CFUNCTYPE(ctypes.c_int, Place, ctypes.c_char_p, Place)
@_answered(NOT_FOUND)
def _function(module: int, name: bytes, function: int) -> None:
    if b".text." + name + b"\0" not in _modules[module]:
        raise LookupError(f"there is no kernel {name.decode()} in a module")
    _functions[function] = _key(_modules[module]), name.decode()


@ctypes.CFUNCTYPE(ctypes.c_int, Place, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(Place))
@_answered(LAUNCH_FAILED)
def _launch(function: int, sizes: Any, arguments: Any) -> None:
    key, name = _functions[function]
    if key not in _texts:
        raise LookupError("a kernel from the cache on disk, whose source is not known: empty CUPY_CACHE_DIR")
    text = _texts[key]
    if name.startswith("cupy_copy__"):
        _copy(text, name, arguments)
        return
    if not text.startswith(kernels.read("device.cuh")):
        raise NotImplementedError(f"{name} of CuPy is not emulated")
    grid, block = tuple(sizes[:3]), tuple(sizes[3:6])
    if (grid[1:], block[1:]) != ((1, 1), (1, 1)):
        raise ValueError(f"{name}: grid and block must have one dimension; got {grid} and {block}")
    memory = (ctypes.c_char * gpu_arguments.ARGUMENTS.itemsize).from_address(arguments[0])
    _emulated(text, name)(grid[:1], block[:1], (np.ndarray((), gpu_arguments.ARGUMENTS, memory),))


_kernels: dict[tuple[str, str], device.RawKernel] = {}


def _emulated(text: str, name: str) -> device.RawKernel:
    if (text, name) not in _kernels:
        _kernels[text, name] = device.RawKernel(text, name)
    return _kernels[text, name]


# ---- CuPy's own kernels ----

_DTYPES = {"signed char": "i1", "short": "i2", "int": "i4", "long long": "i8", "bool": "?", "float16": "f2"}
_DTYPES |= {"float": "f4", "double": "f8"}
_DTYPES |= {"unsigned char": "u1", "unsigned short": "u2", "unsigned int": "u4", "unsigned long long": "u8"}


def _copy(text: str, name: str, arguments: Any) -> None:
    parameters = re.search(rf"\b{name}\((.*?)\)", text, re.DOTALL)
    source, target = (
        _array(parameter, arguments[i]) for i, parameter in enumerate(re.split(r",(?![^<]*>)", parameters[1])[:2])
    )
    with np.errstate(all="ignore"):
        target[...] = source


def _array(parameter: str, place: int) -> np.ndarray:
    """What a parameter of CuPy's is: a number, or `CArray<T, ndim, ...>` of address, size, shape and strides."""
    array = re.search(r"CArray<([\w ]+), (\d+)", parameter)
    if not array:
        number = parameter.rpartition(" ")[0].removeprefix("const ").strip()
        return np.ndarray((), _DTYPES[number], (ctypes.c_char * 8).from_address(place))
    dtype, count = np.dtype(_DTYPES[array[1]]), int(array[2])
    address, _, *fields = (ctypes.c_ssize_t * (2 + 2 * count)).from_address(place)
    shape, strides = fields[:count], fields[count:]
    if 0 in shape:
        return np.zeros(shape, dtype)
    steps = [(n - 1) * step for n, step in zip(shape, strides, strict=True)]
    before, after = (sum(step for step in steps if (step < 0) == negative) for negative in (True, False))
    memory = (ctypes.c_char * (after - before + dtype.itemsize)).from_address(address + before)
    return np.ndarray(shape, dtype, memory, -before, strides)


if __name__ == "__main__":
    if sys.argv[1:2] != ["-m"] or len(sys.argv) < 3:
        sys.exit(__doc__)
    from tests.emulate import real_cupy  # and not this copy of it

    with tempfile.TemporaryDirectory() as cache:
        os.environ["CUPY_CACHE_DIR"] = cache  # a kernel is known by the text that it was compiled from, in this process
        real_cupy.install()
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
