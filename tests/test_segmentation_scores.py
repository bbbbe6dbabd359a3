"""Segmentation scores by hand and against torchmetrics; windows, sizes and batches that must not change them."""

from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vit_linearizer.contracts import UserError
from vit_linearizer.data.segmentation.sets import IGNORED
from vit_linearizer.evaluation.segmentation import (
    ConfusionMatrix,
    evaluate_segmentation,
    labels_at,
    overlay,
    predict_logits,
    window_starts,
)
from vit_linearizer.models.segmenter import Segmenter


class Output(NamedTuple):
    logits: Tensor


class Colours(nn.Module):
    """Scores a pixel by its own colour alone (class = strongest channel), and keeps the sizes that it was shown."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, images):
        assert 0 <= images.min() <= images.max() <= 1
        self.shown.append(tuple(images.shape))
        return Output(images * 10)


class Places(nn.Module):
    """Answers with a number of its own for each window, in the order in which they come."""

    num_classes = 1

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return Output(torch.full((images.shape[0], 1, *images.shape[-2:]), float(self.calls)))


def random_labels(*shape, classes, seed):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


# --- confusion matrix


def test_counts_and_scores_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 2, 255, 255]], dtype=torch.uint8)
    said = torch.tensor([[0, 0, 1, 1], [2, 2, 0, 3]])
    confusion = ConfusionMatrix(5)
    confusion.update(said, truth)
    expected = torch.zeros(5, 5, dtype=torch.int64)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[1, 2], expected[2, 2] = 2, 1, 1, 1, 1
    assert confusion.counts.dtype == torch.int64
    assert torch.equal(confusion.counts, expected)
    scores = confusion.scores()
    assert scores["iou"][:3] == pytest.approx([200 / 3, 100 / 3, 50])  # 2 of 3, 1 of 3, 1 of 2
    assert scores["iou"][3:] == [None, None]
    assert scores["miou"] == pytest.approx(50)
    assert scores["pixel_accuracy"] == pytest.approx(400 / 6)
    assert scores["mean_accuracy"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 1) / 3)


def test_a_class_that_is_only_predicted_counts_against_the_mean():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0]))
    scores = confusion.scores()
    assert scores["iou"] == [75, 0, None]
    assert scores["miou"] == 37.5
    assert scores["mean_accuracy"] == 75


def test_agreement_with_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    classes = 7
    truth = random_labels(4, 23, 17, classes=classes - 2, seed=0)  # two classes never occur in the truth
    said = torch.where(
        random_labels(4, 23, 17, classes=2, seed=1).bool(), truth, random_labels(4, 23, 17, classes=5, seed=2)
    )
    truth[:, :3] = IGNORED
    confusion = ConfusionMatrix(classes)
    for predicted, target in zip(said, truth, strict=True):
        confusion.update(predicted, target)
    scores = confusion.scores()
    settings = dict(num_classes=classes, ignore_index=IGNORED)

    def theirs(kind, **changes):
        return 100 * getattr(classification, kind)(**settings, **changes)(said, truth)

    assert scores["miou"] == pytest.approx(theirs("MulticlassJaccardIndex").item(), abs=1e-3)
    assert scores["pixel_accuracy"] == pytest.approx(theirs("MulticlassAccuracy", average="micro").item(), abs=1e-3)
    assert scores["mean_accuracy"] == pytest.approx(theirs("MulticlassAccuracy", average="macro").item(), abs=1e-3)
    per_class = theirs("MulticlassJaccardIndex", average="none")
    assert scores["iou"][:5] == pytest.approx(per_class[:5].tolist(), abs=1e-3)
    assert scores["iou"][5:] == [None, None]
    matrix = classification.MulticlassConfusionMatrix(**settings)(said, truth)
    assert torch.equal(confusion.counts, matrix)


def test_matrices_add_up_however_pixels_are_dealt_out():
    truth, said = random_labels(6, 50, classes=4, seed=0), random_labels(6, 50, classes=4, seed=1)
    whole, first, second = ConfusionMatrix(4), ConfusionMatrix(4), ConfusionMatrix(4)
    whole.update(said, truth)
    first.update(said[:1], truth[:1])
    for row in range(1, 6):
        second.update(said[row], truth[row])
    rest = second.counts.clone()
    first.merge(second)
    assert torch.equal(first.counts, whole.counts)
    assert torch.equal(second.counts, rest)
    second.reduce(lambda counts: counts * 2)
    assert torch.equal(second.counts, 2 * rest)


def test_bad_counts():
    confusion = ConfusionMatrix(3)
    with pytest.raises(UserError, match="no labelled pixel"):
        confusion.scores()
    with pytest.raises(ValueError, match="class 7 of 3"):
        confusion.update(torch.tensor([2, 1]), torch.tensor([7, 255]))
    with pytest.raises(ValueError, match="must have one shape"):
        confusion.update(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    assert not confusion.counts.any()


# --- windows


@pytest.mark.parametrize(
    ("size", "crop", "stride", "starts"),
    [
        (100, 512, 341, [0]),
        (512, 512, 341, [0]),
        (513, 512, 341, [0, 1]),
        (853, 512, 341, [0, 341]),
        (854, 512, 341, [0, 341, 342]),
        (1024, 512, 341, [0, 341, 512]),
        (10, 4, 4, [0, 4, 6]),
        (8, 4, 4, [0, 4]),
    ],
)
def test_window_starts(size, crop, stride, starts):
    assert window_starts(size, crop, stride) == starts


@pytest.mark.parametrize(("height", "width"), [(7, 7), (8, 8), (9, 8), (8, 21), (30, 17)])
@pytest.mark.parametrize("stride", [(8, 8), (5, 3), (1, 8)])
def test_windows_cover_every_pixel_at_the_crops_size(height, width, stride):
    covered = torch.zeros(height, width)
    for top in window_starts(height, 8, stride[0]):
        for left in window_starts(width, 8, stride[1]):
            assert top + min(8, height) <= height
            assert left + min(8, width) <= width
            covered[top : top + 8, left : left + 8] += 1
    assert covered.min() >= 1


def test_overlaps_are_the_mean_of_the_windows():
    logits = predict_logits(Places(), torch.zeros(3, 4, 6), crop=(4, 4), stride=(4, 2), mode="sliding")
    assert logits.shape == (1, 1, 4, 6)
    assert logits[0, 0, 0].tolist() == [1, 1, 1.5, 1.5, 2, 2]


def test_the_default_stride_is_two_thirds_of_the_crop():
    for shape in ((14, 6), (6, 14)):
        model = Colours()
        predict_logits(model, torch.zeros(3, *shape), crop=(6, 6), mode="sliding")
        assert len(model.shown) == 3  # at 0, 4 and 8


def test_sliding_over_a_model_of_single_pixels_changes_nothing():
    images = torch.rand(2, 3, 21, 34)
    model = Colours()
    sliding = predict_logits(model, images, crop=(8, 13), stride=(5, 4), mode="sliding")
    assert set(model.shown) == {(2, 3, 8, 13)}
    torch.testing.assert_close(sliding, images * 10)


def test_a_side_shorter_than_the_crop_is_taken_whole():
    model = Colours()
    logits = predict_logits(model, torch.rand(3, 5, 20), crop=(8, 8), stride=(8, 8), mode="sliding")
    assert model.shown == [(1, 3, 5, 8)] * 3
    assert logits.shape == (1, 3, 5, 20)


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=0, dynamic_img_size=True)
    model = Segmenter(timm.create_model("vit_tiny_patch16_224", **shape), num_classes=4, head="upernet", head_width=16)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for step in range(40):  # enough that all classes are predicted somewhere
        images, masks = scenes(4, (32, 32), seed=step)
        out = model(images.float() / 255)
        F.cross_entropy(out.logits, masks.long(), ignore_index=IGNORED).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def scenes(count, size, *, seed):
    """Noise in four quarters of four colours, and masks that say which."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 4, (count, 1, 2, 2), generator=generator).float()
    masks = F.interpolate(masks, size=size, mode="nearest")[:, 0].to(torch.uint8)
    colours = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [120, 120, 120]])
    images = colours[masks.long()].permute(0, 3, 1, 2) + torch.randint(-30, 30, (count, 3, *size), generator=generator)
    masks[:, :2] = IGNORED
    return images.to(torch.uint8), masks


@pytest.mark.parametrize("size", [(32, 32), (30, 25), (5, 32)])
def test_one_window_equals_whole_exactly(segmenter, size):
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        whole = predict_logits(segmenter, images)
        sliding = predict_logits(segmenter, images, crop=(32, 32), mode="sliding")
    assert torch.equal(whole, sliding)


def test_each_window_is_what_the_model_says_of_that_crop(segmenter):
    images = torch.rand(1, 3, 32, 50)
    with torch.no_grad():
        sliding = predict_logits(segmenter, images, crop=(32, 32), stride=(32, 18), mode="sliding")
        left, right = segmenter(images[..., :32]).logits, segmenter(images[..., 18:]).logits
    torch.testing.assert_close(sliding[..., :18], left[..., :18])
    torch.testing.assert_close(sliding[..., 18:32], (left[..., 18:] + right[..., :14]) / 2)
    torch.testing.assert_close(sliding[..., 32:], right[..., 14:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mode="slide"), "--mode slide: choose whole or sliding"),
        (dict(mode="sliding"), "--crop: sliding"),
        (dict(mode="sliding", crop=(4, 4), stride=(5, 4)), "--stride 5x4: .*crop 4x4"),
        (dict(mode="sliding", crop=(4, 4), stride=(4, 0)), "--stride 4x0: "),
    ],
)
def test_bad_windows(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        predict_logits(Colours(), torch.rand(3, 9, 9), **changes)


# --- evaluation


def test_labels_at_another_size_are_the_argmax_of_interpolated_logits():
    for classes in (3, 16, 17, 50):
        logits = torch.randn(classes, 6, 9, generator=torch.Generator().manual_seed(classes))
        expected = F.interpolate(logits[None], size=(17, 11), mode="bilinear", align_corners=False)[0].argmax(0)
        assert torch.equal(labels_at(logits, (17, 11)), expected)
        assert torch.equal(labels_at(logits, (6, 9)), logits.argmax(0))


def items():
    """Pictures of two sizes, some with masks of another size, and two that cannot be read."""
    found = []
    for number in range(9):
        images, masks = scenes(1, (32, 48) if number % 3 else (40, 32), seed=100 + number)
        mask = masks[0]
        if number % 2:
            mask = F.interpolate(mask[None, None].float(), scale_factor=2, mode="nearest")[0, 0].to(torch.uint8)
        found.append({"image": images[0], "mask": mask, "number": number})
    found.insert(2, {"number": 20, "problem": "broken"})
    found.append({"number": 21, "problem": "no mask"})
    return found


def batches(size):
    every = items()
    return [every[first : first + size] for first in range(0, len(every), size)]


@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_scores_do_not_depend_on_the_batch(segmenter, mode):
    found = [
        evaluate_segmentation(segmenter, batches(size), device="cpu", crop=(32, 32), mode=mode) for size in (1, 2, 5, 11)
    ]
    assert found[0]["images"] == 9
    assert found[0]["skipped"] == 2
    assert 30 < found[0]["miou"] < 100
    assert None not in found[0]["iou"]
    for other in found[1:]:
        assert (other["images"], other["skipped"]) == (9, 2)
        # A pixel on the edge between two classes may fall to either by rounding; there are twenty thousand.
        assert other["iou"] == pytest.approx(found[0]["iou"], abs=0.05)
        assert other["miou"] == pytest.approx(found[0]["miou"], abs=0.05)


def test_sliding_with_a_crop_that_covers_everything_scores_as_whole(segmenter):
    whole = evaluate_segmentation(segmenter, batches(4), device="cpu")
    assert evaluate_segmentation(segmenter, batches(4), device="cpu", crop=(64, 64), mode="sliding") == whole


def test_a_perfect_and_an_imperfect_score_by_hand():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    image[0, 0], image[1, 1] = 255, 255  # red above, green below
    item = {"image": image, "number": 0}
    perfect = {**item, "mask": torch.tensor([[0, 0], [1, 255]], dtype=torch.uint8)}
    found = evaluate_segmentation(Colours(), [[perfect]], device="cpu")
    assert found == {
        "miou": 100, "pixel_accuracy": 100, "mean_accuracy": 100, "iou": [100, 100, None], "images": 1, "skipped": 0
    }  # fmt: skip
    wrong = {**item, "mask": torch.tensor([[0, 2], [1, 1]], dtype=torch.uint8)}
    assert evaluate_segmentation(Colours(), [[wrong]], device="cpu")["iou"] == [50, 100, 0]


def test_images_of_one_size_go_together():
    model = Colours()
    sizes = [(4, 4), (6, 4), (4, 4), (4, 4)]
    batch = [
        {"image": torch.zeros(3, *size, dtype=torch.uint8), "mask": torch.zeros(size, dtype=torch.uint8), "number": n}
        for n, size in enumerate(sizes)
    ]
    evaluate_segmentation(model, [batch], device="cpu")
    assert model.shown == [(3, 3, 4, 4), (1, 3, 6, 4)]


def test_evaluation_leaves_the_model_as_it_was(segmenter):
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    for training in (True, False):
        segmenter.train(training)
        evaluate_segmentation(segmenter, batches(1), device="cpu")
        assert segmenter.training == segmenter.decoder.training == training
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())


def test_sums_over_processes():
    every = batches(3)
    for item in (item for batch in every for item in batch if "mask" in item):
        item["mask"][item["mask"] == 3] = IGNORED  # the fourth class is no channel's
    alone = evaluate_segmentation(Colours(), every, device="cpu")
    doubled = evaluate_segmentation(Colours(), every, device="cpu", total=lambda tensor: 2 * tensor)
    assert (doubled["images"], doubled["skipped"]) == (18, 4)
    assert doubled["iou"] == alone["iou"]


def test_nothing_to_score():
    with pytest.raises(UserError, match="no labelled pixel"):
        evaluate_segmentation(Colours(), [[{"number": 0, "problem": "broken"}]], device="cpu")


# --- pictures


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_overlay(alpha):
    image = torch.randint(0, 256, (3, 5, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.tensor([[0, 1, 2, 255]] * 5)
    palette = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]], dtype=np.uint8)
    picture = overlay(image, labels, palette, alpha)
    assert isinstance(picture, Image.Image)
    assert picture.size == (4, 5)
    found = np.asarray(picture).astype(float)
    pixels = image.permute(1, 2, 0).numpy()
    for column in range(3):
        expected = (1 - alpha) * pixels[:, column] + alpha * palette[column]
        np.testing.assert_allclose(found[:, column], expected, atol=1)
    np.testing.assert_array_equal(found[:, 3], pixels[:, 3])
    same = overlay(Image.fromarray(pixels), labels.numpy().astype(np.uint8), palette.tolist(), alpha)
    np.testing.assert_array_equal(np.asarray(same), np.asarray(picture))


def test_overlay_without_any_label_is_the_picture():
    image = torch.randint(0, 256, (3, 5, 4)).to(torch.uint8)
    picture = overlay(image, torch.full((5, 4), IGNORED), [[1, 2, 3]])
    np.testing.assert_array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())
