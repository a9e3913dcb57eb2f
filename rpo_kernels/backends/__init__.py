"""Tile arithmetic: the only code that multiplies hidden states with the whole vocabulary.

A backend is a module with the functions of `Backend`: `torch_backend` runs anywhere,
`triton_backend` on GPUs (its kernels stand in `triton_kernels`, `triton_sparse`, `triton_targets`
and `triton_tail`, their tile sizes in `tiles`; `gluon_hopper` has others for Hopper, on request).
The two do not import each other.
"""

from __future__ import annotations

import importlib.util
from typing import Protocol

from torch import Tensor

from rpo_kernels.spec import Objective, Transform

BACKENDS = ("auto", "triton", "torch")


class Backend(Protocol):
    """What a backend is. The engines check nothing again: arguments are right when they arrive.

    None of the functions raises anything of its own; what a backend cannot run on, `choose_backend`
    refuses before. Nothing is read back from the device, so that calls queue up there (the gathers
    of `torch_backend.kept_products` aside).

    Logits are in base 2: ``y = z * log2(e)``, with z of `Transform`. Sums and log-probs are float32
    (float64 for float64 inputs), "acc" below. Matrices have a contiguous last dimension. Results
    depend on nothing but the arguments: every sum has a fixed order.

    n rows, D hidden size, V vocabulary, p vocabulary entries of a panel, B pairs.
    """

    def lse_and_target(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Transform,
        max_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The softmax of every row over some vocabulary entries, and its target's logit.

        Args:
            hidden: (n, D). weight: (V, D), of hidden's dtype. bias: (V,) or None.
            targets: (n,) int64; where one is outside [0, V), the third result means nothing.
            transform: scale and softcap.
            max_bytes: bound on temporaries.

        Returns:
            ``shift = max_v y``, ``sums = sum_v 2^(y - shift)``, and ``y - shift`` of the target;
            each (n,) acc.
        """

    def exp_panel(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shift: Tensor,
        targets: Tensor,
        v0: int,
        transform: Transform,
        out: Tensor,
        sums: Tensor | None = None,
        target: Tensor | None = None,
        max_bytes: int = 2**24,
    ) -> None:
        """Fill a panel with ``2^(y - shift) * dz/dx``.

        Args:
            hidden: (n, D). weight: (p, D), the vocabulary entries from `v0` on, of hidden's dtype.
                bias: (p,) or None.
            shift: (n,) acc, anything within 86 of the row's largest ``y``.
            targets: (n,) int64, over the whole vocabulary.
            v0: first vocabulary entry of the panel.
            transform: scale and softcap.
            out: (p, n), written, in hidden's dtype or acc.
            sums: (n,) acc, ``2^(y - shift)`` summed over the panel is added to it.
            target: (n,) acc, set to ``y - shift`` of the target where it lies in the panel.
            max_bytes: bound on temporaries.
        """

    def target_logits(
        self,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: Transform,
        max_bytes: int,
    ) -> Tensor:
        """``y`` of every row's target, (n,) acc: products summed in acc whatever the device.

        Args:
            hidden: (n, D). targets: (n,) int64 in [0, V).
            weight: (V, D), its rows are cast to hidden's dtype. bias: (V,) or None.
            transform: scale and softcap. max_bytes: bound on temporaries.
        """

    def put_targets_(self, panel: Tensor, targets: Tensor, v0: int, values: Tensor) -> None:
        """``panel[targets[i] - v0, i] = values[i]`` for the rows whose target lies in the panel.

        Args:
            panel: (p, n), the vocabulary entries from `v0` on.
            targets: (n,) int64, over the whole vocabulary. values: (n,).
        """

    def finish_panel(
        self,
        panel: Tensor,
        targets: Tensor,
        shift: Tensor,
        sums: Tensor,
        target: Tensor,
        transform: Transform,
    ) -> Tensor:
        """Log-probs (n,) acc, in nats; and the targets' entries ``sums * (p - 1) * dz/dx`` of a
        panel, put in their places, accurate where p is close to 1.

        Args:
            panel: (V, n), as `exp_panel` left it over the whole vocabulary.
            targets: (n,) int64. shift, sums, target: (n,) acc, as `exp_panel` left them.
            transform: scale and softcap.
        """

    def kept_products(
        self,
        panel: Tensor,
        size: int,
        keep: Tensor,
        weight: Tensor,
        scaled: Tensor,
        coef: Tensor,
        d_rows: Tensor | None,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        scale: float,
    ) -> None:
        """The two matmuls of a panel on the vocabulary entries that each block of rows keeps.

        Args:
            panel: (V, n).
            size: rows of a block; block b is rows ``b * size`` to ``(b + 1) * size``, the last may
                be shorter.
            keep: (blocks, V) bool, the entries that each block keeps.
            weight: (V, D), cast to the panel's dtype where it has another.
            scaled: (n, D), of the panel's dtype. coef: (n,).
            d_rows: (n, D) acc, overwritten with ``panel^T @ weight``, or None.
            d_weight: (V, D) acc, ``scale * panel @ scaled`` is added, or None.
            d_bias: (V,) acc, ``scale * panel @ coef`` is added, or None.
            scale: a factor that was divided out of `scaled` and `coef`.
        """

    def tail(
        self, logps: Tensor, offsets: Tensor, ref_logps: Tensor | None, objective: Objective
    ) -> tuple[Tensor, Tensor]:
        """From the tokens' log-probs to every pair's loss and every token's coefficient.

        Args:
            logps: (N,) log-probs in nats of the kept rows, sequence after sequence.
            offsets: (2B + 1,) int64, where each sequence starts; chosen sequences first.
            ref_logps: (2B,) summed reference log-probs, or None.
            objective: the loss, `normalized`.

        Returns:
            ``pairs (B, 6)``: preference loss and SFT term (which the caller sums and divides),
            log-probs of chosen and rejected, rewards of chosen and rejected; and ``coef (N,)``,
            d loss / d logps. A pair without any token is zero everywhere.
        """

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiply `tensor` (dense, any shape) by `factor` () in place: without a pass where it is
        1.
        """


def choose_backend(name: str, hidden: Tensor) -> Backend:
    """The backend for tensors like `hidden` (any shape).

    ``auto`` is Triton for half and single precision on a GPU where Triton is installed, and torch
    everywhere else. An explicit name runs or raises.

    Raises:
        RuntimeError: Triton was asked for and cannot run on these tensors; the message says why and
            what to do.
    """
    if name == "auto":
        has_triton = hidden.is_cuda and importlib.util.find_spec("triton") is not None
        name = "triton" if has_triton and hidden.dtype.itemsize <= 4 else "torch"
    if name == "torch":
        from rpo_kernels.backends import torch_backend

        return torch_backend
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "backend='triton' needs the package triton: pip install triton, or pass backend='torch'"
        )
    from rpo_kernels.backends import triton_backend

    triton_backend.supports(hidden)
    return triton_backend
