"""A tokenizer (256 bytes, three special tokens) and a model small enough to train in a test."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trainer.config import RunConfig
from trainer.data import BadRows, check_record
from trainer.encoding import encode_rows
from trainer.head import FusedLMHead, fuse_lm_head
from trainer.model import PreferenceModel, loss_options
from trainer.pairs import IGNORE, Split
from trainer.ref_cache import Table
from trainer.reference import fill, lookup, scorer
from trainer.truncation import Limits

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(chat_template=CHATML, specials=SPECIALS):
    specials = list(dict.fromkeys([*SPECIALS, *specials]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )


SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # far from uniform, so that differences show
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 32}
VISION |= {"num_attention_heads": 2, "patch_size": 8}
# What makes an architecture's own transforms, windows and sizes show.
OWN = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 16},
    "gemma": {"head_dim": 8},
    "gemma2": GEMMA
    | {"sliding_window": 16, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 0.5}
    | {"attn_implementation": "eager"},  # transformers 5.17 has SDPA do it, without the softcap
    "gemma3_text": GEMMA | {"sliding_window": 16, "final_logit_softcapping": 5.0},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": {"sliding_window": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def tiny_model(kind, seed=0, **fields):
    """A random model of an architecture (`config.model_type`), all parameters random."""
    torch.manual_seed(seed)
    if kind == "gemma3":  # a language model nested in a vision-language one
        text = AutoConfig.for_model("gemma3_text", **SIZES | OWN["gemma3_text"] | fields)
        text.final_logit_softcapping = None
        config = AutoConfig.for_model(kind, text_config=text, vision_config=VISION)
        config.mm_tokens_per_image = 4
    else:
        config = AutoConfig.for_model(kind, **SIZES | OWN.get(kind, {}) | fields)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() < 2:  # norms and biases, which would be ones and zeros
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model.eval()


def tiny_llama(tied=True, seed=0):
    return tiny_model("llama", seed, tie_word_embeddings=tied)


def chat(prompt, *turns):
    """A user's message, and a response of one or several turns."""
    roles = ("assistant", "user")
    return [{"role": "user", "content": prompt}], [
        {"role": roles[k % 2], "content": text} for k, text in enumerate(turns)
    ]


USER, ANSWER = chat("hi", "hello")
GOOD = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}  # strings
TALK = {"prompt": USER, "chosen": ANSWER, "rejected": chat("", "go away")[1]}


def record(number):
    """The `number`-th pair of an easy task: say the digits up from the prompt's, not down."""
    first = number % 7
    up = "".join(str(d) for d in range(first, first + 2 + number % 3))
    prompt, chosen = chat(f"count from {first}" + "!" * (number % 4), up)
    return {"prompt": prompt, "chosen": chosen, "rejected": chat("", up[::-1] + "?")[1]}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def tiny_split(count=8, tokenizer=None, max_length=256):
    rows = [check_record(record(i), f"memory:{i}") for i in range(count)]
    return encode_rows(rows, tokenizer or tiny_tokenizer(), Limits(max_length), BadRows("error"))


def tiny_config(**fields):
    return RunConfig(**({"model_name_or_path": "tiny", "train_file": "none.jsonl"} | fields))


def tiny_policy(model=None, **fields):
    """A `PreferenceModel` around a tiny Llama, and an accelerator that adds nothing."""
    model = tiny_llama() if model is None else model
    if type(model.get_output_embeddings()) is not FusedLMHead:
        fuse_lm_head(model)
    return PreferenceModel(model, loss_options(tiny_config(**fields))), Accelerator(cpu=True)


def save_tiny(folder):
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def rotated(weight, heads):
    """Rows of a query or key matrix in the order of GGUF files, which rotate neighbours."""
    rows = weight.shape[0] // heads // 2
    return weight.view(heads, 2, rows, -1).transpose(1, 2).reshape(weight.shape)


def save_gguf(file, change=dict):
    """The tiny Llama and its tokenizer in one float32 GGUF file; `change` its tensors by name."""
    from gguf import GGUFWriter, TokenType

    model, tokenizer = tiny_llama(), tiny_tokenizer()
    out = GGUFWriter(file, "llama")
    out.add_vocab_size(SIZES["vocab_size"])
    out.add_context_length(512)
    out.add_embedding_length(32)
    out.add_block_count(2)
    out.add_feed_forward_length(64)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens[-2:] = "ab", "cd"  # bytes that no text here has; transformers 5.17 needs two merges
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    kinds = [TokenType.CONTROL if t in SPECIALS else TokenType.NORMAL for t in tokens]
    out.add_token_types(kinds)
    out.add_token_merges(["a b", "c d"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(0)
    out.add_chat_template(tokenizer.chat_template)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.up_proj": "ffn_up"}
    names |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down", "model.layers": "blk"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = rotated(weight, 4 if "q_proj" in name else 2)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        tensors[name] = weight.contiguous()
    for name, weight in change(tensors).items():
        out.add_tensor(name, weight.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def as_split(pairs, ref_logps=None):
    return Split(pairs, {}, None if ref_logps is None else lookup(ref_logps))


def precomputed(policy, split, steps, accelerator):
    """The policy as its own reference, without a file."""
    table = Table(Path("memory"), len(split.pairs), on_disk=False)
    fill(table, split, steps, scorer(policy, accelerator), accelerator, "reference", 1e-4)
    return lookup(table.logps)


def shifted_reference(count):
    """A reference away from the policy, so that every pair has its own slope."""
    return torch.linspace(-60, -20, 2 * count).view(count, 2)


def sequence_logps(model, sequences):
    """Summed response log-probs by the model's own logits, one sequence at a time."""
    logps = []
    for sequence in sequences:
        logits = model(input_ids=torch.as_tensor(sequence.ids)[None]).logits[0]
        labels = torch.as_tensor(sequence.labels).long()
        kept = labels != IGNORE
        picked = logits.log_softmax(-1)[kept].gather(1, labels[kept, None])
        logps.append(picked.sum())
    return torch.stack(logps)


def rpo_by_hand(model, pairs, ref_logps, config):
    """The loss of pairs on materialized logits, one sequence at a time."""
    columns = ([getattr(pair, name) for pair in pairs] for name in ("chosen", "rejected"))
    logps = torch.stack([sequence_logps(model, sequences) for sequences in columns], 1)
    return rpo_loss_by_hand(logps, pairs, ref_logps, config)


def rpo_loss_by_hand(logps, pairs, ref_logps, config):
    """The paper's loss (B pairs) of summed log-probs (B, 2) and the reference's (B, 2)."""
    chosen, rejected = logps.unbind(1)
    lengths = torch.tensor([float(pair.chosen.trained_tokens) for pair in pairs])
    margin = config.beta * ((chosen - ref_logps[:, 0]) - (rejected - ref_logps[:, 1]))
    weight, sft = {
        "sum": (config.eta * config.beta, -chosen.mean()),
        "sequence_mean": (config.eta, -(chosen / lengths).mean()),
        "token_mean": (config.eta, -chosen.sum() / lengths.sum()),
    }[config.sft_reduction]
    return -logsigmoid(margin).mean() + weight * sft


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
