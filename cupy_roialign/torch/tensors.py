"""The backends on tensors: the names and signatures of cpu/backend.py.

On the CPU a tensor and NumPy's array share memory. On a GPU a kernel takes a tensor's address; memory for results is
torch's, and so is the stream.

Batch indices may also be the (K, 5) boxes themselves, which hold them in their first column: cutting it out by torch
would take longer than all else that is done here.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cupy_roialign import arrays
from cupy_roialign.arrays import ArraySpec
from cupy_roialign.cpu import backend as cpu
from cupy_roialign.diagnose import problems
from cupy_roialign.gpu import backend as gpu
from cupy_roialign.rule import Rule, terms
from cupy_roialign.torch import bridge, private

on_cpu: Callable[[torch.Tensor], bool] = operator.attrgetter("is_cpu")

arrays.TORCH_NAMES.update({getattr(torch, name): name for name in arrays.REALS})


def forward(
    features: torch.Tensor,
    boxes: torch.Tensor,
    batch_indices: torch.Tensor,
    rule: Rule,
    directions: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    if not terms(len(directions)):
        return _zeros(features, features, (boxes.shape[0], features.shape[1], *rule.bins))
    backend, take, numbers = _backend(features)
    crops = backend.forward(numbers(features), *_placed(take, boxes, batch_indices), rule, [*map(take, directions)])
    return _tensor(crops, arrays.output_name(arrays.dtype_name(features)))


def feature_gradient(
    grad_output: torch.Tensor,
    features: torch.Tensor | ArraySpec,
    boxes: torch.Tensor,
    batch_indices: torch.Tensor,
    rule: Rule,
    directions: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    if not terms(len(directions)):
        return _zeros(grad_output, features, features.shape)
    backend, take, numbers = _backend(grad_output)
    dtype = arrays.dtype_name(features)
    known = "float32" if backend is cpu and dtype == "bfloat16" else dtype  # NumPy has no bfloat16
    spec = ArraySpec(tuple(features.shape), arrays.strides(features), known)
    gradient = backend.feature_gradient(
        numbers(grad_output), spec, *_placed(take, boxes, batch_indices), rule, [*map(take, directions)]
    )
    return _tensor(gradient, arrays.output_name(dtype))


def box_gradient(
    grad_output: torch.Tensor,
    features: torch.Tensor,
    boxes: torch.Tensor,
    batch_indices: torch.Tensor,
    rule: Rule,
    directions: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    if not terms(len(directions) + 1):
        return boxes.new_zeros(boxes.shape)
    backend, take, numbers = _backend(grad_output)
    gradient = backend.box_gradient(
        numbers(grad_output), numbers(features), *_placed(take, boxes, batch_indices), rule, [*map(take, directions)]
    )
    return _tensor(gradient, arrays.dtype_name(boxes))


def _backend(tensor: torch.Tensor) -> tuple[Any, Callable[[torch.Tensor], Any], Callable[[torch.Tensor], Any]]:
    """That of the device where a tensor is, and what it takes tensors as: boxes and indices, and others."""
    return (cpu, bridge.array, bridge.numbers) if on_cpu(tensor) else (_cuda, _plain, _plain)


def _zeros(beside: torch.Tensor, like: torch.Tensor | ArraySpec, shape: Sequence[int]) -> torch.Tensor:
    """Crops or a gradient, in the memory order of the features."""
    dtype = getattr(torch, arrays.output_name(arrays.dtype_name(like)))
    if not arrays.is_channels_last(like.shape, arrays.strides(like)):
        return beside.new_zeros(shape, dtype=dtype)
    count, channels, height, width = shape
    return beside.new_zeros((count, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Without autograd, and with each element in memory as it is."""
    bridge.need_values(tensor)
    bridge.need_memory(tensor)
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _placed(take: Callable[[torch.Tensor], Any], boxes: torch.Tensor, batch_indices: torch.Tensor) -> tuple[Any, Any]:
    taken = take(boxes)
    return taken, take(batch_indices) if batch_indices.dim() == 1 else taken[:, 0]


def _tensor(result: torch.Tensor | np.ndarray, dtype: str) -> torch.Tensor:
    if isinstance(result, torch.Tensor):
        return result
    tensor = bridge.tensor(result)
    return tensor if arrays.dtype_name(result) == dtype else tensor.to(getattr(torch, dtype))


class _Stream:
    """A stream of torch's, by the protocol that CuPy 14 knows and torch 2.4 does not."""

    def __init__(self, pointer: int):
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer  # the protocol's version comes first


class _CudaBackend(gpu.GpuBackend):
    strides_in_bytes = False

    @contextlib.contextmanager
    def on(self, array: torch.Tensor) -> Iterator[None]:
        # The thread that runs backward has a current device and stream of its own, and so has CuPy.
        import cupy

        if not problems.finds_gpu(cupy):
            raise RuntimeError(f"tensors are on {array.device}, and {problems.no_gpu_here()}")
        pointer = private.current_stream(array.device)
        if hasattr(cupy.cuda.Stream, "from_external"):
            stream = cupy.cuda.Stream.from_external(_Stream(pointer))
        else:  # CuPy 13; 14 warns of it
            stream = cupy.cuda.ExternalStream(pointer)
        with cupy.cuda.Device(array.device.index), stream:
            yield

    def layout(self, array: torch.Tensor) -> tuple[int, tuple[int, ...]]:
        return array.data_ptr(), array.stride()

    def cast(self, array: torch.Tensor, dtype: str) -> torch.Tensor:
        return array.to(getattr(torch, dtype))

    def empty(self, shape: tuple[int, ...], dtype: str, beside: torch.Tensor) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=beside.device)

    def moved(self, array: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        return array.permute(axes)

    def host(self, array: torch.Tensor) -> np.ndarray:
        return bridge.array(array.cpu())


_cuda: Any = _CudaBackend()
