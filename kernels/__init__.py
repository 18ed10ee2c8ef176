"""Device code: Triton kernels and nothing else.

``forward.py`` and ``backward.py`` hold one kernel body each, ``inference.py`` the forward with running
statistics; ``tile.py`` says where a tile lies in memory, ``statistics.py`` is Algorithm 1 per channel.
"""
