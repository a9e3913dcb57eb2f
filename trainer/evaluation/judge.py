"""Pairwise judging by any OpenAI-compatible endpoint, each pair of answers in both orders.

    prompts + answers ─→ one request per comparison and order ─→ cache.jsonl ─→ judgments.jsonl

The cache is the only state: every response is appended to it when it arrives, under a hash of its
request. So a killed run continues where it was, a second run sends nothing, and a request that
changes (another judge, another answer) is sent anew. Judgments are in FastChat's pairwise format,
for `winrate`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import openai
from tqdm import tqdm

from trainer.errors import InputError
from trainer.evaluation.answers import Answers, read_answers
from trainer.evaluation.options import Judge
from trainer.evaluation.prompts import Prompt, read_prompts
from trainer.evaluation.records import JsonlLog, replace_text, write_json
from trainer.paths import open_folder

INSTRUCTION = """\
You compare the answers of two assistants to the same prompt. Judge how correct, helpful, relevant \
and complete each one is. Where there are several turns, judge the last one. Neither the order in \
which the answers are shown nor their length may influence you. First explain your judgment in a \
few sentences. Then end with the verdict on a line of its own: [[A]] if assistant A is better, \
[[B]] if assistant B is better, [[C]] if both are equally good."""
VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True)
class Request:
    """One question to the judge: the first model's answer shown as A, the second's as B."""

    question: Hashable
    turn: int
    shown: tuple[str, str]
    body: dict[str, Any]
    key: str


class Report(TypedDict):
    """What `judge.json` holds."""

    judge: str
    base_url: str
    comparisons: int
    disagreements: int
    """Comparisons whose two orders have different winners."""
    malformed_verdicts: int
    tokens: dict[str, int]
    """Of all prompts and completions."""
    responses_without_usage: int
    retries: int
    cost_usd: float | None
    """None without prices."""
    requests: NotRequired[dict[str, int]]
    """How many were sent, and how many found in the cache."""


def judge(prompts: str, answers: Sequence[str], output_dir: str, by: Judge) -> Report:
    """Compare all pairs of models on all turns of all prompts.

    Args:
        prompts: the prompt file that was answered.
        answers: FastChat answer files of two or more models.
        output_dir: receives `cache.jsonl`, `judgments.jsonl` and `judge.json`.
        by: the judge.

    Returns:
        What `judge.json` holds: comparisons, malformed verdicts, requests, tokens, cost.

    Raises:
        InputError: unusable files, an answer missing, or an endpoint that keeps failing.
    """
    requests = plan_requests(read_prompts(prompts), read_answers(answers), by)
    folder = open_folder(output_dir)
    with JsonlLog(folder / "cache.jsonl") as log:
        cache = {row["key"]: row for row in log.rows}
        missing = {r.key: r for r in requests if r.key not in cache}
        cached = len({r.key for r in requests}) - len(missing)
        for row in ask_all(list(missing.values()), by):
            log.append([row])
            cache[row["key"]] = row
    rows = [judgment(a, b, cache, by) for a, b in zip(requests[::2], requests[1::2], strict=True)]
    replace_text(folder / "judgments.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    report = summarize(rows, [cache[key] for key in {r.key for r in requests}], by)
    report["requests"] = {"sent": len(missing), "cached": cached}
    write_json(folder / "judge.json", report)
    return report


def plan_requests(prompts: list[Prompt], answers: Answers, by: Judge) -> list[Request]:
    """Two requests, one per order, side by side, for every comparison."""
    if len(answers) < 2:
        raise InputError(f"answers: expected two models or more, got {', '.join(answers)}")
    requests = []
    for prompt in prompts:
        for name, of_model in answers.items():
            if len(of_model.get(prompt.question, [])) <= len(prompt.follow_ups):
                raise InputError(
                    f"answers: {name} has not answered every turn of question "
                    f"{prompt.question!r}; run `generate` to its end"
                )
        for a, b in combinations(sorted(answers), 2):
            for turn in range(1, len(prompt.follow_ups) + 2):
                for shown in ((a, b), (b, a)):
                    turns = [answers[name][prompt.question][:turn] for name in shown]
                    body = request_body(prompt, turns, by)
                    text = json.dumps([by.base_url, body], sort_keys=True)
                    key = hashlib.sha256(text.encode()).hexdigest()
                    requests.append(Request(prompt.question, turn, shown, body, key))
    return requests


def request_body(prompt: Prompt, turns: list[list[str]], by: Judge) -> dict[str, object]:
    """The request that shows the judge both models' answers up to one turn."""
    parts = [f"# Prompt\n\n{prompt.text()}"]
    for letter, answers in zip("AB", turns, strict=True):
        said = [answers[0]]
        for follow_up, answer in zip(prompt.follow_ups, answers[1:], strict=False):
            said += [f"User: {follow_up}", f"Assistant: {answer}"]
        parts.append(f"# Assistant {letter}\n\n" + "\n\n".join(said))
    messages = [{"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": "\n\n".join(parts)}]  # fmt: skip
    return {
        "model": by.model,
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": by.max_tokens,
    }


def ask_all(requests: list[Request], by: Judge):
    """Send requests, several at once, and yield each one's cache row when it is there."""
    client = openai.OpenAI(
        base_url=by.base_url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),  # a local server asks for none
        max_retries=by.max_retries,
        timeout=by.timeout,
    )
    with ThreadPoolExecutor(by.concurrency) as pool:
        waiting = [pool.submit(ask, client, request) for request in requests]
        try:
            for done in tqdm(as_completed(waiting), "judging", len(waiting), dynamic_ncols=True):
                yield done.result()
        except openai.OpenAIError as error:
            raise InputError(
                f"{by.base_url}: {type(error).__name__}: {error}; what was judged so far is kept: "
                "run the same command again to resume"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def ask(client: openai.OpenAI, request: Request) -> dict[str, object]:
    """One request, with the client's retries; the row that the cache keeps of it."""
    raw = client.chat.completions.with_raw_response.create(**request.body)
    response = raw.parse()
    usage = response.usage
    return {
        "key": request.key,
        "text": response.choices[0].message.content or "",
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
        "retries": raw.retries_taken,
    }


def verdict(text: str, shown: tuple[str, str], first: str) -> str:
    """The winner as FastChat names it, `error` unless the text holds exactly one verdict."""
    letters = set(VERDICT.findall(text))
    if len(letters) != 1:
        return "error"
    letter = letters.pop()
    if letter == "C":
        return "tie"
    return "model_1" if shown["AB".index(letter)] == first else "model_2"


def judgment(there: Request, back: Request, cache: dict[str, dict], by: Judge) -> dict[str, object]:
    """FastChat's pairwise row from the two orders of one comparison."""
    a, b = there.shown
    texts = [cache[request.key]["text"] for request in (there, back)]
    return {
        "question_id": there.question,
        "turn": there.turn,
        "model_1": a,
        "model_2": b,
        "g1_winner": verdict(texts[0], there.shown, a),
        "g2_winner": verdict(texts[1], back.shown, a),
        "judge": by.model,
        "g1_judgment": texts[0],
        "g2_judgment": texts[1],
    }


def summarize(rows: list[dict], responses: list[dict], by: Judge) -> Report:
    """Counts over all comparisons, and what all their responses cost, cached ones included."""
    winners = [(row["g1_winner"], row["g2_winner"]) for row in rows]
    tokens = {
        kind: sum(row[f"{kind}_tokens"] or 0 for row in responses)
        for kind in ("prompt", "completion")
    }
    cost = None
    if by.price is not None:
        cost = (tokens["prompt"] * by.price[0] + tokens["completion"] * by.price[1]) / 1e6
    return {
        "judge": by.model,
        "base_url": by.base_url,
        "comparisons": len(rows),
        "disagreements": sum(a != b and "error" not in (a, b) for a, b in winners),
        "malformed_verdicts": sum(w == "error" for pair in winners for w in pair),
        "tokens": tokens,
        "responses_without_usage": sum(row["prompt_tokens"] is None for row in responses),
        "retries": sum(row["retries"] for row in responses),
        "cost_usd": cost,
    }


def to_text(report: Report, output_dir: str) -> str:
    """What the command prints."""
    sent, tokens = report["requests"], report["tokens"]
    cost = "" if report["cost_usd"] is None else f", {report['cost_usd']:.4f} US dollars"
    file = Path(output_dir) / "judgments.jsonl"
    return (
        f"{report['comparisons']} comparisons; orders disagree: {report['disagreements']}; "
        f"malformed verdicts: {report['malformed_verdicts']}\n"
        f"requests: {sent['sent']} sent, {sent['cached']} cached, {report['retries']} retries; "
        f"tokens: {tokens['prompt']} prompt, {tokens['completion']} completion{cost}\n"
        f"now: python -m trainer.evaluate winrate {file} --output_dir {output_dir}"
    )
