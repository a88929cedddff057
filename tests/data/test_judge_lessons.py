"""The judge's school: every answer it teaches is the verdict's, and what cannot be answered is not asked."""

import random
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import tiny_judge

from vlmedit.data import judge_lessons as schooling
from vlmedit.data.judge_lessons import SHARES, lesson
from vlmedit.data.lesson_pictures import (
    BARE,
    RUINED,
    SOILED,
    SPOTLESS,
    STAIN,
    Clarity,
    blotch,
    clarity,
    mistakable,
    own_work,
    soil,
)
from vlmedit.data.world import Example, sample_example
from vlmedit.equations.adversarial import answer_ids
from vlmedit.methods.judge import practise, soften
from vlmedit.world.edits import EDIT_TYPES, Edit, apply_edit
from vlmedit.world.language import DESCRIBE, caption, parse_instruction
from vlmedit.world.render import render
from vlmedit.world.scene import COLORS, SHAPES, Scene, Thing
from vlmedit.world.tokenizer import END, NO, YES, build_tokenizer
from vlmedit.world.verdict import edit_done, rest_kept

PAIRS = 64


class Told:
    """A lesson with the scenes that were drawn for it."""

    def __init__(self, monkeypatch, *seed, pairs: int = PAIRS):
        calls = []

        def spy(scenes, side=32, device=None):
            calls.append(list(scenes))
            return render(scenes, side, device)

        def spy_soil(images, rng):
            self.unsoiled = images.clone()
            out, self.dirt = soil(images, rng)
            return out, self.dirt

        monkeypatch.setattr(schooling, "render", spy)
        monkeypatch.setattr(schooling, "soil", spy_soil)
        monkeypatch.setattr(schooling, "BLOTCH_SHARE", 0)  # stains have their own test
        self.work = lesson(pairs, 32, *seed)
        self.before, self.after = calls
        # share of the way from reference to target, by least squares; 1 where they do not differ
        way = render(self.after) - self.work.reference
        done = ((self.unsoiled - self.work.reference) * way).flatten(1).sum(1) / way.square().flatten(1).sum(1).clamp(min=1e-9)
        self.blend = torch.where(way.flatten(1).any(1), done, torch.ones(pairs))
        # shown exactly as rendered: neither blended nor soiled
        self.clean = [torch.equal(a, b) for a, b in zip(self.work.output, render(self.after))]
        text = lambda ids: build_tokenizer().batch_decode(ids, skip_special_tokens=True)
        self.questions, self.singles = text(self.work.questions), text(self.work.single_questions)


@pytest.fixture(scope="module")
def told():
    with pytest.MonkeyPatch.context() as patch:
        return [Told(patch, "told", k) for k in range(12)]


def truth(question: str, before, after) -> bool:
    """The right answer of a question, worked out from its words and the two scenes."""
    inner = question.removesuffix(" ?")
    if inner.startswith("was this done : "):
        return edit_done(before, after, parse_instruction(inner.removeprefix("was this done : ")))
    if inner.startswith("is the rest the same : "):
        return rest_kept(before, after, parse_instruction(inner.removeprefix("is the rest the same : ")))
    if inner.startswith("is all but the "):
        return rest_kept(before, after, Edit("remove", inner.split()[4]))
    if inner.startswith("is it the same "):
        return rest_kept(before, after, Edit("customise", inner.split()[-1]))
    if inner.startswith("is there a "):
        return any(t.shape == inner.split()[-1] for t in after.things)
    raise AssertionError(f"unknown question {question!r}")


def disagreements(lessons, nothing: bool) -> tuple[int, list]:
    """Answers checked, and those that differ from the truth, over pairs shown clean; `nothing`: do-nothing questions of edits."""
    checked, wrong = 0, []
    for told in lessons:
        rows = [(told.questions, told.work.answers, 4), (told.singles, told.work.single_answers, 3)]
        for texts, answers, per_pair in rows:
            assert len(texts) == len(answers) == per_pair * PAIRS
            for row, (question, answer) in enumerate(zip(texts, answers.tolist())):
                pair = row // per_pair
                if answer < 0 or not told.clean[pair]:
                    continue
                is_nothing = any(question.startswith(f"was this done : {words}") for words in ("do nothing", "keep everything", "leave the"))
                if is_nothing != nothing:
                    continue
                checked += 1
                if truth(question, told.before[pair], told.after[pair]) != bool(answer):
                    wrong.append((question, answer, told.work.kinds[pair]))
    return checked, wrong


def test_labels_are_the_verdict_s(told):
    """Over 768 pairs, every asked question of a clean pair is read from its words and answered by the verdict: no label
    differs. 'Do nothing' questions have their own test."""
    checked, wrong = disagreements(told, nothing=False)
    assert checked > 1500 and not wrong, wrong[:5]


def test_both_answers_of_every_question_form_are_taught(told):
    """Yes and no each make up at least a tenth of the answers of every form of question."""
    forms = {}
    for t in told:
        for texts, answers in ((t.questions, t.work.answers), (t.singles, t.work.single_answers)):
            for question, answer in zip(texts, answers.tolist()):
                if answer >= 0:
                    forms.setdefault(" ".join(question.split()[:3]), []).append(answer)
    assert set(forms) == {"was this done", "is the rest", "is all but", "is it the", "is there a"}
    for form, answers in forms.items():
        assert len(answers) >= 30 and 0.1 < sum(answers) / len(answers) < 0.9, form


def test_nothing_is_asked_in_padding_rows(told):
    """Rows that stand in for a removal's pair question, and unused single rows, carry -1; a removal's pair rows never ask
    whether the edit was done."""
    for t in told:
        answers = t.work.answers.view(PAIRS, 4)
        singles = t.work.single_answers.view(PAIRS, 3)
        assert set(answers.unique().tolist()) <= {-1, 0, 1} and set(singles.unique().tolist()) <= {-1, 0, 1}
        for pair in range(PAIRS):
            texts = t.questions[4 * pair : 4 * pair + 4]
            removals = 0
            for edit_row in (0, 2):
                if texts[edit_row].startswith(("is all but", "is the rest", "is it")):  # in the place of an edit question
                    assert answers[pair, edit_row] == -1
                    removals += 1
            # one single row per removal, one presence question, the rest is padding
            assert (singles[pair, removals + 1 :] == -1).all()
    assert any((t.work.single_answers >= 0).any() for t in told)


def test_dirty_and_half_done_pictures_are_not_captioned_or_counted(told):
    """A picture has caption labels and presence answers exactly if its dirt is below RUINED and it is blended by 0.8 or more
    (recovered from the pixels by least squares); both sorts occur often."""
    asked = unasked = 0
    for t in told:
        for pair in range(PAIRS):
            has_caption = bool((t.work.caption_labels[pair] >= 0).any())
            presence = bool((t.work.single_answers[3 * pair : 3 * pair + 3] >= 0).any())
            assert presence == has_caption
            if not torch.equal(t.unsoiled[pair], t.work.reference[pair]):  # else any blend looks the same
                assert has_caption == (t.dirt[pair] < RUINED and t.blend[pair].item() > 0.8 - 1e-4)
            asked, unasked = asked + has_caption, unasked + (not has_caption)
    assert asked > 300 and unasked > 50


def test_identity_of_spoiled_pictures_is_denied(told):
    """With dirt over SOILED every asked identity question is a No; between SPOTLESS and SOILED none is asked."""
    denied = open_ = 0
    for t in told:
        for row, (question, answer) in enumerate(zip(t.questions, t.work.answers.tolist())):
            dirt = t.dirt[row // 4]
            if question.startswith(("is the rest", "is all but", "is it the same")) and dirt > SPOTLESS and answer >= 0:
                assert dirt > SOILED and answer == 0
                denied += 1
            open_ += SPOTLESS < dirt < SOILED
    assert denied > 100 and open_ > 20


def test_caption_labels_decode_to_the_caption(told):
    """Labels are the next tokens of 'what is in the picture ? <caption of the output> [end]' and nothing of the request."""
    tokenizer = build_tokenizer()
    for t in told:
        for pair in range(PAIRS):
            ids, labels = t.work.caption[pair], t.work.caption_labels[pair]
            spoken = labels[labels >= 0]
            if len(spoken) == 0:
                continue
            assert tokenizer.decode(spoken) == f"{caption(t.after[pair])} {END}"
            where = (labels >= 0).nonzero().flatten()
            assert torch.equal(ids[where + 1], spoken)  # the label of a position is the token after it
            assert where[0] == len(DESCRIBE.split()) - 1  # the first is predicted at the question mark


def test_lesson_kinds_show_what_they_say(told):
    """'same' shows the reference scene, 'right' one where the edit is done and the rest kept."""
    seen = set()
    for t in told:
        for pair, kind in enumerate(t.work.kinds):
            seen.add(kind)
            if kind == "same":
                assert t.after[pair] == t.before[pair]
            if kind == "right":
                edit = parse_instruction(t.questions[4 * pair].removeprefix("was this done : ").removesuffix(" ?")) if t.questions[4 * pair].startswith("was") else None
                if edit is not None:
                    assert edit_done(t.before[pair], t.after[pair], edit) and rest_kept(t.before[pair], t.after[pair], edit)
    assert seen == set(SHARES)


def test_soil_tells_how_much_it_changed():
    """The reported root mean square is that of the difference, to 1e-6 and exactly 0 for pictures left alone; between a third
    and two thirds are left alone, the range is kept and the input is not written to."""
    images = render([sample_example(random.Random(k), ("add",)).scene for k in range(64)])
    copy = images.clone()
    out, rms = soil(images, random.Random(0))
    assert torch.equal(images, copy) and out.abs().max() <= 1
    measured = (out - images).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(measured, torch.tensor(rms), atol=1e-6, rtol=0)
    alone = torch.tensor([torch.equal(a, b) for a, b in zip(out, images)])
    assert torch.equal(alone, torch.tensor(rms) == 0) and 64 / 3 < alone.sum() < 64 * 2 / 3
    assert 0 < SPOTLESS < SOILED < RUINED


def test_answer_ids():
    """1 is yes, 0 is no, -1 is ignored; the judge's two answers are the tokenizer's words."""
    tokenizer, config = build_tokenizer(), tiny_judge().config
    yes, no = tokenizer.convert_tokens_to_ids(YES), tokenizer.convert_tokens_to_ids(NO)
    assert answer_ids(torch.tensor([1, 0, -1]), yes, no).tolist() == [yes, no, -100] and yes != no
    assert (config.yes_token_id, config.no_token_id) == (yes, no)


def test_do_nothing_labels_are_the_verdict_s(monkeypatch):
    """As above for 'was this done : do nothing ?' and its kin: a picture that equals the reference is a Yes."""
    monkeypatch.setattr(schooling, "KIND_SHARES", {"nothing": 1.0})
    checked, wrong = disagreements([Told(monkeypatch, "nothing", k) for k in range(4)], nothing=True)
    assert checked > 100
    assert not wrong, wrong[:5]


def square_for_circle():
    """A picture of a red circle beside a blue triangle, its scene, and the same with a square in the circle's place."""
    circle = Thing("circle", "red", x=0.3, y=0.3, size=0.18)
    scene = Scene((circle, Thing("triangle", "blue", x=0.7, y=0.7, size=0.18)), "white")
    return scene, render([scene]), render([scene.with_thing(0, shape="square")])


def test_clarity_tells_a_thing_redrawn_from_a_thing_changed():
    """Nothing lost: 0. Half a blur still is the thing. Halfway to a square: 1, neither. A square in the circle's place, another color, or
    nothing there: beyond UNLIKE. The other thing and the background are not blamed."""
    scene, circle, square = square_for_circle()
    look = lambda picture: clarity(picture, circle, [scene])[0]
    assert look(circle) == Clarity({"circle": 0.0, "triangle": 0.0}, 0.0)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(circle, (1, 1, 1, 1), mode="replicate"), 3, 1)
    assert look(torch.lerp(circle, blurred, 0.5)).clear()
    assert look(torch.lerp(circle, square, 0.5)).things["circle"] == pytest.approx(1, abs=1e-3)
    for changed in (square, render([scene.with_thing(0, color="blue")]), render([replace(scene, things=scene.things[1:])])):
        assert look(changed).things["circle"] > 10 and look(changed).things["triangle"] == 0 and look(changed).background < BARE
    speckled = circle.clone()
    speckled[:, :, -1:] *= -1
    assert look(speckled).background > BARE and look(speckled).worst() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_can_be_mistaken_for_every_other_that_the_world_draws(shape):
    """Every alternative differs from the thing in one word, or is its absence; none is drawn that cannot be; the rest stays."""
    scene = Scene((Thing("circle" if shape != "circle" else "square", "red"), Thing(shape, "blue", "striped")), "grey")
    words = lambda s: {t.shape: (t.color, t.texture) for t in s.things}
    seen = [words(s) for s in mistakable(scene, 1)]
    assert len({str(w) for w in seen}) == len(seen) and words(scene) not in seen
    assert sum(shape not in w for w in seen) == len(SHAPES)  # absent, or one of three other shapes
    assert sum(w.get(shape, ("", ""))[0] not in ("", "blue") for w in seen) == len(COLORS) - 1
    assert ("blue", "hollow") not in [w.get("cross") for w in seen]


@pytest.mark.parametrize(
    "edit, said, things, background, expected",
    [
        (Edit("recolor", "circle", "blue"), True, {"circle": 0.1, "square": 0.1}, 0.0, True),
        (Edit("recolor", "circle", "blue"), True, {"circle": 1.2, "square": 0.1}, 0.0, None),  # a blue smear may count as blue
        (Edit("replace", "circle", new_shape="cross"), True, {"cross": 0.1, "square": 1.9}, 0.0, True),
        (Edit("replace", "circle", new_shape="cross"), True, {"cross": 1.2, "square": 0.1}, 0.0, False),  # a smear is no cross
        (Edit("replace", "circle", new_shape="cross"), True, {"cross": 0.75, "square": 0.1}, 0.0, None),
        (Edit("move", "circle", side="left"), True, {"circle": 1.1}, 0.0, False),
        (Edit("remove", "circle"), True, {"square": 0.1}, 0.0, True),
        (Edit("remove", "circle"), True, {"square": 0.1}, 0.3, None),  # something is left or came
        (Edit("add", "circle", "red"), False, {"square": 0.1}, 0.0, False),
        (Edit("add", "circle", "red"), False, {"square": 1.9}, 0.0, None),
    ],
)
def test_what_a_redrawn_picture_says_of_the_edit(edit, said, things, background, expected):
    assert Clarity(things, background).done(edit, said) is expected


@pytest.mark.parametrize(
    "edit, said, things, background, expected",
    [
        (Edit("recolor", "circle", "blue"), True, {"circle": 0.1, "square": 0.1}, 0.0, True),
        (Edit("recolor", "circle", "blue"), True, {"circle": 0.1, "square": 1.2}, 0.0, False),
        (Edit("recolor", "circle", "blue"), True, {"circle": 0.1, "square": 0.75}, 0.0, None),
        (Edit("recolor", "circle", "blue"), False, {"circle": 0.0, "square": 0.0}, 0.0, False),
        (Edit("add", "circle", "blue"), True, {"circle": 1.9, "square": 0.1}, 0.0, True),  # the added thing is not the rest
        (Edit("add", "circle", "blue"), True, {"circle": 0.1, "square": 0.1}, 0.4, False),
    ],
)
def test_what_a_redrawn_picture_says_of_the_rest(edit, said, things, background, expected):
    assert Clarity(things, background).kept(edit, said) is expected


def test_a_generator_that_wipes_everything_out_is_never_said_to_keep_or_to_draw(monkeypatch):
    """All pictures redrawn as bare background: identity is denied wherever something else was to stay, no thing is drawn."""
    monkeypatch.setattr(schooling, "SOFT_SHARE", 1.0)
    wipe = lambda pictures, captions: pictures[:, :, :1, :1].expand_as(pictures)
    for kind in ("add", "recolor", "texture", "move"):
        monkeypatch.setattr(schooling, "KIND_SHARES", {kind: 1.0})
        monkeypatch.setattr(schooling, "SHARES", {"right": 1.0})
        seen = lesson(32, 32, "wiped", kind, softener=wipe)
        unblended = (seen.ground_output == -100).all(2).all(1)  # redrawn beyond recognition, or half blends
        answers = seen.answers.view(32, 4)[unblended]
        assert len(answers) > 16 and (answers[:, 0] != 1).all()
        assert (answers[:, 1] == 0).float().mean() > 0.7


def test_a_generator_that_redraws_exactly_changes_no_answer(monkeypatch):
    """The answers to redrawn pictures are the verdict's where nothing was lost."""
    monkeypatch.setattr(schooling, "SOFT_SHARE", 1.0)
    calls = []
    work = lesson(64, 32, "exact", softener=lambda pictures, captions: calls.append(len(captions)) or pictures)
    assert calls == [calls[0]] and calls[0] > 32
    questions = build_tokenizer().batch_decode(work.questions, skip_special_tokens=True)
    assert len(questions) == len(work.answers)
    assert (work.answers == 1).sum() > 20 and (work.answers == 0).sum() > 20


def test_a_teacher_redraws_between_its_picture_and_its_dream():
    """Deterministic under a seed, finite, without a graph; a teacher that answers with the clean picture leaves it as it is."""
    picture = render([square_for_circle()[0]] * 3)

    class Knows(torch.nn.Module):
        device, encode_text = torch.device("cpu"), staticmethod(lambda ids: ids)

        def forward(self, x, t, text):
            return (x - picture) / t.view(-1, 1, 1, 1)

    drawn = soften(Knows(), picture, torch.zeros(3, 4, dtype=torch.long))
    assert not drawn.requires_grad and torch.allclose(drawn, picture, atol=1e-4)


def test_a_stain_leaves_the_things_alone():
    """Nothing within a thing's box changes, something outside does, the input is not written to; now and then beyond SOILED."""
    rng = random.Random(3)
    torch.manual_seed(3)
    scene, clean, _ = square_for_circle()
    copy, sizes = clean.clone(), []
    for _ in range(64):
        stained = blotch(clean[0], scene, rng)
        assert torch.equal(clean, copy) and stained.abs().max() <= 1 + 1e-6
        assert clarity(stained[None], clean, [scene])[0].worst() == 0
        sizes.append(float((stained - clean[0]).square().mean().sqrt()))
    assert sum(s > SOILED for s in sizes) > 16 and sum(s > 0 for s in sizes) > 48


def test_stained_pictures_are_not_the_same(monkeypatch):
    """A right result with a stain between its things: the rest is denied or, where the stain is faint, not asked about; the edit is
    still a yes, except where a stain could be taken for the thing that was asked for."""
    monkeypatch.setattr(schooling, "BLOTCH_SHARE", 1.0)
    monkeypatch.setattr(schooling, "SHARES", {"right": 1.0})
    monkeypatch.setattr(schooling, "soil", lambda images, rng: (images.clone(), [0.0] * len(images)))
    for kind, open_edit in (("recolor", False), ("texture", False), ("add", True), ("replace", True)):
        monkeypatch.setattr(schooling, "KIND_SHARES", {kind: 1.0})
        answers = lesson(48, 32, "stained", kind).answers.view(48, 4)
        # half blends are a fifth of the pairs and answer for themselves; some stains lie behind things
        assert (answers[:, 1] == 0).float().mean() > 0.3
        said_yes = (answers[:, 0] == 1).float().mean()
        assert said_yes < 0.2 if open_edit else said_yes > 0.6


REQUESTS = {
    "move": Edit("move", "circle", side="bottom"),
    "recolor": Edit("recolor", "circle", color="green"),
    "replace": Edit("replace", "circle", new_shape="square"),
    "texture": Edit("texture", "circle", texture="hollow"),
    "background": Edit("background", background="black"),
    "remove": Edit("remove", "circle"),
}


ROOMY = Scene((Thing("circle", "red", x=0.3, y=0.3, size=0.15), Thing("triangle", "blue", x=0.75, y=0.3, size=0.15)), "white")


def stain(picture, x: int, y: int):
    out = picture.clone()
    out[:, :, y : y + 5, x : x + 3] = torch.tensor([1.0, 1.0, -1.0]).view(1, 3, 1, 1)
    return out


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_student_s_work_is_measured_by_what_was_asked(kind):
    """The scene asked for, drawn exactly, is a yes to both questions. With a stain in a corner the rest is not kept."""
    example = Example(ROOMY, REQUESTS[kind], "")
    target = apply_edit(ROOMY, REQUESTS[kind], random.Random(0))
    right = render([target])
    (work,) = own_work([example], [target], right)
    assert (work.done(), work.kept()) == (True, True)
    (work,) = own_work([example], [target], stain(right, 28, 26))
    assert work.kept() is (None if kind == "background" else False)  # nobody vouches for the looks of a new background


def test_a_bribe_is_not_a_move():
    """A copy with a yellow mark where the thing should go (what a student once learnt to draw): neither moved nor kept. A plain copy was
    not moved. A thing at both places is not a finished move; nobody says that the rest was kept."""
    edit, copy = REQUESTS["move"], render([ROOMY])
    target = apply_edit(ROOMY, edit, random.Random(0))
    both = torch.cat((copy[:, :, :16], render([target])[:, :, 16:]), 2)
    look = lambda picture: own_work([Example(ROOMY, edit, "")], [target], picture)[0]
    assert look(stain(copy, 28, 26)).done() is False and look(stain(copy, 28, 26)).kept() is False
    assert look(copy).done() is False
    assert look(both).done() is None and look(both).kept() is None and look(both).leftover > BARE


def test_what_was_not_removed_is_no_stain():
    """A copy, where a thing was to go: not said to be done, and nobody says that the rest has suffered."""
    edit, copy = REQUESTS["remove"], render([ROOMY])
    (work,) = own_work([Example(ROOMY, edit, "")], [apply_edit(ROOMY, edit, random.Random(0))], copy)
    assert (work.done(), work.kept()) == (None, None) and work.leftover > BARE and work.stain < STAIN


def test_a_thing_in_another_s_place_is_no_removal():
    """A square where a circle was to go (what a student once learnt, since no circle can be seen): the rest is not what it was."""
    edit = REQUESTS["remove"]
    swapped = render([ROOMY.with_thing(0, shape="square")])
    (work,) = own_work([Example(ROOMY, edit, "")], [apply_edit(ROOMY, edit, random.Random(0))], swapped)
    assert work.kept() is False and work.done() is None


def test_of_additions_only_the_other_things_are_judged():
    scene, copy, _ = square_for_circle()
    edit = Edit("add", "square", color="green", texture="solid")
    target = apply_edit(scene, edit, random.Random(0))
    look = lambda picture: own_work([Example(scene, edit, "")], [target], picture)[0]
    assert (look(copy).done(), look(copy).kept()) == (None, None)
    assert look(copy[:, :, :1, :1].expand_as(copy)).kept() is False


def test_a_student_s_work_is_part_of_the_lessons():
    """Pairs marked 'own' show what the student drew; of a student that copies every move is a no, and nothing else is asked of them."""
    given = []

    def copies(references, instructions):
        given.append(references)
        return references

    work = lesson(96, 32, "own", editor=copies)
    rows = [i for i, kind in enumerate(work.kinds) if kind == "own"]
    assert len(rows) > 16 and len(given) == 1 and torch.equal(work.output[rows], given[0]) and set(t for i, t in enumerate(work.types) if i in rows) <= set(EDIT_TYPES)
    answers, singles = work.answers.view(96, 4), work.single_answers.view(96, 3)
    for i in rows:
        other = not torch.equal(work.questions[4 * i + 1], work.questions[4 * i + 3])  # a second request was found
        assert (answers[i, 2:] == -1).all() or not other
        assert (singles[i, 1:] == -1).all() and (work.caption_labels[i] == -100).all() and (work.ground_output[i] == -100).all()
        if work.types[i] == "move":
            assert answers[i, 0] == 0


def test_earlier_students_edit_as_they_were_asked():
    """The picked student sees the references and the instructions, in one, two or four calls, without a graph."""
    picture, calls = render([square_for_circle()[0]] * 2), []

    class Copies(torch.nn.Module):
        device, encode_text = torch.device("cpu"), staticmethod(lambda ids: ids)

        def forward(self, x, t, text, given):
            calls.append(text)
            return (x - given) / t.view(-1, 1, 1, 1)

    torch.manual_seed(0)
    drawn = practise([Copies()], picture, torch.ones(2, 4, dtype=torch.long))
    assert len(calls) in (1, 2, 4) and not drawn.requires_grad and torch.allclose(drawn, picture, atol=1e-4)
