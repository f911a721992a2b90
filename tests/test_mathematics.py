"""The mathematics of PPO against hand numbers, brute force and other libraries."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch.distributions import Categorical, MultivariateNormal

import ppo

T, N = 60, 5
torch.set_num_threads(1)  # at these sizes a second thread only gets in the way


# Generalised advantage estimation


def random_rollout(seed):
    """rewards, values, terminated, truncated as NEXT_STEP environments leave them, float64, and the valid rows.

    The row after an end is its reset: no reward, no end of its own. values[t + 1] is that of the last observation if
    step t ended an episode, and values[t + 2] that of the reset one; all values are different."""
    rng = np.random.default_rng(seed)
    done, valid = rng.random((T, N)) < 0.25, np.ones((T, N), dtype=bool)
    for t in range(1, T):
        valid[t] = ~done[t - 1]
        done[t] &= valid[t]
    kind = rng.integers(3, size=(T, N))  # terminated, truncated, both at once
    terminated, truncated = done & (kind != 1), done & (kind != 0)
    return rng.normal(size=(T, N)) * valid, rng.normal(size=(T + 1, N)), terminated, truncated, valid


def brute_force_advantage(rewards, values, terminated, done, gamma, gae_lambda, t):
    """GAE Eq. 16 as it is defined: the exponentially weighted mean of all k-step advantages, for one environment."""
    estimates, collected = [], 0.0
    for k in range(t, len(rewards)):
        collected += gamma ** (k - t) * rewards[k]
        future = 0.0 if terminated[k] else gamma ** (k - t + 1) * values[k + 1]
        estimates.append(collected + future - values[t])
        if done[k]:
            break
    n = len(estimates)
    weights = [(1 - gae_lambda) * gae_lambda**k for k in range(n - 1)] + [gae_lambda ** (n - 1)]
    return np.dot(weights, estimates)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_gae_equals_the_brute_force_sum(gae_lambda):
    rewards, values, terminated, truncated, valid = random_rollout(seed=1)
    done = terminated | truncated
    advantages = ppo.compute_gae(*map(torch.tensor, (rewards, values, terminated, done)), 0.9, gae_lambda)
    assert advantages.dtype == torch.float64 and advantages.shape == (T, N)
    for t, i in np.argwhere(valid):
        columns = (x[:, i] for x in (rewards, values, terminated, done))
        assert abs(advantages[t, i] - brute_force_advantage(*columns, 0.9, gae_lambda, t)) < 1e-10


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_equals_stable_baselines3_which_has_no_reset_rows(gae_lambda):
    rewards, values, terminated, truncated, valid = (x[:, 0] for x in random_rollout(seed=2))
    done, n = terminated | truncated, valid.sum()
    advantages = ppo.compute_gae(*map(torch.tensor, (rewards, values, terminated, done)), 0.9, gae_lambda)

    space = gym.spaces.Discrete(2)
    buffer = RolloutBuffer(n, space, space, "cpu", gae_lambda, 0.9)
    bootstrap = 0.9 * values[1:] * (truncated & ~terminated)  # which Stable-Baselines3 adds to the reward
    buffer.rewards, buffer.values = (rewards + bootstrap)[valid, None], values[:-1][valid, None]
    buffer.episode_starts = np.append(True, done[valid][:-1])[:, None]
    buffer.compute_returns_and_advantage(torch.tensor(values[-1:]), done[valid][-1:])
    np.testing.assert_allclose(advantages[valid], buffer.advantages[:, 0], rtol=0, atol=1e-5)


def gae_of_an_end_in_the_first_row(terminated):
    """Rows: a last step with reward 1, its reset, a step with reward 5. Values: 2, last obs 10, reset obs 100, 1000."""
    rewards, values = torch.tensor([[1.0], [0.0], [5.0]]), torch.tensor([[2.0], [10.0], [100.0], [1000.0]])
    done = torch.tensor([[True], [False], [False]])
    return ppo.compute_gae(rewards, values, done & terminated, done, 0.5, 0.9).squeeze(1).tolist()


def test_a_lost_life_cuts_advantages_as_the_end_of_an_episode_does():
    g = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(9, 3, generator=g), torch.randn(10, 3, generator=g)
    terminated = torch.rand(9, 3, generator=g) < 0.3
    done = [torch.zeros_like(terminated), terminated]
    life, episode = (ppo.compute_gae(rewards, values, terminated, ended, 0.9, 0.8) for ended in done)
    assert life.equal(episode)


def test_a_termination_has_no_future_value():
    assert gae_of_an_end_in_the_first_row(terminated=True)[0] == 1 - 2


def test_a_truncation_is_bootstrapped_from_the_last_observation():
    assert gae_of_an_end_in_the_first_row(terminated=False)[0] == 1 + 0.5 * 10 - 2


def test_the_last_row_is_bootstrapped_from_the_observation_after_the_rollout():
    assert gae_of_an_end_in_the_first_row(terminated=True)[2] == 5 + 0.5 * 1000 - 100


# The clipped objective, epsilon 0.2, for one row: its loss and the gradient with respect to the log-ratio


def surrogate(ratio, advantage):
    logratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    loss = ppo.policy_loss(logratio, torch.tensor([advantage], dtype=torch.float64), 0.2)
    loss.backward()
    return pytest.approx((loss.item(), logratio.grad.item()), abs=1e-12)


def test_ratio_below_the_range_with_positive_advantage_is_not_clipped():
    assert surrogate(0.5, 2.0) == (-1.0, -1.0)


def test_ratio_below_the_range_with_negative_advantage_is_clipped_and_has_no_gradient():
    assert surrogate(0.5, -2.0) == (1.6, 0.0)


def test_ratio_inside_the_range_with_positive_advantage_is_not_clipped():
    assert surrogate(1.1, 2.0) == (-2.2, -2.2)


def test_ratio_inside_the_range_with_negative_advantage_is_not_clipped():
    assert surrogate(1.1, -2.0) == (2.2, 2.2)


def test_ratio_above_the_range_with_positive_advantage_is_clipped_and_has_no_gradient():
    assert surrogate(1.5, 2.0) == (-2.4, 0.0)


def test_ratio_above_the_range_with_negative_advantage_is_not_clipped():
    assert surrogate(1.5, -2.0) == (3.0, 3.0)


def test_the_policy_loss_is_the_mean_over_rows():
    ratios, advantages = torch.tensor([0.5, 0.5, 1.5, 1.5]), torch.tensor([2.0, -2.0, 2.0, -2.0])
    assert ppo.policy_loss(ratios.log(), advantages, 0.2).item() == pytest.approx((-1.0 + 1.6 - 2.4 + 3.0) / 4)


# The value loss: the value has moved from 0 to 1, a clipped one to 0.2


def value_loss(target, clip_coef):
    new = torch.ones(1, requires_grad=True)
    loss = ppo.value_loss(new, torch.zeros(1), torch.tensor([target]), clip_coef)
    loss.backward()
    return pytest.approx((loss.item(), new.grad.item()))


def test_the_value_loss_is_unclipped_where_that_error_is_larger():
    assert value_loss(target=-1.0, clip_coef=0.2) == (0.5 * 2.0**2, 2.0)


def test_the_value_loss_is_clipped_and_has_no_gradient_where_that_error_is_larger():
    assert value_loss(target=2.0, clip_coef=0.2) == (0.5 * 1.8**2, 0.0)


def test_the_value_loss_within_the_clip_range_is_half_the_squared_error():
    assert value_loss(target=2.0, clip_coef=1.5) == (0.5 * 1.0**2, -1.0)


def test_the_value_loss_without_a_clip_range_is_half_the_squared_error():
    assert value_loss(target=2.0, clip_coef=None) == (0.5 * 1.0**2, -1.0)


def test_the_value_loss_takes_the_larger_error_row_by_row():
    loss = ppo.value_loss(torch.ones(2), torch.zeros(2), torch.tensor([-1.0, 2.0]), 0.2)
    assert loss.item() == pytest.approx(0.5 * (2.0**2 + 1.8**2) / 2)


# Distributions


def test_gaussian_is_a_diagonal_multivariate_normal():
    mean, logstd, action = torch.randn(7, 2, 3), torch.tensor([-1.0, 0.0, 0.7]), torch.randn(7, 2, 3)
    logprob, entropy = ppo.Gaussian(mean, logstd).logprob_and_entropy(action)
    expected = MultivariateNormal(mean, torch.diag((2 * logstd).exp()))
    torch.testing.assert_close(logprob, expected.log_prob(action))
    torch.testing.assert_close(entropy, expected.entropy())


@pytest.mark.parametrize("nvec", [[5], [2, 3, 4]], ids=["Discrete", "MultiDiscrete"])
def test_categorical_is_the_sum_of_independent_categoricals(nvec):
    logits = 3 * torch.randn(7, 2, sum(nvec))
    action = torch.stack([torch.randint(n, (7, 2)) for n in nvec], -1)
    logprob, entropy = ppo.Categorical(logits, nvec).logprob_and_entropy(action)
    expected = [Categorical(logits=part) for part in logits.split(nvec, -1)]
    torch.testing.assert_close(logprob, sum(d.log_prob(a) for d, a in zip(expected, action.unbind(-1))))
    torch.testing.assert_close(entropy, sum(d.entropy() for d in expected))


def agent_with_outputs(outputs, **settings):
    """An agent whose actor gives these outputs for every observation: of five choices, or two numbers."""
    space = gym.spaces.MultiDiscrete([3, 2]) if len(outputs) == 5 else gym.spaces.Box(-np.inf, np.inf, (2,))
    parts, action = ppo.describe(gym.spaces.Box(-1, 1, (1,))), ppo.describe_action(space, True)
    torch.manual_seed(1)
    agent = ppo.Agent(parts, action, hidden_sizes=[4], **settings)
    torch.nn.init.zeros_(agent.actor[-1].weight)
    agent.actor[-1].bias.data = torch.tensor(outputs)
    return agent.requires_grad_(False)


def test_sampled_choices_are_as_frequent_as_the_softmax_says():
    first, second, n = [1.0, -1.0, 0.0], [0.5, 2.0], 100_000
    agent = agent_with_outputs(first + second)
    actions = agent.act(torch.zeros(n, 1), agent.sample_noise(n))
    frequencies = (actions @ torch.tensor([2, 1])).bincount(minlength=6).view(3, 2) / n  # of each pair
    expected = torch.outer(torch.tensor(first).softmax(0), torch.tensor(second).softmax(0))
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.01)


def test_sampled_box_actions_have_the_mean_and_deviation_of_the_gaussian():
    agent, n = agent_with_outputs([3.0, -1.0], logstd_init=-0.5), 100_000
    actions = agent.act(torch.zeros(n, 1), agent.sample_noise(n))
    torch.testing.assert_close(actions.mean(0), torch.tensor([3.0, -1.0]), rtol=0, atol=0.01)
    torch.testing.assert_close(actions.std(0), torch.full((2,), math.exp(-0.5)), rtol=0, atol=0.01)


def test_greedy_choices_are_the_most_probable_ones():
    agent = agent_with_outputs([1.0, -1.0, 0.0, 0.5, 2.0])
    assert agent.act(torch.zeros(4, 1)).tolist() == [[0, 1]] * 4


def test_greedy_box_actions_are_the_mean():
    agent = agent_with_outputs([3.0, -1.0])
    assert agent.act(torch.zeros(4, 1)).tolist() == [[3.0, -1.0]] * 4


# Rollout arithmetic and statistics


def test_standardize_gives_each_minibatch_zero_mean_and_unit_deviation():
    x = ppo.standardize(5 + torch.tensor([[[0.1]], [[1.0]], [[10.0]]]) * torch.randn(3, 4, 50))
    torch.testing.assert_close(x.mean(-1), torch.zeros(3, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(-1, correction=0), torch.ones(3, 4))


def test_standardize_keeps_a_minibatch_of_one_row_finite():
    assert ppo.standardize(torch.tensor([[3.0], [-7.0]])).tolist() == [[0.0], [0.0]]


def test_accumulate_equals_a_loop_over_each_episode():
    x, done, carry = np.random.default_rng(1).normal(size=(2, 30, 3)), np.zeros((2, 30, 3), dtype=bool), np.zeros(3)
    done[0, [4, 5, 29], [0, 0, 1]] = done[1, [0, 17], [2, 1]] = True
    sums = np.concatenate([ppo.accumulate(x[part], done[part], carry, 0.9) for part in (0, 1)])
    x, done = np.concatenate(x), np.concatenate(done)
    for i in range(3):
        start = 0
        for t in range(60):
            hand = sum(0.9 ** (t - k) * x[k, i] for k in range(start, t + 1))
            assert sums[t, i] == pytest.approx(hand, abs=1e-12)
            start = t + 1 if done[t, i] else start
    assert carry == pytest.approx(0.9 * sums[-1] * ~done[-1], abs=1e-12)


def numbered_batch():
    """A batch [16, 8] whose columns tell the number of their row."""
    row = torch.arange(128).view(16, 8)
    return ppo.Batch(row[..., None].expand(-1, -1, 3), row, *(row + shift for shift in (0.1, 0.2, 0.3, 0.4)))


def epochs(valid, count, **kwargs):
    """`count` epochs of four minibatches each: lists of Batch."""
    args = ppo.Args(num_steps=16, num_envs=8, num_minibatches=4, **kwargs)
    torch.manual_seed(2)
    return [list(ppo.minibatches(numbered_batch(), SimpleNamespace(valid=valid), args)) for _ in range(count)]


def test_minibatches_use_every_valid_row_evenly_and_no_other():
    valid = np.random.default_rng(1).random((16, 8)) < 0.4
    rows = torch.stack([torch.stack([part.actions for part in epoch]) for epoch in epochs(valid, 5)])
    assert rows.shape == (5, 4, 32)  # whatever the number of valid rows
    real = torch.tensor(np.flatnonzero(valid))
    for epoch in rows:
        used, counts = epoch.unique(return_counts=True)
        assert used.equal(real)
        assert counts.max() - counts.min() <= 1
    assert not rows[0].equal(rows[1])


def test_minibatches_without_resets_are_permutations():
    rows = torch.stack([part.actions for epoch in epochs(np.ones((16, 8), dtype=bool), 5) for part in epoch])
    assert rows.view(5, 128).sort(-1).values.equal(torch.arange(128).expand(5, -1))
    assert len(rows.view(5, 128).unique(dim=0)) == 5


def test_all_columns_of_a_minibatch_are_of_the_same_rows():
    [epoch] = epochs(np.random.default_rng(1).random((16, 8)) < 0.4, 1, norm_adv=False)
    for minibatch in epoch:
        row = minibatch.actions
        assert minibatch.obs.equal(row[:, None].expand(-1, 3))
        columns = (minibatch.logprobs, minibatch.values, minibatch.advantages, minibatch.returns)
        for column, shift in zip(columns, (0.1, 0.2, 0.3, 0.4)):
            torch.testing.assert_close(column, row + shift)


def test_advantages_are_standardised_minibatch_by_minibatch():
    [epoch] = epochs(np.random.default_rng(1).random((16, 8)) < 0.4, 1)
    for minibatch in epoch:
        raw = minibatch.actions + 0.3
        expected = (raw - raw.mean()) / raw.std(correction=0)
        torch.testing.assert_close(minibatch.advantages, expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_longer_than_the_limit_is_shortened_and_a_shorter_one_is_not():
    gradient = torch.tensor([3.0, 0.0, -4.0])
    clipped, norm = ppo.clip_norm(gradient, 0.5)
    torch.testing.assert_close(clipped, gradient / 10)
    assert norm == 5 and ppo.clip_norm(gradient, 5.1)[0].equal(gradient)


def test_running_statistics_equal_those_of_all_rows_at_once():
    data = 1e4 + np.random.default_rng(1).normal(size=(200, 3)) * [1, 10, 100]
    stats = ppo.RunningMeanStd((3,))
    for chunk in np.split(data, [1, 2, 50, 51, 177]):
        stats.update(torch.tensor(chunk))
    assert (stats.count == 200).all()
    np.testing.assert_allclose(stats.mean, data.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.var, data.var(0), rtol=1e-6)
    np.testing.assert_allclose(stats.std, data.std(0), rtol=1e-6)
