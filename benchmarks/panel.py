"""Every way to fill a panel on a GPU, beside the bare matmuls: `python -m benchmarks.panel`.

A panel of 8,192 rows, what 4 GiB of workspace hold, for two large models' heads in bf16: the two
matmul kernels of the backend, by Triton, by Gluon on Hopper, and with the vendor's matmul, in
interleaved rounds. Medians as multiples of one bare matmul (the mean of the three), to one JSON
file in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path

import torch

from benchmarks.environment import describe
from benchmarks.run import RESULTS, SCHEMA, result_path, save

SHAPES = ((8192, 2048, 151936), (8192, 4096, 128256))
DTYPE = torch.bfloat16


def measure(rows: int, width: int, vocab: int, rounds: int) -> dict:
    """Seconds of one bare matmul, and everything as multiples of it."""
    from rpo_kernels import tuning
    from rpo_kernels.backends import triton_backend
    from rpo_kernels.doctor import candidates, timing
    from rpo_kernels.doctor.examine import raise_, under

    device = torch.device("cuda", torch.cuda.current_device())
    case = candidates.random_case(rows, width, vocab, DTYPE, device)
    own = tuning.default_kernels(device, DTYPE)
    ways = {
        "triton": own._replace(hopper="triton", exp_path="fused"),
        "vendor": own._replace(hopper="triton", exp_path="panel"),
    }
    if torch.cuda.get_device_capability(device) == (9, 0):
        ways["gluon"] = own._replace(hopper="gluon")

    bare = timing.matmuls(rows, width, vocab, DTYPE, "cuda")
    calls = {
        f"{part} {name}": under(
            choice, functools.partial(candidates.run, part, triton_backend, case)
        )
        for part in candidates.PARTS
        for name, choice in ways.items()
        if (part, name) != ("lse_and_target", "vendor")  # the same kernel as "triton"
    }
    for call in (bare | calls).values():
        call()  # compiles
    found = timing.interleave(bare | calls, rounds, "cuda", raise_)
    middle = {name: statistics.median(times) for name, times in found.items()}
    unit = statistics.fmean(middle[name] for name in bare)
    multiples = {name: seconds / unit for name, seconds in middle.items()}
    return {"rows": rows, "width": width, "vocab": vocab, "unit_s": unit, "multiples": multiples}


def main(arguments: list[str] | None = None) -> Path:
    """Measure, print, and write the file; needs a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    a = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a GPU, found none")
    document = {"schema": SCHEMA, "case": "panel", "smoke": False, **describe("cuda"), "runs": []}
    path = result_path(a.output_dir, "panel", "cuda", False)
    for shape in SHAPES:
        document["runs"].append(measure(*shape, a.rounds))
        torch.cuda.empty_cache()
        save(document, path)
        print(shape, {k: round(v, 3) for k, v in document["runs"][-1]["multiples"].items()})
    print(path)
    return path


if __name__ == "__main__":
    main()
