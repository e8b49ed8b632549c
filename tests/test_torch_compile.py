"""torch.compile, torch.export and torch.library: the operators in a graph give what they give in eager mode.

Older versions of PyTorch cannot do all of it: `since` says from which one on a test is right.
"""

import copy
import io
import itertools
import subprocess
import sys

import pytest

import cupy_roialign as cr
from cupy_roialign import rule, validation
from cupy_roialign.cpu import backend as cpu

torch = pytest.importorskip("torch")
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from cupy_roialign.torch import graph  # noqa: E402

crt = pytest.importorskip("cupy_roialign.torch")
torchvision = pytest.importorskip("cupy_roialign.torchvision")

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


def since(*version):
    return pytest.mark.skipif(version > VERSION, reason=f"PyTorch {VERSION} cannot")


pytestmark = since(2, 6)

INDICES = torch.tensor([0, 1])
ALIGN = rule.roi_align((3, 4), 0.9, 2, aligned=True)
RULE = graph.pack(ALIGN)


def with_rule(of=ALIGN, **fields):
    return graph.pack(of._replace(**fields))


BOXES = torch.tensor([[1.31, 0.72, 8.25, 6.18], [2.2, 1.6, 4.4, 5.9]])

FUNCTIONS = {
    "roi_align": lambda f, b: cr.roi_align(f, b, (3, 4), 0.9, 2, True, batch_indices=INDICES),
    "roi_align, rows": lambda f, b: crt.roi_align(f, torch.cat([INDICES[:, None].to(b.dtype), b], 1), 3, 0.9),
    "roi_align, a list": lambda f, b: crt.roi_align(f, [b[:1], b[1:]], 3),
    "roi_crop": lambda f, b: cr.roi_crop(f, b, INDICES, 3, 1.5),
    "crop_and_resize": lambda f, b: cr.crop_and_resize(f, b / 10, INDICES, (3, 4), extrapolation_value=1),
    "nearest": lambda f, b: cr.crop_and_resize(f, b / 10, INDICES, (3, 4), "nearest"),
    "RoIAlign": lambda f, b: crt.RoIAlign(3, 4, transform_fpcoor=False)(f, b, INDICES),
}


def inputs(dtype=torch.float32, layout=torch.contiguous_format, channels=5):
    f = torch.rand(2, channels, 8, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    return f.contiguous(memory_format=layout).requires_grad_(), BOXES.clone().requires_grad_()


def with_gradients(function, f, b):
    output = function(f, b)
    return [output, *torch.autograd.grad(output.float().square().sum(), (f, b))]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# each function with both dtypes, and with sizes both as symbols and as numbers, but not with all four pairs of these
@pytest.mark.parametrize(
    ("name", "dynamic", "dtype"),
    [
        (name, dynamic, (torch.float32, torch.bfloat16)[(number + dynamic) % 2])
        for number, name in enumerate(FUNCTIONS)
        for dynamic in (True, False)
    ],
)
def test_aot_eager(name, dynamic, dtype):
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(with_gradients(compiled, *inputs(dtype)), with_gradients(function, *inputs(dtype)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own, which looks
@pytest.mark.parametrize("name", ["roi_crop", "roi_align, rows"])
def test_a_backward_is_compiled_whose_forward_is_not(name):
    """By compiled autograd."""
    backend = torch.compile(backend="aot_eager", fullgraph=True)
    expected = with_gradients(FUNCTIONS[name], *inputs())
    with torch._dynamo.compiled_autograd._enable(backend):
        actual = with_gradients(FUNCTIONS[name], *inputs())
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@since(2, 8)
@pytest.mark.parametrize(("way", "dynamic"), [("indices", True), ("rows", True), ("a list", True), ("a list", False)])
def test_vjp(way, dynamic):
    def function(f, b):
        if way == "indices":
            args, options = (cr.roi_crop, f, b, INDICES, 3), {}
        else:
            boxes = [b[:1], b[1:]] if way == "a list" else torch.cat([INDICES[:, None].to(b.dtype), b], 1)
            args, options = (cr.roi_align, f, boxes, (3, 4)), {"sampling_ratio": 2}
        output, pullback = cr.vjp(*args, **options)
        to_features, to_boxes = pullback(output * 2)
        return output, to_features, *(to_boxes if way == "a list" else [to_boxes])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    f, b = inputs(layout=torch.channels_last)
    for actual, expected in zip(compiled(f, b), function(f, b), strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
        assert not actual.requires_grad
        assert not expected.requires_grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inductor(layout):
    """In the middle of what inductor makes into code of its own."""

    def function(f, b):
        return FUNCTIONS["roi_crop"](f * 2 + 1, b + 0.125).relu() - 1

    compiled = torch.compile(function, fullgraph=True)
    for a, b in zip(
        with_gradients(compiled, *inputs(layout=layout)), with_gradients(function, *inputs(layout=layout)), strict=True
    ):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


NUMBERS = {
    "rows": lambda f: cr.roi_crop(f, [[1.5, 2, 8, 9], [0, 0, 4, 5]], [0, 1], 3),
    "an int": lambda f: cr.roi_align(f, [[1.5, 2, 8, 9], [0, 0, 4, 5]], 3, batch_indices=1),
    "by image": lambda f: crt.roi_align(f, [[[1.5, 2, 8, 9]], []], 3),
    "a box of sizes": lambda f: cr.roi_crop(f, [[0, 0, f.shape[3] - 1, f.shape[2] - 1.5]], 0, 3),
}


@pytest.mark.parametrize(("way", "dtype"), [*zip(NUMBERS, 2 * [torch.float32, torch.float64], strict=True)])
def test_numbers_in_a_graph(way, dtype):
    f, _ = inputs(dtype)
    expected = NUMBERS[way](f)
    (grad,) = torch.autograd.grad(expected.sum(), f)
    for dynamic in (False, True):
        torch._dynamo.reset()
        actual = torch.compile(NUMBERS[way], fullgraph=True, backend="aot_eager", dynamic=dynamic)(f)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(actual.sum(), f)[0], grad, rtol=0, atol=0)
    traced = make_fx(NUMBERS[way])(f.detach())
    torch.testing.assert_close(traced(f.detach() + 1), NUMBERS[way](f.detach() + 1), rtol=0, atol=0)


WAYS = {
    "indices": lambda f, b, i: cr.roi_align(f, b, 3, 0.5, 2, batch_indices=i),
    "rows": lambda f, b, i: crt.roi_align(f, torch.cat([i[:, None].to(b.dtype), b], 1), 3, 0.5, 2),
    "a list": lambda f, b, i: crt.roi_align(f, [b, b[1:] + 1, b[2:]], 3, 0.5, 2),
}


@pytest.mark.parametrize(("way", "backend"), [*((way, "aot_eager") for way in WAYS), ("a list", "inductor")])
def test_no_compilation_for_another_number_of_boxes_or_images(way, backend):
    def function(f, b, i):
        return WAYS[way](f, b, i).square().sum()

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    generator = torch.Generator().manual_seed(1)
    compilations = set()
    for count, images, side in ((6, 3, 8), (7, 3, 8), (30, 2, 9), (5, 5, 20)):
        images = 3 if way == "a list" else images
        f = torch.rand(images, 4, side, side + 2, generator=generator).requires_grad_()
        b = (torch.rand(count, 4, generator=generator) * 10).requires_grad_()
        i = torch.randint(0, images, (count,), generator=generator)
        actual = torch.autograd.grad(compiled(f, b, i), (f, b))
        for x, y in zip(actual, torch.autograd.grad(function(f, b, i), (f, b)), strict=True):
            torch.testing.assert_close(x, y)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1
    assert compilations != {0}


class Kept(torch.nn.Module):
    """Crops of the boxes that a score lets through, of which nobody knows how many there will be."""

    def __init__(self, way):
        super().__init__()
        self.way = WAYS[way]

    def forward(self, f, b, i, scores):
        kept = torch.nonzero(scores > 0.5)[:, 0]
        return self.way(f, b[kept], i[kept])


SCORES = (torch.tensor([0.9, 0.1, 0.8, 0.7]), torch.tensor([0.1, 0.6, 0.6, 0.9]), torch.full((4,), 0.9))


def some_boxes():
    f = torch.rand(3, 4, 8, 11, generator=torch.Generator().manual_seed(0))
    return f.requires_grad_(), BOXES.repeat(2, 1).add(torch.arange(4)[:, None] / 3).requires_grad_()


@pytest.mark.parametrize(
    ("way", "backend"),
    [
        ("indices", "aot_eager"),
        ("indices", "inductor"),
        ("rows", "aot_eager"),
        pytest.param("rows", "inductor", marks=since(2, 8)),
        pytest.param("a list", "aot_eager", marks=since(2, 8)),
        pytest.param("a list", "inductor", marks=since(2, 13)),
    ],
)
def test_a_number_of_boxes_that_only_the_data_know(way, backend):
    f, b = some_boxes()
    i = torch.tensor([0, 1, 2, 1])
    counter = CompileCounterWithBackend(backend)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(Kept(way), fullgraph=True, backend=counter)
        for scores in SCORES:
            compare = with_gradients(lambda f, b: compiled(f, b, i, scores), f, b)  # noqa: B023
            for x, y in zip(compare, with_gradients(lambda f, b: Kept(way)(f, b, i, scores), f, b), strict=True):  # noqa: B023
                torch.testing.assert_close(x, y)
        assert counter.frame_count == 1


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("way", ["compiled", "an operator"])
def test_a_graph_computes_and_keeps_only_what_is_wanted(way, wanted, monkeypatch):
    calls = []
    for name in ("forward", "feature_gradient", "box_gradient"):
        original = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *args, _name=name, _original=original: calls.append(_name) or _original(*args)
        )
    f, b = (tensor.detach().requires_grad_(want) for tensor, want in zip(inputs(), wanted, strict=True))
    function = torch.compile(FUNCTIONS["roi_crop"], fullgraph=True, backend="aot_eager")
    if way == "an operator":
        function = lambda f, b: torch.ops.cupy_roialign.crops(f, b, INDICES, None, *RULE)  # noqa: E731
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape) or tensor, lambda kept: kept
    ):
        output = function(f, b)
    output.sum().backward()
    assert calls == ["forward", *["feature_gradient"] * wanted[0], *["box_gradient"] * wanted[1]]
    assert (f.shape in kept) == wanted[1]  # features are kept for the gradient to the boxes only


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_a_graph(dtype):
    layer = torch.nn.Conv2d(5, 4, 1)

    def function(f, b):
        with torch.autocast("cpu", dtype):
            return FUNCTIONS["roi_align"](layer(f), b)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = with_gradients(function, *inputs())
    assert expected[0].dtype == dtype
    for x, y in zip(with_gradients(compiled, *inputs()), expected, strict=True):
        assert torch.equal(x, y)


def test_arguments_that_change_between_calls():
    """Each of them a symbol, or made of sizes."""
    f, b = inputs()
    functions = {
        "output_size": lambda f, b, n: cr.roi_align(f, b, n, batch_indices=INDICES),
        "a pair": lambda f, b, n: cr.roi_crop(f, b, INDICES, (n, 2 * n)),
        "sampling_ratio": lambda f, b, n: cr.roi_align(f, b, 3, sampling_ratio=n, batch_indices=INDICES),
        "extrapolation_value": lambda f, b, n: cr.roi_crop(f, b + 9, INDICES, 3, n),
        "spatial_scale": lambda f, b, n: cr.roi_align(f, b, 3, n, batch_indices=INDICES),
        "sizes": lambda f, b, n: cr.roi_crop(f, b, INDICES, f.shape[-2:]),
    }
    for name, function in functions.items():
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for n in (1, 2, 3):
            assert torch.equal(compiled(f, b, n), function(f, b, n)), name


def in_graph(message):
    """What is said of an error of that message: by older versions only that there was one."""
    return message if VERSION >= (2, 10) else "."


def test_transforms_in_a_graph_are_refused_and_not_wrong():
    """Torch would give zero tangents for an operator, and say nothing."""
    f, b = (tensor.detach() for tensor in inputs())
    tangent = lambda b: torch.func.jvp(lambda b: FUNCTIONS["roi_crop"](f, b), (b,), (b,))[1]  # noqa: E731
    with pytest.raises(Exception, match=in_graph(r"torch\.func's transforms")):
        torch.compile(tangent, fullgraph=True, backend="aot_eager")(b)
    with pytest.raises(NotImplementedError, match=r"torch\.func's transforms"):
        torch.func.linearize(lambda b: FUNCTIONS["roi_crop"](f, b).sum(), b)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_tracers_record_the_operator():
    """And not the crops of the inputs that they were shown."""
    f, b = (tensor.detach() for tensor in inputs())
    function = lambda f, b, i: cr.roi_align(f, b, 3, 0.9, 2, batch_indices=i)  # noqa: E731
    traced = [make_fx(function, tracing_mode=mode)(f, b, INDICES) for mode in ("real", "symbolic")]
    traced.append(torch.jit.trace(function, (f, b, INDICES)))
    for program in traced:
        other = (f + 1, b + 0.5, 1 - INDICES)
        assert torch.equal(program(*other), function(*other))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WAYS)
def test_a_trace_is_saved_and_loaded(way):
    """For other numbers of boxes and images too, gradients included."""
    f, b = some_boxes()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(WAYS[way], (f, b, torch.tensor([0, 1, 2, 1]))), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    f, b = torch.rand(3, 2, 9, 9).requires_grad_(), (torch.rand(9, 4) * 9).requires_grad_()
    i = torch.arange(9) % 3
    expected = with_gradients(lambda f, b: WAYS[way](f, b, i), f, b)
    for actual, wanted in zip(with_gradients(lambda f, b: loaded(f, b, i), f, b), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("module", [crt.RoIAlign(3, 4), crt.CropAndResize(3, 4), torchvision.RoIAlign((3, 4), 0.9, 2)])
def test_modules_say_that_they_are_traced_and_not_scripted(module):
    f, b = (tensor.detach() for tensor in inputs())
    given = (f, torch.cat([INDICES[:, None], b], 1)) if isinstance(module, torchvision.RoIAlign) else (f, b, INDICES)
    for model in (module, torch.nn.Sequential(module)):
        with pytest.raises(
            NotImplementedError, match=rf"{type(module).__module__}.*; use torch\.jit\.trace, torch\.compile"
        ):
            torch.jit.script(model)
    traced = torch.jit.trace(module, given)
    assert torch.equal(traced(*given), module(*given))


def test_tracers_record_vjp():
    def function(f, b):
        output, pullback = cr.vjp(cr.roi_crop, f, b, INDICES, 3)
        return pullback(output)

    f, b = (tensor.detach() for tensor in inputs())
    traced = make_fx(function)(f, b)
    for actual, expected in zip(traced(f + 1, b + 0.5), function(f + 1, b + 0.5), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "record",
    [lambda f, example: torch.compile(f, fullgraph=True, backend="aot_eager"), lambda f, example: make_fx(f)(example)],
    ids=["compile", "make_fx"],
)
def test_a_pullback_is_recorded_by_what_begins_after_the_call(record):
    f, b = (tensor.detach() for tensor in inputs())
    output, pullback = cr.vjp(cr.roi_crop, f, b, INDICES, 3)
    recorded = record(lambda grad: pullback(grad), output)
    for grad in (output, output + 1):
        for actual, expected in zip(recorded(grad), pullback(grad), strict=True):
            assert torch.equal(actual, expected)


def test_fake_tensors():
    f, b = (tensor.detach() for tensor in inputs())
    with FakeTensorMode() as mode:
        fake = cr.roi_crop(mode.from_tensor(f), mode.from_tensor(b), mode.from_tensor(INDICES), 3)
    assert fake.shape == (2, 5, 3, 3)


def test_no_boxes():
    function = lambda f, b: cr.roi_align(f, b, 3, batch_indices=torch.zeros(0, dtype=torch.int64))  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    output = compiled(inputs()[0], torch.zeros(0, 4, requires_grad=True))
    assert output.shape == (0, 5, 3, 3)


@pytest.mark.parametrize("count", [0, 1])
def test_opcheck(count):
    """Schemas, fakes, autograd and dynamic shapes, as torch checks them."""
    f, b = (tensor.double().detach().requires_grad_() for tensor in inputs())
    at = (b, INDICES, [torch.rand(2, 4, dtype=torch.float64, requires_grad=True)] * count or None)
    grad = torch.rand(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.cupy_roialign
    torch.library.opcheck(ops.crops, (f, *at, *RULE))
    torch.library.opcheck(ops.to_features, (grad, [2, 5, 8, 11], True, torch.float64, *at, *RULE))
    torch.library.opcheck(ops.to_boxes, (grad, f, *at, *RULE))


def test_opcheck_where_nothing_is_left():
    """A third derivative along the boxes: zeros, in the memory order of the features like all else."""
    f, b = (tensor.detach() for tensor in inputs())
    f = f.contiguous(memory_format=torch.channels_last)
    at = (b, INDICES, [torch.rand(2, 4)] * 3)
    crops = torch.ops.cupy_roialign.crops(f, *at, *RULE)
    assert not crops.any()
    assert crops.is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.cupy_roialign.crops, (f, *at, *RULE), test_utils="test_faketensor")
    gradient = (torch.rand(2, 5, 3, 4), [2, 5, 8, 11], True, torch.float32)
    torch.library.opcheck(torch.ops.cupy_roialign.to_features, (*gradient, *at, *RULE), test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.rand(5, 8, 11)}, "H >= 1"),
        ({"features": torch.rand(2, 5, 0, 11)}, "H >= 1"),
        ({"boxes": torch.rand(2, 3)}, "boxes must have shape"),
        ({"boxes": torch.rand(2, 4).long()}, "boxes must be float32"),
        ({"indices": torch.tensor([0])}, "batch_indices must be"),
        ({"indices": torch.tensor([True, False])}, "batch_indices must be"),
        ({"along": [torch.rand(2, 5)]}, "directions must be like boxes"),
        ({"features": torch.rand(2, 5, 8, 11, dtype=torch.complex64)}, "features must be"),
        ({"indices": torch.rand(2).to(torch.float8_e5m2)}, "batch_indices must be"),
        ({"along": [torch.rand(2, 4).to(torch.float8_e5m2)]}, "directions must be like boxes"),
        ({"shape": [-1, 5, 8, 11]}, "shape must be"),
        ({"shape": [2, 5, 0, 11]}, "shape must be"),
        ({"dtype": torch.complex64}, "dtype must be"),
        ({"rule": with_rule(frame=7)}, "unknown rule: 7 is not a valid Frame"),
        ({"rule": with_rule(taps=-1)}, "unknown rule: -1 is not a valid Taps"),
        ({"rule": with_rule(border=2)}, "unknown rule: 2 is not a valid Border"),
        ({"rule": with_rule(reduce=1)}, "unknown rule: 1 is not a valid Reduce"),
        ({"rule": with_rule(channels=1)}, "unknown rule: 1 is not a valid Channels"),
        ({"rule": with_rule(taps=int(rule.Taps.NEAREST))}, "no operator has frame SCALED, taps NEAREST"),
        ({"rule": with_rule(border=int(rule.Border.CUT))}, "no operator has frame SCALED.* and border CUT"),
        ({"rule": with_rule(extrapolation_value=1.0)}, "extrapolation_value has no meaning for frame SCALED"),
        ({"rule": with_rule(rule.roi_crop((3, 4)), sampling_ratio=2)}, "sampling_ratio has no meaning for frame CENT"),
        ({"rule": with_rule(rule.roi_crop((3, 4)), aligned=True)}, "aligned has no meaning"),
        ({"rule": with_rule(rule.roi_crop((3, 4)), spatial_scale=0.5)}, "spatial_scale has no meaning"),
        ({"rule": with_rule(bins=[3, 0])}, "bins must be at least 1"),
        ({"rule": with_rule(bins=[3])}, "bins must be an int or a pair"),
        ({"rule": with_rule(bins=[3, 2**40])}, "bins must be at most"),
        ({"rule": with_rule(columns=[1, 0, 3, 4])}, "columns must be 4 of the 4"),
        ({"rule": with_rule(columns=[1, 1, 3, 2])}, "columns must be 4 of the 4"),
        ({"rule": with_rule(columns=[1, 0, 3])}, "columns must be 4 of the 4"),
        ({"rule": with_rule(columns=[-1, 0, 3, 2])}, "columns must be 4 of the 4"),
        ({"rule": with_rule(sampling_ratio=10**6)}, "sampling_ratio must be at most"),
        ({"rule": with_rule(spatial_scale=0.0)}, "spatial_scale must be positive"),
        ({"rule": with_rule(spatial_scale=float("nan"))}, "spatial_scale must be positive"),
        ({"rule": with_rule(spatial_scale=float("inf"))}, "spatial_scale must be positive"),
        ({"grad": torch.rand(2, 5, 4, 3)}, "grad must have the shape"),
        ({"grad": torch.rand(1, 5, 3, 4)}, "grad must have the shape"),
    ],
)
def test_operators_check_what_they_are_given(change, message, place):
    """They are public, too, and a kernel on a GPU reads wherever it is told to."""
    f, b = (tensor.detach() for tensor in inputs())
    given = {"features": f, "boxes": b, "indices": INDICES, "along": [], "rule": RULE, "grad": torch.rand(2, 5, 3, 4)}
    given |= change
    ops, at = torch.ops.cupy_roialign, (given["boxes"], given["indices"], given["along"], *given["rule"])
    shape, dtype = given.get("shape", list(given["features"].shape)), given.get("dtype", torch.float32)
    with place():
        if not {"grad", "shape", "dtype"} & {*change}:
            with pytest.raises((TypeError, ValueError), match=message):
                ops.crops(given["features"], *at)
        if not {"shape", "dtype"} & {*change}:
            with pytest.raises((TypeError, ValueError), match=message):
                ops.to_boxes(given["grad"], given["features"], *at)
        if not given["features"].is_complex():
            with pytest.raises((TypeError, ValueError), match=message):
                ops.to_features(given["grad"], shape, False, dtype, *at)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, FakeTensorMode().from_tensor])
@pytest.mark.parametrize("which", ["features", "boxes"])
def test_operators_take_tensors_with_elements_only(which, change, place):
    f, b = (tensor.detach() for tensor in inputs())
    given = {"features": f, "boxes": b}
    given[which] = change(given[which])
    with place(), pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError)):
        torch.ops.cupy_roialign.crops(*given.values(), INDICES, None, *RULE)


def test_a_rule_that_no_operator_has_in_an_image_of_one_row(place):
    """Nearest pixels of clamped positions: on a GPU that would read past the end."""
    f, b = torch.rand(1, 1, 1, 4), torch.tensor([[-0.4, -0.4, 4.4, 1.4]])
    packed = with_rule(taps=int(rule.Taps.NEAREST))
    with place(), pytest.raises(ValueError, match="no operator has"):
        torch.ops.cupy_roialign.crops(f, b, torch.tensor([0]), None, *packed)


def test_every_operator_can_be_called_by_its_rule(place):
    f, b = (tensor.detach() for tensor in inputs())
    rules = [rule.roi_align((3, 4), 0.5, 2), rule.roi_crop((3, 4)), rule.roi_crop((3, 4), False, 2.0)]
    rules += [rule.crop_and_resize((3, 4), nearest) for nearest in (False, True)]
    assert {tuple(r[:3]) for r in rules} == validation.OPERATORS
    with place():
        expected = [cr.roi_align(f, b, (3, 4), 0.5, 2, batch_indices=INDICES), cr.roi_crop(f, b, INDICES, (3, 4))]
        expected += [cr.roi_crop(f, b, INDICES, (3, 4), 2.0, False)]
        expected += [cr.crop_and_resize(f, b, INDICES, (3, 4), method) for method in ("bilinear", "nearest")]
        for packed, output in zip(map(graph.pack, rules), expected, strict=True):
            actual = torch.ops.cupy_roialign.crops(f, b, INDICES, None, *packed)
            torch.testing.assert_close(actual, output, rtol=0, atol=0)


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    """Whatever was imported first."""
    for order in itertools.permutations(["import torch", "import cupy_roialign as cr"]):
        program = "\n".join(
            [
                *order,
                "function = lambda f, b: cr.roi_align(f, b, 2, batch_indices=torch.tensor([0]))",
                "compiled = torch.compile(function, fullgraph=True, backend='aot_eager')",
                "f, b = torch.arange(12.0).reshape(1, 1, 3, 4), torch.tensor([[0.0, 0, 3, 2]])",
                "assert (compiled(f, b) == function(f, b)).all()",
            ]
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=120, check=True)


def test_errors_in_a_graph():
    compiled = torch.compile(lambda f, b: cr.roi_crop(f, b, INDICES, 3), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=in_graph(r"boxes must have shape \(K, 4\)")):
        compiled(inputs()[0], BOXES[0])
    compiled = torch.compile(lambda f, b: cr.roi_crop(f, b, INDICES + 1, 3), fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="box 1"):
        compiled(*inputs())


# ---- export ----


class Head(torch.nn.Module):
    def forward(self, features, boxes, indices):
        return cr.roi_align(features * 2, boxes, (3, 4), 0.9, 2, True, batch_indices=indices) + 1


def test_export():
    f, b = (tensor.detach() for tensor in inputs())
    count = torch.export.Dim("count", min=0)
    shapes = {"features": None, "boxes": {0: count}, "indices": {0: count}}
    for strict in (False, True):
        program = torch.export.export(Head(), (f, b, INDICES), dynamic_shapes=shapes, strict=strict)
        assert any("cupy_roialign" in str(node.target) for node in program.graph.nodes)
        boxes, indices = b.repeat(5, 1), INDICES.repeat(5)
        torch.testing.assert_close(program.module()(f, boxes, indices), Head()(f, boxes, indices), rtol=0, atol=0)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("way", ["indices", "rows"])
def test_export_of_any_number_of_images(way, strict):
    f, b = (tensor.detach() for tensor in some_boxes())
    i = torch.tensor([0, 1, 2, 1])

    class Model(torch.nn.Module):
        def forward(self, f, b, i):
            return WAYS[way](f, b, i)

    shapes = {"f": {0: torch.export.Dim("images")}, "b": None, "i": None}
    program = torch.export.export(Model(), (f, b, i), dynamic_shapes=shapes, strict=strict).module()
    other = torch.cat([f, f + 1])
    assert torch.equal(program(other, b, i + 2), WAYS[way](other, b, i + 2))


def test_a_column_that_is_too_narrow_in_a_graph():
    rows = torch.zeros(1, 5, dtype=torch.bfloat16)
    function = torch.compile(lambda f: crt.roi_align(f, rows, 1), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="of dtype bfloat16 cannot hold a batch index above 256 exactly"):
        function(torch.zeros(258, 1, 2, 2))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("way", ["indices", "rows", pytest.param("a list", marks=since(2, 8))])
def test_export_of_a_number_of_boxes_that_only_the_data_know(way, strict):
    f, b = (tensor.detach() for tensor in some_boxes())
    i = torch.tensor([0, 1, 2, 1])
    program = torch.export.export(Kept(way), (f, b, i, SCORES[0]), strict=strict).module()
    for scores in SCORES:
        assert torch.equal(program(f, b, i, scores), Kept(way)(f, b, i, scores))


def test_export_is_saved_and_loaded(tmp_path):
    f, b = (tensor.detach() for tensor in inputs())
    torch.export.save(torch.export.export(Head(), (f, b, INDICES)), tmp_path / "head.pt2")
    torch.save((f, b, INDICES, Head()(f, b, INDICES)), tmp_path / "data.pt")
    program = (
        "import sys, torch, cupy_roialign.torch\n"
        "*inputs, expected = torch.load(sys.argv[2])\n"
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(*inputs), expected)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, tmp_path / "head.pt2", tmp_path / "data.pt"]
    subprocess.run(command, timeout=120, check=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's, about its own parts
def test_export_is_compiled_ahead(tmp_path):
    """By AOTInductor."""
    f, b = (tensor.detach() for tensor in inputs())
    program = torch.export.export(Head(), (f, b, INDICES))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "head.pt2"))
    head = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(head(f, b, INDICES), Head()(f, b, INDICES))


def test_modules_are_copied_after_compilation():
    module = crt.RoIAlign(3, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    f, b = inputs()
    torch.testing.assert_close(compiled(f, b, INDICES), copy.deepcopy(module)(f, b, INDICES), rtol=0, atol=0)
