"""The implementation for CUDA devices of what a mixer's core and the rows around it do: kernels in Triton.

`scan` and its neighbours are the scan of Mamba-2, `conv` and `gate_norm` what stands around it in a mixer (`mixer`),
`swiglu`, `reading_order` and `from_reading_order` what stands around that in a block. They serve fp32, bf16 and fp16
and must equal their plain counterparts in `ops`. `registration` and `fused_norms` make them known to PyTorch and `operators`
calls them; none of these imports Triton before the first call.
"""

from .operators import (
    add_and_norm,
    add_from_reading_order,
    available,
    fits_mixer,
    mixer_core,
    norm_to_reading_order,
    rms_norm,
    serves,
    serves_rows,
    serves_sequences,
    silu_mul,
    status,
    to_reading_order,
)

__all__ = [
    "add_and_norm",
    "add_from_reading_order",
    "available",
    "fits_mixer",
    "mixer_core",
    "norm_to_reading_order",
    "rms_norm",
    "serves",
    "serves_rows",
    "serves_sequences",
    "silu_mul",
    "status",
    "to_reading_order",
]
