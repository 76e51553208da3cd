"""Trains the pair of models that the package ships, on all cases of a data set.

python experiments/train_pretrained.py --data_dir=DATA --workdir=runs/pretrained
"""

import json

from absl import flags
from common import settings
from common.run import run, stop_signals

settings.define_data_flags()
settings.define_path("workdir", "Folder of both runs; the same command resumes them.", required=True)
settings.define_path("output_dir", "Gets the pair, as the package has it; by default pretrained/ in --workdir.")
settings.define_cache_flags()
settings.define_initial_pair_flags()

CHANGES = {"model.filters": [16, 32, 64, 128], "train.epochs": 15}


def main() -> None:
    """Trains the lung model, then the infection model, and saves both; without validation cases the last is kept."""
    from resunet_jax.config import Structure, override
    from resunet_jax.data.cases import find_cases, require_infection_masks
    from resunet_jax.data.splits import Split, SplitRequest, write_split
    from resunet_jax.files import make_output_dir, require_absent
    from resunet_jax.plugins import load_plugins
    from resunet_jax.recipes import DEFAULT_RECIPE, recipe
    from resunet_jax.training.train import load_initial, train
    from resunet_jax.weights.pretrained import ModelPair, save_pair
    from resunet_jax.weights.store import load_model

    should_stop, tables = stop_signals(), load_plugins()
    data_dir, workdir = settings.path("data_dir"), settings.path("workdir")
    folder = settings.optional_path("output_dir") or workdir / "pretrained"
    require_absent(folder, "`output_dir`")
    cases = find_cases(data_dir, tables.readers)
    require_infection_masks(cases)
    tasks: tuple[Structure, ...] = ("lung", "infection")
    configs = {task: override(recipe(DEFAULT_RECIPE, task), CHANGES) for task in tasks}
    initial = settings.initial_pair()
    for task, path in initial.items():
        load_initial(configs[task], path, tables.architectures)  # refused here, not after the first training
    make_output_dir(workdir)
    split_file = workdir / "split.json"
    write_split(split_file, Split(train=tuple(case.id for case in cases), val=(), test=()))
    for task in tasks:
        train(
            configs[task],
            data_dir,
            workdir / task,
            settings.path("cache_dir"),
            split=SplitRequest(split_file),
            lung_checkpoint=workdir / "lung" if task == "infection" else None,
            initial_checkpoint=initial.get(task),
            should_stop=should_stop,
            assumed=settings.assumption(),
            max_cache_gb=flags.FLAGS.max_cache_gb,
            **tables.for_training,
        )
    save_pair(folder, ModelPair(*(load_model(workdir / task) for task in tasks)))
    print(f"models: {folder.resolve()}")
    print(json.dumps(json.loads((folder / "files.json").read_text(encoding="utf-8")), indent=2))


if __name__ == "__main__":
    run(main)
