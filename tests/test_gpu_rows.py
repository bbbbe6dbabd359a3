"""Triton kernels around the scan: convolution, norms, gate and reading order, see tests/gpu_checks."""

import pytest
import torch

from gpu_interpreter import run_checks


def test_interpreted():
    run_checks("check_rows.py")


def test_they_compile_for_hopper():
    run_checks("check_rows_compile.py", device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu():
    run_checks("check_rows.py", device="cuda")
