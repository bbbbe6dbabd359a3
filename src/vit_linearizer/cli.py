"""The command line: one subcommand per function of the package, flags from its configuration dataclass."""

import importlib.metadata
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from .commands.benchmark import BenchmarkConfig, benchmark
from .commands.distill import DistillConfig, distill
from .commands.doctor import DoctorConfig, doctor
from .commands.embed import EmbedConfig, embed
from .commands.evaluate import EvaluateConfig, evaluate
from .commands.export import ExportConfig, export
from .commands.finetune import FinetuneConfig, finetune
from .commands.maps import MapsConfig, maps
from .commands.predict import PredictConfig, predict
from .commands.quickstart import QuickstartConfig, quickstart
from .commands.report import ReportConfig, report
from .commands.segment import SegmentConfig, segment
from .contracts import UserError
from .training.progress import show_messages

COMMANDS: dict[type, Callable[[Any], Any]] = {
    DistillConfig: distill,
    FinetuneConfig: finetune,
    SegmentConfig: segment,
    EvaluateConfig: evaluate,
    PredictConfig: predict,
    MapsConfig: maps,
    ReportConfig: report,
    ExportConfig: export,
    EmbedConfig: embed,
    BenchmarkConfig: benchmark,
    QuickstartConfig: quickstart,
    DoctorConfig: doctor,
}

_Command = (
    Annotated[DistillConfig, tyro.conf.subcommand("distill")]
    | Annotated[FinetuneConfig, tyro.conf.subcommand("finetune")]
    | Annotated[SegmentConfig, tyro.conf.subcommand("segment")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[PredictConfig, tyro.conf.subcommand("predict")]
    | Annotated[MapsConfig, tyro.conf.subcommand("maps")]
    | Annotated[ReportConfig, tyro.conf.subcommand("report")]
    | Annotated[ExportConfig, tyro.conf.subcommand("export")]
    | Annotated[EmbedConfig, tyro.conf.subcommand("embed")]
    | Annotated[BenchmarkConfig, tyro.conf.subcommand("benchmark")]
    | Annotated[QuickstartConfig, tyro.conf.subcommand("quickstart")]
    | Annotated[DoctorConfig, tyro.conf.subcommand("doctor")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for an error the user can mend, 130 when stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        sys.stdout.write(f"vit-linearizer {importlib.metadata.version('vit-linearizer')}\n")
        return 0
    logging.captureWarnings(True)
    show_messages()
    try:
        config = tyro.cli(
            _Command,  # type: ignore[arg-type]  # a union of dataclasses, tyro's way to say subcommands
            prog="vit-linearizer",
            description="Turn a pretrained Vision Transformer into a linear-time backbone.",
            args=arguments,
            config=(tyro.conf.ConsolidateSubcommandArgs,),
        )
        COMMANDS[type(config)](config)
    except UserError as error:
        if "--debug" in arguments:
            raise
        sys.stderr.write(f"vit-linearizer: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
