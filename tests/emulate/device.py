"""What cupy_roialign and a small script use of CuPy, emulated.

Stricter than a GPU: an array ends at a page that cannot be touched (or begins at one: `guard = "front"`), fresh memory
is full of NaN, arguments of a launch that CUDA would misread raise, and each launch is recorded with its device and
stream (`launches`). The order in which threads and blocks run is drawn from `seed`.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import operator
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cupy_roialign.gpu import kernels

DEVICES = 2
seed = 0
guard = "back"
launches: list[dict[str, Any]] = []

float16, float32, float64 = np.float16, np.float32, np.float64
int8, int16, int32, int64 = np.int8, np.int16, np.int32, np.int64
uint8, uint16, uint32, uint64, bool_ = np.uint8, np.uint16, np.uint32, np.uint64, np.bool_
newaxis, nan, inf, pi = None, np.nan, np.inf, np.pi

HOST = Path(__file__).with_name("host.h")
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unused-const-variable", "-Wno-missing-field-initializers", "-Wno-unused-parameter", "-Wno-clobbered"]


def compiler_found() -> bool:
    return shutil.which(COMPILER) is not None


# ---- memory ----

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _guarded(nbytes: int) -> np.ndarray:
    """So many bytes of junk that touch a page which faults."""
    page = mmap.PAGESIZE
    pages = -(-max(nbytes, 1) // page)
    block = mmap.mmap(-1, (pages + 1) * page)
    whole = np.frombuffer(block, np.uint8)
    whole[:] = 0xFF  # NaN as a float, -1 as an integer
    forbidden = whole.ctypes.data + (0 if guard == "front" else pages * page)
    if _libc.mprotect(forbidden, page, mmap.PROT_READ * 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    start = page if guard == "front" else pages * page - nbytes
    return whole[start : start + nbytes]


class _Pointer:
    """An address in an array's memory."""

    def __init__(self, array: np.ndarray, offset: int, number: int):
        self.memory, self.offset, self.number = array, offset, number

    def __add__(self, offset: int) -> _Pointer:
        return _Pointer(self.memory, self.offset + offset, self.number)

    @property
    def ptr(self) -> int:
        return self.memory.__array_interface__["data"][0] + self.offset


class ndarray:
    """An array of the emulated device: NumPy's, held where NumPy itself does not see it."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: _Pointer | None = None, strides: Any = None):
        memory = memptr or empty(shape, dtype).data
        self._array = np.ndarray(shape, dtype, memory.memory, memory.offset, strides)
        self._number = memory.number

    @classmethod
    def _of(cls, array: np.ndarray, number: int) -> ndarray:
        made = cls.__new__(cls)
        made._array, made._number = array, number
        return made

    dtype = property(lambda self: self._array.dtype)
    shape = property(lambda self: self._array.shape)
    strides = property(lambda self: self._array.strides)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    itemsize = property(lambda self: self._array.itemsize)
    nbytes = property(lambda self: self._array.nbytes)
    flags = property(lambda self: self._array.flags)
    device = property(lambda self: cuda.Device(self._number))
    data = property(lambda self: _Pointer(self._array, 0, self._number))
    T = property(lambda self: self._like(self._array.T))

    def _like(self, array: Any) -> ndarray:
        return ndarray._of(np.asarray(array), self._number)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self._number)

    def get(self) -> np.ndarray:
        return self._array.copy()  # in C order, as CuPy's

    def item(self) -> Any:
        return self._array.item()

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        if not copy and self._array.dtype == dtype:
            return self
        return _copied(self._array.astype(dtype), self._number)

    def view(self, dtype: Any) -> ndarray:
        return self._like(self._array.view(dtype))

    def transpose(self, *axes: Any) -> ndarray:
        return self._like(self._array.transpose(*axes))

    def reshape(self, *shape: Any) -> ndarray:
        return self._like(self._array.reshape(*shape))

    def copy(self) -> ndarray:
        return asarray(self._array.copy(), device=self._number)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, key: Any) -> ndarray:
        return self._like(self._array[_host(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._array[_host(key)] = _host(value)

    def __bool__(self) -> bool:
        return bool(self._array)

    def __float__(self) -> float:
        return float(self._array)

    def __repr__(self) -> str:
        return repr(self._array)

    def __getattr__(self, name: str) -> Any:
        """Reductions and the like."""
        if name not in ("sum", "mean", "max", "min", "all", "any", "ravel", "squeeze", "std", "round", "clip"):
            raise AttributeError(f"the emulated CuPy array has no {name}")
        return lambda *args, **kwargs: self._like(getattr(self._array, name)(*args, **kwargs))


def _operator(name: str) -> Any:
    function = getattr(operator, name)
    return lambda self, *others: self._like(function(self._array, *map(_host, others)))


def _reflected(name: str) -> Any:
    function = getattr(operator, name)
    return lambda self, other: self._like(function(_host(other), self._array))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(ndarray, f"__r{_name}__", _reflected(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))
ndarray.__hash__ = None  # type: ignore[assignment]
ndarray.__module__ = "cupy"


def _host(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_host, value))
    return value._array if isinstance(value, ndarray) else value


def empty(shape: Any, dtype: Any = float) -> ndarray:
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return ndarray._of(_guarded(nbytes).view(dtype).reshape(shape), _current.device)


def asarray(value: Any, dtype: Any = None, device: int | None = None) -> ndarray:
    """Copies to the device: in Fortran's order what is in that, all else in C's, as CuPy does."""
    if isinstance(value, ndarray):
        return value if dtype is None else value.astype(dtype, copy=False)
    value = np.asarray(value, dtype)
    return _copied(value if value.flags.fnc else np.asarray(value, order="C"), device)


def _copied(value: np.ndarray, device: int | None) -> ndarray:
    """A copy on the device, strides kept where they leave no gaps."""
    order = np.argsort([-abs(stride) for stride in value.strides], kind="stable")
    with cuda.Device(_current.device if device is None else device):
        result = empty([value.shape[axis] for axis in order], value.dtype)
    result = result.transpose(*np.argsort(order)) if value.ndim else result
    result._array[...] = value
    return result


array = asarray
asnumpy = ndarray.get


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    result = empty(shape, dtype)
    result._array[...] = 0
    return result


def ones(shape: Any, dtype: Any = float) -> ndarray:
    result = empty(shape, dtype)
    result._array[...] = 1
    return result


_FUNCTIONS = {"abs", "allclose", "arange", "concatenate", "full", "isfinite", "isnan", "linspace", "maximum", "minimum"}
_FUNCTIONS |= {"empty_like", "ones_like", "sqrt", "stack", "where", "zeros_like"}


def __getattr__(name: str) -> Any:
    """NumPy's function of the same name, from arrays of the device to one."""
    if name not in _FUNCTIONS:
        raise AttributeError(f"the emulated CuPy has no {name}")
    return lambda *args, **kwargs: asarray(getattr(np, name)(*map(_host, args), **kwargs))


# ---- devices and streams ----


class _Current(threading.local):
    """The current device, and the current stream of each device; every thread has its own."""

    def __init__(self) -> None:
        self.device = 0
        self.streams = {number: [0] for number in range(DEVICES)}

    @property
    def stream(self) -> int:
        return self.streams[self.device][-1]


_current = _Current()


class _Device:
    """One of DEVICES; `with` makes it the current one."""

    def __init__(self, number: int | None = None):
        self.id = _current.device if number is None else number
        self._before: list[int] = []

    def __enter__(self) -> _Device:
        self._before.append(_current.device)
        _current.device = self.id
        return self

    def __exit__(self, *error: object) -> None:
        _current.device = self._before.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Device) and self.id == other.id

    def synchronize(self) -> None:
        pass


class _Stream:
    """A stream of the device that was current when it was made; `with` makes it that device's current one."""

    _made = 0

    def __init__(self, non_blocking: bool = False):
        _Stream._made += 1
        self.ptr, self.device_id = 4096 * _Stream._made, _current.device
        self._entered: list[int] = []

    @classmethod
    def from_external(cls, other: Any) -> _ExternalStream:
        version, pointer = other.__cuda_stream__()
        if version != 0:
            raise ValueError(f"version {version} of the stream protocol is not known")
        return _ExternalStream(pointer)

    def __enter__(self) -> _Stream:
        if self.device_id not in (-1, _current.device):
            raise RuntimeError(f"a stream of device {self.device_id} entered on device {_current.device}")
        self._entered.append(_current.device)
        _current.streams[_current.device].append(self.ptr)
        return self

    def __exit__(self, *error: object) -> None:
        _current.streams[self._entered.pop()].pop()

    def synchronize(self) -> None:
        pass


class _Event:
    """A moment: what runs here is done when it was asked for."""

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass


class _ExternalStream(_Stream):
    def __init__(self, ptr: int, device_id: int = -1):
        self.ptr, self.device_id = ptr, device_id
        self._entered = []


cuda = types.ModuleType("cupy.cuda")
cuda.Device, cuda.Stream, cuda.ExternalStream = _Device, _Stream, _ExternalStream  # type: ignore[attr-defined]
cuda.Event = _Event  # type: ignore[attr-defined]
cuda.get_current_stream = lambda: _ExternalStream(_current.stream)  # type: ignore[attr-defined]
cuda.get_elapsed_time = lambda start, stop: 1e3 * (stop.time - start.time)  # type: ignore[attr-defined]
cuda.is_available = lambda: True  # type: ignore[attr-defined]


# ---- kernels ----

_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(const Arguments')

_ENTRIES = """
static Arguments arguments;
extern "C" unsigned long size_of_arguments() { return sizeof(Arguments); }
"""

_ENTRY = """
static void run_NAME() { NAME(arguments); }
extern "C" const char* emulate_NAME(const void* from, long long blocks, int threads, unsigned seed) {
    memcpy(&arguments, from, sizeof arguments);
    return emulation::launch(run_NAME, blocks, threads, seed);
}
"""


def compile_for_host(code: str) -> ctypes.CDLL:
    """A shared library from C++ text that follows host.h. Kept on disk, by text and flags, for the next process.

    host.h is compiled by itself, once: what it includes would else take half of the time.
    """
    host = HOST.read_text(encoding="utf-8")
    header = _kept(host, ".h", lambda path: path.write_text(host, encoding="utf-8"))
    _kept(host, ".h.gch", lambda path: _compile(path, "", "-x", "c++-header", str(header)))
    code = f'#include "{header}"\n{code}'
    return ctypes.CDLL(str(_kept(code, ".so", lambda path: _compile(path, code, "-shared", "-x", "c++", "-"))))


def _kept(text: str, suffix: str, make: Callable[[Path], object]) -> Path:
    """The file that is made of a text."""
    folder = Path(tempfile.gettempdir()) / f"cupy_roialign_emulated_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / (hashlib.sha256("\0".join([COMPILER, *FLAGS, text]).encode()).hexdigest() + suffix)
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        make(unfinished)
        unfinished.replace(path)
    return path


def _compile(path: Path, code: str, *what: str) -> None:
    done = subprocess.run(
        [COMPILER, *FLAGS, *what, "-o", str(path)], input=code, text=True, capture_output=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{COMPILER} cannot compile the kernel:\n{done.stderr}")


_running = threading.Lock()  # a kernel's memory for its arguments is one for all threads


class RawKernel:
    num_regs = local_size_bytes = shared_size_bytes = 0  # a GPU would tell

    def __init__(self, code: str, name: str, options: tuple[str, ...] = ()):
        self.name = name
        begin, device, rest = code.partition(kernels.read("device.cuh"))
        if begin or not device:
            raise RuntimeError("the source does not begin with device.cuh")
        # One library for all kernels of a source: to make one takes a second.
        entries = [_ENTRY.replace("NAME", found) for found in _KERNEL.findall(code)]
        library = compile_for_host(rest + _ENTRIES + "".join(entries))
        self._emulate = getattr(library, f"emulate_{name}")
        self._emulate.restype = ctypes.c_char_p
        self._emulate.argtypes = [ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_uint]
        library.size_of_arguments.restype = ctypes.c_ulong
        self._bytes = library.size_of_arguments()

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], **options: Any) -> None:
        if len(grid) != 1 or len(block) != 1:
            raise ValueError(f"{self.name}: grid and block must have one dimension; got {grid} and {block}")
        if not 0 < grid[0] < 2**31:
            raise ValueError(f"{self.name}: a grid has from 1 to 2**31 - 1 blocks; got {grid[0]}")
        if not 0 < block[0] <= 1024:
            raise ValueError(f"{self.name}: a block has from 1 to 1024 threads; got {block[0]}")
        if options:
            raise ValueError(f"{self.name}: {options} are not emulated")
        (arguments,) = args
        if not isinstance(arguments, np.ndarray) or arguments.shape != () or arguments.nbytes != self._bytes:
            raise TypeError(f"{self.name}: its argument is one structure of {self._bytes} bytes; got {arguments!r}")
        launch = {"kernel": self.name, "device": _current.device, "stream": _current.stream, "blocks": grid[0]}
        with _running:
            launches.append(launch)
            problem = self._emulate(arguments.ctypes.data, grid[0], block[0], seed)
        if problem:
            raise RuntimeError(f"{self.name}: {problem.decode()}")
