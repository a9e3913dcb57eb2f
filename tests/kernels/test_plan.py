"""`python -m rpo_kernels.plan`: its memory against the engines', its times from a results file."""

import json
import sys
import weakref

import pytest
import torch

from rpo_kernels import plan
from rpo_kernels.backends import torch_backend
from rpo_kernels.engines import streaming
from rpo_kernels.rows import keep_rows
from rpo_kernels.spec import Head, Settings, Transform

WIDTH, VOCAB = 64, 4096


def shape(**changes) -> plan.Shape:
    base = plan.Shape(2, 200, 150, WIDTH, VOCAB, 4, False, 2**21)
    return base._replace(**changes)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the storages alive at once that were made under it."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, list | tuple) else [found]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self.alive:
                    key = storage.data_ptr()
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return found


def results(path, seconds, **changes):
    """A results file with one problem: 1 pair, 100 of 128 positions counted."""
    spec = {"dtype": "float32", "frozen": False, "timed": True, "pairs": 1, "length": 128}
    run = {"spec": spec | changes, "tokens": 200, "width": WIDTH, "vocab": VOCAB}
    run["flop_per_unit"] = 2.0 * 200 * WIDTH * VOCAB
    run["results"] = {name: {"seconds": {"median": value}} for name, value in seconds.items()}
    path.write_text(json.dumps({"device": {"name": "a machine"}, "runs": [run]}))
    return path


def test_work_and_memory_of_a_case_by_hand():
    """600 response rows of 800; rows of 16 KiB: a panel of 2 MiB holds a part of a pair."""
    stream, recompute, eager, *_ = plan.costs(shape())
    assert (stream.units, recompute.units, eager.units) == (3, 4, 4)
    assert eager.extra == 800 * VOCAB * 12
    assert recompute.extra == 2**21
    assert stream.extra < 2**21 + 8 * WIDTH * VOCAB  # the workspace and two accumulators
    assert plan.streaming(shape(frozen=True)).extra < 2**21
    half = plan.recompute(shape(itemsize=2))
    assert half.extra == 2**21 + 600 * WIDTH * 4


@pytest.mark.parametrize("megabytes", [4, 16, 64])
def test_streaming_estimate_bounds_what_the_engine_allocates(megabytes):
    """The plan and the engine agree within the cache tiles, which the plan leaves out."""
    pairs, length = 4, 150
    hidden = torch.randn(2 * pairs, length, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    labels = torch.randint(VOCAB, (2 * pairs, length))
    estimate = plan.streaming(
        shape(pairs=pairs, length=length, response=length, max_bytes=megabytes * 2**20)
    )
    with Peak() as peak:
        offsets = torch.arange(0, 2 * pairs * length + 1, length, dtype=torch.int32)
        rows, starts = keep_rows(labels.flatten(), VOCAB, -100, True, offsets)
        settings = Settings(
            -100, 1.0, None, torch.float32, True, 0.0, megabytes * 2**20, "stream", "torch",
            [True, True, False],
        )  # fmt: skip
        head = Head(weight.detach(), None, Transform(), torch.float32)
        streaming.loss_and_grads(
            hidden.detach().flatten(0, 1), rows, starts, head, torch_backend,
            lambda first, last, logps: (logps.new_zeros(last - first, 6), torch.ones_like(logps)),
            settings,
        )  # fmt: skip
    gradients = 4 * (hidden.numel() + weight.numel())
    assert peak.peak - gradients <= 1.35 * estimate.extra + megabytes * 2**20 / 4
    assert peak.peak - gradients >= 0.5 * estimate.extra


def test_times_scale_with_the_work(tmp_path):
    file = results(tmp_path / "r.json", {"stream": 2.0, "materialized": 3.0})
    same = plan.Shape(1, 128, 100, WIDTH, VOCAB, 4, False, 2**21)
    assert plan.estimates(file, same, "float32")[0] == {"stream": 2.0, "materialized": 3.0}
    found, device = plan.estimates(file, same._replace(pairs=3, vocab=2 * VOCAB), "float32")
    assert found == pytest.approx({"stream": 12.0, "materialized": 18.0}) and device == "a machine"
    prompts = plan.estimates(file, same._replace(response=50), "float32")[0]
    assert prompts == pytest.approx({"stream": 1.0, "materialized": 3.0})  # it computes every row


def test_no_time_from_another_kind_of_problem(tmp_path):
    file = results(tmp_path / "r.json", {"stream": 2.0})
    with pytest.raises(SystemExit, match="no bfloat16 problem with a trained head"):
        plan.estimates(file, shape(itemsize=2), "bfloat16")
    with pytest.raises(SystemExit, match="frozen"):
        plan.estimates(file, shape(frozen=True), "float32")


def test_what_does_not_fit_is_said():
    """Not a row of a vocabulary of 4,096 in 8 KiB; a split pair's hidden states in half."""
    assert plan.streaming(shape(max_bytes=2**13)).extra == float("inf")
    assert "inf" in plan.report(shape(max_bytes=2**13), 1.0, {}, "")
    half = shape(itemsize=2, frozen=True)
    assert plan.streaming(half).extra >= 2 * half.response * WIDTH * 4


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ('{"n_embd": 8, "vocab_size": 9}', (8, 9)),
        ('{"d_model": 8, "vocab_size": 9, "text_config": null}', (8, 9)),
        ('{"text_config": {"hidden_size": 8, "vocab_size": 9}}', (8, 9)),
        ('{"text_config": {"hidden_size": 8}, "vocab_size": 9}', (8, 9)),
        ('\ufeff{"d_model": 8, "vocab_size": 9}', (8, 9)),
        ('{"vocab_size": 9}', "expected vocab_size and one of hidden_size"),
        ('{"hidden_size": 8, "vocab_size": "9"}', "numbers above 0, got '9' and 8"),
        ('{"hidden_size": -8, "vocab_size": 9}', "numbers above 0, got 9 and -8"),
        ('{"hidden_size": true, "vocab_size": 9}', "got 9 and True"),
        ('{"hidden_size": NaN, "vocab_size": 9}', "got 9 and nan"),
        ('{"hidden_size": 8, "text_config": "x"}', "not a model config"),
        ("[]", "not a model config"),
        ("{", "not a model config"),
        (None, "not a model config"),
    ],
)
def test_model_configs(config, sizes, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    if isinstance(sizes, tuple):
        assert plan.read_config(str(tmp_path)) == sizes
        return
    with pytest.raises(SystemExit, match=sizes):
        plan.read_config(str(tmp_path))


def test_a_model_of_the_hub(tmp_path, monkeypatch):
    """Its config.json alone is fetched, where no file or folder has that name."""
    asked = []

    def download(name, file):
        asked.append((name, file))
        (tmp_path / file).write_text('{"hidden_size": 8, "vocab_size": 9}')
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert plan.read_config("org/Some.Model-1") == plan.read_config("gpt2") == (8, 9)
    assert asked == [("org/Some.Model-1", "config.json"), ("gpt2", "config.json")]
    for local in (str(tmp_path / "none"), "none/config.json"):
        with pytest.raises(SystemExit, match="not a model config"):
            plan.read_config(local)
    assert len(asked) == 2


def test_a_model_that_the_hub_does_not_give(monkeypatch):
    def refuse(name, file):
        raise OSError("401 Client Error.\n\nIt is gated" if name == "org/m" else "")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    wanted = "--config: org/m is no file .*: 401 Client Error. It is gated; log in .* --hidden_size"
    with pytest.raises(SystemExit, match=wanted):
        plan.read_config("org/m")
    with pytest.raises(SystemExit, match="config.json: OSError; log in"):
        plan.read_config("org/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit, match="pip install huggingface_hub"):
        plan.read_config("org/m")


def gib(of, dtype=torch.float32):
    return (plan.input_bytes(of) + plan.auto(of, dtype)[0].extra) / plan.GIB


def test_what_auto_takes_is_what_a_call_takes():
    wide = shape(max_bytes=2**24)
    assert plan.auto(wide, torch.float32) == (plan.streaming(wide), "")
    half = wide._replace(itemsize=2)
    assert plan.auto(half, torch.bfloat16) == (plan.streaming(half), "")
    thin = shape(max_bytes=2**16)  # fewer than 256 rows
    heavy = shape(width=2048, vocab=65_536, max_bytes=2**27)  # accumulators of 1 GiB
    for of, dtype, word in (
        (half, torch.float16, "float16"),
        (thin, torch.float32, "the workspace holds"),
        (heavy, torch.float32, "accumulators"),
    ):
        cost, why = plan.auto(of, dtype)
        assert cost == plan.recompute(of) and word in why
        assert f'strategy="auto" recomputes ({why}) and takes' in plan.answer(of, dtype, None)


def test_whether_it_fits_is_answered():
    small = plan.Shape(1, 32_768, 512, 1024, 32_000, 2, False, 2**26)  # pairs beyond the workspace
    again = (plan.input_bytes(small) + plan.recompute(small).extra) / plan.GIB
    said = plan.answer(small, torch.bfloat16, again + 1e-6)
    assert 'would with strategy="recompute", a pass more' in said
    large = shape(pairs=8, vocab=65_536, max_bytes=2**30)
    room = gib(large) + 0.001
    assert plan.answer(large, torch.float32, room).startswith('It fits: strategy="auto" streams')
    assert plan.answer(large, torch.float32, None).endswith(f"takes {gib(large):.2f} GiB.")
    for words, smaller in plan.remedies(large):
        said = plan.answer(large, torch.float32, gib(smaller) + 1e-6)
        found = next(w for w, of in plan.remedies(large) if gib(of) <= gib(smaller) + 1e-6)
        assert said.startswith("It does not fit") and f"would with {found}:" in said
        assert words == found or gib(dict(plan.remedies(large))[found]) <= gib(smaller) + 1e-6
    never = plan.answer(large, torch.float32, 1e-4)
    assert "--frozen" in never and "shorten sequences" in never
    assert "--frozen" not in plan.answer(large._replace(frozen=True), torch.float32, 1e-4)


PARTIAL = '{"runs": [{"spec": {}}], "device": {"name": "x"}}'


@pytest.mark.parametrize("text", [None, "{", "[]", '{"runs": []}', PARTIAL])
def test_no_results_file(text, tmp_path):
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(SystemExit, match="--results: .*r.json: not a results file"):
        plan.estimates(tmp_path / "r.json", shape(), "float32")


def test_command_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "vocab_size": 4096}')
    file = results(tmp_path / "r.json", {"stream": 2.0})
    words = ["--config", str(tmp_path), "--dtype", "float32", "--length", "100", "--pairs", "1"]
    plan.main([*words, "--device_gib", "0.01", "--results", str(file)])
    out = capsys.readouterr().out
    assert "a machine" in out and "\nIt fits" in out
    rows = {line[:24].strip(): line.split() for line in out.splitlines()}
    assert rows["stream"][-1] == "2" and rows["materialized logits"][-1] == "no"
    for bad in (
        ["--length", "0"], ["--response", "101"], ["--pairs", "-1"], ["--max_workspace_mb", "nan"],
        ["--max_workspace_mb", "-1"], ["--hidden_size", "64"], ["--vocab_size", "0"],
        ["--device_gib", "nan"], ["--device_gib", "0"],
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            plan.main([*words, *bad])
        assert bad[0] in capsys.readouterr().err
