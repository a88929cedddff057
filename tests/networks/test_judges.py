"""Real judges: preprocessing and margins against each processor's PIL path and the model's own forward; gradients; bad input."""

import importlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import pictures
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vlmedit.data.requests import Request, batch_of
from vlmedit.equations.judge_loss import answer_margins, asked, judge_loss, see
from vlmedit.networks.judges import (
    FAMILIES,
    Blind,
    Ensemble,
    fitting_size,
    lanczos,
    load_judge,
    preprocessor_settings,
    two_row_margin,
)
from vlmedit.networks.prompts import PromptTable
from vlmedit.testing import random_models as tiny

PIL = {
    "qwen2.5-vl": "qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
    "qwen3-vl": "qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil",
    "llava-onevision": "llava_onevision.image_processing_pil_llava_onevision.LlavaOnevisionImageProcessorPil",
    "internvl": "got_ocr2.image_processing_pil_got_ocr2.GotOcr2ImageProcessorPil",
    "smolvlm": "smolvlm.image_processing_pil_smolvlm.SmolVLMImageProcessorPil",
    "paligemma2": "siglip.image_processing_pil_siglip.SiglipImageProcessorPil",
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
    theirs = theirs[0, 0] if name in ("llava-onevision", "smolvlm") else theirs[0] if name in ("internvl", "paligemma2") else theirs
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
                pixels = torch.stack(prepared) if name in ("internvl", "paligemma2", "smolvlm") else torch.cat(prepared)
                pixels = pixels[None] if name == "smolvlm" else pixels
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
    book = PromptTable()
    judge.book = book
    requests = [Request("make it red", "a", "b"), Request("remove the cat", "a", "b", "remove", "a cat")]
    reference, output = pictures(2, 1, 32), pictures(2, 2, 32)
    batch = batch_of(requests, reference, PromptTable(), book)
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
    book = PromptTable()
    two = [load_judge(saved / name, book) for name in ("internvl", "llava-onevision")]
    x = smooth(32, 32).requires_grad_()
    alone = [j.logit_margin([(x,)], ["done?"]) for j in two]
    both = Ensemble(two).logit_margin([(x,)], ["done?"])
    torch.testing.assert_close(both, sum(alone) / 2)
    slopes = [torch.autograd.grad(m.sum(), x)[0] for m in (*alone, both)]
    torch.testing.assert_close(slopes[2], (slopes[0] + slopes[1]) / 2, atol=1e-6, rtol=1e-4)
    batch = batch_of([Request("make it red", "a", "b")], smooth(32, 32, 1)[None], PromptTable(), book)
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


def test_written_answers(judge):
    """Greedy words to a batch with two pictures, one of another size, and none are those of each row alone; the first token is the
    largest of the answer's logits."""
    rows = [(smooth(32, 32, 1), smooth(32, 32, 2)), (smooth(40, 24),), ()]
    texts = ["was it done?", "a much longer question about what is to be seen in here", "and without a picture?"]
    said = judge.write(rows, texts, 4)
    assert said == [judge.write([row], [text], 4)[0] for row, text in zip(rows, texts)] and said == judge.write(rows, texts, 4)
    with torch.no_grad():
        first = judge.answer_logits(rows[:2], texts[:2]).argmax(1)
    assert judge.write(rows[:2], texts[:2], 1) == [judge.tokenizer.decode([i], skip_special_tokens=True).strip() for i in first.tolist()]


@pytest.mark.parametrize(("size", "new"), [(20, 7), (7, 20), (32, 32), (100, 33), (5, 96)])
def test_lanczos_is_pillows(size, new):
    """The matrix, applied to a row of floats, gives what Pillow gives (which keeps its own coefficients in doubles), to 1e-5."""
    row = np.random.default_rng(0).random((1, size), dtype=np.float32)
    theirs = np.asarray(Image.fromarray(row).resize((new, 1), Image.Resampling.LANCZOS))
    np.testing.assert_allclose(row @ lanczos(size, new).T.numpy(), theirs, atol=1e-5)


@pytest.mark.parametrize("size", [(50, 35), (35, 60), (200, 30)])
def test_smolvlm_resizes_twice(saved, size):
    """To the longest edge, then to the tile, as its processor does on the way up and down: both steps in one map, within the roundings of
    two 8-bit pictures."""
    judge = load_judge(saved / "smolvlm")
    judge.settings = {**judge.settings, "size": {"longest_edge": 96}}
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    settings = {k: v for k, v in judge.settings.items() if k != "image_processor_type"}
    x = smooth(*size)
    theirs = SmolVLMImageProcessorPil(**settings)([to_pil(x)], return_tensors="pt")["pixel_values"][0, 0]
    off = (judge.prepare(x) - theirs).abs() * 255 * 0.5  # in 8-bit steps
    assert off.mean() < 0.8 and off.max() < 8


def test_a_gray_picture_is_seen_too(saved):
    """SmolVLM's own features leave an all-gray picture out, as padding; here it counts like any other, so that a blind judge works."""
    judge = load_judge(saved / "smolvlm")
    gray = torch.zeros(3, 32, 32)
    assert judge.prepare(gray).abs().max() < 1e-6 and judge.look([gray])[0].pooler_output.shape == judge.look([smooth(32, 32)])[0].pooler_output.shape
    assert Blind(judge).logit_margin([(gray, smooth(32, 32))], ["done?"]).isfinite().all()


def test_idefics3_has_smolvlms_adapter(tmp_path):
    """The elder class by the same adapter: margins of its stock forward."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    folder = tiny.save_judge("smolvlm", tmp_path / "s")
    config = json.loads((folder / "config.json").read_text())
    vision = {**config["vision_config"], "model_type": "idefics3_vision"}
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(Idefics3Config(vision_config=vision, text_config=config["text_config"], image_token_id=config["image_token_id"], scale_factor=2))
    model.save_pretrained(folder)
    judge = load_judge(folder)
    row = (smooth(32, 32, 1), smooth(20, 64, 2))
    ids = torch.tensor([judge.tokenizer.encode(judge.prompt("done?", row), add_special_tokens=False)])
    with torch.no_grad():
        whole = judge.model(input_ids=ids, pixel_values=torch.stack([judge.prepare(p) for p in row])[None]).logits[0, -1]
        margin = judge.logit_margin([row], ["done?"])
    torch.testing.assert_close(margin[0], whole[judge.config.yes_token_id] - whole[judge.config.no_token_id], atol=1e-5, rtol=1e-4)


def test_capped_logits():
    """Gemma 2 caps its logits: the margin is the difference of the capped ones, not the capped difference."""
    states, weight = torch.tensor([[[1.0, 2.0], [30.0, -20.0]]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    margin = two_row_margin(states, torch.tensor([2]), weight, 0, 1, cap=30.0)
    torch.testing.assert_close(margin, 30 * torch.tanh(torch.tensor([1.0])) - 30 * torch.tanh(torch.tensor([-20 / 30])))
    assert margin < two_row_margin(states, torch.tensor([2]), weight, 0, 1) == 50


@pytest.mark.parametrize("cap", [None, 100.0])
def test_the_margin_is_exact_under_autocast(cap):
    """Autocast would make the product one of bf16, whose steps are 0.25 at this size."""
    states = torch.full((1, 2, 64), 1.0) + torch.arange(64) / 512
    weight = torch.stack((torch.full((64,), 0.89), torch.zeros(64)))
    plain = two_row_margin(states, torch.tensor([2]), weight, 0, 1, cap)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(states[:, 0] @ weight[0], (states[:, 0].bfloat16() @ weight[0].bfloat16()))  # autocast is on
        cast = two_row_margin(states, torch.tensor([2]), weight, 0, 1, cap)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain) and not torch.equal(plain, plain.bfloat16().float())


def test_pictures_are_prepared_exactly_under_autocast(judge):
    """What the vision tower is given, and its gradient, are those of float32: SmolVLM's two Lanczos products among them."""
    found = []
    for on in (False, True):
        x = smooth(40, 24).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            prepared = judge.prepare(x)
        found.append((prepared, torch.autograd.grad(prepared.square().sum(), x)[0]))
    (plain, slope), (cast, cast_slope) = found
    assert cast.dtype == torch.float32 and torch.equal(cast, plain) and torch.equal(cast_slope, slope)


def test_the_whole_margin_under_autocast(judge):
    """A judge asked under autocast answers in float32, not on bf16's steps, and close to what it says without."""
    rows, questions = [(smooth(32, 32, 1), smooth(32, 32, 2)), (smooth(32, 32, 3),)], ["was it done?", "is there a dog?"]
    with torch.no_grad():
        plain = judge.logit_margin(rows, questions)
        with torch.autocast("cpu", torch.bfloat16):
            cast = judge.logit_margin(rows, questions)
    assert cast.dtype == torch.float32 and not torch.equal(cast, cast.bfloat16().float()) and (cast - plain).abs().max() < 0.1


def test_families_answer_in_their_own_words(saved):
    """By default the answers are those that a family's checkpoints write: with a space, or in small letters; others can be asked for."""
    ids = {n: load_judge(saved / n) for n in ("internvl", "smolvlm", "paligemma2")}
    words = {n: j.tokenizer.decode([j.config.yes_token_id]) for n, j in ids.items()}
    assert words == {"internvl": "Yes", "smolvlm": " Yes", "paligemma2": "yes"}
    assert load_judge(saved / "smolvlm", answers=("Yes", "No")).config.yes_token_id != ids["smolvlm"].config.yes_token_id


# --- bad input


@pytest.mark.parametrize("name", tiny.JUDGES)
def test_a_context_for_one_picture_is_refused(name, tmp_path):
    """A judge whose context does not hold two pictures and a question: one error, before its weights are read (there are none)."""
    folder = tiny.save_judge(name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="too small for two pictures: [0-9]+ visual tokens each .* its context of 100"):
        load_judge(folder)


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    """A checkpoint that brings its own modeling code is refused, the code untouched, and so is a class that nobody knows."""
    code = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig", "AutoModel": "modeling_internvl_chat.InternVLChatModel"}
    (tmp_path / "configuration_internvl_chat.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass InternVLChatConfig: pass\n")
    for config in ({"model_type": "internvl_chat", "auto_map": code}, {"model_type": "never_heard_of"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="does not have, or brings code of its own, which is not run .*-hf"):
            load_judge(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_bf16_agrees_with_fp32(judge, name, saved):
    """The same weights rounded to bf16: margins of size 1 within 0.08 (bf16 keeps 8 bits, and the tiny judges have four layers)."""
    half = load_judge(saved / name, dtype=torch.bfloat16)
    rows, questions = [(smooth(32, 32, 1), smooth(32, 32, 2)), (smooth(32, 32, 3),)], ["was it done?", "is there a dog?"]
    with torch.no_grad():
        exact, rounded = (j.logit_margin(rows, questions) for j in (judge, half))
    assert rounded.dtype == torch.float32 and (exact - rounded).abs().max() < 0.08 and not torch.equal(exact, rounded)


def test_a_question_longer_than_the_context_is_refused(saved):
    judge = load_judge(saved / "internvl")
    with pytest.raises(ValueError, match="tokens, the judge's context 1024; ask shorter"):
        judge.logit_margin([(smooth(32, 32),)], ["why? " * 400])


def test_sizes_of_older_files(tmp_path):
    """Qwen2.5-VL's files name pixels, not a size; the processor takes them, and so do we."""
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_pixels": 256, "max_pixels": 2304, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert preprocessor_settings(tmp_path)["size"] == {"shortest_edge": 256, "longest_edge": 2304}


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
