"""The native CPU implementation of what a mixer's core and the rows around it do, in C++ built on first use.

``mixer.cpp`` is the core of a Mamba-2 mixer in one pass over the tokens and ``mixer_backward.cpp`` its derivative;
``rows.cpp`` is what happens to single tokens. They serve fp32 and bf16 and must equal their plain counterparts in `ops`.
`build` makes the library, `registration` makes it known to PyTorch, `operators` calls it. Without a compiler there is a
reason instead, and everything runs on the plain path.
"""

from .operators import (
    add_from_reading_order,
    available,
    fingerprint,
    fits_mixer,
    mixer_core,
    rms_norm,
    serves,
    serves_rows,
    silu_mul,
    status,
    to_reading_order,
)

__all__ = [
    "add_from_reading_order",
    "available",
    "fingerprint",
    "fits_mixer",
    "mixer_core",
    "rms_norm",
    "serves",
    "serves_rows",
    "silu_mul",
    "status",
    "to_reading_order",
]
