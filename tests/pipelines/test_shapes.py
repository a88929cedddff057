"""The diffusers pipeline: saving and loading, sampler parity, randomness, the judge's questions, shipped checkpoints."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from helpers.tiny_models import SIDE, pictures, tiny_dit, tiny_judge, tiny_pipeline
from PIL import Image
from safetensors.torch import load_file

import vlmedit
from vlmedit import flow
from vlmedit.data.world import held_out
from vlmedit.errors import UnknownInstruction
from vlmedit.pipelines import shapes as module
from vlmedit.pipelines.shapes import EditPipeline, generators, to_pixels
from vlmedit.pipelines.text_to_image import generate
from vlmedit.world.edits import ALL_TYPES
from vlmedit.world.language import normalise, parse_instruction
from vlmedit.world.tokenizer import build_tokenizer, encode

TEXTS = ["make the circle red", "remove the square"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(path)
    return path


def run(pipe, image, text, **kwargs):
    return pipe(image, text, output_type="pt", **kwargs).images


def same_behavior(a, b):
    """Equal weights, pictures, answers and schedule, bit for bit."""
    for name in ("transformer", "judge"):
        mine, theirs = getattr(a, name).state_dict(), getattr(b, name).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    image = pictures(2)
    out_a, out_b = run(a, image, TEXTS, seed=3), run(b, image, TEXTS, seed=3)
    assert torch.equal(out_a, out_b)
    assert torch.equal(a.ask(image, out_a, TEXTS).score, b.ask(image, out_b, TEXTS).score)
    assert a.scheduler.config.shift == b.scheduler.config.shift and b.scheduler.config.stochastic_sampling


def test_from_pretrained_restores_the_pipeline_exactly(pipe, folder):
    same_behavior(pipe, EditPipeline.from_pretrained(folder))


def test_diffusion_pipeline_finds_the_class(pipe, folder):
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded) is EditPipeline
    same_behavior(pipe, loaded)


def test_loading_without_having_imported_vlmedit(pipe, folder, tmp_path, monkeypatch):
    """The saved pipeline.py leads diffusers to the class when nothing has registered it."""
    monkeypatch.delattr(diffusers, "EditPipeline")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    with pytest.raises(AttributeError):
        DiffusionPipeline.from_pretrained(folder)
    same_behavior(pipe, DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True))


def test_weights_are_safetensors_alone(pipe, folder):
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(weights["patchify.weight"], pipe.transformer.patchify.weight)
    assert (folder / "judge" / "model.safetensors").is_file()
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert str(folder) not in (folder / "model_index.json").read_text()


def test_a_pipeline_without_judge_saves_loads_and_says_so(tmp_path):
    tiny_pipeline(judge=False).save_pretrained(tmp_path)
    loaded = EditPipeline.from_pretrained(tmp_path)
    assert loaded.judge is None and json.loads((tmp_path / "model_index.json").read_text())["judge"] == [None, None]
    image = pictures(1)
    with pytest.raises(ValueError, match="no judge.*vlmedit train judge"):
        loaded.ask(image, image, "do nothing")


@pytest.mark.parametrize("sampler", ["renoise", "euler", "corrector"])
@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_sampler_is_the_flow_modules(sampler, shift):
    """Same noise, same pictures as `flow.sample` over `few_step_times`, the reference given as plain pixels."""
    pipe, image = tiny_pipeline(shift=shift), pictures(1)
    ids = encode(TEXTS[:1], 24)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    expected = flow.sample(lambda x, t: pipe.transformer(x, t, ids, image), noise, flow.few_step_times(4, shift), sampler, generator)
    got = run(pipe, image, TEXTS[0], seed=5, sampler=sampler)
    assert torch.allclose(got, expected.clamp(-1, 1), atol=1e-5)
    assert torch.equal(got, run(pipe, image, TEXTS[0], generator=torch.Generator().manual_seed(5), sampler=sampler))


@pytest.mark.parametrize("stochastic", [True, False])
def test_sampler_is_the_schedulers_own(stochastic):
    """Without a named sampler, the result is what diffusers' `scheduler.step` gives on the same noises."""
    pipe, image = tiny_pipeline(shift=6.0, stochastic=stochastic), pictures(2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    noises = generators(7, 2, 1)
    x = torch.cat([torch.randn(1, 3, SIDE, SIDE, generator=g) for g in noises])
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = pipe.transformer(x, (t / 1000).expand(2), encode(TEXTS, 24), image)
            x = scheduler.step(v, t, x, generator=noises).prev_sample
    assert torch.allclose(run(pipe, image, TEXTS, seed=7), x.clamp(-1, 1), atol=1e-5)


def test_schedule_is_the_released_one():
    assert tiny_pipeline(shift=6.0).times(4) == pytest.approx([1, 0.9474, 0.8571, 0.6667], abs=1e-4)


def test_a_picture_does_not_depend_on_its_batch(pipe):
    """Alone, in company and in another place, with one sample or three: the same result; another seed: another one."""
    image = pictures(4)
    texts = ["do nothing", *TEXTS, "add a blue cross"]
    together = run(pipe, image, texts, seed=1)
    for i in range(4):
        alone = run(pipe, image[i : i + 1], texts[i], seed=1)
        assert torch.allclose(alone[0], together[i], atol=1e-5)
    assert torch.allclose(run(pipe, image.flip(0), texts[::-1], seed=1).flip(0), together, atol=1e-5)
    assert torch.allclose(run(pipe, image, texts, seed=1, num_samples=3)[::3], together, atol=1e-5)
    assert (run(pipe, image, texts, seed=2) - together).abs().mean() > 0.01
    per_picture = run(pipe, image, texts, seed=[1, 2, 1, 1])
    assert torch.allclose(per_picture[[0, 2, 3]], together[[0, 2, 3]], atol=1e-5) and (per_picture[1] - together[1]).abs().mean() > 0.01


def test_samples_of_a_picture_differ_and_lie_side_by_side(pipe):
    image = pictures(2)
    out = run(pipe, image, TEXTS, seed=0, num_samples=2)
    assert out.shape == (4, 3, SIDE, SIDE)
    assert (out[0] - out[1]).abs().mean() > 0.01
    assert torch.allclose(run(pipe, image[1:], TEXTS[1], seed=0, num_samples=2), out[2:], atol=1e-5)


@pytest.mark.parametrize("steps, samples", [(1, 1), (4, 3)])
def test_reference_is_encoded_once_per_picture(pipe, monkeypatch, steps, samples):
    encoded, called = [], []
    encode_reference, forward = pipe.transformer.encode_reference, pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "encode_reference", lambda ref, *a: encoded.append(len(ref)) or encode_reference(ref, *a))
    monkeypatch.setattr(pipe.transformer, "forward", lambda x, *a: called.append(len(x)) or forward(x, *a))
    run(pipe, pictures(2), TEXTS, num_inference_steps=steps, num_samples=samples)
    assert encoded == [2] and called == [2 * samples] * steps


def test_noisy_reference_is_reencoded_at_every_step():
    """A student modulated by the target's time agrees with the plain sampler too."""
    pipe, image = tiny_pipeline(reference_time="noisy"), pictures(2)
    expected = flow.sample(
        lambda x, t: pipe.transformer(x, t, encode(TEXTS, 24), image),
        torch.cat([torch.randn(1, 3, SIDE, SIDE, generator=g) for g in generators(0, 2, 1)]),
        flow.few_step_times(4, 3.0),
    )
    assert torch.allclose(run(pipe, image, TEXTS, seed=0, sampler="euler"), expected.clamp(-1, 1), atol=1e-5)


def test_inputs_and_outputs_of_every_kind_agree(pipe):
    """PIL in and out, lists, one instruction for all and one picture for all."""
    levels = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(levels.numpy())
    tensor = levels.permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(to_pixels(picture, SIDE), tensor, atol=1e-6)
    expected = run(pipe, tensor, TEXTS[0], seed=0)
    out = pipe(picture, TEXTS[0], seed=0).images
    assert isinstance(out, list) and out[0].size == (SIDE, SIDE)
    assert torch.allclose(to_pixels(out, SIDE), expected, atol=1.01 / 255)
    array = pipe(picture, TEXTS[0], seed=0, output_type="np").images
    assert np.allclose(array, expected.permute(0, 2, 3, 1) / 2 + 0.5, atol=1e-6)
    assert torch.allclose(run(pipe, picture, TEXTS, seed=0), run(pipe, [picture, tensor[0]], TEXTS, seed=0), atol=1e-5)
    assert torch.allclose(run(pipe, [picture, tensor], TEXTS[0], seed=0), expected.expand(2, -1, -1, -1), atol=1e-5)
    assert torch.equal(pipe(picture, TEXTS[0], seed=0, output_type="pt", return_dict=False)[0], expected)
    assert to_pixels(Image.new("L", (99, 99), 255), SIDE).eq(1).all()


def test_synonyms_reach_the_student_as_the_worlds_words(pipe):
    image = pictures(1)
    assert torch.equal(run(pipe, image, "Please make the disc RED!", seed=0), run(pipe, image, "make the circle red", seed=0))


def test_normalising_keeps_training_instructions():
    """What the student was trained on passes through the pipeline unchanged."""
    for example in held_out(200, 0, ALL_TYPES):
        parse_instruction(example.instruction)
        assert normalise(example.instruction) == example.instruction


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(instruction="make the circel red"), "circel.*nearest: circle"),
        (dict(instruction=" "), "instruction is empty"),
        (dict(instruction=["do nothing"] * 3), "2 pictures and 3 instructions"),
        (dict(num_inference_steps=0), "num_inference_steps is 0"),
        (dict(num_samples=0), "num_samples is 0"),
        (dict(sampler="heun"), "heun.*renoise"),
        (dict(output_type="latent"), "latent.*pil"),
        (dict(seed=0, generator=torch.Generator()), "both seed and generator"),
        (dict(seed=[0, 1, 2]), "3 seeds for 2 pictures"),
        (dict(image=[]), "no pictures"),
        (dict(image="a.png"), "a picture is a str"),
        (dict(image=Image.new("RGB", (20, 10))), "20x10"),
        (dict(image=pictures(1, side=8)), r"\(1, 3, 8, 8\).*\(B, 3, 16, 16\)"),
        (dict(image=pictures(1) * 3), r"\[-1, 1\]"),
        (dict(image=pictures(1) * float("nan")), "nan"),
    ],
)
def test_bad_input_gets_one_clear_error(pipe, kwargs, message):
    call = {"image": pictures(2), "instruction": TEXTS[0], **kwargs}
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_unknown_instruction_keeps_its_type(pipe):
    with pytest.raises(UnknownInstruction):
        pipe.ask(pictures(1), pictures(1), "make it nicer")


def test_judge_and_student_of_different_sides_are_refused():
    with pytest.raises(ValueError, match="judge reads 16 pixels, the editor draws 8"):
        EditPipeline(tiny_dit(side=8), FlowMatchEulerDiscreteScheduler(), build_tokenizer(), tiny_judge())


def test_progress_bar_is_off_until_asked_for(capsys):
    pipe = tiny_pipeline(judge=False)
    run(pipe, pictures(1), TEXTS[0])
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    run(pipe, pictures(1), TEXTS[0], num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


# the judge


def test_answers_are_the_judges_sigmoids(pipe):
    """Yes is right for two-picture questions, no for a removal's single-picture question."""
    before, after = pictures(2), pictures(2, seed=1)
    answers = pipe.ask(before, after, TEXTS)
    edit, removal = answers.edit_questions
    assert (edit.pair, edit.answer, removal.pair, removal.answer) == (True, True, False, False)
    ask = lambda question, *images: pipe.judge.yes_no_margin(encode([question.text], 40), torch.stack(images, 1)).sigmoid().item()
    assert answers.p_edit[0].item() == pytest.approx(ask(edit, before[:1], after[:1]), abs=1e-5)
    assert answers.p_edit[1].item() == pytest.approx(1 - ask(removal, after[1:]), abs=1e-5)
    for i, question in enumerate(answers.identity_questions):
        assert answers.p_identity[i].item() == pytest.approx(ask(question, before[i : i + 1], after[i : i + 1]), abs=1e-5)
    assert torch.allclose(answers.score, answers.p_edit * answers.p_identity)


def test_a_removals_edit_question_does_not_see_the_reference(pipe):
    after = pictures(2, seed=1)
    one, other = pipe.ask(pictures(2), after, TEXTS), pipe.ask(-pictures(2), after, TEXTS)
    changed = [(a - b).abs() > 1e-6 for a, b in ((one.p_edit, other.p_edit), (one.p_identity, other.p_identity))]
    assert changed[0].tolist() == [True, False] and changed[1].tolist() == [True, True]


def test_answers_to_samples_follow_their_reference(pipe):
    before, after = pictures(2), pictures(4, seed=1)
    answers = pipe.ask(before, after, TEXTS)
    for row in range(4):
        alone = pipe.ask(before[row // 2 : row // 2 + 1], after[row : row + 1], TEXTS[row // 2])
        assert alone.score.item() == pytest.approx(answers.score[row].item(), abs=1e-5)
    with pytest.raises(ValueError, match="3 outputs for 2 requests"):
        pipe.ask(before, after[:3], TEXTS)


def test_best_of_picks_the_sample_with_the_highest_score(pipe):
    image = pictures(2)
    samples = run(pipe, image, TEXTS, seed=0, num_samples=5)
    scores = pipe.ask(image, samples, TEXTS).score.view(2, 5)
    best = pipe.best_of(image, TEXTS, n=5, seed=0, output_type="pt")
    assert best.picked.tolist() == scores.argmax(1).tolist()
    assert torch.equal(best.images, torch.stack([samples[best.picked[0]], samples[5 + best.picked[1]]]))
    assert torch.allclose(best.answers.score, scores.max(1).values)
    assert scores.std() > 1e-4
    assert isinstance(pipe.best_of(image, TEXTS, n=2, seed=0).images[0], Image.Image)


# text to image


def test_generate_is_guided_flow_sampling():
    """Against two separate calls per step, the unconditional one on padding alone."""
    dit, captions = tiny_dit(), ["red circle on white background", "blue square on grey background"]
    ids = encode(captions, 24)
    calls = {1.0: lambda x, t: dit(x, t, ids), 0.0: lambda x, t: dit(x, t, torch.zeros_like(ids))}
    calls[2.5] = lambda x, t: calls[0.0](x, t) + 2.5 * (calls[1.0](x, t) - calls[0.0](x, t))
    results = {}
    for guidance, velocity in calls.items():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 3, SIDE, SIDE, generator=generator)
        expected = flow.sample(velocity, noise, flow.few_step_times(5, 2.0), "renoise", generator).clamp(-1, 1)
        results[guidance] = generate(dit, captions, 5, guidance, torch.Generator().manual_seed(0), "renoise", 2.0)
        assert torch.allclose(results[guidance], expected, atol=1e-5)
    assert (results[1.0] - results[2.5]).abs().max() > 1e-3
    assert torch.equal(generate(dit, ids, 2, generator=torch.Generator().manual_seed(1)), generate(dit, captions, 2, generator=torch.Generator().manual_seed(1)))


def test_generate_refuses_unknown_words():
    with pytest.raises(ValueError, match="unknown word 'giraffe'"):
        generate(tiny_dit(), ["red giraffe on white background"])


# shipped checkpoints


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A package folder whose checkpoints are tiny."""
    family = tmp_path / "checkpoints" / "shapes"
    tiny_dit(seed=1).save_pretrained(family / "editor")
    tiny_dit(seed=2).save_pretrained(family / "teacher")
    FlowMatchEulerDiscreteScheduler(shift=6.0, stochastic_sampling=True).save_pretrained(family / "editor")
    tiny_judge().save_pretrained(family / "judge")
    build_tokenizer().save_pretrained(family / "judge")
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    return family


def test_load_finds_the_shipped_checkpoints(shipped, capsys):
    editor, teacher = vlmedit.load("shapes"), vlmedit.load("shapes", role="teacher")
    assert torch.equal(editor.transformer.patchify.weight, tiny_dit(seed=1).patchify.weight)
    assert torch.equal(teacher.transformer.patchify.weight, tiny_dit(seed=2).patchify.weight)
    assert (editor.scheduler.config.shift, teacher.scheduler.config.shift) == (6.0, 1.0)
    assert editor.scheduler.config.stochastic_sampling and teacher.scheduler.config.stochastic_sampling
    assert editor.judge is not None and not editor.judge.training and not editor.transformer.training
    assert editor.tokenizer(TEXTS)["input_ids"] == build_tokenizer()(TEXTS)["input_ids"]
    assert capsys.readouterr().err == ""  # no loading bars


def test_load_reads_folders(shipped, pipe, folder, tmp_path):
    same_behavior(pipe, vlmedit.load(folder))
    tiny_dit(seed=4).save_pretrained(tmp_path / "run" / "model")
    for place in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded = vlmedit.load(place)
        assert torch.equal(loaded.transformer.patchify.weight, tiny_dit(seed=4).patchify.weight) and loaded.judge is not None


def test_load_says_what_is_absent(shipped, tmp_path):
    with pytest.raises(FileNotFoundError, match="no warm checkpoint of 'shapes'.*vlmedit train copy_warmup"):
        vlmedit.load("shapes", role="warm")
    with pytest.raises(ValueError, match="unknown role 'student'; known: editor, warm, teacher"):
        vlmedit.load("shapes", role="student")
    with pytest.raises(ValueError, match="'cats' is no shipped checkpoint"):
        vlmedit.load("cats")


def test_importing_vlmedit_is_light():
    code = "import vlmedit, sys; assert 'torch' not in sys.modules and vlmedit.__version__; print(dir(vlmedit))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "EditPipeline" in out
    assert vlmedit.EditPipeline is EditPipeline and vlmedit.generate is generate
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        vlmedit.loads
