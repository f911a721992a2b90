"""The README and the pages behind it: their commands and their Python run as printed and print what is shown, and what
they name exists.

A block of commands runs in a copy of the project with one short run in it, against a Hub on the loopback. Commands are
shortened by flags at their end, and `<run>` is the name of that run."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import reduce

import gymnasium as gym
import pytest
import torch
from conftest import ROOT
from hub_server import Hub

import ppo

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("runs/reference/*.md")))}
README = PAGES[ROOT / "README.md"]
DETAILS, TROUBLES = (PAGES[ROOT / f"runs/reference/{name}.md"] for name in ("details", "troubleshooting"))
TEXT = "\n".join(PAGES.values())
PROSE = re.sub(r"<!-- results -->.*?<!-- /results -->", "", TEXT, flags=re.DOTALL)  # that is made by reference.py
COOKED = "\n".join(text for page, text in PAGES.items() if page.name != "recipes.md")  # see test_recipes.py
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", COOKED, re.DOTALL | re.MULTILINE)
SETUP, *SHELL = [(code.splitlines(), shown.splitlines()) for kind, code, shown in BLOCKS if kind == "bash"]
PYTHON = [code for kind, code, _ in BLOCKS if kind == "python"]
OWN_FILES = {code.splitlines()[0].removeprefix("# "): code for code in PYTHON if code.startswith("# ")}

AT_ONCE = "--total-timesteps 16 --num-envs 2 --num-steps 8 --num-minibatches 2 --validation-episodes 0 " \
          "--eval-episodes 1"  # fmt: skip
BRIEFLY = "--total-timesteps 2048 --num-envs 4 --num-steps 128 --num-minibatches 4 --validation-episodes 1 " \
          "--eval-episodes 2"  # fmt: skip
SCORE = r"mean_reward \S+ \+/- \S+ over {} greedy episodes"
CASES = [  # command, the flags that shorten it, what it prints
    (r"python \w+\.py --evaluate \S+( --capture-video)?", "--eval-episodes 2", SCORE.format(2)),
    (r"python ppo\.py --resume \S+ --repo-id \S+", "", r"^pushed: http\S+/commit/\w+$"),
    (r"python ppo\.py --init-from \S+ --total-timesteps 2e6", BRIEFLY, SCORE.format(2)),
    (r"python ppo\.py --resume \S+", "", r"^step +2,0\d\d "),
    (r"python ppo\.py --env-id ALE/\S+", AT_ONCE, SCORE.format(1)),
    (r"python \w+\.py --env-id \S+( --.*)?", BRIEFLY, SCORE.format(2)),
    (r"torchrun .*", BRIEFLY.replace("2048", "32768").replace("--num-envs 4 --num-steps 128 ", ""), SCORE.format(2)),
    (
        r"python tests/benchmark\.py",
        "--tables speed --rows cartpole --steps 2048 --repeats 1",
        r"^\|cartpole\|[\d,]+\|",
    ),
    (r"git apply (-R )?\S+", "", ""),
    (r"tensorboard --logdir runs", "--port 0", r"http://localhost:\d+/"),
]
QUICK = r"tensorboard .*|python ppo\.py --(evaluate|resume) .*"  # blocks of anything else are slow
NUMBER = r"[-+]?\d[\d.,]*"


def without_comment(line):
    return re.sub(r"\s+#.*", "", line)


COMMANDS = [[without_comment(line) for line in code] for code, _ in SHELL]
NODES = [commands for commands in COMMANDS if "--nnodes" in commands[0]]


def case(command):
    """Of the first case that fits: the flags to append and what is to be printed."""
    return next((rest for pattern, *rest in CASES if re.fullmatch(pattern, command)), None)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """What a user has: a clone, the files that the README lists, and a short run in runs/."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("ppo.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name, code in OWN_FILES.items():
        (folder / name).write_text(code)
    train = f"python ppo.py --env-id LunarLander-v3 {BRIEFLY} --checkpoint-every 1"
    assert "mean_reward" in printed_by(train, folder, os.environ)
    return folder


@pytest.fixture
def clone(project, tmp_path):
    """A copy of it to change, and the environment variables to work in it: with a Hub and a right to write to it."""
    hub = Hub()
    hub.tokens["hf_me"] = ("me", "write")
    yield (
        shutil.copytree(project, tmp_path / "clone"),
        {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HOME": str(tmp_path / "hf"),
         "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    hub.shutdown()
    hub.server_close()


def printed_by(command, folder, env):
    """Run a command as a user does whose virtual environment is active; what it printed. It must not fail."""
    env = {**env, "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{env['PATH']}"}
    if not shutil.which("torchrun", path=env["PATH"]):
        command = re.sub("^torchrun", "python -m torch.distributed.run", command)
    with subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:  # fmt: skip
        if command.startswith("tensorboard"):
            return answer_of(process)
        output, _ = process.communicate()
    assert process.returncode == 0, f"{command}\n{output}"
    return output


def answer_of(server):
    """Wait until a server tells its address, ask it for its page, and end it; what it printed."""
    lines, timer = [], threading.Timer(60, server.kill)
    timer.start()
    for line in server.stdout:
        lines.append(line)
        if url := re.search(r"http://localhost:\d+/", line):
            plain = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            assert plain.open(url[0], timeout=30).status == 200
            server.terminate()
    timer.cancel()
    return "".join(lines)


def pattern(shown):
    """A line that the README shows, with any numbers in place of its own, and anything in place of '...'."""
    words = re.sub(NUMBER, "<number>", " ".join(shown.split()))
    return re.escape(words).replace("<number>", NUMBER).replace(r"\ ", r"\s+").replace(r"\.\.\.", ".*")


# Commands


def test_the_first_block_is_what_continuous_integration_runs():
    code, _ = SETUP
    assert len(code) == 2
    assert code[0].startswith("python3 -m venv ") and code[0].endswith(" python ppo.py")
    assert code[1].startswith(". .venv/bin/activate && ") and code[1].endswith(" python -m pytest tests -n 2")


@pytest.mark.parametrize("command", [command for block in COMMANDS for command in block])
def test_every_command_has_a_case_that_runs_it(command):
    assert case(command), f"no case in tests/test_readme.py runs `{command}`"
    flags = re.findall(r"--[\w-]+", command.partition("ppo.py ")[2])
    assert [flag for flag in flags if not exists(flag)] == []


@pytest.mark.parametrize(
    ("commands", "shown"),
    [
        pytest.param(commands, shown, id=commands[0],
                     marks=[] if all(re.fullmatch(QUICK, c) for c in commands) else pytest.mark.slow)
        for commands, (_, shown) in zip(COMMANDS, SHELL)
        if commands not in NODES
    ],
)  # fmt: skip
def test_commands_run_and_print_what_is_shown(commands, shown, clone):
    folder, env = clone
    (run,) = (folder / "runs").iterdir()
    printed = ""
    for command in commands:
        flags, expected = case(command)
        if re.search(r"--resume \S+$", command):  # as if the run had been killed before its last checkpoint
            (run / "results.json").unlink()
            max(run.glob("checkpoint-*.pt")).unlink()
        output = printed_by(f"{command} {flags}".replace("<run>", run.name), folder, env)
        assert re.search(expected, output, re.MULTILINE), f"{command}\n{output}"
        printed += output
    filmed = re.search("--capture-video|--repo-id", " ".join(commands))
    assert bool(filmed) == bool(list(folder.glob("runs/*/replay.mp4")))
    for line in shown:
        assert re.search(f"^{pattern(line)}$", printed, re.MULTILINE), f"not printed: {line}\n{printed}"


def test_the_transcript_is_that_of_the_first_seed_in_the_table():
    seed = json.loads((ROOT / "runs/reference/LunarLander-v3/seed1.json").read_text())
    kept = (
        "kept: the agent of iteration {best_iteration}, validation {validation[best]:.2f}; last {validation[last]:.2f}"
    )
    score = "{env_id}: mean_reward {mean_reward:.2f} +/- {std_reward:.2f} over {episodes}"
    assert {kept.format(**seed), score.format(**seed)} <= set(README.splitlines())


@pytest.mark.slow
def test_two_machines_train_one_run(clone, tmp_path):
    """Two folders of this machine stand for them; the second ends without a word and leaves nothing."""
    folder, env = clone
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    before = sorted(path.name for path in (folder / "runs").iterdir())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (commands,) = NODES
    flags, expected = case(commands[0])
    assert case(commands[1]) == [flags, expected] and commands[1] == commands[0].replace("-rank 0", "-rank 1")
    commands = [c.replace("10.0.0.1", "127.0.0.1").replace("29500", str(port)) + f" {flags}" for c in commands]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(printed_by, commands, (folder, elsewhere), (env, env))
    assert re.search(expected, first) and "mean_reward" not in second
    (run,) = (path for path in (folder / "runs").iterdir() if path.name not in before)
    assert json.loads((run / "results.json").read_text())["ranks"] == 2
    assert sorted(path.name for path in (elsewhere / "runs").iterdir()) == before


# Python


def test_the_agent_acts_in_python(clone):
    folder, env = clone
    (run,) = (folder / "runs").iterdir()
    (code,) = (code for code in PYTHON if code not in OWN_FILES.values())
    code = code.replace("<run>", run.name) + "assert np.isfinite(reward)"
    code = "import numpy as np\n" + code
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, env=env).returncode == 0


def test_the_world_that_is_shown_is_kept_without_a_film_which_it_has_none_of(clone):
    folder, env = clone
    (command,) = (line for block in COMMANDS for line in block if "my_module:MyEnv-v0 --total" in line)
    flags = f"{BRIEFLY} --capture-video --run-name marble"
    output = printed_by(f"{command} {flags}", folder, env)
    assert re.search("^warning: the video failed: .*MyEnv-v0", output, re.MULTILINE)
    assert (folder / "runs/marble/results.json").exists() and not (folder / "runs/marble/replay.mp4").exists()


# What is named


def table(heading):
    """The cells of the table below a heading of the details page, one list a row."""
    section = DETAILS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows[2:]]


def exists(name):
    """Whether ppo.py has this flag, or this function, class, method or constant."""
    if name.startswith("--"):
        return name[2:].removeprefix("no-").replace("-", "_") in {field.name for field in fields(ppo.Args)}
    return reduce(lambda x, part: getattr(x, part, None), name.split("."), ppo) is not None


def marks(text):
    """Each mark in brackets, by its own name: [core 9, 11] gives core 9 and core 11."""
    groups, found = "|".join(GROUPS), []
    for several in re.findall(rf"\[((?:{groups}) \d+(?:, (?:(?:{groups}) )?\d+)*)\]", text):
        for word in several.split(", "):
            group = word.split(" ")[0] if " " in word else found[-1].split(" ")[0]
            found.append(f"{group} {word.split(' ')[-1]}")
    return set(found)


GROUPS = {"core": 13, "Atari": 9, "continuous": 9, "LSTM": 5, "MultiDiscrete": 1}
THE_37 = table("The 37 implementation details")


def test_all_37_details_are_there():
    assert [mark for mark, *_ in THE_37] == [f"{group} {i + 1}" for group, n in GROUPS.items() for i in range(n)]


@pytest.mark.parametrize("row", THE_37, ids=lambda row: row[0])
def test_a_detail_is_marked_where_it_acts_and_its_flags_exist(row):
    mark, _, here, where = row
    verdict = here.split(":")[0]
    assert verdict in ("done", "done otherwise", "left out")
    code = (ROOT / "ppo.py").read_text().replace(ppo.__doc__, "")  # the docstring only explains
    assert (mark in marks(code)) == (verdict != "left out")
    flags = re.findall(r"`(--[^`]+)`", where)
    assert where == ", ".join(f"`{flag}`" for flag in flags)
    assert [flag for flag in flags if not exists(flag)] == []


def test_no_other_mark_is_in_the_code():
    assert marks(TEXT + (ROOT / "ppo.py").read_text()) - {mark for mark, *_ in THE_37} == set()


def test_other_names_of_functions_and_flags_exist_too():
    words = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", PROSE, flags=re.DOTALL | re.MULTILINE))
    flags = {flag for word in words for flag in re.findall(r"(?<!\S)--[\w-]+", word)}
    names = {word for word in words if re.fullmatch(r"(?!test_)[A-Za-z]+(_[A-Za-z]+)+|[A-Z]\w+\.(?!md)\w+", word)}
    names |= set(re.findall(r"`(\w+)`", str(table("How the file is laid out"))))
    assert len(flags) > 20 and len(names) > 15
    missing = {name for name in flags | names if not exists(name)}
    others = {"--help", "--slow", "HF_TOKEN", "--nproc-per-node", "--cudagraphs", "--peers"}  # of others
    others |= {"--cuda", "--torch-deterministic", "--save-model", "--upload-model", "--hf-entity"}  # CleanRL's
    others |= {"--exp-name", "--track", "--private"}  # CleanRL's; of `hf repos create`
    others |= {"--algo", "--env", "--trained-agent", "--vec-env"}  # of Stable-Baselines3's zoo
    others |= {"--n-timesteps", "--tensorboard-log", "--tables"}
    theirs = {"action_mask", "max_episode_steps", "entry_point"}  # a key; of Gymnasium
    assert missing == others | theirs | {"checkpoint_every"}  # a field of Args


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", TEXT))
    defined = {
        name for path in ROOT.glob("tests/test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) >= 6
    assert named - defined == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    links = {page.parent / link for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page])}
    links |= {ROOT / link for link in re.findall(r"`((?:tests|runs/reference)/[\w./-]*)`", PAGES[page])}
    assert [link for link in links if not link.exists()] == []


def test_every_page_and_picture_is_linked_from_the_readme():
    pages = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("runs/reference/*.*") if path.suffix != ".json"}
    assert pages == set(re.findall(r"\]\((runs/reference/[^)]+)\)", README))


def test_the_sections_of_the_file_are_listed_in_their_order():
    banners = re.findall(r"^# ---- (.+?)(?::.*?)? -+$", (ROOT / "ppo.py").read_text(), re.MULTILINE)
    assert [section for section, _ in table("How the file is laid out")] == banners


@pytest.mark.parametrize("row", table("The clipped objective, case by case"), ids=lambda row: " ".join(row[:2]))
def test_a_case_of_the_clipped_objective_is_as_the_table_says(row):
    where, sign, term, gradient, test = row
    ratio, advantage = {"below": 0.5, "inside": 1.1, "above": 1.5}[where], {"positive": 2.0, "negative": -2.0}[sign]
    logratio = torch.tensor([ratio]).log().requires_grad_()
    loss = ppo.policy_loss(logratio, torch.tensor([advantage]), 0.2)
    loss.backward()
    terms = {min(max(ratio, 0.8), 1.2) * advantage: "clipped term"}
    terms[ratio * advantage] = "either, they are equal" if ratio * advantage in terms else "unclipped term"
    assert loss.item() == pytest.approx(-min(terms))
    assert term == terms[min(terms)]
    assert gradient == ("yes" if logratio.grad.item() else "none")
    assert sign in test and f"_{where}_the_range_" in test


def test_all_six_cases_of_the_clipped_objective_are_there():
    rows = table("The clipped objective, case by case")
    assert len({tuple(row[:2]) for row in rows}) == len(rows) == 6


def test_gymnasium_refuses_the_version_that_the_course_wants():
    assert "wants LunarLander-v2, which Gymnasium 1.x refuses to make" in " ".join(TROUBLES.split())
    with pytest.raises(gym.error.DeprecatedEnv), pytest.warns(DeprecationWarning):
        gym.make("LunarLander-v2")


# Form


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


def test_results_have_their_place():
    assert re.search(r"^## Results\n[^#]*^<!-- results -->\n\|[^#]*^<!-- /results -->\n\n## ", README, re.MULTILINE)


def test_lines_and_quotes_are_plain():
    assert [line for line in PROSE.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    assert not set("\u2018\u2019\u201c\u201d") & set(PROSE)
