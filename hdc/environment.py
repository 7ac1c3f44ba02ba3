"""What a run is computed with: versions, machine, device. Stored with the run, for the report to show."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hdc import atomic, distributed
from hdc.device import cores

FILE = "environment.json"
PACKAGES = ("hdc", "torch", "triton", "numpy", "av")


def describe(device: torch.device) -> dict[str, str]:
    """Name → value, for work on `device`; what is not there is left out."""
    on_gpu = device.type == "cuda"
    found = {
        "Python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
        "commit of hdc": _commit(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "CPU": _cpu(),
        "cores": f"{cores()}",
        "threads": f"{torch.get_num_threads()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "CUDA": f"{torch.version.cuda}" if on_gpu else "",
        "processes": f"{distributed.world()}",
    }
    return {name: value for name, value in found.items() if value}


def store(folder: Path, device: torch.device, first_step: int) -> None:
    """Say in `folder/environment.json` what computes the run's steps from `first_step` on.

    A run that goes on elsewhere has several entries; what was computed after `first_step` before is lost.
    """
    path = folder / FILE
    starts: list[dict[str, Any]] = []
    if first_step:
        starts = [start for start in read(folder) if start["first_step"] < first_step]
    now = describe(device)
    if not starts or starts[-1]["environment"] != now:
        starts.append({"first_step": first_step, "environment": now})
    atomic.write_json(path, {"starts": starts})


def read(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run, each with `first_step` and `environment`; none if it stores none.

    Raises:
        InputError: the file is damaged.
    """
    return list(atomic.read_json(folder / FILE, ("starts",)).get("starts", []))


def package_version(package: str) -> str:
    """Empty for one that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def _commit() -> str:
    """Empty unless this file is tracked: an installed copy may lie in somebody else's repository."""
    command = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run(
            [*command, "ls-files", "--error-unmatch", "environment.py"],
            capture_output=True,
            check=True,
        )
        described = [*command, "describe", "--always", "--dirty"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
