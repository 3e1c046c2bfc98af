"""Strange recipes, command lines, data, tokenizers, templates, checkpoints and `config.json`: one line, or they work.

    python tests/fuzz/fuzz.py --seed 1 --count 10000

A case is a sound file with something wrong in it, read as the commands read it. It must come out well or as a
UserError of one line, and soon; anything else is printed with the case's number, which `--only NUMBER` runs again.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

# The repository before `tests/`, whose `torchlinearmoe` would stand in for the package.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from seals import reseal

from torchlinearmoe import build_model, load_model
from torchlinearmoe.checkpoint import CheckpointManager
from torchlinearmoe.checkpoint.huggingface.exporting import export_checkpoint
from torchlinearmoe.checkpoint.huggingface.importing import import_directory
from torchlinearmoe.checkpoint.model import checkpoint_template, checkpoint_tokenizer, model_files
from torchlinearmoe.data.chat import Chat
from torchlinearmoe.data.chat_template import parse_template
from torchlinearmoe.data.conversations import open_conversations
from torchlinearmoe.data.messages import Message
from torchlinearmoe.data.splits import open_splits
from torchlinearmoe.data.store import write_store
from torchlinearmoe.data.tokenizer import load_tokenizer
from torchlinearmoe.errors import UserError
from torchlinearmoe.models.decoder import Decoder
from torchlinearmoe.recipe import dump, load_recipe, resolve
from torchlinearmoe.recipe.parse import flatten

SECONDS = 20
"""A case may take."""
STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 10**6, 10**12, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.5, 1e-320, 1e30, 1e400),
    *("", " ", "x", "\0", "\n", "\x1b[2J", "~nosuchuser", "../..", "/dev/zero", "é" * 300, "nan", "0", "[1", "auto"),
    *([], [1], ["x"], [[]], {}, {"x": 1}, {"content": "</s>"}, [0] * 50),
]
MODEL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "vocab_size": 1024, "layout": "LN"}
TABLES: dict[str, Any] = {
    "model": {**MODEL, "mixer": "gla"},
    "moe": {"num_experts": 4, "top_k": 2, "hidden_size": 16},
    "training": {"steps": 3, "sequence_length": 32, "tokens_per_step": 64},
}
LETTERS = "abcdefghijklmnopqrstuvwxyz ."


class TooLong(BaseException):
    """A case that did not end in time."""


class Fuzz:
    """The cases, each a function of the seed and its number."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.kinds: list[Callable[[random.Random, Path], None]] = [
            *(self.recipe, self.command_line, self.text, self.conversations, self.token_folder),
            *(self.tiktoken, self.hugging_face_tokenizer, self.template, self.checkpoint, self.config),
        ]
        recipe = resolve(TABLES)
        self.values = flatten(recipe)
        self.keys = [key for key in self.values if not key.startswith("mixer.") or key.startswith("mixer.gla.")]
        self.recipe_text = dump(recipe)
        files = model_files(recipe, load_tokenizer())
        CheckpointManager(folder / "made", keep=1).save(1, build_model(recipe.model), None, {}, files, blocking=True)
        self.saved = folder / "made" / "step-1"
        softmax = resolve({**TABLES, "model": {**MODEL, "layout": "N"}})
        files = model_files(softmax, load_tokenizer())
        CheckpointManager(folder / "soft", keep=1).save(1, build_model(softmax.model), None, {}, files, blocking=True)
        export_checkpoint(folder / "soft" / "step-1", folder / "published")
        write_store(folder / "tokens", (self.words(random.Random(i)) for i in range(9)), load_tokenizer())

    def run(self, number: int) -> str | None:
        """Run a case; None where it came out as it should, else what happened."""
        chooser = random.Random(f"{self.seed}/{number}")
        kind = self.kinds[number % len(self.kinds)]
        with TemporaryDirectory(dir=self.folder) as folder:
            try:
                with _limit():
                    kind(chooser, Path(folder))
            except UserError as error:
                if "\n" in str(error):
                    return f"{number} {kind.__name__}: more than one line: {error}"
            except TooLong:
                return f"{number} {kind.__name__}: not done after {SECONDS} s"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                return f"{number} {kind.__name__}: {''.join(traceback.format_exception(error))}"
        return None

    @staticmethod
    def words(chooser: random.Random) -> str:
        return "".join(chooser.choices(LETTERS, k=chooser.randint(5, 90)))

    # what is read

    def recipe(self, chooser: random.Random, folder: Path) -> None:
        (folder / "recipe.toml").write_bytes(spoil_toml(self.recipe_text, chooser))
        self._build(load_recipe(folder / "recipe.toml"))

    def command_line(self, chooser: random.Random, folder: Path) -> None:
        (folder / "recipe.toml").write_text(self.recipe_text)
        overrides = []
        for _ in range(chooser.randint(1, 3)):
            key = chooser.choice(self.keys)
            value = toml(plausible(toml(self.values[key]), chooser))
            if chooser.random() < 0.2:
                value = chooser.choice([chooser.choice(STRANGE), toml(chooser.choice(STRANGE)), "9" * 5000])
            said = f"{key}={value}"
            overrides.append(said if chooser.random() < 0.9 else chooser.choice([f"--{key}", f"x{said}", "--"]))
        self._build(load_recipe(folder / "recipe.toml", overrides))

    def _build(self, recipe: Any) -> None:
        if recipe.model.num_layers <= 8 and recipe.model.moe.num_experts <= 64:
            with torch.device("meta"):
                Decoder(recipe.model)

    def text(self, chooser: random.Random, folder: Path) -> None:
        suffix = chooser.choice([".jsonl", ".txt", ".json"])
        lines = [self.words(chooser) for _ in range(12)]
        sound = "<|endoftext|>".join(lines) if suffix == ".txt" else "\n".join(json.dumps({"text": x}) for x in lines)
        (folder / f"a{suffix}").write_bytes(spoil_bytes(spoil_json_lines(sound, chooser).encode(), chooser))
        if chooser.random() < 0.2:
            (folder / f"b{chooser.choice(['.txt', '.bin'])}").symlink_to(chooser.choice(["nowhere", ".", "b.txt"]))
        split = chooser.choice(["documents", "tokens"])
        tokenizer = load_tokenizer()
        splits = open_splits(
            [folder], tokenizer=tokenizer, validation_fraction=chooser.choice([0, 0.2]), split=split, cache=folder / "c"
        )
        samples = splits.train.samples(16, tail=True)
        for index in range(len(samples)):
            samples[index]

    def conversations(self, chooser: random.Random, folder: Path) -> None:
        entries = [{"prompt": self.words(chooser), "response": "Yes."} for _ in range(8)]
        sound = "\n".join(json.dumps(entry) for entry in entries)
        (folder / "a.jsonl").write_bytes(spoil_bytes(spoil_json_lines(sound, chooser).encode(), chooser))
        template = parse_template('user = "Q {content}\\n"\nsystem = "{content}"\nassistant = "A {content}{end}"', "t")
        splits = open_conversations(
            [folder], tokenizer=load_tokenizer(), chat=Chat(template), validation_fraction=0, cache=folder / "c"
        )
        samples = splits.train.samples(64)
        for index in range(len(samples)):
            samples[index]

    def token_folder(self, chooser: random.Random, folder: Path) -> None:
        shutil.copytree(self.folder / "tokens", folder / "tokens")
        self._spoil_file(folder / "tokens", chooser)
        splits = open_splits([folder / "tokens"], tokenizer=load_tokenizer(), validation_fraction=0)
        samples = splits.train.samples(16, tail=True)
        for index in range(len(samples)):
            samples[index]

    def tiktoken(self, chooser: random.Random, folder: Path) -> None:
        tokens = [*(letter.encode() for letter in LETTERS), b"ab", b"abc", b"th", b"the"]
        file = folder / "t.tiktoken"
        sound = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
        options = {"pattern": r"\w+|\s|\.", "special_tokens": {"<|endoftext|>": 90, "<s>": 91}, "begin_of_text": "<s>"}
        file.write_text(sound)
        neighbour = json.dumps(options).encode()
        if chooser.random() < 0.5:
            file.write_bytes(spoil_bytes(sound.encode(), chooser))
        else:
            neighbour = spoil_json(options, chooser)
        (folder / "t.tiktoken.json").write_bytes(neighbour)
        self._use(file, chooser)

    def hugging_face_tokenizer(self, chooser: random.Random, folder: Path) -> None:
        import tokenizers

        vocabulary = {
            letter: rank for rank, letter in enumerate(["<s>", "</s>", *LETTERS.replace(" ", "Ġ"), "ab", "abc"])
        }
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b"), ("ab", "c")]))
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        model.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore
        model.add_special_tokens(["<s>", "</s>"])
        described, config = json.loads(model.to_str()), {"eos_token": "</s>", "bos_token": "<s>"}
        first, second = json.dumps(described).encode(), json.dumps(config).encode()
        if chooser.random() < 0.6:
            first = spoil_json(described, chooser)
        else:
            second = spoil_json(config, chooser)
        (folder / "tokenizer.json").write_bytes(first)
        (folder / "tokenizer_config.json").write_bytes(second)
        self._use(folder, chooser)

    def _use(self, path: Path, chooser: random.Random) -> None:
        tokenizer = load_tokenizer(path)
        for text in (self.words(chooser), "", *(["Z\u4e00\U0001f600"] if chooser.random() < 0.2 else [])):
            tokenizer.decode(tokenizer.encode_batch([text])[0])
        assert 0 <= tokenizer.start < tokenizer.vocab_size and tokenizer.end_of_text < tokenizer.vocab_size

    def template(self, chooser: random.Random, folder: Path) -> None:
        text = (
            'end = "<|im_end|>"\nsystem = "{content}{end}"\nuser = "U {content}{end}"\nassistant = "A {content}{end}"\n'
        )
        (folder / "chat_template.toml").write_bytes(spoil_bytes(spoil_toml(text, chooser), chooser))
        (folder / "recipe.toml").write_text(self.recipe_text)
        template = checkpoint_template(folder)
        template.encode([Message("user", "Hi"), Message("assistant", "Yes.")], load_tokenizer())

    def checkpoint(self, chooser: random.Random, folder: Path) -> None:
        copy = folder / "step-1"
        shutil.copytree(self.saved, copy)
        name = self._spoil_file(copy, chooser)
        if name != "state.json" and chooser.random() < 0.7:  # somebody meant it
            reseal(copy)
        load_model(copy)
        checkpoint_tokenizer(copy)

    def config(self, chooser: random.Random, folder: Path) -> None:
        copy = folder / "published"
        shutil.copytree(self.folder / "published", copy)
        if chooser.random() < 0.3:
            self._spoil_file(copy, chooser)
        else:
            file = copy / chooser.choice(["config.json", "config.json", "generation_config.json"])
            file.write_bytes(spoil_json(json.loads(file.read_text()), chooser))
        import_directory(copy, folder / "imported")
        load_model(folder / "imported")

    def _spoil_file(self, folder: Path, chooser: random.Random) -> str:
        file = chooser.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        content = file.read_bytes()
        if file.suffix == ".json" and chooser.random() < 0.7:
            spoiled = spoil_json(json.loads(content), chooser)
        elif file.suffix == ".toml" and chooser.random() < 0.7:
            spoiled = spoil_toml(content.decode(), chooser)
        else:
            spoiled = spoil_bytes(content, chooser, always=True)
        file.write_bytes(spoiled)
        return file.name


# what is wrong


def spoil_bytes(content: bytes, chooser: random.Random, always: bool = False) -> bytes:
    """Cut, flipped, doubled, or with something in it."""
    if not always and chooser.random() < 0.4:
        return content
    place = chooser.randrange(len(content) + 1)
    junk = chooser.choice([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"[" * 3000, chooser.randbytes(30), b""])
    return chooser.choice(
        [
            content[:place],
            content[:place] + junk + content[place:],
            junk + content,
            content[:place] + bytes([chooser.randrange(256)]) + content[place + 1 :],
            content + content[place:],
        ]
    )


def spoil_json(value: Any, chooser: random.Random) -> bytes:
    """A JSON value with something else at one place of it."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []
    _walk(value, places)
    for _ in range(chooser.randint(1, 2)):
        owner, key = chooser.choice(places)
        if chooser.random() < 0.2 and isinstance(owner, dict):
            owner.pop(key, None)
        elif isinstance(owner, dict) or key < len(owner):
            owner[key] = chooser.choice(STRANGE)
    if chooser.random() < 0.05:
        return b"[" * 100_000
    if chooser.random() < 0.05:
        return json.dumps(chooser.choice(STRANGE)).encode()
    return json.dumps(value).encode()


def _walk(value: Any, places: list[tuple[Any, Any]]) -> None:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        places.append((value, key))
        _walk(value[key], places)


def spoil_json_lines(text: str, chooser: random.Random) -> str:
    """Lines of JSON of which one may hold something else; other text as it is."""
    lines = text.split("\n")
    if not text.startswith("{") or chooser.random() < 0.4:
        return text
    index = chooser.randrange(len(lines))
    lines[index] = spoil_json(json.loads(lines[index]), chooser).decode()
    return "\n".join(lines)


def spoil_toml(text: str, chooser: random.Random) -> bytes:
    """A line or two with another value, gone, or twice."""
    lines = text.splitlines()
    for _ in range(chooser.randint(1, 2)):
        index = chooser.randrange(len(lines))
        key, _, value = lines[index].partition(" = ")
        if value and chooser.random() < 0.7:
            lines[index] = f"{key} = {toml(plausible(value, chooser))}"
        else:
            others = [f"{key} = {toml(chooser.choice(STRANGE))}", "", key, lines[index] + "\n" + lines[index]]
            lines[index] = chooser.choice([*others, f"x{key} = 1", f"{key} = {'9' * 5000}"])
    return "\n".join(lines).encode()


def plausible(value: str, chooser: random.Random) -> Any:
    """Another value of the kind that TOML spells so."""
    if value in ("true", "false"):
        return chooser.random() < 0.5
    if value[:1] in ('"', "'"):
        return chooser.choice(["auto", "none", "N", "LLN", "gla", "mamba2", "mom_gla", "bias", "full", "heads", "x"])
    if value[:1] == "[":
        return chooser.choice([[], [0.9, 0.95], [1, 2], ["gla", "rwkv7"], ["nowhere"]])
    whole = [0, 1, 2, 3, 4, 5, 8, 16, 48, 64, 1000, -1]
    return chooser.choice([*(whole if "." not in value and "e" not in value else []), 0.0, 0.25, 0.5, 1.0, 2.5, 1e-9])


def toml(value: Any) -> str:
    """A value as TOML writes it, more or less."""
    if value is None:
        return "nan"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, float):
        return "inf" if value == float("inf") else repr(value)
    return json.dumps(value)


@contextmanager
def _limit() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--only", type=int, help="the number of one case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), options.seed)
        numbers = range(options.count) if options.only is None else [options.only]
        found = [told for number in numbers if (told := fuzz.run(number))]
    print("\n".join([*found, f"{len(found)} of {len(numbers)} cases came out badly"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
