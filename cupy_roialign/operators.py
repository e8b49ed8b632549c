"""The public functions: docstring, check, rule, backend."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from cupy_roialign import dispatch, validation
from cupy_roialign.geometry import Dialect, Rule

Array = TypeVar("Array")
Answer = tuple[dispatch.Home, dispatch.Request]

# where y1, x1, y2, x2 stand in a row of boxes
_Y1_X1_Y2_X2 = (0, 1, 2, 3)
_X1_Y1_X2_Y2 = (1, 0, 3, 2)
_BATCH_X1_Y1_X2_Y2 = (2, 1, 4, 3)


def crop_and_resize(
    image: Array,
    boxes: Array,
    box_indices: Array,
    crop_size: int | Sequence[int],
    method: str = "bilinear",
    extrapolation_value: float = 0.0,
) -> Array:
    """Cut boxes out of images and resize them to one size, corner to corner.

    Equivalent to ``tf.image.crop_and_resize`` and to RoIAlign.pytorch's ``CropAndResize``. Images are (N, C, H, W)
    by the order of their axes, whatever their order in memory: of a (N, H, W, C) array x pass
    ``x.transpose(0, 3, 1, 2)``, of a tensor ``x.permute(0, 3, 1, 2)``. That is a view; it is not copied, and the crops
    are channels-last in memory as well.

    A box is given in units of the image's side less one pixel: 0 is the centre of the first pixel and 1 that of
    the last. With H = 11 and a crop of height 3, the box y1 = 0.1, y2 = 0.5 samples the rows 1, 3 and 5. A crop of
    height 1 samples the middle of its box. A flipped box (y1 > y2) gives a flipped crop.

    Args:
        image: (N, C, H, W); float16, bfloat16, float32, float64, integer or bool.
        boxes: (K, 4) of ``y1, x1, y2, x2``, float32 or float64; 16-bit floats are computed with in float32.
        box_indices: (K,) integers in [0, N): the image of each box.
        crop_size: (height, width) of the crops, or an int for both.
        method: ``"bilinear"``, or ``"nearest"``: the pixel nearest to a sample, the one below or right of a tie.
        extrapolation_value: the value of samples outside of the image.

    Returns:
        (K, C, height, width) crops in the image's dtype (float32 for integers and bool), channels-last in memory if the
        image is. A box with a coordinate that is not finite gives NaN.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, dtype, shape or value.
        IndexError: a box index is outside of [0, N); the message names the first such box.

    Gradients (``vjp``, autograd) are those of the crops as they are computed. To the boxes of ``"nearest"`` that
    is 0, their true derivative, where TensorFlow returns that of bilinear interpolation. Bilinear interpolation
    has a kink where a sample sits on a pixel's centre: such a sample adds 0 along that axis, as in TensorFlow. That
    a sample leaves the image is a jump, of which no gradient tells.

    >>> import numpy as np, cupy_roialign as cr
    >>> image = np.arange(121, dtype=np.float32).reshape(1, 1, 11, 11)
    >>> boxes = np.array([[0.1, 0.0, 0.5, 1.0]], np.float32)
    >>> cr.crop_and_resize(image, boxes, np.array([0]), 3)[0, 0]
    array([[11., 16., 21.],
           [33., 38., 43.],
           [55., 60., 65.]], dtype=float32)
    """
    home, request = _crop_and_resize(image, boxes, box_indices, crop_size, method, extrapolation_value)
    return home.forward(request)


def _crop_and_resize(
    image: Any, boxes: Any, box_indices: Any, crop_size: Any, method: Any, extrapolation_value: Any, kept: bool = False
) -> Answer:
    home, taken = dispatch.home(kept, image=image, boxes=boxes, box_indices=box_indices)
    image, boxes, box_indices = taken.values()
    validation.features("image", image)
    validation.boxes("boxes", boxes)
    validation.batch_indices("box_indices", box_indices, "boxes", boxes.shape[0])
    rule = Rule(
        Dialect.CROP_AND_RESIZE,
        validation.size("crop_size", crop_size),
        _Y1_X1_Y2_X2,
        nearest=validation.method("method", method) == "nearest",
        extrapolation_value=validation.number("extrapolation_value", extrapolation_value),
    )
    return home, dispatch.Request(image, boxes, box_indices, rule)


def roi_crop(
    features: Array,
    boxes: Array,
    box_indices: Array,
    crop_size: int | Sequence[int],
    extrapolation_value: float = 0.0,
    transform_fpcoor: bool = True,
) -> Array:
    """Crop boxes given in pixels, one bilinear sample for each output pixel.

    Equivalent to RoIAlign.pytorch's ``RoIAlign``. With ``transform_fpcoor`` a box covers pixels from edge to edge,
    pixel 0 reaching from 0 to 1, and each of its bins is sampled in the middle: for x1 = 2, x2 = 8 and a crop of
    width 3 these are the middles 3, 5 and 7, which lie at columns 2.5, 4.5 and 6.5 counted between pixel centres.
    Without it a box reaches from pixel centre to pixel centre, and is sampled corner to corner: columns 2, 5, 8.

    Args:
        features: (N, C, H, W); float16, bfloat16, float32, float64, integer or bool.
        boxes: (K, 4) of ``x1, y1, x2, y2`` in pixels of the features, float32 or float64; 16-bit floats are
            computed with in float32.
        box_indices: (K,) integers in [0, N): the image of each box.
        crop_size: (height, width) of the crops, or an int for both.
        extrapolation_value: the value of samples outside of the image, that is beyond its outermost pixel centres.
        transform_fpcoor: sample the middles of bins rather than corner to corner.

    Returns:
        (K, C, height, width) crops in the features' dtype (float32 for integers and bool), channels-last in memory if
        they are. A box with a coordinate that is not finite gives NaN.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, dtype, shape or value.
        IndexError: a box index is outside of [0, N); the message names the first such box.

    Gradients (``vjp``, autograd) are those of the crops as they are computed. Where a sample sits on a pixel's
    centre, a kink of the interpolation, the slope toward larger coordinates is taken, and at the last pixel the one
    toward smaller. That a sample leaves the image is a jump, of which no gradient tells.

    >>> import numpy as np, cupy_roialign as cr
    >>> columns = np.tile(np.arange(10, dtype=np.float32), (1, 1, 10, 1))
    >>> boxes = np.array([[2, 2, 8, 8]], np.float32)
    >>> cr.roi_crop(columns, boxes, np.array([0]), 3)[0, 0, 0]
    array([2.5, 4.5, 6.5], dtype=float32)
    >>> cr.roi_crop(columns, boxes, np.array([0]), 3, transform_fpcoor=False)[0, 0, 0]
    array([2., 5., 8.], dtype=float32)
    """
    home, request = _roi_crop(features, boxes, box_indices, crop_size, extrapolation_value, transform_fpcoor)
    return home.forward(request)


def _roi_crop(
    features: Any,
    boxes: Any,
    box_indices: Any,
    crop_size: Any,
    extrapolation_value: Any,
    transform_fpcoor: Any,
    kept: bool = False,
) -> Answer:
    home, taken = dispatch.home(kept, features=features, boxes=boxes, box_indices=box_indices)
    features, boxes, box_indices = taken.values()
    validation.features("features", features)
    validation.boxes("boxes", boxes)
    validation.batch_indices("box_indices", box_indices, "boxes", boxes.shape[0])
    centers = validation.flag("transform_fpcoor", transform_fpcoor)
    rule = Rule(
        Dialect.ROI_CROP_CENTERS if centers else Dialect.ROI_CROP_CORNERS,
        validation.size("crop_size", crop_size),
        _X1_Y1_X2_Y2,
        extrapolation_value=validation.number("extrapolation_value", extrapolation_value),
    )
    return home, dispatch.Request(features, boxes, box_indices, rule)


def roi_align(
    features: Array,
    boxes: Array | Sequence[Array],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    batch_indices: Array | None = None,
) -> Array:
    """Average bilinear samples in each bin of a box (Mask R-CNN, https://arxiv.org/abs/1703.06870).

    Equivalent to ``torchvision.ops.roi_align``, detectron2's ``ROIAlign``, and ONNX ``RoiAlign`` with mode ``avg``
    (``half_pixel`` is aligned=True, ``output_half_pixel`` aligned=False).

    A box is scaled by ``spatial_scale`` and divided into bins; each bin takes ``sampling_ratio`` samples along
    each axis, evenly spaced. With ``aligned`` pixel 0 reaches from 0 to 1 and has its centre at 0.5: for
    x1 = 2, x2 = 8, scale 1 and three bins of one sample, the samples lie at 3, 5 and 7, which are columns 2.5, 4.5
    and 6.5 counted between pixel centres. Without it (the original, half a pixel off) these are columns 3, 5 and
    7, and a box is at least one pixel wide and high.

    Args:
        features: (N, C, H, W); float16, bfloat16, float32, float64, integer or bool.
        boxes: ``x1, y1, x2, y2`` in pixels of the image, before scaling; float32 or float64 (16-bit floats are
            computed with in float32). One of
            (K, 5), with the batch index in the first column;
            a list of N arrays (L_i, 4), the boxes of each image;
            (K, 4), with ``batch_indices``.
        output_size: (height, width) in bins, or an int for both.
        spatial_scale: size of the features over that of the image, 1/16 for a stride of 16.
        sampling_ratio: samples a bin along each axis, at most 4096; 0 or negative: as many as a bin has pixels,
            rounded up (at most 2**23; 2**52 where boxes or features are float64).
        aligned: whether pixel coordinates are shifted by half a pixel, as they should.
        batch_indices: (K,) integers in [0, N): the image of each box, for (K, 4) boxes.

    Returns:
        (K, C, height, width) averages in the features' dtype (float32 for integers and bool), channels-last in memory
        if they are. A sample more than one pixel outside of the outermost pixel centres counts as 0; nearer ones take
        the value at the border. A box with a coordinate that is not finite gives NaN.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, dtype, shape or value.
        IndexError: a batch index is not a whole number in [0, N), or in a column of boxes is off one by more than
            1/64; the message names the first such box.

    Gradients (``vjp``, autograd) are those of the averages as they are computed, with the number of samples held
    fixed. Where a sample sits on a pixel's centre the slope toward larger coordinates is taken; in the band around
    the image, and where a box is widened to one pixel, there is none. The gradient to (K, 5) boxes has zeros in
    its first column; for a list of boxes it is a list.

    >>> import numpy as np, cupy_roialign as cr
    >>> columns = np.tile(np.arange(10, dtype=np.float32), (1, 1, 10, 1))
    >>> boxes = np.array([[0, 2, 2, 8, 8]], np.float32)
    >>> cr.roi_align(columns, boxes, 3, sampling_ratio=1, aligned=True)[0, 0, 0]
    array([2.5, 4.5, 6.5], dtype=float32)
    >>> cr.roi_align(columns, boxes, 3, sampling_ratio=1)[0, 0, 0]
    array([3., 5., 7.], dtype=float32)
    """
    home, request = _roi_align(features, boxes, output_size, spatial_scale, sampling_ratio, aligned, batch_indices)
    return home.forward(request)


def _roi_align(
    features: Any,
    boxes: Any,
    output_size: Any,
    spatial_scale: Any,
    sampling_ratio: Any,
    aligned: Any,
    batch_indices: Any,
    kept: bool = False,
) -> Answer:
    listed = isinstance(boxes, (list, tuple))
    named = {f"boxes[{i}]": part for i, part in enumerate(boxes)} if listed else {"boxes": boxes}
    indexed = {} if batch_indices is None else {"batch_indices": batch_indices}
    home, taken = dispatch.home(kept, features=features, **named, **indexed)
    features, batch_indices = taken["features"], taken.get("batch_indices")
    parts = {name: taken[name] for name in named}
    validation.features("features", features)
    images = features.shape[0]
    for name, part in parts.items():
        validation.boxes(name, part, (4,) if listed else (4, 5))
    columns = _X1_Y1_X2_Y2
    if listed:
        if batch_indices is not None:
            raise ValueError("batch_indices must not be given with a list of boxes, whose order tells the images")
        if len(parts) != images:
            raise ValueError(
                f"boxes must be a list of N = {images} arrays, one for each image of features; got {len(parts)}"
            )
        boxes, batch_indices = home.join([*parts.values()], features)
    elif (boxes := parts["boxes"]).shape[1] == 5:
        if batch_indices is not None:
            raise ValueError("batch_indices must not be given with (K, 5) boxes, whose first column holds them")
        validation.batch_column("boxes", boxes, images)
        columns, batch_indices = _BATCH_X1_Y1_X2_Y2, home.column(boxes)
    elif batch_indices is None:
        raise ValueError(
            f"boxes of shape {tuple(boxes.shape)} need batch_indices, a (K,) integer array, the image of each box; or "
            f"pass (K, 5) boxes with the batch index first, or a list with one (L_i, 4) array for each image"
        )
    else:
        validation.batch_indices("batch_indices", batch_indices, "boxes", boxes.shape[0])
    rule = Rule(
        Dialect.ROI_ALIGN,
        validation.size("output_size", output_size),
        columns,
        spatial_scale=validation.spatial_scale("spatial_scale", spatial_scale),
        sampling_ratio=validation.sampling_ratio("sampling_ratio", sampling_ratio),
        aligned=validation.flag("aligned", aligned),
    )
    return home, dispatch.Request(features, boxes, batch_indices, rule)


def vjp(operator: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
    """The output of an operator, and the function that pulls a gradient back through it.

    Args:
        operator: ``crop_and_resize``, ``roi_crop`` or ``roi_align``.
        *args: its arguments,
        **kwargs: by place and by name.

    Returns:
        ``output, pullback``. ``pullback(grad_output)``, with the gradient of a loss to the output in the output's
        shape, returns ``(grad_features, grad_boxes)``: the first like the features (float32 for integers and bool),
        the second like the boxes; a list, of the boxes' common dtype, where these are. A box with a coordinate that
        is not finite adds nothing to the first and has NaN in the second. The pullback can be called any number of
        times; it reads the arrays that the operator was called with. It is no part of an autograd graph.

    >>> import numpy as np, cupy_roialign as cr
    >>> features = np.tile(np.arange(10, dtype=np.float32), (1, 1, 10, 1))
    >>> boxes = np.array([[0, 2, 2, 8, 8]], np.float32)
    >>> output, pullback = cr.vjp(cr.roi_align, features, boxes, 3, sampling_ratio=1, aligned=True)
    >>> grad_features, grad_boxes = pullback(np.ones_like(output))
    >>> grad_boxes  # the columns hold their own number: moving x1 or x2 moves the nine values by half as much
    array([[0. , 4.5, 0. , 4.5, 0. ]], dtype=float32)
    """
    if not callable(operator) or operator not in _REQUESTS:
        names = ", ".join(known.__name__ for known in _REQUESTS)
        got = getattr(operator, "__name__", None) or type(operator).__name__
        raise TypeError(
            f"operator must be one of {names} of this package; got {got}; pass the operator itself, and its arguments "
            f"behind it: vjp(roi_align, features, boxes, ...)"
        )
    bound = inspect.signature(operator).bind(*args, **kwargs)
    bound.apply_defaults()
    home, request = _REQUESTS[operator](*bound.arguments.values(), kept=True)
    features, boxes = (bound.arguments[name] for name in (next(iter(bound.arguments)), "boxes"))
    listed = isinstance(boxes, (list, tuple))
    ends = [0]
    for part in boxes if listed else []:
        ends.append(ends[-1] + part.shape[0])
    output, pull = home.vjp(request)

    def pullback(grad_output: Any) -> tuple[Any, Any]:
        dispatch.together({"features": features, "grad_output": grad_output})
        validation.grad_output("grad_output", grad_output, tuple(output.shape))
        grad_features, grad_boxes = pull(grad_output)
        return grad_features, [grad_boxes[a:b] for a, b in itertools.pairwise(ends)] if listed else grad_boxes

    return output, pullback


_REQUESTS: dict[Callable[..., Any], Callable[..., Answer]] = {
    crop_and_resize: _crop_and_resize,
    roi_crop: _roi_crop,
    roi_align: _roi_align,
}
