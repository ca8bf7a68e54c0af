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
from tokenizers import AddedToken, decoders, models

from chat_template import changed, own_tokens, read_templates, render
from checkpoint_files import CheckpointError, JsonObject, added_tokens, read_file, special_tokens, token_name

MARK = "\ufdd0"  # one of the characters that Unicode sets aside for a program's own use, never to be part of a text


@contextmanager
def _tokenizing(path: Path, doing: str) -> Iterator[None]:
    """`tokenizers` raises bare Exceptions, and where a file makes no sense its Rust code may panic."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(path, f"cannot {doing} ({error})") from None
        raise


def any_of(tokens: dict[str, AddedToken], mark: str = "") -> re.Pattern[str]:
    """Matches any of these tokens, the special ones with `mark` in front, as a group: the longest one where several begin."""
    words = []
    for name in sorted(tokens, key=len, reverse=True):
        word = re.escape(name)
        if tokens[name].single_word:
            word = rf"(?<!\w){word}(?!\w)"
        if tokens[name].special:
            word = mark + word
        words.append(word)
    return re.compile(f"({'|'.join(words) or '(?!)'})")  # (?!): nothing


def _heed_add_prefix_space(values: dict, config: JsonObject, family: str) -> None:
    """Whether a text gets a space in front, changed in a tokenizer.json as the tokenizer's class in transformers does: those of Mistral
    and Phi-3, and those without a class of their own, leave the file as it is."""
    kind = config.get("tokenizer_class", str, "Qwen2Tokenizer" if family.startswith("qwen") else "")
    wish, steps = config.get("add_prefix_space", bool, None), values.get("pre_tokenizer") or {}
    bytes_step = [step for step in steps.get("pretokenizers", [steps]) if step.get("type") == "ByteLevel"]
    if wish is None or family in ("mistral", "phi3"):
        return
    if bytes_step and kind.startswith(("Qwen2Tokenizer", "GPT2Tokenizer")):
        bytes_step[0]["add_prefix_space"] = wish
    elif not bytes_step and kind.startswith(("LlamaTokenizer", "CodeLlamaTokenizer")):
        scheme = "never" if not wish else "always" if config.get("legacy", bool, False) else "first"
        space, strip = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}, decoders.Strip(" ", 1, 0)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *[strip] * wish]
        values |= {"normalizer": None, "pre_tokenizer": space, "decoder": json.loads(decoders.Sequence(steps).__getstate__())}


class _TokenizerJson:
    """tokenizer.json, through the `tokenizers` package."""

    def __init__(self, path: Path, config: JsonObject, special: set[str], family: str):
        values = JsonObject.read(path).values
        values |= {"truncation": None, "padding": None}  # some files carry their training's
        with _tokenizing(path, "be read as a tokenizer"):
            _heed_add_prefix_space(values, config, family)
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
            known = {token.content: token for token in self.tokenizer.get_added_tokens_decoder().values()}
            vocab = self.tokenizer.get_vocab()
            added = {name: (vocab[name], dict[str, bool]()) for name in special if name in vocab} | added_tokens(config)
            for name, (i, flags) in sorted(added.items(), key=lambda item: item[1][0]):
                token = AddedToken(name, **flags) if flags or name not in known else known[name]
                token.special |= name in special
                self.tokenizer.add_tokens([token])
                if self.tokenizer.token_to_id(name) != i:
                    raise config.error("added_tokens_decoder", f"or added_tokens.json gives {name!r:.80} the id {i}, unlike {path.name}")
            self.plain_size = max(self.tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
            self.vocab: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
            self.first = self._written_first()
        if not set(self.first) <= set(self.vocab.values()):
            raise CheckpointError(path, f"its post-processor writes the tokens {self.first}, which are not all in the vocabulary")
        self.bos = set[int]()
        self.special = {token.content: token for token in self.tokenizer.get_added_tokens_decoder().values() if token.special}

    def _written_first(self) -> list[int]:
        """The ids that the post-processor, of any kind, writes in front of a text: it is given one of a single word."""
        if self.tokenizer.post_processor is None:
            return []
        probe = tokenizers.Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
        probe.post_processor = self.tokenizer.post_processor
        written = probe.encode("word")
        pairs = zip(written.ids, written.sequence_ids)  # the text is sequence 0, and what is written around it is of none
        return [i for i, _ in itertools.takewhile(lambda pair: pair[1] is None, pairs)]

    def encode(self, text: str, mark: str | None) -> list[int]:
        """Here and below: special tokens are parsed where `mark`, "" or MARK, stands in front of them and nowhere else."""
        tokenizer, ids = self._marked if mark else (self.tokenizer, dict[int, int]())
        tokenizer.encode_special_tokens = mark != ""  # in a marked text the special ones are text, the new ones are not
        return [ids.get(i, i) for i in tokenizer.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _marked(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A copy with new tokens that are the special ones, each with MARK in front, and their ids -> the special ids."""
        copy = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        for name, token in self.special.items():
            copy.add_tokens([AddedToken(MARK + name, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)])
        vocab = copy.get_vocab()
        return copy, {vocab[MARK + name]: self.vocab[name] for name in self.special}

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class _SentencePiece:
    """tokenizer.model, through SentencePiece, which does not know the tokens that the JSON files beside it add.

    They are parsed and written here as the `tokenizers` package does it: the special ones are parsed on request, the others
    wherever they stand.
    """

    def __init__(self, path: Path, config: JsonObject, special: set[str], family: str):
        try:
            proto = read_file(path) or b"empty"  # no bytes at all would pass for a model
            model = self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise CheckpointError(path, f"cannot be read as a SentencePiece model ({error})") from None
        self.plain_size, self.bos = model.get_piece_size(), {model.bos_id()} - {-1}
        self.vocab = {model.id_to_piece(i): i for i in range(self.plain_size)}
        for key, i in (("bos_token", model.bos_id()), ("eos_token", model.eos_id()), ("unk_token", model.unk_id())):
            config.values |= {key: config.values.get(key, model.id_to_piece(i))} if i >= 0 else {}
        pieces = self.vocab.copy()
        added = added_tokens(config)
        for name, (i, _) in added.items():
            if self.vocab.setdefault(name, i) != i:
                raise config.error("added_tokens_decoder", f"or added_tokens.json gives {name!r:.80} the id {i}, unlike {path.name}")
        control = {name for name, i in pieces.items() if model.is_control(i) or model.is_unknown(i)}
        said = {name for name in self.vocab if name in special or added.get(name, (0, {}))[1].get("special")}
        flags = {name: more for name, (_, more) in added.items()}
        self.special = {name: AddedToken(name, **flags.get(name, {}) | {"special": True}) for name in control | said}
        self._plain_tokens = {name: AddedToken(name, **more) for name, more in flags.items() if name not in self.special}
        # By id, as the model does not have them, or has another piece there.
        self._names = {self.vocab[name]: name for name in self._plain_tokens if name not in pieces}
        # the model itself parses these, so a text is cut within them
        own = said & pieces.keys() - control
        self._cut = re.compile("|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in own) or "(?!)")
        self._space = config.get("add_prefix_space", bool, None)
        self._legacy = config.get("legacy", bool, self._space is None)

    def encode(self, text: str, mark: str | None) -> list[int]:
        tokens = self._plain_tokens | self.special
        texts = list[str]()
        names = list[str]()
        start = 0
        for found in any_of(tokens, f"{mark}?" if mark else "").finditer(text):
            name = found[0].removeprefix(MARK)
            if tokens[name].special and (mark is None or found[0] != mark + name):
                continue  # it is text, and so is a shorter token within it
            texts.append(text[start : found.start()])
            names.append(name)
            start = found.end()
        texts.append(text[start:])
        for number, name in enumerate(names):
            texts[number] = texts[number].rstrip() if tokens[name].lstrip else texts[number]
            texts[number + 1] = texts[number + 1].lstrip() if tokens[name].rstrip else texts[number + 1]
        ids = list[int]()
        for number, part in enumerate(texts):
            ids += [self.vocab[name] for name in names[:number][-1:]] + self._plain(part, first=not number)
        return ids

    def _plain(self, text: str, first: bool) -> list[int]:
        """Text alone. It gets a space in front as add_prefix_space says, or else the model; where tokenizer_config.json has
        legacy: false, only if it is the first."""
        ids = list[int]()
        for number, part in enumerate(self._cut.split(text)):
            spaced = (first or self._legacy) and not number
            part = " " + part if spaced and self._space and part else part
            bare = 0 if spaced and self._space is None else len(self.model.encode(MARK))
            ids += self.model.encode(MARK * bool(bare) + part)[bare:]
        return ids

    def decode(self, ids: list[int]) -> str:
        text = ""
        for name, run in itertools.groupby(ids, self._names.get):
            if name is None:
                text += self._plain_text(list(run), first=not text)
            else:
                text += name * len(list(run))
        return text

    def _plain_text(self, ids: list[int], first: bool) -> str:
        """The text of the model's own tokens.

        The model drops the space that a text begins with. It may do so for the first tokens of a text, if encode() put a
        space there; otherwise it is given a token that comes before them.
        """
        before = [] if self._space is None else [self.model.piece_to_id("▁")]
        if not first:
            before = [self.model.unk_id()]
        text = self.model.decode(before + ids)[len(self.model.decode(before)) :]
        return text.removeprefix(" ") if first and self._space else text


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
        if config.raw("added_tokens_decoder") is None:  # as transformers does
            config.values |= older.values
        names = ("tokenizer.json", "tokenizer.model", "tokenizer.model.v3")  # v3: as Mistral names it
        found = [folder / name for name in names if os.path.lexists(folder / name)]
        if not found:
            raise CheckpointError(folder, "has no tokenizer.json and no tokenizer.model")
        self.path, backend = found[0], _TokenizerJson if found[0].suffix == ".json" else _SentencePiece
        self._backend: _TokenizerJson | _SentencePiece
        self._backend = backend(self.path, config, special_tokens(config)[1], model.get("model_type", str, ""))
        tokens = {i: token for token, i in self._backend.vocab.items()}
        self.vocab_size, self.plain_size = max(tokens, default=-1) + 1, self._backend.plain_size
        self._shown = {i: token for i, token in tokens.items() if token not in self._backend.special}  # what decode() keeps

        # An answer ends at the tokenizer's own EOS, which may be the end of a turn, and at those that the model's files number.
        numbered = self._numbered(generation, "eos_token_id") or self._numbered(model, "eos_token_id")
        self.eos_ids = numbered | self._named(config, "eos_token")
        self._first = self._written_first(config, model)
        bos = self._named(config, "bos_token") or self._numbered(model, "bos_token_id") or self._backend.bos
        self.bos_id = self._first[0] if self._first else min(bos, default=None)
        self._template_tokens, self._templates = special_tokens(config)[0], read_templates(folder, config)

    def _written_first(self, config: JsonObject, model: JsonObject) -> list[int]:
        """The ids in front of a text, as transformers 5.23 puts them there.

        tokenizer.json: what its post-processor writes, whichever token bos_token names, and nothing where there is no
        post-processor. add_bos_token does not count. Two classes do not go by the post-processor: CodeLlamaTokenizer
        writes bos_token, and GPTNeoXTokenizer writes nothing.

        tokenizer.model: bos_token where add_bos_token is true. If bos_token is missing, it is the model's own BOS; if it is
        null, nothing is written. If add_bos_token is missing, it is true for CodeLlamaTokenizer and false for other classes.
        Where no file names a class it is true, unlike in transformers: such folders hold LLaMA's or Mistral's own files,
        and these models were trained with BOS.

        The class is tokenizer_class of tokenizer_config.json, or else of config.json. In a Mistral, Phi-3 or Qwen2 model it
        does not count. What a post-processor writes behind a text is left out, as a model is to go on with the text.
        """
        kind = config.get("tokenizer_class", str, model.get("tokenizer_class", str, "")).removesuffix("Fast")
        own_class = model.get("model_type", str, "") in ("mistral", "phi3", "qwen2")
        code_llama = kind == "CodeLlamaTokenizer" and not own_class
        wish = config.get("add_bos_token", bool, code_llama or not kind)
        if isinstance(self._backend, _SentencePiece):
            return list(self._named(config, "bos_token")) if wish else []
        if code_llama:
            return list(self._named(config, "bos_token"))
        if kind == "GPTNeoXTokenizer" and not own_class:
            return []
        return self._backend.first

    def _named(self, config: JsonObject, key: str) -> set[int]:
        """The id of a token that a file names: a string, or an object with the string as its content."""
        token = token_name(config.values.get(key))
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
        """Text to ids. bos: put BOS in front (None: if the checkpoint's files say so, by the rule of _written_first).

        "<s>" and the like in `text` are ordinary characters unless parse_special. Raises CheckpointError.
        """
        first = self._first
        if bos and not first:
            if self.bos_id is None:
                raise CheckpointError(self.path, "there is no BOS token to add")
            first = [self.bos_id]
        with _tokenizing(self.path, "encode the text"):
            ids = self._backend.encode(text, "" if parse_special else None)
        return ids if bos is False else first + ids

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
            return self._backend.encode(text, MARK)


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
