"""A run killed at any moment and resumed ends like one that never was: weights, scores and logs, bit for bit."""

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, command, scalars
from filelock import FileLock
from safetensors.torch import load_file
from tensorboard.summary.writer import event_file_writer

import ppo

event_file_writer._global_uid = event_file_writer.AtomicCounter(1000)  # of two logs of one second, 10 is read before 9

RUN = Path("runs", "it")
RESUME = ["--resume", RUN]
COMMON = "--run-name it --checkpoint-every 2 --num-minibatches 4 --update-epochs 2 --eval-episodes 4"
SIZE = "--num-envs 4 --num-steps 64 --total-timesteps 5120 --validation-episodes 2"  # 20 iterations
FAMILIES = {
    "CartPole": "--num-envs 32 --num-steps 32 --total-timesteps 20480 --validation-episodes 5",
    "FrozenLake": f"--env-id FrozenLake-v1 {SIZE} --num-steps 32 --total-timesteps 2560 --norm-obs --norm-reward",
    "FrozenLake async": f"--env-id FrozenLake-v1 --vectorization async {SIZE} --num-steps 32 --total-timesteps 2560",
    "Pendulum LSTM": f"--env-id Pendulum-v1 --lstm-hidden-size 8 --norm-obs {SIZE}",
    "LunarLander": f"--env-id LunarLander-v3 {SIZE}",
    "LunarLander async": f"--env-id LunarLander-v3 --vectorization async {SIZE}",
    "LunarLander soak": f"--env-id LunarLander-v3 {SIZE} --total-timesteps 25600 --validation-episodes 1",
    "BipedalWalker": f"--env-id BipedalWalker-v3 {SIZE} --validation-episodes 1 --eval-episodes 1",
    "Hopper": f"--env-id Hopper-v5 {SIZE}",
    "Space Invaders": "--env-id ALE/SpaceInvaders-v5 --num-envs 2 --num-steps 4 --total-timesteps 160 "
                      "--validation-episodes 0 --eval-episodes 1",
}  # fmt: skip


def flags(family):
    return f"{COMMON} {FAMILIES[family]}".split()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a family's run that nothing disturbed; each is trained once."""

    @functools.cache
    def train(family):
        folder = tmp_path_factory.mktemp("uninterrupted")
        with contextlib.chdir(folder):
            assert ppo.main(flags(family)) == 0
        return folder / RUN

    return train


def ending(run):
    """All that must not depend on whether a run was interrupted."""
    results = json.loads((run / "results.json").read_text())
    logs = {tag: [(step, repr(value)) for step, value in log] for tag, log in scalars(run).items()}  # NaN != NaN
    del logs["charts/SPS"]
    return logs | {
        "weights": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(),
        "curve": hashlib.sha256((run / "curve.png").read_bytes()).hexdigest(),
        "points": (run / "curve.csv").read_text(),
        "results": [results[key] for key in ("global_step", "episode_returns", "best_iteration", "validation")],
    }


def checkpoints(run=RUN):
    return sorted(run.glob("checkpoint-*.pt"))


def latest(run=RUN):
    """The iteration of the newest checkpoint; -1 while there is none."""
    return max((int(path.stem.removeprefix("checkpoint-")) for path in checkpoints(run)), default=-1)


def start(*argv, **kwargs):
    return subprocess.Popen([sys.executable, ROOT / "ppo.py", *argv], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)  # fmt: skip


def send(signum, argv, reference, iteration):
    """Start ppo.py; between the checkpoint of that iteration and the next, signal it; (exit code, standard error)."""
    interval = 2 * json.loads((reference / "results.json").read_text())["training_seconds"] / latest(reference)
    process = start(*argv)
    process.stdout.readline()  # "run: ...": it has begun
    while latest() < iteration and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, interval))
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


KILLS = [("CartPole", 1), ("CartPole", 3), ("FrozenLake async", 1)]
SLOW_KILLS = [("FrozenLake", 1), ("Pendulum LSTM", 1), ("LunarLander", 3), ("LunarLander async", 1),
              ("BipedalWalker", 1), ("Hopper", 1), ("Space Invaders", 1),
              ("LunarLander soak", 20)]  # fmt: skip


@pytest.mark.parametrize("family, kills", KILLS + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_KILLS])
def test_a_run_killed_at_random_moments_and_resumed_ends_as_if_nothing_had_happened(family, kills, uninterrupted):
    reference, argv = uninterrupted(family), flags(family)
    iterations = ppo.parse_args(argv).num_iterations
    for iteration in sorted(random.choices(range(0, iterations * 6 // 10, 2), k=kills)):
        code, error = send(signal.SIGKILL, argv, reference, iteration)
        assert code == -signal.SIGKILL, error
        argv = RESUME
    process = command(*RESUME)
    assert process.returncode == 0, process.stderr
    assert ending(RUN) == ending(reference)
    assert len({step for step, _ in scalars(RUN)["charts/learning_rate"]}) == iterations


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_told_to_stop_stops_cleanly_says_how_to_go_on_and_goes_on_exactly(signum, code, uninterrupted):
    reference = uninterrupted("CartPole")
    stopped, error = send(signum, flags("CartPole"), reference, iteration=8)
    assert stopped == code
    assert error.endswith(f"python ppo.py --resume {RUN}\n") and "Traceback" not in error
    process = command(*RESUME)
    assert process.returncode == 0, process.stderr
    assert ending(RUN) == ending(reference)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(second, tmp_path):
    world = "import atexit, time, gymnasium\natexit.register(time.sleep, 60)\n" \
            "gymnasium.register('Slow-v0', gymnasium.spec('CartPole-v1').entry_point, max_episode_steps=9)"  # fmt: skip
    Path("slow_to_leave.py").write_text(world)
    process = start("--env-id", "slow_to_leave:Slow-v0", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    while "stopped" not in (line := process.stderr.readline()):
        assert line, "it ended without a word"
    process.send_signal(second)
    process.communicate(timeout=5)
    assert process.returncode == -second


# One process at a time


def refusal(process):
    """Of a process that ended: its one line, if it left everything else alone."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1), err
    return err


def test_of_two_processes_that_start_the_same_run_at_the_same_time_one_trains_it(uninterrupted):
    processes = [start(*flags("CartPole")) for _ in range(2)]
    winner, loser = sorted(processes, key=lambda process: process.wait(timeout=120))
    assert winner.returncode == 0, winner.stderr.read()
    err = refusal(loser)
    assert f"locking {RUN} failed" in err or f"{RUN} exists: choose another --run-name" in err
    assert winner.communicate()[1] == "" and ending(RUN) == ending(uninterrupted("CartPole"))


def test_a_folder_is_locked_before_its_first_file_is_written():
    RUN.mkdir(parents=True)
    with FileLock(RUN / "lock"):
        err = refusal(start(*flags("CartPole")))
    assert err.startswith(f"error: locking {RUN} failed") and "Another process trains it" in err
    assert os.listdir(RUN) == ["lock"]


def test_a_process_that_hangs_keeps_its_run_until_it_is_killed(uninterrupted):
    process = start(*flags("CartPole"))
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    try:
        assert f"{RUN} exists: choose another --run-name" in refusal(start(*flags("CartPole")))
        assert f"locking {RUN} failed" in refusal(start(*RESUME))
    finally:
        process.kill()
    process.communicate()
    assert (RUN / "lock").exists() and not (RUN / "results.json").exists()
    done = command(*RESUME)
    assert done.returncode == 0, done.stderr
    assert ending(RUN) == ending(uninterrupted("CartPole"))


DRAWN = """
import os, random, signal
import gymnasium as gym
import numpy as np
class Drawn(gym.Env):
    observation_space, action_space, steps = gym.spaces.Box(0, 1, (2,)), gym.spaces.Discrete(2), 0
    def reset(self, *, seed=None, options=None):
        return np.array([random.random(), np.random.rand()], np.float32), {}
    def step(self, action):
        Drawn.steps += 1
        if Drawn.steps == int(os.environ.get("LAST", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.reset()[0], random.random() * action, np.random.rand() < 0.1, False, {}
gym.register("Drawn-v0", Drawn)
"""


def test_each_leg_seeds_all_that_is_random_so_that_a_world_may_draw_from_what_no_checkpoint_holds(tmp_path):
    Path("drawn.py").write_text(DRAWN)
    argv = ["--env-id", "drawn:Drawn-v0", *QUICK, "--checkpoint-every", "2", "--run-name"]  # two legs of 1024 rows
    for last in random.randint(1, 900), random.randint(1, 900), 0:
        env = {"PYTHONPATH": str(tmp_path), "LAST": str(last)}
        process = command(*(RESUME if RUN.exists() else [*argv, "it"]), env=env)
        assert process.returncode == (-signal.SIGKILL if last else 0), process.stderr
    assert command(*argv, "straight", env=env).returncode == 0
    assert ending(RUN) == ending(Path("runs", "straight"))


# Legs: the iterations between two checkpoints


@pytest.mark.parametrize("total, limit, every, barren, lengths", [
    (100, None, 0, 0, [10] * 10), (105, None, 0, 0, [10] * 10 + [5]), (9, None, 0, 0, [1] * 9), (1, None, 0, 0, [1]),
    (100, 64, 0, 0, [10] * 10), (100, 66, 0, 0, [11] * 9 + [1]), (100, 128, 0, 0, [20] * 5),
    (100, 100_000, 0, 0, [34, 34, 32]), (99, 100_000, 0, 0, [33, 33, 33]), (5, 100_000, 0, 0, [2, 2, 1]),
    (100, None, 0, 1, [10, 20, 20, 20, 20, 10]), (100, None, 0, 2, [10, 20, 34, 34, 2]),
    (100, 64, 0, 1, [10] + [20] * 4 + [10]), (100, 128, 0, 1, [20, 34, 34, 12]),
    (100, None, 0, 9, [10, 20, 34, 34, 2]), (100, 100_000, 0, 9, [34, 34, 32]),
    (100, None, 30, 0, [30, 30, 30, 10]), (100, 100_000, 7, 9, [7] * 14 + [2]), (100, 128, 200, 0, [100]),
])  # fmt: skip
def test_a_leg_is_a_tenth_or_five_episodes_and_twice_as_many_after_each_in_which_none_ended(
    total, limit, every, barren, lengths, monkeypatch
):
    """Of rollouts of 32 steps; in the first `barren` legs no episode ends."""
    spec = gym.envs.registration.EnvSpec("Tiny-v0", entry_point="none", max_episode_steps=limit)
    monkeypatch.setitem(gym.registry, "Tiny-v0", spec)
    args = ppo.Args("tiny:Tiny-v0", num_envs=4, num_steps=32, total_timesteps=total * 128, checkpoint_every=every)
    state, at, found = SimpleNamespace(args=args, iteration=0, ended=0, barren=0), 0, []
    for leg in ppo.legs(state):
        assert leg.start == at and state.ended == 0
        state.ended, state.iteration, at = int(len(found) >= barren), leg.stop, leg.stop
        found.append(len(leg))
    assert found == lengths and at == total


class Patient(gym.Env):
    """Pays at random; an episode takes 100 steps, and no limit is declared."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.normal(size=2).clip(-9, 9).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        obs = self.np_random.normal(size=2).clip(-9, 9).astype(np.float32)
        return obs, float(self.np_random.normal() + action), self.t == 100, False, {}


PATIENT = [*QUICK, "--preset", "none", "--num-envs", "2", "--num-steps", "8", "--total-timesteps", "640",
           "--num-minibatches", "2", "--norm-reward", "--run-name", "it"]  # fmt: skip


@pytest.fixture
def saved(monkeypatch):
    """The iterations of the checkpoints, as they are saved."""
    iterations, checkpoint = [], ppo.State.checkpoint
    monkeypatch.setattr(ppo.State, "checkpoint", lambda state: (checkpoint(state), iterations.append(state.iteration)))
    return iterations


@pytest.mark.parametrize(
    "stops", [(2,), (4,), (5,), (12,), (13, 25), (26,), (30,), (3, 4, 11, 12, 13, 26, 39)], ids=str
)
def test_legs_that_double_are_the_same_when_a_run_is_resumed(stops, saved, main, register, monkeypatch):
    """Legs of 4 and 8 rollouts of 8 steps end no episode of 100 steps; one of 14, a third of the run, does."""
    env_id, collect, starts = register(Patient), ppo.collect, (0, 4, 12, 26)
    assert main("--env-id", env_id, *PATIENT)[0] == 0
    assert saved == [0, 4, 12, 26, 40]
    os.rename("runs", "straight")

    for stop in stops:  # while that iteration collects, wherever it was resumed
        count = iter(range(latest() if RUN.exists() else 0, 10**9))

        def interrupt(agent, worlds, rollout, stop=stop, count=count):
            if next(count) == stop:
                raise KeyboardInterrupt
            collect(agent, worlds, rollout)

        with monkeypatch.context() as patch:
            patch.setattr(ppo, "collect", interrupt)
            code, _, err = main(*(RESUME if RUN.exists() else ["--env-id", env_id, *PATIENT]))
        assert code == 130 and latest() == max(i for i in starts if i <= stop), err
    saved.clear()
    assert main(*RESUME)[0] == 0
    assert saved == [i for i in (*starts, 40) if i >= max(i for i in starts if i <= stops[-1])]
    assert ending(RUN) == ending(Path("straight", "it"))
    assert len(ending(RUN)["charts/episodic_return"]) == 2  # in two legs, one episode in each environment


def test_a_limit_beyond_the_run_leaves_three_checkpoints_all_the_same(saved, main, register):
    assert main("--env-id", register(Patient, max_episode_steps=100_000), *PATIENT)[0] == 0
    assert saved == [0, 14, 28, 40]


# A finished run, and one that was stopped between its last checkpoint and its results


@pytest.fixture
def finished(uninterrupted):
    return Path(shutil.copytree(uninterrupted("CartPole"), RUN))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "finish", lambda _: signal.raise_signal(signal.SIGINT))
        assert ppo.main(flags("CartPole")) == 130
    return folder / RUN


@pytest.fixture
def unfinished(stopped):
    return Path(shutil.copytree(stopped, RUN))


def read(path):
    """What a checkpoint holds, before its checksum."""
    return torch.load(io.BytesIO(path.read_bytes()[:-32]), weights_only=True)


def test_only_the_last_two_checkpoints_are_kept(finished):
    assert [path.name for path in checkpoints()] == ["checkpoint-00000018.pt", "checkpoint-00000020.pt"]


def test_resuming_a_finished_run_does_nothing_and_says_so(finished, main):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    code, out, err = main(*RESUME)
    assert code == 0 and "finished" in out + err
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_a_run_killed_before_its_second_checkpoint_can_be_played_and_started_from(main):
    process = start(*flags("CartPole"), "--total-timesteps", "1e7", "--checkpoint-every", "9999")
    process.stdout.readline()  # "run: ...": from here on
    process.kill()
    process.communicate()
    agent, best = read(*checkpoints())["agent"], load_file(RUN / "model.safetensors")
    assert all(best[name].equal(value) for name, value in agent.items())
    for flag in ("--evaluate", "--init-from"):
        code, out, err = main(flag, RUN, "--total-timesteps", 1024, "--run-name", "other")
        assert (code, err) == (0, "") and "mean_reward" in out


def test_resuming_mends_an_agent_that_a_kill_left_older_than_the_checkpoint(main, monkeypatch):
    write_file = ppo.write_file

    def killed(path, data):
        if path.name == "model.safetensors" and latest() == 4:
            raise KeyboardInterrupt
        write_file(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "write_file", killed)
        assert main(*QUICK, "--checkpoint-every", 2, "--validation-episodes", 0, "--run-name", "it")[0] == 130
    agent = read(checkpoints()[-1])["agent"]
    assert not load_file(RUN / "model.safetensors")["actor.0.weight"].equal(agent["actor.0.weight"])
    assert main(*RESUME)[0] == 0  # nothing is left to train
    assert all(load_file(RUN / "model.safetensors")[name].equal(value) for name, value in agent.items())


SECOND_EDITION = {"obs_shape": [4], "action_shape": [], "nvec": [2], "hidden_sizes": [64, 64], "activation": "tanh",
                  "precision": "float32", "masks": None, "parts": None}  # fmt: skip


@pytest.mark.parametrize("flag", ["--evaluate", "--resume", "--init-from"])
def test_a_run_of_an_earlier_edition_is_refused_in_one_line_that_names_what_takes_it(flag, unfinished, main):
    (RUN / "config.json").write_text(json.dumps(SECOND_EDITION))
    (RUN / "hyperparameters.json").write_text(json.dumps({"env_id": "CartPole-v1", "seed": 1}))
    code, out, err = main(flag, RUN)
    assert (code, out, err.count("\n")) == (2, "", 1) and os.listdir("runs") == ["it"]
    assert str(RUN) in err and "another ppo.py made it, use the one beside it" in err


def test_a_run_of_another_network_is_not_resumed(unfinished, main, monkeypatch):
    monkeypatch.setattr(ppo, "mlp", lambda sizes, *_, **__: torch.nn.Linear(sizes[0], sizes[-1]))
    code, _, err = main(*RESUME)
    assert code == 2 and err.count("unusable") == 2 and "state_dict" in err
    assert err.splitlines()[-1].startswith(f"error: {RUN} has no usable checkpoint")


@pytest.mark.parametrize("flags", [[], ["--device", "cpu"]], ids=["as it was", "on another device"])
def test_a_run_stopped_after_its_last_checkpoint_is_only_evaluated(flags, unfinished, uninterrupted, main):
    code, _, err = main(*RESUME, *flags)
    assert (code, err) == (0, "")
    assert ending(RUN) == ending(uninterrupted("CartPole"))


CHANGES = ["env-id CartPole-v1 -> FrozenLake-v1", "learning-rate 0.002 -> 0.1", "seed 1 -> 2", "num-envs 32 -> 64",
           "checkpoint-every 2 -> 3", "gamma 0.98 -> 0.9", "validation-episodes 5 -> 0"]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_as_another_run_is_refused_with_the_difference(change, unfinished, main):
    name, _, _, value = change.split()
    code, _, err = main(*RESUME, f"--{name}", value)
    assert (code, err.count("\n")) == (2, 1) and f"--{change}" in err


DAMAGES = {
    "a byte of the weights flipped": lambda data: flip(data, data.index(b"archive/data/0") + 1000),
    "a byte of the checksum flipped": lambda data: flip(data, len(data) - 1),
    "truncated": lambda data: data[: len(data) // 2],
    "last byte lost": lambda data: data[:-1],
    "first half lost": lambda data: data[len(data) // 2 :],
    "zeros": lambda data: bytes(len(data)),
    "empty": lambda data: b"",
}


def flip(data, place, mask=1):
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(damage, unfinished, uninterrupted, main):
    newest = checkpoints()[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    code, _, err = main(*RESUME)
    assert (code, err.count("\n")) == (0, 1) and str(newest) in err and "unusable" in err
    assert ending(RUN) == ending(uninterrupted("CartPole"))


@pytest.mark.parametrize("mask", [1, 255])
def test_wherever_a_byte_is_flipped_it_is_noticed_and_the_checkpoint_before_is_loaded(mask, finished, capsys):
    config, newest = json.loads((RUN / "config.json").read_text()), checkpoints()[-1]
    args, agent, data = replace(ppo.make_args(config), resume=str(RUN)), ppo.Agent(**config), newest.read_bytes()
    state = ppo.State(args, agent, ppo.Adam(agent), 0.0, "")
    for place in [*range(0, len(data), 499), *range(len(data) - 40, len(data))]:
        newest.write_bytes(flip(data, place, mask))
        state.restore()
        err = capsys.readouterr().err
        assert state.iteration == 18 and str(newest) in err and "unusable" in err and err.count("\n") == 1, place
    newest.write_bytes(data)
    state.restore()
    assert state.iteration == 20 and capsys.readouterr().err == ""


def test_a_checkpoint_that_carries_code_runs_nothing(unfinished, uninterrupted, main):
    class Payload:
        def __reduce__(self):
            return os.system, ("touch it_ran",)

    newest = checkpoints()[-1]
    torch.save(read(newest) | {"iteration": Payload()}, file := io.BytesIO())
    newest.write_bytes(file.getvalue() + hashlib.sha256(file.getvalue()).digest())
    code, _, err = main(*RESUME)
    assert code == 0 and str(newest) in err and not Path("it_ran").exists()
    assert ending(RUN) == ending(uninterrupted("CartPole"))


# Best and last


@pytest.mark.parametrize("scores, best", [((1, 3, 2), 1), ((1, 3, 3), 2), ((3, 3, 2), 1), ((-5, -5, -9), 1)])
def test_the_best_checkpoint_is_published_and_a_tie_goes_to_the_newer(scores, best, main, monkeypatch):
    agents, evaluate = [], ppo.evaluate

    def scripted(agent, args, episodes, stream=ppo.EVALUATION, *rest, **kwargs):
        if stream != ppo.VALIDATION:
            return evaluate(agent, args, episodes, stream, *rest, **kwargs)
        agents.append({name: value.clone() for name, value in agent.state_dict().items()})
        return np.full((2, episodes), scores[len(agents) - 1])

    monkeypatch.setattr(ppo, "evaluate", scripted)
    out = main(*QUICK, "--total-timesteps", 3072, "--checkpoint-every", 2, "--run-name", "it")[1]
    results = json.loads((RUN / "results.json").read_text())
    published = load_file(RUN / "model.safetensors")
    assert all(published[name].equal(value) for name, value in agents[best].items())
    assert results["validation"] == {"best": scores[best], "last": scores[-1]}
    assert results["best_iteration"] == 2 * best + 2 and f"kept: the agent of iteration {2 * best + 2}" in out
    assert f"validation {scores[best]:.2f}; last {scores[-1]:.2f}" in out


def test_validation_does_not_touch_what_is_trained(main):
    for episodes in (0, 5):
        argv = ["--validation-episodes", episodes, "--checkpoint-every", 1, "--run-name", f"validated-{episodes}"]
        assert main(*QUICK, *argv)[0] == 0
    without, with_it = (read(checkpoints(Path("runs", f"validated-{n}"))[-1]) for n in (0, 5))
    assert all(with_it["agent"][name].equal(value) for name, value in without["agent"].items())
    assert json.loads(Path("runs/validated-0/results.json").read_text())["validation"] is None


def test_validation_and_the_final_report_use_different_seeds():
    assert not set(ppo.seeds(1, ppo.VALIDATION, n=1000)) & set(ppo.seeds(1, ppo.EVALUATION, n=1000))


def test_validating_the_same_agent_again_gives_the_same_score_where_a_world_survives_its_reset():
    args = ppo.Args(env_id="BipedalWalker-v3")
    agent = ppo.Agent(**ppo.look(args))
    first, again = (ppo.evaluate(agent, args, 2, ppo.VALIDATION)[0] for _ in range(2))
    assert first.tolist() == again.tolist()
