"""The text that comes with the package, from Debian's:

    apt-get download jargon-text && dpkg-deb -x jargon-text_*.deb x
    python tools/jargon_text.py x/usr/share/doc/jargon-text/jargon.txt.gz gausssafe/data/jargon.txt.gz
"""
import gzip
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "…": "...", "×": "x", "·": "", "°": " degrees ", "\xa0": " "})


def is_prose(lines):
    "Not a table, a picture, verse or a list of terms"
    if len(lines) == 1: return lines[0].rstrip().endswith((".", "!", "?", ")"))
    return not any(line.startswith("     ") for line in lines) and all(len(line) >= 40 for line in lines[:-1])


def plain(entry):
    "One line of ASCII"
    heading, *rest = (paragraph.split("\n") for paragraph in re.split(r"\n\s*\n", entry))
    text = " ".join(line.strip() for lines in [heading, *filter(is_prose, rest)] for line in lines)
    text = unicodedata.normalize("NFKD", text.translate(PLAIN)).encode("ascii", "ignore").decode()
    return re.sub(r"^:([^:]+):", r"\1:", re.sub(r"\s+", " ", re.sub("[{}]", "", text)).strip())


def main(source, target):
    lines = gzip.decompress(Path(source).read_bytes()).decode().split("\n")
    start = next(i for i, line in enumerate(lines) if re.match(r"   :[^:]+:", line))
    stop = next(i for i, line in enumerate(lines) if i > start and line.strip().endswith("Appendices"))
    entries = [text for entry in re.split(r"\n(?=   :[^:\n]+: ?)", "\n".join(lines[start:stop])) if len(text := plain(entry)) >= 300]
    common = {character for character, n in Counter("".join(entries)).items() if n >= 20}
    text = "".join("".join(filter(common.__contains__, entry)) + "\n" for entry in entries)
    Path(target).write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{len(entries):,} entries, {len(text):,} characters of {len(common) + 1} kinds")


if __name__ == "__main__": main(*sys.argv[1:])
