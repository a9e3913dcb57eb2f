"""Padded = packed = prefix-shared: the loss and the gradient of every parameter."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface

from tests.trainer.tiny import (
    relative,
    rpo_by_hand,
    rpo_loss_by_hand,
    shifted_reference,
    tiny_config,
    tiny_llama,
    tiny_model,
    tiny_policy,
    tiny_split,
)
from trainer.data import batches as layouts
from trainer.data.batches import PairLayout, pack, share_prefixes
from trainer.data.pairs import IGNORE, Pair, Sequence
from trainer.errors import InputError
from trainer.model import attention
from trainer.model.attention import pair_attention
from trainer.model.probe import check_model

KINDS = [
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "gemma3",
    "cohere2", "phi", "gpt2", "olmo3",
]  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "rope_theta": 1e4, "original_max_position_embeddings": 38,
}  # fmt: skip
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
        check_model(policy, pairs)
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
    eager = layouts.create_block_mask

    def uncompiled(*args, _compile):
        return eager(*args)

    monkeypatch.setattr(layouts, "create_block_mask", uncompiled)
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


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_flex_attention_gets_what_autocast_gives_other_attention(dtype, monkeypatch):
    """Rotary embeddings leave float32 queries and keys beside bfloat16 values."""
    given, layouts_of = [], []

    def flex(module, query, key, value, mask, **how):
        given.append((query.dtype, key.dtype, value.dtype))
        return attention._by_sequence(query, key, value, layouts_of[-1], None, None, None), None

    monkeypatch.setattr(attention, "_on_gpu", lambda x: True)
    monkeypatch.setattr(attention, "flex_attention_forward", flex)
    monkeypatch.setattr(PairLayout, "block_mask", lambda self, *how: layouts_of.append(self))
    policy, pairs = tiny_policy()[0], share_prefixes(tiny_split(2).pairs)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        policy.hidden(pack(pairs, (0, 1))).sum().backward()
    assert set(given) == {(dtype or torch.float32,) * 3}


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
    """`pair_attention` with some of its arguments replaced, by a value or a function of it."""

    def attend(*tensors, **kwargs):
        new = {k: v(kwargs[k]) if callable(v) else v for k, v in changes.items()}
        return pair_attention(*tensors, **kwargs | new)

    return attend


def one_sequence(layout):
    """The layout of a row in which every token sees all before it."""
    return layout and PairLayout(((0, sum(map(sum, layout.lengths)), 0),))


def no_prefix(layout):
    """One in which rejected responses do not see what they share with the chosen ones."""
    apart = (((0, p + c, 0), (0, r, 0)) for p, c, r in layout.lengths) if layout else ()
    return layout and PairLayout(tuple(pair for pairs in apart for pair in pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 17}),
        ("gemma3_text", {"sliding_window": None}),
        ("gemma2", {"softcap": None}),
        ("gemma2", {"sliding_window": 16}),
        ("llama", {"pairs": one_sequence}),
        ("llama", {"pairs": no_prefix}),
        ("granite", {"scaling": 0.5}),
    ],
)
def test_a_wrong_attention_is_noticed(kind, changes, dtype, monkeypatch):
    policy, _ = tiny_policy(tiny_model(kind).to(dtype))
    pairs = tiny_split(1).pairs
    assert check_model(policy, pairs) is None
    assert policy.packed
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, spoiled(**changes))
    with pytest.raises(InputError, match="packing: .* does not treat packed sequences as it does"):
        check_model(policy, pairs, packing=True)
    assert "a token's state differs by" in check_model(policy, pairs)
    assert not policy.packed


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sequences_of_two_tokens_are_enough(kind):
    policy, _ = tiny_policy(tiny_model(kind))
    sides = (Sequence(np.array(ids), np.array([ids[1], IGNORE])) for ids in ((5, 6), (5, 7)))
    assert check_model(policy, [Pair(*sides, shared=1)]) is None


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


ALONE = [
    ("bloom", {"n_head": 4}, "has layers that do not tell their window"),
    ("stablelm", {}, "cannot run packed sequences: "),
    ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}, "GptOssAttention has attention sinks"),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, "a token's state differs by"),
    ("llama", {"rope_parameters": LONGROPE}, "where its RoPE (longrope) has other"),
]


@pytest.mark.parametrize(("kind", "fields", "reason"), ALONE, ids=lambda x: str(x)[:12])
def test_what_cannot_be_packed_runs_alone_and_says_why(kind, fields, reason):
    """Its gradient is that of the model's own logits, one sequence at a time."""
    model, pairs, ref_logps = tiny_model(kind, **fields), tiny_split(3).pairs, shifted_reference(3)
    rpo_by_hand(model, pairs, ref_logps, tiny_config(eta=0.5)).backward()
    wanted = gradients(model)
    model.zero_grad()
    policy, _ = tiny_policy(model, eta=0.5)
    assert reason in check_model(policy, pairs)
    with pytest.raises(InputError, match="^packing: .*; set it to auto or false"):
        check_model(policy, pairs, packing=True)
    batch = pack(share_prefixes(pairs), (0, 1, 2))
    policy(batch, ref_logps.T.reshape(-1), 3, 1).loss.backward()
    assert_equal_gradients(gradients(model), wanted)


def assert_equal_gradients(got, wanted):
    """Each within 1e-5 of itself, or of the whole gradient's 1e-3 where it is rounding."""
    assert got.keys() == wanted.keys()
    floor = 1e-3 * torch.cat([x.flatten() for x in wanted.values()]).norm()
    errors = {n: (got[n] - x).norm() / max(x.norm(), floor) for n, x in wanted.items()}
    assert {n for n, error in errors.items() if not error < 1e-5} == set()


def test_sequences_alone_have_the_packed_gradient():
    policy, _ = tiny_policy(eta=0.5)
    pairs, ref_logps, found = share_prefixes(tiny_split(3).pairs), shifted_reference(3), []
    for packing in (True, False):
        check_model(policy, pairs, packing)
        policy.zero_grad()
        out = policy(pack(pairs, (0, 1, 2)), ref_logps.T.reshape(-1), 3, 1)
        out.loss.backward()
        found.append((out.loss.item(), {n: g.clone() for n, g in gradients(policy).items()}))
    (packed, wanted), (alone, got) = found
    assert alone == pytest.approx(packed, rel=1e-5)
    assert_equal_gradients(got, wanted)


def test_ranks_run_the_backbone_as_often_as_the_one_with_the_most_pairs():
    policy, _ = tiny_policy()
    policy.pack(False)
    pairs, ranks, calls = tiny_split(3).pairs, ((0, 1), (2,), ()), []
    policy.language_model.base_model.register_forward_hook(lambda *_: calls.append(1))
    for indices in ranks:
        out = policy(pack(pairs, indices, ranks), torch.zeros(2 * len(indices)), 3, 10)
        out.loss.backward()
        assert len(calls) == 4
        calls.clear()
        assert all(p.grad is not None for p in policy.parameters())


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
