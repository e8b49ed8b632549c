"""Region-of-interest operators for any array: crop_and_resize, roi_crop, roi_align, with gradients."""

from cupy_roialign.cpu.threads import get_num_threads, set_num_threads
from cupy_roialign.gpu.index_checks import checked
from cupy_roialign.operators import crop_and_resize, roi_align, roi_crop, vjp

__version__ = "0.1.0"

__all__ = [
    "checked",
    "crop_and_resize",
    "get_num_threads",
    "roi_align",
    "roi_crop",
    "set_num_threads",
    "vjp",
]
