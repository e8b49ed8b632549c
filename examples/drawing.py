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
    except ImportError:
        return np
    return cupy if cupy.cuda.is_available() else np


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
