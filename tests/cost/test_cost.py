"""The cost arithmetic: counts on the meta device against closed forms and against models that are really built."""

import pytest
import torch
from torch import nn

from vlmedit.cost import counting
from vlmedit.cost.counting import Call, Sizes, count, kept, lora_size, parameters, standing, update_flops
from vlmedit.networks.backbones import families
from vlmedit.networks.lora import adapter_roles, lora_targets
from vlmedit.testing import random_models as tiny


def test_real_models_have_their_published_sizes():
    """Parameters of the configurations as built, without a weight in memory, in billions: Z-Image 6.15, InternVL3-14B 15.1,
    LLaVA-OneVision-7B 8.03, Qwen2.5-VL-7B 8.29, FLUX.1 11.9, Qwen-Image 20.4, FLUX.2 klein 3.88,
    Qwen3-VL-8B 8.77, FLUX's autoencoder 0.0838."""
    judges = {
        counting.internvl3_14b: 15.1, counting.llava_onevision_7b: 8.03, counting.qwen2_5_vl_7b: 8.29, counting.qwen3_4b: 4.02, counting.qwen3_vl_8b: 8.77,
    }  # fmt: skip
    backbones = {"z-image": 6.15, "flux": 11.9, "qwen-image": 20.4, "flux2": 3.88}
    assert backbones.keys() == {name for name, family in families().items() if family.full}
    found = [(build.__name__, build(), billions) for build, billions in judges.items()]
    found += [(name, counting.transformer_of(name), billions) for name, billions in backbones.items()]
    for name, model, billions in [*found, ("autoencoder", counting.autoencoder_of("flux"), 0.0838)]:
        assert all(p.is_meta for p in model.parameters())
        assert parameters(model) / 1e9 == pytest.approx(billions, rel=0.005), name


def test_a_call_is_counted_as_by_hand():
    """Two linear layers with a square between them: FLOPs 2 n (ab + bc); kept are each layer's input and the square's, not the weights.
    A meta model is counted as its real twin."""
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Linear(7, 3, bias=False))
    for device in ("cpu", "meta"):
        twin = model.to(device)
        x = torch.zeros(4, 5, device=device, requires_grad=True)
        call = count(twin, lambda: twin[1](twin[0](x).square()))
        assert call == Call(2 * 4 * (5 * 7 + 7 * 3), 4 * 4 * (5 + 7 + 7), 4 * 4 * (5 + 7 + 7))
    assert call.scaled(2) == Call(2 * call.flops, 2 * call.activations, 2 * call.recomputed)


def test_attention_keeps_no_scores():
    """Fused attention keeps queries, keys, values, output and one float per row; its FLOPs are two products of length squared."""
    q, k, v = (torch.zeros(1, 2, 6, 4, device="meta", requires_grad=True) for _ in range(3))
    call = count(nn.Identity(), lambda: nn.functional.scaled_dot_product_attention(q, k, v))
    assert call.flops == 2 * (2 * 2 * 6 * 6 * 4) and call.activations == 4 * (4 * 2 * 6 * 4 + 2 * 6)


def test_shapes_alone_tell_what_is_kept():
    """A tiny Z-Image on the meta device is counted as the same model with weights on the CPU, byte for byte, and recomputing its blocks
    keeps less than half."""
    counted = {}
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = families()["z-image"].tiny.transformer(tiny.WIDTH)
            given = [torch.zeros(4, 2, 8, 8, requires_grad=True)], torch.ones(1), [torch.zeros(9, tiny.WIDTH)]
        call = lambda: model(list(given[0]), given[1], list(given[2]), return_dict=False)[0][0]
        counted[device] = kept(model, call), (model.enable_gradient_checkpointing(), kept(model, call))[1]
    assert counted["cpu"] == counted["meta"] and counted["meta"][1] < 0.5 * counted["meta"][0]


def test_a_judges_calls_are_counted(tmp_path):
    """Language model: 2 FLOPs per weight of its layers and token, and two products of length squared per layer; recomputing keeps less, for the
    vision tower too."""
    model = tiny.internvl()[0].to("meta")
    language = counting.language_call(model, length=6, rows=3)
    layers = model.model.language_model.layers
    weights = sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    assert language.flops == 2 * 3 * 6 * weights + len(layers) * 3 * 2 * (2 * 6 * 6 * tiny.TEXT["hidden_size"])
    vision = counting.vision_call(model)
    assert vision.flops > 0 and language.recomputed < 0.5 * language.activations and vision.recomputed < 0.5 * vision.activations


def test_standing_memory():
    """The released recipe's structure at 2-byte gradients and 4-byte moments; adapters keep one base; unknown roles are refused."""
    sizes = Sizes(6, 15, 4, 1)
    assert standing(sizes) == {"backbone weights": 36, "judge and encoders": 38, "gradients": 24, "moments": 48}
    assert standing(sizes, "adapters", moments=8) == {"backbone weights": 16, "judge and encoders": 38, "gradients": 4, "moments": 16}
    with pytest.raises(ValueError, match="roles is 'lora'; known: modules, adapters"):
        standing(sizes, "lora")


def test_lora_size_is_the_adapters(tmp_path):
    """Counted from shapes, it is what peft adds for each role."""
    backbone, _ = tiny.load_backbone(tiny.save_backbone("flux", tmp_path))
    expected = lora_size(backbone.transformer, 4, lora_targets(backbone.transformer))
    roles = adapter_roles(backbone, rank=4)
    assert sum(p.numel() for p in roles.student.parameters()) == expected == sum(p.numel() for p in roles.fake.parameters())


def test_update_flops():
    """One unit per forward: the released recipe, by hand; LoRA drops the weights' gradients; a shared rollout drops the fresh ones."""
    released = update_flops(1, 1, 1, 1)
    assert released == {"student": 1.75 * 4, "fake score": 5 * (1.75 + 4), "DMD scores": 3, "decoder": 3, "judge": 3}
    ours = update_flops(1, 1, 1, 1, roles="adapters", fake_updates=2, fresh=False, checkpointing=False)
    assert ours == {"student": 1.75 * 2, "fake score": 2 * 2, "DMD scores": 3, "decoder": 2, "judge": 2}


def test_update_activations():
    """Two student calls wait for one decoder and one judge; checkpointing takes the short counts."""
    student, decoder, judge = Call(0, 100, 10), Call(0, 30, 3), Call(0, 50, 5)
    assert counting.update_activations(student, decoder, judge, 2) == {"student's calls": 40, "decoder": 6, "judge's activations": 10}
    assert sum(counting.update_activations(student, decoder, judge, 1, 1, False).values()) == 180


def test_the_recipe_speaks_of_real_settings():
    """Every line of the released recipe that names a setting of ours names one that exists; each has a source."""
    from vlmedit.experiments.recipe import FIXED, MAIN_STAGE
    from vlmedit.methods.npedit import NPEditConfig

    config = NPEditConfig.make("laptop")
    assert all(hasattr(config, line.here) for line in MAIN_STAGE if line.here)
    lines = (*MAIN_STAGE, *FIXED)
    assert all(line.source.startswith("[") for line in lines) and len({line.what for line in lines}) == len(lines)
