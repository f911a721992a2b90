"""--compile: the numbers of eager mode from one graph, compiled once."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import QUICK
from torch._dynamo.utils import counters

import ppo

CARTPOLE = ppo.Args(total_timesteps=2048, validation_episodes=0, checkpoint_every=1, num_minibatches=1, update_epochs=1)
TAXI = replace(CARTPOLE, env_id="Taxi-v4")  # with action masks
PENDULUM = replace(CARTPOLE, env_id="Pendulum-v1", norm_obs=True, norm_reward=True)


def train(args, run_name):
    """Run ppo.train; after 0, 1, 2, ... iterations: the weights and statistics, and the number of graphs compiled."""
    history, save = [], ppo.State.checkpoint

    def note(state):
        weights = {name: value.clone() for name, value in state.agent.state_dict().items()}
        history.append((weights, counters["stats"]["unique_graphs"]))
        save(state)

    torch.compiler.reset()
    counters.clear()
    with patch.object(ppo.State, "checkpoint", note):
        ppo.train(replace(args, run_name=run_name))
    return zip(*history)


@pytest.mark.slow
@pytest.mark.parametrize("args", [CARTPOLE, PENDULUM, TAXI], ids=lambda args: args.env_id)
def test_compiled_training_is_eager_training_without_recompilation(args):
    eager, _ = train(args, "eager")
    compiled, graphs = train(replace(args, compile=True), "compiled")
    learned = next(i for i, weights in enumerate(eager) if weights["actor.0.bias"].any())  # it starts at zero
    for name, value in eager[learned].items():
        torch.testing.assert_close(compiled[learned][name], value, rtol=1e-5, atol=1e-6)
    assert graphs == learned * (0,) + (5 - learned) * (1,)  # a single one, made by the first minibatch
    assert not counters["graph_break"]


def test_compile_without_a_compiler_says_so_before_anything_is_written(main, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    code, _, err = main(*QUICK, "--compile")
    assert code == 2
    assert err.count("\n") == 1 and "C++ compiler" in err and "--compile" in err
    assert not Path("runs").exists()
