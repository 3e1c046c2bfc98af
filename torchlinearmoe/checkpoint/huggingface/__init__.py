"""Weights in and out: Hugging Face directories.

    directory.py   config.json and safetensors on disk     config.py     config.json <-> [model] and [moe]
    weights.py     a directory's tensors by our names      own.py        this project's own architecture
    importing.py   directory -> checkpoint                 exporting.py  checkpoint -> directory

How a family spells its keys and tensors is declared in the family's file. `modeling_torchlinearmoe.py` is copied into
exported directories and imported by transformers, never from here.
"""
