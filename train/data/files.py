"""Which files of a folder are a corpus, and what is left out of it, so that it can be said.

Links are followed, a file is read once however many links lead to it, and what is hidden (a name
that begins with a dot: .git, .ipynb_checkpoints, ._x) is no text of the user's.
"""

import mimetypes
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vllm_memdec.errors import MemdecError

FORMATS = (
    ".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt", ".md", ".html", ".htm",
)  # fmt: skip
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# What `datasets` writes beside its data.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CACHE = "cache-*.arrow"  # what its maps and filters leave: the rows once more, or some of them
HEADED = (*COMPRESSIONS, ".parquet", ".arrow")  # kinds of files that have a header
TABLE = "train/README.md, What is read"
HIDDEN = "."
CARDS = ("README.md", "LICENSE.md", "LICENSE.txt")  # what describes a dataset of the hub
# What to do with a kind of file that holds text but is not read.
REMEDIES = {
    ".pdf": "PDF: pdftotext FILE.pdf",
    ".docx": "Word: pandoc -o FILE.txt FILE.docx",
    ".epub": "EPUB: pandoc -o FILE.txt FILE.epub",
    CACHE: "caches of datasets: save them with save_to_disk, or give one by its own path",
    ".zip": "unpack archives",
    ".tar": "unpack archives",
    ".tar.gz": "unpack archives",
    ".tgz": "unpack archives",
}
MEDIA = ("image", "audio", "video", "font")  # kinds of which nobody expects text
NAMED = 5  # kinds of files left out that a line names


@dataclass
class CorpusFiles:
    """The files of a corpus in order, and what lies beside them."""

    path: Path
    files: list[Path] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # suffix -> files left out
    sizes: Counter[str] = field(default_factory=Counter)  # suffix -> their bytes
    hidden: int = 0  # hidden files and folders
    broken: int = 0  # links to what is not there
    loops: int = 0  # links to a folder that they lie in

    def left_out(self) -> str:
        """Return what was left out, in words; "" if nothing was."""
        largest = [suffix for suffix, _ in self.sizes.most_common(NAMED)]
        parts = [
            f"{self.counts[s]:,} {s or 'without a suffix'} ({in_bytes(self.sizes[s])})"
            for s in largest
        ]
        others = sum(n for suffix, n in self.counts.items() if suffix not in largest)
        for count, what in (
            (others, "of other kinds"),
            (self.hidden, "hidden"),
            (self.broken, "links to what is not there"),
            (self.loops, "links to a folder that they lie in"),
        ):
            parts += [f"{count:,} {what}"] if count else []
        return ", ".join(parts)

    def remedies(self) -> str:
        """Return what to do with the kinds that were left out."""
        known = [REMEDIES[s] for s, _ in self.sizes.most_common() if s in REMEDIES]
        return "; ".join(dict.fromkeys(known))


def compression(path: Path) -> str:
    """Return the suffix of a file's compression, "" if it has none."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def format_of(path: Path) -> str:
    """Return the suffix that tells a file's format, in lower case, without its compression."""
    return (Path(path.stem) if compression(path) else path).suffix.lower()


def corpus_files(path: Path) -> CorpusFiles:
    """Return the files of a corpus; MemdecError if there are none, or others outweigh them."""
    if not path.exists():
        raise MemdecError(f"{path} does not exist: check the path.")
    corpus = CorpusFiles(path)
    files = [path] if path.is_file() else sorted(_walk(corpus))
    if path.parent.name == "snapshots":  # a dataset of the hub, in its cache
        files = [file for file in files if file.parent != path or file.name not in CARDS]
    return sorted_out(corpus, ((file, file.stat().st_size) for file in files))


def sorted_out(corpus: CorpusFiles, files: Iterable[tuple[Path, int]]) -> CorpusFiles:
    """Return a corpus of files, each with its size in bytes; MemdecError as from corpus_files()."""
    path = corpus.path
    weight, no_text = 0, 0
    cut: list[Path] = []
    for file, size in files:
        suffix = format_of(file)
        beside = "" if path.is_file() else _of_datasets(file)  # a file that is named is read
        if suffix in FORMATS and not beside:
            corpus.files.append(file)
            weight += size
            cut += [file] if not size and (compression(file) or suffix) in HEADED else []
            continue
        suffix = beside or suffix + compression(file)
        corpus.counts[suffix] += 1
        corpus.sizes[suffix] += size
        kind = mimetypes.guess_type(file.name)[0] or ""
        no_text += size if kind.split("/")[0] in MEDIA or beside else 0
    if cut:
        more = f" ({len(cut) - 1:,} more are like it)" if len(cut) > 1 else ""
        kind = (format_of(cut[0]) + compression(cut[0]))[1:]
        raise MemdecError(
            f"{cut[0]} has 0 bytes, which no {kind} file has{more}: copy it again, or remove it."
        )
    left_out = corpus.left_out()
    how = f" ({remedies})" if (remedies := corpus.remedies()) else ""
    if not corpus.files:
        beside = f" (left out: {left_out})" if left_out and not path.is_file() else ""
        raise MemdecError(
            f"{path} is no text{beside}: convert it{how}, or give {', '.join(FORMATS)}, each "
            f"also with {', '.join(COMPRESSIONS)}, or a folder of them ({TABLE})."
        )
    if corpus.broken > len(corpus.files):
        raise MemdecError(
            f"{path} holds {corpus.broken:,} links to what is not there, and {len(corpus.files):,} "
            "files that are: fetch what they stand for (git annex get, dvc pull), or remove them."
        )
    if sum(corpus.sizes.values()) - no_text > weight:
        raise MemdecError(
            f"most of {path} would be left out: {left_out}; read would be "
            f"{len(corpus.files):,} files ({in_bytes(weight)}): convert the rest{how}, or move it "
            f"out of the folder ({TABLE})."
        )
    return corpus


def _of_datasets(file: Path) -> str:
    """Return the name of what `datasets` writes beside its data, "" of any other file."""
    if file.name in METADATA:
        return file.name
    return CACHE if file.match(CACHE) else ""


def _walk(corpus: CorpusFiles) -> Iterator[Path]:
    """Yield the files under a folder, each once; count what is hidden or leads nowhere."""
    root = corpus.path.resolve()
    folders, files = {root}, set()  # places that were seen, behind all links
    todo, links = [(corpus.path, root)], deque[Path]()
    while todo or links:
        if todo:
            folder, place = todo.pop()
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    here, there = folder / entry.name, place / entry.name
                    if entry.name.startswith(HIDDEN):
                        corpus.hidden += 1
                    elif entry.is_symlink():
                        links.append(here)
                    elif entry.is_dir() and there not in folders:
                        folders.add(there)
                        todo.append((here, there))
                    elif entry.is_file() and there not in files:
                        files.add(there)
                        yield here
            continue
        link = links.popleft()  # when all that is there without it was seen
        there = Path(os.path.realpath(link))
        if there in (parent := link.parent.resolve(), *parent.parents):
            corpus.loops += 1
        elif not there.exists():  # also a link to itself
            corpus.broken += 1
        elif there.is_dir() and there not in folders:
            folders.add(there)
            todo.append((link, there))
        elif there.is_file() and there not in files:
            files.add(there)
            yield link


def in_bytes(size: int) -> str:
    """Return a number of bytes for people."""
    amount, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
