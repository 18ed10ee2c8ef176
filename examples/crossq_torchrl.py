"""torchrl's CrossQLoss: its own Batch Renorm layers, and ours put in their place by one line.

    pip install '.[examples]'
    python examples/crossq_torchrl.py            # half a minute on one core
    python examples/crossq_torchrl.py --quick    # a short run

The loss keeps two critics as one module with stacked weights and statistics, and calls them by
`torch.func.vmap`: in training mode for its critic loss, in inference mode for its actor loss. Here they learn
from random transitions of a small linear system that is to be steered to its origin. The one line is
`convert_batchrenorm(critic)`.
"""

from __future__ import annotations

import argparse
import time

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, set_interaction_type
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import (
    BatchRenorm1d,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import CrossQLoss

from triton_brn import convert_batchrenorm

STATE, ACTION, WIDTH, BATCH = 4, 2, 64, 256
STEERING = torch.tensor([[0.5, 0.0, 0.3, 0.0], [0.0, 0.5, 0.0, -0.3]])


class Critic(nn.Module):
    """Q(state, action) with a batch renorm before each linear layer."""

    def __init__(self, warmup: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [BatchRenorm1d(STATE + ACTION, warmup_steps=warmup)]
        for inputs in (STATE + ACTION, WIDTH):
            layers += [nn.Linear(inputs, WIDTH), nn.ReLU(), BatchRenorm1d(WIDTH, warmup_steps=warmup)]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, 1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """(N, STATE) and (N, ACTION) to (N, 1)."""
        return self.layers(torch.cat([state, action], -1))


def move(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """The next state, and the reward: minus its squared distance from the origin."""
    after = 0.95 * state + action @ STEERING
    return after, -after.square().sum(-1, keepdim=True)


def transitions(count: int) -> TensorDict:
    """Random states and actions, and what follows."""
    state, action = torch.randn(count, STATE), 2 * torch.rand(count, ACTION) - 1
    after, reward = move(state, action)
    never = torch.zeros(count, 1, dtype=torch.bool)
    following = {"observation": after, "reward": reward, "done": never, "terminated": never}
    return TensorDict({"observation": state, "action": action, "next": following}, [count])


def make_loss(ours: bool, warmup: int) -> CrossQLoss:
    """The loss and the networks in it."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(STATE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2 * ACTION), NormalParamExtractor()
    )
    actor = ProbabilisticActor(
        TensorDictModule(body, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-torch.ones(ACTION), torch.ones(ACTION), (ACTION,)),
        distribution_class=TanhNormal,
    )
    critic = Critic(warmup)
    if ours:
        convert_batchrenorm(critic)
    loss = CrossQLoss(actor, ValueOperator(critic, in_keys=["observation", "action"]))
    loss.make_value_estimator(gamma=0.9)
    return loss


def train(loss: CrossQLoss, steps: int) -> float:
    """Adam on random batches. Returns the milliseconds of CPU time a step took on average."""
    data = transitions(8 * BATCH)
    actor = [p for name, p in loss.named_parameters() if name.startswith("actor_network")]
    others = [p for name, p in loss.named_parameters() if not name.startswith("actor_network")]
    groups = [{"params": actor, "lr": 5e-4}, {"params": others, "lr": 2e-3}]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999))
    start = time.process_time()
    for _ in range(steps):
        losses = loss(data[torch.randint(len(data), (BATCH,))])
        optimizer.zero_grad()
        (losses["loss_qvalue"] + losses["loss_actor"] + losses["loss_alpha"]).backward()
        optimizer.step()
    return (time.process_time() - start) / steps * 1e3


@torch.no_grad()
def mean_reward(loss: CrossQLoss | None) -> float:
    """Of the actor's most likely actions, or of random ones, over 20 moves from 500 states."""
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(500, STATE, generator=generator)
    total = 0.0
    for _ in range(20):
        action = 2 * torch.rand(500, ACTION, generator=generator) - 1
        if loss is not None:
            with (
                set_interaction_type(InteractionType.DETERMINISTIC),
                loss.actor_network_params.to_module(loss.actor_network),
            ):
                action = loss.actor_network(TensorDict({"observation": state}, [500]))["action"]
        state, reward = move(state, action)
        total += reward.mean().item() / 20
    return total


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print rewards and times. Returns the mean rewards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args(arguments)
    steps = 60 if options.quick else options.steps

    found = {"random actions": mean_reward(None)}
    print(f"mean reward of 20 moves\n    random actions          {found['random actions']:7.2f}")
    for name in ("torchrl", "triton_brn"):
        loss = make_loss(name == "triton_brn", warmup=steps // 2)
        milliseconds = train(loss, steps)
        found[name] = mean_reward(loss)
        print(f"    {steps} steps, {name:10}  {found[name]:7.2f}   {milliseconds:6.2f} ms a step", flush=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
