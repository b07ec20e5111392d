"""Numbers and flags of `LMHead` and `LoRA`: a wrong one is named where the value is made."""

import pytest
import torch

from spo_kernels import LMHead, LoRA, linear_logprob

A, B, WEIGHT = torch.zeros(2, 8), torch.zeros(11, 2), torch.zeros(11, 8)
NOT_FINITE = {
    "nan": (float("nan"), "nan"),
    "infinite": (float("inf"), "inf"),
    "string": ("1", "'1'"),
    "none": (None, "None"),
    "flag": (True, "True"),
}


@pytest.mark.parametrize(("value", "came"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_scales_are_finite_numbers(value, came):
    with pytest.raises(ValueError, match=f"logit_scale must be a finite number, got {came}"):
        LMHead(WEIGHT, logit_scale=value)
    with pytest.raises(ValueError, match=f"^scale must be a finite number, got {came}"):
        LoRA(A, B, scale=value)


@pytest.mark.parametrize("value", [0.0, -30.0, float("nan"), float("inf"), 1e-40, "30"], ids=str)
def test_a_softcap_is_a_positive_number(value):
    with pytest.raises(ValueError, match=f"logit_softcap must be a number of at least 1e-30 or None, got {value!r}"):
        LMHead(WEIGHT, logit_softcap=value)


@pytest.mark.parametrize("part", ["a", "b"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_adapters_are_floating_point(part, dtype):
    parts = {"a": A, "b": B}
    head = LMHead(WEIGHT, lora=(LoRA(**{**parts, part: parts[part].to(dtype)}),))
    hidden = torch.zeros(2, WEIGHT.shape[1])
    with pytest.raises(TypeError, match=rf"head.lora\[0\].{part} must be one of float32, .*, got {dtype}"):
        linear_logprob(hidden, head, torch.zeros(2, dtype=torch.int64))


def test_the_rest():
    with pytest.raises(TypeError, match="lora must be a tuple of LoRA, got LoRA"):
        LMHead(WEIGHT, lora=LoRA(A, B))
    with pytest.raises(TypeError, match="accumulate must be True or False, got 'no'"):
        LMHead(WEIGHT, accumulate="no")
    with pytest.raises(TypeError, match=r"dropout must be a function or module of hidden states, or None, got 0\.1"):
        LoRA(A, B, dropout=0.1)
