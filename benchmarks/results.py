"""The rows that were measured: the ``extra_info`` of every --benchmark-json file in a folder."""

import json
from pathlib import Path

NOT_YET = "not yet measured"


def load(folder: Path) -> list[dict]:
    """Measured rows of all JSON files under ``folder``, oldest file first; a later row of the same name replaces an
    earlier one.

    A row is its ``extra_info``. Files that are not of --benchmark-json (a campaign's own state) are passed over. Raises
    ValueError that names a file that is not JSON.
    """
    rows: dict[tuple, dict] = {}
    folder = Path(folder)
    for path in (
        sorted(folder.rglob("*.json"), key=lambda path: (path.stat().st_mtime, path.name)) if folder.is_dir() else ()
    ):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(document, dict) or not isinstance(document.get("benchmarks"), list):
            continue
        for row in document["benchmarks"]:
            info = row.get("extra_info", {})
            if "median_ms" in info:
                rows[row["fullname"], info.get("device"), info.get("dtype"), info.get("batch_size")] = info
    return list(rows.values())


def find(rows: list[dict], **wanted: object) -> dict | None:
    """The last row with these values, or None."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return found[-1] if found else None
