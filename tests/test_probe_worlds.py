"""Worlds so small that their true values are known, each failing for one kind of mistake, learned through ppo.train."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo

GAMMA = 0.9
MARKER = 99.0  # the terminal observation: no value or action is ever learned for it
TERMINATED, TRUNCATED = "terminated", "truncated"


class World(gym.Env):
    """Observes one number, drawn from `starts` at first; rules(obs, action) -> next obs, reward, its end or None."""

    observation_space = gym.spaces.Box(-100, 100, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, starts, rules):
        self.starts, self.rules = starts, rules

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.choice(self.starts)
        return np.float32([self.obs]), {}

    def step(self, action):
        self.obs, reward, end = self.rules(self.obs, action)
        return np.float32([self.obs]), reward, end == TERMINATED, end == TRUNCATED, {}


for name, starts, rules in (
    ("ConstantReward", [0], lambda obs, action: (MARKER, 1, TERMINATED)),
    ("ObsReward", [-1, 1], lambda obs, action: (MARKER, obs, TERMINATED)),
    ("TwoSteps", [0], lambda obs, action: (MARKER, 1, TERMINATED) if obs else (1, 0, None)),
    ("ActionReward", [0], lambda obs, action: (MARKER, 1 if action else -1, TERMINATED)),
    ("ObsActionReward", [-1, 1], lambda obs, action: (MARKER, 1 if action == (obs > 0) else -1, TERMINATED)),
    ("TruncOne", [-1, 1], lambda obs, action: (obs, 1 if obs > 0 else 0, TRUNCATED)),
    ("TermOne", [0, 1], lambda obs, action: (MARKER, 1, TERMINATED)),
):
    gym.register(f"probe/{name}-v0", World, kwargs={"starts": starts, "rules": rules})


def learn(world, **kwargs):
    """The agent that training saved."""
    settings = {"total_timesteps": 1_600, "num_envs": 8, "num_steps": 7, "num_minibatches": 1, "update_epochs": 6,
                "learning_rate": 1e-2, "gamma": GAMMA, "ent_coef": 0.0, "clip_vloss": False, "hidden_sizes": (16,),
                "validation_episodes": 0, "checkpoint_every": 1_000} | kwargs  # fmt: skip
    args = ppo.Args(env_id=f"probe/{world}-v0", run_name=world, **settings)
    return ppo.load_agent(str(ppo.train(args).args.run), args)


@torch.no_grad()
def predict(agent, *observations):
    return agent.critic(agent.encode(torch.tensor(observations)[:, None])).squeeze(-1).tolist()


def values(agent, *observations):
    return pytest.approx(predict(agent, *observations), abs=0.05)


def greedy(agent, *observations):
    return agent.act(torch.tensor(observations)[:, None]).tolist()


def test_a_constant_reward_is_its_value():
    assert values(learn("ConstantReward"), 0.0) == [1]


def test_a_reward_that_depends_on_the_observation_is_predicted_from_it():
    assert values(learn("ObsReward"), -1.0, 1.0) == [-1, 1]


def test_a_reward_one_step_later_is_discounted_once():
    assert values(learn("TwoSteps"), 0.0, 1.0) == [GAMMA, 1]


def test_the_rewarded_action_is_preferred():
    agent = learn("ActionReward")
    assert greedy(agent, 0.0) == [1]
    assert values(agent, 0.0) == [1]


def test_the_rewarded_action_is_found_for_each_observation():
    agent = learn("ObsActionReward")
    assert greedy(agent, -1.0, 1.0) == [0, 1]
    assert values(agent, -1.0, 1.0) == [1, 1]


def test_a_truncated_episode_is_worth_what_its_last_observation_promises():
    """V = r + 0.9 V, though no episode lasts longer than one step. With truncation taken for termination: 0 and 1;
    with a bootstrap from the reset observation, which is either start: 4.5 and 5.5."""
    agent = learn("TruncOne", total_timesteps=3_200, learning_rate=2e-2)
    low, high = predict(agent, -1.0, 1.0)
    assert low == pytest.approx(0, abs=0.3)
    assert high == pytest.approx(10, abs=0.3)


def test_the_terminal_observation_never_enters_a_minibatch(monkeypatch):
    seen, compute_gradient = [], ppo.compute_gradient

    def spy(agent, batch, args):
        seen.append(batch.obs.clone())
        return compute_gradient(agent, batch, args)

    monkeypatch.setattr(ppo, "compute_gradient", spy)
    agent = learn("TermOne", norm_obs=True)
    assert torch.cat(seen).unique().tolist() == [0, 1]
    assert agent.obs_stats.mean.item() == pytest.approx(0.5, abs=0.1)  # nor a statistic
    assert values(agent, 0.0, 1.0) == [1, 1]
