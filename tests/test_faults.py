"""Bad worlds, bad machines: the run stops with a word on what to do, and its last good checkpoint stays the newest."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ROOT, command

import ppo

# Two steps from its reset, in environment 2 of those made at iteration 2, the world does what $FAULT says; with $ALL
# in every one of them.
WORLD = f"""
import os
import time
from pathlib import Path

import gymnasium as gym
import numpy as np


class Bad(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        Path(f"pid-{{os.getpid()}}").touch()

    def reset(self, seed=None, options=None):
        meant = seed == {ppo.seeds(1, ppo.TRAINING, 0, 2, n=4)[2]} or "ALL" in os.environ
        self.t, self.fault = 0, os.environ.get("FAULT") if meant else None
        match self.fault:
            case "raise at once": raise OSError("the bridge is out")
            case "no info": return np.zeros(2, np.float32)
            case "only a number": return 0
            case "three values of reset": return np.zeros(2, np.float32), {{}}, None
            case "wrong first shape": return np.zeros(3, np.float32), {{}}
        return np.full(2, np.nan if self.fault == "nan first observation" else 0, np.float32), {{}}

    def step(self, action):
        self.t += 1
        obs, reward = np.full(2, self.t / 10, np.float32), float(action)
        match self.fault if self.t == 3 else None:
            case "nan reward": reward = np.nan
            case "infinite reward": reward = np.inf
            case "nan observation": obs[0] = np.nan
            case "infinite observation": obs[1] = -np.inf
            case "raise": raise OSError("the bridge is out")
            case "die": os._exit(3)
            case "leave": os._exit(0)
            case "two rewards": reward = np.zeros(2)
            case "no reward": reward = []
            case "wrong shape": obs = np.zeros((2, 1), np.float32)
            case "four values": return obs, reward, False, {{}}
            case "nothing": return None
        return obs, reward, False, self.t == 10, {{"odd": np.zeros(3 if self.fault == "odd info" else 2)}}


gym.register("Bad-v0", Bad)
"""
RUN = Path("runs", "bad")
TRAIN = [*QUICK, "--preset", "none", "--env-id", "bad_world:Bad-v0", "--run-name", "bad",
         "--total-timesteps", "192", "--num-steps", "8",
         "--checkpoint-every", "2", "--validation-episodes", "0"]  # fmt: skip
RESUME = ["--resume", RUN]
FAULTY_STEP = 2 * 8 + 2


@pytest.fixture(autouse=True)
def bad_world(tmp_path, monkeypatch):
    """The module with the world above, for this process and for others; without a fault, until a test sets one."""
    Path("bad_world.py").write_text(WORLD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bad_world", raising=False)
    ppo.gym.registry.pop("Bad-v0", None)


def checkpoints():
    return {path.name: path.read_bytes() for path in sorted(RUN.glob("*.pt"))}


def newest():
    return list(checkpoints())[-1]


def one_line(err):
    """Whether standard error is one line, not counting the command to go on."""
    go_on = rf"To go on after iteration \d{{8}}: python ppo\.py --resume {RUN}"
    return len([line for line in err.splitlines() if line and not re.fullmatch(go_on, line)]) == 1


# Worlds


NORM = ["--norm-obs", "--norm-reward"]
NOT_FINITE = {"nan reward": [], "infinite reward": NORM, "nan observation": NORM, "infinite observation": []}


@pytest.mark.parametrize("fault, flags", NOT_FINITE.items(), ids=NOT_FINITE)
def test_what_is_not_finite_stops_the_run_before_anything_is_learned_from_it(fault, flags, main, monkeypatch):
    monkeypatch.setenv("FAULT", fault)
    code, _, err = main(*TRAIN, *flags)
    assert code == 1
    value, name = fault.replace("infinite", "inf").split()
    assert all(word in err for word in ("environment 2", name, f"step {FAULTY_STEP}", value)) and one_line(err)
    assert newest() == "checkpoint-00000002.pt"
    assert_goes_on_as_if_never_bad(flags, main, monkeypatch)


def assert_goes_on_as_if_never_bad(flags, main, monkeypatch):
    """Once the world is mended."""
    monkeypatch.delenv("FAULT")
    code, _, err = main(*RESUME)
    assert code == 0, err
    assert_ends_like_a_run_without_fault(flags, main)


def assert_ends_like_a_run_without_fault(flags, main):
    weights = (RUN / "model.safetensors").read_bytes()
    shutil.rmtree(RUN)
    assert main(*TRAIN, *flags)[0] == 0
    assert (RUN / "model.safetensors").read_bytes() == weights


# What the world answers, what is said of it, when
MALFORMED = {
    "two rewards": ("a reward of shape (2,)", FAULTY_STEP),
    "no reward": ("a reward of shape (0,)", FAULTY_STEP),
    "wrong shape": ("an observation of shape (2, 1), not (2,)", FAULTY_STEP),
    "four values": ("no tuple of 5", FAULTY_STEP),
    "nothing": ("no tuple of 5", FAULTY_STEP),
    "no info": ("no tuple of 2", FAULTY_STEP - 3),
    "only a number": ("no tuple of 2", FAULTY_STEP - 3),
    "three values of reset": ("no tuple of 2", FAULTY_STEP - 3),
    "wrong first shape": ("an observation of shape (3,), not (2,)", FAULTY_STEP - 3),
}


def assert_blames(err, environment, words, when):
    blame = f"error: ValueError: environment {environment} gave {words}"
    assert err.startswith(blame) and err.endswith(f" {when} of bad_world:Bad-v0\n") and err.count("\n") == 1, err


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_answer_is_named_in_one_line_that_does_not_tell_to_resume(fault, main, monkeypatch):
    monkeypatch.setenv("FAULT", fault)
    code, _, err = main(*TRAIN)
    words, step = MALFORMED[fault]
    assert code == 1
    assert_blames(err, 2, words, f"at step {step}")
    assert newest() == "checkpoint-00000002.pt"
    assert_goes_on_as_if_never_bad([], main, monkeypatch)


@pytest.mark.parametrize("fault", [fault for fault, (_, step) in MALFORMED.items() if step < FAULTY_STEP])
def test_a_malformed_answer_to_the_first_reset_leaves_no_run(fault, main, monkeypatch):
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("ALL", "1")
    code, out, err = main(*TRAIN)
    assert (code, out) == (2, "") and not Path("runs").exists()
    assert_blames(err, 0, MALFORMED[fault][0], "at its reset")


@pytest.mark.parametrize("fault", ["two rewards", "wrong shape", "four values"])
def test_a_malformed_answer_in_a_worker_is_named_just_as_well(fault):
    process = command(*TRAIN, "--vectorization", "async", env={"FAULT": fault}, timeout=60)
    assert process.returncode == 1
    assert_blames(process.stderr.splitlines(True)[-1], 2, MALFORMED[fault][0], f"at step {FAULTY_STEP}")
    assert "--resume" not in process.stderr
    assert_all_end()


@pytest.mark.parametrize("flags", [[], ["--norm-obs", "--checkpoint-every", 1]], ids=["raw", "normalised"])
def test_a_first_observation_that_is_not_finite_stops_the_run_as_well(flags, main, monkeypatch):
    monkeypatch.setenv("FAULT", "nan first observation")
    code, _, err = main(*TRAIN, *flags)
    assert code == 1
    assert "environment 2" in err and "observation" in err and one_line(err)
    assert newest() == "checkpoint-00000002.pt"


@pytest.mark.parametrize("fault, step", [("raise", FAULTY_STEP), ("raise at once", FAULTY_STEP - 3)])
def test_an_environment_that_raises_keeps_its_traceback_and_gets_a_name_and_a_remedy(fault, step, main, monkeypatch):
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(OSError, match="the bridge is out") as caught:
        main(*TRAIN)
    notes = "\n".join(caught.value.__notes__)
    assert caught.traceback[-1].path.name == "bad_world.py"
    assert "environment 2" in notes and f"at step {step} of bad_world:Bad-v0" in notes
    assert f"To go on after iteration 00000002: python ppo.py --resume {RUN}" in notes
    assert newest() == "checkpoint-00000002.pt"


def test_an_info_that_cannot_be_gathered_costs_nothing(main, monkeypatch):
    """Here of another shape in one environment than in the others; it is of no use anyway."""
    monkeypatch.setenv("FAULT", "odd info")
    code, _, err = main(*TRAIN)
    assert code == 0, err
    monkeypatch.delenv("FAULT")
    assert_ends_like_a_run_without_fault([], main)


def test_an_async_environment_that_raises_is_reported_just_as_well():
    process = command(*TRAIN, "--vectorization", "async", env={"FAULT": "raise"}, timeout=60)
    assert process.returncode == 1
    for words in ("the bridge is out", "bad_world.py", "environment 2", f"at step {FAULTY_STEP} of bad_world:Bad-v0"):
        assert words in process.stderr
    assert_all_end()


@pytest.mark.parametrize("fault", ["die", "leave"])
def test_an_async_worker_that_dies_ends_the_run_within_10_seconds_and_leaves_no_orphans(fault):
    process = start(*TRAIN, "--vectorization", "async", fault=fault)
    process.stdout.readline()  # "run: ...": the worker dies within milliseconds
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1
    for words in ("a process died", f"at step {FAULTY_STEP} of bad_world:Bad-v0",
                  f"To go on after iteration 00000002: python ppo.py --resume {RUN}"):  # fmt: skip
        assert words in err
    assert "Traceback" not in err
    assert_all_end()


ENDS = {"main process killed": (os.kill, signal.SIGKILL, -9), "all terminated": (os.killpg, signal.SIGTERM, 143),
        "Ctrl-C, which all get": (os.killpg, signal.SIGINT, 130)}  # fmt: skip


@pytest.mark.parametrize("send, signum, code", ENDS.values(), ids=ENDS)
def test_no_worker_outlives_a_run(send, signum, code):
    endless = ["--total-timesteps", "1000000", "--checkpoint-every", "1000"]
    process = start(*TRAIN, *endless, "--vectorization", "async", start_new_session=True)
    while len(living() - {process.pid}) < 4 and process.poll() is None:
        time.sleep(0.01)
    send(process.pid, signum)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert code < 0 or "Traceback" not in err  # those who lost their main process may complain
    assert_all_end()


def test_a_run_that_another_process_trains_is_left_to_it(main):
    endless = ["--total-timesteps", "1000000", "--checkpoint-every", "1000"]
    process = start(*TRAIN, *endless, start_new_session=True)
    process.stdout.readline()  # "run: ..."
    before = checkpoints()
    code, out, err = main(*RESUME)
    assert (code, out) == (2, "") and f"locking {RUN}" in err and "Another process trains it" in err and one_line(err)
    assert checkpoints() == before and process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)  # which leaves no lock behind
    process.communicate(timeout=30)
    code, out, err = main(*TRAIN, *endless)
    assert (code, out) == (2, "") and f"--resume {RUN}" in err and one_line(err)
    resumed = start(*RESUME)
    assert resumed.stdout.readline().startswith(f"run: {RUN} ")
    resumed.send_signal(signal.SIGTERM)
    assert resumed.communicate(timeout=30) and resumed.returncode == 143


def start(*argv, fault="none", **kwargs):
    return subprocess.Popen([sys.executable, ROOT / "ppo.py", *argv], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"FAULT": fault}, **kwargs)  # fmt: skip


def living():
    """The processes in which the world was made, as it left their ids in files, and that still run."""

    def lives(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    return {pid for path in Path().glob("pid-*") if lives(pid := int(path.name.removeprefix("pid-")))}


def assert_all_end():
    assert list(Path().glob("pid-*"))
    deadline = time.monotonic() + 5
    while living() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living()


# Numbers


LOSSES = {
    "nan": lambda loss: loss * torch.nan,
    "infinite": lambda loss: loss + torch.inf,  # with a finite gradient
    "infinite gradient": lambda loss: loss * torch.inf,
}


@pytest.fixture
def events(monkeypatch):
    """The steps of the optimiser, as they happen."""
    record, step = [], ppo.Adam.step
    monkeypatch.setattr(ppo.Adam, "step", lambda *args: (record.append("step"), step(*args)))
    return record


def assert_stopped_in_the_third_minibatch(result, events):
    code, _, err = result
    assert code == 1
    assert events == ["loss", "step", "loss", "step", "loss"]
    assert "iteration 0" in err and "--learning-rate" in err and one_line(err)
    assert newest() == "checkpoint-00000000.pt"


@pytest.mark.parametrize("part", ["policy_loss", "value_loss"])
@pytest.mark.parametrize("bad", LOSSES.values(), ids=LOSSES)
def test_a_loss_that_is_not_finite_stops_the_run_before_the_optimiser_steps(bad, part, events, main, monkeypatch):
    loss = getattr(ppo, part)

    def loss_gone_bad(*args):
        events.append("loss")
        return loss(*args) if len(events) < 5 else bad(loss(*args))

    monkeypatch.setattr(ppo, part, loss_gone_bad)
    assert_stopped_in_the_third_minibatch(main(*TRAIN), events)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e30"])  # the square of the last is not finite, nor the norm
def test_a_gradient_that_is_not_finite_somewhere_stops_it_too_though_the_losses_are(value, events, main, monkeypatch):
    compute_gradient = ppo.compute_gradient

    def gradient_gone_bad(*args):
        events.append("loss")
        gradient, metrics = compute_gradient(*args)
        if len(events) == 5:
            gradient[7] = float(value)
        return gradient, metrics

    monkeypatch.setattr(ppo, "compute_gradient", gradient_gone_bad)
    assert_stopped_in_the_third_minibatch(main(*TRAIN), events)


def test_an_absurd_learning_rate_ends_in_one_line(main):
    code, _, err = main(*TRAIN, "--learning-rate", "1e30")
    assert code == 1
    assert "--learning-rate" in err and one_line(err)
    assert newest() == "checkpoint-00000000.pt"


# Machines


@pytest.fixture
def unfinished(main):
    """A run that was killed just before its results."""
    assert main(*TRAIN)[0] == 0
    (RUN / "results.json").unlink()
    return RUN


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
@pytest.mark.parametrize("trained", [False, True], ids=["while it trains", "when it was trained"])
@pytest.mark.parametrize("size", [20_000, 50], ids=["neither checkpoint nor agent fits", "nothing fits"])
def test_a_full_disk_costs_one_line_and_no_checkpoint(size, trained, unfinished, main):
    if not trained:
        (RUN / newest()).unlink()
    before = checkpoints()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code, _, err = main(*RESUME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert str(RUN) in err and "File too large" in err and one_line(err)
    assert checkpoints() == before
    assert main(*RESUME)[0] == 0  # with room again


def test_a_disk_that_fills_up_while_the_agent_is_saved_costs_one_line(main, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ppo.safetensors.torch, "save", full)
    code, _, err = main(*TRAIN)
    assert code == 1
    assert "No space left on device" in err and f"--resume {RUN}" in err and one_line(err)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_whose_folder_vanishes_ends_in_one_line(main, monkeypatch):
    step = ppo.Adam.step
    monkeypatch.setattr(ppo.Adam, "step", lambda *args: (shutil.rmtree("runs", ignore_errors=True), step(*args))[1])
    code, _, err = main(*TRAIN)
    assert code == 1
    assert str(RUN) in err and "No such file or directory" in err and one_line(err)


EXHAUSTIONS = {
    "of the GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "of Python": MemoryError(),
    "of torch": RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("error", EXHAUSTIONS.values(), ids=EXHAUSTIONS)
def test_running_out_of_memory_ends_in_a_line_on_what_to_lower(error, main, monkeypatch):
    def train(args):
        raise error

    monkeypatch.setattr(ppo, "train", train)
    code, _, err = main(*TRAIN)
    assert code == 1
    assert "memory" in err and "--num-envs" in err and one_line(err)


@pytest.mark.parametrize("data", [b"", b"not a checkpoint"])
def test_a_run_without_a_usable_checkpoint_is_to_be_started_again(data, unfinished, main):
    for path in RUN.glob("*.pt"):
        path.write_bytes(data)
    code, out, err = main(*RESUME)
    assert (code, out) == (2, "")
    *warnings, error = err.splitlines()  # one for each, the newest first
    assert [name in line for name, line in zip(reversed(checkpoints()), warnings, strict=True)] == [True, True]
    assert error.startswith(f"error: {RUN} has no usable checkpoint")


def test_a_run_killed_before_its_first_checkpoint_can_be_started_again(unfinished, main):
    for path in RUN.glob("*.pt"):
        path.unlink()
    code, _, err = main(*RESUME)
    assert code == 2
    assert "no usable checkpoint" in err and one_line(err)
    assert main(*TRAIN)[0] == 0  # as it was told to


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--init-from"])
def test_a_folder_that_is_no_run_is_named_in_one_line(flag, main):
    code, _, err = main(flag, "runs/none")
    assert (code, err) == (2, "error: there is no folder runs/none\n")
