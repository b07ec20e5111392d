"""Load a causal language model whose head can be taken apart from the rest.

What stands between the head's product and its logits is read from the configuration, and a check on a few tokens
holds the result to the model's own logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_kernels import LMHead, linear_logprob
from spo_kernels.data import Example
from spo_kernels.head import inner_model
from spo_kernels.integrations.hidden import hidden_states
from spo_kernels.integrations.layout import layout_of
from spo_kernels.integrations.modes import evaluating
from spo_kernels.train.adapters import base_of_adapter, load_adapter
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.dropout import switch_off
from spo_kernels.train.errors import TrainError
from spo_kernels.train.experts import router_loss


def load_tokenizer(name: str, config: TrainConfig) -> Any:
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).exists() for file in ("tokenizer_config.json", "tokenizer.json")):
        # Adapters are often saved without.
        name = base_of_adapter(name) or name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    # transformers raises many types; what the user can do is the same for all.
    except Exception as error:
        absent = "" if Path(name).expanduser().exists() else "; if a local folder was meant, it does not exist"
        raise TrainError(f"tokenizer of {name!r} can't be loaded: {error}{absent}") from error
    if tokenizer.eos_token_id is None:
        raise TrainError(f"tokenizer of {name!r} has no end-of-sequence token, so responses could not end")
    return tokenizer


def check_dtype(config: TrainConfig) -> None:
    """Refuse weights that are trained in float16."""
    if config.dtype == "float16" and not config.lora_r and base_of_adapter(config.model) is None:
        raise TrainError("--dtype float16: gradients underflow in it; it is for the frozen base of adapters only")


def load_model(name: str, config: TrainConfig, device: torch.device, trained: bool = True) -> nn.Module:
    """The model, or the base with the adapter where `name` is one, on its device, with dropout as the options say.

    Weights are in --dtype, or float32, except that --bf16 keeps a LoRA's frozen base in bfloat16.
    """
    base = base_of_adapter(name)
    if base is not None and config.lora_r and trained:
        raise TrainError(f"{name} is an adapter and is trained itself: leave --lora-r out, or merge it into {base}")
    adapted = bool(config.lora_r) or base is not None
    model = _load(base or name, config, adapted or not trained, device)
    if base is not None:
        model = load_adapter(model, name, trained)
    if not config.dropout:
        switch_off(model)
    model.config.use_cache = False
    check_head(model)
    return model.to(device) if not getattr(model, "is_quantized", False) else model


def _load(name: str, config: TrainConfig, frozen: bool, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, config.dtype or ("bfloat16" if config.bf16 and frozen else "float32"))
    try:
        settings = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        if settings.is_encoder_decoder:
            raise TrainError(f"{name}: an encoder-decoder model ({settings.model_type}); only decoders can be trained")
        quantised = getattr(settings, "quantization_config", None)
        if quantised is not None and not frozen:
            method = (
                quantised.get("quant_method", "bitsandbytes")
                if isinstance(quantised, dict)
                else type(quantised).__name__
            )
            raise TrainError(
                f"{name} is quantised ({method}): such weights can't be trained; --lora-r 16 trains adapters on them"
            )
        return AutoModelForCausalLM.from_pretrained(
            name,
            config=settings,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            device_map={"": device} if quantised is not None else None,
        )
    except TrainError:
        raise
    # transformers raises many types (missing, damaged, unknown architecture); all are about this name.
    except Exception as error:
        raise TrainError(f"model {name!r} can't be loaded ({type(error).__name__}): {error}") from error


def check_layout(model: nn.Module, config: TrainConfig) -> None:
    """Refuse a --layout that the model cannot take, before the reference is computed."""
    if config.stage == "sft" or config.layout == "auto":
        return
    try:
        layout_of(model, config.layout)
    except ValueError as error:
        raise TrainError(f"--layout {config.layout}: {error}") from None


def check_head(model: nn.Module) -> None:
    """Refuse a model whose head cannot be computed apart, or whose routers' loss is unknown."""
    try:
        LMHead.of(model)
    except (TypeError, ValueError) as error:
        raise TrainError(str(error)) from error
    router_loss(model)


def check_fits(model: Any, examples: list[Sequence[Example]], name: str) -> None:
    """Token ids and lengths that the model can take."""
    vocabulary = min(len(model.get_input_embeddings().weight), len(LMHead.of(model).weight))
    largest = max(int(ids.max()) for part in examples for e in part for ids in (e.prompt, *e.responses))
    if largest >= vocabulary:
        raise TrainError(f"the tokenizer produces token id {largest}, but {name} has only {vocabulary} tokens")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(e.longest for part in examples for e in part)
    if positions is not None and longest > positions:
        raise TrainError(
            f"the longest sequence has {longest} tokens, but {name} has only {positions} positions; lower --max-length"
        )


def freeze_unused(model: Any, tokens: Tensor) -> None:
    """Parts that text never reaches, such as a vision tower, get no gradient: DDP would wait for it.

    Whether tokens [T] reach a part is asked of parts beside backbone and head alone: experts wait for tokens of their
    own.
    """
    inner = inner_model(model)
    kept = {id(p) for part in (inner.get_decoder(), inner.get_output_embeddings()) for p in part.parameters()}
    beside = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    if not beside:
        return
    hidden = hidden_states(model, input_ids=tokens[None, :16])
    for parameter, gradient in zip(beside, torch.autograd.grad(hidden.sum(), beside, allow_unused=True), strict=True):
        parameter.requires_grad_(gradient is not None)


@torch.no_grad()
def check_against_own_logits(model: nn.Module, tokens: Tensor, backend: str | None = None) -> None:
    """Refuse a model whose logits are not what we compute, on one row of a few tokens [T].

    Two things are checked: log-probs against the model's own logits (an unknown scale, cap, norm or
    projection between backbone and head), and that later tokens do not change earlier hidden states.
    """
    kind = type(model).__name__
    tokens, head = tokens[None, :16], LMHead.of(model)
    half = tokens.shape[1] // 2
    with evaluating(model):
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        try:
            hidden = hidden_states(model, input_ids=tokens)
        except ValueError as error:
            raise TrainError(str(error)) from error
        prefix = hidden_states(model, input_ids=tokens[:, :half]) if half else hidden[:, :0]
    labels = tokens.roll(1, dims=1)
    try:
        ours = linear_logprob(hidden, head, labels, backend=backend)
    # A backend, or SPO_BACKEND, that can't serve this device and dtype; the message says why.
    except (ValueError, RuntimeError) as error:
        raise TrainError(f"the fused loss can't run: {error}") from error
    theirs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    # Relative to the spread of the logits: float32 agrees to 1e-6 of it, bfloat16 logits to 2e-2.
    spread = (logits - logits.mean(-1, keepdim=True)).abs().max().item()
    exact = head.weight.dtype == torch.float32
    limit = (1e-4 if exact else 5e-2) * spread + 1e-6
    difference = (ours - theirs).abs().max().item()
    if not difference <= limit:
        raise TrainError(
            f"{kind}: log-probs from its hidden states and head differ from its own logits by {difference:.2g} "
            f"nat (allowed: {limit:.2g}); it changes its logits in a way its configuration does not tell"
        )
    drift = (hidden[:, :half] - prefix).abs().max().item() if half else 0.0
    if not drift <= (1e-3 if exact else 5e-2) * hidden.abs().max().item():
        raise TrainError(f"{kind}: later tokens change earlier hidden states; only causal attention is supported")
