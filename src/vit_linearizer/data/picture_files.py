"""Files and folders that a user lists -> picture files, each with a name of its own to keep results by."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..contracts import UserError
from .images import EXTENSIONS, walk_images


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """A file and what its results are called.

    Attributes:
        file: where it is.
        wanted: its path below the folder that was listed, or its own name.
        name: the same, or with a number where that is taken.
    """

    file: Path
    wanted: Path
    name: Path


def find_pictures(arguments: Sequence[str], out: Path) -> list[PictureFile]:
    """All files that the arguments name, each once, in their order; those of a folder sorted.

    No two names differ in their suffix or the case of letters alone: of ``cat.jpg``, ``cat.png`` the second becomes
    ``cat-2.png``. No name leads upwards.

    Args:
        arguments: files, of whatever suffix, and folders of images, searched recursively.
        out: where results will lie; pictures below it are results of an earlier run, and left out.

    Returns:
        Files, whether or not they can be read.

    Raises:
        UserError: there is no such file or folder, a folder holds no images, or it lies in ``out``.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    target = out.resolve()
    for argument in arguments:
        path = Path(argument)
        if not path.exists():
            raise UserError("--images", argument, "no such file or folder")
        folder = path if path.is_dir() else path.parent
        if folder.resolve().is_relative_to(target):
            raise UserError("--out", out, f"{argument} lies in it; give a folder for the results alone")
        names = [Path(path.name)]
        if path.is_dir():
            walked = (name for name in walk_images(path) if not (path / name).resolve().is_relative_to(target))
            names = sorted(walked, key=Path.as_posix)
        if not names:
            raise UserError("--images", argument, f"holds no images; expected {' '.join(EXTENSIONS)} files, in any depth")
        for name in names:
            found.setdefault(folder.resolve() / name, (folder / name, name))
    return _named(list(found.values()))


def _named(files: Sequence[tuple[Path, Path]]) -> list[PictureFile]:
    """A number for whoever comes second, and none that another file bears by itself."""
    first_of = {_key(wanted): file for file, wanted in reversed(files)}
    taken, pictures = set(first_of), []
    for file, wanted in files:
        name, number = wanted, 2
        while _key(name) in taken and first_of.get(_key(name)) != file:
            name = wanted.with_stem(f"{wanted.stem}-{number}")
            number += 1
        taken.add(_key(name))
        pictures.append(PictureFile(file=file, wanted=wanted, name=name))
    return pictures


def _key(name: Path) -> str:
    return name.with_suffix("").as_posix().casefold()
