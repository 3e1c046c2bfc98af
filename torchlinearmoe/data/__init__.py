"""From text on disk to the micro-batches of a data rank.

    tokenizer/     text <-> ids                         sources.py   files -> documents
    store.py       documents -> a folder of token ids   splits.py    training and held-out token streams
    shared.py      one rank's token folders, read by all
    packing.py     stream -> samples -> micro-batches   order.py     which sample comes when
    conversations.py, chat_template.py                  the same from messages: packed whole, responses trained
    recall.py      associative recall, made as it is read: packed whole, answers trained
    loader.py      the micro-batches of one data rank   baselines.py what a count of bigrams would score

Here live ids and borders on the host; nothing here knows a model or a mesh. A data rank is a number given from outside.
"""
