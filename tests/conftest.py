"""Shared by all tests: the script as a module, as a command, and a short run to look at."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo renders without a display
os.environ.pop("HF_TOKEN", None)

from reference import scalars  # noqa: E402, F401

import ppo  # noqa: E402

QUICK = ["--total-timesteps", "2048", "--num-envs", "4", "--num-steps", "128", "--num-minibatches", "4",
         "--validation-episodes", "2", "--eval-episodes", "4"]  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Each test works in a folder of its own: runs/ appears there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def main(capsys):
    """Call ppo.main in this process: main("--seed", "2") -> (exit code, standard output, standard error)."""

    def call(*argv):
        capsys.readouterr()
        try:
            code = ppo.main([str(a) for a in argv])
        except SystemExit as error:  # tyro's
            code = error.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def steps(monkeypatch):
    """What the environments answered: (obs, rewards, terminated, truncated, info) of each step, as it happens."""
    record, ask = [], ppo.Worlds.ask

    def spy(*args, **kwargs):
        answer = ask(*args, **kwargs)
        if len(answer) == 5:  # a reset answers with two
            record.append(copy.deepcopy(answer))
        return answer

    monkeypatch.setattr(ppo.Worlds, "ask", spy)
    return record


@pytest.fixture
def register(monkeypatch):
    """Make an environment known to Gymnasium for one test: register(its class or maker) -> its id."""

    def call(maker, **kwargs):
        spec = gym.envs.registration.EnvSpec("Tiny-v0", entry_point=maker, **kwargs)
        monkeypatch.setitem(gym.registry, spec.id, spec)
        return spec.id

    return call


def command(*argv, env=None, **kwargs):
    """Run ppo.py as a user does, in a process of its own; returns the finished process, with text output."""
    return subprocess.run([sys.executable, str(ROOT / "ppo.py"), *map(str, argv)], capture_output=True, text=True,
                          env={**os.environ, **(env or {})}, **kwargs)  # fmt: skip
