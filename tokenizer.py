"""Text to ids and back: Tokenizer(folder) reads a checkpoint's tokenizer and its chat template.

    tokenizer.json                                     in the format of the `tokenizers` package, or else
    tokenizer.model, tokenizer.model.v3                in SentencePiece's
    tokenizer_config.json, special_tokens_map.json, added_tokens.json,
    generation_config.json, config.json,
    chat_template.jinja, additional_chat_templates/    optional: special tokens, chat templates

Whatever is wrong is raised as CheckpointError: one line that names the file and the key.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import sentencepiece
import tokenizers

from chat_template import changed, own_tokens, render
from checkpoint_files import CheckpointError, JsonObject, read_file

MARK = "\ufdd0"  # one of the characters that Unicode sets aside for a program's own use, never to be part of a text

@contextmanager
def _tokenizing(path: Path, doing: str) -> Iterator[None]:
    """`tokenizers` raises bare Exceptions, and where a file makes no sense its Rust code may panic."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(path, f"cannot {doing} ({error})") from None
        raise


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of these tokens, as a group: the longest one where several begin."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(tokens, key=len, reverse=True))) or '(?!)'})")  # (?!): nothing


def _added_tokens(config: JsonObject) -> dict[str, tuple[int, bool]]:
    """Tokens -> (id, special), of tokenizer_config.json's added_tokens_decoder and of added_tokens.json; whose ids must agree."""
    added: dict[str, tuple[int, bool]] = {}
    old = JsonObject.read(config.path.with_name("added_tokens.json"), optional=True)
    try:
        listed = [(token, int(i), False) for token, i in old.values.items()]
        listed += [(d["content"], int(i), bool(d.get("special"))) for i, d in config.get("added_tokens_decoder", dict, {}).items()]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        raise CheckpointError(config.path, "or added_tokens.json: not a table of added tokens") from None
    for token, i, special in listed:
        if not isinstance(token, str) or i < 0 or added.get(token, (i,))[0] != i:
            raise CheckpointError(config.path, f"or added_tokens.json: the added token {token!r:.80} has two ids, or a bad one")
        added[token] = i, special
    return added


class _TokenizerJson:
    """tokenizer.json, through the `tokenizers` package.

    encode_marked, here and below: special tokens are parsed where MARK stands in front of them and nowhere else.
    """

    def __init__(self, path: Path, config: JsonObject):
        values = JsonObject.read(path).values
        values |= {"truncation": None, "padding": None}  # some files carry their training's
        post = values.get("post_processor") or {}
        with _tokenizing(path, "be read as a tokenizer"):
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
            for token, (i, special) in sorted(_added_tokens(config).items(), key=lambda item: item[1]):
                if self.tokenizer.token_to_id(token) is None:
                    self.tokenizer.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
                if self.tokenizer.token_to_id(token) != i:
                    raise config.error("added_tokens_decoder", f"or added_tokens.json gives {token!r:.80} the id {i}, unlike {path.name}")
            self.plain_size = max(self.tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
            self.vocab: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
            templates = [p["single"] for p in post.get("processors", [post]) if p.get("type") == "TemplateProcessing"]
            first = [template[0]["SpecialToken"]["id"] for template in templates if "SpecialToken" in template[0]]
            self.bos = {self.vocab[token] for token in first}
        self.adds_bos, self.eos = bool(self.bos), set[int]()
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        self.tokenizer.encode_special_tokens = not parse_special
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        tokenizer, ids = self._marked
        return [ids.get(i, i) for i in tokenizer.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _marked(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A copy with new tokens that are the special ones, each with MARK in front, and their ids -> the special ids."""
        copy, added = tokenizers.Tokenizer.from_str(self.tokenizer.to_str()), self.tokenizer.get_added_tokens_decoder()
        copy.encode_special_tokens = True  # the special ones are text, the new ones are not
        for i in self.special.values():
            options = {"lstrip": added[i].lstrip, "rstrip": added[i].rstrip, "normalized": False}
            copy.add_tokens([tokenizers.AddedToken(MARK + added[i].content, **options)])
        vocab = copy.get_vocab()
        return copy, {vocab[MARK + token]: i for token, i in self.special.items()}

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class _SentencePiece:
    """tokenizer.model, through SentencePiece. Tokens that the JSON files beside it add count as special."""

    adds_bos = True

    def __init__(self, path: Path, config: JsonObject):
        try:
            proto = read_file(path) or b"empty"  # no bytes at all would pass for a model
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise CheckpointError(path, f"cannot be read as a SentencePiece model ({error})") from None
        size = self.model.get_piece_size()
        self.vocab = {self.model.id_to_piece(i): i for i in range(size)}
        self.bos, self.eos = {self.model.bos_id()} - {-1}, {self.model.eos_id()} - {-1}
        self.special = {t: i for t, i in self.vocab.items() if self.model.is_control(i) or self.model.is_unknown(i)}
        for token, (i, _) in _added_tokens(config).items():
            if self.vocab.get(token, i) != i:
                raise config.error("added_tokens_decoder", f"or added_tokens.json gives {token!r:.80} the id {i}, unlike {path.name}")
            if i >= size or token not in self.vocab:  # new, or another name for a piece
                self.special[token] = i
        self.plain_size, self.legacy = size, config.get("legacy", bool, True)
        self.vocab |= self.special

    def encode(self, text: str, parse_special: bool) -> list[int]:
        return self._encode(text, self.special) if parse_special else self.model.encode(text)

    def encode_marked(self, text: str) -> list[int]:
        return self._encode(text, {MARK + token: i for token, i in self.special.items()})

    def _encode(self, text: str, special: dict[str, int]) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(any_of(special).split(text)):
            ids += [special[part]] if part in special else self._after(part) if number and not self.legacy else self.model.encode(part)
        return ids

    def _after(self, text: str) -> list[int]:
        """Text that is not the first: where tokenizer_config.json has legacy: false, it gets no space in front."""
        return self.model.encode(MARK + text)[len(self.model.encode(MARK)) :] if text else []

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class Tokenizer:
    """A checkpoint's tokenizer, from tokenizer.json or else SentencePiece's tokenizer.model, and its chat template.

    Attributes: vocab_size (highest id + 1), plain_size (the same without the tokens that were added to a vocabulary, such as
    one for padding, which a model may have no embedding for), bos_id (None if there is none), eos_ids (a set: any of them ends a text).
    Raises CheckpointError.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        files = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
        config, older, generation, model = (JsonObject.read(folder / name, optional=True) for name in files)
        config.values = older.values | config.values
        self.path = folder / "tokenizer.json"
        if os.path.lexists(self.path):
            self._backend: _TokenizerJson | _SentencePiece = _TokenizerJson(self.path, config)
        else:
            paths = [folder / name for name in ("tokenizer.model", "tokenizer.model.v3")]  # v3: as Mistral names it
            found = [path for path in paths if os.path.lexists(path)]
            if not found:
                raise CheckpointError(folder, "has no tokenizer.json and no tokenizer.model")
            self.path = found[0]
            self._backend = _SentencePiece(self.path, config)
        tokens = {i: token for token, i in self._backend.vocab.items()}
        special = set(self._backend.special.values())
        self.vocab_size, self.plain_size = max(tokens, default=-1) + 1, self._backend.plain_size
        self._shown = {i: token for i, token in tokens.items() if i not in special}  # what decode() does not drop

        # EOS: the first that names any. BOS: generation_config.json says nothing about it.
        named = self._named(config, "eos_token")
        numbered = self._numbered(generation, "eos_token_id") or self._numbered(model, "eos_token_id")
        self.eos_ids = numbered or named or self._backend.eos
        bos = self._named(config, "bos_token") or self._numbered(model, "bos_token_id") or self._backend.bos
        self.bos_id = min(bos, default=None)
        self._add_bos = config.get("add_bos_token", bool, self._backend.adds_bos)
        if self._add_bos and self.bos_id is None:
            raise CheckpointError(self.path, "BOS is to be added to a text, but no file says which token it is")

        # what a chat template may name
        self._template_tokens, ids = {}, {"bos_token": bos, "eos_token": named or self.eos_ids}
        for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
            token = config.values.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token := token or tokens.get(min(ids.get(name, ()), default=-1)):
                self._template_tokens[name] = str(token)
        template = config.values.get("chat_template")
        listed = [{"name": "default", "template": template}] if isinstance(template, str) else template or []
        try:
            self._templates = {t["name"]: (config.path, "" + t["template"]) for t in listed}
        except (KeyError, TypeError):
            raise config.error("chat_template", "is neither a string nor a list of named templates") from None
        for path in (folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))):
            if os.path.lexists(path):
                try:
                    self._templates["default" if path.parent == folder else path.stem] = path, read_file(path).decode("utf-8")
                except ValueError as error:
                    raise CheckpointError(path, f"cannot be read ({error})") from None

    def _named(self, config: JsonObject, key: str) -> set[int]:
        """The id of a token that a file names: a string, or an object with the string as its content."""
        token = config.values.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not token:
            return set()
        if not isinstance(token, str) or token not in self._backend.vocab:
            raise config.error(key, f"{token!r:.80} is not in the vocabulary")
        return {self._backend.vocab[token]}

    def _numbered(self, config: JsonObject, key: str) -> set[int]:
        """The ids that a file gives: one number or a list."""
        value = config.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise config.error(key, f"is {value!r:.80}, not in the tokenizer's vocabulary of {self.vocab_size}")
        return set(ids)

    def encode(self, text: str, bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Text to ids. bos: put BOS in front (None: if the checkpoint's files say so).

        "<s>" and the like in `text` are ordinary characters unless parse_special. Raises CheckpointError.
        """
        bos = self._add_bos if bos is None else bos
        if bos and self.bos_id is None:
            raise CheckpointError(self.path, "there is no BOS token to add")
        with _tokenizing(self.path, "encode the text"):
            ids = self._backend.encode(text, parse_special)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text. Special tokens and ids outside the vocabulary are dropped."""
        with _tokenizing(self.path, "decode the tokens"):
            return self._backend.decode([i for i in ids if i in self._shown])

    def stream(self, start: bool = False) -> Stream:
        """A new Stream: ids in one by one, text out as soon as it is certain. They are taken to go on with a text, so that an
        answer has its first space, or to start one."""
        return Stream(self, start)

    def chat_text(self, messages: list[dict], add_generation_prompt: bool = True, template: str = "default") -> str:
        """The text that a chat template makes of a conversation, by default up to where the assistant speaks next; rendered as
        transformers does.

        Raises CheckpointError if there is no chat template of this name or it fails, which it may do on purpose.
        """
        if not self._templates:
            raise CheckpointError(self.path.parent, "has no chat template; is it a base model? prompt it without chat")
        if template not in self._templates:
            raise CheckpointError(self.path.parent, f"has no chat template named {template}, only {', '.join(self._templates)}")
        path, source = self._templates[template]

        known = {"add_generation_prompt": add_generation_prompt, **self._template_tokens}
        try:
            return render(source, messages, known)
        except Exception as error:  # noqa: BLE001 (a template can fail in as many ways as any program)
            raise CheckpointError(path, f"the chat template failed ({error})") from None

    def chat(self, messages: list[dict], parse_special: bool = False, template: str = "default") -> list[int]:
        """Ids of a conversation, [{"role": "user", "content": "..."}, ...], up to where the assistant speaks next.

        "<|im_end|>" and the like are special where the template writes them; in a message they are ordinary characters,
        so that nobody can end their own turn by typing it, unless parse_special. Raises CheckpointError as chat_text does.
        """
        messages = changed(messages, lambda text: text.replace(MARK, ""))
        text = self.chat_text(messages, template=template)
        if parse_special:
            return self.encode(text, bos=False, parse_special=True)

        def rendered(messages):
            with suppress(CheckpointError):
                return self.chat_text(messages, template=template)

        own = own_tokens(text, messages, any_of(self._backend.special), rendered)
        if own is None:
            problem = "the chat template does something else with these messages because of the special tokens in them"
            raise CheckpointError(self._templates[template][0], problem)
        for a, _ in reversed(own):
            text = text[:a] + MARK + text[a:]
        with _tokenizing(self.path, "encode the conversation"):
            return self._backend.encode_marked(text)


class Stream:
    """Text from ids that come one at a time: all of push()'s results and flush()'s, joined, are decode(all ids), or what
    these add to a text.

    A token may hold only part of a character, and text that was given out cannot be taken back, so some is held back:
    an unfinished character, which decodes to U+FFFD at the end, and a run of byte tokens (<0xE2>) while it goes on,
    because some decoders turn all of it into U+FFFD when any of it is not UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, start: bool):
        self._tokenizer = tokenizer
        # Only the latest ids are decoded again. The context is there because decoders treat the start of a text in a
        # special way (a space is stripped); once some text has come out, the rest no longer depends on what was before.
        words = (i for i, piece in tokenizer._shown.items() if piece.isalnum() and tokenizer.decode([i]) == piece)
        self._context = [] if start else [*itertools.islice(words, 1)]
        self._pending: list[int] = []
        self._given = len(tokenizer.decode(self._context))  # characters of decode(context + pending) already given out

    def push(self, token: int) -> str:
        """The text that has become certain with this id, often of this id alone, maybe ""."""
        piece = self._tokenizer._shown.get(token)
        if piece is None:
            return ""
        self._pending.append(token)
        return "" if len(piece) == 6 and piece.startswith("<0x") else self._give(last=False)

    def flush(self) -> str:
        """What is left, for after the last id."""
        return self._give(last=True)

    def _give(self, last: bool) -> str:
        text = self._tokenizer.decode(self._context + self._pending)
        end = len(text) - (text.endswith("\N{REPLACEMENT CHARACTER}") and not last)
        new, self._given = text[self._given : end], end
        alone = self._tokenizer.decode(self._pending)
        if end == len(text) and alone:
            self._context, self._pending, self._given = self._pending, [], len(alone)
        return new
