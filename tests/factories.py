"""Third-party worlds that want a few lines: each function makes one, and is registered at the end."""

import gymnasium as gym
from gymnasium.wrappers import GrayscaleObservation, ResizeObservation, TransformObservation


def health_gathering(**kwargs):
    """Four tics a step, the screen alone, small and grey: the game of the course's unit 8."""
    import vizdoom.gymnasium_wrapper  # noqa: F401

    env = gym.make("VizdoomHealthGathering-v1", frame_skip=4, **kwargs)
    env = TransformObservation(env, lambda obs: obs["screen"], env.observation_space["screen"])
    return GrayscaleObservation(ResizeObservation(env, (60, 80)))


def scalar(env_id, **kwargs):
    """Several objectives, weighed alike."""
    import mo_gymnasium

    return mo_gymnasium.wrappers.LinearReward(gym.make(f"mo_gymnasium:{env_id}", **kwargs))


gym.register("HealthGathering-v0", health_gathering)
for name in ("deep-sea-treasure-v0", "mo-lunar-lander-v3", "mo-mountaincar-v0"):
    gym.register(f"scalar/{name}", scalar, kwargs={"env_id": name})
