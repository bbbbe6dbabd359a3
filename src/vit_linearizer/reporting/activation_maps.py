"""Activation maps of several models for one picture: which patches resemble a token, and how far the models agree on it.

Source: ViT-Linearizer (arXiv 2504.00037), section 3.2, eq. 4. The heat of a token is its row of cosines to all patch tokens
*before* the rows are brought to unit norm, so that it can be read: 1 is the same direction, 0 none in common. The agreement
of two models is the cosine between their rows, which the norm does not change; its mean over all tokens must equal
`evaluation.activation_agreement`. Reading the class token and the mean token as queries, and the colours, are choices.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..contracts import Features, UserError, did_you_mean
from ..models.adapters import extract_features, nominal_size, patch_grid, patch_size, stage_ends
from ..objectives import activation_map

#: Whose row is looked at: the class token, the mean patch token, or the patch under (x, y), in pixels of the image.
Query = Literal["class", "mean"] | tuple[float, float]

#: Rows of an activation map that are compared at a time: all at once take gigabytes for a large picture.
_ROWS = 1024
#: Standard deviations of a component from the middle of a colour to its end.
_SPREAD = 2.0


@dataclass(frozen=True, kw_only=True)
class ModelMaps:
    """What one model makes of the picture; tensors lie on the CPU, in fp32.

    Attributes:
        grid: patches (down, across) that the model saw.
        heat: ``[S, *grid]`` in [-1, 1], cosines to the query at the S stages shown.
        agreement: ``[S]``, cosine between these rows and the reference's; None for another grid than the reference's.
        all_tokens: ``[S]``, the same as a mean over the rows of all patch tokens; None for another grid.
        colours: ``[*grid, 3]`` in [0, 1], see `principal_colours`; None where they were not asked for.
        colours_agreement: mean cosine of the principal angles between the two spaces of components, in [0, 1]; None
            for another grid or without colours.
    """

    grid: tuple[int, int]
    heat: Tensor
    agreement: Tensor | None
    all_tokens: Tensor | None
    colours: Tensor | None = None
    colours_agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class MapPanels:
    """Maps of all models for one picture, ready to be drawn.

    Attributes:
        image: ``[3, H, W]`` in [0, 1], on the CPU.
        query: whose row is shown.
        shown: numbers of the S stages, from 1.
        stages: how many there are, K.
        models: by name, in the order given; the first is the reference.
    """

    image: Tensor
    query: Query
    shown: tuple[int, ...]
    stages: int
    models: dict[str, ModelMaps]


def has_class_token(model: nn.Module) -> bool:
    """Whether `extract_features` finds a class token in a backbone."""
    any_model: Any = model
    return any_model.num_prefix_tokens > 0 and getattr(model, "cls_token", None) is not None


def common_query(models: Iterable[nn.Module]) -> Literal["class", "mean"]:
    """The class token where all models have one, else the mean patch token.

    A model that answers with its mean patch token has a class token that need not mean anything: distillation of an
    Adventurer trains none.
    """
    answers = (has_class_token(model) and getattr(model, "global_pool", None) != "avg" for model in models)
    return "class" if all(answers) else "mean"


@torch.no_grad()
def map_panels(
    models: Mapping[str, nn.Module],
    image: Tensor,
    query: Query | None = None,
    stages: int = 4,
    *,
    at: Sequence[int] | None = None,
    grid: tuple[int, int] | None = None,
    colours: bool = False,
) -> MapPanels:
    """Activation maps of plain timm backbones for one picture.

    Every model sees the picture at the size where it has the wanted grid of patches; one that takes no other size than its
    own sees it at that, and is not compared.

    Args:
        models: by the name to show, the reference first; each on its own device.
        image: ``[3, H, W]`` in [0, 1].
        query: whose row; None for `common_query`.
        stages: number of stages K, see `models.adapters.stage_ends`.
        at: stages to show, from 1; None for all.
        grid: patches (down, across) that the models should have; None for those of the first model at H x W.
        colours: find the colours of the final patch tokens too.

    Returns:
        The maps, on the CPU.

    Raises:
        UserError: no model, an image size that is no multiple of the patch, a query that a model has not, a point outside
            of the image, or stages that there are not.
    """
    if not models:
        raise UserError("models", None, "give at least one")
    query = common_query(models.values()) if query is None else query
    height, width = image.shape[-2:]
    grid = patch_grid(next(iter(models.values())), (height, width)) if grid is None else grid
    _refuse(models, query, stages, (height, width))
    shown = stages_shown(at, stages)
    found: dict[str, ModelMaps] = {}
    reference: Features | None = None
    reference_scores: Tensor | None = None
    for name, model in models.items():
        features = _features(model, image, grid, stages)
        heat = torch.stack([_heat(features.stages[number - 1], query, (height, width)) for number in shown])
        reference = features if reference is None else reference
        agreement = all_tokens = painted = alike = None
        if features.grid == reference.grid:
            first = heat if not found else next(iter(found.values())).heat
            agreement = F.cosine_similarity(heat.flatten(1).double(), first.flatten(1).double()).float()
            pairs = [(features.stages[number - 1].tokens, reference.stages[number - 1].tokens) for number in shown]
            all_tokens = torch.stack([_mean_agreement(ours, theirs) for ours, theirs in pairs])
        if colours:
            scores = principal_scores(features.tokens[0]).unflatten(0, features.grid)
            reference_scores = scores if reference_scores is None else reference_scores
            scores, cosine = _aligned(scores, reference_scores)
            painted, alike = principal_colours(scores), cosine if agreement is not None else None
        found[name] = ModelMaps(
            grid=features.grid,
            heat=heat,
            agreement=agreement,
            all_tokens=all_tokens,
            colours=painted,
            colours_agreement=alike,
        )
    return MapPanels(image=image.float().cpu(), query=query, shown=shown, stages=stages, models=found)


def stages_shown(at: Sequence[int] | None, stages: int) -> tuple[int, ...]:
    """The stages asked for, each once, in their order; all of them for None.

    Raises:
        UserError: there is no stage of that number.
    """
    for number in at or ():
        if not 1 <= number <= stages:
            raise UserError("--at", number, f"stages are numbered from 1 to {stages} (--stages)")
    return tuple(dict.fromkeys(at)) if at else tuple(range(1, stages + 1))


def query_patch(point: tuple[float, float], size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The patch (down, across) under a point.

    Args:
        point: (x, y) in pixels from the top left corner; whole numbers are the left and upper edges of pixels.
        size: (height, width) of the image.
        grid: patches (down, across).

    Raises:
        UserError: the point lies outside of the image.
    """
    (x, y), (height, width) = point, size
    if not (0 <= x < width and 0 <= y < height):
        remedy = f"lies outside of the image; x goes from 0 to {width - 1}, y from 0 to {height - 1}"
        raise UserError("point", f"{x:g},{y:g}", remedy)
    return int(y * grid[0] / height), int(x * grid[1] / width)


def principal_scores(tokens: Tensor) -> Tensor:
    """The first three principal components of a picture's tokens, each of mean 0 and variance 1.

    Their signs are such that the value furthest from 0 is positive. A component without variance is 0 everywhere.

    Args:
        tokens: ``[N, D]``.

    Returns:
        ``[N, 3]`` float64, on the CPU.
    """
    exact = tokens.float().cpu().double()
    centred = exact - exact.mean(0)
    scores = exact.new_zeros(len(exact), 3)
    if not centred.isfinite().all():
        return scores
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(exact))
    for place in range(min(3, len(variances))):
        if variances[-1 - place] > 1e-10 * variances[-1] > 0:
            score = centred @ axes[:, -1 - place] / variances[-1 - place].sqrt()
            scores[:, place] = score * score[score.abs().argmax()].sign()
    return scores


def principal_colours(scores: Tensor) -> Tensor:
    """Components as red, green and blue in [0, 1]: 0 is the middle, two standard deviations are the end of a colour.

    The scores of each model come from its own tokens, and are turned (orthogonal Procrustes, reflections allowed) to lie as
    near as possible to those of the reference before they become colours: equal colours then mean an equal place among the
    tokens, whatever axes a model happens to use. As all components have variance 1, a model that sees none of what the
    reference sees still gets vivid colours; they differ from the reference's.

    Args:
        scores: ``[H, W, 3]`` of `principal_scores`.

    Returns:
        The same shape, fp32.
    """
    return (0.5 + scores / (2 * _SPREAD)).clamp(0, 1).float()


def _refuse(models: Mapping[str, nn.Module], query: Query, stages: int, size: tuple[int, int]) -> None:
    if isinstance(query, str) and query not in ("class", "mean"):
        known = did_you_mean(query, ("class", "mean"))
        raise UserError("query", query, f"must be class, mean or a point (x, y){known}")
    if not isinstance(query, str):
        query_patch(query, size, (1, 1))
    for name, model in models.items():
        stage_ends(len(model.feature_info), stages)  # type: ignore[arg-type]  # timm's list
        if query == "class" and not has_class_token(model):
            raise UserError("query", "class", f"{name} has no class token; use mean or a point")


def _features(model: nn.Module, image: Tensor, grid: tuple[int, int], stages: int) -> Features:
    """What a model says of the image at the size where it has that grid; at its own size where it takes no other."""
    height, width = patch_size(model)
    size = (grid[0] * height, grid[1] * width)
    embedding: Any = model.patch_embed
    if getattr(embedding, "strict_img_size", False) and embedding.img_size is not None:
        size = nominal_size(model)
    images = image[None].to(next(model.parameters()).device, torch.float32)
    if tuple(image.shape[-2:]) != size:  # as `models.teacher.Teacher` does it
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    was_training = model.training
    model.eval()
    try:
        return extract_features(model, images, stages=stages)
    finally:
        model.train(was_training)


def _heat(stage: Features, query: Query, size: tuple[int, int]) -> Tensor:
    """``[H, W]``: cosines of the query token to all patch tokens of one stage of one picture."""
    tokens = stage.tokens[0].float().cpu().double()
    if query == "class":
        assert stage.class_token is not None
        row = stage.class_token[0].float().cpu().double()
    elif query == "mean":
        row = tokens.mean(0)
    else:
        assert not isinstance(query, str)
        row = tokens.unflatten(0, stage.grid)[query_patch(query, size, stage.grid)]
    return F.cosine_similarity(row[None], tokens, dim=-1).clamp(-1, 1).unflatten(0, stage.grid).float()


def _mean_agreement(ours: Tensor, theirs: Tensor) -> Tensor:
    """`evaluation.activation_agreement` of one stage, some rows at a time."""
    theirs = theirs.to(ours.device)
    parts = zip(ours.split(_ROWS, dim=1), theirs.split(_ROWS, dim=1), strict=True)
    sums = [(activation_map(ours, rows) * activation_map(theirs, others)).sum() for rows, others in parts]
    return (torch.stack(sums).sum() / ours.shape[1]).float().cpu()


def _aligned(scores: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Scores ``[H, W, 3]`` turned towards others, and the mean cosine of the principal angles between the two spaces."""
    if scores.shape != target.shape:
        there = target.permute(2, 0, 1)[None]
        there = F.interpolate(there, size=scores.shape[:2], mode="bilinear", antialias=True, align_corners=False)
        target = there[0].permute(1, 2, 0)
    left, cosines, right = torch.linalg.svd(torch.einsum("hwi,hwj->ij", scores, target) / scores[..., 0].numel())
    return scores @ (left @ right), float(cosines.mean())
