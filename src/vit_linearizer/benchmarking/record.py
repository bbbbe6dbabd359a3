"""``benchmark.json`` on disk: what it holds, and whether a run may go on with one that was left unfinished."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from .. import ops
from ..contracts import UserError
from ..training.run_folder import write_atomically
from .summary import Row

#: They change where a benchmark goes and how it is watched, not what it measures.
_NOT_COMPARED = ("out", "resume", "debug", "mixer_reason")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Whatever timings depend on, apart from the configuration."""
    mixer, reason = ops.choose_mixer(device)
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": device.type,
        "cores": psutil.cpu_count(logical=True),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": importlib.metadata.version("timm"),
        "vit_linearizer": importlib.metadata.version("vit-linearizer"),
        "mixer": mixer,
        "mixer_reason": reason,
    }


def write_record(file: Path, content: Mapping[str, Any]) -> None:
    """Write ``benchmark.json``; a reader or a kill meets the old content or the new."""
    write_atomically(file, json.dumps(content, indent=2) + "\n")


def rows_to_keep(file: Path, *, config: Mapping[str, Any], machine: Mapping[str, Any]) -> list[Row]:
    """The rows of an unfinished benchmark of the same configuration and machine; none where there is none to go on with.

    A finished one of the same configuration is measured anew.

    Raises:
        UserError: the benchmark there is another one, or what is there is no benchmark.
    """
    if not file.exists():
        return []
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        complete, rows = there["complete"], there["rows"]
        before = {**there["config"], **({} if complete else there["machine"])}
    except (ValueError, KeyError, TypeError) as error:
        remedy = f"its {file.name} cannot be read; use another folder, or --resume never to replace it"
        raise UserError("--out", file.parent, remedy) from error
    now = json.loads(json.dumps({**config, **({} if complete else machine)}))
    keys = sorted((before.keys() | now.keys()) - set(_NOT_COMPARED))
    different = [f"{key} ({before.get(key)} there, {now.get(key)} here)" for key in keys if before.get(key) != now.get(key)]
    if different:
        kind = "a" if complete else "an unfinished"
        remedy = f"holds {kind} benchmark of another configuration: {', '.join(different)}; "
        remedy += "use another folder, or --resume never to replace it"
        raise UserError("--out", file.parent, remedy)
    return [] if complete else rows


def _cpu_name() -> str:
    """The name on the chip, which Python itself does not know on Linux."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
