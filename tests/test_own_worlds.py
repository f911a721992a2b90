"""Worlds that users bring, with the faults that they have: each is learned, or refused in one line that helps."""

import functools
import json
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import command, scalars
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

import ppo

QUICK = ["--total-timesteps", 256, "--num-envs", 2, "--num-steps", 32, "--eval-episodes", 2,
         "--validation-episodes", 1, "--run-name", "own"]  # fmt: skip


class Plain(gym.Env):
    """Ten steps of nothing."""

    observation_space: gym.Space = Box(-1, 1, (2,))
    action_space: gym.Space = Discrete(2)

    def look(self):
        return np.zeros(self.observation_space.shape, self.observation_space.dtype)

    def tell(self):
        return {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.look(), self.tell()

    def step(self, action):
        self.t += 1
        return self.look(), 1.0, self.t >= 10, False, self.tell()


class Bools(Plain):
    observation_space = Box(0, 1, (3,), bool)


class Board(Plain):
    observation_space = Box(0, 1, (6, 7))


class MaskOfThree(Plain):
    def tell(self):
        return {"action_mask": np.array([1, 2, 3])}


class MaskInView(Plain):
    """Each choice is allowed in turn."""

    observation_space = Dict(board=Box(-1, 1, (2,)), action_mask=MultiBinary(2))

    def look(self):
        return {"board": np.zeros(2, np.float32), "action_mask": np.eye(2, dtype=np.int8)[self.t % 2]}

    def step(self, action):
        assert action == self.t % 2
        return super().step(action)


class MaskInParts(Plain):
    action_space = MultiDiscrete([2, 3])

    def tell(self):
        return {"action_mask": (np.array([1, 0], np.int8), np.array([0, 1, 0], np.int8))}


class Levels(Plain):
    def __init__(self, level=1):
        self.name = {1: "easy", 2: "hard"}[level]
        assert level < 2, "hard is not there yet"


class NoLevel(Plain):
    def reset(self, *, seed=None, options=None):
        open("level.txt")


class Broken(Plain):
    def reset(self, *, seed=None, options=None):
        raise RuntimeError("boom")


class Mortal(Plain):
    def reset(self, *, seed=None, options=None):
        os._exit(7)


class Paid(Plain):
    """A reward as many write it."""

    def __init__(self, form):
        self.form = form

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        reward = {"row": np.array([1.5]), "0-d": np.array(1.5), "float32": np.float32(1.5), "int": 2, "list": [1.5],
                  "matrix": np.array([[1.5]], np.float32), "bool": True}[self.form]  # fmt: skip
        return obs, reward, np.bool_(terminated), int(truncated), info


class Talkative(Plain):
    """Tells arrays whose lengths change, from step to step and from one environment to the next, and much else."""

    def tell(self):
        n = int(self.np_random.integers(1, 9))
        return {"path": np.zeros((n, 2)), "names": ["a"] * n, f"only now {n}": n, "lives": 3 - self.t // 4,
                "deep": {"action_mask": np.zeros(n)}, "TimeLimit.truncated": n, "episode": object}  # fmt: skip


class NoOptions(Plain):
    def reset(self, seed=None):
        return super().reset(seed=seed)


class NoSeed(Plain):
    def reset(self):
        return super().reset()


class SameArray(Plain):
    """Shows the number of its episode and the step in one array, which it gives again and again."""

    observation_space, episode, shown = Box(0, 1e6, (1,)), 0, np.zeros(0)

    def reset(self, *, seed=None, options=None):
        self.episode, self.shown = self.episode + 1, np.zeros(1, np.float32)
        return super().reset(seed=seed)

    def look(self):
        self.shown[:] = 100 * self.episode + self.t
        return self.shown


class SameArrays(SameArray):
    observation_space = Dict(a=Box(0, 1e6, (1,)), b=Box(0, 1e6, (1,)))

    def look(self):
        shown = super().look()
        return {"a": shown, "b": shown}


def test_bools_are_learned_from_and_validated(main, register):
    assert main("--env-id", register(Bools), "--norm-obs", *QUICK)[0] == 0


def test_stacked_vectors_become_images_and_find_their_own_preset(main, register):
    code, out, err = main("--env-id", register(Board), "--frame-stack", 4, *QUICK)
    assert code == 0 and "preset: general, small images" in out, err


def test_masks_that_are_ignored_do_not_hide_the_preset(main, register):
    code, out, err = main("--env-id", register(MaskOfThree), "--no-action-masks", *QUICK)
    assert code == 0 and "preset: general, discrete actions" in out, err


@pytest.mark.parametrize("world, flags, words", [
    (Levels, ["--env-kwargs", "level", 3], "{'level': 3}"),
    (Levels, ["--env-kwargs", "level", 2], "hard is not there yet"),
    (Plain, ["--num-minibatches", 10**9], "--num-minibatches 1000000000"),
    (Plain, ["--init-from", ""], "--init-from"),
    (Plain, ["--resume", ""], "--resume"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(world, flags, words, main, register):
    code, _, err = main("--env-id", register(world), *flags, *QUICK)
    assert code == 2 and err.count("\n") == 1 and words in err


def test_a_path_is_no_module(main):
    code, _, err = main("--env-id", "./w.py:Plain-v0", *QUICK)
    assert code == 2 and err.count("\n") == 1 and "./w.py" in err


@pytest.mark.parametrize("threads", ["", "4,2", "0"])
def test_any_number_of_threads_that_openmp_knows_is_taken(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert ppo.choose_device(ppo.Args(), []).type == "cpu"


@pytest.mark.parametrize("num_envs, cores, mates, threads", [
    (4, 4, 1, 1), (256, 4, 1, 2), (512, 4, 1, 3), (4096, 4, 1, 4), (4096, 4, 2, 2), (4096, 1, 2, 1),
])  # fmt: skip
def test_a_small_network_takes_another_thread_for_each_1024_rows_of_a_minibatch(
    num_envs, cores, mates, threads, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(mates))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    ppo.choose_device(ppo.Args(num_envs=num_envs, num_steps=32, num_minibatches=8), [])
    assert taken == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    ppo.choose_device(ppo.Args(num_envs=num_envs, num_steps=32, num_minibatches=8), [])
    assert taken == [threads]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("world, note", [(NoLevel, "level.txt"), (Broken, "boom")])
def test_an_error_in_reset_names_the_environment(world, note, vectorization, main, register):
    """With the traceback of its own code: here, or where its worker has shown it."""
    argv = ["--env-id", register(world), "--vectorization", vectorization, *QUICK]
    if vectorization == "async":
        code, _, err = main(*argv)
        assert code == 2 and note in err.splitlines()[-1]
        assert err.splitlines()[-1].endswith("at its reset of Tiny-v0")
        return
    with pytest.raises((RuntimeError, FileNotFoundError), match=note) as error:
        main(*argv)
    assert "raised by environment 0" in error.value.__notes__
    assert any("Tiny-v0" in note and "at its reset" in note for note in error.value.__notes__)


@pytest.mark.parametrize("form", ["row", "0-d", "float32", "int", "list", "matrix", "bool"])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_reward_that_is_one_number_is_taken_in_any_form(form, vectorization, main, register):
    env_id = register(functools.partial(Paid, form))
    code, _, err = main("--env-id", env_id, "--vectorization", vectorization, *QUICK)
    assert code == 0, err
    total = 10 * {"int": 2.0, "bool": 1.0}.get(form, 1.5)
    assert json.loads(Path("runs/own/results.json").read_text())["episode_returns"] == [total, total]
    logged = {value for _, value in scalars("runs/own")["charts/episodic_return"]}
    assert logged == {total}


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_infos_of_any_kind_do_no_harm_and_only_lives_and_masks_are_kept(vectorization, main, register):
    env_id = register(Talkative)
    code, _, err = main("--env-id", env_id, "--vectorization", vectorization, "--episodic-life", *QUICK)
    assert code == 0, err
    worlds = ppo.Worlds(ppo.Args(env_id, vectorization=vectorization), [1, 2, 3])
    for t in range(1, 11):
        worlds.step(torch.zeros(3, dtype=torch.int64))
        assert set(worlds.info) == {"lives", "_lives"} and worlds.info["lives"].tolist() == 3 * [3 - t // 4]
    worlds.envs.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("flags", [[], ["--frame-stack", 3]], ids=["plain", "stacked"])
def test_a_reset_need_not_take_options(vectorization, flags, main, register):
    code, _, err = main("--env-id", register(NoOptions), "--vectorization", vectorization, *flags, *QUICK)
    assert code == 0, err


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_reset_that_takes_no_seed_is_refused_in_one_line(vectorization, main, register):
    code, out, err = main("--env-id", register(NoSeed), "--vectorization", vectorization, *QUICK)
    assert (code, out, err.count("\n")) == (2, "", 1) and "cannot make Tiny-v0" in err and "'seed'" in err


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("world", [SameArray, SameArrays])
@pytest.mark.parametrize("stack", [1, 2, 4])
def test_an_environment_may_give_the_same_array_again(stack, world, vectorization, register):
    args = ppo.Args(register(world), vectorization=vectorization, frame_stack=stack, num_envs=2)
    worlds, agent = ppo.Worlds(args, [1, 2]), ppo.Agent(**ppo.look(args))
    ppo.collect(agent, worlds, rollout := ppo.Rollout.empty(agent, worlds, 22))
    worlds.envs.close()
    parts = 2 if world is SameArrays else 1
    for t in range(23):
        episode, step = divmod(t, 11)  # ten steps and a row for the reset
        frames = [100 * (episode + 1) + max(0, step - back) for back in reversed(range(stack))]
        assert rollout.obs[t].tolist() == 2 * [parts * frames]


@pytest.mark.parametrize("vectorization, hidden", [
    ("sync", ["numpy", "queue", "matplotlib", "tensorboard", "imageio", "pygame", "ale_py"]),
    ("async", ["matplotlib", "tensorboard", "imageio", "pygame", "ale_py"]), ("async", ["queue"]), ("async", ["numpy"]),
])  # fmt: skip
def test_a_module_in_the_working_directory_is_found_and_hides_no_other(vectorization, hidden):
    Path("mine.py").write_text("import gymnasium as gym\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
                               "gym.register('Mine-v0', CartPoleEnv, max_episode_steps=10)\n")  # fmt: skip
    for name in hidden:
        Path(f"{name}.py").write_text("raise SystemExit('the wrong one')")
    flags = ["--env-id", "mine:Mine-v0", "--vectorization", vectorization, "--capture-video", *QUICK]
    done = command(*flags, env={"PYTHONPATH": ""})
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert Path("runs/own/curve.png").exists() and Path("runs/own/replay.mp4").exists()


def test_a_worker_that_dies_in_reset_is_told(main, register):
    code, _, err = main("--env-id", register(Mortal), "--vectorization", "async", *QUICK)
    assert code != 0 and "died at its reset" in err


@pytest.mark.parametrize("flags", [["--env-id", "Nope-v0"], ["--env-id", "CartPole-v1", "--env-kwargs", "nope", 1]])
def test_what_cannot_be_made_is_refused_in_one_line(flags, main):
    code, _, err = main(*flags, *QUICK)
    assert code == 2 and err.count("\n") == 1 and "cannot make" in err


def test_predict_takes_masks_in_parts(main, register):
    env_id = register(MaskInParts)
    assert main("--env-id", env_id, *QUICK)[0] == 0
    env = gym.make(env_id)
    obs, info = env.reset(seed=1)
    agent = ppo.Agent.from_pretrained("runs/own")
    assert agent.predict(obs, mask=info["action_mask"]).tolist() == [0, 1]
    both = tuple(np.stack([part, part]) for part in info["action_mask"])
    assert agent.predict(np.stack([obs, obs]), mask=both).tolist() == [[0, 1], [0, 1]]


def test_of_stacked_masks_the_newest_counts(main, register):
    env_id = register(MaskInView)
    assert main("--env-id", env_id, "--frame-stack", 3, *QUICK)[0] == 0
    agent, env = ppo.Agent.from_pretrained("runs/own"), gym.wrappers.FrameStackObservation(gym.make(env_id), 3)
    obs, _ = env.reset(seed=1)
    for _ in range(10):
        obs, *_ = env.step(agent.predict(obs))


def test_an_agent_that_ignored_masks_goes_on_ignoring_them(main):
    flags = ["--env-id", "Taxi-v4", *QUICK[:-1]]
    assert main(*flags, "first", "--no-action-masks")[0] == 0
    code, _, err = main(*flags, "next", "--init-from", "runs/first")
    assert code == 0, err
    assert json.loads(open("runs/next/config.json").read())["action_masks"] is False
