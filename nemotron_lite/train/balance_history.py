"""The balance of the routers over a run: how the load of every expert changed, update by update.

    history = BalanceHistory.from_folder("runs/lite")      a run that has ended, or goes on
    history.routers                                        names such as backbone.layers.1.mixer
    history.relative_load(name)                            updates x experts; 1 is the mean load
    history.max_vio[name], history.entropy[name], history.unused[name]

It is read from the log of the run, which has the loads of every update. A callback gets the same
records while the run goes on. `course/plotting/balance.py` draws the history.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nemotron_lite.train.run_log import read_log


@dataclass(frozen=True)
class BalanceHistory:
    """Loads and balance of every router, by its name.

    Attributes:
        steps: the numbers of the updates.
        load: tokens sent to each expert in each update.
        max_vio, entropy, unused: see `RouterBalance`, one number for each update.
    """

    steps: Int[np.ndarray, "s"]
    load: Mapping[str, Int[np.ndarray, "s e"]]
    max_vio: Mapping[str, Float[np.ndarray, "s"]]
    entropy: Mapping[str, Float[np.ndarray, "s"]]
    unused: Mapping[str, Int[np.ndarray, "s"]]

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> BalanceHistory:
        """From records of a log, or of `TrainResult.history`.

        Records without router statistics are left out: those of a run that older code began.

        Raises:
            ValueError: no record has any.
        """
        found = [record for record in records if record.get("routers")]
        if not found:
            raise ValueError(
                "these records have no router statistics: the model has no mixture of experts, or "
                "the run was made before the log had them."
            )
        names = list(found[-1]["routers"])
        found = [record for record in found if list(record["routers"]) == names]

        def column(name: str, key: str, dtype: type) -> np.ndarray:
            return np.array([record["routers"][name][key] for record in found], dtype=dtype)

        return cls(
            steps=np.array([record["step"] for record in found], dtype=np.int64),
            load={name: column(name, "load", np.int64) for name in names},
            max_vio={name: column(name, "max_vio", np.float64) for name in names},
            entropy={name: column(name, "entropy", np.float64) for name in names},
            unused={name: column(name, "unused", np.int64) for name in names},
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> BalanceHistory:
        """From the log in the folder of a run.

        Raises:
            FileNotFoundError, FileError: there is no readable log.
            ValueError: it has no router statistics.
        """
        return cls.from_records(read_log(folder))

    @property
    def routers(self) -> list[str]:
        """Names of the routers, in the order of the layers; that of the MTP module is the last."""
        return list(self.load)

    def relative_load(self, router: str) -> Float[np.ndarray, "s e"]:
        """Load divided by the mean load of the update; 1 is perfect balance.

        Raises:
            ValueError: no router of that name.
        """
        load = self._of(router)
        return load / np.maximum(load.mean(1, keepdims=True), np.finfo(np.float64).tiny)

    def thinned(self, most: int) -> BalanceHistory:
        """At most `most` points, each of some neighboring updates together.

        A point has the sum of their loads, the means of the other numbers (`unused` rounded), and
        the number of its last update.
        """
        count = min(most, len(self.steps))
        starts = np.array([round(i * len(self.steps) / count) for i in range(count)])
        sizes = np.diff([*starts, len(self.steps)])

        def means(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: np.add.reduceat(c, starts) / sizes for name, c in columns.items()}

        return BalanceHistory(
            steps=self.steps[starts + sizes - 1],
            load={name: np.add.reduceat(load, starts) for name, load in self.load.items()},
            max_vio=means(self.max_vio),
            entropy=means(self.entropy),
            unused={n: np.rint(c).astype(np.int64) for n, c in means(self.unused).items()},
        )

    def _of(self, router: str) -> Int[np.ndarray, "s e"]:
        if router not in self.load:
            raise ValueError(f"router={router!r}: expected one of {', '.join(self.routers)}.")
        return self.load[router]
