"""Several processes under torchrun: they train one agent, decide together, and end together."""

import io
import json
import os
import random
import re
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import QUICK, ROOT, scalars
from gymnasium.envs.classic_control import CartPoleEnv

import ppo

ONE_UPDATE = {"num_envs": 4, "num_steps": 32, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 128}
PENDULUM = ppo.Args(env_id="Pendulum-v1", validation_episodes=0, **ONE_UPDATE)  # no episode ends in it
CARTPOLE = ppo.Args(total_timesteps=1024, num_steps=64, validation_episodes=0, learning_rate=1e-2)
MEMORY = {"lstm_hidden_size": 8, "num_minibatches": 2}  # of whole environments: each rank has two


def join(rank, store):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    ppo.RANK, ppo.RANKS, ppo.LAUNCH = rank, 2, "torchrun --nproc-per-node 2"  # read when this module was imported
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=120), 2, rank)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two waiting processes, ranks 0 and 1 of one group: ranks(function, *args) -> the results of both."""
    store, spawn = tmp_path_factory.mktemp("ranks") / "store", get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, join, (rank, store)) for rank in range(2)]
    yield lambda *call: [future.result() for future in [pool.submit(*call) for pool in pools]]
    for pool in pools:
        pool.shutdown()


def launch(launcher, *argv, cwd=None, **env):
    """ppo.py under torchrun with these flags of its own, as a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, ROOT / "ppo.py", *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", **env}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=env, cwd=cwd)


def torchrun(*argv, **env):
    """ppo.py on two ranks."""
    return launch(["--nproc-per-node", "2"], *argv, **env)


def this_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def train(args):
    """Run ppo.train; the weights and statistics that this process ended with, and its number of gradient steps."""
    with patch.object(ppo.Adam, "step", autospec=True, side_effect=ppo.Adam.step) as step:
        state = ppo.train(args)
    return {name: value.clone() for name, value in state.agent.state_dict().items()}, step.call_count


def train_on_shared_worlds(args):
    """Like `train`, but each rank takes its part of the same environments and the same noise, however many ranks."""
    seeds = ppo.seeds

    def shared_seeds(seed, *stream, n=1):
        return seeds(seed, *stream, n=n) if n == 1 else list(range(10 + this_rank() * n, 10 + (this_rank() + 1) * n))

    def shared_noise(agent, T, N):
        noise = torch.randn(T, args.num_envs, agent.outputs, generator=torch.Generator().manual_seed(1))
        return noise[:, this_rank() * N : (this_rank() + 1) * N]

    with patch.object(ppo, "seeds", shared_seeds), patch.object(ppo.Agent, "sample_noise", shared_noise):
        return train(args)[0]


@pytest.mark.parametrize("settings", [{}, MEMORY, {"env_id": "Taxi-v4"}], ids=["plain", "memory", "masks"])
def test_both_ranks_end_with_the_same_weights_and_statistics(settings, ranks):
    args = replace(CARTPOLE, run_name=f"same-{len(settings)}", norm_obs=True, norm_reward=True, **settings)
    (first, _), (second, _) = ranks(train, args)
    assert all(torch.equal(first[name], second[name]) for name in first)


def drawn(args):
    """This rank's noise and first observations in a run of one rollout."""
    noise, sample = [], ppo.Agent.sample_noise

    def note(*args):
        noise.append(sample(*args))
        return noise[0]

    with patch.object(ppo.Agent, "sample_noise", note), patch.object(ppo, "collect", side_effect=ppo.collect) as spy:
        ppo.train(args)
    return *noise, spy.call_args.args[2].obs[0]


def test_ranks_draw_different_noise_in_different_environments(ranks):
    (noise, obs), (other, others) = ranks(drawn, replace(PENDULUM, run_name="drawn"))
    assert (noise != other).all() and (obs != others).any(1).all()


NORMALISED = {"norm_obs": True, "norm_reward": True, "total_timesteps": 256}


@pytest.mark.parametrize(
    "settings",
    [{}, NORMALISED, {"lstm_hidden_size": 8}, NORMALISED | {"lstm_hidden_size": 8}, {"env_id": "worlds:Forbidden-v0"}],
    ids=["plain", "normalised", "memory", "memory, normalised", "masks"],
)
def test_two_ranks_learn_from_a_rollout_what_one_learns(ranks, settings, request):
    name = re.sub(r"\W+", "-", request.node.callspec.id)
    one = train_on_shared_worlds(replace(PENDULUM, run_name="one", **settings))
    two, _ = ranks(train_on_shared_worlds, replace(PENDULUM, run_name=f"two-{name}", **settings))
    assert one["actor.0.bias"].all()  # it started at zero
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-6)


def gradient_of(rows):
    """The gradient and the metrics of these rows, and their advantages; over all ranks."""
    torch.manual_seed(1)
    agent = ppo.Agent(**ppo.look(CARTPOLE))
    obs, actions, logprobs = torch.randn(40, 4), torch.randint(2, (40,)), -torch.rand(40)
    batch = ppo.Batch(obs, actions, logprobs, *torch.randn(3, 40))[rows]
    batch.advantages = ppo.standardize(batch.advantages)
    gradient, metrics = ppo.mean_over_ranks(*ppo.compute_gradient(agent, batch, CARTPOLE))
    return torch.cat([gradient, torch.stack(list(metrics.values()))]), batch.advantages


def gradient_of_a_half():
    return gradient_of(slice(this_rank() * 20, this_rank() * 20 + 20))


def test_two_ranks_with_half_of_the_rows_each_take_the_gradient_and_the_advantages_of_all(ranks):
    union, advantages = gradient_of(slice(0, 40))
    (first, before), (second, after) = ranks(gradient_of_a_half)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, union, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([before, after]), advantages)


def statistics(*batches):
    stats = ppo.RunningMeanStd((3,))
    for batch in batches:
        stats.update(batch)
    return torch.stack([stats.count, stats.mean, stats.var])


def statistics_of_unequal_parts():
    x = torch.arange(180.0).sin().view(60, 3)
    return statistics(x[:10], x[20:25]) if this_rank() == 0 else statistics(x[10:20], x[25:])


def test_running_statistics_are_those_of_all_ranks(ranks):
    x = torch.arange(180.0).sin().view(60, 3)
    for part in ranks(statistics_of_unequal_parts):
        torch.testing.assert_close(part, statistics(x), rtol=1e-9, atol=1e-9)


def test_all_ranks_stop_an_iteration_at_the_same_epoch(ranks):
    args = replace(CARTPOLE, run_name="kl", update_epochs=10, total_timesteps=2048, target_kl=0.01)
    (_, first), (_, second) = ranks(train, args)
    assert first == second
    assert args.num_iterations * args.num_minibatches < first < args.num_iterations * args.num_minibatches * 10


def resumed(args):
    return train(replace(args, resume=f"runs/{args.run_name}"))


@pytest.mark.parametrize("settings", [{}, MEMORY, {"env_id": "Taxi-v4"}], ids=["plain", "memory", "masks"])
def test_two_ranks_resume_bit_for_bit(settings, ranks):
    args = replace(CARTPOLE, run_name=f"resumed-{len(settings)}", checkpoint_every=2, **settings)
    straight = ranks(train, args)
    run, *_ = ranks(Path.absolute, Path("runs", args.run_name))
    (run / f"checkpoint-{args.num_iterations:08d}.pt").unlink()  # as if killed after the one before
    again = ranks(resumed, args)
    for (weights, _), (expected, _) in zip(again, straight):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


class Patient(CartPoleEnv):
    """Falls never; episodes end on the ranks of which it is told, after 9 steps."""

    def __init__(self, ending=()):
        super().__init__()
        self.theta_threshold_radians = self.x_threshold = np.inf
        self.ending = ending

    def reset(self, **kwargs):
        self.age = 0
        return super().reset(**kwargs)

    def step(self, action):
        self.age += 1
        obs, reward, *_, info = super().step(action)
        return obs.clip(-9, 9), reward, False, this_rank() in self.ending and self.age == 9, info


gym.register("ranks/Patient-v0", Patient)


def train_in_legs(args):
    """The legs of this rank, and its weights."""
    found, legs = [], ppo.legs
    with patch.object(ppo, "legs", lambda state: (found.append([leg.start, leg.stop]) or leg for leg in legs(state))):
        weights, _ = train(args)
    return found, weights


@pytest.mark.parametrize(
    "ending, stops", [([], [4, 12, 26, 40]), ([0], range(4, 41, 4)), ([1], range(4, 41, 4)), ([0, 1], range(4, 41, 4))]
)
def test_ranks_agree_about_their_legs_whose_episodes_ever_end(ending, stops, ranks):
    args = replace(CARTPOLE, env_id="ranks/Patient-v0", env_kwargs={"ending": ending}, total_timesteps=40 * 4 * 16,
                   num_steps=16, run_name=f"legs-{len(ending)}-{sum(ending)}")  # fmt: skip
    (first, weights), (second, others) = ranks(train_in_legs, args)
    assert first == second == [[start, stop] for start, stop in zip([0, *stops], stops)]
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    run, *_ = ranks(Path.absolute, Path("runs", args.run_name))
    (run / f"checkpoint-{args.num_iterations:08d}.pt").unlink()  # as if killed after the one before
    for again, weights_again in ranks(train_in_legs, replace(args, resume=str(run))):
        assert again == first[-1:] and all(torch.equal(weights_again[name], weights[name]) for name in weights)


def test_torchrun_leaves_one_run_with_one_log_and_one_score():
    done = torchrun(*QUICK, "--run-name", "two")
    assert done.returncode == 0, done.stderr
    run = Path("runs/two")
    assert os.listdir("runs") == ["two"] and len(list(run.glob("events.*"))) == 1
    assert [done.stdout.count(f"{words} 4 greedy episodes\n") for words in ("scoring:", "over")] == [1, 1]
    assert done.stdout.count("run: runs/two ") == done.stdout.count("run: runs/two; next: ") == 1
    results = json.loads((run / "results.json").read_text())
    assert results["ranks"] == 2 and results["command"].startswith("torchrun --nproc-per-node 2 ppo.py ")
    entropies = [value for _, value in scalars(run)["losses/entropy"]]
    assert 0.5 < min(entropies) and max(entropies) < 0.6932  # of two choices at most log 2: a mean over ranks, no sum
    logged = scalars(run)["losses/policy_loss"]
    assert [step for step, _ in logged] == sorted({step for step, _ in logged}) and len(logged) == 4
    assert 2048 - 4 * 100 < logged[-1][0] <= 2048  # the steps of both ranks, less their resets


def test_torchrun_with_memory_leaves_an_agent_that_is_played_again_as_it_was_scored(main):
    done = torchrun(*QUICK, "--lstm-hidden-size", "8", "--num-minibatches", "2", "--run-name", "two")
    assert done.returncode == 0, done.stderr
    run = Path("runs/two")
    results = json.loads((run / "results.json").read_text())
    assert results["ranks"] == 2 and done.stdout.count("run: runs/two; next: ") == 1
    code, out, err = main("--evaluate", run)
    assert code == 0, err
    assert f"mean_reward {results['mean_reward']:.2f} " in out
    agent = ppo.Agent.from_pretrained(run, strict=True)
    agent.predict(np.zeros(4, np.float32))
    assert agent.episode.any() and agent.episode.shape == (2, 1, 8)
    assert agent.memory.weight_hh_l0.T.mm(agent.memory.weight_hh_l0).sub(torch.eye(8)).abs().max() > 1e-3  # it learned


LAWFUL = """
import gymnasium as gym
from gymnasium.envs.toy_text.taxi import TaxiEnv

class Lawful(TaxiEnv):
    def step(self, action):
        assert self.action_mask(self.s)[action], "out of law"
        return super().step(action)

gym.register("Lawful-v0", Lawful, max_episode_steps=50)
"""


def test_no_rank_does_what_is_forbidden(main, monkeypatch):
    Path("lawful.py").write_text(LAWFUL)
    done = torchrun("--env-id", "lawful:Lawful-v0", *QUICK, "--run-name", "two")
    assert done.returncode == 0, done.stderr
    assert "action masks: info" in done.stdout
    monkeypatch.syspath_prepend(".")
    assert main("--evaluate", "runs/two", "--no-deterministic")[0] == 0


@pytest.mark.slow
def test_two_nodes_of_one_rank_learn_what_one_node_of_two_ranks_learns():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [*QUICK, "--run-name", "two", "--norm-obs", "--norm-reward", "--checkpoint-every", "2"]
    nodes = []
    for i in range(2):
        folder = Path(f"node-{i}")  # they share no disk
        folder.mkdir()
        where = ["--nnodes", "2", "--node-rank", i, "--master-addr", "127.0.0.1", "--master-port", port]
        nodes.append((["--nproc-per-node", "1", *map(str, where)], folder))
    with ThreadPoolExecutor() as pool:
        starts = [pool.submit(launch, launcher, *flags, cwd=folder) for launcher, folder in nodes]
        first, second = (start.result() for start in starts)
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert torchrun(*flags).returncode == 0
    nodes, node = Path("node-0/runs/two"), Path("runs/two")
    assert (nodes / "model.safetensors").read_bytes() == (node / "model.safetensors").read_bytes()
    ours, theirs = (torch.load(io.BytesIO(max(run.glob("*.pt")).read_bytes()[:-32])) for run in (nodes, node))
    for part in ("agent", "optimizer"):
        assert all(ours[part][name].equal(value) for name, value in theirs[part].items())
    assert json.loads((nodes / "results.json").read_text())["ranks"] == 2
    assert first.stdout.count("run: runs/two; next: ") == 1 and second.stdout == "" and not os.listdir("node-1")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num-envs", "3"], "--num-envs 3 is no multiple of the 2 ranks"),
        (["--lstm-hidden-size", "8"], "--num-minibatches 4 must divide a rollout's 2 environments, as 2 does"),
    ],
)
def test_environments_that_ranks_cannot_share_are_refused_in_one_line(flags, words, main, monkeypatch):
    monkeypatch.setattr(ppo, "RANKS", 2)
    code, out, err = main(*QUICK, *flags)  # --num-minibatches 4
    assert (code, out, err.count("\n")) == (2, "", 1) and not Path("runs").exists()
    assert words in err


def test_on_more_ranks_the_minibatches_of_a_run_that_is_resumed_stay_as_they_are(main, monkeypatch):
    memory = ["--lstm-hidden-size", "8", "--run-name", "one"]
    assert main(*QUICK, *memory)[0] == 0
    Path("runs/one/results.json").unlink()
    monkeypatch.setattr(ppo, "RANKS", 2)
    code, out, err = main("--resume", "runs/one")
    assert (code, out) == (2, "") and "--num-minibatches 4 must divide a rollout's 2 environments, as 2 does" in err


UNEQUAL = """
import os
import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

length = 128 if os.environ.get("RANK") == "0" else 3  # a whole rollout, or as many resets as can be
gym.register("Unequal-v0", PendulumEnv, max_episode_steps=length)
"""


def test_episodes_are_logged_at_steps_of_all_ranks():
    Path("unequal.py").write_text(UNEQUAL)
    done = torchrun("--env-id", "unequal:Unequal-v0", *QUICK, "--checkpoint-every", "1", "--run-name", "unequal")
    assert done.returncode == 0, done.stderr
    logs = scalars("runs/unequal")
    assert [step for step, _ in logs["charts/episodic_return"]] == [step for step, _ in logs["charts/SPS"]]


MORTAL = """
import os, signal
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Mortal(CartPoleEnv):
    age = 0

    def step(self, action):
        Mortal.age += 1
        if Mortal.age == int(os.environ.get("AGE", 700)) and os.environ["RANK"] == "1":
            if os.environ.get("FATE") == "raise":
                raise RuntimeError("out of order")
            if os.environ.get("FATE") == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)

gym.register("Mortal-v0", Mortal, max_episode_steps=100)
"""


def test_what_the_first_rank_refuses_ends_all_in_one_line():
    Path("runs/two").mkdir(parents=True)
    Path("runs/two/results.json").write_text("{}")
    done = torchrun(*QUICK, "--run-name", "two")
    assert done.returncode == 1 and done.stderr.count("error: runs/two exists") == 1
    assert "rank1" not in done.stderr and "exitcode  : 2" in done.stderr


def test_an_environment_that_fails_on_one_rank_ends_all():
    Path("mortal.py").write_text(MORTAL)
    done = torchrun("--env-id", "mortal:Mortal-v0", *QUICK, "--run-name", "two", FATE="raise")
    cause = done.stderr.partition("Root Cause")[2]
    assert done.returncode != 0
    assert "RuntimeError: out of order" in done.stderr and "rank      : 1" in cause and "exitcode  : 1" in cause


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_run_resumes_bit_for_bit():
    Path("mortal.py").write_text(MORTAL)
    mortal = ["--env-id", "mortal:Mortal-v0", *QUICK, "--checkpoint-every", "2"]
    age = random.randint(300, 900)  # after the first iteration; at 490 or so the second leg begins
    done = torchrun(*mortal, "--run-name", "killed", FATE="kill", AGE=str(age))
    cause = done.stderr.partition("Root Cause")[2]
    assert done.returncode != 0 and not Path("runs/killed/results.json").exists()
    assert "rank      : 1" in cause and "SIGKILL" in cause
    assert torchrun("--resume", "runs/killed").returncode == 0
    assert torchrun(*mortal, "--run-name", "straight").returncode == 0
    weights = [Path(f"runs/{name}/model.safetensors").read_bytes() for name in ("killed", "straight")]
    assert weights[0] == weights[1]
