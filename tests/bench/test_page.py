"""Pages and pictures from the JSON of measurements, and what they say of the paper's claim."""

import json

import pytest

from hf_fff.bench import page, plot

MACHINE = {
    "cpu": "Some CPU", "cores": 2, "threads": 2, "isa": "avx512", "caches": {"L1": "48K"}, "torch": "2.13", "transformers": "5",
    "python": "3.11", "hf_fff": "0", "date": "a day", "load": {"before": 0.1, "after": 0.2, "others": 0.3}, "seconds": 77,
}  # fmt: skip


def layer_row(threads, tokens, loop=True, others=0.0, weights="random"):
    times = {"fff": 10.0, "dense": 2000.0, "torch": 300.0, "dense:3072": 1500.0}
    return {
        "fff": "1x11", "hidden_size": 768, "dtype": "float32", "weights": weights, "threads": threads, "tokens": tokens, "visited": 12,
        "nodes": 4095, "forward": times, "loop": {"fff": 5.0, "dense": 1900.0, "int8 rows": 3.8} if loop else {}, "overhead": 5.0 if loop else None,
        "backward": {"fff": 10.0, "dense": 20.0, "masked": 30.0, "torch": 4.0, "routing": 40.0}, "others": others,
    }  # fmt: skip


def scaling_row(name, threads, tokens, speedup, others=0.0):
    return {
        "name": name, "hidden_size": 768, "inner": 4095, "fff": "1x11", "threads": threads, "tokens": tokens, "dense": 1e6,
        "measured": 1e6 / speedup, "visited": 12, "bandwidth": 25.0, "others": others, "speedup": speedup, "theory": 341.25, "roofline": 500.0,
    }  # fmt: skip


LAYER = {
    **MACHINE,
    "command": "layer",
    "rows": [layer_row(1, 1), layer_row(2, 1, others=1.2), layer_row(1, 8, loop=False)],
    "threads_faster": [
        {"fff": "1x11", "hidden_size": 768, "dtype": "float32", "weights": "random", "tokens": 1, "threads": "1 -> 2", "faster": 1.9, "dense": 1.5}
    ],
}  # fmt: skip
SCALING = {
    **MACHINE,
    "command": "scaling",
    "rows": [
        scaling_row("paper", 1, 1, 534.0),
        scaling_row("paper", 1, 8, 178.0, 1.0),
        scaling_row("gpt-3", 1, 1, 900.0),
    ],
    "bandwidth": [{"mb": 4, "threads": 1, "gb_per_second": 26.0, "others": 0.0}],
    "skipped": {"gpt-4": "needs much"},
}
MODEL = {
    **MACHINE,
    "command": "model",
    "size": "bert-base",
    "visited": {"workload": "1x16", "8x8 float32": [700, 900, 800]},
    "rows": [
        {
            "workload": "1x16", "tokens": 64, "others": 0.0, "seconds": {"dense float32": 0.4, "8x8 float32": 0.2, "none float32": 0.18},
            "ratios": {"dense float32": 1.0, "8x8 float32": 0.5, "none float32": 0.45},
            "shares": {"dense float32": 0.45, "8x8 float32": 0.9, "none float32": 1.0},
        }
    ],
}  # fmt: skip


def test_pages(tmp_path):
    for name, told in (("layer", LAYER), ("scaling", SCALING), ("model", MODEL)):
        (tmp_path / f"cpu-{name}.json").write_text(json.dumps(told))
    trained = {**LAYER, "rows": [layer_row(1, 1, weights="layer 3 of m")]}
    (tmp_path / "cpu-layer-m.json").write_text(json.dumps(trained))
    written = page.write_pages(tmp_path)
    assert [p.name for p in written] == ["cpu-layer.md", "cpu-model.md", "cpu-scaling.md"]
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".png"}
    layer, model, scaling = (p.read_text() for p in written)
    for text in (layer, model, scaling):
        assert "Some CPU, 2 cores" in text and "a day" in text and "up to 0.3 cores" in text and "77 s" in text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert lines and "" in text.splitlines()
    assert "| 1x11 | float32 | 2 | 5 µs, 380x * |" in layer  # disturbed
    assert "| 1x11 | int8 rows | 2 | 3.8 µs, 500x * |" in layer
    assert "| 1x11 | float32 | 1 | 10 µs, 200x / 30x / 150x | 10 µs, 200x / 30x / 150x |" in layer
    assert "10 µs, 2.0x / 3.0x / 0.4x; 0.5x" in layer and "1.90x (1.50x)" in layer and "layer 3 of m" in layer
    assert "costs 5.0 to 5.0 µs more" in layer
    assert "| 8x8 float32 | 50 ms, 2.00x, 90 % |" in model and "| 8x8 float32 | 85 % | 90 % | everywhere |" in model
    assert "a batch of 1x16 uses in a layer: 8x8 float32 700 to 900." in model
    assert "gpt-4 was skipped: needs much." in scaling and "| 1 | 26 |" in scaling


def write(folder, **tolds):
    folder.mkdir(exist_ok=True)
    for name, told in tolds.items():
        (folder / f"{name.replace('_', '-')}.json").write_text(json.dumps(told))


def test_pages_of_two_machines(tmp_path):
    """Titles name the machine, pages of the same name link to each other, and those of one page alone to none."""
    avx2 = {**MACHINE, "cpu": "AMD EPYC Processor (family 25)", "isa": "avx2"}
    results, other = tmp_path / "results", tmp_path / "results" / "avx2"
    write(results, cpu_layer=LAYER, cpu_model=MODEL)
    write(other, cpu_layer={**LAYER, **avx2})
    for folder in (results, other):
        page.write_pages(folder)
    first, second = ((f / "cpu-layer.md").read_text() for f in (results, other))
    assert first.startswith("# How fast a layer is on a CPU: Some CPU, AVX-512\n")
    assert second.startswith("# How fast a layer is on a CPU: AMD EPYC (family 25), AVX2\n")
    assert "another machine: [AMD EPYC (family 25), AVX2](avx2/cpu-layer.md)." in first
    assert "another machine: [Some CPU, AVX-512](../cpu-layer.md)." in second
    assert "another machine" not in (results / "cpu-model.md").read_text()


def test_goals_are_those_of_the_machine():
    """In float32 each kind has its own; without AVX-512 bf16 is told and not judged."""
    rows = [layer_row(2, 1), layer_row(2, 8, others=1.2), layer_row(2, 16)]
    rows[0]["loop"] |= {"dense": 2100.0, "bf16 rows": 7.0}
    text = {isa: "\n".join(page.layer_page({**LAYER, "isa": isa, "rows": rows}, [])) for isa in ("avx512", "avx2", "-")}
    assert "| float32 rows | 420x, goal 400x **reached** | 380x, goal 400x * | 380x |" in text["avx512"]
    assert "| bf16 rows | 300x, goal 420x missed | - | - |" in text["avx512"]
    assert "int8 rows have no goal here" in text["avx512"]
    assert "| float32 rows | 420x, goal 500x missed | 380x, goal 550x * | 380x |" in text["avx2"]
    assert (
        "| bf16 rows | 300x | - | - |" in text["avx2"] and "bf16 rows and int8 rows have no goal here" in text["avx2"]
    )
    assert "goal" not in text["-"]
    (row,) = MODEL["rows"]
    row = {**row, "shares": {**row["shares"], "8x8 bfloat16": 0.9}}
    assert page._goal("8x8 bfloat16", 0.85, [row])[-1] == "everywhere"
    assert page._goal("8x8 bfloat16", 0.85, [row], "avx2")[-1] == "not judged: such a CPU has no bfloat16"
    assert page._goal("8x8 float32", 0.85, [row], "avx2")[-1] == "everywhere"


def test_remaking_a_page_changes_nothing(tmp_path):
    (tmp_path / "cpu-model.json").write_text(json.dumps(MODEL))
    (first,) = page.write_pages(tmp_path)
    before = first.read_bytes()
    page.write_pages(tmp_path)
    assert first.read_bytes() == before


def test_nothing_to_make_a_page_of(tmp_path):
    (tmp_path / "cpu-layer-trained.json").write_text(json.dumps(LAYER))  # has no page of its own
    with pytest.raises(FileNotFoundError, match="has no cpu-layer.json"):
        page.write_pages(tmp_path)


TRAIN = {
    **MACHINE, "command": "train", "size": "bert-base", "bf16": False, "rounds": 5, "rows": [
        {"model": "dense", "workload": "16x128", "milliseconds": 15335.0, "tokens_per_second": 133.6, "times_as_fast": 1.0, "peak_mb": 4466.0, "dead": None},
        {"model": "1x11 + routing", "workload": "16x128", "milliseconds": 6358.0, "tokens_per_second": 322.1, "times_as_fast": 2.41, "peak_mb": None, "dead": 0.634},
    ],
}  # fmt: skip


def test_pages_of_what_is_there(tmp_path, monkeypatch, capsys):
    """One measurement is enough, and what is missing is told."""
    (tmp_path / "train.json").write_text(json.dumps(TRAIN))
    monkeypatch.setattr(page.sys, "argv", ["page", str(tmp_path)])
    page.main()
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / "train.md")]
    assert [line.rpartition(": ")[2] for line in err.splitlines()] == [
        f"{name}.md was not made" for name in ("cpu-layer", "cpu-frontier", "cpu-scaling", "cpu-model", "serve")
    ]
    text = (tmp_path / "train.md").read_text()
    assert text.startswith("# What a step of training takes: bert-base, Some CPU, AVX-512\n")
    assert "| 16x128 | dense | 15.3 s | 134 | 1.00x | 4466 | - |" in text
    assert "| 16x128 | 1x11 + routing | 6.36 s | 322 | 2.41x | - | 63% |" in text
    (tmp_path / "cpu-layer.json").write_text(json.dumps(LAYER))
    page.main()
    out, err = capsys.readouterr()
    assert len(out.split()) == 2 and "cpu-layer" not in err and "cpu-model.json" in err


@pytest.mark.parametrize(
    ("speedups", "said"),
    [
        ({1: 534.0, 8: 178.0}, "**it is reached** with 534x at 1 token on 1 thread; **it is not** with 178x at 8 tokens on 1 thread."),
        ({1: 222.0}, "**it is reached nowhere**: 222x at 1 token on 1 thread."),
        ({1: 341.25, 8: 400.0}, "**it is reached everywhere**: 341x at 1 token on 1 thread, 400x at 8 tokens on 1 thread."),
    ],
)  # fmt: skip
def test_the_claim(speedups, said):
    text = "\n".join(page.claim([scaling_row("paper", 1, tokens, x) for tokens, x in speedups.items()]))
    assert said in text and "4095 / 12" in text


def test_the_claim_elsewhere_and_unmeasured():
    rows = [scaling_row("paper", 2, 1, 200.0), scaling_row("gpt-3", 2, 1, 900.0), scaling_row("bert-tiny", 2, 1, 50.0)]
    text = "\n".join(page.claim(rows))
    assert "these exceed 341x: gpt-3 (1x11) 900x at 1 token on 2 threads." in text and "bert-tiny" not in text
    assert "Not judged" in page.claim(rows[1:])[0]


def test_what_was_disturbed_is_not_judged():
    text = "\n".join(page.claim([scaling_row("paper", 1, 1, 534.0, others=1.0), scaling_row("paper", 1, 8, 178.0)]))
    assert "reached nowhere" in text and "534" not in text
    assert "Not judged" in page.claim([scaling_row("paper", 1, 1, 534.0, others=1.0)])[0]
    (row,) = MODEL["rows"]
    quiet, busy = {**row, "workload": "8x128"}, {**row, "others": 1.5}
    assert page._goal("8x8 float32", 0.85, [busy])[-1] == "not judged: others used the machine"
    assert page._goal("8x8 float32", 0.85, [busy, quiet])[-1] == "at 8x128 of those undisturbed"
    assert page._goal("8x8 float32", 0.95, [quiet])[-1] == "nowhere"


def test_csv_lines():
    assert plot.csv_lines([{"a": 1, "b": None}, {"a": 2, "c": "x"}]) == [["a", "b", "c"], ["1", "", ""], ["2", "", "x"]]
