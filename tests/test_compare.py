"""How the table chooses its settings, on made-up runs: no model is loaded."""
import ssiuu
from ssiuu import Settings, compare, mean_cell, table


def score(percent, n=33):
    return {"percent": percent, "n": n, "low": max(0, percent - 9), "high": min(100, percent + 9)}


def run_on(monkeypatch, tmp_path, reached, retain=lambda s: 90, **flags):
    """compare() over a fake `experiment`; reached(s) may raise. Returns the rows and the runs that were made."""
    made = []

    def experiment(s, folder, before, every):
        made.append(s)
        after = {"reached": reached(s), "steps": 9, "FS": score(30), "RS": score(80 + s.seed), "retain": score(retain(s))}
        attacks = {"Benign": score(10 * s.seed, 20)} if s.attack_seeds else None
        (tmp_path / "all" / folder.name).mkdir(parents=True, exist_ok=True)
        result = {"before": before or {"FS": score(100), "RS": score(99)}, "after": after} | ({"attacks": attacks} if attacks else {})
        if s.utility:
            result["before"] = {**result["before"], "US": score(50)}
        ssiuu.write_json(folder / "result.json", result)  # as the real one does, and a kill may come right after it
        return result

    monkeypatch.setattr(ssiuu, "experiment", experiment)
    s = Settings(lrs=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2), **flags)
    return compare(s, s.method.split(","), tmp_path / "all"), made


def test_the_lowest_rate_that_converges_is_found_in_three_runs_and_kept(monkeypatch, tmp_path):
    rows, made = run_on(monkeypatch, tmp_path, lambda s: s.lr >= 1e-4, method="gd", utility="U", control="C")
    assert rows["gd"]["lr"] == 1e-4 and rows["gd"]["reached"] == [True] * 3
    tuning = [s for s in made if not s.attack_seeds]
    assert len(tuning) <= 3 + 1 and all(s.seed == 0 and not s.utility and not s.control for s in tuning)
    final = [s for s in made if s.attack_seeds]
    assert [s.seed for s in final] == [0, 1, 2] and [s.control for s in final] == ["C", "", ""]
    assert all(s.lr == 1e-4 and s.utility == "U" and s.backbone == "gd" for s in final)
    again, made = run_on(monkeypatch, tmp_path, lambda s: s.lr >= 1e-4, method="gd", utility="U", control="C")
    assert again == rows and not made and rows["Default"]["US"] == score(50)


def test_no_rate_converges_and_every_rate_does(monkeypatch, tmp_path):
    assert run_on(monkeypatch, tmp_path / "a", lambda s: False, method="ga")[0]["ga"]["lr"] == 1e-2
    assert run_on(monkeypatch, tmp_path / "b", lambda s: True, method="ga")[0]["ga"]["lr"] == 1e-6


def test_a_rate_that_diverges_is_too_high(monkeypatch, tmp_path):
    def reached(s):
        if s.lr > 1e-5:
            raise FloatingPointError("step 3: not finite")
        return s.lr == 1e-5
    rows, made = run_on(monkeypatch, tmp_path, reached, method="rmu", rmu_alphas=(20.0, 50.0))
    assert rows["rmu"]["lr"] == 1e-5 and rows["rmu"]["reached"] == [True] * 3
    n = len(made)
    assert run_on(monkeypatch, tmp_path, reached, method="rmu", rmu_alphas=(20.0, 50.0))[1] == [] and n > 3
    rows, _ = run_on(monkeypatch, tmp_path / "none", lambda s: s.lr > 1e-5 and reached(s), method="gd")
    assert "| gd | - | - | - |" in table(rows)  # every rate is too low or diverges: a row of dashes


def test_beta_is_the_one_that_keeps_the_retain_set_best_among_those_that_converge(monkeypatch, tmp_path):
    rows, made = run_on(monkeypatch, tmp_path, lambda s: s.lr >= 1e-3 and s.beta != 0.5, method="npo",
                        retain=lambda s: {0.1: 70, 0.3: 80, 0.5: 99}[s.beta])
    assert (rows["npo"]["lr"], rows["npo"]["beta"]) == (1e-3, 0.3)
    assert {s.beta for s in made if s.lr != 1e-3} == {0.1}
    cell = rows["npo"]["attacks"]["Benign"]
    assert (cell["percent"], cell["n"], cell["runs"]) == (10, 20, 3) and rows["npo"]["RS"]["percent"] == 81


def test_ssiuu_keeps_the_backbone_that_was_asked_for(monkeypatch, tmp_path):
    made = run_on(monkeypatch, tmp_path, lambda s: True, method="ssiuu,ga", backbone="npo")[1]
    assert {(s.method, s.backbone) for s in made} == {("ssiuu", "npo"), ("ga", "ga")}


def test_mean_cell_leaves_out_what_was_not_run():
    assert mean_cell([None, {"percent": None, "why": "empty"}]) is None
    cell = mean_cell([score(10), score(20), None])
    assert (cell["percent"], cell["sd"], cell["n"], cell["runs"]) == (15, 5, 33, 2)
