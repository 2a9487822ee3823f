"""What a run leaves behind: tables on the screen, numbers as JSON, pictures."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plots import save_figure
from .report import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_results"]


def write_results(
    folder: str | PathLike[str],
    results: Mapping[str, Any],
    figures: Mapping[str, "Figure"],
    *tables: str,
    name: str = "results.json",
    also: Sequence[str] = (),
    dpi: int = 130,
) -> None:
    """Print tables, seconds and file names; write the files.

    Args:
        folder: made if it does not exist.
        results: what the JSON file holds; ``seconds`` of it, by part of the run, are printed.
        figures: by file name.
        *tables: text to print, with an empty line between.
        name: of the JSON file.
        also: names of the folder's other files, to be printed with these.
        dpi: dots of an inch in pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / name, results)
    for file, figure in figures.items():
        save_figure(figure, folder / file, dpi=dpi)
    seconds = "  ".join(f"{part} {value}" for part, value in results["seconds"].items())
    print("", "\n\n".join(tables), "", f"seconds: {seconds}", sep="\n")
    print(f"Written to {folder}: {', '.join([name, *also, *figures])}")
