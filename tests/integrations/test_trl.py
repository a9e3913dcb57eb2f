"""RPO in TRL: TRL's own losses where they agree, ours where they do not, errors by name."""

import copy
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from benchmarks import report, trl_integration
from benchmarks.environment import describe
from tests.integrations.test_transformers import batch as padded
from tests.support import ROOT, one_thread
from tests.trainer.tiny import (
    gradient,
    record,
    relative,
    save_tiny,
    tiny_llama,
    tiny_model,
    tiny_policy,
    tiny_tokenizer,
    write_jsonl,
)
from trainer.data.batches import Split
from trainer.data.pairs import IGNORE, Pair, Sequence
from trainer.data.steps import Step
from trainer.loop import run_step
from trainer.reference.modes import lookup

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import dpo_trainer, utils  # noqa: E402

from rpo_kernels.integrations import statistics, trl_metrics  # noqa: E402
from rpo_kernels.integrations.transformers import fuse_lm_head, model_rpo_loss  # noqa: E402
from rpo_kernels.integrations.trl import (  # noqa: E402
    RPOConfig,
    RPOTrainer,
    patch_trl,
    unpatch_trl,
)
from rpo_kernels.integrations.trl_patch import LinearLogProbs  # noqa: E402

# Plain gradient descent, whose steps are as close as the gradients are.
COMMON = {
    "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.01, "optim": "sgd",
    "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "bf16": False,
    "gradient_checkpointing": False, "use_cpu": True, "report_to": [], "save_strategy": "no",
    "disable_tqdm": True, "train_sampling_strategy": "sequential",
}  # fmt: skip
TRL_SFT = {"loss_type": ["sigmoid", "sft"]}  # TRL's mean over the chosen tokens of a micro-batch
OUR_SFT = {"eta": 1.0, "sft_reduction": "token_mean"}
VOCAB = tiny_llama().config.vocab_size
UNTIMED = ("loss", "grad_norm", "rewards", "logps", "logits", "entropy", "mean_token", "num_tokens")


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """Every trainer collects garbage, which takes its time over all that was ever imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def quiet_and_alone(fresh_accelerator):
    datasets.disable_progress_bars()
    with one_thread():
        yield
    unpatch_trl()


def rows(count=8, start=0):
    return datasets.Dataset.from_list([record(i) for i in range(start, start + count)])


def made(kind, folder, *, model=None, reference=True, train=None, **fields):
    """A trainer of a tiny Llama and, as its reference, another one."""
    names = ("eval_dataset", "peft_config", "compute_metrics", "processing_class")
    options = {name: fields.pop(name) for name in names if name in fields}
    config = {DPOTrainer: DPOConfig, RPOTrainer: RPOConfig, SFTTrainer: SFTConfig}[kind]
    if reference:
        options["ref_model"] = tiny_llama(seed=1)
    return kind(
        model=tiny_llama() if model is None else model,
        args=config(str(folder), **COMMON | fields),
        train_dataset=rows() if train is None else train,
        **{"processing_class": tiny_tokenizer()} | options,
    )


def history(trainer):
    """Train; the logged values, without times."""
    trainer.train()
    return [
        {k: v for k, v in row.items() if k.removeprefix("eval_").startswith(UNTIMED)}
        for row in trainer.state.log_history
        if "train_runtime" not in row
    ]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def assert_same_history(found, wanted, besides=("loss/dpo", "loss/sft")):
    assert len(found) == len(wanted) >= 2
    for row, own in zip(found, wanted, strict=True):
        assert {k: v for k, v in row.items() if k.removeprefix("eval_") not in besides} == (
            pytest.approx(own, rel=1e-5, abs=1e-5)
        )


LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
SETTINGS = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "lora": {"reference": False, "peft_config": LORA, "learning_rate": 0.1},
    "prompt tuning": {"reference": False, "peft_config": PROMPT, "learning_rate": 1.0},
    "precomputed": {"precompute_ref_log_probs": True, "reference": False},
    "synced": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "cut": {"max_length": 40},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_that_of_trl_where_the_losses_agree(name, tmp_path):
    own = made(DPOTrainer, tmp_path, **TRL_SFT, **SETTINGS[name])
    wanted, start = history(own), weights(own)
    ours = made(RPOTrainer, tmp_path, **OUR_SFT, **SETTINGS[name])
    before = weights(ours)
    found = history(ours)
    accuracy = "rewards/accuracies"  # a tie, as before the first step, counts half here
    if "reference" in SETTINGS[name]:
        assert found[0].pop(accuracy) + wanted[0].pop(accuracy) >= 0
    assert_same_history(found, wanted)
    for row in found:
        assert row["loss"] == pytest.approx(row["loss/dpo"] + row["loss/sft"], rel=1e-5)
    assert relative(weights(ours), before) > 1e-4  # it trains
    assert relative(weights(ours), start) < 1e-6


LOSSES = {"hinge": 0, "ipo": 0, "exo_pair": 0.1, "nca_pair": 0, "robust": 0.1, "sppo_hard": 0}
LOSSES |= {"apo_zero": 0, "apo_down": 0}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_that_both_have_is_the_same(loss, tmp_path):
    fields = {"loss_type": [loss], "label_smoothing": LOSSES[loss], "max_steps": 1, "beta": 0.3}
    wanted = made(DPOTrainer, tmp_path, **fields)
    found = made(RPOTrainer, tmp_path, eta=0.0, **fields)
    (own,), (ours,) = history(wanted), history(found)
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert ours[name] == pytest.approx(own[name], rel=1e-5)
    assert ours["loss/dpo"] == pytest.approx(own["loss"], rel=1e-5)


def first_step(folder, **fields):
    """The gradient, what is logged, and the trainer of one step that changes nothing."""
    trainer = made(RPOTrainer, folder, max_steps=1, learning_rate=0.0, **fields)
    kept = {}

    def keep(self, *args, **kwargs):
        kept["gradient"] = gradient(trainer.model).clone()

    with mock.patch.object(torch.optim.SGD, "step", keep):
        (row,) = history(trainer)
    return kept["gradient"], row, trainer


@pytest.mark.parametrize("reduction", ["sum", "sequence_mean", "token_mean"])
def test_a_step_does_not_depend_on_its_split_and_is_that_of_our_trainer(reduction, tmp_path):
    fields = {"eta": 0.4, "sft_reduction": reduction, "train": rows(6)}
    splits = ((6, 1), (2, 3), (1, 6), (4, 2))  # the last one has a smaller pass: 4 and 2
    found = [
        first_step(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=passes, **fields
        )
        for size, passes in splits
    ]
    grad, row, trainer = found[0]
    for other, values, _ in found[1:]:
        assert relative(other, grad) < 1e-5
        assert values == pytest.approx(row, rel=1e-5, abs=1e-6)  # small differences of log-probs

    pairs = [
        Pair(*(sequence(example, name) for name in ("chosen", "rejected")))
        for example in trainer.train_dataset
    ]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    reference = torch.stack(trainer.compute_ref_log_probs(trainer.ref_model, batch), 1)
    policy, accelerator = tiny_policy(eta=0.4, sft_reduction=reduction)
    split = Split(pairs, {}, lookup(reference))
    values = run_step(policy, split, Step(((tuple(range(6)),),)), accelerator, train=True)
    assert row["loss"] == pytest.approx(values[0].item(), rel=1e-5)
    assert relative(grad, gradient(policy)) < 1e-5


def sequence(example, name):
    """One of our trainer's sequences from a row that TRL tokenized."""
    ids = np.array(example["prompt_ids"] + example[f"{name}_ids"], dtype=np.int32)
    labels = np.append(ids[1:], IGNORE)
    labels[: len(example["prompt_ids"]) - 1] = IGNORE
    return Sequence(ids, labels.astype(np.int32))


def test_evaluation_does_not_depend_on_its_batches(tmp_path):
    fields = OUR_SFT | {"eta": 0.7, "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    found = []
    for size in (1, 3, 7):
        trainer = made(
            RPOTrainer,
            tmp_path,
            per_device_eval_batch_size=size,
            eval_dataset=rows(7, 20),
            **fields,
        )
        found.append(history(trainer)[1])
    assert found[0]["eval_loss"] == pytest.approx(
        found[0]["eval_loss/dpo"] + 0.7 * found[0]["eval_loss/sft"]
    )
    assert found[1:] == [pytest.approx(found[0], rel=1e-5)] * 2
    metrics = trainer.evaluate(rows(7, 20))
    assert metrics["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-5)
    named = trainer.evaluate({"other": rows(7, 20)})
    assert named["eval_other_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-5)


def test_statistics_are_measured_on_logged_steps_only(tmp_path):
    trainer = made(RPOTrainer, tmp_path, max_steps=5, logging_steps=2, logging_first_step=True)
    measure = mock.Mock(side_effect=statistics.vocabulary_statistics)
    with mock.patch.object(trl_metrics, "vocabulary_statistics", measure):
        found = history(trainer)
    assert measure.call_count == 3  # steps 1, 2, 4
    assert all("entropy" in row for row in found) and len(found) == 3


def test_reference_log_probs_of_another_truncation_are_computed_anew(tmp_path):
    """TRL keys its cache, beside data on disk, by data and model, and truncates later."""
    file = write_jsonl(tmp_path / "pairs.jsonl", [record(i) for i in range(8)])
    train = datasets.Dataset.from_json(file, cache_dir=str(tmp_path / "cache"))
    columns, fields = [], {"precompute_ref_log_probs": True, "truncation_mode": "keep_end"}
    fields |= {"train": train, "processing_class": tiny_tokenizer()}
    for length in (64, 34):
        trainer = made(RPOTrainer, tmp_path, max_length=length, **fields)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        fresh = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        assert torch.stack(fresh) == pytest.approx(
            torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        )
        columns.append(batch["ref_chosen_logps"])
    assert not torch.allclose(*columns)


def test_a_trained_model_is_saved_with_its_card_and_loads(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2}
    trainer = made(RPOTrainer, tmp_path, bf16=None, **fields)
    history(trainer)
    folder = tmp_path / "checkpoint-2"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(
        torch.cat([p.detach().flatten() for p in loaded.parameters()]), weights(trainer)
    )
    card = (tmp_path / "README.md").read_text()
    assert "2405.16436" in card and "RPO" in card


class LogitRows(TorchDispatchMode):
    """The most rows of a tensor over the vocabulary that any operator returns."""

    rows = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == VOCAB:
                self.rows = max(self.rows, x.numel() // VOCAB)
        return out


@pytest.mark.parametrize("kind", [DPOTrainer, RPOTrainer])
def test_a_step_makes_no_logits(kind, tmp_path, monkeypatch):
    """TRL's makes them in one tile, since they are few here."""
    monkeypatch.setattr(statistics, "CPU_TILE", 4096)
    fields = OUR_SFT if kind is RPOTrainer else TRL_SFT
    trainer = made(kind, tmp_path, max_steps=1, per_device_train_batch_size=8, **fields)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    labelled = int(batch["completion_mask"].sum())
    width = trainer.model.config.hidden_size  # the weight's transpose is over the vocabulary too
    assert width < labelled
    with LogitRows() as seen:
        history(trainer)
    assert seen.rows <= width if kind is RPOTrainer else seen.rows >= labelled


REFUSED = [
    ({"loss_type": ["sigmoid", "sft"]}, "loss_type: expected one of .* not 'sft'"),
    ({"loss_type": "simpo"}, "loss_type: expected one of"),
    ({"loss_weights": [1.0]}, r"loss_weights: expected None .*eta.* got \[1.0\]"),
    ({"ld_alpha": 0.5}, "ld_alpha: expected None"),
    ({"f_divergence_type": "forward_kl"}, "f_divergence_type: expected 'reverse_kl'"),
    ({"use_weighting": True}, "use_weighting: expected False"),
    ({"padding_free": True}, "padding_free: expected False"),
    ({"use_liger_kernel": True}, "use_liger_kernel: expected False"),
    ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef: expected None or 0"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0.0"),
    ({"torch_compile": True}, "torch_compile: expected False"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: expected 0 with"),
    ({"eta": -1.0}, "eta: expected a finite number >= 0"),
    ({"sft_reduction": "mean"}, "sft_reduction: expected one of"),
    ({"grad_tolerance": 1.0}, "grad_tolerance: expected a share"),
    ({"strategy": "fast"}, "strategy: expected one of"),
    ({"backend": "cuda"}, "backend: expected one of"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_an_option_that_does_not_fit_is_refused_by_name(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RPOConfig(str(tmp_path), **COMMON | fields)


def test_arguments_that_do_not_fit_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="compute_metrics: expected None"):
        made(RPOTrainer, tmp_path, compute_metrics=lambda p: {})
    with pytest.raises(TypeError, match="args: expected an RPOConfig, got DPOConfig"):
        RPOTrainer(tiny_llama(), args=DPOConfig(str(tmp_path), **COMMON), train_dataset=rows())
    adapted = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="type Linear, got ModulesToSaveWrapper"):
        made(RPOTrainer, tmp_path, reference=False, peft_config=adapted)
    experts = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected 0 for a mixture"):
        made(RPOTrainer, tmp_path, model=tiny_model("mixtral", **experts))
    trainer = made(RPOTrainer, tmp_path)
    with pytest.raises(ValueError, match="return_outputs: expected False"):
        trainer.predict(trainer.train_dataset)
    assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head


def completions():
    return rows().rename_column("chosen", "completion").remove_columns("rejected")


PATCHED = {
    "dpo": (DPOTrainer, "llama", TRL_SFT),
    "dpo with a softcap": (DPOTrainer, "gemma2", TRL_SFT),
    "wpo": (DPOTrainer, "llama", {"use_weighting": True}),
    "sft": (SFTTrainer, "gemma2", {"reference": False, "gradient_accumulation_steps": 2}),
    "dft": (SFTTrainer, "llama", {"reference": False, "loss_type": "dft"}),
}


@pytest.mark.parametrize("name", PATCHED)
def test_trl_logs_the_same_on_our_head(name, tmp_path):
    kind, architecture, fields = PATCHED[name]
    if kind is SFTTrainer:
        fields = fields | {"train": completions()}

    def run():
        trainer = made(kind, tmp_path, model=tiny_model(architecture), **fields)
        return history(trainer), weights(trainer)

    wanted, own = run()
    patch_trl()
    with mock.patch.object(ChunkedLogProbFunction, "forward", side_effect=AssertionError):
        found, ours = run()
    assert_same_history(found, wanted, besides=())
    assert "entropy" in found[0] and "mean_token_accuracy" in found[0]
    assert relative(ours, own) < 1e-6


def test_ignored_positions_cost_nothing_on_a_cpu_either(tmp_path):
    trainer = made(DPOTrainer, tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    labelled, scored = int(batch["completion_mask"].sum()), []
    patch_trl()
    own = LinearLogProbs.apply

    def apply(hidden, *args):
        scored.append(len(hidden))
        return own(hidden, *args)

    with mock.patch.object(LinearLogProbs, "apply", apply):
        history(trainer)
    assert scored == [labelled, labelled] and labelled < batch["input_ids"].numel() / 2


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_patched_function_is_trl_s_at_any_temperature(softcap):
    make = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=make) for shape in ((9, 8), (50, 8), (50,))]
    targets = torch.randint(50, (9,), generator=make)
    outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    results = []
    for function in (ChunkedLogProbFunction, LinearLogProbs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        found = function.apply(*leaves, targets, 0.7, 32, softcap, 1.5, outputs)
        (found[0] * torch.arange(9)).sum().backward()
        results.append([*found, *(x.grad for x in leaves)])
    for ours, own in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert function.apply(*leaves, targets, 1.0, 32)[1:] == (None,) * 4
    with pytest.raises(RuntimeError, match="patch_trl: the entropy .* unpatch_trl"):
        found[1].sum().backward()


MOVED = {
    "the head's arguments": (utils, "add_fused_lm_head", lambda model, outputs: None),
    "the head": (utils, "add_fused_lm_head", None),
    "a method": (DPOTrainer, "compute_ref_log_probs", lambda self, inputs: None),
    "the function": (ChunkedLogProbFunction, "forward", lambda ctx, hidden, weight: None),
    "what the head calls": (
        utils,
        "add_fused_lm_head",
        lambda model, temperature, cast_lm_head_to_fp32, outputs: None,
    ),
}


@pytest.mark.parametrize("what", MOVED)
def test_another_trl_is_an_error_that_says_so(what, monkeypatch, tmp_path):
    place, name, value = MOVED[what]
    if value is None:
        monkeypatch.delattr(place, name)
    else:
        monkeypatch.setattr(place, name, value)
    with pytest.raises(RuntimeError, match=rf"built on TRL 1.16; TRL .*{name}"):
        patch_trl()
    with pytest.raises(RuntimeError, match=rf"built on TRL 1.16; TRL .*{name}"):
        RPOConfig(str(tmp_path))
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_a_new_option_of_trl_is_an_error(monkeypatch, tmp_path):
    field = copy.copy(DPOConfig.__dataclass_fields__["beta"])
    field.name = "gamma"
    monkeypatch.setitem(DPOConfig.__dataclass_fields__, "gamma", field)
    with pytest.raises(RuntimeError, match=r"options \['gamma'\] came or went"):
        RPOConfig(str(tmp_path))


def test_the_readme_example_runs(tmp_path, monkeypatch):
    """Its config as it stands: TRL's defaults, bf16 and gradient checkpointing among them."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(from rpo_kernels.integrations.trl .*?)```", readme, re.S)
    scope = {"model": str(tmp_path / "model"), "pairs": rows(3)}
    exec(block.replace('"out",', '"out", use_cpu=True, report_to=[],'), scope)  # no GPU here
    assert scope["trainer"].state.global_step == 3 and (tmp_path / "out").exists()


def test_the_benchmark_compares_losses_and_gradients(tmp_path):
    save_tiny(tmp_path / "model")
    write_jsonl(tmp_path / "trl.jsonl", [record(i) for i in range(6)])
    base = trl_integration.run(trl_integration.BASE, "float32", tmp_path, 1)
    runs = {trl_integration.BASE: base}
    for name in trl_integration.TRAINERS[1:]:
        runs[name] = trl_integration.run(name, "float32", tmp_path, 1)
        assert len(runs[name]["seconds"]) == len(runs[name]["losses"]) == 3
        assert trl_integration.difference(runs[name], base) < 1e-5
    other = base | {"gradient_norms": [1.01 * x for x in base["gradient_norms"]]}
    assert trl_integration.difference(other, base) == pytest.approx(0.01)
    for run in runs.values():
        run |= {"status": "ok", "median_s": 1.5, "peak_bytes": 2e9, "difference": 0, "agrees": True}
    runs["RPOTrainer"]["agrees"] = False
    runs[trl_integration.TRAINERS[1]] = {"status": "failed", "reason": "planted"}
    lines = trl_integration.table(runs, "float32").splitlines()
    assert lines[1].startswith("DPOTrainer ") and "failed: planted" in lines[2]
    assert lines[3].endswith("DISAGREES")
    document = {"settings": {"pairs": 2, "max_length": 512, "steps": 3}, "file": "x.json"}
    document |= {"runs": {"float32": runs}, **describe("cpu")}
    section = report.trl_section(document)
    assert "| **RPOTrainer, float32** | 1.5 | 1 | 2 | 1 | 0 (disagrees) |" in section


def on_ranks(folder, size, passes):
    """The first step's logged values, and evaluation's, whatever the number of processes."""
    fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
    fields |= {"per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = made(RPOTrainer, folder, train=rows(8), eval_dataset=rows(5, 30), **OUR_SFT, **fields)
    return history(trainer), weights(trainer).tolist(), trainer.accelerator.num_processes


def sharding_errors():
    """Relative error of a sharded model's gradient, for either strategy."""
    errors = []
    for strategy in ("stream", "recompute"):
        grads = []
        for sharded in (False, True):
            model = fuse_lm_head(tiny_llama())
            for part in [*model.model.layers, model] if sharded else ():
                fully_shard(part)
            out = model_rpo_loss(model, *padded(), torch.linspace(-60, -20, 4), strategy=strategy)
            out.loss.backward()
            whole = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
            grads.append(torch.cat([g.flatten() for g in whole]))
        errors.append(relative(grads[1], grads[0]))
    return errors


def test_two_processes_train_as_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["-m", "tests.integrations.test_trl"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found, found_weights, ranks), errors = json.loads((tmp_path / "results.json").read_text())
    wanted, own_weights, _ = on_ranks(tmp_path, 4, 2)
    assert ranks == 2
    assert found == [pytest.approx(row, rel=1e-5, abs=1e-5) for row in wanted]
    assert relative(torch.tensor(found_weights), torch.tensor(own_weights)) < 1e-6
    assert len(errors) == 2 and max(errors) < 1e-6


if __name__ == "__main__":  # what the two processes run
    with one_thread():
        results = on_ranks(sys.argv[1], 2, 2), sharding_errors()
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
