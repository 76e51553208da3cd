"""Prints the version and the model card of the models that the package ships; with --output_dir saves them, too.

python experiments/info.py
python experiments/info.py --output_dir=models
"""

from common import settings
from common.run import run

settings.define_path(
    "output_dir", "Gets the pair as two saved models, lung/ and infection/, to fine-tune; must not exist."
)


def main() -> None:
    """Prints both, and saves the models where asked."""
    from resunet_jax import __version__
    from resunet_jax.weights.pretrained import (
        MODEL_CARD,
        load_pair,
        load_pair_record,
        pretrained_folder,
        save_as_models,
    )
    from resunet_jax.weights.store import fingerprint

    folder, pair = settings.optional_path("output_dir"), load_pair()
    if folder:
        save_as_models(folder, pair, load_pair_record())
    print(f"resunet_jax {__version__}")
    for name, loaded in pair._asdict().items():
        print(f"{name} model: {fingerprint(loaded.variables)}, filters {loaded.config.model.filters}")
    print()
    print((pretrained_folder() / MODEL_CARD).read_text(encoding="utf-8"))
    if folder:
        print(f"models: {folder.resolve()}")


if __name__ == "__main__":
    run(main)
