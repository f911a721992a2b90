"""The evidence: train every row of the results table through ppo.py's own command line, and sum up what came out.

    python tests/reference.py                                       # all rows but Atari's, which take hours
    python tests/reference.py --envs CartPole-v1 LunarLander-v3     # these rows only
    python tests/reference.py --summary-only                        # train nothing, redo tables and figures
    python tests/reference.py --curves                              # only curves.png, from what is committed
    python tests/reference.py --moving runs/<run> runs/<another>    # only moving.gif: their films side by side
    python tests/reference.py --clip                                # only clip.png: the clipped objective
    python tests/reference.py --learned runs/<run>                  # only learned.png: its frames, and its curve beside

Run it in a clone of the commit that the rows are to name. It begins by saying what is left, and how long that will
take. Interrupt it at any time; the same command goes on where it was. A run works in runs/work-<env>-seed<k>, with its
console in the .log beside. Once it is finished, runs/reference/<env>/ keeps of it what the results are made from; if
another page made the row that stands there, runs/reference/next/<env>/ does, until all seeds are there to replace it:

    seed<k>.json            its results.json: the greedy episodes, 100 or 30, of the agent it would publish
    curve.csv, curve.png    mean return of the training episodes that ended in each hundredth of the run, by seed
    hyperparameters.json    what all of these seeds were trained with; without rescale_actions, by the second edition;
                            "fingerprint": how far weights move in two iterations

From these files alone follow summary.json and curves.png in runs/reference/, and what stands between the two marks
<!-- results --> and <!-- /results --> in README.md and in runs/reference/results.md.
"""

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo
from ppo import PRESETS, parse_args, write_file

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "runs" / "reference"
BLOCK = re.compile("(?<=<!-- results -->\n).*(?=<!-- /results -->)", re.DOTALL)  # in README.md and results.md


class Row(NamedTuple):
    env_id: str
    steps: int
    seeds: int
    tried: int  # settings compared on other seeds before
    published: str  # the best PPO result found, at as many steps unless it says otherwise
    source: str
    flags: str = ""  # besides --env-id, --total-timesteps and --seed
    label: str = ""  # what they do, in a word or two

    @property
    def name(self) -> str:
        """The id; with the steps, where they are not its preset's, and with the label."""
        usual = preset_steps(self.env_id) in (None, self.steps)
        words = [self.env_id.replace("worlds:", ""), "" if usual else f"{self.steps / 1e6:g}M", self.label]
        return re.sub(r"[/ ]", "-", "-".join(filter(None, words)))

    def __str__(self) -> str:
        return self.name

    @property
    def command(self) -> list[str]:
        """The flags that say what is trained; tests/ is on the path, for tests/worlds.py."""
        return ["--env-id", self.env_id, "--total-timesteps", str(self.steps), *shlex.split(self.flags)]


def preset_steps(env_id: str) -> int | None:
    """Those of the environment's own preset, if it has one."""
    return next((PRESETS[name]["total_timesteps"] for name in PRESETS if fnmatchcase(env_id, name)), None)


CART = ("--preset none --num-envs 16 --num-steps 64 --num-minibatches 8 --update-epochs 6 "
        "--learning-rate 2e-3 --desired-kl 0.01 --norm-reward --no-clip-vloss --validation-episodes 30")  # fmt: skip
SAME = "--preset none --num-envs 16 --learning-rate 1e-3 --no-anneal-lr --no-clip-vloss"  # MaskablePPO's, too
GAMES = f"{SAME} --validation-episodes 100"  # which are won or lost
SMALL = "--preset 'general, small images'"  # as without a preset, but parsed without MiniGrid, too
PENDULUM = ("--preset Pendulum-v1 --num-envs 16 --num-steps 128 --num-minibatches 8 --gae-lambda 0.95 "
            "--validation-episodes 30")  # fmt: skip
ROWS = [
    Row("CartPole-v1", 100_000, 10, 2, "500 +/- 0", "zoo"),
    Row("LunarLander-v3", 1_000_000, 10, 7, "242.1 +/- 31.8 (v2)", "zoo"),
    Row("LunarLander-v3", 2_000_000, 10, 8, "289.2 +/- 15.8 (v2)", "Hub"),
    Row("HalfCheetah-v5", 1_000_000, 10, 27, "5819.1 +/- 663.5 (v3)", "zoo"),
    Row("Hopper-v5", 1_000_000, 10, 6, "2609.3 +/- 700.8 (v3); at about 4M 3485", "Tianshou; rl_games"),
    Row("Acrobot-v1", 500_000, 5, 6, "-81.8 +/- 5.6; at 1M -73.5 +/- 18.2", "baselines; zoo"),
    Row("MountainCar-v0", 500_000, 5, 6, "-200 +/- 0; at 1M -110.4 +/- 19.5", "CleanRL; zoo"),
    Row("Pendulum-v1", 100_000, 5, 28, "-172.2 +/- 104.2", "zoo"),
    Row("LunarLanderContinuous-v3", 1_000_000, 5, 2, "270.9 +/- 32.1 (v2)", "zoo"),
    Row("BipedalWalker-v3", 5_000_000, 5, 4, "287.9 +/- 2.4", "zoo"),
    Row("Walker2d-v5", 1_000_000, 5, 10, "3588.5 +/- 756.6 (v3); about 4000; at about 9M 5186",
        "Tianshou; ikostrikov; rl_games"),
    Row("Ant-v5", 1_000_000, 5, 6, "3258.4 +/- 1079.3 (v3); at about 9M 4429", "Tianshou; rl_games"),
    Row("Swimmer-v5", 1_000_000, 5, 7, "281.6 +/- 9.7 (v3)", "zoo"),
    Row("Humanoid-v5", 1_000_000, 5, 14, "787.1 +/- 193.5 (v3)", "Tianshou"),
    Row("InvertedPendulum-v5", 1_000_000, 5, 1, "1000 +/- 0 (v2)", "Tianshou"),
    Row("InvertedDoublePendulum-v5", 1_000_000, 5, 21, "9231.3 +/- 270.4 (v2)", "Tianshou"),
    Row("Reacher-v5", 1_000_000, 5, 16, "-4.1 +/- 0.3 (v2)", "Tianshou"),
    Row("Pusher-v5", 1_000_000, 5, 7, "-40.4 +/- 7.2 (v4)", "CleanRL"),
    Row("ALE/Pong-v5", 1_000_000, 3, 10, "at 1.5M 20.0; at 10M 20.4 (v4)", "rl_games; CleanRL"),
    Row("ALE/Breakout-v5", 10_000_000, 1, 3, "414.7 +/- 28.1 (v4)", "CleanRL"),
    Row("CarRacing-v3", 300_000, 2, 4, "at 4M 596.7 +/- 160.0 (v0)", "Hub"),
    Row("MinAtar/Asterix-v1", 10_000_000, 3, 10, "15", "gymnax"),
    Row("MinAtar/Breakout-v1", 10_000_000, 3, 10, "28", "gymnax"),
    Row("MinAtar/Freeway-v1", 10_000_000, 3, 10, "58", "gymnax"),
    Row("MinAtar/SpaceInvaders-v1", 10_000_000, 3, 10, "131", "gymnax"),
    Row("worlds:CartPoleNoVel-v1", 100_000, 5, 5, "500 (RecurrentPPO)", "zoo", f"{CART} --lstm-hidden-size 64",
        "memory"),
    Row("worlds:CartPoleNoVel-v1", 100_000, 5, 5, "", "", CART, "no memory"),
    Row("worlds:PendulumNoVel-v1", 100_000, 5, 22, "-218 (RecurrentPPO)", "zoo",
        f"{PENDULUM} --lstm-hidden-size 64", "memory"),
    Row("worlds:PendulumNoVel-v1", 100_000, 5, 22, "", "", PENDULUM, "no memory"),
    Row("worlds:MemoryS7-v0", 300_000, 3, 6, "", "", f"{SMALL} --lstm-hidden-size 64", "memory"),
    Row("worlds:MemoryS7-v0", 300_000, 3, 6, "", "", SMALL, "no memory"),
    Row("Taxi-v4", 300_000, 5, 2, "", "", "", "masks"),
    Row("Taxi-v4", 300_000, 5, 2, "", "", "--no-action-masks", "no masks"),
    Row("worlds:Forbidden-v0", 100_000, 3, 1, "", "", SAME, "masks"),
    Row("worlds:Forbidden-v0", 100_000, 3, 1, "", "", f"{SAME} --no-action-masks", "no masks"),
    Row("worlds:ConnectFour-v0", 300_000, 3, 2, "", "", GAMES, "masks"),
    Row("worlds:ConnectFour-v0", 300_000, 3, 2, "", "", f"{GAMES} --no-action-masks", "no masks"),
]  # fmt: skip


def main(envs: tuple[str, ...] = (), seeds: int | None = None, jobs: int = 2, first_seed: int = 1,
         summary_only: bool = False, curves: bool = False,
         learned: Path | None = None, moving: tuple[Path, ...] = (), clip: bool = False) -> int:  # fmt: skip
    """Run what is missing of the results, then write tables and figures.

    Args:
        envs: rows to run; default all but Atari's
        seeds: seeds of each, instead of the row's own number
        jobs: runs at a time
        first_seed: the first of the seeds
        summary_only: run nothing
        curves: draw curves.png and do nothing else
        learned: the folder of a run that has a film: make learned.png of it and do nothing else
        moving: films, or folders of runs that have one: make moving.gif of them and do nothing else
        clip: draw clip.png and do nothing else"""
    if curves:
        summary = json.loads((REFERENCE / "summary.json").read_text())
        write_file(REFERENCE / "curves.png", png(small_multiples(summary), 150))
    if learned:
        write_file(REFERENCE / "learned.png", picture(learned))
    if moving:
        write_file(REFERENCE / "moving.gif", gif([path / "replay.mp4" if path.is_dir() else path for path in moving]))
    if clip:
        write_file(REFERENCE / "clip.png", png(clipped_objective(), 130))
    if curves or learned or moving or clip:
        return 0
    if unknown := set(envs) - {row.env_id for row in ROWS}:
        sys.exit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(row.env_id for row in ROWS)}")
    rows = [row for row in ROWS if (row.env_id in envs if envs else not row.env_id.startswith("ALE/"))]
    queue = [(row, seed) for row in rows for seed in range(first_seed, first_seed + (seeds or row.seeds))]
    code = 0 if summary_only else run_rows(queue, jobs)
    for row in ROWS:
        if (reference_folder(row) / "curve.csv").exists():
            draw(row.env_id, reference_folder(row))
    summary = [summarize(row, reference_folder(row)) for row in ROWS]
    REFERENCE.mkdir(parents=True, exist_ok=True)
    write_file(REFERENCE / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_file(REFERENCE / "curves.png", png(small_multiples(summary), 150))
    for path, table in ((ROOT / "README.md", short_table(summary)), (REFERENCE / "results.md", long_table(summary))):
        write_file(path, BLOCK.sub(lambda _, table=table: table, path.read_text()).encode())
    print("results: README.md and runs/reference/results.md")
    return code


# ---- Running -----------------------------------------------------------------


def reference_folder(row: Row) -> Path:
    return REFERENCE / row.name


def work_folder(row: Row, seed: int) -> Path:
    return ROOT / "runs" / f"work-{row.name}-seed{seed}"


def target_folder(row: Row) -> Path:
    """Where new seeds of a row go: to those that are there, if the page learns as it did for them."""
    folder, new = reference_folder(row), REFERENCE / "next" / row.name
    if not list(folder.glob("seed*.json")) or made_alike(row, folder):
        return folder
    if new.exists() and not made_alike(row, new):
        shutil.rmtree(new)
    return new


def made_alike(row: Row, folder: Path) -> bool:
    return not other_settings(row, folder) and read_settings(folder)[0].get("fingerprint") == fingerprint(row)


def run_rows(queue: list[tuple[Row, int]], jobs: int) -> int:
    """Train what is not finished yet; the exit code."""
    missing = [(row, seed) for row, seed in queue if not (target_folder(row) / f"seed{seed}.json").exists()]
    for row, seed in queue:
        if changed := other_settings(row, work_folder(row, seed)):
            sys.exit(f"{work_folder(row, seed)} was begun with other settings ({', '.join(changed)}): remove it")
    seconds = [summarize(row, reference_folder(row)).get("training_seconds", 0) for row, _ in missing]
    print(f"{len(missing)} runs are left, about {sum(seconds) / 3600 / jobs:.1f} hours", flush=True)
    return run_all(missing, jobs, start, collect)


def run_all(queue: list[tuple], jobs: int, start: Callable, collect: Callable) -> int:
    """Start these jobs, `jobs` at a time, and collect each that ends well; the exit code.

    A signal stops the runs cleanly, then us."""
    stopped: list[int] = []  # a flag, not an exception, so that no file is left half written
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    running: dict[subprocess.Popen, tuple] = {}
    failed = 0
    try:
        while (queue or running) and not stopped:
            while queue and len(running) < jobs:
                job, *queue = queue
                running[start(*job)] = job
            for process in [p for p in running if p.poll() is not None]:
                job = running.pop(process)
                outcome = collect(*job) if process.returncode == 0 else "failed, see its .log"
                print(*job, outcome, flush=True)
                failed |= process.returncode != 0
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return 128 + stopped[0] if stopped else int(failed)


def start(row: Row, seed: int) -> subprocess.Popen:
    return begin_or_resume(work_folder(row, seed), [*row.command, "--seed", str(seed)])


def begin_or_resume(run: Path, flags: list[str], python: str = sys.executable) -> subprocess.Popen:
    """A process that begins this run or goes on with it, in a session of its own: Ctrl-C shall reach us alone."""
    if list(run.glob("checkpoint-*.pt")):
        command = ["ppo.py", "--resume", f"runs/{run.name}"]
    else:
        shutil.rmtree(run, ignore_errors=True)  # it stopped before its first checkpoint
        command = ["ppo.py", *flags, "--run-name", run.name]
    return in_background(run, command, python)


def in_background(run: Path, command: list[str], python: str = sys.executable) -> subprocess.Popen:
    """A command of ours, on one thread; what it prints goes to the .log beside the run."""
    run.parent.mkdir(exist_ok=True)
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen([python, *command], cwd=ROOT, stdout=log, stderr=log,
                                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
                                start_new_session=True)  # fmt: skip


def read_settings(folder: Path) -> tuple[dict, str]:
    """What a run or the seeds in a reference folder were trained with, if anything is there; by which edition."""
    paths = (folder / "hyperparameters.json", folder / "config.json")
    settings = next((json.loads(path.read_text()) for path in paths if path.exists()), {})
    return settings, "second edition" if settings and "rescale_actions" not in settings else "third edition"


def other_settings(row: Row, folder: Path) -> list[str]:
    """The names among a folder's settings whose values are not today's.

    For the second edition, which stretched no actions, a deviation was another thing; its null is 0 now, and some of
    its rows took 20 validation episodes."""
    then, edition = read_settings(folder)
    now = json.loads(json.dumps(asdict(parse_args(row.command))))
    free = ("seed", "run_name", "preset", "fingerprint")
    free += ("logstd_init", "validation_episodes") if edition == "second edition" else ()
    return [name for name in then if name in now and (then[name] or 0) != (now[name] or 0) and name not in free]


def collect(row: Row, seed: int) -> str:
    """Copy what a finished run has shown to the reference folder, its results last: they mark it as done."""
    run, folder = work_folder(row, seed), target_folder(row)
    folder.mkdir(parents=True, exist_ok=True)
    settings, _ = read_settings(run)
    total, left = int(settings["total_timesteps"]), ("seed", "run_name", "parts", "action", "masks")
    settings |= {"fingerprint": fingerprint(row)}
    write_file(folder / "hyperparameters.json", {k: v for k, v in settings.items() if k not in left})
    curves = read_curves(folder / "curve.csv")[1] if (folder / "curve.csv").exists() else {}
    write_curves(folder / "curve.csv", total, curves | {seed: learning_curve(*training_returns(run), total)})
    results = json.loads((run / "results.json").read_text()) | {"settings": made_with()}
    write_file(folder / f"seed{seed}.json", results)
    if folder != reference_folder(row) and len(list(folder.glob("seed*.json"))) >= row.seeds:
        shutil.rmtree(reference_folder(row))
        folder.rename(reference_folder(row))
    return "{mean_reward:.2f} +/- {std_reward:.2f}, {training_seconds:.0f} s".format(**results)


def made_with() -> dict:
    """The commit, the machine and the packages of now."""
    names = ("torch", "gymnasium", "numpy", "box2d", "mujoco", "ale-py", "minatar")
    packages = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    here = {"ppo.py": commit, "python": platform.python_version(), "machine": platform.machine(), "threads": 1}
    return here | {"cores": os.cpu_count()} | {name: packages[name] for name in names if name in packages}


@cache
def fingerprint(row: Row) -> float:
    """How far all weights have moved in two iterations of seed 1: elsewhere, if a page learns otherwise.
    To four digits, for processors round differently; on one thread, as two add in another order. Ant's rollouts are of
    16 steps here: in 128 its contacts make of 1e-7 in the weights at first 4 % of this, in 16 0.002 %."""
    began = []
    two = lambda state: began.append(state.optimizer.theta.clone()) or [range(2)]  # noqa: E731
    one = mock.patch.dict(os.environ, OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder, mock.patch("ppo.legs", two), one:
        torch.set_num_threads(1)
        flags = ["--run-name", "two", "--validation-episodes", "0", "--checkpoint-every", "2", "--device", "cpu"]
        flags += ["--num-steps", "16"] * (row.env_id == "Ant-v5")
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
            state = ppo.train(parse_args([*row.command, *flags]))
    return float(f"{(state.optimizer.theta - began[0]).norm().item():.4g}")


# ---- Learning curves ---------------------------------------------------------


def training_returns(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """The step at which each training episode ended, and its return, from the run's TensorBoard files."""
    steps, returns = zip(*scalars(run)["charts/episodic_return"])
    return np.array(steps), np.array(returns)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value), ...]} of a run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resumption
    log = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def learning_curve(steps: np.ndarray, returns: np.ndarray, total: int, points: int = 100) -> np.ndarray:
    """Mean return of the episodes that ended in each of `points` equal parts of the run; NaN where none did."""
    part = (steps * points - 1) // total  # a part includes its last step
    number = np.bincount(part, minlength=points)
    return np.bincount(part, returns, points) / np.where(number, number, np.nan)


def write_curves(path: Path, total: int, curves: dict[int, np.ndarray]) -> None:
    """A row for each part of the run, named after its last step; the cell is empty where no episode ended."""
    lines = [",".join(["step", *(f"seed{seed}" for seed in sorted(curves))])]
    for i, values in enumerate(zip(*(curves[seed] for seed in sorted(curves)))):
        step = total * (i + 1) // len(curves[min(curves)])
        lines.append(",".join([str(step), *("" if np.isnan(v) else f"{v:.5g}" for v in values)]))
    write_file(path, ("\n".join(lines) + "\n").encode())


def read_curves(path: Path) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The steps [points] and {seed: mean returns [points]}, NaN where the cell is empty."""
    head, *rows = [line.split(",") for line in path.read_text().splitlines()]
    steps, *columns = np.array([[float(cell or "nan") for cell in row] for row in rows]).T
    return steps, {int(name.removeprefix("seed")): column for name, column in zip(head[1:], columns)}


def read_lines(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The steps [points] and mean returns [runs, points] of a row's runs; NaN before a run's first episode ended."""
    steps, curves = read_curves(folder / "curve.csv")
    return steps, np.stack([fill(steps, curve) for curve in curves.values()])


def fill(steps: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """The curve, interpolated where no episode ended; NaN before the first one did."""
    known = ~np.isnan(curve)
    return np.interp(steps, steps[known], curve[known], left=np.nan)


def draw_middle(axes, steps: np.ndarray, lines: np.ndarray) -> None:
    """The IQM of lines [runs, points] and, as a band, its interval; from where on an episode has ended in every run."""
    whole = ~np.isnan(lines).any(0)
    low, high = interval(lines[:, whole], 2000)
    axes.fill_between(steps[whole], low, high, color="tab:orange", alpha=0.25, linewidth=0, label="95% interval")
    axes.plot(steps[whole], iqm(lines[:, whole]), color="tab:orange", linewidth=2.2, label="interquartile mean")


def finish(axes, steps: np.ndarray) -> None:
    """What all panels share."""
    from matplotlib.ticker import EngFormatter

    axes.set_xlim(0, steps[-1])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure, dpi: int) -> bytes:
    figure.savefig(image := io.BytesIO(), format="png", dpi=dpi, metadata={"Software": None})
    return image.getvalue()


def draw(env_id: str, folder: Path) -> None:
    """curve.png: every seed thin, their IQM bold, its interval as a band."""
    from matplotlib.figure import Figure

    steps, lines = read_lines(folder)
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    labels = [f"{len(lines)} seeds", *["_"] * (len(lines) - 1)]  # matplotlib lists no label that begins with _
    axes.plot(steps, lines.T, color="tab:blue", alpha=0.4, linewidth=0.8, label=labels)
    draw_middle(axes, steps, lines)
    axes.set(title=env_id, xlabel="environment steps", ylabel="return of training episodes")
    finish(axes, steps)
    axes.legend(frameon=False, fontsize="small")
    write_file(folder / "curve.png", png(figure, 100))


def worlds(summary: list[dict]) -> list[dict]:
    """The rows that have results, one for each world: the one with the steps of its preset."""
    plain = [row for row in summary if row["seeds"] and not row.get("label")]
    return [row for row in plain if preset_steps(row["env_id"]) in (None, row["steps"])]


def published_means(published: str) -> list[tuple[float, bool]]:
    """The means in a row's text, and whether they are of as many steps."""
    number = r"\(.*?\)|\+/- \S+|at (about )?\S+M|about"
    return [(float(re.sub(number, "", part)), not re.search("at |about", part)) for part in published.split(";")]


def small_multiples(summary: list[dict]):
    """A panel for each world: the IQM of its runs and its interval, their mean score, and what others published."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, columns = worlds(summary), 5
    height = len(rows) // columns + 1  # one panel more is for the legend
    figure = Figure(figsize=(10, 1.8 * height), layout="constrained")
    panels = figure.subplots(height, columns).flat
    for axes, row in zip(panels, rows):
        steps, lines = read_lines(REFERENCE / row["env_id"].replace("/", "-"))
        draw_middle(axes, steps, lines)
        axes.plot(steps[-1:], [row["mean"]], "o", color="tab:blue", clip_on=False, zorder=3, label="mean score")
        for mean, equal in published_means(row["published"]):
            axes.axhline(mean, color="0.25", linestyle="--" if equal else ":", linewidth=1)
        axes.set_title(f"{row['env_id']} ({len(row['seeds'])})", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        low, high = axes.get_ylim()
        axes.set_ylim(low, max(high, row["mean"] + 0.04 * (high - low)))
        axes.set_xticks([0, steps[-1] / 2, steps[-1]])
        finish(axes, steps)
    rest = figure.axes[len(rows) :]
    for style, words in (("--", "published, as many steps"), (":", "published, other steps")):
        axes.plot([], [], color="0.25", linestyle=style, linewidth=1, label=words)
    rest[len(rest) // 2].legend(*axes.get_legend_handles_labels(), loc="center", frameon=False, fontsize=8)
    for axes in rest:
        axes.set_axis_off()
    return figure


def strip(films: list[Path], number: int = 6, height: int = 200) -> bytes:
    """A picture of so many frames side by side: of each film equally many, evenly spaced up to its last one."""
    from PIL import Image

    row, share = [], number // len(films)
    for film in films:
        frames = film_frames(film)
        for i in range(1, share + 1):
            frame = scaled(frames[(len(frames) - 1) * i // share], height)
            row += [frame, np.full((height, 8, 3), 255, np.uint8)]  # a white gap after each
    Image.fromarray(np.hstack(row[:-1])).save(image := io.BytesIO(), format="png", optimize=True)
    return image.getvalue()


def film_frames(film: Path) -> list:
    """Its pictures."""
    from imageio_ffmpeg import read_frames
    from PIL import Image

    frames = read_frames(str(film))
    size = next(frames)["size"]
    return [Image.frombytes("RGB", size, frame) for frame in frames]


def scaled(picture, height: int) -> np.ndarray:
    from PIL import Image

    width = picture.size[0] * height // picture.size[1]
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))


def gif(films: list[Path], height: int = 200, every: int = 5, seconds: float = 12) -> bytes:
    """The films side by side; one that ends sooner stands still."""
    from PIL import Image

    shown = [[scaled(frame, height) for frame in film_frames(film)[::every]] for film in films]
    number = min(int(50 / every * seconds), max(map(len, shown)))
    gap = np.full((height, 6, 3), 255, np.uint8)
    rows = [np.hstack([x for s in shown for x in (s[min(i, len(s) - 1)], gap)][:-1]) for i in range(number)]
    pictures = [Image.fromarray(row).quantize(32, dither=Image.Dither.NONE) for row in rows]
    pictures[0].save(image := io.BytesIO(), format="gif", save_all=True, append_images=pictures[1:], loop=0,
                     duration=[20 * every] * (number - 1) + [1500], optimize=True)  # fmt: skip
    return image.getvalue()


def clipped_objective():
    """The objective and its gradient against the ratio, for an advantage of 1 and of -1: by `policy_loss` itself."""
    from matplotlib.figure import Figure
    from torch import autograd, linspace, tensor

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    panels = figure.subplots(1, 2)
    ratios = linspace(0.5, 1.5, 401)
    for axes, advantage in zip(panels, (1.0, -1.0)):
        objective, slope = [], []
        for ratio in ratios:
            logratio = ratio.log().requires_grad_()
            loss = ppo.policy_loss(logratio.view(1), tensor([advantage]), 0.2)
            objective.append(-loss.item())
            slope.append(-autograd.grad(loss, logratio)[0].item() / ratio.item())
        axes.plot(ratios, objective, color="tab:blue", linewidth=2, label="objective")
        axes.plot(ratios, slope, color="tab:orange", linewidth=2, label="its gradient, d / dr")
        axes.axvspan(0.8, 1.2, color="0.94", zorder=0)
        axes.set(title=f"advantage {'above' if advantage > 0 else 'below'} 0", xlabel="ratio r")
        axes.set_xticks([0.5, 0.8, 1, 1.2, 1.5])
        axes.grid(axis="y", color="0.9")
        axes.legend(frameon=False, fontsize="small")
    return figure


def picture(run: Path) -> bytes:
    """Four frames of a run's film and, beside them, its learning curve."""
    from matplotlib.figure import Figure
    from PIL import Image

    settings, _ = read_settings(run)
    total = int(settings["total_timesteps"])
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    film, axes = figure.subplots(1, 2, width_ratios=(2, 1))
    film.imshow(Image.open(io.BytesIO(strip([run / "replay.mp4"], 4, 420))))
    film.axis("off")
    curve = learning_curve(*training_returns(run), total)
    steps = total * np.arange(1, len(curve) + 1) / len(curve)
    axes.plot(steps[~np.isnan(curve)], curve[~np.isnan(curve)], color="tab:blue")
    axes.set(title=settings["env_id"], xlabel="environment steps", ylabel="return of training episodes")
    finish(axes, steps)
    return png(figure, 100)


# ---- Statistics: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021) ----


def iqm(scores: np.ndarray) -> np.ndarray:  # [runs, ...] -> [...]
    """Interquartile mean over runs: that of the middle half."""
    cut = len(scores) // 4
    return np.sort(scores, axis=0)[cut : len(scores) - cut].mean(0)


def interval(scores: np.ndarray, resamples: int = 20_000) -> np.ndarray:  # [runs, ...] -> [2, ...]
    """95% interval of the IQM by the percentile bootstrap over runs, always with the same draws.

    Stratified as in rliable: each environment is a stratum, whose runs are resampled among themselves, as a whole."""
    draws = np.random.default_rng(0).integers(len(scores), size=(len(scores), resamples))
    return np.percentile(iqm(scores[draws]), (2.5, 97.5), axis=0)


def summarize(row: Row, folder: Path) -> dict:
    """One row of the table, from the seed<k>.json in its folder."""
    found = sorted((json.loads(path.read_text()) for path in folder.glob("seed*.json")), key=lambda r: r["seed"])
    summary = {**row._asdict(), "seeds": [r["seed"] for r in found], "planned": row.seeds}
    if not found:
        return summary
    means = np.array([r["mean_reward"] for r in found])  # [runs]
    low, high = interval(means)
    numbers = {
        "mean": means.mean(), "std": means.std(ddof=min(1, len(means) - 1)), "iqm": iqm(means), "low": low,
        "high": high, "min": means.min(), "std_over_episodes": np.mean([r["std_reward"] for r in found]),
        "training_seconds": np.median([r["training_seconds"] for r in found]),
    }  # fmt: skip
    made = merge([{"ppo.py": read_settings(folder)[1]} | r["settings"] for r in found])
    return summary | {name: round(float(value), 4) for name, value in numbers.items()} | {"made_with": made}


def merge(settings: list[dict]) -> dict[str, list[str]]:
    """{name: all values that it has in these settings}."""
    pairs = {(name, str(value)) for one in settings for name, value in one.items()}
    return {name: sorted(v for n, v in pairs if n == name) for one in settings for name in one}


def in_words(row: dict) -> dict[str, str]:
    """The numbers of a row of the summary, as tables show them."""
    steps, n, seconds = row["steps"], len(row["seeds"]), row.get("training_seconds", 0)
    digits = 2 if abs(row.get("mean", 0)) < 10 else 1
    return {name: f"{row[name]:.{digits}f}" for name in ("mean", "std", "iqm", "low", "high", "min") if n} | {
        "steps": f"{steps / 1e6:g}M" if steps >= 1_000_000 else f"{steps // 1000}k",
        "seeds": f"{n}" if n >= row["planned"] else f"{n} of {row['planned']}",
        "wall": f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min",
    }


def long_table(summary: list[dict]) -> str:
    """The table of results.md: all rows and all numbers."""
    names = ("environment", "steps", "seeds", "mean", "std", "IQM [95%]", "worst", "training", "tried",
             "published best", "source", "made by")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|:--|" + "--:|" * 8 + ":--|:--|:--|"]
    for row in summary:
        x, n, cells = in_words(row), len(row["seeds"]), ["not run", "", "", "", ""]
        if n:
            spread = [x["std"], f"{x['iqm']} [{x['low']}, {x['high']}]"] if n > 1 else ["", ""]
            cells = [x["mean"], *spread, x["min"], x["wall"]]
        world = ", ".join(filter(None, [row["env_id"], row.get("label")]))
        words = [world, x["steps"], x["seeds"], *cells, str(row["tried"]), row["published"], row["source"]]
        words.append(" or ".join(row["made_with"]["ppo.py"]) if n else "")
        lines.append(f"| {' | '.join(words)} |")
    if missing := dict.fromkeys(row["env_id"] for row in summary if len(row["seeds"]) < row["planned"]):
        lines.append(f"\nTo be run: `python tests/reference.py --envs {' '.join(missing)}`")
    settings = [{k: " or ".join(v) for k, v in row["made_with"].items()} for row in summary if row["seeds"]]
    made_with = ", ".join(f"{name} {' or '.join(values)}" for name, values in merge(settings).items())
    return "\n".join(lines) + f"\n\nMade with {made_with or 'nothing yet'}.\n"


def short_table(summary: list[dict]) -> str:
    """The table of the README: one line for each world that has results."""
    lines = ["| environment | steps | seeds | score | published | training |", "|:--|--:|--:|--:|:--|--:|"]
    for row in worlds(summary):
        x = in_words(row)
        score = f"{x['mean']} +/- {x['std']}" if len(row["seeds"]) > 1 else x["mean"]
        words = [row["env_id"], x["steps"], x["seeds"], score, row["published"], x["wall"]]
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
