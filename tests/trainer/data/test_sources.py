"""Other people's files: their columns, their messages, their formats, where an error stands."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.tiny import ANSWER, GOOD, TALK, USER, chat, record, tiny_tokenizer, write_jsonl
from trainer.config.fields import RunConfig
from trainer.config.recipe import parse_config
from trainer.data.columns import Columns
from trainer.data.encoding import encode_rows
from trainer.data.files import find_files, read_file
from trainer.data.rows import BadRow, BadRows, check_record
from trainer.data.sources import read_rows, read_splits
from trainer.data.truncation import Limits
from trainer.errors import InputError

NO = chat("", "no")[1]
MODEL = ["--model_name_or_path", "m"]
TEXTS = {"chosen": " 4", "rejected": " 5"}
LISTS = {"chosen": ANSWER, "rejected": NO}
ALPACA = {"instruction": "Add.", "input": "2+2"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "hi"}],
    "chosen": {"from": "gpt", "value": "hello"},
    "rejected": {"from": "gpt", "value": "no"},
}
TALKS = (USER, ANSWER, NO)

READ = [  # columns, record, prompt, chosen and rejected
    ({"prompt": ("question",)}, TEXTS | {"question": "2+2="}, ("2+2=", " 4", " 5")),
    ({"prompt": ("Prompt",)}, LISTS | {"Prompt": USER}, TALKS),
    (
        {"prompt": ("instruction", "input")},
        TEXTS | ALPACA,
        ("Add.\n2+2", " 4", " 5"),
    ),
    ({"prompt": ("instruction", "input")}, TEXTS | ALPACA | {"input": ""}, ("Add.", " 4", " 5")),
    ({"prompt": ("instruction", "input")}, TEXTS | {"instruction": "A."}, ("A.", " 4", " 5")),
    (
        {"prompt": ("instruction",), "chosen": "output.0", "rejected": "output.1"},
        {"instruction": "Add.", "output": [" 4", " 5"]},
        ("Add.", " 4", " 5"),
    ),
    (
        {"prompt": ("x.question",), "chosen": "good", "rejected": "bad.text"},
        {"x": {"question": "2+2="}, "good": " 4", "bad": {"text": " 5"}},
        ("2+2=", " 4", " 5"),
    ),
    ({"chosen": "a.b"}, {"prompt": "2+2=", "a.b": " 4", "rejected": " 5"}, ("2+2=", " 4", " 5")),
    ({"prompt": ("conversations",)}, SHAREGPT, TALKS),
    ({"prompt": ("messages",)}, {"messages": USER, "chosen": ANSWER[0], "rejected": NO[0]}, TALKS),
    (
        {"prompt": ("system", "conversations")},
        SHAREGPT | {"system": "be brief"},
        ([{"role": "system", "content": "be brief"}, *USER], ANSWER, NO),
    ),
    ({"prompt": ("system", "conversations")}, SHAREGPT | {"system": ""}, TALKS),
    (
        {},
        {name: SHAREGPT["conversations"] + [SHAREGPT[name]] for name in ("chosen", "rejected")},
        TALKS,
    ),
    (
        {"implicit": True},
        {"chosen": "2+2 is 4", "rejected": "2+2 is 5"},
        ("2+2 is", " 4", " 5"),
    ),
]


@pytest.mark.parametrize(("columns", "given", "texts"), READ)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_are_read_by_mapping(columns, given, texts, kind, tmp_path):
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(file, [given | {"score": 1}])
    else:
        pq.write_table(pa.Table.from_pylist([given | {"score": 1}]), file)
    (row,) = read_rows(str(file), BadRows("error"), Columns(**columns))
    assert (row.prompt, row.chosen, row.rejected) == texts and row.source == f"{file}:1"


HAS = "the row has {}; name the column that holds it, as --prompt_column {}, or give --implicit_pro"
UNREAD = [  # columns, record, message
    ({}, TEXTS | {"question": "a"}, HAS.format("chosen, rejected, question", "question")),
    ({}, TEXTS | {"Prompt": "a"}, HAS.format("chosen, rejected, Prompt", "Prompt")),
    ({}, TEXTS | ALPACA, "as --prompt_column instruction input, or give"),
    ({}, TEXTS | {"instruction": "a"}, "as --prompt_column instruction, or give"),
    ({}, TEXTS | {"q": "a"}, HAS.format("chosen, rejected, q", "NAME")),
    ({}, {"chosen": "a b c", "rejected": "a b d", "question": "?"}, "as --prompt_column question"),
    ({}, LISTS | {"question": "a"}, "no common prompt: without prompt, both must begin with the"),
    ({}, LISTS | {"question": "a"}, "or name its column, as --prompt_column question"),
    (
        {},
        {k: [{"role": "system", "content": "s"}, *v] for k, v in LISTS.items()} | {"input": USER},
        "no prompt: nobody asks in the messages, and the row has chosen, rejected, input; name",
    ),
    ({}, SHAREGPT, "as --prompt_column conversations"),
    ({"prompt": ("question",)}, GOOD, "missing field: question (the row has prompt, chosen, rej"),
    ({"prompt": ("a", "b")}, GOOD, "missing field: a, b (the row has prompt, chosen, rejected)"),
    ({"chosen": "good"}, GOOD, "missing field: good (the row has prompt, chosen, rejected); name"),
    ({"rejected": "output.1"}, GOOD | {"output": ["a"]}, "missing field: output.1"),
    ({}, {"question": "a", "good": "b", "bad": "c"}, "another column by --chosen_column and --rej"),
    ({"prompt": ("conversations", "system")}, SHAREGPT | {"system": "s"}, "strings before the"),
    ({"prompt": ("conversations",)}, SHAREGPT | {"chosen": {"from": "bot", "value": "a"}},
     "bad message: chosen[0]: expected role in"),
    ({"prompt": ("conversations",)}, SHAREGPT | {"chosen": {"from": "human", "value": "a"}},
     "bad turns: chosen must begin and end with an assistant"),
    ({"implicit": True}, {"chosen": "yes", "rejected": "no"}, "no common prompt: without prompt"),
    ({}, {k: json.dumps(v) for k, v in TALK.items()}, "messages as text: expected a list of mess"),
    ({}, {k: str(v) for k, v in TALK.items()}, "messages as text: expected a list of messages, go"),
    ({}, TEXTS | {"prompt": json.dumps(USER)}, "messages as text: expected a list of messages"),
    ({}, TEXTS | {"prompt": json.dumps([{"from": "human", "value": "hi"}])}, "messages as text: "),
    ({}, TEXTS | {"prompt": None}, "no prompt: prompt is null; the row has chosen, rejected, pro"),
    ({"prompt": ("system", "quest")}, TEXTS | {"system": ""}, "missing field: quest (the row has"),
    ({"prompt": ("question",)}, TEXTS | {"question": None}, "no prompt: question: null or empty"),
]  # fmt: skip


def test_a_text_that_is_about_messages_stays_one():
    given = {"prompt": "As JSON: ", "chosen": '[{"role": "user"}]', "rejected": '{"role": "user"}'}
    row = check_record(given, "f:1")
    assert (row.prompt, row.chosen, row.rejected) == tuple(given.values())


def test_cells_without_a_column_are_no_row(tmp_path):
    """Commas that nobody quoted, which would move every text one column on."""
    file = tmp_path / "rows.csv"
    file.write_text("prompt,chosen,rejected\nWhat, why, a,b\n", encoding="utf-8")
    bad = BadRows("error")
    assert read_rows(str(file), bad) == []
    with pytest.raises(InputError, match="rows.csv:2: more cells than columns: .*'b'; quote"):
        bad.settle(0)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_of_the_prompt_that_no_row_has_is_an_error(kind, tmp_path):
    """One typed wrong would be left out of every prompt."""
    file, rows = tmp_path / f"rows.{kind}", [TEXTS | ALPACA, TEXTS | {"instruction": "A."}]
    if kind == "jsonl":
        write_jsonl(file, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    words = [*MODEL, "--train_file", str(file), "--prompt_column", "instruction"]
    assert len(read_splits(parse_config([*words, "input"]))["train"][0]) == 2
    with pytest.raises(InputError, match="prompt_column: no row of the training data has inputs;"):
        read_splits(parse_config([*words, "inputs"]))


@pytest.mark.parametrize(("columns", "given", "message"), UNREAD)
def test_columns_that_are_not_there_are_named(columns, given, message, tmp_path):
    for kind in ("jsonl", "parquet"):
        file = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            write_jsonl(file, [given])
        else:
            pq.write_table(pa.Table.from_pylist([given]), file)
        bad = BadRows("error")
        read_rows(str(file), bad, Columns(**columns))
        with pytest.raises(InputError) as error:
            bad.settle(0)
        assert message in str(error.value) and f"{file}:1: " in str(error.value)


def test_a_file_without_a_usable_row_says_why_under_skip_too(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [TEXTS | {"question": "a"}])
    config = RunConfig(model_name_or_path="m", train_file=file, on_bad_row="skip")
    with pytest.raises(InputError, match="no usable .*{'no prompt': 1}.*--prompt_column question"):
        read_splits(config)


def test_a_config_maps_columns_of_every_source(tmp_path):
    rows = [TEXTS | {"question": "a"}]
    files = [write_jsonl(tmp_path / name, rows) for name in ("train.jsonl", "eval.jsonl")]
    words = [
        *MODEL,
        "--train_file",
        files[0],
        "--eval_file",
        files[1],
        "--prompt_column",
        "question",
    ]
    config = parse_config(words)
    assert config.prompt_column == ("question",)
    splits = read_splits(config)
    assert [rows[0].prompt for rows, _ in splits.values()] == ["a", "a"]


def test_files_that_are_read_twice_are_told(tmp_path, capsys):
    one, two = (write_jsonl(tmp_path / name, [GOOD]) for name in ("a.jsonl", "b.jsonl"))
    words = [*MODEL, "--train_file", one, f"{tmp_path}/a.*"]
    assert len(read_splits(parse_config(words))["train"][0]) == 2
    assert f"warning: {one} is read 2 times" in capsys.readouterr().out
    read_splits(parse_config([*MODEL, "--train_file", str(tmp_path), "--eval_file", two]))
    told = capsys.readouterr().out
    assert f"warning: {two} is trained on, and held-out data, too" in told and one not in told
    read_splits(parse_config([*MODEL, "--train_file", one, "--eval_file", two]))
    assert "warning" not in capsys.readouterr().out


def test_alpaca_pairs_are_strings_to_the_encoder(capsys):
    columns = Columns(prompt=("instruction", "input"))
    row = check_record(ALPACA | TEXTS, "f:1", columns)
    tokenizer = tiny_tokenizer()
    (pair,) = encode_rows([row], tokenizer, Limits(64), BadRows("error")).pairs
    assert tokenizer.decode(pair.chosen.ids) == "Add.\n2+2 4<|im_end|>"
    assert "warning: 1 rows of the given data are strings" in capsys.readouterr().out


ROWS = [record(i) for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,chosen,rejected\n2+2=, 4, 5\n3+3=, 6, 7\n"
FILES = {  # name and content: the places of its rows
    ("a.jsonl", LINES): ["1", "2", "3", "4"],
    ("a.jsonl", "\ufeff" + LINES): ["1", "2", "3", "4"],
    ("a.json", LINES): ["1", "2", "3", "4"],
    ("a.json", json.dumps(ROWS)): ["1", "1", "1", "1"],
    ("a.json", "\ufeff \n" + json.dumps(ROWS[:2], indent=1)): ["3", None],
    ("a.json", "[\n" + LINES.strip().replace("\n", ",\n") + "\n]\n"): ["2", "3", "4", "5"],
    ("a.csv", CSV): ["2", "3"],
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("file", "places"), FILES.items(), ids=lambda v: str(v)[:30])
def test_every_format_is_read_packed_or_not(file, places, packed, tmp_path):
    name, data = file[0], file[1].encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    rows = read_rows(str(path), BadRows("error"))
    assert len(rows) == len(places)
    for row, place in zip(rows, places, strict=True):
        assert place is None or row.source == f"{path}:{place}"
    if not name.endswith("csv"):
        assert [row.prompt for row in rows] == [row["prompt"] for row in ROWS[: len(rows)]]


BROKEN = [  # name, content, message
    ("a.json", b'[\n{"prompt": "a",\n "chosen" 1}]', "a.json:3: not valid JSON: Expecting ':'"),
    ("a.json", b'[\n{"a": 1}\n{"b": 1}]', "a.json:3: not valid JSON: Expecting ',' or ']'"),
    ("a.json", b'[{"a": 1},\n', "a.json:2: not valid JSON: Expecting value"),
    ("a.json", b"[\n1,\n2\n", "a.json:4: not valid JSON: Expecting"),
    ("a.json", b"[{}]\n\n[{}]", "a.json:3: not valid JSON: text follows the array"),
    ("a.json", b"[\n\n3]", "a.json:3: not a JSON object: got int"),
    ("a.json", b'[\n{"prompt": "\\ud83d"}]', "a.json:2: not valid JSON: '\\ud83d' is half"),
    ("a.json", b"[\xff]", "a.json: not a readable JSON file"),
    ("a.json", b"[]", "no usable preference pair"),
    ("a.json", json.dumps({"data": ROWS}, indent=1).encode(), "a.json: expected an array, or one"),
    ("a.jsonl.gz", b"not packed", "a.jsonl.gz: not a readable JSONL file"),
    ("a.csv.gz", gzip.compress(CSV.encode())[:-9], "a.csv.gz: not a readable CSV file"),
    ("a.parquet.gz", b"", "a.parquet.gz: expected a .jsonl, .json, .csv or .parquet file (all but"),
    ("a.gz", b"", "a.gz: expected a .jsonl, .json, .csv or .parquet file"),
    ("a.csv.gz", gzip.compress(b"prompt,chosen,rejected\na,b,\n"), "a.csv.gz:2: empty response"),
    ("a.jsonl.gz", gzip.compress(b"\n{}\n"), "a.jsonl.gz:2: missing field"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_file_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    bad = BadRows("error")
    with pytest.raises(InputError) as error:
        bad.settle(len(read_rows(str(tmp_path / name), bad)))
    assert message in str(error.value)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "more" / ".hidden").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "more/c.jsonl", "more/.hidden/d.jsonl", ".e.jsonl"):
        write_jsonl(tmp_path / name, [GOOD, TALK])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_folders_and_globs_are_their_files_in_order(folder, monkeypatch):
    names = ("a.jsonl", "b.jsonl", "more/c.jsonl")
    everything = [str(folder / name) for name in names]
    assert find_files(str(folder)) == everything
    assert find_files(f"{folder}/*.jsonl") == everything[:2]
    assert find_files(f"{folder}/**/*.jsonl") == everything
    assert [row.source for row in read_rows(f"{folder}/[ab].jsonl", BadRows("error"))] == [
        f"{everything[0]}:1", f"{everything[0]}:2", f"{everything[1]}:1", f"{everything[1]}:2",
    ]  # fmt: skip
    (folder / "[x].jsonl").write_text(json.dumps(GOOD))
    assert find_files(str(folder / "[x].jsonl")) == [str(folder / "[x].jsonl")]
    monkeypatch.chdir(folder)
    assert find_files("more") == ["more/c.jsonl"]
    assert len(find_files("trainer/recipes/*.jsonl")) == 2  # as recipes name them
    fields = {"model_name_or_path": "m", "train_file": ["more", "?.jsonl"]}
    rows, _ = read_splits(RunConfig(**fields, train_weights=[1, 0.5]))["train"]
    assert len(rows) == 2 + 2  # a glob is one source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "empty: no .jsonl, .json, .csv or .parquet file"),
        ("*.csv", "[*].csv: no such file"),
        ("none", "none: no such file"),
        ("*.md", "README.md: expected a .jsonl, .json, .csv or .parquet file"),
    ],
)
def test_what_matches_no_file_is_an_error(folder, name, message):
    with pytest.raises(InputError, match=message):
        for file in find_files(str(folder / name)):
            list(read_file(file))


def test_a_message_that_is_no_pair_of_from_and_value_is_named():
    with pytest.raises(BadRow, match="or from and value"):
        check_record(TALK | {"chosen": [{"from": "gpt"}]}, "f:1")
