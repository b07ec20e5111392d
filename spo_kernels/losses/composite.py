"""Objectives made of other objectives."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from spo_kernels.losses.pairs import (
    Coupling,
    Objective,
    PairLogps,
    coupling_of,
    implicit_rewards,
    token_outputs_of,
    token_subsets_of,
)

_ORDER: tuple[Coupling, ...] = ("margin", "sequence", "pair", "batch")


class Composite:
    """What an objective takes over from its parts: the first one's β and rewards, and everyone's token outputs and
    statistics.
    """

    own_token_outputs: ClassVar[tuple[str, ...]] = ()

    def parts(self) -> tuple[Objective, ...]:
        """The objectives that it is made of."""
        raise NotImplementedError

    @property
    def beta(self) -> float:
        """The first part's β, 1 where it has none."""
        return getattr(self.parts()[0], "beta", 1.0)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """The first part's, which are logged."""
        return implicit_rewards(self.parts()[0], pairs)

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """What it and the parts need of every token, each once."""
        parts = (name for part in self.parts() for name in token_outputs_of(part))
        return tuple(dict.fromkeys((*self.own_token_outputs, *parts)))

    @property
    def token_subsets(self) -> tuple[float, float] | None:
        """The shares that the first part with pilots wants drawn; all parts see these pilots."""
        return next((found for part in self.parts() if (found := token_subsets_of(part)) is not None), None)

    def state_dict(self) -> dict[str, Tensor]:
        """The parts' running statistics, "0.mean" for the first one's "mean"; empty where they have none."""
        return {
            f"{number}.{name}": value
            for number, part in enumerate(self.parts())
            if hasattr(part, "state_dict")
            for name, value in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave; ValueError for other names."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"state has {sorted(state)}, expected {sorted(self.state_dict())}")
        for number, part in enumerate(self.parts()):
            if hasattr(part, "load_state_dict"):
                prefix = f"{number}."
                part.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def widest_coupling(parts: tuple[Objective, ...]) -> Coupling:
    """What a sum of the parts depends on. A margin and a sequence's own term together take both log-probabilities."""
    found = {coupling_of(part) for part in parts}
    return "pair" if found == {"margin", "sequence"} else max(found, key=_ORDER.index)


def check_objective(name: str, value: object) -> None:
    """Raise TypeError unless `value` can be called on `PairLogps`."""
    if not callable(value) or isinstance(value, type):
        made = f"; build_loss({value!r}) makes one" if isinstance(value, str) else ""
        raise TypeError(f"{name} must be an objective (a callable), got {value!r}{made}")
