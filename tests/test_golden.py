"""Three updates of every stage leave the weights, averages, optimizer states and metrics of the record (golden.py).

To the bit on the machine of the record; anywhere else metrics alone, to a relative 1e-3, because floating point differs
between machines."""

import json

import golden
import pytest

KNOWN = json.loads(golden.GOLDEN.read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return golden.starting_models(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def fresh(models):
    """A stage's record by its label, each run once."""
    found = {}

    def ask(label):
        if label not in found:
            found[label] = json.loads(json.dumps(golden.run(golden.STAGES[label], models)))
        return found[label]

    return ask


def test_every_stage_is_recorded_whole():
    assert KNOWN["stages"].keys() == golden.STAGES.keys()
    golden.complete(KNOWN["stages"])


@pytest.mark.parametrize("label", golden.STAGES)
def test_metrics_are_the_recorded_ones(fresh, label):
    assert not golden.differences(label, KNOWN["stages"][label]["metrics"], fresh(label)["metrics"], exact=False)


@pytest.mark.parametrize("label", golden.STAGES)
def test_every_bit_is_the_recorded_one(fresh, label):
    here = golden.machine()
    if changed := [k for k in here if here[k] != KNOWN["machine"][k]]:
        there = ", ".join(f"{k} is {KNOWN['machine'][k]}, not {here[k]}" for k in changed)
        pytest.skip(f"digests were recorded where {there}")
    assert not golden.differences(label, KNOWN["stages"][label], fresh(label), exact=True)
