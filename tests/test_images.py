"""Worlds of images: every kind is learned; bfloat16 changes the speed alone; stacked frames keep to their episode."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import scalars
from gymnasium.spaces import Box, Dict, Discrete, Tuple

import ppo

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """Until a run chooses its device."""
    monkeypatch.setattr(ppo.CNN, "in_bfloat16", False)


class Pixel(gym.Env):
    """A bright pixel in one of four quarters of an image; naming the quarter pays 1. Ten images an episode.

    `kind` says how the image comes; with "moving" the answer is the quarter of the image before."""

    action_space = Discrete(4)

    def __init__(self, kind="bytes", size=12, channels=3, last=True):
        self.kind, self.size, self.last = kind, size, last
        self.shape = (size, size, channels) if last else (channels, size, size)
        high = 1 if kind in ("bools", "floats") else 255
        dtype = {"bools": np.bool_, "floats": np.float32}.get(kind, np.uint8)
        image = Box(0, high, self.shape, dtype)
        vector = Box(-1, 1, (2,))
        if kind == "Dict":
            self.observation_space = Dict(image=image, vector=vector)
        else:
            self.observation_space = Tuple([vector, image]) if kind == "Tuple" else image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.quarter = 0, 0
        return self.show(), {}

    def show(self):
        self.before, self.quarter = self.quarter, int(self.np_random.integers(4))
        half = self.size // 2
        row, column = self.np_random.integers(half, size=2) + np.multiply(divmod(self.quarter, 2), half)
        image = np.zeros((self.size, self.size, min(self.shape)), np.float32)
        image[row, column] = 1
        image = image if self.last else np.moveaxis(image, -1, 0)
        image = {"bytes": 255, "Dict": 255, "Tuple": 255, "moving": 255, "codes": 7}.get(self.kind, 1) * image
        self.turn = int(self.np_random.integers(2))  # in a Dict or Tuple, the vector turns the answer round
        vector = np.float32([2 * self.turn - 1, 0.5])
        if self.kind == "Dict":
            return {"image": image.astype(np.uint8), "vector": vector}
        if self.kind == "Tuple":
            return vector, image.astype(np.uint8)
        return image.astype(self.observation_space.dtype)

    def answer(self):
        if self.kind in ("Dict", "Tuple"):
            return (self.quarter + 2 * self.turn) % 4
        return self.before if self.kind == "moving" else self.quarter

    def step(self, action):
        reward = float(action == self.answer())
        self.time += 1
        return self.show(), reward, self.time == 10, False, {}


gym.register("images/Pixel-v0", Pixel)
SETTINGS = dict(num_envs=16, num_steps=64, num_minibatches=16, update_epochs=4, learning_rate=1e-3, gamma=0.0,
                anneal_lr=False, validation_episodes=0, eval_episodes=20, ent_coef=0.0)  # fmt: skip


def learn(steps, kind, run_name="run", env_kwargs=None, **kwargs):
    settings = {"vectorization": "sync"} | SETTINGS | kwargs
    args = ppo.Args("images/Pixel-v0", {"kind": kind, **(env_kwargs or {})}, total_timesteps=steps, run_name=run_name,
                    **settings)  # fmt: skip
    state = ppo.train(args)
    return state, args, ppo.load_agent(str(args.run), args)


def score(agent, args):
    returns, lengths, _ = ppo.evaluate(agent, args, 20)
    return (returns / lengths).mean()


# Every kind is learned


@pytest.mark.parametrize("kind", ["bytes", "bools", "floats", "codes", "Dict", "Tuple"])
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_small_images_of_every_kind_are_learned(kind, last):
    network = {"hidden_sizes": (128,), "activation": "relu"}
    _, args, agent = learn(30_000, kind, env_kwargs={"last": last, "size": 8}, anneal_lr=True, **network)
    assert score(agent, args) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "bools", "floats", "Dict"])
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
def test_large_images_of_every_kind_are_learned(kind, last):
    rate = {} if kind == "Dict" else {"learning_rate": 3e-4, "ent_coef": 0.01}  # each as it learns soonest
    shape = {"last": last, "size": 36}
    _, args, agent = learn(16_000, kind, env_kwargs=shape, hidden_sizes=(64,), activation="relu", **rate)
    assert score(agent, args) > 0.97


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_stacked_frames_tell_what_one_frame_does_not(vectorization):
    world = {"env_kwargs": {"size": 8}, "hidden_sizes": (128,), "activation": "relu", "anneal_lr": True}
    steps = 40_000 if vectorization == "sync" else 8_192
    _, args, agent = learn(steps, "moving", frame_stack=2, vectorization=vectorization, **world)
    if vectorization == "sync":
        assert score(agent, args) > 0.9
    assert agent.parts[0]["shape"] == [2, 8, 8, 3]


def test_a_single_frame_does_not_tell_what_stacked_ones_do():
    _, args, agent = learn(20_000, "moving", env_kwargs={"size": 8}, hidden_sizes=(128,), activation="relu")
    assert score(agent, args) < 0.5


# What the network is given


@pytest.mark.parametrize(
    "space, parts",
    [
        (Box(-1, 1, (4,)), [("numbers", [4])]),
        (Discrete(3), [("choices", [])]),
        (Box(0, 1, (10, 10, 4), np.bool_), [("pixels", [10, 10, 4], 1)]),
        (Box(0, 1, (4, 4, 4), np.bool_), [("numbers", [4, 4, 4])]),
        (Box(0, 255, (128,), np.uint8), [("numbers", [128])]),
        (Box(0, 255, (7, 7, 3), np.uint8), [("pixels", [7, 7, 3], 255)]),
        (Box(0, 255, (4, 7), np.uint8), [("numbers", [4, 7])]),
        (Box(0, 255, (84, 84), np.uint8), [("pixels", [84, 84], 255)]),
        (Box(0, 255, (4, 84, 84), np.uint8), [("pixels", [4, 84, 84], 255)]),
        (Box(0, 255, (120, 160, 3), np.uint8), [("pixels", [120, 160, 3], 255)]),
        (Box(0, 1, (40, 44, 3), np.float32), [("pixels", [40, 44, 3], 1)]),
        (Box(0, 1, (3, 40, 44), np.bool_), [("pixels", [3, 40, 44], 1)]),
        (Box(-1, 1, (40, 44, 3), np.float32), [("pixels", [40, 44, 3], 1)]),
        (Box(-9, 255, (40, 44, 3), np.float32), [("pixels", [40, 44, 3], 255)]),
        (Box(-np.inf, 1, (40, 44, 3), np.float32), [("numbers", [40, 44, 3])]),
        (Dict(a=Box(-1, 1, (2,)), b=Discrete(3)), [("numbers", [2]), ("choices", [])]),
        (Dict(a=Box(0, 255, (36, 36, 3), np.uint8), b=Discrete(3)), [("pixels", [36, 36, 3], 255), ("choices", [])]),
        (Tuple([Discrete(2), Box(0, 255, (8, 8, 3), np.uint8)]), [("choices", []), ("pixels", [8, 8, 3], 255)]),
    ],
    ids=str,
)
def test_an_observation_is_taken_apart_as_its_space_says(space, parts):
    found = [(part["kind"], part["shape"], part.get("white")) for part in ppo.describe(space)]
    assert found == [(*part, None)[:3] for part in parts]


@pytest.mark.parametrize("space, told", [
    (Box(0, 255, (160, 320, 3), np.uint8), ""), (Box(0, 255, (3, 160, 160), np.uint8), ""),
    (Box(0, 255, (210, 161, 3), np.uint8), "images of [210, 161, 3] are slow"), (Box(0, 255, (96, 96), np.uint8), ""),
    (Box(0, 255, (161, 161), np.uint8), "images of [161, 161] are slow"), (Box(0, 255, (8, 7, 3), np.uint8), ""),
    (Box(0, 1, (2, 4, 200, 300)), "images of [2, 4, 200, 300] are slow"),
    (Box(0, 1, (4, 4, 4), np.bool_), "no image: Box(False, True, (4, 4, 4), bool)"),
    (Box(-np.inf, 1, (40, 44, 3)), "no image: Box(-inf, 1.0, (40, 44, 3), float32)"),
    (Box(0, 256, (40, 44, 3), np.int32), "no image: Box(0, 256, (40, 44, 3), int32)"),
    (Box(0, 255, (2, 2, 2, 40, 44), np.uint8), "no image: Box(0, 255, (2, 2, 2, 40, 44), uint8)"),
    (Box(-1, 1, (4, 4)), ""), (Box(-1, 1, (99,)), ""), (Discrete(3), ""),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a Dict"])
def test_a_slow_image_and_one_that_is_not_taken_for_one_are_told_in_one_line(space, told, inside, capsys):
    ppo.print_once.cache_clear()
    for _ in range(3):  # however often it is looked at
        ppo.describe(Dict(eye=space) if inside else space)
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(told) and out.count("\n") == bool(told)
    if "slow" in told:
        assert "ResizeObservation" in out


def test_a_run_tells_once_of_a_picture_that_is_none(main):
    ppo.print_once.cache_clear()
    flags = ["--env-kwargs", "size", 4, "--num-envs", 2, "--num-steps", 16, "--total-timesteps", 64,
             "--validation-episodes", 1, "--eval-episodes", 1]  # fmt: skip
    code, out, err = main("--env-id", "images/Pixel-v0", *flags)
    assert (code, out.count("no image: ")) == (0, 1), err


MEMORY = [("bytes", 36 * 36 * 3), ("floats", 4 * 36 * 36 * 3), ("Dict", 4 * (36 * 36 * 3 + 2))]


@pytest.mark.parametrize("kind, size", MEMORY, ids=[kind for kind, _ in MEMORY])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rollout_that_takes_more_than_half_of_the_memory_is_refused_first(kind, size, ranks, main, monkeypatch):
    flags = ["--env-id", "images/Pixel-v0", "--env-kwargs", "kind", kind, "size", 36, "--preset", "none",
             "--num-envs", 4, "--num-steps", 16, "--total-timesteps", 64, "--num-minibatches", 2,
             "--validation-episodes", 0, "--eval-episodes", 1]  # fmt: skip
    made, empty = [], ppo.Rollout.empty
    monkeypatch.setattr(ppo.Rollout, "empty", lambda *args: made.append(1) or empty(*args))
    monkeypatch.setattr(ppo, "RANKS", ranks)
    monkeypatch.setattr(ppo.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(ppo.dist, "init_process_group", lambda *args: None)
    machine = {"SC_PAGE_SIZE": 8, "SC_PHYS_PAGES": 64 // ranks * size // 4}
    sysconf = ppo.os.sysconf
    monkeypatch.setattr(ppo.os, "sysconf", lambda name: machine[name] if name in machine else sysconf(name))
    if ranks == 1:
        assert main(*flags)[0] == 0 and made
        made.clear()
    machine["SC_PHYS_PAGES"] -= 1
    code, out, err = main(*flags, "--run-name", "large")
    assert (code, out, err.count("\n"), made) == (2, "", 1, []) and not Path("runs", "large").exists()
    assert f"{64 // ranks} observations take 0 GiB: lower --num-envs or --num-steps" in err


def test_so_it_is_on_this_machine(main):
    flags = ["--preset", "none", "--env-kwargs", "size", 84, "--num-envs", 4096, "--num-steps", 2**20,
             "--total-timesteps", 2**32]  # fmt: skip
    code, out, err = main("--env-id", "images/Pixel-v0", *flags)  # 2^32 rows of 21168 bytes
    assert (code, out, err.count("\n")) == (2, "", 1) and not Path("runs").exists()
    assert "4,294,967,296 observations take 84,672 GiB" in err


@pytest.mark.parametrize("shape", [(4, 40, 44), (40, 44, 4), (2, 40, 44, 2), (2, 2, 40, 44)], ids=str)
def test_every_order_of_channels_becomes_channels_first(shape):
    """Each pixel carries its row and column, each channel its number; stacked frames are channels in their order."""
    row, column = np.meshgrid(np.arange(40), np.arange(44), indexing="ij")
    images = np.stack([100_000 * c + 100 * row + column for c in range(4)])  # [C, H, W]
    given = {
        (4, 40, 44): images,
        (40, 44, 4): np.moveaxis(images, 0, -1),
        (2, 2, 40, 44): images.reshape(2, 2, 40, 44),
        (2, 40, 44, 2): np.moveaxis(images.reshape(2, 2, 40, 44), 1, -1),
    }[shape]
    batch = torch.as_tensor(np.stack([given, given + 1]))
    assert ppo.channels_first(batch, list(shape)).equal(torch.as_tensor(np.stack([images, images + 1])))


def fresh(space):
    return ppo.Agent(ppo.describe(space), ppo.describe_action(Discrete(6), True), hidden_sizes=[])


def test_the_parts_of_a_row_go_to_their_own_networks():
    torch.manual_seed(0)
    agent = fresh(Tuple([Box(0, 255, (36, 36, 3), np.uint8), Box(-1, 1, (5,)), Box(0, 255, (7, 7, 3), np.uint8)]))
    image, numbers = torch.randint(0, 256, (6, 36, 36, 3)).float(), torch.randn(6, 5)
    small = torch.randint(0, 9, (6, 7, 7, 3)).float()
    features = agent.encode(torch.cat([image.flatten(1), numbers, small.flatten(1)], 1))
    torch.testing.assert_close(features[:, :512], agent.trunk[0](image.flatten(1)))
    assert features[:, 512:517].equal(numbers)
    torch.testing.assert_close(features[:, 517:], agent.trunk[2](small.flatten(1)))


def test_small_bytes_are_seen_as_brightnesses_and_as_numbers_of_things():
    cnn, seen = ppo.CNN(*ppo.describe(Box(0, 255, (5, 6, 2), np.uint8))), []
    cnn[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    image = torch.randint(0, 256, (3, 5, 6, 2), dtype=torch.uint8)
    image[0] %= 16
    assert cnn(image.flatten(1)).shape == (3, 128)
    shown, plain = seen[0].unflatten(1, (2, 16)), image.movedim(-1, 1)
    for number in range(1, 16):
        assert shown[:, :, number - 1].equal((plain == number).float())
    torch.testing.assert_close(shown[:, :, 15], plain / 255)


@pytest.mark.parametrize("white", [1, 5, 255])
@pytest.mark.parametrize("shape", [(36, 36, 3), (4, 84, 84)], ids=str)
def test_pixels_are_divided_by_the_white_of_their_space(shape, white):
    torch.manual_seed(0)
    by_bytes, by_floats = (ppo.CNN(*ppo.describe(b)) for b in (Box(0, 255, shape, np.uint8), Box(0, white, shape)))
    by_floats.load_state_dict(by_bytes.state_dict())
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8).flatten(1)
    torch.testing.assert_close(by_bytes(image), by_floats(image.float() * (white / 255)))


# Stacked frames


class Counter(gym.Env):
    """Shows 10 times the number of the episode, plus the step: what a frame shows tells where it belongs."""

    observation_space, action_space = Box(0, 1e6, (1,)), Discrete(2)
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.float32([10 * self.episode]), {}

    def step(self, action):
        self.time += 1
        return np.float32([10 * self.episode + self.time]), 1.0, self.time == 4, False, {}


gym.register("images/Counter-v0", Counter)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_the_first_frames_of_an_episode_show_nothing_of_the_last_one(vectorization):
    args = ppo.Args("images/Counter-v0", vectorization=vectorization, frame_stack=3)
    worlds, seen = ppo.Worlds(args, [1, 2]), []
    for _ in range(12):
        seen.append(worlds.obs[0].astype(int).tolist())
        worlds.step(torch.zeros(2, dtype=torch.int64))
    worlds.envs.close()
    first = [[10, 10, 10], [10, 10, 11], [10, 11, 12], [11, 12, 13], [12, 13, 14]]
    assert seen[:10] == first + [[10 + x for x in frame] for frame in first]


@pytest.mark.parametrize("env_id, vectorization", [("ALE/Pong-v5", "auto")])
def test_frames_that_cannot_be_stacked_are_refused_in_one_line(env_id, vectorization, main):
    code, _, err = main("--env-id", env_id, "--vectorization", vectorization, "--frame-stack", 4)
    assert (code, err.count("\n")) == (2, 1)
    assert "--frame-stack" in err and "sync or async" in err and not Path("runs").exists()


def test_auto_takes_environments_whose_frames_can_be_stacked():
    worlds = ppo.Worlds(ppo.Args(frame_stack=2), [1, 2])
    assert isinstance(worlds.envs.unwrapped, gym.vector.SyncVectorEnv) and worlds.obs.shape == (2, 8)


# Precision


def random_batch(agent, n=64):
    torch.manual_seed(1)
    obs = torch.randint(0, 256, (n, agent.width), dtype=torch.uint8)
    batch = ppo.Batch(obs, torch.randint(0, 6, (n,)), *torch.randn(4, n))
    with torch.no_grad():
        batch.logprobs, _, batch.values = agent.replay(batch)
    batch.logprobs = batch.logprobs + 0.1 * torch.randn(n)
    return batch


def two_precisions():
    torch.manual_seed(0)
    exact = fresh(Box(0, 255, (4, 84, 84), np.uint8))
    fast = copy.deepcopy(exact)
    fast.trunk[0].in_bfloat16 = True
    return exact, fast


def test_bfloat16_gives_the_loss_and_the_gradient_of_float32_to_a_percent():
    exact, fast = two_precisions()
    batch, args = random_batch(exact), ppo.Args(ent_coef=0.01)
    (expected, losses), (gradient, metrics) = (ppo.compute_gradient(agent, batch, args) for agent in (exact, fast))
    assert gradient.dtype == torch.float32
    for name, value in losses.items():
        torch.testing.assert_close(metrics[name], value, rtol=0.02, atol=0.01)
    assert torch.nn.functional.cosine_similarity(gradient, expected, dim=0) > 0.999
    torch.testing.assert_close(gradient.norm(), expected.norm(), rtol=0.02, atol=0)


def test_bfloat16_stays_within_the_trunk():
    _, fast = two_precisions()
    batch = random_batch(fast)
    assert {p.dtype for p in fast.parameters()} == {torch.float32}
    assert {x.dtype for x in (*fast.replay(batch), fast.encode(batch.obs))} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_rollout_is_replayed_as_it_was_played(precision, monkeypatch):
    """The choice, recomputed from the replay's output and the noise, is the action taken; the first ratio is 1."""
    noises, collect = [], ppo.collect

    def spy(agent, worlds, rollout):
        agent.trunk[0].in_bfloat16 = precision == "bfloat16"
        with torch.random.fork_rng():
            noises.append(agent.sample_noise(*rollout.rewards.shape))
        collect(agent, worlds, rollout)
        with torch.no_grad():
            logits = agent.policy(agent.encode(rollout.obs[:-1]), rollout.obs[:-1]).logits
        noisy = logits + noises[-1]
        best = noisy.topk(2, -1).values
        clear = best[..., 0] - best[..., 1] > (0.05 if precision == "bfloat16" else 1e-5)
        assert clear.float().mean() > 0.9
        assert noisy.argmax(-1)[clear].equal(rollout.actions[clear])

    monkeypatch.setattr(ppo, "collect", spy)
    settings = {**SETTINGS, "num_minibatches": 1, "update_epochs": 1, "num_steps": 16, "num_envs": 4}
    args = ppo.Args("images/Pixel-v0", {"size": 36}, total_timesteps=256, run_name="ratio", vectorization="sync",
                    **settings)  # fmt: skip
    logs = scalars(ppo.train(args).args.run)
    assert len(noises) == 4
    tolerance = 1e-4 if precision == "bfloat16" else 1e-6
    assert [value for _, value in logs["losses/approx_kl"]] == pytest.approx([0] * 4, abs=tolerance)


def test_bfloat16_is_taken_where_the_processor_has_it_and_a_run_goes_on_where_not(main, monkeypatch):
    flags = ["--env-id", "images/Pixel-v0", "--env-kwargs", "size", 36, "--num-envs", 4, "--num-steps", 16,
             "--total-timesteps", 128, "--validation-episodes", 0, "--eval-episodes", 2]  # fmt: skip
    for native, name in ((True, "fast"), (False, "exact")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx2": True, "avx512_bf16": native})
        assert main(*flags, "--run-name", name)[::2] == (0, "") and ppo.CNN.in_bfloat16 is native
    fast, exact = (Path("runs", name, "model.safetensors").read_bytes() for name in ("fast", "exact"))
    assert fast != exact
    for name in ("results.json", "model.safetensors"):
        Path("runs/fast", name).unlink()
    assert main("--resume", "runs/fast")[0] == 0 and not ppo.CNN.in_bfloat16


# Resume and files

BYTES = ppo.describe(Box(0, 255, (36, 36, 3), np.uint8))[0]


@pytest.mark.parametrize("kind, size", [("bytes", 36), ("Dict", 36), ("codes", 8)])
def test_a_resumed_run_ends_with_the_same_weights(kind, size, monkeypatch):
    settings = {"env_kwargs": {"size": size}, "checkpoint_every": 2, "num_envs": 4, "num_steps": 16}
    straight, *_ = learn(512, kind, run_name="straight", **settings)
    saved, save = [], ppo.State.checkpoint

    def stop(state):
        save(state)
        saved.append(state.iteration)
        if state.iteration == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(ppo.State, "checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        learn(512, kind, run_name="stopped", **settings)
    monkeypatch.setattr(ppo.State, "checkpoint", save)
    ppo.train(replace(straight.args, resume="runs/stopped"))
    assert saved == [0, 2, 4]
    assert Path("runs/stopped/model.safetensors").read_bytes() == (straight.args.run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", [
    {"parts": [BYTES | {"shape": [36, 36, 1]}]}, {"parts": []}, {"parts": [BYTES | {"kind": "numbers"}]},
    {"parts": "os.system"}, {"parts": [BYTES | {"path": ["image"]}]}, {"obs_shape": [3, 36, 36]},
], ids=str)  # fmt: skip
def test_a_config_that_does_not_fit_the_images_is_refused(change, main):
    run = learn(1024, "bytes", env_kwargs={"size": 36})[0].args.run
    config = json.loads((run / "config.json").read_text())
    assert config["parts"] == [BYTES]
    (run / "config.json").write_text(json.dumps(config | change))
    (run / "results.json").write_text("{}")
    for flag in "--evaluate", "--init-from":
        code, _, err = main(flag, run)
        assert (code, err.count("\n")) == (2, 1) and f"loading {run}" in err and list(Path("runs").iterdir()) == [run]


def test_an_image_agent_loads_as_it_was_saved():
    _, args, agent = learn(1024, "Dict", env_kwargs={"size": 36})
    again = ppo.Agent.from_pretrained(args.run, strict=True)
    obs = torch.rand(5, agent.width) * 255
    assert copy.deepcopy(again).act(obs).equal(agent.act(obs))
