"""What the chunk-parallel forms of the recurrences have in common, in plain PyTorch: for the CPU, for autograd, for
torch.compile.

A stream of tokens is cut into fixed chunks. Inside a chunk all tokens meet in matmuls; between chunks only a summary
travels, S_out = A S_in + B, folded by a scan. Packed documents change no shape: they are masks. A token sees the
tokens of its own document only; the state that enters a chunk reaches only the document that the previous chunk ended
with; a chunk's summary keeps only the document that it ends with.

    layout.py        the stream cut into chunks, and the masks of its documents
    decay.py         products of decays as exponentials of sums that are never positive
    scan.py          the states that enter the chunks
    carry.py         reading those states and writing the summaries, the same for every family
    scalar_decay.py  decays that are absent, constant, or one number per token and head
    channels.py      decays per channel, by halving.py or subblocks.py
    solve.py         the triangular systems of the delta rules

Legend of the room: T tokens, H heads, M chunks, C tokens a chunk, K/V key/value head dim, N segments. Inside the room
tensors are heads first, [1, H, M, C, ...].
"""
