"""What several processes run for `test_distributed`: FILE FOLDER HOW CONFIG.

They are forked after the imports, which take longer than all they do.
"""

import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from tests.trainer.tiny import (
    as_split,
    shifted_reference,
    tiny_config,
    tiny_model,
    tiny_policy,
    tiny_split,
)
from trainer import run
from trainer.config.recipe import parse_config
from trainer.data.batches import pack
from trainer.data.steps import Step, plan_pass
from trainer.loop import run_step
from trainer.model.backbone import checkpoint_layers
from trainer.parallel import fsdp2, request, zero3

# Seven pairs in two uneven passes; one pair, so that a rank has none; passes without any pair.
STEPS = {
    "uneven": lambda ranks: plan_pass(list(range(7)), 7, ranks, 2)[0],
    "one pair": lambda ranks: plan_pass([3], 7, ranks, 1)[0],
    "empty passes": lambda ranks: plan_pass([0, 5, 2], 7, ranks, 4)[0],
}
# Plain gradient descent, whose steps are as close as the gradients are.
DESCENT = ["--optim", "sgd", "--learning_rate", "0.1"]
# Adapters, a copy of lm_head that is trained whole, and the frozen weights as their reference.
LORA = ["--use_peft", "true", "--reference", "adapter", "--lora_modules_to_save", "lm_head"]
# Frozen weights of one type, adapters of another, and a table filled with the adapters off.
MIXED = ["--use_peft", "true", "--dtype", "bfloat16", "--model_dtype", "bfloat16"]
# How to shard, and the modes of `gradients` that belong to it.
MODES = {"fsdp2": ("ddp", "fsdp"), "zero3": ("zero3", "zero3 checkpointed")}
# Architectures whose step is taken in bfloat16, with norms of two kinds.
HALF = ("llama", "gpt2")
# DeepSpeed does not survive a fork.
START = {"fsdp2": "fork", "zero3": "spawn"}
TIMEOUT = 1234
# Two ranks cannot show another order of sums: a + b = b + a.
RANKS = {"fsdp2": 4, "zero3": 2}


def gradients(mode: str, accelerator: Accelerator) -> dict[str, object]:
    """Metrics and whole gradients by step, of a tied tiny Llama under "one" or one of `MODES`."""
    split = as_split(tiny_split(7).pairs, shifted_reference(7))
    policy, _ = tiny_policy(sft_reduction="token_mean", eta=0.5)
    if mode == "fsdp":
        policy = fsdp2.shard(policy, accelerator)
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
            "norm": torch.tensor(float(norm.full_tensor() if isinstance(norm, DTensor) else norm)),
        }
    return results


def half_gradients(kind: str, accelerator: Accelerator, dtype: str) -> dict[str, object]:
    """Metrics and whole gradient of a step, under FSDP2 if there are several processes."""
    split = as_split(tiny_split(8).pairs, shifted_reference(8))
    policy, _ = tiny_policy(tiny_model(kind), eta=0.5)
    ranks, results = accelerator.num_processes, {}
    layer = type(policy.language_model)._no_split_modules
    shapes = {
        shape
        for module in policy.modules()
        if type(module).__name__ in layer
        for p in module.parameters()
        for shape in (p.shape, p.shape[::-1])
        if p.dim() == 2
    }
    if ranks > 1:
        policy = fsdp2.shard(policy, accelerator)
    alone = ranks == 1 and dtype == "bfloat16"  # `shard` does it itself
    with torch.autocast("cpu", torch.bfloat16, enabled=alone):
        if ranks > 1:
            results["kept"] = kept_weights(policy, split, shapes)
        step = plan_pass(list(range(8)), 8, ranks, 1)[0]
        results["metrics"] = run_step(policy, split, step, accelerator, train=True)
    grads = [p.grad for p in policy.parameters()]
    assert all(g.dtype == torch.float32 for g in grads)
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
    return results | {"gradient": torch.cat([g.flatten() for g in whole])}


def kept_weights(policy, split, shapes) -> int:
    """Bytes of whole matrices of these shapes, in whatever type, that forward keeps for backward.

    Those that FSDP2 gathered are kept, too, but their memory is not.
    """
    kept = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.shape in shapes:
            kept.append(x.detach().untyped_storage())
        return x

    batch = pack(split.pairs, (0, 1, 2))
    sizes = {batch.input_ids.shape[1], len(batch.labels)}  # no activation is taken for a weight
    assert not sizes & {n for shape in shapes for n in shape}, sizes
    with saved_tensors_hooks(keep, lambda x: x):
        out = policy(batch, split.reference(batch), 3, 1)
    assert kept
    size = sum({storage._cdata: storage.size() for storage in kept}.values())
    out.loss.backward()
    policy.zero_grad()
    return size


def zero3_gradients(policy, split, accelerator, checkpointed):
    """The same under ZeRO-3; a rate of 0 lets the engine clear its gradients in a step."""
    from deepspeed.utils import safe_get_full_grad

    if checkpointed:
        checkpoint_layers(policy.model)
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


def adapters_and_half(folder: Path, words: list[str], results: dict[str, object]) -> None:
    """FSDP2 with adapters, and in bfloat16."""
    words = [*words, "--model_name_or_path", str(folder / "untied")]
    resume = ["--resume_from_checkpoint", str(folder / "lora-a" / "checkpoint-2")]
    for name, more in (("lora-a", []), ("lora-b", resume)):
        os.environ[request.REQUESTS["fsdp2"]] = "true"
        more = [*LORA, *DESCENT, *more]
        run.run(parse_config([*words, "--output_dir", str(folder / name), *more]))
    AcceleratorState._reset_state()
    os.environ[request.REQUESTS["fsdp2"]] = "true"
    run.run(parse_config([*words, "--output_dir", str(folder / "mixed"), *MIXED, *DESCENT]))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    results["half"] = {kind: half_gradients(kind, accelerator, "bfloat16") for kind in HALF}


def main(rank: int, port: int, folder: Path, how: str, words: list[str]) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS[how]}
    place = {"LOCAL_WORLD_SIZE": RANKS[how], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (ranks | place).items()})
    zero3.PERSISTENT = 0  # or a tiny model would stay whole
    handlers = request.handlers(tiny_config(ddp_timeout=TIMEOUT))
    accelerator = Accelerator(cpu=True, kwargs_handlers=handlers)
    assert accelerator.num_processes == RANKS[how]
    group = torch.distributed.distributed_c10d._get_default_group()
    assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == TIMEOUT
    results = {mode: gradients(mode, accelerator) for mode in MODES[how]}
    resume = ["--resume_from_checkpoint", str(folder / "a" / "checkpoint-2")]
    for name, more in (("a", []), ("b", resume), ("sgd", DESCENT)):
        os.environ[request.REQUESTS[how]] = "true"
        run.run(parse_config([*words, "--output_dir", str(folder / name), *more]))
    if how == "fsdp2":
        resume = ["--resume_from_checkpoint", str(folder / "ddp-a" / "checkpoint-2")]
        for name, more in (("ddp-a", []), ("ddp-b", resume)):
            run.run(parse_config([*words, "--output_dir", str(folder / name), *more]))
        adapters_and_half(folder, words, results)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    folder, how, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        main, (port, folder, how, words), RANKS[how], start_method=START[how]
    )
