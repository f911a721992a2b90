"""A run killed at any moment and resumed ends like one that never was: weights, scores and logs, bit for bit."""

import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, command, scalars
from safetensors.torch import load_file
from tensorboard.summary.writer import event_file_writer

import ppo

for package in ("Box2D", "mujoco", "ale_py", "envpool"):  # what is imported counts as a setting: no test adds to it
    importlib.import_module(package)
event_file_writer._global_uid = event_file_writer.AtomicCounter(1000)  # of two logs of one second, 10 is read before 9

RUN = Path("runs", "it")
RESUME = ["--resume", RUN]
COMMON = "--run-name it --checkpoint-every 2 --num-minibatches 4 --update-epochs 2 --eval-episodes 4"
SIZE = "--num-envs 4 --num-steps 64 --total-timesteps 5120 --validation-episodes 2"  # 20 iterations
FAMILIES = {
    "CartPole": "--num-envs 32 --num-steps 32 --total-timesteps 20480 --validation-episodes 5",
    "FrozenLake": f"--env-id FrozenLake-v1 {SIZE} --num-steps 32 --total-timesteps 2560 --norm-reward",
    "FrozenLake async": f"--env-id FrozenLake-v1 --vectorization async {SIZE} --num-steps 32 --total-timesteps 2560",
    "LunarLander": f"--env-id LunarLander-v3 {SIZE}",
    "LunarLander async": f"--env-id LunarLander-v3 --vectorization async {SIZE}",
    "LunarLander EnvPool": f"--env-id LunarLander-v3 --vectorization envpool {SIZE}",
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
        "results": [results[key] for key in ("global_step", "episode_returns", "published", "validation")],
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
SLOW_KILLS = [("FrozenLake", 1), ("LunarLander", 3), ("LunarLander async", 1), ("LunarLander EnvPool", 1),
              ("BipedalWalker", 1), ("Hopper", 1), ("Space Invaders", 1), ("LunarLander soak", 20)]  # fmt: skip


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


# A finished run, and what a kill just before its last checkpoint or its results would have left


@pytest.fixture
def finished(uninterrupted):
    return Path(shutil.copytree(uninterrupted("CartPole"), RUN))


@pytest.fixture
def unfinished(finished):
    for name in ("results.json", "model.safetensors", "README.md"):
        (finished / name).unlink()
    return finished


def rewrite(path, **changes):
    """Change a checkpoint's state and leave its checksums valid."""
    torch.save(torch.load(path, weights_only=True) | changes, path)


def test_only_the_last_two_checkpoints_are_kept(finished):
    assert [path.name for path in checkpoints()] == ["checkpoint-00000018.pt", "checkpoint-00000020.pt"]


def test_resuming_a_finished_run_does_nothing_and_says_so(finished, main):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    code, out, err = main(*RESUME)
    assert code == 0
    assert "finished" in out + err
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.mark.parametrize("flag", ["--evaluate", "--init-from"])
def test_an_unfinished_run_is_not_evaluated_but_told_to_be_resumed(flag, unfinished, main):
    code, _, err = main(flag, RUN)
    assert (code, err.count("\n")) == (2, 1) and os.listdir("runs") == ["it"]
    assert str(RUN) in err and "--resume" in err


def test_a_run_of_another_network_is_refused_in_one_line(unfinished, main, monkeypatch):
    monkeypatch.setattr(ppo, "mlp", lambda sizes, *_, **__: torch.nn.Linear(sizes[0], sizes[-1]))
    code, _, err = main(*RESUME)
    assert (code, err.count("\n")) == (2, 1)
    assert str(RUN) in err and "another network" in err


def test_a_run_killed_after_its_last_checkpoint_is_only_evaluated(unfinished, uninterrupted, main):
    assert main(*RESUME)[0] == 0
    assert ending(RUN) == ending(uninterrupted("CartPole"))


CHANGES = ["env-id CartPole-v1 -> FrozenLake-v1", "learning-rate 0.002 -> 0.1", "seed 1 -> 2", "num-envs 32 -> 64",
           "checkpoint-every 2 -> 3", "gamma 0.98 -> 0.9", "validation-episodes 5 -> 0"]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_as_another_run_is_refused_with_the_difference(change, unfinished, main):
    name, _, _, value = change.split()
    code, _, err = main(*RESUME, f"--{name}", value)
    assert code == 2
    assert f"--{change}" in err
    assert "--device" in err and "--track" in err  # what may change
    assert len(err.splitlines()) == 1


def test_the_device_may_change(unfinished, uninterrupted, main):
    assert main(*RESUME, "--device", "cpu")[0] == 0
    assert ending(RUN) == ending(uninterrupted("CartPole"))


@pytest.mark.parametrize("name, value", [("threads", 7), ("torch", "1.0"), ("device", "cuda"), ("ranks", 2)])
def test_a_difference_that_ends_exactness_is_said_aloud(name, value, unfinished, main):
    settings = ppo.load_checkpoint(RUN)["settings"]
    rewrite(checkpoints()[-1], settings=settings | {name: value})
    code, _, err = main(*RESUME)
    assert code == 0
    assert f"{name} {value} -> {settings[name]}" in err
    assert len(err.splitlines()) == 1


def test_a_resume_under_equal_circumstances_warns_of_nothing(unfinished, main):
    assert main(*RESUME)[2] == ""


DAMAGES = {
    "a byte of the weights flipped": lambda data: flip(data, data.index(b"archive/data/0") + 1000),
    "a byte of the settings flipped": lambda data: flip(data, data.index(b"best_iteration")),
    "a byte of the directory flipped": lambda data: flip(data, data.rindex(b"data/1")),
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
    assert code == 0
    assert str(newest) in err and "unusable" in err and len(err.splitlines()) == 1
    assert ending(RUN) == ending(uninterrupted("CartPole"))


def identical(a, b):
    """Whether two checkpoints hold the same, bit for bit."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and (a.dtype == b.dtype and a.equal(b) if isinstance(a, torch.Tensor) else a == b)


@pytest.mark.parametrize("mask", [1, 255])
def test_wherever_a_byte_is_flipped_nothing_else_is_loaded_unnoticed(mask, finished, capsys):
    _, newest = checkpoints()
    good, data, outcomes = ppo.load_checkpoint(RUN), newest.read_bytes(), []
    directory = zipfile.ZipFile(newest).start_dir
    newest.unlink()
    previous = ppo.load_checkpoint(RUN)
    assert not identical(good, previous)
    for place in [*range(0, len(data), 499), *range(directory, len(data), 7)]:  # an entry of it has about 60 bytes
        newest.write_bytes(flip(data, place, mask))
        loaded, err = ppo.load_checkpoint(RUN), capsys.readouterr().err
        if err:
            assert str(newest) in err and "unusable" in err and len(err.splitlines()) == 1, place
        assert identical(loaded, previous if err else good), place
        outcomes.append(bool(err))
    assert 0.5 < np.mean(outcomes) < 1  # most of the file is data, some is padding


@pytest.mark.parametrize("place", ["padding", "attributes", 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_run_resumed_from_a_damaged_file_ends_as_if_nothing_had_happened(place, unfinished, uninterrupted, main):
    newest = checkpoints()[-1]
    data = newest.read_bytes()
    places = {"padding": data.index(b"ZZZZ"), "attributes": data.rindex(b"archive/data/0") - 8}
    newest.write_bytes(flip(data, places.get(place) or int(place * len(data)), 255))
    code, _, err = main(*RESUME)
    assert code == 0
    assert bool(err) == {"padding": False, "attributes": True}.get(place, bool(err))
    assert not err or (str(newest) in err and "unusable" in err and len(err.splitlines()) == 1)
    assert ending(RUN) == ending(uninterrupted("CartPole"))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:1000]], ids=["empty", "truncated"])
def test_a_run_without_any_usable_checkpoint_is_refused_in_one_line_after_naming_each(damage, unfinished, main):
    for path in checkpoints():
        path.write_bytes(damage(path.read_bytes()))
    code, out, err = main(*RESUME)
    assert (code, out) == (2, "")
    *warnings, error = err.splitlines()
    assert [str(path) in line for path, line in zip(reversed(checkpoints()), warnings, strict=True)] == [True, True]
    assert error.startswith("error: ") and str(RUN) in error and "no usable checkpoint" in error


@pytest.mark.parametrize("version", [1, 2, 4])
def test_a_checkpoint_of_another_format_is_refused_in_one_line(version, unfinished, main):
    newest = checkpoints()[-1]
    rewrite(newest, version=version)
    code, out, err = main(*RESUME)
    assert (code, out) == (2, "")
    assert f"{newest} has format {version}, not {ppo.VERSION}" in err and len(err.splitlines()) == 1


def test_a_checkpoint_that_carries_code_runs_nothing(unfinished, uninterrupted, main):
    class Payload:
        def __reduce__(self):
            return os.system, ("touch it_ran",)

    newest = checkpoints()[-1]
    rewrite(newest, iteration=Payload())
    code, _, err = main(*RESUME)
    assert not Path("it_ran").exists()
    assert code == 0 and str(newest) in err
    assert ending(RUN) == ending(uninterrupted("CartPole"))


# Best and last


@pytest.mark.parametrize("scores, best", [((1, 3, 2), 1), ((1, 3, 3), 2), ((3, 3, 2), 1), ((-5, -5, -9), 1)])
def test_the_best_checkpoint_is_published_and_a_tie_goes_to_the_newer(scores, best, main, monkeypatch):
    agents, evaluate = [], ppo.evaluate

    def scripted(agent, args, episodes, stream, *rest, **kwargs):
        if stream != ppo.VALIDATION:
            return evaluate(agent, args, episodes, stream, *rest, **kwargs)
        agents.append({name: value.clone() for name, value in agent.state_dict().items()})
        return np.full((2, episodes), scores[len(agents) - 1])

    monkeypatch.setattr(ppo, "evaluate", scripted)
    assert main(*QUICK, "--total-timesteps", 3072, "--checkpoint-every", 2, "--run-name", "it")[0] == 0
    results = json.loads((RUN / "results.json").read_text())
    published = load_file(RUN / "model.safetensors")
    assert all(published[name].equal(value) for name, value in agents[best].items())
    assert results["validation"] == {"best": scores[best], "last": scores[-1]}
    assert results["published"] == ("last" if best == 2 else f"best (iteration {2 * best + 2})")
    assert results["published"] in (RUN / "README.md").read_text()


def test_validation_does_not_touch_the_random_numbers_of_training(main):
    for episodes in (0, 5):
        argv = ["--validation-episodes", episodes, "--checkpoint-every", 1, "--run-name", f"validated-{episodes}"]
        assert main(*QUICK, *argv)[0] == 0
    without, with_it = (ppo.load_checkpoint(Path("runs", f"validated-{episodes}")) for episodes in (0, 5))
    assert without["generator"][0].equal(with_it["generator"][0])
    assert all(with_it["agent"][name].equal(value) for name, value in without["agent"].items())
    assert json.loads(Path("runs/validated-0/results.json").read_text())["validation"] is None


def test_validation_and_the_final_report_use_different_seeds():
    assert not set(ppo.seeds(1, ppo.VALIDATION, n=1000)) & set(ppo.seeds(1, ppo.EVALUATION, n=1000))


def test_validating_the_same_agent_again_gives_the_same_score_where_a_world_survives_its_reset():
    args = ppo.Args(env_id="BipedalWalker-v3")
    envs, *_ = ppo.make_envs(args, [1])
    agent = ppo.Agent(**ppo.agent_config(args, envs))
    first, again = (ppo.evaluate(agent, args, 2, ppo.VALIDATION)[0] for _ in range(2))
    assert first.tolist() == again.tolist()
