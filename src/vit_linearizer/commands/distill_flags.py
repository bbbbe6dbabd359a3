"""The flags of ``distill``."""

from dataclasses import dataclass

from ..data.sources import Labels
from ..objectives import Masking, MatchedTokens, Target
from ..ops.linear_attention import FeatureMap
from .training_flags import TrainingFlags, ViewFlags


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainingFlags, ViewFlags):
    """Distil a Vision Transformer into a linear-time student, from images without labels.

    Options without a default take the recipe's value; --dry-run prints them all.

    Attributes:
        teacher: timm name, hf-hub:OWNER/NAME, local-dir:FOLDER, a run folder, or a weight file (with --teacher-arch).
        student: timm name, e.g. adventurer_base_patch16_224, or a run folder or weight file to go on from; not with adala,
            whose student is the teacher with linear attention.
        data: folder of images, searched recursively, or builtin:digits.
        labels: folder where subfolders are classes: then nearest neighbours are scored on the way, and nothing else changes.
        out: folder that the run leaves its results in.
        recipe: linearizer (the paper), adala (ViT-AdaLA: attention alignment, then feature alignment), regression (the
            baseline), digits, adala_digits or smoke.
        teacher_arch: timm name of the architecture, when the teacher is a weight file.
        teacher_pretrained: load the teacher's pretrained weights.
        student_arch: timm name of the architecture, when the student is a weight file.
        student_args: arguments of the student's architecture, as name=value (e.g. depth=4 flip=released).
        image_size: what the student sees, 224 or HEIGHTxWIDTH; by default the student's nominal size.
        teacher_image_size: what the teacher sees; by default the size at which the patch grids agree.
        epochs: passes over the images, in each stage.
        attention_epochs: adala's first stage alone; 0 leaves it out.
        feature_epochs: adala's second stage alone; 0 leaves it out.
        attention_learning_rate: of adala's first stage alone.
        feature_learning_rate: of adala's second stage alone.
        feature_map: of adala's linear attention: elu, relu or hedgehog (learnable).
        keep_softmax_blocks: adala leaves so many last blocks as they are.
        warmup_epochs: linear warm-up, at most a tenth of the run.
        stages: number of stages whose activation maps are matched.
        mask_ratio: share of patches hidden from the student.
        masking: token-wise or block-wise masks.
        activation_matching_weight: factor on the activation-matching loss.
        activation_matching_tokens: tokens that enter the activation maps.
        masked_prediction_weight: factor on the masked-prediction loss.
        masked_prediction_target: LayerNorm of the teacher's last block, or as it is.
        feature_regression_weight: factor on plain regression of the final tokens.
        feature_regression_target: as for masked prediction.
        feature_alignment_weight: factor on the error of the final features, for a student of the teacher's width (adala's
            second stage).
    """

    teacher: str
    data: str
    out: str
    student: str | None = None
    labels: Labels = "none"
    recipe: str = "linearizer"
    teacher_arch: str | None = None
    teacher_pretrained: bool = True
    student_arch: str | None = None
    student_args: tuple[str, ...] = ()
    image_size: str | None = None
    teacher_image_size: str | None = None
    epochs: int | None = None
    attention_epochs: int | None = None
    feature_epochs: int | None = None
    attention_learning_rate: float | None = None
    feature_learning_rate: float | None = None
    feature_map: FeatureMap | None = None
    keep_softmax_blocks: int | None = None
    warmup_epochs: float | None = None
    stages: int | None = None
    mask_ratio: float | None = None
    masking: Masking | None = None
    activation_matching_weight: float | None = None
    activation_matching_tokens: MatchedTokens | None = None
    masked_prediction_weight: float | None = None
    masked_prediction_target: Target | None = None
    feature_regression_weight: float | None = None
    feature_regression_target: Target | None = None
    feature_alignment_weight: float | None = None
