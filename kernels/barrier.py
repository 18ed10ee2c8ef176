"""How the programs of a launch meet: each arrives at a word, and the last one opens it for the others.

A word counts arrivals in its low 16 bits and openings in the rest, so that one atomic tells a program
whether it is the last, and what the word will be once it is open. Opening it also sets the arrivals back
to zero: nothing needs clearing between launches, and nothing comes from the host, where a captured graph
would freeze it.
"""

import triton
import triton.language as tl

#: Programs that can meet at a word, at most.
MOST = tl.constexpr(65_535)
#: Triton 3.9 spins on a load; before, only an atomic may be repeated without a race.
POLL = tl.constexpr(hasattr(tl, "atomic_poll"))


@triton.jit
def arrive(word):
    """Arrive, and return the word as it was. Who comes last sees everything that the others wrote before."""
    tl.debug_barrier()  # the release below is one thread's: first all warps must be here
    return tl.atomic_add(word, 1, sem="acq_rel")


@triton.jit
def is_last(found, expected):
    """Whether the program that ``found`` this when it arrived was the last of ``expected``."""
    return (found & MOST) == expected - 1


@triton.jit
def opened(found):
    """The word once it is open."""
    return (found | MOST) + 1


@triton.jit
def release(word, found):
    """Open the word; who waits sees everything that this program wrote before."""
    tl.debug_barrier()
    tl.atomic_xchg(word, opened(found), sem="release")


@triton.jit
def wait(word, found):
    """Wait until the word is open."""
    if POLL:
        tl.atomic_poll(word, opened(found), sem="acquire")
    else:
        while tl.atomic_add(word, 0, sem="acquire") != opened(found):
            pass
