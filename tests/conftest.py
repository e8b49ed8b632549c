"""Backends that one body of tests runs on, and what is common to all test files."""

import os

import hypothesis
import numpy as np
import pytest

import cupy_roialign as cr

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=int(os.environ.get("CUPY_ROIALIGN_EXAMPLES", 100))
)
hypothesis.settings.load_profile("default")


class NumpyBackend:
    """Calls with NumPy arrays in and out; a test written for this runs on any backend."""

    name = "numpy"

    def vjp(self, operator, features, boxes, *args, cotangent=None, **kwargs):
        """Output, gradient to the features and to the boxes (None without a cotangent)."""
        output, pullback = cr.vjp(operator, features, boxes, *args, **kwargs)
        return (output, *(pullback(cotangent) if cotangent is not None else (None, None)))

    def __call__(self, operator, *args, **kwargs):
        return operator(*args, **kwargs)


class TorchBackend:
    """The same through tensors and autograd. Integer features have no gradient in autograd: None."""

    name = "torch"

    def __init__(self):
        self.torch = pytest.importorskip("torch")

    def tensor(self, array):
        """Shares memory, strides included, where torch can: not for negative strides or swapped bytes."""
        array = np.asarray(array)
        if not array.dtype.isnative or any(s < 0 for s in array.strides):
            array = np.array(array, array.dtype.newbyteorder("="))
        if not array.flags.writeable:
            array = array.copy(order="K")
        return self.torch.from_numpy(array)

    def convert(self, value):
        if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
            return [self.tensor(part) for part in value]
        return self.tensor(value) if isinstance(value, np.ndarray) else value

    def vjp(self, operator, features, boxes, *args, cotangent=None, **kwargs):
        args, kwargs = [self.convert(a) for a in args], {k: self.convert(v) for k, v in kwargs.items()}
        features, boxes = self.convert(features), self.convert(boxes)
        leaves = [features, *(boxes if isinstance(boxes, list) else [boxes])]
        for leaf in leaves:
            leaf.requires_grad_(leaf.dtype.is_floating_point)
        output = operator(features, boxes, *args, **kwargs)
        gradients = [None, None]
        if cotangent is not None:
            output.backward(self.tensor(cotangent).to(output.dtype))
            grads = [None if leaf.grad is None else leaf.grad.numpy() for leaf in leaves]
            gradients = [grads[0], grads[1:] if isinstance(boxes, list) else grads[1]]
        return (output.detach().numpy(), *gradients)

    def __call__(self, operator, *args, **kwargs):
        args, kwargs = [self.convert(a) for a in args], {k: self.convert(v) for k, v in kwargs.items()}
        return operator(*args, **kwargs).numpy()


BACKENDS = {"numpy": NumpyBackend, "torch": TorchBackend}


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request):
    return BACKENDS[request.param]()
