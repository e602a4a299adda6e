"""The error for a user's mistake has the argument's name, its value and the fix."""

import math

import pytest
import torch
from dmdr_core import (
    BetaRenoise,
    FlowMatching,
    StepGrid,
    TimestepGrid,
    UniformRenoise,
    VariancePreserving,
    ancestral_step,
    cosine_anneal,
    decoupled_gradient,
    denoising_loss,
    dmd_gradient,
    dmd_loss,
    group_advantage,
    guided,
    hinge,
    mean_distance,
    randn,
    relative_reward,
    renoise_state,
    rollout,
    sub_interval_loss,
    sub_interval_target,
    surrogate_loss,
    visit,
)

FLOW, VP = FlowMatching(), VariancePreserving(torch.tensor([0.9, 0.5, 0.1]))
X, Y = torch.ones(2, 3), torch.zeros(2, 3)
INTEGERS, COMPLEX = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.complex64)
T, NAN, INF = torch.tensor([0.2, 0.8]), math.nan, math.inf
REWARDS = torch.tensor([0.1, 0.2, 0.3, 0.4])


def two(*values):
    return torch.tensor(values)


def shrug(x_t, t):
    return x_t


def roll(predict=shrug, process=FLOW, grid=None, noise=X, **settings):
    return rollout(predict, process, grid or StepGrid(2), noise, **settings)


VALUE = [
    # shapes
    (lambda: FLOW.add_noise(X, torch.zeros(2, 4), T), "noise has shape (2, 4) and x0 (2, 3)"),
    (lambda: FLOW.add_noise(X, torch.zeros(1, 3), T), "noise has shape (1, 3)"),
    (lambda: FLOW.target(X, torch.zeros(2), T), "noise has shape (2,)"),
    (lambda: FLOW.to_x0(X, torch.zeros(3), T), "prediction has shape (3,) and x_t (2, 3)"),
    (lambda: FLOW.step(X, torch.zeros(3), T, T), "prediction has shape"),
    (lambda: VP.to_x0(X, torch.zeros(3), 0), "prediction has shape"),
    (lambda: VP.add_noise(X, torch.zeros(3), 0), "noise has shape (3,) and x0 (2, 3)"),
    (lambda: VP.target(X, torch.zeros(3), 0), "noise has shape (3,) and x0 (2, 3)"),
    (lambda: FLOW.add_noise(torch.tensor(1.0), torch.tensor(1.0), 0.5), "x0 has shape (): give [B, ...]"),
    (lambda: FLOW.add_noise(torch.ones(0, 3), torch.ones(0, 3), 0.5), "x0 has shape (0, 3): give [B, ...]"),
    (lambda: dmd_gradient(X, Y, torch.zeros(2, 4)), "x0_fake has shape (2, 4) and x0 (2, 3)"),
    (lambda: dmd_loss(X, torch.zeros(3), Y), "x0_real has shape (3,)"),
    (lambda: renoise_state(X, torch.zeros(3), 0.2, 0.8), "noise has shape (3,) and x_s (2, 3)"),
    (lambda: renoise_state(X, Y, 1.0, 1.0), "s = [1] is outside [0.0, "),
    (lambda: renoise_state(X, Y, 0.2, 1.5), "t = [1.5] is outside [0.0, 1.0]"),
    (lambda: sub_interval_target(X, Y, two(0.1, 0.9), two(0.2, 0.8)), "t - s = [0.1, -0.1] is outside [0.0, 1.0]"),
    (lambda: sub_interval_loss(torch.zeros(3), X, Y, 0.2, 0.8), "prediction has shape (3,) and x_s (2, 3)"),
    (lambda: sub_interval_loss(X, X, Y, 0.2, 0.8, most=0.0), "most = 0.0: give a finite number in (0.0, inf)"),
    (lambda: ancestral_step(X, Y, torch.zeros(3), 0.8, 0.2), "noise has shape (3,) and x_t (2, 3)"),
    (lambda: mean_distance(X, torch.zeros(3)), "x0_real has shape (3,) and x0 (2, 3)"),
    (lambda: surrogate_loss(X, torch.zeros(3)), "direction has shape (3,) and x0 (2, 3)"),
    (lambda: decoupled_gradient(X, Y, Y, torch.zeros(3), 2.0), "ca_uncond has shape (3,) and x0_fake (2, 3)"),
    (lambda: decoupled_gradient(X, Y, Y, Y, torch.ones(3)), "scale has shape (3,): give a scalar or one per sample"),
    (lambda: decoupled_gradient(X, Y, Y, Y, 2.0, eps=-1.0), "eps = -1.0"),
    (lambda: denoising_loss(X, torch.zeros(3)), "target has shape (3,) and prediction (2, 3)"),
    (lambda: denoising_loss(X, Y, torch.ones(3)), "weight has shape (3,): give one weight for each of 2 samples"),
    (lambda: dmd_loss(X, Y, Y, weight=torch.ones(2, 3)), "weight has shape (2, 3): give one weight for each of 2"),
    (lambda: guided(X, torch.zeros(3), 2.0), "uncond has shape (3,)"),
    (lambda: hinge(X), "reward has shape (2, 3): give one number per picture"),
    (lambda: hinge(torch.tensor(0.1)), "reward has shape ()"),
    (lambda: relative_reward(X, Y), "positive has shape (2, 3)"),
    (lambda: relative_reward(REWARDS, REWARDS[:1]), "negative has shape (1,) and positive (4,)"),
    (lambda: group_advantage(X, 2), "rewards has shape (2, 3)"),
    (lambda: group_advantage(REWARDS, 3), "rewards has 4 entries, no multiple of group_size = 3"),
    # times
    (lambda: FLOW.add_noise(X, Y, two(0.1, 0.2, 0.3)), "t has shape (3,): give a scalar or one per sample, [2]"),
    (lambda: FLOW.add_noise(X, Y, two(0.1)), "t has shape (1,)"),
    (lambda: FLOW.add_noise(X, Y, two(0.1, 0.2)[:, None]), "t has shape (2, 1)"),
    (lambda: FLOW.add_noise(X, Y, two(0.1, 1.5)), "t = [0.1, 1.5] is outside [0.0, 1.0]"),
    (lambda: FLOW.to_x0(X, Y, -0.1), "t = [-0.1] is outside"),
    (lambda: FLOW.target(X, Y, two(0.1, NAN)), "t = [0.1, nan] is outside"),
    (lambda: FLOW.target(X, Y, INF), "t = [inf] is outside"),
    (lambda: FLOW.step(X, Y, T, two(0.1, -0.2)), "t_next = [0.1, -0.2] is outside"),
    (lambda: VP.add_noise(X, Y, two(0, 3)), "t = [0, 3] is outside [0, 2]"),
    (lambda: VP.target(X, Y, -1), "t = [-1] is outside [0, 2]"),
    (lambda: VP.step(X, Y, 2, 3), "t_next = [3] is outside"),
    (lambda: FLOW.time_at(two(0.1, 1.1)), "fraction = [0.1, 1.1] is outside"),
    (lambda: FLOW.time_at(two(-0.1, 0.1)), "fraction = [-0.1, 0.1] is outside"),
    (lambda: VP.time_at(two(NAN, 0.1)), "fraction = [nan, 0.1] is outside"),
    # processes and grids
    (lambda: FlowMatching(t_end=1.0), "t_end = 1.0: give a finite number in [0.0, 1.0)"),
    (lambda: FlowMatching(t_end=-0.1), "t_end = -0.1"),
    (lambda: FlowMatching(t_end=NAN), "t_end = nan"),
    (lambda: VariancePreserving(torch.tensor([0.1, 0.9])), "alphas_cumprod (first 0.1, last 0.9) does not decrease"),
    (lambda: VariancePreserving(torch.tensor([0.9, 0.9])), "alphas_cumprod (first 0.9, last 0.9) does not decrease"),
    (lambda: VariancePreserving(torch.tensor([0.9, 0.0])), "without a zero"),
    (lambda: VariancePreserving(torch.tensor([0.9, NAN])), "alphas_cumprod"),
    (lambda: VariancePreserving(torch.tensor([1.1, 0.5])), "alphas_cumprod"),
    (lambda: VariancePreserving(X), "alphas_cumprod has shape (2, 3)"),
    (lambda: VariancePreserving(torch.ones(0)), "alphas_cumprod has shape (0,)"),
    (lambda: StepGrid(0), "num_steps = 0 is less than 1: give 1 or more"),
    (lambda: StepGrid(4, shift=0.0), "shift = 0.0: give a finite number in (0.0, inf)"),
    (lambda: StepGrid(4, shift=INF), "shift = inf"),
    (lambda: StepGrid(4, t_end=1.0), "t_end = 1.0"),
    (lambda: StepGrid(4, t_end=-0.1), "t_end = -0.1"),
    (lambda: StepGrid(4, shift=1e-6, t_end=0.1), "bring shift nearer to 1"),
    (lambda: StepGrid(4, shift=1e30), "bring shift nearer to 1"),
    (lambda: TimestepGrid(-1), "num_steps = -1"),
    (lambda: TimestepGrid(4, num_timesteps=4), "num_timesteps = 4 is less than 5: give more timesteps than steps"),
    # schedules and renoising
    (lambda: cosine_anneal(1.0, 0.0, -1, 10), "step = -1"),
    (lambda: cosine_anneal(1.0, 0.0, 1, -10), "total = -10"),
    (lambda: cosine_anneal(1.0, 0.0, 1, NAN), "total = nan"),
    (lambda: cosine_anneal(NAN, 0.0, 1, 10), "start = nan: give a finite number in (-inf, inf)"),
    (lambda: cosine_anneal(1.0, INF, 1, 10), "end = inf"),
    (lambda: BetaRenoise(alpha=0.0), "alpha = 0.0: give a finite number in (0.0, inf)"),
    (lambda: BetaRenoise(beta=-1.0), "beta = -1.0"),
    (lambda: BetaRenoise(beta=0.0), "beta = 0.0: give a finite number in (0.0, inf)"),
    (lambda: BetaRenoise(alpha=INF), "alpha = inf"),
    (lambda: BetaRenoise(anneal_steps=-1), "anneal_steps = -1 is less than 0"),
    (lambda: BetaRenoise().sample(0, 0), "batch = 0 is less than 1"),
    (lambda: BetaRenoise().sample(2, -1), "step = -1 is less than 0"),
    (lambda: UniformRenoise().sample(2, -1), "step = -1 is less than 0"),
    (lambda: UniformRenoise().sample(0, 1), "batch = 0 is less than 1"),
    (lambda: UniformRenoise().sample(2, 1, [torch.Generator()]), "generator lists 1 generators for 2 samples"),
    (lambda: randn((3, 2), [torch.Generator()] * 2), "generator lists 2 generators for 3 samples"),
    (lambda: randn((0, 2), []), "batch = 0 is less than 1"),
    (lambda: randn(()), "shape = () has no batch dimension"),
    # numbers that would spoil a loss
    (lambda: guided(X, Y, NAN), "scale = [nan] holds NaN or infinity"),
    (lambda: guided(X, Y, two(1.0, INF)), "scale = [1, inf]"),
    (lambda: guided(X, Y, two(1.0, 1.0, 1.0)), "scale has shape (3,)"),
    (lambda: dmd_gradient(X, Y, Y, eps=-1.0), "eps = -1.0"),
    (lambda: dmd_loss(X, Y, Y, eps=NAN), "eps = nan"),
    (lambda: hinge(two(0.1, NAN)), "reward = [0.1, nan] holds NaN or infinity"),
    (lambda: hinge(REWARDS, margin=NAN), "margin = nan"),
    (lambda: relative_reward(REWARDS, REWARDS * INF), "negative = [inf, inf, inf, inf] holds"),
    (lambda: relative_reward(REWARDS, REWARDS, k=INF), "k = inf"),
    (lambda: group_advantage(two(0.1, -INF), 2), "rewards = [0.1, -inf] holds"),
    (lambda: group_advantage(REWARDS, 0), "group_size = 0"),
    # rollouts
    (lambda: roll(mode="oed"), "mode = 'oed' is unknown: did you mean 'ode'? Valid: 'sde', 'ode'"),
    (lambda: roll(mode="SDE"), "did you mean 'sde'?"),
    (lambda: roll(mode="ODE"), "did you mean 'ode'?"),
    (lambda: roll(num_steps=3), "num_steps = 3 is more than the grid's 2"),
    (lambda: roll(num_steps=0), "num_steps = 0"),
    (lambda: roll(process=FlowMatching(0.001)), "grid ends at 0 and process at t_end = 0.001"),
    (lambda: roll(grid=StepGrid(2, t_end=0.001)), "grid ends at 0.001 and process at t_end = 0"),
    (lambda: roll(predict=lambda x_t, t: x_t[:, :1]), "prediction has shape (2, 1) and x_t (2, 3)"),
    (lambda: roll(generator=[torch.Generator()]), "generator lists 1 generators for 2 samples"),
    (lambda: roll(noise=torch.tensor(1.0)), "noise has shape ()"),
    (lambda: visit(shrug, FLOW, StepGrid(2), X, mode="euler"), "mode = 'euler' is unknown"),
]

TYPE = [
    (lambda: FLOW.add_noise(INTEGERS, INTEGERS, T), "x0 has dtype torch.int64: give real floating-point numbers"),
    (lambda: FLOW.add_noise(X, COMPLEX, T), "noise has dtype torch.complex64"),
    (lambda: FLOW.to_x0(X, (Y,), T), "prediction is a tuple: give a torch.Tensor"),
    (lambda: FLOW.add_noise([1.0], Y, T), "x0 is a list"),
    (lambda: FLOW.add_noise(X, Y, two(0, 1)), "t has dtype torch.int64"),
    (lambda: FLOW.add_noise(X, Y, [0.1, 0.2]), "t is a list: give a number or a torch.Tensor"),
    (lambda: FLOW.add_noise(X, Y, True), "t is a bool"),
    (
        lambda: VP.add_noise(X, Y, two(0.0, 1.0)),
        "t has dtype torch.float32: a variance-preserving process takes integer",
    ),
    (lambda: VP.add_noise(X, Y, 1.0), "takes integer timesteps"),
    (lambda: VP.add_noise(X, Y, two(True, False)), "t has dtype torch.bool"),
    (lambda: VP.time_at(two(0, 1)), "fraction has dtype torch.int64"),
    (lambda: FlowMatching("0"), "t_end = '0' is a str: give a number"),
    (lambda: VariancePreserving([0.9, 0.1]), "alphas_cumprod is a list"),
    (lambda: VariancePreserving(two(1, 0)), "alphas_cumprod has dtype torch.int64"),
    (lambda: StepGrid(4.0), "num_steps = 4.0 is a float: give an int"),
    (lambda: StepGrid(True), "num_steps = True is a bool"),
    (lambda: TimestepGrid(4, 1000.0), "num_timesteps = 1000.0"),
    (lambda: cosine_anneal(1.0, 0.0, None, 10), "step = None is a NoneType"),
    (lambda: BetaRenoise(anneal_steps=1.5), "anneal_steps = 1.5 is a float"),
    (lambda: BetaRenoise().sample(2.0, 0), "batch = 2.0"),
    (lambda: BetaRenoise().sample(2, 0.5), "step = 0.5"),
    (lambda: BetaRenoise().sample(2, 0, 42), "generator is a int: give None, a torch.Generator or a list"),
    (lambda: randn((2, 3), [1, 2]), "generator is a list"),
    (lambda: randn((2, 3), dtype=torch.int64), "dtype = torch.int64 cannot hold noise"),
    (lambda: guided(X, Y, "7"), "scale is a str"),
    (lambda: guided(X, INTEGERS, 7.0), "uncond has dtype torch.int64"),
    (lambda: dmd_loss(X, INTEGERS, Y), "x0_real has dtype torch.int64"),
    (lambda: dmd_loss(X, Y, None), "x0_fake is a NoneType"),
    (lambda: denoising_loss(X, COMPLEX), "target has dtype torch.complex64"),
    (lambda: hinge(two(1, 2)), "reward has dtype torch.int64"),
    (lambda: hinge([0.1]), "reward is a list"),
    (lambda: relative_reward(REWARDS, 0.1), "negative is a float"),
    (lambda: group_advantage(REWARDS, 2.0), "group_size = 2.0"),
    (lambda: roll(predict=lambda x_t, t: (x_t,)), "prediction is a tuple"),
    (lambda: roll(process=VP, grid=StepGrid(2)), "t has dtype torch.float32"),
    (lambda: roll(grid=TimestepGrid(2)), "t has dtype torch.int64"),
    (lambda: roll(noise=INTEGERS), "noise has dtype torch.int64"),
    (lambda: roll(num_steps=1.0), "num_steps = 1.0"),
]


@pytest.mark.parametrize(("mistake", "message"), VALUE, ids=[message for _, message in VALUE])
def test_value_errors(mistake, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared below, without escaping
        mistake()
    assert message in str(error.value)


@pytest.mark.parametrize(("mistake", "message"), TYPE, ids=[message for _, message in TYPE])
def test_type_errors(mistake, message):
    with pytest.raises(TypeError) as error:
        mistake()
    assert message in str(error.value)


def test_a_long_list_of_wrong_times_is_cut():
    with pytest.raises(ValueError, match=r"t = \[2, 2, 2, 2, 2, 2, 2, 2, \.\.\.\] is outside"):
        FLOW.add_noise(torch.ones(50, 1), torch.ones(50, 1), torch.full((50,), 2.0))


def test_nan_in_samples_is_not_looked_for():
    """NaN samples pass through, since a check of every pixel would cost a synchronisation per call."""
    assert FLOW.add_noise(X * NAN, Y, T).isnan().all()


def test_the_values_of_a_tensor_on_an_accelerator_are_not_read():
    """The device "meta" stands for it: reading a value there is an error."""
    x, t = X.to("meta"), T.to("meta")
    results = [
        FLOW.add_noise(x, x, t),
        FLOW.to_x0(x, x, t),
        FLOW.step(x, x, 0.5, 0.25),
        VP.target(x, x, t.long()),
        guided(x, x, t),
        guided(x, x, 7.5),
        hinge(t),
        relative_reward(t, t),
        group_advantage(t, 2),
    ]
    assert {result.device.type for result in results} == {"meta"}
    with pytest.raises(ValueError, match="scale = "):
        guided(x, x, NAN)
    with pytest.raises(ValueError, match=r"t = \[2\] is outside"):
        FLOW.add_noise(x, x, 2.0)
