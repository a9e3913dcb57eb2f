"""Every wrong argument: the exception, and the message's argument, expectation and value.

All are raised before any kernel runs: the operators raise in turn if they are called. Labels out of
range are found by an operator while it counts the kept rows: there the backend's functions raise.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import types
import typing
from typing import Any, NamedTuple

import pytest
import torch

from rpo_kernels import api, fused_preference_loss, fused_rpo_loss, linear_logprobs, ops
from rpo_kernels.backends import torch_backend
from rpo_kernels.losses import LOSSES
from tests.support import ROOT

B, T, D, V = 2, 5, 8, 20
INF, NAN = math.inf, math.nan


class Bad(NamedTuple):
    """Arguments that replace good ones, and what the message must say after "NAME: expected"."""

    name: str
    value: Any
    error: type[Exception]
    expected: str
    got: str
    others: dict = {}


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*shape, **options)


PACKED = {"hidden": zeros(2 * B * T, D), "labels": zeros(2 * B * T, dtype=torch.int64)}
OFFSETS = torch.arange(2 * B + 1) * T


def sparse_ids(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.int64)


HEAD = [
    Bad("hidden", [1.0], TypeError, "a torch.Tensor", "list"),
    Bad("hidden", None, TypeError, "a torch.Tensor", "NoneType"),
    Bad("hidden", zeros(2 * B, T, D, dtype=torch.int64), TypeError, "a floating dtype", "int64"),
    Bad("hidden", zeros(2 * B, T, D, dtype=torch.complex64), TypeError, "a floating", "complex64"),
    Bad("hidden", zeros(2 * B, T, D, dtype=torch.bool), TypeError, "a floating dtype", "bool"),
    Bad("hidden", zeros(2 * B, T, D + 1), ValueError, f"last dimension D = {D}", f"{D + 1})"),
    Bad("hidden", zeros(()), ValueError, f"last dimension D = {D}", "()"),
    Bad("weight", [1.0], TypeError, "a torch.Tensor", "list"),
    Bad("weight", zeros(V, D, dtype=torch.int32), TypeError, "a floating dtype", "int32"),
    Bad("weight", zeros(V, D).half(), TypeError, "hidden's dtype torch.float32", "float16"),
    Bad("weight", zeros(V, D).double(), TypeError, "torch.autocast", "float64"),
    Bad("weight", zeros(V), ValueError, "shape (V, D)", f"({V},)"),
    Bad("weight", zeros(V, D, 1), ValueError, "shape (V, D)", f"({V}, {D}, 1)"),
    Bad("weight", zeros(0, D), ValueError, "shape (V, D), not empty", f"(0, {D})"),
    Bad("weight", zeros(D, V).t(), ValueError, "contiguous", f"(1, {V})"),
    Bad("weight", zeros(V, D, device="meta"), ValueError, "hidden's device cpu", "meta"),
    Bad("labels", [1], TypeError, "a torch.Tensor", "list"),
    Bad("labels", zeros(2 * B, T), TypeError, "int64 or int32", "float32"),
    Bad("labels", zeros(2 * B, T, dtype=torch.uint8), TypeError, "int64 or int32", "uint8"),
    Bad("labels", zeros(2 * B, T, dtype=torch.bool), TypeError, "int64 or int32", "bool"),
    Bad("labels", sparse_ids(2 * B, T + 1), ValueError, f"({2 * B}, {T})", f"({2 * B}, {T + 1})"),
    Bad("labels", sparse_ids(2 * B * T), ValueError, f"({2 * B}, {T})", f"({2 * B * T},)"),
    Bad("labels", sparse_ids(2 * B, T).to("meta"), ValueError, "hidden's device cpu", "meta"),
    Bad("bias", [0.0] * V, TypeError, "torch.Tensor", "list"),
    Bad("bias", 0.0, TypeError, "torch.Tensor", "float"),
    Bad("bias", zeros(V + 1), ValueError, f"shape ({V},)", f"({V + 1},)"),
    Bad("bias", zeros(V, 1), ValueError, f"shape ({V},)", f"({V}, 1)"),
    Bad("bias", zeros(V).half(), TypeError, "weight's dtype torch.float32", "float16"),
    Bad("bias", zeros(V, device="meta"), ValueError, "hidden's device cpu", "meta"),
    Bad("logit_scale", 0.0, ValueError, "a finite number > 0", "0.0"),
    Bad("logit_scale", -1.0, ValueError, "a finite number > 0", "-1.0"),
    Bad("logit_scale", NAN, ValueError, "a finite number > 0", "nan"),
    Bad("logit_scale", INF, ValueError, "a finite number > 0", "inf"),
    Bad("logit_scale", 1e300, ValueError, "a finite number > 0 in float32", "1e+300"),
    Bad("logit_scale", 10**400, ValueError, "a finite number > 0 in float32", "1000000"),
    Bad("logit_scale", None, TypeError, "a finite number > 0", "None"),
    Bad("logit_scale", "1", TypeError, "a finite number > 0", "1"),
    Bad("logit_softcap", 0.0, ValueError, "None or a finite number > 0", "0.0"),
    Bad("logit_softcap", -30.0, ValueError, "None or a finite number > 0", "-30.0"),
    Bad("logit_softcap", INF, ValueError, "None or a finite number > 0", "inf"),
    Bad("logit_softcap", "30", TypeError, "None or a finite number > 0", "30"),
    Bad("ignore_index", 0, ValueError, f"outside [0, {V})", "0"),
    Bad("ignore_index", V - 1, ValueError, f"outside [0, {V})", str(V - 1)),
    Bad("ignore_index", None, TypeError, "", "None"),
    Bad("ignore_index", 2**63, ValueError, "", str(2**63)),
    Bad("ignore_index", -1.5, TypeError, "", "-1.5"),
    Bad("max_workspace_mb", 0, ValueError, "None or a number of MiB > 0", "0"),
    Bad("max_workspace_mb", -1, ValueError, "None or a number of MiB > 0", "-1"),
    Bad("max_workspace_mb", NAN, ValueError, "None or a number of MiB > 0", "nan"),
    Bad("max_workspace_mb", INF, ValueError, "None or a number of MiB > 0", "inf"),
    Bad("max_workspace_mb", 1e15, ValueError, "None or a number of MiB > 0", "1000000000000000.0"),
    Bad("max_workspace_mb", "64", TypeError, "None or a number of MiB > 0", "64"),
    Bad("backend", "cuda", ValueError, "one of auto, triton, torch", "'cuda'"),
    Bad("backend", None, TypeError, "one of auto, triton, torch", "None"),
    Bad("grad_tolerance", -0.1, ValueError, "[0, 1)", "-0.1"),
    Bad("grad_tolerance", 1.0, ValueError, "[0, 1)", "1.0"),
    Bad("grad_tolerance", NAN, ValueError, "[0, 1)", "nan"),
    Bad("grad_tolerance", "0.1", TypeError, "[0, 1)", "0.1"),
]

ROWS = zeros(2 * B * T, D)
SEQUENCES = [
    Bad("hidden", ROWS, ValueError, "shape (2B, T, D)", f"({2 * B * T}, {D})", PACKED),
    Bad("hidden", zeros(3, T, D), ValueError, "an even number of sequences", "3",
        {"labels": sparse_ids(3, T)}),
    Bad("hidden", zeros(1, 2, T, D), ValueError, "shape (2B, T, D)", f"(1, 2, {T}, {D})",
        {"labels": sparse_ids(1, 2, T)}),
    Bad("hidden", zeros(2 * B, T, D), ValueError, "shape (N, D) when cu_seqlens is given",
        f"({2 * B}, {T}, {D})", {"cu_seqlens": OFFSETS}),
    Bad("cu_seqlens", OFFSETS.float(), TypeError, "int32 or int64", "float32", PACKED),
    Bad("cu_seqlens", OFFSETS.tolist(), TypeError, "", "list", PACKED),
    Bad("cu_seqlens", OFFSETS[:-1], ValueError, "shape (2B + 1,)", f"({2 * B},)", PACKED),
    Bad("cu_seqlens", OFFSETS[:0], ValueError, "shape (2B + 1,)", "(0,)", PACKED),
    Bad("cu_seqlens", OFFSETS[None], ValueError, "shape (2B + 1,)", f"(1, {2 * B + 1})", PACKED),
    Bad("cu_seqlens", OFFSETS.to("meta"), ValueError, "hidden's device cpu", "meta", PACKED),
    Bad("num_pairs", 0, ValueError, "None or a count > 0", "0"),
    Bad("num_pairs", -2, ValueError, "None or a count > 0", "-2"),
    Bad("num_pairs", NAN, ValueError, "None or a count > 0", "nan"),
    Bad("num_pairs", torch.tensor(2), TypeError, "a Python number", "Tensor"),
    Bad("num_pairs", "2", TypeError, "a Python number", "str"),
    Bad("num_pairs", True, TypeError, "a Python number", "bool"),
    Bad("strategy", "fast", ValueError, "one of auto, recompute, stream", "'fast'"),
    Bad("strategy", None, TypeError, "one of auto, recompute, stream", "None"),
    Bad("max_workspace_mb", 1e-5, ValueError, "room for one row of the vocabulary", "MiB",
        {"strategy": "stream"}),
    Bad("max_workspace_mb", 1e-3, ValueError, "room for", "MiB",
        {"strategy": "recompute", "grad_tolerance": 0.1}),
]  # fmt: skip

REFS = zeros(2 * B)
FREE = {"ref_logps": None}
LOSS = [
    Bad("beta", 0.0, ValueError, "a finite number > 0", "0.0"),
    Bad("beta", -0.1, ValueError, "a finite number > 0", "-0.1"),
    Bad("beta", NAN, ValueError, "a finite number > 0", "nan"),
    Bad("beta", INF, ValueError, "a finite number > 0", "inf"),
    Bad("beta", "0.1", TypeError, "a finite number > 0", "0.1"),
    Bad("eta", -0.1, ValueError, "a finite number >= 0", "-0.1"),
    Bad("eta", NAN, ValueError, "a finite number >= 0", "nan"),
    Bad("eta", 1e39, ValueError, "a finite number >= 0 in float32", "1e+39"),
    Bad("eta", None, TypeError, "a finite number >= 0", "None"),
    Bad("label_smoothing", 0.5, ValueError, "[0, 0.5)", "0.5"),
    Bad("label_smoothing", -0.1, ValueError, "[0, 0.5)", "-0.1"),
    Bad("label_smoothing", NAN, ValueError, "[0, 0.5)", "nan"),
    Bad("label_smoothing", "0.1", TypeError, "[0, 0.5)", "0.1"),
    Bad("label_smoothing", 0.0, ValueError, "a number > 0", "0.0", {"loss_type": "exo_pair"}),
    Bad("loss_type", "dpo", ValueError, "one of sigmoid", "'dpo'"),
    Bad("loss_type", None, TypeError, "one of sigmoid", "None"),
    Bad("loss_type", ["sigmoid"], TypeError, "one of sigmoid", "['sigmoid']"),
    Bad("sft_reduction", "mean", ValueError, "sum, sequence_mean, token_mean", "'mean'"),
    Bad("sft_reduction", None, TypeError, "sum, sequence_mean, token_mean", "None"),
    Bad("scale_eta_by_beta", "no", TypeError, "None, True or False", "'no'"),
    Bad("simpo_gamma", 0.5, ValueError, "None with loss_type='sigmoid'", "0.5"),
    Bad("simpo_gamma", -1.0, ValueError, "number >= 0", "-1.0", FREE | {"loss_type": "simpo"}),
    Bad("simpo_gamma", NAN, ValueError, "number >= 0", "nan", FREE | {"loss_type": "simpo"}),
    Bad("simpo_gamma", "1", TypeError, "number >= 0", "1", FREE | {"loss_type": "simpo"}),
    Bad("num_chosen_tokens", 0, ValueError, "None or a count > 0", "0"),
    Bad("num_chosen_tokens", torch.tensor(9), TypeError, "a Python number", "Tensor"),
    Bad("ref_logps", zeros(2 * B + 1), ValueError, f"shape ({2 * B},)", f"({2 * B + 1},)"),
    Bad("ref_logps", zeros(2, B), ValueError, f"shape ({2 * B},)", f"(2, {B})"),
    Bad("ref_logps", zeros(2 * B, dtype=torch.int64), TypeError, "floating-point", "int64"),
    Bad("ref_logps", [0.0] * 2 * B, TypeError, "floating-point tensor", "list"),
    Bad("ref_logps", zeros(2 * B, device="meta"), ValueError, "hidden's device cpu", "meta"),
    Bad("ref_logps", zeros(2 * B, requires_grad=True), ValueError, "no gradient", "requires_grad"),
    *(
        Bad("ref_logps", REFS, ValueError, f"None with loss_type={name!r}", "a tensor",
            {"loss_type": name})
        for name in LOSSES if not LOSSES[name].reference
    ),
    *(
        Bad("label_smoothing", 0.1, ValueError, f"0 with loss_type={name!r}", "0.1",
            {"loss_type": name} | ({} if LOSSES[name].reference else FREE))
        for name in LOSSES if not LOSSES[name].smoothing
    ),
]  # fmt: skip

CUSTOM = [
    Bad("loss_fn", None, TypeError, "", "None"),
    Bad("loss_fn", "sigmoid", TypeError, "", "str"),
]

FUNCTIONS = {
    "linear_logprobs": linear_logprobs,
    "fused_rpo_loss": fused_rpo_loss,
    "fused_preference_loss": fused_preference_loss,
}
TABLE = [
    *(("linear_logprobs", bad) for bad in HEAD),
    *(("fused_rpo_loss", bad) for bad in [*HEAD, *SEQUENCES, *LOSS]),
    *(("fused_preference_loss", bad) for bad in [*HEAD, *SEQUENCES, *CUSTOM]),
]


def good(function: str) -> dict:
    """Arguments that are right."""
    make = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {
        "hidden": torch.randn(2 * B, T, D, generator=make),
        "weight": torch.randn(V, D, generator=make),
        "labels": torch.randint(V, (2 * B, T), generator=make),
    }
    if function == "fused_rpo_loss":
        found["ref_logps"] = REFS
    if function == "fused_preference_loss":
        found["loss_fn"] = lambda logps, counts, index: -logps[0]
    return found


def public_name(function: str, name: str) -> str:
    """What `function` calls the argument that this table calls `name`."""
    return "targets" if (function, name) == ("linear_logprobs", "labels") else name


def call(function: str, arguments: dict):
    return FUNCTIONS[function](**{public_name(function, k): v for k, v in arguments.items()})


class Called(AssertionError):
    """A kernel ran."""


@pytest.fixture
def no_operator(monkeypatch):
    def called(*args, **options):
        raise Called("an operator ran before the arguments were checked")

    for name in ("linear_logprobs", "preference_loss", "sequence_sums"):
        monkeypatch.setattr(ops, name, called)
    monkeypatch.setattr(api.CustomLoss, "apply", called)


def describe(item) -> str:
    if isinstance(item, Bad):
        value = item.value
        if isinstance(value, list):
            value = "list"
        elif isinstance(value, torch.Tensor):
            value = f"{tuple(value.shape)} {value.dtype} {value.device}"
        return f"{item.name}={value}" + (f" with {', '.join(item.others)}" if item.others else "")
    return str(item)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_spy_sees_good_arguments_reach_an_operator(function, no_operator):
    with pytest.raises(Called):
        call(function, good(function))


@pytest.mark.parametrize(("function", "bad"), TABLE, ids=describe)
def test_bad_argument(function, bad, no_operator):
    with pytest.raises(bad.error) as raised:
        call(function, good(function) | bad.others | {bad.name: bad.value})
    assert type(raised.value) is bad.error
    message = str(raised.value)
    assert re.match(rf"{public_name(function, bad.name)}: (.*)expected ", message), message
    expected, got = message.split("expected ", 1)[1].split(", got ", 1)
    assert bad.expected in expected, message
    assert bad.got in got, message


ANYTHING = [object(), "no", b"1", 1, 1.5, True, None, [1], {}, torch.tensor(1.0)]


def fits(value: object, kind: Any) -> bool:
    """Whether `value` is of an annotated type; an int is a float too, but no bool is a number."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return bool({int, float} & {*kinds})
    return any(isinstance(value, typing.get_origin(k) or k) for k in kinds)


WRONG_TYPES = [
    (function, name, value)
    for function, called in FUNCTIONS.items()
    for name, kind in typing.get_type_hints(called).items()
    for value in ANYTHING
    if name != "return" and not fits(value, kind)
]


@pytest.mark.parametrize(
    ("function", "name", "value"),
    WRONG_TYPES,
    ids=[f"{f}-{n}={type(v).__name__}" for f, n, v in WRONG_TYPES],
)
def test_every_argument_has_its_annotated_type(function, name, value, no_operator):
    """From the signatures: an argument added tomorrow is checked or fails here."""
    given = {public_name(function, k): v for k, v in good(function).items()}
    with pytest.raises(TypeError, match=f"^{name}: expected "):
        FUNCTIONS[function](**given | {name: value})


@pytest.fixture
def no_kernel(monkeypatch):
    def called(*args, **options):
        raise Called("a kernel ran before the labels were checked")

    for name in ("lse_and_target", "exp_panel", "tail"):
        monkeypatch.setattr(torch_backend, name, called)


WAYS = [
    ("linear_logprobs", {}),
    ("fused_rpo_loss", {"strategy": "recompute"}),
    ("fused_rpo_loss", {"strategy": "stream"}),
    ("fused_preference_loss", {"strategy": "recompute"}),
    ("fused_preference_loss", {"strategy": "stream"}),
]
WRONG_LABELS = [V, V + 7, -1, -99, -101, 2**40, -(2**40), 2**63 - 1]


@pytest.mark.parametrize(("function", "options"), WAYS, ids=describe)
@pytest.mark.parametrize("label", WRONG_LABELS)
def test_labels_out_of_range(function, options, label, no_kernel):
    arguments = good(function) | options
    arguments["labels"][1, 2] = label
    with pytest.raises(ValueError) as raised:
        call(function, arguments)
    message = str(raised.value)
    name = public_name(function, "labels")
    assert message.startswith(f"{name}: expected values in [0, 20) or ignore_index=-100, got ")
    assert str(label) in message and "mask padding" in message


@pytest.mark.parametrize(("function", "options"), WAYS, ids=describe)
def test_the_usual_padding_with_another_ignore_index(function, options, no_kernel):
    arguments = good(function) | options | {"ignore_index": -1}
    arguments["labels"][0, 0] = -100
    with pytest.raises(ValueError, match=r"ignore_index=-1, got values from -100"):
        call(function, arguments)


@pytest.mark.parametrize(("function", "options"), WAYS, ids=describe)
def test_validate_false_skips_the_check(function, options):
    arguments = good(function) | options
    first, second = (call(function, arguments | {"validate": v}) for v in (True, False))
    loss = first if isinstance(first, torch.Tensor) else first[0]
    assert torch.equal(loss, second if isinstance(second, torch.Tensor) else second[0])


WRONG_OFFSETS = {
    "starts late": [1, 5, 10, 15, 20],
    "ends early": [0, 5, 10, 15, 19],
    "ends late": [0, 5, 10, 15, 21],
    "falls": [0, 10, 5, 15, 20],
    "negative, as int32 wraps": [0, 5, -10, 15, 20],
}


CHECKED = [way for way in WAYS[1:] if way != ("fused_preference_loss", {"strategy": "recompute"})]


@pytest.mark.parametrize(("function", "options"), CHECKED, ids=describe)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("offsets", WRONG_OFFSETS)
def test_offsets_that_do_not_cover_the_rows(offsets, dtype, function, options, no_kernel):
    """Both strategies read them with the labels, in one synchronization."""
    arguments = good(function) | options | PACKED
    arguments["cu_seqlens"] = torch.tensor(WRONG_OFFSETS[offsets], dtype=dtype)
    with pytest.raises(ValueError) as raised:
        call(function, arguments)
    message = str(raised.value)
    assert message.startswith("cu_seqlens: expected offsets that rise from 0 to 20 ")
    values = WRONG_OFFSETS[offsets]
    assert f"got first {values[0]}, last {values[-1]}" in message


@pytest.mark.parametrize(("function", "options"), CHECKED, ids=describe)
def test_offsets_beyond_no_rows(function, options, no_kernel):
    """No rows at all, but offsets that promise some."""
    arguments = good(function) | options
    arguments |= {"hidden": zeros(0, D), "labels": sparse_ids(0), "cu_seqlens": OFFSETS}
    with pytest.raises(ValueError, match=r"cu_seqlens: expected offsets that rise from 0 to 0"):
        call(function, arguments)


IN_A_PROCESS = """
import json, sys, torch
from rpo_kernels import fused_preference_loss
for rows, offsets in json.loads(sys.argv[1]):
    hidden, weight = torch.zeros(rows, 8, requires_grad=True), torch.zeros(20, 8)
    labels, ends = torch.zeros(rows, dtype=torch.int64), torch.tensor(offsets)
    try:
        fused_preference_loss(
            hidden, weight, labels, lambda x, *_: -x[0], cu_seqlens=ends, strategy="recompute"
        )
        print("no error", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


def test_offsets_of_a_recomputed_custom_loss():
    """In a process of its own: sums over offsets that nobody checked read foreign memory."""
    cases = [(20, values) for values in WRONG_OFFSETS.values()] + [(0, OFFSETS.tolist())]
    found = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    said = found.stdout.splitlines()
    for (rows, _), line in zip(cases, said, strict=False):
        assert line.startswith(
            f"ValueError cu_seqlens: expected offsets that rise from 0 to {rows} "
        )
    assert found.returncode == 0 and len(said) == len(cases), found.stderr[-300:]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_tangents_are_refused(name, function):
    """No forward-mode derivative: an operator would drop the tangent without a word."""
    given = good(function)

    def value(tensor):
        return call(function, given | {name: tensor})

    with pytest.raises(ValueError, match=f"{name}: expected a tensor without a tangent"):
        torch.func.jvp(value, (given[name],), (torch.ones_like(given[name]),))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functional_transforms_are_refused(function):
    """`vmap` would drop hidden's gradient."""
    given = good(function)

    def value(tensor):
        return call(function, given | {"hidden": tensor})

    with pytest.raises(ValueError, match="hidden: expected a tensor outside torch.func and vmap"):
        torch.func.vmap(value)(torch.stack([given["hidden"]] * 2))
    with pytest.raises(ValueError, match="hidden: expected a tensor outside torch.func and vmap"):
        torch.func.grad(value)(given["hidden"])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_policy_for_nan_and_infinity_is_documented(function):
    doc = " ".join(FUNCTIONS[function].__doc__.split())
    assert "NaN" in doc or "as in `fused_rpo_loss`" in doc
