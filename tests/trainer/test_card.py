"""The model card: what the hub reads of it, and that it tells nothing of this machine."""

from huggingface_hub import ModelCard

from tests.trainer.tiny import tiny_config
from trainer import card

ROWS = [{"step": 0, "eval/loss": 1.0}, {"step": 3, "loss": 0.6}, {"step": 3, "eval/loss": 0.5}]


def written(tmp_path, **fields):
    folder = tmp_path / "out" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "logps.png").write_bytes(b"plot")
    if fields.pop("adapter", False):
        (folder / "adapter_config.json").write_text("{}")
    card.write_card(tiny_config(**fields), ROWS, [], folder)
    return ModelCard.load(folder / "README.md")


def test_a_base_and_data_of_the_hub_are_linked_with_the_licence(tmp_path, monkeypatch):
    base = tmp_path / "README.md"
    base.write_text("---\nlicense: gemma\n---\n# base\n")
    monkeypatch.setattr(card, "try_to_load_from_cache", lambda repo, file: str(base))
    made = written(
        tmp_path, model_name_or_path="org/base", train_file=(), dataset_name="org/pairs",
        adapter=True, hub_model_id="me/tuned", push_to_hub=True,
    )  # fmt: skip
    assert (made.data.base_model, made.data.datasets) == ("org/base", ["org/pairs"])
    assert (made.data.license, made.data.library_name) == ("gemma", "peft")
    assert made.text.lstrip().startswith("# tuned\n") and "after 3 optimizer steps" in made.text
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/tuned")' in made.text


def test_files_are_named_without_their_folders(tmp_path):
    base = tmp_path / "secret" / "base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    files = [str(tmp_path / "secret" / name) for name in ("a.jsonl", "b.jsonl")]
    made = written(
        tmp_path, model_name_or_path=str(base), train_file=files, beta=0.3, cpu_threads=2,
        output_dir=str(tmp_path / "secret"),
    )  # fmt: skip
    assert "secret" not in made.content and made.data.base_model is None
    assert made.data.license == "mit"
    recipe = made.text.split("```yaml\n")[1].split("```")[0]
    assert recipe == (
        "model_name_or_path: base\ntrain_file:\n- a.jsonl\n- b.jsonl\nbeta: 0.3\n"
    )  # and neither defaults nor what is of the place


def test_a_card_of_the_base_that_cannot_be_read_says_nothing(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_bytes(b"---\nlicense: [\n---\n\xff")
    made = written(tmp_path, model_name_or_path=str(tmp_path / "base"))
    assert made.data.license is None
