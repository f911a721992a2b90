"""Third-party worlds that want a few lines: each function makes one, and is registered at the end."""

import cv2
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import TransformObservation


def health_gathering(**kwargs):
    """Four tics a step, the screen small and grey, and health, 0 to 1: the game of the course's unit 8."""
    import vizdoom.gymnasium_wrapper  # noqa: F401

    def see(obs):
        grey = cv2.cvtColor(obs["screen"], cv2.COLOR_RGB2GRAY)
        return {"screen": cv2.resize(grey, (80, 60), interpolation=3), "health": obs["gamevariables"] / 100}

    env = gym.make("VizdoomHealthGathering-v1", frame_skip=4, **kwargs)
    return TransformObservation(env, see, Dict(screen=Box(0, 255, (60, 80), np.uint8), health=Box(0, 2, (1,))))


def scalar(env_id, **kwargs):
    """Several objectives, weighed alike."""
    import mo_gymnasium

    return mo_gymnasium.wrappers.LinearReward(gym.make(f"mo_gymnasium:{env_id}", **kwargs))


gym.register("HealthGathering-v0", health_gathering)
for name in ("deep-sea-treasure-v0", "mo-lunar-lander-v3", "mo-mountaincar-v0"):
    gym.register(f"scalar/{name}", scalar, kwargs={"env_id": name})
