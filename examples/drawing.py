"""What the notebooks draw with: one style, boxes on photos, crops in a row. The operators are called in the notebooks.

Pictures are drawn with pixel 0 reaching from 0 to 1, so that boxes in pixels are drawn where they are.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Told apart by the colour-blind (Okabe and Ito).
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777"
COLORS = (ORANGE, SKY, GREEN, PINK)

plt.rcParams.update(
    {
        "figure.dpi": 90,
        "figure.constrained_layout.use": True,
        "font.size": 12,
        "axes.titlesize": 13,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2.5,
        "legend.frameon": False,
    }
)


def array_library() -> ModuleType:
    """CuPy where it finds a GPU, else NumPy."""
    try:
        import cupy

        return cupy if cupy.cuda.is_available() else np
    except Exception:  # of CuPy 13 where there is no driver; and where there is no CuPy
        return np


def torch_device() -> str:
    """The GPU where torch and CuPy, which compiles the kernels, both find it; else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() and array_library() is not np else "cpu"


def on_cpu(array: Any) -> np.ndarray:
    """An array or a tensor, wherever it is, as NumPy's."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    return array.get() if hasattr(array, "get") else np.asarray(array)


def show(axes: Axes, image: Any, title: str = "", **options: Any) -> None:
    """(H, W), (H, W, 3) or (C, H, W) pixels, colours from 0 to 1."""
    pixels = on_cpu(image)
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.dtype != np.uint8:
        pixels = pixels.clip(0, 1)
    height, width = pixels.shape[:2]
    axes.imshow(pixels, **{"extent": (0, width, height, 0), "interpolation": "nearest", **options})
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(True)


def box(axes: Axes, corners: Iterable[float], color: str, label: str = "", **options: Any) -> None:
    """A box x1, y1, x2, y2, with a label on its upper edge."""
    x1, y1, x2, y2 = (float(corner) for corner in corners)
    options = {"linewidth": 2.5, **options}
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, **options))
    if label:
        back = {"facecolor": color, "edgecolor": "none", "pad": 2}
        bottom, top = axes.get_ylim()
        side = "top" if y1 - top < 0.08 * (bottom - top) else "bottom"  # below the edge where there is no room above
        axes.text(x1, y1, label, fontsize=11, color="black", bbox=back, verticalalignment=side, clip_on=True)


def edge_arrows(axes: Axes, corners: Any, moves: Any, color: str) -> None:
    """From the middle of each edge of a box x1, y1, x2, y2: how far it moves, in pixels of the photo."""
    x1, y1, x2, y2 = on_cpu(corners)
    by_x1, by_y1, by_x2, by_y2 = on_cpu(moves)
    style = {"arrowstyle": "-|>,head_width=0.3,head_length=0.45", "linewidth": 4, "shrinkA": 0, "shrinkB": 0}
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    for start, end in (
        ((x1, y), (x1 + by_x1, y)),
        ((x, y1), (x, y1 + by_y1)),
        ((x2, y), (x2 + by_x2, y)),
        ((x, y2), (x, y2 + by_y2)),
    ):
        axes.annotate("", end, start, arrowprops={**style, "color": color})


def frame(axes: Axes, color: str) -> None:
    axes.spines[:].set(visible=True, color=color, linewidth=3)


def row(images: Sequence[Any], titles: Sequence[str], colors: Sequence[str] = (), height: float = 2.4) -> Figure:
    """Pictures side by side."""
    figure, cells = plt.subplots(1, len(images), figsize=(11, height), squeeze=False)
    for number, (cell, image, title) in enumerate(zip(cells[0], images, titles, strict=True)):
        show(cell, image, title)
        if colors:
            frame(cell, colors[number])
    return figure


def pixel_grid(axes: Axes, height: int, width: int, centers: bool = True) -> None:
    """The edges of pixels as lines, their centres as small crosses."""
    for x in range(width + 1):
        axes.plot([x, x], [0, height], color="#CCCCCC", linewidth=1, zorder=0)
    for y in range(height + 1):
        axes.plot([0, width], [y, y], color="#CCCCCC", linewidth=1, zorder=0)
    if centers:
        y, x = np.mgrid[:height, :width] + 0.5
        axes.plot(x.ravel(), y.ravel(), "+", color="#999999", markersize=6, markeredgewidth=1, zorder=1)
    axes.set(xlim=(-0.05, width + 0.05), ylim=(height + 0.05, -0.05), aspect="equal", xlabel="x", ylabel="y")
    axes.set(xticks=range(width + 1), yticks=range(height + 1))


# ---- what only the first notebook draws ----


def boxes_and_crops(photo: Any, boxes: Any, crops: Any, names: Sequence[str]) -> None:
    """Four boxes on a photo, and their crops beside it."""
    left, right = plt.figure(figsize=(11, 5.2)).subfigures(1, 2, width_ratios=(1.05, 1))
    axes = left.subplots()
    show(axes, photo, f"{len(names)} boxes on a photo")
    for corners, crop, name, color, cell in zip(
        on_cpu(boxes), on_cpu(crops), names, COLORS, right.subplots(2, 2).flat, strict=True
    ):
        box(axes, corners, color, name)
        show(cell, crop, f"{name}, {crop.shape[1]} x {crop.shape[2]}")
        frame(cell, color)


def bins_and_samples(size: tuple[int, int], corners: Any, bins: tuple[int, int], xs: Any, ys: Any) -> None:
    """A box on a grid of pixels, with its bins and samples."""
    _, axes = plt.subplots(figsize=(8.5, 5.6))
    pixel_grid(axes, *size)
    x1, y1, x2, y2 = on_cpu(corners)
    dashed = {"color": ORANGE, "linewidth": 1.5, "linestyle": "--"}
    for x in np.linspace(x1, x2, bins[1] + 1)[1:-1]:
        axes.plot([x, x], [y1, y2], **dashed)
    for y in np.linspace(y1, y2, bins[0] + 1)[1:-1]:
        axes.plot([x1, x2], [y, y], **dashed)
    box(axes, (x1, y1, x2, y2), ORANGE)
    axes.plot(np.ravel(xs), np.ravel(ys), "o", color=BLUE, markersize=8)
    label = {"fontsize": 14, "arrowprops": {"arrowstyle": "-"}, "bbox": {"facecolor": "white", "edgecolor": "none"}}
    axes.annotate("box", (2.2, y1), (2.4, 0.4), color=ORANGE, **label)
    axes.annotate("sample", (xs[0, 4], ys[0, 4]), (6.7, 0.4), color=BLUE, **label)
    axes.annotate("bin", (5.7, 4.9), (5.05, 5.65), color=ORANGE, **label)
    axes.annotate("pixel centre", (0.5, 4.5), (0.15, 5.65), color=GREY, **label)
    axes.set_title(f"one box, {bins[0]} x {bins[1]} bins, with 2 x 2 samples in each")


def weights_of_sample(axes: Axes, weights: np.ndarray, x: float, y: float) -> None:
    """Four pixel centres around a sample, each with its weight, and the area of that size in its colour."""
    column, row = int(x - 0.5), int(y - 0.5)
    for i in range(2):
        for j in range(2):
            color = COLORS[2 * i + j]
            center = (column + 0.5 + j, row + 0.5 + i)
            opposite = (column + 1.5 - j, row + 1.5 - i)
            axes.fill([x, opposite[0], opposite[0], x], [y, y, opposite[1], opposite[1]], color=color, alpha=0.45, lw=0)
            axes.plot(*center, "s", color=color, markersize=18)
            weight, dx, side = f"{weights[row + i, column + j]:.2f}", *((0.13, "left") if j else (-0.13, "right"))
            axes.text(center[0] + dx, center[1], weight, ha=side, va="center", fontsize=15)
    axes.plot(x, y, "o", color=BLUE, markersize=13)
    axes.set(xlim=(column, column + 2), ylim=(row + 1.8, row + 0.2), aspect="equal", xlabel="x", ylabel="y")
    axes.set(xticks=[column + 0.5, column + 1.5], yticks=[row + 0.5, row + 1.5])
    axes.set_title("one sample: weight = opposite area")


def weights_of_bin(axes: Axes, weights: np.ndarray, corners: Any, bin: Any) -> None:
    """The weights of a bin as numbers in the pixels, with the box and the bin x1, y1, x2, y2."""
    height, width = weights.shape
    show(axes, np.where(weights > 0, weights, np.nan), cmap="Blues", vmin=0, vmax=0.3)
    pixel_grid(axes, height, width, centers=False)
    for (i, j), weight in np.ndenumerate(weights):
        if weight > 0:
            axes.text(j + 0.5, i + 0.5, f"{weight:.2f}", ha="center", va="center", fontsize=13)
    box(axes, on_cpu(corners), ORANGE)
    box(axes, on_cpu(bin), ORANGE, linestyle="--", linewidth=2)
    axes.spines[:].set_visible(False)
    axes.set_title("one bin: the average of its samples")


def rounding(photo: Any, corners: Any, rounded: Any, stride: int, slides: Any, middles: tuple[Any, Any]) -> None:
    """A box and its rounded self on a photo, and where along x both look as they slide."""
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=(1, 1.3))
    show(left, photo, f"stride {stride}")
    left.set(xlim=(96, 256), ylim=(464, 304))
    for line in range(96, 465, stride):
        left.axvline(line, color="white", linewidth=0.8, alpha=0.7)
        left.axhline(line, color="white", linewidth=0.8, alpha=0.7)
    box(left, corners, "white", "the box", linewidth=3)
    box(left, rounded, SKY, linewidth=3, linestyle="--")
    label = {"facecolor": SKY, "edgecolor": "none", "pad": 2}
    left.text(rounded[2], rounded[3], "rounded", fontsize=11, ha="right", va="top", bbox=label)
    right.plot(slides, middles[0], color="black")
    right.plot(slides, middles[1], color=SKY)
    right.text(35, 212, "RoIAlign", color="black", ha="right", fontsize=14)
    right.text(46, 205, "rounded", color=SKY, ha="left", va="top", fontsize=14)
    right.set(xlabel="the box has moved by, pixels", ylabel="middle of what the crop shows, pixels")
    right.set(title="a box that slides to the right", xticks=range(0, 65, stride))


def half_a_pixel(photo: Any, corners: Any, crops: dict[bool, Any], seen: dict[bool, np.ndarray]) -> None:
    """A box on a photo, where its aligned crop and the other look, and both, with a cross in the middle."""
    _, (left, *cells) = plt.subplots(1, 3, figsize=(11, 3.9), width_ratios=(1.35, 1, 1))
    show(left, photo, "the eye, and where each crop looks")
    left.set(xlim=(80, 272), ylim=(200, 40))
    for (aligned, crop), color, cell in zip(crops.items(), (SKY, ORANGE), cells, strict=True):
        box(left, on_cpu(corners) + np.tile(seen[aligned] - seen[True], 2), color, linewidth=3)
        show(cell, crop, f"aligned={aligned}")
        frame(cell, color)
        cell.axvline(crop.shape[2] / 2, color="white", linewidth=1)
        cell.axhline(crop.shape[1] / 2, color="white", linewidth=1)
