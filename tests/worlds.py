"""Worlds to measure with, named as any user's are: PYTHONPATH=tests python ppo.py --env-id worlds:CartPoleNoVel-v1

CartPoleNoVel-v1, PendulumNoVel-v1      Gymnasium's, with velocities hidden
MemoryS7-v0, MemoryS9-v0                MiniGrid's, its image alone (pip install minigrid)
ConnectFour-v0                          against a player who wins or blocks where one move does, else plays at random
Forbidden-v0                            80 choices, of which three at a time are allowed
UnnamedHopper-v0, ...                   known worlds under names that no preset knows, see UNNAMED
UnnamedEngines-v0, UnnamedParts-v0      LunarLander with two choices at once; with a Dict of observations
"""

import gymnasium as gym
import numpy as np


class Hide(gym.ObservationWrapper):
    """An observation of which only some numbers are shown."""

    def __init__(self, env, shown):
        super().__init__(env)
        space = env.observation_space
        self.shown = list(shown)
        self.observation_space = gym.spaces.Box(space.low[self.shown], space.high[self.shown], dtype=space.dtype.type)

    def observation(self, observation):
        return observation[self.shown]


class Image(gym.ObservationWrapper):
    """MiniGrid's view of 7 x 7 fields, three numbers each."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = env.observation_space["image"]

    def observation(self, observation):
        return observation["image"]


def hidden(env_id, shown, **kwargs):
    return Hide(gym.make(env_id, **kwargs), shown)


def memory(size, **kwargs):
    import minigrid  # noqa: F401 registers its worlds

    return Image(gym.make(f"MiniGrid-MemoryS{size}-v0", **kwargs))


# The time limit is that of the world inside
gym.register("CartPoleNoVel-v1", hidden, kwargs={"env_id": "CartPole-v1", "shown": [0, 2]})
gym.register("PendulumNoVel-v1", hidden, kwargs={"env_id": "Pendulum-v1", "shown": [0, 1]})
for size in (7, 9):
    gym.register(f"MemoryS{size}-v0", memory, kwargs={"size": size})


class Forbidden(gym.Env):
    """Of 80 choices three are allowed at each step; 1 for the one that the observation tells, 0 for the others.

    After sb3-contrib's InvalidActionEnvDiscrete, whose choices are worth nothing but to be allowed. A choice that is
    not allowed ends the episode."""

    observation_space, action_space = gym.spaces.Box(0, 1, (80,)), gym.spaces.Discrete(80)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.look()

    def step(self, action):
        allowed, good = self.mask[action], action == self.best
        self.t += 1
        obs, info = self.look()
        return obs, float(good), not allowed, self.t == 100, info

    def look(self):
        allowed = self.np_random.choice(80, 3, replace=False)
        self.best = allowed[0]
        self.mask = np.isin(np.arange(80), allowed).astype(np.int8)
        obs = np.zeros(80, np.float32)
        obs[self.best] = 1
        return obs, {"action_mask": self.mask}

    def action_masks(self):
        return self.mask.astype(bool)


class ConnectFour(gym.Env):
    """Seven columns, six high; four in a row win. 1 for a win, -1 for a defeat, 0 for a full board.

    The opponent wins if one move does, else blocks if one move of ours would win, else plays at random. Either begins
    half of the games. A full column is forbidden; to choose it all the same loses."""

    observation_space = gym.spaces.Box(0, 1, (2 * 42,))  # ours, theirs
    action_space = gym.spaces.Discrete(7)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.board = np.zeros((2, 6, 7), dtype=bool)
        if self.np_random.integers(2):
            self.answer()
        return self.look()

    def step(self, action):
        if not self.action_masks()[action]:
            return *self.end(-1.0), {"action_mask": self.action_masks().astype(np.int8)}
        if self.play(0, action):
            return *self.end(1.0), self.look()[1]
        if not self.action_masks().any():
            return *self.end(0.0), self.look()[1]
        if self.answer():
            return *self.end(-1.0), self.look()[1]
        obs, info = self.look()
        return obs, 0.0, not self.action_masks().any(), False, info

    def end(self, reward):
        return self.look()[0], reward, True, False

    def play(self, who, column):
        """Put a piece there; whether it makes four."""
        row = self.board.any(0)[:, column].sum()
        self.board[who, row, column] = True
        return self.four(self.board[who], row, column)

    def answer(self):
        free = np.flatnonzero(self.action_masks())
        for who in (1, 0):  # win, or else block
            for column in free:
                row = self.board.any(0)[:, column].sum()
                mine = self.board[who].copy()
                mine[row, column] = True
                if self.four(mine, row, column):
                    return self.play(1, column)
        return self.play(1, self.np_random.choice(free))

    @staticmethod
    def four(mine, row, column):
        for dr, dc in (0, 1), (1, 0), (1, 1), (1, -1):
            length = 1
            for sign in (1, -1):
                r, c = row + sign * dr, column + sign * dc
                while 0 <= r < 6 and 0 <= c < 7 and mine[r, c]:
                    length, r, c = length + 1, r + sign * dr, c + sign * dc
            if length >= 4:
                return True
        return False

    def look(self):
        return self.board.reshape(-1).astype(np.float32), {"action_mask": self.action_masks().astype(np.int8)}

    def action_masks(self):
        return ~self.board.any(0)[-1]


class Engines(gym.ActionWrapper):
    """LunarLander whose main engine is off or on, and whose side engines are left, off or right, chosen at once."""

    action_space = gym.spaces.MultiDiscrete([2, 3])

    def action(self, action):
        return np.array([2.0 * action[0] - 1, action[1] - 1.0], np.float32)


class Parts(gym.ObservationWrapper):
    """LunarLander's numbers by what they are."""

    def __init__(self, env):
        super().__init__(env)
        two = gym.spaces.Box(-np.inf, np.inf, (2,))
        names = {"place": two, "speed": two, "turn": two}
        self.observation_space = gym.spaces.Dict(names | {"legs": gym.spaces.MultiBinary(2)})

    def observation(self, observation):
        place, speed, turn, legs = observation.reshape(4, 2)
        return {"place": place, "speed": speed, "turn": turn, "legs": legs.astype(np.int8)}


gym.register("Forbidden-v0", Forbidden)
gym.register("ConnectFour-v0", ConnectFour)
gym.register("UnnamedEngines-v0", lambda: Engines(gym.make("LunarLander-v3", continuous=True)))
gym.register("UnnamedParts-v0", lambda: Parts(gym.make("LunarLander-v3")))

UNNAMED = [
    "CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3", "LunarLanderContinuous-v3", "Pendulum-v1",
    "MountainCarContinuous-v0", "BipedalWalker-v3", "Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Ant-v5",
    "Swimmer-v5", "Reacher-v5", "FrozenLake-v1", "InvertedPendulum-v5", "Pusher-v5", "CarRacing-v3",
]  # fmt: skip
for env_id in UNNAMED:
    spec = gym.spec(env_id)
    gym.register(f"Unnamed{spec.name}-v0", spec.entry_point, max_episode_steps=spec.max_episode_steps,
                 kwargs=dict(spec.kwargs))  # fmt: skip
