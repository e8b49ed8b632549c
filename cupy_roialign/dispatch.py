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

    def forward(self, request: Request) -> Any:
        """The crops."""

    def vjp(self, request: Request) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        """The crops, and the function from the gradient to them to those to the features and the boxes."""


class NumpyHome:
    """NumPy arrays, and those of any library that `give` makes from a NumPy array in the CPU's memory."""

    def __init__(self, give: Callable[[np.ndarray], Any] | None = None):
        self._give = give or (lambda array: array)

    def join(self, boxes: list[Any], like: Any) -> tuple[Any, Any]:
        parts = [_numpy(part) for part in boxes] or [np.zeros((0, 4), np.float32)]
        return np.concatenate(parts), np.repeat(np.arange(len(boxes)), [len(part) for part in boxes])

    def forward(self, request: Request) -> Any:
        from cupy_roialign import numpy_backend

        return self._give(numpy_backend.forward(*_numpy_request(request)))

    def vjp(self, request: Request) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        from cupy_roialign import numpy_backend

        taken = _numpy_request(request)

        def pullback(grad_output: Any) -> tuple[Any, Any]:
            grad = _numpy(grad_output)
            features, boxes = numpy_backend.feature_gradient(grad, *taken), numpy_backend.box_gradient(grad, *taken)
            return self._give(features), self._give(boxes)

        return self._give(numpy_backend.forward(*taken)), pullback


def home(**named: Any) -> Home:
    """The home of some arguments, which must be arrays of one library on one device."""
    (name, first), *others = named.items()
    for other, array in ((name, first), *others):
        if not hasattr(array, "__dlpack_device__"):
            raise TypeError(
                f"{other} must be an array, of NumPy, PyTorch or another library that has __dlpack__; got "
                f"{_describe(array)}; make one with numpy.asarray"
            )
        if _kind(array) != _kind(first):
            raise TypeError(
                f"{name} and {other} must be arrays of one library on one device; got {_describe(first)} and "
                f"{_describe(array)}; convert or move one of them"
            )
    library, place = _kind(first)
    if place != _CPU:
        raise TypeError(f"{name} must be in the CPU's memory; got {_describe(first)}; copy it there first")
    if library == "torch":
        from cupy_roialign import torch

        return torch.TensorHome()
    if library == "numpy":
        return NumpyHome()
    namespace = getattr(first, "__array_namespace__", None)
    if namespace is None:
        raise TypeError(
            f"{name} is a {_describe(first)}, a library that does not tell how to make an array of it from a result; "
            f"pass numpy.from_dlpack({name}) and convert the result"
        )
    return NumpyHome(namespace().from_dlpack)


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
    return f"{kind} on {_kind(array)[1]}" if hasattr(array, "__dlpack_device__") else kind


def _numpy(array: Any) -> np.ndarray:
    return np.asarray(array) if isinstance(array, np.ndarray) else np.from_dlpack(array)


def _numpy_request(request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray, Rule]:
    return _numpy(request.features), _numpy(request.boxes), _numpy(request.batch_indices), request.rule
