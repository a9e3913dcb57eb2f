"""What trades speed for memory in the layers: checkpointing, offloading, Liger's kernels."""

import contextlib

import pytest
import torch
from liger_kernel.transformers import monkey_patch
from torch import nn

from tests.support import assert_within_plain_budget
from tests.trainer.tiny import (
    gradient,
    in_float64,
    relative,
    rpo_by_hand,
    save_tiny,
    shifted_reference,
    tiny_config,
    tiny_model,
    tiny_policy,
    tiny_split,
)
from trainer.data.batches import pack, share_prefixes
from trainer.errors import InputError
from trainer.model import loading
from trainer.model.loading import check_layers, load_model
from trainer.model.policy import PreferenceModel, compile_layers, loss_options
from trainer.model.probe import check_model


def kept_and_gradient(policy):
    """Bytes kept for backward by the backbone, parameters apart, and the gradient."""
    kept, parameters = [], {p.data_ptr() for p in policy.parameters()}

    def note(tensor):
        if tensor.data_ptr() not in parameters:
            kept.append(tensor.nbytes)
        return tensor

    batch = pack(share_prefixes(tiny_split(3).pairs), (0, 1, 2))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.hidden(batch)
    policy.zero_grad()
    policy(batch, shifted_reference(3).T.reshape(-1), 3, 100).loss.backward()
    return sum(kept), gradient(policy)


def test_checkpointing_and_offloading_change_memory_but_not_the_gradient(tmp_path):
    source, options = save_tiny(tmp_path), tiny_policy()[0].options
    plain = PreferenceModel(load_model(source, tiny_config()), options)
    config = tiny_config(gradient_checkpointing=True)
    checkpointed = PreferenceModel(load_model(source, config), options)
    offloaded = PreferenceModel(load_model(source, config), options, offload=True)
    (kept, wanted), (fewer, got) = kept_and_gradient(plain), kept_and_gradient(checkpointed)
    assert fewer < kept / 5
    assert torch.equal(got, wanted)
    assert torch.equal(kept_and_gradient(offloaded)[1], wanted)


NOISY = [
    ("starcoder2", {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3}),
    ("mixtral", {"router_jitter_noise": 0.3}),
    ("gpt2", {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}),
    ("phimoe", {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3, "num_local_experts": 4}),
    ("opt", {"dropout": 0.3, "layerdrop": 0.3, "ffn_dim": 64, "word_embed_proj_dim": 32}),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "fields"), NOISY, ids=lambda x: str(x)[:12])
def test_a_model_s_own_noise_is_off(kind, fields, checkpointing, tmp_path):
    """Training gives the gradient of the model in evaluation, whatever its noise is called."""
    plain, pairs, ref_logps = tiny_model(kind, **fields), tiny_split(2).pairs, shifted_reference(2)
    plain.save_pretrained(tmp_path)
    config = tiny_config(eta=0.5, gradient_checkpointing=checkpointing)
    policy = PreferenceModel(load_model(str(tmp_path), config), loss_options(config)).train()
    check_model(policy, pairs)
    policy(pack(pairs, (0, 1)), ref_logps.T.reshape(-1), 2, 1).loss.backward()
    rpo_by_hand(plain, pairs, ref_logps, config).backward()
    assert relative(gradient(policy), gradient(plain)) < 1e-5


def test_a_softcap_of_attention_is_kept(tmp_path):
    model, ids = tiny_model("gemma2"), torch.arange(30, 60)[None]
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), tiny_config())
    found, plain = (x.base_model(ids).last_hidden_state for x in (loaded, model))
    with in_float64():
        truth = model.double().base_model(ids).last_hidden_state
    assert_within_plain_budget(*({"states": x.detach()} for x in (found, plain, truth)))


def test_compiled_layers_give_the_same_gradient_without_compiling_every_batch(monkeypatch):
    compiled = nn.Module.compile
    monkeypatch.setattr(  # the compiler's front end is what may go wrong; its back end takes long
        nn.Module, "compile", lambda layer, **how: compiled(layer, **how, backend="aot_eager")
    )
    torch._dynamo.reset()
    (plain, _), (policy, _), (exact, _) = tiny_policy(), tiny_policy(), tiny_policy()
    compile_layers(policy)
    exact.double()
    pairs, graphs = share_prefixes(tiny_split(6).pairs), []
    for indices in ((0, 1), (2,), (3, 4, 5)):
        batch, grads = pack(pairs, indices), []
        for model in (policy, plain, exact):
            model.zero_grad()
            with in_float64() if model is exact else contextlib.nullcontext():
                model(batch, torch.zeros(2 * len(indices)), 3, 100).loss.backward()
            grads.append({"gradient": gradient(model)})
        assert_within_plain_budget(*grads)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1]


def test_liger_patches_layers_only(monkeypatch):
    calls = []

    def patch(model, rope=True, cross_entropy=False, fused_linear_cross_entropy=True, swiglu=True):
        calls.append((rope, swiglu, cross_entropy, fused_linear_cross_entropy))

    monkeypatch.setitem(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", patch)
    loading._use_liger(tiny_model("llama"))
    assert calls == [(True, True, False, False)]
    with pytest.raises(InputError, match="Liger has no kernels for 'gpt2' models; set it to false"):
        loading._use_liger(tiny_model("gpt2"))


REFUSED = [
    ({"use_liger_kernel": True}, False, "use_liger_kernel: expected a GPU, found none"),
    ({"activation_offloading": True}, False, "activation_offloading: expected a GPU, found none"),
    ({"torch_compile": True, "gradient_checkpointing": True}, False, "torch_compile: checkpointed"),
    ({"activation_offloading": True}, True, "expected gradient_checkpointing true"),
]


@pytest.mark.parametrize(("fields", "gpu", "message"), REFUSED)
def test_what_the_layers_cannot_do_is_refused(fields, gpu, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(InputError, match=message):
        check_layers(tiny_config(**fields))
