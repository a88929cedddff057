"""What steps: Muon and AdamW in a table, their rate, the guard against spikes, and averages in closed form."""

import json
import math

import pytest
import torch
from torch import nn

from vlmedit.config import TrainConfig
from vlmedit.errors import ConfigError
from vlmedit.networks.dit import DiT
from vlmedit.training import optimizer as module
from vlmedit.training.optimizer import EMA, Optimizer
from vlmedit.training.run import make_accelerator
from vlmedit.world.tokenizer import build_tokenizer


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


# --- the optimizer


def layer(**overrides) -> tuple[nn.Module, Optimizer, TrainConfig]:
    torch.manual_seed(0)
    config = TrainConfig.make("smoke", **overrides)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))
    return model, Optimizer(model, config), config


@pytest.mark.parametrize("value", (math.nan, math.inf, 1e4))
def test_guard_skips_spikes_and_non_finite_gradients(value):
    """A gradient that is not finite, or whose norm exceeds `skip_above`, changes neither weights nor optimizer state,
    is reported, and is cleared; the next sound one is applied."""
    model, optimizer, config = layer()
    accelerator = make_accelerator(config)

    def update(g):
        for p in model.parameters():
            p.grad = torch.full_like(p, g)
        return optimizer.step(0, accelerator)

    assert update(0.01)[1]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, json.dumps(str(optimizer.state_dict()))
    norm, made = update(value)
    assert not made and not (norm < config.skip_above)
    assert equal(dict(model.state_dict()), before) and json.dumps(str(optimizer.state_dict())) == state
    assert all(p.grad is None for p in model.parameters())
    norm, made = update(0.01)
    assert made and not equal(dict(model.state_dict()), before) and math.isfinite(norm)


def test_norm_is_that_before_clipping_and_clipping_bounds_the_step():
    """The reported norm is the closed form of a constant gradient; beyond `clip` the gradient's size no longer
    matters."""
    out = []
    for g in (1.0, 10.0):
        model, optimizer, config = layer(clip=0.5)
        count = sum(p.numel() for p in model.parameters())
        for p in model.parameters():
            p.grad = torch.full_like(p, g)
        norm, made = optimizer.step(0, make_accelerator(config))
        assert made and norm == pytest.approx(g * count**0.5, rel=1e-5)
        out.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(out[0], out[1], atol=1e-6, rtol=0)


def test_rate_warms_up_and_falls_as_a_cosine():
    """Linear to the peak at the end of the warm-up, half way down in the middle, `final_lr` of it at the end and
    after."""
    config = TrainConfig.make(steps=1100, warmup=100, lr=0.01, final_lr=0.1)
    optimizer = Optimizer(nn.Linear(2, 2), config)
    assert [optimizer.rate(k) for k in (0, 49, 99)] == pytest.approx([1e-4, 5e-3, 1e-2])
    assert optimizer.rate(100) == pytest.approx(0.01)
    assert optimizer.rate(600) == pytest.approx(0.01 * (0.1 + 0.9 / 2))
    assert optimizer.rate(1100) == optimizer.rate(5000) == pytest.approx(1e-3)


def test_matrices_go_to_muon_and_everything_goes_somewhere():
    """Every trainable parameter of the DiT is in exactly one optimizer; embeddings, biases and convolutions are
    AdamW's."""
    model = DiT(side=16, vocab_size=len(build_tokenizer()))
    names = {p: n for n, p in model.named_parameters()}
    optimizer = Optimizer(model, TrainConfig.make())
    adam, muon = ([names[p] for g in part.param_groups for p in g["params"]] for part in optimizer.parts)
    assert sorted(adam + muon) == sorted(names.values())
    assert all(dict(model.named_parameters())[n].ndim == 2 and "embed" not in n for n in muon) and len(muon) > 20
    assert any("embed" in n for n in adam) and all(n not in muon for n in names.values() if n.endswith("bias"))


def test_the_other_optimizers_take_everything_at_once():
    """AdamW alone has every parameter, the configuration's betas and decay; a learning rate of a role's own is its
    peak."""
    model, _, config = layer(optimizer="adamw", betas=(0.3, 0.7), weight_decay=0.2, lr=0.5)
    optimizer = Optimizer(model, config, 0.25)
    (part,) = optimizer.parts
    assert type(part) is torch.optim.AdamW and [p for g in part.param_groups for p in g["params"]] == list(
        model.parameters()
    )
    assert (part.defaults["betas"], part.defaults["weight_decay"], optimizer.lr) == (
        (0.3, 0.7),
        0.2,
        0.25,
    ) and Optimizer(model, config).lr == 0.5


@pytest.mark.parametrize("name", ("adamw8bit", "paged_adamw8bit"))
def test_what_is_not_installed_is_told(name, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError,
        match=f"optimizer is '{name}', which needs bitsandbytes, and that is not installed .*optimizer=adamw",
    ):
        layer(optimizer=name)


def test_accumulated_gradients_are_their_mean():
    """Three backwards and a step with accumulate=3 are one backward of the mean."""
    ends = []
    for accumulate in (1, 3):
        model, optimizer, config = layer(accumulate=accumulate, clip=1e9)
        x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
        for row in x if accumulate == 3 else (x,):
            model(row[None] if accumulate == 3 else row).square().mean().backward()
        norm, made = optimizer.step(0, make_accelerator(config))
        assert made
        ends.append((norm, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    torch.testing.assert_close(ends[0][1], ends[1][1], atol=1e-6, rtol=1e-5)


# --- the average


def test_ema_in_closed_form():
    """After weights w_0 .. w_n the average is the weighted sum with decays min(decay, (1 + k) / (10 + k)), in float64
    to 1e-6."""
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    expected = {k: v.double().clone() for k, v in model.state_dict().items()}
    for k in range(120):
        fill(model, math.sin(k))
        ema.update(model, k)
        decay = min(0.9, (1 + k) / (10 + k))
        expected = {n: decay * v + (1 - decay) * math.sin(k) for n, v in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(ema.shadow[name].double(), value, atol=1e-6, rtol=0)
    assert not torch.equal(ema.shadow["weight"], model.weight)


def test_ema_of_a_constant_and_with_decay_zero():
    """Equal weights are kept to 1e-7, and decay 0 follows the model exactly; counters are copied, not averaged."""
    model = nn.BatchNorm1d(3)
    for decay in (0.9, 0.0):
        ema = EMA(model, decay)
        model.num_batches_tracked += 5
        ema.update(model, 50)
        assert ema.shadow["num_batches_tracked"] == model.num_batches_tracked
        torch.testing.assert_close(ema.shadow["weight"], model.weight.detach(), atol=1e-7, rtol=0)
    fill(model, 3.0)
    ema.update(model, 50)
    assert torch.equal(ema.shadow["weight"], model.weight)


def test_ema_does_not_share_memory_with_the_model():
    """Training the model in place leaves its average alone."""
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    before = ema.shadow["weight"].clone()
    fill(model, 9.0)
    assert torch.equal(ema.shadow["weight"], before)
