"""Where a page is made: versions, machine, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("hdc", "torch", "triton", "numpy", "av")


def describe() -> list[tuple[str, str]]:
    """Name and value; what is not there is left out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    found = [
        ("Python", platform.python_version()),
        *((name, _version(name)) for name in PACKAGES),
        ("commit of hdc", _commit()),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("CPU", _cpu()),
        ("cores", f"{cores}"),
        ("threads", f"{torch.get_num_threads()}"),
        ("GPU", ", ".join(gpus) or "none"),
    ]
    return [(name, value) for name, value in found if value]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


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
