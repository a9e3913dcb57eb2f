"""LoRA and QLoRA: what is trained, what the reference is, what is saved, what is refused."""

import copy
import importlib.util
import math

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rpo_kernels import fused_rpo_loss
from tests.support import assert_within_plain_budget
from tests.trainer.tiny import (
    EPS,
    assert_is_step,
    gradient,
    in_float64,
    record,
    relative,
    save_tiny,
    shifted_reference,
    tiny_config,
    tiny_llama,
    tiny_policy,
    tiny_split,
    true_step,
    write_jsonl,
)
from trainer import run
from trainer.config.recipe import parse_config
from trainer.data.batches import pack
from trainer.data.steps import Step
from trainer.errors import InputError
from trainer.loop import run_step
from trainer.model.adapters import add_adapters, quantization, switched_off
from trainer.model.head import fuse_head
from trainer.model.loading import load_model
from trainer.reference.cache import model_key
from trainer.reference.modes import lookup, scorer

STEP = Step((((0, 1),),))
TIMINGS = ("tokens_per_second", "step_seconds", "eval/seconds", "peak_memory_gb")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """``train(*words)`` runs a small recipe with LoRA: rows of metrics, and the model folder."""
    folder = tmp_path_factory.mktemp("adapters")
    recipe = {
        "model_name_or_path": save_tiny(folder / "model"),
        "train_file": write_jsonl(folder / "train.jsonl", [record(i) for i in range(8)]),
        "eval_file": write_jsonl(folder / "eval.jsonl", [record(i) for i in range(8, 12)]),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "cpu_threads": 1,
        "use_peft": True,
        "lora_r": 4,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))

    def train(*words):
        out = folder / f"out{len(list(folder.iterdir()))}"
        own = ["--config", str(folder / "tiny.yaml"), "--output_dir", str(out)]
        threads = torch.get_num_threads()
        rows = run.run(parse_config([*own, *map(str, words)]))
        torch.set_num_threads(threads)
        rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]
        return rows, out / "model"

    train.base = folder / "model"
    return train


def adapted(model=None, **fields):
    """A `PreferenceModel` with adapters that are not zero, as after some training."""
    policy, accelerator = tiny_policy(model, eta=0.5)
    config = tiny_config(use_peft=True, lora_r=4, **fields)
    policy.model = add_adapters(policy.model, config)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return policy, accelerator


def test_precomputed_online_and_adapter_references_are_equal(train):
    rows, _ = train("--lora_dropout", 0.2)
    for value in (rows[0]["eval/loss/dpo"], rows[1]["loss/dpo"]):
        assert value == pytest.approx(math.log(2), rel=4 * EPS)  # of four pairs
    assert abs(rows[-1]["eval/rewards/margins"]) > 1e-2
    for mode in ("online", "adapter"):
        assert train("--lora_dropout", 0.2, "--reference", mode)[0] == rows
    assert train()[0][1:] != rows[1:]  # dropout was there


def test_the_adapter_folder_loads_and_merges(train):
    rows, folder = train("--lora_target_modules", "q_proj", "mlp.down_proj")
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not names & {"model.safetensors"}
    prompt = torch.tensor([[5, 6, 7]])
    base = AutoModelForCausalLM.from_pretrained(train.base)
    before = base(prompt).logits
    loaded = PeftModel.from_pretrained(base, folder)
    after = loaded(prompt).logits
    assert relative(after, before) > 1e-3
    with in_float64():
        truth = copy.deepcopy(loaded).double()(prompt).logits
    merged = loaded.merge_and_unload()(prompt).logits
    assert_within_plain_budget(*({"logits": x.detach()} for x in (merged, after, truth)))
    with pytest.raises(InputError, match="holds a peft adapter; expected a whole model"):
        train("--model_name_or_path", folder)


def test_only_adapters_are_trained_and_the_loss_sees_a_frozen_head(monkeypatch):
    seen, split = [], tiny_split(2)
    monkeypatch.setattr(
        "trainer.model.policy.fused_rpo_loss",
        lambda h, w, **k: seen.append(w.requires_grad) or fused_rpo_loss(h, w, **k),
    )
    split.reference = lookup(shifted_reference(2))
    policy, accelerator = adapted()
    run_step(policy, split, STEP, accelerator, train=True)
    assert seen == [False]
    trained = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in policy.named_parameters() if "lora_" in name}
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("whole", [(), ("lm_head",), ("embed_tokens", "lm_head")])
def test_loss_and_gradient_are_those_of_the_model_s_own_logits(whole):
    split = tiny_split(2)
    split.reference = lookup(shifted_reference(2))
    policy, accelerator = adapted(tiny_llama(tied=False), lora_modules_to_save=whole)
    truth = true_step(policy.model, split.pairs, shifted_reference(2), tiny_config(eta=0.5))
    values = run_step(policy, split, STEP, accelerator, train=True)
    assert_is_step(values, gradient(policy), truth)
    assert all(p.grad is not None for n, p in policy.named_parameters() if "modules_to_save" in n)


@pytest.mark.parametrize("whole", [(), ("lm_head",)])
def test_the_adapter_reference_is_the_model_before_it_was_adapted(whole):
    batch = pack(tiny_split(2).pairs, (0, 1))
    start = scorer(*tiny_policy(tiny_llama(tied=False)))(batch)
    policy, accelerator = adapted(
        tiny_llama(tied=False), lora_modules_to_save=whole, lora_dropout=0.5
    )
    policy.train()
    assert torch.equal(scorer(policy, accelerator)(batch), start)
    assert policy.training and all(
        p.requires_grad for n, p in policy.named_parameters() if "lora_" in n
    )
    with switched_off(tiny_policy()[0]):  # nothing to switch off
        pass


REFUSED = [
    (True, {"lora_target_modules": ("lm_head",)}, "an adapter on lm_head would not reach"),
    (False, {"lora_target_modules": ("q_proj", "lm_head")}, "an adapter on lm_head would not"),
    (True, {"lora_target_modules": ("embed_tokens",)}, "embedding are one weight"),
    (True, {"lora_modules_to_save": ("lm_head",)}, "embedding are one weight"),
    (True, {"lora_modules_to_save": ("embed_tokens",)}, "embedding are one weight"),
    (False, {"lora_modules_to_save": ("lm_haed",)}, "lora_modules_to_save: no module is called"),
    (False, {"lora_target_modules": ("q_proj", "v_porj")}, "lora_target_modules: no module is "
     "called v_porj; the model has act_fn, .*lm_head, .*v_proj$"),
    (False, {"lora_target_modules": ("proj",)}, "lora_target_modules: no module is called proj"),
    (False, {"lora_target_modules": ("mlp",)}, "lora_target_modules: Target module .*MLP"),
]  # fmt: skip


@pytest.mark.parametrize(("tied", "fields", "message"), REFUSED, ids=str)
def test_modules_that_cannot_be_adapted_are_refused(tied, fields, message):
    policy, _ = tiny_policy(tiny_llama(tied))
    with pytest.raises(InputError, match=message):
        add_adapters(policy.model, tiny_config(use_peft=True, **fields))


def test_frozen_weights_may_be_bfloat16(tmp_path):
    config = tiny_config(use_peft=True, dtype="bfloat16", model_dtype="bfloat16")
    policy, accelerator = tiny_policy(load_model(save_tiny(tmp_path), config))
    policy.model = add_adapters(policy.model, config)
    types = {("lora_" in name, p.dtype) for name, p in policy.named_parameters()}
    assert types == {(False, torch.bfloat16), (True, torch.float32)}
    split = tiny_split(2)
    with torch.autocast("cpu", torch.bfloat16):
        split.reference = scorer(policy, accelerator)
        values = run_step(policy, split, STEP, accelerator, train=True)
    assert values[1].item() == pytest.approx(math.log(2), rel=2 * EPS)  # two pairs, no margin
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.requires_grad)


def test_quantizing_needs_its_package(monkeypatch):
    assert quantization(tiny_config()) is None
    config = tiny_config(use_peft=True, load_in_4bit=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="load_in_4bit: .* run: pip install bitsandbytes"):
        quantization(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="load_in_4bit: needs a GPU"):
        quantization(config)


def dequantized(model):
    """A copy with ordinary layers of what the 4-bit weights stand for."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    copied = copy.deepcopy(model)
    for parent in list(copied.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Linear4bit:
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
                plain.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                plain.weight.data = plain.weight.data.float()
                setattr(parent, name, plain.requires_grad_(False))
    return copied


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
def test_4_bit_weights_train_adapters(tmp_path, monkeypatch):
    """One step in training mode, which bitsandbytes can do on a CPU."""
    config = tiny_config(use_peft=True, load_in_4bit=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    how = quantization(config)
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path), quantization_config=how)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert model_key(fuse_head(model), "float32") != model_key(fuse_head(tiny_llama()), "float32")
    split = tiny_split(2)
    split.reference = lookup(shifted_reference(2))
    policy, accelerator = adapted(model)
    policy.train()
    config = tiny_config(eta=0.5)
    truth = true_step(dequantized(policy.model), split.pairs, shifted_reference(2), config)
    values = run_step(policy, split, STEP, accelerator, train=True)
    assert_is_step(values, gradient(policy), truth)
