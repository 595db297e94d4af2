"""What a training went through, one record an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nbrnn.layers.module import check_size
from nbrnn.training.config import check_number

RECORD = ("epoch", "step", "loss", "validation_loss", "lr", "seconds", "items_per_second")


@dataclass
class History:
    """The records of all epochs, also of those before a resume.

    Attributes
    ----------
    records : list of dict
        For every epoch: `epoch` (from 1 on), `step` (updates made until its end), `loss` (the mean over its items
        while they were trained on), `validation_loss` (or None), `lr` (of its last update), `seconds` (its updates and
        what stood between them) and `items_per_second` (target items, such as tokens).
    interrupted : bool
        Whether Ctrl-C ended the last call of `fit`.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    @classmethod
    def from_records(cls, records: Any) -> History:
        """A history with copies of some records, checked."""
        for record in records:
            if set(record) != set(RECORD):
                raise ValueError(f"history: expected records of {', '.join(RECORD)}, got {record!r}")
            for name, value in record.items():
                if name != "validation_loss" or value is not None:
                    check_number(name, value, least=-math.inf)
        return cls([dict(record) for record in records])

    def to_dict(self) -> dict[str, list]:
        """The records turned round: a list for each of their names, as plotting wants them."""
        return {name: [record[name] for record in self.records] for name in RECORD}


def monitored(record: dict[str, Any]) -> float:
    """The loss to go by: the validation's where there is one."""
    return record["loss"] if record["validation_loss"] is None else record["validation_loss"]


@dataclass
class Progress:
    """Where the current epoch stands."""

    batches: int = 0
    loss_sum: float = 0.0  # each batch's mean times its items
    items: int = 0
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, values: Any) -> Progress:
        """What ``dataclasses.asdict`` was made of, checked."""
        return cls(
            check_size("batches", values["batches"], least=0),
            check_number("loss_sum", values["loss_sum"], least=-math.inf),
            check_size("items", values["items"], least=0),
            check_number("seconds", values["seconds"]),
        )

    def add(self, loss: float, items: int) -> None:
        """Count one batch more."""
        self.batches += 1
        self.loss_sum += loss * items
        self.items += items

    @property
    def loss(self) -> float:
        """The mean over the items so far."""
        return self.loss_sum / max(self.items, 1)

    @property
    def items_per_second(self) -> float:
        return self.items / self.seconds if self.seconds else 0.0
