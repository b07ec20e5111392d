"""FusedPreferenceModel on two processes, sharded by FSDP2: `python -m tests.integrations.fsdp_ranks RANK WORLD FOLDER`.

Process 0 leaves in the folder what each case gave: mean losses, gathered gradients and weights.
"""

import faulthandler
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from spo_kernels import LMHead, fused_spo_loss
from spo_kernels.integrations.transformers import (
    FusedPreferenceModel,
    PairCollator,
    hidden_states,
    precompute_ref_logps,
    shard_head,
)
from spo_kernels.losses import DPO
from tests.integrations.test_transformers import PAIRS, REFERENCE, build, lora

WATCHDOG = 240
PROCESSES, STEPS = 2, 4
RECORDS = [PAIRS[i % 3] for i in (0, 1, 2, 1)]


def batch_of(rows: slice, online: bool = False) -> dict[str, torch.Tensor]:
    """Pairs, with the reference's sums unless it is online."""
    batch, sums = PairCollator(0)(RECORDS[rows]), REFERENCE.view(2, 3)[:, [0, 1, 2, 1]][:, rows]
    return batch if online else {**batch, "ref_logps": sums.flatten()}


class Recipe(torch.nn.Module):
    """What a user writes: the loss after the model, whose head is in parts again by then."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Any, ref_logps: Any, **inputs: Any) -> Any:
        hidden, head = hidden_states(self.model, **inputs), LMHead.of(self.model)
        return fused_spo_loss(hidden, head, labels, loss="dpo", ref_logps=ref_logps, shift=True, path="two_pass")


# modules, and a mesh where they are to be sharded
def fused(kind: str, mesh: DeviceMesh | None, **options: Any) -> Any:
    return FusedPreferenceModel(build(kind), "dpo", **options)


def recipe(kind: str, mesh: DeviceMesh | None) -> Any:
    return Recipe(build(kind))


def with_reference(kind: str, mesh: DeviceMesh | None) -> Any:
    """Another model, whose head is in parts when the loss needs it."""
    reference = Recipe(build(kind, seed=1))
    if mesh is not None:
        inside(reference, mesh)
    return FusedPreferenceModel(build(kind), "dpo", reference=reference.model)


def adapters_off(kind: str, mesh: DeviceMesh | None) -> Any:
    return FusedPreferenceModel(lora(build(kind)), "dpo", reference="adapters_off")


# groups
def root(policy: Any, mesh: DeviceMesh, **precision: Any) -> None:
    fully_shard(policy, mesh=mesh, **precision)


def layers(policy: Any, mesh: DeviceMesh, **precision: Any) -> None:
    inner = policy.model.get_base_model() if hasattr(policy.model, "get_base_model") else policy.model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh, **precision)
    fully_shard(policy, mesh=mesh, **precision)


def head(policy: Any, mesh: DeviceMesh, **precision: Any) -> None:
    """A tied head is in one group with the embeddings."""
    own, tied = policy.model.get_output_embeddings(), policy.model.config.tie_word_embeddings
    fully_shard([policy.model.get_input_embeddings(), own] if tied else own, mesh=mesh, **precision)
    layers(policy, mesh, **precision)


def streamed(policy: Any, mesh: DeviceMesh, **precision: Any) -> None:
    """The head is split beforehand, and left alone by FSDP."""
    ignored = shard_head(policy.model, mesh, param_dtype=precision.get("param_dtype"))
    if precision:
        precision = {"mp_policy": MixedPrecisionPolicy(**precision)}
    layers(policy, mesh, ignored_params=ignored, **precision)


def inside(policy: Any, mesh: DeviceMesh) -> None:
    """The model was sharded before the loss came around it."""
    fully_shard(policy.model.lm_head, mesh=mesh)
    fully_shard(policy.model, mesh=mesh)


Make, Wrap = Callable[[str, DeviceMesh | None], Any], Callable[[Any, DeviceMesh], None]
two_pass, kept = partial(fused, path="two_pass"), partial(fused, path="factorised")
ONE, REPLICAS = (2,), (2, 1)
CASES: dict[str, tuple[str, Make, Wrap, tuple[int, ...]]] = {
    "root": ("llama", fused, root, ONE),
    "root, tied": ("tied", fused, root, ONE),
    "layers": ("gemma2", fused, layers, ONE),
    "layers, tied, replicas": ("tied", fused, layers, REPLICAS),
    "head": ("llama", fused, head, ONE),
    "head, tied": ("tied", fused, head, ONE),
    "head, replicas": ("llama", fused, head, REPLICAS),
    "head, two_pass": ("llama", two_pass, head, ONE),
    "head, tied, two_pass": ("tied", two_pass, head, ONE),
    "head, factorised": ("llama", kept, head, ONE),
    "inside": ("llama", two_pass, inside, ONE),
    "recipe": ("llama", recipe, head, ONE),
    "recipe, replicas": ("llama", recipe, head, REPLICAS),
    "streamed": ("llama", fused, streamed, ONE),
    "streamed, scale": ("granite", fused, streamed, ONE),
    "streamed, tied": ("tied", fused, streamed, ONE),
    "streamed, adapters off": ("llama", adapters_off, streamed, ONE),
    "reference": ("llama", with_reference, layers, ONE),
    "adapters off": ("llama", adapters_off, head, ONE),
}
ONLINE = ("reference", "adapters off", "streamed, adapters off")


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def train(policy: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Losses of each step, gradients of the first, weights at the end."""
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-4, eps=1e-6)
    losses, gradients = [], {}
    for _ in range(STEPS):
        loss, _metrics = policy(**batch)
        loss.backward()
        gradients = gradients or {name: whole(p.grad) for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {name: whole(p) for name, p in trained.items()}
    return {"losses": torch.tensor(losses), "gradients": gradients, "weights": weights}


def run(name: str, mine: slice) -> dict[str, Any]:
    kind, make, wrap, shape = CASES[name]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    policy = make(kind, mesh)
    wrap(policy, mesh)
    found = train(policy, batch_of(mine, name in ONLINE))
    dist.all_reduce(found["losses"])
    return {**found, "losses": found["losses"] / PROCESSES}


class Watching(DPO):
    """DPO that keeps what it was given."""

    def __call__(self, pairs: Any) -> torch.Tensor:
        self.__dict__["given"] = torch.cat([pairs.ref_chosen, pairs.ref_rejected])
        return super().__call__(pairs)


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def mixed_precision(mine: slice) -> dict[str, Any]:
    """What reaches the objective, and what is said where it cannot be exact."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    objective, batch = Watching(), batch_of(mine)
    batch["ref_logps"] = batch["ref_logps"] - 300.123
    policy = FusedPreferenceModel(build("llama"), objective)
    head(policy, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    loss, _ = policy(**batch)
    loss.backward()
    rounded = batch | {"ref_logps": batch["ref_logps"].bfloat16()}
    return {
        "given": objective.__dict__["given"],
        "expected": batch["ref_logps"],
        "gradient": whole(policy.model.lm_head.weight.grad),
        "rounded": message(lambda: policy(**rounded)),
    }


def of_streamed(mine: slice, folder: Path) -> dict[str, Any]:
    """Two micro-batches, clipped, and a step; then what is saved, loaded, and said of logits. Then bfloat16."""
    mesh = init_device_mesh("cpu", (PROCESSES,))

    def made() -> tuple[Any, Any]:
        policy = FusedPreferenceModel(build("llama"), "dpo")
        streamed(policy, mesh)
        return policy, torch.optim.AdamW(policy.parameters(), lr=1e-2)

    policy, optimizer = made()
    for rows in (slice(mine.start, mine.start + 1), slice(mine.start + 1, mine.stop)):
        (policy(**batch_of(rows))[0] / 2).backward()
    norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.1))
    optimizer.step()
    saved = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    kept = get_state_dict(policy, optimizer)
    torch.distributed.checkpoint.save(dict(zip(("model", "optimizer"), kept, strict=True)), checkpoint_id=folder)
    again, its_optimizer = made()
    states = dict(zip(("model", "optimizer"), get_state_dict(again, its_optimizer), strict=True))
    torch.distributed.checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(again, its_optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    steps = []
    for module, its in ((policy, optimizer), (again, its_optimizer)):
        its.zero_grad()
        module(**batch_of(mine))[0].backward()
        its.step()
        steps.append(whole(module.model.lm_head.weight))
    model, ids = build("llama"), torch.tensor([[1, 5, 9, 30]])
    fully_shard(model, mesh=mesh, ignored_params=shard_head(model, mesh))
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        logits = model(input_ids=ids).logits
    half = FusedPreferenceModel(build("llama"), "dpo")
    streamed(half, mesh, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    half(**batch_of(mine))[0].backward()
    return {
        "norm": norm,
        "saved": saved,
        "resumed": torch.equal(*steps),
        "rows": policy.model.lm_head.weight.to_local().shape[0],
        "logits": logits,
        "generated": generated,
        "half": whole(half.model.lm_head.weight.grad),
    }


def precomputed(split: str | None) -> torch.Tensor:
    """Three batches: in the second round there is none for process 1."""
    model = build("llama")
    if split is not None:
        mesh, ignored = init_device_mesh("cpu", (PROCESSES,)), None
        if split == "streamed":
            ignored = shard_head(model, mesh)
        else:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=ignored)
    return precompute_ref_logps(
        model, [PairCollator(0)(RECORDS[rows]) for rows in (slice(0, 2), slice(2, 3), slice(3, 4))]
    )


def at_head(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))


def heads_not_split(mesh: DeviceMesh) -> dict[str, str]:
    adapted = lora(build("llama"), modules_to_save=["lm_head"])
    grid = init_device_mesh("cpu", (1, PROCESSES))
    split = build("llama")
    fully_shard(split, mesh=mesh)
    later = build("llama")
    shard_head(later, mesh)
    return {
        "shard, adapted": message(lambda: shard_head(adapted, mesh)),
        "shard, grid": message(lambda: shard_head(build("llama"), grid)),
        "shard, split": message(lambda: shard_head(split, mesh)),
        "shard, twice": message(lambda: shard_head(later, mesh)),
        "shard, adapted later": message(lambda: LMHead.of(at_head(later))),
    }


def refused(mine: slice) -> dict[str, str]:
    batch = batch_of(mine)
    ddp = DistributedDataParallel(FusedPreferenceModel(build("llama")))
    found = {"first": message(lambda: ddp.module(**batch)), "ddp": message(lambda: ddp(**batch))}
    found["later"] = message(lambda: ddp.module(**batch))
    with torch.no_grad():
        found["no_grad"] = message(lambda: ddp.module(**batch))
    model = build("llama")
    fully_shard(model)
    found |= heads_not_split(init_device_mesh("cpu", (PROCESSES,)))
    found["one group"] = message(lambda: hidden_states(model, input_ids=batch["input_ids"]))
    with torch.no_grad():
        found["one group, no_grad"] = message(lambda: hidden_states(model, input_ids=batch["input_ids"]))
    return found


if __name__ == "__main__":
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=PROCESSES)
    mine = slice(2 * rank, 2 * rank + 2)
    found: dict[str, Any] = {name: run(name, mine) for name in CASES}
    found["of streamed"] = of_streamed(mine, folder / "checkpoint")
    found |= {
        "mixed precision": mixed_precision(mine),
        "refused": refused(mine),
        "precomputed": [precomputed(split) for split in ("gathered", "streamed")],
    }
    if rank == 0:
        torch.save(found, folder / "found")
    dist.destroy_process_group()
