"""Every training stage by name: configuration and generator."""

from vlmedit.train.config import DistillConfig, GRPOConfig, JudgeConfig, NPEditConfig, SFTConfig, TeacherConfig, WarmupConfig
from vlmedit.train.distill import train_distill
from vlmedit.train.grpo import train_grpo
from vlmedit.train.judge import train_judge
from vlmedit.train.npedit import train_npedit
from vlmedit.train.sft import train_sft
from vlmedit.train.teacher import train_teacher
from vlmedit.train.warmup import train_warmup

STAGES = {
    "teacher": (TeacherConfig, train_teacher),
    "judge": (JudgeConfig, train_judge),
    "warmup": (WarmupConfig, train_warmup),
    "npedit": (NPEditConfig, train_npedit),
    "sft": (SFTConfig, train_sft),
    "grpo": (GRPOConfig, train_grpo),
    "distill": (DistillConfig, train_distill),
}
