"""Implicit rewards on held-out pairs, and the KL divergence to the reference, without logits.

    reward(y) = beta * (log pi(y|x) - log ref(y|x))          accuracy: reward(chosen) the larger one
    KL        = E_{y ~ pi}[log pi(y|x) - log ref(y|x)]       over the first n tokens of an answer

The KL is estimated from answers that the model itself draws at temperature 1, two for each prompt,
both models scoring them as they score the pairs. An answer that is cut after n tokens counts up to
there, so this is exactly the divergence of the distributions of the first n tokens; its standard
error is over prompts. An estimate may come out below 0 where the KL is near it.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpo_kernels import linear_logprobs
from trainer.data.batches import pack, share_prefixes
from trainer.data.chat import ChatOptions
from trainer.data.clock import today
from trainer.data.columns import Columns
from trainer.data.encoding import Encoder
from trainer.data.pairs import IGNORE, Pair, Sequence
from trainer.data.rows import BadRow, BadRows
from trainer.data.sources import read_rows
from trainer.data.truncation import Limits
from trainer.errors import InputError
from trainer.evaluation.models import Source, named_sources, open_model
from trainer.evaluation.records import replace_text, write_json
from trainer.model.fit import check_answers, check_fit
from trainer.model.generate import first_prompts, pads_exactly, sample
from trainer.model.policy import PreferenceModel
from trainer.model.probe import check_model
from trainer.paths import open_folder

Metrics = dict[str, float | None]  # of a model; None where there is too little to measure it on


def score(
    data: tuple[str, ...] | list[str],
    models: dict[str, str],
    reference: str,
    output_dir: str,
    *,
    beta: float,
    max_length: int,
    batch_size: int,
    kl_prompts: int,
    kl_tokens: int,
    seed: int,
    chat: ChatOptions | None = None,
    columns: Columns | None = None,
) -> dict[str, Metrics]:
    """Write `scores.json` (means) and `scores.jsonl` (a line per model and pair).

    Args:
        data: files of held-out pairs, as the trainer reads them.
        models: paths by name.
        reference: path of the model that training started from.
        output_dir: where the files go.
        beta: scales the rewards, as in training.
        max_length: most tokens of a sequence.
        batch_size: pairs in one forward pass, and prompts in one batch of samples.
        kl_prompts: prompts on which the KL is estimated, the first ones; 0 leaves it out.
        kl_tokens: length to which answers are drawn for it.
        seed: of these draws.
        chat: what chat templates are told beside the messages.
        columns: where prompt, chosen and rejected are.

    Returns:
        What `scores.json` holds: metrics by model.

    Raises:
        InputError: unusable data or models, or models of different tokenizers.
    """
    sources, folder = named_sources(models), open_folder(output_dir)
    model, tokenizer = open_model(Source(reference), data[0])
    chat = chat or ChatOptions()
    chat = replace(chat, date=chat.date or today())  # it may change while models are scored
    places, pairs = read_pairs(data, tokenizer, max_length, chat, columns)
    base = PreferenceModel(model, {})
    check_fit(model, pairs)
    check_model(base, pairs)
    ref_logps = score_pairs(base, pairs, batch_size, "reference")
    results: dict[str, Metrics] = {}
    lines = []
    for name, source in sources.items():
        model, own_tokenizer = open_model(source, data[0])
        if not same_tokens(read_pairs(data, own_tokenizer, max_length, chat, columns)[1], pairs):
            raise InputError(f"models: {name} encodes the data otherwise than the reference")
        torch.manual_seed(seed)
        prompts = list(first_prompts(pairs, kl_prompts))
        check_answers(model, prompts, kl_tokens, "kl_tokens")
        drawn = draw_pairs(model, tokenizer, prompts, kl_tokens, batch_size, name)
        policy = PreferenceModel(model, {})
        check_fit(model, pairs)
        check_model(policy, pairs)
        logps = score_pairs(policy, pairs, batch_size, name)
        results[name] = summarize(pairs, logps, ref_logps, beta)
        if drawn:
            own, other = (score_pairs(m, drawn, batch_size, "kl") for m in (policy, base))
            results[name] |= kl_estimate(own - other) | {"kl_tokens": kl_tokens}
        for place, values, ref in zip(places, logps.tolist(), ref_logps.tolist(), strict=True):
            line = {"model": name, "pair": place, "logps": values, "ref_logps": ref}
            lines.append(json.dumps(line) + "\n")
    write_json(folder / "scores.json", results)
    replace_text(folder / "scores.jsonl", "".join(lines))
    return results


def read_pairs(
    data: tuple[str, ...] | list[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat: ChatOptions | None = None,
    columns: Columns | None = None,
) -> tuple[list[str], list[Pair]]:
    """Where each pair of the files stands (`file:line`), and its tokens; a bad row is an error."""
    bad, encoder = BadRows("error", "fix them"), Encoder(tokenizer, Limits(max_length), chat)
    rows = [row for name in data for row in read_rows(name, bad, columns)]
    places, pairs = [], []
    for row, result in encoder.encode(rows):
        if isinstance(result, BadRow):
            bad.add(row.source, result)
        else:
            places.append(row.source)
            pairs.append(result)
    bad.settle(len(pairs), encoder.dropped)
    return places, pairs


def same_tokens(one: list[Pair], other: list[Pair]) -> bool:
    """Whether two lists of pairs hold the same token ids and labels."""
    sides = [[s for p in pairs for s in (p.chosen, p.rejected)] for pairs in (one, other)]
    return len(one) == len(other) and all(
        np.array_equal(a.ids, b.ids) and np.array_equal(a.labels, b.labels)
        for a, b in zip(*sides, strict=True)
    )


@torch.inference_mode()
def score_pairs(model: PreferenceModel, pairs: list[Pair], batch_size: int, name: str) -> Tensor:
    """Summed log-probs (len(pairs), 2) in nats of chosen and rejected responses."""
    head = model.language_model.get_output_embeddings()
    logps, shared = [], share_prefixes(pairs)
    starts = range(0, len(pairs), batch_size)
    for start in tqdm(starts, f"scoring {name}", dynamic_ncols=True):
        indices = tuple(range(start, min(start + batch_size, len(pairs))))
        batch = pack(shared, indices).to(model.language_model.device)
        tokens = linear_logprobs(model.hidden(batch), head.weight, batch.labels, **head.transform())
        running = torch.nn.functional.pad(tokens.double().cumsum(0), (1, 0))
        sums = running[batch.cu_seqlens.long()].diff()
        logps.append(sums.view(2, len(indices)).T.cpu())
    return torch.cat(logps)


def draw_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[tuple[int, ...]],
    max_new_tokens: int,
    batch_size: int,
    name: str,
) -> list[Pair]:
    """Two answers of the model to every prompt, drawn at temperature 1, as one pair."""
    pairs, padded = [], pads_exactly(model)
    for start in tqdm(range(0, len(prompts), batch_size), f"sampling {name}", dynamic_ncols=True):
        batch = [list(ids) for ids in prompts[start : start + batch_size]]
        draws = [
            sample(
                model,
                tokenizer,
                batch,
                max_new_tokens=max_new_tokens,
                temperature=1.0,
                padded=padded,
            )
            for _ in range(2)
        ]
        for prompt, one, other in zip(batch, *draws, strict=True):
            pairs.append(Pair(_sequence(prompt, one), _sequence(prompt, other)))
    return pairs


def _sequence(prompt: list[int], answer: list[int]) -> Sequence:
    labels = [IGNORE] * (len(prompt) - 1) + answer + [IGNORE]
    return Sequence(np.array(prompt + answer, np.int32), np.array(labels, np.int32))


def summarize(pairs: list[Pair], logps: Tensor, ref_logps: Tensor, beta: float) -> Metrics:
    """Means over the pairs, named as in `metrics.jsonl`."""
    rewards = beta * (logps - ref_logps)
    margins = rewards[:, 0] - rewards[:, 1]
    tokens = sum(pair.chosen.trained_tokens for pair in pairs)
    return {
        "pairs": len(pairs),
        "beta": beta,
        "rewards/accuracies": ((margins > 0).double() + 0.5 * (margins == 0)).mean().item(),
        "rewards/margins": margins.mean().item(),
        "rewards/chosen": rewards[:, 0].mean().item(),
        "rewards/rejected": rewards[:, 1].mean().item(),
        "logps/chosen": logps[:, 0].mean().item(),
        "logps/rejected": logps[:, 1].mean().item(),
        "logps/chosen_per_token": (logps[:, 0].sum() / tokens).item(),
        "ref_logps/chosen": ref_logps[:, 0].mean().item(),
        "ref_logps/rejected": ref_logps[:, 1].mean().item(),
    }


def kl_estimate(log_ratios: Tensor) -> Metrics:
    """Mean of the draws' log-ratios (P prompts, 2) and its standard error over prompts."""
    per_prompt = log_ratios.mean(1)
    error = per_prompt.std().item() / math.sqrt(len(per_prompt)) if len(per_prompt) > 1 else None
    return {"kl": per_prompt.mean().item(), "kl_standard_error": error}


def to_text(results: dict[str, Metrics]) -> str:
    """A column per model."""
    keys = list(next(iter(results.values())))
    lines = [f"{'':<24}" + "".join(f"{name:>16}" for name in results)]
    for key in keys:
        values = (results[name][key] for name in results)
        shown = ("-" if value is None else f"{value:.4f}" for value in values)
        lines.append(f"{key:<24}" + "".join(f"{text:>16}" for text in shown))
    return "\n".join(lines)
