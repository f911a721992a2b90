"""The evidence: its statistics and pictures on known data, and what is committed of it against itself and the pages."""

import io
import itertools
import json
import re

import general
import maskable
import numpy as np
import pytest
import reference
from conftest import ROOT
from imageio_ffmpeg import write_frames
from matplotlib.image import imread

ROWS = {reference.reference_folder(row): row for row in reference.ROWS}
COMMITTED = [path for folder in ROWS for path in sorted(folder.glob("seed*.json"))]
FOLDERS = sorted({path.parent for path in COMMITTED})
SUMMARY = reference.REFERENCE / "summary.json"
PAGES = {ROOT / "README.md": reference.short_table, reference.REFERENCE / "results.md": reference.long_table}


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
    line = "| Some-v0 | 2.5M | 3 of 4 | 2.33 | 1.53 | 2.33 [1.00, 4.00] | 1.00 | 120 s | 1 | 0.5 | a book"
    line += " | third edition |"
    assert line in reference.long_table([summary]).splitlines()
    usual = summary | {"env_id": "CartPole-v1", "steps": 100_000}  # the README shows what a world's preset reaches
    others = [summary, usual | {"steps": 200_000}, usual | {"seeds": []}]
    assert reference.short_table([usual, *others]).splitlines()[2:] == [
        "| CartPole-v1 | 100k | 3 of 4 | 2.33 +/- 1.53 | 0.5 | 120 s |",
        "| Some-v0 | 2.5M | 3 of 4 | 2.33 +/- 1.53 | 0.5 | 120 s |",  # it has no preset
    ]


def test_a_row_without_results_says_how_to_get_them(tmp_path):
    pong = next(row for row in reference.ROWS if row.env_id == "ALE/Pong-v5")
    text = reference.long_table([reference.summarize(pong, tmp_path)])
    assert "| ALE/Pong-v5 | 1M | 0 of 3 | not run |" in text
    assert "`python tests/reference.py --envs ALE/Pong-v5`" in text


def test_every_row_but_one_has_the_steps_of_the_preset():
    others = [row.name for row in reference.ROWS if reference.preset_steps(row.env_id) not in (None, row.steps)]
    assert others == ["LunarLander-v3-2M"]
    assert len(ROWS) == len(reference.ROWS)  # each has a folder of its own


def row_folders(tmp_path, monkeypatch):
    """A row whose folder is here, with a seed of this page in it."""
    monkeypatch.setattr(reference, "REFERENCE", tmp_path)
    monkeypatch.setattr(reference, "fingerprint", lambda row: 1.25)
    row = reference.ROWS[0]
    folder = reference.reference_folder(row)
    folder.mkdir(parents=True)
    settings = json.loads(json.dumps(reference.asdict(reference.parse_args(row.command)))) | {"fingerprint": 1.25}
    (folder / "hyperparameters.json").write_text(json.dumps(settings))
    (folder / "seed1.json").write_text("{}")
    return row, folder, settings


@pytest.mark.parametrize("change, name", [({}, "CartPole-v1"), ({"seed": 7, "preset": ""}, "CartPole-v1"),
                                          ({"gamma": 0.9}, "next/CartPole-v1"),
                                          ({"fingerprint": 1.26}, "next/CartPole-v1")])  # fmt: skip
def test_seeds_of_pages_that_learn_otherwise_are_never_mixed(change, name, tmp_path, monkeypatch):
    row, folder, settings = row_folders(tmp_path, monkeypatch)
    (folder / "hyperparameters.json").write_text(json.dumps(settings | change))
    assert reference.target_folder(row) == tmp_path / name


def test_a_row_is_replaced_once_all_its_seeds_are_there(tmp_path, monkeypatch):
    row, folder, settings = row_folders(tmp_path, monkeypatch)
    (folder / "hyperparameters.json").write_text(json.dumps(settings | {"fingerprint": 2.0}))
    results = {"mean_reward": 1.0, "std_reward": 0.0, "training_seconds": 2.0}
    monkeypatch.setattr(reference, "work_folder", lambda row, seed: tmp_path / "work")
    monkeypatch.setattr(reference, "training_returns", lambda run: (np.array([5]), np.array([1.0])))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "config.json").write_text(json.dumps(settings))
    for seed in range(1, row.seeds + 1):
        assert (folder / "seed1.json").read_text() == "{}"  # the old one stands
        (tmp_path / "work" / "results.json").write_text(json.dumps(results | {"seed": seed}))
        reference.collect(row, seed)
    assert len(list(folder.glob("seed*.json"))) == row.seeds and not (tmp_path / "next" / row.name).exists()
    assert json.loads((folder / "seed1.json").read_text())["settings"]["torch"].startswith("2.")
    assert reference.read_settings(folder)[0]["fingerprint"] == 1.25


FINGERPRINTS = {folder.name: x for folder in FOLDERS if (x := reference.read_settings(folder)[0].get("fingerprint"))}


@pytest.mark.slow
@pytest.mark.parametrize("folder", FINGERPRINTS)
def test_rows_of_the_table_are_learned_as_this_page_learns(folder):
    row = next(row for row in reference.ROWS if row.name == folder)
    if row.env_id.startswith("worlds:"):
        pytest.importorskip("worlds")
    assert reference.fingerprint(row) == pytest.approx(FINGERPRINTS[folder], rel=2e-3)


@pytest.mark.parametrize("path", COMMITTED, ids=name)
def test_committed_seeds_are_full_runs_of_the_preset(path):
    results, row = json.loads(path.read_text()), ROWS[path.parent]
    assert (results["env_id"], path.name) == (row.env_id, f"seed{results['seed']}.json")
    assert results["total_timesteps"] == row.steps
    assert results["deterministic"] == (row.env_id not in ("CarRacing-v3", "ALE/Breakout-v5"))
    episodes = 30 if row.env_id.startswith(("ALE/", "CarRacing")) else 100
    assert results["n_evaluation_episodes"] == len(results["episode_returns"]) == episodes
    assert results["mean_reward"] == pytest.approx(np.mean(results["episode_returns"]))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_committed_folders_are_of_the_preset_and_whole(folder):
    assert reference.other_settings(ROWS[folder], folder) == []
    steps, curves = reference.read_curves(folder / "curve.csv")
    assert sorted(f"seed{seed}.json" for seed in curves) == sorted(path.name for path in folder.glob("seed*.json"))
    assert (len(steps), steps[-1]) == (100, ROWS[folder].steps)
    assert (folder / "curve.png").exists()


@pytest.mark.skipif(not SUMMARY.exists(), reason="no results are committed")
def test_summary_follows_from_the_committed_files():
    summary = [reference.summarize(row, folder) for folder, row in ROWS.items()]
    assert json.loads(SUMMARY.read_text()) == json.loads(json.dumps(summary))


@pytest.mark.skipif(not SUMMARY.exists(), reason="no results are committed")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_show_the_summary(page):
    assert reference.BLOCK.search(page.read_text())[0] == PAGES[page](json.loads(SUMMARY.read_text()))


@pytest.mark.parametrize("script", [general, maskable], ids=lambda script: script.__name__)
def test_the_pages_of_comparisons_follow_from_their_scores(script):
    assert (reference.REFERENCE / f"{script.__name__}.md").read_text() == script.page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_say_of_how_many_worlds_their_curves_are(page):
    (number,) = re.findall(r"!\[learning curves of (\d+) environments\]", page.read_text())
    assert int(number) == len(reference.worlds(json.loads(SUMMARY.read_text())))
    plain = [folder for folder in FOLDERS if not ROWS[folder].label]
    assert int(number) == len(plain) - 1  # LunarLander has a row of 2M, too


def test_each_source_is_explained():
    page = (reference.REFERENCE / "results.md").read_text()
    explained = re.findall(r"^\| (\w+) \| [^|]+ \|$", page.partition("| source | what it is |")[2], re.MULTILINE)
    assert sorted(explained) == sorted(
        {source for row in reference.ROWS for source in row.source.split("; ") if source}
    )


# Pictures


def test_published_means_by_hand():
    """And whether they are of as many steps: those are dashed, the others dotted."""
    assert reference.published_means("500 +/- 0") == [(500, True)]
    assert reference.published_means("at 1.5M 20.0; at 10M 20.4 (v4)") == [(20, False), (20.4, False)]
    text = "3588.5 +/- 756.6 (v3); about 4000; at about 9M 5186"
    assert reference.published_means(text) == [(3588.5, True), (4000, False), (5186, False)]


@pytest.mark.parametrize("row", [row for row in reference.ROWS if row.published], ids=lambda row: row.name)
def test_published_means_stand_in_their_text(row):
    means = reference.published_means(row.published)
    assert len(means) == row.published.count(";") + 1
    assert all(f"{mean:g}" in row.published.replace(".0", "") for mean, _ in means)
    assert [equal for _, equal in means] == [
        "at " not in part and "about" not in part for part in row.published.split(";")
    ]


def test_a_panel_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "REFERENCE", tmp_path)
    (tmp_path / "CartPole-v1").mkdir()
    curves = {seed: np.array([np.nan, x, 10 * x]) for seed, x in enumerate((-1e6, 1.0, 2.0, 1e6), 1)}
    reference.write_curves(tmp_path / "CartPole-v1" / "curve.csv", 100_000, curves)
    row = {"env_id": "CartPole-v1", "steps": 100_000, "seeds": [1, 2, 3, 4], "mean": 7.0, "published": "5; at 9M 8.5"}
    panel, *rest = reference.small_multiples([row, row | {"seeds": []}, row | {"steps": 200_000}]).axes
    assert panel.get_title() == "CartPole-v1 (4)" and not any(axes.lines for axes in rest)
    lines = [line for line in panel.lines if len(line.get_xdata())]  # without those that are for the legend
    middle, score, published, elsewhere = (([*line.get_xdata()], [*line.get_ydata()]) for line in lines)
    assert [line.get_linestyle() for line in lines[2:]] == ["--", ":"]
    assert panel.get_ylim()[1] > 7
    assert middle == ([66_666, 100_000], [1.5, 15])
    assert score == ([100_000], [7])
    assert (published[1], elsewhere[1]) == ([5, 5], [8.5, 8.5])
    (band,) = panel.collections
    edges = band.get_paths()[0].vertices
    for x, factor in ((66_666, 1), (100_000, 10)):
        low, high = reference.interval(np.array([-1e6, 1.0, 2.0, 1e6]), 2000) * factor
        assert {low, high} <= set(edges[edges[:, 0] == x, 1])


@pytest.mark.skipif(not SUMMARY.exists(), reason="no results are committed")
def test_the_committed_curves_are_drawn_from_the_committed_files(tmp_path, monkeypatch):
    """A panel for each folder but that of the longer run, and the very picture that `--curves` draws."""
    summary = json.loads(SUMMARY.read_text())
    titles = [axes.get_title() for axes in reference.small_multiples(summary).axes if axes.get_title()]
    plain = [folder.name for folder in FOLDERS if not ROWS[folder].label]
    titles = [title.replace("/", "-").rpartition(" (")[0] for title in titles]  # without the number of seeds
    assert sorted(titles) == sorted({name.removesuffix("-2M") for name in plain})
    monkeypatch.setattr(reference, "write_file", lambda path, data: (tmp_path / path.name).write_bytes(data))
    assert reference.main(curves=True) == 0
    drawn, committed = (imread(folder / "curves.png") for folder in (tmp_path, reference.REFERENCE))
    assert drawn.shape == committed.shape
    assert np.abs(drawn - committed).max() < 0.1  # rounding may differ between machines


def test_frames_are_evenly_spaced_up_to_the_last(tmp_path):
    """Of films of grey that becomes brighter by 10 with each frame."""
    for name, length in (("long", 24), ("short", 7)):
        film = write_frames(str(tmp_path / f"{name}.mp4"), (96, 64), fps=5, macro_block_size=2)
        film.send(None)
        for i in range(length):
            film.send(np.full((64, 96, 3), 10 * i, np.uint8))
        film.close()

    def shades(*names):
        picture = imread(io.BytesIO(reference.strip([tmp_path / f"{name}.mp4" for name in names], 6, height=32)))
        assert picture.shape == (32, 6 * 48 + 5 * 8, 3)
        assert (picture[:, 48:56] == 1).all()  # the gap is white
        return [255 * picture[:, x : x + 48].mean() for x in range(0, picture.shape[1], 56)]

    assert shades("long") == pytest.approx([30, 70, 110, 150, 190, 230], abs=4)
    assert shades("long", "short") == pytest.approx([70, 150, 230, 20, 40, 60], abs=4)
