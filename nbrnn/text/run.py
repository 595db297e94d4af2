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
    "adam": (Adam, 0.004),
    "adamw": (AdamW, 0.004),
    "rmsprop": (RMSprop, 0.002),
    "adagrad": (Adagrad, 0.05),
    "sgd": (SGD, 1.0),
}
# A word that occurs once teaches nothing but its spelling; as an unknown word it teaches where unknown words stand.
MIN_FREQUENCY = {"char": 1, "word": 2}


class Run:
    """A training of a language model and where it stands.

    Made by `new` or `resume`.

    Attributes
    ----------
    settings : dict
        The settings of `new`.
    name : str
        What the text is called.
    text, held_out : str
        The part to learn from, and the end of the text that validates.
    model : LanguageModel
    trainer : Trainer
    """

    def __init__(self, settings: Mapping[str, Any], paths: Sequence[str]):
        self.settings = dict(settings)
        self.paths = [os.path.abspath(path) for path in paths]
        self.name = ", ".join(Path(path).name for path in paths) or "the Python language reference"
        whole = read_texts(paths) if paths else language_reference()
        self.digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
        cut = len(whole) - round(len(whole) * settings["validation"])
        self.text, self.held_out = whole[:cut], whole[cut:]
        self.model: LanguageModel
        self.trainer: Trainer

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
        run = cls(settings, paths)
        level, kind, lr = settings["level"], *OPTIMIZERS[settings["optimizer"]]
        vocabulary = Vocabulary.from_text(run.text, level, MIN_FREQUENCY[level])
        run.model = LanguageModel(
            vocabulary,
            cell=settings["cell"],
            hidden_size=settings["hidden"],
            num_layers=settings["layers"],
            embedding_size=settings["embedding"],
            dropout=settings["dropout"],
            dtype=settings["dtype"],
            seed=settings["seed"],
        )
        batches = len(run._batches())
        if run.held_out and vocabulary.encode(run.held_out).size < 3:
            raise ValueError(f"validation: expected at least 3 {level}s held out, got {run.held_out!r}")
        run.trainer = Trainer(
            run.model.network,
            CrossEntropy(),
            kind(lr if settings["lr"] is None else settings["lr"]),
            clip_norm=settings["clip"] or None,
            schedule=Cosine(settings["epochs"] * batches) if settings["schedule"] == "cosine" else None,
        )
        return run

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
            if "run" not in meta["extra"]:
                raise CheckpointError("a model without the state of its training, which cannot be resumed")
            known = meta["extra"]["run"]
            run = cls(known["settings"], paths or known["texts"])
            if run.digest != known["digest"]:
                raise CheckpointError(f"was trained on another text than {run.name} is now")
            run.model, run.trainer = model, Trainer.resume(model.network, arrays, meta)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return run

    def _batches(self) -> SequentialWindows:
        tokens = self.model.vocabulary.encode(self.text)
        return SequentialWindows(tokens, self.settings["steps"], self.settings["batch"], seed=self.settings["seed"])

    def fit(self, out: str, callbacks: Sequence[Callback] = ()) -> History:
        """Train to the end of the last epoch or until Ctrl-C, and save after every epoch and at the end.

        Parameters
        ----------
        out : str
            The file to save to: a model for `LanguageModel.load`, a training for `resume`.
        callbacks : sequence of Callback, optional
        """
        run = {"settings": self.settings, "texts": self.paths, "digest": self.digest}
        saving = Checkpointing(out, extra={"language_model": self.model.config(), "run": run})
        validation = None
        if self.held_out:
            tokens = self.model.vocabulary.encode(self.held_out)
            validation = validation_windows(tokens, self.settings["steps"], self.settings["batch"])
        left = max(0, self.settings["epochs"] - self.trainer.epoch)
        history = self.trainer.fit(self._batches(), left, validation, [*callbacks, saving])
        if not left:
            saving.save(self.trainer)
        return history
