"""What an optimizer step does to every element: its definition in PyTorch, and one pass over all tensors in Triton.

    halves.py       a float32 master as a bfloat16 weight and the 16 bits that it lacks
    rounding.py     float32 to bfloat16 by chance, unbiased; the chance is a pure function of place and step
    definition.py   the update of one tensor, whatever its types: the oracle
    blocks.py       many tensors as one list of blocks, for kernels that take them all in one launch
    triton.py       norms, sums over micro-batches and the update, each in one launch

Nothing here knows about models, meshes or recipes; tensors are plain and local.
"""
