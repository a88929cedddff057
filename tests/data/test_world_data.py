"""Data: what each trainer may see, drawn from its seed alone, and no target where none may be."""

import random
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from vlmedit.data import judge_lessons as schooling
from vlmedit.data import world as data
from vlmedit.data.batches import CaptionedBatch, PairedBatch, UnpairedBatch
from vlmedit.data.world import (
    EDIT_SHARES,
    FULFILLABLE_TYPES,
    SLOTS,
    as_fulfilled,
    captioned_batch,
    held_out,
    jpeg,
    paired_batch,
    reading_batch,
    references,
    sample_example,
    unpaired_batch,
)
from vlmedit.errors import ImpossibleEdit
from vlmedit.seeds import rng_for, seed_torch
from vlmedit.world.edits import ALL_TYPES, apply_edit, check_edit
from vlmedit.world.language import caption, parse_instruction
from vlmedit.world.render import render
from vlmedit.world.tokenizer import build_tokenizer
from vlmedit.world.verdict import edit_done, rest_kept


@pytest.fixture
def drawn(monkeypatch):
    """Scenes that were rendered while the test ran, one list per call of `render`."""
    calls = []

    def spy(scenes, side=32, device=None):
        calls.append(list(scenes))
        return render(scenes, side, device)

    monkeypatch.setattr(data, "render", spy)
    monkeypatch.setattr(schooling, "render", spy)
    return calls


def words(ids) -> list[str]:
    return build_tokenizer().batch_decode(ids, skip_special_tokens=True)


# --- no target


def test_a_batch_of_given_requests_is_made_of_their_own_words_and_pictures():
    """Row by row: the instruction, both captions, both questions, their answers and the picture belong to the example given."""
    examples = held_out(16, 3, ALL_TYPES[:9])
    reference = render([e.scene for e in examples], 16)
    batch = data.batch_of_examples(examples, reference)
    assert len(batch) == 16 and batch.reference is reference and batch.types == tuple(e.edit.type for e in examples)
    assert words(batch.instruction) == [e.instruction for e in examples]
    assert words(batch.reference_caption) == [caption(e.scene) for e in examples]
    assert words(batch.target_caption) == [caption(apply_edit(e.scene, e.edit, random.Random(0))) for e in examples]
    removals = torch.tensor([e.edit.type == "remove" for e in examples])
    assert torch.equal(batch.edit_answer == 0, removals) and torch.equal(batch.edit_pair == 0, removals)
    assert [q == f"is there a {e.edit.shape} ?" for q, e in zip(words(batch.edit_question), examples)] == removals.tolist()
    assert all(e.instruction in q or e.edit.type == "remove" for q, e in zip(words(batch.identity_question), examples))


def picture_fields(batch) -> list[str]:
    """Fields able to hold a picture: floating point, or at least a quarter as many numbers per sample as one of its channels."""
    side = batch.reference.shape[-1]
    tensors = {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)}
    return [k for k, v in tensors.items() if (v.is_floating_point() and v.ndim > 1) or v[0].numel() >= side * side / 4]


def test_no_pair_batch_could_hold_a_target():
    """The one picture-shaped field is the reference; ids are far too small for pixels; no name speaks of a target picture.
    The same check finds the target of a paired batch, so it can see one."""
    batch = unpaired_batch(8, 32, "shape")
    assert picture_fields(batch) == ["reference"]
    assert {f.name for f in fields(UnpairedBatch)} == {
        "reference", "instruction", "reference_caption", "target_caption", "edit_question", "edit_answer", "edit_pair", "identity_question", "nothing", "types",
    }  # fmt: skip
    assert all(getattr(batch, k).dtype == torch.int64 and getattr(batch, k).shape == (8, data.TEXT_LENGTH) for k in ("instruction", "reference_caption", "target_caption", "edit_question", "identity_question"))
    assert picture_fields(paired_batch(8, 32, "shape")) == ["reference", "target"]


def test_no_pair_batch_draws_its_references_and_nothing_else(drawn, monkeypatch):
    """One render call, of scenes that the reference captions describe; target_of is never called."""
    monkeypatch.setattr(data, "target_of", lambda *_: pytest.fail("a target was made"))
    batch = unpaired_batch(64, 32, "drawn")
    assert len(drawn) == 1 and [caption(s) for s in drawn[0]] == words(batch.reference_caption)


def test_target_captions_are_captions_of_what_is_asked(drawn):
    """The caption of the scene after the instruction, read back from its words; it equals the reference's only for 'nothing'
    or for a move, whose result no caption can tell."""
    batch = unpaired_batch(300, 32, "captions")
    for scene, instruction, target, kind in zip(drawn[0], words(batch.instruction), words(batch.target_caption), batch.types, strict=True):
        edit = parse_instruction(instruction)
        assert edit.type == kind and target == caption(apply_edit(scene, edit, random.Random(0)))
        assert (target == caption(scene)) == (kind in ("nothing", "move"))


def test_flags_of_the_questions():
    """Single-image questions with answer No for removals, else pairs with Yes; `nothing` marks do-nothing rows alone."""
    batch = unpaired_batch(256, 8, "flags", kinds=("remove", "recolor", "nothing"))
    removal = torch.tensor([k == "remove" for k in batch.types]).float()
    assert torch.equal(batch.edit_answer, 1 - removal) and torch.equal(batch.edit_pair, 1 - removal)
    assert torch.equal(batch.nothing, torch.tensor([float(k == "nothing") for k in batch.types]))
    assert 0 < removal.sum() < 256


def test_every_stream_can_be_drawn_for_long():
    """6000 additions and customisations, where one shared generator of places would fail hundreds of times: none is refused."""
    for k in range(60):
        assert len(unpaired_batch(100, 8, "long", k, kinds=("add", "customise"))) == 100


# --- determinism


@pytest.mark.parametrize("draw", (captioned_batch, unpaired_batch, paired_batch, schooling.lesson))
def test_batches_depend_on_their_seed_parts_alone(draw):
    """Whatever the state of the global generators, the batch is the same, and they are left as they were; other parts give
    another batch."""

    def contents(batch):
        return [getattr(batch, f.name) for f in fields(batch)]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    one = contents(draw(6, 32, 3, 5, 0))
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    before = torch.get_rng_state(), random.getstate()
    two = contents(draw(6, 32, 3, 5, 0))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True))
    for other in ((4, 5, 0), (3, 6, 0), (3, 5, 1)):
        assert not torch.equal(contents(draw(6, 32, *other))[0], one[0])


def test_seed_parts_do_not_run_together():
    """(1, 23) and (12, 3) are different streams; seed_torch follows its parts."""
    assert rng_for(1, 23).random() != rng_for(12, 3).random()
    seed_torch("a", 1)
    one = torch.rand(3)
    seed_torch("a", 2)
    two = torch.rand(3)
    seed_torch("a", 1)
    assert torch.equal(torch.rand(3), one) and not torch.equal(one, two)


def test_a_request_limit_limits_the_data():
    """request_limit=5 draws from five distinct requests, and from all of them; from others for a run of another seed."""
    drawn_by = lambda run: {pair for k in range(20) for b in [unpaired_batch(16, 8, run, k, request_limit=5)] for pair in zip(words(b.instruction), words(b.reference_caption))}
    assert len(drawn_by(0)) == len(drawn_by(1)) == 5 and not drawn_by(0) & drawn_by(1)


# --- held out


def test_held_out_scenes_are_in_no_training_stream(drawn):
    """No scene of three evaluation sets occurs among nearly 10000 scenes of the teacher's, the students', the limited requests' and the judge's
    streams with the same seeds; and evaluation sets of two seeds share none."""
    for seed in range(3):
        for step in range(8):
            captioned_batch(150, 8, seed, step, 0)
            unpaired_batch(150, 8, seed, step, 0)
            unpaired_batch(50, 8, seed, step, 0, request_limit=100)
            schooling.lesson(60, 32, seed, step, 0)
    trained = {s for call in drawn for s in call}
    assert len(trained) > 9_500
    sets = [{e.scene for e in held_out(512, seed, ALL_TYPES[:8])} for seed in range(3)]
    assert all(len(s) == 512 for s in sets)
    assert not trained & set().union(*sets)
    assert not sets[0] & sets[1] and not sets[1] & sets[2]


def test_held_out_takes_types_in_turn():
    """Each type gets its equal share, in order, and the set is a function of its seed."""
    examples = held_out(18, 4, ALL_TYPES[:9])
    assert [e.edit.type for e in examples] == [*ALL_TYPES[:9], *ALL_TYPES[:9]]
    assert examples == held_out(18, 4, ALL_TYPES[:9]) and held_out(9, 4, ALL_TYPES[:9]) == examples[:9]


# --- shares and pictures


def test_edit_shares_are_respected():
    """Counts of 20000 draws against EDIT_SHARES: chi-square p above 1e-3; the shares sum to 1, 1 % do nothing."""
    assert sum(EDIT_SHARES.values()) == pytest.approx(1, abs=1e-12) and EDIT_SHARES["nothing"] == 0.01
    rng = random.Random(0)
    counts = Counter(sample_example(rng, EDIT_SHARES).edit.type for _ in range(20_000))
    expected = [20_000 * share for share in EDIT_SHARES.values()]
    assert chisquare([counts[k] for k in EDIT_SHARES], expected).pvalue > 1e-3
    shuffled = chisquare([counts[k] for k in EDIT_SHARES], expected[::-1]).pvalue
    assert shuffled < 1e-6  # the test would see other shares


def test_references_are_partly_jpeg():
    """None at share 0, all at share 1, a fifth by default (4 standard deviations of 500); JPEG stays close: over 25 dB."""
    rng = random.Random(1)
    examples = [sample_example(rng, EDIT_SHARES) for _ in range(500)]
    plain = render([e.scene for e in examples])
    assert torch.equal(references(examples, 32, random.Random(0), 0.0), plain)
    coded = references(examples, 32, random.Random(0), 1.0)
    error = (coded - plain).square().mean((1, 2, 3))
    assert (error > 0).all() and (10 * torch.log10(4 / error)).min() > 25
    changed = (references(examples, 32, random.Random(0)) != plain).flatten(1).any(1).sum().item()
    assert abs(changed - 100) < 4 * (500 * 0.2 * 0.8) ** 0.5


def test_jpeg_loses_more_at_lower_quality():
    """The error falls with the quality, and the picture stays in range."""
    image = render([sample_example(random.Random(3), ("add",)).scene])[0]
    errors = [(jpeg(image, q) - image).square().mean().item() for q in (30, 75, 98)]
    assert errors[0] > errors[1] > errors[2] > 0
    assert jpeg(image, 75).shape == image.shape and jpeg(image, 75).abs().max() <= 1


def test_paired_and_unpaired_rivals_see_the_same_requests(drawn):
    """With one seed both get the same references and instructions, and the paired target does the edit and keeps the rest."""
    unpaired, paired = unpaired_batch(64, 32, 0, 7, 0), paired_batch(64, 32, 0, 7, 0)
    assert torch.equal(unpaired.reference, paired.reference) and torch.equal(unpaired.instruction, paired.instruction)
    assert unpaired.types == paired.types
    (before, same, after) = drawn
    assert before == same
    for old, new, instruction in zip(before, after, words(paired.instruction), strict=True):
        edit = parse_instruction(instruction)
        assert edit_done(old, new, edit) and rest_kept(old, new, edit)
    assert torch.equal(paired.target, render(after))


def test_captioned_batches_describe_their_pictures(drawn):
    """Captions are those of the rendered scenes, in order."""
    batch = captioned_batch(32, 32, "c")
    assert words(batch.caption) == [caption(s) for s in drawn[0]] and torch.equal(batch.image, render(drawn[0]))


def test_batches_move_and_count():
    """`to` moves tensors and keeps the rest; `len` is the number of samples; batches are frozen."""
    for batch in (captioned_batch(3, 8, 0), unpaired_batch(3, 8, 0), paired_batch(3, 8, 0)):
        assert len(batch) == 3
        moved = batch.to("meta")
        for field in fields(batch):
            value = getattr(moved, field.name)
            assert value.device.type == "meta" if isinstance(value, torch.Tensor) else value == getattr(batch, field.name)
        with pytest.raises(AttributeError):
            setattr(batch, fields(batch)[0].name, None)
    assert {CaptionedBatch, UnpairedBatch, PairedBatch} == {type(b) for b in (captioned_batch(1, 8, 0), unpaired_batch(1, 8, 0), paired_batch(1, 8, 0))}


def test_fulfilled_requests_ask_for_what_is_so_already():
    """The same edit in words that fit the picture; nothing is left to do, and the world refuses it as "already" done."""
    rng = rng_for("fulfilled test")
    for kind in FULFILLABLE_TYPES:
        for _ in range(40):
            example = sample_example(rng, (kind,))
            fulfilled = as_fulfilled(example, rng)
            assert fulfilled.edit.type == "nothing"
            asked = parse_instruction(fulfilled.instruction)
            assert asked == parse_instruction(example.instruction)
            with pytest.raises(ImpossibleEdit, match="already"):
                check_edit(fulfilled.scene, asked)


def test_fulfilled_rows_of_a_batch_have_nothing_to_do():
    """With a share of .6: every type that allows it is fulfilled in about that share, no other type is; the captions agree."""
    rows = [unpaired_batch(100, 16, "fulfilled", k, fulfilled_share=0.6) for k in range(8)]
    plain = [unpaired_batch(100, 16, "fulfilled", k) for k in range(8)]
    changed = {kind: [] for kind in EDIT_SHARES}
    for with_share, without in zip(rows, plain):
        for i, kind in enumerate(without.types):
            changed[kind].append(with_share.types[i] != kind)
            if with_share.nothing[i]:
                assert torch.equal(with_share.reference_caption[i], with_share.target_caption[i])
    for kind, flags in changed.items():
        if kind in FULFILLABLE_TYPES:
            assert 0.35 < sum(flags) / len(flags) < 0.85, kind
        else:
            assert not any(flags), kind


def test_reading_labels_are_what_the_instruction_says():
    """Every named slot of every instruction, read back from its words by the grammar; a slot that is not named is 0."""
    batch = reading_batch(200, "reading test")
    ids, labels = batch.instruction, batch.labels
    texts = build_tokenizer().batch_decode(ids, skip_special_tokens=True)
    named = 0
    for text, row in zip(texts, labels.tolist()):
        edit = parse_instruction(text)
        for (slot, words), index in zip(SLOTS.items(), row):
            told = getattr(edit, slot)
            if slot == "texture" and edit.type in ("add", "customise") and told in (None, "solid"):
                assert index in (0, 1)  # solid is not said
                continue
            if slot == "color" and edit.type not in ("add", "recolor", "customise"):
                assert index == 0  # the thing's own color is how it is named
                continue
            assert (words[index - 1] if index else None) == told, (text, slot)
            named += index > 0
    assert named > 400 and labels.shape == (200, len(SLOTS))
