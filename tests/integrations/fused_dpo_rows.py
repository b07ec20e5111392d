"""Which runs `FusedDPOTrainer` and TRL's `DPOTrainer` are compared in: losses, adapters, reference, accumulation."""

from itertools import product
from typing import Any

from spo_kernels.integrations.trl_config import LOSS_TYPES

LOSSES: dict[str, dict[str, Any]] = {name: {"loss_type": [name]} for name in LOSS_TYPES}
LOSSES |= {
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.05},
    "aot": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "discopop": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "rpo": {"loss_type": ["sft", "sigmoid"], "beta": 0.3},
    "ipo and robust, f-DPO, WPO, LD": {
        "loss_type": ["ipo", "robust"],
        "loss_weights": [2.0, 0.5],
        "label_smoothing": 0.1,
        "f_divergence_type": "js_divergence",
        "use_weighting": True,
        "ld_alpha": 0.5,
    },
}
ADAPTERS = (None, "new", "trained")
PRECOMPUTED = (False, True)
ACCUMULATION = (1, 2)
Row = tuple[str, str | None, bool, int]

EVERYTHING: list[Row] = list(product(LOSSES, ADAPTERS, PRECOMPUTED, ACCUMULATION))
# each two choices stand together in some row: a latin square over the losses
PAIRWISE: list[Row] = [
    (loss, adapter, PRECOMPUTED[(i + j) % 2], ACCUMULATION[(i // 2 + j) % 2])
    for i, loss in enumerate(LOSSES)
    for j, adapter in enumerate(ADAPTERS)
]
