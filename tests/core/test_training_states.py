import pytest
import torch
from dmdr_core import FlowMatching, StepGrid, authors_states, randn, rollout, visited_states

PROCESS, GRID = FlowMatching(t_end=0.001), StepGrid(4, shift=3.0, t_end=0.001)


def generators(count: int = 6) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


class Model:
    """A prediction that depends on the state, the time and the sample; it records the samples of its calls."""

    def __init__(self):
        self.asked: list[int] = []

    def __call__(self, x_t, t, rows=None):
        rows = torch.arange(len(x_t)) if rows is None else rows
        self.asked += rows.tolist()
        return torch.sin(3 * x_t) * (1 + t[:, None]) + 0.1 * rows[:, None]


@pytest.fixture
def noise():
    return randn((6, 5), generators())


CHOSEN = torch.tensor([0, 3, 1, 2, 3, 0])
ALONE = torch.tensor([0, 3, 1, 2, 2, 0])  # one sample continues after all others have stopped


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("chosen", [CHOSEN, ALONE])
def test_visited_states_are_those_of_a_rollout(noise, mode, in_step, chosen):
    whole = rollout(Model(), PROCESS, GRID, noise, mode, generators())
    states, times = visited_states(Model(), PROCESS, GRID, noise, chosen, mode, generators(), in_step)
    for row, position in enumerate(chosen.tolist()):
        torch.testing.assert_close(states[row], whole.states[position][row], rtol=0, atol=0)
        assert times[row] == GRID.times[position]


def test_simulation_stops_at_the_state_that_is_needed(noise):
    model = Model()
    visited_states(model, PROCESS, GRID, noise, CHOSEN, "ode")
    assert [model.asked.count(row) for row in range(6)] == CHOSEN.tolist()
    model = Model()
    authors_states(model, PROCESS, GRID, noise, CHOSEN, "sde", generators())
    assert [model.asked.count(row) for row in range(6)] == (CHOSEN + 1).tolist()


def test_in_step_every_process_asks_equally_often(noise):
    for chosen in (CHOSEN, torch.zeros(6, dtype=torch.long)):
        model = Model()
        visited_states(model, PROCESS, GRID, noise, chosen, "ode", in_step=True)
        assert [model.asked.count(row) for row in range(6)] == [3] * 6


def by_hand(noise, chosen, mode):
    """Compare with a loop over samples that follows the description of the public trainers."""
    draws, times = generators(), GRID.times.tolist()
    model, rows = Model(), []
    for i, position in enumerate(chosen.tolist()):
        x, row = noise[i : i + 1], torch.tensor([i])
        for step in range(4):
            v = model(x, torch.tensor([times[step]]), row)
            x0 = x + (0.001 - times[step]) * v
            if mode == "sde":
                if step == position:
                    break
                x = (1 - times[step + 1]) * x0 + times[step + 1] * torch.randn(1, 5, generator=draws[i])
            elif step < 3:
                x = x + (times[step + 1] - times[step]) * v
        rows.append((1 - times[position]) * x0 + times[position] * torch.randn(1, 5, generator=draws[i]))
    return torch.cat(rows)


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("in_step", [False, True])
def test_authors_states_are_an_x0_renoised(noise, mode, in_step):
    states, times = authors_states(Model(), PROCESS, GRID, noise, CHOSEN, mode, generators(), in_step)
    torch.testing.assert_close(states, by_hand(noise, CHOSEN, mode), rtol=1e-5, atol=1e-5)
    assert torch.equal(times, GRID.times[CHOSEN])


@pytest.mark.parametrize("choose", [visited_states, authors_states])
def test_positions_that_the_grid_does_not_have_are_refused(noise, choose):
    for chosen in (torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([-1, 0, 0, 0, 0, 0]), torch.tensor([0])):
        with pytest.raises(ValueError, match=r"one position in \[0, 4\)"):
            choose(Model(), PROCESS, GRID, noise, chosen)
    with pytest.raises(ValueError, match="mode = 'euler' is unknown"):
        choose(Model(), PROCESS, GRID, noise, CHOSEN, "euler")
    with pytest.raises(TypeError, match="noise has dtype"):
        choose(Model(), PROCESS, GRID, noise.long(), CHOSEN)
