"""Checkpoints that are stored quantized, made by hand: loaded as what they are, or refused."""

import importlib.util
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.trainer.tiny import tiny_config, tiny_model
from trainer.errors import InputError
from trainer.model.loading import check_weights, load_model, locate_model

WIDE = {"hidden_size": 64, "intermediate_size": 192, "tie_word_embeddings": False}
F8 = torch.float8_e4m3fn
UP = "model.layers.1.mlp.up_proj.weight"


def need(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")


def write(folder, quantize, **stored):
    """Store a tiny Llama with its projections quantized; returns the numbers that are meant.

    ``quantize(weight)`` gives the tensors to store under what follows the weight's name, and the
    numbers they stand for.
    """
    tiny_model("llama", **WIDE).save_pretrained(folder)
    held, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            held[name] = meant[name] = weight
            continue
        parts, meant[name] = quantize(weight)
        held |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    configure(folder, stored)
    return meant


def configure(folder, stored):
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = stored
    (folder / "config.json").write_text(json.dumps(settings))


def in_blocks(rows, columns):
    """FP8 with a scale per block."""

    def quantize(weight):
        grid = [math.ceil(n / side) for n, side in zip(weight.shape, (rows, columns), strict=True)]
        scale = torch.rand(grid) / 100 + 0.001
        each = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        each = each[: weight.shape[0], : weight.shape[1]]
        numbers = (weight / each).clamp(-448, 448).to(F8)
        return {"weight": numbers, "weight_scale_inv": scale}, numbers.float() * each

    return quantize


def in_named_blocks(weight):
    """The same as compressed-tensors names it, the last block of each side cut."""
    parts, meant = in_blocks(128, 128)(weight)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}, meant


def by_tensor(weight):
    """FP8 with one scale."""
    scale = weight.abs().amax()[None] / 448
    numbers = (weight / scale).to(F8)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def by_row(kind, low, high):
    """A scale per row, as compressed-tensors stores FP8 and INT8."""

    def quantize(weight):
        scale = weight.abs().amax(1, keepdim=True) / high
        numbers = weight / scale
        numbers = numbers.round().clamp(low, high) if kind == torch.int8 else numbers
        numbers = numbers.to(kind)
        return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale

    return quantize


def packed(weight, group=32):
    """INT4 with a scale per 32 columns, eight numbers in an int32, the first in its lowest bits."""
    rows, columns = weight.shape
    grouped = weight.view(rows, -1, group)
    scale = grouped.abs().amax(-1) / 7
    numbers = (grouped / scale[..., None]).round().clamp(-8, 7)
    meant = (numbers * scale[..., None]).view(rows, columns)
    nibbles = (numbers.view(rows, -1, 8) + 8).long() << (4 * torch.arange(8))
    words = nibbles.sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    shape = torch.tensor([rows, columns])
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": shape}, meant


def compressed(form, bits, kind, strategy, **weights):
    how = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True} | weights
    group = {"targets": ["Linear"], "weights": how}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
READ = {
    "fp8": (in_blocks(32, 16), FP8 | {"weight_block_size": [32, 16]}),
    "fp8, one block": (in_blocks(256, 256), FP8 | {"weight_block_size": [256, 256]}),
    "compressed fp8": (by_row(F8, -448, 448), compressed("float-quantized", 8, "float", "channel")),
    "compressed fp8, one scale": (
        by_tensor, compressed("float-quantized", 8, "float", "tensor"),
    ),
    "compressed fp8, blocks": (
        in_named_blocks,
        compressed("float-quantized", 8, "float", "block", block_structure=[128, 128]),
    ),
    "compressed, naive": (
        by_row(torch.int8, -128, 127), compressed("naive-quantized", 8, "int", "channel"),
    ),
    "compressed int8": (
        by_row(torch.int8, -128, 127), compressed("int-quantized", 8, "int", "channel"),
    ),
    "compressed int4": (
        packed, compressed("pack-quantized", 4, "int", "group", group_size=32),
    ),
}  # fmt: skip


def load(folder, **fields):
    config = tiny_config(model_name_or_path=str(folder), **fields)
    return load_model(locate_model(config), config)


@pytest.mark.parametrize("name", READ)
def test_stored_numbers_are_read_as_what_they_mean(name, tmp_path):
    quantize, stored = READ[name]
    if stored["quant_method"] == "compressed-tensors":
        need("compressed_tensors")
    meant = write(tmp_path / "model", quantize, **stored)
    check_weights(str(tmp_path / "model"), tiny_config())
    model = load(tmp_path / "model")
    found = model.state_dict()
    assert found.keys() == meant.keys()
    for key, value in meant.items():
        torch.testing.assert_close(found[key], value, rtol=2**-22, atol=0)  # a product, a quotient
    model.save_pretrained(tmp_path / "plain")  # what training leaves is a plain model
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == meant.keys()
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    assert all(p.requires_grad for p in load(tmp_path / "plain").parameters())


def test_mxfp4_experts_are_read_as_what_they_mean(tmp_path):
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
    start = tiny_model("gpt_oss", **WIDE | sizes | {"tie_word_embeddings": False})
    start.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values, meant = torch.cat([values, -values]), {}
    for name in [name for name in held if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, out = held.pop(name).shape
        blocks = torch.randint(256, (experts, out, width // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (experts, out, width // 32), dtype=torch.uint8)
        held |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1)
        numbers = pairs.flatten(-2) * (scales.float() - 127).exp2()[..., None]
        meant[name] = numbers.flatten(-2).transpose(1, 2)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    configure(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    found = load(tmp_path).state_dict()
    assert meant and all(torch.equal(found[name], value) for name, value in meant.items())


BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def save_bits(folder, name):
    """A folder as bitsandbytes and transformers save it, and the numbers it stands for."""
    need("bitsandbytes")
    import bitsandbytes

    tiny_model("llama", **WIDE).save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    how = BitsAndBytesConfig(**BITS[name])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype="float32")
    for path, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            plain[f"{path}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight, state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            plain[f"{path}.weight"] = module.weight * module.weight.SCB[:, None] / 127
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return {name: value.detach() for name, value in plain.items()}


@pytest.mark.parametrize("name", BITS)
def test_bitsandbytes_is_read_as_what_it_means(name, tmp_path):
    meant = save_bits(tmp_path / "model", name)
    model = load(tmp_path / "model")
    found = model.state_dict()
    assert found.keys() == meant.keys()
    for key, value in meant.items():
        torch.testing.assert_close(found[key], value, rtol=2**-22, atol=0)
    model.save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == meant.keys()


def test_4_bits_stay_4_bits_for_qlora(tmp_path, monkeypatch):
    save_bits(tmp_path, "nf4")
    fields = {"use_peft": True, "load_in_4bit": True}
    with pytest.raises(InputError, match="load_in_4bit: needs a GPU"):
        load(tmp_path, **fields)
    monkeypatch.setattr("trainer.model.quantized.quantization", lambda config: None)  # its checks
    model = load(tmp_path, **fields)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    state = model.model.layers[0].mlp.up_proj.compute_dtype
    assert state == torch.float32  # `model_dtype`, whatever the file was made with


def lose_scale(folder):
    held = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in held.items() if k != f"{UP}_scale_inv"},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip


def test_fp8_without_its_scale_or_in_cut_blocks_is_refused(tmp_path):
    write(tmp_path / "lost", in_blocks(32, 32), **FP8, weight_block_size=[32, 32])
    lose_scale(tmp_path / "lost")
    with pytest.raises(InputError, match=f"holds {UP} as F8_E4M3 without a scale"):
        load(tmp_path / "lost")
    # 192 rows are a block of 128 and half of one; transformers would take two of 96
    write(tmp_path / "cut", in_blocks(128, 64), **FP8, weight_block_size=[128, 64])
    with pytest.raises(InputError, match="gate_proj.weight .192, 64. in blocks of .128, 64., whi"):
        load(tmp_path / "cut")


def test_fp8_in_blocks_of_an_unknown_size_is_refused(tmp_path):
    write(tmp_path, in_blocks(128, 64), **FP8)
    with pytest.raises(InputError, match=r"scales, and its config does not say of h"):
        load(tmp_path)


def without(part, quantize):
    """Tensors of which one is lost."""

    def cut(weight):
        parts, meant = quantize(weight)
        return {end: value for end, value in parts.items() if end != part}, meant

    return cut


@pytest.mark.parametrize("part", ["weight_zero_point", "weight_scale", "weight_shape"])
def test_compressed_weights_without_all_their_parts_are_refused(part, tmp_path):
    need("compressed_tensors")
    if part == "weight_zero_point":
        stored = compressed("int-quantized", 8, "int", "channel", symmetric=False)
        write(tmp_path, by_row(torch.int8, -128, 127), **stored)
    else:
        stored = compressed("pack-quantized", 4, "int", "group", group_size=32)
        write(tmp_path, without(part, packed), **stored)
    with pytest.raises(InputError, match=rf"holds \S+ without \S+\.{part}, so what its numbers"):
        load(tmp_path)


NOT_READ = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "auto-round": {"quant_method": "auto-round", "bits": 4},
    "hqq": {"quant_method": "hqq", "quant_config": {}},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "torchao": {"quant_method": "torchao", "quant_type": {}},
    "bitnet": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
    "aqlm": {"quant_method": "aqlm"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "of tomorrow": {"quant_method": "of tomorrow"},
    "unknown": {"bits": 4},
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_cannot_be_trained_on_is_refused_before_weights_are_read(name, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    configure(tmp_path, NOT_READ[name])
    (tmp_path / "model.safetensors").unlink()
    message = f"^model_name_or_path: the checkpoint is quantized by {name}, expected plain weights"
    with pytest.raises(InputError, match=rf"{message} or fp8, .*; give the unquantized model"):
        locate_model(tiny_config(model_name_or_path=str(tmp_path)))


OTHERWISE = [
    (READ["fp8"][1], {"load_in_4bit": True, "use_peft": True}, "load_in_4bit: expected false, as "),
    (compressed("nvfp4-pack-quantized", 4, "float", "group"), {}, "got 1 in nvfp4-pack-quantized"),
    (compressed("dense", 8, "int", "channel"), {}, "got 1 in dense, sparsity dense; give the unqu"),
    (READ["compressed fp8"][1] | {"config_groups": {}}, {}, "got 0 in float-quantized"),
    (READ["compressed fp8"][1] | {"config_groups": [1]}, {}, "got 0 in float-quantized"),
    (READ["compressed fp8"][1] | {"config_groups": {"a": None}}, {}, "got 0 in float-quantized"),
    (READ["compressed fp8"][1] | {"sparsity_config": {"format": "sparse-24"}}, {}, "sparsity spar"),
    (
        READ["compressed fp8"][1] | {"transform_config": {"a": 1}},
        {},
        "quantized by compressed-tens",
    ),
]


@pytest.mark.parametrize(("stored", "fields", "message"), OTHERWISE, ids=str)
def test_quantizations_that_are_read_have_limits(stored, fields, message, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    tiny_model("llama").save_pretrained(tmp_path)
    configure(tmp_path, stored)
    with pytest.raises(InputError, match=message):
        locate_model(tiny_config(model_name_or_path=str(tmp_path), **fields))


@pytest.mark.parametrize(
    "stored", [compressed("float-quantized", 8, "float", "channel"), BITS["nf4"]]
)
def test_a_package_that_is_missing_is_named(stored, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tiny_model("llama").save_pretrained(tmp_path)
    configure(tmp_path, stored)
    with pytest.raises(InputError, match=r"whose package is not installed; run: pip install \w"):
        locate_model(tiny_config(model_name_or_path=str(tmp_path)))
