"""Does a sparse backward hurt training, and how much of the vocabulary does a trained model need?

    python experiments/sparsity.py --data ../shared/data/gsm8k --output experiments/output/sparsity

A small Llama is trained on solutions (SFT), then on preference pairs with SPO(DPO), three times from the same weights
and batches: with the exact gradient, the certified one and the unbiased one; again for every order of the data. At
every preference step the exact gradient is computed too and compared with the one that is used. The sparse modes are
made to run sparse even where the library would find that too much is kept for it to pay. Written: results.json,
results.md, and a figure of the share of (token, vocabulary block) pairs that is kept, by SFT step and by position in
the response.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.gsm8k import build_model  # noqa: E402
from spo_kernels import Sparsity, fused_spo_loss, linear_logprob, sequence_logps  # noqa: E402
from spo_kernels.engine import sparse  # noqa: E402
from spo_kernels.losses import DPO, SPO  # noqa: E402

VOCABULARY = 8192
BINS = 24  # of response positions in the figure


@dataclass
class Batch:
    """Rows of prompt and response; labels are those of the response, -100 elsewhere."""

    input_ids: Tensor
    labels: Tensor


def main() -> None:
    options = parse()
    output = Path(options.output)
    if output.exists():
        sys.exit(f"{output} exists; remove it or give another --output")
    torch.set_num_threads(options.threads)
    sparse._WORTH = 1.0
    began = time.perf_counter()
    build_model(output / "init", Path(options.data) / "sft.jsonl", VOCABULARY)
    model, tokenizer = load(output / "init")
    by_step = fine_tune(model, list(sft_batches(tokenizer, options)), options)
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in ("exact", "certified", "unbiased")}
    for seed in range(options.seeds):
        train, held_out = preference_batches(tokenizer, seed, options)
        for mode, found in runs.items():
            found.append(prefer(copy.deepcopy(model), train, held_out, mode, options))
            print(f"seed {seed}, {mode}: {found[-1]['held out']}", flush=True)
    by_position = share_by_position(model, held_out, options.tolerance)
    results = {
        "options": vars(options),
        "vocabulary": VOCABULARY,
        "minutes": (time.perf_counter() - began) / 60,
        "kept by SFT step": by_step,
        "kept by response position": by_position,
        "runs": runs,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "results.md").write_text(report(results))
    print(report(results))
    draw(results, output / "kept.png")


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", default=str(ROOT / "../shared/data/gsm8k"), help="sft.jsonl and preferences.jsonl")
    made.add_argument("--output", default=str(ROOT / "experiments/output/sparsity"), help="folder to make")
    made.add_argument("--tolerance", type=float, default=2.0**-8, help="of both sparse modes")
    made.add_argument("--sft-steps", type=int, default=300)
    made.add_argument("--steps", type=int, default=60, help="preference steps")
    made.add_argument("--rows", type=int, default=16, help="sequences a step")
    made.add_argument("--held-out", type=int, default=160, help="pairs for the final figures")
    made.add_argument("--max-length", type=int, default=320, help="longer samples are left out")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--seed", type=int, default=0, help="of SFT and of what is held out")
    made.add_argument("--seeds", type=int, default=3, help="orders of the preference data")
    return made.parse_args()


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def encode(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    head, tail = tokenizer.encode(prompt), [*tokenizer.encode(response), tokenizer.eos_token_id]
    return head + tail, [-100] * len(head) + tail


def collate(rows: list[tuple[list[int], list[int]]]) -> Batch:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
    return Batch(ids, labels)


def sft_batches(tokenizer: Any, options: argparse.Namespace) -> Iterator[Batch]:
    rows = [encode(tokenizer, r["prompt"], r["completion"]) for r in records(Path(options.data) / "sft.jsonl")]
    rows = [row for row in rows if len(row[0]) <= options.max_length]
    generator = random.Random(options.seed)
    for _ in range(options.sft_steps):
        yield collate(generator.sample(rows, options.rows))


def preference_batches(tokenizer: Any, seed: int, options: argparse.Namespace) -> tuple[list[Batch], list[Batch]]:
    """Training batches by seed, and held-out ones whose prompts are not among them; chosen rows first."""
    pairs = records(Path(options.data) / "preferences.jsonl")
    prompts = sorted({pair["prompt"] for pair in pairs})
    random.Random(options.seed).shuffle(prompts)
    kept_back = set(prompts[: len(prompts) // 5])
    sides: dict[bool, list[Any]] = {True: [], False: []}
    for pair in pairs:
        rows = [encode(tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        if max(len(ids) for ids, _ in rows) <= options.max_length:
            sides[pair["prompt"] in kept_back].append(rows)
    count = options.rows // 2
    generator = random.Random(f"{options.seed} {seed}")

    def batch(chosen: list[Any]) -> Batch:
        return collate([rows[side] for side in (0, 1) for rows in chosen])

    train = [batch(generator.sample(sides[False], count)) for _ in range(options.steps)]
    held = sides[True][: options.held_out]
    return train, [batch(held[i : i + count]) for i in range(0, len(held), count)]


def hidden_states(model: Any, batch: Batch) -> Tensor:
    return model.model(input_ids=batch.input_ids, attention_mask=torch.ones_like(batch.input_ids)).last_hidden_state


@torch.enable_grad()
def kept_shares(hidden: Tensor, head: Tensor, labels: Tensor, tolerance: float) -> Tensor:
    """ρ of every label, nan where it does not count; nothing is differentiated."""
    leaf = hidden.detach().requires_grad_()
    names = ("kept_share",)
    sparsity = Sparsity("certified", tolerance)
    extras = linear_logprob(leaf, head.detach().requires_grad_(), labels, shift=True, outputs=names, sparsity=sparsity)
    shares = extras[1]["kept_share"]
    return shares.masked_fill(labels == -100, torch.nan)[:, 1:]


def fine_tune(model: Any, batches: list[Batch], options: argparse.Namespace) -> list[tuple[int, float, float]]:
    """SFT with the exact gradient; (step, loss per token, ρ) every ten steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    seen = []
    for step, batch in enumerate(batches):
        scale = min(1.0, (step + 1) / 30) * (1.0 - step / len(batches))
        optimizer.param_groups[0]["lr"] = 2e-3 * max(scale, 0.02)
        hidden = hidden_states(model, batch)
        logp = linear_logprob(hidden, model.lm_head.weight, batch.labels, shift=True)
        assert isinstance(logp, Tensor)
        loss = -logp.sum() / (batch.labels[:, 1:] != -100).sum()
        if step % 10 == 0 or step == len(batches) - 1:
            share = kept_shares(hidden, model.lm_head.weight, batch.labels, options.tolerance)
            seen.append((step, loss.item(), share.nanmean().item()))
            print(f"sft step {step}: loss {loss.item():.3f}, kept {seen[-1][2]:.3f}", flush=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return seen


@torch.no_grad()
def share_by_position(model: Any, batches: list[Batch], tolerance: float) -> list[float]:
    """Mean ρ of held-out response tokens, by relative position in the response."""
    total, count = torch.zeros(BINS), torch.zeros(BINS)
    for batch in batches:
        shares = kept_shares(hidden_states(model, batch), model.lm_head.weight, batch.labels, tolerance)
        for row in shares:
            values = row[~row.isnan()]
            bins = (torch.arange(len(values)) * BINS) // max(1, len(values))
            total.index_add_(0, bins, values)
            count.index_add_(0, bins, torch.ones_like(values))
    return (total / count.clamp_min(1)).tolist()


@torch.no_grad()
def reference_sums(model: Any, batch: Batch) -> Tensor:
    return sequence_logps(hidden_states(model, batch), model.lm_head.weight, batch.labels, shift=True)


def prefer(
    model: Any, train: list[Batch], held_out: list[Batch], mode: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One preference run; every step's gradient beside the exact one of the same weights and batch."""
    objective = SPO(DPO(beta=0.1), weight=0.1)
    references = [[reference_sums(model, batch) for batch in batches] for batches in (train, held_out)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    steps = []
    for step, (batch, reference) in enumerate(zip(train, references[0], strict=True)):
        optimizer.param_groups[0]["lr"] = 2e-4 * min(1.0, (step + 1) / 10)
        sparsity = Sparsity(mode, options.tolerance, seed=step)
        exact, _ = gradient(model, batch, reference, objective, Sparsity("exact"))
        used, metrics = gradient(model, batch, reference, objective, sparsity)
        head = next(i for i, p in enumerate(model.parameters()) if p is model.lm_head.weight)
        steps.append(
            {
                **metrics,
                "cosine": F.cosine_similarity(flat(used), flat(exact), dim=0).item(),
                "cosine of the head": F.cosine_similarity(flat([used[head]]), flat([exact[head]]), dim=0).item(),
            }
        )
        for parameter, value in zip(model.parameters(), used, strict=True):
            parameter.grad = value
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {"steps": steps, "held out": evaluate(model, held_out, references[1], objective)}


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([value.double().flatten() for value in gradients])


def gradient(
    model: Any, batch: Batch, reference: Tensor, objective: SPO, sparsity: Sparsity
) -> tuple[list[Tensor], dict[str, float]]:
    loss, metrics = fused_spo_loss(
        hidden_states(model, batch),
        model.lm_head.weight,
        batch.labels,
        loss=objective,
        ref_logps=reference,
        shift=True,
        sparsity=sparsity,
    )
    found = torch.autograd.grad(loss, list(model.parameters()))
    wanted = ("loss", "rewards/margins", "sparsity/kept", "sparsity/dropped_mass_max", "sparsity/dropped_mass_mean")
    return list(found), {name: float(metrics[name]) for name in wanted if name in metrics}


@torch.no_grad()
def evaluate(model: Any, batches: list[Batch], references: list[Tensor], objective: SPO) -> dict[str, float]:
    """Means over held-out pairs; reward accuracy is the task: the correct solution gains more than the wrong one."""
    total: dict[str, float] = {}
    pairs = 0
    for batch, reference in zip(batches, references, strict=True):
        _, metrics = fused_spo_loss(
            hidden_states(model, batch),
            model.lm_head.weight,
            batch.labels,
            loss=objective,
            ref_logps=reference,
            shift=True,
        )
        count = len(reference) // 2
        pairs += count
        for name, value in metrics.items():
            total[name] = total.get(name, 0.0) + float(value) * count
    wanted = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen")
    return {name: total[name] / pairs for name in wanted} | {"pairs": pairs}


def report(results: dict[str, Any]) -> str:
    options = results["options"]
    lines = [
        f"{options['sft_steps']} SFT steps, {options['steps']} preference steps of {options['rows']} sequences, "
        f"V = {results['vocabulary']}, tolerance {options['tolerance']:.2e}, {options['seeds']} orders of the "
        f"preference data, {results['minutes']:.1f} minutes on {options['threads']} threads. "
        "Mean ± standard deviation over orders.",
        "",
        "| | held-out loss | margin | reward accuracy | logp chosen | last 10 losses | kept | dropped, worst "
        "| cosine, mean | worst | head's, worst |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for mode, runs in results["runs"].items():
        steps = [step for run in runs for step in run["steps"]]

        def column(name: str, steps: list[dict[str, float]] = steps) -> list[float]:
            return [step[name] for step in steps if name in step] or [float("nan")]

        names = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen")
        held_out = [spread([run["held out"][name] for run in runs]) for name in names]
        last = spread([statistics.fmean(step["loss"] for step in run["steps"][-10:]) for run in runs])
        cells = [
            *held_out,
            last,
            f"{statistics.fmean(column('sparsity/kept')):.3f}",
            f"{max(column('sparsity/dropped_mass_max')):.2e}",
            f"{statistics.fmean(column('cosine')):.6f}",
            f"{min(column('cosine')):.6f}",
            f"{min(column('cosine of the head')):.6f}",
        ]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    first, last_step = results["kept by SFT step"][0], results["kept by SFT step"][-1]
    lines += ["", f"Kept by SFT: {first[2]:.3f} at step {first[0]}, {last_step[2]:.3f} at step {last_step[0]}."]
    lines.append("Kept by response position: " + " ".join(f"{v:.3f}" for v in results["kept by response position"]))
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def draw(results: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4))
    steps, losses, shares = zip(*results["kept by SFT step"], strict=True)
    left.plot(steps, shares, label="kept")
    left.plot(steps, [loss / max(losses) for loss in losses], "--", label=f"SFT loss / {max(losses):.1f}")
    left.set(xlabel="SFT step", ylim=(0, None), title="share of (token, block) pairs kept")
    left.legend()
    positions = results["kept by response position"]
    middle.plot([(i + 0.5) / len(positions) for i in range(len(positions))], positions)
    middle.set(xlabel="position in the response", ylim=(0, None), title="kept, held-out responses")
    for mode, runs in results["runs"].items():
        right.plot([step["loss"] for step in runs[0]["steps"]], label=mode, alpha=0.8)
    right.set(xlabel="preference step", title="training loss, first order")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
