"""Random streams that depend on nothing but the parts of their name, such as ("unpaired", seed, update, number).

A training run that draws everything anew from its seed and its position has no data position to lose, and resumes
exactly.
"""

from __future__ import annotations

import random

import torch


def rng_for(*parts) -> random.Random:
    """A generator that depends on nothing but its parts."""
    return random.Random("/".join(str(p) for p in parts))


def seed_torch(*parts) -> None:
    """Seed torch's global generator from the parts."""
    torch.manual_seed(rng_for(*parts).getrandbits(62))
