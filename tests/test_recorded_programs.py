"""The model as others record it: TorchScript, FX, torch.compile, torch.jit.trace and torch.export, each equal to eager."""

import operator

import pytest
import timm
import torch
import torch.fx.experimental._config as shapes_config
import torch.nn.functional as F
from timm.layers import set_scriptable
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models._features import FeatureGetterNet
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


def small(*, seed=0, **changes):
    """A model whose parameters are all random (no zero bias, no unit norm)."""
    torch.manual_seed(seed)
    shape = dict(embed_dim=64, depth=4, img_size=64, num_classes=7)
    model = timm.create_model("adventurer_tiny_patch16_224", **{**shape, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(height=64, width=64, *, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3)).to(dtype)


def extractor(model):
    """The whole model as an FX graph, with timm's leaves: the logits for training and for evaluation."""
    leaves = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
    last = [nodes[-1:] for nodes in get_graph_node_names(model, tracer_kwargs=leaves)]
    assert last == [["head"], ["head"]]
    return create_feature_extractor(model, train_return_nodes=["head"], eval_return_nodes=["head"], tracer_kwargs=leaves)


def outputs_and_gradients(function, model, x):
    logits = function(x)
    logits = logits["head"] if isinstance(logits, dict) else logits
    model.zero_grad()
    F.cross_entropy(logits, torch.tensor([1, 5])).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []
    return logits.detach(), gradients


# --- TorchScript ----------------------------------------------------------------------------------------------------

#: The size built for, others, and one of more than four chunks of tokens.
SIZES = [(64, 64), (96, 48), (16, 16), (320, 256)]


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "flip": "released"}, {"global_pool": ""}], ids=str)
def test_one_scripted_program_for_all_sizes(options):
    model = small(**options)
    program = torch.jit.script(model)
    with torch.no_grad():
        for size in SIZES:
            torch.testing.assert_close(program(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("blocks", [(0, 2), (1, -1)], ids=str)
def test_scripted_maps_at_all_sizes(blocks, norm):
    """What ``features_only=True`` wraps around the model; ``norm`` cannot be asked for there."""
    if norm:
        model = FeatureGetterNet(small(), out_indices=blocks, norm=True)
    else:
        model = small(features_only=True, out_indices=blocks)
    program = torch.jit.script(model)
    with torch.no_grad():
        for size in SIZES:
            maps = program(images(*size))
            assert [m.shape for m in maps] == [(2, 64, size[0] // 16, size[1] // 16)] * 2
            torch.testing.assert_close(maps, model(images(*size)), rtol=1e-4, atol=1e-5)


def test_scripted_model_is_saved_and_loaded(tmp_path):
    with set_scriptable(True):
        model = small(scriptable=True)
    torch.jit.script(model).save(tmp_path / "program.pt")
    program = torch.jit.load(tmp_path / "program.pt")
    with torch.no_grad():
        torch.testing.assert_close(program(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_scripted_model_has_the_gradients_of_eager():
    model = small().double().train()
    want = outputs_and_gradients(model, model, images(dtype=torch.float64))
    got = outputs_and_gradients(torch.jit.script(model), model, images(dtype=torch.float64))
    torch.testing.assert_close(got, want)


# --- FX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_fx_graph_equals_eager_forward_and_backward(training):
    model = small().double().train(training)
    graph = extractor(model).train(training)
    want = outputs_and_gradients(model, model, images(dtype=torch.float64))
    got = outputs_and_gradients(graph, graph, images(dtype=torch.float64))
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing:UserWarning")
def test_fx_graph_keeps_its_own_drop_path_for_training():
    graph, x = extractor(small(drop_path_rate=0.5)), images()
    with torch.no_grad():
        assert torch.equal(graph(x)["head"], small()(x))
        graph.train()
        assert not torch.equal(graph(x)["head"], graph(x)["head"])


def test_scripted_fx_graph_equals_eager():
    model = small()
    program = torch.jit.script(extractor(model))
    with torch.no_grad():
        torch.testing.assert_close(program(images())["head"], model(images()), rtol=1e-4, atol=1e-5)


# --- torch.compile and torch.jit.trace ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (320, 256)], ids=["one chunk", "more than four chunks"])
def test_compiled_model_equals_eager_forward_and_backward(size):
    torch._dynamo.reset()
    model, x = small(depth=3, embed_dim=32).double().train(), images(*size, dtype=torch.float64)
    want = outputs_and_gradients(model, model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs_and_gradients(compiled, model, x), want)


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (320, 256)], ids=str)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_model_equals_eager_at_its_size(size):
    model, x = small(depth=3), images(*size)
    program = torch.jit.trace(model, x)
    with torch.no_grad():
        other = x.flip(0, 3) + 1
        torch.testing.assert_close(program(other), model(other), rtol=1e-4, atol=1e-5)


# --- torch.export ---------------------------------------------------------------------------------------------------


def is_plain(target):
    """An operator of ATen, or Python's arithmetic on sizes."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    return getattr(operator, target.__name__, None) is target


def strangers(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function" and not is_plain(node.target)]


def test_exported_model_takes_any_batch_and_size():
    model = small(depth=3, embed_dim=32)
    batch, rows, columns = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "rows", "columns"))
    with torch.no_grad(), shapes_config.patch(backed_size_oblivious=True):
        sizes = ({0: batch, 2: 16 * rows, 3: 16 * columns},)
        program = torch.export.export(model, (images(96, 80),), dynamic_shapes=sizes)
    assert strangers(program) == []
    with torch.no_grad():
        for number, *size in [(1, 64, 64), (3, 96, 48), (2, 16, 16), (1, 320, 256), (1, 512, 640)]:
            x = images(*size, batch=number)
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
