"""What callers get wrong, said before any kernel runs: the argument, what was expected, what came,
and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from rpo_kernels.backends import BACKENDS
from rpo_kernels.losses import LOSSES, SFT_REDUCTIONS

STRATEGIES = ("auto", "recompute", "stream")
LARGEST = torch.finfo(torch.float32).max
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _fail(name: str, expected: str, got: object, kind: type[Exception] = ValueError) -> None:
    raise kind(f"{name}: expected {expected}, got {got}")


def _number(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(name, expected, repr(value), TypeError)
    elif not fits(value):
        _fail(name, expected, value)


def _choice(name: str, value: object, choices: Iterable[str]) -> None:
    expected = f"one of {', '.join(choices)}"
    if not isinstance(value, str):
        _fail(name, expected, repr(value), TypeError)
    elif value not in choices:
        _fail(name, expected, repr(value))


def _tensor(name: str, value: object, expected: str = "a torch.Tensor") -> None:
    if not isinstance(value, Tensor):
        _fail(name, expected, type(value).__name__, TypeError)


def check_reverse_mode(**tensors: object) -> None:
    """Refuse tangents, which an operator without forward-mode derivatives would drop, and what
    `torch.func` wraps: it would drop gradients.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if unpack_dual(tensor).tangent is not None:
            _fail(name, "a tensor without a tangent: there is no forward-mode derivative", "one")
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            expected = "a tensor outside torch.func and vmap (use torch.autograd, loop over calls)"
            _fail(name, expected, "one that a transform wraps")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    labels_name: str = "labels",
) -> None:
    """Check the tensors of an output layer: hidden (..., D), weight (V, D), labels (...), bias
    (V,); no device is read. The caller's caller knows labels as `labels_name`.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), (labels_name, labels)):
        _tensor(name, tensor)
    if bias is not None:
        _tensor("bias", bias, "None or a torch.Tensor")
    if not torch.compiler.is_compiling():
        check_reverse_mode(hidden=hidden, weight=weight, bias=bias)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in FLOATS:
            _fail(
                name,
                "a floating dtype (float16, bfloat16, float32, float64)",
                tensor.dtype,
                TypeError,
            )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        _fail(
            "weight",
            f"hidden's dtype {hidden.dtype} (or a call under torch.autocast)",
            weight.dtype,
            TypeError,
        )
    if labels.dtype not in (torch.int64, torch.int32):
        _fail(labels_name, "int64 or int32 token ids", labels.dtype, TypeError)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        _fail("weight", "shape (V, D), not empty", tuple(weight.shape))
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        _fail(
            "hidden",
            f"last dimension D = {weight.shape[1]} as in weight (V, D)",
            tuple(hidden.shape),
        )
    if weight.stride(-1) != 1:
        _fail(
            "weight",
            "rows that are contiguous in memory (call .contiguous() once)",
            f"strides {weight.stride()}",
        )
    if hidden.shape[:-1] != labels.shape:
        expected = f"shape {tuple(hidden.shape[:-1])}, hidden's without D"
        _fail(labels_name, expected, tuple(labels.shape))
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            _fail("bias", f"shape ({weight.shape[0]},)", tuple(bias.shape))
        if bias.dtype != weight.dtype:
            _fail("bias", f"weight's dtype {weight.dtype}", bias.dtype, TypeError)
    for name, other in (("weight", weight), (labels_name, labels), ("bias", bias)):
        if other is not None and other.device != hidden.device:
            _fail(name, f"hidden's device {hidden.device}", other.device)
    check_transform(scale, softcap)
    _check_ignore_index(ignore_index, weight.shape[0])


def check_transform(scale: float, softcap: float | None) -> None:
    """Check what turns the output layer's product into logits."""
    _number("logit_scale", scale, "a finite number > 0 in float32", lambda x: 0 < x <= LARGEST)
    if softcap is not None:
        expected = "None or a finite number > 0 in float32"
        _number("logit_softcap", softcap, expected, lambda x: 0 < x <= LARGEST)


def _check_ignore_index(ignore_index: int, vocab: int) -> None:
    expected = f"an int64 value that is no token id (outside [0, {vocab}))"
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        _fail("ignore_index", expected, repr(ignore_index), TypeError)
    if not -(2**63) <= ignore_index < 2**63 or 0 <= ignore_index < vocab:
        _fail("ignore_index", expected, ignore_index)


def check_run(
    backend: str,
    max_workspace_mb: float | None,
    grad_tolerance: float = 0.0,
    validate: bool = True,
    strategy: str = "auto",
) -> None:
    """Check the arguments that choose how to compute."""
    _choice("strategy", strategy, STRATEGIES)
    if not isinstance(validate, bool):  # "no" would count as True
        _fail("validate", "True or False", repr(validate), TypeError)
    expected = "a share in [0, 1) (0 is exact)"
    _number("grad_tolerance", grad_tolerance, expected, lambda x: 0 <= x < 1)
    _choice("backend", backend, BACKENDS)
    if max_workspace_mb is not None:
        expected = "None or a number of MiB > 0 (below 2^40)"
        _number("max_workspace_mb", max_workspace_mb, expected, lambda x: 0 < x < 2**40)


def check_sequences(hidden: Tensor, cu_seqlens: Tensor | None) -> None:
    """Check the layout: (2B, T, D), or packed (N, D) with cu_seqlens (2B + 1,)."""
    if cu_seqlens is not None:
        _tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens is None:
        if hidden.dim() != 3:
            _fail(
                "hidden",
                "shape (2B, T, D), or (N, D) together with cu_seqlens",
                tuple(hidden.shape),
            )
        if hidden.shape[0] % 2:
            _fail(
                "hidden",
                "an even number of sequences, B chosen ones and then B rejected ones",
                hidden.shape[0],
            )
        return
    if hidden.dim() != 2:
        _fail("hidden", "shape (N, D) when cu_seqlens is given", tuple(hidden.shape))
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        _fail("cu_seqlens", "int32 or int64 offsets", cu_seqlens.dtype, TypeError)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] % 2 == 0:
        _fail("cu_seqlens", "shape (2B + 1,): an even number of sequences", tuple(cu_seqlens.shape))
    if cu_seqlens.device != hidden.device:
        _fail("cu_seqlens", f"hidden's device {hidden.device}", cu_seqlens.device)


def check_normalizers(num_pairs: float | None, num_chosen_tokens: float | None) -> None:
    """Check the global counts of an optimizer step."""
    for name, value in (("num_pairs", num_pairs), ("num_chosen_tokens", num_chosen_tokens)):
        if value is None:
            continue
        if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
            _fail(
                name,
                "a Python number (call .item() on the reduced count once a step)",
                type(value).__name__,
                TypeError,
            )
        if not 0 < value < math.inf:
            _fail(name, "None or a count > 0", value)


def check_loss(
    loss_type: str,
    beta: float,
    eta: float,
    label_smoothing: float,
    sft_reduction: str,
    scale_eta_by_beta: bool | None,
    simpo_gamma: float | None,
) -> None:
    """Check the loss and its coefficients, and that the loss defines the combination."""
    _choice("loss_type", loss_type, LOSSES)
    _choice("sft_reduction", sft_reduction, SFT_REDUCTIONS)
    if scale_eta_by_beta is not None and not isinstance(scale_eta_by_beta, bool):
        _fail("scale_eta_by_beta", "None, True or False", repr(scale_eta_by_beta), TypeError)
    loss = LOSSES[loss_type]
    _number("beta", beta, "a finite number > 0 in float32", lambda x: 0 < x <= LARGEST)
    expected = "a finite number >= 0 in float32 (0 is the preference loss alone)"
    _number("eta", eta, expected, lambda x: 0 <= x <= LARGEST)
    _number("label_smoothing", label_smoothing, "a number in [0, 0.5)", lambda x: 0 <= x < 0.5)
    if simpo_gamma is not None:
        expected = "None or a finite number >= 0 in float32"
        _number("simpo_gamma", simpo_gamma, expected, lambda x: 0 <= x <= LARGEST)
    if label_smoothing and not loss.smoothing:
        able = ", ".join(name for name, item in LOSSES.items() if item.smoothing)
        _fail(
            "label_smoothing",
            f"0 with loss_type={loss_type!r}, which does not define it ({able} do)",
            label_smoothing,
        )
    if loss_type == "exo_pair" and label_smoothing == 0:
        _fail(
            "label_smoothing",
            "a number > 0 with loss_type='exo_pair' (log of it is part of the loss)",
            label_smoothing,
        )
    if simpo_gamma is not None and loss_type != "simpo":
        _fail(
            "simpo_gamma",
            f"None with loss_type={loss_type!r} (only simpo has a target margin)",
            simpo_gamma,
        )


def check_reference(
    loss_type: str, ref_logps: Tensor | None, sequences: int, hidden: Tensor
) -> None:
    """Check ref_logps (2B,), and that the loss has a reference model."""
    if ref_logps is None:
        return
    _tensor("ref_logps", ref_logps, "None or a floating-point tensor of summed log-probs")
    if not LOSSES[loss_type].reference:
        _fail(
            "ref_logps",
            f"None with loss_type={loss_type!r}, which has no reference model",
            "a tensor",
        )
    if not ref_logps.is_floating_point():
        expected = "None or a floating-point tensor of summed log-probs"
        _fail("ref_logps", expected, ref_logps.dtype, TypeError)
    if ref_logps.shape != (sequences,):
        _fail(
            "ref_logps",
            f"shape ({sequences},): one sum per sequence, chosen first",
            tuple(ref_logps.shape),
        )
    if ref_logps.device != hidden.device:
        _fail("ref_logps", f"hidden's device {hidden.device}", ref_logps.device)
    if ref_logps.requires_grad:
        _fail(
            "ref_logps",
            "no gradient (compute it under torch.no_grad() or detach it)",
            "requires_grad=True",
        )


def check_loss_fn(loss_fn: object) -> None:
    """Check that a user's loss is a function."""
    if not callable(loss_fn):
        _fail("loss_fn", "a function of (logps, counts, index)", type(loss_fn).__name__, TypeError)


def pair_losses(loss_fn: Callable, logps: Tensor, counts: Tensor, index: Tensor) -> Tensor:
    """Call a user's `loss_fn` on b pairs, outside autocast, and check that it returns one loss per
    pair: (b,), in the dtype of `logps`.
    """
    with torch.autocast(logps.device.type, enabled=False):
        losses = loss_fn(logps, counts, index)
    if not isinstance(losses, Tensor) or losses.shape != index.shape:
        _fail(
            "loss_fn",
            f"a tensor of shape ({index.shape[0]},), one loss per pair",
            getattr(losses, "shape", type(losses)),
        )
    return losses.to(logps.dtype)


def check_leaves(losses: Tensor, logps: Tensor) -> None:
    """Refuse losses (b,) with a gradient to anything but the leaf `logps`, or none to it: streaming
    would drop it.
    """
    nodes, seen, reached = [losses.grad_fn], set(), False
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", logps)
        if leaf is not logps:
            _fail(
                "loss_fn",
                "no gradient to other tensors than logps while streaming (detach them, or pass "
                "strategy='recompute')",
                f"a result that depends on one of shape {tuple(leaf.shape)} that requires it",
            )
        reached |= hasattr(node, "variable")
        nodes += [following for following, _ in node.next_functions]
    if not reached:
        _fail("loss_fn", "losses that depend on logps", "a result without a gradient to it")
