"""The workloads, by NumPy alone: `make` returns their arrays.

Boxes lie within the image; width and height are drawn independently, evenly on a logarithmic scale between the two
numbers of `side`, in pixels of the image.
"""

import numpy as np


def _spec(title, shape, image, K, side, scale, out, sr, seed, operator="roi_align"):
    """`shape` is that of the features; `crop_and_resize` reads the boxes, but neither scale nor sr."""
    return {
        "title": title,
        "operator": operator,
        "shape": shape,
        "image": image,
        "K": K,
        "side": side,
        "scale": scale,
        "out": out,
        "sr": sr,
        "aligned": True,
        "seed": seed,
    }


_PHOTOS = ((4, 3, 1024, 1024), (1024, 1024), 64, (64, 800), 1.0, (224, 224), 1, 104)

SPECS = {
    "W1": _spec("box head", (1, 256, 200, 272), (800, 1088), 512, (16, 224), 1 / 4, (7, 7), 2, 101),
    "W2": _spec("mask head", (1, 256, 200, 272), (800, 1088), 100, (16, 224), 1 / 4, (14, 14), 2, 102),
    "W3": _spec("1,024 channels", (2, 1024, 50, 68), (800, 1088), 256, (32, 600), 1 / 16, (14, 14), 0, 103),
    "W4": _spec("crops of photos", *_PHOTOS),
    "W4tf": _spec("the same by crop_and_resize", *_PHOTOS, "crop_and_resize"),
    "W5": _spec("10 boxes", (1, 256, 50, 68), (800, 1088), 10, (32, 600), 1 / 16, (7, 7), 2, 105),
    "W6": _spec("5,000 small crops", (1, 3, 512, 512), (512, 512), 5000, (8, 64), 1.0, (7, 7), 2, 106),
    "W7": _spec("mask targets", (200, 1, 56, 56), (56, 56), 200, (6, 56), 1.0, (28, 28), 1, 107),
    "W8": _spec("box head, 100 boxes", (1, 256, 200, 272), (800, 1088), 100, (16, 224), 1 / 4, (7, 7), 2, 101),
    "tiny": _spec("one small box", (1, 8, 32, 32), (32, 32), 1, (10, 20), 1.0, (7, 7), 2, 108),
    "large": _spec("one box of a large image", (1, 64, 2048, 2048), (2048, 2048), 1, (205, 205), 1.0, (7, 7), 2, 107),
}

GPU_SPECS = {
    **SPECS,
    # boxes that crowd a corner of the image, and so many boxes that finding those of a tile takes a while
    "crowd": {**SPECS["W1"], "title": "5,000 boxes in one corner", "K": 5000, "image": (230, 230)},
    "many": {**SPECS["W1"], "title": "100,000 boxes, 16 channels", "K": 100_000, "shape": (1, 16, 200, 272)},
}


def boxes(K, image, side, rng):
    """(K, 4) x1, y1, x2, y2 in pixels of the image, float32."""
    h, w = image
    s = np.exp(rng.uniform(np.log(side[0]), np.log(side[1]), (K, 2)))
    bw, bh = np.minimum(s[:, 0], w - 1), np.minimum(s[:, 1], h - 1)
    x1, y1 = rng.uniform(0, w - bw), rng.uniform(0, h - bh)
    return np.stack([x1, y1, x1 + bw, y1 + bh], 1).astype(np.float32)


def make(name):
    return draw(SPECS[name])


def draw(spec):
    """A spec, and its arrays; the same ones each time."""
    rng = np.random.default_rng(spec["seed"])
    b = boxes(spec["K"], spec["image"], spec["side"], rng)
    indices = np.sort(rng.integers(0, spec["shape"][0], spec["K"])).astype(np.int64)
    h, w = spec["image"]
    return {
        **spec,
        "boxes": b,
        "batch_indices": indices,
        "rois": np.concatenate([indices[:, None].astype(np.float32), b], 1),  # torchvision's (K, 5)
        "boxes_norm": np.ascontiguousarray(
            b[:, [1, 0, 3, 2]] / np.float32([h, w, h, w])
        ),  # TensorFlow's y1, x1, y2, x2
        "input": rng.standard_normal(spec["shape"], dtype=np.float32),
        "cotangent": rng.standard_normal((spec["K"], spec["shape"][1], *spec["out"]), dtype=np.float32),
    }


def nhwc(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))
