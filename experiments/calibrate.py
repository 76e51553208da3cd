"""Calibrates a pair of models on patients it has not seen: temperature, intervals, failure detection.

python experiments/calibrate.py --data_dir=DATA --split_file=SPLIT --lung_checkpoint=runs/lung \
        --infection_checkpoint=runs/infection --output_dir=runs/calibration
python experiments/calibrate.py --data_dir=DATA --study_dir=runs/folds --output_dir=runs/calibration

The test cases of --split_file, by default those of the models' own split, must be held out from the training:
intervals are then split conformal. With --study_dir, a finished cross-validation or ablation, its fold models are
evaluated on the cases that tested them, and the intervals of the pair, which may have seen them all, are an estimate;
--split_file then names test cases of no fold, on which CV+ intervals of the fold models are tried. The record,
uncertainty.json, goes next to the infection model, where `predict`, `evaluate` and `export` find it; without a
checkpoint it is of the shipped pair, which --pair_dir writes with it.
"""

import functools

from absl import flags
from common import settings
from common.run import run

from resunet_jax.errors import InputError

FLAGS = flags.FLAGS
settings.define_data_flags()
settings.define_path("output_dir", "Gets uncertainty.json, summary.json and table.md.", required=True)
settings.define_model_flags()
settings.define_path("split_file", "Its test cases calibrate; with --study_dir they try CV+ intervals.")
settings.define_path("study_dir", "Study whose fold models are evaluated instead.")
settings.define_path("pair_dir", "New folder: gets the shipped pair with its record, as the package has it.")
flags.DEFINE_string("variant", None, "Variant of the study to use, where it has several.")
flags.DEFINE_integer("seed", None, "Seed of the study to use, where it has several.")
settings.define_cache_flags()


def main() -> None:
    """Calibrates by the flags."""
    from resunet_jax.files import check_output_dir, make_output_dir, require_absent, write_json, write_text
    from resunet_jax.inference.predictor import load_predictor
    from resunet_jax.plugins import load_plugins
    from resunet_jax.studies import calibrate
    from resunet_jax.weights.pretrained import load_pair, save_pair
    from resunet_jax.weights.uncertainty import UNCERTAINTY_FILE, save_record

    output_dir, study_dir = settings.path("output_dir"), settings.optional_path("study_dir")
    split_file, checkpoint = settings.optional_path("split_file"), settings.optional_path("infection_checkpoint")
    check_output_dir(output_dir)
    pair_dir = settings.optional_path("pair_dir")
    if pair_dir is not None and checkpoint is not None:
        raise InputError(
            "--pair_dir is for the shipped pair; drop --infection_checkpoint, next to which its record goes"
        )
    if pair_dir is not None:
        require_absent(pair_dir, "`pair_dir`")
    if study_dir is None and (FLAGS.variant is not None or FLAGS.seed is not None):
        raise InputError("--variant and --seed choose models of a study; give --study_dir too, or leave them out")
    if checkpoint is not None:
        check_output_dir(checkpoint)
    models = (settings.optional_path("lung_checkpoint"), checkpoint)
    has_split = split_file is not None or any(model and (model / "split.json").is_file() for model in models)
    if study_dir is None and not has_split:
        raise InputError(
            "which cases have the models not seen? Give --split_file, whose test cases these are, or --study_dir"
        )
    tables = load_plugins()
    arguments = settings.model_arguments()
    target = load_predictor(**arguments, architectures=tables.architectures)
    calibrate.require_pair(target)
    evaluator = functools.partial(
        calibrate.held_out_errors,
        settings.path("data_dir"),
        settings.path("cache_dir"),
        output_dir=output_dir,
        batch_size=FLAGS.batch_size,
        tables=tables,
        assumed=settings.assumption(),
        max_cache_gb=FLAGS.max_cache_gb,
    )
    if study_dir is None:
        errors = evaluator(split_file=split_file, **arguments)
        source = f"{len(errors.logits)} held-out patients"
    else:
        folds = calibrate.study_folds(study_dir, FLAGS.variant, FLAGS.seed)
        calibrate.check_of_no_fold(folds, split_file, settings.path("data_dir"), tables)
        errors = calibrate.fold_errors(evaluator, folds, target)
        source = f"{len(folds)} folds of {len(errors.logits)} patients"
    record = calibrate.make_record(errors, target, "split_conformal" if study_dir is None else "fold_residuals", source)
    summary = calibrate.summarize_errors(errors)
    if study_dir is not None and split_file is not None:
        summary["cv_plus"] = calibrate.cv_plus_coverage(evaluator, folds, errors, target, split_file)
    make_output_dir(output_dir)
    write_json(output_dir / "summary.json", summary)
    write_text(output_dir / "table.md", calibrate.to_markdown(summary, record))
    files = [save_record(output_dir, record)]
    if pair_dir is not None:
        save_pair(pair_dir, load_pair(), record)
    if checkpoint is not None:
        files.append(save_record(checkpoint, record))
    print((output_dir / "table.md").read_text(encoding="utf-8"))
    print(f"{UNCERTAINTY_FILE}: {', '.join(str(file.resolve()) for file in files)}")


if __name__ == "__main__":
    run(main)
