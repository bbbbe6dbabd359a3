"""ViT-AdaLA on small ViTs of every kind with random weights: what each stage reduces, on held-out digits.

    python benchmarks/adala_families.py --runs runs/families

Random weights with noise on every parameter attend unevenly, so there is something to align. The attention error is that on
the teacher's own inputs, the feature error that of the student as a whole.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from figures import show

from vit_linearizer import DistillConfig, distill
from vit_linearizer.models.loading import save_model_folder

FAMILIES = {
    "ViT": "vit_tiny_patch16_224",
    "DeiT-III": "deit3_small_patch16_224",
    "CLIP": "vit_base_patch16_clip_224",
    "DINOv2, registers": "vit_small_patch14_reg4_dinov2",
    "SigLIP": "vit_base_patch16_siglip_224",
    "EVA-02": "eva02_tiny_patch14_224",
    "DINOv3": "vit_small_patch16_dinov3",
}
SHAPE = dict(embed_dim=48, depth=3, num_heads=3, img_size=32, patch_size=4, num_classes=0)


def teacher(name: str, folder: Path) -> Path:
    """A small model of a family, its weights random and none at its starting value."""
    if not folder.exists():
        torch.manual_seed(0)
        model: Any = timm.create_model(name, **SHAPE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        save_model_folder(model, folder)
    return folder


def held_out(run: Path, stage: str) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == "held_out" and line["stage"] == stage]


def main() -> None:
    rows = []
    for family, name in FAMILIES.items():
        place = Path(ARGUMENTS.runs) / name
        run = distill(
            DistillConfig(
                teacher=str(teacher(name, place / "teacher")),
                recipe="adala_digits",
                data="builtin:digits-train",
                out=str(place / "run"),
                stages=3,
                attention_epochs=ARGUMENTS.attention_epochs,
                feature_epochs=ARGUMENTS.feature_epochs,
                evaluate_every=100,
                report=False,
            )
        )
        attention, features = (held_out(run, f"{what} alignment") for what in ("attention", "feature"))
        rows.append(
            {
                "family": family,
                "model": name,
                "attention error, before": f"{attention[0]['loss']:.3g}",
                "after stage 1": f"{attention[-1]['loss']:.3g}",
                "times less": f"{attention[0]['loss'] / attention[-1]['loss']:.1f}",
                "feature error, after stage 1": f"{features[0]['loss']:.3g}",
                "after stage 2": f"{features[-1]['loss']:.3g}",
            }
        )
    epochs = f"--attention-epochs {ARGUMENTS.attention_epochs} --feature-epochs {ARGUMENTS.feature_epochs}"
    command = f"python benchmarks/adala_families.py --runs runs/families {epochs}"
    show("ViT-AdaLA's stages on small ViTs of every kind, random weights, held-out digits", command, rows, ARGUMENTS.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="folder for the runs")
    parser.add_argument("--attention-epochs", type=int, default=12)
    parser.add_argument("--feature-epochs", type=int, default=6)
    parser.add_argument("--out", help="file for write_docs.py")
    ARGUMENTS = parser.parse_args()
    main()
