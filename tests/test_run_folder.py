"""What a run leaves behind: files, logs, results, an agent that plays again just as it was scored, a video."""

import contextlib
import copy
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, scalars
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import ppo

FLAGS = [*QUICK, "--update-epochs", "2", "--norm-obs", "--seed", "3", "--run-name", "trained"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One short run for all tests here: its folder, what it printed, its arguments. They leave it as it is."""
    folder = tmp_path_factory.mktemp("trained")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert ppo.main(FLAGS) == 0
    run = folder / "runs/trained"
    args = ppo.make_args(json.loads((run / "config.json").read_text()))
    return SimpleNamespace(run=run, args=args, out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def results(trained):
    return json.loads((trained.run / "results.json").read_text())


def load(run):
    return ppo.Agent.from_pretrained(run, strict=True)


def checkpoint(run):
    """The newest, without its checksum."""
    return torch.load(io.BytesIO(max(run.glob("checkpoint-*.pt")).read_bytes()[:-32]), weights_only=True)


def value(agent, obs):
    return agent.replay(SimpleNamespace(obs=obs, actions=agent.act(obs)))[2]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Files


def test_the_folder_holds_all_that_a_run_leaves(trained):
    names = {re.sub(r"(tfevents|checkpoint-).*", r"\1", path.name) for path in trained.run.iterdir()}
    assert names == {
        "events.out.tfevents", "config.json", "model.safetensors", "results.json", "checkpoint-", "ppo.py",
        "requirements.txt", "curve.png", "curve.csv", "lock",
    }  # fmt: skip


def test_its_path_is_printed_first_and_last(trained):
    lines = trained.out.splitlines()
    assert lines[0].startswith("run: runs/trained ")
    film, share = "--evaluate runs/trained --capture-video", "--resume runs/trained --repo-id me/name"
    assert lines[-1] == f"run: runs/trained; next: python ppo.py {film}, or {share}"


def test_the_preset_taken_is_printed(trained):
    assert trained.out.splitlines()[0] == "run: runs/trained   preset: CartPole-v1   device: cpu"


def test_its_default_name_tells_what_it_is(main):
    code, out, _ = main(*QUICK, "--env-id", "FrozenLake-v1", "--seed", 5)
    assert code == 0
    assert re.match(r"run: runs/FrozenLake-v1__ppo__5__\d{10}\.\d{3};", out.splitlines()[-1])


def test_settings_load_as_the_arguments_they_were(trained):
    assert trained.args == ppo.parse_args(FLAGS)


def test_results_hold_the_score_and_how_it_came_about(results):
    types = {
        "env_id": str, "mean_reward": float, "std_reward": float, "n_evaluation_episodes": int, "eval_datetime": str,
        "deterministic": bool, "seed": int, "global_step": int, "training_seconds": float, "best_iteration": int,
        "episode_returns": list, "episode_lengths": list,
    }  # fmt: skip
    assert {key: type(results[key]) for key in types} == types
    assert (results["env_id"], results["seed"], results["deterministic"]) == ("CartPole-v1", 3, True)
    assert results["n_evaluation_episodes"] == len(results["episode_returns"]) == 4
    assert results["mean_reward"] == pytest.approx(np.mean(results["episode_returns"]))
    assert results["std_reward"] == pytest.approx(np.std(results["episode_returns"]))
    assert results["validation"] == {"best": max(results["validation"].values()), "last": results["validation"]["last"]}
    assert (results["episodes"], results["device"], results["ranks"]) == ("4 greedy episodes", "cpu", 1)
    assert results["total_timesteps"] == 2048 > results["global_step"] > 1024
    assert abs(datetime.now().timestamp() - datetime.fromisoformat(results["eval_datetime"]).timestamp()) < 3600


def test_the_score_is_printed_to_two_decimals(trained, results):
    assert "CartPole-v1: " in trained.out
    assert f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f} over 4 greedy episodes" in trained.out


def test_training_seconds_are_those_of_all_iterations_without_evaluation(main, monkeypatch):
    """On a clock that goes on by a second with each vector step and by 1000 with each evaluation."""
    late, evaluate, step, clock = [], ppo.evaluate, ppo.Worlds.step, ppo.time.perf_counter
    monkeypatch.setattr(ppo, "evaluate", lambda *args, **kwargs: late.append(1000) or evaluate(*args, **kwargs))
    monkeypatch.setattr(ppo.Worlds, "step", lambda *args: late.append(1) or step(*args))
    monkeypatch.setattr(ppo.time, "perf_counter", lambda: clock() + sum(late))
    assert main(*FLAGS)[0] == 0
    assert sum(late) >= 2000  # validation, the score
    assert 512 <= json.loads(Path("runs/trained/results.json").read_text())["training_seconds"] < 1000


# Logs


def test_logs_carry_cleanrls_names(trained):
    assert set(scalars(trained.run)) == {
        "charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/learning_rate", "losses/policy_loss",
        "losses/value_loss", "losses/entropy", "losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac",
        "losses/gradient_norm", "losses/explained_variance", "eval/validation", "eval/mean_reward",
    }  # fmt: skip


def test_the_learning_rate_is_annealed_to_one_step_before_zero(trained):
    rates = [value for _, value in scalars(trained.run)["charts/learning_rate"]]
    np.testing.assert_allclose(rates, 2e-3 * np.array([1, 0.75, 0.5, 0.25]), rtol=1e-6)


def summaries(run):
    """{tag: summary value} of everything in the event files that is no scalar."""
    events = [event for path in run.rglob("*tfevents*") for event in EventFileLoader(str(path)).Load()]
    return {value.tag: value for event in events for value in event.summary.value}


# The learning curve


def test_its_points_are_the_mean_returns_of_the_episodes_logged_in_each_iteration(trained):
    logs = scalars(trained.run)
    points = zip(logs["charts/episodic_return"], logs["charts/episodic_length"])
    points = [(step, pytest.approx(total), pytest.approx(length)) for (step, total), (_, length) in points]
    assert len(points) > 2 and checkpoint(trained.run)["curve"] == points


def drawn(monkeypatch, curve, mean):
    """The axes of curve.png, which is there."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or savefig(figure, *a, **k))
    ppo.draw_curve(ppo.Args(env_id="Some-v0", resume=".", total_timesteps=20_000), curve, mean)
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and imread("curve.png").std() > 0.01
    return figures[0].axes[0]


@pytest.mark.parametrize("iterations", [1, 50, 3000])
def test_the_curve_goes_where_the_returns_went_and_ends_with_the_score(iterations, monkeypatch):
    x = np.linspace(0, 1, iterations)
    curve = list(zip((10_000 * x).astype(int).tolist(), (500 * np.sin(5 * x)).tolist(), x.tolist()))
    axes = drawn(monkeypatch, curve, 321.25)
    line, dot = axes.lines
    np.testing.assert_allclose(line.get_xydata(), [row[:2] for row in curve])
    assert line.get_marker() == "." and dot.get_xydata().tolist() == [[20_000, 321.25]]
    assert axes.get_title() == "Some-v0" and axes.get_xlim() == (0, 20_000)
    assert axes.xaxis.get_major_formatter()(20_000) == "20k"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "score 321.2"]
    head, *rows = Path("curve.csv").read_text().splitlines()
    assert head == "step,return,length" and len(rows) == iterations
    np.testing.assert_allclose(np.loadtxt("curve.csv", delimiter=",", skiprows=1, ndmin=2), curve, rtol=1e-9)


def test_the_curve_of_a_run_without_episodes_shows_the_score(monkeypatch):
    line, dot = drawn(monkeypatch, [], 7.0).lines
    assert len(line.get_xdata()) == 0 and dot.get_ydata().tolist() == [7.0]
    assert Path("curve.csv").read_text().splitlines() == ["step,return,length"]


def test_without_matplotlib_a_run_ends_well_with_a_warning_and_the_numbers(main, monkeypatch):
    for name in "matplotlib", "matplotlib.figure", "matplotlib.ticker":
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = main(*FLAGS)
    assert (code, err.count("\n")) == (0, 1) and out.splitlines()[-1].startswith("run: runs/trained; next: ")
    assert err.startswith("warning: curve.png failed: ModuleNotFoundError: ") and "matplotlib" in err
    run = Path("runs/trained")
    assert (run / "results.json").exists() and not (run / "curve.png").exists()
    rows = np.loadtxt(run / "curve.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(rows, checkpoint(run)["curve"], rtol=1e-9)
    assert len(rows) > 2


def test_the_curve_needs_no_backend_such_as_notebooks_name(tmp_path):
    code = "import ppo; ppo.draw_curve(ppo.Args(resume='.'), [], 1.0)"
    other = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, "-B", "-c", code], env=other, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# The console


def test_no_progress_bar_where_there_is_no_terminal(trained):
    assert trained.err == ""
    assert "\r" not in trained.out and "\x1b" not in trained.out and "%|" not in trained.out
    assert len(trained.out.splitlines()) < 20


def test_a_progress_bar_on_a_terminal_shows_steps_return_speed_and_time_left():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(Terminal()) as err:
        assert ppo.main(FLAGS) == 0
    bar = r"100%\|.*\| 2\.05k/2\.05k \[\d\d:\d\d<00:00, +[\d.]+k? steps/s, return \d+\.\d\]"
    assert re.search(bar, err.getvalue()) and "scoring: " in err.getvalue()  # one while training, one while scoring


# The agent, loaded again


def test_the_saved_agent_is_the_trained_one(trained):
    best = checkpoint(trained.run)["agent"]  # there was one validation
    saved = load(trained.run).state_dict()
    assert set(saved) == set(best)
    assert all(torch.equal(saved[name], best[name]) for name in best)


def test_the_saved_agent_is_built_with_the_runs_settings(trained):
    torch.manual_seed(0)
    agent, obs = load(trained.run), torch.randn(5, 4)
    same = ppo.Agent(agent.parts, agent.action, hidden_sizes=(64, 64), norm_obs=True)
    same.load_state_dict(agent.state_dict())
    assert agent.settings.norm_obs
    assert torch.equal(value(agent, obs), value(same, obs))
    assert torch.equal(agent.act(obs), same.act(obs))


def test_the_saved_agent_takes_any_batch_of_observations(trained):
    agent, obs = load(trained.run), torch.randn(2, 3, 4)
    for batch in (obs, obs[0], obs[0, 0]):
        noise = agent.sample_noise(*batch.shape[:-1])
        assert agent.act(batch).shape == agent.act(batch, noise).shape == batch.shape[:-1]
    for batch in (obs, obs[0]):
        replayed = agent.replay(SimpleNamespace(obs=batch, actions=agent.act(batch)))
        assert [x.shape for x in replayed] == 3 * [batch.shape[:-1]]


def test_the_normaliser_is_saved_with_the_agent(trained):
    agent, obs = load(trained.run), torch.randn(5, 4)
    blank = copy.deepcopy(agent)
    blank.obs_stats = ppo.RunningMeanStd((4,))
    assert (agent.obs_stats.count > 1000).all() and (agent.obs_stats.var != 1).all()
    assert not torch.allclose(value(agent, obs), value(blank, obs))


def test_the_normaliser_is_frozen_in_evaluation(trained):
    agent = load(trained.run)
    before = copy.deepcopy(agent.state_dict())
    ppo.evaluate(agent, trained.args, episodes=3)
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())


# Evaluation


def test_evaluate_gives_the_score_of_the_results_and_changes_nothing(trained, results, main):
    before = contents(trained.run)
    code, out, _ = main("--evaluate", trained.run)
    assert code == 0
    assert f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f} over 4 greedy episodes" in out
    assert contents(trained.run) == before


def test_no_deterministic_samples_from_the_policy(trained, results, main):
    code, out, _ = main("--evaluate", trained.run, "--no-deterministic")
    assert code == 0
    assert re.search(r" \+/- [\d.]+ over 4 sampled episodes\n", out)
    assert f"mean_reward {results['mean_reward']:.2f} " not in out
    assert main("--evaluate", trained.run, "--no-deterministic")[1] == out


def test_evaluate_takes_more_episodes_and_another_seed(trained, main):
    first = main("--evaluate", trained.run, "--eval-episodes", 30)[1]
    again = main("--evaluate", trained.run, "--eval-episodes", 30)[1]
    other = main("--evaluate", trained.run, "--eval-episodes", 30, "--seed", 4)[1]
    assert "over 30 greedy episodes" in first
    assert first == again != other


@pytest.mark.parametrize("vectorization", ["sync", "async", "auto"])
def test_evaluation_scores_the_first_episode_of_each_environment(vectorization, steps):
    args = ppo.Args(vectorization=vectorization, num_envs=10, deterministic=False, hidden_sizes=(8,))
    untrained = ppo.Agent(**ppo.look(replace(args, vectorization="sync")))
    returns, lengths, _ = ppo.evaluate(untrained, args, episodes=10)
    over = np.array([terminated | truncated for _, _, terminated, truncated, _ in steps])
    first = over.argmax(0) + 1
    assert over.any(0).all() and (over.sum(0) > 1).any()  # some went on to a second
    assert lengths.tolist() == returns.tolist() == first.tolist()


@pytest.mark.parametrize("num_envs", [2, 64])
def test_evaluation_plays_seeded_environments_as_by_hand(trained, num_envs):
    """One plain environment after another, with no vector environment at all."""
    agent, expected = load(trained.run), []
    for seed in ppo.seeds(trained.args.seed, ppo.EVALUATION, n=5):
        env = gym.make("CartPole-v1")
        obs, _ = env.reset(seed=seed)
        done = length = 0
        while not done:
            obs, _, terminated, truncated, _ = env.step(agent.act(torch.as_tensor(obs)[None]).item())
            done, length = terminated or truncated, length + 1
        expected.append(length)
    args = replace(trained.args, num_envs=num_envs, vectorization="sync")
    returns, *_ = ppo.evaluate(agent, args, episodes=5)
    assert returns.tolist() == expected


@pytest.mark.parametrize("num_envs", [2, 64])
def test_in_gymnasiums_own_vector_environment_all_episodes_are_played_at_once(trained, num_envs):
    agent, expected = load(trained.run), np.zeros(50)
    envs = gym.make_vec("CartPole-v1", 50, "vector_entry_point")
    obs, _ = envs.reset(seed=ppo.seeds(trained.args.seed, ppo.EVALUATION, n=50)[0])
    over = np.zeros(50, dtype=bool)
    while not over.all():
        expected += ~over
        obs, _, terminated, truncated, _ = envs.step(agent.act(torch.as_tensor(obs)).numpy())
        over |= terminated | truncated
    returns, lengths, cut = ppo.evaluate(agent, replace(trained.args, num_envs=num_envs), episodes=50)
    assert returns.tolist() == lengths.tolist() == expected.tolist() and len(set(expected)) > 4 and not cut.any()


def play_untrained(env_id, **env_kwargs):
    """Returns of two episodes, with the flag that clips rewards in training."""
    torch.manual_seed(0)
    args = ppo.Args(env_id, env_kwargs, clip_reward=True, deterministic=False)
    return ppo.evaluate(ppo.Agent(**ppo.look(args)), args, episodes=2)[0]


def test_evaluation_sums_rewards_as_the_environment_pays_them():
    assert (play_untrained("Pendulum-v1") < -200).all()  # of 200 steps


def test_evaluation_of_atari_gives_the_score_of_the_game():
    returns = play_untrained("ALE/MsPacman-v5", max_num_frames_per_episode=400)
    assert (returns > 0).all() and (returns % 10 == 0).all()  # ten points a dot


# Video


def decode(path):
    """(metadata, number of frames) of a video, each frame decoded."""
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    return meta, sum(1 for _ in reader)


def assert_plays_in_browsers(path):
    meta, frames = decode(path)
    data = path.read_bytes()
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and frames > 0
    assert data.index(b"moov") < data.index(b"mdat")  # it can start before it has arrived
    return meta, frames


@pytest.mark.parametrize(
    "env_id, flags",
    [
        ("CartPole-v1", []),
        ("LunarLander-v3", []),
        pytest.param("InvertedPendulum-v5", [], marks=pytest.mark.slow),
        pytest.param(
            "ALE/Pong-v5",
            ["--num-steps", 16, "--total-timesteps", 64, "--env-kwargs", "max_num_frames_per_episode", 200],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_capture_video_leaves_one_that_plays_in_browsers(env_id, flags, main):
    code, _, err = main(*QUICK, "--env-id", env_id, "--validation-episodes", 0, "--eval-episodes", 1, *flags,
                        "--capture-video", "--run-name", "filmed")  # fmt: skip
    assert (code, "warning" in err) == (0, False), err
    assert_plays_in_browsers(Path("runs/filmed/replay.mp4"))


def test_the_video_shows_each_step_of_an_episode_at_the_environments_pace(trained, tmp_path, steps):
    ppo.record_video(load(trained.run), trained.args, tmp_path / "replay.mp4")
    meta, frames = assert_plays_in_browsers(tmp_path / "replay.mp4")
    assert frames == len(steps) + 1
    assert meta["fps"] == 50 and meta["size"] == (600, 400)


@pytest.mark.parametrize("how, deterministic", [("deterministic", True), ("no-deterministic", False)])
def test_agents_are_chosen_scored_and_filmed_in_the_same_way(how, deterministic, main, monkeypatch):
    asked, play = set(), ppo.play

    def spy(agent, args, episodes, stream, *rest):
        asked.add((stream, args.deterministic))
        return play(agent, args, episodes, stream, *rest)

    monkeypatch.setattr(ppo, "play", spy)
    code, out, _ = main(*FLAGS, f"--{how}", "--capture-video")
    assert code == 0 and ("greedy" if deterministic else "sampled") + " episodes" in out
    assert asked == {(stream, deterministic) for stream in (ppo.VALIDATION, ppo.EVALUATION, ppo.VIDEO)}


def test_evaluate_can_film_too(main):
    assert main(*FLAGS)[0] == 0
    assert not Path("runs/trained/replay.mp4").exists()
    assert main("--evaluate", "runs/trained", "--capture-video")[0] == 0
    assert_plays_in_browsers(Path("runs/trained/replay.mp4"))


class Film(gym.Env):
    """Ten steps; the picture is dark at the left and bright at the right, in the form that is told."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self, form="RGB", height=64, width=96, render_mode=None):
        self.form, self.height, self.width, self.render_mode = form, height, width, render_mode

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(2, np.float32), 1.0, self.t == 10, False, {}

    def render(self):
        picture = np.full((self.height, self.width, 3), [200, 40, 120], np.uint8)
        picture[:, : self.width // 2] = [10, 60, 20]
        match self.form:
            case "RGBA":
                return np.concatenate([picture, np.full_like(picture[..., :1], 255)], -1)
            case "grey":
                return picture[..., 0]
            case "grey, three axes":
                return picture[..., :1]
            case "floats":
                return picture / 255
            case "float32":
                return (picture / 255).astype(np.float32)
            case "numbers":
                return picture.astype(int)
            case "list":
                return [np.zeros_like(picture), picture]
            case "list of lists":
                return picture.tolist()
            case "same array":
                self.buffer = getattr(self, "buffer", picture * 0)
                self.buffer[:] = picture if self.t % 2 else picture * 0
                return self.buffer
            case "growing":
                return picture[: 32 + 2 * self.t]
            case "none":
                return None
        return picture


def film(register, path, form, **kwargs):
    """One of an untrained agent in that world, in `path`."""
    args = ppo.Args(register(Film), {"form": form, **kwargs}, hidden_sizes=())
    ppo.record_video(ppo.Agent(**ppo.look(args)), args, path)


def pictures(path):
    """[frames, height, width, 3], decoded."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]).astype(int)


FORMS = ["RGB", "RGBA", "grey", "grey, three axes", "floats", "float32", "numbers", "list", "same array"]


@pytest.mark.parametrize("form, size", [*((form, (64, 96)) for form in FORMS), ("RGB", (65, 96)), ("RGB", (64, 97)),
                                        ("RGBA", (31, 63)), ("grey", (33, 45)), ("floats", (121, 97))])  # fmt: skip
def test_pictures_of_every_form_are_filmed_in_their_colours(form, size, register, tmp_path, capsys, caplog):
    height, width = size
    film(register, tmp_path / "replay.mp4", form, height=height, width=width)
    out, err = capsys.readouterr()
    assert (out, err) == (f"video: {tmp_path / 'replay.mp4'}\n", "")
    told = [record.getMessage() for record in caplog.records]  # which goes to standard error, if it is no test
    assert len(told) == height % 2 | width % 2 and all("resizing from" in words for words in told)  # once
    meta, frames = assert_plays_in_browsers(tmp_path / "replay.mp4")
    assert frames == 11 and meta["fps"] == 20 and not (tmp_path / "unfinished.mp4").exists()
    shown = pictures(tmp_path / "replay.mp4")
    assert max(abs(shown.shape[1] - height), abs(shown.shape[2] - width)) <= 1  # browsers want even numbers
    if form == "same array":
        assert shown[::2].max() < 30
        shown = shown[1::2]
    right, left = ([200] * 3, [10] * 3) if form.startswith("grey") else ([200, 40, 120], [10, 60, 20])
    middle = shown.shape[2] // 2  # colours are kept for four pixels at a time
    assert (
        abs(shown[:, 4:-4, middle + 8 : -4] - right).max() < 12
        and abs(shown[:, 4:-4, 4 : middle - 8] - left).max() < 12
    )


@pytest.mark.parametrize("form", ["growing", "none"])
def test_a_film_that_fails_leaves_the_one_before(form, register, tmp_path, capsys):
    path = tmp_path / "replay.mp4"
    film(register, path, "RGB")
    before = path.read_bytes()
    capsys.readouterr()
    film(register, path, form)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("warning: the video failed: ") and err.count("\n") == 1
    assert path.read_bytes() == before
    film(register, path, "grey")  # and nothing that it left is in the way of the next
    assert capsys.readouterr() == (f"video: {path}\n", "") and path.read_bytes() != before
    assert [p.name for p in tmp_path.glob("*.mp4")] == ["replay.mp4"]


@pytest.mark.parametrize("broken", ["no encoder", "no imageio", "render fails", "render fails later"])
def test_a_failing_render_costs_the_video_only(broken, main, monkeypatch):
    from gymnasium.envs.classic_control.cartpole import CartPoleEnv

    good, render = iter(range(3)), CartPoleEnv.render

    def fail(env):
        if broken == "render fails" or next(good, None) is None:
            raise RuntimeError("no display")
        return render(env)

    monkeypatch.setattr(CartPoleEnv, "render", fail)
    if broken == "no encoder":
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    if broken == "no imageio":
        monkeypatch.setitem(sys.modules, "imageio.v2", None)
    code, out, err = main(*FLAGS, "--capture-video")
    assert code == 0 and out.splitlines()[-1].startswith("run: runs/trained; next: ")
    assert err.startswith("warning: the video failed: ") and err.count("\n") == 1
    assert Path("runs/trained/results.json").exists()
    assert not Path("runs/trained/replay.mp4").exists()
