"""Time of one training step of a small Adventurer beside the same-size ViT, interleaved in one process.

    python benchmarks/training_step.py --width 192 --batch-size 128

Prints the median of each and their ratio, and the floor: the ratio of FLOPs in the linear layers of both.
"""

import argparse
import functools
import statistics

import timm
import torch
import torch.nn.functional as F
from figures import show, time_in_turn  # importing it also gives timm the students' names
from torch.utils.flop_counter import FlopCounterMode


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=ARGUMENTS.precision == "bf16"):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    shape = dict(img_size=32, patch_size=4, embed_dim=ARGUMENTS.width, depth=ARGUMENTS.depth, num_classes=10)
    models = {
        "vit": timm.create_model("vit_tiny_patch16_224", num_heads=ARGUMENTS.width // 32, **shape),
        "adventurer": timm.create_model("adventurer_tiny_patch16_224", **shape),
    }
    images = torch.randn(ARGUMENTS.batch_size, 3, 32, 32)
    labels = torch.randint(0, 10, (ARGUMENTS.batch_size,))
    optimizers = {name: torch.optim.AdamW(model.parameters()) for name, model in models.items()}
    flops = {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            step(model, optimizers[name], images, labels)
        counts = counter.get_flop_counts()["Global"]
        flops[name] = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    cases = {name: functools.partial(step, model, optimizers[name], images, labels) for name, model in models.items()}
    seconds = time_in_turn(cases, ARGUMENTS.repeats, warm=2)
    title = (
        f"Training step, width {ARGUMENTS.width}, {ARGUMENTS.depth} blocks, 64 patches, batch {ARGUMENTS.batch_size}, "
        f"{ARGUMENTS.precision}, median of {ARGUMENTS.repeats}"
    )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        {
            "what": name,
            "milliseconds": round(1e3 * median, 1),
            "fastest": round(1e3 * min(seconds[name]), 1),
            "slowest": round(1e3 * max(seconds[name]), 1),
            "over the ViT": round(median / medians["vit"], 2),
            "FLOPs of the linear layers over the ViT's": round(flops[name] / flops["vit"], 2),
        }
        for name, median in medians.items()
    ]
    command = (
        f"python benchmarks/training_step.py --width {ARGUMENTS.width} --batch-size {ARGUMENTS.batch_size} "
        f"--precision {ARGUMENTS.precision}"
    )
    show(title, command, rows, ARGUMENTS.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    ARGUMENTS = parser.parse_args()
    main()
