"""The report of a real sweep: its page, tables and figures, with the failed run in all of them."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlx.problems import ConfigError
from rlx.report import report_runs
from rlx.results import atari, study, tables
from rlx.results import figures as report_figures
from rlx.results import page as report_page
from rlx.results import reading as results
from rlx.results.page import markdown, markdown_table, page, plain_table
from rlx.runs.folders import read_rows
from tests.multirun import TASK
from tests.results.test_results import begun, copied


@pytest.fixture(scope="module")
def reported(sweep, tmp_path_factory):
    """(what the command said, its folder of files) for the sweep."""
    out = tmp_path_factory.mktemp("report")
    return report(f"runs={sweep}", f"out={out}"), out


def report(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rlx.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_number_of_runs_and_the_failed_one_are_told_everywhere(reported):
    done, out = reported
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out / "report.html")
    for text in (
        done.stdout,
        (out / "report.html").read_text(),
        (out / "report.md").read_text(),
    ):
        assert "4 runs: 3 finished, 1 failed" in text
        assert "NonFinite: " in text
    assert [row["run"] for row in table(out / "unfinished.csv")] == ["3"]
    assert [row["run"] for row in table(out / "runs.csv")] == ["0", "1", "2", "3"]


def test_final_scores_are_of_finished_runs_by_group(sweep, reported):
    rows = table(reported[1] / "scores.csv")
    assert [(r["group"], r["task"], r["runs"], r["not counted"]) for r in rows] == [
        ("exploration=ladder", TASK, "2", "0"),
        ("exploration=constant", TASK, "1", "1"),
    ]
    for row, runs in zip(rows, (("0", "1"), ("2",)), strict=True):
        summaries = [json.loads((sweep / run / "summary.json").read_text()) for run in runs]
        assert float(row["mean"]) == pytest.approx(
            np.mean([summary["evaluation_return"] for summary in summaries])
        )
    assert rows[0]["IQM_low"]
    assert not rows[1]["IQM_low"]  # one run has none


def test_the_page_needs_nothing_beside_it(reported):
    text = (reported[1] / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 6  # curves, rungs, profile, improvement, throughput, stages
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.findall(r"https?://|<script|@import|url\(", text)
    assert 'name="viewport"' in text


def test_each_table_and_figure_says_how_many_runs_are_in_it(reported):
    text = (reported[1] / "report.html").read_text()
    told = re.findall(r"<h[12]>[^<]*</h[12]><p>(.*?)</p>|<figcaption>(.*?)</figcaption>", text)
    assert len(told) == 6 + 6
    for parts in told:
        assert re.search(r"\d runs? of 4|\b4 runs", "".join(parts)), parts


def test_the_rather_better_group_stands_first(reported):
    (row,) = table(reported[1] / "improvement.csv")
    scores = {r["group"]: float(r["mean"]) for r in table(reported[1] / "scores.csv")}
    assert float(row["probability"]) >= 0.5
    assert scores[row["group"]] >= scores[row["is better than"]]


def test_figures_are_files_and_frames_are_drawn_only_where_they_differ(reported):
    names = sorted(path.stem for path in reported[1].glob("*.png"))
    assert names == ["curves_env_steps", "improvement", "profile", "rungs", "stages", "throughput"]
    for path in reported[1].glob("*.png"):
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20, f"{path} is empty"
    assert not list(reported[1].glob(".*"))


def test_the_page_opens_in_a_browser(reported, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium is installed")
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync hide-scrollbars window-size=500,2500"
    options = [f"--{flag}" for flag in flags.split()]
    shot = tmp_path / "page.png"
    places = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"]
    address = (reported[1] / "report.html").as_uri()
    subprocess.run([browser, *options, *places, address], check=True, timeout=60, stderr=-1)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    blue = (np.abs(pixels.astype(int) - (0x00, 0x72, 0xB2)).sum(axis=1) < 12).sum()
    assert blue > 200, "the curves' blue is nowhere: the pictures did not load"


def test_groups_are_chosen_by_name_and_misspelt_ones_refused(sweep, tmp_path):
    assert list(study.study(sweep, ["seed"]).groups) == ["seed=0", "seed=1"]
    assert list(study.study(sweep, []).groups) == ["all runs"]
    with pytest.raises(ConfigError, match=r"group=agent\.nstep: no such .*exploration, seed"):
        study.study(sweep, ["agent.nstep"])
    for arguments in (("runs=/nowhere",), (f"runs={sweep}", "group=x"), (f"runs={sweep}", "by=x")):
        done = report(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("rlx.report: ")
        assert done.stderr.count("\n") == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .*; give another out="):
        report_runs(sweep, out=tmp_path / "file")


def test_curves_go_as_far_as_the_runs_do(sweep):
    runs = study.study(sweep).groups["exploration=constant"]  # of which one failed early
    found = study.curve(runs, "learner/loss", "env_steps")
    ends = [max(r["env_steps"] for r in run.rows if r["learner/loss"] is not None) for run in runs]
    assert min(ends) < max(ends) == found.x[-1]
    assert (found.runs[found.x > min(ends) + 50] == 1).all()
    assert (found.runs[found.x <= min(ends)] == 2).all()
    longest = read_rows(sweep / "2" / "metrics.jsonl")
    assert found.found.value[-1] == pytest.approx(longest[-1]["learner/loss"])
    assert study.curve(runs, "no/such", "env_steps") is None


def test_the_score_is_one_that_all_finished_runs_have(sweep, tmp_path):
    for number in (0, 1):
        copied(sweep / str(number), tmp_path / str(number))
    begun(tmp_path / "2", "failed", seed=7)
    given = study.study(tmp_path)
    assert given.score == "evaluation"
    for number in (0, 1):
        assert given.score == "evaluation"
        path = tmp_path / str(number) / "evaluation.json"
        path.write_text(json.dumps({"evaluations": [{"mean": 10.0 + number}]}))
        given = study.study(tmp_path)
    assert given.score == "evaluation.json"
    (label,) = (label for label in given.groups if given.scores(label))
    assert given.scores(label)[TASK].tolist() == [10.0, 11.0]


def test_runs_that_only_failed_make_a_page_that_says_so(tmp_path):
    begun(tmp_path / "a", "failed", env={"id": "x"})
    found = report_runs(tmp_path).read_text()
    assert "1 run: 1 failed" in found
    assert "<img" not in found


# --- Atari ---------------------------------------------------------------------------------------


@pytest.fixture
def games(sweep, tmp_path):
    """Runs that say they played Pong and Breakout, with frames and scores to count with."""
    for number, (game, score) in enumerate((("Pong", 14.6), ("Pong", -20.7), ("Breakout", 30.5))):
        run = copied(sweep / str(number), tmp_path / str(number))
        config = run / ".hydra" / "config.yaml"
        config.write_text(config.read_text().replace(TASK, f"{game}-v5"))
        rows = [row | {"frames": 4 * row["env_steps"]} for row in read_rows(run / "metrics.jsonl")]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "evaluation.json").write_text(json.dumps({"evaluations": [{"mean": score}]}))
    return tmp_path


def test_atari_runs_stand_beside_published_scores(games):
    given = study.study(games, [])
    found = tables.tables(given)
    breakout, pong = found["atari"].to_dict("records")
    assert (pong["runs"], breakout["runs"]) == (2, 1)
    assert pong["human-normalised"] == pytest.approx(0.5)
    assert breakout["human-normalised"] == pytest.approx(1.0)
    assert (pong["R2D2 (about 30,000M frames)"], pong["Ape-X (22,800M frames)"]) == (21.0, 20.9)
    assert breakout["Rainbow (200M frames)"] == 417.5
    whole = found["human_normalized"].iloc[0]
    assert (whole["games"], whole["runs"]) == (2, 3)
    assert whole["IQM"] == pytest.approx((0 + 1 + 1) / 3)
    assert whole["optimality gap"] == pytest.approx(1 / 3)
    text = page(given, found, [])
    assert "3 runs of 3 on Atari finished and count" in text
    assert "rlx/results/atari_scores.csv" in text
    assert report_runs(games, []).with_name("curves_frames.png").exists()


def test_random_play_is_0_and_the_human_1():
    for name in ("Pong", "Breakout"):
        known = atari.scores()[name]
        between = (known["random"] + 3 * known["human"]) / 4
        scores = np.array([known["random"], known["human"], between])
        np.testing.assert_allclose(atari.human_normalized(name, scores), [0.0, 1.0, 0.75])


def test_the_published_scores_are_whole():
    known = atari.scores()
    assert len(known) == 57
    counts = {name: sum(name in row for row in known.values()) for name in known["Pong"]}
    assert counts == {
        "random": 57, "human": 57, "r2d2": 57, "apex": 57, "recurrent_iqn": 55, "rainbow": 54,
    }  # fmt: skip
    # R2D2's paper: above the human in 52 of the 57 games (abstract).
    assert sum(row["r2d2"] > row["human"] for row in known.values()) == 52
    assert all(row["human"] > row["random"] for row in known.values())


@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        ("Pong-v5", "Pong"),
        ("ALE/MsPacman-v5", "MsPacman"),
        ("BreakoutNoFrameskip-v4", "Breakout"),
        ("CartPole-v1", None),
        ("MinAtar/Breakout-v1", None),
    ],
)
def test_a_game_is_known_by_its_id(env_id, expected):
    assert atari.game(env_id) == expected


def test_tables_keep_what_is_in_a_cell():
    import pandas as pd

    given = pd.DataFrame({"name": ["a|b\nc"], "x": [1234.5], "x_low": [0.12345], "x_high": [2.0]})
    assert markdown_table(given).splitlines()[-1] == "| a\\|b c | 1,234 [0.1235, 2] |"
    assert plain_table(given.drop(columns="name")).splitlines()[-1] == "1,234 [0.1235, 2]"


def test_a_run_that_failed_early_does_not_shorten_where_the_time_goes(tmp_path):
    for name, last, share in (("long", 8, 0.2), ("short", 2, 0.6)):
        folder = begun(tmp_path / name)
        rows = ({"env_steps": 100 * i, "time/acting": share} for i in range(last + 1))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps, shares, number = report_figures._times(results.read(tmp_path))
    assert (steps[0], steps[-1], number) == (0, 800, 2)
    np.testing.assert_allclose(shares["acting"][steps <= 200], 0.4)
    np.testing.assert_allclose(shares["acting"][steps > 200], 0.2)


@pytest.mark.filterwarnings("error")  # matplotlib warns where no room is left for the axes
def test_many_groups_leave_room_for_their_curves(sweep, tmp_path):
    for number in range(24):
        run = copied(sweep / "0", tmp_path / str(number))
        config = run / ".hydra" / "config.yaml"
        text = config.read_text()
        rate = 0.00044303752452182633 + number / 1e6
        text = re.sub(r"(\n +learning_rate: ).*", rf"\g<1>{rate}${{a}}$", text, count=1)
        config.write_text(text)
    given = study.study(tmp_path, ["agent.optimizer.learning_rate", "agent.n_step", "seed"])
    assert len(given.groups) == 24
    with report_figures._style():
        for make in (
            lambda given: report_figures.learning(given, "env_steps"),
            report_figures.better,
        ):
            figure, _, _ = make(given)
            figure.savefig(tmp_path / "picture.png")
            (ax,) = figure.axes
            assert ax.get_position().height * figure.get_figheight() > 1.8  # inches
            assert ax.get_position().width * figure.get_figwidth() > 1.8
        figure, _, caption = report_figures.stages(given)
    assert len(figure.axes) == 12
    assert "The first 12 of 24 groups." in caption


def test_a_long_table_is_cut_on_the_page_which_says_so(sweep, monkeypatch):
    given = study.study(sweep)
    found = tables.tables(given)
    monkeypatch.setattr(report_page, "ROWS", 3)
    for text in (page(given, found, []), markdown(given, found, [])):
        assert text.count("The first 3 of 4 rows; runs.csv has them all.") == 1
    assert len(markdown_table(found["runs"]).splitlines()) == 2 + 3


def test_a_line_is_solid_only_where_all_runs_have_a_value(sweep, tmp_path):
    for name, later in (("a", 0), ("b", 10_000)):
        run = copied(sweep / "0", tmp_path / name)
        rows = [r | {"env_steps": r["env_steps"] + later} for r in read_rows(run / "metrics.jsonl")]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure, _, _ = report_figures.learning(study.study(tmp_path), "env_steps")
    solid, dashed = figure.axes[0].get_lines()
    assert np.isnan(solid.get_ydata()).all()
    assert np.isfinite(dashed.get_ydata()).any()
