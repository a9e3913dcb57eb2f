"""Adapters put to use: merged into whole models, and evaluated as they are, beside any base."""

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.tiny import (
    SIZES,
    record,
    relative,
    save_gguf,
    save_tiny,
    tiny_config,
    tiny_llama,
    tiny_tokenizer,
    write_jsonl,
)
from trainer import evaluate, merge
from trainer.config.recipe import parse_config
from trainer.errors import InputError
from trainer.evaluation.models import Source, open_model
from trainer.run import run

PROMPT = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``trained(base)`` is the folder of LoRA adapters on a base: "folder" or "package"."""
    place = tmp_path_factory.mktemp("merge")
    save_tiny(place / "model")
    (place / "tiny_gguf_package").mkdir()
    (place / "tiny_gguf_package" / "__init__.py").touch()
    save_gguf(place / "tiny_gguf_package" / "tiny.gguf")
    rows = write_jsonl(place / "pairs.jsonl", [record(k) for k in range(4)])
    folders = {}
    bases = {
        "folder": {"model_name_or_path": "model"},  # relative
        "package": {"model_name_or_path": "package:tiny_gguf_package", "gguf_file": "tiny.gguf"},
    }
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(place)
    threads = torch.get_num_threads()

    def trained(base):
        if base not in folders:
            patch.chdir(place)
            recipe = {"train_file": rows, "per_device_train_batch_size": 2, "use_peft": True}
            recipe |= {"learning_rate": 0.1, "warmup_ratio": 0.0, "cpu_threads": 1}
            (place / "tiny.yaml").write_text(yaml.safe_dump(recipe | bases[base]))
            own = ["--config", str(place / "tiny.yaml"), "--output_dir", str(place / base)]
            run(parse_config(own))
            folders[base] = place / base / "model"
        return folders[base]

    trained.pairs = rows
    yield trained
    torch.set_num_threads(threads)
    patch.undo()


def by_hand(folder):
    """Logits of the tiny Llama with the adapters in a folder beside it, by peft."""
    return PeftModel.from_pretrained(tiny_llama(), folder).eval()(PROMPT).logits


@pytest.mark.parametrize("base", ["folder", "package"])
def test_adapters_are_merged_and_evaluated(base, trained, tmp_path, monkeypatch, capsys):
    adapter = trained(base)
    monkeypatch.chdir(tmp_path)  # another folder than that of training
    merge.main([str(adapter), "--output_dir", "merged"])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(by_hand(adapter), tiny_llama()(PROMPT).logits) > 1e-3
    torch.testing.assert_close(whole(PROMPT).logits, by_hand(adapter), rtol=1e-4, atol=1e-5)
    assert "tokenizer.json" in {file.name for file in (tmp_path / "merged").iterdir()}
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    start = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert start in ("package:tiny_gguf_package/tiny.gguf", str(adapter.parents[1] / "model"))
    models = ["--models", f"adapter={adapter}", "merged=merged"]
    evaluate.main(["score", "--data", trained.pairs, *models, "--reference", start,
                   "--output_dir", "scores", "--kl_prompts", "0"])  # fmt: skip
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores["adapter"] == pytest.approx(scores["merged"], rel=1e-4)
    assert scores["adapter"]["rewards/margins"] != 0
    evaluate.main(["generate", "--prompts", trained.pairs, *models, "--output_dir", "answers",
                   "--max_new_tokens", "3"])  # fmt: skip
    answers = [json.loads((tmp_path / "answers" / f"{name}.jsonl").read_text().splitlines()[0])
               for name in ("adapter", "merged")]  # fmt: skip
    assert answers[0]["choices"] == answers[1]["choices"]


def test_the_type_of_the_merged_weights_is_chosen(trained, tmp_path):
    merge.main([str(trained("folder")), "--output_dir", str(tmp_path), "--dtype", "bfloat16"])
    assert {w.dtype for w in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_answers_belong_to_adapter_and_base(trained, tmp_path):
    shutil.copytree(trained("folder"), tmp_path / "adapter")
    save_tiny(tmp_path / "base")
    point(tmp_path / "adapter", str(tmp_path / "base"))
    source = Source(str(tmp_path / "adapter"))
    before = source.state()
    tiny_llama(seed=1).save_pretrained(tmp_path / "base")
    assert source.state() != before


def point(folder, base):
    """Let the adapter in a folder name another base."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def edit(change):
    def damage(folder):
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return damage


def with_nan(tensors):
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    return tensors


def on_a_tied_head(folder):
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(folder)
    point(folder, base)


def of_kind(config, change=None):
    """Another adapter on the same base, which `change` may have changed."""

    def replace(folder):
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        (folder / "adapter_model.safetensors").unlink()
        model = tiny_llama()
        if change:
            change(model)
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(folder, save_embedding_layers=change is not None)
        point(folder, base)

    return replace


LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}


def wide_base(folder):
    tiny_llama().save_pretrained(folder / "base")
    AutoModelForCausalLM.from_config(
        tiny_llama().config.__class__(**SIZES | {"hidden_size": 64})
    ).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    point(folder, str(folder / "base"))


UNUSABLE = {
    "base gone": (
        lambda folder: point(folder, "/no/such/base"),
        "base_model_name_or_path in .*adapter_config.json: no folder /no/such/base",
    ),
    "package gone": (
        lambda folder: point(folder, "package:no_such_package/tiny.gguf"),
        "base_model_name_or_path in .*: Python package 'no_such_package' is not installed",
    ),
    "no base": (lambda folder: point(folder, None), "names no base_model_name_or_path; add the"),
    "an adapter as base": (lambda folder: point(folder, str(folder)), "holds a peft adapter"),
    "other base": (wide_base, "cannot put the adapter in .* into its base: .*size mismatch"),
    "config is no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot read .*adapter_co",
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot put the adapter",
    ),
    "cut weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345678 cut"),
        "cannot put the adapter in .* into its base: ",
    ),
    "lost weight": (
        edit(lambda tensors: dict(list(tensors.items())[1:])),
        "is not of this model: 1 of its weights have no counterpart .base_model.model.model.layers",
    ),
    "foreign weight": (
        edit(lambda tensors: tensors | {"base_model.model.score.weight": torch.ones(2)}),
        "is not of this model: 1 of its weights have no counterpart .base_model.model.score",
    ),
    "8 bits": (
        edit(lambda tensors: {k: (100 * v).to(torch.int8) for k, v in tensors.items()}),
        "holds base_model.* as torch.int8 without a scale, so what",
    ),
    "float of 8 bits": (
        edit(lambda tensors: {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}),
        "holds base_model.* as torch.float8_e4m3fn without a scale, so what",
    ),
    "prefix": (
        of_kind(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        "is PREFIX_TUNING, which cannot be merged into its base; expected one that changes its we",
    ),
    "layers twice": (
        of_kind(LoraConfig(**LORA, layer_replication=[(0, 2), (1, 2)])),
        "is LORA with layer_replication, which cannot be merged",
    ),
    "more tokens": (
        of_kind(LoraConfig(**LORA), lambda model: model.resize_token_embeddings(261)),
        "was trained on a vocabulary of 261 tokens, its base has 259; save the base after resize",
    ),
    "NaN": (edit(with_nan), "holds NaN or infinite numbers in base_model.model.model.layers"),
    "tied head": (on_a_tied_head, "lm_head and input embedding are one weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_adapters_that_do_not_fit_are_refused(name, trained, tmp_path, capsys):
    shutil.copytree(trained("folder"), tmp_path / "adapter")
    change, message = UNUSABLE[name]
    change(tmp_path / "adapter")
    with pytest.raises(SystemExit, match=f"(?s)error: adapter: .*{message}"):
        merge.main([str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(InputError, match=f"(?s)^models: .*{message}"):
        open_model(Source(str(tmp_path / "adapter")), "none")


def test_what_is_no_adapter_or_no_new_folder_is_refused(trained, tmp_path):
    whole = save_tiny(tmp_path / "whole")
    with pytest.raises(SystemExit, match="adapter: expected a folder with an adapter_config.json"):
        merge.main([whole, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="output_dir: expected a new or empty folder, got "):
        merge.main([str(trained("folder")), "--output_dir", whole])
    for field in ("model_name_or_path", "ref_model_name_or_path"):
        fields = {"model_name_or_path": whole} | {field: str(trained("folder"))}
        config = tiny_config(train_file=trained.pairs, output_dir=str(tmp_path / "run"), **fields)
        with pytest.raises(
            InputError, match=f"^{field}: .*python -m trainer.merge .*/folder/model"
        ):
            run(config)
