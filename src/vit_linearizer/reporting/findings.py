"""What a reader should know of runs and benchmarks, in words: warnings with what to do, and good news. Pure functions.

The bounds are choices; docs/metrics.md gives the reasons behind the rules.
"""

import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ..benchmarking.cases import size_text
from .records import BenchmarkRecord, Records
from .run_record import RunRecord, number
from .scores import ScoreTable
from .wording import METRICS, duration_words, key_words, listed, percent, plain, shown

#: A held-out loss that has not come below this part of its first value has not fallen.
_FALLEN = 0.98
#: A loss so far above its lowest, or an accuracy so many points below its highest, has turned.
_RISEN, _POINTS = 1.05, 2.0
_DATA_WAIT = 0.10
_AGREEMENT, _GAP = 0.01, 0.05
_FEW_HELD_OUT = 20
_FEW_STEPS = 100
_NOISE = 0.15
#: Accuracies (in points) and cosines nearer than this count as equal.
_EQUAL_POINTS, _EQUAL_COSINE = 1.0, 0.005
_STUCK = 0.9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing worth knowing.

    Attributes:
        rule: that found it.
        kind: ``warning``, ``note`` or ``good``.
        about: the run or benchmark.
        says: what was seen, in a sentence.
        do: what to do about it; empty for good news.
    """

    rule: str
    kind: Literal["warning", "note", "good"]
    about: str
    says: str
    do: str = ""


def find(records: Records, tables: Sequence[ScoreTable]) -> list[Finding]:
    """All findings, warnings first, then notes, then good news."""
    found = [finding for run in records.runs for finding in (*of_progress(run), *of_training(run), *of_data(run))]
    found += [finding for benchmark in records.benchmarks for finding in of_benchmark(benchmark)]
    found += behind_baseline(records, tables)
    found += [
        Finding(rule="unreadable", kind="note", about=run.name, says=problem, do="Look at the file, or leave it.")
        for run in records.runs
        for problem in run.problems
    ]
    found += [
        Finding(rule="unreadable", kind="note", about=records.title, says=problem, do="Look at the file, or leave it.")
        for problem in records.problems
    ]
    return sorted(found, key=lambda finding: ("warning", "note", "good").index(finding.kind))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Findings of one rule with one remedy, told together.

    Attributes:
        kind: of all of them.
        said: (about, sentence) of each.
        do: what to do about them.
    """

    kind: Literal["warning", "note", "good"]
    said: tuple[tuple[str, str], ...]
    do: str


def grouped(findings: Sequence[Finding], kind: str) -> list[Group]:
    """The findings of a kind, those of one rule and remedy together, in the order of the first of each."""
    found: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.kind == kind:
            found.setdefault((finding.rule, finding.do), []).append(finding)
    return [
        Group(kind=members[0].kind, said=tuple((member.about, member.says) for member in members), do=do)
        for (_, do), members in found.items()
    ]


def of_progress(run: RunRecord) -> Iterator[Finding]:
    """Runs that have not come to their end, or were too short to show anything."""
    planned = f" of about {run.planned_steps}" if run.planned_steps else ""
    if run.state in ("in progress", "stopped"):
        silent = f" {duration_words(run.silent_seconds)} ago" if run.silent_seconds is not None else ""
        at = f"It is at step {run.steps}{planned}; the last line was written{silent}."
        if run.state == "in progress":
            do = "Numbers are those so far. Make the report again later."
            yield Finding(rule="in progress", kind="note", about=run.name, says=f"Still in progress. {at}", do=do)
        else:
            do = "The same command goes on from the last checkpoint. Until then, numbers are those so far."
            says = f"Stopped or killed before its end. {at}"
            yield Finding(rule="stopped", kind="warning", about=run.name, says=says, do=do)
    if run.teacher_is_random:
        says = "The teacher has random weights, so there was nothing to learn from it."
        do = "Use this run to see that things work, and nothing else; leave --no-teacher-pretrained out for a real one."
        yield Finding(rule="random teacher", kind="warning", about=run.name, says=says, do=do)
    if run.state == "finished" and 0 < run.steps < _FEW_STEPS:
        says = f"Only {run.steps} steps in all, too few for a judgement."
        do = "They show that the program runs; more images, more --epochs or a smaller --batch-size give more."
        yield Finding(rule="few steps", kind="note", about=run.name, says=says, do=do)


def of_training(run: RunRecord) -> Iterator[Finding]:
    """What the held-out curves say."""
    for stage in run.stages:
        yield from _of_loss(run, stage)
    for key, lower in (("top1", 0), ("miou", 0), ("knn", 1)):
        values = [value for _, value in run.series("held_out", key)]
        if len(values) > 2 and max(values) - values[-1] > max(_POINTS, _chance(max(values), run.held_out_images)):
            peak = f"Held-out {key_words(key)} stood at {max(values):.1f} % and is now {values[-1]:.1f} %."
            if lower:
                do = (
                    "With few held-out images that can be chance. If the losses fall meanwhile, evaluate the teacher itself."
                )
                yield Finding(rule="knn falling", kind="note", about=run.name, says=peak, do=do)
            else:
                do = "model/ keeps the best weights. Fewer epochs, more images or more augmentation avoid the fall."
                yield Finding(rule="score falling", kind="warning", about=run.name, says=peak, do=do)
    yield from _of_agreement(run)
    for block in (key for key in run.keys("held_out") if key.startswith("attention_error_block")):
        values = [value for _, value in run.series("held_out", block)]
        if len(values) > 1 and values[-1] >= _STUCK:
            says = f"{key_words(block).capitalize()}, ended at {plain(values[-1])}; answering zero would give 1."
            do = "Try more --attention-epochs, or keep softmax attention in some blocks (--keep-softmax-blocks)."
            yield Finding(rule="attention stuck", kind="warning", about=run.name, says=says, do=do)


def _chance(percentage: float, images: int | None) -> float:
    """Two standard errors of an accuracy, in points; of at least one wrong image, since none leaves no error to see."""
    if not images:
        return 0.0
    share = min(max(percentage / 100, 1 / images), 1 - 1 / images) if images > 1 else 0.5
    return 200 * (share * (1 - share) / images) ** 0.5


def _of_loss(run: RunRecord, stage: str) -> Iterator[Finding]:
    """Whether the loss of one stage fell, and stayed down."""
    held_out = [value for _, value in run.series("held_out", "loss", stage)]
    training = [value for _, value in run.series("train", "loss", stage)]
    where = f" in the stage {stage}" if stage and len(run.stages) > 1 else ""
    first, last, seen = 0.0, 0.0, "held-out images"
    if len(held_out) > 1:
        first, last = held_out[0], held_out[-1]
    elif len(training) >= 9:
        third, seen = len(training) // 3, "training images"
        first, last = statistics.fmean(training[:third]), statistics.fmean(training[-third:])
    else:
        return
    span = f"the loss on {seen} went from {plain(first)} to {plain(last)}{where}"
    if last >= _FALLEN * first:
        do = "Try a lower or higher --learning-rate and more --epochs; look at the pictures in --data and at the teacher."
        yield Finding(rule="loss not falling", kind="warning", about=run.name, says=f"Not falling: {span}.", do=do)
        return
    lowest = min(held_out, default=last)
    if len(held_out) > 2 and last > _RISEN * lowest and run.command not in ("finetune", "segment"):
        says = f"The loss on held-out images rose again, from {plain(lowest)} to {plain(last)}{where}."
        do = "model/ keeps the weights of the lowest loss. More images, or fewer --epochs, avoid the rise."
        yield Finding(rule="loss rising", kind="warning", about=run.name, says=says, do=do)
        return
    yield Finding(rule="loss fell", kind="good", about=run.name, says=f"{span[0].upper()}{span[1:]}.")


def _of_agreement(run: RunRecord) -> Iterator[Finding]:
    fallen: list[str] = []
    risen: list[str] = []
    for key in (key for key in run.keys("held_out") if key.startswith("agreement_stage")):
        values = [value for _, value in run.series("held_out", key)]
        if len(values) > 1:
            moved = f"stage {key.removeprefix('agreement_stage')} from {values[0]:.3f} to {values[-1]:.3f}"
            slack = min(_AGREEMENT, _GAP * (1 - values[0]))  # of agreements that start near 1 the gap counts
            (fallen if values[-1] < values[0] - slack else risen).append(moved)
    final = [value for _, value in run.series("held_out", "final_cosine")]
    if fallen:
        closer = len(final) > 1 and final[-1] > final[0]
        says = f"The activation maps agree less with the teacher's than at the start: {listed(fallen)}."
        if closer:
            do = "The final features came closer meanwhile, so judge by accuracy; activation matching would hold the maps."
        else:
            do = "Try a lower --learning-rate, or more weight on --activation-matching-weight where the recipe has it."
        yield Finding(rule="agreement falling", kind="note" if closer else "warning", about=run.name, says=says, do=do)
    elif risen:
        says = (
            f"The activation maps agree with the teacher's at every stage at least as well as at the start: {listed(risen)}."
        )
        yield Finding(rule="agreement rose", kind="good", about=run.name, says=says)


def of_data(run: RunRecord) -> Iterator[Finding]:
    """Waiting for data, few held-out images, files passed over."""
    wait = [value for _, value in run.series("train", "data_wait")]
    if wait and wait[-1] > _DATA_WAIT:
        says = f"{percent(wait[-1])} of the training time was spent waiting for images."
        if not number(run.config.get("num_workers")) and run.device == "cpu":
            do = "Without loader processes this is decoding and augmenting; --num-workers 1 may help where a core is free."
        else:
            do = "Try more --num-workers, beside a GPU --device-augmentation in a new run, smaller files, or a faster disk."
        yield Finding(rule="data wait", kind="warning", about=run.name, says=says, do=do)
    images = run.held_out_images
    if images is not None and images < _FEW_HELD_OUT:
        says = f"Held-out numbers come from {images} image{'s' if images > 1 else ''} only."
        do = "Read them as rough signs; a twentieth of the images is held out, so more images in --data give more."
        yield Finding(rule="few held out", kind="warning", about=run.name, says=says, do=do)
    if run.skipped:
        some = listed([" ".join(line.split("\t")[0].split()) for line in run.skipped], most=3)
        says = (
            f"{len(run.skipped)} file{'s' if len(run.skipped) > 1 else ''} could not be read and were passed over: {some}."
        )
        do = "skipped.txt in the run's folder gives the reason of each."
        yield Finding(rule="skipped", kind="note", about=run.name, says=says, do=do)


def of_benchmark(benchmark: BenchmarkRecord) -> Iterator[Finding]:
    """Noise of the machine, what could not be measured, and a benchmark that is not complete."""
    about = f"benchmark in {benchmark.folder.resolve().name}"
    spreads = [((row["spread"][1] - row["spread"][0]) / row["seconds_median"], row) for row in benchmark.measured]
    noisy = [(spread, row) for spread, row in spreads if spread > _NOISE]
    if noisy:
        spread, row = max(noisy, key=lambda pair: pair[0])
        says = (
            f"The repeats of {len(noisy)} of {len(spreads)} measurements differ by more than {percent(_NOISE)}, at most by "
            f"{percent(spread)} (at {size_text(row['image_size'])})."
        )
        do = "Something else used the machine; smaller differences are noise. Measure on a quiet one, with more --repeats."
        yield Finding(rule="machine noise", kind="warning", about=about, says=says, do=do)
    if not benchmark.complete:
        do = "The same vit-linearizer benchmark command goes on."
        yield Finding(rule="benchmark unfinished", kind="note", about=about, says="The benchmark is not complete.", do=do)
    failed = [row for row in benchmark.rows if row["status"] != "ok"]
    if failed:
        texts = list(dict.fromkeys(f"{row['model']} at {size_text(row['image_size'])}: {row['status']}" for row in failed))
        says = f"{len(failed)} measurement{'s' if len(failed) > 1 else ''} could not be taken ({listed(texts, most=3)})."
        do = "Smaller --image-sizes or --batch-size, or more memory, give the missing numbers."
        yield Finding(rule="not measured", kind="note", about=about, says=says, do=do)


def behind_baseline(records: Records, tables: Sequence[ScoreTable]) -> list[Finding]:
    """Students against plain feature regression of the same teacher: by accuracy where both have one, else by cosine."""
    found = []
    distilled = [run for run in records.runs if run.command == "distill"]
    for run in (run for run in distilled if not run.is_baseline):
        for baseline in (other for other in distilled if other.is_baseline):
            same = all(
                run.config.get(key) == baseline.config.get(key) for key in ("teacher", "student", "student_args", "data")
            )
            if same:
                found += _against(run, baseline, tables)
    return found


def _against(run: RunRecord, baseline: RunRecord, tables: Sequence[ScoreTable]) -> list[Finding]:
    ours, theirs = str(run.path.resolve()), str(baseline.path.resolve())
    parts: list[tuple[float, str]] = []
    for table in tables:
        if ours in table.rows and theirs in table.rows and not parts:
            for key in ("top1", "knn", "linear_probe", "few_shot"):
                pair = table.rows[ours].get(key), table.rows[theirs].get(key)
                if pair[0] is not None and pair[1] is not None:
                    text = f"{METRICS[key].title} {shown(pair[0], METRICS[key])} % against {shown(pair[1], METRICS[key])} %"
                    parts.append(((pair[0] - pair[1]) / _EQUAL_POINTS, text))
    if not parts:
        cosines = [[value for _, value in one.series("held_out", "final_cosine")] for one in (run, baseline)]
        if all(cosines):
            mine, other = cosines[0][-1], cosines[1][-1]
            parts.append(((mine - other) / _EQUAL_COSINE, f"final cosine {mine:.3f} against {other:.3f}"))
    if not parts:
        return []
    behind = [text for difference, text in parts if difference < -1]
    if behind:
        says = f"Behind plain feature regression ({baseline.name}): {listed(behind)}."
        do = (
            f"Train longer, or check the weights of the losses; else use the simpler one: {shlex.quote(str(baseline.path))}."
        )
        return [Finding(rule="behind baseline", kind="warning", about=run.name, says=says, do=do)]
    says = f"At least level with plain feature regression ({baseline.name}): {listed([text for _, text in parts])}."
    return [Finding(rule="ahead of baseline", kind="good", about=run.name, says=says)]
