"""The table over forget sets by hand; the benchmark and the teacher on the tiny model."""
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
for folder in ("data", "data/results"):
    sys.path.insert(0, str(ROOT / folder))

import attack  # noqa: E402
import bench  # noqa: E402
import precision  # noqa: E402
import ssiuu  # noqa: E402
import tables  # noqa: E402
import teach  # noqa: E402
from data import collate, encoded, load_tofu  # noqa: E402
from evaluate import splits_of  # noqa: E402
from model import answer_logprob, load  # noqa: E402


def test_the_interval_is_students():
    values = [5.1, 4.9, 5.6, 5.8, 4.2, 5.0, 5.3, 4.7, 5.5, 5.9]
    half = 2.262 * statistics.stdev(values) / 10 ** 0.5
    x = tables.interval(values)
    assert (x["low"], x["high"]) == pytest.approx((5.2 - half, 5.2 + half), abs=1e-3) and x["folds"] == 10
    assert tables.interval([3.0]) == {"mean": 3.0, "low": None, "high": None, "folds": 1}


def attacks(back):
    return {"Harmful p = 0.1": {"percent": back, "margin_max": -1.0}, "Benign": {"why": "none is left"}}


def kept(row, back, hidden=0.5, name="tiny"):
    t = tables.TABLES[name]
    return {"flags": {"model": t.model, "steps": t.steps, "ssiuu.py": t.rows[row], "attack.py": t.attack},
            "before": {"FS": {"percent": 100.0}}, "commit": "abc", "attacks": attacks(back),
            "after": {"FS": {"percent": 30.0}, "RS": {"percent": 50.0}, "steps": 7, "reached": True},
            "analysis": {"D_pos": [0.1, 0, 1], "D_neg": [hidden, 0, 1], "share": [0.5, 0, 1], "lens": [
                {"percent": 20.0}], "P": 0.1}}


def print_table(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["tables.py", "tiny", *flags])
    tables.main()
    return capsys.readouterr().out


def test_differences_are_paired_by_fold_and_the_command_prints_what_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "HERE", tmp_path)
    made = {"gd": {1: 20.0, 2: 10.0, 3: 60.0}, "npo": {1: 14.0, 2: 6.0}}
    for row, folds in made.items():
        for k, back in folds.items():
            tables.write_json(tmp_path / f"tiny/{row} fold={k}.json", kept(row, back))
    monkeypatch.setattr(tables, "command", lambda *words: pytest.fail("a finished run was made again"))
    wrote = print_table(monkeypatch, capsys, "--folds", "1", "2", "--rows", "gd", "npo")
    rows = json.loads((tmp_path / "tiny/table.json").read_text())["rows"]
    assert rows["gd"]["Harmful p = 0.1"]["mean"] == 30 and rows["gd"]["Harmful p = 0.1"]["folds"] == 3
    difference = rows["npo"]["minus gd"]["Harmful p = 0.1"]
    assert difference["mean"] == -5 and difference["folds"] == 2
    assert difference["high"] == pytest.approx(-5 + 12.706)
    assert "Benign" not in rows["npo"] and rows["npo"]["reached"]["mean"] == 100
    assert print_table(monkeypatch, capsys, "--print") == wrote and "minus gd, paired" in wrote
    assert "RS" not in print_table(monkeypatch, capsys, "--print", "--columns", "FS")
    with pytest.raises(ValueError, match="--columns: found 'XS', expected some of FS"):
        print_table(monkeypatch, capsys, "--print", "--columns", "XS")
    # other settings than the table's have to be removed
    with pytest.raises(ValueError, match="1 runs failed"):
        tables.write_json(tmp_path / "tiny/gd fold=1.json", kept("npo", 1.0))
        print_table(monkeypatch, capsys, "--folds", "1", "--rows", "gd")


def test_a_run_is_made_or_resumed_looked_into_attacked_and_its_weights_go(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "HERE", tmp_path)
    called, after = [], kept("gd", 1.0)["after"]

    def command(script, *words):
        called.append((script, *words))
        if "--name" in words:
            folder = tmp_path / "runs" / words[words.index("--name") + 1]
        else:
            folder = next(tmp_path / word for word in words if word.startswith("runs/"))
        if script == "ssiuu.py":
            made = {"before": {}, "after": after, "seconds": 1, "other": 2}
            made |= tables.provenance() | {"threads": 7}
            tables.write_json(folder / "result.json", made)
        if "--before" in words:
            found = kept("gd", 1.0)["analysis"]
            seen = {key: found[key] for key in ("D_pos", "D_neg", "share")}
            tables.write_json(folder / "analysis.json", {"variation": seen | {"curves": []}, "checkpoints": {
                "after": {"lens": found["lens"], "P": 0.1}}})
        if script == "attack.py":
            lines = [{"attack": name, "kind": "summary", **x} for name, x in attacks(4.0).items()]
            return "\n".join(map(json.dumps, [{"kind": "harmful"}, *lines]))
        return json.dumps({"FS": {"percent": 35.0}, "RS": {"percent": 99.0}})

    monkeypatch.setattr(tables, "command", command)
    result = tables.make("tiny", "gd", 3)
    assert [words[0] for words in called] == ["ssiuu.py", "evaluate.py", "attack.py"]
    assert {"--name", "--method", "--no-attack"} <= {*called[0]}
    assert not (tmp_path / "runs/tiny gd fold=3").exists()
    assert result["threads"] == 7 and "other" not in result  # of the run that made it, not of this one
    assert result["attacks"]["Harmful p = 0.1"]["percent"] == 4 and "curves" not in result["analysis"]
    assert json.loads((tmp_path / "tiny/gd fold=3.json").read_text()) == result
    (tmp_path / "runs/tiny gd fold=4").mkdir()
    (tmp_path / "runs/tiny gd fold=4/settings.json").write_text("{}")
    tables.make("tiny", "gd", 4)
    assert "--resume" in called[3] and "--name" not in called[3]
    never = tables.make("tiny", "never taught", 4)
    assert called[6][:2] == ("data/make_tiny.py", "runs/tiny never taught fold=4")
    assert "--without" in called[6] and never["after"]["FS"]["percent"] == 35


def test_a_command_that_fails_gives_its_error_line():
    with pytest.raises(RuntimeError, match="error: --lr: found"):
        tables.command("ssiuu.py", "--lr", "two")


def test_the_rank_correlation_is_spearmans_with_shared_ranks():
    values = {row: {1: {"D_neg": hidden, "D_pos": 0.0, "Benign": back}} for row, hidden, back in [
        ("a", 1.0, 5.0), ("b", 2.0, 6.0), ("c", 3.0, 7.0), ("d", 4.0, 8.0), ("never taught", 9.0, 0.0)]}
    assert tables.ranking(values)["Benign"]["mean"] == pytest.approx(1)
    values["d"][1]["Benign"] = 0.0  # ranks 2 3 4 1 against 1 2 3 4: rho = 1 - 6 * 12 / 60
    assert tables.ranking(values)["Benign"]["mean"] == pytest.approx(-0.2)


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_row_is_a_valid_command(name):
    t = tables.TABLES[name]
    for flags in t.rows.values():
        if flags is not None:
            assert ssiuu.read_flags(ssiuu.Settings, "doc", [*flags.split(), "--steps", "300"]).steps == 300
    if t.attack:
        assert attack.read_flags(attack.Settings, "doc", t.attack.split()).attack_draws == 1


def test_the_benchmark_prints_a_line_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ssiuu, "item_scores", ssiuu.item_scores)  # put back afterwards
    flags = ["--rounds", "1", "--batch-size", "2", "--tokens", "12", "--out", str(tmp_path / "bench.json")]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["gd", "gd", "ssiuu", "ssiuu", "gd", "ssiuu", "SSIUU"]
    assert all(" s " in line and "GB" in line for line in lines[:6])
    assert len(json.loads((tmp_path / "bench.json").read_text())["time_ratios"]) == 1


def test_the_precision_of_a_step_is_written(tmp_path, monkeypatch, capsys):
    flags = ["--items", "2", "--steps", "2", "--out", str(tmp_path / "p.json")]
    monkeypatch.setattr(sys, "argv", ["precision.py", *flags])
    precision.main()
    first, second = json.loads((tmp_path / "p.json").read_text())["errors"]
    assert 0 < first["bfloat16 L"] < 0.2 and first.keys() < second.keys()
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("more", [[], ["--bf16"]])
def test_teaching_lowers_the_loss_and_leaves_a_model(tmp_path, monkeypatch, capsys, more):
    """The model left behind, in float32, does what the loss said: bf16 weights of the first step do not."""
    rows = [{"question": f"What is the number of box {i}?", "answer": f"It is {i * 7}"} for i in range(8)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--rows", str(tmp_path / "rows.json"), "--out", str(tmp_path / "taught"), "--teach-lr", "1e-3",
             "--teach-epochs", "6", *more]
    monkeypatch.setattr(sys, "argv", ["teach.py", *flags])
    teach.main()
    losses = [float(line.split("loss ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    taught, tokenizer = load(tmp_path / "taught")
    with torch.no_grad():
        batch = collate(encoded(tokenizer, load_tofu(tmp_path / "rows.json")))
        loss = -answer_logprob(taught, batch).mean().item()
    assert len(losses) == 6 and loss < losses[5] < losses[0] / 3
    with pytest.raises(ValueError, match="--out: found"):
        teach.main()


def test_all_facts_are_taught_but_those_of_a_fold_left_out():
    everything, rest = (teach.examples_of(teach.Settings(without=k)) for k in (None, 1))
    left_out = splits_of(teach.Settings(fold=1))[0]
    assert len(everything) == 664 and len(rest) == 664 - 33
    assert not [e for e in rest if e in left_out] and all(e in everything for e in left_out)


def test_columns_of_a_run_that_was_looked_into_beyond_the_paper():
    rate = lambda percent: {"percent": percent, "low": 0.0, "high": 100.0, "n": 33}
    beyond = {"membership": {"after": {"loss": rate(70.0)}, "before": {"loss": rate(99.0)}},
              "causal": [{"m": 30, "FS": rate(40.0), "random_FS": rate(31.0)}]}
    assert tables.columns_of({"after": {"FS": rate(30.0)}, "beyond": beyond}) == {
        "FS": 30.0, "AUC loss": 70.0, "FS 30 silent": 40.0, "FS 30 random": 31.0,
        "FS 30 silent less random": 9.0}


@pytest.mark.parametrize("change", [
    {"after": None}, {"after": {"FS": 30.0}}, {"attacks": {"Benign": 5}}, {"analysis": {"lens": []}},
    {"attacks": {"Benign": {"percent": "x", "margin_max": 0.0}}}, {"beyond": {"causal": [{}]}}, {"flags": 3}])
def test_a_kept_run_that_was_bent_is_named(tmp_path, change):
    tables.write_json(tmp_path / "gd fold=1.json", kept("gd", 1.0) | change)
    with pytest.raises(ValueError, match="gd fold=1.json: not a run"):
        tables.kept_run(tmp_path / "gd fold=1.json")


def test_a_kept_run_without_its_scores_is_named(tmp_path):
    result = kept("gd", 1.0)
    del result["after"]
    tables.write_json(tmp_path / "gd fold=1.json", result)
    with pytest.raises(ValueError, match="gd fold=1.json: not a run .*after is None"):
        tables.kept_run(tmp_path / "gd fold=1.json")


def test_what_is_to_be_left_out_has_to_be_among_the_rows(tmp_path):
    facts = splits_of(teach.Settings(fold=1))[0]
    rows = [{"question": e.question + " ", "answer": e.answers[0]} for e in facts]
    for n, words in ((33, None), (32, "found 32 of the 33 facts of fold 1")):
        more = [{"question": "Else?", "answer": "Yes"}]
        (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows[:n] + more)))
        s = teach.Settings(rows=str(tmp_path / "rows.json"), without=1)
        if words:
            with pytest.raises(ValueError, match=words):
                teach.examples_of(s)
        else:
            assert [e.question for e in teach.examples_of(s)] == ["Else?"]
