"""Every training stage by name: configuration and generator."""

from vlmedit.config import (
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
from vlmedit.methods.bootstrap import train_bootstrap
from vlmedit.methods.copy_warmup import train_warmup
from vlmedit.methods.cyclegan_turbo import train_cyclegan
from vlmedit.methods.distill import train_distill
from vlmedit.methods.flow_grpo import train_grpo
from vlmedit.methods.judge import train_judge
from vlmedit.methods.npedit import train_npedit
from vlmedit.methods.sft import train_sft
from vlmedit.methods.synthetic_pairs import train_synthetic
from vlmedit.methods.teacher import train_teacher

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
