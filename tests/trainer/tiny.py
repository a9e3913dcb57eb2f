"""A tokenizer (256 bytes, three special tokens) and a model small enough to train in a test."""

import contextlib
import copy
import json
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rpo_kernels.integrations.head import FusedLMHead
from tests.support import assert_within_plain_budget, value_budget
from trainer.config.fields import RunConfig
from trainer.data.batches import Split
from trainer.data.encoding import encode_rows
from trainer.data.pairs import IGNORE
from trainer.data.rows import BadRows, check_record
from trainer.data.truncation import Limits
from trainer.loop import METRICS
from trainer.model.head import fuse_head
from trainer.model.policy import PreferenceModel, loss_options
from trainer.reference.cache import Table
from trainer.reference.modes import fill, lookup, scorer

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


EPS = torch.finfo(torch.float32).eps
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
        fuse_head(model)
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


def token_logps(model, sequences):
    """Log-probs (S, T) of trained tokens by the model's own logits, one sequence at a time."""
    rows = []
    for sequence in sequences:
        logits = model(input_ids=torch.as_tensor(sequence.ids)[None]).logits[0]
        labels = torch.as_tensor(sequence.labels).long()
        kept = labels != IGNORE
        rows.append(logits.log_softmax(-1)[kept].gather(1, labels[kept, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def sequence_logps(model, sequences):
    """Summed response log-probs (S,) by the model's own logits."""
    return token_logps(model, sequences).sum(1)


def sides(pairs):
    """Sequences of pairs, (2B,), chosen first."""
    return [getattr(pair, name) for name in ("chosen", "rejected") for pair in pairs]


def rpo_by_hand(model, pairs, ref_logps, config):
    """The loss of pairs on materialized logits, one sequence at a time."""
    logps = sequence_logps(model, sides(pairs)).view(2, -1).T
    return rpo_loss_by_hand(logps, pairs, ref_logps, config)


def rpo_loss_by_hand(logps, pairs, ref_logps, config):
    """The paper's loss (B pairs) of summed log-probs (B, 2) and the reference's (B, 2)."""
    return metrics_by_hand(logps, pairs, ref_logps, config)["loss"]


def metrics_by_hand(logps, pairs, ref_logps, config):
    """The paper's loss, and what is logged beside it, of B pairs.

    logps: (B, 2), summed; ref_logps: (B, 2).
    """
    (chosen, rejected), beta = logps.unbind(1), config.beta
    lengths = torch.tensor([float(pair.chosen.trained_tokens) for pair in pairs])
    rewards = beta * (logps - ref_logps)
    margin = rewards[:, 0] - rewards[:, 1]
    weight, sft = {
        "sum": (config.eta * beta, -chosen.mean()),
        "sequence_mean": (config.eta, -(chosen / lengths).mean()),
        "token_mean": (config.eta, -chosen.sum() / lengths.sum()),
    }[config.sft_reduction]
    dpo = -logsigmoid(margin).mean()
    return {
        "loss": dpo + weight * sft,
        "loss/dpo": dpo,
        "loss/sft": sft,
        "rewards/margins": margin.mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "logps/chosen_delta": (chosen - ref_logps[:, 0]).mean(),
    }


@contextlib.contextmanager
def in_float64():
    """Models cast to float32 where they must not lose accuracy; here they cast to float64."""
    with mock.patch.object(torch, "float32", torch.float64):
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield


def both_precisions(model, sequences, autocast=None):
    """`token_logps` of a float32 model, plainly (under `autocast` to a dtype) and in float64."""
    exact, plain = copy.deepcopy(model), copy.deepcopy(model)
    for parameter in exact.parameters():
        parameter.data = parameter.data.double()
    for one in (exact, plain):
        one.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logps = token_logps(plain, sequences).float()
    with in_float64():
        return (plain, logps), (exact, token_logps(exact, sequences))


@torch.no_grad()
def logps_budgets(model, sequences):
    """The true summed log-probs (S,) of a float32 model, and how far a run's may be off: twice
    the plain errors, token by token, plus one eps of the sums' terms."""
    (_, plain), (_, exact) = both_precisions(model, sequences)
    budgets = 2 * (plain.double() - exact).abs().sum(1) + EPS * exact.abs().sum(1)
    return exact.sum(1), budgets


def margin_budget(model, pairs):
    """How far the mean margin of log-probs may lie from 0 where both are the model's own: the
    policy's and the reference's, of the chosen and of the rejected responses."""
    return 2 * logps_budgets(model, sides(pairs))[1].sum().item() / len(pairs)


class TrueStep(NamedTuple):
    """A step by hand in float64, and how far one in float32 may be off: the plain budget."""

    metrics: dict[str, float]
    budgets: dict[str, float]
    gradient: Tensor
    plain: Tensor
    """The gradient of the plain float32 expression."""


def true_step(model, pairs, ref_logps, config, autocast=None):
    """`TrueStep` of B pairs on a float32 model's own logits; ref_logps: (B, 2).

    autocast: the dtype under which the plain expression runs, its loss scaled.
    """
    found, scale = both_precisions(model, sides(pairs), autocast), 1 if autocast is None else 2**16
    for one, logps in found:
        sums = logps.sum(1).view(2, -1).T
        (scale * rpo_loss_by_hand(sums, pairs, ref_logps.to(sums.dtype), config)).backward()
        for parameter in one.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
    (plain, rough), (exact, logps) = ((one, logps.detach()) for one, logps in found)
    errors, values, budgets = (2 * (rough.double() - logps).abs()).float(), {}, {}
    for name in metrics_by_hand(sums, pairs, ref_logps, config):

        def value(logps, ref, name=name):
            return metrics_by_hand(logps.sum(1).view(2, -1).T, pairs, ref, config)[name]

        values[name] = value(logps, ref_logps.double()).item()
        budgets[name] = value_budget(value, errors, logps, ref_logps)
    return TrueStep(values, budgets, gradient(exact), gradient(plain))


def assert_is_step(values, grad, truth):
    """`METRICS` of a step, or its loss alone, and its gradient within their budgets."""
    for name, value in zip(METRICS, torch.as_tensor(values).reshape(-1).tolist(), strict=False):
        if name in truth.metrics:
            gap, budget = abs(value - truth.metrics[name]), truth.budgets[name]
            assert gap <= budget, f"{name}: off by {gap:.3e}, budget {budget:.3e}"
    one = [{"gradient": x} for x in (grad, truth.plain, truth.gradient)]
    assert_within_plain_budget(*one)


def unit(key):
    """What a metric is measured in: metrics of one unit are off by about the same."""
    units = ("logps/", "rewards/chosen", "rewards/rejected", "rewards/margins", "loss")
    return next((x.split("/")[0] for x in units if x in key), key)


def assert_same_run(rows, reruns, wanted):
    """A run's metrics are those of another that adds up in another order.

    A sum of n terms in any order is exact for terms that are off by n roundings each. So a metric
    may differ by as much as metrics of its unit do, in this row or an earlier one, in `reruns`:
    runs from weights that are off by so much (`nudged`).
    """
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]
    most = {}
    for number, (row, want) in enumerate(zip(rows, wanted, strict=True)):
        for key, value in want.items():
            gaps = [abs(rerun[number][key] - value) for rerun in reruns]
            most[unit(key)] = max(most.get(unit(key), 0.0), *gaps)
        for key, value in want.items():
            gap, budget = abs(row[key] - value), most[unit(key)] + EPS * abs(value)
            assert gap <= budget, f"row {number}, {key}: off by {gap:.3e}, budget {budget:.3e}"


def nudged(source, folder, seed):
    """A model folder whose weights are each off by up to the roundings of the longest sum."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).sign()
        parameter.data *= 1 + model.config.vocab_size * EPS / 2 * noise
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
