"""The commands as a person runs them, in a subprocess; what they write, what a kill and bad input leave behind."""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import load_faithun, load_tofu
from evaluate import mismatched_tau, run

ROOT = Path(__file__).parent.parent
QUICK = ["--attack-seeds", "1", "--attack-epochs", "1", "--attack-lrs", "1e-4", "--tau", "0.5",
         "--benign-rows", "8", "--benign-lrs", "1e-4", "--benign-points", "2"]


def arguments(folder, script, *flags):
    """Few facts in `folder`, 6 to forget, 8 to retain, 4 to test, and the flags to work on them."""
    (folder / "few").mkdir(exist_ok=True)
    for name, part in (("forget", range(6)), ("retaining", range(6, 14)), ("test", range(14, 18))):
        (folder / f"few/{name}_set_split.txt").write_text("\n".join(map(str, part)))
    paths = ["--model", str(ROOT / "data/tiny"), "--forget", str(ROOT / "data/faithun.json"), "--splits", "few"]
    return [*paths, *(["--benign", str(ROOT / "data/instructions.json")] if script != "evaluate.py" else []), *flags]


def command(folder, script, *flags):
    """Runs a command in `folder`, so that runs/ appears there."""
    return subprocess.run([sys.executable, str(ROOT / script), *arguments(folder, script, *flags)], cwd=folder,
                          capture_output=True, text=True)


def inside(monkeypatch, folder, script, *flags):
    """The same in this process, which saves the start of an interpreter: what it exits with, 0 where it just ends."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *arguments(folder, script, *flags)])
    try:
        run(__import__(script.removesuffix(".py")).main)
    except SystemExit as e:
        return e.code
    return 0


def resume(folder, name, *flags):
    return subprocess.run([sys.executable, str(ROOT / "ssiuu.py"), "--resume", f"runs/{name}", *flags], cwd=folder,
                          capture_output=True, text=True)


@pytest.fixture
def one_thread(monkeypatch):
    """In this process and in those it starts: sums in another order are other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


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
    assert result["after"]["FS"]["percent"] <= 50 < result["before"]["FS"]["percent"] and result["after"]["reached"]
    assert list(result["attacks"]) == ["Harmful p = 0.1", "Harmful p = 0.3", "Benign", "int8", "int4"]
    assert result["after"]["RS"]["n"] == 4 and result["before"]["US"]["n"] == result["after"]["US"]["n"] == 3
    control = result["controls"][str(ROOT / "data/tiny")]
    assert list(control) == list(result["attacks"]) and control["Benign"]["n"] == result["attacks"]["Benign"]["n"]
    assert control["int8"]["percent"] == 100  # it still knows the facts
    assert "| ssiuu | " in printed and "step 1/60  L " in printed
    kinds = [json.loads(line)["kind"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert kinds[0] == "before" and kinds[1] == "step" and "after" in kinds
    log = {r["kind"]: r for r in map(json.loads, (run / "log.jsonl").read_text().splitlines())}
    assert log["before"] == result["before"] and log["after"] == result["after"]  # US too: a resumed run reads it there
    assert json.loads((run / "settings.json").read_text())["lr"] == 5e-4


def test_the_checkpoint_can_be_scored_and_attacked_alone(finished, monkeypatch, capsys):
    folder, _ = finished
    run = folder / "runs/ssiuu-tiny"
    assert inside(monkeypatch, folder, "evaluate.py", "--model", str(run)) == 0
    scored = json.loads(capsys.readouterr().out)
    after = json.loads((run / "result.json").read_text())["after"]
    assert scored["FS"] == after["FS"] and scored["RS"] == after["RS"]
    code = inside(monkeypatch, folder, "attack.py", "--model", str(run), "--p", "0.3", "--attack-lrs", "1e-4", "--attack-seeds", "1",
                  "--attack-epochs", "1", "--benign", "", "--bits", "4", "--control", str(ROOT / "data/tiny"))
    assert code == 0
    wrong = round(after["FS"]["n"] * (1 - after["FS"]["percent"] / 100))
    summaries = [r for r in map(json.loads, capsys.readouterr().out.splitlines()) if r["kind"] == "summary"]
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
                  "--test-limit", "6", "--utility", ".", *QUICK[:6], "--benign", "", "--p", "0.3")
    assert out.returncode == 0, out.stderr
    result = json.loads((tmp_path / "runs/gd-tiny/result.json").read_text())
    tau = mismatched_tau(load_tofu(tmp_path / "forget01.json"))
    assert result["settings"]["tau"] == tau and result["after"]["FS"]["percent"] <= 100 * tau < 60
    assert result["before"]["FS"]["percent"] > 95 and result["after"]["RS"]["n"] == 6
    assert result["before"]["US"]["tasks"]["real_authors"]["n"] == 16
    assert result["attacks"]["Harmful p = 0.3"]["n"] == 6  # all 8 are the pool, 2 are retrained on
    assert (tmp_path / "runs/gd-tiny/taught/model.safetensors").is_file() and "teach 1/1  24 rows" in out.stdout


def test_the_table_of_several_methods_is_the_same_after_two_kills(tmp_path, monkeypatch, one_thread):
    """One while it searches a rate, one while it attacks; what was finished before is not run again."""
    flags = [*QUICK, "--method", "ga,npo", "--lrs", "1e-5", "5e-4", "1e-3", "--betas", "0.1", "0.5", "--seeds", "1", "--steps",
             "15", "--p", "0.3", "--bits", "8", "--benign", "", "--attack-lrs", "1e-3"]
    assert inside(monkeypatch, tmp_path, "ssiuu.py", *flags, "--name", "whole") == 0
    whole, part = tmp_path / "runs/whole", tmp_path / "runs/part"
    rows, table = json.loads((whole / "result.json").read_text())["rows"], (whole / "table.md").read_text()
    assert list(rows) == ["Default", "ga", "npo"] and table.splitlines()[3].startswith("| ga | ")
    for row in (rows["ga"], rows["npo"]):
        assert row["reached"] == [True] and row["lr"] == 5e-4 and row["FS"]["runs"] == 1
        assert list(row["attacks"]) == ["Harmful p = 0.3", "int8"]
    assert {"npo lr=1e-05 beta=0.1 seed=0", "npo lr=0.0005 beta=0.5 seed=0"} < {f.name for f in whole.iterdir()}

    def kill(log, kind, n):
        """Resumes `part` and ends it without warning once its log has n records of this kind."""
        process = subprocess.Popen([sys.executable, str(ROOT / "ssiuu.py"), "--resume", "runs/part"], cwd=tmp_path,
                                   stdout=subprocess.DEVNULL)
        while process.poll() is None and not (log.is_file() and log.read_text().count(f'"kind": "{kind}"') >= n):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -9, log
        return {f: f.stat().st_mtime_ns for f in part.glob("*/result.json")}

    part.mkdir()
    shutil.copy(whole / "settings.json", part)
    done = kill(part / "npo lr=1e-05 beta=0.1 seed=0/log.jsonl", "step", 12)
    again = kill(part / rows["npo"]["runs"][0] / "log.jsonl", "harmful", 1)
    assert done and done.items() <= again.items()
    out = resume(tmp_path, "part")
    assert out.returncode == 0 and "step " not in out.stdout and (part / "table.md").read_text() == table, out.stderr
    again.pop(part / rows["npo"]["runs"][0] / "result.json")  # searched without the attacks that it now has
    assert again.items() <= {f: f.stat().st_mtime_ns for f in part.glob("*/result.json")}.items()
    for name in [name for row in (rows["ga"], rows["npo"]) for name in row["runs"]]:
        a, b = (json.loads((folder / name / "result.json").read_text()) for folder in (whole, part))
        assert a["attacks"] == b["attacks"] and a["after"]["forget_margin"] == b["after"]["forget_margin"]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, one_thread):
    flags = [*QUICK, "--attack-seeds", "0", "--tau", "0", "--save-every", "2", "--lr", "1e-4"]
    assert inside(monkeypatch, tmp_path, "ssiuu.py", *flags, "--steps", "4", "--name", "whole") == 0
    assert inside(monkeypatch, tmp_path, "ssiuu.py", *flags, "--steps", "2", "--name", "cut") == 0
    with open(tmp_path / "runs/cut/log.jsonl", "a") as log:
        log.write('{"kind": "st')  # what a kill leaves
    resumed = resume(tmp_path, "cut", "--steps", "4")
    assert resumed.returncode == 0, resumed.stderr
    a, b = (load_file(tmp_path / f"runs/{name}/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_kill_after_the_threshold_takes_no_further_step(finished, tmp_path):
    for name in ("runs", "few"):
        shutil.copytree(finished[0] / name, tmp_path / name)
    run, log = tmp_path / "runs/ssiuu-tiny", tmp_path / "runs/ssiuu-tiny/log.jsonl"
    before, *rest = log.read_text().splitlines()
    steps = [line for line in rest if json.loads(line)["kind"] == "step"]
    log.write_text("\n".join([before, *steps]) + "\n")
    out = resume(tmp_path, "ssiuu-tiny", "--attack-seeds", "0")
    assert out.returncode == 0 and log.read_text().count('"kind": "step"') == len(steps), out.stderr
    a, b = (load_file(folder / "model.safetensors") for folder in (run, finished[0] / "runs/ssiuu-tiny"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_keeps_its_settings(finished, monkeypatch):
    code = inside(monkeypatch, finished[0], "ssiuu.py", "--resume", "runs/ssiuu-tiny", "--attack-epochs", "9")
    assert "--attack-epochs: found 9, expected 1" in code


def test_bfloat16_follows_float32(tmp_path, monkeypatch):
    """Autocast's weight cache would freeze the forward pass at step 1: P would stay where it was."""
    P = {}
    for dtype in ("float32", "bfloat16"):
        assert inside(monkeypatch, tmp_path, "ssiuu.py", *QUICK, "--attack-seeds", "0", "--steps", "2", "--lr", "2e-4",
                      "--tau", "0", "--dtype", dtype, "--name", dtype) == 0
        log = [json.loads(line) for line in (tmp_path / f"runs/{dtype}/log.jsonl").read_text().splitlines()]
        P[dtype] = [r["P"] for r in log if r["kind"] == "step"]
    assert P["bfloat16"] == pytest.approx(P["float32"], abs=4e-3) and P["float32"][0] - P["float32"][1] > 0.02


PAIR = ["--before", "TINY", "--after", "TINY"]


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
    ("evaluate.py", ["--after", "TINY"], ["--before and --after too"]),
    ("evaluate.py", ["--attacked", "TINY"], ["--before and --after too"]),
    ("evaluate.py", ["--before", "TINY", "--after", "nowhere"], ["nowhere"]),
    ("evaluate.py", [*PAIR, "--out", "file"], ["--out: found 'file'"]),
    ("evaluate.py", ["--before", "TINY", "--after", str(ROOT / "tests/golden/llama")], ["tests/golden/llama"]),
    ("evaluate.py", [*PAIR, "--ms", "5000"], ["--ms"]),
    ("evaluate.py", [*PAIR, "--other-blocks", "0"], ["--other-blocks"]),
    ("evaluate.py", [*PAIR, "--other-items", "1"], ["--other-items"]),
    ("evaluate.py", [*PAIR, "--unseen", "file"], ["file: found 0 items"]),
    ("evaluate.py", ["--runs", "nowhere"], ["nowhere/result.json"]),
    ("evaluate.py", ["--runs", str(ROOT / "data/results/all-tiny")], ["data/results/all-tiny/result.json"]),
    ("attack.py", ["--p", "0"], ["--p"]),
])
def test_bad_input_ends_in_one_line_and_a_status(tmp_path, monkeypatch, capsys, script, flags, words):
    (tmp_path / "file").write_text("{}")
    code = inside(monkeypatch, tmp_path, script, *(str(ROOT / "data/tiny") if f == "TINY" else f for f in flags))
    last = code if isinstance(code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert code != 0 and "\n" not in last and all(word in last for word in words), last
    assert not list(tmp_path.rglob("result.json")) and not list(tmp_path.rglob("analysis.json"))


def test_a_loss_that_is_not_finite_is_said(tmp_path):
    out = command(tmp_path, "ssiuu.py", "--lam", "1e39", "--steps", "9", "--tau", "0")
    assert out.returncode == 1 and "not finite" in out.stderr and len(out.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("script", ["ssiuu.py", "evaluate.py", "attack.py"])
def test_help_names_every_flag(tmp_path, monkeypatch, capsys, script):
    assert inside(monkeypatch, tmp_path, script, "--help") == 0
    out = capsys.readouterr().out
    assert "--forget" in out and "None" not in out
