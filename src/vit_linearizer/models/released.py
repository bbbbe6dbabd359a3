"""The published Adventurer weights: which file belongs to which architecture, image size and flip rule.

Source: the files of Adventurer (arXiv 2410.07599) on the Hugging Face Hub. They carry the parameter names of this
project's `Adventurer`, class position last, and load strictly. A weight file does not say which blocks flip: these were
trained with the public code, whose rule is ``released`` (`adventurer_block.FLIP_RULES`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

REPOSITORY = "Wangf3014/Adventurer"


@dataclass(frozen=True, kw_only=True)
class ReleasedWeights:
    """One published file.

    Attributes:
        architecture: timm name.
        image_size: side that its position embedding was trained for.
        top1: published ImageNet accuracy, percent.
    """

    architecture: str
    image_size: int
    top1: float

    @property
    def model_args(self) -> dict[str, Any]:
        """What the architecture has to be built with for these weights."""
        return {"img_size": self.image_size, "flip": "released"}

    def fits(self, state_dict: Mapping[str, Tensor]) -> bool:
        """Whether a file's patch and position embedding have the sizes of these weights."""
        patch, positions = (state_dict.get(name) for name in ("patch_embed.proj.weight", "pos_embed"))
        if patch is None or positions is None or positions.ndim != 3:
            return True  # loading says what is missing
        side = int(self.architecture.split("_")[2].removeprefix("patch"))
        return patch.shape[-1] == side and positions.shape[1] == (self.image_size // side) ** 2 + 1


#: By file name.
RELEASED = {
    f"adventurer_{size}_{image_size}.pth": ReleasedWeights(
        architecture=f"adventurer_{size}_224", image_size=image_size, top1=top1
    )
    for size, image_size, top1 in (
        ("tiny_patch16", 224, 78.2),
        ("small_patch16", 224, 81.8),
        ("base_patch16", 224, 82.6),
        ("large_patch16", 224, 83.4),
        ("base_patch8", 224, 83.9),
        ("base_patch16", 384, 84.2),
        ("base_patch16", 448, 84.3),
        ("base_patch8", 448, 84.8),
    )
}
