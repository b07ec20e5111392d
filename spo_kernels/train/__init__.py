"""`spo-train`: supervised and preference fine-tuning on transformers, datasets and accelerate.

Run it as `spo-train`, `python -m spo_kernels.train` or `accelerate launch -m spo_kernels.train`.
Only this package imports transformers, and only when a run starts: `import spo_kernels` never does.
"""

from spo_kernels.train.config import TrainConfig
from spo_kernels.train.errors import TrainError

__all__ = ["TrainConfig", "TrainError"]
