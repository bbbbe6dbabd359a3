"""The training loop: what a run leaves behind, resume to the bit, several processes, accumulation, stopping."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch

from vit_linearizer.commands.distill import DistillConfig, distill
from vit_linearizer.contracts import LossOutput, UserError
from vit_linearizer.models.loading import create_backbone, load
from vit_linearizer.models.teacher import Teacher
from vit_linearizer.tasks import Distillation, DistillationConfig
from vit_linearizer.tasks.base import compile_each_block
from vit_linearizer.training.config import OptimisationConfig, RuntimeConfig
from vit_linearizer.training.optimiser import fit_batch, make_optimizer, make_schedule, total_steps

TIMES = ("_seconds", "images_per_second", "data_wait", "memory_gib")


def metrics(run: str | Path) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]


def train_losses(run: str | Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if line["split"] == "train"]


def command(config: DistillConfig) -> list[str]:
    """A configuration as the command line that gives it."""
    arguments = ["distill"]
    defaults = {field.name: field.default for field in fields(config)}
    for name, value in vars(config).items():
        if value != defaults[name]:
            arguments.append(f"--{name.replace('_', '-')}")
            arguments += [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
    return arguments


def start(config: DistillConfig, *launcher: str) -> subprocess.Popen:
    python = [sys.executable, *launcher, "-m", "vit_linearizer"] if launcher else [sys.executable, "-m", "vit_linearizer"]
    return subprocess.Popen([*python, *command(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_leaves_what_the_design_promises(small_run) -> None:
    run = distill(small_run())
    left = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "model", "evaluation.json", "run.log"} <= left
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    lines = metrics(run)
    assert all("step" in line for line in lines)
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 10))  # 11 images, batches of 4: 3 steps an epoch
    assert {"activation_matching", "masked_prediction", "learning_rate", "epoch"} <= train[0].keys()
    held_out = [line for line in lines if line["split"] == "held_out"]
    assert [line["step"] for line in held_out] == [0, 3, 6, 9]
    signs = {f"agreement_stage{k}" for k in (1, 2, 3, 4)} | {"masked_cosine", "final_cosine", "loss"}
    assert signs <= held_out[0].keys()
    assert json.loads((run / "evaluation.json").read_text())["loss"] == min(line["loss"] for line in held_out[1:])


def test_the_model_folder_is_the_best_student(small_run) -> None:
    run = distill(small_run(epochs=4))
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    expected = {name.removeprefix("student."): value for name, value in best["model"].items() if name.startswith("student.")}
    model = timm.create_model(f"local-dir:{run}/model", pretrained=True).eval()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load(run)(images), model(images), rtol=0, atol=0)
        assert torch.isfinite(model(torch.rand(1, 3, 32, 64))).all()


def test_same_seed_same_metrics_other_seed_other_metrics(small_run, tmp_path: Path) -> None:
    runs = [distill(small_run(out=str(tmp_path / str(number)), seed=seed)) for number, seed in enumerate((0, 0, 1))]
    assert metrics(runs[0]) == metrics(runs[1])
    assert train_losses(runs[0]) != train_losses(runs[2])


def test_killed_and_resumed_equals_uninterrupted_to_the_bit(small_run, tmp_path: Path) -> None:
    settings = dict(epochs=40, drop_path=0.2, checkpoint_minutes=0.0)
    whole = distill(small_run(out=str(tmp_path / "whole"), **settings))
    config = small_run(out=str(tmp_path / "killed"), **settings)
    process = start(config)
    log = Path(config.out) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or '"step": 20,' not in log.read_text():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = max(line["step"] for line in metrics(config.out))
    assert 20 <= reached < 120

    again = start(config)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    resumed_at = int(output.split("resumed at step ")[1].split()[0])
    assert 0 < resumed_at <= reached
    assert metrics(config.out) == metrics(whole)
    steps = [line["step"] for line in metrics(config.out) if line["split"] == "train"]
    assert steps == sorted(set(steps))
    saved, expected = (torch.load(Path(run) / "checkpoints" / "last.pt", weights_only=True) for run in (config.out, whole))
    assert all(torch.equal(saved["model"][name], value) for name, value in expected["model"].items())


def test_activation_matching_alone_resumes_too(small_run) -> None:
    """The final norm never gets a gradient then, and the optimiser holds nothing for it."""
    run = distill(small_run(masked_prediction_weight=0.0, epochs=2))
    whole = metrics(run)
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["optimizer"]["state"]
    assert "student.norm_f.weight" not in state
    distill(small_run(masked_prediction_weight=0.0, epochs=2))
    assert metrics(run) == whole


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looking at its inputs
def test_compiling_does_not_grow_with_depth_or_drop_path() -> None:
    graphs = {}
    for depth in (2, 6):
        torch.compiler.reset()
        compiled: list = []

        def backend(graph, _inputs, into=compiled):
            into.append(graph)
            return graph.forward

        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": depth, "drop_path_rate": 0.3}
        model = timm.create_model("adventurer_tiny_patch16_224", **shape)
        compile_each_block(model, backend=backend)
        for training in (True, False):
            model.train(training)(torch.rand(2, 3, 32, 32)).sum().backward()
        graphs[depth] = len(compiled)
    assert 0 < graphs[6] <= graphs[2]


def test_a_kill_between_the_renames_loses_no_model(small_run) -> None:
    run = distill(small_run())
    (run / "model").rename(run / ".model.vit-linearizer-old")
    distill(small_run())
    assert load(run) is not None


def test_an_infinite_gradient_never_reaches_the_weights(small_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda _gradients: torch.tensor(math.inf))
    with pytest.raises(UserError, match=r"gradient_norm = inf at step 1: not finite"):
        distill(small_run())


def test_sigterm_stops_between_steps_and_keeps_them(small_run) -> None:
    config = small_run(epochs=400)
    process = start(config)
    log = Path(config.out) / "metrics.jsonl"
    while not log.exists() or '"step": 10,' not in log.read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output
    step = torch.load(Path(config.out) / "checkpoints" / "last.pt", weights_only=True)["progress"]["step"]
    assert step == max(line["step"] for line in metrics(config.out))


def test_a_finished_run_is_left_as_it_is(small_run, caplog: pytest.LogCaptureFixture) -> None:
    run = distill(small_run())
    before = (run / "metrics.jsonl").read_bytes()
    distill(small_run())
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "resumed at step 9 of 9" in caplog.text


def test_resume_never_starts_over(small_run) -> None:
    run = distill(small_run())
    (run / "skipped.txt").write_text("from before\n")
    distill(small_run(resume="never"))
    assert [line["step"] for line in metrics(run) if line["split"] == "train"] == list(range(1, 10))
    assert not (run / "skipped.txt").exists()


@pytest.mark.parametrize("flags", [{}, {"masked_prediction_weight": 0.0}], ids=["default", "activation matching alone"])
def test_two_processes_give_the_losses_of_one(small_run, tmp_path: Path, flags: dict) -> None:
    one = distill(small_run(out=str(tmp_path / "one"), **flags))
    config = small_run(out=str(tmp_path / "two"), **flags)
    # torch's own launcher: accelerate's, told to use the CPU, starts a single process.
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(config, *launcher)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    torch.testing.assert_close(train_losses(config.out), train_losses(one), rtol=2e-5, atol=0)
    held_out = [[line["loss"] for line in metrics(run) if line["split"] == "held_out"] for run in (config.out, one)]
    torch.testing.assert_close(*held_out, rtol=2e-5, atol=0)


@pytest.mark.parametrize("change", [{"gradient_accumulation": 2}, {"gradient_checkpointing": True}, {"num_workers": 2}])
def test_what_must_not_change_the_losses(small_run, tmp_path: Path, change: dict) -> None:
    plain = distill(small_run(out=str(tmp_path / "plain")))
    other = distill(small_run(out=str(tmp_path / "other"), **change))
    torch.testing.assert_close(train_losses(other), train_losses(plain), rtol=1e-5, atol=0)


def test_bf16_stays_close_to_fp32(small_run, tmp_path: Path) -> None:
    exact = train_losses(distill(small_run(out=str(tmp_path / "fp32"))))
    rounded = train_losses(distill(small_run(out=str(tmp_path / "bf16"), precision="bf16")))
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0)


def test_the_loss_falls(small_run) -> None:
    losses = train_losses(distill(small_run(epochs=40, learning_rate=3e-3)))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_loss_that_is_not_finite_stops_the_run(small_run, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Distillation._losses
    calls = []

    def spoilt(self, student, teacher, mask) -> LossOutput:
        output = honest(self, student, teacher, mask)
        if self.training:
            calls.append(None)
        if len(calls) < 5:
            return output
        terms = {**output.terms, "masked_prediction": torch.tensor(math.nan)}
        return LossOutput(loss=output.loss * math.nan, terms=terms)

    monkeypatch.setattr(Distillation, "_losses", spoilt)
    config = small_run()
    with pytest.raises(UserError, match=r"masked_prediction = nan at step 5.*not finite"):
        distill(config)
    kept = torch.load(Path(config.out) / "checkpoints" / "last.pt", weights_only=True)
    assert kept["progress"]["step"] == 3
    assert all(torch.isfinite(value).all() for value in kept["model"].values())


def test_another_configuration_is_refused_by_name(small_run) -> None:
    distill(small_run())
    with pytest.raises(UserError, match=r"another configuration: .*learning_rate \(0.001 there, 0.002 here\)"):
        distill(small_run(learning_rate=2e-3))
    distill(small_run(num_workers=1, debug=True))  # where it runs is no part of what it is


def test_the_folder_of_the_images_is_no_place_for_a_run(small_run, photos: Path) -> None:
    with pytest.raises(UserError, match=r"^--out .*is the folder of the images \(--data\); give another$"):
        distill(small_run(out=str(photos)))
    assert not (photos / "model").exists()


def test_two_runs_at_once_do_not_share_a_folder(small_run, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run()
    evaluate, refused = Distillation.evaluate, []

    def meanwhile(*args):
        if not refused:
            before = (Path(config.out) / "config.json").read_bytes()
            with pytest.raises(UserError, match=r"^--out .*another run is writing there now; wait until it ends") as error:
                distill(small_run(resume="never"))
            refused.append(error)
            assert (Path(config.out) / "config.json").read_bytes() == before
            assert (Path(config.out) / "run.log").exists()
        return evaluate(*args)

    monkeypatch.setattr(Distillation, "evaluate", meanwhile)
    distill(config)
    assert len(refused) == 1
    distill(small_run(resume="never"))


def test_the_teacher_is_nowhere_in_the_training(small_teacher: Path) -> None:
    teacher = Teacher(create_backbone(str(small_teacher), field="--teacher"), (32, 32))
    student = timm.create_model("adventurer_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4)
    task = Distillation(student, teacher, DistillationConfig())
    optimisation = OptimisationConfig(epochs=1, batch_size=4, learning_rate=1e-3, minimum_learning_rate=1e-5)
    trained = {id(p) for group in make_optimizer(task, optimisation).param_groups for p in group["params"]}
    frozen = {id(p) for p in teacher.model.parameters()}
    assert not trained & frozen
    assert trained == {id(p) for p in task.parameters()}
    assert len(task.state_dict()) == len(student.state_dict()) + 1 + 2  # mask token, projection weight and bias
    assert not any(module.training for module in (task.train(), teacher.model)[1].modules())


def test_weight_decay_spares_what_it_must(small_teacher: Path) -> None:
    teacher = Teacher(create_backbone(str(small_teacher), field="--teacher"), (32, 32))
    student = timm.create_model("adventurer_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4)
    task = Distillation(student, teacher, DistillationConfig())
    optimisation = OptimisationConfig(epochs=1, batch_size=4, learning_rate=1e-3, minimum_learning_rate=1e-5)
    names = {id(p): name for name, p in task.named_parameters()}
    groups = make_optimizer(task, optimisation).param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    matrices = ("in_proj", "conv1d", "out_proj", "w1", "w2", "w3", "patch_embed.proj", "projection", "head")
    assert decayed == {name for name in names.values() if name.endswith(tuple(f"{m}.weight" for m in matrices))}


@pytest.mark.parametrize(("warmup_epochs", "expected"), [(0, 0), (2, 20), (50, 100)])
def test_schedule_warms_up_at_most_a_tenth_and_ends_at_the_minimum(warmup_epochs: float, expected: int) -> None:
    config = OptimisationConfig(
        epochs=100, batch_size=8, learning_rate=1.0, minimum_learning_rate=0.01, warmup_epochs=warmup_epochs
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, config, images=80)
    total = total_steps(config, 80)
    assert total == 1000
    rates = []
    for step in range(total):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates.index(max(rates)) == expected
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01, abs=1e-4)
    if expected:
        assert rates[: expected + 1] == pytest.approx([0.01 + 0.99 * step / expected for step in range(expected + 1)])
    cosine = [0.01 + 0.99 * (1 + math.cos(math.pi * t / (total - expected))) / 2 for t in range(total - expected)]
    assert rates[expected:] == pytest.approx(cosine)


@pytest.mark.parametrize(
    ("batch_size", "images", "parts", "expected"), [(64, 1000, 1, 64), (2048, 11, 1, 11), (2048, 11, 4, 8), (8, 1, 2, 2)]
)
def test_batches_fit_small_folders(batch_size: int, images: int, parts: int, expected: int) -> None:
    assert fit_batch(batch_size, images, parts) == expected


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"--batch-size 10: must be a multiple .* try 8"):
        fit_batch(10, 100, 4)


@pytest.mark.parametrize("values", [{"seed": -1}, {"gradient_accumulation": 0}, {"num_workers": -1}, {"log_every": 0}])
def test_runtime_values_are_checked(values: dict) -> None:
    (name,) = values
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        RuntimeConfig(**values)


def test_one_image_is_enough(small_run, tmp_path: Path, photos: Path) -> None:
    single = tmp_path / "single"
    single.mkdir()
    os.link(photos / "b" / "photo-00.jpg", single / "only.jpg")
    run = distill(small_run(data=str(single), epochs=2))
    assert train_losses(run) and all(math.isfinite(loss) for loss in train_losses(run))
