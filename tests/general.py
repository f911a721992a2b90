"""How good is the first try? Known worlds under names that no preset knows, by four ways that need no tuning.

    python tests/general.py                                               # all that is missing
    python tests/general.py --worlds UnnamedHopper-v0 --kinds general     # these only
    python tests/general.py --table-only                                  # train nothing, write the table

general     ppo.py as it is: the general preset, seeds 1 to 3
none        ppo.py --preset none: CleanRL's defaults, seed 1
sb3         Stable-Baselines3's defaults, seed 1
random      random actions

Each run's score goes to runs/reference/general/<world>-<kind>-seed<k>.json: the mean return of 100 greedy episodes.
Interrupt it at any time; the same command goes on where it was (with Stable-Baselines3, begins that run anew). From
these files and those of the tuned presets, runs/reference/<world>/, follows runs/reference/general.md.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
import worlds as registered  # noqa: F401
from reference import begin_or_resume, in_background, made_with, run_all

ROOT = Path(__file__).resolve().parent.parent
SCORES = ROOT / "runs" / "reference" / "general"
WORLDS = {  # steps; the tuned preset's environment, if there is one
    "UnnamedCartPole-v0": (100_000, "CartPole-v1"),
    "UnnamedAcrobot-v0": (500_000, "Acrobot-v1"),
    "UnnamedMountainCar-v0": (500_000, "MountainCar-v0"),
    "UnnamedLunarLander-v0": (1_000_000, "LunarLander-v3"),
    "UnnamedFrozenLake-v0": (200_000, None),
    "UnnamedEngines-v0": (1_000_000, None),
    "UnnamedParts-v0": (1_000_000, "LunarLander-v3"),
    "UnnamedPendulum-v0": (100_000, "Pendulum-v1"),
    "UnnamedLunarLanderContinuous-v0": (1_000_000, "LunarLanderContinuous-v3"),
    "UnnamedBipedalWalker-v0": (1_000_000, None),
    "UnnamedHopper-v0": (1_000_000, "Hopper-v5"),
    "UnnamedWalker2d-v0": (1_000_000, "Walker2d-v5"),
    "UnnamedHalfCheetah-v0": (1_000_000, "HalfCheetah-v5"),
    "UnnamedAnt-v0": (1_000_000, "Ant-v5"),
    "UnnamedReacher-v0": (1_000_000, "Reacher-v5"),
    "UnnamedInvertedPendulum-v0": (1_000_000, "InvertedPendulum-v5"),
    "UnnamedPusher-v0": (1_000_000, "Pusher-v5"),
    "UnnamedSwimmer-v0": (1_000_000, "Swimmer-v5"),
    "UnnamedMountainCarContinuous-v0": (300_000, None),
}
HELD_BACK = ["UnnamedEngines-v0", "UnnamedInvertedPendulum-v0", "UnnamedParts-v0", "UnnamedPusher-v0"]
APART = ["UnnamedSwimmer-v0", "UnnamedMountainCarContinuous-v0"]  # they need what no general setting gives
SEEDS = {"general": (1, 2, 3), "none": (1,), "sb3": (1,), "random": (1,)}
EPISODES = 100


def main(worlds: tuple[str, ...] = tuple(WORLDS), kinds: tuple[str, ...] = tuple(SEEDS), jobs: int = 2,
         table_only: bool = False, one: tuple[str, str, int] | None = None) -> None:  # fmt: skip
    """Run what is missing, then write the table.

    Args:
        worlds: those to run
        kinds: of general, none, sb3 and random
        jobs: runs at a time
        table_only: run nothing
        one: a world, sb3 or random, and a seed: score it in this process"""
    if one:
        world, kind, seed = one
        print(json.dumps({"sb3": sb3, "random": random}[kind](world, seed)))
        return
    queue = [(world, kind, seed) for world in worlds for kind in kinds for seed in SEEDS[kind]]
    queue = [] if table_only else [job for job in queue if not score_file(*job).exists()]
    code = run_all(queue, jobs, start, collect)
    (SCORES.parent / "general.md").write_text(page())
    sys.exit(code)


def score_file(world: str, kind: str, seed: int) -> Path:
    return SCORES / f"{world}-{kind}-seed{seed}.json"


def work_folder(world: str, kind: str, seed: int) -> Path:
    return ROOT / "runs" / f"general-{world}-{kind}-seed{seed}"


def start(world: str, kind: str, seed: int) -> subprocess.Popen:
    run = work_folder(world, kind, seed)
    if kind in ("sb3", "random"):
        return in_background(run, ["tests/general.py", "--one", world, kind, str(seed)])
    flags = ["--env-id", f"worlds:{world}", "--total-timesteps", str(WORLDS[world][0]), "--seed", str(seed)]
    return begin_or_resume(run, flags + ["--preset", "none"] * (kind == "none"))


def collect(world: str, kind: str, seed: int) -> str:
    run = work_folder(world, kind, seed)
    if kind in ("general", "none"):
        score = json.loads((run / "results.json").read_text())["episode_returns"]
    else:
        score = json.loads(Path(f"{run}.log").read_text().splitlines()[-1])
    SCORES.mkdir(parents=True, exist_ok=True)
    result = {"world": world, "kind": kind, "seed": seed, "steps": WORLDS[world][0], "ppo.py": made_with()["ppo.py"]}
    result |= {"mean_reward": float(np.mean(score)), "std_reward": float(np.std(score))}
    score_file(world, kind, seed).write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(run, ignore_errors=True)
    return "{mean_reward:.2f} +/- {std_reward:.2f}".format(**result)


def sb3(world: str, seed: int) -> list[float]:
    """Returns of 100 greedy episodes after training with Stable-Baselines3's defaults."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.evaluation import evaluate_policy

    env = gym.make(world)
    several = isinstance(env.observation_space, gym.spaces.Dict)
    model = PPO("MultiInputPolicy" if several else "MlpPolicy", env, seed=seed, device="cpu")
    model.learn(WORLDS[world][0])
    return evaluate_policy(model, gym.make(world), EPISODES, return_episode_rewards=True)[0]


def random(world: str, seed: int) -> list[float]:
    return random_returns(gym.make(world), seed, EPISODES)


def random_returns(env: gym.Env, seed: int, episodes: int) -> list[float]:
    """Of so many episodes of random actions."""
    returns = []
    env.action_space.seed(seed)
    for episode in range(episodes):
        env.reset(seed=seed * 1000 + episode)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def results(world: str, kind: str) -> list[dict]:
    paths = [score_file(world, kind, seed) for seed in SEEDS[kind]]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def means(world: str, kind: str) -> list[float]:
    return [result["mean_reward"] for result in results(world, kind)]


def tuned(world: str) -> float | None:
    """The mean score of the tuned preset at as many steps."""
    env_id = WORLDS[world][1]
    paths = list((ROOT / "runs" / "reference" / env_id).glob("seed*.json")) if env_id else []
    return float(np.mean([json.loads(path.read_text())["mean_reward"] for path in paths])) if paths else None


def share(world: str) -> float | None:
    """General's mean, from 0, a random policy, to 100, the tuned preset."""
    general, low, high = means(world, "general"), means(world, "random"), tuned(world)
    if not general or not low or high is None:
        return None
    return 100 * (float(np.mean(general)) - low[0]) / (high - low[0])


def number(x: float) -> str:
    return f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def page() -> str:
    """runs/reference/general.md."""
    lines = []
    for world, (steps, _) in WORLDS.items():
        general, percent = means(world, "general"), share(world)
        one = [number(x[0]) if (x := means(world, kind)) else "" for kind in ("random", "sb3", "none")]
        best = "" if (score := tuned(world)) is None else number(score)
        name = world + (" (held back)" if world in HELD_BACK else " (apart)" if world in APART else "")
        shown = number(float(np.mean(general))) if general else "not run"
        seeds = ", ".join(map(number, general))
        words = [name, f"{steps // 1000}k", *one, best, shown, seeds, "" if percent is None else f"{percent:.0f} %"]
        lines.append(f"| {' | '.join(words)} |")
    known = [p for world in WORLDS if world not in APART and (p := share(world)) is not None]
    total = f"Mean over worlds that have a tuned preset, without those apart: {np.mean(known):.0f} %." if known else ""
    made_by = {result.get("ppo.py", "the second edition") for world in WORLDS for result in results(world, "general")}
    head = HEAD.format(made_by=" or ".join(sorted(made_by)))
    return head + "\n".join([*lines, *(["", total] if total else [])]) + "\n"


HEAD = """# At the first try

What a world gets that no preset knows. Each stands here under a new name (`tests/worlds.py`), so that `ppo.py` takes a
general preset, chosen by its actions and observations; beside it a random policy, Stable-Baselines3's and CleanRL's
defaults (`--preset none`), and the preset that was tuned for this world, all after as many steps. Scores are means of
100 greedy episodes; the last column goes from 0 %, a random policy, to 100 %, the tuned preset. Those held back were
not looked at while the general presets were made; those apart need what no general setting gives: a long horizon, or
exploration. InvertedPendulum and MountainCar have the general presets as their own. No policy reaches FrozenLake's goal
within its 100 steps in more than 0.744 of games, by its transition probabilities: what is above is chance. Made by
`python tests/general.py`; the column of general presets is by
{made_by}.

| world | steps | random | SB3 | none | tuned | general | seeds 1 to 3 | of tuned |
|:--|--:|--:|--:|--:|--:|--:|:--|--:|
"""

if __name__ == "__main__":
    tyro.cli(main)
