"""tokenizer.json files, made here with the `tokenizers` library."""

import json
import sys

import pytest

tokenizers = pytest.importorskip("tokenizers")

from torchlinearmoe.data.sources import find_sources, read_documents  # noqa: E402
from torchlinearmoe.data.tokenizer import DEFAULT_PATTERN, load_tokenizer  # noqa: E402
from torchlinearmoe.data.tokenizer.huggingface import byte_level_alphabet  # noqa: E402

TEXTS = ["And the light shineth in darkness;", "naïve 日本語 🜂", " two  spaces\n\nlines", "<|endoftext|>", "<eos> x"]


def byte_level(vocabulary=None, merges=None, special="<|endoftext|>"):
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(DEFAULT_PATTERN), behavior="isolated")
    byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte])
    model.decoder = tokenizers.decoders.ByteLevel()
    if vocabulary is None:
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=list(byte_level_alphabet()), special_tokens=[special], show_progress=False
        )
        model.train_from_iterator(list(read_documents(find_sources().files))[:20], trainer)
    return model


def sentencepiece_like():
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    model.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    model.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    model.add_special_tokens(["<unk>", "</s>"])
    return model


def save(model, folder, config=None):
    model.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_text_comes_back_also_id_by_id(tmp_path, make):
    tokenizer = load_tokenizer(save(make(), tmp_path))
    for text in [*TEXTS, "</s>"]:
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == text.encode()
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_special_tokens_and_the_template_add_nothing(tmp_path):
    model = byte_level()
    bos = model.token_to_id("<|endoftext|>")
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    model.enable_truncation(4)
    tokenizer = load_tokenizer(save(model, tmp_path) / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert bos not in tokenizer.encode(TEXTS[0])
    assert tokenizer.decode([bos]) == "<|endoftext|>"


def test_the_same_ids_as_tiktoken_on_the_corpus(tmp_path, tokenizer):
    """The shipped ranks as a tokenizer.json: merges follow from the ranks."""
    letter_of = {byte: letter for letter, byte in byte_level_alphabet().items()}
    spell = {rank: "".join(letter_of[b] for b in tokenizer.decode_bytes([rank])) for rank in range(1023)}
    ranks = {spelled: rank for rank, spelled in spell.items()}
    merges = []
    for rank in range(256, 1023):
        # The merge that made a token joins the two parts the older merges leave of it.
        parts = list(spell[rank])
        for left, right in merges:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i : i + 2] = [left + right]
                i += 1
        assert len(parts) == 2
        merges.append(tuple(parts))
    model = byte_level(ranks, merges)
    model.add_special_tokens(["<|endoftext|>"])
    other = load_tokenizer(save(model, tmp_path))
    texts = [*list(read_documents(find_sources().files))[:60], *TEXTS]
    assert other.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert (other.vocab_size, other.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)


@pytest.mark.parametrize("written", ["<eos>", {"content": "<eos>", "special": True}])
def test_end_of_text_from_the_config(tmp_path, written):
    model = byte_level()
    model.add_special_tokens(["<eos>"])
    tokenizer = load_tokenizer(save(model, tmp_path, {"eos_token": written}))
    assert tokenizer.end_of_text == model.token_to_id("<eos>") != model.token_to_id("<|endoftext|>")
    assert tokenizer.vocab_size == model.get_vocab_size()


@pytest.mark.parametrize("config", [None, {}, {"eos_token": None}])
def test_end_of_text_from_well_known_names(tmp_path, config):
    model = byte_level(special="</s>")
    assert load_tokenizer(save(model, tmp_path, config)).end_of_text == model.token_to_id("</s>")


def test_unknown_end_of_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no end-of-text token; set eos_token in .*tokenizer_config.json"):
        load_tokenizer(save(byte_level(special="<other>"), tmp_path))
    with pytest.raises(ValueError, match="eos_token = '<no>' is not in the vocabulary"):
        load_tokenizer(save(byte_level(), tmp_path, {"eos_token": "<no>"}))
    for key in ("eos_token", "bos_token", "pad_token"):
        with pytest.raises(ValueError, match=rf"{key} = \['a'\]: must be a string, or an object with one under"):
            load_tokenizer(save(byte_level(), tmp_path, {key: ["a"]}))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json: not a JSON object"):
        load_tokenizer(tmp_path)


def test_text_that_a_vocabulary_would_drop_is_named(tmp_path):
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2}
    tokenizer = load_tokenizer(save(byte_level(vocabulary, []), tmp_path))
    assert tokenizer.encode("abba") == [1, 2, 2, 1]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["ab", text])):
        with pytest.raises(ValueError, match="tokenizer.json: no id for 'c', which the text holds; take it out"):
            encode("abc")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a Hugging Face tokenizer") as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
    model = byte_level()
    model.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match="tokenizer.json: its decoder is neither"):
        load_tokenizer(save(model, tmp_path))


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    save(byte_level(), tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install torchlinearmoe\[hf\]"):
        load_tokenizer(tmp_path)
