"""10^12 tokens in 10^4 sparse shards are opened by their manifest and few windows, and read with few files open."""

import json
import os
import resource
import time

import numpy as np
import pytest

from torchlinearmoe.data import store
from torchlinearmoe.data.fingerprint import fingerprint
from torchlinearmoe.data.splits import open_splits

SHARDS, TOKENS, DOCUMENTS = 10_000, 10**8, 10**5


@pytest.fixture
def folder(tmp_path, letters):
    """Every shard is a link to the same one, whose tokens are a hole in the disk but for the markers."""
    one = tmp_path / "one"
    one.mkdir()
    lengths = TOKENS // DOCUMENTS
    np.save(one / "offsets.npy", np.arange(0, TOKENS + 1, lengths, dtype=np.int64))
    np.save(one / "keys.npy", np.arange(DOCUMENTS, dtype=np.uint64) << np.uint64(44))
    with (one / "tokens.npy").open("wb") as file:
        header = {"descr": "<u2", "fortran_order": False, "shape": (TOKENS,)}
        np.lib.format.write_array_header_1_0(file, header)
        at = file.tell()
        file.truncate(at + 2 * TOKENS)
        for place in range(0, TOKENS, TOKENS // 50):
            file.seek(at + 2 * place)
            file.write(np.array([letters.end_of_text], "<u2").tobytes())
    folder = tmp_path / "out"
    (folder / "shards").mkdir(parents=True)
    known = {"documents": DOCUMENTS, "tokens": TOKENS, "checksums": {"keys.npy": "k", "offsets.npy": "o"}}
    names = [f"{number:06}-000" for number in range(SHARDS)]
    for name in names:
        os.symlink(one, folder / "shards" / name)
    described = {"format": 1, "end_of_text": letters.end_of_text, "begin_of_text": None, "vocab_size": 27}
    described |= {"tokenizer_fingerprint": letters.fingerprint, "tokenizer": "letters"}
    manifest = {"format": 1, "store": described, "shards": [{"name": name, **known} for name in names], "summary": {}}
    (folder / "prepared.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_many_shards_open_by_their_manifest_and_few_are_open_at_once(folder, letters, packing):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        splits = open_splits([folder], tokenizer=letters, validation_fraction=0, packing=packing)
        samples = splits.train.samples(2048)
        assert len(splits.train) == 10**12 + 1
        # Two documents of 1,000 tokens fit into a sequence.
        assert len(samples) == (10**12 // 2048 if packing == "concatenate" else pytest.approx(10**9 / 2, rel=0.001))
        assert splits.train.num_documents == 10**9 == fingerprint(splits.stores).documents
        opening = time.process_time() - begun
        order = samples.order(0)
        for place in range(1000):
            samples[order[place]]
        if packing == "best_fit":
            assert (samples[12345].starts, samples[12345].filled) == ([0, 1000, 2000], 2000)
        else:
            assert samples[0].tokens[0] == letters.end_of_text
        assert opening < 10, opening
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 300 * 1024, "in kB"
        assert len(store._opened) <= store.MOST_OPEN
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
