"""What a model knows, asked by lm-eval.

    scoring.py    log-likelihoods of continuations, packed       continuing.py  text until a stop string
    lm.py         both as lm-eval's `LM`                         corpus.py      questions made from the text that ships
    local.py      these as tasks of lm-eval, without network

Only `lm.py` and `local.py` know lm-eval, which the extra `eval` brings.
"""
