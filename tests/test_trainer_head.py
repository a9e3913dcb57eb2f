"""The fused head in lm_head's place: every listed architecture, tied or not, saved, under peft."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trainer_tiny import (
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
from transformers import AutoModelForCausalLM

from trainer.config import InputError
from trainer.head import DIVIDED, MULTIPLIED, PLAIN, SOFTCAPPED, FusedLMHead, fuse_lm_head
from trainer.loading import save_model
from trainer.loop import run_step
from trainer.model import check_model
from trainer.packing import Step
from trainer.reference import lookup

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
    check_model(policy, split.pairs[0])
    return run_step(policy, split, STEP, accelerator, train=True)[0].item(), gradient(model)


@pytest.mark.parametrize("kind", sorted(PLAIN | SOFTCAPPED | MULTIPLIED | DIVIDED))
def test_the_fused_loss_is_that_of_the_model_s_own_logits(kind):
    model, split = tiny_model(kind), tiny_split(2)
    split.reference = lookup(REFERENCE)
    loss, wanted = own_loss_and_gradient(model, split)
    fused, got = fused_loss_and_gradient(model, split)
    assert fused == pytest.approx(loss, rel=1e-5)
    assert relative(got, wanted) < 1e-5


def test_an_unknown_architecture_says_what_to_pass():
    with pytest.raises(InputError, match="'stablelm' does to its logits.*pass logit_scale"):
        fuse_lm_head(tiny_model("stablelm"))
    head = fuse_lm_head(tiny_model("stablelm"), logit_scale=1.0).lm_head
    assert (head.logit_scale, head.logit_softcap) == (1.0, None)
    head = fuse_lm_head(tiny_model("stablelm"), logit_softcap=30.0).lm_head
    assert (head.logit_scale, head.logit_softcap) == (1.0, 30.0)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_a_missed_logit_transform_is_noticed(kind):
    policy, _ = tiny_policy(tiny_model(kind))
    head = policy.model.get_output_embeddings()
    head.logit_softcap, head.logit_scale = None, 1.0
    with pytest.raises(InputError, match="its logits are not softcap.*pass the right"):
        check_model(policy, tiny_split(1).pairs[0])


def test_a_head_that_is_no_linear_is_refused():
    model = tiny_llama()
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(InputError, match="expected an output layer of type Linear, got Sequential"):
        fuse_lm_head(model)


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


@pytest.mark.parametrize("tied", [True, False])
def test_a_fused_model_generates_and_saves_like_any_other(tied, tmp_path):
    plain, fused = tiny_llama(tied), fuse_lm_head(tiny_llama(tied))
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
    model = fuse_lm_head(tiny_llama(tied))
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
