"""Whether the program is being recorded, so that only plain differentiable tensor operators may appear in it.

Hand-written derivatives, autocast contexts and native kernels are for eager execution; a recorded program runs elsewhere
or is differentiated by its recorder. TorchScript compiles instead of recording; it leaves out a branch that
``torch.jit.is_scripting()`` rules out, but only where that branch is an ``else``.
"""

import torch

#: Older versions say "exporting" under ``torch.compile`` too.
_COMPILING_IS_EXPORTING = torch.__version__ < "2.12"


def recording() -> bool:
    """True under ``torch.compile``, ``torch.export`` (hence ONNX) and ``torch.jit.trace``."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling() or exporting()


def exporting() -> bool:
    """True where the program leaves PyTorch's eager world for good: ``torch.export`` and ``torch.jit.trace``."""
    if torch.jit.is_scripting():
        return False
    else:
        if _COMPILING_IS_EXPORTING and torch.compiler.is_dynamo_compiling():
            return False
        return torch.compiler.is_exporting() or torch.jit.is_tracing()


def transformed(*tensors: torch.Tensor | None) -> bool:
    """True under ``torch.func``'s transforms and forward-mode derivatives, which only PyTorch's own operators know."""
    if torch.compiler.is_compiling():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)
