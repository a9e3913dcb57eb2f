"""What each command of the evaluator is told: dataclasses that are command lines as well."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.errors import InputError

COLDEST = 1e-6  # lower temperatures are greedy too, and overflow


def check_least(options: object, **least: float) -> None:
    """Raise `InputError` for the first field that is not finite, or below its least value."""
    for name, bound in least.items():
        value = getattr(options, name)
        if not bound <= value < math.inf:
            raise InputError(f"{name}: expected a finite number >= {bound}, got {value}")


def check_seed(seed: int) -> None:
    """Raise `InputError` for what is no seed of torch and numpy."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: expected an integer in [0, 2^32), got {seed}")


@dataclass(frozen=True, kw_only=True)
class Models:
    """Which models are loaded, and what their chat templates are told."""

    models: tuple[str, ...]
    """NAME=PATH of each: folders (of adapters, too), hub ids, or package:NAME; /FILE.gguf may
    follow."""
    chat_template_kwargs: dict[str, object] | None = None
    """Variables of the chat template, as in training."""
    date: str | None = None
    """Day, as 2026-11-26, that chat templates are told; null is today."""


@dataclass(frozen=True, kw_only=True)
class Score(Models):
    """Rewards and KL on held-out pairs."""

    data: tuple[str, ...]
    """Files of preference pairs, as the trainer reads them."""
    reference: str
    """Path of the model that training started from."""
    output_dir: str
    """Where scores.json (means) and scores.jsonl (a line per model and pair) go."""
    prompt_column: tuple[str, ...] = ("prompt",)
    """Columns that hold the prompt, as in training."""
    chosen_column: str = "chosen"
    """Column that holds the preferred response."""
    rejected_column: str = "rejected"
    """Column that holds the other response."""
    implicit_prompt: bool = False
    """Whether two strings without a prompt are cut after the words that both begin with."""
    beta: float = 0.1
    """Scales the rewards, as in training."""
    max_length: int = 1024
    """Most tokens of a sequence."""
    batch_size: int = 4
    """Pairs in one forward pass, and prompts in one batch of samples."""
    kl_prompts: int = 32
    """Prompts on which the KL is estimated, the first ones; 0 leaves it out."""
    kl_tokens: int = 128
    """Length to which answers are drawn for the KL."""
    seed: int = 0
    """Of these draws."""

    def __post_init__(self) -> None:
        """Check every range."""
        check_least(self, beta=1e-9, max_length=8, batch_size=1, kl_prompts=0, kl_tokens=1)
        check_seed(self.seed)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int = 1024
    """Where an answer is cut."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Share of the probability mass that is drawn from."""
    seed: int = 0
    """Of the random draws."""
    batch_size: int = 8
    """Prompts answered at once; belongs to the draws, because a batch shares its seed."""

    def __post_init__(self) -> None:
        """Check every range."""
        check_least(self, max_new_tokens=1, batch_size=1)
        check_seed(self.seed)
        if self.temperature != 0 and not COLDEST <= self.temperature < math.inf:
            raise InputError(
                f"temperature: expected 0 (greedy) or a number >= {COLDEST}, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected a number in (0, 1], got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling, Models):
    """Answers of models to a prompt file."""

    prompts: str
    """Prompt file, the trainer's pairs or FastChat's questions."""
    output_dir: str
    """Where NAME.jsonl go, or are continued."""


@dataclass(frozen=True)
class Judge:
    """Who judges, and how it is asked."""

    model: str
    """The model's name at the endpoint."""
    base_url: str
    """OpenAI-compatible endpoint, as https://api.openai.com/v1; its key is in OPENAI_API_KEY."""
    max_tokens: int = 1024
    """Most tokens of a judgment; one that is cut before its verdict is malformed."""
    concurrency: int = 4
    """Requests under way at once."""
    max_retries: int = 6
    """Attempts after a failed one (connection, 408, 409, 429, 5xx), with exponential backoff."""
    timeout: float = 300.0
    """Seconds to wait for a response."""
    price: tuple[float, float] | None = None
    """US dollars per million prompt tokens and per million completion tokens."""

    def __post_init__(self) -> None:
        """Check every range."""
        check_least(self, max_tokens=1, concurrency=1, max_retries=0)
        if not 0 < self.timeout < math.inf:
            raise InputError(f"timeout: expected a number > 0, got {self.timeout}")
        if self.price is not None and not all(0 <= dollars < math.inf for dollars in self.price):
            raise InputError(f"price: expected numbers >= 0, got {self.price}")


@dataclass(frozen=True, kw_only=True)
class JudgeAnswers(Judge):
    """Answers of models into judgments, by an endpoint."""

    prompts: str
    """The prompt file that was answered."""
    answers: tuple[str, ...]
    """Answer files of two or more models, as `generate` and FastChat write them."""
    output_dir: str
    """Where judgments.jsonl, judge.json and cache.jsonl go; holds a killed run's state."""


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Judgments into a table of win rates."""

    files: tuple[str, ...]
    """Judgments, pairwise or single-score, in FastChat's formats."""
    output_dir: str
    """Where winrates.json, .csv and .png go."""
    answers: tuple[str, ...] = ()
    """Every model's answers (FastChat's format), for length-controlled win rates."""
    rename: tuple[str, ...] = ()
    """MODEL=NAME of each name to show."""
    samples: int = 2000
    """Bootstrap samples."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        """Check every range."""
        check_least(self, samples=100)
        check_seed(self.seed)
