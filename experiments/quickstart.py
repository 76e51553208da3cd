"""End to end in a few minutes: phantom, both trainings, evaluation, prediction, pictures.

python experiments/quickstart.py
"""

from absl import flags
from common import settings
from common.run import run, stop_signals

from resunet_jax.config import TaskName, override
from resunet_jax.data.cases import find_cases
from resunet_jax.data.splits import Split, SplitRequest, read_split, write_split
from resunet_jax.errors import InputError
from resunet_jax.recipes import DEFAULT_RECIPE, recipe

FLAGS = flags.FLAGS
settings.define_path("output_dir", "Gets everything; the same command resumes it.", default="runs/quickstart")
flags.DEFINE_integer(
    "epochs",
    20,
    "Passes over the training slices, on average: half as many for the lungs, half more for the infection.",
    lower_bound=1,
)
flags.DEFINE_bool("small", False, "Tiny scans and models: to see that it runs, not what it can do.")
settings.define_compilation_cache_flag()

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

# A few hundred steps do not suffice to learn what these augmentations teach.
_FEW_STEPS = {
    "augment.context_dropout_prob": 0.0,
    "augment.lesion_densify_prob": 0.0,
    "augment.lesion_fade_prob": 0.0,
    "augment.max_contrast": 0.0,
    "augment.max_brightness": 0.0,
    "augment.max_gamma": 0.0,
    "augment.max_rotation_deg": 0.0,
    "augment.max_scale": 0.0,
}


def main() -> None:
    """Runs all steps, each with the function that its own script calls."""
    from resunet_jax.data.phantom import SMALL, PhantomConfig, make_phantom
    from resunet_jax.data.readers import find_sources
    from resunet_jax.evaluation.evaluate import evaluate
    from resunet_jax.evaluation.report import print_table, write_report
    from resunet_jax.inference.batch import segment_scans
    from resunet_jax.inference.predictor import load_predictor
    from resunet_jax.report.outputs import make_outputs, write_cohort
    from resunet_jax.training.train import train

    should_stop = stop_signals()
    root = settings.path("output_dir")
    data, cache, split_file = root / "phantom", root / "cache", root / "split.json"
    small = FLAGS.small
    split = SMALL_SPLIT if small else SPLIT
    if split_file.exists() and read_split(split_file) != split:
        raise InputError(f"--output_dir={root}: holds a run with{'out' * small} --small; choose another folder")
    if not data.exists():
        make_phantom(data, SMALL if small else PhantomConfig())
    write_split(split_file, split)
    tasks: tuple[TaskName, ...] = ("lung", "infection")
    for task in tasks:
        changes = {
            "model.filters": [4, 8, 16, 32] if small else [8, 16, 32, 64],
            "preprocess.image_size": 48 if small else 96,
            "train.epochs": max(1, FLAGS.epochs // 2 if task == "lung" else FLAGS.epochs * 3 // 2),
            **(_FEW_STEPS if task == "infection" else {}),
        }
        config = override(recipe(DEFAULT_RECIPE, task), changes)
        train(
            config,
            data,
            root / task,
            cache,
            split=SplitRequest(split_file),
            lung_checkpoint=root / "lung" if task == "infection" else None,
            should_stop=should_stop,
        )

    lung, infection, report = root / "lung", root / "infection", root / "report"
    evaluation = evaluate(
        data,
        cache,
        output_dir=report,
        lung_checkpoint=lung,
        infection_checkpoint=infection,
        split_file=split_file,
        validated_threshold=True,  # the recipe's was chosen on real scans, whose lesions end softly
    )
    write_report(evaluation, report)
    tested = [case.ct for case in find_cases(data) if case.id in {row["case"] for row in evaluation.volumes}]
    sources = [source for scan in tested for source in find_sources(scan)]
    predictor = load_predictor(lung, infection, validated_threshold=True)
    for result in segment_scans(sources, root / "masks", predictor, outputs=make_outputs()):
        if result.error:
            raise result.error
    _, index = write_cohort(root / "masks")
    print_table(evaluation)
    print(f"evaluation: {report.resolve()}")
    print(f"masks and reports of the test scans: {index.resolve()}")


if __name__ == "__main__":
    run(main)
