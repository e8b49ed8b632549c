"""How the work of a launch is divided among blocks, and how the gradient of the features finds the boxes of a tile."""

from __future__ import annotations

import math
from typing import NamedTuple

from cupy_roialign.gpu import kernels

FEW_BINS = 8
"""The longest side of a tile where there are channels enough to fill a block."""

MANY_BLOCKS = 2048
"""Blocks that keep any GPU busy: several times as many as it runs at a time."""

MOST_ZONES = 64
"""Zones per axis at most, which bounds the bits per box that mark them."""


class Tiling(NamedTuple):
    """How the work on an item (a box, or an image) is divided among blocks."""

    tile: tuple[int, int]  # of bins or pixels, along y and x
    channels: int  # per block; a multiple of `Types.lanes`, even where there are fewer
    blocks: int  # per item
    threads: int  # per block

    @classmethod
    def of(cls, size: tuple[int, ...], channels: int, types: kernels.Types, items: int, most: int) -> Tiling:
        """For so many items of a size, in bins or pixels, and tiles of at most `most` along each side.

        A block takes as many spots as it has threads, at most, or several times as many, in rounds, where that leaves
        enough blocks: what it finds about the box, or about the boxes of a tile, serves all rounds. So large tiles are
        tried first.
        """
        groups, room = -(-channels // types.lanes), kernels.THREADS
        side = math.isqrt(room)  # of a tile with a spot for each thread
        limits = (FEW_BINS,) if groups * FEW_BINS**2 >= room else (most, side)
        for limit in limits:
            cuts = [max(1, -(-n // limit)) for n in size]
            if items * math.prod(cuts) >= MANY_BLOCKS:
                break
        tile = tuple(-(-n // cut) for n, cut in zip(size, cuts, strict=True))
        at_once = max(1, min(groups, room // max(1, math.prod(tile))))
        rounds = max(1, -(-groups // at_once))
        at_once *= -(-rounds // max(1, -(-MANY_BLOCKS // max(1, items * math.prod(cuts)))))
        threads = kernels.FEWEST_THREADS
        while threads < min(kernels.THREADS, at_once * math.prod(tile)):
            threads *= 2
        return cls((tile[0], tile[1]), at_once * types.lanes, math.prod(cuts) * -(-groups // at_once), threads)


class Zones(NamedTuple):
    """Groups of tiles for which boxes are marked: of neighbouring rows, of neighbouring columns, and of images."""

    counts: tuple[int, int, int] = (0, 0, 0)  # zones along y, along x, and of images
    pixels: tuple[int, int] = (0, 0)  # per zone, along y and x: a multiple of the tile's

    @classmethod
    def of(cls, images: int, size: tuple[int, ...], tile: tuple[int, int]) -> Zones:
        """For images of a size in pixels, divided into tiles."""
        tiles = [-(-n // max(1, side)) for n, side in zip(size, tile, strict=True)]
        pixels = [side * max(1, -(-count // MOST_ZONES)) for side, count in zip(tile, tiles, strict=True)]
        y, x = (-(-n // max(1, width)) for n, width in zip(size, pixels, strict=True))
        return cls((y, x, min(images, MOST_ZONES)), (pixels[0], pixels[1]))

    def bytes(self, boxes: int) -> int:
        """Bytes of the marks of so many boxes."""
        return 4 * sum(self.counts) * -(-boxes // kernels.BOXES_PER_WORD)
