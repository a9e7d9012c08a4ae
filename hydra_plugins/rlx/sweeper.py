"""Hydra's sweeper of rlx: `hydra/sweeper=rlx_optuna`; settings: conf/hydra/sweeper/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """Runs a study's trials through any launcher; rlx's launchers can also end hopeless ones."""

    def __init__(self, *, params: Mapping[str, Any] | None, **settings: Any) -> None:
        """params: overrides of every trial, from a file; those of the command line follow them."""
        self._params, self._settings = dict(params or {}), settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from hydra.core.plugins import Plugins

        self._config, self._loader = config, hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from rlx.runs.files import only_one
        from rlx.sweeps.jobs import say
        from rlx.sweeps.search import Search, as_text
        from rlx.sweeps.sweeping import make_folder, refused_in_lines

        given = dict(text.partition("=")[::2] for text in arguments)
        params = {key: as_text(v) for key, v in self._params.items() if key not in given}
        folder = Path(self._config.hydra.sweep.dir).absolute()
        make_folder(folder)
        with refused_in_lines(), only_one(folder, "hydra.sweep.dir", ".search.lock"):
            search = Search(
                folder=folder,
                arguments=[*(f"{key}={value}" for key, value in params.items()), *arguments],
                loader=self._loader,
                **self._settings,
            )
            OmegaConf.save(self._config, folder / "multirun.yaml")
            if (sweep := getattr(self._launcher, "sweep", None)) is not None:
                sweep.watch, sweep.searched = search.is_hopeless, search.searched
            elif self._settings["pruner"] != "none":
                say("trials are not pruned: that takes hydra/launcher=rlx or rlx_ray")
            return search.run(self._launcher.launch)
