"""Stage 4: NP-Edit. No target image anywhere: a judge's yes and the teacher's manifold are all the student hears
[arXiv:2510.14978, Sec. 3; Algorithm 1].

Per update: unroll the student on (reference, instruction); at its output take the gradient of each loss by itself (DMD with
the target caption; the judge's two questions; distance to the reference where the instruction is "do nothing"); add them and
send the sum back through the unroll once. Then teach the fake score the student's new distribution.

Deviates from the released code: two fake-score updates on the student's own rollout instead of five on fresh ones
(`fake_updates`, `fake_rollouts`), smaller weights' scale; each is a switch.

Its relatives are switches of the same update: `matching` and `gan_weight` (equations/matching.py), `reward` and how it is asked
(equations/rewards.py); without DMD (`dmd_weight=0`) DRaFT-K, AlignProp, ReFL and R0 by `gradient_calls`, `truncate`, `pretrain_weight` and
`anchor_weight`.

The same update runs real models: roles and judge are then theirs, and the flow lives in a codec's latents, which the judge alone sees
decoded. The released recipe is configs/zimage_internvl.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlmedit.config import WORLD, BackboneConfig
from vlmedit.data.batches import UnpairedBatch
from vlmedit.equations.dmd import NORMS, draw_dmd_time, fake_score_loss
from vlmedit.equations.judge_loss import ANSWER_LOSSES, gain_ramp
from vlmedit.equations.matching import OBJECTIVES, MatchingContext, gan_loss, ratio_head, ratio_loss
from vlmedit.equations.rewards import REWARDS, WORDINGS
from vlmedit.equations.rewards import Panel as JudgePanel
from vlmedit.equations.unroll import CALLS, RENOISE, draw_times, rollout
from vlmedit.errors import ConfigError
from vlmedit.flow import flow_matching_loss, logit_normal_time
from vlmedit.methods._build import BackboneMethod, begin_roles, load_roles
from vlmedit.networks.codec import PixelCodec
from vlmedit.protocols import Codec, Judge, Phase, Trained
from vlmedit.seeds import rng_for
from vlmedit.training.run import SHOWN, Step
from vlmedit.training.trainer import train

MANIFEST_MATCHING = ("dmd", "sid", "pseudo-huber")  # the others read features that only the miniature's networks show


@dataclass(frozen=True)
class NPEditConfig(BackboneConfig):
    """NP-Edit: DMD + judge + do-nothing [arXiv:2510.14978; R: zimage_instruct_critic_internvl.yaml]."""

    world = {"side": 32, "task": "edit", "emphasis": (), "fulfilled_share": 0.2, "request_limit": None}  # [X]; R: fulfilled_share 0
    manifest = {}

    out: str = "runs/npedit"
    judge: tuple[str, ...] = ("runs/judge/model",)  # several are asked together
    steps: int = 2000
    batch: int = 32
    lr: float = 1.0e-3  # [X]; R: 2e-5 at 6B parameters
    fake_lr: float = 1.5e-3
    betas: tuple[float, float] = (0.5, 0.98)  # [X]; R: (0, 0.9)
    weight_decay: float = 0.0  # [R]
    warmup: int = 20
    final_lr: float = 0.1
    ema: float = 0.99
    matching: str = "dmd"  # what pulls to the teacher's pictures: see vlmedit/equations/matching.py
    dmd_weight: float = 1.0  # of that; 0 is off [R]
    judge_weight: float = 0.15  # [X]; R: 0.02
    nothing_weight: float = 5.0  # of the squared distance to the reference, in latents, on do-nothing rows [X]; R: 1.0
    guidance: float = 2.0  # of the real score, w = 1 is off; R: 3.5
    guidance_by_type: dict[str, float] = field(default_factory=dict)  # of these edit types instead; R: 7.5 for removals, shape, style and action
    dmd_norm: str = "sample"
    fake_updates: int = 2  # per student update; R: 5
    ratio_weight: float = 0.1  # of the discriminator in the fake's loss, where `matching` needs one
    fake_rollouts: str = "shared"  # fake updates see the student's own rollout, or "fresh" ones [R]
    calls: str = "mixed"  # one call in a quarter of the updates, otherwise two; the same in every process
    sampler_steps: int = 4
    sampler_shift: float = 1.0
    renoise: str = "fresh"
    gradient_calls: int | None = None
    truncate: str = "fixed"  # "random": the gradient goes through the last K calls, K uniform up to all [AlignProp]
    gan_weight: float = 0.0  # of DMD2's adversarial term beside the matching; 0.5 pulls a quarter as hard as DMD at the start [X]
    anchor_weight: float = 0.0  # of |weights - their start|^2 [R0's kind of regularizer]
    pretrain_weight: float = 0.0  # of the warm-up's own loss on the batch's references [ReFL's second term]
    reward: str = "judge"  # who says whether an edit is right: see vlmedit/equations/rewards.py
    wording: str = "schooled"  # of the questions: see vlmedit/equations/rewards.py
    augment: bool = False  # the judge sees both pictures shifted and speckled
    teacher_draws: int = 2  # noises per picture, where the teacher is the judge
    teacher_scale: float = 50.0  # of its margin [X]
    identity: bool = True  # ask the second question too; the mean of both losses counts
    answer_loss: str = "two_logits"
    logit_gain_steps: int = 30  # updates in which the gain of the judge's logits grows from 0.1 to 1; R: 2000 of 14000
    target_caption: bool = True  # False: DMD sees the reference's caption, which does not carry the edit

    def __post_init__(self):
        super().__post_init__()
        if not self.judge:
            raise ConfigError("judge is empty; name at least one vision-language model")
        if self.dmd_weight == 0 and self.judge_weight == 0:
            raise ConfigError("dmd_weight and judge_weight are both 0; nothing would be learnt")
        if self.gan_weight and not (self.dmd_weight and OBJECTIVES.get(self.matching, OBJECTIVES["dmd"]).fake):
            raise ConfigError(f"gan_weight is {self.gan_weight}; its discriminator is a head of the fake score, which dmd_weight 0 and matching 'mmd' do not train")
        self.check_judge_settings()
        self.check_choices(matching=OBJECTIVES, dmd_norm=NORMS, calls=CALLS, renoise=RENOISE, answer_loss=ANSWER_LOSSES, truncate=("fixed", "random"))
        if self.gradient_calls is not None and self.gradient_calls < 1:
            raise ConfigError(f"gradient_calls is {self.gradient_calls}; at least the last call must carry a gradient, or none for all")
        if self.matching == "mmd" and self.batch < 2:
            raise ConfigError(f"batch is {self.batch}; matching 'mmd' compares pictures with each other: it must be at least 2")
        self.check_choices(fake_rollouts=("shared", "fresh"))
        if self.data.place != WORLD:
            self.check_choices(matching=MANIFEST_MATCHING, reward=("judge",), wording=("schooled",))
            if self.gan_weight:
                raise ConfigError(f"gan_weight is {self.gan_weight}; its discriminator reads features that only the world's own networks show: data=world")

    def check_judge_settings(self) -> None:
        """Raise ConfigError for settings of a reward that is not chosen."""
        self.check_choices(reward=REWARDS, wording=WORDINGS)
        for name, off in (("judge", self.judge[:1]), ("wording", "schooled"), ("augment", False)):
            if self.reward != "judge" and getattr(self, name) != off:
                what = "a second judge" if name == "judge" else f"{name} is {getattr(self, name)!r}; it"
                raise ConfigError(f"{what} belongs to reward 'judge', and reward is {self.reward!r}: leave one of them out")
        if self.teacher_draws < 1 or self.teacher_scale <= 0:
            raise ConfigError(f"teacher_draws is {self.teacher_draws} and teacher_scale {self.teacher_scale}; at least one draw and a positive scale are needed")

    @classmethod
    def tiers(cls):
        return {**super().tiers(), "gpu": dict(side=64, batch=128, steps=14_000, fake_updates=5)}


def nothing_loss(output: Tensor, reference: Tensor, nothing: Tensor) -> Tensor:
    """Squared distance to the reference on "do nothing" rows, mean over the batch (method.md 1.2)."""
    return ((output - reference).square().flatten(1).mean(1) * nothing).mean()  # Eq. E11


def anchor_loss(model: nn.Module, start: list[Tensor]) -> Tensor:
    """Sum of squared distances of all trained weights to where they started. R0 [arXiv:2503.13070] trains on rewards and such a
    regularizer alone; its exact form is not released, this is the plainest one."""
    return sum((p - s).square().sum() for p, s in zip((p for p in model.parameters() if p.requires_grad), start, strict=True))


class NPEdit(BackboneMethod):
    """The roles and one update of each. Outputs are the codec's latents, which in the miniature are pixels."""

    resident = {  # the student's graph waits from its unroll to its backward
        "student": ("student",), "rollout": ("student",), "teacher": ("student", "teacher", "fake"), "judge": ("student", "judge"), "fake": ("fake",),
    }  # fmt: skip

    def __init__(self, config: NPEditConfig, student: nn.Module, fake: nn.Module, teacher: nn.Module, judge: Judge, codec: Codec | None = None, others: tuple[Judge, ...] = ()):
        trained = {"student": Trained(student, ema=config.ema), "fake": Trained(fake, config.fake_lr)}
        super().__init__(trained, {"teacher": teacher, "judge": judge})
        self.config, self.student, self.fake, self.teacher, self.judge = config, student, fake, teacher, judge
        self.codec = codec or PixelCodec()
        self.objective, self.reward = OBJECTIVES[config.matching], REWARDS[config.reward]
        for other in others:
            other.requires_grad_(False).eval()
        self.panel = JudgePanel(
            judge, teacher, self.codec.decode, others, config.identity, config.answer_loss, config.wording, config.augment, config.teacher_draws, config.teacher_scale
        )
        self.ratio = self.objective.ratio or config.gan_weight > 0
        if self.ratio:  # the fake's patch head becomes a discriminator
            fake.ground = ratio_head(fake.config.width).to(fake.device)
        self.start = [p.detach().clone() for p in student.parameters() if p.requires_grad] if config.anchor_weight else None

    def phases(self, index: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), UnpairedBatch)
        c = self.config
        for k in range(c.fake_updates if c.dmd_weight and self.objective.fake else 0):
            if c.fake_rollouts == "fresh":
                yield Phase("fake", ("fake",), UnpairedBatch, key=("fake", k))
            else:
                yield Phase("fake", ("fake",))

    def backward(self, phase: Phase, batch: UnpairedBatch, memory: dict, index: int) -> dict[str, float | int]:
        c = self.config
        times = draw_times(rng_for("times", c.seed, index), c.calls, c.sampler_steps, c.sampler_shift)
        if phase.name == "student":
            memory["output"], metrics = self.student_backward(batch, times, index)
            memory["calls"] = len(batch) * len(times)
            return {**metrics, "calls": memory["calls"]}
        samples = memory["output"]
        if c.fake_rollouts == "fresh":
            with torch.no_grad(), self.part("rollout"):
                samples = self.edit(batch, times)
            memory["calls"] += len(batch) * len(times)
        return {"fake_loss": self.fake_backward(samples, self.caption(batch), batch), "calls": memory["calls"]}

    def edit(self, batch: UnpairedBatch, times: tuple[float, ...]) -> Tensor:
        """Unroll the student: latents (B, C, H, W), with a graph when gradients are enabled."""
        text, reference = self.student.encode_text(batch.instruction), self.latents(batch.reference)
        held = self.student.hold_reference(reference, text)
        velocity = lambda x, t: self.student(x, t, text, held)
        noise = torch.randn_like(reference)
        return rollout(velocity, noise, times, self.config.renoise, self.gradient_calls(len(times))).float()

    def gradient_calls(self, calls: int) -> int | None:
        """Through how many of the last calls the gradient goes, None for all: DRaFT-K's fixed K [arXiv:2309.17400], or AlignProp's drawn
        anew per update, uniform up to all [arXiv:2310.03739]."""
        if self.config.truncate == "fixed" or not torch.is_grad_enabled():
            return self.config.gradient_calls
        return int(torch.randint(1, min(calls, self.config.gradient_calls or calls) + 1, ()))

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        return self.codec.encode(pictures)

    def caption(self, batch: UnpairedBatch) -> Tensor:
        return batch.target_caption if self.config.target_caption else batch.reference_caption

    def output_gradients(self, batch: UnpairedBatch, output: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted gradient of each loss at the (detached) output, and what was measured on the way."""
        c, metrics, gradients = self.config, {}, {}
        x = output.detach().requires_grad_(True)
        if c.dmd_weight:
            with self.part("teacher"):
                t = draw_dmd_time(len(x), device=x.device)
                real = batch.reference, batch.reference_caption
                context = MatchingContext(self.teacher, self.fake, self.caption(batch), t, torch.randn_like(x), self.guidance(batch), c.dmd_norm, *real)
                loss = c.dmd_weight * self.objective.loss(x, context)
                if c.gan_weight:
                    loss = loss + c.gan_weight * gan_loss(x, context)
                (gradients["dmd"],) = torch.autograd.grad(loss, x)
        if c.judge_weight:
            with self.part("judge"):
                loss, right = self.reward(self.panel, batch, x, gain_ramp(step, c.logit_gain_steps))
                (gradients["judge"],) = torch.autograd.grad(c.judge_weight * loss, x)
                metrics.update(judge_loss=loss.item(), p_edit=right[0].mean().item())
                if c.identity:
                    metrics["p_identity"] = right[1].mean().item()
        if c.nothing_weight and batch.nothing.any():
            loss = c.nothing_weight * nothing_loss(x, self.latents(batch.reference), batch.nothing)
            (gradients["nothing"],) = torch.autograd.grad(loss, x)
        metrics.update({f"gradient_{name}": g.flatten(1).norm(dim=1).mean().item() * len(x) for name, g in gradients.items()})
        return gradients, metrics

    def student_backward(self, batch: UnpairedBatch, times: tuple[float, ...], step: int) -> tuple[Tensor, dict[str, float]]:
        """Unroll, gradients at the output, one backward through the unroll. Returns the detached output."""
        with self.part("student"):
            output = self.edit(batch, times)
        gradients, metrics = self.output_gradients(batch, output, step)
        with self.part("student"):
            output.backward(sum(gradients.values()))  # Eq. E11
            for name, loss in self.regularizers(batch).items():
                loss.backward()
                metrics[name] = loss.item()
        return output.detach(), metrics

    def regularizers(self, batch: UnpairedBatch) -> dict[str, Tensor]:
        """What holds the student's weights rather than its pictures, weighted: distance to their start; and ReFL's second term, the loss
        the student was prepared with, here copying the reference under its caption [ImageReward, arXiv:2304.05977]."""
        c, losses = self.config, {}
        if c.anchor_weight:
            losses["anchor_loss"] = c.anchor_weight * anchor_loss(self.student, self.start)
        if c.pretrain_weight:
            reference = self.latents(batch.reference)
            text, t = self.student.encode_text(batch.reference_caption), logit_normal_time(len(reference), 3.0, reference.device)
            held = self.student.hold_reference(reference, text)
            loss = flow_matching_loss(lambda x, time: self.student(x, time, text, held), reference, t, torch.randn_like(reference)).mean()
            losses["pretrain_loss"] = c.pretrain_weight * loss
        return losses

    def fake_backward(self, samples: Tensor, text: Tensor, batch: UnpairedBatch | None = None) -> float:
        """One flow-matching backward of the fake score on student samples; where the objective needs a density ratio, also one of
        its discriminator, against the references of `batch`. Returns the flow-matching loss."""
        with self.part("fake"):
            t = torch.rand(len(samples), device=samples.device).clamp(1e-3, 1 - 1e-3)
            loss = fake_score_loss(self.fake, samples, text, t, torch.randn_like(samples))
            total = loss
            if self.ratio:
                t, eps = draw_dmd_time(len(samples), device=samples.device), torch.randn_like(samples)
                told = ratio_loss(self.fake, samples, text, batch.reference, batch.reference_caption, t, eps)
                total = loss + self.config.ratio_weight * told
            total.backward()
        return loss.item()

    def guidance(self, batch: UnpairedBatch) -> float | Tensor:
        """The real score's scale: one for all, or (B,) by edit type. The unconditional score is then asked of every batch, whatever its types,
        because processes that share weights must call them equally often."""
        c = self.config
        if all(scale == c.guidance for scale in c.guidance_by_type.values()):
            return c.guidance
        return torch.tensor([c.guidance_by_type.get(kind, c.guidance) for kind in batch.types], device=batch.reference.device)

    def pictures(self, batch: UnpairedBatch, memory: dict) -> dict[str, Tensor]:
        shown = memory["output"][:SHOWN]
        return {"reference": batch.reference[:SHOWN], "output": self.codec.decode(shown)}


def train_npedit(config: NPEditConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per student update, its pictures the first references and edits of the batch; the (averaged) student is in `out/model` at
    the end. The metric `calls` counts network calls of the student on one picture."""
    config, accelerator = begin_roles(config, accelerator)
    loaded = load_roles(config, accelerator)
    method = NPEdit(config, loaded.student, loaded.fake, loaded.teacher, *loaded.judges[:1], loaded.codec, tuple(loaded.judges[1:]))
    yield from train(method, loaded.data, config, accelerator)
