"""Tensors: autograd Functions around the NumPy backend, with which they share memory over DLPack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils.dlpack

from cupy_roialign import arrays, numpy_backend
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
        lengths = torch.tensor([len(part) for part in boxes], dtype=torch.int64, device=like.device)
        joined = torch.cat(boxes) if boxes else torch.zeros((0, 4), device=like.device)
        return joined, torch.repeat_interleave(lengths)

    def column(self, boxes: torch.Tensor) -> torch.Tensor:
        return boxes.detach()[:, 0]

    def forward(self, request: Request) -> torch.Tensor:
        return _apply(_RoI, *request)

    def vjp(self, request: Request) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[Any, Any]]]:
        features, boxes, batch_indices, rule = request

        def pullback(grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (
                _feature_gradient(grad_output, _like(features), boxes, batch_indices, rule),
                _box_gradient(grad_output, features, boxes, batch_indices, rule),
            )

        return _forward(features, boxes, batch_indices, rule), pullback


def _apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    output: torch.Tensor = function.apply(*args)  # type: ignore[no-untyped-call]
    return output


class _RoI(torch.autograd.Function):
    """The crops."""

    @staticmethod
    def forward(features: torch.Tensor, boxes: torch.Tensor, batch_indices: torch.Tensor, rule: Rule) -> torch.Tensor:
        return _forward(features, boxes, batch_indices, rule)

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
        return _feature_gradient(grad_output, like, boxes, batch_indices, rule)

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
        return _box_gradient(grad_output, features, boxes, batch_indices, rule)

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


def _forward(features: torch.Tensor, boxes: torch.Tensor, batch_indices: torch.Tensor, rule: Rule) -> torch.Tensor:
    crops = numpy_backend.forward(_array(features), _array(boxes), _array(batch_indices), rule)
    return _tensor(crops, arrays.output_name(arrays.dtype_name(features)))


def _feature_gradient(
    grad_output: torch.Tensor, like: arrays.Like, boxes: torch.Tensor, batch_indices: torch.Tensor, rule: Rule
) -> torch.Tensor:
    wide = like._replace(dtype="float32") if like.dtype == "bfloat16" else like
    gradient = numpy_backend.feature_gradient(_array(grad_output), wide, _array(boxes), _array(batch_indices), rule)
    return _tensor(gradient, arrays.output_name(like.dtype))


def _box_gradient(
    grad_output: torch.Tensor, features: torch.Tensor, boxes: torch.Tensor, batch_indices: torch.Tensor, rule: Rule
) -> torch.Tensor:
    gradient = numpy_backend.box_gradient(
        _array(grad_output), _array(features), _array(boxes), _array(batch_indices), rule
    )
    return _tensor(gradient, arrays.dtype_name(boxes))


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory as a NumPy array, which has no bfloat16: such a tensor is copied to float32."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return np.from_dlpack(tensor.resolve_neg())


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.utils.dlpack.from_dlpack(array).to(getattr(torch, dtype))
