"""How the arrays of one library are computed with: an `Adapter`, and the one for arrays that a backend takes."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from cupy_roialign import validation
from cupy_roialign.rule import Request


class Adapter(Protocol):
    """Between the arrays of a caller and a backend. What it is given are arrays as `dispatch.adapter` returns them."""

    def array(self, numbers: Sequence[float], shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Numbers as an array of a shape, on the device of `like`; one that a float cannot hold becomes infinite."""

    def full(self, count: int, value: int, like: Any) -> Any:
        """(count,) times the same integer, on the device of `like`."""

    def join(self, boxes: Sequence[Any], like: Any) -> tuple[Any, Any]:
        """Boxes (L_i, 4) of each image, at least one, as (K, 4) boxes and (K,) batch indices."""

    def column(self, name: str, boxes: Any, images: int) -> Any:
        """The first column of (K, 5) boxes, checked to be wide enough; or the boxes, if it is cut out later."""

    def forward(self, request: Request) -> Any:
        """The crops, as the caller's kind of array."""

    def vjp(self, request: Request) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        """The crops, and the function from their gradient to those of the features and the boxes.

        All of these are of the caller's kind.
        """


class ArrayAdapter:
    """A backend, how arrays of the caller's kind become the backend's, and results the caller's.

    Args:
        backend: the module with `forward`, `feature_gradient` and `box_gradient`.
        library: what makes the backend's arrays: the module numpy or cupy.
        take: from the caller's array to the backend's, with the argument's name for errors.
        give: from the backend's array to the caller's.
    """

    def __init__(
        self,
        backend: Any,
        library: Any = np,
        take: Callable[[str, Any], Any] = lambda name, array: array,
        give: Callable[[Any], Any] = lambda array: array,
    ):
        self._backend, self._library, self.take, self._give = backend, library, take, give

    def array(self, numbers: Sequence[float], shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        with np.errstate(over="ignore"), self._on(like):
            return self._library.asarray(np.array(numbers).astype(dtype).reshape(shape))

    def full(self, count: int, value: int, like: Any) -> Any:
        with self._on(like):
            return self._library.full(count, value, np.int64)

    def join(self, boxes: Sequence[Any], like: Any) -> tuple[Any, Any]:
        # One by one: on a GPU a copy from the host's memory would wait.
        indices = [self.full(part.shape[0], i, like) for i, part in enumerate(boxes)]
        with self._on(like):
            return self._library.concatenate(boxes), self._library.concatenate(indices)

    def column(self, name: str, boxes: Any, images: int) -> Any:
        validation.batch_column(name, boxes, images)
        return boxes[:, 0]

    def forward(self, request: Request) -> Any:
        return self._give(self._backend.forward(*request))

    def vjp(self, request: Request) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        def pullback(grad_output: Any) -> tuple[Any, Any]:
            grad = self.take("grad_output", grad_output)
            to_features = self._backend.feature_gradient(grad, *request)
            return self._give(to_features), self._give(self._backend.box_gradient(grad, *request))

        return self.forward(request), pullback

    def _on(self, array: Any) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._library is np else array.device


_MODULES = {"of_torch": "cupy_roialign.torch.adapter"}


def __getattr__(name: str) -> Any:
    # By name and when first used, since the package that has this adapter builds on the operators, which ask for it.
    # Here rather than in a function, because torch.compile cannot trace an import by name.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = globals()[name] = importlib.import_module(_MODULES[name])
    return module
