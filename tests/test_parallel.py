import errno
import json
import os
import threading
from unittest import mock

import crew
import pytest
import timm.layers
import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from clip_train import ranks
from clip_train.checkpoint import checkpoints
from clip_train.fit import FitConfig, fit
from clip_train.parallel import blocks, is_sharded, synchronise_batchnorm
from clip_train.settings import UserError

CASES = {
    "infonce": {},
    "infonce in parts": {"accumulate": 3},
    "siglip": {"loss": "siglip"},
    "siglip in parts": {"loss": "siglip", "accumulate": 2},
    "infonce, sharded": {"parallel": "fsdp"},
    "siglip in parts, sharded": {"loss": "siglip", "parallel": "fsdp", "accumulate": 2},
}


def train_all(folder):
    """On two ranks: every case, with what only several ranks can get wrong."""
    made = {name: crew.train(folder / name, **how) for name, how in CASES.items()}
    sharded = {"parallel": "fsdp", "dropout": 0.1}
    whole = crew.train(folder / "whole", **sharded)
    assert crew.train(folder / "broken", **sharded, save_every=0.0, stop=4) is None
    broken = crew.train(folder / "broken", **sharded, seed=5)  # other first weights must not matter
    assert crew.difference(whole, broken) == 0
    made["one, then two"] = crew.train(folder / "one, then two", parallel="fsdp")
    assert crew.train(folder / "two, then one", parallel="fsdp", save_every=0.0, stop=3) is None
    seen = []
    checked = crew.train(folder / "checked", parallel="fsdp", validate_every=2, validate=look(seen))
    assert crew.difference(made["infonce, sharded"], checked) == 0
    made["norm"] = crew.train(folder / "norm", norm=True)
    if ranks.is_main():
        torch.save(made | {"seen": seen}, folder / "made.pt")
    else:
        torch.save({"norm": made["norm"], "seen": seen}, folder / "other.pt")


def look(seen):
    def validate(model, step):
        assert not any(module.training for module in model.modules())
        pixels = torch.arange(6 * 48).view(6, 3, 4, 4) % 256
        for size in range(4 + ranks.rank()):  # the ranks need not do the same
            rows = model.encode_image(pixels[: size + 1])
        seen.append(rows[:4].clone())
        return {"mean": float(seen[-1].mean())}

    return validate


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    assert crew.train(folder / "one, then two", save_every=0.0, stop=3) is None
    crew.run(2, train_all, folder)
    return folder, torch.load(folder / "made.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_what_one_trains(made, tmp_path, name):
    one = crew.train(tmp_path / "one", **{key: value for key, value in CASES[name].items() if key != "accumulate"})
    assert crew.difference(one, made[1][name]) < 1e-5


def test_a_sharded_run_goes_on_from_the_checkpoint_of_one_rank(made, tmp_path):
    assert crew.difference(crew.train(tmp_path / "one"), made[1]["one, then two"]) < 1e-5


def test_one_rank_goes_on_from_the_shards_of_two(made, tmp_path):
    folder = made[0] / "two, then one"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-000000002", "checkpoint-000000003"]
    one = crew.train(folder, parallel="fsdp", seed=9)
    assert crew.difference(crew.train(tmp_path / "one"), one) < 1e-5
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-000000003", "checkpoint.safetensors"]


def test_shards_are_safetensors_and_nothing_in_them_is_a_pickle(made):
    checkpoint = checkpoints(made[0] / "broken")[-1]
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == ["numbers.json"] + [f"shard-0000{r}-model-00001-of-00001.safetensors" for r in (1, 2)]
    assert json.loads((checkpoint / "numbers.json").read_text())["step"] == 6


@pytest.mark.parametrize("damage", ["cut", "missing", "model", "bit"])
def test_damaged_shards_and_those_of_another_model_are_one_clear_line(made, tmp_path, damage):
    (checkpoint,) = checkpoints(made[0] / "whole")
    copy = tmp_path / checkpoint.name
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = copy / "shard-00002-model-00001-of-00001.safetensors"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.unlink()
    elif damage == "bit":
        data = shard.read_bytes()
        shard.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(UserError, match="another model" if damage == "model" else "damaged") as caught:
        crew.train(tmp_path, norm=damage == "model")
    assert "\n" not in str(caught.value)


def fail_alone(folder):
    """On two ranks, of which the second alone cannot read the headers of the newest checkpoint."""
    threading.Timer(100, os._exit, [3]).start()  # or a rank would wait for the other for hours
    whole, real = crew.train(folder / "whole", parallel="fsdp"), HuggingFaceStorageReader.read_metadata
    for error in (OSError(errno.EIO, "no answer"), SafetensorError("no header")):
        here = folder / type(error).__name__
        assert crew.train(here, parallel="fsdp", save_every=0.0, stop=3) is None

        def fail(reader, error=error):
            if ranks.rank() == 1 and str(reader.path).endswith("-000000003"):
                raise error
            return real(reader)

        ranks.barrier()
        with mock.patch.object(HuggingFaceStorageReader, "read_metadata", fail):
            if isinstance(error, OSError):
                with pytest.raises(UserError, match="cannot read .*checkpoint-000000003: no answer"):
                    crew.train(here, parallel="fsdp")
                assert len(checkpoints(here)) == 2
            else:
                assert crew.difference(whole, crew.train(here, parallel="fsdp")) == 0


def test_what_one_rank_alone_cannot_read_is_told_to_all(tmp_path):
    crew.run(2, fail_alone, tmp_path)


def test_validation_on_sharded_ranks_sees_the_averaged_weights_whole(made, tmp_path):
    alone = []
    crew.train(tmp_path / "one", validate_every=2, validate=look(alone))
    both = made[1]["seen"], torch.load(made[0] / "other.pt", weights_only=True)["seen"]
    assert len(alone) == 3
    for seen in both:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, seen, strict=True))


def test_ranks_share_the_running_statistics_of_their_batches(made):
    main, other = made[1]["norm"], torch.load(made[0] / "other.pt", weights_only=True)["norm"]
    assert crew.difference(main, other) == 0  # weights, averages and statistics alike
    assert main[0]["image.1.num_batches_tracked"] == 6


def test_blocks_are_the_outermost_members_of_stacks():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.TransformerEncoderLayer(4, 1)])
            self.scale = nn.Parameter(torch.zeros(()))

    tower = Tower()
    assert blocks(tower) == [tower.layers[0][0], tower.layers[1]]


def test_synchronising_batchnorm_keeps_names_activations_and_frozen_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), timm.layers.BatchNormAct2d(4), nn.BatchNorm1d(4))
    model[3].eval()
    names = list(model.state_dict())
    synchronise_batchnorm(model)
    assert isinstance(model[1], nn.SyncBatchNorm) and isinstance(model[2], nn.SyncBatchNorm)
    assert isinstance(model[2].act, nn.ReLU) and type(model[3]) is nn.BatchNorm1d
    assert list(model.state_dict()) == names


def test_a_batch_that_ranks_and_parts_cannot_share_is_refused(tmp_path):
    with pytest.raises(UserError, match="multiple of accumulate"):
        FitConfig(steps=1, batch_size=10, accumulate=4)
    with pytest.raises(UserError, match="parallel 'both' must be one of ddp, fsdp"):
        FitConfig(steps=1, parallel="both")


def test_a_single_process_needs_no_shards(tmp_path):
    model = nn.Linear(2, 1)

    def ones(step):
        while True:
            yield {"x": torch.ones(4, 2)}

    def loss(model, batch, rng):
        return model(batch["x"]).square().mean(), {}

    fit(model, ones, loss, FitConfig(steps=2, batch_size=4, parallel="fsdp", precision="fp32"), tmp_path)
    assert not any(is_sharded(p) for p in model.parameters())
