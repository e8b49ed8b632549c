"""Backends that one body of tests runs on: NumPy arrays in and out."""

import contextlib
import unittest.mock

import numpy as np
import pytest

import cupy_roialign as cr
from cupy_roialign.cpu import backend, plain
from tests import emulate

try:
    from ml_dtypes import bfloat16
except ImportError:  # NumPy has none of its own, and a machine with a GPU need not have it
    bfloat16 = None


class NumpyBackend:
    """Calls with NumPy arrays in and out, one of the two ways of the CPU; a test for this runs on any backend."""

    orders = ("channels-last", "transposed", "negative", "sliced", "swapped", "unaligned", "read-only")
    """Of tests.test_oracle.ORDERS those that reach the operators as they are, and differ from the contiguous order."""

    def __init__(self, name):
        self.name = name
        if name == "compiled":
            pytest.importorskip("numba")

    def way(self):
        """Within it all calls on the CPU take this way."""
        return way(self.name)

    def vjp(self, operator, features, boxes, *args, cotangent=None, **kwargs):
        """Output, gradient to the features and to the boxes (None without a cotangent)."""
        with self.way():
            output, pullback = cr.vjp(operator, features, boxes, *args, **kwargs)
            return (output, *(pullback(cotangent) if cotangent is not None else (None, None)))

    def __call__(self, operator, *args, **kwargs):
        with self.way():
            return operator(*args, **kwargs)


def way(name):
    """Calls on the CPU take the plain or the compiled way."""
    if name == "compiled":
        from cupy_roialign.cpu import compiled as module
    else:
        module = plain
    return unittest.mock.patch.object(backend, "_way", return_value=module)


def view(cupy, array):
    """A NumPy array, or CuPy's, as a kernel sees it."""
    from cupy_roialign.gpu.cupy_arrays import CupyBackend

    array = cupy.asarray(array) if isinstance(array, np.ndarray) else array
    return CupyBackend().view(*CupyBackend().layout(array), array.shape, array.dtype)


class ElsewhereBackend:
    """NumPy arrays go over as what `tensor` makes of them, alone or in a list."""

    def convert(self, value):
        if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
            return [self.tensor(part) for part in value]
        return self.tensor(value) if isinstance(value, np.ndarray) else value

    def options(self, args, kwargs):
        return [self.convert(a) for a in args], {k: self.convert(v) for k, v in kwargs.items()}


class TorchBackend(ElsewhereBackend):
    """The same through tensors and autograd. Integer features have no gradient in autograd: None."""

    name = "torch"
    orders = ("channels-last", "transposed", "sliced", "unaligned")

    def __init__(self):
        self.torch = pytest.importorskip("torch")

    def tensor(self, array):
        """Shares memory, strides included, where torch can: not for negative strides or swapped bytes."""
        array = np.asarray(array)
        if not array.dtype.isnative or any(s < 0 for s in array.strides):
            array = np.array(array, array.dtype.newbyteorder("="))
        if not array.flags.writeable:
            array = array.copy(order="K")
        if array.dtype.name == "bfloat16":  # which NumPy has from a package, and torch of its own
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def array(self, tensor):
        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.int16).numpy().view(bfloat16)
        return tensor.numpy()

    def vjp(self, operator, features, boxes, *args, cotangent=None, **kwargs):
        args, kwargs = self.options(args, kwargs)
        features, boxes = self.convert(features), self.convert(boxes)
        leaves = [features, *(boxes if isinstance(boxes, list) else [boxes])]
        for leaf in leaves:
            leaf.requires_grad_(leaf.dtype.is_floating_point)
        output = operator(features, boxes, *args, **kwargs)
        gradients = [None, None]
        if cotangent is not None:
            output.backward(self.tensor(cotangent).to(output.dtype))
            grads = [None if leaf.grad is None else self.array(leaf.grad) for leaf in leaves]
            gradients = [grads[0], grads[1:] if isinstance(boxes, list) else grads[1]]
        return (self.array(output.detach()), *gradients)

    def __call__(self, operator, *args, **kwargs):
        args, kwargs = self.options(args, kwargs)
        return self.array(operator(*args, **kwargs))


class CupyBackend(ElsewhereBackend):
    """CuPy arrays on a GPU."""

    name = "cupy"
    orders = ("channels-last", "transposed", "negative", "sliced")

    def __init__(self, cupy):
        self.cupy = cupy

    def installed(self):
        return contextlib.nullcontext()

    def memory(self, array):
        """Bytes in the GPU's memory."""
        return self.cupy.asarray(array).data

    def tensor(self, array):
        """On the device, with the same strides; in the machine's byte order and aligned, as all is there."""
        if not array.dtype.isnative or not array.flags.aligned:
            array = np.array(array, array.dtype.newbyteorder("="))
        if not array.size:
            return self.cupy.asarray(array)
        before = -sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True) if step < 0)
        after = sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True) if step > 0)
        span = np.full(before + after + array.itemsize, 0xFF, np.uint8)  # what a kernel must not read is NaN
        np.ndarray(array.shape, array.dtype, span, before, array.strides)[...] = array
        return self.cupy.ndarray(array.shape, array.dtype, self.memory(span) + before, array.strides)

    def array(self, tensor):
        """In the order that it has on the device: `get` makes C's of it."""
        order = np.argsort([-stride for stride in tensor.strides], kind="stable")
        return tensor.transpose(order.tolist()).get().transpose(np.argsort(order))

    def vjp(self, operator, features, boxes, *args, cotangent=None, **kwargs):
        with self.installed():
            args, kwargs = self.options(args, kwargs)
            output, pullback = cr.vjp(operator, self.convert(features), self.convert(boxes), *args, **kwargs)
            if cotangent is None:
                return self.array(output), None, None
            grad_features, grad_boxes = pullback(self.tensor(cotangent))
            is_list = isinstance(grad_boxes, list)
            grad_boxes = [self.array(part) for part in grad_boxes] if is_list else self.array(grad_boxes)
            return self.array(output), self.array(grad_features), grad_boxes

    def __call__(self, operator, *args, **kwargs):
        with self.installed():
            args, kwargs = self.options(args, kwargs)
            return self.array(operator(*args, **kwargs))


class EmulatedBackend(CupyBackend):
    """CuPy's backend on the emulated device: the launch code and the kernels as they are."""

    name = "emulated"

    def installed(self):
        return emulate.installed()


class CudaTorchBackend(TorchBackend):
    """Tensors on a GPU, with the strides that they have on the CPU."""

    name = "torch on a GPU"
    orders = ("channels-last", "transposed", "sliced")

    def tensor(self, array):
        tensor = super().tensor(array)
        if tensor.numel() == 0:
            return tensor.cuda()
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.as_strided((span,), (1,)).cuda().as_strided(tensor.shape, tensor.stride())

    def array(self, tensor):
        return super().array(tensor.cpu())


class EmulatedTorchBackend(TorchBackend):
    """What is done with CUDA tensors, done with the CPU's, whose memory the emulated device shares."""

    name = "torch on the emulated device"

    @contextlib.contextmanager
    def device(self, stream=lambda: 0):
        """Torch's current stream is what `stream` gives, called in the thread that asks."""
        from cupy_roialign.torch import private, tensors

        with emulate.installed(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensors, "on_cpu", lambda tensor: False)
            patch.setattr(private, "current_stream", lambda device: stream())
            yield

    def vjp(self, *args, **kwargs):
        with self.device():
            return super().vjp(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        with self.device():
            return super().__call__(*args, **kwargs)
