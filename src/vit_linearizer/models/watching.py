"""Whether somebody looks at what passes through a module: a faster path that goes around the module must not hide it."""

from torch import nn
from torch.nn.modules import module as _modules


def all_are_watched() -> bool:
    """Whether there is a hook on every module there is, as counters and profilers have it."""
    return bool(
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    )


def is_watched(module: nn.Module) -> bool:
    """Whether there is a hook on the module or a part of it, or another ``forward``, or a compiled one."""
    return any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or m._compiled_call_impl is not None
        or "forward" in vars(m)
        for m in module.modules()
    )
