"""The paper's recipes, value by value (arXiv 2405.16436, section 6 and appendix F)."""

import pytest
import torch

from tests.trainer.tiny import tiny_config
from trainer.config.recipe import DEMO_RECIPE, parse_config
from trainer.optimizer import make_optimizer, make_schedule

GPUS = 8
COMMON = {
    "learning_rate": 5e-7, "lr_scheduler_type": "cosine", "max_length": 1024, "seed": 42,
    "dtype": "bfloat16", "model_dtype": "float32", "gradient_checkpointing": True,
    "use_peft": False, "loss_type": "sigmoid", "label_smoothing": 0.0, "scale_eta_by_beta": None,
}  # fmt: skip
BETA = COMMON | {
    "model_name_or_path": "HuggingFaceH4/mistral-7b-sft-beta", "beta": 0.01, "sft_reduction": "sum",
    "dataset_name": ("HuggingFaceH4/ultrafeedback_binarized",), "num_train_epochs": 1.0,
    "dataset_train_split": "train_prefs", "dataset_test_split": "test_prefs", "on_bad_row": "skip",
    "max_prompt_length": 512, "warmup_ratio": 0.1, "min_lr_rate": 0.0, "adam_beta2": 0.999,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
}  # fmt: skip
GEMMA = BETA | {
    "model_name_or_path": "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", "beta": 0.05,
    "dataset_name": ("argilla/dpo-mix-7k",), "num_train_epochs": 2.0,
    "dataset_train_split": "train", "dataset_test_split": "test",
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16,
}  # fmt: skip
AVERAGE = GEMMA | {
    "beta": 0.5, "eta": 0.2, "sft_reduction": "sequence_mean", "min_lr_rate": 0.1,
    "warmup_ratio": 0.03, "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0,
    "max_prompt_length": None, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
}  # fmt: skip
LONG = {
    "max_length": 32768, "use_peft": True, "reference": "adapter", "model_dtype": "bfloat16",
    "on_bad_row": "skip",
}  # fmt: skip
RECIPES = {
    "zephyr-beta-rpo": BETA | {"eta": 0.005},
    "zephyr-beta-dpo": BETA | {"eta": 0.0},
    "zephyr-gemma-rpo": GEMMA | {"eta": 0.005},
    "zephyr-gemma-dpo": GEMMA | {"eta": 0.0},
    "zephyr-gemma-rpo-average": AVERAGE,
    "llama3-8b-lora-long": LONG,
}


def test_every_recipe_is_in_the_table():
    names = {path.stem for path in DEMO_RECIPE.parent.glob("*.yaml")}
    assert names == {*RECIPES, DEMO_RECIPE.stem}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_paper_s_values(name):
    config = parse_config(["--config", str(DEMO_RECIPE.parent / f"{name}.yaml")])
    assert {field: getattr(config, field) for field in RECIPES[name]} == RECIPES[name]
    pairs = config.per_device_train_batch_size * config.gradient_accumulation_steps * GPUS
    assert pairs == 128
    assert config.output_dir == f"outputs/{name}"


def test_cosine_ends_where_it_should():
    config = tiny_config(
        learning_rate=1e-3, warmup_ratio=0.1, min_lr_rate=0.1, adam_beta2=0.95, adam_epsilon=1e-6
    )
    optimizer = make_optimizer(torch.nn.Linear(2, 2), config)
    assert optimizer.defaults["betas"] == (0.9, 0.95) and optimizer.defaults["eps"] == 1e-6
    schedule, rates = make_schedule(optimizer, config, 20), []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0 and max(rates) == rates[2] == pytest.approx(1e-3)
    assert schedule.get_last_lr()[0] == pytest.approx(1e-4)


@pytest.mark.parametrize(("ratio", "rates"), [(0.1, [1.0]), (0.1, [0.0, 1.0]), (1.0, [0, 0.5, 1])])
def test_warm_up_leaves_a_step_with_the_whole_rate(ratio, rates):
    config = tiny_config(learning_rate=1.0, warmup_ratio=ratio)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), config)
    schedule = make_schedule(optimizer, config, len(rates))
    for rate in rates:
        assert set(schedule.get_last_lr()) == {rate}
        optimizer.step()
        schedule.step()
