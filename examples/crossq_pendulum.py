"""CrossQ of sb3-contrib on Pendulum: its own Batch Renorm layers, and ours put in their place by one line.

    pip install '.[examples]'
    python examples/crossq_pendulum.py            # 2 seeds each: 5 minutes on one core
    python examples/crossq_pendulum.py --quick    # a short run

CrossQ has no target networks; what keeps it stable is batch renormalisation in actor and critics, whose
layers are in training mode for some calls of an update and not for others (`set_bn_training_mode`). The one
line is `convert_batchrenorm(model.policy)`. Returns end within the noise between seeds of each other: -150
is as good as Pendulum gets on average, -1200 is what a random policy reaches.
"""

from __future__ import annotations

import argparse
import time
from statistics import mean, median

import torch
from sb3_contrib import CrossQ
from stable_baselines3.common.evaluation import evaluate_policy

from triton_brn import convert_batchrenorm

LAYERS = ("sb3-contrib", "triton_brn")


def agent(layers: str, seed: int, width: int, warmup: int) -> CrossQ:
    """A new agent; the layers correct towards their running statistics after ``warmup`` updates."""
    model = CrossQ(
        "MlpPolicy",
        "Pendulum-v1",
        seed=seed,
        device="cpu",
        policy_kwargs={"net_arch": [width, width], "renorm_warmup_steps": warmup},
    )
    if layers == "triton_brn":
        convert_batchrenorm(model.policy)
    return model


def learn(model: CrossQ, steps: int, episodes: int) -> float:
    """Train. Returns the mean return of so many episodes after each of the last four eighths of the steps."""
    found = []
    for eighth in range(8):
        model.learn(steps // 8, reset_num_timesteps=eighth == 0)
        if eighth >= 4:
            found.append(evaluate_policy(model, model.get_env(), episodes)[0])
    return float(mean(map(float, found)))


def update_times(agents: dict[str, CrossQ], turns: int) -> dict[str, float]:
    """Median milliseconds of a training update. The agents take turns: other load meets both."""
    times: dict[str, list[float]] = {layers: [] for layers in agents}
    for _ in range(turns):
        for layers, model in agents.items():
            start = time.perf_counter()
            model.train(gradient_steps=6, batch_size=model.batch_size)
            times[layers].append((time.perf_counter() - start) / 6 * 1e3)
    return {layers: median(values) for layers, values in times.items()}


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Print returns and times. Returns the mean return of each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, a small network, few steps")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6_000)
    options = parser.parse_args(arguments)
    seeds, steps, width = (1, 240, 32) if options.quick else (options.seeds, options.steps, 256)

    returns: dict[str, list[float]] = {layers: [] for layers in LAYERS}
    for seed in range(seeds):
        agents = {}
        for layers in LAYERS:
            agents[layers] = agent(layers, seed, width, warmup=steps // 4)
            value = learn(agents[layers], steps, 1 if options.quick else 10)
            returns[layers].append(value)
            print(f"seed {seed}, {steps} steps, {layers:12} mean return {value:8.1f}", flush=True)
    print("\nlayers        mean return   an update")
    for layers, milliseconds in update_times(agents, 5 if options.quick else 50).items():
        print(f"{layers:12}  {mean(returns[layers]):11.1f}  {milliseconds:7.2f} ms")
    return returns


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
