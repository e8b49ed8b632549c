"""Speed workloads, numpy only. make(name) returns the arrays; the box generator is boxes().

Boxes are x1,y1,x2,y2 in image pixels, float32, wholly inside the image; width and height are
drawn independently, log-uniform between lo and hi (clipped to the image side)."""

import numpy as np

SPECS = {
    # name: input NCHW, image (h, w), K, box side px, scale, out, sampling_ratio, aligned, seed; operator, where it is
    # not roi_align: crop_and_resize reads the boxes, but neither scale, sampling_ratio nor aligned
    "W1": {
        "title": "FPN-P2 box head",
        "shape": (1, 256, 200, 272),
        "image": (800, 1088),
        "K": 512,
        "side": (16, 224),
        "scale": 1 / 4,
        "out": (7, 7),
        "sr": 2,
        "aligned": True,
        "seed": 101,
    },
    "W2": {
        "title": "mask head",
        "shape": (1, 256, 200, 272),
        "image": (800, 1088),
        "K": 100,
        "side": (16, 224),
        "scale": 1 / 4,
        "out": (14, 14),
        "sr": 2,
        "aligned": True,
        "seed": 102,
    },
    "W3": {
        "title": "C4 head, adaptive",
        "shape": (2, 1024, 50, 68),
        "image": (800, 1088),
        "K": 256,
        "side": (32, 600),
        "scale": 1 / 16,
        "out": (14, 14),
        "sr": 0,
        "aligned": True,
        "seed": 103,
    },
    "W4": {
        "title": "image crops 224x224",
        "shape": (4, 3, 1024, 1024),
        "image": (1024, 1024),
        "K": 64,
        "side": (64, 800),
        "scale": 1.0,
        "out": (224, 224),
        "sr": 1,
        "aligned": True,
        "seed": 104,
    },
    "W5": {
        "title": "small, latency",
        "shape": (1, 256, 50, 68),
        "image": (800, 1088),
        "K": 10,
        "side": (32, 600),
        "scale": 1 / 16,
        "out": (7, 7),
        "sr": 2,
        "aligned": True,
        "seed": 105,
    },
    "tiny": {
        "title": "one box, 8 channels",
        "shape": (1, 8, 20, 20),
        "image": (20, 20),
        "K": 1,
        "side": (8, 16),
        "scale": 1.0,
        "out": (7, 7),
        "sr": 2,
        "aligned": True,
        "seed": 106,
    },
    "large": {
        "title": "one box, 1/100 of a large image",
        "shape": (1, 64, 4096, 4096),
        "image": (4096, 4096),
        "K": 1,
        "side": (409.6, 409.6),
        "scale": 1.0,
        "out": (7, 7),
        "sr": 2,
        "aligned": True,
        "seed": 107,
    },
    "W4tf": {
        "title": "the same by crop_and_resize",
        "operator": "crop_and_resize",
        "shape": (4, 3, 1024, 1024),
        "image": (1024, 1024),
        "K": 64,
        "side": (64, 800),
        "scale": 1.0,
        "out": (224, 224),
        "sr": 1,
        "aligned": True,
        "seed": 104,
    },
    # W1 geometry at the TF Mask R-CNN crop size
    "W1tf": {
        "title": "W1 geometry, crop 14x14",
        "operator": "crop_and_resize",
        "shape": (1, 256, 200, 272),
        "image": (800, 1088),
        "K": 512,
        "side": (16, 224),
        "scale": 1 / 4,
        "out": (14, 14),
        "sr": 1,
        "aligned": True,
        "seed": 101,
    },
}


def boxes(K, image, side, rng):
    h, w = image
    s = np.exp(rng.uniform(np.log(side[0]), np.log(side[1]), (K, 2)))
    bw, bh = np.minimum(s[:, 0], w - 1), np.minimum(s[:, 1], h - 1)
    x1, y1 = rng.uniform(0, w - bw), rng.uniform(0, h - bh)
    return np.stack([x1, y1, x1 + bw, y1 + bh], 1).astype(np.float32)


def make(name, data=True):
    return draw(SPECS[name], data)


def draw(spec, data=True):
    p = {"operator": "roi_align", **spec}
    rng = np.random.default_rng(p["seed"])
    b = boxes(p["K"], p["image"], p["side"], rng)
    n = p["shape"][0]
    idx = np.sort(rng.integers(0, n, p["K"])).astype(np.int64)
    p["boxes"], p["batch_indices"] = b, idx
    p["rois"] = np.concatenate([idx[:, None].astype(np.float32), b], 1)  # torchvision layout (K, 5)
    h, w = p["image"]
    p["boxes_norm"] = np.ascontiguousarray(b[:, [1, 0, 3, 2]] / np.float32([h, w, h, w]))  # tf: y1,x1,y2,x2
    if data:
        p["input"] = rng.standard_normal(p["shape"], dtype=np.float32)  # NCHW
        p["cotangent"] = rng.standard_normal((p["K"], p["shape"][1], *p["out"]), dtype=np.float32)
    return p


def nhwc(a):
    return np.ascontiguousarray(a.transpose(0, 2, 3, 1))


def samples(p):
    """Bilinear samples per channel the workload asks for (x4 taps each)."""
    b = p["boxes"] * p["scale"]
    oh, ow = p["out"]
    gw = np.ceil((b[:, 2] - b[:, 0]) / ow) if p["sr"] <= 0 else np.full(len(b), p["sr"])
    gh = np.ceil((b[:, 3] - b[:, 1]) / oh) if p["sr"] <= 0 else np.full(len(b), p["sr"])
    return int((gw * gh * oh * ow).sum())


if __name__ == "__main__":
    for k in SPECS:
        p = make(k, data=False)
        out = p["K"] * p["shape"][1] * p["out"][0] * p["out"][1]
        print(
            k,
            p["title"],
            "input MB %.1f" % (np.prod(p["shape"]) * 4 / 1e6),
            "output MB %.1f" % (out * 4 / 1e6),
            "samples x channels %.1f M" % (samples(p) * p["shape"][1] / 1e6),
            "mean box px",
            (p["boxes"][:, 2:] - p["boxes"][:, :2]).mean(0).round(1),
        )
