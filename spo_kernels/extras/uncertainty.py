"""Reward uncertainty from last-layer embeddings, and AdvPO's pessimistic reward (arXiv 2403.05171) made from it.

Agrees with an audit and a transcription of the paper, which itself was not read: the uncertainty `b sqrt(eᵀ M⁻¹ e)` up
to b, and the pessimistic reward head of a batch. AdvPO's objective is not per sample: it maximises over the policy the
minimum over all reward heads in the confidence region, against reference responses.
"""

import torch
from torch import Tensor

from spo_kernels.arguments import check_positive, check_whole
from spo_kernels.engine.checks import check_tensor


class EmbeddingUncertainty:
    """`u(e) = sqrt(eᵀ M⁻¹ e)` with `M = λ I + Σ_i e_i e_iᵀ` over the embeddings that the reward model was trained on,
    chosen and rejected responses' each as a row of its own.

    With a reward `eᵀ φ`, `b u(e)` is the half-width of its confidence interval. Large where e points away from the
    embeddings seen. M is kept in float64, `[D, D]`; one pass over the data, any batch size::

        uncertainty = EmbeddingUncertainty(hidden_size, regularization=1.0)
        for embeddings in batches:                       # [n, D], a reward model's last hidden states
            uncertainty.update(embeddings)
        pair_inputs = {"chosen_uncertainty": uncertainty(chosen), "rejected_uncertainty": uncertainty(rejected)}
        fused_spo_loss(..., loss=UncertaintyDPO(), pair_inputs=pair_inputs)

    As an input of a pair loss u is this library's use; AdvPO's own is `pessimistic_head`.
    """

    def __init__(self, size: int, *, regularization: float = 1.0, device: torch.device | str | None = None) -> None:
        """Start from no embedding seen.

        Args:
            size: D >= 1, the embeddings' width.
            regularization: λ > 0.
            device: Where M lives and results are computed.

        Raises:
            ValueError: An argument is out of range.
        """
        check_whole("size", size, 1)
        check_positive("regularization", regularization)
        self.matrix = regularization * torch.eye(size, dtype=torch.float64, device=device)
        self._factor: Tensor | None = None

    @torch.no_grad()
    def update(self, embeddings: Tensor) -> None:
        """Add `[n, D]` embeddings to M.

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
        # eᵀ M⁻¹ e = |L⁻¹ e|², which cannot come out negative
        return self._whitened(values.T).norm(dim=0).float()

    @torch.no_grad()
    def pessimistic_head(self, head: Tensor, current: Tensor, reference: Tensor, *, bound: float = 1.0) -> Tensor:
        """AdvPO's `φ_adv = φ - M⁻¹ g / λ*`, `λ* = sqrt(gᵀ M⁻¹ g / B)`, `g = mean(current) - mean(reference)`.

        The reward head in the confidence region `(φ_adv - φ)ᵀ M (φ_adv - φ) <= B` that rates the batch lowest against
        the reference responses: `gᵀ φ_adv = gᵀ φ - sqrt(B gᵀ M⁻¹ g)`. `current @ φ_adv` are the rewards for the policy
        gradient of that batch.

        Args:
            head: φ `[D]`, the reward model's last layer.
            current: `[n, D]` embeddings of the policy's responses to a batch of prompts, n >= 1.
            reference: `[m, D]` of the reference responses, m >= 1.
            bound: B > 0, b² of the uncertainty; the paper tried 1, 5, 10 and 15.

        Returns:
            `[D]`, float64; the head itself where g is 0.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.
        """
        check_positive("bound", bound)
        check_tensor("head", head)
        if head.shape != self.matrix.shape[:1]:
            raise ValueError(f"head must have shape {list(self.matrix.shape[:1])}, got {list(head.shape)}")
        sides = {"current": self._checked(current, "current"), "reference": self._checked(reference, "reference")}
        for name, values in sides.items():
            if not len(values):
                raise ValueError(f"{name} must hold at least one embedding, got none")
        gap = sides["current"].mean(0) - sides["reference"].mean(0)
        whitened = self._whitened(gap[:, None])
        length = whitened.norm()
        if length == 0:
            return head.to(gap)
        direction = torch.linalg.solve_triangular(self._cholesky().T, whitened, upper=True)[:, 0]
        return head.to(gap) - direction * (bound**0.5 / length)

    def _cholesky(self) -> Tensor:
        if self._factor is None:
            self._factor = torch.linalg.cholesky(self.matrix)
        return self._factor

    def _whitened(self, columns: Tensor) -> Tensor:
        """`L⁻¹ columns`, `M = L Lᵀ`."""
        return torch.linalg.solve_triangular(self._cholesky(), columns, upper=False)

    def _checked(self, embeddings: Tensor, name: str = "embeddings") -> Tensor:
        check_tensor(name, embeddings)
        size = self.matrix.shape[0]
        if embeddings.ndim != 2 or embeddings.shape[1] != size:
            raise ValueError(f"{name} must have shape [n, {size}], got {list(embeddings.shape)}")
        if not embeddings.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {embeddings.dtype}")
        values = embeddings.to(self.matrix)
        if not bool(values.isfinite().all()):
            row = int((~values.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"{name} must be finite, but row {row} is not")
        return values
