"""What is planned for, and what a plan is: a device, one way to run a call on it, and that way in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from .views import Tile

#: Bytes of each program's shared memory that CUDA keeps for itself.
SHARED_RESERVED = 1024
STRATEGIES = ("resident", "cluster", "cooperative", "blocked", "two_launch")


@dataclass(frozen=True)
class Device:
    """What the planner knows of a device. The defaults describe one that offers no more than it must."""

    name: str
    sms: int  # multiprocessors
    capability: int = 0  # CUDA compute capability, 90 for 9.0; 0 elsewhere
    triton: tuple[int, int] = (3, 6)
    registers: int = 65_536  # of 32 bits, per multiprocessor
    shared: int = 0  # bytes of shared memory that a program can have; 0: not known
    warp: int = 32  # threads
    l2: int = 0  # bytes; 0: not known
    waits: bool = True  # programs run side by side, and one may wait for another

    @property
    def clusters(self) -> bool:
        """Whether programs can share a tile. Triton 3.6 and 3.7 cannot compile their reductions."""
        return 90 <= self.capability < 120 and self.triton >= (3, 8)

    def co_resident(self, warps: int, registers: int, shared: int = 0) -> int:
        """How many programs of so many registers a thread, and bytes of shared memory, run at the same
        time; 0 if none may wait."""
        each = self.registers // (warps * self.warp * -(registers // -8) * 8)  # they are handed out by eight
        if self.shared:
            each = min(each, self.shared // (shared + SHARED_RESERVED))
        return self.sms * each if self.waits else 0


@dataclass(frozen=True)
class Plan:
    """One way to run one direction on one view."""

    strategy: str
    tile: Tile
    groups: int  # channel groups
    slots: int  # groups served at a time: programs along the channels
    splits: int  # programs along a channel
    num_warps: int
    registers: int  # of a thread, at most; on AMD a wish
    num_ctas: int = 1

    def options(self, device: Device) -> dict[str, int | bool]:
        """How Triton compiles and launches it."""
        options = {"num_warps": self.num_warps, "num_ctas": self.num_ctas, "enable_fp_fusion": True}
        if self.waits:
            options["launch_cooperative_grid"] = True
        if device.capability:  # told no number, ptxas spills a few registers to have more programs at a time
            options["maxnreg"] = self.registers
        return options

    @property
    def kept(self) -> bool:
        """Whether a tile stays in registers from the statistics to the end."""
        return self.strategy in ("resident", "cluster", "cooperative")

    @property
    def split(self) -> bool:
        """Whether the programs of a channel exchange partial results."""
        return self.strategy not in ("resident", "cluster")

    @property
    def waits(self) -> bool:
        """Whether programs wait for each other, and so must all run at the same time."""
        return self.strategy in ("cooperative", "blocked")

    @property
    def choice(self) -> Choice:
        """The numbers of this plan."""
        tile = self.tile
        numbers = (tile.block, tile.width, self.num_warps, self.num_ctas, self.slots, self.splits)
        return Choice(self.strategy, *numbers, tile.stages)


@dataclass(frozen=True)
class Choice:
    """A plan in a few numbers, of which other sizes of the same magnitude make plans, see limits.Problem."""

    strategy: str
    block: int  # rows, or vectors, per tile; a tile that holds a whole channel follows the sizes
    width: int  # elements of a row per tile; cooperative rows are a sector wide
    warps: int
    ctas: int = 1  # programs of a cluster
    slots: int = 1  # channel groups served at a time, at most
    splits: int = 1  # programs along a channel
    stages: int = 1  # tiles of a loop on their way at a time: from 2 on they wait in shared memory
