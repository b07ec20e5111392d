"""Records of many forms to token ids, for `spo-train`, other trainers and loops of one's own.

```python
records = read_records("pairs.jsonl")
examples = encode(records, tokenizer, Encoding(max_length=2048), warn=print)
train, held_out = examples.hold_out(0.1, seed=0)
DPOTrainer(model, train_dataset=train.dataset, ...)    # or: train[0].prompt, train[0].responses
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spo_kernels.data.encoding import Encoding, encode
    from spo_kernels.data.errors import DataError
    from spo_kernels.data.examples import Example, Examples
    from spo_kernels.data.records import Records, as_records, read_records
    from spo_kernels.data.samples import Sample, preference_sample, sft_sample
    from spo_kernels.data.template import frozen

__all__ = [
    "DataError",
    "Encoding",
    "Example",
    "Examples",
    "Records",
    "Sample",
    "as_records",
    "encode",
    "frozen",
    "preference_sample",
    "read_records",
    "sft_sample",
]
_MODULES = ("errors", "examples", "records", "samples", "template", "encoding")


def __getattr__(name: str) -> Any:
    """Import what is asked for: `datasets` takes a second, which `spo-train --help` need not wait for."""
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
