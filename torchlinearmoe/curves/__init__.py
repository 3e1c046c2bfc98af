"""Learning curves on real text: every mixer in the same trunk, for the same tokens in the same order.

    text.py      where the text comes from           settings.py  how models are trained
    cases.py     which models                        learn.py     one model: trained, measured
    peer.py      flash-linear-attention's own models results.py   what is known so far, on disk
    __main__.py  the command

The picture is drawn by `plotting/`.
"""
