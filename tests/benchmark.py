"""How fast is ppo.py, beside others and beside its own limits? Prints Markdown tables; needs an idle machine.

    python tests/benchmark.py                                     # all tables, about 20 minutes on 2 cores
    python tests/benchmark.py --short                             # two minutes
    python tests/benchmark.py --tables speed --rows cartpole      # some of them
    python tests/benchmark.py --peers path/to/folder              # beside CleanRL, LeanRL and purejaxrl, cloned there

Every run is a process of its own, and those to be compared take turns, so that a busy machine slows all of them; cells
are medians over the repeats; in brackets, how many times faster ppo.py is, eager. Commands stand below the tables; all
run with OMP_NUM_THREADS=1, but for images and for one process that grows. What is timed:
- ppo.py: global_step / training_seconds of its results.json: without start-up and evaluation. With --compile from a
  fifth of the run on, for compiling comes first; how many seconds that cost has a column.
- EnvPool: by pool.py, as it stands in recipes.md.
- SB3: Stable-Baselines3 at the same hyperparameters, `learn` alone; it has no EnvPool.
- CleanRL, LeanRL, purejaxrl: at the same hyperparameters, each in an environment of its own that is made
  beside it, with the versions below; the steps/s that the first two print last, and without compilation for the third.
- Floors, on the CPU: random actions through the very vector environment of ppo.py. And the minibatch steps
  alone, on frozen data. Distance: training time / (env floor + update floor), with the compiled update for --compile.
- Validation: its part of training time if all its episodes were as long as they can be.
- MB: the peak of the largest process.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reference import scalars  # noqa: E402

import ppo  # noqa: E402

LANDER_POOL = "--env-id pool:Pool/LunarLander-v3 --preset 'LunarLander*-v3'"
CLEANRL = "--num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 --gamma 0.99 " \
          "--gae-lambda 0.95 --clip-vloss"  # fmt: skip
CONTINUOUS = "--preset none --num-envs 1 --num-steps 2048 --num-minibatches 32 --update-epochs 10 " \
             "--learning-rate 3e-4 --ent-coef 0 --norm-obs --norm-reward --clip-vloss"  # fmt: skip
CLASSIC, JOINTS = "cleanrl/ppo.py", "cleanrl/ppo_continuous_action.py"
LEANRL = "LeanRL/ppo_continuous_action_torchcompile.py"  # without its --compile: that unrolls 2,048 steps, for minutes
ROWS = {  # name: flags, steps of one run, repeats, who runs beside it
    "cartpole-cleanrl": (f"--env-id CartPole-v1 {CLEANRL}", 50_000, 5, ["sb3", CLASSIC, "purejaxrl"]),
    "cartpole": ("--env-id CartPole-v1", 100_000, 5, ["sb3", CLASSIC]),
    "lunarlander": ("--env-id LunarLander-v3", 60_000, 3, ["sb3", CLASSIC]),
    "lunarlander-envpool": (LANDER_POOL, 60_000, 3, []),
    "hopper": ("--env-id Hopper-v5", 40_000, 3, ["sb3", JOINTS]),
    "halfcheetah-cleanrl": (f"--env-id HalfCheetah-v5 {CONTINUOUS}", 43_008, 3, ["sb3", JOINTS, LEANRL]),
    "halfcheetah-envpool": ("--env-id pool:Pool/HalfCheetah-v5 --preset HalfCheetah-v5", 40_000, 3, []),
    "pong": ("--env-id ALE/Pong-v5", 10_240, 1, ["sb3"]),
}  # fmt: skip
SHORT = ["cartpole-cleanrl", "lunarlander"]
LANDER = "--env-id LunarLander-v3 --total-timesteps 240000 --num-envs 32 --num-steps 128 --num-minibatches 8 " \
         "--update-epochs 4 --learning-rate 3e-3 --gamma 0.999 --ent-coef 0.005 --hidden-sizes 64 64"  # fmt: skip
WIDE = "--env-id CartPole-v1 --num-envs 64 --num-steps 32 --device cpu"
SPLIT = "--env-id LunarLander-v3 --vectorization sync --num-envs 32 --num-steps 512 --num-minibatches 8 " \
        "--update-epochs 2"  # fmt: skip
GROWTH = (  # what grows, flags, ranks, steps of one run
    *((f"CartPole-v1, {n} environments", f"--env-id CartPole-v1 --num-envs {n} --num-steps 32", 1, 160 * n + 20_000)
      for n in (1, 8, 64, 512, 4096)),
    *((f"LunarLander-v3, EnvPool, {n} environments", f"{LANDER_POOL} --num-envs {n} --num-steps 32", 1, 96 * n + 10_000)
      for n in (1, 8, 64, 512, 4096)),
    *((f"CartPole-v1, 64 environments, hidden width {n}", f"{WIDE} --hidden-sizes {n} {n}", 1, 20_480)
      for n in (64, 256, 1024)),
    *((f"{k} rank(s), LunarLander's preset", "--env-id LunarLander-v3", k, 40_960) for k in (1, 2)),
    *((f"{k} rank(s), LunarLander 32 x 512, 8 x 2", SPLIT, k, 163_840) for k in (1, 2)),
)  # fmt: skip
PEERS = {  # a clone in the folder --peers, and what it needs
    "cleanrl": "torch==2.13.0 gymnasium[mujoco]==0.29.1 mujoco==2.3.7 numpy==1.26.4 Box2D==2.3.10 "
               "tensorboard==2.21.0 tyro==1.0.17 pygame==2.6.1",
    "LeanRL": "torch==2.13.0 gymnasium[mujoco]==0.29.1 mujoco==2.3.7 numpy==1.26.4 tensordict==0.15.3 wandb==0.31.0 "
              "tqdm==4.70.1 tyro==1.0.17",
    "purejaxrl": "jax==0.10.2 flax==0.12.8 optax==0.2.8 distrax==0.1.9 gymnax==0.0.9 brax==0.14.2 navix==0.7.4",
}  # fmt: skip
OLDER = {"LunarLander-v3": "LunarLander-v2", "HalfCheetah-v5": "HalfCheetah-v4", "Hopper-v5": "Hopper-v4"}
PEER_FLAGS = "env_id num_envs num_steps learning_rate gamma gae_lambda num_minibatches update_epochs clip_coef " \
             "ent_coef vf_coef max_grad_norm seed anneal_lr clip_vloss norm_adv"  # fmt: skip
PUREJAXRL = """import json, sys, time, jax, ppo
train = jax.jit(ppo.make_train(json.loads(sys.argv[1]))).lower(jax.random.PRNGKey(1)).compile()
started = time.perf_counter()
jax.block_until_ready(train(jax.random.PRNGKey(1)))
print(time.perf_counter() - started)"""
BRIEF = "--validation-episodes 0 --eval-episodes 1"
commands = {}  # all that was run, in order


def measure(*command, threads=1, environment=()):
    """Run a command: its wall seconds, peak memory in MB, standard output and folder; None if it fails."""
    folder = Path(tempfile.mkdtemp())
    words = [str(word) for part in command for word in (shlex.split(part) if isinstance(part, str) else [part])]
    if any(word.startswith("pool:") for word in words):
        recipes = (ROOT / "runs/reference/recipes.md").read_text()
        (folder / "pool.py").write_text(re.search(r"^```py\n(# pool\.py\n.*?)^```$", recipes, re.M | re.S)[1])
    commands[shlex.join([Path(words[0]).name, *words[1:]])] = None
    env = (
        {**os.environ, "WANDB_MODE": "offline"}
        | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        | dict(environment)
    )
    started = time.perf_counter()
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        child = subprocess.Popen(words, cwd=folder, env=env, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    print(f"{seconds:6.1f} s  {shlex.join(words)[-150:]}", file=sys.stderr, flush=True)
    if status:
        print(f"failed: {shlex.join(words)}\n{(folder / 'err').read_text()[-500:]}", file=sys.stderr)
        return None
    return seconds, usage.ru_maxrss / 1024, (folder / "out").read_text(), folder


def run_ppo(flags, steps, ranks=1, extra="", free=False):
    """Steps/s, seconds per row of the batches, seconds of compiling, and MB of one run of ppo.py."""
    start = ["-m torch.distributed.run --nproc-per-node", ranks] if ranks > 1 else []
    done = measure(sys.executable, *start, ROOT / "ppo.py", f"{flags} {extra} {BRIEF} --total-timesteps {steps}",
                   threads=None if free or "ALE" in flags else 1)  # fmt: skip
    if done is None:
        return None
    run = next(done[3].glob("runs/*/results.json")).parent
    results = json.loads((run / "results.json").read_text())
    args = ppo.parse_args(shlex.split(f"{flags} --total-timesteps {steps}"))
    steps, seconds, first = results["global_step"], results["training_seconds"], 0.0
    if "--compile" in extra:
        points = [(0, 0.0)] + [(step, step / speed) for step, speed in scalars(run)["charts/SPS"]]
        (a, early), (b, late) = points[len(points) // 5], points[-1]  # steps so far, and their seconds
        speed = (b - a) / (late - early)
        first, seconds = seconds - steps / speed, steps / speed
    return steps / seconds, seconds / (args.num_iterations * args.batch_size), first, done[1]


def run_worker(name, flags):
    """What a worker (see below) prints, and its MB."""
    done = measure(
        sys.executable, Path(__file__).resolve(), f"--worker {name} {flags}", threads=None if "ALE" in flags else 1
    )
    return done and (*json.loads(done[2].splitlines()[-1]), done[1])


def python_of(peers, name):
    """The interpreter of a peer's own environment, made at its first use; None where it is not there."""
    if not peers or not (peers / name).is_dir():
        return None
    python = peers / name / ".venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[name].split()], check=True)
    return python


def run_peer(peers, name, script, flags, steps):
    """Steps/s and MB of a script with CleanRL's flags, whose pace it prints."""
    python = python_of(peers, name)
    if python is None:
        return None
    args, words = ppo.parse_args(shlex.split(flags)), []
    args = replace(args, env_id=OLDER.get(args.env_id, args.env_id))
    for field in PEER_FLAGS.split():
        value = getattr(args, field)
        words += [ppo.flag(f"no_{field}" if value is False else field)] + ([] if isinstance(value, bool) else [value])
    text = (peers / name / name.lower() / script).read_text()
    copy = Path(tempfile.mkdtemp()) / script
    if name == "LeanRL":  # which relied on weights without gradients, as older libraries gave them
        text = re.sub(r"^def (rollout|gae)\(", r"@torch.no_grad()\n\g<0>", text, flags=re.M)
    copy.write_text(text)
    done = measure(python, copy, shlex.join(map(str, words)), f"--total-timesteps {steps}")
    told = done and re.findall(r"(?:SPS|speed): *([\d.]+)", done[2] + (done[3] / "err").read_text())
    return (float(told[-1]), done[1]) if told else None


def run_purejaxrl(peers, flags, steps):
    """Steps/s after compilation, seconds from its start to its end, and MB."""
    python = python_of(peers, "purejaxrl")
    if python is None:
        return None
    a = ppo.parse_args(shlex.split(flags))
    config = {"ENV_NAME": a.env_id, "TOTAL_TIMESTEPS": steps, "NUM_ENVS": a.num_envs, "NUM_STEPS": a.num_steps,
              "LR": a.learning_rate, "UPDATE_EPOCHS": a.update_epochs, "NUM_MINIBATCHES": a.num_minibatches,
              "GAMMA": a.gamma, "GAE_LAMBDA": a.gae_lambda, "CLIP_EPS": a.clip_coef, "ENT_COEF": a.ent_coef,
              "VF_COEF": a.vf_coef, "MAX_GRAD_NORM": a.max_grad_norm, "ACTIVATION": a.activation,
              "ANNEAL_LR": a.anneal_lr}  # fmt: skip
    path = {"PYTHONPATH": str(peers / "purejaxrl" / "purejaxrl")}
    done = measure(python, shlex.join(["-c", PUREJAXRL, json.dumps(config)]), environment=path)
    return done and (steps / float(done[2].splitlines()[-1]), done[0], done[1])


# Workers: what is measured in a process of its own, and printed as JSON


def floors(args):
    """Seconds per row of the environments alone, of the update alone, and compiled; and of one leg's validation."""
    worlds = ppo.Worlds(args, ppo.seeds(args.seed, ppo.TRAINING, n=args.num_envs))
    ppo.choose_device(args, worlds.parts)  # sets the number of threads
    envs, obs = worlds.envs, worlds.obs
    space = envs.single_action_space  # EnvPool's action_space is that of one environment, too
    choices = cycle([np.array([space.sample() for _ in obs], space.dtype) for _ in range(100)])
    M = args.batch_size // args.num_minibatches
    agent = ppo.Agent(**ppo.look(args))
    optimizer = ppo.Adam(agent)
    rows = torch.as_tensor(obs)[torch.arange(M) % len(obs)]
    with torch.no_grad():
        actions = agent.act(rows, agent.sample_noise(M))
        logprobs, _, values = agent.replay(SimpleNamespace(obs=rows, actions=actions))
    advantages = torch.randn_like(values)
    minibatch = ppo.Batch(rows, actions, logprobs, values, advantages, returns=values + torch.randn_like(values))

    def step(gradient_fn):
        gradient, _ = gradient_fn(agent, minibatch, args)
        optimizer.step(ppo.clip_norm(gradient, args.max_grad_norm)[0], args.learning_rate)

    def seconds(work):
        """Median of the means of at least five rounds of 20 calls, in about two seconds; after one that warms up."""
        work()
        rounds = []
        while len(rounds) < 5 or sum(rounds) < 2:
            started = time.perf_counter()
            for _ in range(20):
                work()
            rounds.append(time.perf_counter() - started)
        return statistics.median(rounds) / 20

    ways = (ppo.compute_gradient, ppo.compile_gradient(agent))
    updates = [seconds(partial(step, way)) * args.update_epochs / M for way in ways]
    env = seconds(lambda: envs.step(next(choices))) / args.num_envs

    limit = min(ppo.declared(args, "max_episode_steps") or 5000, 5000)
    playing = ppo.play(agent, args, args.validation_episodes, ppo.VALIDATION, limit)
    worlds = next(playing)  # those played first
    times = math.ceil(args.validation_episodes / len(worlds.done))
    with torch.inference_mode():
        play = seconds(lambda: worlds.step(agent.act(torch.as_tensor(worlds.obs), memory=worlds.memory)))
    rows = len(next(ppo.legs(SimpleNamespace(args=args, iteration=0, barren=0)))) * args.batch_size
    return env, *updates, play * limit * times / rows


def sb3(args):
    """Steps/s of Stable-Baselines3 at the hyperparameters of ppo.py."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    images = args.env_id.startswith("ALE/")
    torch.set_num_threads(os.cpu_count() if images else 1)
    if images:
        import ale_py

        ppo.gym.register_envs(ale_py)
        envs = VecFrameStack(make_atari_env(args.env_id, args.num_envs, env_kwargs=args.env_kwargs), 4)
    else:
        envs = make_vec_env(args.env_id, args.num_envs)
    if args.norm_obs or args.norm_reward:
        envs = VecNormalize(envs, norm_obs=args.norm_obs, norm_reward=args.norm_reward, gamma=args.gamma)
    sizes = list(args.hidden_sizes)
    activation = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[args.activation]
    net = {"net_arch": {"pi": sizes, "vf": sizes}, "activation_fn": activation, "log_std_init": args.logstd_init}
    model = PPO(
        "CnnPolicy" if images else "MlpPolicy", envs, n_steps=args.num_steps, n_epochs=args.update_epochs,
        batch_size=args.batch_size // args.num_minibatches, gamma=args.gamma, gae_lambda=args.gae_lambda,
        learning_rate=lambda left: args.learning_rate * (left if args.anneal_lr else 1), clip_range=args.clip_coef,
        clip_range_vf=args.clip_coef if args.clip_vloss else None, ent_coef=args.ent_coef, vf_coef=args.vf_coef,
        max_grad_norm=args.max_grad_norm, normalize_advantage=args.norm_adv, policy_kwargs=net, device="cpu",
    )  # fmt: skip
    started = time.perf_counter()
    model.learn(args.num_iterations * args.batch_size)
    return (model.num_timesteps / (time.perf_counter() - started),)


def zoo(args):
    """Train on CartPole with the zoo's preset, save, and play 100 greedy episodes: their mean and deviation."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    model = PPO(
        "MlpPolicy", make_vec_env(args.env_id, 8), n_steps=32, batch_size=256, n_epochs=20, gamma=0.98, gae_lambda=0.8,
        learning_rate=lambda left: 1e-3 * left, clip_range=lambda left: 0.2 * left, ent_coef=0.0, device="cpu",
    ).learn(100_000)  # fmt: skip
    model.save("agent")
    return evaluate_policy(model, make_vec_env(args.env_id, 8), 100)


# The tables


def table(head, rows):
    print("\n|" + "|".join(head) + "|\n|" + "---|" * len(head))
    for row in rows:
        print("|" + "|".join(row) + "|", flush=True)


def alternate(repeats, programs, summary=statistics.median):
    """Let the programs take turns: {name: a summary of each number that it returns}, None for one that fails."""
    found = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            if None not in found[name]:
                found[name].append(program())
    return {name: None if None in runs else list(map(summary, zip(*runs))) for name, runs in found.items()}


def speed_row(name, options):
    flags, steps, repeats, beside = ROWS[name]
    steps = options.steps or steps
    programs = {
        "eager": lambda: run_ppo(flags, steps),
        "compiled": lambda: run_ppo(flags, steps, extra="--compile"),
    }
    for who in beside:
        if who == "sb3":
            programs[who] = lambda: run_worker("sb3", f"{flags} --total-timesteps {steps}")
        elif who == "purejaxrl" and options.peers:
            programs[who] = lambda: run_purejaxrl(options.peers, flags, steps * 10)
        elif options.peers:
            peer, script = who.split("/")
            programs[peer] = partial(run_peer, options.peers, peer, script, flags, steps)
    got, floor = alternate(options.repeats or repeats, programs), run_worker("floors", flags)
    ours = got["eager"]

    def cell(run, text="{:,.0f}"):
        return text.format(run[0]) + (f" ({ours[0] / run[0]:.2f}x)" if run is not ours and ours else "") if run else "-"

    def distance(run, update):
        return f"{run[1] / (floor[0] + floor[update]):.2f}" if run and floor else "-"

    limits = [f"{1 / x:,.0f}" for x in floor[:3]] if floor else ["-"] * 3
    first = f"{round(got['compiled'][2])} s" if got["compiled"] else "-"
    everyone = [got.get(who) for who in ("eager", "compiled", "sb3", "cleanrl", "LeanRL", "purejaxrl")]
    share = f"{floor[3] / ours[1]:.0%}" if floor and ours else "-"
    return [name, *map(cell, everyone), first, limits[0], " / ".join(limits[1:]),
            f"{distance(got['eager'], 1)} / {distance(got['compiled'], 2)}", share,
            " / ".join(f"{run[-1]:.0f}" for run in everyone if run)]  # fmt: skip


def cold_rows(options):
    """Seconds from the start of a process until its results are written, and the score, of each program.

    Those of ppo.py are medians over seeds 1 to n; in brackets the longest and the worst."""

    def ours(flags):
        seeds = count(1)

        def run():
            done = measure(sys.executable, ROOT / "ppo.py", flags, f"--seed {next(seeds)}")
            return done and (done[0], json.loads(next(done[3].glob("runs/*/results.json")).read_text())["mean_reward"])

        return run

    def zoo():
        done = measure(sys.executable, Path(__file__).resolve(), "--worker zoo")
        return done and (done[0], json.loads(done[2].splitlines()[-1])[0])

    def cleanrl():
        python = python_of(options.peers, "cleanrl")
        done = python and measure(python, options.peers / "cleanrl" / CLASSIC)
        returns = done and [float(x) for x in re.findall(r"episodic_return=\[?([-\d.]+)", done[2])[-100:]]
        return done and (done[0], *([statistics.mean(returns)] if returns else []))

    def purejaxrl():
        done = run_purejaxrl(options.peers, ROWS["cartpole-cleanrl"][0], 500_000)
        return done and (done[1],)

    few = options.repeats or (1 if options.short else 5)
    programs = [("ppo.py, CartPole-v1", few, ours("--env-id CartPole-v1"))]
    if not options.short:
        programs += [
            ("ppo.py, LunarLander-v3, settings chosen for speed", few, ours(f"{LANDER} --vectorization sync")),
            ("Stable-Baselines3, CartPole-v1, the zoo's preset, 100k steps", 1, zoo),
        ]
    if options.peers and not options.short:
        programs += [("CleanRL, CartPole-v1, its 500k steps, sampled returns", 1, cleanrl),
                     ("purejaxrl, CartPole-v1, its 500k steps, not evaluated", 1, purejaxrl)]  # fmt: skip
    for name, repeats, program in programs:
        runs = alternate(repeats, {name: program}, sorted)[name]
        cells = [f"{statistics.median(x):.1f} ({x[worst]:.1f})" for x, worst in zip(runs or (), (-1, 0))]
        yield [name, *cells, *["-"] * (2 - len(cells))]


def growth_rows(options):
    chosen = GROWTH[1:4:2] if options.short else GROWTH
    programs = {
        name: partial(run_ppo, flags, options.steps or steps, ranks, free=ranks == 1)
        for name, flags, ranks, steps in chosen
    }
    got = alternate(options.repeats or 1, programs)
    return [[name, *(f"{run[i]:,.0f}" for i in (0, -1))] if run else [name, "-", "-"] for name, run in got.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=["cold", "speed", "growth"], default=["cold", "speed", "growth"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="of the table of speeds; default: all")
    parser.add_argument("--steps", type=int, help="environment steps of each run; default: the row's own")
    parser.add_argument("--repeats", type=int, help="default: the row's own")
    parser.add_argument("--short", action="store_true", help="two minutes: few rows, each once")
    parser.add_argument("--peers", type=Path, help=f"a folder with clones: {', '.join(PEERS)}")
    parser.add_argument("--worker", choices=["floors", "sb3", "zoo"], help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.worker:
        sys.path.append(os.getcwd())  # for pool.py
        print(json.dumps([float(x) for x in globals()[options.worker](replace(ppo.parse_args(flags), device="cpu"))]))
        return
    if flags:
        parser.error(f"unknown: {' '.join(flags)}")
    options.peers = options.peers and options.peers.resolve()
    if options.short:
        options.rows, options.repeats = options.rows or SHORT, options.repeats or 1
        options.steps = options.steps or 20_480
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if "cold" in options.tables:
        table(["from a cold start", "seconds (the longest)", "score (the worst)"], cold_rows(options))
    if "speed" in options.tables:
        table(["steps/s", "ppo.py", "--compile", "SB3", "CleanRL", "LeanRL", "purejaxrl", "compiling", "env floor",
               "update floor, eager / compiled", "distance, eager / compiled", "validation", "MB"],
              (speed_row(name, options) for name in options.rows or ROWS))  # fmt: skip
    if "growth" in options.tables:
        table(["as it grows", "steps/s", "MB"], growth_rows(options))
    print("\nRun by:\n\n```bash\n" + "\n".join(commands) + "\n```")


if __name__ == "__main__":
    main()
