"""The ratios this project set itself, beside what the newest results say.

The limits are requirements, not results: nothing here reaches README.
"""

from __future__ import annotations

from benchmarks.records import median, number, ratio

EXACT, SKIP = "auto", "auto_skip"
CPU = {  # dtype -> (ours, peer, head, limit)
    "float32": (
        (EXACT, "materialized", "full", 0.60),
        (EXACT, "trl", "full", 0.37),
        (EXACT, "liger", "full", 0.46),
        (EXACT, "liger_reference", "full", 0.46),
        (EXACT, "torch_chunked", "full", 0.29),
        (SKIP, "materialized", "full", 0.45),
        (EXACT, "materialized", "frozen", 0.55),
        (SKIP, "materialized", "frozen", 0.45),
        (EXACT, "bare matmuls", "full", 1.15),
    ),
    "bfloat16": (
        (EXACT, "materialized", "full", 0.45),
        (EXACT, "trl", "full", 0.15),
        (EXACT, "liger", "full", 0.30),
        (EXACT, "liger_reference", "full", 0.30),
        (EXACT, "torch_chunked", "full", 0.08),
        (SKIP, "materialized", "full", 0.40),
        (EXACT, "materialized", "frozen", 0.45),
        (SKIP, "materialized", "frozen", 0.40),
    ),
}
MEMORY = 1 / 12  # recompute's peak beyond inputs and gradients, of materialized logits
SKIP_ERROR = 0.005  # of dH at a tolerance of 1e-3: against float64, and against tolerance 0
GPU = (  # ours, peer, limit at D = 4096, V = 128,256; peers by tokens below
    (EXACT, "materialized", 1.0),
    (EXACT, "trl", 1 / 1.3),
    (EXACT, "liger", 1 / 3),
    (EXACT, "cut_cross_entropy", 1 / 1.5),
    (SKIP, "bare matmuls", 0.7),
)
GPU_BARE = {4096: 1.25, 16384: 1.15, 65536: 1.10}


def _line(what: str, found: float | None, limit: float) -> bool:
    met = found is not None and found <= limit
    print(f"{'met   ' if met else 'MISSED'} {what}: {number(found)} (limit {number(limit)})")
    return met


def _against(run: dict, ours: str, peer: str) -> float | None:
    if peer != "bare matmuls":
        return ratio(median(run, ours), median(run, peer))
    bare = run["matmuls"].get("tiled") or run["matmuls"]["whole"]
    return ratio(median(run, ours), bare["seconds"])


def _cpu(document: dict) -> bool:
    ok = True
    for run in document["runs"]:
        spec, results = run["spec"], run["results"]
        if spec["inputs"] == "saturated":
            continue
        head = "frozen" if spec["frozen"] else "full"
        for ours, peer, wanted, limit in CPU.get(spec["dtype"], ()):
            if wanted == head:
                what = f"{spec['dtype']} {head} {ours} / {peer}"
                ok &= _line(what, _against(run, ours, peer), limit)
        if head == "full":
            errors = results.get(SKIP, {}).get("errors", {})
            ok &= _line(f"{spec['dtype']} error of dH, {SKIP}", errors.get("dh"), SKIP_ERROR)
            own = results.get(SKIP, {}).get("skipping_error")
            ok &= _line(f"{spec['dtype']} of it by skipping", own, SKIP_ERROR)
            beyond = [
                results.get(name, {}).get("memory", {}).get("beyond")
                for name in ("recompute", "materialized")
            ]
            ok &= _line(f"{spec['dtype']} memory, recompute / materialized", ratio(*beyond), MEMORY)
    return ok


def _gpu(document: dict) -> bool:
    ok = True
    for run in document["runs"]:
        if not run["spec"]["timed"] or run["width"] != 4096:
            continue
        head = "frozen" if run["spec"]["frozen"] else "full"
        where = f"{run['tokens']} tokens {head}"
        limits = [(EXACT, "bare matmuls", GPU_BARE[run["tokens"]])]
        limits += [row for row in GPU if head == "full" or row[0] == EXACT]
        for ours, peer, limit in limits:
            if peer == "bare matmuls" or median(run, peer) is not None:
                ok &= _line(f"{where} {ours} / {peer}", _against(run, ours, peer), limit)
    return ok


def compare(documents: dict[tuple[str, str], dict]) -> bool:
    """Print every required ratio; True if all that can be judged are met."""
    ok = True
    for (case, device), document in documents.items():
        if case in ("table", "gpu"):
            print(f"{case} on {device}, {document['file']}")
            ok &= (_cpu if case == "table" else _gpu)(document)
    return ok
