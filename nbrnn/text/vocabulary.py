"""Characters or words as token ids, and back.

A text is cut into tokens without losing anything, so that the tokens in a row are the text again:

    char   every character
    word   a word or a punctuation mark, each together with the space before it; every newline; the rest of the blanks
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

UNKNOWN = "<unk>"
LEVELS = ("char", "word")

# A run of blanks leaves its last space to the word that follows, so that a word is mostly the same token anywhere.
_WORD = re.compile(r" ?\w+| ?[^\w\s]|\n|[^\S\n]+(?= \S)|[^\S\n]+")


def tokenize(text: str, level: str) -> list[str]:
    """The tokens of a text; joined they are the text.

    Parameters
    ----------
    text : str
    level : {"char", "word"}
    """
    if level not in LEVELS:
        raise ValueError(f"level: expected 'char' or 'word', got {level!r}")
    return list(text) if level == "char" else _WORD.findall(text)


class Vocabulary:
    """The tokens a model knows, numbered; number 0 stands for all others.

    Parameters
    ----------
    tokens : sequence of str
        The known tokens, which get the numbers from 1 on.
    level : {"char", "word"}, optional
        How text is cut into tokens.

    Raises
    ------
    ValueError
        A token stands twice, is not what that level calls a token, or the level is unknown.
    """

    def __init__(self, tokens: Sequence[str], level: str = "char"):
        self.tokens = (UNKNOWN, *tokens)
        self.level = level
        self._ids = {token: number for number, token in enumerate(self.tokens) if number}
        if len(self._ids) != len(tokens):
            twice = [token for token, count in Counter(tokens).items() if count > 1]
            raise ValueError(f"tokens: expected each token once, got {twice[:3]} more than once")
        for token in tokens:
            if not isinstance(token, str) or tokenize(token, level) != [token]:
                raise ValueError(f"tokens: expected single tokens of level {level!r}, got {token!r}")

    @classmethod
    def from_text(cls, text: str, level: str = "char", min_frequency: int = 1) -> Vocabulary:
        """The tokens that occur in a text, the most frequent first.

        Parameters
        ----------
        text : str
        level : {"char", "word"}, optional
        min_frequency : int, optional
            Tokens that occur fewer times are left out, and so become the unknown token.
        """
        counts = Counter(tokenize(text, level))
        kept = [token for token, count in counts.items() if count >= min_frequency]
        return cls(sorted(kept, key=lambda token: (-counts[token], token)), level)

    def __len__(self) -> int:
        """How many numbers there are, that of the unknown token included."""
        return len(self.tokens)

    def encode(self, text: str) -> np.ndarray:
        """The numbers of a text's tokens, `(N,)` of int32; 0 where a token is unknown."""
        ids = self._ids
        return np.array([ids.get(token, 0) for token in tokenize(text, self.level)], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token numbers, with ``<unk>`` where a token was unknown.

        Raises
        ------
        ValueError
            A number is not one of this vocabulary.
        """
        array = np.asarray(ids)
        if array.size and not (array.min() >= 0 and array.max() < len(self)):
            raise ValueError(f"ids: expected numbers from 0 to {len(self) - 1}, got {array.min()} to {array.max()}")
        return "".join(self.tokens[number] for number in array.ravel().tolist())

    def config(self) -> dict[str, Any]:
        """The vocabulary as plain JSON values; `from_config` builds it again."""
        return {"level": self.level, "tokens": list(self.tokens[1:])}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary whose `config` this is."""
        return cls(config["tokens"], config["level"])

    def __repr__(self) -> str:
        return f"Vocabulary({len(self):,} {self.level}s)"
