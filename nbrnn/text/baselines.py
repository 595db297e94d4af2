"""What counting alone achieves: the perplexities that a network must beat to have learned anything.

    Unigram   how often each token occurs, whatever stands before it
    Trigram   how often each token follows the two before it, interpolated with the shorter contexts

Both are counted on one text and give the probability of each token of another. The trigram interpolates as I. H.
Witten and T. C. Bell do (The zero-frequency problem, IEEE Transactions on Information Theory 37, 1991): in a context
seen n times with u different followers, the share n / (n + u) is that of the counts, and the rest is left to the
context one token shorter, down to equal chances. It has no constant to tune.
"""

from __future__ import annotations

import numpy as np


class _Followers:
    """How often a token followed a context, blended with the probabilities that the next shorter context gives."""

    def __init__(self, contexts: np.ndarray, tokens: np.ndarray, size: int):
        self.size = size
        self.pairs, self.counts = np.unique(contexts * size + tokens, return_counts=True)
        self.contexts, first = np.unique(self.pairs // size, return_index=True)
        self.different = np.diff(first, append=self.pairs.size)
        self.totals = np.add.reduceat(self.counts, first)

    def blend(self, contexts: np.ndarray, tokens: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Probability of each token after its context, given that after the `shorter` context; all three `(N,)`."""
        count = _look_up(self.pairs, self.counts, contexts * self.size + tokens)
        total = _look_up(self.contexts, self.totals, contexts)
        different = _look_up(self.contexts, self.different, contexts)
        seen = np.maximum(total + different, 1)
        return np.where(total > 0, (count + different * shorter) / seen, shorter)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values that belong to the wanted keys, 0 where there is no such key; `keys` are sorted."""
    where = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[where] == wanted, values[where], 0)


class Trigram:
    """Frequencies of tokens after the two before, interpolated after Witten and Bell.

    Parameters
    ----------
    tokens : ndarray of int, shape (N,)
        The text to count, at least 3 tokens.
    size : int
        V, the size of the vocabulary; at most 2**21 - 1, so that three tokens fit a 64-bit key.

    Raises
    ------
    ValueError
        The text is too short or the vocabulary too large.
    """

    def __init__(self, tokens: np.ndarray, size: int):
        tokens = np.asarray(tokens, np.int64)
        if tokens.size < 3:
            raise ValueError(f"tokens: expected at least 3 tokens, got {tokens.size}")
        if size >= 2**21:
            raise ValueError(f"size: expected fewer than {2**21:,} tokens, got {size:,}")
        self.size = size
        self._one = _Followers(np.zeros_like(tokens), tokens, size)
        self._two = _Followers(tokens[:-1], tokens[1:], size)
        self._three = _Followers(tokens[:-2] * size + tokens[1:-1], tokens[2:], size)

    def probability(self, first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
        """Probability of each `third` token after the two before it; integer arrays `(N,)`."""
        first, second, third = (np.asarray(each, np.int64) for each in (first, second, third))
        one = self._one.blend(np.zeros_like(third), third, np.full(third.shape, 1.0 / self.size))
        two = self._two.blend(second, third, one)
        return self._three.blend(first * self.size + second, third, two)

    def perplexity(self, tokens: np.ndarray) -> float:
        """Perplexity of a text of at least 3 tokens, whose first two are context only."""
        return _perplexity(self.probability(tokens[:-2], tokens[1:-1], tokens[2:]))


class Unigram:
    """Frequencies of tokens, with one more for each so that none is impossible.

    Parameters
    ----------
    tokens : ndarray of int, shape (N,)
        The text to count.
    size : int
        V, the size of the vocabulary.
    """

    def __init__(self, tokens: np.ndarray, size: int):
        counts = np.bincount(tokens, minlength=size) + 1
        self.probabilities = counts / counts.sum()

    def perplexity(self, tokens: np.ndarray) -> float:
        """Perplexity of a text, `(N,)`."""
        return _perplexity(self.probabilities[tokens])


def _perplexity(probabilities: np.ndarray) -> float:
    if not probabilities.size:
        raise ValueError("tokens: expected a longer text, got none to predict")
    return float(np.exp(-np.log(probabilities).mean()))
