"""Several processes under torchrun: they train one agent, decide together, and end together."""

import copy
import json
import os
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
from gymnasium.envs.classic_control import PendulumEnv

import ppo

ONE_UPDATE = {"num_envs": 4, "num_steps": 32, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 128}
PENDULUM = ppo.Args(env_id="Pendulum-v1", validation_episodes=0, **ONE_UPDATE)  # no episode ends in it
CARTPOLE = ppo.Args(total_timesteps=1024, num_steps=64, validation_episodes=0, learning_rate=1e-2)
MEMORY = {"lstm_hidden_size": 8, "num_minibatches": 2}  # of whole environments: each rank has two


def join(rank, store):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=30), 2, rank)


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
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=env, cwd=cwd)


def torchrun(*argv, **env):
    """ppo.py on two ranks."""
    return launch(["--nproc-per-node", "2"], *argv, **env)


def this_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def train(args):
    """Run ppo.train; the weights and statistics that this process ended with, and its number of gradient steps."""
    save_checkpoint, weights = ppo.save_checkpoint, {}

    def save(run, state):
        weights.update({name: value.clone() for name, value in state.agent.state_dict().items()})
        save_checkpoint(run, state)

    with (
        patch.object(ppo, "save_checkpoint", save),
        patch.object(ppo.FlatAdam, "step", autospec=True, side_effect=ppo.FlatAdam.step) as step,
    ):
        ppo.train(args)
    return weights, step.call_count


def train_on_shared_worlds(args):
    """Like `train`, but each rank takes its part of the same environments and the same noise, however many ranks."""
    seeds = ppo.seeds

    def shared_seeds(seed, *stream, n=1):
        return seeds(seed, *stream, n=n) if n == 1 else list(range(10 + this_rank() * n, 10 + (this_rank() + 1) * n))

    def shared_noise(agent, T, N, generator):
        noise = torch.randn(T, args.num_envs, agent.outputs, generator=torch.Generator().manual_seed(1))
        return noise[:, this_rank() * N : (this_rank() + 1) * N]

    with patch.object(ppo, "seeds", shared_seeds), patch.object(ppo.Agent, "sample_noise", shared_noise):
        return train(args)[0]


@pytest.mark.parametrize("settings", [{}, MEMORY, {"env_id": "Taxi-v4"}], ids=["plain", "memory", "masks"])
def test_both_ranks_end_with_the_same_weights_and_statistics(settings, ranks):
    args = replace(CARTPOLE, run_name=f"same-{len(settings)}", norm_obs=True, norm_reward=True, **settings)
    (first, _), (second, _) = ranks(train, args)
    assert all(torch.equal(first[name], second[name]) for name in first)


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


def sample_batch(n=40):
    """A small agent and n rows to learn from."""
    torch.manual_seed(1)
    agent = ppo.Agent([4], [], [2], hidden_sizes=[64, 64])
    obs, actions, logprobs = torch.randn(n, 4), torch.randint(2, (n,)), -torch.rand(n)
    values, returns, advantages = torch.randn(3, n)
    return agent, ppo.Batch(obs, actions, logprobs, values, advantages, returns)


def gradient_of(rows, share):
    """The gradient and the metrics, the mean over all ranks of each."""
    agent, batch = sample_batch()
    gradient, metrics = ppo.mean_over_ranks(*ppo.compute_gradient(agent, batch[rows], ppo.Args()), share)
    return [gradient, *metrics.values()]


def gradient_of_unequal_parts():
    return gradient_of(slice(0, 30), 0.75) if this_rank() == 0 else gradient_of(slice(30, 40), 0.25)


def test_ranks_with_more_rows_count_for_more(ranks):
    both = ranks(gradient_of_unequal_parts)
    union = gradient_of(slice(0, 40), 1.0)
    for part in both:
        for mean, expected in zip(part, union):
            torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)


def standardize_unequal_parts():
    x = torch.arange(40.0) ** 2
    return ppo.standardize(x[:30], 0.75) if this_rank() == 0 else ppo.standardize(x[30:], 0.25)


def test_advantages_are_standardised_over_all_ranks(ranks):
    torch.testing.assert_close(torch.cat(ranks(standardize_unequal_parts)), ppo.standardize(torch.arange(40.0) ** 2))


def shares_in_training(args):
    """Of each iteration: the rows of this rank that are transitions, and the shares that it counts with."""
    rows, shares = [], []
    collect, standardize, mean_over_ranks = ppo.collect, ppo.standardize, ppo.mean_over_ranks

    def collect_and_count(agent, worlds, rollout, generator):
        collect(agent, worlds, rollout, generator)
        rows.append(int(rollout.valid.sum()))
        shares.append(set())

    def standardize_and_note(x, share=1.0):
        shares[-1].add(float(share))
        return standardize(x, share)

    def average_and_note(gradient, metrics, share):
        shares[-1].add(float(share))
        return mean_over_ranks(gradient, metrics, share)

    with patch.multiple(ppo, collect=collect_and_count, standardize=standardize_and_note,
                        mean_over_ranks=average_and_note):  # fmt: skip
        ppo.train(args)
    return rows, shares


def test_in_training_each_rank_counts_with_its_share_of_the_transitions(ranks):
    (first, *shares), (second, *others) = ranks(shares_in_training, replace(CARTPOLE, run_name="shares"))
    assert len(first) == CARTPOLE.num_iterations and first != second
    for mine, theirs, a, b in zip(first, second, *shares, *others, strict=True):
        assert (a, b) == ({mine / (mine + theirs)}, {theirs / (mine + theirs)})


class Halved(PendulumEnv):
    """Some seeds have episodes of one step, so that every second row is a reset; the others have none at all."""

    def reset(self, *, seed=None, options=None):
        self.short = self.short if seed is None else seed != 11
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, *_, info = super().step(action)
        return obs, reward, False, self.short, info


gym.register("Halved-v0", Halved)


def steps_of_training(args):
    """Of each minibatch: the agent before it, what this rank had of it, its advantages as they were estimated, and the
    gradient that both ranks took."""
    steps, compute_gradient, clip_norm, standardize = [], ppo.compute_gradient, ppo.clip_norm, ppo.standardize

    def note_and_standardize(x, share=1.0):
        steps.append([x])
        return standardize(x, share)

    def note_and_compute(agent, batch, args):
        steps[-1] += [copy.deepcopy(agent), batch]
        return compute_gradient(agent, batch, args)

    def note_and_clip(gradient, limit):
        steps[-1] += [gradient]
        return clip_norm(gradient, limit)

    with patch.multiple(ppo, standardize=note_and_standardize, compute_gradient=note_and_compute,
                        clip_norm=note_and_clip):  # fmt: skip
        train_on_shared_worlds(args)
    return steps


def union(parts):
    """The environments of all ranks in one minibatch, each of their valid rows once."""
    valid = np.concatenate([part.valid for part in parts], 1)
    rows, columns = torch.as_tensor(np.flatnonzero(valid)), {}
    for name in ("actions", "logprobs", "values", "advantages", "returns"):
        tables = [torch.zeros(*part.valid.shape, *getattr(part, name).shape[1:]) for part in parts]
        for part, table in zip(parts, tables):
            table.flatten(0, 1)[part.rows] = getattr(part, name)
        columns[name] = torch.cat(tables, 1).flatten(0, 1)[rows]
    obs, memory = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("obs", "memory"))
    return ppo.Chapters(obs=obs, **columns, valid=valid, memory=memory, rows=rows)


def test_with_memory_each_rank_counts_with_the_valid_rows_of_its_environments_in_a_minibatch(ranks):
    args = replace(PENDULUM, env_id="Halved-v0", run_name="halved", update_epochs=3, total_timesteps=256, **MEMORY)
    first, second = ranks(steps_of_training, args)
    counts = set()
    for (a, agent, mine, gradient), (b, _, theirs, same) in zip(first, second, strict=True):
        counts.add((mine.valid.sum(), theirs.valid.sum()))
        whole = union([mine, theirs])
        raw = union([replace(mine, advantages=a), replace(theirs, advantages=b)]).advantages
        torch.testing.assert_close(whole.advantages, ppo.standardize(raw), rtol=1e-5, atol=1e-6)
        expected, _ = ppo.compute_gradient(agent, whole, args)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
        assert gradient.equal(same)
    assert len(first) == 12 and counts == {(16, 16), (32, 16)}  # valid rows of each rank


def statistics(*batches):
    stats = ppo.RunningMeanStd((3,))
    for batch in batches:
        stats.update(batch)
    return torch.stack([stats.count, stats.mean, stats.var])


def statistics_of_unequal_parts():
    x = sample_batch(60)[1].obs[:, :3]
    return statistics(x[:10], x[20:25]) if this_rank() == 0 else statistics(x[10:20], x[25:])


def test_running_statistics_are_those_of_all_ranks(ranks):
    x = sample_batch(60)[1].obs[:, :3]
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
    last = ppo.load_checkpoint(run)
    (run / f"checkpoint-{args.num_iterations:08d}.pt").unlink()  # as if killed after the one before
    again = ranks(resumed, args)
    for (weights, _), (expected, _) in zip(again, straight):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert all(map(torch.equal, ppo.load_checkpoint(run)["generator"], last["generator"]))
    assert not torch.equal(*last["generator"])


def test_torchrun_leaves_one_run_with_one_log_and_one_score():
    done = torchrun(*QUICK, "--run-name", "two")
    assert done.returncode == 0, done.stderr
    run = Path("runs/two")
    assert os.listdir("runs") == ["two"] and len(list(run.glob("events.*"))) == 2  # the second has the final score
    assert done.stdout.count("greedy episodes") == 1 and done.stdout.count("run: runs/two\n") == 1
    assert ppo.load_checkpoint(run)["settings"]["ranks"] == 2
    assert "\ntorchrun --nproc-per-node 2 ppo.py --env-id CartPole-v1 " in (run / "README.md").read_text()
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
    assert results["settings"]["ranks"] == 2 and done.stdout.count("run: runs/two\n") == 1
    code, out, err = main("--evaluate", run)
    assert code == 0, err
    assert f"mean_reward {results['mean_reward']:.2f} " in out
    agent = ppo.Agent.from_pretrained(run, strict=True)
    agent.predict(np.zeros(4, np.float32))
    assert agent.recalled.any() and agent.recalled.shape == (2, 1, 8)
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
    assert "action masks: by info" in done.stdout
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
    ours, theirs = ppo.load_checkpoint(nodes), ppo.load_checkpoint(node)
    assert ours["settings"]["ranks"] == theirs["settings"]["ranks"] == 2
    assert all(ours["agent"][name].equal(value) for name, value in theirs["agent"].items())
    assert all(map(torch.equal, ours["generator"], theirs["generator"]))
    assert first.stdout.count("run: runs/two\n") == 1 and second.stdout == "" and not os.listdir("node-1")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num-envs", "3"], "--num-envs 3, and the rows of a minibatch, must be multiples of 2 ranks"),
        (["--lstm-hidden-size", "8"], "--num-envs 4, and the environments of a minibatch, must be multiples of 2"),
    ],
)
def test_environments_that_ranks_cannot_share_are_refused_in_one_line(flags, words, main, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = main(*QUICK, *flags)  # --num-minibatches 4
    assert (code, out, err.count("\n")) == (2, "", 1) and not Path("runs").exists()
    assert words in err


@pytest.mark.parametrize("rank, said", [("0", "--num-minibatches 16 -> 2, "), ("1", "")])
def test_with_memory_a_presets_minibatches_give_way_to_those_that_ranks_can_share(rank, said, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    args = ppo.parse_args(["--env-id", "Pendulum-v1", "--lstm-hidden-size", "8"])
    assert (args.num_envs, args.num_minibatches) == (4, 2)  # each rank has two environments
    out = capsys.readouterr().out
    assert out.startswith(said) and bool(out) == bool(said)


def test_on_more_ranks_the_minibatches_of_a_run_that_is_resumed_stay_as_they_are(main, monkeypatch):
    memory = ["--lstm-hidden-size", "8", "--run-name", "one"]
    assert main(*QUICK, *memory)[0] == 0
    Path("runs/one/results.json").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = main("--resume", "runs/one")
    assert (code, out) == (2, "") and "the environments of a minibatch, must be multiples of 2 ranks" in err


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
    assert [step for step, _ in logs["charts/episodic_return"][::2]] == [step for step, _ in logs["charts/SPS"]]


MORTAL = """
import os, signal
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Mortal(CartPoleEnv):
    age = 0

    def step(self, action):
        Mortal.age += 1
        if Mortal.age == 700 and os.environ["RANK"] == "1":  # in the third of four iterations
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
    done = torchrun(*mortal, "--run-name", "killed", FATE="kill")
    cause = done.stderr.partition("Root Cause")[2]
    assert done.returncode != 0 and not Path("runs/killed/results.json").exists()
    assert "rank      : 1" in cause and "SIGKILL" in cause
    assert torchrun("--resume", "runs/killed").returncode == 0
    assert torchrun(*mortal, "--run-name", "straight").returncode == 0
    weights = [Path(f"runs/{name}/model.safetensors").read_bytes() for name in ("killed", "straight")]
    assert weights[0] == weights[1]
