"""Every causal language model of transformers, tiny, against its own logits.

    python -m tests.trainer.model.architectures          writes trainer/ARCHITECTURES.md
    python -m tests.trainer.model.architectures KIND...  prints the rows of some types of config

`tiny(kind)` makes a config small by the names of its fields, whatever they belong to; what a name
does not tell stands in `OWN`. Every model runs in a process of its own, as it may do anything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS

from tests.support import ROOT
from tests.trainer.tiny import rpo_by_hand, shifted_reference, tiny_config, tiny_policy, tiny_split
from trainer.data.batches import pack, share_prefixes
from trainer.errors import InputError
from trainer.model.probe import check_model

TABLE = ROOT / "trainer" / "ARCHITECTURES.md"
PAIRS, SECONDS = 3, 120
SHOWN = 150  # characters of a remark
# A gradient below this share of the whole one's is rounding alone: a bias of keys has none.
FLOOR = 1e-3

WIDTH, HEADS, LAYERS = 32, 4, 2
NAMES = {
    259: "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab "
    "ngram_vocab_size_base codebook_size unpadded_vocab_size",
    WIDTH: "hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim "
    "attention_hidden_size output_dim emb_dim dim_model_base encoder_hidden_size "
    "embedding_dim input_embedding_size output_embedding_size",
    2 * WIDTH: "intermediate_size ffn_dim n_inner d_inner dim_ff dff decoder_ffn_dim "
    "encoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size "
    "shared_intermediate_size intermediate_size_mlp ffn_hidden_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size mamba_d_ssm feed_forward_size dense_intermediate_size "
    "shared_experts_intermediate_size zaya_mlp_size lru_width expert_intermediate_size "
    "block_ff_dim ple_embed_dim",
    HEADS: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads attention_heads swa_num_attention_heads linear_num_value_heads "
    "mamba_n_heads linear_num_heads index_n_heads num_local_experts num_experts "
    "n_routed_experts moe_num_experts ffn_num_experts num_decoder_attention_heads "
    "num_encoder_attention_heads n_mamba_heads mamba_num_heads num_swa_attention_heads",
    2: "num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads multi_query_group_num "
    "linear_num_key_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k "
    "n_shared_experts hc_mult hc_count n_groups mamba_n_groups "
    "num_decoder_layers num_encoder_layers n_layer n_layers num_layers decoder_layers "
    "encoder_layers num_hidden_layers mamba_num_groups",
    1: "num_nextn_predict_layers n_group topk_group first_k_dense_replace num_expert_group "
    "num_dense_layers type_vocab_size heads_per_ngram split_ngram_parts",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim swa_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim dim_head kv_channels d_rel "
    "attention_head_dim rotary_dim hidden_size_per_layer_input laurel_rank "
    "make_ngram_vocab_size_divisible_by d_state mamba_d_state state_size ssm_state_size "
    "mamba_head_dim time_step_rank mamba_dt_rank hc_lowrank qk_head_dim_global v_head_dim_global "
    "swa_v_head_dim head_size",
    16: "kv_lora_rank q_lora_rank mamba_d_head sliding_window window_size attention_chunk_size "
    "chunk_size mamba_chunk_size local_attention sliding_window_size attention_window_size "
    "index_topk rel_extent prompt_length local_attention_window_len block_size gated_norm_rank",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
    "position_bias_max_distance original_max_position_embeddings floor_scale",
    0.2: "initializer_range init_std",
    0: "pad_token_id",
}  # fmt: skip
SMALL = {name: value for value, names in NAMES.items() for name in names.split()}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "is_decoder": True}
PER_LAYER = "layer_types mlp_layer_types layers_block_type block_types"
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
HEAD = {"head_dim": 8}
PERIOD = {"attn_layer_period": 2, "attn_layer_offset": 1}
# Fields that no name tells.
OWN: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": HYBRID,
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD,
    "jamba": PERIOD,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "mamba2": {"num_heads": 8},
    "ministral": HEAD,
    "nemotron": HEAD | {"num_key_value_heads": 2},
    "qwen4_exp_text": HEAD,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [16, 32]},
    "xlstm": {"num_blocks": 2, "num_heads": 4, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(config: PreTrainedConfig, own: dict) -> dict:
    """The fields of a small config of this class."""
    fields, default = {}, config.to_dict()
    count = getattr(config, "num_hidden_layers", None)
    lists = {k: v for k, v in default.items() if isinstance(v, list | tuple) and len(v) == count}
    lists = {k: v for k, v in lists.items() if k in PER_LAYER.split() or k.endswith("layer_types")}
    for name, value in default.items():
        inner = vars(config).get(name)
        if isinstance(inner, PreTrainedConfig):
            fields[name] = type(inner)(**shrunk(inner, {}))
        elif name in SMALL and (value is not None or name.endswith("token_id")):
            if not isinstance(value, list | tuple):
                fields[name] = SMALL[name]
    if lists:
        rows = list(zip(*lists.values(), strict=True))
        first = sorted({row: rows.index(row) for row in rows}.values())
        first = first if len(first) > 1 else [0, 1]
        fields |= {name: [value[k] for k in first] for name, value in lists.items()}
        fields["num_hidden_layers"] = len(first)
    if "kv_lora_rank" in default and "num_key_value_heads" in fields:  # every head has its own
        fields["num_key_value_heads"] = HEADS
    return fields | own


def tiny(kind: str, seed: int = 0, **own: object) -> PreTrainedModel:
    """A random model of a type of config."""
    torch.manual_seed(seed)
    kinds = CONFIG_MAPPING[kind]
    config = kinds(**shrunk(kinds(), OWN.get(kind, {}) | own))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() < 2:  # norms and biases, which would be ones and zeros
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model.eval()


class Row(NamedTuple):
    """What became of a type of config."""

    kind: str
    how: str
    """packed, alone, refused, or not built."""
    error: float | None
    """Largest relative error of a parameter's gradient."""
    remark: str


def measure(kind: str) -> Row:
    """Train a step of a tiny model by the trainer and by its own logits, a sequence at a time."""
    try:
        tiny(kind)(input_ids=torch.arange(8)[None], use_cache=False)
        model = tiny(kind)  # a forward may change it
        model.config.use_cache = False
    except Exception as error:  # of a config that these sizes do not fit, or a missing package
        return Row(kind, "not built", None, f"{type(error).__name__}: {error}")
    pairs, reference = tiny_split(PAIRS).pairs, shifted_reference(PAIRS)
    try:
        policy, _ = tiny_policy(model, eta=0.5)
        reason = check_model(policy, pairs)
    except InputError as error:
        return Row(kind, "refused", None, str(error))
    rpo_by_hand(model, pairs, reference, tiny_config(eta=0.5)).backward()
    wanted = _gradients(model)
    model.zero_grad()
    policy.train()
    batch = pack(share_prefixes(pairs), tuple(range(PAIRS)))
    policy(batch, reference.T.reshape(-1), PAIRS, 1).loss.backward()
    how = "packed" if reason is None else "alone"
    return Row(kind, how, largest_error(_gradients(model), wanted), reason or "")


def _gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def largest_error(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a parameter's gradient, by its norm or a share of the whole."""
    floor = FLOOR * torch.cat([x.flatten() for x in wanted.values()]).norm()
    errors = [(got[name] - x).norm() / max(x.norm(), floor) for name, x in wanted.items()]
    return torch.stack(errors).max().item()


def apart(kind: str) -> Row:
    """`measure`, in a process that may crash or hang."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        try:
            row = measure(kind)
        except BaseException as error:
            row = Row(kind, "TRACEBACK", None, f"{type(error).__name__}: {error}")
        with open(write, "w") as pipe:
            json.dump(row, pipe)
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return Row(*json.loads(text)) if text else Row(kind, "TRACEBACK", None, "crashed, or too slow")


def line(row: Row) -> str:
    """A row of the table."""
    remark = " ".join(row.remark.split()).replace("|", "/").removeprefix("no, as ")
    remark = remark if len(remark) <= SHOWN else f"{remark[:SHOWN]}..."
    error = "" if row.error is None else f"{row.error:.0e}"
    return f"| `{row.kind}` | {row.how} | {error} | {remark} |"


def table(rows: list[Row]) -> str:
    """The page."""
    counts = {how: sum(row.how == how for row in rows) for how in ("packed", "alone", "refused")}
    trained = counts["packed"] + counts["alone"]
    worst = max(row.error for row in rows if row.error is not None)
    lines = "\n".join(map(line, rows))
    return f"""# Architectures

Every type of config that transformers {transformers.__version__} has a causal language model for,
made tiny: {trained} of {len(rows)} train, {counts["packed"]} of them in packed rows and
{counts["alone"]} with their sequences alone; {counts["refused"]} are refused. The error is the
largest relative one of a parameter's gradient (of {FLOOR:.0e} of the whole gradient's norm, where a
parameter's is less) of an RPO step in float32, against the model's own logits, one sequence at a
time; at most {worst:.0e}. No name stands in the trainer: what is said here was measured, and is
measured again before every run. Written by `python -m tests.trainer.model.architectures`.

| type | how | error | |
|---|---|---|---|
{lines}
"""


def main(kinds: list[str]) -> None:
    """Print rows, or write the whole table."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for kind in kinds or KINDS:
        rows.append(apart(kind))
        print(line(rows[-1]), flush=True)
    if not kinds:
        TABLE.write_text(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
