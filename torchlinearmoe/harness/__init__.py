"""What a model knows, asked by lm-eval.

    scoring.py    log-likelihoods of continuations, packed       continuing.py  text until a stop string
    lm.py         both as lm-eval's `LM`                         corpus.py      questions made from the text that ships
    local.py      these as tasks of lm-eval, without network
    tasks.py      tasks by their names                      asking.py      what lm-eval finds
    training.py   the same of a model in training           whole.py       that model, put together

Only `lm.py`, `local.py`, `tasks.py` and `asking.py` know lm-eval, which the extra `eval` brings.
"""
