"""Supervised editing on the teacher's own pairs: only what the judge likes is kept, no target of the world is made, and a run resumes."""

import pytest
import torch
from helpers.tiny_models import SIDE, pictures, requests, tiny_dit, tiny_judge
from safetensors.torch import load_file

from vlmedit.data import world as data
from vlmedit.equations.judge_loss import judge_loss
from vlmedit.errors import ConfigError
from vlmedit.flow import few_step_times, flow_matching_loss, guide, sample
from vlmedit.methods import synthetic_pairs as module
from vlmedit.methods.synthetic_pairs import (
    Pool,
    SyntheticPairsConfig,
    approved,
    from_bytes,
    make_pairs,
    teacher_calls,
    to_bytes,
    train_synthetic_pairs,
)


def configuration(**given) -> SyntheticPairsConfig:
    return SyntheticPairsConfig.make("smoke", **{"side": SIDE, "precision": "no", **given})


def test_the_pool_holds_the_newest_pairs():
    """Nine pairs into room for four: the last four, each with its own instruction and reference, to half a step of eight bits; drawn
    rows are among them, and all of them are drawn."""
    pool, x, ids = Pool(4, SIDE), pictures(9), torch.arange(9)[:, None].expand(-1, data.TEXT_LENGTH)
    for rows in ((0, 1, 2), (3, 4, 5), (6, 7, 8)):
        pool.add(-x[list(rows)], ids[list(rows)], x[list(rows)])
    assert len(pool) == 4 and sorted(pool.instruction[:, 0].tolist()) == [5, 6, 7, 8]
    drawn = pool.draw(200)
    reference, instruction, target = drawn.reference, drawn.instruction, drawn.target
    which = instruction[:, 0]
    assert set(which.tolist()) == {5, 6, 7, 8}
    torch.testing.assert_close(target, x[which], atol=1 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(reference, -x[which], atol=1 / 255 + 1e-6, rtol=0)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(every)), every)


def test_twins_come_from_one_noise_and_two_captions():
    """Both are samples of the guided teacher from the same noise, recomputed; with equal captions they are equal, and a request for
    nothing has its reference as the target."""
    teacher, batch = tiny_dit(1), requests("recolor", "move", "nothing")
    torch.manual_seed(0)
    reference, target = make_pairs(teacher, batch, configuration(pair_editor="twins", pair_editor_steps=3))
    torch.manual_seed(0)
    noise, empty = torch.randn_like(batch.reference), torch.zeros_like(batch.target_caption)
    flow = lambda text: lambda x, t: guide(teacher(x, t, text), teacher(x, t, empty), 2.0)
    with torch.no_grad():
        for mine, text in ((reference, batch.reference_caption), (target, batch.target_caption)):
            torch.testing.assert_close(mine, sample(flow(text), noise, few_step_times(3)).clamp(-1, 1), atol=1e-5, rtol=0)
    assert not torch.equal(reference[0], target[0]) and torch.equal(reference[1:], target[1:])


@pytest.mark.parametrize("editor, calls", (("flowedit", 2 * 2 * 3), ("sdedit", 2 * 2 * 2), ("inversion", 2 * 2 * 5), ("twins", 2 * 2 * 4)))
def test_pair_editors_change_references_and_their_calls_are_counted(editor, calls):
    """Two candidates, two steps: network calls counted at the teacher's door, times pictures, equal `teacher_calls`; requests for nothing
    keep theirs."""
    teacher, seen = tiny_dit(1), []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    config, batch = configuration(pair_editor=editor), requests("recolor", "nothing")
    reference, target = make_pairs(teacher, batch, config)
    assert sum(seen) == teacher_calls(config) == calls
    assert torch.equal(reference[1], target[1]) and not torch.equal(reference[0], target[0]) and target.abs().max() <= 1
    assert (editor == "twins") != torch.equal(reference, batch.reference)


def test_only_what_the_judge_likes_twice_is_kept():
    """Both probabilities above the threshold, recomputed; the threshold 0 keeps all, and one at the least of a pair's two loses that pair."""
    batch, judge, output = requests("recolor", "remove", "style", "move"), tiny_judge(3), pictures(4)
    _, right = judge_loss(judge, batch, output)
    least = right.min(0).values
    middle = least.sort().values[1:3].mean().item()
    assert torch.equal(approved(judge, batch, batch.reference, output, middle), least > middle) and (least > middle).sum() == 2
    assert approved(judge, batch, batch.reference, output, 0.0).all()


def places(folder) -> dict:
    return {name: str(folder / name) for name in ("teacher", "student", "judge")}


def test_a_run_trains_on_its_own_pairs_and_no_target_of_the_world(folder, tmp_path, monkeypatch):
    """Three updates: no target is made and nothing rendered but references; every pair in the saved pool is one that the judge likes more
    than the threshold; resumed after two, weights and pairs are the straight run's, bit for bit."""
    monkeypatch.setattr(data, "target_of", lambda *_: pytest.fail("a target was made"))
    rendered, original, kept = [], data.render, []
    monkeypatch.setattr(data, "render", lambda scenes, side: rendered.append(len(scenes)) or original(scenes, side))
    asked = module.approved
    monkeypatch.setattr(module, "approved", lambda *args: kept.append(asked(*args)) or kept[-1])
    made = lambda name: configuration(**places(folder), out=str(tmp_path / name), steps=3, candidates=6, threshold=0.42, fulfilled_share=0.0)
    steps = list(train_synthetic_pairs(made("straight")))
    assert [s.index for s in steps] == [1, 2, 3] and rendered == [6, 6, 6] and not any(s.skipped for s in steps)
    assert [s.metrics["kept"] for s in steps] == pytest.approx([k.float().mean().item() for k in kept])
    saved = load_file(tmp_path / "straight" / "pairs.safetensors")
    total = int(sum(k.sum() for k in kept))
    assert 0 < total < 18 and len(saved["target"]) == min(8, total) == steps[-1].metrics["pairs"]
    run = train_synthetic_pairs(made("killed"))
    next(run), next(run)
    run.close()
    list(train_synthetic_pairs(made("killed")))
    for name in ("model/diffusion_pytorch_model", "pairs", "checkpoint/pairs"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("straight", "killed"))
        assert all(torch.equal(a[k], b[k]) for k in a), name
    start = load_file(folder / "student" / "diffusion_pytorch_model.safetensors")
    model = load_file(tmp_path / "straight" / "model" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(start["head.2.weight"], model["head.2.weight"])


def test_without_a_pair_nothing_is_learnt(folder, tmp_path):
    """A judge whom nothing pleases: no loss, no call of the student, the weights it started from, and an empty pool."""
    steps = list(train_synthetic_pairs(configuration(**places(folder), out=str(tmp_path / "run"), threshold=0.99)))
    assert len(steps) == 2 and all(s.metrics["pairs"] == 0 == s.metrics["calls"] and "loss" not in s.metrics for s in steps)
    start = load_file(folder / "student" / "diffusion_pytorch_model.safetensors")
    model = load_file(tmp_path / "run" / "model" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(start[k], model[k]) for k in start)
    assert len(load_file(tmp_path / "run" / "pairs.safetensors")["target"]) == 0


def test_it_lowers_its_own_loss(folder):
    """Twenty updates on a pool of four pairs, noise held fixed: the flow-matching loss falls by a fifth."""
    student, pool, x = tiny_dit(0), Pool(4, SIDE), requests("recolor", "style", "background", "remove")
    pool.add(x.reference, x.instruction, pictures(4) * 0.3)
    torch.manual_seed(0)
    drawn = pool.draw(8)
    reference, instruction, target = drawn.reference, drawn.instruction, drawn.target
    t, eps = torch.rand(8), torch.randn_like(target)
    loss = lambda: flow_matching_loss(lambda y, time: student(y, time, instruction, reference), target, t, eps).mean()
    optimizer, first = torch.optim.Adam(student.parameters(), 2e-3), loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < 0.8 * first


def test_bad_settings_are_named():
    bad = {
        "pair_editor is 'magic'; known: twins, sdedit, inversion, flowedit": dict(pair_editor="magic"),
        "threshold is 1.0; it is a probability": dict(threshold=1.0),
        "pair_editor_start is 0; it is a time": dict(pair_editor_start=0),
        "candidates is 0; it must be at least 1": dict(candidates=0),
        "capacity is 0; it must be at least 1": dict(capacity=0),
    }
    for message, given in bad.items():
        with pytest.raises(ConfigError, match=message):
            configuration(**given)
