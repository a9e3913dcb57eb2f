"""Rows, what is wrong with them, and what becomes of them: tokens, labels, truncation."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from tests.trainer.tiny import (
    ANSWER,
    CHATML,
    GOOD,
    TALK,
    USER,
    chat,
    record,
    tiny_tokenizer,
    write_jsonl,
)
from trainer.config.fields import RunConfig
from trainer.config.recipe import parse_config
from trainer.data.columns import Columns
from trainer.data.encoding import encode_rows, use_chat_template
from trainer.data.files import read_file
from trainer.data.pairs import IGNORE
from trainer.data.rows import BadRows, check_record
from trainer.data.sources import check_rows, hold_out, read_splits, weigh
from trainer.data.truncation import Limits
from trainer.errors import InputError
from trainer.evaluation.generate import prompt_ids
from trainer.evaluation.prompts import Prompt


def read_rows(files, bad):
    rows = [row for name in files for row in check_rows(f"{name}:", read_file(name), bad)]
    bad.settle(len(rows))
    return rows


def test_parquet_and_several_files(tmp_path):
    records = [record(i) for i in range(3)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    lines = write_jsonl(tmp_path / "b.jsonl", records)
    rows = read_rows((str(tmp_path / "a.parquet"), lines), BadRows("error"))
    assert [r.prompt for r in rows[:3]] == [r.prompt for r in rows[3:]] and len(rows) == 6
    assert rows[1].source.endswith("a.parquet:2")


def test_csv_rows_are_known_by_their_first_line(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('prompt,chosen,rejected,x\n2+2=, 4, 5,\n"a\nb", c, d,\n2+2=,,5,\n')
    rows = read_rows((str(file),), bad := BadRows("skip"))
    assert [row.source for row in rows] == [f"{file}:2", f"{file}:3"]
    assert (rows[0].prompt, rows[0].chosen, rows[1].prompt) == ("2+2=", " 4", "a\nb")
    assert bad.problems == [f"{file}:5: empty response: chosen"]


def test_csv_cells_may_be_long(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,chosen,rejected\n" + "x" * 200_000 + ", 4, 5\n")
    (row,) = read_rows((str(file),), BadRows("error"))
    assert len(row.prompt) == 200_000


TURN = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "bye"}]
IMPLICIT = [
    (USER + ANSWER, USER + chat("", "no")[1], 1),
    (USER + ANSWER + TURN, USER + ANSWER + [TURN[0], *ANSWER], 3),
    (USER + ANSWER, USER + ANSWER + TURN, 1),  # one goes on where the other ends
    (USER + ANSWER + TURN, USER + ANSWER + [*USER, TURN[1]], 1),  # they differ in the user's words
]


@pytest.mark.parametrize(("chosen", "rejected", "size"), IMPLICIT)
@pytest.mark.parametrize("repeated", [False, True])
def test_what_both_responses_begin_with_is_the_prompt(chosen, rejected, size, repeated):
    record = {"chosen": chosen, "rejected": rejected} | ({"prompt": "hi"} if repeated else {})
    row = check_record(record, "f:1")
    assert (row.prompt, row.chosen, row.rejected) == (chosen[:size], chosen[size:], rejected[size:])


def test_an_implicit_prompt_of_strings_ends_at_white_space():
    texts = {"chosen": "Human: 2+2? Assistant: 40", "rejected": "Human: 2+2? Assistant: 41 no"}
    columns = Columns(implicit=True)
    row = check_record(texts, "f:1", columns)
    assert (row.prompt, row.chosen) == ("Human: 2+2? Assistant:", " 40")
    row = check_record({"chosen": "a b", "rejected": "a b c"}, "f:1", columns)
    assert (row.prompt, row.chosen, row.rejected) == ("a", " b", " b c")


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": None, "b": 1}}}
WITH_TOOLS = CHATML.replace(
    "{% for m", "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m", 1
).replace(
    "{{ m['content'] }}", "{{ m['content'] }}{{ m['tool_calls'] | tojson if m['tool_calls'] }}"
)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_reach_the_template_and_calls_are_trained_on(as_text):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "c": None}}}
    chosen = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    chosen += [{"role": "tool", "name": "add", "content": "2"}, *ANSWER]
    tools = json.dumps([TOOL]) if as_text else [TOOL]
    row = {"prompt": USER, "chosen": chosen, "rejected": ANSWER, "tools": tools}
    tokenizer = tiny_tokenizer(WITH_TOOLS)
    sequence = encode(row, 512, tokenizer).chosen
    text = tokenizer.decode(sequence.ids)
    assert text.startswith('<tools>[{"type": "function", "function": {"name": "add"')
    assert text.count("<tools>") == 1 and "null" not in text
    assert trained_text(sequence, tokenizer) == (
        '[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]<|im_end|>'
        "hello<|im_end|>"
    )


def data_config(folder, **fields):
    return RunConfig(model_name_or_path="m", dataset_name=str(folder), **fields)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A folder laid out like a data set of the hub: two splits, and columns that nobody needs."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "pairs"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [record(i) | {"score": i} for i in range(6)])
    same = record(7) | {"rejected": record(7)["chosen"]}
    write_jsonl(folder / "test.jsonl", [record(6) | {"score": 0}, same | {"score": 0}])
    return folder


def test_data_sets_by_name_and_split(hub_folder):
    config = data_config(hub_folder, dataset_test_split="test", on_bad_row="skip")
    splits = read_splits(config)
    rows, bad = splits["eval"]
    assert [len(r) for r, _ in splits.values()] == [6, 1]
    assert splits["train"][0][5].source == f"{hub_folder}[train]:5"
    assert splits["train"][0][5].prompt == record(5)["prompt"]
    assert bad.problems[0].startswith(f"{hub_folder}[test]:1: chosen equals rejected")
    for wrong in ({"dataset_train_split": "trane"}, {"dataset_config": "en"}):
        with pytest.raises(InputError, match="dataset_name: cannot load"):
            read_splits(data_config(hub_folder, **wrong))
    with pytest.raises(InputError, match="dataset_name: cannot load 'none/such'"):
        read_splits(RunConfig(model_name_or_path="m", dataset_name="./none/such"[2:]))


def test_weights_are_exact_and_decided_by_the_seed():
    rows = [check_record(record(i), f"f:{i}") for i in range(10)]
    places = {w: [int(r.source[2:]) for r in weigh(rows, w, (1, 0))] for w in (0.3, 1, 2.5)}
    assert [len(p) for p in places.values()] == [3, 10, 25]
    assert len(set(places[0.3])) == 3 and places[1] == list(range(10))
    assert {places[2.5].count(i) for i in range(10)} == {2, 3}
    assert weigh(rows, 0.3, (1, 0)) == weigh(rows, 0.3, (1, 0)) != weigh(rows, 0.3, (2, 0))
    with pytest.raises(InputError, match=r"train_weights: 0.01 of 10 rows leaves none"):
        weigh(rows, 0.01, (1, 0))


def test_mixture_and_held_out_split(hub_folder, tmp_path):
    """Files before data sets; the held-out prompts are in no source's training rows."""
    own = write_jsonl(tmp_path / "own.jsonl", [record(i) for i in range(4)] * 2)
    fields = {"train_file": own, "eval_split_ratio": 0.34, "train_weights": [0.5, 3]}
    splits = read_splits(data_config(hub_folder, **fields))
    (train, _), (held_out, _) = splits["train"], splits["eval"]
    prompts = [{json.dumps(row.prompt) for row in rows} for rows in (train, held_out)]
    assert len(prompts[1]) == 2 and not prompts[0] & prompts[1]
    ours = sum(row.source.startswith(own) for row in train)
    held = Counter(row.source.startswith(own) for row in held_out)
    assert ours == round(0.5 * (8 - held[True])) and len(train) - ours == 3 * (6 - held[False])
    assert read_splits(data_config(hub_folder, **fields))["train"][0] == train
    assert read_splits(data_config(hub_folder, **fields, seed=1))["train"][0] != train
    with pytest.raises(InputError, match="expected at least 2 different prompts, got 1"):
        hold_out([train[:1]], 0.5, 0)


def encode(row, max_length=256, tokenizer=None, policy="error"):
    tokenizer = tokenizer or tiny_tokenizer()
    rows = [check_record(row, "f:1")]
    return encode_rows(rows, tokenizer, Limits(max_length), BadRows(policy)).pairs[0]


def trained_text(sequence, tokenizer):
    return tokenizer.decode(sequence.labels[sequence.labels != IGNORE])


@pytest.mark.parametrize("after", ["", "\n", "<|im_start|> <|im_end|>"])
def test_a_call_that_the_template_leaves_out_is_a_bad_row(after):
    """Else the model would learn to say nothing."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    tool = {"role": "tool", "content": "2"}
    tokenizer = tiny_tokenizer(CHATML.replace("<|im_end|>", f"{after}<|im_end|>", 1))
    message = "f:1: nothing to train on: the chat template makes .* shows its tool_calls"
    for chosen in ([call], [call, tool, *ANSWER], [*ANSWER, tool, call]):
        with pytest.raises(InputError, match=message):
            encode({"prompt": USER, "chosen": chosen, "rejected": ANSWER}, tokenizer=tokenizer)
    said = [call | {"content": "let me add"}, tool, *ANSWER]
    assert encode({"prompt": USER, "chosen": said, "rejected": ANSWER}, tokenizer=tokenizer)


def test_only_the_response_and_its_end_are_trained_on():
    tokenizer = tiny_tokenizer()
    chosen = encode(TALK).chosen
    assert tokenizer.decode(chosen.ids) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"
    )
    assert trained_text(chosen, tokenizer) == "hello<|im_end|>"
    for position, label in enumerate(chosen.labels):  # labels[t] is what position t predicts
        assert label == IGNORE or label == chosen.ids[position + 1]
    assert chosen.labels[-1] == IGNORE


def test_only_assistant_messages_of_a_long_response_are_trained_on():
    prompt, chosen = chat("hi", "hello", "and?", "bye")
    row = {"prompt": prompt, "chosen": chosen, "rejected": ANSWER}
    tokenizer = tiny_tokenizer()
    assert trained_text(encode(row).chosen, tokenizer) == "hello<|im_end|>bye<|im_end|>"


def test_strings_are_continued_and_ended_once():
    tokenizer = tiny_tokenizer()
    chosen = encode(GOOD).chosen
    assert tokenizer.decode(chosen.ids) == "2+2= 4<|im_end|>"
    assert trained_text(chosen, tokenizer) == " 4<|im_end|>"


def test_a_template_without_end_of_turn_gets_eos_once():
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tiny_tokenizer(plain)
    sequence = encode(TALK, tokenizer=tokenizer).chosen
    assert trained_text(sequence, tokenizer) == "hello\n<|im_end|>"
    token = TALK | {"chosen": chat("", "say <|endoftext|> to end")[1]}  # part of what is said
    sequence = encode(token, tokenizer=tokenizer).chosen
    assert trained_text(sequence, tokenizer) == "say <|endoftext|> to end\n<|im_end|>"


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
STYLES = {  # template, BOS, EOS, end of turn, its special tokens
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>",
               ["<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": (GEMMA, "<bos>", "<eos>", "<end_of_turn>", ["<start_of_turn>"]),
    "mistral": (MISTRAL, "<s>", "</s>", "</s>", ["[INST]", "[/INST]"]),
}  # fmt: skip


@pytest.fixture(params=STYLES)
def style(request):
    """A tokenizer that adds BOS (and, Llama aside, EOS) to plain text, and its end of turn."""
    template, bos, eos, end, others = STYLES[request.param]
    tokenizer = tiny_tokenizer(template, specials=list(dict.fromkeys([bos, eos, end, *others])))
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    tail = [] if request.param == "llama3" else [eos]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([bos, "$A", *tail]),
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, *tail)],
    )
    assert tokenizer.decode(tokenizer("x")["input_ids"]) == bos + "x" + "".join(tail)
    return tokenizer, end


def test_every_style_has_bos_once_and_ends_every_turn_once(style):
    tokenizer, end = style
    prompt, chosen = chat("hi", "hello", "and?", "bye")
    sequence = encode(
        {"prompt": prompt, "chosen": chosen, "rejected": ANSWER}, 512, tokenizer
    ).chosen
    whole = tokenizer.apply_chat_template(prompt + chosen, tokenize=False)
    text = tokenizer.decode(sequence.ids)
    assert text == whole.rstrip("\n") and text.count(tokenizer.bos_token) == 1
    assert trained_text(sequence, tokenizer) == f"hello{end}bye{end}"


def test_every_style_continues_strings_after_one_bos(style):
    tokenizer, _ = style
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    for row in (GOOD, GOOD | {"prompt": bos + "2+2="}, GOOD | {"chosen": " 4" + eos}):
        sequence = encode(row, 512, tokenizer).chosen
        assert tokenizer.decode(sequence.ids) == f"{bos}2+2= 4{eos}"
        assert trained_text(sequence, tokenizer) == f" 4{eos}"


def test_an_end_that_a_prompt_of_strings_writes_stays_in_it(style):
    tokenizer, _ = style
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    sequence = encode(GOOD | {"prompt": "2+2=" + eos}, 512, tokenizer).chosen
    assert tokenizer.decode(sequence.ids) == f"{bos}2+2={eos} 4{eos}"
    assert trained_text(sequence, tokenizer) == f" 4{eos}"
    ids = prompt_ids(tokenizer, Prompt(1, "2+2=" + eos), [])
    assert tokenizer.decode(ids) == f"{bos}2+2={eos}"


def test_a_cut_prompt_keeps_bos(style):
    tokenizer, _ = style
    sequence = encode(LONG, 24, tokenizer).chosen
    assert len(sequence.ids) == 24 or tokenizer.bos_token == "<s>"
    text = tokenizer.decode(sequence.ids)
    assert text.startswith(tokenizer.bos_token) and "0123456789" * 3 not in text
    assert trained_text(sequence, tokenizer).startswith("hello")


def test_a_template_file_stands_in_for_the_tokenizer_s(tmp_path):
    tokenizer = tiny_tokenizer(None)
    (tmp_path / "own.jinja").write_text(CHATML.replace("<|im_start|>", "# "))
    use_chat_template(tokenizer, str(tmp_path / "own.jinja"))
    text = tokenizer.decode(encode(TALK, tokenizer=tokenizer).chosen.ids)
    assert text == "# user\nhi<|im_end|>\n# assistant\nhello<|im_end|>"
    for content, message in ((" ", "own.jinja is empty"), (None, "no such file")):
        path = tmp_path / "own.jinja"
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(InputError, match=message):
            use_chat_template(tokenizer, str(path))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        (CHATML.replace("<|im_start|>{{", "{{ messages|length }}<|im_start|>{{"), "no prefix"),
        ("{{ raise_exception('only one turn, please') }}", "refuses the messages: only one turn"),
    ],
    ids=["none", "rewrites", "raises"],
)
def test_a_template_that_cannot_be_trained_on_is_named(template, message):
    with pytest.raises(InputError, match=message) as error:
        encode(TALK, tokenizer=tiny_tokenizer(template))
    assert "f:1" in str(error.value)


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("max_length", [8, 9, 20, 64])
@pytest.mark.parametrize("prompt", [1, 6, 40])
@pytest.mark.parametrize("longest", [1, 3, 30, 90])
def test_a_cut_pair_keeps_prompt_and_responses(mode, max_length, prompt, longest):
    for least in (None, 1, max_length - 1):
        remains, left = Limits(max_length, least, mode).cut(prompt, longest, head=1, tail=2)
        kept, bound = len(remains), max_length // 2 if least is None else least
        assert kept + min(left, longest) <= max_length and left >= 1 and kept >= 1
        assert kept >= min(prompt, bound) and left >= min(longest, max_length - bound)
        assert kept == prompt or kept + left == max_length  # nothing is cut in vain
        start = remains[0] == 0
        assert (np.diff(remains) > 0).all() and (start or kept <= 3)
        if kept > 3:  # BOS, and what opens the assistant's turn, stay in either mode
            middle = range(prompt - kept + 1, prompt) if mode == "keep_end" else range(1, kept - 2)
            assert set(middle) <= set(remains.tolist()) and prompt - 1 in remains


LONG = {"prompt": [{"role": "user", "content": "0123456789" * 3}]}
LONG |= {"chosen": ANSWER, "rejected": chat("", "no")[1]}


@pytest.mark.parametrize(
    ("mode", "prompt"),
    [
        ("keep_end", "<|im_start|>89<|im_end|>\n<|im_start|>assistant\n"),
        ("keep_start", "<|im_start|>user<|im_start|>assistant\n"),
    ],
)
def test_a_cut_prompt_still_opens_the_assistant_s_turn(mode, prompt):
    tokenizer, limits = tiny_tokenizer(), Limits(22, 16, mode)
    rows = [check_record(LONG, "f:1")]
    split = encode_rows(rows, tokenizer, limits, BadRows("error"))
    assert tokenizer.decode(split.pairs[0].chosen.ids) == prompt + "hello<|im_end|>"
    counts = ("truncated_pairs", "truncated_prompts", "truncated_responses")
    assert [split.report[name] for name in counts] == [1, 1, 0]


def test_drop_leaves_long_pairs_out_and_counts_them():
    rows = [check_record(r, f"f:{i}") for i, r in enumerate([GOOD, LONG, TALK], 1)]
    split = encode_rows(rows, tiny_tokenizer(), Limits(50, 30, "drop"), BadRows("error"))
    assert split.report["dropped"] == {"longer than max_length": 1}
    split = encode_rows(rows, tiny_tokenizer(), Limits(90, 30, "drop"), BadRows("error"))
    assert split.report["dropped"] == {"prompt longer than max_prompt_length": 1}
    assert len(split.pairs) == 2 and split.report["truncated_pairs"] == 0
    with pytest.raises(InputError, match="no usable preference pair.*longer than max_length"):
        encode_rows(rows[1:2], tiny_tokenizer(), Limits(50, None, "drop"), BadRows("error"))


def test_truncation_is_counted_and_equal_remains_are_dropped():
    same_start = {"prompt": "p", "chosen": "x" * 50 + "a", "rejected": "x" * 50 + "b"}
    rows = [check_record(r, f"f:{i}") for i, r in enumerate([GOOD, same_start, TALK], 1)]
    split = encode_rows(rows, tiny_tokenizer(), Limits(16), BadRows("error"))
    assert len(split.pairs) == 2 and split.report["truncated_pairs"] == 1
    assert split.report["dropped"] == {"responses equal after truncation": 1}


@pytest.mark.parametrize("max_length", [16, 256])
def test_responses_that_a_template_makes_equal_are_a_bad_row(max_length):
    """Most templates trim: such a pair's margin is 0, whatever the model says."""
    trimming = tiny_tokenizer(CHATML.replace("m['content']", "m['content'] | trim"))
    spaced = TALK | {"rejected": chat("", ANSWER[0]["content"] + " \n")[1]}
    with pytest.raises(InputError, match="f:1: chosen equals rejected: once rendered"):
        encode(spaced, max_length, trimming)
    assert encode(spaced)  # two answers to a template that keeps white space


def test_the_demo_data_is_complete_and_held_out():
    config = parse_config([])
    train, held_out = (
        read_rows(f, BadRows("error")) for f in (config.train_file, config.eval_file)
    )
    assert len(train) >= 160 and len(held_out) >= 32
    prompts = [{json.dumps(row.prompt) for row in rows} for rows in (train, held_out)]
    assert not prompts[0] & prompts[1]
