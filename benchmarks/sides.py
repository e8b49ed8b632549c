"""Who takes part: this package in each of its ways, and every peer that is installed.

Each is given a workload's arrays. Peers are called below what they have for autograd, which costs them a little more.
"""

import functools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import cupy_roialign as cr
from benchmarks import workloads
from cupy_roialign import operators
from cupy_roialign.cpu import backend, plain

STEPS = ("forward", "feature gradient", "box gradient")
OURS = ("compiled, NCHW", "compiled, channels-last", "plain, NCHW", "plain, channels-last")
PEERS = ("torchvision", "onnxruntime", "TensorFlow", "OpenCV")


@dataclass
class Side:
    name: str
    steps: dict[str, Callable[[], Any]]  # some of STEPS
    array: Callable[[Any], np.ndarray] = np.asarray  # of what a step returns, (., C, ., .) if it has four axes
    prepare: Callable[[], None] = lambda: None  # before each turn
    compared: bool = True  # whether its results are to be those of the others


@functools.cache
def _ways():
    """The ways of the CPU that there are."""
    if backend.not_compiled():
        return {"plain": plain}
    from cupy_roialign.cpu import compiled

    return {"compiled": compiled, "plain": plain}


def versions():
    found = {"cupy_roialign": cr.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return found | ({"numba": _ways()["compiled"].machine_code.numba.__version__} if "compiled" in _ways() else {})


def _use(way, threads):
    backend._way = lambda: way
    cr.set_num_threads(threads)


def _steps(p, features, cotangent):
    if p["operator"] == "crop_and_resize":
        arguments = (features, p["boxes_norm"], p["batch_indices"], p["out"])
        forward = functools.partial(cr.crop_and_resize, *arguments)
        request = operators._crop_and_resize(*arguments, "bilinear", 0.0).request
    else:
        arguments = (features, p["rois"], p["out"], p["scale"], p["sr"], p["aligned"])
        forward = functools.partial(cr.roi_align, *arguments)
        request = operators._roi_align(*arguments, None).request
    return {
        "forward": forward,
        "feature gradient": lambda: backend.feature_gradient(cotangent, *request),
        "box gradient": lambda: backend.box_gradient(cotangent, *request),
    }


def ours(p, threads):
    last = (workloads.nhwc(p[name]).transpose(0, 3, 1, 2) for name in ("input", "cotangent"))
    steps = {"NCHW": _steps(p, p["input"], p["cotangent"]), "channels-last": _steps(p, *last)}
    sides = []
    for name in OURS:
        way, layout = name.split(", ")
        if way in _ways():
            sides.append(Side(name, steps[layout], prepare=functools.partial(_use, _ways()[way], threads)))
    return sides


class Torchvision:
    """Reads NCHW only; has no gradient to the boxes."""

    name = "torchvision"

    def __init__(self, threads):
        import torchvision  # first: it is the one that is often not there, and torch takes seconds

        # isort: split
        import torch

        torch.set_num_threads(threads)
        self.torch, self.roi_align = torch, torchvision.ops.roi_align
        self.versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}

    def side(self, p):
        if p["operator"] != "roi_align":
            return None
        features, rois, cotangent = map(self.torch.from_numpy, (p["input"], p["rois"], p["cotangent"]))
        backward = self.torch.ops.torchvision._roi_align_backward
        options = (p["scale"], *p["out"], *p["input"].shape, p["sr"], p["aligned"])
        steps = {
            "forward": lambda: self.roi_align(features, rois, p["out"], p["scale"], p["sr"], p["aligned"]),
            "feature gradient": lambda: backward(cotangent, rois, *options),
        }
        return Side(self.name, steps)


class OnnxRuntime:
    """Reads NCHW only; has no gradients."""

    name = "onnxruntime"

    def __init__(self, threads):
        import onnx
        import onnxruntime

        self.onnx, self.onnxruntime, self.threads = onnx, onnxruntime, threads
        self.versions = {"onnxruntime": onnxruntime.__version__}

    def side(self, p):
        if p["operator"] != "roi_align":
            return None
        arrays = {"X": p["input"], "rois": p["boxes"], "batch_indices": p["batch_indices"]}
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        # its threads would go on waiting, busily, in the turns of others
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = self.onnxruntime.InferenceSession(
            self._model(p, arrays).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return Side(self.name, {"forward": lambda: session.run(None, arrays)}, array=lambda outputs: outputs[0])

    def _model(self, p, arrays):
        helper = self.onnx.helper
        mode = "half_pixel" if p["aligned"] else "output_half_pixel"
        node = helper.make_node(
            "RoiAlign",
            list(arrays),
            ["Y"],
            mode="avg",
            coordinate_transformation_mode=mode,
            output_height=p["out"][0],
            output_width=p["out"][1],
            sampling_ratio=max(p["sr"], 0),
            spatial_scale=p["scale"],
        )
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in arrays.items()
        ]
        output = helper.make_tensor_value_info("Y", self.onnx.TensorProto.FLOAT, p["cotangent"].shape)
        graph = helper.make_graph([node], "roi_align", inputs, [output])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)


class TensorFlow:
    """Reads NHWC only, and is given that, which no clock counts; as many threads as its process began with."""

    name = "TensorFlow"

    def __init__(self, threads):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import tensorflow

        config = tensorflow.config
        config.threading.set_intra_op_parallelism_threads(threads)
        config.threading.set_inter_op_parallelism_threads(threads)
        config.set_visible_devices([], "GPU")
        self.tensorflow = tensorflow
        self.versions = {"tensorflow": tensorflow.__version__}

    def side(self, p):
        if p["operator"] != "crop_and_resize":
            return None
        arrays = (workloads.nhwc(p["input"]), workloads.nhwc(p["cotangent"]), p["boxes_norm"])
        image, grads, boxes = map(self.tensorflow.constant, arrays)
        indices = self.tensorflow.constant(p["batch_indices"].astype(np.int32))
        size = self.tensorflow.constant(p["out"])
        raw = self.tensorflow.raw_ops
        common = {"boxes": boxes, "box_ind": indices}
        steps = {
            "forward": lambda: raw.CropAndResize(image=image, crop_size=size, **common),
            "feature gradient": lambda: raw.CropAndResizeGradImage(
                grads=grads, image_size=image.shape, T=image.dtype, **common
            ),
            "box gradient": lambda: raw.CropAndResizeGradBoxes(grads=grads, image=image, **common),
        }

        def array(result):
            result = result.numpy()
            return result.transpose(0, 3, 1, 2) if result.ndim == 4 else result

        return Side(self.name, steps, array)


class OpenCV:
    """Pictures and masks: crops of whole pixels, resized one by one into new memory. It reads NHWC.

    Its samples are not the same ones: boxes are rounded, a bin has one sample, and none lies outside of the box's
    pixels. So its results are not compared.
    """

    name = "OpenCV"

    def __init__(self, threads):
        import cv2

        cv2.setNumThreads(threads)
        self.cv2 = cv2
        self.versions = {"opencv": cv2.__version__}

    def side(self, p):
        if p["operator"] != "roi_align" or p["input"].shape[1] > 4:
            return None
        images, (h, w) = workloads.nhwc(p["input"]), p["out"]
        edges = np.rint(p["boxes"] * p["scale"]).astype(int)
        edges[:, :2] = np.minimum(edges[:, :2], np.array(images.shape[2:0:-1]) - 1)
        edges[:, 2:] = np.maximum(edges[:, 2:], edges[:, :2] + 1)
        places = [
            (image, slice(y1, y2), slice(x1, x2))
            for image, (x1, y1, x2, y2) in zip(p["batch_indices"].tolist(), edges.tolist(), strict=True)
        ]
        resize = self.cv2.resize

        def forward():
            crops = np.empty((len(places), h, w, images.shape[3]), np.float32)
            for crop, place in zip(crops, places, strict=True):
                resize(images[place], (w, h), dst=crop)
            return crops

        return Side(self.name, {"forward": forward}, lambda crops: crops.transpose(0, 3, 1, 2), compared=False)


def installed(threads, kinds=(Torchvision, OnnxRuntime, TensorFlow, OpenCV)):
    """Peers, with so many threads, and {name: why it does not take part}."""
    peers, absent = [], {}
    if why := backend.not_compiled():
        absent["the compiled way"] = why
    for peer in kinds:
        try:
            peers.append(peer(threads))
        except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: torchvision is of another torch
            absent[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return peers, absent
