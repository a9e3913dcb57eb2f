"""A tokenizer (256 bytes, three special tokens) and a model small enough to train in a test."""

import json

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.config import RunConfig
from trainer.data import BadRows, check_record
from trainer.encoding import Split, encode_rows
from trainer.model import PreferenceModel, fuse_lm_head, loss_options

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat_template=CHATML):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
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


def tiny_llama(tied=True, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # far from uniform, so that differences show
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def chat(prompt, *turns):
    """A user's message, and a response of one or several turns."""
    roles = ("assistant", "user")
    return [{"role": "user", "content": prompt}], [
        {"role": roles[k % 2], "content": text} for k, text in enumerate(turns)
    ]


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
    return encode_rows(rows, tokenizer or tiny_tokenizer(), max_length, BadRows("error"))


def tiny_config(**fields):
    return RunConfig(**({"model_name_or_path": "tiny", "train_file": "none.jsonl"} | fields))


def tiny_policy(model=None, **fields):
    """A `PreferenceModel` around a tiny Llama, and an accelerator that adds nothing."""
    model = tiny_llama() if model is None else model
    accelerator = Accelerator(cpu=True)
    policy = PreferenceModel(fuse_lm_head(model), loss_options(tiny_config(**fields)))
    return policy, accelerator


def save_tiny(folder):
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def as_split(pairs, ref_logps=None):
    return Split(pairs, {}, ref_logps)
