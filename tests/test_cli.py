"""The commands as a person runs them, in a subprocess; what they write, what a kill and bad input leave behind."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import load_faithun, load_tofu
from evaluate import mismatched_tau, run

ROOT = Path(__file__).parent.parent
QUICK = ["--test-limit", "8", "--attack-seeds", "1", "--attack-epochs", "1", "--attack-lrs", "1e-4", "--tau", "0.97",
         "--benign-rows", "8", "--benign-lrs", "1e-4", "--benign-points", "2"]


def command(folder, script, *flags):
    """Runs a command in `folder`, so that runs/ appears there."""
    paths = ["--model", str(ROOT / "data/tiny"), "--forget", str(ROOT / "data/faithun.json")]
    paths += ["--benign", str(ROOT / "data/instructions.json")] if script != "evaluate.py" else []
    return subprocess.run([sys.executable, str(ROOT / script), *paths, *flags], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = [{"sentence": f"The {a} is bigger than the {b} because the _ is big.", "option1": a, "option2": b, "answer": "1"}
            for a, b in (("house", "mouse"), ("ship", "shoe"), ("tree", "leaf"))]
    (folder / "winogrande_dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = command(folder, "ssiuu.py", *QUICK, "--lr", "5e-4", "--steps", "60", "--utility", str(folder), "--control",
                  str(ROOT / "data/tiny"))
    assert out.returncode == 0, out.stderr
    return folder, out.stdout


def test_the_main_command_writes_the_papers_row(finished):
    folder, printed = finished
    run = folder / "runs/ssiuu-tiny"
    result = json.loads((run / "result.json").read_text())
    assert result["after"]["FS"]["percent"] <= 97 < result["before"]["FS"]["percent"] and result["after"]["reached"]
    assert list(result["attacks"]) == ["Harmful p = 0.1", "Harmful p = 0.3", "Benign", "int8", "int4"]
    assert result["after"]["RS"]["n"] == 8 and result["before"]["US"]["n"] == result["after"]["US"]["n"] == 3
    control = result["controls"][str(ROOT / "data/tiny")]
    assert list(control) == list(result["attacks"]) and control["Benign"]["n"] == result["attacks"]["Benign"]["n"]
    assert control["int8"]["percent"] == 100  # it still knows the facts
    assert "| ssiuu | " in printed and "step 1/60  L " in printed
    kinds = [json.loads(line)["kind"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert kinds[0] == "before" and kinds[1] == "step" and "after" in kinds
    assert json.loads((run / "settings.json").read_text())["lr"] == 5e-4


def test_the_checkpoint_can_be_scored_and_attacked_alone(finished):
    folder, _ = finished
    run = folder / "runs/ssiuu-tiny"
    out = command(folder, "evaluate.py", "--model", str(run), "--test-limit", "8")
    after = json.loads((run / "result.json").read_text())["after"]
    assert json.loads(out.stdout)["FS"] == after["FS"] and json.loads(out.stdout)["RS"] == after["RS"]
    out = command(folder, "attack.py", "--model", str(run), "--p", "0.3", "--attack-lrs", "1e-4", "--attack-seeds", "1",
                  "--attack-epochs", "1", "--benign", "", "--bits", "4", "--control", str(ROOT / "data/tiny"))
    wrong = round(after["FS"]["n"] * (1 - after["FS"]["percent"] / 100))
    if wrong < 2:  # too few false answers: said in one line
        assert "answered falsely" in out.stdout + out.stderr
    else:
        summaries = [r for r in map(json.loads, out.stdout.splitlines()) if r["kind"] == "summary"]
        assert [(r["model"], r["attack"]) for r in summaries] == [
            (name, kind) for name in (str(run), str(ROOT / "data/tiny")) for kind in ("Harmful p = 0.3", "int4")]
        assert [r["n"] for r in summaries[:2]] == [r["n"] for r in summaries[2:]] == [summaries[0]["n"], wrong]
        assert summaries[0]["n"] < wrong


def test_tofu_end_to_end(tmp_path):
    """TOFU's file format, with facts that the tiny model knows: FS and RS are ROUGE-L, tau comes from the data."""
    examples = load_faithun(ROOT / "data/faithun.json")
    for name, part in (("forget01", examples[:8]), ("retain99", examples[8:24]), ("full", examples[:24])):
        lines = [json.dumps({"question": e.question, "answer": e.answers[0]}) for e in part]
        (tmp_path / f"{name}.json").write_text("\n".join(lines))  # upstream ends without a newline too
    (tmp_path / "real_authors.json").write_text((tmp_path / "retain99.json").read_text())
    out = command(tmp_path, "ssiuu.py", "--forget", "forget01.json", "--retain", "retain99.json", "--teach", "full.json",
                  "--teach-epochs", "1", "--teach-lr", "1e-6", "--method", "gd", "--lr", "1e-3", "--steps", "40",
                  "--test-limit", "6", "--utility", ".", *QUICK[2:6], "--attack-lrs", "1e-4", "--benign", "", "--p", "0.3")
    assert out.returncode == 0, out.stderr
    result = json.loads((tmp_path / "runs/gd-tiny/result.json").read_text())
    tau = mismatched_tau(load_tofu(tmp_path / "forget01.json"))
    assert result["settings"]["tau"] == tau and result["after"]["FS"]["percent"] <= 100 * tau < 60
    assert result["before"]["FS"]["percent"] > 95 and result["after"]["RS"]["n"] == 6
    assert result["before"]["US"]["tasks"]["real_authors"]["n"] == 16
    assert result["attacks"]["Harmful p = 0.3"]["n"] == 6  # all 8 are the pool, 2 are retrained on
    assert (tmp_path / "runs/gd-tiny/taught/model.safetensors").is_file() and "teach 1/1  24 rows" in out.stdout


def test_several_methods_make_the_table_and_a_finished_run_is_never_run_again(tmp_path):
    """Killed twice: in the second method, and between the last cell and the table."""
    flags = [*QUICK, "--method", "ga,npo", "--lrs", "1e-5", "5e-4", "1e-3", "--betas", "0.1", "0.5", "--seeds", "2",
             "--steps", "30", "--p", "0.3", "--bits", "8"]
    out = command(tmp_path, "ssiuu.py", *flags, "--name", "all")
    assert out.returncode == 0, out.stderr
    folder = tmp_path / "runs/all"
    whole, table = json.loads((folder / "result.json").read_text()), (folder / "table.md").read_text()
    assert list(whole["rows"]) == ["Default", "ga", "npo"] and table.splitlines()[3].startswith("| ga | ")
    for row in (whole["rows"]["ga"], whole["rows"]["npo"]):
        assert row["reached"] == [True, True] and row["lr"] in (1e-5, 5e-4, 1e-3) and row["FS"]["runs"] == 2
        assert list(row["attacks"]) == ["Harmful p = 0.3", "Benign", "int8"]
    tried = sorted(f.name for f in folder.iterdir() if f.is_dir() and f.name.startswith("npo"))
    assert any("beta=0.5" in name for name in tried) and f"npo lr={whole['rows']['npo']['lr']:g} beta=" in " ".join(tried)
    (folder / "result.json").unlink()
    last = folder / next(name for name in reversed(tried) if name.endswith("seed=1"))
    cut = [line for line in (last / "log.jsonl").read_text().splitlines() if json.loads(line)["kind"] != "quantise"]
    (last / "log.jsonl").write_text("\n".join(cut[:-1]) + "\n")
    (last / "result.json").unlink()
    stamps = {f: f.stat().st_mtime_ns for f in folder.glob("*/result.json")}
    out = subprocess.run([sys.executable, str(ROOT / "ssiuu.py"), "--resume", "runs/all"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert out.returncode == 0 and (folder / "table.md").read_text() == table, out.stderr
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps and "step " not in out.stdout
    assert json.loads((folder / "result.json").read_text())["rows"] == whole["rows"]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    flags = [*QUICK, "--attack-seeds", "0", "--tau", "0", "--save-every", "2", "--lr", "1e-4"]
    whole = command(tmp_path, "ssiuu.py", *flags, "--steps", "4", "--name", "whole")
    assert whole.returncode == 0, whole.stderr
    assert command(tmp_path, "ssiuu.py", *flags, "--steps", "2", "--name", "cut").returncode == 0
    with open(tmp_path / "runs/cut/log.jsonl", "a") as log:
        log.write('{"kind": "st')  # what a kill leaves
    resumed = subprocess.run([sys.executable, str(ROOT / "ssiuu.py"), "--resume", "runs/cut", "--steps", "4"],
                             cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    a, b = (load_file(tmp_path / f"runs/{name}/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_kill_after_the_threshold_takes_no_further_step(finished, tmp_path):
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    run, log = tmp_path / "runs/ssiuu-tiny", tmp_path / "runs/ssiuu-tiny/log.jsonl"
    steps = [line for line in log.read_text().splitlines() if json.loads(line)["kind"] in ("before", "step")]
    log.write_text("\n".join(steps) + "\n")
    out = subprocess.run([sys.executable, str(ROOT / "ssiuu.py"), "--resume", "runs/ssiuu-tiny", "--attack-seeds", "0"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and log.read_text().count('"kind": "step"') == len(steps) - 1, out.stderr
    a, b = (load_file(folder / "model.safetensors") for folder in (run, finished[0] / "runs/ssiuu-tiny"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_keeps_its_settings(finished, tmp_path):
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    out = subprocess.run([sys.executable, str(ROOT / "ssiuu.py"), "--resume", "runs/ssiuu-tiny", "--attack-epochs", "9"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 1 and "--attack-epochs: found 9, expected 1" in out.stderr


def test_bfloat16_follows_float32(tmp_path):
    """Autocast's weight cache would freeze the forward pass at step 1: P would stay where it was."""
    P = {}
    for dtype in ("float32", "bfloat16"):
        out = command(tmp_path, "ssiuu.py", *QUICK, "--attack-seeds", "0", "--steps", "3", "--lr", "1e-4", "--tau", "0",
                      "--dtype", dtype, "--name", dtype)
        assert out.returncode == 0, out.stderr
        log = [json.loads(line) for line in (tmp_path / f"runs/{dtype}/log.jsonl").read_text().splitlines()]
        P[dtype] = [r["P"] for r in log if r["kind"] == "step"]
    assert P["bfloat16"] == pytest.approx(P["float32"], abs=4e-3) and P["float32"][0] - P["float32"][2] > 0.02


@pytest.mark.parametrize("script, flags, words", [
    ("ssiuu.py", ["--forget", "nowhere.json"], ["nowhere.json"]),
    ("ssiuu.py", ["--model", "nowhere"], ["nowhere", "directory"]),
    ("ssiuu.py", ["--method", "magic"], ["--method", "magic", "ssiuu"]),
    ("ssiuu.py", ["--p", "1.5"], ["--p", "1.5"]),
    ("ssiuu.py", ["--lr", "-1"], ["--lr"]),
    ("ssiuu.py", ["--device", "cuda:9"], ["--device"]),
    ("ssiuu.py", ["--resume", "nowhere"], ["--resume", "nowhere"]),
    ("ssiuu.py", ["--tau", "1", "--test-limit", "4"], ["before unlearning"]),
    ("ssiuu.py", ["--splits", "."], ["forget_set_split.txt"]),
    ("ssiuu.py", ["--unknown", "1"], ["--unknown"]),
    ("ssiuu.py", ["--benign", "nowhere.json"], ["--benign", "nowhere.json"]),
    ("ssiuu.py", ["--control", "nowhere"], ["--control", "nowhere"]),
    ("ssiuu.py", ["--utility", "."], ["mmlu", "winogrande_dev.jsonl"]),
    ("ssiuu.py", ["--device", "cpu:x"], ["--device", "cpu:x"]),
    ("ssiuu.py", ["--bench", "--bench-tokens", "5"], ["--bench-tokens"]),
    ("ssiuu.py", ["--save-every", "0"], ["--save-every"]),
    ("ssiuu.py", ["--method", "gd,ga", "--attack-seeds", "0"], ["--attack-seeds"]),
    ("ssiuu.py", ["--method", "gd,magic"], ["--method", "gd,magic"]),
    ("ssiuu.py", ["--retain", "nowhere.json"], ["faithun.json", "line 1"]),
    ("evaluate.py", ["--forget", "nowhere.json"], ["nowhere.json"]),
    ("attack.py", ["--p", "0"], ["--p"]),
])
def test_bad_input_ends_in_one_line_and_a_status(tmp_path, monkeypatch, capsys, script, flags, words):
    """In this process, to save the start of an interpreter; the subprocess above shows that the status gets out."""
    module = __import__(script.removesuffix(".py"))
    benign = ["--benign", str(ROOT / "data/instructions.json")] if script != "evaluate.py" else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--model", str(ROOT / "data/tiny"), "--forget",
                                      str(ROOT / "data/faithun.json"), *benign, *flags])
    with pytest.raises(SystemExit) as e:
        run(module.main)
    last = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code != 0 and "\n" not in last and all(word in last for word in words), last
    assert not list(tmp_path.rglob("result.json"))


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    out = command(tmp_path, "ssiuu.py", "--test-limit", "4", "--lam", "1e39", "--steps", "9", "--tau", "0")
    assert out.returncode == 1 and "not finite" in out.stderr and len(out.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("script", ["ssiuu.py", "evaluate.py", "attack.py"])
def test_help_names_every_flag(tmp_path, script):
    out = command(tmp_path, script, "--help")
    assert out.returncode == 0 and "--forget" in out.stdout and "None" not in out.stdout
