"""What two processes run for `test_alone`: torchrun FILE RESULTS."""

import sys

import torch
from accelerate import Accelerator

from tests.trainer.tiny import as_split, shifted_reference, tiny_model, tiny_policy, tiny_split
from trainer.data.steps import plan_pass
from trainer.loop import run_step
from trainer.model.probe import check_model
from trainer.parallel import fsdp2

EXPERTS = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.3}
MODELS = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gpt_oss": EXPERTS | {"head_dim": 8},
    "mixtral": EXPERTS,  # packed
}
# Uneven passes, and a rank without a pair.
STEPS = [plan_pass(list(range(5)), 5, 2, 2)[0], plan_pass([3], 1, 2, 1)[0]]
HOW = ("ddp", "fsdp")


def results(kind, how, accelerator, count=5):
    """Metrics and whole gradients of every step."""
    split = as_split(tiny_split(count).pairs, shifted_reference(count))
    policy, _ = tiny_policy(tiny_model(kind, **MODELS[kind]), eta=0.5)
    check_model(policy, split.pairs)
    if how == "fsdp":
        policy = fsdp2.shard(policy, accelerator)
    elif how == "ddp":
        policy = torch.nn.parallel.DistributedDataParallel(policy, find_unused_parameters=True)
    found = []
    for step in STEPS:
        policy.zero_grad()
        if how == "one":  # the same pairs, on one rank
            step = plan_pass(list(step.indices), count, 1, 1)[0]
        values = run_step(policy, split, step, accelerator, train=True)
        grads = [p.grad for p in policy.parameters()]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        found.append((values, torch.cat([g.flatten() for g in whole]).clone()))
    return found


def main(file: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found = {(kind, how): results(kind, how, accelerator) for kind in MODELS for how in HOW}
    if accelerator.is_main_process:
        torch.save(found, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
