"""The native library's way from source to a loaded file: compiled once for a machine, found in a cache afterwards.

A build takes place in a folder of its own and its result is renamed into the cache, so a killed build leaves nothing that
anybody waits for, and processes that build at the same time do not meet. The name in the cache stands for everything the
result depends on: sources, flags, torch, and what the CPU can do.
"""

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

logger = logging.getLogger("vit_linearizer")

_NAME = "vit_linearizer_native"
_HERE = Path(__file__).parent
_SOURCES = ("mixer.cpp", "mixer_backward.cpp", "rows.cpp", "fingerprint.cpp")
_HEADERS = ("vectors.h", "products.h", "mixer.h")

#: For the machine it is built on. No -ffast-math: infinities and not-a-number must come out as they should.
_FLAGS = ("-O3", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_NATIVE = ("-march=native",) if platform.machine().lower() in ("x86_64", "amd64") else ("-mcpu=native",)

#: Leftovers of killed builds are swept away after so long.
_STALE_SECONDS = 3600.0


_AGAIN = "(vit-linearizer doctor tries again)"


class BuildError(Exception):
    """The library cannot be had here; the message is one line that says why."""


def cache_folder() -> Path:
    """Where built libraries are kept: torch's folder for extensions (``TORCH_EXTENSIONS_DIR``), or the user's cache."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(chosen) if chosen else cache / "torch_extensions") / "vit_linearizer"


def load_library(architecture: Sequence[str] = _NATIVE, *, retry: bool = False) -> Path:
    """Load the library into this process, building it where the cache has none.

    Args:
        architecture: compiler flags that name the instructions to use.
        retry: build even where an earlier build failed.

    Returns:
        The file in the cache.

    Raises:
        BuildError: it cannot be built or loaded here.
    """
    flags = [*_FLAGS, *architecture]
    try:
        file = cache_folder() / f"{_key(flags)}.so"
        failed = file.with_suffix(".failed")
        if retry:
            failed.unlink(missing_ok=True)
        if file.is_file() and _loads(file, retry):
            return file
        if failed.is_file():
            raise BuildError(f"{failed.read_text(encoding='utf-8')} {_AGAIN}")
        _require_compiler()
        file.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # no home, or not ours
        raise BuildError(f"there is no folder to keep the library in: {error}; set TORCH_EXTENSIONS_DIR") from error
    try:
        _build_and_load(file, flags)
    except Exception as error:
        reason = f"the build failed: {_first_error(str(error))}"
        with contextlib.suppress(OSError):
            failed.write_text(reason, encoding="utf-8")
        raise BuildError(reason) from error
    return file


def _loads(file: Path, retry: bool) -> bool:
    """Load a library from the cache; with ``retry`` one that cannot be loaded makes way for a new one."""
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        if not retry:
            raise BuildError(f"{file} cannot be loaded: {error} {_AGAIN}") from error
        return False
    return True


def _key(flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in (torch.__version__, platform.machine(), *flags, *_cpu_features()):
        digest.update(part.encode() + b"\0")
    for name in (*_HEADERS, *_SOURCES):
        digest.update((_HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def _cpu_features() -> list[str]:
    """What the CPU can do. A home folder may be shared by machines of several kinds."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("flags", "features")):
                return sorted(line.partition(":")[2].split())
    return [platform.processor(), torch.backends.cpu.get_cpu_capability()]


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "").strip() or "c++"
    if platform.system() == "Windows":
        raise BuildError("it needs GCC or Clang, which is not supported on Windows")
    if shutil.which(compiler.split()[0]) is None:
        raise BuildError(f"there is no C++ compiler ({compiler} is not on the PATH): install g++ or clang, or set CXX")


def _build_and_load(file: Path, flags: Sequence[str]) -> None:
    """Build aside and load from there; the cache gets the file for later processes."""
    # A warning, so that whoever waits in a notebook without logging sees why.
    logger.warning("building the native CPU kernels, once for this machine (about half a minute)")
    started = time.perf_counter()
    for leftover in file.parent.glob("build-*"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix="build-", dir=file.parent))
    try:
        with _quiet_extensions(), _ninja_on_path():
            from torch.utils.cpp_extension import load

            load(
                _NAME,
                [str(_HERE / source) for source in _SOURCES],
                extra_cflags=list(flags),
                extra_ldflags=["-fopenmp"],
                build_directory=str(aside),
                is_python_module=False,
                with_cuda=False,
            )
        next(aside.glob("*.so")).replace(file)  # a second build in one process gets another name
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    logger.info("built the native CPU kernels in %.0f s: %s", time.perf_counter() - started, file)


@contextlib.contextmanager
def _quiet_extensions() -> Iterator[None]:
    """Torch's extension builder warns on import where it finds no CUDA; there is none to be used here."""
    builder = logging.getLogger("torch.utils.cpp_extension")
    level = builder.level
    builder.setLevel(logging.ERROR)
    try:
        yield
    finally:
        builder.setLevel(level)


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """pip puts ninja beside Python, where the shell does not look when the environment is not activated."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([path, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(
        (line for line in lines if "error" in line.lower() and "Error building" not in line), [*lines, "no message"][0]
    )[:300]
