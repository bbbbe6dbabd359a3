"""Fused operators as PyTorch knows them: schemas, shapes (fakes), derivatives, FLOPs. A library adds how to run them.

With these, autograd, ``torch.compile`` and the FLOP counter treat them like any operator of PyTorch's own, whether their
library has been loaded yet or not. `native` (C++ on a CPU) and `gpu` (Triton) have a set each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_PARAMETERS = "Tensor conv_weight, Tensor conv_bias, Tensor dt_bias, Tensor A_log, Tensor D, Tensor norm_weight, float eps"
_KEPT = "Tensor out, Tensor y, Tensor states, Tensor scale"
_FOUR, _SEVEN = (f"({', '.join(['Tensor'] * count)})" for count in (4, 7))
_SCHEMAS = (
    f"mixer_core(Tensor zxbcdt, {_PARAMETERS}) -> Tensor",
    f"mixer_core_carrying(Tensor zxbcdt, {_PARAMETERS}, Tensor(a!) state, int lead) -> Tensor",
    # what is in _KEPT
    f"mixer_core_keeping(Tensor zxbcdt, {_PARAMETERS}) -> {_FOUR}",
    # gradients of zxbcdt and, in fp32, of the parameters
    f"mixer_core_backward(Tensor gout, Tensor zxbcdt, {_PARAMETERS}, {_KEPT}) -> {_SEVEN}",
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "rms_norm_backward(Tensor gout, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "silu_mul(Tensor gate, Tensor x) -> Tensor",
    "silu_mul_backward(Tensor gout, Tensor gate, Tensor x) -> (Tensor, Tensor)",
    "to_reading_order(Tensor x, bool flip) -> Tensor",
    "to_reading_order_backward(Tensor gout, bool flip) -> Tensor",
    "add_from_reading_order(Tensor x, Tensor mixed, bool flip) -> Tensor",
    "add_from_reading_order_backward(Tensor gout, bool flip) -> Tensor",
)


def register(namespace: str, chunk_of: Callable[[int], int], plain: str) -> tuple[torch.library.Library, Any]:
    """Define the operators in a namespace of their own.

    Args:
        namespace: of ``torch.ops``.
        chunk_of: tokens of a chunk of the scan, for a sequence's length.
        plain: what a user does to get the plain path instead.

    Returns:
        What implementations are added to, and ``torch.ops.NAMESPACE``. Keep the first: with it the operators go.
    """
    library = torch.library.Library(namespace, "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    operators = getattr(torch.ops, namespace)
    _register_fakes(namespace, chunk_of)
    _register_derivatives(namespace, operators, plain)
    _register_flops(operators, chunk_of)
    return library, operators


def _sizes(conv_weight: Any, D: Any, norm_weight: Any) -> tuple[int, int]:
    """State and head size, from the parameters' shapes."""
    return (conv_weight[0] - norm_weight[0]) // 2, norm_weight[0] // D[0]


def _register_fakes(namespace: str, chunk_of: Callable[[int], int]) -> None:
    def fake(name: str) -> Any:
        return torch.library.register_fake(f"{namespace}::{name}")

    @fake("mixer_core")
    def _(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps):
        return zxbcdt.new_empty((*zxbcdt.shape[:2], norm_weight.shape[0]))

    @fake("mixer_core_carrying")
    def _(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, state, lead):
        return zxbcdt.new_empty((zxbcdt.shape[0], zxbcdt.shape[1] - lead, norm_weight.shape[0]))

    @fake("mixer_core_keeping")
    def _(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps):
        batch, length = zxbcdt.shape[:2]
        out = zxbcdt.new_empty((batch, length, norm_weight.shape[0]))
        between = (length - 1) // chunk_of(length)
        state_dim, head_dim = _sizes(conv_weight.shape, D.shape, norm_weight.shape)
        states = zxbcdt.new_empty((batch, between, D.shape[0], state_dim, head_dim), dtype=torch.float32)
        return out, torch.empty_like(out), states, zxbcdt.new_empty((batch, length), dtype=torch.float32)

    @fake("mixer_core_backward")
    def _(gout, zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, out, y, states, scale):
        parameters = (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
        return torch.empty_like(zxbcdt), *(torch.empty_like(p, dtype=torch.float32) for p in parameters)

    @fake("rms_norm")
    def _(x, weight, eps):
        return x.new_empty(x.shape)

    @fake("rms_norm_backward")
    def _(gout, x, weight, eps):
        return x.new_empty(x.shape), torch.empty_like(weight, dtype=torch.float32)

    @fake("silu_mul")
    def _(gate, x):
        return gate.new_empty(gate.shape)

    @fake("silu_mul_backward")
    def _(gout, gate, x):
        return gate.new_empty(gate.shape), x.new_empty(x.shape)

    @fake("to_reading_order")
    def _(x, flip):
        return x.new_empty((x.shape[0], x.shape[1] + 1, x.shape[2]))

    @fake("to_reading_order_backward")
    def _(gout, flip):
        return gout.new_empty((gout.shape[0], gout.shape[1] - 1, gout.shape[2]))

    @fake("add_from_reading_order")
    def _(x, mixed, flip):
        return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, mixed.dtype))

    @fake("add_from_reading_order_backward")
    def _(gout, flip):
        return gout.new_empty((gout.shape[0], gout.shape[1] + 1, gout.shape[2]))


def _register_derivatives(namespace: str, operators: Any, plain: str) -> None:
    def derivative(name: str, backward: Any, setup_context: Any) -> None:
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup_context)

    def save_mixer(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient

    def mixer_backward(ctx: Any, gout: Tensor, *_: Any) -> tuple:
        tensors = ctx.saved_tensors
        inputs, kept = tensors[:7], tensors[7:]
        gradients = operators.mixer_core_backward(gout, *inputs, ctx.eps, *kept)
        return *(g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)), None

    def save_norm(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    def norm_backward(ctx: Any, gout: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        gx, gweight = operators.rms_norm_backward(gout, x, weight, ctx.eps)
        return gx, gweight.to(weight.dtype), None

    def save_gate(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def gate_backward(ctx: Any, gout: Tensor) -> tuple:
        return operators.silu_mul_backward(gout, *ctx.saved_tensors)

    def save_order(ctx: Any, inputs: tuple, output: Tensor) -> None:
        (_, ctx.flip) = inputs

    def order_backward(ctx: Any, gout: Tensor) -> tuple:
        return operators.to_reading_order_backward(gout.contiguous(), ctx.flip), None

    def save_sum(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, mixed, ctx.flip = inputs
        ctx.dtypes = x.dtype, mixed.dtype

    def sum_backward(ctx: Any, gout: Tensor) -> tuple:
        x_dtype, mixed_dtype = ctx.dtypes
        gmixed = operators.add_from_reading_order_backward(gout.to(mixed_dtype).contiguous(), ctx.flip)
        return gout.to(x_dtype), gmixed, None

    for name in ("mixer_core", "rms_norm", "silu_mul", "to_reading_order", "add_from_reading_order"):
        refuse_derivative(f"{namespace}::{name}_backward", plain)
    derivative("mixer_core_keeping", mixer_backward, save_mixer)
    derivative("rms_norm", norm_backward, save_norm)
    derivative("silu_mul", gate_backward, save_gate)
    derivative("to_reading_order", order_backward, save_order)
    derivative("add_from_reading_order", sum_backward, save_sum)


def refuse_derivative(name: str, plain: str) -> None:
    """Make the derivative of an operator, such as another's backward pass, an error that says what to do.

    Args:
        name: of the operator, with its namespace.
        plain: what a user does to get the plain path instead.
    """

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(f"fused operators cannot be differentiated twice; {plain} to do that")

    def save_nothing(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    torch.library.register_autograd(name, refuse, setup_context=save_nothing)


def _register_flops(operators: Any, chunk_of: Callable[[int], int]) -> None:
    """Convolution and small products, as the counter counts them on the plain path (whose chunks differ a little)."""

    def forward(zxbcdt: Any, conv_weight: Any, D: Any, norm_weight: Any, lead: int = 0) -> int:
        tokens = zxbcdt[0] * (zxbcdt[1] - lead)
        chunk = chunk_of(zxbcdt[1] - lead)
        state_dim, head_dim = _sizes(conv_weight, D, norm_weight)
        products = 2 * chunk * state_dim + D[0] * 2 * head_dim * (chunk + 2 * state_dim)
        return tokens * (products + 2 * conv_weight[-1] * conv_weight[0])

    @register_flop_formula(operators.mixer_core)
    def _(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, **kwargs):
        return forward(zxbcdt, conv_weight, D, norm_weight)

    @register_flop_formula(operators.mixer_core_carrying)
    def _(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, state, lead, **kwargs):
        return forward(zxbcdt, conv_weight, D, norm_weight, lead)

    @register_flop_formula(operators.mixer_core_keeping)
    def _(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, **kwargs):
        return forward(zxbcdt, conv_weight, D, norm_weight)

    @register_flop_formula(operators.mixer_core_backward)
    def _(gout, zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, *others, **kwargs):
        return 2 * forward(zxbcdt, conv_weight, D, norm_weight)
