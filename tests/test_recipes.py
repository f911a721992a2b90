"""The recipes: every program on their page, and the course's notebook, run as printed, but for shorter runs."""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import nbclient
import nbformat
import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, command, scalars
from hub_server import Hub
from safetensors.torch import load_file

import ppo

PAGE = (ROOT / "runs/reference/recipes.md").read_text()
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}
NOTEBOOK = ROOT / "runs/reference/course.ipynb"


def printed(section, kind="py"):
    """The programs of a section."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", SECTIONS[section], re.DOTALL | re.MULTILINE)


def commands(section):
    """The words of each command of a section, without `python`."""
    (block,) = printed(section, "bash")
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


def change(code, changes):
    """The same program with other words, {old: new}; each old one stands there once."""
    for old, new in changes.items():
        assert code.count(old) == 1, f"{old!r} is not once in\n{code}"
        code = code.replace(old, new)
    return code


def execute(code, tmp_path):
    """Run a program in this process, from a file; its names."""
    (file := tmp_path / "recipe.py").write_text(code)
    return runpy.run_path(str(file), run_name="__main__")


def weights(run):
    return load_file(run / "model.safetensors")


def checkpoint(run):
    return torch.load(max(run.glob("checkpoint-*.pt")), weights_only=True)


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


def test_every_program_on_the_page_has_a_test():
    kinds = {section: re.findall(r"^```(\w+)$", text, re.MULTILINE) for section, text in SECTIONS.items()}
    assert kinds == {
        "A notebook": [],
        "Two runs in one program": ["py"],
        "Tune with Optuna": ["py"],
        "A paper's figure": ["bash"],
        "Start with another agent": ["bash"],
        "A world from elsewhere": ["py", "bash"],
        "EnvPool": ["py", "bash"],
        "PettingZoo": ["py", "bash"],
        "Weights & Biases": ["py", "bash"],
        "A window": ["py"],
        "ONNX": ["py", "py"],
        "C++": ["py", "cpp"],
    }


# As a library


def test_two_runs_in_one_program_have_the_weights_of_the_command_line(tmp_path, capsys, main):
    """Those of the first are compared with a run in this process, those of the second with one in its own."""
    (code,) = printed("Two runs in one program")
    execute(change(code, {"100_000": "8192"}), tmp_path)
    shown = capsys.readouterr().out
    flags = ["--total-timesteps", 8192, "--run-name"]
    assert main(*flags, "command-1", "--seed", 1)[0] == command(*flags, "command-2", "--seed", 2).returncode == 0
    for seed in (1, 2):
        run, other = (tmp_path / f"runs/{name}-{seed}" for name in ("seed", "command"))
        assert_equal(weights(run), weights(other))
        files, expected = ({re.sub(r"tfevents.*", "", path.name) for path in x.iterdir()} for x in (run, other))
        assert files == expected
        results, expected = (json.loads((folder / "results.json").read_text()) for folder in (run, other))
        assert results["episode_returns"] == expected["episode_returns"]
        assert f"runs/seed-{seed} {results['mean_reward']}" in shown


def test_an_environment_without_a_preset_gets_the_settings_of_the_command_line():
    (call,) = re.findall(r"`ppo\.(parse_args\(.*?\))`", PAGE)
    gym.register("Recipe-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=500)
    args = eval(change(call, {"my_module:MyEnv-v0": "Recipe-v0"}), vars(ppo))
    assert args.preset == "general, discrete actions"


# Optuna


def test_a_study_goes_on_where_it_stopped_and_prunes(tmp_path, monkeypatch):
    (code,) = printed("Tune with Optuna")
    code = change(code, {"50_000": "6144", "checkpoint_every=5": "checkpoint_every=1"})

    def trials(changes):
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "validate", ppo.validate)  # which the program replaces
            return execute(change(code, changes), tmp_path)["study"].trials

    first = trials({"20 - len": "2 - len"})
    assert [trial.state.name for trial in first] == ["COMPLETE", "COMPLETE"]
    for trial in first:
        assert list(trial.intermediate_values) == [1, 2, 3] and len(trial.params) == 4
        run = tmp_path / f"runs/tune-{trial.number}"
        assert trial.value == max(trial.intermediate_values.values()) == checkpoint(run)["best_score"]
        settings = json.loads((run / "config.json").read_text())
        assert {name: settings[name] for name in trial.params} == trial.params

    all_fail = {"MedianPruner(n_startup_trials=5)": "ThresholdPruner(lower=501)"}  # no score of CartPole is that high
    then = trials({"20 - len": "4 - len"} | all_fail)
    assert [trial.params for trial in then[:2]] == [trial.params for trial in first]
    assert [trial.state.name for trial in then[2:]] == ["PRUNED", "PRUNED"]
    assert [list(trial.intermediate_values) for trial in then[2:]] == [[1], [1]]
    assert checkpoint(tmp_path / "runs/tune-2")["iteration"] == 0
    assert len(trials({"20 - len": "4 - len"})) == 4  # nothing is left to do


def test_a_trial_worse_than_the_median_is_pruned_and_one_that_diverges_fails_alone(tmp_path, monkeypatch):
    """The first five are never pruned; then one is whose first score is below all of theirs."""
    (code,) = printed("Tune with Optuna")
    code = change(code, {"50_000": "4096", "checkpoint_every=5": "checkpoint_every=1", "20 - len": "8 - len"})
    scores = iter([*range(10, 20), 9, ppo.Stop("loss or gradient not finite", 1), 30, 40])

    def validate(agent, args):
        if isinstance(score := next(scores), Exception):
            raise score
        return float(score)

    monkeypatch.setattr(ppo, "validate", validate)
    study = execute(code, tmp_path)["study"]
    assert [trial.state.name for trial in study.trials] == [*["COMPLETE"] * 5, "PRUNED", "FAIL", "COMPLETE"]
    assert study.best_value == 40


# Other agents, other worlds


def test_a_run_starts_with_the_agent_of_another_and_its_settings(main):
    (_, *calm), (_, *windy) = commands("Start with another agent")
    assert main(*calm, "--ent-coef", 0.003, *QUICK)[0] == 0
    state = ppo.open_run(ppo.parse_args(windy))
    assert_equal(state.agent.state_dict(), weights(Path("runs/calm")))
    before, after = (json.loads(Path(f"runs/{name}/config.json").read_text()) for name in ("calm", "windy"))
    ours = {"env_kwargs": {"enable_wind": True}, "init_from": "runs/calm", "run_name": "windy"}
    assert after == before | ours and before["ent_coef"] == 0.003
    more = ppo.parse_args(["--init-from", "runs/windy", "--env-kwargs", "gravity", "-9.0"])
    assert more.env_kwargs == {"enable_wind": True, "gravity": -9.0}
    assert main(*windy, "--run-name", "trained")[0] == 0


def save(section, tmp_path):
    """Leave the program of a section in the file that it names."""
    (code,) = printed(section)
    (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code)


def test_a_factory_makes_a_world_that_trains_and_is_filmed(tmp_path):
    pytest.importorskip("minigrid")
    save("A world from elsewhere", tmp_path)
    ((_, *flags),) = commands("A world from elsewhere")
    done = command(*flags, *QUICK, "--capture-video", "--run-name", "whole")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "not seen" not in done.stdout and Path("runs/whole/replay.mp4").exists()
    (part,) = json.loads(Path("runs/whole/config.json").read_text())["parts"]
    assert (part["kind"], part["shape"]) == ("pixels", [5, 5, 3])


@pytest.fixture
def pool(tmp_path):
    """pool.py, in the working directory."""
    pytest.importorskip("envpool")
    save("EnvPool", tmp_path)


def test_pools_train_and_score_as_they_say(pool):
    lander, catch = (flags for _, *flags in commands("EnvPool"))
    for flags, filmed in (lander, True), (catch, False):
        done = command(*flags, *QUICK, "--capture-video", "--run-name", "it")
        assert done.returncode == 0, done.stderr
        (score,) = re.findall(r"mean_reward \S+ \+/- \S+", done.stdout)
        assert Path("runs/it/replay.mp4").exists() == filmed != done.stderr.startswith("warning: the video failed")
        again = command("--evaluate", "runs/it")
        assert again.returncode == 0 and score in again.stdout, again.stderr
        shutil.rmtree("runs")


def test_a_pool_resumes_to_the_same_weights(pool):
    flags = [*commands("EnvPool")[0][1:], *QUICK, "--checkpoint-every", "1", "--run-name", "it"]
    assert command(*flags).returncode == 0
    expected = checkpoint(run := Path("runs/it"))
    max(run.glob("checkpoint-*.pt")).unlink()
    (run / "results.json").unlink()
    done = command("--resume", run)
    assert done.returncode == 0 and "   step: 1" in done.stdout, done.stderr
    assert_equal(checkpoint(run)["agent"], expected["agent"])


def test_a_pool_obeys_its_seed_and_is_not_what_scores(pool, tmp_path):
    execute(printed("EnvPool")[0], tmp_path)

    def first(seed):
        worlds = ppo.Worlds(ppo.Args(env_id="Pool/LunarLander-v3"), [seed, seed + 1])
        worlds.envs.close()
        return worlds.obs.tolist()

    assert first(1) == first(1) != first(2)
    kinds = {
        (name, training): type(ppo.Worlds(ppo.Args(env_id=f"Pool/{name}"), [1], vector=training).envs).__name__
        for name in ("LunarLander-v3", "HalfCheetah-v5", "Catch-v0")
        for training in (True, False)
    }
    scores_elsewhere = [key for key, kind in kinds.items() if kind == "SyncVectorEnv"]
    assert scores_elsewhere == [("LunarLander-v3", False), ("HalfCheetah-v5", False)]
    assert {kind for key, kind in kinds.items() if key not in scores_elsewhere} == {"Pool"}


def test_a_team_trains_and_is_scored_each_agent_in_its_place(tmp_path):
    pytest.importorskip("pettingzoo.sisl.pursuit_v5")
    save("PettingZoo", tmp_path)
    execute(printed("PettingZoo")[0], tmp_path)
    ((_, *flags),) = commands("PettingZoo")
    done = command(*flags, *QUICK, "--num-steps", "64", "--run-name", "team", "--eval-episodes", "9")
    assert done.returncode == 0, done.stderr
    results = json.loads(Path("runs/team/results.json").read_text())
    assert len(results["episode_returns"]) == 9 and "cut" not in results["episodes"]
    assert set(results["episode_lengths"]) == {500}
    worlds = ppo.Worlds(ppo.Args(env_id="Pursuit-v0", num_envs=11), ppo.seeds(1, n=11))
    assert worlds.obs.shape == (11, 147) and len(worlds.envs.unwrapped.worlds) == 2
    for t in range(502):
        before, still = worlds.obs.copy(), torch.full((11,), 4)
        rewards, terminated, done = worlds.step(still)
        assert done.all() == (t == 499) == done.any() and not terminated.any()
    assert not worlds.done.any() and not np.array_equal(before, worlds.obs)


@pytest.mark.slow
def test_weights_and_biases_get_all_that_tensorboard_gets(tmp_path):
    """Offline: what would be sent is in a file."""
    pytest.importorskip("wandb")
    save("Weights & Biases", tmp_path)
    ((script, *flags),) = commands("Weights & Biases")
    flags += [*QUICK, "--run-name", "it"]
    env = {**os.environ, "WANDB_MODE": "offline", "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean_reward" in done.stdout
    (mirror,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    tags = scalars("runs/it")
    assert len(tags) > 10 and [tag for tag in tags if tag.encode() not in mirror.read_bytes()] == []
    assert json.loads(Path("runs/it/results.json").read_text())["command"] == shlex.join(["python", "ppo.py", *flags])


# The agent elsewhere


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short finished runs with --norm-obs: {environment: folder}."""
    with contextlib.chdir(tmp_path_factory.mktemp("recipes")):
        names = ("LunarLander-v3", "Pendulum-v1")
        for name in names:
            assert ppo.main([*QUICK, "--env-id", name, "--norm-obs", "--run-name", name]) == 0
        return {name: Path("runs", name).absolute() for name in names}


@torch.inference_mode()
def observations_and_actions(run):
    """1,000 observations, drawn around the agent's mean, some of them far from it; and its greedy actions."""
    agent = ppo.Agent.from_pretrained(run, strict=True)
    stats = agent.obs_stats
    assert agent.settings.norm_obs and stats.count.min() > 1000 and stats.mean.any()
    noise = torch.randn(1000, agent.width, generator=torch.Generator().manual_seed(1))
    obs = (stats.mean + 5 * stats.std * noise).float()
    return obs, agent.act(obs)


def export(section, run, tmp_path):
    code = printed(section)[0]
    assert len(code.splitlines()) <= 10
    execute(change(code, {"runs/<run>": str(run)}), tmp_path)


@pytest.mark.parametrize("env_id", ["LunarLander-v3", "Pendulum-v1"])
def test_an_agent_in_onnx_acts_as_the_agent_does(env_id, runs, tmp_path):
    import onnxruntime

    export("ONNX", runs[env_id], tmp_path)
    obs, actions = observations_and_actions(runs[env_id])
    session = onnxruntime.InferenceSession("agent.onnx")
    for n in (1, 1000):
        (found,) = session.run(None, {"obs": obs[:n].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), actions[:n], rtol=1e-5, atol=1e-6)
    assert (actions.is_floating_point() or len(actions.unique()) > 1) and len(actions) == 1000
    assert not list(tmp_path.glob("agent.onnx.*"))  # one file
    if env_id == "Pendulum-v1":  # whose torque is up to 2
        (stretch,) = re.findall(r"`(np\.clip\(.*?\))`", PAGE)
        box = map(np.array, json.loads((runs[env_id] / "config.json").read_text())["action"]["box"])
        names = dict(zip(("low", "high", "center", "scale"), box), np=np, actions=found)
        taken = ppo.Agent.from_pretrained(runs[env_id], strict=True).predict(obs)
        np.testing.assert_allclose(eval(stretch, names), taken, rtol=1e-5, atol=1e-6)


def test_an_agent_in_onnx_plays_the_episode_that_the_agent_plays(runs, tmp_path):
    export("ONNX", runs["LunarLander-v3"], tmp_path)
    total = execute(printed("ONNX")[1], tmp_path)["total"]
    agent, env = ppo.Agent.from_pretrained(runs["LunarLander-v3"]), gym.make("LunarLander-v3")
    (obs, _), rewards, done = env.reset(seed=1), [], False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(agent.predict(obs))
        rewards.append(reward)
        done = terminated or truncated
    assert total == sum(rewards)


def test_a_window_shows_one_episode_after_the_other(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    changes = {"runs/<run>": str(runs["LunarLander-v3"]), "while True:": "for _ in range(2):"}
    names = execute(change(printed("A window")[0], changes), tmp_path)
    assert names["env"].unwrapped.isopen
    names["env"].close()
    first, second = re.findall(r"^return (-?\d+\.\d)$", capsys.readouterr().out, re.MULTILINE)
    assert first != second


def test_an_agent_of_images_goes_to_onnx_too(tmp_path, monkeypatch):
    import onnxruntime

    torch.manual_seed(1)
    monkeypatch.setattr(ppo.CNN, "in_bfloat16", False)  # as it is where nothing was trained before
    parts = ppo.describe(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8))
    agent = ppo.Agent(parts, ppo.describe_action(gym.spaces.Discrete(6), True), hidden_sizes=())
    agent.save_pretrained(tmp_path / "images")
    (zeros,) = re.findall(r"torch\.zeros\(2, agent\.width\).*", printed("ONNX")[0])
    assert "an image of bytes: dtype=torch.uint8" in zeros
    changes = {"runs/<run>": str(tmp_path / "images"), zeros: "torch.zeros(2, agent.width, dtype=torch.uint8)"}
    agent = execute(change(printed("ONNX")[0], changes), tmp_path)["agent"]
    obs = torch.randint(256, (16, 4 * 84 * 84), dtype=torch.uint8)
    (found,) = onnxruntime.InferenceSession("agent.onnx").run(None, {"obs": obs.numpy()})
    assert found.tolist() == agent.act(obs).tolist()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("env_id", ["LunarLander-v3", "Pendulum-v1"])
def test_a_compiled_package_acts_as_the_agent_does(env_id, runs, tmp_path):
    export("C++", runs[env_id], tmp_path)
    obs, actions = observations_and_actions(runs[env_id])
    (call,) = re.findall(r"`(torch\._inductor\.aoti_load_package\(.*?\))`", PAGE)
    act = eval(call)
    for n in (1, 1000):
        torch.testing.assert_close(act(obs[:n]), actions[:n], rtol=1e-5, atol=1e-6)
    if env_id == "LunarLander-v3":
        (code,) = printed("C++", "cpp")
        (tmp_path / "act.cpp").write_text(code)
        commands = "\n".join(re.findall(r"^// (.*)$", code, re.MULTILINE))
        env = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
        process = subprocess.run(["bash", "-ec", commands], env=env, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert int(process.stdout) == act(torch.zeros(1, 8)).item()


# The notebook


def cells():
    """The notebook with CartPole and few steps, {id: cell}."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    named = {cell.id: cell for cell in book.cells}
    lines = {'"LunarLander-v3"': '"CartPole-v1"', "1_000_000": "8192"}
    named["parameters"].source = change(named["parameters"].source, lines)
    return book, named


@pytest.mark.slow
def test_the_notebook_trains_plays_and_pushes(tmp_path, monkeypatch):
    """It runs where Jupyter would start it in a clone, with a Hub on the loopback."""
    (folder := tmp_path / "runs/reference").mkdir(parents=True)
    for name in ("ppo.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    hub = Hub()
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_sentinel_write", "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
                "IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter")}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    book, named = cells()
    named["parameters"].source = change(named["parameters"].source, {"repo_id = None": 'repo_id = "tester/cartpole"'})
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute(cwd=str(folder))
    hub.shutdown()
    hub.server_close()

    def streams(name):
        return "".join(out.text for out in named[name].outputs if out.output_type == "stream")

    def shown(name):
        return [out.data for out in named[name].outputs if "data" in out]

    lines = streams("train").splitlines()
    assert lines[0].startswith("run: runs/CartPole-v1__") and len(lines) == 5  # and one for each iteration of 4
    assert re.match(r"step +[\d,]+ +return none in 32 steps +[\d,]+ steps/s$", lines[1])  # in 64 new environments
    assert all(re.match(r"step +[\d,]+ +return +[\d.]+ +[\d,]+ steps/s$", line) for line in lines[2:])
    assert re.fullmatch(rf"{re.escape(lines[0])}   step: 79\d\d\n", streams("resume"))  # there is nothing to resume
    assert re.search(r"mean_reward \S+ \+/- \S+ over 100 greedy episodes", streams("finish"))
    assert "image/png" in shown("curve")[0]
    assert "data:video/mp4;base64," in shown("video")[0]["text/html"]
    assert re.search(r"^return \d+\.0$", streams("play"), re.MULTILINE)
    assert re.search(r"pushed: http\S+/commit/\w+", streams("push"))  # beside the progress of the upload
    pushed = hub.files("tester/cartpole")
    assert {"model.safetensors", "replay.mp4", "README.md"} <= pushed.keys()
    assert b" -f " not in pushed["README.md"]  # the kernel's own command is nobody's


def test_a_notebook_interrupted_while_it_trains_goes_on_bit_for_bit(tmp_path, monkeypatch):
    usual = replace(ppo.preset_args(ppo.Args()), checkpoint_every=1, validation_episodes=2)
    monkeypatch.setattr(ppo, "preset_args", lambda args: usual)
    expected = ppo.train(replace(usual, total_timesteps=8192, run_name="uninterrupted"))
    _, named = cells()
    names = {"ppo": ppo, "replace": replace}
    exec(named["parameters"].source, names)

    collect, calls = ppo.collect, []

    def interrupted(*args):  # by the button, in the third iteration of four
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return collect(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exec(named["train"].source, names)
    assert checkpoint(names["run"])["iteration"] == 2
    for _ in range(2):  # the second time it is finished
        exec(named["resume"].source, names)
        state = names["state"]
        assert (state.iteration, state.best_score) == (4, expected.best_score)
        assert_equal(state.agent.state_dict(), expected.agent.state_dict())
        assert_equal(weights(names["run"]), weights(expected.args.run))


def test_the_notebook_holds_no_output():
    book, _ = cells()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
