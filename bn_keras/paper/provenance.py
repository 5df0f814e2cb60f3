"""Says with which code and on which machine a number was measured; standard library only."""

import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of this checkout, followed by "-dirty" if files were changed; "unknown" outside of a checkout."""
    describe = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(describe, check=False, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:  # no git on this machine
        return "unknown"


def cpu_name() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "an unnamed processor"
