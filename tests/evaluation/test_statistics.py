"""Scores: against scipy, in closed form, and against brute force; their inputs matter one by one."""

from itertools import combinations

import pytest
import torch
from helpers.tiny_models import tiny_dit, tiny_judge
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from vlmedit import flow
from vlmedit.evaluation import statistics as scores
from vlmedit.evaluation.editing import evaluate_student
from vlmedit.evaluation.judge import ask_judge


def test_the_evaluation_reports_the_mean_hacking_gap():
    student, judge = tiny_dit(), tiny_judge()
    metrics, judged = evaluate_student(student, judge, n=16)
    p = ask_judge(judge, judged.examples, judged.reference, judged.output)
    done, kept = (torch.tensor([getattr(v, what) for v in judged.verdicts]) for what in ("done", "kept"))
    gap = scores.hacking_gap(p, done, kept)
    assert gap.shape == (16,) and abs(gap.mean().item() - metrics["hacking_gap"]) < 1e-5


def test_an_honest_judge_of_a_half_success_has_a_gap():
    """Knowing the truth about both questions, the judge is still above success where only one of them is fulfilled."""
    done, kept = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    gap = scores.hacking_gap(torch.stack((done, kept)).float(), done, kept)
    assert gap.tolist() == [0.0, 0.5, 0.5, 0.0]


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=60, deadline=None)
def test_wilson_is_scipys(case):
    k, n = case
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert scores.wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_wilson_ends_are_where_the_score_test_turns():
    """At either end p the observed rate lies z standard errors of p away."""
    for k, n in ((3, 17), (16, 16), (40, 90)):
        for p in scores.wilson_interval(k, n):
            if 0 < p < 1:
                assert abs(k / n - p) == pytest.approx(scores.Z95 * (p * (1 - p) / n) ** 0.5, rel=1e-6)


def test_normal_quantiles():
    assert scores.Z95 == pytest.approx(norm.ppf(0.975), abs=1e-6) and scores.Z80 == pytest.approx(norm.ppf(0.8), abs=1e-6)


def test_edits_needed_is_the_power_it_promises():
    """Drawn differences of that many edits are significant four times in five."""
    torch.manual_seed(0)
    n = round(scores.edits_needed(0.1, 0.6))
    mean = 0.1 + 0.6 / n**0.5 * torch.randn(20_000)
    seen = (mean / (0.6 / n**0.5) > scores.Z95).float().mean().item()
    assert seen == pytest.approx(0.8, abs=0.02)


def test_viescore_by_hand():
    overall = scores.viescore(torch.tensor([[9.0, 4.0], [1.0, 10.0], [0.0, 8.0]]), torch.tensor([[9.0], [4.0], [5.0]]))
    assert overall.tolist() == pytest.approx([6.0, 2.0, 0.0])


def test_calibration_error_of_calibrated_answers_goes_to_zero_and_of_shifted_ones_to_the_shift():
    torch.manual_seed(0)
    p = torch.rand(200_000) * 0.8
    truth = (torch.rand(200_000) < p).float()
    assert scores.calibration_error(p, truth) < 0.01
    assert scores.calibration_error(p + 0.2, truth) == pytest.approx(0.2, abs=0.01)
    assert scores.calibration_error(torch.ones(5), torch.ones(5)) == 0.0  # p = 1 lies in the last bin


def test_calibration_error_bin_by_bin():
    torch.manual_seed(1)
    p, truth = torch.rand(57), (torch.rand(57) < 0.4).float()
    rows = [(p[m].mean() - truth[m].mean()).abs() * m.sum() / 57 for k in range(5) if (m := (p >= k / 5) & (p < (k + 1) / 5)).any()]
    assert scores.calibration_error(p, truth, 5) == pytest.approx(float(sum(rows)), abs=1e-6)


def test_best_of_is_the_mean_over_all_choices():
    torch.manual_seed(0)
    score, value = torch.rand(3, 6), torch.rand(3, 6)
    for k in range(1, 7):
        every = [value.gather(1, score[:, c].argmax(1, keepdim=True).apply_(lambda j: c[j])) for c in map(list, combinations(range(6), k))]
        assert torch.allclose(scores.best_of(score, value, k), torch.cat(every, 1).mean(1), atol=1e-6)
    assert torch.allclose(scores.best_of(score, value, 1), value.mean(1), atol=1e-6)


@pytest.mark.parametrize("k", [0, 7])
def test_best_of_names_an_impossible_number(k):
    with pytest.raises(ValueError, match=f"k is {k}; of 6 samples"):
        scores.best_of(torch.rand(2, 6), torch.rand(2, 6), k)


def test_denoising_psnr_of_a_teacher_that_knows_the_answer():
    """A teacher whose estimate is grey: the PSNR is that of the picture against grey, at every level; each picture by itself."""

    class Grey(torch.nn.Module):
        device = torch.device("cpu")

        def encode_text(self, ids):
            return ids.float()

        def forward(self, x, t, text):
            return flow.to_velocity(x, torch.zeros_like(x), t)

    pictures = torch.linspace(-1, 1, 3 * 3 * 16 * 16).view(3, 3, 16, 16)
    expected = -10 * (pictures / 2).square().flatten(1).mean(1).log10()
    for t in (0.1, 0.7):
        assert torch.allclose(scores.denoising_psnr(Grey(), pictures, t, batch=2), expected, atol=1e-3)


def test_denoising_psnr_of_a_real_architecture_is_repeatable():
    teacher = tiny_dit()
    pictures = torch.rand(5, 3, 16, 16) * 2 - 1
    one, two = (scores.denoising_psnr(teacher, pictures, 0.3, seed=4) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (5,) and one.isfinite().all()
