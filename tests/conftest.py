"""Shared by all tests: one thread per worker, deterministic properties, random scenes from a seed."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the suite's tolerances are those of the CPU
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global generator."""
    torch.manual_seed(0)
