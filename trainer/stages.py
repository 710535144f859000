"""A run on one rank: its stages one after another, as long as they take the ranks that started."""

import gc
from pathlib import Path

from parallel.mesh import Mesh
from trainer.checkpoint.stage_state import OtherStage, agreed_stage, note_stage
from trainer.config.schema import Config
from trainer.config.stages import plan_of, stage_of_step, whole_run
from trainer.errors import DONE
from trainer.launch.elastic import RankInfo
from trainer.launch.exit_report import SAVED
from trainer.placement import mesh_of
from trainer.run import run_stage
from trainer.stop_signal import StopSignal


def run(config: Config, ranks: RankInfo, directory: Path) -> int:
    """Trains as the config says, stage after stage; returns the exit status.

    Where the next stage takes another number of ranks this returns early: stage.json names that
    stage, and the launcher starts its ranks.
    """
    plan = plan_of(config)
    stage = agreed_stage(config, directory)
    mesh = _mesh_of(stage.config, ranks)
    if mesh is None:
        return DONE
    with StopSignal(mesh, SAVED).listening() as stop:
        while mesh is not None:
            try:
                code, goes_on = run_stage(whole_run(config), stage, mesh, directory, stop)
                if not goes_on:
                    return code
                stage = plan[stage.number]
            except OtherStage as other:
                stage = stage_of_step(plan, other.step)
            if mesh.world.rank == 0:
                note_stage(directory, stage)
            gc.collect()  # the model and the optimiser go before those of the next stage are made
            mesh = _mesh_of(stage.config, ranks)
    return DONE


def _mesh_of(config: Config, ranks: RankInfo) -> Mesh | None:
    """Returns the mesh of a stage; None where other ranks than were started are to take it."""
    return mesh_of(config, ranks.device) if config.parallel.ranks == ranks.size else None
