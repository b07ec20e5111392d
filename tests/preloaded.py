"""What every forked process has imported; see tests/processes.py. What isn't installed is left out."""

import contextlib
import faulthandler
import gc
import importlib

# one that cannot be imported in time ends the server, and with it each start
faulthandler.dump_traceback_later(120, exit=True)
for name in (
    "pytest",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "datasets",
    "peft",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.dpo_trainer",
    "spo_kernels.integrations.trl",
    "spo_kernels.integrations.transformers",
    "spo_kernels.train.run",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
faulthandler.cancel_dump_traceback_later()
# no child's collection touches, and so copies, these pages
gc.collect()
gc.freeze()
