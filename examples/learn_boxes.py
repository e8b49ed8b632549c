"""Finds where in a photo a picture was cut from, by gradient descent on the corners of a box.

    python examples/learn_boxes.py [--output PICTURE]

The gradient of a crop to its box tells how the box should move for the crop to look more like the picture. A photo is
smooth only over a few pixels, so both are blurred at first, and less and less: from coarse to fine.

The photo is the astronaut that scikit-image ships.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from skimage import data
from skimage.filters import gaussian

import cupy_roialign as cr

TARGET = (165.3, 61.8, 287.6, 195.1)  # x1, y1, x2, y2 in pixels: the face
START = (130.0, 100.0, 230.0, 200.0)
SIZE = 48
BLURS = ((24.0, 80), (12.0, 40), (6.0, 40), (0.0, 40))  # pixels, and steps
STEP = 2.0  # pixels, at the largest blur


def crop(image: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    return cr.roi_crop(image, box[None], torch.zeros(1, dtype=torch.int64, device=box.device), SIZE)


def blurred(photo: torch.Tensor, blur: float) -> torch.Tensor:
    """`photo`: (1, 3, H, W)."""
    if blur == 0:
        return photo
    return torch.from_numpy(gaussian(photo[0].cpu().numpy(), sigma=blur, channel_axis=0))[None].to(photo.device)


def descend(
    image: torch.Tensor, target: torch.Tensor, start: torch.Tensor, steps: int, step: float
) -> list[tuple[torch.Tensor, float]]:
    """The box and the loss before each of so many steps, of so many pixels at first, and the box after the last."""
    box = start.clone().requires_grad_()
    wanted = crop(image, target)
    optimizer = torch.optim.Adam([box], lr=step)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    way = []
    for _ in range(steps):
        loss = (crop(image, box) - wanted).square().mean() / wanted.var()
        optimizer.zero_grad()
        loss.backward()
        way.append((box.detach().clone(), loss.item()))
        optimizer.step()
        schedule.step()
    return [*way, (box.detach(), loss.item())]


def find(photo: torch.Tensor, target: torch.Tensor, start: torch.Tensor) -> list[tuple[torch.Tensor, float, float]]:
    """The way of the box: (x1, y1, x2, y2), the loss and the blur at each step. `photo`: (1, 3, H, W)."""
    way, box, loss = [], start, 0.0
    for blur, steps in BLURS:
        *before, (box, loss) = descend(blurred(photo, blur), target, box, steps, STEP * max(blur, 2.0) / BLURS[0][0])
        way += [(*state, blur) for state in before]
    return [*way, (box, loss, 0.0)]


def draw(photo: torch.Tensor, target: torch.Tensor, way: list[tuple[torch.Tensor, float, float]], path: Path) -> None:
    moments = [0, 10, 20, 40, 80, 120, len(way) - 1]
    figure = plt.figure(figsize=(12, 6.4), dpi=100, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1.15))
    left, right = top.subplots(1, 2, width_ratios=(1, 1.3))
    left.imshow(photo[0].permute(1, 2, 0))
    left.set(xticks=[], yticks=[], title="the box on its way, from yellow to blue")
    colors = plt.get_cmap("cividis_r")
    for number, moment in enumerate(moments):
        color = colors(number / (len(moments) - 1))
        x1, y1, x2, y2 = way[moment][0].tolist()
        left.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=2))
    x1, y1, x2, y2 = target.tolist()
    left.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor="w", ls=":", linewidth=2))

    errors = [(box - target).abs().max().item() for box, _, _ in way]
    right.semilogy(errors, color="#0072B2")
    right.axhline(1, color="grey", linestyle=":")
    first = 0
    for blur, steps in BLURS:
        right.axvspan(first, first + steps, alpha=0.05 + 0.2 * blur / BLURS[0][0], color="#E69F00", linewidth=0)
        right.text(first + 2, max(errors) * 1.15, f"blur {blur:g}", fontsize=9)
        first += steps
    right.set(xlabel="step", ylabel="worst edge is off by, pixels", title="distance to where the picture was cut")

    cells = bottom.subplots(1, len(moments) + 1)
    for cell, moment in zip(cells, moments, strict=False):
        cell.imshow(crop(photo, way[moment][0])[0].permute(1, 2, 0).clip(0, 1))
        cell.set(xticks=[], yticks=[], title=f"step {moment}")
    cells[-1].imshow(crop(photo, target)[0].permute(1, 2, 0))
    cells[-1].set(xticks=[], yticks=[], title="the picture")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/learn_boxes.png"), help="where to write the picture")
    path = parser.parse_args().output
    plt.switch_backend("agg")

    photo = torch.from_numpy(data.astronaut() / 255.0).permute(2, 0, 1)[None]  # channels-last: a view
    target, start = (torch.tensor(box, dtype=torch.float64) for box in (TARGET, START))
    way = find(photo, target, start)
    for moment in (0, 20, 80, 120, len(way) - 1):
        box, loss, _ = way[moment]
        off = (box - target).abs().max().item()
        print(f"step {moment:3}  box {[round(v, 1) for v in box.tolist()]}, off by {off:.2f} pixels, loss {loss:.2g}")
    draw(photo, target, way, path)
    print(f"picture   {path.resolve()}")


if __name__ == "__main__":
    main()
