"""A block's norms in one pass with its reading order: the operators against their composition in float64, and the block."""

import functools
from collections import Counter

import pytest
import torch
from check_rows import leaves, normal, within
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gpu_interpreter import DEVICE, INTERPRETED, poison_new_memory
from vit_linearizer import ops
from vit_linearizer.models.adventurer_block import AdventurerBlock
from vit_linearizer.ops import gpu, norm, reading_order
from vit_linearizer.ops.gpu.registration import OPS

EPS = 1e-5
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: Of whole tensors; the interpreter cuts numbers off where it should round.
ROUNDING = {FP32: 1e-5, BF16: 1e-2, FP16: 2e-3}
FLIPS = pytest.mark.parametrize("flip", [False, True], ids=["straight", "flipped"])
SHAPES = [(1, 1, 8), (1, 2, 48), (3, 17, 100), (2, 66, 40)]
SHAPES += [] if INTERPRETED else [(2, 2050, 768), (128, 198, 192)]
FUSED = {"norm_to_reading_order", "add_and_norm"}
BACKWARD = {f"{name}_backward" for name in FUSED}


@pytest.fixture(autouse=True)
def _without_native(monkeypatch):
    monkeypatch.setattr(ops.native, "serves", lambda *_: False)
    monkeypatch.setattr(ops.native, "serves_rows", lambda *_: False)


class Ran(TorchDispatchMode):
    """Counts the GPU's operators that run."""

    def __init__(self):
        super().__init__()
        self.operators: Counter = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "vit_linearizer_gpu":
            self.operators[operator._opname] += 1
        return operator(*args, **(kwargs or {}))


def near(got: Tensor, want: Tensor, dtype: torch.dtype = FP32) -> None:
    assert got.shape == want.shape
    error = float((got.detach().double() - want.detach().double()).norm())
    assert error <= ROUNDING[dtype] * float(want.detach().norm()) + 1e-12, error


def composed(x: Tensor, weight: Tensor, flip: bool) -> Tensor:
    return reading_order.to_reading_order(norm.rms_norm(x, weight, EPS), flip)


def composed_sum(x: Tensor, mixed: Tensor, weight: Tensor, flip: bool) -> tuple[Tensor, Tensor]:
    added = reading_order.add_from_reading_order(x, mixed, flip)
    return added, norm.rms_norm(added, weight, EPS)


# ---- the operators


@FLIPS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_norm_and_into_reading_order(monkeypatch, dtype, shape, flip):
    batch, length, columns = shape
    x, weight = normal(*shape, dtype=dtype, seed=1).requires_grad_(), normal(columns, seed=2).requires_grad_()
    gout = normal(batch, length + 1, columns, dtype=dtype, seed=3)
    exact = leaves(x, weight)
    want = composed(*exact, flip)
    poison_new_memory(monkeypatch)
    with Ran() as ran:
        out = ops.norm_to_reading_order(x, weight, EPS, flip)
        gradients = torch.autograd.grad(out, [x, weight], gout)
    assert ran.operators == {"norm_to_reading_order": 1, "norm_to_reading_order_backward": 1}
    assert [t.dtype for t in (out, *gradients)] == [dtype, dtype, FP32]
    near(out, want, dtype)
    for got, wanted in zip(gradients, torch.autograd.grad(want, exact, gout.double()), strict=True):
        near(got, wanted, dtype)


@FLIPS
@pytest.mark.parametrize(
    ("shape", "used"), [*((shape, "both") for shape in SHAPES), (SHAPES[2], "sum"), (SHAPES[2], "norm")], ids=str
)
@pytest.mark.parametrize(
    "dtypes", [(FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, BF16), (BF16, FP32), (FP16, FP16)], ids=str
)
def test_out_of_reading_order_and_norm(monkeypatch, dtypes, shape, flip, used):
    batch, length, columns = shape
    x = normal(*shape, dtype=dtypes[0], seed=1).requires_grad_()
    mixed = normal(batch, length + 1, columns, dtype=dtypes[1], seed=2).requires_grad_()
    weight = normal(columns, seed=3).requires_grad_()
    exact = leaves(x, mixed, weight)
    want = composed_sum(*exact, flip)
    poison_new_memory(monkeypatch)
    with Ran() as ran:
        found = ops.add_and_norm(x, mixed, weight, EPS, flip)
    assert ran.operators == {"add_and_norm": 1}
    of_sum, coarse = torch.promote_types(*dtypes), BF16 if BF16 in dtypes else FP16 if FP16 in dtypes else FP32
    assert [t.dtype for t in found] == [of_sum] * 2
    for got, wanted in zip(found, want, strict=True):
        near(got, wanted, of_sum)

    taken = {"both": [0, 1], "sum": [0], "norm": [1]}[used]
    g = [normal(*shape, dtype=of_sum, seed=4 + place) for place in taken]
    own, wanted = (
        torch.autograd.grad([outputs[place] for place in taken], inputs, gradients, allow_unused=True)
        for outputs, inputs, gradients in (
            (found, [x, mixed, weight], g),
            (want, exact, [t.double() for t in g]),
        )
    )
    assert (own[2] is None) == (wanted[2] is None) == (used == "sum")
    for got, gradient, given in zip(own, wanted, (x, mixed, weight), strict=True):
        if gradient is not None:
            assert got.dtype == given.dtype
            near(got, gradient, coarse)
    assert not own[1][:, 0].any(), "nothing of the mean's"


@FLIPS
def test_any_strides(flip):
    """Inputs with gaps, and gradients as autograd hands them out: expanded, transposed, or of one output alone."""
    x, mixed, weight = normal(2, 9, 16, seed=1), normal(2, 10, 16, seed=2), normal(32, seed=3)[::2]
    gaps = [within(t, 19, 2).requires_grad_() for t in (x, mixed)]
    exact = leaves(x, mixed, weight)
    weight.requires_grad_()

    def loss(read: Tensor, added: Tensor, normed: Tensor) -> Tensor:
        return read.sum() + (added.transpose(0, 2) * normed.transpose(0, 2).square()).sum()

    found = loss(ops.norm_to_reading_order(gaps[0], weight, EPS, flip), *ops.add_and_norm(*gaps, weight, EPS, flip))
    want = loss(composed(exact[0], exact[2], flip), *composed_sum(*exact, flip))
    near(found, want)
    pairs = zip(torch.autograd.grad(found, [*gaps, weight]), torch.autograd.grad(want, exact), strict=True)
    for got, gradient in pairs:
        near(got, gradient)


@pytest.mark.parametrize("wanted", ["x", "mixed", "weight"])
def test_one_input_alone_wants_a_gradient(wanted):
    tensors = dict(x=normal(2, 5, 8, seed=1), mixed=normal(2, 6, 8, seed=2), weight=normal(8, seed=3))
    exact = {name: t.double() for name, t in tensors.items()}
    gradients = []
    for given, function in ((tensors, ops.add_and_norm), (exact, lambda x, m, w, _, f: composed_sum(x, m, w, f))):
        given[wanted].requires_grad_()
        added, normed = function(*given.values(), EPS, True)
        gradients += torch.autograd.grad((added.sin() + normed.cos()).sum(), given[wanted])
    near(*gradients)


def test_without_gradients_the_same_comes_out():
    x, mixed, weight = normal(2, 5, 8, seed=1), normal(2, 6, 8, seed=2), normal(8, seed=3)
    for run in (
        lambda w: (ops.norm_to_reading_order(x, w, EPS, True),),
        lambda w: ops.add_and_norm(x, mixed, w, EPS, True),
    ):
        with torch.inference_mode():
            alone = run(weight)
        for a, b in zip(alone, run(weight.clone().requires_grad_()), strict=True):
            assert torch.equal(a, b.detach())


def test_second_derivatives_are_refused():
    x, mixed, weight = normal(1, 3, 8).requires_grad_(), normal(1, 4, 8), normal(8)
    for out in (ops.norm_to_reading_order(x, weight, EPS, False), ops.add_and_norm(x, mixed, weight, EPS, False)[1]):
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="twice; set VIT_LINEARIZER_TRITON=0"):
            gradient.sum().backward()


@pytest.mark.filterwarnings("ignore")  # of torch.func itself
def test_transforms_get_the_plain_path():
    x, mixed, weights = normal(2, 5, 8, seed=1), normal(2, 6, 8, seed=2), normal(3, 8, seed=3)
    with torch.no_grad(), Ran() as ran:
        read = torch.func.vmap(lambda w: ops.norm_to_reading_order(x, w, EPS, True))(weights)
        _, normed = torch.func.vmap(lambda w: ops.add_and_norm(x, mixed, w, EPS, True))(weights)
        _, slope = torch.func.jvp(lambda t: ops.add_and_norm(x, t, weights[0], EPS, True)[0], (mixed,), (mixed,))
    assert not FUSED & set(ran.operators)
    near(read, torch.stack([composed(x, w, True) for w in weights]))
    near(normed, torch.stack([composed_sum(x, mixed, w, True)[1] for w in weights]))
    near(slope, composed_sum(torch.zeros_like(x), mixed, weights[0], True)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # read by PyTorch's own check
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_operators_are_registered_as_pytorch_wants_them(dtype):
    """Schemas, fakes (also with sizes not known) and derivatives agree with what runs; nothing shares memory."""
    x, mixed = normal(2, 5, 16, dtype=dtype, seed=1), normal(2, 6, 16, dtype=BF16, seed=2)
    weight = normal(16, seed=3)
    _, scale = OPS.norm_to_reading_order(x, weight, EPS, True, BF16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.norm_to_reading_order_backward, (mixed, x, weight, scale, True), test_utils=checks)
    added, normed, scale = OPS.add_and_norm(x, mixed, weight, EPS, False, BF16)
    arguments = (added, normed, added, weight, scale, False, dtype, BF16)
    torch.library.opcheck(OPS.add_and_norm_backward, arguments, test_utils=checks)
    for t in (x, mixed, weight):
        t.requires_grad_()
    torch.library.opcheck(OPS.norm_to_reading_order, (x, weight, EPS, True, BF16))
    torch.library.opcheck(OPS.add_and_norm, (x, mixed, weight, EPS, False, BF16))
    assert [t.requires_grad for t in OPS.norm_to_reading_order(x, weight, EPS, True, BF16)] == [True, False]
    assert [t.requires_grad for t in OPS.add_and_norm(x, mixed, weight, EPS, True, BF16)] == [True, True, False]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_under_autocast_norms_come_out_as_linear_layers_want_them(dtype):
    x, mixed, weight = normal(2, 5, 16, seed=1), normal(2, 6, 16, dtype=dtype, seed=2), normal(16, seed=3)
    g = normal(2, 5, 16, dtype=dtype, seed=5)
    exact = leaves(x, mixed, weight)
    want = (composed(exact[0], exact[2], True), *composed_sum(*exact, True))
    inputs = [t.requires_grad_() for t in (x, mixed, weight)]
    with torch.autocast(DEVICE, dtype):
        found = (ops.norm_to_reading_order(x, weight, EPS, True), *ops.add_and_norm(*inputs, EPS, True))
        low = ops.norm_to_reading_order(x.to(BF16), weight, EPS, True)
    assert [t.dtype for t in found] == [dtype, FP32, dtype]
    assert low.dtype == BF16, "what is in 16 bits stays as it is"
    for got, wanted, precision in zip(found, want, (dtype, FP32, dtype), strict=True):
        near(got, wanted, precision)
    own = torch.autograd.grad(found, inputs, [normal(2, 6, 16, dtype=dtype, seed=4), g.float(), g])
    wanted = torch.autograd.grad(want, exact, [normal(2, 6, 16, dtype=dtype, seed=4).double(), g.double(), g.double()])
    assert [t.dtype for t in own] == [FP32, dtype, FP32]
    for got, gradient, precision in zip(own, wanted, (FP32, dtype, FP32), strict=True):
        near(got, gradient, precision)


# ---- the block


def make_block(flip: bool = True, drop_path: float = 0.0) -> AdventurerBlock:
    torch.manual_seed(0)
    made = AdventurerBlock(32, depth=4, flip=flip, mlp_ratio=2.0, drop_path=drop_path, implementation="auto")
    for norm_ in (made.norm, made.norm_mlp):
        nn.init.normal_(norm_.weight)
    return made.to(DEVICE)


def tokens(dtype: torch.dtype = FP32) -> Tensor:
    return normal(2, 19, 32, dtype=dtype, seed=7).requires_grad_()


def result(function, block: nn.Module, x: Tensor, *others) -> list[Tensor]:
    """Output and all gradients; a fixed seed for the drop path."""
    torch.manual_seed(1)
    y = function(x, *others)
    return [y, *torch.autograd.grad(y.square().mul(torch.linspace(-1, 1, y.shape[1], device=DEVICE)[:, None]).sum(),
                                    [x, *block.parameters()])]  # fmt: skip


@pytest.fixture
def plainly(monkeypatch):
    """Calls a function without the GPU's operators."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            for name in ("serves", "serves_rows", "serves_sequences"):
                patch.setattr(gpu, name, lambda *_: False)
            return function(*arguments)

    return call


def alike(found: list[Tensor], want: list[Tensor], tolerance: float = 1e-4) -> None:
    for place, (got, wanted) in enumerate(zip(found, want, strict=True)):
        assert got.dtype == wanted.dtype
        error = float((got - wanted).detach().norm() / wanted.detach().norm())
        assert error < tolerance, f"{place}: {error:.1e}"


@FLIPS
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_block_equals_the_plain_one(plainly, flip, drop_path):
    block, x = make_block(flip, drop_path), tokens()
    with Ran() as ran:
        found = result(block, block, x)
    once = dict.fromkeys((*FUSED, *BACKWARD, "mixer_core_keeping", "mixer_core_backward"), 1)
    assert {name: ran.operators[name] for name in once} == once
    assert not {"rms_norm", "to_reading_order", "add_from_reading_order"} & set(ran.operators)
    alike(found, plainly(result, block, block, x))


def test_block_for_the_class_token_alone(plainly):
    block, x = make_block(), tokens()
    with Ran() as ran:
        found = result(block, block, x, True)
    assert ran.operators["norm_to_reading_order"] == ran.operators["rms_norm"] == 1
    assert not ran.operators["add_and_norm"]
    alike(found, plainly(result, block, block, x, True))


def watch_with_hook(norm_: nn.Module, seen: list) -> None:
    norm_.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))


def watch_with_pre_hook(norm_: nn.Module, seen: list) -> None:
    norm_.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape))


def watch_gradients(norm_: nn.Module, seen: list) -> None:
    norm_.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0].shape))


def give_another_forward(norm_: nn.Module, seen: list) -> None:
    inner = norm_.forward
    norm_.forward = lambda x: seen.append(x.shape) or inner(x)


WATCHING = (watch_with_hook, watch_with_pre_hook, watch_gradients, give_another_forward)


@pytest.mark.parametrize("watch", WATCHING, ids=lambda watch: watch.__name__)
@pytest.mark.parametrize("name", ["norm", "norm_mlp"])
def test_a_watched_norm_is_called(plainly, name, watch):
    block, x, seen = make_block(), tokens(), []
    watch(getattr(block, name), seen)
    with Ran() as ran:
        found = result(block, block, x)
    assert seen == [(2, 19, 32)]
    assert FUSED & set(ran.operators) == {{"norm": "add_and_norm", "norm_mlp": "norm_to_reading_order"}[name]}
    alike(found, plainly(result, block, block, x))


def test_norms_are_called_where_every_module_is_watched():
    block, x, seen = make_block(), tokens(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, _inputs, _output: seen.append(module))
    try:
        block(x)
    finally:
        handle.remove()
    assert {block.norm, block.norm_mlp} <= set(seen)


@pytest.mark.parametrize("name", ["norm", "norm_mlp"])
def test_another_norm_in_its_place_is_called(plainly, name):
    block, x = make_block(), tokens()
    setattr(block, name, nn.LayerNorm(32).to(DEVICE))
    alike(result(block, block, x), plainly(result, block, block, x))


def test_block_in_mixed_precision(plainly):
    """Residual stream and weights in fp32, linear layers in bf16."""
    block, x = make_block(), tokens()
    read, handed = [], []
    block.mixer.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0].dtype))
    block.mlp.register_forward_pre_hook(lambda _module, inputs: handed.append(inputs[0].dtype))
    with torch.autocast(DEVICE, BF16):
        found, want = result(block, block, x), plainly(result, block, block, x)
    assert read == handed == [BF16, FP32]
    assert [t.dtype for t in found] == [FP32] * len(found)
    exact = result(block, block, x)
    alike(found, exact, 0.1)
    for own, plain, truth in zip(found, want, exact, strict=True):
        assert (own - truth).norm() < 2 * (plain - truth).norm() + 2e-3 * truth.norm()


def test_block_in_bf16_is_near(plainly):
    block, x = make_block(), tokens()
    want = plainly(result, block, block, x)
    low = make_block().to(BF16)
    found = result(low, low, x.detach().to(BF16).requires_grad_())
    alike([t.float() for t in found], want, 0.1)


def test_checkpointed_block_equals_the_block():
    block, x = make_block(drop_path=0.5), tokens()
    want = result(block, block, x)
    with Ran() as ran:
        found = result(functools.partial(checkpoint, block, use_reentrant=False), block, x)
    assert ran.operators["norm_to_reading_order"] == ran.operators["add_and_norm"] == 2
    for got, wanted in zip(found, want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("dynamic", "mixed_precision"), [(False, False), (True, True)], ids=["fixed", "any size, autocast"])
def test_compiled_block_equals_the_block(dynamic, mixed_precision):
    torch._dynamo.reset()
    programs = []

    def backend(program, inputs):
        names = {str(node.target) for node in program.graph.nodes}
        programs.append({name.split(".")[1] for name in names if name.startswith("vit_linearizer_gpu.")})
        return torch._dynamo.lookup_backend("aot_eager")(program, inputs)

    block = make_block()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
    count = []
    for length in (19, 23):
        x = normal(2, length, 32, seed=length).requires_grad_()
        with torch.autocast(DEVICE, BF16, enabled=mixed_precision):
            alike(result(compiled, block, x), result(block, block, x), 2e-2 if mixed_precision else 1e-5)
        count.append(len(programs))
    assert all(names == {*FUSED, "mixer_core_keeping", "silu_mul"} for names in programs)
    assert (count[1] == count[0]) is dynamic, "one program for all lengths"


@pytest.mark.parametrize("used", [[0], [1]], ids=["sum", "norm"])
def test_compiled_with_one_output_alone(used):
    torch._dynamo.reset()
    x, mixed = normal(2, 5, 16, seed=1).requires_grad_(), normal(2, 6, 16, seed=2).requires_grad_()
    weight = normal(16, seed=3).requires_grad_()

    def run(x: Tensor, mixed: Tensor, weight: Tensor) -> Tensor:
        return ops.add_and_norm(x, mixed, weight, EPS, True)[used[0]].sin()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    inputs = [x, mixed, weight][: 2 + used[0]]
    want, found = (torch.autograd.grad(function(x, mixed, weight).square().sum(), inputs) for function in (run, compiled))
    for got, wanted in zip(found, want, strict=True):
        assert torch.equal(got, wanted)
