"""Exports the cascade as one ONNX file, in an environment of its own: its converter wants an older orbax than we do.

python -m venv .venv/onnx
.venv/onnx/bin/pip install jax2onnx onnxruntime filelock lazy_loader nibabel pillow pydicom rich surface-distance
.venv/onnx/bin/pip install --no-deps .
.venv/onnx/bin/python experiments/export_onnx.py --output=cascade.onnx
"""

import logging

from common import settings
from common.run import run

from resunet_jax.errors import InputError

settings.define_path("output", "New file; FILE.json next to it says what goes in and comes out.", required=True)
settings.define_checkpoint_flags()


def main() -> None:
    """Exports by the flags."""
    try:
        import jax2onnx
    except ImportError as error:
        raise InputError(
            f"jax2onnx cannot be imported ({error}); it needs an environment of its own: see --help"
        ) from error
    from resunet_jax.weights.export import cascade_program, check_new_files, describe_cascade, write_files

    output = settings.path("output")
    check_new_files(output)
    predictor, *pair = settings.load_cascade()
    size, channels = predictor.preprocess.image_size, predictor.preprocess.channels
    # Of the probabilities as the models give them: the file has no calibrated one.
    description = describe_cascade(*pair, thresholds=predictor.mask_thresholds)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of every shape that it leaves out
    model = jax2onnx.to_onnx(
        cascade_program(*pair, thresholds=predictor.mask_thresholds),
        [("b", size, size, channels)],
        model_name="cascade",
        input_names=["images"],
        output_names=[output["name"] for output in description["outputs"]],
    )
    del model.graph.value_info[:]  # shapes within the graph, of which the converter notes some in another order
    form = {"format": f"ONNX, opset {model.opset_import[0].version}"}
    write_files(output, model.SerializeToString(), {**form, **description})
    print(f"{output.resolve()}: images float32 (b, {size}, {size}, {channels})")


if __name__ == "__main__":
    run(main)
