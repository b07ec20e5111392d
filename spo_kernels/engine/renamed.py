"""Arguments that earlier versions took: each is answered with the new way."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_NEW_WAYS = {
    "weight": "head=weight, or head=LMHead(weight, ...)",
    "bias": "head=LMHead(weight, bias)",
    "logit_scale": "head=LMHead(weight, logit_scale=...)",
    "logit_softcap": "head=LMHead(weight, logit_softcap=...)",
    "ref_weight": "ref_head=ref_weight, or ref_head=LMHead(ref_weight, ...)",
    "ref_bias": "ref_head=LMHead(ref_weight, ref_bias)",
    "spo_value": 'pair_inputs={"spo_value": values}',
    "beta": "a loss with its hyperparameters, such as loss=DPO(beta=0.2)",
}


def refuses_old_names(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which answers an argument of an earlier version with a TypeError that names the new way."""
    old = {name: way for name, way in _NEW_WAYS.items() if name not in signature(function).parameters}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name in old:
                raise TypeError(f"{function.__name__} takes no {name}=: pass {old[name]}")
        return function(*args, **kwargs)

    return call
