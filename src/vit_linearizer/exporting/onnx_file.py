"""ONNX: one file, compared with PyTorch in onnxruntime before it gets its name."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..contracts import UserError, optional_import
from .parity import Run, largest_difference
from .program import Program

#: Protocol buffers end at 2 GiB; weights beyond this go to a second file beside the first.
_LARGEST_FILE = 1.9 * 2**30


def check_onnx_installed() -> None:
    """Raise a `UserError` that says what to install, where a package is missing."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        optional_import(module, extra="export", purpose="--format onnx")


def write_onnx(
    program: Program,
    exported: ExportedProgram,
    path: Path,
    *,
    sizes: list[tuple[int, int, int]],
    metadata: Mapping[str, str],
) -> tuple[dict[str, float], int]:
    """Translate, save, run and compare.

    Args:
        program: the model to compare with.
        exported: its capture.
        path: the ``.onnx`` file.
        sizes: image sizes to compare at.
        metadata: written into the file's metadata properties.

    Returns:
        Differences by size, and the opset.

    Raises:
        UserError: the difference is too large.
    """
    try:
        translated = torch.onnx.export(
            exported, dynamo=True, verbose=False, input_names=["images"], output_names=program.output_names
        )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        remedy = f"{type(program.model).__name__} cannot be translated ({reason}); --format torch-export may do"
        raise UserError("--format", "onnx", remedy) from error
    if translated is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    domains = {node.domain for node in translated.model.graph}
    if domains - {"", "ai.onnx"}:
        raise RuntimeError(f"the ONNX program holds operators of {', '.join(sorted(domains))}")
    translated.model.metadata_props.update(metadata)
    _name_axes(translated.model)
    weights = sum(t.numel() * t.element_size() for t in program.state_dict().values())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        fresh = Path(folder) / path.name
        translated.save(str(fresh), external_data=weights > _LARGEST_FILE)
        differences = largest_difference(program, _session(fresh), sizes)
        weights_file = path.with_name(path.name + ".data")
        weights_file.unlink(missing_ok=True)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".onnx"):  # the model itself last
            shutil.move(str(file), str(path.parent / file.name))
    return differences, translated.model.opset_imports[""]


def _name_axes(model: Any) -> None:
    """Call free axes batch, height and width at both ends of the program, instead of by torch's symbols.

    Shapes in between go: they are written in those symbols, and every runtime infers them again.
    """
    names: dict[str, str] = {}
    for axis, name in zip(model.graph.inputs[0].shape, ("batch", "channels", "height", "width"), strict=True):
        if not isinstance(axis, int):
            side, _, symbol = str(axis.value).rpartition("*")  # height and width are a patch side times a symbol
            names |= {str(axis.value): name, symbol: f"{name}/{side}" if side else name}
    ends = [*model.graph.inputs, *model.graph.outputs]
    for value in ends:
        value.shape = type(value.shape)(
            [axis if isinstance(axis, int) else names.get(str(axis.value), str(axis.value)) for axis in value.shape]
        )
    for node in model.graph:
        for output in node.outputs:
            if not any(output is end for end in ends):
                output.shape = None


def _session(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, and said once
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})
