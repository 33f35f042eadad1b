"""The README's code, table and numbers are true."""
import json
import re
import sys
import types
from pathlib import Path

import torch

from model import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_paste_snippet_runs(monkeypatch):
    """On our decoder behind the two Hugging Face names it uses, so that transformers need not be installed."""
    model, tokenizer = load(ROOT / "data/tiny")
    model.register_forward_hook(lambda module, args, logits: types.SimpleNamespace(logits=logits))
    maker = types.SimpleNamespace(from_pretrained=lambda path, attn_implementation: model)
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoModelForCausalLM=maker))
    ids = torch.tensor([tokenizer.prompt("Which country is Isaac Newton from?") + tokenizer.answer("England")])
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, -len(tokenizer.answer("England")):] = True
    space = {"path": "anywhere", "ids": ids, "answer": answer}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], space)
    assert all(torch.isfinite(e).all() for e in space["extra"]) and sum(e.abs().sum() for e in space["extra"]) > 0
    known = load(ROOT / "data/tiny")[0](ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[answer[0, 1:]].sum()
    assert space["logprob"](ids, answer).item() < known.item() - 1e-4  # ascent took some of the answer away


def test_every_line_of_the_paper_to_code_table_is_right():
    rows = re.findall(r"`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(rows) >= 12
    for name, file, line in rows:
        assert re.match(rf"\s*(def|class) {name}\b", (ROOT / file).read_text().splitlines()[int(line) - 1]), (name, line)


def test_the_result_rows_are_the_committed_results():
    from ssiuu import cell, table
    results = list((ROOT / "data/results").glob("*/result.json"))
    assert results
    for file in results:
        result = json.loads(file.read_text())
        if "rows" in result:
            assert all(row in README for row in table(result["rows"]).split("\n")), file
            continue
        for x in (result["after"]["FS"], result["after"]["RS"], *(result.get("attacks") or result["harmful"]).values()):
            assert cell(x) in README, (file, cell(x))
    for file in (ROOT / "data/results/draws-smollm2").iterdir():  # GD, SSIUU and the controls
        for x in map(json.loads, file.read_text().splitlines()):
            if x["kind"] == "summary" and x["attack"].startswith("Harmful"):
                assert f"{x['percent']:.1f}" in README, (file, x)


def test_sizes_that_were_promised():
    assert len(README.splitlines()) < 230
    modules = ["ssiuu.py", "model.py", "data.py", "evaluate.py", "attack.py"]
    assert sum(len((ROOT / m).read_text().splitlines()) for m in modules) < 2600
    assert sum(f.stat().st_size for f in (ROOT / "data/tiny").iterdir()) < 10_000_000


def test_the_findings_are_the_committed_analyses():
    """The numbers of the findings' table, from each run's analysis.json and from the sweeps' runs.json."""
    def triple(x):
        return "{:.2g} [{:.2g}, {:.2g}]".format(*x)

    def score(x):
        return f"{x['percent']:.0f} [{x['low']:.0f}, {x['high']:.0f}]"

    def each(text):
        return ", ".join(f"{name} {text(a)}" for name, a in zip(("GD", "NPO", "SSIUU"), found))

    def silenced(i, m):
        x = next(x for x in found[i]["causal"] if x["m"] == m)
        return f"{found[i]['checkpoints']['after']['margin']:.2f} to {x['margin']:.2f} ({x['random_margin']:.2f})"

    table = {line.split("|")[1].strip(): line.split("|")[2:4] for line in README.split("\n") if line.count("|") == 4}
    for column, folder in enumerate(("all-tiny", "all-smollm2")):
        found = [json.loads(next((ROOT / "data/results" / folder).glob(f"{method} *seed=0/analysis.json")).read_text())
                 for method in ("gd", "npo", "ssiuu")]
        for claim, numbers in {
                "Unlearning hides": [each(lambda a: f"{triple(a['variation']['neuron']['D_neg'])} and "
                                          f"{triple(a['variation']['neuron']['D_pos'])}")],
                "Do other attributions agree?": [
                    f"{name}: " + each(lambda a, kind=kind: triple(a["attributions"]["D"][kind]["share"])) for name, kind
                    in (("Eq. 1", "Eq. 1"), ("ablation", "ablation"), ("integrated gradients", "integrated"))],
                "Spurious neurons": [silenced(*which) for which in ((2, 300), (0, 30), (1, 30)) if column],
                "GD over-unlearns": [each(lambda a: score(a["checkpoints"]["after"]["lens"][-1]))],
                "SSIUU's attribution": [each(lambda a: triple(a["correlation"]["after attacked"]["min"]))],
                "Does it move?": [each(lambda a: "{:.2g} and {:.2g}".format(
                    *(a["variation"][level]["D_neg"][0] for level in ("head", "module"))))],
                "Membership": [each(lambda a: score(a["checkpoints"]["after"]["membership"]["loss"]))]}.items():
            cell = next(columns[column] for row, columns in table.items() if row.startswith(claim))
            assert all(n in cell for n in numbers), (folder, numbers, cell)
    for column, (folder, names) in enumerate((("lam-tiny", ("gd-5e-05", "lam-0.001", "lam-0.01", "lam-0.1", "lam-1")),
                                              ("lam-smollm2", ("gd", "lam-0.0001", "lam-0.001", "lam-0.01")))):
        rows = {Path(k).name: row for k, row in json.loads((ROOT / f"data/results/{folder}/runs.json").read_text())["rows"].items()}
        cell = next(columns[column] for row, columns in table.items() if row.startswith("... and so the recovery"))
        assert ", ".join(f"{rows[name]['Harmful p = 0.3']:.1f}" for name in names) in cell
        cell = next(columns[column] for row, columns in table.items() if row.startswith("The Hessian"))
        assert f"{rows['first-order' if column == 0 else 'lam-0.01']['first_order_cos']:.2f}" in cell
