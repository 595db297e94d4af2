"""The next token from a model's scores."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax


def probabilities(
    logits: np.ndarray, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> np.ndarray:
    """The distribution that sampling draws the next token from.

    Parameters
    ----------
    logits : ndarray, shape (V,)
        Scores; minus infinity excludes a token.
    temperature : float, optional
        Scores are divided by it: below 1 the likely becomes likelier, above 1 everything becomes more alike.
    top_k : int, optional
        Keep the `top_k` most likely tokens.
    top_p : float, optional
        Of those keep the most likely ones that together reach the probability `top_p`; the one that reaches it stays.

    Returns
    -------
    ndarray of float64, shape (V,)
        Probabilities that sum to 1, zero for the tokens left out.

    Raises
    ------
    ValueError
        An argument is out of its range, or the scores hold NaN.
    """
    if not 0.0 < temperature < np.inf:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a fraction above 0, at most 1, got {top_p}")
    if np.isnan(logits).any():
        raise ValueError("logits: expected numbers, got NaN")
    result = softmax(logits.astype(np.float64) / temperature)
    if top_k is None and top_p is None:
        return result
    order = np.argsort(-logits, kind="stable")[:top_k]
    if top_p is not None:
        share = np.cumsum(result[order]) / result[order].sum()
        order = order[: np.searchsorted(share, top_p) + 1]
    kept = np.zeros_like(result)
    kept[order] = result[order]
    return kept / kept.sum()


def draw(distribution: np.ndarray, generator: np.random.Generator) -> int:
    """One index, drawn with the probabilities `distribution`, `(V,)`."""
    edges = np.cumsum(distribution)
    # The last edge may round to less than 1, and an index of probability 0 must never be drawn.
    return int(np.searchsorted(edges, generator.random() * edges[-1], side="right"))
