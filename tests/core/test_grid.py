import pytest
import torch
from dmdr_core import StepGrid, TimestepGrid


@pytest.mark.parametrize("num_steps", [1, 2, 4, 28])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
@pytest.mark.parametrize("t_end", [0.0, 0.001])
def test_step_grid_formula(num_steps, shift, t_end):
    even = [1 + (t_end - 1) * k / num_steps for k in range(num_steps)]
    expected = [shift * u / (1 + (shift - 1) * u) for u in even] + [t_end]
    times = StepGrid(num_steps, shift, t_end).times
    assert times.dtype == torch.float32
    torch.testing.assert_close(times.double(), torch.tensor(expected, dtype=torch.float64), rtol=6e-8, atol=0)
    assert times[0] == 1.0
    assert times[-1] == torch.tensor(t_end)


def test_the_grid_that_sd35_trains_on():
    assert (StepGrid(4, shift=5.0, t_end=0.001).times[:-1] * 1000).round().tolist() == [1000, 938, 834, 626]


def test_without_shift_the_steps_are_even():
    assert StepGrid(4).times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (TimestepGrid(1), [399, 0]),
        (TimestepGrid(2), [999, 500, 0]),
        (TimestepGrid(4), [999, 749, 500, 250, 0]),
        (TimestepGrid(3, num_timesteps=4), [3, 2, 1, 0]),
        (TimestepGrid(1, num_timesteps=2), [1, 0]),
    ],
)
def test_timestep_grid(grid, expected):
    assert grid.times.dtype == torch.int64
    assert grid.times.tolist() == expected
