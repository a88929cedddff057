"""Shared by all tests: one thread per worker, deterministic properties, random scenes from a seed."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the suite's tolerances are those of the CPU
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers.tiny_models import tiny_dit, tiny_judge
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")


MARKED = {  # tests that run when they are asked for by their mark alone
    "solved": "executes the notebooks with every stub solved: make solved-test",
    "browser": "opens the notebooks in a real browser: make browser-test",
}


def pytest_configure(config):
    for mark, meaning in MARKED.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in MARKED.keys() & {m.name for m in item.iter_markers()}:
            if mark not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=MARKED[mark]))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny random models on disk: teacher, student, judge. Not to be written to."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "student")):
        tiny_dit(seed).save_pretrained(folder / name)
    tiny_judge(3).save_pretrained(folder / "judge")
    return folder
