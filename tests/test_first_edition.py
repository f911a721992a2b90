"""What the first edition of ppo.py (commit 9ed0971) left still plays, and still loads: its own folders, in fixtures/.

`vector` is a CartPole agent with its observations standardised, `dict` one of a Dict and a Box (a Gaussian policy), and
`image` the Nature CNN with a MultiDiscrete action. acts.safetensors holds what each did at 32 observations.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hub_server import Hub
from safetensors.torch import load_file

import ppo

FIXTURES = ROOT / "tests" / "fixtures"
NAMES = ["vector", "dict", "image"]
PLAY = ["--device", "cpu", "--evaluate"]  # on a GPU, a last bit might differ
CLIENT = """
import sys
import ppo
from safetensors.torch import load_file

name, acts, *argv = sys.argv[1:]
agent = ppo.Agent.from_pretrained(name, strict=True)
acts = load_file(acts)
assert agent.act(acts["obs"]).allclose(acts["greedy"], rtol=1e-5, atol=1e-6)
sys.exit(ppo.main(["--evaluate", name, *argv]))
"""


@pytest.fixture
def run(request, monkeypatch):
    """A copy of the first edition's folder; its worlds are imported by name, as a user would have them."""
    monkeypatch.syspath_prepend(FIXTURES)
    return Path(shutil.copytree(FIXTURES / request.param, Path("runs", request.param)))


@pytest.fixture
def played(main, monkeypatch):
    """Play with these flags, in this process: (returns, lengths) of the episodes, and what was printed."""
    scores, evaluate = [], ppo.evaluate
    monkeypatch.setattr(ppo, "evaluate", lambda *args, **kwargs: scores.append(evaluate(*args, **kwargs)) or scores[-1])

    def play(*argv):
        code, out, err = main(*PLAY, *argv)
        assert (code, err) == (0, "")
        return *scores.pop(), out

    return play


def results(run):
    return json.loads((run / "results.json").read_text())


def rewrite(path, **changes):
    """Change a JSON file; a value of ... leaves the entry out."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


each = pytest.mark.parametrize("run", NAMES, indirect=True)


@each
def test_its_agent_plays_the_very_episodes_of_its_results(run, played):
    returns, lengths, out = played(run)
    then = results(run)
    assert returns.tolist() == then["episode_returns"] and lengths.tolist() == then["episode_lengths"]
    assert f"mean_reward {then['mean_reward']:.2f} +/- {then['std_reward']:.2f} over 10 greedy episodes" in out


@each
def test_its_agent_samples_the_very_actions_of_its_results(run, played):
    returns, _, out = played(run, "--no-deterministic")
    then = results(run)
    assert (returns.mean(), returns.std()) == (then["other_mean_reward"], then["other_std_reward"])
    assert "10 sampled episodes" in out


@each
def test_its_agent_is_loaded_by_from_pretrained_and_acts_as_it_did(run):
    agent, acts = ppo.Agent.from_pretrained(run, strict=True), load_file(run / "acts.safetensors")
    assert set(agent.state_dict()) == set(load_file(run / "model.safetensors"))
    with torch.no_grad():
        now = {
            "greedy": agent.act(acts["obs"]),
            "sampled": agent.act(acts["obs"], acts["noise"]),
            "value": agent.critic(agent.encode(acts["obs"])).squeeze(-1),
        }
    for name, value in now.items():
        torch.testing.assert_close(value, acts[name], rtol=1e-5, atol=1e-6)  # of whole numbers: equal


DEFAULTS = {"activation": "tanh", "norm_obs": False, "logstd_init": 0.0}  # the first edition's


@pytest.mark.parametrize("setting, default", DEFAULTS.items())
@each
def test_a_setting_that_its_config_does_not_hold_takes_the_default(run, setting, default, played, main):
    config = json.loads((run / "config.json").read_text())
    rewrite(run / "config.json", **{setting: ...})
    agent = ppo.Agent.from_pretrained(run, strict=True)
    assert getattr(agent.network, setting) == default
    if config[setting] == default:
        assert played(run)[0].tolist() == results(run)["episode_returns"]
    else:  # hyperparameters.json says that the agent was another
        code, _, err = main(*PLAY, run)
        assert (code, err.count("\n")) == (2, 1) and "refused config.json" in err


@pytest.mark.parametrize("run", ["image"], indirect=True)
def test_settings_that_no_file_of_it_holds_take_their_defaults(run, played):
    absent = dict.fromkeys(DEFAULTS, ...)
    rewrite(run / "config.json", **absent)
    rewrite(run / "hyperparameters.json", **absent, deterministic=..., vectorization=..., norm_reward=...)
    assert played(run)[0].tolist() == results(run)["episode_returns"]


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


@each
def test_its_repo_plays_and_loads_as_a_strangers(run, hub, tmp_path):
    repo_id = "stranger/policy"
    hub.put(repo_id, {path.name: path.read_bytes() for path in run.iterdir()})
    env = {
        "PYTHONPATH": f"{FIXTURES}{os.pathsep}{ROOT}", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    then, argv = results(run), ["--eval-episodes", "10", "--device", "cpu"]
    if ":" in then["env_id"]:
        argv += ["--env-id", then["env_id"]]  # else its module is not imported
    shutil.rmtree(run)
    command = [sys.executable, "-c", CLIENT, repo_id, FIXTURES / run.name / "acts.safetensors", *argv]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    score = f"{then['mean_reward']:.2f} +/- {then['std_reward']:.2f} over 10 greedy episodes"
    assert done.stdout == f"{then['env_id']}: mean_reward {score}\n"


@pytest.mark.parametrize("run", ["vector"], indirect=True)
def test_resuming_its_run_ends_in_one_line(run, main):
    (run / "results.json").unlink()  # as if killed just before it was finished
    files = {path: path.read_bytes() for path in run.iterdir()}
    code, out, err = main("--resume", run)
    assert (code, out) == (2, "")
    assert err == f"error: {run}/checkpoint-00000016.pt has format 1, not {ppo.VERSION}: resume it with the ppo.py " \
                  "that wrote it\n"  # fmt: skip
    assert {path: path.read_bytes() for path in run.iterdir()} == files
