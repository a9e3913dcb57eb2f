"""RPO in TRL: its trainer, data and logs, without logits.

python trainer/examples/rpo_in_trl.py MODEL pairs.jsonl OUTPUT_DIR [STEPS]
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpo_kernels.integrations.trl import RPOConfig, RPOTrainer


def main(name: str, file: str, output_dir: str, steps: int = 100) -> list[dict]:
    """Train; returns TRL's log."""
    trainer = RPOTrainer(
        AutoModelForCausalLM.from_pretrained(name),
        args=RPOConfig(
            output_dir,
            eta=0.2,  # of the SFT term; beta is DPOConfig's
            sft_reduction="sequence_mean",
            max_steps=steps,
            logging_steps=1,
            per_device_train_batch_size=2,
            bf16=torch.cuda.is_available(),  # TRL's default needs a GPU
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=file, split="train"),
        processing_class=AutoTokenizer.from_pretrained(name),
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    name, file, output_dir, *steps = sys.argv[1:]
    for row in main(name, file, output_dir, *map(int, steps)):
        print({key: row[key] for key in ("loss", "loss/sft", "rewards/margins") if key in row})
