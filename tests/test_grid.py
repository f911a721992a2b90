"""A paper's figure in one command, run for real."""

import csv
import re
import shlex
import subprocess
import sys

import grid
import numpy as np
import pytest
import tyro
from conftest import ROOT
from matplotlib.image import imread

import ppo


def test_a_curve_is_a_mean_in_each_part_and_unknown_before_the_first_episode():
    at = np.linspace(0, 100, 5)
    line = grid.smooth(at, np.array([30.0, 40, 60, 100]), np.array([1.0, 3, 5, 9]))
    np.testing.assert_allclose(line, [np.nan, np.nan, 2, 5, 9])


def test_runs_of_other_programs_are_drawn_from_their_logs(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for seed in (1, 2, 3):
        with SummaryWriter(tmp_path / f"other{seed}") as log:
            for step in range(100, 1000, 100):
                log.add_scalar("charts/episodic_return", step / 10 + seed, step)
    assert grid.main(draw=(f"other={tmp_path}/other*",), name=tmp_path / "figure") == 0
    steps, returns = grid.curve(tmp_path / "other2")
    np.testing.assert_allclose(returns, steps / 10 + 2)
    assert imread(tmp_path / "figure" / "runs.png").std() > 0.05


@pytest.mark.parametrize("line", re.findall(r"^    python (tests/grid\.py --env.*)$", grid.__doc__, re.M))
def test_a_grid_of_the_docstring_trains_with_the_flags_that_it_names(line, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(grid, "begin_or_resume", lambda run, words: begun.append(ppo.parse_args(words)))
    monkeypatch.setattr(grid, "run_all", lambda queue, jobs, start, told: [start(*job) for job in queue] and 0)
    words = [*shlex.split(line)[1:], "--seeds", "2", "--flags", "total-timesteps 3e4", "--name", str(tmp_path / "new")]
    assert tyro.cli(grid.main, args=words) == 0
    assert len({str(args) for args in begun}) == len(begun) in (4, 12)
    assert {args.total_timesteps for args in begun} == {3e4}
    learning = {(args.learning_rate, args.norm_obs, args.gae_lambda, args.ent_coef) for args in begun}
    assert len(learning) == 2 if len(begun) == 4 else len(learning) >= 4


def test_a_flag_without_values_makes_no_grid(tmp_path):
    with pytest.raises(SystemExit, match="values"):
        grid.main(vary=("learning-rate",), name=tmp_path / "new")


@pytest.mark.slow
def test_two_variants_of_three_seeds_take_two_minutes_and_go_on_where_they_were(tmp_path):
    command = [sys.executable, "tests/grid.py", "--env-ids", "CartPole-v1", "--seeds", "3", "--vary", "learning-rate",
               "2e-3", "2e-5", "--name", str(tmp_path / "grid-test")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "grid-test" / "table.csv").open()))
    assert [row["variant"] for row in rows] == ["learning-rate 2e-3", "learning-rate 2e-5"]
    assert [row["seeds"] for row in rows] == ["3", "3"]
    assert float(rows[0]["worst"]) > 450 > 250 > float(rows[1]["mean"])  # the second hardly learns
    picture = imread(tmp_path / "grid-test" / "CartPole-v1.png")[..., :3]
    for color in ((0.12, 0.47, 0.71), (1.0, 0.5, 0.05)):  # both lines are there
        assert (abs(picture - color).max(-1) < 0.05).sum() > 100
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)  # trains nothing
    assert again.returncode == 0 and again.stdout.startswith("| environment")
    table = (tmp_path / "grid-test" / "table.md").read_text()
    assert table.splitlines()[2] in again.stdout
