"""Tensors on the CPU as NumPy's arrays and back, over DLPack: both share the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils import dlpack


class _Exported:
    """As much of a tensor as NumPy asks for. All that torch does besides, and `Tensor.numpy` too, takes longer."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def __dlpack__(self, **asked: Any) -> Any:
        return dlpack.to_dlpack(self._tensor)  # type: ignore[attr-defined]

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


def memory(tensor: torch.Tensor) -> np.ndarray:
    """What lies in memory, whatever the tensor is besides. Raises where NumPy has no such dtype or layout."""
    return np.from_dlpack(_Exported(tensor))


def array(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor; a copy only of those that are in memory as others. NumPy has no bfloat16, but float32."""
    tensor = tensor.resolve_neg()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    if tensor.dtype == torch.bool:  # which not every NumPy takes over DLPack
        return memory(tensor.view(torch.uint8)).view(bool)
    return memory(tensor)


def tensor(array: np.ndarray) -> torch.Tensor:
    made: torch.Tensor = dlpack.from_dlpack(array.__dlpack__())
    return made
