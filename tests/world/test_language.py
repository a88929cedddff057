"""Words: what is written can be read back, what a caption hides stays hidden, and nothing falls outside the vocabulary."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.data.judge_lessons import lesson
from vlmedit.data.world import sample_example
from vlmedit.errors import UnknownInstruction
from vlmedit.world import language
from vlmedit.world.edits import ALL_TYPES, Edit, apply_edit
from vlmedit.world.language import (
    SYNONYMS,
    TEMPLATES,
    caption,
    edit_question,
    grammar,
    identity_question,
    parse_instruction,
    vocabulary,
)
from vlmedit.world.scene import BACKGROUNDS, COLORS, SHAPES, SIDES, STYLES, TEXTURES, Look, Scene, Thing, sample_scene
from vlmedit.world.tokenizer import UNK, build_tokenizer, encode

PER_TYPE = 600


@pytest.fixture(scope="module")
def examples():
    rng = random.Random(7)
    return {kind: [sample_example(rng, (kind,)) for _ in range(PER_TYPE)] for kind in ALL_TYPES}


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_every_phrasing_reads_back_as_its_edit(kind, examples):
    """instruct then parse_instruction is the identity on 600 random edits of each type, and every template was among them."""
    used = set()
    patterns = language._patterns()
    names = [template for templates in TEMPLATES.values() for template in templates]
    for example in examples[kind]:
        assert parse_instruction(example.instruction) == example.edit, example.instruction
        matching = [i for i, (_, pattern) in enumerate(patterns) if pattern.fullmatch(example.instruction)]
        assert {patterns[i][0] for i in matching} == {kind}  # no other edit type could have been meant
        used |= {names[i] for i in matching}
    assert used == set(TEMPLATES[kind])


@given(st.integers(0, 2**40), st.sampled_from(ALL_TYPES))
def test_reading_survives_case_punctuation_and_politeness(seed, kind):
    """Capitals, commas, extra spaces, a full stop and 'please' change nothing."""
    example = sample_example(random.Random(seed), (kind,))
    words = example.instruction.split()
    dressed = "  Please, " + ",  ".join(words[:1]).title() + "   " + " ".join(words[1:]).upper() + " !.\n"
    assert parse_instruction(dressed) == example.edit


@pytest.mark.parametrize(
    "text, same",
    [
        ("recolour the disc gray", None),
        ("recolor the plus violet", "color the cross purple"),
        ("change the colour of the disc to turquoise", "change the color of the circle to cyan"),
        ("make the background gray", "make the background grey"),
        ("add an red circle", "add a red circle"),
    ],
)
def test_synonyms_mean_their_words(text, same):
    """Each synonym reads as its own word; gray is a background, never a thing's color."""
    if same is None:
        with pytest.raises(UnknownInstruction):
            parse_instruction(text)
    else:
        assert parse_instruction(text) == parse_instruction(same)


def test_synonyms_lead_to_known_words_and_shadow_none():
    """Every synonym's meaning is a word of the grammar, and no synonym hides one."""
    known = language.instruction_words()
    assert set(SYNONYMS.values()) <= known
    assert not set(SYNONYMS) & known


@given(st.integers(0, 2**40))
def test_captions_hide_place_size_and_looks(seed):
    """Two scenes that differ only in positions, sizes, tints and nuisances have one caption; another color has another."""
    rng = random.Random(seed)
    scene = sample_scene(rng)
    other = replace(
        scene,
        look=Look(softness=1.4, noise=0.01),
        things=tuple(replace(t, x=rng.random(), y=rng.random(), size=rng.uniform(0.1, 0.3), tint=(0.0, 0.0, 0.0), shade=0.1) for t in scene.things),
    )
    assert other != scene and caption(other) == caption(scene)
    named = [dict(color=c) for c in COLORS] + [dict(texture=t) for t in TEXTURES] + [dict(shape=s) for s in SHAPES]
    for change in named:
        if scene.with_thing(0, **change) != scene:
            assert caption(scene.with_thing(0, **change)) != caption(scene)
    for ground in set(BACKGROUNDS) - {scene.background}:
        assert caption(replace(scene, background=ground)) != caption(scene)
    for style in set(STYLES) - {scene.style}:
        assert caption(replace(scene, style=style)) != caption(scene)


def test_caption_by_hand():
    """One caption written out."""
    scene = Scene((Thing("circle", "red"), Thing("square", "blue", "striped")), "white", "pastel")
    assert caption(scene) == "pastel picture of red circle and striped blue square on white background"


def every_text(examples) -> list[str]:
    """Captions of references and targets, instructions and questions of all examples."""
    out = []
    for example in (e for group in examples.values() for e in group):
        out += [caption(example.scene), example.instruction, caption(apply_edit(example.scene, example.edit, random.Random(0)))]
        out += [edit_question(example.edit, example.instruction).text, identity_question(example.edit, example.instruction).text]
    return out


def test_every_text_is_inside_vocabulary_and_length(examples):
    """30000 generated texts: each word is in the vocabulary, no token is [unk], each fits TEXT_LENGTH, decoding returns it."""
    texts = sorted(set(every_text(examples)))
    assert {w for t in texts for w in t.split()} <= set(vocabulary())
    tokenizer = build_tokenizer()
    ids = encode(texts, TEXT_LENGTH)
    assert not (ids == tokenizer.convert_tokens_to_ids(UNK)).any()
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == [t for t in texts]


def test_lessons_hold_no_unknown_word():
    """The judge's questions, presence questions and captions hold no [unk] either."""
    unknown = build_tokenizer().convert_tokens_to_ids(UNK)
    for k in range(20):
        work = lesson(16, 32, "words", k)
        for ids in (work.questions, work.single_questions, work.caption):
            assert not (ids == unknown).any()


def test_longest_possible_texts_fit():
    """The wordiest caption, instruction and question that the grammar can produce fit TEXT_LENGTH."""
    scene = Scene(tuple(Thing(s, "yellow", "striped") for s in SHAPES[:3]), "white", "pastel")
    edit = Edit("customise", shape="circle", background="white", new_shape="square", color="red", texture="striped")
    longest = max((language._fill(t, edit, "yellow circle") for t in TEMPLATES["customise"]), key=lambda t: len(t.split()))
    recolor = max((language._fill(t, Edit("recolor", "circle", "red"), "yellow circle") for t in TEMPLATES["recolor"]), key=lambda t: len(t.split()))
    texts = [caption(scene), longest, edit_question(edit, longest).text, identity_question(Edit("recolor", "circle", "red"), recolor).text]
    assert encode(texts, TEXT_LENGTH).shape == (4, TEXT_LENGTH)


def test_a_text_that_does_not_fit_is_refused():
    """`encode` names the number of words, the limit and the text; it truncates nothing."""
    with pytest.raises(ValueError, match="a text of 4 words, at most 3 fit: 'make the circle red'"):
        encode(["add a circle", "make the circle red"], 3)


def test_tokenizer_has_one_id_per_word():
    """Ids are a bijection, padding is 0 and on the right, case is folded."""
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    assert sorted(ids.values()) == list(range(len(tokenizer)))
    assert set(vocabulary()) < set(ids)
    row = encode(["Make the CIRCLE red"], 6)[0]
    assert row.tolist() == [ids["make"], ids["the"], ids["circle"], ids["red"], 0, 0]


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_question_forms(kind, examples):
    """Removals ask about the output alone with target No; all else asks about both pictures with target Yes. The identity
    question is about both, target Yes, and names the thing a removal must ignore."""
    for example in examples[kind][:100]:
        question, identity = edit_question(example.edit, example.instruction), identity_question(example.edit, example.instruction)
        if kind == "remove":
            assert (question.answer, question.pair) == (False, False)
            assert question.text == f"is there a {example.edit.shape} ?"
            assert identity.text == f"is all but the {example.edit.shape} the same ?"
        else:
            assert (question.answer, question.pair) == (True, True)
            assert example.instruction in question.text
            assert example.instruction in identity.text or (kind == "customise" and example.edit.shape in identity.text)
        assert (identity.answer, identity.pair) == (True, True)
        assert question.text != identity.text


@pytest.mark.parametrize("text, word, near", [("make the circel red", "circel", "circle"), ("delete teh square", "teh", "the"), ("paint the cross yelow", "yelow", "yellow")])
def test_unknown_words_show_their_neighbors(text, word, near):
    """The message names the unknown word, its nearest known word and the whole grammar."""
    with pytest.raises(UnknownInstruction) as error:
        parse_instruction(text)
    first, rest = str(error.value).split("\n", 1)
    assert f"unknown word '{word}'" in first and near in first.split("nearest:")[1]
    assert rest == grammar()


def test_known_words_in_unknown_order_and_nothing_at_all():
    """Both get their own message."""
    with pytest.raises(UnknownInstruction, match="known words, but not in a known order"):
        parse_instruction("red the circle make")
    for empty in ("", "   ", "!?", "please"):
        with pytest.raises(UnknownInstruction, match="the instruction is empty"):
            parse_instruction(empty)


def test_grammar_lists_everything():
    """Every template and every word of every slot is in the grammar text."""
    text = grammar()
    for templates in TEMPLATES.values():
        assert all(t in text for t in templates)
    for word in (*SHAPES, *COLORS, *TEXTURES, *BACKGROUNDS, *SIDES, *STYLES):
        assert word in text
