"""The Atari score card against the definitions in plain Python, and what it says of its numbers."""

from __future__ import annotations

import csv
import json
import statistics
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from rlx import results
from rlx.report import report_runs
from rlx.results import atari, figures, scorecard
from rlx.results.page import notes, page
from rlx.results.study import human_curve, study
from rlx.results.tables import tables
from tests.results.test_results import begun

HUMAN = {"Pong": (-20.7, 14.6), "Breakout": (1.7, 30.5), "Seaquest": (68.4, 42054.7)}


def played(folder: Path, game: str, score: float | None, *, frames=40_000_000, **more) -> Path:
    """Makes what a run leaves that finished with this score, at so many emulator frames."""
    name = game if "-" in game else f"{game}-v5"
    settings = {
        "seed": more.get("seed", 0),
        "env": {"id": name, "max_episode_steps": more.get("limit")},
        "agent": {"n_step": more.get("n_step", 1)},
        "evaluation": {"final_episodes": 100, "max_env_steps_per_episode": more.get("cut")},
    }
    run = begun(folder, more.get("state", "finished"), **settings)
    rows = [
        {"env_steps": share * frames // 8, "frames": share * frames // 2, "wall_s": share}
        | {"train/return_mean": None if score is None else share * score / 2, "train/episodes": 7}
        for share in range(3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text(json.dumps({"evaluation_return": score}))
    return run


def several(folder: Path, scores: dict[str, list[float]], **more) -> Path:
    for game, every in scores.items():
        for seed, score in enumerate(every):
            played(folder / f"{game}-{seed}", game, score, seed=seed, **more)
    return folder


def normalized(game: str, score: float) -> float:
    random, human = HUMAN[game]
    return (score - random) / (human - random)


def plain_iqm(values: list[float]) -> float:
    cut = len(values) // 4
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


SCORES = {
    "Pong": [-20.0, 3.0, 21.0],
    "Breakout": [2.0, 400.0, 90.0],
    "Seaquest": [100.0, 2000.0, 50_000.0],
}


def test_the_aggregates_are_those_of_plain_python(tmp_path):
    (row,) = results.score_card(several(tmp_path, SCORES)).over_games.to_dict("records")
    games = [[normalized(game, score) for score in every] for game, every in SCORES.items()]
    means, flat = [statistics.fmean(game) for game in games], [x for game in games for x in game]
    assert len(flat) % 4  # which the IQM cuts to whole runs
    assert row["median"] == pytest.approx(statistics.median(means))
    assert row["mean"] == pytest.approx(statistics.fmean(means))
    assert row["IQM"] == pytest.approx(plain_iqm(flat))
    gaps = [max(0.0, 1.0 - score) for score in flat]
    assert row["optimality gap"] == pytest.approx(statistics.fmean(gaps))
    for name in ("median", "mean", "IQM", "optimality gap"):
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    assert row["remarks"] == ""


def test_an_interval_draws_runs_within_their_game(tmp_path):
    several(tmp_path, {"Pong": [14.6, 14.6, 14.6], "Breakout": [1.7, 1.7, 1.7]})
    (row,) = results.score_card(tmp_path).over_games.to_dict("records")
    for name in ("median", "mean", "IQM", "optimality gap"):  # any mixing of games would move them
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((0.5, 0.5))


def test_games_weigh_alike_in_the_mean_and_unequal_runs_are_told(tmp_path):
    several(tmp_path, {"Pong": [14.6, 14.6, 14.6, 14.6], "Breakout": [1.7, 1.7]})
    (row,) = results.score_card(tmp_path).over_games.to_dict("records")
    assert row["mean"] == pytest.approx(0.5)
    assert row["optimality gap"] == pytest.approx(2 / 6)
    assert "unequal numbers of runs" in row["remarks"]


def test_each_number_says_what_it_rests_on(tmp_path):
    card = results.score_card(several(tmp_path, SCORES))
    (whole,) = card.over_games.to_dict("records")
    assert (whole["games"], whole["runs"], whole["seeds"], whole["episodes"]) == (3, 9, 3, 900)
    assert (whole["frames, least"], whole["frames, most"]) == (40_000_000, 40_000_000)
    pong = card.by_game.set_index("game").loc["Pong"]
    assert (pong["runs"], pong["seeds"], pong["episodes"]) == (3, 3, 300)
    assert pong["score"] == pytest.approx(4 / 3)
    assert pong["human-normalised"] == pytest.approx(normalized("Pong", 4 / 3))
    low, high = (normalized("Pong", pong[f"score_{side}"]) for side in ("low", "high"))
    assert pong["human-normalised_low"] == pytest.approx(low)
    assert pong["human-normalised_high"] == pytest.approx(high)
    assert pong["R2D2 (about 30,000M frames)"] == 21.0


def test_a_single_run_has_no_interval_and_it_is_said(tmp_path):
    card = results.score_card(several(tmp_path, {"Pong": [3.0], "Breakout": [9.0, 10.0]}))
    (row,) = card.over_games.to_dict("records")
    assert row["median_low"] is None
    assert row["IQM_high"] is None
    assert "no interval: one run of Pong-v5" in row["remarks"]
    games = card.by_game.set_index("game")
    assert np.isnan(games.loc["Pong", "score_low"])
    assert games.loc["Breakout", "score_low"] == 9.0
    given = study(tmp_path)
    assert "3 [" not in page(given, tables(given), [])


def test_unfinished_runs_are_named_and_in_no_number(tmp_path):
    several(tmp_path, {"Pong": [3.0, 5.0]})
    played(tmp_path / "late", "Pong", 21.0, state="failed")
    played(tmp_path / "stopped", "Breakout", 99.0, state="interrupted")
    card = results.score_card(tmp_path)
    (row,) = card.over_games.to_dict("records")
    assert (row["games"], row["runs"], row["not counted"]) == (1, 2, 2)
    assert "not counted: late (failed), stopped (interrupted)" in row["remarks"]
    assert "no finished run of Breakout-v5" in row["remarks"]
    pong, breakout = (card.by_game.set_index("game").loc[g] for g in ("Pong", "Breakout"))
    assert (pong["score"], pong["not counted"], breakout["runs"]) == (4.0, 1, 0)
    assert np.isnan(breakout["score"])


def test_unequal_frames_repeated_seeds_and_cut_episodes_are_told(tmp_path):
    for name, frames in (("a", 40_000_000), ("b", 20_000_000)):
        played(tmp_path / name, "Pong", 1.0, frames=frames, cut=500)
    card = results.score_card(tmp_path)
    (row,) = card.over_games.to_dict("records")
    assert (row["frames, least"], row["frames, most"]) == (20_000_000, 40_000_000)
    for remark in ("unequal frames", "several runs of one seed", "cut at 2,000 frames"):
        assert remark in row["remarks"]
    assert card.by_game.loc[0, "published at equal frames"] == scorecard.NO_CURVE


@pytest.mark.parametrize(
    ("limits", "frames"),
    [({"cut": 500}, "2,000"), ({"limit": 600}, "2,400"), ({"cut": 500, "limit": 400}, "1,600")],
)
def test_cut_episodes_are_told_in_frames_whatever_cuts_them(tmp_path, limits, frames):
    played(tmp_path / "a", "ALE/Pong-v5", 1.0, **limits)
    (row,) = results.score_card(tmp_path).over_games.to_dict("records")
    assert f"evaluated episodes are cut at {frames} frames" in row["remarks"]


def test_a_game_under_two_ids_is_two_tasks_and_it_is_said(tmp_path):
    several(tmp_path, {"Pong": [3.0, 5.0], "ALE/Pong-v5": [7.0, 7.0]})
    card = results.score_card(tmp_path)
    assert card.by_game["task"].tolist() == ["ALE/Pong-v5", "Pong-v5"]
    assert card.by_game["score"].tolist() == [7.0, 4.0]
    assert card.over_games.loc[0, "remarks"] == "a game under two ids counts twice"


def test_tasks_outside_the_57_games_are_left_out_and_named(tmp_path):
    several(tmp_path, {"Pong": [3.0, 5.0], "CartPole-v1": [500.0], "Adventure": [1.0]})
    given = study(tmp_path)
    found = tables(given)
    assert found["human_normalized"].loc[0, "runs"] == 2
    assert found["atari"]["game"].tolist() == ["Pong"]
    said = "Left out, none of the 57 games: Adventure-v5, CartPole-v1."
    assert said in notes(given, found)["human_normalized"]
    assert said in page(given, found, [])
    assert "2 runs of 2 on Atari finished and count" in notes(given, found)["atari"]
    assert "4 runs of 4 finished and count" in notes(given, found)["scores"]


def test_runs_without_atari_have_no_score_card(tmp_path):
    played(tmp_path / "a", "CartPole-v1", 500.0)
    assert {"atari", "human_normalized"}.isdisjoint(tables(study(tmp_path)))
    with pytest.raises(ValueError, match=r"no run of one of the 57 Atari games.*CartPole-v1"):
        results.score_card(tmp_path)


def test_runs_that_do_not_tell_their_frames_and_episodes_leave_them_empty(tmp_path):
    run = played(tmp_path / "a", "Pong", 3.0)
    (run / "metrics.jsonl").write_text('{"env_steps": 5}\n')
    (run / ".hydra" / "config.yaml").write_text("env: {id: Pong-v5}\n")
    (row,) = results.score_card(tmp_path).by_game.to_dict("records")
    assert (row["frames, least"], row["frames, most"], row["episodes"]) == (None, None, None)
    assert (row["score"], row["published at equal frames"]) == (3.0, scorecard.NO_CURVE)


def test_training_episodes_count_as_far_as_the_window_goes(tmp_path):
    run = played(tmp_path / "a", "Pong", None)
    (run / "summary.json").write_text('{"train_return": -3.0}')
    config = run / ".hydra" / "config.yaml"
    for window, expected in ((100, 7), (5, 5)):
        config.write_text(f"{config.read_text()}logging: {{window_episodes: {window}}}\n")
        (row,) = results.score_card(tmp_path).by_game.to_dict("records")
        assert (row["score"], row["episodes"]) == (-3.0, expected)
        config.write_text(config.read_text().partition("logging")[0])


# --- published curves ----------------------------------------------------------------------------


def test_a_published_curve_stands_beside_runs_of_equal_frames_alone(tmp_path):
    several(tmp_path, {"Pong": [3.0, 5.0], "Seaquest": [900.0, 900.0]}, frames=10_400_000)
    games = results.score_card(tmp_path).by_game.set_index("game")
    assert games.loc["Pong", "Rainbow (Dopamine), equal frames"] == 15.2
    assert games.loc["Pong", "published at equal frames"] == "10,000,000 frames, 5 runs"
    assert games.loc["Seaquest", "published at equal frames"] == scorecard.NO_CURVE
    assert np.isnan(games.loc["Seaquest", "Rainbow (Dopamine), equal frames"])


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [
        (10e6, 10e6, 10e6),
        (9.6e6, 10.4e6, 10e6),
        (10e6, 14e6, None),  # no point is near to both
        (12_288, 12_288, None),
        (215e6, 215e6, 199e6),
        (220e6, 220e6, None),
    ],
)
def test_a_point_counts_within_a_tenth_of_its_frames(least, most, expected):
    found = atari.at_equal_frames("Pong", least, most)
    assert {point.frames for point in found.values()} == ({expected} if expected else set())


def test_the_published_curves_are_whole_and_their_sources_named():
    for game, agents in atari.curves().items():
        assert game in atari.scores()
        for points in agents.values():
            frames = [point.frames for point in points]
            assert frames == sorted(set(frames))
            assert all(point.runs > 0 for point in points)
    text = resources.files("rlx.results").joinpath("atari_curves.csv").read_text()
    head, rows = text.split("\ngame,", maxsplit=1)
    agents = {row[1] for row in csv.reader(rows.splitlines()[1:])}
    assert all(agent in head for agent in agents)


# --- the curve over all games --------------------------------------------------------------------


def test_the_curve_over_games_is_normalised_and_ends_with_its_first_run(tmp_path):
    several(tmp_path, {"Pong": [14.6]})
    played(tmp_path / "b", "Breakout", 30.5, frames=20_000_000)
    given = study(tmp_path)
    found = human_curve(given.runs, "train/return_mean")
    assert found.x[-1] <= 25_000_000 < 40_000_000  # half a row of metrics beyond the shorter
    assert set(found.runs) == {2}
    zeros = [normalized("Pong", 0.0), normalized("Breakout", 0.0)]
    assert found.found.value[0] == pytest.approx(statistics.fmean(zeros))
    assert human_curve(given.runs[:1], "train/return_mean").found.value[-1] == pytest.approx(1.0)


def test_the_curve_over_games_is_of_finished_runs(tmp_path):
    several(tmp_path, {"Pong": [3.0, 5.0]})
    played(tmp_path / "c", "Breakout", 9.0, state="failed")
    with figures._style():
        _, _, caption = figures.human(study(tmp_path))
    assert "2 runs of 3 on Atari" in caption
    text = report_runs(tmp_path).read_text()
    assert "Human-normalised learning curves" in text
    for name in ("atari.csv", "human_normalized.csv", "curves_human.png"):
        assert (tmp_path / "report" / name).exists()
