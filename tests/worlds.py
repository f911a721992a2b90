"""Worlds to measure with, named as any user's are: PYTHONPATH=tests python ppo.py --env-id worlds:CartPoleNoVel-v1

CartPoleNoVel-v1, PendulumNoVel-v1      Gymnasium's, with velocities hidden
MemoryS7-v0, MemoryS9-v0                MiniGrid's, its image alone (pip install minigrid)
"""

import gymnasium as gym


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
