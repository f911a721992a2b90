"""Continuous actions in any box; few worlds at a time; scores that do not depend on how many; what cannot be seen."""

import json
import math
import random
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Graph, Sequence, Text, Tuple
from test_environments import Anything

import ppo

BOXES = [(5, 35), (0, 1), (-1000, 1000), (100, 110), (-0.01, 0.01), (-1, 1)]
SHORT = ["--total-timesteps", 256, "--num-envs", 2, "--num-steps", 32, "--num-minibatches", 4, "--eval-episodes", 5,
         "--validation-episodes", 0, "--run-name", "it"]  # fmt: skip


class Aim(gym.Env):
    """Shows nothing, and pays for one action: minus its distance from three quarters of the box, over the width."""

    observation_space, metadata = Box(0, 2, (2,)), {"render_modes": ["rgb_array"], "render_fps": 15}
    opened, most, closed = 0, 0, False  # how many there are, and ever were at once

    def __init__(self, action_space, render_mode=None):
        self.action_space, self.render_mode = action_space, render_mode
        Aim.opened, Aim.most = Aim.opened + 1, max(Aim.most, Aim.opened + 1)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        low, width = self.action_space.low, self.action_space.high - self.action_space.low
        return np.zeros(2, np.float32), -float(np.mean(abs((action - low) / width - 0.75))), True, False, {}

    def render(self):
        return np.zeros((64, 64, 3), np.uint8)

    def close(self):
        Aim.opened -= not self.closed
        self.closed = True


class Dice(Aim):
    """Shows and pays what Python's and NumPy's own generators give."""

    def reset(self, *, seed=None, options=None):
        return np.float32([random.random(), np.random.random()]), {}

    def step(self, action):
        return self.reset()[0], random.random() + np.random.random(), np.random.random() < 0.2, False, {}


def receive(space, choices, register, **settings):
    """What as many worlds are given for these choices."""
    taken = []
    env_id = register(lambda: Anything(Box(-1, 1, (1,)), space, taken))
    ppo.Worlds(ppo.Args(env_id, **settings), [*range(len(choices))]).step(choices)
    return np.stack(taken)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("low, high", BOXES)
def test_choices_from_minus_one_to_one_are_stretched_to_the_box(low, high, dtype, register):
    space, ends = Box(low, high, (2,), dtype), torch.tensor([-1, 1, -1.01, 1.01, -3e38, 3e38])[:, None].expand(-1, 2)
    received = receive(space, choices := torch.cat([ends, torch.randn(50, 2)]), register)
    assert received.dtype == dtype and all(map(space.contains, received))
    assert (received - low) / (high - low) == pytest.approx((choices.clamp(-1, 1).numpy() + 1) / 2, abs=1e-5)
    assert (received[:6:2] == space.low).all() and (received[1:6:2] == space.high).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_only_what_is_bounded_on_both_sides_is_stretched(dtype, register):
    space = Box(np.array([-np.inf, 2, -np.inf, 5], dtype), np.array([3, np.inf, np.inf, 35], dtype), dtype=dtype)
    choices = torch.tensor([[-7, 7, 7, 0.5], [7, -7, -7, -0.5], [4e9, -4e9, 4e9, 7]])
    assert receive(space, choices, register).tolist() == [[-7, 7, 7, 27.5], [3, 2, -7, 12.5], [3, 2, 4e9, 35]]


@pytest.mark.parametrize("flags", [[], ["--no-rescale-actions"]], ids=["stretched", "as chosen"])
def test_whether_actions_are_stretched_belongs_to_the_agent(flags, register, main):
    box, (center, scale) = Box(-10, 30, (2,)), (0, 1) if flags else (10, 20)
    choices = torch.tensor([[0.5, -0.25], [29, -9], [31, -11]])
    meant = (center + scale * choices).clamp(-10, 30)
    assert (receive(box, choices, register, rescale_actions=not flags) == meant.numpy()).all()
    assert main("--env-id", register(partial(Aim, box)), *SHORT, "--no-norm-reward", *flags)[0] == 0
    assert main("--init-from", "runs/it", *SHORT, "--run-name", "next")[0] == 0
    for run in "it", "next":
        assert json.loads(Path("runs", run, "config.json").read_text())["rescale_actions"] is not bool(flags)
        agent = ppo.Agent.from_pretrained(f"runs/{run}", strict=True)
        meant = (center + scale * agent.act(torch.zeros(2)).detach()).clamp(-10, 30)
        assert abs(meant - center).min() > 0 and agent.predict(np.zeros(2)) == pytest.approx(meant.numpy())


@pytest.mark.slow
def test_any_box_is_learned_as_well_as_that_from_minus_one_to_one(register, main):
    def distance(low, high, *flags):
        run, env_id = f"r{low}_{high}_{len(flags)}", register(partial(Aim, Box(low, high, (1,))))
        assert main("--env-id", env_id, "--total-timesteps", 20_480, "--run-name", run, *flags)[0] == 0
        return -json.loads(Path("runs", run, "results.json").read_text())["mean_reward"]

    usual = distance(-1, 1)
    assert usual < 0.05 and max(distance(*box) for box in BOXES[:-1]) <= usual + 0.05
    assert distance(100, 110, "--no-rescale-actions") > 0.5


@pytest.mark.parametrize("N", [1, 3])
def test_never_more_worlds_are_open_than_num_envs(N, register, main):
    Aim.opened = Aim.most = 0
    few = ["--num-envs", N, "--total-timesteps", 256 * N, "--validation-episodes", 4, "--capture-video"]
    code, out, err = main("--env-id", register(partial(Aim, Box(-1, 1, (1,)))), *SHORT, *few)
    assert (code, Aim.most, Aim.opened) == (0, N, 0) and "video: " in out, err
    assert main("--evaluate", "runs/it", "--capture-video")[0] == 0 and (Aim.most, Aim.opened) == (N, 0)


@pytest.mark.parametrize("deterministic, units", [(True, 0), (False, 0), (True, 8), (False, 8)])
def test_the_same_episodes_are_played_however_many_stand_side_by_side(deterministic, units):
    torch.manual_seed(1)
    agent = ppo.Agent(**ppo.look(args := ppo.Args(deterministic=deterministic, lstm_hidden_size=units)))
    for x in agent.actor.parameters():
        x.data += 0.3 * torch.randn_like(x)
    one, seven, many = (ppo.evaluate(agent, ppo.replace(args, num_envs=N), 20).tolist() for N in (1, 7, 64))
    assert one == seven == many and len(set(one[0])) > 4
    assert np.shape(one) == (3, 20) and one[0] == one[1] and not any(one[2])  # CartPole pays 1 a step and ends at 500


class Endless(gym.Env):
    """Pays 1 a step, for ever, or for as many steps as it is told."""

    observation_space, action_space = Box(0, 2, (2,)), Discrete(2)

    def __init__(self, ends=math.inf):
        self.ends = ends

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(2, np.float32), 1.0, self.t >= self.ends, False, {}


@pytest.mark.parametrize("total, episodes, times, declares, steps, cut", [
    (64, 2, 1, None, 1_000, True), (1_999, 2, 1, None, 1_000, True), (3_001, 2, 1, None, 1_500, True),
    (3e3, 2, 1, None, 1_500, True), (12_000, 2, 4, None, 1_500, True), (11_999, 3, 10, None, 1_000, True),
    (64, 2, 1, 1_200, 1_200, False), (3_000, 2, 1, 1_200, 1_200, False), (64, 2, 1, 30, 30, False),
    (20_000, 2, 2, None, 5_000, True), (30_000, 2, 2, None, 5_000, True), (64, 2, 10, 5_002, 5_000, True),
    (64, 1, 1, 5_002, 5_002, False),
    pytest.param(28_000, 1, 1, None, 27_000, True, marks=pytest.mark.slow),
    pytest.param(64, 1, 1, 30_000, 27_000, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_how_long_an_episode_may_be_follows_from_training_and_environment(
    total, episodes, times, declares, steps, cut, register
):
    args = ppo.Args(register(Endless, max_episode_steps=declares), total_timesteps=total, hidden_sizes=())
    agent = ppo.Agent(**ppo.look(args))
    scores = ppo.evaluate(agent, args, episodes, times=times)
    assert scores.tolist() == [[steps] * episodes, [steps] * episodes, [cut] * episodes]


@pytest.mark.parametrize("N", [1, 2, 5])
def test_scores_tell_how_many_episodes_were_cut_and_where(N, register, main):
    made = iter(range(10**6))
    env_id = register(lambda: Endless(7 if next(made) % 5 < 2 else math.inf))
    few = ["--num-envs", N, "--total-timesteps", 256 * N]
    code, out, err = main("--env-id", env_id, *SHORT, *few, "--eval-episodes", 5)
    assert code == 0, err
    results = json.loads(Path("runs/it/results.json").read_text())
    cut = results["episode_lengths"].count(1000)
    assert sorted(results["episode_lengths"]) == [7] * (5 - cut) + [1000] * cut and 0 < cut < 5
    assert results["episode_returns"] == results["episode_lengths"]
    assert results["episodes"] == f"5 greedy episodes, {cut} of them cut at 1,000 steps"
    assert "\nscoring: 5 greedy episodes\n" in out and f" over {results['episodes']}\n" in out
    assert f"** over {results['episodes']}, after " in ppo.model_card(ppo.Args(env_id), "me/it", results)


def test_scores_of_whole_episodes_speak_of_no_cut(register, main):
    code, out, err = main("--env-id", register(partial(Endless, 7)), *SHORT, "--no-deterministic")
    assert code == 0, err
    results = json.loads(Path("runs/it/results.json").read_text())
    assert results["episodes"] == "5 sampled episodes" and results["episode_lengths"] == [7] * 5
    assert "\nscoring: 5 sampled episodes\n" in out and " over 5 sampled episodes\n" in out
    assert (results["device"], results["ranks"]) == ("cpu", 1) and "settings" not in results


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_worlds_that_draw_from_the_generators_of_python_and_numpy_repeat(mode, register, main):
    env_id, runs = register(partial(Dice, Discrete(2))), []
    for name in "first", "again":  # whatever was drawn before
        worlds = ppo.Worlds(ppo.Args(env_id, vectorization=mode), [1, 2])
        seen = [worlds.obs.tolist() for _ in range(9) if worlds.step(torch.zeros(2).long())]
        worlds.envs.close()
        assert len(np.unique(seen)) == 9 * 2 * 2
        assert main("--env-id", env_id, *SHORT, "--vectorization", mode, "--run-name", name)[0] == 0
        scores = json.loads(Path("runs", name, "results.json").read_text())["episode_returns"]
        runs.append((seen, scores, Path("runs", name, "model.safetensors").read_bytes()))
    assert runs[0] == runs[1]


def test_parts_that_cannot_be_seen_are_named_and_left_out(register, main):
    inner = Tuple([Sequence(Discrete(2)), Discrete(3)])
    space = Dict(word=Text(5), graph=Graph(Discrete(2), None), seen=Box(-1, 1, (2,)), inner=inner)
    ppo.print_once.cache_clear()
    code, out, err = main("--env-id", register(lambda: Anything(space, Discrete(2), [])), *SHORT)
    lines = {line for line in out.splitlines() if out.count(line) == 1}
    assert code == 0 and lines > {"not seen: graph, Graph", "not seen: inner/0, Sequence", "not seen: word, Text"}, err
    agent = ppo.Agent.from_pretrained("runs/it", strict=True)
    assert agent.width == 5 and agent.predict(space.sample()) in (0, 1)
