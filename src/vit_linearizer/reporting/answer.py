"""The answer at the top of the page, for a reader who knows none of the papers: did it work, how close is it, is it faster.

Each is one sentence or two a model, from the numbers of docs/metrics.md. The bounds of the verdicts are choices.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..benchmarking.cases import size_text
from .records import BenchmarkRecord, Records
from .run_record import RunRecord, number
from .scores import ScoreTable
from .wording import METRICS, listed, percent, plain, shown, times

Grade = Literal["good", "partly", "bad", "open"]

#: Part of its first value that a held-out loss has to come below; parts of the gap to 1 that the final cosine has to close.
_CLEARLY_FALLEN, _CLEARLY_CLOSER, _CLOSER = 0.9, 0.25, 0.05
#: Points that an accuracy has to rise by.
_RISEN = 5.0
_FEW_STEPS = 100
#: What is nearer to 1 than this is no difference in speed, as in `benchmarking.summary`.
_CLEARLY_FASTER = 1.03


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said of one model.

    Attributes:
        about: its name.
        grade: of the sentence, for its mark.
        verdict: a word or two.
        says: the sentences.
        command: that measures what is missing, or empty.
    """

    about: str
    grade: Grade
    verdict: str
    says: str
    command: str = ""


def subjects(records: Records) -> list[RunRecord]:
    """The runs that the report is about: distilled students, else what else there is."""
    distilled = [run for run in records.runs if run.command == "distill"]
    return [run for run in distilled if not run.is_baseline] or distilled or list(records.runs)


def did_it_work(run: RunRecord, records: Records) -> Answer:
    """Whether training did what it is for, by held-out images and, in a quickstart, by labels."""
    if run.command in ("finetune", "segment"):
        return _did_training_work(run)
    stage = run.stages[-1] if run.stages else None
    losses = [value for _, value in run.series("held_out", "loss", stage)]
    cosines = [value for _, value in run.series("held_out", "final_cosine")]
    if run.teacher_is_random:
        says = "The teacher has random weights, so there was nothing to learn; this run shows only that the program runs."
        return Answer(about=run.name, grade="open", verdict="It cannot tell.", says=says)
    if len(losses) < 2:
        says = "The held-out images were not judged twice yet, so there is nothing to compare the start with."
        return Answer(about=run.name, grade="open", verdict="Too early to say.", says=says)
    closed = (cosines[-1] - cosines[0]) / max(1e-9, 1 - cosines[0]) if len(cosines) > 1 else None
    fallen = losses[-1] < _CLEARLY_FALLEN * losses[0]
    says = f"On images kept out of training, the loss went from {plain(losses[0])} to {plain(losses[-1])}"
    if closed is not None:
        gone = f"{percent(closed)} of the distance between its features and the teacher's is gone"
        away = (
            f"its features are further from the teacher's than at the start (cosine {cosines[0]:.3f} to {cosines[-1]:.3f})"
        )
        says += f", and {gone if closed >= 0 else away}"
    says += "." + _by_labels(run, records)
    if run.state != "finished" and run.state != "unknown":
        says = f"So far (step {run.steps}{f' of about {run.planned_steps}' if run.planned_steps else ''}): {says}"
    if fallen and (closed is None or closed >= _CLEARLY_CLOSER):
        grade, verdict = "good", "Yes."
    elif losses[-1] < losses[0] and (closed is None or closed >= _CLOSER):
        grade, verdict = "partly", "In part."
    else:
        grade, verdict = "bad", "No."
    if run.steps < _FEW_STEPS:
        grade, verdict, says = "open", "Too short to say.", f"{run.steps} steps are a trial. {says}"
    return Answer(about=run.name, grade=grade, verdict=verdict, says=says)  # type: ignore[arg-type]  # grades are literals


def _did_training_work(run: RunRecord) -> Answer:
    key = "miou" if run.command == "segment" else "top1"
    values = [value for _, value in run.series("held_out", key)]
    name = METRICS[key].title
    if len(values) < 2:
        says = f"Held-out {name} was not measured twice yet."
        return Answer(about=run.name, grade="open", verdict="Too early to say.", says=says)
    best = max(values)
    says = f"{name} on held-out images went from {values[0]:.1f} % to {best:.1f} % (the best, whose weights are kept)."
    good = best - values[0] >= _RISEN
    return Answer(about=run.name, grade="good" if good else "bad", verdict="Yes." if good else "No.", says=says)


def _by_labels(run: RunRecord, records: Records) -> str:
    """What a quickstart's labels say of it before and after."""
    rows = _quickstart_rows(run, records)
    before, after = rows.get("untrained", {}), rows.get(run.path.resolve().name, {})
    student = run.config.get("student")
    pair = number(before.get("knn")), number(after.get("knn"))
    if student is None or pair[0] is None or pair[1] is None:
        return ""
    return f" Test digits told apart by its features (kNN): {pair[0]:.1f} % untrained, {pair[1]:.1f} % distilled."


def _quickstart_rows(run: RunRecord, records: Records) -> Mapping[str, Mapping[str, Any]]:
    for comparison in records.comparisons:
        if comparison.quickstart and comparison.file.parent.resolve() == run.path.resolve().parent:
            return comparison.models
    return {}


def how_close(run: RunRecord, records: Records, tables: Sequence[ScoreTable]) -> Answer:
    """How far the student is from its teacher, by features and by every accuracy that both have."""
    teacher = run.config.get("teacher")
    if run.command in ("finetune", "segment") or not isinstance(teacher, str):
        says = "This model was trained on labels, not distilled from a teacher."
        return Answer(about=run.name, grade="open", verdict="Not asked.", says=says)
    ours, theirs = str(run.path.resolve()), _teacher_identity(run, teacher, records)
    parts = []
    for table in tables:
        if ours in table.rows and theirs in table.rows:
            for key in ("top1", "knn", "linear_probe", "few_shot", "finetuned_100_percent"):
                pair = table.rows[ours].get(key), table.rows[theirs].get(key)
                if pair[0] is not None and pair[1] is not None:
                    parts.append((pair[0] - pair[1], f"{METRICS[key].title} {shown(pair[0], METRICS[key])} % "
                                  f"(teacher {shown(pair[1], METRICS[key])} %)"))  # fmt: skip
            break
    cosines = [value for _, value in run.series("held_out", "final_cosine")]
    says = ""
    grade: Grade = "open"
    verdict = "Not measured."
    if cosines:
        grade = "good" if cosines[-1] >= 0.9 else "partly" if cosines[-1] >= 0.7 else "bad"
        if cosines[-1] < cosines[0]:
            grade = "bad" if grade == "bad" else "partly"
        verdict = f"{cosines[-1]:.3f} of 1."
        start = f"; the start was {cosines[0]:.3f}" if len(cosines) > 1 else ""
        says = f"So well can the teacher's features be read from the student's (1 is perfectly{start})."
    if parts:
        says = f"{says} Accuracies: {listed([text for _, text in parts[:3]])}.".strip()
        verdict = verdict if cosines else "By accuracy."
        worst = min(difference for difference, _ in parts)
        grade = "good" if worst >= -1 else "partly" if worst >= -_RISEN else "bad"
    if not cosines and not parts:
        says = "No fidelity was found in this run's metrics."
    architecture = run.config.get("teacher_arch")
    named = ("--models-arch", architecture, "--teacher-arch", architecture) if architecture else ()
    command = _shell("vit-linearizer evaluate --models", run.path, teacher, *named, "--teacher", teacher, "--data FOLDER")
    command = "" if parts else command
    if not parts:
        says += " Accuracies of student and teacher on labelled images were not measured:"
    return Answer(about=run.name, grade=grade, verdict=verdict, says=says, command=command)


def _teacher_identity(run: RunRecord, teacher: str, records: Records) -> str:
    """The teacher among the runs: by its path, or, in a moved folder, beside the student."""
    found = records.identity(teacher)
    beside = run.path.resolve().parent / teacher.rstrip("/").rpartition("/")[2]
    return str(beside) if records.run_of(found) is None and records.run_of(str(beside)) is not None else found


def is_it_faster(run: RunRecord, records: Records) -> Answer:
    """From which image size the model is faster than the one it was measured against."""
    ours = str(run.path.resolve())
    for benchmark in records.benchmarks:
        for summary in benchmark.summaries:
            if records.identity(summary["model"], benchmark) == ours and summary["crossover"] is not None:
                return _in_words(run, summary, benchmark, records)
    first = run.config.get("teacher_arch") or run.config.get("teacher")
    command = _shell(
        "vit-linearizer benchmark --models", *([first] if isinstance(first, str) else []), run.path, "--out", run.path
    )
    return Answer(about=run.name, grade="open", verdict="Not measured.", says="This measures it:", command=command)


def _in_words(run: RunRecord, summary: Mapping[str, Any], benchmark: BenchmarkRecord, records: Records) -> Answer:
    crossover = summary["crossover"]
    reference = records.name_of(benchmark.rows[0]["model"], benchmark)
    (low, slow), (high, fast) = (
        (size_text(crossover[e]["image_size"]), crossover[e]["speedup"]) for e in ("smallest", "largest")
    )
    ends = f"{times(fast)} as fast as {reference} at {high} pixels" + (f", {times(slow)} at {low}" if low != high else "")
    where = f" ({summary['precision']}, {benchmark.machine.partition(';')[0]})"
    if crossover["result"] == "not reached":
        says = f"No faster at the largest size measured: {ends}{where}. Larger images favour it: try larger --image-sizes."
        return Answer(about=run.name, grade="bad", verdict=f"Not up to {high}.", says=says)
    if crossover["result"] == "reached":
        start = size_text(crossover["image_size"])
        says = f"Faster from {start} pixels on, level at about {crossover['tokens']:,} patches an image: {ends}{where}."
        return Answer(about=run.name, grade="good", verdict=f"From {start} on.", says=says)
    if slow < _CLEARLY_FASTER:
        says = f"No slower at any size measured: {ends}{where}."
        return Answer(about=run.name, grade="good", verdict=f"Level at {low}, faster above.", says=says)
    says = f"{ends[0].upper()}{ends[1:]}{where}."
    return Answer(about=run.name, grade="good", verdict="At every size measured.", says=says)


def _shell(command: str, *words: object) -> str:
    """A command line; paths and names are quoted, words in capitals are for the user to fill in."""
    return " ".join([command, *(str(word) if str(word).startswith("--") else shlex.quote(str(word)) for word in words)])
