"""Performance tables and plots, from the recorded JSON: `python -m benchmarks.report`.

Prints the tables and draws the plots into the results folder. `--write` also puts them between
`<!-- performance:begin -->` and `<!-- performance:end -->` of benchmarks/README.md, and a short one
into README.md, never from smoke results; `--check` fails where these do not say what the newest
files say; `--targets` compares their ratios with the required ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.cases import OURS
from benchmarks.end_to_end import BASE
from benchmarks.environment import ROOT
from benchmarks.records import load, median, number, ratio
from benchmarks.run import RESULTS
from benchmarks.targets import compare
from benchmarks.trl_integration import BASE as TRL_BASE

SHORT = ("auto", "recompute", "auto_skip")  # of our ways to run, in README.md
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(document: dict, how: str) -> str:
    """One line on where figures come from: device, versions, commit, file, and `how`."""
    device, versions = document["device"], document["versions"]
    own = document["runs"] if isinstance(document["runs"], list) else []
    states = [document | run for run in own] or [document]
    commits = {
        (state["commit"] or "unknown")[:10]
        + (" with uncommitted changes" if state["uncommitted_changes"] else "")
        for state in states
    }
    date = document["date"][:10]
    where = device["name"]
    where += f", driver {device['driver']}" if device.get("driver") else ""
    where += f", {document['threads']} threads" if device["kind"] == "cpu" else ""
    packages = {"trl": "TRL", "liger_kernel": "Liger", "cut-cross-entropy": "cut-cross-entropy"}
    peers = [f"{label} {versions[name]}" for name, label in packages.items() if versions.get(name)]
    return (
        f"Measured on {where}; torch {versions['torch']}, {', '.join(peers)}; commit "
        f"{', '.join(sorted(commits))}, {date}; {how}; `benchmarks/results/{document['file']}`."
    )


def rounds(document: dict) -> str:
    """How often a kernel was timed, in words."""
    found = [
        entry["seconds"]["rounds"]
        for run in document["runs"]
        for entry in run["results"].values()
        if "seconds" in entry
    ]
    return f"medians of ≥ {min(found, default=0)} interleaved rounds"


def _heads(runs: list[dict]) -> dict[str, dict]:
    """Runs of one dtype and shape by kind: full, frozen, saturated."""
    found = {}
    for run in runs:
        kind = "saturated" if run["spec"]["inputs"] == "saturated" else "full"
        found.setdefault("frozen" if run["spec"]["frozen"] else kind, run)
    return found


def _names(runs: list[dict]) -> dict[str, str]:
    return {name: entry["label"] for run in runs for name, entry in run["results"].items()}


def _spread(run: dict | None, name: str) -> str:
    seconds = (run or {"results": {}})["results"].get(name, {}).get("seconds")
    if not seconds:
        return "–"
    return f"{number(seconds['median'])} ({number(seconds['min'])}–{number(seconds['max'])})"


def missing(runs: list[dict]) -> list[str]:
    """What did not run, and why, once per reason."""
    lines: dict[str, list[str]] = {}
    for run in runs:
        for entry in run["results"].values():
            if "seconds" not in entry and run["spec"]["timed"]:
                reason = f"{entry['label']}: {entry['status']} ({entry.get('reason', '')})"
                shape = f"{run['tokens']:,} tokens, {run['spec']['dtype']}"
                lines.setdefault(reason, []).append(shape)
    shapes = {reason: sorted(set(where)) for reason, where in lines.items()}
    return [f"- {reason} at {'; '.join(where)}" for reason, where in shapes.items()]


def skipped(run: dict) -> str:
    """What skipping left out by its certificate, and what that changed."""
    found = [
        f"{entry['label']}: {number(entry['certificate'], 2)}, {number(entry['skipping_error'], 2)}"
        for entry in run["results"].values()
        if entry.get("skipping_error") is not None
    ]
    return (
        " Share of the gradient's L1 mass that skipping left out, as certified, and how far that "
        f"moved dH from the same strategy's at τ = 0: {'; '.join(found)}."
        if found
        else ""
    )


def table_section(document: dict) -> str:
    """Times, ratios, errors and peak memory of every implementation, a table per dtype."""
    parts = []
    for dtype in dict.fromkeys(run["spec"]["dtype"] for run in document["runs"]):
        runs = [run for run in document["runs"] if run["spec"]["dtype"] == dtype]
        heads = _heads(runs)
        full, frozen = heads["full"], heads.get("frozen", {"results": {}})
        head = [f"{dtype}, forward + backward", "s (min–max)", "of materialized", "frozen head, s"]
        head += [
            "of materialized, frozen",
            "saturated, s",
            "peak beyond, MB",
            "error dH",
            "error dW",
        ]
        rows = []
        for name, label in _names(runs).items():
            entry = full["results"].get(name, {})
            if median(full, name) is None and median(frozen, name) is None:
                continue
            errors, beyond = entry.get("errors") or {}, entry.get("memory", {}).get("beyond")
            rows.append([
                f"**{label}**" if entry.get("ours") else label,
                _spread(full, name),
                number(ratio(median(full, name), median(full, "materialized")), 2),
                number(median(frozen, name)),
                number(ratio(median(frozen, name), median(frozen, "materialized")), 2),
                number(median(heads["saturated"], name)) if "saturated" in heads else "–",
                number(None if beyond is None else beyond / 1e6),
                number(errors.get("dh"), 2),
                number(errors.get("dw"), 2),
            ])  # fmt: skip
        bare = full["matmuls"].get("tiled") or full["matmuls"]["whole"]
        whole = full["matmuls"]["whole"]["seconds"]
        over = number(ratio(median(full, "auto"), bare["seconds"]), 3)
        rate = 3 * full["flop_per_unit"] / bare["seconds"] / 1e9
        parts.append(
            f"{grid(head, rows)}\n\nThe three bare matmuls of these shapes take "
            f"{number(bare['seconds'])} s in cache-sized tiles ({number(rate)} GFLOP/s; "
            f"{number(whole)} s whole): `auto` takes {over} times that.{skipped(full)}"
        )
    run = document["runs"][0]
    intro = (
        f"{run['tokens']:,} response tokens of {run['rows']:,} positions, D = {run['width']}, "
        f"V = {run['vocab']:,}, {run['spec']['inputs']} hidden states. "
        f"{provenance(document, rounds(document))}"
    )
    return "\n\n".join([intro, *parts, *(["\n".join(missing(document["runs"]))])]).strip()


def gpu_section(document: dict) -> str:
    """Milliseconds and multiples of the bare matmuls, a table per head and shape."""
    timed = [run for run in document["runs"] if run["spec"]["timed"] and run.get("matmuls")]
    parts = []
    shapes = dict.fromkeys((r["width"], r["vocab"], r["spec"]["frozen"]) for r in timed)
    for width, vocab, frozen in shapes:
        runs = [
            r for r in timed
            if (r["width"], r["vocab"], r["spec"]["frozen"]) == (width, vocab, frozen)
        ]  # fmt: skip
        kind = "frozen head" if frozen else "full"
        head = [f"D = {width:,}, V = {vocab:,}, {kind}: ms (× bare matmuls), GiB beyond"]
        head += [f"{run['tokens']:,} tokens" for run in runs]
        bare = [run["matmuls"]["whole"]["seconds"] for run in runs]
        rows = [["bare matmuls", *(number(1e3 * seconds) for seconds in bare)]]
        for name, label in _names(runs).items():
            cells = []
            for run, seconds in zip(runs, bare, strict=True):
                entry = run["results"].get(name, {})
                if "seconds" not in entry:
                    cells.append(entry.get("status", "–"))
                    continue
                took, beyond = median(run, name), entry.get("memory", {}).get("beyond")
                gib = number(None if beyond is None else beyond / 2**30, 2)
                cells.append(f"{number(1e3 * took)} ({number(took / seconds)}), {gib}")
            ours = runs[0]["results"].get(name, {}).get("ours")
            rows.append([f"**{label}**" if ours else label, *cells])
        parts.append(grid(head, rows))
    notes = "\n".join(missing(document["runs"]))
    return "\n\n".join([provenance(document, rounds(document)), *parts, notes]).strip()


def scaling_section(document: dict) -> str:
    """Time per token and peak memory at both ends of the sweep, and the plots."""
    rows = []
    runs = [run for run in document["runs"] if run["spec"]["vocab"] is None]
    for dtype in dict.fromkeys(run["spec"]["dtype"] for run in runs):
        mine = [run for run in runs if run["spec"]["dtype"] == dtype]
        for name, label in _names(mine).items():
            ends = [run for run in mine if median(run, name) is not None]
            if not ends:
                continue
            cells = []
            for run in (ends[0], ends[-1]):
                beyond = run["results"][name].get("memory", {}).get("beyond")
                micro = 1e6 * median(run, name) / run["tokens"]
                peak = number(None if beyond is None else beyond / 1e6)
                cells += [f"{run['tokens']:,}", number(micro), peak]
            rows.append([f"{label}, {dtype}", *cells])
    head = ["", "tokens", "µs per token", "peak, MB", "up to tokens", "µs per token", "peak, MB"]
    image = f"![time and peak memory against tokens](results/{plot_name(document)})"
    return "\n\n".join([provenance(document, rounds(document)), grid(head, rows), image])


def end_to_end_section(document: dict) -> str:
    """Training steps against TRL's."""
    settings, rows = document["settings"], []
    for dtype, runs in document["runs"].items():
        for name, run in runs.items():
            label = f"{name}, {dtype}"
            if run["status"] != "ok":
                rows.append([label, run["status"], *["–"] * 4])
                continue
            base = runs[BASE]["pairs_per_second"]
            rows.append(
                [
                    f"**{label}**" if name.startswith("ours") else label,
                    number(run["median_s"]),
                    number(run["pairs_per_second"] / base),
                    number(run["peak_bytes"] / 1e9),
                    number(run.get("first_difference"), 2),
                    number(run.get("loss_difference"), 2),
                ]
            )
    head = ["trainer", "s / step", "pairs/s of TRL", "peak GB", "first loss against TRL"]
    head += ["all losses against TRL in float32"]
    how = (
        f"{settings['pairs']} pairs a step cut to {settings['max_length']} tokens, "
        f"{settings['steps'] - 1} timed steps of SmolLM2-135M, a process each"
    )
    intro = (
        "Whole training steps, DPO plus SFT, against TRL's `DPOTrainer`: same pairs, same losses "
        "(relative differences, the largest of all steps in the last column)."
    )
    return "\n\n".join([intro, grid(head, rows), provenance(document, how)])


def trl_section(document: dict) -> str:
    """Our head in TRL's trainers."""
    settings, rows = document["settings"], []
    for dtype, runs in document["runs"].items():
        for name, run in runs.items():
            label = f"{name}, {dtype}"
            if run["status"] != "ok":
                rows.append([label, run["status"], *["–"] * 4])
                continue
            base = runs[TRL_BASE]
            rows.append(
                [
                    label if name == TRL_BASE else f"**{label}**",
                    number(run["median_s"]),
                    number(run["median_s"] / base["median_s"]),
                    number(run["peak_bytes"] / 1e9),
                    number(run["peak_bytes"] / base["peak_bytes"]),
                    number(run["difference"], 2) + ("" if run["agrees"] else " (disagrees)"),
                ]
            )
    head = [
        "trainer",
        "s / step",
        "of TRL",
        "peak GB",
        "of TRL",
        "losses, gradient against TRL in float32",
    ]
    how = (
        f"{settings['pairs']} pairs a step cut to {settings['max_length']} tokens, "
        f"{settings['steps'] - 1} timed steps of SmolLM2-135M, a process each"
    )
    intro = "TRL's own trainer, the same on our head, and `RPOTrainer`: whole steps, same losses."
    return "\n\n".join([intro, grid(head, rows), provenance(document, how)])


def tolerance_section(document: dict) -> str:
    """Exact and with a tolerance, every way to run."""
    rows = []
    for run in document["runs"]:
        spec = run["spec"]
        kind = "frozen head" if spec["frozen"] else spec["inputs"]
        what = f"{spec['dtype']}, {kind}, N = {run['tokens']:,}, V = {run['vocab']:,}"
        found = []
        for name in OURS:
            entry = run["results"].get(f"{name}_skip", {})
            exact, time = median(run, name), median(run, f"{name}_skip")
            left_out = f"{number(entry.get('certificate'), 2)} left out"
            found.append(
                f"{number(exact)} → {number(time)} s ({number(ratio(time, exact))}), {left_out}"
            )
        rows.append([what, *found])
    intro = (
        "What a tolerance of 1e-3 takes of the exact call; where it would not pay, the call is "
        "exact and leaves nothing out."
    )
    head = ["forward + backward, exact → τ = 1e-3", *(f"`{name}`" for name in OURS)]
    return "\n\n".join([intro, grid(head, rows), provenance(document, rounds(document))])


def plot_name(document: dict) -> str:
    return f"{document['case']}-{document['device']['kind']}.png"


def section(documents: dict[tuple[str, str], dict]) -> str:
    """The whole text between the markers."""
    parts = []
    writers = {"table": table_section, "gpu": gpu_section, "scaling": scaling_section}
    writers |= {"tolerance": tolerance_section}
    writers |= {"end_to_end": end_to_end_section, "trl_integration": trl_section}
    for (case, _), document in documents.items():
        if document["runs"]:
            parts.append(writers[case](document))
    return "\n\n".join(parts) or "No results are recorded yet."


def headline(documents: dict[tuple[str, str], dict]) -> str:
    """README.md's table: time and memory of every implementation as ratios, and whole steps."""
    parts = []
    for (case, _), document in documents.items():
        if case == "gpu" and document["runs"]:
            parts.append(_short_gpu(document))
        if case == "table" and document["runs"]:
            parts.append(_short_table(document))
        on_cpu = document["device"]["kind"] == "cpu"
        if case in ("end_to_end", "trl_integration") and document["runs"] and on_cpu:
            parts.append(_short_steps(document))
    return "\n\n".join(parts) or "No results are recorded yet."


def _short_gpu(document: dict) -> str:
    """Multiples of the bare matmuls, head trained: rows implementations, columns problems."""
    runs = [
        run for run in document["runs"]
        if run["spec"]["timed"] and not run["spec"]["frozen"] and run.get("matmuls")
    ]  # fmt: skip
    runs.sort(key=lambda run: (-run["width"], run["tokens"]))
    rows = []
    for name, label in _names(runs).items():
        ours = any(run["results"].get(name, {}).get("ours") for run in runs)
        found = [median(run, name) for run in runs]
        if (ours and name not in SHORT) or not any(found):
            continue
        cells = [
            number(ratio(time, run["matmuls"]["whole"]["seconds"])) if time
            else run["results"].get(name, {}).get("status", "–")
            for run, time in zip(runs, found, strict=True)
        ]  # fmt: skip
        beyond = runs[-1]["results"].get(name, {}).get("memory", {}).get("beyond")
        memory = number(None if beyond is None else beyond / 2**30, 2)
        rows.append([f"**{label}**" if ours else label, *cells, memory])
    bare = ["bare matmuls, ms"]
    bare += [number(1e3 * run["matmuls"]["whole"]["seconds"]) for run in runs] + ["–"]
    head = ["forward + backward, × the three bare matmuls"]
    head += [f"D = {run['width']:,}, {run['tokens']:,} tokens" for run in runs]
    vocab = {run["width"]: run["vocab"] for run in runs}
    sizes = ", ".join(f"{v:,} at D = {width:,}" for width, v in vocab.items())
    about = (
        f"{document['device']['name']}, {runs[0]['spec']['dtype']}, V = {sizes}; torch "
        f"{document['versions']['torch']}, {document['date'][:10]}; memory beyond inputs and "
        f"gradients, last column; `benchmarks/results/{document['file']}`."
    )
    return f"{grid([*head, 'GiB'], [bare, *rows])}\n\n{about}"


def _short_table(document: dict) -> str:
    """Times and peaks of materialized logits: rows implementations, columns dtypes."""
    dtypes = list(dict.fromkeys(run["spec"]["dtype"] for run in document["runs"]))
    full = [
        _heads([run for run in document["runs"] if run["spec"]["dtype"] == dtype])["full"]
        for dtype in dtypes
    ]
    rows = []
    for name, label in _names(full).items():
        if name not in ("auto", "recompute") and full[0]["results"].get(name, {}).get("ours"):
            continue  # the others are in the whole table
        cells = []
        for run in full:
            entry = run["results"].get(name, {})
            base = run["results"]["materialized"].get("memory", {}).get("beyond")
            peak = ratio(entry.get("memory", {}).get("beyond"), base)
            time = ratio(median(run, name), median(run, "materialized"))
            cells += [number(time, 2), number(peak, 2)]
        if any(cell != "–" for cell in cells):
            ours = full[0]["results"].get(name, {}).get("ours")
            rows.append([f"**{label}**" if ours else label, *cells])
    head = ["forward + backward, of materialized logits"]
    head += [f"{dtype}, {what}" for dtype in dtypes for what in ("time", "memory")]
    run = document["runs"][0]
    about = (
        f"{run['tokens']:,} response tokens, D = {run['width']}, V = {run['vocab']:,}, "
        f"{document['device']['name']}, {document['threads']} threads, {document['date'][:10]}; "
        f"memory beyond inputs and gradients; `benchmarks/results/{document['file']}`."
    )
    return f"{grid(head, rows)}\n\n{about}"


def _seconds(run: dict) -> float:
    """Of a pair where a run says so, as trainers may differ in pairs a step; else of a step."""
    return 1 / run["pairs_per_second"] if "pairs_per_second" in run else run["median_s"]


def _short_steps(document: dict) -> str:
    """A sentence on whole training steps."""
    base, best = (
        (BASE, "ours, prefix sharing")
        if document["case"] == "end_to_end"
        else (TRL_BASE, "RPOTrainer")
    )
    found = []
    for dtype, runs in document["runs"].items():
        if all(runs.get(name, {}).get("status") == "ok" for name in (base, best)):
            time = _seconds(runs[best]) / _seconds(runs[base])
            peak = ratio(runs[best]["peak_bytes"], runs[base]["peak_bytes"])
            found.append(
                f"{number(time, 2)} of the time and {number(peak, 2)} of the memory, {dtype}"
            )
    what = "Our trainer" if document["case"] == "end_to_end" else "`RPOTrainer` in TRL"
    return (
        f"{what} takes, of TRL's `DPOTrainer` on the same pairs, {'; '.join(found)} "
        f"(`benchmarks/results/{document['file']}`)."
    )


def spliced(readme: str, text: str) -> str | None:
    """README with the section replaced, None if a marker is missing."""
    if BEGIN not in readme or END not in readme:
        return None
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="folder of README.md and benchmarks/README.md"
    )
    parser.add_argument("--write", action="store_true", help="write the tables into both READMEs")
    parser.add_argument("--check", action="store_true", help="fail if one is out of date")
    parser.add_argument(
        "--targets", action="store_true", help="print the required ratios, met or not"
    )
    parser.add_argument("--smoke", action="store_true", help="use smoke results")
    a = parser.parse_args(arguments)
    if a.smoke and a.write:
        parser.error("--write: smoke results are no figures for README")
    documents = load(a.results, a.smoke)
    if a.targets:
        return 0 if compare(documents) else 1
    texts = {
        a.root / "benchmarks" / "README.md": section(documents),
        a.root / "README.md": headline(documents),
    }
    old = {path: path.read_text() if path.exists() else "" for path in texts}
    new = {path: spliced(old[path], text) for path, text in texts.items()}
    if a.check:
        stale = [str(path) for path in texts if new[path] is None or new[path] != old[path]]
        print(
            f"out of date: {', '.join(stale)}; run benchmarks.report --write" if stale else "fresh"
        )
        return 1 if stale else 0
    from benchmarks.plots import draw

    for (case, _), document in documents.items():
        if case == "scaling":
            draw(document, a.results / plot_name(document))
    if not a.write:
        print("\n\n".join(texts.values()))
        return 0
    for path, text in new.items():
        if text is None:
            print(f"{path} lacks the markers {BEGIN} and {END}: nothing written")
            return 1
    for path, text in new.items():
        path.write_text(str(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
