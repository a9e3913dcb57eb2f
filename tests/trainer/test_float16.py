"""float16's loss scale: skipped steps, what they count as, checkpoints; and where it is refused.

On a CPU accelerate makes no scaler, so the tests give it one, of torch's own kind.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.trainer.tiny import (
    as_split,
    assert_is_step,
    gradient,
    relative,
    shifted_reference,
    tiny_config,
    tiny_policy,
    tiny_split,
    true_step,
)
from trainer import checkpoint
from trainer.data.steps import plan_training
from trainer.errors import InputError
from trainer.loop import Training, mean_row, run_step, take_step
from trainer.model.loading import check_layers
from trainer.optimizer import make_optimizer, make_schedule
from trainer.parallel import request

FIELDS = {"eta": 5000.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def own_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(optim, steps, **scaling):
    """A tiny policy after `steps` (a slice of a plan of four) and the accelerator; `scaling`: of a
    scaler, if there is any."""
    split = as_split(tiny_split(8).pairs, shifted_reference(8))
    policy, _ = tiny_policy(eta=FIELDS["eta"])
    config = tiny_config(optim=optim, learning_rate=1e-3, **FIELDS)
    accelerator = Accelerator(cpu=True)
    if scaling:
        accelerator.scaler = torch.amp.GradScaler("cpu", **scaling)
    model, optimizer = accelerator.prepare(policy, make_optimizer(policy, config))
    if scaling:  # after the model was prepared, which therefore computes in float32
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    log = SimpleNamespace(rows=[], samples=[])
    training = Training(model, optimizer, make_schedule(optimizer, config, 4), log)
    plan = plan_training(
        8, batch_size=2, accumulation=1, ranks=1, epochs=1, max_steps=-1, seed=0
    )  # fmt: skip
    for step in plan[steps]:
        take_step(training, split, step, config, accelerator)
    return training, accelerator


def weights(training):
    return torch.cat([p.detach().flatten() for p in training.model.parameters()])


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_a_step_that_overflows_is_skipped(optim):
    """A scale that is a power of two and does not overflow changes no bit."""
    scaling = {"init_scale": 2.0**127, "backoff_factor": 2.0**-117}
    scaled, accelerator = trained(optim, slice(0, 3), **scaling)
    assert accelerator.scaler.get_scale() == 2.0**10
    plain, _ = trained(optim, slice(1, 3))
    assert [step["skipped_steps"] for step in scaled.window] == [1.0, 0.0, 0.0]
    assert torch.equal(weights(scaled), weights(plain))
    assert not torch.equal(weights(scaled), weights(trained(optim, slice(0, 0))[0]))

    rates = [step["learning_rate"] for step in scaled.window]
    assert rates[0] == rates[1] > rates[2] == plain.window[1]["learning_rate"]
    assert scaled.step == 3 and scaled.schedule.last_epoch == plain.schedule.last_epoch == 2
    row, wanted = mean_row(scaled.window), mean_row(plain.window)
    assert row["skipped_steps"] == 1.0 and "skipped_steps" not in wanted
    assert row["grad_norm"] == wanted["grad_norm"]  # of the two that were taken
    assert all(map(math.isfinite, row.values()))
    assert "grad_norm" not in mean_row(scaled.window[:1])


def test_a_gradient_that_no_scale_saves_stops_the_run():
    """With a scale below 1, a gradient that is not finite is not the scale's fault."""
    scaling = {"init_scale": 2.0**127, "backoff_factor": 2.0**-128}
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(FloatingPointError, match="step 2: loss .*inf"),
    ):
        patch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
        trained("sgd", slice(0, 4), **scaling)


def test_a_checkpoint_holds_the_scale(tmp_path):
    scaling = {"init_scale": 2.0**127, "backoff_factor": 2.0**-117}
    training, accelerator = trained("adamw_torch", slice(0, 2), **scaling)
    folder = checkpoint.save(training, tmp_path, {}, None, accelerator)
    own = accelerator.scaler.state_dict()
    assert own["scale"] == 2.0**10 and own["_growth_tracker"] == 1
    AcceleratorState._reset_state(reset_partial_state=True)
    training, accelerator = trained("adamw_torch", slice(0, 0), init_scale=2.0**16)
    checkpoint.load(training, folder, accelerator)
    assert accelerator.scaler.state_dict() == own and training.step == 2


def test_a_step_under_autocast():
    """The loss and its gradient in float16, scaled and unscaled, are float32's but for rounding."""
    split = as_split(tiny_split(8).pairs, shifted_reference(8))
    (step,) = plan_training(
        8, batch_size=8, accumulation=1, ranks=1, epochs=1, max_steps=-1, seed=0
    )  # fmt: skip
    policy, accelerator = tiny_policy(eta=0.5)
    config = tiny_config(eta=0.5)
    truth = true_step(policy.model, split.pairs, shifted_reference(8), config, torch.float16)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with torch.autocast("cpu", torch.float16):
        values = run_step(policy, split, step, accelerator, train=True)
    found = gradient(policy) / 2**16
    assert_is_step(values, found, truth)
    # it is float16: its errors are no smaller than those that the plain expression has there
    assert 2 * relative(found, truth.gradient) > relative(truth.plain, truth.gradient)


def test_where_it_is_refused(monkeypatch):
    config = tiny_config(dtype="float16")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="dtype: float16 needs a GPU, found none; use bfloat"):
            check_layers(config)
    monkeypatch.setenv(request.REQUESTS["fsdp2"], "true")
    with pytest.raises(InputError, match="dtype: expected bfloat16 or float32 with fsdp2"):
        request.requested_sharding(config)
    with pytest.raises(InputError, match="model_dtype: expected float32 with dtype float16, got b"):
        tiny_config(dtype="float16", model_dtype="bfloat16")
