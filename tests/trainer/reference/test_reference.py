"""Where reference log-probs come from: equal numbers in every mode, and a table that never lies."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.trainer.tiny import (
    CHATML,
    EPS,
    assert_same_run,
    logps_budgets,
    margin_budget,
    nudged,
    record,
    save_tiny,
    sides,
    tiny_config,
    tiny_llama,
    tiny_model,
    tiny_policy,
    tiny_split,
    tiny_tokenizer,
    write_jsonl,
)
from trainer import run
from trainer.config.recipe import parse_config
from trainer.data.batches import pack, share_prefixes
from trainer.data.steps import Step, plan_pass
from trainer.errors import InputError
from trainer.reference import cache, modes
from trainer.reference.cache import ROW, Table, data_key, model_key
from trainer.reference.modes import TOLERANCE, Reference, fill, scorer

PAIRS = 10
TIMINGS = ("tokens_per_second", "step_seconds", "eval/seconds", "peak_memory_gb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    recipe = {
        "model_name_or_path": save_tiny(folder / "model"),
        "train_file": write_jsonl(folder / "train.jsonl", [record(i) for i in range(PAIRS)]),
        "eval_file": write_jsonl(folder / "eval.jsonl", [record(i) for i in range(10, 14)]),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "cpu_threads": 1,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def train(folder, tmp_path, monkeypatch, capsys):
    """``train(*words)`` runs the recipe and returns its metrics, which reference batches were
    computed for training (pairs per batch), and what was printed."""

    def train(*words):
        computed = []
        monkeypatch.setattr(
            modes, "progress", lambda r, title: [computed.append(x) or x for x in r]
        )
        number = len(list(tmp_path.glob("out*")))
        own = [
            "--config",
            str(folder / "tiny.yaml"),
            "--output_dir",
            str(tmp_path / f"out{number}"),
        ]
        threads = torch.get_num_threads()
        rows = run.run(parse_config([*own, *map(str, words)]))
        torch.set_num_threads(threads)
        rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]
        sizes = [sum(map(len, ranks)) for ranks in computed]
        return rows, sizes, capsys.readouterr().out

    return train


def tables(tmp_path):
    return sorted((tmp_path / "reference_cache").iterdir())


def test_every_mode_gives_the_same_numbers(train, folder, tmp_path):
    """In the first epoch to the bit, as the very same batches run. The table's numbers are of that
    epoch's batches; later ones are others, whose sums other processors add up in another order.
    """
    one, computed, _ = train("--num_train_epochs", 1)
    assert computed == [4, 4, 2, 4]
    assert one[0]["eval/rewards/margins"] == one[1]["rewards/margins"] == 0
    for value in (one[0]["eval/loss/dpo"], one[1]["loss/dpo"]):
        assert value == pytest.approx(np.log(2), rel=4 * EPS)  # of four pairs
    assert abs(one[-1]["eval/rewards/margins"]) > 1e-3
    assert train("--reference", "online", "--num_train_epochs", 1)[:2] == (one, [])

    rows, reruns = train()[0], []
    for seed in range(2):
        model = nudged(folder / "model", tmp_path / f"model{seed}", seed)
        reruns.append(train("--model_name_or_path", model)[0])
    online, computed, _ = train("--reference", "online")
    assert computed == []
    assert_same_run(online, reruns, rows)


def test_every_mode_starts_at_the_policy_in_bfloat16(train, folder, fresh_accelerator):
    ours, _, _ = train("--dtype", "bfloat16", "--max_steps", 1)
    same = ["--ref_model_name_or_path", folder / "model"]
    assert ours[0]["eval/rewards/margins"] == ours[1]["rewards/margins"] == 0
    for words in (["--reference", "online"], same, [*same, "--reference", "online"]):
        assert train("--dtype", "bfloat16", "--max_steps", 1, *words)[0] == ours


@pytest.mark.parametrize("packed", [True, False])
def test_a_second_policy_runs_as_the_first(packed, folder):
    """What cannot be packed would give other log-probs in packed rows."""
    config = tiny_config(reference="online", model_name_or_path=str(folder / "model"))
    policy, accelerator = tiny_policy()
    policy.pack(packed)
    reference = Reference(config, policy, tiny_tokenizer(), {}, accelerator)
    assert reference.model.packed == packed


def save_other(folder, model):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_another_reference_model_is_used_in_either_mode(train, folder, tmp_path):
    other = save_other(tmp_path / "other", tiny_llama(seed=1))
    ours, _, _ = train("--max_steps", 2)
    rows, _, _ = train("--max_steps", 2, "--ref_model_name_or_path", other)
    online, _, _ = train(
        "--max_steps", 2, "--reference", "online", "--ref_model_name_or_path", other
    )
    assert online == rows
    assert abs(rows[0]["eval/rewards/margins"]) > 0.01 and rows[0] != ours[0]


def other_reference(path, **fields):
    """The second model of a run whose policy is a Llama."""
    config = tiny_config(reference="online", ref_model_name_or_path=str(path), **fields)
    policy, accelerator = tiny_policy()
    splits = {"train": tiny_split(2)}
    return Reference(config, policy, tiny_tokenizer(), splits, accelerator).model


@pytest.mark.parametrize(
    ("kind", "transform"),
    [("cohere", (0.25, None)), ("gemma2", (1.0, 5.0)), ("llama", (1.0, None))],
)
def test_a_reference_of_another_architecture_has_its_own_transform(kind, transform, tmp_path):
    """Its log-probs are those of its own logits."""
    wanted, split = tiny_model(kind, seed=1), tiny_split(2)
    model = other_reference(save_other(tmp_path / "other", wanted))
    head = model.language_model.get_output_embeddings()
    assert (head.logit_scale, head.logit_softcap) == transform
    found = scorer(model, Accelerator(cpu=True))(pack(split.pairs, (0, 1)))
    truth, budgets = logps_budgets(wanted, sides(split.pairs))
    assert ((found - truth).abs() <= budgets).all()


def swap_letters(folder):
    file = folder / "tokenizer.json"
    tokens = json.loads(file.read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["c"], vocabulary["d"] = vocabulary["d"], vocabulary["c"]
    file.write_text(json.dumps(tokens))


def resize(folder):
    model = tiny_llama()
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)


REFORMER = {
    "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 32], "is_decoder": True,
    "attention_head_size": 8, "feed_forward_size": 64,
}  # fmt: skip


def unusable_architecture(folder):
    tiny_model("reformer", **REFORMER).save_pretrained(folder)


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (resize, {}, "expected a model with the policy's vocabulary of 259 tokens, got 300"),
        (swap_letters, {}, "the policy's tokenizer, but token .* is 'c' to the policy and 'd' to"),
        (without_tokenizer, {}, "cannot load a tokenizer from"),
        (unusable_architecture, {}, "ReformerModelWithLMHead: cannot run a sequence of made-up"),
    ],
)
def test_a_reference_model_that_does_not_fit_is_refused(change, fields, message, tmp_path):
    other = save_other(tmp_path / "other", tiny_llama(seed=1))
    if change:
        change(other)
    with pytest.raises(InputError, match=f"^ref_model_name_or_path: .*{message}"):
        other_reference(other, **fields)
    with pytest.raises(InputError, match="^ref_model_name_or_path: "):
        other_reference(tmp_path / "nowhere")


def test_the_table_serves_other_rates_losses_seeds_and_batch_sizes(train, tmp_path):
    rows, computed, _ = train()
    held_out = tiny_split(14).pairs[10:]
    assert computed == [4, 4, 2, 4] and len(tables(tmp_path)) == 2
    again, computed, text = train()
    assert (again, computed) == (rows, []) and "10 of 10 pairs from" in text
    for words in (
        ("--learning_rate", 1e-4),
        ("--loss_type", "ipo", "--beta", 0.5, "--eta", 0),
        ("--seed", 7, "--per_device_train_batch_size", 3),
        ("--prefix_sharing", "false"),
    ):
        rows, computed, _ = train(*words, "--max_steps", 1)
        assert computed == [] and len(tables(tmp_path)) == 2
        if "ipo" not in words:
            gap = abs(rows[0]["eval/loss/dpo"] - np.log(2))
            assert gap <= tiny_config().beta / 2 * margin_budget(tiny_llama(), held_out)


@pytest.fixture
def any_precision():
    """Accelerate's state, which keeps the first precision, begun and left anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_an_untrained_policy_ties_whatever_batch_filled_the_table(
    dtype, warmup, train, tmp_path, any_precision
):
    """A warm-up's first step has no learning rate, so the policy of the second is untrained."""
    words = ("--dtype", dtype, "--max_steps", 4, "--warmup_ratio", warmup)
    train(*words)
    random, noise = np.random.default_rng(0), TOLERANCE[dtype] / 2
    for path in tables(tmp_path):  # what loading takes for the rounding of other batches
        table = np.memmap(path, ROW, "r+")
        for i, row in enumerate(table):
            row["logps"] *= 1 + noise * random.choice([-1, 1], 2)
            row["check"] = cache._check(i, row["logps"])
        table.flush()
    rows, computed, _ = train(*words)
    assert computed == []
    untrained = [rows[0], *(row for row in rows if 0 < row["step"] < (3 if warmup else 2))]
    for prefix in ("eval/", ""):
        found = [row for row in untrained if f"{prefix}loss" in row]
        assert found and all(row[f"{prefix}rewards/accuracies"] == 0.5 for row in found)
        assert any(row[f"{prefix}rewards/margins"] for row in found)  # which rounding decides


def test_another_model_template_data_or_length_is_another_table(train, folder, tmp_path):
    train("--max_steps", 1)
    other, template = tmp_path / "model", tmp_path / "template"
    save_tiny(other)
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-6
    model.save_pretrained(other)
    save_tiny(template)
    tiny_tokenizer("Count!\n" + CHATML).save_pretrained(template)
    records = [record(i) for i in range(PAIRS)]
    records[7]["chosen"][0]["content"] += "."
    data = write_jsonl(tmp_path / "train.jsonl", records)
    for words in (
        ("--model_name_or_path", other),
        ("--model_name_or_path", template),
        ("--train_file", data),
        ("--max_length", 32),
    ):
        before = tables(tmp_path)
        _, computed, text = train(*words, "--max_steps", 1)
        assert computed[0] == 4 and "ref train: " not in text
        assert len(tables(tmp_path)) > len(before)


def blank_run(tmp_path, train):
    """A finished run's training table, its rows, and its metrics."""
    rows, _, _ = train()
    [path] = [p for p in tables(tmp_path) if p.stat().st_size == PAIRS * ROW.itemsize]
    return path, np.memmap(path, ROW, "r+"), rows


def test_a_killed_computation_is_continued(tmp_path):
    split, (policy, accelerator) = tiny_split(6), tiny_policy()
    steps, path, calls = plan_pass(list(range(6)), 2, 1, 1), tmp_path / "a.logps", []

    def killed_at(number):
        def score(batch):
            calls.append(batch.indices)
            if len(calls) == number:
                raise KeyboardInterrupt
            return scorer(policy, accelerator)(batch)

        return score

    with pytest.raises(KeyboardInterrupt):
        fill(Table(path, 6, True), split, steps, killed_at(3), accelerator, "ref", 1e-4)
    table = Table(path, 6, on_disk=True)
    assert table.known.tolist() == [True] * 4 + [False] * 2
    calls.clear()
    fill(table, split, steps, killed_at(0), accelerator, "ref", 1e-4)
    assert calls == [(0, 1, 2, 3), (4, 5)]  # the sample, and what was missing
    whole = Table(tmp_path / "b.logps", 6, on_disk=True)
    fill(whole, split, steps, scorer(policy, accelerator), accelerator, "ref", 1e-4)
    assert torch.equal(table.logps, whole.logps)


def test_a_table_in_use_is_not_changed_by_another_run(tmp_path):
    path, ours, theirs = tmp_path / "a.logps", torch.full((2, 2), -1.0), torch.full((2, 2), -2.0)
    table = Table(path, 2, on_disk=True)
    table.write([0, 1], ours)
    other = Table(path, 2, on_disk=True)
    other.forget()
    assert torch.equal(table.logps, ours)
    assert not Table(path, 2, on_disk=True).known.any()
    other.write([0, 1], theirs)
    assert torch.equal(table.logps, ours)
    assert torch.equal(Table(path, 2, on_disk=True).logps, theirs)


@pytest.mark.parametrize(
    ("damage", "warning"),
    [
        ("bit", "is damaged in 1 of 10 rows"),
        ("moved", "is damaged in 9 of 10 rows"),
        ("cut", "is damaged: expected 120 bytes"),
        ("noise", "is damaged in 10 of 10 rows"),
        ("stale", r"is off by .* \(relative\); it is computed again"),
    ],
)
def test_a_broken_table_is_rebuilt_with_a_warning(damage, warning, train, tmp_path):
    path, table, rows = blank_run(tmp_path, train)
    good = path.read_bytes()
    if damage == "bit":
        table["logps"][4, 1] *= 1 + 2e-7
    elif damage == "moved":
        table[:-1] = table[1:]
    elif damage == "cut":
        path.write_bytes(good[:-5])
    elif damage == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(len(good)))
    else:  # well formed, but from another function: what a change of numerics would leave
        for i in range(PAIRS):
            table["logps"][i] += 0.1
            table["check"][i] = cache._check(i, table["logps"][i])
    table.flush()
    again, computed, text = train()
    assert "warning" in text and re.search(warning, text)
    assert sum(computed) >= (2 if damage in ("bit", "moved") else PAIRS)
    assert again == rows
    assert path.read_bytes() == good
    assert "warning" not in train()[2]


def test_a_folder_that_cannot_be_written_is_named(train, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="ref_cache_dir: cannot write .*give a folder that can"):
        train("--ref_cache_dir", tmp_path / "file")


def test_reference_free_losses_run_without(train, tmp_path):
    rows, computed, _ = train("--loss_type", "simpo", "--reference", "none", "--max_steps", 1)
    assert computed == [] and not (tmp_path / "reference_cache").exists()
    assert np.isfinite(rows[1]["loss"])


def test_keys_follow_what_the_numbers_depend_on():
    split, (policy, _) = tiny_split(3), tiny_policy()
    model = policy.language_model
    key = model_key(model, "float32")
    assert key == model_key(tiny_policy()[0].language_model, "float32")
    assert key != model_key(model, "bfloat16")
    head = model.get_output_embeddings()
    head.logit_softcap = 30.0
    assert key != model_key(model, "float32")
    head.logit_softcap = None
    model.config.rope_parameters["rope_theta"] *= 2
    assert key != model_key(model, "float32")
    model.config.rope_parameters["rope_theta"] /= 2
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]]
    assert key != model_key(model, "float32")

    pairs = split.pairs
    key = data_key(pairs)
    assert key == data_key(share_prefixes(pairs))
    assert key != data_key(pairs[::-1]) and key != data_key(pairs[:2])
    untrained = dataclasses.replace(pairs[0].chosen, labels=(-100,) * len(pairs[0].chosen.ids))
    assert key != data_key([dataclasses.replace(pairs[0], chosen=untrained), *pairs[1:]])


def test_partitioned_weights_are_hashed_by_their_parts():
    """ZeRO-3 leaves an empty placeholder, whose part stands in `ds_tensor`."""

    def key(value):
        model = tiny_policy()[0].language_model
        weight = model.model.norm.weight
        weight.data, weight.ds_tensor = torch.empty(0), torch.full((16,), value)
        return model_key(model, "float32")

    assert key(1.0) == key(1.0) != key(2.0)


def test_what_is_not_finite_is_not_stored(tmp_path):
    split, (policy, accelerator) = tiny_split(4), tiny_policy()
    policy.language_model.model.norm.weight.data[0] = torch.nan
    table = Table(tmp_path / "a.logps", 4, on_disk=True)
    with pytest.raises(FloatingPointError, match="of pairs are not finite: memory:"):
        fill(
            table,
            split,
            [Step((((0, 1),),))],
            scorer(policy, accelerator),
            accelerator,
            "ref",
            1e-4,
        )
    assert not Table(tmp_path / "a.logps", 4, on_disk=True).known.any()


def test_only_pairs_of_the_plan_are_computed():
    split, (policy, accelerator) = tiny_split(6), tiny_policy()
    table = Table("memory", 6, on_disk=False)
    steps = plan_pass([5, 0, 2], 2, 1, 1)
    fill(table, split, steps, scorer(policy, accelerator), accelerator, "ref", 1e-4)
    assert table.known.tolist() == [True, False, True, False, False, True]
    before = table.logps.clone()
    fill(
        table,
        split,
        plan_pass(list(range(6)), 3, 1, 1),
        scorer(policy, accelerator),
        accelerator,
        "ref",
        1e-4,
    )
    pairs = [split.pairs[i] for i in (0, 2, 5)]
    _, budgets = logps_budgets(policy.model, sides(pairs))
    gap = (table.logps - before)[[0, 2, 5]].abs()  # as they were, or of other batches
    assert table.known.all() and (gap <= 2 * budgets.view(2, -1).T).all()
