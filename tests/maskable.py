"""sb3-contrib's MaskablePPO beside ppo.py: the same worlds with action masks, the same settings, as many steps.

    pip install sb3-contrib && python tests/maskable.py

ppo.py's scores are those of its rows in runs/reference (`tests/reference.py --envs worlds:Forbidden-v0 ...`). Each of
MaskablePPO's goes to runs/reference/maskable/<world>-seed<k>.json, means of 100 greedy episodes; those that are there
are not run again. From all of them follows runs/reference/maskable.md.
"""

import json
import time

import gymnasium as gym
import numpy as np
import reference
import worlds  # noqa: F401

ROWS = [row for row in reference.ROWS if row.env_id in ("worlds:Forbidden-v0", "worlds:ConnectFour-v0")]
FOLDER = reference.REFERENCE / "maskable"
EPISODES = 100


def maskable(row: reference.Row, seed: int) -> dict:
    """Train and score MaskablePPO with the settings of a row."""
    import torch
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.evaluation import evaluate_policy
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    args, name = reference.parse_args(row.command), row.env_id.removeprefix("worlds:")
    model = MaskablePPO(
        "MlpPolicy", make_vec_env(name, args.num_envs, seed=seed), seed=seed, device="cpu",
        n_steps=args.num_steps, batch_size=args.batch_size // args.num_minibatches, n_epochs=args.update_epochs,
        learning_rate=args.learning_rate, gamma=args.gamma, gae_lambda=args.gae_lambda, clip_range=args.clip_coef,
        ent_coef=args.ent_coef, vf_coef=args.vf_coef, max_grad_norm=args.max_grad_norm,
        policy_kwargs=dict(net_arch=list(args.hidden_sizes), activation_fn=torch.nn.Tanh),
    )  # fmt: skip
    assert args.activation == "tanh" and not args.anneal_lr and not args.clip_vloss and not args.norm_reward
    started = time.perf_counter()
    model.learn(row.steps)
    seconds = time.perf_counter() - started
    returns = evaluate_policy(model, gym.make(name), EPISODES, return_episode_rewards=True)[0]
    return {"mean_reward": float(np.mean(returns)), "std_reward": float(np.std(returns)), "training_seconds": seconds}


def scores(paths) -> str:
    """The mean over seeds, the seeds, and the median of the seconds, as cells of a table."""
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not found:
        return "not run | |"
    means = [r["mean_reward"] for r in found]
    seconds = np.median([r["training_seconds"] for r in found])
    return f"{np.mean(means):.2f} | {', '.join(f'{x:.2f}' for x in means)} | {seconds:.0f} s"


def page() -> str:
    lines = []
    for row in ROWS:
        name, seeds = row.env_id.removeprefix("worlds:"), range(1, row.seeds + 1)
        who = [(f"`ppo.py`, {row.label}", reference.reference_folder(row))]
        who += [("MaskablePPO", FOLDER)] if row.label == "masks" else []
        for program, folder in who:
            paths = [folder / f"{f'{name}-' if folder == FOLDER else ''}seed{seed}.json" for seed in seeds]
            lines.append(f"| {name} | {row.steps // 1000}k | {program} | {scores(paths)} |")
    return HEAD + "\n".join(lines) + "\n"


HEAD = """# Masks, beside MaskablePPO

`ppo.py` and sb3-contrib's MaskablePPO, at the same settings and steps; means of 100 greedy episodes. Forbidden has 80
choices, three of which are allowed at a time; ConnectFour is played against one who wins or blocks where a single move
does, and plays at random elsewhere: 1 for a win, -1 for a defeat. Both are in `tests/worlds.py`; their settings are in
`ROWS` of `tests/reference.py`. `ppo.py` is scored by its best checkpoint, MaskablePPO by its last agent. Made by
`python tests/maskable.py`; training on one core of a busy machine, `ppo.py`'s on one two to three times slower.

| world | steps | program | score | seeds | training |
|:--|--:|:--|--:|:--|--:|
"""

if __name__ == "__main__":
    for row in ROWS:
        if row.label == "masks":
            for seed in range(1, row.seeds + 1):
                path = FOLDER / f"{row.env_id.removeprefix('worlds:')}-seed{seed}.json"
                if not path.exists():
                    result = maskable(row, seed)
                    FOLDER.mkdir(parents=True, exist_ok=True)
                    reference.write_file(path, result)
                    print(
                        f"{path.stem:24} {result['mean_reward']:9.2f}  {result['training_seconds']:.0f} s", flush=True
                    )
    reference.write_file(FOLDER.parent / "maskable.md", page().encode())
