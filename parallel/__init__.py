"""Meshes and every way to spread a model over them; `apply.py` is where the tour starts."""
