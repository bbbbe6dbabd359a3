"""Time of one training step of a small Adventurer beside the same-size ViT, interleaved in one process.

    python benchmarks/training_step.py --width 192 --batch-size 128

Prints the median of each and their ratio, and the floor: the ratio of FLOPs in the linear layers of both.
"""

import argparse
import platform
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import vit_linearizer

assert vit_linearizer.__version__  # imported for the names it registers


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
    flops, seconds = {}, {name: [] for name in models}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            step(model, optimizers[name], images, labels)
        counts = counter.get_flop_counts()["Global"]
        flops[name] = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    for repeat in range(ARGUMENTS.repeats + 2):
        for name, model in models.items():
            started = time.perf_counter()
            step(model, optimizers[name], images, labels)
            if repeat >= 2:  # warm
                seconds[name].append(time.perf_counter() - started)
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {ARGUMENTS.precision}, width {ARGUMENTS.width}, {ARGUMENTS.depth} blocks, "
          f"64 patches, batch {ARGUMENTS.batch_size}, median of {ARGUMENTS.repeats}")  # fmt: skip
    for name, times in seconds.items():
        print(f"{name:12s} {1e3 * statistics.median(times):8.1f} ms   ({1e3 * min(times):.1f} .. {1e3 * max(times):.1f})")
    ratio = statistics.median(seconds["adventurer"]) / statistics.median(seconds["vit"])
    print(f"ratio        {ratio:8.2f}      linear layers alone {flops['adventurer'] / flops['vit']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    ARGUMENTS = parser.parse_args()
    main()
