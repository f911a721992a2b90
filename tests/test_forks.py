"""Four changes that a researcher makes, each a small diff under tests/forks/, applied to a copy of ppo.py and run."""

import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, scalars
from torch.distributions import Categorical, Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence

import ppo

FORKS, DETAILS = ROOT / "tests" / "forks", (ROOT / "runs/reference/details.md").read_text()
LIMITS = {"layernorm": (3, 10), "squashed": (3, 25), "distillation": (4, 45), "kl_penalty": (3, 15)}  # places, lines
RUN, TWO = Path("runs", "it"), gym.spaces.Discrete(2)
checkpoint = functools.partial(torch.load, weights_only=True)

CARTPOLE = "--total-timesteps 30720 --checkpoint-every 5"  # 15 iterations
AIM = "--env-id aim:Aim-v0 --total-timesteps 24576 --num-envs 16 --num-steps 64 --learning-rate 3e-3 " \
      "--ent-coef 0.001 --gamma 0.5 --no-clip-vloss --checkpoint-every 6"  # 24 iterations  # fmt: skip
FLAGS = dict.fromkeys(LIMITS, CARTPOLE) | {"squashed": AIM, "kl_penalty": CARTPOLE + " --target-kl 0.001"}
BARS = dict.fromkeys(LIMITS, (40, 150)) | {"squashed": (-2, -0.2)}  # a random policy is below, a trained one above
BRIEF = "--validation-episodes 0 --eval-episodes 10 --run-name it"  # the last agent is published

AIM_PY = """
import gymnasium as gym
import numpy as np


class Aim(gym.Env):
    # Eight shots, each at a target that the observation tells; a Box that is not symmetric
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(action)
        error = action - [self.obs[0], 0.5 + 0.4 * self.obs[0]]
        self.obs = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.obs, -float(error @ error), False, False, {}


gym.register("Aim-v0", Aim, max_episode_steps=8)
"""


def git(*argv, folder):
    """What git prints, as if the folder were in no repository."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    process = subprocess.run(["git", *map(str, argv)], cwd=folder, env=env, capture_output=True, text=True)
    assert not process.stderr, process.stderr
    return process.stdout


@functools.cache
def load(path):
    """A fork's ppo.py as a module of its own."""
    name = f"fork_{path.parent.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder with a fork's ppo.py in it, and the world that it is tried in."""
    parent = tmp_path_factory.mktemp("forks")

    @functools.cache
    def apply(name):
        folder = parent / name
        folder.mkdir()
        shutil.copy(ROOT / "ppo.py", folder)
        git("apply", FORKS / f"{name}.diff", folder=folder)
        (folder / "aim.py").write_text(AIM_PY)
        return folder

    return apply


@pytest.fixture(params=LIMITS)
def name(request):
    return request.param


@pytest.fixture
def folder(name, folder_of, monkeypatch):
    monkeypatch.syspath_prepend(folder_of(name))  # where `python ppo.py` would find aim.py
    return folder_of(name)


@pytest.fixture
def fork(folder):
    return load(folder / "ppo.py")


@pytest.fixture(scope="module")
def trained(folder_of):
    """The folder of a fork's run that nothing disturbed; each is trained once."""

    @functools.cache
    def train(name):
        folder = folder_of(name)
        with contextlib.chdir(folder):
            assert load(folder / "ppo.py").main(flags(name)) == 0
        return folder / RUN

    return train


@pytest.fixture
def run(name, fork, trained):
    return trained(name)


@pytest.fixture
def args(name, fork):
    return fork.parse_args(flags(name))


def flags(name, more=""):
    return f"{FLAGS[name]} {BRIEF} {more}".split()


def untrained(fork, args):
    """The agent that a run begins with."""
    torch.manual_seed(fork.seeds(args.seed, fork.WEIGHTS)[0])
    return fork.Agent(**fork.look(args))


def agent_of(fork, obs, action, **settings):
    """One for such spaces; an observation may be given by its shape."""
    obs = gym.spaces.Box(-1, 1, obs) if isinstance(obs, tuple) else obs
    return fork.Agent(fork.describe(obs), fork.describe_action(action, True), **settings)


def collected(fork, agent, args, T, N, seed=1):
    """A rollout, and the worlds that it is of."""
    worlds = fork.Worlds(args, fork.seeds(seed, n=N))
    rollout = fork.Rollout.empty(agent, worlds, T)
    torch.manual_seed(1)
    fork.collect(agent, worlds, rollout)
    return rollout, worlds


def only(*names):
    return pytest.mark.parametrize("name", names, indirect=True)


# Each of them


def size(folder):
    """Places, which are hunks without context, and changed lines."""
    diff = git("diff", "--no-index", "--no-ext-diff", "--no-color", "-U0", ROOT / "ppo.py", "ppo.py", folder=folder)
    marks = [line[0] for line in diff.splitlines() if not line.startswith(("diff ", "index ", "---", "+++"))]
    return marks.count("@"), marks.count("+") + marks.count("-")


def test_a_fork_is_a_small_diff(name, folder):
    places, lines = size(folder)
    assert 0 < places <= LIMITS[name][0] and 0 < lines <= LIMITS[name][1]


def test_it_learns(name, fork, args, run):
    low, high = BARS[name]
    before, *_ = fork.evaluate(untrained(fork, args), replace(args, deterministic=False), 10)
    assert before.mean() < low
    assert json.loads((run / "results.json").read_text())["mean_reward"] > high


@pytest.mark.parametrize("norm_obs", ["--norm-obs", "--no-norm-obs"])
def test_the_first_ratio_is_one(name, norm_obs, fork):
    """One epoch of one minibatch: whatever the policy does with an observation, it did so when it acted."""
    argv = flags(name, f"--update-epochs 1 --num-minibatches 1 --learning-rate 0.01 {norm_obs}")
    assert fork.main([*argv, "--total-timesteps", "10240"]) == 0
    logs = scalars(RUN)
    for metric in ("approx_kl", "old_approx_kl", "clipfrac"):
        values = [value for _, value in logs[f"losses/{metric}"]]
        assert len(values) >= 4 and np.abs(values).max() < 1e-6, metric
    before, after = map(checkpoint, sorted(RUN.glob("checkpoint-*.pt")))
    assert not before["optimizer"]["mean"].equal(after["optimizer"]["mean"])  # it did learn


def test_a_killed_run_resumes_to_the_same_weights(name, folder, fork, run):
    shutil.copytree(folder, "copy", ignore=shutil.ignore_patterns("runs"))
    with contextlib.chdir("copy"):
        process = subprocess.Popen([sys.executable, "ppo.py", *flags(name)], stdout=subprocess.DEVNULL)
        while len(list(RUN.glob("checkpoint-*.pt"))) < 2 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (RUN / "results.json").exists()
        assert fork.main(["--resume", str(RUN)]) == 0
        assert (RUN / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
        resumed, whole = (checkpoint(max(folder.glob("checkpoint-*.pt"))) for folder in (RUN, run))
    assert all(resumed["agent"][key].equal(x) for key, x in whole["agent"].items())


def test_its_agent_goes_through_the_files_of_the_hub_and_plays_the_same(name, fork, run, capsys):
    results = json.loads((run / "results.json").read_text())
    assert fork.main(["--evaluate", str(run)]) == 0
    score = f"mean_reward {results['mean_reward']:.2f} +/- {results['std_reward']:.2f} over 10 greedy episodes"
    assert score in capsys.readouterr().out
    agent, last = fork.Agent.from_pretrained(run, strict=True), checkpoint(max(run.glob("checkpoint-*.pt")))["agent"]
    assert agent.state_dict().keys() == last.keys()
    assert all(x.equal(last[key]) for key, x in agent.state_dict().items())


# LayerNorm, and a trunk shared by actor and critic


@only("layernorm")
def test_actor_and_critic_share_all_but_their_last_layer(fork):
    agent = agent_of(fork, (3,), TWO, hidden_sizes=[16, 8], activation="relu")
    layers = [torch.nn.Linear, torch.nn.LayerNorm, torch.nn.ReLU]
    assert [type(layer) for layer in agent.shared] == 2 * layers
    assert [layer.normalized_shape for layer in agent.shared[1::3]] == [(16,), (8,)]
    assert [layer.weight.shape for layer in (*agent.actor, *agent.critic)] == [(2, 8), (1, 8)]
    for head in (agent.actor, agent.critic):
        gradients = torch.autograd.grad(head(agent.encode(torch.randn(5, 3))).sum(), list(agent.shared.parameters()))
        assert all(gradient.any() for gradient in gradients)


@only("layernorm")
def test_images_memory_and_agents_without_hidden_layers_work_too(fork):
    images = agent_of(fork, gym.spaces.Box(0, 255, (84, 84, 4), np.uint8), TWO, hidden_sizes=[8])
    assert images.critic(images.encode(torch.zeros(5, images.width, dtype=torch.uint8))).shape == (5, 1)
    linear = agent_of(fork, (3,), TWO, hidden_sizes=[])
    assert linear.critic(linear.encode(torch.randn(5, 3))).shape == (5, 1)
    memory = agent_of(fork, (3,), TWO, hidden_sizes=[8], lstm_hidden_size=6)
    assert memory.act(torch.randn(5, 3), memory=torch.zeros(2, 5, 6)).shape == (5,)


# A Gaussian squashed by tanh, whose deviation depends on the observation


def distributions(fork, *shape):
    """The fork's, of three dimensions; PyTorch's normal distribution, and that one squashed."""
    torch.manual_seed(1)
    out, logstd = torch.randn(*shape, 6) / 2, torch.tensor([-1.0, -0.5, 0.0])
    mean, added = out.double().split(3, -1)
    normal, tanh = Normal(mean, (logstd + added).exp()), TanhTransform(cache_size=1)  # it remembers what it squashed
    return fork.Gaussian(out, logstd), normal, Independent(TransformedDistribution(normal, tanh), 1)


@only("squashed")
@pytest.mark.parametrize("shape", [(64,), (8, 5)])
def test_its_logprob_has_the_jacobian(shape, fork):
    ours, normal, reference = distributions(fork, *shape)
    u = normal.sample().float()
    logprob, _ = ours.logprob_and_entropy(u)
    torch.testing.assert_close(logprob.double(), reference.log_prob(u.double().tanh()), rtol=0, atol=1e-5)


@only("squashed")
@pytest.mark.parametrize("u", [-60.0, 60.0])
def test_its_logprob_holds_where_tanh_rounds_to_one(u, fork):
    ours, normal, _ = distributions(fork, 64)
    logprob, _ = ours.logprob_and_entropy(torch.full((64, 3), u))
    log_slope = 2 * math.log(2) - 2 * abs(u)  # of 4 / (e^u + e^-u)^2, but for e^-120
    expected = (normal.log_prob(torch.tensor(u)) - log_slope).sum(-1)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=0)


@only("squashed")
def test_its_entropy_is_that_of_many_samples(fork):
    ours, _, reference = distributions(fork, 64)
    _, entropy = ours.logprob_and_entropy(torch.zeros(64, 3))
    expected = -reference.log_prob(reference.sample((20_000,))).mean(0)
    torch.testing.assert_close(entropy.double(), expected, rtol=0, atol=0.1)


@only("squashed")
def test_more_noise_is_more_entropy_only_until_tanh_saturates(fork):
    out = torch.zeros(3, 2, requires_grad=True)
    _, entropy = fork.Gaussian(out, torch.tensor([[-2.0], [-1.0], [1.5]])).logprob_and_entropy(torch.zeros(3, 1))
    (gradient,) = torch.autograd.grad(entropy.sum(), out)
    assert (gradient[:, 1] > 0).tolist() == [True, True, False]


@only("squashed")
def test_its_deviation_depends_on_the_observation(fork):
    agent = agent_of(fork, (3,), gym.spaces.Box(-1, 1, (2,)))
    logstd = agent.policy(agent.encode(obs := torch.randn(5, 3)), obs).logstd
    assert logstd.shape == (5, 2) and len(logstd.unique()) == 10


@only("squashed")
def test_the_unsquashed_action_is_stored_and_the_squashed_one_taken(fork, args, monkeypatch):
    taken, ask = [], fork.Worlds.ask
    monkeypatch.setattr(fork.Worlds, "ask", lambda self, method, *x, **y: taken.extend(x) or ask(self, method, *x, **y))
    rollout, worlds = collected(fork, untrained(fork, args), args, 128, 8)
    space = worlds.envs.single_action_space
    assert rollout.actions.abs().max() > 2
    within = (np.array(taken) - space.low) / (space.high - space.low) * 2 - 1  # from -1 to 1
    np.testing.assert_allclose(within, rollout.actions.tanh(), atol=1e-5)


@only("squashed")
def test_the_ends_of_a_box_are_met_exactly_and_none_is_stretched_to_infinity(fork):
    space = gym.spaces.Box(np.float32([-0.1, 0.7, -3]), np.float32([0.3, 0.9, 1e3]))
    for u, bound in (50.0, space.high), (-50.0, space.low):
        assert fork.to_env(torch.full((3,), u), fork.describe_action(space, True)).tolist() == bound.tolist()
    half = fork.describe_action(gym.spaces.Box(0, np.inf, (1,)), True)
    assert fork.to_env(torch.tensor([50.0]), half).item() == 1


# Random network distillation


@only("distillation")
def test_the_target_stays_where_it_was_and_the_predictor_learns_it(fork, args, run):
    agents = untrained(fork, args), fork.Agent.from_pretrained(run, strict=True)
    before, target = (agent.rnd.target.state_dict() for agent in agents)
    assert all(x.equal(before[key]) for key, x in target.items())
    rollout, _ = collected(fork, agents[1], fork.Args(), 64, 8, seed=9)
    errors = [agent.rnd(rollout.obs).mean().item() for agent in agents]
    assert errors[1] < errors[0] / 20


@only("distillation")
def test_the_intrinsic_return_does_not_end_with_an_episode(fork):
    """Against both sums written out, for a rollout with many ends."""
    T, N, gamma, gae_lambda = 48, 2, 0.9, 0.8
    args = fork.Args(num_steps=T, num_envs=N, gamma=gamma, gae_lambda=gae_lambda)
    agent = untrained(fork, args)
    rollout, _ = collected(fork, agent, args, T, N)
    with torch.no_grad():
        batch, values = fork.estimate(agent, rollout, args), agent.critic(rollout.obs)
        guess, truth = agent.rnd.predictor(rollout.obs), agent.rnd.target(rollout.obs)
    rewards, terminated, done = (torch.tensor(x) for x in (rollout.rewards, rollout.terminated, rollout.done))
    assert done.sum() >= 4

    def discounted(x, rate):  # sums to the end of the rollout, [T, N]
        return torch.stack([(rate ** torch.arange(T - t)[:, None] * x[t:]).sum(0) for t in range(T)])

    novelty = torch.where(done, 0.0, ((guess - truth) ** 2)[1:].mean(-1))
    deviation = discounted(novelty, gamma).std(correction=0)
    delta = novelty / deviation + gamma * values[1:, :, 1] - values[:-1, :, 1]
    intrinsic = discounted(delta, gamma * gae_lambda)
    extrinsic = ppo.compute_gae(rewards.float(), values[..., 0], terminated, done, gamma, gae_lambda)
    torch.testing.assert_close(batch.values, values[:T])
    torch.testing.assert_close(batch.advantages, 2 * extrinsic + intrinsic, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        batch.returns, torch.stack([extrinsic, intrinsic], -1) + values[:T], rtol=1e-4, atol=1e-5
    )


class Corridor(gym.Env):
    """A hundred places in a row; the last one pays. Without curiosity, chance takes an agent a few dozen far."""

    observation_space = gym.spaces.Discrete(100)
    action_space = gym.spaces.Discrete(2)
    furthest = 0  # of all

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return 0, {}

    def step(self, action):
        self.place = max(self.place + (1 if action else -1), 0)
        Corridor.furthest = max(Corridor.furthest, self.place)
        return self.place, float(self.place == 99), self.place == 99, False, {}


gym.register("probe/Corridor-v0", Corridor, max_episode_steps=200)


@only("distillation")
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_a_reward_that_is_far_away_is_found_and_without_it_is_not(seed, fork, monkeypatch):
    for script, found in ((fork, True), (ppo, False)):
        monkeypatch.setattr(Corridor, "furthest", 0)
        args = script.Args(
            env_id="probe/Corridor-v0", seed=seed, total_timesteps=12_800, num_envs=8, num_steps=64, learning_rate=3e-3,
            anneal_lr=False, validation_episodes=0, checkpoint_every=100, run_name=script.__name__,
        )  # fmt: skip
        script.train(args)
        assert (Corridor.furthest == 99) == found, Corridor.furthest


# The KL penalty with adaptive beta


@only("kl_penalty")
def test_its_gradient_is_that_of_equation_8(fork):
    """Each of two actions, equally likely before, is in the batch once: the mean over them is the expectation."""
    torch.manual_seed(1)
    agent = agent_of(fork, (3,), TWO, hidden_sizes=[8])
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100)  # far from where it was
    agent.beta.fill_(3)
    obs, actions, advantages = torch.randn(50, 3).repeat(2, 1), torch.arange(2).repeat_interleave(50), torch.randn(100)
    old = torch.full((100,), math.log(0.5))
    args = fork.Args(vf_coef=0.0, ent_coef=0.0)
    batch = fork.Batch(obs, actions, old, torch.zeros(100), advantages, torch.zeros(100))
    gradient, metrics = fork.compute_gradient(agent, batch, args)

    new, before = Categorical(logits=agent.actor(obs)), Categorical(probs=torch.full((100, 2), 0.5))
    kl = kl_divergence(before, new).mean()
    surrogate = (new.probs.gather(1, actions[:, None]).squeeze() / 0.5 * advantages).mean()
    expected = torch.autograd.grad(3 * kl - surrogate, list(agent.parameters()), materialize_grads=True)
    assert kl > 0.01
    torch.testing.assert_close(gradient, torch.cat([x.flatten() for x in expected]), rtol=1e-4, atol=1e-6)
    assert metrics["policy_loss"].item() == pytest.approx((3 * kl - surrogate).item(), rel=1e-4)


@only("kl_penalty")
@pytest.mark.parametrize("flags", [{}, {"target_kl": 0.03}])
@pytest.mark.parametrize("kl, factor", [(1 / 1.51, 0.5), (1 / 1.49, 1), (1.49, 1), (1.51, 2)])
def test_beta_is_halved_below_its_band_and_doubled_above(kl, factor, flags, fork, monkeypatch):
    d_targ = flags.get("target_kl", 0.01)
    change = {name: torch.tensor(kl * d_targ) for name in ("old_approx_kl", "approx_kl", "clipfrac")}
    monkeypatch.setattr(fork, "policy_change", lambda logratio, epsilon: change)
    args = fork.Args(total_timesteps=192, num_envs=2, num_steps=32, validation_episodes=0, run_name="it", **flags)
    assert fork.train(args).agent.beta.item() == factor**3


@only("kl_penalty")
def test_beta_brings_the_divergence_to_its_target_and_is_in_the_checkpoints(fork, run):
    divergences = np.array([value for _, value in scalars(run)["losses/approx_kl"]])
    assert 0.001 / 2 < np.exp(np.log(divergences[3:-3]).mean()) < 0.001 * 2
    before, after = (checkpoint(path)["agent"]["beta"] for path in sorted(run.glob("checkpoint-*.pt")))
    assert before > 1 and before != after


# What the details say of them


def test_the_details_count_them_right(folder_of):
    counts = re.findall(r"\[(\d+) lines in (\d+) places\]\(../../tests/forks/(\w+)\.diff\)", DETAILS)
    assert {name: (int(places), int(lines)) for lines, places, name in counts} == {
        name: size(folder_of(name)) for name in LIMITS
    }


def test_the_details_show_one_as_it_is():
    (shown,) = re.findall(r"^```diff\n(.*?)^```$", DETAILS, re.DOTALL | re.MULTILINE)
    _, _, *lines = (FORKS / "kl_penalty.diff").read_text().splitlines()
    assert [line for line in shown.splitlines() if line[0] != "@"] == [line for line in lines if line[0] in "+-"]
