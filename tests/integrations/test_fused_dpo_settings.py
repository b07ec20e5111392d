"""What `FusedDPOTrainer` has beside TRL's settings: objectives, their inputs and statistics, SPO's inner steps."""

import copy
import json

import pytest
import torch

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")

from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, PromptTuningConfig
from torch.distributed.utils import _apply_to_tensors
from trl import DPOConfig, DPOTrainer, TrlParser

from spo_kernels.extras.bilevel import bilevel_value
from spo_kernels.integrations import trl
from spo_kernels.integrations.at_head import PairLoss
from spo_kernels.integrations.transformers import FusedPreferenceModel
from spo_kernels.integrations.trl_seam import check_dpo_trainer
from spo_kernels.integrations.wrappers import Sealed
from spo_kernels.losses import DPO, SPO, build_loss, needs_inputs
from spo_kernels.losses.beta_dpo import BetaDPO
from spo_kernels.losses.pairs import token_outputs_of

from .tiny import LORA, Run, dataset, make_model, make_tokenizer

HINGE = {"penalty": "hinge", "value": "input"}
# statistics, couplings in the batch, columns of the data, sums over tokens, pilots, no reference
OBJECTIVES = ("aot", "bco", "beta_dpo", "kto", "odpo", "orpo", "sgdpo", "spo", "tdpo", "uncertainty_dpo", "wpo")


def config(folder, kind=trl.FusedDPOConfig, **settings):
    defaults = {
        "max_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return kind(str(folder), **{**defaults, "per_device_train_batch_size": 4, "learning_rate": 5e-4, **settings})


def trainer(folder, *, data=None, eval_dataset=None, model=None, ref_model="other", adapter=None, **settings):
    return trl.FusedDPOTrainer(
        model or make_model("llama"),
        make_model("llama", seed=1) if ref_model == "other" else ref_model,
        config(folder, **settings),
        train_dataset=dataset("pairs") if data is None else data,
        eval_dataset=dataset("pairs").select(range(6)) if eval_dataset is None else eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=adapter,
    )


def batch_of(made, count=4):
    return made.data_collator([made.train_dataset[i] for i in range(count)])


def by_module(made, objective, batch, model, **more):
    """The same batch through `FusedPreferenceModel`."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    module = FusedPreferenceModel(model, objective, reference=make_model("llama", seed=1))
    return module(batch["input_ids"], labels=labels, attention_mask=batch["attention_mask"], **more)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_trains_or_is_refused_with_the_reason(tmp_path, name):
    objective = build_loss(name)
    data = dataset("pairs")
    if "kl" in token_outputs_of(objective):
        with pytest.raises(ValueError, match="whole distributions"):
            trainer(tmp_path, objective=name)
        return
    for column in needs_inputs(objective):
        if not column.endswith("_pilot"):
            data = data.add_column(column, [0.5 + 0.01 * i for i in range(len(data))])
    made = trainer(tmp_path, objective=name, data=data)
    before = torch.cat([weight.flatten() for weight in make_model("llama").parameters()])
    assert made.train().training_loss == pytest.approx(made.state.log_history[-1]["train_loss"])
    after = torch.cat([weight.detach().flatten() for weight in made.model.parameters()])
    assert after.isfinite().all() and (after - before).abs().max() > 1e-5


def test_by_name_by_instance_and_the_module_agree(tmp_path):
    named = trainer(tmp_path, objective="spo", objective_args={"beta": 0.3, "weight": 0.5})
    instance = trainer(tmp_path, objective=SPO(DPO(0.3), weight=0.5))
    batch = batch_of(named)
    expected, metrics = by_module(named, SPO(DPO(0.3), weight=0.5), batch, make_model("llama"))
    for made in (named, instance):
        assert made.compute_loss(made.model.train(), batch).item() == pytest.approx(expected.item(), rel=1e-6)
        for key in ("rewards/chosen", "rewards/margins", "logps/rejected"):
            assert made._metrics["train"][key] == [pytest.approx(metrics[key].item(), rel=1e-5)]


def test_no_reference_is_loaded_where_none_is_needed(tmp_path):
    made = trainer(tmp_path, objective="simpo", ref_model=None)
    assert made.ref_model is None and not made.precompute_ref_logps and not made.args.precompute_ref_log_probs
    assert "ref_chosen_logps" not in made.train_dataset.column_names
    made.train()
    assert made.evaluate(dataset("pairs"))["eval_loss"] > 0


def test_inner_steps_are_the_library_s_bilevel_value(tmp_path):
    made = trainer(
        tmp_path, objective="spo", objective_args={**HINGE, "normalization": "sum"}, spo_inner_steps=2, spo_inner_lr=0.1
    )
    batch, model = batch_of(made), make_model("llama")
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def nll(_):
        logp = model(batch["input_ids"], batch["attention_mask"]).logits[:4, :-1].log_softmax(-1)
        picked = logp.gather(-1, labels[:4, 1:, None].clamp_min(0))[..., 0]
        return -(picked * (labels[:4, 1:] != -100)).sum(-1)

    value = bilevel_value(model, nll, None, learning_rate=0.1, steps=2)
    objective = SPO(**HINGE, normalization="sum")
    expected, _ = by_module(made, objective, batch, model, pair_inputs={"spo_value": value})
    without, _ = by_module(made, objective, batch, model, pair_inputs={"spo_value": torch.zeros(4)})
    loss = made.compute_loss(made.model.train(), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) != pytest.approx(without.item(), rel=1e-3)


def test_columns_of_the_data_reach_the_objective(tmp_path):
    offsets = [0.25 * i for i in range(16)]
    made = trainer(tmp_path, objective="odpo", data=dataset("pairs").add_column("offset", offsets))
    batch = batch_of(made)
    expected, _ = by_module(made, "odpo", batch, make_model("llama"), pair_inputs={"offset": torch.tensor(offsets[:4])})
    assert made.compute_loss(made.model, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_statistics_are_saved_and_a_run_goes_on_bit_for_bit(tmp_path):
    def run(folder, objective, **more):
        made = trainer(folder, objective=objective, max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1)
        made.train(**more)
        return made, objective.state_dict()

    whole, state = run(tmp_path, BetaDPO())
    resumed, again = run(tmp_path, BetaDPO(), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert state["mean"] != BetaDPO().state_dict()["mean"]
    assert all(torch.equal(state[name], again[name]) for name in state)
    weights = [made.model.state_dict() for made in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_evaluation_reports_trl_s_metrics(tmp_path):
    expected = Run("DPO", "gemma2", tmp_path, steps=2, per_device_eval_batch_size=4)
    found = Run("FusedDPO", "gemma2", tmp_path, steps=2, per_device_eval_batch_size=4, library=trl)
    theirs, ours = (run.trainer.evaluate(dataset("pairs").select(range(8))) for run in (expected, found))
    metrics = [key for key in theirs if not any(word in key for word in ("runtime", "per_second"))]
    assert len(metrics) > 12 and {key: ours[key] for key in metrics} == pytest.approx(
        {key: theirs[key] for key in metrics}, rel=1e-4, abs=1e-4
    )


def test_compute_metrics_is_given_logits(tmp_path):
    made = trainer(tmp_path)
    loss, output = made.compute_loss(made.model, batch_of(made), return_outputs=True)
    batch = batch_of(made)
    assert loss.requires_grad and output.logits.shape == (*batch["input_ids"].shape, 48)


def test_prompt_tuning_equals_trl(tmp_path):
    adapter = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    runs = []
    for library in (trl, __import__("trl")):
        torch.manual_seed(0)
        name = "FusedDPO" if library is trl else "DPO"
        made = getattr(library, f"{name}Trainer")(
            make_model("llama"),
            args=config(tmp_path, getattr(library, f"{name}Config")),
            train_dataset=dataset("pairs"),
            processing_class=make_tokenizer(),
            peft_config=adapter,
        )
        loss = made.compute_loss(made.model.train(), batch_of(made))
        loss.backward()
        runs.append((loss.item(), next(p.grad for p in made.model.parameters() if p.requires_grad)))
    (ours, mine), (theirs, wanted) = runs
    assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())


def test_a_batch_without_labels_gives_a_loss_with_a_gradient(tmp_path):
    made = trainer(tmp_path)
    batch = batch_of(made)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss = made.compute_loss(made.model.train(), batch)
    loss.backward()
    assert loss.item() == pytest.approx(0.6931, abs=1e-4)
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in made.model.parameters())


def test_bf16_autocast(tmp_path):
    exact = trainer(tmp_path)
    rounded = trainer(tmp_path, bf16=True)
    losses = []
    for made in (exact, rounded):
        made.train()
        losses.append(made.state.log_history[-1]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[0] != losses[1]


def test_torch_compile_leaves_loss_and_gradient_as_they_are(tmp_path):
    settings = {"logging_steps": 1, "max_steps": 1}
    compiled = trainer(tmp_path, torch_compile=True, torch_compile_backend="eager", **settings)
    plain = trainer(tmp_path, **settings)
    for made in (compiled, plain):
        made.train()
    found, expected = ({k: made.state.log_history[0][k] for k in ("loss", "grad_norm")} for made in (compiled, plain))
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_sparse_backward_is_logged(tmp_path):
    made = trainer(tmp_path, sparsity="unbiased", logging_steps=1, workspace_mib=1)
    made.train()
    assert 0 < made.state.log_history[0]["sparsity/kept"] <= 1


def test_a_command_line_and_json_know_the_settings(tmp_path):
    (settings,) = TrlParser(trl.FusedDPOConfig).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--objective", "spo", "--objective_args", '{"beta": 0.3}', "--use_cpu", "true"]
    )
    assert settings.objective_args == {"beta": 0.3}
    written = json.loads(config(tmp_path, objective=SPO(DPO(0.2))).to_json_string())
    assert "SPO(base=DPO(beta=0.2" in written["objective"]


REFUSED = {
    "unknown objective": ({"objective": "dpoo"}, "unknown"),
    "a class": ({"objective": DPO}, "must be a name or an objective"),
    "unknown hyperparameter": ({"objective": "spo", "objective_args": {"betta": 1}}, "betta"),
    "arguments without objective": ({"objective_args": {"beta": 1}}, "without objective"),
    "arguments beside an instance": ({"objective": DPO(), "objective_args": {"beta": 1}}, "has its own"),
    "both": ({"objective": "spo", "beta": 0.3}, "beta = 0.3 belongs to loss_type"),
    "both losses": ({"objective": "spo", "loss_type": ["ipo"]}, r"loss_type = \['ipo'\] names TRL's losses"),
    "unknown loss type": ({"loss_type": ["simpo"]}, "loss_type must be of"),
    "inner steps of no hinge": ({"objective": "spo", "spo_inner_steps": 1, "spo_inner_lr": 0.1}, "penalty=.hinge"),
    "inner steps without a rate": (
        {"objective": "spo", "objective_args": HINGE, "spo_inner_steps": 1},
        "spo_inner_lr",
    ),
    "a value from nowhere": ({"objective": "spo", "objective_args": HINGE}, "spo_value"),
    "a missing column": ({"objective": "odpo"}, "offset"),
    "no reference": ({"objective": "dpo", "ref": None}, "ref_model is needed, such as copy.deepcopy"),
    "pilots of sums": ({"objective": "sgdpo", "precompute_ref_log_probs": True}, "chosen_pilot"),
    "sft and ld_alpha": ({"loss_type": ["sft"], "ld_alpha": 0.5}, "ld_alpha"),
    "nothing to synchronise": ({"objective": "simpo", "sync_ref_model": True, "ref": None}, "sync_ref_model"),
    "a sparsity": ({"sparsity": "some"}, "sparsity"),
    "no budget": ({"tokens_per_batch": 0}, "tokens_per_batch must be a whole number of at least 1, got 0"),
    "a budget and a batch": ({"tokens_per_batch": 99, "objective": "bco"}, "which pairs are in a forward together"),
    "a budget and inner steps": (
        {"objective": "spo", "objective_args": HINGE, "spo_inner_steps": 1, "spo_inner_lr": 0.1, "tokens_per_batch": 9},
        "spo_inner_steps takes steps on the pairs of a forward",
    ),
    "a workspace": ({"workspace_mib": 0}, "workspace_mib"),
    "a list of names": ({"objective": "dpo", "objective_args": ["beta"]}, r"objective_args must map .* got \['beta'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_construction(tmp_path, case):
    settings, message = REFUSED[case]
    ref = settings.get("ref", "other")
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(tmp_path, ref_model=ref, **{key: value for key, value in settings.items() if key != "ref"})


@pytest.mark.parametrize(
    "which, change, message",
    [
        ("data", lambda data: data.select([]), "train_dataset is empty"),
        ("data", lambda data: data.rename_column("chosen", "chose"), "train_dataset has no column chosen; .*'chose'"),
        ("eval_dataset", lambda data: {"a": data, "b": data.select([])}, r"eval_dataset\['b'\] is empty"),
    ],
)
def test_data_without_pairs_are_refused(tmp_path, which, change, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **{which: change(dataset("pairs"))})


def test_args_that_are_a_folder():
    with pytest.raises(TypeError, match=r"args must be a FusedDPOConfig or a DPOConfig, .* got 'out'"):
        trl.FusedDPOTrainer(model=None, args="out")


@pytest.mark.parametrize(
    "version, settings, message",
    [
        (1, {}, "runs with FSDP2, got fsdp_version 1"),
        (
            2,
            {"objective": SPO(penalty="hinge", value="input"), "spo_inner_steps": 1, "spo_inner_lr": 0.1},
            "FSDP shards",
        ),
    ],
)
def test_refused_under_fsdp(tmp_path, monkeypatch, version, settings, message):
    """Whoever asked for it: a launcher's settings are in accelerate's state alone."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


def test_a_copy_of_a_trained_model_says_that_it_would_run_the_other(tmp_path):
    made = trainer(tmp_path)
    made.train()
    copied = copy.deepcopy(made.model)
    with pytest.raises(RuntimeError, match="deep copy of a model that a trainer has changed"):
        copied(**{key: batch_of(made)[key] for key in ("input_ids", "attention_mask")})
    assert made.model(input_ids=batch_of(made)["input_ids"]).logits.isfinite().all()


def test_a_plain_dpo_config_does(tmp_path):
    made = trl.FusedDPOTrainer(
        make_model("llama"),
        args=config(tmp_path, DPOConfig),
        train_dataset=dataset("pairs"),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(**LORA),
    )
    made.train()
    assert made.state.log_history[-1]["train_loss"] == pytest.approx(0.69, abs=0.02)


def test_another_trainer_is_refused_naming_versions():
    class Moved(DPOTrainer):
        def _compute_loss(self, model, batch):
            raise NotImplementedError

    check_dpo_trainer(DPOTrainer)
    with pytest.raises(
        RuntimeError, match=r"_compute_loss\(model, inputs, return_outputs\).*takes model, batch.*1\.16\.0"
    ):
        check_dpo_trainer(Moved)


def test_mixed_precision_rounds_nothing_of_the_pairs():
    """FSDP casts what it finds in a forward's arguments with this function; a sum of -300 would be off by 1."""
    call = PairLoss(torch.ones(2, 3, dtype=torch.int64), objective=DPO(), ref_logps=torch.tensor([-300.1, -299.9]))
    bare, kept = (_apply_to_tensors(torch.Tensor.bfloat16, {"at_head": given}) for given in (call, Sealed(call)))
    assert bare["at_head"].ref_logps.tolist() == [-300.0, -300.0]
    assert kept["at_head"].value.ref_logps is call.ref_logps
