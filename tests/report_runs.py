"""Run folders by hand, for tests of the report: the files of a run with the numbers that a test asks for."""

import json
from pathlib import Path

from vit_linearizer.benchmarking.summary import add_ratios

CONFIG = {
    "command": "distill", "teacher": "vit_base_patch16_224", "teacher_arch": None, "teacher_pretrained": True,
    "student": "adventurer_base_patch16_224", "student_args": [], "data": "photos", "images": 1000, "recipe": "linearizer",
    "image_size": [224, 224], "teacher_image_size": [224, 224], "epochs": 4, "iterations": None, "batch_size": 100,
    "learning_rate": 0.001, "activation_matching_weight": 1.0, "masked_prediction_weight": 1.0,
    "feature_regression_weight": 0.0, "seed": 0, "device": "cpu", "precision": "fp32", "num_workers": None,
}  # fmt: skip
BASELINE = {"activation_matching_weight": 0.0, "masked_prediction_weight": 0.0, "feature_regression_weight": 1.0}


def held_out(step, stage="distillation", **values):
    return {"step": step, "stage": stage, "split": "held_out", "epoch": step / 100, **values}


def train(step, stage="distillation", **values):
    return {"step": step, "stage": stage, "split": "train", "epoch": step / 100, "data_wait": 0.01, **values}


def good_lines():
    """Four epochs of a distillation that works: falling losses, rising likeness."""
    losses = (2.0, 1.0, 0.6, 0.5, 0.4)
    cosines = (0.2, 0.6, 0.8, 0.88, 0.92)
    lines = []
    for epoch, (loss, cosine) in enumerate(zip(losses, cosines, strict=True)):
        likeness = {"final_cosine": cosine, "agreement_stage1": 0.5 + cosine / 2, "agreement_stage2": 0.4 + cosine / 2}
        if epoch:
            terms = {"activation_matching": loss / 2, "masked_prediction": loss / 2}
            lines += [train(100 * epoch - part, loss=loss, **terms, images_per_second=50.0) for part in (50, 0)]
        lines.append(held_out(100 * epoch, loss=loss, knn=40 + 10 * epoch, **likeness))
    return lines


def write_run(folder: Path, lines=None, *, log=("(50 held out, 0 skipped)",), evaluation=None, skipped=(), **config) -> Path:
    """A run folder; keyword arguments change its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    lines = good_lines() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = f"vit -> student on 950 images {log[0]}, cpu" if log else ""
    texts = [f"2026-01-01 10:00:00,000 INFO {start}", "2026-01-01 10:05:00,000 INFO student: there"] if log else []
    (folder / "run.log").write_text("".join(text + "\n" for text in (*texts, *log[1:])))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if skipped:
        (folder / "skipped.txt").write_text("".join(f"{name}\tbroken\n" for name in skipped))
    return folder


def benchmark_row(model, side, seconds, *, attention="none", spread=0.02, status="ok"):
    row = {
        "model": model, "image_size": [side, side], "patch_size": [16, 16], "precision": "fp32", "attention": attention,
        "tokens": (side // 16) ** 2, "flops_per_image": 10**9, "parameters": 10**7, "status": status,
    }  # fmt: skip
    if status == "ok":
        row |= {
            "seconds_per_image": seconds, "seconds_median": seconds, "images_per_second": 1 / seconds, "repeats": 3,
            "spread": [seconds * (1 - spread / 2), seconds * (1 + spread / 2)], "memory_peak_mib": 100.0 * side / 224,
        }  # fmt: skip
    return row


def write_benchmark(folder: Path, rows, *, complete=True, out=None) -> Path:
    """``benchmark.json`` with the ratios that the command would add."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"gpu": None, "cpu": "A CPU", "threads": 2, "cores": 2, "memory_gib": 8, "torch": "2", "timm": "1",
               "vit_linearizer": "0", "mixer": "native"}  # fmt: skip
    config = {"out": out or str(folder), "batch_size": 1, "train": False, "compile": False}
    content = {"complete": complete, "machine": machine, "config": config, "rows": add_ratios(rows), "summaries": []}
    (folder / "benchmark.json").write_text(json.dumps(content))
    return folder


def crossing_rows(teacher, student):
    """The student is slower at 224, level in between, and 4 times as fast at 896."""
    return [
        benchmark_row(teacher, 224, 0.1, attention="fused"),
        benchmark_row(student, 224, 0.125),
        benchmark_row(teacher, 448, 0.5, attention="fused"),
        benchmark_row(student, 448, 0.4),
        benchmark_row(teacher, 896, 4.0, attention="fused"),
        benchmark_row(student, 896, 1.0),
    ]
