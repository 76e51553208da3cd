"""Exports the cascade as one file that runs without this package, on CPUs, CUDA GPUs and TPUs.

python experiments/export.py --output=cascade.jaxexport
"""

from absl import flags
from common import settings
from common.run import run

FLAGS = flags.FLAGS
settings.define_path("output", "New file; FILE.json next to it says what goes in and comes out.", required=True)
settings.define_checkpoint_flags()
flags.DEFINE_bool("from_hu", False, "Takes slices in HU and the body's boxes, instead of prepared slices.")


def main() -> None:
    """Exports by the flags."""
    from resunet_jax.weights.export import write_export

    output = settings.path("output")
    predictor, lung, infection = settings.load_cascade()
    metadata = write_export(
        output,
        lung,
        infection,
        thresholds=predictor.mask_thresholds,
        temperature=None if predictor.record is None else predictor.record.temperature,
        from_hu=FLAGS.from_hu,
    )
    inputs = [f"{one['name']} {one['dtype']} ({', '.join(map(str, one['shape']))})" for one in metadata["inputs"]]
    print(f"{output.resolve()}: {', '.join(inputs)}; for {', '.join(metadata['platforms'])}; readable for six months")


if __name__ == "__main__":
    run(main)
