"""The drop-in for torchvision.ops. Where torchvision itself is missing, a stand-in has its modules and imports."""

import importlib
import inspect
import re
import subprocess
import sys

import pytest

from tests import tolerance

torch = pytest.importorskip("torch")
ops = pytest.importorskip("cupy_roialign.torchvision")

FEATURES = torch.rand(2, 3, 8, 11, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[0, 1.31, 0.72, 8.25, 6.18], [1, 2.2, 1.6, 4.4, 5.9]])

STAND_IN = {
    "__init__.py": "",
    "ops/__init__.py": "from .roi_align import roi_align, RoIAlign\nfrom .poolers import MultiScaleRoIAlign\n",
    "ops/roi_align.py": """
def roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    return "theirs"
class RoIAlign:
    def __call__(self, *args):
        return roi_align(*args)
""",
    "ops/poolers.py": """
from .roi_align import roi_align
class MultiScaleRoIAlign:
    def __call__(self, *args):
        return roi_align(*args)
""",
    "models.py": "from torchvision.ops import roi_align\ndef head(*args): return roi_align(*args)\n",
}


@pytest.fixture
def torchvision(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in STAND_IN.items():
        path = tmp_path / "torchvision" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("torchvision.ops"), importlib.import_module("torchvision.models")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def test_names_and_signatures():
    assert [(name, p.default) for name, p in inspect.signature(ops.roi_align).parameters.items()] == [
        ("input", inspect.Parameter.empty),
        ("boxes", inspect.Parameter.empty),
        ("output_size", inspect.Parameter.empty),
        ("spatial_scale", 1.0),
        ("sampling_ratio", -1),
        ("aligned", False),
    ]
    assert [(name, p.default) for name, p in inspect.signature(ops.RoIAlign).parameters.items()] == [
        ("output_size", inspect.Parameter.empty),
        ("spatial_scale", inspect.Parameter.empty),
        ("sampling_ratio", inspect.Parameter.empty),
        ("aligned", False),
    ]
    module = ops.RoIAlign((7, 7), 0.25, 2)
    assert repr(module) == "RoIAlign(output_size=(7, 7), spatial_scale=0.25, sampling_ratio=2, aligned=False)"


def test_results():
    expected = ops.roi_align(FEATURES, BOXES, (3, 4), 0.5, 2, True)
    listed = ops.roi_align(FEATURES, [BOXES[:1, 1:], BOXES[1:, 1:]], (3, 4), 0.5, 2, True)
    torch.testing.assert_close(listed, expected, rtol=0, atol=0)
    torch.testing.assert_close(ops.RoIAlign((3, 4), 0.5, 2, True)(FEATURES, BOXES), expected, rtol=0, atol=0)


@pytest.mark.parametrize("boxes", [BOXES[:, 1:], BOXES[0], [BOXES, BOXES], (BOXES[0, 1:], BOXES[1, 1:]), None, "boxes"])
def test_wrong_boxes_raise_as_there(boxes):
    with pytest.raises(AssertionError, match="boxes must be a "):
        ops.roi_align(FEATURES, boxes, 3)


def calls(torchvision):
    their_ops, models = torchvision
    return [
        their_ops.roi_align(FEATURES, BOXES, 3),
        their_ops.RoIAlign()(FEATURES, BOXES, 3),
        their_ops.MultiScaleRoIAlign()(FEATURES, BOXES, 3),
        models.head(FEATURES, BOXES, 3),
    ]


def test_patch(torchvision):
    ours = ops.roi_align(FEATURES, BOXES, 3)
    with ops.patch() as patched:
        assert all(torch.equal(output, ours) for output in calls(torchvision))
        with ops.patch():  # one within another changes nothing
            pass
        assert all(torch.equal(output, ours) for output in calls(torchvision))
    assert calls(torchvision) == ["theirs"] * 4
    patched = ops.patch()
    assert all(torch.equal(output, ours) for output in calls(torchvision))
    assert "aligned" in torchvision[0].roi_align.__code__.co_varnames  # mmcv asks for it in this way
    patched.undo()
    patched.undo()
    assert calls(torchvision) == ["theirs"] * 4


def test_patches_at_the_same_time(torchvision):
    first, second = ops.patch(), ops.patch()
    first.undo()
    assert all(isinstance(output, torch.Tensor) for output in calls(torchvision))
    second.undo()
    assert calls(torchvision) == ["theirs"] * 4
    with first:
        assert all(isinstance(output, torch.Tensor) for output in calls(torchvision))
    assert calls(torchvision) == ["theirs"] * 4


def test_a_module_that_is_imported_while_patched(torchvision, tmp_path):
    (tmp_path / "imported_late.py").write_text(
        "from torchvision.ops import roi_align\nfrom cupy_roialign.torchvision import roi_align as ours\n"
    )
    with ops.patch():
        late = importlib.import_module("imported_late")
        assert isinstance(late.roi_align(FEATURES, BOXES, 3), torch.Tensor)
    assert late.roi_align(FEATURES, BOXES, 3) == "theirs"
    assert late.ours is ops.roi_align
    del sys.modules["imported_late"]


def test_fewer_lists_than_images():
    expected = ops.roi_align(FEATURES, BOXES[:1], 3)
    torch.testing.assert_close(ops.roi_align(FEATURES, [BOXES[:1, 1:]], 3), expected, rtol=0, atol=0)


def test_patch_is_undone_after_an_error(torchvision):
    with pytest.raises(RuntimeError), ops.patch():
        raise RuntimeError
    assert calls(torchvision) == ["theirs"] * 4


def test_torchvision_is_needed_by_patch_only():
    program = (
        "import sys\nsys.modules['torchvision'] = None\n"
        "import torch, cupy_roialign.torchvision as ops\n"
        "print(ops.RoIAlign(1, 1.0, 2)(torch.ones(1, 1, 4, 4), [torch.ones(1, 4)]).item())\n"
        "ops.patch()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "1.0\n"
    assert re.match("ModuleNotFoundError: .*torchvision", done.stderr.splitlines()[-1])


def test_a_model_of_torchvision():
    """Mask R-CNN, whose MultiScaleRoIAlign calls roi_align, before and after; and trained for a step."""
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=128)
    images = [torch.rand(3, 120, 160, generator=torch.Generator().manual_seed(1))]
    masks = torch.zeros(1, 120, 160, dtype=torch.uint8)
    masks[0, 20:80, 30:90] = 1
    targets = [{"boxes": torch.tensor([[30.0, 20, 90, 80]]), "labels": torch.tensor([1]), "masks": masks}]

    pooled = []
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        pool.register_forward_hook(lambda module, inputs, output: pooled.append(output.detach()))

    def run():
        pooled.clear()
        model.zero_grad()
        torch.manual_seed(2)
        losses = model(images, targets)
        sum(losses.values()).backward()
        return [*pooled, *losses.values(), model.backbone.body.conv1.weight.grad.clone()]

    theirs = run()
    with ops.patch():
        ours = run()
    assert len(theirs) == len(ours) == 8
    for a, b in zip(ours, theirs, strict=True):
        tolerance.assert_close(a.detach(), b.detach(), 1e-4)
