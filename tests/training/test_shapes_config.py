"""The suite's own models behind the real models' interfaces: the same numbers as in the miniature, and the real trainer teaches them."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers.tiny_models import SIDE, pictures, tiny_dit, tiny_judge
from safetensors.torch import load_file

import vlmedit
from vlmedit.cli._settings import read_settings, typed
from vlmedit.cost import plan
from vlmedit.data.manifest import Row, check_questions, nothing_of
from vlmedit.data.requests import Request, batch_of
from vlmedit.data.world import batch_of_examples as shape_batch
from vlmedit.data.world import from_example, sample_example
from vlmedit.equations.unroll import rollout
from vlmedit.errors import ConfigError, InputError
from vlmedit.flow import few_step_times
from vlmedit.methods.npedit import NPEdit, NPEditConfig
from vlmedit.networks import checks
from vlmedit.networks import load as loading
from vlmedit.networks.codec import PixelCodec
from vlmedit.networks.dit import DiT
from vlmedit.networks.judges import load_judge
from vlmedit.networks.load import backbone_of, load_transformer
from vlmedit.networks.lora import adapter_roles, module_roles
from vlmedit.networks.prompts import PromptTable
from vlmedit.networks.sharding import shard
from vlmedit.networks.text import TextEncoder
from vlmedit.pipelines.export import export
from vlmedit.pipelines.shapes import EditPipeline
from vlmedit.seeds import rng_for
from vlmedit.testing import tiny_data as rehearsal
from vlmedit.training.gathered import whole
from vlmedit.training.real_models import train_real
from vlmedit.training.settings import CONFIGS, RealConfig
from vlmedit.world.tokenizer import build_tokenizer

KINDS = ("recolor", "remove", "nothing", "add", "style", "move")
ROWS = 24


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny pipeline and judge of the suite's own, on disk as the real trainer reads them."""
    folder = tmp_path_factory.mktemp("shapes")
    EditPipeline(tiny_dit(), FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True), build_tokenizer()).save_pretrained(folder / "backbone")
    tiny_judge().save_pretrained(folder / "judge")
    build_tokenizer().save_pretrained(folder / "judge")
    return folder


@pytest.fixture(scope="module")
def examples():
    return [sample_example(rng_for("bridge", i), (kind,)) for i, kind in enumerate(KINDS)]


def behind_the_interfaces(saved, examples, reference):
    """Backbone, judge and batch as a real run has them: the pipeline's own words, questions by number."""
    requests, questions = [from_example(e) for e in examples], PromptTable()
    prompts = loading.prompts_of(SimpleNamespace(backbone=str(saved / "backbone"), negative_prompt=""), [])
    batch = batch_of(requests, reference, prompts, questions, "shapes")
    return lambda: backbone_of(load_transformer(saved / "backbone", "transformer"), None), load_judge(saved / "judge", questions), batch


def test_both_ways_are_one(saved, examples):
    """An update of the miniature and the same one of what the real trainer loads, behind `logit_margin`: output, metrics, fake loss and the gradient of
    every weight of student and fake score agree to rounding, text encoder included; removals, pairs and do-nothing rows are among them."""
    reference = pictures(len(examples), 3, SIDE)
    build, judge, batch = behind_the_interfaces(saved, examples, reference)
    plain = shape_batch(examples, reference)
    for name in ("instruction", "reference_caption", "target_caption", "edit_answer", "edit_pair", "nothing"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    assert batch.types == plain.types and 0 < plain.edit_pair.sum() < len(examples)
    config = NPEditConfig.make("smoke", precision="no", batch=len(examples), nothing_weight=0.7, judge_weight=0.3)
    dits = [tiny_dit() for _ in range(3)]
    with torch.no_grad():
        dits[1].head[0].weight.mul_(1.1)  # the fake score is no copy of the teacher
    found = []
    backbones = [build() for _ in range(3)]
    backbones[1].load_state_dict(dits[1].state_dict())
    for edit, b in ((NPEdit(config, *dits, tiny_judge()), plain), (NPEdit(config, *backbones, judge, PixelCodec()), batch)):
        torch.manual_seed(11)
        output, metrics = edit.student_backward(b, (1.0, 0.5), 5)
        found.append((output, metrics, edit.fake_backward(output, b.target_caption), [p.grad for m in (edit.student, edit.fake) for p in m.parameters()]))
    (a, ma, fa, ga), (b, mb, fb, gb) = found
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert ma == pytest.approx(mb, rel=1e-4) and fa == pytest.approx(fb, rel=1e-5)
    assert len(ga) == len(gb) and sum(g is not None and bool(g.any()) for g in ga) > 0.8 * len(ga)
    for x, y in zip(ga, gb):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x - y).abs().max() <= 1e-4 * x.abs().max() + 1e-8


@pytest.mark.parametrize("kind", ("modules", "adapters"))
def test_an_unroll_reads_words_and_reference_once(saved, examples, monkeypatch, kind):
    """Whoever the student is, its two calls share the text's states and the reference's keys and values; rebuilt in each call they give the
    same picture."""
    build, judge, batch = behind_the_interfaces(saved, examples, pictures(len(examples), 3, SIDE))
    roles = module_roles(build()) if kind == "modules" else adapter_roles(build(), rank=2)
    edit = NPEdit(NPEditConfig.make("smoke", precision="no"), roles.student, roles.fake, roles.teacher, judge, PixelCodec())
    read = []
    monkeypatch.setattr(DiT, "encode_reference", lambda *a, own=DiT.encode_reference: read.append("reference") or own(*a))
    monkeypatch.setattr(TextEncoder, "forward", lambda *a, own=TextEncoder.forward: read.append("text") or own(*a))
    torch.manual_seed(3)
    with torch.no_grad():
        output = edit.edit(batch, (1.0, 0.5))
        assert sorted(read) == ["reference", "text"]
        torch.manual_seed(3)
        noise = torch.randn_like(batch.reference)
        again = rollout(lambda x, t: roles.student(x, t, batch.instruction, batch.reference), noise, (1.0, 0.5), edit.config.renoise)
    torch.testing.assert_close(output, again, atol=1e-5, rtol=1e-5)
    assert sorted(read) == ["reference"] * 3 + ["text"] * 3


def test_shards_read_words_and_reference_outside_their_root(saved):
    """A transformer that is its own backbone is asked for words and reference by themselves: in shards (of one process) too, with the
    gradients of the whole one."""
    plugin = SimpleNamespace(cpu_offload=None, reshard_after_forward=True)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin)
    )
    x, reference = pictures(2, 1, SIDE), pictures(2, 2, SIDE)
    t, ids = torch.tensor([0.9, 0.4]), tiny_dit().prompts.ids(["remove the circle", "do nothing"])

    def slopes(dit):
        text = dit.encode_text(ids)
        held = dit.hold_reference(reference, text)
        dit(dit(x, t, text, held), t, text, held).square().sum().backward()
        dit(x, t, ids, reference).square().sum().backward()
        return [None if p.grad is None else whole(p.grad) for p in dit.parameters()]

    expected = slopes(tiny_dit())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = slopes(shard(tiny_dit(), accelerator, "no"))
    finally:
        dist.destroy_process_group()
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_margins_are_the_judges_own(saved):
    """Mixed questions of one and two pictures, one of them asked twice of a pair: each margin is that of the model on that row alone; the
    pair is encoded once; a picture of another size is resized as `see` does."""
    judge, own = load_judge(saved / "judge"), tiny_judge()
    a, b, c = pictures(3, 5, SIDE)
    wide = pictures(1, 6, 2 * SIDE)[0]
    rows = [(a, b), (c,), (a, b), (c, wide)]
    questions = ["was this done : remove the red circle ?", "is there a triangle ?", "is the rest the same : remove the red circle ?", "is there a cross ?"]
    passes = []
    handle = judge.model.stem.register_forward_pre_hook(lambda _, x: passes.append(len(x[0])))
    with torch.no_grad():
        margins, logits = judge.logit_margin(rows, questions), judge.answer_logits(rows, questions)
        handle.remove()
        assert passes == [1, 2, 1, 2]  # one single, then two distinct pairs; once per call
        small = torch.nn.functional.interpolate(wide[None], (SIDE, SIDE), mode="bicubic", antialias=True)[0].clamp(-1, 1)
        for i, (row, question) in enumerate(zip([(a, b), (c,), (a, b), (c, small)], questions)):
            ids = torch.tensor(judge.tokenizer([question])["input_ids"])
            torch.testing.assert_close(margins[i : i + 1], own.yes_no_margin(ids, torch.stack(row)[None]), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(logits[i : i + 1], own.answer_logits(ids, torch.stack(row)[None]), atol=1e-5, rtol=1e-4)
    assert margins.std() > 1e-4


def test_what_it_cannot_read_is_said(saved, tmp_path):
    """Foreign questions, words of another world in the data, the released wording before its judge, pictures of another size: one message
    each; do-nothing requests of the real feed are in the world's words."""
    judge = load_judge(saved / "judge")
    picture = pictures(1, 0, SIDE)[0]
    with pytest.raises(ValueError, match="cannot read 'Does the image contain a dog.*questions=shapes"):
        judge.logit_margin([(picture,)], ["Does the image contain a dog?"])
    with pytest.raises(ValueError, match="writes nothing"):
        judge.write([(picture,)], ["describe it"])
    with pytest.raises(ValueError, match="1 questions about 2 sets"):
        judge.logit_margin([(picture,), (picture,)], ["is there a triangle ?"])
    (problem,) = checks.check_judge(str(saved / "judge"), "released")
    assert "questions=shapes" in problem and checks.check_judge(str(saved / "judge"), "shapes") == [] == checks.check_judge(str(saved / "judge"))
    assert checks.check_backbone(str(saved / "backbone")) == []
    request = Request("make the circle red", "a circle", "a red circle")
    rows = [Row(tmp_path / "a.png", dataclasses.replace(request, instruction="make the dog red")), Row(tmp_path / "b.png", request)]
    check_questions(rows, "released")
    with pytest.raises(InputError) as error:
        check_questions(rows, "shapes")
    assert len(error.value.problems) == 1 and "a.png" in error.value.problems[0]
    check_questions([Row("", nothing_of(request, rng_for(i))) for i in range(20)], "shapes")
    backbone = backbone_of(load_transformer(saved / "backbone", "transformer"), None)
    with pytest.raises(ValueError, match=f"draws {SIDE} x {SIDE} pixels alone: buckets={SIDE}x{SIDE}"):
        backbone(torch.zeros(1, 3, 32, 32), torch.ones(1), torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ConfigError, match="negative_prompt is 'ugly', and .* reads an empty one: negative_prompt=''"):
        loading.prompts_of(SimpleNamespace(backbone=str(saved / "backbone"), negative_prompt="ugly"), [])


@pytest.fixture
def few(monkeypatch):
    """A quick world: few requests."""
    monkeypatch.setitem(rehearsal.DATA, "squares", lambda folder: rehearsal.save_squares(folder, ROWS))


@pytest.mark.parametrize("roles", ("modules", "adapters"))
def test_the_real_trainer_teaches_the_miniature(few, tmp_path, roles):
    """`train npedit --config shapes`: trained weights, no stand-ins. The do-nothing distance and the judge are finite, the student moves from
    its warm-up's weights; what is exported is the suite's own pipeline and draws what the unroll draws; the dry run counts its weights."""
    given = read_settings(Path("shapes")) | {"out": str(tmp_path / "run"), "steps": 2, "batch": 4, "warmup": 0, "strip_every": 2}
    if roles == "adapters":
        given |= {"roles": "adapters", "rank": 4, "start": None}
    config = RealConfig.make("laptop", **typed(RealConfig, given))
    steps = list(train_real(config))
    assert len(steps) == 2 and all(0 < s.metrics["p_identity"] < 1 for s in steps)
    (strip,) = (tmp_path / "run" / "strips").glob("*.png")
    if roles == "modules":
        before, after = vlmedit.load(role="warm").transformer.state_dict(), load_file(tmp_path / "run/model/diffusion_pytorch_model.safetensors")
        assert sum(not torch.equal(after[k], before[k]) for k in after) > 0.8 * len(after)
        with pytest.raises(InputError, match="whole transformer"):
            export(tmp_path / "run", tmp_path / "lora", "adapter")
    else:
        with pytest.raises(InputError, match="takes no adapter"):
            export(tmp_path / "run", tmp_path / "lora", "adapter")
    pipe = vlmedit.load(export(tmp_path / "run", tmp_path / "editor"))
    assert pipe.transformer.dtype == torch.float32 and "vlmedit.load" in (tmp_path / "editor/README.md").read_text()
    picture, text = pictures(1, 2, 32), "remove the circle"
    drawn = pipe(picture, text, seed=3, output_type="pt").images
    noise = [torch.randn(1, 3, 32, 32, generator=g) for g in [torch.Generator().manual_seed(3)] for _ in range(4)]
    ids = torch.tensor(pipe.tokenizer([text], padding="max_length", max_length=24)["input_ids"])
    fresh = iter(noise[1:])
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: next(fresh))
        ours = rollout(lambda x, t: pipe.transformer(x, t, ids, picture), noise[0], few_step_times(4), "fresh").clamp(-1, 1)
    torch.testing.assert_close(drawn, ours, atol=1e-4, rtol=1e-4)
    counted = {r["role"]: r["parameters"] for r in plan.plan(config).table()}
    assert counted["teacher"] == sum(p.numel() for p in pipe.transformer.parameters()) and counted["autoencoder"] == 0
    assert counted["judge"] == sum(p.numel() for p in vlmedit.load().judge.parameters())


def test_the_shipped_settings_are_the_miniatures(few):
    """Every number of shapes.yaml that is marked [M] is NPEditConfig's default."""
    found = read_settings(Path("shapes"))
    text = (CONFIGS / "shapes.yaml").read_text()
    marked = [line.split(":")[0] for line in text.splitlines() if "[M]" in line and not line.startswith("#")]
    ours = NPEditConfig.make("laptop")
    told = {k: found[k] for k in marked if hasattr(ours, k) and k != "steps"}
    assert len(told) > 15 and all(json.loads(json.dumps(getattr(ours, k))) == v for k, v in told.items())
