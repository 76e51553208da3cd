"""The whole way in a few minutes: phantom, both trainings, evaluation, prediction, pictures.

python experiments/quickstart.py
"""

from pathlib import Path

import cli
from absl import flags

from resunet_jax.config import override
from resunet_jax.data.cases import find_cases
from resunet_jax.data.splits import Split, SplitRequest, write_split
from resunet_jax.recipes import DEFAULT_RECIPE, recipe

FLAGS = flags.FLAGS
flags.DEFINE_string("output_dir", "runs/quickstart", "Gets everything; the same command goes on with it.")
flags.DEFINE_integer("epochs", 18, "Passes over the training slices, for each model.", lower_bound=1)
flags.DEFINE_bool("small", False, "Tiny scans and models: to see that it runs, not what it can do.")
cli.define_compilation_cache_flag()
flags.adopt_module_key_flags(cli)  # so that --help shows them

# Of each source one patient chooses the model and another tests it.
SPLIT = Split(
    train=(
        "coronacases_001",
        "coronacases_002",
        "coronacases_003",
        "radiopaedia_10_85902_1",
        "radiopaedia_10_85902_3",
        "radiopaedia_27_86410_0",
    ),
    val=("coronacases_004", "radiopaedia_29_86490_1"),
    test=("coronacases_005", "radiopaedia_14_85914_0"),
)
SMALL_SPLIT = Split(
    train=("coronacases_001", "radiopaedia_10_85902_1", "radiopaedia_10_85902_3"),
    val=("coronacases_002",),
    test=("coronacases_003", "radiopaedia_14_85914_0"),
)


def main() -> None:
    """Runs all steps, each with the function that its own script calls."""
    from resunet_jax.data.phantom import SMALL, PhantomConfig, make_phantom
    from resunet_jax.evaluation.report import print_table, write_report
    from resunet_jax.evaluation.run import evaluate
    from resunet_jax.inference.segment import load_segmenter, segment_scan
    from resunet_jax.training.run import train

    should_stop = cli.stop_signals()
    root = Path(FLAGS.output_dir)
    data, cache, split_file = root / "phantom", root / "cache", root / "split.json"
    small = FLAGS.small
    if not data.exists():
        make_phantom(data, SMALL if small else PhantomConfig())
    write_split(split_file, SMALL_SPLIT if small else SPLIT)
    workdirs = {task: root / task for task in ("lung", "infection")}
    for task, workdir in workdirs.items():
        changes = {
            "model.filters": [4, 8, 16, 32] if small else [8, 16, 32, 64],
            "preprocess.image_size": 96,
            "train.epochs": FLAGS.epochs,
        }
        config = override(recipe(DEFAULT_RECIPE, task), changes)
        lung = workdirs["lung"] if task == "infection" else None
        train(
            config,
            data,
            workdir,
            cache,
            split=SplitRequest(split_file),
            lung_checkpoint=lung,
            should_stop=should_stop,
        )

    checkpoints = {f"{task}_checkpoint": workdir for task, workdir in workdirs.items()}
    report = root / "report"
    evaluation = evaluate(data, cache, output_dir=report, split_file=split_file, **checkpoints)
    write_report(evaluation, report)
    segmenter = load_segmenter(**checkpoints)
    scan = next(case.ct for case in find_cases(data) if case.id == evaluation.volumes[0]["case"])
    masks = segment_scan(scan, root / "masks", segmenter)
    print_table(evaluation)
    print("masks:", *masks, sep="\n  ")
    print(f"report: {report.resolve()}")


if __name__ == "__main__":
    cli.run(main)
