"""The definitions: every recurrence token by token in plain PyTorch, for any dtype.

Nothing here is fast and nothing here is clever. The faster backends are tested against these functions, and a reader
who wants to know what an operator computes reads them first.
"""
