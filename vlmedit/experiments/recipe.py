"""The released recipe in numbers, each with its source: what the paper's authors ran at 6 billion parameters.

[R] their reimplementation, configs/zimage_instruct_critic_internvl.yaml unless a file is named; [P] the paper [arXiv:2510.14978], its length,
machine and do-nothing share as a report on it quotes them. What neither states is not here: the paper's own learning rates, batch size, weights,
guidance and GPU-hours. A bracket that begins with "here" says where our code, with the settings that ship, does otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A setting: ours by its name in `NPEditConfig` where it has one, theirs, and where theirs is written."""

    what: str
    here: str | None  # a setting of NPEditConfig or of its data
    released: str
    source: str


MAIN_STAGE = (
    Line("backbone", "teacher", "Z-Image, 6B, full fine-tune (paper: internal DiT, 2B)", "[R]; [P]"),
    Line("judge", "judge", "InternVL3-14B (paper: LLaVA-OneVision-7B)", "[R]; [P]"),
    Line("updates", "steps", "14,000; inference uses update 12,000 (paper: 10,000)", "[R]; [P]"),
    Line("batch", "batch", "1 per GPU, no accumulation", "[R]"),
    Line("pixels", "side", "7 aspect buckets around 512 x 512", "[R]"),
    Line("student's learning rate", "lr", "2e-5, constant, no warm-up", "[R]"),
    Line("fake score's learning rate", "fake_lr", "2e-5", "[R]"),
    Line("AdamW betas", "betas", "(0, 0.9)", "[R]"),
    Line("weight decay", "weight_decay", "0", "[R]"),
    Line("gradient clip", "clip", "2", "[R]"),
    Line("update skipped above norm", "skip_above", "300", "[R]"),
    Line("EMA", "ema", "0.999 in the config, off in the code", "[R] DMDTrainer"),
    Line("weight of DMD", "dmd_weight", "1", "[R]"),
    Line("weight of the judge", "judge_weight", "0.02", "[R]"),
    Line("identity question", "identity", "True; both losses averaged (paper: added)", "[R] latent_fm.py; [P]"),
    Line("the judge's loss", "answer_loss", "two logits", "[R] critic.py; [P]"),
    Line("DMD reads the target caption", "target_caption", "True", "[R]; [P]"),
    Line("weight of do-nothing", "nothing_weight", "1", "[R]"),
    Line("guidance of the real score", "guidance", "3.5", "[R]"),
    Line("the same by edit type", "guidance_by_type", "7.5 for removal, shape, style, action", "[R]"),
    Line("DMD normalizer", "dmd_norm", "pixel", "[R] latent_fm.py"),
    Line("fake-score updates per student update", "fake_updates", "5", "[R]"),
    Line("their samples", "fake_rollouts", "fresh", "[R] latent_fm.py"),
    Line("sampler's steps", "sampler_steps", "4", "[R]; [P]"),
    Line("calls of an unroll", "calls", "mixed: 1 in a quarter of the updates, else 2 (paper: 2)", "[R] latent_fm.py; [P]"),
    Line("shift of their times", "sampler_shift", "6", "[R]"),
    Line("re-noising", "renoise", "fresh (paper: same)", "[R]; [P]"),
    Line("logit-gain ramp, updates", "logit_gain_steps", "2,000", "[R] critic.py"),
    Line("precision", "precision", "bf16, FSDP2, every block recomputed", "[R]"),
    Line("machine", None, "8 x H100 or H200 by torchrun (paper: 32 x A100)", "[R] README; [P]"),
)

FIXED = (  # constants of our code, and settings of the data and of the warm-up
    Line("DMD normalizer's clamp", None, "1e-8 (here 1e-6 for both normalizers, in vlmedit/equations/dmd.py)", "[R] compute_distribution_matching_loss"),
    Line("DMD times", None, "uniform 0.02-0.98, shift 1", "[R]"),
    Line("fake score's times", None, "uniform 0-1, shift 1 (here 0.001-0.999, where both ends teach nothing)", "[R]"),
    Line("unroll of several steps from update", None, "0 (class default 4,000: one step before it)", "[R] start_multistep_sampling_step"),
    Line("sampler at inference", None, "eta 1, predictor-corrector (here the training's own re-noising, which diffusers' scheduler has)", "[R] utils_fm/sampler.py"),
    Line("who draws the unroll's calls", None, "every process alike, from the update", "[R] latent_fm.py"),
    Line("guided score", None, "v_un + w (v_c - v_un)", "[R] latent_fm.py"),
    Line("questions", None, "two templates each, for removals and the rest (here in our words)", "[R] critic_models/prompts.py"),
    Line("the judge's pictures", None, "squeezed to 448 x 448, clamped (here a saturated pixel keeps its gradient)", "[R] critic.py"),
    Line("do-nothing share", "nothing_share", "1 % of the requests", "[P]; [R] data/instruct.py"),
    Line("edit types", "type_shares", "removal 0.25, text 0.0837, the eight others 0.0833 each", "[R]"),
    Line("mirrored pictures", "flip", "none; half in the warm-up (here not where the words would be wrong)", "[R]; [R] zimage_instruct_refcopy.yaml"),
    Line("data", None, "pico-banana-400k, GPT-Image-Edit-1.5M: picture, instruction, edited caption", "[R]"),
    Line("autoencoder", None, "fp32, not recomputed (here recomputed, for memory)", "[R]"),
    Line("attention", None, "flash-attn-4 (here torch's own, on every GPU)", "[R] README"),
    Line("warm-up", None, "5,000 updates, batch 2 per GPU, 2e-5 to 1e-6 after 1,000, betas (0.9, 0.99), weight decay 0.01, skip above 100", "[R] zimage_instruct_refcopy.yaml"),
    Line("its times", None, "shift 6, logit-normal weights (here drawn so)", "[R] zimage_instruct_refcopy.yaml"),
    Line("negative prompt", "negative_prompt", "low quality, artifacts", "[R]"),
    Line("text dropout", None, "0; 0.1 in the warm-up", "[R]; [R] zimage_instruct_refcopy.yaml"),
)
