"""The norms of a block, fused with its reading order, as PyTorch knows them: schemas, shapes (fakes) and derivatives.

Source: Adventurer (arXiv 2410.07599). What a block's two RMSNorms read or write has to be moved anyway, so on a GPU each is
one operator with that: `norm_to_reading_order` with what the mixer reads, `add_and_norm` with where its output goes. They
must equal `ops.rms_norm` with `ops.to_reading_order` or `ops.add_from_reading_order`. Only the GPU has them; what it shares
with the CPU's operators is in `ops.registration`.
"""

from typing import Any

import torch
from torch import Tensor

from ..registration import refuse_derivative

_SCHEMAS = (
    # the tokens in reading order, and the norm's scale
    "norm_to_reading_order(Tensor x, Tensor weight, float eps, bool flip, ScalarType dtype) -> (Tensor, Tensor)",
    "norm_to_reading_order_backward(Tensor gout, Tensor x, Tensor weight, Tensor scale, bool flip) -> (Tensor, Tensor)",
    # the sum, its norm, and the norm's scale
    "add_and_norm(Tensor x, Tensor mixed, Tensor weight, float eps, bool flip, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    "add_and_norm_backward(Tensor gadded, Tensor gout, Tensor added, Tensor weight, Tensor scale, bool flip,"
    " ScalarType x_dtype, ScalarType mixed_dtype) -> (Tensor, Tensor, Tensor)",
)


def register(library: torch.library.Library, operators: Any, plain: str) -> None:
    """Define the operators beside those of `ops.registration`.

    Args:
        library: of the namespace.
        operators: that namespace in ``torch.ops``; its ``add_from_reading_order_backward`` is used too.
        plain: what a user does to get the plain path instead.
    """
    for schema in _SCHEMAS:
        library.define(schema)
    _register_fakes(library.ns)
    _register_derivatives(library.ns, operators)
    for name in ("norm_to_reading_order", "add_and_norm"):
        refuse_derivative(f"{library.ns}::{name}_backward", plain)


def _register_fakes(namespace: str) -> None:
    def fake(name: str) -> Any:
        return torch.library.register_fake(f"{namespace}::{name}")

    @fake("norm_to_reading_order")
    def _(x, _weight, _eps, _flip, dtype):
        batch, length, columns = x.shape
        return x.new_empty((batch, length + 1, columns), dtype=dtype), _scale_like(x)

    @fake("norm_to_reading_order_backward")
    def _(_gout, x, weight, _scale, _flip):
        return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)

    @fake("add_and_norm")
    def _(x, mixed, _weight, _eps, _flip, dtype):
        added = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, mixed.dtype))
        return added, added.new_empty(x.shape, dtype=dtype), _scale_like(x)

    @fake("add_and_norm_backward")
    def _(_gadded, _gout, added, weight, _scale, _flip, x_dtype, mixed_dtype):
        batch, length, columns = added.shape
        gx = added.new_empty(added.shape, dtype=x_dtype)
        gmixed = added.new_empty((batch, length + 1, columns), dtype=mixed_dtype)
        return gx, gmixed, weight.new_empty(weight.shape, dtype=torch.float32)


def _scale_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _register_derivatives(namespace: str, operators: Any) -> None:
    def save_read(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, _, ctx.flip, _ = inputs
        _, scale = output
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)

    def read_backward(ctx: Any, gout: Tensor | None, _gscale: None) -> tuple:
        if gout is None:
            return None, None, None, None, None
        x, weight, scale = ctx.saved_tensors
        gx, gweight = operators.norm_to_reading_order_backward(gout, x, weight, scale, ctx.flip)
        return gx, gweight.to(weight.dtype), None, None, None

    def save_add(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, mixed, weight, _, ctx.flip, _ = inputs
        added, _, scale = output
        ctx.dtypes = x.dtype, mixed.dtype
        ctx.save_for_backward(added, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)

    def add_backward(ctx: Any, gadded: Tensor | None, gout: Tensor | None, _gscale: None) -> tuple:
        x_dtype, mixed_dtype = ctx.dtypes
        gx = gmixed = gweight = None
        if gout is not None:
            added, weight, scale = ctx.saved_tensors
            if gadded is None:
                gadded = torch.zeros_like(added)
            gx, gmixed, gweight = operators.add_and_norm_backward(
                gadded, gout, added, weight, scale, ctx.flip, x_dtype, mixed_dtype
            )
            gweight = gweight.to(weight.dtype)
        elif gadded is not None:  # nobody used the norm
            gx = gadded.to(x_dtype)
            gmixed = operators.add_from_reading_order_backward(gadded.to(mixed_dtype).contiguous(), ctx.flip)
        return gx, gmixed, gweight, None, None, None

    torch.library.register_autograd(f"{namespace}::norm_to_reading_order", read_backward, setup_context=save_read)
    torch.library.register_autograd(f"{namespace}::add_and_norm", add_backward, setup_context=save_add)
