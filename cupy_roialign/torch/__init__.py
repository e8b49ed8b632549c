"""PyTorch: the operators under the names and signatures that its users call today::

    from cupy_roialign.torch import CropAndResize, RoIAlign, CropAndResizeFunction
    from cupy_roialign.torch import crop_and_resize, roi_crop, roi_align

The names and signatures of the classes are those of RoIAlign.pytorch; `roi_align` has torchvision's signature.
Gradients of every order are there, with respect to the features and, unlike in both of these, to the boxes.

Features are (N, C, H, W). A tensor of (N, H, W, C), TensorFlow's order, goes in as ``x.permute(0, 3, 1, 2)``: nothing
is copied, and the crops lie channels-last in memory, so that ``crops.permute(0, 2, 3, 1)`` is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from cupy_roialign import operators, validation
from cupy_roialign.operators import Numbers, crop_and_resize, roi_crop
from cupy_roialign.torch import graph  # noqa: F401  (a graph that is loaded names its operators)

__all__ = ["CropAndResize", "CropAndResizeFunction", "RoIAlign", "crop_and_resize", "roi_align", "roi_crop"]


def roi_align(
    input: torch.Tensor,
    boxes: torch.Tensor | Sequence[torch.Tensor] | Numbers,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    batch_indices: torch.Tensor | Sequence[int] | int | None = None,
) -> torch.Tensor:
    """`cupy_roialign.roi_align` with the signature of ``torchvision.ops.roi_align``, and ``batch_indices``.

    Args:
        input: (N, C, H, W) features.
        boxes: (K, 5) of ``batch_index, x1, y1, x2, y2``, a list of N tensors (L_i, 4) of ``x1, y1, x2, y2``, or (K, 4)
            with ``batch_indices``.
        output_size, spatial_scale, sampling_ratio, aligned, batch_indices: see `cupy_roialign.roi_align`.

    Returns:
        (K, C, height, width) averages.

    >>> import torch
    >>> from cupy_roialign.torch import roi_align
    >>> columns = torch.arange(10.0).expand(1, 1, 10, 10)
    >>> roi_align(columns, [torch.tensor([[2.0, 2.0, 8.0, 8.0]])], 3, sampling_ratio=1, aligned=True)[0, 0, 0]
    tensor([2.5000, 4.5000, 6.5000])
    """
    names = ("input", "boxes", "batch_indices")
    options = (output_size, spatial_scale, sampling_ratio, aligned, batch_indices)
    return operators.named(operators.roi_align, names, input, boxes, *options)


class NotScripted(torch.nn.Module):
    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script for a module, and for those within one."""
        raise NotImplementedError(
            f"torch.jit.script cannot take {type(self).__module__}.{type(self).__name__}; use torch.jit.trace, "
            f"torch.compile or torch.export, which record it as an operator"
        )


class RoIAlign(NotScripted):
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
        options = ((self.crop_height, self.crop_width), self.extrapolation_value, self.transform_fpcoor)
        return operators.named(roi_crop, ("featuremap", "boxes", "box_ind"), featuremap, boxes, box_ind, *options)

    def extra_repr(self) -> str:
        return (
            f"crop_height={self.crop_height}, crop_width={self.crop_width}, "
            f"extrapolation_value={self.extrapolation_value}, transform_fpcoor={self.transform_fpcoor}"
        )


class CropAndResize(NotScripted):
    """RoIAlign.pytorch's module: `cupy_roialign.crop_and_resize` of normalized boxes ``y1, x1, y2, x2``."""

    def __init__(self, crop_height: int, crop_width: int, extrapolation_value: float = 0) -> None:
        super().__init__()
        validation.size("(crop_height, crop_width)", (crop_height, crop_width))
        self.crop_height = crop_height
        self.crop_width = crop_width
        self.extrapolation_value = extrapolation_value

    def forward(self, image: torch.Tensor, boxes: torch.Tensor, box_ind: torch.Tensor) -> torch.Tensor:
        """(K, C, crop_height, crop_width) crops of (N, C, H, W) images, for (K, 4) boxes and (K,) indices."""
        options = (self.crop_height, self.crop_width, self.extrapolation_value)
        return CropAndResizeFunction.apply(image, boxes, box_ind, *options)

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
        options = ((crop_height, crop_width), "bilinear", extrapolation_value)
        return operators.named(crop_and_resize, ("image", "boxes", "box_ind"), image, boxes, box_ind, *options)
