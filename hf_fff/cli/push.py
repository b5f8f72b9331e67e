"""``hf-fff push``."""

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from .card import BaseModel, Folder, Licence
from .common import Json, RemoteCode, app, out, reports_errors, table_of, working


@app.command()
@reports_errors
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub; made if need be.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files, their sizes and the card; send nothing, ask nobody.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Only where nobody else can see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, made if need be; main by default.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    base_model: BaseModel = None,
    licence: Licence = None,
    remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Push a converted model's folder to the Hub: model, tokenizer, results and card in one commit, or nothing.

    The card is that of hf-fff card, for this name. After an interruption, the same command sends only what the server has not.
    """
    from ..hub import look_through, make_card, push_folder, with_remote_code
    from ..hub.push import check_repo_id, files_of

    check_repo_id(repo_id)
    with working(), TemporaryDirectory() as work:
        contents = look_through(folder)
        if remote_code:
            contents = with_remote_code(contents, Path(work))
        card = make_card(contents, repo_id=repo_id, base_model=base_model, licence=licence)
        sent = files_of(contents, card)
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in sorted(sent.items())}
        done = None
        if not dry_run:
            options = {"private": private, "revision": revision, "create_pr": create_pr}
            done = push_folder(contents, repo_id, card=card, **options)  # type: ignore[arg-type]
    if as_json:
        told = {"repo_id": repo_id, "files": sizes, "card": card.text, "pushed": asdict(done) if done else None}
        print(json.dumps(told, indent=2))
        return
    if done is None:
        table = table_of("file", "bytes", title=f"{repo_id}: {sum(sizes.values()):,} bytes in {len(sizes)} files")
        for name, size in sizes.items():
            table.add_row(name, f"{size:,}")
        out.print(table)
        out.print(card.text, soft_wrap=True)
        return
    if not done.changed and not done.removed:
        out.print(f"{repo_id} has all of it already, at {done.commit}", soft_wrap=True)
        return
    told_removed = f", {len(done.removed)} removed" if done.removed else ""
    out.print(
        f"{len(done.changed)} of {len(sizes)} files changed{told_removed}: {done.pull_request or done.url}",
        soft_wrap=True,
    )
