"""Answers of the model: to a batch of prompts, and to a few held-out prompts at every evaluation.

Samples are greedy, so they draw no random numbers, and a run with samples has the same metrics and
weights as one without. A prompt is what a held-out pair's sequences begin with, cut to the limits
as in training.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from trainer.config.fields import RunConfig
from trainer.data.batches import Split
from trainer.data.chat import text_of
from trainer.data.pairs import IGNORE, Pair
from trainer.model.backbone import quiet
from trainer.model.fit import check_answers, vocabulary_size
from trainer.model.rounding import MARGIN, difference_of, in_float32, last_digits


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    synced: bool = False,
    padded: bool = True,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts; the model's own sampling defaults are not used.

    Args:
        model: the policy.
        tokenizer: gives the end token, beside those of the model.
        prompts: B lists of token ids.
        max_new_tokens: where an answer is cut.
        temperature: 0 is greedy; 1 with `top_p` 1 draws from the model's own distribution.
        top_p: share of the probability mass that is drawn from.
        synced: whether all ranks run the same number of forward passes, as sharded weights need.
        padded: whether prompts of different lengths run together (`pads_exactly`).
        streamer: is told every new token of the only prompt as it is made.

    Returns:
        B lists of new token ids, each with its end token, if it came.

    Raises:
        InputError: an answer could end beyond the model's table of positions.
    """
    check_answers(model, prompts, max_new_tokens)
    if not padded and len({*map(len, prompts)}) > 1:
        alone = (
            sample(model, tokenizer, [prompt], max_new_tokens=max_new_tokens,
                   temperature=temperature, top_p=top_p, synced=synced)
            for prompt in prompts
        )  # fmt: skip
        return [answer for [answer] in alone]
    defaults = model.generation_config
    own = defaults.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad = next(iter(ends), 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=pad)
    try:
        output = _generator(model).generate(
            input_ids=ids,
            attention_mask=seen.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            synced_gpus=synced,
            streamer=streamer,
            **drawn,
        )
    finally:  # they are saved with the model
        model.generation_config = defaults
    return [_until_end(row, ends) for row in output[:, longest:].tolist()]


def _generator(model: PreTrainedModel) -> GenerationMixin:
    """The model as what generates, which transformers' types say of its subclasses alone."""
    assert isinstance(model, GenerationMixin)
    return model


@torch.no_grad()
def pads_exactly(model: PreTrainedModel) -> bool:
    """Whether prompts that are padded on the left are answered as they are alone: measured."""
    vocabulary = vocabulary_size(model)
    long = [(7 * k + 3) % vocabulary for k in range(12)]
    short = long[3:8]
    together = torch.tensor([[0] * (len(long) - len(short)) + short, long], device=model.device)
    seen = torch.ones_like(together)
    seen[0, : len(long) - len(short)] = 0
    alone = together[:1, -len(short) :]
    quiet(model)
    try:
        with in_float32(model):
            wanted = _first_logits(model, alone, torch.ones_like(alone))
            found = _first_logits(model, together, seen)[:1]
            with last_digits(model):
                noise = difference_of(_first_logits(model, alone, torch.ones_like(alone)), wanted)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError):
        return False
    return difference_of(found, wanted) <= MARGIN * noise


def _first_logits(model: PreTrainedModel, ids: Tensor, seen: Tensor) -> Tensor:
    """Logits (B, V) of the first new token."""
    defaults, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    try:
        return _generator(model).generate(
            input_ids=ids, attention_mask=seen, max_new_tokens=1, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        ).logits[0]  # fmt: skip
    finally:
        model.generation_config = defaults


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((k + 1 for k, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def take_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    config: RunConfig,
    accelerator: Accelerator,
) -> list[dict[str, str]]:
    """Greedy answers to the first `sample_prompts` different prompts of a split.

    Args:
        model: the prepared `PreferenceModel`; every rank must call this, and answers every prompt.
        tokenizer: decodes prompts and answers.
        split: the held-out set.
        config: how many prompts, how many tokens.
        accelerator: gives the precision and the number of ranks.

    Returns:
        `prompt` (with its special tokens), `answer` and `chosen`, the text to compare it with.
    """
    first = first_prompts(split.pairs, config.sample_prompts)
    prompts, size = [list(prompt) for prompt in first], config.per_device_eval_batch_size
    policy, answers = accelerator.unwrap_model(model).eval(), []
    synced = accelerator.num_processes > 1
    with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            answers += policy.answer(tokenizer, batch, config.max_new_tokens, synced)

    def text(ids: list[int]) -> str:
        return text_of(tokenizer, ids, skip_special_tokens=True).strip()

    return [
        {"prompt": text_of(tokenizer, prompt), "answer": text(answer), "chosen": text(chosen)}
        for (prompt, chosen), answer in zip(first.items(), answers, strict=True)
    ]


def first_prompts(pairs: list[Pair], count: int) -> dict[tuple[int, ...], list[int]]:
    """Token ids of the first different prompts, and of a chosen response to each.

    A prompt is what comes before the first token that is trained on.
    """
    first: dict[tuple[int, ...], list[int]] = {}
    for pair in pairs:
        if len(first) == count:
            break
        start, ids = int((pair.chosen.labels != IGNORE).argmax()) + 1, pair.chosen.ids.tolist()
        first.setdefault(tuple(ids[:start]), ids[start:])
    return first
