"""From what a user types to a model: timm names, ``hf-hub:`` and ``local-dir:`` sources, weight files, run folders.

Weights load as tensors only (safetensors, or ``torch.load`` with ``weights_only=True``); nothing is ever unpickled. They
load completely or not at all, with the classifier that they bring; a backbone has it taken off afterwards.
"""

import contextlib
import logging
import os
import re
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch.nn as nn
from timm.models import load_state_dict, save_for_hf

from ..contracts import UserError, did_you_mean
from .released import RELEASED, REPOSITORY

logger = logging.getLogger("vit_linearizer")

_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar")


def load(model: str | os.PathLike[str], *, architecture: str | None = None, **model_args: Any) -> nn.Module:
    """A trained model in evaluation mode, with its classifier where it has one.

    Args:
        model: a run folder (as ``timm.create_model("local-dir:RUN/model", pretrained=True)``), or anything that
            `open_model` takes; names mean their pretrained weights.
        architecture: timm name that a weight file belongs to.
        **model_args: passed to ``timm.create_model``.

    Raises:
        UserError: there is no model of that name, or its weights cannot be had.
    """
    return open_model(os.fspath(model), field="model", architecture=architecture, **model_args).eval()


def model_folder(path: str | os.PathLike[str]) -> Path | None:
    """The timm model folder that a run folder or model folder stands for, or None."""
    for folder in (Path(path) / "model", Path(path)):
        if (folder / "config.json").is_file() and _has_weights(folder):
            return folder
    return None


def is_file_name(name: str) -> bool:
    """Whether a name is that of a weight file or of something on this disk, rather than a model's."""
    return Path(name).suffix in _WEIGHT_FILES or Path(name.removeprefix("local-dir:")).exists()


def _is_source(name: str) -> bool:
    """Whether a name brings its own weights: a file or folder, here or (a file) on the Hub."""
    return is_file_name(name) or name.startswith("local-dir:") or _is_hub_file(name)


def _is_hub_file(name: str) -> bool:
    return name.startswith("hf-hub:") and (name.count("/") > 1 or name == f"hf-hub:{REPOSITORY}")


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in _WEIGHT_FILES for file in folder.iterdir())


def save_model_folder(
    model: nn.Module, folder: Path, *, card: str | None = None, check: Callable[[Path], None] | None = None
) -> None:
    """Write timm's folder format; a reader sees the old folder or the new one, never a half-written one.

    Args:
        model: any timm model.
        folder: ``config.json`` and ``model.safetensors`` go there, in place of whatever it held.
        card: text of its ``README.md``.
        check: looks at the new folder before it takes the place of the old one; what it raises leaves the old one there.
    """
    fresh, old = folder.with_name(f".{folder.name}.vit-linearizer-new"), _old(folder)
    recover_model_folder(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    made_for = None if size is None else {"input_size": (getattr(model, "in_chans", 3), *size)}
    save_for_hf(model, str(fresh), safe_serialization=True, data_config=made_for)
    if card is not None:
        (fresh / "README.md").write_text(card, encoding="utf-8")
    for file in fresh.iterdir():  # safetensors are written for their owner alone
        file.chmod((fresh / "config.json").stat().st_mode)
    if check is not None:
        try:
            check(fresh)
        except BaseException:
            shutil.rmtree(fresh)
            raise
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_model_folder(folder: Path) -> None:
    """Put the old folder back where a kill came between the two renames of `save_model_folder`."""
    if not folder.exists() and _old(folder).exists():
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.vit-linearizer-old")


def open_model(
    name: str,
    *,
    field: str,
    architecture: str | None = None,
    pretrained: bool = True,
    **model_args: Any,
) -> nn.Module:
    """Create a timm model from whatever names one; its weights load completely or not at all.

    Args:
        name: a timm name (with its tag), ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER``, a run or model folder, or a weight
            file (``.safetensors``, ``.pth``), on disk or as ``hf-hub:OWNER/NAME/FILE``. A weight file needs
            ``architecture``, unless it is one of the published ones (`released.RELEASED`).
        field: the flag that this name came from, for messages.
        architecture: timm name that a weight file belongs to.
        pretrained: load weights; folders and files always do.
        **model_args: passed to ``timm.create_model``.

    Raises:
        UserError: unknown name, no weights behind it, missing file, weights that do not fit, or no network to fetch them.
    """
    timm_name, found, note = _resolve(name, field, architecture)
    if note and "flip" not in model_args:
        logger.warning("%s", note)
    if not (pretrained or _is_source(name)):
        return _create(name, field, timm_name, False, {**found, **model_args})
    if not has_weights(name):
        remedy = (
            f"has no published weights; give a file or a run, or {_flag(field, 'pretrained', no=True)} for random weights"
        )
        raise UserError(field, name, remedy)
    # Asked for another number of classes at once, timm would load leniently: the head changes afterwards.
    classes = model_args.pop("num_classes", None)
    model: Any = _create(name, field, timm_name, True, {**found, **model_args})
    if classes is not None and classes != model.num_classes:
        model.reset_classifier(classes)
    return model


def has_weights(name: str) -> bool:
    """Whether there are weights behind a name that `open_model` takes; a bare architecture has none."""
    if _is_source(name) or name.startswith("hf-hub:"):
        return True
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    return config is not None and config.has_weights


def create_backbone(
    name: str,
    *,
    field: str,
    architecture: str | None = None,
    pretrained: bool = False,
    **model_args: Any,
) -> nn.Module:
    """`open_model` without its classifier, and random unless asked for otherwise."""
    model: Any = open_model(name, field=field, architecture=architecture, pretrained=pretrained, **model_args)
    model.reset_classifier(0)
    return model


def probe_backbone(name: str, *, field: str, architecture: str | None = None, **model_args: Any) -> nn.Module:
    """`create_backbone` without weights or memory (on the meta device), to ask for sizes and to check a name early."""
    timm_name, found, _ = _resolve(name, field, architecture)
    return _create(name, field, timm_name, False, {**found, **model_args, "device": "meta"})


def _resolve(name: str, field: str, architecture: str | None) -> tuple[str, dict[str, Any], str | None]:
    """What timm calls it, arguments that go with its weights, and what the user should know about them."""
    if _is_hub_file(name):
        return _resolve_file(_fetch_file(name, field, architecture), name, field, architecture)
    path = Path(name.removeprefix("local-dir:"))
    if path.is_file():
        return _resolve_file(path, name, field, architecture)
    if architecture is not None and path.suffix not in _WEIGHT_FILES:
        remedy = f"is for weight files only; {name} says itself what it is"
        raise UserError(_flag(field, "arch"), architecture, remedy)
    if path.is_dir() or name.startswith("local-dir:"):
        folder = model_folder(path)
        if folder is None:
            raise UserError(field, name, "no config.json with weights there; give a run folder or a timm model folder")
        return f"local-dir:{folder}", {}, None
    if path.suffix in _WEIGHT_FILES:
        raise UserError(field, name, "no such file")
    if not name.startswith("hf-hub:"):
        _check_known(name, field)
    return name, {}, None


def _resolve_file(path: Path, name: str, field: str, architecture: str | None) -> tuple[str, dict[str, Any], str | None]:
    released = RELEASED.get(path.name)
    if architecture is None and released is None:
        remedy = f"is a weight file; name its architecture too: {_flag(field, 'arch')} vit_base_patch16_224"
        raise UserError(field, name, remedy)
    if architecture is not None:
        _check_known(architecture, _flag(field, "arch"))
    state_dict = _read_file(path, name, field)
    model_args: dict[str, Any] = {}
    note = None
    if released is not None and (architecture is None or architecture.startswith("adventurer_")):
        if not released.fits(state_dict):
            remedy = (
                f"bears the name of published weights but is not of their size; rename it, and give {_flag(field, 'arch')}"
            )
            raise UserError(field, name, remedy)
        model_args = {**released.model_args} if architecture in (None, released.architecture) else {"flip": "released"}
        architecture = architecture or released.architecture
        note = f"{path.name}: taken for the published weights of that name, with flip=released; "
        note += "if it is yours, name its rule among the model's arguments (flip=alternate)"
    elif architecture is not None and architecture.startswith("adventurer_"):
        note = f"{path.name}: a weight file does not say which blocks flip; flip=alternate is assumed, "
        note += "published weights need flip=released among the model's arguments"
    assert architecture is not None
    classifier = timm.models.get_pretrained_cfg_value(architecture, "classifier")
    weight = state_dict.get(f"{classifier[0] if isinstance(classifier, tuple | list) else classifier}.weight")
    # Asked for another number of classes than the file has, timm would load leniently.
    classes = weight.shape[0] if weight is not None and weight.ndim else 0
    overlay = {"file": str(path), "num_classes": classes}
    return architecture, {"pretrained_cfg_overlay": overlay, "num_classes": classes, **model_args}, note


def _read_file(path: Path, name: str, field: str) -> dict[str, Any]:
    try:
        return load_state_dict(str(path))
    except Exception as error:  # whatever a file that is no weight file makes the readers trip over
        raise _unreadable(name, field, error) from error


def _fetch_file(name: str, field: str, architecture: str | None) -> Path:
    """A file of a repository on the Hub, from its local cache where it is there already."""
    owner, repository, *parts = name.removeprefix("hf-hub:").split("/")
    file = "/".join(parts) or (f"{architecture}.pth" if architecture else "")
    if not file:
        raise UserError(field, name, f"holds several models; name one, e.g. {name}/{next(iter(RELEASED))}")
    try:
        with _offline_when_unreachable():
            return Path(huggingface_hub.hf_hub_download(f"{owner}/{repository}", file))
    except Exception as error:  # the hub client has no common base class for being offline
        remedy = f"could not be fetched ({type(error).__name__}); without network, give the file itself"
        raise UserError(field, name, remedy) from error


def _create(name: str, field: str, timm_name: str, pretrained: bool, model_args: dict[str, Any]) -> nn.Module:
    try:
        with _offline_when_unreachable():
            return timm.create_model(timm_name, pretrained=pretrained, **model_args)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(field, name, f"could not be built: {_one_line(error)}") from error
    except Exception as error:  # as in _fetch_file
        if isinstance(error, RuntimeError) and "state_dict" in str(error):
            if _only_classifier_differs(str(error), timm_name) and "num_classes" not in model_args:
                return _create(name, field, timm_name, pretrained, {**model_args, "num_classes": 0})
            raise UserError(field, name, f"its weights do not fit the architecture: {_mismatch(str(error))}") from error
        if isinstance(error, Warning) or not (pretrained or timm_name.startswith("hf-hub:")):
            raise
        if timm_name.startswith("local-dir:") or "pretrained_cfg_overlay" in model_args:
            raise _unreadable(name, field, error) from error
        remedy = f"its weights could not be fetched ({type(error).__name__}); without network, give a file with "
        remedy += _flag(field, "arch")
        if not timm_name.startswith("hf-hub:"):
            remedy += f", or {_flag(field, 'pretrained', no=True)} for random weights"
        raise UserError(field, name, remedy) from error


def _flag(field: str, suffix: str, *, no: bool = False) -> str:
    """``--teacher`` and ``arch`` to ``--teacher-arch``."""
    return f"--{'no-' if no else ''}{field.removeprefix('--')}-{suffix}"


def _unreadable(name: str, field: str, error: Exception) -> UserError:
    reason = _one_line(error) or type(error).__name__
    return UserError(field, name, f"cannot be read ({reason}); save it as safetensors or as a plain state dict")


def _mismatch(message: str) -> str:
    """torch's report on a state dict in one line: which keys are missing, unknown or of another shape."""
    found = []
    for title, pattern in (
        ("missing", r"Missing key\(s\) in state_dict: (.*)"),
        ("unknown", r"Unexpected key\(s\).*?: (.*)"),
    ):
        for keys in re.findall(pattern, message):
            names = re.findall(r'"([^"]+)"', keys)
            found.append(f"{title} {_some(names)}")
    shapes = re.findall(r"size mismatch for ([\w.]+): .*?\[([\d, ]*)\]\).*?\[([\d, ]*)\]\)", message)
    if shapes:
        found.append("another shape " + _some([f"{name} [{there}] for [{here}]" for name, there, here in shapes]))
    return "; ".join(found) or _one_line(RuntimeError(message))


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _only_classifier_differs(message: str, timm_name: str) -> bool:
    """Whether a strict load failed for nothing but a missing classifier, as with pretrained weights that have none."""
    known = not timm_name.startswith(("local-dir:", "hf-hub:"))
    classifier = (timm.models.get_pretrained_cfg_value(timm_name, "classifier") if known else None) or "head"
    prefixes = tuple([classifier] if isinstance(classifier, str) else classifier)
    keys = re.findall(r'"([^"]+)"', message)
    only_missing = "Unexpected key" not in message and "size mismatch" not in message
    return only_missing and bool(keys) and all(key.startswith(prefixes) for key in keys)


@contextlib.contextmanager
def _offline_when_unreachable() -> Iterator[None]:
    """Where the hub's name cannot be resolved, use its local cache at once instead of retrying for most of a minute."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    if not before and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(host, 443)
        except OSError:
            huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _check_known(name: str, field: str) -> None:
    if timm.is_model(name.partition(".")[0]):
        base, _, tag = name.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}*") if known.startswith(f"{base}.")]
        if tag and tags and tag not in tags:
            raise UserError(field, name, f"unknown weights; {base} has {', '.join(tags)}")
        return
    close = did_you_mean(name, timm.list_models() + timm.list_pretrained())
    raise UserError(field, name, f"unknown model{close or ', and no such folder or file; see timm.list_models()'}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
