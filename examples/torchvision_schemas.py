"""torchvision from PyPI beside a torch for the CPU: let it be imported.

PyPI's Linux builds of torchvision are for CUDA. Beside a torch without CUDA their C++ operators do not
load, and then `import torchvision` (and so timm's) fails with "operator torchvision::nms does not exist".
Networks need none of these operators; that they are declared is enough.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_library: torch.library.Library | None = None  # what it declares goes when it goes


def declare() -> None:
    """Declare the two operators that importing torchvision asks for, where they do not load."""
    global _library
    spec = importlib.util.find_spec("torchvision")
    if _library is not None or spec is None or spec.origin is None:
        return
    binaries = [p for p in Path(spec.origin).parent.glob("_C.*") if p.suffix in (".so", ".pyd")]
    try:
        for binary in binaries:
            torch.ops.load_library(binary)
    except OSError:
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
