"""The adapter of tensors: see adapters.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from cupy_roialign import validation
from cupy_roialign.adapters import Adapter, ArrayAdapter
from cupy_roialign.arrays import ArraySpec
from cupy_roialign.cpu import backend as cpu
from cupy_roialign.rule import Request
from cupy_roialign.torch import bridge, eager, graph, private, tensors
from cupy_roialign.torch.derivatives import Family

_DENSE = (torch.Tensor, torch.nn.Parameter)


def adapter(named: dict[str, torch.Tensor], kept: bool) -> tuple[Adapter, dict[str, Any]]:
    """The adapter of tensors, and what it takes them as.

    On the CPU, where torch records nothing and they are not `kept` for later, they become arrays at once: all that
    follows takes less on an array than on a tensor.
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
    return TensorAdapter(in_graph, any(wrapped)), named


class TensorAdapter:
    """Computes with tensors; one serves one call."""

    def __init__(self, in_graph: bool, wrapped: bool) -> None:
        self._in_graph = in_graph
        self._wrapped = wrapped  # whether a transform of torch.func has wrapped a tensor

    def array(self, numbers: Sequence[float], shape: tuple[int, ...], dtype: str, like: torch.Tensor) -> torch.Tensor:
        wide = torch.float64 if dtype.startswith("float") else torch.int64
        return torch.tensor(numbers, dtype=wide, device=like.device).to(getattr(torch, dtype)).reshape(shape)

    def full(self, count: int, value: int, like: torch.Tensor) -> torch.Tensor:
        return torch.full((count,), value, dtype=torch.int64, device=like.device)

    def join(self, boxes: Sequence[torch.Tensor], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts = [part.shape[0] for part in boxes]  # a graph records `shape`, but not `len`
        if not self._in_graph and tensors.on_cpu(like):
            return torch.cat(list(boxes)), bridge.tensor(np.repeat(np.arange(len(boxes)), counts))
        # One by one: on a GPU torch.repeat_interleave waits, and a copy from the host's memory does, too.
        return torch.cat(list(boxes)), torch.cat([self.full(count, i, like) for i, count in enumerate(counts)])

    def column(self, name: str, boxes: torch.Tensor, images: int) -> torch.Tensor:
        if self._in_graph:
            return boxes  # graph.py cuts it out, and there the operator checks it: `images` may be a symbol
        validation.batch_column(name, boxes, images)
        return boxes.detach() if boxes.requires_grad else boxes  # tensors.py cuts it out

    def forward(self, request: Request) -> torch.Tensor:
        return self._family(request).crops(*request, ())

    def vjp(self, request: Request) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[Any, Any]]]:
        *given, rule = request
        features, boxes, batch_indices = [_apart(tensor, self._wrapped) for tensor in given]
        at = (boxes, batch_indices, rule, ())

        def pullback(grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            in_graph = _is_recorded()  # which may have begun, or ended, after the call
            grad = _apart(grad_output, _check("grad_output", grad_output, in_graph))
            family = TensorAdapter(in_graph, wrapped=False)._family(request)
            return family.to_features(grad, ArraySpec.of(features), *at), family.to_boxes(grad, features, *at)

        return self._family(request).crops(features, *at), pullback

    def _family(self, request: Request) -> Family:
        if self._in_graph:
            compiling = torch.compiler.is_compiling()
            if private.transforms_active() or (not compiling and _has_tangent(*request[:2])):
                raise NotImplementedError(
                    "torch.func's transforms (grad, jvp, vmap, linearize...) cannot be recorded around cupy_roialign "
                    "by torch.compile or a tracer; call them outside of what is compiled, or use autograd in it"
                )
            return graph.FAMILY
        if self._wrapped and private.nested_forward_mode():
            # Of two tangents torch loses the outer one, where an autograd Function has a rule for forward mode.
            raise NotImplementedError(
                "forward mode within forward mode (jvp of jvp, jacfwd of jacfwd) would be wrong; take reverse mode "
                "for one of the two, as torch.func.hessian does"
            )
        return eager.EAGER


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
    """Whether torch records calls, or has a mode that sees them: then only an operator of torch.library will do."""
    return private.is_dynamo_compiling() or private.is_tracing() or private.dispatch_modes() > 0


def _is_transformed() -> bool:
    """Whether a tensor may have a tangent, or be wrapped by a transform of torch.func."""
    return private.in_dual_level() or private.transforms_active()


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
    """The memory of a tensor that is no more than that; None for any other."""
    if type(tensor) not in _DENSE or tensor.requires_grad or tensor.is_neg():
        return None
    try:
        return bridge.memory(tensor)
    except (BufferError, RuntimeError, TypeError):  # sparse, bfloat16...
        return None


_PLAIN = ArrayAdapter(cpu, give=bridge.tensor)
