"""Fused operations of a real-size update, each a readable torch reference beside a Triton kernel, forward and backward.

    gated_adaln, adaln   the gated residual and the modulation between two branches of a transformer block   (modulation.py)
    gated_rms            the gated residual between RMS-norms: Z-Image's blocks, a judge's language model        (residual.py)
    norm_rope            RMS-norm of queries or keys with their 2-D rotary embedding                         (rope.py)
    dmd_step             DMD's gradient and loss from the three velocities                                   (dmd.py)
    guided_step          guidance, x0 and the re-noising of a few-step sampler                               (sampler.py)
    answer_loss          a judge's margin and loss from two rows of its language head                        (answer.py)
    vlm_patches          pictures resized, normalized and cut into what a vision tower takes                 (patches.py)

Each is a torch custom op: autograd, activation checkpointing and torch.compile see one node. CUDA tensors of a supported shape go
to Triton, everything else to the reference; `backend` overrides that. Nothing in the package calls these by itself: they are for
real-size models, and `python -m vlmedit.kernels.bench` says on your GPU whether one earns its place. `use` puts some of them into the
package's own update for as long as one asks (inside.py).

The folder is `kernels/src` and is imported as `vlmedit.kernels` alone: transformers and diffusers probe for a package `kernels`.
"""

if __name__ != "vlmedit.kernels":
    raise ImportError(f"this is vlmedit.kernels, not {__name__}; install the package and import it by that name")

from vlmedit.kernels.answer import answer_loss
from vlmedit.kernels.dispatch import BACKENDS, backend, interpreting, triton_missing
from vlmedit.kernels.dmd import dmd_step
from vlmedit.kernels.inside import use
from vlmedit.kernels.modulation import adaln, gated_adaln
from vlmedit.kernels.patches import vlm_patches
from vlmedit.kernels.residual import gated_rms
from vlmedit.kernels.rope import norm_rope
from vlmedit.kernels.sampler import guided_step

__all__ = [
    "BACKENDS", "adaln", "answer_loss", "backend", "dmd_step", "gated_adaln", "gated_rms", "guided_step", "interpreting", "norm_rope", "triton_missing", "use", "vlm_patches",
]  # fmt: skip
