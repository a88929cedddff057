"""Editing with a Z-Image student in a few steps, for diffusers alone: `vlmedit export` copies this file into a pipeline's folder.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    edited = pipe(image, "make the dog red").images[0]

diffusers has no pipeline that gives Z-Image a reference as it was trained here: frame 0 of a two-frame latent, or, with `omni`, an image of
its own modulated as clean data. `omni` and the number of steps stand in the scheduler's configuration. Imports nothing but diffusers.
A process that has loaded another folder's pipeline.py cannot load this one: diffusers keeps both under one name.
"""

import torch
from diffusers import ZImagePipeline
from diffusers.pipelines.z_image.pipeline_output import ZImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class ZImageEditPipeline(ZImagePipeline):
    @torch.no_grad()
    def __call__(
        self, image, prompt=None, prompt_embeds=None, height=None, width=None, num_inference_steps=None, generator=None, latents=None,
        output_type="pil", return_dict=True, max_sequence_length=512,
    ):  # fmt: skip
        """`image`: PIL pictures or tensors (B, 3, H, W) in [0, 1]; `prompt`: one instruction each. Other sizes are scaled to height and width."""
        device, config = self._execution_device, self.scheduler.config
        steps = num_inference_steps or config.get("few_steps", 4)
        pixels = self.image_processor.preprocess(image, height, width).to(device, self.vae.dtype)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        words = prompt_embeds or self.encode_prompt(list(prompts), device, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length)[0]
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        reference = (self.vae.encode(pixels).latent_dist.mode().float() - shift) * scale
        x = randn_tensor(tuple(reference.shape), generator=generator, device=device, dtype=torch.float32) if latents is None else latents
        self.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
        dtype = self.transformer.dtype
        for t in self.progress_bar(self.scheduler.timesteps):
            time = (1 - t / 1000).expand(len(x)).to(device, dtype)  # Z-Image's time runs from noise to data
            known, noisy = reference.to(dtype).unsqueeze(2), x.to(dtype).unsqueeze(2)
            if config.get("omni", False):
                out = self.transformer(
                    [list(pair) for pair in zip(known, noisy)], time, [[w[:1], w[1:]] for w in words],
                    siglip_feats=[None] * len(x), image_noise_mask=[[0, 1]] * len(x), return_dict=False,
                )[0]  # fmt: skip
            else:
                out = self.transformer(list(torch.cat((known, noisy), 2)), time, words, return_dict=False)[0]
            velocity = -torch.stack([o[:, -1] for o in out]).float()
            x = self.scheduler.step(velocity, t, x, generator=generator, return_dict=False)[0]
        if output_type == "latent":
            return ZImagePipelineOutput(images=x) if return_dict else (x,)
        decoded = self.vae.decode((x / scale + shift).to(self.vae.dtype), return_dict=False)[0]
        pictures = self.image_processor.postprocess(decoded.float(), output_type=output_type)
        return ZImagePipelineOutput(images=pictures) if return_dict else (pictures,)
