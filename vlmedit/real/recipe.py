"""The released recipe in numbers, each with its source: what the paper's authors ran at 6 billion parameters.

[R] their reimplementation, configs/zimage_instruct_critic_internvl.yaml unless a file is named; [P] the paper [arXiv:2510.14978].
What neither states is not here: the paper's own learning rates, batch size, weights, guidance and GPU-hours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A setting: ours by its name in `NPEditConfig` where it has one, theirs, and where theirs is written."""

    what: str
    here: str | None  # a field of NPEditConfig
    released: str
    source: str


MAIN_STAGE = (
    Line("backbone", None, "Z-Image, 6B, full fine-tune (paper: internal DiT, 2B)", "[R]; [P]"),
    Line("judge", None, "InternVL3-14B (paper: LLaVA-OneVision-7B)", "[R]; [P]"),
    Line("updates", "steps", "14,000; inference uses update 12,000 (paper: 10,000)", "[R]"),
    Line("batch", "batch", "1 per GPU, no accumulation", "[R]"),
    Line("pixels", "side", "7 aspect buckets around 512 x 512", "[R]"),
    Line("student's learning rate", "lr", "2e-5, constant, no warm-up", "[R]"),
    Line("fake score's learning rate", "fake_lr", "2e-5", "[R]"),
    Line("AdamW betas", "betas", "(0, 0.9)", "[R]"),
    Line("weight decay", "weight_decay", "0", "[R]"),
    Line("gradient clip", "clip", "2", "[R]"),
    Line("update skipped above norm", "spike", "300", "[R]"),
    Line("EMA", "ema", "0.999 in the config, off in the code", "[R] DMDTrainer"),
    Line("weight of DMD", "dmd_weight", "1", "[R]"),
    Line("weight of the judge", "judge_weight", "0.02", "[R]"),
    Line("weight of do-nothing", "nothing_weight", "1", "[R]"),
    Line("guidance of the real score", "guidance", "3.5; 7.5 for removal, shape, style, action", "[R]"),
    Line("DMD normaliser", "dmd_norm", "pixel", "[R] latent_fm.py"),
    Line("fake-score updates per student update", "fake_updates", "5", "[R]"),
    Line("their samples", "fake_rollouts", "fresh", "[R] latent_fm.py"),
    Line("sampler's steps", "sampler_steps", "4", "[R]; [P]"),
    Line("shift of their times", "sampler_shift", "6", "[R]"),
    Line("re-noising", "renoise", "fresh (paper: same)", "[R]; [P]"),
    Line("logit-gain ramp, updates", "gain_steps", "2,000", "[R] critic.py"),
    Line("precision", "precision", "bf16, FSDP2, every block recomputed", "[R]"),
    Line("machine", None, "8 x H100 or H200 by torchrun (paper: 32 x A100)", "[R] README"),
)

FIXED = (  # what is no setting of `NPEditConfig`: constants of our code, and RealConfig's own
    Line("DMD normaliser's clamp", None, "1e-8 (here 1e-6, in vlmedit/dmd.py)", "[R] compute_distribution_matching_loss"),
    Line("DMD times", None, "uniform 0.02-0.98, shift 1", "[R]"),
    Line("fake score's times", None, "uniform 0-1, shift 1 (here 0.001-0.999)", "[R]"),
    Line("unroll of several steps from update", None, "0 (class default 4,000: one step before it)", "[R] start_multistep_sampling_step"),
    Line("sampler at inference", None, "eta 1, predictor-corrector (here the training's own re-noising)", "[R] utils_fm/sampler.py"),
    Line("negative prompt", None, "low quality, artifacts", "[R]"),
    Line("text dropout", None, "0; 0.1 in the warm-up", "[R]; [R] zimage_instruct_refcopy.yaml"),
)
