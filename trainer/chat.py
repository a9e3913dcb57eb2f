"""Talk to a model in the terminal, or to several side by side.

    rpo chat outputs/run/model                     one model
    rpo chat outputs/lora/model --base             an adapter beside the model it was trained from
    echo "What is DPO?" | rpo chat outputs/run/model

A line is a message, and the answer appears while it is made. Each model sees its own answers.
`/new` begins another conversation, `/quit` or the end of the input ends. What the model reads is
what it was trained on: the chat template's prompt, or, without a template, the line itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from trainer import merge
from trainer.config import options
from trainer.data.chat import Chat, text_of
from trainer.data.clock import today
from trainer.data.encoding import added_end
from trainer.data.rows import BadRow
from trainer.errors import InputError
from trainer.evaluation.models import Source, chat_options, open_model
from trainer.evaluation.options import Sampling
from trainer.model.generate import sample

NEW, QUIT = "/new", "/quit"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Talk to a model; several answer side by side."""

    models: tuple[str, ...]
    """Folders (of adapters, too), hub ids, or package:NAME; /FILE.gguf may follow."""
    base: bool = False
    """Whether the model that an adapter was trained from answers, too."""
    system: str | None = None
    """System message."""
    max_new_tokens: int = 512
    """Where an answer is cut."""
    temperature: float = 0.0
    """0 is greedy, 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Share of the probability mass that is drawn from."""
    seed: int = 0
    """Of the draws."""
    chat_template_kwargs: dict[str, object] | None = None
    """Variables of the chat template, as in training."""
    date: str | None = None
    """Day, as 2026-11-26, that chat templates are told; null is today."""

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn.

        Raises:
            InputError: a value is out of range.
        """
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.seed, batch_size=1)


@dataclass
class Speaker:
    """A model, and its side of the conversation."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    said: list[str] = field(default_factory=list)
    """Its answers so far."""

    def answer(self, system: str | None, asked: list[str], sampling: Sampling) -> None:
        """Print the answer to the last message while it is made, and note it.

        Raises:
            InputError: the template refuses the messages, or they are too long for the model.
        """
        ids = self._prompt(system, asked)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        [answer] = sample(
            self.model, self.tokenizer, [ids], max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature, top_p=sampling.top_p, streamer=streamer,
        )  # fmt: skip
        self.said.append(text_of(self.tokenizer, answer, skip_special_tokens=True).strip())

    def _prompt(self, system: str | None, asked: list[str]) -> list[int]:
        if not self.tokenizer.chat_template:
            ids = self.tokenizer(asked[-1])["input_ids"]
            return ids[: len(ids) - added_end(self.tokenizer)]
        messages = [{"role": "system", "content": system}] if system else []
        for k, text in enumerate(asked):
            messages.append({"role": "user", "content": text})
            messages += [{"role": "assistant", "content": said} for said in self.said[k : k + 1]]
        try:
            return self.chat.ids(self.chat.prompt(messages))
        except BadRow as problem:
            raise InputError(f"{self.name}: {problem}") from None


def open_speakers(told: Options) -> list[Speaker]:
    """Load the models.

    Raises:
        InputError: one is not there, or `base` is asked of a model that is no adapter.
    """
    paths = list(told.models)
    if told.base:
        for path in told.models:
            config = Source(path).config("none")
            folder = merge.adapter_folder(config)
            if folder is None:
                raise InputError(f"base: expected adapters, got {path}; name its base beside it")
            base = merge.base_of(folder, config)
            paths.append("/".join(filter(None, (base.model_name_or_path, base.gguf_file))))
    kept = chat_options(told.chat_template_kwargs, told.date or today())
    opened = [(path, *open_model(Source(path), "none")) for path in dict.fromkeys(paths)]
    return [Speaker(path, model, own, Chat(own, kept)) for path, model, own in opened]


def lines() -> Iterator[str]:
    """The user's messages, asked for where they are typed."""
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == QUIT:
            return
        if line.strip():
            yield line.strip()


def converse(speakers: list[Speaker], told: Options, messages: Iterator[str]) -> None:
    """Answer every message, each model in turn."""
    asked: list[str] = []
    for message in messages:
        if message == NEW:
            asked.clear()
            for speaker in speakers:
                speaker.said.clear()
            continue
        asked.append(message)
        for speaker in speakers:
            if len(speakers) > 1:
                print(f"[{speaker.name}]")
            speaker.answer(told.system, asked, told.sampling)


def main(argv: list[str] | None = None, prog: str = "python -m trainer.chat") -> None:
    """Read the command line and talk; what the user got wrong is one message."""
    parser = options.make_parser(Options, prog, __doc__.strip(), positional="models")
    words = sys.argv[1:] if argv is None else argv
    try:
        told = options.build(Options, options.read(parser, Options, words))
        torch.manual_seed(told.sampling.seed)
        converse(open_speakers(told), told, lines())
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
