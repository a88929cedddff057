"""Real classes, tiny random weights, through disk and `from_pretrained`: one NP-Edit update of every backbone and judge, and its roles."""

import copy
import warnings

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers.tiny_models import pictures, saved_elements, tiny_dit, tiny_judge
from peft import LoraConfig

from vlmedit.data.requests import QUESTIONS, Request, batch_of
from vlmedit.methods.npedit import NPEdit, NPEditConfig
from vlmedit.networks.codec import PixelCodec
from vlmedit.networks.dit import DiT
from vlmedit.networks.judges import load_judge
from vlmedit.networks.load import backbone_of, load_transformer
from vlmedit.networks.lora import AdapterRole, Roles, SharedBase, adapter_roles, module_roles, transformer_of
from vlmedit.networks.prompts import PromptTable
from vlmedit.testing import random_models as tiny
from vlmedit.training.optimizer import EMA, Optimizer
from vlmedit.training.run import make_accelerator
from vlmedit.world.tokenizer import build_tokenizer

SIDE, TWO = 32, (1.0, 0.5)
REQUESTS = (
    Request("make the circle red", "a blue circle", "a red circle"),
    Request("remove the cross", "a green cross and a red triangle", "a red triangle", "remove", "a cross"),
    Request("do nothing", "a yellow square", "a yellow square", "nothing"),
)
BACKBONES, JUDGES = (*tiny.backbones(), "shapes"), (*tiny.JUDGES, "shapes")  # the suite's own stand in the same tables


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every tiny backbone and judge on disk."""
    folder = tmp_path_factory.mktemp("real")
    for name in tiny.backbones():
        tiny.save_backbone(name, folder / name)
    for name in tiny.JUDGES:
        tiny.save_judge(name, folder / name)
    tiny_dit(side=SIDE).save_pretrained(folder / "shapes" / "transformer")
    tiny_judge(side=SIDE, vision_layers=3, text_layers=3).save_pretrained(folder / "shapes")
    build_tokenizer().save_pretrained(folder / "shapes")
    return folder


def load_backbone(folder, checkpointing=False):
    """As `tiny.load_backbone`; the suite's own transformer is a backbone itself, and there is no autoencoder."""
    if folder.name != "shapes":
        return tiny.load_backbone(folder, checkpointing=checkpointing)
    return backbone_of(load_transformer(folder, "transformer"), None, checkpointing), PixelCodec()


def prompts_of(backbone):
    """What a batch carries for it: rows of its random prompts, or the world's words."""
    return backbone.prompts if isinstance(backbone, DiT) else PromptTable()


def two_prompts(backbone) -> torch.Tensor:
    return prompts_of(backbone).ids([REQUESTS[0].instruction, REQUESTS[1].instruction]) if isinstance(backbone, DiT) else torch.tensor([[1], [2]])


@pytest.fixture(scope="module")
def parts(saved):
    """Loaded once: backbone and codec by name, judges by name, and a batch; `update` builds roles from copies."""
    questions = PromptTable()
    judges = {name: load_judge(saved / name, questions) for name in JUDGES}
    backbones = {name: load_backbone(saved / name) for name in BACKBONES}
    batches = {
        (name, wording): batch_of(REQUESTS, pictures(3, side=SIDE), prompts_of(backbone), questions, wording)
        for wording in QUESTIONS
        for name, (backbone, _) in backbones.items()
    }
    return backbones, judges, batches


def update(parts, backbone: str, judge: str, kind: str, **settings) -> tuple[NPEdit, Roles]:
    backbones, judges = parts[:2]
    original, codec = backbones[backbone]
    student = copy.deepcopy(original)
    roles = adapter_roles(student, rank=4) if kind == "adapters" else module_roles(student)
    config = NPEditConfig.make("smoke", **{"precision": "no", "batch": 3, "logit_gain_steps": 1, **settings})
    return NPEdit(config, roles.student, roles.fake, roles.teacher, judges[judge], codec), roles


def grads(model) -> list:
    return [p.grad for p in model.parameters()]


PAIRS = [(b, j, "adapters") for b in BACKBONES for j in JUDGES] + [(b, j, "modules") for b, j in zip(BACKBONES, JUDGES)]


@pytest.mark.parametrize("backbone, judge, kind", PAIRS)
def test_one_update_teaches_the_student_alone(parts, backbone, judge, kind):
    """DMD, judge and do-nothing each send a finite, non-zero gradient to the output; the student's backward and step change the
    student and nothing else, the fake's likewise; neither base, teacher, judge nor decoder has a gradient or another value."""
    edit, roles = update(parts, backbone, judge, kind, nothing_weight=1.0)
    batch = parts[2][backbone, "shapes" if judge == "shapes" else "released"]
    everything = {name: m for name, m in (("student", roles.student), ("fake", roles.fake), ("teacher", roles.teacher), ("judge", edit.judge), ("codec", edit.codec))}
    if kind == "adapters":
        base = roles.student.shared.transformer
        everything["base"] = torch.nn.ParameterList(p for n, p in base.named_parameters() if "lora" not in n)
        assert not list(roles.teacher.parameters())
    before = {name: [p.detach().clone() for p in m.parameters()] for name, m in everything.items()}
    with torch.no_grad():  # the fake differs from the teacher, as it does after its first update
        for p in roles.fake.parameters():
            p.add_(0.05 * torch.randn_like(p))
    before["fake"] = [p.detach().clone() for p in roles.fake.parameters()]

    output, metrics = edit.student_backward(batch, TWO, step=5)
    assert output.shape[0] == 3 and output.isfinite().all() and not output.requires_grad
    assert {"gradient_dmd", "gradient_judge", "gradient_nothing", "judge_loss", "p_edit", "p_identity"} == set(metrics)
    assert all(metrics[f"gradient_{k}"] > 0 for k in ("dmd", "judge", "nothing"))
    own = grads(roles.student)
    assert all(g is None or g.isfinite().all() for g in own) and sum(g is not None and bool(g.any()) for g in own) > 0.4 * len(own)
    for name, m in everything.items():
        assert name == "student" or all(g is None for g in grads(m)), name

    loss = edit.fake_backward(output, batch.target_caption)
    assert loss > 0 and any(g is not None and g.any() for g in grads(roles.fake))
    assert all(a is b for a, b in zip(grads(roles.student), own))  # the fake's backward left them
    torch.optim.SGD(roles.student.parameters(), lr=0.1).step()
    for name, m in everything.items():
        same = [torch.equal(a, b) for a, b in zip(before[name], m.parameters())]
        assert not all(same) if name == "student" else all(same), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_reference_pixels_reach_the_velocity(parts, backbone):
    """The student's velocity has a gradient with respect to the reference's pixels, through the encoder; another reference is
    another velocity; the teacher's call takes none."""
    model, codec = parts[0][backbone]
    reference = pictures(2, 1, SIDE).requires_grad_()
    latents = codec.encode(reference)
    x, t, text = torch.randn_like(latents), torch.tensor([0.9, 0.4]), model.encode_text(two_prompts(model))
    if backbone in ("sd3", "sana"):  # new channels start at zero: nothing is seen of the reference before the first update
        assert torch.equal(model(x, t, text, latents), model(x, t, text))
        model = copy.deepcopy(model)
        torch.nn.init.normal_(dict(model.transformer.named_parameters())[f"{model.entry}.weight"], std=0.3)
    v = model(x, t, text, latents)
    (g,) = torch.autograd.grad(v.square().sum(), reference)
    assert v.shape == x.shape and g.isfinite().all() and all(row.abs().max() > 1e-9 for row in g)
    assert (v - model(x, t, text, latents.flip(0))).abs().max() > 1e-6
    assert (v - model(x, t, text)).abs().max() > 1e-6


# --- roles


def lora_values(roles: Roles) -> None:
    for seed, role in enumerate((roles.student, roles.fake)):
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in role.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=g))


def merged(roles: Roles, role: str):
    """The role as a module of its own: its adapter's product added to the base weights by hand."""
    shared = roles.student.shared
    plain = copy.deepcopy(shared.transformer)
    state = {}
    for name, p in plain.named_parameters():
        if "lora_" in name:
            continue
        weight = p.detach().clone()
        if ".base_layer.weight" in name and role != "teacher":
            layer = plain.get_submodule(name.removesuffix(".base_layer.weight"))
            weight += layer.lora_B[role].weight @ layer.lora_A[role].weight * layer.scaling[role]
        state[name.replace(".base_layer", "")] = weight
    out = type(plain).from_config(plain.config)
    out.load_state_dict(state)
    return backbone_of(out, shared.backbone.prompts)


@pytest.mark.parametrize("backbone", ("z-image", "flux", "qwen-image", "shapes"))
def test_adapters_equal_modules_of_the_same_weights(parts, backbone):
    """Three modules with the adapters merged into their weights give the same update: output, metrics and fake loss, and the LoRA
    gradients are the module's gradient G through the chain rule, dB = s G A', dA = s B' G, for every adapted matrix (to 1e-3)."""
    edit, roles = update(parts, backbone, "qwen2.5-vl", "adapters")
    lora_values(roles)
    modules = Roles(merged(roles, "student"), merged(roles, "fake"), merged(roles, "teacher"))
    twin = NPEdit(edit.config, modules.student, modules.fake, modules.teacher, edit.judge, edit.codec)
    results, batch = [], parts[2][backbone, "released"]
    for one in (edit, twin):
        torch.manual_seed(7)
        output, metrics = one.student_backward(batch, TWO, 5)
        results.append((output, metrics, one.fake_backward(output, batch.target_caption)))
    (a, ma, fa), (b, mb, fb) = results
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert ma == pytest.approx(mb, rel=2e-3) and fa == pytest.approx(fb, rel=1e-4)
    for role in ("student", "fake"):
        whole = dict(transformer_of(getattr(modules, role)).named_parameters())
        checked = 0
        for name, layer in roles.student.shared.transformer.named_modules():
            if not hasattr(layer, "lora_A") or whole[f"{name}.weight"].grad is None:
                continue
            g, s, A, B = whole[f"{name}.weight"].grad, layer.scaling[role], layer.lora_A[role].weight, layer.lora_B[role].weight
            for got, want in ((B.grad, s * g @ A.T), (A.grad, s * B.T @ g)):
                assert (got - want).abs().max() <= 1e-3 * want.abs().max() + 1e-9, (role, name)
            checked += 1
        assert checked > 5


def lone(backbone):
    """Student's gradients when nobody else is ever called."""
    x, t, text, ref = setting(backbone)
    roles = adapter_roles(backbone, rank=4)
    lora_values(roles)
    drawn(roles.student, x, t, text, ref).square().sum().backward()
    return [p.grad.clone() for p in roles.student.parameters()]


def drawn(role, x, t, ids, reference):
    """Two calls that share words and reference, as an unroll has them."""
    text = role.encode_text(ids)
    held = role.hold_reference(reference, text)
    return role(role(x, t, text, held), t, text, held)


def setting(backbone):
    g = torch.Generator().manual_seed(3)
    side = SIDE if isinstance(backbone, DiT) else 4
    x, ref = (torch.randn(2, backbone.channels, side, side, generator=g) for _ in range(2))
    return x, torch.tensor([0.7, 0.3]), two_prompts(backbone), ref


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", ("flux", "shapes"))
def test_the_order_of_calls_is_free(saved, name, checkpointing):
    """Teacher and fake called between the student's forward and backward, the fake even with a graph and backward first: the
    student's gradients are those without anybody in between, bit for bit or to 1e-6, also when blocks are recomputed, and also those
    that come back through a reference's keys and values."""

    def load():
        return load_backbone(saved / name, checkpointing)[0]

    expected = lone(load())
    backbone = load()
    x, t, text, ref = setting(backbone)
    roles = adapter_roles(backbone, rank=4)
    lora_values(roles)
    v = drawn(roles.student, x, t, text, ref)
    with torch.no_grad():
        roles.teacher(x, t, text)
        roles.fake(x, t, text)
    roles.fake(x, t, text).square().sum().backward()
    fake = [p.grad.clone() for p in roles.fake.parameters()]
    roles.teacher.shared.switch("teacher")
    v.square().sum().backward()
    for p, g in zip(roles.student.parameters(), expected):
        torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-5)
    assert any(g.any() for g in expected) and all(torch.equal(p.grad, g) for p, g in zip(roles.fake.parameters(), fake))


def test_the_trap_is_real(saved):
    """The same with peft's own switch: the student's gradients are silently zero. This is what the roles are for."""
    backbone = tiny.load_backbone(saved / "flux")[0]
    x, t, text, ref = setting(backbone)
    transformer = backbone.transformer.requires_grad_(False)
    for name in ("student", "fake"):
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name=name)
    transformer.set_adapter("student")
    v = backbone(x, t, text, ref)
    transformer.set_adapter("fake")
    v.square().sum().backward()
    student = [p for n, p in transformer.named_parameters() if ".student." in n]
    assert student and all(p.grad is None or not p.grad.any() for p in student)


def test_roles_are_told_apart(saved, tmp_path):
    """With other weights the three roles draw differently, the teacher as the base; state round trips; a saved adapter loads into
    a stock model and draws as the student; a role cannot be frozen alone; no rank, no adapter."""
    backbone = tiny.load_backbone(saved / "flux")[0]
    x, t, text, ref = setting(backbone)
    with torch.no_grad():
        plain = backbone(x, t, text, ref)
        roles = adapter_roles(backbone, rank=4)
        assert torch.equal(roles.student(x, t, text, ref), plain)  # adapters start at zero
        lora_values(roles)
        drawn = {name: getattr(roles, name)(x, t, text, ref) for name in ("student", "fake", "teacher")}
        assert torch.equal(drawn["teacher"], plain)
        assert (drawn["student"] - plain).abs().max() > 1e-3 and (drawn["student"] - drawn["fake"]).abs().max() > 1e-3
        roles.fake.load_state_dict({k.replace(".student.", ".fake."): v for k, v in roles.student.state_dict().items()})
        assert torch.equal(roles.fake(x, t, text, ref), drawn["student"])
        roles.student.save(tmp_path)
        stock = FluxTransformer2DModel.from_pretrained(saved / "flux" / "transformer")
        stock.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
        torch.testing.assert_close(backbone_of(stock, backbone.prompts)(x, t, text, ref), drawn["student"], atol=1e-5, rtol=1e-4)
    assert roles.teacher.requires_grad_(False).eval() is roles.teacher and all(p.requires_grad for p in roles.student.parameters())
    with pytest.raises(ValueError, match="cannot be frozen by itself"):
        roles.student.requires_grad_(False)
    with pytest.raises(KeyError, match="another model"):
        roles.student.load_state_dict({})
    with pytest.raises(ValueError, match="rank is 0"):
        SharedBase(tiny.load_backbone(saved / "flux")[0], rank=0)
    assert isinstance(roles.student, AdapterRole)


# --- memory and precision


@pytest.mark.parametrize("name", ("z-image", "shapes"))
def test_checkpointing_keeps_less_and_changes_nothing(saved, name):
    """The backbone keeps less than 0.7 of the elements; gradients agree to 1e-5."""
    elements, slopes = [], []
    for on in (False, True):
        backbone = load_backbone(saved / name, on)[0]
        x, t, text, ref = setting(backbone)
        elements.append(saved_elements(lambda: backbone(x, t, text, ref)))
        backbone(x, t, text, ref).square().sum().backward()
        slopes.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    assert elements[1] < 0.7 * elements[0]
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_that_recomputes_keeps_less(saved, name):
    """The frozen judge keeps less than 0.7 of the elements although `eval` was called; gradients of the pixels agree to 1e-6."""
    elements, slopes = [], []
    for on in (False, True):
        judge = load_judge(saved / name, checkpointing=on).requires_grad_(False).eval()
        shown = pictures(2, 4, SIDE).requires_grad_()
        ask = lambda: judge.logit_margin([(shown[0], shown[1])] * 2, ["was this done : remove the circle ?", "is the rest the same : remove the circle ?"])
        elements.append(saved_elements(ask))
        slopes.append(torch.autograd.grad(ask().sum(), shown)[0])
    assert elements[1] < 0.7 * elements[0]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bf16_agrees(parts, backbone):
    """Velocity in bf16 against fp32: within 5 % of its norm, returned in the precision of x."""
    model = copy.deepcopy(parts[0][backbone][0])
    x, t, text, ref = setting(model)
    with torch.no_grad():
        exact = model(x, t, text, ref)
        transformer_of(model).to(torch.bfloat16)
        rough = model(x, t, text, ref)
    assert rough.dtype == torch.float32 and (rough - exact).norm() < 0.05 * exact.norm()


def test_loading_goes_by_the_class(saved):
    assert type(load_transformer(saved / "flux", "transformer")) is FluxTransformer2DModel


def test_the_engine_trains_an_adapter_of_a_bf16_base(saved):
    """The suite's own optimizer and average take a role as a model: the student's adapter of a half-precision base moves, the base and the
    fake's adapter do not, the average holds the adapter alone and goes back into it."""
    backbone = tiny.load_backbone(saved / "flux")[0]
    backbone.transformer.to(torch.bfloat16)
    x, t, text, ref = setting(backbone)
    roles = adapter_roles(backbone, rank=4)
    lora_values(roles)
    config = NPEditConfig.make("smoke", precision="no", lr=1e-2)
    optimizer, ema = Optimizer(roles.student, config), EMA(roles.student, 0.5)
    before = {n: p.detach().clone() for n, p in backbone.transformer.named_parameters()}
    roles.student(x, t, text, ref).square().sum().backward()
    norm, fine = optimizer.step(5, make_accelerator(config))
    ema.update(roles.student, 5)
    moved = {n for n, p in backbone.transformer.named_parameters() if not torch.equal(p, before[n])}
    assert fine and norm > 0 and moved and moved <= {n for n, _ in roles.student.named_parameters()}
    assert ema.shadow.keys() == dict(roles.student.named_parameters()).keys()
    roles.student.load_state_dict(ema.shadow)
    assert all(torch.equal(p, ema.shadow[n]) for n, p in roles.student.named_parameters())
