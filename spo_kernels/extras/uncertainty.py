"""Reward uncertainty from last-layer embeddings, as AdvPO (arXiv 2403.05171) takes it.

AdvPO was read at summary level only; the confidence-region formula here is the usual one for a linear reward head,
not verified against the paper.
"""

import torch
from torch import Tensor

from spo_kernels.engine.checks import check_tensor
from spo_kernels.losses.pairs import check_positive


class EmbeddingUncertainty:
    """`u(φ) = sqrt(φᵀ A⁻¹ φ)` with `A = λ I + Σ_i φ_i φ_iᵀ` over the embeddings that the reward model was trained on.

    With a reward `φᵀ w`, u is proportional to the half-width of its confidence interval. Large where φ points away
    from the embeddings seen. A is kept in float64, `[D, D]`; one pass over the data, any batch size::

        uncertainty = EmbeddingUncertainty(hidden_size, regularization=1.0)
        for embeddings in batches:                       # [n, D], a reward model's last hidden states
            uncertainty.update(embeddings)
        pair_inputs = {"chosen_uncertainty": uncertainty(chosen), "rejected_uncertainty": uncertainty(rejected)}
        fused_spo_loss(..., loss=UncertaintyDPO(), pair_inputs=pair_inputs)

    AdvPO itself uses u in a robust policy-gradient objective; as an input of a pair loss it is this library's use.
    """

    def __init__(self, size: int, *, regularization: float = 1.0, device: torch.device | str | None = None) -> None:
        """Of no embedding.

        Args:
            size: D >= 1, the embeddings' width.
            regularization: λ > 0.
            device: Where A lives and results are computed.

        Raises:
            ValueError: An argument is out of range.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be a positive int, got {size!r}")
        check_positive("regularization", regularization)
        self.matrix = regularization * torch.eye(size, dtype=torch.float64, device=device)
        self._factor: Tensor | None = None

    @torch.no_grad()
    def update(self, embeddings: Tensor) -> None:
        """Add `[n, D]` embeddings to A.

        Raises:
            TypeError, ValueError: They are no finite floating `[n, D]`.
        """
        values = self._checked(embeddings)
        self.matrix.addmm_(values.T, values)
        self._factor = None

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """Uncertainty `[n]` of `[n, D]` embeddings, float32, no gradient.

        Raises:
            TypeError, ValueError: They are no finite floating `[n, D]`.
        """
        values = self._checked(embeddings)
        if self._factor is None:
            self._factor = torch.linalg.cholesky(self.matrix)
        # φᵀ A⁻¹ φ = |L⁻¹ φ|², which cannot come out negative
        return torch.linalg.solve_triangular(self._factor, values.T, upper=False).norm(dim=0).float()

    def _checked(self, embeddings: Tensor) -> Tensor:
        check_tensor("embeddings", embeddings)
        size = self.matrix.shape[0]
        if embeddings.ndim != 2 or embeddings.shape[1] != size:
            raise ValueError(f"embeddings must have shape [n, {size}], got {list(embeddings.shape)}")
        if not embeddings.is_floating_point():
            raise TypeError(f"embeddings must be floating point, got {embeddings.dtype}")
        values = embeddings.to(self.matrix)
        if not bool(values.isfinite().all()):
            row = int((~values.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"embeddings must be finite, but row {row} is not")
        return values
