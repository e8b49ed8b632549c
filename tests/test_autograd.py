"""Derivatives of every kind on tensors: reverse and forward mode, of the second order, and torch.func."""

import concurrent.futures
import contextlib
import weakref

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign.cpu import backend as cpu
from tests.test_gradients import CALLS

torch = pytest.importorskip("torch")
from cupy_roialign.torch import batching  # noqa: E402

BOXES = torch.tensor([[1.31, 0.72, 8.25, 6.18], [2.2, 1.6, 4.4, 5.9]], dtype=torch.float64)
INDICES = torch.tensor([0, 1])
SMALL = [name for name in CALLS if "large" not in name]


def features(channels=2, dtype=torch.float64):
    return torch.rand(2, channels, 8, 11, generator=torch.Generator().manual_seed(0)).to(dtype)


def operator_of(name):
    """An operator as a function of features and boxes, and its boxes."""
    operator, boxes, args, kwargs = CALLS[name]
    convert = lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value  # noqa: E731
    args, kwargs = [convert(a) for a in args], {k: convert(v) for k, v in kwargs.items()}
    return lambda f, b: operator(f, b, *args, **kwargs), torch.from_numpy(boxes)


def crop(f, b):
    return cr.roi_crop(f, b, INDICES, 3, 0.5)


@pytest.mark.parametrize("name", CALLS)
def test_first_derivatives(name, place):
    operator, boxes = operator_of(name)
    fast = place is not contextlib.nullcontext or "large" in name  # else a call for each element of each input
    inputs = (features(2 if fast else 1).requires_grad_(), boxes.clone().requires_grad_())
    with place():
        assert torch.autograd.gradcheck(operator, inputs, fast_mode=fast, check_forward_ad=True)


@pytest.mark.parametrize("name", SMALL)
def test_second_derivatives(name, place):
    """Of features and boxes, mixed, in reverse mode and forward over reverse."""
    operator, boxes = operator_of(name)
    inputs = (features().requires_grad_(), boxes.clone().requires_grad_())
    with place():
        assert torch.autograd.gradgradcheck(
            operator, inputs, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
        )


def test_second_derivatives_of_boxes_with_their_batch_index():
    rows = torch.cat([INDICES[:, None].double(), BOXES], 1).requires_grad_()
    operator = lambda f, b: cr.roi_align(f, b, 3, 0.9, 2, True)  # noqa: E731
    inputs = (features().requires_grad_(), rows)
    assert torch.autograd.gradcheck(operator, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(operator, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_third_and_fourth_derivatives(place):
    """Each derivative, by differences of the one before it."""

    def derivative(n):
        def function(b):
            value = (crop(features(), b) * torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)).sum().exp()
            for _ in range(n):
                (gradient,) = torch.autograd.grad(value, b, create_graph=True)
                value = (gradient * direction).sum()
            return value

        return function

    direction = torch.rand(2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5
    with place():
        for n in (3, 4):
            exact = derivative(n)(BOXES.clone().requires_grad_())
            sides = [derivative(n - 1)(BOXES.add(direction, alpha=s).requires_grad_()) for s in (1e-5, -1e-5)]
            torch.testing.assert_close(exact, (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-6)
            assert exact.abs() > 1e-3


FEATURES = features()


def loss_of_boxes(b):
    return crop(FEATURES, b).square().sum()


def hessian_by_differences(step=1e-5):
    columns = []
    for change in torch.eye(8, dtype=torch.float64).reshape(8, 2, 4) * step:
        sides = []
        for sign in (1, -1):
            b = (BOXES + sign * change).requires_grad_()
            sides.append(torch.autograd.grad(loss_of_boxes(b), b)[0])
        columns.append((sides[0] - sides[1]).flatten() / (2 * step))
    return torch.stack(columns, dim=1).reshape(2, 4, 2, 4)


@pytest.mark.parametrize("way", ["autograd", "func", "func, reverse over reverse"])
def test_hessian_of_a_loss_on_boxes(way):
    actual = {
        "autograd": lambda: torch.autograd.functional.hessian(loss_of_boxes, BOXES),
        "func": lambda: torch.func.hessian(loss_of_boxes)(BOXES),
        "func, reverse over reverse": lambda: torch.func.jacrev(torch.func.jacrev(loss_of_boxes))(BOXES),
    }[way]()
    expected = hessian_by_differences()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_double_backward_to_features_is_the_forward_again(calls):
    """They are linear in the features, so that nothing else is to be done."""
    f, grad = features().requires_grad_(), torch.ones(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(crop(f, BOXES), f, grad, create_graph=True)
    assert calls == ["forward", "feature_gradient"]
    cotangent = features().flip(3)
    (actual,) = torch.autograd.grad(gradient, grad, cotangent)
    assert calls == ["forward", "feature_gradient", "forward"]
    torch.testing.assert_close(actual, cr.roi_crop(cotangent, BOXES, INDICES, 3))


def test_a_gradient_penalty():
    """The gradient to the boxes, itself differentiated to features and boxes."""

    def penalty(f, b):
        (gradient,) = torch.autograd.grad(crop(f, b).square().sum(), b, create_graph=True)
        return gradient.square().sum()

    inputs = (features().requires_grad_(), BOXES.clone().requires_grad_())
    assert torch.autograd.gradcheck(penalty, inputs)


def test_forward_mode():
    f, b, tf, tb = features(), BOXES, features().flip(0), torch.ones_like(BOXES)
    primal, tangent = torch.func.jvp(crop, (f, b), (tf, tb))
    with torch.autograd.forward_ad.dual_level():
        dual = crop(torch.autograd.forward_ad.make_dual(f, tf), torch.autograd.forward_ad.make_dual(b, tb))
        unpacked = torch.autograd.forward_ad.unpack_dual(dual)
    step = 1e-6
    numeric = (crop(f + step * tf, b + step * tb) - crop(f - step * tf, b - step * tb)) / (2 * step)
    for way in (tangent, unpacked.tangent):
        torch.testing.assert_close(way, numeric, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(primal, crop(f, b), rtol=0, atol=0)


# ---- torch.func ----

BATCH = 3


def batched(tensor, dim=0):
    noise = torch.rand(BATCH, *tensor.shape, generator=torch.Generator().manual_seed(1), dtype=tensor.dtype)
    return (tensor + noise / 10).movedim(0, dim)


@pytest.fixture
def calls(monkeypatch):
    """The names of the backend's functions, in the order in which they are called."""
    names = []
    for name in ("forward", "feature_gradient", "box_gradient"):
        original = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *args, _name=name, _original=original: names.append(_name) or _original(*args)
        )
    return names


@pytest.mark.parametrize("dims", [(0, None), (2, None), (None, 0), (None, 2), (0, 0), (1, 2), (4, 1)])
@pytest.mark.parametrize("what", ["crops", "gradients", "jacobian"])
def test_vmap(what, dims, calls):
    function = {
        "crops": crop,
        "gradients": torch.func.grad(lambda f, b: crop(f, b).square().sum(), argnums=(0, 1)),
        "jacobian": torch.func.jacrev(crop, argnums=1),
    }[what]
    f, b = (
        tensor if dim is None else batched(tensor, dim) for tensor, dim in zip((features(), BOXES), dims, strict=True)
    )
    expected = [
        function(*(tensor if dim is None else tensor.select(dim, i) for tensor, dim in zip((f, b), dims, strict=True)))
        for i in range(BATCH)
    ]
    calls.clear()
    actual = torch.func.vmap(function, in_dims=dims)(f, b)
    backward = {"crops": [], "gradients": ["feature_gradient", "box_gradient"], "jacobian": ["box_gradient"]}
    assert calls == ["forward", *backward[what]]  # each once, whatever the batch
    if what == "gradients":
        for a, parts in zip(actual, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(parts))
    else:
        torch.testing.assert_close(actual, torch.stack(expected))


def test_vmap_over_indices():
    indices = torch.tensor([[0, 1], [1, 1], [1, 0]], dtype=torch.uint8)
    function = lambda f, i: cr.roi_crop(f, BOXES, i, 3)  # noqa: E731
    for dims, f in (((None, 0), features()), ((0, 0), batched(features()))):
        expected = torch.stack([function(f if dims[0] is None else f[n], indices[n]) for n in range(3)])
        torch.testing.assert_close(torch.func.vmap(function, in_dims=dims)(f, indices), expected, rtol=0, atol=0)


def test_vmap_of_boxes_with_their_batch_index():
    rows = batched(torch.cat([INDICES[:, None].double(), BOXES], 1))
    rows[:, :, 0] = INDICES
    function = lambda f, b: cr.roi_align(f, b, 3)  # noqa: E731
    f = batched(features())
    expected = torch.stack([function(f[n], rows[n]) for n in range(BATCH)])
    torch.testing.assert_close(torch.func.vmap(function)(f, rows), expected, rtol=0, atol=0)


TRANSFORMS = {
    "grad": lambda function, first, last: torch.func.grad(function, argnums=(0, 1))(first, last),
    "jacrev": lambda function, first, last: torch.func.jacrev(function, argnums=(0, 1))(first, last),
    "hessian": lambda function, first, last: torch.func.hessian(function, argnums=(0, 1))(first, last),
    "jvp": lambda function, first, last: torch.func.jvp(function, (first, last), (last, first)),
    "vmap": lambda function, first, last: torch.func.vmap(function)(batched(first), batched(last)),
    "vmap of one": lambda function, first, last: torch.func.vmap(function, in_dims=(0, None))(batched(first), last),
    "is_grads_batched": lambda function, first, last: torch.autograd.functional.jacobian(
        function, (first, last), vectorize=True
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_a_list_of_boxes(name):
    """As of all boxes at once."""
    f, (first, last) = FEATURES[:, :, :5, :6], (BOXES / 2).split(1)
    reduce = torch.sum if name in ("grad", "hessian") else torch.ravel

    def listed(first, last):
        return reduce(cr.roi_align(f, [first, last], 2, 1.0, 2).square())

    def joined(first, last):
        return reduce(cr.roi_align(f, torch.cat([first, last]), 2, 1.0, 2, batch_indices=INDICES).square())

    assert_same(TRANSFORMS[name](listed, first, last), TRANSFORMS[name](joined, first, last))


@pytest.mark.parametrize("index", [-1, 2])
def test_a_bad_index_in_a_batch_is_not_an_image_of_the_next_call(index):
    indices = torch.tensor([0, index])
    with pytest.raises(IndexError):
        torch.func.vmap(lambda f: cr.roi_crop(f, BOXES, indices, 3))(batched(features()))
    with pytest.raises(IndexError):
        torch.func.vmap(lambda f, b: cr.roi_crop(f, b, indices, 3))(batched(features()), batched(BOXES))


def test_vmap_of_vmap():
    f, b = batched(batched(features())), batched(BOXES)
    inner = torch.func.vmap(crop, in_dims=(0, None))
    actual = torch.func.vmap(inner, in_dims=(0, 0))(f, b)
    expected = torch.stack([torch.stack([crop(f[i, j], b[i]) for j in range(BATCH)]) for i in range(BATCH)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_vmap_keeps_broken_boxes_broken():
    f, b = batched(features()), batched(BOXES)
    b[1, 0, 2] = torch.nan
    actual = torch.func.vmap(crop)(f, b)
    assert actual[1, 0].isnan().all()
    assert int(actual.isnan().sum()) == actual[1, 0].numel()


def test_nothing_in_a_batch():
    none = torch.zeros(0, 2, 4, dtype=torch.float64)
    assert torch.func.vmap(crop, in_dims=(None, 0))(FEATURES, none).shape == (0, 2, 2, 3, 3)
    assert torch.func.vmap(crop, in_dims=(0, 0))(FEATURES[None][:0], none).shape == (0, 2, 2, 3, 3)
    for shape, count in (((2, 2, 8, 11), 0), ((0, 2, 8, 11), 0), ((2, 0, 8, 11), 2)):
        f, b, i = torch.ones(shape, dtype=torch.float64), BOXES[:count], INDICES[:count]
        function = lambda f, b: cr.roi_crop(f, b, i, 3)  # noqa: B023, E731
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            assert transform(function, argnums=1)(f, b).shape == (count, shape[1], 3, 3, count, 4)
        assert torch.func.hessian(lambda b: function(f, b).sum())(b).shape == (count, 4, count, 4)  # noqa: B023


def test_many_cotangents_are_channels_of_one_call():
    seen = []
    original = cpu.feature_gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "feature_gradient", lambda g, f, *rest: seen.append(f.shape) or original(g, f, *rest))
        torch.func.jacrev(lambda f: cr.roi_crop(f, BOXES, INDICES, 1))(FEATURES)
    assert seen == [(2, 2 * 4, 8, 11)]


def test_forward_mode_within_forward_mode_is_refused_and_not_wrong():
    """Torch would lose the outer tangent, and say nothing."""
    along = lambda b: torch.func.jvp(loss_of_boxes, (b,), (BOXES,))[1]  # noqa: E731
    with pytest.raises(NotImplementedError, match="forward mode within forward mode"):
        torch.func.jvp(along, (BOXES,), (BOXES,))
    with pytest.raises(NotImplementedError, match="forward mode within forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(loss_of_boxes))(BOXES)


def test_vjp_of_this_package_is_not_transformed():
    with pytest.raises(TypeError, match=r"use torch\.func\.vjp"):
        torch.func.grad(lambda b: cr.vjp(cr.roi_crop, FEATURES, b, INDICES, 3)[0].sum())(BOXES)
    for given in (FEATURES.detach(), features().requires_grad_()):
        output, pullback = cr.vjp(cr.roi_crop, given, BOXES, INDICES, 3)
        with pytest.raises(TypeError, match=r"use torch\.func\.vjp"):
            torch.func.vmap(pullback)(output[None])
        assert pullback(output)[0].shape == given.shape  # still


def test_vjp_of_this_package_is_no_part_of_a_graph():
    output, pullback = cr.vjp(cr.roi_crop, features().requires_grad_(), BOXES.clone().requires_grad_(), INDICES, 3)
    for result in (output, *pullback(output.clone().requires_grad_())):
        assert not result.requires_grad


def test_a_pullback_of_torch_outlives_its_transform(place):
    """Whose tensors then have no memory to point to, but that of what they wrap."""
    function = lambda f, b: cr.roi_crop(f, b.detach(), INDICES, 3)  # noqa: E731
    f = FEATURES.clone().requires_grad_()
    with place():
        output, pullback = torch.func.vjp(function, FEATURES, BOXES)
        actual, _ = pullback(output)
        (expected,) = torch.autograd.grad(function(f, BOXES), f, output)
    torch.testing.assert_close(actual, expected)


def test_jacobians_agree():
    forward, reverse = torch.func.jacfwd(crop, argnums=(0, 1)), torch.func.jacrev(crop, argnums=(0, 1))
    for a, b in zip(forward(features(), BOXES), reverse(features(), BOXES), strict=True):
        torch.testing.assert_close(a, b)


# ---- torch.autograd's own batching, which is older than torch.func's ----

SMALL_FEATURES = features()[:, :, :5, :6]
WITHIN = BOXES / 2
PLACES = {"features": (0,), "boxes": (1,), "both": (0, 1)}


def of_some(function, places):
    """A function of some of features and boxes, and what it is called with."""
    given = (SMALL_FEATURES, WITHIN)

    def of(*some):
        return function(*(some[places.index(i)] if i in places else given[i] for i in (0, 1)))

    return of, tuple(given[i].clone().requires_grad_() for i in places)


def assert_same(actual, expected):
    if isinstance(actual, tuple):
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    else:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_batched_gradients(places, count, place, calls):
    function, inputs = of_some(crop, places)
    with place():
        output = function(*inputs)
        grads = torch.rand(count, *output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
        calls.clear()
        actual = torch.autograd.grad(output, inputs, grads, retain_graph=True, is_grads_batched=True)
        assert len(calls) == (len(places) if place is contextlib.nullcontext else 0)  # whatever the batch
        each = [torch.autograd.grad(output, inputs, grad, retain_graph=True) for grad in grads]
    for n, (tensor, a) in enumerate(zip(inputs, actual, strict=True)):
        assert a.shape == (count, *tensor.shape)
        for row, parts in zip(a, each, strict=True):
            torch.testing.assert_close(row, parts[n])


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_vectorized_jacobians(layout, places, strategy, calls):
    function, inputs = of_some(crop, places)
    inputs = tuple(t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in inputs)
    expected = torch.autograd.functional.jacobian(function, inputs)
    calls.clear()
    actual = torch.autograd.functional.jacobian(function, inputs, vectorize=True, strategy=strategy)
    assert len(calls) <= 3
    assert_same(actual, expected)


@pytest.mark.parametrize("name", SMALL)
def test_vectorized_hessians(name):
    """Of features and boxes, mixed."""
    operator, boxes = operator_of(name)
    inputs = (features(1), boxes)
    function = lambda f, b: operator(f, b).square().sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(function, inputs)
    for outer in ("reverse-mode", "forward-mode"):
        actual = torch.autograd.functional.hessian(function, inputs, vectorize=True, outer_jacobian_strategy=outer)
        assert_same(actual, expected)


def test_batches_within_batches():
    """The second derivatives of each value, vectorized twice."""

    def derivatives(**options):
        def derivative(b):
            b.requires_grad_()  # else torch drops the tangent, of its own operators too
            return jacobian(lambda b: crop(SMALL_FEATURES[:, :1], b), b, create_graph=True, vectorize=bool(options))

        return jacobian(derivative, WITHIN.clone(), **options)

    jacobian = torch.autograd.functional.jacobian
    expected = derivatives()
    assert expected.abs().max() > 0.01
    for strategy in ("reverse-mode", "forward-mode"):
        torch.testing.assert_close(derivatives(vectorize=True, strategy=strategy), expected)


def test_batched_gradients_are_differentiated():
    def penalty(f, b, **options):
        output = crop(f, b).exp()
        grads = torch.linspace(-1, 1, 3 * output.numel(), dtype=output.dtype).reshape(3, *output.shape)
        if options:
            parts = torch.autograd.grad(output, (f, b), grads, create_graph=True, **options)
        else:
            each = [torch.autograd.grad(output, (f, b), grad, create_graph=True) for grad in grads]
            parts = [torch.stack(rows) for rows in zip(*each, strict=True)]
        return torch.autograd.grad(sum(part.square().sum() for part in parts), (f, b))

    inputs = [tensor.clone().requires_grad_() for tensor in (SMALL_FEATURES, WITHIN)]
    assert_same(penalty(*inputs, is_grads_batched=True), penalty(*inputs))


def test_batches_are_seen_from_another_thread():
    """From which backward calls on a GPU."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = []

        def look(tensor):
            found.append(pool.submit(batching.level, tensor).result())
            return tensor

        vmap = torch._vmap_internals._vmap
        vmap(vmap(look))(vmap(look)(torch.ones(2, 3, 4)))
    assert found == [1, 2]


# ---- what is kept ----


def test_features_are_kept_only_where_boxes_want_a_gradient():
    for wants, kept in ((False, False), (True, True)):
        f = features().clone().requires_grad_()
        memory = weakref.ref(f.untyped_storage())
        f = f * 1.0
        memory = weakref.ref(f)
        output = crop(f, BOXES.clone().requires_grad_(wants))
        del f
        saved = [t for t in output.grad_fn.saved_tensors if t is not None and t.dim() == 4]
        assert bool(saved) == kept
        if not kept:
            assert memory() is None
