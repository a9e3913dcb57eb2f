"""Rows, what is wrong with them, and what becomes of them: tokens, labels, truncation."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trainer_tiny import CHATML, chat, record, tiny_tokenizer, write_jsonl

from trainer.config import ROOT, InputError, parse_config
from trainer.data import BadRows, check_record, read_rows
from trainer.encoding import IGNORE, encode_rows, truncate

GOOD = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}
USER, ANSWER = chat("hi", "hello")
TALK = {"prompt": USER, "chosen": ANSWER, "rejected": chat("", "go away")[1]}

BAD_ROWS = [
    (b"{not json", "not valid JSON: Expecting property name"),
    (b'{"prompt": "\xff"}', "not valid JSON"),
    (b"[1, 2]", "not a JSON object: got list"),
    ({}, "missing field: prompt, chosen, rejected (the row has no field)"),
    ({"prompt": "a", "chosen": "b"}, "missing field: rejected (the row has prompt, chosen)"),
    (GOOD | {"chosen": None}, "missing field: chosen"),
    (GOOD | {"chosen": ""}, "empty response: chosen"),
    (GOOD | {"rejected": " \n"}, "empty response: rejected"),
    (GOOD | {"rejected": " 4"}, "chosen equals rejected"),
    (GOOD | {"chosen": 4}, "wrong type: chosen: expected a string or a list of messages, got int"),
    (GOOD | {"chosen": ANSWER}, "mixed forms: expected all strings or all message lists"),
    (TALK | {"chosen": [{"role": "bot", "content": "x"}]}, "bad message: chosen[0]: expected"),
    (TALK | {"chosen": ["x"]}, "bad message: chosen[0]"),
    (TALK | {"chosen": [{"role": "assistant", "content": None}]}, "bad message: chosen[0]"),
    (TALK | {"chosen": []}, "empty response: chosen"),
    (TALK | {"chosen": [{"role": "assistant", "content": " "}]}, "empty response: chosen"),
    (TALK | {"chosen": USER}, "bad turns: chosen must begin and end with an assistant"),
    (TALK | {"prompt": []}, "bad turns: prompt must end with a user or system message"),
    (TALK | {"prompt": USER + ANSWER}, "bad turns: prompt must end with a user or system message"),
    (TALK | {"rejected": ANSWER}, "chosen equals rejected"),
]  # fmt: skip


def as_line(row):
    return row if isinstance(row, bytes) else json.dumps(row).encode()


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[m[:40] for _, m in BAD_ROWS])
def test_a_bad_row_is_named_by_file_and_line(row, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(as_line(GOOD) + b"\n\n" + as_line(row) + b"\n")
    with pytest.raises(InputError) as error:
        read_rows((str(file),), BadRows("error"))
    assert f"{file}:3: {message}" in str(error.value) and "--on_bad_row skip" in str(error.value)


def test_skip_counts_by_reason(tmp_path):
    rows = [GOOD, *(row for row, _ in BAD_ROWS), TALK]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(as_line(row) for row in rows))
    bad = BadRows("skip")
    assert len(read_rows((str(file),), bad)) == 2
    assert bad.reasons.total() == len(BAD_ROWS)
    assert bad.reasons["empty response"] == 4 and bad.reasons["not valid JSON"] == 2


def test_many_bad_rows_are_counted_not_listed(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{}] * 20)
    with pytest.raises(InputError, match=r"20 unusable row(?s:.*)\.\.\. and 15 more"):
        read_rows((file,), BadRows("error"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("rows.csv", b"a,b\n", "expected a .jsonl or .parquet file, got .csv"),
        ("rows.parquet", b"no parquet", "not a readable Parquet file"),
        ("empty.jsonl", b"\n", "no usable preference pair"),
    ],
)
def test_a_bad_file_is_named(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows((str(tmp_path / name),), BadRows("skip"))


def test_parquet_and_several_files(tmp_path):
    records = [record(i) for i in range(3)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    lines = write_jsonl(tmp_path / "b.jsonl", records)
    rows = read_rows((str(tmp_path / "a.parquet"), lines), BadRows("error"))
    assert [r.prompt for r in rows[:3]] == [r.prompt for r in rows[3:]] and len(rows) == 6
    assert rows[1].source.endswith("a.parquet:2")


def encode(row, max_length=256, tokenizer=None, policy="error"):
    tokenizer = tokenizer or tiny_tokenizer()
    return encode_rows([check_record(row, "f:1")], tokenizer, max_length, BadRows(policy)).pairs[0]


def trained_text(sequence, tokenizer):
    return tokenizer.decode([label for label in sequence.labels if label != IGNORE])


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


@pytest.mark.parametrize("max_length", [8, 9, 20, 64])
@pytest.mark.parametrize("prompt_length", [1, 6, 40])
@pytest.mark.parametrize("lengths", [(1, 30), (30, 1), (3, 2), (90, 80)])
def test_truncation_keeps_one_prompt_and_every_response(max_length, prompt_length, lengths):
    prompt = [(k, False) for k in range(prompt_length)]
    responses = [[(100 + k, True) for k in range(length)] for length in lengths]
    cut, *short = truncate(prompt, *responses, max_length)
    assert cut and cut == prompt[-len(cut) :]
    for response, kept in zip(responses, short, strict=True):
        assert kept == response[: len(kept)] and len(cut) + len(kept) <= max_length
        assert len(kept) >= min(len(response), max_length // 2)
        if prompt_length + max(lengths) <= max_length:
            assert kept == response and cut == prompt


def test_truncation_is_counted_and_equal_remains_are_refused():
    same_start = {"prompt": "p", "chosen": "x" * 50 + "a", "rejected": "x" * 50 + "b"}
    rows = [check_record(r, f"f:{i}") for i, r in enumerate([GOOD, same_start, TALK], 1)]
    split = encode_rows(rows, tiny_tokenizer(), 16, bad := BadRows("skip"))
    assert len(split.pairs) == 2 and split.report["truncated_pairs"] == 1
    assert bad.problems == ["f:2: responses equal after truncation: max_length is 16"]
    assert split.report["bad_rows"] == {"responses equal after truncation": 1}


def test_the_demo_data_is_complete_and_held_out():
    config = parse_config([])
    train, held_out = (
        read_rows(f, BadRows("error")) for f in (config.train_file, config.eval_file)
    )
    assert len(train) >= 160 and len(held_out) >= 32
    prompts = [{json.dumps(row.prompt) for row in rows} for rows in (train, held_out)]
    assert not prompts[0] & prompts[1]


MTBENCH = Path(ROOT).parent / "shared" / "data" / "mtbench_preferences.jsonl"


@pytest.mark.skipif(not MTBENCH.is_file(), reason="the project does not ship the MT-Bench answers")
def test_real_answers_of_one_and_two_turns():
    tokenizer = tiny_tokenizer()
    rows = read_rows((str(MTBENCH),), bad := BadRows("skip"))
    split = encode_rows(rows, tokenizer, 10**6, bad)
    assert len(split.pairs) + bad.reasons.total() == 300 and bad.reasons.total() < 10
    long = next(k for k, row in enumerate(rows) if len(row.chosen) == 3)
    answers = [m["content"] for m in rows[long].chosen if m["role"] == "assistant"]
    wanted = "".join(answer + "<|im_end|>" for answer in answers)
    assert trained_text(split.pairs[long].chosen, tokenizer) == wanted
