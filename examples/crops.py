"""Crops boxes out of a photo in each dialect, and draws the boxes on the photo with the crops beside it.

    python examples/crops.py [--output PICTURE]

The photo is the cat that scikit-image ships.
"""

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Rectangle
from skimage import data

import cupy_roialign as cr

BOXES = {
    "face": (110, 24, 376, 290),
    "eye": (130, 82, 206, 150),
    "other eye": (296, 106, 356, 166),
    "nose": (222, 206, 306, 290),
}
COLORS = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7"]  # told apart by the colour-blind (Okabe and Ito)
SIZE = 20


def crop_in_every_dialect(image: np.ndarray, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """`image`: (N, C, H, W). `boxes`: (K, 4), x1, y1, x2, y2 in pixels, all in image 0."""
    height, width = image.shape[2:]
    indices = np.zeros(len(boxes), np.int64)
    x1, y1, x2, y2 = boxes.T
    normalised = np.stack([y1 / (height - 1), x1 / (width - 1), y2 / (height - 1), x2 / (width - 1)], axis=1)
    return {
        "crop_and_resize": cr.crop_and_resize(image, normalised, indices, SIZE),
        "crop_and_resize\nnearest": cr.crop_and_resize(image, normalised, indices, SIZE, method="nearest"),
        "roi_crop": cr.roi_crop(image, boxes, indices, SIZE),
        "roi_crop\ncorner to corner": cr.roi_crop(image, boxes, indices, SIZE, transform_fpcoor=False),
        "roi_align": cr.roi_align(image, boxes, SIZE, aligned=True, batch_indices=indices),
        "roi_align\nnot aligned": cr.roi_align(image, boxes, SIZE, aligned=False, batch_indices=indices),
    }


def draw(photo: np.ndarray, boxes: np.ndarray, crops: dict[str, np.ndarray], path: Path) -> None:
    figure = plt.figure(figsize=(12, 5.6), dpi=100, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    axes = left.subplots()
    axes.imshow(photo)
    axes.set(xlabel="x, pixels", ylabel="y, pixels")
    axes.set_title(f"{len(boxes)} boxes on a photo of {photo.shape[1]} x {photo.shape[0]}", fontsize=12)
    for (x1, y1, x2, y2), name, color in zip(boxes, BOXES, COLORS, strict=True):
        axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=2.5))
        label = {"facecolor": color, "edgecolor": "none", "pad": 2}
        axes.text(x1, y1 - 3, name, fontsize=10, color="black", bbox=label, verticalalignment="bottom")

    grid = right.subplots(len(boxes), len(crops))
    for column, (dialect, results) in enumerate(crops.items()):
        for row, (crop, color) in enumerate(zip(results, COLORS, strict=True)):
            cell = grid[row, column]
            cell.imshow(np.clip(crop.transpose(1, 2, 0) / 255, 0, 1), interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set(color=color, linewidth=2.5)
        grid[0, column].set_title(dialect, fontsize=9)
    right.suptitle(f"each as {SIZE} x {SIZE}", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/crops.png"), help="where to write the picture")
    path = parser.parse_args().output

    photo = data.cat()
    image = photo[None].transpose(0, 3, 1, 2)  # (1, 3, H, W), a view: nothing is copied
    boxes = np.array(list(BOXES.values()), np.float32)
    crop_in_every_dialect(image, boxes)  # once before the clock runs, as a program would that has many images
    start = time.perf_counter()
    crops = crop_in_every_dialect(image, boxes)
    took = time.perf_counter() - start

    print(f"photo      {photo.shape[1]} x {photo.shape[0]} pixels, {photo.dtype}")
    for name, box in BOXES.items():
        print(f"box        {name}: x {box[0]} to {box[2]}, y {box[1]} to {box[3]}")
    for dialect, results in crops.items():
        name = dialect.replace("\n", ", ")
        print(f"crops      {name:<28} {results.shape}, {results.dtype}, mean {results.mean():.1f}")
    print(f"time       {took * 1e3:.1f} ms for all {sum(map(len, crops.values()))} crops, on the CPU")
    draw(photo, boxes, crops, path)
    print(f"picture    {path.resolve()}")


if __name__ == "__main__":
    main()
