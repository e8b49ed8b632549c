"""Region-of-interest operators for any array: crop_and_resize, roi_crop, roi_align, and their gradients."""

from cupy_roialign.checks import checked
from cupy_roialign.operators import crop_and_resize, roi_align, roi_crop, vjp

__version__ = "0.1.0"

__all__ = ["checked", "crop_and_resize", "roi_align", "roi_crop", "vjp"]
