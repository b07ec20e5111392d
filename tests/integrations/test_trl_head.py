"""Every output and gradient of TRL's fused head, from its own function and from the one that replaces it."""

import dataclasses

import pytest
import torch

from spo_kernels.integrations.trl_head import OPTIONAL_OUTPUTS, FusedHead

TOKENS, VOCAB, HIDDEN, CHUNK = 41, 301, 24, 128
OUTPUTS = ("log_probs", *OPTIONAL_OUTPUTS)
INPUTS = ("hidden", "weight", "bias")


@dataclasses.dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.float32
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    trained: tuple[str, ...] = INPUTS
    entropy_grad: bool = True
    tokens: int = TOKENS

    def inputs(self):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype)

        made = {"hidden": normal(self.tokens, HIDDEN), "weight": normal(VOCAB, HIDDEN) / 2}
        if self.bias:
            made["bias"] = normal(VOCAB)
        targets = torch.randint(VOCAB, (self.tokens,), generator=generator)
        targets[::3] = (made["hidden"] @ made["weight"].T + made.get("bias", 0))[::3].argmax(-1)
        upstream = torch.randn((2, self.tokens), generator=generator)
        return made, targets, upstream

    def leaves(self, made, dtype=None):
        return {
            name: tensor.to(dtype or tensor.dtype).detach().clone().requires_grad_(name in self.trained)
            for name, tensor in made.items()
        }


def finish(case, leaves, values, upstream):
    """Outputs and gradients by name."""
    loss = (values["log_probs"] * upstream[0]).sum()
    if case.entropy_grad:
        loss = loss + (values["entropy"] * upstream[1]).sum()
    loss.backward()
    grads = {f"{name}.grad": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {name: value.detach() for name, value in values.items()} | grads


def through(function, case):
    made, targets, upstream = case.inputs()
    leaves = case.leaves(made)
    found = function.apply(
        leaves["hidden"],
        leaves["weight"],
        leaves.get("bias"),
        targets,
        case.temperature,
        CHUNK,
        case.softcap,
        case.scale,
        OUTPUTS,
    )
    return finish(case, leaves, dict(zip(OUTPUTS, found, strict=True)), upstream)


def exact(case):
    """In float64, with the logits, from the inputs as they were rounded; and the size of the logits."""
    made, targets, upstream = case.inputs()
    leaves = case.leaves(made, torch.float64)
    logits = case.scale * (leaves["hidden"] @ leaves["weight"].T + leaves.get("bias", 0))
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    logits = logits / case.temperature
    log_probs = logits.log_softmax(-1)
    values = {
        "log_probs": log_probs.gather(-1, targets[:, None])[:, 0],
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "log_sum_sq_probs": (2 * log_probs).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }
    return finish(case, leaves, values, upstream), logits.abs().amax().item()


CASES = {
    "plain": Case(),
    "everything": Case(bias=True, softcap=3.0, scale=0.7, temperature=0.6),
    "no softcap": Case(bias=True, scale=0.25, temperature=1.7),
    "frozen head": Case(bias=True, trained=("hidden",)),
    "frozen head, log-probs only": Case(bias=True, trained=("hidden",), entropy_grad=False),
    "trained head only": Case(trained=("weight",)),
    "trained bias only": Case(bias=True, trained=("bias",)),
    "log-probs only": Case(softcap=3.0, entropy_grad=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_at_least_as_near_to_float64_as_trl(trl_utils, name, dtype):
    case = dataclasses.replace(CASES[name], dtype=dtype)
    ours, trls = through(FusedHead, case), through(trl_utils._ChunkedLogProbFunction, case)
    expected, size = exact(case)
    assert ours.keys() == trls.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key].dtype == trls[key].dtype, key
        if key == "is_top1":
            assert torch.equal(ours[key], value) and value.any()
            continue
        error, of_trl = ((found[key].double() - value).abs().max().item() for found in (ours, trls))
        if key.endswith(".grad"):
            # beside TRL's: a gradient is rounded once, and its terms follow the rounding of a float32 logit
            floor = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * (1 + size)
            assert error <= 2 * of_trl + floor * value.abs().max().item(), key
        else:
            # float32 logits from half precision too
            assert error <= 16 * torch.finfo(torch.float32).eps * (1 + size), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(trl_utils, dtype):
    """Hidden states of either dtype beside float32 weights: computed in bfloat16, gradients in each one's dtype."""
    made, targets, upstream = Case(bias=True).inputs()
    results = []
    for function in (FusedHead, trl_utils._ChunkedLogProbFunction):
        leaves = Case().leaves(made | {"hidden": made["hidden"].to(dtype)})
        with torch.autocast("cpu", torch.bfloat16):
            found = function.apply(*leaves.values(), targets, 0.7, CHUNK, None, 1.0, OUTPUTS)
        results.append(finish(Case(), leaves, dict(zip(OUTPUTS, found, strict=True)), upstream))
    ours, trls = results
    for key, value in trls.items():
        assert ours[key].dtype == value.dtype, key
        if key != "is_top1":
            # TRL rounds logits up to 16 to bfloat16: half of 2^-5
            torch.testing.assert_close(ours[key], value, rtol=0.02, atol=0.02 * value.abs().max().item(), msg=key)


def test_float32_hidden_states_beside_a_half_precision_head(trl_utils):
    """As with `cast_lm_head_to_fp32`, which leaves the weight as it is."""
    made, targets, upstream = Case(dtype=torch.bfloat16, bias=True).inputs()
    results = []
    for function in (FusedHead, trl_utils._ChunkedLogProbFunction):
        leaves = Case().leaves(made | {"hidden": made["hidden"].float()})
        found = function.apply(*leaves.values(), targets, 0.7, CHUNK, None, 1.0, OUTPUTS)
        results.append(finish(Case(), leaves, dict(zip(OUTPUTS, found, strict=True)), upstream))
    ours, trls = results
    for key, value in trls.items():
        assert ours[key].dtype == value.dtype, key
        half = value.dtype == torch.bfloat16
        torch.testing.assert_close(ours[key], value, rtol=2**-7 if half else 1e-4, atol=1e-4, msg=key)


def test_no_tokens(trl_utils):
    """Zero gradients, not missing ones: other processes may wait for them."""
    ours, trls = (through(f, Case(bias=True, tokens=0)) for f in (FusedHead, trl_utils._ChunkedLogProbFunction))
    for key, value in trls.items():
        assert torch.equal(ours[key], value), key
        assert ours[key].dtype == value.dtype, key


@pytest.mark.parametrize("wanted", [(), ("log_probs",), ("entropy",), ("mean_logits", "is_top1")], ids=str)
def test_outputs_that_were_not_asked_for_are_none(wanted):
    made, targets, _ = Case().inputs()
    found = FusedHead.apply(made["hidden"], made["weight"], None, targets, 1.0, CHUNK, outputs=wanted)
    assert [name for name, value in zip(OUTPUTS, found, strict=True) if value is not None] == [
        name for name in OUTPUTS if name in ("log_probs", *wanted)
    ]


def test_gradients_flow_where_trl_lets_them(trl_utils):
    made, targets, _ = Case().inputs()
    results = []
    for function in (FusedHead, trl_utils._ChunkedLogProbFunction):
        leaves = Case().leaves(made)
        found = function.apply(leaves["hidden"], leaves["weight"], None, targets, 1.0, CHUNK, None, 1.0, OUTPUTS)
        results.append([value.requires_grad for value in found])
    assert results == [[True, True, False, False, False]] * 2


def test_partitioned_head_is_refused():
    made, targets, _ = Case().inputs()
    made["weight"].ds_id = 0  # as DeepSpeed marks its parameters
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        FusedHead.apply(made["hidden"], made["weight"], None, targets, 1.0, CHUNK)
