"""Runs as pictures: `run.py` reads what a run wrote, `legend.py` says in what runs differ, `figures.py` draws.

Only `figures.py` knows matplotlib, which the extra `plot` brings.
"""
