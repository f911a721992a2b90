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
#     "matplotlib==3.11.2",
#     "tqdm==4.70.1",
# ]
# ///
"""Proximal Policy Optimization (PPO) in one file: train, watch, evaluate, resume, share.

    python ppo.py                                               # CartPole-v1, solved within seconds
    python ppo.py --env-id LunarLander-v3 --seed 2              # any Gymnasium id, any flag
    python ppo.py --evaluate runs/<run> --capture-video         # play it again and leave replay.mp4
    python ppo.py --resume runs/<run>                           # go on after a crash, bit for bit
    python ppo.py --env-id LunarLander-v3 --repo-id me/lander   # train, evaluate, film, push to the Hub
    torchrun --nproc-per-node 2 ppo.py --env-id LunarLander-v3  # one run, split over two processes

Letters and equations are those of Schulman et al.: "Proximal Policy Optimization Algorithms" (arXiv:1707.06347),
"PPO" below, and "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (arXiv:1506.02438), "GAE".

    N              actors: environments side by side          --num-envs
    T              steps in each of them per rollout          --num-steps
    K              epochs over the N T rows of a rollout      --update-epochs
    M              rows of a minibatch                        N T / --num-minibatches
    epsilon        how far the ratio r(theta) may leave 1     --clip-coef; theta: all parameters, in one vector
    gamma, lambda  discount, decay of GAE                     --gamma, --gae-lambda
    c1, c2         weights of value loss and entropy bonus    --vf-coef (2 c1, of half the squared error), --ent-coef
    obs [T+1, N, *obs_shape], actions [T, N, *action_shape], the rest [T, N], V(obs) [T+1, N]; of a minibatch [M, ...]

The end of an episode in a rollout. Gymnasium spends a step on the reset: row 2 is no transition, and is not learned.

    t               0     1     2     3     4
    obs[t]          o0    o1    o2    p0    p1     o2 is the true last observation of the episode
    actions[t]      a0    a1    -     b0    b1     taken at obs[t]; the one at o2 is ignored
    rewards[t]      r0    r1    0     q0    q1
    terminated[t]   no    yes   no    no    no     nothing follows r1; after a truncation, gamma V(o2) does
    done[t]         no    yes   no    no    no     the episode is over: no advantage flows back from row 2
    valid[t]        yes   yes   no    yes   yes    whether row t is a transition

[core 7] is the seventh core detail of "The 37 Implementation Details of PPO" (Huang et al. 2022), and so on. Departures
from the paper, as in most implementations: standardised advantages [core 7], clipped values and gradients [core 9, 11],
a constant epsilon. Left out is the KL penalty, Eq. 8, which did worse there. Departures from CleanRL:
- A truncated episode is bootstrapped from its last observation; the row of a reset is not learned.
- A rollout needs only actions; log-probabilities and values follow in large batches: the same, but faster.
- Statistics for normalisation belong to the agent and change between iterations only, so that each ratio starts at 1;
  the first rollout fills them, and is not learned from [continuous 6, 8].
- A lost life counts as a termination, but the game goes on [Atari 3]: after it the agent itself has to fire [Atari 4].
- Environments can't be saved, so every run makes new ones at each checkpoint, and cuts the episodes under way.
- Logged losses are means over all minibatches. Evaluation is greedy, in fresh environments, of the best checkpoint.
"""

import ast
import contextlib
import fnmatch
import importlib.util
import io
import json
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
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints
from unittest import mock

import gymnasium as gym
import huggingface_hub as hub
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import tyro
from gymnasium.utils.env_checker import check_env
from huggingface_hub.dataclasses import type_validator
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.adam import adam
from tqdm import tqdm

# ---- Settings: each is a flag ------------------------------------------------

Count = Annotated[int, "from 1 to 65536", 1, 2**16]  # a type, its range in words, its bounds: see `check`
Positive = Annotated[float, "above 0 and finite", sys.float_info.min, sys.float_info.max]
Weight = Annotated[float, "0 or more, and finite", 0, sys.float_info.max]
Fraction = Annotated[float, "from 0 to 1", 0, 1]


@dataclass(frozen=True)
class WorldArgs:
    """Where the agent acts."""

    env_id: str = "CartPole-v1"  # Gymnasium id; `my_module:MyEnv-v0` imports your own module first
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # its options: `is_slippery False`
    preset: str = "none"  # where all defaults come from, see PRESETS; if not given, the one that fits the world
    num_envs: Count = 4  # N, environments side by side
    vectorization: Literal["auto", "sync", "async", "native", "envpool"] = "auto"  # auto: native if there is one
    frame_stack: Annotated[int, "from 1 to 64", 1, 64] = 1  # see the last so many observations at once (sync, async)
    episodic_life: bool = False  # a lost life counts as a termination, as usual for Atari
    clip_reward: bool = False  # learn from the sign of the reward only, as usual for Atari
    norm_reward: bool = False  # divide rewards by the running deviation of their discounted sum
    action_masks: bool = True  # never choose what the environment forbids, where it tells
    check_env: bool = False  # before training, look for what may spoil it, and say what to do about it


@dataclass(frozen=True)
class AlgorithmArgs:
    """How it learns."""

    total_timesteps: Annotated[int, "a positive number", 1, 2**62] = 500_000  # all environments, resets counted
    num_steps: Annotated[int, "from 2 (one step could be all resets) to 1048576", 2, 2**20] = 128  # T; 32 to 2048
    update_epochs: Count = 4  # K, passes over each rollout; 3 to 20
    num_minibatches: Count = 4  # per epoch, of M = N T / num_minibatches rows
    learning_rate: Positive = 2.5e-4  # Adam's step size; 1e-4 to 3e-3
    anneal_lr: bool = True  # lower it linearly to zero
    gamma: Fraction = 0.99  # discount; 0.9 to 0.999
    gae_lambda: Fraction = 0.95  # lambda of GAE, from bias (0) to variance (1); 0.8 to 0.99
    clip_coef: Positive = 0.2  # epsilon of the clipped objective; 0.1 to 0.3
    clip_vloss: bool = True  # clip the value loss with the same epsilon
    norm_adv: bool = True  # standardise the advantages of each minibatch
    ent_coef: Weight = 0.01  # c2, weight of the entropy bonus; 0 to 0.02
    vf_coef: Weight = 0.5  # 2 c1, weight of the value loss
    max_grad_norm: Positive = 0.5  # global norm that gradients are clipped to
    target_kl: Positive | None = None  # skip the epochs after one whose mean KL exceeds this; 0.01 to 0.05
    desired_kl: Positive | None = None  # instead of annealing, keep the KL of an epoch near this; 0.005 to 0.02


@dataclass(frozen=True)
class NetworkArgs:
    """What learns: the agent keeps these in its config.json."""

    hidden_sizes: tuple[Count, ...] = (64, 64)  # layers of actor and critic (images: of the heads on the CNN)
    activation: Literal["tanh", "relu"] = "tanh"  # between those layers
    lstm_hidden_size: Annotated[int, "from 0 to 4096", 0, 4096] = 0  # units of memory below the heads; 0, or 64 to 512
    norm_obs: bool = False  # standardise vectors by their running mean and variance
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of convolutions; auto: bfloat16 where it is native
    logstd_init: Annotated[float, "from -20 to 2", -20, 2] = 0.0  # initial log standard deviation of continuous actions


@dataclass(frozen=True)
class EvaluationArgs:
    """How it is scored."""

    validation_episodes: Annotated[int, "from 0 to 65536", 0, 2**16] = 10  # at each checkpoint, to keep the best agent
    eval_episodes: Count = 100  # episodes of the final evaluation
    deterministic: bool = True  # scores and films are of the policy's mode; --no-deterministic samples
    capture_video: bool = False  # leave replay.mp4, one episode; with --repo-id always
    render: bool = False  # with --evaluate: no score, but a window to watch, until it is closed


@dataclass(frozen=True)
class RunArgs:
    """What a run is called, what is done with one that is there already, and where it is shared."""

    exp_name: str = "ppo"  # part of the run's name
    run_name: str | None = None  # folder under runs/; default {env_id}__{exp_name}__{seed}__{time}
    evaluate: str | None = None  # a run's folder, or a Hub repo (me/name or me/name@revision): play it, train nothing
    init_from: str | None = None  # a run's folder, or a Hub repo: a new run starts with its agent
    resume: str | None = None  # a run's folder: go on from its last checkpoint
    push: str | None = None  # a finished run's folder: push it to --repo-id, train nothing
    repo_id: str | None = None  # Hub repo to push to; log in with `hf auth login` or set HF_TOKEN
    private: bool = False  # make that repo private
    track: bool = False  # mirror the logs to Weights & Biases
    wandb_project_name: str = "ppo"  # its project
    wandb_entity: str | None = None  # its team


@dataclass(frozen=True)
class MachineArgs:
    """What it runs on."""

    seed: Annotated[int, "from 0 to 4294967295", 0, 2**32 - 1] = 1  # of weights, environments, actions, minibatches
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU for images and wide networks, else the CPU
    compile: bool = False  # compile the loss and its gradient; pays off in long runs
    checkpoint_every: Count | None = None  # iterations; default a tenth of the run, or 5 full episodes if that is more


@dataclass(frozen=True)
class Args(MachineArgs, RunArgs, EvaluationArgs, NetworkArgs, AlgorithmArgs, WorldArgs):  # fields of the last are first
    """Train a PPO agent; or evaluate, resume or push one. Defaults are the preset that fits the environment."""

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @cached_property
    def run(self) -> Path:
        """The run's folder."""
        name = re.sub(r"[^\w.=+-]", "-", f"{self.env_id}__{self.exp_name}__{self.seed}__{time.time():.3f}")
        return Path(self.resume or self.push or self.evaluate or f"runs/{self.run_name or name}")

    def __post_init__(self):
        check(self)


# ---- The agent: policy and value function ------------------------------------


@dataclass
class Categorical:
    """Independent choices, of nvec[i] in the i-th component of an action; all logits in one row, [..., sum(nvec)]."""

    logits: Tensor
    nvec: list[int]

    @staticmethod
    def noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Gumbel noise: the argmax of logits + noise is a sample of their softmax."""
        return -x.exponential_(generator=generator).log()

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
    """A normal distribution for each dimension of an action [continuous 1], [..., D]."""

    mean: Tensor
    logstd: Tensor  # [D], whatever the observation [continuous 2]

    @staticmethod
    def noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
        return x.normal_(generator=generator)

    def choose(self, noise: Tensor | float) -> Tensor:  # [..., D]
        return self.mean + self.logstd.exp() * noise

    def logprob_and_entropy(self, action: Tensor):  # [...] each
        z = (action - self.mean) * (-self.logstd).exp()
        logprob = -0.5 * z**2 - self.logstd - 0.5 * math.log(2 * math.pi)
        entropy = self.logstd + 0.5 * math.log(2 * math.pi * math.e)
        return logprob.sum(-1), entropy.expand_as(z).sum(-1)  # over dimensions [continuous 3]


class Agent(nn.Module, hub.PyTorchModelHubMixin):
    """All that is needed to act: weights and running statistics.

    Vectors go through an actor's and a critic's MLP [core 13, continuous 4], images through a
    CNN below both [Atari 8]. `nvec` holds the number of choices of each discrete component
    of an action, None means a Box. `parts` is what an observation consists of where that is more
    than one vector, see `obs_parts`; `spaces` are the environment's own, of observations and of
    actions, see `describe`. With `masks`, an observation ends with one number for each choice: 1
    where it is allowed. `network` are the fields of NetworkArgs. All are JSON: config.json.
    """

    def __init__(
        self,
        obs_shape: list[int],
        action_shape: list[int],
        nvec: list[int] | None,
        parts: list | None = None,
        spaces: list[dict] | None = None,
        masks: str | None = None,
        **network,
    ):
        super().__init__()
        self.obs_shape, self.action_shape, self.nvec = obs_shape, action_shape, nvec
        self.spaces, self.masks = spaces, masks
        self.reset()
        self.network = NetworkArgs(**network)
        self.kind = Categorical if nvec else Gaussian
        self.outputs = sum(nvec) if nvec else math.prod(action_shape)

        seen = [obs_shape[0] - self.outputs] if masks else obs_shape
        self.trunk = make_trunk(seen, parts, self.network.precision)
        features = self.trunk.features if self.trunk else seen[0]
        units = self.network.lstm_hidden_size
        self.memory = Memory(features, units) if units else None
        features = units or features
        hidden, activation = self.network.hidden_sizes, self.network.activation
        self.actor = mlp([features, *hidden, self.outputs], activation, gain=0.01)  # near uniform, or near 0, at first
        self.critic = mlp([features, *hidden, 1], activation, gain=1.0)
        if not nvec:
            self.logstd = nn.Parameter(torch.full((self.outputs,), self.network.logstd_init))

        self.obs_stats = RunningMeanStd(() if self.trunk else tuple(seen))
        self.return_stats = RunningMeanStd(())

    def encode(self, obs: Tensor) -> Tensor:  # [..., *obs_shape] -> [..., features]
        if self.masks:
            obs = obs[..., : -self.outputs]
        if self.trunk:
            lead = obs.shape[: obs.ndim - len(self.obs_shape)]
            return self.trunk(obs.reshape(lead.numel(), -1)).view(*lead, -1)
        if self.network.norm_obs:  # [continuous 6, 7]
            obs = (obs.double() - self.obs_stats.mean) / self.obs_stats.std
            return obs.float().clamp(-10, 10)
        return obs.float()

    def policy(self, features: Tensor, obs: Tensor) -> Categorical | Gaussian:
        """pi(. | s), for acting and for learning alike."""
        out = self.actor(features)
        if self.masks:  # what is forbidden has probability 0, and no gradient
            out = out.masked_fill(obs[..., -self.outputs :] == 0, torch.finfo(out.dtype).min)
        return Categorical(out, self.nvec) if self.nvec else Gaussian(out, self.logstd)

    def act(self, obs: Tensor, noise: Tensor | float = 0.0, memory: Tensor | None = None) -> Tensor:
        """The action that this noise selects, [..., *action_shape]; without noise the mode: the greedy action.

        A policy that remembers reads the memory, [2, N, units], and writes it anew.
        """
        features = self.encode(obs)
        if self.memory:
            features = self.memory.step(features, memory)
        action = self.policy(features, obs).choose(noise)
        return action.view((*action.shape[:-1], *self.action_shape))

    def predict(self, obs: Any, deterministic: bool = True, mask: np.ndarray | None = None) -> np.ndarray:
        """What `env.step` takes for what the environment showed: NumPy to NumPy, also of a batch, for a batch."""
        return predict(self, obs, deterministic, mask)

    def reset(self) -> None:
        """Forget what `predict` remembers: an episode begins."""
        self.recalled: Tensor | None = None

    def sample_noise(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """What makes `act` sample, [*shape, outputs]."""
        x = torch.empty(*shape, self.outputs, device=self.device)
        return self.kind.noise(x, generator)

    def replay(self, x: "Rollout | Batch") -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and values again; a rollout's obs[T] has a value, but no action."""
        obs, features = x.obs, self.encode(x.obs)
        if self.memory:
            obs, features = self.memory(features, x)
        acted = features[: len(x.actions)]
        actions = x.actions.reshape(*acted.shape[:-1], -1)
        logprobs, entropies = self.policy(acted, obs[: len(actions)]).logprob_and_entropy(actions)
        return logprobs, entropies, self.critic(features).squeeze(-1)

    @property
    def device(self) -> torch.device:
        return self.obs_stats.mean.device

    @classmethod
    def _load_as_pickle(cls, *args):
        raise ValueError("refused: this repo has no model.safetensors, and a pickle is not opened")


def mlp(sizes: list[int], activation: str, gain: float) -> nn.Sequential:
    """Linear layers of these sizes with activations between them; `gain` is that of the last layer."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:-1]):
        layers.append(layer_init(nn.Linear(a, b)))
        layers.append(nn.Tanh() if activation == "tanh" else nn.ReLU())
    last = nn.Linear(*sizes[-2:])
    return nn.Sequential(*layers, layer_init(last, gain))


def layer_init(layer, gain: float = math.sqrt(2)):
    """Orthogonal weights, zero biases [core 2]; sqrt(2) makes up for what ReLU takes from the variance."""
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
    """Generalised advantage estimation [core 5], GAE Eq. 16: [T, N], from values [T+1, N] and the rest [T, N].

    After a termination there is no value to come; after a truncation there is, that of the
    true last observation. Advantages never flow back from the next episode.
    """
    delta = (rewards + gamma * values[1:] * ~terminated - values[:-1]).unbind()  # PPO Eq. 12
    over = terminated | done  # a lost life is no done
    decay = (gamma * gae_lambda * (~over).to(values.dtype)).unbind()
    advantages = [delta[-1]]
    for t in reversed(range(len(delta) - 1)):
        advantages.append(delta[t] + decay[t] * advantages[-1])  # PPO Eq. 11
    return torch.stack(advantages[::-1])


def policy_loss(logratio: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """The clipped surrogate objective [core 8], PPO Eq. 7, negated; logratio = log pi(a|s) - log pi_old(a|s)."""
    ratio = logratio.exp()  # r(theta), PPO Eq. 6
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def value_loss(new: Tensor, old: Tensor, returns: Tensor, epsilon: float | None) -> Tensor:
    """Half the squared error; with epsilon, row by row, the larger of those of `new` and of it clipped about `old`."""
    error = (new - returns) ** 2
    if epsilon is not None:  # [core 9]
        clipped = old + (new - old).clamp(-epsilon, epsilon)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * error.mean()


def approx_kl(logratio: Tensor) -> Tensor:
    """KL(pi_old || pi), unbiased and with little noise: k3 of joschu.net/blog/kl-approx.html."""
    return (logratio.exp() - 1 - logratio).mean()


def policy_change(logratio: Tensor, epsilon: float) -> dict[str, Tensor]:
    """How far pi has left pi_old, for the logs [core 12]: KL, estimated twice, and how often the ratio is clipped."""
    outside = (logratio.exp() - 1).abs() > epsilon
    return {
        "old_approx_kl": -logratio.mean(),
        "approx_kl": approx_kl(logratio),
        "clipfrac": outside.float().mean(),
    }


def follow_kl(lr: float, kl: float, args: Args) -> float:
    """The next learning rate, smaller after too large a KL and larger after too small a one, against beta of PPO Eq. 8.

    The rule is rsl_rl's (Rudin et al. 2021). Bounds are a hundredth and the tenfold of --learning-rate.
    """
    assert args.desired_kl
    if kl > 2 * args.desired_kl:
        return max(lr / 1.5, args.learning_rate / 100)
    if kl < args.desired_kl / 2:
        return min(lr * 1.5, args.learning_rate * 10)
    return lr


def standardize(x: Tensor, share: float = 1.0) -> Tensor:
    """Zero mean and unit variance along the last axis, over all ranks, each counting with its share of the rows."""
    means = torch.stack([x.double().mean(-1), x.double().square().mean(-1)])
    mean, square = rank_sum(share * means).unsqueeze(-1)
    deviation = (square - mean**2).clamp(0).sqrt()
    return ((x - mean) / (deviation + 1e-8)).float()


def clip_norm(gradient: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The gradient, shortened if its norm, over all parameters at once, exceeds the limit [core 11]; and that norm."""
    norm = gradient.norm()
    return gradient * (limit / (norm + 1e-6)).clamp(max=1), norm


# ---- Collect, estimate, optimise: Algorithm 1 --------------------------------


@dataclass
class Rollout:
    """T steps in N environments, row by row as in the drawing at the top."""

    obs: Tensor  # [T+1, N, *obs_shape]
    actions: Tensor  # [T, N, *action_shape]
    rewards: np.ndarray  # [T, N], as the rest
    terminated: np.ndarray
    done: np.ndarray
    valid: np.ndarray
    memory: Tensor  # [2, N, units], as it was before the first row; without an LSTM, of no units

    def split(self, n: int) -> "list[Rollout]":
        """Parts of n environments each."""
        starts = range(0, self.obs.shape[1], n)
        return [Rollout(*(x[:, i : i + n] for x in vars(self).values())) for i in starts]


@torch.inference_mode()
def collect(agent: Agent, worlds: "Worlds", rollout: Rollout, generator: torch.Generator) -> None:
    """Run the policy in N environments for T steps [core 1].

    It does not change meanwhile, so log-probabilities and values can wait for `estimate`.
    """
    T, N = rollout.rewards.shape
    noise, device = agent.sample_noise(T, N, generator=generator), agent.device
    rollout.memory.copy_(worlds.memory)
    for t in range(T):
        rollout.obs[t] = to_torch(worlds.obs, device)
        rollout.valid[t] = ~worlds.resetting  # else it is the last observation of an episode
        rollout.actions[t] = agent.act(rollout.obs[t], noise[t], worlds.memory)  # writes the memory
        rollout.rewards[t], rollout.terminated[t], rollout.done[t] = worlds.step(rollout.actions[t])
    rollout.obs[T] = to_torch(worlds.obs, device)


@dataclass
class Batch:
    """What is learned from: [T, N, ...] of a rollout, or [M, ...] of a minibatch."""

    obs: Tensor
    actions: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __getitem__(self, rows) -> "Batch":
        return Batch(*(column[rows] for column in vars(self).values()))


@torch.no_grad()  # not inference_mode: autograd will meet these numbers in the loss
def estimate(agent: Agent, rollout: Rollout, args: Args) -> Batch:
    """Log-probabilities, values, advantages and returns of all rows; theta_old is theta now."""
    T, device = len(rollout.actions), agent.device
    parts = rollout.split(max(1, 4096 // T))  # a few thousand rows at a time, for images are large
    columns = zip(*(agent.replay(part) for part in parts))
    logprobs, _, values = (torch.cat(column, 1) for column in columns)  # [T, N], values [T+1, N]

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


def minibatches(
    batch: Batch,
    rollout: Rollout,
    args: Args,
    generator: torch.Generator,
) -> Iterator[tuple[Batch, float]]:
    """One epoch: the valid rows in a new order, M at a time [core 6], and this rank's share of all valid rows."""
    _, share = count_rows(rollout.valid)
    flat = Batch(*(column.flatten(0, 1) for column in vars(batch).values()))  # [N T, ...]
    rows = shuffle(rollout.valid, generator).view(args.num_minibatches, -1)
    advantages = flat.advantages[rows]  # [num_minibatches, M]
    if args.norm_adv:  # [core 7]
        advantages = standardize(advantages, share)
    for m, A in zip(rows, advantages):
        minibatch = flat[m]
        minibatch.advantages = A
        yield minibatch, share


def shuffle(valid: np.ndarray, generator: torch.Generator) -> Tensor:
    """The valid rows, [valid.size], in a new order; as resets leave fewer rows than that, it is repeated to fill up."""
    rows = to_torch(np.flatnonzero(valid), generator.device)
    order = torch.randperm(len(rows), generator=generator, device=generator.device)
    return rows[order].repeat(math.ceil(valid.size / len(rows)))[: valid.size]


def compute_gradient(agent: Agent, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient of the objective, PPO Eq. 9, negated, as one vector; and what the logs tell of it."""
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


def train(args: Args) -> Path:
    """PPO, Algorithm 1, from the start or from a checkpoint. Returns the run's folder, with the agent in it."""
    join_ranks(args)
    run, state = open_run(args)
    agent, optimizer, generator = state.agent, state.optimizer, state.generator
    gradient_fn = compile_gradient(agent, args) if args.compile else compute_gradient
    T, N = args.num_steps, args.num_envs // rank_count()
    draw = whole_environments if agent.memory else minibatches
    rollout = empty_rollout(agent, T, N)
    log = Log(args, run, state)

    for leg in legs(state.iteration, args):
        # Environments can't be saved, so every run makes new ones here: a resumed run repeats the uninterrupted one.
        # Episodes under way are cut, as by a truncation.
        env_seeds = seeds(args.seed, TRAINING, rank(), leg.start, n=N)
        worlds = Worlds(args, env_seeds, leg.start * T)
        for iteration in leg:
            started = time.perf_counter()
            if args.anneal_lr and not args.desired_kl:  # [core 4]
                state.learning_rate = args.learning_rate * (1 - iteration / args.num_iterations)

            collect(agent, worlds, rollout, generator)  # run pi_old in N environments for T steps
            batch = estimate(agent, rollout, args)  # advantages A_1, ..., A_T

            # Optimise the surrogate with respect to theta, in K epochs of minibatches of M rows
            priming = iteration == 0 and lacks_statistics(agent, args)  # the first rollout only fills them
            K = 0 if priming else args.update_epochs
            for _ in range(K):
                kl = torch.zeros((), device=agent.device)  # mean over the epoch
                for minibatch, weight in draw(batch, rollout, args, generator):
                    gradient, metrics = gradient_fn(agent, minibatch, args)
                    gradient, metrics = mean_over_ranks(gradient, metrics, weight)
                    gradient, metrics["gradient_norm"] = clip_norm(gradient, args.max_grad_norm)
                    check_finite(metrics, iteration)
                    optimizer.step(gradient, state.learning_rate)
                    kl += metrics["approx_kl"] / args.num_minibatches
                    log.add(metrics)
                if args.desired_kl:
                    state.learning_rate = follow_kl(state.learning_rate, kl.item(), args)
                if args.target_kl and kl > args.target_kl:
                    break

            update_statistics(agent, worlds, rollout, args)
            transitions, share = count_rows(rollout.valid)  # on all ranks; the fraction of this one
            state.global_step += transitions
            state.seconds += time.perf_counter() - started
            log.write(iteration, rollout, worlds, batch, share)

        worlds.envs.close()
        state.iteration = leg.stop
        state.score = validate(agent, args)
        state.keep_best()
        log.flush()
        save_checkpoint(run, state)
    log.close()
    return publish(run, state)


# ---- Memory: what an observation does not show -------------------------------


class Memory(nn.LSTM):
    """One LSTM layer between encoder and heads. Its state, h and c, is [2, N, units]."""

    def __init__(self, features: int, units: int):
        super().__init__(features, units)
        for name, x in self.named_parameters():  # [LSTM 1]
            nn.init.zeros_(x) if "bias" in name else nn.init.orthogonal_(x)

    def step(self, features: Tensor, memory: Tensor) -> Tensor:
        """One step of N environments, [N, features] to [N, units], or of one; `memory` is written anew, in place."""
        h, c = memory.to(features.device).split(1)
        out, state = super().forward(features.reshape(1, -1, self.input_size), (h.contiguous(), c.contiguous()))
        memory.copy_(torch.cat(state))
        return out.view(*features.shape[:-1], -1)

    def forward(self, features: Tensor, x: "Rollout | Chapters") -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Observations and features of all steps of N environments again [LSTM 5]; of a minibatch, at its rows.

        Each episode, or what the rollout has of it, becomes a sequence of its own, so that the LSTM is called once.
        It begins at a state of zero [LSTM 2] or, at the first row, at the state that the rollout began with.
        """
        T, N, _ = features.shape
        first = torch.zeros(T, N, dtype=torch.bool, device=features.device)
        first[0] = True
        first[1:] = ~to_torch(x.valid, features.device)[: T - 1]  # the row after a reset
        flat = features.transpose(0, 1).flatten(0, 1)  # one environment after the other
        begins = first.T.flatten().nonzero().squeeze(1)
        lengths = torch.diff(begins, append=begins.new_tensor([T * N]))
        sequences = nn.utils.rnn.pad_sequence(flat.split(lengths.tolist()))  # [longest, number, features]
        state = sequences.new_zeros(2, len(begins), self.hidden_size)
        state[:, begins % T == 0] = x.memory
        out, _ = super().forward(sequences, tuple(state.split(1)))
        inside = torch.arange(len(out), device=begins.device) < lengths.unsqueeze(1)  # not padding
        out = out.transpose(0, 1)[inside].view(N, T, -1).transpose(0, 1)
        if isinstance(x, Chapters):
            return x.obs.flatten(0, 1)[x.rows], out.flatten(0, 1)[x.rows]
        return x.obs, out


@dataclass
class Chapters(Batch):
    """A minibatch of n environments' whole rollouts, of which the M valid rows are learned."""

    obs: Tensor  # [T, n, *obs_shape]; all that Batch has besides, [M, ...]
    valid: np.ndarray  # [T, n]
    memory: Tensor  # [2, n, units]
    rows: Tensor  # [M], among T n


def whole_environments(
    batch: Batch,
    rollout: Rollout,
    args: Args,
    generator: torch.Generator,
) -> Iterator[tuple[Chapters, float]]:
    """One epoch for a policy with memory: a few environments at a time, from the first step to the last [LSTM 4]."""
    T, N = rollout.valid.shape
    order = torch.randperm(N, generator=generator, device=generator.device)
    for envs in order.view(args.num_minibatches, -1):
        valid = rollout.valid[:, envs.cpu().numpy()]
        _, share = count_rows(valid)  # of these environments, not of the rollout
        rows = shuffle(valid, generator)
        part = Batch(*(column[:, envs] for column in vars(batch).values()))
        minibatch = Batch(*(column.flatten(0, 1)[rows] for column in vars(part).values()))
        if args.norm_adv:
            minibatch.advantages = standardize(minibatch.advantages, share)
        kept = vars(minibatch) | {"obs": part.obs}
        yield Chapters(**kept, valid=valid, memory=rollout.memory[:, envs], rows=rows), share


# ---- Spaces: images, observations of several parts, and predict --------------

# In small images a byte may be a brightness or, as in MiniGrid, the number of a thing: 15 numbers, and the brightness
SMALL_BYTES = torch.cat([torch.eye(256)[:, 1:16], torch.linspace(0, 1, 256).unsqueeze(1)], 1)


class CNN(nn.Sequential):
    """Images [n, pixels] to features [n, features], in any order of channels.

    From 36 x 36 pixels the Nature CNN (Mnih et al. 2015), below that MinAtar's (Young & Tian 2019):
    on its Asterix, after 2M steps, it scored 19.3, an MLP on the flattened pixels 3.4. Only what
    lies between images and features is ever bfloat16: products, not weights.
    """

    def __init__(self, kind: str, shape: list[int], precision: str):
        channels, *size = channels_first(torch.empty(shape), shape).shape
        large = is_large(shape)
        codes = kind == "bytes" and not large
        channels *= SMALL_BYTES.shape[1] if codes else 1
        filters = [(32, 8, 4), (64, 4, 2), (64, 3, 1)] if large else [(16, 3, 1)]
        layers: list[nn.Module] = []
        for number, kernel, stride in filters:
            layers += [layer_init(nn.Conv2d(channels, number, kernel, stride)), nn.ReLU()]
            channels, size = number, [(s - kernel) // stride + 1 for s in size]
        features = 512 if large else 128
        linear = layer_init(nn.Linear(channels * math.prod(size), features))
        super().__init__(*layers, nn.Flatten(), linear, nn.ReLU())
        self.features, self.shape, self.codes = features, shape, codes
        self.white = 255 if kind == "bytes" else 1
        self.in_bfloat16 = precision == "bfloat16"

    def forward(self, x: Tensor) -> Tensor:
        full = self[0].weight.dtype
        kind = torch.bfloat16 if self.in_bfloat16 else full
        images = channels_first(x.reshape(-1, *self.shape), self.shape)
        if self.codes:
            shown = nn.functional.embedding(images.movedim(1, -1).long(), SMALL_BYTES.to(x.device))
            images = shown.to(kind).flatten(-2).movedim(-1, 1)
        else:
            images = images.to(kind).contiguous(memory_format=torch.channels_last) / self.white  # [Atari 9]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            return super().forward(images).to(full)


class Senses(nn.ModuleList):
    """Parts of an observation, side by side in a row: images through CNNs, numbers as they are."""

    def __init__(self, parts: list, precision: str):
        super().__init__()
        self.sizes = [math.prod(shape) for _, shape in parts]
        for kind, shape in parts:
            self.append(CNN(kind, shape, precision) if len(shape) > 1 else nn.Identity())
        self.features = sum(getattr(sense, "features", size) for sense, size in zip(self, self.sizes))

    def forward(self, rows: Tensor) -> Tensor:
        columns = rows.float().split(self.sizes, -1)
        return torch.cat([sense(x) for sense, x in zip(self, columns)], -1)


def make_trunk(obs_shape: list[int], parts: list | None, precision: str) -> CNN | Senses | None:
    """What actor and critic share below their MLPs: nothing, where an observation is one vector."""
    if len(obs_shape) > 1:
        return CNN(parts[0][0] if parts else "bytes", obs_shape, precision)
    return Senses(parts, precision) if parts else None


def channels_first(images: Tensor, shape: list[int]) -> Tensor:
    """Images [..., C, H, W], from those, from [..., H, W, C], from [..., H, W] or from a stack of such."""
    if len(shape) == 2:
        return images.unsqueeze(-3)
    if shape[-1] == min(shape[-3:]):  # fewer channels than pixels in a row
        images = images.movedim(-1, -3)
    return images.flatten(-4, -3) if len(shape) == 4 else images


@torch.inference_mode()
def predict(agent: Agent, obs: Any, deterministic: bool, mask: np.ndarray | None) -> np.ndarray:
    """See Agent.predict. ValueError if shapes do not fit, or if the agent's config.json does not know the spaces."""
    if not agent.spaces:
        raise ValueError("this agent was saved by an earlier edition, without its spaces: use agent.act, with tensors")
    obs_space, action_space = map(build_space, agent.spaces)
    if agent.masks == "observation":
        mask = obs["action_mask"]
        obs_space = without_mask(obs_space)
    flat = flatten_obs(obs, obs_space)
    lead = flat.shape[:-1]
    if agent.masks:
        if mask is None:
            raise ValueError("this policy was trained with action masks: give the mask, too")
        mask = np.concatenate(mask, -1) if isinstance(mask, tuple) else mask  # of each component
        flat = np.concatenate([flat, np.reshape(mask, (*lead, agent.outputs))], -1)
    if agent.memory and (agent.recalled is None or agent.recalled.shape[1] != math.prod(lead)):
        agent.recalled = torch.zeros(2, math.prod(lead), agent.network.lstm_hidden_size)
    rows = torch.as_tensor(flat.copy()).to(agent.device)
    noise = 0.0 if deterministic else agent.sample_noise(*lead)
    action = agent.act(rows.view(*lead, *agent.obs_shape), noise, agent.recalled)
    return to_env(action, action_space)[()]  # of an array without axes, its number


def describe(space: gym.Space) -> dict[str, Any]:
    """A space as JSON: its type, and the arguments that make it again."""
    match space:
        case gym.spaces.Dict():
            return {"Dict": {"spaces": [[name, describe(part)] for name, part in space.items()]}}
        case gym.spaces.Tuple():
            return {"Tuple": {"spaces": [describe(part) for part in space]}}
        case gym.spaces.Box():  # JSON knows no infinity
            low, high = (
                (x if (x != x.flat[0]).any() else x.flat[0]).tolist()
                for x in map(np.nan_to_num, (space.low, space.high))
            )
            return {"Box": {"low": low, "high": high, "shape": list(space.shape), "dtype": space.dtype.name}}
        case gym.spaces.Discrete():
            return {"Discrete": {"n": int(space.n), "start": int(space.start), "dtype": space.dtype.name}}
        case gym.spaces.MultiDiscrete():
            start, nvec = space.start.tolist(), space.nvec.tolist()
            return {"MultiDiscrete": {"nvec": nvec, "start": start, "dtype": space.dtype.name}}
    return {"MultiBinary": {"n": list(space.shape)}}


def build_space(described: dict[str, Any]) -> gym.Space:
    """The space that `describe` told of."""
    ((kind, given),) = described.items()
    if kind == "Dict":
        return gym.spaces.Dict([(name, build_space(part)) for name, part in given["spaces"]])
    if kind == "Tuple":
        return gym.spaces.Tuple([build_space(part) for part in given["spaces"]])
    if kind == "Box":
        low, high = (np.full(given["shape"], given[bound], given["dtype"]) for bound in ("low", "high"))
        return gym.spaces.Box(low, high, dtype=low.dtype.type)
    known = {"Discrete": gym.spaces.Discrete, "MultiDiscrete": gym.spaces.MultiDiscrete}
    return known.get(kind, gym.spaces.MultiBinary)(**given)


def flatten_obs(obs: Any, space: gym.Space) -> np.ndarray:
    """An observation as one row of numbers, or a batch of them as rows: [..., gym.spaces.flatdim(space)]."""
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        if not isinstance(obs, (dict, tuple)):
            raise ValueError(f"an observation is {space}; got {type(obs).__name__}")
        names: Any = space.keys() if isinstance(space, gym.spaces.Dict) else range(len(space))
        return np.concatenate([flatten_obs(obs[name], space[name]) for name in names], -1)
    x, shape = np.asarray(obs), space.shape or ()
    lead = x.shape[: x.ndim - len(shape)]
    if len(lead) > 1 or x.shape != lead + shape:
        raise ValueError(f"an observation has shape {list(shape)}, a batch one axis more; got {list(x.shape)}")
    if isinstance(space, gym.spaces.Box):
        return x.reshape(*lead, -1)
    rows = [gym.spaces.flatten(space, row) for row in x.reshape(-1, *shape)]
    return np.reshape(rows, (*lead, -1))


# ---- Running statistics, for normalisation -----------------------------------


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far, over all ranks, in float64, from deviations from the old mean."""

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
        n = torch.full_like(self.mean, len(d))
        n, sums, squares = rank_sum(torch.stack([n, d.sum(0), d.square().sum(0)]))
        total = self.count + n
        shift = sums / total
        variance = (self.count * self.var + squares) / total - shift**2
        self.var.copy_(variance.clamp(0))
        self.mean.add_(shift)
        self.count.copy_(total)


def lacks_statistics(agent: Agent, args: Args) -> bool:
    """Whether a normaliser that is asked for has seen nothing yet, as it has in an agent that --init-from took up."""
    normalisers = [(args.norm_obs, agent.obs_stats), (args.norm_reward, agent.return_stats)]
    return any(used and not stats.count.any() for used, stats in normalisers)


def update_statistics(agent: Agent, worlds: "Worlds", rollout: Rollout, args: Args) -> None:
    """The agent's running statistics see the rollout only after it was learned from, so that ratios begin at 1."""
    valid = to_torch(rollout.valid, agent.device)
    if args.norm_reward:
        sums = accumulate(rollout.rewards, rollout.done, worlds.discounted, args.gamma)
        agent.return_stats.update(to_torch(sums, agent.device)[valid])
    if args.norm_obs:
        rows = rollout.obs[:-1][valid]
        agent.obs_stats.update(rows[..., : -agent.outputs] if agent.masks else rows)


def accumulate(x: np.ndarray, done: np.ndarray, carry: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """Discounted sums of x within episodes, forward in time: x, done and the sums [T, N].

    `carry` [N] holds the sums of the episodes under way: updated in place, zero for those that ended.
    """
    sums = np.empty(x.shape)
    for t in range(len(x)):
        carry *= gamma
        carry += x[t]
        sums[t] = carry
        carry[done[t]] = 0
    return sums


# ---- Worlds: Gymnasium's vector environments, in NEXT_STEP mode --------------

TRAINING, VALIDATION, EVALUATION, VIDEO, WEIGHTS, SAMPLING = range(6)  # each has a stream of random numbers of its own


def seeds(seed: int, *stream: int, n: int = 1) -> list[int]:
    """n independent 31-bit seeds. Plain seed + i would make the second world of seed 1 the first of seed 2."""
    return [int(s) >> 1 for s in np.random.SeedSequence([seed, *stream]).generate_state(n)]


class Worlds:
    """As many environments as seeds, the observations they wait at, and the sums of their episodes under way."""

    def __init__(self, args: Args, seeds: list[int], t: int = 0, training: bool = True, render: bool = False):
        self.t = t  # steps so far
        self.envs, self.obs, info = make_envs(args, seeds, training, render)
        self.lives = info["lives"].copy() if args.episodic_life else None
        self.resetting = np.zeros(len(seeds), dtype=bool)  # the episode has ended: the next step is its reset
        self.returned, self.length, self.discounted = np.zeros((3, len(seeds)))
        self.memory = torch.zeros(2, len(seeds), args.lstm_hidden_size)  # of the episodes under way

    def step(self, actions: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rewards, terminated (or a life lost) and done, [N] each."""
        choice = to_env(actions, self.envs.single_action_space)
        answer = ask(self.envs, f"at step {self.t}", self.envs.step, choice)
        self.obs, rewards, terminated, truncated, info = answer
        done = terminated | truncated
        if self.lives is not None:  # [Atari 3]
            terminated = terminated | (info["lives"] < self.lives)
            self.lives = info["lives"].copy()
        if self.memory.numel():
            self.memory[:, self.resetting] = 0  # the next observation is an episode's first [LSTM 3]
        self.resetting = done
        self.t += 1
        return rewards, terminated, done


def to_env(actions: Tensor, space: gym.Space) -> np.ndarray:
    """What the environment takes: within its Box [continuous 5], while the agent learns from what it had chosen."""
    choice = actions.cpu().numpy() + getattr(space, "start", 0)  # of Discrete and MultiDiscrete
    if isinstance(space, gym.spaces.Box):
        choice = np.clip(choice, space.low, space.high)
    return choice.astype(space.dtype, copy=False)


def empty_rollout(agent: Agent, T: int, N: int) -> Rollout:
    obs_type = torch.uint8 if getattr(agent.trunk, "white", 1) == 255 else None
    action_type = torch.int64 if agent.nvec else None
    obs = torch.zeros(T + 1, N, *agent.obs_shape, dtype=obs_type, device=agent.device)
    actions = torch.zeros(T, N, *agent.action_shape, dtype=action_type, device=agent.device)
    memory = torch.zeros(2, N, agent.network.lstm_hidden_size, device=agent.device)
    return Rollout(obs, actions, np.zeros((T, N)), *np.zeros((3, T, N), dtype=bool), memory)


def make_envs(args: Args, seeds: list[int], training: bool = True, render: bool = False):
    """As many environments as seeds, reset: (vector environment, observations [N, ...], vectors or images, info).

    Evaluation runs Gymnasium's own environment in this process, whatever trained the agent. Raises Stop for what
    cannot be made or is not supported.
    """
    mode: str = args.vectorization
    with what_was_given(args):
        native = find_env(args).vector_entry_point
        if not training:  # in this process
            known = args.env_id in gym.registry
            mode = {"async": "sync", "envpool": "auto" if known else "envpool"}.get(mode, mode)
        if mode == "auto":
            mode = "native" if native and (args.frame_stack == 1 or "ALE/" in args.env_id) else "sync"
        if args.frame_stack > 1 and mode in ("native", "envpool"):
            raise Stop(f"--frame-stack needs --vectorization sync or async; {args.env_id} is {mode} here")
        envs = vectorize(args, mode, seeds, render)
    next_step = gym.vector.AutoresetMode.NEXT_STEP
    if envs.metadata.get("autoreset_mode", next_step) != next_step:
        raise Stop(f"{args.env_id} does not reset in NEXT_STEP mode, as training needs: try --vectorization sync")
    if args.action_masks and (told := where_masks_are(args, envs)):
        if told == "observation" and args.frame_stack > 1:
            raise Stop("--frame-stack would stack action masks, too: give them in info, or take --no-action-masks")
        envs = Masked(envs, told)
    envs = vectors_or_images(args, envs)
    seed = {"native": seeds[0], "envpool": None}.get(mode, seeds)  # EnvPool has its seeds
    return envs, *ask(envs, "at its reset", envs.reset, seed=seed)


def vectors_or_images(args: Args, envs):
    """The same environments, with observations that are not images as vectors; discrete ones become one-hot."""
    space = envs.single_observation_space
    if is_image(space) or (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
        return envs
    if not all(map(is_supported, leaves(space))):
        supported = "Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple of these"
        raise Stop(f"{args.env_id} observes {space}; supported: {supported}")
    flat = gym.spaces.flatten_space(space)
    flatten = partial(flatten_obs, space=space)
    return gym.wrappers.vector.TransformObservation(envs, flatten, single_observation_space=flat)


class Masked(gym.vector.VectorWrapper):
    """Observations with the mask of allowed actions behind them, 1 or 0 for each choice, wherever it is told.

    An environment that tells none allows all, and so do the last observations of episodes, where nothing is chosen.
    """

    def __init__(self, envs, told: str):
        super().__init__(envs)
        self.told, act = told, envs.single_action_space
        self.nvec = np.atleast_1d(act.n if isinstance(act, gym.spaces.Discrete) else act.nvec.flatten())
        mask = gym.spaces.MultiBinary(int(self.nvec.sum()))
        self.single_observation_space = gym.spaces.Tuple([without_mask(envs.single_observation_space), mask])

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.join(obs, info, np.zeros(self.num_envs, dtype=bool)), info

    def step(self, actions):
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        return self.join(obs, info, terminated | truncated), rewards, terminated, truncated, info

    def join(self, obs: Any, info: dict[str, Any], done: np.ndarray) -> tuple:
        silent = np.zeros(self.num_envs, dtype=bool)
        if self.told == "observation":
            given = obs["action_mask"]
        elif self.told == "method":
            given = self.env.call("action_masks")  # type: ignore[attr-defined]
        else:
            given = info.get("action_mask", [()] * self.num_envs)
            silent = ~info.get("_action_mask", silent)
        allowed = np.ones((self.num_envs, self.nvec.sum()), dtype=np.int8)
        for i in np.flatnonzero(~silent & ~done):
            mask = np.hstack(given[i])  # MultiDiscrete's may come in parts
            if mask.shape != allowed[i].shape or not np.isin(mask, (0, 1)).all():
                raise Stop(f"environment {i} gave an action mask that is not {len(allowed[i])} times 0 or 1: {mask}")
            if not np.logical_or.reduceat(mask, np.cumsum(self.nvec) - self.nvec).all():
                raise Stop(f"environment {i} allows no action: its mask is {mask}")
            allowed[i] = mask
        return obs, allowed


def without_mask(space: gym.Space) -> gym.Space:
    """What is left to see; of a Dict, all but its mask."""
    if not isinstance(space, gym.spaces.Dict) or "action_mask" not in space.keys():
        return space
    return gym.spaces.Dict([(name, part) for name, part in space.items() if name != "action_mask"])


def where_masks_are(args: Args, envs) -> str | None:
    """By which of three conventions the environment tells what it allows; None: by none of them."""
    space, name = envs.single_observation_space, f"{args.env_id} {args.env_kwargs}"
    if not isinstance(envs.single_action_space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)):
        return None
    if isinstance(space, gym.spaces.Dict) and "action_mask" in space.keys():
        return "observation"
    if not isinstance(envs, (gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv)):
        return None
    if name not in MASKS:  # look once
        _, info = ask(envs, "at its reset", envs.reset, seed=0)
        method = envs.call("has_wrapper_attr", "action_masks")[0]
        MASKS[name] = "method" if method else "info" if "action_mask" in info else None
    return MASKS[name]


MASKS: dict[str, str | None] = {}  # what was found, by environment


def leaves(space: gym.Space) -> list[gym.Space]:
    """The parts of a Dict or a Tuple, in the order in which they are flattened; else the space itself."""
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        parts = space.values() if isinstance(space, gym.spaces.Dict) else space
        return [leaf for part in parts for leaf in leaves(part)]
    return [space]


def is_supported(space: gym.Space) -> bool:
    return isinstance(space, (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary))


def is_image(space: gym.Space) -> bool:
    """Whether a CNN can take it: two axes of at least 5 pixels, of bytes, bools or numbers in [0, 1]."""
    if not isinstance(space, gym.spaces.Box) or not 2 <= len(space.shape) <= 4 or sorted(space.shape)[-2] < 5:
        return False
    unit = len(space.shape) > 2 and space.low.min() >= 0 and space.high.max() <= 1
    return space.dtype == np.uint8 or unit


def is_large(shape: list[int]) -> bool:
    """Whether it is an image of at least 36 x 36 pixels."""
    return len(shape) > 1 and sorted(shape)[-2] >= 36


def obs_parts(space: gym.Space) -> list | None:
    """What an observation consists of, [kind, shape] each; None for a vector of numbers.

    Images are "bytes" or "floats" in [0, 1]; all else is a vector of "floats".
    """
    parts: list = []
    for leaf in leaves(space):
        shape = list(leaf.shape or ()) if is_image(leaf) else [gym.spaces.flatdim(leaf)]
        parts.append(["bytes" if len(shape) > 1 and leaf.dtype == np.uint8 else "floats", shape])
    return parts if any(len(shape) > 1 for _, shape in parts) else None


def find_env(args: Args) -> gym.envs.registration.EnvSpec:
    """Gymnasium's entry for the environment, once the module that registers it is imported."""
    module, _, env_id = args.env_id.rpartition(":")
    if module and not all(map(str.isidentifier, module.split("."))):
        raise Stop(f"{module} is no module's name: give it as import would, my_package.my_module:MyEnv-v0")
    if module or env_id.startswith("ALE/"):
        gym.register_envs(importlib.import_module(module or "ale_py"))
    if env_id.startswith("MinAtar/") and env_id not in gym.registry:
        importlib.import_module("minatar.gym").register_envs()
    if args.vectorization == "envpool" and env_id not in gym.registry:  # one of EnvPool's own
        pool = importlib.import_module("envpool")
        if env_id in pool.list_all_envs():
            limit = pool.make_spec(env_id).config.max_episode_steps
            return gym.envs.registration.EnvSpec(env_id, max_episode_steps=limit)
    return gym.spec(env_id)


def vectorize(args: Args, mode: str, seeds: list[int], render: bool):
    """The vector environment. ALE's own and EnvPool's treat frames as usual for Atari [Atari 1, 2, 4, 5, 7]."""
    env_id, n, kwargs = args.env_id.rpartition(":")[2], len(seeds), dict[str, Any](args.env_kwargs)
    ale = mode == "native" and env_id.startswith("ALE/")
    if render and not ale:
        kwargs["render_mode"] = "rgb_array"
    if mode == "envpool":
        if render:
            raise Stop("EnvPool draws no pictures")
        pool, name = importlib.import_module("envpool"), env_id.removeprefix("ALE/")
        if name not in pool.list_all_envs():
            raise Stop(f"EnvPool has no {name}: choose --vectorization sync or async")
        threads = min(n, local_cores())
        return pool.make(name, env_type="gymnasium", num_envs=n, num_threads=threads, seed=seeds, **kwargs)
    if mode == "native":
        kwargs |= {"reward_clipping": False} if ale else {}  # or reported returns would be clipped, too
        envs = gym.make_vec(env_id, n, "vector_entry_point", **kwargs)
        return InColour(envs, kwargs) if render and ale else envs
    stack = partial(gym.wrappers.FrameStackObservation, stack_size=args.frame_stack)
    wrappers = [stack] if args.frame_stack > 1 else []  # a reset fills the stack with its own observation
    return gym.make_vec(env_id, n, mode, {"copy": False}, wrappers, **kwargs)


class InColour(gym.vector.VectorWrapper):
    """ALE's vector environment, which does not render, with a twin that sees the same game in colour."""

    def __init__(self, envs, kwargs: dict[str, Any]):
        super().__init__(envs)
        colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
        self.twin = gym.make_vec(envs.spec.id, envs.num_envs, "vector_entry_point", **kwargs | colour)
        self.same = True

    def reset(self, *, seed=None, options=None):
        self.frames, _ = self.twin.reset(seed=seed, options=options)
        return self.env.reset(seed=seed, options=options)

    def step(self, actions):
        answer = self.env.step(actions)
        self.frames, rewards, *_ = self.twin.step(actions)
        if self.same and (rewards != answer[1]).any():
            print("warning: the game in colour is another: the rest of the video is grey", file=sys.stderr)
            self.same = False
        if not self.same:  # the newest of the stacked frames, as large
            grey = answer[0][:, -1:, np.arange(210) * 84 // 210][..., np.arange(160) * 84 // 160]
            self.frames = grey[..., None].repeat(3, -1)
        return answer

    def render(self):
        return tuple(self.frames[:, 0])

    def close(self, **kwargs):
        self.twin.close()
        return super().close(**kwargs)


@contextlib.contextmanager
def what_was_given(args: Args):
    """Errors in making the environment: one line for those that a name or an option causes."""
    try:
        yield
    except OSError as error:
        error.add_note(f"Raised by the making of {args.env_id}.")
        raise
    except (ImportError, gym.error.Error, TypeError, ValueError, AssertionError, LookupError) as error:
        if not args.env_kwargs and not isinstance(error, (ImportError, gym.error.Error)):
            raise  # it is not about what the user gave
        given = f" with {args.env_kwargs}" if args.env_kwargs else ""
        missing = getattr(error, "name", None)  # an ImportError's
        new = missing and not args.env_id.startswith(missing)
        hint = f"; try: pip install {missing.replace('_', '-')}" if new else ""
        if type(error) in (gym.error.NameNotFound, gym.error.Error):
            hint = "; ids are like LunarLander-v3, ALE/Pong-v5 or, for your own, my_module:MyEnv-v0"
        raise Stop(f"cannot make {args.env_id}{given}: {first_line(error)}{hint}") from None


def ask(envs, when: str, method: Callable, *args, **kwargs):
    """The answer of `envs.reset` or `envs.step`; Stop, or a note on the error, names the environment at fault."""
    try:
        answer = method(*args, **kwargs)
    except Stop as stop:
        raise Stop(f"{stop}, {when}", 2 if "reset" in when else 1) from None
    except Exception as error:
        culprits = ", ".join(map(str, find_culprits(envs.unwrapped, error, when)))
        error.add_note(f"Raised by environment {culprits or '(unknown)'} {when}.")
        raise
    for name, values in zip(("observation", "reward"), answer[:-1]):  # a reset answers with no reward
        if isinstance(values, np.ndarray) and values.dtype.kind == "f" and not np.isfinite(values).all():
            i = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise Stop(f"environment {i} gave the {name} {values[i]} {when}; nothing was learned from it", 1)
    return answer


def find_culprits(envs, error: Exception, when: str) -> list[int]:
    """The environments that raised the error; Stop if the process of one has died."""
    pipes = getattr(envs, "parent_pipes", ())  # AsyncVectorEnv's, None of those that raised
    culprits = [i for i, pipe in enumerate(pipes) if pipe is None]
    for i, worker in enumerate(() if culprits else getattr(envs, "processes", ())):
        worker.join(0.1)
        if worker.exitcode is not None:
            raise Stop(f"environment {i}: its process died {when}, exit code {worker.exitcode}", 1) from None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(frame.f_locals.get("self"), gym.vector.SyncVectorEnv) and "i" in frame.f_locals:
            culprits = [frame.f_locals["i"]]
    return culprits


def check_world(args: Args) -> None:
    """Print what may spoil training, a line each: Gymnasium's own checks, then those of a few hundred random steps."""
    with what_was_given(args):
        spec = find_env(args)
        if not spec.entry_point:
            raise Stop(f"--check-env looks at Gymnasium's environments; {args.env_id} is EnvPool's alone")
        env = gym.make(spec, disable_env_checker=True, **args.env_kwargs)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env.unwrapped, skip_render_check=True)
        except Exception as error:  # it raises at the first fault
            found.append(f"Gymnasium's checker: {first_line(error)}")
    plain = [re.sub(r"\x1b\[\d+m|WARN: ", "", first_line(warning.message)) for warning in caught]  # no colours
    found += [f"Gymnasium's checker: {line}" for line in plain]
    try:
        found += faults_in_play(args, env, steps=500)
    except Exception as error:
        found.append(f"random steps ended in {type(error).__name__}: {first_line(error)}")
    env.close()
    for line in found or ["no faults found"]:
        print(f"check: {line}", flush=True)


def faults_in_play(args: Args, env: gym.Env, steps: int) -> list[str]:
    obs, _ = env.reset(seed=args.seed)
    space, act = env.observation_space, env.action_space
    act.seed(args.seed)
    rows, paid, ended, outside, types = [], [], 0, 0, set()
    for _ in range(steps):
        outside += obs not in space
        types.add(getattr(obs, "dtype", space.dtype))
        rows.append(gym.spaces.flatten(space, obs).astype(np.float64))
        obs, reward, terminated, truncated, _ = env.step(act.sample())
        paid.append(float(reward))
        if terminated or truncated:
            ended += 1
            obs, _ = env.reset()
    values, rewards, found = np.array(rows), np.array(paid), []

    if not np.isfinite(values).all() or not np.isfinite(rewards).all():
        found.append("observations or rewards are not all finite: training will stop at the first such one")
    if types != {space.dtype}:
        found.append(f"observations are {', '.join(map(str, types))}, the space says {space.dtype}: make them the same")
    if outside:
        found.append(f"{outside} of {steps} observations are outside of observation_space: widen its bounds")
    if not ended and not env.spec.max_episode_steps:
        found.append(f"no episode ended in {steps} steps: give max_episode_steps to gym.register")
    if np.abs(rewards).max() > 10 and not (args.norm_reward or args.clip_reward):
        found.append(f"rewards go from {rewards.min():.4g} to {rewards.max():.4g}: try --norm-reward")
    if np.abs(values).max() > 10 and not args.norm_obs and not obs_parts(space):
        found.append(f"observations go from {values.min():.4g} to {values.max():.4g}: try --norm-obs")
    if isinstance(act, gym.spaces.Box) and (act.low != -act.high).any():
        found.append(f"actions in {act} are not symmetric around 0, where a policy begins: try wrappers.RescaleAction")
    return found


def has_large_images(parts: list | None) -> bool:
    return any(is_large(shape) for _, shape in parts or [])


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
    config: dict[str, Any] = {"obs_shape": list(envs.single_observation_space.shape), "action_shape": list(act.shape)}
    config |= {"nvec": nvec} | {name: getattr(args, name) for name in NETWORK}
    config["hidden_sizes"] = list(args.hidden_sizes)
    obs = envs.unwrapped.single_observation_space
    config["spaces"] = [describe(obs), describe(act)]
    config["masks"] = where_masks_are(args, envs.unwrapped) if args.action_masks else None
    config["parts"] = parts = obs_parts(without_mask(obs) if config["masks"] else obs)
    if args.precision == "auto" and parts:
        config["precision"] = "bfloat16" if has_bfloat16(choose_device(args, config)) else "float32"
    return config


# ---- Devices and ranks -------------------------------------------------------


def rank() -> int:
    """This process among those that torchrun started."""
    return int(os.environ.get("RANK", 0))


def rank_count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(args: Args) -> None:
    world = rank_count()
    what, total = ("environments", args.num_envs) if args.lstm_hidden_size else ("rows", args.batch_size)
    if args.num_envs % world or total // world % args.num_minibatches:
        raise Stop(f"--num-envs {args.num_envs}, and the {what} of a minibatch, must be multiples of {world} ranks")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def rank_sum(x: Tensor) -> Tensor:
    """The sum of x over all ranks, in place, the same on each of them."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def count_rows(valid: np.ndarray) -> tuple[int, float]:
    """Transitions among these rows of all ranks, and the share of them that is this one's."""
    total = int(rank_sum(torch.tensor(valid.sum())))
    return total, valid.sum() / total


class FlatAdam(nn.Module):
    """Adam (Kingma & Ba 2015) on theta, one vector that all parameters of the agent are views of.

    So clipping, Adam and the sum over ranks take a few operations each, not dozens on its parts.
    """

    def __init__(self, agent: Agent):
        super().__init__()
        self.theta = parameters_to_vector(agent.parameters()).detach()
        vector_to_parameters(self.theta, agent.parameters())
        self.mean = nn.Buffer(torch.zeros_like(self.theta))
        self.square = nn.Buffer(torch.zeros_like(self.theta))
        self.steps = nn.Buffer(torch.zeros((), device=self.theta.device))

    def step(self, gradient: Tensor, lr: float) -> None:
        constants: Any = dict(beta1=0.9, beta2=0.999, eps=1e-5)  # [core 3]
        constants |= dict(weight_decay=0.0, amsgrad=False, maximize=False, fused=True)
        adam([self.theta], [gradient], [self.mean], [self.square], [], [self.steps], lr=lr, **constants)


def mean_over_ranks(gradient: Tensor, metrics: dict[str, Tensor], share: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Means over all ranks, each counting with its share of the rows; one message."""
    if not dist.is_initialized():
        return gradient, metrics
    message = share * torch.cat([gradient, torch.stack(list(metrics.values()))])
    gradient, means = rank_sum(message).split([len(gradient), len(metrics)])
    return gradient, dict(zip(metrics, means))


def local_cores() -> int:
    """Processor cores for each process on this machine."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def has_bfloat16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 itself. Elsewhere it is emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(on is True for name, on in torch.cpu.get_capabilities().items() if "bf16" in name)


def warn_if_emulated(agent: Agent) -> None:
    """Say how much longer bfloat16 takes where it is not native."""
    seconds = {}
    for precision in "float32", "bfloat16":
        cnn = CNN("bytes", [4, 84, 84], precision).to(agent.device)
        images = torch.zeros(8, 4, 84, 84, dtype=torch.uint8, device=agent.device)
        for _ in range(2):  # the first call makes ready
            started = time.perf_counter()
            cnn(images).sum().item()
            seconds[precision] = time.perf_counter() - started
    factor = seconds["bfloat16"] / seconds["float32"]
    print(f"warning: bfloat16 is emulated here, and takes {factor:.1f} times as long as float32", file=sys.stderr)


def choose_device(args: Args, config: dict[str, Any]) -> torch.device:
    """Where to compute, and on how many threads: on a small MLP, a GPU or a second thread costs more than it gives."""
    large = has_large_images(config["parts"]) or max(args.hidden_sizes, default=0) >= 1024
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if args.device == "cuda" and not enough:
        raise Stop("--device cuda, but torch finds no GPU here for each process: use --device auto or cpu")
    rows = args.batch_size // rank_count() // args.num_minibatches
    threads = min(local_cores(), max(1, rows // 64)) if large else 1
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    torch.set_num_threads(max(1, int(given)) if given.isdigit() else threads)
    if args.device == "cuda" or (args.device == "auto" and large and enough):
        torch.backends.cudnn.deterministic = True  # the same seed gives the same weights
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def to_torch(x: np.ndarray, device: torch.device) -> Tensor:
    """From NumPy to the device; out of pinned memory, so that the CPU need not wait for a GPU."""
    tensor = torch.as_tensor(x)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def compile_gradient(agent: Agent, args: Args) -> Callable:
    """compute_gradient as one graph, without autograd at run time; compiled here, for minibatches of this size."""
    torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad would break the graph
    mode = "reduce-overhead" if agent.device.type == "cuda" else "default"  # a CUDA graph: it holds no RNG
    compiled = torch.compile(compute_gradient, fullgraph=True, dynamic=False, mode=mode)
    M, started = args.batch_size // rank_count() // args.num_minibatches, time.perf_counter()
    rows = empty_rollout(agent, 1, M)
    logprobs, _, values = (x[0].detach() for x in agent.replay(rows))  # in the shapes that they have
    compiled(agent, Batch(rows.obs[0], rows.actions[0], logprobs, values, logprobs.clone(), values.clone()), args)
    if rank() == 0:
        print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)
    return compiled


# ---- Evaluation and video ----------------------------------------------------


@torch.inference_mode()
def evaluate(
    agent: Agent,
    args: Args,
    episodes: int,
    stream: int = EVALUATION,
    deterministic: bool = True,
    film: "Callable[[Worlds], bool | None] | None" = None,
    limit: int = 27_000,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths, [episodes] each: the first episode of each of that many fresh environments.

    Their seeds follow from args.seed and the stream; nothing that training draws from is touched. No episode goes on
    for more than `limit` steps, by default Atari's. `film` sees the worlds before each step and at the end, and may
    stop.
    """
    generator = torch.Generator(agent.device).manual_seed(seeds(args.seed, stream, SAMPLING)[0])
    worlds = Worlds(args, seeds(args.seed, stream, n=episodes), training=False, render=bool(film))
    (returns, lengths), running = np.zeros((2, episodes)), np.ones(episodes, dtype=bool)
    while running.any() and worlds.t < limit:
        if film and film(worlds):
            break
        noise = 0.0 if deterministic else agent.sample_noise(episodes, generator=generator)
        rewards, _, done = worlds.step(agent.act(to_torch(worlds.obs, agent.device), noise, worlds.memory))
        returns += rewards * running
        lengths += running
        running &= ~done
    if film:
        film(worlds)
    worlds.envs.close()
    return returns, lengths


def validate(agent: Agent, args: Args) -> float:
    """The mean return by which the best agent is kept, on rank 0."""
    if rank() > 0 or not args.validation_episodes:
        return -math.inf
    limit = 5_000  # a greedy agent may play on without end where nothing is to be won, as in Breakout
    returns, _ = evaluate(agent, args, args.validation_episodes, VALIDATION, args.deterministic, limit=limit)
    return float(returns.mean())


def record_video(agent: Agent, args: Args, path: Path) -> None:
    """One episode as H.264, which browsers play. Its failure costs no run."""
    unfinished, video = path.with_name("unfinished.mp4"), None

    def film(worlds: Worlds) -> None:
        nonlocal video
        frame = worlds.envs.render()[0]
        if video is None:
            fps, options = worlds.envs.metadata.get("render_fps", 15), ["-movflags", "+faststart"]
            size = frame.shape[1::-1]
            video = write_frames(str(unfinished), size, fps=fps, macro_block_size=2, output_params=options)
            video.send(None)
        video.send(np.ascontiguousarray(frame))

    try:
        from imageio_ffmpeg import write_frames

        os.environ["SDL_VIDEODRIVER"] = "dummy"  # pygame draws without a display; so does MuJoCo, through EGL
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        evaluate(agent, args, 1, VIDEO, args.deterministic, film=film, limit=3_000)
        video.close()
        os.replace(unfinished, path)
        print(f"video: {path}", flush=True)
    except Exception as error:
        unfinished.unlink(missing_ok=True)
        print(f"warning: no video: {type(error).__name__}: {first_line(error):.200}", file=sys.stderr)


def watch(agent: Agent, args: Args) -> None:
    """One episode after the other in a window, in real time, until it is closed."""
    with one_line("--render", "It needs pygame and a display; without one, --capture-video leaves a film"):
        import pygame

        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise OSError("no display")
        pygame.display.init()
    closed, clock = False, pygame.time.Clock()
    with one_line("--render", "The environment must take render_mode rgb_array, and draw"):
        envs, *_ = make_envs(args, [args.seed], training=False, render=True)
        if envs.render()[0] is None:
            raise ValueError("render() gave no picture")
        envs.close()

    def show(worlds: Worlds) -> bool:
        nonlocal closed
        frame = worlds.envs.render()[0]
        if worlds.t == 0:
            pygame.display.set_mode(frame.shape[1::-1])
            pygame.display.set_caption(args.env_id)
        pygame.display.get_surface().blit(pygame.surfarray.make_surface(frame.swapaxes(0, 1)), (0, 0))
        pygame.display.flip()
        clock.tick(worlds.envs.metadata.get("render_fps", 15))
        closed |= any(event.type == pygame.QUIT for event in pygame.event.get())
        return closed

    while not closed:
        returns, lengths = evaluate(agent, args, 1, VIDEO, args.deterministic, film=show, limit=3_000)
        print(f"return {returns[0]:.2f} in {lengths[0]:.0f} steps", flush=True)
        args = replace(args, seed=(args.seed + 1) % 2**32)  # another episode


def play(args: Args, folder: Path, agent: Agent) -> dict[str, Any]:
    """Evaluate, print the score and, if asked for, leave a video. The start of results.json."""
    returns, lengths = evaluate(agent, args, args.eval_episodes, EVALUATION, args.deterministic)
    mean, std = float(returns.mean()), float(returns.std())
    how = "greedy" if args.deterministic else "sampled"
    print(f"{args.env_id}: mean_reward {mean:.2f} +/- {std:.2f} over {len(returns)} {how} episodes", flush=True)
    if args.capture_video or args.repo_id:
        record_video(agent, args, folder / "replay.mp4")
    return {
        "env_id": args.env_id,
        "mean_reward": mean,
        "std_reward": std,
        "n_evaluation_episodes": len(returns),
        "eval_datetime": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "deterministic": args.deterministic,
        "seed": args.seed,
        "episode_returns": returns.tolist(),
        "episode_lengths": lengths.tolist(),
    }


# ---- The run's folder: settings, checkpoints, logs ---------------------------

VERSION = 3  # of the checkpoints' format


@dataclass
class State:
    """Where training stands: all that a checkpoint holds."""

    agent: Agent
    optimizer: FlatAdam
    generator: torch.Generator  # of actions and minibatches; each rank has its own
    learning_rate: float
    iteration: int = 0
    global_step: int = 0  # transitions, over all ranks
    seconds: float = 0.0  # of training, not of validation and checkpoints
    score: float = -math.inf  # at the last validation
    best_score: float = -math.inf
    best_iteration: int = 0
    best_agent: dict[str, Tensor] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)  # global step, mean return of an iteration's episodes
    settings: dict[str, Any] = field(default_factory=dict)  # versions and machine

    def keep_best(self) -> None:
        """Remember the agent if none scored higher; a tie goes to the newer."""
        if self.score >= self.best_score:
            self.best_score, self.best_iteration = self.score, self.iteration
            weights = self.agent.state_dict().items()
            self.best_agent = {name: x.cpu().clone() for name, x in weights}


def legs(start: int, args: Args) -> Iterator[range]:
    """The iterations from one checkpoint to the next. It cuts episodes: by default five of full length fit between."""
    limit = find_env(args).max_episode_steps or 0
    default = max(args.num_iterations // 10, math.ceil(5 * limit / args.num_steps), 1)
    every = args.checkpoint_every or default
    for first in range(start, args.num_iterations, every):
        yield range(first, min(first + every, args.num_iterations))


def open_run(args: Args) -> tuple[Path, State]:
    """The run's folder and the state to start from: a new one, or with --resume the checkpoint's."""
    state, run = new_state(args), args.run
    saved: Any = None
    if rank() == 0:
        try:
            if args.resume:
                saved = load_checkpoint(run)
            else:
                make_folder(args, state)
        except Stop as stop:
            saved = stop  # for all ranks
    if dist.is_initialized():
        dist.broadcast_object_list(shared := [saved])
        saved = shared[0]
    if isinstance(saved, Stop):
        raise saved
    before, here = saved["settings"] if saved else state.settings, state.settings
    if saved:
        restore(args, state, saved)
    if rank() == 0:
        masks = f"   action masks: by {state.agent.masks}" if state.agent.masks else ""
        print(f"run: {run}   preset: {args.preset}   device: {here['device']}{masks}", flush=True)
        if changed := ", ".join(f"{k} {before.get(k)} -> {here[k]}" for k in here if here[k] != before.get(k)):
            print(f"warning: this will not be bit for bit the run that was interrupted: {changed}", file=sys.stderr)
    if state.iteration == 0:
        save_checkpoint(run, state)  # a run may be killed at any moment
    return run, state


def make_folder(args: Args, state: State) -> None:
    """A new run's, with the settings in it."""
    run = args.run
    if list(run.glob("checkpoint-*.pt")) or (run / "results.json").exists():
        raise Stop(f"{run} exists: choose another --run-name or, if it is not finished, --resume {run}")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"cannot create {run}: {error.strerror}") from None
    settings = public(args) | {"precision": state.agent.network.precision}  # what `auto` chose
    write_json(run / "hyperparameters.json", {k: v for k, v in settings.items() if k not in MODES})


def public(args: Args) -> dict[str, Any]:
    """The settings as files tell them: of where an agent started, no path of this machine."""
    start = args.init_from
    if start and Path(start).is_dir():
        start = f"runs/{Path(start).resolve().name}"
    return asdict(args) | {"init_from": start}


def new_state(args: Args) -> State:
    """With an agent that has learned nothing yet; Stop if the settings do not suit the environment or the machine."""
    envs, _, info = make_envs(args, seeds(args.seed, TRAINING))  # one environment, to look at its spaces
    envs.close()
    config = agent_config(args, envs)
    if args.episodic_life and "lives" not in info:
        raise Stop(f"--episodic-life needs info['lives'], which {args.env_id} does not give")
    if args.norm_obs and config["parts"]:
        raise Stop("--norm-obs is for vectors; images are scaled to [0, 1] anyway: take --no-norm-obs")
    device = choose_device(args, config)
    if args.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise Stop("--compile needs a C++ compiler, and g++ is not on the PATH: install it, or leave --compile out")
    learned = None
    if args.init_from and not args.resume:  # read before memory is taken for its sizes, which may be a stranger's
        folder, stranger = policy_folder(args.init_from)
        learned = load_agent(folder, args, stranger).state_dict()  # what it was trained with is left behind
    torch.manual_seed(seeds(args.seed, WEIGHTS)[0])  # the same weights on every rank
    agent = Agent(**config).to(device)
    if learned:
        agent.load_state_dict(learned)
    if agent.network.precision == "bfloat16" and not has_bfloat16(device) and rank() == 0:
        warn_if_emulated(agent)
    generator = torch.Generator(device).manual_seed(seeds(args.seed, SAMPLING, rank())[0])
    return State(agent, FlatAdam(agent), generator, args.learning_rate, settings=describe_machine(device))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What must not change for a resumed run to be, bit for bit, the one that was interrupted."""
    packages = {"torch", "gymnasium", "numpy", "Box2D", "mujoco", "ale_py", "envpool"} & sys.modules.keys()
    versions = {name: str(sys.modules[name].__version__) for name in sorted(packages)}
    here = {"device": device.type, "threads": torch.get_num_threads()}
    here |= {"ranks": rank_count(), "machines": rank_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))}
    return {"python": platform.python_version()} | versions | here


def save_checkpoint(run: Path, state: State) -> None:
    """All that the run needs to go on from here, in one file; the last two are kept."""
    generators = [state.generator.get_state()]
    if dist.is_initialized():
        dist.all_gather_object(generators := [None] * rank_count(), state.generator.get_state())
    if rank() > 0:
        return
    modules = {"agent": state.agent.state_dict(), "optimizer": state.optimizer.state_dict()}
    saved = vars(state) | modules | {"generator": generators, "version": VERSION}
    torch.save(saved, buffer := io.BytesIO())
    write_file(run / f"checkpoint-{state.iteration:08d}.pt", buffer.getvalue())
    for old in sorted(run.glob("checkpoint-*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(run: Path) -> dict[str, Any]:
    """The newest undamaged checkpoint of a run. It is data only: with weights_only, torch.load runs no code."""
    for path in sorted(run.glob("checkpoint-*.pt"), reverse=True):
        try:
            archive = zipfile.ZipFile(path)
            # torch.load looks at no checksum, and does not fill what is marked as a folder (16)
            if archive.testzip() or any(entry.external_attr & 16 for entry in archive.infolist()):
                raise ValueError("its checksum is wrong")
            saved = torch.load(path, map_location="cpu", weights_only=True)
            version = saved["version"]
        except Exception as error:  # there are many ways to refuse bytes
            print(f"warning: {path} is unusable ({first_line(error)}); trying the one before it", file=sys.stderr)
            continue
        if version != VERSION:
            raise Stop(f"{path} has format {version}, not {VERSION}: resume it with the ppo.py that wrote it")
        return saved
    raise Stop(f"{run} has no usable checkpoint: start the run again")


def restore(args: Args, state: State, saved: dict[str, Any]) -> None:
    """Put what a checkpoint holds in its place."""
    try:
        state.agent.load_state_dict(saved["agent"])
        state.optimizer.load_state_dict(saved["optimizer"])
    except RuntimeError:
        raise Stop(f"{args.run} holds another network: resume it with the script that trained it") from None
    generators = saved["generator"]
    if rank() < len(generators) and saved["settings"]["device"] == state.settings["device"]:
        state.generator.set_state(generators[rank()])
    else:  # more ranks, or another kind of generator, than before: a stream of its own
        state.generator.manual_seed(seeds(args.seed, SAMPLING, rank(), saved["iteration"])[0])
    for name in vars(state).keys() - {"agent", "optimizer", "generator", "settings"}:
        setattr(state, name, saved[name])


class Log:
    """TensorBoard, a progress bar and, with --track, Weights & Biases: all written by rank 0."""

    def __init__(self, args: Args, run: Path, state: State):
        self.args, self.state = args, state
        self.metrics: list[Tensor] = []  # of an iteration's minibatches
        self.recent: deque[float] = deque(maxlen=100)  # returns
        if rank() > 0:
            return
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run.name, "id": run.name}
            kept = {"dir": run.parent, "resume": "allow", "config": public(args), "save_code": True}
            with one_line(
                "Weights & Biases", "Log in with `wandb login`, set WANDB_MODE=offline, or leave out --track"
            ):
                wandb.init(**names, **kept, sync_tensorboard=True)
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        step, resumed = state.global_step, bool(args.resume)
        self.writer = SummaryWriter(run, purge_step=step + 1 if resumed else None, flush_secs=10)
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit=" steps", unit_scale=True, disable=None)
        if not resumed:
            values = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in public(args).items()}
            for summary in hparams(values, {"charts/episodic_return": 0}):
                self.writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
            rows = "\n".join(f"|{name}|{value}|" for name, value in values.items())
            self.writer.add_text("hyperparameters", f"|parameter|value|\n|-|-|\n{rows}")

    def add(self, metrics: dict[str, Tensor]) -> None:
        """What one minibatch measured; copied, for the next run of a graph overwrites it."""
        self.names = list(metrics)
        self.metrics.append(torch.stack(list(metrics.values())))

    def write(self, iteration: int, rollout: Rollout, worlds: Worlds, batch: Batch, share: float) -> None:
        """One iteration: its episodes at the steps they ended, the rest at its last step."""
        metrics, self.metrics = self.metrics, []
        if rank() > 0:
            return
        step, done, valid = self.state.global_step, rollout.done, rollout.valid
        steps = step - (valid.sum() - valid.sum(1).cumsum()) / share  # after each row, over all ranks
        returns = accumulate(rollout.rewards, done, worlds.returned)
        lengths = accumulate(valid, done, worlds.length)
        for t, n in np.argwhere(done):
            self.writer.add_scalar("charts/episodic_return", returns[t, n], steps[t])
            self.writer.add_scalar("charts/episodic_length", lengths[t, n], steps[t])
            self.recent.append(returns[t, n])
        if done.any():
            self.state.curve.append((step, float(returns[done].mean())))
        scalars = {"charts/learning_rate": self.state.learning_rate, "charts/SPS": int(step / self.state.seconds)}
        scalars["losses/explained_variance"] = explained_variance(batch.values[valid], batch.returns[valid])
        if metrics:
            means = torch.stack(metrics).mean(0).tolist()
            scalars |= {f"losses/{name}": mean for name, mean in zip(self.names, means)}
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

        mean, total = f"{np.mean(self.recent):.1f}" if self.recent else "none yet", self.args.num_iterations
        self.bar.set_postfix_str(f"return {mean}", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and iteration * 10 // total < (iteration + 1) * 10 // total:  # no terminal
            print(f"step {step:>11,}   return {mean:>9}   {scalars['charts/SPS']:>7,} steps/s", flush=True)

    def flush(self) -> None:
        """Before a checkpoint: a resumed run relies on what was logged until there, and purges the rest."""
        if rank() == 0:
            if math.isfinite(self.state.score):
                self.writer.add_scalar("eval/validation", self.state.score, self.state.global_step)
            self.writer.flush()

    def close(self) -> None:
        if rank() == 0:
            self.writer.close()
            self.bar.close()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var[returns - values] / Var[returns]: 1 for a perfect critic, 0 for one no better than a constant."""
    return (1 - (returns - values).var() / returns.var()).item()


def publish(run: Path, state: State) -> Path:
    """Save the best agent as the Hub has it: config.json and model.safetensors."""
    if rank() == 0:
        state.agent.load_state_dict(state.best_agent, assign=True)  # tensors of its own, not views of theta
        try:
            state.agent.save_pretrained(run)
            (run / "model.safetensors").chmod((run / "config.json").stat().st_mode)  # else its owner's alone
        except safetensors.SafetensorError as error:  # a full disk, and no OSError
            raise Stop(f"cannot write the agent in {run}: {first_line(error)}", code=1) from None
    return run


def finish(args: Args, run: Path) -> dict[str, Any]:
    """After training: evaluate what was saved, and leave results, card and all else that a push needs."""
    saved_args = load_args(run)  # what `auto` chose, and no path
    args = replace(args, precision=saved_args.precision, init_from=saved_args.init_from)
    agent, saved = load_agent(run, args), load_checkpoint(run)
    fewer = min(args.eval_episodes, 20)
    print(f"evaluating: {args.eval_episodes} episodes, then {fewer} of the other kind, sampled or greedy", flush=True)
    results = play(args, run, agent)
    other, _ = evaluate(agent, args, fewer, EVALUATION, not args.deterministic)
    log_score(args, run, results["mean_reward"], saved["global_step"])
    surplus = other.mean() - results["mean_reward"]
    if args.deterministic and fewer >= 10 and surplus > other.std() + results["std_reward"]:
        print(f"warning: sampled it scores {other.mean():.2f}, far more: see --no-deterministic", file=sys.stderr)
    best, last, iteration = saved["best_score"], saved["score"], saved["best_iteration"]
    which = "last" if iteration == saved["iteration"] else f"best (iteration {iteration})"
    if args.validation_episodes:
        print(f"published: the {which} checkpoint; validation scores: best {best:.2f}, last {last:.2f}")
    results |= {
        "other_mean_reward": float(other.mean()),
        "other_std_reward": float(other.std()),
        "other_episodes": fewer,
        "published": which,
        "validation": {"best": best, "last": last} if args.validation_episodes else None,
        "total_timesteps": args.total_timesteps,
        "global_step": saved["global_step"],
        "training_seconds": saved["seconds"],
        "settings": saved["settings"] | {"machine": platform.machine(), "cores": os.cpu_count()},
    }
    for file in {"ppo.py", SCRIPT, "requirements.txt"}:
        if (source := Path(__file__).with_name(file)).exists():
            write_file(run / file, source.read_bytes())
    for path in run.glob("events.out.tfevents.*"):  # TensorBoard names the host in them; the time, to sort by, stays
        words = path.name.split(".")  # events, out, tfevents, time, host (with dots, or none), process, number
        path.rename(path.with_name(".".join(words[:4] + words[-2:])))
    draw_curve(args, run, saved["curve"])
    write_file(run / "README.md", model_card(args, run, args.repo_id or f"runs/{run.name}", results).encode())
    write_json(run / "results.json", results)  # last: it says that the run is finished
    return results


def log_score(args: Args, run: Path, score: float, step: int) -> None:
    """The final score, into the logs."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run) as writer:
        writer.add_scalar("eval/mean_reward", score, step + 1)  # or a resumed run would not purge it
    if args.track:
        importlib.import_module("wandb").finish()


def draw_curve(args: Args, run: Path, curve: list[tuple[int, float]]) -> None:
    """curve.png: the mean returns of training episodes, in a hundred points or fewer."""
    if "ipykernel" not in sys.modules:  # a notebook has its own, also for what it starts
        os.environ["MPLBACKEND"] = "agg"
    from matplotlib.figure import Figure

    parts = np.array_split(np.reshape(curve, (-1, 2)), min(len(curve), 100) or 1)
    axes = (figure := Figure((6, 3), layout="constrained")).subplots()
    axes.plot(*np.array([part.mean(0) for part in parts if len(part)]).reshape(-1, 2).T)
    axes.set(title=args.env_id, xlabel="environment steps", ylabel="episodic return")
    figure.savefig(buffer := io.BytesIO())
    write_file(run / "curve.png", buffer.getvalue())


def write_file(path: Path, data: bytes) -> None:
    """All or nothing, even if the power fails: write and sync a temporary file, rename it, sync the folder."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Stop(f"cannot write {path}: {error.strerror}; what was there before is intact", 1) from None


def write_json(path: Path, data: dict) -> None:
    write_file(path, (json.dumps(data, indent=2) + "\n").encode())


def load_args(folder: Path, source: str | None = None) -> Args:
    """The arguments in a run's hyperparameters.json; each name, type and range is checked."""
    path, types = folder / "hyperparameters.json", get_type_hints(Args)
    try:
        data = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
        for name, value in data.items():
            if name not in types or name in MODES:
                raise ValueError(f"{name:.80} is not one of ppo.py's settings")
            type_validator(name, value, types[name] | int if types[name] is float else types[name])
        return Args(**{"precision": "float32", "action_masks": False} | data)  # as it was before there was a choice
    except OSError as error:
        raise Stop(f"cannot read {path}: {error.strerror}; is {folder} a run's folder?") from None
    except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
        raise Stop(f"refused hyperparameters.json of {source or folder}: {str(error):.200}") from None


# ---- Sharing: what is downloaded is not trusted ------------------------------

SIZE_LIMITS = {"hyperparameters.json": 2**16, "config.json": 2**16, "model.safetensors": 2**28}  # bytes
EXTRAS = ["README.md", "results.json", "replay.mp4", "curve.png", "*.py", "requirements.txt", "*tfevents*"]
NETWORK = [f.name for f in fields(NetworkArgs)]
# What a stranger's policy may set:
PLAYED = ["env_id", "env_kwargs", "seed", "vectorization", "frame_stack", "action_masks", *NETWORK]
SAFE_KWARGS = {"is_slippery", "continuous", "repeat_action_probability", "include_cfrc_ext_in_observation"}


@contextlib.contextmanager
def one_line(what: str, remedy: str, code: int = 2):
    """Turn whatever a client of a service raises, a dozen unrelated types, into one line that says what to do."""
    try:
        yield
    except Stop:
        raise
    except Exception as error:
        reason = first_line(error).rstrip(".").replace(str(Path.home()), "~")
        raise Stop(f"{what} failed: {type(error).__name__}: {reason}. {remedy}", code) from None


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


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

    A stranger's environment must be registered already: making `module:Env-v0` would import the module.
    """
    folder, stranger = policy_folder(name)
    saved = load_args(folder, stranger)
    if stranger is None:
        return saved, name
    if env_id is None:
        plain = re.fullmatch(r"([\w-]+/)?\w[\w.-]*-v\d+", saved.env_id, re.ASCII)
        with contextlib.suppress(ImportError, gym.error.Error):
            find_env(saved) if plain else None  # makes ALE's known
        if not plain or saved.env_id not in gym.registry:
            raise Stop(f"refused {name}: no environment {saved.env_id!r} here; if you trust it, name it: --env-id")
    if unsafe := ", ".join(sorted(saved.env_kwargs.keys() - SAFE_KWARGS)):
        raise Stop(f"refused {name}: it passes {unsafe} to its environment, which could do harm")
    return Args(**{key: getattr(saved, key) for key in PLAYED}), stranger


def load_agent(folder: Path, args: Args, source: str | None = None) -> Agent:
    """The agent in a folder, if its files are exactly what an agent for this environment would save; else Stop."""
    envs, *_ = make_envs(args, seeds(args.seed, EVALUATION), training=False)
    envs.close()
    config = agent_config(args, envs)
    try:
        saved = dict(json.loads((folder / "config.json").read_text()))
        early = {"precision": "float32", "parts": None, "spaces": None, "masks": None}  # what was not, but for defaults
        config |= {name: early[name] for name in early.keys() - saved.keys() - {"precision"}}
        saved = {f.name: f.default for f in fields(NetworkArgs)} | early | saved
        names = (config.keys() | saved.keys()) - {"spaces"}  # EnvPool's bounds differ from Gymnasium's
        if other := [name for name in names if saved.get(name) != config.get(name)]:
            difference = "; ".join(f"{name} {saved.get(name)}, not {config.get(name)}" for name in sorted(other))
            raise ValueError(f"it is not an agent for {args.env_id} with these settings: {difference}")
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        device = choose_device(args, config)
        if config["precision"] == "bfloat16" and not has_bfloat16(device):
            print("warning: bfloat16 is not native here: playing in float32", file=sys.stderr)
            config["precision"] = "float32"
        with torch.device("meta"):  # shapes, but no memory: that is the file's
            agent = Agent(**config)
        types = {name: x.dtype for name, x in agent.state_dict().items()}
        agent.load_state_dict(weights, assign=True)  # names and shapes must fit
        if wrong := [name for name, x in weights.items() if x.dtype != types[name] or not x.isfinite().all()]:
            raise ValueError(f"not finite, or of the wrong type: {', '.join(wrong[:3])}")
    except OSError as error:
        hint = "; a run has one when it is finished: --resume it" if list(folder.glob("checkpoint-*.pt")) else ""
        raise Stop(f"cannot read the agent in {folder}: {error.strerror or error}{hint}") from None
    except (ValueError, TypeError, safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise Stop(f"refused config.json or model.safetensors of {source or folder}: {reason:.200}") from None
    return agent.to(device)


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
        url = hub.upload_folder(
            repo_id=repo_id,
            folder_path=run,
            commit_message=f"PPO plays {args.env_id}",
            allow_patterns=[*SIZE_LIMITS, *EXTRAS],
            delete_patterns=["*tfevents*", "replay.mp4"],
        )
    print(f"pushed: {url}")


def launcher(processes: int, machines: int = 1) -> list[str]:
    """The words that start the script on so many processes of so many machines."""
    if processes == machines == 1:
        return ["python", SCRIPT]
    flags = ["--nproc-per-node", str(processes)]
    if machines > 1:
        node, address, port = (os.environ.get(name, name) for name in ("GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"))
        there = ["--nnodes", str(machines), "--node-rank", node, "--master-addr", address, "--master-port", port]
        flags = there + flags
    return ["torchrun", *flags, SCRIPT]


def training_command(args: Args, ranks: int = 1, machines: int = 1) -> str:
    """The command that trains this run: the flags that differ from the preset's values."""
    words = [*launcher(ranks // machines, machines), "--env-id", args.env_id]
    usual = asdict(usual_args(args.env_id, args.preset))
    if args.preset != own_preset(args.env_id):
        words += ["--preset", args.preset]
    for name, value in asdict(args).items():
        if value == usual[name] or name in (*FREE, *MODES, "run_name"):
            continue
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            items = sum(value.items(), ()) if isinstance(value, dict) else value
            words += [flag(name), *map(str, items if isinstance(items, tuple) else [items])]
    return shlex.join(words)


def model_card(args: Args, run: Path, source: str, r: dict[str, Any]) -> str:
    """README.md of the repo: metadata as the Hub's leaderboards read it, then the text for people."""
    score, other = (f"{r[k + 'mean_reward']:.2f} +/- {r[k + 'std_reward']:.2f}" for k in ("", "other_"))
    how, other_how = ("greedy", "sampled") if r["deterministic"] else ("sampled", "greedy")
    code = sorted(file for file in {"ppo.py", SCRIPT, "requirements.txt"} if (run / file).exists())
    download = "" if source.startswith("runs/") else f"hf download {source} {' '.join(code)} --local-dir .\n"
    start = "pip install -r requirements.txt\npython" if "requirements.txt" in code else "uv run"
    named = f" --env-id {args.env_id}" if ":" in args.env_id else ""  # or it is not trusted
    video = f"`replay.mp4` shows one {how} episode." if (run / "replay.mp4").exists() else ""
    curve = "![learning curve](curve.png)" if (run / "curve.png").exists() else ""  # not in a first-edition run
    settings = ", ".join(f"{name} {value}" for name, value in r["settings"].items())
    rows = "\n".join(f"| `{flag(k)}` | {v} |" for k, v in asdict(args).items() if k not in (*FREE, *MODES))
    return f"""---
library_name: ppo
pipeline_tag: reinforcement-learning
tags: ["{args.env_id}", ppo, deep-reinforcement-learning, reinforcement-learning, custom-implementation, deep-rl-course]
model-index:
- name: "PPO-{args.env_id}"
  results:
  - task: {{type: reinforcement-learning, name: reinforcement-learning}}
    dataset: {{type: "{args.env_id}", name: "{args.env_id}"}}
    metrics: [{{type: mean_reward, name: mean_reward, value: {score}}}]
---

# PPO agent playing {args.env_id}

Trained with [proximal policy optimization](https://arxiv.org/abs/1707.06347) by `ppo.py`, one self-contained PyTorch
script, which is in this repo. {video}

| policy | mean return +/- std over episodes | episodes |
|---|---|---|
| {how} | **{score}** | {r["n_evaluation_episodes"]} |
| {other_how} | {other} | {r.get("other_episodes", r["n_evaluation_episodes"])} |

Each episode is the first of a fresh environment; their seeds follow from seed {args.seed} and are used nowhere else.
The agent is that of the {r["published"]} checkpoint. Mean episode return as it learned, in {r["global_step"]:,} steps:

{curve}

## Play it

```bash
{download}{start} {SCRIPT} --evaluate {source}{named} --capture-video
```

```python
from ppo import Agent

agent = Agent.from_pretrained("{source}", strict=True)
action = agent.predict(obs)  # greedy, from and for the environment as it is; deterministic=False samples
```

## Train it again

```bash
{training_command(args, r["settings"]["ranks"], r["settings"].get("machines", 1))}
```

{r["training_seconds"]:.0f} seconds of training, evaluation not counted: {settings}.

<details><summary>All settings</summary>

| flag | value |
|---|---|
{rows}

</details>
"""


# ---- Checks and presets ------------------------------------------------------


class Stop(Exception):
    """The end of the program for a reason the user can act on: one line, an exit code, no traceback."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def check_finite(metrics: dict[str, Tensor], iteration: int) -> None:
    total = metrics["gradient_norm"] + metrics["policy_loss"] + metrics["value_loss"]
    if not total.isfinite():  # costs a synchronisation, and saves a run
        raise Stop(f"loss or gradient not finite in iteration {iteration}: lower --learning-rate", code=1)


def find_range(hint: Any) -> tuple[str, float, float] | None:
    """The words and bounds that a setting's type carries, however deep: tuple[Count, ...], Positive | None."""
    inner = map(find_range, get_args(hint))
    return getattr(hint, "__metadata__", None) or next(filter(None, inner), None)


def divisors_near(n: int, d: int) -> list[int]:
    """Up to four divisors of n that are nearest to d."""
    divisors = [k for k in range(1, min(2 * d, n + 1)) if n % k == 0]
    return sorted(sorted(divisors, key=lambda k: abs(k - d))[:4])


def check(args: Args) -> None:
    """Raise ValueError for a setting out of its range, or settings that exclude each other."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value, bounds = getattr(args, name), find_range(hint)
        for x in value if isinstance(value, tuple) else (value,):
            if bounds and x is not None and not bounds[1] <= x <= bounds[2]:  # NaN fails every comparison
                raise ValueError(f"{flag(name)} must be {bounds[0]}, got {x}")
    if args.run_name is not None and not re.fullmatch(r"\w[\w.=+-]*", args.run_name):
        raise ValueError(f"--run-name must be one plain folder name, got {args.run_name!r}")
    if not all(math.isfinite(x) for x in args.env_kwargs.values() if isinstance(x, float)):
        raise ValueError(f"--env-kwargs must be finite, got {args.env_kwargs}")
    if args.render and not args.evaluate:
        raise ValueError("--render shows a trained agent: give --evaluate, too")
    if args.norm_reward and args.clip_reward:
        raise ValueError("--norm-reward and --clip-reward exclude each other: choose one")
    B, minibatches = args.batch_size, args.num_minibatches
    batch = f"{args.num_steps} steps x {args.num_envs} envs = {B} rows"
    if B % minibatches:
        near_it = ", ".join(map(str, divisors_near(B, minibatches)))
        raise ValueError(f"--num-minibatches {minibatches} does not divide the batch of {batch}; near it: {near_it}")
    if args.lstm_hidden_size and args.num_envs % minibatches:
        near_it = ", ".join(map(str, divisors_near(args.num_envs, minibatches)))
        why = f"with memory, a minibatch is a number of whole environments, and {minibatches} does not divide"
        raise ValueError(f"--num-minibatches {minibatches}: {why} --num-envs {args.num_envs}; near it: {near_it}")
    if args.lstm_hidden_size and args.compile:
        raise ValueError("--compile cannot take an LSTM: leave it out, or --lstm-hidden-size")
    if args.norm_adv and B == minibatches:
        raise ValueError("--norm-adv needs minibatches of at least 2 rows: lower --num-minibatches")
    fills = (args.norm_obs or args.norm_reward) and not args.init_from
    needed = 2 if fills else 1  # rollouts: the first only fills the statistics
    if args.num_iterations < needed:
        why = f"{needed} x {batch} (--norm-obs and --norm-reward take the first) = {2 * B}" if needed > 1 else batch
        remedy = "raise it, or lower --num-steps or --num-envs"
        raise ValueError(f"--total-timesteps {args.total_timesteps} is less than {why}: {remedy}")


# gamma and lambda are RL Baselines3 Zoo's (classic control, Box2D) or the usual ones (MuJoCo). From there one change at
# a time, on seeds above 100, which are never reported.
MUJOCO = dict(total_timesteps=1_000_000, num_envs=8, num_steps=256, num_minibatches=8, update_epochs=10,
              learning_rate=1e-3, ent_coef=0.0, norm_obs=True, norm_reward=True, logstd_init=-0.5)  # fmt: skip
CALM = MUJOCO | dict(num_envs=16, num_steps=128, gae_lambda=0.9, logstd_init=-1.5)  # less noise
IMAGES = dict(  # many small updates, which images learn from soonest
    num_minibatches=32, num_envs=8, update_epochs=3, clip_coef=0.1, clip_vloss=False, hidden_sizes=(),
)  # fmt: skip
ATARI = IMAGES | dict(  # the published protocol: no sticky actions
    env_kwargs={"repeat_action_probability": 0.0}, total_timesteps=10_000_000, clip_reward=True, episodic_life=True,
    num_envs=128, num_steps=64, learning_rate=5e-4, eval_episodes=30,
)  # fmt: skip
UNTOUCHED = {"include_cfrc_ext_in_observation": False}  # 78 contact forces, all zero in the published versions
DISCRETE = dict(num_envs=16, num_steps=256, num_minibatches=8, update_epochs=6, learning_rate=1e-3, desired_kl=0.01,
                hidden_sizes=(128, 128), norm_obs=True, norm_reward=True, clip_vloss=False)  # fmt: skip
STEADY = MUJOCO | dict(desired_kl=0.01)  # a rate that follows the KL
CONTINUOUS = STEADY | dict(total_timesteps=500_000)

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},  # CleanRL's defaults
    "general, discrete actions": DISCRETE,
    "general, discrete actions, few steps": DISCRETE | dict(num_envs=4),  # smaller rollouts, so that there are many
    "general, continuous actions": CONTINUOUS,
    "general, continuous actions, few steps": CONTINUOUS | dict(num_envs=4, num_minibatches=16),
    "general, images": IMAGES | dict(norm_reward=True),
    "general, small images": DISCRETE | dict(norm_obs=False),
    "CartPole-v1": dict(  # the zoo's gamma and lambda
        total_timesteps=100_000, num_envs=64, num_steps=32, num_minibatches=8, update_epochs=5, learning_rate=2e-3,
        gamma=0.98, gae_lambda=0.8, clip_vloss=False,
    ),
    "Acrobot-v1": dict(  # the zoo's lambda and normalisation; many epochs, for its policy moves little in each
        total_timesteps=500_000, num_envs=16, num_steps=128, num_minibatches=8, update_epochs=10, learning_rate=2e-3,
        gae_lambda=0.94, ent_coef=0.0, clip_vloss=False, norm_obs=True, norm_reward=True,
    ),
    "MountainCar-v0": DISCRETE,  # its normalisation above all, without which the goal is never found
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
    "Ant-v5": CALM | dict(learning_rate=5e-4, gae_lambda=0.95, env_kwargs=UNTOUCHED),
    "Humanoid*-v5": CALM | dict(  # small steps, for 17 joints move the policy far
        learning_rate=3e-4, gae_lambda=0.95, logstd_init=-1.0, env_kwargs=UNTOUCHED,
    ),
    "HalfCheetah-v5": CALM | dict(  # long rollouts: its episodes start all at once, and how to start is soon forgotten
        num_envs=4, num_steps=512,
    ),
    "Reacher-v5": CALM | dict(gamma=0.9, num_minibatches=32),  # a short horizon: each step pays for its own distance
    "InvertedDoublePendulum-v5": MUJOCO | dict(validation_episodes=100),  # few would not show its rare falls
    "InvertedPendulum-v5": MUJOCO,
    "Hopper-v5": STEADY, "Walker2d-v5": STEADY, "Pusher-v5": STEADY,
    "ALE/Pong-v5": ATARI | dict(  # as many updates, of fewer rows; validated by as many starts as there are
        total_timesteps=1_000_000, num_envs=8, num_steps=128, validation_episodes=30,
    ),
    "ALE/*": ATARI,
    "CarRacing-v3": IMAGES | dict(  # two frames show how fast it drives; as drawing them is slow, cores share it
        vectorization="async", frame_stack=2, norm_reward=True, total_timesteps=300_000, num_envs=16,
        learning_rate=5e-4, clip_coef=0.2, ent_coef=0.0, logstd_init=-0.5, eval_episodes=30,
        deterministic=False,  # its throttle is the part of the noise above 0: without noise it hardly moves
    ),
    "MinAtar/*": dict(  # as for large images, small minibatches, and a large rate
        total_timesteps=10_000_000, num_envs=64, num_minibatches=32, learning_rate=2.5e-3, hidden_sizes=(),
        clip_vloss=False,
    ),
}  # fmt: skip

SCRIPT = Path(__file__).name  # what printed commands start; a script that imports this one puts its own name here
MODES = ("evaluate", "resume", "push")  # flags that name a run instead of starting one
# May differ where a run is resumed or pushed:
FREE = ("device", "render", "check_env", "track", "wandb_project_name", "wandb_entity",
        "repo_id", "private", "capture_video")  # fmt: skip


def usual_args(env_id: str, preset: str | None = None) -> Args:
    """The settings of a preset; by default the environment's own, or "none". For a general one, see find_preset."""
    name = preset or own_preset(env_id)
    if name not in PRESETS:
        raise Stop(f"no preset {name!r}; there are: {'; '.join(PRESETS)}")
    return Args(env_id=env_id, preset=name, **PRESETS[name])


def own_preset(env_id: str) -> str:
    """The preset whose name is the environment's, or a pattern that fits it; else "none"."""
    fits = [name for name in PRESETS if fnmatch.fnmatchcase(env_id, name)]
    return env_id if env_id in PRESETS else (fits or ["none"])[0]


def find_preset(world: WorldArgs, total_timesteps: int | str = "") -> str:
    """The environment's own preset; else a general one, by its actions, what it shows, and the steps there are."""
    if (own := own_preset(world.env_id)) != "none":
        return own
    try:
        args = Args(**vars(world))
        envs, *_ = make_envs(args, seeds(args.seed, TRAINING))
        envs.close()
        config = agent_config(args, envs)
    except Exception:  # it will be told where the environment is needed
        return "none"
    if config["parts"]:
        return f"general, {'' if has_large_images(config['parts']) else 'small '}images"
    kind = "discrete" if config["nvec"] else "continuous"
    few = isinstance(total_timesteps, int) and total_timesteps <= 200_000  # what is no number, read_flags refuses
    return f"general, {kind} actions{', few steps' if few else ''}"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---- The program -------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags over saved arguments (--evaluate, --resume, --push) or over the environment's preset (training)."""
    # First what decides where the defaults come from
    names: Any = [(name, str | None, None) for name in ("env_id", "vectorization", "preset", "init_from", *MODES)]
    names += [("frame_stack", int | None, None), ("action_masks", bool, True)]
    kwargs: Any = ("env_kwargs", get_type_hints(WorldArgs)["env_kwargs"], field(default_factory=dict))
    First: Any = make_dataclass("First", [*names, ("total_timesteps", int | str, ""), kwargs])
    first, _ = tyro.cli(First, args=argv, return_unknown_args=True, add_help=False)
    mode = {name: getattr(first, name) for name in MODES if getattr(first, name) is not None}
    started = [*mode, *(["init_from"] if first.init_from is not None else [])]
    if empty := [flag(name) for name in started if not getattr(first, name)]:
        raise Stop(f"{empty[0]} is empty: give a run's folder or a repo")
    if len(started) > 1:
        raise Stop(f"{' and '.join(map(flag, started))} exclude each other: choose one")
    if first.evaluate:
        saved, mode["evaluate"] = played_args(first.evaluate, first.env_id)  # a repo is now pinned to one commit
        return replace(read_flags(argv, saved), **mode)
    source, name = played_args(first.init_from, first.env_id) if first.init_from else (None, None)
    saw = (*NETWORK, "frame_stack", "action_masks")  # its network, and what it was shown
    kept = {name: getattr(source, name) for name in saw} if source else {}
    if mode:
        saved = load_args(Path(*mode.values()))
    else:
        env_id = first.env_id or (source or Args).env_id
        kwargs = source.env_kwargs if source and env_id == source.env_id else {}
        world = WorldArgs(
            env_id,
            kwargs | first.env_kwargs,
            vectorization=first.vectorization or "auto",
            frame_stack=first.frame_stack or kept.get("frame_stack", 1),
            action_masks=first.action_masks and kept.get("action_masks", True),
        )
        saved = usual_args(env_id, first.preset or find_preset(world, first.total_timesteps))
        saved = replace(saved, env_kwargs=saved.env_kwargs | kwargs)
    args = replace(read_flags(argv, saved, **kept), **mode, **({"init_from": name} if name else {}))
    old, new, free = asdict(saved), asdict(args), [*FREE, *MODES]
    changed = [f"{flag(k)} {old[k]} -> {new[k]}" for k in old if old[k] != new[k] and k not in free]
    if changed and mode:  # what is resumed or pushed must be the run that it was
        words = "; ".join(changed), ", ".join(map(flag, FREE))
        raise Stop("the settings of a run are part of it, but this differs: {}. May differ: {}".format(*words))
    return args


def read_flags(argv: list[str] | None, defaults: Args, **kept) -> Args:
    """All flags, in a box of --help for each class that Args inherits from; what is kept replaces defaults."""
    values, boxes = asdict(defaults) | kept | {"env_kwargs": {}}, []  # tyro takes the keys of a filled dict for flags
    for part in reversed(Args.__bases__):
        default = part(**{f.name: values[f.name] for f in fields(part)})
        title = part.__name__.removesuffix("Args").lower()
        boxes.append((title, tyro.conf.OmitArgPrefixes[part], field(default=default)))  # type: ignore
    Flags: Any = make_dataclass("Flags", boxes)
    with mock.patch("ast.parse", cache(ast.parse)):  # else tyro, for its --help, reads this file class by class anew
        flags = tyro.cli(Flags, args=argv, prog=SCRIPT, description=Args.__doc__)
    for part in vars(flags).values():
        values |= vars(part)
    divisors = divisors_near(values["num_envs"] // rank_count(), asked := values["num_minibatches"])
    words = sys.argv if argv is None else argv
    given = values["resume"] or any(re.match("--num[-_]minibatches", word) for word in words)
    if values["lstm_hidden_size"] and asked not in divisors and not given:
        values["num_minibatches"] = min(divisors, key=lambda d: abs(d - asked))  # a preset's gives way
        if rank() == 0:
            change = f"{asked} -> {values['num_minibatches']}"
            print(f"--num-minibatches {change}, for memory wants whole environments", flush=True)
    try:
        return Args(**values | {"env_kwargs": defaults.env_kwargs | values["env_kwargs"]})
    except ValueError as error:
        raise Stop(str(error)) from None


def on_signal(signum: int, frame) -> None:
    """The first Ctrl-C or SIGTERM stops cleanly, the second at once. A worker's parent decides for it."""
    if multiprocessing.parent_process():
        return None if signum == signal.SIGINT else os._exit(0)
    lost = ("__del__", "_launch")  # what is raised in a destructor, or while a worker is forked
    if any(f.f_code.co_name in lost for f, _ in traceback.walk_stack(frame)):
        return threading.Timer(0.01, os.kill, [os.getpid(), signum]).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(signum)


def run_command(args: Args) -> dict[str, Any] | None:
    """What the flags ask for: play, push, or train and all that follows. Only rank 0 goes on after training.

    Returns what results.json holds, where there was something to score.
    """
    if args.evaluate:
        folder, stranger = policy_folder(args.evaluate)
        agent = load_agent(folder, args, stranger)
        if args.render:
            watch(agent, args)
            return None
        if stranger and args.capture_video:  # nothing is written beside what was downloaded
            folder = Path("runs", re.sub(r"[^\w.-]", "--", stranger.partition("@")[0]))
            folder.mkdir(parents=True, exist_ok=True)
        return play(replace(args, repo_id=None), folder, agent)
    elif args.push:
        push(args, Path(args.push))
    elif args.resume and (Path(args.resume) / "results.json").exists():
        print(f"{args.resume} is finished already; to share it: --push {args.resume} --repo-id me/name")
    else:
        if args.track and not importlib.util.find_spec("wandb"):
            raise Stop("--track needs Weights & Biases: pip install wandb")
        if args.repo_id and rank() == 0:  # fail now, not after hours of training
            remedy = "Log in with `hf auth login`, or train without --repo-id now and push later with --push"
            with one_line(f"access to {args.repo_id}", remedy):
                claim_repo(args)
        if args.check_env and rank() == 0:
            check_world(args)
        run = train(args)
        if dist.is_initialized():
            dist.destroy_process_group()
        if rank() == 0:
            results = finish(args, run)
            if args.repo_id:
                push(args, run)
            print(f"run: {run}")
            return results
    return None


def how_to_go_on(args: Args | None) -> str:
    """The command that resumes an interrupted run, where there is one."""
    if not args or not list(args.run.glob("checkpoint-*.pt")) or (args.run / "results.json").exists():
        return ""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    words = [*launcher(processes, rank_count() // processes), "--resume", str(args.run)]
    return f"To go on: {shlex.join(words)}"


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
    if code != 2 or rank() == 0:  # what every rank knows beforehand, one says
        print(f"{message}\n{how_to_go_on(args) if code != 2 else ''}".rstrip(), file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    threading.excepthook = lambda _: None  # what stops TensorBoard's thread is raised in the main one, too
    sys.exit(main())
