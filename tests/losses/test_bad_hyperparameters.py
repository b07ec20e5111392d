"""Bad hyperparameters: one error per mistake, when the objective is made, naming the hyperparameter."""

import re

import pytest

from spo_kernels.losses import DPO, SPO, build_loss

NAN = float("nan")
WRONG = (TypeError, ValueError)  # where the specification leaves the choice open

OBJECTIVES = {
    "beta-zero": (DPO, dict(beta=0.0), ValueError, ["beta", r"0\.0"]),
    "beta-negative": (DPO, dict(beta=-0.1), ValueError, ["beta", r"-0\.1"]),
    "beta-nan": (DPO, dict(beta=NAN), ValueError, ["beta", "nan"]),
    "beta-infinite": (DPO, dict(beta=float("inf")), ValueError, ["beta", "inf"]),
    "beta-string": (DPO, dict(beta="0.1"), WRONG, ["beta"]),
    "penalty": (SPO, dict(penalty="square"), ValueError, ["penalty", "square", "nll", "hinge"]),
    "value": (SPO, dict(value="policy"), ValueError, ["value", "policy", "reference", "input"]),
    "normalization": (SPO, dict(normalization="max"), ValueError, ["normalization", "max", "mean", "sum"]),
    "weight-negative": (SPO, dict(weight=-1.0), ValueError, ["weight", r"-1\.0"]),
    "weight-nan": (SPO, dict(weight=NAN), ValueError, ["weight", "nan"]),
    "epsilon-nan": (SPO, dict(epsilon=NAN), ValueError, ["epsilon", "nan"]),
    "base-not-callable": (SPO, dict(base=3), TypeError, ["base", r"int|\b3\b"]),
    "name": (build_loss, dict(name="orpo9"), ValueError, ["orpo9", r"\bdpo\b", r"\bspo\b"]),
    "field": (build_loss, dict(name="dpo", gamma=1.0), ValueError, ["gamma", "beta", "reference_free"]),
    "field-of-spo": (build_loss, dict(name="spo", gamma=1.0), ValueError, ["gamma", "penalty", "epsilon"]),
    "base-name": (build_loss, dict(name="spo", base="orpo9"), ValueError, ["orpo9", r"\bdpo\b"]),
    "bad-field": (build_loss, dict(name="dpo", beta=-1.0), ValueError, ["beta", r"-1\.0"]),
}


@pytest.mark.parametrize(("make", "arguments", "error", "patterns"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives(make, arguments, error, patterns):
    with pytest.raises(error) as caught:
        make(**arguments)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), f"{pattern!r} is not in: {caught.value}"
