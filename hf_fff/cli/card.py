"""``hf-fff card``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import Json, app, out, reports_errors, working

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a converted model.")]
Results = Annotated[
    list[Path] | None,
    typer.Option(help="Files of hf-fff eval --json and hf-fff bench model --json, of this model; may be repeated."),
]
BaseModel = Annotated[str | None, typer.Option(help="OWNER/NAME of the dense model; as recorded by default.")]
Licence = Annotated[str | None, typer.Option("--license", help="Such as apache-2.0; the dense model's by default.")]


@app.command()
@reports_errors
def card(
    folder: Folder,
    results: Results = None,
    repo_id: Annotated[
        str | None, typer.Option(help="OWNER/NAME that the snippets load; push sets it by itself.")
    ] = None,
    base_model: BaseModel = None,
    licence: Licence = None,
    as_json: Json = False,
) -> None:
    """Write the model card of a converted model, or renew its marked blocks and metadata.

    What is written by hand outside of the blocks stays. Figures come from --results files of these very weights, which are kept in
    the folder; what was not measured says so.
    """
    from ..hub import write_card
    from ..hub.push import check_repo_id

    if repo_id is not None:
        check_repo_id(repo_id)
    with working():
        written = write_card(folder, results or [], repo_id=repo_id, base_model=base_model, licence=licence)
    if as_json:
        print(json.dumps({"card": str(folder / "README.md"), "metadata": written.metadata}, indent=2, default=str))
        return
    out.print(f"{folder / 'README.md'} is written", soft_wrap=True)
