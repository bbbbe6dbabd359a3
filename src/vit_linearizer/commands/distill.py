"""``distill``: a teacher and a folder of unlabelled images in, a linear-time student out."""

import logging
from pathlib import Path

from ..data.datasets import SkippedList, split_held_out
from ..data.sources import open_source
from ..data.views import MaskConfig
from ..models.loading import model_folder
from ..recipes import DistillationRecipe
from ..training.data import prepare_data
from ..training.loop import Stage, train
from ..training.machine import choose_workers, make_accelerator
from ..training.progress import show_messages
from ..training.run_folder import RunFolder
from .closing import close_with_report
from .distill_dry_run import describe
from .distill_flags import DistillConfig
from .distill_routes import choose_route
from .resolution import resolved_data, resolved_runtime

logger = logging.getLogger("vit_linearizer")


#: Fewer held-out images than this deserve a word of caution.
_FEW_HELD_OUT = 20


def distill(config: DistillConfig) -> Path:
    """Distil a teacher into a student; see `DistillConfig`.

    Returns:
        The run folder. Its ``model/`` holds the student with the lowest held-out loss (of the last stage), in timm's
        folder format.

    Raises:
        UserError: anything in the configuration that cannot work; found before the training starts.
    """
    show_messages()
    route = choose_route(config)
    source = open_source(config.data, config.labels)
    train_numbers, held_out_numbers = split_held_out(len(source), config.seed)

    accelerator = make_accelerator(config)
    parts = accelerator.num_processes * config.gradient_accumulation
    recipes = route.recipes(len(train_numbers), parts)
    last = list(recipes.values())[-1]
    per_process = last.optimisation.batch_size // parts

    resolved = {
        "command": "distill",
        "teacher": config.teacher,
        "teacher_arch": config.teacher_arch,
        "teacher_pretrained": config.teacher_pretrained,
        "data": resolved_data(config.data),
        "images": len(source),
        "recipe": config.recipe,
        "image_size": list(route.image_size),
        "teacher_image_size": list(route.teacher_size),
        **route.settings,
        **route.described(recipes),
        **resolved_runtime(config, accelerator),
    }
    run = RunFolder(config.out, resolved)
    tasks = route.tasks(recipes)
    if not config.teacher_pretrained and not model_folder(config.teacher) and not Path(config.teacher).is_file():
        logger.warning("the teacher has random weights: this run shows that things work, and teaches nothing")
    if len(held_out_numbers) < _FEW_HELD_OUT:
        logger.warning("held out: %d images only; read their numbers as rough signs", len(held_out_numbers))
    if config.dry_run:
        logger.info("machine  %s, %s", accelerator.device, resolved["precision"])
        describe(route, recipes, tasks, source, len(train_numbers), per_process)
        return run.path

    with run.opened(resume=config.resume, writes=accelerator.is_main_process):
        skipped = SkippedList(run.skipped)
        if accelerator.is_main_process:
            for name, reason in source.skipped:
                skipped.add(name, reason)
        mask = None
        if isinstance(last, DistillationRecipe) and last.objectives.mask_ratio > 0:
            mask = MaskConfig(grid=route.grid, ratio=last.objectives.mask_ratio, masking=last.objectives.masking)
        data = prepare_data(
            source,
            train_numbers,
            held_out_numbers,
            image_size=route.image_size,
            views=last.views,
            mask=mask,
            seed=config.seed,
            batch_size=per_process,
            num_workers=choose_workers(config, accelerator.device),
            skipped=skipped,
        )
        logger.info("%s -> %s on %d images (%d held out, %d skipped), %s", config.teacher, route.student_name,
                    len(train_numbers), len(held_out_numbers), len(source.skipped), accelerator.device)  # fmt: skip
        stages = [Stage(name=name, task=task, optimisation=recipes[name].optimisation) for name, task in tasks.items()]
        train(stages, data, config, run, accelerator)
        logger.info("student: %s", run.model)
    if config.report and accelerator.is_main_process:
        close_with_report([run.path], run.path / "report.html")
    return run.path
