"""The recurrences of `reference/`, chunk-parallel in plain PyTorch: for the CPU, for autograd, for torch.compile.

A row of tokens is cut into fixed chunks. Inside a chunk all tokens meet in matmuls; between chunks only a summary
travels, S_out = A S_in + B, folded by a scan. Packed documents change no shape: they are masks. A token sees the
tokens of its own document only; the state that enters a chunk reaches only the document that the previous chunk ended
with; a chunk's summary keeps only the document that it ends with.

    layout.py       rows cut into chunks, and the masks of packed documents
    decay.py        products of decays as exponentials of sums that are never positive
    scan.py         the states that enter the chunks
    carry.py        reading those states and writing the summaries, the same for every family
    scalar.py       decays that are absent, constant, or one number per token and head
    diagonal.py     decays per channel
    delta.py        the delta rule, plain or with a decay per head; per channel: delta_channels.py
    dplr.py         diagonal plus low rank transitions
    quadratic.py    quadratic scores, second-order features for what passes between chunks
    convolution.py  the short convolution
    token_shift.py  the token before

Legend of the room: B rows, T tokens, H heads, M chunks a row, C tokens a chunk, K/V key/value head dim, N documents.
Inside the room tensors are heads first, [B, H, M, C, ...].
"""
