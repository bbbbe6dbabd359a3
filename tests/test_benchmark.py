"""``benchmark``: numbers worked out by hand, cases in real processes, memory that runs out, kills, going on, refusals."""

import functools
import json
import math
import os
import signal
import struct
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from vit_linearizer import BenchmarkConfig, UserError, benchmark
from vit_linearizer.benchmarking import cases
from vit_linearizer.benchmarking import measure as measuring
from vit_linearizer.benchmarking.cases import PRESETS, plan_cases, preset_shapes
from vit_linearizer.benchmarking.measure import Child, Settings, case_facts, measure, predict_seconds, reason_to_skip
from vit_linearizer.benchmarking.record import describe_machine, rows_to_keep
from vit_linearizer.benchmarking.rendering import to_markdown
from vit_linearizer.benchmarking.summary import add_ratios, find_crossover, fit_exponent, sentences, summarise
from vit_linearizer.benchmarking.worker import Meter
from vit_linearizer.cli import main
from vit_linearizer.commands import benchmark as command
from vit_linearizer.models.loading import save_model_folder

VIT, STUDENT = "vit_tiny_patch16_224", "adventurer_tiny_patch16_224"
SETTINGS = Settings(device="cpu", threads=1, batch_size=1, train=False, compile=False, repeats=2, seconds_per_case=60.0)


def row(model="a", tokens=100, seconds=1.0, *, attention="none", precision="fp32", memory=100.0, patch=16, status="ok"):
    """A row as `measure` makes it, of one image at a time; the image is as wide as it has tokens."""
    # fmt: off
    found = {"model": model, "image_size": [patch, tokens * patch], "patch_size": [patch, patch], "precision": precision,
             "attention": attention, "tokens": tokens, "flops_per_image": 10**9, "parameters": 1000, "status": status}
    if status == "ok":
        found |= {"images_per_second": 1 / seconds, "seconds_median": seconds, "seconds_per_image": seconds, "repeats": 1,
                  "spread": [seconds, seconds], "seconds": [seconds], "memory_peak_mib": memory, "memory_model_mib": 50.0}
    # fmt: on
    return found


@functools.cache
def case(model=VIT, size=(64, 64), attention="fused", patch=None):
    [[found]] = plan_cases([model], [(size, patch)], ["fp32"], [attention])
    return found


# --- what the numbers say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 1.37, 2.0])
def test_the_exponent_of_a_power_law_is_its_power(power):
    points = [(tokens, 0.003 * tokens**power) for tokens in (1024, 2048, 4096, 50176)]
    assert fit_exponent(points) == {"value": pytest.approx(power, rel=1e-12), "tokens": [1024, 50176]}


def test_small_sizes_count_only_where_there_are_not_two_large_ones():
    flat = [(16, 1.0), (196, 1.0)]
    assert fit_exponent([*flat, (1000, 2.0), (4000, 32.0)]) == {"value": pytest.approx(2.0), "tokens": [1000, 4000]}
    assert fit_exponent([*flat, (4000, 1.0)]) == {"value": pytest.approx(0.0), "tokens": [16, 4000]}
    assert fit_exponent([(999, 1.0), (1998, 2.0)]) == {"value": pytest.approx(1.0), "tokens": [999, 1998]}


def test_the_exponent_is_the_least_squares_slope():
    # Slope of (0, 0), (1, 0), (2, 3): sum of (x - 1)(y - 1) over sum of (x - 1)^2 = (1 + 0 + 2) / 2.
    points = [(1, 1.0), (10, 1.0), (100, 1000.0)]
    assert fit_exponent(points)["value"] == pytest.approx(1.5)


@pytest.mark.parametrize("points", [[], [(2000, 1.0)], [(2000, 1.0), (2000, 1.5)]])
def test_no_exponent_from_a_single_size(points):
    assert fit_exponent(points) is None


def crossover(slower):
    """Against a reference of one second; ``slower`` has seconds by tokens."""
    return find_crossover([row("b", t, s) for t, s in slower.items()], [row("a", t, 1.0) for t in slower])


def test_the_crossover_lies_between_the_last_lost_and_the_first_won_size():
    # Four times as slow, then half as slow: on the log-log line that is two thirds of the way from 100 to 800 tokens.
    found = crossover({50: 9.0, 100: 4.0, 800: 0.5, 900: 0.1})
    assert (found["result"], found["tokens"], found["image_size"]) == ("reached", 400, [16, 12800])
    assert found["smallest"] == {"image_size": [16, 800], "speedup": pytest.approx(1 / 9)}
    assert found["largest"] == {"image_size": [16, 14400], "speedup": pytest.approx(10)}


def test_a_win_that_does_not_last_is_no_crossover():
    found = crossover({100: 0.5, 200: 2.0, 800: 0.5})
    assert (found["result"], found["tokens"]) == ("reached", 400)
    assert crossover({100: 0.5, 200: 2.0})["result"] == "not reached"
    level = crossover({100: 2.0, 200: 1.0, 400: 0.5})
    assert (level["tokens"], level["image_size"]) == (200, [16, 6400])


def test_always_ahead_never_ahead_and_level():
    assert crossover({100: 0.9, 200: 0.5})["result"] == "already at the smallest size measured"
    assert crossover({100: 1.1, 200: 1.01})["result"] == "not reached"
    assert crossover({100: 1.0})["result"] == "not reached"
    assert find_crossover([row("b", 100)], [row("a", 200)]) is None


def test_ratios_are_against_each_variant_of_the_first_model_at_the_same_place():
    rows = [
        row("a", 100, 2.0, attention="fused", memory=100.0),
        row("a", 100, 4.0, attention="eager", memory=300.0),
        row("b", 100, 1.0, memory=150.0),
        row("a", 200, 9.0, attention="fused"),
        row("b", 200, 3.0, precision="bf16"),
        row("b", 200, status="out of memory"),
    ]
    first, eager, b, alone, other_precision, lost = add_ratios(rows)
    assert first["speedup"] == alone["speedup"] == other_precision["speedup"] == first["memory_ratio"] == {}
    assert (eager["speedup"], eager["memory_ratio"]) == ({"a fused": 0.5}, {"a fused": 3.0})
    assert (b["speedup"], b["memory_ratio"]) == ({"a fused": 2.0, "a eager": 4.0}, {"a fused": 1.5, "a eager": 0.5})
    assert "speedup" not in lost
    assert add_ratios(add_ratios(rows)) == add_ratios(rows)


def test_a_reference_that_did_not_fit_is_no_reference():
    assert add_ratios([row("a", status="out of memory"), row("b")])[1]["speedup"] == {}


def said(*rows):
    return "\n".join(sentences(summarise(rows), rows[0]))


def test_it_is_said_plainly_who_wins():
    losing = said(row("a", 100, 1.0), row("b", 100, 2.0), row("a", 200, 1.0), row("b", 200, 1.25))
    assert "b (fp32, patch 16): no faster than a at the largest size: 0.50 times as fast at 16x1600, 0.80 times" in losing
    winning = said(row("a", 100, 1.0), row("b", 100, 0.5))
    assert "b (fp32, patch 16): faster than a at every size measured: 2.00 times as fast at 16x1600." in winning
    turning = said(row("a", 100, 1.0), row("b", 100, 4.0), row("a", 800, 1.0), row("b", 800, 0.5))
    assert "faster than a from 16x12800 on (equal at about 400 tokens)" in turning
    assert "a (fp32, patch 16): time grows with tokens to the power 0.00 from 100 to 800 tokens." in turning
    assert "never measured at the same size and patch as a" in said(row("a", 100), row("b", 100, patch=8))


def test_summaries_are_kept_apart_by_precision_attention_and_patch():
    rows = [
        row("a", t, t / 100, attention=k, precision=p)
        for t in (100, 200)
        for k in ("fused", "eager")
        for p in ("fp32", "bf16")
    ]
    rows += [row("a", 300, patch=8, attention="fused"), row("b", 100, 0.1), row("b", 200, status="out of memory")]
    found = {(s["model"], s["attention"], s["precision"], *s["patch_size"]): s for s in summarise(rows)}
    assert len(found) == 6
    assert found["a", "eager", "bf16", 16, 16]["exponent"]["value"] == pytest.approx(1.0)
    assert found["a", "fused", "fp32", 8, 8]["exponent"] is found["b", "none", "fp32", 16, 16]["exponent"] is None
    assert found["b", "none", "fp32", 16, 16]["crossover"]["result"] == "already at the smallest size measured"
    assert found["a", "eager", "fp32", 16, 16]["crossover"] is None


def test_the_table_has_a_line_for_every_row_and_ratios_under_their_headings():
    rows = [row("a", 100, 2.0, attention="fused"), row("b", 100, 1.0, memory=25.0), row("b", 200, status="out of memory")]
    config = {"train": True, "compile": False, "batch_size": 3}
    machine = describe_machine(torch.device("cpu"))
    content = {
        "complete": False,
        "machine": machine,
        "config": config,
        "rows": add_ratios(rows),
        "summaries": summarise(rows),
    }
    text = to_markdown(content)
    heading, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    table = [dict(zip(heading, line, strict=True)) for line in lines]
    assert [c["model"] for c in table] == ["a fused", "b", "b"]
    assert (table[1]["speed vs fused"], table[1]["memory vs fused"], table[1]["images/s"]) == ("2.00", "0.25", "1")
    assert (table[2]["images/s"], table[2]["seconds (min .. max)"], table[2]["tokens"]) == ("out of memory", "", "200")
    assert "forward + backward, batch 3" in text
    assert "Unfinished" in text
    assert "Unfinished" not in to_markdown(content | {"complete": True})


# --- what is measured -----------------------------------------------------------------------------------------------


def test_presets_are_the_papers_rows():
    assert preset_shapes("imagenet", None) == [((224, 224), None), ((448, 448), None), ((448, 448), 8)]
    assert preset_shapes("imagenet", 8) == [((224, 224), 8), ((448, 448), 8)]
    assert preset_shapes("ade20k", None) == [((512, 512), None)]
    assert preset_shapes("cityscapes", 14) == [((512, 1024), 14)]
    assert max(height * width // 256 for (height, width), _ in PRESETS["long"]) == 50176
    assert all(side % 16 == 0 for (side, _), _ in PRESETS["long"])


def test_cases_stand_in_groups_by_tokens():
    shapes = [((64, 128), None), ((64, 64), 8), ((64, 64), None), ((64, 64), None)]
    groups = plan_cases([VIT, STUDENT, VIT], shapes, ["fp32", "bf16"], ["fused", "eager"])
    assert [{c.tokens for c in group} for group in groups] == [{16}, {32}, {64}]
    assert [(c.model, c.precision, c.attention) for c in groups[0]] == [
        (VIT, "fp32", "fused"), (VIT, "fp32", "eager"), (VIT, "bf16", "fused"), (VIT, "bf16", "eager"),
        (STUDENT, "fp32", "none"), (STUDENT, "bf16", "none"),
    ]  # fmt: skip
    assert {(c.patch_size, c.patch_argument) for c in groups[2]} == {((8, 8), 8)}
    assert {(c.patch_size, c.patch_argument) for group in groups[:2] for c in group} == {((16, 16), None)}


def test_a_models_own_patch_is_no_argument():
    assert case(patch=16).patch_argument is None


def test_flops_are_those_of_the_architecture():
    for height, width in ((64, 64), (96, 160)):
        tokens = height * width // 256
        length, dim = tokens + 1, 192
        block = 2 * length * dim * dim * 12 + 2 * 2 * length * length * dim  # qkv, proj, mlp; q k^T and its product with v
        by_hand = 2 * tokens * (3 * 16 * 16) * dim + 12 * block + 2 * dim * 1000
        assert case(size=(height, width)).flops == case(size=(height, width), attention="eager").flops == by_hand


# --- time -----------------------------------------------------------------------------------------------------------


def known(*seconds_by_tokens, **values):
    return [row(VIT, tokens, seconds, attention="fused", **values) for tokens, seconds in seconds_by_tokens]


def test_times_are_predicted_from_the_two_sizes_below():
    subject = replace(case(), tokens=400)
    assert predict_seconds(subject, []) is None
    assert predict_seconds(subject, known((100, 1.0))) == pytest.approx(16.0)
    assert predict_seconds(subject, known((50, 7.0), (100, 1.0), (200, 3.0))) == pytest.approx(9.0)
    assert predict_seconds(subject, known((100, 1.0), (200, 1.5))) == pytest.approx(3.0)
    assert predict_seconds(subject, known((100, 1.0), (200, 8.0))) == pytest.approx(32.0)
    for other in (known((400, 1.0), (800, 1.0)), known((100, 1.0), precision="bf16"), [row("b", 100, attention="fused")]):
        assert predict_seconds(subject, other) is None


def test_what_would_take_too_long_is_left_out_and_the_row_says_what_would_help():
    subject, rows = replace(case(), tokens=400), known((100, 1.0))
    reason = reason_to_skip(subject, replace(SETTINGS, seconds_per_case=1.5), rows)
    assert reason == "skipped: a repeat would take about 00:16; give --seconds-per-case 2 to wait for it"
    assert reason_to_skip(subject, replace(SETTINGS, seconds_per_case=2.0), rows) is None


@pytest.mark.parametrize(("status", "skipped"), [
    ("out of memory", True), ("killed by signal 9", True), ("skipped: a smaller size did not fit", True),
    ("killed by signal 11", False), ("failed: a bug", False), ("skipped: a repeat would take about 1:00:00", False),
])  # fmt: skip
def test_larger_sizes_than_one_that_did_not_fit_are_not_tried(status, skipped):
    lost = row(VIT, 100, attention="fused", status=status)
    want = "skipped: a smaller size did not fit" if skipped else None
    assert reason_to_skip(replace(case(), tokens=400), SETTINGS, [lost]) == want
    assert reason_to_skip(replace(case(), tokens=400, attention="eager"), SETTINGS, [lost]) is None
    assert reason_to_skip(replace(case(), tokens=100), SETTINGS, [lost]) is None


class Scripted(Child):
    """A case without a process: its passes take the seconds given, the warm-up first."""

    def __enter__(self):
        self.left = list(self.times[self.order["model"]])
        return self

    def __exit__(self, *_):
        pass

    def _answer(self):
        return {}

    def _ask(self, line):
        self.asked.append((self.order["model"], line if line in ("go", "end") else "case"))
        if line == "end":
            return {"memory_peak_mib": 10.0}
        return {"seconds": self.left.pop(0), "memory_model_mib": 5.0}


@pytest.fixture
def scripted(monkeypatch):
    """Runs one group of scripted cases; returns its rows and what was asked, in order."""

    def run(times, **settings):
        monkeypatch.setattr(measuring, "Child", Scripted)
        monkeypatch.setattr(Scripted, "times", times, raising=False)
        monkeypatch.setattr(Scripted, "asked", [], raising=False)
        group = [replace(case(), model=name) for name in times]
        [rows] = measure([group], replace(SETTINGS, **settings), [])
        return rows, Scripted.asked

    return run


def test_cases_take_turns_and_the_middle_time_counts(scripted):
    rows, asked = scripted({"a": [9.0, 1.0, 5.0, 2.0], "b": [9.0, 4.0, 4.0, 4.0]}, repeats=3, batch_size=8)
    assert asked == [("a", "case"), ("b", "case"), *[("a", "go"), ("b", "go")] * 3, ("a", "end"), ("b", "end")]
    assert rows[0]["seconds"] == [1.0, 5.0, 2.0]
    assert (rows[0]["seconds_median"], rows[0]["spread"], rows[0]["repeats"]) == (2.0, [1.0, 5.0], 3)
    assert (rows[0]["images_per_second"], rows[0]["seconds_per_image"]) == (4.0, 0.25)
    assert (rows[0]["memory_peak_mib"], rows[0]["memory_model_mib"], rows[0]["from_warm_up"]) == (10.0, 5.0, False)


def test_repeats_end_when_the_time_is_up(scripted):
    rows, _ = scripted({"a": [5.0] + 9 * [10.0], "b": [24.0] + 9 * [24.0], "c": [26.0]}, repeats=9, seconds_per_case=25.0)
    assert [r["repeats"] for r in rows] == [3, 1, 1]
    assert [r["from_warm_up"] for r in rows] == [False, False, True]
    assert rows[2]["seconds"] == [26.0]


# --- real processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The command in its smallest form, in the folder of a run."""
    out = tmp_path_factory.mktemp("benchmark") / "run"
    out.mkdir()
    (out / "config.json").write_text("a run's own")
    line = ["benchmark", "--smoke", "--precision", "fp32", "--device", "cpu", "--out"]
    assert main([*line, str(out)]) == 0
    return out, json.loads((out / "benchmark.json").read_text())


def test_smoke_writes_its_three_files_and_touches_no_other(smoke):
    out, content = smoke
    assert {file.name for file in out.iterdir()} == {"config.json", "benchmark.json", "benchmark.md", "benchmark.png"}
    assert (out / "config.json").read_text() == "a run's own"
    assert content["complete"] is True
    assert (out / "benchmark.md").read_text() == to_markdown(content)
    assert content["machine"].keys() >= {"cpu", "gpu", "cores", "threads", "memory_gib", "torch", "timm", "mixer"}


def test_smoke_measures_every_case(smoke):
    rows = smoke[1]["rows"]
    want = [(model, attention, tokens) for tokens in (16, 36) for model, attention in ((VIT, "fused"), (STUDENT, "none"))]
    assert [(r["model"], r["attention"], r["tokens"]) for r in rows] == want
    for r in rows:
        assert (r["status"], r["repeats"], len(r["seconds"])) == ("ok", 2, 2)
        assert r["spread"][0] <= r["seconds_median"] <= r["spread"][1]
        assert r["images_per_second"] == pytest.approx(1 / r["seconds_median"])
        assert math.isfinite(r["seconds_median"]) and r["seconds_median"] > 0
    assert {frozenset(r["speedup"]) for r in rows if r["model"] == STUDENT} == {frozenset({f"{VIT} fused"})}
    assert {(s["model"], s["attention"]) for s in smoke[1]["summaries"]} == {(VIT, "fused"), (STUDENT, "none")}


def test_memory_is_that_of_weights_and_activations(smoke):
    for r in smoke[1]["rows"]:
        weights = 4 * r["parameters"] / 2**20
        assert 0.95 * weights < r["memory_model_mib"] < weights + 12
        assert r["memory_model_mib"] <= r["memory_peak_mib"] < weights + 40


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here")
def test_the_peak_is_that_of_the_passes_and_not_of_building():
    meter = Meter(torch.device("cpu"), 0.9)
    meter.load_libraries("fp32")
    torch.ones(75, 2**20)  # 300 MiB, gone at once
    meter.settle()
    assert meter.peak_mib() < 50
    torch.ones(25, 2**20)
    assert 90 < meter.peak_mib() < 150


def test_the_picture_is_a_large_png(smoke):
    data = (smoke[0] / "benchmark.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000 and height > 600


def test_a_case_that_does_not_fit_becomes_a_row_and_larger_ones_are_not_tried(monkeypatch):
    """400 MiB hold a tiny model, but not three attention maps of 4096 x 4096, which fused attention never makes."""
    monkeypatch.setattr(measuring, "_MEMORY_SHARE", 400 * 2**20 / psutil.virtual_memory().available)
    eager, fused, larger = (case(size=(n, n), attention=a) for n, a in ((1024, "eager"), (1024, "fused"), (1280, "eager")))
    [lost, fits], [skipped] = measure([[eager, fused], [larger]], replace(SETTINGS, seconds_per_case=0.01), [])
    assert lost == {**case_facts(eager), "status": "out of memory"}
    assert (fits["status"], fits["repeats"], fits["from_warm_up"]) == ("ok", 1, True)
    assert skipped == {**case_facts(larger), "status": "skipped: a smaller size did not fit"}


def test_killed_and_failing_children_become_rows_and_others_go_on(monkeypatch):
    repeat, children = Child.repeat, []

    def killed(child):
        children.append(child)
        if child.order["attention"] == "eager" and child.process.poll() is None:
            os.kill(child.process.pid, signal.SIGKILL)
        repeat(child)

    monkeypatch.setattr(Child, "repeat", killed)
    broken, trained = replace(case(), model="vit_tny_patch16_224"), replace(case(), precision="bf16")
    [rows] = measure([[case(attention="eager"), broken, trained]], replace(SETTINGS, train=True), [])
    assert [r["status"] for r in rows[::2]] == ["killed by signal 9", "ok"]
    assert rows[1]["status"].startswith("failed: UserError: --models vit_tny_patch16_224: unknown model")
    assert rows[2]["repeats"] == 2
    assert rows[2]["memory_peak_mib"] > 2.4 * 4 * trained.parameters / 2**20  # fp32 weights, gradients, copies in bf16
    assert all(child.process.poll() is not None for child in children)


def test_an_interrupt_ends_the_children_and_bfloat16_is_half_the_weights(monkeypatch):
    children = []

    def interrupted(child):
        children.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "repeat", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(measure([[replace(case(), precision="bf16")]], SETTINGS, []))
    assert [child.process.poll() for child in children] == [-signal.SIGKILL]
    assert children[0].memory["memory_model_mib"] < 2 * case().parameters / 2**20 + 8


def test_a_child_ends_with_its_parent_and_says_its_last_words():
    with Child(case(), SETTINGS) as child:
        child.wait_until_started()
        child.process.stdin.close()
        assert child.process.wait(timeout=20) == 1
        child.said.write(b"first\nlibgomp: no threads\n")
        child._answer()
        assert child.status == "failed: libgomp: no threads"


# --- the command around it ------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs the command with groups that are measured in no time; the list has the (tokens) of each group measured.

    ``stop`` is the number of groups after which Ctrl-C comes; ``status`` that of every row.
    """
    groups = []

    def run(*, stop=None, status="ok", **settings):
        def instant(group, *_):
            if len(groups) == stop:
                raise KeyboardInterrupt
            groups.append(group[0].tokens)
            filled = row(seconds=0.5, status=status)
            return [{**filled, **case_facts(c)} for c in group]

        groups.clear()
        monkeypatch.setattr(measuring, "_measure_group", instant)
        monkeypatch.setattr(command, "draw", lambda *_: None)  # these two take longer than all the rest
        monkeypatch.setattr(cases, "count_flops", lambda *_: 10**9)
        given = dict(models=(VIT, STUDENT), image_sizes=("64", "96", "128"), precision=("fp32",), device="cpu")
        return benchmark(BenchmarkConfig(**{**given, "out": str(tmp_path / "out"), **settings}))

    run.groups = groups
    return run


def written(tmp_path, kind="json"):
    return (tmp_path / "out" / f"benchmark.{kind}").read_text()


def test_a_killed_benchmark_keeps_what_it_has_and_goes_on(quick, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        quick(stop=2)
    unfinished = json.loads(written(tmp_path))
    assert (unfinished["complete"], [r["tokens"] for r in unfinished["rows"]]) == (False, [16, 16, 36, 36])
    assert "Unfinished" in written(tmp_path, "md")
    content = quick()
    assert quick.groups == [64]
    assert "going on: 4 of 6 cases are done" in caplog.text
    assert json.loads(written(tmp_path)) == json.loads(json.dumps(content))
    assert (content["complete"], [r["tokens"] for r in content["rows"]]) == (True, [16, 16, 36, 36, 64, 64])
    assert content["rows"][:4] == unfinished["rows"]
    assert content["rows"][5]["speedup"] == {f"{VIT} fused": 1.0}


def test_a_finished_benchmark_is_measured_anew(quick):
    quick()
    quick()
    assert quick.groups == [16, 36, 64]


def test_a_finished_benchmark_of_another_configuration_is_not_lost(quick, tmp_path):
    quick()
    before = written(tmp_path)
    with pytest.raises(UserError, match=r"^--out \S+: holds a benchmark .*: batch_size \(1 there, 2 here\); use another"):
        quick(batch_size=2)
    assert (written(tmp_path), quick.groups) == (before, [])
    quick(batch_size=2, resume="never")
    assert quick.groups == [16, 36, 64]


def test_resume_never_starts_over(quick):
    with pytest.raises(KeyboardInterrupt):
        quick(stop=1)
    quick(resume="never", batch_size=2)
    assert quick.groups == [16, 36, 64]


def test_an_unfinished_benchmark_of_another_configuration_is_refused(quick, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quick(stop=1)
    before = written(tmp_path)
    with pytest.raises(UserError, match=r"^--out \S+: holds an unfinished .*: batch_size \(1 there, 4 here\); use another"):
        quick(batch_size=4)
    assert (written(tmp_path), quick.groups) == (before, [])


def test_an_unfinished_benchmark_of_another_machine_is_refused(quick, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quick(stop=1)
    content = json.loads(written(tmp_path))
    file, machine = tmp_path / "out" / "benchmark.json", content["machine"]
    assert len(rows_to_keep(file, config=content["config"], machine=machine)) == 2
    with pytest.raises(UserError, match=r"cpu \(.* there, Abacus here\)"):
        rows_to_keep(file, config=content["config"], machine={**machine, "cpu": "Abacus"})


def test_what_is_no_benchmark_is_left_alone(quick, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "benchmark.json").write_text("[]")
    with pytest.raises(UserError, match=r"its benchmark.json cannot be read; .*--resume never"):
        quick()
    assert written(tmp_path) == "[]"
    assert quick(resume="never")["complete"]


def test_nothing_measured_is_an_error_that_names_the_first_reason(quick, tmp_path):
    with pytest.raises(UserError, match=rf"^--models {VIT} {STUDENT}: nothing could be measured; failed: no luck$"):
        quick(status="failed: no luck")
    assert json.loads(written(tmp_path))["rows"][0]["status"] == "failed: no luck"


def test_presets_and_patches_reach_the_cases(quick):
    content = quick(preset="imagenet", image_sizes=(), models=(VIT,))
    assert [(r["tokens"], r["patch_size"][0]) for r in content["rows"]] == [(196, 16), (784, 16), (3136, 8)]


def test_each_kind_of_attention_has_its_rows_and_models_without_it_one(quick):
    rows = quick(image_sizes=("64",), attention=("eager", "fused"))["rows"]
    assert [(r["model"], r["attention"]) for r in rows] == [(VIT, "eager"), (VIT, "fused"), (STUDENT, "none")]
    assert [r["speedup"].keys() for r in rows] == [set(), {f"{VIT} eager"}, {f"{VIT} eager", f"{VIT} fused"}]


def test_sizes_by_default(quick):
    assert quick(image_sizes=())["complete"] and quick.groups == [196, 784, 2048, 4096]


def test_a_run_folder_is_a_model(quick, tmp_path):
    from small_models import small

    save_model_folder(small(), tmp_path / "run" / "model")
    content = quick(models=(str(tmp_path / "run"),), patch_size=8)
    assert [r["tokens"] for r in content["rows"]] == [64, 144, 256]
    assert content["rows"][0]["attention"] == "none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ("vit_tny_patch16_224",)}, r"^--models vit_tny_patch16_224: unknown model; did you mean vit_tiny_pat"),
        ({"models": ()}, r"^--models: give at least one$"),
        ({"models": ("swin_tiny_patch4_window7_224",)}, r"^--models swin\S+: is not a plain backbone"),
        ({"models": ("weights.pth",)}, r"^--models weights.pth: is a weight file; give the name of its architecture"),
        ({"image_sizes": ("64", "100")}, rf"^--image-sizes 100x100: is no multiple of the patch 16 of {VIT}; give another"),
        ({"patch_size": 14}, r"^--image-sizes 64x64: is no multiple of the patch 14 of"),
        ({"image_sizes": ("3O",)}, r"^--image-sizes 3O: give one side"),
        ({"preset": "ade20k"}, r"^--preset ade20k: brings its own image sizes; leave --image-sizes out$"),
        ({"repeats": 0}, r"^--repeats 0: must be above 0$"),
        ({"batch_size": -1}, r"^--batch-size -1: must be above 0$"),
        ({"seconds_per_case": 0.0}, r"^--seconds-per-case 0.0: must be above 0$"),
        ({"patch_size": 0}, r"^--patch-size 0: must be above 0$"),
        ({"device": "cuda"}, r"^--device cuda: not available here"),
        ({"out": "weights.pth"}, r"^--out weights.pth: is a file; give a folder$"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line_and_leaves_nothing(quick, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("weights.pth").touch()
    with pytest.raises(UserError, match=message) as error:
        quick(**settings)
    assert "\n" not in str(error.value)
    assert ([file.name for file in tmp_path.iterdir()], quick.groups) == (["weights.pth"], [])


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "--help"])
    assert stopped.value.code == 0
    assert "--seconds-per-case" in capsys.readouterr().out
