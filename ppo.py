# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[box2d,classic-control]==1.4.0",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "tyro==1.0.17",
#     "huggingface_hub==2.4.0",
#     "safetensors==0.8.0",
#     "imageio-ffmpeg==0.8.1",
#     "tqdm==4.70.1",
# ]
# ///
"""Proximal Policy Optimization (PPO) in one file: train, watch, evaluate, resume, share.

    python ppo.py                                                # CartPole-v1, solved within seconds
    python ppo.py --env-id LunarLander-v3 --seed 2               # any Gymnasium id; your flags over its preset
    python ppo.py --evaluate runs/<run> --capture-video          # play it again and leave replay.mp4
    python ppo.py --resume runs/<run>                            # go on after a crash, bit for bit
    python ppo.py --env-id LunarLander-v3 --repo-id me/lander    # train, evaluate, record, push to the Hub
    torchrun --nproc-per-node 2 ppo.py --env-id LunarLander-v3   # one run, split over two processes

Symbols: T steps (--num-steps) in each of N environments (--num-envs) make a rollout of B = T*N rows, learned from in K
minibatches (--num-minibatches) of M = B/K; of several ranks, each has its share of N. Time comes first, then
environments, then features: `obs[t]` is what the agent sees before action t, `done[t]` says that action t ended its
episode. Equations are those of Schulman et al., "Proximal Policy Optimization Algorithms" (2017, arXiv:1707.06347),
"PPO" below, and of "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016,
arXiv:1506.02438), "GAE" below.

Where this departs from the paper, as most implementations do: advantages are standardised per minibatch; the value
loss is halved, and clipped too (--no-clip-vloss); gradients are clipped by global norm; observations and rewards may be
normalised (--norm-obs, --norm-reward). Where it departs from CleanRL, whose flags it keeps:
- A time limit is no failure: a truncated episode is bootstrapped from the value of its last observation.
- Gymnasium >= 1.0 spends one step on each reset; that row is no transition, and no loss or statistic ever sees it.
- The rollout runs the actor only. Log-probabilities and values follow in one batch: the same numbers, much faster.
- Normalisation belongs to the agent: it is saved with the weights, and frozen in evaluation.
- Logged losses are means over all minibatches of an iteration; evaluation is greedy, on fresh seeded environments.
- A minibatch is standardised with the population deviation, so that even a single row gives a number, not NaN.
- Environments cannot be saved, so every run makes them anew at each checkpoint, and cuts the episodes under way.
- With --norm-obs or --norm-reward, the first rollout only fills the statistics; learning starts with the second.
- Defaults are those of the environment's preset, where there is one. A video is taken once, at the end.
"""

import contextlib
import fnmatch
import hashlib
import importlib.util
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import huggingface_hub as hub
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import tyro
from huggingface_hub.dataclasses import type_validator
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.adam import adam
from tqdm import tqdm


class Stop(Exception):
    """The end of the program for a reason the user can act on: one line, an exit code, no traceback."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


# ---- The knobs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Train a PPO agent; or evaluate, resume or push one. Defaults are the environment's preset where there is one."""

    env_id: str = "CartPole-v1"  # Gymnasium id; `my_module:MyEnv-v0` imports your own module first
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # its options: `is_slippery False`
    total_timesteps: int = 500_000  # environment steps to train for, over all environments
    seed: int = 1  # of everything random: weights, environments, actions, minibatches
    num_envs: int = 4  # N, parallel environments
    num_steps: int = 128  # T, steps in each environment per rollout; 32 to 2048
    vectorization: Literal["auto", "sync", "async", "native", "envpool"] = "auto"  # auto: native if there is one

    learning_rate: float = 2.5e-4  # Adam's step size; 1e-4 to 3e-3
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    gamma: float = 0.99  # discount; 0.9 to 0.999
    gae_lambda: float = 0.95  # lambda of GAE, from bias (0) to variance (1); 0.8 to 0.99
    num_minibatches: int = 4  # minibatches per epoch; B / num_minibatches rows each
    update_epochs: int = 4  # passes over each rollout; 3 to 20
    clip_coef: float = 0.2  # epsilon of the clipped objective; 0.1 to 0.3
    norm_adv: bool = True  # standardise the advantages of each minibatch
    clip_vloss: bool = True  # clip the value loss with the same epsilon
    ent_coef: float = 0.01  # weight of the entropy bonus; 0 to 0.02
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # global norm that gradients are clipped to
    target_kl: float | None = None  # stop after an epoch whose mean KL divergence exceeds this; 0.01 to 0.05

    hidden_sizes: tuple[int, ...] = (64, 64)  # layers of actor and critic (images: of the heads on the Nature CNN)
    activation: Literal["tanh", "relu"] = "tanh"  # between those layers
    logstd_init: float = 0.0  # initial log standard deviation of continuous actions
    norm_obs: bool = False  # standardise observations by their running mean and variance
    norm_reward: bool = False  # divide rewards by the running deviation of the discounted return
    clip_reward: bool = False  # learn from the sign of the reward only, as usual for Atari
    episodic_life: bool = False  # a lost life ends the value horizon, as usual for Atari

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU for images and wide networks, else the CPU
    compile: bool = False  # compile the loss and its gradient; pays off in long runs
    checkpoint_every: int | None = None  # iterations; default a tenth of the run, or 5 full episodes if that is longer
    validation_episodes: int = 20  # greedy episodes at each checkpoint, to keep the best agent; 0 keeps the last
    eval_episodes: int = 100  # episodes of the final evaluation
    deterministic: bool = True  # evaluate the mode of the policy; --no-deterministic samples from it
    capture_video: bool = False  # leave replay.mp4, one episode; with --repo-id always
    track: bool = False  # mirror the logs to Weights & Biases
    wandb_project_name: str = "ppo"  # its project
    wandb_entity: str | None = None  # its team

    exp_name: str = "ppo"  # part of the run's name
    run_name: str | None = None  # folder under runs/; default {env_id}__{exp_name}__{seed}__{time}
    evaluate: str | None = None  # a run's folder, or a Hub repo (me/name or me/name@revision): play it, train nothing
    resume: str | None = None  # a run's folder: go on from its last checkpoint
    push: str | None = None  # a finished run's folder: push it to --repo-id, train nothing
    repo_id: str | None = None  # Hub repo to push to; log in with `hf auth login` or set HF_TOKEN
    private: bool = False  # make that repo private

    @property
    def batch_size(self) -> int:
        return self.num_steps * self.num_envs

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    @cached_property
    def run(self) -> Path:
        """The run's folder."""
        name = re.sub(r"[^\w.=+-]", "-", f"{self.env_id}__{self.exp_name}__{self.seed}__{int(time.time())}")
        return Path(self.resume or self.push or self.evaluate or f"runs/{self.run_name or name}")

    def __post_init__(self):
        for words, low, high, names in RANGES:
            for name in names.split():
                value = getattr(self, name)
                for x in value if isinstance(value, tuple) else (value,):
                    if x is not None and not low <= x <= high:  # NaN fails every comparison
                        raise ValueError(f"{flag(name)} must be {words}, got {x}")
        if self.run_name is not None and not re.fullmatch(r"\w[\w.=+-]*", self.run_name):
            raise ValueError(f"--run-name must be one plain folder name, got {self.run_name!r}")
        if not all(math.isfinite(x) for x in self.env_kwargs.values() if isinstance(x, float)):
            raise ValueError(f"--env-kwargs must be finite, got {self.env_kwargs}")
        if self.norm_reward and self.clip_reward:
            raise ValueError("--norm-reward and --clip-reward exclude each other: choose one")
        if self.batch_size % self.num_minibatches:
            divisors = (d for d in range(1, 2 * self.num_minibatches) if self.batch_size % d == 0)
            near = sorted(divisors, key=lambda d: abs(d - self.num_minibatches))[:4]
            raise ValueError(
                f"--num-minibatches {self.num_minibatches} does not divide the batch of {self.num_steps} steps x "
                f"{self.num_envs} envs = {self.batch_size} rows; near it: {', '.join(map(str, sorted(near)))}"
            )
        batches = 2 if self.norm_obs or self.norm_reward else 1
        if self.num_iterations < batches:
            why = " (--norm-obs and --norm-reward take the first for their statistics)" if batches == 2 else ""
            raise ValueError(
                f"--total-timesteps {self.total_timesteps} is less than {batches} x {self.num_steps} steps x "
                f"{self.num_envs} envs = {batches * self.batch_size}{why}: raise it, or lower --num-steps or --num-envs"
            )


TINY, HUGE = sys.float_info.min, sys.float_info.max
RANGES = (
    ("from 1 to 65536", 1, 2**16, "num_envs num_minibatches update_epochs hidden_sizes eval_episodes checkpoint_every"),
    ("a positive number", 1, 2**62, "total_timesteps"),
    ("from 2 (one step could be all resets) to 1048576", 2, 2**20, "num_steps"),
    ("from 0 to 65536", 0, 2**16, "validation_episodes"),
    ("from 0 to 4294967295", 0, 2**32 - 1, "seed"),  # one word of a SeedSequence
    ("above 0 and finite", TINY, HUGE, "learning_rate clip_coef max_grad_norm target_kl"),
    ("0 or more, and finite", 0, HUGE, "ent_coef vf_coef"),
    ("from 0 to 1", 0, 1, "gamma gae_lambda"),
    ("from -20 to 2", -20, 2, "logstd_init"),
)

# Where they come from: gammas and lambdas from RL Baselines3 Zoo (classic control, Box2D) or the usual 0.99 and 0.95
# (MuJoCo); from there one change at a time on seeds above 100, which are never reported. Most have more environments,
# larger minibatches and higher, annealed rates than others use. Values are clipped in units of reward, which can hold
# the critic back: some do without.
MUJOCO = dict(total_timesteps=1_000_000, num_envs=8, num_steps=256, num_minibatches=8, update_epochs=10,
              learning_rate=1e-3, ent_coef=0.0, norm_obs=True, norm_reward=True, logstd_init=-0.5)  # fmt: skip
CALM = MUJOCO | dict(num_envs=16, num_steps=128, gae_lambda=0.9, logstd_init=-1.5)  # less noise
UNTOUCHED = {"include_cfrc_ext_in_observation": False}  # 78 contact forces, all zero in the published versions

PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(  # the zoo's gamma and lambda
        total_timesteps=100_000, num_envs=64, num_steps=32, num_minibatches=8, update_epochs=5, learning_rate=2e-3,
        gamma=0.98, gae_lambda=0.8, clip_vloss=False,
    ),
    "Acrobot-v1": dict(  # the zoo's lambda and normalisation; many epochs, for its policy moves little in each
        total_timesteps=500_000, num_envs=16, num_steps=128, num_minibatches=8, update_epochs=10, learning_rate=2e-3,
        gae_lambda=0.94, ent_coef=0.0, clip_vloss=False, norm_obs=True, norm_reward=True,
    ),
    "MountainCar-v0": dict(  # the zoo's lambda and normalisation, without which its goal is never found
        total_timesteps=500_000, num_envs=32, num_steps=64, num_minibatches=4, update_epochs=4, learning_rate=2e-3,
        gae_lambda=0.98, ent_coef=0.0, norm_obs=True, norm_reward=True,
    ),
    "Pendulum-v1": dict(  # the zoo's epochs; shorter rollouts, and a longer horizon, for fewer swings
        total_timesteps=100_000, num_envs=4, num_steps=256, num_minibatches=16, update_epochs=10, learning_rate=1e-3,
        gamma=0.97, gae_lambda=0.9, ent_coef=0.0, activation="relu", norm_reward=True, clip_vloss=False,
    ),
    "LunarLander*-v3": dict(  # wide ReLU networks and a long horizon, so that it lands instead of hovering
        total_timesteps=1_000_000, num_envs=16, num_steps=256, num_minibatches=8, update_epochs=6,
        learning_rate=2e-3, gamma=0.998, gae_lambda=0.98, ent_coef=0.002, hidden_sizes=(128, 128),
        activation="relu", norm_reward=True, clip_vloss=False,
    ),
    "BipedalWalker-v3": MUJOCO | dict(  # the zoo's rate and number of environments; a shorter horizon: it hurries
        total_timesteps=5_000_000, num_envs=32, num_minibatches=16, learning_rate=3e-4,
    ),
    "Swimmer-v5": MUJOCO | dict(  # a long horizon and more noise, because a stroke pays off late
        num_steps=512, gamma=0.999, gae_lambda=0.98, norm_reward=False, clip_vloss=False, logstd_init=0.0,
    ),
    "Walker2d-v5": MUJOCO | dict(  # small steps, or it learns early to fall forwards, and no more
        num_envs=16, num_steps=128, learning_rate=3e-4,
    ),
    "Ant-v5": CALM | dict(learning_rate=5e-4, gae_lambda=0.95, env_kwargs=UNTOUCHED),
    "Humanoid*-v5": CALM | dict(  # small steps, for 17 joints move the policy far
        learning_rate=3e-4, gae_lambda=0.95, logstd_init=-1.0, env_kwargs=UNTOUCHED,
    ),
    "HalfCheetah-v5": CALM | dict(  # long rollouts: its episodes start all at once, and how to start is soon forgotten
        num_envs=4, num_steps=512,
    ),
    "Reacher-v5": CALM | dict(gamma=0.9, num_minibatches=32),  # a short horizon: each step pays for its own distance
    "Pusher-v5": CALM,
    "InvertedDoublePendulum-v5": MUJOCO | dict(validation_episodes=100),  # few would not show its rare falls
    "Hopper-v5": MUJOCO, "InvertedPendulum-v5": MUJOCO,
    "ALE/*": dict(  # the published protocol and CleanRL's settings: no sticky actions
        env_kwargs={"repeat_action_probability": 0.0}, total_timesteps=10_000_000, num_envs=8, clip_coef=0.1,
        clip_reward=True, episodic_life=True, hidden_sizes=(),
    ),
}  # fmt: skip

# What they reach: the mean score over seeds, and the seconds of training on one core, from runs/reference/summary.md.
REACHED: dict[str, tuple[float, int]] = {
    "CartPole-v1": (500.0, 3), "LunarLander-v3": (282.1, 95), "HalfCheetah-v5": (6070.0, 183),
    "Hopper-v5": (3274.0, 273), "Acrobot-v1": (-67.04, 115), "MountainCar-v0": (-108.7, 36),
    "Pendulum-v1": (-156.0, 23), "LunarLanderContinuous-v3": (280.7, 106), "BipedalWalker-v3": (307.4, 1330),
    "Walker2d-v5": (4108.0, 242), "Ant-v5": (3945.0, 336), "Swimmer-v5": (330.9, 272), "Humanoid-v5": (2926.0, 636),
    "InvertedPendulum-v5": (1000.0, 224), "InvertedDoublePendulum-v5": (9161.0, 148), "Reacher-v5": (-3.969, 235),
    "Pusher-v5": (-31.93, 166),
}  # fmt: skip

SCRIPT = "ppo.py"  # a fork's file puts its own name here: it is what printed commands start
MODES = ("evaluate", "resume", "push")  # flags that name a policy instead of training one
# What may change when a run is resumed or pushed:
FREE = (*MODES, "device", "track", "wandb_project_name", "wandb_entity", "repo_id", "private", "capture_video")


def preset(env_id: str) -> tuple[str | None, dict[str, Any]]:
    """The pattern of PRESETS that fits the environment, the exact one first, and its settings."""
    fits = env_id if env_id in PRESETS else next((p for p in PRESETS if fnmatch.fnmatchcase(env_id, p)), None)
    return fits, PRESETS[fits] if fits else {}


def usual_args(env_id: str) -> Args:
    """What the environment is trained with if no other flag is given."""
    return Args(env_id=env_id, **preset(env_id)[1])


def changes(args: Args) -> dict[str, Any]:
    """The settings that are not those of the environment's preset."""
    usual = asdict(usual_args(args.env_id))
    return {k: v for k, v in asdict(args).items() if v != usual[k] and k not in (*FREE, "run_name")}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over saved arguments (--evaluate, --resume, --push) or over the environment's preset (training)."""
    # First what decides where the defaults come from
    First: Any = make_dataclass("First", [(name, str | None, None) for name in ("env_id", *MODES)])
    first, _ = tyro.cli(First, args=argv, return_unknown_args=True, add_help=False)
    mode = {name: getattr(first, name) for name in MODES if getattr(first, name) is not None}
    if len(mode) > 1:
        raise Stop(f"{' and '.join(map(flag, mode))} exclude each other: choose one")
    if first.evaluate:
        saved, mode["evaluate"] = played_args(first.evaluate, first.env_id)  # a repo is now pinned to one commit
    elif mode:
        saved = load_args(Path(*mode.values()))
    else:
        saved = usual_args(first.env_id or Args.env_id)
    # Given a filled dict as a default, tyro would take its keys for flags: it gets an empty one, and we merge the two.
    args = tyro.cli(Args, args=argv, default=replace(saved, env_kwargs={}), prog=SCRIPT)
    args = replace(args, **mode, env_kwargs=saved.env_kwargs | args.env_kwargs)
    old, new = asdict(saved), asdict(args)
    changed = [f"{flag(k)} {old[k]} -> {new[k]}" for k in old if old[k] != new[k] and k not in FREE]
    if changed and mode and not first.evaluate:  # what is resumed or pushed must be the run that it was
        free = ", ".join(flag(k) for k in FREE if k not in MODES)
        raise Stop(f"the settings of a run are part of it, but this differs: {'; '.join(changed)}. May differ: {free}")
    return args


# ---- The world: Gymnasium's vector environments, all in NEXT_STEP mode -----------------------------------------------

TRAINING, VALIDATION, EVALUATION, VIDEO, WEIGHTS, SAMPLING = range(6)  # each has a stream of random numbers of its own


def seeds(seed: int, *stream: int, n: int = 1) -> list[int]:
    """n independent 31-bit seeds. Plain seed + i would make the second world of seed 1 the first of seed 2."""
    return [int(s) >> 1 for s in np.random.SeedSequence([seed, *stream]).generate_state(n)]


def is_image(space: gym.spaces.Box) -> bool:
    """Whether the Nature CNN can take it: three uint8 axes, two of them at least 36 pixels long."""
    return space.dtype == np.uint8 and len(space.shape) == 3 and sorted(space.shape)[1] >= 36


def is_supported(space: gym.Space) -> bool:
    """Whether observations from it become images or vectors of numbers."""
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        return all(map(is_supported, space.values() if isinstance(space, gym.spaces.Dict) else space))
    return isinstance(space, (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary))


def make_envs(args: Args, seeds: list[int], training: bool = True, render: bool = False):
    """One environment per seed, made anew and reset: (vector environment, observations [N, ...], info).

    Evaluation uses Gymnasium's own environment in this process, whatever trained the agent. Observations other than
    images come as vectors, discrete ones as one-hot. Raises Stop for what cannot be made or is not supported."""
    module, _, env_id = args.env_id.rpartition(":")
    atari, mode, kwargs = env_id.startswith("ALE/"), args.vectorization, dict[str, Any](args.env_kwargs)
    if render and not atari:  # ALE's vector environment does not render
        kwargs["render_mode"] = "rgb_array"
    try:
        if module or atari:
            gym.register_envs(importlib.import_module(module or "ale_py"))
        native = gym.spec(env_id).vector_entry_point  # raises if Gymnasium does not know this id
        if mode == "auto" or (not training and mode in ("async", "envpool")):
            mode = "native" if native else "sync"
        if mode == "envpool":
            kwargs |= {"env_type": "gymnasium", "num_envs": len(seeds), "seed": seeds}
            pool, name = importlib.import_module("envpool"), env_id.removeprefix("ALE/")
            if name not in pool.list_all_envs():
                raise Stop(f"EnvPool has no {name}: choose --vectorization sync or async")
            envs = pool.make(name, num_threads=min(len(seeds), local_cores()), **kwargs)
        elif mode == "native":
            kwargs |= {"reward_clipping": False} if atari else {}  # else the reported returns would be clipped, too
            envs = gym.make_vec(env_id, len(seeds), "vector_entry_point", **kwargs)
        else:
            envs = gym.make_vec(env_id, len(seeds), mode, {"copy": False}, **kwargs)
    except (ImportError, gym.error.Error, TypeError) as error:
        if isinstance(error, TypeError) and not args.env_kwargs:
            raise  # it is not about what the user gave
        given = f" with {args.env_kwargs}" if args.env_kwargs else ""
        missing = getattr(error, "name", None)  # an ImportError's
        hint = f"; try: pip install {missing.replace('_', '-')}" if missing and missing != module else ""
        if type(error) in (gym.error.NameNotFound, gym.error.Error):
            hint = "; ids are like LunarLander-v3, ALE/Pong-v5 or, for your own, my_module:MyEnv-v0"
        raise Stop(f"cannot make {args.env_id}{given}: {error}{hint}") from None

    if envs.metadata.get("autoreset_mode", gym.vector.AutoresetMode.NEXT_STEP) != gym.vector.AutoresetMode.NEXT_STEP:
        raise Stop(f"{args.env_id} does not reset in NEXT_STEP mode, as training needs: try --vectorization sync")
    space = envs.single_observation_space
    if not (isinstance(space, gym.spaces.Box) and (len(space.shape) == 1 or is_image(space))):
        if not is_supported(space) or mode == "envpool":
            supported = "Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple of these (EnvPool: vectors, images)"
            raise Stop(f"{args.env_id} observes {space}; supported: {supported}")
        envs = gym.wrappers.vector.FlattenObservation(envs)
    seed = {"native": seeds[0], "envpool": None}.get(mode, seeds)  # EnvPool has its seeds
    return envs, *ask(envs, "at its reset", envs.reset, seed=seed)


def step_envs(envs, actions: Tensor, t: int):
    """`envs.step`, with continuous actions clipped to their box (the agent keeps them unclipped) and faults named."""
    space = envs.single_action_space
    choice = actions.cpu().numpy() + getattr(space, "start", 0)  # of Discrete and MultiDiscrete
    if isinstance(space, gym.spaces.Box):
        choice = np.clip(choice, space.low, space.high)
    return ask(envs, f"at step {t}", envs.step, choice.astype(space.dtype, copy=False))


def ask(envs, when: str, method: Callable, *args, **kwargs):
    """The answer of `envs.reset` or `envs.step`; Stop, or a note on the error, names the environment at fault."""
    try:
        answer = method(*args, **kwargs)
    except Exception as error:
        envs = envs.unwrapped
        raisers = [i for i, pipe in enumerate(getattr(envs, "parent_pipes", ())) if pipe is None]  # AsyncVectorEnv's
        for i, worker in enumerate(() if raisers else getattr(envs, "processes", ())):
            worker.join(0.1)
            if worker.exitcode is not None:
                raise Stop(f"environment {i}: its process died {when}, exit code {worker.exitcode}", code=1) from None
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if isinstance(frame.f_locals.get("self"), gym.vector.SyncVectorEnv) and "i" in frame.f_locals:
                raisers = [frame.f_locals["i"]]
        error.add_note(f"Raised by environment {', '.join(map(str, raisers)) or '(unknown)'} {when}.")
        raise
    for name, values in zip(("observation", "reward"), answer[:-1]):  # a reset answers with no reward
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            i = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise Stop(f"environment {i} gave the {name} {values[i]} {when}; nothing was learned from it", code=1)
    return answer


def agent_config(args: Args, envs) -> dict[str, Any]:
    """The Agent's arguments for these environments; Stop names an action space that is not supported."""
    match act := envs.single_action_space:
        case gym.spaces.Box() if act.dtype.kind == "f":
            nvec = None
        case gym.spaces.Discrete():
            nvec = [int(act.n)]
        case gym.spaces.MultiDiscrete():
            nvec = act.nvec.flatten().tolist()
        case gym.spaces.MultiBinary():
            nvec = [2] * math.prod(act.shape)
        case _:
            raise Stop(f"{args.env_id} acts in {act}; supported: Discrete, MultiDiscrete, MultiBinary, Box of floats")
    return {"obs_shape": list(envs.single_observation_space.shape), "action_shape": list(act.shape), "nvec": nvec,
            "hidden_sizes": list(args.hidden_sizes), "activation": args.activation, "norm_obs": args.norm_obs,
            "logstd_init": args.logstd_init}  # fmt: skip


# ---- Building blocks: running statistics, layers, one vector of parameters -------------------------------------------


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far, over all ranks; in float64, with squares around the old mean."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.count, self.mean = (nn.Buffer(torch.zeros(shape, dtype=torch.float64)) for _ in range(2))
        self.var = nn.Buffer(torch.ones(shape, dtype=torch.float64))

    @property
    def std(self) -> Tensor:
        return (self.var + 1e-8).sqrt().float()

    def update(self, rows: Tensor) -> None:  # [n, *shape]
        d = rows.double() - self.mean
        n, first, second = rank_sum(torch.stack([torch.full_like(self.mean, len(d)), d.sum(0), d.square().sum(0)]))
        total = self.count + n
        shift = first / total
        self.var.copy_(((self.count * self.var + second) / total - shift**2).clamp(0))
        self.mean.add_(shift)
        self.count.copy_(total)


def layer_init(layer, gain: float = math.sqrt(2)):
    """Orthogonal weights, zero biases; a gain of sqrt(2) makes up for what ReLU takes from the variance."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: list[int], activation: str, gain: float) -> nn.Sequential:
    """Linear layers of these sizes with activations between them; `gain` is that of the last layer."""
    act = {"tanh": nn.Tanh, "relu": nn.ReLU}[activation]
    hidden = [m for a, b in zip(sizes, sizes[1:-1]) for m in (layer_init(nn.Linear(a, b)), act())]
    return nn.Sequential(*hidden, layer_init(nn.Linear(*sizes[-2:]), gain))


def flatten(agent: nn.Module) -> Tensor:
    """theta: one vector that all of the agent's parameters are slices of.

    Clipping, Adam and the sum over ranks then are a few operations on it, not a few dozen on its parts."""
    theta = parameters_to_vector(agent.parameters()).detach()
    vector_to_parameters(theta, agent.parameters())
    return theta


def adam_step(theta: Tensor, gradient: Tensor, moments: dict[str, Tensor], lr: float) -> None:
    """One step of Adam (Kingma & Ba 2015), in place. torch.optim.Adam would import torch's compiler first: seconds."""
    mean, square, step = moments.values()
    adam([theta], [gradient], [mean], [square], [], [step], fused=True, lr=lr, beta1=0.9, beta2=0.999, eps=1e-5,
         weight_decay=0.0, amsgrad=False, maximize=False)  # fmt: skip  # eps as in OpenAI's baselines


# ---- The agent -------------------------------------------------------------------------------------------------------


class Agent(nn.Module, hub.PyTorchModelHubMixin):
    """Policy and value function with all they need to act: weights and running statistics.

    Vectors go through separate actor and critic MLPs, images through one Nature CNN (Mnih et al. 2015) with two heads.
    `nvec` holds the number of choices of each discrete action component; None means a Box: a diagonal Gaussian with a
    log standard deviation that does not depend on the observation. All arguments are JSON: they become config.json."""

    def __init__(self, obs_shape: list[int], action_shape: list[int], nvec: list[int] | None, hidden_sizes: list[int],
                 activation: str = "tanh", norm_obs: bool = False, logstd_init: float = 0.0):  # fmt: skip
        super().__init__()
        self.obs_shape, self.action_shape, self.nvec, self.norm_obs = obs_shape, action_shape, nvec, norm_obs
        self.image = len(obs_shape) == 3
        features, self.outputs = 512 if self.image else obs_shape[0], sum(nvec) if nvec else math.prod(action_shape)
        if self.image:
            self.channels_last = obs_shape[-1] == min(obs_shape)
            channels, *size = obs_shape[-1:] + obs_shape[:-1] if self.channels_last else obs_shape
            pixels = math.prod((s // 4 - 1) // 2 - 3 for s in size)  # what kernels 8, 4, 3 at strides 4, 2, 1 leave
            convs = [nn.Conv2d(channels, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)]
            layers = [m for conv in convs for m in (layer_init(conv), nn.ReLU())] + [nn.Flatten()]
            self.trunk = nn.Sequential(*layers, layer_init(nn.Linear(64 * pixels, features)), nn.ReLU())
        self.actor = mlp([features, *hidden_sizes, self.outputs], activation, 0.01)  # 0.01: nearly uniform at the start
        self.critic = mlp([features, *hidden_sizes, 1], activation, 1.0)
        if nvec is None:
            self.logstd = nn.Parameter(torch.full((self.outputs,), logstd_init))
        self.obs_stats, self.return_stats = RunningMeanStd(() if self.image else tuple(obs_shape)), RunningMeanStd(())

    def encode(self, obs: Tensor) -> Tensor:  # [..., *obs_shape] -> [..., features]
        if self.image:
            x = obs.movedim(-1, -3) if self.channels_last else obs
            return self.trunk(x.reshape(-1, *x.shape[-3:]).float() / 255).view(*x.shape[:-3], -1)
        if self.norm_obs:
            return ((obs - self.obs_stats.mean) / self.obs_stats.std).float().clamp(-10, 10)
        return obs.float()

    def sample_noise(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """What makes `act` sample, [*shape, outputs]: Gumbel noise for logits, standard normal noise for means."""
        noise = torch.empty(*shape, self.outputs, device=self.obs_stats.mean.device)
        if self.nvec is None:
            return noise.normal_(generator=generator)
        return -noise.exponential_(generator=generator).log()

    def choose(self, out: Tensor, noise: Tensor | float) -> Tensor:  # [..., outputs] -> [..., *action_shape]
        if self.nvec is None:
            action = out + self.logstd.exp() * noise
        elif len(self.nvec) == 1:  # the argmax of logits + Gumbel noise is a sample from their softmax
            action = (out + noise).argmax(-1)
        else:
            action = torch.stack([logits.argmax(-1) for logits in (out + noise).split(self.nvec, -1)], -1)
        return action.view((*out.shape[:-1], *self.action_shape))

    def act(self, obs: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """The action that this noise selects, [..., *action_shape]; without noise the mode: the greedy action."""
        return self.choose(self.actor(self.encode(obs)), noise)

    def get_value(self, obs: Tensor) -> Tensor:  # [...]
        return self.critic(self.encode(obs)).squeeze(-1)

    def get_action_and_value(self, obs: Tensor, action: Tensor | None = None):
        """Action [..., *action_shape], sampled if not given; its log-probability, the entropy and the value, [...]."""
        features = self.encode(obs)
        out, value = self.actor(features), self.critic(features).squeeze(-1)
        if action is None:
            action = self.choose(out, self.sample_noise(*out.shape[:-1]))
        flat = action.reshape(*out.shape[:-1], -1)
        logprob, entropy = gaussian(out, self.logstd, flat) if self.nvec is None else categorical(out, self.nvec, flat)
        return action, logprob, entropy, value


# ---- The mathematics of PPO: tensors in, tensors out -----------------------------------------------------------------


def categorical(logits: Tensor, nvec: list[int], action: Tensor) -> tuple[Tensor, Tensor]:
    """Joint log-probability [...] of independent choices, action [..., len(nvec)], and their entropy [...]."""
    logps = [part.log_softmax(-1) for part in logits.split(nvec, -1)]
    logprob = sum(lp.gather(-1, a).squeeze(-1) for lp, a in zip(logps, action.split(1, -1)))
    return logprob, sum(-(lp.exp() * lp).sum(-1) for lp in logps)


def gaussian(mean: Tensor, logstd: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density [...] of a diagonal Gaussian at action [..., D], summed over dimensions, and its entropy [...]."""
    z = (action - mean) * (-logstd).exp()
    logprob = -(0.5 * z**2 + logstd + 0.5 * math.log(2 * math.pi)).sum(-1)
    return logprob, (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum().expand_as(logprob)


def accumulate(x: np.ndarray, done: np.ndarray, carry: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """Discounted sums of x within episodes, forward in time: x, done and the sums [T, N].

    `carry` [N] holds the sums of the episodes under way; it is updated in place and forgets those that ended."""
    sums = np.empty(x.shape)
    for t in range(len(x)):
        carry *= gamma
        carry += x[t]
        sums[t] = carry
        carry[done[t]] = 0
    return sums


def compute_gae(rewards: Tensor, values: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float):
    """Generalised advantage estimation, GAE Eq. 16: advantages [T, N] from values [T+1, N] and the rest [T, N].

    After a termination there is no value to come. After a truncation there is: values[t + 1] is that of the episode's
    true last observation, which NEXT_STEP resets leave in place. Advantages never flow back from the next episode."""
    advantages = rewards + gamma * values[1:] * ~terminated - values[:-1]  # so far delta_t, PPO Eq. 12
    decay = gamma * gae_lambda * (~done).to(values.dtype)
    for t in reversed(range(len(advantages) - 1)):  # PPO Eq. 11: A_t = delta_t + gamma lambda A_{t+1}
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages


def minibatches(valid: Tensor, epochs: int, K: int, generator: torch.Generator) -> Tensor:
    """Row numbers of K minibatches per epoch, [epochs, K, M], from the valid rows of [T, N] in a new order each epoch.

    Resets leave fewer than B rows; each order is repeated to fill the batch, so that every minibatch has M."""
    rows, B = valid.flatten().nonzero().squeeze(-1), valid.numel()
    orders = [rows[torch.randperm(len(rows), generator=generator, device=rows.device)] for _ in range(epochs)]
    return torch.stack([order.repeat(-(-B // len(rows)))[:B] for order in orders]).view(epochs, K, B // K)


def standardize(x: Tensor, weight: float = 1.0) -> Tensor:
    """Zero mean and unit variance along the last axis, over all ranks, each counting with its weight."""
    mean, square = rank_sum(weight * torch.stack([x.double().mean(-1), x.double().square().mean(-1)])).unsqueeze(-1)
    return ((x - mean) / ((square - mean**2).clamp(0).sqrt() + 1e-8)).float()


def policy_loss(logratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """The clipped surrogate objective, PPO Eq. 7, negated; logratio = log pi(a|s) - log pi_old(a|s)."""
    ratio = logratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def value_loss(new_values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the mean squared error; with clip_coef the larger of it and that of a value moved by at most clip_coef."""
    error = (new_values - returns) ** 2
    if clip_coef is not None:
        clipped = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error.mean()


METRICS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")


def ppo_loss(agent: Agent, obs, actions, logprobs, values, returns, advantages, args: Args) -> tuple[Tensor, Tensor]:
    """The whole objective of a minibatch, PPO Eq. 9, negated; and its METRICS, for the logs."""
    _, new_logprobs, entropy, new_values = agent.get_action_and_value(obs, actions)
    logratio = new_logprobs - logprobs
    pg_loss = policy_loss(logratio, advantages, args.clip_coef)
    v_loss = value_loss(new_values, values, returns, args.clip_coef if args.clip_vloss else None)
    entropy = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    with torch.no_grad():  # KL(old || new) as k1 and, with less noise, as k3 of joschu.net/blog/kl-approx.html
        ratio = logratio.exp()
        kl, clipfrac = (ratio - 1 - logratio).mean(), ((ratio - 1).abs() > args.clip_coef).float().mean()
        return loss, torch.stack([pg_loss, v_loss, entropy, -logratio.mean(), kl, clipfrac])


def compute_gradient(agent: Agent, minibatch: list[Tensor], args: Args) -> Tensor:
    """The gradient of the loss with respect to theta and, behind it, the METRICS: one message for the ranks."""
    loss, metrics = ppo_loss(agent, *minibatch, args)
    gradients = torch.autograd.grad(loss, list(agent.parameters()))
    return torch.cat([x.flatten() for x in (*gradients, metrics)])


# ---- The loop: collect, estimate, optimise, report -------------------------------------------------------------------


def train(args: Args) -> Path:
    """PPO, Algorithm 1, from the start or from a checkpoint. Returns the run's folder, with the trained agent in it."""
    rank, world = join_ranks(args)
    envs, _, info = make_envs(args, seeds(args.seed, TRAINING))  # one environment, to look at its spaces
    if args.episodic_life and "lives" not in info:
        raise Stop(f"--episodic-life needs info['lives'], which {args.env_id} does not give")
    config = agent_config(args, envs)
    if args.norm_obs and len(config["obs_shape"]) == 3:
        raise Stop("--norm-obs is for vectors; images are scaled to [0, 1] anyway: leave it out")
    device = choose_device(args, config)
    T, N, K = args.num_steps, args.num_envs // world, args.num_minibatches
    torch.manual_seed(seeds(args.seed, WEIGHTS)[0])  # the same weights on every rank
    agent = Agent(**config).to(device)
    theta = flatten(agent)
    moments = {"mean": torch.zeros_like(theta), "square": torch.zeros_like(theta), "step": torch.zeros_like(theta[0])}
    generator = torch.Generator(device).manual_seed(seeds(args.seed, SAMPLING, rank)[0])
    obs = torch.zeros(T + 1, N, *agent.obs_shape, dtype=torch.uint8 if agent.image else None, device=device)
    actions = torch.zeros(T, N, *agent.action_shape, dtype=torch.int64 if agent.nvec else None, device=device)
    rewards, lives, (terminated, truncated) = np.zeros((T, N)), np.zeros((T + 1, N)), np.zeros((2, T, N), dtype=bool)
    gradient_fn = compile_gradient(args, agent, obs, actions) if args.compile else compute_gradient
    run, state = open_run(args, agent, moments, generator)  # state: iteration, global_step, seconds, best
    writer, bar, recent = open_log(args, run, state) if rank == 0 else (None, None, None)
    limit = gym.spec(args.env_id.rpartition(":")[2]).max_episode_steps or 0  # checkpoints cut episodes: not too often
    every = args.checkpoint_every or max(args.num_iterations // 10, math.ceil(5 * limit / T), 1)

    for iteration in range(state["iteration"], args.num_iterations + 1):  # the last one only saves
        if iteration % every == 0 or iteration == args.num_iterations:
            # Environments cannot be saved, but they can be made anew. So every run does that at every checkpoint, and
            # a resumed run follows the very path of one that was never interrupted. The cut counts as a truncation.
            state["iteration"] = iteration
            save_checkpoint(args, run, state, agent, moments, generator, writer)
            envs.close()
            if iteration == args.num_iterations:
                break
            envs, first_obs, info = make_envs(args, seeds(args.seed, TRAINING, rank, iteration, n=N))
            obs[T], lives[T] = torch.as_tensor(first_obs), info["lives"] if args.episodic_life else 0
            ended, (returned, length, discounted) = np.zeros(N, dtype=bool), np.zeros((3, N))
        started = time.perf_counter()
        lr = args.learning_rate * (1 - iteration / args.num_iterations if args.anneal_lr else 1)

        # Collect. The policy stands still meanwhile, so only the actor is needed, and its noise can be drawn ahead.
        obs[0], lives[0] = obs[T], lives[T]
        noise = agent.sample_noise(T, N, generator=generator)
        with torch.inference_mode():
            for t, eps in enumerate(noise):
                actions[t] = action = agent.act(obs[t], eps)
                next_obs, rewards[t], terminated[t], truncated[t], info = step_envs(envs, action, iteration * T + t)
                obs[t + 1] = to_torch(next_obs, device)
                lives[t + 1] = info["lives"] if args.episodic_life else 0
        done = terminated | truncated
        valid = ~np.vstack([ended, done[:-1]])  # [T, N]; the row after an episode's last is its reset: no transition
        ended = done[-1]

        # Estimate advantages and value targets
        lost_life = (lives[1:] < lives[:-1]) & valid
        no_future, cut = (to_torch(end | lost_life, device) for end in (terminated, done))  # a lost life counts as both
        logprobs, values = logprobs_and_values(agent, obs, actions)  # [T, N], [T+1, N]
        scaled = np.sign(rewards) if args.clip_reward else rewards  # reported returns are sums of the untouched ones
        if args.norm_reward:
            scaled = (rewards / agent.return_stats.std.item()).clip(-10, 10)
        learned = to_torch(scaled.astype(np.float32), device)
        advantages = compute_gae(learned, values, no_future, cut, args.gamma, args.gae_lambda)  # [T, N]
        returns = advantages + values[:T]  # [T, N], what the critic learns
        batch = [x.flatten(0, 1) for x in (obs[:T], actions, logprobs, values[:T], returns)]  # as ppo_loss takes them
        rows = minibatches(to_torch(valid, device), args.update_epochs, K, generator)  # [epochs, K, M]
        transitions = int(rank_sum(torch.tensor(valid.sum(), device=device)))
        weight = valid.sum() / transitions  # this rank's share
        batch_advantages = advantages.flatten()[rows]  # [epochs, K, M]
        if args.norm_adv:
            batch_advantages = standardize(batch_advantages, weight)  # all of them at once: one message for the ranks

        # Optimise policy and value function together
        history, priming = [], iteration == 0 and (args.norm_obs or args.norm_reward)
        for epoch in range(0 if priming else args.update_epochs):  # the first rollout only fills the statistics
            for index, advantage in zip(rows[epoch], batch_advantages[epoch]):  # [M] each
                message = gradient_fn(agent, [*(x[index] for x in batch), advantage], args)
                gradient, metrics = rank_sum(weight * message).tensor_split([len(theta)])  # means over all ranks
                history.append(metrics.clone())  # a view would keep the whole message
                norm = gradient.norm()
                if not (norm + metrics.sum()).isfinite():
                    raise Stop(f"loss or gradient not finite in iteration {iteration}: lower --learning-rate", code=1)
                gradient *= (args.max_grad_norm / (norm + 1e-6)).clamp(max=1)
                adam_step(theta, gradient, moments, lr)
            if args.target_kl is not None:
                kl = torch.stack(history[-K:])[:, METRICS.index("approx_kl")].mean()
                if kl > args.target_kl:
                    break
        if args.norm_reward:
            agent.return_stats.update(to_torch(accumulate(rewards, done, discounted, args.gamma)[valid], device))
        if args.norm_obs:
            agent.obs_stats.update(obs[:T][to_torch(valid, device)])
        state["global_step"] += transitions
        state["seconds"] += time.perf_counter() - started

        # Report
        if rank == 0:
            scalars = {"charts/learning_rate": lr, "charts/SPS": int(state["global_step"] / state["seconds"])}
            scalars["losses/explained_variance"] = explained_variance(*(x[rows[0].flatten()] for x in batch[3:]))
            if history:
                means = torch.stack(history).mean(0).tolist()
                scalars |= {f"losses/{name}": mean for name, mean in zip(METRICS, means)}
            steps = state["global_step"] - transitions + valid.sum(1).cumsum() / weight  # [T], of each row
            sums, lengths = accumulate(rewards, done, returned), accumulate(valid, done, length)
            episodes = [(steps[t], sums[t, i], lengths[t, i]) for t, i in np.argwhere(done)]
            report(args, iteration, state["global_step"], writer, bar, recent, episodes, scalars)
    if rank == 0:
        writer.close()
        bar.close()
        published = Agent(**config)  # a new one: safetensors does not take slices of theta
        published.load_state_dict(state["best"]["agent"])
        published.save_pretrained(run)
    return run


@torch.no_grad()  # not inference_mode: autograd will meet these numbers in the loss
def logprobs_and_values(agent: Agent, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T, N] of the actions taken and values [T+1, N], a few thousand rows at a time."""
    T, N = actions.shape[:2]
    chunks = zip(obs[:T].flatten(0, 1).split(4096), actions.flatten(0, 1).split(4096))
    _, logprobs, _, values = zip(*(agent.get_action_and_value(*chunk) for chunk in chunks))
    return torch.cat(logprobs).view(T, N), torch.cat([*values, agent.get_value(obs[T])]).view(T + 1, N)


# ---- Devices and ranks -----------------------------------------------------------------------------------------------


def local_cores() -> int:
    """Processor cores for each process on this machine."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def choose_device(args: Args, config: dict[str, Any]) -> torch.device:
    """Where to compute, and on how many threads: on a small MLP, a GPU or a second thread costs more than it gives."""
    large = len(config["obs_shape"]) == 3 or max(args.hidden_sizes, default=0) >= 1024
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Stop("--device cuda, but torch finds no GPU here: use --device auto or cpu")
    torch.set_num_threads(local_cores() if large else 1)
    if args.device == "cuda" or (args.device == "auto" and large and torch.cuda.is_available()):
        torch.backends.cudnn.deterministic = True  # the same seed gives the same weights
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def to_torch(x: np.ndarray, device: torch.device) -> Tensor:
    """From NumPy to the device; out of pinned memory, so that the CPU need not wait for a GPU."""
    tensor = torch.as_tensor(x)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun set them, or (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(args: Args) -> tuple[int, int]:
    """Open the connection between the ranks, where there are several; (rank, world size)."""
    rank, world = ranks()
    if args.num_envs % world or args.batch_size // world % args.num_minibatches:
        raise Stop(f"--num-envs {args.num_envs}, and the rows of a minibatch, must be multiples of {world} ranks")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return rank, world


def rank_sum(x: Tensor) -> Tensor:
    """The sum of x over all ranks, in place, the same on each of them."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def compile_gradient(args: Args, agent: Agent, obs: Tensor, actions: Tensor) -> Callable:
    """compute_gradient as a single graph, without autograd at run time; compiled here, for minibatches of this size."""
    if obs.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise Stop("--compile needs a C++ compiler, and g++ is not on the PATH: install it, or leave --compile out")
    torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad would break the graph
    mode = "reduce-overhead" if obs.is_cuda else "default"  # on a GPU: replay it as a CUDA graph; it holds no RNG
    compiled = torch.compile(compute_gradient, fullgraph=True, dynamic=False, mode=mode)
    M, started = math.prod(actions.shape[:2]) // args.num_minibatches, time.perf_counter()
    rows = [x.flatten(0, 1)[:M] for x in (obs, actions)]
    compiled(agent, [*rows, *torch.zeros(4, M, device=obs.device)], args)
    if ranks()[0] == 0:
        print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)
    return compiled


# ---- The run's folder: settings, checkpoints, logs -------------------------------------------------------------------

VERSION = 1  # of the checkpoints' format


def write_file(path: Path, data: bytes) -> None:
    """All or nothing, even if the power fails: write and sync a temporary file, rename it, sync the folder."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Stop(f"cannot write {path}: {error.strerror}; what was there before is intact", code=1) from None


def write_json(path: Path, data: dict) -> None:
    write_file(path, (json.dumps(data, indent=2) + "\n").encode())


def load_args(folder: Path, source: str | None = None) -> Args:
    """The arguments in a run's hyperparameters.json; each name, type and range is checked."""
    path, types = folder / "hyperparameters.json", {f.name: f.type for f in fields(Args) if f.name not in MODES}
    try:
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
        for name, value in data.items():
            if name not in types:
                raise ValueError(f"{name:.80} is not one of ppo.py's settings")
            type_validator(name, value, types[name] | int if types[name] is float else types[name])
        return Args(**data)
    except OSError as error:
        raise Stop(f"cannot read {path}: {error.strerror}; is {folder} a run's folder?") from None
    except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
        raise Stop(f"refused hyperparameters.json of {source or folder}: {str(error):.200}") from None


def open_run(args: Args, agent: Agent, moments: dict, generator: torch.Generator) -> tuple[Path, dict[str, Any]]:
    """The run's folder and the state to start from: a new one, or with --resume the checkpoint's, put in place."""
    run, device = args.run, generator.device.type
    rank, world = ranks()
    here = {"python": platform.python_version(), "torch": str(torch.__version__), "gymnasium": gym.__version__,
            "numpy": np.__version__, "device": device, "threads": torch.get_num_threads(), "ranks": world}  # fmt: skip
    simulators = {"Box2D", "mujoco", "ale_py", "envpool"} & sys.modules.keys()
    here |= {name: sys.modules[name].__version__ for name in sorted(simulators)}
    state: dict[str, Any] = {"iteration": 0, "global_step": 0, "seconds": 0.0, "last_score": -math.inf,
                             "best": {"score": -math.inf}}  # fmt: skip
    if rank == 0 and args.resume:
        state = load_checkpoint(run)
    elif rank == 0:
        if list(run.glob("checkpoint-*.pt")) or (run / "results.json").exists():
            raise Stop(f"{run} exists: choose another --run-name or, if it is not finished, --resume {run}")
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Stop(f"cannot create {run}: {error.strerror}") from None
        write_json(run / "hyperparameters.json", {k: v for k, v in asdict(args).items() if k not in MODES})
    if dist.is_initialized():
        dist.broadcast_object_list(shared := [state])
        state = shared[0]
    if "agent" in state:
        try:
            agent.load_state_dict(state["agent"])
        except RuntimeError:
            raise Stop(f"{run} holds another network: resume it with the script that trained it") from None
        for name, value in state["moments"].items():
            moments[name].copy_(value)
        if rank < len(state["generators"]) and state["settings"]["device"] == device:
            generator.set_state(state["generators"][rank])
        else:  # more ranks, or another kind of generator, than before: a stream of its own
            generator.manual_seed(seeds(args.seed, SAMPLING, rank, state["iteration"])[0])
    if rank == 0:
        usual = args.env_id in REACHED and changes(args).keys() <= {"seed", "exp_name", "eval_episodes"}
        reached = " (scores {:g} in {} s)".format(*REACHED[args.env_id]) if usual else ""
        print(f"run: {run}   preset: {preset(args.env_id)[0] or 'none'}{reached}   device: {device}", flush=True)
        then = state.get("settings", here)
        if changed := ", ".join(f"{k} {then.get(k)} -> {here[k]}" for k in here if here[k] != then.get(k)):
            print(f"warning: this will not be bit for bit the run that was interrupted: {changed}", file=sys.stderr)
    return run, state | {"settings": here}


def save_checkpoint(args: Args, run: Path, state: dict, agent: Agent, moments: dict, generator, writer) -> None:
    """Validate, remember the best agent so far in `state`, and write all that the run needs to go on from here."""
    (rank, world), generators = ranks(), [generator.get_state()]
    if dist.is_initialized():
        dist.all_gather_object(generators := [None] * world, generator.get_state())
    if rank > 0:
        return
    weights = {name: value.cpu().clone() for name, value in agent.state_dict().items()}
    if args.validation_episodes and state["iteration"]:
        state["last_score"] = float(evaluate(agent, args, args.validation_episodes, VALIDATION)[0].mean())
    if state["last_score"] >= state["best"]["score"]:  # a tie goes to the newer
        state["best"] = {"score": state["last_score"], "iteration": state["iteration"], "agent": weights}
    writer.flush()  # a resumed run purges what was logged after its checkpoint and relies on what was logged before
    saved = {"version": VERSION, "agent": weights, "moments": moments, "generators": generators}
    torch.save(state | saved, buffer := io.BytesIO())
    data = buffer.getvalue()
    write_file(run / f"checkpoint-{state['iteration']:08d}.pt", data + hashlib.sha256(data).digest())
    for old in sorted(run.glob("checkpoint-*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(run: Path) -> dict[str, Any]:
    """The newest undamaged checkpoint of a run. It is data only: with weights_only, torch.load runs no code."""
    for path in sorted(run.glob("checkpoint-*.pt"), reverse=True):
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[:-32]).digest() != data[-32:]:
                raise ValueError("its checksum is wrong")
            state = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has many ways to refuse bytes
            reason = str(error).partition("\n")[0]
            print(f"warning: {path} is unusable ({reason}); trying the one before it", file=sys.stderr)
            continue
        if state["version"] > VERSION:
            raise Stop(f"{path} was written by a newer ppo.py (format {state['version']}): resume it with that one")
        return state
    raise Stop(f"{run} has no usable checkpoint: start the run again")


def open_log(args: Args, run: Path, state: dict):
    """TensorBoard writer, progress bar, and the returns of the last 100 episodes."""
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run.name, "id": run.name}
        kept = {"dir": run.parent, "resume": "allow", "config": asdict(args), "save_code": True}
        with one_line("Weights & Biases", "Log in with `wandb login`, set WANDB_MODE=offline, or leave out --track"):
            wandb.init(**names, **kept, sync_tensorboard=True)
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    resumed = "agent" in state
    writer = SummaryWriter(run, purge_step=state["global_step"] + 1 if resumed else None, flush_secs=10)
    if not resumed:
        values = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in asdict(args).items()}
        for summary in hparams(values, {"charts/episodic_return": 0}):
            writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        rows = "\n".join(f"|{name}|{value}|" for name, value in values.items())
        writer.add_text("hyperparameters", f"|parameter|value|\n|-|-|\n{rows}")
    bar = tqdm(total=args.total_timesteps, initial=state["global_step"], unit=" steps", unit_scale=True, disable=None)
    return writer, bar, deque(maxlen=100)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var[returns - values] / Var[returns]: 1 for a perfect critic, 0 for one no better than a constant."""
    return (1 - (returns - values).var() / returns.var()).item()


def report(args: Args, iteration: int, global_step: int, writer, bar, recent, episodes, scalars) -> None:
    """One iteration: its episodes at the steps they ended, [(step, return, length)], the rest at its last step."""
    for step, episodic_return, length in episodes:
        writer.add_scalar("charts/episodic_return", episodic_return, step)
        writer.add_scalar("charts/episodic_length", length, step)
        recent.append(episodic_return)
    for name, value in scalars.items():
        writer.add_scalar(name, value, global_step)
    mean = f"{np.mean(recent):.1f}" if recent else "none yet"
    bar.set_postfix_str(f"return {mean}", refresh=False)
    bar.update(global_step - bar.n)
    if bar.disable and iteration * 10 // args.num_iterations < (iteration + 1) * 10 // args.num_iterations:
        print(f"step {global_step:>11,}   return {mean:>9}   {scalars['charts/SPS']:>7,} steps/s", flush=True)


# ---- Evaluation ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(agent: Agent, args: Args, episodes: int, stream: int = EVALUATION, deterministic: bool = True):
    """Returns and lengths, [episodes] each: the first episode of each of that many fresh environments.

    Their seeds follow from args.seed and the stream; nothing that training draws from is touched. No episode goes on
    for more than 27,000 steps, Atari's limit."""
    device = next(agent.parameters()).device
    generator = torch.Generator(device).manual_seed(seeds(args.seed, stream, SAMPLING)[0])
    envs, obs, _ = make_envs(args, seeds(args.seed, stream, n=episodes), training=False)
    (returns, lengths), running = np.zeros((2, episodes)), np.ones(episodes, dtype=bool)
    while running.any() and lengths.max() < 27_000:
        noise = 0.0 if deterministic else agent.sample_noise(episodes, generator=generator)
        actions = agent.act(to_torch(obs, device), noise)
        obs, rewards, terminated, truncated, _ = step_envs(envs, actions, int(lengths.max()))
        returns += rewards * running
        lengths += running
        running &= ~(terminated | truncated)
    envs.close()
    return returns, lengths


@torch.inference_mode()
def record_video(agent: Agent, args: Args, path: Path) -> None:
    """One greedy episode, or its first 3,000 steps, as H.264, which browsers play. Its failure costs no run."""
    unfinished = path.with_name("unfinished.mp4")
    try:
        import imageio_ffmpeg

        os.environ["SDL_VIDEODRIVER"] = "dummy"  # pygame draws without a display; so does MuJoCo, through EGL
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        envs, obs, _ = make_envs(args, seeds(args.seed, VIDEO), training=False, render=True)
        fps, done, video = envs.metadata.get("render_fps", 15), False, None
        for t in range(3000):
            if args.env_id.startswith("ALE/"):  # does not render: the newest of its stacked frames, four times as large
                frame = np.kron(obs[0, -1], np.ones((4, 4), np.uint8))[..., None].repeat(3, 2)
            else:
                frame = envs.render()[0]
            if video is None:
                video = imageio_ffmpeg.write_frames(str(unfinished), frame.shape[1::-1], fps=fps, macro_block_size=2,
                                                    output_params=["-movflags", "+faststart"])  # fmt: skip
                video.send(None)
            video.send(np.ascontiguousarray(frame))
            if done:
                break
            actions = agent.act(to_torch(obs, next(agent.parameters()).device))
            obs, _, terminated, truncated, _ = step_envs(envs, actions, t)
            done = bool(terminated[0] or truncated[0])
        video.close()
        envs.close()
        os.replace(unfinished, path)
        print(f"video: {path}", flush=True)
    except Exception as error:
        unfinished.unlink(missing_ok=True)
        print(f"warning: no video: {type(error).__name__}: {str(error).partition(chr(10))[0]:.200}", file=sys.stderr)


def play(args: Args, folder: Path, agent: Agent) -> dict[str, Any]:
    """Evaluate, print the score and, if asked for, leave a video. The start of results.json."""
    returns, lengths = evaluate(agent, args, args.eval_episodes, EVALUATION, args.deterministic)
    mean, std = float(returns.mean()), float(returns.std())
    how = "greedy" if args.deterministic else "sampled"
    print(f"{args.env_id}: mean_reward {mean:.2f} +/- {std:.2f} over {len(returns)} {how} episodes", flush=True)
    if args.capture_video or args.repo_id:
        record_video(agent, args, folder / "replay.mp4")
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    return {"env_id": args.env_id, "mean_reward": mean, "std_reward": std, "n_evaluation_episodes": len(returns),
            "eval_datetime": now, "deterministic": args.deterministic, "seed": args.seed,
            "episode_returns": returns.tolist(), "episode_lengths": lengths.tolist()}  # fmt: skip


def finish(args: Args, run: Path) -> None:
    """After training: evaluate what was saved, and leave results, card and all else that a push needs."""
    if args.track:
        importlib.import_module("wandb").finish()
    agent, state = load_agent(run, args), load_checkpoint(run)
    print(f"evaluating: {args.eval_episodes} greedy and as many sampled episodes", flush=True)
    results = play(args, run, agent)
    other, _ = evaluate(agent, args, args.eval_episodes, EVALUATION, not args.deterministic)
    best, last = state["best"], state["last_score"]
    which = "last" if best["iteration"] == state["iteration"] else f"best (iteration {best['iteration']})"
    validation = {"best": best["score"], "last": last} if args.validation_episodes else None
    if validation:
        print(f"published: the {which} checkpoint; validation scores: best {best['score']:.2f}, last {last:.2f}")
    results |= {"other_mean_reward": float(other.mean()), "other_std_reward": float(other.std()),
                "published": which, "validation": validation, "total_timesteps": args.total_timesteps,
                "global_step": state["global_step"], "training_seconds": state["seconds"],
                "settings": state["settings"] | {"machine": platform.machine(), "cores": os.cpu_count()}}  # fmt: skip
    for file in {"ppo.py", SCRIPT, "requirements.txt"}:
        if (source := Path(__file__).with_name(file)).exists():
            write_file(run / file, source.read_bytes())
    for path in run.glob("events.out.tfevents.*"):  # TensorBoard names the host in them; the time, to sort by, stays
        words = path.name.split(".")  # events, out, tfevents, time, host (with dots, or none), process, number
        path.rename(path.with_name(".".join(words[:4] + words[-2:])))
    write_file(run / "README.md", model_card(args, run, args.repo_id or f"runs/{run.name}", results).encode())
    write_json(run / "results.json", results)  # last: it says that the run is finished


# ---- Sharing: what is pushed is what was saved, loaded again and evaluated; what is downloaded is not trusted --------

SIZE_LIMITS = {"hyperparameters.json": 2**16, "config.json": 2**16, "model.safetensors": 2**28}  # bytes
PUBLISHED = [*SIZE_LIMITS, "README.md", "results.json", "replay.mp4", "*.py", "requirements.txt", "*tfevents*"]
LOGIN = """If the Hub can be reached, log in with `hf auth login` or set HF_TOKEN to a token that may write; or train \
without --repo-id now, and push later with --push."""
PLAYED = ("env_id", "env_kwargs", "seed", "vectorization", "hidden_sizes", "activation", "norm_obs", "logstd_init")
SAFE_KWARGS = {"is_slippery", "continuous", "repeat_action_probability", *UNTOUCHED}  # that strangers may pass on


@contextlib.contextmanager
def one_line(what: str, remedy: str, code: int = 2):
    """Turn whatever a client of a service raises, a dozen unrelated types, into one line that says what to do."""
    try:
        yield
    except Stop:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".").replace(str(Path.home()), "~")
        raise Stop(f"{what} failed: {type(error).__name__}: {reason}. {remedy}", code) from None


def policy_folder(name: str) -> tuple[Path, str | None]:
    """The folder with a policy's files; and, if it was downloaded, the `me/name@commit` it came from, else None."""
    if Path(name).is_dir() or not re.fullmatch(r"(?!runs/)[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", name):
        return Path(name), None
    repo_id, _, commit = name.partition("@")
    for file, limit in SIZE_LIMITS.items():
        with one_line(f"downloading {file} of {name}", "Can the Hub be reached, and did ppo.py push this?"):
            found = hub.get_hf_file_metadata(hub.hf_hub_url(repo_id, file, revision=commit or None))
            if found.size is None or found.size > limit:
                raise Stop(f"refused {name}: {file} has {found.size} bytes, the limit is {limit}")
            commit = str(found.commit_hash)
            path = hub.hf_hub_download(repo_id, file, revision=commit)
    return Path(path).parent, f"{repo_id}@{commit}"


def played_args(name: str, env_id: str | None) -> tuple[Args, str]:
    """The saved arguments of a policy and its pinned name; of a downloaded one only those that playing needs.

    A stranger's environment must be registered already: making `module:Env-v0` would import the module."""
    folder, stranger = policy_folder(name)
    saved = load_args(folder, stranger)
    if stranger is None:
        return saved, name
    if env_id is None:
        if saved.env_id.startswith("ALE/"):
            with contextlib.suppress(ImportError):
                gym.register_envs(importlib.import_module("ale_py"))
        plain = re.fullmatch(r"([\w-]+/)?\w[\w.-]*-v\d+", saved.env_id, re.ASCII)
        if not plain or saved.env_id not in gym.registry:
            raise Stop(f"refused {name}: no environment {saved.env_id!r} here; if you trust it, name it: --env-id")
    if unsafe := sorted(set(saved.env_kwargs) - SAFE_KWARGS):
        raise Stop(f"refused {name}: it passes {', '.join(unsafe)} to its environment, which could do harm")
    return Args(**{key: getattr(saved, key) for key in PLAYED}), stranger


def load_agent(folder: Path, args: Args, source: str | None = None) -> Agent:
    """The agent in a folder, if its files are exactly what an agent for this environment would save; else Stop."""
    envs, *_ = make_envs(args, seeds(args.seed, EVALUATION), training=False)
    config = agent_config(args, envs)
    envs.close()
    try:
        if json.loads((folder / "config.json").read_text()) != config:
            raise ValueError(f"config.json is not that of an agent for {args.env_id} with these settings")
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        with torch.device("meta"):  # shapes, but no memory: that is the file's
            agent = Agent(**config)
        types = {name: x.dtype for name, x in agent.state_dict().items()}
        agent.load_state_dict(weights, assign=True)  # names and shapes must fit
        if wrong := [name for name, x in weights.items() if x.dtype != types[name] or not x.isfinite().all()]:
            raise ValueError(f"not finite, or of the wrong type: {', '.join(wrong[:3])}")
    except OSError as error:
        hint = "; a run has one when it is finished: --resume it" if list(folder.glob("checkpoint-*.pt")) else ""
        raise Stop(f"cannot read the agent in {folder}: {error.strerror or error}{hint}") from None
    except (ValueError, safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise Stop(f"refused config.json or model.safetensors of {source or folder}: {reason:.200}") from None
    return agent.to(choose_device(args, config))


def claim_repo(args: Args) -> str:
    """The full name of the repo to push to, made if need be, once the right to write to it is certain."""
    repo_id = hub.create_repo(args.repo_id, private=args.private or None, exist_ok=True).repo_id
    hub.auth_check(repo_id, write=True)  # a token that may only read gets this far if the repo exists
    if args.private and not hub.repo_info(repo_id).private:
        raise Stop(f"{repo_id} exists and is public: make it private on the Hub, or leave out --private")
    return repo_id


def push(args: Args, run: Path) -> None:
    """Card, agent, scores, video, logs and code in one commit, in place of what an earlier push left."""
    if not args.repo_id or not (run / "results.json").exists():
        raise Stop(f"{run} is not finished: --resume {run}" if args.repo_id else "--push needs --repo-id me/name")
    retry = shlex.join([*launcher(1), "--push", str(run), "--repo-id", args.repo_id])
    remedy = f"The run is safe in {run}. Check network and login and try again: {retry}"
    with one_line(f"the push to {args.repo_id}", remedy, code=1):
        repo_id = claim_repo(args)
        results = json.loads((run / "results.json").read_text())
        write_file(run / "README.md", model_card(args, run, repo_id, results).encode())
        url = hub.upload_folder(repo_id=repo_id, folder_path=run, commit_message=f"PPO plays {args.env_id}",
                                    allow_patterns=PUBLISHED, delete_patterns=["*tfevents*", "replay.mp4"])  # fmt: skip
    print(f"pushed: {url}")


def launcher(processes: int) -> list[str]:
    """The words that start the script on so many processes of a machine."""
    return [*(["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]), SCRIPT]


def training_command(args: Args, ranks: int = 1) -> str:
    """The command that trains this run: the flags that differ from the preset's values."""
    words = [*launcher(ranks), "--env-id", args.env_id]
    for name, value in changes(args).items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            items = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
            words += [flag(name), *map(str, items if isinstance(items, (list, tuple)) else [items])]
    return shlex.join(words)


def sparkline(run: Path) -> str:
    """The learning curve, read from the run's own logs, in characters."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it would warn of each resumption
    log = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tag = "charts/episodic_return"
    values = [event.value for event in log.Scalars(tag)] if tag in log.Tags()["scalars"] else [0.0]
    means = np.array([part.mean() for part in np.array_split(values, min(40, len(values)))])
    heights = 7 * (means - means.min()) / max(np.ptp(means), 1e-8)
    return f"{means[0]:.1f} {''.join('▁▂▃▄▅▆▇█'[round(h)] for h in heights)} {means[-1]:.1f}"


def model_card(args: Args, run: Path, source: str, r: dict[str, Any]) -> str:
    """README.md of the repo: metadata as the Hub's leaderboards read it, then the text for people."""
    score, other = (f"{r[k + 'mean_reward']:.2f} +/- {r[k + 'std_reward']:.2f}" for k in ("", "other_"))
    how = ("greedy", "sampled") if r["deterministic"] else ("sampled", "greedy")
    task = "reinforcement-learning"
    result = hub.EvalResult(task_type=task, task_name=task, dataset_type=args.env_id, dataset_name=args.env_id,
                        metric_type="mean_reward", metric_name="mean_reward", metric_value=score)  # fmt: skip
    tags = [args.env_id, "ppo", "deep-reinforcement-learning", task, "custom-implementation", "deep-rl-course"]
    data = hub.ModelCardData(model_name=f"PPO-{args.env_id}", library_name="ppo", pipeline_tag=task, tags=tags,
                         eval_results=[result])  # fmt: skip
    settings = ", ".join(f"{name} {value}" for name, value in r["settings"].items())
    rows = "\n".join(f"| `{flag(k)}` | {v} |" for k, v in asdict(args).items() if k not in FREE)
    code = sorted(file for file in {"ppo.py", SCRIPT, "requirements.txt"} if (run / file).exists())
    download = "" if source.startswith("runs/") else f"hf download {source} {' '.join(code)} --local-dir .\n"
    start = "pip install -r requirements.txt\npython" if "requirements.txt" in code else "uv run"
    named = f" --env-id {args.env_id}" if ":" in args.env_id else ""  # or it is not trusted
    video = "`replay.mp4` shows one greedy episode." if (run / "replay.mp4").exists() else ""
    text = f"""
# PPO agent playing {args.env_id}

Trained with [proximal policy optimization](https://arxiv.org/abs/1707.06347) by `ppo.py`, one self-contained PyTorch
script, which is in this repo. {video}

| policy | mean return +/- std over episodes | episodes |
|---|---|---|
| {how[0]} | **{score}** | {r["n_evaluation_episodes"]} |
| {how[1]} | {other} | {r["n_evaluation_episodes"]} |

Each episode is the first of a fresh environment; their seeds follow from seed {args.seed} and are used nowhere else.
The agent is that of the {r["published"]} checkpoint. Mean episode return as it learned, in {r["global_step"]:,} steps:

`{sparkline(run)}`

## Play it

```bash
{download}{start} {SCRIPT} --evaluate {source}{named} --capture-video
```

```python
from ppo import Agent

agent = Agent.from_pretrained("{source}", strict=True)  # agent.act(obs), a tensor, is the greedy action
```

## Train it again

```bash
{training_command(args, r["settings"]["ranks"])}
```

{r["training_seconds"]:.0f} seconds of training, evaluation not counted: {settings}.

<details><summary>All settings</summary>

| flag | value |
|---|---|
{rows}

</details>
"""
    return f"---\n{data.to_yaml()}\n---\n{text}"


# ---- The program -----------------------------------------------------------------------------------------------------


def on_signal(signum: int, frame) -> None:
    """The first Ctrl-C or SIGTERM stops cleanly, the second at once. A worker's parent decides for it."""
    if multiprocessing.parent_process():
        return None if signum == signal.SIGINT else os._exit(0)
    if any(f.f_code.co_name == "__del__" for f, _ in traceback.walk_stack(frame)):  # what is raised there is lost
        return threading.Timer(0.01, os.kill, [os.getpid(), signum]).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(signum)


def run_command(args: Args) -> None:
    """What the flags ask for: play, push, or train and all that follows. Only rank 0 goes on after training."""
    if args.evaluate:
        folder, stranger = policy_folder(args.evaluate)
        agent = load_agent(folder, args, stranger)
        if stranger and args.capture_video:  # nothing is written beside what was downloaded
            folder = Path("runs", re.sub(r"[^\w.-]", "--", stranger.partition("@")[0]))
            folder.mkdir(parents=True, exist_ok=True)
        play(replace(args, repo_id=None), folder, agent)
    elif args.push:
        push(args, Path(args.push))
    elif args.resume and (Path(args.resume) / "results.json").exists():
        print(f"{args.resume} is finished already; to share it: --push {args.resume} --repo-id me/name")
    else:
        rank, _ = ranks()
        if args.track and not importlib.util.find_spec("wandb"):
            raise Stop("--track needs Weights & Biases: pip install wandb")
        if args.repo_id and rank == 0:  # fail now, not after hours of training
            with one_line(f"access to {args.repo_id}", LOGIN):
                claim_repo(args)
        run = train(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        if rank == 0:
            finish(args, run)
            if args.repo_id:
                push(args, run)
            print(f"run: {run}")


def how_to_go_on(args: Args | None) -> str:
    """The command that resumes an interrupted run, where there is one."""
    if not args or not list(args.run.glob("checkpoint-*.pt")) or (args.run / "results.json").exists():
        return ""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return f"To go on: {shlex.join([*launcher(processes), '--resume', str(args.run)])}"


def main(argv: list[str] | None = None) -> int:
    """The program; its exit code: 2 for what was known before training, 1 for what failed later, 128 + a signal's."""
    args = None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        run_command(args := parse_args(argv))
        return 0
    except KeyboardInterrupt as interrupt:
        message, code = "stopped", 128 + (interrupt.args or (signal.SIGINT,))[0]
    except Stop as stop:
        message, code = f"error: {stop}", stop.code
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            message, code = "error: out of memory: lower --num-envs, --num-steps or --hidden-sizes", 1
        elif isinstance(error, OSError) and error.errno and not hasattr(error, "__notes__"):  # not an environment's
            message, code = f"error: {error.strerror}, in {args.run if args else Path.cwd()}", 1
        else:
            error.add_note(how_to_go_on(args))
            raise
    if code != 2 or ranks()[0] == 0:  # what every rank knows beforehand, one says
        print(f"{message}\n{how_to_go_on(args) if code != 2 else ''}".rstrip(), file=sys.stderr)
    return code


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # what stops TensorBoard's thread is raised in the main one, too
    sys.exit(main())
