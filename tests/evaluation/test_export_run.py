"""`raysched export`, and models out of checkpoints that several ranks wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from raysched.cli import main
from raysched.errors import UserError
from raysched.evaluation.export_run import export_run
from raysched.evaluation.model_source import load_model
from raysched.models.export import load_network
from raysched.models.pickles import PickleError
from raysched.training.checkpoint import (
    Rows,
    Snapshot,
    checkpoint_folders,
    load_checkpoint,
    write_snapshot,
)
from tests.training.runs import run_loop, small_config


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "mine"
    run_loop(small_config(training__budget__steps=6), run_dir)
    return run_dir


def in_pieces(run_dir: Path) -> Path:
    """The run's newest checkpoint as two ranks would have written it, in place of the others."""
    whole = load_checkpoint(checkpoint_folders(run_dir)[-1])
    shutil.rmtree(run_dir / "checkpoints")
    for rank in (1, 0):
        groups = {
            group: {
                name: Rows(part, first, tuple(tensor.shape))
                for name, tensor in tensors.items()
                for part, first in [rank_rows(tensor, rank)]
                if part.numel()
            }
            for group, tensors in whole.tensors.items()
        }
        write_snapshot(run_dir, Snapshot(6, groups, whole.state, rank=rank, num_shards=2))
    (folder,) = checkpoint_folders(run_dir)
    return folder


def rank_rows(tensor: torch.Tensor, rank: int) -> tuple[torch.Tensor, int]:
    if tensor.dim() == 0:
        return (tensor, 0) if rank == 0 else (torch.empty(0), 0)
    size = -(-len(tensor) // 2)
    return tensor[rank * size : (rank + 1) * size], rank * size


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("weights", ["ema", "online"])
def test_a_checkpoint_of_two_ranks_is_the_same_model_and_pipeline(tmp_path, made_run, weights):
    run_dir = Path(shutil.copytree(made_run, tmp_path / "mine"))
    whole = load_model(made_run, weights)
    folder = in_pieces(run_dir)
    assert len(list(folder.glob("ema-*-of-00002.safetensors"))) == 2
    for source in (run_dir, folder):
        assert same_weights(load_model(source, weights).network, whole.network)
    exported = export_run(folder, tmp_path / "out", weights)
    assert same_weights(load_network(tmp_path / "out"), whole.network)
    assert exported.as_json()["loaded_from"] == str(folder)


def test_the_command_writes_a_pipeline_that_can_be_sampled(tmp_path, made_run, capfd):
    assert main(["export", str(made_run), "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["folder"] == str(tmp_path / "out")
    assert same_weights(load_model(tmp_path / "out").network, load_model(made_run).network)
    # Again: an older pipeline is replaced.
    assert main(["export", str(made_run), "--out", str(tmp_path / "out")]) == 0


def test_without_a_name_the_pipeline_goes_into_the_runs_folder(tmp_path, made_run):
    run_dir = Path(shutil.copytree(made_run, tmp_path / "mine"))
    assert export_run(run_dir).folder == run_dir / "pipeline-step-00000006"


def test_nothing_but_a_pipeline_is_ever_replaced(tmp_path, made_run):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("42")
    with pytest.raises(UserError, match="holds other files"):
        export_run(made_run, tmp_path / "precious")
    with pytest.raises(UserError, match="is a file"):
        export_run(made_run, tmp_path / "precious" / "thesis.txt")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "42"
    with pytest.raises(UserError, match="is a saved pipeline already"):
        export_run(made_run / "pipeline", tmp_path / "out")


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "last.ckpt"])
def test_a_pickle_is_refused_by_every_command_that_reads_models(tmp_path, name, capsys):
    torch.save({"weight": torch.ones(2)}, tmp_path / name)
    with pytest.raises(PickleError, match="refused: this is a pickle"):
        load_model(tmp_path / name)
    with pytest.raises(PickleError, match="refused: this is a pickle"):
        load_model(tmp_path)
    for command in ("sample", "export", "probe"):
        assert main([command, str(tmp_path / name)]) == 2
        assert "refused: this is a pickle" in capsys.readouterr().err
