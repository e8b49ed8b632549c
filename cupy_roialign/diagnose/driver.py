"""The NVIDIA driver, queried without CuPy: which CUDA it runs, and which GPUs a process sees.

Run as a script it prints what `gpus` returns: a driver that hangs or crashes takes only that process with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
RELEASE = Path("/proc/driver/nvidia/version")
PATIENCE = 30.0
"""Seconds to wait for the driver's answer; a sleeping GPU takes some to wake."""

# From cuda.h: an error, and the attributes of a compute capability's major and minor number.
_NO_DEVICE = 100
_CAPABILITY = (75, 76)


def cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs; None if there is no driver. No GPU is touched."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0 or number.value <= 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def release() -> str | None:
    """The driver's own version, such as 580.65.06, if its kernel module tells."""
    with contextlib.suppress(OSError):
        found = re.search(r"\d+\.\d+(\.\d+)?", RELEASE.read_text(encoding="utf-8", errors="replace"))
        return found and found.group()
    return None


def gpus() -> dict[str, Any]:
    """The GPUs as `devices`, and as `error` why they are unknown. Another process asks, for up to PATIENCE seconds."""
    command = [sys.executable, "-I", __file__, LIBRARY]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except Exception as error:  # an embedded interpreter has no executable
        return {"devices": [], "error": f"no process to ask it in: {error}"}
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the kernel does not end
            process.communicate(timeout=1)
        return {"devices": [], "error": f"no answer in {PATIENCE:g} seconds"}
    try:
        return json.loads(output)
    except ValueError:
        return {"devices": [], "error": f"asking it ended a process with status {process.returncode}"}


def _ask(name: str) -> dict[str, Any]:
    library = ctypes.CDLL(name)

    def failure(status: int) -> str:
        text = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(text))
        return text.value.decode() if text.value else f"CUDA error {status}"

    status = library.cuInit(0)
    if status == _NO_DEVICE:
        return {"devices": [], "error": None}
    if status != 0:
        return {"devices": [], "error": failure(status)}
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    devices = []
    for number in range(count.value):
        device, memory, title = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        library.cuDeviceGet(ctypes.byref(device), number)
        library.cuDeviceGetName(title, len(title), device)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        capability = [ctypes.c_int(), ctypes.c_int()]
        for number_of, attribute in zip(capability, _CAPABILITY, strict=True):
            library.cuDeviceGetAttribute(ctypes.byref(number_of), attribute, device)
        devices.append(
            {
                "name": title.value.decode(errors="replace"),
                "compute_capability": [number_of.value for number_of in capability],
                "memory_bytes": memory.value,
            }
        )
    return {"devices": devices, "error": None}


if __name__ == "__main__":
    print(json.dumps(_ask(sys.argv[1])))
