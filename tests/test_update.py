"""What one iteration does to the agent: initial weights, losses, the update, its schedule, its logs, its statistics."""

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import scalars

import ppo


class Noise(gym.Env):
    """Random observations and endings of both kinds; the reward depends on observation and action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,))

    def __init__(self, continuous=False):
        self.action_space = gym.spaces.Box(-0.5, 0.5, (2,)) if continuous else gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def observe(self):
        return self.np_random.normal(5, 2, size=4).astype(np.float32)

    def step(self, action):
        obs = self.observe()
        terminated, truncated = (self.np_random.random(2) < 0.1).tolist()
        return obs, float(obs[0] * np.sum(action)), terminated, truncated, {}


class TwoSteps(gym.Env):
    """Reward 1 in each of the two steps of an episode."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)

    def __init__(self, truncate):
        self.truncate = truncate

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        end = self.steps == 2
        return np.zeros(1, np.float32), 1.0, end and not self.truncate, end and self.truncate, {}


gym.register("update/Noise-v0", Noise)
gym.register("update/TwoSteps-v0", TwoSteps)

B = 16 * 4  # rows of a rollout
torch.set_num_threads(1)  # at these sizes a second thread only gets in the way


def quick(iterations=1, env_id="update/Noise-v0", **kwargs):
    settings = {"num_steps": 16, "num_envs": 4, "num_minibatches": 2, "update_epochs": 3, "learning_rate": 1e-2,
                "hidden_sizes": (8,), "validation_episodes": 0, "checkpoint_every": 999, "run_name": "run"}  # fmt: skip
    return ppo.Args(env_id=env_id, total_timesteps=iterations * B, **settings | kwargs)


def record(monkeypatch, name):
    """[(arguments, result), ...] of the calls of a function of ppo; arguments as they were at the time of the call."""
    calls, function = [], getattr(ppo, name)

    def spy(*args):
        before = copy.deepcopy(args)
        calls.append((before, result := function(*args)))
        return result

    monkeypatch.setattr(ppo, name, spy)
    return calls


def fresh(obs=Noise.observation_space, continuous=False, hidden_sizes=(8,), **settings):
    action = ppo.describe_action(Noise(continuous).action_space, True)
    return ppo.Agent(ppo.describe(obs), action, hidden_sizes=hidden_sizes, **settings)


# Initial weights


@pytest.mark.parametrize("shape", [(6,), (4, 36, 40)], ids=["vector", "image"])
def test_weights_start_orthogonal_with_the_gain_of_their_layer_and_biases_at_zero(shape):
    agent = fresh(gym.spaces.Box(0, 255, shape, np.uint8), hidden_sizes=[32, 16])
    layers = [m for m in agent.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert len(layers) == (6 if len(shape) == 1 else 10)
    for layer in layers:
        gain = 0.01 if layer is agent.actor[-1] else 1 if layer is agent.critic[-1] else 2**0.5
        singular = torch.linalg.svdvals(layer.weight.detach().flatten(1))
        torch.testing.assert_close(singular, torch.full_like(singular, gain), rtol=1e-4, atol=0)
        assert not layer.bias.any()


# The losses of one minibatch


def minibatch(agent, n=32):
    """Random rows, with the log-probabilities and values of the agent itself."""
    obs = torch.randn(n, 4)
    with torch.no_grad():
        actions = agent.act(obs, agent.sample_noise(n))
        logprobs, _, values = agent.replay(SimpleNamespace(obs=obs, actions=actions))
    return ppo.Batch(obs, actions, logprobs, values, advantages=torch.randn(n), returns=torch.randn(n))


def gradients(agent, batch, **kwargs):
    """{name of a parameter: its part of the gradient}; and the metrics."""
    gradient, metrics = ppo.compute_gradient(agent, batch, quick(**kwargs))
    parts = gradient.split([p.numel() for p in agent.parameters()])
    return dict(zip((name for name, _ in agent.named_parameters()), parts)), metrics


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_the_value_loss_alone_leaves_the_gradient_of_the_actor_zero(continuous):
    agent = fresh(continuous=continuous)
    batch = minibatch(agent)
    found, _ = gradients(agent, replace(batch, advantages=0 * batch.advantages), ent_coef=0.0)
    assert not any(g.any() for name, g in found.items() if not name.startswith("critic"))
    assert all(g.any() for name, g in found.items() if name.startswith("critic"))


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_the_policy_loss_alone_leaves_the_gradient_of_the_critic_zero(continuous):
    agent = fresh(continuous=continuous)
    found, _ = gradients(agent, minibatch(agent), vf_coef=0.0)
    assert all(g.any() for name, g in found.items() if name.startswith("actor"))
    assert not any(g.any() for name, g in found.items() if name.startswith("critic"))


def test_the_entropy_bonus_raises_the_entropy():
    agent = fresh(continuous=True)
    batch = minibatch(agent)
    found, _ = gradients(agent, replace(batch, advantages=0 * batch.advantages), ent_coef=0.1, vf_coef=0.0)
    assert found["logstd"].tolist() == pytest.approx([-0.1, -0.1])  # dH/dlogstd = 1, and the optimiser descends


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_the_metrics_are_the_parts_of_the_objective_and_what_is_known_of_the_divergence(continuous):
    agent = fresh(continuous=continuous)
    batch = minibatch(agent)
    moved = replace(batch, logprobs=batch.logprobs - 0.5 * torch.randn(32), values=batch.values + torch.randn(32))
    _, entropies, _ = agent.replay(moved)
    _, metrics = gradients(agent, moved, clip_coef=0.3)
    logratio = (batch.logprobs - moved.logprobs).double()
    ratio = logratio.exp()
    surrogate = torch.minimum(ratio * moved.advantages, ratio.clip(0.7, 1.3) * moved.advantages)
    clipped = moved.values + (batch.values - moved.values).clip(-0.3, 0.3)
    errors = torch.maximum((batch.values - moved.returns) ** 2, (clipped - moved.returns) ** 2)
    expected = {
        "policy_loss": -surrogate.mean(),
        "value_loss": errors.mean() / 2,
        "entropy": entropies.mean(),
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),
        "clipfrac": ((ratio < 0.7) | (ratio > 1.3)).double().mean(),
    }
    assert list(metrics) == list(expected)
    assert 0 < metrics["clipfrac"] < 1
    for name, value in metrics.items():
        assert not value.requires_grad
        assert value.item() == pytest.approx(expected[name].item(), abs=1e-5)

    _, metrics = gradients(agent, moved, clip_coef=0.3, clip_vloss=False)
    assert metrics["value_loss"].item() == pytest.approx(((batch.values - moved.returns) ** 2).mean().item() / 2)
    assert metrics["value_loss"] < 0.9 * expected["value_loss"]


# The whole update


def reference_update(weights, obs, actions, rewards, terminated, done, rows, args):
    """Weights after one iteration, independently: float64, GAE and Adam by hand, torch.distributions, autograd."""
    obs, actions, rewards = obs.double(), actions.double(), rewards.double()
    weights = {name: w.double().requires_grad_() for name, w in weights.items() if "stats" not in name}

    def mlp(name, x):
        w = {key: weights[f"{name}.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias")}
        return torch.tanh(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]

    def policy(x):
        if "logstd" in weights:
            normal = torch.distributions.Normal(mlp("actor", x), weights["logstd"].exp())
            return torch.distributions.Independent(normal, 1)
        return torch.distributions.Categorical(logits=mlp("actor", x))

    with torch.no_grad():
        old_values, old_logprobs = mlp("critic", obs)[..., 0], policy(obs[:-1]).log_prob(actions)
        advantages = torch.zeros_like(rewards)
        for t, i in itertools.product(reversed(range(len(rewards))), range(rewards.shape[1])):
            future = 0 if terminated[t, i] else args.gamma * old_values[t + 1, i]
            advantages[t, i] = rewards[t, i] + future - old_values[t, i]
            if t + 1 < len(rewards) and not done[t, i]:
                advantages[t, i] += args.gamma * args.gae_lambda * advantages[t + 1, i]
        returns = advantages + old_values[:-1]

    parameters, norms = list(weights.values()), []
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in parameters]
    for row in rows.flatten(0, 1):
        t, i = row // rewards.shape[1], row % rewards.shape[1]
        advantage, old_value = advantages[t, i], old_values[t, i]
        advantage = (advantage - advantage.mean()) / advantage.std(correction=0)
        distribution, value = policy(obs[t, i]), mlp("critic", obs[t, i])[:, 0]
        ratio = (distribution.log_prob(actions[t, i]) - old_logprobs[t, i]).exp()
        low, high = 1 - args.clip_coef, 1 + args.clip_coef
        surrogate = torch.minimum(ratio * advantage, ratio.clip(low, high) * advantage)
        clipped = old_value + (value - old_value).clip(-args.clip_coef, args.clip_coef)
        error = torch.maximum((value - returns[t, i]) ** 2, (clipped - returns[t, i]) ** 2)
        objective = surrogate - args.vf_coef * error / 2 + args.ent_coef * distribution.entropy()
        gradients = torch.autograd.grad(-objective.mean(), parameters)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
        step = len(norms)
        for w, g, (m, v) in zip(parameters, gradients, moments):
            g = g * min(1, args.max_grad_norm / norms[-1])
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g**2)
            w.data -= args.learning_rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-5)
    assert min(norms) < args.max_grad_norm < max(norms)  # clipped, but not always
    return weights


@pytest.mark.parametrize("continuous, max_grad_norm", [(False, 20.0), (True, 1.0)], ids=["discrete", "continuous"])
def test_a_whole_update_equals_a_float64_reference(monkeypatch, continuous, max_grad_norm):
    estimated, shuffled = (record(monkeypatch, name) for name in ("estimate", "shuffle"))
    args = quick(env_kwargs={"continuous": continuous}, clip_coef=0.1, ent_coef=0.05, max_grad_norm=max_grad_norm)
    trained = ppo.train(args).agent.state_dict()
    [((agent, rollout, _), _)] = estimated
    rows = torch.stack([order for _, order in shuffled]).view(3, 2, B // 2)  # of three epochs, counted time by time
    weights = {name: w.clone() for name, w in agent.state_dict().items()}
    numbers = map(torch.tensor, (rollout.rewards, rollout.terminated, rollout.done))
    expected = reference_update(weights, rollout.obs, rollout.actions, *numbers, rows, args)
    for name, value in expected.items():
        assert (value - weights[name]).abs().max() > 1e-3
        torch.testing.assert_close(trained[name].double(), value.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "kwargs", [{}, {"env_kwargs": {"continuous": True}}, {"norm_obs": True}], ids=["discrete", "continuous", "norm_obs"]
)
def test_the_first_minibatch_has_ratio_one_and_no_divergence(kwargs):
    args = quick(iterations=8, update_epochs=1, num_minibatches=1, **kwargs)  # the first is the only one
    logs = scalars(ppo.train(args).args.run)
    for tag in ("approx_kl", "old_approx_kl", "clipfrac", "policy_loss"):  # standardised advantages have mean 0
        values = [value for _, value in logs[f"losses/{tag}"]]
        assert len(values) == 8 - args.norm_obs  # the statistics take the first rollout
        assert values == pytest.approx([0] * len(values), abs=1e-5)


# The schedule


def epoch_divergences(steps, args):
    """The mean approximate KL of each epoch that was run, of one iteration."""
    kl = torch.stack([metrics["approx_kl"] for _, (_, metrics) in steps])
    return kl.view(-1, args.num_minibatches).mean(1).tolist()


def test_epochs_stop_after_the_first_whose_divergence_exceeds_the_target(monkeypatch):
    args = quick(update_epochs=10)
    steps = record(monkeypatch, "compute_gradient")
    ppo.train(args)
    kl = epoch_divergences(steps, args)
    assert len(kl) == 10 and 1.001 * max(kl[:3]) < kl[3]

    steps.clear()
    args = quick(update_epochs=10, target_kl=1.001 * max(kl[:3]), run_name="stopped")
    ppo.train(args)
    assert epoch_divergences(steps, args) == kl[:4]


def test_epochs_run_to_the_end_below_the_target(monkeypatch):
    steps = record(monkeypatch, "compute_gradient")
    ppo.train(quick(iterations=3, target_kl=1e6))
    assert len(steps) == 3 * 3 * 2


@pytest.mark.parametrize("anneal_lr, expected", [(True, [4e-3, 3e-3, 2e-3, 1e-3]), (False, [4e-3] * 4)])
def test_the_learning_rate_is_annealed_linearly_to_zero_and_logged(monkeypatch, anneal_lr, expected):
    used, step = [], ppo.Adam.step
    monkeypatch.setattr(ppo.Adam, "step", lambda *args: (used.append(args[-1]), step(*args)))
    ppo.train(quick(iterations=4, learning_rate=4e-3, anneal_lr=anneal_lr))
    assert used == pytest.approx(np.repeat(expected, 3 * 2))  # epochs x minibatches
    assert [value for _, value in scalars("runs/run")["charts/learning_rate"]] == pytest.approx(expected)


# The logs


def test_logged_losses_are_means_over_all_minibatches_of_the_iteration(monkeypatch):
    steps = record(monkeypatch, "compute_gradient")
    logs = scalars(ppo.train(quick(iterations=3)).args.run)
    names = list(steps[0][1][1])
    assert names[-1] == "gradient_norm" and len(names) == 7
    means = torch.stack([torch.stack(list(metrics.values())) for _, (_, metrics) in steps]).view(3, 3 * 2, 7).mean(1)
    for name, expected in zip(names, means.unbind(1)):
        assert [value for _, value in logs[f"losses/{name}"]] == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_logged_explained_variance_is_one_minus_the_unexplained_share_of_the_valid_rows(monkeypatch):
    estimated = record(monkeypatch, "estimate")
    logs = scalars(ppo.train(quick(iterations=3)).args.run)
    shares = []
    for (_, rollout, _), batch in estimated:
        assert not rollout.valid.all()
        values, returns = (x.numpy()[rollout.valid].astype(float) for x in (batch.values, batch.returns))
        shares.append(1 - np.var(returns - values) / np.var(returns))
    assert [value for _, value in logs["losses/explained_variance"]] == pytest.approx(shares, abs=1e-5)


# What is learned from: rewards and observations


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, [[0, 0.5, -3], [100, -100, 1]]),
        ({"clip_reward": True}, [[0, 1, -1], [1, -1, 1]]),
        ({"norm_reward": True}, [[0, 0.25, -1.5], [10, -10, 0.5]]),  # over their deviation, within 10
    ],
    ids=["raw", "clip_reward", "norm_reward"],
)
def test_rewards_are_learned_from_as_they_are_or_by_their_sign_or_scaled_and_clipped(monkeypatch, kwargs, expected):
    agent = fresh()
    agent.return_stats.update(torch.tensor([1.0, 5.0]))  # mean 3, deviation 2
    rollout = ppo.Rollout.empty(agent, ppo.Worlds(quick(), [1, 2, 3]), 2)
    rollout.rewards[:] = raw = [[0, 0.5, -3], [100, -100, 1]]
    estimated = record(monkeypatch, "compute_gae")
    ppo.estimate(agent, rollout, quick(iterations=2, **kwargs))
    [((rewards, *_), _)] = estimated
    torch.testing.assert_close(rewards, torch.tensor(expected, dtype=torch.float32))
    assert rollout.rewards.tolist() == raw  # which the logs report


def test_observations_are_standardised_by_the_statistics_and_clipped():
    pair = gym.spaces.Box(-np.inf, np.inf, (2,))
    agent = fresh(pair, norm_obs=True)
    agent.obs_stats.update(torch.tensor([[1.0, -10.0], [5.0, 30.0]]))  # means 3 and 10, deviations 2 and 20
    seen = agent.encode(torch.tensor([[3.0, 10.0], [4.0, -10.0], [22.9, -189.0], [1000.0, -1000.0]]))
    torch.testing.assert_close(seen, torch.tensor([[0.0, 0.0], [0.5, -1.0], [9.95, -9.95], [10.0, -10.0]]))
    raw = torch.tensor([[1000.0, -1000.0]])
    assert fresh(pair).encode(raw).equal(raw)


# The running statistics


@pytest.mark.parametrize("norm_obs, norm_reward", [(True, True), (True, False), (False, True), (False, False)])
def test_statistics_stand_still_while_an_iteration_collects_and_learns(monkeypatch, norm_obs, norm_reward):
    events = []

    def watch(owner, name, event):
        function = getattr(owner, name)

        def spy(agent, *args):
            stats = (agent.obs_stats, agent.return_stats)
            seen = [x for s in stats for x in torch.stack([s.count, s.mean, s.var]).flatten().tolist()]
            events.append((event, seen))
            return function(agent, *args)

        monkeypatch.setattr(owner, name, spy)

    watch(ppo.Agent, "act", "act")
    watch(ppo, "estimate", "estimate")
    watch(ppo, "compute_gradient", "learn")
    ppo.train(quick(iterations=4, norm_obs=norm_obs, norm_reward=norm_reward))
    stretches = [[event for event, _ in group] for _, group in itertools.groupby(events, key=lambda e: e[1])]
    collected = ["act"] * 16 + ["estimate"]
    whole = collected + ["learn"] * 3 * 2
    if norm_obs or norm_reward:
        assert stretches == [collected, whole, whole, whole]  # the first rollout only fills the statistics
    else:
        assert stretches == [4 * whole]


def test_statistics_see_each_transition_once_and_no_reset_row(monkeypatch):
    estimated = record(monkeypatch, "estimate")
    args = quick(iterations=4, norm_obs=True, norm_reward=True)
    agent = ppo.train(args).agent
    rollouts = [rollout for (_, rollout, _), _ in estimated]
    valid, done = (np.concatenate([getattr(rollout, name) for rollout in rollouts]) for name in ("valid", "done"))
    assert valid[0].all() and (valid[1:] == ~done[:-1]).all()  # a reset row, and no other, follows each end
    rows = torch.cat([rollout.obs[:-1][rollout.valid] for rollout in rollouts]).double()
    assert 0 < len(rows) < 4 * B
    assert agent.return_stats.count == len(rows)
    torch.testing.assert_close(agent.obs_stats.mean, rows.mean(0))
    torch.testing.assert_close(agent.obs_stats.var, rows.var(0, correction=0))


@pytest.mark.parametrize("truncate", [False, True], ids=["terminated", "truncated"])
def test_reward_scaling_forgets_an_episode_at_its_end(monkeypatch, truncate):
    """Discounted returns so far are 1 and 1 + gamma, in episodes that rollouts of 16 rows cut in two: 3 rows each."""
    estimated = record(monkeypatch, "compute_gae")
    env = {"env_id": "update/TwoSteps-v0", "env_kwargs": {"truncate": truncate}}
    args = quick(iterations=3, norm_reward=True, gamma=0.5, **env)
    agent = ppo.train(args).agent
    assert agent.return_stats.mean.item() == pytest.approx(1.25)
    assert agent.return_stats.var.item() == pytest.approx(0.25**2)
    (rewards, *_), _ = estimated[1]  # the first one learned from
    assert sorted(set(rewards.flatten().tolist())) == pytest.approx([0, 4], abs=0.1)  # a reset row has none
