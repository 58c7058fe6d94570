"""The loop: what is drawn when, how weights, averages and learning rate move."""

import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from diffusers_dpm.training import NonFiniteLossError, StepRecord, training_steps
from diffusers_dpm.training.loop import MicroBatches, draw_step, global_batch


def steps(trainer, conditional=False):
    return training_steps(trainer.state, trainer.data, trainer.loss, trainer.options, conditional=conditional)


def train(trainer):
    """The records of a whole run; the loss is read at once, as a consumer might."""
    return [(record.loss, record) for record in steps(trainer)]


def weights(module):
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])


def test_data_is_an_endless_row_of_shuffled_epochs():
    seen = [example for step in range(20) for example in global_batch(24, 6, 0, step)]
    epochs = [seen[i : i + 24] for i in range(0, 120, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    # batches that do not divide the data, and one that exceeds it
    assert [example for step in range(12) for example in global_batch(24, 10, 0, step)] == seen
    assert global_batch(24, 60, 0, 1) == seen[60:]
    assert global_batch(24, 6, 1, 0) != seen[:6]


def test_processes_and_accumulation_share_out_the_same_batch(options):
    settings, slices = options(batch_size=12), [slice(0, 3), slice(6, 9)]
    batches = iter(MicroBatches(40, settings, 5, slices))
    for step in (5, 6, 7):
        examples = global_batch(40, 12, 0, step)
        assert [next(batches), next(batches)] == [examples[0:3], examples[6:9]]


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
def test_draws_depend_on_seed_and_step_alone(options, sampling):
    settings = options(timestep_sampling=sampling)
    first = draw_step(settings, 7, (1, 8, 8), 1000)
    torch.manual_seed(99)
    again = draw_step(settings, 7, (1, 8, 8), 1000)
    for name in ("timesteps", "noise", "flip", "coin"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        for other in (draw_step(settings, 8, (1, 8, 8), 1000), draw_step(options(seed=1), 7, (1, 8, 8), 1000)):
            assert not torch.equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
def test_draws_are_distributed_as_they_say(options, sampling):
    draws = draw_step(options(timestep_sampling=sampling, batch_size=20_000), 0, (1, 2, 2), 10)
    assert draws.timesteps.bincount() / 20_000 == pytest.approx([0.1] * 10, abs=0.01)
    assert draws.timesteps[:2000].float().mean().item() == pytest.approx(4.5, abs=0.3)
    assert draws.noise.mean().item() == pytest.approx(0, abs=0.02)
    assert draws.noise.std().item() == pytest.approx(1, abs=0.02)
    assert draws.flip.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert draws.coin.mean().item() == pytest.approx(0.5, abs=0.02)


def test_stratified_timesteps_spread_evenly(options):
    timesteps = draw_step(options(batch_size=50), 3, (1, 8, 8), 1000).timesteps
    assert (timesteps // 20).sort().values.tolist() == list(range(50))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_counts_optimiser_steps(trainer, schedule, accumulation):
    run = trainer(lr_scheduler=schedule, gradient_accumulation_steps=accumulation, max_train_steps=10)
    rates = [record.learning_rate for _, record in train(run)]

    def rate(step):
        if step < 2:
            return step / 2
        done = (step - 2) / 8
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]

    assert rates == pytest.approx([1e-3 * rate(step) for step in range(10)])
    assert run.state.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-3 * rate(10))


def test_constant_ema_is_the_closed_form(trainer):
    run, decay, history = trainer(ema_warmup=False, ema_decay=0.9), 0.9, []
    for record in steps(run):
        history.append(weights(run.state.model))
        assert record.ema_decay == (0 if record.step == 1 else decay)  # the first step copies
    average = decay**5 * history[0] + sum((1 - decay) * decay ** (5 - i) * history[i] for i in range(1, 6))
    torch.testing.assert_close(weights(run.state.ema_model), average)
    assert not torch.equal(history[-1], average)


def test_ema_warms_up(trainer):
    decays = [record.ema_decay for _, record in train(trainer())]
    assert decays == pytest.approx([0, *(1 - (1 + step) ** -0.75 for step in range(1, 6))])
    decays = [record.ema_decay for _, record in train(trainer(ema_decay=0.5, ema_power=1.0, ema_inv_gamma=4.0))]
    assert decays == pytest.approx([0, *(min(0.5, step / (4 + step)) for step in range(1, 6))])


def test_ema_moves_once_per_step_under_accumulation(trainer):
    run = trainer(gradient_accumulation_steps=4)
    train(run)
    assert run.state.ema.num_updates == run.state.step == 6


def test_without_ema(trainer):
    run = trainer(ema=False)
    assert [record.ema_decay for _, record in train(run)] == [None] * 6
    assert run.state.ema_model is None


def test_accumulation_gives_the_same_update(trainer):
    runs = [trainer(gradient_accumulation_steps=parts, dropout=0.0) for parts in (1, 4)]
    figures = [[(loss, record.gradient_norm) for loss, record in train(run)] for run in runs]
    for first, second in zip(*figures, strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    one, four = (weights(run.state.model) for run in runs)
    torch.testing.assert_close(one, four, rtol=0, atol=2e-5)  # 2 % of a step
    assert (one - weights(trainer(dropout=0.0).state.model)).abs().max() > 1e-3


def test_loss_is_the_mean_over_the_global_batch(trainer):
    """Recomputed by hand for the first step, where the network still returns 0."""
    run = trainer(gradient_accumulation_steps=2)
    (loss, record), *_ = train(run)
    draws = draw_step(run.options, 0, run.data.shape, 1000)
    per_example = draws.noise.square().mean(dim=(1, 2, 3))
    assert loss == pytest.approx(per_example.mean().item(), rel=1e-5)
    for quarter, mean in enumerate(record.loss_by_quartile):
        assert mean == pytest.approx(per_example[draws.timesteps // 250 == quarter].mean().item(), rel=1e-5)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_gradients_are_clipped(trainer, max_grad_norm):
    run, used = trainer(max_grad_norm=max_grad_norm, max_train_steps=1), []

    def keep_norm(*_):
        used.append(torch.cat([parameter.grad.flatten() for parameter in run.state.parameters]).norm().item())

    run.state.optimizer.optimizer.register_step_pre_hook(keep_norm)
    [(_, record)] = train(run)
    assert record.gradient_norm > 0.1  # before clipping
    assert used == pytest.approx([max_grad_norm or record.gradient_norm], rel=1e-2)


class Recorder:
    """A loss that keeps what the loop gives it."""

    def __init__(self, loss):
        self.loss, self.schedule, self.calls = loss, loss.schedule, []

    def __call__(self, model, x0, t, noise, class_labels=None):
        self.calls.append((x0, t, noise, class_labels))
        return self.loss(model, x0, t, noise, class_labels)


def test_flips_and_labels(trainer):
    run = trainer(random_flip=True, class_conditional=True, class_dropout_prob=0.5, max_train_steps=4)
    run.loss = Recorder(run.loss)
    list(steps(run, conditional=True))
    for step, (x0, t, noise, labels) in enumerate(run.loss.calls):
        plain = run.data[global_batch(40, 16, 0, step)]
        draws = draw_step(run.options, step, run.data.shape, 1000)
        assert 0 < draws.flip.sum() < 16
        assert torch.equal(x0[draws.flip], plain["images"][draws.flip].flip(-1))
        assert torch.equal(x0[~draws.flip], plain["images"][~draws.flip])
        dropped = draws.coin < 0.5
        assert (labels[dropped] == 2).all()
        assert torch.equal(labels[~dropped], plain["labels"][~dropped])
        assert torch.equal(t, draws.timesteps)
        assert torch.equal(noise, draws.noise)


def test_dropout_differs_between_steps_but_not_between_runs(trainer):
    first, second = (train(trainer(max_train_steps=4, dropout=0.5)) for _ in range(2))
    assert [loss for loss, _ in first] == [loss for loss, _ in second]
    without = train(trainer(max_train_steps=4, dropout=0.0))
    assert first[-1][0] != without[-1][0]


def test_skipped_steps_leave_weights_average_and_rate(trainer):
    """What a gradient scaler does with fp16, with a real scaler on the CPU."""
    run = trainer()
    state = run.state
    state.accelerator.scaler = torch.amp.GradScaler("cpu")
    plain = torch.optim.AdamW(state.parameters, lr=1e-3)
    state.optimizer = AcceleratedOptimizer(plain, scaler=state.accelerator.scaler)
    before, rate = weights(state.model), state.lr_scheduler.get_last_lr()
    state.accelerator.scaler.scale(torch.ones(()))  # as `backward` does: makes the scale
    for parameter in state.parameters:
        parameter.grad = torch.full_like(parameter, torch.inf)
    state.update(max_grad_norm=0.0)
    assert state.optimizer.step_was_skipped
    assert torch.equal(weights(state.model), before)
    assert (state.ema.num_updates, state.step) == (0, 1)
    assert state.lr_scheduler.get_last_lr() == rate


def test_non_finite_loss_stops_the_run(trainer):
    run = trainer(max_train_steps=20)
    seen = []

    def poison():
        for record in steps(run):
            seen.append(record.step)
            if record.step == 3:
                torch.nn.init.constant_(run.state.model.conv_in.bias, torch.nan)

    with pytest.raises(NonFiniteLossError, match=r"nan .*4"):
        poison()
    assert seen[-1] <= 4


@pytest.mark.parametrize(
    ("figures", "skipped", "message"),
    [
        ([math.nan, 1, 0, 0, 0, 0], False, "loss .*nan"),
        ([1, math.inf, 0, 0, 0, 0], False, "gradient norm .*inf"),
        ([1, math.inf, 0, 0, 0, 0], True, None),
    ],
)
def test_what_spoils_the_weights(figures, skipped, message):
    record = StepRecord(9, 0.1, None, 1.0, skipped, torch.tensor(figures))
    if message is None:
        record.check_finite()
    else:
        with pytest.raises(NonFiniteLossError, match=f"{message} .*9"):
            record.check_finite()


def test_batches_that_cannot_be_divided(trainer):
    with pytest.raises(ValueError, match=r"--batch-size 10 .* 1 process.* x 4"):
        trainer(batch_size=10, gradient_accumulation_steps=4)


def test_data_that_is_not_cached_is_read_by_workers(trainer):
    runs = [trainer(cache_gigabytes=gigabytes, max_train_steps=3) for gigabytes in (0, 1)]
    assert [run.data.in_memory for run in runs] == [False, True]
    losses = [[loss for loss, _ in train(run)] for run in runs]
    assert losses[0] == losses[1]
