"""What the environment forbids is never chosen, and has no probability, entropy or gradient; in three conventions."""

import json
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import QUICK
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from safetensors.torch import load_file

import ppo

torch.set_num_threads(1)
CONVENTIONS = ["observation", "info", "method"]


class Rules(gym.Env):
    """Allows another choice or two at each step; 1 for the last allowed one; a forbidden one ends the test."""

    def __init__(self, told="observation", action=None, obs=None, length=7, last=None, fault=None):
        self.told, self.length, self.last, self.fault = told, length, last, fault
        self.action_space = action or Discrete(6, start=2)
        self.inner = obs or Box(-1, 1, (3,))
        nvec = getattr(self.action_space, "nvec", getattr(self.action_space, "n", None))
        self.nvec = np.atleast_1d(nvec).flatten()
        mask = Box(0, 1, (int(self.nvec.sum()),), np.int8)
        self.observation_space = Dict(seen=self.inner, action_mask=mask) if told == "observation" else self.inner
        if told == "method":
            self.action_masks = lambda: self.mask

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.inner.seed(int(self.np_random.integers(2**31)))
        self.t = 0
        return self.look()

    def step(self, action):
        chosen = np.atleast_1d(action - getattr(self.action_space, "start", 0)).flatten()
        parts = np.split(self.mask, np.cumsum(self.nvec)[:-1])
        assert all(part[c] for part, c in zip(parts, chosen)), f"{chosen} of {parts}"
        best = [np.flatnonzero(part)[-1] for part in parts]
        self.t += 1
        obs, info = self.look()
        return obs, float((chosen == best).mean()), False, self.t == self.length, info

    def look(self):
        ends = self.t == self.length
        self.mask = np.concatenate([self.np_random.permutation(np.arange(n) < 2) for n in self.nvec]).astype(np.int8)
        if ends and self.last is not None:
            self.mask = np.full_like(self.mask, self.last)
        if self.fault and self.t == 3:
            self.mask = {"none": self.mask * 0, "long": np.append(self.mask, 1), "half": self.mask * 2}[self.fault]
        seen = self.inner.sample()
        obs = {"seen": seen, "action_mask": self.mask} if self.told == "observation" else seen
        return obs, {"action_mask": self.mask} if self.told == "info" else {}


@pytest.fixture
def register(register):
    """As for all tests, without Gymnasium's checker, which would find the planted faults first."""
    return partial(register, disable_env_checker=True)


MASKED = [*QUICK, "--preset", "none", "--num-steps", 32, "--total-timesteps", 1024, "--run-name", "it"]
ACTIONS = [Discrete(6, start=2), MultiDiscrete([3, 5]), MultiDiscrete([[3, 2], [4, 2]])]
IMAGE = Box(0, 255, (40, 40, 3), np.uint8)


@pytest.mark.parametrize("told", CONVENTIONS)
@pytest.mark.parametrize("action", ACTIONS, ids=str)
@pytest.mark.parametrize("flags", [[], ["--lstm-hidden-size", "8"], ["--norm-obs"]], ids=" ".join)
def test_nothing_forbidden_is_done_in_training_evaluation_and_predict(told, action, flags, register, main):
    env_id = register(partial(Rules, told, action))
    code, out, err = main("--env-id", env_id, *MASKED, *flags)
    assert code == 0, err
    assert out.splitlines()[0].endswith(f"action masks: {'observation' if told == 'observation' else 'info'}")
    assert main("--evaluate", "runs/it", "--no-deterministic")[0] == 0
    agent, env = ppo.Agent.from_pretrained("runs/it", strict=True), Rules(told, action)
    obs, _ = env.reset(seed=1)
    for i in range(7):
        obs, *_ = env.step(agent.predict(obs, i % 2 == 0, None if told == "observation" else env.mask))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("obs", [IMAGE, Dict(eye=IMAGE, ear=Box(-1, 1, (2,))), Tuple([Discrete(3), Box(-1, 1, (2,))])],
                         ids=["image", "image and vector", "tuple"])  # fmt: skip
@pytest.mark.parametrize("told", CONVENTIONS)
def test_so_it_is_with_images_and_parts_in_each_vectorization(told, obs, vectorization, register, main):
    env_id = register(partial(Rules, told, Discrete(4), obs))
    small = ["--num-envs", 2, "--num-steps", 16, "--total-timesteps", 64, "--num-minibatches", 2]
    code, _, err = main("--env-id", env_id, *MASKED, *small, "--vectorization", vectorization)
    assert code == 0, err


@pytest.mark.parametrize("obs", [IMAGE, Dict(eye=IMAGE, ear=Box(-1, 1, (2,)))], ids=["image", "image and vector"])
def test_so_it_is_with_images_and_memory(obs, register, main):
    env_id = register(partial(Rules, "observation", Discrete(4), obs))
    small = ["--num-envs", 2, "--num-steps", 16, "--total-timesteps", 64, "--num-minibatches", 2]
    code, _, err = main("--env-id", env_id, *MASKED, *small, "--lstm-hidden-size", 8)
    assert code == 0, err
    agent, env = ppo.Agent.from_pretrained("runs/it", strict=True), Rules("observation", Discrete(4), obs)
    seen, _ = env.reset(seed=1)
    for i in range(7):
        before = agent.episode.clone() if i else torch.zeros(2, 1, 8)
        seen, *_ = env.step(agent.predict(seen, i % 2 == 0))
        assert not agent.episode.equal(before)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("told", CONVENTIONS)
def test_the_mask_of_an_episodes_last_observation_does_not_matter(told, last, register, main):
    env_id = register(partial(Rules, told, last=last))
    assert main("--env-id", env_id, *MASKED)[0] == 0


@pytest.mark.parametrize(
    "fault, words",
    [("none", "mask [0 0 0 0 0 0]"), ("long", "not 6 times 0 or 1"), ("half", "not 6 times 0 or 1")],
)
@pytest.mark.parametrize("told", CONVENTIONS)
def test_a_mask_that_cannot_be_is_told_with_environment_and_step(told, fault, words, register, main):
    if (told, fault) == ("observation", "long"):
        return  # it does not fit its own space, and NumPy refuses to copy it
    code, _, err = main("--env-id", register(partial(Rules, told, fault=fault)), *MASKED)
    assert code == 1 and err.startswith("error: environment 0 ") and words in err and "at step 2" in err


def test_a_mask_of_a_wrong_length_is_refused_before_training(register, main):
    maker = partial(Rules, "method")
    code, out, err = main("--env-id", register(lambda: Longer(maker())), *MASKED)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "at its reset" in err and not Path("runs").exists()


class Longer(gym.Wrapper):
    def action_masks(self):
        return np.ones(7)


def test_masks_can_be_ignored(register, main):
    env_id = register(partial(Lenient, "info"))
    code, out, _ = main("--env-id", env_id, *MASKED, "--no-action-masks")
    assert code == 0 and "action masks" not in out
    assert ppo.Agent.from_pretrained("runs/it", strict=True).masks is None


class Lenient(Rules):
    def step(self, action):
        self.mask = np.ones_like(self.mask)
        return super().step(action)


def test_a_policy_trained_with_masks_is_not_played_without_them(register, main):
    assert main("--env-id", register(partial(Rules, "info")), *MASKED)[0] == 0
    register(partial(Rules, "nowhere"))
    for flag in "--evaluate", "--init-from":
        code, out, err = main(flag, "runs/it")
        assert (code, out, len(err.splitlines())) == (2, "", 1) and "its world has" in err and "not [[{" in err
    assert list(Path("runs").iterdir()) == [Path("runs/it")]


def test_predict_asks_for_the_mask(register, main):
    assert main("--env-id", register(partial(Rules, "info")), *MASKED)[0] == 0
    with pytest.raises(ValueError, match="give the mask"):
        ppo.Agent.from_pretrained("runs/it", strict=True).predict(np.zeros(3))


# What it does to the policy


def blank(nvec, n=3):
    parts, action = ppo.describe(Box(-1, 1, (n,))), ppo.describe_action(MultiDiscrete(nvec), True)
    return ppo.Agent(parts, action, masks="info", hidden_sizes=[16])


def fresh(nvec=(3, 5)):
    agent = blank(nvec)
    with torch.no_grad():
        for x in agent.parameters():
            x.add_(torch.randn_like(x))
    return agent


def random_masks(rows, nvec, generator):
    parts = [torch.rand(rows, n, generator=generator).argsort(-1) < torch.randint(1, n + 1, (rows, 1)) for n in nvec]
    return torch.cat(parts, -1).float()


def test_no_forbidden_choice_in_100000_samples_nor_in_the_mode():
    agent, generator = fresh(), torch.Generator().manual_seed(1)
    masks = random_masks(100_000, (3, 5), generator)
    obs = torch.cat([torch.randn(100_000, 3, generator=generator), masks], -1)
    with torch.no_grad():
        for noise in (agent.sample_noise(100_000), 0.0):
            first, second = agent.act(obs, noise).unbind(-1)
            assert masks.gather(-1, first[:, None]).all() and masks.gather(-1, 3 + second[:, None]).all()


def test_the_entropy_of_a_fresh_policy_is_that_of_the_uniform_over_what_is_allowed():
    agent = blank([3, 5])
    with torch.no_grad():
        agent.actor[-1].weight.zero_()
    masks = random_masks(200, (3, 5), torch.Generator().manual_seed(1))
    obs = torch.cat([torch.randn(200, 3), masks], -1)
    with torch.no_grad():
        _, entropy = agent.policy(agent.encode(obs), obs).logprob_and_entropy(agent.act(obs))
    allowed = torch.stack([masks[:, :3].sum(-1), masks[:, 3:].sum(-1)])
    assert torch.allclose(entropy, allowed.log().sum(0), atol=1e-5) and entropy.isfinite().all()


def test_probabilities_are_those_of_the_allowed_logits_alone():
    agent, mask = fresh((4,)), torch.tensor([1.0, 0, 1, 1])
    obs = torch.cat([torch.randn(3), mask])
    with torch.no_grad():
        logits = agent.actor(agent.encode(obs))
        logprob, _ = agent.policy(agent.encode(obs), obs).logprob_and_entropy(torch.tensor([2]))
    assert logprob.item() == pytest.approx(logits[[0, 2, 3]].log_softmax(-1)[1].item(), abs=1e-6)


def test_gradients_of_forbidden_logits_are_exactly_zero():
    agent = fresh((4,))
    mask = torch.tensor([1.0, 0, 1, 0]).repeat(32, 1)
    obs = torch.cat([torch.randn(32, 3), mask], -1)
    actions = agent.act(obs, agent.sample_noise(32)).detach()
    logprob, entropy = agent.policy(agent.encode(obs), obs).logprob_and_entropy(actions)
    weight, bias = torch.autograd.grad((logprob + entropy).sum(), list(agent.actor[-1].parameters()))
    assert (weight[[1, 3]] == 0).all() and (bias[[1, 3]] == 0).all() and weight[[0, 2]].abs().min() > 0


def test_the_mask_is_no_feature():
    agent, seen = fresh((4,)), torch.randn(3)
    a, b = (agent.encode(torch.cat([seen, mask])) for mask in (torch.ones(4), torch.tensor([1.0, 0, 0, 1])))
    assert torch.equal(a, b)


# Which mask counts


def collected(register, told, **settings):
    """A rollout, its agent, and the noise that chose its actions."""
    args = ppo.Args(env_id=register(partial(Rules, told, MultiDiscrete([3, 5]))), num_envs=3, num_steps=40,
                    num_minibatches=1, **settings)  # fmt: skip
    worlds = ppo.Worlds(args, ppo.seeds(1, n=3))
    torch.manual_seed(1)
    agent = ppo.Agent(**ppo.look(args))
    with torch.no_grad():
        for x in agent.parameters():
            x.add_(0.5 * torch.randn_like(x))
    rollout = ppo.Rollout.empty(agent, worlds, 40)
    torch.manual_seed(1)
    noise = agent.sample_noise(40, 3)
    torch.manual_seed(1)
    ppo.collect(agent, worlds, rollout)
    worlds.envs.close()
    return agent, rollout, noise


@pytest.mark.parametrize("units", [0, 8])
@pytest.mark.parametrize("told", CONVENTIONS)
def test_actions_are_those_that_the_replayed_policy_chooses_with_their_own_noise_and_mask(told, units, register):
    agent, rollout, noise = collected(register, told, lstm_hidden_size=units)
    seen = []
    choices, policy = ppo.Agent.policy, agent.policy
    agent.policy = lambda features, obs: seen.append(policy(features, obs)) or seen[-1]
    with torch.no_grad():
        logprobs, entropies, _ = agent.replay(rollout)
    assert choices is ppo.Agent.policy and torch.equal(seen[0].choose(noise), rollout.actions)
    assert logprobs.min() > -20 and entropies.isfinite().all()  # nothing that was done was forbidden
    masks = rollout.obs[:-1, ..., -8:]
    assert (masks[torch.as_tensor(rollout.valid)].sum(-1) == 4).all()


def shifted(rollout):
    """The mask of the next observation instead of this one's."""
    obs = rollout.obs.clone()
    obs[:-1, ..., -8:] = rollout.obs[1:, ..., -8:]
    return ppo.replace(rollout, obs=obs)


def swapped(rollout):
    """Its columns in another order: those of the second component first."""
    obs = rollout.obs.clone()
    obs[..., -8:] = rollout.obs[..., [-5, -4, -3, -2, -1, -8, -7, -6]]
    return ppo.replace(rollout, obs=obs)


@pytest.mark.parametrize("bug", [shifted, swapped], ids=["mask of the next observation", "columns in a wrong order"])
def test_a_wrong_mask_in_the_replay_would_be_seen(bug, register):
    agent, rollout, _ = collected(register, "info")
    with torch.no_grad():
        logprobs, _, _ = agent.replay(bug(rollout))
    assert logprobs[torch.as_tensor(rollout.valid)].min() < -1e30


def test_a_mask_in_sampling_only_would_be_seen(register, monkeypatch):
    """The entropy would be that of all choices."""
    agent, rollout, _ = collected(register, "info")
    with torch.no_grad():
        _, masked, _ = agent.replay(rollout)
        monkeypatch.setattr(agent, "masks", None)
        monkeypatch.setattr(agent, "encode", lambda obs: obs[..., :-8])
        _, free, _ = agent.replay(rollout)
    valid = torch.as_tensor(rollout.valid)
    assert masked[valid].max() <= 2 * np.log(2) + 1e-5 < free[valid].max()


def test_minus_infinity_would_be_seen():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert not ppo.Categorical(logits, [3]).logprob_and_entropy(torch.tensor([[0]]))[1].isfinite().all()


def test_environments_that_give_no_mask_allow_all(register):
    class Silent(Rules):
        def look(self):
            obs, info = super().look()
            return obs, {} if self.t == 2 else info

        def step(self, action):
            self.mask = np.ones_like(self.mask) if self.t == 2 else self.mask
            return super().step(action)

    args = ppo.Args(env_id=register(partial(Silent, "info")), num_envs=2)
    worlds, agent = ppo.Worlds(args, [1, 2]), ppo.Agent(**ppo.look(args))
    for t in range(1, 5):
        worlds.step(agent.act(torch.as_tensor(worlds.obs)))
        assert (worlds.obs[:, -6:].sum(-1) == (6 if t == 2 else 2)).all()


def test_taxis_mask_is_found_and_it_learns_what_its_mask_allows(main):
    code, out, err = main("--env-id", "Taxi-v4", *MASKED)
    assert code == 0 and "action masks: info" in out.splitlines()[0], err


@pytest.mark.parametrize("flags", [[], ["--lstm-hidden-size", "8", "--num-minibatches", "2"]], ids=" ".join)
def test_a_run_with_masks_resumes_bit_for_bit(flags, register, main):
    env_id = register(partial(Rules, "info"))
    assert main("--env-id", env_id, *MASKED, "--checkpoint-every", 2, "--validation-episodes", 0, *flags)[0] == 0
    whole = load_file("runs/it/model.safetensors")
    last = sorted(Path("runs/it").glob("checkpoint-*.pt"))[-1]
    for path in (last, Path("runs/it/results.json"), Path("runs/it/model.safetensors")):
        path.unlink()
    assert main("--resume", "runs/it")[0] == 0
    again = load_file("runs/it/model.safetensors")
    assert all(torch.equal(again[name], x) for name, x in whole.items())


def test_a_world_of_rules_is_learned(register, main):
    """The best allowed choice differs at each step and only the mask tells it, so it is out of reach; 1 / 2 is not."""
    env_id = register(partial(Rules, "info"))
    assert main("--env-id", env_id, *MASKED)[0] == 0
    results = json.loads(Path("runs/it/results.json").read_text())
    assert results["mean_reward"] > 0
