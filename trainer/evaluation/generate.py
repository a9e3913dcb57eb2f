"""Answers of models to a prompt file, in batches; a killed run resumes where it stopped.

Batches are cut from the prompt file in order, and each has a seed of its own. So a run that was
interrupted gives the very answers that it would have given in one go.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.data.chat import Chat, ChatOptions, text_of
from trainer.data.clock import today
from trainer.data.encoding import added_end
from trainer.data.rows import BadRow
from trainer.errors import InputError
from trainer.evaluation.models import Source, named_sources, open_model
from trainer.evaluation.options import Sampling
from trainer.evaluation.prompts import Prompt, read_prompts
from trainer.evaluation.records import JsonlLog
from trainer.model.generate import pads_exactly, sample
from trainer.paths import open_folder


def generate(
    prompts: str,
    models: dict[str, str],
    output_dir: str,
    sampling: Sampling,
    chat: ChatOptions | None = None,
) -> list[Path]:
    """Write `NAME.jsonl` with the answers of every model, in FastChat's format.

    Args:
        prompts: prompt file, see `prompts`.
        models: paths by name.
        output_dir: where the answer files go, and are continued.
        sampling: how answers are drawn.
        chat: what chat templates are told beside the messages; without a day, that of the answers
            that are there already, or today.

    Returns:
        The answer files.

    Raises:
        InputError: unusable prompts or models, or answers in the folder that were drawn otherwise.
    """
    todo, sources = read_prompts(prompts), named_sources(models)
    folder = open_folder(output_dir)
    paths = {name: folder / f"{name}.jsonl" for name in sources}
    chat = chat or ChatOptions()
    chat = replace(chat, date=chat.date or _day_of(paths.values()) or today())
    for name, source in sources.items():
        with JsonlLog(paths[name]) as log:
            answer_all(log, name, source, todo, sampling, chat, prompts)
    return list(paths.values())


def _day_of(paths: Iterable[Path]) -> str | None:
    """The day on which the first answers were begun, so that a resumed run keeps it."""
    for path in filter(Path.exists, paths):
        with JsonlLog(path) as log:
            if log.rows:
                return log.rows[0].get("date")
    return None


def settings(source: Source, prompts: list[Prompt], sampling: Sampling, chat: ChatOptions) -> str:
    """A hash of everything that answers depend on."""
    parts = [source.path, source.state(), [asdict(p) for p in prompts], asdict(sampling),
             asdict(chat)]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def answer_all(
    log: JsonlLog,
    name: str,
    source: Source,
    prompts: list[Prompt],
    sampling: Sampling,
    chat: ChatOptions,
    file: str,
) -> None:
    """Append the answers that the log lacks; the model is loaded only if there are any."""
    digest = settings(source, prompts, sampling, chat)
    if any(row.get("settings") != digest for row in log.rows):
        raise InputError(
            f"{name}.jsonl: holds answers of another model, prompts, sampling, date or "
            "chat_template_kwargs; remove it or choose another output_dir"
        )
    done = {row["question_id"] for row in log.rows}
    size = sampling.batch_size
    starts = [s for s in range(0, len(prompts), size)
              if not {p.question for p in prompts[s : s + size]} <= done]  # fmt: skip
    if not starts:
        return
    model, tokenizer = open_model(source, file)
    padded = pads_exactly(model)
    for start in tqdm(starts, f"generating {name}", dynamic_ncols=True):
        batch = prompts[start : start + size]
        torch.manual_seed(sampling.seed * 1_000_003 + start)
        answers = answer(model, tokenizer, batch, sampling, chat, padded)
        log.append(
            [
                {
                    "question_id": prompt.question,
                    "model_id": name,
                    "choices": [{"index": 0, "turns": turns}],
                    "settings": digest,
                    "date": chat.date,
                }
                for prompt, turns in zip(batch, answers, strict=True)
                if prompt.question not in done
            ]
        )


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Prompt],
    sampling: Sampling,
    options: ChatOptions | None = None,
    padded: bool = True,
) -> list[list[str]]:
    """The answers to every turn of a batch of prompts, padded to one length, turn after turn."""
    answers: list[list[str]] = [[] for _ in batch]
    chat = Chat(tokenizer, options or ChatOptions())
    for turn in range(1 + max(len(prompt.follow_ups) for prompt in batch)):
        active = [k for k, prompt in enumerate(batch) if turn <= len(prompt.follow_ups)]
        texts = sample(
            model,
            tokenizer,
            [prompt_ids(tokenizer, batch[k], answers[k], chat) for k in active],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            padded=padded,
        )
        for k, ids in zip(active, texts, strict=True):
            answers[k].append(text_of(tokenizer, ids, skip_special_tokens=True).strip())
    return answers


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answers: list[str],
    chat: Chat | None = None,
) -> list[int]:
    """Token ids that the next answer follows: text as it is, messages by the chat template.

    `chat` is the tokenizer's, with options; None has none.

    Raises:
        InputError: messages without a chat template, or that it refuses.
    """
    chat = chat or Chat(tokenizer, ChatOptions())
    if isinstance(prompt.start, str):
        ids = tokenizer(prompt.start)["input_ids"]
        return ids[: len(ids) - added_end(tokenizer)]
    try:
        return chat.ids(chat.prompt(prompt.messages(answers)))
    except BadRow as problem:
        raise InputError(f"question {prompt.question!r}: {problem}") from None
