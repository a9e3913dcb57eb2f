"""The routers' load-balancing loss: the model's own, whatever the batch, logged as `loss/aux`."""

import pytest
import torch

from tests.trainer.tiny import (
    gradient,
    relative,
    rpo_by_hand,
    shifted_reference,
    tiny_config,
    tiny_model,
    tiny_policy,
    tiny_split,
)
from trainer.data.batches import share_prefixes
from trainer.data.steps import Step
from trainer.loop import named, run_step
from trainer.model.probe import check_model
from trainer.reference.modes import lookup

COUNT, COEFFICIENT = 4, 0.3
STEPS = [
    Step((((0, 1, 2, 3),),)),
    Step((((0, 3),), ((2,),), ((1,),))),
]
ROUTED = [
    ("mixtral", {"router_aux_loss_coef": COEFFICIENT}),
    ("qwen3_moe", {"router_aux_loss_coef": COEFFICIENT}),
    ("olmoe", {"router_aux_loss_coef": COEFFICIENT, "num_experts": 4, "num_experts_per_tok": 2}),
    ("jetmoe", {"aux_loss_coef": COEFFICIENT, "num_local_experts": 4, "kv_channels": 8}),
    ("gpt_oss", {"router_aux_loss_coef": COEFFICIENT, "num_local_experts": 4, "head_dim": 8}),
    ("jamba", {"router_aux_loss_coef": COEFFICIENT, "num_experts": 4, "mamba_dt_rank": 4}
     | {"attn_layer_period": 2, "attn_layer_offset": 1}),
]  # fmt: skip


def own_losses(model, pairs):
    """What the model's forward adds to a loss, times its coefficient, for each sequence alone."""
    sequences = [s for pair in pairs for s in (pair.chosen, pair.rejected)]
    outputs = [model(input_ids=torch.as_tensor(s.ids)[None], use_cache=False) for s in sequences]
    return COEFFICIENT * torch.stack([output.aux_loss for output in outputs])


@pytest.mark.parametrize(("kind", "fields"), ROUTED, ids=lambda x: str(x)[:9])
def test_it_is_the_mean_of_the_model_s_own_over_sequences(kind, fields):
    model = tiny_model(kind, output_router_logits=True, **fields)
    split, reference = tiny_split(COUNT), shifted_reference(COUNT)
    split.reference = lookup(reference)
    loss = rpo_by_hand(model, split.pairs, reference, tiny_config(eta=0.5))
    aux = own_losses(model, split.pairs).mean()
    (loss + aux).backward()
    wanted = gradient(model)
    assert aux > 0.1

    policy, accelerator = tiny_policy(model, eta=0.5)
    check_model(policy, split.pairs)
    for pairs in (split.pairs, share_prefixes(split.pairs)):
        split.pairs = pairs
        for step in STEPS:
            model.zero_grad()
            row = named(run_step(policy, split, step, accelerator, train=True))
            assert row["loss/aux"] == pytest.approx(aux.item(), rel=1e-5)
            assert row["loss"] == pytest.approx((loss + aux).item(), rel=1e-5)
            assert relative(gradient(model), wanted) < 1e-5


def test_without_the_config_s_word_there_is_none():
    split = tiny_split(2)
    split.reference = lookup(shifted_reference(2))
    policy, accelerator = tiny_policy(tiny_model("mixtral", router_aux_loss_coef=COEFFICIENT))
    row = named(run_step(policy, split, Step((((0, 1),),)), accelerator, train=False))
    assert "loss/aux" not in row
