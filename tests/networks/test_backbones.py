"""Conventions of the real backbones: each pipeline of diffusers is our sampler under another name. Packing, prompts, loading, bad input."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
)
from transformers import Qwen3Config, Qwen3Model

from vlmedit.data.requests import Request, batch_of
from vlmedit.data.world import from_example
from vlmedit.flow import interpolate, sample, to_x0, velocity_target
from vlmedit.networks.backbones import families, family_of
from vlmedit.networks.backbones._base import grid_ids, pack, unpack
from vlmedit.networks.load import backbone_of, load_transformer, widen
from vlmedit.networks.prompts import PromptEmbeddings, PromptTable, encode_prompts
from vlmedit.testing import random_models as tiny

TIMES = (1.0, 0.8, 0.35)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    for name in tiny.backbones():
        tiny.save_backbone(name, folder / name)
    return folder


def plain(saved, name):
    """A backbone as released, without channels for a reference, and its autoencoder."""
    transformer = load_transformer(saved / name, "transformer")
    adapter = family_of(type(transformer).__name__).adapter
    prompts = tiny.random_prompts(4, adapter.pooled_width(transformer.config) is not None, (7, 5) if adapter.masked else (7,))
    return backbone_of(transformer, prompts), tiny.load_backbone(saved / name)[1].autoencoder


def ours(backbone, noise, number=1, reference=None):
    text = backbone.encode_text(torch.full((len(noise), 1), number))
    return sample(lambda x, t: backbone(x, t, text, reference), noise, TIMES)


def scheduler():
    return FlowMatchEulerDiscreteScheduler()


def theirs(name, backbone, vae, noise, reference=None):
    """The family's stock pipeline from the same noise, prompt and times."""
    transformer, text = backbone.transformer, backbone.encode_text(torch.tensor([[1]]))
    side = noise.shape[-1]
    common = dict(sigmas=list(TIMES), num_inference_steps=3, output_type="latent", return_dict=False)
    if name == "flux":
        names = dict(text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
        given = dict(prompt_embeds=text.states, pooled_prompt_embeds=text.pooled, latents=pack(noise), guidance_scale=1.0, height=4 * side, width=4 * side)
        if reference is None:
            out = FluxPipeline(scheduler(), vae, transformer=transformer, **names)(**given, **common)[0]
        else:
            pipe = FluxKontextPipeline(scheduler(), vae, transformer=transformer, **names)
            out = pipe(image=reference, _auto_resize=False, max_area=(4 * side) ** 2, **given, **common)[0]
        return unpack(out, side, side)
    if name == "qwen-image":
        pipe = QwenImagePipeline(scheduler(), vae, None, None, transformer)
        packed = pipe(prompt_embeds=text.states, prompt_embeds_mask=text.mask, latents=pack(noise), true_cfg_scale=1.0, height=8 * side, width=8 * side, **common)[0]
        return unpack(packed, side, side)
    if name == "z-image":
        pipe = ZImagePipeline(scheduler(), vae, None, None, transformer)
        return pipe(prompt_embeds=text.rows(), latents=noise, guidance_scale=0.0, height=4 * side, width=4 * side, **common)[0]
    if name == "sd3":
        pipe = StableDiffusion3Pipeline(transformer, scheduler(), vae, None, None, None, None, None, None)
        return pipe(prompt_embeds=text.states, pooled_prompt_embeds=text.pooled, latents=noise, guidance_scale=1.0, height=4 * side, width=4 * side, **common)[0]
    if name == "flux2":
        pipe = Flux2KleinPipeline(scheduler(), vae, None, None, transformer)
        out = pipe(prompt_embeds=text.states, latents=noise, guidance_scale=1.0, height=4 * side, width=4 * side, **common)[0]
        return out
    pipe = SanaPipeline(None, None, vae, transformer, scheduler())
    given = dict(prompt_embeds=text.states, prompt_attention_mask=text.mask.long(), latents=noise, guidance_scale=1.0, use_resolution_binning=False)
    return pipe(height=2 * side, width=2 * side, **given, **common)[0]


@pytest.mark.parametrize("name", tiny.backbones())
def test_the_stock_pipeline_is_our_sampler(saved, name):
    """Three Euler steps from one noise: packing, positions, time, scale and sign of the family's own pipeline, to 1e-4."""
    backbone, vae = plain(saved, name)
    side = 16 if name == "sana" else 8  # its pipeline wants multiples of 32 pixels
    noise = torch.randn(1, backbone.channels, side, side)
    with torch.no_grad():
        a, b = ours(backbone, noise), theirs(name, backbone, vae, noise)
        assert (a - noise).abs().max() > 0.01  # something was drawn
        if name == "flux2":  # its pipeline undoes the codec's normalisation and packing last
            bn = vae.bn
            a = a * (bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1) + bn.running_mean.view(1, -1, 1, 1)
            a = torch.nn.functional.pixel_shuffle(a, 2)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_kontext_is_our_sampler_with_a_reference(saved):
    backbone, vae = plain(saved, "flux")
    noise, reference = torch.randn(2, 1, 4, 8, 8)
    with torch.no_grad():
        a, b = ours(backbone, noise, reference=reference), theirs("flux", backbone, vae, noise, reference)
        assert (a - ours(backbone, noise)).abs().max() > 1e-3
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", ((4, 8), (6, 4)))
@pytest.mark.parametrize("name", tiny.backbones())
def test_any_aspect_ratio_and_any_prompt_length(saved, name, size):
    """Not square, batch of three with prompts of several lengths: each row is what it is alone, with and without a reference."""
    backbone, _ = tiny.load_backbone(saved / name)
    x, reference = torch.randn(2, 3, backbone.channels, *size)
    t, numbers = torch.tensor([1.0, 0.6, 0.2]), torch.tensor([[1], [2], [0]])
    with torch.no_grad():
        for ref in (None, reference):
            whole = backbone(x, t, numbers, ref)
            rows = [backbone(x[i : i + 1], t[i : i + 1], numbers[i : i + 1], None if ref is None else ref[i : i + 1]) for i in range(3)]
            torch.testing.assert_close(whole, torch.cat(rows), atol=1e-5, rtol=1e-4)
        other = backbone(x, t, numbers.flip(0))
        assert (other[0] - backbone(x, t, numbers)[0]).abs().max() > 1e-6  # the prompt matters


def test_z_image_two_times(saved):
    """Omni mode modulates the reference as clean data, two frames as noisy: both see it, differently; the velocity's sign and time are
    one family's: without a reference both are the same call."""
    backbone, _ = tiny.load_backbone(saved / "z-image")
    x, reference = torch.randn(2, 2, 4, 8, 8)
    call = lambda ref: backbone(x, torch.tensor([0.9, 0.5]), torch.tensor([[1], [2]]), ref)
    with torch.no_grad():
        alone, frames = call(None), call(reference)
        backbone.omni = True
        assert torch.equal(call(None), alone)
        omni = call(reference)
        assert omni.shape == x.shape and (omni - frames).abs().max() > 1e-4 and (omni - call(reference.flip(0))).abs().max() > 1e-6
        clean = backbone(x, torch.zeros(2), torch.tensor([[1], [2]]), reference)
        assert (clean - omni).abs().max() > 1e-4
        backbone.prompts = PromptEmbeddings([torch.randn(1, tiny.WIDTH)] * 3)
        with pytest.raises(ValueError, match="at least 2 tokens"):
            call(reference)


class _Times:
    """What a transformer's sinusoidal embedders are called with."""

    def __init__(self, transformer):
        self.seen = []
        for m in transformer.modules():
            if type(m).__name__ in ("Timesteps", "TimestepEmbedder"):
                m.register_forward_hook(lambda _, given, __: self.seen.append(given[0]))


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("name", tiny.backbones())
def test_time_is_not_rounded(saved, name, autocast):
    """A bf16 backbone, and a float32 one under autocast, embed the very times that a float32 one embeds: no t = 0.9474 that becomes 0.9492."""
    t, numbers = torch.tensor([0.9474, 0.3331]), torch.tensor([[1], [2]])
    seen = []
    for dtype in (torch.float32, torch.bfloat16):
        backbone, _ = tiny.load_backbone(saved / name)
        if not autocast:
            backbone.transformer.to(dtype)
        times = _Times(backbone.transformer)
        x = torch.randn(2, 2, backbone.channels, 8, 8)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            backbone(x[0], t, numbers, x[1])
            backbone(x[0], t.flip(0), numbers)  # the first call left nothing behind
        seen.append(times.seen)
    exact, rough = seen
    assert len(exact) == len(rough) >= 2 and all(torch.equal(a, b.float()) for a, b in zip(exact, rough))
    assert exact[0].dtype == rough[0].dtype == torch.float32 and not torch.equal(rough[0], rough[0].bfloat16().float())


def test_an_oracle_of_each_convention_is_recovered():
    """A stand-in Z-Image that knows x0 and answers in Z-Image's words, x0 - eps at reversed time, is a rectified flow in ours."""
    x0, eps = torch.randn(2, 2, 4, 4, 4)
    t = torch.tensor([0.7, 0.2])
    asked = []

    class Oracle(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")
        config = SimpleNamespace(in_channels=4, cap_feat_dim=tiny.WIDTH)

        def forward(self, x, time, words, return_dict):
            asked.append(time)
            return ([-(velocity_target(x0, eps)[i])[:, None] for i in range(2)],)

    backbone = family_of("ZImageTransformer2DModel").adapter(Oracle(), tiny.random_prompts(2, False))
    x = interpolate(x0, eps, t)
    v = backbone(x, t, torch.tensor([[1], [1]]))
    torch.testing.assert_close(to_x0(x, v, t), x0)
    assert torch.equal(asked[0], 1 - t)


def test_packing():
    """A token is a 2x2 square, channel first: written out by hand; unpack is the inverse on any size; ids are row-major."""
    x = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    tokens = pack(x)
    assert tokens.shape == (1, 6, 8)
    assert tokens[0, 4].tolist() == [x[0, c, 2 + dy, 2 + dx].item() for c in range(2) for dy in range(2) for dx in range(2)]
    assert torch.equal(unpack(tokens, 4, 6), x)
    theirs = FluxPipeline._pack_latents(x, 1, 2, 4, 6)
    assert torch.equal(tokens, theirs)
    assert grid_ids(1, 2, 3).tolist() == [[1, r, c] for r in range(2) for c in range(3)]
    assert grid_ids(10, 1, 2, last=True).tolist() == [[10, 0, 0, 0], [10, 0, 1, 0]]


@pytest.mark.parametrize("name", ("sd3", "sana"))
def test_widening_keeps_the_picture(saved, name):
    """A widened model draws the same without a reference, and with one before training; it takes twice the channels; not twice widened."""
    backbone, _ = plain(saved, name)
    wide = backbone_of(widen(backbone.transformer), backbone.prompts)
    x, t, numbers = torch.randn(2, 4, 8, 8), torch.tensor([0.8, 0.3]), torch.tensor([[1], [2]])
    with torch.no_grad():
        before = backbone(x, t, numbers)
        torch.testing.assert_close(wide(x, t, numbers), before, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(wide(x, t, numbers, torch.randn_like(x)), before, atol=1e-6, rtol=1e-5)
    assert wide.config.in_channels == 8 and wide.channels == 4
    with pytest.raises(ValueError, match="takes 4 channels and so no reference; pass it through vlmedit.networks.load.widen"):
        backbone(x, t, numbers, x)
    with pytest.raises(ValueError, match="widened already"):
        widen(wide.transformer)


# --- prompts


def test_embeddings_are_handed_out_by_number():
    """Right padding and its mask, row 0 for the unconditional score, precision; unknown numbers and empty banks are refused."""
    bank = PromptEmbeddings([torch.ones(2, 3), 2 * torch.ones(4, 3)], [torch.zeros(5), torch.ones(5)])
    text = bank(torch.tensor([[1], [0]]), dtype=torch.bfloat16)
    assert text.mask.tolist() == [[True] * 4, [True, True, False, False]] and text.states.dtype == torch.bfloat16
    assert [r.shape[0] for r in text.rows()] == [4, 2] and not text.states[1, 2:].any() and text.pooled[0].all()
    assert torch.equal(bank(torch.zeros(2, 1, dtype=torch.long)).states[0], torch.ones(2, 3))
    with pytest.raises(IndexError, match="number 2 of a bank of 2"):
        bank(torch.tensor([[2]]))
    with pytest.raises(ValueError, match="at least the empty prompt"):
        PromptEmbeddings([])
    with pytest.raises(ValueError, match="2 prompts but 1 pooled"):
        PromptEmbeddings([torch.ones(1, 3)] * 2, [torch.ones(5)])


def test_prompts_are_the_pipelines_own(saved):
    """Z-Image's prompts through its pipeline with a tiny Qwen3: each row is `encode_prompt` of that text, of its own length."""
    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=tiny.WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=400)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    pipe = ZImagePipeline(scheduler(), None, Qwen3Model(config).eval(), tokenizer, None)
    encode_words = families()["z-image"].call("encode_words")
    bank = encode_prompts(encode_words, pipe, ["", "a red dog"], max_sequence_length=32)
    expected = pipe.encode_prompt("a red dog", do_classifier_free_guidance=False, max_sequence_length=32)[0][0]
    assert torch.equal(bank.states[1], expected) and len(bank.states[0]) < len(bank.states[1])
    backbone = backbone_of(load_transformer(saved / "z-image", "transformer"), bank)
    assert backbone(torch.randn(1, 4, 4, 4), torch.ones(1), torch.tensor([[1]])).isfinite().all()
    with pytest.raises(ValueError, match="no adapter for SimpleNamespace; known: FluxTransformer2DModel"):
        family_of("SimpleNamespace")


def test_requests_become_a_batch():
    """Numbers look up the words; removals ask about the output alone and want a no; the empty prompt is number 0."""
    prompts, questions = PromptTable(), PromptTable()
    batch = batch_of([Request("make it red", "a dog", "a red dog"), Request("remove the cat", "a cat", "a mat", "remove", "a cat")], torch.zeros(2, 3, 8, 8), prompts, questions)
    assert prompts.look_up(batch.target_caption) == ["a red dog", "a mat"] and prompts.texts[0] == "" and prompts.number("a dog") == prompts.number("a dog")
    assert batch.edit_answer.tolist() == [1, 0] and batch.edit_pair.tolist() == [1, 0] and batch.nothing.tolist() == [0, 0]
    asked = questions.look_up(batch.edit_question)
    assert "make it red" in asked[0] and "a cat" in asked[1] and "second" not in asked[1] and "make it red" in questions.look_up(batch.identity_question)[0]
    with pytest.raises(ValueError, match="names no thing"):
        Request("remove it", "a", "b", "remove")
    with pytest.raises(ValueError, match="1 requests of 2 pictures"):
        batch_of([Request("x", "y", "z")], torch.zeros(2, 3, 8, 8), prompts, questions)


def test_the_world_of_shapes_in_plain_words():
    from vlmedit.data.world import held_out

    for example in held_out(16, 0, ("recolor", "remove", "nothing", "replace")):
        request = from_example(example)
        assert request.type == example.edit.type and request.instruction == example.instruction
        assert (request.thing is not None) == (example.edit.type == "remove")


# --- bad input


def test_unusable_models_are_refused_by_name(saved, tmp_path, monkeypatch):
    """Another class, no config, no weights: one error each, before weights are read."""
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="no adapter for AutoencoderKL; known: FluxTransformer2DModel"):
        load_transformer(tmp_path / "vae")
    with pytest.raises(FileNotFoundError, match="no model config at .*nowhere"):
        load_transformer(tmp_path / "nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no model config at someone/some-model"):
        load_transformer("someone/some-model")
    half = tmp_path / "half"
    half.mkdir()
    config = json.loads((saved / "flux" / "transformer" / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="has a config but not all of its weights"):
        load_transformer(half)
    with pytest.raises(ValueError, match="takes its reference as tokens"):
        widen(load_transformer(saved / "flux", "transformer"))


def test_latents_and_prompts_of_another_model_are_refused(saved):
    transformer = load_transformer(saved / "flux", "transformer")
    backbone = backbone_of(transformer, tiny.random_prompts(2))
    ask = lambda *shape: backbone(torch.zeros(*shape), torch.ones(1), torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"x is \(1, 3, 8, 8\); FluxTransformer2DModel takes latents \(B, 4, H, W\)"):
        ask(1, 3, 8, 8)
    with pytest.raises(ValueError, match="multiples of 2"):
        ask(1, 4, 7, 8)
    with pytest.raises(ValueError, match="prompts of width 5, FluxTransformer2DModel reads 16"):
        backbone_of(transformer, PromptEmbeddings([torch.zeros(3, 5)], [torch.zeros(16)]))
    with pytest.raises(ValueError, match="needs pooled prompts"):
        backbone_of(transformer, PromptEmbeddings([torch.zeros(3, 16)]))
    with pytest.raises(ValueError, match="no text mask"):
        backbone_of(transformer, tiny.random_prompts(2, lengths=(3, 4)))
    frames = tiny.load_backbone(saved / "z-image")[0]
    with pytest.raises(ValueError, match="two frames of one latent have one size"):
        frames(torch.zeros(1, 4, 4, 4), torch.ones(1), torch.tensor([[1]]), torch.zeros(1, 4, 8, 4))
