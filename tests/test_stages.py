"""A run of several stages: what it leaves, each stage's own settings, stopped anywhere to the bit, two processes as one."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch

from small_vits import shake
from vit_linearizer import DistillConfig, UserError, distill, load
from vit_linearizer.commands.distill_routes import choose_route
from vit_linearizer.models.linear_vit import linear_blocks
from vit_linearizer.models.loading import save_model_folder
from vit_linearizer.training import loop, run_folder

TIMES = ("_seconds", "images_per_second", "data_wait", "memory_gib")
FIRST, SECOND = "attention alignment", "feature alignment"
SHAPE = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3)


def metrics(run, **wanted):
    """The lines of metrics.jsonl that have these values, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if all(line[name] == value for name, value in wanted.items())]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in kept]


def losses(run, **wanted):
    return [line["loss"] for line in metrics(run, **wanted)]


def weights(run, name="last"):
    return torch.load(Path(run) / "checkpoints" / f"{name}.pt", weights_only=True)


def save_teacher(folder, name="vit_tiny_patch16_224", **changes):
    torch.manual_seed(0)
    save_model_folder(shake(timm.create_model(name, **{**SHAPE, "num_classes": 5, **changes})), folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A ViT of four blocks with a head for five classes, in timm's folder format."""
    return save_teacher(tmp_path_factory.mktemp("classifier") / "model")


def settings(teacher, photos, out, **values):
    """Two stages of two epochs of three steps."""
    given = dict(recipe="adala", teacher=str(teacher), data=str(photos), out=str(out), epochs=2, batch_size=4)
    machine = dict(learning_rate=1e-3, device="cpu", precision="fp32", log_every=1)
    return DistillConfig(**{**given, **machine, **values})


@pytest.fixture
def adala(photos, classifier, tmp_path):
    """Makes such configurations; keyword arguments override."""
    return lambda **values: settings(**{"teacher": classifier, "photos": photos, "out": tmp_path / "run", **values})


# --- what a run leaves ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_run(photos, classifier, tmp_path_factory):
    """Eighteen steps of attention alignment, twelve of feature alignment."""
    rates = dict(attention_learning_rate=3e-3, feature_learning_rate=1e-3)
    out = tmp_path_factory.mktemp("long") / "run"
    return distill(settings(classifier, photos, out, attention_epochs=6, feature_epochs=4, **rates))


def test_the_metrics_hold_both_stages_in_order(long_run):
    lines = metrics(long_run)
    assert [line["step"] for line in metrics(long_run, split="train")] == list(range(1, 31))
    assert [line["stage"] for line in metrics(long_run, split="train")] == [FIRST] * 18 + [SECOND] * 12
    assert [line["step"] for line in metrics(long_run, split="held_out", stage=FIRST)] == list(range(0, 19, 3))
    assert [line["step"] for line in metrics(long_run, split="held_out", stage=SECOND)] == list(range(18, 31, 3))
    places = [(line["step"], line["split"], line["stage"]) for line in lines]
    assert len(set(places)) == len(places) == 30 + 7 + 5
    assert [line["stage"] for line in lines] == [FIRST] * 25 + [SECOND] * 17
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert [line["epoch"] for line in lines] == [line["step"] / 3 for line in lines]
    for name, stage in (("attention_alignment", FIRST), ("feature_alignment", SECOND)):
        assert all((name in line) == (line["stage"] == stage) for line in metrics(long_run, split="train"))
    for line in metrics(long_run, split="held_out"):
        assert ("attention_error_block4" in line) == (line["stage"] == FIRST)
        assert {"agreement_stage1", "agreement_stage4", "final_cosine", "cka"} <= line.keys()


def test_each_stage_lowers_its_loss_on_held_out_pictures(long_run):
    first, second = (losses(long_run, split="held_out", stage=stage) for stage in (FIRST, SECOND))
    assert first[-1] < 0.8 * first[0]
    assert second[-1] < 0.8 * second[0]
    errors = [
        [line[f"attention_error_block{n}"] for n in (1, 2, 3, 4)]
        for line in metrics(long_run, split="held_out", stage=FIRST)
    ]
    assert all(0 < after < before for before, after in zip(errors[0], errors[-1], strict=True))


def test_the_second_stage_begins_where_the_first_ended(long_run):
    ended, began = (metrics(long_run, split="held_out", stage=stage, step=18)[0] for stage in (FIRST, SECOND))
    shared = (ended.keys() & began.keys()) - {"loss", "stage"}
    assert {"final_cosine", "cka", "agreement_stage2"} <= shared
    assert {name: ended[name] for name in shared} == {name: began[name] for name in shared}


def test_model_and_evaluation_are_the_second_stages_best(long_run):
    evaluation = json.loads((long_run / "evaluation.json").read_text())
    later = metrics(long_run, split="held_out", stage=SECOND)[1:]
    assert evaluation["stage"] == SECOND
    assert evaluation["loss"] == min(line["loss"] for line in later)
    (line,) = (line for line in later if line["step"] == evaluation["step"])
    assert all(evaluation[name] == value for name, value in line.items() if name not in ("split", "epoch"))
    best = weights(long_run, "best")
    assert best["progress"] == {
        "stage": 1,
        "step": evaluation["step"],
        "best_score": evaluation["loss"],
        "best_step": evaluation["step"],
    }
    model = timm.create_model(f"local-dir:{long_run}/model", pretrained=True)
    assert {f"student.{name}" for name in model.state_dict()} == best["model"].keys()
    assert all(torch.equal(value, best["model"][f"student.{name}"]) for name, value in model.state_dict().items())


def test_the_model_is_the_teacher_with_linear_attention_and_its_head(long_run, classifier):
    model, teacher = (timm.create_model(f"local-dir:{f}", pretrained=True).eval() for f in (f"{long_run}/model", classifier))
    assert type(model) is type(teacher)
    assert [(number, module.feature_map) for number, module in linear_blocks(model)] == [(n, "elu") for n in range(4)]
    assert model.num_classes == teacher.num_classes == 5
    before = dict(teacher.named_parameters())
    assert before.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("head."), name
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert model(x).shape == (2, 5)
        assert torch.equal(load(long_run)(x), model(x))


# --- each stage's own settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "epochs"),
    [
        ({"epochs": 1}, {FIRST: 1, SECOND: 1}),
        ({"epochs": 1, "feature_epochs": 2}, {FIRST: 1, SECOND: 2}),
        ({"epochs": None, "attention_epochs": 2, "feature_epochs": 1}, {FIRST: 2, SECOND: 1}),
        ({"attention_epochs": 0, "feature_epochs": 1}, {SECOND: 1}),
        ({"attention_epochs": 1, "feature_epochs": 0}, {FIRST: 1}),
    ],
)
def test_epochs_of_a_stage(adala, given, epochs):
    recipes = choose_route(adala(**given)).recipes(11, 1)
    assert {stage: recipe.optimisation.epochs for stage, recipe in recipes.items()} == epochs


@pytest.mark.parametrize(("left_out", "stage"), [("attention_epochs", SECOND), ("feature_epochs", FIRST)])
def test_either_stage_alone(adala, classifier, left_out, stage):
    run = distill(adala(epochs=1, **{left_out: 0}))
    assert [line["step"] for line in metrics(run, stage=stage, split="train")] == [1, 2, 3]
    assert [line["stage"] for line in metrics(run)] == [stage] * 5
    evaluation, config = (json.loads((run / f"{name}.json").read_text()) for name in ("evaluation", "config"))
    assert (evaluation["stage"], evaluation["step"]) == (stage, 3)
    assert [name for name in ("attention_alignment", "feature_alignment") if name in config] == [stage.replace(" ", "_")]
    teacher = load(classifier).state_dict()
    changed = {name for name, value in load(run).state_dict().items() if not torch.equal(value, teacher[name])}
    projections = {f"blocks.{number}.attn.qkv.{kind}" for number in range(4) for kind in ("weight", "bias")}
    assert changed == (projections if stage == FIRST else {name for name in teacher if not name.startswith("head.")})


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        ({"attention_learning_rate": 2e-3, "feature_learning_rate": 5e-4}, (2e-3, 5e-4)),
        ({"attention_learning_rate": 2e-3}, (2e-3, 1e-3)),
        ({"feature_learning_rate": 1e-7}, (1e-3, 1e-7)),
        ({"learning_rate": None, "feature_learning_rate": 3e-4}, (1e-3 / 8, 3e-4)),  # of batches of 256, for batches of 4
        ({"learning_rate": None}, (1e-3 / 8, 1e-4 / 8)),
    ],
)
def test_learning_rate_of_a_stage(adala, given, rates):
    recipes = choose_route(adala(**given)).recipes(11, 1)
    assert [recipe.optimisation.learning_rate for recipe in recipes.values()] == pytest.approx(rates)


def test_each_stage_runs_at_its_own_rate(long_run):
    config = json.loads((long_run / "config.json").read_text())
    for stage, rate in ((FIRST, 3e-3), (SECOND, 1e-3)):
        assert config[stage.replace(" ", "_")]["learning_rate"] == rate
        used = [line["learning_rate"] for line in metrics(long_run, split="train", stage=stage)]
        assert used[1] == max(used) == pytest.approx(rate)  # one step of warm-up
        assert used[-1] < 0.1 * rate


def test_feature_map_and_softmax_blocks_arrive_in_the_model(adala, tmp_path):
    teacher = save_teacher(tmp_path / "teacher", "vit_small_patch16_dinov3")
    run = distill(adala(teacher=teacher, feature_map="hedgehog", keep_softmax_blocks=1))
    config = json.loads((run / "config.json").read_text())
    assert (config["feature_map"], config["keep_softmax_blocks"]) == ("hedgehog", 1)
    model = timm.create_model(f"local-dir:{run}/model", pretrained=True)
    assert [(number, module.feature_map) for number, module in linear_blocks(model)] == [(n, "hedgehog") for n in range(3)]
    assert type(model.blocks[3].attn) is type(load(teacher).blocks[3].attn)
    for _, module in linear_blocks(model):
        assert not torch.equal(module.q_map, torch.eye(16).expand(3, 16, 16))
    errors = {name for line in metrics(run, split="held_out") for name in line if "error" in name}
    assert errors == {f"attention_error_block{number}" for number in (1, 2, 3)}


def test_other_objectives_may_be_mixed_into_the_second_stage(adala):
    mixed = dict(activation_matching_weight=2.0, masked_prediction_weight=0.5, mask_ratio=0.5, feature_alignment_weight=3.0)
    run = distill(adala(labels="folder", **mixed))
    for line in metrics(run, split="train", stage=SECOND):
        total = 2 * line["activation_matching"] + 0.5 * line["masked_prediction"] + 3 * line["feature_alignment"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    terms = {"activation_matching", "masked_prediction", "feature_alignment"}
    assert all(line["loss"] == line["attention_alignment"] for line in metrics(run, split="train", stage=FIRST))
    assert not any(terms & line.keys() for line in metrics(run, stage=FIRST))
    assert all("knn" in line for line in metrics(run, split="held_out"))
    saved = weights(run)["model"]
    assert {name for name in saved if not name.startswith("student.")} == {
        "mask_token",
        "masked_prediction.projection.weight",
        "masked_prediction.projection.bias",
    }


def test_another_rate_of_a_stage_is_another_configuration(adala, long_run, tmp_path):
    shutil.copytree(long_run, tmp_path / "run")
    given = dict(attention_epochs=6, feature_epochs=4, attention_learning_rate=3e-3)
    with pytest.raises(UserError, match="another configuration: feature_alignment"):
        distill(adala(**given, feature_learning_rate=2e-3))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (long_run / "metrics.jsonl").read_bytes()


# --- stopped and gone on --------------------------------------------------------------------------------------------

#: What has just been written when a kill comes, and the step that a new start then goes on from.
MOMENTS = {
    "before any checkpoint": (("held_out", FIRST, 0), 0),
    "in stage one, a line ahead of its checkpoint": (("train", FIRST, 3), 2),
    "in stage one": (("last.pt", 0, 4), 4),
    "at the boundary, the last lines ahead of their checkpoint": (("held_out", FIRST, 6), 5),
    "at the boundary": (("last.pt", 0, 6), 6),
    "at the boundary, stage two's first line written": (("held_out", SECOND, 6), 6),
    "in stage two, before its first checkpoint": (("train", SECOND, 7), 6),
    "in stage two": (("last.pt", 1, 8), 8),
    "in stage two, the best weights ahead of the last": (("best.pt", 1, 9), 8),
    "when all is done but the last checkpoint": (("held_out", SECOND, 12), 11),
    "when all is done": (("last.pt", 1, 12), 12),
}
DROPPED = dict(drop_path=0.3, checkpoint_minutes=0.0)


@pytest.fixture(scope="module")
def kills(photos, classifier, tmp_path_factory):
    """A run that nothing stopped, and its folder as a kill at each moment would have left it."""
    out, copies = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("copies")
    wanted = {key: name for name, (key, _) in MOMENTS.items()}
    write, save = run_folder.MetricsWriter.write, loop.save_checkpoint

    def keep(*key):
        if key in wanted:
            shutil.copytree(out, copies / wanted.pop(key))

    def writing(self, step, split, values):
        write(self, step, split, values)
        keep(split, self.stage, step)

    def saving(file, model, optimizer, progress, *, writes):
        save(file, model, optimizer, progress, writes=writes)
        keep(file.name, progress.stage, progress.step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.MetricsWriter, "write", writing)
        patch.setattr(loop, "save_checkpoint", saving)
        distill(settings(classifier, photos, out, **DROPPED))
    assert not wanted
    return out, copies


def assert_same_run(run, whole):
    assert metrics(run) == metrics(whole)
    places = [(line["step"], line["split"], line["stage"]) for line in metrics(run)]
    assert len(set(places)) == len(places)
    for name in ("model/model.safetensors", "model/config.json", "evaluation.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("last", "best"):
        mine, wanted = weights(run, name), weights(whole, name)
        assert mine["progress"] == wanted["progress"]
        assert mine["model"].keys() == wanted["model"].keys()
        assert all(torch.equal(value, wanted["model"][key]) for key, value in mine["model"].items())
        moments, others = (kept["optimizer"]["state"] for kept in (mine, wanted))
        assert moments.keys() == others.keys()
        assert all(torch.equal(moments[key][part], others[key][part]) for key in moments for part in moments[key])


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_anywhere_and_resumed_equals_uninterrupted(kills, photos, classifier, monkeypatch, moment):
    whole, copies = kills
    optimise, made = loop._optimise, []
    monkeypatch.setattr(loop, "_optimise", lambda *given: (made.append(given[6]), optimise(*given))[1])
    run = distill(settings(classifier, photos, copies / moment, **DROPPED))
    assert made == list(range(MOMENTS[moment][1], 12)), "no step is made twice"
    assert_same_run(run, whole)


def command(config):
    """A configuration as the command line that gives it."""
    defaults = {field.name: field.default for field in fields(config)}
    given = {name: value for name, value in vars(config).items() if value != defaults[name]}
    return ["distill", *(word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value)))]


#: A command that the system kills in the second stage.
KILLED = """
import os, signal, sys
from vit_linearizer.cli import main
from vit_linearizer.training import loop

optimise = loop._optimise
loop._optimise = lambda *given: os.kill(os.getpid(), signal.SIGKILL) if given[6] == 9 else optimise(*given)
main(sys.argv[1:])
"""


def start(config, *python):
    words = [sys.executable, *python, *command(config)]
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)


def test_killed_by_the_system(adala, kills):
    config = adala(**DROPPED)
    done = start(config, "-c", KILLED)
    assert done.returncode == -signal.SIGKILL, done.stdout
    assert weights(config.out)["progress"]["step"] == 9
    assert_same_run(distill(config), kills[0])


def test_asked_to_stop_in_the_second_stage(adala, kills, monkeypatch):
    """A signal stops between two steps, which stay; the same command goes on."""
    whole, _ = kills
    optimise = loop._optimise

    def interrupted(*given):
        if given[6] == 7:
            signal.raise_signal(signal.SIGTERM)
        return optimise(*given)

    config = adala(**{**DROPPED, "checkpoint_minutes": 10})
    monkeypatch.setattr(loop, "_optimise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    assert weights(config.out)["progress"] == {
        "stage": 1,
        "step": 8,
        "best_score": None,
        "best_step": 0,
    }
    monkeypatch.setattr(loop, "_optimise", optimise)
    assert metrics(distill(config)) == metrics(whole)


def test_resume_never_starts_over_at_the_first_stage(adala, kills, photos, classifier, tmp_path, caplog):
    whole, _ = kills
    shutil.copytree(whole, tmp_path / "run")
    distill(adala(resume="never", **DROPPED))
    assert "stage 1 of 2: attention alignment" in caplog.text
    assert_same_run(tmp_path / "run", whole)


# --- other ways to run it -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(photos, classifier, tmp_path_factory):
    """One epoch of each stage."""
    return distill(settings(classifier, photos, tmp_path_factory.mktemp("plain") / "run", epochs=1))


def test_what_must_not_change_the_losses(adala, plain):
    other = distill(adala(epochs=1, gradient_accumulation=2, gradient_checkpointing=True))
    torch.testing.assert_close(losses(other), losses(plain), rtol=2e-5, atol=0)


def test_bf16_stays_close_to_fp32(adala, plain):
    rounded = distill(adala(epochs=1, precision="bf16"))
    for stage in (FIRST, SECOND):
        mine, wanted = (losses(run, stage=stage, split="train") for run in (rounded, plain))
        assert mine != wanted
        torch.testing.assert_close(mine, wanted, rtol=0.05, atol=0)


def test_two_processes_give_the_losses_of_one(adala, plain):
    """The second stage wraps the backbone that the first had wrapped."""
    config = adala(epochs=1)
    done = start(config, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vit_linearizer")
    assert done.returncode == 0, done.stdout
    places = [[(line["step"], line["split"], line["stage"]) for line in metrics(run)] for run in (config.out, plain)]
    assert places[0] == places[1]
    torch.testing.assert_close(losses(config.out), losses(plain), rtol=2e-5, atol=0)
    norms = [[line["gradient_norm"] for line in metrics(run, split="train")] for run in (config.out, plain)]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
