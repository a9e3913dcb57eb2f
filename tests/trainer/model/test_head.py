"""The fused head in lm_head's place: every listed architecture, tied or not, saved, under peft."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rpo_kernels.integrations.head import FusedLMHead
from tests.trainer.tiny import (
    gradient,
    relative,
    rpo_by_hand,
    shifted_reference,
    tiny_config,
    tiny_llama,
    tiny_model,
    tiny_policy,
    tiny_split,
)
from trainer.data.steps import Step
from trainer.errors import InputError
from trainer.loop import run_step
from trainer.model.head import fuse_head
from trainer.model.loading import save_model
from trainer.model.probe import check_model
from trainer.reference.modes import lookup

STEP = Step((((0, 1),),))
REFERENCE = shifted_reference(2)


def own_loss_and_gradient(model, split):
    model.zero_grad()
    loss = rpo_by_hand(model, split.pairs, REFERENCE, tiny_config(eta=0.5))
    loss.backward()
    return loss.item(), gradient(model)


def fused_loss_and_gradient(model, split):
    model.zero_grad()
    policy, accelerator = tiny_policy(model, eta=0.5)
    check_model(policy, split.pairs)
    return run_step(policy, split, STEP, accelerator, train=True)[0].item(), gradient(model)


TRANSFORMS = [
    ("llama", {}, 1.0, None),
    ("cohere", {}, 0.25, None),
    ("granite", {"logits_scaling": 13.0}, 1 / 13, None),
    ("granitemoe", {}, 0.25, None),
    ("gemma2", {}, 1.0, 5.0),
    ("gemma3_text", {"final_logit_softcapping": None}, 1.0, None),
    ("gemma3_text", {"final_logit_softcapping": 300.0}, 1.0, 300.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "fields", "scale", "softcap"), TRANSFORMS)
def test_what_a_model_does_to_its_logits_is_measured(kind, fields, scale, softcap, dtype):
    head = fuse_head(tiny_model(kind, **fields).to(dtype)).get_output_embeddings()
    assert head.logit_scale == pytest.approx(scale, rel=1e-12)
    assert head.logit_softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-12))


@pytest.mark.parametrize("kind", ["llama", "cohere", "granite", "gemma2", "gpt2", "phi", "olmo3"])
def test_the_fused_loss_is_that_of_the_model_s_own_logits(kind):
    model, split = tiny_model(kind), tiny_split(2)
    split.reference = lookup(REFERENCE)
    loss, wanted = own_loss_and_gradient(model, split)
    fused, got = fused_loss_and_gradient(model, split)
    assert fused == pytest.approx(loss, rel=1e-5)
    assert relative(got, wanted) < 1e-5


class Scaled(LlamaForCausalLM):
    """Scales, then caps, whatever its config says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits.float() * 0.7 / 30)
        return output


def test_a_scale_below_a_softcap_in_float32_is_measured():
    torch.manual_seed(0)
    head = fuse_head(Scaled(tiny_model("llama").config)).lm_head
    assert head.logit_scale == pytest.approx(0.7, rel=1e-7)
    assert head.logit_softcap == pytest.approx(30, rel=1e-7)


def masked(logits):
    logits[..., 7] = float("-inf")
    return logits


FORMS = {
    "clamped": lambda x: x.clamp(-20, 20),
    "biased": lambda x: x + 0.1,
    "cut": lambda x: x[..., :200],
    "masked": masked,
    "of large ones alone": lambda x: torch.where(x.abs() > 100, 2 * x, x),
    "by token": lambda x: x * torch.linspace(1, 2, x.shape[-1]),
    "by position": lambda x: x * torch.linspace(1, 2, x.shape[1])[:, None],
    "negated": lambda x: -x,
    "normalized": lambda x: x.log_softmax(-1),
}


@pytest.mark.parametrize("form", FORMS)
def test_another_form_is_refused_with_what_was_seen(form):
    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = FORMS[form](output.logits)
            return output

    with pytest.raises(InputError, match="Odd: its logits are not .*(becomes|the logits are)"):
        fuse_head(Odd(tiny_model("llama").config))


def test_a_negative_scale_is_refused_as_such():
    with pytest.raises(InputError, match="with a scale > 0: .* becomes .*; change the sign"):
        fuse_head(tiny_model("granite", logits_scaling=-2.0))


def test_a_config_with_which_no_forward_runs_is_refused():
    model = tiny_llama()
    model.model.layers[0].self_attn.head_dim = 5
    with pytest.raises(InputError, match="LlamaForCausalLM: its forward fails on 4 made-up tokens"):
        fuse_head(model)


def test_a_head_that_is_no_linear_is_refused():
    model = tiny_llama()
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(InputError, match="expected an output layer of type Linear, got Sequential"):
        fuse_head(model)


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


@pytest.mark.parametrize("tied", [True, False])
def test_a_fused_model_generates_and_saves_like_any_other(tied, tmp_path):
    plain, fused = tiny_llama(tied), fuse_head(tiny_llama(tied))
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fused.generate(prompt, **settings), plain.generate(prompt, **settings))
    assert (fused.lm_head.weight is fused.model.embed_tokens.weight) == tied

    save_model(fused, NoTokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_works_below_a_peft_model(tied, tmp_path):
    split = tiny_split(2)
    split.reference = lookup(REFERENCE)
    model = fuse_head(tiny_llama(tied))
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora).eval()
    assert type(model.get_base_model().lm_head) is FusedLMHead

    loss, wanted = own_loss_and_gradient(model, split)
    fused, got = fused_loss_and_gradient(model, split)
    assert fused == pytest.approx(loss, rel=1e-5)
    assert relative(got, wanted) < 1e-5
    assert model.get_base_model().lm_head.weight.grad is None

    prompt = torch.tensor([[5, 6, 7]])
    logits = model(prompt).logits
    with model.disable_adapter():
        assert not torch.allclose(model(prompt).logits, logits)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(tied), tmp_path).eval()
    assert torch.equal(loaded(prompt).logits, logits)
