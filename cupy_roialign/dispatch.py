"""From the arrays of a call to the adapter that computes with them, without importing a library that is not in use."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from cupy_roialign import adapters
from cupy_roialign.adapters import Adapter, ArrayAdapter
from cupy_roialign.cpu import backend as cpu

_CPU = "the CPU"
_PLACES = {1: _CPU, 2: "GPU {}", 10: "GPU {} (ROCm)"}  # by DLPack's numbers

NUMBERS = (list, tuple, int, np.integer)
"""What a caller may write in place of boxes and indices; it becomes an array later, beside the others."""


def _as_numpy(name: str, array: np.ndarray) -> np.ndarray:
    """Without what a subclass makes of its methods."""
    return np.asarray(array)


_NUMPY = ArrayAdapter(cpu, take=_as_numpy)


def _over_dlpack(name: str, array: Any) -> np.ndarray:
    try:
        return np.from_dlpack(array)
    except Exception as error:  # whatever the other library raises
        raise TypeError(
            f"{name} must be an array that NumPy can take over DLPack; got {_describe(array)} of dtype "
            f"{getattr(array, 'dtype', 'unknown')} ({error}); convert it, for example to float32"
        ) from error


def adapter(kept: bool, features: tuple[str, Any], /, **others: Any) -> tuple[Adapter, list[Any]]:
    """The adapter for some arguments, and what it takes them as: arrays of one library on one device, or `NUMBERS`.

    `kept`: they are read after the call, too, when the caller may have given tensors another memory.
    """
    name, first = features
    named = {name: first}
    for other, value in others.items():
        if not isinstance(value, NUMBERS):
            named[other] = value
    library, place = together(named)
    chosen: Adapter
    if library == "torch":
        if place.startswith("cuda"):
            _need_cupy(name, first)
        elif place != _CPU:
            raise TypeError(_out_of_reach(name, first))
        chosen, taken = adapters.of_torch.adapter(named, kept)
    else:
        chosen = arrays = _array_adapter(library, place, name, first)
        taken = {other: arrays.take(other, array) for other, array in named.items()}
    return chosen, [taken[name], *[taken.get(other, value) for other, value in others.items()]]


def together(named: dict[str, Any]) -> tuple[str, str]:
    """The library of some arguments, which must be arrays of the same, and where they lie."""
    name, first = next(iter(named.items()))
    kind = None
    for other, array in named.items():
        found = _kind(array)
        if found is None:
            raise not_an_array(other, array)
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{other} is a masked array, and masks have no meaning here; pass {other}.filled(value)")
        if kind is None:
            kind = found
        elif found != kind:
            raise TypeError(
                f"{name} and {other} must be arrays of one library on one device; got {_describe(first)} and "
                f"{_describe(array)}; convert or move one of them"
            )
    assert kind is not None
    return kind


def not_an_array(name: str, value: Any) -> TypeError:
    return TypeError(
        f"{name} must be an array, of NumPy, PyTorch or another library that has __dlpack__; got "
        f"{_describe(value)}; make one with numpy.asarray, torch.as_tensor or the like"
    )


def _array_adapter(library: str, place: str, name: str, first: Any) -> ArrayAdapter:
    if library == "cupy" and place.endswith("(ROCm)"):
        from cupy_roialign.diagnose import problems

        raise TypeError(_out_of_reach(name, first, str(problems.rocm(problems.machine()))))
    if library == "cupy":
        from cupy_roialign.gpu import cupy_arrays

        return ArrayAdapter(cupy_arrays, sys.modules["cupy"])
    if place != _CPU:
        raise TypeError(_out_of_reach(name, first))
    if library == "numpy":
        return _NUMPY
    namespace = getattr(first, "__array_namespace__", None)
    if namespace is None:
        raise TypeError(
            f"{name} is a {_describe(first)}, a library that does not tell how to make an array of it from a result; "
            f"pass numpy.from_dlpack({name}) and convert the result"
        )
    return ArrayAdapter(cpu, take=_over_dlpack, give=namespace().from_dlpack)


def _out_of_reach(name: str, array: Any, why: str = "copy it there first") -> str:
    wanted = "in the CPU's memory, a CuPy array or a CUDA tensor"
    return f"{name} must be {wanted}; got {_describe(array)}; {why}"


def _need_cupy(name: str, tensor: Any) -> None:
    """Raises where there is no CuPy, or the GPU is AMD's, which to torch is a "cuda" device as well."""
    if getattr(sys.modules["torch"].version, "hip", None):
        why = "this PyTorch is built for ROCm, and the kernels are written for CUDA; copy it to the CPU"
        raise TypeError(_out_of_reach(name, tensor, why))
    try:
        import cupy  # noqa: F401
    except Exception as error:
        from cupy_roialign.diagnose import problems

        raise ImportError(f"{name} is a {_describe(tensor)}, and {problems.cupy_import_failed(error)}") from error


def _kind(array: Any) -> tuple[str, str] | None:
    """The library of an array and where its memory is. Subclasses count as what they are subclasses of."""
    if isinstance(array, np.ndarray):
        return "numpy", _CPU
    if isinstance(array, _class("torch", "Tensor")):
        return "torch", _CPU if array.is_cpu else str(array.device)
    if isinstance(array, type) or not hasattr(array, "__dlpack_device__"):
        return None
    device, number = array.__dlpack_device__()
    place = _PLACES.get(int(device), f"DLPack device type {int(device)}, number {{}}").format(number)
    library = "cupy" if isinstance(array, _class("cupy", "ndarray")) else type(array).__module__.partition(".")[0]
    return library, place


def _class(library: str, name: str) -> Any:
    """A class of a library, for isinstance; of none that is not imported, or only in part."""
    return getattr(sys.modules.get(library), name, ())


def _describe(array: Any) -> str:
    kind, found = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins."), _kind(array)
    return kind if found is None else f"{kind} on {found[1]}"
