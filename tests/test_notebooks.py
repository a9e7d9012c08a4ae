"""Notebooks are pairs of py:percent and ipynb without outputs, and a cell can be stopped.

That they run is nbmake's to see: `pytest --nbmake notebooks`, which `make test` does.
"""

from __future__ import annotations

import json
from pathlib import Path

import jupytext
import pytest
from jupyter_client.manager import start_new_kernel

from rlx.notebook import png
from rlx.runs.metrics import RUNGS

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))
PATIENCE_S = 120


def test_there_are_notebooks():
    assert [path.stem[:2] for path in SCRIPTS] == ["01", "02", "03", "04", "05"]
    assert [path.with_suffix(".ipynb") for path in SCRIPTS] == sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_two_halves_of_a_notebook_agree_and_nothing_of_a_machine_is_kept(script):
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    halves = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    expected = [(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
    assert halves == expected, f"run: jupytext --sync {script.with_suffix('.ipynb').name}"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert set(notebook["metadata"]) == {"jupytext", "kernelspec"}


def test_the_live_figure_has_the_greediest_returns_where_lanes_explore_differently():
    first, *_, last = RUNGS
    alike = [{"env_steps": n, "train/return_mean": n, last: n} for n in (1, 2)]
    assert png(alike) == png([{name: row[name] for name in list(row)[:2]} for row in alike])
    differ = [row | {first: 3.0} for row in alike]
    assert png(differ) != png(alike)
    assert png([row | {last: 7.0} for row in differ]) == png(differ)


RUN = """
import rlx
given = ["total_env_steps=100_000_000", "logging.console=off", "logging.tensorboard=false"]
summary = rlx.run(rlx.compose(given), {folder!r})
"""
TELL = "print(summary['state'], summary['env_steps'])"


def test_stopping_a_cell_ends_its_run_with_a_checkpoint_and_the_kernel_goes_on(tmp_path):
    folder = tmp_path / "run"
    manager, client = start_new_kernel()
    try:
        message = client.execute(RUN.format(folder=str(folder)))
        wait_for(folder / "metrics.jsonl")
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=PATIENCE_S)
        assert reply["parent_header"]["msg_id"] == message
        assert reply["content"]["status"] == "ok"  # no KeyboardInterrupt through the cell
        told = []
        hear = lambda out: told.append(out["content"].get("text"))  # noqa: E731
        client.execute_interactive(TELL, timeout=PATIENCE_S, output_hook=hear)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    state, env_steps = next(text for text in told if text).split()
    assert state == "interrupted"
    assert 0 < int(env_steps) < 100_000_000
    assert list((folder / "checkpoints").glob("[0-9]*"))
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"


def wait_for(path: Path) -> None:
    from time import monotonic, sleep

    until = monotonic() + PATIENCE_S
    while not (path.exists() and path.stat().st_size):
        assert monotonic() < until, f"{path.name} did not appear"
        sleep(0.1)
