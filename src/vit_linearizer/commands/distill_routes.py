"""The two ways from a teacher to a student: an architecture of its own, or the teacher itself with linear attention.

A route knows sizes, stages and models; everything else about a distillation (`distill`) is the same for both.
"""

import dataclasses
import logging
import math
from typing import Any, Protocol

import timm
import torch

from ..contracts import UserError
from ..models.adapters import check_plain, nominal_size, patch_grid
from ..models.linear_vit import linearize
from ..models.loading import create_backbone, open_model, probe_backbone
from ..models.teacher import Teacher, agreeing_size, load_teacher
from ..recipes import ADAPTATION, DISTILLATION, AttentionRecipe, DistillationRecipe, find_recipe
from ..tasks import AttentionAlignment, Distillation, Task
from .arguments import parse_model_args, parse_size
from .distill_flags import DistillConfig
from .resolution import apply_flags, architecture_name, fit_to_images

logger = logging.getLogger("vit_linearizer")

StageRecipe = AttentionRecipe | DistillationRecipe

#: Flags of one route that say nothing on the other.
_STUDENT_FLAGS = ("student", "student_arch", "student_args")
_ADAPTATION_FLAGS = (
    "feature_map",
    "keep_softmax_blocks",
    "attention_epochs",
    "feature_epochs",
    "attention_learning_rate",
    "feature_learning_rate",
)


class Route(Protocol):
    """What `distill` asks of a route.

    Attributes:
        image_size: (height, width) of what the student sees.
        teacher_size: of what the teacher sees.
        grid: patches (down, across) of both.
        student_name: what the user should read.
        settings: what ``config.json`` says of the route alone.
    """

    image_size: tuple[int, int]
    teacher_size: tuple[int, int]
    grid: tuple[int, int]
    student_name: str
    settings: dict[str, Any]

    def recipes(self, images: int, parts: int) -> dict[str, StageRecipe]:
        """A recipe for each stage, by its name, for so many images and ``parts`` of a batch; flags are in."""
        ...

    def described(self, recipes: dict[str, StageRecipe]) -> dict[str, Any]:
        """The recipes as ``config.json`` shows them."""
        ...

    def tasks(self, recipes: dict[str, StageRecipe]) -> dict[str, Task]:
        """Teacher and student with their weights, in the task of each stage."""
        ...


def choose_route(config: DistillConfig) -> Route:
    """The route that a configuration asks for.

    Raises:
        UserError: unknown or unfit models, flags of the other route, or values that cannot be.
    """
    find_recipe({**DISTILLATION, **ADAPTATION}, config.recipe, "")  # refuses an unknown name before all else
    return AdaptationRoute(config) if config.recipe in ADAPTATION else StudentRoute(config)


class StudentRoute:
    """To an architecture of its own, in one stage."""

    def __init__(self, config: DistillConfig):
        _refuse(config, _ADAPTATION_FLAGS, f"belongs to --recipe {next(iter(ADAPTATION))}; leave it out")
        if config.student is None:
            remedy = "say what to distil into, e.g. adventurer_base_patch16_224 (--recipe adala needs none)"
            raise UserError("--student", None, remedy)
        self.config = config
        self.student_name = config.student
        self._args = parse_model_args("--student-args", config.student_args)
        self._named: dict[str, Any] = {"field": "--student", "architecture": config.student_arch}
        probe: Any = probe_backbone(config.student, **self._named, **self._args)
        check_plain(probe, config.student, field="--student")
        self._table = find_recipe(DISTILLATION, config.recipe, architecture_name(probe))
        apply_flags(self._table, config)  # refuses what cannot be, before anything is read
        self.image_size = parse_size("--image-size", config.image_size) or nominal_size(probe)
        self.grid = patch_grid(probe, self.image_size)
        self.teacher_size = agreeing_size(
            config.teacher,
            student_grid=self.grid,
            architecture=config.teacher_arch,
            image_size=parse_size("--teacher-image-size", config.teacher_image_size),
        )
        self.settings = {
            "student": config.student,
            "student_arch": config.student_arch,
            "student_args": list(config.student_args),
        }

    def recipes(self, images: int, parts: int) -> dict[str, StageRecipe]:
        return {"distillation": fit_to_images(self._table, self.config, images=images, parts=parts)}

    def described(self, recipes: dict[str, StageRecipe]) -> dict[str, Any]:
        return recipes["distillation"].recorded()

    def tasks(self, recipes: dict[str, StageRecipe]) -> dict[str, Task]:
        config, recipe = self.config, recipes["distillation"]
        assert isinstance(recipe, DistillationRecipe) and config.student is not None
        torch.manual_seed(config.seed)  # of a teacher with random weights
        teacher = load_teacher(
            config.teacher,
            image_size=self.teacher_size,
            architecture=config.teacher_arch,
            pretrained=config.teacher_pretrained,
        )
        torch.manual_seed(config.seed)
        student_args = self._args | {"img_size": self.image_size, "drop_path_rate": recipe.drop_path}
        if timm.is_model(config.student):  # what nothing trains, the class token, is not what the student should answer with
            student_args.setdefault("global_pool", "avg")
        from_hub = config.student.startswith("hf-hub:")
        student: Any = create_backbone(config.student, **self._named, pretrained=from_hub, **student_args)
        student._model_args.pop("drop_path_rate", None)  # a matter of this training, not of the model
        return {"distillation": Distillation(student, teacher, recipe.objectives)}


class AdaptationRoute:
    """To the teacher itself with linear attention, in two stages or one of them."""

    def __init__(self, config: DistillConfig):
        remedy = f"with --recipe {config.recipe} the student is the teacher with linear attention; leave it out"
        _refuse(config, _STUDENT_FLAGS, remedy)
        self.config = config
        self.student_name = f"linear attention in {config.teacher}"
        probe: Any = probe_backbone(config.teacher, field="--teacher", architecture=config.teacher_arch)
        check_plain(probe, config.teacher, field="--teacher")
        table = find_recipe(ADAPTATION, config.recipe, architecture_name(probe))
        given = {name: getattr(config, name) for name in ("feature_map", "keep_softmax_blocks")}
        table = dataclasses.replace(table, **{name: value for name, value in given.items() if value is not None})
        for flag in ("attention_epochs", "feature_epochs", "keep_softmax_blocks"):
            if (getattr(config, flag) or 0) < 0:
                raise UserError(f"--{flag.replace('_', '-')}", getattr(config, flag), "must be 0 or more")
        for flag in ("attention_learning_rate", "feature_learning_rate"):
            if not (getattr(config, flag) is None or 0 < getattr(config, flag) < math.inf):
                raise UserError(f"--{flag.replace('_', '-')}", getattr(config, flag), "must be above 0")
        if table.keep_softmax_blocks >= len(probe.feature_info):
            remedy = f"leaves none of the teacher's {len(probe.feature_info)} blocks to make linear; keep fewer"
            raise UserError("--keep-softmax-blocks", table.keep_softmax_blocks, remedy)
        self._stages: dict[str, tuple[StageRecipe, DistillConfig]] = {}
        for name, recipe, epochs, learning_rate in (
            ("attention alignment", table.attention, config.attention_epochs, config.attention_learning_rate),
            ("feature alignment", table.feature, config.feature_epochs, config.feature_learning_rate),
        ):
            if epochs == 0:
                continue  # leaves the stage out
            own = dataclasses.replace(
                config,
                epochs=config.epochs if epochs is None else epochs,
                learning_rate=config.learning_rate if learning_rate is None else learning_rate,
            )
            apply_flags(recipe, own)  # as in the other route
            self._stages[name] = recipe, own
        if not self._stages:
            raise UserError("--attention-epochs and --feature-epochs", 0, "leave nothing to do; give one of them")
        self._linear: dict[str, Any] = {
            "feature_map": table.feature_map,
            "keep_softmax_blocks": table.keep_softmax_blocks,
        }
        linearize(probe, **self._linear)  # refuses what cannot be
        self.image_size = parse_size("--image-size", config.image_size) or nominal_size(probe)
        self.grid = patch_grid(probe, self.image_size)
        self.teacher_size = agreeing_size(
            config.teacher,
            student_grid=self.grid,
            architecture=config.teacher_arch,
            image_size=parse_size("--teacher-image-size", config.teacher_image_size),
        )
        self.settings = dict(self._linear)

    def recipes(self, images: int, parts: int) -> dict[str, StageRecipe]:
        return {name: fit_to_images(recipe, own, images=images, parts=parts) for name, (recipe, own) in self._stages.items()}

    def described(self, recipes: dict[str, StageRecipe]) -> dict[str, Any]:
        return {name.replace(" ", "_"): recipe.recorded() for name, recipe in recipes.items()}

    def tasks(self, recipes: dict[str, StageRecipe]) -> dict[str, Task]:
        config = self.config
        drop_path = max(recipe.drop_path for recipe in recipes.values())
        torch.manual_seed(config.seed)  # of random weights
        model: Any = open_model(
            config.teacher,
            field="--teacher",
            architecture=config.teacher_arch,
            pretrained=config.teacher_pretrained,
            img_size=self.image_size,
            **({"drop_path_rate": drop_path} if drop_path else {}),
        )
        student: Any = linearize(model, **self._linear)  # with the teacher's classifier, which reads its features as well
        student._model_args.pop("drop_path_rate", None)  # a matter of this training, not of the model
        if hasattr(model, "head_dist"):
            logger.warning("the teacher's second head reads a distillation token, which nothing aligns: expect less of it")
        model.reset_classifier(0)
        teacher = Teacher(model, self.image_size)
        tasks: dict[str, Task] = {}
        for name, recipe in recipes.items():
            if isinstance(recipe, AttentionRecipe):
                tasks[name] = AttentionAlignment(student, teacher, stages=recipe.stages)
            else:
                tasks[name] = Distillation(student, teacher, recipe.objectives)
        return tasks


def _refuse(config: DistillConfig, names: tuple[str, ...], remedy: str) -> None:
    """Flags that were given although they say nothing here."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value != ():
            shown = " ".join(value) if isinstance(value, tuple) else value
            raise UserError(f"--{name.replace('_', '-')}", shown, remedy)
