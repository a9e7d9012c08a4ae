"""Sends rows of metrics to TensorBoard and to Weights & Biases, besides metrics.jsonl."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rlx.runs.folders import RunFolder

log = logging.getLogger(__name__)

WANDB_ID = "wandb_id"  # a file of the run's folder, so that a resumed run goes on in its charts


class Board(Protocol):
    """Takes rows of metrics in the order of their env steps."""

    def add(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def open_boards(
    folder: Path, *, tensorboard: bool, wandb: str | None, resume_env_steps: int | None
) -> list[Board]:
    """Opens the boards that the settings ask for; wandb: a project's name."""
    boards: list[Board] = []
    if tensorboard:
        boards.append(TensorBoard(folder / "tensorboard", resume_env_steps))
    if wandb is not None:
        boards.append(WeightsAndBiases(folder, wandb, resumes=resume_env_steps is not None))
    return boards


class TensorBoard:
    """Events of tensorboardX."""

    def __init__(self, folder: Path, resume_env_steps: int | None) -> None:
        from tensorboardX import SummaryWriter

        # purge_step hides what was drawn after the checkpoint, as the discarded rows are.
        purge = None if resume_env_steps is None else resume_env_steps + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def add(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "env_steps":
                self._writer.add_scalar(name, value, row["env_steps"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, with the configuration; charts are over env steps.

    A failure of its server or process is logged once, and never ends the training.
    """

    def __init__(self, folder: Path, project: str, *, resumes: bool) -> None:
        import wandb

        file = folder / WANDB_ID
        run_id = file.read_text() if resumes and file.exists() else secrets.token_hex(8)
        file.write_text(run_id)
        self._run: Any = wandb.init(
            project=project,
            dir=str(folder),
            id=run_id,
            name="/".join(folder.absolute().parts[-2:]),
            resume="allow",
            settings=wandb.Settings(console="off"),  # the terminal is the run's own
            config=RunFolder(folder).settings or None,
        )
        self._run.define_metric("*", step_metric="env_steps")

    def add(self, row: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in row.items() if value is not None})
        except Exception:
            log.exception("Weights & Biases gets no more rows; metrics.jsonl has them all")
            self._run = None

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
