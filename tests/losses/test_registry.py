"""Objectives by name: what can be built, what is refused, what is needed, and what compiles."""

import dataclasses
import json
import math

import pytest
import torch

from spo_kernels import fused_spo_loss
from spo_kernels.losses import (
    DPO,
    IPO,
    LOSSES,
    SFT,
    SPO,
    BalancedDPO,
    DrDPO,
    FDivergence,
    UncertaintyDPO,
    WeightedSum,
    build_loss,
    implicit_rewards,
    named_loss,
    needs_inputs,
    needs_reference,
)
from spo_kernels.testing import random_batch
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.config_checks import checked
from spo_kernels.train.objective import build_objective

from .cases import CASES
from .points import INPUTS, as_pairs, differentiate, random_points

STATEFUL = {"alpha_dpo_code", "bco", "beta_dpo", "dpo_shift_linear"}
NO_REFERENCE = {"alphapo", "cpo", "orpo", "sft", "simpo", "slic"}
FIELDS = [(name, field) for name, loss in LOSSES.items() for field in dataclasses.fields(loss) if field.init]
each_name = pytest.mark.parametrize("name", sorted(LOSSES))


def test_build():
    assert build_loss("dpo") == DPO() and build_loss("dpo", beta=0.3) == DPO(beta=0.3)
    assert build_loss("spo") == SPO()
    built = build_loss("spo", base="dpo", beta=0.3, weight=0.5, penalty="hinge", epsilon=0.1)
    assert built == SPO(DPO(beta=0.3), weight=0.5, penalty="hinge", epsilon=0.1)
    assert build_loss("spo", base=DPO(beta=0.2)) == SPO(DPO(beta=0.2))


def test_hyperparameters_find_their_objective():
    assert build_loss("spo", base="simpo", gamma=0.3, weight=2.0).base.gamma == 0.3
    both = build_loss("spo", base="ipo", normalization="sum", **{"base.normalization": "mean"})
    assert (both.normalization, both.base.normalization) == ("sum", "mean")
    nested = build_loss("spo", base="f_divergence", divergence="js_divergence", beta=0.3, **{"base.base": "ipo"})
    assert nested == SPO(FDivergence(IPO(beta=0.3), divergence="js_divergence"))
    assert build_loss("dr_dpo", beta=0.5, beta_prime=2) == DrDPO(DPO(beta=0.5), 2)
    total = build_loss("mpo", objectives=["ipo", "sft"], weights=[1, 2], beta=0.3)
    assert total == WeightedSum((IPO(beta=0.3), SFT()), (1, 2))
    assert build_loss("mpo") == WeightedSum() and build_loss("mpo", beta=0.3).objectives[0] == DPO(beta=0.3)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mpo", {"gama": 1}, r"'mpo' has no hyperparameter gama; it has beta, normalization, objectives"),
        ("spo", {"base": "dr_dpo", "gama": 1}, r"'spo' has no hyperparameter gama; it has .*beta_prime, epsilon"),
        ("spo", {"base": DPO(), "beta": 1}, r"'spo' has no hyperparameter beta"),
        ("mpo", {"weights": [1.0]}, "got 3 objectives and 1 weights"),
        ("mpo", {"objectives": ["dpo", "dpx"], "weights": [1, 1]}, "'dpx' is unknown"),
        ("mpo", {"objectives": 5}, "objectives must be a list or a tuple, got 5"),
        ("mpo", {"objectives": "dpo"}, "objectives must be a list or a tuple, got 'dpo'"),
        ("mpo", {"weights": 0.5}, "weights must be a list or a tuple, got 0.5"),
        ("dpo", {"beta": 10**400}, "beta must be a positive number, got 1000"),
        ("rpo", {"eta": 10**400}, "eta must be a number"),
        ("simpo", {"label_smoothing": 10**400}, r"label_smoothing must be a number in \[0, 0.5\)"),
        ("DPO", {}, r"'DPO' is unknown \(did you mean 'dpo'\?\)"),
        ("simpoo", {}, r"'simpoo' is unknown \(did you mean 'simpo'\?\); expected one of"),
        ("mpo", {"objectives": [], "weights": []}, "at least one"),
        ("alphapo", {"alpha": 0}, "alpha must not be nearer to 0 than 1e-06"),
        ("alphapo", {"alpha": -1e-8}, "alpha must not be nearer to 0 than 1e-06"),
        ("f_divergence", {"base": "bco_pair"}, "base must depend on the difference of two scores only.*got BCOPair"),
        ("discopop", {"tau": 2.0}, r"tau must be a number in \(0, 1\], got 2.0"),
    ],
)
def test_refused(name, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_loss(name, **given)


@pytest.mark.parametrize(
    ("objective", "reward"),
    [
        (build_loss("dpo", beta=0.3), lambda p, q, n: 0.3 * (p - q)),
        (build_loss("simpo", beta=2.5), lambda p, q, n: 2.5 * p / n),
        (build_loss("spo", base="simpo", beta=2.5), lambda p, q, n: 2.5 * p / n),
        (build_loss("dr_dpo", base="simpo", beta=2.5), lambda p, q, n: 2.5 * p / n),
        (build_loss("orpo", beta=0.2), lambda p, q, n: 0.2 * p / n),
        (build_loss("cpo", beta=0.2), lambda p, q, n: 0.2 * p),
        (build_loss("cpo", beta=0.2, form="ipo"), lambda p, q, n: 0.2 * p / n),
        (build_loss("alphapo", alpha=0.5), lambda p, q, n: 2.5 * (1 - (p / n).exp() ** -0.5) / 0.5),
        (lambda pairs: pairs.chosen, lambda p, q, n: p - q),
    ],
    ids=["dpo", "simpo", "spo", "dr_dpo", "orpo", "cpo", "cpo-ipo", "alphapo", "own"],
)
def test_logged_rewards(objective, reward):
    """What TRL's DPOTrainer, CPOTrainer and ORPOTrainer log: rewards are in the units of what a loss compares."""
    pairs = as_pairs(random_points(16))
    pairs = dataclasses.replace(pairs, rejected_lengths=pairs.rejected_lengths.clamp_min(1))
    found = implicit_rewards(objective, pairs)
    chosen = reward(pairs.chosen, pairs.ref_chosen, pairs.chosen_lengths)
    rejected = reward(pairs.rejected, pairs.ref_rejected, pairs.rejected_lengths)
    torch.testing.assert_close(found, (chosen.detach(), rejected.detach()), rtol=1e-12, atol=0)
    assert not found[0].requires_grad


@pytest.mark.parametrize(("name", "field"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_every_hyperparameter_is_validated(name, field):
    """One error, which names the hyperparameter and what came."""
    default = getattr(build_loss(name), field.name)
    wrong = {
        bool: ["yes", 1],
        str: ["unheard-of"],
        int: [-1, 0.5, True],
        float: [math.nan, "0.1", None, -11.0],
        tuple: [(math.nan,), (DPO,)],
    }
    for value in wrong.get(type(default), [3, DPO]):
        with pytest.raises((ValueError, TypeError)) as caught:
            LOSSES[name](**{field.name: value})
        assert field.name in str(caught.value)


@each_name
def test_objectives_are_frozen_and_documented(name):
    objective = build_loss(name)
    assert len(LOSSES[name].__doc__) > 60 and objective.__call__.__doc__
    field = dataclasses.fields(objective)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(objective, field, 1.0)


@pytest.mark.parametrize("name", ["spo", "h_dpo", "uncertainty_dpo", "ada_dpo"])
def test_reconstructions_say_so(name):
    text = " ".join(LOSSES[name].__doc__.lower().split())
    assert "reconstruction" in text
    assert "not verified against the paper" in text or "was not read" in text


def test_inference_says_so():
    assert "Inference, not the paper's" in BalancedDPO.__doc__


@pytest.mark.parametrize("row", CASES)
def test_every_form_from_the_command_line(row):
    """--loss NAME --loss-arg KEY=VALUE builds what Python builds."""
    given = {key: str(json.dumps(value)) for key, value in CASES[row].hyperparameters.items()}
    loss_arg = tuple(f"{key}={value}" for key, value in given.items())
    options = {"loss": CASES[row].name, "loss_arg": loss_arg, "reference": "online"}
    config = checked(TrainConfig(model="m", dataset="d", output_dir="o", **options))
    assert build_objective(config) == build_loss(CASES[row].name, **CASES[row].hyperparameters)


# ---- inside SPO


@each_name
def test_spo_around_every_objective(name):
    """The base's losses and coefficients plus the penalty's, and a coupling no narrower than the base's."""
    points = random_points(8)
    pairs, base = as_pairs(points), build_loss(name)
    losses, g_w, g_l = differentiate(build_loss(name), as_pairs(points))
    wrapped = SPO(base, weight=0.5)
    found = differentiate(wrapped, pairs)
    nll, per_token = -pairs.chosen.detach() / pairs.chosen_lengths, 1 / pairs.chosen_lengths
    for value, wanted in zip(found, (losses + 0.5 * nll, g_w - 0.5 * per_token, g_l), strict=True):
        torch.testing.assert_close(value, wanted)
    assert wrapped.coupling == {"margin": "pair"}.get(base.coupling, base.coupling)
    assert needs_inputs(wrapped) == needs_inputs(base)
    hinged = SPO(base, penalty="hinge", value="input")
    assert differentiate(hinged, pairs)[0].isfinite().all()


# ---- needs


@each_name
def test_needs_reference(name):
    objective = build_loss(name)
    assert needs_reference(objective) == (name not in NO_REFERENCE)
    bare = dataclasses.replace(as_pairs(random_points(4)), ref_chosen=None, ref_rejected=None)
    if name in NO_REFERENCE:
        assert objective(bare).isfinite().all()
    else:
        with pytest.raises(ValueError, match="needs a reference: pass ref_logps"):
            objective(bare)


def test_needs_of_forms_and_of_others():
    assert not needs_reference(build_loss("dpo", reference_free=True))
    assert not needs_reference(build_loss("rso", form="hinge"))
    assert not needs_reference(SPO(build_loss("simpo")))
    assert needs_reference(SPO(build_loss("simpo"), penalty="hinge"))
    assert not needs_reference(SPO(build_loss("simpo"), penalty="hinge", value="input"))
    assert not needs_reference(lambda pairs: pairs.chosen) and needs_reference(lambda p: p.chosen - p.ref_chosen)

    class Declared:
        needs_reference = True
        needs_inputs = ("rating",)

        def __call__(self, pairs):
            raise AssertionError("asked, not tried")

    assert needs_reference(Declared()) and needs_inputs(Declared()) == ("rating",)


def test_needs_inputs():
    found = {name: needs_inputs(build_loss(case.name, **case.hyperparameters)) for name, case in CASES.items()}
    assert {name for name, inputs in found.items() if inputs} == {
        "balanced_dpo-input",
        "kto-input",
        "kto-mismatched",
        "odpo",
        "sgdpo",
        "sgdpo-smooth",
        "spo-hinge-input",
        "sppo-input",
        "uncertainty_dpo",
        "uncertainty_dpo-multiplicative",
    }
    assert set().union(*found.values()) <= set(INPUTS)
    assert needs_inputs(SPO(build_loss("odpo"))) == ("offset",)
    assert needs_inputs(SPO(build_loss("odpo"), penalty="hinge", value="input")) == ("spo_value", "offset")


@pytest.mark.parametrize("row", ["odpo", "balanced_dpo-input", "kto-input", "sppo-input", "uncertainty_dpo"])
def test_a_missing_input_is_named(row):
    objective = build_loss(CASES[row].name, **CASES[row].hyperparameters)
    pairs = dataclasses.replace(as_pairs(random_points(3)), inputs={})
    name = needs_inputs(objective)[0]
    with pytest.raises(ValueError, match=rf"{type(objective).__name__} needs pair_inputs\['{name}'\]"):
        objective(pairs)


def test_uncertainty_attenuates():
    """The point of the penalty: an uncertain chosen response, or pair, gets a smaller gradient."""
    for penalty, name in (("additive", "chosen_uncertainty"), ("multiplicative", "uncertainty")):
        sizes = []
        for uncertainty in (0.0, 2.0):
            pairs = as_pairs(random_points(3))
            inputs = {"rejected_uncertainty": torch.zeros(3), name: torch.full((3,), uncertainty).double()}
            # at margins near 0, where a smaller multiplier does not also move the logit
            pairs = dataclasses.replace(pairs, inputs=inputs, ref_chosen=pairs.chosen.detach())
            pairs = dataclasses.replace(pairs, ref_rejected=pairs.rejected.detach())
            UncertaintyDPO(penalty=penalty)(pairs).sum().backward()
            sizes.append(pairs.chosen.grad.abs())
        assert (sizes[1] < sizes[0]).all()


# ---- by name


@each_name
def test_named(name):
    if name in STATEFUL:
        with pytest.raises(ValueError, match=rf"{name}.*running statistics.*build_loss"):
            named_loss(name)
    else:
        assert named_loss(name) == build_loss(name) and named_loss(name) is named_loss(name)


def compiled(step):
    torch._dynamo.reset()
    return torch.compile(step, backend="eager", fullgraph=True)


@each_name
def test_compiles_as_one_graph(name):
    """The objective itself; fresh for each call, since some have running statistics."""
    pairs = as_pairs(random_points(4))
    wanted = differentiate(build_loss(name), pairs)
    for found, value in zip(differentiate(compiled(build_loss(name)), pairs), wanted, strict=True):
        torch.testing.assert_close(found, value)


# one of each coupling, without a reference, with one, of several objectives, over tokens, and with statistics
THROUGH_THE_HEAD = ["aot", "apo_zero", "dpo", "mpo", "simpo", "spo", sorted(STATEFUL)[0]]


@pytest.mark.parametrize("name", THROUGH_THE_HEAD)
def test_the_fused_loss_compiles_as_one_graph(name):
    """By name, or as an object where it has running statistics."""
    batch = random_batch((4, 6), 17, 8, ignored=0.2)
    reference = random_batch((4, 6), 17, 8, seed=1)
    options = {"ref_hidden": reference.hidden, "ref_head": reference.weight}

    def run(wrap, loss):
        hidden = batch.hidden.clone().requires_grad_()
        step = wrap(lambda h: fused_spo_loss(h, batch.weight, batch.labels, loss=loss, **options)[0])
        result = step(hidden)
        result.backward()
        return result.detach(), hidden.grad

    by_name = name not in STATEFUL
    found = run(compiled, name if by_name else build_loss(name))
    for value, wanted in zip(found, run(lambda step: step, name if by_name else build_loss(name)), strict=True):
        torch.testing.assert_close(value, wanted)
