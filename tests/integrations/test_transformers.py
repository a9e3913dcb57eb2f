"""Losses of transformers models without logits, against the models' own logits."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from rpo_kernels.integrations import statistics
from rpo_kernels.integrations.statistics import vocabulary_statistics
from rpo_kernels.integrations.transformers import (
    IGNORE,
    fuse_lm_head,
    measure_transform,
    model_logps,
    model_rpo_loss,
)
from tests.support import ROOT, one_thread
from tests.trainer.tiny import gradient, relative, tiny_llama, tiny_model


@pytest.fixture(autouse=True)
def one_thread_each():
    with one_thread():
        yield


# What the configs in `tests.trainer.tiny` say of logits; other architectures leave them alone.
SCALES = {"cohere": 0.25, "cohere2": 0.25, "granite": 0.25, "granitemoe": 0.25}
CAPS = {"gemma2": 5.0, "gemma3_text": 5.0}
KINDS = (
    "bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2",
    "gpt_neox", "granite", "granitemoe", "llama", "mamba", "mistral", "mixtral", "olmo", "olmo2",
    "olmo3", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = {"beta": 0.3, "eta": 0.5, "sft_reduction": "token_mean"}


def batch(pairs=2, length=12, seed=0):
    """Padded preference pairs: ids, attention mask, labels; the last rows are shorter."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (2 * pairs, length), generator=make)
    mask = torch.ones_like(ids)
    for row in range(2 * pairs):
        mask[row, length - row % 3 :] = 0
    labels = torch.where(mask == 1, ids, IGNORE)
    labels[:, :4] = IGNORE  # the prompt
    return ids, mask, labels


def logps_by_hand(model, ids, mask, labels):
    """(S,) from materialized logits, the shift written out; and token counts."""
    logits, targets = model(input_ids=ids, attention_mask=mask).logits[:, :-1], labels[:, 1:]
    kept = targets != IGNORE
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * kept).sum(1), kept.sum(1)


def rpo_by_hand(model, ids, mask, labels, ref_logps):
    """The loss of `OPTIONS`."""
    logps, counts = logps_by_hand(model, ids, mask, labels)
    (c, r), (ref_c, ref_r) = logps.chunk(2), ref_logps.chunk(2)
    dpo = -logsigmoid(0.3 * ((c - ref_c) - (r - ref_r))).mean()
    return dpo - 0.5 * c.sum() / counts.chunk(2)[0].sum()


def differentiated(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.item(), gradient(model)


def assert_same(found, wanted):
    (loss, grad), (own_loss, own_grad) = found, wanted
    assert loss == pytest.approx(own_loss, rel=1e-5)
    assert relative(grad, own_grad) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_every_architecture_are_those_of_its_own_logits(kind):
    model, (ids, mask, labels) = tiny_model(kind), batch()
    ref_logps = torch.linspace(-60, -20, 4)
    inputs = {"input_ids": ids, "attention_mask": mask}
    rpo = differentiated(model, rpo_by_hand(model, ids, mask, labels, ref_logps))
    sft = differentiated(model, model(**inputs, labels=labels).loss)
    logits, logps = model(**inputs).logits, logps_by_hand(model, ids, mask, labels)[0]

    assert measure_transform(model) == (SCALES.get(kind, 1.0), CAPS.get(kind))
    assert fuse_lm_head(model) is model and fuse_lm_head(model) is model  # twice is once
    out = model_rpo_loss(model, ids, mask, labels, ref_logps, **OPTIONS)
    assert_same(differentiated(model, out.loss), rpo)
    fused = model(**inputs, labels=labels)
    assert fused.logits is None
    assert_same(differentiated(model, fused.loss), sft)
    torch.testing.assert_close(model_logps(model, ids, mask, labels), logps, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**inputs).logits, logits)


def test_the_sft_loss_takes_its_count_and_shifted_labels_as_transformers_does():
    model, (ids, mask, labels) = tiny_llama(), batch()
    inputs = {"input_ids": ids, "attention_mask": mask}
    cases = (
        {"labels": labels, "num_items_in_batch": torch.tensor(7)},
        {"labels": labels, "shift_labels": labels.roll(3, 1)},
    )
    wanted = [model(**inputs, **case).loss.item() for case in cases]
    fuse_lm_head(model)
    assert [model(**inputs, **case).loss.item() for case in cases] == pytest.approx(wanted)
    (loss,) = model(**inputs, labels=labels, return_dict=False)
    assert loss.item() == pytest.approx(model(**inputs, labels=labels).loss.item())
    assert model(**inputs, labels=torch.full_like(labels, IGNORE)).loss.item() == 0


class Rows(torch.utils.data.Dataset):
    """Sequences of different length, labelled from their fourth token on."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        ids, mask, labels = (x[i % 4] for x in batch(seed=i))
        labels = labels.where(torch.arange(12) < 12 - i, torch.tensor(IGNORE))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained(model, folder, size, accumulation):
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        max_steps=2, logging_steps=1, learning_rate=0.1, optim="sgd", use_cpu=True, seed=0,
        report_to=[], save_strategy="no", disable_tqdm=True, eval_strategy="steps", eval_steps=1,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    names = ("loss", "grad_norm", "eval_loss")
    return [row[name] for row in trainer.state.log_history for name in names if name in row]


def test_a_plain_trainer_trains_on_the_fused_loss(tmp_path, fresh_accelerator):
    wanted = trained(tiny_llama(), tmp_path, 3, 1)
    assert len(wanted) == 6
    assert trained(fuse_lm_head(tiny_llama()), tmp_path, 3, 1) == pytest.approx(wanted, rel=1e-5)
    split = trained(fuse_lm_head(tiny_llama()), tmp_path, 1, 3)
    assert split == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_fused_model_generates_saves_and_copies_like_any_other(tied, tmp_path):
    plain, fused = tiny_llama(tied), fuse_lm_head(tiny_llama(tied))
    prompt, settings = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fused.generate(prompt, **settings), plain.generate(prompt, **settings))
    assert (fused.lm_head.weight is fused.model.embed_tokens.weight) == tied
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in loaded.state_dict().items())

    twin, (ids, mask, labels) = copy.deepcopy(fused), batch()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    own = plain(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    assert twin(input_ids=ids, attention_mask=mask, labels=labels).loss.item() == pytest.approx(own)


def test_the_losses_reach_adapters():
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model, (ids, mask, labels) = get_peft_model(tiny_llama(), lora), batch()
    ref_logps = torch.linspace(-60, -20, 4)
    wanted = differentiated(model, rpo_by_hand(model, ids, mask, labels, ref_logps))
    fuse_lm_head(model.get_base_model())
    out = model_rpo_loss(model, ids, mask, labels, ref_logps, **OPTIONS)
    assert_same(differentiated(model, out.loss), wanted)


class Clipped(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.clamp(-3, 3)
        return output


class Biased(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


class Cut(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :200]
        return output


class Normed(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        hidden = self.model(*args, **kwargs).last_hidden_state
        self.logits = self.lm_head(hidden / 2)
        return self


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Clipped, "Clipped: its logits are not softcap.* becomes"),
        (Biased, "Biased: its logits are not softcap.* becomes"),
        (Cut, "Cut: its logits are not softcap.* the logits are"),
        (Normed, "Normed: expected lm_head to get the last hidden states"),
    ],
)
def test_a_forward_that_does_something_else_is_refused(kind, message):
    model = kind(tiny_llama().config)
    head = model.lm_head
    with pytest.raises(ValueError, match=message):
        fuse_lm_head(model)
    assert model.lm_head is head and "forward" not in model.__dict__
    assert "forward" not in model.model.__dict__ and "forward" not in head.__dict__


def test_what_cannot_be_fused_is_refused():
    model, (ids, mask, labels) = tiny_llama(), batch()
    with pytest.raises(ValueError, match="model: expected one prepared by fuse_lm_head"):
        model_rpo_loss(model, ids, mask, labels, None)
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match="expected an output layer of type Linear, got Sequential"):
        fuse_lm_head(model)
    model = fuse_lm_head(tiny_model("mixtral"))
    with pytest.raises(ValueError, match="output_router_logits: expected False"):
        model(input_ids=ids, labels=labels, output_router_logits=True)


@pytest.mark.parametrize("transform", [{}, {"logit_scale": 0.5, "logit_softcap": 2.0}])
def test_statistics_are_those_of_the_logits(transform, monkeypatch):
    monkeypatch.setattr(statistics, "CPU_TILE", 96)  # tiles that end within the vocabulary
    monkeypatch.setattr(statistics, "ROWS", 5)
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, 8, generator=make), torch.randn(71, 8, generator=make)
    bias = torch.randn(71, generator=make)
    logits = hidden.double() @ weight.double().T + bias.double()
    if transform:
        logits = 2 * torch.tanh(logits * 0.5 / 2)
    targets = torch.randint(71, (3, 4), generator=make)
    targets[0] = logits[0].argmax(-1)
    targets[1, 1:] = IGNORE
    kept, logp = targets != IGNORE, logits.log_softmax(-1)
    found = vocabulary_statistics(hidden, weight, targets, bias=bias, **transform)
    wanted = (
        -(logp.exp() * logp).sum(-1), logits.mean(-1), targets == logits.argmax(-1),
        (2 * logp).logsumexp(-1),
    )  # fmt: skip
    assert found.is_top1[0].all() and not found.is_top1[1:].all()
    for out, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(out.double(), truth * kept.double(), rtol=1e-5, atol=1e-6)


def test_the_first_of_equal_logits_is_the_most_likely_token(monkeypatch):
    hidden, weight = torch.ones(2, 4), torch.zeros(40, 4)
    weight[[7, 30]] = 1.0
    for tile in (4, 2**19):  # the two in different tiles, and in one
        monkeypatch.setattr(statistics, "CPU_TILE", tile)
        assert vocabulary_statistics(hidden, weight, torch.tensor([7, 30])).is_top1.tolist() == [
            True,
            False,
        ]


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and "t.default" not in str(function):
                self.elements = max(self.elements, x.numel())
        return out


def test_the_readme_example_runs():
    model, (ids, mask, labels) = tiny_llama(), batch()
    (block,) = re.findall(
        r"```python\n(from rpo_kernels.integrations.transformers .*?)```", README, re.S
    )
    scope = {"torch": torch, "model": model, "input_ids": ids, "attention_mask": mask}
    exec(block, scope | {"labels": labels})
    assert gradient(model).norm() > 0


def test_statistics_make_no_logits():
    rows, vocab = 600, 30_000
    hidden, weight = torch.randn(rows, 16), torch.randn(vocab, 16)
    targets = torch.randint(vocab, (rows,))
    with Largest() as seen:
        vocabulary_statistics(hidden, weight, targets)
    assert seen.elements <= max(statistics.CPU_TILE, weight.numel()) < rows * vocab / 8


def test_the_package_needs_torch_alone():
    code = (
        "import sys, rpo_kernels\n"
        "print([x for x in ('transformers', 'trl', 'datasets', 'peft') if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
