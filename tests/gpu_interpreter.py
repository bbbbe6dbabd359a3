"""Runs checks of GPU kernels, the files of tests/gpu_checks, in a pytest of their own: interpreted on the CPU, or on a GPU.

Triton decides at its first import whether its own library is to be compiled or interpreted, and torch.compile imports it
in other tests: the interpreter needs a process that starts with it. By hand:

    TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest --noconftest tests/gpu_checks/check_scan.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

#: Whether this process interprets kernels, and where their tensors live.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

_TESTS = Path(__file__).parent


def run_checks(file: str, *, device: str = "cpu") -> None:
    """Run all tests of a file in a fresh process; fails with its output unless every one of them passes.

    Args:
        file: name of a file in tests/gpu_checks, such as ``check_scan.py``.
        device: ``cpu`` for the interpreter, ``cuda`` for kernels as a GPU gets them.
    """
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1" if device == "cpu" else "0",
        "PYTHONPATH": os.pathsep.join([str(_TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(_TESTS / "gpu_checks" / file)]
    done = subprocess.run(command, env=environment, cwd=_TESTS.parent, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not summary or "skipped" in summary[0]:
        pytest.fail(f"{file} on {device}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}", pytrace=False)


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill with NaN whatever PyTorch hands out uninitialised, so that an element nobody writes is seen."""

    def poisoned(make):
        def filled(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
