"""The command line: defaults that fit the environment, flags that win, and one clear message for every bad input."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_type_hints

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT, command

import ppo

SHORT = ["--num-envs", "2", "--num-steps", "16", "--num-minibatches", "2", "--total-timesteps", "64",
         "--eval-episodes", "1", "--validation-episodes", "1"]  # fmt: skip


@pytest.fixture
def refused(main, tmp_path):
    """Call main with bad input: refused("--gamma", "2") -> its message on one line, without tyro's frame.

    Refused means exit code 2, a single message, and nothing written."""

    def call(*argv):
        before = set(tmp_path.rglob("*"))
        code, out, err = main(*SHORT, *argv)
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        messages = re.findall("^error: .+\n$|Error parsing|invalid choice|Unrecognized options:", err)
        assert len(messages) == 1, err
        assert set(tmp_path.rglob("*")) == before
        return in_one_line(err)

    return call


def in_one_line(text):
    return " ".join(without_frames(text).split())


def without_frames(text):
    return re.sub("[╭╮╰╯│─]|-{3,}", " ", text)


def plain(argv):
    """Its arguments, without the name of the run."""
    return replace(ppo.parse_args(argv), run_name="")


# Defaults, presets and flags


@pytest.mark.parametrize("env_id", ["CartPole-v1", "LunarLander-v3", "HalfCheetah-v5", "ALE/Pong-v5", "Taxi-v4"])
def test_help_shows_the_defaults_of_the_environment(env_id, main):
    code, out, _ = main("--env-id", env_id, "--help")
    args = ppo.parse_args(["--env-id", env_id])
    assert code == 0
    for name in ("env_id", "learning_rate", "num_envs", "total_timesteps", "gamma", "norm_obs"):
        block = re.search(rf"{ppo.flag(name)}[ ,].*?\(default: (\S+)\)", in_one_line(out))
        assert block[1] == str(getattr(args, name))


def test_help_lists_every_flag_in_order_with_its_comment_and_default(main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = main("--help")
    assert (code, err) == (0, "")
    flags = re.findall(r"^ {1,4}(--\S+?),? ", without_frames(out), re.MULTILINE)  # help texts stand further right
    assert flags == [ppo.flag(option.name) for option in fields(ppo.Args)]
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(ppo.Args), re.MULTILINE))
    assert len(comments) > 30
    for name, comment in comments.items():
        end = "repeatable" if name == "env_kwargs" else "default: "
        assert re.search(rf"{ppo.flag(name)}\b.* {re.escape(comment)} \({end}", in_one_line(out))


def test_args_are_one_flat_frozen_dataclass_that_starts_with_the_environment():
    args = ppo.Args(env_id="Taxi-v4", seed=7, hidden_sizes=(8,), gamma=0.5)
    assert fields(ppo.Args)[0].name == "env_id" and ppo.Args("Taxi-v4").env_id == "Taxi-v4"
    assert (args.env_id, args.seed, args.hidden_sizes, args.gamma) == ("Taxi-v4", 7, (8,), 0.5)
    assert not any(is_dataclass(value) for value in vars(args).values())
    assert asdict(args) == asdict(ppo.Args()) | {
        "env_id": "Taxi-v4", "seed": 7, "hidden_sizes": (8,), "gamma": 0.5,
    }  # fmt: skip
    for name in ("env_id", "seed"):
        with pytest.raises(FrozenInstanceError):
            setattr(args, name, getattr(args, name))


@pytest.mark.parametrize(
    "env_id",
    ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3",
     "Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5", "InvertedDoublePendulum-v5",
     "Pusher-v5", "Reacher-v5", "Swimmer-v5", "Walker2d-v5", "CarRacing-v3", "ALE/Pong-v5", "ALE/Breakout-v5"],
)  # fmt: skip
def test_a_preset_applies(env_id):
    args = plain(["--env-id", env_id])
    assert fnmatchcase(env_id, args.preset) and ppo.PRESETS[args.preset]
    assert args == ppo.preset_args(ppo.Args(env_id)) == ppo.Args(env_id, preset=args.preset, **ppo.PRESETS[args.preset])


@pytest.mark.parametrize(
    "env_id, name, flags",
    [
        ("Taxi-v4", "general, discrete actions", []),
        ("FrozenLake-v1", "general, discrete actions", ["--env-kwargs", "is_slippery", "False"]),
        ("MountainCar-v0", "general, discrete actions", []),
        ("MountainCarContinuous-v0", "general, continuous actions", []),
        ("InvertedPendulum-v5", "general, continuous actions", []),
        ("Taxi-v4", "general, discrete actions, few steps", ["--total-timesteps", "200000"]),
        ("Taxi-v4", "general, discrete actions", ["--total-timesteps", "200001"]),
        ("MountainCarContinuous-v0", "general, continuous actions, few steps", ["--total-timesteps", "50000"]),
        ("worlds:UnnamedCarRacing-v0", "general, images", ["--env-kwargs", "continuous", "False"]),
        ("Taxi-v4", "none", ["--preset", "none"]),
        ("CartPole-v0", "CartPole-v1", ["--preset", "CartPole-v1"]),
        ("LunarLanderContinuous-v3", "LunarLander*-v3", []),
    ],
)
def test_another_environment_takes_the_preset_that_is_named_or_fits_what_can_be_seen(env_id, name, flags):
    args, settings = plain(["--env-id", env_id, *flags]), ppo.PRESETS[name]
    given = {"env_kwargs": args.env_kwargs} | ({"total_timesteps": int(flags[1])} if "--total" in str(flags) else {})
    assert args == ppo.Args(env_id=env_id, preset=name, **settings | given)
    assert args.env_kwargs == ({flags[1]: False} if flags and flags[0] == "--env-kwargs" else {})


def test_the_general_preset_for_continuous_actions_trains_for_a_million_steps():
    assert plain(["--env-id", "Walker2d-v5"]).total_timesteps == 1_000_000


def test_an_unknown_preset_is_refused_with_the_list(main):
    code, out, err = main("--preset", "easy")
    assert (code, out) == (2, "") and err.startswith("error: no preset 'easy'; there are: none; general, discrete")
    assert all(name in err for name in ppo.PRESETS) and len(err.splitlines()) == 1


def test_the_presets_name_is_printed_and_saved(main):
    code, out, _ = main("--env-id", "FrozenLake-v1", "--preset", "Acrobot-v1", *QUICK, "--run-name", "lake")
    assert code == 0 and "preset: Acrobot-v1 " in out.splitlines()[0]
    assert json.loads(Path("runs/lake/config.json").read_text())["preset"] == "Acrobot-v1"


def test_the_first_preset_that_fits_is_taken(monkeypatch):
    monkeypatch.setattr(ppo, "PRESETS", {"none": {}, "MyEnv-v0": {"gamma": 0.6}, "My*": {"gamma": 0.5}})
    assert [ppo.preset_args(ppo.Args(f"My{name}-v0")).gamma for name in ("Env", "Other")] == [0.6, 0.5]


def test_explicit_flags_win_over_the_preset():
    given = {"learning_rate": 1e-5, "num_envs": 3, "num_minibatches": 1, "clip_vloss": True, "hidden_sizes": (8, 9)}
    args = plain(["--learning-rate", "1e-5", "--num-envs", "3", "--num-minibatches", "1", "--clip-vloss",
                  "--hidden-sizes", "8", "9"])  # fmt: skip
    assert args == replace(ppo.preset_args(ppo.Args("CartPole-v1")), **given)


@pytest.mark.parametrize("steps", ["1e6", "1000000", "1_000_000"])
def test_total_timesteps_are_taken_as_people_write_them(steps):
    args = ppo.parse_args(["--total-timesteps", steps])
    assert args.total_timesteps == 1_000_000 and args.num_iterations == 488 and type(args.num_iterations) is int


@pytest.mark.parametrize("env_id", ["CartPole-v1", "ALE/Pong-v5"])
def test_env_kwargs_come_as_pairs_and_win_over_the_preset(env_id):
    args = ppo.parse_args(["--env-id", env_id, "--env-kwargs", "a", "False", "b", "0.5", "c", "3", "d", "word"])
    assert {k: args.env_kwargs[k] for k in "abcd"} == {"a": False, "b": 0.5, "c": 3, "d": "word"}


@pytest.mark.parametrize("given", [{"a": 1}, {"repeat_action_probability": 0.25}])
def test_env_kwargs_are_added_to_those_of_the_preset_or_replace_them(given):
    pairs = [str(x) for pair in given.items() for x in pair]
    args = ppo.parse_args(["--env-id", "ALE/Pong-v5", "--env-kwargs", *pairs])
    assert args.env_kwargs == {"repeat_action_probability": 0.0} | given


OPTIONS = {
    "3": 3, "-3": -3, "0.5": 0.5, "1e3": 1000.0, "true": True, "True": True, "false": False, "False": False,
    "None": None, "null": None, "[1, 2.5, 'a', None, True]": [1, 2.5, "a", None, True],
    '[1, 2.5, "a", null, true]': [1, 2.5, "a", None, True], "(1, (2, 3))": [1, [2, 3]], "[]": [], "{}": {},
    "{'a': [1, {'b': False}]}": {"a": [1, {"b": False}]}, '{"a": [1, {"b": false}]}': {"a": [1, {"b": False}]},
    "8x8": "8x8", "'3'": "3", '"3"': "3", "": "", "two words": "two words", "[1": "[1", "007": "007",
    "__import__('os')": "__import__('os')", "{1, 2}": "{1, 2}", "b'x'": "b'x'", "1j": "1j", "human": "human",
}  # fmt: skip


@pytest.mark.parametrize("word, value", OPTIONS.items())
def test_an_option_is_read_as_python_or_json_writes_it_else_it_is_a_string(word, value):
    read = ppo.parse_args(["--env-kwargs", "it", word]).env_kwargs["it"]
    assert (read, type(read)) == (value, type(value)) and json.dumps(read) == json.dumps(value)


def test_several_env_kwargs_add_up_and_the_last_wins():
    flags = ["--env-kwargs", "a", "1", "b", "[2]", "--seed", "3", "--env-kwargs", "c", "word", "a", "None"]
    assert ppo.parse_args(flags).env_kwargs == {"a": None, "b": [2], "c": "word"}


@pytest.mark.parametrize("words", [["a"], ["a", "1", "b"]])
def test_an_option_without_its_value_is_refused(words, refused):
    assert "Error parsing --env-kwargs" in refused("--env-kwargs", *words)


@pytest.fixture
def receiving(register):
    """The id of a world, and the options that it was given each time that it was made."""
    given = []

    def make(render_mode=None, **options):
        given.append(options)
        return gym.make("CartPole-v1").unwrapped

    return register(make, max_episode_steps=20), given


def test_all_kinds_of_options_are_kept_by_config_resume_and_evaluate(receiving, main):
    env_id, given = receiving
    options = {f"option_{i}": value for i, value in enumerate(OPTIONS.values())}
    pairs = [x for i, word in enumerate(OPTIONS) for x in (f"option_{i}", word)]
    run, config = Path("runs/it"), Path("runs/it/config.json")
    flags = ["--env-kwargs", *pairs[:10], "--env-kwargs", *pairs[10:], "--run-name", "it", "--checkpoint-every", 1]

    def made():  # all at once: whatever was made by then
        seen, given[:] = [json.dumps(options, sort_keys=True) for options in given], []
        return set(seen)

    code, out, err = main("--env-id", env_id, *SHORT, *flags)
    assert code == 0, err
    assert json.loads(config.read_text())["env_kwargs"] == options
    assert str(options) in out.splitlines()[0]
    assert made() == {same := json.dumps(options, sort_keys=True)}
    written, score = config.read_bytes(), re.search(r"mean_reward .*", out)[0]

    code, out, err = main("--evaluate", run)
    assert code == 0 and score in out and made() == {same}, err
    code, _, err = main("--evaluate", run, "--env-kwargs", "option_0", "[7]", "more", "1")
    assert code == 0 and made() == {json.dumps(options | {"option_0": [7], "more": 1}, sort_keys=True)}, err
    code, _, err = main("--init-from", run, *SHORT, "--run-name", "next")
    assert code == 0 and made() == {same}, err

    for again in [], ["--env-kwargs", *pairs]:
        max(run.glob("checkpoint-*.pt")).unlink()
        (run / "results.json").unlink()
        code, out, err = main("--resume", run, *again)
        assert code == 0 and score in out and made() == {same} and config.read_bytes() == written, err
    code, out, err = main("--resume", run, "--env-kwargs", "option_0", 4)
    assert (code, out) == (2, "") and "--env-kwargs" in err and "'option_0': 4" in err and not given


def test_a_path_below_home_reaches_the_world_in_full_and_the_files_without_it(receiving, main):
    env_id, given = receiving
    path = f"{Path.home()}/level.json"
    flags = ["--env-kwargs", "file", path, "--run-name", "it"]
    assert main("--env-id", env_id, *SHORT, *flags)[0] == 0
    assert given and all(options == {"file": path} for options in given)
    assert json.loads(Path("runs/it/config.json").read_text())["env_kwargs"] == {"file": "~/level.json"}


@pytest.mark.parametrize("write", [lambda path: [path], lambda path: {"a": [path]}], ids=["list", "dict"])
def test_a_path_below_home_reaches_the_world_in_full_from_within_a_list_or_dict(write, receiving, main):
    env_id, given = receiving
    value = write(f"{Path.home()}/level.json")
    assert main("--env-id", env_id, *SHORT, "--env-kwargs", "files", json.dumps(value))[0] == 0
    assert given and all(options == {"files": value} for options in given)


def test_derived_sizes_are_no_flags(main):
    assert ppo.Args(num_envs=3, num_steps=4, num_minibatches=2, total_timesteps=100).batch_size == 12
    assert ppo.Args(num_envs=3, num_steps=4, num_minibatches=2, total_timesteps=100).num_iterations == 8
    assert "--batch-size" not in main("--help")[1]


# Bad input: exit code 2, one message, nothing written


COUNTS = ("num_envs", "num_minibatches", "update_epochs", "eval_episodes", "hidden_sizes", "num_steps")
NATURALS = ("seed", "validation_episodes", "checkpoint_every", "lstm_hidden_size")
RATES = ("learning_rate", "clip_coef", "max_grad_norm", "total_timesteps")
WEIGHTS = ("ent_coef", "vf_coef", "target_kl", "desired_kl")
FRACTIONS = ("gamma", "gae_lambda")


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name in COUNTS for value in ("0", "-4", "nan", "1.5")]
    + [(name, value) for name in NATURALS for value in ("-1", "nan")]
    + [(name, value) for name in RATES for value in ("0", "-0.1", "nan", "inf")]
    + [(name, value) for name in WEIGHTS for value in ("-0.1", "nan", "inf")]
    + [(name, value) for name in FRACTIONS for value in ("-0.01", "1.01", "nan")]
    + [("logstd_init", "nan"), ("logstd_init", "inf"), ("num_steps", "1"), ("frame_stack", "0")],
)  # fmt: skip
def test_a_number_out_of_range_is_named_with_its_flag(name, value, refused):
    message = refused(ppo.flag(name), value)
    assert ppo.flag(name) in message
    assert value in message
    if not (name in COUNTS + NATURALS and value in ("nan", "1.5")):  # these are no integers at all
        assert re.fullmatch(rf"error: {ppo.flag(name)} must be .+, got \(?{re.escape(value)}(\.0)?(,\))?", message)


def test_each_of_several_numbers_has_to_be_in_range(refused):
    assert refused("--hidden-sizes", 8, 65536, 0) == "error: --hidden-sizes must be 1 or more each, got (8, 65536, 0)"


def test_every_number_has_a_range():
    hints = get_type_hints(ppo.Args, include_extras=True)
    numbers = {name for name, hint in hints.items() if re.search(r"\b(int|float)\b", str(hint))} - {"env_kwargs"}
    assert {"seed", "gamma", "hidden_sizes", "target_kl", "checkpoint_every"} < numbers
    assert [name for name in numbers if not hasattr(hints[name], "__metadata__")] == []


@pytest.mark.parametrize("argv", [("--learning-rate", "fast"), ("--num-envs", "1.5"), ("--vectorization", "threads")])
def test_a_value_of_the_wrong_type_is_named_with_its_flag(argv, refused):
    message = refused(*argv)
    assert argv[0] in message and argv[1] in message


def test_an_unknown_flag_is_named(refused):
    assert "--learning-speed" in refused("--learning-speed", "3")


@pytest.mark.parametrize("values", [[], ["runs/any"], "="], ids=["alone", "with a value", "with ="])
@pytest.mark.parametrize("write", [ppo.flag, "--{}".format], ids=["dashes", "underscores"])
@pytest.mark.parametrize("name", ppo.OURS)
def test_a_flag_of_another_script_is_told_what_it_is_here(name, write, values, refused):
    typed = write(name)
    argv = [f"{typed}=runs/any"] if values == "=" else [typed, *values]
    assert refused(*argv) == f"error: there is no {argv[0]} here: {ppo.OURS[name]}"
    assert name not in {option.name for option in fields(ppo.Args)}


def test_what_other_flags_are_here_exists():
    flags = {word for words in ppo.OURS.values() for word in re.findall(r"--[\w-]+", words)}
    assert flags <= {ppo.flag(option.name) for option in fields(ppo.Args)}
    assert {"track", "cuda", "trained_agent"} < set(ppo.OURS)


@pytest.mark.parametrize("flags, words", [
    (["--num-minibatches", 9], "--num-minibatches 9 must divide a rollout's 120 rows, as 8 does"),
    (["--num-minibatches", 4, "--lstm-hidden-size", 8], "4 must divide a rollout's 6 environments, as 3 does"),
])  # fmt: skip
def test_minibatches_that_do_not_divide_what_they_share_are_told_a_number_that_does(flags, words, refused):
    assert words in refused("--num-envs", 6, "--num-steps", 20, "--total-timesteps", 1000, *flags)


def test_a_single_row_is_not_standardised(refused):
    message = refused("--num-envs", 2, "--num-steps", 16, "--num-minibatches", 32)
    assert "--norm-adv needs minibatches of at least 2 rows" in message
    for given in ({"num_minibatches": 32, "norm_adv": False}, {"num_minibatches": 16}):
        ppo.check_training(ppo.Args(num_envs=2, num_steps=16, **given))


def test_too_few_steps_are_told_how_many_it_takes(refused):
    message = refused("--total-timesteps", 255, "--num-envs", 8, "--num-steps", 32)
    assert "--total-timesteps must be at least 256" in message


def test_statistics_that_would_take_the_only_batch_are_refused(refused):
    message = refused("--total-timesteps", 300, "--num-envs", 8, "--num-steps", 32, "--norm-obs")
    assert "--total-timesteps must be at least 512" in message


def test_statistics_of_images_are_refused(refused):
    assert "--no-norm-obs" in refused("--env-id", "ALE/Pong-v5", "--norm-obs")


@pytest.mark.parametrize(
    "env_id, suggestion",
    [
        ("CartPol-v1", "Did you mean: `CartPole`?"),
        ("LunarLander-v2", "LunarLander-v3"),
        ("ALE/Pongg-v5", "Did you mean: `Pong`?"),
        ("not an id", "not an id"),
        ("ConnectPole", "Environment `ConnectPole` doesn't exist"),
    ],
)
@pytest.mark.parametrize("vectorization", ["auto", "sync"])
def test_an_unknown_environment_keeps_gymnasiums_suggestion(env_id, suggestion, vectorization, refused):
    message = refused("--env-id", env_id, "--vectorization", vectorization)
    assert env_id in message and suggestion in message


def test_an_unknown_module_is_named(refused):
    assert "no_such_module" in refused("--env-id", "no_such_module:MyEnv-v0")


@pytest.mark.parametrize("env_id", ["MyEnv-v0", "LunarLander-3"])
def test_what_ids_look_like_is_told(env_id, refused):
    message = refused("--env-id", env_id)
    assert all(example in message for example in (env_id, "LunarLander-v3", "ALE/Pong-v5", "my_module:MyEnv-v0"))


def test_an_unknown_env_kwarg_is_named(refused):
    assert "gravityy" in refused("--env-kwargs", "gravityy", "3")


@pytest.mark.parametrize(
    "missing, remedy, argv",
    [
        ("ale_py", "pip install ale_py", ["--env-id", "ALE/Pong-v5"]),
        ("minatar", "pip install minatar", ["--env-id", "MinAtar/Breakout-v1"]),
        ("mujoco", 'pip install "gymnasium[mujoco]"', ["--env-id", "HalfCheetah-v5"]),
        ("Box2D", 'pip install "gymnasium[box2d]"', ["--env-id", "LunarLander-v3"]),
    ],
)
def test_a_missing_extra_comes_with_its_pip_command(missing, remedy, argv, refused, monkeypatch):
    families = ("gymnasium.envs.mujoco", "gymnasium.envs.box2d")  # each imports its extra once, when it is imported
    importlib.import_module("gymnasium.envs.mujoco.half_cheetah_v5")
    importlib.import_module("gymnasium.envs.box2d.lunar_lander")
    for name in [name for name in sys.modules if name.startswith((*families, "minatar."))]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in gym.registry if name.startswith("MinAtar/")]:  # of another test
        monkeypatch.delitem(gym.registry, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert remedy in refused(*argv)


@pytest.mark.parametrize(
    "observes, acts, named",
    [
        (gym.spaces.Box(-1, 1, (2,)), gym.spaces.Dict(a=gym.spaces.Discrete(2)), "Dict('a': Discrete(2))"),
        (gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(0, 9, (2,), np.int64), "Box(0, 9, (2,), int64)"),
        (gym.spaces.Graph(gym.spaces.Discrete(3), None), gym.spaces.Discrete(2), "Graph(Discrete(3), None)"),
    ],
)
def test_an_unsupported_space_is_named(observes, acts, named, refused, monkeypatch):
    class Odd(gym.Env):
        observation_space, action_space = observes, acts

        def reset(self, *, seed=None, options=None):
            return observes.sample(), {}

    monkeypatch.setitem(gym.registry, "Odd-v0", gym.envs.registration.EnvSpec("Odd-v0", entry_point=Odd))
    message = refused("--env-id", "Odd-v0")
    if acts == gym.spaces.Discrete(2):
        what, supported = "observations", ("Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple")
    else:
        what, supported = "actions", ("Discrete", "MultiDiscrete", "MultiBinary", "Box of floats")
    assert f"{what} are {named}, not " in message
    assert all(kind in message.partition(named)[2] for kind in supported)


def test_cuda_where_there_is_none(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in refused("--device", "cuda")


def test_device_auto_falls_back_to_the_cpu(main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, _ = main(*SHORT, "--device", "auto")
    assert code == 0 and "device: cpu" in out


@pytest.mark.parametrize(
    "name", ["../outside", "../../outside", "a/b", "a\\b", "..", ".", ".hidden", "a\n", "/outside"]
)
def test_a_run_name_is_one_path_component(name, refused, tmp_path):
    assert "--run-name" in refused(f"--run-name={name}")
    assert not any((folder / "outside").exists() for folder in (tmp_path, tmp_path.parent, Path("/")))


@pytest.mark.parametrize(
    "env_id", ["../../outside", "/outside", "ALE/Pong-v5", "a\\b-v0", "my_module:MyEnv-v0", ".", ""]
)
def test_other_names_cannot_leave_runs(env_id):
    run = ppo.name_run(ppo.Args(env_id)).run
    assert run.parent == Path("runs") and re.fullmatch(r"[\w.=+-]+__ppo__1__\d+\.\d{3}|__ppo__1__\d+\.\d{3}", run.name)


def test_runs_that_cannot_be_written_is_named(main):
    Path("runs").write_text("a plain file")
    assert main(*SHORT, "--run-name", "mine") == (1, "", "error: Not a directory, in runs/mine\n")


def test_a_run_is_never_overwritten(main):
    assert main(*SHORT, "--run-name", "mine")[0] == 0
    before = {path: path.read_bytes() for path in Path("runs/mine").iterdir()}
    code, _, err = main(*SHORT, "--run-name", "mine", "--seed", "2")
    assert code == 2 and "runs/mine" in err
    assert {path: path.read_bytes() for path in Path("runs/mine").iterdir()} == before


# How a run is scored may change until it is


RESCORE = ["--eval-episodes", 3, "--no-deterministic"]


@pytest.fixture
def scored(main):
    """A finished run of two iterations, with a checkpoint after each."""
    code, _, err = main(*SHORT, "--run-name", "mine", "--checkpoint-every", 1)
    assert code == 0, err
    return Path("runs/mine")


def test_a_trained_run_without_results_may_be_scored_in_another_way(scored, main):
    (scored / "results.json").unlink()
    before = {path.name: path.read_bytes() for path in scored.iterdir()}
    code, out, err = main("--resume", scored, *RESCORE)
    assert code == 0, err
    assert "scoring: 3 sampled episodes\n" in out and " over 3 sampled episodes\n" in out
    results = json.loads((scored / "results.json").read_text())
    assert (results["n_evaluation_episodes"], results["deterministic"]) == (3, False)
    assert results["episodes"] == "3 sampled episodes" and len(results["episode_returns"]) == 3
    for name in "config.json", "model.safetensors", "checkpoint-00000002.pt":
        assert (scored / name).read_bytes() == before[name]


@pytest.mark.parametrize("flags", [["--gamma", 0.5], ["--validation-episodes", 7], ["--seed", 2], ["--num-envs", 4]])
def test_nothing_else_of_a_trained_run_may_change(flags, scored, main):
    (scored / "results.json").unlink()
    code, out, err = main("--resume", scored, *RESCORE, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1) and flags[0] in err and not (scored / "results.json").exists()
    assert "--eval-episodes" not in err and "--deterministic" not in err


@pytest.mark.parametrize("flags", [RESCORE[:2], RESCORE[2:]])
def test_an_unfinished_training_keeps_how_it_is_to_be_scored(flags, scored, main):
    (scored / "results.json").unlink()
    (scored / "checkpoint-00000002.pt").unlink()
    code, out, err = main("--resume", scored, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert flags[0].replace("--no-", "--") in err and not (scored / "checkpoint-00000002.pt").exists()


@pytest.mark.parametrize("flags", [RESCORE[:2], RESCORE[2:]])
def test_a_finished_run_keeps_its_score(flags, scored, main):
    before = (scored / "results.json").read_bytes()
    code, out, err = main("--resume", scored, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1), out + err
    assert flags[0].replace("--no-", "--") in err and (scored / "results.json").read_bytes() == before


@pytest.mark.parametrize("mode", ["--evaluate", "--init-from", "--resume"])
def test_a_folder_that_is_no_run_is_named(mode, refused):
    assert "runs/none" in refused(mode, "runs/none")


def test_modes_exclude_each_other(refused):
    message = refused("--evaluate", "runs/a", "--resume", "runs/b")
    assert "--evaluate and --resume" in message


# As a file


def test_importing_does_nothing_but_define(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ppo"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())


def test_help_works_as_a_command(tmp_path):
    done = command("--help", "--env-id", "LunarLander-v3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--learning-rate FLOAT" in done.stdout and "(default: LunarLander-v3)" in done.stdout
    assert not list(tmp_path.iterdir())


def test_bad_input_gives_no_traceback_as_a_command(tmp_path):
    done = command("--env-id", "CartPol-v1", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_the_inline_header_equals_the_requirements():
    header = re.match(r"# /// script\n(.*?)# ///\n", (ROOT / "ppo.py").read_text(), re.DOTALL)[1]
    dependencies = re.search(r"dependencies = (\[.*\])", header.replace("#", ""), re.DOTALL)[1]
    pinned = json.loads(re.sub(r",\s*\]", "]", dependencies))
    assert pinned == (ROOT / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[\w-]+(\[[\w,-]+\])?==[\d.]+", requirement) for requirement in pinned)
