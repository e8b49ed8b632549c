"""Export to ONNX, run by onnxruntime."""

import logging

import pytest

import cupy_roialign as cr
from tests import tolerance

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
# the exporter's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name")

BOXES = torch.tensor([[1.31, 0.72, 8.25, 6.18], [2.2, 1.6, 4.4, 5.9], [-3.3, -2.2, 14.1, 10.2]])
INDICES = torch.tensor([0, 1, 1])

OPERATORS = {
    "roi_align": lambda f, b, i: cr.roi_align(f, b, (3, 4), 0.9, 2, True, batch_indices=i),
    "roi_align, legacy": lambda f, b, i: cr.roi_align(f, b, (3, 4), 0.9, batch_indices=i),
    "roi_align, rows": lambda f, b, i: cr.roi_align(f, torch.cat([i[:, None].to(b.dtype), b], 1), 3, 0.9, 0, True),
    "roi_crop": lambda f, b, i: cr.roi_crop(f, b, i, (3, 4), 1.5),
    "roi_crop, corners": lambda f, b, i: cr.roi_crop(f, b, i, (3, 1), 1.5, False),
    "crop_and_resize": lambda f, b, i: cr.crop_and_resize(f, b / 8, i, (3, 4), extrapolation_value=-1.0),
    "crop_and_resize, one bin": lambda f, b, i: cr.crop_and_resize(f, b / 8, i, 1),
}


class Model(torch.nn.Module):
    """Features that something was done to before, and what some operators make of them."""

    def __init__(self, *operators):
        super().__init__()
        self.operators = operators

    def forward(self, features, boxes, indices):
        return tuple(operator(features * 2, boxes, indices) for operator in self.operators)


def export(operators, features, boxes=BOXES):
    import cupy_roialign.onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is not installed
    count = torch.export.Dim("count")
    return torch.onnx.export(
        Model(*operators).eval(),
        (features, boxes, INDICES),
        dynamo=True,
        verbose=False,
        custom_translation_table=cupy_roialign.onnx.translations(),
        dynamic_shapes={"features": None, "boxes": {0: count}, "indices": {0: count}},
    )


def features(dtype=torch.float32):
    return (torch.rand(2, 3, 8, 11, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)


DTYPES = [(torch.float32, torch.float32), (torch.uint8, torch.float32), (torch.float16, torch.float32)]
DTYPES += [(torch.float32, torch.float16), (torch.float64, torch.float32), (torch.float32, torch.float64)]


@pytest.mark.parametrize(("dtype", "box_dtype"), DTYPES, ids=str)
def test_onnxruntime_gives_the_same(dtype, box_dtype, tmp_path):
    """All operators in one model: most of the time goes into the preparations of an export."""
    program = export(OPERATORS.values(), features(dtype), BOXES.to(box_dtype))
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for boxes, indices in ((BOXES, INDICES), (BOXES.flip(0).repeat(3, 1), INDICES.repeat(3))):
        boxes = boxes.to(box_dtype)
        values = (features(dtype).numpy(), boxes.numpy(), indices.numpy())
        found = session.run(None, dict(zip([i.name for i in session.get_inputs()], values, strict=True)))
        for actual, operator in zip(found, OPERATORS.values(), strict=True):
            (expected,) = Model(operator)(features(dtype), boxes, indices)
            assert actual.dtype == expected.numpy().dtype
            tolerance.assert_close(actual, expected.numpy(), 1e-3 if dtype == torch.float16 else 1e-5)
    nodes = [node for node in program.model_proto.graph.node if node.op_type == "RoiAlign"]
    for name, node in zip(OPERATORS, nodes, strict=True):
        mode = {a.name: a.s for a in node.attribute}.get("coordinate_transformation_mode", b"half_pixel")
        assert mode == {"roi_align": b"half_pixel", "roi_align, legacy": b"output_half_pixel"}.get(name, mode)


def test_what_onnx_cannot_say():
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        export([lambda f, b, i: cr.crop_and_resize(f, b, i, 3, "nearest")], features())
    text, error = "", caught.value
    while error is not None:
        text, error = f"{text} {error}", error.__cause__
    assert "ONNX's RoiAlign cannot take the nearest pixel" in text
