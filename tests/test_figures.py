"""What is drawn equals what the files say: axes are read back. A picture appears, or a line says why not."""
import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "data/results"))

import figures  # noqa: E402
from evaluate import wilson  # noqa: E402

PICTURES = ["causal.png", *(f"figure{i}.png" for i in range(2, 8))]


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def an_analysis(k: int) -> dict:
    """k makes the numbers a run's own."""
    variation = {"neurons": 100, "m": 100, "D_pos": [0.1, 0.05, 0.2], "D_neg": [0.2 * k, 0.1, 1.5],
                 "curves": {"m": [1, 10, 100], "D_pos": [0.0, 0.01, 0.1],
                            "D_neg": [0.1 * k, 0.2 * k, 0.3 * k]}}
    by_module = {"D_pos": {"q_proj": [0.1, 0.0], "up_proj": [0.0, 0.3]},
                 "D_neg": {"q_proj": [0.5 * k, 0.1], "up_proj": [0.2, 0.2]}}
    spread = {"rank": [1, 10, 100], "max": [0.01 * k, 0.001, 0.0], "min": [-0.02 * k, -0.001, 0.0]}
    rho = {"max": [0.5, 0.4, 0.6], "min": [0.1 * k, 0.0, 0.9]}
    lens = [wilson(100 - 10 * k * block, 33) for block in range(4)]
    return {"n": 33, "variation": variation, "by_module": by_module,
            "attribution": {"before": spread, "after": spread, "attacked": spread},
            "correlation": {"before after": rho, "after attacked": rho},
            "checkpoints": {"before": {"lens": [wilson(100, 33)] * 4}, "after": {"lens": lens}}}


def a_cell(lr: float, seed: int, FS: list, **more) -> dict:
    return {"kind": "harmful", "p": 0.1, "lr": lr, "seed": seed, "n": 21, "retrained": 2, "FS": FS,
            "logp": [0, 0, 0], "margin": [0, 0, 0]} | more


def a_run(folder: Path, k: int, **settings) -> str:
    """A folder with all four files."""
    attacks = {"Harmful p = 0.1": wilson(10 * k, 21), "Harmful p = 0.3": wilson(20 * k, 16),
               "Benign": wilson(5 * k, 23)}
    after = {"FS": wilson(30, 33), "RS": wilson(60 + k, 464), "retain": wilson(90, 66)}
    write(folder / "result.json", {"settings": settings, "attacks": attacks, "after": after})
    cells = [{"kind": "step", "t": 1, "FS": 50}]
    for lr, best in ((1e-5, 10 * k), (1e-4, 20 * k)):
        cells += [a_cell(lr, seed, [99, best + seed, 0]) for seed in (0, 1)]
    write(folder / "log.jsonl", "".join(json.dumps(cell) + "\n" for cell in cells) + '{"kind": "harm')
    write(folder / "analysis.json", an_analysis(k))
    causal = [{"m": m, "FS": wilson(m / 10, 33), "random_FS": wilson(30, 33)} for m in (10, 100, 1000)]
    write(folder / "beyond.json", {"n": 33, "causal": causal})
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    return [a_run(tmp_path / "a", 1, method="gd"), a_run(tmp_path / "b", 2, method="ssiuu", lam=0.01),
            a_run(tmp_path / "c", 3, method="ssiuu", lam=0.1)]


@pytest.fixture
def command(monkeypatch):
    def call(*argv: str) -> None:
        monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, argv)])
        figures.main()
    return call


def test_every_picture_is_written(folders, command, tmp_path, capsys):
    command(*folders, "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == PICTURES
    assert "skipped" not in capsys.readouterr().out
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000


def test_runs_are_named_by_what_tells_them_apart(folders, tmp_path):
    again = a_run(tmp_path / "d", 1, method="ssiuu", lam=0.1)
    names = [run.name for run in figures.read_runs([*folders, again])]
    assert names == ["GD", "SSIUU λ=0.01", "c", "d"]
    looks = {(run.colour, run.marker) for run in figures.read_runs(folders * 8)}
    assert len(looks) == 24


def bars(ax) -> list[float]:
    return [bar.get_height() for bar in ax.patches]


def test_figure_2_and_3_draw_the_numbers_and_their_intervals(folders):
    runs = figures.read_runs(folders)
    axes = figures.figure_2(runs).axes
    titles = [ax.get_title() for ax in axes]
    assert titles == ["Harmful p = 0.1, n = 21", "Harmful p = 0.3, n = 16", "Benign, n = 23"]
    assert [bars(ax) for ax in axes] == [[10, 20, 30], [20, 40, 60], [5, 10, 15]]
    whisker = axes[0].collections[0].get_segments()[0][:, 1]
    assert whisker.tolist() == pytest.approx([wilson(10, 21)["low"], wilson(10, 21)["high"]])
    left, right = figures.figure_3(runs).axes
    assert [line.get_linestyle() for line in left.lines[:2]] == ["-", ":"]
    assert left.lines[2].get_ydata().tolist() == [0.2, 0.4, 0.6]
    assert bars(right) == pytest.approx([0.1, 0.2, 0.1, 0.4, 0.1, 0.6])


def test_figures_4_to_6_have_a_panel_a_method(folders):
    runs = figures.read_runs(folders)
    axes = figures.figure_4(runs).axes
    assert [ax.get_title() for ax in axes] == ["GD, n = 33", "SSIUU λ=0.01, n = 33", "SSIUU λ=0.1, n = 33"]
    before, after, chance = axes[1].lines
    assert list(after.get_xdata()) == [1, 2, 3, 4] and list(after.get_ydata()) == [100, 80, 60, 40]
    assert list(before.get_ydata()) == [100] * 4 and set(chance.get_ydata()) == {50}
    images = [ax.images[0] for ax in figures.figure_5(runs).axes if ax.images]
    assert len(images) == 6 and {image.get_clim() for image in images} == {(0, 1.5)}  # one scale
    assert images[5].get_array().tolist() == [[1.5, 0.1], [0.2, 0.2]]
    fig = figures.figure_6(runs)
    assert len(fig.axes) == 4 and bars(fig.axes[3]) == pytest.approx([0.5, 0.1, 0.5, 0.2, 0.5, 0.3])
    maxima, minima = fig.axes[1].lines[2:4]
    assert list(maxima.get_ydata()) == [0.02, 0.001, 0] and list(minima.get_ydata()) == [-0.04, -0.001, 0]


def curves(ax) -> dict[str, list[float]]:
    lines = [line for line in ax.lines if not line.get_label().startswith("_")]
    return {line.get_label(): list(line.get_ydata()) for line in lines}


def test_figure_7_is_lambda_and_the_rates(folders):
    a, b = figures.figure_7(figures.read_runs(folders)).axes
    assert curves(a) == {"retain set, n = 66": [90, 90], "test set, n = 464": [62, 63],
                         "Harmful p = 0.1, n = 21": [20, 30], "Harmful p = 0.3, n = 16": [40, 60]}
    # per rate: the largest after the attack began, meaned over draws
    assert curves(b) == {"GD, n = 21": [10.5, 20.5], "SSIUU λ=0.01, n = 21": [20.5, 40.5],
                         "SSIUU λ=0.1, n = 21": [30.5, 60.5]}


def test_another_tools_checkpoint_has_an_analysis_alone(tmp_path, command):
    write(tmp_path / "theirs/analysis.json", an_analysis(1))
    command(tmp_path / "theirs", "--out", tmp_path / "pictures")
    assert {f"figure{i}.png" for i in (3, 4, 5, 6)} == {f.name for f in (tmp_path / "pictures").iterdir()}


def test_a_rate_at_which_the_attack_diverges_has_no_point(tmp_path):
    folder = Path(a_run(tmp_path / "a", 1, method="gd"))
    cells = [a_cell(1e-5, 0, [0, 5, 9]), a_cell(1e-2, 0, [0, 7, 3])]
    failed = a_cell(0.9, 0, []) | {"failed": "loss is nan"}
    for name in ("FS", "logp", "margin"):
        del failed[name]
    write(folder / "log.jsonl", "".join(json.dumps(cell) + "\n" for cell in (*cells, failed)))
    run, = figures.read_runs([str(folder)])
    assert run.cells[-1] == failed
    ax, = figures.figure_7([run]).axes
    assert curves(ax) == {"GD, n = 21": [9, 7]}


def test_what_no_run_holds_is_skipped(tmp_path, command, capsys):
    folder = Path(a_run(tmp_path / "a", 1, method="gd"))
    for name in ("analysis.json", "beyond.json", "log.jsonl"):
        (folder / name).unlink()
    command(folder, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["figure2.png"]
    said = capsys.readouterr().out
    for name in ("figure3", "figure4", "figure5", "figure6", "figure7", "causal"):
        assert f"{name}: skipped" in said

    r = an_analysis(1)
    del r["attribution"]["attacked"], r["correlation"]["after attacked"]
    write(folder / "analysis.json", r)
    result = json.loads((folder / "result.json").read_text())
    result["attacks"] = {"Benign": {"percent": None, "why": "nothing is left to score"}}
    write(folder / "result.json", result)
    runs = figures.read_runs([str(folder)])
    assert figures.figure_2(runs) is None and len(figures.figure_6(runs).axes) == 1
    assert "figure6 (b): skipped" in capsys.readouterr().out


def test_recovery_names_every_point_without_overlap(tmp_path, command):
    rows, close = {}, ((60, 8), (61, 8), (62, 9), (90, 8), (91, 7), (99, 60), (60, 30), (61, 29))
    for i, (kept, back) in enumerate(close):
        rows[f"a method, number {i}"] = {
            "RS": {"mean": kept, "low": kept - 4, "high": kept + 1, "folds": 10},
            "Harmful p = 0.3": {"mean": back, "low": back - 3, "high": back + 5, "folds": 10}}
    rows["not attacked"] = {"RS": {"mean": 99, "low": 98, "high": 100, "folds": 10}}
    write(tmp_path / "table.json", {"rows": rows, "rank": {}})
    command("--table", tmp_path / "table.json", "--out", tmp_path)
    assert (tmp_path / "recovery.png").is_file()
    ax, = figures.figure_recovery(figures.read_points(tmp_path / "table.json")).axes
    assert [text.get_text() for text in ax.texts] == list(rows)[:-1]
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
    assert all(ax.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    points = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_markersize() == 7]
    assert points == [[row["RS"]["mean"], row["Harmful p = 0.3"]["mean"]] for row in list(rows.values())[:-1]]
    assert "10 forget sets" in ax.get_xlabel()
    with pytest.raises(ValueError, match="--rows: found 'nowhere'"):
        command("--table", tmp_path / "table.json", "--rows", "nowhere", "--out", tmp_path)


def test_one_forget_set_has_a_point_without_interval(tmp_path):
    alone = {"mean": 50, "low": None, "high": None, "folds": 1}
    table = {"rows": {"gd": {"RS": alone, "Harmful p = 0.3": alone}}, "rank": {}}
    write(tmp_path / "table.json", table)
    row = figures.read_points(tmp_path / "table.json")["gd"]
    assert (row["RS"]["low"], row["RS"]["high"]) == (50, 50)
    assert len(figures.figure_recovery({"gd": row}).axes[0].texts) == 1
    table["rows"]["gd"]["RS"] = alone | {"mean": "x"}
    write(tmp_path / "table.json", table)
    with pytest.raises(ValueError, match="table.json: gd RS mean is 'x', expected a number"):
        figures.read_points(tmp_path / "table.json")


@pytest.mark.parametrize("name, change, message", [
    ("result.json", "{", "not JSON"),
    ("result.json", {"rows": {}}, r"settings.method is None, expected a string"),
    ("analysis.json", {"n": 33, "variation": {"neuron": {}}}, r"variation.m is None"),
    ("beyond.json", {"n": 33, "causal": 3}, r"causal is 3, expected a list"),
    ("log.jsonl", '{"kind": "benign"}\n', r"log.jsonl line 1: seed is None"),
    ("log.jsonl", json.dumps(a_cell(1e-5, 0, [50])) + "\n", r"FS is \[50\], expected two numbers"),
    ("log.jsonl", json.dumps(a_cell(1e-5, 0, [9, 50], p=None)) + "\n",
     r"p is None, expected a number above 0"),
    ("log.jsonl", "x\n", r"log.jsonl line 1: not JSON")])
def test_another_layout_names_the_file(tmp_path, name, change, message):
    folder = a_run(tmp_path / "a", 1, method="gd")
    write(Path(folder) / name, change)
    with pytest.raises(ValueError, match=rf"{name}.*{message}|{message}") as e:
        figures.read_runs([folder])
    assert folder in str(e.value)


def test_errors_end_in_one_line(tmp_path, command, monkeypatch):
    alone = {"mean": 9, "low": None, "high": None, "folds": 1}
    write(tmp_path / "table.json", {"rows": {"gd": {"FS": alone}}, "rank": {}})
    for flags, message in (([], "nothing to draw"), (["--what"], "--what"), (["no/such"], "no/such/result"),
                           (["--table", tmp_path / "table.json"], "no row holds")):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            figures.run_command(lambda: command(*flags))


def test_without_matplotlib_one_line_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["figures.py", *folders])
    without = runpy.run_path(str(ROOT / "data/results/figures.py"))
    with pytest.raises(SystemExit, match="^error: .*pip install matplotlib$"):
        without["run_command"](without["main"])


@pytest.mark.parametrize("part, key, value", [
    ("by_module", "D_pos", {"q_proj": 5}), ("by_module", "D_pos", {"q_proj": ["a"]}),
    ("correlation", "after attacked", None), ("correlation", "after attacked", {"max": [1.0, 2.0, 3.0]}),
    ("attribution", "attacked", {"rank": [1], "min": [0.1]})])
def test_what_is_wrong_inside_an_analysis_is_named(tmp_path, part, key, value):
    folder = Path(a_run(tmp_path / "a", 1, method="gd"))
    r = an_analysis(1)
    r[part][key] = value
    write(folder / "analysis.json", r)
    with pytest.raises(ValueError, match=f"analysis.json: {part}"):
        figures.read_runs([str(folder)])


def test_names_are_written_as_they_are(tmp_path):
    folders = [a_run(tmp_path / where / name, 1, method="gd")
               for where, name in (("x", "a"), ("y", "a"), ("x", "$x^$"), ("x", "_hidden"))]
    found = [run.name for run in figures.read_runs(folders)]
    assert found[:2] == folders[:2] and found[2:] == [r"\$x^\$", "\u200b_hidden"]


def test_what_cannot_be_drawn_is_named(tmp_path, command, monkeypatch):
    def singular(runs):
        raise ArithmeticError("Singular matrix")
    folder = Path(a_run(tmp_path / "a", 1, method="gd"))
    monkeypatch.setattr(figures, "figure_3", singular)
    with pytest.raises(ValueError, match=f"{folder}: cannot be drawn .ArithmeticError: Singular matrix"):
        command(folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
