"""``export``: what the files hold and give, replayed by the runtimes themselves, at sizes other than the recorded one."""

import json
import re
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch

from vit_linearizer import ExportConfig, UserError, export, load
from vit_linearizer.cli import main
from vit_linearizer.exporting.parity import largest_difference
from vit_linearizer.exporting.program import Program
from vit_linearizer.models.loading import save_model_folder

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
#: (batch, height, width): the recorded size, not square, one patch high, a single patch, more than 576 tokens.
SIZES = [(1, 64, 64), (3, 96, 48), (2, 16, 80), (1, 16, 16), (1, 400, 416)]


def student(**changes):
    """A student for 64x64 pictures whose parameters are all random."""
    torch.manual_seed(0)
    shape = dict(img_size=64, embed_dim=64, depth=2, num_classes=7)
    model = timm.create_model("adventurer_tiny_patch16_224", **{**shape, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pictures(batch, height, width):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exporting")


@pytest.fixture(scope="module")
def model(folder):
    """A classifier, in ``folder / "classifier"`` too."""
    save_model_folder(student(), folder / "classifier")
    return load(folder / "classifier")


@pytest.fixture(scope="module")
def backbone(folder):
    """A backbone whose implementation is the reference scan, in ``folder / "backbone"`` too."""
    save_model_folder(student(num_classes=0, implementation="reference", patch_size=(16, 8)), folder / "backbone")
    return load(folder / "backbone")


@pytest.fixture(scope="module")
def vit(folder):
    shape = dict(depth=1, embed_dim=48, num_heads=3, img_size=32, patch_size=8, num_classes=4)
    save_model_folder(timm.create_model("vit_tiny_patch16_224", **shape), folder / "vit")
    return load(folder / "vit", dynamic_img_size=True)


@pytest.fixture(scope="module")
def differences():
    """What each of the exports below returned."""
    return {}


@pytest.fixture(scope="module")
def free_onnx(folder, model, differences):
    """Sizes free, a dense output, the normalisation inside."""
    out = folder / "free.onnx"
    given = ExportConfig(model=str(folder / "classifier"), format="onnx", out=str(out), dynamic=True, dense=True)
    differences["free"] = export(given)
    return out


@pytest.fixture(scope="module")
def fixed_onnx(folder, backbone):
    """One size, features only, the normalisation outside; from the command line."""
    out = folder / "fixed.onnx"
    line = ["export", str(folder / "backbone"), "--format", "onnx", "--out", str(out), "--no-normalize"]
    assert main(line) == 0
    return out


@pytest.fixture(scope="module")
def free_program(folder, backbone):
    out = folder / "free.pt2"
    export(ExportConfig(model=str(folder / "backbone"), format="torch-export", out=str(out), dynamic=True, dense=True))
    return out


def session(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def assert_near(got, want):
    want = want.numpy()
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@torch.no_grad()
def expected(model, images):
    """First output and dense map of normalised pictures."""
    height, width = model.patch_embed.patch_size
    tokens = model.forward_features(images)
    dense = tokens[:, 1:].mT.unflatten(2, (images.shape[2] // height, images.shape[3] // width))
    return model(images), dense


# --- ONNX -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_onnx_of_free_size_gives_logits_and_dense_maps(free_onnx, model, size):
    images = pictures(*size)
    logits, dense = session(free_onnx).run(["logits", "dense"], {"images": images.numpy()})
    for got, want in zip((logits, dense), expected(model, (images - MEAN) / STD), strict=True):
        assert_near(got, want)


def test_onnx_of_one_size_has_a_free_batch_and_takes_normalised_images(fixed_onnx, backbone):
    run = session(fixed_onnx)
    (given,), (output,) = run.get_inputs(), run.get_outputs()
    assert (given.name, output.name) == ("images", "features")
    assert given.shape[1:] == [3, 64, 64]
    assert isinstance(given.shape[0], str)
    for batch in (1, 3):
        images = (pictures(batch, 64, 64) - MEAN) / STD
        assert_near(run.run(None, {"images": images.numpy()})[0], expected(backbone, images)[0])


@pytest.mark.parametrize("export_of", ["free_onnx", "fixed_onnx"])
def test_onnx_holds_standard_operators_in_one_file(export_of, request):
    file = request.getfixturevalue(export_of)
    read = onnx.load(file)
    onnx.checker.check_model(read)
    assert {node.domain for node in read.graph.node} <= {"", "ai.onnx"}
    assert not read.functions
    assert b"vit_linearizer/" not in file.read_bytes()  # no file names of the machine that exported
    assert {opset.domain for opset in read.opset_import} <= {"", "ai.onnx"}
    assert not [tensor.name for tensor in read.graph.initializer if tensor.external_data]
    assert sorted(f.name for f in file.parent.iterdir() if f.name.startswith(file.name)) == [file.name, f"{file.name}.md"]


@pytest.mark.parametrize(
    ("export_of", "facts"),
    [
        ("free_onnx", ["RGB in [0, 1]; the normalisation is inside", "any height and width", "final patch features"]),
        (
            "fixed_onnx",
            ["already normalised with mean [0.485, 0.456, 0.406]", "64x64 only", "pooled"],
        ),
    ],
)
def test_onnx_and_its_card_say_what_to_put_in(export_of, facts, request):
    file = request.getfixturevalue(export_of)
    said = " ".join(entry.value for entry in onnx.load(file).metadata_props)
    card = file.with_name(f"{file.name}.md").read_text()
    for fact in facts:
        assert fact in said
        assert fact in card
    assert "| opset | " in card
    assert "| largest relative difference to PyTorch at 1x64x64 | " in card
    assert str(file.parent) not in card


def test_free_axes_have_names(free_onnx, fixed_onnx):
    def axes(file):
        graph = onnx.load(file).graph
        ends = [*graph.input, *graph.output]
        return {end.name: [d.dim_param or d.dim_value for d in end.type.tensor_type.shape.dim] for end in ends}

    free = axes(free_onnx)
    assert free["images"] == ["batch", 3, "height", "width"]
    assert free["logits"][0] == free["dense"][0] == "batch"
    assert re.fullmatch(r"height/\d+ width/\d+", " ".join(free["dense"][2:]))
    assert axes(fixed_onnx)["images"] == ["batch", 3, 64, 64]


def test_the_differences_found_come_back_by_size(free_onnx, differences):
    assert all(0 <= value <= 1e-4 for value in differences["free"].values())
    assert len(differences["free"]) == 3
    assert "1x64x64" in differences["free"]


def test_a_vit_of_free_size(vit, folder):
    out = folder / "vit.onnx"
    export(ExportConfig(model=str(folder / "vit"), format="onnx", out=str(out), dynamic=True))
    for size in ((1, 32, 32), (3, 48, 24), (2, 8, 40)):
        images = pictures(*size)
        config = timm.data.resolve_model_data_config(vit)
        mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            assert_near(session(out).run(["logits"], {"images": images.numpy()})[0], vit((images - mean) / std))


def test_the_image_size_asked_for_is_the_one_recorded(folder, model):
    out = folder / "wide.onnx"
    given = dict(model=str(folder / "classifier"), format="onnx", out=str(out), image_size="32x96")
    assert export(ExportConfig(**given)).keys() == {"1x32x96", "3x32x96"}
    assert session(out).get_inputs()[0].shape[1:] == [3, 32, 96]
    images = pictures(2, 32, 96)
    assert_near(session(out).run(None, {"images": images.numpy()})[0], expected(model, (images - MEAN) / STD)[0])


# --- torch.export ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replayed(free_program):
    return torch.export.load(free_program).module()


@pytest.mark.parametrize("size", [(2, 64, 64), (3, 96, 48), (1, 16, 8), (1, 16, 80), (1, 400, 416)], ids=str)
def test_the_torch_program_replays_at_any_size(replayed, backbone, size):
    images = pictures(*size)
    with torch.no_grad():
        outputs = replayed(images)
    for got, want in zip(outputs, expected(backbone, (images - MEAN) / STD), strict=True):
        assert_near(got.numpy(), want)


def test_the_torch_program_holds_aten_operators_only(free_program, backbone):
    assert backbone.layers[0].mixer.implementation == "reference"
    nodes = torch.export.load(free_program).graph.nodes
    operators = [n.target for n in nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OperatorBase)]
    assert operators
    assert {operator.namespace for operator in operators} == {"aten"}
    assert len(operators) < 500  # no loop over tokens


def test_the_torch_program_names_no_file_of_this_machine(free_program):
    with zipfile.ZipFile(free_program) as archive:
        named = [name for name in archive.namelist() if b"vit_linearizer/" in archive.read(name)]
    assert named == []


# --- timm's folder --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_folder(folder, model):
    out = folder / "timm"
    assert main(["export", str(folder / "classifier"), "--format", "timm", "--out", str(out)]) == 0
    return out


@torch.no_grad()
def test_the_folder_opens_in_timm_bit_for_bit(timm_folder, model):
    name = f"local-dir:{timm_folder}"
    images = pictures(2, 64, 64)
    assert torch.equal(timm.create_model(name, pretrained=True).eval()(images), model(images))
    fresh = timm.create_model(name, pretrained=True, num_classes=3).eval()
    assert fresh(images).shape == (2, 3)
    assert torch.equal(fresh.forward_features(images), model.forward_features(images))
    maps = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 1)).eval()(images)
    for got, want in zip(maps, model.forward_intermediates(images, intermediates_only=True), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    wide = timm.create_model(name, pretrained=True, img_size=(256, 128)).eval()
    assert wide.patch_embed.img_size == (256, 128)
    torch.testing.assert_close(wide(pictures(1, 256, 128)), model(pictures(1, 256, 128)))


def test_the_folder_describes_the_model(timm_folder, folder):
    assert sorted(file.name for file in timm_folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((timm_folder / "config.json").read_text())
    assert config["architecture"] == "adventurer_tiny_patch16_224"
    assert config["num_classes"] == 7
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert str(folder) not in json.dumps(config) + (timm_folder / "README.md").read_text()


def test_the_folder_takes_the_image_size_asked_for(folder, model, tmp_path):
    out = tmp_path / "wide"
    given = ExportConfig(model=str(folder / "classifier"), format="timm", out=str(out), image_size="32x96")
    assert set(export(given).values()) == {0.0}
    assert json.loads((out / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 32, 96]
    assert timm.create_model(f"local-dir:{out}", pretrained=True).pos_embed.shape == (1, 2 * 6 + 1, 64)


@pytest.mark.parametrize("wrong", ["nan behind", "nan before", "another shape"])
def test_parity_passes_over_nothing(wrong):
    program = Program(
        timm.create_model("test_vit", img_size=32, num_classes=3, dynamic_img_size=True), normalize=True, dense=True
    )

    def run(images):
        first, second = (output.detach().numpy().copy() for output in program(images))
        if wrong == "another shape":
            return [first[:1], second]
        (second if wrong == "nan behind" else first).flat[0] = np.nan
        return [first, second]

    with pytest.raises(UserError, match="its outputs differ from PyTorch's by inf"):
        largest_difference(program, run, [(3, 32, 32)])
