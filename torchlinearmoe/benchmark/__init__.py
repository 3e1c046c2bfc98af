"""`python -m torchlinearmoe.benchmark`: the project's figures on the user's own machine, beside its peers'.

One file a subcommand. Every contestant of a comparison runs in a process of its own, one after the other, in one
invocation, and prints a row of one table.

    train.py, train_*.py           training steps and who takes them; torchtitan_config.py
    profile.py                     where a step goes: labels.py, trace.py, categories.py, floors.py
    moe.py, loss.py, attention.py  parts of a step by backend, beside plain PyTorch: parts.py, parts_one.py
    optimizer.py, update_*.py      the update alone and who makes it
    data.py                        the loader: tokens a second of a core, and waits at a pace
    multi/                         every kind of parallelism on one host's GPUs
    contest.py, timing.py, rates.py
"""
