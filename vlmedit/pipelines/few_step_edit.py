"""Editing in a few steps for the families whose diffusers pipelines do not show them a reference as they were trained here.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    edited = pipe(image, "make the dog red").images[0]

`vlmedit export` copies this file beside the weights. One class serves Z-Image (reference as frame 0 of two, or, with `omni`, as an image of
its own that is modulated as clean data), Qwen-Image-Edit (as more tokens; the words are encoded without the picture), SD3 and Sana (in further
input channels of a widened transformer). Words are encoded by the family's own pipeline. The number of steps, `omni` and the length of the text
stand in the scheduler's configuration. Imports nothing but torch and diffusers.
"""

import inspect

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.torch_utils import randn_tensor

FAMILIES = {  # transformer: the pipeline that encodes its words
    "ZImageTransformer2DModel": "ZImagePipeline", "QwenImageTransformer2DModel": "QwenImagePipeline", "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "SanaTransformer2DModel": "SanaPipeline",
}  # fmt: skip


class FewStepEditPipeline(DiffusionPipeline, LoraBaseMixin):
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    _lora_loadable_modules = ["transformer"]

    def __init__(self, transformer, vae, scheduler, text_encoder, tokenizer, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2, text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
        )  # fmt: skip
        scale = getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = scale * (1 if self.family == "SanaTransformer2DModel" else 2)  # of a picture's width and height
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.multiple)

    @property
    def family(self):
        return type(self.transformer).__name__

    def load_lora_weights(self, folder, **kwargs):
        """An adapter that `vlmedit export --kind adapter` wrote."""
        self.transformer.load_lora_adapter(folder, prefix="transformer", **{"weight_name": "pytorch_lora_weights.safetensors", **kwargs})

    def encode_words(self, prompts, device, length):
        """What the transformer reads for these prompts: keyword arguments, or for Z-Image a list of states."""
        family = getattr(diffusers, FAMILIES[self.family])
        own = {k: v for k, v in self.components.items() if k in inspect.signature(family).parameters}
        encode, settings = family(**own).encode_prompt, {"device": device, "max_sequence_length": length}
        if self.family == "ZImageTransformer2DModel":
            return encode(prompts, do_classifier_free_guidance=False, **settings)[0]
        if self.family == "QwenImageTransformer2DModel":
            states, mask = encode(prompts, **settings)[:2]
            return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}
        if self.family == "SanaTransformer2DModel":
            states, mask = encode(prompts, do_classifier_free_guidance=False, **settings)[:2]
            used = mask.bool().any(0)  # the others are padding in every prompt
            return {"encoder_hidden_states": states[:, used], "encoder_attention_mask": mask[:, used]}
        states, _, pooled, _ = encode(prompts, None, None, do_classifier_free_guidance=False, **settings)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def statistics(self):
        """Shift and scale of the latents."""
        config = self.vae.config
        if config.get("latents_mean") and config.get("latents_std"):
            column = lambda values: torch.tensor(values).view(1, -1, 1, 1)
            return column(config.latents_mean), 1 / column(config.latents_std)
        return torch.tensor(config.get("shift_factor") or 0.0), torch.tensor(config.get("scaling_factor") or 1.0)

    def encode(self, pixels):
        """Latents (B, C, H, W) of pictures in [-1, 1]; Qwen-Image's autoencoder has an axis of frames."""
        frames = self.family == "QwenImageTransformer2DModel"
        out = self.vae.encode(pixels.unsqueeze(2) if frames else pixels)
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent
        shift, scale = (s.to(z.device) for s in self.statistics())
        return ((z.squeeze(2) if frames else z).float() - shift) * scale

    def decode(self, latents):
        frames = self.family == "QwenImageTransformer2DModel"
        shift, scale = (s.to(latents.device) for s in self.statistics())
        z = (latents / scale + shift).to(self.vae.dtype)
        pixels = self.vae.decode(z.unsqueeze(2) if frames else z, return_dict=False)[0]
        return pixels.squeeze(2) if frames else pixels

    def velocity(self, x, t, words, reference, omni=False):
        """noise - data at x_t, t from 0 (data) to 1 (noise); all (B, C, H, W) but t (B,)."""
        net = self.transformer
        if self.family == "ZImageTransformer2DModel":  # its time runs from noise to data
            known, noisy = reference.unsqueeze(2), x.unsqueeze(2)
            if omni:
                pairs, prompts = [list(pair) for pair in zip(known, noisy)], [[w[:1], w[1:]] for w in words]
                out = net(pairs, 1 - t, prompts, siglip_feats=[None] * len(x), image_noise_mask=[[0, 1]] * len(x), return_dict=False)[0]
            else:
                out = net(list(torch.cat((known, noisy), 2)), 1 - t, words, return_dict=False)[0]
            return -torch.stack([o[:, -1] for o in out])
        if self.family == "QwenImageTransformer2DModel":  # 2x2 latent pixels are a token
            rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
            tokens = torch.cat([F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2) for z in (x, reference)], 1)
            # its forward would round the time to the precision of its tokens; rows after the first B (zero_cond_t) are 0
            whole = lambda _, given: (torch.cat((t, given[0][len(t) :].to(t))),)
            handle = net.time_text_embed.time_proj.register_forward_pre_hook(whole)
            try:
                out = net(hidden_states=tokens, timestep=t, img_shapes=[[(1, rows, columns)] * 2] * len(x), return_dict=False, **words)[0]
            finally:
                handle.remove()
            return F.pixel_shuffle(out[:, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns)), 2)
        settings, time = {}, 1000 * t
        if self.family == "SanaTransformer2DModel":
            time = time * net.config.timestep_scale
            settings["guidance"] = torch.full_like(t, net.config.guidance_embeds_scale) if net.config.guidance_embeds else None
        return net(hidden_states=torch.cat((x, reference), 1), timestep=time, return_dict=False, **settings, **words)[0]

    @torch.no_grad()
    def __call__(
        self, image, prompt, height=None, width=None, num_inference_steps=None, generator=None, latents=None, output_type="pil", return_dict=True,
        max_sequence_length=None,
    ):  # fmt: skip
        """`image`: PIL pictures or tensors (B, 3, H, W) in [0, 1]; `prompt`: one instruction each. Pictures are scaled to height and width, or to
        multiples of `multiple`."""
        device, config, dtype = self._execution_device, self.scheduler.config, self.transformer.dtype
        steps, length = num_inference_steps or config.get("few_steps", 4), max_sequence_length or config.get("text_length", 512)
        words = self.encode_words([prompt] if isinstance(prompt, str) else list(prompt), device, length)
        reference = self.encode(self.image_processor.preprocess(image, height, width).to(device, self.vae.dtype))
        x = randn_tensor(tuple(reference.shape), generator=generator, device=device, dtype=torch.float32) if latents is None else latents
        self.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            time = (t / 1000).expand(len(x)).to(device)  # in float32, whatever the weights are in
            v = self.velocity(x.to(dtype), time, words, reference.to(dtype), config.get("omni", False)).float()
            x = self.scheduler.step(v, t, x, generator=generator, return_dict=False)[0]
        images = x if output_type == "latent" else self.image_processor.postprocess(self.decode(x).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
