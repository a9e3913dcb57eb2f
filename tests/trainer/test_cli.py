"""`rpo`: every command found, and a conversation in the terminal."""

import io
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from tests.trainer.tiny import save_tiny, tiny_llama, tiny_tokenizer
from trainer import cli
from trainer.chat import main as chat
from trainer.data.chat import Chat, ChatOptions
from trainer.model.generate import sample

LONG = 6


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model")


def talk(monkeypatch, capsys, text, *words):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat([*words, "--max_new_tokens", str(LONG)])
    return capsys.readouterr().out


def greedy(*messages):
    """What the tiny model answers to a conversation."""
    tokenizer, own = tiny_tokenizer(), []
    for k, text in enumerate(messages):
        own += [{"role": ("user", "assistant")[k % 2], "content": text}]
    rendered = Chat(tokenizer, ChatOptions())
    ids = rendered.ids(rendered.prompt(own))
    [answer] = sample(tiny_llama(), tokenizer, [ids], max_new_tokens=LONG, temperature=0.0)
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_a_conversation_is_remembered_until_the_next(model, monkeypatch, capsys):
    first = greedy("hi")
    second = greedy("hi", first, "and?")
    said = talk(monkeypatch, capsys, "hi\n\nand?\n/new\nhi\n/quit\nhi\n", model)
    assert [line.strip() for line in said.splitlines()] == [first, second, first]


def test_models_answer_side_by_side(model, tmp_path, monkeypatch, capsys):
    """An adapter and its base, which begin as one function."""
    tuned = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    tuned.peft_config["default"].base_model_name_or_path = model
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    said = talk(monkeypatch, capsys, "hi\n", str(tmp_path / "adapter"), "--base")
    lines = [line.strip() for line in said.splitlines()]
    assert lines == [f"[{tmp_path / 'adapter'}]", greedy("hi"), f"[{model}]", greedy("hi")]


def test_the_system_message_is_read(model, monkeypatch, capsys):
    plain = talk(monkeypatch, capsys, "hi\n", model)
    assert talk(monkeypatch, capsys, "hi\n", model, "--system", "Count!!!") != plain


def test_a_model_without_a_template_continues_the_line(model, monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (Path(model) / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(model)
    ids = tokenizer("hi")["input_ids"]
    [answer] = sample(tiny_llama(), tokenizer, [ids], max_new_tokens=LONG, temperature=0.0)
    wanted = tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert talk(monkeypatch, capsys, "hi\n", model).strip() == wanted


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "models: no value; give it as --models"),
        (["{model}", "--temperature", "-1"], "temperature: expected 0 .greedy. or"),
        (["{model}", "--base"], "base: expected adapters, got .*; name its base beside it"),
        (["./none"], "no folder"),
        (["{model}", "--temprature", "1"], "did you mean 'temperature'"),
    ],
)
def test_what_cannot_be_talked_to_is_named(model, words, message):
    with pytest.raises(SystemExit, match=message):
        chat([word.format(model=model) for word in words])


def test_every_command_is_there(capsys):
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: rpo {name}") or name == "evaluate"
    cli.main([])
    listed = capsys.readouterr().out
    assert all(f"rpo {name} " in listed for name in cli.COMMANDS)


def test_a_command_typed_wrong_is_corrected():
    with pytest.raises(SystemExit, match="got 'trian'; did you mean train?"):
        cli.main(["trian"])
