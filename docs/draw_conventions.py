"""Draws the pictures of conventions.md.

    python docs/draw_conventions.py [--output FOLDER]

Nothing is drawn from a formula: an image whose pixels hold the number of their column is cropped, and what comes out is
where the library took its samples.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import cupy_roialign as cr

ORANGE, SKY, GREEN, BLUE, RED = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"  # Okabe and Ito
BATCH = np.array([0])
STYLE = {"font.size": 11, "svg.hashsalt": "cupy_roialign", "axes.spines.top": False, "axes.spines.right": False}


def columns(width: int, first: int = 0) -> np.ndarray:
    """(1, 1, width, width), each pixel holding the number of its column."""
    return np.tile(np.arange(first, first + width, dtype=np.float64), (1, 1, width, 1))


def box(low: float, high: float) -> np.ndarray:
    return np.array([[low, low, high, high]], np.float64)


def crop_and_resize(image: np.ndarray, low: float, high: float, bins: int, **options: object) -> np.ndarray:
    return cr.crop_and_resize(image, box(low, high), BATCH, bins, **options)[0, 0, bins // 2]


def roi_crop(image: np.ndarray, low: float, high: float, bins: int, **options: object) -> np.ndarray:
    return cr.roi_crop(image, box(low, high), BATCH, bins, **options)[0, 0, bins // 2]


def corners(image: np.ndarray, low: float, high: float, bins: int, **options: object) -> np.ndarray:
    return roi_crop(image, low, high, bins, transform_fpcoor=False, **options)


def aligned(image: np.ndarray, low: float, high: float, bins: int, samples: int = 1) -> np.ndarray:
    return cr.roi_align(image, box(low, high), bins, 1.0, samples, True, batch_indices=BATCH)[0, 0, bins // 2]


def legacy(image: np.ndarray, low: float, high: float, bins: int, samples: int = 1) -> np.ndarray:
    return cr.roi_align(image, box(low, high), bins, 1.0, samples, False, batch_indices=BATCH)[0, 0, bins // 2]


def coordinate(crop: Callable[..., np.ndarray], value: float, reach: float, width: int, margin: int = 0) -> float:
    """Where a dialect's coordinate lies, counted in pixels: at the middle of a box around it.

    Of an image with a margin, so that a place outside of the image can be read as well.
    """
    middle = value + margin
    return crop(columns(width + 2 * margin, -margin), middle - reach, middle + reach, 1).item()


def pixels(axes: Axes, width: int, height: float = 1.0, numbers: bool = True) -> None:
    """A row of pixels, with a dot in the centre of each."""
    for i in range(width):
        axes.add_patch(Rectangle((i - 0.5, 0), 1, height, facecolor="#f2f2f2", edgecolor="#8c8c8c", linewidth=0.8))
        if numbers:
            axes.text(i, 0.72 * height, str(i), ha="center", va="center", color="#404040")
    axes.plot(np.arange(width), np.full(width, 0.3 * height), "o", color="#404040", markersize=3)


def bare(axes: Axes) -> None:
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def draw_coordinates(path: Path) -> None:
    """Three ways to count, over the same eight pixels."""
    width = 8
    figure, axes = plt.subplots(figsize=(10, 3.9), layout="constrained")
    pixels(axes, width)
    whole, tenths = range(width + 1), [0, 0.25, 0.5, 0.75, 1]
    rulers = [
        ("centres at whole numbers\nroi_crop (corners), roi_align (not aligned)", BLUE, corners, whole[:-1], 1.0),
        ("edges at whole numbers\nroi_crop, roi_align (aligned)", RED, aligned, whole, 1.0),
        ("units of the side less one pixel\ncrop_and_resize", GREEN, crop_and_resize, tenths, 0.1),
    ]
    for row, (name, color, crop, values, reach) in enumerate(rulers):
        level = -0.75 - 1.15 * row
        margin = 0 if crop is crop_and_resize else 3  # its unit would be another
        inside = [v for v in values if crop is not crop_and_resize or 0 < v < 1]
        places = {v: coordinate(crop, v, reach, width, margin) for v in inside}
        if crop is crop_and_resize:  # at the ends half of a box lies outside: the corner of a crop tells
            ends = crop_and_resize(columns(width), 0, 1, 2)
            places = {0: ends[0], **places, 1: ends[1]}
        axes.plot([min(places.values()), max(places.values())], [level, level], color=color, linewidth=2)
        for value, place in places.items():
            axes.plot([place, place], [level - 0.09, level + 0.09], color=color, linewidth=2)
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.text(place, level - 0.16, f"{value:g}", ha="center", va="top", color=color, bbox=ground)
            axes.plot([place, place], [level + 0.09, 0], color=color, linewidth=0.6, linestyle=":", zorder=0)
        axes.text(width - 0.15, level, name, ha="left", va="center", color=color)
    axes.text(width - 0.15, 0.5, "pixels, with their centres", ha="left", va="center", color="#404040")
    axes.set(xlim=(-0.75, width + 5.4), ylim=(-3.6, 1.1), xticks=[])
    bare(axes)
    save(figure, path)


def draw_samples(path: Path) -> None:
    """One box in each dialect."""
    width, bins = 11, 3
    image = columns(width)
    doubled = 2 * bins  # that many bins of one sample are the samples of `bins` bins of two
    rows = [
        ("crop_and_resize, 0.2 to 0.8", GREEN, crop_and_resize, 0.2, 0.8, bins),
        ("roi_crop corners, 2 to 8", BLUE, corners, 2, 8, bins),
        ("roi_crop, 2 to 8", RED, roi_crop, 2, 8, bins),
        ("roi_align aligned, 2 to 8", RED, aligned, 2, 8, doubled),
        ("roi_align not aligned, 2 to 8", BLUE, legacy, 2, 8, doubled),
    ]
    figure, axes = plt.subplots(len(rows), figsize=(10, 5.4), layout="constrained", sharex=True)
    for cell, (name, color, crop, low, high, count) in zip(axes, rows, strict=True):
        reach = (high - low) / 6
        ends = [coordinate(crop, edge, reach, width) for edge in (low, high)]
        groups = crop(image, low, high, count).reshape(bins, -1)
        lay_out(cell, name, color, width, ends, groups)
        for group in groups:
            label = " and ".join(f"{v:.4g}" for v in group)
            cell.text(group.mean(), 0.72, label, ha="center", va="center", color="black", fontsize=10)
    axes[-1].set_xlabel("column of the image, counted between pixel centres; blue: the box")
    save(figure, path)


def lay_out(
    cell: Axes, name: str, color: str, width: int, ends: list[float], groups: np.ndarray, right: float = 0.0
) -> None:
    """A row of pixels, a box on it, and the samples of each of its bins in one mark."""
    pixels(cell, width, numbers=False)
    cell.add_patch(Rectangle((ends[0], 0.08), ends[1] - ends[0], 0.84, facecolor=SKY, alpha=0.45, edgecolor="none"))
    for p, group in enumerate(groups):
        fill = ORANGE if p % 2 else color
        cell.plot(group, np.full(len(group), 0.3), marker="Dos"[p], color=fill, markersize=8)
    cell.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    cell.set(ylim=(-0.02, 1.02), xlim=(-0.55, width - 0.45 + right), xticks=range(width))
    cell.tick_params(length=0)
    bare(cell)


def draw_outside(path: Path) -> None:
    """What one sample gives as it leaves an image."""
    width = 5
    image = columns(width) + 1
    far = np.linspace(-2.5, width + 1.5, 1601)
    figure, axes = plt.subplots(figsize=(10, 3.6), layout="constrained")
    curves = [
        (
            "roi_align: the border for one pixel more, then 0",
            RED,
            "-",
            [aligned(image, v, v + 1, 1).item() for v in far],
        ),
        (
            "crop_and_resize, roi_crop: extrapolation_value (here -1)",
            BLUE,
            "--",
            [corners(image, v, v, 1, extrapolation_value=-1.0).item() for v in far],
        ),
    ]
    for name, color, style, values in curves:
        values = np.array(values)
        jumps = np.abs(np.diff(values)) > 0.5
        shown = np.insert(values, np.flatnonzero(jumps) + 1, np.nan)
        at = np.insert(far, np.flatnonzero(jumps) + 1, np.nan)
        axes.plot(at, shown, style, color=color, linewidth=2.5, label=name)
    axes.plot(np.arange(width), np.arange(width) + 1, "o", color="#404040", label="the image's pixels", zorder=5)
    axes.axvspan(-0.5, width - 0.5, color="#f2f2f2", zorder=0)
    axes.set(xlabel="where the sample lies, counted between pixel centres", ylabel="value of the crop")
    axes.set(xticks=range(-2, width + 2), ylim=(-1.4, 7.6), xlim=(-2.5, width + 1.5))
    axes.legend(frameon=False, loc="upper left", fontsize=10)
    save(figure, path)


def samples_a_bin(crop: Callable[..., np.ndarray], low: float, high: float, bins: int) -> np.ndarray:
    """Where an adaptive roi_align takes its samples: (bins, samples), known by what it averages."""
    noise = np.random.default_rng(0).standard_normal((1, 1, 1, 16)) * np.ones((1, 1, 16, 1))
    wanted = crop(noise, low, high, bins, 0)
    for samples in range(1, 9):
        single = crop(noise, low, high, bins * samples)
        if np.allclose(single.reshape(bins, samples).mean(axis=1), wanted):
            return crop(columns(16), low, high, bins * samples).reshape(bins, samples)
    raise AssertionError("the samples are not evenly spaced")


def draw_adaptive(path: Path) -> None:
    """How many samples a bin takes where `sampling_ratio` is 0 or -1."""
    width, bins = 12, 2
    rows = [
        ("2 wide, aligned", aligned, 4, 6, RED),
        ("3 wide, aligned", aligned, 4, 7, RED),
        ("7 wide, aligned", aligned, 3, 10, RED),
        ("0.4 wide, aligned", aligned, 4, 4.4, RED),
        ("0.4 wide, not aligned", legacy, 4, 4.4, BLUE),
    ]
    figure, axes = plt.subplots(len(rows), figsize=(10, 5.2), layout="constrained", sharex=True)
    for cell, (name, crop, low, high, color) in zip(axes, rows, strict=True):
        ends = [coordinate(crop, edge, 1.0, width) for edge in (low, high)]
        groups = samples_a_bin(crop, low, high, bins)
        lay_out(cell, name, color, width, ends, groups, right=2.3)
        count = groups.shape[1]
        cell.text(width - 0.3, 0.5, f"{count} sample{'s' * (count > 1)} a bin", va="center")
    axes[-1].set_xlabel("column of the image, counted between pixel centres; blue: the box, of two bins")
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)


PICTURES = {
    "coordinates.svg": draw_coordinates,
    "samples.svg": draw_samples,
    "outside.svg": draw_outside,
    "adaptive.svg": draw_adaptive,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("conventions"), help="the folder")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in PICTURES.items():
            draw(folder / name)
            print(folder / name)


if __name__ == "__main__":
    main()
