"""Prints the version and the model card of the models that the package ships.

python experiments/info.py
"""

from common.run import run


def main() -> None:
    """Prints both."""
    from resunet_jax import __version__
    from resunet_jax.weights.pretrained import MODEL_CARD, load_pair, pretrained_folder
    from resunet_jax.weights.store import fingerprint

    print(f"resunet_jax {__version__}")
    for name, loaded in load_pair()._asdict().items():
        print(f"{name} model: {fingerprint(loaded.variables)}, filters {loaded.config.model.filters}")
    print()
    print((pretrained_folder() / MODEL_CARD).read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
