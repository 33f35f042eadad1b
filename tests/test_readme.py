"""The READMEs' code, links, line references and table rows are true."""
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "data/results"))

import tables  # noqa: E402
from model import load  # noqa: E402

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "data/results/README.md", "data/tiny/README.md"]
RESULTS = ROOT / "data/results"
ATTACKS = ("Harmful p = 0.1", "Harmful p = 0.3", "Benign")


def wrong_lines(page):
    """[(name, file, line as written, line where it is defined)] of the references that are off."""
    wrong = []
    for name, link, line in re.findall(r"\[`(\w+)`\]\(([^)#]+)#L(\d+)\)", (ROOT / page).read_text()):
        source = ((ROOT / page).parent / link).read_text().splitlines()
        right = [i for i, text in enumerate(source, 1) if re.match(rf"\s*(def|class) {name}\b", text)]
        if int(line) not in right:
            wrong.append((name, link, line, right[0] if right else None))
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_line_references_are_right(page):
    """What fails is put right by the command in the message."""
    wrong = wrong_lines(page)
    edits = " ".join(f"-e 's|`{name}`\\](\\({link}\\)#L{line})|`{name}`](\\1#L{right})|'"
                     for name, link, line, right in wrong if right)
    gone = [name for name, _, _, right in wrong if right is None]
    assert not wrong, f"not defined there: {gone}; the others: sed -i {edits} {page}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("http", "#")):
            file = target.partition("#")[0].replace("%20", " ")
            assert ((ROOT / page).parent / file).exists(), (page, target)


def test_the_code_beside_algorithm_1_is_in_the_source():
    """Each piece between the dots of an abridged line."""
    source = (ROOT / "ssiuu.py").read_text()
    table = README[README.index("## Algorithm 1"):README.index("## Paste it")]
    pieces = [piece for line in table.splitlines() if line.startswith("| ") and "`" in line
              for code in re.findall(r"`([^`]+)`", line.rpartition(" | ")[2]) for piece in code.split("...")]
    assert len(pieces) > 11
    for piece in pieces:
        assert piece.replace("\\|", "|") in source, piece


def test_the_paste_snippet_runs(monkeypatch):
    """On our decoder behind the two Hugging Face names it uses: transformers need not be installed."""
    model, tokenizer = load(ROOT / "data/tiny")
    model.register_forward_hook(lambda module, args, logits: types.SimpleNamespace(logits=logits))
    maker = types.SimpleNamespace(from_pretrained=lambda path, dtype, attn_implementation: model)
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoModelForCausalLM=maker))

    def encoded(question, text):
        ids = torch.tensor([tokenizer.prompt(question) + tokenizer.answer(text)])
        return ids, torch.arange(ids.shape[1])[None] >= ids.shape[1] - len(tokenizer.answer(text))

    space = {"path": "anywhere", "forget": encoded("Which country is Isaac Newton from?", "England"),
             "retain": encoded("Which country is Marie Curie from?", "Poland")}
    diff = re.search(r"```diff\n(.*?)```", README, re.S)[1].splitlines()
    before, after = ("\n".join(line[1:] for line in diff if not line.startswith(sign)) for sign in "+-")
    compile(before, "before", "exec")
    exec(after.replace("lr=1e-5", "lr=1e-4"), space)  # three steps are to show
    assert sum(w.abs().sum() for w in space["w"]) > 0  # the penalty took part
    original, (ids, answer) = load(ROOT / "data/tiny")[0], space["forget"]
    known = original(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[answer[0, 1:]].sum()
    assert space["logprob"](ids, answer).item() < known.item() - 1e-4  # ascent took some of the answer away


def test_the_row_is_the_committed_one():
    from evaluate import cell
    result = json.loads((RESULTS / "ssiuu-tiny/result.json").read_text())
    own = json.loads((ROOT / "data/tiny/unlearn.json").read_text())["ssiuu.py"]
    assert own == {key: result["settings"][key] for key in own}  # what the command would use today
    scores = [result["after"]["FS"], result["after"]["RS"], None]
    attacks = [result["attacks"][key] for key in ATTACKS]
    assert "| ssiuu | " + " | ".join(cell(x) for x in scores + attacks) + " |" in README


TABLES = {file.parent.name: json.loads(file.read_text()) for file in RESULTS.glob("*/table.json")}
TABLE = TABLES["tiny"]


def test_the_tables_are_made_of_the_committed_runs():
    assert TABLES.keys() >= {"tiny-fold0", "tiny", "tiny-beyond"}
    for name, table in TABLES.items():
        assert tables.summarise(tables.read_runs(name)) == table


def test_the_small_table_is_the_committed_one():
    seen, part = set(), README[README.index("## Over forget sets"):]
    for line in part[:part.index("\n## ")].splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name in TABLE["rows"]:
            row = TABLE["rows"][name]
            assert cells == [tables.shown(row[key], 10) for key in ("RS", "Harmful p = 0.3")], name
            seen.add(name)
    assert seen >= {"never taught", "gd", "npo", "ssiuu previous 0.3", "ssiuu initial 0.03"}


def printable(table, minus):
    """What `tables.show` can print of this table."""
    rows = table["rows"].values()
    there = minus is None or any(f"minus {minus}" in row for row in rows)
    return [key for row in rows for key in row] if there else []


def test_the_tables_of_the_results_are_the_committed_ones():
    """Each table on the page is what `tables.py TABLE --print` prints of some table, with some columns."""
    page, seen = (RESULTS / "README.md").read_text(), 0
    for lines in re.findall(r"((?:^\|.*\|\n)+)", page, re.M):
        head = [cell.strip() for cell in lines.splitlines()[0].strip("|").split("|")]
        if head[0] == "row" or head[0].startswith("minus "):
            minus = head[0].removeprefix("minus ").removesuffix(", paired") if head[0] != "row" else None
            able = [table for table in TABLES.values() if set(head[2:]) <= {*printable(table, minus)}]
            assert any(lines.strip() in tables.show(x, head[2:], minus).split("\n\n") for x in able), head
            seen += 1
    assert seen > 3


def test_each_number_of_the_findings_is_in_the_table():
    """A mean with its interval, like -15.2 [-21.5, -8.9], in the pages' text is some cell of table.json."""
    cells = [x for table in TABLES.values() for row in table["rows"].values() for key, value in row.items()
             for x in (value.values() if key.startswith("minus ") else [value])] + [*TABLE["rank"].values()]
    shown = {f"{x[key]:.{digits}f} [{x['low']:.{digits}f}, {x['high']:.{digits}f}]" for x in cells
             for key in ["mean"] for digits in (0, 1, 2, 3) if x["low"] is not None}
    found = (RESULTS / "README.md").read_text()
    claims = found[found.index("## The paper's claims"):found.index("## Does the measure")]
    assert claims.count("\n| ") > 10
    for page in (README, found):
        text = claims + "\n".join(line for line in page.splitlines() if not line.startswith("| "))
        for number in re.findall(r"-?\d+(?:\.\d+)? \[-?[\d.]+, -?[\d.]+\]", text):
            assert number in shown, number


def test_each_verdict_follows_from_its_interval():
    """Cells of `row less row`; the arrow of a column is the sign that a claim wants of the difference."""
    page, seen = (RESULTS / "README.md").read_text(), ""
    for line in page[page.index("## The paper's claims"):page.index("## Does the measure")].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "less" in cells:
            first, columns = cells.index("less") + 1, [cell.split(" ") for cell in cells]
        elif line.startswith("| ") and cells[0] != "---":
            row, other = cells[first - 2:first]
            for (*column, arrow), cell in zip(columns[first:], cells[first:], strict=True):
                x = TABLE["rows"][row][f"minus {other}"][" ".join(column)]
                found = "✓" if (x["mean"] > 0) == (arrow == "↑") else "✗"
                verdict = "·" if x["low"] <= 0 <= x["high"] else found
                assert cell == f"{tables.shown(x, 10)} {verdict}", line
                seen += verdict
    assert min(seen.count(verdict) for verdict in "✓✗·") > 3


def test_sizes_that_were_promised():
    assert len(README.split()) <= 1600
    assert max(len(line) for line in README.splitlines()) <= 160
    assert sum(f.stat().st_size for f in (ROOT / "data/tiny").iterdir()) < 10_000_000
