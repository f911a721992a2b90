"""How fast is ppo.py, beside others and beside its own limits? Prints Markdown tables; needs an idle machine.

    python tests/benchmark.py --peer path/to/cleanrl/ppo.py                    # all rows: steps/s, floors, memory
    python tests/benchmark.py --rows cartpole pong --steps 20000 --repeats 1   # some of them, briefly
    python tests/benchmark.py --cold-start --peer path/to/cleanrl/ppo.py       # process start to written results
    python tests/benchmark.py --growth                                         # over environments, width and ranks

Every run is a process of its own, and programs take turns, so that a busy machine slows all of them; cells are medians
over --repeats; in brackets, how many times faster ppo.py is, eager. Commands stand below the table; all run with
OMP_NUM_THREADS=1, but for images. What is timed:
- ppo.py: global_step / training_seconds of its results.json, without start-up, evaluation and checkpoints.
- SB3: Stable-Baselines3 at the same hyperparameters, `learn` alone; it has no EnvPool.
- peer: a script with CleanRL's flags, from wall time: a run less one of a tenth of its steps, which takes out start-up.
  Its network is its own. "-" stands where it fails, as CleanRL's ppo.py does on continuous actions and on images.
- Floors, on the CPU: random actions through the very vector environment of ppo.py. And the minibatch steps
  alone, on frozen data. Distance: training time / (env floor + update floor), with the compiled update for --compile.
- memory: the peak of the largest process.
"""

import argparse
import json
import math
import os
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

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ppo  # noqa: E402

CLEANRL = "--num-envs 4 --num-steps 128 --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 --gamma 0.99 " \
          "--gae-lambda 0.95 --clip-vloss"  # fmt: skip
ROWS = {  # name: flags, steps of one run
    "cartpole-cleanrl": (f"--env-id CartPole-v1 {CLEANRL}", 50_000),
    "cartpole": ("--env-id CartPole-v1", 100_000),
    "lunarlander-sync": ("--env-id LunarLander-v3 --vectorization sync", 100_000),
    "lunarlander-envpool": ("--env-id LunarLander-v3 --vectorization envpool", 100_000),
    "halfcheetah-sync": ("--env-id HalfCheetah-v5 --vectorization sync", 50_000),
    "halfcheetah-envpool": ("--env-id HalfCheetah-v5 --vectorization envpool", 50_000),
    "pong": ("--env-id ALE/Pong-v5", 10_240),
}
LANDER = "--env-id LunarLander-v3 --total-timesteps 350000 --num-envs 32 --num-steps 128 --num-minibatches 8 " \
         "--update-epochs 4 --learning-rate 3e-3 --gamma 0.999 --ent-coef 0.005 --hidden-sizes 64 64"  # fmt: skip
COLD = {  # name: flags
    "cartpole": "--env-id CartPole-v1",
    "lunarlander-sync": f"{LANDER} --vectorization sync",
    "lunarlander-envpool": f"{LANDER} --vectorization envpool",
}
WIDE = "--env-id CartPole-v1 --num-envs 64 --num-steps 32 --device cpu"
SPLIT = "--env-id LunarLander-v3 --vectorization sync --num-envs 32 --num-steps 512 --num-minibatches 8 " \
        "--update-epochs 2"  # fmt: skip
GROWTH = (  # what grows, flags, ranks, steps of one run
    *((f"{n} environments", f"--env-id CartPole-v1 --num-envs {n} --num-steps 32", 1, 320 * n + 20_000)
      for n in (4, 16, 64, 256, 1024)),
    *((f"hidden width {n}", f"{WIDE} --hidden-sizes {n} {n}", 1, 20_480) for n in (64, 128, 256, 512, 1024)),
    *((f"{k} rank(s), CartPole's preset", "--env-id CartPole-v1", k, 40_960) for k in (1, 2)),
    *((f"{k} rank(s), LunarLander's preset", "--env-id LunarLander-v3", k, 81_920) for k in (1, 2)),
    *((f"{k} rank(s), LunarLander 32 x 512, 8 x 2", SPLIT, k, 163_840) for k in (1, 2)),
)  # fmt: skip
PEER_FLAGS = "env_id num_envs num_steps learning_rate gamma gae_lambda num_minibatches update_epochs clip_coef " \
             "ent_coef vf_coef max_grad_norm seed anneal_lr clip_vloss norm_adv"  # fmt: skip
BRIEF = "--validation-episodes 0 --eval-episodes 1"
commands = {}  # all that was run, in order


def measure(*command, images=False):
    """Run a command: its wall seconds, peak memory in MB, standard output and folder; None if it fails."""
    folder = Path(tempfile.mkdtemp())
    words = [str(word) for part in command for word in (shlex.split(part) if isinstance(part, str) else [part])]
    commands[shlex.join([Path(words[0]).name, *words[1:]])] = None
    env = {**os.environ} | ({} if images else {"OMP_NUM_THREADS": "1"})
    started = time.perf_counter()
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        child = subprocess.Popen(words, cwd=folder, env=env, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        print(f"failed: {shlex.join(words)}\n{(folder / 'err').read_text()[-500:]}", file=sys.stderr)
        return None
    return seconds, usage.ru_maxrss / 1024, (folder / "out").read_text(), folder


def run_ppo(flags, steps, ranks=1, extra=""):
    """Steps/s, seconds per row of the batches, and MB of one run of ppo.py."""
    start = ["-m torch.distributed.run --nproc-per-node", ranks] if ranks > 1 else []
    done = measure(sys.executable, *start, ROOT / "ppo.py", f"{flags} {extra} {BRIEF} --total-timesteps {steps}",
                   images="ALE" in flags)  # fmt: skip
    if done is None:
        return None
    results = json.loads(next(done[3].glob("runs/*/results.json")).read_text())
    args = ppo.parse_args(shlex.split(f"{flags} --total-timesteps {steps}"))
    rows = args.num_iterations * args.batch_size
    return results["global_step"] / results["training_seconds"], results["training_seconds"] / rows, done[1]


def run_worker(name, flags):
    """What a worker (see below) prints, and its MB."""
    done = measure(sys.executable, Path(__file__).resolve(), f"--worker {name} {flags}", images="ALE" in flags)
    return done and (*json.loads(done[2].splitlines()[-1]), done[1])


def run_peer(peer, flags, steps):
    """Steps/s and MB of a script with CleanRL's flags."""
    args, words = ppo.parse_args(shlex.split(flags)), []
    for name in PEER_FLAGS.split():
        value = getattr(args, name)
        words += [ppo.flag(f"no_{name}" if value is False else name)] + ([] if isinstance(value, bool) else [value])
    few = max(steps // 10 // args.batch_size, 1) * args.batch_size
    short = measure(sys.executable, peer, shlex.join(map(str, words)), f"--total-timesteps {few}")
    long = short and measure(sys.executable, peer, shlex.join(map(str, words)), f"--total-timesteps {few + steps}")
    return long and (steps // args.batch_size * args.batch_size / (long[0] - short[0]), long[1])


# Workers: what is measured in a process of its own, and printed as JSON


def floors(args):
    """Seconds per row of the environments alone, of the update alone, and of the compiled update."""
    envs, obs, _ = ppo.make_envs(args, ppo.seeds(args.seed, ppo.TRAINING, n=args.num_envs))
    config = ppo.agent_config(args, envs)
    ppo.choose_device(args, config)  # sets the number of threads
    choices = cycle([envs.action_space.sample() for _ in range(100)])
    M = args.batch_size // args.num_minibatches
    agent = ppo.Agent(**config)
    optimizer = ppo.FlatAdam(agent)
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
        """Median of at least five times, over about two seconds, after a first call that warms up."""
        work()
        times = []
        while len(times) < 5 or sum(times) < 2:
            started = time.perf_counter()
            for _ in range(20):
                work()
            times.append((time.perf_counter() - started) / 20)
        return statistics.median(times)

    ways = (ppo.compute_gradient, ppo.compile_gradient(agent, args))
    updates = [seconds(partial(step, way)) * args.update_epochs / M for way in ways]
    return seconds(lambda: envs.step(next(choices))) / args.num_envs, *updates


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
    flags, steps = ROWS[name][0], options.steps or ROWS[name][1]
    programs = {
        "eager": lambda: run_ppo(flags, steps),
        "compiled": lambda: run_ppo(flags, steps, extra="--compile"),
        "floors": lambda: run_worker("floors", flags),
    }
    if "envpool" not in flags:
        programs["sb3"] = lambda: run_worker("sb3", f"{flags} --total-timesteps {steps}")
        programs |= {"peer": lambda: run_peer(options.peer, flags, steps)} if options.peer else {}
    got = alternate(options.repeats, programs)
    ours, floor = got["eager"], got["floors"]

    def cell(run, text="{:,.0f}"):
        return text.format(run[0]) + (f" ({ours[0] / run[0]:.1f}x)" if run is not ours and ours else "") if run else "-"

    def distance(run, update):
        return f"{run[1] / (floor[0] + floor[update]):.2f}" if run and floor else "-"

    limits = [f"{1 / x:,.0f}" for x in floor[:3]] if floor else ["-"] * 3
    memory = [f"{run[-1]:.0f}" if run else "-" for run in map(got.get, ("eager", "compiled", "sb3", "peer"))]
    return [name, *(cell(got.get(p)) for p in ("eager", "compiled", "sb3", "peer")), limits[0], " / ".join(limits[1:]),
            f"{distance(got['eager'], 1)} / {distance(got['compiled'], 2)}", " / ".join(memory)]  # fmt: skip


def cold_rows(name, options):
    """[row, program, seconds, score] for each program, from the start of its process until its results are written.

    Medians over the repeats, each of ppo.py's with another seed, from 1; in brackets the longest and the worst."""
    seeds = count(1)

    def ours():
        done = measure(sys.executable, ROOT / "ppo.py", COLD[name], f"--seed {next(seeds)}")
        return done and (done[0], json.loads(next(done[3].glob("runs/*/results.json")).read_text())["mean_reward"])

    def theirs():
        done = measure(sys.executable, Path(__file__).resolve(), "--worker zoo")
        return done and (done[0], json.loads(done[2].splitlines()[-1])[0])

    def peer():
        done = measure(sys.executable, options.peer, "--env-id CartPole-v1")
        returns = done and [float(x) for x in re.findall(r"episodic_return=\[?([-\d.]+)", done[2])[-100:]]
        return done and (done[0], sum(returns) / len(returns) if returns else math.nan)

    programs = {"ppo.py": ours}
    if name == "cartpole":
        programs |= {"SB3, zoo's preset": theirs} | ({"peer, sampled returns": peer} if options.peer else {})
    rows = []
    for program, runs in alternate(options.repeats, programs, sorted).items():
        cells = [f"{statistics.median(x):.1f} ({x[worst]:.1f})" for x, worst in zip(runs or (), (-1, 0))]
        rows.append([name, program, *(cells or "--")])
    return rows


def growth_rows(options):
    programs = {name: partial(run_ppo, flags, options.steps or steps, ranks) for name, flags, ranks, steps in GROWTH}
    got = alternate(options.repeats, programs)
    return [[name, *(f"{run[i]:,.0f}" for i in (0, 2))] if run else [name, "-", "-"] for name, run in got.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="default: all that the table has")
    parser.add_argument("--steps", type=int, help="environment steps of each run; default: the row's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="a script with CleanRL's flags")
    parser.add_argument("--cold-start", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--worker", choices=["floors", "sb3", "zoo"], help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.worker:
        print(json.dumps([float(x) for x in globals()[options.worker](replace(ppo.parse_args(flags), device="cpu"))]))
        return
    if flags:
        parser.error(f"unknown: {' '.join(flags)}")
    options.peer = options.peer and options.peer.resolve()
    if options.growth:
        table(["ppo.py", "steps/s", "MB"], growth_rows(options))
    elif options.cold_start:
        table(["row", "program", "seconds from cold start to results", "score"],
              (row for name in COLD if name in (options.rows or COLD) for row in cold_rows(name, options)))  # fmt: skip
    else:
        table(["row", "ppo.py, steps/s", "--compile", "SB3", "peer", "env floor", "update floor, eager / compiled",
               "distance, eager / compiled", "MB: ppo.py / --compile / SB3 / peer"],
              (speed_row(name, options) for name in options.rows or ROWS))  # fmt: skip
    print("\nRun by:\n\n```bash\n" + "\n".join(commands) + "\n```")


if __name__ == "__main__":
    main()
