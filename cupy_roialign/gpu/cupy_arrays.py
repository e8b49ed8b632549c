"""CuPy arrays on the GPU: the names and signatures of cpu/backend.py."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from cupy_roialign.gpu.backend import GpuBackend


class CupyBackend(GpuBackend):
    """Work is launched on CuPy's current stream, and memory comes from CuPy's pool."""

    def on(self, array: Any) -> Any:
        return array.device

    def layout(self, array: Any) -> tuple[int, tuple[int, ...]]:
        size = array.itemsize
        return array.data.ptr, tuple([stride // size for stride in array.strides])

    def cast(self, array: Any, dtype: str) -> Any:
        return array.astype(dtype, copy=False)

    def empty(self, shape: tuple[int, ...], dtype: str, beside: Any) -> Any:
        return cupy.empty(shape, dtype)

    def moved(self, array: Any, axes: tuple[int, ...]) -> Any:
        return array.transpose(axes)

    def host(self, array: Any) -> np.ndarray:
        return cupy.asnumpy(array)


def join(boxes: list[Any], like: Any) -> tuple[Any, Any]:
    """Lists of (L_i, 4) boxes, one for each image, as (K, 4) boxes and (K,) batch indices, beside `like`."""
    with like.device:
        if not boxes:
            return cupy.zeros((0, 4), np.float32), cupy.zeros(0, np.int64)
        # One by one: a copy from the host's memory would synchronize.
        indices = [cupy.full(len(rows), i, np.int64) for i, rows in enumerate(boxes)]
        return cupy.concatenate(boxes), cupy.concatenate(indices)


_backend = CupyBackend()
forward, feature_gradient, box_gradient = _backend.forward, _backend.feature_gradient, _backend.box_gradient
