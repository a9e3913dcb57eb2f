"""Chat templates by what they do: what is trained on, or what is said of it; and their clock."""

import datetime
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import models
from transformers.utils import chat_template_utils

from tests.trainer.tiny import CHATML, record, save_tiny, tiny_tokenizer, write_jsonl
from trainer import run
from trainer.config.recipe import parse_config
from trainer.data.chat import Chat, ChatOptions
from trainer.data.clock import today
from trainer.data.encoding import Encoder, encode_rows, string_warnings
from trainer.data.rows import BadRow, BadRows, check_record
from trainer.data.truncation import Limits
from trainer.errors import InputError
from trainer.evaluation import generate
from trainer.evaluation.generate import prompt_ids
from trainer.evaluation.prompts import Prompt
from trainer.preview import marked

# Templates are named by what they do. Turns are written [U]...[E] and [A]...[E], to be short.
SPECIALS = ("<|endoftext|>", "[S]", "[U]", "[A]", "[E]")
TURN = (
    "{% if m.role == 'user' %}[U]{{ m.content }}[E]\n"
    "{% elif m.role == 'system' %}[S]{{ m.content }}[E]\n{% else %}"
)
ASK = "{% if add_generation_prompt %}[A]\n"


def template(answer, ask=ASK, end="{% endif %}", start=""):
    return start + "{% for m in messages %}" + TURN + answer + "{% endif %}{% endfor %}" + ask + end


SPLIT = "{% set text = m.content.split('</think>')[-1].lstrip() %}"
LAST = (  # which answers follow the last question
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
THOUGHT = (
    "{% set thought = m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1]"
    ".strip() if m.reasoning_content or '</think>' in m.content else '' %}"
)
PLAIN = "[A]\n{{ m.content }}[E]\n"
SHOWN = (  # a thought, be it empty, in answers to the last question only
    THOUGHT + SPLIT + "{% if loop.index0 > ns.last %}[A]\n<think>\n{{ thought }}\n</think>\n\n"
    "{{ text }}[E]\n{% else %}[A]\n{{ text }}[E]\n{% endif %}"
)
SWITCH = (
    ASK + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}"
)
TEMPLATES = {
    "plain": template(PLAIN),
    "closes with EOS": template(PLAIN, end="{% else %}{{ eos_token }}{% endif %}"),
    "opens the next turn": template(PLAIN + "{% if loop.last %}[U]{% endif %}"),
    "footer": template(PLAIN, end="{% else %}-- end --<|endoftext|>{% endif %}"),
    "line breaks": template(PLAIN + "\n\n"),
    "no end": template("[A]\n{{ m.content }}", end="{% else %}[U]\n{% endif %}").replace(
        "[U]{{ m.content }}[E]\n", "[U]{{ m.content }}\n"
    ),
    "opens a thought, hides all": template(SPLIT + "[A]\n{{ text }}[E]\n", ASK + "<think>\n"),
    "opens a thought, tells the last": template(
        SPLIT + "[A]\n{% if loop.last %}<think>\n{{ m.content }}{% else %}{{ text }}{% endif %}"
        "[E]\n",
        ASK + "<think>\n",
    ),
    "opens a thought, shows the last": template(SHOWN, SWITCH, start=LAST),
    "shows the last": template(SHOWN, start=LAST),
    "hides all": template(SPLIT + "[A]\n{{ text }}[E]\n"),
    "thought tag of its own": template(PLAIN, ASK + "[THINK]"),
    "system in the last question": (
        "{% for m in messages %}{% if m.role == 'user' %}[U]{% if loop.last and messages[0].role =="
        " 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[E]\n"
        "{% elif m.role == 'assistant' %}" + PLAIN + "{% endif %}{% endfor %}" + ASK + "{% endif %}"
    ),
}  # fmt: skip


def tokenizer_of(name, eos="<|endoftext|>"):
    tokenizer = tiny_tokenizer(TEMPLATES.get(name, name), specials=SPECIALS)
    tokenizer.bos_token, tokenizer.eos_token = None, eos
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def answer(text, **fields):
    return {"role": "assistant", "content": text} | fields


HI, THOUGHT_HI = answer("hello"), answer("<think>\nwhy\n</think>\n\nhello")
TURNS, THOUGHTS = [HI, user("and"), answer("bye")], [THOUGHT_HI, user("and"), answer("bye")]
HEAD, MIDDLE = "[U]hi[E]\n[A]\n", "\n[U]and[E]\n[A]\n"
OFF = {"enable_thinking": False}
TRAINED = [  # template, variables, chosen messages, the sequence with what is trained on marked
    ("plain", {}, [HI], HEAD + "⟦hello[E]⟧"),
    ("plain", {}, TURNS, HEAD + "⟦hello[E]⟧" + MIDDLE + "⟦bye[E]⟧"),
    ("plain", {}, THOUGHTS, HEAD + "⟦<think>\nwhy\n</think>\n\nhello[E]⟧" + MIDDLE + "⟦bye[E]⟧"),
    ("plain", {}, [answer("\n\nhello")], HEAD + "⟦\n\nhello[E]⟧"),
    ("plain", {}, [answer("a [E] b[E]\n")], HEAD + "⟦a [E] b[E]\n[E]⟧"),
    ("closes with EOS", {}, [HI], HEAD + "⟦hello[E]⟧"),
    ("closes with EOS", {}, TURNS, HEAD + "⟦hello[E]⟧" + MIDDLE + "⟦bye[E]⟧"),
    ("opens the next turn", {}, [HI], HEAD + "⟦hello[E]⟧"),
    ("opens the next turn", {}, TURNS, HEAD + "⟦hello[E]⟧" + MIDDLE + "⟦bye[E]⟧"),
    ("footer", {}, TURNS, HEAD + "⟦hello[E]⟧" + MIDDLE + "⟦bye[E]⟧"),
    ("line breaks", {}, TURNS, HEAD + "⟦hello[E]⟧\n\n" + MIDDLE + "⟦bye[E]⟧"),
    ("no end", {}, [HI], "[U]hi\n[A]\n⟦hello<|endoftext|>⟧"),
    ("no end", {}, TURNS, "[U]hi\n[A]\n⟦hello⟧[U]and\n[A]\n⟦bye<|endoftext|>⟧"),
    ("opens a thought, hides all", {}, [HI], HEAD + "<think>\n⟦\n</think>\n\nhello[E]⟧"),
    ("opens a thought, hides all", {}, [THOUGHT_HI],
     HEAD + "<think>\n⟦why\n</think>\n\nhello[E]⟧"),
    ("opens a thought, hides all", {}, [answer("why</think>hello")],
     HEAD + "<think>\n⟦why</think>hello[E]⟧"),
    ("opens a thought, hides all", {}, TURNS,
     HEAD + "hello[E]" + MIDDLE + "<think>\n⟦\n</think>\n\nbye[E]⟧"),
    ("opens a thought, hides all", {}, THOUGHTS,
     HEAD + "hello[E]" + MIDDLE + "<think>\n⟦\n</think>\n\nbye[E]⟧"),
    ("opens a thought, tells the last", {}, [HI], HEAD + "<think>\n⟦\n</think>\n\nhello[E]⟧"),
    ("opens a thought, tells the last", {}, [THOUGHT_HI],
     HEAD + "<think>\n⟦why\n</think>\n\nhello[E]⟧"),
    ("opens a thought, shows the last", {}, [HI], HEAD + "<think>\n⟦\n</think>\n\nhello[E]⟧"),
    ("opens a thought, shows the last", {}, [answer("hello", reasoning_content="why")],
     HEAD + "<think>\n⟦why\n</think>\n\nhello[E]⟧"),
    ("opens a thought, shows the last", {}, [answer("hello", thinking="why")],
     HEAD + "<think>\n⟦why\n</think>\n\nhello[E]⟧"),
    ("opens a thought, shows the last", {}, [answer("hello", reasoning="why")],
     HEAD + "<think>\n⟦why\n</think>\n\nhello[E]⟧"),
    ("opens a thought, shows the last", {}, THOUGHTS,
     HEAD + "hello[E]" + MIDDLE + "<think>\n⟦\n</think>\n\nbye[E]⟧"),
    ("opens a thought, shows the last", OFF, [HI], HEAD + "<think>\n\n</think>\n\n⟦hello[E]⟧"),
    ("opens a thought, shows the last", OFF, TURNS,
     HEAD + "hello[E]" + MIDDLE + "<think>\n\n</think>\n\n⟦bye[E]⟧"),
    ("shows the last", {}, [HI], HEAD + "⟦<think>\n\n</think>\n\nhello[E]⟧"),
    ("shows the last", {}, [THOUGHT_HI], HEAD + "⟦<think>\nwhy\n</think>\n\nhello[E]⟧"),
    ("shows the last", {}, TURNS, HEAD + "hello[E]" + MIDDLE + "⟦<think>\n\n</think>\n\nbye[E]⟧"),
    ("hides all", {}, [THOUGHT_HI], HEAD + "⟦<think>\nwhy\n</think>\n\nhello[E]⟧"),
    ("hides all", {}, TURNS, HEAD + "⟦hello[E]⟧" + MIDDLE + "⟦bye[E]⟧"),
    ("hides all", {}, THOUGHTS, HEAD + "hello[E]" + MIDDLE + "⟦bye[E]⟧"),
    ("thought tag of its own", {}, [HI], HEAD + "[THINK]⟦[/THINK]hello[E]⟧"),
    ("system in the last question", {}, [HI], HEAD + "⟦hello[E]⟧"),
]  # fmt: skip


OWN = "[A]\n<think>\n{{ m.reasoning_content }}\n</think>\n\n{{ m.content }}[E]\n"
ENDS = [  # templates whose turns end with EOS [E], chosen messages, the sequence
    (template("[A]\n[R]{{ m.content }}[/R][E]\n", ASK + "[R]"), [HI], HEAD + "[R]⟦hello[/R][E]⟧"),
    (template("[A]\n[R]{{ m.content }}[/R]{% if loop.last %}[E]{% endif %}\n"), [HI],
     HEAD + "⟦[R]hello[/R]⟧"),
    (template("[A]\n{{ m.content }}{% if not loop.last %}[E]\n{% endif %}"), TURNS,
     HEAD + "⟦hello[E]⟧" + MIDDLE + "⟦bye[E]⟧"),
    (template(OWN), [THOUGHT_HI], HEAD + "⟦<think>\nwhy\n</think>\n\nhello[E]⟧"),
    (template(OWN, ASK + "<think>\n"), [THOUGHT_HI],
     HEAD + "<think>\n⟦why\n</think>\n\nhello[E]⟧"),
    (template(OWN), [answer("<think>\nwhy")], HEAD + "⟦<think>\nwhy[E]⟧"),
    (template(OWN), [answer(THOUGHT_HI["content"], thinking="why")],
     HEAD + "⟦<think>\nwhy\n</think>\n\nhello[E]⟧"),
    (template(OWN, ASK + "<think>\n"), [answer("<think>\nwhy")], HEAD + "<think>\n⟦why[E]⟧"),
    (template(PLAIN, ASK + "<think>\n"), [answer("<think>\nwhy")], HEAD + "<think>\n⟦why[E]⟧"),
    (template(OWN, ASK + "<think></think>"), [HI], HEAD + "<think></think>⟦hello[E]⟧"),
    (template("[A]\n</think>{{ m.content }}[E]\n", ASK + "<think></think>"), [HI],
     HEAD + "<think></think>⟦hello[E]⟧"),
    (template(PLAIN, ASK + "<|channel>thought\n<channel|>"), [HI],
     HEAD + "<|channel>thought\n<channel|>⟦hello[E]⟧"),
    (template(PLAIN, ASK + "<|START_THINKING|><|END_THINKING|>"), [HI],
     HEAD + "<|START_THINKING|><|END_THINKING|>⟦hello[E]⟧"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "chosen", "text"), ENDS)
def test_a_turn_ends_with_eos_and_has_one_thought(name, chosen, text):
    tokenizer = tokenizer_of(name, eos="[E]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[R]", "[/R]"]})
    row = {"prompt": [user("hi")], "chosen": chosen, "rejected": [answer("no")]}
    ((_, pair),) = Encoder(tokenizer, Limits(512)).encode([check_record(row, "f:1")])
    assert marked(pair.chosen, tokenizer) == text


CALLS = "[A]\n{{ m.content }}{% for c in m.tool_calls or [] %}CALL{% endfor %}[E]\n"
ARGUMENTS = {
    "as JSON": "c.function.arguments | tojson",
    "by items": "c.function.arguments.items() | list | tojson",
    "added": "'' + c.function.arguments",
    "as it is": "c.function.arguments",
}


@pytest.mark.parametrize("given", [{"x": "é"}, '{"x": "é"}'], ids=["object", "text"])
@pytest.mark.parametrize("how", ARGUMENTS)
def test_arguments_of_a_call_are_given_as_the_template_writes_them(how, given):
    tokenizer = tokenizer_of(template(CALLS.replace("CALL", "{{ " + ARGUMENTS[how] + " }}")))
    call = {"type": "function", "function": {"name": "f", "arguments": given}}
    row = {"prompt": [user("hi")], "chosen": [answer("", tool_calls=[call])]}
    row = check_record(row | {"rejected": [answer("no")]}, "f:1")
    ((_, pair),) = Encoder(tokenizer, Limits(512)).encode([row])
    said = '[["x", "é"]]' if how == "by items" else '{"x": "é"}'
    assert marked(pair.chosen, tokenizer) == HEAD + f"⟦{said}[E]⟧"


def merged(tokenizer):
    """The same tokenizer with a token for two line breaks, as most have."""
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())["model"]
    vocabulary = state["vocab"] | {"ĊĊ": len(tokenizer)}
    backend.model = models.BPE(vocabulary, merges=[("Ċ", "Ċ")])
    return tokenizer


@pytest.mark.parametrize("tokenize", [lambda t: t, merged], ids=["bytes", "merged"])
@pytest.mark.parametrize(("name", "kwargs", "chosen", "text"), TRAINED)
def test_what_is_trained_is_what_the_model_would_say(name, kwargs, chosen, text, tokenize):
    """After the very prompt of inference, up to the end of turn, and nothing after it."""
    tokenizer, options = tokenize(tokenizer_of(name)), ChatOptions(kwargs)
    row = {"prompt": [user("hi")], "chosen": chosen, "rejected": [answer("no")]}
    encoder = Encoder(tokenizer, Limits(512), options)
    ((_, pair),) = encoder.encode([check_record(row, "f:1")])
    assert marked(pair.chosen, tokenizer) == text
    prompt = Prompt(1, (user("hi"), *chosen[:-1]))
    asked = prompt_ids(tokenizer, prompt, [], Chat(tokenizer, options))
    assert pair.chosen.ids[: len(asked)].tolist() == asked
    answers = sum(message["role"] == "assistant" for message in chosen)
    assert encoder.untrained == answers - text.count("⟦") and pair.source == "f:1"


SYSTEM = {"role": "system", "content": "be brief"}


def test_a_system_message_in_the_last_question_is_read_as_at_inference():
    tokenizer = tokenizer_of("system in the last question")
    row = {"prompt": [SYSTEM, user("hi")], "chosen": TURNS, "rejected": [answer("no")]}
    ((_, pair),) = Encoder(tokenizer, Limits(512)).encode([check_record(row, "f:1")])
    assert marked(pair.chosen, tokenizer) == (
        "[U]hi[E]\n[A]\nhello[E]\n[U]be brief\n\nand[E]\n[A]\n⟦bye[E]⟧"
    )
    assert marked(pair.rejected, tokenizer) == "[U]be brief\n\nhi[E]\n[A]\n⟦no[E]⟧"


COUNTS = TEMPLATES["plain"].replace("[A]\n{{ m", "[A]{{ messages | length }}\n{{ m")
REFUSED = [  # template, variables, chosen message, message
    ("plain", {}, answer("hello", reasoning_content="why"), "thought is not shown: .*reasoning_"),
    ("plain", {}, answer("hello", thinking="why"), "thought is not shown: .*chat_template_path"),
    ("hides all", {}, answer("hello", reasoning="why"), "thought is not shown: .*<think>"),
    ("opens a thought, hides all", {}, answer("hello", thinking="why"), "thought is not shown"),
    (template(OWN), {}, answer("<think>why</think>hello", reasoning="so"), "two thoughts: .*leave"),
    ("opens a thought, shows the last", OFF, answer("<think>why"), "the prompt closes the thought"),
    ("opens a thought, shows the last", OFF, THOUGHT_HI, "the prompt closes the thought: .*kwargs"),
    (template("[A]\n{{ m.content.split('<channel|>')[-1] }}[E]\n"), {},
     answer("<|channel>why<channel|>hello"), "content is not shown: .*reasoning_content"),
    (template("[A]\n{{ m.tool_calls or m.content }}[E]\n"), {},
     answer("hello", tool_calls=[{"name": "f"}]), "content is not shown: .*tool_calls"),
    (COUNTS, {}, HI, "prompt is no prefix: .*chat_template_path"),
    (
        "{{ raise_exception('no roles') }}",
        {},
        HI,
        "chat template refuses .*: no roles; chat_t",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "message", "said"), REFUSED)
def test_what_cannot_be_right_is_refused_with_a_reason(name, kwargs, message, said):
    row = {"prompt": [user("hi")], "chosen": [message], "rejected": [answer("no")]}
    row = check_record(row, "f:1")
    with pytest.raises(InputError, match=f"f:1: {said}"):
        encode_rows([row], tokenizer_of(name), Limits(512), BadRows("error"), ChatOptions(kwargs))


def test_thoughts_of_two_names_must_agree():
    row = {"prompt": [user("hi")], "rejected": [answer("no")]}
    fields = {"thinking": "a", "reasoning": "b"}
    with pytest.raises(BadRow, match=r"chosen\[0\]: expected one string as thinking or reasoning"):
        check_record(row | {"chosen": [answer("hello", **fields)]}, "f:1")


def test_variables_that_the_template_does_not_read_are_refused():
    with pytest.raises(InputError, match="chat_template_kwargs: .* no variable 'enable_thinkin'"):
        Chat(tokenizer_of("opens a thought, shows the last"), ChatOptions({"enable_thinkin": 1}))


def test_pairs_cut_to_nothing_trained_are_dropped():
    """The earlier turn is read only, and fills what remains."""
    name, long = "opens a thought, hides all", [answer("x" * 90), user("and"), answer("bye")]
    row = {"prompt": [user("hi")], "chosen": long, "rejected": [answer("no")]}
    rows = [check_record(row, "f:1"), check_record(row | {"chosen": [HI]}, "f:2")]
    split = encode_rows(rows, tokenizer_of(name), Limits(48), BadRows("error"))
    assert split.report["dropped"] == {"no trained token left after truncation": 1}
    assert [pair.source for pair in split.pairs] == ["f:2"] and split.report["untrained_turns"] == 1


def test_strings_are_warned_about_once_with_the_remedy(capsys):
    row = {"prompt": "Q: 2+2?", "chosen": "A: 4", "rejected": " A: 5"}
    rows = [check_record(row, f"f:{i}") for i in (1, 2)]
    encode_rows(rows, tokenizer_of("plain"), Limits(64), BadRows("error"))
    told = capsys.readouterr().out
    assert (
        told.count("warning: 2 rows of the given data are strings") == 1
        and '"role": "user"' in told
    )
    assert (
        told.count("warning: 2 responses of the given data follow their prompt without white") == 1
    )
    assert "'Q: 2+2?A: 4' (f:1)" in told
    spaced = check_record(row | {"chosen": " A: 4"}, "f:1")
    sums = check_record({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "f:2")
    chinese = check_record({"prompt": "你好。", "chosen": "你", "rejected": "我"}, "f:3")
    assert not string_warnings([spaced, sums, chinese], tiny_tokenizer(None), "data")


def set_clock(monkeypatch, day):
    """Let transformers tell templates noon of another day."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(f"{day} 12:34:56")

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


DATED = "Today is {{ strftime_now('%d %b %Y, %H:%M:%S') }}.\n" + CHATML


def test_a_template_is_told_the_run_s_day(monkeypatch):
    set_clock(monkeypatch, "2026-03-04")
    tokenizer = tiny_tokenizer(DATED)
    assert today() == "2026-03-04"
    for date, text in ((None, "04 Mar 2026"), ("2025-12-31", "31 Dec 2025")):
        chat = Chat(tokenizer, ChatOptions(date=date))
        assert not chat.clock.asked
        assert chat.prompt([user("hi")]).startswith(f"Today is {text}, 00:00:00.\n")
        assert chat.clock.asked
    assert tokenizer.apply_chat_template([user("hi")], tokenize=False).startswith(
        "Today is 04 Mar 2026, 12:34:56"  # the vendor's own clock goes on
    )


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    """Arguments for 6 steps with a template that writes the time."""
    folder = tmp_path_factory.mktemp("dated")
    (folder / "dated.jinja").write_text(DATED)
    recipe = {
        "model_name_or_path": save_tiny(folder / "model"),
        "chat_template_path": str(folder / "dated.jinja"),
        "train_file": write_jsonl(folder / "train.jsonl", [record(i) for i in range(8)]),
        "eval_file": write_jsonl(folder / "eval.jsonl", [record(i) for i in range(8, 11)]),
        "max_steps": 6,
        "learning_rate": 3e-3,
        "cpu_threads": 1,
        "sample_prompts": 1,
        "max_new_tokens": 4,
        "save_steps": 3,
    }
    (folder / "dated.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", str(folder / "dated.yaml"), "--ref_cache_dir", str(folder / "cache")]


def outcome(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row.get("loss"), row.get("eval/loss")) for row in rows]
    return (
        losses,
        (folder / "samples.jsonl").read_text(),
        load_file(folder / "model" / "model.safetensors"),
    )


def test_a_run_resumed_tomorrow_is_the_same_run(dated, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    set_clock(monkeypatch, "2026-03-04")
    for folder in (whole, cut):
        run.run(parse_config([*dated, "--output_dir", str(folder)]))
    assert "the chat template writes the date: 2026-03-04" in capsys.readouterr().out
    assert yaml.safe_load((cut / "config.yaml").read_text())["date"] == "2026-03-04"
    (cut / "checkpoint-6").rename(tmp_path / "later")  # as if it had been killed after step 3

    set_clock(monkeypatch, "2026-03-05")
    words = [*dated, "--output_dir", str(cut), "--resume_from_checkpoint", "auto"]
    capsys.readouterr()
    run.run(parse_config([*words, "--dry_run"]))  # shows what is resumed, not what would begin
    assert "the chat template writes the date: 2026-03-04" in capsys.readouterr().out
    run.run(parse_config(words))
    ours, theirs = outcome(cut), outcome(whole)
    assert ours[:2] == theirs[:2] and "Today is 04 Mar 2026" in ours[1]
    assert all(torch.equal(ours[2][k], theirs[2][k]) for k in ours[2] | theirs[2])
    assert (cut / "model" / "chat_template.jinja").read_text() == DATED
    with pytest.raises(InputError, match="date: .* was written with 2026-03-04, got 2026-03-05"):
        run.run(parse_config([*words, "--date", "2026-03-05"]))
    again = ["--config", str(whole / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    run.run(parse_config(again))  # the next day, by the resolved config
    assert outcome(tmp_path / "again")[:2] == theirs[:2]
    torch.set_num_threads(threads)


def test_every_rank_has_the_first_one_s_day(monkeypatch):
    monkeypatch.setattr(run, "broadcast_object_list", lambda _: ["2026-03-04"])
    config = parse_config([])
    assert run.dated(config, None).date == "2026-03-04"
    given = parse_config(["--date", "2026-01-31"])
    assert run.dated(given, None) is given


def test_answers_of_two_days_have_one_prompt(tmp_path, monkeypatch):
    """A killed evaluation resumes with the day on which it was begun."""
    source = tmp_path / "model"
    save_tiny(source)
    (source / "chat_template.jinja").write_text(DATED)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": [user(t)]} for t in "abcd"])
    sampling = generate.Sampling(max_new_tokens=4, batch_size=2)
    outputs = {}
    for days in (("04", "04"), ("04", "05")):
        folder = tmp_path / "-".join(days)
        for day, kept in zip(days, (2, None), strict=True):
            set_clock(monkeypatch, f"2026-03-{day}")
            (path,) = generate.generate(prompts, {"m": str(source)}, str(folder), sampling)
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(lines[:kept]))
        outputs[days] = path.read_text()
    assert outputs["04", "04"] == outputs["04", "05"] and outputs["04", "05"].count("\n") == 4
    with pytest.raises(InputError, match="holds answers of another model, prompts, sampling, date"):
        options = ChatOptions(date="2026-03-06")
        generate.generate(prompts, {"m": str(source)}, str(folder), sampling, options)
