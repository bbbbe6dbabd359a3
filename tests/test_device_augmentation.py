"""ThreeAugment's colours on the training device: each operation against Pillow's, whole views against the loader's, runs."""

import dataclasses
import json
import math
import pickle
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import functional as tv

from class_folders import write_split
from vit_linearizer.cli import main
from vit_linearizer.commands.distill import DistillConfig, distill
from vit_linearizer.commands.finetune import FinetuneConfig, finetune
from vit_linearizer.commands.resolution import apply_flags
from vit_linearizer.commands.segment import SegmentConfig
from vit_linearizer.contracts import UserError
from vit_linearizer.data.datasets import CentreSet, SkippedList, TrainingSet, to_device, training_loader
from vit_linearizer.data.device_augmentation import BLURRED, GREY, SOLARISED, apply_colours, draw_colours
from vit_linearizer.data.sampler import Draw, StepSampler
from vit_linearizer.data.sources import FolderSource
from vit_linearizer.data.views import MaskConfig, TrainingView, ViewConfig, seeded
from vit_linearizer.recipes import ADAPTATION, DISTILLATION, FINE_TUNING
from vit_linearizer.training import loop
from vit_linearizer.training.data import TrainingData
from vit_linearizer.training.progress import ProgressLine

LEVEL = 1 / 255
CPU = torch.device("cpu")
#: torchvision's operations on Pillow's pictures, by the numbers that stand in a row of colours.
JITTER = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
TIMES = ("_seconds", "images_per_second", "data_wait", "memory_gib")


@pytest.fixture(scope="module", params=["china.jpg", "flower.jpg"])
def photo(request) -> Image.Image:
    """A quarter of a photograph at half its size: 107 x 160 pixels with edges, sky and dark places."""
    image = Image.fromarray(load_sample_image(request.param)[100:314, 160:480])
    return image.resize((160, 107), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> Tensor:
    return tv.pil_to_tensor(image)[None].float() / 255


def row(*, change=BLURRED, deviation=0.0, factors=(1.0, 1.0, 1.0), order=(0, 1, 2)) -> Tensor:
    """Colours that change nothing but what is asked for: a blur by nothing is the picture."""
    return torch.tensor([[change, deviation, *factors, *order]], dtype=torch.float32)


def above(found: Tensor, image: Image.Image) -> Tensor:
    """How far above Pillow's picture, in its levels."""
    expected = tensor(image)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1
    return (found - expected) / LEVEL


# --- each operation


def test_colours_that_change_nothing_leave_the_bits(photo):
    images = tensor(photo)
    for order in permutations(range(3)):
        assert torch.equal(apply_colours(images, row(order=order)), images)


def test_solarising_is_pillows(photo):
    assert above(apply_colours(tensor(photo), row(change=SOLARISED)), ImageOps.solarize(photo, 128)).abs().max() < 1e-3
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert above(apply_colours(tensor(ramp), row(change=SOLARISED)), ImageOps.solarize(ramp, 128)).abs().max() < 1e-3


def test_grey_is_pillows(photo):
    assert above(apply_colours(tensor(photo), row(change=GREY)), ImageOps.grayscale(photo).convert("RGB")).abs().max() < 0.51


@pytest.mark.parametrize("deviation", [0.1, 0.3, 0.5, 0.8, 1.0, 1.3, 1.7, 2.0])
def test_blur_is_close_to_pillows(photo, deviation):
    blurred = photo.filter(ImageFilter.GaussianBlur(deviation))
    apart = above(apply_colours(tensor(photo), row(deviation=deviation)), blurred).abs()
    assert apart.mean() < 0.6
    assert apart[..., 6:-6, 6:-6].max() < 3
    assert apart.max() < 20  # Pillow goes on beyond an edge three times, once for each of its boxes


@pytest.mark.parametrize("deviation", [0.1, 0.4, 0.9, 1.4, 2.0])
def test_blur_spreads_a_point_by_its_deviation(deviation):
    """A bright point becomes as much light, spread with the variance that is asked for, also below half a pixel."""
    point = torch.zeros(1, 3, 31, 31)
    point[..., 15, 15] = 1
    spread = apply_colours(point, row(deviation=deviation))[0, 0].double()
    places = torch.arange(31).double() - 15
    assert spread.sum().item() == pytest.approx(1, abs=1e-5)
    for axis in (0, 1):
        assert (spread.sum(1 - axis) * places**2).sum().item() == pytest.approx(deviation**2, rel=1e-3)
    torch.testing.assert_close(spread, spread.T)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (1, 40)])
def test_pictures_smaller_than_the_blur_are_blurred_too(size):
    flat = torch.full((2, 3, *size), 0.3)
    torch.testing.assert_close(apply_colours(flat, row(deviation=2.0).repeat(2, 1)), flat)


@pytest.mark.parametrize("factor", [0.7, 0.93, 1.15, 1.3])
@pytest.mark.parametrize("number", range(3), ids=["brightness", "contrast", "saturation"])
def test_each_factor_is_pillows(photo, number, factor):
    factors = [1.0, 1.0, 1.0]
    factors[number] = factor
    # Pillow drops what is behind the point; its mean and its greys are whole levels too.
    apart = above(apply_colours(tensor(photo), row(factors=factors)), JITTER[number](photo, factor))
    assert apart.min() > -0.3 and apart.max() < 1.3


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_factors_come_in_their_order(photo, order):
    factors = (1.3, 0.75, 0.7)
    expected = photo
    for number in order:
        expected = JITTER[number](expected, factors[number])
    found = apply_colours(tensor(photo), row(factors=factors, order=order))
    apart = above(found, expected)
    assert apart.min() > -0.6 and apart.max() < 3.6  # less than a level a step, and 1.3 times what was before
    other = apply_colours(tensor(photo), row(factors=factors, order=order[::-1]))
    assert above(other, expected).abs().max() > 8


def test_each_picture_of_a_batch_has_its_own_colours(photo):
    colours = drawn(9)
    assert len(set(colours[:, 0].tolist())) == 3
    images = torch.cat([tensor(photo), 1 - tensor(photo), tensor(photo).flip(-1)]).repeat(3, 1, 1, 1)
    before = images.clone()
    together = apply_colours(images, colours)
    assert torch.equal(images, before)
    for number in range(9):
        alone = apply_colours(images[number : number + 1], colours[number : number + 1])
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=1e-6)


def test_nothing_on_the_device_is_asked_for():
    """The meta device has no values: whoever needs one to go on fails there, as on a GPU he would have to wait."""
    images = torch.empty(9, 3, 16, 24, device="meta")
    coloured = apply_colours(images, drawn(9))
    assert coloured.device.type == "meta" and coloured.shape == images.shape
    moved = to_device({"images": torch.zeros(9, 3, 16, 24, dtype=torch.uint8), "colours": drawn(9)}, torch.device("meta"))
    assert moved["images"].shape == images.shape


# --- what is drawn


def drawn(count: int, *, seed: int = 0) -> Tensor:
    with seeded(seed):
        return torch.stack([draw_colours() for _ in range(count)])


def test_draws_have_timms_distribution():
    colours = drawn(6000)
    assert colours.shape == (6000, 8) and colours.dtype == torch.float32
    change, deviation, factors, order = colours[:, 0], colours[:, 1], colours[:, 2:5], colours[:, 5:].int()
    shares = Counter(change.tolist())
    assert set(shares) == {SOLARISED, GREY, BLURRED}
    assert all(1850 < count < 2150 for count in shares.values())  # four deviations of a third
    assert (deviation[change != BLURRED] == 0).all()
    uniform(deviation[change == BLURRED], 0.1, 2.0)
    for column in factors.T:
        uniform(column, 0.7, 1.3)
    together = torch.corrcoef(torch.cat([change[:, None], factors], dim=1).T)
    assert (together - torch.eye(4)).abs().max() < 0.06
    orders = Counter(tuple(line) for line in order.tolist())
    assert set(orders) == set(permutations(range(3)))
    assert all(880 < count < 1120 for count in orders.values())


def uniform(values: Tensor, low: float, high: float) -> None:
    """Kolmogorov and Smirnov's distance, at a chance of about one in a thousand."""
    assert values.min() >= low and values.max() <= high
    found = (values.sort().values - low) / (high - low)
    steps = torch.arange(1, len(values) + 1) / len(values)
    assert (found - steps).abs().max() < 1.95 / math.sqrt(len(values))


def view(*, device_augmentation: bool, size=(64, 80), mask=None, seed=0, **changes) -> TrainingView:
    return TrainingView(size, ViewConfig(device_augmentation=device_augmentation, **changes), mask, seed=seed)


@pytest.mark.parametrize("changes", [{}, {"smallest_crop": 0.5, "horizontal_flip": 0.0}], ids=["recipe", "other crop"])
def test_a_draw_shows_what_the_loader_would_show(photo, changes):
    """The same crop, flip and colours, but for Pillow's whole levels: after each operation, in a blur after each box."""
    kinds = Counter()
    for place in range(30):
        draw = Draw(3, place, 1)
        item = view(device_augmentation=True, **changes)(photo, draw)
        assert item["images"].dtype == torch.uint8 and item["images"].shape == (3, 64, 80)
        cropped = view(device_augmentation=False, augmentation="crop", **changes)(photo, draw)
        assert torch.equal(item["images"], cropped["images"])
        expected = view(device_augmentation=False, **changes)(photo, draw)["images"]
        found = to_device({name: value[None] for name, value in item.items()}, CPU)["images"][0]
        apart = found * 255 - expected
        assert apart.abs().mean() < 2
        inner = apart[:, 6:-6, 6:-6]
        assert inner.min() > -4 and inner.max() < 8
        kinds[int(item["colours"][0])] += 1
    assert len(kinds) == 3


@pytest.mark.parametrize("field", ["epoch", "place", "repeat", "seed"])
def test_colours_depend_on_the_draw_and_the_seed_alone(photo, field):
    seen = set()
    for value in range(8):
        draw = Draw(**{"epoch": 0, "place": 0, "repeat": 0, **({field: value} if field != "seed" else {})})
        items = []
        for state in (1, 2):
            torch.manual_seed(state)
            items.append(view(device_augmentation=True, seed=value if field == "seed" else 0)(photo, draw))
        assert all(torch.equal(items[0][name], items[1][name]) for name in ("images", "colours"))
        seen.add(items[0]["colours"].numpy().tobytes())
    assert len(seen) == 8


def test_the_mask_stays_that_of_the_draw(photo):
    mask = MaskConfig(grid=(4, 5), ratio=0.5, masking="token")
    with_it, without = (view(device_augmentation=given, mask=mask)(photo, Draw(0, 1, 2)) for given in (True, False))
    assert set(with_it) == {"images", "mask", "colours"} and set(without) == {"images", "mask"}
    assert torch.equal(with_it["mask"], without["mask"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with a single core
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # from Python 3.12 on
def test_workers_draw_the_same_colours_and_batches_carry_them_to_the_device(photos):
    source = FolderSource(photos)
    dataset = TrainingSet(source, np.arange(len(source)), view(device_augmentation=True, size=(16, 24)), SkippedList(None))
    dataset = pickle.loads(pickle.dumps(dataset))

    def batches(num_workers: int) -> list[dict[str, Tensor]]:
        sampler = StepSampler(first=0, last=2, images=len(source), batch_size=4, repeats=3, seed=0)
        return list(training_loader(dataset, sampler, num_workers=num_workers, pin_memory=False))

    alone, helped = batches(0), batches(2)
    for first, second in zip(alone, helped, strict=True):
        assert first["colours"].shape == (4, 8)
        assert all(torch.equal(first[name], second[name]) for name in first)
        moved = to_device(first, CPU)
        assert set(moved) == {"images"} and "colours" in first
        assert torch.equal(moved["images"], apply_colours(first["images"].float() / 255, first["colours"]))
    assert "colours" not in CentreSet(source, [0], (16, 24))[0]


# --- what goes together

BASE = {"teacher": "t", "data": "no such folder", "out": "o"}
STUDENT = "adventurer_tiny_patch16_224"


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        ("rand", r"^--augmentation rand: .*picture by picture.* use --augmentation three, or leave --device-aug\w+ out$"),
        ("crop", r"^--augmentation crop: changes no colours; use --augmentation three, or leave --device-aug\w+ out$"),
        ("affine", r"^--augmentation affine: changes no colours"),
        ("none", r"^--augmentation none: changes no colours"),
    ],
)
def test_augmentations_without_colours_for_the_device_are_refused(augmentation, message):
    with pytest.raises(UserError, match=message):
        ViewConfig(augmentation=augmentation, device_augmentation=True)
    assert not ViewConfig(augmentation=augmentation).device_augmentation


def test_commands_refuse_before_they_read_anything(small_run, tmp_path: Path, capsys):
    out = tmp_path / "refused"
    with pytest.raises(UserError, match=r"^--augmentation rand: "):
        distill(small_run(device_augmentation=True, augmentation="rand", data="nowhere", out=str(out)))
    with pytest.raises(UserError, match=r"^--augmentation rand: "):  # of the paper's fine-tuning
        paths = dict(data="nowhere", out=str(out))
        finetune(FinetuneConfig(model=STUDENT, model_pretrained=False, device_augmentation=True, **paths))
    adala = ["distill", "--recipe", "adala", "--teacher", "vit_tiny_patch16_224", "--data", "nowhere", "--out", str(out)]
    assert main([*adala, "--device-augmentation"]) == 2
    assert "--augmentation crop: changes no colours; " in capsys.readouterr().err
    assert not out.exists()


def test_the_flag_turns_it_on_where_views_are_and_segment_has_none():
    for recipe in (DISTILLATION["linearizer"](STUDENT), FINE_TUNING["finetune_base"]().override(augmentation="three")):
        assert not recipe.views.device_augmentation
        config = DistillConfig(**BASE, student=STUDENT, device_augmentation=True)
        assert apply_flags(recipe, config).views == dataclasses.replace(recipe.views, device_augmentation=True)
        assert apply_flags(recipe, DistillConfig(**BASE, student=STUDENT)) == recipe
    assert "device_augmentation" not in {field.name for field in dataclasses.fields(SegmentConfig)}


def test_it_is_recorded_where_it_is_on():
    """Off, ``config.json`` is what it was before there was such a value."""
    both = ADAPTATION["adala"]("")
    for recipe in (DISTILLATION["linearizer"](STUDENT), FINE_TUNING["finetune_base"](), both.attention, both.feature):
        before = {name: value for name, value in recipe.flat().items() if name != "device_augmentation"}
        assert recipe.recorded() == before
        on = recipe.override(augmentation="three", device_augmentation=True)
        assert on.recorded() == before | {"augmentation": "three", "device_augmentation": True}


# --- runs


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if line["split"] == "train"]


def test_a_stopped_run_goes_on_to_the_bit(small_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = dict(device_augmentation=True, drop_path=0.2, checkpoint_minutes=0.0)
    whole = distill(small_run(out=str(tmp_path / "whole"), **settings))
    config = small_run(out=str(tmp_path / "stopped"), **settings)
    save = loop.save_checkpoint

    def save_and_stop(path, model, optimizer, progress, *, writes):
        save(path, model, optimizer, progress, writes=writes)
        if progress.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_checkpoint", save_and_stop)
        distill(config)
    assert len(losses(Path(config.out))) == 4
    run = distill(config)
    assert len(losses(run)) == 9 and all(math.isfinite(loss) for loss in losses(run))
    assert metrics(run) == metrics(whole)
    saved, expected = (torch.load(path / "checkpoints" / "last.pt", weights_only=True) for path in (run, whole))
    assert all(torch.equal(saved["model"][name], value) for name, value in expected["model"].items())


def test_it_learns_from_the_same_pictures_and_is_another_configuration(small_run, tmp_path: Path):
    with_it = distill(small_run(out=str(tmp_path / "on"), device_augmentation=True, epochs=1))
    without = distill(small_run(out=str(tmp_path / "off"), epochs=1))
    assert losses(with_it) != losses(without)
    assert losses(with_it) == pytest.approx(losses(without), rel=0.01)
    cropped = distill(small_run(out=str(tmp_path / "crop"), augmentation="crop", epochs=1))
    assert losses(cropped) != pytest.approx(losses(without), rel=0.01)
    assert json.loads((with_it / "config.json").read_text())["device_augmentation"] is True
    with pytest.raises(UserError, match=r"another configuration: device_augmentation \(True there, None here\)"):
        distill(small_run(out=str(with_it), epochs=1))


def test_a_run_from_before_there_was_such_a_flag_goes_on_without_it(small_run, caplog):
    run = distill(small_run(epochs=1))
    recorded = json.loads((run / "config.json").read_text())
    recorded.pop("device_augmentation", None)
    (run / "config.json").write_text(json.dumps(recorded))
    caplog.clear()
    distill(small_run(epochs=1))
    assert "resumed at step 3 of 3" in caplog.text
    with pytest.raises(UserError, match=r"another configuration: device_augmentation \(None there, True here\)"):
        distill(small_run(epochs=1, device_augmentation=True))


def test_a_classifier_is_fine_tuned_with_it(tmp_path: Path):
    config = FinetuneConfig(
        model=STUDENT, model_pretrained=False, model_args=("embed_dim=32", "depth=2"), image_size="16", patch_size=8,
        data=str(write_split(tmp_path / "data")), out=str(tmp_path / "run"), epochs=2, batch_size=8, drop_path=0.0,
        augmentation="three", device_augmentation=True, device="cpu", precision="fp32", log_every=1,
    )  # fmt: skip
    run = finetune(config)
    assert len(losses(run)) == 6 and all(math.isfinite(loss) for loss in losses(run))
    before = metrics(run)
    finetune(config)
    assert metrics(run) == before


# --- the hint


@pytest.mark.parametrize(
    ("colours_in_loader", "device", "hint"),
    [
        (True, "cuda", "more --num-workers, or in a new run --device-augmentation"),
        (True, "cpu", "more --num-workers"),
        (False, "cuda", "more --num-workers"),
    ],
)
def test_who_waits_for_data_is_told_what_helps(colours_in_loader, device, hint, caplog):
    data = TrainingData(training=None, repeats=1, held_out=None, bank=None, colours_in_loader=colours_in_loader)
    with ProgressLine("distillation", first=0, total=2, hint=loop._wait_hint(data, torch.device(device))) as line:
        line.update(2, images_per_second=10.0, data_wait=0.5)
    assert f"data wait 50% (try {hint})" in caplog.text


def test_only_three_without_the_flag_leaves_something_to_the_device():
    assert ViewConfig().colours_in_loader
    assert not ViewConfig(device_augmentation=True).colours_in_loader
    assert not any(ViewConfig(augmentation=name).colours_in_loader for name in ("rand", "crop", "affine", "none"))
