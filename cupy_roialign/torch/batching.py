"""A batch of calls made into one larger call, for vmap."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from cupy_roialign.torch import private


class Batch:
    """A batch of calls made into one: of more images, and more boxes."""

    def __init__(self, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]):
        self.size, self._dims, self._args = size, in_dims, args

    def length(self, number: int) -> int:
        """Of argument `number`: how many images or rows each call has."""
        tensor, dim = self._args[number], self._dims[number]
        return int(tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1])

    def images(self, number: int) -> torch.Tensor:
        """Argument `number`: (N, ...) if all calls share it, or (B * N, ...)."""
        tensor, dim = self._args[number], self._dims[number]
        return tensor if dim is None else tensor.movedim(dim, 0).flatten(0, 1)

    def rows(self, number: int) -> torch.Tensor:
        """Argument `number`, with one row for each box: (B * K, ...)."""
        tensor, dim = self._args[number], self._dims[number]
        tensor = tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten(0, 1)

    def all_rows(self, start: int) -> list[torch.Tensor]:
        return [self.rows(number) for number in range(start, len(self._args))]

    def indices(self, number: int, images: int) -> torch.Tensor:
        """Batch indices, where every call has so many images of its own; 0: all calls share them."""
        indices = self.rows(number)
        if indices.dim() == 2:
            indices = indices[:, 0]
        if images == 0:
            return indices
        indices = indices.double() if indices.is_floating_point() else indices.long()
        first = images * torch.arange(self.size, device=indices.device)
        first = first.repeat_interleave(self.length(number), output_size=indices.shape[0])
        # one out of range must not become an image of the next call
        return torch.where((indices > -0.5) & (indices < images - 0.5), indices + first, -1)

    def apart(self, tensor: torch.Tensor, length: int) -> torch.Tensor:
        """(B * length, ...) as (B, length, ...)."""
        return tensor.reshape(self.size, length, *tensor.shape[1:])


# torch.autograd's own batching (is_grads_batched=True, vectorize=True) is older than torch.func's, and asks an autograd
# Function for no rule, but hands it batched tensors. The rules are the same.

_MOST_LEVELS = 64


def level(arg: Any) -> int:
    """The innermost level at which a tensor is batched; 0: at none."""
    level = 0
    while level < _MOST_LEVELS and isinstance(arg, torch.Tensor) and private.is_batched(arg):
        level += 1
        # Torch does not tell the level, least of all to the thread of a GPU. But to remove one at which a tensor is not
        # batched is to expand it, and nothing can be expanded to -1.
        with contextlib.suppress(RuntimeError):
            arg = _without_level(arg, level)
    return level


def _without_level(tensor: torch.Tensor, level: int) -> torch.Tensor:
    return private.remove_batch_dim(tensor, level, -1, 0)


def apply(function: type[torch.autograd.Function], args: Sequence[Any], levels: Sequence[int]) -> torch.Tensor:
    innermost = max(levels)
    dims = [0 if level == innermost else None for level in levels]
    whole = [arg if dim is None else _without_level(arg, innermost) for arg, dim in zip(args, dims, strict=True)]
    output, dim = private.apply_vmap(function, len(whole[dims.index(0)]), dims, whole)
    # Forward mode takes a batch only where it comes first in memory too.
    return private.add_batch_dim(output.movedim(dim, 0).contiguous() if dim else output, 0, innermost)
