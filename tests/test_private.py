"""Without a private name of torch, things still work, if slower, or fail as private.py says."""

import ast
import functools
import importlib
import types
from pathlib import Path

import pytest

import cupy_roialign as cr

torch = pytest.importorskip("torch")
from torch.autograd import forward_ad  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from cupy_roialign.torch import eager, private  # noqa: E402

NAMES = {
    "torch.compiler": ["is_dynamo_compiling"],
    "torch._C": [
        "_is_tracing",
        "_are_functorch_transforms_active",
        "_len_torch_dispatch_stack",
        "_parse_dispatch_key",
        "_dispatch_tls_is_dispatch_key_included",
        "_dispatch_keys",
    ],
    "torch._C._functorch": ["unwrap_if_dead", "TransformType"],
    "torch._functorch.pyfunctorch": ["retrieve_all_functorch_interpreters"],
    "torch._functorch.autograd_function": ["VmapInfo"],
    "torch.autograd.forward_ad": ["_current_level"],
    "torch": ["_remove_batch_dim", "_add_batch_dim"],
}
ALL = [(module, name) for module, names in NAMES.items() for name in names]

FEATURES = torch.rand(2, 3, 8, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BOXES = torch.tensor([[1.31, 0.72, 8.25, 6.18], [2.2, 1.6, 4.4, 5.9]], dtype=torch.float64)
INDICES = torch.tensor([0, 1])
ONES = torch.ones(2, 3, 3, 3, dtype=torch.float64)


@pytest.fixture
def without(monkeypatch):
    """Takes names away while private.py looks for them; torch itself needs them afterwards."""

    def take(*names):
        with monkeypatch.context() as patch:
            for module, name in names:
                owner = importlib.import_module(module)
                patch.delattr(owner, name)
            importlib.reload(private)

    yield take
    importlib.reload(private)


def crop(f, b):
    return cr.roi_crop(f, b, INDICES, 3)


def loss(f, b):
    return crop(f, b).square().sum()


def gradients(f, b):
    f, b = f.clone().requires_grad_(), b.clone().requires_grad_()
    return torch.autograd.grad(loss(f, b), (f, b), create_graph=True)


def dual(f, b):
    with forward_ad.dual_level():
        made = crop(forward_ad.make_dual(f, f.flip(0)), b)
        return forward_ad.unpack_dual(made).tangent


def batched(f, b):
    b = b.clone().requires_grad_()
    output = crop(f, b)
    return torch.autograd.grad(output, b, torch.stack([output, 2 * output]), is_grads_batched=True)


WAYS = {
    "plain": crop,
    "gradients": gradients,
    "grad": torch.func.grad(loss, argnums=(0, 1)),
    "vmap": lambda f, b: torch.func.vmap(crop)(torch.stack([f, 2 * f]), torch.stack([b, b + 0.25])),
    "jvp": lambda f, b: torch.func.jvp(crop, (f, b), (f, b)),
    "hessian": lambda f, b: torch.func.hessian(loss, argnums=1)(f, b),
    "a pullback that outlives its transform": lambda f, b: torch.func.vjp(crop, f, b)[1](
        torch.ones(2, 3, 3, 3).double()
    ),
    "dual numbers": dual,
    "old batches": batched,
    "make_fx": lambda f, b: make_fx(crop)(f + 1, b)(f, b),
    "trace": lambda f, b: torch.jit.trace(crop, (f + 1, b))(f, b),
    "compile": lambda f, b: torch.compile(crop, fullgraph=True, backend="aot_eager")(f, b),
    "cr.vjp": lambda f, b: cr.vjp(cr.roi_crop, f, b, INDICES, 3)[1](ONES),
}

OLD_BATCHES = {"_parse_dispatch_key", "_dispatch_tls_is_dispatch_key_included", "_dispatch_keys", "VmapInfo"}
OLD_BATCHES |= {"_remove_batch_dim", "_add_batch_dim"}
REFUSED = {
    **{(name, "old batches"): RuntimeError for name in OLD_BATCHES},
    **{
        (name, way): NotImplementedError
        for name in ("TransformType", "retrieve_all_functorch_interpreters")
        for way in ("jvp", "hessian")
    },
}


@functools.cache
def with_all_names():
    return {way: function(FEATURES, BOXES) for way, function in WAYS.items()}


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("module", "name"), ALL, ids=[name for _, name in ALL])
def test_without_a_name(module, name, without):
    expected = with_all_names()
    without((module, name))
    for way, function in WAYS.items():
        torch._dynamo.reset()
        if error := REFUSED.get((name, way)):
            with pytest.raises(error):
                function(FEATURES, BOXES)
        else:
            torch.testing.assert_close(function(FEATURES, BOXES), expected[way], rtol=1e-12, atol=1e-12)


def test_without_any_name_of_autograd(without):
    """In a torch that has become quite another: eager mode, autograd and reverse mode of torch.func."""
    ways = ("plain", "gradients", "grad", "vmap", "cr.vjp", "dual numbers")
    expected = {way: WAYS[way](FEATURES, BOXES) for way in ways}
    without(*(pair for pair in ALL if pair[1] not in ("_len_torch_dispatch_stack", "_current_level")))
    assert not private.has_shortcut
    for way in ways:
        torch.testing.assert_close(WAYS[way](FEATURES, BOXES), expected[way], rtol=1e-12, atol=1e-12)


def test_the_current_stream_of_a_gpu(monkeypatch):
    """By a private name, which torch without CUDA lacks, or by a public one."""
    device = torch.device("cuda:3")
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=10 + device.index)
    )
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 20 + index, raising=False)
    importlib.reload(private)
    assert private.current_stream(device) == 23
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    importlib.reload(private)
    assert private.current_stream(device) == 13
    monkeypatch.undo()
    importlib.reload(private)


def test_the_shortcut_is_taken_where_there_is_one(monkeypatch):
    assert private.has_shortcut
    calls = []
    bare = private.bare_apply
    monkeypatch.setattr(private, "bare_apply", lambda *args: calls.append(args[0]) or bare(*args))
    crop(FEATURES.clone().requires_grad_(), BOXES).sum().backward()
    assert calls == [eager._Crops]


def private_names(text):
    """The names in a text that begin with an underscore and are torch's."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = [node.module, *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            names = [name] if name.startswith(("torch.", "forward_ad.")) else []
        parts = [part for name in names for part in name.split(".")]
        found |= {part for part in parts if part.startswith("_") and not part.endswith("__")}
    return found


def test_private_names_are_in_one_place():
    texts = {path.name: path.read_text(encoding="utf-8") for path in Path(cr.__file__).parent.rglob("*.py")}
    assert private_names(texts.pop("private.py")) == {"_current_level"}  # the others are looked up
    assert not {name: found for name, text in texts.items() if (found := private_names(text))}
    hidden = ["torch._C.f()", "from torch import _vmap", "from torch._functorch import f", "import torch._dynamo"]
    assert all(map(private_names, hidden))
