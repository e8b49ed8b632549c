"""Tensors: autograd Functions around the backends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cupy_roialign import arrays, tensors
from cupy_roialign.geometry import Rule

if TYPE_CHECKING:
    from cupy_roialign.dispatch import Request


class TensorHome:
    """Where tensors are computed on: see `dispatch.Home`."""

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor whose elements are not in memory would be read as what happens to lie at address 0, or anywhere."""
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout)
            raise TypeError(
                f"{name} must be a dense tensor; got one that is {kind}; use its to_dense or to_padded_tensor"
            )
        if not _has_memory(tensor):
            raise TypeError(
                f"{name} must be a tensor with elements in memory; got a {type(tensor).__name__} without (a fake, "
                f"masked, or otherwise wrapped tensor)"
            )

    def join(self, boxes: list[torch.Tensor], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not boxes:
            return torch.zeros((0, 4), device=like.device), torch.zeros(0, dtype=torch.int64, device=like.device)
        # One by one: on a GPU torch.repeat_interleave waits, and a copy from the host's memory does, too.
        indices = [torch.full((len(part),), i, dtype=torch.int64, device=like.device) for i, part in enumerate(boxes)]
        return torch.cat(boxes), torch.cat(indices)

    def column(self, boxes: torch.Tensor) -> torch.Tensor:
        return boxes.detach()[:, 0]

    def forward(self, request: Request) -> torch.Tensor:
        return _apply(_RoI, *request)

    def vjp(self, request: Request) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[Any, Any]]]:
        features, boxes, batch_indices, rule = request

        def pullback(grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (
                tensors.feature_gradient(grad_output, _like(features), boxes, batch_indices, rule),
                tensors.box_gradient(grad_output, features, boxes, batch_indices, rule),
            )

        return tensors.forward(features, boxes, batch_indices, rule), pullback


def _apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    output: torch.Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return output


class _RoI(torch.autograd.Function):
    """The crops."""

    @staticmethod
    def forward(features: torch.Tensor, boxes: torch.Tensor, batch_indices: torch.Tensor, rule: Rule) -> torch.Tensor:
        return tensors.forward(features, boxes, batch_indices, rule)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        features, boxes, batch_indices, ctx.rule = inputs
        ctx.like = _like(features)
        # The features take part in the gradient to the boxes only.
        ctx.save_for_backward(features if ctx.needs_input_grad[1] else None, boxes, batch_indices)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, boxes, batch_indices = ctx.saved_tensors
        to_features = to_boxes = None
        if ctx.needs_input_grad[0]:
            to_features = _apply(_FeatureGradient, grad_output, boxes, batch_indices, ctx.rule, ctx.like)
        if ctx.needs_input_grad[1]:
            to_boxes = _apply(_BoxGradient, grad_output, features, boxes, batch_indices, ctx.rule)
        return to_features, to_boxes, None, None


class _FeatureGradient(torch.autograd.Function):
    """The gradient to the features. It is linear in the gradient to the crops, so its own gradient is a crop again."""

    @staticmethod
    def forward(
        grad_output: torch.Tensor, boxes: torch.Tensor, batch_indices: torch.Tensor, rule: Rule, like: arrays.Like
    ) -> torch.Tensor:
        return tensors.feature_gradient(grad_output, like, boxes, batch_indices, rule)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        grad_output, boxes, batch_indices, rule, _ = inputs
        ctx.rule = dataclasses.replace(rule, extrapolation_value=0.0)  # a constant, gone after the first derivative
        ctx.save_for_backward(grad_output if ctx.needs_input_grad[1] else None, boxes, batch_indices)

    @staticmethod
    def backward(ctx: Any, direction: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_output, boxes, batch_indices = ctx.saved_tensors
        to_grad = to_boxes = None
        if ctx.needs_input_grad[0]:
            to_grad = _apply(_RoI, direction, boxes, batch_indices, ctx.rule)
        if ctx.needs_input_grad[1]:
            to_boxes = _apply(_BoxGradient, grad_output, direction, boxes, batch_indices, ctx.rule)
        return to_grad, to_boxes, None, None, None


class _BoxGradient(torch.autograd.Function):
    """The gradient to the boxes, which has no derivative of its own here."""

    @staticmethod
    def forward(
        grad_output: torch.Tensor, features: torch.Tensor, boxes: torch.Tensor, batch_indices: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        return tensors.box_gradient(grad_output, features, boxes, batch_indices, rule)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, direction: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise RuntimeError(
            "cupy_roialign: the gradient to the boxes cannot be differentiated again; derivatives of any order are "
            "there with respect to the features, with boxes that do not require grad (boxes.detach())"
        )


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        if tensor.untyped_storage().device.type == "meta":
            return False
        return tensor.numel() == 0 or tensor.data_ptr() != 0
    except RuntimeError:  # within a transform of torch.func, which unwraps it later
        return True


def _like(features: torch.Tensor) -> arrays.Like:
    return arrays.Like(tuple(features.shape), features.stride(), arrays.dtype_name(features))
