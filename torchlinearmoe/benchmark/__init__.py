"""`python -m torchlinearmoe.benchmark`: the project's figures on the user's own machine, beside its peers'.

One file a subcommand. Every contestant of a comparison runs in a process of its own, one after the other, in one
invocation, and prints a row of one table.
"""
