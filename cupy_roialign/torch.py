"""PyTorch: the operators as autograd Functions and Modules, over DLPack.

    from cupy_roialign.torch import CropAndResize, RoIAlign, CropAndResizeFunction
    from cupy_roialign.torch import crop_and_resize, roi_crop, roi_align

The names and signatures of the classes are those of RoIAlign.pytorch, that of `roi_align` is torchvision's.
Gradients reach the features and, unlike in both of these, the boxes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from cupy_roialign import arrays, numpy_backend, operators, validation
from cupy_roialign.dispatch import Request
from cupy_roialign.geometry import Rule
from cupy_roialign.operators import crop_and_resize, roi_crop

__all__ = ["CropAndResize", "CropAndResizeFunction", "RoIAlign", "crop_and_resize", "roi_align", "roi_crop"]


def roi_align(
    input: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> torch.Tensor:
    """`cupy_roialign.roi_align` with the signature of ``torchvision.ops.roi_align``.

    Args:
        input: (N, C, H, W) features.
        boxes: (K, 5) of ``batch_index, x1, y1, x2, y2``, or a list of N tensors (L_i, 4) of ``x1, y1, x2, y2``.
        output_size, spatial_scale, sampling_ratio, aligned: see `cupy_roialign.roi_align`.

    Returns:
        (K, C, height, width) averages.

    >>> import torch
    >>> from cupy_roialign.torch import roi_align
    >>> columns = torch.arange(10.0).expand(1, 1, 10, 10)
    >>> roi_align(columns, [torch.tensor([[2.0, 2.0, 8.0, 8.0]])], 3, sampling_ratio=1, aligned=True)[0, 0, 0]
    tensor([2.5000, 4.5000, 6.5000])
    """
    return operators.roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)


class RoIAlign(torch.nn.Module):
    """RoIAlign.pytorch's module: `cupy_roialign.roi_crop` of boxes ``x1, y1, x2, y2`` in pixels of the features.

    Not torchvision's module of that name, whose function is `roi_align` here.

    >>> import torch
    >>> from cupy_roialign.torch import RoIAlign
    >>> columns = torch.arange(10.0).expand(1, 1, 10, 10)
    >>> RoIAlign(3, 3)(columns, torch.tensor([[2.0, 2.0, 8.0, 8.0]]), torch.tensor([0]))[0, 0, 0]
    tensor([2.5000, 4.5000, 6.5000])
    """

    def __init__(
        self, crop_height: int, crop_width: int, extrapolation_value: float = 0, transform_fpcoor: bool = True
    ) -> None:
        super().__init__()
        validation.size("(crop_height, crop_width)", (crop_height, crop_width))
        self.crop_height = crop_height
        self.crop_width = crop_width
        self.extrapolation_value = extrapolation_value
        self.transform_fpcoor = transform_fpcoor

    def forward(self, featuremap: torch.Tensor, boxes: torch.Tensor, box_ind: torch.Tensor) -> torch.Tensor:
        """(K, C, crop_height, crop_width) crops of (N, C, H, W) features, for (K, 4) boxes and (K,) indices."""
        size = (self.crop_height, self.crop_width)
        return roi_crop(featuremap, boxes, box_ind, size, self.extrapolation_value, self.transform_fpcoor)

    def extra_repr(self) -> str:
        return (
            f"crop_height={self.crop_height}, crop_width={self.crop_width}, "
            f"extrapolation_value={self.extrapolation_value}, transform_fpcoor={self.transform_fpcoor}"
        )


class CropAndResize(torch.nn.Module):
    """RoIAlign.pytorch's module: `cupy_roialign.crop_and_resize` of normalised boxes ``y1, x1, y2, x2``."""

    def __init__(self, crop_height: int, crop_width: int, extrapolation_value: float = 0) -> None:
        super().__init__()
        validation.size("(crop_height, crop_width)", (crop_height, crop_width))
        self.crop_height = crop_height
        self.crop_width = crop_width
        self.extrapolation_value = extrapolation_value

    def forward(self, image: torch.Tensor, boxes: torch.Tensor, box_ind: torch.Tensor) -> torch.Tensor:
        """(K, C, crop_height, crop_width) crops of (N, C, H, W) images, for (K, 4) boxes and (K,) indices."""
        size = (self.crop_height, self.crop_width)
        return crop_and_resize(image, boxes, box_ind, size, extrapolation_value=self.extrapolation_value)

    def extra_repr(self) -> str:
        return (
            f"crop_height={self.crop_height}, crop_width={self.crop_width}, "
            f"extrapolation_value={self.extrapolation_value}"
        )


class CropAndResizeFunction:
    """RoIAlign.pytorch's function, called as its versions for newer and for older PyTorch are.

    ``CropAndResizeFunction.apply(image, boxes, box_ind, crop_height, crop_width, extrapolation_value)``, or
    ``CropAndResizeFunction(crop_height, crop_width, extrapolation_value)(image, boxes, box_ind)``.
    """

    def __init__(self, crop_height: int, crop_width: int, extrapolation_value: float = 0) -> None:
        self._options = (crop_height, crop_width, extrapolation_value)

    def __call__(self, image: torch.Tensor, boxes: torch.Tensor, box_ind: torch.Tensor) -> torch.Tensor:
        return self.apply(image, boxes, box_ind, *self._options)

    @staticmethod
    def apply(
        image: torch.Tensor,
        boxes: torch.Tensor,
        box_ind: torch.Tensor,
        crop_height: int,
        crop_width: int,
        extrapolation_value: float = 0,
    ) -> torch.Tensor:
        return crop_and_resize(
            image, boxes, box_ind, (crop_height, crop_width), extrapolation_value=extrapolation_value
        )


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
