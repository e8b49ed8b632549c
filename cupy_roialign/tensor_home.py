"""Tensors: see `dispatch.Home`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cupy_roialign import autograd, tensors

if TYPE_CHECKING:
    from cupy_roialign.dispatch import Request


class TensorHome:
    """Where tensors are computed on: see `dispatch.Home`. One serves one call."""

    def __init__(self) -> None:
        self._in_graph = _is_recorded()
        self._transformed = False  # whether a transform of torch.func has wrapped a tensor

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor whose elements are not in memory would be read as what happens to lie at address 0, or anywhere."""
        if self._in_graph and torch.compiler.is_compiling():
            return  # where none has any, and torch looks after them
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            raise TypeError(
                f"{name} must be a dense tensor; got one that is {kind}; use its to_dense or to_padded_tensor"
            )
        if self._in_graph:
            return
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not _is_fake(tensor):
            try:
                if tensor.data_ptr() != 0 or tensor.numel() == 0:
                    return
            except RuntimeError:  # within a transform, which unwraps it later
                self._transformed = True
                return
        raise TypeError(
            f"{name} must be a tensor with elements in memory; got a {type(tensor).__name__} without (a fake, masked, "
            f"or otherwise wrapped tensor)"
        )

    def join(self, boxes: list[torch.Tensor], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not boxes:
            return torch.zeros((0, 4), device=like.device), torch.zeros(0, dtype=torch.int64, device=like.device)
        counts = [part.shape[0] for part in boxes]  # a graph records `shape`, but not `len`
        if not self._in_graph and tensors.on_cpu(like):
            return torch.cat(boxes), tensors.from_numpy(np.repeat(np.arange(len(boxes)), counts))
        # One by one: on a GPU torch.repeat_interleave waits, and a copy from the host's memory does, too.
        indices = [torch.full((count,), i, device=like.device) for i, count in enumerate(counts)]
        return torch.cat(boxes), torch.cat(indices)

    def column(self, boxes: torch.Tensor) -> torch.Tensor:
        # The column is cut out later: see tensors.py and, for a graph, which is one for all who want gradients, ops.py.
        return boxes if self._in_graph or not boxes.requires_grad else boxes.detach()

    def forward(self, request: Request) -> torch.Tensor:
        return self._family(request).crops(*request, ())

    def vjp(self, request: Request) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[Any, Any]]]:
        _refuse_to_transform(self._transformed)
        family = self._family(request)
        features, boxes, batch_indices = (tensor.detach() for tensor in request[:3])
        at = (boxes, batch_indices, request.rule, ())

        def pullback(grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            _refuse_to_transform(not self._in_graph and torch._C._functorch.is_functorch_wrapped_tensor(grad_output))
            grad = grad_output.detach()
            return family.to_features(grad, autograd.like_of(features), *at), family.to_boxes(grad, features, *at)

        return family.crops(features, *at), pullback

    def _family(self, request: Request) -> autograd.Family:
        if self._in_graph:
            from cupy_roialign import ops

            compiling = torch.compiler.is_compiling()
            if torch._C._are_functorch_transforms_active() or (not compiling and _has_tangent(*request[:2])):
                raise NotImplementedError(
                    "torch.func's transforms (grad, jvp, vmap, linearize...) cannot be recorded around cupy_roialign "
                    "by torch.compile or a tracer; call them outside of what is compiled, or use autograd in it"
                )
            return ops.FAMILY
        if self._transformed:
            _refuse_nested_forward_mode()
        return autograd.EAGER


def _is_recorded() -> bool:
    """Whether what is called is recorded, or done in another mode, by torch: then only an operator of its own is."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def _refuse_to_transform(transformed: bool) -> None:
    if transformed:
        raise TypeError("cupy_roialign.vjp cannot be transformed by torch; use torch.func.vjp or autograd instead")


def _refuse_nested_forward_mode() -> None:
    """Of two tangents torch loses the outer one, where an autograd Function has a rule for forward mode."""
    from torch._functorch import pyfunctorch

    levels = [level.key() for level in pyfunctorch.retrieve_all_functorch_interpreters()]
    if levels.count(torch._C._functorch.TransformType.Jvp) > 1:
        raise NotImplementedError(
            "forward mode within forward mode (jvp of jvp, jacfwd of jacfwd) would be wrong; take reverse mode for one "
            "of the two, as torch.func.hessian does"
        )


def _is_fake(tensor: torch.Tensor) -> bool:
    try:
        return tensor.untyped_storage().device.type == "meta"
    except RuntimeError:
        return False


def _has_tangent(*inputs: torch.Tensor) -> bool:
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(unpack(tensor).tangent is not None for tensor in inputs)  # type: ignore[no-untyped-call]
