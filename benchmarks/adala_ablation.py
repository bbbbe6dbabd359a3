"""ViT-AdaLA's ablation on the quickstart's teacher: both stages against either alone, at equal steps.

    vit-linearizer quickstart --out runs/quickstart
    python benchmarks/adala_ablation.py --teacher runs/quickstart/teacher --runs runs/ablation

Every variant trains on the digits' training part without labels and is judged on the test digits. A killed one goes on.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import show
from torch.utils.data import DataLoader

from vit_linearizer import DistillConfig, distill, load
from vit_linearizer.data.datasets import CentreSet, centre_loader, to_device
from vit_linearizer.data.sources import DigitsSource
from vit_linearizer.evaluation import class_scores, collect_features, few_shot_accuracy, knn_accuracy
from vit_linearizer.models.adapters import extract_features
from vit_linearizer.models.attention_calls import recorded_attention
from vit_linearizer.models.linear_vit import linear_blocks, linearize
from vit_linearizer.models.teacher import Teacher
from vit_linearizer.objectives import attention_alignment, feature_alignment

SIZE = (32, 32)
CPU = torch.device("cpu")


def loader(split: str) -> DataLoader:
    source = DigitsSource(split)
    return centre_loader(CentreSet(source, np.arange(len(source)), SIZE), batch_size=64)


@torch.no_grad()
def judge(student: Any, teacher: Teacher) -> dict[str, float]:
    """Both errors, and what is left of the teacher's accuracies, on the test digits."""
    train, test = loader("train"), loader("test")
    blocks = linear_blocks(student)
    attention, features, seen = 0.0, 0.0, 0
    for batch in test:
        images = to_device(batch, CPU)["images"]
        with recorded_attention(teacher.model, [number for number, _ in blocks]) as calls:
            wanted = teacher.features(images)
        answers = [call.ask(block) for call, (_, block) in zip(calls, blocks, strict=True)]
        if blocks:
            attention += len(images) * float(attention_alignment(answers, [call.output for call in calls]))
        features += len(images) * float(feature_alignment(extract_features(student, images), wanted))
        seen += len(images)
    sets = [collect_features(student, part, CPU) for part in (train, test)]
    return {
        "attention error": attention / seen,
        "feature error": features / seen,
        "top-1 of the old head": class_scores(student, test, CPU)["top1"],
        "kNN": knn_accuracy(*sets[0], *sets[1]),
        "5 labels a class": few_shot_accuracy(*sets[0], *sets[1]),
    }


def main() -> None:
    source = load(ARGUMENTS.teacher)
    teacher = Teacher(load(ARGUMENTS.teacher), SIZE)
    whole = ARGUMENTS.attention_epochs + ARGUMENTS.feature_epochs
    variants = {
        "attention alignment alone": (whole, 0),
        "feature alignment alone": (0, whole),
        "both": (ARGUMENTS.attention_epochs, ARGUMENTS.feature_epochs),
    }
    found = {"teacher": [judge(source, teacher)], "linear attention, nothing trained": [judge(linearize(source), teacher)]}
    for name, (attention, feature) in variants.items():
        found[name] = []
        for seed in ARGUMENTS.seeds:
            run = distill(
                DistillConfig(
                    teacher=ARGUMENTS.teacher,
                    recipe="adala_digits",
                    data="builtin:digits-train",
                    out=str(Path(ARGUMENTS.runs) / f"{name.replace(' ', '-')}-{seed}"),
                    attention_epochs=attention,
                    feature_epochs=feature,
                    seed=seed,
                    precision="bf16",
                    evaluate_every=4,
                    report=False,
                )
            )
            found[name].append(judge(load(run), teacher))
    rows = [
        {"what": name, "epochs": "{} + {}".format(*variants[name]) if name in variants else "-", **summary(judged)}
        for name, judged in found.items()
    ]
    seeds = " ".join(str(seed) for seed in ARGUMENTS.seeds)
    command = f"python benchmarks/adala_ablation.py --teacher runs/quickstart/teacher --runs runs/ablation --seeds {seeds}"
    command += f" --attention-epochs {ARGUMENTS.attention_epochs} --feature-epochs {ARGUMENTS.feature_epochs}"
    title = f"ViT-AdaLA's stages on the quickstart's teacher, {len(ARGUMENTS.seeds)} seeds: mean (lowest .. highest)"
    show(title, command, rows, ARGUMENTS.out)


def summary(judged: list[dict[str, float]]) -> dict[str, str]:
    cells = {}
    for key in judged[0]:
        values = [one[key] for one in judged]
        form = ".4f" if "error" in key else ".1f"
        cells[key] = f"{statistics.mean(values):{form}}"
        if len(values) > 1:
            cells[key] += f" ({min(values):{form}} .. {max(values):{form}})"
    return cells


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="the quickstart's teacher run")
    parser.add_argument("--runs", required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--attention-epochs", type=int, default=4)
    parser.add_argument("--feature-epochs", type=int, default=12)
    parser.add_argument("--out", help="file for write_docs.py")
    ARGUMENTS = parser.parse_args()
    main()
