"""Derivatives of crops along directions of the boxes: what second derivatives and forward mode are made of."""

import contextlib

import numpy as np
import pytest

from cupy_roialign import rule as rules
from cupy_roialign.cpu import backend as cpu
from cupy_roialign.rule import terms
from tests import backends, tolerance

RULES = {
    "roi_align": rules.roi_align((4, 5), 0.5, 2, aligned=True),
    "roi_align, adaptive": rules.roi_align((2, 3), columns=rules.BATCH_X1_Y1_X2_Y2),
    "roi_align, many bins": rules.roi_align((20, 18), 1.0, 1, aligned=True),
    "roi_crop": rules.roi_crop((4, 5), extrapolation_value=3.0),
    "roi_crop, corners": rules.roi_crop((1, 5), centers=False),
    "crop_and_resize": rules.crop_and_resize((4, 1), extrapolation_value=3.0),
    "nearest": rules.crop_and_resize((4, 3), nearest=True),
}


class Functions:
    """A backend's functions, or the family of torch's, with NumPy arrays in and out."""

    def __init__(self, call, to, back):
        self.call, self.to, self.back = call, to, back

    def __getattr__(self, name):
        return lambda *args: self.back(self.call(name, *map(self.convert, args)))

    def convert(self, value):
        if isinstance(value, list):
            return [self.convert(part) for part in value]
        return self.to(value) if isinstance(value, np.ndarray) else value


NAMES = {"forward": "crops", "feature_gradient": "to_features", "box_gradient": "to_boxes"}


def of_torch(kind, place):
    """What autograd calls in eager mode, and the operators of graphs."""
    torch = pytest.importorskip("torch")
    from cupy_roialign.arrays import ArraySpec
    from cupy_roialign.torch import eager, graph

    family = graph.FAMILY if kind == "graph" else eager.EAGER

    def call(name, *args):
        args = [*args] if isinstance(args[-1], list) else [*args, []]
        if name == "feature_gradient":
            args[1] = ArraySpec.of(args[1])
        with place():
            return getattr(family, NAMES[name])(*args)

    return Functions(call, torch.from_numpy, lambda tensor: tensor.numpy())


@pytest.fixture(
    params=[
        "plain",
        "compiled",
        "emulated",
        "torch",
        "graph",
        "emulated-torch",
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def functions(request):
    if request.param in ("plain", "compiled"):
        if request.param == "compiled":
            pytest.importorskip("numba")
        with backends.way(request.param):
            yield cpu
    elif request.param in ("emulated", "gpu"):
        cupy = request.getfixturevalue(request.param)
        from cupy_roialign.gpu import cupy_arrays

        yield Functions(lambda name, *args: getattr(cupy_arrays, name)(*args), cupy.asarray, lambda array: array.get())
    elif request.param == "emulated-torch":
        request.getfixturevalue("emulated")
        yield of_torch("torch", backends.EmulatedTorchBackend().device)
    else:
        yield of_torch(request.param, contextlib.nullcontext)


@pytest.fixture(params=[3, 20], ids=["few channels", "many channels"])
def channels(request):
    return request.param


@pytest.fixture(params=RULES)
def case(request, channels):
    """A rule, features, boxes, indices, a cotangent and two directions; float64."""
    rule = RULES[request.param]
    rng = np.random.default_rng(5)
    features = rng.standard_normal((2, channels, 17, 19)) + 4
    low = rng.uniform(-3, 12, (8, 2))
    boxes = np.concatenate([low, low + rng.uniform(2, 12, (8, 2))], axis=1)
    if rule.frame == rules.Frame.NORMALIZED:
        boxes /= 18
    boxes /= rule.spatial_scale
    indices = rng.integers(0, 2, 8)
    cotangent = rng.standard_normal((8, channels, *rule.bins))
    directions = list(rng.standard_normal((2, 8, 4)))
    if min(rule.columns) == 1:
        boxes, *directions = (np.concatenate([indices[:, None], rows], axis=1) for rows in (boxes, *directions))
    return rule, features, boxes, indices, cotangent, directions


def inner(a, b, rule=None):
    if rule is not None:  # a batch index column is no coordinate
        a, b = a[:, sorted(rule.columns)], b[:, sorted(rule.columns)]
    return float((np.asarray(a, np.float64) * b).sum())


def test_the_derivative_is_the_transpose_of_the_gradient(case, functions):
    rule, features, boxes, indices, cotangent, (u, v) = case
    taken = (boxes, indices, rule)
    along = functions.forward(features, *taken, [v])
    gradient = functions.box_gradient(cotangent, features, *taken)
    assert inner(cotangent, along) == pytest.approx(inner(v, gradient, rule), rel=1e-9, abs=1e-9)
    both = functions.forward(features, *taken, [u, v])
    gradient = functions.box_gradient(cotangent, features, *taken, [v])
    assert inner(cotangent, both) == pytest.approx(inner(u, gradient, rule), rel=1e-9, abs=1e-9)
    if rule.taps != rules.Taps.NEAREST:
        assert np.abs(along).max() > 0.1
        assert rule.bins == (1, 5) or np.abs(both).max() > 0.01
    else:
        assert not along.any()
        assert not both.any()


def test_features_and_their_gradient(case, functions):
    rule, features, boxes, indices, cotangent, directions = case
    for some in ([], directions[:1], directions):
        crops = functions.forward(features, boxes, indices, rule, some)
        gradient = functions.feature_gradient(cotangent, features, boxes, indices, rule, some)
        expected = inner(cotangent, crops)
        if not some:  # the value outside of the image is not the features'
            zero = functions.forward(np.zeros_like(features), boxes, indices, rule)
            expected -= inner(cotangent, zero)
        assert inner(features, gradient) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_differences(case, functions):
    """Central differences of the next lower derivative, but for boxes within reach of a kink."""
    rule, features, boxes, indices, _, (u, v) = case
    step = 1e-6
    for before, direction in (([], v), ([u], v)):
        sides = [
            functions.forward(features, boxes + sign * step * direction, indices, rule, before) for sign in (1, -1)
        ]
        middle = functions.forward(features, boxes, indices, rule, before)
        smooth = np.abs(sides[0] + sides[1] - 2 * middle) < 1e-7
        expected = (sides[0] - sides[1]) / (2 * step)
        actual = functions.forward(features, boxes, indices, rule, [*before, direction])
        assert smooth.mean() > 0.9
        np.testing.assert_allclose(actual[smooth], expected[smooth], atol=1e-6, rtol=1e-6)


def test_the_second_derivative_is_symmetric(case, functions):
    rule, features, boxes, indices, _, (u, v) = case
    a, b = (functions.forward(features, boxes, indices, rule, pair) for pair in ([u, v], [v, u]))
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_float32(case, functions):
    rule, features, boxes, indices, _, directions = case
    narrow = [a.astype(np.float32) for a in (features, boxes)]
    for some in (directions[:1], directions):
        light = [d.astype(np.float32) for d in some]
        actual = functions.forward(*narrow, indices, rule, light)
        expected = functions.forward(narrow[0].astype(np.float64), narrow[1], indices, rule, light)
        assert actual.dtype == np.float32
        tolerance.assert_close(actual, expected, 1e-5)


def test_infinite_pixels_keep_their_sign(functions):
    """A derivative has weights of both signs."""
    rule = rules.roi_crop((1, 1), centers=False)
    features = np.zeros((1, 1, 1, 6))
    features[..., 3] = np.inf
    right = np.array([[1.0, 0, 1, 0]])
    for x, expected in ((2.5, np.inf), (3.5, -np.inf), (4.5, 0)):
        boxes = np.array([[x, 0, x, 0]])
        assert functions.forward(features, boxes, np.array([0]), rule, [right]).item() == expected


def test_clamped_samples_have_no_derivative(functions):
    """Not even one that rounding leaves of changes that cancel."""
    rng = np.random.default_rng(7)
    features = np.full((1, 1, 3, 3), np.inf)
    rule = rules.roi_align((1, 1), 1.0, 7, aligned=True)
    boxes = np.tile([-0.4, -0.4, 0.4, 0.4], (50, 1))
    changes = rng.standard_normal((2, 50, 4))
    for some in (changes[:1], changes):
        assert not functions.forward(features, boxes, np.zeros(50, np.int64), rule, list(some)).any()


def test_terms():
    """A product of one factor of y and one of x: nothing is left after two."""
    assert terms(0) == ((None, None),)
    assert len(terms(1)) == len(terms(2)) == 2
    assert terms(3) == terms(4) == ()


def test_changes_of_float32_boxes_are_worked_out_in_the_precision_of_float64_features(functions):
    rng = np.random.default_rng(2)
    features, indices = rng.standard_normal((1, 2, 17, 19)), np.zeros(8, np.int64)
    low, *directions = rng.uniform(0, 9, (3, 8, 4)).astype(np.float32)
    boxes = low + np.float32([0, 0, 30, 30])
    rule = rules.roi_align((3, 4), 0.3, 2)
    for some in (directions[:1], directions):
        wide = [rows.astype(np.float64) for rows in (boxes, *some)]
        expected = functions.forward(features, wide[0], indices, rule, wide[1:])
        tolerance.assert_close(functions.forward(features, boxes, indices, rule, some), expected, 1e-13)
