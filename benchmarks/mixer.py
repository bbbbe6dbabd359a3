"""Time of one Mamba-2 mixer layer: ours, its plain PyTorch form, and the one in transformers, interleaved in one process.

    python benchmarks/mixer.py --precision bf16 --out benchmarks/results/mixer-bf16.json

The floor is the time of the two linear layers alone, by the same library and without anything between them.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from figures import show, time_in_turn
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from vit_linearizer.models.linear import prepared
from vit_linearizer.models.mamba2 import Mamba2


def counterpart(mixer: Mamba2, width: int, chunk: int) -> torch.nn.Module:
    """Transformers' mixer with the same weights."""
    config = Mamba2Config(
        hidden_size=width, state_size=mixer.state_dim, head_dim=mixer.head_dim, num_heads=mixer.num_heads, expand=2,
        conv_kernel=4, n_groups=1, chunk_size=chunk, num_hidden_layers=1, use_bias=False, use_conv_bias=True,
    )  # fmt: skip
    theirs = Mamba2Mixer(config, layer_idx=0)
    theirs.load_state_dict(mixer.state_dict())
    return theirs.eval()


def main() -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[ARGUMENTS.precision]
    torch.manual_seed(0)
    ours = Mamba2(ARGUMENTS.width).eval()
    plain = Mamba2(ARGUMENTS.width, implementation="chunked").eval()
    plain.load_state_dict(ours.state_dict())
    default_chunk = Mamba2Config().chunk_size
    theirs = {chunk: counterpart(ours, ARGUMENTS.width, chunk).to(dtype) for chunk in (default_chunk, 64)}
    ours, plain = ours.to(dtype), plain.to(dtype)
    u = torch.randn(ARGUMENTS.batch_size, ARGUMENTS.tokens, ARGUMENTS.width, dtype=dtype)
    y = torch.randn(ARGUMENTS.batch_size, ARGUMENTS.tokens, ours.inner_dim, dtype=dtype)
    cases: dict[str, Callable[[], object]] = {
        "linear layers alone (floor)": lambda: (ours.in_proj(u), ours.out_proj(y)),
        "linear layers alone, packed beforehand": lambda: (packed_in(u), packed_out(y)),
        "vit-linearizer": lambda: ours(u),
        "vit-linearizer, plain PyTorch": lambda: plain(u),
        f"transformers, chunk {default_chunk} (default)": lambda: theirs[default_chunk](u),
        "transformers, chunk 64": lambda: theirs[64](u),
    }
    with torch.inference_mode():
        packed_in, packed_out = (prepared(layer, ARGUMENTS.tokens) for layer in (ours.in_proj, ours.out_proj))
        seconds = time_in_turn(cases, ARGUMENTS.repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    floor, own = medians["linear layers alone (floor)"], medians["vit-linearizer"]
    rows = [
        {
            "what": name,
            "milliseconds": round(1e3 * median, 2),
            "fastest": round(1e3 * min(seconds[name]), 2),
            "slowest": round(1e3 * max(seconds[name]), 2),
            "over ours": round(median / own, 2),
            "over the floor": round(median / floor, 2),
        }
        for name, median in medians.items()
    ]
    title = (
        f"One mixer layer, width {ARGUMENTS.width}, {ARGUMENTS.tokens} tokens, batch {ARGUMENTS.batch_size}, "
        f"{ARGUMENTS.precision}, median of {ARGUMENTS.repeats}"
    )
    command = f"python benchmarks/mixer.py --precision {ARGUMENTS.precision} --tokens {ARGUMENTS.tokens}"
    show(title, command, rows, ARGUMENTS.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=2050)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    ARGUMENTS = parser.parse_args()
    main()
