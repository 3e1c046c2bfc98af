"""The recurrences on other people's GPU kernels, and the choice between them and our own.

    call.py       what is known about a call before anything is computed
    guards.py     which backend may not take which call on which machine, and why
    choose.py     "auto", explicit names, and the record of what was chosen
    borders.py    packed documents as those kernels want them: borders on device and host, or rows of one length
    fla.py        flash-linear-attention (the package fla-core)
    mamba_ssm.py  mamba-ssm's state space dual scan

The packages are imported when a call needs them, never before. What may enter: code that turns one of our operators
into one of theirs. What may not: mathematics of our own; that is `chunked/`.

Under torch.compile each adapter is one graph break. A custom operator would avoid the break but cannot keep another
library's autograd graph, so that its backward would have to run the forward kernels again, about a third of their time;
nothing could be fused across an opaque kernel anyway, so the break costs two launches and no fusion.
"""
