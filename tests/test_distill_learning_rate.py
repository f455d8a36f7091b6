"""Learning rates: every step against torch's own schedulers, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from coursepack.distill.recipe import LearningRateConfig
from coursepack.distill.training.schedule import rate_factor

STEPS, EPOCHS, LR = 7, 6, 0.3


def rates(**config):
    config = LearningRateConfig(**config)
    return [LR * rate_factor(config, step, STEPS, EPOCHS) for step in range(STEPS * EPOCHS)]


def torch_rates(make, steps=STEPS * EPOCHS):
    """The learning rate of each step under one of torch's schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


schedulers = torch.optim.lr_scheduler


def constant(optimizer):
    return schedulers.ConstantLR(optimizer, 1.0)


def by_steps(optimizer, begun=0):
    return schedulers.MultiStepLR(optimizer, [2 * STEPS - begun, 5 * STEPS - begun], 0.3)


def cosine(optimizer, begun=0):
    return schedulers.CosineAnnealingLR(optimizer, STEPS * EPOCHS - begun, eta_min=0.1 * LR)


def one_cycle(optimizer):
    return schedulers.OneCycleLR(optimizer, LR, total_steps=STEPS * EPOCHS, cycle_momentum=False)


SHAPES = {
    "constant": ({}, constant),
    "step": ({"shape": "step", "milestones": (2, 5), "factor": 0.3}, by_steps),
    "cosine": ({"shape": "cosine", "end": 0.1}, cosine),
    "one_cycle": ({"shape": "one_cycle"}, one_cycle),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_has_the_rate_of_torchs_scheduler(shape):
    config, make = SHAPES[shape]
    np.testing.assert_allclose(rates(**config), torch_rates(make), rtol=1e-9)


@pytest.mark.parametrize("shape", ["constant", "step", "cosine"])
@pytest.mark.parametrize("epochs", [1.0, 1.5])
def test_a_warm_up_is_torchs_linear_one_before_the_rest(shape, epochs):
    config, make = SHAPES[shape]
    rise = round(epochs * STEPS)

    def warmed(optimizer):
        later = constant(optimizer) if make is constant else make(optimizer, begun=rise)
        first = schedulers.LinearLR(optimizer, 1 / rise, 1.0, total_iters=rise - 1)
        return schedulers.SequentialLR(optimizer, [first, later], [rise])

    found = rates(**config, warmup_epochs=epochs)
    np.testing.assert_allclose(found, torch_rates(warmed), rtol=1e-9)
    assert found[rise - 1] == LR
    assert np.diff(found[:rise]).min() > 0


@pytest.mark.parametrize("config", [config for config, _ in SHAPES.values()])
@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (1, 2), (3, 1), (1, 10), (5, 8)])
def test_rates_are_never_negative_and_never_above_the_largest(config, steps, epochs):
    for warmup in {0.0} if config.get("shape") == "one_cycle" else {0.0, 1.0, 0.3, epochs, 2.0 * epochs}:
        parsed = LearningRateConfig(**config, warmup_epochs=warmup)
        found = [rate_factor(parsed, step, steps, epochs) for step in range(steps * epochs)]
        assert min(found) >= 0
        assert max(found) <= 1


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"shape": "step"}, r"milestones are \[\], but shape is 'step'.* needs at least one"),
        ({"milestones": [3]}, r"milestones are \[3\], but shape is 'constant'"),
        ({"shape": "one_cycle", "warmup_epochs": 1}, "'one_cycle' has its own warm-up"),
        ({"shape": "step", "milestones": [0]}, "greater than or equal to 1"),
        ({"shape": "step", "milestones": [2], "factor": 1.0}, "less than 1"),
        ({"shape": "linear"}, "'constant', 'step', 'cosine' or 'one_cycle'"),
    ],
)
def test_schedules_that_are_refused(config, text):
    with pytest.raises(ValueError, match=text):
        LearningRateConfig.model_validate(config)
