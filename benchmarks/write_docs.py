"""Write docs/benchmarks.md from the files under benchmarks/results/: no figure on that page is typed by hand.

    python benchmarks/write_docs.py

A folder there is a run of ``vit-linearizer benchmark``; a file is what another script of benchmarks/ wrote with ``--out``.
"""

import json
from pathlib import Path
from typing import Any

from vit_linearizer.benchmarking.rendering import machine_text, to_markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

INTRODUCTION = """# Benchmarks

Written by `python benchmarks/write_docs.py` from the files under [benchmarks/results](../benchmarks/results): every figure
was measured by the command that stands with it, on the machine named. Ratios are of medians in the same run: cases take
turns, so a disturbance falls on all alike. Where the student loses, the tables say so. What each optimisation was expected
to give and gave is in [LOG.md](../LOG.md).

On a CPU the student brings its own kernels and, in fp32 on AMD, lets oneDNN multiply where PyTorch (and so the ViT) uses
MKL, which is 5-20 % slower there; in bf16, for up to 4096 tokens, it keeps packed copies of its weights, which oneDNN makes
for a ViT anew in each product: a tenth of the time at 224 and 448 pixels, for twice the memory of its weights. That is part
of the ratio, as it is of what a user gets.
A student whose head reads the class token does not compute what else its last block would give (about 7 % of its work);
timm's ViT does. For dense features both compute everything.
"""


def main() -> None:
    parts = [INTRODUCTION]
    parts += [_of_benchmark(folder) for folder in sorted(RESULTS.iterdir()) if folder.is_dir()]
    parts += [_of_script(file) for file in sorted(RESULTS.glob("*.json"))]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(parts), encoding="utf-8")


def _of_benchmark(folder: Path) -> str:
    content = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    config = content["config"]
    flags = ["--models", *config["models"]]
    flags += ["--preset", config["preset"]] if config["preset"] else ["--image-sizes", *config["image_sizes"]]
    flags += ["--precision", *config["precision"], "--attention", *config["attention"]]
    flags += [f"--{name}" for name in ("train", "compile") if config[name]]
    flags += ["--seconds-per-case", f"{config['seconds_per_case']:g}"]
    title = f"## {folder.name}"
    command = f"`vit-linearizer benchmark {' '.join(flags)} --out {folder.name}`"
    picture = f"![seconds and memory over tokens](../benchmarks/results/{folder.name}/benchmark.png)"
    body = to_markdown(content).partition("\n")[2].strip()
    return f"{title}\n\n{command}\n\n{body}\n\n{picture}\n"


def _of_script(file: Path) -> str:
    content = json.loads(file.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = content["rows"]
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(
        [f"## {content['title']}", "", f"`{content['command']}`", "", machine_text(content["machine"]), "", *lines, ""]
    )


if __name__ == "__main__":
    main()
