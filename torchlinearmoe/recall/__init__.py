"""Associative recall against the size of the state: a sweep over mixers, widths and learning rates, many small models.

    settings.py   what is asked, and how models are trained      cases.py     which models, and what tells them apart
    learn.py      one model: trained, asked, measured            results.py   what is known so far, on disk
    published.py  figures of others                              __main__.py  the command

The documents are those of `data/recall.py`; the picture is drawn by `plotting/`.
"""
