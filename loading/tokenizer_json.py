"""tokenizer.json, through the `tokenizers` package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models

from loading.checkpoint_files import CheckpointError, JsonObject
from loading.special_tokens import (
    MARK,
    AddedEntry,
    ParseSpecial,
    added_tokens,
    other_id_error,
)


@contextmanager
def tokenizer_errors(path: Path, doing: str) -> Iterator[None]:
    """Whatever goes wrong inside is raised as CheckpointError: "cannot <doing>".

    `tokenizers` raises bare Exceptions, and where a file makes no sense its Rust code may panic.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, Exception) or is_panic:
            raise CheckpointError(path, f"cannot {doing} ({error})") from None
        raise


class TokenizerJson:
    """A tokenizer.json.

    vocab       {token: id}, of the added tokens, too
    special     {special token: the way in which it is added}
    plain_size  the highest id + 1, without added tokens
    first       the ids that the file writes in front of a text
    own_names   the tokens that the file itself names: {"bos_token": "<s>"}
    own_bos     the id of its own BOS; None if it does not say

    Raises CheckpointError.
    """

    def __init__(self, path: Path, config: JsonObject, special: set[str], family: str):
        """config: tokenizer_config.json; special: tokens it calls special; family: a model_type."""
        values = JsonObject.read(path).values
        # Some files carry those of their training.
        values["truncation"] = None
        values["padding"] = None
        with tokenizer_errors(path, "be read as a tokenizer"):
            apply_add_prefix_space(values, config, family)
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
            self._add_tokens(path, config, special)
            plain_vocab = self.tokenizer.get_vocab(with_added_tokens=False)
            self.plain_size = max(plain_vocab.values(), default=-1) + 1
            self.vocab: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
            self.first = self._find_first()
        if not set(self.first) <= set(self.vocab.values()):
            problem = f"writes the tokens {self.first}, which are not all in the vocabulary"
            raise CheckpointError(path, f"its post-processor {problem}")
        self.special: dict[str, AddedToken] = {}
        for token in self.tokenizer.get_added_tokens_decoder().values():
            if token.special:
                self.special[token.content] = token
        self.own_names: dict[str, str] = {}
        self.own_bos: int | None = None

    def _add_tokens(self, path: Path, config: JsonObject, special: set[str]):
        """Add the tokens of other files, and make those special that they call so."""
        vocab = self.tokenizer.get_vocab()
        decoder = self.tokenizer.get_added_tokens_decoder()
        known = {token.content: token for token in decoder.values()}
        entries = {name: AddedEntry(vocab[name], {}) for name in special if name in vocab}
        entries |= added_tokens(config)
        # In order of their ids, as a new one gets the next id that is free.
        for name, entry in sorted(entries.items(), key=lambda item: item[1].id):
            if name in known and not entry.flags:
                token = known[name]
            else:
                token = AddedToken(name, **entry.flags)
            if name in special:
                token.special = True
            self.tokenizer.add_tokens([token])
            if self.tokenizer.token_to_id(name) != entry.id:
                raise other_id_error(config, name, entry.id, path.name)

    def _find_first(self) -> list[int]:
        """The ids that the post-processor writes in front of a text.

        Post-processors are of many kinds, so it is given a text of one word to see what it writes.
        """
        if self.tokenizer.post_processor is None:
            return []
        probe = tokenizers.Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
        probe.post_processor = self.tokenizer.post_processor
        written = probe.encode("word")
        # The text is sequence 0, and what is written around it belongs to none.
        start_of_text = written.sequence_ids.index(0)
        return written.ids[:start_of_text]

    def encode(self, text: str, parse: ParseSpecial) -> list[int]:
        """Text to ids."""
        if parse is ParseSpecial.MARKED:
            tokenizer, special_ids = self._marked
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            return [special_ids.get(i, i) for i in ids]
        # This setting of `tokenizers` has special tokens read as text.
        self.tokenizer.encode_special_tokens = parse is ParseSpecial.NEVER
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def _marked(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer for which the special tokens are text, and tokens with MARK in front are not.

        And {the id of a token with MARK in front: that of the special token}.
        """
        copy = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        copy.encode_special_tokens = True
        for name, token in self.special.items():
            marked = AddedToken(
                MARK + name, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False
            )
            copy.add_tokens([marked])
        vocab = copy.get_vocab()
        return copy, {vocab[MARK + name]: self.vocab[name] for name in self.special}

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def apply_add_prefix_space(values: dict, config: JsonObject, family: str):
    """Have a text get a space in front or not, as tokenizer_config.json's add_prefix_space says.

    values, those of a tokenizer.json, are changed as the tokenizer's class in transformers does it.
    The classes of Mistral and Phi-3 leave the file as it is, and so does a file without a class.
    """
    own_class = "Qwen2Tokenizer" if family.startswith("qwen") else ""
    class_name = config.get("tokenizer_class", str, own_class)
    wish = config.get("add_prefix_space", bool, None)
    if wish is None or family in ("mistral", "phi3"):
        return
    pre_tokenizer = values.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    if byte_level and class_name.startswith(("Qwen2Tokenizer", "GPT2Tokenizer")):
        byte_level[0]["add_prefix_space"] = wish
    elif not byte_level and class_name.startswith(("LlamaTokenizer", "CodeLlamaTokenizer")):
        use_metaspace(values, wish, legacy=config.get("legacy", bool, False))


def use_metaspace(values: dict, add_prefix_space: bool, legacy: bool):
    """Put SentencePiece's way with spaces, "▁", into a tokenizer.json in place of its own."""
    if not add_prefix_space:
        scheme = "never"
    elif legacy:
        scheme = "always"
    else:
        scheme = "first"
    values["normalizer"] = None
    values["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": False,
    }
    steps: list[dict] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if add_prefix_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    values["decoder"] = {"type": "Sequence", "decoders": steps}
