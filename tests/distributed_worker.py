"""What several processes run for `test_trainer_distributed`: FILE FOLDER HOW CONFIG.

They are forked after the imports, which take longer than all they do.
"""

import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from trainer_tiny import as_split, shifted_reference, tiny_config, tiny_policy, tiny_split

from trainer import distributed, run, zero3
from trainer.loop import run_step
from trainer.packing import Step, plan_pass
from trainer.recipe import parse_config

# Seven pairs in two uneven passes; one pair, so that a rank has none; passes without any pair.
STEPS = {
    "uneven": lambda ranks: plan_pass(list(range(7)), 7, ranks, 2)[0],
    "one pair": lambda ranks: plan_pass([3], 7, ranks, 1)[0],
    "empty passes": lambda ranks: plan_pass([0, 5, 2], 7, ranks, 4)[0],
}
# Plain gradient descent, whose steps are as close as the gradients are.
DESCENT = ["--optim", "sgd", "--learning_rate", "0.1"]
# How to shard, and the modes of `gradients` that belong to it.
MODES = {"fsdp2": ("ddp", "fsdp"), "zero3": ("zero3", "zero3 checkpointed")}
# Two ranks cannot show another order of sums: a + b = b + a.
RANKS = {"fsdp2": 4, "zero3": 2}


def gradients(mode: str, accelerator: Accelerator) -> dict[str, object]:
    """Metrics and whole gradients by step, of a tied tiny Llama under "one" or one of `MODES`."""
    split = as_split(tiny_split(7).pairs, shifted_reference(7))
    policy, _ = tiny_policy(sft_reduction="token_mean", eta=0.5)
    if mode == "fsdp":
        policy = distributed.shard(policy, accelerator)
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        local = policy.model.model.layers[0].mlp.up_proj.weight.to_local()
        assert local.shape[0] == 64 // accelerator.num_processes
    elif mode == "ddp":
        policy = accelerator.prepare(policy)
        assert isinstance(policy, torch.nn.parallel.DistributedDataParallel)
    elif mode.startswith("zero3"):
        return zero3_gradients(policy, split, accelerator, checkpointed="checkpointed" in mode)
    results = {}
    for name, plan in STEPS.items():
        step: Step = plan(accelerator.num_processes)
        policy.zero_grad()
        values = run_step(policy, split, step, accelerator, train=True)
        grads = [p.grad for p in policy.parameters()]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
        norm = accelerator.clip_grad_norm_(policy.parameters(), 1e9)
        results[name] = {
            "metrics": values,
            "gradient": torch.cat([g.flatten() for g in whole]).clone(),
            "norm": torch.tensor(distributed.norm_value(norm)),
        }
    return results


def zero3_gradients(policy, split, accelerator, checkpointed):
    """The same under ZeRO-3; a rate of 0 lets the engine clear its gradients in a step."""
    from deepspeed.utils import safe_get_full_grad

    if checkpointed:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    engine, _ = zero3.partition(policy, optimizer, tiny_config(max_grad_norm=1e9))
    weights = list(engine.module.parameters())
    assert all(p.numel() == 0 < p.ds_tensor.numel() <= p.ds_numel // 2 + 1 for p in weights)
    results = {}
    for name, plan in STEPS.items():
        values = run_step(engine, split, plan(accelerator.num_processes), accelerator, train=True)
        whole = torch.cat([safe_get_full_grad(p).flatten() for p in weights])
        norm = torch.tensor(zero3.update(engine))
        results[name] = {"metrics": values, "gradient": whole, "norm": norm}
    return results


def main(rank: int, port: int, folder: Path, how: str, words: list[str]) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS[how]}
    place = {"LOCAL_WORLD_SIZE": RANKS[how], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (ranks | place).items()})
    zero3.PERSISTENT = 0  # or a tiny model would stay whole
    accelerator = Accelerator(cpu=True, kwargs_handlers=distributed.handlers(tiny_config()))
    assert accelerator.num_processes == RANKS[how]
    results = {mode: gradients(mode, accelerator) for mode in MODES[how]}
    if accelerator.is_main_process:
        torch.save(results, folder / "results.pt")

    resume = ["--resume_from_checkpoint", str(folder / "a" / "checkpoint-2")]
    for name, more in (("a", []), ("b", resume), ("sgd", DESCENT)):
        os.environ[distributed.REQUESTS[how]] = "true"
        run.run(parse_config([*words, "--output_dir", str(folder / name), *more]))
    if how == "fsdp2":
        resume = ["--resume_from_checkpoint", str(folder / "ddp-a" / "checkpoint-2")]
        for name, more in (("ddp-a", []), ("ddp-b", resume)):
            run.run(parse_config([*words, "--output_dir", str(folder / name), *more]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    folder, how, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        main, (port, folder, how, words), RANKS[how], start_method="fork"
    )
