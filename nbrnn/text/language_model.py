"""A language model: text in, text out.

    vocabulary = Vocabulary.from_text(text)
    model = LanguageModel(vocabulary, hidden_size=256)
    model.fit(text, epochs=10)
    model.perplexity(other_text)
    model.generate("The ", 200)

The network reads one token per step and scores the next: tokens -> [embedding] -> recurrent layers -> [dropout] ->
linear. Without an embedding the recurrent layer gathers the rows of its input weights by token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

from nbrnn.data.windows import RandomWindows, SequentialWindows
from nbrnn.layers.dropout import Dropout
from nbrnn.layers.embedding import Embedding
from nbrnn.layers.linear import Linear
from nbrnn.layers.named import (
    CTRNN,
    GRU,
    LSTM,
    RNN,
    SRU,
    CoupledLSTM,
    IndRNN,
    JordanRNN,
    LayerNormLSTM,
    LiGRU,
    MinGRU,
    PeepholeLSTM,
)
from nbrnn.layers.sequential import Sequential
from nbrnn.text.sampling import draw, probabilities
from nbrnn.text.vocabulary import UNKNOWN, Vocabulary, tokenize
from nbrnn.training.callbacks import Callback
from nbrnn.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from nbrnn.training.history import History
from nbrnn.training.losses import CrossEntropy
from nbrnn.training.optimizers import Adam, Optimizer
from nbrnn.training.schedules import Schedule
from nbrnn.training.trainer import Trainer

CELLS = {
    "lstm": LSTM,
    "gru": GRU,
    "rnn": RNN,
    "peephole": PeepholeLSTM,
    "coupled": CoupledLSTM,
    "layernorm": LayerNormLSTM,
    "jordan": JordanRNN,
    "ctrnn": CTRNN,
    "indrnn": IndRNN,
    "mingru": MinGRU,
    "ligru": LiGRU,
    "sru": SRU,
}
WINDOWS = {"random": RandomWindows, "sequential": SequentialWindows}

# Steps of one call when a long text is scored: long enough to make calls cheap, short enough for little memory.
_CHUNK = 1024


class Score(NamedTuple):
    """How well a model predicts a text, its first token aside.

    Parameters
    ----------
    nats : float
        Sum of the negative logarithms of the tokens' probabilities.
    tokens, characters : int
        How many tokens those are, and how many characters.
    unknown : int
        How many of the tokens are unknown to the model.
    """

    nats: float
    tokens: int
    characters: int
    unknown: int

    @property
    def perplexity(self) -> float:
        """Among how many equally likely tokens the model wavers: 1 is perfect, the vocabulary's size is ignorance."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nats / self.tokens))

    @property
    def bits_per_character(self) -> float:
        """A figure that models of characters and of words share.

        An unknown word costs the bits of one token, however long it is: with many of them the figure is too good.
        """
        return self.nats / math.log(2.0) / self.characters


class LanguageModel:
    """A recurrent network that predicts a text's next character or word.

    Parameters
    ----------
    vocabulary : Vocabulary
        The tokens that the network knows; at least one besides the unknown token.
    cell : str, optional
        One of `CELLS`: "lstm", "gru", "rnn", "peephole" and so on.
    hidden_size : int, optional
        Hidden units of each recurrent layer.
    num_layers : int, optional
        Recurrent layers.
    embedding_size : int, optional
        Size of a learned embedding before the recurrent layers; 0 is none.
    dropout : float, optional
        Share of values dropped in training: after the embedding and after each recurrent layer.
    dtype : {"float32", "float64"}, optional
    seed : int or None, optional
        Where initial values and dropout come from.

    Attributes
    ----------
    network : Sequential
        Integer tokens `(T, B)` in, scores `(T, B, V)` out.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        cell: str = "lstm",
        hidden_size: int = 256,
        num_layers: int = 1,
        embedding_size: int = 0,
        dropout: float = 0.0,
        dtype: str = "float32",
        seed: int | None = None,
    ):
        if cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
        if len(vocabulary) < 2:
            raise ValueError(f"vocabulary: expected at least one token besides {UNKNOWN}, got none")
        self.vocabulary = vocabulary
        self._config = {
            "cell": cell,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "embedding_size": embedding_size,
            "dropout": dropout,
            "dtype": dtype,
        }
        seeds = iter(np.random.SeedSequence(seed).generate_state(5).tolist())
        size = len(vocabulary)
        modules = []
        if embedding_size:
            modules.append(Embedding(size, embedding_size, dtype=dtype, seed=next(seeds)))
            if dropout:
                modules.append(Dropout(dropout, dtype=dtype, seed=next(seeds)))
        between = dropout if num_layers > 1 else 0.0
        modules.append(
            CELLS[cell](embedding_size or size, hidden_size, num_layers, dropout=between, dtype=dtype, seed=next(seeds))
        )
        if dropout:
            modules.append(Dropout(dropout, dtype=dtype, seed=next(seeds)))
        modules.append(Linear(hidden_size, size, dtype=dtype, seed=next(seeds)))
        self.network = Sequential(*modules)

    # ------------------------------------------------------------------ training

    def fit(
        self,
        text: str | np.ndarray,
        *,
        epochs: int = 10,
        num_steps: int = 35,
        batch_size: int = 32,
        windows: str = "sequential",
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
        clip_norm: float | None = 1.0,
        validation: str | np.ndarray | None = None,
        callbacks: Sequence[Callback] = (),
        seed: int | np.random.Generator | None = None,
    ) -> History:
        """Train on a text.

        Parameters
        ----------
        text : str or ndarray of int, shape (N,)
            What to learn, as text or as token ids; at least ``num_steps * batch_size + 1`` tokens.
        epochs : int, optional
            How many times to read the text.
        num_steps, batch_size : int, optional
            T and B: the shape of a batch.
        windows : {"sequential", "random"}, optional
            How batches are cut: see `nbrnn.data.windows`.
        optimizer : Optimizer, optional
            By default Adam with learning rate 0.002.
        schedule : Schedule, optional
            Sets the learning rate step by step; by default it stays the same.
        clip_norm : float or None, optional
            The largest norm of all gradients together.
        validation : str or ndarray of int, optional
            A text whose loss is measured after each epoch.
        callbacks : sequence of Callback, optional
        seed : int, numpy.random.Generator or None, optional
            Where the windows' offsets and shuffles come from.

        Returns
        -------
        History
            A record for every epoch, losses in nats per token.

        Raises
        ------
        ValueError
            The text is shorter than one batch, a token is not of the vocabulary, or an argument is out of its range.
        TrainingError
            The loss or a gradient is not finite.
        """
        if windows not in WINDOWS:
            raise ValueError(f"windows: expected one of {', '.join(WINDOWS)}, got {windows!r}")
        optimizer = Adam(0.002) if optimizer is None else optimizer
        trainer = Trainer(self.network, CrossEntropy(), optimizer, clip_norm=clip_norm, schedule=schedule)
        batches = WINDOWS[windows](self._ids(text), num_steps, batch_size, seed=seed)
        held_out = None if validation is None else validation_windows(self._ids(validation), num_steps, batch_size)
        return trainer.fit(batches, epochs, held_out, callbacks)

    def _ids(self, text: str | np.ndarray) -> np.ndarray:
        return self.vocabulary.encode(text) if isinstance(text, str) else text

    # ------------------------------------------------------------------ scoring

    def score(self, text: str) -> Score:
        """How well the model predicts a text.

        Parameters
        ----------
        text : str
            At least two tokens; the first is context only.

        Raises
        ------
        ValueError
            The text is too short.
        """
        tokens = self.vocabulary.encode(text)[:, None]
        if len(tokens) < 2:
            raise ValueError(f"text: expected at least 2 {self.vocabulary.level}s, got {len(tokens)}")
        nats, state = 0.0, None
        for start in range(0, len(tokens) - 1, _CHUNK):
            target = tokens[start + 1 : start + 1 + _CHUNK, 0]
            logits, state = self.network(tokens[start : start + target.size], state)
            logits = logits[:, 0].astype(np.float64)
            nats += float((logsumexp(logits, axis=1) - logits[np.arange(target.size), target]).sum())
        first = tokenize(text, self.vocabulary.level)[0]
        return Score(nats, len(tokens) - 1, len(text) - len(first), int((tokens[1:] == 0).sum()))

    def perplexity(self, text: str) -> float:
        """The perplexity of a text, see `Score`; for the text see `score`."""
        return self.score(text).perplexity

    def bits_per_character(self, text: str) -> float:
        """The bits per character of a text, see `Score`; for the text see `score`."""
        return self.score(text).bits_per_character

    # ------------------------------------------------------------------ generating

    def generate(
        self,
        prompt: str,
        length: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = False,
        seed: int | np.random.Generator | None = None,
    ) -> str:
        """Text that continues a prompt, drawn token by token from the model's probabilities.

        Parameters
        ----------
        prompt : str
            What the text begins with; if empty, it begins on a new line.
        length : int
            How many tokens to add.
        temperature, top_k, top_p : optional
            How the probabilities are shaped before a token is drawn: see `nbrnn.text.sampling.probabilities`.
        greedy : bool, optional
            Take the most likely token each time and draw nothing.
        seed : int, numpy.random.Generator or None, optional
            Where the draws come from; None draws a seed from the system.

        Returns
        -------
        str
            The added text, without the prompt. The unknown token is never drawn.

        Raises
        ------
        ValueError
            An option is out of its range.
        """
        if length < 0:
            raise ValueError(f"length: expected at least 0, got {length}")
        ids = self.vocabulary.encode(prompt or "\n")
        generator = np.random.default_rng(seed)
        session, drawn = self.network.stream(1), []
        for _ in range(length):
            scores = session.step(np.array(drawn[-1:])) if drawn else session.run(ids[:, None])[-1]
            logits = scores[0].copy()
            logits[0] = -np.inf
            if greedy:
                drawn.append(int(logits.argmax()))
            else:
                drawn.append(draw(probabilities(logits, temperature, top_k, top_p), generator))
        return self.vocabulary.decode(drawn)

    # ------------------------------------------------------------------ files

    def config(self) -> dict[str, Any]:
        """The arguments that build a model of the same shape, vocabulary included, as plain JSON values."""
        return {**self._config, "vocabulary": self.vocabulary.config()}

    def save(self, path: str | os.PathLike) -> None:
        """Write the model to a file, replacing an existing one in one instant.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        arrays = {f"model.{name}": array for name, array in self.network.state_dict().items()}
        save_checkpoint(path, arrays, {"extra": {"language_model": self.config()}})

    @classmethod
    def load(cls, path: str | os.PathLike) -> LanguageModel:
        """The model in a file that `save` wrote, or a checkpoint of its training.

        Raises
        ------
        CheckpointError
            The file holds something else, is truncated or damaged.
        OSError
            The file cannot be read.
        """
        arrays, meta = load_checkpoint(path)
        try:
            return cls.from_checkpoint(arrays, meta)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_checkpoint(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> LanguageModel:
        """The model in what `load_checkpoint` returned; a CheckpointError if there is none."""
        try:
            config = dict(meta["extra"]["language_model"])
            model = cls(Vocabulary.from_config(config.pop("vocabulary")), **config)
            prefix = "model."
            model.network.load_state_dict(
                {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a language model of nbrnn ({error})") from None
        return model


def validation_windows(tokens: np.ndarray, num_steps: int, batch_size: int) -> SequentialWindows:
    """The batches that measure a text's loss: the same in every epoch, and smaller where the text is short."""
    num_steps = max(1, min(num_steps, len(tokens) - 1))
    batch_size = max(1, min(batch_size, (len(tokens) - 1) // num_steps))
    return SequentialWindows(tokens, num_steps, batch_size, random_offset=False)
