"""Energy of the machine's NVIDIA devices, where their driver tells."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def energy_meter(library: Any = None) -> Callable[[], float] | None:
    """A function that gives joules used since some time in the past by all devices; None where nothing measures it.

    Args:
        library: pynvml or what behaves like it; None imports it (package nvidia-ml-py) if it is installed.
    """
    if library is None:
        try:
            library = import_module("pynvml")
        except ModuleNotFoundError:
            return None
    try:
        library.nvmlInit()
        devices = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]
        for device in devices:
            library.nvmlDeviceGetTotalEnergyConsumption(device)
    except library.NVMLError:
        return None
    if not devices:
        return None
    return lambda: sum(library.nvmlDeviceGetTotalEnergyConsumption(device) for device in devices) / 1000
