"""``benchmark``: speed and memory of models over image sizes, each against the first, as JSON, Markdown and a picture."""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..benchmarking.cases import DEFAULT_SIZES, Shape, plan_cases, preset_shapes
from ..benchmarking.measure import OK, Row, Settings, measure
from ..benchmarking.record import describe_machine, rows_to_keep, write_record
from ..benchmarking.rendering import draw, to_markdown
from ..benchmarking.summary import add_ratios, summarise
from ..contracts import UserError
from ..training.machine import choose_device, choose_precision
from ..training.progress import console, show_messages
from ..training.run_folder import write_atomically
from .arguments import parse_size

logger = logging.getLogger("vit_linearizer")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measure speed and memory of models over image sizes; the first model is the one that others are compared with.

    Attributes:
        out: folder for benchmark.json, .md and .png, new or a run's; a killed benchmark goes on there.
        models: timm names (random weights, nothing is fetched), run folders, local-dir:FOLDER.
        image_sizes: 224 or HEIGHTxWIDTH each; by default 224 448 512x1024 1024x1024.
        preset: a paper's image sizes instead; long goes up to 50176 patches.
        patch_size: side of a patch; by default each model's own.
        batch_size: images at a time.
        precision: one or more; by default bf16 where the device has it, else fp32.
        attention: timm's fused attention, its eager one, or both; nothing to models without attention.
        device: where to run.
        compile: through torch.compile.
        train: forward and backward, bf16 under autocast, instead of inference.
        repeats: timed repeats of each case, at most.
        seconds_per_case: no further repeat after so long; cases that would take ten times as long are left out.
        resume: auto goes on with an unfinished benchmark (size by size) and repeats a finished one of the same
            configuration, never starts over.
        smoke: the smallest form: two tiny models, two tiny sizes, two repeats, whatever else is asked for.
        debug: show the traceback of an error.
    """

    out: str
    models: tuple[str, ...] = ("vit_base_patch16_224", "adventurer_base_patch16_224", "linear_vit_base_patch16_224")
    image_sizes: tuple[str, ...] = ()
    preset: Literal["imagenet", "ade20k", "cityscapes", "long"] | None = None
    patch_size: int | None = None
    batch_size: int = 1
    precision: tuple[Literal["fp32", "bf16"], ...] = ()
    attention: tuple[Literal["fused", "eager"], ...] = ("fused",)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: bool = False
    train: bool = False
    repeats: int = 5
    seconds_per_case: float = 60.0
    resume: Literal["auto", "never"] = "auto"
    smoke: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("patch_size", "batch_size", "repeats", "seconds_per_case"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')}", value, "must be above 0")
        for name in ("models", "attention"):
            if not getattr(self, name):
                raise UserError(f"--{name}", None, "give at least one")
        if self.preset is not None and self.image_sizes:
            raise UserError("--preset", self.preset, "brings its own image sizes; leave --image-sizes out")


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure models over image sizes; see `BenchmarkConfig`.

    Every case runs in a process of its own. One that does not fit into memory, or fails, becomes a row that says so.

    Returns:
        The content of ``benchmark.json``: ``complete``, ``machine``, ``config``, ``rows`` (one a case; seconds and MiB) and
        ``summaries`` (one for each model, attention, precision and patch; see `summary.summarise`).

    Raises:
        UserError: anything in the configuration that cannot work, found before the first measurement; or nothing could
            be measured.
    """
    show_messages()
    device = choose_device(config.device)
    if config.smoke:
        config = replace(
            config,
            models=("vit_tiny_patch16_224", "adventurer_tiny_patch16_224"),
            image_sizes=("64", "96"),
            preset=None,
            patch_size=None,
            repeats=2,
        )
    if not config.precision:
        config = replace(config, precision=("bf16" if choose_precision(device.type)[0] == "bf16" else "fp32",))
    groups = plan_cases(config.models, _shapes(config), config.precision, config.attention)
    machine = describe_machine(device)
    out = Path(config.out)
    done = _look_at(out, config, machine)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--out", out, f"cannot be made: {error.strerror}") from error
    if done:
        logger.info("going on: %d of %d cases are done", len(done), sum(len(group) for group in groups))
    content: dict[str, Any] = {"complete": False, "machine": machine, "config": asdict(config)}
    rows = done
    try:
        for fresh in measure(groups, _settings(config, device), done):
            rows = [*rows, *fresh]
            content |= {"rows": add_ratios(rows), "summaries": summarise(rows)}
            _write(out, content)
    except KeyboardInterrupt:
        logger.info("%d cases are kept in %s; the same command goes on behind the last finished size", len(rows), out)
        raise
    content |= {"rows": add_ratios(rows), "summaries": summarise(rows), "complete": True}
    measured = any(row["status"] == OK for row in rows)
    if measured:
        draw(content, out / "benchmark.png")
    _write(out, content)
    console.print(to_markdown(content), soft_wrap=True, markup=False, highlight=False)
    if not measured:
        raise UserError("--models", " ".join(config.models), f"nothing could be measured; {rows[0]['status']}")
    logger.info("written: %s", ", ".join(str(out / f"benchmark.{kind}") for kind in ("json", "md", "png")))
    return content


def _shapes(config: BenchmarkConfig) -> list[Shape]:
    if config.preset is not None:
        return preset_shapes(config.preset, config.patch_size)
    sizes = [parse_size("--image-sizes", text) for text in config.image_sizes or DEFAULT_SIZES]
    return [(size, config.patch_size) for size in sizes if size is not None]


def _settings(config: BenchmarkConfig, device: torch.device) -> Settings:
    return Settings(
        device=device.type,
        threads=torch.get_num_threads(),
        batch_size=config.batch_size,
        train=config.train,
        compile=config.compile,
        repeats=config.repeats,
        seconds_per_case=config.seconds_per_case,
    )


def _write(out: Path, content: dict[str, Any]) -> None:
    write_atomically(out / "benchmark.md", to_markdown(content))
    write_record(out / "benchmark.json", content)


def _look_at(out: Path, config: BenchmarkConfig, machine: dict[str, Any]) -> list[Row]:
    """Rows of an unfinished benchmark to go on with; nothing is written yet."""
    if out.exists() and not out.is_dir():
        raise UserError("--out", out, "is a file; give a folder")
    if config.resume == "never":
        return []
    return rows_to_keep(out / "benchmark.json", config=asdict(config), machine=machine)
