"""Every family of environments, observations, actions and vectorisations, on the real ones; what counts as a step."""

import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import scalars
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Text, Tuple

import ppo

VECTORIZATIONS = ["sync", "async", "auto"]
SHORT = {"total_timesteps": 384, "num_envs": 2, "num_steps": 64, "num_minibatches": 2, "update_epochs": 2,
         "validation_episodes": 0}  # fmt: skip
AT_ONCE = ["--preset", "none", "--num-envs", "2", "--num-steps", "8",
           "--total-timesteps", "16", "--num-minibatches", "2",
           "--eval-episodes", "1"]  # fmt: skip


def train(env_id="CartPole-v1", **settings):
    """Three short iterations, unless told otherwise, with the rest of the environment's preset: the run's state."""
    args = ppo.preset_args(ppo.Args(env_id, preset="none" if env_id == "Tiny-v0" else ""))
    return ppo.train(ppo.replace(args, **(SHORT | {"run_name": "short"} | settings)))


def assert_learned(state):
    """All losses are numbers, and the policy has moved away from the one that collected."""
    logs = scalars(state.args.run)
    assert all(math.isfinite(value) for tag in logs if tag.startswith("losses/") for _, value in logs[tag])
    assert max(value for _, value in logs["losses/approx_kl"]) > 0


def assert_plays(state):
    args = state.args
    returns, lengths, _ = ppo.evaluate(ppo.load_agent(str(args.run), args), args, episodes=2)
    assert np.isfinite(returns).all() and (lengths > 0).all()


@pytest.fixture
def learned(monkeypatch):
    """What the loss saw: (observations, actions) of each minibatch, as it happens."""
    record, compute_gradient = [], ppo.compute_gradient

    def spy(agent, batch, args):
        record.append((batch.obs.clone(), batch.actions.clone()))
        return compute_gradient(agent, batch, args)

    monkeypatch.setattr(ppo, "compute_gradient", spy)
    return record


class Anything(gym.Env):
    """Observes samples of one space and acts in another, in episodes of five steps; `taken` collects the actions."""

    def __init__(self, observation_space, action_space, taken):
        self.observation_space, self.action_space, self.taken = observation_space, action_space, taken

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.time += 1
        self.taken.append(action)
        return self.observation_space.sample(), float(self.np_random.normal()), self.time == 5, False, {}


class Clock(gym.Env):
    """Shows the time, pays 1, 2, 3, ... and ends with its sixth step, showing -1; a life is lost on the third."""

    observation_space, action_space = Box(-1, 6, (1,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {"lives": 3}

    def step(self, action):
        self.time += 1
        over = self.time == 6
        return np.float32([-1 if over else self.time]), self.time, over, False, {"lives": 3 if self.time < 3 else 2}


# Families


@pytest.mark.parametrize(
    "env_id, env_kwargs",
    [
        ("CartPole-v1", {}),
        ("MountainCar-v0", {}),
        ("Pendulum-v1", {}),
        ("LunarLander-v3", {}),
        ("LunarLanderContinuous-v3", {}),
        ("HalfCheetah-v5", {}),
        ("Hopper-v5", {"healthy_reward": 2.0}),
        ("FrozenLake-v1", {"map_name": "8x8", "is_slippery": False}),
        ("Taxi-v4", {}),
        ("Blackjack-v1", {}),
        ("MinAtar/Breakout-v1", {}),
    ],
)
def test_trains_and_plays(env_id, env_kwargs):
    state = train(env_id, env_kwargs=env_kwargs)
    assert_learned(state)
    assert_plays(state)


def test_trains_and_plays_atari_through_ales_own_vector_environment():
    state = train("ALE/Pong-v5", num_steps=16, total_timesteps=32, env_kwargs={"max_num_frames_per_episode": 200})
    assert_learned(state)
    assert_plays(state)


@pytest.mark.slow
def test_trains_and_plays_from_pixels_with_channels_last(monkeypatch):
    monkeypatch.setattr(gym.spec("CarRacing-v3"), "max_episode_steps", 50)
    state = train("CarRacing-v3", num_steps=16, total_timesteps=64)
    assert_learned(state)
    assert_plays(state)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_trains_an_environment_of_the_users_own_module(main, vectorization, tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(
        "import gymnasium as gym\n"
        "class MyEnv(gym.wrappers.TransformReward):\n"
        "    def __init__(self, bonus):\n"
        "        super().__init__(gym.make('CartPole-v1'), lambda reward: reward + bonus)\n"
        "gym.register('MyEnv-v0', MyEnv, max_episode_steps=10)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = main(
        "--env-id", "my_module:MyEnv-v0", "--env-kwargs", "bonus", 0.5, "--vectorization", vectorization,
        "--num-envs", 2, "--num-steps", 32, "--total-timesteps", 128, "--eval-episodes", 2, "--run-name", "mine",
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((tmp_path / "runs/mine/results.json").read_text())
    assert [1.5 * length for length in results["episode_lengths"]] == results["episode_returns"]
    args = ppo.make_args(json.loads((tmp_path / "runs/mine/config.json").read_text()))
    assert "--evaluate me/mine --env-id my_module:MyEnv-v0 " in ppo.model_card(args, "me/mine", results)


# Observations and actions


@pytest.mark.parametrize(
    "space",
    [
        Discrete(3, start=5),
        MultiDiscrete([2, 3]),
        MultiBinary(4),
        Box(-1, 1, (2, 3)),
        Box(0, 255, (8, 8, 3), np.uint8),
        Box(0, 255, (40, 44, 3), np.uint8),
        Box(0, 255, (1, 40, 44), np.uint8),
        Dict(where=Box(-1, 1, (2,)), goal=Discrete(3)),
        Tuple([Discrete(2), Dict(inner=MultiBinary(3))]),
    ],
    ids=str,
)
def test_observes(space, register):
    state = train(register(lambda: Anything(space, Discrete(2), [])), num_steps=16, total_timesteps=64)
    assert_learned(state)
    assert_plays(state)


def test_a_discrete_observation_is_one_hot():
    assert ppo.Worlds(ppo.Args("FrozenLake-v1"), [1, 2, 3]).obs.tolist() == 3 * [[1] + 15 * [0]]


def test_dict_and_tuple_observations_become_one_flat_vector(register):
    space = Dict(a=Box(2, 2, (3,)), b=Tuple([Discrete(1), Box(7, 7, (1, 2))]))
    env_id = register(lambda: Anything(space, Discrete(2), []))
    assert ppo.Worlds(ppo.Args(env_id), [1, 2]).obs.tolist() == 2 * [[2, 2, 2, 1, 7, 7]]


@pytest.mark.parametrize(
    "space", [Discrete(3), Discrete(3, start=5), Discrete(3, start=-1), MultiDiscrete([2, 3]),
              MultiDiscrete([[2, 3], [4, 2]]), MultiDiscrete([2, 3], start=[4, -1]), MultiBinary(3)], ids=str,
)  # fmt: skip
def test_acts_in_all_of(space, register):
    taken = []
    state = train(register(lambda: Anything(Box(-1, 1, (2,)), space, taken)))
    assert_learned(state)
    assert_plays(state)
    assert all(space.contains(action) for action in taken)
    low = getattr(space, "start", 0)
    high = low + getattr(space, "nvec", getattr(space, "n", 2) if isinstance(space, Discrete) else 2) - 1
    assert (np.min(taken, 0) == low).all() and (np.max(taken, 0) == high).all()


@pytest.mark.parametrize("center, scale", [(-0.125, 0.375), (0, 1)], ids=["stretched", "as chosen"])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2)])
def test_continuous_actions_are_clipped_for_the_environment_only(shape, center, scale, register, learned):
    taken, space = [], Box(-0.5, 0.25, shape)
    assert_learned(train(register(lambda: Anything(Box(-1, 1, (2,)), space, taken)), rescale_actions=scale < 1))
    actions = torch.cat([actions for _, actions in learned])
    assert actions.shape[1:] == shape and actions.min() < -1 and actions.max() > 1
    assert all(space.contains(action) for action in taken)
    meant = (center + scale * actions.double()).clamp(-0.5, 0.25).float()
    assert {a.tobytes() for a in taken} == {a.tobytes() for a in meant.numpy()}


@pytest.mark.parametrize(
    "space",
    [Text(5, charset="ab"), Sequence(Discrete(2)), Graph(Discrete(2), None), Dict(word=Text(5, charset="ab"))],
    ids=str,
)
def test_an_observation_space_that_is_not_supported_is_named_in_one_line(space, main, register):
    code, _, err = main("--env-id", register(lambda: Anything(space, Discrete(2), [])), *AT_ONCE)
    assert (code, err.count("\n")) == (2, 1)
    assert str(space) in err and "not Box, Discrete, MultiDiscrete, MultiBinary" in err


@pytest.mark.parametrize(
    "space", [Text(5, charset="ab"), Dict(a=Discrete(2)), Tuple([Discrete(2)]), Box(0, 9, (2,), int)], ids=str
)
def test_an_action_space_that_is_not_supported_is_named_in_one_line(space, main, register):
    code, _, err = main("--env-id", register(lambda: Anything(Box(-1, 1, (2,)), space, [])), *AT_ONCE)
    assert (code, err.count("\n")) == (2, 1)
    assert str(space) in err and "not Discrete, MultiDiscrete, MultiBinary or Box" in err


# Vectorisation


@pytest.mark.parametrize(
    "vectorization, env_id, kind, scoring",
    [
        ("auto", "CartPole-v1", "CartPoleVectorEnv", "SyncVectorEnv"),
        ("auto", "ALE/Pong-v5", "AtariVectorEnv", "AtariVectorEnv"),
        ("auto", "Acrobot-v1", "SyncVectorEnv", "SyncVectorEnv"),
        ("sync", "CartPole-v1", "SyncVectorEnv", "SyncVectorEnv"),
        ("async", "CartPole-v1", "AsyncVectorEnv", "SyncVectorEnv"),
    ],
)
def test_vectorization_chooses_the_vector_environment(vectorization, env_id, kind, scoring):
    for training, name in (True, kind), (False, scoring):
        envs, _ = ppo.make_envs(ppo.Args(env_id, vectorization=vectorization), [1, 2], training, "")
        assert type(envs.unwrapped).__name__ == name
        envs.close()


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_no_worker_is_a_fork_of_this_process_whose_threads_and_windows_it_would_not_survive():
    envs, _ = ppo.make_envs(ppo.Args(vectorization="async"), [1, 2], True, "")
    assert {type(process).__name__ for process in envs.processes} == {"ForkServerProcess"}
    parents = {Path(f"/proc/{p.pid}/stat").read_text().rpartition(")")[2].split()[1] for p in envs.processes}
    envs.close()
    assert len(parents) == 1 and str(os.getpid()) not in parents


def test_a_vector_environment_that_resets_within_a_step_is_refused_in_one_line(main):
    code, _, err = main("--env-id", "ALE/Pong-v5", "--env-kwargs", "autoreset_mode", "SameStep", *AT_ONCE)
    assert (code, err.count("\n")) == (2, 1)
    assert "ALE/Pong-v5" in err and "NEXT_STEP" in err


def count_by_hand(steps):
    """Real transitions, and (transitions so far, return, length) at the end of each episode, one by one."""
    N = len(steps[0][1])
    transitions, episodes, returns, lengths, over = 0, [], N * [0.0], N * [0], N * [False]
    for obs, rewards, terminated, truncated, _ in steps:
        for i in range(N):
            if over[i]:
                assert rewards[i] == 0 and abs(obs[i]).max() <= 0.05  # a fresh CartPole
            else:
                transitions, returns[i], lengths[i] = transitions + 1, returns[i] + rewards[i], lengths[i] + 1
        for i in range(N):
            over[i] = terminated[i] or truncated[i]
            if over[i]:
                episodes.append((transitions, returns[i], lengths[i]))
                returns[i], lengths[i] = 0.0, 0
    return transitions, episodes


@pytest.mark.parametrize("vectorization", VECTORIZATIONS)
def test_logged_episodes_and_steps_equal_a_hand_count(vectorization, steps):
    logs = scalars(train(num_envs=3, total_timesteps=3 * 192, vectorization=vectorization, checkpoint_every=3).args.run)
    transitions, episodes = count_by_hand(steps)
    assert len(episodes) > 10
    ends = [step for step, _ in logs["charts/SPS"]]  # of the iterations, each of which logs the mean of its episodes
    of = {end: [e for e in episodes if before < e[0] <= end] for before, end in zip([0, *ends], ends)}
    for name, i in ("return", 1), ("length", 2):
        means = [(end, pytest.approx(np.mean([e[i] for e in ended]))) for end, ended in of.items() if ended]
        assert logs[f"charts/episodic_{name}"] == means
    assert ends[-1] == transitions and len(ends) == 3


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_logged_episodes_are_what_the_environment_pays(vectorization, register):
    logs = scalars(train(register(Clock), vectorization=vectorization, episodic_life=True).args.run)
    assert {value for _, value in logs["charts/episodic_return"]} == {1 + 2 + 3 + 4 + 5 + 6}
    assert {value for _, value in logs["charts/episodic_length"]} == {6}


def test_an_episode_cut_by_a_checkpoint_is_not_logged(register):
    logs = scalars(train(register(Clock), num_steps=8, checkpoint_every=1).args.run)  # cut after 6 + reset + 1 steps
    assert {value for _, value in logs["charts/episodic_return"]} == {21}
    assert len(logs["charts/episodic_return"]) == len(logs["charts/SPS"])


class Uneven(gym.Env):
    """Pays at random, in episodes of the length that it is told."""

    observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)

    def __init__(self, length=math.inf):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        return np.zeros(1, np.float32), self.np_random.normal(), self.time == self.length, False, {}


@pytest.mark.parametrize("longs, logging", [(1, range(1, 11)), (2, (3, 4, 7, 8, 10)), (5, (3, 4, 7, 8, 10))])
def test_after_a_checkpoint_episodes_wait_until_nine_in_ten_environments_ended_one(longs, logging, register, steps):
    """In legs of 4, 4 and 2 rollouts of 16 rows; so many of ten environments have episodes of 40 steps, the rest of 3.
    Each episode that ended is in one point, none is in two, and what a leg has left over makes a point at its end."""
    made = itertools.count()
    env_id = register(lambda: Uneven(40 if next(made) % 10 < longs else 3))
    state = train(env_id, num_envs=10, num_steps=16, total_timesteps=1600, checkpoint_every=4)
    logs, episodes, transitions, ends = scalars(state.args.run), [], 0, []
    for leg in steps[:64], steps[64:128], steps[128:]:
        returns, lengths, over = *np.zeros((2, 10)), np.zeros(10, dtype=bool)
        for t, (_, rewards, terminated, _, _) in enumerate(leg, 1):
            returns, lengths, transitions = returns + rewards, lengths + ~over, transitions + (~over).sum()
            episodes += zip(returns[terminated], lengths[terminated], [len(ends)] * terminated.sum())
            returns[terminated], lengths[terminated], over = 0, 0, terminated
            ends += [transitions] if t % 16 == 0 else []
    assert [step for step, _ in logs["charts/SPS"]] == ends and len(ends) == 10
    points, waiting = [], []
    for iteration, end in enumerate(ends, 1):
        waiting += [episode for episode in episodes if episode[2] == iteration - 1]
        if iteration in logging:
            points.append((end, *(pytest.approx(mean, rel=1e-5) for mean in np.mean(waiting, 0)[:2])))
            waiting = []
    assert not waiting and {length for _, length, _ in episodes} == {3, 40}
    assert state.curve == points
    for i, name in (1, "return"), (2, "length"):
        assert logs[f"charts/episodic_{name}"] == [(point[0], point[i]) for point in points]


def test_until_an_episode_ends_the_printed_lines_tell_for_how_many_steps_none_did(main, register):
    few = [*AT_ONCE, "--num-steps", 128, "--total-timesteps", 2560, "--validation-episodes", 0]
    for length, every, told in (
        (math.inf, 8, [f"none in {n:,} steps" for n in (128, 256, 384, 512, 640, 768, 896, 1024, 128, 256)]),
        (300, 5, ["none in 128 steps", "none in 256 steps", *8 * [None]]),
    ):
        env_id = register(lambda length=length: Uneven(length))
        code, out, err = main("--env-id", env_id, *few, "--checkpoint-every", every, "--run-name", f"every-{every}")
        assert code == 0, err
        lines = re.findall(r"^step +([\d,]+)   return +(\S.*?)   +([\d,]+) steps/s$", out, re.MULTILINE)
        resets = (3, 5, 8, 10) if length == 300 else ()  # the iterations in which both environments reset
        rows = [2 * 128 * n - 2 * sum(n >= i for i in resets) for n in range(1, 11)]
        assert [int(step.replace(",", "")) for step, _, _ in lines] == rows
        for (_, found, _), words in zip(lines, told):
            assert found == words if words else re.fullmatch(r"-?\d+\.\d", found)


def test_global_step_counts_real_transitions(register):
    state = train(register(Clock), num_steps=70, total_timesteps=420)  # three rollouts, resets in 1 row of 7
    assert state.global_step == 420 * 6 // 7


@pytest.mark.parametrize("vectorization", VECTORIZATIONS)
def test_reset_rows_never_reach_the_loss(vectorization, steps, learned):
    """A reset row starts from the last observation of an episode, and that lies beyond CartPole's limits."""

    def fallen(obs):
        return (abs(obs[:, 0]) > 2.4) | (abs(obs[:, 2]) > 12 * math.pi / 180)

    train(vectorization=vectorization)
    assert sum(fallen(obs).sum() for obs, *_ in steps) > 5
    assert learned and not any(fallen(obs).any() for obs, _ in learned)


def test_every_real_transition_reaches_the_loss_and_nothing_else(register, learned):
    train(register(Clock))
    assert {obs.item() for minibatch, _ in learned for obs in minibatch} == {0, 1, 2, 3, 4, 5}


def test_reset_rows_never_reach_the_statistics(register):
    state = train(register(Clock), num_steps=70, total_timesteps=420, norm_obs=True, norm_reward=True)
    agent = ppo.load_agent(str(state.args.run), state.args)
    assert agent.obs_stats.count.tolist() == [360] and agent.return_stats.count == 360
    torch.testing.assert_close(agent.obs_stats.mean, torch.tensor([2.5]).double())
    torch.testing.assert_close(agent.obs_stats.var, torch.tensor([35 / 12]).double())


# Lives


@pytest.fixture
def horizons(monkeypatch):
    """What the estimate was told: (terminated, done) of each rollout, as it happens."""
    record, compute_gae = [], ppo.compute_gae

    def spy(rewards, values, terminated, done, *rest):
        record.append((terminated.clone(), done.clone()))
        return compute_gae(rewards, values, terminated, done, *rest)

    monkeypatch.setattr(ppo, "compute_gae", spy)
    return record


def test_a_lost_life_ends_the_value_horizon_only(register, horizons, steps):
    state = train(register(Clock), num_steps=7, total_timesteps=42, checkpoint_every=99, episodic_life=True)
    life = torch.tensor([False, False, True, False, False, False, False]).unsqueeze(-1)
    over = torch.tensor([False, False, False, False, False, True, False]).unsqueeze(-1)  # then its reset
    assert all((ended == life | over).all() and (done == over).all() for ended, done in horizons)
    assert scalars(state.args.run)["charts/episodic_return"] == [(s, 21) for s in (12, 24, 36)]


def test_a_lost_life_means_nothing_without_episodic_life(register, horizons):
    train(register(Clock), num_steps=7, total_timesteps=42, checkpoint_every=99, episodic_life=False)
    row = torch.tensor([False, False, False, False, False, True, False])
    assert all((flags == row.unsqueeze(-1)).all() for rollout in horizons for flags in rollout)


def test_episodic_life_without_lives_is_refused_in_one_line(main):
    code, _, err = main("--env-id", "Pendulum-v1", "--no-norm-reward", "--episodic-life", *AT_ONCE)
    assert (code, err.count("\n")) == (2, 1)
    assert "--episodic-life" in err and "Pendulum-v1" in err


# Seeds


@pytest.mark.parametrize("vectorization", VECTORIZATIONS)
def test_the_seed_alone_decides_the_weights(vectorization):
    def weights(name, seed):
        run = train(vectorization=vectorization, run_name=name, seed=seed, total_timesteps=256).args.run
        return (run / "model.safetensors").read_bytes()

    first, again, other = weights("first", 1), weights("again", 1), weights("other", 2)
    assert first == again != other


@pytest.mark.parametrize("env_id", ["LunarLander-v3", "Hopper-v5"])
def test_the_seed_decides_the_weights_beyond_classic_control(env_id):
    first, again = train(env_id, run_name="first").args.run, train(env_id, run_name="again").args.run
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_environments_share_no_seed_across_runs_nor_between_training_and_evaluation(main, monkeypatch):
    used, make_envs = {}, ppo.make_envs

    def spy(args, seeds, vector, render):
        used.setdefault((args.seed, vector), set()).update(seeds)
        return make_envs(args, seeds, vector, render)

    monkeypatch.setattr(ppo, "make_envs", spy)
    for seed in (1, 2):
        few = ["--total-timesteps", 4096, "--checkpoint-every", 1, "--eval-episodes", 5]
        assert main("--seed", seed, "--vectorization", "sync", *few)[0] == 0
    groups = [used[seed, training] for seed in (1, 2) for training in (True, False)]
    assert [len(group) for group in groups] == 2 * [2 * 64, 10 + 5]
    assert len(set.union(*groups)) == sum(map(len, groups))
