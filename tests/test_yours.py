"""A world of one's own, and what becomes of its agent: presets that fit, a rate that follows the KL, a start from
another agent, predict."""

import contextlib
import functools
import json
import math
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import QUICK, command, scalars
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from hub_server import Hub
from safetensors.torch import load_file, save_file

import ppo


def weights(run):
    return load_file(Path(run) / "model.safetensors")


saved = functools.partial(torch.load, weights_only=True)  # what a checkpoint holds


def settings(run):
    return ppo.make_args(json.loads(Path(run, "config.json").read_text()))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The learning rate that follows the KL


@pytest.mark.parametrize(
    "lr, kl, then",
    [
        (1e-3, 0.0101, 1e-3), (1e-3, 0.0199, 1e-3), (1e-3, 0.0051, 1e-3),
        (1e-3, 0.0201, 1e-3 / 1.5), (1e-3, 1.0, 1e-3 / 1.5), (1e-3, 0.0049, 1.5e-3), (1e-3, 0.0, 1.5e-3),
        (1.1e-5, 1.0, 1e-5), (1e-5, 1.0, 1e-5), (9e-3, 0.0, 1e-2), (1e-2, 0.0, 1e-2),
        (2e-2, 0.01, 1e-2), (2e-2, 1.0, 1e-2), (1e-6, 0.01, 1e-5), (1e-6, 0.0, 1e-5),  # the bounds have moved
    ],
)  # fmt: skip
def test_the_rate_falls_above_twice_the_desired_kl_and_rises_below_half_of_it(lr, kl, then):
    for factor in 1, 0.01:
        rate = ppo.follow_kl(factor * lr, kl, 0.01, factor * 1e-2)
        assert rate == pytest.approx(factor * then, rel=1e-12) and factor * 1e-5 <= rate <= factor * 1e-2


KL = ["--desired-kl", "0.01", "--update-epochs", "3", "--run-name", "kl", "--checkpoint-every", "1", *QUICK]


def bounds(anneal_lr):
    """What the rate of a run by KL may be at most, in each of its four iterations."""
    return [10 * ppo.preset_args(ppo.Args()).learning_rate * (1 - i / 4 * anneal_lr) for i in range(4)]


@pytest.mark.parametrize("flags", [[], ["--no-anneal-lr"]], ids=["annealed", "not annealed"])
def test_the_logged_rate_follows_the_kl_of_each_epoch_within_bounds_that_alone_are_annealed(flags, main, monkeypatch):
    seen, follow = [], ppo.follow_kl

    def spy(lr, kl, desired, highest):
        seen.append((lr, kl, follow(lr, kl, desired, highest), desired, highest))
        return seen[-1][2]

    monkeypatch.setattr(ppo, "follow_kl", spy)
    code, _, err = main(*KL, *flags)
    assert code == 0, err
    rates, kls, thens, desired, highest = zip(*seen)
    assert len(seen) == 4 * 3 and rates[0] == ppo.preset_args(ppo.Args()).learning_rate
    assert set(desired) == {0.01} and highest[::3] == pytest.approx(bounds(not flags), rel=1e-12)
    assert highest[::3] == highest[1::3] == highest[2::3]
    assert rates[1:] == thens[:-1]  # nothing else changes it
    logged = [value for _, value in scalars("runs/kl")["charts/learning_rate"]]
    assert logged == pytest.approx(thens[2::3]) and len(set(logged)) > 1
    means = [value for _, value in scalars("runs/kl")["losses/approx_kl"]]
    assert means == pytest.approx(np.reshape(kls, (4, 3)).mean(1), rel=1e-4)


@pytest.mark.parametrize("flags", [[], ["--no-anneal-lr"]], ids=["annealed", "not annealed"])
@pytest.mark.parametrize("desired", [1e3, 1e-9], ids=["a KL too small", "a KL too large"])
def test_a_rate_that_is_driven_to_a_bound_stays_there_while_it_falls(desired, flags, main):
    code, _, err = main(*KL, "--desired-kl", desired, "--update-epochs", 10, *flags)
    assert code == 0, err
    logged = [value for _, value in scalars("runs/kl")["charts/learning_rate"]]
    highest = bounds(not flags)
    assert all(top / 1000 <= rate * (1 + 1e-6) and rate <= top * (1 + 1e-6) for rate, top in zip(logged, highest))
    if desired > 1:  # 1.5 ** 10 > 10
        assert logged == pytest.approx(highest)
    else:  # 1.5 ** -20 < 1 / 1000
        assert logged[2:] == pytest.approx([top / 1000 for top in highest[2:]])


def test_an_interrupted_run_goes_on_with_the_rate_that_it_had(main):
    assert main(*KL)[0] == 0
    assert_resumes_to_the_same("runs/kl", main)


def assert_resumes_to_the_same(run, main):
    """A finished run of four iterations, put back to the third."""
    last = Path(run, "checkpoint-00000004.pt")
    first = saved(last)
    for file in (last, Path(run, "results.json")):
        file.unlink()
    assert main("--resume", run)[0] == 0
    then = saved(last)
    assert equal(then["agent"], first["agent"]) and then["learning_rate"] == first["learning_rate"]


@pytest.mark.parametrize("value", ["-0.01", "nan", "inf"])
def test_a_desired_kl_that_is_none_is_refused(value, main):
    code, out, err = main("--desired-kl", value)
    assert (code, out) == (2, "") and "--desired-kl must be 0 or more, and finite" in err and not Path("runs").exists()


# Which preset


class Any(gym.Env):
    """Shows and takes anything of its spaces; the reward is 0."""

    def __init__(self, obs=None, action=None):
        self.observation_space, self.action_space = obs or Box(-1, 1, (3,)), action or Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, type(action))
        return self.observation_space.sample(), 0.0, False, False, {}


IMAGE = Box(0, 255, (40, 40, 3), np.uint8)


@pytest.mark.parametrize(
    "obs, action, kind",
    [
        (Box(-1, 1, (3,)), Discrete(2), "discrete actions"), (Discrete(4), MultiBinary(3), "discrete actions"),
        (Box(0, 255, (7, 7, 3), np.uint8), MultiDiscrete([2, 3]), "small images"),
        (Box(-1, 1, (3,)), Box(-1, 1, (2,)), "continuous actions"), (IMAGE, Discrete(2), "images"),
        (Dict(eye=IMAGE, ear=Box(-1, 1, (2,))), Box(-1, 1, (2,)), "images"),
    ],
)  # fmt: skip
def test_the_general_preset_depends_on_spaces_and_trains(obs, action, kind, register, main):
    env_id = register(functools.partial(Any, obs, action), max_episode_steps=10)
    code, out, err = main("--env-id", env_id, *QUICK, "--num-envs", 2, "--num-steps", 16, "--total-timesteps", 64)
    assert code == 0, err
    few = "" if kind == "images" else ", few steps"
    assert f"preset: general, {kind}{few} " in out.splitlines()[0]
    assert ppo.parse_args(["--env-id", env_id, "--total-timesteps", "200_001"]).preset == f"general, {kind}"


# A start from another agent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A CartPole agent with statistics, in runs/source of a folder of its own."""
    folder = tmp_path_factory.mktemp("source")
    with contextlib.chdir(folder):
        flags = ["--norm-obs", "--norm-reward", "--total-timesteps", "8192", "--run-name", "source"]
        assert ppo.main([*QUICK, "--hidden-sizes", "16", *flags]) == 0
    return folder / "runs" / "source"


def test_a_run_starts_from_the_weights_and_statistics_of_another(source, main):
    code, _, err = main("--init-from", source, *QUICK, "--checkpoint-every", 4, "--run-name", "next",
                        "--learning-rate", 1e-5)  # fmt: skip
    assert code == 0, err
    args = settings("runs/next")
    assert (args.hidden_sizes, args.norm_obs, args.env_id, args.preset) == ((16,), True, "CartPole-v1", "CartPole-v1")
    assert args.learning_rate == 1e-5
    start = saved("runs/next/checkpoint-00000000.pt")
    assert equal(start["agent"], weights(source)) and start["optimizer"]["steps"] == 0


def test_the_first_rollout_adds_to_its_statistics_and_is_not_learned_from(source, main):
    flags = [*QUICK, "--total-timesteps", 1024, "--checkpoint-every", 1, "--run-name", "next"]
    code, _, err = main("--init-from", source, *flags)
    assert code == 0, err
    first, second = (saved(f"runs/next/checkpoint-0000000{i}.pt") for i in (1, 2))
    assert first["optimizer"]["steps"] == 0 and second["optimizer"]["steps"] > 0
    assert len(scalars("runs/next")["losses/policy_loss"]) == 1
    for name, x in weights(source).items():
        assert torch.equal(first["agent"][name], x) == ("stats" not in name), name
    for stats in "obs_stats", "return_stats":
        before, after = (agent[f"{stats}.count"] for agent in (weights(source), first["agent"]))
        assert (before > 512).all() and (after == before + first["global_step"]).all()


def test_two_rollouts_are_needed_for_statistics_whatever_the_start(source, main):
    code, out, err = main("--init-from", source, *QUICK, "--total-timesteps", 1023, "--run-name", "next")
    assert (code, out) == (2, "") and "--total-timesteps must be at least 1024" in err and not Path("runs").exists()


def test_statistics_that_the_other_had_not_are_filled_first(main):
    plain = [*QUICK, "--preset", "none"]
    assert main(*plain, "--total-timesteps", 512, "--run-name", "plain")[0] == 0
    assert len(scalars("runs/plain")["losses/policy_loss"]) == 1  # without statistics all is learned from
    code, *_ = main("--init-from", "runs/plain", *plain, "--total-timesteps", 1024, "--norm-reward", "--run-name", "n")
    assert code == 0 and len(scalars("runs/n")["losses/policy_loss"]) == 1
    assert main("--init-from", "runs/plain", *plain, "--total-timesteps", 1024, "--run-name", "p")[0] == 0
    assert len(scalars("runs/p")["losses/policy_loss"]) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hidden-sizes", "8"], "size mismatch|hidden"), (["--no-norm-obs"], "size mismatch|norm-obs"),
        (["--env-id", "Acrobot-v1"], "its world has .* an agent for Acrobot-v1"),
        (["--activation", "relu"], "activation"), (["--env-id", "NoSuchWorld-v0"], "NoSuchWorld"),
        (["--resume", "runs/any"], "--init-from and --resume"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(flags, words, source, main):
    code, out, err = main("--init-from", source, *flags)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and re.search(words, err) and not Path("runs").exists()


@pytest.mark.parametrize("damage", ["missing", "no agent", "truncated", "not finite"])
def test_a_folder_without_a_sound_agent_is_refused_in_one_line(damage, source, main):
    copy, agent = Path("copy"), Path("copy", "model.safetensors")
    if damage != "missing":
        shutil.copytree(source, copy)
    if damage == "no agent":
        agent.unlink()
    elif damage == "truncated":
        agent.write_bytes(agent.read_bytes()[:-4])
    elif damage == "not finite":
        save_file({name: x * math.nan if x.ndim == 2 else x for name, x in weights(source).items()}, agent)
    code, out, err = main("--init-from", copy)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "copy" in err and not Path("runs").exists()


def test_a_resumed_run_never_reads_the_agent_that_it_started_from(source, main):
    shutil.copytree(source, "gone")
    flags = [*QUICK, "--run-name", "next", "--checkpoint-every", 1]
    assert main("--init-from", "gone", *flags)[0] == 0
    shutil.rmtree("gone")
    assert_resumes_to_the_same("runs/next", main)


@pytest.mark.slow
def test_a_cartpole_agent_taken_up_still_scores_above_480_after_8192_steps(main):
    assert main("--run-name", "first")[0] == 0
    assert main("--init-from", "runs/first", "--total-timesteps", 8192, "--run-name", "more")[0] == 0
    assert json.loads(Path("runs/more/results.json").read_text())["mean_reward"] > 480


@pytest.fixture
def online():
    hub = Hub()
    yield hub
    hub.shutdown()


def test_a_run_starts_from_an_agent_on_the_hub_and_says_which_commit(source, online, tmp_path):
    env = {"HF_ENDPOINT": online.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_sentinel_write",
           "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    pushed = command("--resume", source, "--repo-id", "tester/start", env=env)
    assert pushed.returncode == 0, pushed.stderr
    run = command("--init-from", "tester/start", *QUICK, "--run-name", "next", env=env)
    assert run.returncode == 0, run.stderr
    config, commit = json.loads(Path("runs/next/config.json").read_text()), online.repos["tester/start"][-1]["oid"]
    assert config["init_from"] == f"tester/start@{commit}"


# predict

SPACES = [
    Discrete(5, start=-2), MultiDiscrete([3, 4], start=[1, 2]), MultiDiscrete([[3, 4], [5, 6]]), MultiBinary(4),
    MultiBinary([2, 3]), Box(-np.inf, np.inf, (3,)), Box(0, 255, (4, 5), np.uint8), Box(0, 1, (2, 2), np.bool_),
    Box(np.array([-1, -2.0]), np.array([1, np.inf]), dtype=np.float64), IMAGE,
    Dict(z=Discrete(3), a=Tuple([Box(0, 1, (2, 2)), MultiBinary(3)]), eye=IMAGE),
]  # fmt: skip
ACTIONS = [s for s in SPACES if not isinstance(s, Dict) and not (isinstance(s, Box) and s.dtype.kind != "f")]


@pytest.mark.parametrize("action", ACTIONS, ids=str)
@pytest.mark.parametrize("obs", SPACES, ids=str)
def test_the_environment_takes_what_predict_gives_for_what_it_showed(obs, action, register):
    args, env = ppo.Args(env_id=register(functools.partial(Any, obs, action)), hidden_sizes=(8,)), Any(obs, action)
    agent = ppo.Agent(**json.loads(json.dumps(ppo.look(args))))
    shown, _ = env.reset(seed=1)
    for deterministic in (True, False):
        shown, *_ = env.step(agent.predict(shown, deterministic))
    batch = [obs.sample() for _ in range(3)]
    joined = gym.vector.utils.concatenate(obs, batch, gym.vector.utils.create_empty_array(obs, 3))
    answers = agent.predict(joined)
    assert len(answers) == 3 and all(a in action for a in answers)
    for shown, answer in zip(batch, answers):
        assert np.allclose(agent.predict(shown), answer, atol=1e-5)


def test_predict_equals_the_evaluation(source):
    args, agent = settings(source), ppo.Agent.from_pretrained(str(source), strict=True)
    returns, lengths, _ = ppo.evaluate(agent, args, 3)
    for seed, total in zip(ppo.seeds(args.seed, ppo.EVALUATION, n=3), returns):
        env = gym.make(args.env_id)
        (obs, _), paid, done = env.reset(seed=seed), 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(agent.predict(obs))
            paid, done = paid + reward, terminated or truncated
        if args.vectorization == "sync":
            assert paid == total
        assert paid > 0


@pytest.mark.parametrize("shape", [(), (3,), (5,), (2, 5)])
def test_a_wrong_shape_is_a_value_error_that_names_both(shape, source):
    agent = ppo.Agent.from_pretrained(str(source), strict=True)
    with pytest.raises(ValueError, match=r"have shape \[4\].*got \[" + ", ".join(map(str, shape))):
        agent.predict(np.zeros(shape))


# Small things


def test_two_runs_started_at_once_do_not_share_a_folder():
    names = {ppo.name_run(ppo.Args()).run.name for _ in range(3) if time.sleep(0.002) is None}
    assert len(names) == 3


def test_library_use_names_no_preset_that_was_not_applied(capsys):
    ppo.train(ppo.Args(total_timesteps=512, validation_episodes=0, run_name="lib"))
    assert "preset: none " in capsys.readouterr().out


def test_scores_are_in_the_logs(main):
    assert main(*QUICK, "--checkpoint-every", 2, "--run-name", "scored")[0] == 0
    logs, results = scalars("runs/scored"), json.loads(Path("runs/scored/results.json").read_text())
    assert [step for step, _ in logs["eval/validation"]] == [step for step, _ in logs["charts/SPS"]][1::2]
    assert logs["eval/validation"][-1][1] == pytest.approx(results["validation"]["last"])


def test_files_can_be_read_by_whom_the_umask_allows(source):
    modes = {path.name: path.stat().st_mode & 0o777 for path in source.iterdir()}
    assert set(modes.values()) == {0o666 & ~(umask := os.umask(0))} and os.umask(umask) == 0, modes


class Bomb:
    def __reduce__(self):
        return open, ("bang", "w")


def test_a_pickle_in_place_of_an_agent_runs_no_code():
    torch.save(Bomb(), "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        ppo.Agent._load_as_pickle(torch.nn.Identity(), "pytorch_model.bin", "cpu", True)
    assert not Path("bang").exists()
