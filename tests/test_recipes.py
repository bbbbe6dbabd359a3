"""Recipes against the paper's table 8 retyped by hand, and how flags override them."""

import dataclasses
import math

import pytest

from vit_linearizer.commands.distill import DistillConfig, resolve_recipe
from vit_linearizer.contracts import UserError
from vit_linearizer.recipes import RECIPES, find_recipe
from vit_linearizer.training.config import OptimisationConfig, RuntimeConfig

STUDENT = "adventurer_base_patch16_224"

#: ViT-Linearizer (arXiv 2504.00037), table 8, "Configurations of the distillation stage": Small/Base and Large.
TABLE_8 = {
    "learning_rate": (1.5e-3, 1.5e-3),
    "minimum_learning_rate": (1e-5, 1e-5),
    "weight_decay": (0.05, 0.05),
    "epochs": (300, 300),
    "betas": ((0.9, 0.999), (0.9, 0.999)),
    "batch_size": (2048, 2048),
    "warmup_epochs": (10, 20),
    "drop_path": (0.1, 0.2),
    "layer_decay": (None, None),
    "augmentation": ("three", "three"),
}
#: Sections 3.2, 3.3 and 4.1, and the ablations of table 6: what the paper's own runs use.
TEXT = {
    "stages": 4,
    "mask_ratio": 0.75,
    "masking": "token",
    "activation_matching_weight": 1.0,
    "activation_matching_tokens": "visible",
    "masked_prediction_weight": 1.0,
    "feature_regression_weight": 0.0,
}
#: Where the paper is silent.
CHOICES = {
    "clip_norm": None,
    "repeats": 3,
    "smallest_crop": 0.08,
    "horizontal_flip": 0.5,
    "masked_prediction_target": "layer_norm",
    "feature_regression_target": "layer_norm",
    "scales_learning_rate": True,
}


@pytest.mark.parametrize(
    ("size", "column"), [("tiny", 0), ("small", 0), ("base", 0), ("large", 1)]
)  # table 8 has no tiny student: it takes the Small/Base column
@pytest.mark.parametrize("patch", [16, 14, 8])
def test_linearizer_is_table_8(size, column, patch):
    recipe = find_recipe("linearizer", f"adventurer_{size}_patch{patch}_224")
    assert recipe.flat() == {name: columns[column] for name, columns in TABLE_8.items()} | TEXT | CHOICES


def test_the_default_recipe_of_distill_is_the_papers():
    config = DistillConfig(teacher="t", student="adventurer_large_patch16_224", data="d", out="o")
    assert resolve_recipe(config, "adventurer_large_patch16_224") == find_recipe(
        "linearizer", "adventurer_large_patch16_224"
    )


def test_regression_differs_in_its_objectives_alone():
    baseline, paper = (find_recipe(name, STUDENT) for name in ("regression", "linearizer"))
    assert dataclasses.replace(baseline, objectives=paper.objectives) == paper
    weights = {name: value for name, value in baseline.flat().items() if name.endswith("_weight")}
    assert weights == {
        "activation_matching_weight": 0.0,
        "masked_prediction_weight": 0.0,
        "feature_regression_weight": 1.0,
    }
    assert baseline.objectives.mask_ratio == 0.0


@pytest.mark.parametrize("name", ["digits", "smoke"])
def test_small_recipes_have_the_papers_objectives_and_learning_rates_of_their_own(name):
    recipe = find_recipe(name, STUDENT)
    hidden = {"digits": 0.5, "smoke": 0.75}[name]
    expected = dataclasses.replace(find_recipe("linearizer", STUDENT).objectives, mask_ratio=hidden)
    assert recipe.objectives == expected
    assert not recipe.scales_learning_rate


@pytest.mark.parametrize("name", RECIPES)
def test_flat_names_every_value_once(name):
    recipe = find_recipe(name, STUDENT)
    parts = [recipe.optimisation, recipe.views, recipe.objectives]
    names = [field.name for part in parts for field in dataclasses.fields(part)] + ["drop_path", "scales_learning_rate"]
    assert len(names) == len(set(names))
    assert set(recipe.flat()) == set(names)


# --- overriding

#: Another valid value for every value of the paper's recipe.
OTHER = {
    "epochs": 7,
    "batch_size": 512,
    "learning_rate": 3e-4,
    "minimum_learning_rate": 1e-7,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
    "warmup_epochs": 1.5,
    "layer_decay": 0.75,
    "clip_norm": 1.0,
    "augmentation": "crop",
    "smallest_crop": 0.5,
    "horizontal_flip": 0.0,
    "repeats": 1,
    "stages": 2,
    "mask_ratio": 0.5,
    "masking": "block",
    "activation_matching_weight": 0.5,
    "activation_matching_tokens": "all",
    "masked_prediction_weight": 0.2,
    "masked_prediction_target": "none",
    "feature_regression_weight": 1.0,
    "feature_regression_target": "none",
    "drop_path": 0.3,
    "scales_learning_rate": False,
}


def test_every_value_has_another_one_here():
    assert set(OTHER) == set(find_recipe("linearizer", STUDENT).flat())


@pytest.mark.parametrize("name", OTHER)
def test_each_value_is_overridden_by_its_name(name):
    recipe = find_recipe("linearizer", STUDENT)
    before = recipe.flat()
    assert before[name] != OTHER[name]
    expected = before | {name: OTHER[name]}
    if name == "batch_size":  # see the rule below
        expected |= {rate: before[rate] / 2 for rate in ("learning_rate", "minimum_learning_rate")}
    assert recipe.override(**{name: OTHER[name]}).flat() == expected
    assert recipe.flat() == before


def test_all_values_are_overridden_together():
    assert find_recipe("linearizer", STUDENT).override(**OTHER).flat() == OTHER


def test_none_leaves_a_value_as_it_is():
    recipe = find_recipe("linearizer", STUDENT)
    assert recipe.override(**dict.fromkeys(recipe.flat())) == recipe
    assert recipe.override(epochs=3, batch_size=None, learning_rate=None).flat() == recipe.flat() | {"epochs": 3}


def test_zero_is_a_value():
    recipe = find_recipe("linearizer", STUDENT).override(drop_path=0.0, horizontal_flip=0.0, warmup_epochs=0)
    assert (recipe.drop_path, recipe.views.horizontal_flip, recipe.optimisation.warmup_epochs) == (0.0, 0.0, 0)


def test_an_unknown_value_is_a_programming_error():
    with pytest.raises(TypeError, match=r"no such value in a recipe: learning_rat, stage$"):
        find_recipe("linearizer", STUDENT).override(learning_rat=1.0, epochs=2, stage=3)


def test_values_that_depend_on_each_other_are_overridden_at_once():
    """Neither order of the two alone would be valid on the way."""
    recipe = find_recipe("regression", STUDENT)
    back = recipe.override(mask_ratio=0.5, masked_prediction_weight=1.0, feature_regression_weight=0.0)
    assert back.objectives.mask_ratio == 0.5
    again = back.override(mask_ratio=0.0, masked_prediction_weight=0.0, feature_regression_weight=1.0)
    assert again == recipe


@pytest.mark.parametrize("batch_size", [128, 2048, 4096])
@pytest.mark.parametrize("name", ["linearizer", "regression"])
def test_learning_rates_follow_the_square_root_of_the_batch(name, batch_size):
    recipe = find_recipe(name, STUDENT).override(batch_size=batch_size)
    assert recipe.optimisation.batch_size == batch_size
    assert recipe.optimisation.learning_rate == pytest.approx(1.5e-3 * math.sqrt(batch_size / 2048))
    assert recipe.optimisation.minimum_learning_rate == pytest.approx(1e-5 * math.sqrt(batch_size / 2048))


def test_scaling_in_two_steps_is_scaling_once():
    recipe = find_recipe("linearizer", STUDENT)
    twice = recipe.at_batch_size(500).at_batch_size(128).optimisation
    assert twice.learning_rate == pytest.approx(recipe.at_batch_size(128).optimisation.learning_rate)


def test_a_given_learning_rate_is_not_scaled():
    recipe = find_recipe("linearizer", STUDENT)
    both = recipe.override(batch_size=128, learning_rate=4e-4).optimisation
    assert (both.batch_size, both.learning_rate, both.minimum_learning_rate) == (128, 4e-4, 1e-5)
    lowest = recipe.override(batch_size=128, minimum_learning_rate=1e-6).optimisation
    assert lowest.minimum_learning_rate == 1e-6
    assert lowest.learning_rate == pytest.approx(1.5e-3 / 4)


@pytest.mark.parametrize("name", ["digits", "smoke"])
def test_small_recipes_do_not_scale_their_learning_rates(name):
    recipe = find_recipe(name, STUDENT)
    smaller = recipe.override(batch_size=2)
    expected = dataclasses.replace(recipe.optimisation, batch_size=2)
    assert smaller == dataclasses.replace(recipe, optimisation=expected)


# --- the command's flags

#: Flags that say which run it is; all others are a recipe's values or the machine's (`RuntimeConfig`).
OF_THE_RUN = {
    "teacher", "student", "data", "out", "recipe", "teacher_arch", "teacher_pretrained", "student_arch", "student_args",
    "image_size", "teacher_image_size", "dry_run", "debug",
}  # fmt: skip
#: Values of a recipe without a flag, and why.
WITHOUT_FLAG = {
    "betas": "AdamW's in both of the paper's tables; nothing was ever tuned about them",
    "layer_decay": "for fine-tuning; table 8 says none",
    "scales_learning_rate": "a property of the recipe; --learning-rate says it all",
}


def test_every_flag_reaches_the_recipe_and_every_value_has_a_flag():
    fields = {field.name for field in dataclasses.fields(DistillConfig)}
    runtime = {field.name for field in dataclasses.fields(RuntimeConfig)}
    assert fields >= OF_THE_RUN
    assert OF_THE_RUN.isdisjoint(runtime)
    values = set(find_recipe("linearizer", STUDENT).flat())
    assert values >= set(WITHOUT_FLAG)
    assert fields - runtime - OF_THE_RUN == values - set(WITHOUT_FLAG)
    assert runtime.isdisjoint(values)


@pytest.mark.parametrize("name", sorted(set(OTHER) - set(WITHOUT_FLAG)))
def test_each_flag_changes_its_value_and_is_unset_by_default(name):
    base = {"teacher": "t", "student": STUDENT, "data": "d", "out": "o"}
    assert getattr(DistillConfig(**base), name) is None
    assert resolve_recipe(DistillConfig(**base, **{name: OTHER[name]}), STUDENT).flat()[name] == OTHER[name]


@pytest.mark.parametrize("asked", [None, 512])
def test_too_few_images_scale_the_learning_rates_that_were_not_given(asked):
    base = {"teacher": "t", "student": STUDENT, "data": "d", "out": "o", "batch_size": asked}
    scaled = resolve_recipe(DistillConfig(**base), STUDENT, 32).optimisation
    assert scaled == find_recipe("linearizer", STUDENT).at_batch_size(32).optimisation
    lowest = resolve_recipe(DistillConfig(**base, minimum_learning_rate=1e-6), STUDENT, 32).optimisation
    assert (lowest.minimum_learning_rate, lowest.learning_rate) == (1e-6, scaled.learning_rate)
    given = resolve_recipe(DistillConfig(**base, learning_rate=4e-4), STUDENT, 32).optimisation
    assert (given.batch_size, given.learning_rate, given.minimum_learning_rate) == (32, 4e-4, 1e-5)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("linearize", r"^--recipe linearize: unknown recipe; there are linearizer, .*; did you mean linearizer\?"),
        ("digit", r"^--recipe digit: .*; did you mean digits\?"),
        ("xyz", r"^--recipe xyz: unknown recipe; there are [\w, ]+$"),
    ],
)
def test_an_unknown_recipe_is_refused_with_a_hint(name, message):
    with pytest.raises(UserError, match=message):
        find_recipe(name, STUDENT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, r"^--epochs 0: must be above 0"),
        ({"epochs": -1}, r"^--epochs -1: must be above 0"),
        ({"batch_size": 0}, r"^--batch-size 0: must be above 0"),
        ({"batch_size": -8}, r"^--batch-size -8: must be above 0"),
        ({"batch_size": 0, "learning_rate": 1.0}, r"^--batch-size 0: must be above 0"),
        ({"learning_rate": 0.0}, r"^--learning-rate 0\.0: must be above 0"),
        ({"learning_rate": math.inf}, r"^--learning-rate inf: must be above 0"),
        ({"learning_rate": math.nan}, r"^--learning-rate nan: must be above 0"),
        ({"minimum_learning_rate": -1e-6}, r"^--minimum-learning-rate -1e-06: must be 0 or more"),
        ({"weight_decay": -0.1}, r"^--weight-decay -0\.1: must be 0 or more"),
        ({"warmup_epochs": -1}, r"^--warmup-epochs -1: must be 0 or more"),
        ({"mask_ratio": 1.0}, r"^--mask-ratio 1\.0: "),
        ({"mask_ratio": 0.0}, r"^--mask-ratio 0\.0: .*--masked-prediction-weight 0"),
        ({"smallest_crop": 0.0}, r"^--smallest-crop 0\.0: "),
        ({"repeats": 0}, r"^--repeats 0: "),
    ],
    ids=str,
)
def test_a_value_that_cannot_work_is_refused_with_its_flag(values, message):
    with pytest.raises(UserError, match=message):
        find_recipe("linearizer", STUDENT).override(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, r"^--seed -1: must be at least 0"),
        ({"gradient_accumulation": 0}, r"^--gradient-accumulation 0: must be at least 1"),
        ({"evaluate_every": 0}, r"^--evaluate-every 0: must be at least 1"),
        ({"log_every": 0}, r"^--log-every 0: must be at least 1"),
        ({"num_workers": -1}, r"^--num-workers -1: must be 0 or more"),
    ],
    ids=str,
)
def test_a_runtime_that_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        RuntimeConfig(**values)


def test_configurations_cannot_be_changed_in_place():
    recipe = find_recipe("linearizer", STUDENT)
    for part, field in ((recipe, "drop_path"), (recipe.optimisation, "epochs"), (recipe.objectives, "stages")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, 1)
    with pytest.raises(TypeError, match="positional"):
        OptimisationConfig(1, 2, 3, 4)
