"""Optimizers: the update by hand, what is kept, resuming bit for bit, and where one is refused."""

import importlib.util
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from tests.support import assert_within_roundings
from tests.trainer.tiny import record, save_tiny, tiny_config, tiny_model, write_jsonl
from trainer import run
from trainer.config.recipe import parse_config
from trainer.errors import InputError
from trainer.optimizer import check_optimizer, make_optimizer
from trainer.preview import state_bytes

TIMINGS = ("tokens_per_second", "step_seconds", "eval/seconds", "peak_memory_gb")
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
EIGHT_BITS = pytest.param("adamw_8bit", marks=NEEDS_BITSANDBYTES)
RATES = {"adamw_torch": 3e-3, "adamw_8bit": 3e-3, "adafactor": 3e-3, "sgd": 0.1}


@pytest.fixture(autouse=True)
def as_before():
    """A run sets the process's threads and its precision."""
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    train = write_jsonl(folder / "train.jsonl", [record(i) for i in range(16)])
    words = ["--model_name_or_path", save_tiny(folder / "model"), "--train_file", train]
    words += ["--per_device_train_batch_size", "8", "--max_steps", "6", "--save_steps", "3"]
    words += ["--lr_scheduler_type", "linear", "--cpu_threads", "1", "--eta", "0.5"]
    return [*words, "--weight_decay", "0.1", "--ref_cache_dir", str(folder / "cache")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optim", ["adamw_torch", EIGHT_BITS, "adafactor", "sgd"])
def test_it_learns_and_goes_on_bit_for_bit(tiny, tmp_path, optim, dtype):
    rate = str(RATES[optim] * (10 if dtype == "bfloat16" else 1))  # bfloat16 weights take big steps
    words = [*tiny, "--optim", optim, "--learning_rate", rate]
    words += ["--dtype", dtype, "--model_dtype", dtype]
    whole = run.run(parse_config([*words, "--output_dir", str(tmp_path / "a")]))
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.05
    resume = ["--resume_from_checkpoint", str(tmp_path / "a" / "checkpoint-3")]
    rows = run.run(parse_config([*words, "--output_dir", str(tmp_path / "b"), *resume]))
    timeless = [[{k: r[k] for k in r if k not in TIMINGS} for r in run] for run in (whole, rows)]
    assert timeless[0] == timeless[1]
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a | b)


def stepped(optim, weight, gradient, **fields):
    """The optimizer after one step with `gradient`, and the weight then."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data.copy_(weight)
    optimizer = make_optimizer(module, tiny_config(optim=optim, learning_rate=0.01, **fields))
    module.weight.grad = gradient.clone()
    optimizer.step()
    return optimizer, module.weight.detach()


def test_plain_gradient_descent():
    weight, gradient = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(0))
    optimizer, after = stepped("sgd", weight, gradient, weight_decay=0.1)
    weight, gradient = weight.double(), gradient.double()
    want, size = weight * (1 - 0.01 * 0.1) - 0.01 * gradient, weight.abs() + 0.01 * gradient.abs()
    assert_within_roundings(after, want, 3, size)  # two products and a difference
    kept = [x for state in optimizer.state.values() for x in state.values() if x is not None]
    assert not kept


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_adafactor_keeps_rows_and_columns_and_the_learning_rate(scale):
    """The second moment of rank one; the update's size is that of the rate, not the weight's."""
    weight, gradient = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(0))
    optimizer, after = stepped("adafactor", scale * weight, gradient)
    weight, gradient = weight.double(), gradient.double()
    rows, columns = (gradient**2).mean(1), (gradient**2).mean(0)
    update = gradient / (rows[:, None] * columns / rows.mean()).sqrt()
    update /= update.square().mean().sqrt().clamp(min=1.0)
    # means over 96, 64 and all, square roots and products; then a product and a difference
    roundings = (96 + 64 + 16) * 0.01 * update.abs() + 2 * scale * weight.abs()
    assert_within_roundings(after, scale * weight - 0.01 * update, 1, roundings)
    state = optimizer.state[next(iter(optimizer.state))]
    assert state["exp_avg_sq_row"].shape == (64,) and state["exp_avg_sq_col"].shape == (96,)


@NEEDS_BITSANDBYTES
def test_moments_of_8_bits():
    weight, gradient = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(0))
    optimizer, after = stepped("adamw_8bit", weight, gradient)
    state = optimizer.state[next(iter(optimizer.state))]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    _, wanted = stepped("adamw_torch", weight, gradient)
    assert (after - wanted).norm() <= 0.05 * (wanted - weight).norm()


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_the_plan_counts_the_optimizer_s_state(optim):
    model, config = tiny_model("llama"), tiny_config(optim=optim)
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [x for state in optimizer.state.values() for x in state.values()]
    kept = sum(x.nbytes for x in tensors if torch.is_tensor(x) and x.dim())
    assert sum(state_bytes(parameter, optim) for parameter in model.parameters()) == kept


def test_8_bits_need_bitsandbytes_with_kernels_for_the_device(monkeypatch):
    config = tiny_config(optim="adamw_8bit")

    def no_kernel(*_):
        raise NotImplementedError("no kernel for cpu")

    monkeypatch.setattr("trainer.optimizer.make_optimizer", no_kernel)
    with pytest.raises(InputError, match="optim: this bitsandbytes cannot run .*no kernel for cpu"):
        check_optimizer(config)
    monkeypatch.undo()
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="optim: .* not installed; run: pip install bitsandbytes"):
        check_optimizer(config)
