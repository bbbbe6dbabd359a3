"""Features of many pictures in one ``.npz``, written as they come: a killed run goes on where it was.

Rows wait in ``FILE.npz.partial/`` until the last picture is done, then the parts are joined without holding them in memory.
"""

import json
import os
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..contracts import UserError

#: A part is written once it holds so many bytes, or is so many seconds old.
_PART_BYTES, _PART_SECONDS = 64 * 2**20, 10.0


class EmbeddingFile:
    """Arrays that grow row by row, in the order of their pictures.

    Args:
        path: the ``.npz`` to be.
        config: what decides the rows; rows of another configuration are refused.

    Raises:
        UserError: the file exists, or its parts belong to another configuration.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]):
        self.path, self.parts = path, path.with_name(path.name + ".partial")
        self._config = json.dumps(config, indent=2)
        if path.suffix != ".npz":
            raise UserError("--out", path, "must end in .npz")
        if path.exists():
            raise UserError("--out", path, "exists; remove it, or give another name")
        settings = self.parts / "config.json"
        if settings.exists() and settings.read_text() != self._config:
            raise UserError(
                "--out", path, f"{self.parts.name} was begun with other settings; remove it, or give another name"
            )
        self.done = 0
        self._rows: list[tuple[int, dict[str, np.ndarray]]] = []
        self._bytes, self._written = 0, time.monotonic()

    def open(self) -> None:
        """Create the folder of parts, or find the number of pictures (``done``) that an earlier run got through."""
        self.parts.mkdir(parents=True, exist_ok=True)
        (self.parts / "config.json").write_text(self._config)
        for part in self._files():
            with np.load(part) as arrays:
                self.done = int(arrays["done"])

    def append(self, rows: Mapping[str, np.ndarray], done: int) -> None:
        """Add rows (the same keys each time; none at all is fine) of the pictures up to number ``done``."""
        if rows:
            self._rows.append((done, dict(rows)))
            self._bytes += sum(array.nbytes for array in rows.values())
        self.done = done
        if self._bytes >= _PART_BYTES or time.monotonic() - self._written >= _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits in memory."""
        if self._rows:
            done = self._rows[-1][0]
            joined = {key: np.concatenate([rows[key] for _, rows in self._rows]) for key in self._rows[0][1]}
            fresh = self.parts / "part.new"
            with fresh.open("wb") as file:
                np.savez(file, **{"done": np.array(done), **joined})  # type: ignore[arg-type]
            fresh.replace(self.parts / f"part-{done:012d}.npz")
        self._rows, self._bytes, self._written = [], 0, time.monotonic()

    def finish(self) -> int:
        """Join the parts into the ``.npz`` and remove them; returns the number of rows."""
        self.flush()
        files = self._files()
        if not files:
            shutil.rmtree(self.parts)
            raise UserError("--data", None, "none of the images can be read; see the list of skipped files")
        with np.load(files[0]) as first:
            keys = [key for key in first.files if key != "done"]
        fresh = self.path.with_name(self.path.name + ".new")
        with zipfile.ZipFile(fresh, "w", allowZip64=True) as archive:
            rows = [_join(archive, key, files) for key in keys]
        fresh.replace(self.path)
        shutil.rmtree(self.parts)
        return rows[0]

    def _files(self) -> list[Path]:
        return sorted(self.parts.glob("part-*.npz"))


def _join(archive: zipfile.ZipFile, key: str, files: Sequence[Path]) -> int:
    """Write one array of all parts, a part at a time; returns its length."""
    shapes, dtypes = [], []
    for file in files:
        with zipfile.ZipFile(file) as part, part.open(f"{key}.npy") as member:
            shape, dtype = _header(member)
            shapes.append(shape)
            dtypes.append(dtype)
    dtype = np.result_type(*dtypes)  # names may be longer in one part than in another
    rows = sum(shape[0] for shape in shapes)
    with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, *shapes[0][1:])}
        np.lib.format.write_array_header_2_0(member, header)
        for file in files:
            with np.load(file) as arrays:
                member.write(np.ascontiguousarray(arrays[key].astype(dtype)).tobytes())
    return rows


def _header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype


def names_array(names: Sequence[str | os.PathLike[str]]) -> np.ndarray:
    """Names as a plain unicode array, which loads without pickle."""
    return np.array([os.fspath(name) for name in names], dtype=np.str_)
