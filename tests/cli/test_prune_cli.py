"""`fusiontree plan`, `export` and `heal`: from a run to a smaller model, and what they say of what cannot be done."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from test_report_cli import Page

import fusiontree
import warm
from fusiontree.artifacts import HealReport, LayerDecision, PrunePlan, RunManifest
from fusiontree.cli import main
from fusiontree.deploy import reference_parent
from fusiontree.train.settings import load_run_settings
from tiny_models import save_tiny_model

WHOLE = ["--no-heads", "--freeze-gates", "0"]  # branches alone
QUICK = ["--context", "64", "--rounds", "1", "--tokens", "2000", "--length", "48", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(run_settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("prune") / "run"
    model = {"num_layers": 3}
    fusiontree.train(run_settings(model=model, training={"max_steps": 12, "save_interval": 0}, output_dir=str(run)))
    return run


@pytest.fixture(scope="module")
def plan(run: Path, corpus: Path) -> Path:
    file = run.parent / "plan.json"
    wanted = ["--target", "parameters=0.9x", "--target", "memory=0.85x"]
    arguments = ["plan", str(run), "--data", str(corpus / "train.jsonl"), *wanted, *WHOLE, *QUICK, "--out", str(file)]
    assert main(arguments) == 0
    return file


def table_rows(shown: str) -> list[list[str]]:
    """The cells of a drawn plan, of which a reason may go on in the next row."""
    rows: list[list[str]] = []
    for line in shown.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if len(cells) == 9 and any(cells[:8]):
            rows.append(cells)
        elif len(cells) == 9:
            rows[-1][8] += f" {cells[8]}"
    return rows


def test_a_plan_meets_its_budget_and_says_so(plan: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = PrunePlan.load(plan)
    assert made.targets == {"parameters": 0.9, "memory": 0.85}
    assert made.expected["parameters"] <= 0.9 and made.expected["memory"] <= 0.85
    assert made.expected["loss"] - made.expected["parent_loss"] == pytest.approx(made.expected["loss_increase"])
    cut = [index for index, kind in enumerate(made.layer_branches) if kind != "both"]
    assert sorted(step.layer for step in made.steps) == cut
    assert all((layer.constant is not None) == (index in cut) for index, layer in enumerate(made.layers))
    capsys.readouterr()
    assert main(["plan", str(plan), "--show"]) == 0
    shown = capsys.readouterr().out
    for index in cut:
        assert made.layers[index].reason in shown
    assert f"{made.layers[0].evidence['gate_mean']:.3f}" in shown
    assert f"{made.layers[1].evidence['attention_ablation']:+.4f}" in shown


def test_an_export_is_a_model_like_any_other(
    plan: Path, run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cut"
    assert main(["export", str(run), str(plan), str(out), "--context", "64", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    made, parent, cut = PrunePlan.load(plan), fusiontree.load(run, device="cpu"), fusiontree.load(out, device="cpu")
    before, after = (sum(p.numel() for p in model.parameters()) for model in (parent, cut))
    assert f"{before:,} -> {after:,} parameters" in shown
    assert after / before == pytest.approx(made.expected["parameters"])
    ids = torch.arange(40)[None] + 3
    with torch.no_grad():
        want, got = reference_parent(parent, made)(ids).logits, cut(ids).logits
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
    assert RunManifest.load(out / "manifest.json").parent_run == str(run / "checkpoints" / "step_00000012")
    card = (out / "README.md").read_text()
    assert f"| parameters | {before:,} | {after:,} |" in card and "one token after them" in card
    assert main(["eval", str(out), "--data", str(corpus / "eval.jsonl"), "--device", "cpu"]) == 0
    assert main(["generate", str(out), "--prompt", "the", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    # A cut model can be planned for and cut again.
    again = tmp_path / "again.json"
    files = ["--data", str(corpus / "train.jsonl"), "--out", str(again)]
    assert main(["plan", str(out), *files, "--target", "max_loss_increase=9", "--empty-layers", *WHOLE, *QUICK]) == 0
    assert main(["export", str(out), str(again), str(tmp_path / "cut2"), "--context", "0", "--device", "cpu"]) == 0
    assert set(fusiontree.load(tmp_path / "cut2", device="cpu").config.layer_branches) == {"constant"}
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "cut2"), "-o", str(page)]) == 0
    assert "What was pruned" in Page(page).text and "Was pruned by ablation: 3 constant." in Page(page).text
    assert main(["report", str(run), str(tmp_path / "cut2"), "-o", str(page)]) == 0
    assert "What was and what would be pruned" in Page(page).text and "Would be pruned by gate" in Page(page).text


def test_an_export_in_another_type_is_of_the_model_as_it_was_saved(plan: Path, run: Path, tmp_path: Path) -> None:
    quick = ["--context", "0", "--device", "cpu"]
    assert main(["export", str(run), str(plan), str(tmp_path / "wide"), *quick]) == 0
    assert main(["export", str(run), str(plan), str(tmp_path / "narrow"), "--dtype", "bfloat16", *quick]) == 0
    wide, narrow = (fusiontree.load(tmp_path / name, device="cpu") for name in ("wide", "narrow"))
    assert narrow.dtype == torch.bfloat16 and narrow.layers[0].mamba.A_log.dtype == torch.float32
    rounded = wide.to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in narrow.state_dict().items())


def test_a_plan_for_a_rounded_model_is_carried_out_on_it(run: Path, corpus: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "cut"
    given = ["--data", str(corpus / "train.jsonl"), "--target", "parameters=0.9x", "--out", str(file), *QUICK]
    assert main(["plan", str(run), *given, "--dtype", "bfloat16"]) == 0
    assert main(["export", str(run), str(file), str(out), "--context", "0", "--device", "cpu"]) == 0
    assert fusiontree.load(out, device="cpu").dtype == torch.bfloat16


def test_heads_are_cut_and_told(run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "heads.json", tmp_path / "cut"
    wanted = ["--target", "max_loss_increase=0.01", "--show"]  # heads are the default
    assert main(["plan", str(run), "--data", str(corpus / "train.jsonl"), *wanted, *QUICK, "--out", str(file)]) == 0
    made = PrunePlan.load(file)
    heads = sum(layer.num_heads_removed for layer in made.layers)
    rows = table_rows(capsys.readouterr().out)
    begins = [number for number, row in enumerate(rows) if row[0]] + [len(rows)]
    assert heads
    for index, layer in enumerate(made.layers):
        below = rows[begins[index] + 1 : begins[index + 1]]
        assert any(
            row[2] == "mamba heads" and row[3] == f"{layer.evidence['mamba_heads_ablation']:+.4f}" for row in below
        )
        for column, branch in ((2, "mamba"), (5, "attention")):
            assert rows[begins[index]][column] == ("kept" if layer.keep in ("both", branch) else "cut")
            taken = [row[column] for row in below if row[column].startswith("−")]
            removed = layer.heads.get(branch, [])
            assert taken == ([f"−{len(removed)} heads"] if removed else [])
    assert main(["export", str(run), str(file), str(out), "--context", "0", "--device", "cpu"]) == 0
    assert f"{heads} single heads cut" in capsys.readouterr().out
    assert "heads" in (out / "README.md").read_text()
    parent, cut = fusiontree.load(run, device="cpu"), fusiontree.load(out, device="cpu")
    ids = torch.arange(40)[None] + 3
    with torch.no_grad():
        want, got = reference_parent(parent, made)(ids).logits, cut(ids).logits
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
    before, after = (sum(p.numel() for p in model.parameters()) for model in (parent, cut))
    assert after / before == pytest.approx(made.expected["parameters"])
    assert main(["generate", str(out), "--prompt", "the", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert main(["heal", str(out), "training.max_steps=2", f"output_dir={tmp_path / 'healed'}"]) == 0
    assert fusiontree.load(tmp_path / "healed", device="cpu").config.layer_heads == cut.config.layer_heads


def test_gates_are_frozen_on_request(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "frozen.json", tmp_path / "cut"
    wanted = ["--target", "max_loss_increase=9", "--freeze-gates", "9", "--criterion", "random", "--show"]
    assert main(["plan", str(run), "--data", str(corpus / "train.jsonl"), *wanted, *QUICK, "--out", str(file)]) == 0
    made, rows = PrunePlan.load(file), table_rows(capsys.readouterr().out)
    assert all(layer.gate is not None for layer in made.layers)
    assert [row[1] for row in rows] == [f"{layer.evidence['gate_mean']:.3f} frozen" for layer in made.layers]
    assert main(["export", str(run), str(file), str(out), "--context", "0", "--device", "cpu"]) == 0
    assert fusiontree.load(out, device="cpu").config.layer_gates == [False] * 3


@pytest.mark.parametrize(("mlp", "merges"), [("residual", ["hz", "hz"]), ("aligned", ["z", "hz"])])
def test_maps_are_merged_on_request(
    tmp_path: Path, mlp: str, merges: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"layer_branches": ["mamba", "attention"], "layer_gates": [False, False], "mlp": mlp}
    folder, file, out = save_tiny_model(tmp_path / "model", None, **fields), tmp_path / "plan.json", tmp_path / "merged"
    layers = [LayerDecision(keep=kind, reason="as it is") for kind in fields["layer_branches"]]
    PrunePlan(criterion="none", thresholds={}, source="test", layers=layers).save(file)
    assert main(["export", str(folder), str(file), str(out), "--merge", "--context", "0", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "maps merged in 2" in shown and "has no fingerprint" in shown
    assert "linear maps are merged in layers 0, 1" in (out / "README.md").read_text()
    before, after = (fusiontree.load(path, device="cpu") for path in (folder, out))
    assert after.config.layer_merges == merges
    ids = torch.arange(40)[None]
    with torch.no_grad():
        want, got = before(ids).logits, after(ids).logits
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize(
    ("dtype", "precision", "code"), [("float32", "highest", 2), ("float32", "high", 0), ("bfloat16", "highest", 0)]
)
def test_an_export_that_is_not_what_the_plan_says_is_not_written(
    tmp_path: Path, dtype: str, precision: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, out = (
        save_tiny_model(tmp_path / "model", None, mlp="aligned"),
        tmp_path / "plan.json",
        tmp_path / "cut",
    )
    # What is divided by such a gate, to be read by z, grows past what float32 holds; with less precise products no
    # equality is promised.
    layers = [LayerDecision(keep="both", reason="by hand", gate=[1e-42] * 32), LayerDecision(keep="both", reason="-")]
    PrunePlan(criterion="none", thresholds={}, source="test", layers=layers, measured={"dtype": dtype}).save(file)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert main(["export", str(folder), str(file), str(out), "--context", "0", "--device", "cpu"]) == code
    finally:
        torch.set_float32_matmul_precision(before)
    assert out.exists() == (code == 0)
    assert ("too extreme to be folded" in capsys.readouterr().err) == (code == 2)


def test_healing_starts_from_the_export_and_reports(
    plan: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), str(plan), "cut", "--context", "64", "--device", "cpu"]) == 0
    assert main(["heal", "cut", "training.max_steps=8", "loss.hidden_coeff=0.5"]) == 0
    shown = capsys.readouterr().out
    healed = tmp_path / "runs" / "cut-healed"
    report = HealReport.load(healed / "heal_report.json")
    rows = [json.loads(line) for line in (healed / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert losses[0] == pytest.approx(report.export_loss, abs=1e-6)  # it starts from the export's weights
    assert losses[8] == pytest.approx(report.healed_loss, abs=1e-6)
    assert report.tokens == 8 * 2 * 2 * 24 and f"after {report.tokens} tokens" in shown
    assert any(row.get("distillation_loss", 0) > 0 for row in rows)
    assert all(row["hidden_loss"] > 0 for row in rows if "lm_loss" in row)
    cut, result = fusiontree.load("cut", device="cpu"), fusiontree.load(healed, device="cpu")
    assert result.config.layer_branches == cut.config.layer_branches
    assert not torch.equal(result.lm_head.weight, cut.lm_head.weight)
    assert RunManifest.load(healed / "manifest.json").parent_run == str(tmp_path / "cut")
    # A teacher that is not the parent is told.
    for teacher, is_told in ((run, False), (healed, True)):
        assert main(["heal", "cut", "--parent", str(teacher), "training.max_steps=1", "output_dir=other"]) == 0
        assert ("is not what cut was cut from" in capsys.readouterr().err) == is_told
        shutil.rmtree("other")
    # Side by side: what each of the three is, loses, weighs and remembers.
    assert main(["report", str(run), "cut", str(healed), "-o", "page.html"]) == 0
    page = Page(tmp_path / "page.html")
    assert page.rows["is"] == ["parent", "cut from run by ablation", "healed from cut"]
    wanted = [report.parent_loss, report.export_loss, report.healed_loss]
    assert page.rows["loss when healed"] == [f"{loss:.4f}" for loss in wanted]
    costs = RunManifest.load(tmp_path / "cut" / "manifest.json").config["costs"]
    # What healed has the export's size and speed.
    measured = ("parent", "export", "export")
    assert page.rows["state, kB"] == [f"{costs[name]['state_bytes'] / 1e3:,.1f}" for name in measured]
    before, after = (1 / costs[name]["decode_seconds"] for name in ("parent", "export"))
    assert page.rows["decoding, tokens/s"] == [f"{before:,.1f}", *[f"{after:,.1f} ({after / before:.2f}x)"] * 2]
    counts = [sum(p.numel() for p in fusiontree.load(one, device="cpu").parameters()) for one in (run, "cut", healed)]
    assert page.rows["parameters"] == [f"{count:,}" for count in counts]


def test_healing_takes_a_tenth_of_the_parents_steps_unless_told_otherwise(
    run_settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    training = {"max_steps": 40, "learning_rate": 1e-2, "save_interval": 0, "eval_interval": 40, "eval_batches": 1}
    fusiontree.train(run_settings(training=training, output_dir="run"))
    layers = [LayerDecision(keep="attention", reason="by hand"), LayerDecision(keep="both", reason="by hand")]
    PrunePlan(criterion="none", thresholds={}, source="test", layers=layers).save("plan.json")
    assert main(["export", "run", "plan.json", "cut", "--context", "0", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["heal", "cut"]) == 0
    shown, healed = capsys.readouterr().out, tmp_path / "runs" / "cut-healed"
    settings = load_run_settings(healed / "config.yaml", [])
    assert settings.training.max_steps == 4 and settings.training.init_from == str(tmp_path / "cut")
    assert settings.training.learning_rate == pytest.approx(3e-3)
    assert settings.loss.teacher == str(tmp_path / "run/checkpoints/step_00000040")
    assert settings.loss.distillation_coeff == 1
    report = HealReport.load(healed / "heal_report.json")
    assert report.steps == 4 and report.parent == settings.loss.teacher
    assert report.parent_loss < report.healed_loss < report.export_loss
    share = (report.export_loss - report.healed_loss) / (report.export_loss - report.parent_loss)
    assert report.recovered == pytest.approx(share) and f"({100 * share:.0f} % recovered)" in shown
    card = (healed / "latest" / "README.md").read_text()
    assert "of distillation from `run/checkpoints/step_00000040`" in card
    before = (tmp_path / "cut" / "README.md").read_text()
    of_the_export = before.replace("# cut, a pruned", "# cut-healed, a healed cut, a pruned")
    assert card.startswith(of_the_export.replace('fusiontree.load("cut")', 'fusiontree.load("cut-healed")'))
    assert 'fusiontree.load("cut-healed")' in card and f": {100 * share:.0f} % recovered." in card
    for name in ("parent", "export", "healed"):
        assert f"| {name} | {getattr(report, f'{name}_loss'):.4f} |" in card
    # Further than asked for at first: as a run of that length from the start.
    assert main(["heal", "cut", "training.max_steps=6", "--resume", "auto"]) == 0
    steps = [json.loads(line) for line in (healed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "lm_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert HealReport.load(healed / "heal_report.json").steps == 6


def test_what_is_ended_leaves_nothing_half_written_and_says_how_to_go_on(plan: Path, run: Path, tmp_path: Path) -> None:
    def ended(*arguments: object, when: str) -> tuple[int, str]:
        command = [warm.python(), "-m", "fusiontree", *map(str, arguments)]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not list(tmp_path.glob(when)) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=120)
        return process.returncode, shown

    code, shown = ended("export", run, plan, "cut", "--context", "64", "--device", "cpu", when=".cut.*")
    assert code in (0, 130) and not list(tmp_path.glob(".cut.*"))
    assert (tmp_path / "cut").exists() == (code == 0)
    if code:
        assert shown == "interrupted\n"
        assert main(["export", str(run), str(plan), str(tmp_path / "cut"), "--context", "0", "--device", "cpu"]) == 0
    # The command that goes on is the one that reports.
    arguments = ["cut", "training.max_steps=400", "logging.progress=plain", "output_dir=healed"]
    code, shown = ended("heal", *arguments, when="healed/metrics.jsonl")
    assert code == 143 and f"go on with: fusiontree heal {' '.join(arguments)} --resume auto" in shown


def test_thresholds_read_what_the_run_recorded(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(run), "--criterion", "gate", "--data", str(corpus / "train.jsonl"), *QUICK]
    out = tmp_path / "plan.json"
    assert main([*arguments, "--out", str(out)]) == 2
    assert "from step 12, and thresholds are for gates of at least 1000 steps" in capsys.readouterr().err
    assert not out.exists()
    low = ["gate_monitor.plan_min_steps=0", "gate_monitor.mamba_threshold=0.21"]
    assert main([*arguments, *low, "--out", str(out)]) == 0
    made = PrunePlan.load(out)
    assert made.criterion == "gate thresholds" and made.layer_branches == ["mamba"] * 3
    assert made.thresholds["mamba"] == 0.21 and all(layer.constant for layer in made.layers)
    capsys.readouterr()
    assert main(["plan", str(out), "--show"]) == 0
    assert [row[2::3] for row in table_rows(capsys.readouterr().out)] == [["kept", "cut", "mean gate above 0.21"]] * 3


def test_a_plan_does_not_replace_the_runs_own(run: Path, corpus: Path) -> None:
    own = (run / "prune_plan.json").read_bytes()
    data = ["--data", str(corpus / "train.jsonl")]
    assert main(["plan", str(run), *data, "--target", "parameters=0.9x", "--criterion", "random", *QUICK]) == 0
    assert PrunePlan.load(run / "prune_plan_random.json").criterion == "random"
    assert (run / "prune_plan.json").read_bytes() == own


def test_what_training_cuts_can_be_exported(run_settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = {"interval": 2, "plan_min_steps": 0, "mamba_threshold": 0.21, "plan_max_std": 1.0}
    sections = run_settings(gate_monitor=monitor, training={"max_steps": 2}, output_dir=str(tmp_path / "run"))
    run = fusiontree.train(sections).run
    made = PrunePlan.load(run / "prune_plan.json")
    assert made.layer_branches == ["mamba", "mamba"]
    assert all(max(map(abs, layer.constant)) > 0 for layer in made.layers)
    parent = fusiontree.load(run, device="cpu")
    export = ["export", str(run), str(run / "prune_plan.json"), str(tmp_path / "cut"), "--context", "0"]
    assert main([*export, "--device", "cpu"]) == 0
    assert "no constants" not in (shown := capsys.readouterr().out) and "no fingerprint" not in shown
    ids = torch.arange(30)[None]
    with torch.no_grad():
        want, got = (m(ids).logits for m in (reference_parent(parent, made), fusiontree.load(tmp_path / "cut")))
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
    fusiontree.train(sections | {"training": sections["training"] | {"max_steps": 3}}, resume="auto")
    first = run / "checkpoints" / "step_00000002"
    assert main(["export", str(first), str(run / "prune_plan.json"), str(tmp_path / "old"), "--device", "cpu"]) == 2
    assert "was made for another model" in capsys.readouterr().err


def test_what_training_wrote_can_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = PrunePlan.load(run / "prune_plan.json")
    assert made.criterion == "gate thresholds"
    out = tmp_path / "same"
    assert main(["export", str(run), str(run / "prune_plan.json"), str(out), "--context", "0", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "nothing is cut" in shown and "too early: step 12 of at least 1000 (layers 0, 1, 2)" in shown
    parent, same = fusiontree.load(run, device="cpu"), fusiontree.load(out, device="cpu")
    with torch.no_grad():
        assert torch.equal(parent(torch.arange(9)[None]).logits, same(torch.arange(9)[None]).logits)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "RUN", "--data", "TEXT"], "name a target, such as decode=1.4x"),
        (["plan", "RUN", "--target", "decode=1.4x"], "--data is missing"),
        (
            ["plan", "RUN", "--data", "TEXT", "--target", "decod=1.4x"],
            "there is no target 'decod'; did you mean decode?",
        ),
        (["plan", "RUN", "--data", "TEXT", "--target", "decode=fast"], "give a number, as in decode=1.4x"),
        (["plan", "RUN", "--data", "TEXT", "--target", "decode=0.9x"], "how many times as fast, so above 1"),
        (["plan", "RUN", "--data", "TEXT", "--target", "memory=1.2x"], "so between 0 and 1"),
        (
            ["plan", "RUN", "--data", "TEXT", "--target", "memory=0.9x", "--target", "memory=0.8x"],
            "memory is asked for twice",
        ),
        (["plan", "RUN", "--data", "TEXT", "--target", "max_loss_increase=0.1x"], "nats per token, as in max_loss_inc"),
        (["plan", "RUN", "--data", "TEXT", "--target", "memory=0.9x", "--out", "/proc/plan.json"], "--out: "),
        (["plan", "RUN", "training.max_steps=3", "--criterion", "gate", "--data", "TEXT"], "gate_monitor alone"),
        (["plan", "MERGED", "--data", "TEXT", "--target", "memory=0.9x"], "the maps of each of its layers are merged"),
        (["plan", "FEWER", "--show"], "but FEWER decides about 2 layers: make the plan again"),
        (["plan", "PLAN", "--show", "--target", "memory=0.9x"], "draws as it is: leave out --target"),
        (["export", "RUN", "FEWER", "OUT"], "but FEWER decides about 2 layers: make the plan again"),
        (
            ["plan", "RUN", "--data", "TEXT", "--target", "decode=2x", "--criterion", "ablatoin"],
            "there is no criterion 'ablatoin'; did you mean ablation?",
        ),
        (["plan", "RUN", "--data", "SHORT", "--target", "parameters=0.9x"], "too little calibration text: 2 tokens"),
        (
            ["plan", "RUN", "--data", "TEXT", "--target", "parameters=0.1x"],
            "=0.1x cannot be met: with one branch left in every layer, and one step of its heads it is parameters=0.",
        ),
        (
            ["plan", "RUN", "--data", "TEXT", "--target", "decode=2x", "--heads", "--criterion", "gate"],
            "the criterion gate ranks whole branches: to cut single heads",
        ),
        (["plan", "RUN", "--data", "TEXT", "--heads", "--criterion", "gate"], "--heads goes with a --target"),
        (
            ["plan", "RUN", "--data", "TEXT", "--freeze-gates", "0.1", "--criterion", "gate"],
            "--freeze-gates goes with a --target",
        ),
        (
            ["plan", "RUN", "--data", "TEXT", "--empty-layers", "--criterion", "gate"],
            "--empty-layers goes with a --target",
        ),
        (["plan", "RUN", "--data", "NOTHING", "--target", "parameters=0.9x", "--out", "NEW"], "nothing.json"),
        (["plan", "BARE", "--data", "TEXT", "--target", "parameters=0.9x"], "holds no tokenizer"),
        (["plan", "NOTHING", "--show"], "nothing.json does not exist"),
        (["plan", "TEXT"], "is a file: name a model to plan for, or add --show"),
        (
            ["plan", "RUN", "gate_monitor.plan_records=2", "--target", "decode=2x"],
            "only --criterion gate without --target",
        ),
        (["export", "OTHER", "PLAN", "OUT"], "was made for another model"),
        (["export", "BARE", "PLAN", "OUT"], "decides about 3 layers, but the model has 2"),
        (["export", "RUN", "PLAN", "RUN"], "exists already: name a directory that does not"),
        (["export", "RUN", "NOTHING", "OUT"], "does not exist; it should hold the prune plan"),
        (["export", "CUT", "EMPTIES", "OUT"], "keeps attention in layer 0, which has mamba alone"),
        (["export", "RUN", "NEITHER", "OUT"], "layers.0.keep"),
        (["export", "RUN", "HEADLESS", "OUT"], "layer 0 takes all 4 heads of attention: take the branch out instead"),
        (["export", "GROUPED", "HALVES", "OUT"], "layer 0 takes the attention heads [0], which are no whole groups of"),
        (["heal", "RUN"], "does not say what it was cut from: name its parent with --parent"),
        (
            ["heal", "SHALLOW", "loss.hidden_coeff=1", "--parent", "RUN"],
            "has 3 layers of width 32, the student a FusionTree model of 2 layers of width 32: set loss.hidden_coeff",
        ),
        (["heal", "CUT", "data.eval_paths=[]", "--parent", "RUN"], "name data.eval_paths"),
        (["heal", "CUT", "--parent", "RUN", "--config", "MANY"], "many.yaml, line 3: training.max_steps"),
        (["heal", "CUT", "--parent", "RUN", "--config", "LIST"], "list.yaml, line 1: training"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    run: Path,
    plan: Path,
    corpus: Path,
    tmp_path: Path,
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a fox")
    (tmp_path / "many.yaml").write_text("training:\n  batch_size: 2\n  max_steps: many\n")
    (tmp_path / "list.yaml").write_text("training: [1]\n")
    content = json.loads(plan.read_text()) | {"model": None, "constants_file": None}
    for layer in content["layers"]:
        layer["constant"] = None
    changes = {"empties": {"keep": "attention"}, "neither": {"keep": None}}
    changes |= {
        name: {"keep": "both", "heads": {"attention": heads}}
        for name, heads in (("headless", [0, 1, 2, 3]), ("halves", [0]))
    }
    for name, change in changes.items():
        changed = content | {"layers": [content["layers"][0] | change, *content["layers"][1:]]}
        (tmp_path / f"{name}.json").write_text(json.dumps(changed))
    cut = {"num_layers": 3, "layer_branches": ["mamba", "both", "both"]}
    merged = {"layer_branches": ["mamba"] * 2, "layer_gates": [False] * 2, "layer_merges": ["hz"] * 2}
    fewer = json.loads(plan.read_text())
    (tmp_path / "fewer.json").write_text(json.dumps(fewer | {"layers": fewer["layers"][:2]}))
    shutil.copy(plan.with_name(fewer["constants_file"]), tmp_path)
    names = {
        "RUN": run,
        "PLAN": plan,
        "TEXT": corpus / "train.jsonl",
        "SHORT": tmp_path / "short.txt",
        "OUT": tmp_path / "out",
        "NEW": tmp_path / "new" / "sub" / "plan.json",
        "NOTHING": tmp_path / "nothing.json",
        "MANY": tmp_path / "many.yaml",
        "LIST": tmp_path / "list.yaml",
        "EMPTIES": tmp_path / "empties.json",
        "NEITHER": tmp_path / "neither.json",
        "HEADLESS": tmp_path / "headless.json",
        "HALVES": tmp_path / "halves.json",
        "GROUPED": save_tiny_model(tmp_path / "grouped", None, num_layers=3, num_kv_heads=2),
        "BARE": save_tiny_model(tmp_path / "bare", None),
        "OTHER": save_tiny_model(tmp_path / "other", None, num_layers=3),
        "FEWER": tmp_path / "fewer.json",
        "MERGED": save_tiny_model(tmp_path / "merged", corpus / "tokenizer", **merged),
        "CUT": save_tiny_model(tmp_path / "cut", corpus / "tokenizer", **cut),
        "SHALLOW": save_tiny_model(tmp_path / "shallow", corpus / "tokenizer"),
    }
    before = sorted(tmp_path.rglob("*")), (run / "prune_plan.json").read_bytes()
    extra = QUICK if arguments[0] == "plan" and arguments[1] != "TEXT" and "--show" not in arguments else []
    assert main([*(str(names.get(word, word)) for word in arguments), *extra]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence.replace("FEWER", str(names["FEWER"])) in errors[0]
    assert (sorted(tmp_path.rglob("*")), (run / "prune_plan.json").read_bytes()) == before
