"""Sharing, with the real huggingface_hub client against a Hub on the loopback: push, card, play, faults, strangers.

Everything happens below a home folder called sentinel_home, on a host called sentinel-host, with tokens hf_sentinel_*:
where "sentinel" turns up, something has leaked."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from conftest import QUICK, ROOT, command, scalars
from hub_server import Hub
from huggingface_hub import ModelCard
from safetensors.torch import load, save

import ppo

FILES = ["config.json", "model.safetensors"]  # all that playing needs
SITECUSTOMIZE = "import socket; socket.gethostname = lambda: 'sentinel-host'"
EVILMOD = "from pathlib import Path; Path(__file__).with_name('imported').touch()"
CALLS = """
import contextlib, io, json, os, resource, signal, sys, traceback
import ppo
resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))
signal.signal(signal.SIGALRM, signal.default_int_handler)
for line in sys.stdin:
    argv, token = json.loads(line)
    os.environ["HF_TOKEN"] = token
    signal.alarm(30)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = ppo.main(argv)
        except BaseException as error:
            code = repr(error)
            traceback.print_exc()
    signal.alarm(0)
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
LOAD = """
import json, sys
import ppo
from huggingface_hub import ModelCard
repo = sys.argv[1]
agent = ppo.Agent.from_pretrained(repo, strict=True)
returns, *_ = ppo.evaluate(agent, agent.settings, 4)
print(json.dumps([returns.tolist(), ModelCard.load(repo).data.eval_results[0].metric_value]))
"""


class Client:
    """ppo.main in a process of its own, called again and again: client("--resume", ...) -> (code, output, errors)."""

    def __init__(self, world):
        self.process = subprocess.Popen([sys.executable, "-c", CALLS], env={**os.environ, **world.env}, text=True,
                                        cwd=world.work, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def __call__(self, *argv, token="hf_sentinel_write"):
        self.process.stdin.write(json.dumps([[str(a) for a in argv], token]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class World:
    """A home folder, a Hub, and the environment variables of those who live there."""

    def __init__(self, folder):
        self.hub, self.clients = Hub(), []
        self.home, self.modules, self.work = (folder / "sentinel_home" / name for name in ("", "modules", "work"))
        self.modules.mkdir(parents=True)
        self.work.mkdir()
        self.runs = self.work / "runs"
        (self.modules / "sitecustomize.py").write_text(SITECUSTOMIZE)
        (self.modules / "evilmod.py").write_text(EVILMOD)
        self.env = {
            "HOME": str(self.home), "USER": "sentinel_user", "LOGNAME": "sentinel_user",
            "PYTHONPATH": f"{self.modules}{os.pathsep}{ROOT}", "NO_PROXY": "127.0.0.1",
            "HF_ENDPOINT": self.hub.url, "HF_TOKEN": "hf_sentinel_write", "HF_HOME": str(self.home / ".cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip

    def client(self):
        self.clients.append(Client(self))
        return self.clients[-1]

    def close(self):
        for client in self.clients:
            client.process.stdin.close()
            client.process.wait()
        self.hub.shutdown()
        self.hub.server_close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("hub"))
    yield world
    world.close()


@pytest.fixture
def elsewhere(tmp_path):
    """A second world, for what the client reads from its environment once and for all."""
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture(scope="module")
def client(world):
    return world.client()


@pytest.fixture
def hub(world):
    yield world.hub
    world.hub.heal()


@pytest.fixture(scope="module")
def pushed(world):
    """The finished process that trained runs/first and pushed it to tester/cartpole."""
    process = command(*QUICK, "--checkpoint-every", 1, "--run-name", "first", "--repo-id", "tester/cartpole",
                      env=world.env, cwd=world.work)  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture
def run(world, pushed, request):
    """A copy of that finished run for one test to change, as a path relative to where the clients work."""
    name = re.sub(r"\W+", "-", request.node.name)[:90].strip("-")
    shutil.copytree(world.runs / "first", world.runs / name)
    return Path("runs", name)


@pytest.fixture
def stranger(pushed, hub):
    """Publish the pushed policy under a new name, some files replaced, or left out where None; returns the name."""

    def publish(**changes):
        repo_id = f"stranger/policy-{len(hub.repos)}"
        files = hub.files("tester/cartpole") | {name.replace("__", "."): data for name, data in changes.items()}
        hub.put(repo_id, {name: data for name, data in files.items() if data is not None})
        return repo_id

    return publish


@pytest.fixture
def settings(hub, pushed):
    """config.json of the pushed policy with some of it changed, as bytes."""
    original = json.loads(hub.files("tester/cartpole")["config.json"])
    return lambda changes: json.dumps(original | changes).encode()


@pytest.fixture(params=["--evaluate", "--init-from"])
def take(request, pushed, client, world):
    """Play a policy, or start a run from it: take(name, ...) -> (code, output, errors). A refusal leaves no run."""

    def call(*argv):
        before = sorted(world.runs.rglob("*"))
        result = client(request.param, *argv)
        assert result[0] == 0 or sorted(world.runs.rglob("*")) == before
        return result

    return call


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def score(output):
    return re.search(r"\S+ \+/- \S+ over 4 greedy episodes", output)[0]


def assert_refused(result, *words, code=2):
    """One line that holds these words, this exit code, and nothing else."""
    assert result[0] == code and result[1] == "", result
    assert result[2].startswith("error: ") and result[2].count("\n") == 1, result[2]
    for word in words:
        assert word in result[2]


# Push


def test_one_command_trains_records_and_pushes_in_a_single_commit(pushed, hub):
    files = [re.sub(r"tfevents\.\d+\.localhost\..+", "tfevents", name) for name in hub.files("tester/cartpole")]
    assert sorted(files) == sorted([
        "README.md", "config.json", "model.safetensors", "results.json", "replay.mp4", "curve.csv", "curve.png",
        "ppo.py", "requirements.txt", "events.out.tfevents",
    ])  # fmt: skip
    assert [commit["message"] == "initial commit" for commit in hub.repos["tester/cartpole"]] == [True, False]
    assert f"pushed: {hub.url}/tester/cartpole" in pushed.stdout


def test_pushed_files_are_those_in_the_run_folder(pushed, hub, world):
    on_disk, published = files_in(world.runs / "first"), hub.files("tester/cartpole")
    assert published.items() <= on_disk.items()
    kept = [name for name in on_disk if name not in published]
    assert sorted(kept) == ["checkpoint-00000003.pt", "checkpoint-00000004.pt", "lock"]


def test_weights_go_through_lfs(pushed, hub):
    _, sha256, data = hub.repos["tester/cartpole"][-1]["files"]["model.safetensors"]
    assert hub.blobs[sha256] == data


@pytest.mark.slow
def test_the_default_upload_path_pushes_the_same(pushed, hub, elsewhere, world):
    elsewhere.hub.lfs = False
    del elsewhere.env["HF_HUB_DISABLE_XET"]
    code, _, err = elsewhere.client()("--resume", world.runs / "first", "--repo-id", "tester/cartpole")
    assert code == 0, err
    assert elsewhere.hub.files("tester/cartpole") == hub.files("tester/cartpole")


@pytest.mark.parametrize("video", [b"a newer video", None], ids=["newer video", "no video"])
def test_a_second_push_replaces_logs_and_video_and_leaves_nothing_stale(client, hub, run, world, video):
    folder, repo_id = world.work / run, f"tester/{run.name}"
    (folder / "replay.mp4").write_bytes(b"a video")
    client("--resume", run, "--repo-id", repo_id)
    (old,) = sorted(folder.glob("*tfevents*"))
    old.rename(folder / "events.out.tfevents.1900000000.1.0")
    (folder / "replay.mp4").write_bytes(video) if video else (folder / "replay.mp4").unlink()
    code, _, err = client("--resume", run, "--repo-id", repo_id)
    assert code == 0, err
    assert old.name not in hub.files(repo_id)
    assert "events.out.tfevents.1900000000.1.0" in hub.files(repo_id)
    assert hub.files(repo_id).get("replay.mp4") == video
    assert len(hub.repos[repo_id]) == 3


def test_a_bare_repo_name_is_that_of_ones_own_account(client, hub, run):
    code, _, err = client("--resume", run, "--repo-id", run.name)
    assert code == 0, err
    assert "model.safetensors" in hub.files(f"tester/{run.name}")


def test_a_push_refuses_flags_that_would_make_the_card_lie(client, hub, run):
    assert_refused(client("--resume", run, "--repo-id", "tester/lie", "--gamma", 0.5), "--gamma 0.98 -> 0.5")
    assert "tester/lie" not in hub.repos


def test_a_push_by_resume_neither_trains_nor_scores_again(client, hub, run, world, pushed):
    before, repo_id = files_in(world.work / run), f"tester/{run.name}"
    code, out, err = client("--resume", run, "--repo-id", repo_id)
    assert code == 0, err
    assert out.startswith(f"{run} is finished\npushed: {hub.url}/{repo_id}") and "scoring" not in out
    after = files_in(world.work / run)
    assert {name for name in after if after[name] != before.get(name)} == {"README.md"}
    assert after["README.md"].replace(repo_id.encode(), b"tester/cartpole") == before["README.md"]


@pytest.mark.parametrize("lost", [["results.json"], ["results.json", "checkpoint-00000004.pt"]],
                         ids=["before its score", "while it trained"])  # fmt: skip
def test_an_interrupted_run_is_finished_before_it_is_pushed(client, hub, run, world, lost, pushed):
    for name in [*lost, "replay.mp4", "curve.csv", "curve.png"]:
        (world.work / run / name).unlink()
    code, out, err = client("--resume", run, "--repo-id", f"tester/{run.name}")
    assert code == 0, err
    assert score(out) == score(pushed.stdout) and out.index("scoring: ") < out.index("video: ") < out.index("pushed: ")
    files, first = hub.files(f"tester/{run.name}"), hub.files("tester/cartpole")
    assert {name for name in first if "tfevents" not in name} <= set(files)
    for name in "config.json", "model.safetensors", "curve.csv", "curve.png":
        assert files[name] == first[name]


# The card


@pytest.fixture
def card(pushed, hub, tmp_path):
    (tmp_path / "README.md").write_bytes(hub.files("tester/cartpole")["README.md"])
    return ModelCard.load(tmp_path / "README.md")


@pytest.fixture
def results(pushed, world):
    return json.loads((world.runs / "first" / "results.json").read_text())


def test_the_cards_metadata_is_what_leaderboards_read(card, results):
    data = card.data.to_dict()
    task = "reinforcement-learning"
    assert data["pipeline_tag"] == task and data["library_name"] and card.data.model_name == "PPO-CartPole-v1"
    assert data["tags"] == ["CartPole-v1", "ppo", "deep-reinforcement-learning", task, "custom-implementation",
                            "deep-rl-course"]  # fmt: skip
    (evaluation,) = card.data.eval_results
    assert (evaluation.task_type, evaluation.task_name) == (task, task)
    assert (evaluation.dataset_type, evaluation.dataset_name) == ("CartPole-v1", "CartPole-v1")
    assert (evaluation.metric_type, evaluation.metric_name) == ("mean_reward", "mean_reward")
    assert evaluation.metric_value == f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"


def test_the_cards_text_says_what_was_measured_and_how_to_play_and_train_it(card, results, pushed):
    assert results["command"] == shlex.join(["python", "ppo.py", *pushed.args[2:]])
    for words in (
        f"**{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}** over 4 greedy episodes",
        f" over {results['episodes']}, after ",
        f"{results['global_step']:,} steps", f"{results['training_seconds']:.0f} seconds",
        f"\n{results['command']}  # train it again\n", "\nuv run ppo.py --evaluate tester/cartpole ",
        "\nhf download tester/cartpole ppo.py --local-dir .\n", "deterministic=True",
        'Agent.from_pretrained("tester/cartpole", strict=True)',
    ):  # fmt: skip
        assert words in card.text


def test_the_picture_on_the_card_is_in_the_repo(card, hub):
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.text)
    assert hub.files("tester/cartpole")[picture].startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("env_id, mean, value", [
    ("ALE/Pong-v5", -20.5, "-20.50 +/- 1.50"), ("my_module:MyEnv-v0", 0.0, "0.00 +/- 1.50"),
])  # fmt: skip
def test_the_cards_metadata_holds_any_id_and_score(results, env_id, mean, value):
    text = ppo.model_card(ppo.Args(env_id), "tester/it", results | {"mean_reward": mean, "std_reward": 1.5})
    data = ModelCard(text).data
    assert data.model_name == f"PPO-{env_id}" and data.tags[0] == env_id
    (evaluation,) = data.eval_results
    assert (evaluation.dataset_type, evaluation.dataset_name) == (env_id, env_id)
    assert evaluation.metric_value == value
    assert ("--env-id my_module:MyEnv-v0 " in text) == (":" in env_id)  # or it would not be trusted


# Play


def test_a_pushed_policy_scores_what_it_scored_before_the_push(pushed, client):
    code, out, err = client("--evaluate", "tester/cartpole", "--eval-episodes", 4)
    assert (code, score(out)) == (0, score(pushed.stdout)), err


def test_a_revision_is_played_as_it_was(pushed, client, hub, stranger):
    repo_id = stranger()
    good = hub.repos[repo_id][-1]["oid"]
    hub.put(repo_id, {"README.md": b"all gone"})
    code, out, err = client("--evaluate", f"{repo_id}@{good}", "--eval-episodes", 4)
    assert (code, score(out)) == (0, score(pushed.stdout)), err
    assert_refused(client("--evaluate", repo_id), repo_id)


def test_all_files_played_are_of_one_commit(take, hub, stranger):
    repo_id = stranger()
    take(repo_id, *QUICK)
    asked = [path.split("/")[4] for _, path in hub.log if path.startswith(f"/{repo_id}/resolve/")]
    assert asked[0] == "main" and set(asked[1:]) == {hub.repos[repo_id][0]["oid"]}


def test_agent_and_card_load_from_the_repo(pushed, results, world):
    process = subprocess.run([sys.executable, "-c", LOAD, "tester/cartpole"], cwd=world.work, check=True,
                             capture_output=True, env={**os.environ, **world.env})  # fmt: skip
    returns, value = json.loads(process.stdout)
    assert returns == results["episode_returns"]
    assert value == f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"


def test_playing_changes_nothing_in_the_run(client, run, world):
    before = files_in(world.work / run)
    code, _, err = client("--evaluate", run, "--eval-episodes", 1)
    assert code == 0, err
    assert files_in(world.work / run) == before


def test_the_video_of_a_downloaded_policy_goes_to_runs(client, stranger, world):
    repo_id = stranger(replay__mp4=None)
    code, _, err = client("--evaluate", repo_id, "--eval-episodes", 1, "--capture-video")
    assert code == 0, err
    assert list(files_in(world.runs / repo_id.replace("/", "--"))) == ["replay.mp4"]


# The video and the logs


def test_the_video_starts_with_its_index_and_decodes(pushed, world):
    path = world.runs / "first" / "replay.mp4"
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    meta, *frames = imageio_ffmpeg.read_frames(str(path))
    assert meta["codec"] == "h264" and meta["size"] == (600, 400)
    assert len(frames) >= 8 and frames[0] != frames[-1]  # no CartPole episode is shorter


@pytest.mark.slow
def test_a_video_that_cannot_be_made_costs_the_video_only(elsewhere):
    encoder = elsewhere.home / "ffmpeg"  # says what it can do, but dies over the first frame
    real = imageio_ffmpeg.get_ffmpeg_exe()
    encoder.write_text(f'#!/bin/sh\ncase "$*" in *rawvideo*) exit 1;; esac\nexec {real} "$@"\n')
    encoder.chmod(0o755)
    elsewhere.env["IMAGEIO_FFMPEG_EXE"] = str(encoder)
    process = command(*QUICK, "--repo-id", "tester/blind", "--capture-video", env=elsewhere.env, cwd=elsewhere.work)
    assert process.returncode == 0, process.stderr
    warning = r"^warning: the video failed: .{1,350}\. All else is there$"  # no pages from the encoder
    assert re.search(warning, process.stderr, re.MULTILINE)
    assert "sentinel" not in process.stderr
    files = elsewhere.hub.files("tester/blind")
    assert "replay.mp4" not in files and {"README.md", "model.safetensors", "results.json"} <= set(files)


@pytest.fixture
def resumed(client, run, world):
    """A run interrupted before its last iteration, resumed by its absolute path and not pushed: two event files."""
    folder = world.work / run
    max(folder.glob("checkpoint-*")).unlink()
    (folder / "results.json").unlink()
    code, _, err = client("--resume", folder)
    assert code == 0, err
    return folder


def test_logs_of_a_resumed_run_read_in_order_and_say_each_step_once(resumed, world):
    names = sorted(path.name for path in resumed.glob("*tfevents*"))
    assert len(names) == 2 and names[0] in os.listdir(world.runs / "first")
    steps = [step for step, _ in scalars(resumed)["losses/policy_loss"]]
    assert len(steps) == 4 and steps == sorted(set(steps))


# Nothing leaks


def test_nothing_written_pushed_or_printed_names_token_host_user_or_home(pushed, hub, world):
    written, published = files_in(world.runs / "first"), hub.files("tester/cartpole")
    assert not [name for files in (written, published) for name in files if "sentinel" in name]
    assert not [name for files in (written, published) for name, data in files.items() if b"sentinel" in data]
    assert "sentinel" not in pushed.stdout + pushed.stderr


def test_a_run_resumed_by_its_absolute_path_does_not_tell_it(resumed):
    assert not [name for name, data in files_in(resumed).items() if "sentinel" in name or b"sentinel" in data]


@pytest.mark.parametrize("file", FILES)
def test_a_refusal_does_not_tell_where_downloads_are_kept(take, stranger, file):
    repo_id = stranger(**{file.replace(".", "__"): b"{"})
    assert "sentinel" not in take(repo_id)[2]


# Faults


@pytest.mark.parametrize("repo_id, token, why", [
    ("tester/new", "", "401"),
    ("tester/new", "hf_unknown", "401"),
    ("tester/new", "hf_sentinel_read", "403"),
    ("tester/cartpole", "hf_sentinel_read", "403"),
    ("somebody/else", "hf_sentinel_write", "403"),
    ("../x", "hf_sentinel_write", "'../x'"),
    ("tester/two words", "hf_sentinel_write", "'tester/two words'"),
    ("tester/a/b", "hf_sentinel_write", "tester/a/b"),
], ids=["no token", "bad token", "read token", "read token for a repo that exists", "repo of somebody else",
        "path as name", "name with a space", "name with two slashes"])  # fmt: skip
def test_training_does_not_start_if_its_push_would_fail(pushed, client, world, repo_id, token, why):
    before = sorted(world.runs.iterdir())
    result = client(*QUICK, "--repo-id", repo_id, token=token)
    assert_refused(result, repo_id, why, "hf auth login", "push later")
    assert sorted(world.runs.iterdir()) == before


@pytest.mark.parametrize("env, why", [
    ({"HF_HUB_OFFLINE": "1"}, "offline"),
    ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "ConnectError"),
], ids=["offline mode", "unreachable"])  # fmt: skip
def test_without_the_hub_nothing_is_trained_or_played(elsewhere, env, why):
    elsewhere.env |= env
    client = elsewhere.client()
    assert_refused(client(*QUICK, "--repo-id", "tester/x"), "tester/x", why, "push later")
    for flag in "--evaluate", "--init-from":
        assert_refused(client(flag, "tester/x"), "tester/x", why)
    assert not elsewhere.runs.exists()


@pytest.mark.parametrize("fault", ["commit answers 500", "Hub gone"])
def test_a_run_whose_push_failed_is_kept_and_pushed_by_the_printed_command(client, hub, world, fault):
    name = fault.replace(" ", "-")
    if fault == "Hub gone":
        hub.down_after = "auth_check"
    else:
        hub.broken = {"push"}
    code, _, err = client(*QUICK, "--run-name", name, "--repo-id", f"tester/{name}")
    retry = f"python ppo.py --resume runs/{name} --repo-id tester/{name}"
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ") and err.strip().endswith(retry)
    assert {"model.safetensors", "results.json", "ppo.py"} <= set(os.listdir(world.runs / name))
    assert hub.files(f"tester/{name}") == {}
    hub.heal()
    code, out, err = client(*shlex.split(retry)[2:])
    assert code == 0 and "scoring" not in out, err
    assert "model.safetensors" in hub.files(f"tester/{name}")


def test_a_missing_repo_is_named(take):
    assert_refused(take("tester/missing"), "tester/missing")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(take, stranger, file):
    repo_id = stranger(**{file.replace(".", "__"): None})
    assert_refused(take(repo_id), repo_id, file)


@pytest.mark.parametrize("file", FILES)
def test_a_file_missing_from_a_run_is_named(take, run, world, file):
    (world.work / run / file).unlink()
    assert_refused(take(run), str(run), "No such file")


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1000], lambda data: b"\xff" * 8 + data[8:], lambda data: b"", lambda data: pickle.dumps({}),
], ids=["truncated", "bad header", "empty", "a pickle"])  # fmt: skip
def test_damaged_weights_are_refused(take, hub, stranger, damage):
    repo_id = stranger(model__safetensors=damage(hub.files("tester/cartpole")["model.safetensors"]))
    assert_refused(take(repo_id), repo_id)


# Strangers


class Payload:
    """Unpickled, it creates the file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_never_opened(take, stranger, world):
    payload = pickle.dumps(Payload(world.home / "unpickled"))
    repo_id = stranger(model__safetensors=None, pytorch_model__bin=payload)
    assert_refused(take(repo_id), repo_id, "model.safetensors")
    assert not (world.home / "unpickled").exists()


def test_a_module_is_imported_only_if_the_user_names_it(client, stranger, settings, world):
    repo_id = stranger(config__json=settings({"env_id": "evilmod:CartPole-v1"}))
    before = sorted(world.runs.iterdir())
    for flag in "--evaluate", "--init-from":
        assert_refused(client(flag, repo_id), repo_id, "'evilmod:CartPole-v1'", "--env-id")
    assert not (world.modules / "imported").exists() and sorted(world.runs.iterdir()) == before
    code, _, err = client("--evaluate", repo_id, "--env-id", "evilmod:CartPole-v1", "--eval-episodes", 1)
    assert code == 0, err
    assert (world.modules / "imported").exists()


@pytest.mark.parametrize("changes, why", [
    ({"backdoor": 1}, "backdoor"),
    ({"resume": "runs/first", "repo_id": "tester/leak"}, "'resume'"),
    ({"repo_id": "tester/leak"}, "'repo_id'"),
    ({"track": True}, "'track'"),
    ({"env_id": "NoSuchEnv-v0"}, "'NoSuchEnv-v0'"),
    ({"env_id": "CartPole"}, "'CartPole'"),
    ({"env_id": "../CartPole-v1"}, "'../CartPole-v1'"),
    ({"env_id": ["CartPole-v1"]}, "env_id"),
    ({"env_kwargs": {"xml_file": "/etc/passwd"}}, "more than numbers: {'xml_file': '/etc/passwd'}"),
    ({"env_kwargs": {"sutton_barto_reward": [0]}}, "more than numbers: {'sutton_barto_reward': [0]}"),
    ({"env_kwargs": {"sutton_barto_reward": {"a": 0}}}, "more than numbers: {'sutton_barto_reward': {'a': 0}}"),
    ({"env_kwargs": {"sutton_barto_reward": None}}, "more than numbers: {'sutton_barto_reward': None}"),
    ({"env_kwargs": {"sutton_barto_reward": ""}}, "more than numbers: {'sutton_barto_reward': ''}"),
    ({"env_kwargs": {"sutton_barto_reward": False, "b": [1]}}, "more than numbers"),
    ({"env_kwargs": [["sutton_barto_reward", False]]}, "env_kwargs"),
    ({"seed": "1"}, "seed"),
    ({"seed": True}, "seed"),
    ({"norm_obs": 1}, "norm_obs"),
    ({"activation": "exec"}, "activation"),
    ({"hidden_sizes": 64}, "loading"),
    ({"hidden_sizes": [64.5]}, "hidden_sizes"),
    ({"hidden_sizes": [10**12]}, "actor.0.weight"),
    ({"hidden_sizes": [65536] * 1000}, "loading"),
    ({"logstd_init": float("nan")}, "logstd-init"),
    ({"gamma": float("inf")}, "gamma"),
    ({"learning_rate": 10**400}, "loading"),
], ids=lambda value: json.dumps(value)[1:40] if isinstance(value, dict) else None)  # fmt: skip
def test_strange_settings_are_refused(take, stranger, settings, changes, why):
    repo_id = stranger(config__json=settings(changes))
    assert_refused(take(repo_id), why)


@pytest.mark.parametrize("value", [True, False, 1, 0.5])
def test_a_strangers_options_may_be_numbers_and_bools(take, stranger, settings, value):
    repo_id = stranger(config__json=settings({"env_kwargs": {"sutton_barto_reward": value}}))
    code, out, err = take(repo_id, *QUICK)
    assert code == 0, err
    per_step = re.search(r"mean_reward (\S+) ", out)[1]
    assert (float(per_step) <= 0) == bool(value), out  # -1 at the end, else 1 each step


@pytest.mark.parametrize("changes, why", [
    ({"env_id": "GymV21Environment-v0"}, "shimmy"),
    ({"env_kwargs": {"is_slippery": False}}, "is_slippery"),
], ids=["without its package", "with arguments it does not take"])  # fmt: skip
def test_an_environment_that_cannot_be_made_is_refused(take, stranger, settings, changes, why):
    repo_id = stranger(config__json=settings(changes))
    assert_refused(take(repo_id), changes.get("env_id", "CartPole-v1"), why)


@pytest.mark.parametrize("data", [b'["action"]', b"{", b"\xff", b"[" * 60_000, b'"' + b"action" * 9_999 + b'"'],
                         ids=["list", "cut off", "no UTF-8", "too deep", "string"])  # fmt: skip
def test_strange_json_is_refused(take, stranger, data):
    repo_id = stranger(config__json=data)
    assert_refused(take(repo_id), f"loading {repo_id}")


def test_an_agent_of_another_edition_is_refused_and_told_what_plays_it(take, stranger):
    repo_id = stranger(config__json=b'{"obs_shape": [4], "action_shape": [], "nvec": [2], "hidden_sizes": [64, 64]}')
    assert_refused(take(repo_id), repo_id, "If another ppo.py made it, use the one beside it")


PART = {"path": [], "kind": "numbers", "shape": [4]}


@pytest.mark.parametrize("changes", [
    {"hidden_sizes": [128, 64]}, {"parts": [PART | {"shape": [5]}]}, {"parts": [PART, PART]}, {"parts": 4},
    {"action": {"shape": [], "nvec": [3], "start": [0]}}, {"action": {}}, {"masks": "info"},
], ids=lambda changes: json.dumps(changes)[1:40])  # fmt: skip
def test_a_config_that_does_not_fit_weights_or_environment_is_refused(take, stranger, settings, changes):
    repo_id = stranger(config__json=settings(changes))
    assert_refused(take(repo_id), f"loading {repo_id}")


NAME = "actor.0.weight"


@pytest.mark.parametrize("tamper, why", [
    (lambda tensors: {NAME: tensors[NAME] * float("nan")}, NAME),
    (lambda tensors: {NAME: tensors[NAME] / 0}, NAME),
    (lambda tensors: {NAME: tensors[NAME].T.contiguous()}, NAME),
    (lambda tensors: {NAME: tensors[NAME].double()}, NAME),
    (lambda tensors: {"backdoor": torch.zeros(1)}, "backdoor"),
    (lambda tensors: {NAME: None}, NAME),
], ids=["NaN", "infinite", "shape", "dtype", "extra", "missing"])  # fmt: skip
def test_strange_weights_are_refused(take, hub, stranger, tamper, why):
    tensors = load(hub.files("tester/cartpole")["model.safetensors"])
    tensors |= tamper(tensors)
    repo_id = stranger(model__safetensors=save({k: v for k, v in tensors.items() if v is not None}))
    assert_refused(take(repo_id), f"loading {repo_id}", why)


@pytest.mark.parametrize("file", FILES)
def test_a_huge_file_is_refused_before_it_is_downloaded(take, hub, stranger, file):
    repo_id = stranger()
    hub.sizes[repo_id, file] = 2**40
    assert_refused(take(repo_id), "refused", repo_id, file, str(2**40))
    assert not [path for method, path in hub.log if method == "GET" and re.match(f"/{repo_id}/.*/{file}", path)]


@pytest.mark.parametrize("name", ["../x", "tester/..", "tester/../x", "/x/y", "tester/x y"])
def test_a_name_that_is_no_repos_is_not_asked_for(take, hub, name):
    before = len(hub.log)
    assert_refused(take(name), name)
    assert len(hub.log) == before


def test_only_the_policys_own_files_are_downloaded(take, hub, stranger, world):
    repo_id = stranger(**{"../../evil": b"evil", "sub/evil": b"evil"})
    code, _, err = take(repo_id, *QUICK)
    assert code == 0, err
    assert {path.split("/", 5)[5] for _, path in hub.log if path.startswith(f"/{repo_id}/")} == set(FILES)
    assert not list(world.home.rglob("evil"))
