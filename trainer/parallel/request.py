"""Which way of sharding is asked for, and what the process group is told.

accelerate asks for sharding through the environment (`accelerate launch --config_file
trainer/accelerate/fsdp2.yaml` sets it), but never shards on a CPU, and says nothing. So the request
is read here, and what shards is torch's `fully_shard` or DeepSpeed's engine, on every device: what
tests run on CPU processes is what runs on GPUs.
"""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta

from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler

from trainer.config.fields import RunConfig
from trainer.errors import InputError
from trainer.parallel.zero3 import check_zero3

# Variable by which each way is asked for.
REQUESTS = {"fsdp2": "ACCELERATE_USE_FSDP", "zero3": "ACCELERATE_USE_DEEPSPEED"}
# Settings of accelerate's config that would change what is done: variable, setting, value.
SETTINGS = {
    "always": (  # gradient_accumulation_steps and torch_compile of the recipe decide
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "1"),
        ("ACCELERATE_DYNAMO_BACKEND", "dynamo_backend", "no"),
    ),
    "fsdp2": (
        ("FSDP_VERSION", "fsdp_version", "2"),
        ("FSDP_AUTO_WRAP_POLICY", "fsdp_auto_wrap_policy", "transformer_based_wrap"),
        ("FSDP_RESHARD_AFTER_FORWARD", "fsdp_reshard_after_forward", "true"),
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params", "false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing", "false"),
    ),
    "zero3": (
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "zero_stage", "3"),
        ("ACCELERATE_DEEPSPEED_ZERO3_INIT", "zero3_init_flag", "false"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device", "none"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "offload_param_device", "none"),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "deepspeed_config_file", "none"),
        ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", "none"),  # max_grad_norm decides
    ),
}
# Those whose update of a shard is that of the whole weight.
SHARDED_OPTIMIZERS = ("adamw_torch", "sgd")


def requested_sharding(config: RunConfig) -> str | None:
    """How to shard, "fsdp2" or "zero3"; accelerate is then not told, as it must not shard as well.

    Raises:
        InputError: with settings that the trainer does not implement, for one process, or without
            DeepSpeed.
    """
    asked = [k for k, v in REQUESTS.items() if os.environ.get(v, "").lower() in ("true", "1")]
    if len(asked) > 1:
        names = " and ".join(REQUESTS[how] for how in asked)
        raise InputError(
            f"expected one way to shard, got {' and '.join(asked)}: {names} are both set; unset "
            "one, or give accelerate launch one of trainer/accelerate's files"
        )
    for variable, setting, value in (row for how in ("always", *asked) for row in SETTINGS[how]):
        got = os.environ.get(variable, value).lower()
        if got != value:
            raise InputError(
                f"accelerate's {setting}: expected {value}, got {got}; set it in its file or on "
                "its command line, as the recipe decides"
            )
    if not asked:
        return None
    [how] = asked
    if config.load_in_4bit:
        raise InputError(
            f"load_in_4bit: expected false with {how}, which would cut packed 4-bit weights and "
            "their scales apart; use model_dtype bfloat16, or trainer/accelerate/ddp.yaml"
        )
    if config.dtype == "float16":
        raise InputError(
            f"dtype: expected bfloat16 or float32 with {how}, as overflow on one rank is not told "
            "to the others, got float16; change it, or use trainer/accelerate/ddp.yaml"
        )
    if config.optim not in SHARDED_OPTIMIZERS:
        raise InputError(
            f"optim: expected {' or '.join(SHARDED_OPTIMIZERS)} with {how}, as a shard lacks what "
            f"{config.optim} needs; change it, or use trainer/accelerate/ddp.yaml"
        )
    if "WORLD_SIZE" not in os.environ:
        raise InputError(
            f"{how} is asked for, but this is a single process without a process group; start "
            "several with torchrun or with num_processes, or use trainer/accelerate/ddp.yaml"
        )
    if how == "zero3":
        check_zero3(config)
        if importlib.util.find_spec("deepspeed") is None:
            raise InputError(
                "zero3 is asked for, but DeepSpeed is not installed; run: pip install deepspeed, "
                "or use trainer/accelerate/fsdp2.yaml"
            )
    del os.environ[REQUESTS[how]]
    return how


def handlers(config: RunConfig) -> list[KwargsHandler]:
    """What the process group and DDP are told by way of accelerate."""
    return [
        InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout)),
        # DDP would order its buckets anew after its first backward, and with them its sums over
        # ranks: a resumed run would begin with other roundings than one that was not stopped. It
        # does not where it looks for unused parameters, which also may be there then.
        DistributedDataParallelKwargs(find_unused_parameters=True),
    ]
