"""Trains a small detector head over several processes with DistributedDataParallel, or in one.

    torchrun --nproc-per-node 2 examples/train_distributed.py
    python examples/train_distributed.py

Both see the same images and end with the same weights, within rounding: each process takes its share of each batch,
and the gradients are averaged. A head looks at crops of feature maps, tells which of three shapes is in a box, and by
how much the box should move and grow. The images, shapes on noise, are made here.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from cupy_roialign.torch import roi_align

SIDE, STRIDE, BATCH, BOXES = 64, 4, 8, 6


def make_batch(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """(B, 1, S, S) images, (B, M, 4) boxes near shapes, (B, M) kinds of shape, (B, M, 4) how far off the boxes are."""
    images = torch.rand(BATCH, 1, SIDE, SIDE, generator=generator) * 0.3
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    centers = torch.rand(BATCH, BOXES, 2, generator=generator) * (SIDE - 24) + 12
    radii = torch.rand(BATCH, BOXES, generator=generator) * 5 + 5
    kinds = torch.randint(0, 3, (BATCH, BOXES), generator=generator)
    for b in range(BATCH):
        for (cx, cy), r, kind in zip(centers[b], radii[b], kinds[b], strict=True):
            dx, dy = (x - cx).abs(), (y - cy).abs()
            inside = (dx.hypot(dy) < r, torch.maximum(dx, dy) < r * 0.85, torch.minimum(dx, dy) < r * 0.3)[int(kind)]
            images[b, 0] = torch.where(inside & (torch.maximum(dx, dy) < r), 1.0, images[b, 0])
    true = torch.cat([centers - radii[..., None], centers + radii[..., None]], dim=-1)
    off = (torch.rand(BATCH, BOXES, 4, generator=generator) - 0.5) * 6
    return images, true - off, kinds, off


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 3 + 4))

    def forward(self, images: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B * M, 3) scores of the kinds, and (B * M, 4) by how many pixels the boxes are off."""
        features = self.backbone(images)
        crops = roi_align(features, list(boxes), 7, spatial_scale=1 / STRIDE, sampling_ratio=2, aligned=True)
        scores, off = self.head(crops).split([3, 4], dim=1)
        return scores, off


def train(steps: int, rank: int, processes: int) -> tuple[Detector, list[float]]:
    torch.manual_seed(0)
    detector = Detector()
    model = nn.parallel.DistributedDataParallel(detector) if processes > 1 else detector
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        images, boxes, kinds, off = (part.chunk(processes)[rank] for part in make_batch(generator))
        scores, moves = model(images, boxes)
        loss = F.cross_entropy(scores, kinds.flatten()) + F.smooth_l1_loss(moves, off.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / processes
        if processes > 1:
            torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    return detector, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save", type=Path, help="where to save the weights and the losses")
    options = parser.parse_args()
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    detector, losses = train(options.steps, rank, processes)
    if rank == 0:
        for step in sorted({*range(0, options.steps, max(1, options.steps // 10)), options.steps - 1}):
            print(f"step {step:4}  loss {losses[step]:.4f}")
        print(f"{processes} process{'es' if processes > 1 else ''}")
        if options.save:
            torch.save({"weights": detector.state_dict(), "losses": losses}, options.save)
    if processes > 1:
        torch.distributed.barrier()  # no process takes its end of the connections down while another is at work
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
