"""Run: uv run benchmarks/texts.py

Texts to judge models by, out of what every set-up of this project installs: six domains, each a folder of documents of
which lamella holds out one in ten by the hash of its name. Conversions may be calibrated on the training part of four;
two, UNSEEN, are calibrated on by nothing, and figures on them are the ones to lead with. This command prints how many
documents and characters each has.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from lamella.data.sources import documents

Documents = Iterator[tuple[str, str]]
"""(a name that stays the same from one machine to the next, the text)"""


def wikipedia() -> Documents:
    """Articles of the English Wikipedia (A to Al), their mark-up taken out by gensim, which ships the dump."""
    import bz2

    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    dump = _gensim_file("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
    with bz2.open(dump) as pages:
        for title, text, _ in extract_pages(pages, filter_namespaces=("0",)):
            plain = filter_wiki(text).strip()
            if len(plain) > 1000:  # not a redirection
                yield title, plain


def news() -> Documents:
    """The 300 articles of the Lee background corpus, which gensim ships."""
    for i, article in enumerate(_gensim_file("lee_background.cor").read_text(encoding="utf-8").splitlines()):
        yield f"{i:03}", article


def c_headers() -> Documents:
    """The C headers of this Python."""
    folder = Path(sysconfig.get_paths()["include"])
    headers = sorted(folder.rglob("*.h"))
    if not headers:
        sys.exit(f"error: no C headers in {folder}; install those of this Python (python3-dev)")
    for i, header in enumerate(headers):
        yield f"{i:03}-{header.stem}", header.read_text(encoding="utf-8")


def readmes() -> Documents:
    """The READMEs of the installed packages."""
    for package in importlib.metadata.distributions():
        text = package.metadata.json.get("description", "")
        if isinstance(text, str) and len(text) > 1000:
            yield package.name.lower(), text


def library_code() -> Documents:
    """The modules of networkx, scipy's signal processing and matplotlib: code of other hands and subjects than Python's
    own library."""
    for package, part in (("networkx", "algorithms"), ("scipy", "signal"), ("matplotlib", "")):
        root = _package(package) / part
        for file in sorted(root.rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            if len(text) > 1000 and "tests" not in file.parts:
                yield f"{package}-{'-'.join(file.relative_to(root).with_suffix('').parts)}", text


WRITERS: dict[str, Callable[[], Documents]] = {
    "wikipedia": wikipedia, "news": news, "c-headers": c_headers, "readmes": readmes, "library-code": library_code,
}  # fmt: skip
SEEN = ("python-docs", "wikipedia", "news", "c-headers")
UNSEEN = ("readmes", "library-code")


def source_of(name: str, work: Path) -> str:
    """The domain as a source of lamella; its documents are written under `work` if they are not there."""
    if name not in WRITERS:
        return name
    folder = work / name
    if not folder.is_dir():
        unfinished = work / f"{name}.unfinished"
        write_documents(WRITERS[name](), unfinished)
        unfinished.rename(folder)
    return str(folder)


def write_documents(texts: Documents, folder: Path) -> None:
    """Each document as a text file of a new folder."""
    folder.mkdir(parents=True)
    for title, text in texts:
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in title)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", errors="replace")


def _gensim_file(name: str) -> Path:
    return _package("gensim") / "test" / "test_data" / name


def _package(name: str) -> Path:
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        sys.exit(f"error: the package {name} is missing, whose files are read; run uv sync")
    return Path(package.origin).parent


def main() -> None:
    from measure import print_table, work_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=work_folder, default=Path("artifacts/texts"))
    work = parser.parse_args().work
    rows = []
    for name in (*SEEN, *UNSEEN):
        source = source_of(name, work)
        sides = [list(documents(source, side)) for side in ("train", "heldout")]
        counts = [f"{len(side)} / {sum(map(len, side))}" for side in sides]
        rows.append([name, "unseen" if name in UNSEEN else "", *counts])
    print_table("documents / characters", ["domain", "", "training part", "held out"], rows)


if __name__ == "__main__":
    main()
