"""What machine this is, and what else runs on it. Standard library only; where Linux's /proc is absent, values are None."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ProcessorTime", "available_bytes", "describe", "idle_check"]

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class ProcessorTime:
    """Seconds of all cores together since the machine started: spent by processes, and stolen by other guests."""

    busy: float
    stolen: float
    at: float

    @classmethod
    def now(cls) -> ProcessorTime | None:
        stat = Path("/proc/stat")
        if not stat.is_file():
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = (
            float(field) / _TICKS for field in stat.read_text().split("\n", 1)[0].split()[1:]
        )
        return cls(busy=user + nice + system + irq + softirq, stolen=steal, at=time.perf_counter())

    def since(self, earlier: ProcessorTime, own_seconds: float) -> tuple[float, float]:
        """Cores kept busy by others than a process that used `own_seconds`, and cores stolen, on average since then."""
        elapsed = self.at - earlier.at
        return max(0.0, self.busy - earlier.busy - own_seconds) / elapsed, (self.stolen - earlier.stolen) / elapsed


def idle_check(seconds: float = 3.0, allowed_cores: float = 0.15) -> str | None:
    """What speaks against measuring now, or None: the load average, and cores busy during the next seconds."""
    reasons = []
    load = os.getloadavg()[0]
    before, own = ProcessorTime.now(), time.process_time()
    if before is not None:
        time.sleep(seconds)
        after = ProcessorTime.now()
        assert after is not None
        busy, stolen = after.since(before, time.process_time() - own)
        if busy > allowed_cores:
            reasons.append(f"other processes keep {busy:.2f} cores busy")
        if stolen > allowed_cores:
            reasons.append(f"the host takes {stolen:.2f} cores away")
    if load > 0.5 and (reasons or before is None):
        # Alone, it may be the echo of work that has ended.
        reasons.append(f"the load average of the last minute is {load:.2f}")
    return "; ".join(reasons) or None


def available_bytes() -> int | None:
    """Memory that a new process may use."""
    return _meminfo("MemAvailable")


def describe() -> dict[str, Any]:
    """Hardware and system, for the results."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _meminfo("MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }


def _meminfo(key: str) -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
