"""A training that can be interrupted: the settings, the text, the model and the trainer that belong together.

Everything a resumed training needs stands in the model's file, except for the text: the file knows where the text was
and a hash of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbrnn.data.windows import SequentialWindows
from nbrnn.text.corpus import language_reference, read_texts
from nbrnn.text.language_model import LanguageModel, validation_windows
from nbrnn.text.vocabulary import Vocabulary
from nbrnn.training.callbacks import Callback, Checkpointing
from nbrnn.training.checkpoint import CheckpointError, load_checkpoint
from nbrnn.training.history import History
from nbrnn.training.losses import CrossEntropy
from nbrnn.training.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop
from nbrnn.training.schedules import Cosine
from nbrnn.training.trainer import Trainer

# Each with the learning rate that suits a language model.
OPTIMIZERS = {
    "adam": (Adam, 0.006),
    "adamw": (AdamW, 0.006),
    "rmsprop": (RMSprop, 0.002),
    "adagrad": (Adagrad, 0.05),
    "sgd": (SGD, 1.0),
}
# A word that occurs once teaches nothing but its spelling; as an unknown word it teaches where unknown words stand.
MIN_FREQUENCY = {"char": 1, "word": 2}


class Corpus:
    """The text of a training: where it is, a hash of it, and its two parts.

    Parameters
    ----------
    paths : sequence of str
        Text files; none stands for the Python language reference.
    validation : float
        The share of the text, at its end, that is held out.

    Attributes
    ----------
    name : str
        What the text is called.
    digest : str
    text, held_out : str

    Raises
    ------
    ValueError
        A file cannot be read.
    """

    def __init__(self, paths: Sequence[str], validation: float):
        self.paths = [os.path.abspath(path) for path in paths]
        self.name = ", ".join(Path(path).name for path in paths) or "the Python language reference"
        whole = read_texts(paths) if paths else language_reference()
        self.digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
        cut = len(whole) - round(len(whole) * validation)
        self.text, self.held_out = whole[:cut], whole[cut:]


class Run:
    """A training of a language model, wherever it stands; made by `new` or `resume`.

    Parameters
    ----------
    settings : mapping
        See `new`.
    corpus : Corpus
    model : LanguageModel
    trainer : Trainer
        Of the model's network.
    """

    def __init__(self, settings: Mapping[str, Any], corpus: Corpus, model: LanguageModel, trainer: Trainer):
        self.settings, self.corpus, self.model, self.trainer = dict(settings), corpus, model, trainer

    @classmethod
    def new(cls, settings: Mapping[str, Any], paths: Sequence[str]) -> Run:
        """A training from the start.

        Parameters
        ----------
        settings : mapping
            `cell`, `hidden`, `layers`, `embedding`, `dropout`, `dtype` of the network; `level`, `validation` (the
            share of the text that is held out), `steps`, `batch`, `epochs`, `optimizer`, `lr` (None for the
            optimizer's own), `schedule`, `clip` (0 for none) and `seed` of the training.
        paths : sequence of str
            Text files; none stands for the Python language reference.

        Raises
        ------
        ValueError
            A file cannot be read, the text is too short, or a setting is out of its range.
        """
        corpus = Corpus(paths, settings["validation"])
        level = settings["level"]
        vocabulary = Vocabulary.from_text(corpus.text, level, MIN_FREQUENCY[level])
        batches = len(_batches(settings, corpus, vocabulary))
        if corpus.held_out and vocabulary.encode(corpus.held_out).size < 3:
            raise ValueError(f"validation: expected at least 3 {level}s held out, got {corpus.held_out!r}")
        model = LanguageModel(
            vocabulary,
            cell=settings["cell"],
            hidden_size=settings["hidden"],
            num_layers=settings["layers"],
            embedding_size=settings["embedding"],
            dropout=settings["dropout"],
            dtype=settings["dtype"],
            seed=settings["seed"],
        )
        optimizer, lr = OPTIMIZERS[settings["optimizer"]]
        trainer = Trainer(
            model.network,
            CrossEntropy(),
            optimizer(lr if settings["lr"] is None else settings["lr"]),
            clip_norm=settings["clip"] or None,
            schedule=Cosine(settings["epochs"] * batches) if settings["schedule"] == "cosine" else None,
        )
        return cls(settings, corpus, model, trainer)

    @classmethod
    def resume(cls, path: str, paths: Sequence[str] = ()) -> Run:
        """A training that was interrupted, where it stands.

        Parameters
        ----------
        path : str
            The file that `fit` has saved.
        paths : sequence of str, optional
            Where the text is now; by default where it was.

        Raises
        ------
        ValueError
            The file is no such file, the text cannot be read, or is another one.
        """
        arrays, meta = load_checkpoint(path)
        try:
            model = LanguageModel.from_checkpoint(arrays, meta)
            known = meta["extra"].get("run")
            if known is None:
                raise CheckpointError("a model without the state of its training, which cannot be resumed")
            corpus = Corpus(paths or known["texts"], known["settings"]["validation"])
            if corpus.digest != known["digest"]:
                raise CheckpointError(f"was trained on another text than {corpus.name} is now")
            return cls(known["settings"], corpus, model, Trainer.resume(model.network, arrays, meta))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def fit(self, out: str, callbacks: Sequence[Callback] = ()) -> History:
        """Train to the end of the last epoch or until Ctrl-C, and save after every epoch and at the end.

        Parameters
        ----------
        out : str
            The file to save to: a model for `LanguageModel.load`, a training for `resume`.
        callbacks : sequence of Callback, optional
        """
        settings, corpus, vocabulary = self.settings, self.corpus, self.model.vocabulary
        run = {"settings": settings, "texts": corpus.paths, "digest": corpus.digest}
        saving = Checkpointing(out, extra={"language_model": self.model.config(), "run": run})
        validation = None
        if corpus.held_out:
            validation = validation_windows(vocabulary.encode(corpus.held_out), settings["steps"], settings["batch"])
        left = max(0, settings["epochs"] - self.trainer.epoch)
        batches = _batches(settings, corpus, vocabulary)
        history = self.trainer.fit(batches, left, validation, [*callbacks, saving])
        if not left:
            saving.save(self.trainer)
        return history


def _batches(settings: Mapping[str, Any], corpus: Corpus, vocabulary: Vocabulary) -> SequentialWindows:
    tokens = vocabulary.encode(corpus.text)
    return SequentialWindows(tokens, settings["steps"], settings["batch"], seed=settings["seed"])
