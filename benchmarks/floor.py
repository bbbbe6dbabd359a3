"""The floor of Adventurer-B: the time of its linear layers alone beside a whole ViT-B, interleaved in one process.

    python benchmarks/floor.py --precision bf16 --image-sizes 224 448 512x1024

What kernels between the linear layers could reach at best, with these linear layers as they are: if all else were free,
and, nearer to what a machine can do, if its other products of matrices (the scan's, the patch embedding's) ran at the
rate of the linear layers and only what is no product were free.
"""

import argparse
import statistics

import timm
import torch
from figures import show, time_in_turn

from vit_linearizer.commands.arguments import parse_size
from vit_linearizer.models.linear import Linear, prepared
from vit_linearizer.models.parts import segments


def multiply(layers: dict[Linear, tuple[torch.Tensor, int]]) -> None:
    """Every layer once, in parts and packed as the model has them; no output outlives its part."""
    for layer, (x, first) in layers.items():
        parts = segments(x.shape[1])
        run = prepared(layer, x.shape[1], first) if len(parts) > 1 or first else layer
        for start, stop in parts:
            run(x[:, start:stop])


def inputs_of(student: torch.nn.Module, dtype: torch.dtype) -> dict[Linear, tuple[torch.Tensor, int]]:
    """An input for each linear layer, of as many tokens as it gets, and the first output that is wanted of it.

    Behind the last scan there is the class token alone; before it, no other token's gate is read.
    """
    tokens = student.patch_embed.num_patches + 2
    last = student.layers[-1]
    behind = {*last.mlp.modules(), last.mixer.out_proj}
    layers = [layer for layer in student.modules() if isinstance(layer, Linear)]
    inputs = {width: torch.randn(1, tokens, width, dtype=dtype) for width in {layer.in_features for layer in layers}}
    return {
        layer: (
            inputs[layer.in_features][:, : 1 if layer in behind else tokens],
            last.mixer.inner_dim if layer is last.mixer.in_proj else 0,
        )
        for layer in layers
    }


def other_products(student: torch.nn.Module) -> float:
    """The least that the other products need over the linear layers' share, in operations per token.

    The patch embedding, and per token and head of a scan one update and one reading of the state; a scan in chunks, which
    has products of matrices to do, needs more.
    """
    mixers = [layer.mixer for layer in student.layers]
    scans = sum(2 * mixer.num_heads * mixer.state_dim * mixer.head_dim for mixer in mixers)
    parameters = [layer.weight.numel() for layer in student.modules() if isinstance(layer, Linear)]
    return (scans + student.patch_embed.proj.weight.numel()) / sum(parameters)


def main() -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[ARGUMENTS.precision]
    rows = []
    for text in ARGUMENTS.image_sizes:
        size = parse_size("--image-sizes", text)
        vit = timm.create_model("vit_base_patch16_224", img_size=size).eval().to(dtype)
        student = timm.create_model("adventurer_base_patch16_224", img_size=size).eval().to(dtype)
        layers = inputs_of(student, dtype)
        images = torch.randn(1, 3, *size, dtype=dtype)
        cases = {
            "vit": lambda vit=vit, images=images: vit(images),
            "student": lambda student=student, images=images: student(images),
            "linear": lambda layers=layers: multiply(layers),
        }
        with torch.inference_mode():
            seconds = time_in_turn(cases, ARGUMENTS.repeats)
            products = 1 + other_products(student)
        vit_ms, student_ms, linear_ms = (1e3 * statistics.median(seconds[name]) for name in cases)
        rows.append(
            {
                "image": text,
                "ViT-B ms": round(vit_ms, 1),
                "Adventurer-B ms": round(student_ms, 1),
                "its linear layers alone ms": round(linear_ms, 1),
                "ratio": round(vit_ms / student_ms, 2),
                "ratio if all else were free": round(vit_ms / linear_ms, 2),
                "ratio if all but products were free": round(vit_ms / (linear_ms * products), 2),
            }
        )
    title = f"The floor: linear layers alone, batch 1, {ARGUMENTS.precision}, median of {ARGUMENTS.repeats}"
    command = f"python benchmarks/floor.py --precision {ARGUMENTS.precision} --image-sizes {' '.join(ARGUMENTS.image_sizes)}"
    show(title, command, rows, ARGUMENTS.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-sizes", nargs="+", default=["224", "448", "512x1024"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    ARGUMENTS = parser.parse_args()
    main()
