"""The problems that are timed: what they are made of, and the list of them for each case.

table      SmolLM2's head, real hidden states: two pairs x 1,024 positions, 3,072 response tokens
scaling    the same head from 1k to 64k tokens, and slices of its vocabulary
tolerance  the table's problems and Gemma 3 270M's head, exact and with a tolerance
gpu        synthetic states calibrated to real ones, N x (D, V) of two large models
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.inputs import Problem, calibrated_problem, real_problem

GPU_HEADS = ((4096, 128256), (2048, 151936))
GPU_LAYOUTS = ((2, 1024), (2, 4096), (8, 4096))  # pairs, positions: 4k, 16k, 64k tokens
SCALING_LAYOUTS = ((1, 512), (2, 1024), (8, 1024), (32, 1024))  # pairs, positions: 1k to 64k tokens
SCALING_VOCABS = (6144, 12288, 24576)
LARGE_HEAD = (640, 262144)  # Gemma 3 270M
OURS = ("auto", "stream", "recompute")


@dataclass(frozen=True)
class Spec:
    """One problem and how it is treated."""

    inputs: str = "real"
    """"real", "saturated" (real, with far tails and margins of hundreds) or "calibrated"."""
    pairs: int = 2
    length: int = 1024
    response: float = 0.75
    """Share of positions that are response tokens."""
    width: int | None = None
    """Hidden size of calibrated inputs; real ones have SmolLM2's."""
    vocab: int | None = None
    """Vocabulary of calibrated inputs, or the slice kept of the real one."""
    dtype: str = "float32"
    device: str = "cpu"
    frozen: bool = False
    """Whether the head has no gradient."""
    sample: int | None = None
    """Rows of dH and dW that are compared with float64; None compares all."""
    checked: bool = True
    """False where a smaller problem of the same sweep was checked and float64 would take minutes.
    """
    timed: bool = True

    def data(self) -> Spec:
        """The part that decides the tensors."""
        return replace(self, frozen=False, sample=None, checked=True, timed=True)

    def record(self) -> dict:
        """As JSON."""
        return asdict(self)


def build(spec: Spec) -> Problem:
    """The tensors of a problem, on its device and in its dtype."""
    if spec.inputs == "calibrated":
        problem = calibrated_problem(
            spec.pairs, spec.length, spec.width, spec.vocab, spec.response, spec.device
        )
    else:
        saturated = spec.inputs == "saturated"
        problem = real_problem(spec.pairs, spec.length, spec.response, saturated, spec.vocab)
        problem = Problem(*(tensor.to(spec.device) for tensor in problem))
    return problem.to(getattr(torch, spec.dtype))


def _tiny(specs: list[Spec]) -> list[Spec]:
    """The same problems at toy size, for trying the code out."""
    tiny = {"inputs": "calibrated", "length": 32, "pairs": 2, "width": 64, "vocab": 512}
    return [replace(s, **tiny, device="cpu", sample=s.sample and 64) for s in specs]


def table(dtypes: list[str], device: str) -> list[Spec]:
    """Full, frozen and saturated, in every dtype."""
    base = Spec(device=device)
    kinds = ({}, {"frozen": True}, {"inputs": "saturated"})
    return [replace(base, dtype=dtype, **kind) for dtype in dtypes for kind in kinds]


def scaling(dtypes: list[str], device: str) -> list[Spec]:
    """Tokens at the whole vocabulary, then vocabularies at 3,072 tokens; all rows are response
    rows.
    """
    specs = []
    for dtype in dtypes:
        base = Spec(device=device, dtype=dtype, response=1.0)
        for pairs, length in SCALING_LAYOUTS:
            small = 2 * pairs * length <= 4096
            specs.append(replace(base, pairs=pairs, length=length, checked=small))
        specs += [replace(base, vocab=vocab) for vocab in SCALING_VOCABS]
    return specs


def tolerance(dtypes: list[str], device: str) -> list[Spec]:
    """What is kept decides whether a tolerance pays: a small vocabulary, far tails, a large one."""
    width, vocab = LARGE_HEAD
    large = Spec("calibrated", pairs=1, length=512, response=1.0, width=width, vocab=vocab)
    return table(dtypes, device) + [replace(large, device=device, dtype=dtype) for dtype in dtypes]


def gpu(dtypes: list[str], device: str) -> list[Spec]:
    """Correctness of the largest head in two dtypes; then every shape, small ones first, full and
    frozen.
    """
    width, vocab = GPU_HEADS[0]
    base = Spec("calibrated", device=device, response=1.0, dtype=dtypes[0], sample=256)
    first = replace(base, width=width, vocab=vocab, length=256, sample=1024, timed=False)
    specs = [replace(first, dtype=dtype) for dtype in ("float32", *dtypes)]
    for pairs, length in GPU_LAYOUTS:
        for width, vocab in GPU_HEADS:
            spec = replace(base, pairs=pairs, length=length, width=width, vocab=vocab)
            specs += [spec, replace(spec, frozen=True)]
    return specs


CASES = {"table": table, "scaling": scaling, "tolerance": tolerance, "gpu": gpu}


def specs_of(case: str, dtypes: list[str], device: str, smoke: bool) -> list[Spec]:
    found = CASES[case](dtypes, device)
    return list(dict.fromkeys(_tiny(found))) if smoke else found


def names_of(case: str, spec: Spec, names: list[str]) -> list[str]:
    """Implementations that a problem is run with: all, where the head is trained on real margins;
    the table's variants and the sweeps leave some out.
    """
    if case == "tolerance":
        return [name for name in names if name.startswith(OURS)]
    if case == "table" and (spec.frozen or spec.inputs == "saturated"):
        return [n for n in names if n.startswith((*OURS, "materialized")) and "upcast" not in n]
    if case != "scaling":
        return names
    left_out = {"liger_reference", "materialized_upcast", "auto_skip", "recompute_skip"}
    if spec.vocab is not None:
        return [name for name in names if name in OURS or name == "materialized"]
    return [name for name in names if name not in left_out]
