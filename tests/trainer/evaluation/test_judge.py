"""Judging: both orders, cache, resuming, retries, malformed verdicts; a fake and a real server."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.trainer.tiny import save_tiny, write_jsonl
from trainer.errors import InputError
from trainer.evaluate import main
from trainer.paths import ROOT

pytest.importorskip("openai", reason="pip install 'rpo-kernels[eval]'")

from trainer.evaluation.judge import Judge, judge
from trainer.evaluation.winrate import winrate


class Endpoint(ThreadingHTTPServer):
    """Judges by a rule; fails the first `failures` requests, and answers after `delay` seconds."""

    def __init__(self, failures=0, status=503, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.status, self.delay = failures, status, delay
        self.bodies = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        time.sleep(self.server.delay)
        status = 200
        if self.server.failures > 0:
            self.server.failures -= 1
            status = self.server.status
        text = rule(body["messages"][-1]["content"])
        message = {"role": "assistant", "content": text}
        content = json.dumps({
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }).encode()  # fmt: skip
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def rule(shown):
    """The better answer wins; what the prompt asks for may be a bias or no verdict at all."""
    if "biased" in shown:
        return "The first one. [[A]]"
    if "unreadable" in shown:
        return "[[A]] or rather [[B]]"
    a, b = shown.split("# Assistant A")[1].split("# Assistant B")
    letter = "C" if ("good" in a) == ("good" in b) else "A" if "good" in a else "B"
    return f"Compared. [[{letter}]]"


def write_inputs(folder, prompts, answers):
    """Prompt file and one answer file per model: `answers[model][k]` to the k-th prompt."""
    questions = [{"question_id": k, "turns": [prompt]} for k, prompt in enumerate(prompts)]
    files = []
    for model, texts in answers.items():
        rows = [{"question_id": k, "model_id": model, "choices": [{"turns": [text]}]}
                for k, text in enumerate(texts)]  # fmt: skip
        files.append(write_jsonl(folder / f"{model}.jsonl", rows))
    return {"prompts": write_jsonl(folder / "prompts.jsonl", questions), "answers": files}


PROMPTS = ["plain", "plain too", "biased", "unreadable"]
ANSWERS = {"old": ["bad", "good", "bad", "bad"], "new": ["good", "good.", "good", "good"]}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "judgments.jsonl").open()]


def test_both_orders_cache_and_counts(tmp_path):
    endpoint, out = Endpoint(), tmp_path / "out"
    by = Judge("fake", endpoint.url, price=(2.0, 8.0))
    inputs = write_inputs(tmp_path, PROMPTS, ANSWERS)
    report = judge(**inputs, output_dir=str(out), by=by)

    assert len(endpoint.bodies) == 2 * len(PROMPTS)
    shown = [body["messages"][-1]["content"] for body in endpoint.bodies]
    plain = [text for text in shown if text.startswith("# Prompt\n\nplain\n")]
    assert sorted(plain) == [
        f"# Prompt\n\nplain\n\n# Assistant A\n\n{a}\n\n# Assistant B\n\n{b}"
        for a, b in (("bad", "good"), ("good", "bad"))
    ]
    winners = [(row["g1_winner"], row["g2_winner"]) for row in rows_of(out)]
    assert winners == [
        ("model_1", "model_1"),
        ("tie", "tie"),
        ("model_1", "model_2"),
        ("error",) * 2,
    ]
    assert (rows_of(out)[0]["model_1"], rows_of(out)[0]["model_2"]) == ("new", "old")
    assert (report["comparisons"], report["disagreements"], report["malformed_verdicts"]) == (
        4,
        1,
        2,
    )
    assert report["tokens"] == {"prompt": 800, "completion": 80}
    assert report["cost_usd"] == pytest.approx((800 * 2 + 80 * 8) / 1e6)

    rates = winrate([str(out / "judgments.jsonl")], str(out), [], {}, 100, 0)
    assert rates["matrix"]["new"]["old"] == pytest.approx(100 * 2 / 3)
    assert rates["malformed"] == 1

    before = rows_of(out)
    again = judge(**inputs, output_dir=str(out), by=by)
    assert again["requests"] == {"sent": 0, "cached": 8} and len(endpoint.bodies) == 8
    assert rows_of(out) == before

    changed = ANSWERS | {"new": ["good", "good.", "good", "better"]}
    third = judge(**write_inputs(tmp_path, PROMPTS, changed), output_dir=str(out), by=by)
    assert third["requests"] == {"sent": 2, "cached": 6}  # an answer that changed is judged anew


def test_failures_are_retried_then_reported(tmp_path):
    inputs = write_inputs(tmp_path, PROMPTS[:1], ANSWERS)
    endpoint = Endpoint(failures=1, status=429)
    report = judge(**inputs, output_dir=str(tmp_path / "a"), by=Judge("fake", endpoint.url))
    assert report["retries"] == 1 and len(endpoint.bodies) == 3
    endpoint = Endpoint(failures=1, status=401)  # not worth a second attempt
    by = Judge("fake", endpoint.url, concurrency=1)
    with pytest.raises(InputError, match="AuthenticationError.*run the same command again"):
        judge(**inputs, output_dir=str(tmp_path / "b"), by=by)
    assert judge(**inputs, output_dir=str(tmp_path / "b"), by=by)["comparisons"] == 1


def test_second_turn_is_judged_with_the_first(tmp_path):
    endpoint = Endpoint()
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"question_id": 7, "turns": ["one", "two"]}])
    answers = write_jsonl(
        tmp_path / "a.jsonl",
        [{"question_id": 7, "model_id": m, "choices": [{"turns": [f"{m}1", f"{m}2 good"]}]}
         for m in "xy"],
    )  # fmt: skip
    judge(prompts, [answers], str(tmp_path / "out"), Judge("fake", endpoint.url))
    assert [row["turn"] for row in rows_of(tmp_path / "out")] == [1, 2]
    shown = [body["messages"][-1]["content"] for body in endpoint.bodies]
    assert sum("x1\n\nUser: two\n\nAssistant: x2 good" in text for text in shown) == 2
    short = write_jsonl(tmp_path / "b.jsonl", [{"question_id": 7, "model_id": "z",
                                                "choices": [{"turns": ["z1"]}]}])  # fmt: skip
    with pytest.raises(InputError, match="z has not answered every turn of question 7"):
        judge(prompts, [answers, short], str(tmp_path / "out"), Judge("fake", endpoint.url))


def command(inputs, out, url, model):
    return ["judge", "--prompts", inputs["prompts"], "--answers", *inputs["answers"],
            "--output_dir", str(out), "--base_url", url, "--model", model,
            "--max_tokens", "8", "--concurrency", "1"]  # fmt: skip


def run_and_kill(words, cache, lines):
    """Run the command as a process, and kill it once the cache holds `lines` responses."""
    process = subprocess.Popen([sys.executable, "-m", "trainer.evaluate", *words], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not cache.exists() or cache.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return cache.read_bytes().count(b"\n")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(tmp_path):
    """`transformers serve` with a tiny random model, found by its path."""
    pytest.importorskip("fastapi", reason="pip install 'transformers[serving]'")
    pytest.importorskip("uvicorn", reason="pip install 'transformers[serving]'")
    model, port = save_tiny(tmp_path / "model"), free_port()
    log = (tmp_path / "server.log").open("w")
    words = ["-m", "transformers.cli.transformers", "serve", model, "--port", str(port),
             "--host", "127.0.0.1", "--device", "cpu"]  # fmt: skip
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, env=offline)
    deadline = time.monotonic() + 150
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            break
        except OSError:
            said = (tmp_path / "server.log").read_text()
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/v1", model
    process.terminate()
    process.wait(30)


def test_real_server_killed_and_resumed(server, tmp_path, capsys):
    """A random model gives no verdict: all are malformed, counted, and cached like any other."""
    url, model = server
    count = 6
    texts = {"old": [f"bad {k}" for k in range(count)], "new": [f"good {k}" for k in range(count)]}
    inputs, out = write_inputs(tmp_path, [f"say {k}" for k in range(count)], texts), tmp_path / "o"
    words = command(inputs, out, url, model)
    kept = run_and_kill(words, out / "cache.jsonl", 2)
    assert 2 <= kept < 2 * count and not (out / "judgments.jsonl").exists()
    with (out / "cache.jsonl").open("a") as file:
        file.write('{"key": "torn')  # as a kill in the middle of a write leaves it

    main(words)
    report = json.loads((out / "judge.json").read_text())
    assert report["requests"] == {"sent": 2 * count - kept, "cached": kept}
    assert (report["comparisons"], report["malformed_verdicts"]) == (count, 2 * count)
    assert report["tokens"]["completion"] > 0 and report["responses_without_usage"] == 0
    main(words)
    shown = capsys.readouterr().out
    assert f"malformed verdicts: {2 * count}" in shown and f"0 sent, {2 * count} cached" in shown
    with pytest.raises(SystemExit, match="no two models were judged"):
        main(["winrate", str(out / "judgments.jsonl"), "--output_dir", str(out)])
