"""Editing in a few steps for the families whose diffusers pipelines do not show them a reference as they were trained here.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    edited = pipe(image, "make the dog red").images[0]

This is the frame. `vlmedit export` writes it beside the weights as one file (standalone.py) with the family's own calls, those of its training,
which say how the reference is shown: as frame 0 of two, as more tokens, in further input channels of a widened transformer. Words are encoded
without the picture, by a pipeline of the family. The number of steps, `omni` and the length of the text stand in the scheduler's configuration.
"""

import inspect

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.torch_utils import randn_tensor

from vlmedit.networks.codec import latent_statistics
from vlmedit.networks.prompts import padded


class FewStepEditPipeline(DiffusionPipeline, LoraBaseMixin):
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    _lora_loadable_modules = ["transformer"]
    # the family's: diffusers' pipeline of its words, latent pixels per token along a side, and its calls
    text_pipeline, latents_per_token, encode_words, velocity = "", 2, None, None

    def __init__(self, transformer, vae, scheduler, text_encoder, tokenizer, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2, text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
        )  # fmt: skip
        scale = getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = scale * self.latents_per_token  # of a picture's width and height
        self.frames = any(isinstance(m, torch.nn.Conv3d) for m in vae.modules())  # whether the autoencoder has an axis of them
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.multiple)

    def load_lora_weights(self, folder, **kwargs):
        """An adapter that `vlmedit export --kind adapter` wrote."""
        self.transformer.load_lora_adapter(folder, prefix="transformer", **{"weight_name": "pytorch_lora_weights.safetensors", **kwargs})

    def encode_prompts(self, prompts, device, length):
        """What the transformer reads for these prompts."""
        pipeline = getattr(diffusers, self.text_pipeline)
        own = {k: v for k, v in self.components.items() if k in inspect.signature(pipeline).parameters}
        reader, settings = pipeline(**own), {"device": device, "max_sequence_length": length}
        settings = {k: v for k, v in settings.items() if k in inspect.signature(reader.encode_prompt).parameters}
        states, pooled = zip(*(self.encode_words(reader, prompt, **settings) for prompt in prompts))
        return padded(states, None if pooled[0] is None else pooled, device, self.transformer.dtype)

    def encode(self, pixels):
        """Latents (B, C, H, W) of pictures in [-1, 1]."""
        out = self.vae.encode(pixels.unsqueeze(2) if self.frames else pixels)
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent
        shift, scale = (s.to(z.device) for s in latent_statistics(self.vae))
        return ((z.squeeze(2) if self.frames else z).float() - shift) * scale

    def decode(self, latents):
        shift, scale = (s.to(latents.device) for s in latent_statistics(self.vae))
        z = (latents / scale + shift).to(self.vae.dtype)
        pixels = self.vae.decode(z.unsqueeze(2) if self.frames else z, return_dict=False)[0]
        return pixels.squeeze(2) if self.frames else pixels

    @torch.no_grad()
    def __call__(
        self, image, prompt, height=None, width=None, num_inference_steps=None, generator=None, latents=None, output_type="pil", return_dict=True,
        max_sequence_length=None,
    ):  # fmt: skip
        """`image`: PIL pictures or tensors (B, 3, H, W) in [0, 1]; `prompt`: one instruction each. Pictures are scaled to height and width, or to
        multiples of `multiple`."""
        device, config, dtype = self._execution_device, self.scheduler.config, self.transformer.dtype
        steps, length = num_inference_steps or config.get("few_steps", 4), max_sequence_length or config.get("text_length", 512)
        words = self.encode_prompts([prompt] if isinstance(prompt, str) else list(prompt), device, length)
        reference = self.encode(self.image_processor.preprocess(image, height, width).to(device, self.vae.dtype))
        modes = {"omni": True} if config.get("omni", False) else {}
        x = randn_tensor(tuple(reference.shape), generator=generator, device=device, dtype=torch.float32) if latents is None else latents
        self.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            time = (t / 1000).expand(len(x)).to(device)  # in float32, whatever the weights are in
            v = self.velocity(self.transformer, x.to(dtype), time, words, reference.to(dtype), **modes).float()
            x = self.scheduler.step(v, t, x, generator=generator, return_dict=False)[0]
        images = x if output_type == "latent" else self.image_processor.postprocess(self.decode(x).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
