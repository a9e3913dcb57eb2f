"""A sample of `trainer/ARCHITECTURES.md`: what it says of a model, and its gradient."""

import re

import pytest

from tests.trainer.model.architectures import KINDS, TABLE, measure

# Dense and expert layers, windows, latent attention, sinks, ALiBi, convolutions, recurrences,
# encoders as decoders, factors and softcaps on logits, random hashing, two streams, one prompt.
SAMPLE = [
    "arcee", "bert", "bloom", "cohere2_moe", "dbrx", "deepseek_v3", "falcon_h1", "gemma2",
    "gpt_oss", "granitemoehybrid", "jamba", "lfm2", "mamba", "opt", "phimoe", "prophetnet",
    "qwen3_5", "stablelm", "xlnet", "zaya",
]  # fmt: skip
BOUND = 1e-4


def rows():
    """The table: how a type runs, and its error, by type."""
    found = re.findall(r"^\| `(.+?)` \| (.+?) \| (\S*) ?\|", TABLE.read_text(), re.MULTILINE)
    return {kind: (how, float(error or 0)) for kind, how, error in found}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_row_of_the_table_is_true(kind):
    row = measure(kind)
    assert row.how == rows()[kind][0]
    assert row.error is None or row.error < BOUND


def test_the_table_is_whole():
    found = rows()
    assert found.keys() == set(KINDS)
    assert sum(how in ("packed", "alone") for how, _ in found.values()) >= 150
    assert all(error < BOUND for _, error in found.values())
    assert {how for how, _ in found.values()} <= {"packed", "alone", "refused", "not built"}
