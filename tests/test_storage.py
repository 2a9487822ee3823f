"""One file with tensors and a header: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bayeformers import storage
from bayeformers.storage import VERSION, read, write

TENSORS = {"a/left": torch.arange(6.0).reshape(2, 3).T, "a/values": torch.tensor([1e-300], dtype=torch.float64)}
META = {"tau": 0.1, "layers": {"a": ["weight"]}, "nothing": float("nan")}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.safetensors"
    write(path, TENSORS, META, kind="curvature")
    tensors, meta = read(path, kind="curvature")
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype
    assert str(meta) == str(META)  # nan != nan
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_shared_and_tracked_tensors(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    write(tmp_path / "x", {"one": parameter, "two": parameter, "part": parameter[:2]}, {}, kind="k")
    tensors, _ = read(tmp_path / "x", kind="k")
    assert torch.equal(tensors["one"], tensors["two"]) and tensors["part"].shape == (2,)
    assert not tensors["one"].requires_grad


def test_a_crash_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write(path, TENSORS, META, kind="k")

    def broken(tensors: object, name: Path, header: object) -> None:
        name.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(storage, "save_file", broken)
    with pytest.raises(OSError, match="no space left"):
        write(path, {}, {}, kind="k")
    assert read(path, kind="k")[0].keys() == TENSORS.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(ValueError, match="There is no curvature file"):
        read(path, kind="curvature")
    with pytest.raises(ValueError, match="There is no curvature file"):
        read(tmp_path, kind="curvature")
    for content in (b"", b"text", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or no curvature file"):
            read(path, kind="curvature")
    save_file(TENSORS | {"a/left": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="holds 'no bayeformers data', not 'curvature'"):
        read(path, kind="curvature")
    write(path, TENSORS, META, kind="laplace")
    with pytest.raises(ValueError, match="holds 'laplace', not 'curvature'"):
        read(path, kind="curvature")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged or no laplace file"):
        read(path, kind="laplace")
    header = {"kind": "laplace", "version": str(VERSION + 1), "meta": "{}"}
    save_file({"a": torch.ones(1)}, path, header)
    with pytest.raises(ValueError, match=f"has version {VERSION + 1}; this bayeformers reads up to {VERSION}"):
        read(path, kind="laplace")
    save_file({"a": torch.ones(1)}, path, {**header, "version": "1", "meta": "{"})
    with pytest.raises(ValueError, match="is damaged or no laplace file"):
        read(path, kind="laplace")
