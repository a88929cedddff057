"""Codecs over tiny random autoencoders: constants, shapes, gradients through decode, checkpointing."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderTiny
from helpers.tiny_models import pictures, saved_elements

from vlmedit.networks.codec import AutoencoderCodec, PixelCodec


def kl():
    blocks = 3
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, block_out_channels=(8, 8, 16),
        latent_channels=4, norm_num_groups=4, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip


def tiny():
    return AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)


def dc():
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip


def flux2():
    model = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    return model


def qwen():
    return AutoencoderKLQwenImage(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 2.0, 1.0])


CLASSES = {"kl": (kl, 4, 4), "tiny": (tiny, 4, 8), "dc": (dc, 4, 2), "flux2": (flux2, 16, 4), "qwen": (qwen, 4, 8)}  # channels, downscale


@pytest.fixture(scope="module", params=CLASSES)
def case(request):
    torch.manual_seed(0)
    build, channels, downscale = CLASSES[request.param]
    return request.param, AutoencoderCodec(build()), channels, downscale


def test_shapes(case):
    _, codec, channels, downscale = case
    assert (codec.channels, codec.downscale) == (channels, downscale)
    latents = codec.encode(pictures(2, side=32))
    assert latents.shape == (2, channels, 32 // downscale, 32 // downscale)
    assert codec.decode(latents).shape == (2, 3, 32, 32)


def test_constants_follow_each_class(case):
    """Latents are the autoencoder's own, moved and scaled as that family's pipelines do; decoding undoes exactly that."""
    name, codec, _, _ = case
    model, image = codec.autoencoder, pictures(2, side=32)
    got = codec.encode(image)
    if name == "kl":
        z = model.encode(image).latent_dist.mode()
        expected, decoded = (z - 0.1159) * 0.3611, model.decode(z).sample
    elif name == "tiny":
        expected = z = model.encode(image).latents
        decoded = model.decode(z).sample
    elif name == "dc":
        z = model.encode(image).latent
        expected, decoded = z * 0.41407, model.decode(z).sample
    elif name == "flux2":
        z = model.encode(image).latent_dist.mode()
        packed = F.unfold(z, 2, stride=2).view(2, 16, 8, 8)
        expected = F.batch_norm(packed, model.bn.running_mean, model.bn.running_var, eps=model.config.batch_norm_eps)
        decoded = model.decode(z).sample
    else:
        z = model.encode(image[:, :, None]).latent_dist.mode()
        mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
        expected, decoded = (z[:, :, 0] - mean) / std, model.decode(z).sample[:, :, 0]
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(codec.decode(got), decoded, atol=1e-4)
    assert name == "tiny" or (got.flatten() - (F.pixel_unshuffle(z, 2) if name == "flux2" else z).flatten()).abs().max() > 1e-3


def test_gradient_goes_through_decode(case):
    """Equal to central differences, finite, non-zero for every latent picture, and none for the frozen weights."""
    _, codec, channels, downscale = case
    side = 32 // downscale
    latents = torch.randn(2, channels, side, side, requires_grad=True)
    weight = torch.randn(2, 3, 32, 32)
    value = lambda z: (codec.decode(z).double() * weight).sum()
    (gradient,) = torch.autograd.grad(value(latents), latents)
    assert gradient.isfinite().all() and gradient.flatten(1).norm(dim=1).min() > 0
    assert not any(p.requires_grad for p in codec.parameters())
    towards = gradient / gradient.norm()
    with torch.no_grad():
        slope = (value(latents + 1e-3 * towards) - value(latents - 1e-3 * towards)) / 2e-3
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.01)


@pytest.mark.parametrize("name", ["kl", "tiny", "flux2"])
def test_checkpointing_saves_memory_and_keeps_gradients(name):
    build, channels, downscale = CLASSES[name]
    torch.manual_seed(0)
    plain = AutoencoderCodec(build())
    frugal_model = build()
    frugal_model.load_state_dict(plain.autoencoder.state_dict())
    frugal = AutoencoderCodec(frugal_model, checkpointing=True)
    latents = torch.randn(1, channels, 32 // downscale, 32 // downscale)
    gradients, kept = [], []
    for codec in (plain, frugal):
        z = latents.clone().requires_grad_()
        gradients.append(torch.autograd.grad(codec.decode(z).square().mean(), z)[0])
        kept.append(saved_elements(lambda: codec.decode(z)))
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].norm() > 0
    assert kept[1] < kept[0] / 2, kept


@pytest.mark.parametrize("name", ["dc", "qwen"])
def test_checkpointing_is_refused_where_the_class_has_none(name):
    model = CLASSES[name][0]()
    with pytest.raises(ValueError, match=f"{type(model).__name__} does not support gradient checkpointing"):
        AutoencoderCodec(model, checkpointing=True)


def test_a_saved_autoencoder_is_read_by_its_own_class(tmp_path):
    torch.manual_seed(0)
    model = kl()
    model.save_pretrained(tmp_path)
    codec = AutoencoderCodec.from_pretrained(tmp_path)
    image = pictures(1, side=32)
    assert type(codec.autoencoder) is AutoencoderKL
    assert torch.equal(codec.encode(image), AutoencoderCodec(model).encode(image))


def test_pixel_codec_is_the_identity():
    codec, image = PixelCodec(), pictures(2).requires_grad_()
    assert codec.encode(image) is image and codec.decode(image) is image
    assert (codec.channels, codec.downscale) == (3, 1)
