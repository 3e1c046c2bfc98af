"""Megatron's files: the streams are those of a token folder with the same documents."""

import pickle
import struct
from typing import Any

import numpy as np
import pytest

from torchlinearmoe.data.fingerprint import fingerprint
from torchlinearmoe.data.megatron import MegatronStore, Special
from torchlinearmoe.data.splits import TokenStream, open_splits
from torchlinearmoe.data.store import write_store
from torchlinearmoe.errors import UserError

TEXTS = ["abc", "d", "efghij", "kl", "mnopqrstu", "vw", "xyz"] * 3
END = 26
CODES = {np.uint8: 1, np.int16: 3, np.int32: 4, np.int64: 5, np.uint16: 8}


def write_by_hand(prefix, documents, dtype: Any = np.uint16, cuts=None):
    """The bytes of the format's description. cuts: sequences of each document, one unless given."""
    sequences = [part for i, d in enumerate(documents) for part in np.array_split(np.array(d), (cuts or {}).get(i, 1))]
    firsts = np.cumsum([0, *((cuts or {}).get(i, 1) for i in range(len(documents)))])
    lengths = [len(sequence) for sequence in sequences]
    pointers = np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(firsts))
    index += np.array(lengths, "<i4").tobytes() + pointers.astype("<i8").tobytes() + firsts.astype("<i8").tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    prefix.with_name(prefix.name + ".bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    return prefix.with_name(prefix.name + ".idx")


def ids_of(tokenizer, end=False):
    return [tokenizer.encode(text) + [END] * end for text in TEXTS]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("begins", [False, True])
def test_streams_are_those_of_a_token_folder(tmp_path, letters, begun, dtype, end, begins):
    tokenizer = begun if begins else letters
    index = write_by_hand(tmp_path / "text_document", ids_of(tokenizer, end), dtype, cuts={2: 3, 4: 2})
    whole = write_store(tmp_path / "tokens", TEXTS, tokenizer)
    store = MegatronStore(index, Special.of(tokenizer))
    assert np.diff(store.offsets).tolist() == np.diff(whole.offsets).tolist()
    assert (store.num_documents, store.num_tokens) == (whole.num_documents, whole.num_tokens)
    want = whole.tokens.astype(int).tolist()
    for start in range(store.num_tokens):
        for stop in (start, start + 1, min(start + 4, len(want)), len(want)):
            assert store.read(start, stop).tolist() == want[start:stop], (start, stop)
    found, wanted = (open_splits([p], tokenizer=tokenizer, validation_fraction=0).train for p in (index, whole.folder))
    assert found.read(0, len(found)).tolist() == wanted.read(0, len(wanted)).tolist()
    a, b = found.samples(7), wanted.samples(7)
    assert [a[i].starts for i in range(len(a))] == [b[i].starts for i in range(len(b))]
    assert pickle.loads(pickle.dumps(store)).read(3, 9).tolist() == want[3:9]


def test_pairs_are_found_by_any_of_their_names_and_in_folders(tmp_path, letters):
    index = write_by_hand(tmp_path / "a.text_document", ids_of(letters))
    (tmp_path / "b.jsonl").write_text('{"text": "abc"}')
    lengths = []
    for path in (index, index.with_suffix(".bin"), tmp_path / "a.text_document"):
        splits = open_splits([path], tokenizer=letters, validation_fraction=0)
        lengths.append((splits.train.num_documents, len(splits.train), fingerprint(splits.stores)))
    assert lengths[0] == lengths[1] == lengths[2] and lengths[0][0] == 21
    splits = open_splits([tmp_path], tokenizer=letters, validation_fraction=0, cache=tmp_path / "cache")
    assert splits.train.num_documents == 22 and not splits.unknown


def test_whole_documents_are_held_out(tmp_path, letters):
    index = write_by_hand(tmp_path / "a", ids_of(letters, end=True), np.int32)
    splits = open_splits([index], tokenizer=letters, validation_fraction=0.4)
    parts = [
        "".join(chr(97 + i) if i < END else "|" for i in stream.read(0, len(stream))).strip("|").split("|")
        for stream in (splits.train, splits.validation)
    ]
    assert sorted(parts[0] + parts[1]) == sorted(TEXTS) and min(map(len, parts)) > 3


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("keys", [(0, 1 << 64), (1 << 61, 1 << 63)])
def test_borders_are_where_documents_begin(tmp_path, letters, end, keys):
    """Of token folders, of an index, and of both together; whatever is asked for."""
    index = write_by_hand(tmp_path / "a", ids_of(letters, end=end))
    folders = [write_store(tmp_path / name, TEXTS * 3, letters) for name in "bc"]
    stores = [folders[0], MegatronStore(index, Special.of(letters)), folders[1]]
    for stream in (TokenStream(stores[1:2], keys), TokenStream(stores, keys), TokenStream(stores).part(5, 90)):
        ids = stream.read(0, len(stream))
        wanted = np.flatnonzero(ids == END)
        wanted = wanted if stream.num_documents and wanted[0] == 0 else np.append(0, wanted)
        wanted = wanted if wanted[-1] == len(ids) - 1 else np.append(wanted, len(ids) - 1)
        for start in range(0, len(ids) - 1, 3):
            for stop in range(start + 1, len(ids), 5):
                low = np.searchsorted(wanted, start, side="right") - 1
                found = stream.borders(start, stop).tolist()
                assert found == wanted[low : np.searchsorted(wanted, stop) + 1].tolist(), (start, stop)


def test_damage_and_other_tokenizers_are_told(tmp_path, letters):
    index = write_by_hand(tmp_path / "a", [[1, 2, 99], [3]])
    with pytest.raises(UserError, match="a.idx: 99 is none of the 27 ids of data.tokenizer; name the tokenizer"):
        MegatronStore(index, Special.of(letters)).read(0, 4)
    whole = index.read_bytes()
    for damaged, why in (
        (whole[:20], "unpack requires"),
        (whole[:-5], "mmap length is greater than file size|mmap"),
        (b"X" + whole[1:], "version 1 and type 8 of the index are not known"),
        (whole[:17] + b"\x06" + whole[18:], "type 6 of the index"),
    ):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match=f"a.idx: not a Megatron index, or damaged: .*({why})") as error:
            open_splits([index], tokenizer=letters, validation_fraction=0)
        assert "\n" not in str(error.value)
    index.write_bytes(whole)
    index.with_suffix(".bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="the index tells of 4 tokens, a.bin has 1"):
        MegatronStore(index, Special.of(letters))


def test_files_of_megatron_core(tmp_path, letters):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    for text in TEXTS:
        builder.add_document(np.array([*letters.encode(text), END]), [len(text) + 1])
    builder.finalize(str(tmp_path / "a.idx"))
    found = open_splits([tmp_path / "a"], tokenizer=letters, validation_fraction=0).train
    whole = write_store(tmp_path / "tokens", TEXTS, letters)
    wanted = open_splits([whole.folder], tokenizer=letters, validation_fraction=0).train
    assert found.read(0, len(found)).tolist() == wanted.read(0, len(wanted)).tolist()
