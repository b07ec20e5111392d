"""`FusedDPOConfig`, and the objective that TRL's and our settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from trl import DPOConfig

from spo_kernels.losses import LOSSES, Objective, build_loss
from spo_kernels.losses.divergence import FDivergence
from spo_kernels.losses.needs import needs_inputs
from spo_kernels.losses.reconstructed.spo import SPO_VALUE
from spo_kernels.losses.weighted_sum import WeightedSum
from spo_kernels.losses.wpo import WPO

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
# settings that are hyperparameters of `loss_type`, by the names that our objectives have for them
_OF_LOSS_TYPE = {
    "loss_type": None,
    "loss_weights": None,
    "f_divergence_type": None,
    "f_alpha_divergence_coef": None,
    "beta": "beta",
    "label_smoothing": "label_smoothing",
    "discopop_tau": "tau",
}


@dataclass
class FusedDPOConfig(DPOConfig):
    """TRL's `DPOConfig` and the settings of the fused loss.

    Attributes:
        objective: A name in `spo_kernels.losses.LOSSES`, or an objective such as `SPO(DPO(beta=0.2))`; it takes the
            place of `loss_type`, `beta` and TRL's other hyperparameters of losses.
        objective_args: Hyperparameters of an objective by name, as in `build_loss`; JSON on a command line.
        spo_inner_steps: K of SPO's lower level for `SPO(penalty="hinge", value="input")`; 0 for none. See
            `spo_kernels.extras.bilevel`.
        spo_inner_lr: η of these steps, > 0.
        layout: How a padded batch of pairs is computed: "auto", "padded", "packed" or "shared", see
            `FusedPreferenceModel` and docs/packing.md.
        tokens_per_batch: Tokens in one forward of the training at most, counted as `TokenBudget` does: a device's batch
            is computed in as many forwards as that takes, with the gradient of the whole. None for one forward; on a
            CPU for 1024 tokens, unless the loss depends on a forward's pairs.
        sparsity: "exact", "certified" or "unbiased", see `spo_kernels.Sparsity`.
        workspace_mib: Memory for temporaries of the loss in MiB; None for the library's default.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (an instance's to mypy: TRL declares it so)
        *DPOConfig._VALID_DICT_FIELDS,
        "objective_args",
    ]

    # the type that command lines see: an instance cannot be written there
    objective: str | None = field(
        default=None, metadata={"help": f"Objective in the place of loss_type: {', '.join(sorted(LOSSES))}."}
    )
    objective_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyperparameters of the objective, as a JSON object."}
    )
    spo_inner_steps: int = field(default=0, metadata={"help": "SGD steps of SPO's lower level; 0 for none."})
    spo_inner_lr: float | None = field(default=None, metadata={"help": "Learning rate of these steps."})
    layout: str = field(
        default="auto", metadata={"help": "Rows of the backbone: 'auto', 'padded', 'packed' or 'shared'."}
    )
    tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Tokens in one forward at most; a batch takes as many forwards as it needs."}
    )
    sparsity: str = field(
        default="exact", metadata={"help": "Backward of the loss: 'exact', 'certified' or 'unbiased'."}
    )
    workspace_mib: int | None = field(default=None, metadata={"help": "Temporaries of the loss, in MiB."})

    def to_dict(self) -> dict[str, Any]:
        """As transformers has it, which makes JSON of it: an objective is written out as its expression."""
        settings: dict[str, Any] = super().to_dict()
        if not isinstance(self.objective, str | None):
            settings["objective"] = repr(self.objective)
        return settings


def objective_of(args: DPOConfig) -> Objective:
    """The objective that the settings ask for; a plain `DPOConfig` has TRL's only.

    Raises:
        ValueError, TypeError: Settings that do not go together, or a value that the objective refuses.
    """
    given = getattr(args, "objective", None)
    hyperparameters = getattr(args, "objective_args", None)
    if hyperparameters is not None and not isinstance(hyperparameters, Mapping):
        raise TypeError(
            f'objective_args must map hyperparameters to values, such as {{"beta": 0.2}}, got {hyperparameters!r}'
        )
    if given is None:
        if hyperparameters:
            raise ValueError(f"objective_args are for an objective by name, got {hyperparameters!r} without objective")
        objective = _of_loss_types(args)
    else:
        _check_not_both(args)
        if isinstance(given, str):
            objective = build_loss(given, **(hyperparameters or {}))
        elif hyperparameters:
            raise ValueError(f"objective_args are for an objective by name; {given!r} has its own")
        elif not callable(given) or isinstance(given, type):
            raise TypeError(f"objective must be a name or an objective, such as DPO(beta=0.1), got {given!r}")
        else:
            objective = given
    _check_inner_steps(args, objective)
    return WPO(objective, clamp=False) if args.use_weighting else objective


def _of_loss_types(args: DPOConfig) -> Objective:
    parts = tuple(_of_loss_type(name, args) for name in args.loss_type)
    weights = tuple(args.loss_weights or [1.0] * len(parts))
    return parts[0] if weights == (1.0,) else WeightedSum(parts, weights)


def _of_loss_type(name: str, args: DPOConfig) -> Objective:
    if name not in LOSS_TYPES:
        raise ValueError(f"loss_type must be of {', '.join(LOSS_TYPES)}; got {name!r}. Others go into objective=")
    own = {setting.name for setting in fields(LOSSES[name])}
    hyperparameters = {ours: getattr(args, trls) for trls, ours in _OF_LOSS_TYPE.items() if ours in own}
    objective = build_loss(name, **hyperparameters)
    # SFT has no score of its own, and TRL leaves it as it is
    if args.f_divergence_type == "reverse_kl" or name == "sft":
        return objective
    return FDivergence(objective, args.f_divergence_type, args.f_alpha_divergence_coef)


def _check_not_both(args: DPOConfig) -> None:
    for setting in fields(DPOConfig):
        if setting.name not in _OF_LOSS_TYPE:
            continue
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        value = getattr(args, setting.name)
        if value != default:
            what = "names TRL's losses" if setting.name == "loss_type" else "belongs to loss_type"
            raise ValueError(
                f"{setting.name} = {value!r} {what}, which objective takes the place of: leave it out, or objective; "
                'hyperparameters of an objective go into objective_args, such as {"beta": 0.2}'
            )


def _check_inner_steps(args: DPOConfig, objective: Objective) -> None:
    steps, rate = getattr(args, "spo_inner_steps", 0), getattr(args, "spo_inner_lr", None)
    if steps and not (rate and rate > 0):
        raise ValueError(f"spo_inner_steps = {steps} needs spo_inner_lr, a number above 0, got {rate!r}")
    if steps and SPO_VALUE not in needs_inputs(objective):
        raise ValueError(
            'spo_inner_steps computes the value of SPO(penalty="hinge", value="input"), which this objective has not: '
            f"{objective!r}"
        )
