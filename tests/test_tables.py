"""The table over forget sets by hand; the benchmark and the teacher on the tiny model."""
import json
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
for folder in ("data", "data/results"):
    sys.path.insert(0, str(ROOT / folder))

import bench  # noqa: E402
import ssiuu  # noqa: E402
import tables  # noqa: E402
import teach  # noqa: E402
from model import load  # noqa: E402


def test_the_interval_is_students():
    values = [5.1, 4.9, 5.6, 5.8, 4.2, 5.0, 5.3, 4.7, 5.5, 5.9]
    half = 2.262 * statistics.stdev(values) / 10 ** 0.5
    x = tables.interval(values)
    assert (x["low"], x["high"]) == pytest.approx((5.2 - half, 5.2 + half), abs=1e-3) and x["folds"] == 10
    assert tables.interval([3.0]) == {"mean": 3.0, "low": None, "high": None, "folds": 1}


def result(FS, back):
    return {"after": {"FS": {"percent": FS}, "RS": {"percent": 50.0}, "steps": 7, "reached": True},
            "attacks": {"Harmful p = 0.1": {"percent": back, "margin_max": -1.0}, "Benign": {"why": "none"}}}


def test_differences_are_paired_by_fold_and_the_command_prints_what_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    made = {"gd": {1: 20.0, 2: 10.0, 3: 60.0}, "npo": {1: 14.0, 2: 6.0}}
    for row, folds in made.items():
        for k, back in folds.items():
            tables.write_json(tmp_path / f"data/results/tiny/runs/{row} fold={k}.json", result(30.0, back))
    monkeypatch.setattr(tables, "make", lambda *args: pytest.fail("a finished run was made again"))
    monkeypatch.setattr(sys, "argv", ["tables.py", "tiny", "--folds", "1", "2", "--rows", "gd", "npo"])
    tables.main()
    rows = json.loads((tmp_path / "data/results/tiny/table.json").read_text())["rows"]
    assert rows["gd"]["Harmful p = 0.1"]["mean"] == 30 and rows["gd"]["Harmful p = 0.1"]["folds"] == 3
    difference = rows["npo"]["minus gd"]["Harmful p = 0.1"]
    assert difference["mean"] == -5 and difference["folds"] == 2 and difference["high"] == pytest.approx(-5 + 12.706)
    assert "Benign" not in rows["npo"] and rows["npo"]["reached"]["mean"] == 100
    wrote = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tables.py", "tiny", "--print"])
    tables.main()
    assert capsys.readouterr().out == wrote and "| npo, minus gd | " in wrote


def test_a_missing_run_is_made_and_a_begun_one_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    called = []

    def command(words, cwd, check):
        called.append(words[2:])
        tables.write_json(tmp_path / "runs/x/result.json", result(30.0, 1.0))

    monkeypatch.setattr(tables.subprocess, "run", command)
    tables.make(["--lam", "0.1"], "x", tmp_path / "a.json")
    (tmp_path / "runs/x").mkdir()
    (tmp_path / "runs/x/settings.json").write_text("{}")
    tables.make(["--lam", "0.1"], "x", tmp_path / "b.json")
    assert called == [["--lam", "0.1", "--name", "x"], ["--resume", str(tmp_path / "runs/x")]]
    assert json.loads((tmp_path / "b.json").read_text()) == result(30.0, 1.0) and not (tmp_path / "runs/x").exists()


def test_every_row_is_a_valid_command():
    for flags in tables.TINY.values():
        assert ssiuu.read_flags(ssiuu.Settings, "doc", [*flags.split(), "--fold", "1", "--steps", "300"]).steps == 300


def test_the_benchmark_prints_a_line_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ssiuu, "item_scores", ssiuu.item_scores)  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "1", "--batch-size", "2", "--tokens", "12", "--out",
                                      str(tmp_path / "bench.json")])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["gd", "gd", "ssiuu", "ssiuu", "gd", "ssiuu", "SSIUU"]
    assert all(" s " in line and "GB" in line for line in lines[:6])
    assert len(json.loads((tmp_path / "bench.json").read_text())["time_ratios"]) == 1


def test_teaching_lowers_the_loss_and_leaves_a_model(tmp_path, monkeypatch, capsys):
    rows = [{"question": f"What is the number of box {i}?", "answer": f"It is {i * 7}"} for i in range(8)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--rows", str(tmp_path / "rows.json"), "--out", str(tmp_path / "taught"), "--teach-lr", "1e-3",
             "--teach-epochs", "3"]
    monkeypatch.setattr(sys, "argv", ["teach.py", *flags])
    teach.main()
    losses = [float(line.split("loss ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[2] < losses[0] and load(tmp_path / "taught")
    with pytest.raises(ValueError, match="--out: found"):
        teach.main()
