"""A rollout needs only actions: their log-probabilities, and the values, can be computed afterwards, all in one batch.

That is true only if the stored observations are those that the actions were chosen from, and the policy is the same.
"""

import copy
import os

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

import ppo

T, N, ITERATIONS = 12, 4, 3
ACTIONS = {
    "Discrete": gym.spaces.Discrete(5),
    "Discrete from 3": gym.spaces.Discrete(3, start=3),
    "MultiDiscrete": gym.spaces.MultiDiscrete([2, 3, 4]),
    "MultiDiscrete in two axes": gym.spaces.MultiDiscrete([[2, 3], [4, 2]]),
    "MultiBinary": gym.spaces.MultiBinary(3),
    "Box": gym.spaces.Box(-0.5, 1.5, (2,)),
    "Box in two axes": gym.spaces.Box(-1, 1, (2, 3)),
}
SHAPES = {"vector": (10,), "image": (2, 36, 36), "image, channels last": (36, 40, 3)}


class Echo(gym.Env):
    """Observes noise behind an echo of the action that it was given; ends now and then, in both ways."""

    def __init__(self, actions, obs):
        self.action_space, self.image = ACTIONS[actions], obs != "vector"
        low, high = (0, 255) if self.image else (-np.inf, np.inf)
        self.observation_space = gym.spaces.Box(low, high, SHAPES[obs], np.uint8 if self.image else np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def observe(self, action=None):
        shape, dtype = self.observation_space.shape, self.observation_space.dtype
        if self.image:  # stripes
            noise = self.np_random.integers(256, size=(shape[0], 1, shape[2])).repeat(shape[1], 1)
        else:
            noise = self.np_random.normal(2, 3, size=shape)
        obs = (self.np_random.random() * noise).astype(dtype)
        if action is not None:
            obs.flat[: np.size(action)] = pixels(action) if self.image else np.ravel(action)
        return obs

    def step(self, action):
        terminated, truncated = (self.np_random.random(2) < 0.1).tolist()
        reward = float(np.sum(action) * self.np_random.normal())
        return self.observe(action), reward, terminated, truncated, {}


def pixels(action):
    return np.round(50 + 100 * np.ravel(action) / 4).astype(np.uint8)


gym.register("replay/Echo-v0", Echo)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """At these sizes a second thread only gets in the way, of images too."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture(autouse=True)
def decided(monkeypatch):
    """An actor that starts with a clear opinion of each observation, so that a choice from another one shows."""
    mlp = ppo.mlp
    monkeypatch.setattr(ppo, "mlp", lambda sizes, activation, gain: mlp(sizes, activation, 4.0 if gain < 1 else gain))


def echo(kind, obs, **kwargs):
    lr = 1e-2 if obs == "vector" else 1e-3
    return settings(env_id="replay/Echo-v0", env_kwargs={"actions": kind, "obs": obs}, learning_rate=lr, **kwargs)


def settings(**kwargs):
    usual = {"num_steps": T, "num_envs": N, "total_timesteps": ITERATIONS * T * N, "num_minibatches": 2,
             "update_epochs": 2, "learning_rate": 1e-2, "hidden_sizes": (8,), "device": "cpu",
             "validation_episodes": 0, "checkpoint_every": 2, "run_name": "run"}  # fmt: skip
    return ppo.Args(**usual | kwargs)


def watch_collect(monkeypatch, check):
    """After each rollout of `train` call check(agent, worlds, rollout, noise), with the noise that was drawn for it."""
    collect = ppo.collect

    def spy(agent, worlds, rollout):
        with torch.random.fork_rng():
            noise, drawn = agent.sample_noise(*rollout.rewards.shape), torch.get_rng_state()
        before = copy.deepcopy(agent.state_dict())
        collect(agent, worlds, rollout)
        assert all(x.equal(before[name]) for name, x in agent.state_dict().items())  # the policy stood still
        assert drawn.equal(torch.get_rng_state())  # that noise, and nothing else
        check(agent, worlds, rollout, noise)

    monkeypatch.setattr(ppo, "collect", spy)


def margin(noisy, nvec):
    """By how much the best choice exceeds the second best, [...], at the closest component."""
    best = [part.topk(2).values for part in noisy.split(nvec, -1)]
    return torch.stack([x[..., 0] - x[..., 1] for x in best]).min(0).values


def check_actions(agent, rollout, noise):
    """Each action must be the choice that its own noise makes from its own observation; recomputed in one batch."""

    def choose(obs, noise):
        return agent.policy(agent.encode(obs), obs).choose(noise.flatten(0, 1)).view(rollout.actions.shape)

    obs = rollout.obs[:-1].flatten(0, 1)
    policy, choice = agent.policy(agent.encode(obs), obs), choose(obs, noise)
    for other in (choose(obs.roll(1, 0), noise), choose(obs, noise.roll(1, 1))):  # another one's would be seen
        assert (other != choice).float().mean() > 0.03
    if agent.nvec is None:
        assert rollout.actions.dtype == torch.float32
        torch.testing.assert_close(choice, rollout.actions, rtol=1e-6, atol=1e-6)
        return
    assert rollout.actions.dtype == torch.int64
    certain = (margin(policy.logits + noise.flatten(0, 1), agent.nvec) > 1e-5).view(rollout.rewards.shape)
    assert certain.float().mean() > 0.95
    assert choice[certain].equal(rollout.actions[certain])


def check_echoes(worlds, rollout):
    """What an environment was given is what was stored at that step; resets take no action."""
    size = int(np.prod(worlds.action["shape"], dtype=int))
    for t, n in np.argwhere(rollout.valid):
        given, seen = ppo.to_env(rollout.actions[t, n], worlds.action), rollout.obs[t + 1, n, :size].numpy()
        np.testing.assert_array_equal(seen, pixels(given) if rollout.obs.dtype == torch.uint8 else np.ravel(given))


CASES = [(kind, "vector", norm_obs) for kind in ACTIONS for norm_obs in (False, True)]
CASES += [(kind, "image", False) for kind in ACTIONS]
CASES += [(kind, "image, channels last", False) for kind in ("MultiDiscrete", "Box")]


@pytest.mark.parametrize("kind, obs, norm_obs", CASES)
def test_the_action_taken_is_the_choice_recomputed_from_the_stored_observation_and_its_noise(
    monkeypatch, kind, obs, norm_obs
):
    agents, taken = [], []

    @torch.no_grad()
    def check(agent, worlds, rollout, noise):
        check_actions(agent, rollout, noise)
        check_echoes(worlds, rollout)
        agents.append(torch.cat([p.flatten() for p in agent.actor.parameters()]))
        taken.append(rollout.actions.clone())

    watch_collect(monkeypatch, check)
    ppo.train(echo(kind, obs, norm_obs=norm_obs))
    moved = [not a.equal(b) for a, b in zip(agents, agents[1:])]
    assert moved == [not norm_obs, True]  # it learned in between; the first rollout may fill the statistics only
    assert len(torch.cat(taken).flatten(0, 1).unique(dim=0)) > 2


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "FrozenLake-v1"])
@pytest.mark.parametrize("norm_obs", [False, True], ids=["raw", "norm_obs"])
def test_the_same_holds_in_worlds_of_gymnasium(monkeypatch, env_id, norm_obs):
    """The native ones of CartPole write the next observation over the last; FrozenLake's is made one-hot."""
    seen = []

    @torch.no_grad()
    def check(agent, worlds, rollout, noise):
        check_actions(agent, rollout, noise)
        seen.append(rollout.obs.flatten(0, 1).unique(dim=0))

    watch_collect(monkeypatch, check)
    ppo.train(settings(env_id=env_id, norm_obs=norm_obs, num_steps=64, total_timesteps=64 * N * ITERATIONS))
    assert len(seen) == ITERATIONS and min(map(len, seen)) > 4


def float64_steps(agent, rollout):
    """Log-probabilities [T, N] and values [T+1, N] by a loop over steps and environments, in float64."""
    parts = {name: copy.deepcopy(part).double() for name, part in agent.named_children()}
    logprobs = torch.zeros(rollout.rewards.shape, dtype=torch.float64)
    values = torch.zeros(rollout.obs.shape[:2], dtype=torch.float64)
    for t, n in np.ndindex(values.shape):
        x = rollout.obs[t, n].double().view(agent.parts[0]["shape"])
        if x.ndim == 3:
            x = x if x.shape[0] < x.shape[2] else x.permute(2, 0, 1)
            x = x[None] / 255
            for layer in parts["trunk"][0]:  # its own `forward` would scale once more
                x = layer(x)
            x = x[0]
        elif agent.settings.norm_obs:
            stats = agent.obs_stats
            x = ((x - stats.mean) / (stats.var + 1e-8).sqrt()).clamp(-10, 10)
        values[t, n] = parts["critic"](x)
        if t == len(logprobs):
            continue
        out, action = parts["actor"](x), rollout.actions[t, n].flatten()
        if agent.nvec is None:
            logprobs[t, n] = Independent(Normal(out, agent.logstd.double().exp()), 1).log_prob(action.double())
        else:
            components = zip(out.split(agent.nvec), action)
            logprobs[t, n] = sum(Categorical(logits=logits).log_prob(a) for logits, a in components)
    return logprobs, values


def watch_estimate(monkeypatch):
    """Check what `estimate` returns in each iteration; how far its log-probabilities and values spread."""
    estimate, found = ppo.estimate, []

    @torch.no_grad()
    def spy(agent, rollout, args):
        batch = estimate(agent, rollout, args)
        logprobs, values = float64_steps(agent, rollout)
        torch.testing.assert_close(batch.logprobs.double(), logprobs, rtol=0, atol=2e-5)
        torch.testing.assert_close(batch.values.double(), values[:-1], rtol=1e-5, atol=2e-5)
        numbers = [torch.as_tensor(x) for x in (rollout.rewards, rollout.terminated, rollout.done)]
        rewards = numbers[0] / agent.return_stats.std.double() if args.norm_reward else numbers[0]
        advantages = ppo.compute_gae(rewards, values, *numbers[1:], args.gamma, args.gae_lambda)
        torch.testing.assert_close(batch.advantages.double(), advantages, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.returns.double(), advantages + values[:-1], rtol=1e-4, atol=1e-4)
        found.append((logprobs.std(), values.std()))
        return batch

    monkeypatch.setattr(ppo, "estimate", spy)
    return found


@pytest.mark.parametrize("kind, obs, norm_obs", CASES)
def test_replayed_log_probabilities_and_values_are_those_of_a_step_by_step_loop_in_float64(
    monkeypatch, kind, obs, norm_obs
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # of a machine without bfloat16
    found = watch_estimate(monkeypatch)
    ppo.train(echo(kind, obs, norm_obs=norm_obs))
    assert len(found) == ITERATIONS
    assert min(found[-1]) > 1e-3  # they differ from row to row, by more than the tolerance
