"""torchrl's CrossQLoss: vmap over stacked critics that train, with our layers for its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_brn import BatchRenorm1d

torchrl = pytest.importorskip("torchrl.modules", reason="torchrl is not installed")


class Critic(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(norm(5), nn.Linear(5, 16, bias=False), norm(16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([observation, action], -1))


def crossq(norm: Callable[[int], nn.Module], **options: Any) -> Any:
    from torchrl.data import Bounded
    from torchrl.modules.tensordict_module.actors import ProbabilisticActor, ValueOperator
    from torchrl.modules.tensordict_module.common import SafeModule
    from torchrl.objectives.crossq import CrossQLoss

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 8, bias=False), norm(8), nn.ReLU(), nn.Linear(8, 4), torchrl.NormalParamExtractor()
    )
    actor = ProbabilisticActor(
        module=SafeModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-torch.ones(2), torch.ones(2), (2,)),
        distribution_class=torchrl.TanhNormal,
    )
    critic = ValueOperator(module=Critic(norm), in_keys=["observation", "action"])
    return CrossQLoss(actor, critic, num_qvalue_nets=2, **options)


def batch() -> Any:
    from tensordict import TensorDict

    entries = {
        "observation": torch.randn(16, 3) * 2 + 1,
        "action": torch.rand(16, 2) * 2 - 1,
        ("next", "done"): torch.zeros(16, 1, dtype=torch.bool),
        ("next", "terminated"): torch.zeros(16, 1, dtype=torch.bool),
        ("next", "reward"): torch.randn(16, 1),
        ("next", "observation"): torch.randn(16, 3) * 2 + 1,
    }
    return TensorDict(entries, [16])


def trained(norm: Callable[[int], nn.Module], **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of three steps, and the state after them."""
    loss = crossq(norm, **options)
    optimizer = torch.optim.SGD(loss.parameters(), 0.05)
    torch.manual_seed(1)
    losses = []
    for _ in range(3):
        found = loss(batch())
        terms = [found[k] for k in ("loss_actor", "loss_qvalue", "loss_alpha")]
        optimizer.zero_grad()
        sum(terms).backward()
        optimizer.step()
        losses += [t.detach() for t in terms]
    return losses, {n: t.detach() for n, t in loss.state_dict().items()}


@pytest.mark.filterwarnings("ignore")  # tensordict's
@pytest.mark.parametrize(
    ("backend", "deactivate_vmap"),
    [("eager", False), ("eager", True), ("triton", False)],
    indirect=["backend"],
)
def test_as_with_their_own_layers(deactivate_vmap: bool, backend: str) -> None:
    """Losses, parameters, statistics and counters of every critic and of the actor."""

    def ours(features: int) -> nn.Module:
        return BatchRenorm1d(features, r_max=3.0, d_max=5.0, momentum=0.1, running_average="var")

    def theirs(features: int) -> nn.Module:
        return torchrl.BatchRenorm1d(features, warmup_steps=0, momentum=0.1)

    losses, state = trained(ours, deactivate_vmap=deactivate_vmap)
    expected, expected_state = trained(theirs)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)
    counters = [t for n, t in state.items() if n.endswith("num_batches_tracked")]
    assert [t.tolist() for t in counters] == [6, [3, 3], [3, 3]]  # the actor acts on two batches a step
