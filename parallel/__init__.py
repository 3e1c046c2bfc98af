"""Meshes and every way to spread a model over them; `apply.py` is where the tour starts.

`exchange/` and `mesh.py` lie below the model, whose forwards call the former; all else is done to a built model.
"""
