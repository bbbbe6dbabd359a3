"""A recipe: the values that a paper's table gives for one stage of training, in three parts."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from ..data.segmentation import SegmentationViewConfig
from ..data.views import ViewConfig
from ..ops.linear_attention import FeatureMap
from ..tasks import ClassificationConfig, DistillationConfig, SegmentationConfig
from ..training.config import OptimisationConfig

#: Values that came later than some runs: off, they are not recorded, so that a run begun before can be gone on with.
_ABSENT_WHEN_OFF = ("device_augmentation",)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a training that is not models, data or machine; a kind of training adds its own parts.

    Attributes:
        optimisation: schedule and optimiser.
        drop_path: of the trained model's last block.
        scales_learning_rate: whether learning rates follow the square root of the batch size over the recipe's.
    """

    optimisation: OptimisationConfig
    drop_path: float
    scales_learning_rate: bool = True

    def override(self, **values: Any) -> Self:
        """A copy with other values, each found by its name in whichever part has it; None leaves a value as it is.

        A batch size without a learning rate scales the learning rates when the recipe says so.
        """
        given = {name: value for name, value in values.items() if value is not None}
        recipe = self
        if "batch_size" in given and "learning_rate" not in given:
            recipe = recipe.at_batch_size(given.pop("batch_size"))
        if "learning_rate" in given:
            given.setdefault("minimum_learning_rate", min(self.optimisation.minimum_learning_rate, given["learning_rate"]))
        parts: dict[str, Any] = {}
        for field in dataclasses.fields(recipe):
            part = getattr(recipe, field.name)
            if field.name in given:
                parts[field.name] = given.pop(field.name)
            elif dataclasses.is_dataclass(part) and not isinstance(part, type):
                mine = {f.name: given.pop(f.name) for f in dataclasses.fields(part) if f.name in given}
                parts[field.name] = dataclasses.replace(part, **mine)
        if given:
            raise TypeError(f"no such value in a recipe: {', '.join(given)}")
        return dataclasses.replace(recipe, **parts)

    def at_batch_size(self, batch_size: int) -> Self:
        """The same recipe at another batch size, its learning rates scaled by the square root (timm's rule for Adam)."""
        old = self.optimisation
        factor = (batch_size / old.batch_size) ** 0.5 if self.scales_learning_rate and batch_size > 0 else 1.0
        optimisation = dataclasses.replace(
            old,
            batch_size=batch_size,
            learning_rate=old.learning_rate * factor,
            minimum_learning_rate=old.minimum_learning_rate * factor,
        )
        return dataclasses.replace(self, optimisation=optimisation)

    def flat(self) -> dict[str, Any]:
        """All values by name."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            part = getattr(self, field.name)
            is_part = dataclasses.is_dataclass(part) and not isinstance(part, type)
            values.update(dataclasses.asdict(part) if is_part else {field.name: part})
        return values

    def recorded(self) -> dict[str, Any]:
        """All values by name, as ``config.json`` shows them; `_ABSENT_WHEN_OFF` only where they are on."""
        return {name: value for name, value in self.flat().items() if value or name not in _ABSENT_WHEN_OFF}


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe(Recipe):
    """A distillation.

    Attributes:
        views: what of a picture is shown.
        objectives: what the student is trained towards.
    """

    views: ViewConfig
    objectives: DistillationConfig


@dataclass(frozen=True, kw_only=True)
class AttentionRecipe(Recipe):
    """An alignment of linear attention to softmax attention, block by block.

    Attributes:
        views: what of a picture is shown.
        stages: number of stages whose agreement is measured.
    """

    views: ViewConfig
    stages: int = 4


@dataclass(frozen=True, kw_only=True)
class AdaptationRecipe:
    """A teacher turned into its own linear ViT: two stages, on the same views in batches of the same size.

    Attributes:
        attention: the first.
        feature: the second.
        feature_map: of the linear attention.
        keep_softmax_blocks: so many last blocks keep softmax attention.
    """

    attention: AttentionRecipe
    feature: DistillationRecipe
    feature_map: FeatureMap = "elu"
    keep_softmax_blocks: int = 0


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(Recipe):
    """A supervised training for classification.

    Attributes:
        views: what of a picture is shown.
        objectives: the loss.
    """

    views: ViewConfig
    objectives: ClassificationConfig


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(Recipe):
    """A supervised training for semantic segmentation.

    Attributes:
        views: what of a picture and its mask is shown.
        objectives: the head, its loss, and how pictures are judged.
    """

    views: SegmentationViewConfig
    objectives: SegmentationConfig
