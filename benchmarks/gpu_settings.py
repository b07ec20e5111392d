"""What the GPU benchmark measures: shapes, phases, and the job that one provider's process gets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from .settings import Setting

# (N, H, V): Llama-3 8B, the same with logits like a language model's for the sparse backward, Qwen2.5 7B, Gemma-2 2B,
# a small model, a launch-bound one, one pair of 32k tokens
SHAPES = (
    Setting(pairs=4, tokens=1024, hidden=4096, vocab=128256, dtype="bfloat16"),
    Setting(pairs=4, tokens=1024, hidden=4096, vocab=128256, dtype="bfloat16", logits="lm"),
    Setting(pairs=8, tokens=1024, hidden=3584, vocab=152064, dtype="bfloat16"),
    Setting(pairs=4, tokens=1024, hidden=2304, vocab=256000, dtype="bfloat16"),
    Setting(pairs=2, tokens=512, hidden=1024, vocab=32768, dtype="bfloat16"),
    Setting(pairs=1, tokens=128, hidden=1024, vocab=32768, dtype="bfloat16"),
    Setting(pairs=1, tokens=32768, hidden=4096, vocab=128256, dtype="bfloat16"),
)
DRY_SHAPES = (
    Setting(pairs=1, tokens=8, hidden=16, vocab=160, dtype="float32"),
    Setting(pairs=2, tokens=5, hidden=24, vocab=331, dtype="float32"),
    Setting(pairs=1, tokens=8, hidden=64, vocab=1300, dtype="float32", logits="lm"),
)

# phase: products that nothing can do without
PHASES = {"forward": 1, "frozen": 2, "trained": 3}
# what the floors multiply; nobody's trained head takes fewer than 3 products, two passes take 4
FLOORS = {"forward": (1,), "frozen": (2,), "trained": (3, 4)}
# (rows, columns) of the bare products' tile; 0: all
TILES = ((4096, 8192), (4096, 32768), (8192, 8192), (4096, 0))

# rows whose log-probs are held to float64 at large shapes, and rows up to which gradients are too
ORACLE_ROWS = 1024
GRADIENT_ROWS = 2048


@dataclass(frozen=True)
class GpuJob:
    """What one provider's process does."""

    provider: str
    shapes: tuple[Setting, ...]
    device: str
    seconds: float  # for all shapes together; what does not fit is reported as such
    tiles: dict[str, tuple[int, int]]  # the bare product's fastest tile, by `key(setting)`
    repeats: int = 20
    sample_seconds: float = 1.0

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> GpuJob:
        fields = json.loads(path.read_text())
        fields["shapes"] = tuple(Setting(**shape) for shape in fields["shapes"])
        fields["tiles"] = {name: (tile[0], tile[1]) for name, tile in fields["tiles"].items()}
        return GpuJob(**fields)


def key(setting: Setting) -> str:
    """A shape's name in results."""
    logits = "" if setting.logits == "random" else f" {setting.logits}"
    return f"N={setting.rows} H={setting.hidden} V={setting.vocab}{logits}"
