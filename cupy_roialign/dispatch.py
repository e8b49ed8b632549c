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
    """Where arrays of one kind are computed on."""

    def join(self, boxes: list[Any], like: Any) -> tuple[Any, Any]:
        """Lists of (L_i, 4) boxes, one for each image, as (K, 4) boxes and (K,) batch indices, beside `like`."""

    def column(self, boxes: Any) -> Any:
        """The first column of (K, 5) boxes, or the boxes, where that is cut out later."""

    def forward(self, request: Request) -> Any:
        """The crops."""

    def vjp(self, request: Request) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        """The crops, and the function from the gradient to them to those to the features and the boxes."""


class ArrayHome:
    """A backend, and how arrays of the caller's kind become the backend's and results the caller's."""

    def __init__(self, backend: Any, take: Callable[[Any], Any], give: Callable[[Any], Any]):
        self._backend, self._take, self._give = backend, take, give

    def _taken(self, request: Request) -> tuple[Any, Any, Any, Rule]:
        return self._take(request.features), self._take(request.boxes), self._take(request.batch_indices), request.rule

    def join(self, boxes: list[Any], like: Any) -> tuple[Any, Any]:
        joined, indices = self._backend.join([self._take(part) for part in boxes], self._take(like))
        return self._give(joined), self._give(indices)

    def column(self, boxes: Any) -> Any:
        return self._take(boxes)[:, 0]

    def forward(self, request: Request) -> Any:
        return self._give(self._backend.forward(*self._taken(request)))

    def vjp(self, request: Request) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        taken = self._taken(request)

        def pullback(grad_output: Any) -> tuple[Any, Any]:
            grad = self._take(grad_output)
            to_features = self._backend.feature_gradient(grad, *taken)
            return self._give(to_features), self._give(self._backend.box_gradient(grad, *taken))

        return self._give(self._backend.forward(*taken)), pullback


def _same(array: Any) -> Any:
    return array


def _from_dlpack(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else np.from_dlpack(array)


def home(**named: Any) -> Home:
    """The home of some arguments, which must be arrays of one library on one device."""
    name, first = next(iter(named.items()))
    kind = None
    for other, array in named.items():
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{other} is a masked array, and masks have no meaning here; pass {other}.filled(value)")
        if not hasattr(array, "__dlpack_device__") or isinstance(array, type):
            raise TypeError(
                f"{other} must be an array, of NumPy, PyTorch or another library that has __dlpack__; got "
                f"{_describe(array)}; make one with numpy.asarray, torch.as_tensor or the like"
            )
        if kind is None:
            kind = library, place = _kind(array)
        elif _kind(array) != kind:
            raise TypeError(
                f"{name} and {other} must be arrays of one library on one device; got {_describe(first)} and "
                f"{_describe(array)}; convert or move one of them"
            )
    if library == "cupy":
        from cupy_roialign import cupy_backend

        return ArrayHome(cupy_backend, _same, _same)
    if library == "torch" and place.startswith("cuda"):
        _need_cupy(name, first)
    elif place != _CPU:
        raise TypeError(
            f"{name} must be in the CPU's memory, a CuPy array or a CUDA tensor; got {_describe(first)}; copy it there "
            f"first"
        )
    if library == "torch":
        from cupy_roialign import tensor_home

        tensors = tensor_home.TensorHome()
        for other, tensor in named.items():
            tensors.check(other, tensor)
        return tensors
    from cupy_roialign import numpy_backend

    if library == "numpy":
        return ArrayHome(numpy_backend, np.asarray, _same)
    namespace = getattr(first, "__array_namespace__", None)
    if namespace is None:
        raise TypeError(
            f"{name} is a {_describe(first)}, a library that does not tell how to make an array of it from a result; "
            f"pass numpy.from_dlpack({name}) and convert the result"
        )
    return ArrayHome(numpy_backend, _from_dlpack, namespace().from_dlpack)


def _need_cupy(name: str, tensor: Any) -> None:
    try:
        import cupy  # noqa: F401
    except Exception as error:
        from cupy_roialign import problems

        raise ImportError(f"{name} is a {_describe(tensor)}, and {problems.cupy_import_failed(error)}") from error


def _kind(array: Any) -> tuple[str, str]:
    """The library of an array and where its memory is. Subclasses count as what they are subclasses of."""
    torch = sys.modules.get("torch")
    if isinstance(array, np.ndarray):
        return "numpy", _CPU
    if torch is not None and isinstance(array, torch.Tensor):
        return "torch", _CPU if array.device.type == "cpu" else str(array.device)
    device, number = array.__dlpack_device__()
    place = _PLACES.get(int(device), f"DLPack device type {int(device)}, number {{}}").format(number)
    return type(array).__module__.partition(".")[0], place


def _describe(array: Any) -> str:
    kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
    is_array = hasattr(array, "__dlpack_device__") and not isinstance(array, type)
    return f"{kind} on {_kind(array)[1]}" if is_array else kind
