"""Weight files: damage is detected, and headers and configs are checked before anything is built from them."""

import json
import random
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from helpers import damaged, tiny_model
from safetensors.torch import load_file, save_file

from open_mythos import CheckpointError, OpenMythos, weights
from open_mythos.checkpoint import SHIPPED

TENSORS = {
    "a": torch.randn(700, 33), "b": torch.randn(5).bfloat16(), "c": torch.tensor(3), "d": torch.empty(0, 4),
    "e": torch.randn(1200, 1000), "f": torch.tensor([True, False, True]),
}  # fmt: skip


def test_weights_round_trip_and_safetensors_can_read_them(tmp_path: Path) -> None:
    weights.write(tmp_path / "w.safetensors", TENSORS)
    for found in (weights.read(tmp_path / "w.safetensors"), load_file(tmp_path / "w.safetensors")):
        assert found.keys() == TENSORS.keys()
        assert all(found[name].equal(TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in found)


def test_sharded_writing_holds_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    read = list[weakref.ref[torch.Tensor]]()

    class Elsewhere:
        shape, dtype = (100, 3), torch.float64

        def __getitem__(self, where: tuple[()]) -> torch.Tensor:
            assert not any(one() is not None for one in read)
            tensor = torch.full(self.shape, float(len(read)), dtype=self.dtype)
            read.append(weakref.ref(tensor.untyped_storage()))
            return tensor

    paths = weights.write_divided(tmp_path / "w.safetensors", {name: Elsewhere() for name in "abcdefg"}, 3 * 2400)
    assert [len(weights.read(path)) for path in paths[:-1]] == [3, 3, 1] and len(read) == 7
    assert weights.read(paths[1])["d"].eq(3).all()
    assert len(weights.write_divided(tmp_path / "v.safetensors", dict.fromkeys("ab", torch.ones(99)), 50)) == 3


def test_a_model_is_sharded_by_size_and_earlier_shards_are_removed(tmp_path: Path) -> None:
    for seed, size in enumerate(("50KB", "1GB", 70_000)):
        model = tiny_model(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
        parts, others = sorted(tmp_path.glob("*.safetensors")), {"config.json", "model.safetensors.index.json"}
        if size == "1GB":
            assert [path.name for path in parts] == ["model.safetensors"]
            others.remove("model.safetensors.index.json")
        else:
            assert parts[0].name == f"model-00001-of-{len(parts):05d}.safetensors" and len(parts) > 1
        for path in parts:
            assert weights.has_checksum(path)
            assert sum(tensor.nbytes for tensor in weights.read(path).values()) <= weights.n_bytes(size)
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in parts} | others
        loaded = OpenMythos.from_pretrained(tmp_path).state_dict()
        assert all(loaded[name].equal(tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", ["", "0", -1, "0.5GB", "5 dozen", "GB"])
def test_an_invalid_shard_size_is_refused(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(ValueError, match=r"is not a file size; use a number of bytes, or a size such as 5GB"):
        tiny_model().save_pretrained(tmp_path / "m", max_shard_size=size)
    assert not (tmp_path / "m").exists()


def test_shards_of_two_saves_are_not_loaded_as_one_model(tmp_path: Path) -> None:
    for seed, folder in enumerate("ab"):
        tiny_model(seed=seed).save_pretrained(tmp_path / folder, max_shard_size="100KB")
    part = sorted((tmp_path / "a").glob("*.safetensors"))[1].name
    shutil.copy(tmp_path / "b" / part, tmp_path / "a" / part)
    with pytest.raises(CheckpointError, match=r"index\.json does not belong to the files beside it"):
        OpenMythos.from_pretrained(tmp_path / "a")
    OpenMythos.from_pretrained(tmp_path / "a", verify=False)


def test_damaged_weights_are_refused_or_read_unchanged(tmp_path: Path) -> None:
    path, draw = tmp_path / "w.safetensors", random.Random(0)
    weights.write(path, TENSORS)
    whole, refused = path.read_bytes(), 0

    def in_the_header(content: bytearray) -> bytes:
        content[draw.randrange(min(len(content), 900))] = draw.randrange(256)
        return bytes(content)

    for _ in range(150):
        path.write_bytes(damaged(whole, draw, (4, 8, 16, 512, 4096), in_the_header))
        try:
            found = weights.read(path)
        except CheckpointError as error:
            refused += "w.safetensors" in str(error)
        else:
            assert found.keys() == TENSORS.keys() and all(found[name].equal(TENSORS[name]) for name in found)
    assert refused > 130


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights.write(path, {name: tensor.to(dtype) for name, tensor in weights.read(path).items()})
    with pytest.raises(CheckpointError, match=f"has weights of {dtype}; expected floating-point ones"):
        OpenMythos.from_pretrained(tmp_path)


def test_a_flipped_bit_is_refused_unless_verify_is_false(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: .*verify=False"):
        OpenMythos.from_pretrained(tmp_path)
    OpenMythos.from_pretrained(tmp_path, verify=False)


def test_shards_have_checksums_and_files_without_one_load(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    whole = tmp_path / "model.safetensors"
    tensors = load_file(whole)
    save_file(tensors, whole)  # as transformers or an older version writes it
    assert OpenMythos.from_pretrained(tmp_path).embed.weight.equal(model.embed.weight)
    names, parts = sorted(tensors), ("one.safetensors", "two.safetensors")
    for i, part in enumerate(parts):
        weights.write(tmp_path / part, {name: tensors[name] for name in names[i::2]})
    index = {"weight_map": {name: parts[i % 2] for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()
    assert OpenMythos.from_pretrained(tmp_path).embed.weight.equal(model.embed.weight)
    content = bytearray((tmp_path / parts[1]).read_bytes())
    content[-1] ^= 1
    (tmp_path / parts[1]).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"two\.safetensors is damaged"):
        OpenMythos.from_pretrained(tmp_path)


def test_shipped_models_have_a_checksum() -> None:
    for path in SHIPPED.glob("*/model.safetensors"):
        with weights.opened(path) as file:
            assert weights.CHECKSUM in file.metadata(), path


@pytest.mark.parametrize(
    "weight_map", [{"a": "../w.safetensors"}, {"a": "/w.safetensors"}, {"a": 3}, {"a": ["b"]}, [1], 3, None, {},
                   {"a": "model.safetensors.index.json"}, "text", {"a": ""}],
)  # fmt: skip
def test_an_index_cannot_name_files_outside_its_folder(tmp_path: Path, weight_map: object) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "w.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        OpenMythos.from_pretrained(folder)


@pytest.mark.parametrize(
    "field, value",
    [("prelude_layers", 10**7), ("core_layers", 10**7), ("coda_layers", 10**7), ("dim", 10**9), ("vocab_size", 10**15),
     ("n_heads", 10**9), ("max_loop_iters", 10**9), ("expert_dim", 10**18), ("n_experts", 10**30), ("dim", 1e308)],
)  # fmt: skip
def test_a_config_that_does_not_fit_the_weights_is_refused_before_building(
    tmp_path: Path, field: str, value: int
) -> None:
    shutil.copytree(SHIPPED / "parity-tiny", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=r"config.json|model.safetensors"):
        OpenMythos.from_pretrained(tmp_path / "m")


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    OpenMythos.from_pretrained("parity-tiny")
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_symlinks_out_of_the_model_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link out of its folder"):
        OpenMythos.from_pretrained(folder)
