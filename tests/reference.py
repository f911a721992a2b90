"""The evidence: train every row of the results table through ppo.py's own command line, and sum up what came out.

    python tests/reference.py                                       # all rows but Atari's, which need a GPU
    python tests/reference.py --envs CartPole-v1 LunarLander-v3     # these rows only
    python tests/reference.py --summary-only                        # train nothing, redo tables and figures

Interrupt it at any time; the same command goes on where it was. A run works in runs/work-<env>-seed<k>, with its
console in the .log beside. Once it is finished, runs/reference/<env>/ keeps of it what the results are made from:

    seed<k>.json            its results.json: 100 greedy episodes of the agent that it would publish
    curve.csv, curve.png    mean return of the training episodes that ended in each hundredth of the run, by seed
    hyperparameters.json    what all of these seeds were trained with
    replay.png              LunarLander's only: a whole episode of seed 1 in one picture

summary.json and summary.md in runs/reference/ follow from these files alone; summary.md is the README's table.
"""

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ppo import usual_args, write_file, write_json

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "runs" / "reference"


class Row(NamedTuple):
    env_id: str
    steps: int
    seeds: int
    tried: int  # settings compared on other seeds before
    published: str  # the best PPO result found, at as many steps unless it says otherwise
    source: str

    @property
    def name(self) -> str:
        """The id; with the steps, where they are not the preset's."""
        usual = usual_args(self.env_id).total_timesteps == self.steps
        return self.env_id.replace("/", "-") + ("" if usual else f"-{self.steps / 1e6:g}M")


ROWS = [
    Row("CartPole-v1", 100_000, 10, 2, "500 +/- 0", "zoo"),
    Row("LunarLander-v3", 1_000_000, 10, 7, "242.1 +/- 31.8 (v2)", "zoo"),
    Row("LunarLander-v3", 2_000_000, 10, 3, "289.2 +/- 15.8 (v2)", "Hub"),
    Row("HalfCheetah-v5", 1_000_000, 10, 19, "5819.1 +/- 663.5 (v3)", "zoo"),
    Row("Hopper-v5", 1_000_000, 10, 2, "2609.3 +/- 700.8 (v3)", "Tianshou"),
    Row("Acrobot-v1", 500_000, 5, 6, "-81.8 +/- 5.6; at 1M -73.5 +/- 18.2", "baselines; zoo"),
    Row("MountainCar-v0", 500_000, 5, 5, "-200 +/- 0; at 1M -110.4 +/- 19.5", "CleanRL; zoo"),
    Row("Pendulum-v1", 100_000, 5, 28, "-172.2 +/- 104.2", "zoo"),
    Row("LunarLanderContinuous-v3", 1_000_000, 5, 2, "270.9 +/- 32.1 (v2)", "zoo"),
    Row("BipedalWalker-v3", 5_000_000, 5, 4, "287.9 +/- 2.4", "zoo"),
    Row("Walker2d-v5", 1_000_000, 5, 4, "3588.5 +/- 756.6 (v3); about 4000", "Tianshou; ikostrikov"),
    Row("Ant-v5", 1_000_000, 5, 4, "3258.4 +/- 1079.3 (v3)", "Tianshou"),
    Row("Swimmer-v5", 1_000_000, 5, 4, "281.6 +/- 9.7 (v3)", "zoo"),
    Row("Humanoid-v5", 1_000_000, 5, 3, "787.1 +/- 193.5 (v3)", "Tianshou"),
    Row("InvertedPendulum-v5", 1_000_000, 5, 1, "1000 +/- 0 (v2)", "Tianshou"),
    Row("InvertedDoublePendulum-v5", 1_000_000, 5, 4, "9231.3 +/- 270.4 (v2)", "Tianshou"),
    Row("Reacher-v5", 1_000_000, 5, 9, "-4.1 +/- 0.3 (v2)", "Tianshou"),
    Row("Pusher-v5", 1_000_000, 5, 1, "-40.4 +/- 7.2 (v4)", "CleanRL"),
    Row("ALE/Pong-v5", 10_000_000, 3, 1, "21.0 +/- 0.1 (v4)", "zoo"),
    Row("ALE/Breakout-v5", 10_000_000, 3, 1, "414.7 +/- 28.1 (v4)", "CleanRL"),
]

SOURCES = {
    "zoo": "[RL Baselines3 Zoo](https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/benchmark.md)",
    "CleanRL": "[its documentation](https://docs.cleanrl.dev/rl-algorithms/ppo/)",
    "baselines": "OpenAI's, as measured by CleanRL",
    "Tianshou": "[its MuJoCo benchmark](https://github.com/thu-ml/tianshou/tree/master/examples/mujoco#ppo)",
    "ikostrikov": "pytorch-a2c-ppo-acktr-gail, read off its curve by Tianshou",
    "Hub": "the best model card found there",
}
NOTES = """
- Each seed is trained from nothing and scored by the mean return of 100 greedy episodes in fresh environments. The
  agent scored is the best checkpoint of its run, chosen on other episodes; the steps of those are not counted.
- Mean, std (of the sample), interquartile mean (IQM) and worst are over those scores. The interval is a 95% bootstrap
  over seeds, stratified by environment, as [Agarwal et al. (2021)](https://arxiv.org/abs/2108.13264) advise.
- Training: the median wall time without evaluation, on one thread, on a machine with two cores that other runs kept
  busy.
- Tried: settings compared on seeds above 100; 1 is a guess from like environments. The seeds of Acrobot,
  BipedalWalker, HalfCheetah, InvertedDoublePendulum, both LunarLanders, Pendulum, Reacher, Swimmer and Walker2d were
  run anew, with settings found in that way, after earlier ones had done worse on them. Ant and Humanoid are observed
  without their contact forces, which were always zero in the versions that others report.
- Published: for the same version and as many steps, unless it says otherwise; +/- is over the episodes of one run (zoo,
  Hub) or over runs (the others).

Sources:
{sources}.

Made with {made_with}.
"""


def main(envs: tuple[str, ...] = (), seeds: int | None = None, jobs: int = 2, first_seed: int = 1,
         summary_only: bool = False) -> int:  # fmt: skip
    """Run what is missing of the results, then write tables and figures.

    Args:
        envs: rows to run; default all but Atari's
        seeds: seeds of each, instead of the row's own number
        jobs: runs at a time
        first_seed: the first of the seeds
        summary_only: run nothing"""
    if unknown := set(envs) - {row.env_id for row in ROWS}:
        sys.exit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(row.env_id for row in ROWS)}")
    rows = [row for row in ROWS if (row.env_id in envs if envs else not row.env_id.startswith("ALE/"))]
    queue = [(row, seed) for row in rows for seed in range(first_seed, first_seed + (seeds or row.seeds))]
    code = 0 if summary_only else run_all(queue, jobs)
    for row in ROWS:
        if (reference_folder(row) / "curve.csv").exists():
            draw(row.env_id, reference_folder(row))
    lander = next(row for row in ROWS if row.env_id == "LunarLander-v3")
    run, folder = work_folder(lander, 1), reference_folder(lander)
    if (run / "results.json").exists() and not (folder / "replay.png").exists():
        picture(run, folder)
    summary = [summarize(row, reference_folder(row)) for row in ROWS]
    REFERENCE.mkdir(parents=True, exist_ok=True)
    write_file(REFERENCE / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_file(REFERENCE / "summary.md", markdown(summary).encode())
    print("summary: runs/reference/summary.md")
    return code


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def reference_folder(row: Row) -> Path:
    return REFERENCE / row.name


def work_folder(row: Row, seed: int) -> Path:
    return ROOT / "runs" / f"work-{row.name}-seed{seed}"


def run_all(queue: list[tuple[Row, int]], jobs: int) -> int:
    """Train what is not finished yet, `jobs` at a time; the exit code. A signal stops the runs cleanly, then us."""
    stopped: list[int] = []  # a flag, not an exception, so that no file is left half written
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    for row, seed in queue:
        for folder in (reference_folder(row), work_folder(row, seed)):
            if changed := other_settings(row, folder):
                sys.exit(f"{folder} was trained with other settings ({', '.join(changed)}): remove it to start anew")
    queue = [(row, seed) for row, seed in queue if not (reference_folder(row) / f"seed{seed}.json").exists()]
    running: dict[subprocess.Popen, tuple[Row, int]] = {}
    failed = 0
    try:
        while (queue or running) and not stopped:
            while queue and len(running) < jobs:
                job = queue.pop(0)
                running[start(*job)] = job
            for process in [p for p in running if p.poll() is not None]:
                row, seed = running.pop(process)
                outcome = f"failed, see {work_folder(row, seed)}.log"
                if process.returncode == 0:
                    score = collect(row, seed)
                    outcome = "{mean_reward:9.2f} +/- {std_reward:7.2f} {training_seconds:7.0f} s".format(**score)
                print(f"{row.name:25} seed {seed:2}  {outcome}", flush=True)
                failed |= process.returncode != 0
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return 128 + stopped[0] if stopped else int(failed)


def start(row: Row, seed: int) -> subprocess.Popen:
    """A process that begins this run or goes on with it, in a session of its own: Ctrl-C shall reach us alone."""
    run = work_folder(row, seed)
    if list(run.glob("checkpoint-*.pt")):
        flags = ["--resume", f"runs/{run.name}"]
    else:
        shutil.rmtree(run, ignore_errors=True)  # it stopped before its first checkpoint
        flags = ["--env-id", row.env_id, "--total-timesteps", str(row.steps)]
        flags += ["--seed", str(seed), "--run-name", run.name]
    run.parent.mkdir(exist_ok=True)
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen([sys.executable, "ppo.py", *flags], cwd=ROOT, stdout=log, stderr=log,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip


def other_settings(row: Row, folder: Path) -> list[str]:
    """The names in a folder's hyperparameters.json, if it has one, whose values are not today's."""
    if not (folder / "hyperparameters.json").exists():
        return []
    then = json.loads((folder / "hyperparameters.json").read_text())
    now = json.loads(json.dumps(asdict(replace(usual_args(row.env_id), total_timesteps=row.steps))))
    return [name for name in then if name in now and then[name] != now[name] and name not in ("seed", "run_name")]


def collect(row: Row, seed: int) -> dict:
    """Copy what a finished run has shown to the reference folder, its results last: they mark it as done."""
    run, folder = work_folder(row, seed), reference_folder(row)
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads((run / "hyperparameters.json").read_text())
    total = settings["total_timesteps"]
    write_json(folder / "hyperparameters.json", {k: v for k, v in settings.items() if k not in ("seed", "run_name")})
    curves = read_curves(folder / "curve.csv")[1] if (folder / "curve.csv").exists() else {}
    write_curves(folder / "curve.csv", total, curves | {seed: learning_curve(*training_returns(run), total)})
    results = json.loads((run / "results.json").read_text())
    write_json(folder / f"seed{seed}.json", results)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Learning curves
# ---------------------------------------------------------------------------------------------------------------------


def training_returns(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """The step at which each training episode ended, and its return, from the run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resumption
    log = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    events = log.Scalars("charts/episodic_return")
    return np.array([e.step for e in events]), np.array([e.value for e in events])


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


def draw(env_id: str, folder: Path) -> None:
    """curve.png: every seed thin, their IQM bold, its interval as a band."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    steps, curves = read_curves(folder / "curve.csv")
    known = [(curve, ~np.isnan(curve)) for curve in curves.values()]
    lines = np.stack([np.interp(steps, steps[ok], curve[ok], left=np.nan) for curve, ok in known])  # [runs, points]
    whole = ~np.isnan(lines).any(0)  # from where on an episode has ended in every run
    low, high = interval(lines[:, whole], 2000)
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    labels = [f"{len(lines)} seeds", *["_"] * (len(lines) - 1)]  # matplotlib lists no label that begins with _
    axes.plot(steps, lines.T, color="tab:blue", alpha=0.4, linewidth=0.8, label=labels)
    axes.fill_between(steps[whole], low, high, color="tab:orange", alpha=0.25, linewidth=0, label="95% interval")
    axes.plot(steps[whole], iqm(lines[:, whole]), color="tab:orange", linewidth=2.2, label="interquartile mean")
    axes.set(title=env_id, xlabel="environment steps", ylabel="return of training episodes", xlim=(0, steps[-1]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(image := io.BytesIO(), format="png", dpi=100, metadata={"Software": None})
    write_file(folder / "curve.png", image.getvalue())


def picture(run: Path, folder: Path) -> None:
    """replay.png: one episode, filmed; of each pixel the brightest value over every 12th of its frames."""
    from imageio_ffmpeg import read_frames
    from matplotlib.image import imsave

    command = [sys.executable, "ppo.py", "--evaluate", f"runs/{run.name}", "--capture-video", "--eval-episodes", "1"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    frames = read_frames(str(run / "replay.mp4"))
    width, height = next(frames)["size"]
    film = np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames])
    imsave(image := io.BytesIO(), film[::12].max(0), format="png", metadata={"Software": None})
    write_file(folder / "replay.png", image.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Statistics: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021)
# ---------------------------------------------------------------------------------------------------------------------


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
    made_with = merge([r["settings"] for r in found])
    return summary | {name: round(float(value), 4) for name, value in numbers.items()} | {"made_with": made_with}


def merge(settings: list[dict]) -> dict[str, list[str]]:
    """{name: all values that it has in these settings}."""
    pairs = {(name, str(value)) for one in settings for name, value in one.items()}
    return {name: sorted(v for n, v in pairs if n == name) for one in settings for name in one}


def markdown(summary: list[dict]) -> str:
    """The README's results table."""
    names = ("environment", "steps", "seeds", "mean", "std", "IQM [95%]", "worst", "training", "tried",
             "published best", "source")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|:--|" + "--:|" * 8 + ":--|:--|"]
    for row in summary:
        steps = f"{row['steps'] / 1e6:g}M" if row["steps"] >= 1_000_000 else f"{row['steps'] // 1000}k"
        n, cells = len(row["seeds"]), ["not run", "", "", "", ""]
        if n:
            digits = 2 if abs(row["mean"]) < 10 else 1
            mean, std, mid, low, high, worst = (
                f"{row[k]:.{digits}f}" for k in ("mean", "std", "iqm", "low", "high", "min")
            )
            seconds = row["training_seconds"]
            wall = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
            spread = [std, f"{mid} [{low}, {high}]"] if n > 1 else ["", ""]
            cells = [mean, *spread, worst, wall]
        seeds = f"{n}" if n >= row["planned"] else f"{n} of {row['planned']}"
        words = [row["env_id"], steps, seeds, *cells, str(row["tried"]), row["published"], row["source"]]
        lines.append(f"| {' | '.join(words)} |")
    if missing := dict.fromkeys(row["env_id"] for row in summary if len(row["seeds"]) < row["planned"]):
        lines.append(f"\nTo be run: `python tests/reference.py --envs {' '.join(missing)}`")
    sources = ";\n".join(f"{name}: {where}" for name, where in SOURCES.items())
    settings = [{k: " or ".join(v) for k, v in row["made_with"].items()} for row in summary if row["seeds"]]
    made_with = ", ".join(f"{name} {' or '.join(values)}" for name, values in merge(settings).items())
    return "\n".join(lines) + "\n" + NOTES.format(sources=sources, made_with=made_with or "nothing yet")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
