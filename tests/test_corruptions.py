"""Spoilt pictures: each kind by an independent statement of what it is, and all of them by what every kind must keep."""

import colorsys
import io
import itertools
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vit_linearizer.contracts import UserError
from vit_linearizer.evaluation.corruptions import KINDS, SEVERITIES, corrupt

#: These do the same to every picture.
FIXED = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
#: These work on the picture's own pixels, or on a share of them, at every size.
PER_PIXEL = {"gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "pixelate", "jpeg_compression"}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_severity = pytest.mark.parametrize("severity", SEVERITIES)


def photographs(height: int, width: int) -> Tensor:
    """Scikit-learn's two photographs, ``[2, 3, height, width]``."""
    pictures = [torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in load_sample_images().images]
    return torch.stack([tv.resize(picture, [height, width], antialias=True) for picture in pictures]) / 255


def constant(value: float, side: int = 64, *, batch: int = 1) -> Tensor:
    return torch.full((batch, 3, side, side), value)


def ramps(side: int) -> tuple[Tensor, Tensor]:
    """Pictures in which every pixel says its row, and its column: from 0.25 to 0.75."""
    row = 0.25 + 0.5 * torch.arange(side) / (side - 1)
    columns = row.expand(1, 3, side, side)
    return columns.mT, columns


# --- what every kind keeps


def test_the_kinds_are_those_of_imagenet_c():
    assert KINDS == (
        "gaussian_noise", "shot_noise", "impulse_noise",
        "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
        "snow", "frost", "fog", "brightness",
        "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    )  # fmt: skip
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("height", "width", "dtype"),
    [(32, 32, torch.float32), (33, 47, torch.float64), (61, 20, torch.float16), (8, 19, torch.bfloat16)],
)
@every_kind
def test_shape_dtype_and_range_are_kept_and_the_picture_changes(kind, height, width, dtype):
    images = photographs(height, width).to(dtype)
    before = images.clone()
    for severity in (1, 5):
        spoilt = corrupt(images, kind, severity, [3, 4])
        assert spoilt.shape == images.shape
        assert spoilt.dtype == dtype
        assert spoilt.min() >= 0
        assert spoilt.max() <= 1
        for one, other in zip(spoilt, images, strict=True):
            assert not torch.equal(one, other)
    assert torch.equal(images, before)


@every_kind
def test_an_image_depends_on_its_number_alone(kind):
    images = photographs(40, 48)[[0, 1, 0]]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    together = corrupt(images, kind, 3, [7, 2**40, 0])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(corrupt(images.flip(0), kind, 3, [0, 2**40, 7]).flip(0), together)
    for place, number in enumerate([7, 2**40, 0]):
        alone = corrupt(images[place : place + 1], kind, 3, torch.tensor([number]))
        assert torch.equal(alone[0], together[place])
    assert torch.equal(together[0], together[2]) == (kind in FIXED)


def test_severities_and_kinds_draw_noise_of_their_own():
    """The sign of the noise would be the same for all severities if the number alone chose it."""
    grey = constant(0.5)
    first, second = (corrupt(grey, "gaussian_noise", severity, [0]) > 0.5 for severity in (1, 2))
    assert 0.45 < (first == second).float().mean() < 0.55


def harm(kind: str, images: Tensor) -> list[float]:
    """Root mean squared distance to the original at every severity."""
    numbers = range(len(images))
    return [float((corrupt(images, kind, severity, numbers) - images).square().mean().sqrt()) for severity in SEVERITIES]


def lost_edges(kind: str, images: Tensor) -> list[float]:
    """One minus the correlation of what neighbouring pixels differ by, before and after, at every severity."""
    losses = []
    for severity in SEVERITIES:
        spoilt = corrupt(images, kind, severity, range(len(images)))
        edges, found = (torch.cat([x.diff(dim=2).flatten(), x.diff(dim=3).flatten()]) for x in (images, spoilt))
        losses.append(1 - float(torch.cosine_similarity(edges, found, dim=0)))
    return losses


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "elastic_transform"])
def test_harm_grows_with_severity(kind):
    """Also where ImageNet-C's tables hardly change the distance, frost and fog: there the layer hides ever more edges."""
    measure = lost_edges if kind in ("frost", "fog") else harm
    measured = measure(kind, photographs(112, 150).repeat(4, 1, 1, 1))
    assert all(low < high for low, high in itertools.pairwise(measured)), measured


def test_the_elastic_transform_bends_and_then_wrinkles():
    """ImageNet-C's severities 1 and 2 move everything far, 3 to 5 little; the test of wrinkles separates 3, 4 and 5."""
    first, second, third, _, fifth = harm("elastic_transform", photographs(112, 150).repeat(12, 1, 1, 1))
    assert third < fifth < first < second


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PER_PIXEL])
@every_severity
def test_harm_and_resizing_may_change_places(kind, severity):
    """Lengths scale with the picture, and textures are those of the 224-pixel frame."""
    large = photographs(288, 288)
    small = tv.resize(large, [144, 144], antialias=True)
    late = corrupt(small, kind, severity, [0, 1])
    early = tv.resize(corrupt(large, kind, severity, [0, 1]), [144, 144], antialias=True)
    assert (late - early).square().mean() < 0.03 * (late - small).square().mean()


# --- noise


@pytest.mark.parametrize(("severity", "deviation"), list(zip(SEVERITIES, (0.08, 0.12, 0.18, 0.26, 0.38), strict=True)))
def test_gaussian_noise_has_its_deviation(severity, deviation):
    noise = corrupt(constant(0.5, 128), "gaussian_noise", severity, [0]) - 0.5
    # Of a normal distribution cut at 0.5 on either side.
    cut = 0.5 / deviation
    inside = math.erf(cut / math.sqrt(2)) - cut * math.sqrt(2 / math.pi) * math.exp(-(cut**2) / 2)
    variance = deviation**2 * (inside + cut**2 * math.erfc(cut / math.sqrt(2)))
    assert float(noise.std()) == pytest.approx(math.sqrt(variance), rel=0.02)
    assert abs(float(noise.mean())) < 5 * deviation / math.sqrt(noise.numel())


@pytest.mark.parametrize(("severity", "photons"), list(zip(SEVERITIES, (60, 25, 12, 5, 3), strict=True)))
def test_shot_noise_counts_photons(severity, photons):
    counts = corrupt(constant(0.1, 128), "shot_noise", severity, [0]) * photons
    assert torch.allclose(counts, counts.round(), atol=1e-4)
    assert float(counts.mean()) == pytest.approx(0.1 * photons, rel=0.05)
    assert float(counts.var()) == pytest.approx(0.1 * photons, rel=0.05)


@pytest.mark.parametrize(("severity", "share"), list(zip(SEVERITIES, (0.03, 0.06, 0.09, 0.17, 0.27), strict=True)))
def test_impulse_noise_loses_values_to_black_and_white(severity, share):
    spoilt = corrupt(constant(0.4, 128), "impulse_noise", severity, [0])
    assert spoilt.unique().tolist() == pytest.approx([0, 0.4, 1])
    for lost in (0, 1):
        assert float((spoilt == lost).float().mean()) == pytest.approx(share / 2, rel=0.15)


# --- blur


@pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
@every_severity
@pytest.mark.parametrize("side", [32, 225])
def test_blur_keeps_a_constant_picture(kind, severity, side):
    images = torch.tensor([0.2, 0.5, 0.9]).reshape(1, 3, 1, 1).expand(1, 3, side, side)
    assert torch.allclose(corrupt(images, kind, severity, [0]), images, atol=1e-5)


def spread_of_a_point(kind: str, severity: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a point of weight 1 in the middle of 224 pixels becomes, and the rows and columns from there."""
    point = torch.zeros(1, 3, 225, 225)
    point[..., 112, 112] = 1
    places = torch.arange(225.0) - 112
    return corrupt(point, kind, severity, [0])[0, 0], places[:, None], places


@pytest.mark.parametrize(("severity", "radius", "softness"), [(1, 3, 0.1), (2, 4, 0.5), (3, 6, 0.5), (5, 10, 0.5)])
def test_defocus_spreads_a_point_over_a_disc(severity, radius, softness):
    disc, rows, columns = spread_of_a_point("defocus_blur", severity)
    assert float(disc.sum()) == pytest.approx(1, abs=1e-3)
    middle = disc[(rows**2 + columns**2).sqrt() < radius - 2.5]
    assert torch.allclose(middle, torch.full_like(middle, 1 / (math.pi * radius**2)), rtol=0.1)
    assert (disc[(rows**2 + columns**2).sqrt() > radius + 3] < 1e-5).all()
    for places in (rows, columns):
        assert abs(float((disc * places).sum())) < 0.01
        # Of a disc, of sharing among pixels, and of the softness.
        assert float((disc * places**2).sum()) == pytest.approx(radius**2 / 4 + 1 / 6 + softness**2, rel=0.05)


@pytest.mark.parametrize(("severity", "radius", "sigma"), [(1, 10, 3), (2, 15, 5), (4, 15, 12), (5, 20, 15)])
def test_motion_spreads_a_point_along_half_a_line(severity, radius, sigma):
    line, rows, columns = spread_of_a_point("motion_blur", severity)
    assert float(line.sum()) == pytest.approx(1, abs=1e-3)
    row, column = float((line * rows).sum()), float((line * columns).sum())
    along = np.linspace(0, 2 * radius, 10000)
    weights = np.exp(-(along**2) / (2 * sigma**2))
    assert math.hypot(row, column) == pytest.approx((along * weights).sum() / weights.sum(), rel=0.03)
    assert abs(row) <= abs(column)  # within 45 degrees of the horizontal
    across = (rows * column - columns * row) / math.hypot(row, column)
    assert float((line * across**2).sum()) < 0.5


@pytest.mark.parametrize(
    ("severity", "zooms"),
    [
        (1, np.arange(1, 1.105, 0.01)),
        (2, np.arange(1, 1.155, 0.01)),
        (3, np.arange(1, 1.205, 0.02)),
        (4, np.arange(1, 1.255, 0.02)),
        (5, np.arange(1, 1.305, 0.03)),
    ],
)
def test_zoom_flattens_a_ramp_about_the_centre(severity, zooms):
    for ramp in ramps(65):
        spoilt = corrupt(ramp, "zoom_blur", severity, [0])
        flatter = 0.5 + (ramp - 0.5) * (1 + (1 / zooms).sum()) / (1 + len(zooms))
        assert torch.allclose(spoilt, flatter.float(), atol=1e-5)


@pytest.mark.parametrize("side", [224, 448])
def test_glass_moves_pixels_a_little(side):
    middle, reach = side // 2, 8 * side // 224
    edge = (torch.arange(side) >= middle).float().expand(1, 3, side, side)
    spoilt = corrupt(edge, "glass_blur", 1, [0])
    # At 224 pixels: two moves by one pixel, and two blurs of deviation 0.7 cut at three pixels.
    assert torch.allclose(spoilt[..., : middle - reach], torch.tensor(0.0), atol=1e-5)
    assert torch.allclose(spoilt[..., middle + reach :], torch.tensor(1.0), atol=1e-5)
    # Ragged: a blur alone would leave every row the same.
    ragged = spoilt[0, 0].std(dim=0) > 0.03
    assert ragged.sum() >= reach // 2


# --- weather


@every_severity
def test_snow_is_white_and_falls(severity):
    spoilt = corrupt(constant(0.3, 224), "snow", severity, [0])[0]
    assert (spoilt >= 0.3 - 1e-6).all()
    assert torch.equal(spoilt[0], spoilt[1])
    flakes = spoilt[0] - spoilt[0].mean()
    steps = [float(flakes.diff(dim=dim).square().mean()) for dim in (0, 1)]
    assert steps[0] < steps[1]  # longer than wide


@pytest.mark.parametrize(
    ("severity", "keep", "weight"), [(1, 1, 0.4), (2, 0.8, 0.6), (3, 0.7, 0.7), (4, 0.65, 0.7), (5, 0.6, 0.75)]
)
def test_frost_is_a_weighted_sum_with_one_sheet_of_ice(severity, keep, weight):
    black, grey = (corrupt(constant(value, 224), "frost", severity, [0]) for value in (0.0, 0.2))
    assert torch.allclose(grey, black + 0.2 * keep, atol=1e-6)
    assert float(black.max()) == pytest.approx(weight, rel=1e-5)
    assert 0.25 < float(black.mean()) / weight < 0.65


@pytest.mark.parametrize(
    ("severity", "weight", "decay"), [(1, 1.5, 2), (2, 2, 2), (3, 2.5, 1.7), (4, 2.5, 1.5), (5, 3, 1.4)]
)
def test_fog_is_a_rough_layer_under_a_falling_contrast(severity, weight, decay):
    value = 0.4
    spoilt = corrupt(constant(value, 224, batch=4), "fog", severity, range(4))
    layers = ((spoilt * (value + weight) / value) - value) / weight
    assert torch.allclose(layers.amin((1, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(layers.amax((1, 2, 3)), torch.ones(4), atol=1e-5)
    power = torch.fft.rfft2(layers[:, 0].double()).abs().square().mean(0)
    frequency = (torch.fft.fftfreq(224)[:, None] ** 2 + torch.fft.rfftfreq(224) ** 2).sqrt()
    chosen = (frequency > 0.02) & (frequency < 0.3)
    slope, _ = np.polyfit(frequency[chosen].log().numpy(), power[chosen].log().numpy(), 1)
    assert slope == pytest.approx(-2 * (1 + math.log2(decay)), abs=0.15)


@pytest.mark.parametrize(("severity", "added"), list(zip(SEVERITIES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True)))
def test_brightness_adds_to_the_value(severity, added):
    images = photographs(8, 10)
    images[0, :, 0, 0] = 0
    spoilt = corrupt(images, "brightness", severity, [0, 1])
    for image, found in zip(images.flatten(2).mT, spoilt.flatten(2).mT, strict=True):
        for pixel, colour in zip(image.tolist(), found.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            assert colour == pytest.approx(colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1)), abs=1e-5)


# --- digital


@pytest.mark.parametrize(("severity", "left"), list(zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True)))
def test_contrast_shrinks_about_the_mean_of_each_channel(severity, left):
    images = photographs(30, 40)
    spoilt = corrupt(images, "contrast", severity, [0, 1])
    assert torch.allclose(spoilt.mean((2, 3)), images.mean((2, 3)), atol=1e-5)
    assert torch.allclose(spoilt.std((2, 3)), left * images.std((2, 3)), atol=1e-5)
    assert torch.allclose(spoilt[..., 0, 0] - spoilt[..., 9, 9], left * (images[..., 0, 0] - images[..., 9, 9]), atol=1e-5)


@pytest.mark.parametrize(("severity", "strength", "sigma"), [(3, 12.2, 2.44), (4, 17.08, 2.44), (5, 29.28, 2.44)])
def test_elastic_wrinkles_by_smoothed_noise(severity, strength, sigma):
    """White noise of variance 1/3, smoothed by a Gaussian, has deviation ``1 / (sigma sqrt(12 pi))``."""
    rows, columns = ramps(224)
    inner = (slice(20, -20), slice(20, -20))
    places = torch.stack(
        [columns[0, 0][inner].flatten(), rows[0, 0][inner].flatten(), torch.ones(184 * 184)], dim=1
    ).double()
    for ramp in (rows, columns):
        read_from = corrupt(ramp, "elastic_transform", severity, [0])[0, 0][inner].flatten().double() * 2 * 223
        wrinkles = read_from - places @ torch.linalg.lstsq(places, read_from).solution
        assert float(wrinkles.std()) == pytest.approx(strength / (sigma * math.sqrt(12 * math.pi)), rel=0.1)


@pytest.mark.parametrize(("severity", "furthest"), [(1, 24.4), (2, 48.8), (3, 4.88)])
def test_elastic_moves_the_corners_of_the_middle_square(severity, furthest):
    """Where three corners are read from is uniform; the wrinkles add their own."""
    corners = [(186, 186), (186, 37), (37, 37)]
    moves = []
    for number in range(16):
        for axis, ramp in enumerate(ramps(224)):
            spoilt = corrupt(ramp, "elastic_transform", severity, [number])[0, 0]
            moves += [(float(spoilt[corner]) - 0.25) * 2 * 223 - corner[axis] for corner in corners]
    assert np.std(moves) == pytest.approx(furthest / math.sqrt(3), rel=0.25)
    assert abs(np.mean(moves)) < 4 * furthest / math.sqrt(3 * len(moves))


@pytest.mark.parametrize(("severity", "left"), list(zip(SEVERITIES, (0.6, 0.5, 0.4, 0.3, 0.25), strict=True)))
def test_pixelate_is_pillows_box_filter(severity, left):
    images = photographs(96, 130)
    spoilt = corrupt(images, "pixelate", severity, [0, 1])
    for image, found in zip(images, spoilt, strict=True):
        picture = tv.to_pil_image(image)
        small = picture.resize((int(130 * left), int(96 * left)), Image.Resampling.BOX)
        wanted = tv.to_image(small.resize((130, 96), Image.Resampling.BOX)) / 255
        assert torch.allclose(found, wanted, atol=2 / 255)


def test_pixelate_at_a_whole_ratio_is_the_mean_of_blocks():
    images = photographs(64, 96)
    means = torch.nn.functional.avg_pool2d(images, 4)
    blocks = means.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert torch.allclose(corrupt(images, "pixelate", 5, [0, 1]), blocks, atol=1e-5)


@pytest.mark.parametrize(("severity", "quality"), list(zip(SEVERITIES, (25, 18, 15, 10, 7), strict=True)))
def test_jpeg_is_pillows_round_trip(severity, quality):
    images = photographs(50, 70)
    spoilt = corrupt(images, "jpeg_compression", severity, [0, 1])
    for image, found in zip(images, spoilt, strict=True):
        file = io.BytesIO()
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        with Image.open(file) as opened:
            wanted = tv.to_image(opened.convert("RGB")) / 255
        assert torch.allclose(found, wanted, atol=1e-6)


# --- errors


def test_unknown_kinds_and_severities_are_named():
    images = constant(0.5)
    with pytest.raises(UserError, match=r"corruption glas_blur: choose from gaussian_noise, .*did you mean glass_blur"):
        corrupt(images, "glas_blur", 1, [0])
    for severity in (0, 6):
        with pytest.raises(UserError, match=rf"severity {severity}: choose from 1, 2, 3, 4, 5"):
            corrupt(images, "fog", severity, [0])


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 7, 32)])
def test_images_of_another_form_are_refused(shape):
    with pytest.raises(ValueError, match=r"give floats \[B, 3, H, W\]"):
        corrupt(torch.zeros(shape), "fog", 1, [0])


def test_whole_numbers_and_missing_names_are_refused():
    with pytest.raises(ValueError, match="give floats"):
        corrupt(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "fog", 1, [0])
    with pytest.raises(ValueError, match="1 numbers for 2 images"):
        corrupt(constant(0.5, batch=2), "fog", 1, [0])
    with pytest.raises(ValueError, match="negative"):
        corrupt(constant(0.5), "fog", 1, [-1])


@every_kind
def test_black_and_empty_batches_stay_finite(kind):
    assert corrupt(torch.zeros(1, 3, 32, 40), kind, 5, [0]).isfinite().all()
    assert corrupt(torch.zeros(0, 3, 32, 40), kind, 5, []).shape == (0, 3, 32, 40)
