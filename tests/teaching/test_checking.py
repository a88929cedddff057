"""The exercises' checker: right answers pass whatever their form, wrong ones are told what is wrong, stubs run through."""

import json
import random

import nbformat
import pytest
import torch
from helpers.by_hand import ANSWERS

from vlmedit.seeds import rng_for
from vlmedit.teaching import checking, exercises
from vlmedit.teaching.checking import Exercise, WrongAnswer, check, difference
from vlmedit.world.edits import EDIT_TYPES, apply_edit, sample_edit
from vlmedit.world.scene import sample_scene
from vlmedit.world.verdict import edit_done

ALL = {name: value for name, value in vars(exercises).items() if isinstance(value, Exercise)}


@pytest.mark.parametrize("name", ALL)
def test_the_reference_and_another_right_answer_are_accepted(name, capsys):
    for right in (ALL[name].reference, ANSWERS[name]):
        assert check(right, ALL[name]) is right
        assert "right on" in capsys.readouterr().out


@pytest.mark.parametrize("name", ALL)
def test_an_untouched_stub_gives_the_reference(name, capsys):
    def stub(*arguments):
        raise NotImplementedError

    assert check(stub, ALL[name]) is ALL[name].reference
    assert "not solved yet" in capsys.readouterr().out


@pytest.mark.parametrize("name", ALL)
def test_every_known_mistake_is_rejected_by_its_name(name):
    mistakes = ALL[name].mistakes
    assert len(mistakes) >= 5
    for diagnosis, wrong in mistakes.items():
        with pytest.raises(WrongAnswer) as caught:
            check(wrong, ALL[name])
        assert diagnosis in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_cases_repeat_and_are_odd_enough(name):
    """The same arguments at every call, or answers could not be compared; and more than one answer among them."""
    exercise = ALL[name]
    first, second = exercise.cases(), exercise.cases()
    assert difference([list(map(_flat, c)) for c in first], [list(map(_flat, c)) for c in second], 0.0) is None
    answers = [exercise.reference(*case) for case in first]
    assert any(difference(a, answers[0], 1e-3) for a in answers[1:])


def _flat(value):
    return value if isinstance(value, torch.Tensor) else repr(value)


def test_recolored_is_what_the_verdict_says():
    """The exercise's reference is `edit_done` of recolorings, on scenes after random edits of every type."""
    answers = []
    for seed in range(150):
        rng = rng_for("recolored", seed)
        before = sample_scene(rng)
        edit = sample_edit(before, "recolor", rng)
        kinds = [k for k in EDIT_TYPES if k != "add"]  # which may find no room
        other = sample_edit(before, rng.choice(kinds), rng) if seed % 3 else edit
        after = apply_edit(before, other or edit, random.Random(0))
        answers.append(exercises.RECOLORED.reference(before, after, edit))
        assert answers[-1] == edit_done(before, after, edit)
    assert 30 < sum(answers) < 120


def center(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(1, keepdim=True)).detach()


def center_cases():
    x = torch.linspace(-1, 2, 15).view(3, 5).square()
    return [(x,), (x[:2].clone().requires_grad_(),)]


CENTER = Exercise(center, center_cases, {"the mean is over the batch": lambda x: (x - x.mean(0)).detach()})


def in_place(x):
    x.data.sub_(x.data.mean(1, keepdim=True))
    return x.data.clone()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda x: -center(x), "opposite sign everywhere"),
        (lambda x: 2 * center(x), "2 times too large everywhere"),
        (lambda x: center(x) + 0.5, "off by the same 0.5 everywhere"),
        (lambda x: x.detach(), "differs by up to"),
        (lambda x: (x - x.mean(0)).detach(), "It looks as if the mean is over the batch"),
        (lambda x: x - x.mean(1, keepdim=True), "a detach is missing"),
        (lambda x: center(x).mean(1), r"shape \(3,\), expected a tensor of shape \(3, 5\)"),
        (lambda x: center(x)[None] + 0 * center(x)[:, None], "broadcasting"),
        (lambda x: center(x).double(), "float64, expected torch.float32"),
        (lambda x: center(x) / 0, "is not finite"),
        (lambda x: center(x).tolist(), "returns a list of 3, expected a tensor"),
        (lambda x: None, "returns a NoneType"),
        (lambda x, y: center(x), "fails with TypeError"),
        (lambda x: center(x)[7], "fails with IndexError"),
        (in_place, "changed in place"),
        (3, "is a int; define a function"),
    ],
)
def test_a_wrong_answer_is_told_what_is_wrong(wrong, told):
    with pytest.raises(WrongAnswer, match=told):
        check(wrong, CENTER)


def test_a_detach_too_many_is_seen():
    alive = Exercise(lambda x: x * 2, lambda: [(torch.ones(2, requires_grad=True),)])
    with pytest.raises(WrongAnswer, match="a detach too many"):
        check(lambda x: x.detach() * 2, alive)


def test_observe_compares_what_matters_of_a_result():
    """Two losses of equal derivative are the same answer, two of equal value are not; without `observe` it is the other way round."""
    cases = lambda: [(torch.tensor([1.0, -2.0], requires_grad=True),)]
    slope = lambda loss, arguments: torch.autograd.grad(loss, arguments[0])[0]
    reference = lambda x: x.square().sum()
    seen = Exercise(reference, cases, {"a wrong slope": lambda x: (2.5 * x.square()).sum()}, observe=slope)
    right = lambda x: x.square().sum() + 7
    flat = lambda x: (x * x.detach()).sum()
    assert check(right, seen) is right
    assert check(flat, Exercise(reference, cases)) is flat
    with pytest.raises(WrongAnswer, match="0.5 times too large"):
        check(flat, seen)
    with pytest.raises(WrongAnswer, match="differs by up to 7"):
        check(right, Exercise(reference, cases))
    with pytest.raises(WrongAnswer, match="It looks as if a wrong slope"):
        check(lambda x: 2.5 * x.square().sum(), seen)


def test_a_mistake_on_one_later_case_is_found():
    """An answer right on the first case alone is rejected: with a batch of one, a mean over the batch would pass."""
    first_only = Exercise(center, lambda: [(torch.ones(1, 1),), *center_cases()])
    with pytest.raises(WrongAnswer, match="case 2"):
        check(lambda x: (x - x.mean(0)).detach(), first_only)


def test_a_librarys_not_implemented_error_is_no_stub():
    def mine(x):
        raise NotImplementedError("'mean' not implemented for 'Long'")

    with pytest.raises(WrongAnswer, match="'mean' not implemented"):
        check(mine, CENTER)


def test_random_answers_meet_the_same_noise_and_the_notebooks_noise_goes_on():
    noisy = Exercise(lambda x: x + torch.randn_like(x), lambda: [(torch.zeros(3),), (torch.ones(2),)])
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    check(lambda x: torch.randn_like(x) + x, noisy)
    assert torch.equal(torch.randn(4), expected)
    with pytest.raises(WrongAnswer):
        check(lambda x: x + 1.5 * torch.randn_like(x), noisy)


@pytest.mark.parametrize(("got", "expected"), [(1.0, 1), (True, 1.0), (1, True), ("a", "b"), ([1], (1, 2)), (0.1, 0.2), (True, False)])
def test_difference_sees_types_and_values(got, expected):
    assert difference(got, expected, 1e-4)


@pytest.mark.parametrize(("got", "expected"), [(1.00001, 1.0), (1, 1.0), ([1.0], (1.0,)), (torch.tensor([1.0]), torch.tensor([1.00001]))])
def test_difference_has_a_tolerance(got, expected):
    assert difference(got, expected, 1e-4) is None


# what is shown and recorded


@pytest.fixture
def shown(monkeypatch):
    """What was sent to the notebook's output, as (object, keywords)."""
    import IPython.display

    calls = []
    monkeypatch.setattr(IPython.display, "display", lambda what, **kwargs: calls.append((what, kwargs)))
    return calls


def test_recorded_metrics_are_read_back_from_the_notebook(shown, tmp_path):
    checking.record(success=torch.tensor(0.5), by_type={"add": 1.0}, n=16, tier="smoke")
    checking.record(n=32)
    cells = []
    for data, how in shown:
        assert how == {"raw": True} and "text/plain" in data  # the plain text is what a code host shows
        cells.append(nbformat.v4.new_code_cell("...", outputs=[nbformat.v4.new_output("display_data", data=data)]))
    cells.append(nbformat.v4.new_markdown_cell("no outputs here"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "done.ipynb")
    assert checking.recorded(tmp_path / "done.ipynb") == {"success": 0.5, "by_type": {"add": 1.0}, "n": 32, "tier": "smoke"}
    assert json.loads(shown[0][0]["text/plain"])["success"] == 0.5


@pytest.mark.parametrize("value", [float("nan"), torch.ones(2), None, {"a": float("inf")}])
def test_only_metrics_are_recorded(value, shown):
    with pytest.raises(ValueError, match="the metric broken"):
        checking.record(broken=value)
    assert not shown


def test_banner_shows_its_numbers(shown):
    checking.banner(2, 5, 10)
    assert "●●○○○" in shown[0][0].data and "●●●●●" in shown[0][0].data and "10 minutes" in shown[0][0].data
    for bad in ((0, 1, 1), (1, 6, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="is [06]"):
            checking.banner(*bad)


def test_the_solution_is_the_references_source(shown):
    checking.solution(exercises.PSNR)
    page = shown[0][0].data
    assert "<details>" in page and "vlmedit.world.oracle.psnr" in page and "clamp(min=1e-6)" in page
