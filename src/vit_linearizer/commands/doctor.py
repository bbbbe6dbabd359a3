"""``doctor``: what this machine can run, which implementations are chosen and why, what is missing and how to get it."""

import importlib.metadata
import importlib.util
import logging
import os
import platform
from dataclasses import dataclass

import torch

from ..ops import choose_mixer, gpu, native
from ..training.machine import choose_precision
from ..training.progress import show_messages

logger = logging.getLogger("vit_linearizer")

_PACKAGES = ("torch", "torchvision", "timm", "accelerate")
_OPTIONAL = {
    "tensorboard": ("tracking", "curves of a running training"),
    "transformers": ("segmentation", "UperNet heads"),
    "onnxruntime": ("export", "running exported models"),
    "fla": ("gpu", "an alternative scan on the GPU"),
}


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Show what this machine can run.

    Attributes:
        debug: show the traceback of an error.
    """

    debug: bool = False


def doctor(config: DoctorConfig) -> dict[str, str]:  # noqa: ARG001  # every command takes its configuration
    """Look at the machine; see `DoctorConfig`.

    Returns:
        What was printed: one line of text by topic.
    """
    show_messages()
    findings = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    findings |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    capability = torch.backends.cpu.get_cpu_capability()
    findings["cpu"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}"
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(0)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        findings["cuda"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}"
    else:
        built = torch.version.cuda
        findings["cuda"] = "no device found" if built else "this torch was built without CUDA"
    if torch.backends.mps.is_available():
        device = torch.device("mps")
        findings["mps"] = "available"
    findings["device"] = f"{device.type} (what --device auto takes)"
    findings["precision"] = "{}: {}".format(*choose_precision(device.type))
    if device.type == "cpu":
        native.status(retry=True)  # whoever runs this may just have mended what was wrong
    name, reason = choose_mixer(device)
    if device.type != "cuda":
        findings["triton"] = "{}: {}".format("yes" if gpu.status()[0] else "no", gpu.status()[1])
    findings["scan"] = f"{name}: {reason}" + (f", {native.status()[1]}" if name == "native" else "")
    for module, (extra, purpose) in _OPTIONAL.items():
        if importlib.util.find_spec(module):
            findings[module] = f"installed ({purpose})"
        else:
            findings[module] = f"missing ({purpose}); pip install 'vit-linearizer[{extra}]'"
    for topic, finding in findings.items():
        logger.info("%-13s %s", topic, finding)
    return findings
