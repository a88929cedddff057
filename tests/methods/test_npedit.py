"""NP-Edit's update: who changes and who does not, which gradient goes back, exact resumption; and the rivals' and main job's loops."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import SIDE, pictures, requests, tiny_dit, tiny_judge
from PIL import Image
from safetensors.torch import load_file

from vlmedit.data.world import shares, unpaired_batch
from vlmedit.errors import ConfigError
from vlmedit.experiments import live as main_module
from vlmedit.flow import guide, interpolate, to_x0
from vlmedit.methods import find
from vlmedit.methods import npedit as module
from vlmedit.methods.copy_warmup import CopyWarmupConfig
from vlmedit.methods.distill import DistillConfig
from vlmedit.methods.npedit import NPEdit, NPEditConfig, nothing_loss, train_npedit
from vlmedit.methods.sft import SFTConfig, train_sft
from vlmedit.networks.dit import DiT

TWO = (1.0, 0.5)


def configuration(**overrides) -> NPEditConfig:
    return NPEditConfig.make("smoke", **{"side": SIDE, "batch": 4, "precision": "no", **overrides})


def roles(**overrides) -> NPEdit:
    """Four tiny models with weights of their own."""
    return NPEdit(configuration(**overrides), tiny_dit(0), tiny_dit(1), tiny_dit(2), tiny_judge(3))


@pytest.fixture(scope="module")
def batch():
    return requests("recolor", "remove", "nothing", "move")


def gradients(model) -> list:
    return [p.grad for p in model.parameters()]


def untouched(model) -> bool:
    return all(g is None for g in gradients(model))


class Untouchable:
    """A model that fails the test when anyone asks it anything."""

    def requires_grad_(self, _):
        return self

    def eval(self):
        return self

    def __getattr__(self, name):
        raise AssertionError(f"asked for {name}")

    def __call__(self, *_):
        raise AssertionError("called")


# --- one update


def test_each_update_teaches_its_own_model_alone(batch):
    """The student's backward leaves gradients in the student alone, the fake's in the fake alone; teacher and judge are frozen,
    in eval mode, and stay so."""
    all_roles, timed = roles(), []
    all_roles.part = lambda name: timed.append(name) or nullcontext()
    output, metrics = all_roles.student_backward(batch, TWO, step=50)
    assert not untouched(all_roles.student) and untouched(all_roles.fake)
    assert output.shape == batch.reference.shape and not output.requires_grad
    before = [None if g is None else g.clone() for g in gradients(all_roles.student)]
    loss = all_roles.fake_backward(output, batch.target_caption)
    assert not untouched(all_roles.fake) and loss > 0
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients(all_roles.student), before))
    for frozen in (all_roles.teacher, all_roles.judge):
        assert untouched(frozen) and not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert {"gradient_dmd", "gradient_judge", "gradient_nothing", "judge_loss", "p_edit", "p_identity"} == set(metrics)
    assert all(v > 0 for v in metrics.values()) and set(timed) == {"student", "teacher", "judge", "fake"}


@pytest.mark.parametrize("norm, guidance, identity", (("sample", 2.0, True), ("pixel", 1.0, False)))
def test_what_goes_back_is_the_gradient_of_the_summed_losses(batch, norm, guidance, identity):
    """Recomputed in one graph from the same seed: DMD by its equations, the judge row by row on whole pictures, do-nothing by its
    definition; one backward from the weighted sum. Every weight's gradient agrees to 1e-4 of the largest."""
    settings = dict(dmd_norm=norm, guidance=guidance, identity=identity, judge_weight=0.3, nothing_weight=0.7, dmd_weight=0.9, logit_gain_steps=100)
    split, whole = roles(**settings), roles(**settings)
    torch.manual_seed(0)
    split.student_backward(batch, TWO, step=50)

    torch.manual_seed(0)
    output = whole.edit(batch, TWO)
    t = 0.02 + 0.96 * torch.rand(4)
    eps = torch.randn_like(output)
    with torch.no_grad():
        x_t, caption = interpolate(output, eps, t), batch.target_caption
        v = guide(whole.teacher(x_t, t, caption), whole.teacher(x_t, t, torch.zeros_like(caption)), guidance)
        real, fake = to_x0(x_t, v, t), to_x0(x_t, whole.fake(x_t, t, caption), t)
        pull = (fake - real) / (output - real).abs().mean((1, 2, 3) if norm == "sample" else 1, keepdim=True)
    dmd = (output * pull).sum() / output.numel()
    losses = []
    for i in range(4):
        seen = output[i : i + 1] + (output[i : i + 1].clamp(-1, 1) - output[i : i + 1]).detach()  # straight through the clamp
        both = torch.stack((batch.reference[i : i + 1], seen), 1)
        removal = batch.types[i] == "remove"
        edit = whole.judge.yes_no_margin(batch.edit_question[i : i + 1], both[:, 1:] if removal else both)
        losses.append(F.softplus(0.55 * edit * (1 if removal else -1)))
        if identity:
            losses.append(F.softplus(-0.55 * whole.judge.yes_no_margin(batch.identity_question[i : i + 1], both)))
    nothing = (output[2] - batch.reference[2]).square().mean() / 4
    (0.9 * dmd + 0.3 * torch.cat(losses).mean() + 0.7 * nothing).backward()

    scale = max(p.grad.abs().max() for p in whole.student.parameters() if p.grad is not None)
    for (name, a), b in zip(split.student.named_parameters(), whole.student.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).abs().max() < 1e-4 * scale, name


def test_do_nothing_pulls_only_its_own_rows(batch):
    """The mean squared distance's derivative, 2 (x - y) / (B n), on the "do nothing" row and exactly zero elsewhere; without such rows
    there is no such loss."""
    all_roles, output = roles(nothing_weight=0.7), pictures(4, 5)
    pulls, _ = all_roles.output_gradients(batch, output, 0)
    expected = torch.zeros_like(output)
    expected[2] = 0.7 * 2 * (output[2] - batch.reference[2]) / output.numel()
    torch.testing.assert_close(pulls["nothing"], expected, atol=1e-8, rtol=1e-5)
    assert set(pulls) == {"dmd", "judge", "nothing"}
    assert set(all_roles.output_gradients(requests("recolor", "move"), output[:2], 0)[0]) == {"dmd", "judge"}
    assert nothing_loss(output, batch.reference, torch.zeros(4)) == 0


@pytest.mark.parametrize("target_caption", (True, False))
def test_both_scores_read_the_caption_and_never_the_reference(batch, target_caption):
    """Teacher and fake are asked with pictures, times and the target's caption, or with the reference's where `target_caption` is
    off: three arguments, so no reference."""
    all_roles, asked = roles(target_caption=target_caption, guidance=1.0), []
    teacher, fake = all_roles.teacher, all_roles.fake
    all_roles.teacher = lambda *args: asked.append(args) or teacher(*args)
    all_roles.fake = lambda *args: asked.append(args) or fake(*args)
    all_roles.output_gradients(batch, pictures(4, 5), 0)
    wanted = batch.target_caption if target_caption else batch.reference_caption
    assert not torch.equal(batch.target_caption, batch.reference_caption)
    assert len(asked) == 2 and all(len(args) == 3 and torch.equal(args[2], wanted) for args in asked)
    assert torch.equal(all_roles.caption(batch), wanted)


def test_no_weight_no_call(batch):
    """judge_weight=0 never asks the judge, dmd_weight=0 neither teacher nor fake; both zero is refused."""
    silent = NPEdit(configuration(judge_weight=0.0), tiny_dit(0), tiny_dit(1), tiny_dit(2), Untouchable())
    _, metrics = silent.student_backward(batch, (1.0,), 0)
    assert set(metrics) == {"gradient_dmd", "gradient_nothing"}
    silent = NPEdit(configuration(dmd_weight=0.0), tiny_dit(0), Untouchable(), Untouchable(), tiny_judge(3))
    _, metrics = silent.student_backward(batch, (1.0,), 0)
    assert "gradient_judge" in metrics and "gradient_dmd" not in metrics and not untouched(silent.student)
    with pytest.raises(ConfigError, match="dmd_weight and judge_weight are both 0"):
        configuration(judge_weight=0.0, dmd_weight=0.0)


def test_the_unroll_follows_the_configuration(batch, monkeypatch):
    """Re-noise rule and truncation reach `rollout`; the output shows the instruction's and the reference's influence."""
    seen = []
    rollout = module.rollout
    monkeypatch.setattr(module, "rollout", lambda *args: seen.append(args[2:]) or rollout(*args))
    all_roles = roles(renoise="same", gradient_calls=1)
    with torch.no_grad():
        draw = lambda b: (torch.manual_seed(0), all_roles.edit(b, TWO))[1]
        out = draw(batch)
        assert seen == [(TWO, "same", 1)] and torch.equal(out, draw(batch))
        other = type(batch)(**{**vars(batch), "reference": batch.reference.flip(0)})
        told = type(batch)(**{**vars(batch), "instruction": batch.instruction.flip(0)})
        assert not torch.equal(out, draw(other)) and not torch.equal(out, draw(told))


def test_a_cached_and_a_recomputed_reference_agree(batch):
    """reference_time "noisy" gives the pixels to every call, "clean" encodes them once: for one call at t with a modulation that does
    not hear time, both are the same picture, to 1e-5."""
    pair = []
    for time in ("clean", "noisy"):
        student = tiny_dit(0, reference_time=time)
        torch.nn.init.zeros_(student.modulation.weight)
        torch.manual_seed(0)
        with torch.no_grad():
            pair.append(NPEdit(configuration(), student, tiny_dit(1), tiny_dit(2), tiny_judge(3)).edit(batch, TWO))
    torch.testing.assert_close(*pair, atol=1e-5, rtol=0)


# --- the loops


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Tiny models on disk: teacher, warm (the student's start), editor, judge."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "warm", "editor")):
        tiny_dit(seed).save_pretrained(folder / name)
    tiny_judge(3).save_pretrained(folder / "judge")
    return folder


def loop(saved: Path, out: Path, **overrides) -> NPEditConfig:
    places = dict(teacher=str(saved / "teacher"), judge=str(saved / "judge"), student=str(saved / "warm"), out=str(out))
    return configuration(**{**places, "steps": 3, "batch": 2, "save_every": 1, **overrides})


def measured(steps) -> list[dict]:
    return [{k: v for k, v in s.metrics.items() if not k.startswith(("cpu", "seconds"))} for s in steps]


@pytest.mark.parametrize("rollouts", ("shared", "fresh"))
def test_a_killed_run_resumes_to_the_same_bits(saved, tmp_path, rollouts):
    """Stopped after its third update and started again, the run repeats that update (only the second was saved), and ends in
    the straight run's weights, averages, fake score and metrics, bit for bit."""
    straight = list(train_npedit(loop(saved, tmp_path / "straight", fake_rollouts=rollouts, steps=4, save_every=2)))
    killed = loop(saved, tmp_path / "killed", fake_rollouts=rollouts, steps=4, save_every=2)
    run = train_npedit(killed)
    first = [next(run), next(run), next(run)]
    run.close()
    rest = list(train_npedit(killed))
    assert [s.index for s in rest] == [3, 4] and measured(first) == measured(straight[:3]) and measured(rest) == measured(straight[2:])
    for name in ("model/diffusion_pytorch_model", "checkpoint/student", "checkpoint/student.ema", "checkpoint/fake"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("straight", "killed"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name


def test_the_loop_moves_student_and_fake_and_leaves_the_rest(saved, tmp_path):
    """After two updates the student and the fake score differ from where they started, the saved average loads as a model, pictures
    and metrics are detached, and the files of teacher and judge are as they were."""
    before = {name: (saved / name).joinpath(file).read_bytes() for name, file in (("teacher", "diffusion_pytorch_model.safetensors"), ("judge", "model.safetensors"))}
    steps = list(train_npedit(loop(saved, tmp_path / "run", steps=2)))
    assert [(s.index, s.total, s.skipped) for s in steps] == [(1, 2, False), (2, 2, False)]
    assert {"gradient_dmd", "gradient_judge", "p_edit", "p_identity", "fake_loss", "gradient_norm", "cpu_student", "seconds_student", "cpu_data"} <= set(steps[0].metrics)
    assert not any(p.requires_grad for s in steps for p in s.pictures.values()) and set(steps[0].pictures) == {"reference", "output"}
    start = {name: load_file(saved / name / "diffusion_pytorch_model.safetensors") for name in ("teacher", "warm")}
    for name, origin in (("student", "warm"), ("fake", "teacher")):
        now = load_file(tmp_path / "run" / "checkpoint" / f"{name}.safetensors")
        assert not torch.equal(now["head.2.weight"], start[origin]["head.2.weight"]), name
    model = DiT.from_pretrained(tmp_path / "run" / "model")
    average = load_file(tmp_path / "run" / "checkpoint" / "student.ema.safetensors")
    assert all(torch.equal(v, average[k]) for k, v in model.state_dict().items())
    assert all(before[name] == (saved / name / file).read_bytes() for name, file in (("teacher", "diffusion_pytorch_model.safetensors"), ("judge", "model.safetensors")))


def test_without_dmd_the_fake_is_not_trained(saved, tmp_path):
    """dmd_weight=0: no fake updates, no fake loss, the fake's weights are the teacher's."""
    (step,) = train_npedit(loop(saved, tmp_path / "run", steps=1, dmd_weight=0.0))
    assert "fake_loss" not in step.metrics
    fake = load_file(tmp_path / "run" / "checkpoint" / "fake.safetensors")
    assert all(torch.equal(v, fake[k]) for k, v in load_file(saved / "teacher" / "diffusion_pytorch_model.safetensors").items())


RIVALS = {
    "sft": (SFTConfig, dict(student="warm"), ("loss", "loss")),
    "distill": (DistillConfig, dict(teacher="teacher"), ("fake_loss", "fake_loss")),
    "distill without fake updates": (DistillConfig, dict(teacher="teacher", fake_updates=0), ("skipped", "skipped")),
    "copy_warmup": (CopyWarmupConfig, dict(teacher="teacher"), ("reading_loss", "loss")),  # reads first, then copies
}


@pytest.mark.parametrize("name", RIVALS)
def test_the_other_stages_run_and_save_a_model(saved, tmp_path, name):
    """Two updates each: finite losses, changed weights, a model that loads and predicts finite velocities."""
    config, settings, logged = RIVALS[name]
    settings = {k: str(saved / v) if isinstance(v, str) else v for k, v in settings.items()}
    found, train = find(name.split()[0])
    assert found is config
    steps = list(train(config.make("smoke", side=SIDE, batch=2, precision="no", out=str(tmp_path / "run"), **settings)))
    assert [s.index for s in steps] == [1, 2]
    for step, name in zip(steps, logged, strict=True):
        assert name in step.metrics and step.metrics["gradient_norm"] > 0 and not step.skipped
        assert all(torch.isfinite(torch.tensor(v)) for v in step.metrics.values())
    model = DiT.from_pretrained(tmp_path / "run" / "model")
    start = load_file(Path(settings.get("student", settings.get("teacher"))) / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(v, start[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert model(pictures(1), torch.ones(1), torch.ones(1, 24, dtype=torch.long), pictures(1, 1)).isfinite().all()


def test_paired_training_lowers_its_own_loss(saved, tmp_path):
    """Forty updates: the last ten losses are a tenth below the first ten."""
    config = SFTConfig.make("smoke", student=str(saved / "warm"), side=SIDE, steps=40, batch=8, lr=3e-3, precision="no", save_every=40, out=str(tmp_path / "run"))
    losses = [step.metrics["loss"] for step in train_sft(config)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("name", ("copy_warmup", "sft", "distill"))
def test_the_other_stages_depend_on_their_seed_alone(saved, tmp_path, name):
    """Whatever the process drew before, the same seed gives the same weights, bit for bit, also when killed in the middle (for the
    warm-up: between reading and copying) and resumed; another seed gives others."""
    config, settings, _ = RIVALS[name]
    settings = {k: str(saved / v) for k, v in settings.items()}
    make = lambda out, **more: config.make("smoke", **{"side": SIDE, "batch": 2, "precision": "no", "out": str(tmp_path / out), **settings, **more})
    train, results = find(name)[1], {}
    for noise, (out, seed, killed) in enumerate((("a", 0, False), ("b", 0, True), ("c", 1, False))):
        torch.manual_seed(100 + noise)
        if killed:
            run = train(make(out, seed=seed))
            next(run), next(run)  # the first update's checkpoint is written
            run.close()
        list(train(make(out, seed=seed)))
        results[out] = load_file(tmp_path / out / "model" / "diffusion_pytorch_model.safetensors")
    same = lambda x, y: all(torch.equal(v, results[y][k]) for k, v in results[x].items())
    assert same("a", "b") and not same("a", "c")


# --- the main job


def test_the_main_job_leaves_metrics_and_pictures(saved, tmp_path, monkeypatch):
    """At tier smoke on tiny checkpoints: two live updates, oracle and judge figures of warm start, live and shipped editor, a strip of
    pictures, and the configuration beside them."""
    monkeypatch.setattr(main_module, "checkpoint", lambda family, role: saved / role)
    out, seen = tmp_path / "main", []
    metrics = main_module.run_main("smoke", str(out), progress=seen.append, side=SIDE, precision="no")
    assert [s.index for s in seen] == [1, 2] and metrics["training_seconds"] > 0
    assert json.loads((out / "metrics.json").read_text()) == metrics
    for name in ("warm start", "live", "shipped"):
        assert 0 <= metrics[name]["success"] <= 1 and metrics[name]["n"] == 8 and {"keep_psnr", "manifold_psnr", "hacking_gap"} <= set(metrics[name])
    assert metrics["warm start"]["manifold_psnr"] != metrics["shipped"]["manifold_psnr"]
    with Image.open(out / "edits.png") as strip:
        assert strip.width > 600 and strip.height > 8 * 200
    config = json.loads((out / "config.json").read_text())
    assert config["student"] == str(saved / "warm") and config["steps"] == 2
    assert (out / "model" / "config.json").is_file() and list((out / "vlmedit").glob("events*"))


def test_an_emphasized_type_is_drawn_twice_as_often():
    plain, more = (shares(NPEditConfig.make(**given).data) for given in ({}, dict(emphasis="move")))
    assert more["move"] == 2 * plain["move"] > 0 and {k: v for k, v in more.items() if k != "move"} == {k: v for k, v in plain.items() if k != "move"}
    count = lambda kinds: sum(t == "move" for i in range(8) for t in unpaired_batch(64, 32, "emphasis", i, kinds=kinds).types)
    assert count(more) > 1.4 * count(plain) > 0
    with pytest.raises(ConfigError, match="emphasis.*'?fly'?.*known: add"):
        NPEditConfig.make(emphasis=("fly",))
