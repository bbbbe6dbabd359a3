"""Measurements on frozen features against naive loops, and by what they must say of known cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from vit_linearizer.contracts import Features
from vit_linearizer.data.datasets import CentreSet, centre_loader, to_device
from vit_linearizer.data.sources import DigitsSource
from vit_linearizer.data.views import MaskConfig
from vit_linearizer.evaluation import (
    activation_agreement,
    collect_features,
    few_shot_accuracy,
    knn_accuracy,
    linear_probe,
    linear_probe_accuracy,
    readout_cosine,
)
from vit_linearizer.evaluation.processes import own_share, sum_over_processes
from vit_linearizer.models.adapters import extract_features
from vit_linearizer.models.teacher import Teacher
from vit_linearizer.objectives import activation_matching
from vit_linearizer.tasks import Distillation, DistillationConfig


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(per_class: int, *, classes: int = 4, dim: int = 8, spread: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around class centres that do not depend on the seed."""
    labels = torch.arange(classes).repeat(per_class)
    return 3 * normal(classes, dim, seed=99)[labels] + spread * normal(len(labels), dim, seed=seed), labels


# --- nearest neighbours


def looped_knn(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, temperature: float
) -> float:
    right = 0
    for query, wanted in zip(queries.tolist(), query_labels.tolist(), strict=True):
        neighbours = []
        for key, label in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            inner = sum(a * b for a, b in zip(query, key, strict=True))
            neighbours.append((inner / (math.hypot(*query) * math.hypot(*key)), label))
        votes: dict[int, float] = {}
        for similarity, label in sorted(neighbours, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        right += max(votes, key=votes.__getitem__) == wanted
    return 100 * right / len(queries)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 10.0), (500, 1.0)])
def test_knn_is_the_weighted_vote(k, temperature):
    bank, bank_labels = clusters(15, spread=6.0)
    queries, query_labels = clusters(20, spread=6.0, seed=1)
    found = knn_accuracy(bank, bank_labels, queries, query_labels, k=k, temperature=temperature)
    assert found == looped_knn(bank, bank_labels, queries, query_labels, k, temperature)
    assert 30 < found < 95


def test_knn_weights_the_vote():
    """One very near neighbour of the right class against two far ones: weights decide, a count would not."""
    bank, labels = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.5, -1.0]]), torch.tensor([0, 1, 1])
    query, wanted = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(bank, labels, query, wanted, k=3) == 100
    assert knn_accuracy(bank, labels, query, wanted, k=3, temperature=1e6) == 0


def test_knn_is_perfect_on_clusters_and_at_chance_on_shuffled_labels():
    bank, bank_labels = clusters(30)
    queries, query_labels = clusters(500, seed=1)  # more than one part of 1024
    assert knn_accuracy(bank, bank_labels, queries, query_labels) == 100
    assert knn_accuracy(7 * bank, bank_labels, 0.1 * queries, query_labels) == 100  # the cosine sees no scale
    shuffled = bank_labels[torch.randperm(len(bank_labels), generator=torch.Generator().manual_seed(0))]
    assert knn_accuracy(bank, shuffled, queries, query_labels) < 60
    assert knn_accuracy(bank, bank_labels, queries, (query_labels + 1) % 4) == 0


# --- linear probes


def test_linear_probe_is_perfect_where_classes_are_separable_and_not_elsewhere():
    train, test = clusters(20), clusters(20, seed=1)
    assert linear_probe_accuracy(*train, *test) == 100
    noise = normal(80, 8, seed=2)
    assert linear_probe_accuracy(noise, train[1], normal(80, 8, seed=3), test[1]) < 50


def test_linear_probe_counts_in_percent():
    train, (test, labels) = clusters(20), clusters(10, seed=1)
    wrong = labels.clone()
    wrong[:10] = (labels[:10] + 1) % 4
    assert linear_probe_accuracy(*train, test, wrong) == 75


def test_linear_probe_standardises_with_the_training_features():
    """The scale and offset of a channel do not matter, as long as both parts share them."""
    train, test = clusters(20, spread=4.0), clusters(20, spread=4.0, seed=1)
    scale, offset = torch.logspace(-3, 3, 8), torch.linspace(-5, 5, 8)
    expected = linear_probe_accuracy(*train, *test)
    assert 40 < expected < 100
    assert linear_probe_accuracy(train[0] * scale + offset, train[1], test[0] * scale + offset, test[1]) == expected


@pytest.fixture
def probed(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Training features and labels of every probe that is fitted; each scores its number."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
        calls.append((train, train_labels))
        return float(len(calls))

    monkeypatch.setattr(linear_probe, "linear_probe_accuracy", record)
    return calls


@pytest.mark.parametrize("shots", [1, 5])
def test_few_shot_probes_see_so_many_labels_of_each_class(probed, shots):
    train, labels = clusters(12)
    assert few_shot_accuracy(train, labels, train, labels, shots=shots, draws=4) == 2.5  # the mean of 1, 2, 3, 4
    assert len(probed) == 4
    for features, chosen in probed:
        assert torch.bincount(chosen).tolist() == [shots] * 4
        places = [(train == row).all(1).nonzero().item() for row in features]
        assert len(set(places)) == 4 * shots
        assert torch.equal(labels[places], chosen)


def test_few_shot_draws_are_the_same_for_every_model_and_differ_from_each_other(probed):
    places = torch.arange(48.0)[:, None]  # each feature says which row it is
    labels = torch.arange(4).repeat(12)
    for model in (places, 2 * places):
        few_shot_accuracy(model, labels, model, labels, draws=3)
    first, second = ([features.flatten().tolist() for features, _ in part] for part in (probed[:3], probed[3:]))
    assert second == [[2 * place for place in draw] for draw in first]
    assert len({tuple(draw) for draw in first}) == 3
    probed.clear()
    few_shot_accuracy(places, labels, places, labels, draws=3, seed=1)
    assert [features.flatten().tolist() for features, _ in probed] != first


def test_few_shot_takes_all_of_a_rare_class(probed):
    labels = torch.tensor([0] * 10 + [1] * 2)
    few_shot_accuracy(normal(12, 3), labels, normal(12, 3), labels, shots=5, draws=1)
    assert torch.bincount(probed[0][1]).tolist() == [5, 2]


def test_few_shot_lies_between_chance_and_the_full_probe():
    train, test = clusters(40, spread=4.0), clusters(40, spread=4.0, seed=1)
    few, full = few_shot_accuracy(*train, *test, draws=3), linear_probe_accuracy(*train, *test)
    assert 30 < few < full


# --- fidelity

GRID = (3, 4)


def staged(dim: int, seed: int, stages: int = 3) -> Features:
    """Random features with stages and no class token."""

    def one(number: int) -> Features:
        return Features(tokens=normal(2, 12, dim, seed=100 * seed + number).double(), grid=GRID)

    return replace(one(0), stages=tuple(one(number + 1) for number in range(stages)))


def test_agreement_is_1_at_equality():
    student = staged(5, 1)
    torch.testing.assert_close(activation_agreement(student, student), torch.ones(3, dtype=torch.float64))


def test_agreement_is_1_minus_half_of_the_loss_over_all_tokens():
    student, teacher = staged(5, 1), staged(7, 2)
    agreement = activation_agreement(student, teacher)
    assert agreement.shape == (3,)
    for stage in range(3):
        alone = (replace(features, stages=(features.stages[stage],)) for features in (student, teacher))
        torch.testing.assert_close(agreement[stage], 1 - activation_matching(*alone, None, tokens="all") / 2)
    torch.testing.assert_close(agreement.mean(), 1 - activation_matching(student, teacher, None, tokens="all") / 2)
    assert agreement.max() < 0.95


def test_agreement_reads_each_stage_by_itself():
    student, teacher = staged(5, 1), staged(5, 2)
    mixed = replace(student, stages=(teacher.stages[0], *student.stages[1:]))
    before, after = activation_agreement(student, teacher), activation_agreement(mixed, teacher)
    assert after[0] == pytest.approx(1)
    assert torch.equal(after[1:], before[1:])


def orthogonal(dim: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=seed).double()).Q.float()


def readout(student: Tensor, teacher: Tensor, *, tokens: int = 4, **values) -> float:
    """`readout_cosine` of rows, so many to an image."""
    return readout_cosine(student.unflatten(0, (-1, tokens)), teacher.unflatten(0, (-1, tokens)), **values)


def test_readout_finds_a_teacher_that_is_a_linear_map_of_the_student():
    teacher = normal(400, 8)
    student = teacher @ (orthogonal(8) * torch.linspace(0.5, 2, 8)) + 3.0
    assert readout(student, teacher, ridge=1e-6) > 0.9999
    assert readout(student, teacher) > 0.999
    narrow = readout(student[:, :4], teacher)
    assert 0.4 < narrow < 0.95  # half of the directions are missing


def test_readout_finds_nothing_in_independent_noise():
    assert abs(readout(normal(4000, 6), normal(4000, 8, seed=1))) < 0.05


def test_readout_is_judged_on_rows_that_were_not_fitted():
    """As many channels as fitted rows: the fit is perfect on its half and worth nothing on the other."""
    assert abs(readout(normal(200, 100), normal(200, 8, seed=1), ridge=1e-8)) < 0.2


@pytest.mark.parametrize(("images", "tokens"), [(4, 3), (5, 3), (3, 6), (2, 8), (1, 12), (1, 13)])
def test_readout_is_fitted_on_every_other_image(images, tokens):
    """There both agree; elsewhere one is the other's negative, and so large that a single row of it would turn the fit."""
    teacher = normal(images, tokens, 2)
    fitted = torch.zeros(images, tokens, 1, dtype=torch.bool)
    fitted[(slice(None), slice(None, None, 2)) if images == 1 else slice(None, None, 2)] = True
    teacher = torch.where(fitted, teacher, 1000 * teacher)
    centred = teacher - teacher[fitted.expand_as(teacher)].view(-1, 2).mean(0)
    student = torch.where(fitted, centred, -centred)
    assert readout_cosine(student, centred) == pytest.approx(-1, abs=1e-4)


def test_readout_sees_neither_scale_nor_rotation_nor_offset_of_the_student():
    teacher = normal(300, 8)
    student = teacher[:, :5] + normal(300, 5, seed=1)
    expected = readout(student, teacher)
    assert 0.2 < expected < 0.9
    for other in (1000 * student, 1e-3 * student, student @ orthogonal(5), -student, student + 10):
        assert readout(other, teacher) == pytest.approx(expected, abs=1e-4)
    assert readout(student, 5 * teacher @ orthogonal(8, seed=2)) == pytest.approx(expected, abs=1e-4)


def test_readout_is_not_fooled_by_a_shared_mean():
    """Noise around a large common offset has a plain cosine of nearly 1."""
    student, teacher = normal(4000, 6) + 50, normal(4000, 6, seed=1) + 50
    assert torch.cosine_similarity(student, teacher, dim=1).mean() > 0.99
    assert abs(readout(student, teacher)) < 0.05


def test_readout_survives_a_dead_student():
    assert readout(torch.zeros(100, 4), normal(100, 6)) == 0


# --- on models

SHAPE = {"num_classes": 0, "img_size": 32, "patch_size": 8, "depth": 2}


def make_vit(seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model("vit_tiny_patch16_224", embed_dim=48, num_heads=3, drop_path_rate=0.5, **SHAPE)


@pytest.fixture(scope="module")
def digits() -> CentreSet:
    return CentreSet(DigitsSource("test"), np.arange(10), (32, 32))


def test_collected_features_are_the_mean_final_patch_tokens_in_order(digits):
    model = make_vit().train()
    features, labels = collect_features(model, centre_loader(digits, batch_size=4), torch.device("cpu"))
    assert model.training  # as it was
    assert features.shape == (10, 48) and features.dtype == torch.float32 and not features.requires_grad
    assert labels.tolist() == digits.source.labels[:10].tolist()
    images = torch.stack([digits[number]["images"] for number in range(10)]).float() / 255
    with torch.no_grad():
        expected = extract_features(model.eval(), images).tokens.mean(1)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def make_task(seed: int, **values) -> Distillation:
    """Two stages; with seed 0 the student is its teacher."""
    return Distillation(make_vit(seed=seed), Teacher(make_vit(seed=0), (32, 32)), DistillationConfig(stages=2, **values))


UNMASKED = {"mask_ratio": 0.0, "masked_prediction_weight": 0.0}


@pytest.mark.parametrize("same", [True, False], ids=["the teacher itself", "another model"])
def test_a_student_that_is_its_teacher_agrees_and_another_does_not(digits, same):
    task = make_task(0 if same else 1, **UNMASKED, feature_regression_weight=2.0)
    values = task.evaluate(centre_loader(digits, batch_size=4), centre_loader(digits, batch_size=5), torch.device("cpu"))
    assert set(values) == {
        "loss", "activation_matching", "feature_regression", "agreement_stage1", "agreement_stage2", "final_cosine", "cka",
        "knn",
    }  # fmt: skip
    assert values["loss"] == pytest.approx(values["activation_matching"] + 2 * values["feature_regression"], rel=1e-5)
    assert (values["activation_matching"] < 1e-6) == same
    assert (values["agreement_stage1"] > 0.9999) == (values["agreement_stage2"] > 0.9999) == same
    assert (values["cka"] > 0.9999) == same
    assert task.training


def test_losses_are_taken_under_the_mask_and_agreement_on_whole_images(digits):
    masked = CentreSet(digits.source, digits.numbers, (32, 32), mask=MaskConfig(grid=(4, 4), ratio=0.75, masking="token"))
    task = make_task(1)
    values = task.evaluate(centre_loader(masked, batch_size=10), None, torch.device("cpu"))
    assert {"activation_matching", "masked_prediction", "masked_cosine", "final_cosine"} <= set(values)
    batch = to_device(next(iter(centre_loader(masked, batch_size=10))), torch.device("cpu"))
    task.eval()
    with torch.no_grad():
        assert values["loss"] == pytest.approx(task(batch).loss.item(), rel=1e-5)
        whole = extract_features(task.student, batch["images"], stages=2)
        agreement = activation_agreement(whole, task.teacher.features(batch["images"], stages=2))
    assert [values["agreement_stage1"], values["agreement_stage2"]] == pytest.approx(agreement.tolist(), rel=1e-5)


def test_evaluation_weights_every_image_alike(digits):
    """Batches of 4, 4 and 2 say the same as one of 10."""
    task = make_task(1, **UNMASKED)
    parts, whole = (task.evaluate(centre_loader(digits, batch_size=n), None, torch.device("cpu")) for n in (4, 10))
    assert parts.keys() == whole.keys() and "knn" not in whole
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-4)


def test_processes_share_the_pictures_without_overlap(monkeypatch):
    """An odd number of them over three processes; in a single process all."""
    numbers = np.array([7, 3, 9, 1, 4, 8, 2])
    assert own_share(numbers).tolist() == numbers.tolist()
    counts = torch.tensor([3, 4])
    assert torch.equal(sum_over_processes(counts, torch.device("cpu")), counts)
    shares = []
    for rank in range(3):
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
        shares.append(own_share(numbers).tolist())
    assert shares == [[7, 1, 2], [3, 4], [9, 8]]
