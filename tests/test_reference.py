"""The evidence: its statistics on known data, and what is committed of it against itself and against the README."""

import itertools
import json
import re

import numpy as np
import pytest
import reference
from conftest import ROOT

import ppo

ROWS = {reference.reference_folder(row): row for row in reference.ROWS}
COMMITTED = [path for folder in ROWS for path in sorted(folder.glob("seed*.json"))]
MARKDOWN = reference.REFERENCE / "summary.md"


def name(path):
    return f"{path.parent.name}-{path.stem}"


def test_iqm_is_the_mean_of_the_middle_half():
    assert reference.iqm(np.array([7.0])) == 7
    assert reference.iqm(np.array([1.0, 3.0])) == 2  # nothing to cut
    assert reference.iqm(np.array([-1e6, 2.0, 1.0, 1e6])) == 1.5
    assert reference.iqm(np.array([5.0, 1.0, 2.0, 3.0, 4.0])) == 3  # one at each end, rounded down as scipy does
    np.testing.assert_allclose(reference.iqm(np.array([[0.0, 9], [1, 8], [2, 7], [50, 60]])), [1.5, 8.5])


def test_interval_of_equal_scores_is_a_point():
    assert reference.interval(np.full(10, 500.0)).tolist() == [500, 500]


def test_interval_of_two_scores_spans_them():
    """Each of the three means 0, 1/2 and 1 has a probability of at least a quarter."""
    assert reference.interval(np.array([0.0, 1.0])).tolist() == [0, 1]


def test_interval_by_enumeration():
    """Of five runs, over all 5**5 resamples with one cut at each end."""
    scores = [0.0, 1.0, 5.0, 20.0, 100.0]
    means = [sum(sorted(resample)[1:4]) / 3 for resample in itertools.product(scores, repeat=5)]
    expected = np.percentile(means, (2.5, 97.5))
    np.testing.assert_allclose(reference.interval(np.array(scores)), expected, atol=1e-9)


def test_interval_is_that_of_a_normal_mean():
    """Of 400 normal scores the middle half has a standard error close to 1.09 / sqrt(400): the trimmed mean's."""
    scores = np.random.default_rng(3).normal(10, 1, 400)
    low, high = reference.interval(scores, 2000)
    assert low < reference.iqm(scores) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.09 / 20, rel=0.15)


def test_interval_resamples_whole_runs():
    """A curve's interval at each point is the interval of that point alone."""
    curves = np.random.default_rng(4).normal(size=(10, 3))
    alone = [reference.interval(curves[:, i]) for i in range(3)]
    np.testing.assert_allclose(reference.interval(curves), np.stack(alone, -1))


def test_learning_curve_by_hand():
    steps, returns = np.array([1, 10, 11, 40]), np.array([1.0, 3.0, 5.0, 7.0])
    curve = reference.learning_curve(steps, returns, total=40, points=4)
    np.testing.assert_array_equal(curve, [2, 5, np.nan, 7])  # (0, 10], (10, 20], (20, 30], (30, 40]


def test_curves_survive_their_file(tmp_path):
    curves = {10: np.array([-1.5, np.nan]), 2: np.array([np.nan, 12345.0])}
    reference.write_curves(tmp_path / "curve.csv", 1000, curves)
    assert (tmp_path / "curve.csv").read_text() == "step,seed2,seed10\n500,,-1.5\n1000,12345,\n"
    steps, read = reference.read_curves(tmp_path / "curve.csv")
    assert steps.tolist() == [500, 1000]
    assert list(read) == [2, 10]
    for seed, curve in curves.items():
        np.testing.assert_array_equal(read[seed], curve)


def test_a_row_by_hand(tmp_path):
    for seed, mean in ((1, 1.0), (2, 4.0), (10, 2.0)):
        results = {"seed": seed, "mean_reward": mean, "std_reward": 1, "training_seconds": 60 * seed, "settings": {}}
        (tmp_path / f"seed{seed}.json").write_text(json.dumps(results))
    summary = reference.summarize(reference.Row("Some-v0", 2_500_000, 4, 1, "0.5", "a book"), tmp_path)
    assert summary["seeds"] == [1, 2, 10]
    assert (summary["mean"], summary["iqm"], summary["min"]) == pytest.approx((7 / 3, 7 / 3, 1), abs=1e-4)
    assert summary["std"] == pytest.approx(np.sqrt(7 / 3), abs=1e-4)  # n - 1 = 2
    line = "| Some-v0 | 2.5M | 3 of 4 | 2.33 | 1.53 | 2.33 [1.00, 4.00] | 1.00 | 120 s | 1 | 0.5 | a book |"
    assert line in reference.markdown([summary]).splitlines()


def test_a_row_without_results_says_how_to_get_them(tmp_path):
    pong = next(row for row in reference.ROWS if row.env_id == "ALE/Pong-v5")
    text = reference.markdown([reference.summarize(pong, tmp_path)])
    assert "| ALE/Pong-v5 | 10M | 0 of 3 | not run |" in text
    assert "`python tests/reference.py --envs ALE/Pong-v5`" in text


def test_every_row_but_one_has_the_steps_of_the_preset():
    others = [row.name for row in reference.ROWS if ppo.preset(row.env_id)[1]["total_timesteps"] != row.steps]
    assert others == ["LunarLander-v3-2M"]
    assert len(ROWS) == len(reference.ROWS)  # each has a folder of its own


@pytest.mark.parametrize("path", COMMITTED, ids=name)
def test_committed_seeds_are_full_runs_of_the_preset(path):
    results, row = json.loads(path.read_text()), ROWS[path.parent]
    assert (results["env_id"], path.name) == (row.env_id, f"seed{results['seed']}.json")
    assert results["total_timesteps"] == row.steps
    assert results["deterministic"]
    assert results["n_evaluation_episodes"] == len(results["episode_returns"]) == 100
    assert results["mean_reward"] == pytest.approx(np.mean(results["episode_returns"]))


@pytest.mark.parametrize("folder", sorted({path.parent for path in COMMITTED}), ids=lambda folder: folder.name)
def test_committed_folders_are_of_the_preset_and_whole(folder):
    assert reference.other_settings(ROWS[folder], folder) == []
    steps, curves = reference.read_curves(folder / "curve.csv")
    assert sorted(f"seed{seed}.json" for seed in curves) == sorted(path.name for path in folder.glob("seed*.json"))
    assert (len(steps), steps[-1]) == (100, ROWS[folder].steps)
    assert (folder / "curve.png").exists()


@pytest.mark.skipif(not MARKDOWN.exists(), reason="no results are committed")
def test_summary_follows_from_the_committed_files():
    summary = [reference.summarize(row, folder) for folder, row in ROWS.items()]
    assert json.loads((reference.REFERENCE / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert MARKDOWN.read_text() == reference.markdown(summary)


@pytest.mark.skipif(not MARKDOWN.exists(), reason="no results are committed")
def test_a_run_says_what_the_committed_seeds_of_its_preset_reached():
    rows = json.loads((reference.REFERENCE / "summary.json").read_text())
    rows = [row for row in rows if row["seeds"] and row["steps"] == ppo.preset(row["env_id"])[1]["total_timesteps"]]
    reached = {row["env_id"]: (row["mean"], row["training_seconds"]) for row in rows}
    assert {env_id: (float(f"{mean:.4g}"), round(time)) for env_id, (mean, time) in reached.items()} == ppo.REACHED


@pytest.mark.skipif(not MARKDOWN.exists(), reason="no results are committed")
def test_the_readme_shows_the_summary():
    readme = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
    block = re.search(r"<!-- results -->\n(.*?)<!-- /results -->", readme, re.DOTALL)
    if not block:
        pytest.skip("README.md has no results block yet")
    assert block[1].strip() == MARKDOWN.read_text().strip()
