"""Worlds that nobody here wrote, as they come: ppo.py's general presets beside Stable-Baselines3's defaults.

    python tests/others.py                                     # all that is missing
    python tests/others.py --worlds HealthGathering-v0         # these only
    python tests/others.py --table-only                        # train nothing, write the table

Each group of packages has an environment of its own, runs/env-<group>, which is made at first. Each world is played at
random, and learned by ppo.py and by Stable-Baselines3, seed 1, after as many steps; its score, the mean return of its
episodes (greedy ones but for random), goes to runs/reference/worlds/<world>-<kind>.json, and from these follows
runs/reference/worlds.md. Interrupt it at any time; the same command goes on where it was.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from general import number, random_returns
from reference import REFERENCE, ROOT, begin_or_resume, in_background, run_all

import ppo

SCORES = REFERENCE / "worlds"
GROUPS = {  # environments of packages that can live together
    "light": """minigrid==3.2.0 highway-env==1.12.1 flappy-bird-gymnasium==0.4.0 gym-pusht==0.1.8 pymunk==6.11.1
        panda-gym==3.0.7 mo-gymnasium==1.3.2 vizdoom==1.3.2 popgym==1.0.7 gym-anytrading==2.0.0
        tetris-gymnasium==0.3.1 gymnasium-robotics==1.4.2 shimmy[dm-control,bsuite]==2.0.1 mujoco==3.17.0
        MinAtar==1.0.15 gymnasium[toy-text]==1.4.0""",
    "metaworld": "metaworld==3.1.1",
}
ALWAYS = "stable_baselines3==2.9.2 opencv-python==4.14.0.94"


class World(NamedTuple):
    env_id: str  # as --env-id takes it
    package: str
    steps: int
    flags: str = ""  # besides --env-id and --total-timesteps
    done: str = "nothing"  # what had to be done
    group: str = "light"
    episodes: int = 100

    @property
    def name(self) -> str:
        return re.sub(r"[/ ]", "-", self.env_id.rpartition(":")[2])

    @property
    def limit(self) -> int:
        """Steps of a scored episode, where the world has no limit of its own."""
        return max(1_000, self.steps // self.episodes)

    def __str__(self) -> str:
        return self.name


FACTORY = "a factory of {} lines, tests/factories.py"
WORLDS = [
    World("factories:HealthGathering-v0", "vizdoom", 200_000, "--frame-stack 4", FACTORY.format(7), episodes=30),
    World("minigrid:MiniGrid-DoorKey-5x5-v0", "minigrid", 100_000),
    World("minigrid:MiniGrid-LavaGapS5-v0", "minigrid", 100_000),
    World("minigrid:MiniGrid-Empty-8x8-v0", "minigrid", 100_000),
    World("flappy_bird_gymnasium:FlappyBird-v0", "flappy-bird-gymnasium", 200_000),
    World("highway_env:highway-fast-v0", "highway-env", 20_000, episodes=20),
    World("gym_pusht:gym_pusht/PushT-v0", "gym-pusht", 100_000),
    World("panda_gym:PandaReachDense-v3", "panda-gym", 100_000),
    World("panda_gym:PandaReach-v3", "panda-gym", 100_000),
    World("factories:scalar/deep-sea-treasure-v0", "mo-gymnasium", 100_000, "", FACTORY.format(2)),
    World("factories:scalar/mo-lunar-lander-v3", "mo-gymnasium", 300_000, "", FACTORY.format(2)),
    World("popgym:popgym-RepeatPreviousEasy-v0", "popgym", 300_000, "--lstm-hidden-size 64", "memory: a flag"),
    World("popgym:popgym-CountRecallEasy-v0", "popgym", 300_000, "--lstm-hidden-size 64", "memory: a flag"),
    World("gym_anytrading:stocks-v0", "gym-anytrading", 200_000),
    World("gym_anytrading:forex-v0", "gym-anytrading", 200_000),
    World("tetris_gymnasium.envs:tetris_gymnasium/Tetris", "tetris-gymnasium", 200_000),
    World("gymnasium_robotics:PointMaze_UMazeDense-v3", "gymnasium-robotics", 300_000),
    World("gymnasium_robotics:AdroitHandDoor-v1", "gymnasium-robotics", 200_000),
    World("shimmy:dm_control/cartpole-swingup-v0", "dm_control", 300_000, episodes=20),
    World("shimmy:dm_control/reacher-easy-v0", "dm_control", 300_000, episodes=20),
    World("shimmy:bsuite/catch-v0", "bsuite", 100_000),
    World("shimmy:bsuite/cartpole-v0", "bsuite", 100_000, episodes=20),
    World("metaworld:Meta-World/MT1", "metaworld", 200_000, "--env-kwargs env_name reach-v3", "an option", "metaworld",
          20),
    World("Blackjack-v1", "gymnasium", 100_000),
    World("CliffWalking-v1", "gymnasium", 100_000),
    World("FrozenLake8x8-v1", "gymnasium", 300_000),
    World("MinAtar/Seaquest-v1", "minatar", 500_000),
]  # fmt: skip
CANNOT = {  # worlds and packages that do not run, and why
    "FetchReachDense-v4 (gymnasium-robotics 1.4.2)": "its reset fails with an assertion about joints under MuJoCo 3.17",
    "gym-super-mario-bros 7.4.0": "made for the old gym; NES-Py overflows a byte under NumPy 2, shimmy or not",
    "Procgen": "no wheel for Python 3.11",
}
KINDS = ("random", "ppo", "sb3")


def main(worlds: tuple[str, ...] = (), kinds: tuple[str, ...] = KINDS, jobs: int = 2, table_only: bool = False,
         one: tuple[str, str] | None = None) -> None:  # fmt: skip
    """Run what is missing, then write the page.

    Args:
        worlds: names of those to run; default all
        kinds: of random, ppo and sb3
        jobs: runs at a time
        table_only: run nothing
        one: a world's name, random or sb3: score it in this process"""
    if one:
        world = next(w for w in WORLDS if w.name == one[0])
        print(json.dumps({"sb3": sb3, "random": random}[one[1]](world)))
        return
    queue = [(w, kind) for w in WORLDS if not worlds or w.name in worlds for kind in kinds]
    queue = [] if table_only else [job for job in queue if not score_file(*job).exists()]
    for group in dict.fromkeys(w.group for w, _ in queue):
        python(group)
    code = run_all(queue, jobs, start, collect)
    (SCORES.parent / "worlds.md").write_text(page())
    sys.exit(code)


def python(group: str) -> str:
    """The interpreter of a group's environment, which is made if it is not there."""
    folder = ROOT / "runs" / f"env-{group}"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        packages = [*ALWAYS.split(), *GROUPS[group].split()]
        pip = [folder / "bin" / "pip", "install", "-q"]
        subprocess.run([*pip, "-r", ROOT / "requirements.txt"], check=True)
        subprocess.run([*pip, *packages], check=True)
        (folder / "ready").touch()
    return str(folder / "bin" / "python")


def score_file(world: World, kind: str) -> Path:
    return SCORES / f"{world.name}-{kind}.json"


def flags(world: World) -> list[str]:
    return ["--env-id", world.env_id, "--total-timesteps", str(world.steps), *shlex.split(world.flags)]


def work_folder(world: World, kind: str) -> Path:
    return ROOT / "runs" / f"others-{world.name}-{kind}"


def start(world: World, kind: str) -> subprocess.Popen:
    run, interpreter = work_folder(world, kind), python(world.group)
    if kind != "ppo":
        return in_background(run, ["tests/others.py", "--one", world.name, kind], interpreter)
    return begin_or_resume(run, [*flags(world), "--seed", "1", "--eval-episodes", str(world.episodes)], interpreter)


def collect(world: World, kind: str) -> str:
    run = work_folder(world, kind)
    if kind == "ppo":
        results = json.loads((run / "results.json").read_text())
        scores, seconds = results["episode_returns"], results["training_seconds"]
    else:
        scores, seconds = json.loads(Path(f"{run}.log").read_text().splitlines()[-1])
    SCORES.mkdir(parents=True, exist_ok=True)
    result = {"world": world.env_id, "kind": kind, "steps": world.steps, "flags": world.flags, "seconds": seconds}
    result |= {"mean_reward": float(np.mean(scores)), "std_reward": float(np.std(scores)), "episodes": len(scores)}
    score_file(world, kind).write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(run, ignore_errors=True)
    return "{mean_reward:.2f} +/- {std_reward:.2f}, {seconds:.0f} s".format(**result)


def make(world: World, limit: int | None = None):
    """The environment as ppo.py makes it, stack of frames included, for one agent; scores are cut as ppo.py does."""
    args = ppo.parse_args(flags(world))
    ppo.register(args.env_id)
    env = ppo.gym.make(args.plain_id, **args.env_kwargs)
    if limit and not env.spec.max_episode_steps:
        env = ppo.gym.wrappers.TimeLimit(env, limit)
    return ppo.gym.wrappers.FrameStackObservation(env, args.frame_stack) if args.frame_stack > 1 else env


def random(world: World) -> tuple[list[float], float]:
    return random_returns(make(world, limit=world.limit), 1, world.episodes), 0.0


def sb3(world: World) -> tuple[list[float], float]:
    """Stable-Baselines3's PPO with its defaults. Texts, which it cannot take, are taken out for it; tuples, and images
    too small for its CNN, are shown to it as rows of numbers."""
    from gymnasium import spaces
    from stable_baselines3 import PPO
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    def env(limit=None):
        env = make(world, limit)
        if isinstance(env.observation_space, spaces.Dict):
            taken = [k for k, s in env.observation_space.items() if isinstance(s, (spaces.Box, spaces.Discrete))]
            env = ppo.gym.wrappers.FilterObservation(env, taken)
        parts = env.observation_space.values() if isinstance(env.observation_space, spaces.Dict) else ()
        small = any(len(s.shape) == 3 and min(s.shape[:2]) < 36 for s in parts)
        if small or isinstance(env.observation_space, spaces.Tuple):
            env = ppo.gym.wrappers.FlattenObservation(env)
        return Monitor(env)

    space = env().observation_space
    image = isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "CnnPolicy" if image else "MlpPolicy"
    model, began = PPO(policy, env(), seed=1, device="cpu"), time.perf_counter()
    model.learn(world.steps)
    seconds = time.perf_counter() - began
    return evaluate_policy(model, env(world.limit), world.episodes, return_episode_rewards=True)[0], seconds


def page() -> str:
    """runs/reference/worlds.md."""
    lines = []
    for w in WORLDS:
        found = {kind: json.loads(f.read_text()) for kind in KINDS if (f := score_file(w, kind)).exists()}
        means = [number(found[kind]["mean_reward"]) if kind in found else "not run" for kind in KINDS]
        minutes = f"{found['ppo']['seconds'] / 60:.1f}" if "ppo" in found else ""
        command = f"`python ppo.py {shlex.join(flags(w))}`"
        lines.append(f"| {w.package} | {command} | {' | '.join(means)} | {minutes} | {w.done} |")
    cannot = "\n".join(f"- {name}: {why}." for name, why in CANNOT.items())
    versions = "\n".join(f"- {package}" for packages in GROUPS.values() for package in packages.split())
    return HEAD + "\n".join(lines) + f"\n\n## What does not run\n\n{cannot}\n\n## Versions\n\n{versions}\n"


HEAD = """# Worlds as they come

Worlds of published packages that nobody here wrote. One command each, no setting tuned: `ppo.py` takes a general
preset. Beside it a random policy, and Stable-Baselines3's PPO with its defaults at equal steps; what that cannot take
is left out (texts) or shown to it as rows of numbers (tuples, images too small for its CNN). One seed each, so small
differences mean nothing, and large ones little where one lucky find decides: FrozenLake8x8 reached 0.77, 0.74 and 0.66
with seeds 101 to 103, and FlappyBird's kept agent 65.8 in ten episodes with seed 101. A score is the mean return of 100
greedy episodes (20 or 30 where they are slow). Minutes are of training, on one core beside another run. Made by
`python tests/others.py` (with `PYTHONPATH=tests` where the world is in tests/factories.py), which also makes the
environments of packages.

| package | command | random | ppo.py | SB3 | minutes | what had to be done |
|:--|:--|--:|--:|--:|--:|:--|
"""

if __name__ == "__main__":
    tyro.cli(main)
