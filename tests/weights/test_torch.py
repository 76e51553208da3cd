"""Conversion from and to the original's checkpoints; needs the extra [torch]."""

import dataclasses
import os
import pickle
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from resunet_jax import init_variables, load_model, load_predictor, recipe, save_model, segment_scan
from resunet_jax.config import Config, ModelConfig, override
from resunet_jax.data.preprocess import slice_box
from resunet_jax.data.readers import read_volume
from resunet_jax.data.roi import body_mask, bounding_box
from resunet_jax.errors import InputError
from resunet_jax.model.build import build_model
from resunet_jax.weights.torch import (
    from_torch,
    original_preprocess,
    params_from_state_dict,
    state_dict_from_params,
    to_torch,
)
from tests.conftest import TINY, Trained, run_script

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[torch]'")
from benchmarks.torch_baseline import TorchResUnet  # noqa: E402 (after the check that torch is there

NARROW = (4, 8, 16, 32)


def original_file(path: Path, channels: int = 1, filters=NARROW, **changes) -> TorchResUnet:
    """A checkpoint as the original wrote it, of a model whose running statistics have seen data."""
    torch.manual_seed(0)
    model = TorchResUnet(channels, filters)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, channels, 32, 32))
    state = {**model.state_dict(), **changes}
    torch.save({"model_state_dict": {k: v for k, v in state.items() if v is not None}, "epoch": 3}, path)
    return model.eval()


@pytest.mark.parametrize(
    ("channels", "filters", "task"),
    [
        (1, NARROW, "lung"),
        (2, NARROW, "infection"),
        (1, (64, 128, 256, 512), "lung"),
        (2, (64, 128, 256, 512), "infection"),
    ],
)
def test_logits_agree_and_the_way_back_is_the_identity(channels: int, filters, task: str, tmp_path: Path) -> None:
    theirs = original_file(tmp_path / "original.pt", channels, filters)
    from_torch(tmp_path / "original.pt", tmp_path / "model", task)
    model, variables, config = load_model(tmp_path / "model")
    original = dataclasses.replace(recipe("original", task), model=ModelConfig(filters=filters))
    assert config == original  # which removes no components: masks are those of the original
    x = np.random.default_rng(0).random((2, 64, 64, channels), np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy().transpose(0, 2, 3, 1)
    logits = jax.jit(lambda x: model.apply(variables, x, train=False))(x)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)

    to_torch(tmp_path / "model", tmp_path / "back.pt")
    before, after = (
        torch.load(tmp_path / name, weights_only=True)["model_state_dict"] for name in ("original.pt", "back.pt")
    )
    assert list(before) == list(after)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name], value), name
    TorchResUnet(channels, filters).load_state_dict(after)


def test_a_model_of_ours_goes_there_and_back(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(task="infection", **TINY)
    save_model(tmp_path / "ours", init_variables(build_model(config), jax.random.key(0)), config)
    to_torch(tmp_path / "ours", tmp_path / "infection.pt")
    assert "prepares slices otherwise" in caplog.text
    assert "normalization air, context_mm 0, closing_fraction 0.125" in caplog.text
    caplog.clear()
    state = torch.load(tmp_path / "infection.pt", weights_only=True)["model_state_dict"]
    TorchResUnet(2, NARROW).load_state_dict(state)
    from_torch(tmp_path / "infection.pt", tmp_path / "back", "infection", image_size=32)
    ours, back = load_model(tmp_path / "ours").variables, load_model(tmp_path / "back").variables
    jax.tree.map(np.testing.assert_array_equal, ours, back)
    to_torch(tmp_path / "back", tmp_path / "again.pt")
    assert not caplog.text  # a model of the original's
    to_torch(trained.infection, tmp_path / "context.pt")
    assert "give this model 4 channel(s)" in caplog.text.replace("\n", " ")
    assert "context_mm 5" in caplog.text
    with pytest.raises(InputError, match=r"context\.pt: .*; the original has none with context"):
        from_torch(tmp_path / "context.pt", tmp_path / "context", "infection", image_size=32)


def test_views_that_the_original_has_not_are_named(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(trained.lung)
    for name, changes in (("plain", {}), ("views", {"model.mirroring": True}), ("patches", {"model.patch_grid": 2})):
        caplog.clear()
        save_model(tmp_path / name, loaded.variables, override(loaded.config, changes))
        to_torch(tmp_path / name, tmp_path / f"{name}.pt")
        assert ("in patches or views" in caplog.text) == bool(changes)


def test_preprocessing_follows_the_weights(tmp_path: Path, phantom: Path) -> None:
    original_file(tmp_path / "lung.pt")
    original_file(tmp_path / "infection.pt", channels=2)
    for task in ("lung", "infection"):
        from_torch(tmp_path / f"{task}.pt", tmp_path / task, task, image_size=32)
    config = load_model(tmp_path / "lung").config.preprocess
    assert config.normalization == "minmax"
    assert config.body_thresholds_minmax == (50 / 255, 175 / 255)
    for name, threshold in (("coronacases_org_001", 50), ("radiopaedia_org_covid-19-pneumonia-14_85914_0-dcm", 175)):
        volume = read_volume(phantom / "ct_scans" / f"{name}.nii")
        assert volume.intensity_scale == ("hu" if threshold == 50 else "windowed")
        values = volume.values[..., 5].astype(np.float32)
        stretched = (values - values.min()) / (values.max() - values.min()) * 255
        assert slice_box(volume, 5, config) == bounding_box(body_mask(stretched, threshold, 5))
    predictor = load_predictor(tmp_path / "lung", tmp_path / "infection")
    assert predictor.preprocess == original_preprocess(32)
    scan = phantom / "ct_scans" / "coronacases_org_001.nii"
    masks = segment_scan(scan, tmp_path / "masks", predictor)
    assert [nib.load(mask).shape for mask in masks] == [nib.load(scan).shape] * 2


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"not a checkpoint"), "refused, not a plain PyTorch checkpoint"),
        (lambda path: path.write_bytes(b""), "refused, not a plain PyTorch checkpoint"),
        (lambda path: None, "no such file"),
        (lambda path: torch.save([1, 2], path), "no dict with 'model_state_dict'"),
        (lambda path: torch.save({"model_state_dict": {1: 2}}, path), "no dict with 'model_state_dict'"),
        (lambda path: torch.save({"model_state_dict": {"a": "b"}}, path), "a is not a plain float32 tensor"),
        (lambda path: torch.save({"model_state_dict": {"a": torch.zeros(1).expand(10**9)}}, path), "a is not a plain"),
        (lambda path: torch.save({"model_state_dict": {"a": torch.zeros(3)}}, path), "a is not in the original's"),
        (lambda path: torch.save({"model_state_dict": {}}, path), "it has no 'input_layer.0.weight'"),
        (lambda path: original_file(path, **{"input_layer.0.weight": torch.zeros(3)}), "has shape"),
        (
            lambda path: original_file(path, **{"bridge.conv_skip.1.running_var": None}),
            "bridge.conv_skip.1.running_var",
        ),
        (lambda path: original_file(path, **{"bridge.conv_skip.1.bias": torch.zeros(3)}), "are not those of"),
        (lambda path: original_file(path, **{"output_layer.0.bias": torch.full((1,), torch.nan)}), "NaN"),
        (lambda path: original_file(path, **{"output_layer.0.bias": torch.zeros(1).half()}), "float32"),
        (lambda path: original_file(path, **{"output_layer.0.running_mean": torch.zeros(1)}), "are not those of"),
        (lambda path: original_file(path, channels=2), "a model on 2 channel.*`target`"),
    ],
)
def test_a_wrong_file_is_refused_and_leaves_nothing(write, message: str, tmp_path: Path) -> None:
    write(tmp_path / "file.pt")
    with pytest.raises(InputError, match=message):
        from_torch(tmp_path / "file.pt", tmp_path / "model", "lung")
    assert not (tmp_path / "model").exists()


def test_a_hostile_file_is_not_executed(tmp_path: Path) -> None:
    torch.save({"model_state_dict": Hostile(tmp_path / "harm")}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model_state_dict": Hostile(tmp_path / "harm")}))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(InputError, match="refused"):
            from_torch(tmp_path / name, tmp_path / "model", "lung")
    assert not (tmp_path / "harm").exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())  # it would have done harm
    assert (tmp_path / "harm").is_dir()


def test_nothing_is_overwritten(trained: Trained, tmp_path: Path) -> None:
    original_file(tmp_path / "file.pt")
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="exists already"):
        from_torch(str(tmp_path / "file.pt"), str(tmp_path / "model"), "lung")
    with pytest.raises(InputError, match="exists already"):
        to_torch(str(trained.lung), str(tmp_path / "file.pt"))


def test_state_dict_has_every_key_of_the_original() -> None:
    model = TorchResUnet(1, NARROW)
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    arrays = {name: value.numpy() for name, value in model.state_dict().items() if name in names}
    back = state_dict_from_params(params_from_state_dict(arrays))
    assert list(back) == names
    for name in names:
        np.testing.assert_array_equal(back[name], arrays[name])


def test_script_converts_both_ways_for_evaluate(trained: Trained, tmp_path: Path) -> None:
    original_file(tmp_path / "lung.pt")
    result = run_script(
        "convert_torch", "--task=lung", f"--input={tmp_path / 'lung.pt'}", f"--output_dir={tmp_path / 'm'}"
    )
    assert result.returncode == 0, result.stderr
    flags = (f"--data_dir={trained.data}", f"--cache_dir={tmp_path / 'c'}", f"--output_dir={tmp_path / 'report'}")
    result = run_script("evaluate", *flags, f"--lung_checkpoint={tmp_path / 'm'}", "--split=all")
    assert result.returncode == 0, result.stderr
    result = run_script("convert_torch", f"--input={tmp_path / 'm'}", f"--output_file={tmp_path / 'new' / 'back.pt'}")
    assert result.returncode == 0, result.stderr
    for flags in ((), (f"--output_dir={tmp_path / 'n'}",)):
        result = run_script("convert_torch", f"--input={tmp_path / 'lung.pt'}", *flags)
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].startswith("error: ")


def test_thresholds_come_in_pairs() -> None:
    with pytest.raises(InputError, match="body_thresholds_minmax"):
        Config(preprocess=dataclasses.replace(original_preprocess(32), body_thresholds_minmax=(0.5,)))
