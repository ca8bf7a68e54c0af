"""tokenizer.model, through SentencePiece, and the tokens that the JSON files beside it add."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken

from loading.checkpoint_files import CheckpointError, JsonObject, read_file
from loading.special_tokens import (
    MARK,
    AddedEntry,
    ParseSpecial,
    added_tokens,
    other_id_error,
    token_pattern,
)


class TokenizerModel:
    """A tokenizer.model. Attributes and methods are those of TokenizerJson.

    SentencePiece does not know the tokens that the JSON files beside it add. They are parsed and
    written here as the `tokenizers` package does it: the special ones are parsed on request, the
    others wherever they stand. Raises CheckpointError.
    """

    def __init__(self, path: Path, config: JsonObject, special: set[str], family: str):
        """As TokenizerJson's. The family makes no difference here."""
        self.model = open_model(path)
        self.plain_size = self.model.get_piece_size()
        self.first: list[int] = []
        ids = {
            "bos_token": self.model.bos_id(),
            "eos_token": self.model.eos_id(),
            "unk_token": self.model.unk_id(),
        }
        self.own_names = {key: self.model.id_to_piece(i) for key, i in ids.items() if i >= 0}
        self.own_bos = ids["bos_token"] if ids["bos_token"] >= 0 else None

        pieces = {self.model.id_to_piece(i): i for i in range(self.plain_size)}
        added = added_tokens(config)
        self.vocab = dict(pieces)
        for name, entry in added.items():
            if self.vocab.setdefault(name, entry.id) != entry.id:
                raise other_id_error(config, name, entry.id, path.name)
        self._sort_tokens(pieces, added, special)

        # Whether a text gets a space in front; None: as the model does it.
        self._space: bool | None = config.get("add_prefix_space", bool, None)
        # Whether the text behind a special token gets it, too.
        self._legacy: bool = config.get("legacy", bool, self._space is None)

    def _sort_tokens(self, pieces: dict[str, int], added: dict[str, AddedEntry], special: set[str]):
        """Tell special tokens from added ones that are text.

        pieces: the model's own tokens; added: those that files add; special: those that files call
        so.
        """
        control = {name for name, i in pieces.items() if self._is_control(i)}
        called_special = {name for name in self.vocab if name in special}
        called_special |= {name for name, entry in added.items() if entry.flags.get("special")}
        self.special: dict[str, AddedToken] = {}
        for name in control | called_special:
            flags = added[name].flags if name in added else {}
            self.special[name] = AddedToken(name, **(flags | {"special": True}))
        self._text_tokens: dict[str, AddedToken] = {}
        for name, entry in added.items():
            if name not in self.special:
                self._text_tokens[name] = AddedToken(name, **entry.flags)
        # By id, those that the model does not have, or for which it has another piece.
        self._names = {self.vocab[name]: name for name in self._text_tokens if name not in pieces}
        # These the model itself would parse anywhere, so a text is cut behind their first letter.
        ordinary_pieces = (called_special & pieces.keys()) - control
        cuts = []
        for name in ordinary_pieces:
            cuts.append(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})")
        nothing = "(?!)"
        self._cut = re.compile("|".join(cuts) or nothing)

    def _is_control(self, token: int) -> bool:
        return self.model.is_control(token) or self.model.is_unknown(token)

    # ---------------------------------------------------------------------------------- encode

    def encode(self, text: str, parse: ParseSpecial) -> list[int]:
        """Text to ids."""
        texts, names = self._split(text, parse)
        ids = self._encode_text(texts[0], is_first=True)
        for name, following in zip(names, texts[1:], strict=True):
            ids.append(self.vocab[name])
            ids += self._encode_text(following, is_first=False)
        return ids

    def _split(self, text: str, parse: ParseSpecial) -> tuple[list[str], list[str]]:
        """The added and special tokens in a text, and the texts between them, one more."""
        tokens = self._text_tokens | self.special
        mark = f"{MARK}?" if parse is ParseSpecial.MARKED else ""
        texts = []
        names = []
        start = 0
        for found in token_pattern(tokens, mark).finditer(text):
            name = found[0].removeprefix(MARK)
            is_marked = found[0] != name
            if not tokens[name].special:
                is_token = True
            elif parse is ParseSpecial.MARKED:
                is_token = is_marked
            else:
                is_token = parse is ParseSpecial.ALWAYS
            if is_token:
                texts.append(text[start : found.start()])
                names.append(name)
                start = found.end()
            # Otherwise it is text, and so is a shorter token within it.
        texts.append(text[start:])

        # Some tokens take the space beside them.
        for i, name in enumerate(names):
            if tokens[name].lstrip:
                texts[i] = texts[i].rstrip()
            if tokens[name].rstrip:
                texts[i + 1] = texts[i + 1].lstrip()
        return texts, names

    def _encode_text(self, text: str, is_first: bool) -> list[int]:
        """The ids of a text without added tokens; is_first: nothing stands before it."""
        gets_space = is_first or self._legacy
        start, *others = self._cut.split(text)
        if not gets_space:
            ids = self._encode_bare(start)
        elif self._space is None:
            ids = self.model.encode(start)  # the model puts the space there, if it does
        elif self._space and start:
            ids = self._encode_bare(" " + start)
        else:
            ids = self._encode_bare(start)
        for part in others:
            ids += self._encode_bare(part)
        return ids

    def _encode_bare(self, text: str) -> list[int]:
        """The ids of a text without the space that the model puts in front: MARK gets it."""
        n_mark = len(self.model.encode(MARK))
        return self.model.encode(MARK + text)[n_mark:]

    # ---------------------------------------------------------------------------------- decode

    def decode(self, ids: list[int]) -> str:
        """Ids to text."""
        text = ""
        for name, run in itertools.groupby(ids, self._names.get):
            run_ids = list(run)
            if name is None:
                text += self._decode_pieces(run_ids, is_first=text == "")
            else:
                text += name * len(run_ids)
        return text

    def _decode_pieces(self, ids: list[int], is_first: bool) -> str:
        """The text of the model's own tokens; is_first: no text stands before it.

        The model drops the space that a text begins with. It may do so for the first tokens of a
        text, if encode() put a space there; otherwise it is given a token that comes before them.
        """
        before: list[int] = []
        if not is_first:
            before = [self.model.unk_id()]
        elif self._space is not None:
            before = [self.model.piece_to_id("▁")]
        n_before = len(self.model.decode(before))
        text = self.model.decode(before + ids)[n_before:]
        if is_first and self._space:
            text = text.removeprefix(" ")
        return text


def open_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model. Raises CheckpointError."""
    data = read_file(path) or b"empty"  # no bytes at all would pass for a model
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        problem = f"cannot be read as a SentencePiece model ({error})"
        raise CheckpointError(path, problem) from None
