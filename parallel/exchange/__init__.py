"""What forwards call on other ranks: sums and gathers of tensor parallelism, gathers of context parallelism, and what
they hand on. Nothing here knows a model; nothing of `parallel/` but this folder and `mesh.py` is imported by one.
"""
