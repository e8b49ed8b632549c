"""From arrays to where they are computed on, without importing a library that is not in use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from cupy_roialign.geometry import Rule

_CPU = "the CPU"
_PLACES = {1: _CPU, 2: "GPU {}", 10: "GPU {} (ROCm)"}  # by DLPack's numbers


class Request(NamedTuple):
    """A checked call of an operator, in terms that every backend understands; the order is that of their arguments."""

    features: Any  # (N, C, H, W)
    boxes: Any  # (K, 4 or 5)
    batch_indices: Any  # (K,), integers or the first column of (K, 5) boxes
    rule: Rule


class Home(Protocol):
    """Where arrays of one kind are computed on. What it is given are arrays as `home` has returned them."""

    def join(self, boxes: list[Any], like: Any) -> tuple[Any, Any]:
        """Lists of (L_i, 4) boxes, one for each image, as (K, 4) boxes and (K,) batch indices, beside `like`."""

    def column(self, boxes: Any) -> Any:
        """The first column of (K, 5) boxes, or the boxes, where that is cut out later."""

    def forward(self, request: Request) -> Any:
        """The crops, as the caller's kind of array."""

    def vjp(self, request: Request) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        """The crops, and the function from the gradient to them to those to the features and the boxes.

        All of these are of the caller's kind.
        """


class ArrayHome:
    """A backend, how arrays of the caller's kind become the backend's, and results the caller's."""

    def __init__(
        self,
        backend: Any,
        take: Callable[[str, Any], Any] = lambda name, array: array,  # the name is for errors
        give: Callable[[Any], Any] = lambda array: array,
    ):
        self._backend, self.take, self._give = backend, take, give

    def join(self, boxes: list[Any], like: Any) -> tuple[Any, Any]:
        joined: tuple[Any, Any] = self._backend.join(boxes, like)
        return joined

    def column(self, boxes: Any) -> Any:
        return boxes[:, 0]

    def forward(self, request: Request) -> Any:
        return self._give(self._backend.forward(*request))

    def vjp(self, request: Request) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        def pullback(grad_output: Any) -> tuple[Any, Any]:
            grad = self.take("grad_output", grad_output)
            to_features = self._backend.feature_gradient(grad, *request)
            return self._give(to_features), self._give(self._backend.box_gradient(grad, *request))

        return self.forward(request), pullback


def _as_numpy(name: str, array: np.ndarray) -> np.ndarray:
    """Without what a subclass makes of its methods."""
    return np.asarray(array)


def _over_dlpack(name: str, array: Any) -> np.ndarray:
    try:
        return np.from_dlpack(array)
    except Exception as error:  # whatever the other library raises
        raise TypeError(
            f"{name} must be an array that NumPy can take over DLPack; got {_describe(array)} of dtype "
            f"{getattr(array, 'dtype', 'unknown')} ({error}); convert it, for example to float32"
        ) from error


def home(kept: bool, /, **named: Any) -> tuple[Home, dict[str, Any]]:
    """The home of some arguments, which must be arrays of one library on one device, and what it takes them as.

    `kept`: they are read after the call, too, when the caller may have given tensors another memory.
    """
    library, place = together(named)
    name, first = next(iter(named.items()))
    if library == "torch":
        if place.startswith("cuda"):
            _need_cupy(name, first)
        elif place != _CPU:
            raise TypeError(_out_of_reach(name, first))
        from cupy_roialign import tensor_home

        return tensor_home.home(named, kept)
    arrays = _array_home(library, place, name, first)
    return arrays, {other: arrays.take(other, array) for other, array in named.items()}


def together(named: dict[str, Any]) -> tuple[str, str]:
    """The library of some arguments, which must be arrays of the same, and where they lie."""
    name, first = next(iter(named.items()))
    kind = None
    for other, array in named.items():
        found = _kind(array)
        if found is None:
            raise TypeError(
                f"{other} must be an array, of NumPy, PyTorch or another library that has __dlpack__; got "
                f"{_describe(array)}; make one with numpy.asarray, torch.as_tensor or the like"
            )
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


def _array_home(library: str, place: str, name: str, first: Any) -> ArrayHome:
    if library == "cupy":
        from cupy_roialign import cupy_backend

        return ArrayHome(cupy_backend)
    if place != _CPU:
        raise TypeError(_out_of_reach(name, first))
    from cupy_roialign import numpy_backend

    if library == "numpy":
        return ArrayHome(numpy_backend, _as_numpy)
    namespace = getattr(first, "__array_namespace__", None)
    if namespace is None:
        raise TypeError(
            f"{name} is a {_describe(first)}, a library that does not tell how to make an array of it from a result; "
            f"pass numpy.from_dlpack({name}) and convert the result"
        )
    return ArrayHome(numpy_backend, _over_dlpack, namespace().from_dlpack)


def _out_of_reach(name: str, array: Any) -> str:
    wanted = "in the CPU's memory, a CuPy array or a CUDA tensor"
    return f"{name} must be {wanted}; got {_describe(array)}; copy it there first"


def _need_cupy(name: str, tensor: Any) -> None:
    try:
        import cupy  # noqa: F401
    except Exception as error:
        from cupy_roialign import problems

        raise ImportError(f"{name} is a {_describe(tensor)}, and {problems.cupy_import_failed(error)}") from error


def _kind(array: Any) -> tuple[str, str] | None:
    """The library of an array and where its memory is. Subclasses count as what they are subclasses of."""
    if isinstance(array, np.ndarray):
        return "numpy", _CPU
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return "torch", _CPU if array.is_cpu else str(array.device)
    if isinstance(array, type) or not hasattr(array, "__dlpack_device__"):
        return None
    device, number = array.__dlpack_device__()
    place = _PLACES.get(int(device), f"DLPack device type {int(device)}, number {{}}").format(number)
    return type(array).__module__.partition(".")[0], place


def _describe(array: Any) -> str:
    kind, found = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins."), _kind(array)
    return kind if found is None else f"{kind} on {found[1]}"
