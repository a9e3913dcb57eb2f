"""lm-evaluation-harness reads a checkpoint folder as the trainer saves it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trainer.tiny import record, save_tiny, tiny_tokenizer, write_jsonl

pytest.importorskip("lm_eval", reason="pip install 'rpo-kernels[eval]'")

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
TRAIN = """\
import sys
from trainer.config import RunConfig
from trainer.run import run
model, train_file, output_dir = sys.argv[1:]
files = {"model_name_or_path": model, "train_file": (train_file,), "output_dir": output_dir}
run(RunConfig(**files, max_steps=1, learning_rate=1e-2))
"""


def choice_logp(model, tokenizer, question, choice):
    context, whole = (tokenizer(t)["input_ids"] for t in (question, f"{question} {choice}"))
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logps[k - 1, whole[k]].item() for k in range(len(context), len(whole)))


def test_harness_scores_a_trained_checkpoint(tmp_path):
    """A small task from a local file, offline: its accuracy is that of the model's own logits."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [record(k) for k in range(8)])
    words = [save_tiny(tmp_path / "start"), pairs, str(tmp_path / "run")]
    subprocess.run([sys.executable, "-c", TRAIN, *words], check=True, env=environment)
    checkpoint = tmp_path / "run" / "model"

    docs = [{"question": f"{k} plus 1 is", "choices": [str(k + 1), str(7 * k), "xyz"], "answer": 0}
            for k in range(2, 14)]  # fmt: skip
    file = write_jsonl(tmp_path / "docs.jsonl", docs)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_choice.yaml").write_text(TASK.format(file=file))
    command = ["-m", "lm_eval", "--model", "hf", "--tasks", "tiny_choice", "--device", "cpu",
               "--model_args", f"pretrained={checkpoint},dtype=float32", "--batch_size", "4",
               "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"),
               ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(result.read_text())["results"]["tiny_choice"]["acc,none"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint).eval(), tiny_tokenizer()
    right = 0
    for doc in docs:
        logps = [choice_logp(model, tokenizer, doc["question"], c) for c in doc["choices"]]
        right += logps.index(max(logps)) == doc["answer"]
    assert accuracy == pytest.approx(right / len(docs))
    assert 0 < right < len(docs)
