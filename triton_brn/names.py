"""Names under which other packages' batch renorm layers keep their state."""

from __future__ import annotations

from typing import Any

#: sb3-contrib's, by ours.
OF_STABLE_BASELINES = {
    "weight": "scale",
    "running_mean": "ra_mean",
    "running_var": "ra_var",
    "num_batches_tracked": "steps",
}


def understand(state_dict: dict[str, Any], prefix: str, eps: float, affine: bool) -> None:
    """Rename a layer's entries to ours, if they are sb3-contrib's or ludvb/batchrenorm's.

    The latter keeps ``running_std``, with an eps of its own in it; our standard deviation will equal it.
    """
    if prefix + "ra_mean" in state_dict:
        if not affine:  # it has both even so
            for name in ("scale", "bias"):
                state_dict.pop(prefix + name, None)
        for ours, theirs in OF_STABLE_BASELINES.items():
            if prefix + theirs in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
    if prefix + "running_std" in state_dict and prefix + "running_var" not in state_dict:
        std = state_dict.pop(prefix + "running_std")
        state_dict[prefix + "running_var"] = (std.square() - eps).clamp(min=0)
