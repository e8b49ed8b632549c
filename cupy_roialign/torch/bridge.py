"""Tensors on the CPU as NumPy's arrays and back, over DLPack: both share the memory.

An array keeps the tensor alive, but not its memory, which is gone when the tensor is given another, or resized. So no
array of a tensor outlives the call in which it is made.
"""

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
    """What lies in memory, whatever the tensor is besides. Raises where nothing does, or NumPy has no such dtype."""
    need_memory(tensor)  # or NumPy would make an array of its own, of what happens to lie there
    return np.from_dlpack(_Exported(tensor))


def need_memory(tensor: torch.Tensor) -> None:
    if not is_in_memory(tensor):
        raise TypeError(f"a tensor of shape {tuple(tensor.shape)} has no elements in memory")


def need_values(tensor: torch.Tensor) -> None:
    """What lies in memory are the values, rather than what only a subclass can read."""
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"the elements of a {type(tensor).__qualname__} are only known to its __torch_dispatch__")


def is_in_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor has elements at an address, which a part of a tensor counts from that of the whole."""
    return tensor.data_ptr() != tensor.storage_offset() * tensor.element_size() or not tensor.numel()


class Bfloat16:
    """An array of bfloat16, for which NumPy has no dtype: its bits, of which float32 is made where they are read."""

    dtype = torch.bfloat16

    def __init__(self, bits: np.ndarray):
        self._bits = bits  # uint16: the upper half of a float32's
        self.shape, self.strides, self.size, self.flags = bits.shape, bits.strides, bits.size, bits.flags

    def __len__(self) -> int:
        return len(self._bits)

    def __getitem__(self, where: Any) -> Bfloat16:
        return Bfloat16(self._bits[where])

    def transpose(self, *axes: int) -> Bfloat16:
        return Bfloat16(self._bits.transpose(*axes))

    def astype(self, dtype: Any, order: Any = "K", copy: bool = True) -> np.ndarray:
        wide = self._bits.astype(np.uint32, order)
        wide <<= 16
        return wide.view(np.float32).astype(dtype, order, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.astype(dtype or np.float32)


def numbers(tensor: torch.Tensor) -> np.ndarray | Bfloat16:
    """Like `array`, but bfloat16 is made float32 only where it is read: features are large."""
    if tensor.dtype != torch.bfloat16:
        return array(tensor)
    need_values(tensor)
    return Bfloat16(memory(tensor.resolve_neg().view(torch.int16)).view(np.uint16))


def array(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor, in float32 for bfloat16, which NumPy lacks; copied only if memory holds other values."""
    need_values(tensor)
    tensor = tensor.resolve_neg()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    if tensor.dtype == torch.bool:  # which not every NumPy takes over DLPack
        return memory(tensor.view(torch.uint8)).view(bool)
    return memory(tensor)


def tensor(array: np.ndarray) -> torch.Tensor:
    made: torch.Tensor = dlpack.from_dlpack(array.__dlpack__())
    return made
