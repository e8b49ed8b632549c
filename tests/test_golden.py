"""The peers' own outputs and gradients, stored in tests/golden; boxes whose samples sit on an edge included."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

import cupy_roialign as cr
from tests import tolerance

GOLDEN = Path(__file__).parent / "golden"
COUNTS = {"seed_roi_align": 48, "tensorflow_crop_and_resize": 40, "torchvision_roi_align": 134, "onnx_roialign": 22}


@functools.cache
def load(name):
    with np.load(GOLDEN / f"{name}.npz") as stored:
        cases = {}
        for key in stored.files:
            case, field = key.split("/")
            value = stored[key]
            cases.setdefault(case, {})[field] = json.loads(str(value)) if field == "attrs" else value
    if name == "onnx_roialign":  # the max operator is another one
        cases = {case: fields for case, fields in cases.items() if fields["attrs"]["mode"] == "avg"}
    return cases


def every_case(name):
    return pytest.mark.parametrize("fields", [pytest.param(f, id=c) for c, f in load(name).items()])


@pytest.mark.parametrize("name", COUNTS)
def test_no_case_is_missing(name):
    assert len(load(name)) == COUNTS[name]


@every_case("seed_roi_align")
def test_seed(fields, backend):
    attrs = fields["attrs"]
    arguments = (fields["input"], fields["boxes"], fields["box_indices"], attrs["crop"])
    options = {"extrapolation_value": attrs["extrapolation_value"]}
    operator = cr.crop_and_resize
    if attrs["op"] != "crop_and_resize":
        operator = cr.roi_crop
        options["transform_fpcoor"] = attrs["transform_fpcoor"]
    output, grad_input, _ = backend.vjp(operator, *arguments, **options, cotangent=fields["cotangent"])
    tolerance.assert_close(output, fields["output"], tolerance.OUTPUT["float32"])
    tolerance.assert_close(grad_input, fields["grad_input"], tolerance.GRADIENT["float32"])


@every_case("tensorflow_crop_and_resize")
def test_tensorflow(fields, backend):
    attrs = fields["attrs"]
    image = fields["image"].transpose(0, 3, 1, 2)
    cotangent = fields["cotangent"].transpose(0, 3, 1, 2)
    output, grad_image, grad_boxes = backend.vjp(
        cr.crop_and_resize,
        image,
        fields["boxes"],
        fields["box_indices"],
        attrs["crop_size"],
        attrs["method"],
        attrs["extrapolation_value"],
        cotangent=cotangent,
    )
    # TensorFlow's output is float32 whatever the image; ours is in the image's dtype.
    dtype = "float16" if image.dtype == np.float16 else "float32"
    tolerance.assert_close(output.transpose(0, 2, 3, 1), fields["output"], tolerance.OUTPUT[dtype])
    if "grad_image" in fields:
        tolerance.assert_close(grad_image.transpose(0, 2, 3, 1), fields["grad_image"], tolerance.GRADIENT[dtype])
    if attrs["method"] == "nearest":
        np.testing.assert_array_equal(output.transpose(0, 2, 3, 1).astype(np.float32), fields["output"])
        np.testing.assert_array_equal(grad_boxes, 0)
    else:
        # On the others TensorFlow's backward places a sample elsewhere than its forward does.
        same = ~fields["near_edge_grad_boxes"]
        tolerance.assert_close(grad_boxes[same], fields["grad_boxes"][same], tolerance.GRADIENT[dtype])


@every_case("torchvision_roi_align")
def test_torchvision(fields, backend):
    attrs = fields["attrs"]
    output, grad_input, _ = backend.vjp(
        cr.roi_align,
        fields["input"],
        fields["rois"],
        attrs["output_size"],
        attrs["spatial_scale"],
        attrs["sampling_ratio"],
        attrs["aligned"],
        cotangent=fields.get("cotangent"),
    )
    if "output" not in fields:  # torchvision raises for these flipped boxes, or is stored as not raising
        assert np.isfinite(output).all()
        return
    dtype = str(fields["output"].dtype)
    tolerance.assert_close(output, fields["output"], tolerance.OUTPUT[dtype])
    tolerance.assert_close(grad_input, fields["grad_input"], tolerance.GRADIENT[dtype])


@every_case("onnx_roialign")
def test_onnx(fields, backend):
    attrs = fields["attrs"]
    output = backend(
        cr.roi_align,
        fields["input"],
        fields["rois"],
        fields["output"].shape[2:],
        attrs["spatial_scale"],
        attrs["sampling_ratio"],
        attrs["coordinate_transformation_mode"] == "half_pixel",
        batch_indices=fields["batch_indices"],
    )
    # The node tests of ONNX print their expected values with 4 decimals.
    rounded = "node" in attrs["peer"]
    tolerance.assert_close(output, fields["output"], 1e-4 if rounded else tolerance.OUTPUT[str(output.dtype)])
