"""The memory of the machine's first NVIDIA card, asked of its driver: torch need not be imported for it."""

import ctypes
import os

_LIBRARY = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"


def card_bytes() -> int | None:
    """Returns the whole memory of the first card, or None where there is none or its driver does not answer."""
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    if driver.nvmlInit_v2() != 0:
        return None
    card, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
    try:
        found = driver.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(card)) == 0
        return memory[0] if found and driver.nvmlDeviceGetMemoryInfo(card, ctypes.byref(memory)) == 0 else None
    finally:
        driver.nvmlShutdown()
