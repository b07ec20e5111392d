"""SPO's lower level for any loop: the value that plain SGD reaches, and a model that no one has touched."""

import pytest
import torch
from torch import nn

from spo_kernels import fused_spo_loss
from spo_kernels.extras.bilevel import bilevel_value
from spo_kernels.losses import SPO


class Loop(nn.Module):
    """What a training loop of one's own may have: an embedding, dropout, batch statistics and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)

    def hidden(self, tokens):
        states = self.dropout(self.embedding(tokens))
        return self.norm(states.transpose(1, 2)).transpose(1, 2)

    def nll(self, tokens):
        logp = self.head(self.hidden(tokens)).log_softmax(-1)
        return -logp[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].mean(-1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Loop().double()


TOKENS = torch.arange(15).view(3, 5) % 11


def sgd_values(model, steps, rate):
    """The same by torch.optim on a copy."""
    twin = Loop().double()
    twin.load_state_dict(model.state_dict())
    twin.eval()
    optimizer = torch.optim.SGD(twin.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        twin.nll(TOKENS).mean().backward()
        optimizer.step()
    return twin.nll(TOKENS).detach()


@pytest.mark.parametrize("steps", [1, 4])
def test_value_is_that_of_plain_sgd(model, steps):
    found = bilevel_value(model, model.nll, TOKENS, learning_rate=0.3, steps=steps)
    assert not found.requires_grad and found.shape == (3,)
    torch.testing.assert_close(found, sgd_values(model, steps, 0.3), rtol=1e-12, atol=1e-12)
    assert found.mean() < model.eval().nll(TOKENS).mean() - 1e-2


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(model, fails):
    """Weights, buffers, .grad, modes and random state, bit for bit; also after an error in the second step."""
    model.train()
    model.head.eval()
    model.nll(TOKENS).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    modes, random, calls = [m.training for m in model.modules()], torch.get_rng_state(), []

    def nll(tokens):
        calls.append(torch.rand(()))
        if fails and len(calls) == 2:
            raise RuntimeError("out of memory")
        return model.nll(tokens)

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            bilevel_value(model, nll, TOKENS, learning_rate=0.3, steps=2)
    else:
        first, second = (bilevel_value(model, nll, TOKENS, learning_rate=0.3, steps=2) for _ in range(2))
        assert torch.equal(first, second)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)


def test_gradients_pass_through_the_reduction(model):
    """Half the gradient is half the rate."""
    half = bilevel_value(model, model.nll, TOKENS, learning_rate=0.3, reduce_gradient=lambda gradient: gradient / 2)
    torch.testing.assert_close(half, bilevel_value(model, model.nll, TOKENS, learning_rate=0.15))


def test_frozen_parameters_take_no_step(model):
    model.embedding.requires_grad_(False)
    model.norm.requires_grad_(False)
    found = bilevel_value(model, model.nll, TOKENS, learning_rate=0.3)
    gradient = torch.autograd.grad(model.eval().nll(TOKENS).mean(), model.head.weight)[0]
    with torch.no_grad():
        model.head.weight -= 0.3 * gradient
    torch.testing.assert_close(found, model.nll(TOKENS).detach())


def test_into_the_loss(model):
    """The hinge is active by what the step gained."""
    value = bilevel_value(model, model.nll, TOKENS[:1], learning_rate=0.3)
    labels, states = TOKENS[:2].clone(), model.eval().hidden(TOKENS[:2])
    losses = [
        fused_spo_loss(
            states, model.head.weight, labels, loss=objective, ref_logps=torch.zeros(2), shift=True, **options
        )[0]
        for objective, options in (
            (SPO(weight=2.0, penalty="hinge", value="input"), {"pair_inputs": {"spo_value": value}}),
            (SPO(weight=0.0), {}),
        )
    ]
    gained = model.nll(TOKENS[:1])[0] - value[0]
    # linear_logprob's log-probabilities are float32's
    torch.testing.assert_close(losses[0] - losses[1], 2.0 * gained, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_bad_arguments(model):
    for options, message in (
        ({"learning_rate": 0}, "learning_rate must be a positive number, got 0"),
        ({"learning_rate": 0.1, "steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"learning_rate": 0.1, "steps": True}, "steps must be a whole number of at least 1, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            bilevel_value(model, model.nll, TOKENS, **options)
    with pytest.raises(ValueError, match=r"nll must give one value per pair, \[B\]; got \[\]"):
        bilevel_value(model, lambda tokens: model.nll(tokens).mean(), TOKENS, learning_rate=0.1)
    with pytest.raises(ValueError, match="requires_grad, got none"):
        bilevel_value(model.requires_grad_(False), model.nll, TOKENS, learning_rate=0.1)
