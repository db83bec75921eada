"""From what a user calls a model to its directory."""

from importlib.resources import files
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from jaxserve.checkpoint.locate import EMBEDDED, locate
from jaxserve.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    """A test that asks the hub by mistake fails at once."""

    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert locate(tmp_path) == tmp_path
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_names_come_before_directories(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    here = Path(str(files("jaxserve"))) / "data" / name
    if here.is_dir():
        assert locate(name) == here
    else:
        with pytest.raises(CheckpointError, match="missing from this installation"):
            locate(name)
    assert locate(f"./{name}") == Path(name)


def test_a_file_is_not_a_model(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError) as caught:
        locate(tmp_path / "model.safetensors")
    assert str(caught.value).endswith(f"give the directory it is in: {tmp_path}")


@pytest.mark.parametrize(
    "name", ["tyny", "./none", "/no/such/dir", "a/b/c", "", "../x/y", "~none/x"]
)
def test_what_is_nothing_is_one_clear_error_without_the_network(name: str):
    with pytest.raises(CheckpointError) as caught:
        locate(name)
    message = str(caught.value)
    assert f"{name!r}" in message
    assert "tiny, tiny-draft" in message
    assert "OWNER/NAME" in message


def test_a_hub_name_downloads_safetensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def download(name, **options):
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("owner/name-1.0") == tmp_path
    names = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "pytorch_model.bin",
        "model.pt",
        "modeling.py",
        "consolidated.00.safetensors",
        "original/consolidated.safetensors",
        "onnx/config.json",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        names, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert asked["name"] == "owner/name-1.0"
    assert list(kept) == names[:5]


def test_offline_says_so(monkeypatch: pytest.MonkeyPatch):
    def missing(*args, **kwargs):
        raise LocalEntryNotFoundError("a long story\nof several lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(CheckpointError, match=r"'owner/name' .* could not be downloaded .*hf auth"):
        locate("owner/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as caught:
        locate("owner/name")
    assert "\n" not in str(caught.value)
