"""Random shapes, strides and alignments through the public functions, against float64.

    python -m emu.fuzz --sm 90 --seed 0 --seconds 160

Prints every case whose error is beyond what its dtype explains, and every fault.
"""

from __future__ import annotations

import argparse
import os
import random
import time

os.environ["TRITON_INTERPRET"] = "0"

import torch

from gpu_emulator.bytecode import BY_DESIGN, FAULTS
from gpu_emulator.harness import gpu

NOTES = {"note: " + text for name, text in FAULTS if name in BY_DESIGN} | {"empty launch"}
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257, 300]


def placed(draw, tensor):
    """The same values, perhaps with longer rows and perhaps off a 16-byte boundary."""
    rows, width = tensor.shape
    extra, shift = draw.choice([0, 0, 1, 8, 16]), draw.choice([0, 0, 1, 8])
    buffer = torch.full((rows * (width + extra) + shift,), float("nan"), dtype=tensor.dtype)
    view = buffer[shift:].as_strided((rows, width), (width + extra, 1), shift)
    view.copy_(tensor)
    return view, f"stride {width + extra} offset {shift}"


def one(draw, number):
    """Run one case; its label and the largest error over what is allowed."""
    from rpo_kernels import fused_rpo_loss, linear_logprobs, reference

    rows, vocab, width = draw.choice(SIZES), draw.choice(SIZES), draw.choice(SIZES[:18])
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16, torch.bfloat16])
    make = torch.Generator().manual_seed(number)
    hidden = torch.randn(rows, width, generator=make).to(dtype)
    weight = (2 * torch.randn(vocab, width, generator=make) / width**0.5).to(dtype)
    (hidden, where_h), (weight, where_w) = placed(draw, hidden), placed(draw, weight)
    bias = torch.randn(vocab, generator=make).to(dtype) if draw.random() < 0.5 else None
    options = {"logit_scale": draw.choice([1.0, 0.7]), "logit_softcap": draw.choice([None, 20.0])}
    targets = torch.randint(vocab, (rows,), generator=make)
    targets[
        torch.rand(rows, generator=make) < draw.choice([0.0, 0.3, 1.0 if rows < 9 else 0.1])
    ] = -100
    tolerance = draw.choice([0.0, 0.0, 1e-2])
    mb = draw.choice([1, 2, 8, 64])
    kind = draw.choice(["logprobs", "stream", "recompute"])
    label = (f"{number}: n={rows} V={vocab} D={width} {dtype} h {where_h} w {where_w} bias {bias is not None} "
             f"{options} tol {tolerance} {mb} MiB {kind}")  # fmt: skip
    if kind != "logprobs":
        rows = max(2, rows - rows % 2)
        hidden = torch.cat([hidden] * 2)[:rows]
        targets = torch.cat([targets] * 2)[:rows]
        cut = draw.randrange(rows // 2 + 1)
        edges = [0, cut, rows // 2, rows // 2 + draw.randrange(rows - rows // 2 + 1), rows]
        ends = torch.tensor(edges)
        refs = torch.randn(4, generator=make)

    def run(double):
        inputs = [
            None if x is None else (x.double() if double else x).detach()
            for x in (hidden, weight, bias)
        ]
        if not double:  # keep the strides
            inputs = [x if x is None else x.requires_grad_() for x in inputs]
        else:
            inputs = [x if x is None else x.clone().requires_grad_() for x in inputs]
        h, w, b = inputs
        if kind == "logprobs":
            more = (
                {}
                if double
                else {"backend": "triton", "grad_tolerance": tolerance, "max_workspace_mb": mb}
            )
            function = reference.linear_logprobs if double else linear_logprobs
            value = function(h, w, targets, bias=b, **options, **more)
            value.sum().backward()
        elif double:
            logps = reference.linear_logprobs(h, w, targets, bias=b, **options)
            sums = torch.stack([logps[i:j].sum() for i, j in zip(edges, edges[1:])])
            counts = torch.stack([(targets[i:j] != -100).sum() for i, j in zip(edges, edges[1:])])
            live = counts[:2] + counts[2:] > 0
            q = sums - refs.double()
            losses = -torch.nn.functional.logsigmoid(0.1 * (q[:2] - q[2:]))
            value = torch.where(live, losses, 0).sum() / 2 + 0.05 * -sums[:2].sum() / 2
            value.backward()
        else:
            value = fused_rpo_loss(
                h,
                w,
                targets,
                refs,
                bias=b,
                cu_seqlens=ends,
                eta=0.5,
                strategy=kind,
                grad_tolerance=tolerance,
                max_workspace_mb=mb,
                backend="triton",
                **options,
            ).loss
            value.backward()
        return [value.detach(), *(None if x is None else x.grad for x in inputs)]

    found, want = run(False), run(True)
    half = dtype != torch.float32
    worst = {}
    for name, a, b in zip(("value", "d_hidden", "d_weight", "d_bias"), found, want):
        if b is None:
            continue
        if not torch.isfinite(a).all():
            worst[name] = float("inf")
            continue
        allowed = 2e-6 if name == "value" else (3e-2 if half else 1e-5) + 8 * tolerance
        floor = 1e-6 if name == "value" else 1e-5
        worst[name] = (a.double() - b).norm().item() / (b.norm().item() * allowed + floor)
    return label, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sm", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=160)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    begin, number = time.perf_counter(), args.seed * 1000
    with gpu(args.sm, noise=2**-22) as driver:
        while time.perf_counter() - begin < args.seconds:
            draw = random.Random(number)
            before = {k: f.count for k, f in driver.faults.items()}
            try:
                label, worst = one(draw, number)
                bad = {k: round(v, 2) for k, v in worst.items() if v > 1}
            except Exception as problem:  # noqa: BLE001
                label, bad = f"{number}", f"{type(problem).__name__}: {str(problem)[:300]}"
            new = [
                f
                for k, f in driver.faults.items()
                if f.count > before.get(k, 0) and f.kind not in NOTES
            ]
            if bad or new:
                print(
                    f"CASE {label}\n    {bad}\n    " + "\n    ".join(str(f) for f in new),
                    flush=True,
                )
            number += 1
        print(
            f"{number - args.seed * 1000} cases, {len(driver.kernels)} kernels, {len(driver.launches)} launches"
        )
        for fault in driver.faults.values():
            print(str(fault)[:400])


if __name__ == "__main__":
    main()
