"""Questions made from the text that ships are about held-out text alone, have one right answer, and never change."""

import hashlib
import json

from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.harness.corpus import (
    FRACTION,
    held_out_chapters,
    last_word_documents,
    next_verse_documents,
    text_documents,
)


def test_the_chapters_are_those_that_training_holds_out(tmp_path) -> None:
    tokenizer = load_tokenizer()
    splits = open_splits(tokenizer=tokenizer, validation_fraction=FRACTION, cache=tmp_path)
    chapters = held_out_chapters()
    start = splits.validation.start
    ids = [start]
    for text in chapters:
        ids += [*tokenizer.encode(text), start]
    assert splits.validation.read(0, len(splits.validation)).tolist() == ids
    assert text_documents() == [{"text": text} for text in chapters]


def test_the_right_verse_follows_and_the_others_are_of_other_chapters() -> None:
    chapters = held_out_chapters()
    documents = next_verse_documents()
    assert len(documents) > 50 and {document["answer"] for document in documents} == {0, 1, 2, 3}
    for document in documents:
        (home,) = [text for text in chapters if document["context"] in text]
        right = document["choices"][document["answer"]]
        assert f"{document['context']}\n{right}" in home
        wrong = [choice for choice in document["choices"] if choice != right]
        assert len(wrong) == 3 and not any(choice in home.splitlines() for choice in wrong)


def test_the_last_word_is_what_the_text_says() -> None:
    chapters = "\n".join(held_out_chapters())
    documents = last_word_documents()
    assert len(documents) > 100
    for document in documents:
        assert f"{document['context']} {document['word']}" in chapters and len(document["word"]) > 2


def test_the_questions_are_those_of_every_machine_and_version() -> None:
    told = json.dumps([next_verse_documents(), last_word_documents()])
    assert hashlib.blake2b(told.encode(), digest_size=8).hexdigest() == "9fce2c8c01cc12d6"
