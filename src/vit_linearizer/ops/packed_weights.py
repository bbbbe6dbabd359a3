"""Packed copies of weights, kept from one call to the next, that cannot go stale.

oneDNN packs a weight anew for every product. In bf16 that is a tenth of the time of an image of 224 x 224 or 448 x 448
pixels, which a kept copy saves. Edits of a weight need not leave a trace (``.data``, NumPy, another process), so each call
reads the weight once, takes a fingerprint of its contents, and packs again if that is another one; reading costs a tenth of
packing. The price is memory: a copy is as large as its weight, and goes when the parameter goes. In fp32 twice the memory
would buy 3 or 4 %, so nothing is kept.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

from . import native, onednn

DTYPES = (torch.bfloat16,)
#: Elements of a weight from which a copy pays.
LEAST_ELEMENTS = 2**18
#: Rows of a product below which packing gives nothing, and beyond which it is a small part of it (2 % here).
LEAST_ROWS, MOST_ROWS = 16, 4096

_copies = WeakTensorKeyDictionary()


def kept(weight: Tensor, rows: int) -> Tensor:
    """The packed copy of a weight for products with so many rows, as it is now; the weight itself where that does not pay.

    Args:
        weight: that `onednn.serves`.
        rows: of the product.
    """
    if not _pays(weight, rows):
        return weight
    state = (native.fingerprint(weight), weight.shape, weight.dtype)
    copy = _copies.get(weight)
    if copy is not None and copy[0] == state:
        return copy[1]
    packed = onednn.pack(weight, rows)
    if native.fingerprint(weight) == state[0]:  # else another thread edits it, and what was packed is neither
        _copies[weight] = (state, packed)
    return packed


def _pays(weight: Tensor, rows: int) -> bool:
    return (
        type(weight) is torch.nn.Parameter  # what else there is lives for a call
        and weight.dtype in DTYPES
        and weight.numel() >= LEAST_ELEMENTS
        and LEAST_ROWS <= rows <= MOST_ROWS
        and weight.layout is torch.strided
        and weight.is_contiguous()
        and not is_in_torch_dispatch_mode()  # something records or pretends
        and native.available()
    )
