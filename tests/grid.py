"""A paper's figure in one command: train a grid of environments, variants and seeds, then draw and tabulate it.

    python tests/grid.py --env-ids CartPole-v1 --seeds 5 --vary learning-rate 1e-3 3e-4
    python tests/grid.py --env-ids CartPole-v1 Acrobot-v1 --variants "" norm-obs "gae-lambda 0.9 --ent-coef 0"
    python tests/grid.py --draw here="runs/CartPole*" CleanRL="../cleanrl/runs/CartPole*"     # runs that are there

Runs take all cores, a thread each; interrupt them at any time, the same command goes on. Each environment has a picture
in the folder --name: the interquartile mean of training returns over seeds, its 95% bootstrap interval (Agarwal et al.
2021). table.md and table.csv have the scores. Of other programs' runs, charts/episodic_return of their logs is drawn.
"""

import json
import os
import re
import shlex
import sys
from glob import glob
from pathlib import Path

import numpy as np
import reference
import tyro
from matplotlib.figure import Figure
from reference import ROOT, begin_or_resume, finish, interval, iqm, png, run_all


def main(env_ids: tuple[str, ...] = ("CartPole-v1",), seeds: int = 3, vary: tuple[str, ...] = (),
         variants: tuple[str, ...] = (), flags: str = "", jobs: int = os.cpu_count() or 1,
         name: Path = Path("runs/grid"), draw: tuple[str, ...] = ()) -> int:  # fmt: skip
    """Train what is missing, then draw.

    Args:
        env_ids: environments, a picture each
        seeds: of each variant, from 1
        vary: a flag and its values, a variant each
        variants: or flags of each variant, without the first dashes, in quotes
        flags: of all variants, likewise
        jobs: runs at a time
        name: folder of the pictures and tables
        draw: train nothing, draw these runs: label=pattern of folders"""
    name.mkdir(parents=True, exist_ok=True)
    if draw:
        found = {label: glob(pattern) for label, pattern in (words.split("=", 1) for words in draw)}
        groups, code = {"runs": {label: [Path(run) for run in runs] for label, runs in found.items()}}, 0
    else:
        if len(vary) == 1:
            sys.exit(f"--vary {vary[0]} takes values, too")
        lines = [f"{vary[0].lstrip('-')} {value}" for value in vary[1:]] or variants or [""]
        numbers = range(1, seeds + 1)
        groups = {e: {v or "preset": [folder(name, e, v, s) for s in numbers] for v in lines} for e in env_ids}
        grid = [(name, e, v, s, flags) for s in numbers for e in env_ids for v in lines]
        code = run_all([g for g in grid if not (folder(*g[:4]) / "results.json").exists()], jobs, start, told)
    rows = [row for env_id, group in groups.items() for row in picture(name, env_id, group)]
    (name / "table.csv").write_text("\n".join(",".join(map(str, row)) for row in [HEAD, *rows]) + "\n")
    lines = [f"| {' | '.join(map(str, row))} |" for row in [HEAD, ["--"] * len(HEAD), *rows]]
    (name / "table.md").write_text("\n".join(lines) + "\n")
    print(*lines, f"pictures: {name}", sep="\n")
    return code


def folder(name: Path, env_id: str, variant: str, seed: int) -> Path:
    return ROOT / "runs" / re.sub(r"[^\w.]", "-", f"{name.name}-{env_id}-{variant}-{seed}")


def start(name, env_id, variant, seed, flags):
    more = " ".join(f"--{words.lstrip('-')}" for words in (flags, variant) if words)
    words = ["--env-id", env_id, "--seed", str(seed), *shlex.split(more)]
    return begin_or_resume(folder(name, env_id, variant, seed), words)


def told(name, env_id, variant, seed, flags) -> str:
    results = json.loads((folder(name, env_id, variant, seed) / "results.json").read_text())
    return f"{results['mean_reward']:.2f}"


def curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and training returns, of ppo.py or of another program."""
    if (run / "curve.csv").exists():
        steps, returns, _ = np.loadtxt(run / "curve.csv", delimiter=",", skiprows=1, ndmin=2).reshape(-1, 3).T
        return steps, returns
    return reference.training_returns(run)


HEAD = ["environment", "variant", "seeds", "mean", "std", "IQM", "low", "high", "worst", "seconds"]


def picture(name: Path, env_id: str, group: dict[str, list[Path]]) -> list[list]:
    """A line with its band for each variant; the rows of the table."""
    axes = (figure := Figure((6, 3.8), layout="constrained")).subplots()
    rows, last = [], 0.0
    for i, (variant, runs) in enumerate(group.items()):
        curves = [curve(run) for run in runs if list(run.glob("curve.csv")) or list(run.glob("*tfevents*"))]
        if curves := [c for c in curves if len(c[0])]:
            steps = np.linspace(0, max(c[0][-1] for c in curves), 100)
            lines = np.stack([smooth(steps, *c) for c in curves])
            whole = ~np.isnan(lines).any(0)
            axes.plot(steps[whole], iqm(lines[:, whole]), color=f"C{i}", label=variant)
            axes.fill_between(steps[whole], *interval(lines[:, whole], 2000), color=f"C{i}", alpha=0.2, linewidth=0)
            last = max(last, steps[-1])
        files = [run / "results.json" for run in runs if (run / "results.json").exists()]
        if results := [json.loads(file.read_text()) for file in files]:
            x = np.array([r["mean_reward"] for r in results])
            numbers = [x.mean(), x.std(ddof=min(1, len(x) - 1)), iqm(x), *interval(x), x.min()]
            seconds = np.median([r["training_seconds"] for r in results])
            rows.append([env_id, variant, len(x), *(f"{n:.2f}" for n in numbers), f"{seconds:.0f}"])
    axes.set(title=env_id, xlabel="steps", ylabel="training return")
    finish(axes, np.array([last or 1.0]))
    axes.legend(frameon=False, fontsize="small")
    (name / f"{env_id.replace('/', '-').replace(':', '-')}.png").write_bytes(png(figure, 150))
    return rows


def smooth(at: np.ndarray, steps: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """The mean return of each hundredth of the run, interpolated; NaN before the first episode ended."""
    parts = reference.learning_curve(steps.astype(int).clip(max=int(at[-1])), returns, int(at[-1]), len(at) - 1)
    return reference.fill(at, np.append(np.nan, parts))


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
