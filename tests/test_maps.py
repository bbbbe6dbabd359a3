"""Activation maps: heat and agreement against cosines by hand, colours by property, sheets by their pixels, the command."""

import copy
import dataclasses
import functools
import io
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from sklearn.decomposition import PCA

from small_models import small as small_student
from vit_linearizer.commands import maps as command
from vit_linearizer.commands.maps import MapsConfig, maps
from vit_linearizer.contracts import UserError
from vit_linearizer.data.views import centre_transform
from vit_linearizer.evaluation import activation_agreement
from vit_linearizer.models.adapters import extract_features
from vit_linearizer.models.loading import save_model_folder
from vit_linearizer.objectives import activation_map
from vit_linearizer.reporting import activation_maps
from vit_linearizer.reporting.activation_maps import (
    MapPanels,
    ModelMaps,
    common_query,
    map_panels,
    principal_scores,
    query_patch,
)
from vit_linearizer.reporting.map_sheet import colour_limits, draw_sheet, sheet_layout


def small_vit(name="vit_tiny_patch16_224", *, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(img_size=(64, 96), embed_dim=48, depth=4, num_heads=3, num_classes=0)
    return timm.create_model(name, **{**shape, **changes}).eval()


def without_class_token(**changes):
    return small_vit(class_token=False, global_pool="avg", **changes)


@pytest.fixture(scope="module")
def china():
    return Image.fromarray(load_sample_image("china.jpg"))


@pytest.fixture(scope="module")
def image(china):
    return centre_transform((64, 96))(china) / 255


@pytest.fixture(scope="module")
def vit():
    return small_vit()


@pytest.fixture(scope="module")
def student():
    return small_student(img_size=(64, 96), num_classes=0)


# --- heat and agreement ---------------------------------------------------------------------------------------------


def rows_by_hand(stage, query):
    """Cosines of one token to all patch tokens, in numpy."""
    tokens = stage.tokens[0].double().numpy()
    special = {"class": stage.class_token, "mean": stage.tokens.double().mean(1)}
    row = special[query][0].double().numpy() if query in special else tokens[query]
    return np.array([row @ token / np.sqrt((row @ row) * (token @ token)) for token in tokens])


@pytest.mark.parametrize(("query", "row"), [("class", "class"), ("mean", "mean"), ((33.0, 17.5), 1 * 6 + 2)], ids=str)
@torch.no_grad()
def test_heat_is_the_row_of_cosines(vit, student, image, query, row):
    found = map_panels({"vit": vit, "student": student}, image, query, 2)
    assert (found.shown, found.stages, found.query) == ((1, 2), 2, query)
    for name, model in (("vit", vit), ("student", student)):
        features = extract_features(model, image[None], stages=2)
        assert found.models[name].heat.shape == (2, 4, 6)
        for stage, heat in zip(features.stages, found.models[name].heat, strict=True):
            assert heat.flatten().numpy() == pytest.approx(rows_by_hand(stage, row), abs=1e-5)
            if row not in ("class", "mean"):
                assert heat[1, 2] == pytest.approx(1)
                unit = F.normalize(heat.flatten(), dim=0)  # what eq. 5 compares
                assert torch.allclose(unit, activation_map(stage.tokens)[0, row], atol=1e-5)


@torch.no_grad()
def test_agreement_is_the_cosine_of_rows_and_its_mean_that_of_the_evaluation(vit, student, image, monkeypatch):
    monkeypatch.setattr(activation_maps, "_ROWS", 7)  # 24 rows in four uneven parts
    found = map_panels({"vit": vit, "student": student}, image, (90.0, 60.0), 4).models
    both = [extract_features(model, image[None], stages=4) for model in (vit, student)]
    assert torch.allclose(found["student"].all_tokens, activation_agreement(*both), atol=1e-5)
    for place in range(4):
        rows = [activation_map(features.stages[place].tokens)[0, 23] for features in both]
        assert found["student"].agreement[place] == pytest.approx(float(rows[0] @ rows[1]), abs=1e-5)
    assert (found["student"].agreement < 0.999).any()


@pytest.mark.parametrize("query", ["class", "mean", (0.0, 0.0)], ids=str)
def test_a_model_agrees_with_itself(vit, image, query):
    found = map_panels({"once": vit, "again": vit}, image, query, 4, colours=True).models["again"]
    for values in (found.agreement, found.all_tokens):
        assert values.tolist() == pytest.approx([1] * 4, abs=1e-5)
    assert found.colours_agreement == pytest.approx(1, abs=1e-6)


def rotated(model):
    """The same model in other axes."""
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(2)))[0]
    other = copy.deepcopy(model)
    original = other.forward_intermediates

    def turned(*args, **kwargs):
        final, stages = original(*args, **kwargs)
        return final @ turn, [tuple(part @ turn for part in stage) for stage in stages]

    other.forward_intermediates = turned
    return other


@pytest.mark.parametrize("query", ["class", "mean", (50.0, 50.0)], ids=str)
def test_a_rotation_of_the_tokens_changes_nothing(vit, image, query):
    found = map_panels({"here": vit, "turned": rotated(vit)}, image, query, 3, colours=True).models
    assert torch.allclose(found["here"].heat, found["turned"].heat, atol=1e-4)
    assert found["turned"].agreement.tolist() == pytest.approx([1] * 3, abs=1e-5)
    assert torch.allclose(found["here"].colours, found["turned"].colours, atol=1e-3)


def test_stages_shown_are_those_asked_for(vit, image):
    everything = map_panels({"vit": vit}, image, "mean", 4)
    some = map_panels({"vit": vit}, image, "mean", 4, at=(4, 2, 4))
    assert some.shown == (4, 2)
    assert torch.equal(some.models["vit"].heat, everything.models["vit"].heat[[3, 1]])


def test_the_class_token_is_asked_where_all_have_one(vit, student, image):
    plain = without_class_token()
    assert (common_query([vit, student]), common_query([vit, plain])) == ("class", "mean")
    assert map_panels({"vit": vit, "plain": plain}, image, stages=1).query == "mean"
    distilled = copy.deepcopy(student)
    distilled.reset_classifier(0, "avg")
    assert common_query([vit, distilled]) == "mean", "nothing has trained its class token"
    with pytest.raises(UserError, match=r"^query class: plain has no class token; use mean or a point$"):
        map_panels({"vit": vit, "plain": plain}, image, "class", 1)


def test_models_are_left_in_their_mode(image):
    model = small_vit(depth=2).train()
    first, second = (map_panels({"vit": model}, image, "mean", 1).models["vit"].heat for _ in range(2))
    assert model.training
    assert torch.equal(first, second)


# --- the patch under a point ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "patch"),
    [
        ((0, 0), (0, 0)),
        ((95.9, 63.9), (3, 5)),
        ((95, 0), (0, 5)),
        ((0, 63), (3, 0)),
        ((15.99, 15.99), (0, 0)),
        ((16, 16), (1, 1)),
        ((80, 15), (0, 5)),
        ((31, 32), (2, 1)),
    ],
)
def test_the_patch_under_a_point(point, patch):
    assert query_patch(point, (64, 96), (4, 6)) == patch


def test_patches_that_are_not_square_or_of_another_count():
    assert query_patch((14, 27), (28, 56), (1, 4)) == (0, 1)
    assert query_patch((223, 14), (224, 224), (16, 16)) == (1, 15)
    assert query_patch((223, 14), (224, 224), (14, 14)) == (0, 13)
    for column in range(16):  # borders are exact, whatever the patch
        assert query_patch((14 * column, 0), (224, 224), (16, 16)) == (0, column)


@pytest.mark.parametrize("point", [(-1, 0), (96, 0), (0, 64), (0, -0.5)])
def test_a_point_outside_is_refused(vit, image, point):
    with pytest.raises(UserError, match=r"^point .* lies outside of the image; x goes from 0 to 95, y from 0 to 63$"):
        map_panels({"vit": vit}, image, point, 1)


# --- other patches --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_patches_of_14_and_16_are_compared_on_one_grid(vit, image):
    other = small_vit("vit_small_patch14_dinov2", img_size=(56, 84), seed=1)
    found = map_panels({"vit": vit, "other": other}, image, (90.0, 20.0), 2, colours=True).models
    assert (found["vit"].grid, found["other"].grid) == ((4, 6), (4, 6))
    assert found["other"].agreement.shape == (2,)
    assert found["other"].colours_agreement is not None
    view = F.interpolate(image[None], size=(56, 84), mode="bicubic", antialias=True).clamp(0, 1)
    stage = extract_features(other, view, stages=2).stages[1]
    assert found["other"].heat[1].flatten().numpy() == pytest.approx(rows_by_hand(stage, 1 * 6 + 5), abs=1e-5)


def test_a_model_of_one_size_keeps_its_grid_and_is_not_compared(vit, image):
    other = small_vit(img_size=48)
    found = map_panels({"vit": vit, "other": other}, image, "class", 2, colours=True).models["other"]
    assert found.grid == (3, 3)
    assert found.heat.shape == (2, 3, 3)
    assert found.colours.shape == (3, 3, 3)
    assert (found.agreement, found.all_tokens, found.colours_agreement) == (None, None, None)


def test_a_grid_may_be_given(student, image):
    assert map_panels({"student": student}, image, "mean", 1, grid=(2, 3)).models["student"].heat.shape == (1, 2, 3)


# --- colours --------------------------------------------------------------------------------------------------------


def random_tokens(number=40, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, width, generator=generator) * torch.linspace(3, 0.5, width)


def test_scores_are_those_of_sklearn_up_to_sign_and_scale():
    tokens = random_tokens()
    want = PCA(n_components=3, whiten=True, svd_solver="full").fit_transform(tokens.double().numpy()) * np.sqrt(40 / 39)
    scores = principal_scores(tokens)
    assert np.abs(scores.numpy()) == pytest.approx(np.abs(want), abs=1e-6)
    assert torch.allclose(scores.T @ scores / 40, torch.eye(3, dtype=torch.double), atol=1e-8)
    assert (scores.gather(0, scores.abs().argmax(0)[None]) > 0).all()
    assert torch.equal(scores, principal_scores(tokens.clone()))


@pytest.mark.parametrize(("number", "width", "rank"), [(1, 8, 0), (2, 8, 1), (40, 2, 2), (40, 8, 3)])
def test_missing_components_are_zero(number, width, rank):
    scores = principal_scores(random_tokens(number, width))
    assert scores.shape == (number, 3)
    assert [bool(column.abs().max() > 0) for column in scores.T] == [True] * rank + [False] * (3 - rank)


def test_colours_of_tokens_that_are_no_numbers_are_grey():
    assert not principal_scores(torch.full((4, 5), torch.nan)).any()


def test_the_agreement_of_colours_is_that_of_the_spaces():
    scores = principal_scores(random_tokens()).unflatten(0, (5, 8))
    other = principal_scores(random_tokens(seed=1)).unflatten(0, (5, 8))
    turned, cosine = activation_maps._aligned(scores[..., [2, 0, 1]] * torch.tensor([1.0, -1.0, -1.0]), scores)
    assert torch.allclose(turned, scores)
    assert cosine == pytest.approx(1)
    flat = [part.reshape(40, 3).numpy() / np.sqrt(40) for part in (scores, other)]
    assert activation_maps._aligned(other, scores)[1] == pytest.approx(
        np.linalg.svd(flat[0].T @ flat[1])[1].mean(), abs=1e-9
    )


# --- sheets ---------------------------------------------------------------------------------------------------------


def made(heats, image=None, query="mean", **more):
    """Panels of maps made by hand."""
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0)) if image is None else image
    models = {}
    for name, heat in heats.items():
        agreement = torch.ones(len(heat))
        models[name] = ModelMaps(grid=heat.shape[1:], heat=heat, agreement=agreement, all_tokens=agreement, **more)
    count = len(next(iter(heats.values())))
    return MapPanels(image=image, query=query, shown=tuple(range(1, count + 1)), stages=count, models=models)


def pixels(png):
    with Image.open(io.BytesIO(png)) as opened:
        assert opened.format == "PNG"
        return np.asarray(opened.convert("RGB"))


def panel(png, panels, column, row=0, *, views=("heat",), dpi=150):
    """The pixels of one panel, without its edge."""
    layout = sheet_layout(panels, views)
    (width, height), left = layout.picture, layout.columns[column]
    top = layout.rows[row]
    box = [round(dpi * value) for value in (top, top + height, left, left + width)]
    return pixels(png)[box[0] + 2 : box[1] - 2, box[2] + 2 : box[3] - 2]


@pytest.mark.parametrize("shape", [(32, 48), (20, 200), (400, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("dpi", [50, 100])
def test_a_sheet_is_a_png_of_the_size_of_its_layout(shape, dpi):
    panels = made({"a": torch.rand(2, 4, 4), "b": torch.rand(2, 4, 4)}, torch.rand(3, *shape))
    layout = sheet_layout(panels)
    height, width = pixels(draw_sheet(panels, dpi=dpi)).shape[:2]
    assert abs(width - dpi * layout.size[0]) <= 1
    assert abs(height - dpi * layout.size[1]) <= 1
    assert layout.picture[0] / layout.picture[1] == pytest.approx(shape[1] / shape[0])
    assert max(layout.picture) <= 6.01


def test_equal_heat_has_equal_colours_in_every_panel_and_limits_are_common():
    ramp = torch.linspace(0.5, 0.9, 24).view(1, 4, 6)
    image = torch.full((3, 32, 48), 0.5)
    narrow, wide = (made({"a": ramp, "b": ramp, "c": other}, image) for other in (ramp, torch.rand(1, 4, 6)))
    assert colour_limits(narrow.models.values()) == (0.5, 0.9)
    sheets = [draw_sheet(panels) for panels in (narrow, wide)]
    first, second = ([panel(sheet, narrow, column).astype(int) for column in (1, 2)] for sheet in sheets)
    for pair in (first, second):
        assert np.abs(pair[0][:, :250] - pair[1][:, :250]).max() <= 12  # columns begin at parts of a pixel
    assert np.abs(first[0] - second[0]).mean() > 10  # another model's values changed the scale of this one


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ((0.52, 0.88), (0.5, 0.9)),
        ((0.0, 1.0), (0.0, 1.0)),
        ((-0.22, 0.63), (-0.25, 0.65)),
        ((-1.0, -0.4), (-1.0, -0.4)),
        ((1.0, 1.0), (0.95, 1.0)),
        ((0.3, float("nan")), (0.25, 0.3)),
    ],
)
def test_limits_are_rounded_outwards(values, limits):
    panels = made({"a": torch.tensor(values).view(1, 1, 2)})
    assert colour_limits(panels.models.values()) == pytest.approx(limits)


def test_heat_grows_towards_the_hot_end_and_lies_where_its_patch_is():
    heat = torch.zeros(1, 4, 6)
    heat[0, 1, 4] = 1
    panels = made({"a": heat}, torch.full((3, 64, 96), 0.5))
    drawn = panel(draw_sheet(panels), panels, 1).astype(int)
    hot = drawn[..., 0] - drawn[..., 2]  # viridis ends in yellow, and begins in violet
    y, x = np.unravel_index(hot.argmax(), hot.shape)
    assert (y / hot.shape[0], x / hot.shape[1]) == pytest.approx((1.5 / 4, 4.5 / 6), abs=0.03)


def test_a_point_is_marked_in_every_panel():
    panels = made({"a": torch.full((1, 4, 6), 0.5)}, torch.zeros(3, 64, 96), query=(24.0, 48.0))
    sheet = draw_sheet(panels)
    for column in (0, 1):
        drawn = panel(sheet, panels, column).astype(int)
        white = np.argwhere((drawn > 200).all(-1))
        assert white.mean(0) / drawn.shape[:2] == pytest.approx((48 / 64, 24 / 96), abs=0.02)


def test_colours_are_drawn_as_square_patches():
    colours = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(1))
    panels = made({"a": torch.rand(1, 4, 6)}, colours=colours)
    for views, row in ((("heat", "pca"), 1), (("pca",), 0)):
        drawn = panel(draw_sheet(panels, views=views), panels, 1, row, views=views)
        height, width = drawn.shape[0] / 4, drawn.shape[1] / 6
        for down in range(4):
            for across in range(6):
                middle = drawn[round((down + 0.5) * height), round((across + 0.5) * width)]
                assert middle / 255 == pytest.approx(colours[down, across].numpy(), abs=0.01)


ODD = [
    "$x_1$",
    "$\\frac{a$",
    "a" * 900,
    "模型 🙂",
    "two\nlines\tand\x07bell",
    "caf\udce9",
    "",
    "<img src=x>",
    "runs/a_b^c%&#~",
]


def test_odd_names_keep_the_layout_and_are_text():
    panels = made({name: torch.rand(1, 4, 6) for name in ODD})
    plain = made({f"model {number}": torch.rand(1, 4, 6) for number in range(len(ODD))})
    sheet = draw_sheet(panels, title="$\\nothing_ " * 100, dpi=75)
    layout, drawn, usual = sheet_layout(panels), pixels(sheet), pixels(draw_sheet(plain, dpi=75))
    assert drawn.shape == usual.shape
    under = slice(round(75 * 0.64), round(75 * 0.85))  # each name is one line, and so leaves the next as it is
    assert (drawn[under] == usual[under]).all()
    band = drawn[round(75 * 0.45) : round(75 * 0.6)]  # of the names
    for left in layout.columns[1:]:
        gap = band[:, round(75 * (left - 0.13)) : round(75 * (left - 0.02))]
        assert (gap == 255).all()
    assert (drawn[:, -7:] == 255).all()


def test_sheets_are_the_same_again_and_nothing_is_said(vit, student, image, caplog):
    image = torch.where(image > 0.7, 1.0, image)
    sheets = [
        draw_sheet(map_panels({"a": vit, "b": student}, image, stages=2, colours=True), views=("heat", "pca"), dpi=60)
        for _ in range(2)
    ]
    assert sheets[0] == sheets[1]
    assert not caplog.records


@pytest.mark.parametrize(
    ("views", "problem"),
    [((), "^view: choose"), (("heta",), "^view heta: choose"), (("pca",), "^view pca: needs maps made with colours=True$")],
)
def test_sheets_of_nothing_are_refused(views, problem):
    with pytest.raises(UserError, match=problem):
        draw_sheet(made({"a": torch.rand(1, 4, 6)}), views=views)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders as runs leave them: a teacher, what was distilled from it, and a backbone of patch 14 without class token."""
    folder = tmp_path_factory.mktemp("runs")
    save_model_folder(small_vit(depth=2, img_size=64), folder / "teacher" / "model")
    save_model_folder(small_student(depth=2, num_classes=0), folder / "distilled" / "model")
    save_model_folder(without_class_token(depth=2, img_size=56, patch_size=14), folder / "plain" / "model")
    noted = {"command": "distill", "teacher": "teacher", "teacher_arch": None}
    (folder / "distilled" / "config.json").write_text(json.dumps(noted))
    return folder


@pytest.fixture
def album(tmp_path, china):
    folder = tmp_path / "album"
    (folder / "below").mkdir(parents=True)
    china.save(folder / "china.png")
    china.crop((0, 0, 90, 60)).save(folder / "below" / "small.png")
    return folder


@pytest.fixture
def run(runs, album, tmp_path, monkeypatch):
    """Runs ``maps`` on two tiny models, by default with one picture; sheets are coarse, and so quickly written."""
    monkeypatch.setattr(command, "draw_sheet", functools.partial(draw_sheet, dpi=30))

    def drawn(**settings):
        given = dict(
            models=(str(runs / "distilled"), str(runs / "teacher")),
            images=(str(album / "china.png"),),
            out=str(tmp_path / "maps.png"),
            image_size="64x96",
            stages=2,
            device="cpu",
        )
        return maps(MapsConfig(**given | settings))

    return drawn


def test_the_sheet_is_that_of_the_functions(run, runs, album, tmp_path, china, caplog):
    assert run(view=("heat", "pca"), at=(2,)) == [tmp_path / "maps.png"]
    models = {
        name: timm.create_model(f"local-dir:{runs / name / 'model'}", pretrained=True, img_size=(64, 96)).eval()
        for name in ("distilled", "teacher")
    }
    panels = map_panels(models, centre_transform((64, 96))(china) / 255, "class", 2, at=(2,), colours=True)
    want = draw_sheet(panels, title="china.png", views=("heat", "pca"), dpi=30)
    assert (tmp_path / "maps.png").read_bytes() == want
    assert f"agreement with distilled at stages 2: teacher {panels.models['teacher'].agreement[0]:.3f}" in caplog.text
    assert not list(tmp_path.glob(".*"))


def test_pictures_of_a_folder_go_to_a_folder(run, album, tmp_path, caplog):
    (album / "bad.jpg").write_bytes(b"no picture")
    written = run(images=(str(album),))
    assert written == [tmp_path / "maps" / "below" / "small.png", tmp_path / "maps" / "china.png"]
    assert all(pixels(file.read_bytes()).size for file in written)
    assert "bad.jpg: passed over, cannot be read: " in caplog.text
    assert "their sheets go to the folder" in caplog.text
    assert run(out=str(tmp_path / "sheets")) == [tmp_path / "sheets" / "china.png"]


def test_nothing_readable_is_an_error(run, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"^--images \S+bad\.jpg: not one of them can be read"):
        run(images=(str(tmp_path / "bad.jpg"),))
    assert not (tmp_path / "maps.png").exists()


def test_a_run_alone_gets_its_teacher_first(run, runs, monkeypatch, caplog, tmp_path):
    asked = []
    original = command.map_panels

    def spy(models, *args, **kwargs):
        asked.append((list(models), kwargs["grid"]))
        return original(models, *args, **kwargs)

    monkeypatch.setattr(command, "map_panels", spy)
    run(models=(str(runs / "distilled"),))
    noted = {"command": "distill", "teacher": "vit_base_patch16_224.augreg_in21k"}
    lonely = tmp_path / "lonely"
    save_model_folder(small_student(depth=2), lonely / "model")
    (lonely / "config.json").write_text(json.dumps(noted))
    run(models=(str(lonely),))
    run(models=(str(runs / "teacher"),))
    assert asked == [(["teacher", "distilled"], (4, 6)), (["lonely"], (4, 6)), (["teacher"], (4, 6))]
    assert "vit_base_patch16_224.augreg_in21k, which is not on this disk; name it among --models" in caplog.text


def test_other_patches_see_the_size_of_the_same_grid(run, runs, caplog):
    models = tuple(str(runs / name) for name in ("teacher", "plain", "distilled"))
    run(models=models)
    assert "plain sees 56x84, 4 x 6 patches" in caplog.text
    assert "teacher sees 64x96, 4 x 6 patches" in caplog.text
    with pytest.raises(UserError, match=r"^--query class: plain has no class token; use mean or point$"):
        run(models=models, query="class")


def test_the_point_is_one_of_the_picture(run, monkeypatch):
    asked = []
    original = command.map_panels

    def spy(models, image, query, *args, **kwargs):
        asked.append(query)
        return original(models, image, query, *args, **kwargs)

    monkeypatch.setattr(command, "map_panels", spy)
    run(point="300,200")
    scale = 96 / 640  # china.jpg is 427 x 640: cut above and below
    assert asked[0] == pytest.approx((300.5 * scale, 200.5 * scale - (427 * scale - 64) / 2))


@pytest.mark.parametrize(("sides", "size"), [((50, 90), (64, 96)), ((427, 640), (64, 64)), ((300, 40), (64, 96))], ids=str)
def test_points_fall_where_the_view_has_them(sides, size):
    height, width = sides
    shown = 0
    for x, y in ((width // 2, height // 2), (width // 3, height // 2 + 3), (width // 2 + 5, height // 2 - 4), (0, 0)):
        picture = np.zeros((height, width), dtype=np.uint8)
        picture[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = 255
        view = centre_transform(size)(Image.fromarray(picture).convert("RGB"))[0].double()
        if command._outside((x, y), sides, size) is None and x:
            rows, columns = (torch.arange(side, dtype=torch.double) + 0.5 for side in size)
            middle = [float((view.sum(1 - axis) * places).sum() / view.sum()) for axis, places in ((1, columns), (0, rows))]
            assert command._in_view((x, y), sides, size) == pytest.approx(middle, abs=1)
            shown += 1
    assert shown == 3


def test_pictures_without_the_point_are_passed_over(run, album, caplog, tmp_path):
    assert run(images=(str(album),), point="300,200") == [tmp_path / "maps" / "china.png"]
    assert "below/small.png: passed over, the picture is only 90 pixels wide and 60 high" in caplog.text


def test_a_turned_picture_counts_as_it_is_shown(tmp_path, china):
    exif = Image.Exif()
    exif[0x0112] = 6
    china.save(tmp_path / "turned.jpg", exif=exif)
    assert command._sides(tmp_path / "turned.jpg") == (640, 427)


def test_bfloat16_is_near(run, runs, monkeypatch):
    found = []
    original = command.draw_sheet

    def spy(panels, **kwargs):
        found.append(panels.models["teacher"])
        return original(panels, **kwargs)

    monkeypatch.setattr(command, "draw_sheet", spy)
    for precision in ("fp32", "bf16"):
        run(precision=precision, view=("heat", "pca"))
    heat = [maps.heat for maps in found]
    assert torch.allclose(*heat, atol=0.05)
    assert not torch.equal(*heat)


def test_models_of_one_name_are_called_by_their_paths(run, runs, tmp_path, caplog):
    save_model_folder(small_student(depth=2, seed=1), tmp_path / "other" / "distilled")
    run(models=(str(runs / "distilled"), str(tmp_path / "other" / "distilled")))
    assert f"{tmp_path / 'other' / 'distilled'} sees 64x96" in caplog.text


def test_weight_files_come_with_their_architecture(run, runs, album):
    file = str(runs / "teacher" / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"name its architecture too: --models-arch vit_base_patch16_224$"):
        run(models=(file,))
    with pytest.raises(UserError, match=r"^--models-arch a b: there are 1 weight files among the models"):
        run(models=(file,), models_arch=("a", "b"))


def test_random_weights_are_said(run, runs, caplog):
    run(models=(str(runs / "teacher"), "vit_tiny_patch16_224"), models_pretrained=False, query="mean", at=(1,))
    said = [record.getMessage() for record in caplog.records if "random weights" in record.getMessage()]
    assert said == ["vit_tiny_patch16_224 has random weights: its maps show how it is built, not what it has learnt"]


REFUSED = [
    (dict(models=()), "^--models: name at least one$"),
    (dict(models="a"), "^models a: give a list$"),
    (dict(models=("a", "a")), "^--models a a: names a model twice$"),
    (dict(models=("no_such_model",)), "^--models no_such_model: unknown model"),
    (dict(models=("resnet18",)), "^--models resnet18: is not a plain backbone"),
    (dict(images=("nowhere.jpg",)), "^--images nowhere.jpg: no such file or folder$"),
    (dict(out="maps.jpg"), r"^--out maps.jpg: sheets are PNG files; give NAME\.png or a folder$"),
    (dict(image_size="65x96"), "^image size 65x96: must be a multiple of the patch 16x16; try 64x96$"),
    (dict(image_size="big"), "^--image-size big: give one side"),
    (dict(stages=0), "^--stages 0: must be at least 1$"),
    (dict(stages=3), "^--stages 3: must be between 1 and the backbone's 2 blocks$"),
    (dict(at=(3,)), r"^--at 3: stages are numbered from 1 to 2 \(--stages\)$"),
    (dict(view=()), "^--view: choose heat, pca or both$"),
    (dict(query="point"), "^--query point: needs the point: --point X,Y$"),
    (dict(query="mean", point="1,2"), "^--point 1,2: is not looked at with --query mean; leave one out$"),
    (dict(point="1;2"), "^--point 1;2: give x,y in pixels of the picture, e.g. 300,200$"),
    (dict(point="-1,2"), "^--point -1,2: give x,y"),
    (dict(point="640,2"), "^--point 640,2: the picture is only 640 pixels wide and 427 high$"),
    (dict(point="3,3", image_size="64"), r"^--point 3,3: lies outside of the centre shown at 64x64; .*\(427x640\)$"),
]


@pytest.mark.parametrize(("settings", "problem"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_work_is_refused_before_weights_are_loaded(run, monkeypatch, settings, problem):
    def never(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("vit_linearizer.commands.maps_models.open_model", never)
    with pytest.raises(UserError, match=problem):
        run(**settings)


def test_the_picture_is_not_overwritten(run, album):
    before = (album / "china.png").read_bytes()
    with pytest.raises(UserError, match=r"^--out \S+china\.png: is the picture itself; give another file$"):
        run(out=str(album / "china.png"))
    with pytest.raises(UserError, match=r"^--out \S+album: \S+ lies in it; give a folder for the results alone$"):
        run(out=str(album), images=(str(album),))
    assert (album / "china.png").read_bytes() == before


def test_every_setting_is_explained():
    for field in dataclasses.fields(MapsConfig):
        assert f"        {field.name}: " in (MapsConfig.__doc__ or "")
