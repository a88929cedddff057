"""The performance script: both structures measured at tiny size part by part, the real size's path with small models, refusals."""

import dataclasses
import json
import math
from contextlib import nullcontext

import pytest
import torch
from helpers.scripts import script
from vlmedit.kernels import dispatch

from vlmedit import kernels
from vlmedit.cost import calls
from vlmedit.errors import ConfigError, InputError
from vlmedit.networks.backbones import families
from vlmedit.networks.backbones._base import Published
from vlmedit.networks.backbones._tiny import kl
from vlmedit.testing import random_models as tiny

performance = script("performance")


@pytest.fixture(autouse=True)
def small_files(tmp_path, monkeypatch):
    """Results and page of the test's own."""
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{performance.BEGIN}\n{performance.END}\nafter\n")
    monkeypatch.setattr(performance, "PAGE", page)
    monkeypatch.setattr(performance, "RESULTS", tmp_path / "performance.json")
    return page


def test_the_page_is_that_of_the_results(monkeypatch):
    monkeypatch.undo()
    page = performance.PAGE
    assert page.read_text(encoding="utf-8") == performance.filled(page, performance.block(json.loads(performance.RESULTS.read_text()))), "run `python papers/performance.py`"


def test_every_part_of_both_structures_is_measured():
    """Finite positive time, FLOPs and rate for every part and the whole; what the counter saw executed is at least what the shapes say must
    be, and for the scores that are only read, where nothing is recomputed, within a tenth of it; ours counts and saves less."""
    found = performance.run("tiny", "tiny", 1)["structures"]
    for figures in found.values():
        assert set(figures["parts"]) == {"student", "teacher", "judge", "fake"}
        for part in (*figures["parts"].values(), figures["total"]):
            assert all(math.isfinite(v) and v > 0 for v in part.values()), part
            assert part["executed_flops"] > 0.95 * part["counted_flops"]
        read = figures["parts"]["teacher"]
        assert read["executed_flops"] == pytest.approx(read["counted_flops"], rel=0.1)
    ours, theirs = found["ours"], found["transcription"]
    for key in ("saved_bytes", "counted_flops", "executed_flops"):
        assert ours["total"][key] < 0.8 * theirs["total"][key]
    assert ours["counted"]["peak_bytes"] < 0.8 * theirs["counted"]["peak_bytes"]
    assert ours["parts"]["judge"]["saved_bytes"] < 0.5 * theirs["parts"]["judge"]["saved_bytes"]  # the autoencoder's blocks


def test_the_real_sizes_path_runs_with_small_models(tmp_path, monkeypatch):
    """Configurations without files: weights, tokenizer and prompts are made, in the real run's precision; full logits answer what two rows do."""

    def judge():
        model, _ = tiny.internvl()
        config = model.config
        config.text_config.vocab_size = 4096
        return type(model)(config)

    with torch.device("meta"):
        backbone, own = families()["z-image"].tiny.transformer(tiny.WIDTH), judge()

    def absent(place, file):
        raise InputError(f"{place}: not there")

    monkeypatch.setattr(calls, "read_json", absent)
    monkeypatch.setattr(calls, "PUBLISHED", {"a/judge": lambda: own})
    monkeypatch.setattr(calls, "published", {"a/backbone": Published(("a/backbone",), lambda: backbone, kl, "")}.get)
    monkeypatch.setitem(performance.SIZES, "real", ("zimage_internvl_lora", ("64x64",)))
    config = performance.settings("zimage_internvl_lora", "real", "ours", str(tmp_path))
    config = dataclasses.replace(config, backbone="a/backbone", judge=("a/judge",))
    figures = performance.measure(config, True, 1, plain=True)
    assert figures["moments"] == "counted" and all(part["seconds"] > 0 for part in figures["parts"].values())
    setup = performance.RandomSetup(config)
    judge = setup.judge()
    pictures = [torch.rand(3, 64, 64) * 2 - 1 for _ in range(3)]
    asked = [pictures[:2], pictures[2:]], ["Is it the same? Answer Yes or No.", "Is it there?"]
    torch.testing.assert_close(performance.FullLogits(judge).logit_margin(*asked), judge.logit_margin(*asked), rtol=0.05, atol=0.02)  # bf16 logits


def test_an_update_with_fused_operations_is_the_plain_one(tmp_path, monkeypatch):
    """One whole update of a tiny real model: losses, gradient norms and the step of every trained weight, plain, with the operations' references
    and, where Triton interprets, with its kernels, which were launched."""
    config = dataclasses.replace(performance.settings("tiny", "tiny", "ours", str(tmp_path)), lr=1.0, fake_updates=1)
    launched = set()
    real = dispatch.start
    monkeypatch.setattr(dispatch, "start", lambda kernel, *a, **k: (launched.add(kernel.fn.__module__.rpartition(".")[2]), real(kernel, *a, **k)))

    def update(inside: bool, path: str, *names: str) -> tuple[dict, list[torch.Tensor]]:
        torch.manual_seed(0)
        setup = performance.RandomSetup(config)
        trained = [p for p in setup.roles.student.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in trained]
        loop = performance.train_loaded(setup, setup.judge(), performance.RealEdit, performance.PlainSteps)
        with kernels.backend(path), kernels.use(*names) if inside else nullcontext():
            step = next(loop)
        moved = [p.detach() - s for p, s in zip(trained, start)]
        loop.close()
        return step.metrics, moved

    performance.RandomSetup(config)  # the first one writes the tiny models, and draws for them
    metrics, plain = update(False, "auto")
    assert metrics["gradient_dmd"] > 0 and metrics["gradient_judge"] > 0
    largest = max(float(m.abs().max()) for m in plain)
    for path in ("reference", *(("triton",) if kernels.interpreting() else ())):
        few = ("dmd_step", "guided_step", "answer_loss", "vlm_patches")  # a block's operations are launched per token: test_kernels has them in one block
        found, fused = update(True, path, *(few if path == "triton" else ()))
        for key in ("judge_loss", "gradient_dmd", "gradient_judge", "gradient_norm"):
            assert found[key] == pytest.approx(metrics[key], rel=1e-3), (path, key)
        assert largest > 1e-4 and max(float((a - b).abs().max()) for a, b in zip(fused, plain)) < 1e-3 * largest, path
        assert launched == ({"dmd", "sampler", "answer", "patches"} if path == "triton" else set())
    with pytest.raises(ValueError, match="served by gated_adaln; known: dmd_step, guided_step"), kernels.use("gated_adaln"):
        pass


def test_fused_operations_inside_and_a_profile(tmp_path, monkeypatch, capsys, small_files):
    """`--kernels` measures the same parts with the named operations in the update, beside the plain figures and not over them; `--profile`
    writes torch's own table of an update, in which they are seen. Afterwards the package is as it was."""
    from vlmedit.equations import matching as objectives
    from vlmedit.networks import judges

    before = objectives.OBJECTIVES["dmd"].loss, judges.two_row_margin, judges.InternVL.prepare
    performance.RESULTS.write_text(json.dumps({"tiny": "plain"}))
    monkeypatch.setattr(performance, "STRUCTURES", {"ours": performance.STRUCTURES["ours"]})
    monkeypatch.setattr(performance, "block", lambda figures: f"{sorted(figures)}")
    monkeypatch.setattr(performance, "ladder", lambda *a: [])
    table = tmp_path / "profile.txt"
    assert performance.main(["--size", "tiny", "--updates", "1", "--kernels", "dmd_step", "vlm_patches", "answer_loss", "guided_step", "--profile", str(table)]) == 0
    figures = json.loads(performance.RESULTS.read_text())
    assert figures["tiny"] == "plain" and figures["tiny_kernels"]["kernels"] == ["dmd_step", "vlm_patches", "answer_loss", "guided_step"]
    assert all(part["seconds"] > 0 for part in figures["tiny_kernels"]["structures"]["ours"]["parts"].values())
    said = table.read_text()
    assert "Self CPU" in said and "aten::" in said
    assert (objectives.OBJECTIVES["dmd"].loss, judges.two_row_margin, judges.InternVL.prepare) == before


def test_bad_input_is_refused_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, said in (
        (["--size", "real"], "--size is real and there is no GPU; use --size tiny"),
        (["--size", "tiny", "--config", "zimage_internvl"], "use --size real"),
        (["--size", "tiny", "--config", "nothing_here"], "no settings of that name ship"),
        (["--size", "tiny", "--updates", "0"], "--updates is 0"),
        (["--size", "tiny", "--profile", "/nowhere/at/all.txt"], "its folder does not exist"),
    ):
        assert performance.main(argv) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match="use --size tiny"):
        performance.settings("tiny", "real", "ours", "x")
    assert not performance.RESULTS.exists()
