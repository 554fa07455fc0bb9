"""Machine: what a time was measured on."""

import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def machine() -> dict[str, Any]:
    """Kind of processor, cores that this process may use, and the default precision.

    >>> sorted(machine())
    ['cores', 'devices', 'dtype', 'processor']
    """
    return {
        "processor": _processor(),
        "cores": _cores(),
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "dtype": jnp.result_type(float).name,
    }


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_of(tree: PyTree) -> str:
    """The devices that the arrays of a tree lie on, in words."""
    devices = sorted(jax.tree.leaves(tree)[0].devices(), key=lambda device: device.id)
    count = "" if len(devices) == 1 else f"{len(devices)} × "
    return f"{count}{devices[0].device_kind}"
