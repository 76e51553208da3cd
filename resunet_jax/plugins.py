"""What installed packages add to the tables of losses, augmentations, architectures, metrics and readers.

A package names an object in the entry-point group `resunet_jax.plugins`: a mapping from the names of the tables below
to rows, as in {"losses": {"mine": Loss(...)}}. The scripts load them; library code passes tables as arguments.
"""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from resunet_jax.data.readers import READERS, Reader
from resunet_jax.errors import InputError, first_line
from resunet_jax.metrics import METRICS, Metric, check_names
from resunet_jax.model.build import ARCHITECTURES, Architecture
from resunet_jax.training.augment import AUGMENTATIONS, Augmentation
from resunet_jax.training.losses import LOSSES, Loss

GROUP = "resunet_jax.plugins"
"""The entry-point group."""

_ROW_TYPES: dict[str, type] = {"losses": Loss, "metrics": Metric, "readers": Reader}  # in the others, functions


@dataclasses.dataclass(frozen=True)
class Tables:
    """All tables that can be added to; the defaults are what this package has itself.

    Attributes:
      losses: see `LOSSES`, as for the others.
      augmentations: transforms of a training slice.
      architectures: models.
      metrics: columns of an evaluation.
      readers: file formats.
    """

    losses: Mapping[str, Loss] = dataclasses.field(default_factory=lambda: LOSSES)
    augmentations: Mapping[str, Augmentation] = dataclasses.field(default_factory=lambda: AUGMENTATIONS)
    architectures: Mapping[str, Architecture] = dataclasses.field(default_factory=lambda: ARCHITECTURES)
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=lambda: METRICS)
    readers: Mapping[str, Reader] = dataclasses.field(default_factory=lambda: READERS)

    def extended(self, rows: Mapping[str, Mapping[str, Any]], source: str) -> "Tables":
        """The tables with further rows, by table and name; `source` is where they come from, for error messages.

        Raises:
          InputError: an unknown table, a name that is taken, or a row of another type than the table's.
        """
        tables = {field.name: dict(getattr(self, field.name)) for field in dataclasses.fields(self)}
        for table, added in rows.items():
            if table not in tables:
                raise InputError(f"{source}: there is no table {table!r}; there are {', '.join(tables)}")
            for name, row in added.items():
                if name in tables[table]:
                    raise InputError(f"{source}: {name!r} is in the table {table} already; choose another name")
                kind = _ROW_TYPES.get(table)
                if not (isinstance(row, kind) if kind else callable(row)):
                    expected = f"a {kind.__name__}" if kind else "a function"
                    raise InputError(f"{source}: {name!r} in the table {table} is {row!r}; it must be {expected}")
                tables[table][name] = row
            if table == "metrics":
                check_names(added, source)
        return Tables(**tables)

    @property
    def for_training(self) -> dict[str, Any]:
        """As keywords of `train`."""
        return {name: table for name, table in vars(self).items() if name != "metrics"}

    @property
    def for_evaluation(self) -> dict[str, Any]:
        """As keywords of `evaluate`."""
        return {"metrics": self.metrics, "architectures": self.architectures, "readers": self.readers}


def load_plugins() -> Tables:
    """The tables with the rows of every installed plugin.

    Raises:
      InputError: a plugin cannot be imported, or adds what cannot be added.
    """
    tables = Tables()
    for entry in sorted(importlib.metadata.entry_points(group=GROUP)):
        source = f"plugin {entry.name} ({entry.value})"
        try:
            rows = entry.load()
            items = {table: dict(added) for table, added in rows.items()}
        except Exception as error:  # whatever another's module raises
            raise InputError(f"{source}: cannot be loaded ({first_line(error)}); fix or uninstall it") from error
        tables = tables.extended(items, source)
    return tables
