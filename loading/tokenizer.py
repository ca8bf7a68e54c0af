"""Text to ids and back: Tokenizer(folder) reads a checkpoint's tokenizer and its chat template.

    tokenizer.json                                     in the format of `tokenizers`, or else
    tokenizer.model, tokenizer.model.v3                in SentencePiece's
    tokenizer_config.json, special_tokens_map.json, added_tokens.json,
    generation_config.json, config.json,
    chat_template.jinja, additional_chat_templates/    optional: special tokens, chat templates

Whatever is wrong is raised as CheckpointError: one line that names the file and the key.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from loading.chat_template import map_strings, own_tokens, read_templates, render
from loading.checkpoint_files import CheckpointError, JsonObject
from loading.special_tokens import (
    MARK,
    ParseSpecial,
    named_tokens,
    special_tokens,
    token_name,
    token_pattern,
)
from loading.tokenizer_json import TokenizerJson, tokenizer_errors
from loading.tokenizer_model import TokenizerModel

__all__ = ["MARK", "Stream", "Tokenizer"]

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
)  # the first that is there is read


class Tokenizer:
    """A checkpoint's tokenizer and its chat template.

    path            the tokenizer's file
    vocab_size      the highest id + 1
    plain_size      the same without the tokens that were added to a vocabulary, such as one for
                    padding, which a model may have no embedding for
    bos_id          the id of BOS; None if there is none
    eos_ids         a set of ids, any of which ends a text
    special_names   the names, by id, of special tokens: those that decode() leaves out

    Raises CheckpointError.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        config = JsonObject.read(folder / "tokenizer_config.json", optional=True)
        older = JsonObject.read(folder / "special_tokens_map.json", optional=True)
        generation = JsonObject.read(folder / "generation_config.json", optional=True)
        model = JsonObject.read(folder / "config.json", optional=True)
        if config.raw("added_tokens_decoder") is None:  # as transformers does
            config.values |= older.values

        self.path = find_file(folder)
        kind = TokenizerJson if self.path.suffix == ".json" else TokenizerModel
        family = model.get("model_type", str, "")
        self._backend = kind(self.path, config, special_tokens(config), family)
        for key, name in self._backend.own_names.items():
            config.values.setdefault(key, name)

        names = {i: name for name, i in self._backend.vocab.items()}
        self.vocab_size = max(names, default=-1) + 1
        self.plain_size = self._backend.plain_size
        # What decode() shows, by id.
        self._shown = {i: name for i, name in names.items() if name not in self._backend.special}
        self.special_names = {i: name for i, name in names.items() if i not in self._shown}

        # An answer ends at the tokenizer's own EOS, which may be the end of a turn, and at those
        # that the model's files number.
        eos_ids = self._numbered(generation, "eos_token_id")
        if not eos_ids:
            eos_ids = self._numbered(model, "eos_token_id")
        self.eos_ids = eos_ids | self._named(config, "eos_token")
        self._first = self._find_first(config, model)
        self.bos_id = self._find_bos(config, model)
        self._template_tokens = named_tokens(config)
        self._templates = read_templates(folder, config)

    def named_token(self, key: str) -> str | None:
        """The token that the files name under a key such as "pad_token", or None."""
        return self._template_tokens.get(key)

    def named_id(self, key: str) -> int | None:
        """The id of that token, or None."""
        return self._backend.vocab.get(self.named_token(key) or "")

    def _find_first(self, config: JsonObject, model: JsonObject) -> list[int]:
        """The ids in front of a text, as transformers 5.23 puts them there.

        tokenizer.json: what its post-processor writes, whichever token bos_token names, and nothing
        where there is no post-processor. add_bos_token does not count. Two classes do not go by the
        post-processor: CodeLlamaTokenizer writes bos_token, and GPTNeoXTokenizer writes nothing.

        tokenizer.model: bos_token where add_bos_token is true. If bos_token is missing, it is the
        model's own BOS; if it is null, nothing is written. If add_bos_token is missing, it is true
        for CodeLlamaTokenizer and false for other classes. Where no file names a class it is true,
        unlike in transformers: such folders hold LLaMA's or Mistral's own files, and these models
        were trained with BOS.

        The class is tokenizer_class of tokenizer_config.json, or else of config.json. In a Mistral,
        Phi-3 or Qwen2 model it does not count. What a post-processor writes behind a text is left
        out, as a model is to go on with the text.
        """
        model_class = model.get("tokenizer_class", str, "")
        class_name = config.get("tokenizer_class", str, model_class).removesuffix("Fast")
        class_counts = model.get("model_type", str, "") not in ("mistral", "phi3", "qwen2")
        is_code_llama = class_name == "CodeLlamaTokenizer" and class_counts
        is_neox = class_name == "GPTNeoXTokenizer" and class_counts
        adds_bos = config.get("add_bos_token", bool, is_code_llama or class_name == "")
        if isinstance(self._backend, TokenizerModel):
            writes_bos_token = adds_bos
        else:
            writes_bos_token = is_code_llama
        if writes_bos_token:
            return list(self._named(config, "bos_token"))
        if is_neox:
            return []
        return self._backend.first

    def _find_bos(self, config: JsonObject, model: JsonObject) -> int | None:
        """BOS: what stands in front of a text, or else what the first file that names any says.

        generation_config.json has nothing to say about it.
        """
        ids = self._named(config, "bos_token")
        if not ids:
            ids = self._numbered(model, "bos_token_id")
        if self._first:
            return self._first[0]
        return min(ids, default=self._backend.own_bos)

    def _named(self, config: JsonObject, key: str) -> set[int]:
        """The id of a token that a file names; a set of one, or of none."""
        name = token_name(config.values.get(key))
        if not name:
            return set()
        if not isinstance(name, str) or name not in self._backend.vocab:
            raise config.error(key, f"{name!r:.80} is not in the vocabulary")
        return {self._backend.vocab[name]}

    def _numbered(self, config: JsonObject, key: str) -> set[int]:
        """The ids that a file gives: one number or a list."""
        value = config.values.get(key)
        if value is None:
            return set()
        ids = value if isinstance(value, list) else [value]
        for i in ids:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                problem = (
                    f"is {value!r:.80}, not in the tokenizer's vocabulary of {self.vocab_size}"
                )
                raise config.error(key, problem)
        return set(ids)

    # ----------------------------------------------------------------------------------- texts

    def encode(self, text: str, bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Text to ids.

        bos            whether BOS stands in front; None: as the checkpoint's files say it, by the
                       rule of _find_first
        parse_special  whether "<s>" and the like in the text are special tokens; otherwise they are
                       ordinary characters

        Raises CheckpointError.
        """
        first = self._first
        if bos and not first:
            if self.bos_id is None:
                raise CheckpointError(self.path, "there is no BOS token to add")
            first = [self.bos_id]
        parse = ParseSpecial.ALWAYS if parse_special else ParseSpecial.NEVER
        with tokenizer_errors(self.path, "encode the text"):
            ids = self._backend.encode(text, parse)
        if bos is False:
            return ids
        return first + ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text. Special tokens and ids outside the vocabulary are dropped."""
        shown = [i for i in ids if i in self._shown]
        with tokenizer_errors(self.path, "decode the tokens"):
            return self._backend.decode(shown)

    def stream(self, start: bool = False) -> Stream:
        """A new Stream: ids in one by one, text out as soon as it is certain.

        start: whether the ids start a text. Otherwise they go on with one, so that an answer has
        its first space.
        """
        return Stream(self, start)

    # ------------------------------------------------------------------------------------ chat

    def chat_text(
        self, messages: list[dict], add_generation_prompt: bool = True, template: str = "default"
    ) -> str:
        """The text that a chat template makes of a conversation, rendered as transformers does it.

        By default it ends where the assistant speaks next. Raises CheckpointError if there is no
        chat template of this name, or if it fails, which it may do on purpose.
        """
        if not self._templates:
            problem = "has no chat template; is it a base model? prompt it without chat"
            raise CheckpointError(self.path.parent, problem)
        if template not in self._templates:
            names = ", ".join(self._templates)
            problem = f"has no chat template named {template}, only {names}"
            raise CheckpointError(self.path.parent, problem)
        path, source = self._templates[template]
        known = {"add_generation_prompt": add_generation_prompt, **self._template_tokens}
        try:
            return render(source, messages, known)
        except Exception as error:  # noqa: BLE001 (it can fail in as many ways as any program)
            raise CheckpointError(path, f"the chat template failed ({error})") from None

    def chat(
        self, messages: list[dict], parse_special: bool = False, template: str = "default"
    ) -> list[int]:
        """Ids of a conversation, up to where the assistant speaks next.

        messages: [{"role": "user", "content": "..."}, ...]

        "<|im_end|>" and the like are special where the template writes them. In a message they are
        ordinary characters, so that nobody can end their own turn by typing it, unless
        parse_special. Raises CheckpointError as chat_text does.
        """
        unmarked = map_strings(messages, lambda text: text.replace(MARK, ""))
        text = self.chat_text(unmarked, template=template)
        if parse_special:
            return self.encode(text, bos=False, parse_special=True)

        def render_again(changed_messages) -> str | None:
            try:
                return self.chat_text(changed_messages, template=template)
            except CheckpointError:
                return None

        pattern = token_pattern(self._backend.special)
        own = own_tokens(text, unmarked, pattern, render_again)
        if own is None:
            path, _ = self._templates[template]
            problem = (
                "does something else with these messages because of the special tokens in them"
            )
            raise CheckpointError(path, f"the chat template {problem}")
        for start, _ in reversed(own):
            text = text[:start] + MARK + text[start:]
        with tokenizer_errors(self.path, "encode the conversation"):
            return self._backend.encode(text, ParseSpecial.MARKED)


def find_file(folder: Path) -> Path:
    """The tokenizer's file in a folder. Raises CheckpointError if there is none."""
    for name in FILES:
        if os.path.lexists(folder / name):
            return folder / name
    raise CheckpointError(folder, "has no tokenizer.json and no tokenizer.model")


class Stream:
    """Text from ids that come one at a time.

    All of push()'s results and flush()'s, joined, are decode(all ids), or what these add to a text.

    A token may hold only part of a character, and text that was given out cannot be taken back, so
    some is held back: an unfinished character, which decodes to U+FFFD at the end, and a run of
    byte tokens (<0xE2>) while it goes on, because some decoders turn all of it into U+FFFD when any
    of it is not UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, start: bool):
        self._tokenizer = tokenizer
        # Only the latest ids are decoded again, after some that were decoded before: decoders treat
        # the start of a text in a special way (a space is stripped). Once some text has come out,
        # the rest no longer depends on what was before.
        self._context: list[int] = []
        if not start:
            self._context = self._any_word()
        self._pending: list[int] = []
        # How many characters of decode(context + pending) were given out.
        self._given = len(tokenizer.decode(self._context))

    def _any_word(self) -> list[int]:
        """The id of a token that is a word whatever stands around it; a list of one, or of none."""
        for i, name in self._tokenizer._shown.items():
            if name.isalnum() and self._tokenizer.decode([i]) == name:
                return [i]
        return []

    def push(self, token: int) -> str:
        """The text that has become certain with this id, often of this id alone, maybe ""."""
        name = self._tokenizer._shown.get(token)
        if name is None:
            return ""
        self._pending.append(token)
        is_byte = len(name) == 6 and name.startswith("<0x")
        if is_byte:
            return ""
        return self._give(is_last=False)

    def flush(self) -> str:
        """What is left, for after the last id."""
        return self._give(is_last=True)

    def _give(self, is_last: bool) -> str:
        """The text of context and pending ids that is certain and was not given out yet."""
        text = self._tokenizer.decode(self._context + self._pending)
        end = len(text)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not is_last:
            end -= 1
        new = text[self._given : end]
        self._given = end
        pending_text = self._tokenizer.decode(self._pending)
        if end == len(text) and pending_text:
            # All is given out, so that these ids can be the context of those to come.
            self._context = self._pending
            self._pending = []
            self._given = len(pending_text)
        return new
