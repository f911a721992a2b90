"""Policies that remember: what scores do not show. Four wrong variants of an LSTM score as well as the right one, so
replays are compared with single steps, and each planted bug has to be seen."""

import json
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import QUICK, scalars
from safetensors.torch import load_file

import ppo

torch.set_num_threads(1)
UNITS = 16


class Short(gym.Env):
    """Random observations; episodes of the lengths that are given, in turn."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(4)

    def __init__(self, lengths=(1, 2, 3, 5, 8)):
        self.lengths, self.episode = list(lengths), -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.look(), {}

    def step(self, action):
        self.t += 1
        length = self.lengths[self.episode % len(self.lengths)]
        return self.look(), float(action), self.t == length and self.episode % 2 == 0, self.t == length, {}

    def look(self):
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)


class Pictures(Short):
    """The same in images, of noise."""

    observation_space = gym.spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def look(self):
        return self.np_random.integers(256, size=(36, 36, 1), dtype=np.uint8)


class Forbidding(Pictures):
    """Two of the four choices are allowed, at each step others; the rest ends the test."""

    def step(self, action):
        assert self.allowed[action]
        return super().step(action)

    def look(self):
        self.allowed = self.np_random.permutation(4) < 2
        return super().look()

    def action_masks(self):
        return self.allowed


def setting(env_id, n=2, steps=12, dtype=torch.float64, **settings):
    """Arguments, agent in this precision (float32: with bfloat16 for images), its worlds and an empty rollout."""
    args = ppo.Args(env_id=env_id, num_envs=n, num_steps=steps, total_timesteps=n * steps, num_minibatches=1,
                    lstm_hidden_size=UNITS, **settings)  # fmt: skip
    torch.manual_seed(3)
    worlds = ppo.Worlds(args, ppo.seeds(1, n=n))
    agent = ppo.Agent(**ppo.look(args)).to(dtype)
    agent.trunk[0].in_bfloat16 = dtype == torch.float32
    if agent.parts[0]["kind"] == "numbers":
        agent.encode = lambda obs: obs.to(dtype)
    with torch.no_grad():  # far from uniform, so that actions depend on what is remembered
        for x in agent.parameters():
            x.add_(0.3 * torch.randn_like(x))
    worlds.memory = worlds.memory.to(dtype)
    return args, agent, worlds, ppo.Rollout.empty(agent, worlds, steps)


def one_by_one(agent, rollout, memory, over):
    """Values [T+1, N] and logits of the policy [T, N, 4] from single steps, with resets taken from `done`.

    `over` is what `done` was before the first row: this row is that of the reset, so the next begins anew."""
    cell = agent.memory
    h, c = memory.clone()
    values, outputs, over = [], [], torch.as_tensor(over)
    w_ih, w_hh, b_ih, b_hh = cell.parameters()
    for t in range(len(rollout.obs)):
        gates = agent.encode(rollout.obs[t]) @ w_ih.T + b_ih + h @ w_hh.T + b_hh
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        values.append(agent.critic(h).squeeze(-1))
        outputs.append(agent.policy(h, rollout.obs[t]).logits)
        if t < len(rollout.done):
            kept = (~over).to(h.dtype).unsqueeze(-1)
            h, c = h * kept, c * kept
            over = torch.as_tensor(rollout.done[t])
    return torch.stack(values), torch.stack(outputs[:-1])


def compare(agent, rollout, noise, over=(False, False)):
    """AssertionError unless the replay of a rollout is that of single steps, and the actions are those chosen."""
    values, outputs = one_by_one(agent, rollout, rollout.memory, over)
    logprobs, entropies, replayed = agent.replay(rollout)
    policy = ppo.Categorical(outputs, agent.nvec)
    expected, entropy = policy.logprob_and_entropy(rollout.actions.unsqueeze(-1))
    for a, b in ((values, replayed), (expected, logprobs), (entropy, entropies)):
        assert (a - b).abs().max() < 1e-10
    assert torch.equal(policy.choose(noise).squeeze(-1), rollout.actions)
    return (logprobs.sum() + replayed.sum() + entropies.sum(), expected.sum() + values.sum() + entropy.sum())


def collect(agent, worlds, rollout):
    """Returns the noise that was drawn."""
    with torch.random.fork_rng():
        noise = agent.sample_noise(*rollout.rewards.shape)
    ppo.collect(agent, worlds, rollout)
    return noise


def collected(env_id, n=2, rollouts=3, after=lambda *_: None, **settings):
    """Several rollouts of one agent, each compared with single steps; how many resets there were."""
    args, agent, worlds, rollout = setting(env_id, n, **settings)
    resets, over = 0, np.zeros(n, dtype=bool)
    for _ in range(rollouts):
        before = worlds.memory.clone()
        noise = collect(agent, worlds, rollout)
        assert torch.equal(rollout.memory, before)
        after(agent, worlds, rollout)
        compare(agent, rollout, noise, over)
        over = rollout.done[-1].copy()
        resets += (~rollout.valid).sum()
    worlds.envs.close()
    return resets


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_replay_of_many_short_episodes_is_that_of_single_steps(n, register):
    assert collected(register(Short), n, rollouts=6) > 4 * n


@pytest.mark.parametrize("lengths", [[12], [11], [13], [12, 1, 24], [1], [1, 11], [10, 2]], ids=str)
def test_so_is_that_of_episodes_that_end_at_a_rollouts_first_or_last_row(lengths, register):
    collected(register(lambda: Short(lengths)), 2, rollouts=5)


@pytest.mark.parametrize("world", [Pictures, Forbidding])
def test_so_is_that_of_images_with_masks_and_without(world, register):
    assert collected(register(world), 2) > 4


def test_images_in_bfloat16_are_remembered_in_float32(register):
    env_id = register(lambda: Pictures([5, 9]))  # under way where the second and the third rollout begin
    args, agent, worlds, rollout = setting(env_id, dtype=torch.float32)
    over = np.zeros(2, dtype=bool)
    for i in range(3):
        ppo.collect(agent, worlds, rollout)
        with torch.no_grad():
            values, logits = one_by_one(agent, rollout, rollout.memory, over)
            logprobs, entropies, replayed = agent.replay(rollout)
        expected, _ = ppo.Categorical(logits, agent.nvec).logprob_and_entropy(rollout.actions.unsqueeze(-1))
        assert {x.dtype for x in (logprobs, entropies, replayed, worlds.memory)} == {torch.float32}
        assert (replayed - values).abs().max() < 0.01 and (logprobs - expected).abs().max() < 0.01
        assert rollout.memory.any() == (i > 0)
        over = rollout.done[-1].copy()


def test_gradients_agree_with_those_of_single_steps(register):
    args, agent, worlds, rollout = setting(register(Short))
    replayed, expected = compare(agent, rollout, collect(agent, worlds, rollout))
    for a, b in zip(*(torch.autograd.grad(x, list(agent.parameters())) for x in (replayed, expected))):
        assert (a - b).abs().max() < 1e-10


def prepared(env_id, n=4, minibatches=2, **settings):
    """A rollout in its middle, what was estimated of it, and one epoch of minibatches."""
    args, agent, worlds, rollout = setting(env_id, n, norm_adv=False, **settings)
    args = replace(args, num_minibatches=minibatches)
    for _ in range(2):  # the second begins within an episode
        ppo.collect(agent, worlds, rollout)
    with torch.no_grad():
        batch = ppo.estimate(agent, rollout, args)
    return agent, rollout, batch, list(ppo.minibatches(batch, rollout, args))


@pytest.mark.parametrize("world", [Short, Pictures, Forbidding])
def test_the_first_ratio_of_each_minibatch_is_one(world, register):
    agent, _, _, parts = prepared(register(world))
    for part in parts:
        logprobs, _, values = agent.replay(part)
        assert (logprobs - part.logprobs).abs().max() < 1e-6 and (values - part.values).abs().max() < 1e-6


def test_an_epoch_has_each_environment_once_and_all_its_valid_rows(register):
    _, rollout, batch, parts = prepared(register(Short), n=6, minibatches=3)
    T, seen = 12, []
    for part in parts:
        assert part.obs.shape[:2] == (T, 2) and len(part.rows) == len(part.actions) == T * 2
        which = [next(i for i in range(6) if torch.equal(batch.obs[:, i], part.obs[:, k])) for k in range(2)]
        seen += which
        valid = np.flatnonzero(rollout.valid[:, which])
        assert set(part.rows.tolist()) == set(valid.tolist())  # the rest repeats them
        assert torch.equal(part.memory, rollout.memory[:, which])
        assert torch.equal(part.returns, batch.returns[:, which].flatten()[part.rows])
        counts = np.bincount(part.rows, minlength=T * 2)[valid]
        assert counts.max() - counts.min() <= 1
    assert sorted(seen) == list(range(6))


def test_orders_differ_between_epochs_and_advantages_are_standardised_over_valid_rows(register):
    args, agent, worlds, rollout = setting(register(Short), 4)
    args = replace(args, num_minibatches=2)
    ppo.collect(agent, worlds, rollout)
    with torch.no_grad():
        batch = ppo.estimate(agent, rollout, args)
    first, second = (list(ppo.minibatches(batch, rollout, args)) for _ in range(2))
    assert any(not torch.equal(a.rows, b.rows) for a, b in zip(first, second))
    for part in first:
        assert part.advantages.mean().abs() < 1e-5
        assert part.advantages.var(unbiased=False) == pytest.approx(1, abs=1e-4)


# Planted bugs


def stepping(monkeypatch, spoil):
    """Let `spoil` have the memory, after each step of the worlds, and a copy of what it was before."""
    original = ppo.Worlds.step

    def step(self, actions):
        before = self.memory.clone()
        answer = original(self, actions)
        spoil(self, before)
        return answer

    monkeypatch.setattr(ppo.Worlds, "step", step)


def test_a_state_that_survives_an_episodes_end_would_be_seen(register, monkeypatch):
    stepping(monkeypatch, lambda worlds, before: worlds.memory.copy_(before))
    with pytest.raises(AssertionError):
        collected(register(Short))


def test_a_state_erased_a_row_early_would_be_seen(register, monkeypatch):
    stepping(monkeypatch, lambda worlds, _: worlds.memory.__setitem__((slice(None), worlds.done), 0))
    with pytest.raises(AssertionError):
        collected(register(Short))


def replaying(monkeypatch, change):
    """Replay what `change` makes of a rollout, or of a minibatch."""
    replay = ppo.Memory.forward
    monkeypatch.setattr(ppo.Memory, "forward", lambda self, features, x: replay(self, features, change(x)))


@pytest.mark.parametrize("bug", ["start state of zero", "the last state instead of the first", "no resets"])
def test_a_replay_from_a_wrong_state_would_be_seen(bug, register, monkeypatch):
    env_id, last = register(lambda: Short([5, 9])), {}

    def change(x):
        wrong = {
            "start state of zero": {"memory": torch.zeros_like(x.memory)},
            "no resets": {"valid": np.ones_like(x.valid)},
            "the last state instead of the first": {"memory": last.get("is")},
        }
        return replace(x, **wrong[bug])

    replaying(monkeypatch, change)
    with pytest.raises(AssertionError):
        collected(env_id, after=lambda agent, worlds, rollout: last.update({"is": worlds.memory.clone()}))


def test_minibatches_shuffled_in_time_would_be_seen(register, monkeypatch):
    agent, _, _, parts = prepared(register(Short))
    shuffled = replace(parts[0], obs=parts[0].obs[torch.randperm(12, generator=torch.Generator().manual_seed(1))])
    logprobs, _, _ = agent.replay(shuffled)
    assert (logprobs - parts[0].logprobs).abs().max() > 1e-3


def test_a_state_kept_over_a_checkpoint_would_be_seen(register, monkeypatch):
    """Each leg has fresh environments, so its memory is empty."""
    seen, collect = [], ppo.collect

    def spy(agent, worlds, rollout):
        seen.append(worlds.memory.abs().sum().item())
        return collect(agent, worlds, rollout)

    monkeypatch.setattr(ppo, "collect", spy)
    ppo.train(ppo.Args(env_id=register(lambda: Short([50])), num_envs=2, num_steps=8, num_minibatches=2,
                       total_timesteps=64, checkpoint_every=2, lstm_hidden_size=8, run_name="legs",
                       validation_episodes=0))  # fmt: skip
    assert [x == 0 for x in seen] == [True, False, True, False]


# What it is for


class Recall(gym.Env):
    """A bit is shown at first and asked for ten steps later; nothing else is of any use."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bit, self.t = int(self.np_random.integers(2)), 0
        return np.float32([2 * self.bit - 1, 0]), {}

    def step(self, action):
        self.t += 1
        asked = self.t == 10
        reward = float(action == self.bit) if self.t == 11 else 0.0
        return np.float32([0, asked]), reward, self.t == 11, False, {}


class Leak(gym.Env):
    """The bit is shown in one episode and asked for in the next, so nobody can know it."""

    observation_space, action_space = Recall.observation_space, Recall.action_space
    bit = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.bit is None:  # before the first episode, there was none to show it
            self.bit = int(self.np_random.integers(2))
        self.t = 0
        return np.float32([0, 0]), {}

    def step(self, action):
        self.t += 1
        reward = float(action == self.bit) if self.t == 1 else 0.0
        if self.t == 1:
            self.bit = int(self.np_random.integers(2))
        return np.float32([2 * self.bit - 1, 0]), reward, self.t == 2, False, {}


LEARN = ["--preset", "none", "--num-envs", 32, "--num-steps", 32, "--num-minibatches", 4, "--update-epochs", 4,
         "--learning-rate", 5e-3, "--no-clip-vloss", "--eval-episodes", 200, "--validation-episodes", 0,
         "--checkpoint-every", 1000, "--ent-coef", 0.005, "--gamma", 0.99]  # fmt: skip


def score(main, env_id, *flags):
    code, _, err = main("--env-id", env_id, *LEARN, *flags, "--run-name", "scored")
    assert code == 0, err
    return json.loads(Path("runs/scored/results.json").read_text())["mean_reward"]


@pytest.mark.slow
def test_one_bit_is_remembered_for_ten_steps_with_memory(main, register):
    flags = ["--total-timesteps", 120_000, "--lstm-hidden-size", 32]
    assert score(main, register(Recall), *flags) == 1.0


@pytest.mark.slow
def test_and_stays_unknown_without(main, register):
    assert score(main, register(Recall), "--total-timesteps", 60_000) == pytest.approx(0.5, abs=0.12)


@pytest.mark.slow
def test_a_state_that_outlives_its_episode_cannot_be_learned(main, register):
    """In training, where a state that is never erased scores 1.0 by then; an evaluation sees first episodes only."""
    score(main, register(Leak), "--total-timesteps", 60_000, "--lstm-hidden-size", 32)
    returns = [value for _, value in scalars("runs/scored")["charts/episodic_return"]]
    assert np.mean(returns[-5000:]) == pytest.approx(0.5, abs=0.05)


# Everywhere


MEMORY = [*QUICK, "--preset", "none", "--lstm-hidden-size", 8, "--num-minibatches", 2]


def test_without_the_flag_nothing_is_added():
    agent = ppo.Agent(**ppo.look(ppo.Args()))
    assert agent.memory is None and not any("memory" in name for name in agent.state_dict())


def test_weights_are_orthogonal_and_biases_zero():
    memory = ppo.Memory(8, 8)
    for name, x in memory.named_parameters():
        assert "bias" not in name or not x.any()
        if "weight" in name:
            assert torch.allclose(x.T @ x, torch.eye(8), atol=1e-5)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "FrozenLake-v1", "ALE/Pong-v5"])
def test_it_goes_with_every_action_space_one_hot_and_images_and_resumes_bit_for_bit(env_id, main):
    small = [*MEMORY, "--num-envs", 2, "--num-steps", 8, "--total-timesteps", 64, "--checkpoint-every", 2,
             "--validation-episodes", 0, "--eval-episodes", 1, "--run-name", "it", "--seed", 4]  # fmt: skip
    if env_id.startswith("ALE/"):
        small += ["--env-kwargs", "max_num_frames_per_episode", 200]
    code, _, err = main("--env-id", env_id, *small)
    assert code == 0, err
    whole = load_file("runs/it/model.safetensors")
    assert any(name.startswith("memory.") for name in whole)
    for file in ("results.json", "model.safetensors", "checkpoint-00000004.pt"):
        Path("runs/it", file).unlink()
    assert main("--resume", "runs/it")[0] == 0
    again = load_file("runs/it/model.safetensors")
    assert all(torch.equal(again[name], x) for name, x in whole.items())


def test_predict_remembers_until_it_is_reset_and_plays_as_the_evaluation_does(main):
    assert main(*MEMORY, "--run-name", "it", "--vectorization", "sync")[0] == 0
    agent = ppo.Agent.from_pretrained("runs/it", strict=True)
    args = agent.settings
    for seed, total in zip(ppo.seeds(args.seed, ppo.EVALUATION, n=3), ppo.evaluate(agent, args, 3)[0]):
        env = gym.make(args.env_id)
        (obs, _), paid, done = env.reset(seed=seed), 0.0, False
        agent.reset()
        while not done:
            obs, reward, terminated, truncated, _ = env.step(agent.predict(obs))
            paid, done = paid + reward, terminated or truncated
        assert paid == total
    batch = np.zeros((5, 4), np.float32)
    agent.predict(batch)  # another number of them: a state of its own
    assert agent.episode.shape == (2, 5, 8) and agent.episode.any()
    agent.reset()
    assert agent.episode is None


def test_it_is_played_again_from_its_files(main):
    assert main(*MEMORY, "--run-name", "it")[0] == 0
    results = json.loads(Path("runs/it/results.json").read_text())
    code, out, _ = main("--evaluate", "runs/it")
    assert code == 0 and f"mean_reward {results['mean_reward']:.2f} " in out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num-envs", 6, "--num-minibatches", 4], "4 must divide a rollout's 6 environments, as 3 does"),
        (["--compile"], "--compile cannot take an LSTM"), (["--lstm-hidden-size", -1], "must be 0 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(flags, words, main):
    code, out, err = main("--lstm-hidden-size", 8, "--preset", "none", *flags)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and words in err and not Path("runs").exists()


def test_lines_that_the_helpers_above_rest_on(register):
    """Short ends its episodes as told, and comparing does fail."""
    env = Short([2, 3])
    env.reset(seed=1)
    assert [env.step(0)[2:4] for _ in range(2)] == [(False, False), (True, True)]
    args, agent, worlds, rollout = setting(register(Short))
    noise = collect(agent, worlds, rollout)
    compare(agent, rollout, noise)
    with pytest.raises(AssertionError):
        compare(agent, rollout, noise.roll(1, 0))
