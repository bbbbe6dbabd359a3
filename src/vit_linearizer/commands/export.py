"""``export``: a run or model in, files for timm, ONNX runtimes or ``torch.export`` out, compared with PyTorch."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import timm
import timm.data
import torch

from ..contracts import UserError
from ..exporting.model_card import Origin, find_origin, write_card
from ..exporting.onnx_file import check_onnx_installed, write_onnx
from ..exporting.parity import largest_difference
from ..exporting.program import Program, capture, example_size, example_sizes
from ..exporting.torch_program import write_torch_program
from ..models.adapters import check_plain, patch_size
from ..models.loading import has_weights, is_file_name, load, save_model_folder
from ..training.progress import show_messages
from .arguments import ModelConfig, parse_size

logger = logging.getLogger("vit_linearizer")

_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelConfig):
    """Write a model as files that other tools open, each compared with PyTorch after writing.

    Attributes:
        format: timm (config.json, model.safetensors and a model card), onnx, or torch-export.
        out: folder for timm, an .onnx or .pt2 file for the others, with a model card OUT.md beside it.
        image_size: 224 or HEIGHTxWIDTH that the model is made for; by default its own.
        dynamic: let height and width vary too, in multiples of the patch; the batch always varies.
        dense: add a second output, the final patch features as a map.
        normalize: put the normalisation inside the program, so that it takes images in [0, 1].
        push_to_hub: NAME or OWNER/NAME on the Hugging Face Hub to send a timm folder to; nothing is sent otherwise.
        debug: show the traceback of an error.
    """

    format: Literal["timm", "onnx", "torch-export"]
    out: str
    image_size: str | None = None
    dynamic: bool = False
    dense: bool = False
    normalize: bool = True
    push_to_hub: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if not Path(self.out).name:
            raise UserError("--out", self.out, "give a name")
        if self.format == "timm":
            for name, default in (("dynamic", False), ("dense", False), ("normalize", True)):
                if getattr(self, name) != default:
                    raise UserError(f"--{'' if getattr(self, name) else 'no-'}{name}", None, "not for --format timm")
            others = {file.name for file in Path(self.out).glob("*")} - {"config.json", "model.safetensors", "README.md"}
            if others and not Path(self.out, "metrics.jsonl").exists():
                raise UserError("--out", self.out, f"holds other files ({min(others)}); give a new folder")
            if any((folder / "metrics.jsonl").exists() for folder in (Path(self.out), Path(self.out).parent)):
                raise UserError("--out", self.out, "is a run or part of one; give a new folder")
        else:
            if self.push_to_hub is not None:
                raise UserError("--push-to-hub", self.push_to_hub, "needs --format timm")
            if Path(self.out).suffix != _SUFFIXES[self.format]:
                raise UserError("--out", self.out, f"must end in {_SUFFIXES[self.format]} for --format {self.format}")
        if Path(self.out).is_file() == (self.format == "timm") and Path(self.out).exists():
            raise UserError("--out", self.out, "is a file; give a folder" if self.format == "timm" else "is a folder")
        if self.push_to_hub is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", self.push_to_hub):
            raise UserError("--push-to-hub", self.push_to_hub, "must be NAME or OWNER/NAME")


def export(config: ExportConfig) -> dict[str, float]:
    """Export a model; see `ExportConfig`.

    Returns:
        Largest relative difference to PyTorch, by the (batch x height x width) it was measured at.

    Raises:
        UserError: anything in the configuration that cannot work, or a difference above `parity.TOLERANCE`; nothing is
            left behind then.
    """
    show_messages()
    if config.format == "onnx":
        check_onnx_installed()
    model = _open(config)
    check_plain(model, config.model, field="model")
    image_size = example_size(model, parse_size("--image-size", config.image_size))
    random = not (config.model_pretrained and has_weights(config.model)) and not is_file_name(config.model)
    origin = find_origin(config.model, random=random)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if config.format == "timm":
        differences = _export_timm(model, origin, out, image_size)
    else:
        differences = _export_program(config, model, origin, out, image_size)
    for size, difference in differences.items():
        logger.info("at %s the largest relative difference to PyTorch is %.1e", size, difference)
    logger.info("written: %s", out)
    if config.push_to_hub is not None:
        logger.info("sent to the Hub: hf-hub:%s", _push(out, config.push_to_hub))
    return differences


def _push(folder: Path, name: str) -> str:
    """Send a folder to the Hub; returns the repository's full name."""
    try:
        api = huggingface_hub.HfApi()
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model exported with vit-linearizer")
    except Exception as error:  # the hub client has no common base class for its many errors
        reason = " ".join(str(error).split())[:200]
        remedy = f"could not be sent ({reason}); {folder} is written: check the network and `hf auth login`, and try again"
        raise UserError("--push-to-hub", name, remedy) from error
    return repository


def _open(config: ExportConfig) -> torch.nn.Module:
    """The model, at the image size asked for; with ``--dynamic`` at its own, since its positions follow every image then."""
    pretrained = config.model_pretrained and has_weights(config.model)
    if config.model_pretrained and not pretrained and timm.is_model(config.model):
        logger.warning("%s has no published weights: it is exported with random ones", config.model)
    size = None if config.dynamic else parse_size("--image-size", config.image_size)
    wanted: dict[str, Any] = {} if size is None else {"img_size": size}
    model = config.open(pretrained=pretrained, **wanted)
    if config.dynamic and getattr(model, "dynamic_img_size", None) is False:
        model = config.open(pretrained=pretrained, dynamic_img_size=True)
    return model


def _export_timm(model: torch.nn.Module, origin: Origin, out: Path, image_size: tuple[int, int]) -> dict[str, float]:
    program = Program(model, normalize=True, dense=False)
    differences: dict[str, float] = {}

    def check(folder: Path) -> None:
        reloaded = Program(load(folder), normalize=True, dense=False)

        @torch.no_grad()
        def run(images: torch.Tensor) -> list[Any]:
            return [output.numpy() for output in reloaded(images)]

        differences.update(largest_difference(program, run, example_sizes(model, image_size, dynamic=False)))

    save_model_folder(model, out, card=write_card(origin, model), check=check)
    return differences


def _export_program(
    config: ExportConfig, model: torch.nn.Module, origin: Origin, out: Path, image_size: tuple[int, int]
) -> dict[str, float]:
    program = Program(model, normalize=config.normalize, dense=config.dense)
    sizes = example_sizes(model, image_size, dynamic=config.dynamic)
    logger.info("recording the program at %dx%d", *image_size)
    exported = capture(program, image_size, dynamic=config.dynamic)
    facts = _facts(config, program, image_size)
    logger.info("writing %s and comparing it with PyTorch", out.name)
    if config.format == "onnx":
        differences, opset = write_onnx(program, exported, out, sizes=sizes, metadata=facts)
        facts["opset"] = str(opset)
    else:
        differences = write_torch_program(program, exported, out, sizes=sizes)
    facts |= {f"largest relative difference to PyTorch at {size}": f"{value:.1e}" for size, value in differences.items()}
    out.with_name(out.name + ".md").write_text(write_card(origin, model, facts), encoding="utf-8")
    return differences


def _facts(config: ExportConfig, program: Program, image_size: tuple[int, int]) -> dict[str, str]:
    """What a user of the program has to know: for its card and its metadata."""
    data = timm.data.resolve_model_data_config(program.model)
    mean, std = ([round(float(value), 6) for value in data[key]] for key in ("mean", "std"))
    height, width = patch_size(program.model)
    size = f"{image_size[0]}x{image_size[1]} only"
    if config.dynamic:
        size = f"any height and width in multiples of the patch {height}x{width}"
    classes, dim = getattr(program.model, "num_classes", 0), program.model.num_features
    shapes = {"logits": f"[batch, {classes}]", "features": f"[batch, {dim}], pooled",
              "dense": f"[batch, {dim}, height / {height}, width / {width}], final patch features"}  # fmt: skip
    inside = "RGB in [0, 1]; the normalisation is inside"
    outside = f"RGB, already normalised with mean {mean} and deviation {std}"
    return {
        "input": f"images [batch, 3, height, width], fp32, {inside if config.normalize else outside}",
        "sizes": f"{size}; any batch",
        **{f"output {name}": shapes[name] for name in program.output_names},
    }
