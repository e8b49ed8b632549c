"""CuPy arrays on the GPU: the functions of cpu/backend.py, with the same signatures."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from cupy_roialign.gpu.backend import GpuBackend


class CupyBackend(GpuBackend):
    """Work is launched on CuPy's current stream, and memory comes from CuPy's pool."""

    strides_in_bytes = True

    def on(self, array: Any) -> Any:
        return array.device

    def layout(self, array: Any) -> tuple[int, tuple[int, ...]]:
        return array.data.ptr, array.strides

    def cast(self, array: Any, dtype: str) -> Any:
        return array.astype(dtype, copy=False)

    def empty(self, shape: tuple[int, ...], dtype: str, beside: Any) -> Any:
        return cupy.empty(shape, dtype)

    def moved(self, array: Any, axes: tuple[int, ...]) -> Any:
        return array.transpose(axes)

    def host(self, array: Any) -> np.ndarray:
        return cupy.asnumpy(array)


_backend = CupyBackend()
forward, feature_gradient, box_gradient = _backend.forward, _backend.feature_gradient, _backend.box_gradient
