"""Preference pairs from the model itself: its answers to sums, ranked by whether they are right.

Pairs like these are what online and iterative preference training uses: both responses are drawn
from the policy that is trained, and a rule that can be checked says which one is better. The two
often differ in a digit or two.

    question      What is 53 - 22?
    chosen        53 - 22 = 31.
    rejected      53 - 22 = 37.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.evaluation.generate import prompt_ids
from trainer.evaluation.prompts import Prompt
from trainer.model.generate import sample

SYSTEM = "Answer with one equation."
OPERATIONS = {
    "+": (
        lambda a, b: a + b,
        ("What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}.",
         "Tom has {a} apples and buys {b} more. How many apples does Tom have?",
         "A train carries {a} people. {b} more get on. How many people does it carry?"),
    ),
    "-": (
        lambda a, b: a - b,
        ("What is {a} - {b}?", "What is {a} minus {b}?", "Subtract {b} from {a}.",
         "Ann has {a} marbles and gives away {b}. How many marbles does Ann have left?"),
    ),
    "*": (
        lambda a, b: a * b,
        ("What is {a} * {b}?", "What is {a} times {b}?", "Multiply {a} by {b}.",
         "A box holds {a} pens. How many pens do {b} boxes hold?"),
    ),
}  # fmt: skip
MAX_NEW_TOKENS, BATCH = 20, 64  # tokens of an answer, answers at once


@dataclass(frozen=True)
class Question:
    """A sum in words, and its right answer."""

    text: str
    equation: str
    """Without the result: `3 + 4`."""
    result: int

    def prompt(self) -> list[dict[str, str]]:
        """What the model is asked."""
        return [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": self.text},
        ]

    def pair(self, chosen: str, rejected: str) -> dict:
        """A row of the trainer's format."""
        sides = {"chosen": chosen, "rejected": rejected}
        row = {k: [{"role": "assistant", "content": v}] for k, v in sides.items()}
        return {"prompt": self.prompt()} | row


def questions(count: int, seed: int) -> list[Question]:
    """`count` different questions; the first of them are those of a smaller `count`."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        operation, (result, templates) = rng.choice(list(OPERATIONS.items()))
        a, b = rng.randint(3, 99), rng.randint(3, 99)
        if operation == "*":
            a, b = rng.randint(2, 20), rng.randint(2, 9)
        if operation == "-" and a < b:
            a, b = b, a
        text = rng.choice(templates).format(a=a, b=b)
        found.setdefault(text, Question(text, f"{a} {operation} {b}", result(a, b)))
    return list(found.values())


def demonstrations(asked: list[Question], seed: int) -> list[dict]:
    """Right answers, over wrong ones that training on demonstrations alone does not see."""
    rng = random.Random(seed)
    return [
        q.pair(f"{q.equation} = {q.result}.", f"{q.equation} = {q.result + rng.randint(1, 9)}.")
        for q in asked
    ]


def numbers(answer: str) -> list[int]:
    """The integers of an answer."""
    return [int(found) for found in re.findall(r"-?\d+", answer.replace(",", ""))]


def is_right(answer: str, result: int) -> bool | None:
    """Whether the last number of an answer is the result; None without a number."""
    found = numbers(answer)
    return found[-1] == result if found else None


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[Question],
    *,
    samples: int,
    temperature: float,
    seed: int,
) -> list[list[str | None]]:
    """`samples` answers to every question; None for one that did not end in time."""
    found: list[list[str | None]] = []
    size = BATCH // samples
    for start in tqdm(range(0, len(asked), size), "answering", dynamic_ncols=True):
        prompts = [Prompt(q.text, tuple(q.prompt())) for q in asked[start : start + size]]
        ids = [prompt_ids(tokenizer, prompt, []) for prompt in prompts for _ in range(samples)]
        torch.manual_seed(seed * 1_000_003 + start)
        drawn = sample(
            model, tokenizer, ids, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature
        )
        texts = [
            tokenizer.decode(row, skip_special_tokens=True).strip()
            if row[-1] == tokenizer.eos_token_id
            else None
            for row in drawn
        ]
        found += [texts[k : k + samples] for k in range(0, len(texts), samples)]
    return found


def pairs(asked: list[Question], drawn: list[list[str | None]], seed: int) -> list[dict]:
    """One pair per question that has a right and a wrong answer, each chosen at random."""
    rng, found = random.Random(seed), []
    for question, candidates in zip(asked, drawn, strict=True):
        judged = [(is_right(answer, question.result), answer) for answer in candidates if answer]
        right = [answer for verdict, answer in judged if verdict is True]
        wrong = [answer for verdict, answer in judged if verdict is False]
        if right and wrong:
            found.append(question.pair(rng.choice(right), rng.choice(wrong)))
    return found


def restyled(row: dict) -> dict:
    """The pair with its right answer as a sentence, where the other one stays an equation."""
    result = numbers(row["chosen"][0]["content"])[-1]
    return row | {"chosen": [{"role": "assistant", "content": f"The answer is {result}."}]}
