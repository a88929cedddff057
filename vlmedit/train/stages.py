"""Every training stage by name: configuration and generator."""

from vlmedit.train.bootstrap import train_bootstrap
from vlmedit.train.config import (
    BootstrapConfig,
    CycleGANConfig,
    DistillConfig,
    GRPOConfig,
    JudgeConfig,
    NPEditConfig,
    SFTConfig,
    SyntheticConfig,
    TeacherConfig,
    WarmupConfig,
)
from vlmedit.train.cyclegan import train_cyclegan
from vlmedit.train.distill import train_distill
from vlmedit.train.grpo import train_grpo
from vlmedit.train.judge import train_judge
from vlmedit.train.npedit import train_npedit
from vlmedit.train.sft import train_sft
from vlmedit.train.synthetic import train_synthetic
from vlmedit.train.teacher import train_teacher
from vlmedit.train.warmup import train_warmup

STAGES = {
    "teacher": (TeacherConfig, train_teacher),
    "judge": (JudgeConfig, train_judge),
    "warmup": (WarmupConfig, train_warmup),
    "npedit": (NPEditConfig, train_npedit),
    "sft": (SFTConfig, train_sft),
    "grpo": (GRPOConfig, train_grpo),
    "synthetic": (SyntheticConfig, train_synthetic),
    "cyclegan": (CycleGANConfig, train_cyclegan),
    "bootstrap": (BootstrapConfig, train_bootstrap),
    "distill": (DistillConfig, train_distill),
}
