"""The model that a run compares with, and its log-probs of responses or of their tokens, computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from spo_kernels import LMHead
from spo_kernels.data import Example
from spo_kernels.extras.token_weights import ld_dpo_weights
from spo_kernels.integrations.at_head import ResponseLogps
from spo_kernels.integrations.preference_model import ADAPTERS_OFF
from spo_kernels.train.batches import IGNORE_INDEX, collate
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.content import data_hash, model_hash
from spo_kernels.train.forwards import forwards_of
from spo_kernels.train.logps_file import LogpsFile, cache_key
from spo_kernels.train.model import check_fits, check_layout, load_model
from spo_kernels.train.output import CACHE_FOLDER
from spo_kernels.train.together import together
from spo_kernels.train.token_logps import TokenPlaces


@dataclass(frozen=True)
class Reference:
    """The model that a run begins with, or --ref-model."""

    config: TrainConfig
    accelerator: Accelerator
    warn: Callable[[str], None]
    model: nn.Module
    content: str  # its `model_hash`

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        accelerator: Accelerator,
        warn: Callable[[str], None],
        start: nn.Module,
        start_content: str,
        examples: list[Sequence[Example]],
    ) -> Reference:
        """`start` is the model that is trained, with its hash; examples must fit --ref-model too."""
        if config.ref_model is None:
            return cls(config, accelerator, warn, start, start_content)
        model = load_model(config.ref_model, config, accelerator.device, trained=False)
        check_layout(model, config)
        check_fits(model, examples, config.ref_model)
        return cls(config, accelerator, warn, model, model_hash(model))

    def online(self) -> nn.Module | str:
        """What the policy asks in every step: the model apart, or the adapted one without its adapters."""
        if self.config.ref_model is not None:
            return self.model
        return ADAPTERS_OFF if self.config.lora_r else copy.deepcopy(self.model)

    def logps(self, examples: Sequence[Example], *, of_tokens: bool = False, ld_alpha: float | None = None) -> Tensor:
        """Sums of response log-probs [n, responses], or those of all tokens as `TokenPlaces` has them; float32 on the
        CPU. Computed now, or found in the cache.

        `ld_alpha` as in `Policy`; it has no part in log-probs of tokens.
        """
        accelerator, file = self.accelerator, self._file(examples, of_tokens, ld_alpha)
        places = TokenPlaces.of(examples) if of_tokens else None
        shape = (len(examples), len(examples[0].responses)) if places is None else (places.total,)
        cached = file.load(shape, self.warn) if accelerator.is_main_process else None
        if broadcast_object_list([cached is not None])[0]:
            logps = torch.empty(shape) if cached is None else cached
            return broadcast(logps.to(accelerator.device)).cpu()
        logps = self._score(examples, places, torch.zeros(shape, device=accelerator.device), ld_alpha)
        with together(accelerator):
            if accelerator.is_main_process:
                file.save(logps)
        return logps

    def _file(self, examples: Sequence[Example], of_tokens: bool, ld_alpha: float | None) -> LogpsFile:
        config, head = self.config, LMHead.of(self.model)
        key = cache_key(
            model=self.content,
            data=data_hash(examples),
            precision=self.accelerator.mixed_precision,
            transform=f"{head.logit_scale} {head.logit_softcap}",
            backend=config.backend,
            **({"of_tokens": True} if of_tokens else {"ld_alpha": ld_alpha}),
        )
        folder = Path(config.cache_dir).expanduser() if config.cache_dir else Path(config.output_dir) / CACHE_FOLDER
        return LogpsFile(folder, key)

    @torch.no_grad()
    def _score(
        self, examples: Sequence[Example], places: TokenPlaces | None, found: Tensor, ld_alpha: float | None
    ) -> Tensor:
        """Fill `found`, which is 0; every process does its share, all get the whole."""
        config, accelerator, model = self.config, self.accelerator, self.model
        model.eval()
        options = {"workspace_bytes": config.workspace_bytes, "backend": config.backend}
        by_length = sorted(range(len(examples)), key=lambda i: examples[i].longest)
        forwards = forwards_of(config, [model], [examples])
        batches = forwards.of(examples, by_length, accelerator.process_index, accelerator.num_processes)
        for batch in tqdm(batches, desc="reference", disable=config.quiet or not accelerator.is_main_process):
            input_ids, labels = collate((examples[i] for i in batch), accelerator.device)
            weights = None if ld_alpha is None or places is not None else ld_dpo_weights(labels, ld_alpha, shift=True)
            call = ResponseLogps(labels, weights, config.layout, options, summed=places is None)
            with accelerator.autocast():
                logps = call(model, model, {"input_ids": input_ids})["logps"]
            if places is None:
                found[batch] = logps.view(-1, len(batch)).T
            else:
                found[places.select(batch).to(found.device)] = logps[labels != IGNORE_INDEX]
        # What the other processes found is 0 here.
        total: Tensor = accelerator.reduce(found, "sum")
        return total.cpu()
