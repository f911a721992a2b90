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
    python ppo.py --env-id LunarLander-v3 --seed 2               # any Gymnasium id; its preset, your flags win
    python ppo.py --evaluate runs/<run> --capture-video          # play it again and leave replay.mp4
    python ppo.py --resume runs/<run>                            # go on after a crash, bit for bit
    python ppo.py --env-id LunarLander-v3 --repo-id me/lander    # train, evaluate, record, push to the Hub
    torchrun --nproc-per-node 2 ppo.py --env-id LunarLander-v3   # the same run, split over two processes

Symbols: T steps (--num-steps) in each of N environments (--num-envs) make a rollout of B = T*N rows, learned from in
minibatches of M. Time comes first, then environments, then features: `obs[t]` is what the agent sees before action t,
`done[t]` says that action t ended its episode. Equations are those of Schulman et al., "Proximal Policy Optimization
Algorithms" (2017, arXiv:1707.06347), "PPO" below, and of "High-Dimensional Continuous Control Using Generalized
Advantage Estimation" (2016, arXiv:1506.02438), "GAE" below.

Where this departs from the paper, as most implementations do: advantages are standardised per minibatch; the value
loss is clipped too (--no-clip-vloss); gradients are clipped by global norm; actor and critic share no layers, but for
images. Where it departs from CleanRL, whose flags it keeps:
- A time limit is no failure: a truncated episode is bootstrapped from the value of its last observation.
- Gymnasium >= 1.0 spends one step on each reset; that row is no transition, and no loss or statistic ever sees it.
- The rollout runs the actor only. Log-probabilities and values follow in one batch: the same numbers, much faster.
- Normalisation belongs to the agent: it is saved with the weights, and frozen in evaluation.
- Logged losses are means over all minibatches of an iteration; evaluation is greedy, on fresh seeded environments.
- A minibatch is standardised with the population deviation, so that even a single row gives a number, not NaN.
"""

import contextlib
import fnmatch
import hashlib
import importlib
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
import types
import typing
from collections import deque
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn


class Stop(Exception):
    """The end of the program for a reason the user can act on: one line, an exit code, no traceback."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------------------------------------------------------------
# The knobs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """Train a PPO agent; or evaluate, resume or push one. Defaults are the environment's preset where there is one."""

    env_id: str = "CartPole-v1"  # Gymnasium id; `my_module:MyEnv-v0` imports your own module first
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # `is_slippery False`, for its maker
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
    target_kl: float | None = None  # stop an iteration's epochs once the policy has moved this far; 0.01 to 0.05

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
    validation_episodes: int = 20  # greedy episodes at each checkpoint, to keep the best agent; 0 publishes the last
    eval_episodes: int = 100  # episodes of the final evaluation
    deterministic: bool = True  # evaluate the mode of the policy; --no-deterministic samples from it
    capture_video: bool = False  # leave replay.mp4, one episode
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

    def __post_init__(self):
        for names, low, high in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not low <= value <= high:  # NaN fails every comparison
                    bounds = f"from {low:g} to {high:g}" if high < sys.maxsize else f"at least {low:g}, and finite"
                    raise ValueError(f"{flag(name)} must be {bounds}, got {value}")
        if not all(1 <= size <= 65536 for size in self.hidden_sizes):
            raise ValueError(f"--hidden-sizes must be from 1 to 65536 each, got {self.hidden_sizes}")
        if not math.isfinite(self.logstd_init):
            raise ValueError(f"--logstd-init must be finite, got {self.logstd_init}")
        if self.run_name is not None and not re.fullmatch(r"\w[\w.=+-]*", self.run_name):
            raise ValueError(f"--run-name must be one plain folder name, got {self.run_name!r}")
        if self.norm_reward and self.clip_reward:
            raise ValueError("--norm-reward and --clip-reward exclude each other: choose one")
        if self.batch_size % self.num_minibatches:
            near = sorted(divisors(self.batch_size), key=lambda d: abs(d - self.num_minibatches))[:4]
            raise ValueError(
                f"--num-minibatches {self.num_minibatches} does not divide the batch of {self.num_steps} steps x "
                f"{self.num_envs} envs = {self.batch_size} rows; near it: {', '.join(map(str, sorted(near)))}"
            )
        if self.total_timesteps < self.batch_size:
            raise ValueError(
                f"--total-timesteps {self.total_timesteps} is less than one batch of {self.num_steps} steps x "
                f"{self.num_envs} envs = {self.batch_size}: raise it, or lower --num-steps or --num-envs"
            )


TINY = sys.float_info.min  # "above zero"
RANGES = (
    ("total_timesteps num_envs num_minibatches update_epochs eval_episodes checkpoint_every", 1, sys.maxsize),
    ("num_steps", 2, sys.maxsize),  # a rollout of one step can consist of resets alone
    ("seed validation_episodes", 0, sys.maxsize),
    ("learning_rate clip_coef max_grad_norm target_kl", TINY, sys.float_info.max),
    ("ent_coef vf_coef", 0, sys.float_info.max),
    ("gamma gae_lambda", 0, 1),
)

MUJOCO = dict(total_timesteps=1_000_000, num_envs=8, num_steps=256, num_minibatches=8, update_epochs=10,
              learning_rate=1e-3, ent_coef=0.0, norm_obs=True, norm_reward=True, logstd_init=-0.5)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        total_timesteps=100_000, num_envs=64, num_steps=32, num_minibatches=8, update_epochs=5, learning_rate=2e-3,
        gamma=0.98, gae_lambda=0.8, clip_vloss=False,
    ),
    "Acrobot-v1": dict(
        total_timesteps=500_000, num_envs=32, num_steps=128, num_minibatches=8, update_epochs=4, learning_rate=2e-3,
        gae_lambda=0.94,
    ),
    "MountainCar-v0": dict(
        total_timesteps=500_000, num_envs=32, num_steps=64, num_minibatches=4, update_epochs=4, learning_rate=2e-3,
        gae_lambda=0.98, ent_coef=0.0, norm_obs=True, norm_reward=True,
    ),
    "Pendulum-v1": dict(
        total_timesteps=100_000, num_envs=8, num_steps=128, num_minibatches=8, update_epochs=10, learning_rate=3e-3,
        gamma=0.9, gae_lambda=0.95, ent_coef=0.0,
    ),
    "LunarLander*-v3": dict(
        total_timesteps=1_000_000, num_envs=16, num_steps=256, num_minibatches=8, update_epochs=6,
        learning_rate=1.5e-3, gamma=0.995, gae_lambda=0.98, ent_coef=0.005, hidden_sizes=(128, 128),
        activation="relu",
    ),
    "BipedalWalker-v3": dict(
        total_timesteps=5_000_000, num_envs=32, num_steps=256, num_minibatches=16, update_epochs=10,
        learning_rate=1e-3, gamma=0.999, ent_coef=0.0, norm_obs=True, norm_reward=True, logstd_init=-0.5,
    ),
    **{f"{name}-v5": MUJOCO for name in (
        "HalfCheetah", "Hopper", "Walker2d", "Ant", "Swimmer", "Humanoid", "HumanoidStandup", "InvertedPendulum",
        "InvertedDoublePendulum", "Reacher", "Pusher",
    )},
    "ALE/*": dict(  # the published protocol: no sticky actions
        env_kwargs={"repeat_action_probability": 0.0}, total_timesteps=10_000_000, num_envs=8, clip_coef=0.1,
        clip_reward=True, episodic_life=True, hidden_sizes=(),
    ),
}  # fmt: skip


def preset(env_id: str) -> tuple[str | None, dict[str, Any]]:
    """The pattern of PRESETS that fits the environment, the exact one first, and its settings."""
    found = [p for p in PRESETS if p == env_id] + [p for p in PRESETS if fnmatch.fnmatchcase(env_id, p)]
    return (found[0], PRESETS[found[0]]) if found else (None, {})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def divisors(n: int) -> set[int]:
    return {d for k in range(1, math.isqrt(n) + 1) if n % k == 0 for d in (k, n // k)}


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over saved arguments (--evaluate, --resume, --push) or over the environment's preset (training)."""

    @dataclass
    class First:  # what decides where the defaults come from
        env_id: str | None = None
        evaluate: str | None = None
        resume: str | None = None
        push: str | None = None

    first, _ = tyro.cli(First, args=argv, return_unknown_args=True, add_help=False)
    mode = {name: getattr(first, name) for name in MODES if getattr(first, name) is not None}
    if len(mode) > 1:
        raise Stop(f"{' and '.join(map(flag, mode))} exclude each other: choose one")
    if first.evaluate:
        saved = played_args(first.evaluate, first.env_id)
    elif mode:
        saved = load_args(Path(*mode.values()))
    else:
        saved = Args(env_id=first.env_id or Args.env_id, **preset(first.env_id or Args.env_id)[1])
    defaults = replace(saved, **mode, repo_id=None if first.evaluate else saved.repo_id)
    args = tyro.cli(Args, args=argv, default=defaults, prog="ppo.py")
    if first.resume:
        refuse_changes(saved, args)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The world: Gymnasium's vector environments, all in NEXT_STEP mode
# ---------------------------------------------------------------------------------------------------------------------

TRAINING, VALIDATION, EVALUATION, VIDEO, WEIGHTS, SAMPLING = range(6)  # each draws from a random stream of its own


def seeds(seed: int, *stream: int, n: int = 1) -> list[int]:
    """n independent 31-bit seeds. Plain seed + i would make the second world of seed 1 the first of seed 2."""
    return [int(s) >> 1 for s in np.random.SeedSequence([seed, *stream]).generate_state(n)]


def is_image(space: gym.Space) -> bool:
    """Whether the Nature CNN can take it: three uint8 axes, two of them at least 36 pixels long."""
    return (
        isinstance(space, gym.spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) == 3
        and sorted(space.shape)[1] >= 36
    )


def make_envs(args: Args, seeds: list[int], training: bool = True, render: bool = False):
    """One environment per seed, made anew and reset: (vector environment, observations [N, ...], info).

    Evaluation uses Gymnasium's own environment in this process, whatever trained the agent. Observations other than
    images come as flat vectors, discrete ones as one-hot. Raises Stop for what cannot be made or is not supported."""
    module, _, env_id = args.env_id.rpartition(":")
    atari = env_id.startswith("ALE/")
    mode, kwargs = args.vectorization, dict(args.env_kwargs)
    if not training and mode in ("async", "envpool"):
        mode = "auto"
    if render and not atari:  # ALE's vector environment does not render
        kwargs["render_mode"] = "rgb_array"
    try:
        if module or atari:
            gym.register_envs(importlib.import_module(module or "ale_py"))
        native = gym.spec(env_id).vector_entry_point is not None
        if mode == "auto":
            mode = "native" if native else "sync"
        if mode == "envpool":
            threads = min(len(seeds), local_cores())
            pool = importlib.import_module("envpool")
            if env_id.removeprefix("ALE/") not in pool.list_all_envs():
                raise Stop(f"EnvPool has no {env_id}: choose --vectorization sync or async")
            kwargs |= {"num_envs": len(seeds), "num_threads": threads, "seed": seeds}
            envs = pool.make(env_id.removeprefix("ALE/"), env_type="gymnasium", **kwargs)
        elif mode == "native":
            if not native:
                raise Stop(f"{env_id} has no native vector environment: choose --vectorization sync or async")
            kwargs |= {"reward_clipping": False} if atari else {}  # clipped returns would be reported as returns
            envs = gym.make_vec(env_id, len(seeds), "vector_entry_point", **kwargs)
        else:
            envs = gym.make_vec(env_id, len(seeds), mode, {"copy": False}, **kwargs)
    except gym.error.Error as error:
        raise Stop(f"cannot make {args.env_id}: {error}") from None
    except ModuleNotFoundError as error:
        hint = "is it on the Python path?" if error.name == module else f"try: pip install {error.name}"
        raise Stop(f"cannot make {args.env_id}: {error}; {hint}") from None

    space = envs.single_observation_space
    if not space.is_np_flattenable or (mode == "envpool" and not isinstance(space, gym.spaces.Box)):
        supported = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of these (EnvPool: Box)"
        raise Stop(f"{args.env_id} observes {space}; supported: {supported}")
    if not is_image(space) and len(space.shape or ()) != 1 or not isinstance(space, gym.spaces.Box):
        envs = gym.wrappers.vector.FlattenObservation(envs)
    obs, info = envs.reset(seed={"native": seeds[0], "envpool": None}.get(mode, seeds))  # EnvPool has its seeds already
    return envs, obs, info


def step_envs(envs, actions: Tensor, t: int):
    """Act in every environment: `envs.step`, with continuous actions clipped to their box, and faults given a name.

    Raises Stop for the first NaN or infinity; what an environment raises itself passes through, with its index."""
    space = envs.single_action_space
    choice = actions.cpu().numpy()
    if isinstance(space, gym.spaces.Box):
        choice = np.clip(choice, space.low, space.high)
    elif not isinstance(space, gym.spaces.MultiBinary):
        choice = choice + space.start
    try:
        obs, rewards, terminated, truncated, info = envs.step(choice.astype(space.dtype, copy=False))
    except Exception as error:
        workers = list(enumerate(getattr(envs.unwrapped, "processes", ())))
        dead = [f"{i} (exit code {worker.exitcode})" for i, worker in workers if worker.join(0.1) or worker.exitcode]
        if dead:
            raise Stop(f"the worker process of environment {', '.join(dead)} died at step {t}", code=1) from None
        frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
        index = [f["i"] for f in frames if isinstance(f.get("self"), gym.vector.SyncVectorEnv) and "i" in f]
        error.add_note(f"Raised by environment {index[-1] if index else 'unknown'} at step {t}.")
        raise
    for name, values in (("reward", rewards), ("observation", obs)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            i = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise Stop(f"environment {i} gave a bad {name} at step {t}: {values[i]}; nothing was learned from it", 1)
    return obs, rewards, terminated, truncated, info


def agent_config(args: Args, envs) -> dict[str, Any]:
    """The arguments of the Agent for these environments. Stop names an action space that is not supported."""
    obs, act = envs.single_observation_space, envs.single_action_space
    spaces = gym.spaces
    if isinstance(act, spaces.Box) and act.dtype.kind == "f":
        nvec = None
    elif isinstance(act, spaces.Discrete):
        nvec = [int(act.n)]
    elif isinstance(act, spaces.MultiDiscrete):
        nvec = act.nvec.flatten().tolist()
    elif isinstance(act, spaces.MultiBinary):
        nvec = [2] * math.prod(act.shape)
    else:
        raise Stop(f"{args.env_id} acts in {act}; supported: Discrete, MultiDiscrete, MultiBinary and Box of floats")
    return {
        "obs_shape": list(obs.shape), "action_shape": list(act.shape), "nvec": nvec,
        "hidden_sizes": list(args.hidden_sizes), "activation": args.activation,
        "norm_obs": args.norm_obs, "logstd_init": args.logstd_init,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The agent
# ---------------------------------------------------------------------------------------------------------------------


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far, over all ranks; float64, updated as in Chan et al. (1979)."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        for name, value in (("count", 0.0), ("mean", 0.0), ("var", 1.0)):
            self.register_buffer(name, torch.full(shape, value, dtype=torch.float64))

    @property
    def std(self) -> Tensor:
        return (self.var + 1e-8).sqrt().float()

    def update(self, rows: Tensor) -> None:  # [n, *shape]
        d = rows.double() - self.mean
        n, first, second = rank_sum(torch.stack([torch.full_like(self.mean, len(d)), d.sum(0), (d * d).sum(0)]))
        total = self.count + n
        shift = first / total
        self.var.copy_(((self.count * self.var + second) / total - shift**2).clamp(min=0))
        self.mean.add_(shift)
        self.count.copy_(total)


def layer_init(layer, gain: float = math.sqrt(2)):
    """Orthogonal weights, zero biases; sqrt(2) keeps the variance through ReLU and, nearly, through tanh."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: list[int], activation: str, gain: float) -> nn.Sequential:
    """Linear layers of the given sizes with activations between them; `gain` is the last layer's."""
    act = {"tanh": nn.Tanh, "relu": nn.ReLU}[activation]
    layers = [m for a, b in zip(sizes, sizes[1:-1]) for m in (layer_init(nn.Linear(a, b)), act())]
    return nn.Sequential(*layers, layer_init(nn.Linear(*sizes[-2:]), gain))


class Agent(nn.Module, PyTorchModelHubMixin):
    """Policy and value function, with all they need to act: weights and running statistics.

    Vectors go through separate actor and critic MLPs, images through one Nature CNN (Mnih et al. 2015) with two heads.
    `nvec` lists the number of choices of each discrete action component; None means Box actions: a diagonal Gaussian
    whose log standard deviation does not depend on the observation. All arguments are JSON: they become config.json."""

    def __init__(self, obs_shape: list[int], action_shape: list[int], nvec: list[int] | None = None,
                 hidden_sizes: list[int] = (64, 64), activation: str = "tanh", norm_obs: bool = False,
                 logstd_init: float = 0.0):  # fmt: skip
        super().__init__()
        self.action_shape, self.nvec, self.norm_obs = tuple(action_shape), nvec, norm_obs
        self.image, self.channels_last = len(obs_shape) == 3, obs_shape[-1] == min(obs_shape)
        self.trunk, features = nn.Identity(), obs_shape[0]
        if self.image:
            channels, *size = obs_shape[-1:] + obs_shape[:-1] if self.channels_last else obs_shape
            conv = [layer_init(nn.Conv2d(*c)) for c in ((channels, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))]
            pixels = 64 * math.prod(((((s - 8) // 4 + 1) - 4) // 2 + 1) - 2 for s in size)
            self.trunk = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.ReLU(), conv[2], nn.ReLU(), nn.Flatten(),
                                       layer_init(nn.Linear(pixels, 512)), nn.ReLU())  # fmt: skip
            features = 512
        outputs = sum(nvec) if nvec else math.prod(action_shape)
        self.actor = mlp([features, *hidden_sizes, outputs], activation, 0.01)  # nearly uniform at the start
        self.critic = mlp([features, *hidden_sizes, 1], activation, 1.0)
        if nvec is None:
            self.logstd = nn.Parameter(torch.full((outputs,), logstd_init))
        self.obs_stats = RunningMeanStd(() if self.image else tuple(obs_shape))
        self.return_stats = RunningMeanStd(())

    def encode(self, obs: Tensor) -> Tensor:  # [..., *obs_shape] -> [..., features]
        if self.image:
            x = obs.movedim(-1, -3) if self.channels_last else obs
            return self.trunk(x.reshape(-1, *x.shape[-3:]).float() / 255).view(*x.shape[:-3], -1)
        obs = obs.float()
        if self.norm_obs:
            return ((obs - self.obs_stats.mean.float()) / self.obs_stats.std).clamp(-10, 10)
        return obs

    def sample_noise(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """What makes `act` sample: standard Gumbel noise for logits, standard normal for means; [*shape, outputs]."""
        noise = torch.empty(*shape, self.actor[-1].out_features, device=self.actor[-1].weight.device)
        if self.nvec is None:
            return noise.normal_(generator=generator)
        return -noise.exponential_(generator=generator).log()

    def act(self, obs: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """The action that this noise selects, [..., *action_shape]; without noise the mode: the greedy action."""
        return self.choose(self.actor(self.encode(obs)), noise)

    def choose(self, out: Tensor, noise: Tensor | float) -> Tensor:  # [..., outputs] -> [..., *action_shape]
        if self.nvec is None:
            return (out + self.logstd.exp() * noise).view(*out.shape[:-1], *self.action_shape)
        choices = [logits.argmax(-1) for logits in (out + noise).split(self.nvec, -1)]  # the Gumbel-max trick
        return torch.stack(choices, -1).view(*out.shape[:-1], *self.action_shape)

    def get_value(self, obs: Tensor) -> Tensor:  # [...]
        return self.critic(self.encode(obs)).squeeze(-1)

    def get_action_and_value(self, obs: Tensor, action: Tensor | None = None):
        """Action [..., *action_shape], its log-probability [...], the policy's entropy [...] and the value [...]."""
        features = self.encode(obs)
        out, value = self.actor(features), self.critic(features).squeeze(-1)
        if action is None:
            action = self.choose(out, self.sample_noise(*out.shape[:-1]))
        flat = action.reshape(*out.shape[:-1], -1)
        logprob, entropy = gaussian(out, self.logstd, flat) if self.nvec is None else categorical(out, self.nvec, flat)
        return action, logprob, entropy, value


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics of PPO: tensors in, tensors out
# ---------------------------------------------------------------------------------------------------------------------


def categorical(logits: Tensor, nvec: list[int], action: Tensor) -> tuple[Tensor, Tensor]:
    """Joint log-probability [...] of independent choices, action [..., len(nvec)], and their entropy [...]."""
    logps = [part.log_softmax(-1) for part in logits.split(nvec, -1)]
    logprob = sum(lp.gather(-1, a.unsqueeze(-1)).squeeze(-1) for lp, a in zip(logps, action.unbind(-1)))
    return logprob, sum(-(lp.exp() * lp).sum(-1) for lp in logps)


def gaussian(mean: Tensor, logstd: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density [...] of a diagonal Gaussian at action [..., D], summed over dimensions, and its entropy [...]."""
    z = (action - mean) * (-logstd).exp()
    logprob = -(0.5 * z**2 + logstd + 0.5 * math.log(2 * math.pi)).sum(-1)
    return logprob, (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum().expand_as(logprob)


def accumulate(x: np.ndarray, done: np.ndarray, carry: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """Running discounted sums of x within episodes, forward in time: x, done, result [T, N].

    `carry` [N] holds the sums of the episodes under way; it is updated in place and forgets what has ended."""
    sums = np.empty(x.shape)
    for t in range(len(x)):
        carry *= gamma
        carry += x[t]
        sums[t] = carry
        carry[done[t]] = 0
    return sums


def compute_gae(rewards: Tensor, values: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float):
    """Generalised advantage estimation, GAE Eq. 16: advantages [T, N] from values [T+1, N] and the rest [T, N].

    A termination has no future value. A truncation does: values[t+1] is that of the episode's real last observation,
    as NEXT_STEP resets leave it in place. Neither lets an advantage flow back from the next episode."""
    delta = rewards + gamma * values[1:] * ~terminated - values[:-1]  # the TD residual, PPO Eq. 12
    decay = gamma * gae_lambda * ~done
    advantages, last = [], torch.zeros_like(values[0])
    for d, k in zip(delta.flip(0), decay.flip(0)):  # PPO Eq. 11, backwards
        last = d + k * last
        advantages.append(last)
    return torch.stack(advantages).flip(0)


def standardize(x: Tensor, weight: float = 1.0) -> Tensor:
    """Zero mean and unit variance over the last axis, over all ranks, each counting with its weight."""
    mean, square = rank_sum(weight * torch.stack([x.double().mean(-1), x.double().square().mean(-1)])).unsqueeze(-1)
    return ((x - mean) / ((square - mean**2).clamp(min=0).sqrt() + 1e-8)).float()


def policy_loss(logratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """The clipped surrogate objective, PPO Eq. 7, negated; logratio = log pi(a|s) - log pi_old(a|s)."""
    ratio = logratio.exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


def value_loss(new_values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float | None) -> Tensor:
    """Half the mean squared error (PPO Eq. 9); clipped, the larger of it and that of a step of at most clip_coef."""
    error = (new_values - returns) ** 2
    if clip_coef is not None:
        clipped = old_values + (new_values - old_values).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error.mean()


def ppo_loss(agent: Agent, obs, actions, logprobs, values, returns, advantages, args: Args):
    """The whole objective of one minibatch, PPO Eq. 9 negated, and what is logged of it, in the order of METRICS."""
    _, new_logprobs, entropy, new_values = agent.get_action_and_value(obs, actions)
    logratio = new_logprobs - logprobs
    pg_loss = policy_loss(logratio, advantages, args.clip_coef)
    v_loss = value_loss(new_values, values, returns, args.clip_coef if args.clip_vloss else None)
    entropy = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    with torch.no_grad():  # KL(old || new), estimated as in joschu.net/blog/kl-approx.html: k1, and k3 with less noise
        ratio = logratio.exp()
        clipfrac = ((ratio - 1).abs() > args.clip_coef).float()
        metrics = [pg_loss, v_loss, entropy, -logratio.mean(), (ratio - 1 - logratio).mean(), clipfrac.mean()]
        return loss, torch.stack(metrics)


METRICS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var[returns - values] / Var[returns]: 1 is a perfect critic, 0 one no better than a constant."""
    variance = returns.var(correction=0)
    return (1 - (returns - values).var(correction=0) / variance).item() if variance > 0 else math.nan


def minibatches(valid: Tensor, epochs: int, K: int, generator: torch.Generator) -> Tensor:
    """Row numbers of the minibatches, [epochs, K, M]: the valid rows of [T, N], in a new order each epoch.

    Resets leave fewer than B of them; each order is repeated to fill the batch, so that every minibatch has M rows."""
    real, B = valid.flatten().nonzero().squeeze(-1), valid.numel()
    orders = [real[torch.randperm(len(real), generator=generator, device=real.device)] for _ in range(epochs)]
    return torch.stack([order.repeat(-(-B // len(order)))[:B] for order in orders]).view(epochs, K, B // K)


# ---------------------------------------------------------------------------------------------------------------------
# The loop: collect, estimate, optimise, report
# ---------------------------------------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """PPO, Algorithm 1, from the start or from a checkpoint. Returns the run's folder, with the trained agent in it."""
    rank, world = join_ranks(args)
    envs, *_ = make_envs(args, seeds(args.seed, TRAINING))  # one environment, to look at its spaces
    config = agent_config(args, envs)
    device = choose_device(args, config)
    T, N, K = args.num_steps, args.num_envs // world, args.num_minibatches
    torch.manual_seed(seeds(args.seed, WEIGHTS)[0])  # the same weights on every rank
    agent = Agent(**config).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)  # eps as in baselines
    generator = torch.Generator(device).manual_seed(seeds(args.seed, SAMPLING, rank)[0])
    run, state = open_run(args, device, rank, world)
    if "agent" in state:  # a checkpoint
        agent.load_state_dict(state["agent"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generators"][rank])
    loss_fn = compile_loss(args, agent) if args.compile else ppo_loss
    writer, bar, recent = open_log(args, run, state, rank)
    every = args.checkpoint_every or default_interval(args)

    obs = torch.zeros(T + 1, N, *config["obs_shape"], dtype=torch.uint8 if agent.image else torch.float32, device=device)
    actions = torch.zeros(T, N, *agent.action_shape, dtype=torch.int64 if agent.nvec else torch.float32, device=device)
    rewards, lives = np.zeros((T, N)), np.zeros((T + 1, N))
    terminated, truncated = np.zeros((2, T, N), dtype=bool)

    for iteration in range(state["iteration"], args.num_iterations + 1):
        if iteration % every == 0 or iteration == args.num_iterations:
            # Environments cannot be saved, but they can be made anew. So every run does that at every checkpoint, and
            # a resumed run follows the very path of one that was never interrupted. The cut counts as a truncation.
            state |= {"iteration": iteration}
            save_checkpoint(run, args, state, agent, optimizer, generator, writer)
            envs.close()
            if iteration == args.num_iterations:
                break
            envs, first_obs, info = make_envs(args, seeds(args.seed, TRAINING, rank, iteration, n=N))
            obs[T], lives[T] = torch.as_tensor(first_obs), info.get("lives", 0)
            ended, (returned, length, discounted) = np.zeros(N, dtype=bool), np.zeros((3, N))
        started = time.perf_counter()
        lr = args.learning_rate * (1 - iteration / args.num_iterations if args.anneal_lr else 1)
        optimizer.param_groups[0]["lr"] = lr

        # Collect. The policy stands still meanwhile, so only the actor is needed, and its noise can be drawn ahead.
        obs[0], lives[0] = obs[T], lives[T]
        noise = agent.sample_noise(T, N, generator=generator)
        with torch.inference_mode():
            for t in range(T):
                actions[t] = agent.act(obs[t], noise[t])
                step = step_envs(envs, actions[t], iteration * T + t)
                next_obs, rewards[t], terminated[t], truncated[t], info = step
                obs[t + 1] = to_torch(next_obs, device)
                lives[t + 1] = info["lives"] if args.episodic_life else 0
        done = terminated | truncated
        valid = ~np.vstack([ended, done[:-1]])  # [T, N]; the row after an episode's last is its reset: no transition
        ended = done[-1].copy()

        # Estimate advantages and value targets
        logprobs, values = score(agent, obs, actions)  # [T, N], [T+1, N]
        lost_life = (lives[1:] < lives[:-1]) & valid
        horizon = [to_torch(x, device) for x in (terminated | lost_life, done | lost_life)]
        scaled = to_torch(scale_rewards(args, agent, rewards), device)
        advantages = compute_gae(scaled, values, *horizon, args.gamma, args.gae_lambda)
        batch = [x.flatten(0, 1) for x in (obs[:T], actions, logprobs, values[:T], advantages + values[:T])]
        rows = minibatches(to_torch(valid, device), args.update_epochs, K, generator)  # [epochs, K, M]
        total = rank_sum(torch.tensor(float(valid.sum()), device=device)).item()
        weight = float(valid.sum()) / total  # this rank's share of the transitions
        advantages = advantages.flatten()[rows]
        if args.norm_adv:
            advantages = standardize(advantages, weight)

        # Optimise the policy and the value function together
        history, priming = [], iteration == 0 and (args.norm_obs or args.norm_reward)
        for epoch in range(0 if priming else args.update_epochs):  # the first rollout only fills the statistics
            for k in range(K):
                loss, metrics = loss_fn(agent, *(x[rows[epoch, k]] for x in batch), advantages[epoch, k], args)
                optimizer.zero_grad()
                loss.backward()
                history.append(reduce_gradients(agent, metrics, weight))
                norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                if not norm.isfinite():
                    raise Stop(f"the gradient became {norm} in iteration {iteration}: lower --learning-rate", code=1)
                optimizer.step()
            kl = torch.stack(history[-K:])[:, METRICS.index("approx_kl")].mean()
            if args.target_kl is not None and kl > args.target_kl:
                break
        if args.norm_obs:
            agent.obs_stats.update(obs[:T][to_torch(valid, device)])
        so_far = accumulate(rewards, done, discounted, args.gamma)
        agent.return_stats.update(to_torch(so_far[valid], device))
        state["global_step"] += int(total)
        state["seconds"] += time.perf_counter() - started

        # Report
        if rank == 0:
            steps = state["global_step"] - int(total) + world * valid.sum(1).cumsum()
            episodes = accumulate(rewards, done, returned), accumulate(valid, done, length)
            losses = dict(zip(METRICS, torch.stack(history).mean(0).tolist())) if history else {}
            losses["explained_variance"] = explained_variance(batch[3][rows[0].flatten()], batch[4][rows[0].flatten()])
            report(writer, bar, recent, args, state, lr, losses, steps, done, *episodes)
    if rank == 0:
        bar.close()
        writer.close()
        agent.load_state_dict(state["best"]["agent"])
        agent.save_pretrained(run)
    return run


@torch.no_grad()
def score(agent: Agent, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T, N] of the actions taken and values [T+1, N], a few thousand rows at a time."""
    T, N = actions.shape[:2]
    chunks = zip(obs[:T].flatten(0, 1).split(4096), actions.flatten(0, 1).split(4096))
    _, logprobs, _, values = zip(*(agent.get_action_and_value(*chunk) for chunk in chunks))
    last = agent.get_value(obs[T])
    return torch.cat(logprobs).view(T, N), torch.cat([*values, last]).view(T + 1, N)


def scale_rewards(args: Args, agent: Agent, rewards: np.ndarray) -> np.ndarray:
    """The rewards to learn from, [T, N] float32; reported returns are those of the untouched rewards."""
    if args.norm_reward:
        rewards = (rewards / agent.return_stats.std.item()).clip(-10, 10)
    if args.clip_reward:
        rewards = np.sign(rewards)
    return rewards.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Devices and ranks
# ---------------------------------------------------------------------------------------------------------------------


def local_cores() -> int:
    """Processor cores for each process on this machine."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def choose_device(args: Args, config: dict[str, Any]) -> torch.device:
    """Where to compute, and on how many threads: on a small MLP, a GPU or a second thread costs more than it gives."""
    large = len(config["obs_shape"]) == 3 or max(args.hidden_sizes, default=0) >= 1024
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Stop("--device cuda, but torch finds no GPU: use --device auto or cpu")
    torch.set_num_threads(local_cores() if large else 1)
    if args.device == "cpu" or not torch.cuda.is_available() or (args.device == "auto" and not large):
        return torch.device("cpu")
    torch.backends.cudnn.deterministic = True  # the same seed gives the same weights
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def to_torch(x: np.ndarray, device: torch.device) -> Tensor:
    """From NumPy to the device; from pinned memory a GPU copies while the CPU goes on."""
    tensor = torch.as_tensor(x)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def join_ranks(args: Args) -> tuple[int, int]:
    """(rank, world size) as torchrun set them; 0 and 1 without it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.num_envs % world or args.batch_size // world % args.num_minibatches:
        raise Stop(f"--num-envs {args.num_envs} and the rows of a minibatch must be multiples of {world} ranks")
    if world > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available() and args.device != "cpu"
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return rank, world


def rank_sum(x: Tensor) -> Tensor:
    """The sum of x over all ranks, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def reduce_gradients(agent: Agent, metrics: Tensor, weight: float) -> Tensor:
    """Weighted mean of gradients and metrics over ranks, in one message; gradients in place, metrics returned."""
    if not dist.is_initialized():
        return metrics
    tensors = [p.grad for p in agent.parameters()] + [metrics]
    flat = rank_sum(weight * torch.cat([x.flatten() for x in tensors]))
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors])):
        x.copy_(mean.view_as(x))
    return metrics


def compile_loss(args: Args, agent: Agent):
    """ppo_loss as one compiled graph, forward and backward, warmed up on zeros so that training time excludes it."""
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++")) and torch.get_default_device().type == "cpu":
        raise Stop("--compile needs a C++ compiler (g++ or clang++) on the PATH: install one, or leave --compile out")
    return torch.compile(ppo_loss, fullgraph=True, dynamic=False)


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder: logs, checkpoints
# ---------------------------------------------------------------------------------------------------------------------

VERSION = 1  # of the checkpoint format
MODES = ("evaluate", "resume", "push")
FREE = (*MODES, "device", "track", "wandb_project_name", "wandb_entity", "repo_id", "private",
        "capture_video")  # fmt: skip
POLICY_FILES = ("hyperparameters.json", "config.json", "model.safetensors")


def named(args: Args) -> Args:
    """The arguments with the run's name filled in."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    return replace(args, run_name=args.run_name or re.sub(r"[^\w.=+-]", "-", name))


def run_folder(args: Args) -> Path:
    return Path(args.resume or Path("runs", args.run_name))


def write_file(path: Path, data: bytes) -> None:
    """All or nothing, even if the machine stops in the middle: a temporary file, then one atomic rename."""
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
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Stop(f"cannot write {path}: {error.strerror}; what was there before is intact", code=1) from None


def write_json(path: Path, data: dict) -> None:
    write_file(path, (json.dumps(data, indent=2) + "\n").encode())


def default_interval(args: Args) -> int:
    """Iterations between checkpoints: each cuts the episodes under way, so that they must stay rare beside them."""
    limit = gym.spec(args.env_id.rpartition(":")[2]).max_episode_steps or 0
    return max(args.num_iterations // 10, math.ceil(5 * limit / args.num_steps), 1)


def settings(device: torch.device, world: int) -> dict[str, Any]:
    """What, besides the arguments, decides the last bit of a result."""
    return {
        "python": platform.python_version(), "torch": str(torch.__version__), "gymnasium": gym.__version__,
        "numpy": np.__version__, "device": device.type, "threads": torch.get_num_threads(), "ranks": world,
    }  # fmt: skip


def open_run(args: Args, device: torch.device, rank: int, world: int) -> tuple[Path, dict[str, Any]]:
    """The run's folder and the state to start from: that of a new run, or the checkpoint that --resume asks for."""
    run = run_folder(args)
    state: dict[str, Any] = {"iteration": 0, "global_step": 0, "seconds": 0.0, "best": {"score": -math.inf}}
    if rank == 0 and args.resume:
        state = load_checkpoint(run)
    elif rank == 0:
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            raise Stop(f"{run} exists: choose another --run-name, or go on with --resume {run}") from None
        except OSError as error:
            raise Stop(f"cannot create {run}: {error.strerror}") from None
        write_json(run / "hyperparameters.json", {k: v for k, v in asdict(args).items() if k not in MODES})
    if rank == 0:
        print(f"run: {run}   preset: {preset(args.env_id)[0] or 'none'}   device: {device}", flush=True)
    if dist.is_initialized():
        dist.broadcast_object_list(shared := [state])
        state = shared[0]
    now, then = settings(device, world), state.get("settings")
    if rank == 0 and then and now != then:
        changed = ", ".join(f"{k} {then.get(k)} -> {now[k]}" for k in now if now[k] != then.get(k))
        print(f"warning: not bit for bit what it would have been: {changed}", file=sys.stderr)
    return run, state | {"settings": now}


def save_checkpoint(run: Path, args: Args, state: dict, agent: Agent, optimizer, generator, writer) -> None:
    """Validate, remember the best agent so far in `state`, and write all that the run needs to go on from here."""
    generators = [generator.get_state()]
    if dist.is_initialized():
        dist.all_gather_object(generators := [None] * dist.get_world_size(), generator.get_state())
        if dist.get_rank() > 0:
            return
    weights = {name: value.detach().cpu().clone() for name, value in agent.state_dict().items()}
    if args.validation_episodes and state["iteration"] > 0:
        returns, _ = evaluate(agent, args, args.validation_episodes, VALIDATION)
        state["last_score"] = float(returns.mean())
    if (last := state.get("last_score", -math.inf)) >= state["best"]["score"]:
        state["best"] = {"score": last, "iteration": state["iteration"], "agent": weights}
    writer.flush()  # a resumed run purges what was logged after its checkpoint, and trusts what was logged before
    buffer = io.BytesIO()
    torch.save(
        state | {"version": VERSION, "agent": weights, "optimizer": optimizer.state_dict(), "generators": generators},
        buffer,
    )
    data = buffer.getvalue()
    write_file(run / f"checkpoint-{state['iteration']:08d}.pt", data + hashlib.sha256(data).digest())
    for old in sorted(run.glob("checkpoint-*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(run: Path) -> dict[str, Any]:
    """The newest undamaged checkpoint of a run. It is data only: torch.load runs no code with weights_only."""
    for path in sorted(run.glob("checkpoint-*.pt"), reverse=True):
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[:-32]).digest() != data[-32:]:
                raise ValueError("its checksum does not match")
            state = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has many ways to fail on bad bytes
            reason = str(error).splitlines()[0]
            print(f"warning: {path} is unusable ({reason}); trying the one before it", file=sys.stderr)
            continue
        if state["version"] > VERSION:
            raise Stop(f"{path} was written by a newer ppo.py (format {state['version']}): resume it with that one")
        return state
    raise Stop(f"{run} has no usable checkpoint: start the run again")


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of the annotated type, and finite."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(conforms(value, h) for h in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, list) and all(conforms(v, inner[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(conforms(v, inner[1]) for v in value.values())
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def load_args(folder: Path) -> Args:
    """The arguments in a run's hyperparameters.json, each checked against its type and range."""
    path = folder / "hyperparameters.json"
    try:
        data = json.loads(path.read_text())
        hints = typing.get_type_hints(Args)
        for name, value in data.items():
            if name not in hints or name in MODES:
                raise ValueError(f"unknown setting {name!r}")
            if not conforms(value, hints[name]):
                raise ValueError(f"{name} cannot be {str(value)[:80]!r}")
        return Args(**{name: tuple(value) if type(value) is list else value for name, value in data.items()})
    except OSError as error:
        raise Stop(f"cannot read {path}: {error.strerror}; is {folder} a run's folder?") from None
    except (ValueError, AttributeError) as error:
        raise Stop(f"refused {path}: {error}") from None


def refuse_changes(saved: Args, args: Args) -> None:
    """A resumed run must be the run that was interrupted: Stop with the differences if it would not be."""
    old, new = asdict(saved), asdict(args)
    changed = [f"{flag(k)} {old[k]} -> {new[k]}" for k in old if old[k] != new[k] and k not in FREE]
    if changed:
        free = ", ".join(flag(k) for k in FREE if k not in MODES)
        raise Stop(f"--resume goes on with the same run, but these differ: {'; '.join(changed)}. May change: {free}")


def open_log(args: Args, run: Path, state: dict, rank: int):
    """TensorBoard writer, progress bar, and the returns of the last 100 episodes; nothing on ranks other than 0."""
    if rank > 0:
        return None, None, None
    if args.track:
        try:
            import wandb
        except ImportError:
            raise Stop("--track needs Weights & Biases: pip install wandb") from None
        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=run.name, id=run.name, dir=run,
                   resume="allow", config=asdict(args), sync_tensorboard=True, save_code=True)  # fmt: skip
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

    resumed = "agent" in state
    writer = SummaryWriter(run, purge_step=state["global_step"] + 1 if resumed else None, flush_secs=10)
    if not resumed:
        rows = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|parameter|value|\n|-|-|\n{rows}")
    bar = tqdm(total=args.total_timesteps, initial=state["global_step"], unit=" steps", unit_scale=True, disable=None)
    return writer, bar, deque(maxlen=100)


def report(writer, bar, recent, args: Args, state: dict, lr: float, losses: dict, steps, done, returns, lengths) -> None:
    """One iteration: each finished episode at the step it ended, then everything else at the last step."""
    for t, i in np.argwhere(done):
        writer.add_scalar("charts/episodic_return", returns[t, i], steps[t])
        writer.add_scalar("charts/episodic_length", lengths[t, i], steps[t])
        recent.append(returns[t, i])
    sps = int(state["global_step"] / state["seconds"])
    charts = {"charts/learning_rate": lr, "charts/SPS": sps} | {f"losses/{k}": v for k, v in losses.items()}
    for name, value in charts.items():
        writer.add_scalar(name, value, state["global_step"])
    mean = f"{np.mean(recent):.1f}" if recent else "none yet"
    bar.set_postfix_str(f"return {mean}", refresh=False)
    bar.update(state["global_step"] - bar.n)
    tenths = [10 * (state["iteration"] + i) // args.num_iterations for i in (0, 1)]
    if bar.disable and tenths[0] != tenths[1]:
        print(f"step {state['global_step']:>10,}   return {mean:>9}   {sps:>7,} steps/s", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(agent: Agent, args: Args, episodes: int, stream: int = EVALUATION, deterministic: bool = True):
    """Returns and lengths, [episodes] each, of the first episode of each of that many fresh environments.

    Seeds follow from args.seed and the stream. Nothing that training draws from is touched. An environment without a
    time limit is cut after 27,000 steps."""
    device = next(agent.parameters()).device
    generator = torch.Generator(device).manual_seed(seeds(args.seed, stream, SAMPLING)[0])
    envs, obs, _ = make_envs(args, seeds(args.seed, stream, n=episodes), training=False)
    returns, lengths, running, noise = np.zeros(episodes), np.zeros(episodes), np.ones(episodes, dtype=bool), 0.0
    while running.any() and lengths.max() < 27_000:
        if not deterministic:
            noise = agent.sample_noise(episodes, generator=generator)
        actions = agent.act(to_torch(obs, device), noise)
        obs, rewards, terminated, truncated, _ = step_envs(envs, actions, int(lengths.max()))
        returns += rewards * running
        lengths += running
        running &= ~(terminated | truncated)
    envs.close()
    return returns, lengths


def record_video(agent: Agent, args: Args, path: Path) -> None:
    """One greedy episode as an H.264 file that browsers and the Hub can play; a failure costs the video only."""
    try:
        if os.environ.get("SDL_VIDEODRIVER") == "":
            del os.environ["SDL_VIDEODRIVER"]
        import imageio_ffmpeg

        envs, obs, _ = make_envs(args, seeds(args.seed, VIDEO), training=False, render=True)
        fps, done, frames, video = envs.metadata.get("render_fps", 15), False, 0, None
        while not done and frames < 3000:
            if args.env_id.startswith("ALE/"):  # its vector environment does not render: the newest of the stack
                image = obs[0, -1].repeat(4, 0).repeat(4, 1)[..., None].repeat(3, 2)
            else:
                image = envs.render()[0]
            if video is None:
                video = imageio_ffmpeg.write_frames(str(path), image.shape[1::-1], fps=fps, macro_block_size=2,
                                                    output_params=["-movflags", "+faststart"])  # fmt: skip
                video.send(None)
            video.send(np.ascontiguousarray(image))
            with torch.inference_mode():
                actions = agent.act(to_torch(obs, next(agent.parameters()).device))
            obs, _, terminated, truncated, _ = step_envs(envs, actions, frames)
            done, frames = bool(terminated[0] | truncated[0]), frames + 1
        video.close()
        envs.close()
    except Exception as error:
        print(f"warning: no video: {type(error).__name__}: {error}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Publishing: what is pushed is what was saved, reloaded and evaluated
# ---------------------------------------------------------------------------------------------------------------------

PLAYED = ("env_id", "env_kwargs", "seed", "hidden_sizes", "activation", "norm_obs", "logstd_init")  # what playing needs
SAFE_KWARGS = ("is_slippery", "continuous", "repeat_action_probability")  # what a stranger may pass to an environment
SIZE_LIMITS = {"hyperparameters.json": 2**16, "config.json": 2**16, "model.safetensors": 2**28}  # bytes
PUBLISHED = (*SIZE_LIMITS, "README.md", "results.json", "replay.mp4", "ppo.py", "requirements.txt", "*.tfevents.*")


@contextlib.contextmanager
def one_line(what: str, remedy: str, code: int = 2):
    """Turn whatever the Hub's client raises, a dozen unrelated types, into one line."""
    try:
        yield
    except Stop:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        reason = reason.replace(str(Path.home()), "~")
        raise Stop(f"{what} failed: {type(error).__name__}: {reason.rstrip('.')}. {remedy}", code) from None


def download(name: str) -> Path:
    """The policy's three files from a Hub repo, `me/name` or `me/name@revision`, all of one commit, size-checked."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    repo_id, _, commit = name.partition("@")
    with one_line(f"downloading {name}", "Is it a run's folder, or a Hub repo that this script pushed?"):
        for file, limit in SIZE_LIMITS.items():
            found = get_hf_file_metadata(hf_hub_url(repo_id, file, revision=commit or None))
            if not found.size or found.size > limit:
                raise Stop(f"refused {name}: {file} has {found.size} bytes, more than {limit}")
            commit = found.commit_hash
            path = hf_hub_download(repo_id, file, revision=commit)
    return Path(path).parent


def policy_folder(name: str) -> tuple[Path, bool]:
    """Where the policy's files are, and whether a stranger made them."""
    if Path(name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", name) or name.startswith("runs/"):
        return Path(name), False
    return download(name), True


def played_args(name: str, env_id: str | None) -> Args:
    """The saved arguments of a policy to play; of a stranger's only what its environment and its network need.

    A stranger's environment must be one that is registered already: making `module:Env-v0` would import the module."""
    folder, stranger = policy_folder(name)
    saved = load_args(folder)
    if not stranger:
        return saved
    if env_id is None:
        if not re.fullmatch(r"([\w-]+/)?\w[\w.-]*-v\d+", saved.env_id, re.ASCII):
            raise Stop(f"refused {name}: its environment is called {saved.env_id!r}; if you trust it, name it: --env-id")
        if saved.env_id.startswith("ALE/"):
            with contextlib.suppress(ImportError):
                gym.register_envs(importlib.import_module("ale_py"))
        if saved.env_id not in gym.registry:
            raise Stop(f"refused {name}: no environment {saved.env_id!r} is registered here; name your own: --env-id")
    if unsafe := set(saved.env_kwargs) - set(SAFE_KWARGS):
        raise Stop(f"refused {name}: it passes {', '.join(sorted(unsafe))} to its environment")
    return Args(**{key: getattr(saved, key) for key in PLAYED})


def load_agent(folder: Path, args: Args) -> Agent:
    """The agent saved in a folder, if its files are just what an agent for this environment has; else Stop."""
    from safetensors import SafetensorError, safe_open

    envs, *_ = make_envs(args, seeds(args.seed, EVALUATION), training=False)
    config = agent_config(args, envs)
    envs.close()
    try:
        if json.loads((folder / "config.json").read_text()) != config:
            raise ValueError(f"config.json does not describe an agent for {args.env_id}")
        with torch.device("meta"):  # shapes without memory
            expected = Agent(**config).state_dict()
        with safe_open(folder / "model.safetensors", "pt") as file:
            if set(file.keys()) != set(expected):
                raise ValueError(f"unexpected tensors {sorted(set(file.keys()) ^ set(expected))[:3]}")
            for name, tensor in expected.items():
                if file.get_slice(name).get_shape() != list(tensor.shape):
                    raise ValueError(f"{name} has shape {file.get_slice(name).get_shape()}, not {list(tensor.shape)}")
            weights = {name: file.get_tensor(name) for name in expected}
        for name, tensor in weights.items():
            if tensor.dtype != expected[name].dtype or not tensor.isfinite().all():
                raise ValueError(f"{name} is {tensor.dtype} or not finite")
    except OSError as error:
        raise Stop(f"cannot read the agent in {folder}: {error.strerror}") from None
    except (ValueError, SafetensorError) as error:
        raise Stop(f"refused the agent in {folder}: {error}") from None
    device = choose_device(args, config)
    agent = Agent(**config)
    agent.load_state_dict(weights)
    return agent.to(device)


def check_hub(args: Args) -> str:
    """The full name of the repo to push to, created if need be: before training, so that no hour is lost to a token."""
    from huggingface_hub import HfApi

    remedy = "Log in with `hf auth login` or set HF_TOKEN to a token with write access; or leave --repo-id out, " \
             "train, and push later: python ppo.py --push runs/<run> --repo-id <repo>"  # fmt: skip
    with one_line(f"access to {args.repo_id}", remedy):
        repo_id = HfApi().create_repo(args.repo_id, private=args.private or None, exist_ok=True).repo_id
        HfApi().auth_check(repo_id, write=True)
    return repo_id


def push(args: Args, run: Path) -> None:
    """One commit with the card and all that it speaks of, replacing what an earlier push left."""
    from huggingface_hub import HfApi

    if not (run / "results.json").exists():
        raise Stop(f"{run} is not finished: python ppo.py --resume {run}")
    if not args.repo_id:
        raise Stop("--push needs --repo-id me/name")
    repo_id = check_hub(args)
    write_file(run / "README.md", model_card(args, run, repo_id).encode())
    retry = f"The run is safe in {run}; try again: python ppo.py --push {run} --repo-id {repo_id}"
    with one_line(f"the push to {repo_id}", retry, code=1):
        url = HfApi().upload_folder(repo_id=repo_id, folder_path=run, commit_message=f"PPO on {args.env_id}",
                                    allow_patterns=list(PUBLISHED), delete_patterns=["*tfevents*", "replay.mp4"])  # fmt: skip
    print(f"pushed: {url}")


def training_command(args: Args) -> str:
    """The command that trains this run: every flag that differs from the preset's."""
    base = Args(env_id=args.env_id, **preset(args.env_id)[1])
    words = ["python", "ppo.py"]
    for name, value in asdict(args).items():
        if name in MODES + ("repo_id", "private", "run_name", "track") or (name != "env_id" and value == getattr(base, name)):
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag("no_" + name))
        else:
            items = [x for pair in value.items() for x in pair] if isinstance(value, dict) else value
            words += [flag(name), *map(str, items if isinstance(items, (list, tuple)) else [items])]
    return shlex.join(words)


def model_card(args: Args, run: Path, repo_id: str | None = None) -> str:
    """README.md of the repo: metadata that the Hub's leaderboards read, then the text for people."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    results = json.loads((run / "results.json").read_text())
    score = "{mean_reward:.2f} +/- {std_reward:.2f}".format(**results)
    name = "reinforcement-learning"
    data = ModelCardData(
        model_name=f"PPO-{args.env_id}", library_name="ppo", pipeline_tag=name,
        tags=[args.env_id, "ppo", "deep-reinforcement-learning", name, "custom-implementation", "deep-rl-course"],
        eval_results=[EvalResult(task_type=name, task_name=name, dataset_type=args.env_id, dataset_name=args.env_id,
                                 metric_type="mean_reward", metric_name="mean_reward", metric_value=score)],
    )  # fmt: skip
    rows = "\n".join(f"| `{k}` | {v} |" for k, v in asdict(args).items() if k not in FREE)
    setting = ", ".join(f"{k} {v}" for k, v in results["settings"].items())
    source = repo_id or run
    text = f"""
# PPO agent playing {args.env_id}

An agent trained with proximal policy optimization by `ppo.py`, one self-contained PyTorch file, which is in this repo.

| policy | mean return | episodes |
|---|---|---|
| {"greedy" if results["deterministic"] else "sampled"} | **{score}** | {results["n_evaluation_episodes"]} |
| {"sampled" if results["deterministic"] else "greedy"} | {results["other_mean_reward"]:.2f} +/- {results["other_std_reward"]:.2f} | {results["n_evaluation_episodes"]} |

Each episode is the first of a fresh environment; their seeds follow from seed {args.seed} and are used nowhere else.
Published are the weights of the {results["published"]}.

Returns while it learned, over {results["global_step"]:,} steps: `{sparkline(run)}`

## Play it

```bash
pip install -r requirements.txt
python ppo.py --evaluate {source} --capture-video
```

```python
from ppo import Agent

agent = Agent.from_pretrained("{source}", strict=True)  # agent.act(obs) is the greedy action
```

## Train it

```bash
{training_command(args)}
```

It took {results["training_seconds"]:.0f} seconds with {setting}, {results["cores"]} cores, {results["machine"]}.

| hyperparameter | value |
|---|---|
{rows}
"""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def sparkline(run: Path, width: int = 40) -> str:
    """The learning curve from the run's own logs, in characters."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    if "charts/episodic_return" not in log.Tags()["scalars"]:
        return "(no episode ended)"
    values = [event.value for event in log.Scalars("charts/episodic_return")]
    means = np.array([part.mean() for part in np.array_split(values, min(width, len(values)))])
    heights = np.interp(means, (means.min(), means.max()), (0, 7)) if np.ptp(means) else np.zeros(len(means))
    return "".join("▁▂▃▄▅▆▇█"[int(round(h))] for h in heights) + f" {means[0]:.1f} to {means[-1]:.1f}"


def play(args: Args, folder: Path, agent: Agent) -> dict[str, Any]:
    """Evaluate, print the score and, if asked for, leave a video."""
    returns, lengths = evaluate(agent, args, args.eval_episodes, EVALUATION, args.deterministic)
    how = "greedy" if args.deterministic else "sampled"
    print(f"{args.env_id}: {returns.mean():.2f} +/- {returns.std():.2f} over {len(returns)} {how} episodes")
    if args.capture_video:
        record_video(agent, args, folder / "replay.mp4")
    return {
        "env_id": args.env_id, "mean_reward": float(returns.mean()), "std_reward": float(returns.std()),
        "n_evaluation_episodes": len(returns), "eval_datetime": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "deterministic": args.deterministic, "seed": args.seed, "episode_returns": returns.tolist(),
        "episode_lengths": lengths.tolist(),
    }  # fmt: skip


def finish(args: Args, run: Path) -> None:
    """After training: evaluate the agent that was saved, and leave results, card and all that a push needs."""
    agent, state = load_agent(run, args), load_checkpoint(run)
    results = play(args, run, agent)
    other, _ = evaluate(agent, args, args.eval_episodes, EVALUATION, not args.deterministic)
    best = state["best"]
    last = best["iteration"] == state["iteration"]
    results |= {
        "other_mean_reward": float(other.mean()), "other_std_reward": float(other.std()),
        "total_timesteps": args.total_timesteps, "global_step": state["global_step"],
        "training_seconds": state["seconds"], "settings": state["settings"], "machine": platform.machine(),
        "cores": os.cpu_count(),
        "published": "last checkpoint" if last else f"best checkpoint, at iteration {best['iteration']}",
        "validation": {"best": best["score"], "last": state.get("last_score")} if args.validation_episodes else None,
    }  # fmt: skip
    here = Path(__file__).parent
    for file in ("ppo.py", "requirements.txt"):
        if (here / file).exists():
            write_file(run / file, (here / file).read_bytes())
    for path in run.glob("events.out.tfevents.*"):  # TensorBoard puts the host's name into theirs
        path.rename(path.with_name(re.sub(r"(tfevents\.\d+)\..*?\.(\d+\.\d+)$", r"\1.\2", path.name)))
    write_json(run / "results.json", results)
    write_file(run / "README.md", model_card(args, run, args.repo_id).encode())


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def on_signal(signum: int, _) -> None:
    """The first Ctrl-C or SIGTERM stops cleanly, the second at once."""
    signal.signal(signum, signal.SIG_DFL)
    raise KeyboardInterrupt(signum)


def main(argv: list[str] | None = None) -> int:
    """Do what the flags say; the exit code. 2 is for what can be known before training, 1 for what failed later."""
    run = None
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        args = parse_args(argv)
        if args.evaluate:
            folder, stranger = policy_folder(args.evaluate)
            agent = load_agent(folder, args)
            if stranger and args.capture_video:
                folder = Path("runs", re.sub(r"[^\w.-]", "--", args.evaluate))
                folder.mkdir(parents=True, exist_ok=True)
            play(args, folder, agent)
        elif args.push:
            push(args, Path(args.push))
        else:
            first_rank = os.environ.get("RANK", "0") == "0"
            if args.repo_id and first_rank:
                args = replace(args, repo_id=check_hub(args))
            args = named(args)
            run = run_folder(args)
            train(args)
            if dist.is_initialized():
                dist.destroy_process_group()
            if first_rank:
                finish(args, run)
                if args.repo_id:
                    push(args, run)
                print(f"run: {run}")
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt as interrupt:
        hint = f"; go on with: python ppo.py --resume {run}" if run and list(run.glob("checkpoint-*")) else ""
        print(f"\nstopped{hint}", file=sys.stderr)
        return 128 + (interrupt.args or (signal.SIGINT,))[0]
    except Exception as error:
        if run and list(run.glob("checkpoint-*")):
            error.add_note(f"The last checkpoint is safe; go on with: python ppo.py --resume {run}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
