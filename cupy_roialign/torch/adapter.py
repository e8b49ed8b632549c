"""Tensors: see `dispatch.Home`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._C import _are_functorch_transforms_active as _are_transforms_active
from torch._C import _is_tracing
from torch._C import _len_torch_dispatch_stack as _modes
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from cupy_roialign import autograd, bridge, dispatch, numpy_backend, tensors

if TYPE_CHECKING:
    from cupy_roialign.dispatch import Request

_DENSE = (torch.Tensor, torch.nn.Parameter)


def home(named: dict[str, torch.Tensor], kept: bool) -> tuple[dispatch.Home, dict[str, Any]]:
    """The home of tensors, and what it takes them as.

    On the CPU, where torch records nothing and they are not `kept` for later, these are arrays: to look at one takes
    less than to look at a tensor.
    """
    in_graph = _is_recorded()
    if not kept and not in_graph and not _is_transformed() and tensors.on_cpu(next(iter(named.values()))):
        arrays = {}
        for name, tensor in named.items():
            array = _plain_array(tensor)
            if array is None:
                break
            arrays[name] = array
        else:
            return _PLAIN, arrays
    wrapped = [_check(name, tensor, in_graph) for name, tensor in named.items()]
    return TensorHome(in_graph, any(wrapped)), named


class TensorHome:
    """Where tensors are computed on: see `dispatch.Home`. One serves one call."""

    def __init__(self, in_graph: bool, wrapped: bool) -> None:
        self._in_graph = in_graph
        self._wrapped = wrapped  # whether a transform of torch.func has wrapped a tensor

    def join(self, boxes: list[torch.Tensor], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not boxes:
            return torch.zeros((0, 4), device=like.device), torch.zeros(0, dtype=torch.int64, device=like.device)
        counts = [part.shape[0] for part in boxes]  # a graph records `shape`, but not `len`
        if not self._in_graph and tensors.on_cpu(like):
            return torch.cat(boxes), bridge.tensor(np.repeat(np.arange(len(boxes)), counts))
        # One by one: on a GPU torch.repeat_interleave waits, and a copy from the host's memory does, too.
        indices = [torch.full((count,), i, device=like.device) for i, count in enumerate(counts)]
        return torch.cat(boxes), torch.cat(indices)

    def column(self, boxes: torch.Tensor) -> torch.Tensor:
        # The column is cut out later: see tensors.py and, for a graph, which is one for all who want gradients, ops.py.
        return boxes if self._in_graph or not boxes.requires_grad else boxes.detach()

    def forward(self, request: Request) -> torch.Tensor:
        return self._family(request).crops(*request, ())

    def vjp(self, request: Request) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[Any, Any]]]:
        *given, rule = request
        features, boxes, batch_indices = [_apart(tensor, self._wrapped) for tensor in given]
        at = (boxes, batch_indices, rule, ())

        def pullback(grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            in_graph = _is_recorded()  # which may have begun, or ended, after the call
            grad = _apart(grad_output, _check("grad_output", grad_output, in_graph))
            family = TensorHome(in_graph, wrapped=False)._family(request)
            return family.to_features(grad, autograd.like_of(features), *at), family.to_boxes(grad, features, *at)

        return self._family(request).crops(features, *at), pullback

    def _family(self, request: Request) -> autograd.Family:
        if self._in_graph:
            from cupy_roialign import ops

            compiling = torch.compiler.is_compiling()
            if _are_transforms_active() or (not compiling and _has_tangent(*request[:2])):
                raise NotImplementedError(
                    "torch.func's transforms (grad, jvp, vmap, linearize...) cannot be recorded around cupy_roialign "
                    "by torch.compile or a tracer; call them outside of what is compiled, or use autograd in it"
                )
            return ops.FAMILY
        if self._wrapped:
            _refuse_nested_forward_mode()
        return autograd.EAGER


def _check(name: str, tensor: torch.Tensor, in_graph: bool) -> bool:
    """Whether a transform of torch.func has wrapped a tensor, which must have elements in memory.

    Another would be read as what happens to lie at address 0, or anywhere.
    """
    if in_graph and torch.compiler.is_compiling():
        return False  # where none has any, and torch looks after them
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor; got one that is {kind}; use its to_dense or to_padded_tensor")
    if in_graph:
        return False
    if type(tensor) in _DENSE or not _is_fake(tensor):
        try:
            if bridge.is_in_memory(tensor):
                return False
        except RuntimeError:
            return True
    raise TypeError(
        f"{name} must be a tensor with elements in memory; got a {type(tensor).__name__} without (a fake, masked, "
        f"or otherwise wrapped tensor)"
    )


def _apart(tensor: torch.Tensor, wrapped: bool) -> torch.Tensor:
    """A tensor that is no part of autograd's graph."""
    if wrapped:
        raise TypeError("cupy_roialign.vjp cannot be transformed by torch; use torch.func.vjp or autograd instead")
    return tensor.detach()


def _is_recorded() -> bool:
    """Whether what is called is recorded, or done in another mode, by torch: then only an operator of its own is."""
    return is_dynamo_compiling() or _is_tracing() or _modes() > 0


def _is_transformed() -> bool:
    """Whether a tensor may have a tangent, or be wrapped by a transform of torch.func."""
    return forward_ad._current_level >= 0 or _are_transforms_active()


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
    unpack = forward_ad.unpack_dual
    return any(unpack(tensor).tangent is not None for tensor in inputs)  # type: ignore[no-untyped-call]


# ---- tensors that are arrays ----


def _plain_array(tensor: torch.Tensor) -> np.ndarray | None:
    """The memory of a tensor that is no more than that; None: of any other."""
    if type(tensor) not in _DENSE or tensor.requires_grad or tensor.is_neg():
        return None
    try:
        return bridge.memory(tensor)
    except (BufferError, RuntimeError, TypeError):  # sparse, bfloat16...
        return None


_PLAIN = dispatch.ArrayHome(numpy_backend, give=bridge.tensor)
