"""The PyTorch side: names and signatures of RoIAlign.pytorch and torchvision, autograd, no needless copy or work."""

import copy
import inspect
import io
import pickle
import tracemalloc
import weakref

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign.cpu import backend as cpu
from tests import tolerance

torch = pytest.importorskip("torch")
crt = pytest.importorskip("cupy_roialign.torch")
torchvision = pytest.importorskip("cupy_roialign.torchvision")
from cupy_roialign.torch import bridge, eager  # noqa: E402

BOXES = torch.tensor([[1.31, 0.72, 8.25, 6.18], [2.2, 1.6, 4.4, 5.9]])
INDICES = torch.tensor([0, 1], dtype=torch.int32)


def features(channels=3, dtype=torch.float32):
    return torch.rand(2, channels, 8, 11, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_signatures_of_the_seed():
    """What callers of RoIAlign.pytorch write, by position and by name."""
    assert list(inspect.signature(crt.RoIAlign).parameters) == [
        "crop_height", "crop_width", "extrapolation_value", "transform_fpcoor",
    ]  # fmt: skip
    assert list(inspect.signature(crt.CropAndResize).parameters) == ["crop_height", "crop_width", "extrapolation_value"]
    assert list(inspect.signature(crt.RoIAlign.forward).parameters)[1:] == ["featuremap", "boxes", "box_ind"]
    assert list(inspect.signature(crt.CropAndResize.forward).parameters)[1:] == ["image", "boxes", "box_ind"]
    assert list(inspect.signature(crt.CropAndResizeFunction.apply).parameters) == [
        "image", "boxes", "box_ind", "crop_height", "crop_width", "extrapolation_value",
    ]  # fmt: skip


def test_signature_of_torchvision():
    parameters = inspect.signature(crt.roi_align).parameters
    assert [(name, p.default) for name, p in parameters.items()] == [
        ("input", inspect.Parameter.empty),
        ("boxes", inspect.Parameter.empty),
        ("output_size", inspect.Parameter.empty),
        ("spatial_scale", 1.0),
        ("sampling_ratio", -1),
        ("aligned", False),
        ("batch_indices", None),
    ]
    assert parameters["batch_indices"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("transform_fpcoor", [True, False])
def test_modules_are_the_functions(transform_fpcoor):
    module = crt.RoIAlign(3, 4, 2.5, transform_fpcoor)
    expected = cr.roi_crop(features(), BOXES, INDICES, (3, 4), 2.5, transform_fpcoor)
    torch.testing.assert_close(module(features(), BOXES, INDICES), expected, rtol=0, atol=0)
    normalized = BOXES[:, [1, 0, 3, 2]] / 10
    expected = cr.crop_and_resize(features(), normalized, INDICES, (3, 4), extrapolation_value=2.5)
    torch.testing.assert_close(crt.CropAndResize(3, 4, 2.5)(features(), normalized, INDICES), expected, rtol=0, atol=0)
    for made in (
        crt.CropAndResizeFunction.apply(features(), normalized, INDICES, 3, 4, 2.5),
        crt.CropAndResizeFunction(3, 4, 2.5)(features(), normalized, INDICES),
    ):
        torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_tensors_and_arrays_give_the_same_bits():
    arrays = (features().numpy(), BOXES.numpy(), INDICES.numpy())
    np.testing.assert_array_equal(cr.roi_crop(features(), BOXES, INDICES, 3).numpy(), cr.roi_crop(*arrays, 3))


def test_vjp_of_tensors():
    output, pullback = cr.vjp(cr.roi_crop, features(), BOXES, INDICES, 3)
    grads = pullback(torch.ones_like(output))
    expected, expected_pullback = cr.vjp(cr.roi_crop, features().numpy(), BOXES.numpy(), INDICES.numpy(), 3)
    for a, b in zip(grads, expected_pullback(np.ones_like(expected)), strict=True):
        assert isinstance(a, torch.Tensor)
        np.testing.assert_array_equal(a.numpy(), b)


def test_gradcheck_of_boxes_with_their_batch_index():
    rows = torch.cat([INDICES[:, None].double(), BOXES.double()], 1).requires_grad_()
    inputs = (features(2, torch.float64).requires_grad_(), rows)
    assert torch.autograd.gradcheck(lambda f, b: crt.roi_align(f, b, 3, 0.9, 2, True), inputs)


def test_gradcheck_of_a_list_of_boxes():
    parts = [BOXES[:1].double().requires_grad_(), BOXES[1:].double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: crt.roi_align(features(2, torch.float64), [a, b], 3, 0.9, 2), parts)


def test_memory_is_shared_and_not_copied(monkeypatch):
    seen = {}
    original = cpu.forward

    def spy(array, *rest):
        seen["features"] = array.__array_interface__["data"][0]
        seen["output"] = original(array, *rest)
        return seen["output"]

    monkeypatch.setattr(cpu, "forward", spy)
    for tensor in (features(), features().contiguous(memory_format=torch.channels_last), features()[:, :2]):
        output = cr.roi_crop(tensor.requires_grad_(), BOXES, INDICES, 3)
        assert seen["features"] == tensor.data_ptr()
        assert seen["output"].__array_interface__["data"][0] == output.data_ptr()


@pytest.mark.parametrize("text", [crt.__doc__, crt.crop_and_resize.__doc__], ids=["module", "function"])
def test_the_recipe_for_nhwc(text):
    recipe = "x.permute(0, 3, 1, 2)"
    assert f"``{recipe}``" in text
    crops = cr.crop_and_resize(eval(recipe, {"x": torch.rand(2, 8, 11, 3)}), BOXES / 10, INDICES, 3)
    assert crops.permute(0, 2, 3, 1).is_contiguous()


def test_a_call_on_tensors_is_one_on_arrays_and_nothing_else():
    """What torch is asked for, counted: to take the arrays that tensors are, and to make one of the result."""

    def asked(function):
        function()
        with torch.autograd.profiler.profile() as profile:
            function()
        return sorted(event.name for event in profile.function_events if event.name.startswith("aten::"))

    tensor, rows = features(), torch.cat([INDICES[:, None].to(BOXES.dtype), BOXES], 1)
    output = np.ones((2, 3, 3, 3), np.float32)
    take, make = bridge.memory, bridge.tensor
    expected = asked(lambda: (take(tensor), take(rows), make(output)))
    assert asked(lambda: crt.roi_align(tensor, rows, 3)) == expected
    expected = asked(lambda: (take(tensor), take(BOXES), take(INDICES), make(output)))
    assert asked(lambda: cr.roi_crop(tensor, BOXES, INDICES, 3)) == expected


def recorded(tensor):
    return tensor.clone().requires_grad_()


OTHER_WAYS = {
    "as it is": (lambda t: t, False),
    "negated": (torch._neg_view, True),
    "transposed": (lambda t: t.mT.contiguous().mT, False),
    "a parameter": (lambda t: torch.nn.Parameter(t, requires_grad=False), False),
    "recorded": (recorded, True),
    "in bfloat16": (lambda t: t.bfloat16(), True),
    "of a subclass": (lambda t: t.as_subclass(type("Named", (torch.Tensor,), {})), True),
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_tensors_are_arrays_where_torch_has_no_part_in_it(way, monkeypatch):
    """And with the same bits where it has, and goes through eager.py."""
    change, of_torch = OTHER_WAYS[way]
    seen = []
    crops = eager.EAGER.crops
    monkeypatch.setattr(eager, "EAGER", eager.EAGER._replace(crops=lambda *args: seen.append(1) or crops(*args)))
    tensor = change(features())
    output = cr.roi_crop(tensor, BOXES, INDICES, 3)
    assert bool(seen) == of_torch
    assert output.requires_grad == (way == "recorded")
    expected = cr.roi_crop(tensor.detach().float().resolve_neg().numpy(), BOXES.numpy(), INDICES.numpy(), 3)
    torch.testing.assert_close(output.detach(), torch.from_numpy(expected).to(tensor.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_integers_with_boxes_that_are_recorded(dtype):
    tensor, boxes = (4 * features()).to(dtype), BOXES.clone().requires_grad_()
    grads = []
    for given in (tensor, tensor.float()):
        output = cr.roi_crop(given, boxes, INDICES, 3)
        grads += [output.detach(), *torch.autograd.grad(output.sum(), boxes)]
    torch.testing.assert_close(grads[:2], grads[2:], rtol=0, atol=0)


def test_a_tensor_whose_memory_was_given_back():
    tensor = features()
    tensor.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="features must be a tensor with elements in memory"):
        cr.roi_crop(tensor, BOXES, INDICES, 3)
    assert cr.roi_crop(features(), BOXES[:0], INDICES[:0], 3).shape == (0, 3, 3, 3)  # none to be in memory
    part = features()[1:]  # whose address is not 0 even then
    part.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="features must be a tensor with elements in memory"):
        cr.roi_crop(part, BOXES[:1], INDICES[:1], 3)


def test_memory_that_was_given_back_before_backward():
    tensor, boxes = features(), BOXES.clone().requires_grad_()
    output = cr.roi_crop(tensor, boxes, INDICES, 3)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="has no elements in memory"):
        output.sum().backward()


def give_other_memory(tensor):
    tensor.data = torch.full_like(tensor, 7)


def give_more_memory(tensor):
    tensor.resize_(8 * len(tensor), *tensor.shape[1:])


@pytest.mark.parametrize("change", [give_other_memory, give_more_memory])
def test_a_pullback_reads_the_memory_of_the_call_or_what_it_became(change):
    tensor = torch.cat([features()] * 16, 2)  # memory so large that it is the system's again once it is free
    for _ in range(2):
        output, pullback = cr.vjp(cr.roi_crop, tensor, BOXES, INDICES, 3)
        expected = pullback(torch.ones_like(output))
        change(tensor)
        junk = [torch.full_like(tensor, i) for i in range(4)]
        torch.testing.assert_close(pullback(torch.ones_like(output)), expected, rtol=0, atol=0)
        del junk


def test_a_pullback_does_not_read_memory_that_was_given_back():
    tensor = features()
    output, pullback = cr.vjp(cr.roi_crop, tensor, BOXES, INDICES, 3)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="has no elements in memory"):
        pullback(torch.ones_like(output))


class Dispatched(torch.Tensor):
    """Has memory, but what it means is only known to this."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {})).as_subclass(cls)


class Wrapper(torch.Tensor):
    """Has none."""

    @staticmethod
    def __new__(cls, wrapped):
        return torch.Tensor._make_wrapper_subclass(cls, wrapped.shape, dtype=wrapped.dtype)

    __torch_dispatch__ = Dispatched.__torch_dispatch__


def fake(tensor):
    return torch._subclasses.FakeTensorMode().from_tensor(tensor)


@pytest.mark.parametrize(
    "change",
    [fake, Wrapper, lambda t: t.as_subclass(Dispatched), lambda t: torch._efficientzerotensor(t.shape)],
    ids=["fake", "wrapper", "subclass that dispatches", "zero"],
)
def test_tensors_whose_elements_are_not_in_memory_are_refused_everywhere(change):
    with pytest.raises(TypeError, match="elements"):
        cr.roi_crop(change(features()), BOXES, INDICES, 3)
    output = cr.roi_crop(features().requires_grad_(), BOXES, INDICES, 3)
    with pytest.raises(TypeError, match="elements"):
        output.backward(change(torch.ones_like(output)))
    output, pullback = cr.vjp(cr.roi_crop, features(), BOXES, INDICES, 3)
    with pytest.raises(TypeError, match="elements"):
        pullback(change(torch.ones_like(output)))


def test_channels_last_stays():
    tensor = features(20).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = cr.roi_crop(tensor, BOXES, INDICES, 3)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert tensor.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted_are_computed(wanted, monkeypatch):
    calls = []
    for name in ("feature_gradient", "box_gradient"):
        original = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *args, _name=name, _original=original: calls.append(_name) or _original(*args)
        )
    tensor, boxes = features().requires_grad_(wanted[0]), BOXES.clone().requires_grad_(wanted[1])
    output = cr.roi_crop(tensor, boxes, INDICES, 3)
    assert output.requires_grad == any(wanted)
    if any(wanted):
        saved = [t for t in output.grad_fn.saved_tensors if t is not None and t.shape == tensor.shape]
        assert len(saved) == int(wanted[1])  # features are kept for the gradient to the boxes only
        output.sum().backward()
    assert calls == [n for n, w in zip(["feature_gradient", "box_gradient"], wanted, strict=True) if w]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_grad(mode, place):
    kept = []
    boxes = BOXES.clone().requires_grad_()
    rows = torch.cat([INDICES[:, None].to(boxes.dtype), BOXES], 1).requires_grad_()
    leaf = features().requires_grad_()
    with place(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        with mode():
            tensor = leaf * 1
            outputs = [cr.roi_crop(tensor, boxes, INDICES, 3)]
            outputs += [crt.roi_align(tensor, given, 3) for given in (rows, [boxes[:1], boxes[1:]])]
            memory = weakref.ref(tensor)
            del tensor
        assert all(output.grad_fn is None and not output.requires_grad for output in outputs)
        assert all(output.is_inference() for output in outputs) == (mode is torch.inference_mode)
        assert memory() is None
        assert not kept
        cr.roi_crop(leaf, boxes, INDICES, 3)
        assert kept  # that they are seen


def test_tensors_without_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(2, 3, 8, 11)
    zero = torch._efficientzerotensor((2, 3, 8, 11))
    for tensor in (fake, zero):
        with pytest.raises(TypeError, match="features must be a tensor with elements in memory"):
            cr.roi_crop(tensor, BOXES, INDICES, 3)
    with pytest.raises(TypeError, match=r"boxes must be a dense tensor; got one that is torch\.sparse_coo"):
        cr.roi_crop(features(), BOXES.to_sparse(), INDICES, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [3, 20])
def test_dtypes(dtype, channels):
    tensor = features(channels, dtype).requires_grad_()
    boxes = BOXES.clone().requires_grad_()
    output = cr.roi_crop(tensor, boxes, INDICES, 3)
    output.float().sum().backward()
    assert output.dtype == tensor.grad.dtype == dtype
    assert boxes.grad.dtype == torch.float32
    wide = tensor.detach().double().requires_grad_()
    exact = cr.roi_crop(wide, BOXES.double(), INDICES, 3)
    exact.sum().backward()
    name = str(dtype).removeprefix("torch.")
    tolerance.assert_close(output.detach().double(), exact.detach(), max(tolerance.OUTPUT[name], 1e-6))
    tolerance.assert_close(tensor.grad.double(), wide.grad, max(tolerance.GRADIENT[name], 1e-5))


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_is_float32_rounded(channels, order, way):
    """To the bit: of NaN and infinite values, too, of both gradients and of the derivative along a direction."""
    wide, box = features(channels).contiguous(memory_format=order), BOXES.clone()
    wide[0, 0, 2, 3], wide[1, 1, 2, 3] = torch.nan, -torch.inf
    grad = torch.randn(2, channels, 5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        tensor, boxes = wide.bfloat16().to(dtype).requires_grad_(), box.clone().requires_grad_()
        output = cr.roi_crop(tensor, boxes, INDICES, (5, 4))
        output.backward(grad.to(dtype))
        with torch.no_grad():
            _, along = torch.func.jvp(lambda b, t=tensor: cr.roi_crop(t, b, INDICES, (5, 4)), (box,), (box * 0 + 1,))
        found.append([output.detach(), tensor.grad, boxes.grad, along])
    for narrow, exact in zip(*found, strict=True):
        torch.testing.assert_close(narrow, exact.to(narrow.dtype), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_features_are_not_copied_whole():
    tensor = torch.ones(1, 64, 512, 512, dtype=torch.bfloat16)
    seen = bridge.numbers(tensor)
    tensor.fill_(2)
    assert np.asarray(seen[0, :2, :2, :2]).tolist() == [[[2, 2]] * 2] * 2  # the same memory
    cr.roi_crop(tensor, BOXES, INDICES * 0, 3)
    tracemalloc.start()  # of NumPy's memory
    try:
        cr.roi_crop(tensor, BOXES, INDICES * 0, 3)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < tensor.nbytes / 10


def test_boxes_in_bfloat16():
    boxes = BOXES.bfloat16().requires_grad_()
    output = cr.roi_crop(features(), boxes, INDICES, 3)
    torch.testing.assert_close(output, cr.roi_crop(features(), boxes.detach().float(), INDICES, 3), rtol=0, atol=0)
    output.sum().backward()
    assert boxes.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="boxes of dtype bfloat16 cannot hold a batch index above 256"):
        crt.roi_align(torch.ones(258, 1, 2, 2), torch.zeros(1, 5, dtype=torch.bfloat16), 1)


def test_expanded_negated_and_transposed_tensors():
    expected = cr.roi_crop(features(1).expand(2, 5, 8, 11).contiguous(), BOXES, INDICES, 3)
    torch.testing.assert_close(cr.roi_crop(features(1).expand(2, 5, 8, 11), BOXES, INDICES, 3), expected)
    lazily_negated = torch.complex(torch.zeros(2, 1, 8, 11), -features(1)).conj().imag
    assert lazily_negated.is_neg()
    torch.testing.assert_close(cr.roi_crop(lazily_negated, BOXES, INDICES, 3), expected[:, :1])
    turned = features().transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(cr.roi_crop(turned, BOXES, INDICES, 3), cr.roi_crop(features(), BOXES, INDICES, 3))


VIEWS = {
    "one image": lambda t: t[:1].expand(2, -1, -1, -1),
    "one channel": lambda t: t[:, :1].expand(-1, 3, -1, -1),
    "one pixel": lambda t: t[:, :, :1, :1].expand(-1, -1, 8, 11),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: t.repeat_interleave(2, 3)[:, :, :, 1::2],
    "of a larger one": lambda t: torch.nn.functional.pad(t, (2, 3, 1, 1))[:, :, 1:-1, 2:-3],
}


@pytest.mark.parametrize("of", ["features", "gradients"])
@pytest.mark.parametrize("view", VIEWS)
def test_gradients_through_views(view, of, place):
    """Of views that are no leaves; boxes and indices have strides of zero."""

    def run(lay_out):
        leaf, edges = features().requires_grad_(), BOXES[:1].clone().requires_grad_()
        given = lay_out(VIEWS[view](leaf) if of == "features" else leaf)
        boxes, indices = lay_out(edges.expand(2, 4)), lay_out(INDICES[1:].expand(2))
        crops = cr.roi_crop(given, boxes, indices, (8, 11))
        grad = lay_out(VIEWS[view](features()) if of == "gradients" else features())
        return [crops, *torch.autograd.grad(crops, (leaf, edges), grad)]

    with place():
        actual, expected = run(lambda tensor: tensor), run(lambda tensor: tensor.contiguous())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_order_of_every_gradient(layout, place):
    """Of the second order, too."""
    f = features().contiguous(memory_format=layout).requires_grad_()
    boxes = BOXES.clone().requires_grad_()
    with place():
        crops = cr.roi_crop(f, boxes, INDICES, 3)
        to_features, to_boxes = torch.autograd.grad(crops, (f, boxes), torch.ones(2, 3, 3, 3), create_graph=True)
        (mixed,) = torch.autograd.grad(to_boxes.square().sum(), f)
    for tensor in (crops, to_features, mixed):
        assert tensor.is_contiguous(memory_format=layout)


def test_what_is_kept_must_not_change():
    rows = torch.cat([INDICES[:, None].to(BOXES.dtype), BOXES], 1)
    for changed in ("features", "boxes"):
        f, boxes = features(), rows.clone()
        wanted = boxes if changed == "features" else f
        wanted.requires_grad_()
        output = crt.roi_align(f, boxes, 3)
        (f if changed == "features" else boxes).add_(0.25)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_parameters_and_non_leaf_views():
    parameter = torch.nn.Parameter(features())
    (cr.roi_crop(parameter * 2, BOXES, INDICES, 3)[:, 1:]).sum().backward()
    assert parameter.grad[:, 0].abs().max() == 0
    assert parameter.grad[:, 1:].sum() == pytest.approx(2 * 2 * 2 * 9)


def test_devices():
    with pytest.raises(TypeError, match=r"features and boxes .*torch.Tensor on the CPU and torch.Tensor on meta"):
        cr.roi_crop(features(), BOXES.to("meta"), INDICES, 3)
    with pytest.raises(
        TypeError,
        match=r"features must be in the CPU's memory, a CuPy array or a CUDA tensor; got torch\.Tensor on meta",
    ):
        cr.roi_crop(features().to("meta"), BOXES.to("meta"), INDICES.to("meta"), 3)


MODULES = {
    "RoIAlign(crop_height=7, crop_width=5, extrapolation_value=0.5, transform_fpcoor=False)": (
        crt.RoIAlign(7, 5, 0.5, False),
        (BOXES, INDICES),
    ),
    "CropAndResize(crop_height=7, crop_width=5, extrapolation_value=0.5)": (
        crt.CropAndResize(7, 5, 0.5),
        (BOXES / 10, INDICES),
    ),
    "RoIAlign(output_size=(7, 5), spatial_scale=0.5, sampling_ratio=2, aligned=True)": (
        torchvision.RoIAlign((7, 5), 0.5, 2, True),
        ([BOXES[:1], BOXES[1:]],),
    ),
}


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("text", MODULES)
def test_modules_copy_pickle_and_print(text, way):
    module, boxes = MODULES[text]
    assert repr(module) == text
    assert module.state_dict() == {}
    other = COPIES[way](torch.nn.Sequential(module))[0]
    assert other is not module
    assert repr(other) == text
    assert torch.equal(other(features(), *boxes), module(features(), *boxes))
    other.load_state_dict(module.state_dict())


def test_a_program_written_for_the_seed():
    """After the README of RoIAlign.pytorch, with another import: crops of an image, then training through them."""
    from cupy_roialign.torch import CropAndResize, RoIAlign

    torch.manual_seed(0)
    image = torch.rand(2, 3, 30, 40)
    boxes = torch.tensor([[4.0, 5.0, 30.0, 25.0], [0.0, 0.0, 39.0, 29.0], [10.0, 2.0, 20.0, 12.0]])
    box_index = torch.tensor([0, 1, 1], dtype=torch.int32)
    crops = RoIAlign(7, 7)(image, boxes, box_index)
    assert crops.shape == (3, 3, 7, 7)
    heights_and_widths = torch.tensor([29.0, 39.0, 29.0, 39.0])
    crops_tf = CropAndResize(7, 7, 0)(image, boxes[:, [1, 0, 3, 2]] / heights_and_widths, box_index)
    torch.testing.assert_close(crops_tf, RoIAlign(7, 7, transform_fpcoor=False)(image, boxes, box_index))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.roi_align = RoIAlign(7, 7)
            self.linear = torch.nn.Linear(8 * 7 * 7, 1)

        def forward(self, image, boxes, box_index):
            regions = self.roi_align(torch.relu(self.convolution(image)), boxes, box_index)
            return self.linear(regions.flatten(1))[:, 0]

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    target, losses = torch.tensor([1.0, -1.0, 0.5]), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(image, boxes, box_index) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(p.grad.abs().max() > 0 for p in net.parameters())
