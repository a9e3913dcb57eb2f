"""Model folders that do not hold what their config describes: what is said of each, and where."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from tests.trainer.tiny import (
    record,
    save_gguf,
    save_tiny,
    tiny_config,
    tiny_llama,
    tiny_tokenizer,
    write_jsonl,
)
from trainer.errors import InputError
from trainer.evaluate import main
from trainer.model import loading
from trainer.model.loading import check_weights, load_model, locate_model
from trainer.run import run

UP = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def edit(change):
    """The folder with `change` done to its tensors."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})

    return damage


def lose(name):
    return edit(lambda tensors: {k: v for k, v in tensors.items() if k != name})


def add(**shapes):
    new = {k.replace("__", "."): torch.zeros(shape) for k, shape in shapes.items()}
    return edit(lambda tensors: tensors | new)


def put(name, value):
    def change(tensors):
        tensors[name].view(-1)[3] = value
        return tensors

    return edit(change)


def configure(**fields):
    def damage(folder):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | fields))

    return damage


def rename(prefix):
    return edit(lambda tensors: {prefix + name: value for name, value in tensors.items()})


def without(name):
    return lambda folder: (folder / name).unlink()


def replace(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def reward_model(folder):
    shutil.copy(folder / "config.json", folder / "own.json")
    settings = AutoConfig.from_pretrained(folder, num_labels=1)
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(folder)


def shards(folder):
    (folder / "model.safetensors").unlink()
    tiny_llama(tied=False).save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def twice(folder):
    first, second, *_ = shards(folder)
    copy = {name: torch.randn_like(value) for name, value in load_file(first).items()}
    save_file(copy | load_file(second), second, {"format": "pt"})


def strangely_named(folder):
    """Shards in 8 bits that only the index names."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(held | {UP: held[UP].to(torch.float8_e4m3fn)}, folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(held, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def two_models(folder):
    whole = (folder / "model.safetensors").read_bytes()
    shards(folder)
    (folder / "model.safetensors").write_bytes(whole)


def pickled_as(kind):
    def damage(folder):
        held = load_file(folder / "model.safetensors")
        torch.save(held | {UP: held[UP].to(kind)}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    return damage


def lost_shard(folder):
    shards(folder)[1].unlink()


def no_head(folder):
    AutoModel.from_pretrained(folder).save_pretrained(folder)


def another_kind(kind):
    return lambda folder: AutoConfig.for_model(kind).save_pretrained(folder)


def integers(folder):
    edit(lambda tensors: tensors | {UP: torch.ones(64, 32, dtype=torch.int8)})(folder)


# What is done to the folder of an untied Llama of two layers, and what is said.
DAMAGED = {
    "no head": (lose(HEAD), r"1 missing \(lm_head.weight\); if its head is the input embedding"),
    "no matrix": (lose(UP), rf"1 missing \({UP}\); correct its config.json, or"),
    "no norm": (lose("model.norm.weight"), r"1 missing \(model.norm.weight\)"),
    "no embedding": (lose(EMBEDDING), rf"1 missing \({EMBEDDING}\)"),
    "saved without head": (no_head, r"1 missing \(lm_head.weight\)"),
    "reward model": (
        reward_model,
        r"1 missing \(lm_head.weight\), 1 not in the config \(score.weight\); it was saved for "
        r"another task \(LlamaForSequenceClassification\); give a causal language model",
    ),
    "value head": (add(v_head__summary__weight=(1, 32)), "not in the config .*for another task"),
    "compiled": (
        rename("_orig_mod."),
        r"21 missing .* and 18 more\), 21 not in the config \(_orig_mod.lm_head.weight.*; its "
        r"names begin with '_orig_mod.', those of a wrapped model; save the model inside",
    ),
    "DDP": (rename("module."), "its names begin with 'module.'"),
    "Lightning": (rename("model.inner."), "missing .*not in the config"),
    "deeper": (configure(num_hidden_layers=4), "18 missing .*speaks of 4 layers; correct num_hid"),
    "shallower": (
        configure(num_hidden_layers=1),
        r"9 not in the config .*; config.json speaks of 1 layers; correct num_hidden_layers",
    ),
    "bias": (
        add(model__layers__0__self_attn__q_proj__bias=(32,)),
        r"1 not in the config \(model.layers.0.self_attn.q_proj.bias\); its config lacks these",
    ),
    "no bias": (configure(attention_bias=True), r"8 missing \(.*_proj.bias.* and 5 more\)"),
    "wider": (
        configure(intermediate_size=96),
        r"6 of another shape \(model.layers.0.mlp.down_proj.weight \(32, 64\) for \(32, 96\), .*"
        r" and 3 more\); correct its config.json",
    ),
    "vocabulary": (
        configure(vocab_size=300),
        "the vocabulary of .* has 259 tokens in its weights and 300 in its config; correct vocab",
    ),
    "NaN": (put(UP, float("nan")), f"holds NaN or infinite numbers in {UP}; such a model cannot"),
    "infinity": (put(EMBEDDING, float("-inf")), f"NaN or infinite numbers in {EMBEDDING}"),
    "integers": (integers, f"holds {UP} as I8 without a scale, so what its numbers mean"),
    "8 bits": (
        edit(lambda t: t | {UP: t[UP].to(torch.float8_e4m3fn)}),
        f"holds {UP} as F8_E4M3 without a scale",
    ),
    "8 bits in a strange file": (strangely_named, f"holds {UP} as F8_E4M3 without a scale"),
    "pickled 8 bits": (pickled_as(torch.float8_e4m3fn), f"holds {UP} as torch.float8_e4m3fn with"),
    "pickled integers": (pickled_as(torch.int8), f"holds {UP} as torch.int8 without a scale"),
    "16 bits": (
        edit(lambda t: t | {UP: torch.ones(64, 32, dtype=torch.int16)}),
        f"holds {UP} as I16 without a scale",
    ),
    "the same weight twice": (
        twice,
        r"holds \S+weight.* in both model-00001-of-\d+.safetensors and model-00002-.*not parts",
    ),
    "two models": (two_models, "holds two models, one in model.safetensors and one in model-00001"),
    "part of every tensor": (
        edit(lambda t: {k: v[: len(v) // 2].contiguous() for k, v in t.items()}),
        r"21 of another shape \(lm_head.weight \(129, 32\) for \(259, 32\), ",
    ),
    "head of another name": (
        edit(lambda t: {k.replace(HEAD, "output.weight"): v for k, v in t.items()}),
        r"1 missing .*1 not in the config \(output.weight\); correct its config.json, or save",
    ),
    "of another kind": (
        configure(model_type="granite"),
        "has model_type granite, but architectures LlamaForCausalLM; correct the wrong one",
    ),
    "quantized, but not in its config": (
        edit(lambda t: t | {UP.replace("weight", "qweight"): t.pop(UP).to(torch.int32)}),
        r"missing .*up_proj.qweight\); it is quantized, and its config does not say how",
    ),
    "adapters inside": (
        add(model__layers__0__self_attn__q_proj__lora_A__weight=(4, 32)),
        r"adapters are not merged into it; save it after merge_and_unload\(\)",
    ),
    "cut": (cut, "cannot load a model from .*: SafetensorError: "),
    "no safetensors": (replace("model.safetensors", "<html>not found</html>"), "cannot load a mod"),
    "empty weights": (replace("model.safetensors", ""), "cannot load a model from .*Safetensor"),
    "lost shard": (lost_shard, "cannot load a model from .*model-00002-of-"),
    "no weights": (without("model.safetensors"), "cannot load a model from .*no file named model"),
    "wrong index": (
        lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json"),
        "cannot load a model from ",
    ),
    "no config": (without("config.json"), "cannot read the model's config in "),
    "empty": (
        lambda folder: [file.unlink() for file in folder.iterdir()],
        "cannot read the model's config in .*: .*config.json",
    ),
    "config is no JSON": (replace("config.json", "{'model_type': 'llama'"), "cannot read the mod"),
    "config is a list": (replace("config.json", "[]"), "cannot read the model's config in "),
    "config without a kind": (replace("config.json", "{}"), "cannot read the model's config in "),
    "config of a new kind": (configure(model_type="llama9"), "cannot read the .*llama9"),
    "a size that is no number": (configure(hidden_size="wide"), "model.* config in .*hidden_size"),
    "encoder and decoder": (another_kind("t5"), "expected a causal language model .a decoder., g"),
    "decoder of both": (another_kind("bart"), "expected a causal language model .*which is Bart"),
    "encoder": (another_kind("bert"), "expected a causal language model .*which is BertConfig"),
    "images": (another_kind("vit"), "expected a causal language model .*which is ViTConfig"),
    "own code": (
        configure(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "config in .*: its own code would have to be run; give a model that transformers knows",
    ),
}  # fmt: skip
UNSEEN = ("NaN", "infinity", "no weights")  # by a dry run, which reads headers alone


@pytest.fixture
def folder(tmp_path):
    """An untied Llama with its tokenizer."""
    tiny_llama(tied=False).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **fields):
    config = tiny_config(model_name_or_path=str(folder), **fields)
    return load_model(locate_model(config), config)


@pytest.mark.parametrize("name", DAMAGED)
def test_what_the_folder_does_not_hold_is_not_trained(name, folder):
    damage, message = DAMAGED[name]
    damage(folder)
    with pytest.raises(InputError, match=f"(?s)^model_name_or_path: .*{message}") as error:
        load(folder)
    assert len(str(error.value)) < 800
    if name not in UNSEEN:  # nor does a dry run accept it
        with pytest.raises(InputError) as early:
            config = tiny_config(model_name_or_path=str(folder))
            check_weights(locate_model(config), config)
        assert str(early.value) == str(error.value)


def test_a_model_of_the_hub_is_checked_as_a_folder_is(folder, tmp_path, monkeypatch):
    edit(lambda t: t | {UP: t[UP].to(torch.float8_e4m3fn)})(folder)
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "1"
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError, match=f"some/model holds {UP} as F8_E4M3 without a scale"):
        load("some/model")


def same(model, other):
    theirs = other.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items())


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def tied_twice(folder):
    """Both names of one weight, as torch's own files have them."""
    configure(tie_word_embeddings=True)(folder)
    edit(lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})(folder)


def only_head(folder):
    tied_twice(folder)
    lose(EMBEDDING)(folder)


SOUND = {
    "as it is": lambda folder: None,
    "shards": shards,
    "tuples for outputs": configure(return_dict=False),
    "an empty quantization": configure(quantization_config={}),
    "another file beside": lambda f: save_file(
        {UP: torch.ones(64, 32, dtype=torch.int8)}, f / "model_quantized.safetensors"
    ),
    "pickled": pickled,
    "a buffer of older releases": add(
        model__layers__0__self_attn__rotary_emb__inv_freq=(4,), model__rotary_emb__inv_freq=(4,)
    ),
    "code of its own that is not needed": configure(auto_map={"AutoConfig": "mine.Config"}),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_no_difference_loads(name, folder):
    SOUND[name](folder)
    assert same(load(folder), tiny_llama(tied=False))
    check_weights(str(folder), tiny_config())


@pytest.mark.parametrize("change", [tied_twice, only_head])
def test_a_tied_head_may_stand_under_either_name(change, folder):
    change(folder)
    model = load(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    wanted = tiny_llama(tied=False).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, wanted)


def test_a_head_of_its_own_is_kept_whatever_the_config_says(folder, tmp_path):
    configure(tie_word_embeddings=True)(folder)
    model = load(folder)
    assert same(model, tiny_llama(tied=False)) and not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["tie_word_embeddings"] is False
    assert same(load(tmp_path / "saved"), model)


def test_a_dry_run_and_every_other_way_in_refuse_it(folder, tmp_path):
    sound = save_tiny(tmp_path / "sound")
    lose(UP)(folder)
    rows = write_jsonl(tmp_path / "rows.jsonl", [record(k) for k in range(4)])
    fields = {"train_file": rows, "output_dir": str(tmp_path / "out"), "max_steps": 1}
    for own, field in (
        ({"model_name_or_path": str(folder)}, "model_name_or_path"),
        ({"model_name_or_path": sound, "ref_model_name_or_path": str(folder)}, "ref_model_name_o"),
    ):
        for dry in (True, False):
            with pytest.raises(InputError, match=rf"^{field}.*: .*1 missing \({UP}\)"):
                run(tiny_config(**fields, **own, dry_run=dry))
    with pytest.raises(SystemExit, match=rf"error: models: {folder}: .*1 missing \({UP}\)"):
        main(["score", "--data", rows, "--models", f"m={folder}", "--reference", sound,
              "--output_dir", str(tmp_path / "scores")])  # fmt: skip


GGUF = {
    "no matrix": (
        lambda tensors: {k: v for k, v in tensors.items() if k != "blk.1.ffn_up.weight"},
        rf"1 missing \({UP}\)",
    ),
    "bias": (
        lambda tensors: tensors | {"blk.0.attn_q.bias": torch.zeros(32)},
        r"holds 32 numbers that transformers does not read \(.*blk.0.attn_q.bias",
    ),
    "scaled rotary positions": (
        lambda tensors: tensors | {"rope_freqs.weight": torch.ones(4)},
        r"holds 4 numbers that transformers does not read \(rope_freqs.weight\); give the model",
    ),
    "shape": (
        lambda tensors: tensors | {"blk.1.ffn_up.weight": torch.ones(96, 32)},
        rf"(1 of another shape \({UP} \(96, 32\) for \(64, 32\)\)|size mismatch for {UP})",
    ),
    "NaN": (
        lambda tensors: tensors | {"blk.1.ffn_up.weight": torch.full((64, 32), float("nan"))},
        f"NaN or infinite numbers in {UP}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF)
def test_what_a_gguf_file_does_not_hold_is_not_trained(name, tmp_path):
    change, message = GGUF[name]
    save_gguf(tmp_path / "a.gguf", change)
    with pytest.raises(InputError, match=f"(?s)^model_name_or_path: .*{message}"):
        load(tmp_path, gguf_file="a.gguf")


@pytest.mark.parametrize("damage", [lambda whole: b"no such format", lambda whole: whole[:9000]])
def test_a_gguf_file_that_cannot_be_read(damage, tmp_path):
    file = tmp_path / "a.gguf"
    save_gguf(file)
    assert same(load(tmp_path, gguf_file="a.gguf"), tiny_llama())
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match="^model_name_or_path: cannot "):
        load(tmp_path, gguf_file="a.gguf")


def test_no_prompt_waits_for_an_answer(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt"))
    configure(model_type="mine", auto_map={"AutoConfig": "mine.Config"})(folder)
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    for use in (loading.read_config, lambda place: loading.load_tokenizer(place, None)):
        with pytest.raises(InputError, match="its own code would have to be run"):
            use(str(folder))


MISTYPED = [
    "/no/such/model",
    "./model",
    "../model",
    "~/no-such-model",
    "outputs/run/modle",
    "there/modle",
    "there/",
    "C:\\models\\mine",
]


@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_path_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name != "there/":
        (tmp_path / "there").mkdir()
    monkeypatch.setattr(loading, "read_config", lambda *_: pytest.fail("looked up"))
    with pytest.raises(InputError, match="model_name_or_path: no folder .*exists.; correct the pa"):
        locate_model(tiny_config(model_name_or_path=name))


def test_a_file_is_no_folder(folder):
    file = folder / "model.safetensors"
    with pytest.raises(InputError, match=f"expected a folder, got the file .*; give {folder}$"):
        locate_model(tiny_config(model_name_or_path=str(file)))
    file.rename(folder / "a.gguf")
    with pytest.raises(InputError, match=f"give {folder} and gguf_file a.gguf"):
        locate_model(tiny_config(model_name_or_path=str(folder / "a.gguf")))


@pytest.mark.parametrize(
    ("name", "message"),
    [("Some/Model", "cannot find the requested files|couldn't|offline"), ("my model", "alphanum")],
)
def test_a_hub_id_that_cannot_be_had(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"(?s)^model_name_or_path: .*in {name}: .*({message})"):
        locate_model(tiny_config(model_name_or_path=name))


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    config = tiny_config(model_name_or_path="~/model")
    assert locate_model(config) == str(folder)
