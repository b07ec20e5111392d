"""Every public function as a call whose tensor arguments can be replaced by name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spo_kernels import LMHead, fused_spo_loss, linear_kl, linear_logprob, sequence_logps
from spo_kernels.losses import DPO, SPO

SEQUENCES, LENGTH, WIDTH, VOCAB = 4, 3, 8, 19
Arguments = dict[str, Tensor]
VALUE = "pair_inputs['spo_value']"
HINGE = SPO(DPO(), penalty="hinge", value="input")
# Each way through `fused_spo_loss`: its options, and which arguments it has beside hidden, head and labels.
REFERENCE = ("ref_hidden", "ref_head", "token_weights", "ref_token_weights")
WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "two_pass": ({"loss": "dpo", "path": "two_pass"}, ("ref_logps", "token_weights")),
    "packed": ({"loss": "dpo", "path": "packed"}, ("ref_logps", "token_weights")),
    "factorised": ({"loss": "dpo", "path": "factorised"}, ("ref_logps", "token_weights")),
    "certified": ({"loss": "dpo", "sparsity": "certified"}, ("ref_logps",)),
    "reference": ({"loss": HINGE}, (*REFERENCE, VALUE)),
    "kl": ({"loss": "tdpo"}, ("ref_hidden", "ref_head")),
}


@dataclass(frozen=True)
class Door:
    """One public function, with arguments by the names that its messages give them."""

    name: str
    arguments: Arguments
    call: Callable[[Arguments], Tensor]

    def fresh(self) -> Arguments:
        """The arguments as new leaves."""
        return {name: value.detach().requires_grad_(value.requires_grad) for name, value in self.arguments.items()}

    def run(self, given: Arguments) -> Tensor:
        """The result, and its backward where it has one."""
        result = self.call(given)
        if result.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(result):
            result.sum().backward()
        return result.detach()


def all_doors(backend: str) -> Iterator[Door]:
    """Each function, each way of the loss; padded with an `LMHead`, packed with a plain weight."""
    for packed in (False, True):
        everything = make_arguments(packed)
        layout = "packed" if packed else "padded"
        options = {"backend": backend}
        needed: dict[str, tuple[partial[Tensor], tuple[str, ...]]] = {
            "linear_logprob": (partial(_logprob, options), ()),
            "sequence_logps": (partial(_sequences, options), ("token_weights",)),
            "linear_kl": (partial(_kl, options), ("ref_hidden", "ref_head")),
        }
        for way, (chosen, names) in WAYS.items():
            needed[f"fused_spo_loss {way}"] = (partial(_loss, options | chosen), names)
        for name, (call, names) in needed.items():
            wanted = ("hidden", "head", "labels", *names)
            wanted = (*wanted, "cu_seqlens") if packed and name.split()[0] in _OF_SEQUENCES else wanted
            chosen_arguments = {key: v for key, v in everything.items() if key.split(".")[0] in wanted}
            yield Door(f"{name}, {backend}, {layout}", chosen_arguments, call)
        frozen = everything["head" if packed else "head.weight"].detach()
        call = partial(_loss, options | {"loss": "dpo"})
        names = ("hidden", "labels", "ref_logps", *(("cu_seqlens",) if packed else ()))
        arguments = {key: everything[key] for key in names} | {"head" if packed else "head.weight": frozen}
        yield Door(f"fused_spo_loss frozen, {backend}, {layout}", arguments, call)


_OF_SEQUENCES = ("sequence_logps", "fused_spo_loss")


def make_arguments(packed: bool) -> Arguments:
    """Every argument of any function, small."""
    torch.manual_seed(0)
    pairs = SEQUENCES // 2
    tokens = (SEQUENCES * LENGTH,) if packed else (SEQUENCES, LENGTH)
    labels = torch.randint(1, VOCAB, tokens)
    weight, bias = torch.randn(VOCAB, WIDTH), torch.randn(VOCAB)
    made = {
        "hidden": torch.randn(*tokens, WIDTH).requires_grad_(),
        "labels": labels,
        "ref_hidden": torch.randn(*tokens, WIDTH),
        "ref_logps": torch.randn(SEQUENCES) - 9.0,
        "token_weights": torch.rand(tokens) + 0.5,
        "ref_token_weights": torch.rand(tokens) + 0.5,
        VALUE: torch.rand(pairs),
        "cu_seqlens": torch.arange(0, SEQUENCES * LENGTH + 1, LENGTH),
    }
    if packed:
        return made | {"head": weight.requires_grad_(), "ref_head": weight.detach() + 0.1}
    heads = {"head.weight": weight.requires_grad_(), "head.bias": bias.requires_grad_()}
    return made | heads | {"ref_head.weight": weight.detach() + 0.1, "ref_head.bias": bias.detach() + 0.1}


def _head(given: Arguments, name: str) -> Tensor | LMHead:
    return given[name] if name in given else LMHead(given[f"{name}.weight"], given.get(f"{name}.bias"))


def _logprob(options: dict[str, Any], given: Arguments) -> Tensor:
    logp = linear_logprob(given["hidden"], _head(given, "head"), given["labels"], **options)
    assert isinstance(logp, Tensor)
    return logp


def _sequences(options: dict[str, Any], given: Arguments) -> Tensor:
    rest = {name: given[name] for name in ("cu_seqlens", "token_weights") if name in given}
    return sequence_logps(given["hidden"], _head(given, "head"), given["labels"], **rest, **options)


def _kl(options: dict[str, Any], given: Arguments) -> Tensor:
    heads = _head(given, "head"), _head(given, "ref_head")
    return linear_kl(given["hidden"], heads[0], given["ref_hidden"], heads[1], given["labels"], **options)


def _loss(options: dict[str, Any], given: Arguments) -> Tensor:
    names = ("ref_logps", "ref_hidden", "token_weights", "ref_token_weights", "cu_seqlens")
    rest: dict[str, Any] = {name: given[name] for name in names if name in given}
    if "ref_hidden" in given:
        rest["ref_head"] = _head(given, "ref_head")
    if VALUE in given:
        rest["pair_inputs"] = {"spo_value": given[VALUE]}
    return fused_spo_loss(given["hidden"], _head(given, "head"), given["labels"], **rest, **options)[0]
