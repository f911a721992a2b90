"""Worlds that nobody here wrote: the fastest six run for real where their packages are installed."""

import json

import others
import pytest
from conftest import ROOT, command

FASTEST = {  # module, steps, a score that random play does not reach
    "MiniGrid-DoorKey-5x5-v0": ("minigrid", 100_000, 0.9),
    "bsuite-catch-v0": ("bsuite", 20_000, 0.5),
    "scalar-deep-sea-treasure-v0": ("mo_gymnasium", 20_000, 0.3),
    "popgym-RepeatPreviousEasy-v0": ("popgym", 40_000, -0.4),
    "FlappyBird-v0": ("flappy_bird_gymnasium", 20_000, 0.0),
    "CliffWalking-v1": ("gymnasium", 40_000, -200),
}


def test_the_page_has_enough_worlds_and_follows_from_what_is_committed():
    assert len(others.WORLDS) >= 24 and len({world.package for world in others.WORLDS}) >= 12
    page = (others.SCORES.parent / "worlds.md").read_text()
    assert page == others.page() and "| not run |" not in page
    assert len({world.name for world in others.WORLDS}) == len(others.WORLDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FASTEST)
def test_it_learns_as_it_comes(name, tmp_path):
    module, steps, score = FASTEST[name]
    pytest.importorskip(module)
    world = next(world for world in others.WORLDS if world.name == name)
    flags, path = others.flags(world._replace(steps=steps)), {"PYTHONPATH": str(ROOT / "tests")}
    done = command(*flags, "--eval-episodes", 20, "--run-name", "it", timeout=300, env=path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "it" / "results.json").read_text())["mean_reward"] > score
