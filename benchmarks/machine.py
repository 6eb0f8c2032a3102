"""What was measured on: processor, memory, versions, and the rate at which it multiplies matrices."""

import os
import pathlib
import platform
import re
import subprocess

from benchmarks.sides import Way


def describe() -> dict[str, str]:
    """Processor, cores, memory, system, and the GPU where there is one."""
    found = {
        "processor": _processor(),
        "cores": str(_cores()),
        "memory": _memory(),
        "system": " ".join([platform.system(), *platform.libc_ver()]),
        "Python": platform.python_version(),
    }
    if gpu := _gpu():
        found["GPU"] = gpu
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _information() -> str:
    try:
        return pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _processor() -> str:
    text = _information()
    found = {key: re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")}
    if not found["model name"]:
        return platform.processor() or platform.machine()
    # A rented machine tells no more of its processor than the family.
    family = ", ".join(f"{key} {found[key][1]}" for key in ("cpu family", "model") if found[key])
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{unit}\b", text)]
    return f"{found['model name'][1]} ({family}; {', '.join(units)})"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    return device == "gpu" or bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _information()))


def matrix_ways(device: str) -> list[Way]:
    """Who measures the rate of matrix products: the library of each side, in each precision."""
    backend = "tensorflow" if device == "cpu" else "jax"
    ways = []
    for precision in ("float32", "bfloat16") if has_bfloat16(device) else ("float32",):
        variables = {"KERAS_BACKEND": backend}
        ways += [
            Way(
                f"{backend}, {precision}",
                "benchmarks.sides.ours",
                "ours",
                {"precision": precision},
                variables,
                precision,
            ),
            Way(f"torch, {precision}", "benchmarks.sides.timm_side", "timm", {"precision": precision}, {}, precision),
        ]
    return ways
