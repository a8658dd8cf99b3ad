"""Where this ran: the machine line, the cache to outgrow, and a bound on memory."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

import rlhf_fast

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict[str, str | int | float]:
    """The machine line: without it a time means nothing. ``load`` is the mean number of running
    processes over the last minute: with others at work, believe the ratios and no time."""
    return {
        "device": _device_name(device),
        "kind": device.type,
        **(
            {"instructions": torch.backends.cpu.get_cpu_capability()}
            if device.type == "cpu"
            else {}
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "rlhf_fast": rlhf_fast.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def folder(described: dict[str, str | int | float], device: torch.device) -> Path:
    """bench/results/<device>: where the runs of this device are kept."""
    name = str(described["device"])
    if device.type == "cpu":
        name += f" {described['instructions']} {described['threads']} threads"
    return ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def version(package: str) -> str:
    """As installed, or none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--tags"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def last_cache(device: torch.device) -> int:
    """Bytes of the device's last-level cache; 32 MiB where it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := _read(path).strip())[-1:] in ("K", "M")
    ]
    return max(sizes, default=32 * 2**20)


def bound_memory() -> None:
    """Let an allocation beyond the free memory fail, so that it costs a row: Linux would rather
    hand it out and then kill the whole run. Only lowers the limit, only on Linux."""
    available = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    data = re.search(r"^VmData:\s*(\d+) kB", _read("/proc/self/status"), re.MULTILINE)
    if not (available and data):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = (int(available[1]) * 15 // 16 + int(data[1])) * 1024
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
