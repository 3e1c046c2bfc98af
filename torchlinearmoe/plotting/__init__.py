"""Runs as pictures: `run.py` reads what a run wrote, `legend.py` says in what runs differ, `figures.py` draws;
`tradeoff.py` draws what a sweep of recall found.

Only these two know matplotlib, which the extra `plot` brings.
"""
