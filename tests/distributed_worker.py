"""What each of two processes runs for `test_trainer_distributed`: torchrun FILE FOLDER CONFIG."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from trainer_tiny import as_split, shifted_reference, tiny_policy, tiny_split

from trainer import distributed, run
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


def gradients(mode: str, accelerator: Accelerator) -> dict[str, object]:
    """Metrics and whole gradients by step, of a tied tiny Llama under "one", "ddp" or "fsdp"."""
    split = as_split(tiny_split(7).pairs, shifted_reference(7))
    policy, _ = tiny_policy(sft_reduction="token_mean", eta=0.5)
    if mode == "fsdp":
        policy = distributed.shard(policy, accelerator)
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        assert policy.model.model.layers[0].mlp.up_proj.weight.to_local().shape[0] == 32
    elif mode == "ddp":
        policy = accelerator.prepare(policy)
        assert isinstance(policy, torch.nn.parallel.DistributedDataParallel)
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


def main(folder: Path, words: list[str]) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    results = {mode: gradients(mode, accelerator) for mode in ("ddp", "fsdp")}
    if accelerator.is_main_process:
        torch.save(results, folder / "results.pt")

    resume = ["--resume_from_checkpoint", str(folder / "a" / "checkpoint-2")]
    for name, more in (("a", []), ("b", resume), ("sgd", DESCENT)):
        os.environ |= {distributed.REQUEST: "true", "FSDP_VERSION": "2"}
        run.run(parse_config([*words, "--output_dir", str(folder / name), *more]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
