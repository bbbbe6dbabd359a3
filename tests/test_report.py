"""``report``: reading runs of any state, the rules behind its sentences, the numbers on the page, escaping, no network."""

import html
import json
import os
import re
from html.parser import HTMLParser

import pytest

from report_runs import (
    BASELINE,
    benchmark_row,
    crossing_rows,
    good_lines,
    held_out,
    train,
    write_benchmark,
    write_run,
)
from vit_linearizer.commands.distill import distill
from vit_linearizer.commands.report import ReportConfig, report
from vit_linearizer.contracts import UserError
from vit_linearizer.reporting.answer import did_it_work, how_close, is_it_faster, subjects
from vit_linearizer.reporting.cards import card, settings_tables
from vit_linearizer.reporting.charts import label
from vit_linearizer.reporting.curves import run_charts, stage_chart, thin
from vit_linearizer.reporting.findings import find, grouped
from vit_linearizer.reporting.map_pictures import map_pictures
from vit_linearizer.reporting.page import write_report
from vit_linearizer.reporting.records import read_records
from vit_linearizer.reporting.run_record import number, read_run
from vit_linearizer.reporting.scores import score_tables, trade_off
from vit_linearizer.reporting.speed_charts import benchmark_charts, trade_off_chart
from vit_linearizer.reporting.wording import duration_words, listed, plain

HOSTILE = "<img src=x onerror=alert(1)>"


def rules(*folders):
    """{rule: findings} of what lies in folders."""
    records = read_records(folders)
    found = {}
    for finding in find(records, score_tables(records)):
        found.setdefault(finding.rule, []).append(finding)
    return found


def age(folder, seconds):
    """Make a run look as if nothing had been written for so long."""
    for file in (folder / "metrics.jsonl", folder / "run.log"):
        stamp = file.stat().st_mtime - seconds
        os.utime(file, (stamp, stamp))
    return folder


# --- reading


def test_a_run_is_read_with_its_series_stages_and_times(tmp_path):
    run = read_run(write_run(tmp_path / "run", skipped=("a.jpg", "b.jpg")), "run")
    assert run.series("held_out", "loss") == [(0, 2.0), (100, 1.0), (200, 0.6), (300, 0.5), (400, 0.4)]
    assert run.keys("held_out") == ("loss", "knn", "final_cosine", "agreement_stage1", "agreement_stage2")
    assert (run.steps, run.planned_steps, run.state, run.stages) == (400, 400, "finished", ("distillation",))
    assert (run.held_out_images, run.seconds, run.device) == (50, 300.0, "cpu")
    assert len(run.skipped) == 2 and run.problems == ()


def test_broken_and_half_written_lines_are_left_out_and_counted(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    odd = [
        '{"step": 1',
        "[1, 2]",
        '{"split": "train"}',
        '{"step": "3", "split": "train"}',
        '{"step": true, "split": "train"}',
    ]
    strange = '{"step": 5, "split": "held_out", "loss": NaN, "new_key": {"a": 1}, "big": 1' + "0" * 400 + "}"
    (folder / "metrics.jsonl").write_text("\n".join([*odd, strange, *lines, lines[-1][:20]]))
    run = read_run(folder, "run")
    assert len(run.lines) == len(lines) + 1
    assert run.problems == ("5 lines of metrics.jsonl could not be read and were left out.",)
    assert run.series("held_out", "loss") == read_run(write_run(tmp_path / "other"), "other").series("held_out", "loss")
    assert "new_key" not in run.keys("held_out") and "big" not in run.keys("held_out")


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "run.log", "evaluation.json"])
def test_any_missing_or_broken_file_leaves_a_run(tmp_path, missing):
    folder = write_run(tmp_path / "run", evaluation={"step": 400, "loss": 0.4})
    (folder / missing).unlink()
    assert read_run(folder, "run") is not None
    assert write_report([folder], tmp_path / "a.html", maps=False).is_file()
    (folder / missing).write_bytes(b'\xff\xfe{"half": ')
    assert read_run(folder, "run") is not None
    assert write_report([folder], tmp_path / "b.html", maps=False).is_file()


def test_states_are_told_apart(tmp_path):
    half = good_lines()[:6]
    assert read_run(write_run(tmp_path / "busy", half), "busy").state == "in progress"
    assert read_run(age(write_run(tmp_path / "dead", half), 3600), "dead").state == "stopped"
    assert read_run(age(write_run(tmp_path / "done"), 3600), "done").state == "finished"
    unheard = [*good_lines()[:-1]]  # the last step is done, its evaluation is not
    assert read_run(write_run(tmp_path / "almost", unheard), "almost").state == "in progress"
    begun = write_run(tmp_path / "begun", [], log=())
    assert (read_run(begun, "begun").state, read_run(begun, "begun").steps) == ("in progress", 0)
    in_steps = read_run(age(write_run(tmp_path / "steps", epochs=None, iterations=500), 3600), "steps")
    assert (in_steps.state, in_steps.planned_steps) == ("stopped", 500)


def test_runs_older_than_stages_have_one(tmp_path):
    old = [{key: value for key, value in line.items() if key != "stage"} for line in good_lines()]
    run = read_run(write_run(tmp_path / "old", old), "old")
    assert run.stages == ("",) and run.state == "finished"
    assert "loss fell" in rules(tmp_path / "old")
    assert not run_charts(run)[0].figure.layout.shapes


STAGED = {
    "epochs": None,
    "attention_alignment": {"epochs": 1, "iterations": None, "learning_rate": 0.1, "batch_size": 100},
    "feature_alignment": {"epochs": 1, "iterations": None, "learning_rate": 0.1, "feature_alignment_weight": 1.0},
}


def staged_lines():
    lines = [held_out(0, "attention alignment", loss=5.0, attention_error_block1=0.8, final_cosine=0.5)]
    lines += [train(step, "attention alignment", loss=4.0, attention_alignment=4.0) for step in (50, 100)]
    lines += [held_out(100, "attention alignment", loss=1.0, attention_error_block1=0.1, final_cosine=0.7)]
    lines += [held_out(100, "feature alignment", loss=50.0, final_cosine=0.7)]
    lines += [train(step, "feature alignment", loss=40.0, feature_alignment=40.0) for step in (150, 200)]
    return [*lines, held_out(200, "feature alignment", loss=10.0, final_cosine=0.9)]


def test_stages_are_judged_and_drawn_apart(tmp_path):
    folder = write_run(tmp_path / "adala", staged_lines(), **STAGED)
    run = read_run(folder, "adala")
    assert (run.stages, run.state, run.planned_steps) == (("attention alignment", "feature alignment"), "finished", 200)
    found = rules(folder)
    assert [finding.says.endswith(f"in the stage {stage}.") for finding, stage in
            zip(found["loss fell"], run.stages, strict=True)] == [True, True]  # fmt: skip
    assert "loss not falling" not in found
    losses, likeness, blocks = run_charts(run)
    assert [shape.x0 for shape in losses.figure.layout.shapes] == [100]
    assert losses.figure.data[0].x == (0, 100, None, 100, 200)  # open at the boundary
    assert "feature alignment at step 100" in losses.caption
    assert likeness.figure.data[0].y == (0.5, 0.7, 0.9)
    assert blocks.figure.data[0].y == (0.8, 0.1)
    assert "from 50 to 10" in did_it_work(run, read_records([folder])).says  # the last stage's loss, not the jump


def test_folders_of_runs_are_found_and_named_apart(tmp_path):
    for parent in ("a", "b"):
        write_run(tmp_path / parent / "student", seed=len(parent))
    (tmp_path / "a" / "model").mkdir()
    (tmp_path / "a" / "model" / "config.json").write_text('{"architecture": "vit"}')
    records = read_records([tmp_path / "a", tmp_path / "b" / "student", tmp_path / "a" / "student"])
    assert [run.name for run in records.runs] == ["a/student", "b/student"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder; give the --out folder of a run"),
        (lambda folder: folder.mkdir(), "holds no run: neither config.json and metrics.jsonl"),
        (lambda folder: folder.write_text("text"), "is a file; give the folder of a run"),
        (lambda folder: (folder.mkdir(), (folder / "metrics.jsonl").write_text('{"accuracy": 1}\n')), "holds no run"),
        (
            lambda folder: (folder.mkdir(), (folder / "benchmark.json").write_text('{"rows": [{"model": 1}]}')),
            "holds no run",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "there")
    with pytest.raises(UserError, match=rf"^runs .*there: .*{re.escape(message)[:40]}"):
        report(ReportConfig(runs=(str(tmp_path / "there"),), out=str(tmp_path / "report.html")))
    assert not (tmp_path / "report.html").exists()


def test_bad_targets_and_no_runs_are_refused(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"--out .*: is a folder; give a file"):
        write_report([run], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*: cannot be written: "):
        write_report([run], tmp_path / "file" / "report.html", maps=False)
    with pytest.raises(UserError, match="name at least one run folder"):
        ReportConfig(runs=())


# --- sentences


def test_a_good_run_gets_good_news_and_no_warning(tmp_path):
    found = rules(write_run(tmp_path / "run"))
    assert set(found) == {"loss fell", "agreement rose"}


@pytest.mark.parametrize(
    ("rule", "lines", "config"),
    [
        ("loss not falling", [held_out(0, loss=1.0), held_out(200, loss=0.99), held_out(400, loss=0.985)], {}),
        ("loss not falling", [train(10 * step, loss=1.0 + step % 2) for step in range(1, 13)], {}),
        ("loss rising", [held_out(0, loss=2.0), held_out(200, loss=1.0), held_out(400, loss=1.1)], {}),
        ("knn falling", [held_out(step, knn=knn) for step, knn in ((0, 60.0), (200, 95.0), (400, 70.0))], {}),
        ("score falling", [held_out(step, top1=top1) for step, top1 in ((0, 10.0), (200, 95.0), (400, 70.0))], {}),
        ("agreement falling", [held_out(0, agreement_stage1=0.8), held_out(400, agreement_stage1=0.7)], {}),
        ("agreement falling", [held_out(0, agreement_stage1=0.98), held_out(400, agreement_stage1=0.976)], {}),
        ("attention stuck", [held_out(0, attention_error_block2=1.5), held_out(400, attention_error_block2=0.95)], {}),
        ("data wait", [train(400, loss=1.0) | {"data_wait": 0.11}], {}),
        ("random teacher", None, {"teacher_pretrained": False}),
    ],
)
def test_every_rule_of_a_run_speaks_when_it_should(tmp_path, rule, lines, config):
    found = rules(write_run(tmp_path / "run", lines, **config))
    assert len(found[rule]) == 1
    assert found[rule][0].do and found[rule][0].about == "run"


def test_a_fall_of_agreement_is_milder_where_the_features_came_closer(tmp_path):
    lines = [held_out(0, agreement_stage1=0.8, final_cosine=0.3), held_out(400, agreement_stage1=0.7, final_cosine=0.9)]
    (finding,) = rules(write_run(tmp_path / "run", lines))["agreement falling"]
    assert finding.kind == "note" and "stage 1 from 0.800 to 0.700" in finding.says


def test_a_fall_of_accuracy_within_chance_is_none(tmp_path):
    lines = [held_out(step, top1=top1) for step, top1 in ((0, 10.0), (200, 95.0), (400, 90.0))]
    assert "score falling" not in rules(write_run(tmp_path / "few", lines, log=("(50 held out",)))
    assert "score falling" in rules(write_run(tmp_path / "many", lines, log=("(5000 held out",)))


def test_data_wait_names_the_flag_that_helps(tmp_path):
    waiting = [train(400, loss=1.0) | {"data_wait": 0.5}]
    (alone,) = rules(write_run(tmp_path / "cpu", waiting))["data wait"]
    (helped,) = rules(write_run(tmp_path / "gpu", waiting, num_workers=4))["data wait"]
    assert alone.says.startswith("50 % of the training time") and "--num-workers 1" in alone.do
    assert "more --num-workers" in helped.do


def test_held_out_images_and_skipped_files_are_counted(tmp_path):
    found = rules(write_run(tmp_path / "run", log=("(19 held out",), skipped=("x.jpg", "y.jpg")))
    assert "come from 19 images only" in found["few held out"][0].says
    assert found["skipped"][0].says == "2 files could not be read and were passed over: x.jpg and y.jpg."
    by_rule = write_run(tmp_path / "no_log", log=(), images=100)
    assert "come from 5 images only" in rules(by_rule)["few held out"][0].says  # a twentieth
    assert "few held out" not in rules(write_run(tmp_path / "enough", log=("(20 held out",)))


def test_progress_and_kills_are_told(tmp_path):
    half = good_lines()[:6]
    busy = rules(write_run(tmp_path / "busy", half))["in progress"][0]
    dead = rules(age(write_run(tmp_path / "dead", half), 7200))["stopped"][0]
    assert "step 200 of about 400" in busy.says and busy.kind == "note"
    assert "2 h 0 min ago" in dead.says and "goes on from the last checkpoint" in dead.do
    assert "few steps" in rules(write_run(tmp_path / "short", [held_out(0, loss=1.0), held_out(9, loss=0.5)], epochs=0.09))


def test_a_student_is_held_against_plain_regression(tmp_path):
    write_run(tmp_path / "student")
    worse = [line | ({"final_cosine": 0.8} if "final_cosine" in line else {}) for line in good_lines()]
    baseline = write_run(tmp_path / "regression", worse, **BASELINE)
    assert "final cosine 0.920 against 0.800" in rules(tmp_path)["ahead of baseline"][0].says
    better = [line | ({"final_cosine": 0.99} if "final_cosine" in line else {}) for line in good_lines()]
    write_run(baseline, better, **BASELINE)
    assert rules(tmp_path)["behind baseline"][0].about == "student"
    write_run(baseline, better, **{**BASELINE, "teacher": "another"})
    assert not {"behind baseline", "ahead of baseline"} & set(rules(tmp_path))
    # accuracies on labels go before cosines
    write_run(baseline, better, **BASELINE)
    scores = {"student": {"knn": 90.0, "few_shot": 80.0}, "regression": {"knn": 80.0, "few_shot": 80.5}}
    (tmp_path / "quickstart.json").write_text(json.dumps(scores))
    assert "kNN 90.0 % against 80.0 %" in rules(tmp_path)["ahead of baseline"][0].says


def test_a_benchmark_tells_of_noise_and_gaps(tmp_path):
    rows = crossing_rows("teacher", "student")
    assert rules(write_benchmark(tmp_path / "quiet", rows)) == {}
    loud = [
        *rows[:-1],
        benchmark_row("student", 896, 1.0, spread=0.3),
        benchmark_row("vit", 896, 1.0, status="out of memory"),
    ]
    found = rules(write_benchmark(tmp_path / "loud", loud, complete=False))
    assert "1 of 6 measurements differ by more than 15 %, at most by 30 %" in found["machine noise"][0].says
    assert "vit at 896x896: out of memory" in found["not measured"][0].says
    assert "benchmark unfinished" in found


def test_findings_of_one_rule_and_remedy_are_told_together(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, log=("(5 held out",))
    records = read_records([tmp_path])
    (group,) = grouped(find(records, []), "warning")
    assert [about for about, _ in group.said] == ["a", "b"]


# --- the answer


def test_features_that_moved_away_are_called_so(tmp_path):
    lines = [held_out(0, loss=0.55, final_cosine=0.95), held_out(400, loss=0.4, final_cosine=0.92)]
    write_run(tmp_path / "student", lines, teacher="teach.pth", teacher_arch="vit_tiny_patch16_224")
    records = read_records([tmp_path])
    (run,) = subjects(records)
    assert "further from the teacher's than at the start (cosine 0.950 to 0.920)" in did_it_work(run, records).says
    close = how_close(run, records, score_tables(records))
    assert close.grade == "partly"
    assert (
        "teach.pth --models-arch vit_tiny_patch16_224 --teacher-arch vit_tiny_patch16_224 --teacher teach.pth"
        in close.command
    )
    assert "--models vit_tiny_patch16_224 " in is_it_faster(run, records).command


def test_the_answer_of_a_run_that_worked(tmp_path):
    write_run(tmp_path / "student", teacher=str(tmp_path / "teacher"))
    write_run(tmp_path / "teacher", [held_out(0, top1=10.0), held_out(400, top1=90.0)], command="finetune")
    rows = crossing_rows(str(tmp_path / "teacher"), str(tmp_path / "student"))
    write_benchmark(tmp_path, rows)
    (tmp_path / "quickstart.json").write_text(
        json.dumps({"teacher": {"knn": 93.0}, "student": {"knn": 92.5}, "untrained": {"knn": 50.0}})
    )
    records = read_records([tmp_path])
    (run,) = subjects(records)
    worked = did_it_work(run, records)
    assert (worked.grade, worked.verdict) == ("good", "Yes.")
    assert "from 2 to 0.4" in worked.says and "90 % of the distance" in worked.says  # (0.92 - 0.2) / (1 - 0.2)
    assert "50.0 % untrained, 92.5 % distilled" in worked.says
    close = how_close(run, records, score_tables(records))
    assert close.verdict == "0.920 of 1." and "kNN 92.5 % (teacher 93.0 %)" in close.says and not close.command
    faster = is_it_faster(run, records)
    assert faster.verdict == "From 448x448 on."
    # equal where the lines of log time cross: slower by 1.25 at 196 tokens, faster by 1.25 at 784, so half way
    assert "level at about 392 patches" in faster.says
    assert "4.00 times as fast as teacher at 896x896 pixels, 0.80 times at 224x224" in faster.says


@pytest.mark.parametrize(
    ("lines", "config", "grade", "verdict"),
    [
        ([held_out(0, loss=1.0, final_cosine=0.5)], {}, "open", "Too early"),
        ([held_out(0, loss=1.0, final_cosine=0.5), held_out(400, loss=1.1, final_cosine=0.5)], {}, "bad", "No."),
        ([held_out(0, loss=1.0, final_cosine=0.5), held_out(400, loss=0.5, final_cosine=0.4)], {}, "bad", "No."),
        ([held_out(0, loss=1.0, final_cosine=0.5), held_out(400, loss=0.95, final_cosine=0.55)], {}, "partly", "In part."),
        (
            [held_out(0, loss=1.0, final_cosine=0.5), held_out(9, loss=0.1, final_cosine=0.9)],
            {"epochs": 1},
            "open",
            "Too short",
        ),
        (None, {"teacher_pretrained": False}, "open", "It cannot tell."),
        ([held_out(0, top1=10.0), held_out(400, top1=80.0)], {"command": "finetune"}, "good", "Yes."),
        ([held_out(0, miou=10.0), held_out(400, miou=11.0)], {"command": "segment"}, "bad", "No."),
    ],
)
def test_verdicts(tmp_path, lines, config, grade, verdict):
    records = read_records([write_run(tmp_path / "run", lines, **config)])
    answer = did_it_work(records.runs[0], records)
    assert (answer.grade, answer.verdict[: len(verdict)]) == (grade, verdict)


def test_what_was_not_measured_comes_with_its_command(tmp_path):
    records = read_records([write_run(tmp_path / "a run")])
    faster = is_it_faster(records.runs[0], records)
    assert faster.verdict == "Not measured."
    assert faster.command == (
        f"vit-linearizer benchmark --models vit_base_patch16_224 '{tmp_path}/a run' --out '{tmp_path}/a run'"
    )
    assert "vit-linearizer evaluate" in how_close(records.runs[0], records, []).command


@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        (((0.1, 0.2), (0.5, 0.6)), "Not up to 448x448."),
        (((0.1, 0.05), (0.5, 0.1)), "At every size measured."),
        (((0.1, 0.099), (0.5, 0.1)), "Level at 224x224, faster above."),
    ],
)
def test_speeds_in_words_whichever_way_they_go(tmp_path, times, verdict):
    run = write_run(tmp_path / "student")
    rows = []
    for side, (teacher, student) in zip((224, 448), times, strict=True):
        rows += [benchmark_row("vit", side, teacher, attention="fused"), benchmark_row(str(run), side, student)]
    records = read_records([run, write_benchmark(tmp_path / "speed", rows)])
    assert is_it_faster(records.runs[0], records).verdict == verdict


def test_a_moved_folder_still_knows_its_models(tmp_path):
    write_run(tmp_path / "moved" / "student")
    write_benchmark(tmp_path / "moved", crossing_rows("runs/old/teacher", "runs/old/student"), out="runs/old")
    records = read_records([tmp_path / "moved"])
    assert is_it_faster(records.runs[0], records).verdict == "From 448x448 on."


# --- tables and charts


def test_scores_stand_together_where_they_compare(tmp_path):
    settings = {"data": "builtin:digits", "image_size": None, "teacher": None, "stages": 4, "shots": 5, "draws": 20}
    for name, knn in (("a", 70.0), ("b", 80.0)):
        evaluation = {"step": 400, "knn": 1.0, "evaluate": [{**settings, "knn": knn, "corruption_drop": knn / 10}]}
        write_run(tmp_path / name, evaluation=evaluation)
    other = {**settings, "data": "photos", "knn": 99.0}
    write_run(tmp_path / "c", evaluation={"evaluate": [other]})
    (tmp_path / "scores.json").write_text(json.dumps({**settings, "models": {"timm_vit": {"knn": 90.0}}}))
    tables = score_tables(read_records([tmp_path]))
    digits = next(table for table in tables if table.title == "evaluate on builtin:digits")
    assert [digits.names[identity] for identity, _ in digits.ordered()] == ["timm_vit", "b", "a"]
    assert digits.best("knn") == 90.0 and digits.best("corruption_drop") == 7.0  # less is better
    assert {table.title for table in tables if "photos" in table.title} >= {"evaluate on photos"}


def test_the_trade_off_pairs_speeds_with_accuracies(tmp_path):
    for name in ("teacher", "student"):
        write_run(tmp_path / name)
    write_benchmark(tmp_path, crossing_rows(str(tmp_path / "teacher"), str(tmp_path / "student")))
    records = read_records([tmp_path])
    assert trade_off(records, score_tables(records)) is None
    (tmp_path / "quickstart.json").write_text(json.dumps({"teacher": {"knn": 93.0}, "student": {"knn": 92.0}}))
    records = read_records([tmp_path])
    trade = trade_off(records, score_tables(records))
    assert trade.metric == "knn"
    assert trade.points["student"] == (92.0, [((224, 224), 8.0), ((448, 448), 2.5), ((896, 896), 1.0)])
    chart = trade_off_chart(trade)
    low, high = chart.figure.layout.yaxis.range
    assert high - low >= 5 and low < 92 < 93 < high


def test_the_benchmark_chart_marks_the_crossover(tmp_path):
    write_benchmark(tmp_path, crossing_rows("teacher", "student"))
    records = read_records([tmp_path])
    seconds, memory = benchmark_charts(records.benchmarks[0], records)
    assert [shape.x0 for shape in seconds.figure.layout.shapes] == [392] and not memory.figure.layout.shapes
    assert seconds.figure.layout.xaxis.type == seconds.figure.layout.yaxis.type == "log"
    assert ("student", "448x448", "784", "0.4") in seconds.rows


def test_losses_are_logarithmic_where_they_span_decades(tmp_path):
    assert run_charts(read_run(write_run(tmp_path / "short"), "r"))[0].figure.layout.yaxis.type is None
    wide = [held_out(0, loss=10.0), held_out(400, loss=0.01)]
    assert run_charts(read_run(write_run(tmp_path / "wide", wide), "r"))[0].figure.layout.yaxis.type == "log"
    zero = [held_out(0, loss=10.0), held_out(400, loss=0.0)]
    assert run_charts(read_run(write_run(tmp_path / "zero", zero), "r"))[0].figure.layout.yaxis.type is None


def test_likeness_by_stage_at_the_start_and_now(tmp_path):
    chart = stage_chart([read_run(write_run(tmp_path / "run"), "run")])
    assert chart.figure.data[0].y == pytest.approx((0.6, 0.5)) and chart.figure.data[1].y == pytest.approx((0.96, 0.86))
    assert chart.rows[0] == ("run", "stage 1", "0.600", "0.960", "90 %")


def test_long_curves_keep_their_ends():
    points = [(float(step), 1.0) for step in range(10_001)]
    assert len(thin(points)) <= 502 and thin(points)[0] == points[0] and thin(points)[-1] == points[-1]
    assert thin(points[:100]) == points[:100]


def test_settings_that_differ(tmp_path):
    runs = [read_run(write_run(tmp_path / name, seed=seed), name) for name, seed in (("a", 0), ("b", 1))]
    (table,) = settings_tables(runs)
    assert table.different == [("seed", "0", "1")] and len(table.all) == len(runs[0].config)
    staged = read_run(write_run(tmp_path / "c", staged_lines(), **STAGED), "c")
    assert [table.names for table in settings_tables([*runs, staged])] == [["a", "b"], ["c"]]
    facts = dict(card(runs[0]).facts)
    assert facts["data"] == "photos (1000 images, 50 held out)" and facts["time"] == "about 5 min"
    assert facts["losses"] == "activation matching (weight 1), masked prediction (weight 1)"


def test_words():
    assert [plain(value) for value in (0, 0.00012345, 1.2345, 999.4, 12345)] == ["0", "0.000123", "1.23", "999", "12,345"]
    assert [duration_words(seconds) for seconds in (45, 720, 12000)] == ["45 s", "12 min", "3 h 20 min"]
    assert (listed(["a"]), listed(["a", "b", "c"]), listed(list("abcdef"))) == ("a", "a, b and c", "a, b, c, d and 2 more")
    assert [number(value) for value in (True, "1", float("nan"), 10**400, 2)] == [None, None, None, None, 2]
    assert label("<b>&\n" + "x" * 60) == "&lt;b&gt;&amp; " + "x" * 17 + "…" + "x" * 22


# --- the page


class Page(HTMLParser):
    """What a page loads, says and draws."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.text, self.charts, self._inside = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.loads += [values[name] for name in ("src", "href", "srcset", "action", "data", "poster") if values.get(name)]
        self._inside = (tag, values) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside is None:
            self.text.append(data)
        elif self._inside[1].get("type") == "application/json":
            self.charts.append(json.loads(data))

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def hostile(tmp_path):
    """A run whose name, settings, files, stages and scores are markup."""
    folder = tmp_path / HOSTILE.replace("/", "")
    lines = [line | {"stage": HOSTILE, HOSTILE: 1.0} for line in good_lines()]
    write_run(folder, lines, recipe=HOSTILE, skipped=(HOSTILE, "</script><script>alert(1)</script>"), **{HOSTILE: HOSTILE})
    (tmp_path / "other.json").write_text(
        json.dumps({"data": HOSTILE, "models": {HOSTILE: {"knn": 1.0}, "</script>": {"knn": 2.0}}})
    )
    write_benchmark(tmp_path, crossing_rows("</script><b>", HOSTILE))
    return tmp_path


def test_nothing_from_the_disk_becomes_markup(hostile):
    text = write_report([hostile], hostile / "report.html", maps=False).read_text()
    page = Page(text)
    assert not {"img", "b", "link", "iframe", "object", "form"} & set(page.tags)
    assert page.tags.count("script") == len(page.charts) + 2  # no name ended or began one
    assert HOSTILE in html.unescape(page.words)
    own = text.replace(next(iter(re.findall(r"<script>\n.*?</script>", text, re.S))), "")
    assert HOSTILE not in own
    names = [trace["name"] for chart in page.charts for trace in chart["data"]]
    assert all("<" not in name for name in names) and any("&lt;img" in name for name in names)


def test_the_page_loads_nothing(hostile):
    text = write_report([hostile], hostile / "report.html", maps=False).read_text()
    assert all(load.startswith(("#", "data:image/")) for load in Page(text).loads)
    assert "@import" not in text.partition("</style>")[0] and "url(" not in text.partition("</style>")[0]
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_names_that_are_no_text_are_shown_as_escapes(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff run")
    os.mkdir(folder)  # noqa: PTH102  # the name is no text
    write_run(tmp_path / os.path.basename(folder))  # noqa: PTH119
    assert "\\udcff run" in write_report([folder], tmp_path / "report.html", maps=False).read_text(encoding="utf-8")


def test_the_page_of_a_real_run(small_run, tmp_path):
    run = distill(small_run())
    file = report(ReportConfig(runs=(str(run),)))
    assert file == run / "report.html" and 4e6 < file.stat().st_size < 8e6
    text = file.read_text()
    page = Page(text)
    assert text.count("<h1") == 1 and '<html lang="en">' in text and {"main", "nav", "header", "footer"} <= set(page.tags)
    numbers = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in numbers if line["split"] == "held_out"]
    drawn = {round(y, 9) for chart in page.charts for trace in chart["data"] for y in trace["y"] if y is not None}
    for key in ("loss", "activation_matching", "final_cosine", "agreement_stage4", "cka"):
        assert {round(line[key], 9) for line in judged} <= drawn
    assert f"{judged[-1]['final_cosine']:.3f} of 1." in page.words
    assert "Only 9 steps in all" in page.words and "Held-out numbers come from 1 image only" in page.words
    assert "vit-linearizer benchmark --models" in page.words
    assert sum(load.startswith("data:image/webp;base64,") for load in page.loads) == 1  # one held-out image, one sheet
    assert not list(run.glob("*.new"))


def test_an_interrupted_writer_leaves_the_old_page(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    file = write_report([run], tmp_path / "report.html", maps=False)
    before = file.read_text()
    monkeypatch.setattr("vit_linearizer.reporting.page.render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report([run], file, maps=False)
    assert file.read_text() == before


def test_maps_say_why_they_are_missing(tmp_path):
    run = read_run(write_run(tmp_path / "run"), "run")
    assert "no run has saved a model yet" in map_pictures([run]).missing
    assert "none of these runs is a distillation" in map_pictures([]).missing
    (run.path / "model").mkdir()
    (run.path / "model" / "config.json").write_text("{}")
    (run.path / "model" / "model.safetensors").write_bytes(b"none")
    assert "the teacher vit_base_patch16_224 is not on this disk" in map_pictures([run]).missing
