"""Padded = packed = prefix-shared: the loss and the gradient of every parameter."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from trainer_tiny import (
    relative,
    rpo_loss_by_hand,
    shifted_reference,
    tiny_config,
    tiny_llama,
    tiny_model,
    tiny_policy,
    tiny_split,
)
from transformers import AttentionInterface

from trainer import attention
from trainer.attention import PairLayout, pair_attention
from trainer.config import InputError
from trainer.head import fuse_lm_head
from trainer.model import check_model
from trainer.packing import pack, share_prefixes
from trainer.pairs import IGNORE, Pair, Sequence

KINDS = [
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gemma3",
    "cohere2", "phi", "gpt2", "olmo3",
]  # fmt: skip
LAYOUTS = [((3, 4, 5), (0, 6, 2)), ((7, 0, 3),), ((5, 4, 0), (2, 1, 1)), ((1, 0, 0),)]


def padded_logps(model, sequences):
    """Summed response log-probs (2B,) by the model's own logits of one padded batch."""
    size = max(len(sequence.ids) for sequence in sequences)

    def padded(rows, value):
        return torch.tensor([[*row, *[value] * (size - len(row))] for row in rows])

    ids, labels = padded([s.ids for s in sequences], 0), padded([s.labels for s in sequences], -100)
    mask = padded([[1] * len(s.ids) for s in sequences], 0)
    logps = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    picked = logps.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
    return torch.where(labels == IGNORE, 0, picked).sum(1)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_padded_packed_and_prefix_shared_are_equal(kind):
    model, split, ref_logps = tiny_model(kind), tiny_split(3), shifted_reference(3)
    sequences = [pair.chosen for pair in split.pairs] + [pair.rejected for pair in split.pairs]
    logps = padded_logps(model, sequences).view(2, 3).T
    expected = rpo_loss_by_hand(logps, split.pairs, ref_logps, tiny_config(eta=0.5))
    expected.backward()
    wanted = gradients(model)

    policy, _ = tiny_policy(model, eta=0.5)
    for pairs in (split.pairs, share_prefixes(split.pairs)):
        check_model(policy, pairs[0])
        model.zero_grad()
        batch = pack(pairs, (0, 1, 2))
        out = policy(batch, ref_logps.T.reshape(-1), 3, 1)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        got = gradients(model)
        assert got.keys() == wanted.keys()
        assert {n for n, grad in wanted.items() if not relative(got[n], grad) < 1e-5} == set()
    assert batch.input_ids.numel() < sum(len(sequence.ids) for sequence in sequences)


def test_the_prefix_is_all_that_both_sequences_begin_with():
    def pair(chosen, rejected):
        return Pair(*(Sequence(ids, (*ids[1:], IGNORE)) for ids in (chosen, rejected)))

    pairs = [pair((1, 2, 3), (1, 2, 4, 5)), pair((1, 2), (1, 2, 3)), pair((5, 6), (7, 8))]
    pairs = share_prefixes(pairs)
    assert [p.shared for p in pairs] == [2, 2, 0]
    batch = pack(pairs, (0, 1, 2))
    assert batch.input_ids[0].tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 5, 6, 7, 8]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 2, 3, 0, 1, 2, 0, 1, 0, 1]
    assert batch.rows.tolist() == [0, 1, 5, 8, 0, 1, 3, 5, 6, 10]
    assert batch.labels.tolist() == [2, 3, 2, 6, 2, 4, 5, 2, 3, 8]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4, 7, 9, 10]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", LAYOUTS)
def test_attention_by_sequence_is_attention_with_the_whole_mask(lengths, window, softcap):
    layout, total = PairLayout(lengths), sum(map(sum, lengths))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, total, 8) for heads in (4, 2, 2))
    places = torch.arange(total)
    visible = layout.visible(window, torch.device("cpu"))
    mask = visible(None, None, places[:, None], places[None, :])
    got, _ = pair_attention(
        torch.nn.Identity(), query, key, value, None,
        pairs=layout, sliding_window=window, softcap=softcap,
    )  # fmt: skip
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    torch.testing.assert_close(got, (weights @ value.repeat_interleave(2, 1)).transpose(1, 2))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", LAYOUTS)
def test_flex_attention_with_the_block_mask_is_attention_by_sequence(lengths, window, monkeypatch):
    eager = attention.create_block_mask

    def uncompiled(*args, _compile):
        return eager(*args)

    monkeypatch.setattr(attention, "create_block_mask", uncompiled)
    layout = PairLayout(lengths)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, sum(map(sum, lengths)), 16) for h in (4, 2, 2))
    mask = layout.block_mask(window, query.device)
    assert layout.block_mask(window, query.device) is mask
    flex = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    got, _ = pair_attention(
        torch.nn.Identity(), query, key, value, None, pairs=layout, sliding_window=window
    )
    torch.testing.assert_close(got, flex.transpose(1, 2))


def test_the_mask_is_the_tree_of_prefix_and_branches():
    visible = PairLayout(((2, 1, 2), (0, 1, 1))).visible(None, torch.device("cpu"))
    places = torch.arange(7)
    mask = visible(None, None, places[:, None], places[None, :]).int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


def spoiled(**changes):
    """`pair_attention` with some of its arguments replaced."""

    def attend(*tensors, **kwargs):
        return pair_attention(*tensors, **kwargs | changes)

    return attend


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma3_text", {"sliding_window": None}),
        ("gemma2", {"softcap": None}),
        ("gemma2", {"sliding_window": 16}),
        ("llama", {"pairs": PairLayout(((0, 2 * tiny_split(1).pairs[0].tokens, 0),))}),
        ("granite", {"scaling": 0.5}),
    ],
)
def test_a_wrong_attention_is_noticed(kind, changes, monkeypatch):
    policy, _ = tiny_policy(tiny_model(kind))
    pair = tiny_split(1).pairs[0]
    check_model(policy, pair)
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, spoiled(**changes))
    with pytest.raises(InputError, match="packed sequences do not attend as they do alone"):
        check_model(policy, pair)


REFUSED = [
    ({"s_aux": torch.zeros(4)}, "has attention sinks"),
    ({"position_bias": torch.zeros(4)}, "has a position bias"),
    ({"dropout": 0.1}, "has dropout"),
    ({"is_causal": False}, "has no causality"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED, ids=lambda x: str(x)[:12])
def test_what_attention_does_not_do_is_refused(asked, message):
    query = torch.randn(1, 2, 5, 8)
    with pytest.raises(InputError, match=f"Identity {message}, which cannot be packed"):
        pair_attention(
            torch.nn.Identity(), query, query, query, None, pairs=PairLayout(((0, 3, 2),)), **asked
        )


def test_an_architecture_that_keeps_its_window_to_itself_is_refused():
    bloom = fuse_lm_head(tiny_model("bloom", n_head=4), logit_scale=1.0)
    with pytest.raises(InputError, match="BloomForCausalLM: expected an architecture that"):
        tiny_policy(bloom)


def test_an_architecture_that_breaks_on_packed_rows_is_refused():
    policy, _ = tiny_policy(fuse_lm_head(tiny_model("stablelm"), logit_scale=1.0))
    with pytest.raises(InputError, match="StableLmForCausalLM: cannot run packed sequences: "):
        check_model(policy, tiny_split(1).pairs[0])


def test_a_layer_that_is_no_attention_is_refused():
    mixed = tiny_model("lfm2", layer_types=["conv", "full_attention"])
    policy, _ = tiny_policy(fuse_lm_head(mixed, logit_scale=1.0))
    with pytest.raises(InputError, match="packed sequences do not attend as they do alone"):
        check_model(policy, tiny_split(1).pairs[0])


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_policy_still_generates(kind):
    prompts = {"input_ids": torch.tensor([[0, 0, *range(30, 55)], [*range(60, 87)]])}
    prompts["attention_mask"] = (prompts["input_ids"] != 0).long()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = tiny_model(kind).generate(**prompts, **settings)
    policy, _ = tiny_policy(tiny_model(kind))
    assert torch.equal(policy.model.generate(**prompts, **settings), expected)


def test_a_batch_without_pairs_has_zero_gradients():
    policy, _ = tiny_policy(tiny_llama())
    out = policy(pack([], ()), torch.zeros(0), 4, 10)
    out.loss.backward()
    assert out.loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())
