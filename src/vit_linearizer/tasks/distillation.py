"""The step of every distillation of features: the frozen teacher sees the image, the student sees it masked or whole, the
objectives compare.

Sources: ViT-Linearizer (arXiv 2504.00037, figure 2 and section 3.3): L = L_act + lambda L_mask; ViT-AdaLA (arXiv
2603.16063), stage 2: feature alignment alone, on whole images. The mask token and the projections live here, not in the
student, so the exported backbone has no parameter it does not use.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor
from torch.utils.data import DataLoader

from ..contracts import Features, LossOutput, UserError
from ..data.datasets import to_device
from ..evaluation import StudentMeter
from ..models.adapters import behind_features, extract_features, stage_ends
from ..models.teacher import Teacher
from ..objectives import (
    FeatureRegression,
    MaskedPrediction,
    Masking,
    MatchedTokens,
    Target,
    activation_matching,
    feature_alignment,
)
from .base import Task, compile_each_block, train_only


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What the student is trained towards.

    Attributes:
        stages: number K of stages whose activation maps are matched.
        mask_ratio: share of patches that the student does not see.
        masking: how masks are drawn.
        activation_matching_weight: factor on eq. 5; 0 leaves it out.
        activation_matching_tokens: which tokens enter the maps.
        masked_prediction_weight: factor lambda on eq. 6; 0 leaves it out.
        masked_prediction_target: what of the teacher is predicted.
        feature_regression_weight: factor on the plain regression of the final tokens; 0 leaves it out.
        feature_regression_target: what of the teacher is regressed.
        feature_alignment_weight: factor on the error of the final features as they are, at every position, hidden or
            not; 0 leaves it out. Needs a student of the teacher's width.
    """

    stages: int = 4
    mask_ratio: float = 0.75
    masking: Masking = "token"
    activation_matching_weight: float = 1.0
    activation_matching_tokens: MatchedTokens = "visible"
    masked_prediction_weight: float = 1.0
    masked_prediction_target: Target = "layer_norm"
    feature_regression_weight: float = 0.0
    feature_regression_target: Target = "layer_norm"
    feature_alignment_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise UserError("--mask-ratio", self.mask_ratio, "must be in [0, 1); the paper's is 0.75")
        weights = {
            "--activation-matching-weight": self.activation_matching_weight,
            "--masked-prediction-weight": self.masked_prediction_weight,
            "--feature-regression-weight": self.feature_regression_weight,
            "--feature-alignment-weight": self.feature_alignment_weight,
        }
        for name, weight in weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise UserError(name, weight, "must be 0 or more, and finite")
        if not any(weights.values()):
            remedy = f"at least one of {', '.join(weights)} must be above 0"
            raise UserError("objective weights", " ".join("0" for _ in weights), remedy)
        if self.mask_ratio == 0 and self.masked_prediction_weight > 0:
            remedy = "masked prediction has nothing to predict; mask some patches, or set --masked-prediction-weight 0"
            raise UserError("--mask-ratio", self.mask_ratio, remedy)
        if self.stages < 1:
            raise UserError("--stages", self.stages, "must be at least 1")


class Distillation(Task):
    """Student, mask token and projections; the teacher stands beside them and is no part of the module.

    Args:
        student: a plain timm backbone.
        teacher: on the same patch grid.
        config: objectives and masks.

    Raises:
        UserError: more stages than blocks, the class token's row is asked for and the teacher has none, or features of
            different widths are to be aligned.
    """

    def __init__(self, student: nn.Module, teacher: Teacher, config: DistillationConfig):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.config = config
        for backbone in (student, teacher.model):
            stage_ends(len(backbone.feature_info), config.stages)  # type: ignore[arg-type]  # refuses too many stages
        dim = int(student.num_features)  # type: ignore[arg-type]
        self.mask_token: nn.Parameter | None = None
        if config.mask_ratio > 0:
            self.mask_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.masked_prediction: MaskedPrediction | None = None
        if config.masked_prediction_weight > 0:
            self.masked_prediction = MaskedPrediction(dim, teacher.dim, target=config.masked_prediction_target)
        self.feature_regression: FeatureRegression | None = None
        if config.feature_regression_weight > 0:
            self.feature_regression = FeatureRegression(dim, teacher.dim, target=config.feature_regression_target)
        if config.feature_alignment_weight > 0 and dim != teacher.dim:
            remedy = f"the student is {dim} wide, the teacher {teacher.dim}; use --feature-regression-weight, which projects"
            raise UserError("--feature-alignment-weight", config.feature_alignment_weight, remedy)
        needs_class_token = config.activation_matching_weight > 0 and config.activation_matching_tokens == "class"
        if needs_class_token and any(getattr(model, "cls_token", None) is None for model in (student, teacher.model)):
            remedy = "the teacher or the student has no class token; use visible or all"
            raise UserError("--activation-matching-tokens", "class", remedy)
        if config.mask_ratio > 0 and teacher.grid == (1, 1):
            raise UserError(
                "--mask-ratio", config.mask_ratio, "an image of one patch has none to spare; use a larger --image-size"
            )
        behind = {id(parameter) for module in behind_features(student) for parameter in module.parameters()}
        self._trained = [p for p in self.parameters() if p.requires_grad and id(p) not in behind]
        # Activation maps are taken before the final norm.
        reads_final = (config.masked_prediction_weight, config.feature_regression_weight, config.feature_alignment_weight)
        self.uses_every_parameter = any(reads_final)

    @property
    def backbone(self) -> nn.Module:
        return self.student

    def begin(self, device: torch.device) -> None:
        self.teacher.to(device)
        train_only(self, self._trained)
        for module in self.student.modules():  # what timm does to rotary positions in training, the teacher cannot know
            if hasattr(module, "aug_active"):
                setattr(module, "aug_active", False)  # noqa: B010  # no tensor, so no module's own attribute

    def compile_blocks(self) -> None:
        compile_each_block(self.student)
        compile_each_block(self.teacher.model)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"} | super().no_weight_decay()

    def forward(self, batch: dict[str, Tensor]) -> LossOutput:
        """Loss of images ``[B, 3, H, W]`` in [0, 1] under masks ``[B, N]`` (True where the student sees the mask token)."""
        stages = self.config.stages if self.config.activation_matching_weight > 0 else 1  # the rest reads final features
        teacher = self.teacher.features(batch["images"], stages=stages)
        return self._losses(self._student(batch, stages), teacher, batch.get("mask"))

    def _student(self, batch: dict[str, Tensor], stages: int) -> Features:
        mask = batch.get("mask")
        return extract_features(self.student, batch["images"], stages=stages, mask=mask, mask_token=self.mask_token)

    def _losses(self, student: Features, teacher: Features, mask: Tensor | None) -> LossOutput:
        config = self.config
        weighted = {}
        if config.activation_matching_weight > 0:
            term = activation_matching(student, teacher, mask, tokens=config.activation_matching_tokens)
            weighted["activation_matching"] = (config.activation_matching_weight, term)
        if self.masked_prediction is not None:
            term = self.masked_prediction(student, teacher, mask)
            weighted["masked_prediction"] = (config.masked_prediction_weight, term)
        if self.feature_regression is not None:
            term = self.feature_regression(student, teacher, mask)
            weighted["feature_regression"] = (config.feature_regression_weight, term)
        if config.feature_alignment_weight > 0:
            weighted["feature_alignment"] = (config.feature_alignment_weight, feature_alignment(student, teacher))
        loss = torch.stack([weight * term for weight, term in weighted.values()]).sum()
        return LossOutput(loss=loss, terms={name: term.detach() for name, (_, term) in weighted.items()})

    @torch.no_grad()
    def evaluate(self, held_out: DataLoader, bank: DataLoader | None, device: torch.device) -> dict[str, float]:
        """Losses under fixed masks, and the label-free signs that it works, on whole images.

        Returns:
            ``loss`` and each term; ``masked_cosine`` (predicted against true teacher tokens at masked places); and what
            `StudentMeter` says.
        """
        self.eval()
        meter = StudentMeter(len(held_out.dataset))  # type: ignore[arg-type]  # it has a length
        for batch in held_out:
            batch = to_device(batch, device)
            teacher = self.teacher.features(batch["images"], stages=self.config.stages)
            student = self._student(batch, self.config.stages)
            mask = batch.get("mask")
            output = self._losses(student, teacher, mask)
            losses = {"loss": output.loss, **output.terms}
            if self.masked_prediction is not None and mask is not None:
                prediction, target = self.masked_prediction.pairs(student, teacher, mask)
                losses["masked_cosine"] = F.cosine_similarity(prediction.float(), target.float(), dim=1).mean()
            whole = student if mask is None else extract_features(self.student, batch["images"], stages=self.config.stages)
            meter.update(losses, whole, teacher, batch.get("labels"))
        scores = meter.scores(self.student, bank, device)
        self.train()
        return scores
