# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[box2d,classic-control]==1.4.0",
#     "numpy==2.4.6",
#     "tensorboard==2.21.0",
#     "tyro==1.0.17",
#     "huggingface_hub==2.4.0",
#     "safetensors==0.8.0",
#     "imageio[ffmpeg]==2.38.1",
#     "matplotlib==3.11.2",
#     "tqdm==4.70.1",
# ]
# ///
"""Proximal Policy Optimization (PPO) in one file: train, watch, evaluate, resume, share.

    python ppo.py                                               # CartPole-v1, solved within seconds
    python ppo.py --resume runs/<run>                           # go on after a crash, bit for bit
    python ppo.py --env-id LunarLander-v3 --repo-id me/lander   # train, evaluate, film, push to the Hub
    torchrun --nproc-per-node 2 ppo.py --env-id LunarLander-v3  # one run, split over two processes

Letters are those of Schulman et al., as the settings name them: "PPO" is arXiv:1707.06347, "GAE" arXiv:1506.02438;
theta are all parameters, in one vector; a minibatch has M rows, and shapes [M, ...].

    obs [T+1, N, D], actions [T, N, *action_shape], values of obs [T+1, N], the rest [T, N]

An episode's end in a rollout. Gymnasium spends a step on the reset: row 2 is a reset row: no transition, not learned.

    t               0     1     2     3     4
    obs[t]          o0    o1    o2    p0    p1     o2 is the true last observation of the episode
    rewards[t]      r0    r1    0     q0    q1
    terminated[t]   no    yes   no    no    no     nothing follows r1; truncated: no, and gamma V(o2) does
    done[t]         no    yes   no    no    no     the episode is over: no advantage flows back from row 2
    valid[t]        yes   yes   no    yes   yes    whether row t is a transition

[core 7] is the seventh core detail of "The 37 Implementation Details of PPO" (Huang et al. 2022).
runs/reference/details.md: where this page departs from the paper and other scripts.
"""

import ast
import contextlib
import copy
import fnmatch
import hashlib
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial, reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints
from unittest import mock

if sys.version_info[1] < 11:
    sys.exit("error: Python 3.11 to 3.13 only")

import gymnasium as gym
import huggingface_hub as hub
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import tyro
from filelock import FileLock
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from huggingface_hub.dataclasses import type_validator
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.adam import adam
from tqdm import tqdm

Json = dict[str, Any]

# ---- Settings: each is a flag ------------------------------------------------
Count = Annotated[int, "1 or more", lambda x: x >= 1]  # a type, its range in words, its range
Natural = Annotated[int, "0 or more", lambda x: x >= 0]
Positive = Annotated[float, "above 0 and finite", lambda x: 0 < float(x) < math.inf]
Weight = Annotated[float, "0 or more, and finite", lambda x: 0 <= x < math.inf]
Fraction = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Options = Annotated[dict[str, Any], "", lambda x: True, tyro.constructors.PrimitiveConstructorSpec(
    "*", "NAME VALUE ...", lambda words: {a: read_option(b) for a, b in zip(words[::2], words[1::2], strict=True)},
    lambda x: True, lambda x: [], _action="append")]  # fmt: skip
Name = Annotated[str, "one plain folder name", lambda x: re.fullmatch(r"(\w[\w.=+-]*)?", x)]
Sizes = Annotated[tuple[int, ...], "1 or more each", lambda x: min(x, default=1) >= 1]


@dataclass(frozen=True)
class Args:
    """Train a PPO agent; or evaluate, resume or push one. Defaults are the preset that fits the environment."""

    # Where the agent acts
    env_id: str = "CartPole-v1"  # Gymnasium id; `my_module:MyEnv-v0` imports your own module first
    env_kwargs: Options = field(default_factory=dict)  # its options: `is_slippery False map_name 8x8`
    preset: str = ""  # a name in PRESETS; else what fits the world
    num_envs: Count = 4  # N, environments side by side
    vectorization: Literal["auto", "sync", "async"] = "auto"  # auto: the environment's own, else sync
    frame_stack: Count = 1  # see the last so many observations at once
    rescale_actions: bool = True  # stretch continuous actions from [-1, 1] to the bounds of their Box
    action_masks: bool = True  # never choose what the environment forbids, where it tells
    episodic_life: bool = False  # a lost life counts as a termination
    clip_reward: bool = False  # learn from the sign of the reward only
    norm_reward: bool = False  # divide rewards by the running deviation of their discounted sum
    # How it learns
    total_timesteps: Positive = 500_000  # of all environments, resets counted
    num_steps: Annotated[int, "2 or more: one could be all resets", lambda x: x >= 2] = 128  # T; 32 to 2048
    update_epochs: Count = 4  # K, passes over each rollout; 3 to 20
    num_minibatches: Count = 4  # per epoch, of M = N T / num_minibatches rows
    learning_rate: Positive = 2.5e-4  # Adam's step size; 1e-4 to 3e-3
    anneal_lr: bool = True  # lower it, or its bound by --desired-kl, linearly to zero
    gamma: Fraction = 0.99  # discount; 0.9 to 0.999
    gae_lambda: Fraction = 0.95  # lambda of GAE, from bias (0) to variance (1); 0.8 to 0.99
    clip_coef: Positive = 0.2  # epsilon of the clipped objective; 0.1 to 0.3
    clip_vloss: bool = True  # clip the value loss with the same epsilon
    norm_adv: bool = True  # standardise the advantages of each minibatch
    ent_coef: Weight = 0.01  # c2, weight of the entropy bonus; 0 to 0.02
    vf_coef: Weight = 0.5  # 2 c1, weight of the value loss
    max_grad_norm: Positive = 0.5  # global norm that gradients are clipped to
    target_kl: Weight = 0.0  # skip the epochs after one whose mean KL exceeds this; 0: off, or 0.01 to 0.05
    desired_kl: Weight = 0.0  # keep the KL of an epoch near this, by up to 10 times the rate; 0: off, or 0.01
    # What learns
    hidden_sizes: Sizes = (64, 64)  # layers of actor and critic (images: of the heads on the CNN)
    activation: Literal["tanh", "relu"] = "tanh"  # between those layers
    lstm_hidden_size: Natural = 0  # units of memory below the heads; 0, or 64 to 512
    norm_obs: bool = False  # standardise vectors by their running mean and variance
    logstd_init: Annotated[float, "finite", math.isfinite] = 0.0  # log deviation of continuous actions, at first
    # How it is scored
    validation_episodes: Natural = 10  # at each checkpoint, to keep the best agent
    eval_episodes: Count = 100  # at the end
    deterministic: bool = True  # score and film the mode; --no-deterministic samples
    capture_video: bool = False  # leave replay.mp4, one episode; with --repo-id always
    # What a run is called, begins with and leaves
    run_name: Name = ""  # folder under runs/; if not given {env_id}__ppo__{seed}__{time}
    evaluate: str | None = None  # play the agent of a run's folder or a Hub repo (me/name, me/name@revision)
    init_from: str | None = None  # start a new run with such an agent, and its settings
    resume: str | None = None  # go on from a run's last checkpoint; once finished, push it
    repo_id: str | None = None  # Hub repo to push to; `hf auth login` or HF_TOKEN
    # What it runs on
    seed: Natural = 1  # of all that is random
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU for images and wide networks, else the CPU
    compile: bool = False  # compile the loss and its gradient; pays off in long runs
    checkpoint_every: Natural = 0  # iterations; 0: a tenth of the run, or more

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        return int(self.total_timesteps // self.batch_size)

    @property
    def plain_id(self) -> str:
        return self.env_id.rpartition(":")[2]

    @property
    def run(self) -> Path:
        return Path(self.resume or f"runs/{self.run_name}").expanduser()


# ---- The agent: policy and value function ------------------------------------
@dataclass
class Categorical:
    """Independent choices, nvec[i] in the i-th component of an action."""

    logits: Tensor  # of all components, [..., sum(nvec)]
    nvec: list[int]

    def choose(self, noise: Tensor | float) -> Tensor:  # [..., len(nvec)]
        noisy = self.logits + noise
        if len(self.nvec) == 1:
            return noisy.argmax(-1, keepdim=True)
        return torch.stack([part.argmax(-1) for part in noisy.split(self.nvec, -1)], -1)

    def logprob_and_entropy(self, action: Tensor):  # [...] each
        logprob, entropy = 0, 0
        parts = zip(self.logits.split(self.nvec, -1), action.split(1, -1))
        for logits, chosen in parts:  # both add up [MultiDiscrete 1]
            logp = logits.log_softmax(-1)
            logprob += logp.gather(-1, chosen).squeeze(-1)
            entropy -= (logp.exp() * logp).sum(-1)
        return logprob, entropy


@dataclass
class Gaussian:
    """A normal distribution for each dimension of an action [continuous 1], [..., dimensions]."""

    mean: Tensor
    logstd: Tensor  # [dimensions], whatever the observation [continuous 2]

    def choose(self, noise: Tensor | float) -> Tensor:  # [..., dimensions]
        return self.mean + self.logstd.exp() * noise

    def logprob_and_entropy(self, action: Tensor):  # [...] each
        z = (action - self.mean) * (-self.logstd).exp()
        logprob = -0.5 * z**2 - self.logstd - 0.5 * math.log(2 * math.pi)
        entropy = self.logstd + 0.5 * math.log(2 * math.pi * math.e)
        return logprob.sum(-1), entropy.expand_as(z).sum(-1)  # over dimensions [continuous 3]


class Agent(nn.Module, hub.PyTorchModelHubMixin):
    """All that is needed to act: weights and statistics.
    Vectors go through an actor's and a critic's MLP [core 13, continuous 4], images through a CNN
    below both [Atari 8]. What a row of D numbers and an action consist of is told by `describe`;
    with `masks`, a row ends with a number for each choice: 1 where it is allowed. All is JSON."""

    episode: Tensor | None  # the state of an LSTM, for `predict`

    def __init__(self, parts: list[Json], action: Json, masks: str | None = None, **settings):
        super().__init__()
        self.parts, self.action, self.masks = parts, action, masks
        self.settings = args = Args(**settings)
        self.nvec, self.action_shape = action.get("nvec"), action["shape"]
        self.outputs = sum(self.nvec) if self.nvec else math.prod(self.action_shape)
        numbers = sum(part["width"] for part in parts)
        self.width = numbers + (self.outputs if masks else 0)  # D
        self.obs_stats = RunningMeanStd((numbers,) if args.norm_obs else ())
        self.return_stats = RunningMeanStd(())

        self.trunk = Senses(parts)
        features, units = self.trunk.features, args.lstm_hidden_size
        self.memory = Memory(features, units) if units else None
        features = units or features
        self.actor = mlp([features, *args.hidden_sizes, self.outputs], args.activation, gain=0.01)  # near uniform
        self.critic = mlp([features, *args.hidden_sizes, 1], args.activation, gain=1.0)
        if not self.nvec:
            self.logstd = nn.Parameter(torch.full((self.outputs,), float(args.logstd_init)))
        self.reset()

    def encode(self, obs: Tensor) -> Tensor:  # [..., D] -> [..., features]
        if self.masks:
            obs = obs[..., : -self.outputs]
        if self.settings.norm_obs:  # [continuous 6, 7]
            obs = (obs.double() - self.obs_stats.mean) / self.obs_stats.std
            obs = obs.float().clamp(-10, 10)
        return self.trunk(obs)

    def policy(self, features: Tensor, obs: Tensor) -> Categorical | Gaussian:
        """pi(. | s), for acting and for learning alike."""
        out = self.actor(features)
        if self.masks:  # what is forbidden has probability 0, and no gradient
            forbidden = obs[..., -self.outputs :] == 0
            out = out.masked_fill(forbidden, torch.finfo(out.dtype).min)
        return Categorical(out, self.nvec) if self.nvec else Gaussian(out, self.logstd)

    def act(self, obs: Tensor, noise: Tensor | float = 0.0, memory: Tensor | None = None) -> Tensor:
        """The action that this noise selects, [..., *action_shape]; without noise the mode.
        A policy that remembers reads the memory, [2, N, units], and writes it anew."""
        features = self.encode(obs)
        if self.memory:
            features = self.memory.step(features, memory)
        action = self.policy(features, obs).choose(noise)
        return action.view((*action.shape[:-1], *self.action_shape))

    def predict(self, obs: Any, deterministic: bool = True, mask: Any = None) -> np.ndarray:
        """What `env.step` takes for what it showed, in NumPy; a batch for a batch."""
        return predict(self, obs, deterministic, mask)

    def reset(self) -> None:  # an episode begins
        self.episode = None

    def sample_noise(self, *shape: int) -> Tensor:
        """What makes `act` sample, [*shape, outputs]; Gumbel noise for choices: its argmax is a softmax's sample."""
        x = torch.empty(*shape, self.outputs, device=self.device)
        return -x.exponential_().log() if self.nvec else x.normal_()

    def replay(self, x: "Rollout | Batch") -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and values; a rollout's obs[T] has no action."""
        obs, features = x.obs, self.encode(x.obs)
        if self.memory:
            obs, features = self.memory(features, x)
        acted = features[: len(x.actions)]
        actions = x.actions.reshape(*acted.shape[:-1], -1)
        policy = self.policy(acted, obs[: len(actions)])
        return *policy.logprob_and_entropy(actions), self.critic(features).squeeze(-1)

    @property
    def device(self) -> torch.device:
        return self.return_stats.mean.device


def mlp(sizes: list[int], activation: str, gain: float) -> nn.Sequential:
    """Linear layers of these sizes; `gain` is that of the last."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:-1]):
        layers += [layer_init(nn.Linear(a, b)), nn.Tanh() if activation == "tanh" else nn.ReLU()]
    return Layers(*layers, layer_init(nn.Linear(*sizes[-2:]), gain))


class Layers(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer.forward(x)  # without hooks: faster
        return x


def layer_init(layer, gain: float = math.sqrt(2)):
    """Orthogonal weights, zero biases [core 2]."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


# ---- The mathematics of PPO: tensors in, tensors out -------------------------
def compute_gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimation [core 5], GAE Eq. 16, [T, N], from values [T+1, N].
    After a termination no value is to come, after a truncation that of the last observation."""
    delta = (rewards + gamma * values[1:] * ~terminated - values[:-1]).unbind()  # PPO Eq. 12
    over = terminated | done  # a lost life is no done
    decay = (gamma * gae_lambda * (~over).to(values.dtype)).unbind()
    advantages = [delta[-1]]
    for t in reversed(range(len(delta) - 1)):
        advantages.append(delta[t] + decay[t] * advantages[-1])  # PPO Eq. 11
    return torch.stack(advantages[::-1])


def policy_loss(logratio: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """The clipped surrogate objective [core 8], PPO Eq. 7, negated."""
    ratio = logratio.exp()  # r(theta), PPO Eq. 6, from log pi(a|s) - log pi_old(a|s)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def value_loss(new: Tensor, old: Tensor, returns: Tensor, epsilon: float | None) -> Tensor:
    """Half the squared error; with epsilon the larger of that of `new` and of it clipped about `old`."""
    error = (new - returns) ** 2
    if epsilon is not None:  # [core 9]
        clipped = old + (new - old).clamp(-epsilon, epsilon)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error.mean()


def policy_change(logratio: Tensor, epsilon: float) -> dict[str, Tensor]:
    """How far pi has left pi_old [core 12]: KL(pi_old || pi), twice, and how often ratios are clipped."""
    ratio = logratio.exp()
    return {
        "old_approx_kl": -logratio.mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),  # k3 of joschu.net/blog/kl-approx
        "clipfrac": ((ratio - 1).abs() > epsilon).float().mean(),
    }


def follow_kl(lr: float, kl: float, desired: float, highest: float) -> float:
    """The next learning rate: smaller after too large a KL, larger after too small a one."""
    if kl > 2 * desired:
        lr /= 1.5
    elif kl < desired / 2:  # as it stays once a policy is certain: hence a bound
        lr *= 1.5
    return min(max(lr, highest / 1000), highest)


def standardize(x: Tensor) -> Tensor:
    """Zero mean and unit variance along the last axis, over all ranks, of as many rows each."""
    means = torch.stack([x.double().mean(-1), x.double().square().mean(-1)])
    mean, square = (rank_sum(means) / RANKS).unsqueeze(-1)
    deviation = (square - mean**2).clamp(0).sqrt()
    return ((x - mean) / (deviation + 1e-8)).float()


def clip_norm(gradient: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The gradient, shortened if its norm exceeds the limit [core 11]; and that norm."""
    norm = gradient.norm()
    return gradient * (limit / (norm + 1e-6)).clamp(max=1), norm


# ---- Collect, estimate, optimise: Algorithm 1 --------------------------------
@dataclass
class Rollout:
    """T steps in N environments, row by row as in the drawing at the top."""

    obs: Tensor  # [T+1, N, D]
    actions: Tensor  # [T, N, *action_shape]
    rewards: np.ndarray  # [T, N], as the rest
    terminated: np.ndarray
    done: np.ndarray
    valid: np.ndarray
    memory: Tensor  # [2, N, units], as it was before the first row

    @classmethod
    def empty(cls, agent: Agent, worlds: "Worlds", T: int) -> "Rollout":
        N, device = len(worlds.obs), agent.device
        obs = to_torch(worlds.obs, device).new_zeros(T + 1, N, agent.width)
        action_type = torch.int64 if agent.nvec else torch.float32
        actions = torch.zeros(T, N, *agent.action_shape, dtype=action_type, device=device)
        arrays = np.zeros((T, N)), *np.zeros((3, T, N), dtype=bool)
        return cls(obs, actions, *arrays, worlds.memory.to(device, copy=True))


@torch.inference_mode()
def collect(agent: Agent, worlds: "Worlds", rollout: Rollout) -> None:
    """Run the policy in N environments for T steps [core 1]; all else can wait for `estimate`."""
    T, N = rollout.rewards.shape
    noise, device = agent.sample_noise(T, N), agent.device
    rollout.memory.copy_(worlds.memory)
    for t in range(T):
        rollout.obs[t] = to_torch(worlds.obs, device)
        rollout.valid[t] = ~worlds.done  # a reset row shows an episode's last observation
        rollout.actions[t] = agent.act(rollout.obs[t], noise[t], worlds.memory)  # writes the memory
        rollout.rewards[t], rollout.terminated[t], rollout.done[t] = worlds.step(rollout.actions[t])
    rollout.obs[T] = to_torch(worlds.obs, device)


@dataclass
class Batch:
    """What is learned from, [T, N, ...] or, of a minibatch, [M, ...]."""

    obs: Tensor
    actions: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    # To remember: obs [T, n, D] is all that n environments showed, the rest of these rows among T n
    rows: Tensor | None = None
    valid: Any = None  # [T, n]
    memory: Any = None  # [2, n, units]

    def __getitem__(self, rows) -> "Batch":
        return Batch(*(column[rows] for column in vars(self).values() if column is not None))


@torch.no_grad()  # no inference_mode: the loss needs these numbers
def estimate(agent: Agent, rollout: Rollout, args: Args) -> Batch:
    """All that is learned from; theta is theta_old now."""
    T, device = len(rollout.actions), agent.device
    logprobs, _, values = agent.replay(rollout)  # [T, N], values [T+1, N]

    scaled = rollout.rewards
    if args.clip_reward:  # [Atari 6]
        scaled = np.sign(scaled)
    if args.norm_reward:  # [continuous 8, 9]
        scaled = (scaled / agent.return_stats.std.item()).clip(-10, 10)
    rewards = to_torch(scaled.astype(np.float32), device)
    terminated, done = to_torch(rollout.terminated, device), to_torch(rollout.done, device)
    advantages = compute_gae(rewards, values, terminated, done, args.gamma, args.gae_lambda)
    returns = advantages + values[:T]  # V^targ of PPO Eq. 9
    return Batch(rollout.obs[:T], rollout.actions, logprobs, values[:T], advantages, returns)


def minibatches(batch: Batch, rollout: Rollout, args: Args) -> Iterator[Batch]:
    """One epoch: the valid rows in a new order, M at a time [core 6]; LSTM: of M / T environments [LSTM 4]."""
    groups: Any = [slice(None)]  # of environments
    if args.lstm_hidden_size:
        groups = torch.randperm(rollout.valid.shape[1]).view(args.num_minibatches, -1).numpy()
    for envs in groups:
        part, valid = batch[:, envs], rollout.valid[:, envs]
        rows = shuffle(valid, batch.obs.device).view(args.num_minibatches // len(groups), -1)
        drawn = part[rows // valid.shape[1], rows % valid.shape[1]]  # [minibatches, M, ...]
        if args.norm_adv:  # [core 7]
            drawn.advantages = standardize(drawn.advantages)
        for m in range(len(rows)):
            minibatch = drawn[m]
            if args.lstm_hidden_size:
                minibatch.obs, minibatch.rows = part.obs, rows[m]
                minibatch.valid, minibatch.memory = valid, rollout.memory[:, envs]
            yield minibatch


def shuffle(valid: np.ndarray, device: torch.device) -> Tensor:
    """The valid rows in a new order, repeated to make up for resets: [valid.size]."""
    rows = to_torch(np.flatnonzero(valid), device)
    order = torch.randperm(len(rows), device=device)
    return rows[order].repeat(math.ceil(valid.size / len(rows)))[: valid.size]


def compute_gradient(agent: Agent, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient of the objective, PPO Eq. 9, negated; and what the logs tell of it."""
    logprobs, entropies, values = agent.replay(batch)
    logratio = logprobs - batch.logprobs
    epsilon = args.clip_coef
    pg_loss = policy_loss(logratio, batch.advantages, epsilon)
    v_loss = value_loss(values, batch.values, batch.returns, epsilon if args.clip_vloss else None)
    entropy = entropies.mean()
    loss = pg_loss + args.vf_coef * v_loss - args.ent_coef * entropy  # [core 10]
    gradients = torch.autograd.grad(loss, list(agent.parameters()))
    metrics = {
        "policy_loss": pg_loss.detach(),
        "value_loss": v_loss.detach(),
        "entropy": entropy.detach(),
        **policy_change(logratio.detach(), epsilon),
    }
    return torch.cat([g.flatten() for g in gradients]), metrics


def train(args: Args) -> "State":
    """PPO, Algorithm 1, from the start or from a checkpoint."""
    state = open_run(args)
    agent, optimizer = state.agent, state.optimizer
    gradient_fn = compile_gradient(agent) if args.compile else compute_gradient
    T, N = args.num_steps, args.num_envs // RANKS
    log = state.log = Log(state) if RANK == 0 else Silence()

    for leg in legs(state):
        # Environments can't be saved: every run makes new ones, and seeds all that is random, so a resumed one
        # repeats the uninterrupted one. Episodes under way are cut: bootstrapped, not logged.
        env_seeds = seeds(args.seed, TRAINING, RANK, leg.start, n=N)
        worlds = Worlds(args, env_seeds, leg.start * T)
        rollout = Rollout.empty(agent, worlds, T)
        torch.manual_seed(seeds(args.seed, SAMPLING, RANK, leg.start)[0])
        for iteration in leg:
            started = time.perf_counter()
            annealed = args.learning_rate * (1 - iteration / args.num_iterations * args.anneal_lr)  # [core 4]
            if not args.desired_kl:
                state.learning_rate = annealed

            collect(agent, worlds, rollout)  # run pi_old in N environments for T steps
            batch = estimate(agent, rollout, args)  # advantages A_1, ..., A_T

            # Optimise the surrogate with respect to theta, in K epochs of minibatches of M rows
            priming = iteration == 0 and (args.norm_obs or args.norm_reward)  # a rollout for the statistics
            for _ in range(0 if priming else args.update_epochs):
                kl = torch.zeros((), device=agent.device)  # mean over the epoch
                for minibatch in minibatches(batch, rollout, args):
                    gradient, metrics = gradient_fn(agent, minibatch, args)
                    gradient, metrics = mean_over_ranks(gradient, metrics)
                    gradient, metrics["gradient_norm"] = clip_norm(gradient, args.max_grad_norm)
                    check_finite(metrics, iteration)
                    optimizer.step(gradient, state.learning_rate)
                    kl += metrics["approx_kl"] / args.num_minibatches
                    log.add(metrics)
                if args.desired_kl:
                    state.learning_rate = follow_kl(state.learning_rate, kl.item(), args.desired_kl, 10 * annealed)
                if args.target_kl and kl > args.target_kl:
                    break

            update_statistics(agent, worlds, rollout)
            steps, ended = rank_sum(torch.tensor([rollout.valid.sum(), rollout.done.sum()])).tolist()
            state.global_step += steps  # without reset rows
            state.ended += ended
            state.seconds += time.perf_counter() - started
            log.write(iteration, rollout, worlds, batch)

        worlds.envs.close()
        state.iteration = leg.stop
        state.score = validate(agent, args)
        log.flush("eval/validation", state.score)
        state.checkpoint()
    return state


# ---- Memory: what an observation does not show -------------------------------
class Memory(nn.LSTM):
    """An LSTM between encoder and heads. Its state, h and c, is [2, N, units]; `Worlds.step` erases it."""

    def __init__(self, features: int, units: int):
        super().__init__(features, units)
        for name, x in self.named_parameters():  # [LSTM 1]
            nn.init.zeros_(x) if "bias" in name else nn.init.orthogonal_(x)

    def step(self, features: Tensor, memory: Tensor) -> Tensor:
        """One step, [N, features] to [N, units], or of one environment; `memory` is written anew."""
        state = memory.to(features.device).split(1)
        out, state = super().forward(features.reshape(1, -1, self.input_size), state)
        memory.copy_(torch.cat(state))
        return out.view(*features.shape[:-1], -1)

    def forward(self, features: Tensor, x: "Rollout | Batch") -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Observations and features of all steps again [LSTM 5]; of a minibatch, at its rows.
        Each episode is a sequence; it begins at zero [LSTM 2] or, at the first row, as the rollout began."""
        T, N, _ = features.shape  # a rollout's T here counts obs[T], too
        first = torch.ones(T, N, dtype=torch.bool, device=features.device)
        first[1:] = ~to_torch(x.valid, features.device)[: T - 1]  # the row after a reset
        begins = first.T.flatten().nonzero().squeeze(1)  # one environment after the other
        lengths = begins.diff(append=begins.new_tensor([T * N]))
        episodes = features.transpose(0, 1).flatten(0, 1).split(lengths.tolist())
        sequences = nn.utils.rnn.pad_sequence(episodes)  # [longest, number, features]
        state = sequences.new_zeros(2, len(begins), self.hidden_size)
        state[:, begins % T == 0] = x.memory
        out, _ = super().forward(sequences, tuple(state.split(1)))
        inside = torch.arange(len(out), device=begins.device) < lengths.unsqueeze(1)  # not padding
        out = out.transpose(0, 1)[inside].view(N, T, -1).transpose(0, 1)
        rows = getattr(x, "rows", None)
        return (x.obs, out) if rows is None else (x.obs.flatten(0, 1)[rows], out.flatten(0, 1)[rows])


# ---- Spaces: observations as rows of numbers, actions, images ----------------
def describe(space: gym.Space, *path: str | int) -> list[Json]:
    """The parts of a space, as JSON: where each stands, its kind, its shape."""
    shape = list(space.shape or ())
    part = {"path": list(path), "kind": "numbers", "shape": shape, "width": math.prod(shape)}
    match space:
        case spaces.Dict() | spaces.Tuple():
            keys: Any = space if isinstance(space, spaces.Dict) else range(len(space))
            return [part for key in keys for part in describe(space[key], *path, key)]
        case spaces.Discrete(n=nvec) | spaces.MultiDiscrete(nvec=nvec):
            nvec = np.ravel(nvec).tolist()
            return [part | {"kind": "choices", "nvec": nvec, "start": space.start.tolist(), "width": sum(nvec)}]
        case spaces.Box() if white := find_white(space):
            if sorted(shape)[-2] > 160:
                print_once(f"images of {shape} are slow: use gymnasium.wrappers.ResizeObservation")
            return [part | {"kind": "pixels", "white": white, "bytes": space.dtype == np.uint8}]
        case spaces.Box() | spaces.MultiBinary():
            if len(shape) > 2:
                print_once(f"no image: {space}; it takes 5 x 5 pixels, up to 255")
            return [part]
    if path:
        print_once(f"not seen: {'/'.join(map(str, path))}, {type(space).__name__}")
    return []


def describe_action(space: gym.Space, rescale: bool) -> Json:
    """A part and its type; of a Box also the bounds, and how [-1, 1] is stretched to them."""
    more: Json = {"type": str(space.dtype)}
    match space:
        case spaces.Discrete() | spaces.MultiDiscrete():
            pass
        case spaces.MultiBinary():
            more |= {"nvec": [2] * math.prod(space.shape), "start": 0}
        case spaces.Box() if space.dtype.kind == "f" and math.prod(space.shape):
            low, high = np.array([space.low, space.high], float).clip(-1e38, 1e38)
            finite = rescale & (high - low < 1e37)
            center = np.where(finite, (low + high) / 2, 0)
            scale = np.where(finite, (high - low) / 2, 1)
            more["box"] = np.array([low, high, center, scale]).tolist()
        case _:
            raise Stop(f"actions are {space}, not Discrete, MultiDiscrete, MultiBinary or Box of floats")
    return describe(space)[0] | more


def to_rows(obs: Any, parts: list[Json]) -> np.ndarray:
    """Observations as [..., D]: choices become one-hot; an image alone keeps its bytes."""
    columns = []
    for part in parts:
        x, shape = np.asarray(reduce(getitem, part["path"], obs)), part["shape"]
        lead = x.shape[: x.ndim - len(shape)]
        if list(x.shape[len(lead) :]) != shape:
            raise ValueError(f"observations have shape {shape}, batches one axis more; got {list(x.shape)}")
        x = x.reshape(*lead, -1)
        if part["kind"] == "choices":
            chosen = (x - np.ravel(part["start"])).repeat(part["nvec"], -1)
            x = chosen == np.concatenate([np.arange(n) for n in part["nvec"]])
        columns.append(x)
    if len(parts) == 1 and part.get("bytes"):
        return x
    with np.errstate(over="ignore"):  # then they are inf: see Worlds.see
        return np.concatenate(columns, -1).astype(np.float32, copy=False)


def to_env(actions: Tensor, action: Json) -> np.ndarray:
    """What the environment takes; cut to the bounds of a Box [continuous 5] only here: what was chosen is learned."""
    choice = actions.cpu().numpy()
    if "nvec" in action:
        choice = choice + action["start"]
    else:
        low, high, center, scale = np.array(action["box"])
        choice = (center + scale * choice).clip(low, high)
    return choice.astype(action["type"], copy=False)


@torch.inference_mode()
def predict(agent: Agent, obs: Any, deterministic: bool, mask: Any) -> np.ndarray:  # see Agent.predict
    rows = to_rows(obs, agent.parts)
    lead, n = rows.shape[:-1], math.prod(rows.shape[:-1])
    if agent.masks:
        mask = obs["action_mask"] if agent.masks == "observation" else mask
        if mask is None:
            raise ValueError("this policy was trained with action masks: give the mask, too")
        mask = np.concatenate(mask, -1) if isinstance(mask, tuple) else mask  # of each component
        mask = np.reshape(mask, (*lead, -1))[..., -agent.outputs :]  # of a stack, the newest
        rows = np.concatenate([rows, mask], -1).astype(rows.dtype)
    if agent.episode is None or agent.episode.shape[1] != n:
        agent.episode = torch.zeros(2, n, agent.settings.lstm_hidden_size)
    noise = 0.0 if deterministic else agent.sample_noise(*lead)
    action = agent.act(torch.tensor(rows, device=agent.device), noise, agent.episode)
    return to_env(action, agent.action)[()]  # of an array without axes, its number


def find_white(space: spaces.Box) -> float:
    """What pixels are divided by; 0 for no image: bytes in two axes, or numbers up to 255 in three."""
    fewest = 2 if space.dtype == np.uint8 else 3
    if not fewest <= len(space.shape) <= 4 or sorted(space.shape)[-2] < 5:
        return 0.0
    white = max(-float(space.low.min()), float(space.high.max()))
    return white if white <= 255 else 0.0


def is_large(part: Json) -> bool:
    return part["kind"] == "pixels" and sorted(part["shape"])[-2] >= 36


def channels_first(images: Tensor, shape: list[int]) -> Tensor:
    """[..., C, H, W], from that, from [..., H, W, C], [..., H, W] or a stack of such."""
    if len(shape) == 2:
        return images.unsqueeze(-3)
    if shape[-1] == min(shape[-3:]):  # the fewest are channels
        images = images.movedim(-1, -3)
    return images.flatten(-4, -3) if len(shape) == 4 else images


# In small images a byte is a brightness or, as in MiniGrid, a thing's number: both are shown
SMALL_BYTES = torch.cat([torch.eye(256)[:, 1:16], torch.linspace(0, 1, 256).unsqueeze(1)], 1)


class CNN(nn.Sequential):
    """The Nature CNN (Mnih et al. 2015); below 36 x 36 pixels MinAtar's (Young & Tian 2019)."""

    in_bfloat16 = False  # see choose_device

    def __init__(self, part: Json):
        self.shape, self.white, large = part["shape"], part["white"], is_large(part)
        self.codes = self.white == 255 and part["bytes"] and not large
        channels, *size = channels_first(torch.empty(self.shape), self.shape).shape
        channels *= SMALL_BYTES.shape[1] if self.codes else 1
        layers: list[nn.Module] = []
        for filters, kernel, stride in [(32, 8, 4), (64, 4, 2), (64, 3, 1)] if large else [(16, 3, 1)]:
            layers += [layer_init(nn.Conv2d(channels, filters, kernel, stride)), nn.ReLU()]
            channels, size = filters, [(s - kernel) // stride + 1 for s in size]
        self.features = 512 if large else 128
        linear = layer_init(nn.Linear(channels * math.prod(size), self.features))
        super().__init__(*layers, nn.Flatten(), linear, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:  # [..., pixels] -> [..., features]
        full = self[0].weight.dtype
        kind = torch.bfloat16 if self.in_bfloat16 else full
        images = channels_first(x.reshape(-1, *self.shape), self.shape)
        if self.codes:
            shown = nn.functional.embedding(images.movedim(1, -1).long(), SMALL_BYTES.to(x.device))
            images = shown.to(kind).flatten(-2).movedim(-1, 1)
        else:
            images = images.contiguous(memory_format=torch.channels_last).to(kind) / self.white  # [Atari 9]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            return super().forward(images).to(full).view(*x.shape[:-1], -1)


class Senses(nn.ModuleList):
    """The parts of a row: images through CNNs, all else as it is."""

    def __init__(self, parts: list[Json]):
        super().__init__(CNN(part) if part["kind"] == "pixels" else nn.Identity() for part in parts)
        self.widths = [part["width"] for part in parts]
        self.features = sum(getattr(sense, "features", n) for sense, n in zip(self, self.widths))

    def forward(self, rows: Tensor) -> Tensor:  # [..., D] -> [..., features]
        if len(self) == 1:
            return self[0](rows)
        columns = rows.split(self.widths, -1)
        return torch.cat([sense(x) for sense, x in zip(self, columns)], -1)


# ---- Running statistics, for normalisation -----------------------------------
class RunningMeanStd(nn.Module):
    """Mean and variance of all rows so far, over all ranks."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.count = nn.Buffer(torch.zeros(shape, dtype=torch.float64))
        self.mean = nn.Buffer(torch.zeros(shape, dtype=torch.float64))
        self.var = nn.Buffer(torch.ones(shape, dtype=torch.float64))

    @property
    def std(self) -> Tensor:
        return (self.var + 1e-8).sqrt().float()

    def update(self, rows: Tensor) -> None:  # [n, *shape]
        d = rows.double() - self.mean
        n, shift, squares = rank_sum(torch.stack([torch.ones_like(d), d, d**2]).sum(1))
        total = self.count + n
        shift = shift / total
        self.var.copy_(((self.count * self.var + squares) / total - shift**2).clamp(0))
        self.mean.add_(shift)
        self.count.copy_(total)


def update_statistics(agent: Agent, worlds: "Worlds", rollout: Rollout) -> None:
    """After a rollout was learned from, so that ratios begin at 1."""
    args, valid = agent.settings, to_torch(rollout.valid, agent.device)
    if args.norm_reward:
        sums = accumulate(rollout.rewards, rollout.done, worlds.discounted, args.gamma)
        agent.return_stats.update(to_torch(sums, agent.device)[valid])
    if args.norm_obs:
        numbers = rollout.obs[:-1, :, : len(agent.obs_stats.mean)]  # without the masks
        agent.obs_stats.update(numbers[valid])


def accumulate(x: np.ndarray, done: np.ndarray, carry: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """Discounted sums of x within episodes, [T, N]; `carry`, [N]: what is kept of them."""
    sums, kept = np.empty(x.shape), gamma * ~done
    for t in range(len(x)):
        carry += x[t]
        sums[t] = carry
        carry *= kept[t]
    return sums


# ---- Worlds: Gymnasium's vector environments, in NEXT_STEP mode --------------
TRAINING, VALIDATION, EVALUATION, VIDEO, WEIGHTS, SAMPLING = range(6)


def seeds(seed: int, *stream: int, n: int = 1) -> list[int]:
    """n independent ones; seed + i would give seed 1's second world to seed 2."""
    return [int(s) >> 1 for s in np.random.SeedSequence([seed, *stream]).generate_state(n)]


class Worlds:
    """An environment for each seed, what they show, what their episodes need."""

    def __init__(self, args: Args, seeds: list[int], t: int = 0, vector: bool = True, render: str = ""):
        self.args, self.t, n = args, t, len(seeds)  # t: steps so far
        self.envs, reset_seed = make_envs(args, seeds, vector, render)
        self.parts = describe(space := self.envs.single_observation_space)
        if not sum(part["width"] for part in self.parts):
            raise Stop(f"observations are {space}, not Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple")
        self.action = describe_action(self.envs.single_action_space, args.rescale_actions)
        self.done, self.ended = np.zeros((2, n), dtype=bool)  # the next step is a reset; there was one
        self.returned, self.length, self.discounted = np.zeros((3, n))
        self.memory = torch.zeros(2, n, args.lstm_hidden_size)
        obs, self.info = self.ask(self.envs.reset, seed=reset_seed)
        if args.episodic_life and "lives" not in self.info:
            raise Stop(f"--episodic-life needs info['lives'], which {args.env_id} does not give")
        shown, self.masks = [part for part in self.parts if part["path"] == ["action_mask"]], None
        if args.action_masks and "nvec" in self.action:
            self.masks = "observation" if shown else "info" if "action_mask" in self.info else None
            self.parts = [part for part in self.parts if part not in shown]
        self.obs = self.see(obs, np.zeros(n))  # [N, D]

    def step(self, actions: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rewards, terminated (or a life lost) and done, [N] each."""
        self.t += 1
        if self.memory.numel():
            self.memory[:, self.done] = 0  # an episode begins [LSTM 3]
        lives = self.info["lives"].copy() if self.args.episodic_life else None
        obs, rewards, terminated, truncated, self.info = self.ask(self.envs.step, to_env(actions, self.action))
        self.done = terminated | truncated
        self.obs = self.see(obs, rewards)
        if lives is not None:  # [Atari 3]
            terminated = terminated | (self.info["lives"] < lives)
        return rewards, terminated, self.done

    def see(self, obs: Any, rewards: np.ndarray) -> np.ndarray:
        """Rows of numbers; behind them, with masks, whether each choice is allowed."""
        rows = to_rows(obs, self.parts)
        for name, values in ("observation", rows), ("reward", rewards):
            if not np.isfinite(values).all():
                i = np.argwhere(~np.isfinite(values))[0, 0]
                raise self.fault(f"environment {i} gave the {name} {values[i]}: clip it; it was")
        return np.concatenate([rows, read_masks(self, obs)], -1) if self.masks else rows

    def ask(self, method: Callable, *args, **kwargs):
        try:
            return method(*args, **kwargs)
        except (EOFError, ConnectionError):
            self.envs.closed = True
            raise ConnectionError(str(self.fault("a process died"))) from None
        except Exception as error:
            if isinstance(self.envs, SyncVectorEnv | AsyncVectorEnv) and not hasattr(error, "__notes__"):
                raise self.fault(brief(error)) from None
            error.add_note(str(self.fault("raised")))
            raise

    def fault(self, what: str) -> "Stop":
        when = f"at step {self.t - 1}" if self.t else "at its reset"
        return Stop(f"{what} {when} of {self.args.env_id}", code=1 if self.t else 2)


def read_masks(worlds: Worlds, obs: Any) -> np.ndarray:
    """Whether each choice is allowed, [N, sum(nvec)]; all, if untold or the episode is over."""
    n, nvec, told = len(worlds.done), worlds.action["nvec"], worlds.info.get("_action_mask", False)
    given = worlds.info.get("action_mask", np.ones((n, sum(nvec))))
    if worlds.masks == "observation":
        given, told = obs["action_mask"].reshape(n, worlds.args.frame_stack, -1)[:, -1], True  # of a stack, the newest
    masks = np.where((told & ~worlds.done)[:, None], given, 1)
    starts = np.cumsum([0, *nvec[:-1]])  # of the components
    for i, mask in enumerate(masks):
        right = len(mask) == sum(nvec) and np.isin(mask, (0, 1)).all()
        if not right or not np.logical_or.reduceat(mask, starts).all():
            raise worlds.fault(f"environment {i} gave the mask {mask}: not {sum(nvec)} times 0 or 1, or all 0")
    return masks.astype(bool)


def make_envs(args: Args, seeds: list[int], vector: bool, render: str) -> tuple[Any, Any]:
    """The vector environment, and the seeds for its reset."""
    env_id, n, mode = args.plain_id, len(seeds), args.vectorization
    reset_seed: Any = seeds
    options: Any = json.loads(json.dumps(args.env_kwargs).replace('"~/', '"' + os.path.expanduser("~/")))
    try:
        register(args.env_id)
        native = declared(args, "vector_entry_point") and (vector or not declared(args, "entry_point"))
        atari = env_id.startswith("ALE/")
        if mode == "auto" and (atari or (native and args.frame_stack == 1)):
            if atari:  # frames as usual [Atari 1, 2, 4, 5, 7]; only what is learned is clipped
                options = {"reward_clipping": False} | options
            envs: Any = gym.make_vec(env_id, n, "vector_entry_point", **options)
            reset_seed = np.array(seeds) if atari else seeds[0]
        else:
            options |= {"render_mode": render} if render else {}
            spec: Any = gym.spec(env_id)
            if "ale_py" in str(spec.entry_point):
                print_once(f"{env_id} shows raw frames; ALE/..., by --vectorization auto, not")
            makers = [partial(make_env, spec, options, args.frame_stack, i, seed) for i, seed in enumerate(seeds)]
            if mode == "async" and vector:
                multiprocessing.set_forkserver_preload("gymnasium huggingface_hub torch.optim.adam tyro".split())
                with mock.patch.dict(os.environ, PYTHONSAFEPATH="1"):  # the working directory hides no package
                    envs = AsyncVectorEnv(makers, copy=False, context="forkserver")  # OpenGL survives no fork
                envs.close = partial(envs.close, timeout=9)  # a worker may be stuck
            else:
                envs = SyncVectorEnv(makers, copy=False)
    except (ImportError, gym.error.Error, TypeError, ValueError, AssertionError, LookupError) as error:
        ids = "LunarLander-v3, ALE/Pong-v5 (not PongNoFrameskip-v4) or my_module:MyEnv-v0 (old gym: by shimmy)"
        name = getattr(error, "name", None)
        hint = f"pip install {name}" if name else f"ids are like {ids}, options like --env-kwargs size 3"
        raise Stop(f"cannot make {args.env_id} with options {args.env_kwargs}: {brief(error)}; {hint}") from None
    if args.frame_stack > 1 and reset_seed is not seeds:
        raise Stop(f"--frame-stack needs --vectorization sync or async for {env_id}")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise Stop(f"{env_id} does not reset in NEXT_STEP mode: try --vectorization sync")
    return envs, reset_seed


def make_env(spec: Any, options: Json, frame_stack: int, i: int, seed: int) -> gym.Env:
    random.seed(seed)  # some worlds draw from these
    np.random.seed(seed)
    if multiprocessing.parent_process():  # it decides about signals
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    plain = replace(spec, max_episode_steps=None, order_enforce=False, disable_env_checker=True)
    env: gym.Env = gym.make(plain, **options)
    inspect.signature(env.reset).bind(seed=seed)  # or TypeError
    env = Answers(env, i)
    if spec.max_episode_steps:
        env = gym.wrappers.TimeLimit(env, spec.max_episode_steps)
    if frame_stack > 1:  # of copies: an array may come again
        env = gym.wrappers.TransformObservation(env, copy.deepcopy, None)
        env = gym.wrappers.FrameStackObservation(env, frame_stack)
    return env


class Answers(gym.Wrapper):
    """An environment's answers as Gymnasium asks for them; its own errors are marked."""

    def __init__(self, env: gym.Env, i: int):
        super().__init__(env)
        self.name, masked = f"environment {i}", env.has_wrapper_attr("action_masks")
        self.masks = env.get_wrapper_attr("action_masks") if masked else None

    def reset(self, *, seed=None, options=None):
        return self.ask(self.env.reset, 2, seed=seed)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.ask(self.env.step, 5, action)
        if np.size(reward) != 1:
            raise ValueError(f"{self.name} gave a reward of shape {np.shape(reward)}, not one number")
        return obs, np.asarray(reward, float).item(), bool(terminated), bool(truncated), info

    def ask(self, method: Callable, n: int, *args, **kwargs):
        try:
            answer = method(*args, **kwargs)
        except Exception as error:
            error.add_note(f"raised by {self.name}")
            raise
        if not isinstance(answer, tuple) or len(answer) != n:
            raise ValueError(f"{self.name} gave no tuple of {n}: see gymnasium.Env")
        obs, *rest, info = answer
        if (shape := self.observation_space.shape) is not None and np.shape(obs) != shape:
            raise ValueError(f"{self.name} gave an observation of shape {np.shape(obs)}, not {shape}")
        told = {name: info[name] for name in ("lives", "action_mask") if name in info}
        if self.masks:
            told["action_mask"] = self.masks()
        if "action_mask" in told:
            told["action_mask"] = np.hstack(told["action_mask"])  # may come in parts
        return obs, *rest, told


def register(env_id: str) -> None:
    module, _, name = env_id.rpartition(":")
    if module or name.startswith("ALE/"):
        importlib.import_module(module or "ale_py")
    if name.startswith("MinAtar/") and name not in gym.registry:
        importlib.import_module("minatar.gym").register_envs()


def declared(args: Args, name: str) -> Any:  # what the world's spec says, or 0
    return getattr(gym.registry.get(args.plain_id), name, None) or 0


def look(args: Args) -> Json:
    """config.json, the Agent's arguments."""
    worlds = Worlds(args, seeds(args.seed, TRAINING))
    worlds.envs.close()
    return {"parts": worlds.parts, "action": worlds.action, "masks": worlds.masks} | run_settings(args)


def run_settings(args: Args) -> Json:
    return {name: value for name, value in asdict(args).items() if name not in (*FREE, *MODES[1:])}


# ---- Devices and ranks -------------------------------------------------------
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun


def rank_sum(x: Tensor) -> Tensor:
    """The sum of x over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def mean_over_ranks(gradient: Tensor, metrics: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    if not dist.is_initialized():
        return gradient, metrics
    message = torch.cat([gradient, torch.stack(list(metrics.values()))])
    gradient, means = (rank_sum(message) / RANKS).split([len(gradient), len(metrics)])
    return gradient, dict(zip(metrics, means))


def choose_device(args: Args, parts: list[Json]) -> torch.device:
    """Also sets the threads: a few rows of a small MLP take longer on a GPU or on two."""
    large = any(map(is_large, parts)) or max(args.hidden_sizes, default=0) >= 1024
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    found = torch.cuda.device_count() >= (mates := int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if args.device == "cuda" and not found:
        raise Stop("torch finds no GPU for each process: use --device auto")
    if "OMP_NUM_THREADS" not in os.environ:
        rows = args.batch_size // RANKS // args.num_minibatches
        torch.set_num_threads(max(1, min((os.cpu_count() or 1) // mates, 1 + rows // (128 if large else 1024))))
    if args.device == "cpu" or not found or (args.device == "auto" and not large):
        able = torch.cpu.get_capabilities()  # else it is slow
        CNN.in_bfloat16 = any(able[name] for name in able if "bf16" in name)
        return torch.device("cpu")
    torch.backends.cudnn.deterministic = True
    torch.cuda.set_device(gpu)
    CNN.in_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    return gpu


def to_torch(x: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(x, device=device)


def compile_gradient(agent: Agent) -> Callable:
    """compute_gradient as one graph; the first minibatch waits for it."""
    torch._dynamo.config.trace_autograd_ops = True  # else autograd.grad would break it
    mode = "reduce-overhead" if agent.device.type == "cuda" else "default"  # a CUDA graph: it holds no RNG
    return torch.compile(compute_gradient, fullgraph=True, dynamic=False, mode=mode)


class Adam(nn.Module):
    """Adam (Kingma & Ba 2015) on theta, one vector, of which all parameters are views."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.theta = parameters_to_vector(agent.parameters()).detach()
        vector_to_parameters(self.theta, agent.parameters())
        self.mean = nn.Buffer(torch.zeros_like(self.theta))
        self.square = nn.Buffer(torch.zeros_like(self.theta))
        self.steps = nn.Buffer(torch.zeros((), device=self.theta.device))

    def step(self, gradient: Tensor, lr: float) -> None:
        state: Any = [self.theta], [gradient], [self.mean], [self.square], [], [self.steps]
        usual: Any = dict(beta1=0.9, beta2=0.999, weight_decay=0.0, amsgrad=False, maximize=False, fused=True)
        adam(*state, lr=lr, eps=1e-5, **usual)  # [core 3]


# ---- Play: evaluation, film --------------------------------------------------
@torch.inference_mode()
def play(agent: Agent, args: Args, episodes: int, stream: int, limit: int, render: str = "") -> Iterator[Worlds]:
    """An episode in each of so many new environments, step by step; num_envs at a time, in Gymnasium's vectors all."""
    light = args.vectorization == "auto" and not render and "gymnasium." in str(declared(args, "vector_entry_point"))
    starts, N = seeds(args.seed, stream, n=episodes), episodes if light else args.num_envs
    for i in range(0, episodes, N):
        worlds = Worlds(args, starts[i : i + N], vector=light, render=render)
        torch.manual_seed(starts[0])
        with contextlib.closing(worlds.envs):
            while not worlds.ended.all() and worlds.t < limit:
                yield worlds
                noise, running = 0.0 if args.deterministic else agent.sample_noise(episodes)[i : i + N], ~worlds.ended
                rewards, _, done = worlds.step(agent.act(to_torch(worlds.obs, agent.device), noise, worlds.memory))
                worlds.returned += rewards * running
                worlds.length += running
                worlds.ended |= done
            yield worlds


def evaluate(agent: Agent, args: Args, episodes: int, stream: int = EVALUATION, times: int = 1) -> np.ndarray:
    """Returns, lengths, and whether they were cut, [3, episodes]: all take no more steps than the training, but each
    may take 1,000 or what the environment declares; none more than Atari's 27,000."""
    fair = int(args.total_timesteps) // episodes // times
    limit = min(27_000 if times == 1 else 5_000, max(fair, declared(args, "max_episode_steps"), 1_000))
    steps = tqdm(play(agent, args, episodes, stream, limit), "scoring", leave=False, disable=times > 1 or None)
    return np.concatenate([(worlds.returned, worlds.length, ~worlds.ended) for worlds in dict.fromkeys(steps)], 1)


def validate(agent: Agent, args: Args) -> float:
    if RANK > 0 or not args.validation_episodes:
        return -math.inf
    return float(evaluate(agent, args, args.validation_episodes, VALIDATION, times=10)[0].mean())


def score(agent: Agent, args: Args) -> Json:
    how = f"{args.eval_episodes} {'greedy' if args.deterministic else 'sampled'} episodes"
    print(f"scoring: {how}", flush=True)
    returns, lengths, cut = evaluate(agent, args, args.eval_episodes)
    if cut.any():
        how += f", {cut.sum():.0f} of them cut at {lengths.max():,.0f} steps"
    mean, std = float(returns.mean()), float(returns.std())
    print(f"{args.env_id}: mean_reward {mean:.2f} +/- {std:.2f} over {how}", flush=True)
    when = time.strftime("%FT%T+00:00", time.gmtime())
    result: Json = dict(env_id=args.env_id, seed=args.seed, mean_reward=mean, std_reward=std, eval_datetime=when)
    result |= dict(n_evaluation_episodes=len(returns), deterministic=args.deterministic, episodes=how)
    return result | dict(episode_returns=returns.tolist(), episode_lengths=lengths.tolist())


def record_video(agent: Agent, args: Args, path: Path) -> None:
    """One episode, for browsers. Its failure costs no run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_line("the video", "All else is there", code=0):
        import imageio.v2 as imageio

        os.environ["SDL_VIDEODRIVER"] = "dummy"
        new, how = path.with_name("unfinished.mp4"), dict(macro_block_size=2, output_params=["-movflags", "+faststart"])
        for worlds in play(agent, args, 1, VIDEO, 3_000, "rgb_array"):
            if worlds.envs.render_mode:
                frame = worlds.envs.render()[0]
                frame = np.asarray(frame[-1] if isinstance(frame, list) else frame)
            else:  # Atari's newest frame
                frame = worlds.obs[0].reshape(4, 84, 84)[-1].repeat(4, 0).repeat(4, 1)
            if worlds.t == 0:
                video = imageio.get_writer(new, fps=worlds.envs.metadata.get("render_fps", 15), **how)
            whole = 255 if frame.dtype.kind == "f" and frame.max() <= 1 else 1
            video.append_data((whole * frame).astype(np.uint8))
        video.close()
        print(f"video: {new.replace(path)}", flush=True)


# ---- The run's folder: settings, checkpoints, logs ---------------------------
@dataclass
class State:
    """All that a checkpoint keeps; randomness follows from seed and iteration."""

    args: Args
    agent: Agent
    optimizer: Adam
    learning_rate: float
    command: str
    iteration: int = 0
    global_step: int = 0  # transitions, over all ranks
    seconds: float = 0.0  # of training alone
    score: float = -math.inf
    best_score: float = -math.inf
    best_iteration: int = 0
    ended: int = 0  # episodes in the last leg, over all ranks
    barren: int = 0  # legs in which none ended
    curve: list[tuple] = field(default_factory=list)  # step, mean return, mean length
    log: Any = None
    lock: Any = None  # ends with the process

    def checkpoint(self) -> None:
        if RANK > 0:
            return
        if self.score >= self.best_score:
            self.best_score, self.best_iteration = self.score, self.iteration
        kept = {name: x for name, x in vars(self).items() if name not in ("args", "log", "lock")}
        saved = {name: x.state_dict() if isinstance(x, nn.Module) else x for name, x in kept.items()}
        torch.save(saved, buffer := io.BytesIO())
        run, data = self.args.run, buffer.getvalue()
        write_file(run / f"checkpoint-{self.iteration:08d}.pt", data + hashlib.sha256(data).digest())
        for old in sorted(run.glob("checkpoint-*.pt"))[:-2]:
            old.unlink()
        if self.best_iteration == self.iteration:
            weights = {name: x.cpu().clone() for name, x in self.agent.state_dict().items()}  # not views of theta
            write_file(run / "model.safetensors", safetensors.torch.save(weights))

    def restore(self) -> None:
        """The newest undamaged checkpoint; weights_only runs no code."""
        for path in sorted(self.args.run.glob("checkpoint-*.pt"), reverse=True):
            try:
                data = path.read_bytes()
                if hashlib.sha256(data[:-32]).digest() != data[-32:]:
                    raise ValueError("its checksum is wrong")
                saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                self.agent.load_state_dict(saved.pop("agent"))
                self.optimizer.load_state_dict(saved.pop("optimizer"))
            except Exception as error:
                warn(f"{path} is unusable ({brief(error)}); taking an older one")
                continue
            return vars(self).update(saved)
        raise Stop(f"{self.args.run} has no usable checkpoint: start anew")


def legs(state: State) -> Iterator[range]:
    """The iterations between checkpoints, which cut episodes: a tenth of the run or what five full episodes take,
    twice as many after a leg in which none ended, at most a third."""
    args, total = state.args, state.args.num_iterations
    full = math.ceil(5 * declared(args, "max_episode_steps") / args.num_steps)
    while state.iteration < total:
        state.barren += state.iteration > 0 and not state.ended
        state.ended = 0
        usual = min(max(1, total // 10, full) << state.barren, math.ceil(total / 3))
        yield range(state.iteration, min(state.iteration + (args.checkpoint_every or usual), total))


def name_run(args: Args) -> Args:
    name = f"{args.env_id}__{Path(SCRIPT).stem}__{args.seed}__{time.time():.3f}"
    return replace(args, run_name=args.run_name or re.sub(r"[^\w.=+-]", "-", name))


def open_run(args: Args) -> State:
    """A new run's folder and state; with --resume the checkpoint's."""
    args = name_run(args)
    check_training(args)
    if RANKS > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    run, config = args.run, look(args)
    if args.norm_obs and any(part["kind"] == "pixels" for part in config["parts"]):
        raise Stop("images are scaled to [0, 1] anyway: take --no-norm-obs")
    rows, parts = args.batch_size // RANKS, config["parts"]
    size = rows * sum(part["width"] for part in parts) * (1 if len(parts) == 1 and parts[0].get("bytes") else 4)
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        raise Stop(f"{rows:,} observations take {size / 2**30:,.0f} GiB: lower --num-envs or --num-steps")
    device = choose_device(args, config["parts"])
    source = load_agent(args.init_from, args) if args.init_from and not args.resume else None
    torch.manual_seed(seeds(args.seed, WEIGHTS)[0])  # on all ranks
    agent = Agent(**config).to(device)
    if source:
        with one_line(f"starting with {args.init_from}", "Its network must be this one"):
            old = source.settings
            if (old.activation, old.rescale_actions) != (args.activation, args.rescale_actions):
                raise ValueError("--activation or --rescale-actions differs")
            agent.load_state_dict(source.state_dict())
    typed = sys.argv[1:] if sys.argv[0].endswith(SCRIPT) else ["--env-id", args.env_id]
    command = f"{LAUNCH} {SCRIPT} {HOME.sub('~/', shlex.join(typed))}".rstrip()
    state = State(args, agent, Adam(agent), args.learning_rate, command)
    if RANK == 0:
        run.mkdir(parents=True, exist_ok=True)
        with one_line(f"locking {run}", "Another process trains it"):
            state.lock = FileLock((run / "lock").resolve(), is_singleton=True).acquire(blocking=False)
    if args.resume:
        state.restore()
    elif RANK == 0:
        write_file(run / "config.json", config)
    state.checkpoint()
    if RANK == 0:
        told: Json = {"run": run, "preset": args.preset or "none", "device": device.type, "action masks": agent.masks}
        told |= {"options": args.env_kwargs, "step": state.global_step}
        print(*(f"{name}: {x}" for name, x in told.items() if x), sep="   ", flush=True)
    return state


class Silence:  # other ranks
    add = write = flush = staticmethod(lambda *args: None)


class Log:
    """TensorBoard, a progress bar."""

    def __init__(self, state: State):
        self.state, args, run = state, state.args, state.args.run
        self.metrics: list[Tensor] = []
        self.waiting: list[tuple] = []
        self.recent: list[float] = []
        sys.modules.setdefault("tensorboard.compat.notf", sys)  # imports no TensorFlow
        from torch.utils.tensorboard import SummaryWriter

        with mock.patch("socket.gethostname", lambda: "localhost"):  # host names are private
            purge = state.global_step + 1 if args.resume else None
            self.writer = SummaryWriter(run, purge_step=purge, flush_secs=10)
        size: Any = dict(total=args.num_iterations * args.batch_size, initial=state.iteration * args.batch_size)
        self.bar = tqdm(**size, unit=" steps", unit_scale=True, disable=None)

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.names = list(metrics)
        self.metrics.append(torch.stack(list(metrics.values())))  # a graph overwrites it

    def write(self, iteration: int, rollout: Rollout, worlds: Worlds, batch: Batch) -> None:
        """One iteration: means over its episodes and its minibatches."""
        state, done, valid = self.state, rollout.done, rollout.valid
        sums = accumulate(rollout.rewards, done, worlds.returned), accumulate(valid, done, worlds.length)
        self.waiting += zip(*(x[done] for x in sums))  # returns and lengths
        worlds.ended |= done.any(0)
        speed = int(state.global_step / state.seconds)
        scalars = {"charts/learning_rate": state.learning_rate, "charts/SPS": speed}
        if worlds.ended.mean() >= 0.9:  # in a new leg short episodes end first
            self.write_episodes()
        if self.metrics:
            means, self.metrics = torch.stack(self.metrics).mean(0).tolist(), []
            scalars |= {f"losses/{name}": mean for name, mean in zip(self.names, means)}
        values, targets = batch.values[valid], batch.returns[valid]  # 1: a perfect critic, 0: a constant one
        scalars["losses/explained_variance"] = (1 - (targets - values).var() / targets.var()).item()
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, state.global_step)
        mean = f"{np.mean(self.recent):.1f}" if self.recent else f"none in {worlds.length.max():,.0f} steps"
        self.bar.set_postfix_str(f"return {mean}", refresh=False)
        self.bar.update((iteration + 1) * state.args.batch_size - self.bar.n)
        total = state.args.num_iterations
        if self.bar.disable and iteration * 10 // total < (iteration + 1) * 10 // total:
            print(f"step {state.global_step:>11,}   return {mean:>9}   {speed:>7,} steps/s", flush=True)

    def write_episodes(self) -> None:
        step = self.state.global_step
        if self.waiting:
            self.recent = [*self.recent, *(x for x, _ in self.waiting)][-100:]
            means, self.waiting = np.mean(self.waiting, 0).tolist(), []
            self.state.curve.append((step, *means))
            for name, mean in zip(("return", "length"), means):
                self.writer.add_scalar(f"charts/episodic_{name}", mean, step)

    def flush(self, name: str, score: float) -> None:
        self.write_episodes()
        if math.isfinite(score):
            self.writer.add_scalar(name, score, self.state.global_step)
        self.writer.flush()


def finish(state: State) -> Json:
    """Score and film the kept agent; leave what a push needs."""
    args, run, best, last = state.args, state.args.run, state.best_score, state.score
    state.log.bar.close()
    validation = None
    if args.validation_episodes:
        validation = {"best": best, "last": last}
        print(f"kept: the agent of iteration {state.best_iteration}, validation {best:.2f}; last {last:.2f}")
    agent = load_agent(str(run), args).to(state.agent.device)
    results = score(agent, args) | dict(command=state.command, device=agent.device.type, ranks=RANKS)
    results |= dict(total_timesteps=args.total_timesteps, global_step=state.global_step, training_seconds=state.seconds)
    results |= dict(best_iteration=state.best_iteration, validation=validation)
    if args.capture_video or args.repo_id:
        record_video(agent, args, run / "replay.mp4")
    for name in {"ppo.py", SCRIPT, "requirements.txt"}:
        if (source := Path(__file__).with_name(name)).exists():
            shutil.copyfile(source, run / name)
    draw_curve(args, state.curve, results["mean_reward"])
    state.log.flush("eval/mean_reward", results["mean_reward"])
    write_file(run / "results.json", results)  # last: the run is finished
    return results


def draw_curve(args: Args, curve: list[tuple], mean: float) -> None:
    rows = np.reshape(curve, (-1, 3))
    np.savetxt(args.run / "curve.csv", rows, "%.10g", ",", header="step,return,length", comments="")
    with one_line("curve.png", "All else is there", code=0):
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter

        axes = (figure := Figure((6, 3), layout="constrained")).subplots()
        axes.plot(*rows.T[:2], ".-", markersize=3, label="training")
        axes.plot(args.total_timesteps, mean, "o", clip_on=False, label=f"score {mean:.1f}")
        axes.set(title=args.env_id, xlabel="steps", ylabel="episodic return", xlim=(0, args.total_timesteps))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(args.run / "curve.png", dpi=150)


def write_file(path: Path, data: bytes | Json) -> None:
    """All or nothing, even if the power fails."""
    if isinstance(data, dict):
        data = json.dumps(data, indent=2).encode()
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---- Sharing: what is downloaded is not trusted ------------------------------
POLICY = ["config.json", "model.safetensors"]
OLD = ["replay.mp4", "*tfevents*"]  # a push deletes the former ones


@contextlib.contextmanager
def one_line(what: str, remedy: str, code: int = 2):  # code 0: a warning
    try:
        yield
    except Exception as error:
        if code and isinstance(error, Stop):
            raise
        message = f"{what} failed: {brief(error)}. {remedy}"
        if code:
            raise Stop(message, code) from None
        warn(message)


def find_policy(name: str, env_id: str = "") -> tuple[str, Path, Json]:
    """Name, folder, config.json of an agent: a run's, trusted, or a stranger's, pinned to a commit."""
    folder = Path(name).expanduser()
    with one_line(f"loading {name}", "If another ppo.py made it, use the one beside it"):
        if stranger := not folder.is_dir():
            if name.startswith("runs/"):
                raise Stop(f"there is no folder {name}")
            repo_id, _, commit = name.partition("@")
            for file in POLICY:
                found = hub.get_hf_file_metadata(hub.hf_hub_url(repo_id, file, revision=commit or None))
                if (found.size or 0) > 2**28:
                    raise Stop(f"refused {name}: {file} has {found.size} bytes, more than {2**28}")
                commit = str(found.commit_hash)
                folder = Path(hub.hf_hub_download(repo_id, file, revision=commit)).parent
            name = f"{repo_id}@{commit}"
        config = json.loads((folder / "config.json").read_text())
        world = make_args(config)
        if stranger and not env_id:  # `module:Env-v0` would import the module
            register(world.plain_id)  # ALE's
            if world.env_id not in gym.registry:
                raise Stop(f"refused {name}: {world.env_id!r} is unknown here; if you trust it, give its --env-id")
        if stranger and not {*map(type, world.env_kwargs.values())} <= {bool, int, float}:
            raise Stop(f"refused {name}: its options are more than numbers: {world.env_kwargs}")
    return name, folder, config


def make_args(config: Json) -> Args:
    """The settings in a config.json: names, types and ranges are checked."""
    hints: Any = get_type_hints(Args)
    types = {name: hints[name] for name in run_settings(Args())}
    settings = {name: x for name, x in config.items() if name not in ("parts", "action", "masks")}
    settings["hidden_sizes"] = tuple(settings["hidden_sizes"])
    for name, value in settings.items():
        whole = type(value) is int and types[name] is float
        type_validator(name, float(value) if whole else value, types[name])
    check_ranges(args := Args(**settings))
    return args


def load_agent(name: str, args: Args) -> Agent:
    """Its files must be what an agent for this world would save."""
    _, folder, config = find_policy(name, args.env_id)
    with one_line(f"loading {name}", f"Is it an agent for {args.env_id} with these settings?"):
        saved, needed = ([c["parts"], c["masks"], c["action"]] for c in (config, look(args)))
        if saved != needed:
            raise ValueError(f"its world has {saved}, not {needed}")
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        with torch.device("meta"):  # shapes without memory
            agent = Agent(**config)
        types = {name: x.dtype for name, x in agent.state_dict().items()}
        agent.load_state_dict(weights, assign=True)
        for name, x in weights.items():
            if x.dtype != types[name] or not x.isfinite().all():
                raise ValueError(f"{name} is not finite, or of the wrong type")
    return agent


def push(args: Args, results: Json) -> None:
    remedy = f"Check network and login, then python {SCRIPT} --resume {args.run} --repo-id {args.repo_id}"
    with one_line(f"the push to {args.repo_id}", remedy, code=1):
        write_file(args.run / "README.md", model_card(args, args.repo_id, results).encode())
        files = [*POLICY, *OLD, "README.md", "results.json", "curve.*", "*.py", "requirements.txt"]
        how: Json = dict(allow_patterns=files, delete_patterns=OLD, commit_message=f"PPO plays {args.env_id}")
        repo_id = hub.create_repo(args.repo_id, exist_ok=True).repo_id
        url = hub.upload_folder(repo_id=repo_id, folder_path=args.run, **how)
    print(f"pushed: {url}")


def model_card(args: Args, repo_id: str | None, r: Json) -> str:
    env_id, rl = args.env_id, "reinforcement-learning"
    score = f"{r['mean_reward']:.2f} +/- {r['std_reward']:.2f}"
    named = f" --env-id {env_id}" if ":" in env_id else ""  # else refused
    return f"""---
library_name: ppo
pipeline_tag: {rl}
tags: ["{env_id}", ppo, deep-{rl}, {rl}, custom-implementation, deep-rl-course]
model-index:
- name: "PPO-{env_id}"
  results:
  - task: {{type: {rl}, name: {rl}}}
    dataset: {{type: "{env_id}", name: "{env_id}"}}
    metrics: [{{type: mean_reward, name: mean_reward, value: {score}}}]
---
# PPO agent playing {env_id}

Mean return **{score}** over {r["episodes"]}, after {r["global_step"]:,} steps in
{r["training_seconds"]:.0f} seconds of [PPO](https://arxiv.org/abs/1707.06347), by the `{SCRIPT}` in this repo.

![learning curve](curve.png)

```bash
hf download {repo_id} {SCRIPT} --local-dir .
uv run {SCRIPT} --evaluate {repo_id}{named} --capture-video  # play it
{r["command"]}  # train it again
```
```python
from {Path(SCRIPT).stem} import Agent

agent = Agent.from_pretrained("{repo_id}", strict=True)
action = agent.predict(obs, deterministic={r["deterministic"]})
```
"""


# ---- Checks and presets ------------------------------------------------------
class Stop(Exception):
    """The end, for a reason that the user can act on."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def check_finite(metrics: dict[str, Tensor], iteration: int) -> None:
    if not sum(metrics.values()).isfinite():
        raise Stop(f"loss or gradient not finite in iteration {iteration}: lower --learning-rate", code=1)


def check_ranges(args: Args) -> None:
    for name, hint in get_type_hints(Args, include_extras=True).items():
        words, fits, *_ = getattr(hint, "__metadata__", ("", lambda x: True))
        if not fits(getattr(args, name)):
            raise Stop(f"{flag(name)} must be {words}, got {getattr(args, name)}")


def check_training(args: Args) -> None:
    check_ranges(args)
    N, k = args.num_envs, args.num_minibatches
    units, mine = ("environments", N // RANKS) if args.lstm_hidden_size else ("rows", args.batch_size // RANKS)
    fits = next(n for n in range(k, 0, -1) if mine % n == 0)
    needed = args.batch_size * (1 + (args.norm_obs or args.norm_reward))
    taken = [*args.run.glob("checkpoint-*.pt"), *args.run.glob("results.json")]
    wrong = {
        f"--num-envs {N} is no multiple of the {RANKS} ranks": N % RANKS,
        f"--num-minibatches {k} must divide a rollout's {mine} {units}, as {fits} does": mine % k,
        "--norm-adv needs minibatches of at least 2 rows": args.norm_adv and args.batch_size == k * RANKS,
        f"--total-timesteps must be at least {needed}, or lower --num-steps": args.total_timesteps < needed,
        "--norm-reward and --clip-reward exclude each other": args.norm_reward and args.clip_reward,
        "--compile cannot take an LSTM": args.compile and args.lstm_hidden_size,
        "--compile needs a C++ compiler": args.compile and not shutil.which(os.environ.get("CXX", "g++")),
        f"{args.run} exists: choose another --run-name, or --resume {args.run}": taken and not args.resume,
    }
    for message in filter(wrong.get, wrong):
        raise Stop(message)


def brief(error: Exception) -> str:
    words = HOME.sub("~/", " ".join(str(error).split())).rstrip(".") or "it gives no reason"
    return f"{type(error).__name__}: {words:.300}"


def warn(message: str) -> None:
    if RANK == 0:
        print(f"warning: {message}", file=sys.stderr)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


HOME = re.compile(rf"(?<!\w){re.escape(os.path.expanduser('~'))}/")
print_once = cache(partial(print, flush=True))

# Tuned on seeds above 100, never reported
LOOSE: Json = dict(clip_vloss=False)
WIDE: Json = dict(hidden_sizes=(128, 128))
BOTH: Json = dict(norm_obs=True, norm_reward=True)
STEADY = BOTH | dict(desired_kl=0.01)
CHOICE = STEADY | LOOSE | WIDE
SMALL = CHOICE | dict(norm_obs=False)
RELU = LOOSE | dict(norm_reward=True, activation="relu")
LINEAR = LOOSE | dict(hidden_sizes=())
IMAGES = LINEAR | dict(clip_coef=0.1)
ATARI = IMAGES | dict(
    clip_reward=True, episodic_life=True, eval_episodes=30, env_kwargs={"repeat_action_probability": 0.0}
)
FORCES = BOTH | dict(env_kwargs={"include_cfrc_ext_in_observation": False})

# Columns, the last where Args' defaults (CleanRL's) don't fit; what else differs
COLUMNS = """total_timesteps num_envs num_steps num_minibatches update_epochs learning_rate
ent_coef logstd_init gae_lambda gamma""".split()
TABLE: list[tuple] = [
    ("none", {}),
    ("general, discrete actions", 500_000, 16, 256, 8, 6, 1e-3, CHOICE),
    ("general, discrete actions, few steps", 500_000, 4, 256, 8, 6, 1e-3, CHOICE),
    ("general, continuous actions", 10**6, 16, 256, 16, 10, 1e-3, 0.0, -0.5, STEADY),
    ("general, continuous actions, few steps", 500_000, 4, 256, 16, 10, 1e-3, 0.0, -0.5, STEADY),
    ("general, images", 500_000, 8, 128, 32, 3, IMAGES | dict(norm_reward=True)),
    ("general, small images", 500_000, 16, 256, 8, 6, 1e-3, SMALL),
    ("general, small images, few steps", 500_000, 8, 128, 4, 4, 1e-3, SMALL),
    ("CartPole-v1", 100_000, 64, 32, 8, 5, 2e-3, 0.01, 0.0, 0.8, 0.98, LOOSE),
    ("Acrobot-v1", 500_000, 16, 128, 8, 10, 2e-3, 0.0, 0.0, 0.94, BOTH | LOOSE),
    ("Pendulum-v1", 100_000, 4, 256, 16, 10, 1e-3, 0.0, 0.0, 0.9, 0.97, RELU),
    ("LunarLander*-v3", 10**6, 16, 256, 8, 6, 2e-3, 0.002, 0.0, 0.98, 0.998, RELU | WIDE),
    ("BipedalWalker-v3", 5_000_000, 32, 256, 16, 10, 3e-4, 0.0, -0.5, BOTH),
    ("CarRacing-v3", 300_000, 16, 128, 32, 3, 5e-4, 0.0, -0.5, LINEAR | dict(norm_reward=True, eval_episodes=30,
     vectorization="async", frame_stack=2, rescale_actions=False, deterministic=False)),  # greedy, it stands
    ("Hopper-v5", 10**6, 8, 256, 8, 10, 1e-3, 0.0, STEADY),
    ("Walker2d-v5", 10**6, 8, 256, 8, 5, 1e-3, 0.0, -0.5, STEADY | WIDE),
    ("InvertedDoublePendulum-v5", 10**6, 32, 256, 8, 5, 1e-3, 0.0, -0.5, BOTH | dict(validation_episodes=100)),
    ("Swimmer-v5", 10**6, 32, 512, 16, 10, 1e-3, 0.0, 0.0, 0.98, 0.999, LOOSE | dict(norm_obs=True)),
    ("HalfCheetah-v5", 10**6, 4, 512, 8, 10, 1e-3, 0.0, -1.5, 0.9, BOTH),
    ("Reacher-v5", 10**6, 16, 128, 32, 10, 1e-3, 0.0, -1.5, 0.9, 0.9, BOTH),
    ("Pusher-v5", 10**6, 16, 256, 16, 10, 1e-3, 0.0, -0.5, STEADY | dict(rescale_actions=False)),
    ("Ant-v5", 10**6, 16, 128, 8, 5, 5e-4, 0.0, -1.5, FORCES),
    ("Humanoid*-v5", 10**6, 16, 128, 8, 10, 3e-4, 0.0, -0.1, FORCES),
    ("ALE/Pong-v5", 10**6, 8, 128, 32, 3, 5e-4, ATARI | dict(validation_episodes=30)),
    ("ALE/*", 10**7, 128, 64, 32, 3, 5e-4, ATARI | dict(deterministic=False)),
    ("MinAtar/*", 10**7, 64, 128, 32, 4, 2.5e-3, LINEAR),
]  # fmt: skip
PRESETS = {name: dict(zip(COLUMNS, numbers)) | more for name, *numbers, more in TABLE}

SCRIPT = Path(__file__).name  # in printed commands; a script that imports this one sets its own
LAUNCH = f"torchrun --nproc-per-node {RANKS}" if RANKS > 1 else "python"
MODES = ("init_from", "evaluate", "resume")
FREE = ("device", "repo_id", "capture_video")  # a resumed run may change them
OURS = dict(  # flags of CleanRL and SB3's zoo
    cuda="--device", torch_deterministic="always", save_model="always", upload_model="--repo-id",
    hf_entity="--repo-id", track="see runs/reference/recipes.md", algo="not needed", env="--env-id",
    n_timesteps="--total-timesteps", exp_name="--run-name", vec_env="--vectorization", trained_agent="--init-from",
)  # fmt: skip


def preset_args(args: Args) -> Args:
    """The preset that is named, the first that fits the id, or a general one."""
    fits = (name for name in PRESETS if fnmatch.fnmatchcase(args.env_id, name))
    if not (name := args.preset or next(fits, "")):
        config = look(args)
        images = [is_large(part) for part in config["parts"] if part["kind"] == "pixels"]
        acts = "discrete actions" if "nvec" in config["action"] else "continuous actions"
        kind = "images" if any(images) else "small images" if images else acts
        if args.total_timesteps <= 200_000 and not any(images):
            kind += ", few steps"
        name = f"general, {kind}"
    if name not in PRESETS:
        raise Stop(f"no preset {name!r}; there are: {'; '.join(PRESETS)}")
    return Args(env_id=args.env_id, preset=name, **PRESETS[name])


# ---- The program -------------------------------------------------------------
def read_option(word: str) -> Any:
    """A number, bool, None, list or dict of Python or JSON; else a string."""
    for read in json.loads, ast.literal_eval:
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            return json.loads(json.dumps(read(word)))
    return word


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over a preset, or over a named run's settings."""
    typed = [HOME.sub("~/", word) for word in (sys.argv[1:] if argv is None else argv)]
    read: Any = partial(tyro.cli, Args, args=typed, prog=SCRIPT)
    first, unknown = read(default=Args(env_id=""), return_unknown_args=True, add_help=False)
    for word in unknown:
        if ours := OURS.get(word.strip("-").split("=")[0].replace("-", "_")):
            raise Stop(f"there is no {word} here: {ours}")
    named = {mode: name for mode in MODES if (name := getattr(first, mode)) is not None}
    if len(named) > 1 or "" in named.values():
        raise Stop(f"{' and '.join(map(flag, named))}: give one, with a run's folder or a repo")
    if not named:
        usual = preset_args(replace(first, env_id=first.env_id or Args.env_id))
    for mode, name in named.items():
        named[mode], _, config = find_policy(name, first.env_id)
        usual = make_args(config)
    if first.init_from:
        other = first.env_id not in ("", usual.env_id)
        usual = replace(usual, run_name="", env_kwargs={} if other else usual.env_kwargs)
    args = replace(read(default=usual), **named)
    check_ranges(args)
    old, new = run_settings(usual), run_settings(args)
    unscored = (args.run / f"checkpoint-{args.num_iterations:08d}.pt").exists() > (args.run / "results.json").exists()
    free = ("eval_episodes", "deterministic") if unscored else ()
    changed = [f"{flag(k)} {old[k]} -> {new[k]}" for k in old if old[k] != new[k] and k not in free]
    if changed and args.resume:
        raise Stop(f"a run keeps its settings: leave out {'; '.join(changed)}")
    return name_run(args)


def on_signal(signum: int, frame) -> None:
    """The first Ctrl-C or SIGTERM stops cleanly, the second at once."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
    sys.unraisablehook = str  # half-made workers
    raise KeyboardInterrupt(signum)


def run_command(args: Args) -> None:
    if args.evaluate:
        agent = load_agent(args.evaluate, args)
        agent.to(choose_device(args, agent.parts))
        score(agent, args)
        if args.capture_video:
            if not (folder := Path(args.evaluate).expanduser()).is_dir():
                folder = Path("runs", args.evaluate.partition("@")[0].replace("/", "--"))
            record_video(agent, args, folder / "replay.mp4")
        return
    finished = args.run / "results.json"
    if args.repo_id and RANK == 0:  # fail early
        with one_line(f"access to {args.repo_id}", "Try `hf auth login`, or push later by --resume"):
            repo_id = hub.create_repo(args.repo_id, exist_ok=True).repo_id
            hub.auth_check(repo_id, write=True)
            args = replace(args, repo_id=repo_id)
    if finished.exists() and args.resume:
        print(f"{args.run} is finished")
        results = json.loads(finished.read_text())
    else:
        state = train(args)
        if RANK > 0:
            return
        results = finish(state)
    if args.repo_id:
        push(args, results)
    film, share = f"--evaluate {args.run} --capture-video", f"--resume {args.run} --repo-id me/name"
    print(f"run: {args.run}; next: python {SCRIPT} {film}, or {share}")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 2 before training, 1 for what fails later, 128 + n by signal n."""
    args, go_on, code = None, "", 0
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    sys.path.append(os.getcwd())  # for the user's module
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        run_command(args := parse_args(argv))
    except BaseException as error:
        begun = args and (args.run / "config.json").exists() and not (args.run / "results.json").exists()
        if begun and not isinstance(error, Stop):
            saved = max(args.run.glob("checkpoint-*.pt"), default=args.run).stem[-8:]
            go_on = f"\nTo go on after iteration {saved}: {LAUNCH} {SCRIPT} --resume {args.run}"
        match error:
            case KeyboardInterrupt():
                message, code = "stopped", 128 + (*error.args, signal.SIGINT)[0]
            case Stop():
                message, code = f"error: {error}", error.code
            case MemoryError() | RuntimeError() if "memory" in repr(error).lower() and not hasattr(error, "__notes__"):
                message, code = "error: out of memory: lower --num-envs, --num-steps or --hidden-sizes", 1
            case OSError() if not hasattr(error, "__notes__"):  # not an environment's
                message, code = f"error: {error.strerror or error}, in {args.run if args else Path.cwd()}", 1
            case _:
                error.add_note(go_on)
                raise
        if code != 2 or RANK == 0 or dist.is_initialized():  # before that, one says what all know
            print(message + go_on, file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
