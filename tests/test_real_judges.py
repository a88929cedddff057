"""Real judges: preprocessing and margins against each processor's PIL path and the model's own forward; gradients; bad input."""

import importlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import pictures
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vlmedit.judging import answer_margins, asked, judge_loss, see
from vlmedit.real import tiny
from vlmedit.real.judges import FAMILIES, Blind, Ensemble, fitting_size, load_judge, preprocessor_settings
from vlmedit.real.requests import Book, Request, batch_of

PIL = {
    "qwen2.5-vl": "qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
    "qwen3-vl": "qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
    "llava-onevision": "llava_onevision.image_processing_pil_llava_onevision.LlavaOnevisionImageProcessorPil",
    "internvl": "got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil",
}
SIZES = ((32, 32), (40, 24), (20, 64))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    for name in tiny.JUDGES:
        tiny.save_judge(name, folder / name)
    return folder


@pytest.fixture(scope="module", params=tiny.JUDGES)
def judge(request, saved):
    return load_judge(saved / request.param)


@pytest.fixture
def name(judge, saved):
    return next(n for n in tiny.JUDGES if type(judge) is FAMILIES[type(load_judge(saved / n).model).__name__])


def smooth(height, width, seed=0) -> torch.Tensor:
    """A photograph-like picture of 8-bit values in [-1, 1]."""
    rough = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(rough, size=(height, width), mode="bicubic").clamp(0, 1)[0]
    return (x * 255).round() / 255 * 2 - 1


def to_pil(x: torch.Tensor) -> Image.Image:
    return Image.fromarray(((x + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8))


def processor(name, saved):
    module, cls = PIL[name].rsplit(".", 1)
    settings = {k: v for k, v in preprocessor_settings(saved / name).items() if k != "image_processor_type"}
    return getattr(importlib.import_module(f"transformers.models.{module}"), cls)(**settings)


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_is_the_processors(judge, name, saved, size):
    """Against the PIL path on pictures of three aspect ratios: exact where nothing is resized, else within a rounding of 8 bits here
    and there (mean below 0.4 / 255 of the value range, largest below 6 / 255); antialiasing and padding are part of it."""
    x = smooth(*size)
    ours = judge.prepare(x)
    pil = to_pil(x)
    images = [[pil, pil]] if name == "llava-onevision" else [pil]
    theirs = torch.as_tensor(np.asarray(processor(name, saved)(images, return_tensors="pt")["pixel_values"]))
    theirs = theirs[0, 0] if name == "llava-onevision" else theirs[0] if name == "internvl" else theirs
    assert ours.shape == theirs.shape
    unit = 1 / 255 / float(judge.std.min())
    off = (ours - theirs).abs()
    assert off.mean() < 0.4 * unit and off.max() < 6 * unit
    if size == (32, 32):
        assert off.max() < 1e-5  # every tiny judge takes 32 x 32 as it is


def test_fitting_size_is_qwens():
    for h, w in ((512, 512), (640, 384), (100, 2000), (17, 23), (4000, 3000)):
        assert fitting_size(h, w, 28, 56 * 56, 28 * 28 * 1280) == smart_resize(h, w, 28, 56 * 56, 28 * 28 * 1280)


def test_margins_are_the_models_own(judge, name):
    """A batch with one- and two-picture questions of several lengths: each margin is logit(Yes) - logit(No) of the stock forward on
    that row alone with pixel values, without padding, shared features or the two-row head (to 1e-4)."""
    a, b, c = (smooth(32, 32, s) for s in (1, 2, 3))
    rows, questions = [(a, b), (c,), (a, c)], ["was it done?", "does the image contain a very large dog?", "is the rest the same?"]
    with torch.no_grad():
        margins = judge.logit_margin(rows, questions)
        logits = judge.answer_logits(rows, questions)
        for i, (row, q) in enumerate(zip(rows, questions)):
            ids = torch.tensor([judge.tokenizer.encode(judge.prompt(q, row), add_special_tokens=False)])
            more = judge.extras(ids, row)
            prepared = [judge.prepare(p) for p in row]
            if name == "llava-onevision":
                more = dict(image_sizes=torch.tensor([[32, 32]] * len(row)), batch_num_images=torch.tensor([2] * len(row)))
                pixels = torch.stack(prepared)[:, None]
            else:
                pixels = torch.stack(prepared) if name == "internvl" else torch.cat(prepared)
            whole = judge.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **more).logits[0, -1]
            torch.testing.assert_close(margins[i], whole[judge.config.yes_token_id] - whole[judge.config.no_token_id], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(logits[i], whole, atol=1e-4, rtol=1e-3)
    assert margins.std() > 1e-4 and (ids == judge.config.image_token_id).sum() == 2 * judge.tokens(a)


def test_every_picture_gets_a_gradient(judge):
    """Both pictures of each question, and the picture of a question about one, get a finite gradient of their own; a picture that asks
    for none leaves no graph; saturated pixels keep theirs."""
    shown = (1.3 * torch.stack([smooth(32, 32, s) for s in range(3)])).requires_grad_()
    a, b, c = shown
    margins = judge.logit_margin([(a, b), (c,)], ["one?", "two?"])
    (g,) = torch.autograd.grad(margins.sum(), shown)
    assert g.isfinite().all() and all(row.abs().max() > 1e-7 for row in g)
    assert g[shown.detach().abs() > 1].abs().max() > 0
    frozen = judge.look([a.detach(), b])
    assert not frozen[0].pooler_output.requires_grad and frozen[1].pooler_output.requires_grad
    assert not any(p.requires_grad for p in judge.parameters())


def test_each_picture_is_seen_once(judge, monkeypatch):
    """Two questions about two pictures: the vision tower meets each picture once, the reference in a pass of its own."""
    passes = []
    encode = judge.encode
    monkeypatch.setattr(judge, "encode", lambda pictures: passes.append(len(pictures)) or encode(pictures))
    a, b = smooth(32, 32, 1), smooth(32, 32, 2).requires_grad_()
    judge.logit_margin([(a, b), (a, b)], ["edit?", "rest?"])
    assert passes == [1, 1]


def test_the_loss_asks_the_right_questions(judge):
    """`judge_loss` over a real judge: rows, answers and both answer losses as the definitions say."""
    book = Book()
    judge.book = book
    requests = [Request("make it red", "a", "b"), Request("remove the cat", "a", "b", "remove", "a cat")]
    reference, output = pictures(2, 1, 32), pictures(2, 2, 32)
    batch = batch_of(requests, reference, Book(), book)
    images, questions, answers, owners = asked(batch, output)
    assert [len(i) for i in images] == [2, 1, 2, 2] and answers.tolist() == [1, 0, 1, 1] and owners.tolist() == [0, 1, 0, 1]
    with torch.no_grad():
        margin = answer_margins(judge, batch, output)[0]
        by_row = torch.cat([judge.logit_margin([row], q[None]) for row, q in zip(images, questions)])
        torch.testing.assert_close(margin, by_row, atol=1e-4, rtol=1e-3)
        loss, right = judge_loss(judge, batch, output, 0.5)
        sign = torch.tensor([1.0, -1, 1, 1])
        torch.testing.assert_close(loss, F.softplus(-0.5 * margin * sign).mean())
        torch.testing.assert_close(right, (margin * sign).sigmoid().view(2, 2))
        whole = judge_loss(judge, batch, output, 0.5, answer_loss="vocabulary")[0]
        targets = torch.where(answers > 0, judge.config.yes_token_id, judge.config.no_token_id)
        torch.testing.assert_close(whole, F.cross_entropy(0.5 * judge.answer_logits(images, questions), targets), atol=1e-5, rtol=1e-4)
        assert judge_loss(judge, batch, output, identity=False)[1].shape == (1, 2)


def test_pictures_of_several_sizes_in_one_batch(saved):
    """Qwen keeps each picture's own grid: a batch of unlike sizes gives what each row gives alone."""
    judge = load_judge(saved / "qwen2.5-vl")
    rows = [(smooth(32, 32), smooth(40, 24)), (smooth(20, 64),)]
    with torch.no_grad():
        alone = torch.cat([judge.logit_margin([row], ["done?"]) for row in rows])
        torch.testing.assert_close(judge.logit_margin(rows, ["done?"] * 2), alone, atol=1e-4, rtol=1e-3)
    assert judge.tokens(rows[0][1]) != judge.tokens(rows[1][0])


def test_ensemble_and_blind_judge(saved):
    """An ensemble's margin and gradient are the means of its judges', and `judge_loss` takes it; a blind judge hears the question and never
    sees the picture; judges with books of their own are refused."""
    book = Book()
    two = [load_judge(saved / name, book) for name in ("internvl", "llava-onevision")]
    x = smooth(32, 32).requires_grad_()
    alone = [j.logit_margin([(x,)], ["done?"]) for j in two]
    both = Ensemble(two).logit_margin([(x,)], ["done?"])
    torch.testing.assert_close(both, sum(alone) / 2)
    slopes = [torch.autograd.grad(m.sum(), x)[0] for m in (*alone, both)]
    torch.testing.assert_close(slopes[2], (slopes[0] + slopes[1]) / 2, atol=1e-6, rtol=1e-4)
    batch = batch_of([Request("make it red", "a", "b")], smooth(32, 32, 1)[None], Book(), book)
    assert judge_loss(Ensemble(two), batch, smooth(32, 32, 2)[None])[1].shape == (2, 1)
    blind = Blind(two[0])
    asked_twice = [blind.logit_margin([(smooth(32, 32, s),)], ["done?"]) for s in (1, 2)]
    assert torch.equal(*asked_twice) and not torch.equal(asked_twice[0], blind.logit_margin([(x,)], ["is there a dog?"]))
    with pytest.raises(ValueError, match="one book for all"):
        Ensemble([two[0], load_judge(saved / "internvl")])
    with pytest.raises(ValueError, match="ensemble of 0 judges"):
        Ensemble([])


def test_the_checkpoints_template_wins(saved):
    """A chat template that comes with the checkpoint replaces the built-in prompt; one that shows no picture is refused."""
    judge = load_judge(saved / "qwen2.5-vl")
    judge.tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<|image_pad|>{% else %}[{{ c.text }}]{% endif %}{% endfor %}{% endfor %}A:"
    )
    x = smooth(32, 32)
    assert judge.prompt("why?", [x, x]) == "<|image_pad|>" * 2 * judge.tokens(x) + "[why?]A:"
    judge.tokenizer.chat_template = "{{ messages[0].content[0].type }}"
    with pytest.raises(ValueError, match="the prompt shows 0 pictures by '<|image_pad|>', there are 2"):
        judge.prompt("why?", [x, x])


def test_the_miniatures_preprocessing_is_untouched():
    x = 1.5 * torch.randn(2, 3, 8, 8)
    assert torch.equal(see(x, 8), x + (x.clamp(-1, 1) - x).detach()) and torch.equal(see(x, 8, False), x.clamp(-1, 1))


# --- bad input


def test_unusable_judges_are_refused_before_weights_are_read(saved, tmp_path, monkeypatch):
    """Answers of several tokens, one token for both, a class without an adapter, no files, no settings, no weights: one error each."""
    import transformers

    tiny.save_judge("internvl", tmp_path / "mute", answers=())
    (tmp_path / "mute" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="writes 'Yes' as 3 tokens .*; the margin needs one token per answer"):
        load_judge(tmp_path / "mute")
    with pytest.raises(ValueError, match="'maybe' as 5 tokens"):
        load_judge(saved / "internvl", answers=("Yes", "maybe"))
    with pytest.raises(ValueError, match="both answers .* are token"):
        load_judge(saved / "internvl", answers=("Yes", "Yes"))
    with pytest.raises(FileNotFoundError, match="no vision-language model at someone/some-judge"):
        load_judge("someone/some-judge")
    other = tmp_path / "other"
    load_judge(saved / "internvl").tokenizer.save_pretrained(other)
    transformers.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(other)
    with pytest.raises(ValueError, match="no adapter for BertForMaskedLM; known: Qwen2_5_VLForConditionalGeneration"):
        load_judge(other)
    half = tiny.save_judge("internvl", tmp_path / "half")
    (half / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not all of its weights"):
        load_judge(half)
    (half / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no preprocessor_config.json"):
        load_judge(half)
    (half / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [0.5] * 3}}))
    assert preprocessor_settings(half) == {"image_mean": [0.5] * 3}


def test_wrong_questions_are_refused(saved):
    judge = load_judge(saved / "internvl")
    x = smooth(32, 32)
    with pytest.raises(ValueError, match="1 questions about 2 sets"):
        judge.logit_margin([(x,), (x,)], ["a?"])
    with pytest.raises(ValueError, match="one or two pictures, got"):
        judge.logit_margin([(x, x, x)], ["a?"])
    del judge.settings["size"]
    with pytest.raises(ValueError, match="settings lack 'size'"):
        judge.prepare(x)
