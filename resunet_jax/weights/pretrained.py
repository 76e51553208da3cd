"""The pair of models that this package ships: a folder for each, of a config and one file of variables.

The files are flax's msgpack, of which equal variables are equal bytes; orbax writes times and random names.
"""

import hashlib
import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import serialization

from resunet_jax.config import from_dict, to_dict
from resunet_jax.errors import InputError
from resunet_jax.files import atomic_dir, json_text, require_absent, write_json
from resunet_jax.model.build import build_model
from resunet_jax.weights.store import CONFIG_FILE, DIGESTS_FILE, LoadedModel, require_backend, save_model
from resunet_jax.weights.uncertainty import UNCERTAINTY_FILE, UncertaintyRecord, parse_record

VARIABLES_FILE = "variables.msgpack"
MODEL_CARD = "MODEL_CARD.md"
_RECORD = f"infection/{UNCERTAINTY_FILE}"
_FOLDER = "pretrained"


class ModelPair(NamedTuple):
    """The two models of a cascade.

    Attributes:
      lung: on CT.
      infection: on [CT, lung probability].
    """

    lung: LoadedModel
    infection: LoadedModel


def pretrained_folder() -> Traversable:
    """The folder of the shipped pair: lung/, infection/ (and in it uncertainty.json), files.json and MODEL_CARD.md."""
    return resources.files(__package__) / _FOLDER


def load_pair(folder: Traversable | None = None) -> ModelPair:
    """The shipped pair of models.

    Args:
      folder: another one that `save_pair` has written.

    Raises:
      InputError: a file is missing, or not as it was shipped.
    """
    require_backend()
    contents = _read(folder)
    return ModelPair(*(_load(contents, name) for name in ModelPair._fields))


def load_pair_record(folder: Traversable | None = None) -> UncertaintyRecord | None:
    """What is known of the errors of the shipped pair, or of another one; None where nothing is.

    Raises:
      InputError: a file is missing, or not as it was shipped.
    """
    content = _read(folder).get(_RECORD)
    return None if content is None else parse_record(content, f"{_FOLDER}/{_RECORD}")


def _read(folder: Traversable | None) -> dict[str, bytes]:
    """The files of a pair by name, compared with their digests."""
    folder = pretrained_folder() if folder is None else folder
    try:
        digests = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
        needed = [f"{name}/{file}" for name in ModelPair._fields for file in (CONFIG_FILE, VARIABLES_FILE)]
        digests = {name: digests[name] for name in dict.fromkeys((*needed, *digests))}
        contents = {name: folder.joinpath(*name.split("/")).read_bytes() for name in digests}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder}: the shipped models are incomplete ({error}); install the package again") from error
    for name, content in contents.items():
        if _sha256(content) != digests[name]:
            raise InputError(f"{folder}: {name} is not what was shipped; install the package again")
    return contents


def save_pair(folder: Path, pair: ModelPair, record: UncertaintyRecord | None = None) -> None:
    """Writes a pair, and what is known of its errors, as it is shipped, atomically; equal models give equal bytes.

    Raises:
      InputError: the folder exists or cannot be written.
    """
    require_absent(folder)
    contents = {}
    for name, loaded in pair._asdict().items():
        variables = jax.tree.map(np.asarray, loaded.variables)
        contents[f"{name}/{CONFIG_FILE}"] = json_text(to_dict(loaded.config)).encode()
        contents[f"{name}/{VARIABLES_FILE}"] = serialization.to_bytes(variables)
    if record is not None:
        contents[_RECORD] = record.to_json().encode()
    with atomic_dir(folder) as partial:
        for name, content in contents.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        digests = {name: _sha256(content) for name, content in contents.items()}
        write_json(partial / DIGESTS_FILE, digests)


def save_as_models(folder: Path, pair: ModelPair, record: UncertaintyRecord | None = None) -> None:
    """Writes a pair as two saved models, lung/ and infection/, and what is known of its errors with the latter.

    Raises:
      InputError: the folder exists or cannot be written.
    """
    require_absent(folder)
    with atomic_dir(folder) as partial:
        for name, loaded in pair._asdict().items():
            files = {UNCERTAINTY_FILE: record.to_json()} if name == "infection" and record else {}
            save_model(partial / name, loaded.variables, loaded.config, files)


def _load(contents: dict[str, bytes], name: str) -> LoadedModel:
    config = from_dict(json.loads(contents[f"{name}/{CONFIG_FILE}"]), f"{_FOLDER}/{name}/{CONFIG_FILE}")
    variables = serialization.msgpack_restore(contents[f"{name}/{VARIABLES_FILE}"])
    return LoadedModel(build_model(config), jax.device_put(variables), config)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
